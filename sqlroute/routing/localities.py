"""Which expressions of a SELECT are shard keys, so that their equal values are on one shard.

Groups, distinct rows and the partitions of a window function that are told apart by the key never
meet a row of another shard: each shard answers for its own, whatever is computed of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy.sql.elements import ColumnElement, Over
from sqlalchemy.sql.schema import Table
from sqlalchemy.sql.selectable import CTE, AliasedReturnsRows, FromClause, FromGrouping, Join

from sqlroute.routing.declare import Sharded, declaration, shard_key
from sqlroute.routing.families import bare

ColumnId = tuple[int, str]
"""A column of one use of a table: hash of the FROM element, column key."""


class Localities:
    """The shard keys of a SELECT's FROM.

    A table on the nullable side of an outer join is another matter: each shard may have rows
    without it, and NULL for its key.
    """

    def __init__(self, sources: Iterable[FromClause]) -> None:
        self._always: list[tuple[ColumnId, ...]] = []
        self._single: set[ColumnId] = set()
        for source in sources:
            self._note(source, nullable=False)

    def holds_key(self, expressions: Iterable[Any]) -> bool:
        """Say whether some table's whole key is among the expressions, in every row."""
        columns = {_column(expression) for expression in expressions}
        return any(columns.issuperset(key) for key in self._always)

    def is_key(self, expression: ColumnElement[Any]) -> bool:
        """Say whether the expression is a table's whole key, or NULL where a join found no row."""
        return _column(expression) in self._single

    def is_local(self, window: Over[Any]) -> bool:
        """Say whether all rows that a window function looks at are on one shard."""
        return window.partition_by is not None and self.holds_key(window.partition_by)

    def _note(self, source: Any, *, nullable: bool) -> None:
        if isinstance(source, FromGrouping):
            self._note(source.element, nullable=nullable)
        elif isinstance(source, Join):
            self._note(source.left, nullable=nullable or source.full)
            self._note(source.right, nullable=nullable or source.full or source.isouter)
        elif (table := _table(source)) is not None:
            key = tuple((hash(source), name) for name in shard_key(table).names)
            if not nullable:
                self._always.append(key)
            if len(key) == 1:
                self._single.update(key)


def _table(source: Any) -> Table | None:
    while isinstance(source, AliasedReturnsRows) and not isinstance(source, CTE):
        source = source.element
    is_sharded = isinstance(source, Table) and isinstance(declaration(source), Sharded)
    return source if is_sharded else None


def _column(expression: Any) -> ColumnId | None:
    column = bare(expression)
    table = getattr(column, "table", None)
    key = getattr(column, "key", None)
    if table is None or key is None:
        return None
    return hash(table), str(key)
