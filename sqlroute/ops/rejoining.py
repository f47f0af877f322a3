"""Bringing a node back as a replica of the primary, and pointing replicas at another node.

A former primary that was stopped cleanly before the timelines forked is only started as a standby;
one that went on or crashed is rewound first, and cloned where that is impossible. The proof is the
row of the journal, replayed by it: a diverged standby shows ``streaming`` for moments.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from sqlroute.errors import DriverError, OperationFailed, OperationRefused
from sqlroute.ops.drivers import Ability, Driver
from sqlroute.ops.drivers.base import Counted
from sqlroute.ops.server import Server, stopped_from, wait_for
from sqlroute.ops.shard import ShardServers
from sqlroute.routing.token import parse_lsn

PROOF = 15.0
"""Seconds for which a standby that was started may take to replay the journal's row."""

_NOT_OURS = ("hostaddr", "application_name", "fallback_application_name")


def no_count(done: int, whole: int) -> None:
    """Hear of progress and do nothing."""


def rejoin(
    shard: ShardServers,
    node: str,
    primary: str,
    *,
    epoch: int,
    timeout: float = 60.0,
    clones: bool = False,
    counted: Counted = no_count,
) -> dict[str, Any]:
    """Make a node a replica of the primary, by the cheapest way that works.

    Args:
        epoch: of the row of the journal that it must replay.
        clones: its data directory may be replaced by a new copy where nothing less helps.
        counted: told of a copy's progress.

    Returns:
        ``way``: ``follow``, ``start``, ``rewind`` or ``clone``; and what was seen.

    Raises:
        OperationRefused: it has no driver that can do it.
        OperationFailed, DriverError: it did not come back.
    """
    server = shard.server(node)
    if _follows_already(shard, node, primary, epoch):
        return {"way": "follow"}
    driver = shard.driver(node, Ability.STOP, Ability.START, Ability.CONFIGURE)
    if driver is None:
        raise OperationRefused(
            f"{node} has no driver that can stop, configure and start it; name one in [drivers], "
            f"or bring it back by hand as a standby of {primary}"
        )
    server.close()
    _bring_down(driver, timeout)
    slot = slot_of(node) if uses_slots(shard, primary, node) else None
    if slot is not None:
        shard.servers[primary].create_slot(slot)
    source = conninfo(shard, node, primary)
    ways = _ways(shard, driver, primary, clones)
    failures: list[str] = []
    for way in ways:
        try:
            _prepare(shard, driver, way, primary, slot, timeout, counted)
            driver.make_standby(source, slot)
            driver.start(timeout)
            _await_proof(server, epoch, PROOF if way != ways[-1] else timeout)
        except (DriverError, OperationFailed) as error:
            failures.append(f"{way}: {error}")
            with contextlib.suppress(DriverError):
                _bring_down(driver, timeout)
            server.close()
        else:
            return {"way": way, "slots_dropped": _drop_slots(server), "failed": failures}
    hint = "" if clones else f"; `sqlroute rejoin {node} --clone` copies it anew"
    raise OperationFailed(f"{node} did not come back ({'; '.join(failures)}){hint}")


def follow(shard: ShardServers, replicas: Iterable[str], source: str) -> None:
    """Let replicas receive from another node from now on; their slots keep their names."""
    host, port = shard.address(source)

    def point(name: str) -> None:
        server = shard.servers[name]
        server.follow(host, port, server.setting("primary_slot_name") or None)

    names = list(replicas)
    if names:
        shard.each(point, names)


def streams_from(shard: ShardServers, replica: str) -> str:
    """Return the node that a replica streams from now, empty if none of the shard's."""
    receiver = shard.servers[replica].receiver()
    if receiver is None or receiver["status"] != "streaming" or not receiver["sender_host"]:
        return ""
    return shard.named(receiver["sender_host"], receiver["sender_port"])


def conninfo(shard: ShardServers, node: str, primary: str) -> str:
    """Return the ``primary_conninfo`` with which a node follows the primary.

    As whom it connects is what it had itself, else what another node of the shard has.
    """
    known = _known_conninfo(shard, node, primary)
    for name in _NOT_OURS:
        known.pop(name, None)
    host, port = shard.address(primary)
    return make_conninfo("", **{**known, "host": host, "port": port})


def slot_of(node: str) -> str:
    """Return the name of a node's replication slot: its own, in the letters that are allowed."""
    return re.sub(r"[^a-z0-9_]", "_", node.lower())[:63]


def slots(shard: ShardServers, replicas: Iterable[str]) -> dict[str, str]:
    """Return the slot that each replica uses where it receives from; empty for none."""
    return {name: shard.servers[name].setting("primary_slot_name") for name in replicas}


