"""Decide whether a scattered SELECT merges exactly, and write the SELECT that every shard is sent.

It works in two steps, because a statement's shape is cached and its values are not:

* :func:`analyse`, once per shape, finds how ORDER BY, LIMIT, OFFSET, GROUP BY and aggregates
  merge, or refuses with :class:`~sqlroute.errors.CrossShardRefused`. Its result holds positions
  of clauses, no expressions: another statement of the shape has its own bind parameters.
* :func:`rewritten`, once per execution, adds hidden columns behind the caller's (sort values,
  partial sums and counts) and sends LIMIT + OFFSET to each shard.

The planner has proved before that FROM and WHERE distribute: the rows of all shards together are
the rows of one server. Locks, subqueries and placement are its work too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

from sqlalchemy import types
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BindParameter,
    ClauseList,
    ColumnElement,
    Label,
    TextClause,
    Tuple,
    UnaryExpression,
    _label_reference,
    _textual_label_reference,
)
from sqlalchemy.sql.expression import type_coerce
from sqlalchemy.sql.schema import Column, Table
from sqlalchemy.sql.selectable import CompoundSelect, Select, SelectBase

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.aggregates import (
    Call,
    aggregate_call,
    check_scalar,
    is_aggregated,
    partial,
    refuse_text,
)
from sqlroute.routing.families import (
    bare,
    group_family,
    is_loaded_as_stored,
    is_single_precision,
    is_source,
    number_conversion,
    order_family,
    words,
)
from sqlroute.routing.keys import reference_dialect
from sqlroute.routing.merge import (
    Aggregate,
    AggregateKind,
    Grouping,
    GroupKey,
    MergeSpec,
    describe_steps,
)
from sqlroute.routing.ordering import Family, SortTerm

_INTEGER_MAX = 2**31 - 1  # SQLAlchemy casts the bind parameter of LIMIT to integer
_MODIFIERS = (operators.asc_op, operators.desc_op)
_NULLS = (operators.nulls_first_op, operators.nulls_last_op)

AnySelect: TypeAlias = Select[Any]


class Clause(Enum):
    """A clause that expressions are taken from."""

    COLUMNS = "select list"
    GROUP_BY = "GROUP BY"
    ORDER_BY = "ORDER BY"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expression stands in every statement of a shape.

    Attributes:
        item: index in the clause.
        part: index inside the item when that is a table or a list of columns.
        column: for ORDER BY a name that stands for a column of a table: that column.
    """

    clause: Clause
    item: int
    part: int | None = None
    column: Column[Any] | None = None


class Form(Enum):
    """What is selected of an expression in a hidden column."""

    AS_IS = "as is"
    AS_STORED = "as psycopg loads it"
    SUM = "partial sum"
    COUNT = "partial count"


@dataclass(frozen=True, slots=True)
class Hidden:
    """A column that each shard adds behind the caller's."""

    place: Place
    form: Form


@dataclass(frozen=True, slots=True)
class OrderClause:
    """One term of ORDER BY in the statement that is sent.

    Attributes:
        hidden: index of the hidden column to sort by instead of the expression, if any.
    """

    place: Place
    hidden: int | None
    descending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True)
class MergeShape:
    """How every statement of one shape merges; made by :func:`analyse`.

    Attributes:
        order: terms of the merge; their columns are as in :class:`MergeSpec`.
        order_clauses: terms of the ORDER BY that is sent.
        entities: see :class:`MergeSpec`.
    """

    hidden: tuple[Hidden, ...] = ()
    order: tuple[SortTerm, ...] = ()
    order_clauses: tuple[OrderClause, ...] = ()
    grouping: Grouping | None = None
    has_limit: bool = False
    entities: bool = False

    def describe(self) -> tuple[str, ...]:
        """Return the steps of the merge as words, without the values of an execution."""
        limit = ("limit and offset after merge",) if self.has_limit else ()
        return (*describe_steps(self.grouping, self.order), *limit)


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
    text_order_is_code_point: bool,
    parameters: Mapping[str, Any] | None = None,
) -> Rewritten:
    """Analyse a statement and rewrite it for one execution.

    Raises:
        CrossShardRefused: see :func:`analyse`.
    """
    shape = analyse(statement, text_order_is_code_point=text_order_is_code_point)
    return rewritten(statement, shape, parameters)


