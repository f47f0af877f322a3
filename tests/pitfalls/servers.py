"""The servers of the scenarios, and what a scenario asks of them past any router.

Three topologies: a primary with two replicas that are held 3 s behind; a primary with one replica
that may change their roles; and two shards. The last two are started when a scenario needs them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import psycopg
import sqlalchemy as sa

from sqlroute.local.node import LocalNode, Role
from sqlroute.local.topology import LocalTopology

from .models import FUNCTIONS, SEEDED, Base

BEHIND = 3.0
"""Seconds that the replicas are held behind."""

Start = Callable[..., LocalTopology]


def url(node: LocalNode) -> sa.URL:
    """Return the URL of a node for ``create_engine``."""
    parts = node.conninfo
    return sa.URL.create(
        "postgresql+psycopg",
        parts["user"],
        parts["password"],
        parts["host"],
        parts["port"],
        parts["dbname"],
    )


def ask(node: LocalNode, statement: str, *, autocommit: bool = True) -> list[tuple[Any, ...]]:
    """Run SQL on a node over a connection of its own."""
    with psycopg.connect(**node.conninfo, autocommit=autocommit) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def until(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait until it is true.

    Raises:
        TimeoutError: it did not become true.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not become true within {timeout:g} s")
        time.sleep(0.005)


def _is_true(node: LocalNode, question: str) -> bool:
    return bool(ask(node, question)[0][0])


class Servers:
    """A primary and its replicas.

    Attributes:
        topology: the servers.
        primary, replicas: in their present roles.
    """

    def __init__(self, topology: LocalTopology) -> None:
        self.topology = topology
        self.primary, *self.replicas = topology.nodes
        if self.primary.role() is not Role.PRIMARY:
            self.primary, self.replicas[0] = self.replicas[0], self.primary
        self._names = {node.port: node.name for node in topology.nodes}
        self._seeded = iter(SEEDED)
        self._new = itertools.count(SEEDED.stop)

    def node(self, port: int) -> str:
        return self._names.get(port, "")

    def place(self, port: int) -> str:
        """Say in words which node has a port."""
        return "on the primary" if port == self.primary.port else "on a replica"

    def row(self) -> int:
        """Return the id of a box that every node has, with value 1, and that no one else uses."""
        return next(self._seeded)

    def new(self) -> int:
        """Return an id that is free in every table."""
        return next(self._new)

    def on_primary(self, statement: str) -> Any:
        """Run SQL on the primary, as another program; return the first value if there is one."""
        rows = ask(self.primary, statement)
        return rows[0][0] if rows else None

    def value(self, box: int) -> int | None:
        """Return what the primary holds for a box, ``None`` if it has no such box."""
        found: int | None = self.on_primary(f"SELECT value FROM box WHERE id = {box}")
        return found

    def written(self, box: int, value: int) -> None:
        """Write a box on the primary, as another program."""
        self.on_primary(
            f"INSERT INTO box (id, value) VALUES ({box}, {value}) "
            f"ON CONFLICT (id) DO UPDATE SET value = excluded.value"
        )

    def settle(self, *nodes: LocalNode) -> None:
        """Wait until replicas have replayed what the primary has written."""
        lsn = self.on_primary("SELECT pg_current_wal_flush_lsn()")
        reached = f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'"
        for node in nodes or self.replicas:
            until(partial(_is_true, node, reached))

    def hold(self, seconds: float, *nodes: LocalNode) -> None:
        """Hold replicas behind; 0 lets them follow at once."""
        chosen = nodes or tuple(self.replicas)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.hold_replay(seconds), chosen))

    @contextmanager
    def following(self, *nodes: LocalNode) -> Iterator[None]:
        """Let replicas follow at once meanwhile, and begin with all that is written."""
        chosen = nodes or tuple(self.replicas)
        self.hold(0, *chosen)
        self.settle(*chosen)
        try:
            yield
        finally:
            self.hold(BEHIND, *chosen)

    def switch(self) -> None:
        """Make the replica the primary and the primary its replica, as an operator does."""
        old, new = self.primary, self.replicas[0]
        old.stop()
        ask(new, "SELECT pg_promote()")
        conninfo = psycopg.conninfo.make_conninfo(
            "", **{**new.conninfo, "application_name": old.name}
        )
        with (old.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"primary_conninfo = '{conninfo}'\n")
        signal = old.data / "standby.signal"
        signal.touch(mode=0o600)
        if old.account.switches:
            os.chown(signal, old.account.uid, old.account.gid)
        old.start()
        self.primary, self.replicas = new, [old]
        self.settle()


class World:
    """All servers of the scenarios.

    Args:
        start: starts a topology: ``start(shards=, replicas=, label=)``.
    """

    def __init__(self, start: Start) -> None:
        self._start = start

    @cached_property
    def main(self) -> Servers:
        """A primary and two replicas that have all seeds and are then held behind."""
        found = Servers(self._start(shards=1, replicas=2, label="pitfalls"))
        found.hold(0)
        _seed(found)
        found.hold(BEHIND)
        return found

    @cached_property
    def pair(self) -> Servers:
        """A primary and one replica, not held behind: a scenario may change their roles."""
        found = Servers(self._start(shards=1, replicas=1, label="pitfalls"))
        _seed(found)
        return found

    @cached_property
    def shards(self) -> LocalTopology:
        return self._start(shards=2, replicas=0, label="pitfalls")


def _seed(servers: Servers) -> None:
    engine = sa.create_engine(url(servers.primary))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        Base.metadata.create_all(connection)
        connection.exec_driver_sql(FUNCTIONS)
        connection.exec_driver_sql(
            "INSERT INTO box (id, value) "
            f"SELECT id, 1 FROM generate_series({SEEDED.start}, {SEEDED.stop - 1}) AS id"
        )
        # A statement that a contender sends to the wrong place must not block the others.
        connection.exec_driver_sql("ALTER ROLE ALL SET lock_timeout = '5s'")
    engine.dispose()
    servers.settle()
