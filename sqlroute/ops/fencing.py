"""Putting fences on servers, taking them off, and seeing that they hold.

What a level is worth stands in :mod:`sqlroute.ops.fences`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from sqlroute.errors import DriverError, OperationFailed
from sqlroute.ops import fences
from sqlroute.ops.drivers import Ability
from sqlroute.ops.fences import Level
from sqlroute.ops.server import Server, Unreachable, wait_for
from sqlroute.ops.shard import ShardServers


@dataclass(frozen=True, slots=True)
class Fenced:
    """What was done.

    Attributes:
        level: that holds.
        ended: how many client sessions were ended for it.
    """

    level: Level
    ended: int = 0


def fence(shard: ShardServers, node: str, level: Level, epoch: int, timeout: float) -> Fenced:
    """Put a fence on a node, and see that it holds.

    Below L4 the server goes on: its replicas receive all that it has, which is the point of it.
    From L4 on the setting of L3 is left behind in its files where the role may do that: whoever
    starts it again does not open it to clients.

    Args:
        epoch: which the fence ends; its name says it.

    Raises:
        OperationFailed: it does not hold.
        DriverError: the machine does not do it.
    """
    server = shard.server(node)
    match level:
        case Level.L1 | Level.L2 | Level.L3:
            return Fenced(level, _in_sql(server, level, epoch, timeout))
        case Level.L4:
            driver = shard.driver(node, Ability.STOP)
            if driver is None:
                raise OperationFailed(f"{node} has no driver that can stop it; see [drivers]")
            with contextlib.suppress(OperationFailed):
                server.alter(session_preload_libraries=_preload(server, epoch))
            server.close()
            driver.stop(timeout)
            return Fenced(level)
        case Level.L5:
            driver = shard.driver(node, Ability.FENCE)
            if driver is None:
                raise OperationFailed(f"{node} has no command `fence`; see [drivers]")
            driver.fence(timeout)
            return Fenced(level)
        case _:
            raise OperationFailed(f"no fence is possible on {node}")


def unfence(shard: ShardServers, node: str, timeout: float) -> tuple[str, ...]:
    """Take every fence off a node: the user's by his command, then those in SQL.

    Returns:
        The names of the settings that were changed.

    Raises:
        OperationFailed: it does not answer, or refuses.
        DriverError: the user's command fails.
    """
    driver = shard.driver(node, Ability.UNFENCE)
    if driver is not None:
        driver.unfence(timeout)
    return unfence_in_sql(shard.server(node))


def unfence_in_sql(server: Server) -> tuple[str, ...]:
    """Take off what stands in the settings of a server that answers. Raises: OperationFailed."""
    names = server.setting_of_all("synchronous_standby_names")
    libraries = server.setting_of_all("session_preload_libraries")
    before: dict[str, str] = {}
    if fences.epoch_of(libraries) is not None:
        before["session_preload_libraries"] = fences.unfenced(libraries)
    if fences.is_synchronous_fence(names):
        before["synchronous_standby_names"] = fences.synchronous_unfenced(names)
    # what postgresql.conf says is reset, not set: whoever edits that later is to be heard
    changes = {
        name: None if value == server.configured(name) else value for name, value in before.items()
    }
    if server.setting_of_all("default_transaction_read_only") == "on":
        changes["default_transaction_read_only"] = None
    if changes:
        server.alter(**changes)
    return tuple(changes)


def _in_sql(server: Server, level: Level, epoch: int, timeout: float) -> int:
    changes: dict[str, str | None] = {}
    if level >= Level.L3:  # first: who is refused cannot hang for a standby that nobody has
        changes["session_preload_libraries"] = _preload(server, epoch)
    changes["default_transaction_read_only"] = "on"
    if level >= Level.L2 and server.may_alter("synchronous_standby_names"):
        names = server.setting_of_all("synchronous_standby_names")
        changes["synchronous_standby_names"] = fences.synchronous_fenced(names)
    server.alter(**changes)
    if level < Level.L3:
        return server.terminate_others()
    ended, takes_sessions = 0, True

    def holds() -> bool:
        nonlocal ended, takes_sessions
        takes_sessions = not server.is_refused()
        ended += server.terminate_others()  # also before: they may have all connections
        return not takes_sessions and server.others() == 0

    if not wait_for(holds, timeout=timeout):
        what = "still takes sessions" if takes_sessions else "has sessions that do not end"
        raise OperationFailed(f"{server.name} {what}; its fence does not hold")
    return ended


def _preload(server: Server, epoch: int) -> str:
    return fences.fenced(server.setting_of_all("session_preload_libraries"), epoch)


def is_up(server: Server) -> bool:
    """Say if a server answers the operator."""
    try:
        server.is_standby()
    except Unreachable:
        return False
    return True


__all__ = ["DriverError", "Fenced", "fence", "is_up", "unfence", "unfence_in_sql"]