def analyse(
    statement: SelectBase,
    *,
    text_order_is_code_point: bool,
    scalar_functions: frozenset[str] = frozenset(),
) -> MergeShape:
    """Return how statements of this shape merge.

    Args:
        statement: as the caller wrote it, before the ORM renders it.
        text_order_is_code_point: the collation of the databases orders text by code point.
        scalar_functions: names of the caller's functions known to be no aggregates
            (``pg_proc.prokind = 'f'``).

    Raises:
        CrossShardRefused: there is no exact merge; names the clause and the way out.
    """
    if not isinstance(statement, Select):
        what = "UNION" if isinstance(statement, CompoundSelect) else type(statement).__name__
        raise CrossShardRefused(what, "only one SELECT is merged; run its parts one by one")
    _check_clauses(statement)
    return _Analysis(statement, text_order_is_code_point, scalar_functions).shape()


def rewritten(
    statement: AnySelect, shape: MergeShape, parameters: Mapping[str, Any] | None = None
) -> Rewritten:
    """Return the statement to send to every shard, and the merge, for one execution.

    Args:
        statement: any statement of the shape.
        parameters: of this execution; they are still the ones to execute the result with.
    """
    limit = _bound(statement._limit_clause, parameters)
    offset = _bound(statement._offset_clause, parameters) or 0
    columns = _hidden_columns(statement, shape)
    result = statement.add_columns(*columns) if columns else statement
    if shape.grouping is not None:
        result = result.order_by(None)
    elif any(clause.hidden is not None for clause in shape.order_clauses):
        clauses = [_order_clause(statement, clause, columns) for clause in shape.order_clauses]
        result = result.order_by(None).order_by(*clauses)
    pushed = None
    if shape.has_limit and (offset < 0 or (limit is not None and limit < 0)):
        limit, offset = None, 0  # left in the statement, for PostgreSQL to refuse in its own words
    elif shape.has_limit:
        pushed = _pushed_limit(shape, limit, offset)
        result = result.limit(pushed).offset(None)
    spec = MergeSpec(
        hidden=len(columns),
        order=shape.order,
        grouping=shape.grouping,
        limit=limit,
        offset=offset,
        pushed=pushed,
        entities=shape.entities,
    )
    return Rewritten(result, spec)


def _check_clauses(statement: AnySelect) -> None:
    refused: tuple[tuple[bool, str, str], ...] = (
        (bool(_extensions(statement)), "syntax extension", "leave it out"),
        (bool(statement._distinct_on), "DISTINCT ON", "select the rows and choose in Python"),
        (statement._distinct, "DISTINCT", "use GROUP BY of the same columns"),
        (bool(statement._having_criteria), "HAVING", "select the aggregate and filter in Python"),
        (statement._fetch_clause is not None, "FETCH", "use LIMIT"),
        (bool(_prefixes(statement)), "prefix or suffix", "leave it out"),
    )
    for found, clause, way_out in refused:
        if found:
            raise CrossShardRefused(
                clause,
                f"not merged across shards; {way_out}, or restrict the statement to one shard "
                "by its key",
            )
    for name, bound in (("LIMIT", statement._limit_clause), ("OFFSET", statement._offset_clause)):
        if bound is not None and not isinstance(bound, BindParameter):
            raise CrossShardRefused(name, f"{words(bound)} is no value; use an int or a bindparam")


def _extensions(statement: AnySelect) -> list[Any]:
    names = ("post_select", "pre_columns", "post_criteria", "post_body")
    found = (getattr(statement, f"_{name}_clause", None) for name in names)
    return [extension for extension in found if extension is not None]


def _prefixes(statement: AnySelect) -> list[str]:
    """Return texts around the SELECT that are more than a comment."""
    texts = [words(element) for element, _ in (*statement._prefixes, *statement._suffixes)]
    texts += [text for _, text in statement._statement_hints]
    return [text for text in texts if not (text.startswith("/*") and text.endswith("*/"))]


@dataclass(frozen=True, slots=True)
class _Slot:
    """One visible column: where it stands, its expression, and its index when it is known."""

    place: Place
    expression: ColumnElement[Any]
    index: int | None


