"""What was read, and what should not have been."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import Any

from sqlroute import Router
from sqlroute.local.topology import LocalTopology

from .lagging import Lagging

Answered = Counter[str]
"""Reads answered, by node."""

WAITED = 0.02
"""A read that took longer has waited: for a replica, or for its turn on the machine."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A value that somebody has seen or written, and the token that covers it."""

    row: int
    value: int
    token: str


@dataclass(frozen=True, slots=True)
class Stale:
    """A read that found less than it must.

    Attributes:
        way: what kind of read.
        token: of the session, as text, before the read.
        where: what the session says of its node afterwards.
    """

    way: str
    row: int
    expected: int
    found: int | None
    token: str
    where: str = ""


@dataclass(slots=True)
class Tally:
    """What one thread has read. No lock: others only look.

    Attributes:
        reads: how many, by way.
        waits: of these, how many took longer than ``WAITED``.
        slowest: seconds.
        failures: what ended the thread, as text.
    """

    reads: Counter[str] = field(default_factory=Counter)
    stale: list[Stale] = field(default_factory=list)
    waits: int = 0
    slowest: float = 0.0
    writes: int = 0
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.waits += spent > WAITED
        self.slowest = max(self.slowest, spent)

    def check(self, way: str, seen: Seen, found: int | None, session: Any, statement: Any) -> None:
        """Count a read, and keep it as evidence when it found less than it must."""
        self.reads[way] += 1
        if found is not None and found >= seen.value:
            return
        try:
            where = str(session.explain(statement).target)
        except Exception as error:  # the evidence counts, not where it is from
            where = repr(error)
        self.stale.append(Stale(way, seen.row, seen.value, found, seen.token, where))

    @classmethod
    def total(cls, tallies: Iterable[Tally]) -> Tally:
        found = cls()
        for one in tallies:
            found.reads += one.reads
            found.stale += one.stale
            found.waits += one.waits
            found.slowest = max(found.slowest, one.slowest)
            found.writes += one.writes
            found.failures += one.failures
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process has read, and which nodes have answered it."""

    tally: Tally
    answered: Answered


@dataclass(frozen=True, slots=True)
class Report:
    """What a scenario has found.

    Attributes:
        answered: how many reads each node has answered.
        primary: the node that is the primary.
        lags: seconds that replicas were behind, at moments all through the run.
        seconds: how long it took.
    """

    name: str
    tally: Tally
    answered: Answered
    primary: str
    lags: tuple[float, ...]
    pauses: int
    seconds: float

    @classmethod
    def of(
        cls,
        name: str,
        topology: LocalTopology,
        outcomes: Iterable[Outcome],
        lag: Lagging,
        seconds: float,
    ) -> Report:
        outcomes = list(outcomes)
        tally = Tally.total(outcome.tally for outcome in outcomes)
        answered = sum((outcome.answered for outcome in outcomes), Answered())
        primary = topology.nodes[0].name
        return cls(name, tally, answered, primary, tuple(lag.lags), lag.pauses, seconds)

    @property
    def reads(self) -> int:
        return self.tally.reads.total()

    @property
    def share_of_replicas(self) -> float:
        """Share of the reads that replicas have answered."""
        total = sum(self.answered.values())
        return 1 - self.answered[self.primary] / total if total else 0.0

    @property
    def share_behind(self) -> float:
        """Share of the moments at which a replica missed a commit that had returned."""
        return sum(lag > 0 for lag in self.lags) / len(self.lags) if self.lags else 0.0

    @property
    def is_clean(self) -> bool:
        """No stale read, and none of what would make that mean nothing."""
        looked = self.share_of_replicas > 0 and self.share_behind > 0
        return looked and not self.tally.stale and not self.tally.failures

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "reads": self.reads,
            "by_way": dict(self.tally.reads),
            "writes": self.tally.writes,
            "stale": len(self.tally.stale),
            "failures": self.tally.failures,
            "share_of_replicas": round(self.share_of_replicas, 4),
            "answered": dict(self.answered),
            "waits": self.tally.waits,
            "slowest_read_ms": round(self.tally.slowest * 1000, 1),
            "lag_ms": self._lag(),
            "share_behind": round(self.share_behind, 4),
            "pauses": self.pauses,
            "seconds": round(self.seconds, 1),
            "evidence": [asdict(one) for one in self.tally.stale[:20]],
        }

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        ways = ", ".join(f"{way} {count:,}" for way, count in sorted(self.tally.reads.items()))
        lag = ", ".join(f"{name} {value:.0f}" for name, value in self._lag().items())
        nodes = ", ".join(f"{node} {count:,}" for node, count in sorted(self.answered.items()))
        yield f"{self.name}: {self.reads:,} reads, {self.tally.writes:,} commits"
        yield f"  reads      {ways}"
        yield f"  stale      {len(self.tally.stale)}"
        yield f"  answered   {self.share_of_replicas:.1%} by replicas ({nodes})"
        yield (
            f"  waits      {self.tally.waits:,} reads took more than {WAITED * 1000:.0f} ms, "
            f"the slowest {self.tally.slowest * 1000:.0f} ms"
        )
        yield (
            f"  lag        behind at {self.share_behind:.0%} of {len(self.lags):,} moments, "
            f"ms: {lag}; {self.pauses:,} pauses"
        )
        yield f"  took       {self.seconds:.0f} s, {self.reads / self.seconds:,.0f} reads/s"
        for one in self.tally.stale[:20]:
            yield f"  STALE      {one}"
        for failure in self.tally.failures[:3]:
            yield f"  FAILED     {failure}"

    def _lag(self) -> dict[str, float]:
        if len(self.lags) < 2:
            return {}
        parts = quantiles(self.lags, n=20)
        found = {"p10": parts[1], "p50": parts[9], "p90": parts[17], "max": max(self.lags)}
        return {name: round(value * 1000, 1) for name, value in found.items()}


def answered_by(*routers: Router) -> Answered:
    """Return how many reads each node has answered, sync and async."""
    found = Answered()
    for router in routers:
        for is_async in (False, True):
            found.update(router.engines(is_async=is_async).answered)
    return found


def guarded(tally: Tally, work: Callable[[Tally], None], stop: threading.Event) -> None:
    """Do what a thread does; a failure ends all of them and is part of the report."""
    try:
        work(tally)
    except Exception:
        tally.failures.append(traceback.format_exc())
        stop.set()
