"""Recognise the aggregates that merge exactly, and say what each shard computes of them.

A scalar expression distributes over shards; an aggregate or a window function does not. What a
function is cannot be read off an unknown name, so an unknown function is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import types
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.sql import func, operators
from sqlalchemy.sql.elements import (
    AggregateOrderBy,
    BindParameter,
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
from sqlalchemy.sql.expression import and_, cast, literal
from sqlalchemy.sql.functions import FunctionElement

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.combining import LISTS, OBJECTS, REGRESSIONS, SPREADS, AggregateKind
from sqlroute.routing.families import (
    bare,
    inside,
    is_single_precision,
    is_source,
    storage_type,
    words,
)
from sqlroute.routing.functions import AGGREGATES, GROUPINGS, HARMLESS


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KIND = AggregateKind
_KINDS = {
    **{kind.value: kind for kind in AggregateKind},
    "every": _KIND.BOOL_AND,
    "variance": _KIND.VAR_SAMP,
    "stddev": _KIND.STDDEV_SAMP,
    "aggregate_strings": _KIND.STRING_AGG,  # SQLAlchemy's name of string_agg
    "jsonb_agg": _KIND.JSON_AGG,
}
_IDEMPOTENT = frozenset(
    {_KIND.MIN, _KIND.MAX, _KIND.BOOL_AND, _KIND.BOOL_OR, _KIND.BIT_AND, _KIND.BIT_OR}
)
_ARGUMENTS = {
    _KIND.STRING_AGG: 2,
    **dict.fromkeys(OBJECTS, 2),
    _KIND.REGR_COUNT: 2,
    **dict.fromkeys(REGRESSIONS, 2),
}
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
        function: as it stands in the statement, without FILTER and ORDER BY.
        arguments: without DISTINCT; none for ``count(*)``.
        criterion: of FILTER.
        order: the terms of ORDER BY inside the aggregate, as the caller wrote them.
        declared: SQLAlchemy's type of the result.
    """

    kind: AggregateKind
    function: FunctionElement[Any]
    arguments: tuple[ColumnElement[Any], ...]
    criterion: ColumnElement[bool] | None
    order: tuple[Any, ...]
    is_distinct: bool
    declared: types.TypeEngine[Any]

    @property
    def name(self) -> str:
        return f"{_name(self.function)}()"

    @property
    def argument(self) -> ColumnElement[Any] | None:
        return self.arguments[0] if self.arguments else None


class Form(Enum):
    """What is selected of an expression in a hidden column."""

    AS_IS = "as is"
    AS_STORED = "as psycopg loads it"
    EPOCH = "seconds since 1970"
    RANK = "place among the labels of its enum"
    LABELS = "hash of the labels of its enum"
    SUM = "sum"
    COUNT = "count"
    SQUARES = "sum of squares"
    DISTANCES = "sum of squared distances"
    PAIRS = "count of pairs"
    X = "sum of the second argument"
    XX = "its sum of squared distances"
    Y = "sum of the first argument"
    YY = "its sum of squared distances "
    XY = "sum of products of distances"
    LIST = "list of the first argument"
    SECOND = "list of the second argument"
    SEPARATOR = "separator"
    SORTED_BY = "list of a sort value"


def aggregate_call(expression: ColumnElement[Any]) -> Call | None:
    """Return the aggregate that an expression is, ``None`` when it is none that merges.

    Raises:
        CrossShardRefused: it is one that does not merge as it is called.
    """
    node: Any = bare(expression)
    criterion: Any = None
    order: tuple[Any, ...] = ()
    while isinstance(node, FunctionFilter | AggregateOrderBy) and not isinstance(node, WithinGroup):
        if isinstance(node, FunctionFilter):
            node, criterion = node.func, node.criterion
        else:
            node, order = node.element, tuple(node.order_by.clauses)
    if not isinstance(node, FunctionElement):
        return None
    kind = _KINDS.get(_name(node)) if _is_built_in(node) else None
    if kind is None:
        return None
    arguments: list[Any] = list(node.clauses)
    if arguments and isinstance(arguments[-1], aggregate_order_by):
        inner: Any = arguments[-1].order_by
        order = tuple(getattr(inner, "clauses", (inner,)))
        arguments[-1] = arguments[-1].target
    is_distinct = bool(arguments) and _is_distinct(arguments[0])
    if is_distinct:
        arguments[0] = arguments[0].element
    declared = _declared(expression, node)
    call = Call(kind, node, tuple(arguments), criterion, order, is_distinct, declared)
    _check_call(call)
    return call


