"""Find, once per shape, how a scattered SELECT merges, or refuse it.

Plain rows are merged in order, and made distinct; groups are combined, see
:mod:`sqlroute.routing.grouped`. Where GROUP BY holds the shard key no group has rows on two shards:
then each shard answers for its own, whatever it computes of them, and groups are plain rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from sqlalchemy.sql.elements import ColumnClause, ColumnElement

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.aggregates import (
    Form,
    check_grouped,
    is_aggregated,
    refuse_text,
)
from sqlroute.routing.combining import Aggregate, AggregateKind
from sqlroute.routing.existence import Question, question
from sqlroute.routing.families import bare, group_family, is_source, words
from sqlroute.routing.functions import GROUPINGS
from sqlroute.routing.grouped import Groups, has_number_result
from sqlroute.routing.merge import Grouping, GroupKey
from sqlroute.routing.ordering import Family, SortTerm
from sqlroute.routing.places import (
    AnySelect,
    Clause,
    OrderTerm,
    Place,
    distinct_on,
    element_at,
    is_entity,
    items,
    primary_key,
)
from sqlroute.routing.relationships import check_collections
from sqlroute.routing.selection import Found, Selection
from sqlroute.routing.shapes import MergeShape, OrderClause, with_final_columns

Check: TypeAlias = Callable[[Any, str], None]
"""Refuses an expression that looks beyond one shard; takes it and the clause to blame."""


def shape_of(statement: AnySelect, text_order: TextOrder, scalars: frozenset[str]) -> MergeShape:
    """Return how statements of this shape merge.

    Args:
        text_order: how the databases compare text.
        scalars: names of the caller's functions known to be no aggregates.

    Raises:
        CrossShardRefused: there is no exact merge.
    """
    asked = question(statement)
    if asked is not None:
        return MergeShape(grouping=Grouping((), (_answer(statement, asked),), (), ()))
    selection = Selection(statement, text_order, scalars)
    check_collections(selection.state)
    _check_columns_without_slot(selection)
    if not _is_grouped(selection):
        shape = _rows(selection, selection.check_scalar)
    elif _is_grouped_by_key(selection):
        shape = _rows(selection, _check_of_groups(selection))
    else:
        shape = Groups(selection).shape()
    shape = replace(
        shape,
        hidden=tuple(selection.hidden),
        alike=tuple(selection.alike),
        entities=bool(getattr(selection.state, "multi_row_eager_loaders", False)),
    )
    return with_final_columns(shape)


def _answer(statement: AnySelect, asked: Question) -> Aggregate:
    """Return how the shards' answers to ``EXISTS`` are one."""
    kind = AggregateKind.BOOL_AND if asked.is_negated else AggregateKind.BOOL_OR
    return Aggregate(kind, 0, (0,), Family.BOOLEAN, None, words(statement._raw_columns[0]))


def check_arm(selection: Selection, keyword: str, *, keeps_all: bool) -> None:
    """Refuse an arm of a set operation whose rows on all shards are not its rows on one server.

    Args:
        keyword: of the set operation, to blame.
        keeps_all: equal rows are kept, so that an arm may not make its own distinct.

    Raises:
        CrossShardRefused: it is limited, aggregates over shards, or looks beyond one.
    """
    statement = selection.statement
    bounds = (statement._limit_clause, statement._offset_clause, statement._fetch_clause)
    if any(bound is not None for bound in bounds) or distinct_on(statement):
        raise CrossShardRefused(keyword, f"an arm of it is limited: {words(statement)}")
    is_grouped = _is_grouped(selection)
    if is_grouped and not _is_grouped_by_key(selection):
        raise CrossShardRefused(keyword, f"an arm of it aggregates: {words(statement)}")
    columns = [slot.expression for slot in selection.slots]
    if statement._distinct and keeps_all and not selection.localities.holds_key(columns):
        raise CrossShardRefused(keyword, f"an arm of it is DISTINCT: {words(statement)}")
    check = _check_of_groups(selection) if is_grouped else selection.check_scalar
    _check_columns_without_slot(selection)
    for raw in statement._raw_columns:
        check(raw, "select list")


def _check_of_groups(selection: Selection) -> Check:
    is_local = selection.localities.is_local
    return lambda part, clause: check_grouped(part, clause, is_local)


def _is_grouped(selection: Selection) -> bool:
    statement = selection.statement
    if statement._group_by_clauses or statement._having_criteria:
        return True
    expressions = [slot.expression for slot in selection.slots]
    targets = [term.target for term in selection.terms]
    expressions += [target for target in targets if isinstance(target, ColumnElement)]
    return any(map(is_aggregated, expressions))


