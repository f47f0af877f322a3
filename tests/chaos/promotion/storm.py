"""One fault after another, in an order by chance, and the whole check after each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection
from random import Random

from sqlroute.local.topology import LocalTopology

from .clients import Clients
from .cluster import Cluster
from .faults import FAULTS, PLANNED
from .switchovers import Report
from .trial import Leg, Trial


class Storm(Report):
    """What was seen. Requests may fail where servers do; nothing else may."""

    @property
    def is_clean(self) -> bool:
        return self.whole is not None and not self.broken and all(leg.writes for leg in self.legs)


def run(
    topology: LocalTopology,
    count: int,
    *,
    names: Collection[str] = tuple(FAULTS),
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Storm:
    """Do harm so often, each kind once before any comes again.

    Args:
        names: of the faults.
    """
    report, began, rng = Storm("storm"), time.monotonic(), Random(seed)
    with (
        Cluster(topology, has_cables=True) as cluster,
        Trial(cluster, Clients(cluster.config, writers=2), rng, say=say) as trial,
    ):
        trial.switch()  # from now on the nodes, too, reach each other by cables
        for name in _order(names, count, rng):
            say(f"{name}...")
            report.legs.append(_suffered(trial, name))
            say(str(report.legs[-1]))
            if report.legs[-1].broken:
                break  # what follows would only be evidence of the same
        else:
            report.whole = trial.end()
    report.seconds = time.monotonic() - began
    return report


def _order(names: Collection[str], count: int, rng: Random) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        found += rng.sample(list(names), len(names))
    return found[:count]


def _suffered(trial: Trial, name: str) -> Leg:
    time.sleep(0.3)
    trial.began()
    try:
        FAULTS[name](trial)
        leg = trial.check(name)
    except Exception:
        leg = Leg(name, broken=[f"{name} ended by {traceback.format_exc()}"])
    if name in PLANNED and leg.lost:
        leg.broken.append(f"{leg.lost} lost where nothing may be")
    return leg
