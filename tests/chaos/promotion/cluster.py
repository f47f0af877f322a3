"""The servers of a scenario, with what its clients and its operator are told of them."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import psycopg
from psycopg import sql

from sqlroute import Router
from sqlroute.config import Settings, load
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.ops.server import wait_for
from tests.chaos.cable import Cable, State

from .history import Place, Row, Stamp
from .models import STAMPS, Base

SHARD = "s0"

SETTLE = 40.0
"""Seconds in which every node must be back on the primary's timeline."""

POLICY = {"probe_interval": "200ms", "deadline": "20s", "primary_wait": "15s"}

_PLACE = """
SELECT NOT pg_is_in_recovery(),
       coalesce((SELECT max(epoch) FROM sqlroute.journal), 0),
       CASE WHEN pg_is_in_recovery()
           THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver), 0)
           ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
"""


class Cluster:
    """One shard. Use as a context manager: it lays the cables, and makes the tables.

    Args:
        has_cables: clients reach each node by a cable, and nodes each other by another, so that
            they can be cut.
        policy: of the routers.

    Attributes:
        config: of the routers.
        operator: the configuration of the operator, who reaches each node directly, as plain
            values that other processes can be given; ``settings`` is the same, loaded.
    """

    def __init__(
        self,
        topology: LocalTopology,
        *,
        has_cables: bool = False,
        policy: Mapping[str, str] = POLICY,
    ) -> None:
        self.topology = topology
        self.names = tuple(node.name for node in topology.nodes)
        self.front: dict[str, Cable] = {}
        self.back: dict[str, Cable] = {}
        self.config: dict[str, Any] = {}
        self.operator: dict[str, Any] = {}
        self.settings: Settings
        self._has_cables = has_cables
        self._policy = dict(policy)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            text = self.topology.config_path.read_text()
            known = tomllib.loads(text)
            if self._has_cables:
                for node in self.topology.nodes:
                    own = node.conninfo["host"], node.port
                    self.front[node.name] = stack.enter_context(Cable(*own))
                    self.back[node.name] = stack.enter_context(Cable(*own))
                    text = text.replace(f":{node.port}/", f":{self.front[node.name].port}/")
                driver = known["drivers"]["*"]
                known["drivers"] = {
                    name: {**driver, "advertise": f"127.0.0.1:{cable.port}"}
                    for name, cable in self.back.items()
                }
            self.operator, self.settings = known, load(known)
            self.config = {**tomllib.loads(text), "policy": self._policy}
            with Router.from_config(self.topology.config_path) as router:
                router.create_all(Base.metadata)
            with self.connect(self.primary()) as connection:
                connection.execute(STAMPS.encode())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def node(self, name: str) -> LocalNode:
        return self.topology.node(name)

    def connect(self, name: str) -> psycopg.Connection[Any]:
        return psycopg.connect(**self.node(name).conninfo, autocommit=True, connect_timeout=3)

    @property
    def addresses(self) -> tuple[Mapping[str, Any], ...]:
        """Where a stranger finds the nodes."""
        return tuple(
            {k: node.conninfo[k] for k in ("host", "port", "dbname")}
            for node in self.topology.nodes
        )

    def primary(self) -> str:
        """Return the primary that answers.

        Raises:
            LookupError: not one node does.
        """
        found = [place.name for place in self.places() if place.is_primary]
        if len(found) != 1:
            raise LookupError(f"not one primary: {', '.join(found) or 'none'}")
        return found[0]

    def replicas(self) -> list[str]:
        return [place.name for place in self.places() if not place.is_primary]

    def places(self) -> tuple[Place, ...]:
        """Return where each node that answers stands."""
        found = (self._place(name) for name in self.names)
        return tuple(place for place in found if place is not None)

    def settled(self) -> tuple[Place, ...]:
        """Return where the nodes stand as soon as all agree; as they do not, after a while."""

        def agreed() -> bool:
            places = self.places()
            primaries = sum(place.is_primary for place in places)
            ends = {(place.epoch, place.timeline) for place in places}
            return len(places) == len(self.names) and primaries == len(ends) == 1

        wait_for(agreed, timeout=SETTLE, pause=0.05)
        return self.places()

    def empty(self) -> None:
        """Forget all writes so far, for clients that count anew."""
        with self.connect(self.primary()) as connection:
            connection.execute("TRUNCATE written")

    def rows(self, since: int = 0) -> tuple[Row, ...]:
        """Return what the primary has of the timelines from one on."""
        query = "SELECT writer, number, node, epoch, timeline FROM written WHERE timeline >= %s"
        with self.connect(self.primary()) as connection:
            found = connection.execute(query, (since,))
            return tuple(Row(writer, number, Stamp(*rest)) for writer, number, *rest in found)

    def journal(self) -> list[tuple[int, int, str]]:
        """Return timeline, epoch and kind of each promotion so far."""
        with self.connect(self.primary()) as connection:
            found = connection.execute("SELECT timeline, epoch, kind FROM sqlroute.journal")
            return [(timeline, epoch, kind) for timeline, epoch, kind in found]

    def ask_for_quorum(self) -> None:
        """Let each commit, whoever takes it, wait for one of the other nodes."""
        for name in self.names:
            others = ", ".join(f'"{other}"' for other in self.names if other != name)
            self._set_synchronous(name, f"ANY 1 ({others})")

    def ask_for_no_quorum(self) -> None:
        for name in self.names:
            self._set_synchronous(name, "")

    def _set_synchronous(self, name: str, value: str) -> None:
        change = sql.SQL("ALTER SYSTEM SET synchronous_standby_names = {}")
        with self.connect(name) as connection:
            connection.execute(change.format(value))
            connection.execute("SELECT pg_reload_conf()")

    def _place(self, name: str) -> Place | None:
        with contextlib.suppress(psycopg.Error), self.connect(name) as connection:
            row = connection.execute(_PLACE).fetchone()
            return Place(name, *row) if row is not None else None
        return None


__all__ = ["SHARD", "Cluster", "State"]
