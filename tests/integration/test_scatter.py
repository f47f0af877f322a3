"""Promises of statements on several shards, and of reads while servers and programs fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import Ran, Shop, until
from models import Customer, Order
from sqlalchemy import exc, func, orm, select

from sqlroute import DeadlineExceeded, Router, RoutingSession
from sqlroute.local.node import LocalNode
from sqlroute.runtime.scatter import scatter

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]


@pytest.fixture
def filled(shop: Shop) -> Shop:
    """Five customers on each shard; the score of each is its place among all."""
    keys = sorted([*shop.keys("s0", 5), *shop.keys("s1", 5)])
    shop.add(*(Customer(id=key, name=f"c{i % 3}", score=i) for i, key in enumerate(keys)))
    return shop


def fails_on(shop: Shop, shard: str) -> Any:
    """Return an expression that divides by zero on one shard and sleeps long on the other."""
    bad = Customer.id.in_(shop.keys(shard, 5))
    return sa.case(
        (bad, sa.cast(1 / func.nullif(Customer.score - Customer.score, -1), sa.Text)),
        else_=sa.cast(func.pg_sleep(20), sa.Text),
    )


class TestResults:
    def test_merged_results_read_like_any_other(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """scalars, one, first, mappings, partitions, unique, keys, rows by column and by name."""
        ordered = select(Customer.score, Customer.name.label("n")).order_by(Customer.score)

        def run(statement: Any = ordered) -> Any:
            return session.execute(statement)

        assert list(run().keys()) == ["score", "n"]
        assert run().scalars().all() == list(range(10))
        assert run().scalars("n").first() == "c0"
        assert run().first() == (0, "c0")
        assert run().mappings().fetchmany(2) == [
            {"score": 0, "n": "c0"},
            {"score": 1, "n": "c1"},
        ]
        assert [len(part) for part in run().partitions(4)] == [4, 4, 2]
        assert run().columns("n").fetchmany(1) == [("c0",)]
        row = run().first()
        assert (row.n, row[0], row._mapping[Customer.score]) == ("c0", 0, 0)
        assert sorted(run(select(Customer.name)).scalars().unique()) == ["c0", "c1", "c2"]
        assert run(ordered.limit(1)).one() == (0, "c0")
        assert run(ordered.limit(3).offset(8)).all() == [(8, "c2"), (9, "c0")]
        assert run(ordered.where(Customer.score > 99)).one_or_none() is None
        with pytest.raises(exc.MultipleResultsFound):
            run().one()
        frozen = run().freeze()
        assert frozen().all() == frozen().all() == run().all()
        core = select(Customer.__table__.c.id, Customer.__table__).order_by("score")
        found = run(core).first()
        assert found._mapping[Customer.__table__.c.score] == 0

    def test_entities_and_columns_mix(self, filled: Shop, session: RoutingSession) -> None:
        """Entities, columns and aggregates, each as a plain session gives them."""
        rows = session.execute(
            select(Customer, Customer.score).order_by(Customer.score.desc()).limit(3)
        ).all()
        assert [(row.Customer.score, row.score) for row in rows] == [(9, 9), (8, 8), (7, 7)]
        grouped = session.execute(
            select(Customer.name, func.count(), func.avg(Customer.score), func.max(Customer.score))
            .group_by(Customer.name)
            .order_by(func.count().desc(), Customer.name)
        ).all()
        assert [tuple(row) for row in grouped] == [
            ("c0", 4, Decimal("4.5000000000000000"), 9),
            ("c1", 3, Decimal("4.0000000000000000"), 7),
            ("c2", 3, Decimal("5.0000000000000000"), 8),
        ]
        assert session.scalar(select(func.count()).select_from(Customer)) == 10
        assert session.query(Customer).order_by(Customer.score).first().score == 0  # type: ignore[union-attr]

    @pytest.mark.parametrize("options", [{}, {"stream_results": True}], ids=str)
    def test_unique_loses_no_object_that_nobody_keeps(
        self, shop: Shop, session: RoutingSession, options: Any
    ) -> None:
        """It goes by ``id()``: the second shard's objects must not take the first's places."""
        rows = [{"id": key, "name": "c"} for key in range(1, 1501)]
        session.execute(sa.insert(Customer), rows)
        session.commit()

        everything = select(Customer)
        for statement in (everything, everything.options(orm.joinedload(Customer.orders))):
            found = session.scalars(statement, execution_options=options).unique()
            assert sum(1 for _ in found) == len(rows)

    def test_shards_work_at_the_same_time(self, filled: Shop, session: RoutingSession) -> None:
        """Two times 0.2 s take less than 0.35 s, in one of a few tries on a busy machine."""
        statement = select(Customer.score, func.pg_sleep(0.04))
        session.execute(statement.limit(1)).all()
        taken = []
        for _ in range(6):
            began = time.monotonic()
            session.execute(statement).all()
            taken.append(time.monotonic() - began)
            if taken[-1] < 0.35:
                break
        assert min(taken) < 0.35

    def test_a_limit_reads_no_more_rows(
        self, filled: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """LIMIT + OFFSET goes to the shards."""
        ran.clear()
        session.scalars(select(Customer).order_by(Customer.score).limit(2).offset(1)).all()
        assert len(ran.statements) == 2
        assert all("LIMIT" in statement for _, statement in ran.statements)

    def test_a_scatter_in_a_transaction_sees_its_writes(
        self, filled: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """The written shard answers from its primary, in the transaction; the other's replica."""
        key = filled.keys("s0")[0]
        session.execute(sa.update(Customer).where(Customer.id == key).values(score=99))
        ran.clear()
        assert session.scalar(select(func.max(Customer.score))) == 99
        session.rollback()

        nodes = sorted(ran.nodes)
        assert nodes[0] == "s0-a"
        assert nodes[1] in ("s1-b", "s1-c")


