"""Where expressions stand in a SELECT, so that every statement of its shape has them there.

A shape is analysed once and serves statements with other bind parameters; so what is remembered
are places, and :func:`element_at` finds the expression again in the statement at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    BindParameter,
    ClauseList,
    ColumnElement,
    Label,
    TextClause,
    Tuple,
    UnaryExpression,
    _label_reference,
)
from sqlalchemy.sql.schema import Column
from sqlalchemy.sql.selectable import GenerativeSelect, Select

from sqlroute.routing.aggregates import aggregate_call, aggregates_in
from sqlroute.routing.families import is_source
from sqlroute.routing.ordering import Family, SortTerm

AnySelect: TypeAlias = Select[Any]

_MODIFIERS = (operators.asc_op, operators.desc_op)
_NULLS = (operators.nulls_first_op, operators.nulls_last_op)


class Clause(Enum):
    """A clause that expressions are taken from."""

    COLUMNS = "select list"
    GROUP_BY = "GROUP BY"
    HAVING = "HAVING"
    ORDER_BY = "ORDER BY"
    DISTINCT_ON = "DISTINCT ON"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expression stands in every statement of a shape.

    Attributes:
        item: index in the clause.
        part: index inside the item when that is a table or a list of columns.
        column: a column of a table that a name stands for.
        key: index of a primary key column of the entity that stands there.
        aggregate: index of an aggregate inside the expression; ``None`` for all of it.
    """

    clause: Clause
    item: int
    part: int | None = None
    column: Column[Any] | None = None
    key: int | None = None
    aggregate: int | None = None

    def inner(self, aggregate: int) -> Place:
        return replace(self, aggregate=aggregate)


@dataclass(frozen=True, slots=True)
class Slot:
    """One visible column: where it stands, its expression, and its index when it is known."""

    place: Place
    expression: ColumnElement[Any]
    index: int | None


@dataclass(frozen=True, slots=True)
class OrderTerm:
    """One term of ORDER BY, taken apart."""

    place: Place
    target: Any
    descending: bool
    nulls_first: bool

    def sorted_by(self, column: int, family: Family, text: str) -> SortTerm:
        return SortTerm(column, family, self.descending, self.nulls_first, text)


def slots(statement: AnySelect) -> Iterator[Slot]:
    """Yield the visible columns that are expressions; entities and bundles only count."""
    index: int | None = 0
    for item, raw in enumerate(statement._raw_columns):
        if isinstance(raw, TextClause) or getattr(raw, "is_literal", False):
            index = None  # it may stand for any number of columns
        columns = _parts(raw)
        for part, column in enumerate(columns):
            place = Place(Clause.COLUMNS, item, None if columns == [raw] else part)
            if isinstance(column, ColumnElement):
                yield Slot(place, unlabelled(column), index)
            index = None if index is None else index + 1


def order_terms(statement: GenerativeSelect) -> list[OrderTerm]:
    """Return the terms of ORDER BY."""
    clauses = items(statement._order_by_clauses, Clause.ORDER_BY)
    return [order_term(place, clause) for place, clause in clauses]


def order_term(place: Place, clause: Any) -> OrderTerm:
    """Take one term of an ORDER BY apart."""
    descending: bool | None = None
    nulls_first: bool | None = None
    while True:
        modifier = getattr(clause, "modifier", None)
        if isinstance(clause, _label_reference):
            clause = clause.element
        elif isinstance(clause, UnaryExpression) and modifier in (*_MODIFIERS, *_NULLS):
            if modifier in _MODIFIERS:
                descending = modifier is operators.desc_op
            else:
                nulls_first = modifier is operators.nulls_first_op
            clause = clause.element
        else:
            break
    is_descending = bool(descending)
    is_first = is_descending if nulls_first is None else nulls_first
    return OrderTerm(place, clause, is_descending, is_first)


