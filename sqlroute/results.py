"""Make one SQLAlchemy ``Result`` of the results of several shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import CursorResult, IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData

if TYPE_CHECKING:
    from sqlroute.routing.rewrite import Rewritten


def merged(results: Sequence[Result[Any]], rewritten: Rewritten) -> Result[Any]:
    """Return the merged result: a drop-in for the one that a single server would have given.

    It has the caller's column names, rows can be read by column, and what an ORM result knows
    (single entity, whether ``unique()`` must be called) is kept.
    """
    from sqlroute.routing.merge import merge

    first, spec = results[0], rewritten.spec
    visible = len(first.keys()) - spec.hidden
    if isinstance(first, CursorResult):  # its rows are processed when they are read: once is enough
        # of a text() none
        columns = list(getattr(rewritten.statement, "selected_columns", ()))[:visible]
        metadata: Any = SimpleResultMetaData(
            list(first.keys())[:visible],
            extra=[(column,) for column in columns] if len(columns) == visible else None,
        )
    else:
        metadata = first._metadata._reduce(list(range(visible))) if spec.hidden else first._metadata
    state, attributes = first._unique_filter_state, first._attributes
    if visible == 1 and spec.hidden and attributes.get("filtered"):  # an entity, alone but for us
        attributes = attributes.union({"is_single_entity": True})
    rows = merge([_rows(result, spec.entities) for result in results], spec)
    answer: IteratorResult[Any] = IteratorResult(metadata, rows)
    answer._unique_filter_state = state
    answer._attributes = answer._attributes.merge_with(attributes)
    return answer


def _rows(result: Result[Any], entities: bool) -> Iterable[tuple[Any, ...]]:
    """Yield rows; joined eager rows of one entity are one row already."""
    yield from (tuple(row) for row in (result.unique() if entities else result))
