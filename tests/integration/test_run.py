"""Promises of ``router.run``: a unit of work is done once or not at all, whatever gets lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import psycopg
import pytest
import sqlalchemy as sa
from conftest import PRIMARIES, Shop, until
from models import Customer
from sqlalchemy import exc, orm, select, text

from sqlroute import (
    InDoubtCommit,
    Router,
    RoutingAsyncSession,
    RoutingSession,
    StaleObjectRead,
    UnknownCommit,
    is_retryable,
    retry,
)
from sqlroute.local.topology import LocalTopology
from sqlroute.testing import TopologyFactory, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

SCORE = "SELECT name, score FROM customer ORDER BY name"
COMMIT = b"COMMIT; SELECT"


class Wire:
    """A proxy before each primary, which loses a message once: itself, or the answer to it.

    Attributes:
        lost: how many it has lost.
        is_cut: new connections are refused.
    """

    def __init__(self, servers: LocalTopology, names: tuple[str, ...] = PRIMARIES) -> None:
        first = free_ports(len(names))
        self.ports = {name: first + i for i, name in enumerate(names)}
        self.lost = 0
        self.is_cut = False
        self._servers = servers
        self._traps: list[tuple[str, bytes, str, bool]] = []
        self._cuts = False
        self._chance = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._listening: list[asyncio.Server] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def router(self, **policy: Any) -> Router:
        """Return a router that reaches the primaries by this wire."""
        import tomllib

        content = self._servers.config_path.read_text()
        for name, port in self.ports.items():
            content = content.replace(f":{self._servers.node(name).port}/", f":{port}/")
        found = tomllib.loads(content)
        return Router.from_config({**found, "policy": {**found.get("policy", {}), **policy}})

    def lose(
        self, node: str, message: bytes, what: str, *, holds: bool = False, cuts: bool = False
    ) -> None:
        """Lose the next message to a node that contains some bytes, and its connection.

        Args:
            what: ``"question"``: it does not get there, or ``"answer"``: that does not come back.
            holds: the server is not told that the connection is lost.
            cuts: from then on nobody new gets through.
        """
        self._cuts = cuts
        self._traps.append((node, message, what, holds))

    def lose_at_random(self, chance: float) -> None:
        """Lose so many of the COMMITs from now on."""
        self._chance = chance

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        for name, port in self.ports.items():
            server = await asyncio.start_server(
                lambda heard, answer, name=name: self._serve(name, heard, answer),
                "127.0.0.1",
                port,
            )
            self._listening.append(server)

    async def _end(self) -> None:
        for server in self._listening:
            server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(
        self, name: str, heard: asyncio.StreamReader, answer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        node = self._servers.node(name)
        try:
            if self.is_cut:
                raise ConnectionError
            said, forward = await asyncio.open_connection(node.conninfo["host"], node.port)
        except OSError:
            answer.close()
            self._pumps.discard(task)
            return
        down = asyncio.create_task(_pump(said, answer))
        try:
            trap = await self._up(name, heard, forward)
            if trap is not None:
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)
                _, message, what, holds = trap
                if what == "answer":
                    forward.write(message)
                    await said.read(65_536)
                answer.close()
                if holds:
                    await said.read()  # until the server ends it
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            down.cancel()
            for writer in (forward, answer):
                writer.close()
            self._pumps.discard(task)

    async def _up(
        self, name: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> tuple[str, bytes, str, bool] | None:
        """Forward until a message is to be lost; return how."""
        while data := await source.read(65_536):
            for trap in self._traps:
                if trap[0] == name and trap[1] in data:
                    self._traps.remove(trap)
                    self.is_cut = self._cuts
                    self.lost += 1
                    return (name, data, *trap[2:])
            if COMMIT in data and random.random() < self._chance:
                self.lost += 1
                what = random.choice(("question", "answer"))
                return name, data, what, random.random() < 0.5
            sink.write(data)
            await sink.drain()
        return None


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass
    finally:
        sink.close()


@pytest.fixture
def wire(shop: Shop) -> Iterator[Wire]:
    with Wire(shop.servers) as wire:
        yield wire


@pytest.fixture
def routed(wire: Wire) -> Iterator[Router]:
    with wire.router() as router:
        yield router


@pytest.fixture(params=["sync", "async"])
def do(request: pytest.FixtureRequest, routed: Router) -> Callable[..., Any]:
    """Run a function of a sync session by ``router.run``, or by ``router.arun``."""

    def sync(fn: Callable[[RoutingSession], Any], **options: Any) -> Any:
        return routed.run(fn, **options)

    def asynchronous(fn: Callable[[RoutingSession], Any], **options: Any) -> Any:
        async def main() -> Any:
            try:
                return await routed.arun(lambda session: session.run_sync(fn), **options)
            finally:
                await routed.engines(is_async=True).aclose()

        return asyncio.run(main())

    return sync if request.param == "sync" else asynchronous


class Adding:
    """A unit of work that adds 1 to the score of customers; it counts its runs.

    Args:
        trouble: what happens in each run after the writes, the next of these each time.
    """

    def __init__(self, *keys: int, trouble: list[Callable[[Any], None]] | None = None) -> None:
        self.keys = keys
        self.runs = 0
        self._trouble = trouble or []

    def __call__(self, session: RoutingSession) -> str:
        self.runs += 1
        for key in self.keys:
            session.execute(
                sa.update(Customer).where(Customer.id == key).values(score=Customer.score + 1)
            )
        if self._trouble:
            self._trouble.pop(0)(session)
        return f"run {self.runs}"


def raising(state: str) -> Callable[[Any], None]:
    """Return trouble: the server raises an error of this SQLSTATE."""

    def trouble(session: Any) -> None:
        raise_it = f"DO $$ BEGIN RAISE 'trouble' USING ERRCODE = '{state}'; END $$"
        session.execute(text(raise_it), execution_options={"sqlroute_shard": "s0"})

    return trouble


def killed(shop: Shop) -> Callable[[Any], None]:
    """Return trouble: the backend is ended, which the client does not notice yet."""

    def trouble(session: Any) -> None:
        pid = session.scalar(
            text("SELECT pg_backend_pid()"), execution_options={"sqlroute_shard": "s0"}
        )
        shop.on("s0", f"SELECT pg_terminate_backend({pid}, 5000)")

    return trouble


def score(shop: Shop) -> list[int]:
    """Return the scores on both shards, past the router."""
    return [found for shard in ("s0", "s1") for _, found in shop.on(shard, SCORE)]


@pytest.fixture
def zero(shop: Shop) -> int:
    """A customer on shard s0 with the score 0."""
    key = shop.keys("s0")[0]
    shop.add(Customer(id=key, name="zero", score=0))
    return key


@pytest.fixture
def both(shop: Shop, zero: int) -> tuple[int, int]:
    """Customers on both shards with the score 0."""
    key = shop.keys("s1")[0]
    shop.add(Customer(id=key, name="one", score=0))
    return zero, key


class TestPassingErrors:
    @pytest.mark.parametrize("state", sorted(retry.PASSING | {"08006"}))
    def test_an_error_that_passes_is_repeated(
        self, shop: Shop, do: Callable[..., Any], zero: int, state: str
    ) -> None:
        work = Adding(zero, trouble=[raising(state)])

        assert do(work) == "run 2"
        assert score(shop) == [1]

    @pytest.mark.parametrize("state", ["23505", "22012", "57014", "42P01"])
    def test_another_error_is_raised_at_once(
        self, shop: Shop, do: Callable[..., Any], zero: int, state: str
    ) -> None:
        work = Adding(zero, trouble=[raising(state)])
        with pytest.raises(exc.DBAPIError, match="trouble"):
            do(work)

        assert work.runs == 1
        assert score(shop) == [0]

    def test_the_last_error_is_raised(self, shop: Shop, do: Callable[..., Any], zero: int) -> None:
        """After all attempts; nothing was done."""
        work = Adding(zero, trouble=[raising("40001")] * 9)
        with pytest.raises(exc.DBAPIError, match="trouble"):
            do(work, attempts=3)

        assert work.runs == 3
        assert score(shop) == [0]

    def test_the_time_is_a_bound(self, shop: Shop, do: Callable[..., Any], zero: int) -> None:
        work = Adding(zero, trouble=[raising("40001")] * 9_999)
        took = until_raised(lambda: do(work, attempts=9_999, timeout=0.5))

        assert 0.2 < took < 3
        assert 2 <= work.runs < 50
        assert score(shop) == [0]

    def test_an_error_of_the_function_is_its_own(self, shop: Shop, router: Router) -> None:
        def fails(session: RoutingSession) -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            router.run(fails)

    def test_an_error_raised_from_a_passing_one_is_repeated(
        self, shop: Shop, router: Router, zero: int
    ) -> None:
        def wrapped(session: Any) -> None:
            try:
                raising("40P01")(session)
            except exc.DBAPIError as error:
                raise LookupError("of the application") from error

        work = Adding(zero, trouble=[wrapped])
        assert router.run(work) == "run 2"
        assert score(shop) == [1]

    def test_serialization_failures_are_repeated(
        self, shop: Shop, router: Router, zero: int
    ) -> None:
        """Each of 8 threads adds 1 to what it has read, 5 times: 40."""

        def add(session: RoutingSession) -> None:
            with session.begin(isolation_level="SERIALIZABLE"):
                customer = session.get_one(Customer, zero)
                assert customer.score is not None
                customer.score += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: router.run(add, attempts=1000), range(40)))

        assert score(shop) == [40]

    def test_deadlocks_are_repeated(self, shop: Shop, router: Router, zero: int) -> None:
        """Two that have locked each other's row: one is refused, and comes after the other."""
        other = shop.keys("s0", 2)[1]
        shop.add(Customer(id=other, name="zz", score=0))
        met, runs = threading.Barrier(2), []

        def add(first: int, second: int) -> None:
            def unit(session: RoutingSession) -> None:
                runs.append(first)
                Adding(first)(session)
                if runs.count(first) == 1:
                    met.wait(10)
                Adding(second)(session)

            router.run(unit)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(add, (zero, other), (other, zero)))

        assert score(shop) == [2, 2]
        assert len(runs) == 3

    def test_a_killed_connection_is_no_failure(
        self, shop: Shop, do: Callable[..., Any], zero: int
    ) -> None:
        """Ended before COMMIT: found out by the COMMIT, and done once all the same."""
        work = Adding(zero, trouble=[killed(shop)])

        assert do(work) == "run 2"
        assert score(shop) == [1]

    def test_a_stale_object_is_read_from_the_primary(
        self, held: Shop, router: Router, zero: int
    ) -> None:
        """The replicas stay behind: only the primary can give what may be written."""
        held.on("s0", "UPDATE customer SET score = 10")
        runs = []

        def add(session: RoutingSession) -> None:
            runs.append(1)
            customer = session.get_one(Customer, zero)
            assert customer.score is not None
            customer.score += 1

        router.run(add, consistency="eventual")

        assert len(runs) == 2
        assert score(held) == [11]


