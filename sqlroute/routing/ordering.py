"""PostgreSQL's order and equality of values, as Python keys.

It turns a value that psycopg loaded into something that compares, and hashes, as PostgreSQL
compares the value: NULL where the clause puts it, NaN above every number, moments by their
instant. It knows no SQL types: :mod:`sqlroute.routing.families` says which family an expression
is of, or refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import repeat
from typing import Any, TypeAlias
from uuid import UUID

Encode: TypeAlias = Callable[[Any], Any]
RowKey: TypeAlias = Callable[[Sequence[Any]], Any]
BlockKey: TypeAlias = Callable[[Sequence[Sequence[Any]]], list[Any]]

_EPOCH = datetime(1970, 1, 1)
_UTC_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Family(Enum):
    """Types that PostgreSQL orders alike. The value is its name in messages."""

    NUMBER = "number"
    BOOLEAN = "boolean"
    DATE = "date"
    TIMESTAMP = "timestamp"
    TIME = "time"
    UUID = "uuid"
    BYTES = "bytea"
    TEXT = "text"
    LABEL = "enum"  # told apart by it only: its order is that of a rank


@dataclass(frozen=True, slots=True)
class SortTerm:
    """One term of ORDER BY.

    Attributes:
        column: index of the value in a row; hidden columns count from the end, so negative.
        text: the expression, for people.
    """

    column: int
    family: Family
    descending: bool
    nulls_first: bool
    text: str

    def __str__(self) -> str:
        default = self.descending == self.nulls_first
        nulls = "" if default else " nulls first" if self.nulls_first else " nulls last"
        return f"{self.text}{' desc' if self.descending else ''}{nulls}"


class Reversed:
    """A value that sorts the other way round."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: Reversed) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reversed) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value)


def row_key(terms: Sequence[SortTerm]) -> RowKey:
    """Return the function from a row to its place in the order of ``terms``."""
    parts = [
        (term.column, encoder(term.family, term.descending, term.nulls_first)) for term in terms
    ]
    if len(parts) == 1:
        ((column, encode),) = parts
        return lambda row: encode(row[column])
    return lambda row: tuple([encode(row[column]) for column, encode in parts])


def block_key(terms: Sequence[SortTerm]) -> BlockKey:
    """Return the function from many rows to what :func:`row_key` gives for each; a third faster."""
    parts = [(term.column, _column_encoder(term)) for term in terms]
    if len(parts) == 1:
        ((column, encode),) = parts
        return lambda rows: list(encode([row[column] for row in rows]))
    return lambda rows: list(
        zip(*(encode([row[column] for row in rows]) for column, encode in parts), strict=True)
    )


def _column_encoder(term: SortTerm) -> Callable[[Sequence[Any]], Iterable[Any]]:
    encode = encoder(term.family, term.descending, term.nulls_first)
    inner = _inner(term.family, term.descending)

    def encode_all(values: Sequence[Any]) -> Iterable[Any]:
        if _ORDINARY.issuperset(map(type, values)):  # as encode would, were it asked for each
            return zip(repeat(0), values if inner is None else map(inner, values))
        return map(encode, values)

    return encode_all


def encoder(family: Family, descending: bool = False, nulls_first: bool = False) -> Encode:
    """Return the function from a value to a key that compares as PostgreSQL orders the value.

    The key is a pair: a rank (NULL, NaN or ordinary) and what compares inside the rank. Without
    further arguments it serves for equality too: equal keys are one group.
    """
    null = (-2, 0) if nulls_first else (2, 0)
    nan = (-1, 0) if descending else (1, 0)
    inner = _inner(family, descending)
    if family is Family.NUMBER:
        return _number_encoder(null, nan, inner)
    if inner is None:
        return lambda value: null if value is None else (0, value)
    return lambda value: null if value is None else (0, inner(value))


def _inner(family: Family, descending: bool) -> Encode | None:
    """Return what makes a value compare inside its rank; ``None`` where it does by itself."""
    return _DESCENDING[family] if descending else _ASCENDING.get(family)


def _number_encoder(null: Any, nan: Any, inner: Encode | None) -> Encode:
    def encode(value: Any) -> Any:
        if value is None:
            return null
        if value != value:  # noqa: PLR0124 - NaN, of float and of Decimal
            return nan
        return (0, value if inner is None else inner(value))

    return encode


def _moment(value: datetime) -> datetime | timedelta:
    # Two aware datetimes with one tzinfo compare by the wall clock, wrong in the hour that is
    # repeated when summer time ends; their distance to an epoch in UTC is the instant.
    return value if value.tzinfo is None else value - _UTC_EPOCH


def _negated_moment(value: datetime) -> timedelta:
    return (_EPOCH if value.tzinfo is None else _UTC_EPOCH) - value


def _negated_number(value: Any) -> Any:
    # The unary minus of Decimal rounds to the precision of the caller's context.
    return value.copy_negate() if isinstance(value, Decimal) else -value


def _negated_day(value: date) -> int:
    return -value.toordinal()


_ASCENDING: dict[Family, Encode] = {Family.TIMESTAMP: _moment}
_DESCENDING: dict[Family, Encode] = {
    Family.NUMBER: _negated_number,
    Family.BOOLEAN: lambda value: not value,
    Family.DATE: _negated_day,
    Family.TIMESTAMP: _negated_moment,
    Family.TIME: Reversed,
    Family.UUID: lambda value: -value.int,
    Family.BYTES: Reversed,
    Family.TEXT: Reversed,
}

_ORDINARY = frozenset({int, bool, str, bytes, date, datetime, time, UUID})
"""Types none of whose values is NULL or NaN."""