def aggregates_in(expression: ClauseElement) -> list[ColumnElement[Any]]:
    """Return the aggregates of an expression, each with its FILTER and ORDER BY."""
    found: list[ColumnElement[Any]] = []
    pending: list[Any] = [expression]
    while pending:
        element = pending.pop()
        if _is_aggregate(element):
            found.append(element)
        else:
            pending.extend(part for part in element.get_children() if not is_source(part))
    return found


def is_aggregated(expression: ClauseElement) -> bool:
    """Say whether an expression is, or contains, an aggregate known to PostgreSQL."""
    return any(
        isinstance(part, FunctionElement) and _name(part) in AGGREGATES
        for part in _outside_windows(expression)
    )


def check_scalar(
    expression: ClauseElement,
    clause: str,
    scalar_functions: frozenset[str],
    is_local: Callable[[Over[Any]], bool] = lambda _: False,
) -> None:
    """Refuse an expression that is not computed from one row alone.

    Args:
        clause: where it stands, as SQL words.
        scalar_functions: names of further functions known to be plain.
        is_local: says whether all rows that a window function looks at are on one shard.

    Raises:
        CrossShardRefused: an aggregate, a window function, or something that may be one.
    """
    for part in _outside_windows(expression):
        if isinstance(part, Over):
            if not is_local(part):
                raise _not_local(part)
        elif isinstance(part, WithinGroup):
            raise CrossShardRefused("WITHIN GROUP", f"{words(part)}: no exact merge")
        elif isinstance(part, FunctionElement):
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


def check_grouped(
    expression: ClauseElement, clause: str, is_local: Callable[[Over[Any]], bool]
) -> None:
    """Refuse an expression over groups that looks at groups of other shards: a window function.

    Raises:
        CrossShardRefused: it does, or may.
    """
    for part in inside(expression):
        if isinstance(part, Over) and not is_local(part):
            raise _not_local(part)
        if isinstance(part, TextClause):
            _check_text(part.text, clause)
        elif isinstance(part, ColumnClause) and part.is_literal:
            _check_text(str(part.name), clause)


def _not_local(window: Over[Any]) -> CrossShardRefused:
    why = "its rows are on several shards; PARTITION BY the shard key"
    return CrossShardRefused("OVER", f"{words(window)}: {why}")


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


def partial(call: Call, form: Form, sorted_by: ColumnElement[Any] | None) -> ColumnElement[Any]:
    """Return another aggregate over the rows of a call, loaded as psycopg gives it.

    Args:
        sorted_by: for :attr:`Form.SORTED_BY`, the sort value.
    """
    if form is Form.SORTED_BY:
        assert sorted_by is not None
        return _over_rows(call, "array_agg", sorted_by, ordered=True)
    return _PARTIALS[form](call)


def _over_rows(call: Call, name: str, *arguments: Any, ordered: bool = False) -> ColumnElement[Any]:
    """Call an aggregate over the same rows, in the same order where that matters."""
    found: Any = getattr(func, name)(*arguments, type_=types.NULLTYPE)
    criterion = call.criterion
    if call.kind is _KIND.STRING_AGG:  # it passes over NULL
        is_value = call.arguments[0].is_not(None)
        criterion = is_value if criterion is None else and_(criterion, is_value)
    if ordered and call.order:
        found = AggregateOrderBy(found, *call.order)
    if criterion is not None:
        found = found.filter(criterion)
    return found  # type: ignore[no-any-return]


def _only(call: Call) -> list[Any]:
    """Return the argument of an aggregate of one variable, DISTINCT if it was."""
    argument: Any = call.argument
    if argument is None:
        return []
    if is_single_precision(argument.type):
        argument = cast(argument, types.Double())  # as avg(real) adds in PostgreSQL
    return [argument.distinct() if call.is_distinct else argument]


def _of_pairs(name: str) -> Callable[[Call], ColumnElement[Any]]:
    return lambda call: _over_rows(call, name, *call.arguments)


def _sum_of(index: int) -> Callable[[Call], ColumnElement[Any]]:
    def made(call: Call) -> ColumnElement[Any]:
        value: Any = cast(call.arguments[index], types.Double())
        is_pair = call.arguments[1 - index].is_not(None)
        rows: Any = func.sum(value, type_=types.NULLTYPE)
        criterion = is_pair if call.criterion is None else and_(call.criterion, is_pair)
        return rows.filter(criterion)  # type: ignore[no-any-return]

    return made


def _squares(call: Call) -> ColumnElement[Any]:
    value: Any = cast(call.arguments[0], types.Numeric())
    return _over_rows(call, "sum", value * value)