class TestStreams:
    def test_one_shard_streams(self, filled: Shop, session: RoutingSession) -> None:
        """yield_per on one shard reads through a server-side cursor; its connection comes back."""
        keys = filled.keys("s0", 5)
        statement = select(Customer).where(Customer.id.in_(keys)).execution_options(yield_per=2)
        parts = [len(part) for part in session.scalars(statement).partitions()]
        assert parts == [2, 2, 1]
        session.rollback()
        assert filled.checked_out == 0

    def test_several_shards_stream_in_order(self, filled: Shop, session: RoutingSession) -> None:
        """Batches of the size that was asked for, over both shards; see ``test_streams``."""
        statement = select(Customer.score).order_by(Customer.score)
        streamed = session.scalars(statement, execution_options={"yield_per": 4})
        assert [list(part) for part in streamed.partitions()] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9],
        ]


class TestErrors:
    @pytest.mark.parametrize("shard", ["s0", "s1"])
    def test_one_shards_error_cancels_the_other(
        self, filled: Shop, session: RoutingSession, shard: str
    ) -> None:
        """The error comes at once, the sleeping shard is cancelled, the session goes on."""
        began = time.monotonic()
        with pytest.raises(exc.DataError, match="division by zero") as caught:
            session.execute(select(fails_on(filled, shard)))
        assert time.monotonic() - began < 3
        assert f"(on {shard} (" in str(caught.value)
        assert filled.checked_out == 0
        assert session.scalar(select(func.count()).select_from(Customer)) == 10
        for node in filled.servers.nodes:
            until(lambda n=node: not _sleeping(filled, n))

    def test_a_late_cancel_hits_no_later_statement(
        self, filled: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The shard answers before it is asked to stop; its connection is not free until then."""
        cancel = psycopg.Connection.cancel_safe

        def cancel_late(connection: Any, **options: Any) -> None:
            time.sleep(0.5)
            cancel(connection, **options)

        monkeypatch.setattr(psycopg.Connection, "cancel_safe", cancel_late)
        bad = Customer.id.in_(filled.keys("s0", 5))
        divided = sa.cast(1 / func.nullif(Customer.score - Customer.score, -1), sa.Text)
        slow = sa.cast(func.pg_sleep(0.04), sa.Text)
        with pytest.raises(exc.DataError, match="division by zero"):
            session.execute(select(sa.case((bad, divided), else_=slow)))

        sleeps = select(func.pg_sleep(0.2), Customer.id).where(
            Customer.id.in_(filled.keys("s1", 5))
        )
        assert len(session.execute(sleeps).all()) == 5

    def test_a_lost_cancel_costs_no_second_try(
        self, filled: Shop, session: RoutingSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shard whose cancel got lost is cut off, and not read again on another replica."""
        monkeypatch.setattr(psycopg.Connection, "cancel_safe", lambda *_, **__: None)
        began = time.monotonic()
        with pytest.raises(exc.DataError, match="division by zero"):
            session.execute(select(fails_on(filled, "s0")))
        assert time.monotonic() - began < 5
        for node in ("s1-b", "s1-c"):  # no cancel: it does not notice that nobody listens
            sleeping = "state = 'active' AND query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
            filled.at(
                node, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {sleeping}"
            )
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Customer)) == 10

    def test_an_error_in_a_transaction_leaves_it_to_a_rollback(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """On primaries, as with a plain session: roll back, and go on."""
        with session.begin():
            session.execute(sa.text("SELECT 1"), execution_options={"sqlroute_shard": "s0"})
        session.begin()
        with pytest.raises(exc.DataError):
            session.execute(select(fails_on(filled, "s1")))
        session.rollback()
        assert session.scalar(select(func.count()).select_from(Customer)) == 10

    def test_a_deadline_bounds_the_whole(
        self, filled: Shop, make_router: Callable[..., Router]
    ) -> None:
        """DeadlineExceeded names the shards that were late; the session goes on."""
        with make_router(scatter_timeout=0.5).sessionmaker()() as session:
            assert session.scalar(select(func.count()).select_from(Customer)) == 10
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=r"0.5 s from s0 .*s1 "):
                session.execute(select(func.pg_sleep(20), Customer.id))
            assert time.monotonic() - began < 3
            assert session.scalar(select(func.count()).select_from(Customer)) == 10
        for node in filled.servers.nodes:
            until(lambda n=node: not _sleeping(filled, n))

    def test_an_exception_within_the_hub_leaves_no_work_behind(
        self, filled: Shop, router: Router
    ) -> None:
        """As that of a signal may be: the work that was waiting ends, without its connection."""
        ended: list[str] = []

        def run(shard: str, statement: str) -> None:
            try:
                with router.primary_engine(shard).connect() as connection:
                    connection.exec_driver_sql(statement)
            finally:
                ended.append(shard)

        def interrupt(_: BaseException) -> bool:
            raise KeyboardInterrupt

        works = [
            ("s0", partial(run, "s0", "SELECT pg_sleep(20)")),
            ("s1", partial(run, "s1", "SELECT 1 / 0")),
        ]
        with pytest.raises(KeyboardInterrupt):
            scatter(works, 10.0, interrupt)
        assert ended == ["s1", "s0"]
        assert filled.checked_out == 0

    def test_an_interrupt_leaks_no_connection(self, filled: Shop, session: RoutingSession) -> None:
        """A signal's exception in the middle of a scatter (a task's time limit, Ctrl-C)."""

        class Stop(Exception):
            pass

        def stop(*_: Any) -> None:
            raise Stop

        session.execute(select(Customer.id)).all()
        before = signal.signal(signal.SIGUSR1, stop)
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        try:
            timer.start()
            began = time.monotonic()
            with pytest.raises(Stop):
                session.execute(select(func.pg_sleep(5), Customer.id))
            assert time.monotonic() - began < 3
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, before)
        for node in filled.servers.nodes:
            until(lambda n=node: not _sleeping(filled, n), 2)
        session.rollback()
        assert filled.checked_out == 0
        assert session.scalar(select(func.count()).select_from(Customer)) == 10

    def test_a_lost_read_is_tried_elsewhere(self, filled: Shop, router: Router) -> None:
        """Sessions whose pooled connections the server has closed do not notice."""
        count = select(func.count()).select_from(Customer)
        make = router.sessionmaker()
        for _ in range(20):
            with make() as session:
                session.scalar(count)
        for node in ("s0-b", "s0-c", "s1-b", "s1-c"):
            filled.at(
                node,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND backend_type = 'client backend' "
                "AND application_name NOT LIKE 'sqlroute%'",
            )
        for _ in range(20):
            with make() as session:
                assert session.scalar(count) == 10


