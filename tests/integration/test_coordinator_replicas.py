"""Promises of a coordinator that reads replicas: as fresh as other reads of them, or primaries."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until
from coordinated import Coordinated, coordinated
from models import Base, Customer, Setting
from sqlalchemy import func, select, text

from sqlroute import NoEligibleNode, Router, RoutingSession
from sqlroute.errors import CoordinatorStale, OperationRefused, StaleObjectRead
from sqlroute.events import Event, Fallback, Retried
from sqlroute.local.node import LocalNode
from sqlroute.ops import coordinator
from sqlroute.testing import TopologyFactory
from sqlroute.topology import Topology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

REPLICAS = ("s0-b", "s0-c", "s1-b", "s1-c")
_new_keys = itertools.count(1_000)
COUNTED = select(func.count(sa.distinct(Customer.name)))
_mean = select(func.avg(Customer.score)).scalar_subquery()
ABOVE = select(Customer).where(Customer.score > _mean - 100).order_by(Customer.id)


@pytest.fixture(scope="module")
def _shop(
    sqlroute_topology_factory: TopologyFactory, sqlroute_single: LocalNode
) -> Iterator[Coordinated]:
    servers = sqlroute_topology_factory(shards=2, replicas=2, label="read by a coordinator")
    yield from coordinated(
        servers, sqlroute_single, "replica_coordinator", Base.metadata, replicas=2
    )


@pytest.fixture
def shop(_shop: Coordinated) -> Coordinated:
    """The shop with ten customers of different names, which all replicas have."""
    _shop.empty()
    _shop.fill({"customer": [{"id": i, "name": f"n{i}", "score": i} for i in range(1, 11)]})
    settle(_shop)
    return _shop


@pytest.fixture
def router(shop: Coordinated) -> Iterator[Router]:
    """A router that knows nothing yet, and for which a replica held back is not too old."""
    with shop.routed(max_lag=60.0) as router:
        yield router


@pytest.fixture
def session(router: Router) -> Iterator[RoutingSession]:
    with router.sessionmaker()() as session:
        yield session


def settle(shop: Coordinated) -> None:
    """Wait until every replica has replayed what its primary has written."""
    for shard in ("s0", "s1"):
        (reached,) = shop.on(shard, "SELECT pg_current_wal_lsn()::text")[0]
        for node in shop.servers.shard(shard).nodes[1:]:
            replayed = f"SELECT pg_last_wal_replay_lsn() >= '{reached}'"
            until(lambda n=node, s=replayed: shop.at(n, s) == [(True,)])


@contextmanager
def held_back(shop: Coordinated, *names: str) -> Iterator[None]:
    """Let replicas receive and not replay."""
    nodes = [shop.servers.node(name) for name in names or REPLICAS]
    for node in nodes:
        node.pause_replay()
    try:
        yield
    finally:
        for node in nodes:
            node.resume_replay()


def add(shop: Coordinated, name: str, shard: str = "s1") -> int:
    """Store a customer past the router, so that no session has a token of it."""
    key = next(key for key in _new_keys if shop.shard_of(key) == shard)
    shop.on(shard, f"INSERT INTO customer (id, name, score) VALUES ({key}, '{name}', 1)")
    return key


def nodes(session: RoutingSession, statement: Any = COUNTED) -> tuple[str, ...]:
    return tuple(target.node for target in session.explain(statement).targets)


@contextmanager
def heard(router: Router) -> Iterator[list[Event]]:
    """Note what the router tells meanwhile of reads that went elsewhere."""
    events: list[Event] = []
    end = router.listen(events.append, Retried, Fallback)
    try:
        yield events
    finally:
        end()


class TestWhoIsRead:
    def test_replicas_are_read(self, shop: Coordinated, session: RoutingSession) -> None:
        """Seen by what they do not have yet; the plan says who was read."""
        with held_back(shop):
            add(shop, "new")

            assert session.scalar(COUNTED) == 10
            assert session.scalar(COUNTED.execution_options(sqlroute_role="primary")) == 11

    def test_the_plan_says_who_would_be_read(self, router: Router) -> None:
        """Of two databases one and the other in turn."""
        plans = [router.explain(COUNTED) for _ in range(2)]
        described = sorted(tuple(plan.coordinators) for plan in plans)

        assert described == [("c-a/1",), ("c-a/2",)]
        first = next(plan for plan in plans if plan.coordinators == ("c-a/1",))
        assert [str(target) for target in first.targets] == [
            "s0: replica s0-b, autocommit (read by the coordinator)",
            "s1: replica s1-b, autocommit (read by the coordinator)",
        ]
        assert "rows at a cost of" in first.merge[0]

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"consistency": "strong"}, "consistency is strong"),
            ({"intent": "writing"}, "the session will write"),
        ],
    )
    def test_who_wants_primaries_gets_them(
        self, router: Router, options: dict[str, str], why: str
    ) -> None:
        found = router.explain(COUNTED, **options)

        assert [target.node for target in found.targets] == ["s0-a", "s1-a"]
        assert found.reasons[-1] == f"primaries are read: {why}"

    def test_a_transaction_reads_where_it_is(self, router: Router) -> None:
        with router.sessionmaker()() as session:
            with session.begin():
                assert nodes(session) == ("s0-a", "s1-a")
            with session.begin(read_only=True):
                assert nodes(session) in (("s0-b", "s1-b"), ("s0-c", "s1-c"))
                assert session.scalar(COUNTED) == 10

    def test_a_replica_too_far_behind_is_not_read(self, shop: Coordinated) -> None:
        with held_back(shop):
            add(shop, "new")
            time.sleep(0.3)
            add(shop, "newer")
            with shop.routed(max_lag=0.2) as router, router.sessionmaker()() as session:
                with heard(router) as events:
                    until(lambda: session.scalar(COUNTED) == 12)
                assert any(isinstance(event, Fallback) for event in events)
                assert "max_lag 0.2 s" in str(router.explain(COUNTED))
            with (
                shop.routed(max_lag=0.2, primary_fallback=False) as router,
                router.sessionmaker()() as session,
                pytest.raises(NoEligibleNode, match=r"s1-b is .* behind"),
            ):
                until(lambda: session.scalar(COUNTED) == 0)

    def test_without_further_databases_primaries_are_read(self, shop: Coordinated) -> None:
        """A coordinator of before, or ``replicas = 0``."""
        with held_back(shop):
            add(shop, "new")
            with changed(shop, replicas=0) as router, router.sessionmaker()() as session:
                assert session.scalar(COUNTED) == 11
            bare = replace(shop.node, name="c-bare", database="nobody")
            with shop.routed(nodes=(bare, shop.node)) as router, router.sessionmaker()() as s:
                assert s.scalar(COUNTED) == 10  # those of the second node


@contextmanager
def changed(shop: Coordinated, **changes: Any) -> Iterator[Router]:
    """Yield a router of another configuration of the coordinator."""
    keyspace = shop.router.topology.default
    assert keyspace.coordinator is not None
    found = replace(keyspace, coordinator=replace(keyspace.coordinator, **changes))
    with Router(Topology((found,)), shop.router.policy) as router:
        yield router


class TestConsistency:
    def test_own_writes_are_there(self, shop: Coordinated, session: RoutingSession) -> None:
        """A window over all rows has the one that the session has just committed."""
        ranked = select(Customer.name, func.rank().over(order_by=Customer.id))
        assert len(session.execute(ranked).all()) == 10
        with held_back(shop):
            session.add(Customer(id=shop.keys("s1")[0] + 500, name="own", score=1))
            session.commit()

            assert "own" in session.execute(ranked).scalars().all()
            assert nodes(session) == ("s0-a", "s1-a")
            assert "not known to have what the session has seen" in str(session.explain(COUNTED))
        until(lambda: nodes(session)[0] != "s0-a")
        assert "own" in session.execute(ranked).scalars().all()

    def test_a_token_is_respected(self, shop: Coordinated, router: Router) -> None:
        with router.sessionmaker()() as writer, held_back(shop):
            writer.add(Customer(id=shop.keys("s0")[0] + 500, name="own", score=1))
            writer.commit()

            with router.sessionmaker()(token=writer.token) as reader:
                assert reader.scalar(COUNTED) == 11
            with router.sessionmaker()() as stranger:
                assert stranger.scalar(COUNTED) == 10

    def test_what_primaries_have_shown_stays(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """A session never goes back in time, whatever it asked for in between."""
        with held_back(shop):
            add(shop, "new")

            assert session.scalar(COUNTED) == 10
            assert session.scalar(COUNTED.execution_options(sqlroute_role="primary")) == 11
            for _ in range(4):
                assert session.scalar(COUNTED) == 11

    def test_what_one_replica_has_shown_stays(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """Statements of shards and of the coordinator look at the same replicas."""
        key = add(shop, "new")
        until(lambda: shop.at(shop.servers.node("s1-b"), _row(key)) == [("new",)])
        with held_back(shop, "s1-c", "s0-c"):
            shop.on("s1", f"UPDATE customer SET name = 'newer' WHERE id = {key}")
            until(lambda: shop.at(shop.servers.node("s1-b"), _row(key)) == [("newer",)])
            newest = text(
                "SELECT max(name) OVER () FROM customer WHERE name LIKE 'new%' LIMIT 1"
            ).execution_options(sqlroute_tier="coordinator")
            seen = []
            for _ in range(8):
                seen.append(session.scalar(newest))
                seen.append(session.scalar(select(Customer.name).where(Customer.id == key)))

        assert seen == sorted(seen)

    def test_stale_objects_are_not_written(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """What a replica gave is compared before it is written, whoever read it there."""
        with held_back(shop):
            shop.on_all("UPDATE customer SET score = 99 WHERE id = 3")
            found = {each.id: each for each in session.scalars(ABOVE)}
            assert found[3].score == 3
            found[3].score += 1
            with pytest.raises(StaleObjectRead, match=r"Customer\(3\).*score changed"):
                session.commit()
            session.rollback()
        assert shop.on(shop.shard_of(3), "SELECT score FROM customer WHERE id = 3") == [(99,)]

    def test_streams_read_replicas(self, shop: Coordinated, session: RoutingSession) -> None:
        with held_back(shop):
            add(shop, "new")
            found = session.scalars(ABOVE.execution_options(yield_per=4))
            sizes = [len(batch) for batch in found.partitions()]

        assert sizes == [4, 4, 2]

    def test_under_asyncio(self, shop: Coordinated, router: Router) -> None:
        async def ran() -> tuple[Any, Any, Any]:
            async with router.async_sessionmaker()() as session:
                before = await session.scalar(COUNTED)
                session.add(Customer(id=shop.keys("s1")[0] + 500, name="own", score=1))
                await session.commit()
                after = await session.scalar(COUNTED)
                objects = (await session.scalars(ABOVE)).all()
            return before, after, len(objects)

        async def whole() -> tuple[Any, Any, Any]:
            try:
                return await ran()
            finally:
                await router.aclose()

        with held_back(shop):
            add(shop, "new")
            assert asyncio.run(whole()) == (10, 12, 12)


def _row(key: int) -> str:
    return f"SELECT name FROM customer WHERE id = {key}"


class TestFaults:
    def test_one_that_hangs_is_not_waited_for(
        self, shop: Coordinated, session: RoutingSession, router: Router
    ) -> None:
        """Statements that are under way there go on elsewhere; long before their time is over."""
        for _ in range(2):  # both databases have their connections
            assert session.scalar(COUNTED) == 10
        with heard(router) as events, frozen(shop, "s1-b", "s1-c"):
            began = time.monotonic()
            with router.sessionmaker()() as another:
                assert another.scalar(COUNTED) == 10
            assert time.monotonic() - began < 20
            with router.sessionmaker()() as another:
                assert nodes(another)[1] == "s1-a"
        assert {event.node for event in events if isinstance(event, Retried)} <= {"c-a/1", "c-a/2"}
        assert any(isinstance(event, Retried) for event in events)

    def test_one_that_hangs_is_not_waited_for_under_asyncio(
        self, shop: Coordinated, router: Router
    ) -> None:
        async def ran() -> Any:
            async with router.async_sessionmaker()() as session:
                await session.scalar(COUNTED)
            with frozen(shop, "s0-b", "s0-c"):
                async with router.async_sessionmaker()() as session:
                    return await asyncio.wait_for(session.scalar(COUNTED), 20)

        async def whole() -> Any:
            try:
                return await ran()
            finally:
                await router.aclose()

        assert asyncio.run(whole()) == 10

    def test_one_that_dies_is_replaced(
        self, shop: Coordinated, session: RoutingSession, router: Router
    ) -> None:
        """By another replica, or by primaries; and it is read again when it is back."""
        assert session.scalar(COUNTED) == 10
        dead = [shop.servers.node(name) for name in ("s0-b", "s0-c")]
        for node in dead:
            node.kill()
        try:
            with router.sessionmaker()() as another:
                assert another.scalar(COUNTED) == 10
                assert nodes(another)[0] == "s0-a"
        finally:
            for node in dead:
                node.start()
        with shop.routed() as after, after.sessionmaker()() as another:
            until(lambda: nodes(another)[0] != "s0-a")
            assert another.scalar(COUNTED) == 10
            assert nodes(another)[0] != "s0-a"

    def test_a_conflict_with_recovery_is_no_error(self, shop: Coordinated, router: Router) -> None:
        """The replica wants to replay what the statement still holds: primaries answer it."""

        def lock() -> None:
            for shard in ("s0", "s1"):
                with psycopg.connect(**shop.servers.shard(shard).nodes[0].conninfo) as other:
                    other.execute("LOCK TABLE customer IN ACCESS EXCLUSIVE MODE")

        replicas = [shop.servers.node(name) for name in REPLICAS]
        for node in replicas:
            patient(shop, node, "0")
        try:
            events = while_it_runs(shop, router, lock)
        finally:
            for node in replicas:
                patient(shop, node, "30s")

        assert {event.node for event in events} <= {"c-a/1", "c-a/2"}
        assert events

    def test_a_replica_that_may_have_begun_anew_is_not_believed(
        self, shop: Coordinated, router: Router
    ) -> None:
        """After a crash it would show what is older than what it was chosen by."""
        lives = {name: router.health().of(name).life for name in REPLICAS}

        def cut_off() -> None:
            """To the monitor it looks as if the server had crashed: its connection has ended."""
            for name in REPLICAS:
                shop.at(shop.servers.node(name), _MONITORS_END)
            until(lambda: all(router.health().of(name).life != lives[name] for name in lives))

        events = while_it_runs(shop, router, cut_off)

        assert "has begun anew meanwhile" in events[0].error

    def test_an_unlogged_table_is_read_on_primaries(
        self, shop: Coordinated, router: Router
    ) -> None:
        """Replicas have none of its rows, and refuse; they are read for other statements still."""
        with unlogged(shop, "setting"), router.sessionmaker()() as session:
            assert session.scalar(select(func.count(sa.distinct(Setting.value)))) == 0
            assert router.explain(COUNTED).replicas


_LONG = text(
    "SELECT count(DISTINCT (a.id, b.id, c.id, d.id, e.id, f.id)) FROM customer a, customer b, "
    "customer c, customer d, customer e, customer f WHERE f.id < 6"
)
_MONITORS_END = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE application_name LIKE 'sqlroute monitor%'
"""
_LOCKED = "SELECT 1 FROM pg_locks WHERE granted AND mode = 'AccessExclusiveLock'"
_WAITS = "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'"
_HOLDS = """
SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE a.application_name = 'postgres_fdw' AND a.state = 'idle in transaction'
   AND l.mode = 'AccessShareLock' AND l.relation::regclass::text LIKE 'customer%'
"""


