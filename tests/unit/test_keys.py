"""Which buckets the values of one execution allow."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.types import NULLTYPE

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.keys import (
    MAX_KEYS,
    Bind,
    OneOf,
    Product,
    Recipe,
    Rows,
    Span,
    bucket_of_row,
    stored,
)

BUCKETS = 64
INTEGER, TEXT, UUID = (KeyKind.INTEGER,), (KeyKind.TEXT,), (KeyKind.UUID,)


class Color(enum.IntEnum):
    RED = 5


class Negated(sa.TypeDecorator[int]):
    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else -value


class Coded(sa.TypeDecorator[str]):
    """Knows some values only; the others are a KeyError."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> int | None:
        return {None: None, "five": 5}[value]


def equal(name: str = "k", type_: Any = None) -> tuple[Product, ...]:
    return (Product((Bind(name, False, type_ or sa.BigInteger()),)),)


def among(name: str = "k", type_: Any = None) -> tuple[Product, ...]:
    return (Product((Bind(name, True, type_ or sa.BigInteger()),)),)


def buckets(
    *unions: tuple[Product, ...], kinds: tuple[KeyKind, ...] = INTEGER, **values: Any
) -> frozenset[int] | None:
    return Recipe(unions).buckets(values.__getitem__, kinds, BUCKETS)


def of(*keys: Any, kinds: tuple[KeyKind, ...] = INTEGER) -> frozenset[int]:
    rows = (key if isinstance(key, tuple) else (key,) for key in keys)
    return frozenset(bucket_of(row, kinds, BUCKETS) for row in rows)


def test_no_condition_allows_every_bucket() -> None:
    assert buckets() is None


def test_one_value_is_one_bucket() -> None:
    assert buckets(equal(), k=5) == of(5)


def test_null_is_no_bucket() -> None:
    """``k = NULL`` matches no row, not even one whose key is NULL."""
    assert buckets(equal(), k=None) == frozenset()


def test_list_is_a_union() -> None:
    assert buckets(among(), k=[1, 2, 2, None]) == of(1, 2)


@pytest.mark.parametrize("values", [[1, 2], (1, 2), {1, 2}, {1: "a", 2: "b"}.keys()])
def test_any_collection_is_a_list(values: Any) -> None:
    assert buckets(among(), k=values) == of(1, 2)


def test_empty_list_is_no_bucket() -> None:
    assert buckets(among(), k=[]) == frozenset()


def test_null_instead_of_a_list_is_no_bucket() -> None:
    """``= ANY(NULL)`` matches no row."""
    assert buckets(among(), k=None) == frozenset()


def test_iterator_is_left_for_the_driver() -> None:
    """Reading it here would leave nothing to send."""
    values = iter([1, 2])

    assert buckets(among(), k=values) is None
    assert list(values) == [1, 2]


def test_conditions_are_an_intersection() -> None:
    assert buckets(among("a"), among("b"), a=[1, 2, 3], b=[2, 3, 4]) == of(2, 3)


def test_contradiction_is_no_bucket() -> None:
    one, other = 1, next(n for n in range(2, 99) if of(n) != of(1))

    assert buckets(equal("a"), equal("b"), a=one, b=other) == frozenset()


def test_unknown_condition_beside_a_known_one_restricts_nothing_more() -> None:
    assert buckets(equal("a"), equal("b"), a=5, b=2.5) == of(5)


def test_alternatives_are_a_union() -> None:
    either = (*equal("a"), *among("b"))

    assert buckets(either, a=1, b=[2, 3]) == of(1, 2, 3)


def test_one_unknown_alternative_allows_every_bucket() -> None:
    assert buckets((*equal("a"), *equal("b")), a=1, b="x") is None


def test_missing_value_allows_every_bucket() -> None:
    assert buckets(equal("missing"), k=1) is None


@pytest.mark.parametrize("value", [5.0, Decimal(5), "5", True, b"5", 2**63, -(2**63) - 1, [5]])
def test_value_of_another_type_allows_every_bucket(value: Any) -> None:
    """PostgreSQL would compare it after a cast, or refuse it in its own words."""
    assert buckets(equal(), k=value) is None