class TestLostCommits:
    @pytest.mark.parametrize("holds", [False, True], ids=["told", "not told"])
    def test_an_answer_that_is_lost(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], zero: int, holds: bool
    ) -> None:
        """The server has committed: the function is not run again, its result is returned."""
        wire.lose("s0-a", COMMIT, "answer", holds=holds)
        work = Adding(zero)

        assert do(work) == "run 1"
        assert (wire.lost, score(shop)) == (1, [1])

    @pytest.mark.parametrize("holds", [False, True], ids=["told", "not told"])
    def test_a_commit_that_is_lost(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], zero: int, holds: bool
    ) -> None:
        """It did not get there: the function is run again, also while its row is still locked."""
        wire.lose("s0-a", COMMIT, "question", holds=holds)
        work = Adding(zero)

        assert do(work) == "run 2"
        assert (wire.lost, score(shop)) == (1, [1])

    def test_the_token_covers_a_commit_without_answer(
        self, held: Shop, wire: Wire, routed: Router, zero: int
    ) -> None:
        """Replicas are held behind: who follows the token reads the write all the same."""
        wire.lose("s0-a", COMMIT, "answer")
        query = select(Customer.score).where(Customer.id == zero)
        with routed.sessionmaker()() as session:
            routed.run(Adding(zero), session=session)
            written, token = session.written, session.token
            assert session.scalar(query) == 1
        assert wire.lost == 1
        assert written.of("s0") is not None
        with routed.sessionmaker(token=token)() as session:
            assert session.scalar(query) == 1

    @pytest.mark.parametrize("expires", [True, False])
    def test_a_given_session_goes_on(
        self, shop: Shop, wire: Wire, routed: Router, expires: bool
    ) -> None:
        """New objects are in it, and deleted ones are not, as after any commit."""
        one, two = shop.keys("s0", 2)
        shop.add(Customer(id=one, name="goes"))

        def change(session: RoutingSession) -> Customer:
            session.delete(session.get_one(Customer, one))
            found = Customer(id=two, name="comes")
            session.add(found)
            return found

        with routed.sessionmaker(expire_on_commit=expires)() as session:
            wire.lose("s0-a", COMMIT, "answer")
            made = routed.run(change, session=session)
            assert wire.lost == 1
            assert not session.in_transaction()
            assert list(session.identity_map.values()) == [made]
            assert (made.name, orm.object_session(made)) == ("comes", session)
            made.name = "stays"
            session.commit()
        assert [name for name, _ in shop.on("s0", SCORE)] == ["stays"]

    def test_without_run_the_error_says_it(
        self, shop: Shop, wire: Wire, routed: Router, zero: int
    ) -> None:
        """And it is not to be taken for one that passes."""
        wire.lose("s0-a", COMMIT, "answer")
        with routed.sessionmaker()() as session:
            Adding(zero)(session)
            with pytest.raises(exc.OperationalError) as caught:
                session.commit()
            session.rollback()

        assert "the answer to COMMIT on shard s0 was lost" in caught.value.orig.__notes__[0]  # type: ignore[union-attr]
        assert not is_retryable(caught.value)

    def test_a_commit_inside_the_function_is_not_repeated(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], zero: int
    ) -> None:
        """Done, but what came after it was not: the error is the caller's."""
        work = Adding(zero, trouble=[lambda session: session.commit()])
        wire.lose("s0-a", COMMIT, "answer")
        with pytest.raises(exc.OperationalError) as caught:
            do(work)

        assert "some of it is committed" in caught.value.__notes__[0]
        assert (work.runs, score(shop)) == (1, [1])

    def test_a_commit_inside_the_function_that_was_not_done_is_repeated(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], zero: int
    ) -> None:
        work = Adding(zero, trouble=[lambda session: session.commit()])
        wire.lose("s0-a", COMMIT, "question")

        assert do(work) == "run 2"
        assert score(shop) == [1]

    def test_what_is_committed_is_not_repeated(
        self, shop: Shop, do: Callable[..., Any], zero: int
    ) -> None:
        """The function commits, and fails after that with what would pass."""

        def commit_then_fail(session: Any) -> None:
            session.commit()
            raising("40001")(session)

        work = Adding(zero, trouble=[commit_then_fail])
        with pytest.raises(exc.DBAPIError, match="trouble"):
            do(work)

        assert (work.runs, score(shop)) == (1, [1])

    def test_a_server_that_answers_nobody_is_an_unknown_outcome(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], zero: int
    ) -> None:
        """Until the time is over; the unit of work is not run again."""
        wire.lose("s0-a", COMMIT, "answer", cuts=True)
        work = Adding(zero)
        with pytest.raises(UnknownCommit, match=r"s0 .*look whether") as caught:
            do(work, timeout=1)

        assert (work.runs, caught.value.shard) == (1, "s0")
        assert not is_retryable(caught.value)
        assert score(shop) == [1]

    def test_200_lost_connections_lose_and_double_nothing(
        self, shop: Shop, wire: Wire, routed: Router, zero: int
    ) -> None:
        """Backends are ended at random moments, COMMITs and their answers are lost."""
        done, kills, over = [], [0], threading.Event()

        def kill() -> None:
            with psycopg.connect(
                **shop.servers.node("s0-a").conninfo, autocommit=True
            ) as connection:
                while not over.wait(random.uniform(0, 0.02)):
                    row = connection.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE backend_xid IS NOT NULL ORDER BY random() LIMIT 1"
                    ).fetchone()
                    kills[0] += row is not None

        def work(_: int) -> None:
            while kills[0] + wire.lost < 200 or wire.lost < 50:
                routed.run(Adding(zero), attempts=1000)
                done.append(1)

        wire.lose_at_random(0.2)
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(work, range(3)))
        finally:
            over.set()
            killer.join()
            wire.lose_at_random(0)

        assert score(shop) == [len(done)]