def while_it_runs(shop: Coordinated, router: Router, action: Callable[[], None]) -> list[Retried]:
    """Act when a long statement has read replicas and goes on; return what was told of it."""
    seen: list[Any] = []

    def ask_it() -> None:
        with router.sessionmaker()() as session:
            seen.append(session.scalar(_LONG))

    with heard(router) as events:
        thread = threading.Thread(target=ask_it)
        thread.start()
        until(lambda: any(shop.at(shop.servers.node(name), _HOLDS) for name in REPLICAS))
        action()
        thread.join()

    assert seen == [5 * 10**5]
    return [event for event in events if isinstance(event, Retried)]


def patient(shop: Coordinated, node: LocalNode, delay: str) -> None:
    shop.at(node, f"ALTER SYSTEM SET max_standby_streaming_delay = '{delay}'")
    shop.at(node, "SELECT pg_reload_conf()")


@contextmanager
def unlogged(shop: Coordinated, table: str) -> Iterator[None]:
    """Let the partitions of a table be unlogged for a while."""
    partitions = f"SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = '{table}'::regclass"
    change = (
        f"DO $$ DECLARE it text; BEGIN FOR it IN {partitions} LOOP "
        "EXECUTE format('ALTER TABLE %s SET {}', it); END LOOP; END $$"
    )
    shop.on_all(change.format("UNLOGGED"))
    settle(shop)
    try:
        yield
    finally:
        shop.on_all(change.format("LOGGED"))
        settle(shop)


