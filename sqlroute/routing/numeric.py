"""Arithmetic of PostgreSQL's number types, for merging partial aggregates.

It decides how sums of parts add up and how ``avg`` divides, to the digit and to the scale of
PostgreSQL 15 to 18. A number is what psycopg loads: ``int`` for int2 to int8, ``Decimal`` for
numeric, ``float`` for float4 and float8. Nothing here uses the decimal context of the caller.
"""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal
from enum import IntEnum
from typing import TypeAlias

from sqlroute.errors import CrossShardRefused

Number: TypeAlias = int | float | Decimal

_BIGINT_MAX = 2**63 - 1
_MIN_SIGNIFICANT_DIGITS = 16
_MAX_SCALE = 1000
_BASE_DIGITS = 4  # PostgreSQL keeps a numeric in base-10000 digits, and its scale rule sees them
# Room for the longest numeric, 131072 digits before the point and 16383 after it.
_EXACT = Context(prec=1_000_000, rounding=ROUND_HALF_EVEN, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
_NAN = Decimal("NaN")


class Width(IntEnum):
    """PostgreSQL's number types, each wide enough for the values of those before it."""

    INTEGER = 0
    NUMERIC = 1
    DOUBLE = 2


def width_of(value: Number) -> Width:
    """Return the type of a number, by how psycopg loads and sends it."""
    if isinstance(value, float):
        return Width.DOUBLE
    return Width.NUMERIC if isinstance(value, Decimal) else Width.INTEGER


def widened(value: Number, width: Width) -> Number:
    """Return a number as a value of a type that is at least as wide as its own."""
    if width is Width.DOUBLE:
        return float(value)
    return Decimal(value) if width is Width.NUMERIC else value


def add(left: Number, right: Number) -> Number:
    """Add two partial sums of one type, without the range of bigint.

    Numerics add exactly and keep the larger scale; Infinity and -Infinity make NaN. Floats add
    in the order of the shards: like the workers of a parallel plan on one server, whose order is
    no more defined.

    Raises:
        CrossShardRefused: finite floats add up beyond double precision, where PostgreSQL raises.
    """
    if isinstance(left, Decimal) or isinstance(right, Decimal):
        return _EXACT.add(Decimal(left), Decimal(right))
    total = left + right
    overflows = isinstance(total, float) and math.isinf(total)
    if overflows and not (math.isinf(left) or math.isinf(right)):
        raise CrossShardRefused("sum", "value out of range: overflow of double precision")
    return total


def add_as_sum(left: Number, right: Number) -> Number:
    """Add two partial results of ``sum``; of integers it is a bigint, as in PostgreSQL.

    Raises:
        CrossShardRefused: the sum is out of range, where PostgreSQL raises.
    """
    total = add(left, right)
    if isinstance(total, int) and not -_BIGINT_MAX - 1 <= total <= _BIGINT_MAX:
        raise CrossShardRefused(
            "sum", f"bigint out of range: {total}; cast the argument to numeric"
        )
    return total


def subtract(left: Decimal, right: Decimal) -> Decimal:
    """Subtract two numerics exactly."""
    return _EXACT.subtract(left, right)


def multiply(left: Decimal, right: Decimal) -> Decimal:
    """Multiply two numerics exactly; the scales add up."""
    return _EXACT.multiply(left, right)


def square_root(value: Decimal) -> Decimal:
    """Return the square root of a numeric above zero, rounded half up at the value's own scale."""
    scale = scale_of(value)
    square = int(_EXACT.scaleb(value, 2 * scale))
    root = math.isqrt(square)
    return _EXACT.scaleb(Decimal(root + (square - root * root > root)), -scale)


def average(total: Number, count: int) -> Number:
    """Divide a sum by a count as ``avg`` does: numeric division, or that of floats.

    Args:
        total: ``int`` and ``Decimal`` divide as numeric.
        count: at least 1.
    """
    if isinstance(total, float):
        return total / count
    return divide(Decimal(total), count)


def divide(dividend: Decimal, divisor: int) -> Decimal:
    """Divide a numeric by a positive integer with the result scale of PostgreSQL's ``/``.

    The quotient is rounded half away from zero at a scale that gives at least 16 significant
    digits and no fewer decimals than the dividend, up to 1000 (``select_div_scale`` in numeric.c).
    """
    if not dividend.is_finite():
        return _NAN if dividend.is_nan() else dividend
    own_scale = scale_of(dividend)
    scale = _quotient_scale(dividend, divisor, own_scale)
    numerator = abs(int(_EXACT.scaleb(dividend, own_scale))) * 10 ** max(0, scale - own_scale)
    denominator = divisor * 10 ** max(0, own_scale - scale)
    digits = (2 * numerator + denominator) // (2 * denominator)
    return _EXACT.scaleb(Decimal(-digits if dividend < 0 else digits), -scale)


def scale_of(value: Decimal) -> int:
    """Return the number of decimals of a finite numeric, PostgreSQL's ``scale()``."""
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def _quotient_scale(dividend: Decimal, divisor: int, own_scale: int) -> int:
    weight, first = _leading_digit(dividend)
    divisor_weight, divisor_first = _leading_digit(Decimal(divisor))
    quotient_weight = weight - divisor_weight - (first <= divisor_first)
    scale = _MIN_SIGNIFICANT_DIGITS - quotient_weight * _BASE_DIGITS
    return min(max(scale, own_scale, 0), _MAX_SCALE)


def _leading_digit(value: Decimal) -> tuple[int, int]:
    """Return the weight (a power of 10000) and the value of the first base-10000 digit."""
    if not value:
        return 0, 0
    weight = value.adjusted() // _BASE_DIGITS
    first = int(_EXACT.scaleb(_EXACT.abs(value), -weight * _BASE_DIGITS))
    return weight, first
