"""A statement on several shards when one of them is down, or when it is too much.

Without ``sqlroute_partial`` an error that names the shard; with it the answer of the others.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import until
from models import Base, Customer, Order
from sqlalchemy import exc, func, orm, select

from sqlroute import CrossShardRefused, DeadlineExceeded, Router, RoutingAsyncSession
from sqlroute.config import load
from sqlroute.errors import NoPrimary, PlanError, TooManyRows, UnknownName
from sqlroute.events import Event, LeftOut
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

COUNT = select(func.count()).select_from(Customer)
SLOW = select(
    Customer.score, sa.case((Customer.score % 2 == 1, sa.cast(func.pg_sleep(20), sa.Text)))
)
"""Answered by shard s0 at once, and by s1, which has the odd scores, not at all."""

PARTIAL: dict[str, Any] = {"sqlroute_partial": True}


@dataclass(frozen=True, slots=True)
class World:
    """Two shards of a primary and a replica; four customers on each, with an order each."""

    servers: LocalTopology
    keys: dict[str, list[int]]

    @property
    def victims(self) -> list[Any]:
        return [node for node in self.servers.nodes if node.name.startswith("s1-")]

    def kill(self) -> None:
        """End every process of shard s1 at once."""
        for node in self.victims:
            node.kill()

    def pause(self) -> None:
        """Stop every process of shard s1: its connections stay open, and nothing answers."""
        for node in self.victims:
            node.pause()

    def is_asked(self) -> bool:
        """Say if shard s1 works on a statement of a test."""
        return any(_rows(node, f"SELECT pid {_SLEEPING}") for node in self.victims)

    @contextmanager
    def failing(self, fail: Callable[[], None]) -> Iterator[None]:
        """Let shard s1 fail as soon as it works on the statement in the block."""
        errors: list[BaseException] = []

        def work() -> None:
            try:
                until(self.is_asked, 10)
                fail()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            thread.join()
        assert errors == []


_SLEEPING = """
    FROM pg_stat_activity
    WHERE state = 'active' AND query LIKE '%pg_sleep(%' AND pid <> pg_backend_pid()
