"""Merge the answers of several shards into the one answer a single PostgreSQL would give.

It takes one iterable of rows per shard and a :class:`MergeSpec`, and gives an iterator of visible
rows: a k-way merge for ORDER BY, hash aggregation for aggregates and GROUP BY, else one shard
after the other; then OFFSET and LIMIT. It reads no more rows than it needs, holds one row per shard
(or one per group), does no I/O itself and closes nothing: the iterables belong to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from heapq import merge as merge_sorted
from itertools import chain, islice
from typing import Any, TypeAlias

from sqlroute.routing.numeric import add, add_as_sum, average
from sqlroute.routing.ordering import Encode, Family, RowKey, SortTerm, encoder, row_key

Row: TypeAlias = Sequence[Any]
State: TypeAlias = list[Any]


class AggregateKind(Enum):
    """The aggregates whose parts can be combined exactly."""

    COUNT = "count"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    AVG = "avg"


_WORDS = {
    AggregateKind.COUNT: "sum of partial counts",
    AggregateKind.SUM: "sum of partial sums",
    AggregateKind.MIN: "least of partial minima",
    AggregateKind.MAX: "greatest of partial maxima",
    AggregateKind.AVG: "partial sums divided by partial counts",
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
        column: visible column of the result; ``None`` when it is only sorted by.
        value: column of the part as psycopg loaded it (for avg: the partial sum); after the
            merge it holds the result before ``conversion``, which is what ORDER BY compares.
        count: for avg, the column of the partial count.
        family: for min and max, how the values compare.
        conversion: from ``value`` to the visible result; ``None`` for as it is.
        text: the aggregate, for people.
    """

    kind: AggregateKind
    column: int | None
    value: int
    count: int | None
    family: Family
    conversion: Conversion | None
    text: str

    def __str__(self) -> str:
        return f"{self.text}: {_WORDS[self.kind]}"


@dataclass(frozen=True, slots=True)
class GroupKey:
    """One expression of GROUP BY: the column of its value as psycopg loaded it."""

    column: int
    family: Family
    text: str