class TestSeveralShards:
    @pytest.mark.parametrize("what", ["question", "answer"])
    @pytest.mark.parametrize(
        ("node", "message"),
        [
            ("s1-a", b"PREPARE TRANSACTION"),
            ("s0-a", b"INSERT INTO sqlroute.commit_record"),
            ("s0-a", COMMIT),
            ("s1-a", b"COMMIT PREPARED"),
        ],
    )
    def test_a_message_that_is_lost(
        self,
        shop: Shop,
        wire: Wire,
        do: Callable[..., Any],
        both: tuple[int, int],
        node: str,
        message: bytes,
        what: str,
    ) -> None:
        """At each step: done once, on both shards, nothing is left prepared."""
        wire.lose(node, message, what)
        work = Adding(*both)
        result = do(work)

        assert (wire.lost, score(shop)) == (1, [1, 1])
        is_decided = message == b"COMMIT PREPARED" or (message == COMMIT and what == "answer")
        assert result == ("run 1" if is_decided else "run 2")

    def test_a_shard_that_stays_away_is_told(
        self, shop: Shop, wire: Wire, do: Callable[..., Any], both: tuple[int, int]
    ) -> None:
        """It is committed, so not run again; but not all of it can be seen."""
        wire.lose("s1-a", b"COMMIT PREPARED", "question", cuts=True)
        work = Adding(*both)
        with pytest.raises(InDoubtCommit, match="committed, but not yet on s1") as caught:
            do(work, timeout=1)
        shop.router.recover(older_than=0)

        assert (caught.value.is_committed, caught.value.unfinished) == (True, ("s1",))
        assert (work.runs, score(shop)) == (1, [1, 1])

    @pytest.mark.parametrize("ends", ["close", "rollback"])
    def test_a_commit_that_failed_leaves_nothing_in_the_pools(
        self, shop: Shop, wire: Wire, routed: Router, both: tuple[int, int], ends: str
    ) -> None:
        """One shard's part fails: the other's is not committed by whoever gets its connection."""
        for _ in range(4):  # the shards come in any order
            wire.lose("s1-a", b"PREPARE TRANSACTION", "question")
            with routed.sessionmaker()() as session:
                Adding(*both)(session)
                with pytest.raises(exc.DBAPIError):
                    session.commit()
                if ends == "rollback":
                    session.rollback()
            with routed.sessionmaker()() as session:
                Adding(both[0])(session)
                session.commit()
        assert score(shop) == [4, 0]

    def test_a_refused_commit_leaves_nothing_in_the_pool(
        self, shop: Shop, routed: Router, zero: int
    ) -> None:
        """A statement has failed and its error was swallowed; the session is closed, no more."""
        with routed.sessionmaker()() as session:
            with pytest.raises(exc.DBAPIError):
                raising("22012")(session)
            with pytest.raises(exc.DBAPIError):
                session.commit()
        with routed.sessionmaker()() as session:
            Adding(zero)(session)
            session.commit()

        assert score(shop) == [1]


