"""Find how groups and aggregates merge whose rows are on several shards, or refuse them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import types
from sqlalchemy.sql.elements import BindParameter, ColumnElement, TextClause

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.aggregates import (
    Call,
    Form,
    aggregate_call,
    aggregates_in,
    distributes_distinct,
    is_aggregated,
    needs_double,
    refuse_text,
)
from sqlroute.routing.combining import (
    LISTS,
    OBJECTS,
    REGRESSIONS,
    SPREADS,
    Aggregate,
    AggregateKind,
    Conversion,
)
from sqlroute.routing.expressions import Term
from sqlroute.routing.families import (
    bare,
    group_family,
    is_loaded_as_stored,
    is_single_precision,
    list_family,
    number_conversion,
    order_family,
    storage_type,
    words,
)
from sqlroute.routing.having import Reader
from sqlroute.routing.merge import Computed, Grouping, GroupKey
from sqlroute.routing.ordering import Family, SortTerm
from sqlroute.routing.places import (
    Clause,
    OrderTerm,
    Place,
    distinct_on,
    is_same,
    items,
    order_term,
    parameters_of,
)
from sqlroute.routing.selection import Selection
from sqlroute.routing.shapes import MergeShape, ValuePlace

_KIND = AggregateKind
_SUMS = frozenset({_KIND.SUM, _KIND.AVG, *SPREADS})
_BOOLEANS = frozenset({_KIND.BOOL_AND, _KIND.BOOL_OR})
_BITS = frozenset({_KIND.BIT_AND, _KIND.BIT_OR, _KIND.BIT_XOR})
_COUNTS = frozenset({_KIND.COUNT, _KIND.REGR_COUNT})
_NUMBERS = _SUMS | _BITS | _COUNTS | REGRESSIONS
_PAIRS = (Form.PAIRS, Form.X, Form.XX, Form.Y, Form.YY, Form.XY)


def has_number_result(expression: ColumnElement[Any]) -> bool:
    """Say whether an expression is an aggregate with numbers for results, whatever its type."""
    try:
        call = aggregate_call(expression)
        if call is None or call.kind not in _NUMBERS:
            return False
        if call.kind in _COUNTS or call.kind in REGRESSIONS or call.argument is None:
            return True
        return order_family(call.argument, call.name, TextOrder(False)) is Family.NUMBER
    except CrossShardRefused:
        return False


class Groups:
    """The analysis of one grouped statement."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.statement = selection.statement
        self.keys: list[tuple[ColumnElement[Any], GroupKey]] = []
        self.aggregates: list[tuple[Call, Aggregate]] = []
        self.computed: list[tuple[ColumnElement[Any], Computed]] = []
        self.values: list[ValuePlace] = []

    def shape(self) -> MergeShape:
        """Return how the groups merge.

        Raises:
            CrossShardRefused: they have no exact merge.
        """
        if distinct_on(self.statement):
            raise CrossShardRefused("DISTINCT ON", "with GROUP BY it is not merged")
        for raw in self.statement._raw_columns:
            if isinstance(raw, TextClause):
                refuse_text(raw, "select list")
        self._read_keys()
        self._read_columns()
        kept, having = self._having()
        order = tuple(map(self._sort_term, self.selection.terms))
        distinct = self._distinct() if self.statement._distinct else None
        grouping = Grouping(
            tuple(key for _, key in self.keys),
            tuple(aggregate for _, aggregate in self.aggregates),
            tuple(computed for _, computed in self.computed),
            having,
        )
        return MergeShape(
            order=order,
            grouping=grouping,
            distinct=distinct,
            kept_having=kept,
            values=tuple(self.values),
        )

    def _read_keys(self) -> None:
        for place, clause in items(self.statement._group_by_clauses, Clause.GROUP_BY):
            found = self.selection.named(clause, place, "GROUP BY")
            expression = found[2]
            self.selection.check_scalar(expression, "GROUP BY")
            refuse_text(expression, "GROUP BY")
            family = group_family(expression, self.selection.text_order)
            column = self.selection.column_of(found)
            self.keys.append((expression, GroupKey(column, family, words(expression))))

    def _read_columns(self) -> None:
        for slot in self.selection.slots:
            call = aggregate_call(slot.expression)
            if call is not None:
                self._aggregate(slot.expression, call, slot.place, slot.index)
            elif is_aggregated(slot.expression):
                self._computed_column(slot.expression, slot.place, slot.index)
            else:
                self.selection.check_scalar(slot.expression, "select list")
                refuse_text(slot.expression, "select list")

    # Expressions over aggregates

    def _computed_column(
        self, expression: ColumnElement[Any], place: Place, index: int | None
    ) -> None:
        if index is None:
            raise CrossShardRefused("select list", f"{words(expression)} stands behind text")
        term, family = self._reader(place, expression, "select list").value(expression)
        conversion = None
        if family is Family.NUMBER:
            conversion = number_conversion(expression.type, "select list")
        elif not _is_raw(expression.type):
            raise CrossShardRefused(
                "select list",
                f"{words(expression)}: values of {expression.type!r} are not made here",
            )
        self._add_computed(expression, index, term, conversion)

    def _add_computed(
        self,
        expression: ColumnElement[Any],
        column: int,
        term: Term,
        conversion: Conversion | None,
    ) -> None:
        found = Computed(column, term, conversion, words(expression))
        self.computed.append((expression, found))

    def _having(self) -> tuple[tuple[int, ...], tuple[tuple[Term, str], ...]]:
        """Return the conditions that each shard decides for itself, and those of merged groups."""
        kept, merged = [], []
        for item, condition in enumerate(self.statement._having_criteria):
            if not is_aggregated(condition):
                self.selection.check_scalar(condition, "HAVING")
                if not self.keys:  # of no group each shard has one
                    raise CrossShardRefused("HAVING", f"{words(condition)}: without GROUP BY")
                kept.append(item)
                continue
            place = Place(Clause.HAVING, item)
            term = self._reader(place, condition, "HAVING").condition(condition)
            merged.append((term, words(condition)))
        return tuple(kept), tuple(merged)

    def _reader(self, place: Place, whole: ColumnElement[Any], clause: str) -> Reader:
        return Reader(_Columns(self, place, whole), clause)

    # ORDER BY and DISTINCT

    def _sort_term(self, term: OrderTerm) -> SortTerm:
        found = self.selection.named(term.target, term.place, "ORDER BY")
        _, place, expression = found
        call = aggregate_call(expression)
        if call is not None:
            aggregate = self.aggregate_of(expression, call, place)
            family = self.comparable(expression, call)
            return term.sorted_by(aggregate.value, family, words(expression))
        if is_aggregated(expression):
            reader = self._reader(place, expression, "ORDER BY")
            value, family = reader.value(expression)
            column = self.selection.hide(place, Form.AS_STORED)
            self._add_computed(expression, column, value, None)
            return term.sorted_by(column, family, words(expression))
        self.selection.check_scalar(expression, "ORDER BY")
        refuse_text(expression, "ORDER BY")
        return self.selection.sort_term(term, found, "ORDER BY")

    def _distinct(self) -> tuple[GroupKey, ...]:
        keys = []
        if len(self.selection.slots) < len(self.statement._raw_columns):
            raise CrossShardRefused("DISTINCT", "of entities beside aggregates; name the columns")
        for slot in self.selection.slots:
            expression = slot.expression
            call = aggregate_call(expression)
            if call is not None:
                column = self.aggregate_of(expression, call, slot.place).value
                family = self.comparable(expression, call)
            elif is_aggregated(expression):
                raise CrossShardRefused("DISTINCT", f"{words(expression)} is computed by the merge")
            else:
                family = group_family(expression, self.selection.text_order, "DISTINCT")
                column = self.selection.column_of((slot, slot.place, expression))
            keys.append(GroupKey(column, family, words(expression)))
        return tuple(keys)

    def key_of(self, expression: ColumnElement[Any]) -> GroupKey | None:
        """Return the group key that an expression is."""
        return next((key for other, key in self.keys if is_same(other, expression)), None)

    # Aggregates

    def aggregate_of(self, expression: ColumnElement[Any], call: Call, place: Place) -> Aggregate:
        """Return an aggregate that is in use already, or add it."""
        for known, aggregate in self.aggregates:
            if _is_same_call(known, call):
                return aggregate
        return self._aggregate(expression, call, place, None)

    def comparable(self, expression: ColumnElement[Any], call: Call) -> Family:
        """Return the order of an aggregate's results, which something is compared with.

        Raises:
            CrossShardRefused: they are lists, which Python orders differently.
        """
        if call.kind in LISTS:
            raise CrossShardRefused(call.name, f"{words(expression)} is not compared; use min()")
        return self.family_of(call)

    def _aggregate(
        self, expression: ColumnElement[Any], call: Call, place: Place, visible: int | None
    ) -> Aggregate:
        """Add one aggregate with the partial columns it needs."""
        self._check(call)
        family = self.family_of(call)
        order = tuple(self._sorted_inside(call, place))
        parts = (*self._parts(call, place, visible), *(term.column for term in order))
        conversion = _conversion(call)
        text = words(expression)
        aggregate = Aggregate(
            call.kind, visible, parts, family, conversion, text, order, needs_double(call)
        )
        self.aggregates.append((call, aggregate))
        return aggregate

    def _check(self, call: Call) -> None:
        if call.criterion is not None:
            self.selection.check_scalar(call.criterion, "FILTER")
        if call.kind is not _KIND.COUNT:
            for argument in call.arguments:
                self.selection.check_scalar(argument, call.name)
        if not distributes_distinct(call, self.selection.localities.is_key):
            raise CrossShardRefused(
                f"{call.name[:-2]}(DISTINCT)",
                "equal values may be on several shards; select the distinct values with GROUP BY",
            )

    def _parts(self, call: Call, place: Place, visible: int | None) -> tuple[int, ...]:
        hide, kind = self.selection.hide, call.kind
        if kind is _KIND.AVG:
            return hide(place, Form.SUM), hide(place, Form.COUNT)
        if kind in SPREADS:
            last = Form.DISTANCES if needs_double(call) else Form.SQUARES
            return hide(place, Form.SUM), hide(place, Form.COUNT), hide(place, last)
        if kind in REGRESSIONS:
            return tuple(hide(place, form) for form in _PAIRS)
        if kind is _KIND.STRING_AGG:
            return hide(place, Form.LIST), hide(place, Form.SEPARATOR)
        if kind in OBJECTS:
            return hide(place, Form.LIST), hide(place, Form.SECOND)
        is_shown = visible is not None and (kind in _COUNTS or _is_raw_result(call))
        return (visible if is_shown and visible is not None else hide(place, Form.AS_STORED),)

    def _sorted_inside(self, call: Call, place: Place) -> list[SortTerm]:
        terms = []
        for number, clause in enumerate(call.order):
            term = order_term(place, clause)
            if not isinstance(term.target, ColumnElement):
                raise CrossShardRefused(call.name, f"ORDER BY {words(term.target)} inside it")
            self.selection.check_scalar(term.target, call.name)
            refuse_text(term.target, call.name)
            family = order_family(term.target, call.name, self.selection.text_order)
            column = self.selection.hide(place, Form.SORTED_BY, number)
            terms.append(term.sorted_by(column, family, words(term.target)))
        return terms

    def family_of(self, call: Call) -> Family:
        """Return the order of an aggregate's results.

        Raises:
            CrossShardRefused: arguments that it is not merged for.
        """
        kind, argument = call.kind, call.argument
        if kind in _COUNTS or kind in REGRESSIONS:
            return Family.NUMBER
        assert argument is not None
        if kind is _KIND.JSON_AGG or kind in OBJECTS:
            return Family.TEXT
        if kind in (_KIND.ARRAY_AGG, _KIND.STRING_AGG):
            return self._list_family(call, argument)
        if kind in _BOOLEANS:
            return Family.BOOLEAN
        family = order_family(argument, call.name, self.selection.text_order)
        if kind in (_KIND.MIN, _KIND.MAX):
            return family
        self._check_number(call, argument, family)
        return family

    def _list_family(self, call: Call, argument: ColumnElement[Any]) -> Family:
        family = list_family(argument, call.name)
        if call.kind is _KIND.STRING_AGG and family is not Family.TEXT:
            raise CrossShardRefused(call.name, f"{words(argument)} is no text; cast() it")
        return family

    def _check_number(self, call: Call, argument: ColumnElement[Any], family: Family) -> None:
        if family is not Family.NUMBER:
            raise CrossShardRefused(call.name, f"{words(argument)} is no number")
        stored = storage_type(argument.type)
        if call.kind in _BITS and not isinstance(stored, types.Integer):
            raise CrossShardRefused(call.name, f"{words(argument)} is no integer; cast() it")
        if call.kind is _KIND.SUM and is_single_precision(argument.type):
            raise CrossShardRefused(
                call.name, f"{words(argument)} is real; cast it to double precision"
            )
        if call.kind in SPREADS and isinstance(stored, types.NullType):
            raise CrossShardRefused(
                call.name, f"whether {words(argument)} is exact is not known; cast() it"
            )


