"""The verbs of an operator as plain functions: each returns a document of plain values.

What changes a shard locks it on all its nodes for as long as it works. A refusal
(:class:`~sqlroute.errors.OperationRefused`) has changed nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sqlroute.config import Settings
from sqlroute.errors import OperationRefused
from sqlroute.ops import failover as unplanned
from sqlroute.ops import fencing, planning, preflight, rejoining, replicas
from sqlroute.ops import switchover as planned
from sqlroute.ops.drivers.base import Counted
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Plan, Wishes
from sqlroute.ops.promotion import Report, Told, tell_nobody
from sqlroute.ops.server import wait_for
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.topology import Place, RestApi, Topology


def open_shard(settings: Settings, shard: str) -> ShardServers:
    """Return the servers of a shard.

    Raises:
        OperationRefused: there is no such shard.
    """
    known = settings.topology.keyspace_of_shard
    if shard not in known:
        raise OperationRefused(f"unknown shard {shard!r}; known: {', '.join(known)}")
    api = settings.topology.shard(shard).patroni
    if api is not None:
        settings = replace(settings, topology=_members(settings.topology, shard, api))
    return ShardServers(settings, shard)


def _members(topology: Topology, shard: str, api: RestApi) -> Topology:
    """Return the topology with the members of a shard that Patroni tells of now.

    Raises:
        OperationRefused: it tells of none, and the configuration names none.
    """
    from sqlroute.ext.patroni import ask_members

    try:
        return topology.consisting_of({shard: ask_members(shard, api)})
    except OSError as error:
        if topology.shard(shard).nodes:
            return topology
        raise OperationRefused(f"nobody tells of the nodes of shard {shard}: {error}") from error


def shard_of(settings: Settings, node: str) -> str:
    """Return the shard of a node, by the configuration and by what the catalogs announce.

    Raises:
        OperationRefused: no shard has it.
    """
    found = settings.topology.shard_of_node.get(node)
    if found is not None:
        return found
    for shard in settings.topology.keyspace_of_shard:
        with open_shard(settings, shard) as servers:
            if node in servers.look().facts:
                return shard
    known = ", ".join(settings.topology.shard_of_node)
    raise OperationRefused(f"unknown node {node!r}; known: {known}")


# Promotion


Agree = Callable[[Plan], None]
"""Is shown the plan before anything is done; raises where it is not to be."""


def no_question(plan: Plan) -> None:
    """Agree to any plan."""


def plan_promotion(settings: Settings, shard: str, wishes: Wishes) -> Plan:
    """Plan a switchover and change nothing. Raises: OperationRefused."""
    with open_shard(settings, shard) as servers:
        return _plan(settings, servers, servers.look(), wishes)


def promote(
    settings: Settings,
    shard: str,
    wishes: Wishes,
    *,
    agree: Agree = no_question,
    told: Told = tell_nobody,
) -> Report:
    """Make another node of a shard its primary, losing nothing.

    Raises:
        OperationRefused: its preflight refuses, or another command works on the shard.
        OperationFailed: it failed; its text says what has become of it.
    """
    with _working_on(settings, shard) as (servers, look):
        plan = _plan(settings, servers, look, wishes)
        if not plan.refusals:
            agree(plan)
        api = settings.topology.shard(shard).patroni
        if api is None:
            return planned.switchover(servers, plan, told)
        from sqlroute.ext import patroni, patroni_switchover

        return patroni_switchover.switchover(servers, plan, patroni.Patroni(api), told)


def _plan(settings: Settings, servers: ShardServers, look: Look, wishes: Wishes) -> Plan:
    api = settings.topology.shard(servers.name).patroni
    if api is None:
        return planning.plan_switchover(servers, look, wishes)
    from sqlroute.ext import patroni, patroni_switchover

    return patroni_switchover.plan_switchover(servers, look, wishes, patroni.Patroni(api))


def plan_failover(settings: Settings, shard: str, wishes: Wishes) -> Plan:
    """Plan a failover and change nothing. Raises: OperationRefused."""
    _refuse_patroni(settings, shard, "fails over by itself; `patronictl failover` forces it")
    with open_shard(settings, shard) as servers:
        return unplanned.plan_failover(servers, servers.look(), wishes)


def failover(
    settings: Settings,
    shard: str,
    wishes: Wishes,
    *,
    agree: Agree = no_question,
    told: Told = tell_nobody,
) -> Report:
    """Make a replica the primary of a shard that has lost its own.

    Raises:
        OperationRefused: the primary may live, or too much would be lost.
        OperationFailed: it failed midway; run it again.
    """
    _refuse_patroni(settings, shard, "fails over by itself; `patronictl failover` forces it")
    with _working_on(settings, shard) as (servers, look):
        plan = unplanned.plan_failover(servers, look, wishes)
        if not plan.refusals:
            agree(plan)
        return unplanned.failover(servers, plan, told)


def rejoin(
    settings: Settings,
    node: str,
    *,
    clones: bool = False,
    timeout: float = 60.0,
    counted: Counted = rejoining.no_count,
) -> dict[str, Any]:
    """Bring a node back as a replica of its shard's primary.

    Raises:
        OperationRefused: it is the primary, there is none, or its machine cannot be reached.
        OperationFailed, DriverError: it did not come back.
    """
    shard = shard_of(settings, node)
    _refuse_patroni(settings, shard, "brings its members back; see `patronictl reinit`")
    with _working_on(settings, shard) as (servers, look):
        primary = primary_of(servers, look, but=node)
        found = rejoining.rejoin(
            servers,
            node,
            primary,
            epoch=look.epochs.get(primary, 0),
            timeout=timeout,
            clones=clones,
            counted=counted,
        )
        return {"node": node, "shard": shard, "primary": primary, **found}


def primary_of(servers: ShardServers, look: Look, *, but: str = "") -> str:
    """Return the primary of a shard: of several, the one of the newest timeline.

    Args:
        but: the node that a command is about.

    Raises:
        OperationRefused: there is none, or it is that node.
    """
    found = sorted(look.primaries, key=lambda name: look.facts[name].timeline)
    if not found:
        raise OperationRefused(
            f"shard {servers.name} has no primary that answers; see `sqlroute failover "
            f"{servers.name} --dry-run`"
        )
    if found[-1] == but:
        raise OperationRefused(
            f"{but} is the primary of shard {servers.name}; promote another node first with "
            f"`sqlroute promote {servers.name}`"
        )
    return found[-1]


# Fences


def fence(
    settings: Settings,
    node: str,
    *,
    level: Level | None = None,
    waits: float = 0.0,
    timeout: float = 30.0,
) -> dict[str, Any]:
    """Put a fence on a node: the strongest that is possible, or the one that is asked for.

    Args:
        waits: seconds for which a node that cannot be reached is tried again.

    Raises:
        OperationRefused: no such fence is possible there.
        OperationFailed, DriverError: it does not hold.
    """
    shard = shard_of(settings, node)
    with open_shard(settings, shard) as servers:
        _must_have(servers, servers.look(), node)

        def reachable() -> tuple[Level, int] | None:
            look = servers.look()
            chosen = preflight.strongest(look.facts[node], level)
            return (chosen, look.epoch + 1) if chosen is not Level.NONE else None

        found = wait_for(reachable, timeout=waits, pause=0.5)
        if found is None:
            facts = servers.look().facts[node]
            what = f"fence {level.name}" if level else "no fence"
            raise OperationRefused(
                f"{what} {'is not ' if level else 'is '}possible on {node}: "
                f"{facts.error or 'the rights of the operator are too few, and it has no driver'}; "
                "name a superuser in [operator] or a driver in [drivers], or try again with --wait"
            )
        chosen, epoch = found
        done = fencing.fence(servers, node, chosen, epoch, timeout)
        return {"node": node, "shard": shard, "fence": done.level.name, "ended": done.ended}


def unfence(
    settings: Settings, node: str, *, force: bool = False, timeout: float = 30.0
) -> dict[str, Any]:
    """Take every fence off a node.

    Raises:
        OperationRefused: it would be a second primary, or does not answer.
        OperationFailed, DriverError: it could not be done.
    """
    shard = shard_of(settings, node)
    with _working_on(settings, shard) as (servers, look):  # not beside a promotion: it would undo
        _must_have(servers, look, node)
        facts = look.facts[node]
        others = [name for name in look.primaries if name != node]
        if facts.is_primary and others and not force:
            raise OperationRefused(
                f"{others[0]} is the primary of shard {shard}: unfenced, {node} would take writes "
                f"that are lost; run `sqlroute rejoin {node}`"
            )
        if not facts.answers and "start" not in facts.abilities:
            raise OperationRefused(f"{node} does not answer ({facts.error}); start it first")
        if not facts.answers:
            return {"node": node, "shard": shard, "settings": _unfence_down(servers, node, others)}
        changed = fencing.unfence(servers, node, timeout)
        return {"node": node, "shard": shard, "settings": list(changed)}


def _unfence_down(servers: ShardServers, node: str, others: list[str]) -> list[str]:
    """Take the fence out of the files of a server that is down; it is not started."""
    driver = servers.drivers[node]
    assert driver is not None
    if others and not driver.control().was_clean_shutdown:
        raise OperationRefused(
            f"{node} was a primary and {others[0]} is one now; run `sqlroute rejoin {node}`"
        )
    return list(driver.remove_fence())


# Replicas


def add_replica(
    settings: Settings,
    shard: str,
    place: Place,
    *,
    source: str = "",
    timeout: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
    counted: Counted = rejoining.no_count,
) -> dict[str, Any]:
    """Copy a new replica, start it, see it follow, and announce it to the routers.

    Args:
        source: the node to copy; empty for the least loaded one.

    Raises:
        OperationRefused: it cannot be, and why; nothing was changed.
        OperationFailed: it failed midway; says how it goes on.
    """
    _refuse_patroni(settings, shard, "adds members: start another one, routers find it")
    with _working_on(settings, shard) as (servers, look):
        primary = primary_of(servers, look)
        addition, node = replicas.plan_addition(servers, look, primary, place, source)
        return replicas.add(
            servers, primary, addition, node, say=say, counted=counted, timeout=timeout
        )


def remove_replica(
    settings: Settings, node: str, *, stops: bool = True, timeout: float = 30.0
) -> dict[str, Any]:
    """Take a replica away from its shard: routers leave it, then it is stopped.

    Raises:
        OperationRefused: it is the primary, others follow it, or commits would hang without it.
        OperationFailed, DriverError: it failed midway; run it again.
    """
    shard = shard_of(settings, node)
    _refuse_patroni(settings, shard, "removes members: stop its agent, routers see it")
    with _working_on(settings, shard) as (servers, look):
        _must_have(servers, look, node)
        primary = primary_of(servers, look)
        return replicas.remove(servers, look, primary, node, stops=stops, timeout=timeout)


# inside


@contextlib.contextmanager
def _working_on(settings: Settings, shard: str) -> Iterator[tuple[ShardServers, Look]]:
    """Give the servers of a shard, locked, and a look at them."""
    with open_shard(settings, shard) as servers:
        look = servers.look()
        with servers.locked(look):
            yield servers, look


def _refuse_patroni(settings: Settings, shard: str, what: str) -> None:
    known = settings.topology.keyspace_of_shard
    if shard in known and settings.topology.shard(shard).patroni is not None:
        raise OperationRefused(f"Patroni runs shard {shard} and {what}")


def _must_have(servers: ShardServers, look: Look, node: str) -> None:
    if node not in look.facts:
        raise OperationRefused(f"{node} was removed from shard {servers.name}")