@contextmanager
def frozen(shop: Coordinated, *names: str) -> Iterator[None]:
    for name in names:
        shop.servers.node(name).pause()
    try:
        yield
    finally:
        for name in names:
            shop.servers.node(name).resume()


class TestCheck:
    """What a statement has read is proved by the server that answered it."""

    def checked(self, shop: Coordinated, number: int, floors: dict[str, Any]) -> str:
        """Return the SQLSTATE of the check on one of the coordinator's databases."""
        database = f"{shop.database}_{number}" if number else shop.database
        epoch = shop.router.shard_map().epoch
        with psycopg.connect(**{**shop.host.conninfo, "dbname": database}) as connection:
            try:
                connection.execute(
                    "SELECT sqlroute.coordinator_check('app', %s, %s::jsonb)",
                    (epoch, json.dumps(floors)),
                )
            except psycopg.Error as error:
                return error.sqlstate or "?"
        return ""

    def test_only_the_replica_that_was_meant_will_do(self, shop: Coordinated) -> None:
        """Another server, or the same one after another start, is told by when it was started."""
        health = shop.router.health()
        started = {name: health.of(name).started for name in (*REPLICAS, "s0-a", "s1-a")}
        meant = {shard: [None, None, started[f"{shard}-b"]] for shard in ("s0", "s1")}
        others = {shard: [None, None, started[f"{shard}-c"]] for shard in ("s0", "s1")}
        timelines = {s: [health.shard(s).highest_timeline, None] for s in ("s0", "s1")}

        assert self.checked(shop, 1, meant) == ""
        assert self.checked(shop, 2, others) == ""
        assert self.checked(shop, 0, timelines) == ""
        assert self.checked(shop, 1, others) == "SR014"
        assert self.checked(shop, 1, timelines) == "SR014"
        assert self.checked(shop, 0, {s: [None, None, started[f"{s}-a"]] for s in meant}) == "SR014"

    def test_a_position_it_has_shown_must_be_reached(self, shop: Coordinated) -> None:
        health = shop.router.health()
        ahead = {shard: [None, "FFFF/0", health.of(f"{shard}-b").started] for shard in ("s0", "s1")}

        assert self.checked(shop, 1, ahead) == "SR014"