def _is_same_call(one: Call, other: Call) -> bool:
    if not is_same(one.function, other.function):
        return False
    if one.criterion is None or other.criterion is None:
        is_same_filter = one.criterion is other.criterion
    else:
        is_same_filter = is_same(one.criterion, other.criterion)
    return is_same_filter and not one.order and not other.order


def _is_raw(type_: types.TypeEngine[Any]) -> bool:
    return isinstance(type_, types.NullType) or is_loaded_as_stored(type_)


def _is_raw_result(call: Call) -> bool:
    """Say whether the visible column of an aggregate has what psycopg loaded."""
    declared = call.declared
    if call.kind is _KIND.SUM:
        return isinstance(declared, types.Integer | types.NullType)
    if isinstance(declared, types.ARRAY):
        return not declared.as_tuple and _is_raw(declared.item_type)
    if isinstance(declared, types.JSON):
        return type(declared).__module__.startswith("sqlalchemy.")
    return _is_raw(declared)


def _conversion(call: Call) -> Conversion | None:
    """Return what SQLAlchemy does to the result of an aggregate.

    Raises:
        CrossShardRefused: something that is not done here.
    """
    if call.kind in _SUMS or call.kind in REGRESSIONS:
        return number_conversion(call.declared, call.name)
    if call.kind in (_KIND.MIN, _KIND.MAX) or call.kind in _COUNTS or _is_raw_result(call):
        return None
    raise CrossShardRefused(
        call.name, f"its result is declared as {call.declared!r}, which is not made here"
    )


