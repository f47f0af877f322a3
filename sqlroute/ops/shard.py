"""All servers of one shard, as an operator's command sees them: connections, drivers, facts.

Looks at all of them at once, each under its own time limit, so that one that hangs costs no more
than that. Decides nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict

from sqlroute.catalog.nodes import place_of
from sqlroute.config import Settings
from sqlroute.errors import DriverError, OperationFailed, OperationRefused
from sqlroute.operations import Operations
from sqlroute.ops import managed
from sqlroute.ops.drivers import Ability, Driver, driver_of, operator_node
from sqlroute.ops.preflight import NodeFacts
from sqlroute.ops.server import Server, ShardRow, Unreachable, is_at, stopped_from
from sqlroute.topology import Node

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that a server may take to answer a question."""

_LOCK = "hashtextextended('sqlroute operation', 0)"
_TAKE = f"SELECT pg_try_advisory_lock({_LOCK})"


@dataclass(frozen=True, slots=True)
class Look:
    """The shard as it was seen at one moment.

    Attributes:
        rows: the shard's row as each node that answers shows it.
        follows: where each standby is *told* to receive from, by name; empty for nowhere.
        epochs: the newest row of the journal that each node has; 0 for none.
    """

    facts: Mapping[str, NodeFacts]
    rows: Mapping[str, ShardRow]
    follows: Mapping[str, str]
    epochs: Mapping[str, int]

    @property
    def primaries(self) -> tuple[str, ...]:
        return tuple(name for name, facts in self.facts.items() if facts.is_primary)

    @property
    def epoch(self) -> int:
        return max((row.epoch for row in self.rows.values()), default=0)