class TestFailures:
    @pytest.fixture
    def victim(self, filled: Shop) -> Iterator[LocalNode]:
        """A replica that a test may break; it is put right afterwards."""
        node = filled.servers.node("s0-b")
        yield node
        node.resume()
        node.start()
        monitor = filled.router.monitor
        until(lambda: monitor.ask("s0", 1.0).of("s0-b").is_readable)

    def reads(self, shop: Shop, stop: threading.Event, router: Router) -> Any:
        """Read in a loop from four threads; return (threads, errors, longest, count)."""
        key = shop.keys("s0")[0]
        errors: list[BaseException] = []
        times: list[float] = []

        def loop() -> None:
            make = router.sessionmaker()
            while not stop.is_set():
                began = time.monotonic()
                try:
                    with make() as session:
                        assert session.get_one(Customer, key).id == key
                        assert len(session.scalars(select(Customer)).all()) == 10
                except BaseException as error:
                    errors.append(error)
                times.append(time.monotonic() - began)

        threads = [threading.Thread(target=loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        return threads, errors, times

    @pytest.mark.parametrize("fault", ["kill", "pause"])
    def test_a_broken_replica_fails_no_read(
        self, filled: Shop, victim: LocalNode, make_router: Callable[..., Router], fault: str
    ) -> None:
        """SIGKILL or SIGSTOP in a loop of reads: none fails, the slowest takes under 3 s."""
        router = make_router()
        stop = threading.Event()
        threads, errors, times = self.reads(filled, stop, router)
        until(lambda: len(times) > 40)
        getattr(victim, fault)()
        seen = len(times)
        until(lambda: not router.monitor.health.of("s0-b").is_readable)
        until(lambda: len(times) > seen + 40)
        stop.set()
        for thread in threads:
            thread.join(20)

        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
        assert max(times) < 3

    def test_a_restarted_replica_is_used_again(
        self, filled: Shop, victim: LocalNode, router: Router
    ) -> None:
        """Its stale connections cost nothing but a reconnection."""
        key = filled.keys("s0")[0]
        nodes = select(func.inet_server_port()).where(Customer.id == key)

        def used() -> bool:
            with router.sessionmaker()() as session:
                return filled.node(session.scalar(nodes) or 0) == victim.name

        until(used)
        victim.kill()
        for _ in range(20):
            assert not used()
        victim.start()
        until(used, 20)

    def test_a_restarted_primary_takes_writes_again(self, filled: Shop, router: Router) -> None:
        """After the first disconnect the pool is replaced, and nobody is told of no primary."""
        primary = filled.servers.node("s1-a")
        key = filled.keys("s1")[0]
        change = sa.update(Customer).where(Customer.id == key).values(score=50)
        sessions = [router.sessionmaker()() for _ in range(4)]
        for session in sessions:
            session.execute(select(Order).with_for_update().where(Order.customer_id == key))
        for session in sessions:
            session.close()
        primary.stop()
        primary.start()
        until(lambda: router.monitor.ask("s1", 1.0).primary("s1") is not None)
        failed: list[BaseException] = []

        def changed() -> bool:
            with router.sessionmaker()() as session:
                try:
                    session.execute(change)
                    session.commit()
                except exc.OperationalError as error:
                    failed.append(error)
                    return False
            return True

        until(changed, 5)
        assert sum(isinstance(error, exc.OperationalError) for error in failed) <= 1
        assert all(changed() for _ in range(6))
        until(lambda: router.monitor.ask("s1", 1.0).of("s1-b").is_readable)
        filled.settle()


class TestConcurrency:
    def test_threads(self, shop: Shop, router: Router) -> None:
        """20 threads that write on both shards and read what they wrote: no error, no leak."""
        errors: list[BaseException] = []
        keys = [*shop.keys("s0", 20), *shop.keys("s1", 20)]
        router.create_all(Customer.metadata)

        def work(number: int) -> None:
            try:
                for i in range(5):
                    with router.sessionmaker()() as session:
                        mine = (keys[number], keys[number + 20])
                        for key in mine:
                            session.merge(Customer(id=key, name=f"{i}"))
                        session.commit()
                        own = select(Customer.name).where(Customer.id.in_(mine))
                        assert session.scalars(own).all() == [f"{i}"] * 2
                        assert session.get_one(Customer, mine[0]).name == f"{i}"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert errors == []
        assert shop.on("s0", "SELECT count(*) FROM customer") == [(20,)]
        assert not any(router.engines(is_async=False).loads.values())

    def test_a_forked_child_reads_and_the_parent_goes_on(
        self, filled: Shop, router: Router
    ) -> None:
        """Neither touches the other's connections."""
        count = select(func.count()).select_from(Customer)
        with router.sessionmaker()() as session:
            assert session.scalar(count) == 10
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with router.sessionmaker()() as session:
                    good = session.scalar(count) == 10
                    session.add(Customer(id=filled.keys("s0", 6)[5], name="child"))
                    session.commit()
                    status = 0 if good and session.scalar(count) == 11 else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        with router.sessionmaker()() as session, session.begin():
            assert session.scalar(count) == 11


def _sleeping(shop: Shop, node: LocalNode) -> bool:
    found = shop.at(
        node.name,
        "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep%' "
        "AND pid <> pg_backend_pid()",
    )
    return bool(found)
