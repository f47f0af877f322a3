"""Plan what only PostgreSQL itself can answer: on a coordinator, over foreign tables on all shards.

Pure. Takes every SELECT that is proved to be a read and that the shards' own answers cannot be
merged for. What a coordinator would answer differently from one server is refused here, what it
cannot know is refused by itself (:mod:`sqlroute.coordination`).

Each of a coordinator's databases reads certain nodes: one the primaries, others a replica of each
shard (:class:`sqlroute.topology.Reader`). One is chosen all of whose replicas may take the read,
each as it might take any other; else the primaries are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import AbstractTextClause, ClauseElement
from sqlalchemy.sql.selectable import TableSample

from sqlroute.errors import CrossShardRefused, NoEligibleNode
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.statement import Kind, Statement
from sqlroute.routing.target import (
    Situation,
    UnknownReaders,
    Unproven,
    kind_of,
    read_beside,
    replica_beside,
    why_primary,
)
from sqlroute.topology import Coordinator, Keyspace, Reader, ShardMap

REASON = "PostgreSQL answers it on the coordinator"

_READ = "read by the coordinator"
_SAMPLE = re.compile(r"\btablesample\b", re.IGNORECASE)


def coordinated(
    statement: Statement,
    written: Any,
    situation: Situation,
    shard_map: ShardMap,
    refused: CrossShardRefused,
) -> Plan:
    """Return the plan of a statement for the coordinator of its keyspace.

    Args:
        written: the statement itself.
        refused: why the shards alone do not answer it.

    Raises:
        CrossShardRefused: the one given where there is no coordinator, else one that says too why
            that may not answer.
        TokenError, NoPrimary, NoEligibleNode, Question: see
            :func:`sqlroute.routing.target.target_of`.
        UnknownReaders: which replicas its databases read must be asked first.
    """
    keyspace, demand = statement.keyspace, situation.demand
    coordinator = keyspace.coordinator
    if coordinator is None and not demand.by_coordinator:
        raise refused
    why_not = _why_not(statement, written, situation)
    if coordinator is None or why_not:
        why = why_not or _not_there(keyspace)
        raise CrossShardRefused(
            refused.clause, f"{refused.why}; nor may the coordinator answer it: {why}"
        ) from refused
    nodes, targets, not_replicas = _chosen(keyspace, coordinator, situation)
    reason = str(refused).partition("; ")[0]  # without the way out
    return Plan(
        Tier.COORDINATOR,
        targets,
        Kind.READ.value,
        shard_map.epoch,
        (*statement.reasons, reason, REASON, *not_replicas),
        coordinators=nodes,
    )


def _chosen(
    keyspace: Keyspace, coordinator: Coordinator, situation: Situation
) -> tuple[tuple[str, ...], tuple[Target, ...], tuple[str, ...]]:
    """Return the databases that may answer, the nodes that these read, and why not replicas.

    Raises: as :func:`coordinated`.
    """
    bound = [why for shard in keyspace.shard_names if (why := why_primary(shard, situation))]
    readers = () if bound else _in_turn(keyspace, situation)
    question: Unproven | None = None
    reasons = []
    for reader in readers:
        try:
            return (reader.node,), _read_by(reader, keyspace, situation), ()
        except NoEligibleNode as error:
            reasons.append(f"{reader.node}: {error}")
        except Unproven as unproven:
            question = question or unproven
    if question is not None:
        raise question
    if readers and not situation.policy.primary_fallback:
        raise NoEligibleNode(
            f"no replicas may take the read: {', '.join(reasons)}; set primary_fallback = true "
            "or raise max_lag"
        )
    targets = tuple(
        read_beside(shard, situation, _READ, is_fallback=bool(readers))
        for shard in keyspace.shard_names
    )
    not_replicas = tuple(f"primaries are read: {reason}" for reason in (bound[:1] or reasons))
    return tuple(node.name for node in coordinator.nodes), targets, not_replicas


def _in_turn(keyspace: Keyspace, situation: Situation) -> Sequence[Reader]:
    """Return the databases that read replicas, each time another one first.

    Raises:
        UnknownReaders: they are not known yet.
    """
    if situation.readers is None:
        return ()
    readers = situation.readers(keyspace)
    if readers is None:
        raise UnknownReaders(keyspace)
    if len(readers) < 2 or situation.turns is None:
        return readers
    first = next(situation.turns[f"{keyspace.name}-coordinator"]) % len(readers)
    return (*readers[first:], *readers[:first])


def _read_by(reader: Reader, keyspace: Keyspace, situation: Situation) -> tuple[Target, ...]:
    """Return the nodes that a database reads, a primary where a shard has no replicas.

    Raises: as :func:`sqlroute.routing.target.replica_beside`.
    """
    if reader.node in situation.exclude:
        raise NoEligibleNode("just failed")
    if reader.refused:
        raise NoEligibleNode(reader.refused)
    return tuple(
        replica_beside(shard, reader.replicas[shard], situation, _READ)
        if shard in reader.replicas
        else read_beside(shard, situation, f"{_READ}, the shard has no replicas")
        for shard in keyspace.shard_names
    )


def _not_there(keyspace: Keyspace) -> str:
    return (
        f"keyspace {keyspace.name} has none; add [keyspaces.{keyspace.name}.coordinator] to the "
        "configuration and run `sqlroute coordinator install`"
    )


def _why_not(statement: Statement, written: Any, situation: Situation) -> str:
    """Return why a coordinator may not answer a statement, nothing if it may."""
    demand = situation.demand
    if situation.policy.no_coordinator:
        return "the policy no_coordinator forbids it"
    kind_of(statement, situation)
    if statement.kind is not Kind.READ:
        return f"only what is proved to be a read runs there ({statement.reasons[0]})"
    if demand.partial:
        return "it reads all shards or none, and sqlroute_partial was asked for"
    if demand.snapshot is not None:
        return f"several shards have no common snapshot, as {demand.snapshot} needs"
    if _is_sampled(written):
        return "TABLESAMPLE would be left out for foreign tables"
    return ""


def _is_sampled(written: Any) -> bool:
    if not isinstance(written, ClauseElement):
        return False
    return any(
        isinstance(element, TableSample)
        or (isinstance(element, AbstractTextClause) and _SAMPLE.search(_text(element)))
        for element in visitors.iterate(written)
    )


def _text(element: AbstractTextClause) -> str:
    return str(getattr(element, "text", ""))