@dataclass(frozen=True, slots=True)
class _Term:
    """One term of ORDER BY, taken apart."""

    place: Place
    target: Any
    descending: bool
    nulls_first: bool


class _Analysis:
    """The analysis of one statement; collects the hidden columns it needs on the way."""

    def __init__(
        self, statement: AnySelect, code_point_order: bool, scalar_functions: frozenset[str]
    ) -> None:
        self.statement = statement
        self.code_point_order = code_point_order
        self.scalar_functions = scalar_functions
        self.state = _compile_state(statement)
        self.slots = tuple(_slots(statement))
        self.hidden: list[Hidden] = []
        self.aggregates: list[tuple[Call, Aggregate]] = []

    def shape(self) -> MergeShape:
        has_limit = (
            self.statement._limit_clause is not None or self.statement._offset_clause is not None
        )
        entities = bool(getattr(self.state, "multi_row_eager_loaders", False))
        if entities and has_limit:
            _check_rows_are_entities(self.statement)
        terms = list(_order_terms(self.statement))
        self._check_columns_without_slot()
        if not self._is_grouped(terms):
            order, clauses = self._plain_order(terms)
            shape = MergeShape(order=order, order_clauses=clauses)
        else:
            shape = MergeShape(**self._grouped(terms))
        hidden = tuple(self.hidden)
        shape = replace(shape, hidden=hidden, has_limit=has_limit, entities=entities)
        _check_sources(self.statement, shape)
        return _with_final_columns(shape, len(hidden))

    def _is_grouped(self, terms: list[_Term]) -> bool:
        expressions = [slot.expression for slot in self.slots]
        expressions += [term.target for term in terms if isinstance(term.target, ColumnElement)]
        return bool(self.statement._group_by_clauses) or any(map(is_aggregated, expressions))

    def _check_columns_without_slot(self) -> None:
        """Check bundles, and the column properties of entities, which nobody wrote down."""
        for raw in self.statement._raw_columns:
            if not (isinstance(raw, ColumnElement) or is_source(raw)):
                check_scalar(raw, "select list", self.scalar_functions)
        for column in getattr(self.state, "primary_columns", ()):
            if not is_aggregated(column):
                check_scalar(column, "select list", self.scalar_functions)

    # Plain rows

    def _plain_order(
        self, terms: list[_Term]
    ) -> tuple[tuple[SortTerm, ...], tuple[OrderClause, ...]]:
        for slot in self.slots:
            check_scalar(slot.expression, "select list", self.scalar_functions)
        order, clauses = [], []
        for term in terms:
            resolved, place, expression = self._resolved(term)
            check_scalar(expression, "ORDER BY", self.scalar_functions)
            refuse_text(expression, "ORDER BY")
            family = order_family(expression, "ORDER BY", self.code_point_order)
            column = self._column_of(resolved, place, expression)
            order.append(_sort_term(column, family, term, expression))
            hidden = -column - 1 if column < 0 else None
            clauses.append(OrderClause(term.place, hidden, term.descending, term.nulls_first))
        return tuple(order), tuple(clauses)

    # Aggregates and GROUP BY

    def _grouped(self, terms: list[_Term]) -> dict[str, Any]:
        for raw in self.statement._raw_columns:
            if isinstance(raw, TextClause):
                refuse_text(raw, "select list")
        for slot in self.slots:
            call = aggregate_call(slot.expression)
            if call is None:
                check_scalar(slot.expression, "select list", self.scalar_functions)
                refuse_text(slot.expression, "select list")
            else:
                self._aggregate(call, slot.place, slot.index)
        keys = tuple(self._group_keys())
        order = tuple(self._grouped_order(terms, keys))
        aggregates = tuple(aggregate for _, aggregate in self.aggregates)
        plain_keys = tuple(key for _, key in keys)
        return {"grouping": Grouping(plain_keys, aggregates), "order": order}

    def _group_keys(self) -> Iterator[tuple[ColumnElement[Any], GroupKey]]:
        for place, clause in _items(self.statement._group_by_clauses, Clause.GROUP_BY):
            slot, own_place, expression = self._named(clause, place, "GROUP BY")
            check_scalar(expression, "GROUP BY", self.scalar_functions)
            refuse_text(expression, "GROUP BY")
            family = group_family(expression)
            column = self._column_of(slot, own_place, expression)
            yield expression, GroupKey(column, family, words(expression))

    def _grouped_order(
        self, terms: list[_Term], keys: tuple[tuple[ColumnElement[Any], GroupKey], ...]
    ) -> Iterator[SortTerm]:
        for term in terms:
            slot, place, expression = self._resolved(term)
            call = aggregate_call(expression)
            if call is not None:
                aggregate = self._known_aggregate(expression) or self._aggregate(call, place, None)
                family = self._result_family(call)
                yield _sort_term(aggregate.value, family, term, expression)
                continue
            check_scalar(expression, "ORDER BY", self.scalar_functions)
            refuse_text(expression, "ORDER BY")
            family = order_family(expression, "ORDER BY", self.code_point_order)
            key = next((key for other, key in keys if _same(other, expression)), None)
            column = self._column_of(slot, place, expression) if key is None else key.column
            yield _sort_term(column, family, term, expression)

    def _known_aggregate(self, expression: ColumnElement[Any]) -> Aggregate | None:
        wanted = bare(expression)
        for call, aggregate in self.aggregates:
            if call.criterion is None and _same(call.function, wanted):
                return aggregate
        return None

    def _aggregate(self, call: Call, place: Place, visible: int | None) -> Aggregate:
        """Add one aggregate with the partial columns it needs."""
        if call.criterion is not None:
            check_scalar(call.criterion, "FILTER", self.scalar_functions)
        if call.argument is not None and call.kind is not AggregateKind.COUNT:
            check_scalar(call.argument, f"{call.kind.value}()", self.scalar_functions)
        family = self._result_family(call)
        conversion = None
        count = None
        if call.kind is AggregateKind.AVG:
            conversion = number_conversion(call.declared, "avg()")
            value = self._hide(place, Form.SUM)
            count = self._hide(place, Form.COUNT)
        elif call.kind is AggregateKind.SUM:
            conversion = number_conversion(call.declared, "sum()")
            is_raw = isinstance(call.declared, types.Integer | types.NullType)
            value = visible if is_raw and visible is not None else self._hide(place, Form.AS_STORED)
        elif call.kind is AggregateKind.COUNT:
            value = visible if visible is not None else self._hide(place, Form.AS_STORED)
        else:
            is_raw = is_loaded_as_stored(call.declared)
            value = visible if is_raw and visible is not None else self._hide(place, Form.AS_STORED)
        text = words(call.function)
        aggregate = Aggregate(call.kind, visible, value, count, family, conversion, text)
        self.aggregates.append((call, aggregate))
        return aggregate

    def _result_family(self, call: Call) -> Family:
        """Return the order of an aggregate's results; refuse arguments it is not merged for."""
        clause = f"{call.kind.value}()"
        if call.kind is AggregateKind.COUNT:
            return Family.NUMBER
        if call.argument is None:
            raise CrossShardRefused(clause, "it has no argument")
        family = order_family(call.argument, clause, self.code_point_order)
        if call.kind in (AggregateKind.MIN, AggregateKind.MAX):
            return family
        if family is not Family.NUMBER:
            raise CrossShardRefused(clause, f"{words(call.argument)} is no number")
        if call.kind is AggregateKind.SUM and is_single_precision(call.argument.type):
            raise CrossShardRefused(
                clause, f"{words(call.argument)} is real; cast it to double precision"
            )
        return family

    # Names, places and columns

    def _resolved(self, term: _Term) -> tuple[_Slot | None, Place, ColumnElement[Any]]:
        return self._named(term.target, term.place, "ORDER BY")

    def _named(
        self, target: Any, place: Place, clause: str
    ) -> tuple[_Slot | None, Place, ColumnElement[Any]]:
        """Return the visible column that a term stands for, if any, its place and expression."""
        if isinstance(target, _textual_label_reference):
            return self._by_name(target.element, place, clause)
        if isinstance(target, TextClause):
            raise CrossShardRefused(
                clause, f"text({target.text!r}) cannot be analysed; use columns"
            )
        if isinstance(target, Tuple) or not isinstance(target, ColumnElement):
            raise CrossShardRefused(clause, f"{words(target)}: name its columns one by one")
        expression = _unlabelled(target)
        slot = next((slot for slot in self.slots if _same(slot.expression, expression)), None)
        return slot, place, expression

    def _by_name(
        self, name: str, place: Place, clause: str
    ) -> tuple[_Slot | None, Place, ColumnElement[Any]]:
        found = self.state._label_resolve_dict[0].get(name)
        if found is None:
            raise CrossShardRefused(clause, f"{name!r} is no label or column of the statement")
        for slot in self.slots:
            column = _column_at(self.statement, slot.place)
            if isinstance(found, Label):
                is_it = isinstance(column, Label) and column.name == found.name
            else:
                is_it = _same(_unlabelled(found), slot.expression)
            if is_it:
                return slot, slot.place, slot.expression
        column = found._deannotate(clone=False)
        if isinstance(column, Column) and isinstance(column.table, Table):
            return None, replace(place, column=column), column
        raise CrossShardRefused(
            clause, f"{name!r} names no column of a table; give the expression instead of its name"
        )

    def _column_of(self, slot: _Slot | None, place: Place, expression: ColumnElement[Any]) -> int:
        """Return the visible column that holds an expression's stored value, or hide one."""
        plain = is_loaded_as_stored(expression.type)
        if slot is not None and slot.index is not None and plain:
            return slot.index
        return self._hide(place, Form.AS_IS if plain else Form.AS_STORED)

    def _hide(self, place: Place, form: Form) -> int:
        """Return the number of a hidden column, below zero until all of them are known."""
        hidden = Hidden(place, form)
        if hidden not in self.hidden:
            self.hidden.append(hidden)
        return -self.hidden.index(hidden) - 1


