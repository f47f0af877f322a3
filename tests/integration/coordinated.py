"""Servers with a coordinator, and one plain server that has the same rows and judges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import Engine

from sqlroute import Keyspace, Node, Router, Topology
from sqlroute.config import load
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.ops import coordinator
from sqlroute.routing.policy import Policy
from sqlroute.routing.rows import bucket_of_key
from sqlroute.topology import Coordinator, Secret

BUCKETS = 16
"""Few, for the tests to be quick: each is a foreign table."""


@dataclass(frozen=True)
class Coordinated:
    """Two shards, their coordinator on a server of its own, and the judge beside it.

    Attributes:
        judge: an engine of one database with all the data.
    """

    servers: LocalTopology
    host: LocalNode
    database: str
    router: Router
    judge: Engine
    metadata: sa.MetaData

    def at(self, node: LocalNode, statement: str) -> list[tuple[Any, ...]]:
        """Run SQL on one node, past the router."""
        return ask(node, statement)

    def on(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        """Run SQL on the first node of a shard, past the router."""
        return ask(self.servers.shard(shard).nodes[0], statement)

    def on_all(self, statement: str) -> None:
        for shard in self.servers.shards:
            self.on(shard.name, statement)

    def there(self, statement: str) -> list[tuple[Any, ...]]:
        """Run SQL on the coordinator, past the router."""
        return ask(self.host, statement, self.database)

    def refresh(self) -> None:
        coordinator.refresh(self.router, analyze=False)

    def fill(self, rows: dict[str, Sequence[dict[str, Any]]]) -> None:
        """Store rows by table, on the shards and on the judge."""
        with self.router.sessionmaker()() as session, self.judge.begin() as plain:
            for table in self.metadata.sorted_tables:
                if rows.get(table.name):
                    session.execute(sa.insert(table), list(rows[table.name]))
                    plain.execute(sa.insert(table), list(rows[table.name]))
            session.commit()

    def empty(self) -> None:
        tables = reversed(self.metadata.sorted_tables)
        statement = ";".join(f'DELETE FROM "{table.name}"' for table in tables)
        self.on_all(statement)
        with self.judge.begin() as plain:
            plain.exec_driver_sql(statement)

    def keys(self, shard: str, count: int = 1) -> list[int]:
        """Return the smallest customer ids that live on a shard."""
        mine = (i for i in itertools.count(1) if self.shard_of(i) == shard)
        return list(itertools.islice(mine, count))

    def shard_of(self, key: int) -> str:
        """Return the shard of a customer."""
        found = self.router.shard_map_of(
            self.router.topology.default, self.router.engines(is_async=False)
        )
        return found.owner(bucket_of_key(self.metadata.tables["customer"], {"id": key}, BUCKETS))

    def routed(self, *, nodes: tuple[Node, ...] = (), **changes: Any) -> Router:
        """Return another router, with other coordinators, caps or policies."""
        keyspace = self.router.topology.default
        assert keyspace.coordinator is not None
        caps = {name: changes.pop(name) for name in ("max_rows", "timeout") if name in changes}
        changed = replace(keyspace.coordinator, **caps)
        if nodes:
            changed = replace(changed, nodes=nodes)
        topology = Topology((replace(keyspace, coordinator=changed),))
        return Router(topology, replace(self.router.policy, **changes))

    @property
    def node(self) -> Node:
        found = self.router.topology.default.coordinator
        assert found is not None
        return found.nodes[0]


def coordinated(
    servers: LocalTopology,
    host: LocalNode,
    database: str,
    metadata: sa.MetaData,
    *,
    replicas: int = 0,
) -> Iterator[Coordinated]:
    """Make the tables everywhere and the coordinator; yield; close what holds connections."""
    own = load(servers.config_path).topology.default
    there = host.conninfo
    node = Node(
        "c-a",
        there["host"],
        there["port"],
        database,
        there["user"],
        Secret(there["password"]),
    )
    keyspace = Keyspace(own.name, own.shards, BUCKETS, Coordinator((node,), replicas=replicas))
    judge_database = f"{database}_judge"
    ask(host, f"DROP DATABASE IF EXISTS {judge_database}")
    ask(host, f"CREATE DATABASE {judge_database}")
    judge = sa.create_engine(
        sa.URL.create(
            "postgresql+psycopg",
            there["user"],
            there["password"],
            there["host"],
            there["port"],
            judge_database,
        )
    )
    with Router(Topology((keyspace,)), Policy(probe_deadline=2.0)) as router:
        router.create_all(metadata)
        metadata.create_all(judge)
        coordinator.install(router, analyze=False)
        yield Coordinated(servers, host, database, router, judge, metadata)
    judge.dispose()


def ask(node: LocalNode, statement: str, database: str = "") -> list[tuple[Any, ...]]:
    """Run SQL on a server, past all routers."""
    where = {**node.conninfo, **({"dbname": database} if database else {})}
    with psycopg.connect(**where, autocommit=True) as connection:
        cursor = connection.execute(sql.SQL(statement))  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []
