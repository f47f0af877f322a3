"""Switchovers in a row under load, with clients that do all they may to go on writing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sqlroute.local.topology import LocalTopology
from sqlroute.ops.fences import Level

from .clients import Clients
from .cluster import Cluster
from .trial import Leg, Trial

BETWEEN = 0.5
"""Seconds of load before each."""


@dataclass(slots=True)
class Report:
    """What was seen.

    Attributes:
        whole: the check of all of it, in the end.
    """

    name: str
    legs: list[Leg] = field(default_factory=list)
    whole: Leg | None = None
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        return max((leg.gap for leg in self.legs), default=0.0)

    @property
    def failed(self) -> int:
        return sum(len(leg.failed) for leg in self.legs)

    @property
    def broken(self) -> list[str]:
        all_legs = [*self.legs, *([self.whole] if self.whole else [])]
        return [text for leg in all_legs for text in leg.broken]

    @property
    def lost(self) -> int:
        return self.whole.lost if self.whole else 0

    @property
    def is_clean(self) -> bool:
        """Nothing lost, nothing failed, and enough done for that to mean something."""
        did = bool(self.legs) and all(leg.writes and leg.reads for leg in self.legs)
        return did and not self.broken and not self.failed and not self.lost

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.name}: {len(self.legs)} in {self.seconds:.0f} s, longest gap "
            f"{self.gap * 1000:.0f} ms, {self.failed} failed, {self.lost} lost, "
            f"{len(self.broken)} broken: {'ok' if self.is_clean else 'NOT OK'}"
        )
        for leg in (*self.legs, *([self.whole] if self.whole else [])):
            yield from leg.evidence()

    def document(self) -> dict[str, Any]:
        gaps = sorted(round(leg.gap * 1000, 1) for leg in self.legs)
        return {
            "name": self.name,
            "clean": self.is_clean,
            "count": len(self.legs),
            "gaps_ms": gaps,
            "failed": self.failed,
            "lost": self.lost,
            "broken": self.broken[:20],
            "seconds": round(self.seconds, 1),
        }


def run(
    topology: LocalTopology,
    count: int,
    *,
    fence: str = "L3",
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Switch over so often, each time to another node chosen at random, and check each time."""
    report, began = Report(f"switchovers at {fence}"), time.monotonic()
    with (
        Cluster(topology) as cluster,
        Trial(cluster, clients_of(cluster, 4), Random(seed), say=say) as trial,
    ):
        for number in range(1, count + 1):
            report.legs.append(one(trial, Level[fence]))
            if number % 10 == 0 or number == count:
                say(_summary(number, report.legs[(number - 1) // 10 * 10 :]))
        report.whole = trial.end()
    report.seconds = time.monotonic() - began
    return report


def clients_of(cluster: Cluster, writers: int) -> Clients:
    """Return clients of which some go past the routers."""
    return Clients(cluster.config, writers=writers, strangers=cluster.addresses)


def one(trial: Trial, level: Level) -> Leg:
    """Switch over to another node, chosen at random, and check."""
    time.sleep(BETWEEN)
    to = trial.rng.choice(trial.cluster.replicas())
    trial.began()
    found = trial.switch(to=to, level=level)
    leg = trial.check(f"to {to} at {level.name}")
    steps = ", ".join(f"{step['step']} {step['ms']:.0f}" for step in found["steps"])
    leg.notes.append(f"steps in ms: {steps}")
    if found["outcome"] != "done":
        leg.broken.append(f"the outcome is {found['outcome']}: {found['waiting']}")
    if found["acknowledged"].get("present") is False:
        leg.broken.append(f"the report says {found['acknowledged']['text']}")
    return leg


def _summary(number: int, legs: list[Leg]) -> str:
    return (
        f"{number - len(legs) + 1} to {number}: longest gap "
        f"{max(leg.gap for leg in legs) * 1000:.0f} ms, "
        f"{sum(len(leg.failed) for leg in legs)} failed, {sum(leg.lost for leg in legs)} lost"
    )