def _with_final_columns(shape: MergeShape, hidden: int) -> MergeShape:
    """Turn numbers of hidden columns, -1 for the first, into indexes from the end of a row."""

    def final(column: int) -> int:
        return column if column >= 0 else -hidden - column - 1

    order = tuple(replace(term, column=final(term.column)) for term in shape.order)
    if shape.grouping is None:
        return replace(shape, order=order)
    keys = tuple(replace(key, column=final(key.column)) for key in shape.grouping.keys)
    aggregates = tuple(
        replace(
            aggregate,
            value=final(aggregate.value),
            count=None if aggregate.count is None else final(aggregate.count),
        )
        for aggregate in shape.grouping.aggregates
    )
    return replace(shape, order=order, grouping=Grouping(keys, aggregates))


def _check_sources(statement: AnySelect, shape: MergeShape) -> None:
    """Refuse a clause that names a table missing in FROM; a hidden column would bring it in.

    PostgreSQL refuses such a statement; with the hidden column it would run, as a cross join.
    """
    if not shape.hidden:
        return
    inner = statement.order_by(None).limit(None).offset(None)
    widened = inner.add_columns(*_hidden_columns(statement, shape))
    if len(widened.get_final_froms()) != len(inner.get_final_froms()):
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


def _compile_state(statement: AnySelect) -> Any:
    """Return what SQLAlchemy, or its ORM, makes of a SELECT before rendering it."""
    dialect = reference_dialect()
    compiler: Any = dialect.statement_compiler(dialect, None)
    compiler.stack = []
    factory: Any = statement._compile_state_factory
    return factory(statement, compiler)


