"""Choose the node of one shard for a read. Pure: load and randomness are given.

Filters come first (readable, fresh enough, not one that just failed), then the choice. The reason
of every refusal is kept, because "no replica" without a why helps nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from sqlroute.health import Health, NodeHealth, Role, State
from sqlroute.routing.policy import Consistency, Policy
from sqlroute.routing.token import Position, format_lsn, newest
from sqlroute.topology import Topology


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
    """Sort the replicas of a shard by whether they may take a read of this session."""
    fresh: list[NodeHealth] = []
    unproven: list[NodeHealth] = []
    refused: list[tuple[str, str]] = []
    bounds = None if consistency is Consistency.EVENTUAL else policy
    sessional = consistency is Consistency.SESSION
    for node in health.replicas(shard):
        if (why := refusal(node, topology, bounds, exclude)) is not None:
            refused.append((node.node, why))
        elif sessional and not required.is_met_by(node):
            unproven.append(node)
        else:
            fresh.append(node)
    if not fresh:
        refused += _others(shard, health, topology, exclude)
    return Candidates(tuple(fresh), tuple(unproven), tuple(refused))


def unbound(
    shard: str, health: Health, topology: Topology, policy: Policy, consistency: Consistency
) -> Candidates:
    """Sort the replicas for a session that has seen nothing yet; once for each state of health."""
    key = (shard, consistency, id(policy))
    known = health.memory.get(key)
    if known is not None and known[0] is policy:
        found: Candidates = known[1]
        return found
    found = candidates(shard, health, topology, policy, consistency, _NOTHING, frozenset())
    health.memory[key] = policy, found
    return found


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


_NOTHING = Required(None, frozenset(), None)


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
    if topology.node(node.node).weight <= 0:
        return "has weight 0"
    if bounds is not None:
        if node.lag_seconds is None:
            return "has an unknown lag"
        if node.lag_seconds > bounds.max_lag:
            return f"is {node.lag_seconds:.1f} s behind (max_lag {bounds.max_lag:g} s)"
    return None


def choose(
    fresh: tuple[NodeHealth, ...], loads: Mapping[str, Collection[object]], rng: Random
) -> NodeHealth:
    """Take two at random, keep the one with fewer statements under way (else either)."""
    if len(fresh) == 1:
        return fresh[0]
    one, other = rng.sample(fresh, 2) if len(fresh) > 2 else fresh
    load_one, load_other = len(loads.get(one.node, ())), len(loads.get(other.node, ()))
    if load_one != load_other:
        return one if load_one < load_other else other
    return one if rng.random() < 0.5 else other


def describe_token(position: Position) -> str:
    return f"the session has seen {format_lsn(position.lsn)}"
