"""Plan what only PostgreSQL itself can answer: on a coordinator, over foreign tables on all shards.

Pure. Takes every SELECT that is proved to be a read and that the shards' own answers cannot be
merged for. What a coordinator would answer differently from one server is refused here, what it
cannot know is refused by itself (:mod:`sqlroute.coordination`).
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import AbstractTextClause, ClauseElement
from sqlalchemy.sql.selectable import TableSample

from sqlroute.errors import CrossShardRefused
from sqlroute.health import Role
from sqlroute.routing.plan import Plan, Tier
from sqlroute.routing.statement import Kind, Statement
from sqlroute.routing.target import Situation, kind_of, read_beside
from sqlroute.topology import Keyspace, ShardMap

REASON = "PostgreSQL answers it on the coordinator"

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
        TokenError, NoPrimary, Question: see :func:`sqlroute.routing.target.target_of`.
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
    targets = tuple(
        read_beside(shard, situation, "read by the coordinator") for shard in keyspace.shard_names
    )
    return Plan(
        Tier.COORDINATOR,
        targets,
        Kind.READ.value,
        shard_map.epoch,
        (*statement.reasons, str(refused).partition("; ")[0], REASON),  # without the way out
        coordinators=tuple(node.name for node in coordinator.nodes),
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
    if demand.role is Role.REPLICA:
        return "it reads from primaries, and sqlroute_role='replica' was asked for"
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
