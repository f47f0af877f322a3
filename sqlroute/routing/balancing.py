"""Choose the node of one shard for a read. Pure: load and randomness are given.

Filters come first (readable, fresh enough, not one that just failed), then the choice. The reason
of every refusal is kept, because "no replica" without a why helps nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from sqlroute.health import Health, NodeHealth, State
from sqlroute.routing.affinity import Token, format_lsn
from sqlroute.routing.policy import Consistency, Policy
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
        parts += [f"{node.node} has not replayed the session's token" for node in self.unproven]
        return ", ".join(parts) or "it has none"


def candidates(
    shard: str,
    health: Health,
    topology: Topology,
    policy: Policy,
    token: Token | None,
    exclude: frozenset[str],
) -> Candidates:
    """Sort the replicas of a shard by whether they may take a read of this session."""
    fresh: list[NodeHealth] = []
    unproven: list[NodeHealth] = []
    refused: list[tuple[str, str]] = []
    bounded = policy.consistency is not Consistency.EVENTUAL
    sessional = policy.consistency is Consistency.SESSION
    for node in health.replicas(shard):
        if (why := _refusal(node, topology, policy if bounded else None, exclude)) is not None:
            refused.append((node.node, why))
        elif sessional and token is not None and not has_replayed(node, token):
            unproven.append(node)
        else:
            fresh.append(node)
    if not fresh:
        refused += _others(shard, health, topology, exclude)
    return Candidates(tuple(fresh), tuple(unproven), tuple(refused))


def _others(
    shard: str, health: Health, topology: Topology, exclude: frozenset[str]
) -> list[tuple[str, str]]:
    """Return the nodes that are neither the primary nor known to be replicas, and why not."""
    primary = health.primary(shard)
    known = {node.node for node in (primary, *health.replicas(shard)) if node is not None}
    return [
        (node.node, _refusal(node, topology, None, exclude) or "says that it is a primary")
        for node in health.members(shard)
        if node.node not in known
    ]


def has_replayed(node: NodeHealth, token: Token) -> bool:
    """The cached replay LSN only grows, so a cached one beyond the token is proof."""
    return node.lsn >= token.lsn and node.timeline >= token.timeline


def _refusal(
    node: NodeHealth, topology: Topology, bounds: Policy | None, exclude: frozenset[str]
) -> str | None:
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


def choose(fresh: tuple[NodeHealth, ...], loads: Mapping[str, int], rng: Random) -> NodeHealth:
    """Take two at random, keep the one with fewer statements under way (then the nearer one)."""
    if len(fresh) == 1:
        return fresh[0]
    one, other = rng.sample(fresh, 2) if len(fresh) > 2 else fresh
    load_one, load_other = loads.get(one.node, 0), loads.get(other.node, 0)
    if load_one != load_other:
        return one if load_one < load_other else other
    return one if rng.random() < 0.5 else other


def describe_token(token: Token) -> str:
    return f"the session has seen {format_lsn(token.lsn)}"