@pytest.mark.parametrize("value", [5, -5, 0, 2**63 - 1, -(2**63)])
def test_every_bigint_has_a_bucket(value: int) -> None:
    assert buckets(equal(), k=value) == of(value)


def test_integer_of_an_enum_is_its_number() -> None:
    assert buckets(equal(), k=Color.RED) == of(5)


def test_text_that_postgresql_cannot_store_allows_every_bucket() -> None:
    assert buckets(equal(type_=sa.Text()), kinds=TEXT, k="a\0") is None


def test_type_decorator_gives_the_stored_value() -> None:
    assert buckets(equal(type_=Negated()), k=5) == of(-5)
    assert buckets(among(type_=Negated()), k=[5, None]) == of(-5)


def test_type_decorator_that_knows_no_such_value_allows_every_bucket() -> None:
    """Its own error comes when the statement is executed."""
    assert buckets(equal(type_=Coded()), k="six") is None
    assert buckets(equal(type_=Coded()), k="five") == of(5)


@pytest.mark.parametrize("type_", [sa.Uuid(), sa.Uuid(as_uuid=False), sa.UUID()])
def test_uuid_is_the_same_as_text_or_value(type_: Any) -> None:
    value = uuid.UUID("018f3b1e-0000-7000-8000-00000000000a")
    same = of(value, kinds=UUID)
    spelled = str(value) if not type_.as_uuid else value

    assert buckets(equal(type_=type_), kinds=UUID, k=spelled) == same


def test_text_that_is_no_uuid_allows_every_bucket() -> None:
    assert buckets(equal(type_=sa.Uuid(as_uuid=False)), kinds=UUID, k="no uuid") is None


def test_two_columns_are_combined() -> None:
    both = (Product((Bind("a", True, sa.Integer()), Bind("b", False, sa.Text()))),)
    kinds = (KeyKind.INTEGER, KeyKind.TEXT)

    assert buckets(both, kinds=kinds, a=[1, 2], b="x") == of((1, "x"), (2, "x"), kinds=kinds)


def test_null_in_one_of_two_columns_is_no_bucket() -> None:
    both = (Product((Bind("a", False, sa.Integer()), Bind("b", False, sa.Text()))),)

    assert buckets(both, kinds=(KeyKind.INTEGER, KeyKind.TEXT), a=1, b=None) == frozenset()


def test_too_many_keys_allow_every_bucket() -> None:
    assert buckets(among(), k=range(MAX_KEYS + 1)) is None
    assert buckets(among(), k=range(MAX_KEYS)) == frozenset(range(BUCKETS))


def test_too_many_combinations_allow_every_bucket() -> None:
    both = (Product((Bind("a", True, sa.Integer()), Bind("b", True, sa.Integer()))),)

    assert buckets(both, kinds=INTEGER * 2, a=range(200), b=range(200)) is None


def test_both_recipes_hold() -> None:
    recipe = Recipe((among("a"),)).both(Recipe((among("b"),)))

    assert recipe.buckets({"a": [1, 2], "b": [2, 3]}.__getitem__, INTEGER, BUCKETS) == of(2)


def test_row_is_placed_by_its_stored_value() -> None:
    assert bucket_of_row([5], [Negated()], INTEGER, BUCKETS) == bucket_of((-5,), INTEGER, BUCKETS)


@pytest.mark.parametrize("value", ["5", 5.0, True])
def test_row_whose_key_its_type_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(InvalidShardKey, match="integer shard key"):
        bucket_of_row([value], [sa.BigInteger()], INTEGER, BUCKETS)


@pytest.mark.parametrize("value", [None, 5, "x"])
def test_plain_types_store_what_they_are_given(value: Any) -> None:
    type_ = sa.Text() if isinstance(value, str) else sa.BigInteger()

    assert stored(value, type_) == value


def span(**options: bool) -> tuple[Product, ...]:
    ends = (Bind(name, False, sa.BigInteger()) for name in ("low", "high"))
    return (Product((Span(*ends, **options),)),)


def row_values(*positions: int) -> tuple[Rows, ...]:
    types = (sa.BigInteger(),) * len(positions)
    return (Rows(Bind("k", True, NULLTYPE, is_own=True), positions, types),)


