"""What an operator does with operations that were written down: list, show, resume and abort them.

Each function returns a document of plain values. A refusal
(:class:`~sqlroute.errors.OperationRefused`) has changed nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqlroute.config import Settings
from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.ops import failover as unplanned
from sqlroute.ops import planning, records, rejoining, replicas, steps
from sqlroute.ops import switchover as planned
from sqlroute.ops.commands import open_shard, primary_of
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Report, Told, tell_nobody
from sqlroute.ops.records import Operation
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.ops.steps import Change

INTERRUPTED = "failover-"
"""Begins the id of a failover that was interrupted before any node could write it down."""


def list_operations(settings: Settings, shard: str | None = None) -> dict[str, Any]:
    """Return the operations of all shards, or of one, the newest first."""
    names = [shard] if shard else list(settings.topology.keyspace_of_shard)
    found: list[dict[str, Any]] = []
    for name in names:
        with open_shard(settings, name) as servers:
            look = servers.look()
            found += _interrupted(servers, look)
            found += [operation.document() for operation in _operations(servers, look)]
    return {"operations": found}


def show_operation(settings: Settings, operation: str) -> dict[str, Any]:
    """Return an operation, its steps and its report. Raises: OperationRefused: unknown."""
    with _found(settings, operation) as (servers, look, known):
        if known is None:
            return {**_interrupted(servers, look)[0], "steps": [], "report": None, "plan": None}
        server = servers.servers[_witness(look)]
        rows = records.steps(server, operation)
        return {
            **known.document(),
            "steps": [{**row, "at": row["at"].isoformat()} for row in rows],
            "plan": dict(known.plan),
            "report": None if known.report is None else dict(known.report),
        }


def resume(settings: Settings, operation: str, told: Told = tell_nobody) -> Report | dict[str, Any]:
    """Go on with an operation whose command was killed.

    Raises:
        OperationRefused: it has ended, or somebody works on it.
        OperationFailed: it failed; its text says what has become of it.
    """
    with _found(settings, operation) as (servers, look, known), servers.locked(look):
        if known is None:
            return unplanned.failover(
                servers, unplanned.plan_failover(servers, look, Wishes()), told
            )
        _must_run(known)
        if known.kind == replicas.ADD:
            return _add_again(servers, look, known)
        change, level, wishes = _read(look, known)
        standing = planning.standing(change, look, is_recorded=True)
        if known.kind == "failover":
            late = unplanned.Failover(servers, change, level, wishes, told)
            late.look = look
            late.records.take_over(servers.servers[_witness(look)])
            late.run(steps.failover(change, standing))
            return late.report()
        run = _switchover(settings, servers, look, known, told)
        if run.change.kind != "switchover":
            return run.finish(steps.delegated(change, standing))
        run.fence_held = _fence_of(look, change.former)
        return run.finish(steps.switchover(change, standing))


def abort(settings: Settings, operation: str, told: Told = tell_nobody) -> Report | dict[str, Any]:
    """Take back an operation whose command was killed, if its candidate is not promoted yet.

    Raises:
        OperationRefused: it has ended, or somebody works on it.
        OperationFailed: it can only be finished, or it could not be done.
    """
    with _found(settings, operation) as (servers, look, known), servers.locked(look):
        if known is None:
            return {"operation": operation, "repointed": unplanned.undo(servers)}
        _must_run(known)
        if known.kind == replicas.ADD:
            addition = replicas.read_addition(dict(known.plan))
            primary = primary_of(servers, look)
            return {"aborted": replicas.give_up(servers, primary, addition, operation, 30.0)}
        change, _, _ = _read(look, known)
        if known.kind == "failover":
            raise OperationFailed(
                f"the failover {operation} has promoted {change.candidate}: it can only be "
                f"finished; run `sqlroute op resume {operation}`",
                operation=operation,
            )
        run = _switchover(settings, servers, look, known, told)
        run.fence_held = _fence_of(look, change.former)
        return run.give_up()


@contextlib.contextmanager
def _found(
    settings: Settings, operation: str
) -> Iterator[tuple[ShardServers, Look, Operation | None]]:
    """Give the shard of an operation; the operation is ``None`` for an interrupted failover."""
    for shard in settings.topology.keyspace_of_shard:
        with open_shard(settings, shard) as servers:
            look = servers.look()
            if operation == f"{INTERRUPTED}{shard}" and _interrupted(servers, look):
                yield servers, look, None
                return
            for known in _operations(servers, look):
                if known.id == operation:
                    yield servers, look, known
                    return
    raise OperationRefused(f"unknown operation {operation!r}; `sqlroute op list` lists them")


def _witness(look: Look) -> str:
    """Return the node that knows most of the catalog: the primary, else who has replayed most.

    Raises:
        OperationRefused: none answers that has one.
    """
    names = list(look.rows)
    if not names:
        raise OperationRefused("no node answers that has a sqlroute catalog")

    def known(name: str) -> tuple[int, bool, int]:
        facts = look.facts[name]
        return facts.timeline, facts.is_primary, facts.replayed

    return max(names, key=known)


def _operations(servers: ShardServers, look: Look) -> list[Operation]:
    return records.operations(servers.servers[_witness(look)]) if look.rows else []


def _interrupted(servers: ShardServers, look: Look) -> list[dict[str, Any]]:
    """Return the failover that nobody could write down; one that was is among the operations."""
    known = _operations(servers, look)
    if not unplanned.is_interrupted(look) or any(_has_promoted(look, o) for o in known):
        return []
    return [
        {
            "operation": f"{INTERRUPTED}{servers.name}",
            "kind": "failover",
            "shard": servers.name,
            "state": "abandoned",
            "owner": "",
            "started": None,
            "finished": None,
        }
    ]


def _switchover(
    settings: Settings, servers: ShardServers, look: Look, known: Operation, told: Told
) -> planned.Switchover:
    """Return the run that goes on with an operation that was written down."""
    change, level, wishes = _read(look, known)
    api = settings.topology.shard(servers.name).patroni
    if change.kind == "switchover":
        run = planned.Switchover(servers, change, level, wishes, told)
    elif api is None:
        raise OperationRefused(
            f"operation {known.id} is a {change.kind}, and the configuration names no REST API of "
            f"Patroni for shard {servers.name}"
        )
    else:
        from sqlroute.ext import patroni, patroni_switchover

        run = patroni_switchover.PatroniSwitchover(servers, change, level, wishes, told)
        run.patroni = patroni.Patroni(api)
    run.records.take_over(servers.servers[_witness(look)])
    return run


def _has_promoted(look: Look, known: Operation) -> bool:
    """Say if an operation goes on, and its candidate is the primary: it is the one to finish."""
    if not known.is_running or "change" not in known.plan:
        return False
    return known.plan["change"]["candidate"] in look.primaries


def _read(look: Look, known: Operation) -> tuple[Change, Level, Wishes]:
    """Return what an operation is to do with the nodes that there are.

    Raises:
        OperationRefused: a node that it is about was taken away.
    """
    change, level, wishes = planning.read(known.plan)
    for name in (change.former, change.candidate):
        if name and name not in look.facts:
            raise OperationRefused(
                f"operation {known.id} is about {name}, which is no node of shard {change.shard} "
                "any more; put it back into the configuration"
            )
    there = tuple(name for name in change.siblings if name in look.facts)
    return replace(change, siblings=there), level, wishes


def _add_again(servers: ShardServers, look: Look, known: Operation) -> dict[str, Any]:
    addition = replicas.read_addition(dict(known.plan))
    primary = primary_of(servers, look)
    node = servers.nodes[primary].placed(addition.place)
    return replicas.add(
        servers,
        primary,
        addition,
        node,
        operation=known.id,
        say=lambda _: None,
        counted=rejoining.no_count,
        timeout=60.0,
    )


def _must_run(known: Operation) -> None:
    if not known.is_running:
        raise OperationRefused(f"operation {known.id} has ended: it is {known.state}")


def _fence_of(look: Look, former: str) -> Level:
    facts = look.facts[former]
    return facts.fence if facts.answers else Level.L4
