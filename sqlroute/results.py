"""Make one SQLAlchemy ``Result`` of the results of several shards, or of a coordinator's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import CursorResult, IteratorResult, Result
from sqlalchemy.engine.result import ChunkedIteratorResult, SimpleResultMetaData

from sqlroute.errors import TooManyRows
from sqlroute.identity import tokens_by_key
from sqlroute.routing.interleaving import Read
from sqlroute.runtime.fetching import TimedCursor
from sqlroute.runtime.scatter import locate

if TYPE_CHECKING:
    from sqlroute.routing.merge import MergeSpec
    from sqlroute.routing.rewrite import Rewritten
    from sqlroute.session import RoutingMixin


def merged(
    results: Sequence[Result[Any]], rewritten: Rewritten, names: Sequence[str]
) -> Result[Any]:
    """Return the merged result: a drop-in for the one that a single server would have given.

    It has the caller's column names, rows can be read by column, and what an ORM result knows
    (single entity, whether ``unique()`` must be called) is kept.

    Args:
        names: of the shards and nodes, for the errors of reading their rows.
    """
    from sqlroute.routing.merge import merge

    parts, spec = _parts(results, rewritten, names), rewritten.spec
    rows = _held(parts, spec) if _has_objects(results[0]) else merge(parts, spec)
    return _answer(results[0], rewritten, rows)


def check_rows(results: Sequence[Result[Any]], most: int) -> None:
    """Refuse to merge more rows than are allowed.

    Raises:
        TooManyRows: says how to have fewer, or all of them.
    """
    if sum(cursor_result(result).rowcount for result in results) > most:
        raise TooManyRows(
            f"{len(results)} shards have sent more than max_scatter_rows = {most} rows; add a "
            "LIMIT or conditions, read them as a stream (yield_per), or raise it in the policy",
            most,
        )


def cursor_result(result: Result[Any]) -> CursorResult[Any]:
    """Return the result of the driver's cursor below the ORM's, if it is not that itself."""
    found: Any = result
    return found if isinstance(found, CursorResult) else found.raw


def time_fetches(result: Any, name: str, seconds: Callable[[], float | None]) -> None:
    """Bound each fetch of a stream, see :class:`~sqlroute.runtime.fetching.TimedCursor`."""
    found = cursor_result(result)
    if found.cursor is not None:
        found.cursor = TimedCursor(found.cursor, name, seconds)


def streamed(
    results: Sequence[Result[Any]],
    rewritten: Rewritten,
    names: Sequence[str],
    size: int | None,
    share: int,
    read: Read,
) -> Result[Any]:
    """Return the merged result of server-side cursors, which reads them as it is read.

    When it is closed, has given its last row or meets an error, all cursors are closed.

    Args:
        size: rows that ``partitions()`` gives at a time, as the caller wished.
        share: rows that are fetched from each shard at a time.
        read: fetches them from several shards at the same time.
    """
    from sqlroute.routing.merge import merge

    cursors = _Cursors(results)
    parts, spec = _parts(results, rewritten, names), rewritten.spec
    if _has_objects(results[0]):  # to make one may take statements: not two at once in a session
        rows = merge(parts, spec, share) if size else _held(parts, spec)
    else:
        rows = merge(parts, spec, share, read)
    answer = _answer(results[0], rewritten, cursors.closed_after(rows))
    answer.raw = cursors  # type: ignore[assignment]  # what SQLAlchemy asks of it, it has
    answer._yield_per = size
    return answer


def at_once(result: Result[Any], session: RoutingMixin) -> Result[Any]:
    """Return a coordinator's result, whose rows are all here, with its objects made."""
    if isinstance(result, ChunkedIteratorResult):
        with tokens_by_key(session):
            chunks = list(result.chunks(None))
        result.chunks = lambda _: iter(chunks)
        result.iterator = chain.from_iterable(chunks)
    return result


def in_batches(result: Result[Any], session: RoutingMixin, size: int | None) -> Result[Any]:
    """Return a coordinator's result, whose rows are all here, as a stream gives it.

    The objects of a batch are made when it is asked for.

    Args:
        size: rows of a batch; ``None`` for as many as are asked for at a time.
    """
    if isinstance(result, ChunkedIteratorResult):
        make = result.chunks

        def chunks(count: int | None) -> Iterator[Any]:
            batches = make(count)
            while True:
                with tokens_by_key(session):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        result.chunks = chunks
        result.iterator = chain.from_iterable(chunks(None))
        result.dynamic_yield_per = True
    return result if size is None else result.yield_per(size)


class _Cursors:
    """The results of a stream's shards, as SQLAlchemy sees the one result below an answer.

    Attributes:
        context: of the first, which says that its cursor is on the server.
    """

    def __init__(self, results: Sequence[Result[Any]]) -> None:
        self._results = results
        self.context = cursor_result(results[0]).context

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


def _has_objects(first: Result[Any]) -> bool:
    return bool(first._attributes.get("filtered"))  # SQLAlchemy's word for it


def _held(parts: Sequence[Iterable[Any]], spec: MergeSpec) -> Iterator[Any]:
    """Return the merged rows; the objects in them all live until the last row.

    ``unique()`` tells objects apart by ``id()``, which a new one takes over from one that is gone.
    The rows of one server become objects all at once, and live as long as its result is read.
    """
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


def _parts(
    results: Sequence[Result[Any]], rewritten: Rewritten, names: Sequence[str]
) -> list[Iterable[tuple[Any, ...]]]:
    entities = rewritten.spec.entities
    return [_rows(result, entities, name) for result, name in zip(results, names, strict=True)]


def _tuples(result: Result[Any], entities: bool) -> Iterable[tuple[Any, ...]]:
    """Return the rows as tuples; joined eager rows of one entity are one row already."""
    if entities:
        return map(tuple, result.unique())
    if isinstance(result, CursorResult):
        return map(tuple, result)
    rows: Any = result._raw_row_iterator()  # the ORM has made tuples, or objects where it is alone
    return zip(rows) if result._source_supports_scalars else rows


def _rows(result: Result[Any], entities: bool, name: str) -> Iterable[tuple[Any, ...]]:
    """Yield the rows; errors say where."""
    try:
        yield from _tuples(result, entities)
    except Exception as error:
        locate(error, name)
        raise
