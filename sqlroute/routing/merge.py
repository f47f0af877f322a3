"""Merge the answers of several shards into the one answer a single PostgreSQL would give.

It takes one iterable of rows per shard and a :class:`MergeSpec`, and gives an iterator of visible
rows: a k-way merge for ORDER BY, hash aggregation for aggregates and GROUP BY, else one shard
after the other; then HAVING, DISTINCT, OFFSET and LIMIT. It reads no more rows of a shard than the
answer may need, holds a block of rows per shard (or one per group, or per distinct row of one place
in the order), does no I/O itself and closes nothing: the iterables belong to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from operator import itemgetter
from typing import Any

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.combining import Aggregate, Conversion, Row, State, combiner, finisher
from sqlroute.routing.expressions import Term, Values, evaluate
from sqlroute.routing.interleaving import BLOCK, Read, in_order
from sqlroute.routing.ordering import Family, RowKey, SortTerm, block_key, encoder, row_key


@dataclass(frozen=True, slots=True)
class GroupKey:
    """One expression that rows are told apart by: the column of its value as psycopg loaded it."""

    column: int
    family: Family
    text: str


@dataclass(frozen=True, slots=True)
class Computed:
    """A column that is computed of merged aggregates.

    Attributes:
        column: where the value goes; one of the shards' own values stands there.
        conversion: to the visible result; ``None`` for as it is.
        text: the expression, for people.
    """

    column: int
    term: Term
    conversion: Conversion | None
    text: str


@dataclass(frozen=True, slots=True)
class Grouping:
    """GROUP BY and aggregates; without keys there is exactly one group.

    Attributes:
        computed: columns made of the aggregates, after them.
        having: what groups must fulfil, and its text.
    """

    keys: tuple[GroupKey, ...]
    aggregates: tuple[Aggregate, ...]
    computed: tuple[Computed, ...] = ()
    having: tuple[tuple[Term, str], ...] = ()


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """How the rows of the shards become the rows of the answer.

    Attributes:
        hidden: how many columns at the end of each row are not the caller's.
        order: empty for no order.
        grouping: ``None`` for plain rows.
        distinct: of rows that agree in these columns the first is kept; ``None`` keeps all.
        alike: columns that have one value on all shards, with what a difference would mean.
        limit: of the answer; ``None`` for all.
        offset: of the answer.
        ties: rows that tie with the last one within the limit are kept.
        pushed: LIMIT that each shard was sent, if any.
        entities: rows carry entities with joined eager collections: each part must have been made
            unique (``Result.unique()``) before it comes here, else LIMIT would count joined rows.
        values: of the bind parameters in terms over aggregates.
    """

    hidden: int = 0
    order: tuple[SortTerm, ...] = ()
    grouping: Grouping | None = None
    distinct: tuple[GroupKey, ...] | None = None
    alike: tuple[tuple[int, str], ...] = ()
    limit: int | None = None
    offset: int = 0
    ties: bool = False
    pushed: int | None = None
    entities: bool = False
    values: tuple[Any, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """Return the steps of the merge as words, in the order in which they happen."""
        steps = describe_steps(self.grouping, self.order, self.distinct)
        return (*steps, *self._describe_limit())

    def _describe_limit(self) -> tuple[str, ...]:
        words = [] if self.limit is None else [f"limit {self.limit}"]
        words += ["with ties"] if self.ties else []
        words += [f"offset {self.offset}"] if self.offset else []
        if not words:
            return ()
        shard = (
            "all rows of each shard" if self.pushed is None else f"limit {self.pushed} per shard"
        )
        return (f"{' '.join(words)} after merge; {shard}",)


def describe_steps(
    grouping: Grouping | None,
    order: tuple[SortTerm, ...],
    distinct: tuple[GroupKey, ...] | None = None,
) -> tuple[str, ...]:
    """Return the steps before LIMIT as words."""
    steps: list[str] = []
    if grouping is not None:
        if grouping.keys:
            steps.append("group by " + ", ".join(key.text for key in grouping.keys))
        steps.extend(map(str, grouping.aggregates))
        steps.extend(f"{computed.text} of the merged aggregates" for computed in grouping.computed)
        steps.extend(f"having {text}" for _, text in grouping.having)
    if order:
        steps.append("order by " + ", ".join(map(str, order)))
    if distinct is not None:
        steps.append("distinct " + ", ".join(key.text for key in distinct))
    return tuple(steps) or ("shard after shard",)


def merge(
    parts: Sequence[Iterable[Row]],
    spec: MergeSpec,
    block: int = BLOCK,
    read: Read | None = None,
) -> Iterator[Row]:
    """Return the visible rows of the answer, as an iterator that reads the parts as it goes.

    Args:
        parts: the rows of each shard, visible then hidden columns; sorted by the shard as
            ``spec.order`` says when there is no grouping. Ties come in the order of the parts.
        spec: from :func:`sqlroute.routing.rewrite.rewritten`.
        block: rows that are read of each shard at a time.
        read: reads them, where rows come in order.

    Raises:
        CrossShardRefused: while iterating, where PostgreSQL would raise an overflow, or where the
            shards turn out not to be alike.
    """
    if spec.limit == 0:
        return iter(())
    for column, meaning in spec.alike:
        seen: list[Any] = []
        parts = [_alike(part, column, meaning, seen) for part in parts]
    stop = None if spec.limit is None else spec.offset + spec.limit
    rows: Iterable[Row]
    if spec.grouping is not None:
        rows = _grouped(parts, spec.grouping, spec.order, spec.values)
    elif spec.order:
        block = block if stop is None else min(block, stop)
        rows = in_order(parts, block_key(spec.order), block, read)
    else:
        rows = chain.from_iterable(parts)
    if spec.distinct is not None:
        rows = _distinct(rows, spec.distinct, spec.order)
    if spec.limit is not None or spec.offset:
        if spec.ties and stop is not None:
            rows = _with_ties(rows, stop, row_key(spec.order))
            stop = None
        rows = islice(rows, spec.offset, stop)
    return map(itemgetter(slice(-spec.hidden)), rows) if spec.hidden else iter(rows)


def _alike(part: Iterable[Row], column: int, meaning: str, seen: list[Any]) -> Iterator[Row]:
    """Check the first row of a part against those of the others."""
    for number, row in enumerate(part):
        if number == 0:
            seen.append(row[column])
            if row[column] != seen[0]:
                raise CrossShardRefused("ORDER BY", f"{meaning}; bring the shards to one schema")
        yield row


def _distinct(
    rows: Iterable[Row], keys: tuple[GroupKey, ...], order: tuple[SortTerm, ...]
) -> Iterator[Row]:
    """Keep the first of equal rows.

    Equal rows have equal places in the order, as far as that is by what is compared: only the
    rows of one such place are remembered.
    """
    columns = {key.column for key in keys}
    leading = tuple(takewhile(lambda term: term.column in columns, order))
    place_of = row_key(leading) if leading else None
    key_of = _key_of(keys)
    place: Any = None
    seen: set[Any] = set()
    for row in rows:
        if place_of is not None and (found := place_of(row)) != place:
            place = found
            seen.clear()
        key = key_of(row)
        if key not in seen:
            seen.add(key)
            yield row


def _with_ties(rows: Iterable[Row], stop: int, key: RowKey) -> Iterator[Row]:
    iterator = iter(rows)
    last: Row | None = None
    for last in islice(iterator, stop):
        yield last
    if last is not None:
        place = key(last)
        yield from takewhile(lambda row: key(row) == place, iterator)


def _grouped(
    parts: Sequence[Iterable[Row]],
    grouping: Grouping,
    order: tuple[SortTerm, ...],
    values: Values,
) -> Iterator[Row]:
    states = list(_combined(parts, grouping).values())
    for aggregate in grouping.aggregates:
        _finish(aggregate, states)
    terms = [term for term, _ in grouping.having]
    states = [
        state for state in states if all(evaluate(term, state, values) is True for term in terms)
    ]
    for state in states:
        _compute(grouping.computed, state, values)
    if order:
        states.sort(key=row_key(order))
    for aggregate in grouping.aggregates:
        _show(aggregate, states)
    for state in states:
        yield tuple(state)


def _combined(parts: Sequence[Iterable[Row]], grouping: Grouping) -> dict[Any, State]:
    """Combine the rows of each group; what is no aggregate stays as the first shard sent it."""
    key_of = _key_of(grouping.keys)
    combiners = [combiner(aggregate) for aggregate in grouping.aggregates]
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


def _key_of(keys: tuple[GroupKey, ...]) -> RowKey:
    encoders = [(key.column, encoder(key.family)) for key in keys]
    return lambda row: tuple([encode(row[column]) for column, encode in encoders])


def _finish(aggregate: Aggregate, states: list[State]) -> None:
    """Turn the combined parts of one aggregate into its result, in every group."""
    finish = finisher(aggregate)
    if finish is not None:
        for state in states:
            state[aggregate.value] = finish(state)


def _compute(computed: tuple[Computed, ...], state: State, values: Values) -> None:
    found = [evaluate(one.term, state, values) for one in computed]
    for one, value in zip(computed, found, strict=True):
        state[one.column] = value if one.conversion is None else one.conversion(value)


def _show(aggregate: Aggregate, states: list[State]) -> None:
    """Put a result in its visible column, after everything that compares it as it is stored."""
    column, convert = aggregate.column, aggregate.conversion
    if column is None or aggregate.is_shown:
        return
    for state in states:
        value = state[aggregate.value]
        state[column] = value if convert is None else convert(value)
