"""Choose the node of one shard for a read. Pure: load, turn and randomness are given.

Filters come first (readable, fresh enough, not one that just failed), then what is near (zone, this
process's part of the replicas, round trip), then the choice among these by load and weight. The
reason of every refusal is kept, because "no replica" without a why helps nobody.

Where no replica may take a read, :func:`admit` says whether the primary may: a dead replica set
must not take the primary with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from sqlroute.health import Health, NodeHealth, Role, State
from sqlroute.routing.policy import Balancing, Consistency, Policy
from sqlroute.routing.token import Position, format_lsn, newest
from sqlroute.topology import Topology

ZONE_MARGIN = 0.7
"""Share of a zone's replicas, by weight, that is enough for the zone. Below it only as many reads
stay there as give those that are left 1 / 0.7 of what they had, the factor Envoy provides for."""

FALLBACK_BURST = 0.25
"""Seconds of its rate that a primary may take at once in place of replicas."""

GOLDEN = 0.6180339887498949
"""Multiples of it, less the whole numbers, fill the interval from 0 to 1 evenly at every length."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The replicas of a shard, sorted into usable and not.

    Attributes:
        fresh: may take the read.
        unproven: healthy, but not known to have replayed the session's token.
        refused: (node, why) of the others.
    """

    fresh: tuple[NodeHealth, ...]
    unproven: tuple[NodeHealth, ...]
    refused: tuple[tuple[str, str], ...]

    def reasons(self) -> str:
        parts = [f"{node} {why}" for node, why in self.refused]
        parts += [
            f"{node.node} is not known to have replayed what the session has seen"
            for node in self.unproven
        ]
        return ", ".join(parts) or "it has none"


def candidates(
    shard: str,
    health: Health,
    topology: Topology,
    policy: Policy,
    consistency: Consistency,
    required: Required,
    exclude: frozenset[str],
) -> Candidates:
    """Sort the replicas of a shard by whether they may take a read of this session.

    A slow one may when there is no other.
    """
    fresh: list[NodeHealth] = []
    slow: list[NodeHealth] = []
    unproven: list[NodeHealth] = []
    refused: list[tuple[str, str]] = []
    bounds = None if consistency is Consistency.EVENTUAL else policy
    sessional = consistency is Consistency.SESSION
    for node in health.replicas(shard):
        if (why := refusal(node, topology, bounds, exclude)) is not None:
            refused.append((node.node, why))
            if (
                node.state is State.SLOW
                and node.node not in exclude
                and _is_within(node, topology, bounds)
                and (not sessional or required.is_met_by(node))
            ):
                slow.append(node)
        elif sessional and not required.is_met_by(node):
            unproven.append(node)
        else:
            fresh.append(node)
    if not fresh:
        fresh = slow
        refused += _others(shard, health, topology, exclude)
    return Candidates(tuple(fresh), tuple(unproven), tuple(refused))


def in_doubt(
    shard: str,
    health: Health,
    topology: Topology,
    bounds: Policy | None,
    required: Required,
    failed: frozenset[str] = frozenset(),
) -> tuple[NodeHealth, ...]:
    """Return the replicas to read from rather than to fail: the last resort.

    All probes failing at once may be this process's own fault. So those whose last probe has failed
    or that have only just come back, and those of ``failed``, which could not run this very
    statement, provided that what they last showed is fresh enough. None that is down.

    Args:
        bounds: the limits of lag, ``None`` for none.
        failed: pass it once only, else the statement never ends.
    """
    return tuple(
        node
        for node in health.replicas(shard)
        if (
            node.state in (State.SUSPECT, State.RECOVERING)
            or (node.node in failed and _lives(node))
        )
        and not node.refused
        and _is_within(node, topology, bounds)
        and required.is_met_by(node)
    )


def _lives(node: NodeHealth) -> bool:
    return node.state is State.UP or node.state is State.SLOW


def _others(
    shard: str, health: Health, topology: Topology, exclude: frozenset[str]
) -> list[tuple[str, str]]:
    """Return the nodes that are neither the primary nor known to be replicas, and why not."""
    primary = health.primary(shard)
    known = {node.node for node in (primary, *health.replicas(shard)) if node is not None}
    return [
        (node.node, refusal(node, topology, None, exclude) or "says that it is a primary")
        for node in health.members(shard)
        if node.node not in known
    ]


@dataclass(frozen=True, slots=True)
class Required:
    """What a replica must have replayed to be read from.

    Attributes:
        token: the session's, if any.
        nodes: those that the session has read from; a single one needs no further proof itself.
        floor: observed after these reads, so it covers what ``nodes`` showed; ``None`` if not
            asked for.
    """

    token: Position | None
    nodes: frozenset[tuple[str, int]]
    floor: Position | None

    def is_met_by(self, node: NodeHealth) -> bool:
        if self.token is not None and not has_replayed(node, self.token):
            return False
        nodes = self.nodes
        if not nodes or (len(nodes) == 1 and (node.node, node.life) in nodes):
            return True
        return self.floor is not None and has_replayed(node, self.floor)


NOTHING = Required(None, frozenset(), None)
"""For a session that has seen nothing, or does not care."""


def has_replayed(node: NodeHealth, position: Position) -> bool:
    """The cached replay LSN only grows, so a cached one beyond the position is proof."""
    return node.lsn >= position.lsn and node.timeline >= position.timeline


def floor_of(
    shard: str,
    health: Health,
    nodes: Iterable[tuple[str, int]],
    since: float,
    exclude: frozenset[str],
) -> Position | None:
    """Return a position that covers all that the nodes have shown before the time ``since``.

    Their own, observed later; when one is gone, or has another life by now, the primary's: no
    replica is ahead of that. ``None`` when neither has answered. A primary shows what others have
    committed asynchronously before it is flushed, so all that it has inserted counts.
    """
    found: Position | None = None
    for node, life in nodes:
        known = health.nodes.get(node)
        if known is None or node in exclude or not _tells(known, life, since):
            known = health.primary(shard)
            if known is None or known.node in exclude or known.lsn_at < since:
                return None
        lsn = known.lsn
        if known.role is Role.PRIMARY and known.received_lsn is not None:
            lsn = max(lsn, known.received_lsn)
        position = Position(shard, 0, known.timeline, lsn)
        found = position if found is None else newest(found, position)
    return found


def _tells(node: NodeHealth, life: int, since: float) -> bool:
    return node.is_readable and node.life == life and node.lsn_at >= since


LONGEST_WAIT = 0.1
"""Seconds that a read waits at most for a replica where the policy names no other time."""


def patience(unproven: tuple[NodeHealth, ...], policy: Policy) -> float:
    """Return how many seconds a read may wait for one of these replicas; 0 when it is hopeless.

    By default as long as the nearest one is measured to be behind, twice over; one further behind
    than a read would wait is not even asked.
    """
    if policy.token_wait is not None:
        return policy.token_wait
    lags = [node.lag_seconds for node in unproven if node.lag_seconds is not None]
    nearest = min(lags, default=LONGEST_WAIT + 1)
    return 0.0 if nearest > LONGEST_WAIT else min(LONGEST_WAIT, 0.02 + 2 * nearest)


def refusal(
    node: NodeHealth, topology: Topology, bounds: Policy | None, exclude: frozenset[str]
) -> str | None:
    """Return why a node may not be read from, its freshness for the session aside."""
    if node.node in exclude:
        return "just failed"
    if not node.is_readable:
        return node.refused or f"is {node.state.value}" + (
            f" ({node.last_error})" if node.last_error and node.state is not State.UP else ""
        )
    return _beyond(node, topology, bounds)


def _is_within(node: NodeHealth, topology: Topology, bounds: Policy | None) -> bool:
    return _beyond(node, topology, bounds) is None


def _beyond(node: NodeHealth, topology: Topology, bounds: Policy | None) -> str | None:
    """Return by which of its own figures a node may not be read from."""
    if topology.node(node.node).weight <= 0:
        return "has weight 0"
    if bounds is not None:
        if node.lag_seconds is None:
            return "has an unknown lag"
        if node.lag_seconds > bounds.max_lag:
            return f"is {node.lag_seconds:.1f} s behind (max_lag {bounds.max_lag:g} s)"
    return None


class Named(Protocol):
    """What stands for a node: its health, or the target that it would be."""

    @property
    def node(self) -> str: ...


N = TypeVar("N", bound=Named)
M = TypeVar("M", bound=Named)


@dataclass(frozen=True, slots=True)
class Group(Generic[N]):
    """Nodes to choose from.

    Attributes:
        weights: of each, the share of a returning node in them; empty if all are the same.
    """

    nodes: tuple[N, ...]
    weights: tuple[float, ...] = ()

    def each(self, change: Callable[[N], M]) -> Group[M]:
        """Return the same with something else that stands for each node."""
        return Group(tuple(map(change, self.nodes)), self.weights)


@dataclass(frozen=True, slots=True)
class Pool(Group[N]):
    """Usable nodes with what a choice among them needs: the same for many reads.

    It is itself the group of those that are near, where reads should go.

    Attributes:
        far: where they go when those are not enough; ``None`` if there is no such difference.
        stay: the share of reads that should stay near.
    """

    far: Group[N] | None = None
    stay: float = 1.0

    def each(self, change: Callable[[N], M]) -> Pool[M]:
        far = None if self.far is None else self.far.each(change)
        return Pool(tuple(map(change, self.nodes)), self.weights, far, self.stay)


def pool_of(
    shard: str,
    fresh: tuple[NodeHealth, ...],
    health: Health,
    topology: Topology,
    policy: Policy,
    process: str = "",
) -> Pool[NodeHealth]:
    """Sort usable nodes by how near they are.

    Args:
        process: names this process among all that read from them.
    """
    if len(fresh) == 1:
        return Pool(fresh)
    zone, size = policy.zone, policy.replicas_per_process
    near = fresh
    if zone:
        near = tuple(node for node in fresh if topology.node(node.node).zone == zone)
    if not near or len(near) == len(fresh):
        return Pool(*_weighted(replica_subset(process, fresh, size), topology, policy))
    stay = _stay(near, health.replicas(shard), topology, zone)
    far = tuple(node for node in fresh if node not in near)
    near, far = replica_subset(process, near, size), replica_subset(process, far, size)
    beyond = Group(*_weighted(far, topology, policy))
    return Pool(*_weighted(near, topology, policy), beyond, stay)


def _weighted(
    nodes: tuple[NodeHealth, ...], topology: Topology, policy: Policy
) -> tuple[tuple[NodeHealth, ...], tuple[float, ...]]:
    """Keep the nodes within the latency window; return them with their weights, see Group."""
    if len(nodes) > 1:
        window = min([node.rtt for node in nodes]) + policy.latency_window
        nodes = tuple([node for node in nodes if node.rtt <= window])
    weights = tuple([topology.node(node.node).weight * node.share for node in nodes])
    return nodes, weights if min(weights) != max(weights) else ()


def _stay(
    near: tuple[NodeHealth, ...], replicas: tuple[NodeHealth, ...], topology: Topology, zone: str
) -> float:
    """Return the share of reads that the usable replicas of a zone can take for all of it."""
    able = sum([topology.node(node.node).weight * node.share for node in near])
    nodes = [topology.node(node.node) for node in replicas]
    whole = sum([node.weight for node in nodes if node.zone == zone])
    return min(1.0, able / (whole * ZONE_MARGIN))


def replica_subset(
    process: str, nodes: tuple[NodeHealth, ...], size: int
) -> tuple[NodeHealth, ...]:
    """Return the nodes that a process should use, so that each has a few processes, not all.

    Rendezvous hashing: each process ranks the nodes by a hash of both names. So every process
    chooses the same ones each time, nodes are chosen equally often, and when one goes only the
    processes that used it choose another.

    Args:
        size: how many; 0 for all.
    """
    if not process or size <= 0 or size >= len(nodes):
        return nodes
    ranked = sorted(nodes, key=lambda node: _rank(process, node.node), reverse=True)
    chosen = ranked[:size]
    return tuple(node for node in nodes if node in chosen)


@lru_cache(maxsize=16_384)  # a process has one name for itself, and some thousand nodes
def _rank(process: str, node: str) -> bytes:
    return blake2b(f"{process}\0{node}".encode(), digest_size=8).digest()


def choose(
    pool: Pool[N],
    policy: Policy,
    loads: Mapping[str, Collection[object]],
    rng: Random,
    turns: Iterator[int] | None = None,
) -> N:
    """Choose the node of one read.

    Args:
        loads: statements under way per node.
        turns: a counter of the shard's own, for round robin; at random without one. One counter
            for several shards would visit them in step with their nodes.
    """
    group: Group[N] = pool
    if pool.far is not None and not (
        (pool.stay >= 1.0 or rng.random() < pool.stay) and _has_room(group, loads, policy)
    ):
        group = pool.far
    nodes = group.nodes
    if len(nodes) == 1:
        return nodes[0]
    how = policy.balancing
    if how is Balancing.P2C:
        return _of_two(group, loads, rng)
    if how is Balancing.LEAST_CONNECTIONS:
        return _least(group, loads, rng)
    if how is Balancing.WEIGHTED:
        return nodes[_drawn(group, rng.random())]
    turn = rng.getrandbits(32) if turns is None else next(turns)
    if not group.weights:
        return nodes[turn % len(nodes)]
    return nodes[_drawn(group, turn * GOLDEN % 1.0)]


def _of_two(group: Group[N], loads: Mapping[str, Collection[object]], rng: Random) -> N:
    """Take two by their weights, keep the one with fewer statements under way per weight.

    Of equally loaded ones the first drawn, so that idle nodes are chosen as often as they weigh.
    """
    nodes, weights = group.nodes, group.weights
    if not weights:
        one, other = rng.sample(nodes, 2) if len(nodes) > 2 else nodes
        load_one, load_other = len(loads.get(one.node, ())), len(loads.get(other.node, ()))
        if load_one != load_other:
            return one if load_one < load_other else other
        return one if rng.random() < 0.5 else other
    first = _drawn(group, rng.random())
    rest = Group(nodes[:first] + nodes[first + 1 :], weights[:first] + weights[first + 1 :])
    second = _drawn(rest, rng.random())
    one, other = nodes[first], rest.nodes[second]
    per_one = len(loads.get(one.node, ())) / weights[first]
    per_other = len(loads.get(other.node, ())) / rest.weights[second]
    return one if per_one <= per_other else other


def _least(group: Group[N], loads: Mapping[str, Collection[object]], rng: Random) -> N:
    weights = group.weights or (1.0,) * len(group.nodes)
    per_weight = [
        len(loads.get(node.node, ())) / weight
        for node, weight in zip(group.nodes, weights, strict=True)
    ]
    least = min(per_weight)
    equal = [i for i, load in enumerate(per_weight) if load == least]
    tied = Group(tuple(group.nodes[i] for i in equal), tuple(weights[i] for i in equal))
    return tied.nodes[_drawn(tied, rng.random())]


def _drawn(group: Group[Any], point: float) -> int:
    """Return the index of the node at a point of the interval from 0 to 1, shared by weight."""
    if not group.weights:
        return int(point * len(group.nodes))
    ends = list(accumulate(group.weights))
    return min(bisect_right(ends, point * ends[-1]), len(ends) - 1)


def _has_room(group: Group[Any], loads: Mapping[str, Collection[object]], policy: Policy) -> bool:
    """Say if a node has a connection left of those that are kept for it."""
    return any(len(loads.get(node.node, ())) < policy.pool_size for node in group.nodes)


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many reads a primary may take at once in place of the replicas, as of a time."""

    reads: float
    at: float


def fallback_rate(shard: str, health: Health, policy: Policy) -> float:
    """Return the reads per second that a primary may take from this process without replicas.

    A share of the reads that the replicas took from this process, and this process's part of what
    is free in any case.
    """
    known = health.shard(shard)
    monitors = known.primary_health.monitors if known.primary_health is not None else 0
    free = policy.primary_fallback_free / max(1, monitors)
    return policy.primary_fallback_share * known.read_rate + free


def admit(state: Allowance | None, now: float, rate: float) -> tuple[Allowance, bool]:
    """Say if a primary may take one more read, and return what is left: a token bucket.

    Args:
        state: ``None`` before the first read.
        rate: reads per second that it may take.
    """
    most = max(1.0, rate * FALLBACK_BURST)
    left = most if state is None else min(most, state.reads + rate * max(0.0, now - state.at))
    if left < 1.0:
        return Allowance(left, now), False
    return Allowance(left - 1.0, now), True


def describe_token(position: Position) -> str:
    return f"the session has seen {format_lsn(position.lsn)}"
