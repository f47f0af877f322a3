"""What clients were told, what servers have, and what must never be among that. Pure.

A *reign* is (epoch, timeline): the server itself writes both into each row, with its own name. A
switchover may lose nothing that was acknowledged, a failover with a synchronous quorum neither;
another failover no more than the bytes that it has said before.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

Key = tuple[str, int]
"""Of a write: who wrote it, and which of his it was."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the server that took a write has written into the row."""

    node: str
    epoch: int
    timeline: int

    @property
    def reign(self) -> tuple[int, int]:
        return self.epoch, self.timeline


@dataclass(frozen=True, slots=True)
class Ack:
    """A write that was acknowledged.

    Attributes:
        sent, answered: by a clock that all processes of this machine share.
        lsn: of the session's token; 0 of a client without one, that knows nothing of sqlroute.
    """

    writer: str
    number: int
    stamp: Stamp
    sent: float
    answered: float
    lsn: int = 0

    @property
    def key(self) -> Key:
        return self.writer, self.number


@dataclass(frozen=True, slots=True)
class Failure:
    """A write or a read that brought an error; a write may be there or not."""

    client: str
    what: str
    error: str
    sent: float
    ended: float


@dataclass(frozen=True, slots=True)
class Read:
    """A read of the newest number of a writer, under a token that covers ``at_least``."""

    reader: str
    writer: str
    at_least: int
    found: int
    token: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the primary has it in the end."""

    writer: str
    number: int
    stamp: Stamp

    @property
    def key(self) -> Key:
        return self.writer, self.number


@dataclass(frozen=True, slots=True)
class Passage:
    """The change from one timeline to the next, as the command has reported it.

    Attributes:
        epoch: that it has begun.
        is_held: a switchover: routers write nothing until the epoch has begun. After a failover
            they use a new primary as soon as they see it, before its journal names the epoch; the
            timeline tells these writes from those of the old one.
        is_lossless: a switchover, or a failover that a synchronous quorum proves.
        kept: the position of a failover's candidate when it was chosen.
        known_bytes: what it said may be lost; ``None`` if it said that nobody knows.
    """

    timeline: int
    epoch: int = 0
    is_held: bool = True
    is_lossless: bool = True
    kept: int = 0
    known_bytes: int | None = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A node in the end.

    Attributes:
        epoch: of the newest row of the journal that it has.
        timeline: it writes, or receives.
    """

    name: str
    is_primary: bool
    epoch: int
    timeline: int


@dataclass(frozen=True, slots=True)
class Interruption:
    """A command that was killed, and what came of it.

    Attributes:
        way: how it was ended: ``resumed``, ``aborted``, ``nothing to do``; empty if nothing helped.
    """

    operation: str
    step: str
    way: str


@dataclass(frozen=True, slots=True)
class History:
    """All that one check looks at.

    Attributes:
        strangers: writers that do not go through routers; of them only what was acknowledged counts
            against a lossless passage, and nobody holds them back before the epoch is announced.
    """

    acks: tuple[Ack, ...] = ()
    rows: tuple[Row, ...] = ()
    reads: tuple[Read, ...] = ()
    passages: tuple[Passage, ...] = ()
    places: tuple[Place, ...] = ()
    interruptions: tuple[Interruption, ...] = ()
    strangers: frozenset[str] = field(default_factory=frozenset)


def lost(history: History) -> tuple[Ack, ...]:
    """Return the acknowledged writes that are not there."""
    there = {row.key for row in history.rows}
    return tuple(ack for ack in history.acks if ack.key not in there)


def faults(history: History) -> Iterator[str]:
    """Yield each breach of an invariant, one line each."""
    yield from _losses(history)
    yield from _doubles(history)
    yield from _shared_reigns(history)
    yield from _late_reigns(history)
    yield from _stale_reads(history)
    yield from _strays(history)
    yield from _unfinished(history)


def longest_gap(acks: Iterable[Ack], began: float, ended: float) -> float:
    """Return the longest time between two acknowledgements, of all writers, in a window.

    The window's ends count as acknowledgements: a gap that never closed is seen, too.
    """
    inside = sorted(ack.answered for ack in acks if began <= ack.answered <= ended)
    times = [began, *inside, ended]
    return max(after - before for before, after in itertools.pairwise(times))


def _losses(history: History) -> Iterator[str]:
    passages = sorted(history.passages, key=lambda passage: passage.timeline)
    for ack in lost(history):
        left = next((p for p in passages if p.timeline > ack.stamp.timeline), None)
        if left is None:
            yield f"lost without any promotion: {ack}"
        elif left.is_lossless:
            yield f"lost in a promotion that may lose nothing ({left}): {ack}"
        elif left.known_bytes is not None and ack.writer not in history.strangers:
            missing = ack.lsn - left.kept
            if missing > left.known_bytes:
                yield f"lost beyond what was said ({missing} bytes of {left}): {ack}"


def _doubles(history: History) -> Iterator[str]:
    for key, count in Counter(row.key for row in history.rows).items():
        if count > 1:
            yield f"stored {count} times: {key}"


def _shared_reigns(history: History) -> Iterator[str]:
    early = {p.timeline: p.epoch for p in history.passages if not p.is_held}
    nodes: dict[tuple[int, ...], set[str]] = defaultdict(set)
    stamps = [(ack.writer, ack.stamp) for ack in history.acks]
    stamps += [(row.writer, row.stamp) for row in history.rows]
    for writer, stamp in stamps:
        nodes[stamp.reign].add(stamp.node)
        is_announced = stamp.epoch >= early.get(stamp.timeline, 0)
        if is_announced and writer not in history.strangers:
            nodes[stamp.epoch,].add(stamp.node)
    for reign, names in nodes.items():
        if len(names) > 1:
            yield f"two nodes took writes in epoch {reign[0]}: {', '.join(sorted(names))}"


def _late_reigns(history: History) -> Iterator[str]:
    """Yield writes that were sent after a newer reign had answered, and taken by an older one."""
    newest: tuple[tuple[int, int], float] = ((0, 0), 0.0)
    first: dict[tuple[int, int], Ack] = {}
    for ack in sorted(history.acks, key=lambda ack: ack.answered):
        first.setdefault(ack.stamp.reign, ack)
    begun = sorted(first.values(), key=lambda ack: ack.answered)
    for ack in sorted(history.acks, key=lambda ack: ack.sent):
        while begun and begun[0].answered < ack.sent:
            newest = max(newest, (begun[0].stamp.reign, begun[0].answered))
            begun.pop(0)
        if ack.stamp.reign < newest[0]:
            yield f"taken by an old reign after {newest[0]} had answered: {ack}"


def _stale_reads(history: History) -> Iterator[str]:
    for read in history.reads:
        if read.found < read.at_least:
            yield f"read before its token: {read}"


def _strays(history: History) -> Iterator[str]:
    """Yield what is wrong with the nodes in the end."""
    if not history.places:
        return
    primaries = [place for place in history.places if place.is_primary]
    if len(primaries) != 1:
        names = ", ".join(place.name for place in primaries) or "none"
        yield f"not one primary: {names}"
        return
    (primary,) = primaries
    for place in history.places:
        if place.timeline != primary.timeline:
            yield f"{place.name} is on timeline {place.timeline}, not {primary.timeline}"
        if place.epoch != primary.epoch:
            yield f"{place.name} has replayed the journal up to {place.epoch}, not {primary.epoch}"


def _unfinished(history: History) -> Iterator[str]:
    for found in history.interruptions:
        if not found.way:
            yield f"neither resumed nor rolled back: {found}"
