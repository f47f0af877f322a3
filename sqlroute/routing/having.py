"""Read HAVING, and other expressions over aggregates, as terms that are evaluated after the merge.

It knows comparisons, AND, OR, NOT, IN, BETWEEN, IS, ``coalesce`` and ``+ - *`` of aggregates, group
keys and bind parameters. What it does not know, or PostgreSQL would compute in a type that may
overflow differently, is refused.
"""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import types
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    AsBoolean,
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ClauseList,
    ColumnClause,
    ColumnElement,
    ExpressionClauseList,
    False_,
    Null,
    True_,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.aggregates import Call, aggregate_call, aggregates_in, check_scalar
from sqlroute.routing.combining import AggregateKind
from sqlroute.routing.expressions import Column, Constant, Operation, Operator, Parameter, Term
from sqlroute.routing.families import bare, is_single_precision, storage_type, words
from sqlroute.routing.numeric import Width
from sqlroute.routing.ordering import Family

_COMPARISONS: dict[Any, Operator] = {
    operators.eq: Operator.EQ,
    operators.ne: Operator.NE,
    operators.lt: Operator.LT,
    operators.le: Operator.LE,
    operators.gt: Operator.GT,
    operators.ge: Operator.GE,
    operators.is_distinct_from: Operator.DISTINCT,
    operators.is_not_distinct_from: Operator.DISTINCT,
    operators.in_op: Operator.IN,
    operators.not_in_op: Operator.IN,
}
_NEGATED = (operators.is_not_distinct_from, operators.not_in_op)
_ORDERING = frozenset({Operator.LT, Operator.LE, Operator.GT, Operator.GE})
_ARITHMETIC: dict[Any, Operator] = {
    operators.add: Operator.ADD,
    operators.sub: Operator.SUBTRACT,
    operators.mul: Operator.MULTIPLY,
}
_CONSTANTS = ((True_, True), (False_, False), (Null, None))
_COUNTS = (AggregateKind.COUNT, AggregateKind.REGR_COUNT)
_NARROW = (AggregateKind.MIN, AggregateKind.MAX)
_MEASURED = (*_COUNTS, *_NARROW, AggregateKind.SUM, AggregateKind.AVG)


class Columns(Protocol):
    """Where the values of merged rows stand."""

    def of_aggregate(self, aggregate: ColumnElement[Any], call: Call) -> tuple[int, Family]:
        """Return the column of an aggregate's result and the order of its values."""

    def of_key(self, expression: ColumnElement[Any], clause: str) -> tuple[int, Family] | None:
        """Return the column of a group key, ``None`` if the expression is none.

        The family is that of an order when a clause is given, else of an equality.
        """

    def of_parameter(self, bind: BindParameter[Any], family: Family, text: str) -> int:
        """Return the number of a parameter's value."""


