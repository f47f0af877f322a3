"""PgBouncer in transaction mode before every node: what of sqlroute works through it."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until
from models import Base, Country, Customer

from sqlroute import Router
from sqlroute.config import load
from sqlroute.health import State
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.routing.rows import bucket_of_key
from sqlroute.testing import free_ports
from tests.benchmarks.proxies import Proxy, pgbouncer

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
        reason="pgbouncer is not installed",
    ),
]

POOLER = "&pooler=transaction"

MORE_THAN_PREPARED = 12
"""psycopg prepares a statement when it runs it the sixth time on a connection."""


class Pooled:
    """Servers, each behind a PgBouncer of its own, and a router that knows only those."""

    def __init__(self, servers: LocalTopology, proxies: dict[str, Proxy], router: Router) -> None:
        self.servers = servers
        self.proxies = proxies
        self.router = router
        self.replicas = {shard.name: shard.nodes[1] for shard in servers.shards}
        self._map = router.shard_map()
        self._numbers = itertools.count(1)

    def key(self, shard: str) -> int:
        """Return a new customer's id that lives on a shard."""
        table, owners = Base.metadata.tables["customer"], self._map.owners
        return next(
            number
            for number in self._numbers
            if self._map.owner(bucket_of_key(table, {"id": number}, len(owners))) == shard
        )

    def add(self, shard: str, name: str) -> int:
        """Store a customer, and wait until the replica has it."""
        number = self.key(shard)
        with self.router.sessionmaker()() as session:
            session.add(Customer(id=number, name=name))
            session.commit()
        self.settle()
        return number

    def settle(self) -> None:
        for shard in self.replicas:
            primary = self.router.monitor.ask(shard, 1.0).primary(shard)
            assert primary is not None
            until(lambda s=shard, lsn=primary.lsn: self._has_replayed(s, lsn))

    def _has_replayed(self, shard: str, lsn: int) -> bool:
        (replica,) = self.router.monitor.ask(shard, 1.0).replicas(shard)
        return replica.is_readable and replica.lsn >= lsn

    def seen_by_others(self, setting: str) -> set[str | None]:
        """Return the values that other clients of all the PgBouncers find of a setting.

        Many at once, so that no idle server connection is left out.
        """
        found = set()
        with ExitStack() as stack:
            for proxy in self.proxies.values():
                for _ in range(12):
                    other = psycopg.connect(**proxy.front.conninfo, prepare_threshold=None)
                    stack.enter_context(other)
                    row = other.execute("SELECT current_setting(%s, true)", (setting,)).fetchone()
                    assert row is not None
                    found.add(row[0])
        return found

    def another_router(self, **policy: Any) -> Router:
        settings = load(config(self.servers, self.proxies))
        return Router(settings.topology, replace(settings.policy, **policy))


@pytest.fixture(scope="module")
def pooled(sqlroute_topology_factory: Callable[..., LocalTopology]) -> Iterator[Pooled]:
    load({"keyspaces": {"k": {"shards": [{"name": "s", "nodes": [f"postgresql://h/d?{POOLER}"]}]}}})
    servers = sqlroute_topology_factory(shards=2, replicas=1, label="pgbouncer")
    with ExitStack() as stack:
        ports = itertools.count(free_ports(len(servers.nodes)))
        proxies = {
            node.name: stack.enter_context(pgbouncer(servers.directory, node, next(ports)))
            for node in servers.nodes
        }
        router = stack.enter_context(Router.from_config(config(servers, proxies)))
        router.create_all(Base.metadata)
        yield Pooled(servers, proxies, router)


def config(servers: LocalTopology, proxies: dict[str, Proxy]) -> dict[str, Any]:
    text = servers.config_path.read_text()
    for node in servers.nodes:
        assert node.url in text
        text = text.replace(node.url, proxies[node.name].front.url + POOLER)
    return tomllib.loads(text)


def where() -> Any:
    """Select the port of the server that answers, whatever stands before it."""
    return sa.select(sa.func.inet_server_port()).select_from(Customer)


def test_reads_go_to_the_replica(pooled: Pooled) -> None:
    """Also when each is run often enough for psycopg to prepare it, were it not told otherwise."""
    number = pooled.add("s0", "read")
    statement = where().where(Customer.id == number)
    with pooled.router.sessionmaker()() as session:
        ports = {session.scalar(statement) for _ in range(MORE_THAN_PREPARED)}

    assert ports == {pooled.replicas["s0"].port}