def _is_grouped_by_key(selection: Selection) -> bool:
    clauses = [
        clause for _, clause in items(selection.statement._group_by_clauses, Clause.GROUP_BY)
    ]
    if any(getattr(bare(clause), "name", None) in GROUPINGS for clause in clauses):
        return False
    return selection.localities.holds_key(clauses)


def _check_columns_without_slot(selection: Selection) -> None:
    """Check bundles, and the column properties of entities, which nobody wrote down."""
    for raw in selection.statement._raw_columns:
        if not (isinstance(raw, ColumnElement) or is_source(raw)):
            selection.check_scalar(raw, "select list")
    for column in getattr(selection.state, "primary_columns", ()):
        if not is_aggregated(column):
            selection.check_scalar(column, "select list")


def _rows(selection: Selection, check: Check) -> MergeShape:
    for raw in selection.statement._raw_columns:
        if isinstance(raw, ColumnElement):
            check(raw, "select list")
    distinct = _distinct_keys(selection, check) if selection.statement._distinct else None
    order, clauses = [], []
    for term in selection.terms:
        found = selection.named(term.target, term.place, "ORDER BY")
        expression = found[2]
        check(expression, "ORDER BY")
        sorted_by = _sort_term(selection, term, found, distinct)
        order.append(sorted_by)
        clauses.append(_order_clause(selection, term, expression, sorted_by.column))
    keys = None if distinct is None else tuple(key for _, key in distinct)
    return MergeShape(order=tuple(order), order_clauses=tuple(clauses), distinct=keys)


Keys: TypeAlias = list[tuple[ColumnElement[Any], GroupKey]]


def _sort_term(
    selection: Selection, term: OrderTerm, found: Found, distinct: Keys | None
) -> SortTerm:
    expression = found[2]
    if has_number_result(expression):
        return term.sorted_by(selection.column_of(found), Family.NUMBER, words(expression))
    if distinct is not None and not distinct_on(selection.statement):
        _check_selected(selection, found)
    refuse_text(expression, "ORDER BY")
    return selection.sort_term(term, found, "ORDER BY")


def _check_selected(selection: Selection, found: Found) -> None:
    """Refuse what PostgreSQL refuses; hidden behind the others it would make more rows distinct."""
    slot, _, expression = found
    if slot is not None:
        return
    entity = expression._annotations.get("parententity")
    entities = [raw for raw in selection.statement._raw_columns if is_entity(raw)]
    if entity is None or all(raw._annotations["parententity"] is not entity for raw in entities):
        raise CrossShardRefused(
            "ORDER BY", f"{words(expression)}: SELECT DISTINCT is ordered by what it selects only"
        )


def _order_clause(
    selection: Selection, term: OrderTerm, expression: ColumnElement[Any], column: int
) -> OrderClause:
    """Return the term that is sent: a column, or the hidden column that repeats an expression.

    By its label, because an expression with bind parameters is another one to PostgreSQL, and
    ``random()`` another value, when it is written twice.
    """
    hidden = None
    is_column = isinstance(bare(expression), ColumnClause)
    if (
        column < 0
        and not is_column
        and selection.hidden[-column - 1].form in (Form.AS_IS, Form.AS_STORED)
    ):
        hidden = -column - 1
    return OrderClause(term.place, hidden, term.descending, term.nulls_first)


def _distinct_keys(selection: Selection, check: Check) -> Keys:
    on = distinct_on(selection.statement)
    if not on:
        return list(_visible_keys(selection))
    keys: Keys = []
    for place, clause in items(on, Clause.DISTINCT_ON):
        found = selection.named(clause, place, "DISTINCT ON")
        check(found[2], "DISTINCT ON")
        refuse_text(found[2], "DISTINCT ON")
        keys.append((found[2], _key(selection, found, "DISTINCT ON")))
    return keys


def _visible_keys(selection: Selection) -> Iterable[tuple[ColumnElement[Any], GroupKey]]:
    """Yield what tells rows apart: every column, and of an entity its primary key."""
    for item, raw in enumerate(selection.statement._raw_columns):
        if is_entity(raw):
            for number, column in enumerate(primary_key(raw)):
                place = Place(Clause.COLUMNS, item, key=number)
                yield column, _key(selection, (None, place, column), "DISTINCT")
        elif not any(slot.place.item == item for slot in selection.slots):
            raise CrossShardRefused("DISTINCT", f"{words(raw)}: name its columns one by one")
    for slot in selection.slots:
        refuse_text(element_at(selection.statement, slot.place), "DISTINCT")
        found = (slot, slot.place, slot.expression)
        yield slot.expression, _key(selection, found, "DISTINCT")


def _key(selection: Selection, found: Found, clause: str) -> GroupKey:
    expression = found[2]
    is_number = has_number_result(expression)
    family = Family.NUMBER if is_number else group_family(expression, selection.text_order, clause)
    return GroupKey(selection.column_of(found), family, words(expression))