def _slots(statement: AnySelect) -> Iterator[_Slot]:
    """Yield the visible columns that are expressions; entities and bundles only count."""
    index: int | None = 0
    for item, raw in enumerate(statement._raw_columns):
        if isinstance(raw, TextClause) or getattr(raw, "is_literal", False):
            check_scalar(raw, "select list", frozenset())
            index = None  # it may stand for any number of columns
        columns = _parts(raw)
        for part, column in enumerate(columns):
            place = Place(Clause.COLUMNS, item, None if columns == [raw] else part)
            if isinstance(column, ColumnElement):
                yield _Slot(place, _unlabelled(column), index)
            index = None if index is None else index + 1


def _parts(raw: Any) -> list[Any]:
    if not is_source(raw) or "parententity" in raw._annotations:
        return [raw]
    return list(raw._select_iterable)


def _order_terms(statement: AnySelect) -> Iterator[_Term]:
    for place, clause in _items(statement._order_by_clauses, Clause.ORDER_BY):
        yield _term(place, clause)


def _term(place: Place, clause: Any) -> _Term:
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
    return _Term(
        place, clause, is_descending, is_descending if nulls_first is None else nulls_first
    )


def _items(clauses: Any, clause: Clause) -> Iterator[tuple[Place, Any]]:
    """Yield the terms of a clause with their places; ``group_by(Entity)`` is a list of columns."""
    for item, element in enumerate(clauses):
        if isinstance(element, ClauseList) and not isinstance(element, Tuple):
            for part, column in enumerate(element.clauses):
                yield Place(clause, item, part), _unreferenced(column)
        else:
            yield Place(clause, item), _unreferenced(element)