class TestMigrations:
    @pytest.fixture
    def migrated(self, shop: Coordinated) -> Iterator[Coordinated]:
        yield shop
        shop.on_all("ALTER TABLE customer DROP COLUMN IF EXISTS extra")
        settle(shop)
        coordinator.install(shop.router, analyze=False)

    def test_a_migration_that_replicas_do_not_have_yet(self, migrated: Coordinated) -> None:
        """Primaries answer; the refresh waits, says so and succeeds; then replicas answer again."""
        extra = text("SELECT count(DISTINCT extra) FROM customer")
        with held_back(migrated):
            migrated.on_all("ALTER TABLE customer ADD COLUMN extra int DEFAULT 7")
            reports = coordinator.refresh(migrated.router, analyze=False)
            assert [bool(report.faults) for report in reports] == [False, True, True]
            assert "schema of shard" in reports[1].faults[0]
            with migrated.routed(max_lag=60.0) as router, router.sessionmaker()() as session:
                with heard(router) as events:
                    assert session.scalar(extra) == 1
                assert {event.node for event in events if isinstance(event, Retried)} == {
                    "c-a/1",
                    "c-a/2",
                }
                assert nodes(session) == ("s0-a", "s1-a")
                assert "c-a/1: could not answer: coordinator c-a/1 is stale: the schema of" in str(
                    router.explain(COUNTED)
                )
                with heard(router) as events:
                    assert session.scalar(extra) == 1
                assert not [event for event in events if isinstance(event, Retried)]
        settle(migrated)
        with migrated.routed() as router, router.sessionmaker()() as session:
            assert session.scalar(extra) == 1
            assert nodes(session)[0] != "s0-a"
        assert [report.faults for report in coordinator.check(migrated.router)] == [(), (), ()]

    def test_a_table_that_is_rewritten_meanwhile_is_not_empty(
        self, migrated: Coordinated, router: Router
    ) -> None:
        """Replaying takes the locks that the migration took: what was read is of one schema."""
        seen: list[Any] = []

        def ask_it() -> None:
            with router.sessionmaker()() as session:
                try:
                    seen.append(session.scalar(COUNTED))
                except CoordinatorStale as error:
                    seen.append(error)

        replicas = [migrated.servers.node(name) for name in ("s1-b", "s1-c")]
        with (
            heard(router) as events,
            psycopg.connect(**migrated.servers.shard("s1").nodes[0].conninfo) as writer,
        ):
            writer.execute("ALTER TABLE customer ADD COLUMN extra float DEFAULT random()")
            until(lambda: all(migrated.at(node, _LOCKED) for node in replicas))
            thread = threading.Thread(target=ask_it)
            thread.start()
            until(lambda: any(migrated.at(node, _WAITS) for node in replicas))
            writer.commit()
            thread.join()

        assert isinstance(seen[0], CoordinatorStale)
        failed = {event.node for event in events if isinstance(event, Retried)}
        assert failed & {"c-a/1", "c-a/2"}

    def test_one_that_was_not_refreshed_is_stale(
        self, migrated: Coordinated, session: RoutingSession
    ) -> None:
        """Its old definition answers nothing, also where it looks as if it could."""
        migrated.on_all("ALTER TABLE customer ADD COLUMN extra int DEFAULT 7")
        with pytest.raises(_Stopped):
            coordinator.refresh(migrated.router, analyze=False, say=_stop)
        settle(migrated)

        assert session.scalar(COUNTED) == 10
        assert nodes(session) == ("s0-a", "s1-a")
        assert [bool(report.faults) for report in coordinator.check(migrated.router)] == [
            False,
            True,
            True,
        ]