class TestSessions:
    def test_a_given_session_is_emptied_between_attempts(
        self, shop: Shop, router: Router, zero: int
    ) -> None:
        """What the failed attempt has added is not added again by the next one."""
        key = shop.keys("s0", 2)[1]
        found = []

        def add(session: RoutingSession) -> None:
            found.append(list(session))
            session.add(Customer(id=key, name="new"))
            session.flush()
            if len(found) == 1:
                raising("40001")(session)

        with router.sessionmaker()() as session:
            router.run(add, session=session)
            assert found == [[], []]
            assert not session.in_transaction()
        assert len(shop.on("s0", SCORE)) == 2

    def test_a_given_session_is_usable_after_an_error(
        self, shop: Shop, router: Router, zero: int
    ) -> None:
        with router.sessionmaker()() as session:
            with pytest.raises(exc.DBAPIError):
                router.run(raising("23505"), session=session)
            assert not session.in_transaction()
            assert session.scalar(select(Customer.score)) == 0

    def test_a_scoped_session_can_be_given(self, shop: Shop, router: Router, zero: int) -> None:
        scoped = orm.scoped_session(router.sessionmaker())
        router.run(Adding(zero), session=scoped)
        scoped.remove()

        assert score(shop) == [1]

    def test_what_cannot_be_repeated_whole_is_refused(
        self, shop: Shop, router: Router, zero: int
    ) -> None:
        """A transaction under way, two-phase commits, sessions of others, options for nothing."""
        with router.sessionmaker()() as session:
            session.begin()
            with pytest.raises(exc.InvalidRequestError, match="in a transaction"):
                router.run(Adding(zero), session=session)
        with pytest.raises(exc.InvalidRequestError, match="two-phase"):
            router.run(Adding(zero), twophase=True)
        with pytest.raises(exc.InvalidRequestError, match="not made by this router"):
            router.run(Adding(zero), session=orm.Session())
        with (
            router.sessionmaker()() as session,
            pytest.raises(exc.InvalidRequestError, match="consistency"),
        ):
            router.run(Adding(zero), session=session, consistency="strong")
        assert score(shop) == [0]

    def test_options_make_the_sessions(self, shop: Shop, router: Router, zero: int) -> None:
        query = text("SELECT current_setting('app.x')")
        options = {"sqlroute_shard": "s0"}
        found = router.run(
            lambda session: session.scalar(query, execution_options=options),
            settings={"app.x": "7"},
        )

        assert found == "7"

    def test_a_cancelled_task_ends(self, shop: Shop, router: Router, zero: int) -> None:
        """It is no error that passes, and leaves no connection behind."""
        runs = []

        async def waits(session: RoutingAsyncSession) -> None:
            runs.append(1)
            await session.execute(
                sa.update(Customer).where(Customer.id == zero).values(score=Customer.score + 1)
            )
            await asyncio.sleep(60)

        async def main() -> None:
            task = asyncio.create_task(router.arun(waits))
            while not runs:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await router.engines(is_async=True).aclose()

        asyncio.run(main())

        assert (len(runs), score(shop)) == (1, [0])

    def test_a_keyboard_interrupt_ends_it(self, shop: Shop, router: Router, zero: int) -> None:
        def interrupts(_: Any) -> None:
            raise KeyboardInterrupt

        work = Adding(zero, trouble=[interrupts])
        with pytest.raises(KeyboardInterrupt):
            router.run(work)

        assert (work.runs, score(shop)) == (1, [0])

    def test_many_tasks_at_once(self, shop: Shop, router: Router, zero: int) -> None:
        """Their pauses are their own: 20 tasks add 1 each, all fail once."""

        async def main() -> None:
            async def add(session: RoutingAsyncSession, work: Adding) -> None:
                await session.run_sync(work)

            def unit() -> Callable[[RoutingAsyncSession], Awaitable[None]]:
                work = Adding(zero, trouble=[raising("40001")])
                return lambda session: add(session, work)

            await asyncio.gather(*(router.arun(unit()) for _ in range(20)))
            await router.engines(is_async=True).aclose()

        asyncio.run(main())

        assert score(shop) == [20]