def test_many_at_once_share_few_server_connections(pooled: Pooled) -> None:
    """What one leaves behind would meet another here: prepared statements, modes, settings."""
    numbers = [pooled.add(shard, "0") for shard in ("s0", "s1") for _ in range(4)]

    def work(number: int) -> None:
        token = None
        for turn in range(MORE_THAN_PREPARED):
            with pooled.router.sessionmaker(token=token)() as session:
                assert session.get_one(Customer, number).name == str(turn)
                session.get_one(Customer, number).name = str(turn + 1)
                session.commit()
                token = session.token

    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(work, numbers))


def test_a_write_is_read_by_who_follows_its_token(pooled: Pooled) -> None:
    """The commit and its position are one round trip, through the pooler too."""
    number = pooled.add("s0", "old")
    replica = pooled.replicas["s0"]
    replica.pause_replay()
    try:
        with pooled.router.sessionmaker()() as session:
            session.get_one(Customer, number).name = "new"
            session.commit()
            token = str(session.token)
        with pooled.router.sessionmaker(token=token)() as session:
            assert session.get_one(Customer, number).name == "new"
        with pooled.router.sessionmaker(consistency="eventual")() as session:
            assert session.get_one(Customer, number).name == "old"
    finally:
        replica.resume_replay()


def test_settings_travel_and_stay_with_their_session(pooled: Pooled) -> None:
    number = pooled.add("s0", "tenant")
    tenant = sa.select(sa.func.current_setting("app.tenant", True), sa.func.inet_server_port())
    statement = tenant.select_from(Customer).where(Customer.id == number)
    with pooled.router.sessionmaker(settings={"app.tenant": "7"})() as session:
        replica, primary = pooled.replicas["s0"], pooled.servers.node("s0-a")
        for _ in range(MORE_THAN_PREPARED):
            assert session.execute(statement).one() == ("7", replica.port)
        session.get_one(Customer, number).name = "changed"
        session.flush()
        assert session.execute(statement).one() == ("7", primary.port)
        session.commit()

    assert pooled.seen_by_others("app.tenant") <= {None, ""}


def test_the_monitor_leaves_nothing_on_shared_connections(pooled: Pooled) -> None:
    """Its ``lock_timeout`` would make other people's statements fail."""
    with pooled.another_router() as router:
        assert all(node.state is State.UP for node in router.health().nodes.values())

        assert pooled.seen_by_others("lock_timeout") == {"0"}


def test_a_locked_catalog_is_no_dead_server(pooled: Pooled) -> None:
    """For that it sets one; so it must do so in each probe's own transaction."""
    primary = pooled.servers.node("s0-a")
    with psycopg.connect(**primary.conninfo) as connection:
        connection.execute("LOCK TABLE sqlroute.keyspace IN ACCESS EXCLUSIVE MODE")
        for _ in range(4):
            assert pooled.router.monitor.ask("s0", 2.0).of("s0-a").state is State.UP


def test_a_read_only_transaction_is_one_on_the_replica(pooled: Pooled) -> None:
    """One server process from begin to end, and one snapshot."""
    number = pooled.add("s0", "before")
    functions = (sa.func.inet_server_port(), sa.func.pg_backend_pid())
    facts = (
        sa.select(sa.func.current_setting("transaction_read_only"), *functions, Customer.name)
        .where(Customer.id == number)
        .execution_options(sqlroute_role="replica")  # who looks at processes, writes nothing
    )
    sessions = pooled.router.sessionmaker()
    with sessions() as session, session.begin(read_only=True, isolation_level="REPEATABLE READ"):
        first = session.execute(facts).one()
        with sessions() as other:
            other.get_one(Customer, number).name = "after"
            other.commit()
        pooled.settle()
        found = {session.execute(facts).one() for _ in range(MORE_THAN_PREPARED)}

    assert found == {first}
    assert first[:2] == ("on", pooled.replicas["s0"].port)
    assert first[3] == "before"