"""


def _rows(node: Any, query: str) -> list[Any]:
    import psycopg

    with psycopg.connect(**node.conninfo, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def _world(sqlroute_topology_factory: Any) -> World:
    from sqlroute.routing.rows import bucket_of_key

    servers = sqlroute_topology_factory(shards=2, replicas=1, label="partial")
    with Router.from_config(servers.config_path) as router:
        router.create_all(Base.metadata)
        owners, table = router.shard_map().owners, Base.metadata.tables["customer"]

        def is_on(shard: str, key: int) -> bool:
            return owners[bucket_of_key(table, {"id": key}, len(owners))] == shard

        keys = {
            shard: list(itertools.islice(filter(partial(is_on, shard), itertools.count(1)), 4))
            for shard in ("s0", "s1")
        }
        with router.sessionmaker()() as session:
            for shard, mine in keys.items():
                for place, key in enumerate(mine):
                    score = 2 * place + (shard == "s1")
                    order = Order(id=key)
                    session.add(Customer(id=key, name="c", score=score, orders=[order]))
            session.commit()
    return World(servers, keys)


@pytest.fixture
def world(_world: World) -> Iterator[World]:
    """All servers up; what a test breaks is put right after it."""
    _settle(_world)
    yield _world
    for node in _world.victims:
        node.resume()
        node.start()


def _settle(world: World) -> None:
    """Wait until every server has every row, and works for no client that is gone."""
    for node in world.servers.nodes:
        until(lambda n=node: n.answers() and _has_all(n))
        _rows(node, f"SELECT pg_terminate_backend(pid) {_SLEEPING}")  # it was stopped, and goes on


def _has_all(node: Any) -> bool:
    import psycopg

    try:
        return _rows(node, 'SELECT count(*) FROM "order"') == [(4,)]
    except psycopg.errors.UndefinedTable:  # not replayed yet
        return False


@pytest.fixture
def make(world: World) -> Iterator[Callable[..., Router]]:
    """Make routers that have looked around already; closed at the end, with nothing held."""
    made: list[Router] = []

    def make(**policy: Any) -> Router:
        settings = load(world.servers.config_path)
        policy = {"primary_wait": 0.2, "scatter_timeout": 10.0, **policy}
        router = Router(settings.topology, replace(settings.policy, **policy))
        made.append(router)
        until(lambda: _knows_all(router))
        return router

    yield make
    for router in made:
        engines = router.engines(is_async=False)
        held = [engine.pool.checkedout() for engine in engines._engines.values()]  # type: ignore[attr-defined]
        router.close()
        assert not any(held), "a connection was not given back"


def _knows_all(router: Router) -> bool:
    health = router.health()
    return all(health.of(name).is_readable for name in ("s0-a", "s0-b", "s1-a", "s1-b"))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def run(router: Router, body: Callable[[RoutingAsyncSession], Awaitable[None]]) -> None:
    """Run a coroutine function with an async session of a router."""

    async def main() -> None:
        try:
            async with router.async_sessionmaker()() as session:
                await body(session)
            engines = router.engines(is_async=True)._engines.values()
            assert not any(e.pool.checkedout() for e in engines)  # type: ignore[attr-defined]
        finally:
            await router.aclose()

    asyncio.run(main())


class TestWithoutIt:
    """An error that names the shard and its nodes; everything else goes on."""

    def test_a_shard_that_is_down_is_named(self, world: World, make: Callable[..., Router]) -> None:
        router = make()
        world.kill()
        with router.sessionmaker()() as session:
            with pytest.raises(NoPrimary, match=r"shard s1 .*s1-a .*s1-b ") as caught:
                session.execute(COUNT)
            assert (caught.value.shard, caught.value.retryable) == ("s1", True)
            assert len(session.scalars(of(world, "s0")).all()) == 4

    def test_one_that_goes_down_is_named(self, world: World, make: Callable[..., Router]) -> None:
        router = make()
        with router.sessionmaker()() as session:
            with world.failing(world.kill), pytest.raises(NoPrimary) as caught:
                session.execute(SLOW)
            assert caught.value.shard == "s1"
            assert len(session.scalars(of(world, "s0")).all()) == 4

    def test_one_that_goes_down_in_a_transaction_is_named(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        """SQLAlchemy's own error, as of any lost connection, with the shard and node in it."""
        router = make()
        with router.sessionmaker()() as session:
            session.begin()
            with (
                world.failing(world.kill),
                pytest.raises(exc.OperationalError, match=r"\(on s1 \(s1-a\)\)"),
            ):
                session.execute(SLOW)
            session.rollback()
            assert len(session.scalars(of(world, "s0")).all()) == 4

    @pytest.mark.parametrize("of_session", [False, True], ids=["timeout", "deadline"])
    def test_one_that_hangs_is_named_in_time(
        self, world: World, make: Callable[..., Router], of_session: bool
    ) -> None:
        router = make(scatter_timeout=10.0 if of_session else 1.0)
        with router.sessionmaker()() as session:
            session.execute(COUNT)
            world.pause()
            with (
                within(4),
                pytest.raises((DeadlineExceeded, NoPrimary), match="s1"),
                session.deadline(1.0 if of_session else 60.0),
            ):
                session.execute(SLOW)
            session.rollback()
            assert len(session.scalars(of(world, "s0")).all()) == 4

    def test_async_sessions_name_it_too(self, world: World, make: Callable[..., Router]) -> None:
        async def body(session: RoutingAsyncSession) -> None:
            with world.failing(world.kill), pytest.raises(NoPrimary) as caught:
                await session.execute(SLOW)
            assert caught.value.shard == "s1"
            with pytest.raises(NoPrimary, match="shard s1 "):
                await session.execute(COUNT)
            assert len((await session.scalars(of(world, "s0"))).all()) == 4

        run(make(), body)


STREAM = select(Customer.id).order_by(Customer.score).execution_options(yield_per=2)
"""A row of each shard at a time."""