def _follows_already(shard: ShardServers, node: str, primary: str, epoch: int) -> bool:
    server = shard.servers[node]
    try:
        if not server.is_standby():
            return False
        if streams_from(shard, node) != primary:
            return False
        return wait_for(lambda: server.journal_epoch() >= epoch, timeout=1.0, pause=0.01)
    except OperationFailed:
        return False


def _bring_down(driver: Driver, timeout: float) -> None:
    """Stop a server; one that hangs is killed: it is to be overwritten, not to be saved."""
    if not driver.is_running():
        return
    try:
        driver.stop(timeout)
    except DriverError:
        driver.kill(timeout)


def _ways(shard: ShardServers, driver: Driver, primary: str, clones: bool) -> tuple[str, ...]:
    """Return what to try, in order."""
    ways: list[str] = []
    try:
        control = driver.control()
    except DriverError:  # there is no data directory, or it is damaged
        return ("clone",) if clones else ("start",)
    fork = _fork_after(shard.servers[primary], control.timeline)
    was_standby = control.state in ("shut down in recovery", "in archive recovery")
    is_before_fork = control.was_clean_shutdown and fork is not None and control.checkpoint < fork
    if was_standby or is_before_fork:
        ways.append("start")
    if control.can_rewind and Ability.REWIND in driver.abilities:
        ways.append("rewind")
    if clones and Ability.CLONE in driver.abilities:
        ways.append("clone")
    return tuple(ways) or ("start",)


def _prepare(
    shard: ShardServers,
    driver: Driver,
    way: str,
    primary: str,
    slot: str | None,
    timeout: float,
    counted: Counted,
) -> None:
    source = shard.servers[primary].node.conninfo()
    if way == "rewind":
        # on 15 the control file of a new primary shows its old timeline until a checkpoint
        shard.servers[primary].checkpoint(timeout)
        driver.rewind(source, timeout, lambda _: None)
    elif way == "clone":
        driver.clone(source, slot=slot, timeout=24 * 3600, progress=counted, replace=True)


def _await_proof(server: Server, epoch: int, timeout: float) -> None:
    def has_row() -> bool:
        try:
            return server.is_standby() and server.journal_epoch() >= epoch
        except OperationFailed:
            return False

    if not wait_for(has_row, timeout=timeout, pause=0.01):
        raise OperationFailed(
            f"{server.name} runs and has not replayed the journal's row of epoch {epoch} after "
            f"{timeout:g} s"
        )


def _fork_after(primary: Server, timeline: int) -> int | None:
    """Return where the shard left a timeline, ``None`` if it has not, or nobody wrote it down."""
    rows = primary.rows(
        "SELECT fork::text AS fork FROM sqlroute.journal WHERE timeline > %s AND fork IS NOT NULL"
        " ORDER BY timeline LIMIT 1",
        (timeline,),
    )
    return parse_lsn(rows[0]["fork"]) if rows else None


def uses_slots(shard: ShardServers, primary: str, node: str) -> bool:
    """Say if replicas of the shard have slots on the primary, or this one has.

    Right after a promotion none is active: their receivers change to the new timeline.
    """
    return bool(
        shard.servers[primary].rows(
            "SELECT FROM pg_replication_slots WHERE slot_type = 'physical'"
            " AND (active OR slot_name = %s) LIMIT 1",
            (slot_of(node),),
        )
    )


def _drop_slots(server: Server) -> list[str]:
    """Drop the slots that a former primary had for its replicas: they would keep log for ever."""
    rows = server.rows(
        "SELECT slot_name AS name FROM pg_replication_slots WHERE slot_type = 'physical'"
        " AND NOT active"
    )
    names = [row["name"] for row in rows]
    if names:
        server.drop_slots(names)
    return names


def _known_conninfo(shard: ShardServers, node: str, primary: str) -> dict[str, Any]:
    driver = shard.driver(node, Ability.CONFIGURE)
    found: list[str] = []
    if driver is not None:
        with contextlib.suppress(DriverError):
            found.append(driver.settings().get("primary_conninfo", ""))
    for name in (node, primary, *shard.servers):
        with contextlib.suppress(OperationFailed):
            if shard.servers[name].is_connected:
                found.append(shard.servers[name].setting("primary_conninfo"))
    for text in found:
        values = conninfo_to_dict(text)
        if values and (values.get("user") or stopped_from(values) is not None):
            return dict(values)
    own = shard.servers[primary].node.conninfo()
    return {k: v for k, v in own.items() if k in ("user", "password", "passfile", "sslmode")}