def test_streaming_reads_from_the_replica(pooled: Pooled) -> None:
    """A server-side cursor keeps its server connection as long as it is open."""
    number = pooled.add("s1", "streamed")
    rows = sa.select(sa.func.generate_series(1, 500), sa.func.inet_server_port())
    statement = rows.select_from(Customer).where(Customer.id == number)
    with pooled.router.sessionmaker()() as session:
        options = {"yield_per": 50}
        found = list(session.execute(statement, execution_options=options))

    assert {port for _, port in found} == {pooled.replicas["s1"].port}
    assert len(found) == 500


@pytest.mark.parametrize("twophase", [False, True])
def test_a_commit_over_two_shards_is_atomic(pooled: Pooled, twophase: bool) -> None:
    """Sqlroute's own, and SQLAlchemy's: a prepared transaction belongs to no connection."""
    numbers = [pooled.key("s0"), pooled.key("s1")]
    with pooled.router.sessionmaker(twophase=twophase)() as session:
        session.add_all([Customer(id=number, name="both") for number in numbers])
        session.commit()
        token = session.token
    with pooled.router.sessionmaker(token=token)() as session:
        names = [session.get_one(Customer, number).name for number in numbers]

    assert names == ["both", "both"]
    for shard in pooled.servers.shards:
        with psycopg.connect(**shard.nodes[0].conninfo) as connection:
            assert connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall() == []


def test_reference_rows_reach_all_shards(pooled: Pooled) -> None:
    with pooled.router.sessionmaker()() as session:
        session.add(Country(code="xx", name="Nowhere"))
        session.commit()
    for shard in pooled.servers.shards:
        with psycopg.connect(**shard.nodes[0].conninfo) as connection:
            row = connection.execute("SELECT name FROM country WHERE code = 'xx'").fetchone()
        assert row == ("Nowhere",)


def test_a_scatter_asks_all_shards(pooled: Pooled) -> None:
    for shard in ("s0", "s1"):
        pooled.add(shard, "scattered")
    count = sa.select(sa.func.count()).where(Customer.name == "scattered")
    with pooled.router.sessionmaker()() as session:
        counts = {session.scalar(count) for _ in range(MORE_THAN_PREPARED)}

    assert counts == {2}


def test_async_sessions_read_and_write(pooled: Pooled) -> None:
    number = pooled.add("s0", "0")

    async def work() -> None:
        async with pooled.another_router() as router:
            sessions = router.async_sessionmaker()
            for turn in range(MORE_THAN_PREPARED):
                async with sessions() as session:
                    assert (await session.get_one(Customer, number)).name == str(turn)
                    (await session.get_one(Customer, number)).name = str(turn + 1)
                    await session.commit()
                    token = await session.token
                sessions = router.async_sessionmaker(token=token)

    asyncio.run(work())


@pytest.mark.parametrize("break_it", [LocalNode.kill, LocalNode.pause])
def test_no_read_fails_when_a_server_behind_its_pooler_is_gone(
    pooled: Pooled, break_it: Callable[[LocalNode], None]
) -> None:
    """The pooler lives and takes connections: only an answer that does not come tells."""
    number = pooled.add("s0", "there")
    replica = pooled.replicas["s0"]
    try:
        with pooled.router.sessionmaker()() as session:
            assert session.get_one(Customer, number).name == "there"
            break_it(replica)
        for _ in range(MORE_THAN_PREPARED):
            with pooled.router.sessionmaker(deadline=5.0)() as session:
                assert session.get_one(Customer, number).name == "there"
        until(lambda: pooled.router.monitor.health.of(replica.name).state is State.DOWN)
    finally:
        replica.resume()
        replica.start()
        # it does not try to log in again for a while (server_login_retry), then it does
        until(lambda: pooled.router.monitor.health.of(replica.name).state is State.UP, timeout=60)


def test_a_restarted_server_has_another_life(pooled: Pooled) -> None:
    """The connection to the pooler outlives it; what a replica had shown, it may not have now."""
    replica = pooled.replicas["s1"]
    with pooled.another_router(probe_interval=600.0) as router:  # so that it is not seen down
        before = router.health().of(replica.name).life
        replica.stop()
        replica.start()
        until(lambda: pooled.router.monitor.ask("s1", 1.0).of(replica.name).is_readable, timeout=60)
        after = router.monitor.ask("s1", 1.0).of(replica.name)

    assert after.is_readable
    assert after.life != before