def _unreferenced(element: Any) -> Any:
    return element.element if isinstance(element, _label_reference) else element


def _unlabelled(expression: Any) -> Any:
    while isinstance(expression, Label):
        expression = expression.element
    return expression


def _same(left: Any, right: Any) -> bool:
    """Say whether two expressions are one in every statement of the shape: same bind parameters."""
    if left is right:
        return True
    if isinstance(left, Column) and isinstance(right, Column):
        return left._deannotate(clone=False) is right._deannotate(clone=False)
    mine, theirs = left._generate_cache_key(), right._generate_cache_key()
    if mine is None or theirs is None or mine.key != theirs.key:
        return False
    return [bind.key for bind in mine.bindparams] == [bind.key for bind in theirs.bindparams]


def _sort_term(
    column: int, family: Family, term: _Term, expression: ColumnElement[Any]
) -> SortTerm:
    return SortTerm(column, family, term.descending, term.nulls_first, words(expression))


def _column_at(statement: AnySelect, place: Place) -> Any:
    """Return the clause element at a place of a statement."""
    if place.column is not None:
        return place.column
    if place.clause is Clause.COLUMNS:
        raw: Any = statement._raw_columns[place.item]
        return raw if place.part is None else _parts(raw)[place.part]
    clauses: Any = (
        statement._group_by_clauses
        if place.clause is Clause.GROUP_BY
        else statement._order_by_clauses
    )
    element = clauses[place.item]
    element = element if place.part is None else element.clauses[place.part]
    return _term(place, element).target


def _hidden_columns(statement: AnySelect, shape: MergeShape) -> list[Label[Any]]:
    columns = []
    for number, hidden in enumerate(shape.hidden):
        expression = _unlabelled(_column_at(statement, hidden.place))
        if hidden.form is Form.AS_STORED:
            expression = type_coerce(expression, types.NULLTYPE)
        elif hidden.form is not Form.AS_IS:
            call = aggregate_call(expression)
            assert call is not None
            expression = partial(call, "sum" if hidden.form is Form.SUM else "count")
        columns.append(expression.label(f"sqlroute_{number + 1}"))
    return columns


def _order_clause(
    statement: AnySelect, clause: OrderClause, columns: list[Label[Any]]
) -> ColumnElement[Any]:
    # By its label, because an expression with bind parameters is another one to PostgreSQL, and
    # random() another value, when it is written twice.
    expression = (
        _column_at(statement, clause.place) if clause.hidden is None else columns[clause.hidden]
    )
    term = expression.desc() if clause.descending else expression.asc()
    if clause.nulls_first == clause.descending:
        return term
    return term.nulls_first() if clause.nulls_first else term.nulls_last()


def _bound(clause: Any, parameters: Mapping[str, Any] | None) -> int | None:
    """Return the value of LIMIT or OFFSET in this execution."""
    if clause is None:
        return None
    if parameters is not None and clause.key in parameters:
        value = parameters[clause.key]
    elif clause.required:  # the clause will not be in the statement for SQLAlchemy to miss it
        raise InvalidRequestError(f"a value is required for bind parameter {clause.key!r}")
    else:
        value = clause.effective_value
    return None if value is None else int(value)


def _pushed_limit(shape: MergeShape, limit: int | None, offset: int) -> int | None:
    if limit is None or shape.grouping is not None or limit + offset > _INTEGER_MAX:
        return None
    return limit + offset
