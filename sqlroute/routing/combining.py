"""Combine the partial results of an aggregate, one per shard, into PostgreSQL's own result.

A *state* is the list of columns of one group while it is merged; each aggregate owns some columns
of it, its parts. Pure functions of states and rows: what the shards are asked for is decided in
:mod:`sqlroute.routing.aggregates`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

from sqlroute.errors import CrossShardRefused
from sqlroute.routing import moments
from sqlroute.routing.moments import Moments
from sqlroute.routing.numeric import add, add_as_sum, average
from sqlroute.routing.ordering import Family, SortTerm, encoder, row_key

Row: TypeAlias = Sequence[Any]
State: TypeAlias = list[Any]
Combine: TypeAlias = Callable[[State, Row], None]


class AggregateKind(Enum):
    """The aggregates whose parts can be combined. The value is PostgreSQL's name."""

    COUNT = "count"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    AVG = "avg"
    BOOL_AND = "bool_and"
    BOOL_OR = "bool_or"
    BIT_AND = "bit_and"
    BIT_OR = "bit_or"
    BIT_XOR = "bit_xor"
    VAR_POP = "var_pop"
    VAR_SAMP = "var_samp"
    STDDEV_POP = "stddev_pop"
    STDDEV_SAMP = "stddev_samp"
    COVAR_POP = "covar_pop"
    COVAR_SAMP = "covar_samp"
    CORR = "corr"
    REGR_COUNT = "regr_count"
    REGR_AVGX = "regr_avgx"
    REGR_AVGY = "regr_avgy"
    REGR_SXX = "regr_sxx"
    REGR_SYY = "regr_syy"
    REGR_SXY = "regr_sxy"
    REGR_R2 = "regr_r2"
    REGR_SLOPE = "regr_slope"
    REGR_INTERCEPT = "regr_intercept"
    ARRAY_AGG = "array_agg"
    STRING_AGG = "string_agg"
    JSON_AGG = "json_agg"
    JSON_OBJECT_AGG = "json_object_agg"
    JSONB_OBJECT_AGG = "jsonb_object_agg"


_KIND = AggregateKind

SPREADS = frozenset({_KIND.VAR_POP, _KIND.VAR_SAMP, _KIND.STDDEV_POP, _KIND.STDDEV_SAMP})
"""Of one variable, by its sum and the sum of its squares."""

REGRESSIONS = frozenset(
    kind
    for kind in _KIND
    if kind.value.startswith(("covar", "corr", "regr")) and kind.value != "regr_count"
)
"""Of two variables, in double precision."""

OBJECTS = frozenset({_KIND.JSON_OBJECT_AGG, _KIND.JSONB_OBJECT_AGG})
"""Those that make an object of two lists."""

LISTS = frozenset({_KIND.ARRAY_AGG, _KIND.STRING_AGG, _KIND.JSON_AGG, *OBJECTS})
"""Those that keep every value."""

