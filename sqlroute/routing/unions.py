"""Find how UNION and UNION ALL merge: as rows of one SELECT, whose arms every shard computes.

The whole statement goes to every shard that one of its arms needs; an arm whose key is elsewhere
finds no row there. So PostgreSQL makes the arms' types one, as it does for a single server.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.sql.elements import ColumnElement, Label, _textual_label_reference
from sqlalchemy.sql.selectable import CompoundSelect, Select, _CompoundSelectKeyword

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.analysis import check_arm
from sqlroute.routing.families import group_family, is_loaded_as_stored, order_family, words
from sqlroute.routing.merge import GroupKey
from sqlroute.routing.ordering import SortTerm
from sqlroute.routing.places import OrderTerm, is_same, order_terms, unlabelled
from sqlroute.routing.selection import Selection
from sqlroute.routing.shapes import MergeShape

MERGED = (_CompoundSelectKeyword.UNION, _CompoundSelectKeyword.UNION_ALL)


def union_shape(
    statement: CompoundSelect[Any], text_order: TextOrder, scalars: frozenset[str]
) -> MergeShape:
    """Return how set operations of this shape merge.

    Raises:
        CrossShardRefused: it is another one than UNION, or an arm or column of it does not merge.
    """
    keyword = str(statement.keyword.value)
    if statement.keyword not in MERGED:
        raise CrossShardRefused(keyword, "needs the rows of both sides in one place")
    keeps_all = statement.keyword is _CompoundSelectKeyword.UNION_ALL
    for arm in statement.selects:
        if not isinstance(arm, Select):
            raise CrossShardRefused(keyword, f"an arm of it is limited or no SELECT: {words(arm)}")
        check_arm(Selection(arm, text_order, scalars), keyword, keeps_all=keeps_all)
    columns = _Columns(statement, text_order, keyword)
    order = tuple(columns.sort_term(term) for term in order_terms(statement))
    return MergeShape(order=order, distinct=None if keeps_all else columns.distinct())


class _Columns:
    """The columns of a set operation, each with its expression in every arm."""

    def __init__(self, statement: CompoundSelect[Any], text_order: TextOrder, keyword: str) -> None:
        self._text_order = text_order
        self._keyword = keyword
        self._first = [*statement.selects[0].selected_columns]
        arms = [[*arm.selected_columns] for arm in statement.selects]
        if len({len(arm) for arm in arms}) > 1:
            raise CrossShardRefused(keyword, "its arms differ in their number of columns")
        self._columns = list(zip(*arms, strict=True))

    def distinct(self) -> tuple[GroupKey, ...]:
        """Return what tells the rows of the union apart: all of its columns."""
        return tuple(self._key(index) for index in range(len(self._columns)))

    def sort_term(self, term: OrderTerm) -> SortTerm:
        index = self._index(term.target)
        families = {
            order_family(self._stored(column), "ORDER BY", self._text_order)
            for column in self._columns[index]
        }
        return term.sorted_by(index, self._only(families, index), words(self._first[index]))

    def _key(self, index: int) -> GroupKey:
        families = {
            group_family(self._stored(column), self._text_order, self._keyword)
            for column in self._columns[index]
        }
        return GroupKey(index, self._only(families, index), words(self._first[index]))

    def _stored(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        if not is_loaded_as_stored(column.type):
            raise CrossShardRefused(
                self._keyword, f"{words(column)}: values of {column.type!r} are not as stored"
            )
        found: ColumnElement[Any] = unlabelled(column)
        return found

    def _only(self, families: set[Any], index: int) -> Any:
        if len(families) > 1:
            raise CrossShardRefused(
                self._keyword, f"its arms have unlike types for {words(self._first[index])}"
            )
        return families.pop()

    def _index(self, target: Any) -> int:
        """Return the column that a term of ORDER BY names."""
        name = target.element if isinstance(target, _textual_label_reference) else None
        if isinstance(target, Label):
            name = target.name
        for index, column in enumerate(self._first):
            if name is not None:
                is_it = getattr(column, "name", None) == name
            else:
                is_it = isinstance(target, ColumnElement) and is_same(
                    unlabelled(column), unlabelled(target)
                )
            if is_it:
                return index
        raise CrossShardRefused(
            "ORDER BY", f"{words(target)} is no column of the {self._keyword}; order by its name"
        )
