"""Which buckets the values of one execution allow."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.keys import MAX_KEYS, Bind, Product, Recipe, bucket_of_row, stored

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
