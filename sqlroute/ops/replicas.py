"""Adding a replica to a shard, and taking one away.

A new one is copied from the node with the fewest sessions, replicas first, follows the primary, and
is announced to the routers only when it has replayed what was written down about it: the row of the
operation itself is the proof.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sqlroute import operations
from sqlroute.catalog import nodes
from sqlroute.errors import DriverError, OperationFailed, OperationRefused
from sqlroute.ops import rejoining, synchronous
from sqlroute.ops.drivers import Ability, Driver
from sqlroute.ops.drivers.base import Counted
from sqlroute.ops.records import Records, new_id
from sqlroute.ops.server import Server, Unreachable, wait_for
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.topology import Node, Place

ADD = "replica add"
COPY_TIME = 24 * 3600.0
"""Seconds that a copy may take."""

_NEEDED = (Ability.CLONE, Ability.CONFIGURE, Ability.START, Ability.STOP)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

_HAS = "SELECT EXISTS (SELECT FROM sqlroute.operation WHERE id = %s)"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Addition:
    """A replica to be.

    Attributes:
        source: the node to copy; empty for the least loaded one.
        keeps_slot: it has a replication slot for good, as its siblings have.
    """

    place: Place
    source: str = ""
    keeps_slot: bool = False

    def written(self) -> dict[str, Any]:
        return asdict(self)


def place(name: str, address: str, zone: str = "", weight: float = 1.0) -> Place:
    """Return where a new node stands.

    Raises:
        OperationRefused: the address is no ``host:port``.
    """
    try:
        host, port = operations.address(address, 5432)
    except ValueError as error:
        raise OperationRefused(f"{error}; write it as db-d.internal:5432") from None
    return Place(name, host, port, zone, weight)


def read_addition(values: dict[str, Any]) -> Addition:
    """Return what :meth:`Addition.written` has given."""
    return Addition(Place(**values["place"]), values["source"], values["keeps_slot"])


def plan_addition(
    shard: ShardServers, look: Look, primary: str, place: Place, source: str
) -> tuple[Addition, Node]:
    """Check what is asked for, and choose the node to copy from; changes nothing.

    Raises:
        OperationRefused: it cannot be, and why.
    """
    if not _NAME.fullmatch(place.name):
        raise OperationRefused(f"{place.name!r} is no name of a node: letters, digits, _ . -")
    if place.name in shard.nodes:
        raise OperationRefused(
            f"shard {shard.name} has a node {place.name} already; `sqlroute rejoin {place.name} "
            "--clone` copies it anew"
        )
    other = shard.named(place.host, place.port)
    if other:
        raise OperationRefused(f"{place.host}:{place.port} is node {other} already")
    if primary not in look.rows:
        raise OperationRefused(
            f"{primary} has no sqlroute catalog, where the replica would be announced; run "
            "`sqlroute catalog install`"
        )
    if source and (source not in look.facts or not look.facts[source].answers):
        raise OperationRefused(f"{source} cannot be copied: it does not answer or is unknown")
    node = shard.nodes[primary].placed(place)
    found = source or _least_loaded(shard, look)
    return Addition(place, found, rejoining.uses_slots(shard, primary, place.name)), node


def add(
    shard: ShardServers,
    primary: str,
    addition: Addition,
    node: Node,
    *,
    operation: str = "",
    say: Say,
    counted: Counted,
    timeout: float,
) -> dict[str, Any]:
    """Copy, start, verify and announce a replica.

    Args:
        operation: to go on with, after its command was killed.

    Raises:
        OperationRefused: its machine cannot be reached, or something runs there.
        OperationFailed, DriverError: it failed; run `sqlroute op resume` or `op abort`.
    """
    shard.add(node)
    driver = _driver_for(shard, node.name)
    server, new = shard.servers[primary], shard.servers[node.name]
    records = Records(operation or new_id())
    if operation:
        records.take_over(server)
    else:
        _refuse_running(driver, new)
        records.begin(server, ADD, shard.name, addition.written())
    done: list[dict[str, Any]] = []
    try:
        for name, work in _steps(shard, primary, addition, driver, records.id, counted, timeout):
            say(name)
            records.begun(name)
            records.write(server)
            detail = work()
            records.ended(name, "done", 0.0, detail)
            done.append({"step": name, **detail})
    except (OperationFailed, DriverError) as error:
        raise OperationFailed(
            f"adding {node.name} failed: {error}; `sqlroute op resume {records.id}` tries again, "
            f"`sqlroute op abort {records.id}` gives it up",
            operation=records.id,
        ) from error
    report = {"operation": records.id, "node": node.name, "shard": shard.name, "steps": done}
    records.end(server, "done", report)
    return {**report, "source": addition.source, "primary": primary}


def give_up(
    shard: ShardServers, primary: str, addition: Addition, operation: str, timeout: float
) -> list[str]:
    """Take back what an addition has left: its announcement, its server, its slot.

    Its data directory stays.

    Returns:
        What was done.

    Raises:
        DriverError: its server does not stop.
    """
    server, name = shard.servers[primary], addition.place.name
    done = []
    row = server.shard_row()
    if row is not None and any(n == name and not gone for n, _, gone in row.announced):
        server.transaction((nodes.REMOVE, (name, shard.name)))
        done.append(f"{name} is announced no more")
    if name not in shard.nodes:
        shard.add(shard.nodes[primary].placed(addition.place))
    driver = shard.driver(name, Ability.STOP)
    if driver is not None and driver.is_running():
        driver.stop(timeout)
        done.append(f"{name} stopped")
    slot = rejoining.slot_of(name)
    wait_for(lambda: _is_free(server, slot), timeout=timeout, pause=0.05)
    server.drop_slots([slot])
    records = Records(operation)
    records.take_over(server)
    records.end(server, "aborted", {"node": name})
    return [*done, f"slot {slot} dropped"]


def remove(
    shard: ShardServers, look: Look, primary: str, node: str, *, stops: bool, timeout: float
) -> dict[str, Any]:
    """Take a replica away: the routers first, then the server, then its slot.

    Args:
        stops: its server is stopped where a driver can; else it only receives no more.

    Raises:
        OperationRefused: it is the primary, others follow it, or commits would hang without it.
        OperationFailed, DriverError: it failed midway; run it again.
    """
    if node == primary:
        raise OperationRefused(
            f"{node} is the primary; promote another first with `sqlroute promote {shard.name}`"
        )
    followers = [name for name, source in look.follows.items() if source == node]
    if followers:
        raise OperationRefused(
            f"{', '.join(followers)} follow(s) {node}; let them follow the primary first with "
            f"`sqlroute rejoin {followers[0]}`"
        )
    _refuse_hanging_commits(look, primary, node)
    server = shard.servers[primary]
    slot = look.facts[node].setting("primary_slot_name") if look.facts[node].answers else ""
    rows = server.transaction((nodes.REMOVE, (node, shard.name)))
    if not rows:
        raise OperationFailed(f"the catalog of shard {shard.name} has no row to announce it in")
    how = _take_down(shard, node, stops=stops, timeout=timeout)
    wait_for(lambda: not _has_walsender(server, node), timeout=timeout, pause=0.05)
    names = [name for name in {slot, rejoining.slot_of(node)} if name]
    server.drop_slots(names)
    return {"node": node, "shard": shard.name, "server": how, "revision": rows[0]["revision"]}


# inside


def _steps(
    shard: ShardServers,
    primary: str,
    addition: Addition,
    driver: Driver,
    operation: str,
    counted: Counted,
    timeout: float,
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    name = addition.place.name
    server, new = shard.servers[primary], shard.servers[name]
    slot = rejoining.slot_of(name)

    def reserve() -> dict[str, Any]:
        return {"slot": slot, "created": server.create_slot(slot)}

    def copy() -> dict[str, Any]:
        if driver.is_running():
            driver.stop(timeout)
        source = shard.servers[addition.source].node.conninfo()
        driver.clone(source, slot=None, timeout=COPY_TIME, progress=counted, replace=True)
        return {"source": addition.source}

    def start() -> dict[str, Any]:
        driver.make_standby(rejoining.conninfo(shard, name, primary), slot)
        driver.start(timeout)
        return {}

    def verify() -> dict[str, Any]:
        if not wait_for(lambda: _has(new, operation), timeout=timeout, pause=0.02):
            raise OperationFailed(
                f"{name} runs and has not replayed the row of operation {operation} after "
                f"{timeout:g} s; look at its log"
            )
        return {}

    def announce() -> dict[str, Any]:
        if not addition.keeps_slot:
            new.alter(primary_slot_name="")
            wait_for(lambda: _is_free(server, slot), timeout=timeout, pause=0.05)
            server.drop_slots([slot])
        values = (name, shard.name, nodes.url_of(shard.nodes[name]))
        rows = server.transaction((nodes.ADD, values))
        if not rows:
            raise OperationFailed(f"the catalog knows {name} as a node of another shard")
        return {"revision": rows[0]["revision"], "keeps_slot": addition.keeps_slot}

    yield "reserve", reserve
    yield "copy", copy
    yield "start", start
    yield "verify", verify
    yield "announce", announce


def _has(server: Server, operation: str) -> bool:
    try:
        return bool(server.value(_HAS, (operation,)))
    except OperationFailed:
        return False


def _is_free(server: Server, slot: str) -> bool:
    return not server.rows(
        "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active", (slot,)
    )


def _has_walsender(server: Server, node: str) -> bool:
    return bool(server.rows("SELECT FROM pg_stat_replication WHERE application_name = %s", (node,)))


def _driver_for(shard: ShardServers, node: str) -> Driver:
    driver = shard.driver(node, *_NEEDED)
    if driver is None:
        raise OperationRefused(
            f"{node} has no driver that can copy, configure and start it; add one to [drivers], by "
            "its name or a pattern"
        )
    return driver


def _refuse_running(driver: Driver, server: Server) -> None:
    if driver.is_running():
        raise OperationRefused(f"a server runs in the data directory of {server.name} already")
    try:
        server.is_standby()
    except Unreachable as error:
        if error.refused:
            return
        raise OperationRefused(
            f"something listens at {server.node.host}:{server.node.port} that is no server of ours "
            f"({error}); choose another address"
        ) from error
    raise OperationRefused(
        f"a server answers at {server.node.host}:{server.node.port} already; stop it, or choose "
        "another address"
    )


def _least_loaded(shard: ShardServers, look: Look) -> str:
    """Return the node to copy from: a replica before the primary, then who has fewest sessions."""
    there = [name for name, facts in look.facts.items() if facts.answers]
    loads = shard.each(lambda name: shard.servers[name].others(), there)
    return min(there, key=lambda name: (look.facts[name].is_primary, loads[name]))


def _take_down(shard: ShardServers, node: str, *, stops: bool, timeout: float) -> str:
    driver = shard.driver(node, Ability.STOP)
    if driver is not None and stops:
        shard.servers[node].close()
        if driver.is_running():
            driver.stop(timeout)
        return "stopped"
    try:
        shard.servers[node].stop_receiving()
    except OperationFailed as error:
        return f"not reached ({error})"
    return "receives no more"


def _refuse_hanging_commits(look: Look, primary: str, node: str) -> None:
    quorum = synchronous.parsed(look.facts[primary].setting("synchronous_standby_names"))
    if quorum is None:
        return
    left = {
        facts.setting("cluster_name") or facts.name
        for facts in look.facts.values()
        if facts.is_replica and facts.name != node
    }
    if not quorum.can_be_met(left):
        raise OperationRefused(
            f"without {node} only {', '.join(sorted(left)) or 'nobody'} would be there, and "
            f"{primary} waits for {quorum}: every commit would hang; change "
            f"synchronous_standby_names of {primary} first"
        )