class ShardServers:
    """The servers of a shard. Use as a context manager: it closes the connections.

    Those that ``sqlroute replica add`` has announced belong to it from the first look on.
    """

    def __init__(self, settings: Settings, shard: str, *, patience: float = PATIENCE) -> None:
        self.operations: Operations = settings.operations
        self.name = shard
        self.nodes: dict[str, Node] = {}
        self.servers: dict[str, Server] = {}
        self.drivers: dict[str, Driver | None] = {}
        self._managed: dict[str, str] = {}
        self._patience = patience
        self._configured = settings.topology.shard(shard).nodes
        for node in self._configured:
            self.add(node)
        self._pool = ThreadPoolExecutor(16, f"sqlroute-{shard}")

    def __repr__(self) -> str:
        return f"<ShardServers {self.name}: {', '.join(self.nodes)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self.servers.values():
            server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def add(self, node: Node) -> None:
        """Let a node belong to the shard, for this command."""
        self.nodes[node.name] = node
        self.servers[node.name] = Server(
            operator_node(node, self.operations), patience=self._patience
        )
        self.drivers[node.name] = driver_of(node, self.name, self.operations)

    def drop(self, node: str) -> None:
        """Let a node belong to the shard no more."""
        del self.nodes[node], self.drivers[node]
        self.servers.pop(node).close()

    def server(self, node: str) -> Server:
        """Return a server by the name of its node.

        Raises:
            OperationRefused: the shard has none of that name.
        """
        found = self.servers.get(node)
        if found is None:
            raise OperationRefused(
                f"shard {self.name} has no node {node!r}; known: {', '.join(self.nodes)}"
            )
        return found

    def driver(self, node: str, *needed: Ability) -> Driver | None:
        """Return the driver of a node, ``None`` where there is none that can do all of it."""
        found = self.drivers[node]
        return found if found is not None and found.abilities.issuperset(needed) else None

    def address(self, node: str) -> tuple[str, int]:
        """Return host and port by which the other servers reach a node."""
        return self.operations.advertised(self.nodes[node], self.name)

    def named(self, host: str, port: int) -> str:
        """Return the node at an address, empty if it is none of the shard's."""
        for name, node in self.nodes.items():
            own = self.servers[name].node
            places = (self.address(name), (own.host, node.port))
            if any(is_at(str(host), int(port), *place) for place in places):
                return name
        return ""

    def each(self, work: Callable[[str], T], nodes: Iterable[str]) -> dict[str, T]:
        """Do something with several nodes at once; the first error is raised when all are done."""
        names = list(nodes)
        if len(names) == 1:
            return {names[0]: work(names[0])}
        futures = {name: self._pool.submit(work, name) for name in names}
        with contextlib.suppress(Exception):
            for future in futures.values():
                future.exception()
        return {name: future.result() for name, future in futures.items()}

    def look(self) -> Look:
        """Ask every node for what a promotion wants to know; one that is silent has an error."""
        seen = self.each(self._seen, self.nodes)
        new = self._adopt([row for _, row, _ in seen.values() if row is not None])
        if new:
            seen.update(self.each(self._seen, new))
        seen = {name: found for name, found in seen.items() if name in self.nodes}
        follows = {
            name: self._followed(facts) for name, (facts, _, _) in seen.items() if facts.is_replica
        }
        return Look(
            facts={name: self._with_upstream(facts) for name, (facts, _, _) in seen.items()},
            rows={name: row for name, (_, row, _) in seen.items() if row is not None},
            follows=follows,
            epochs={name: epoch for name, (facts, _, epoch) in seen.items() if facts.answers},
        )

    @contextlib.contextmanager
    def locked(self, look: Look) -> Iterator[None]:
        """Keep other commands from the shard: a lock on each node that answers.

        On a standby an advisory lock excludes who else asks there, too. It goes with the
        connection, so a command that was killed leaves none; a connection that is opened again, or
        later, takes it first.

        Raises:
            OperationRefused: another command has one of them.
        """
        answering = [name for name, facts in look.facts.items() if facts.answers]
        for name in sorted(answering):
            if not self.servers[name].value(_TAKE):
                holder = self.servers[name].rows(
                    "SELECT pid, client_addr::text AS address FROM pg_locks JOIN pg_stat_activity"
                    " USING (pid) WHERE locktype = 'advisory' AND granted AND objsubid = 1"
                    " AND pid <> pg_backend_pid()"
                )
                who = f" (session {holder[0]['pid']} on {name})" if holder else ""
                raise OperationRefused(
                    f"another command works on shard {self.name}{who}; wait for its end, and look "
                    "at it with `sqlroute op list`"
                )
        for server in self.servers.values():
            server.claim = _TAKE
        try:
            yield
        finally:
            for server in self.servers.values():
                server.claim = ""
            for name in answering:
                with contextlib.suppress(OperationFailed):
                    if name in self.servers and self.servers[name].is_connected:
                        self.servers[name].rows(f"SELECT pg_advisory_unlock({_LOCK})")

    # inside

    def _seen(self, name: str) -> tuple[NodeFacts, ShardRow | None, int]:
        driver = self.drivers[name]
        abilities = frozenset(map(str, driver.abilities if driver is not None else ()))
        server = self.servers[name]
        try:
            told = server.facts()
            row = server.shard_row()
            epoch = server.journal_epoch() if row is not None else 0
            if told["standby"] and row is not None:
                # without a receiver the control file tells, late; what was replayed is not late
                told["timeline"] = max(told["timeline"] or 0, row.timeline or 0)
        except Unreachable as error:
            silent = NodeFacts(
                name,
                error=str(error),
                is_refused=error.refused,
                is_hung=error.hung,
                abilities=abilities,
            )
            return silent, None, 0
        except OperationFailed as error:
            return NodeFacts(name, error=str(error), abilities=abilities), None, 0
        return (
            NodeFacts(name, told=told, abilities=abilities, managed_by=self._managed_by(name)),
            row,
            epoch,
        )

    def _managed_by(self, name: str) -> str:
        """Return who else runs a server; asked once."""
        if name not in self._managed:
            self._managed[name] = managed.managed_by(self.servers[name].row(managed.QUERY))
        return self._managed[name]

    def _adopt(self, rows: Iterable[ShardRow]) -> list[str]:
        """Add the nodes that the catalog announces, drop those that it has removed."""
        newest = max(rows, key=lambda row: row.revision, default=None)
        if newest is None or not newest.announced:
            return []
        new = []
        for name, url, is_removed in newest.announced:
            if is_removed:
                if name in self.nodes and len(self.nodes) > 1:
                    self.drop(name)
            elif name not in self.nodes:
                self.add(self._configured[0].placed(place_of(name, url)))
                new.append(name)
        return new

    def _followed(self, facts: NodeFacts) -> str:
        told = conninfo_to_dict(facts.setting("primary_conninfo"))
        if not told or stopped_from(told) is not None:
            return ""
        host = told.get("hostaddr") or told.get("host") or "localhost"
        return self.named(str(host), int(told.get("port") or 5432))

    def _with_upstream(self, facts: NodeFacts) -> NodeFacts:
        receiver: Any = facts.told.get("receiver") if facts.answers else None
        if not receiver or not receiver["sender_host"]:
            return facts
        return replace(facts, upstream=self.named(receiver["sender_host"], receiver["sender_port"]))


def is_down(driver: Driver | None) -> bool:
    """Say if a driver sees that no process of the server is there; False without proof."""
    if driver is None:
        return False
    try:
        return not driver.is_running()
    except DriverError:
        return False
