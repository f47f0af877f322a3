"""Expressions over the results of aggregates, evaluated after the merge as PostgreSQL would.

HAVING and ``coalesce(sum(x), 0)`` need the aggregate of all shards. What is evaluated here is small
on purpose: comparisons, three-valued logic, IN, ``coalesce``, and ``+ - *`` of numbers wide enough
never to overflow silently; the rest is refused by :mod:`sqlroute.routing.analysis`. A term holds no
values: those of bind parameters come with each execution.
"""

from __future__ import annotations

import datetime as dt
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum
from typing import Any, TypeAlias

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.numeric import Width, add, add_as_sum, multiply, widened, width_of
from sqlroute.routing.ordering import Family, encoder

Values: TypeAlias = Sequence[Any]
"""Of the bind parameters, in the order of their numbers; an expanding one has a list."""


class Operator(Enum):
    """What is computed of its operands. The value is how it is told to people."""

    EQ = "="
    NE = "<>"
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IN = "IN"
    AND = "AND"
    OR = "OR"
    NOT = "NOT"
    IS_NULL = "IS NULL"
    IS_TRUE = "IS TRUE"
    IS_FALSE = "IS FALSE"
    DISTINCT = "IS DISTINCT FROM"
    COALESCE = "coalesce"
    ADD = "+"
    SUBTRACT = "-"
    MULTIPLY = "*"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a merged row: a group key, or the result of an aggregate."""

    index: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A bind parameter of the statement.

    Attributes:
        number: its index among the values of an execution.
        family: what it is compared with; a value of another family is refused.
        text: the comparison, for people.
    """

    number: int
    family: Family
    text: str


@dataclass(frozen=True, slots=True)
class Constant:
    """TRUE, FALSE or NULL."""

    value: bool | None


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator with its operands.

    Attributes:
        family: of the operands of a comparison.
        width: of the numbers that ``coalesce`` chooses from, as far as they are declared.
    """

    operator: Operator
    operands: tuple[Term, ...]
    family: Family = Family.BOOLEAN
    width: Width | None = None


Term: TypeAlias = Column | Parameter | Constant | Operation

_CLASSES: dict[Family, tuple[type, ...]] = {
    Family.NUMBER: (int, float, Decimal),
    Family.BOOLEAN: (bool,),
    Family.DATE: (dt.date,),
    Family.TIMESTAMP: (dt.datetime,),
    Family.TIME: (dt.time,),
    Family.UUID: (uuid.UUID,),
    Family.BYTES: (bytes,),
    Family.TEXT: (str,),
    Family.LABEL: (str,),
}


def check_value(value: Any, family: Family, text: str) -> None:
    """Refuse a value that PostgreSQL would compare after a cast of its own choice.

    Raises:
        CrossShardRefused: its class is not that of the family.
    """
    classes = _CLASSES.get(family, ())
    is_odd = isinstance(value, bool) and family is not Family.BOOLEAN
    is_odd |= isinstance(value, dt.datetime) and family is Family.DATE
    if value is not None and (is_odd or not isinstance(value, classes)):
        raise CrossShardRefused(
            "HAVING",
            f"{text}: a {type(value).__name__} is compared with a {family.value}; "
            "give a value of that type",
        )


def moved(term: Term, final: Callable[[int], int]) -> Term:
    """Return the term with every column renumbered."""
    if isinstance(term, Column):
        return Column(final(term.index))
    if isinstance(term, Operation):
        operands = tuple(moved(operand, final) for operand in term.operands)
        return replace(term, operands=operands)
    return term


def evaluate(term: Term, row: Sequence[Any], values: Values) -> Any:
    """Return the value of a term for one merged row; ``None`` is NULL, and unknown.

    Raises:
        CrossShardRefused: where PostgreSQL would raise an overflow.
    """
    if isinstance(term, Column):
        return row[term.index]
    if isinstance(term, Parameter):
        return values[term.number]
    if isinstance(term, Constant):
        return term.value
    operands = (evaluate(operand, row, values) for operand in term.operands)
    if term.operator is Operator.COALESCE:
        return _coalesce(term.width, *operands)
    return _EVALUATE[term.operator](term.family, *operands)


def _and(_: Family, *operands: Any) -> bool | None:
    found: bool | None = True
    for operand in operands:
        if operand is False:
            return False
        found = found if operand else None
    return found


def _or(_: Family, *operands: Any) -> bool | None:
    found: bool | None = False
    for operand in operands:
        if operand is True:
            return True
        found = found if operand is False else None
    return found


def _in(family: Family, left: Any, right: Sequence[Any]) -> bool | None:
    return _or(family, *(_equal(family, left, value) for value in right))


def _equal(family: Family, left: Any, right: Any) -> bool | None:
    return _compared(lambda one, other: one == other)(family, left, right)


def _compared(compare: Callable[[Any, Any], bool]) -> Callable[..., bool | None]:
    def evaluated(family: Family, left: Any, right: Any) -> bool | None:
        if left is None or right is None:
            return None
        encode = encoder(family)
        if isinstance(left, float) or isinstance(right, float):  # so does PostgreSQL
            left, right = float(left), float(right)
        return compare(encode(left), encode(right))

    return evaluated


def _distinct(family: Family, left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is not right
    return not _equal(family, left, right)


def _coalesce(width: Width | None, *operands: Any) -> Any:
    """Return the first value, as the type that all of them have in common."""
    given = [operand for operand in operands if operand is not None]
    if width is None or not given:
        return next(iter(given), None)
    return widened(given[0], max(width, *map(width_of, given)))


def _computed(compute: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def evaluated(_: Family, left: Any, right: Any) -> Any:
        return None if left is None or right is None else compute(*_alike(left, right))

    return evaluated


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Convert two numbers to the type that PostgreSQL computes with."""
    width = max(width_of(left), width_of(right))
    return widened(left, width), widened(right, width)


def _negated(value: Any) -> Any:
    return value.copy_negate() if isinstance(value, Decimal) else -value


def _sum(left: Any, right: Any) -> Any:
    return add_as_sum(left, right) if isinstance(left, int) else add(left, right)


def _product(left: Any, right: Any) -> Any:
    if isinstance(left, Decimal):
        return multiply(left, right)
    if isinstance(left, int):
        return add_as_sum(left * right, 0)
    product = left * right
    if math.isinf(product) and not (math.isinf(left) or math.isinf(right)):
        raise CrossShardRefused("*", "value out of range: overflow of double precision")
    return product


_EVALUATE: dict[Operator, Callable[..., Any]] = {
    Operator.EQ: _equal,
    Operator.NE: _compared(lambda left, right: left != right),
    Operator.LT: _compared(lambda left, right: left < right),
    Operator.LE: _compared(lambda left, right: left <= right),
    Operator.GT: _compared(lambda left, right: left > right),
    Operator.GE: _compared(lambda left, right: left >= right),
    Operator.IN: _in,
    Operator.AND: _and,
    Operator.OR: _or,
    Operator.NOT: lambda _, value: None if value is None else not value,
    Operator.IS_NULL: lambda _, value: value is None,
    Operator.IS_TRUE: lambda _, value: value is True,
    Operator.IS_FALSE: lambda _, value: value is False,
    Operator.DISTINCT: _distinct,
    Operator.ADD: _computed(_sum),
    Operator.SUBTRACT: _computed(lambda left, right: _sum(left, _negated(right))),
    Operator.MULTIPLY: _computed(_product),
}