@dataclass(frozen=True, slots=True)
class Grouping:
    """GROUP BY and aggregates; without keys there is exactly one group."""

    keys: tuple[GroupKey, ...]
    aggregates: tuple[Aggregate, ...]


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the rows of the shards become the rows of the answer.

    Attributes:
        hidden: how many columns at the end of each row are not the caller's.
        order: empty for no order.
        grouping: ``None`` for plain rows.
        limit: of the answer; ``None`` for all.
        offset: of the answer.
        pushed: LIMIT that each shard was sent, if any.
        entities: rows carry entities with joined eager collections: each part must have been made
            unique (``Result.unique()``) before it comes here, else LIMIT would count joined rows.
    """

    hidden: int = 0
    order: tuple[SortTerm, ...] = ()
    grouping: Grouping | None = None
    limit: int | None = None
    offset: int = 0
    pushed: int | None = None
    entities: bool = False

    def describe(self) -> tuple[str, ...]:
        """Return the steps of the merge as words, in the order in which they happen."""
        return (*describe_steps(self.grouping, self.order), *self._describe_limit())

    def _describe_limit(self) -> tuple[str, ...]:
        words = [] if self.limit is None else [f"limit {self.limit}"]
        words += [f"offset {self.offset}"] if self.offset else []
        if not words:
            return ()
        shard = (
            "all rows of each shard" if self.pushed is None else f"limit {self.pushed} per shard"
        )
        return (f"{' '.join(words)} after merge; {shard}",)


def describe_steps(grouping: Grouping | None, order: tuple[SortTerm, ...]) -> tuple[str, ...]:
    """Return the steps before LIMIT as words."""
    steps: list[str] = []
    if grouping is not None:
        if grouping.keys:
            steps.append("group by " + ", ".join(key.text for key in grouping.keys))
        steps.extend(map(str, grouping.aggregates))
    if order:
        steps.append("order by " + ", ".join(map(str, order)))
    return tuple(steps) or ("shard after shard",)


def merge(parts: Sequence[Iterable[Row]], spec: MergeSpec) -> Iterator[Row]:
    """Return the visible rows of the answer, as an iterator that reads the parts as it goes.

    Args:
        parts: the rows of each shard, visible then hidden columns; sorted by the shard as
            ``spec.order`` says when there is no grouping. Ties come in the order of the parts.
        spec: from :func:`sqlroute.routing.rewrite.rewritten`.

    Raises:
        CrossShardRefused: while iterating, where PostgreSQL would raise an overflow.
    """
    if spec.limit == 0:
        return iter(())
    rows: Iterable[Row]
    if spec.grouping is not None:
        rows = _grouped(parts, spec.grouping, spec.order)
    elif spec.order:
        rows = merge_sorted(*parts, key=row_key(spec.order))
    else:
        rows = chain.from_iterable(parts)
    if spec.limit is not None or spec.offset:
        stop = None if spec.limit is None else spec.offset + spec.limit
        rows = islice(rows, spec.offset, stop)
    return _visible(rows, spec.hidden) if spec.hidden else iter(rows)


def _visible(rows: Iterable[Row], hidden: int) -> Iterator[Row]:
    for row in rows:
        yield row[:-hidden]


def _grouped(
    parts: Sequence[Iterable[Row]], grouping: Grouping, order: tuple[SortTerm, ...]
) -> Iterator[Row]:
    states = list(_combined(parts, grouping).values())
    for aggregate in grouping.aggregates:
        _finish(aggregate, states)
    if order:
        states.sort(key=row_key(order))
    for state in states:
        yield tuple(state)


def _combined(parts: Sequence[Iterable[Row]], grouping: Grouping) -> dict[Any, State]:
    """Combine the rows of each group; what is no aggregate stays as the first shard sent it."""
    key_of = _group_key(grouping.keys)
    combiners = [_combiner(aggregate) for aggregate in grouping.aggregates]
    states: dict[Any, State] = {}
    for row in chain.from_iterable(parts):
        key = key_of(row)
        state = states.get(key)
        if state is None:
            states[key] = list(row)
            continue
        for combine in combiners:
            combine(state, row)
    return states


def _group_key(keys: tuple[GroupKey, ...]) -> RowKey:
    encoders = [(key.column, encoder(key.family)) for key in keys]
    return lambda row: tuple([encode(row[column]) for column, encode in encoders])


def _combiner(aggregate: Aggregate) -> Callable[[State, Row], None]:
    """Return the function that takes a row of another shard into the state of its group."""
    if aggregate.kind in (AggregateKind.MIN, AggregateKind.MAX):
        return _extreme(aggregate, encoder(aggregate.family))
    if aggregate.count is None:
        return _summed(aggregate.value, add_as_sum)
    # The partial sums of avg may pass the range of bigint, as they may inside PostgreSQL.
    total, count = _summed(aggregate.value, add), _summed(aggregate.count, add)

    def combine(state: State, row: Row) -> None:
        total(state, row)
        count(state, row)

    return combine


def _summed(column: int, plus: Callable[[Any, Any], Any]) -> Callable[[State, Row], None]:
    def combine(state: State, row: Row) -> None:
        if row[column] is not None:
            mine = state[column]
            state[column] = row[column] if mine is None else plus(mine, row[column])

    return combine


def _extreme(aggregate: Aggregate, encode: Encode) -> Callable[[State, Row], None]:
    value, visible = aggregate.value, aggregate.column
    greatest = aggregate.kind is AggregateKind.MAX

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


def _finish(aggregate: Aggregate, states: list[State]) -> None:
    """Turn the combined parts of one aggregate into its result, in every group."""
    if aggregate.kind in (AggregateKind.MIN, AggregateKind.MAX):
        return
    for state in states:
        value = state[aggregate.value]
        if aggregate.count is not None and value is not None:
            value = state[aggregate.value] = average(value, state[aggregate.count])
        if aggregate.column is not None:
            convert = aggregate.conversion
            state[aggregate.column] = value if convert is None else convert(value)
