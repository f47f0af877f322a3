"""Recognise the aggregates that merge exactly, and refuse everything that is not a row's own value.

A scalar expression distributes over shards; an aggregate or a window function does not. What a
function is cannot be read off an unknown name, so an unknown function is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import types
from sqlalchemy.sql import func, operators
from sqlalchemy.sql.elements import (
    ClauseElement,
    ColumnClause,
    ColumnElement,
    FunctionFilter,
    Grouping,
    Label,
    Over,
    TextClause,
    TypeCoerce,
    UnaryExpression,
    WithinGroup,
)
from sqlalchemy.sql.expression import cast
from sqlalchemy.sql.functions import FunctionElement

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.families import bare, inside, is_single_precision, words
from sqlroute.routing.functions import AGGREGATES, HARMLESS
from sqlroute.routing.merge import AggregateKind


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KINDS = {kind.value: kind for kind in AggregateKind}
_GROUPING_SETS = frozenset({"grouping_sets", "cube", "rollup", "grouping"})
_SET_RETURNING = _names(
    """
    unnest generate_series generate_subscripts regexp_matches regexp_split_to_table
    string_to_table json_array_elements jsonb_array_elements json_array_elements_text
    jsonb_array_elements_text json_each jsonb_each json_each_text jsonb_each_text
    json_object_keys jsonb_object_keys jsonb_path_query
    """
)
SCALAR_FUNCTIONS: frozenset[str] = HARMLESS - AGGREGATES - _SET_RETURNING
"""Functions of PostgreSQL that give one value for one row."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an aggregate in a statement.

    Attributes:
        function: as it stands in the statement, without FILTER.
        argument: ``None`` for ``count(*)``.
        criterion: of FILTER.
        declared: SQLAlchemy's type of the result.
    """

    kind: AggregateKind
    function: FunctionElement[Any]
    argument: ColumnElement[Any] | None
    criterion: ColumnElement[bool] | None
    declared: types.TypeEngine[Any]


def aggregate_call(expression: ColumnElement[Any]) -> Call | None:
    """Return the aggregate that an expression is, ``None`` when it is none.

    Raises:
        CrossShardRefused: it is an aggregate that does not merge.
    """
    node = bare(expression)
    criterion = None
    if isinstance(node, FunctionFilter):
        node, criterion = node.func, node.criterion
    if not isinstance(node, FunctionElement):
        return None
    kind = _KINDS.get(_name(node)) if _is_built_in(node) else None
    if kind is None:
        return None
    arguments = list(node.clauses)
    argument = arguments[0] if arguments else None
    if argument is not None:
        argument = _checked_argument(argument, kind)
    return Call(kind, node, argument, criterion, _declared(expression, node))


def is_aggregated(expression: ColumnElement[Any]) -> bool:
    """Say whether an expression is, or contains, an aggregate known to PostgreSQL."""
    return any(
        isinstance(part, FunctionElement) and _name(part) in AGGREGATES
        for part in inside(expression)
    )


def check_scalar(expression: ClauseElement, clause: str, scalar_functions: frozenset[str]) -> None:
    """Refuse an expression that is not computed from one row alone.

    Args:
        clause: where it stands, as SQL words.
        scalar_functions: names of further functions known to be plain.

    Raises:
        CrossShardRefused: an aggregate, a window function, or something that may be one.
    """
    for part in inside(expression):
        if isinstance(part, Over):
            raise CrossShardRefused("OVER", f"{words(part)}: window functions see one shard only")
        if isinstance(part, WithinGroup):
            raise CrossShardRefused("WITHIN GROUP", f"{words(part)}: no exact merge")
        if isinstance(part, FunctionElement):
            _check_function(part, expression, scalar_functions)
        elif isinstance(part, TextClause):
            _check_text(part.text, clause)
        elif isinstance(part, ColumnClause) and part.is_literal:
            _check_text(str(part.name), clause)
        elif not _is_of_sqlalchemy(part):
            raise CrossShardRefused(
                clause,
                f"{type(part).__name__} is not an expression of SQLAlchemy; it may aggregate",
            )


def refuse_text(expression: ClauseElement, clause: str) -> None:
    """Refuse text() and literal_column(), which nobody here can read.

    Raises:
        CrossShardRefused: the expression contains some.
    """
    for part in inside(expression):
        is_literal = isinstance(part, ColumnClause) and part.is_literal
        if is_literal or isinstance(part, TextClause):
            raise CrossShardRefused(
                clause, f"{words(part)} is text that cannot be analysed; use columns and func"
            )


def partial(call: Call, name: str) -> ColumnElement[Any]:
    """Return another aggregate over the rows of a call, loaded as psycopg gives it."""
    arguments: list[Any] = [] if call.argument is None else [call.argument]
    if name == "sum" and call.argument is not None and is_single_precision(call.argument.type):
        arguments = [cast(call.argument, types.Double())]  # as avg(real) adds in PostgreSQL
    function = getattr(func, name)(*arguments, type_=types.NULLTYPE)
    result: ColumnElement[Any] = (
        function if call.criterion is None else function.filter(call.criterion)
    )
    return result


def _checked_argument(argument: ColumnElement[Any], kind: AggregateKind) -> ColumnElement[Any]:
    clause = f"{kind.value}()"
    for part in inside(argument):
        if isinstance(part, UnaryExpression) and part.operator is operators.distinct_op:
            raise CrossShardRefused(
                f"{kind.value}(DISTINCT)",
                "equal values may be on several shards; select the distinct values with GROUP BY",
            )
        if isinstance(part, FunctionElement) and _name(part) in AGGREGATES:
            raise CrossShardRefused(clause, f"{words(part)} inside an aggregate")
    if kind is AggregateKind.COUNT and _is_every_row(argument):
        return argument
    refuse_text(argument, clause)
    if type(argument).__name__ in ("AggregateOrderBy", "aggregate_order_by"):
        raise CrossShardRefused(clause, "ORDER BY inside an aggregate")
    return argument


def _is_every_row(argument: Any) -> bool:
    """``count(*)`` and ``count(1)`` written as text."""
    text = argument.text if isinstance(argument, TextClause) else None
    if isinstance(argument, ColumnClause) and argument.is_literal:
        text = str(argument.name)
    return text is not None and re.fullmatch(r"\*|\d+", text.strip()) is not None


def _check_function(
    function: FunctionElement[Any], whole: ClauseElement, scalar_functions: frozenset[str]
) -> None:
    name = _name(function)
    if name in _GROUPING_SETS:
        raise CrossShardRefused(name.upper().replace("_", " "), "grouping sets are not merged")
    if name in _KINDS:
        raise CrossShardRefused(
            f"{name}()",
            f"an aggregate inside an expression ({words(whole)}) is not merged; select the "
            "aggregate by itself and compute with it in Python",
        )
    if name in AGGREGATES:
        raise CrossShardRefused(
            f"{name}()", "of the aggregates only count, sum, min, max and avg are merged"
        )
    if name in scalar_functions or (name in SCALAR_FUNCTIONS and _is_built_in(function)):
        return
    raise CrossShardRefused(
        f"{name or type(function).__name__}()",
        "not known as a plain function of one row, it may be an aggregate; select its arguments "
        "and compute it in Python",
    )


def _check_text(text: str, clause: str) -> None:
    if "(" in text or re.search(r"\bdistinct\b", text, re.IGNORECASE):
        raise CrossShardRefused(
            clause, f"the text {text!r} may hide an aggregate or DISTINCT; use columns and func"
        )


def _name(function: FunctionElement[Any]) -> str:
    return str(getattr(function, "name", "")).lower()


def _is_built_in(function: FunctionElement[Any]) -> bool:
    names = tuple(getattr(function, "packagenames", ()))
    return names in ((), ("pg_catalog",))


def _declared(expression: Any, function: FunctionElement[Any]) -> types.TypeEngine[Any]:
    while isinstance(expression, Label | Grouping):
        expression = expression.element
    declared: types.TypeEngine[Any] = (
        expression if isinstance(expression, TypeCoerce) else function
    ).type
    return declared


def _is_of_sqlalchemy(element: object) -> bool:
    libraries = {"sqlalchemy", "builtins", "typing", "abc", "collections"}
    return all(cls.__module__.split(".")[0] in libraries for cls in type(element).__mro__)
