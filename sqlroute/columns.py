"""What servers say of the columns that they send, and what must hold of it before they are merged.

A merge is planned by what the program declares. The servers know better: a column may be missing on
one shard in the middle of a migration, or be of another type than its ``Table`` says. Each answer
tells the name and type of its columns, so this is looked at before a row is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from psycopg import adapters
from sqlalchemy.engine import Result

from sqlroute.errors import CrossShardRefused
from sqlroute.results import cursor_result
from sqlroute.routing.combining import AggregateKind
from sqlroute.routing.ordering import Family
from sqlroute.routing.shapes import HIDDEN

if TYPE_CHECKING:
    from sqlroute.routing.merge import MergeSpec
    from sqlroute.routing.plan import Target

OWN_TYPES = 16_384
"""The first OID of what is not PostgreSQL's own: that of a type differs from server to server."""

OWN = "a type of its own"

SAME_VALUES = {"int2": "int8", "int4": "int8", "varchar": "text"}
"""Types whose values, order and equality are those of another one."""

ORDERED_AS = {
    Family.NUMBER: frozenset({"int2", "int4", "int8", "oid", "float4", "float8", "numeric"}),
    Family.BOOLEAN: frozenset({"bool"}),
    Family.DATE: frozenset({"date"}),
    Family.TIMESTAMP: frozenset({"timestamp", "timestamptz"}),
    Family.TIME: frozenset({"time"}),
    Family.UUID: frozenset({"uuid"}),
    Family.BYTES: frozenset({"bytea"}),
    Family.TEXT: frozenset({"text", "varchar", "name"}),
}
"""The types whose values are ordered as their family is, when psycopg has loaded them."""

EQUAL_AS = {
    **ORDERED_AS,
    Family.TEXT: ORDERED_AS[Family.TEXT] | {"bpchar"},
    Family.LABEL: ORDERED_AS[Family.TEXT] | {OWN},
}
"""The types whose values are told apart as those of their family are."""

Column = tuple[str, int]
"""Name, and the OID of the type."""

_COMPARED = (AggregateKind.MIN, AggregateKind.MAX)
_ADDED = (AggregateKind.SUM, AggregateKind.AVG)


def check_columns(
    targets: Sequence[Target], results: Sequence[Result[Any]], spec: MergeSpec
) -> None:
    """Refuse to merge columns that are not alike on all shards, or not what they are taken for.

    Raises:
        CrossShardRefused: says which column is what, and where.
    """
    first, *others = map(_columns, results)
    if not first:
        return
    width = len(results[0]._metadata._keys)
    for clause, column, text, family, types in _compared(spec):
        place = _place_of(column, first, width, spec.hidden)
        if place is not None and (found := _type(first[place][1])) not in types:
            raise CrossShardRefused(
                clause,
                f"{text} is {found} {_on(targets[0])}, and taken for {family.value}; declare "
                "its type as it is, or cast() it",
            )
    for target, columns in zip(targets[1:], others, strict=True):
        if columns == first or not columns:
            continue
        difference = _difference(first, columns)
        if difference is not None:
            raise CrossShardRefused(
                "columns",
                f"{difference[0]} {_on(targets[0])}, but {difference[1]} {_on(target)}; "
                "bring the shards to one schema",
            )


def _columns(result: Result[Any]) -> list[Column]:
    """Return the columns that a server says it sends; none where its rows were fetched already."""
    cursor: Any = cursor_result(result).cursor
    if cursor is None:
        return []
    answer = getattr(cursor, "_cursor", cursor).pgresult  # below SQLAlchemy's async one
    return [(answer.fname(i).decode(), answer.ftype(i)) for i in range(answer.nfields)]


def _place_of(column: int, columns: Sequence[Column], width: int, hidden: int) -> int | None:
    """Return where a column of the rows is among those that the server sends.

    Where entities are of several columns, only what was hidden behind them is known by its name.

    Args:
        width: of the rows; hidden columns are their last ones, and count from the end.
    """
    if width == len(columns):
        return column
    label = f"{HIDDEN}{hidden + column + 1}"
    return next((i for i, (name, _) in enumerate(columns) if name.endswith(label)), None)


def _compared(spec: MergeSpec) -> Iterator[tuple[str, int, str, Family, frozenset[str]]]:
    """Yield (clause, column, its text, family, types that are fine) of all that Python compares."""
    for term in spec.order:
        if term.column not in _made(spec):
            yield "ORDER BY", term.column, term.text, term.family, ORDERED_AS[term.family]
    for key in spec.distinct or ():
        yield "DISTINCT", key.column, key.text, key.family, EQUAL_AS[key.family]
    if spec.grouping is None:
        return
    for key in spec.grouping.keys:
        yield "GROUP BY", key.column, key.text, key.family, EQUAL_AS[key.family]
    for aggregate in spec.grouping.aggregates:
        if aggregate.kind in _COMPARED + _ADDED:
            types = ORDERED_AS[aggregate.family]
            yield aggregate.kind.value, aggregate.value, aggregate.text, aggregate.family, types


def _made(spec: MergeSpec) -> frozenset[int]:
    """Return the columns whose values are made by the merge, of others."""
    if spec.grouping is None:
        return frozenset()
    computed = (one.column for one in spec.grouping.computed)
    return frozenset((*computed, *(one.value for one in spec.grouping.aggregates)))


def _difference(one: Sequence[Column], other: Sequence[Column]) -> tuple[str, str] | None:
    """Return what is one thing here and another there, as words."""
    names, others = ([name for name, _ in columns] for columns in (one, other))
    if names != others:
        return f"they are {', '.join(names)}", ", ".join(others)
    for (name, mine), (_, theirs) in zip(one, other, strict=True):
        here, there = _type(mine), _type(theirs)
        if SAME_VALUES.get(here, here) != SAME_VALUES.get(there, there):
            return f"{name} is {here}", there
    return None


@cache
def _type(oid: int) -> str:
    if oid >= OWN_TYPES:
        return OWN
    known = adapters.types.get(oid)
    return f"type {oid}" if known is None else known.name


def _on(target: Target) -> str:
    return f"on {target.shard} ({target.node})"
