"""How often one node is probed when many processes watch it, and when they find it again."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from sqlroute.health import Health, Observation, next_count, observe, probe_pause
from sqlroute.routing.policy import Policy, pool_limits
from sqlroute.runtime.monitor import JITTER
from sqlroute.topology import Keyspace, Node, Shard, Topology

NODE = "s0-a"
OF = Topology((Keyspace("shop", (Shard("s0", (Node(NODE),)),)),))


@dataclass(slots=True)
class Watching:
    """A process and what it knows of the node."""

    health: Health
    monitors: int = 0
    until_count: int = 0

    def probe(self, at: float, monitors: int) -> None:
        """Ask the node; sometimes it counts its monitors, as for a real probe."""
        self.until_count -= 1
        counted = 0
        if self.until_count < 0:
            counted = monitors
            self.until_count = next_count(self.monitors, monitors) - 1
            self.monitors = monitors
        seen = Observation(
            NODE, at, is_primary=True, timeline=1, rtt=0.001, lsn=1, monitors=counted
        )
        self.health = observe(self.health, seen, at)

    def fail(self, at: float) -> None:
        self.health = observe(self.health, Observation.failed(NODE, at, "refused"), at)

    def pause(self, policy: Policy, rng: Random) -> float:
        pause = probe_pause(
            self.health.of(NODE), interval=policy.probe_interval, rate=policy.probe_rate
        )
        return pause * rng.uniform(1 - JITTER, 1 + JITTER)


@dataclass(frozen=True, slots=True)
class Probes:
    """What a node was asked.

    Attributes:
        mean: probes per second once all processes know of each other.
        worst: the most in ten seconds of that time, per second.
        starting: the most in ten seconds from the first start on, per second.
        pause: seconds between two probes of one process.
    """

    processes: int
    mean: float
    worst: float
    starting: float
    pause: float


def probes(processes: int, policy: Policy, rng: Random, *, seconds: float = 120.0) -> Probes:
    """Let processes start within ten seconds of each other and watch one node."""
    watching = [Watching(Health.initial(OF)) for _ in range(processes)]
    starts = sorted(rng.uniform(0, 10) for _ in watching)
    due = [(start, number) for number, start in enumerate(starts)]
    heapq.heapify(due)
    asked: list[float] = []
    connected = 0
    while due and due[0][0] < seconds:
        at, number = heapq.heappop(due)
        one = watching[number]
        connected += one.monitors == 0
        one.probe(at, connected)
        asked.append(at)
        heapq.heappush(due, (at + one.pause(policy, rng), number))
    settled = [at for at in asked if at >= seconds / 2]
    mean = len(settled) / (seconds / 2)
    return Probes(processes, mean, _most(settled), _most(asked), processes / mean if mean else 0.0)


def _most(times: list[float], window: float = 10.0) -> float:
    """Return the most per second in any window that begins with a probe."""
    most = begin = 0
    for end, at in enumerate(times):
        while times[begin] <= at - window:
            begin += 1
        most = max(most, end - begin + 1)
    return most / window


@dataclass(frozen=True, slots=True)
class Return:
    """How processes come back to a primary.

    Attributes:
        per_second: connections that are opened in each second after its return.
        most: of one tenth of a second.
        found: seconds until the last process has found it.
    """

    per_second: tuple[int, ...]
    most: int
    found: float


def primary_returns(
    processes: int, policy: Policy, rng: Random, *, waiting: int = 20, seconds: float = 20.0
) -> Return:
    """Let a primary be away for a minute and come back at time 0 to writers that wait for it.

    Each process opens as many connections as its limits allow; writers do not end, so that every
    connection is one more.
    """
    opened: Counter[int] = Counter()
    found = []
    for start in (rng.uniform(-70, -60) for _ in range(processes)):
        one, open_now, at = Watching(Health.initial(OF)), 0, start
        one.probe(at, processes)
        while at < seconds:
            at += one.pause(policy, rng)
            if at < 0:
                one.fail(at)
                continue
            found += [at] if open_now == 0 else []
            one.probe(at, processes)
            known = one.health.of(NODE)
            limits = pool_limits(policy, known.monitors, known.share)
            allowed = waiting if limits.most < 0 else min(waiting, limits.most)
            opened[int(at * 10)] += max(0, allowed - open_now)
            open_now = max(open_now, allowed)
    return Return(tuple(_by_second(opened, seconds)), max(opened.values()), max(found))


def _by_second(opened: Counter[int], seconds: float) -> Iterator[int]:
    for second in range(int(seconds)):
        yield sum(opened[second * 10 + tenth] for tenth in range(10))
