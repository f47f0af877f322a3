"""Every wait has an end: for servers that hang, for connections, for a primary."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import until
from sqlalchemy import exc, orm, select, update
from sqlalchemy.orm import Mapped, mapped_column

from sqlroute import Router, RoutingSession
from sqlroute.config import load
from sqlroute.errors import DeadlineExceeded, NoPrimary, PoolExhausted, UnknownName
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

NAP = select(sa.func.pg_sleep(5)).execution_options(sqlroute_role="primary")
LATE = 0.25
"""Seconds that a busy machine may need beyond a deadline."""


class Base(orm.DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: Any) -> LocalTopology:
    """One shard with one replica."""
    found: LocalTopology = sqlroute_topology_factory(shards=1, replicas=1, label="deadlines")
    with Router.from_config(found.config_path) as router:
        router.create_all(Base.metadata)
        with router.sessionmaker()() as session:
            session.add(Note(id=1, text="old"))
            session.commit()
            (token,) = session.token.positions
        until(lambda: router.monitor.ask("s0", 1.0).replicas("s0")[0].lsn >= token.lsn)
    return found


@pytest.fixture
def make(servers: LocalTopology) -> Iterator[Callable[..., Router]]:
    """Make routers with another policy; closed at the end."""
    made = []

    def make(**policy: Any) -> Router:
        settings = load(servers.config_path)
        router = Router(settings.topology, replace(settings.policy, **policy))
        router.health()
        made.append(router)
        return router

    yield make
    for router in made:
        router.close()


@contextmanager
def stopped(servers: LocalTopology, name: str) -> Iterator[None]:
    """Stop all processes of a server: it keeps its connections and answers nothing."""
    servers.node(name).pause()
    try:
        yield
    finally:
        servers.node(name).resume()


def renamed(text: str = "new") -> Any:
    return update(Note).where(Note.id == 1).values(text=text)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + LATE


class TestSlowStatement:
    @pytest.mark.parametrize("explicit", [False, True])
    def test_it_is_cut(self, make: Callable[..., Router], explicit: bool) -> None:
        """In AUTOCOMMIT and in a transaction; the session is usable after a rollback."""
        router = make()
        with router.sessionmaker()() as session:
            if explicit:
                session.begin()
            with (
                within(0.4),
                pytest.raises(DeadlineExceeded, match="the connection was cut"),
                session.deadline(0.4),
            ):
                session.execute(NAP)
            session.rollback()
            assert session.scalar(select(Note.id)) == 1
        assert all(
            e.pool.checkedout() == 0 for e in router.engines(is_async=False)._engines.values()
        )

    def test_the_server_stops_too(self, make: Callable[..., Router]) -> None:
        """It is asked to cancel what nobody waits for any more."""
        router = make()
        with router.sessionmaker(deadline=0.3)() as session, pytest.raises(DeadlineExceeded):
            session.execute(NAP)
        busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%'"

        def is_idle() -> bool:
            with router.primary_engine("s0").connect() as connection:
                return connection.exec_driver_sql(busy).scalar_one() == 0

        assert until(is_idle) < 3

    def test_a_quick_one_is_not(self, make: Callable[..., Router]) -> None:
        """Thousands of calls under one deadline; nothing is cut that has ended."""
        with make().sessionmaker(deadline=20)() as session:
            for _ in range(500):
                assert session.scalar(select(Note.id)) == 1
                session.execute(renamed())
                session.commit()

    def test_a_block_shortens_only(self, make: Callable[..., Router]) -> None:
        """The session's own deadline stays."""
        with make().sessionmaker(deadline=0.3)() as session:
            with within(0.3), pytest.raises(DeadlineExceeded), session.deadline(60):
                session.execute(NAP)
            session.rollback()
            with pytest.raises(DeadlineExceeded, match="was not begun"):
                session.execute(renamed())

    def test_a_block_ends(self, make: Callable[..., Router]) -> None:
        """After it there is no deadline, in the same transaction neither."""
        with make().sessionmaker()() as session:
            session.begin()
            with session.deadline(0.2):
                session.execute(renamed())
            time.sleep(0.3)
            session.execute(renamed("again"))
            session.commit()

    @pytest.mark.parametrize("wrong", [0, -1, "5", True, float("inf"), float("nan")])
    def test_what_is_no_time_is_refused(self, make: Callable[..., Router], wrong: Any) -> None:
        """Before anything is sent."""
        with pytest.raises(UnknownName, match="seconds above 0"):
            make().sessionmaker(deadline=wrong)()