class Reader:
    """Reads the expressions of one place.

    Args:
        clause: to blame, as SQL words.
    """

    def __init__(self, columns: Columns, clause: str) -> None:
        self._columns = columns
        self._clause = clause

    def condition(self, expression: Any) -> Term:
        """Return a boolean expression as a term.

        Raises:
            CrossShardRefused: it cannot be evaluated exactly.
        """
        node = bare(expression)
        if isinstance(node, BooleanClauseList):
            operator = Operator.AND if node.operator is operators.and_ else Operator.OR
            return Operation(operator, tuple(map(self.condition, node.clauses)))
        if isinstance(node, AsBoolean):
            operand = self.condition(node.element)
            is_true = node.operator is operators.is_true
            return operand if is_true else Operation(Operator.NOT, (operand,))
        if isinstance(node, UnaryExpression) and node.operator is operators.inv:
            return Operation(Operator.NOT, (self.condition(node.element),))
        if isinstance(node, BinaryExpression):
            return self._binary(node)
        term, family, _ = self._value(node)
        if family not in (Family.BOOLEAN, None):
            raise self._refused(node, "it is no condition")
        return term

    def value(self, expression: Any) -> tuple[Term, Family]:
        """Return an expression as a term, and the order of its values.

        Raises:
            CrossShardRefused: it cannot be evaluated exactly.
        """
        term, family, _ = self._value(bare(expression))
        if family is None:
            raise self._refused(expression, "its type is not known")
        return term, family

    def _binary(self, node: BinaryExpression[Any]) -> Term:
        operator = node.operator
        if operator in (operators.is_, operators.is_not):
            return self._is(node)
        if operator in (operators.between_op, operators.not_between_op):
            return self._between(node)
        if operator not in _COMPARISONS:
            raise self._refused(node, "only comparisons are evaluated after the merge")
        found = self._compared(node, node.left, _COMPARISONS[operator], node.right)
        return Operation(Operator.NOT, (found,)) if operator in _NEGATED else found

    def _is(self, node: BinaryExpression[Any]) -> Term:
        right = bare(node.right)
        if isinstance(right, Null):
            term: Term = Operation(Operator.IS_NULL, (self._value(bare(node.left))[0],))
        elif isinstance(right, True_ | False_):
            operator = Operator.IS_TRUE if isinstance(right, True_) else Operator.IS_FALSE
            term = Operation(operator, (self.condition(node.left),))
        else:
            raise self._refused(node, "IS is evaluated of NULL, TRUE and FALSE only")
        return Operation(Operator.NOT, (term,)) if node.operator is operators.is_not else term

    def _between(self, node: BinaryExpression[Any]) -> Term:
        right: Any = node.right
        if not isinstance(right, ClauseList | ExpressionClauseList):
            raise self._refused(node, "its bounds cannot be seen")
        low, high = right.clauses
        both = (
            self._compared(node, node.left, Operator.GE, low),
            self._compared(node, node.left, Operator.LE, high),
        )
        term = Operation(Operator.AND, both)
        is_negated = node.operator is operators.not_between_op
        return Operation(Operator.NOT, (term,)) if is_negated else term

    def _compared(self, node: Any, left: Any, operator: Operator, right: Any) -> Term:
        left, right = bare(left), bare(right)
        clause = self._clause if operator in _ORDERING else ""
        sides = [self._side(side, clause) for side in (left, right)]
        families = {family for _, family in sides if family is not None}
        if len(families) != 1:
            raise self._refused(node, "its sides are not of one kind")
        (family,) = families
        text = words(node)
        operands = tuple(
            self._parameter(side, family, text) if term is None else term
            for side, (term, _) in zip((left, right), sides, strict=True)
        )
        return Operation(operator, operands, family)

    def _side(self, side: Any, clause: str) -> tuple[Term | None, Family | None]:
        if isinstance(side, BindParameter):
            return None, None
        if is_single_precision(side.type):
            raise self._refused(side, "it is real; cast it to double precision")
        term, family, _ = self._value(side, clause)
        return term, family

    def _parameter(self, bind: BindParameter[Any], family: Family, text: str) -> Term:
        return Parameter(self._columns.of_parameter(bind, family, text), family, text)

    def _value(self, node: Any, clause: str = "") -> tuple[Term, Family | None, Width | None]:
        for kind, value in _CONSTANTS:
            if isinstance(node, kind):
                return Constant(value), Family.BOOLEAN if value is not None else None, None
        call = aggregate_call(node)
        if call is not None:
            column, family = self._columns.of_aggregate(node, call)
            return Column(column), family, _width(call) if family is Family.NUMBER else None
        key = self._columns.of_key(node, clause)
        if key is not None:
            column, family = key
            return Column(column), family, None
        if isinstance(node, BinaryExpression) and node.operator in _ARITHMETIC:
            return self._arithmetic(node)
        if isinstance(node, FunctionElement) and getattr(node, "name", "").lower() == "coalesce":
            return self._coalesce(node)
        check_scalar(node, self._clause, frozenset())  # blames the aggregate that does not merge
        raise self._refused(node, "it is not evaluated after the merge")

    def _arithmetic(self, node: BinaryExpression[Any]) -> tuple[Term, Family, Width | None]:
        operands = []
        widths: list[Width] = []
        for side in (bare(node.left), bare(node.right)):
            if isinstance(side, BindParameter):
                operands.append(self._parameter(side, Family.NUMBER, words(node)))
                continue
            term, family, width = self._value(side)
            if family is not Family.NUMBER or width is None or _is_narrow(side):
                raise self._refused(side, "its number type may overflow; use count, sum or avg")
            operands.append(term)
            widths.append(width)
        return Operation(_ARITHMETIC[node.operator], tuple(operands)), Family.NUMBER, max(widths)

    def _coalesce(self, node: FunctionElement[Any]) -> tuple[Term, Family, Width | None]:
        sides = [bare(side) for side in node.clauses]
        read = [None if isinstance(s, BindParameter) else self._value(s) for s in sides]
        families = {found[1] for found in read if found is not None and found[1] is not None}
        if len(families) != 1:
            raise self._refused(node, "its arguments are not of one kind")
        (family,) = families
        widths = [found[2] for found in read if found is not None]
        if family is Family.NUMBER and None in widths:
            raise self._refused(node, "the number type of its result is not known; use cast()")
        width = max(w for w in widths if w is not None) if family is Family.NUMBER else None
        text = words(node)
        operands = tuple(
            self._parameter(side, family, text) if found is None else found[0]
            for side, found in zip(sides, read, strict=True)
        )
        return Operation(Operator.COALESCE, operands, family, width), family, width

    def _refused(self, node: Any, why: str) -> CrossShardRefused:
        return CrossShardRefused(self._clause, f"{words(node)}: {why}")


def _is_narrow(expression: ColumnElement[Any]) -> bool:
    """Say whether a value may be of a type that overflows where Python does not."""
    calls = map(aggregate_call, aggregates_in(expression))
    return any(call is None or call.kind in _NARROW for call in calls)


def _width(call: Call) -> Width | None:
    """Return the number type of an aggregate's result, ``None`` if it is not known for sure."""
    if call.kind in _COUNTS:
        return Width.INTEGER
    argument = bare(call.argument)
    if call.kind not in _MEASURED or not isinstance(argument, ColumnClause):
        return None  # the type that SQLAlchemy gives an expression is not always PostgreSQL's
    stored = storage_type(argument.type)
    if isinstance(stored, types.Float):
        return Width.DOUBLE
    if isinstance(stored, types.Numeric):
        return Width.NUMERIC
    if not isinstance(stored, types.Integer):
        return None
    is_bigint = call.kind is AggregateKind.SUM and not isinstance(stored, types.BigInteger)
    return Width.INTEGER if is_bigint or call.kind in _NARROW else Width.NUMERIC