_WORDS = {
    _KIND.COUNT: "sum of partial counts",
    _KIND.REGR_COUNT: "sum of partial counts",
    _KIND.SUM: "sum of partial sums",
    _KIND.MIN: "least of partial minima",
    _KIND.MAX: "greatest of partial maxima",
    _KIND.AVG: "partial sums divided by partial counts",
    _KIND.BOOL_AND: "all of the parts",
    _KIND.BOOL_OR: "any of the parts",
    _KIND.BIT_AND: "bits of all parts",
    _KIND.BIT_OR: "bits of any part",
    _KIND.BIT_XOR: "bits of an odd number of parts",
    **dict.fromkeys(SPREADS, "from partial counts, sums and sums of squares"),
    **dict.fromkeys(REGRESSIONS, "from partial counts, sums and sums of products"),
    **dict.fromkeys(LISTS, "partial lists merged"),
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What SQLAlchemy's type does to a number that psycopg loaded.

    Attributes:
        decimals: ``None`` makes a float of everything; else floats become Decimals so rounded.
    """

    decimals: int | None

    def __call__(self, value: Any) -> Any:
        if value is None:
            return None
        if self.decimals is None:
            return float(value)
        return Decimal(f"{value:.{self.decimals}f}") if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One aggregate and the columns of its parts.

    Attributes:
        column: visible column of the result; ``None`` when it is only sorted or filtered by.
        parts: columns of the parts as psycopg loaded them; after the merge the first holds the
            result before ``conversion``, which is what ORDER BY and HAVING compare.
        family: how the values compare (min, max) or of what they are (variances: a number that is
            exact or a float).
        conversion: to the visible result; ``None`` for as it is.
        text: the aggregate, for people.
        order: of the values of a list; the column of a term is a list too, of its sort values.
        is_float: a variance of doubles; others are exact.
    """

    kind: AggregateKind
    column: int | None
    parts: tuple[int, ...]
    family: Family
    conversion: Conversion | None
    text: str
    order: tuple[SortTerm, ...] = ()
    is_float: bool = False

    def __str__(self) -> str:
        order = f" in the order of {', '.join(map(str, self.order))}" if self.order else ""
        return f"{self.text}: {_WORDS[self.kind]}{order}"

    @property
    def value(self) -> int:
        """The column that holds the result after the merge."""
        return self.parts[0]

    @property
    def is_shown(self) -> bool:
        """The visible column has been kept up to date: of min and max, which choose a row's."""
        return self.kind in (_KIND.MIN, _KIND.MAX)


def combiner(aggregate: Aggregate) -> Combine:
    """Return the function that takes a row of another shard into the state of its group."""
    kind, parts = aggregate.kind, aggregate.parts
    if kind in (_KIND.MIN, _KIND.MAX):
        return _extreme(aggregate)
    if kind in (_KIND.COUNT, _KIND.REGR_COUNT, _KIND.SUM):
        return _folded(parts, add_as_sum)
    if kind in _BITS:
        return _folded(parts, _BITS[kind])
    if kind in LISTS:
        return _extended(aggregate)
    if kind in REGRESSIONS or aggregate.is_float:
        return _moving(aggregate)
    # Partial sums of avg and variances may pass the range of bigint, as inside PostgreSQL.
    return _folded(parts, add)


def finisher(aggregate: Aggregate) -> Callable[[State], Any] | None:
    """Return the function from combined parts to the result; ``None`` where it is there."""
    kind = aggregate.kind
    if kind is _KIND.AVG:
        return _average(aggregate.parts)
    if kind in _LISTED:
        return _listed(aggregate)
    if kind in SPREADS and not aggregate.is_float:
        return _exact_spread(aggregate)
    if kind in _OF_MOMENTS:
        return _of_moments(aggregate)
    return None


_BITS: dict[AggregateKind, Callable[[Any, Any], Any]] = {
    _KIND.BOOL_AND: lambda mine, theirs: mine and theirs,
    _KIND.BOOL_OR: lambda mine, theirs: mine or theirs,
    _KIND.BIT_AND: lambda mine, theirs: mine & theirs,
    _KIND.BIT_OR: lambda mine, theirs: mine | theirs,
    _KIND.BIT_XOR: lambda mine, theirs: mine ^ theirs,
}


def _folded(columns: tuple[int, ...], fold: Callable[[Any, Any], Any]) -> Combine:
    """Fold column by column; NULL is the part of a shard without a value."""

    def combine(state: State, row: Row) -> None:
        for column in columns:
            theirs = row[column]
            if theirs is not None:
                mine = state[column]
                state[column] = theirs if mine is None else fold(mine, theirs)

    return combine


def _extreme(aggregate: Aggregate) -> Combine:
    encode = encoder(aggregate.family)
    value, visible = aggregate.value, aggregate.column
    greatest = aggregate.kind is _KIND.MAX

    def combine(state: State, row: Row) -> None:
        if row[value] is None:
            return
        if state[value] is not None:
            mine, theirs = encode(state[value]), encode(row[value])
            if not (mine < theirs if greatest else theirs < mine):
                return
        state[value] = row[value]
        if visible is not None:
            state[visible] = row[visible]

    return combine


def _average(parts: tuple[int, ...]) -> Callable[[State], Any]:
    total, count = parts

    def finish(state: State) -> Any:
        return None if state[total] is None else average(state[total], state[count])

    return finish


# Lists: parts are (values, further values or the separator, sort values...), all lists but the
# separator, NULL where a shard has no row.


def _extended(aggregate: Aggregate) -> Combine:
    separators = aggregate.parts[1:2] if aggregate.kind is _KIND.STRING_AGG else ()
    lists = dict.fromkeys(aggregate.parts)  # the values may be what they are sorted by: once
    append = _folded(
        tuple(c for c in lists if c not in separators), lambda mine, theirs: [*mine, *theirs]
    )
    keep = _folded(separators, lambda mine, _: mine)

    def combine(state: State, row: Row) -> None:
        append(state, row)
        keep(state, row)

    return combine


def _listed(aggregate: Aggregate) -> Callable[[State], Any]:
    make = _LISTED[aggregate.kind]
    sorted_by = [term.column for term in aggregate.order]
    key = row_key([replace(term, column=index) for index, term in enumerate(aggregate.order)])
    values, *others = dict.fromkeys(aggregate.parts)
    others = [column for column in others if column not in sorted_by]

    def finish(state: State) -> Any:
        if state[values] is None:
            return None
        places: Sequence[int] = range(len(state[values]))
        if sorted_by:
            rows = list(zip(*(state[column] for column in sorted_by), strict=True))
            places = sorted(places, key=lambda place: key(rows[place]))  # stable: shard by shard
        return make([state[values][place] for place in places], places, state, others)

    return finish


def _joined(values: list[str], _: Any, state: State, others: list[int]) -> str:
    return (state[others[0]] or "").join(values)


def _object(keys: list[str], places: Sequence[int], state: State, others: list[int]) -> Any:
    values = state[others[0]]
    return {key: values[place] for key, place in zip(keys, places, strict=True)}


def _sorted_object(keys: list[str], places: Sequence[int], state: State, others: list[int]) -> Any:
    """Of jsonb the keys are ordered, by their length in bytes first; the last of equals stays."""
    found = _object(keys, places, state, others)
    encoded = sorted((key.encode() for key in found), key=lambda key: (len(key), key))
    return {key: found[key] for key in map(bytes.decode, encoded)}


_LISTED: dict[AggregateKind, Callable[..., Any]] = {
    _KIND.ARRAY_AGG: lambda values, *_: values,
    _KIND.JSON_AGG: lambda values, *_: values,
    _KIND.STRING_AGG: _joined,
    _KIND.JSON_OBJECT_AGG: _object,
    _KIND.JSONB_OBJECT_AGG: _sorted_object,
}


# Variances and regressions: exact ones have the parts (sum, count, sum of squares), those of
# floats (sum, count, sum of squared distances), regressions the six of Moments.


def _exact_spread(aggregate: Aggregate) -> Callable[[State], Any]:
    total, count, squares = aggregate.parts
    kind = aggregate.kind
    is_root = kind in (_KIND.STDDEV_POP, _KIND.STDDEV_SAMP)
    of = moments.exact_deviation if is_root else moments.exact_variance
    is_sample = kind in (_KIND.VAR_SAMP, _KIND.STDDEV_SAMP)

    def finish(state: State) -> Any:
        if state[total] is None:
            return None
        if isinstance(state[total], float):
            raise _misdeclared(aggregate, "double precision")
        values = (Decimal(state[total]), state[count], Decimal(state[squares]))
        return of(*values, sample=is_sample)

    return finish


def _misdeclared(aggregate: Aggregate, is_really: str) -> CrossShardRefused:
    return CrossShardRefused(
        f"{aggregate.kind.value}()",
        f"the argument of {aggregate.text} is {is_really} on the server, and declared otherwise; "
        "cast() it",
    )


def _moments_of(aggregate: Aggregate) -> Callable[[Row], Moments]:
    parts = aggregate.parts
    if aggregate.kind not in SPREADS:
        n, *sums = parts
        return lambda row: Moments(row[n] or 0, *(row[column] or 0.0 for column in sums))
    total, n, squares = parts

    def read(row: Row) -> Moments:
        if row[total] is not None and not isinstance(row[total], float):
            raise _misdeclared(aggregate, "not of double precision")
        return Moments(row[n], row[total] or 0.0, row[squares] or 0.0)

    return read


def _moving(aggregate: Aggregate) -> Combine:
    read = _moments_of(aggregate)
    parts = aggregate.parts

    def combine(state: State, row: Row) -> None:
        found = moments.combined(read(state), read(row))
        if aggregate.kind in SPREADS:
            values: tuple[Any, ...] = (found.x, found.n, found.xx)
        else:
            values = (found.n, found.x, found.xx, found.y, found.yy, found.xy)
        for column, value in zip(parts, values, strict=True):
            state[column] = value

    return combine


def _of_moments(aggregate: Aggregate) -> Callable[[State], Any]:
    read, of = _moments_of(aggregate), _OF_MOMENTS[aggregate.kind]
    return lambda state: of(read(state))


def _if_any(of: Callable[[Moments], float]) -> Callable[[Moments], float | None]:
    return lambda found: of(found) if found.n else None


_OF_MOMENTS: dict[AggregateKind, Callable[[Moments], float | None]] = {
    _KIND.VAR_POP: partial(moments.float_variance, sample=False),
    _KIND.VAR_SAMP: partial(moments.float_variance, sample=True),
    _KIND.STDDEV_POP: partial(moments.float_deviation, sample=False),
    _KIND.STDDEV_SAMP: partial(moments.float_deviation, sample=True),
    _KIND.COVAR_POP: partial(moments.covariance, sample=False),
    _KIND.COVAR_SAMP: partial(moments.covariance, sample=True),
    _KIND.CORR: moments.correlation,
    _KIND.REGR_R2: moments.determination,
    _KIND.REGR_SLOPE: moments.slope,
    _KIND.REGR_INTERCEPT: moments.intercept,
    _KIND.REGR_AVGX: _if_any(lambda found: found.x / found.n),
    _KIND.REGR_AVGY: _if_any(lambda found: found.y / found.n),
    _KIND.REGR_SXX: _if_any(lambda found: found.xx),
    _KIND.REGR_SYY: _if_any(lambda found: found.yy),
    _KIND.REGR_SXY: _if_any(lambda found: found.xy),
}
