"""Decide whether a scattered SELECT merges exactly, and write the SELECT that every shard is sent.

It works in two steps, because a statement's shape is cached and its values are not:

* :func:`analyse`, once per shape, finds how ORDER BY, LIMIT, OFFSET, DISTINCT, GROUP BY, HAVING and
  aggregates merge, or refuses with :class:`~sqlroute.errors.CrossShardRefused`. Its result holds
  positions of clauses, no expressions: another statement of the shape has its own bind parameters.
* :func:`rewritten`, once per execution, adds hidden columns behind the caller's (sort values,
  partial sums and counts) and sends LIMIT + OFFSET to each shard.

The planner has proved before that FROM and WHERE distribute: the rows of all shards together are
the rows of one server. Locks, subqueries and placement are its work too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import types
from sqlalchemy.dialects.postgresql.ext import DistinctOnClause
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.sql import func
from sqlalchemy.sql.elements import BindParameter, ColumnElement, Label
from sqlalchemy.sql.expression import cast, extract, null, type_coerce
from sqlalchemy.sql.selectable import (
    CompoundSelect,
    GenerativeSelect,
    Select,
    SelectBase,
)

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.aggregates import Form, aggregate_call, partial
from sqlroute.routing.analysis import shape_of
from sqlroute.routing.expressions import check_value
from sqlroute.routing.families import words
from sqlroute.routing.keys import stored
from sqlroute.routing.merge import MergeSpec
from sqlroute.routing.places import (
    AnySelect,
    element_at,
    expression_at,
    parameters_of,
    sort_value_at,
)
from sqlroute.routing.selection import sources
from sqlroute.routing.shapes import HIDDEN, Hidden, MergeShape, OrderClause, ValuePlace
from sqlroute.routing.unions import union_shape

_INTEGER_MAX = 2**31 - 1  # SQLAlchemy casts the bind parameter of LIMIT to integer


@dataclass(frozen=True, slots=True)
class Rewritten:
    """One execution: what every shard is sent, and how the answers merge.

    The names of the answer's columns are the first ``len(keys) - spec.hidden`` keys of any
    shard's result: hidden columns stand behind the caller's own.
    """

    statement: AnySelect
    spec: MergeSpec


def rewrite(
    statement: AnySelect,
    *,
    text_order: TextOrder,
    parameters: Mapping[str, Any] | None = None,
) -> Rewritten:
    """Analyse a statement and rewrite it for one execution.

    Raises:
        CrossShardRefused: see :func:`analyse`.
    """
    shape = analyse(statement, text_order=text_order)
    return rewritten(statement, shape, parameters)


def analyse(
    statement: SelectBase,
    *,
    text_order: TextOrder,
    scalar_functions: frozenset[str] = frozenset(),
) -> MergeShape:
    """Return how statements of this shape merge.

    Args:
        statement: as the caller wrote it, before the ORM renders it.
        text_order: how the databases compare text.
        scalar_functions: names of the caller's functions known to be no aggregates
            (``pg_proc.prokind = 'f'``).

    Raises:
        CrossShardRefused: there is no exact merge; names the clause and the way out.
    """
    if isinstance(statement, CompoundSelect):
        _check_bounds(statement)
        shape = union_shape(statement, text_order, scalar_functions)
        return _with_bounds(statement, shape)
    if not isinstance(statement, Select):
        raise CrossShardRefused(
            type(statement).__name__,
            "only a SELECT is merged; instead of from_statement() select the entity itself, or an "
            "alias of it over a subquery",
        )
    _check_clauses(statement)
    _check_bounds(statement)
    shape = shape_of(statement, text_order, scalar_functions)
    shape = _with_bounds(statement, shape)
    if shape.entities and shape.has_limit:
        _check_rows_are_entities(statement)
    _check_sources(statement, shape)
    return shape


def rewritten(
    statement: AnySelect, shape: MergeShape, parameters: Mapping[str, Any] | None = None
) -> Rewritten:
    """Return the statement to send to every shard, and the merge, for one execution.

    Args:
        statement: any statement of the shape.
        parameters: of this execution; they are still the ones to execute the result with.
    """
    fetch = statement._fetch_clause
    limit = _bound(statement._limit_clause if fetch is None else fetch, parameters)
    offset = _bound(statement._offset_clause, parameters) or 0
    columns = _hidden_columns(statement, shape)
    result = statement.add_columns(*columns) if columns else statement
    if shape.grouping is not None:
        result = _ungrouped(result, shape)
    elif any(clause.hidden is not None for clause in shape.order_clauses):
        clauses = [_order_clause(statement, clause, columns) for clause in shape.order_clauses]
        result = result.order_by(None).order_by(*clauses)
    pushed = None
    if shape.has_limit and (offset < 0 or (limit is not None and limit < 0)):
        limit, offset = None, 0  # left in the statement, for PostgreSQL to refuse in its own words
    elif shape.has_limit:
        pushed = _pushed_limit(shape, limit, offset)
        result = result.limit(pushed).offset(None)
        if shape.has_ties and pushed is not None:
            result = result.fetch(pushed, with_ties=True)
    spec = MergeSpec(
        hidden=len(columns),
        order=shape.order,
        grouping=shape.grouping,
        distinct=shape.distinct,
        alike=shape.alike,
        limit=limit,
        offset=offset,
        ties=shape.has_ties,
        pushed=pushed,
        entities=shape.entities,
        values=tuple(_value(statement, place, parameters) for place in shape.values),
    )
    return Rewritten(result, spec)


def _check_clauses(statement: AnySelect) -> None:
    for found, clause in (
        (_extensions(statement), "syntax extension"),
        (_prefixes(statement), "prefix or suffix"),
    ):
        if found:
            raise CrossShardRefused(
                clause,
                "not merged across shards; leave it out, or restrict the statement to one shard "
                "by its key",
            )


def _check_bounds(statement: GenerativeSelect) -> None:
    options = statement._fetch_clause_options or {}
    if options.get("percent"):
        raise CrossShardRefused("FETCH PERCENT", "not merged across shards; give a number of rows")
    if options.get("with_ties") and not statement._order_by_clauses:
        raise CrossShardRefused("FETCH", "WITH TIES needs an ORDER BY")
    for name, bound in (
        ("LIMIT", statement._limit_clause),
        ("OFFSET", statement._offset_clause),
        ("FETCH", statement._fetch_clause),
    ):
        if bound is not None and not isinstance(bound, BindParameter):
            raise CrossShardRefused(name, f"{words(bound)} is no value; use an int or a bindparam")


def _with_bounds(statement: GenerativeSelect, shape: MergeShape) -> MergeShape:
    bounds = (statement._limit_clause, statement._offset_clause, statement._fetch_clause)
    has_ties = bool((statement._fetch_clause_options or {}).get("with_ties"))
    return replace(shape, has_limit=any(b is not None for b in bounds), has_ties=has_ties)


def _extensions(statement: AnySelect) -> list[Any]:
    names = ("post_select", "pre_columns", "post_criteria", "post_body")
    found = (getattr(statement, f"_{name}_clause", None) for name in names)
    return [
        extension
        for extension in found
        if extension is not None and not isinstance(extension, DistinctOnClause)
    ]


def _prefixes(statement: AnySelect) -> list[str]:
    """Return texts around the SELECT that are more than a comment."""
    texts = [words(element) for element, _ in (*statement._prefixes, *statement._suffixes)]
    texts += [text for _, text in statement._statement_hints]
    return [text for text in texts if not (text.startswith("/*") and text.endswith("*/"))]


def _check_sources(statement: AnySelect, shape: MergeShape) -> None:
    """Refuse a clause that names a table missing in FROM; a hidden column would bring it in.

    PostgreSQL refuses such a statement; with the hidden column it would run, as a cross join.
    """
    if not shape.hidden:
        return
    inner = statement.order_by(None).limit(None).offset(None)
    widened = inner.add_columns(*_hidden_columns(statement, shape))
    if len(sources(widened)) != len(sources(inner)):
        raise CrossShardRefused(
            "FROM", "ORDER BY or GROUP BY names a table that is not in FROM; use select_from()"
        )


def _check_rows_are_entities(statement: AnySelect) -> None:
    """With joined eager collections LIMIT counts entities only if no join multiplies them."""
    froms = {id(element) for column in statement._raw_columns for element in column._from_objects}
    froms |= {id(element) for element in statement._from_obj}
    joins = statement._setup_joins or any(
        m._setup_joins for m in statement._memoized_select_entities
    )
    if joins or len(froms) > 1 or len(statement._raw_columns) > 1:
        raise CrossShardRefused(
            "LIMIT", "with a joined eager collection and a join; load it by selectinload()"
        )


# What is sent


def _ungrouped(statement: AnySelect, shape: MergeShape) -> AnySelect:
    """Take off what is done after the groups have met: ORDER BY, DISTINCT and most of HAVING."""
    result = statement.order_by(None)._generate()
    result._distinct = False
    result._having_criteria = tuple(result._having_criteria[item] for item in shape.kept_having)
    return result


def _hidden_columns(statement: AnySelect, shape: MergeShape) -> list[Label[Any]]:
    return [
        _hidden_column(statement, hidden).label(f"{HIDDEN}{number}")
        for number, hidden in enumerate(shape.hidden, 1)
    ]


def _hidden_column(statement: AnySelect, hidden: Hidden) -> ColumnElement[Any]:
    form, expression = hidden.form, expression_at(statement, hidden.place)
    if form is Form.AS_IS:
        return expression
    if form is Form.AS_STORED:
        return type_coerce(expression, types.NULLTYPE)
    if form is Form.EPOCH:
        return type_coerce(extract("epoch", expression), types.NULLTYPE)
    if form in (Form.RANK, Form.LABELS):
        labels = func.enum_range(cast(null(), expression.type))
        if form is Form.LABELS:
            return func.hashtextextended(cast(labels, types.Text), 0, type_=types.NULLTYPE)
        return func.array_position(labels, expression, type_=types.NULLTYPE)
    call = aggregate_call(expression)
    assert call is not None
    sorted_by = None
    if form is Form.SORTED_BY:
        sorted_by = sort_value_at(statement, hidden.place, hidden.number)
    return partial(call, form, sorted_by)


def _order_clause(
    statement: AnySelect, clause: OrderClause, columns: list[Label[Any]]
) -> ColumnElement[Any]:
    expression: Any = (
        element_at(statement, clause.place) if clause.hidden is None else columns[clause.hidden]
    )
    term: ColumnElement[Any] = expression.desc() if clause.descending else expression.asc()
    if clause.nulls_first == clause.descending:
        return term
    return term.nulls_first() if clause.nulls_first else term.nulls_last()


# Values of an execution


def _value(statement: AnySelect, place: ValuePlace, parameters: Mapping[str, Any] | None) -> Any:
    """Return the value of a parameter in an expression over aggregates, as it is sent.

    Raises:
        CrossShardRefused: PostgreSQL would cast it before comparing.
    """
    bind = parameters_of(expression_at(statement, place.place))[place.number]
    value = _given(bind, parameters)
    if bind.expanding:
        values = [stored(one, bind.type) for one in value or ()]
        for one in values:
            check_value(one, place.family, place.text)
        return values
    value = stored(value, bind.type)
    check_value(value, place.family, place.text)
    return value


def _bound(clause: Any, parameters: Mapping[str, Any] | None) -> int | None:
    """Return the value of LIMIT or OFFSET in this execution."""
    if clause is None:
        return None
    value = _given(clause, parameters)
    return None if value is None else int(value)


def _given(bind: BindParameter[Any], parameters: Mapping[str, Any] | None) -> Any:
    if parameters is not None and bind.key in parameters:
        return parameters[bind.key]
    if bind.required:  # the clause will not be in the statement for SQLAlchemy to miss it
        raise InvalidRequestError(f"a value is required for bind parameter {bind.key!r}")
    return bind.effective_value


def _pushed_limit(shape: MergeShape, limit: int | None, offset: int) -> int | None:
    if limit is None or shape.grouping is not None or limit + offset > _INTEGER_MAX:
        return None
    return limit + offset