class _Stopped(Exception):
    pass


def _stop(progress: str) -> None:
    """End a refresh when the database of the primaries is built."""
    if progress == "c-a/1: building":
        raise _Stopped


class TestOperations:
    def test_each_database_is_reported(self, shop: Coordinated) -> None:
        reports = coordinator.check(shop.router)

        assert [report.node for report in reports] == ["c-a", "c-a/1", "c-a/2"]
        assert [dict(report.replicas) for report in reports] == [
            {},
            {"s0": "s0-b", "s1": "s1-b"},
            {"s0": "s0-c", "s1": "s1-c"},
        ]
        assert all(report.tables == len(Base.metadata.tables) for report in reports)
        assert not any(report.faults for report in reports)

    def test_a_replica_that_is_down_is_said(self, shop: Coordinated) -> None:
        """The refresh succeeds all the same, and reads others first."""
        node = shop.servers.node("s1-b")
        node.stop()
        try:
            until(lambda: not shop.router.monitor.ask("s1", 1.0).of("s1-b").is_readable)
            reports = coordinator.check(shop.router)
            assert reports[1].faults[0].startswith("s1-b is down")
            assert (reports[0].faults, reports[2].faults) == ((), ())
            reports = coordinator.refresh(shop.router, analyze=False)
            assert dict(reports[1].replicas) == {"s0": "s0-b", "s1": "s1-c"}
            assert [bool(report.faults) for report in reports] == [False, False, True]
        finally:
            node.start()
        until(lambda: shop.router.monitor.ask("s1", 1.0).of("s1-b").is_readable)
        assert not any(r.faults for r in coordinator.refresh(shop.router, analyze=False))

    def test_fewer_are_asked_for(self, shop: Coordinated) -> None:
        """What is not configured any more is taken away, passwords too."""
        with changed(shop, replicas=1) as router:
            reports = coordinator.refresh(router)
            assert [report.node for report in reports] == ["c-a", "c-a/1"]
        assert mappings(shop, 1) > 0
        assert mappings(shop, 2) == 0
        coordinator.install(shop.router, analyze=False)
        assert mappings(shop, 2) > 0

    def test_remove_takes_all_away(self, shop: Coordinated) -> None:
        reports = coordinator.remove(shop.router)
        try:
            assert [report.node for report in reports] == ["c-a", "c-a/1", "c-a/2"]
            assert [mappings(shop, number) for number in (0, 1, 2)] == [0, 0, 0]
            with pytest.raises(OperationRefused, match="nothing is installed on c-a"):
                coordinator.remove(shop.router)
        finally:
            coordinator.install(shop.router, analyze=False)
        assert not any(report.faults for report in coordinator.check(shop.router))

    def test_the_database_of_another_coordinator_is_left_alone(self, shop: Coordinated) -> None:
        """One whose name is that of a database for replicas."""
        first = shop.node
        taken = replace(first, name="c-t", database=f"{first.database}_1")
        with (
            changed(shop, nodes=(taken,), replicas=0) as router,
            pytest.raises(OperationRefused, match="a coordinator's that reads replicas"),
        ):
            coordinator.install(router, analyze=False)


