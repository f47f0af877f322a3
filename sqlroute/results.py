"""Make one SQLAlchemy ``Result`` of the results of several shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from psycopg import adapters
from sqlalchemy.engine import CursorResult, IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData

from sqlroute.errors import CrossShardRefused, TooManyRows

if TYPE_CHECKING:
    from sqlroute.routing.merge import MergeSpec
    from sqlroute.routing.plan import Target
    from sqlroute.routing.rewrite import Rewritten

OWN_TYPES = 16_384
"""The first OID of what is not PostgreSQL's own: that of a type differs from server to server."""

SAME_VALUES = {"int2": "int8", "int4": "int8", "varchar": "text"}
"""Types whose values, order and equality are those of another one."""

Column = tuple[str, int]
"""Name, and the OID of the type."""


def merged(results: Sequence[Result[Any]], rewritten: Rewritten) -> Result[Any]:
    """Return the merged result: a drop-in for the one that a single server would have given.

    It has the caller's column names, rows can be read by column, and what an ORM result knows
    (single entity, whether ``unique()`` must be called) is kept.
    """
    parts = [_rows(result, rewritten.spec.entities) for result in results]
    rows = _merged(results[0], parts, rewritten.spec)
    return _answer(results[0], rewritten, rows)


def check_rows(results: Sequence[Result[Any]], most: int) -> None:
    """Refuse to merge more rows than are allowed.

    Raises:
        TooManyRows: says how to have fewer, or all of them.
    """
    if sum(_cursor(result).rowcount for result in results) > most:
        raise TooManyRows(
            f"{len(results)} shards have sent more than max_scatter_rows = {most} rows; add a "
            "LIMIT or conditions, read them as a stream (yield_per), or raise it in the policy",
            most,
        )


def check_columns(targets: Sequence[Target], results: Sequence[Result[Any]]) -> None:
    """Refuse to merge what has other columns on one shard than on the first.

    So it may be after half a migration, or with ``SELECT *`` where columns were added in another
    order: a value would stand under the name of another, or be compared with one of another type.

    Raises:
        CrossShardRefused: says what differs, and where; all cursors are closed.
    """
    first, *others = map(_columns, results)
    for target, columns in zip(targets[1:], others, strict=True):
        if columns == first or not (columns and first):
            continue
        difference = _difference(first, columns)
        if difference is None:
            continue
        _Cursors(results).close()
        here, there = (f"on {one.shard} ({one.node})" for one in (targets[0], target))
        raise CrossShardRefused(
            "columns",
            f"{difference[0]} {here}, but {difference[1]} {there}; bring the shards to one schema",
        )


def streamed(results: Sequence[Result[Any]], rewritten: Rewritten, size: int | None) -> Result[Any]:
    """Return the merged result of server-side cursors, which reads them as it is read.

    When it is closed, has given its last row or meets an error, all cursors are closed.

    Args:
        size: rows that ``partitions()`` gives at a time, as the caller wished.
    """
    from sqlroute.routing.merge import merge

    cursors = _Cursors(results)
    parts = [_rows(result, rewritten.spec.entities) for result in results]
    rows = merge(parts, rewritten.spec) if size else _merged(results[0], parts, rewritten.spec)
    answer = _answer(results[0], rewritten, cursors.closed_after(rows))
    answer.raw = cursors  # type: ignore[assignment]  # what SQLAlchemy asks of it, it has
    answer._yield_per = size
    return answer


class _Cursors:
    """The results of a stream's shards, as SQLAlchemy sees the one result below an answer.

    Attributes:
        context: of the first, which says that its cursor is on the server.
    """

    def __init__(self, results: Sequence[Result[Any]]) -> None:
        self._results = results
        self.context = _cursor(results[0]).context

    def close(self) -> None:
        """Close the cursors, every one, even where another fails to close."""
        errors: list[Exception] = []
        for result in self._results:
            try:
                result.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _soft_close(self, **_: Any) -> None:
        self.close()

    def closed_after(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Yield the rows; close the cursors after the last one, or at an error.

        Not when the iterator is thrown away: that may happen anywhere, and closing awaits. What is
        left open then ends with the transaction.
        """
        try:
            yield from rows
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.close()
            raise
        self.close()


def _merged(first: Result[Any], parts: Sequence[Iterable[Any]], spec: MergeSpec) -> Iterator[Any]:
    """Return the merged rows; where they have objects, all of these live until the last row.

    ``unique()`` tells objects apart by ``id()``, which a new one takes over from one that is gone.
    The rows of one server become objects all at once, and live as long as its result is read.
    """
    from sqlroute.routing.merge import merge

    if first._attributes.get("filtered"):  # SQLAlchemy's word for rows that have objects
        return _held(parts, spec)
    return merge(parts, spec)


def _held(parts: Sequence[Iterable[Any]], spec: MergeSpec) -> Iterator[Any]:
    from sqlroute.routing.merge import merge

    held = [list(part) for part in parts]
    yield from merge(held, spec)


def _answer(first: Result[Any], rewritten: Rewritten, rows: Iterator[Any]) -> IteratorResult[Any]:
    spec = rewritten.spec
    names = list(first._metadata._keys)  # keys() leaves out an alias without a name
    visible = len(names) - spec.hidden
    if isinstance(first, CursorResult):  # its rows are processed when they are read: once is enough
        # of a text() none
        columns = list(getattr(rewritten.statement, "selected_columns", ()))[:visible]
        metadata: Any = SimpleResultMetaData(
            names[:visible],
            extra=[(column,) for column in columns] if len(columns) == visible else None,
        )
    else:
        metadata = first._metadata._reduce(list(range(visible))) if spec.hidden else first._metadata
    state, attributes = first._unique_filter_state, first._attributes
    if visible == 1 and spec.hidden and attributes.get("filtered"):  # an entity, alone but for us
        attributes = attributes.union({"is_single_entity": True})
    answer: IteratorResult[Any] = IteratorResult(metadata, rows)
    answer._unique_filter_state = state
    answer._attributes = answer._attributes.merge_with(attributes)
    return answer


def _cursor(result: Result[Any]) -> CursorResult[Any]:
    """Return the result of the driver's cursor below the ORM's, if it is not that itself."""
    found: Any = result
    return found if isinstance(found, CursorResult) else found.raw


def _columns(result: Result[Any]) -> list[Column]:
    """Return the columns that a server says it sends; none where its rows were fetched already."""
    cursor: Any = _cursor(result).cursor
    if cursor is None:
        return []
    answer = getattr(cursor, "_cursor", cursor).pgresult  # below SQLAlchemy's async one
    return [(answer.fname(i).decode(), answer.ftype(i)) for i in range(answer.nfields)]


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
        return "a type of its own"
    known = adapters.types.get(oid)
    return f"type {oid}" if known is None else known.name


def _rows(result: Result[Any], entities: bool) -> Iterable[tuple[Any, ...]]:
    """Yield rows; joined eager rows of one entity are one row already."""
    yield from (tuple(row) for row in (result.unique() if entities else result))