class TestStreamsWithoutIt:
    """What goes wrong when some rows were read already: each batch is a question of its own."""

    def test_a_shard_that_is_lost_midway_is_named(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        with make().sessionmaker()() as session:
            found = iter(session.scalars(STREAM))
            next(found)
            world.kill()
            with pytest.raises(exc.OperationalError, match=r"\(on s1 \(s1-[ab]\)\)"):
                list(found)
            session.rollback()
            assert len(session.scalars(of(world, "s0")).all()) == 4

    @pytest.mark.parametrize("of_session", [False, True], ids=["timeout", "deadline"])
    def test_one_that_hangs_midway_is_named_in_time(
        self, world: World, make: Callable[..., Router], of_session: bool
    ) -> None:
        with make(scatter_timeout=10.0 if of_session else 1.0).sessionmaker()() as session:
            with session.deadline(1.5 if of_session else 60.0):
                found = iter(session.scalars(STREAM))
                next(found)
                world.pause()
                with within(4), pytest.raises(DeadlineExceeded, match=r"from s1 \(s1-[ab]\)"):
                    list(found)
            session.rollback()
            assert len(session.scalars(of(world, "s0")).all()) == 4

    def test_a_stream_of_one_shard_keeps_the_deadline(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        statement = of(world, "s1").execution_options(yield_per=1)
        with make().sessionmaker()() as session:
            with session.deadline(1.5):
                found = iter(session.scalars(statement))
                next(found)
                world.pause()
                with within(4), pytest.raises(DeadlineExceeded, match="s1"):
                    list(found)
            session.rollback()
            assert len(session.scalars(of(world, "s0")).all()) == 4

    def test_async_streams_do_the_same(self, world: World, make: Callable[..., Router]) -> None:
        async def body(session: RoutingAsyncSession) -> None:
            found = await session.stream_scalars(STREAM)
            await found.fetchmany(2)
            world.pause()
            with within(4), pytest.raises(DeadlineExceeded, match=r"from s1 \(s1-[ab]\)"):
                await found.all()
            await session.rollback()
            assert len((await session.scalars(of(world, "s0"))).all()) == 4

        run(make(scatter_timeout=1.0), body)


def of(world: World, shard: str) -> sa.Select[tuple[Customer]]:
    """Select the customers of one shard by their keys."""
    return select(Customer).where(Customer.id.in_(world.keys[shard]))


class TestPartial:
    """What the shards that are there know, and the names of the others."""

    def test_what_is_down_is_left_out_and_named(
        self, world: World, make: Callable[..., Router], caplog: pytest.LogCaptureFixture
    ) -> None:
        """By the statement, the call or the session; told as an event and as a warning."""
        router = make()
        told: list[Event] = []
        router.listen(told.append, LeftOut)
        ordered = select(Customer.score).order_by(Customer.score.desc()).limit(2)
        with router.sessionmaker()() as session:
            assert session.scalar(COUNT, execution_options=PARTIAL) == 8
            assert session.missing_shards == ()
            world.kill()
            with within(3), caplog.at_level(logging.WARNING, "sqlroute.events"):
                assert session.scalar(COUNT, execution_options=PARTIAL) == 4
            assert session.missing_shards == ("s1",)
            assert session.scalars(ordered.execution_options(**PARTIAL)).all() == [6, 4]
            average = select(func.avg(Customer.score)).execution_options(**PARTIAL)
            assert session.scalar(average) == 3
        with router.sessionmaker(execution_options=PARTIAL)() as session:
            assert session.scalar(COUNT) == 4
            assert len(session.scalars(of(world, "s0")).all()) == 4
            assert session.missing_shards == ()

        assert isinstance(told[0], LeftOut)
        assert (told[0].shard, len(told)) == ("s1", 4)
        assert "shard s1 has no primary now" in told[0].reason
        assert "shard s1: a partial answer is without it" in caplog.text

    def test_what_goes_down_is_left_out(self, world: World, make: Callable[..., Router]) -> None:
        router = make()
        with router.sessionmaker()() as session, within(8):
            with world.failing(world.kill):
                rows = session.execute(SLOW, execution_options=PARTIAL).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.missing_shards == ("s1",)

    def test_what_hangs_is_left_out(self, world: World, make: Callable[..., Router]) -> None:
        """As soon as the monitor finds that out; and no later than the scatter's time."""
        router = make(scatter_timeout=3.0)
        with router.sessionmaker()() as session:
            with within(7), world.failing(world.pause):
                rows = session.execute(SLOW, execution_options=PARTIAL).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.missing_shards == ("s1",)
            assert len(session.scalars(of(world, "s0")).all()) == 4

    @pytest.mark.parametrize("explicit", [False, True])
    @pytest.mark.parametrize("of_session", [False, True], ids=["timeout", "deadline"])
    def test_what_is_late_is_left_out(
        self, world: World, make: Callable[..., Router], of_session: bool, explicit: bool
    ) -> None:
        """And stopped there; in a transaction that is over on the shard, until a rollback."""
        router = make(scatter_timeout=60.0 if of_session else 1.0)
        with router.sessionmaker()() as session:
            if explicit:
                session.begin()
            session.execute(COUNT)
            with within(4), session.deadline(1.0 if of_session else 60.0):
                rows = session.execute(SLOW, execution_options=PARTIAL).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.missing_shards == ("s1",)
            until(lambda: not world.is_asked())
            assert len(session.scalars(of(world, "s0")).all()) == 4
            if explicit:
                with pytest.raises(exc.SQLAlchemyError):
                    session.execute(COUNT)
                session.rollback()
            assert session.scalar(COUNT) == 8

    def test_async_sessions_do_the_same(self, world: World, make: Callable[..., Router]) -> None:
        async def body(session: RoutingAsyncSession) -> None:
            with world.failing(world.kill):
                rows = (await session.execute(SLOW, execution_options=PARTIAL)).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.missing_shards == ("s1",)
            assert await session.scalar(COUNT, execution_options=PARTIAL) == 4
            with pytest.raises(exc.DataError, match="division by zero"):
                await session.execute(BROKEN, execution_options=PARTIAL)

        run(make(), body)

    def test_async_sessions_wait_no_longer_than_their_time(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        async def body(session: RoutingAsyncSession) -> None:
            with within(4):
                rows = (await session.execute(SLOW, execution_options=PARTIAL)).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.missing_shards == ("s1",)
            until(lambda: not world.is_asked())
            assert await session.scalar(COUNT) == 8

        run(make(scatter_timeout=1.0), body)

    def test_objects_and_their_loads_are_of_the_same_shards(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        """An eager load of a partial answer is one, and does not hide what that was without."""
        router = make()
        world.kill()
        statement = select(Customer).options(orm.selectinload(Customer.orders))
        with router.sessionmaker()() as session:
            found = session.scalars(statement, execution_options=PARTIAL).all()
            assert sorted(customer.id for customer in found) == world.keys["s0"]
            assert all(len(customer.orders) == 1 for customer in found)
            assert session.missing_shards == ("s1",)

    def test_explain_says_what_is_left_out(self, world: World, make: Callable[..., Router]) -> None:
        router = make()
        world.kill()
        with router.sessionmaker()() as session:
            until(lambda: not router.health().of("s1-b").is_readable)
            until(lambda: router.health().primary("s1") is None)
            found = session.explain(COUNT.execution_options(**PARTIAL))

        assert found.shards == ("s0",)
        assert [gone["shard"] for gone in found.describe()["missing"]] == ["s1"]
        assert "  without s1: shard s1 has no primary now" in str(found)
        assert "sqlroute_partial" in found.reasons[-1]

    def test_a_transaction_that_has_not_written_goes_on(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        """What it had of the shard is over; the other's part of it is as it was."""
        router = make()
        with router.sessionmaker()() as session:
            session.begin()
            began = select(func.now()).where(Customer.id == world.keys["s0"][0])
            before = session.scalar(began)
            with world.failing(world.kill):
                rows = session.execute(SLOW, execution_options=PARTIAL).all()
            assert sorted(row.score for row in rows) == [0, 2, 4, 6]
            assert session.scalar(COUNT, execution_options=PARTIAL) == 4
            assert session.missing_shards == ("s1",)
            assert session.scalar(began) == before
            session.rollback()
            assert session.scalar(COUNT, execution_options=PARTIAL) == 4

    def test_an_error_of_the_statement_is_an_error(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        with make().sessionmaker()() as session:
            with pytest.raises(exc.DataError, match="division by zero"):
                session.execute(BROKEN, execution_options=PARTIAL)
            assert session.scalar(COUNT, execution_options=PARTIAL) == 8

    def test_nothing_at_all_is_no_answer(self, world: World, make: Callable[..., Router]) -> None:
        """Nor is it one when the statement needs only the shard that is down."""
        with make(scatter_timeout=0.5).sessionmaker()() as session:
            with pytest.raises(DeadlineExceeded, match=r"s0 .*s1 "):
                session.execute(select(Customer.id, func.pg_sleep(20)), execution_options=PARTIAL)
            world.kill()
            with pytest.raises(NoPrimary, match="shard s1 "):
                session.execute(of(world, "s1"), execution_options=PARTIAL)


BROKEN = select(1 / (Customer.score - Customer.score))


class TestRefused:
    """Where nobody could tell what such an answer means, before anything is sent."""

    @pytest.fixture
    def session(self, make: Callable[..., Router]) -> Iterator[Any]:
        with make().sessionmaker(execution_options=PARTIAL)() as session:
            yield session

    def test_writes(self, world: World, session: Any) -> None:
        change = sa.update(Customer).where(Customer.id == world.keys["s0"][0]).values(score=0)
        for statement in (change, select(Customer).with_for_update()):
            with pytest.raises(PlanError, match="sqlroute_partial on what is not proved"):
                session.execute(statement)

    def test_a_transaction_that_has_written(self, world: World, session: Any) -> None:
        key = world.keys["s0"][0]
        change = sa.update(Customer).where(Customer.id == key).values(name="new")
        session.execute(change, execution_options={"sqlroute_partial": False})
        with pytest.raises(CrossShardRefused, match="has written on shard s0"):
            session.execute(COUNT)
        assert session.scalar(COUNT, execution_options={"sqlroute_partial": False}) == 8
        session.rollback()
        assert session.scalar(COUNT) == 8

    def test_streams(self, session: Any) -> None:
        with pytest.raises(CrossShardRefused, match="a stream may lose a shard"):
            session.execute(select(Customer).execution_options(yield_per=2))

    def test_the_coordinator(self, session: Any) -> None:
        with pytest.raises(CrossShardRefused, match="sqlroute_partial was asked for"):
            session.execute(COUNT.execution_options(sqlroute_tier="coordinator"))

    def test_a_value_that_is_no_bool(self, session: Any) -> None:
        with pytest.raises(UnknownName, match="sqlroute_partial='yes'; it is True or False"):
            session.execute(COUNT, execution_options={"sqlroute_partial": "yes"})


class TestRowCap:
    """``max_scatter_rows`` counts what all shards send together."""

    def test_more_rows_are_refused(self, make: Callable[..., Router]) -> None:
        """With the way out; the session goes on, and so does what stays below."""
        with make(max_scatter_rows=7).sessionmaker()() as session:
            for statement in (
                select(Customer.id),
                select(Customer).order_by(Customer.id),
                select(Customer).options(orm.joinedload(Customer.orders)),
            ):
                with pytest.raises(TooManyRows, match="max_scatter_rows = 7 rows") as caught:
                    session.execute(statement)
                assert caught.value.max_rows == 7
            assert len(session.scalars(select(Customer).limit(3)).all()) == 3
            assert session.scalar(COUNT) == 8

    def test_no_shard_sends_many_more(self, make: Callable[..., Router]) -> None:
        """Each is asked for one row more than are allowed, at most."""
        router = make(max_scatter_rows=2)
        numbers = []

        def note(_: Any, cursor: Any, *__: Any) -> None:
            numbers.append(cursor.rowcount)

        sa.event.listen(sa.Engine, "after_cursor_execute", note)
        try:
            with router.sessionmaker()() as session, pytest.raises(TooManyRows):
                session.execute(select(Customer.id))
        finally:
            sa.event.remove(sa.Engine, "after_cursor_execute", note)
        assert numbers == [3, 3]

    def test_streams_and_one_shard_are_not_capped(
        self, world: World, make: Callable[..., Router]
    ) -> None:
        with make(max_scatter_rows=2).sessionmaker()() as session:
            streamed = session.scalars(select(Customer), execution_options={"yield_per": 2})
            assert len(streamed.all()) == 8
            assert len(session.scalars(of(world, "s1")).all()) == 4

    def test_async_results_are_counted_too(self, make: Callable[..., Router]) -> None:
        async def body(session: RoutingAsyncSession) -> None:
            with pytest.raises(TooManyRows):
                await session.execute(select(Customer))
            assert await session.scalar(COUNT) == 8

        run(make(max_scatter_rows=7), body)

    def test_exactly_as_many_are_not_too_many(self, make: Callable[..., Router]) -> None:
        with make(max_scatter_rows=8).sessionmaker()() as session:
            assert len(session.scalars(select(Customer)).all()) == 8