def mappings(shop: Coordinated, number: int) -> int:
    """Count the logins that a database of the coordinator keeps."""
    database = f"{shop.database}_{number}" if number else shop.database
    where = {**shop.host.conninfo, "dbname": database}
    with psycopg.connect(**where) as connection:
        (count,) = connection.execute("SELECT count(*) FROM pg_user_mappings").fetchone() or (0,)
    return int(count)


class TestPromotion:
    """The last: the servers have other roles afterwards."""

    def test_a_promoted_replica_is_not_taken_for_one(
        self, shop: Coordinated, router: Router
    ) -> None:
        """Nothing is wrong meanwhile, and a refresh has another one read."""
        old, heir = shop.servers.shard("s1").nodes[:2]
        with router.sessionmaker()() as session:
            for _ in range(2):
                assert session.scalar(COUNTED) == 10
        old.stop("immediate")
        shop.at(heir, "SELECT pg_promote()")
        ask = _asks(router)
        until(lambda: ask() == 10)
        until(lambda: _primary(router) == heir.name)
        with router.sessionmaker()() as session:
            key = shop.keys("s1")[0] + 700
            session.add(Customer(id=key, name="after", score=1))
            session.commit()
            for _ in range(3):
                assert session.scalar(COUNTED) == 11
        until(lambda: _primary(shop.router) == heir.name)
        faults = [fault for report in coordinator.check(shop.router) for fault in report.faults]
        assert any("s1-b is up, and no replica (primary)" in fault for fault in faults)
        reports = coordinator.refresh(shop.router, analyze=False)
        assert dict(reports[1].replicas) == {"s0": "s0-b", "s1": "s1-c"}


def _asks(router: Router) -> Callable[[], Any]:
    def ask() -> Any:
        with router.sessionmaker()() as session:
            return session.scalar(COUNTED)

    return ask


def _primary(router: Router) -> str:
    found = router.monitor.ask("s1", 1.0).primary("s1")
    return found.node if found is not None else ""