def owner(bucket: int) -> str:
    return f"s{bucket % 2}"


def owner_of(*key: Any) -> str:
    return owner(bucket_of(key, INTEGER * len(key), BUCKETS))


def test_list_that_is_written_out_is_a_union() -> None:
    one_of = OneOf((Bind("a", False, sa.BigInteger()), Bind("b", False, sa.BigInteger())))

    assert buckets((Product((one_of,)),), a=1, b=None) == of(1)


def test_null_is_a_value_where_it_is_not_distinct() -> None:
    """``IS NOT DISTINCT FROM NULL`` finds rows whose key is NULL, wherever they are."""
    same = (Product((Bind("k", False, sa.BigInteger(), matches_null=True),)),)

    assert buckets(same, k=5) == of(5)
    assert buckets(same, k=None) is None


def test_span_is_each_integer_in_it() -> None:
    assert buckets(span(), low=3, high=6) == of(3, 4, 5, 6)
    assert buckets(span(above=True, below=True), low=3, high=6) == of(4, 5)


@pytest.mark.parametrize(("low", "high"), [(6, 3), (None, 3), (3, None)])
def test_span_of_nothing_is_no_bucket(low: int | None, high: int | None) -> None:
    assert buckets(span(), low=low, high=high) == frozenset()


def test_span_as_long_as_there_are_buckets_allows_every_bucket() -> None:
    assert buckets(span(), low=1, high=BUCKETS) is not None
    assert buckets(span(), low=1, high=BUCKETS + 1) is None
    assert buckets(span(), low=-(10**30), high=10**30) is None


@pytest.mark.parametrize("low", [2.5, Decimal(2), True, "2"])
def test_span_of_no_integers_allows_every_bucket(low: Any) -> None:
    assert buckets(span(), low=low, high=5) is None


def test_row_values_are_whole_keys() -> None:
    found = buckets(row_values(2, 0), kinds=INTEGER * 2, k=[(1, "x", 2), (3, "x", None)])

    assert found == of((2, 1), kinds=INTEGER * 2)


@pytest.mark.parametrize("rows", [[5], [(5,)], [("5", "6")], None])
def test_row_values_of_another_shape_prove_nothing_wrong(rows: Any) -> None:
    found = buckets(row_values(1), k=rows)

    assert found == (frozenset() if rows is None else None)


def test_text_that_postgresql_reads_as_an_array_is_a_list() -> None:
    assert buckets(among(type_=sa.Text()), kinds=TEXT, k="{a,b}") == of("a", "b", kinds=TEXT)
    assert buckets(among(type_=sa.Text()), kinds=TEXT, k="ab") is None


def test_each_shard_has_its_share_of_a_list() -> None:
    """Every value on exactly one shard; NULL, which matches nothing, on none."""
    mine = Recipe(((Product((Bind("k", True, sa.BigInteger(), is_own=True),)),),))

    shares = mine.shares({"k": [1, 2, 3, None]}.__getitem__, INTEGER, BUCKETS, owner)

    for key in (1, 2, 3):
        assert [shard for shard, keys in shares["k"].items() if key in keys] == [owner_of(key)]
    assert all(None not in keys for keys in shares["k"].values())


def test_share_of_a_list_beside_another_column() -> None:
    """``a = 1 AND b IN (2, 3)``: the value of b is where the pair is."""
    columns = (
        Bind("a", False, sa.BigInteger()),
        Bind("b", True, sa.BigInteger(), is_own=True),
    )
    recipe = Recipe(((Product(columns),),))

    shares = recipe.shares({"a": 1, "b": [2, 3]}.__getitem__, INTEGER * 2, BUCKETS, owner)

    assert all(owner_of(1, b) == shard for shard, found in shares["b"].items() for b in found)


def test_list_of_unknown_values_is_not_split() -> None:
    recipe = Recipe((among(),))
    own = Recipe(((Product((Bind("k", True, sa.BigInteger(), is_own=True),)),),))

    assert recipe.shares({"k": [1]}.__getitem__, INTEGER, BUCKETS, owner) == {}
    assert own.shares({"k": [1, 2.5]}.__getitem__, INTEGER, BUCKETS, owner) == {}
