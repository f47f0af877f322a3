"""Promises of the partition hash. ``test_hashing_on_postgres`` proves it equal to a server's."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.hashing import KeyKind, bucket_of, buckets_of, partition_hash

INTEGER, TEXT, UUID = KeyKind.INTEGER, KeyKind.TEXT, KeyKind.UUID

# What a column adds to the hash of a row that has been empty so far.
FIRST = 0x49A0F4DD15E5A8E3

# select hashint8extended(42, 8816678312871386365), read as unsigned; PostgreSQL 15.18 and 18.6
SERVER_HASHES = [
    (INTEGER, 0, 14043151463718383821),
    (INTEGER, -1, 13429671726050313922),
    (INTEGER, 42, 7363975540656877951),
    (INTEGER, 1 << 32, 5968994663651403477),
    (INTEGER, (1 << 63) - 1, 4938542303000433043),
    (INTEGER, -(1 << 63), 12396478474604902556),
    (TEXT, "", 12746098489256034243),
    (TEXT, "shop", 513776295633039794),
    (TEXT, "twelve bytes", 1551002018851372083),
    (TEXT, "naïve 北京 😀", 17454969089071763137),
    (TEXT, "x" * 1000, 2850011608476373763),
    (UUID, uuid.UUID(int=0), 13165661927312822978),
    (UUID, uuid.UUID("12345678-1234-5678-1234-567812345678"), 10089357462841577963),
]

# the remainder modulo 65,536 that satisfies_hash_partition accepts
SERVER_BUCKETS = [
    ((INTEGER, TEXT), (42, "shop"), 62_763),
    ((INTEGER, TEXT), (-1, ""), 20_384),
    ((INTEGER, TEXT), (None, "shop"), 55_957),
    ((INTEGER, TEXT), (42, None), 23_138),
    ((INTEGER, TEXT), (None, None), 0),
    ((UUID, INTEGER), (uuid.UUID("12345678-1234-5678-1234-567812345678"), 7), 45_762),
    ((UUID, INTEGER), (uuid.UUID(int=0), -(1 << 31)), 64_328),
]

PLAIN = {
    INTEGER: st.integers(-(1 << 63), (1 << 63) - 1),
    TEXT: st.text("\x01aZ0 _é߿中\uffff😀\U0010ffff"),
    UUID: st.uuids(),
}
kinds = st.sampled_from(KeyKind)
columns = kinds.flatmap(lambda kind: st.tuples(st.just(kind), st.none() | PLAIN[kind]))


@pytest.mark.parametrize(("kind", "value", "hashed"), SERVER_HASHES)
def test_one_column_hashes_as_on_the_server(kind: KeyKind, value: object, hashed: int) -> None:
    assert partition_hash((value,), (kind,)) == (hashed + FIRST) % 2**64


@pytest.mark.parametrize(("kinds_", "values", "bucket"), SERVER_BUCKETS)
def test_several_columns_combine_as_on_the_server(
    kinds_: tuple[KeyKind, ...], values: tuple[object, ...], bucket: int
) -> None:
    assert bucket_of(values, kinds_, 65_536) == bucket


@given(st.lists(columns, min_size=1, max_size=4), st.sampled_from([1, 2, 64, 65_536]))
def test_the_bucket_is_the_remainder_of_the_hash(
    key: list[tuple[KeyKind, object]], buckets: int
) -> None:
    values = tuple(value for _, value in key)
    of = tuple(kind for kind, _ in key)

    assert bucket_of(values, of, buckets) == partition_hash(values, of) % buckets
    assert 0 <= bucket_of(values, of, buckets) < buckets


@given(st.lists(columns, min_size=1, max_size=4))
def test_a_key_has_one_hash_of_64_bits(key: list[tuple[KeyKind, object]]) -> None:
    values = tuple(value for _, value in key)
    of = tuple(kind for kind, _ in key)

    assert partition_hash(values, of) == partition_hash(values, of)
    assert 0 <= partition_hash(values, of) < 2**64


@given(st.data(), kinds, st.integers(0, 30), st.sampled_from([7, 64]))
def test_bulk_equals_one_by_one(
    data: st.DataObject, kind: KeyKind, length: int, buckets: int
) -> None:
    values = data.draw(st.lists(PLAIN[kind], min_size=length, max_size=length))

    assert buckets_of(values, kind, buckets) == [bucket_of((v,), (kind,), buckets) for v in values]


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("kind", KeyKind)
def test_bulk_takes_any_number_of_keys(kind: KeyKind, count: int) -> None:
    plain: dict[KeyKind, list[object]] = {
        INTEGER: [n * 0x9E3779B97F4A7C15 % 2**64 - 2**63 for n in range(count)],
        TEXT: [f"{'é' * (n % 29)}{n}" for n in range(count)],
        UUID: [uuid.UUID(int=n * (2**127 - 1) % 2**128) for n in range(count)],
    }
    values = plain[kind]

    assert buckets_of(iter(values), kind, 64) == [bucket_of((v,), (kind,), 64) for v in values]


def test_bulk_puts_nulls_where_the_server_puts_them() -> None:
    assert buckets_of([42, None, 43], INTEGER, 64) == [
        bucket_of((value,), (INTEGER,), 64) for value in (42, None, 43)
    ]


def test_null_contributes_nothing() -> None:
    assert partition_hash((None, 42), (TEXT, INTEGER)) == partition_hash((42,), (INTEGER,))
    assert partition_hash((None,), (UUID,)) == 0


def test_the_text_of_a_uuid_is_that_uuid() -> None:
    key = uuid.uuid5(uuid.NAMESPACE_DNS, "sqlroute")

    assert bucket_of((str(key),), (UUID,), 64) == bucket_of((key,), (UUID,), 64)
    assert buckets_of([key, str(key)], UUID, 64) == buckets_of([key, key], UUID, 64)


def test_subclasses_of_int_and_str_hash_as_their_value() -> None:
    class Tenant(enum.IntEnum):
        ACME = 42

    class Region(enum.StrEnum):
        EAST = "east"

    assert bucket_of((Tenant.ACME,), (INTEGER,), 64) == bucket_of((42,), (INTEGER,), 64)
    assert buckets_of([Region.EAST], TEXT, 64) == buckets_of(["east"], TEXT, 64)


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        (INTEGER, True, "integer shard key of type bool"),
        (INTEGER, 1.0, "integer shard key of type float"),
        (INTEGER, "1", "integer shard key of type str"),
        (INTEGER, Decimal(1), "integer shard key of type Decimal"),
        (INTEGER, 1 << 63, "9223372036854775808 is outside of bigint"),
        (INTEGER, -(1 << 63) - 1, "-9223372036854775809 is outside of bigint"),
        pytest.param(INTEGER, 1 << 100_000, "of 100001 bits is outside of bigint", id="huge"),
        (TEXT, 1, "text shard key of type int"),
        (TEXT, b"a", "text shard key of type bytes"),
        (TEXT, "a\0b", "holds NUL or a lone surrogate"),
        (TEXT, "\ud800", "holds NUL or a lone surrogate"),
        (UUID, 1, "uuid shard key of type int"),
        (UUID, b"0" * 16, "uuid shard key of type bytes"),
        (UUID, "no uuid", "of type str is not a UUID"),
    ],
)
def test_a_value_of_another_type_is_refused(kind: KeyKind, value: object, named: str) -> None:
    """One by one and in bulk, where the message also says which value it was."""
    with pytest.raises(InvalidShardKey, match=named):
        bucket_of((value,), (kind,), 64)
    good: object = {INTEGER: 1, TEXT: "a", UUID: uuid.UUID(int=1)}[kind]
    with pytest.raises(InvalidShardKey, match=f"^value 2000: .*{named}"):
        buckets_of([*[good] * 2000, value], kind, 64)


def test_a_refused_text_is_not_shown() -> None:
    with pytest.raises(InvalidShardKey) as caught:
        bucket_of(("tenant-of-somebody",), (UUID,), 64)

    assert "somebody" not in str(caught.value)


@pytest.mark.parametrize("values", [(), (1, 2)])
def test_a_key_needs_one_value_per_column(values: tuple[object, ...]) -> None:
    with pytest.raises(InvalidShardKey, match=f"1 columns got {len(values)} values"):
        bucket_of(values, (INTEGER,), 64)