class _Columns:
    """Where the values of one expression over aggregates stand, see ``having.Columns``."""

    def __init__(self, groups: Groups, place: Place, whole: ColumnElement[Any]) -> None:
        self._groups = groups
        self._place = place
        self._aggregates = aggregates_in(whole)
        self._parameters = parameters_of(whole)

    def of_aggregate(self, aggregate: ColumnElement[Any], call: Call) -> tuple[int, Family]:
        number = next(
            i for i, found in enumerate(self._aggregates) if bare(found) is bare(aggregate)
        )
        found = self._groups.aggregate_of(aggregate, call, self._place.inner(number))
        return found.value, self._groups.comparable(aggregate, call)

    def of_key(self, expression: ColumnElement[Any], clause: str) -> tuple[int, Family] | None:
        key = self._groups.key_of(expression)
        if key is None:
            return None
        if not clause:
            return key.column, key.family
        text_order = self._groups.selection.text_order
        return key.column, order_family(expression, clause, text_order)

    def of_parameter(self, bind: BindParameter[Any], family: Family, text: str) -> int:
        number = next(i for i, found in enumerate(self._parameters) if found is bind)
        value = ValuePlace(self._place, number, family, text)
        if value not in self._groups.values:
            self._groups.values.append(value)
        return self._groups.values.index(value)