def items(clauses: Any, clause: Clause) -> Iterator[tuple[Place, Any]]:
    """Yield the terms of a clause with their places; ``group_by(Entity)`` is a list of columns."""
    for item, element in enumerate(clauses):
        if isinstance(element, ClauseList) and not isinstance(element, Tuple):
            for part, column in enumerate(element.clauses):
                yield Place(clause, item, part), _unreferenced(column)
        else:
            yield Place(clause, item), _unreferenced(element)


def distinct_on(statement: AnySelect) -> tuple[Any, ...]:
    """Return the expressions of DISTINCT ON, in either spelling."""
    found = tuple(statement._distinct_on)
    extension: Any = statement._pre_columns_clause
    return found if extension is None else (*found, *extension._distinct_on)


def is_entity(raw: Any) -> bool:
    """Say whether a member of the select list is an ORM entity."""
    return is_source(raw) and "parententity" in raw._annotations


def primary_key(raw: Any) -> list[ColumnElement[Any]]:
    """Return the primary key columns of an entity, or of an alias of one, as they are selected."""
    entity: Any = raw._annotations["parententity"]
    columns = entity.mapper.primary_key
    if entity.is_aliased_class:
        return [entity.selectable.corresponding_column(column) for column in columns]
    return list(columns)


def element_at(statement: AnySelect, place: Place) -> Any:
    """Return the clause element at a place of a statement."""
    element = _whole_at(statement, place)
    return element if place.aggregate is None else aggregates_in(element)[place.aggregate]


def expression_at(statement: AnySelect, place: Place) -> ColumnElement[Any]:
    """Return the expression at a place, without its label."""
    found: ColumnElement[Any] = unlabelled(element_at(statement, place))
    return found


def sort_value_at(statement: AnySelect, place: Place, number: int) -> ColumnElement[Any]:
    """Return what a term of the ORDER BY inside an aggregate sorts by."""
    call = aggregate_call(expression_at(statement, place))
    assert call is not None
    value: ColumnElement[Any] = order_term(place, call.order[number]).target
    return value


def parameters_of(expression: ColumnElement[Any]) -> list[BindParameter[Any]]:
    """Return the bind parameters of an expression, in an order that its shape fixes."""
    elements = visitors.iterate(expression)
    return [element for element in elements if isinstance(element, BindParameter)]


def unlabelled(expression: Any) -> Any:
    while isinstance(expression, Label):
        expression = expression.element
    return expression


def is_same(left: Any, right: Any) -> bool:
    """Say whether two expressions are one in every statement of the shape: same bind parameters."""
    if left is right:
        return True
    if isinstance(left, Column) and isinstance(right, Column):
        return left._deannotate(clone=False) is right._deannotate(clone=False)
    mine, theirs = left._generate_cache_key(), right._generate_cache_key()
    if mine is None or theirs is None or mine.key != theirs.key:
        return False
    return [bind.key for bind in mine.bindparams] == [bind.key for bind in theirs.bindparams]


def _whole_at(statement: AnySelect, place: Place) -> Any:
    if place.column is not None:
        return place.column
    if place.clause is Clause.COLUMNS:
        raw: Any = statement._raw_columns[place.item]
        if place.key is not None:
            return primary_key(raw)[place.key]
        return raw if place.part is None else _parts(raw)[place.part]
    if place.clause is Clause.HAVING:
        return statement._having_criteria[place.item]
    if place.clause is Clause.DISTINCT_ON:
        return _unreferenced(distinct_on(statement)[place.item])
    clauses: Any = (
        statement._group_by_clauses
        if place.clause is Clause.GROUP_BY
        else statement._order_by_clauses
    )
    element = clauses[place.item]
    element = element if place.part is None else element.clauses[place.part]
    return order_term(place, element).target


def _parts(raw: Any) -> list[Any]:
    if not is_source(raw) or is_entity(raw):
        return [raw]
    return list(raw._select_iterable)


def _unreferenced(element: Any) -> Any:
    return element.element if isinstance(element, _label_reference) else element