METADATA = sa.MetaData()
tally = sa.Table(
    "tally", METADATA, sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer)
)


class TestServersThatDie:
    """Each test has its own."""

    def test_an_id_that_is_given_again_after_a_crash_proves_nothing(
        self, sqlroute_topology_factory: TopologyFactory
    ) -> None:
        """The primary loses the transaction, and gives its id to another, which commits."""
        servers = sqlroute_topology_factory(shards=1, replicas=0, label="run, crash")
        node = servers.nodes[0]
        with Wire(servers, (node.name,)) as wire, wire.router() as router:
            router.create_all(METADATA)
            router.run(lambda session: session.execute(sa.insert(tally), {"id": 1, "n": 0}))
            asked(node, "ALTER SYSTEM SET wal_writer_delay = '10s'")  # nobody else writes the log
            asked(node, "SELECT pg_reload_conf()")
            xids: list[int] = []

            def crash(session: RoutingSession) -> None:
                session.execute(sa.update(tally).values(n=tally.c.n + 1))
                pid, xid = session.execute(
                    text("SELECT pg_backend_pid(), pg_current_xact_id()::text")
                ).one()
                xids.append(int(xid))
                if len(xids) == 1:
                    wire.lose(node.name, COMMIT, "question", holds=True)
                    threading.Thread(target=take_its_id, args=(pid,)).start()

            def take_its_id(pid: int) -> None:
                until(lambda: wire.lost)
                wire.is_cut = True
                os.kill(pid, signal.SIGKILL)
                until(lambda: asked(node, f"SELECT pg_current_xact_id()::text::int > {xids[0]}"))
                wire.is_cut = False

            with pytest.raises(UnknownCommit, match="crashed"):
                router.run(crash, timeout=20)

            assert len(xids) == 1
            assert asked(node, "SELECT n FROM tally") == 0
            assert asked(node, f"SELECT pg_xact_status('{xids[0]}')") == "committed"

    @pytest.mark.parametrize(("what", "runs"), [("question", 2), ("answer", 1)])
    def test_a_failover_tells_a_lost_commit_from_a_kept_one(
        self, sqlroute_topology_factory: TopologyFactory, what: str, runs: int
    ) -> None:
        """The primary is gone for good: what its heir has received is what was done."""
        servers = sqlroute_topology_factory(shards=1, replicas=1, label=f"run, {what}")
        primary, heir = servers.nodes
        with Wire(servers, (primary.name,)) as wire, wire.router() as router:
            router.create_all(METADATA)
            router.run(lambda session: session.execute(sa.insert(tally), {"id": 1, "n": 0}))
            until(lambda: asked(heir, "SELECT n FROM tally") == 0)
            done = []

            def add(session: RoutingSession) -> None:
                done.append(1)
                session.execute(sa.update(tally).values(n=tally.c.n + 1))
                if len(done) == 1:
                    wire.lose(primary.name, COMMIT, what, holds=True)
                    threading.Thread(target=fail_over).start()

            def fail_over() -> None:
                until(lambda: wire.lost)
                if what == "answer":
                    until(lambda: asked(heir, "SELECT n FROM tally") == 1)
                primary.kill()
                asked(heir, "SELECT pg_promote()")

            router.run(add, timeout=30)

            assert len(done) == runs
            assert asked(heir, "SELECT n FROM tally") == 1


def asked(node: Any, statement: str) -> Any:
    """Run SQL past the router; ``None`` while the server does not answer."""
    try:
        with psycopg.connect(**node.conninfo, autocommit=True) as connection:
            cursor = connection.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
        return None


def until_raised(function: Callable[[], object]) -> float:
    """Return the seconds until it has raised an error of a database."""
    import time

    began = time.monotonic()
    with pytest.raises(exc.DBAPIError):
        function()
    return time.monotonic() - began


def test_the_error_of_a_stale_object_is_one_that_passes() -> None:
    assert is_retryable(StaleObjectRead((("Customer", (1,), ("name",)),)))