class TestHangingPrimary:
    def test_no_write_outlives_its_deadline(
        self, servers: LocalTopology, make: Callable[..., Router]
    ) -> None:
        """A statement, a flush and a commit under way, and those that come later."""
        router = make()
        maker = router.sessionmaker()

        def flushed(session: RoutingSession) -> None:
            session.get_one(Note, 1).text = "flushed"
            session.flush()

        def executed(session: RoutingSession) -> None:
            session.execute(renamed())

        with ThreadPoolExecutor() as threads:
            opened = maker()
            opened.begin()
            opened.execute(select(1))  # a connection is there, and hangs from now on
            committing = maker()
            committing.execute(renamed("never"))
            with stopped(servers, "s0-a"):

                def late(session: RoutingSession, work: Callable[[RoutingSession], None]) -> float:
                    began = time.monotonic()
                    refused = pytest.raises((DeadlineExceeded, NoPrimary))
                    with session, refused, session.deadline(1.0):
                        work(session)
                    return time.monotonic() - began

                work = [
                    threads.submit(late, opened, executed),
                    threads.submit(late, committing, lambda session: session.commit()),
                    *(threads.submit(late, maker(), do) for do in (executed, flushed) * 3),
                ]
                took = [future.result() for future in work]
        assert max(took) < 1.0 + 2 * LATE
        assert not any(session.in_transaction() for session in (opened, committing))
        until(lambda: router.monitor.ask("s0", 1.0).primary("s0"))

    def test_async_requests_end_in_time(
        self, servers: LocalTopology, make: Callable[..., Router]
    ) -> None:
        """Fifty at once, and the event loop goes on meanwhile."""
        router = make()

        async def main() -> tuple[list[float], float]:
            maker = router.async_sessionmaker(deadline=1.0)
            async with maker() as session:
                await session.execute(renamed())
                await session.commit()

            async def one() -> float:
                began = time.monotonic()
                refused = pytest.raises((DeadlineExceeded, NoPrimary, PoolExhausted))
                async with maker() as session:
                    with refused:
                        await session.execute(renamed())
                return time.monotonic() - began

            async def beat() -> float:
                longest, last = 0.0, time.monotonic()
                while True:
                    try:
                        await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        return longest
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now

            heart = asyncio.create_task(beat())
            with stopped(servers, "s0-a"):
                took = await asyncio.gather(*(one() for _ in range(50)))
            heart.cancel()
            longest = await heart
            await router.engines(is_async=True).aclose()
            return took, longest

        took, longest = asyncio.run(main())
        assert max(took) < 1.0 + 2 * LATE
        assert longest < 0.5
        until(lambda: router.monitor.ask("s0", 1.0).primary("s0"))

    def test_a_write_waits_for_the_primary_to_come_back(
        self, servers: LocalTopology, make: Callable[..., Router]
    ) -> None:
        """Down for a moment: the transaction that begins then is slower, not failed."""
        router = make(primary_wait=10.0)
        with ThreadPoolExecutor() as threads:
            with stopped(servers, "s0-a"):
                until(lambda: router.health().primary("s0") is None)

                def write() -> None:
                    with router.sessionmaker()() as session:
                        session.execute(renamed("patient"))
                        session.commit()

                waiting = [threads.submit(write) for _ in range(8)]
                time.sleep(0.3)
                assert not any(future.done() for future in waiting)
            for future in waiting:
                future.result(10)

    def test_its_wait_is_bounded(self, servers: LocalTopology, make: Callable[..., Router]) -> None:
        """By the policy, where the session has no deadline."""
        router = make(primary_wait=0.5)
        with stopped(servers, "s0-a"):
            until(lambda: router.health().primary("s0") is None)
            began = time.monotonic()
            with router.sessionmaker()() as session, pytest.raises(NoPrimary, match="s0-a"):
                session.execute(renamed())
            assert 0.4 < time.monotonic() - began < 1.5
        until(lambda: router.monitor.ask("s0", 1.0).primary("s0"))


class TestPool:
    def test_exhaustion_says_who_has_the_connections(self, make: Callable[..., Router]) -> None:
        """Threads by name, and for how long; it is SQLAlchemy's TimeoutError, too."""
        router = make(pool_size=1, max_overflow=0, pool_timeout=0.2)
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with router.sessionmaker()() as session:
                session.execute(renamed())
                held.set()
                release.wait(20)

        holder = threading.Thread(target=hold, name="reports")
        holder.start()
        held.wait(10)
        try:
            with router.sessionmaker()() as session, pytest.raises(exc.TimeoutError) as caught:
                session.execute(renamed())
        finally:
            release.set()
            holder.join()
        assert isinstance(caught.value, PoolExhausted)
        assert "no connection to s0-a within 0.2 s: all 1" in str(caught.value)
        assert "by thread reports for " in str(caught.value)
        with router.sessionmaker()() as session:
            session.execute(renamed())

    def test_a_deadline_bounds_the_wait(self, make: Callable[..., Router]) -> None:
        """However long the pool would have waited."""
        router = make(pool_size=1, max_overflow=0, pool_timeout=30.0)
        with router.sessionmaker()() as holder, router.sessionmaker(deadline=0.3)() as session:
            holder.execute(renamed())
            with within(0.3), pytest.raises(PoolExhausted):
                session.execute(renamed())

    def test_tasks_are_named(self, make: Callable[..., Router]) -> None:
        """Under AsyncSession it is the task that holds."""
        router = make(pool_size=1, max_overflow=0, pool_timeout=0.2)

        async def main() -> str:
            asyncio.current_task().set_name("upload")  # type: ignore[union-attr]
            maker = router.async_sessionmaker()
            async with maker() as holder, maker() as session:
                await holder.execute(renamed())
                with pytest.raises(PoolExhausted) as caught:
                    await session.execute(renamed())
            await router.engines(is_async=True).aclose()
            return str(caught.value)

        assert "task upload" in asyncio.run(main())
