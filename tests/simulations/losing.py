"""Where reads go when servers are lost: a zone of them, or all replicas of a shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from sqlroute.errors import NoEligibleNode
from sqlroute.health import Health, Observation, observe
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.balancing import Allowance, admit
from sqlroute.routing.policy import Policy
from sqlroute.routing.statement import Kind
from sqlroute.routing.target import Situation, target_of
from sqlroute.topology import Keyspace, Node, Shard, Topology

ZONES = "abc"


def topology(shards: int) -> Topology:
    """Return shards with a node in each zone; their primaries are spread over the zones."""
    made = tuple(
        Shard(
            f"s{i}",
            tuple(Node(f"s{i}-{ZONES[(i + k) % 3]}", zone=ZONES[(i + k) % 3]) for k in range(3)),
        )
        for i in range(shards)
    )
    return Topology((Keyspace("shop", made),))


def healthy(of: Topology) -> Health:
    found = Health.initial(of)
    for keyspace in of.keyspaces:
        for number, shard in enumerate(keyspace.shards, 1):
            for node in shard.nodes:
                found = observe(found, _seen(node.name, 0.0, node is shard.nodes[0], number), 0.0)
    return found


def _seen(node: str, at: float, is_primary: bool, cluster: int, reads: int = 0) -> Observation:
    return Observation(
        node,
        at,
        is_primary=is_primary,
        timeline=1,
        system_identifier=cluster,
        lsn=100,
        replay_age=0.0,
        rtt=0.001,
        statements=reads,
        statement_seconds=reads * 0.001,
    )


def without(health: Health, nodes: set[str], at: float) -> Health:
    """Return the health after two probes of each of these nodes have failed."""
    for node in nodes:
        for _ in range(2):
            health = observe(health, Observation.failed(node, at, "timed out"), at)
    return health


@dataclass(frozen=True, slots=True)
class Zone:
    """Reads per replica, 1 being what each has on average before.

    Attributes:
        before, after: of the most loaded one.
        at_home: the share of reads that stay in their zone before.
        by_primaries: the share of reads that primaries take after.
    """

    before: float
    after: float
    at_home: float
    by_primaries: float


def zone_lost(shards: int, rng: Random, *, reads: int = 300) -> Zone:
    """Let zone c be gone, its processes too; those of the others then have all of the reads."""
    of = topology(shards)
    known = healthy(of)
    before, home = _spread(of, known, ZONES, reads, rng)
    lost = {node.name for node in of.nodes() if node.zone == "c"}
    after, _ = _spread(of, without(known, lost, 1.0), "ab", reads, rng)
    primaries = {shard.nodes[0].name for shard in of.default.shards}
    mean = shards * reads / (2 * shards)
    replicas = [count for node, count in after.items() if node not in primaries]
    taken = sum(count for node, count in after.items() if node in primaries)
    return Zone(
        max(before.values()) / mean,
        max(replicas) / mean,
        home / (shards * reads),
        taken / (shards * reads),
    )


def _spread(
    of: Topology, health: Health, zones: str, reads: int, rng: Random
) -> tuple[Counter[str], int]:
    """Return how many reads each node takes, and how many of all stay in their zone."""
    found: Counter[str] = Counter()
    home = 0
    for zone in zones:
        policy = Policy(zone=zone, primary_fallback_share=1.0)
        around = Situation(of, policy, health, {}, Affinity(), {})
        for shard in of.default.shard_names:
            for _ in range(reads // len(zones)):
                node = target_of(shard, Kind.READ, around, rng).node
                found[node] += 1
                home += of.node(node).zone == zone
    return found, home


@dataclass(frozen=True, slots=True)
class Fallback:
    """Reads per second of one shard, before and while all of its replicas are down."""

    before: float
    asked: float
    by_primary: float


def replicas_lost(
    processes: int, policy: Policy, *, rate: float = 2000.0, seconds: float = 20.0
) -> Fallback:
    """Let both replicas of a shard die; clients that are refused ask again, twice as often."""
    of = topology(1)
    taken = asked = 0
    for number in range(processes):
        rng, health = Random(number), healthy(of)
        own = rate / processes
        for second in range(1, 31):  # before, two replicas share the reads
            for node in ("s0-b", "s0-c"):
                seen = _seen(node, float(second), False, 1, round(own / 2))
                health = observe(health, seen, float(second))
        seen = _seen("s0-a", 30.0, True, 1)
        health = observe(health, replace(seen, monitors=processes), 30.0)
        around = Situation(of, policy, without(health, {"s0-b", "s0-c"}, 31.0), {}, Affinity(), {})
        clock = _Clock(31.0)
        around.admit = clock.admit
        while clock.now < 31.0 + seconds:
            clock.now += 1 / (2 * own)
            asked += 1
            try:
                taken += target_of("s0", Kind.READ, around, rng).is_primary
            except NoEligibleNode:
                continue
    return Fallback(rate, asked / seconds, taken / seconds)


@dataclass(slots=True)
class _Clock:
    """Holds what a router would: the state of the token bucket, and the time."""

    now: float
    state: Allowance | None = None

    def admit(self, shard: str, rate: float) -> bool:
        self.state, found = admit(self.state, self.now, rate)
        return found
