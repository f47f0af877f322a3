"""Promises of ``sqlroute.routing.hashing``: it puts a key where PostgreSQL puts it.

Each type is compared in one query, on the server of the run (PostgreSQL 18) and on the oldest one
supported. The modulus 2**31 - 1 is the largest PostgreSQL takes and, a prime, lets every bit of the
64 count.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from sqlroute.routing.hashing import KeyKind, bucket_of, buckets_of

pytestmark = pytest.mark.servers

OLDEST_BIN = Path("/usr/lib/postgresql/15/bin")
MODULI = (64, 65_536, 2**31 - 1)
COUNT = 2_500
INTEGER, TEXT, UUID = KeyKind.INTEGER, KeyKind.TEXT, KeyKind.UUID
Key = tuple[Any, ...]


def integers(bits: int) -> list[Key]:
    """Return edges and random values of a signed integer type, small and large alike."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    around = [p + d for n in range(bits) for p in (1 << n, -(1 << n)) for d in (-1, 0, 1)]
    rng = random.Random(bits)
    edges = [value for value in (low, low + 1, high - 1, high, *around) if low <= value <= high]
    return [(value,) for value in (*edges, *(rng.randint(low, high) for _ in range(COUNT)))]


def texts() -> list[Key]:
    """Return texts of each byte length to 80, of long multiples of 12, and of all planes."""
    rng = random.Random(3)
    alphabet = "aZ09 _-é߿ࠀ中�😀\U0010ffff'\"\\\n\t"
    lengths = [*range(80), *(12 * n for n in range(80)), *(12 * n + 1 for n in range(80)), 50_000]
    plain = ["x" * length for length in lengths]
    mixed = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(COUNT)]
    return [(text,) for text in (*plain, *mixed, "é", "e\u0301")]


def uuids() -> list[Key]:
    rng = random.Random(4)
    edges = [0, 1, 2**128 - 1, *(1 << n for n in range(128))]
    values = [*edges, *(rng.getrandbits(128) for _ in range(COUNT))]
    return [(uuid.UUID(int=value),) for value in values]


def paired(left: list[Key], right: list[Key]) -> list[Key]:
    """Return two-column keys, some with a NULL on one side or on both."""
    pairs = [a + b for a, b in zip(left, right, strict=False)]
    first, second = zip(*pairs[:20], strict=True)
    return [
        *pairs,
        *((value, None) for value in first),
        *((None, value) for value in second),
        (None, None),
    ]


KEYS: dict[str, tuple[tuple[str, ...], tuple[KeyKind, ...], list[Key]]] = {
    "smallint": (("smallint",), (INTEGER,), integers(16)),
    "int": (("int",), (INTEGER,), integers(32)),
    "bigint": (("bigint",), (INTEGER,), [*integers(64), (None,)]),
    "text": (("text",), (TEXT,), texts()),
    "uuid": (("uuid",), (UUID,), uuids()),
    "bigint_text": (("bigint", "text"), (INTEGER, TEXT), paired(integers(64), texts())),
    "uuid_int": (("uuid", "int"), (UUID, INTEGER), paired(uuids(), integers(32))),
    "text_uuid_smallint": (
        ("text", "uuid", "smallint"),
        (TEXT, UUID, INTEGER),
        [a + b + c for a, b, c in zip(texts(), uuids(), integers(16), strict=False)],
    ),
}


@pytest.fixture(scope="module")
def chosen(sqlroute_single: Any) -> Iterator[psycopg.Connection]:
    with psycopg.connect(**sqlroute_single.conninfo, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def oldest(sqlroute_topology_factory: Any) -> Iterator[psycopg.Connection]:
    if not OLDEST_BIN.exists():
        pytest.skip(f"no PostgreSQL 15 in {OLDEST_BIN}")
    topology = sqlroute_topology_factory(shards=1, replicas=0, pg_bin=OLDEST_BIN)
    with psycopg.connect(**topology.node("s0-a").conninfo, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("name", KEYS)
def test_a_key_has_the_partition_of_the_chosen_server(
    chosen: psycopg.Connection, name: str
) -> None:
    """PostgreSQL 18 unless the run chose another one."""
    assert misplaced(chosen, name) == []


@pytest.mark.parametrize("name", KEYS)
def test_a_key_has_the_partition_of_the_oldest_server(
    oldest: psycopg.Connection, name: str
) -> None:
    assert oldest.info.server_version // 10_000 == 15
    assert misplaced(oldest, name) == []


@pytest.mark.parametrize("name", ["bigint", "text", "uuid"])
def test_the_bulk_way_agrees_with_the_server(chosen: psycopg.Connection, name: str) -> None:
    _, (kind,), keys = KEYS[name]
    values = [key[0] for key in keys]

    assert misplaced(chosen, name, found=buckets_of(values, kind, MODULI[-1])) == []


def test_the_server_finds_a_wrong_answer(chosen: psycopg.Connection) -> None:
    """The comparison itself can fail."""
    _, kinds, keys = KEYS["bigint"]
    found = [bucket_of(key, kinds, MODULI[-1]) for key in keys]
    found[7] ^= 1

    assert [bad[:2] for bad in misplaced(chosen, "bigint", found=found)] == [
        (MODULI[-1], found[7]),
    ]


def misplaced(
    connection: psycopg.Connection, name: str, *, found: list[int] | None = None
) -> list[tuple[Any, ...]]:
    """Return (modulus, our bucket, *key) of each key whose bucket the server contradicts."""
    types, kinds, keys = KEYS[name]
    assert len(keys) >= 2_000
    moduli = MODULI if found is None else MODULI[-1:]
    remainders = found or [bucket_of(key, kinds, m) for m in moduli for key in keys]
    columns = [list(column) for column in zip(*(keys * len(moduli)), strict=True)]
    names = [f"k{i}" for i in range(len(types))]
    table = sql.Identifier(f"hashed_by_{name}")
    definition = sql.SQL(", ").join(
        sql.SQL(f"{column} {type_}") for column, type_ in zip(names, types, strict=True)
    )
    key = sql.SQL(", ".join(names))
    connection.execute(
        sql.SQL("CREATE TEMP TABLE IF NOT EXISTS {} ({}) PARTITION BY HASH ({})").format(
            table, definition, key
        )
    )
    arrays = sql.SQL(", ").join(sql.SQL(f"%s::{type_}[]") for type_ in types)
    query = sql.SQL(
        "SELECT modulus, remainder, {key} FROM unnest(%s::int[], %s::int[], {arrays})"
        " AS t (modulus, remainder, {key})"
        " WHERE NOT satisfies_hash_partition({table}::regclass, modulus, remainder, {key})"
    ).format(key=key, arrays=arrays, table=sql.Literal(f"hashed_by_{name}"))
    moduli_of_rows = [modulus for modulus in moduli for _ in keys]
    return connection.execute(query, [moduli_of_rows, remainders, *columns]).fetchall()
