"""Real servers for the integration tests.

pytest-postgresql gives each test a database of its own on the judge. Its ports are known only when
the server runs, so the server is handed over by a fixture (``depends_on``), not by options.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pytest
from models import Base
from pytest_postgresql import factories
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sqlroute import Router, RoutingSession
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.routing.rows import bucket_of_key


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """What pytest-postgresql wants to know of a server it did not start."""

    host: str
    port: int
    user: str
    password: str
    dbname: str
    options: str = ""
    template_dbname: str = "template1"
    maintenance_dbname: str = "postgres"


@pytest.fixture(scope="session")
def judge_server(sqlroute_single: LocalNode) -> JudgeServer:
    return JudgeServer(**sqlroute_single.conninfo)


postgresql_noproc = factories.postgresql_noproc(depends_on="judge_server", dbname="judge")
postgresql = factories.postgresql("postgresql_noproc")


REPLICAS = ("s0-b", "s0-c", "s1-b", "s1-c")
PRIMARIES = ("s0-a", "s1-a")


class Shop:
    """The routed shop of the tests: its servers, its router, and what a test asks of them."""

    def __init__(self, servers: LocalTopology, router: Router) -> None:
        self.servers = servers
        self.router = router
        self._map = router.shard_map()
        self._names = {node.port: node.name for node in servers.nodes}

    def keys(self, shard: str, count: int = 1) -> list[int]:
        """Return the smallest customer ids that live on a shard."""
        table, shard_map = Base.metadata.tables["customer"], self._map
        mine = (
            i
            for i in itertools.count(1)
            if shard_map.owner(bucket_of_key(table, {"id": i}, len(shard_map.owners))) == shard
        )
        return list(itertools.islice(mine, count))

    def add(self, *objects: Any) -> None:
        """Store objects, as another process would, and wait until every replica has them."""
        with self.router.sessionmaker()() as session:
            session.add_all(objects)
            session.commit()
        self.settle()

    def settle(self) -> None:
        """Wait until every replica has replayed what its primary has written."""
        for shard in self.router.topology.keyspace_of_shard:
            health = self.router.monitor.ask(shard, 1.0)
            primary = health.primary(shard)
            assert primary is not None
            until(lambda s=shard, lsn=primary.lsn: self._has_replayed(s, lsn))

    def _has_replayed(self, shard: str, lsn: int) -> bool:
        replicas = self.router.monitor.ask(shard, 1.0).replicas(shard)
        return len(replicas) == 2 and all(node.is_readable and node.lsn >= lsn for node in replicas)

    def on(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        """Run SQL on the primary of a shard, past the router."""
        return self.at(f"{shard}-a", statement)

    def at(self, node: str, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(**self.servers.node(node).conninfo, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def node(self, port: int) -> str:
        return self._names[port]

    @property
    def checked_out(self) -> int:
        """Connections that the program holds now, over all pools."""
        engines = [e for flavour in (False, True) for e in self._engines(flavour)]
        return sum(engine.pool.checkedout() for engine in engines)  # type: ignore[attr-defined]

    def _engines(self, flavour: bool) -> list[Engine]:
        return list(self.router.engines(is_async=flavour)._engines.values())


class Ran:
    """The statements that reached servers: (node, SQL)."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self.statements: list[tuple[str, str]] = []

    def note(self, connection: Any, _: Any, statement: str, *__: Any) -> None:
        if connection.engine.url.port in self._shop._names:
            node = self._shop.node(connection.engine.url.port)
            self.statements.append((node, " ".join(statement.split())))

    @property
    def nodes(self) -> list[str]:
        return [node for node, _ in self.statements]

    def clear(self) -> None:
        self.statements.clear()


def until(condition: Callable[[], object], timeout: float = 20.0) -> float:
    """Wait until it is true; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "it did not become true"
        time.sleep(0.005)
    return time.monotonic() - began


@pytest.fixture(scope="session")
def _shop(sqlroute_topology: LocalTopology) -> Iterator[Shop]:
    with Router.from_config(sqlroute_topology.config_path) as router:
        router.create_all(Base.metadata)
        shop = Shop(sqlroute_topology, router)
        for shard in ("s0", "s1"):  # a broken test must not block the next
            shop.on(shard, "ALTER ROLE ALL SET lock_timeout = '5s'")
        yield shop


@pytest.fixture
def shop(_shop: Shop) -> Iterator[Shop]:
    """The shop, empty, all servers up to date; nothing may be left checked out or prepared."""
    tables = ", ".join(f'"{table.name}"' for table in reversed(Base.metadata.sorted_tables))
    for shard in ("s0", "s1"):
        for (gid,) in _shop.on(shard, "SELECT gid FROM pg_prepared_xacts"):
            _shop.on(shard, f"ROLLBACK PREPARED '{gid}'")
        _shop.on(shard, ";".join(f"DELETE FROM {table}" for table in tables.split(", ")))
    _shop.settle()
    yield _shop
    assert _shop.checked_out == 0, "a connection was not given back"
    for shard in ("s0", "s1"):
        left = _shop.on(shard, "SELECT gid FROM pg_prepared_xacts")
        assert left == [], f"prepared on {shard}: {left}"


@pytest.fixture
def router(shop: Shop) -> Router:
    return shop.router


@pytest.fixture
def make_router(shop: Shop) -> Iterator[Callable[..., Router]]:
    """Make further routers of the same servers, with another policy; closed at the end."""
    made: list[Router] = []

    def make(**policy: Any) -> Router:
        found = shop.router
        made.append(Router(found.topology, replace(found.policy, **policy)))
        return made[-1]

    yield make
    for router in made:
        router.close()


@pytest.fixture
def session(shop: Shop) -> Iterator[RoutingSession]:
    with shop.router.sessionmaker()() as session:
        yield session


@pytest.fixture
def ran(shop: Shop) -> Iterator[Ran]:
    found = Ran(shop)
    event.listen(Engine, "before_cursor_execute", found.note)
    yield found
    event.remove(Engine, "before_cursor_execute", found.note)


@pytest.fixture
def held(shop: Shop) -> Iterator[Shop]:
    """The shop with every replica held 3 s behind."""
    replicas = [shop.servers.node(name) for name in REPLICAS]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: node.hold_replay(3.0), replicas))
        yield shop
        list(pool.map(lambda node: node.hold_replay(0), replicas))
