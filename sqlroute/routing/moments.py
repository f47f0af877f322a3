"""Variances and regressions from the parts that the shards have computed.

Of whole and exact numbers the parts are sums, and the result has every digit that PostgreSQL 15 to
18 gives (``numeric_stddev_internal``). Of double precision PostgreSQL keeps the sums of squared
distances (Youngs and Cramer); two of them combine by the formula of its own parallel aggregates
(``float8_combine``, ``float8_regr_combine``), so that the last digits hang on which rows came
together, as they do there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.numeric import divide, multiply, square_root, subtract

_NAN = Decimal("NaN")


@dataclass(frozen=True, slots=True)
class Moments:
    """What is known of pairs of floats: count, sums, and sums of products of distances.

    For the variance of one variable only ``n``, ``x`` and ``xx`` are in use.
    """

    n: int
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    yy: float = 0.0
    xy: float = 0.0


def combined(left: Moments, right: Moments) -> Moments:
    """Return the moments of the rows of both.

    Raises:
        CrossShardRefused: finite values pass the range of double precision, as in PostgreSQL.
    """
    if left.n == 0:
        return right
    if right.n == 0:
        return left
    n = left.n + right.n
    weight = left.n * right.n
    x = left.x / left.n - right.x / right.n
    y = left.y / left.n - right.y / right.n
    found = Moments(
        n,
        left.x + right.x,
        left.xx + right.xx + weight * x * x / n,
        left.y + right.y,
        left.yy + right.yy + weight * y * y / n,
        left.xy + right.xy + weight * x * y / n,
    )
    for name in ("x", "xx", "y", "yy", "xy"):
        parts = (getattr(left, name), getattr(right, name))
        if math.isinf(getattr(found, name)) and not any(map(math.isinf, parts)):
            raise CrossShardRefused("variance", "value out of range: overflow of double precision")
    return found


def exact_variance(total: Decimal, count: int, squares: Decimal, *, sample: bool) -> Decimal | None:
    """Return the variance of numerics from their sum, their number and the sum of their squares."""
    if count < (2 if sample else 1):
        return None
    if not (total.is_finite() and squares.is_finite()):
        return _NAN
    spread = subtract(multiply(Decimal(count), squares), multiply(total, total))
    if spread <= 0:
        return Decimal(0)
    return divide(spread, count * (count - 1 if sample else count))


def exact_deviation(
    total: Decimal, count: int, squares: Decimal, *, sample: bool
) -> Decimal | None:
    """Return the square root of :func:`exact_variance`, rounded at the variance's scale."""
    variance = exact_variance(total, count, squares, sample=sample)
    if not variance or variance.is_nan():
        return variance
    return square_root(variance)


def float_variance(of: Moments, *, sample: bool) -> float | None:
    """Return the variance of doubles."""
    if of.n < (2 if sample else 1):
        return None
    return of.xx / (of.n - 1 if sample else of.n)


def float_deviation(of: Moments, *, sample: bool) -> float | None:
    """Return the standard deviation of doubles."""
    variance = float_variance(of, sample=sample)
    return None if variance is None else math.sqrt(variance)


def covariance(of: Moments, *, sample: bool) -> float | None:
    """Return what ``covar_samp`` or ``covar_pop`` gives."""
    if of.n < (2 if sample else 1):
        return None
    return of.xy / (of.n - 1 if sample else of.n)


def correlation(of: Moments) -> float | None:
    """Return what ``corr`` gives: NULL where one of the variables does not vary."""
    if of.n < 1 or of.xx == 0 or of.yy == 0:
        return None
    return of.xy / math.sqrt(of.xx * of.yy)


def determination(of: Moments) -> float | None:
    """Return what ``regr_r2`` gives."""
    if of.n < 1 or of.xx == 0:
        return None
    return 1.0 if of.yy == 0 else (of.xy * of.xy) / (of.xx * of.yy)


def slope(of: Moments) -> float | None:
    """Return what ``regr_slope`` gives."""
    return None if of.n < 1 or of.xx == 0 else of.xy / of.xx


def intercept(of: Moments) -> float | None:
    """Return what ``regr_intercept`` gives."""
    return None if of.n < 1 or of.xx == 0 else (of.y - of.x * of.xy / of.xx) / of.n