def _distances(call: Call) -> ColumnElement[Any]:
    value: Any = cast(call.arguments[0], types.Double())
    return _over_rows(call, "regr_sxx", value, value)


def _list(call: Call) -> ColumnElement[Any]:
    value: Any = call.arguments[0]
    if call.kind in OBJECTS:
        value = cast(value, types.Text())
    return _over_rows(call, "array_agg", value, ordered=True)


def _second(call: Call) -> ColumnElement[Any]:
    name = "jsonb_agg" if call.kind is _KIND.JSONB_OBJECT_AGG else "json_agg"
    return _over_rows(call, name, call.arguments[1], ordered=True)


def _separator(call: Call) -> Any:
    bind: Any = bare(call.arguments[1])
    if _name(call.function) == "aggregate_strings":  # SQLAlchemy renders its value into the SQL
        return literal(bind.value, types.Text())
    return bind


_PARTIALS: dict[Form, Callable[[Call], ColumnElement[Any]]] = {
    Form.SUM: lambda call: _over_rows(call, "sum", *_only(call)),
    Form.COUNT: lambda call: _over_rows(call, "count", *_only(call)),
    Form.SQUARES: _squares,
    Form.DISTANCES: _distances,
    Form.PAIRS: _of_pairs("regr_count"),
    Form.X: _sum_of(1),
    Form.XX: _of_pairs("regr_sxx"),
    Form.Y: _sum_of(0),
    Form.YY: _of_pairs("regr_syy"),
    Form.XY: _of_pairs("regr_sxy"),
    Form.LIST: _list,
    Form.SECOND: _second,
    Form.SEPARATOR: lambda call: _over_rows(call, "min", cast(_separator(call), types.Text())),
}


def _check_call(call: Call) -> None:
    kind, name = call.kind, call.name
    is_count = kind is _KIND.COUNT and len(call.arguments) < 2
    expected = _ARGUMENTS.get(kind, 1)
    if not is_count and len(call.arguments) != expected:
        raise CrossShardRefused(name, f"{words(call.function)}: it takes {expected} argument(s)")
    for argument in call.arguments:
        for part in inside(argument):
            if isinstance(part, FunctionElement) and _name(part) in AGGREGATES:
                raise CrossShardRefused(name, f"{words(part)} inside an aggregate")
        if not (is_count and _is_every_row(argument)):
            refuse_text(argument, name)
    if call.order and kind not in LISTS:
        raise CrossShardRefused(
            name, "ORDER BY inside an aggregate that has no order; leave it out"
        )
    if kind is _KIND.STRING_AGG and not isinstance(bare(call.arguments[1]), BindParameter):
        raise CrossShardRefused(name, f"the separator {words(call.arguments[1])} is no value")


def distributes_distinct(call: Call, is_key: Callable[[ColumnElement[Any]], bool]) -> bool:
    """Say whether DISTINCT inside an aggregate may be left to each shard.

    Equal values do not count twice in min and max; those of the shard key are on one shard.
    """
    if not call.is_distinct or call.kind in _IDEMPOTENT:
        return True
    plain = (_KIND.COUNT, _KIND.SUM, _KIND.AVG)
    return call.kind in plain and call.argument is not None and is_key(call.argument)


def needs_double(call: Call) -> bool:
    """Say whether an aggregate of one variable is computed in double precision."""
    return call.kind in SPREADS and isinstance(_stored(call), types.Float)


def _stored(call: Call) -> types.TypeEngine[Any]:
    return storage_type(call.arguments[0].type)


def _is_distinct(argument: Any) -> bool:
    return isinstance(argument, UnaryExpression) and argument.operator is operators.distinct_op


def _is_aggregate(element: Any) -> bool:
    while isinstance(element, FunctionFilter | AggregateOrderBy):
        element = element.func if isinstance(element, FunctionFilter) else element.element
    return isinstance(element, FunctionElement) and _name(element) in AGGREGATES


def _outside_windows(expression: ClauseElement) -> Iterator[ClauseElement]:
    """Yield the parts of an expression, but not the functions that OVER makes window functions."""
    windows = {id(_function(part.element)) for part in inside(expression) if isinstance(part, Over)}
    return (part for part in inside(expression) if id(part) not in windows)


def _function(element: Any) -> Any:
    return element.func if isinstance(element, FunctionFilter) else element


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
    if name in GROUPINGS:
        raise CrossShardRefused(name.upper().replace("_", " "), "grouping sets are not merged")
    if name in AGGREGATES:
        raise CrossShardRefused(
            f"{name}()",
            f"in {words(whole)} it needs rows of several shards; select the aggregate by itself",
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
