"""Holds and fences as sessions see them: writes wait and go on, reads do not even wait."""

from __future__ import annotations

import gc
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until
from holding import (
    PATIENCE,
    AsyncDoors,
    Doors,
    Entry,
    Operator,
    Readers,
    Tally,
    Writers,
    entries,
    forking,
    other_process,
    shop_on,
    started,
    storing,
    writing,
)
from sqlalchemy.orm import Session

from sqlroute import DeadlineExceeded, NoPrimary, Router
from sqlroute.events import Held, Released
from sqlroute.execution import FIRST_TRIES
from sqlroute.local.topology import LocalTopology
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

OPERATION = "0123456789ab"
INSERT = "INSERT INTO entry (shop, id) VALUES (:shop, :id)"
KINDS = (writing, storing)
SPAWN = multiprocessing.get_context("spawn")
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
VERSIONS = [
    pytest.param(None, id="newest"),
    pytest.param(
        DEBIAN_15,
        id="15",
        marks=pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 from Debian"),
    ),
]


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: TopologyFactory) -> LocalTopology:
    return sqlroute_topology_factory(shards=2, replicas=1, label="hold")


@pytest.fixture(scope="module")
def router(servers: LocalTopology) -> Iterator[Router]:
    with started(servers) as router:
        yield router


@pytest.fixture(scope="module")
def shops(router: Router) -> tuple[int, int]:
    return shop_on(router, "s0"), shop_on(router, "s1")


@pytest.fixture
def operator(router: Router) -> Iterator[Operator]:
    found = Operator(router)
    yield found
    found.unfence(found.primary)
    found.release()
    found.close()


@pytest.fixture
def other_operator(router: Router) -> Iterator[Operator]:
    found = Operator(router, "s1")
    yield found
    found.release()
    found.close()


@pytest.fixture(params=[Doors, AsyncDoors], ids=["sync", "async"])
def doors(request: pytest.FixtureRequest, router: Router) -> Iterator[Doors]:
    found = request.param(router)
    yield found
    found.close()
    until(lambda: not any(router.writes.under_way.values()))


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> str:
    """Give a name of an entry that no other test has."""
    return request.node.name


def waits(future: Future[Any]) -> bool:
    """Say if somebody still waits, after time enough to have gone on."""
    time.sleep(0.1)
    return not future.done()


class TestWhoIsHeld:
    @pytest.mark.parametrize("kind", [writing, storing])
    def test_a_write_waits_and_goes_on(
        self,
        doors: Doors,
        operator: Operator,
        shops: tuple[int, int],
        entry: str,
        kind: Callable[..., Any],
    ) -> None:
        operator.hold(OPERATION)
        waiting = doors.start(kind(shops[0], entry))
        assert waits(waiting)
        operator.release()

        assert waiting.result(PATIENCE) is None
        assert doors.do(entries(shops[0])).count(entry) == 1

    def test_reads_and_other_shards_go_on(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        def read_only(session: Session) -> int:
            with session.begin(read_only=True):
                return len(entries(shops[0])(session))

        doors.do(writing(shops[0], entry))
        operator.hold(OPERATION)

        assert entry in doors.do(entries(shops[0]), consistency="strong")
        assert entry in doors.do(entries(shops[0]))
        assert doors.do(read_only) > 0
        assert doors.do(writing(shops[1], entry)) is None
        assert operator.router.writes.hold("s0") is not None

    def test_what_is_under_way_may_finish(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        insert = sa.insert(Entry).values(shop=shops[0])
        with doors.talk() as talk:
            talk.do(lambda session: session.execute(insert.values(id=entry)))
            operator.hold(OPERATION)
            assert not operator.is_drained(OPERATION)
            talk.do(lambda session: session.execute(insert.values(id=f"{entry} 2")))
            talk.do(lambda session: session.add(Entry(shop=shops[0], id=f"{entry} 3")))
            talk.do(lambda session: session.flush())
            talk.do(lambda session: session.commit())

            assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)
            again = talk.start(writing(shops[0], f"{entry} 4"))
            assert waits(again)
            assert operator.is_drained(OPERATION)
            operator.release()
            assert again.result(PATIENCE) is None

    def test_a_transaction_over_two_shards_waits_for_the_held_one(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[1], "id": entry}))
            operator.hold(OPERATION)
            waiting = talk.start(writing(shops[0], entry))
            assert waits(waiting)
            assert operator.is_drained(OPERATION)
            operator.release()

            assert waiting.result(PATIENCE) is None
        for shop in shops:
            assert entry in doors.do(entries(shop), consistency="strong")

    def test_two_operations_and_transactions_over_both_shards_do_not_wait_in_a_ring(
        self,
        doors: Doors,
        operator: Operator,
        other_operator: Operator,
        shops: tuple[int, int],
        entry: str,
    ) -> None:
        """Each operation waits for a transaction, each of which would wait for the other's end."""
        with doors.talk() as one, doors.talk() as other:
            one.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}))
            other.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[1], "id": entry}))
            operator.hold(OPERATION)
            second = other.start(writing(shops[0], f"{entry} 2"))
            assert waits(second)
            other_operator.hold("cdef01234567")
            first = one.start(writing(shops[1], f"{entry} 2"))

            assert first.result(PATIENCE) is None
            assert second.result(PATIENCE) is None
            assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)
            assert wait_for(lambda: other_operator.is_drained("cdef01234567"), timeout=2.0)


class TestBounds:
    def test_one_too_many_is_refused_at_once(
        self, doors: Doors, router: Router, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        operator.hold(OPERATION)
        small = with_policy(router, max_held=2)
        try:
            few = type(doors)(small)
            waiting = [few.start(writing(shops[0], f"{entry} {n}")) for n in range(2)]
            assert all(map(waits, waiting))
            with pytest.raises(NoPrimary, match="2 wait already"):
                few.do(writing(shops[0], f"{entry} 3"))
            operator.release()

            assert [future.result(PATIENCE) for future in waiting] == [None, None]
            few.close()
        finally:
            small.close()

    def test_a_deadline_is_kept(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        operator.hold(OPERATION)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=f"operation {OPERATION} holds"):
            doors.do(writing(shops[0], entry), deadline=0.2)

        assert 0.15 < time.monotonic() - began < 2
        assert operator.is_drained(OPERATION)

    def test_a_hold_that_nobody_ends_is_over_by_itself(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        operator.hold(OPERATION, 0.5)
        began = time.monotonic()
        doors.do(writing(shops[0], entry))

        assert 0.2 < time.monotonic() - began < 3
        assert wait_for(lambda: not operator.is_drained(OPERATION), timeout=2.0)


class TestWhatServersAreTold:
    def test_all_nodes_are_told_what_was_acknowledged(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        def write(session: Any) -> int:
            writing(shops[0], entry)(session)
            return int(session.token.positions[0].lsn)

        lsn = doors.do(write)

        for server in operator.servers.values():
            until(lambda s=server: all(seen_by(name) >= (1, lsn) for name in s.monitors()))

    def test_all_nodes_are_told_that_nothing_is_under_way_and_of_the_end(
        self, operator: Operator
    ) -> None:
        operator.hold(OPERATION)
        for server in operator.servers.values():
            assert wait_for(lambda s=server: operator.is_drained(OPERATION, s), timeout=1.0)
        operator.release()
        for server in operator.servers.values():
            assert wait_for(
                lambda s=server: not any("held=" in name for name in s.monitors()), timeout=0.3
            )

    def test_listeners_are_told(
        self, doors: Doors, router: Router, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        told: list[Any] = []
        end = router.listen(told.append, Held, Released)
        operator.hold(OPERATION)
        waiting = [doors.start(writing(shops[0], f"{entry} {n}")) for n in range(3)]
        assert all(map(waits, waiting))
        operator.release()
        until(lambda: len(told) == 2)
        end()

        assert told[0] == Held("s0", OPERATION)
        assert (told[1].shard, told[1].waited) == ("s0", 3)
        assert 0.2 < told[1].seconds < PATIENCE
        assert [future.result(PATIENCE) for future in waiting] == [None] * 3

    def test_every_process_holds_soon_and_goes_on(
        self,
        servers: LocalTopology,
        router: Router,
        operator: Operator,
        shops: tuple[int, int],
        entry: str,
    ) -> None:
        kinds = {f"{entry} 1": False, f"{entry} 2": False, f"{entry} 3": True}
        with processes(servers, shops[0], kinds) as pipes:
            until(lambda: len(operator.names()) == 4)
            for round_ in range(3):
                operation = f"{round_:012x}"
                began = time.monotonic()
                operator.primary.hold(operation, 20.0)
                assert wait_for(lambda o=operation: operator.is_drained(o), timeout=PATIENCE)
                print(f"all hold after {(time.monotonic() - began) * 1000:.1f} ms")
                assert time.monotonic() - began < 1.0
                count = operator.primary.value("SELECT count(*) FROM public.entry")
                time.sleep(0.1)
                assert operator.primary.value("SELECT count(*) FROM public.entry") == count
                operator.release()
                until(
                    lambda c=count: operator.primary.value("SELECT count(*) FROM public.entry") > c
                )
            tallies = stopped(pipes)

        assert [error for tally in tallies for error in tally.errors] == []
        with router.sessionmaker(consistency="strong")() as session:
            stored = [name for name in entries(shops[0])(session) if name.startswith(entry)]
        assert sorted(stored) == sorted(name for t in tallies for name in t.acknowledged)


class TestEveryEndIsSeen:
    """A transaction that has ended unnoticed would keep each operation waiting."""

    @pytest.mark.parametrize("end", ["commit", "rollback", "close", "reset", "invalidate"])
    def test_of_a_session_that_ends_it(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str, end: str
    ) -> None:
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}))
            operator.hold(OPERATION)
            assert not operator.is_drained(OPERATION)
            talk.do(lambda session: getattr(session, end)())

            assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)

    def test_of_a_savepoint_that_fails_and_the_transaction_around_it(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        def work(session: Session) -> None:
            with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
                session.execute(sa.insert(Entry), {"shop": shops[0], "id": None})
            writing(shops[0], entry)(session)

        doors.do(work)
        operator.hold(OPERATION)

        assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)

    @pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
    def test_of_a_session_that_is_garbage(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        talk = doors.talk()
        talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}) and None)
        operator.hold(OPERATION)
        assert not operator.is_drained(OPERATION)
        del talk
        gc.collect()

        assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)

    def test_of_a_commit_that_fails(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}))
            operator.hold(OPERATION)
            operator.end_others()
            with pytest.raises(sa.exc.OperationalError):
                talk.do(lambda session: session.commit())
            talk.do(lambda session: session.rollback())

            assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)

    def test_of_a_connection_that_cannot_be_made(
        self, doors: Doors, router: Router, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        impatient = with_policy(router, primary_wait=0.3)
        few = type(doors)(impatient)
        with impatient:
            few.do(entries(shops[0]))
            operator.fence(operator.primary, 2)
            with pytest.raises((NoPrimary, sa.exc.OperationalError)):
                few.do(writing(shops[0], entry))
            assert not any(impatient.writes.under_way.values())
            operator.unfence(operator.primary)
            few.close()
        until(lambda: router.monitor.health.primary("s0") is not None)

    def test_of_a_task_that_is_cancelled(
        self, router: Router, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        def sleeping(session: Session) -> None:
            session.execute(sa.insert(Entry), {"shop": shops[0], "id": entry})
            session.execute(sa.text("SELECT pg_sleep(:long)"), {"long": 20}, bind_arguments=s0)

        s0 = {"shard": "s0"}
        doors = AsyncDoors(router)
        under_way = doors.start(sleeping)
        until(lambda: router.writes.under_way["s0"])
        operator.hold(OPERATION)
        waiting = [doors.start(writing(shops[0], f"{entry} {n}")) for n in range(20)]
        assert all(map(waits, waiting[:2]))
        assert not operator.is_drained(OPERATION)
        for future in (under_way, *waiting[::2]):
            future.cancel()

        assert wait_for(lambda: operator.is_drained(OPERATION), timeout=5.0)
        operator.release()
        assert [future.result(PATIENCE) for future in waiting[1::2]] == [None] * 10
        with pytest.raises(CancelledError):
            under_way.result(PATIENCE)
        stored = doors.do(entries(shops[0]), consistency="strong")
        assert sum(name.startswith(entry) for name in stored) == 10
        doors.close()

    def test_of_a_process_and_its_fork(
        self, servers: LocalTopology, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        """The child has none of its parent's transactions, and tells so under its own name."""
        pipe, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=forking, args=(theirs, servers.config_path, shops[0], entry))
        process.start()
        try:
            assert pipe.recv() == "child has written"
            operator.hold(OPERATION)
            until(lambda: sum(f"held={OPERATION}" in name for name in operator.names()) == 2)
            assert len(operator.names()) == 3, "this process, the parent and the child"
            pipe.send("commit")
            assert pipe.recv() == "parent has written"
            assert wait_for(lambda: operator.is_drained(OPERATION), timeout=2.0)
            pipe.send("end")
            process.join(PATIENCE)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == 0


class TestFence:
    def test_writes_wait_for_its_end(
        self, doors: Doors, router: Router, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        primary = operator.primary
        doors.do(writing(shops[0], entry))
        operator.fence(primary, 2)
        operator.end_others()
        waiting = [doors.start(work(shops[0], f"{entry} {n}")) for n, work in enumerate(KINDS)]
        assert all(map(waits, waiting))
        assert "sqlroute_fence_epoch_2" in router.monitor.health.of(primary.name).fenced
        assert entry in doors.do(entries(shops[0])), "a replica serves reads"
        operator.unfence(primary)

        assert [future.result(PATIENCE) for future in waiting] == [None] * len(waiting)
        assert router.monitor.health.of(primary.name).fenced == ""
        stored = doors.do(entries(shops[0]), consistency="strong")
        assert [stored.count(f"{entry} {n}") for n in range(len(KINDS))] == [1] * len(KINDS)

    def test_sessions_that_are_not_ended_go_on(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}))
            operator.fence(operator.primary, 2)
            talk.do(writing(shops[0], f"{entry} 2"))
            operator.unfence(operator.primary)
        until(lambda: operator.router.monitor.health.primary("s0") is not None)

        assert f"{entry} 2" in doors.do(entries(shops[0]), consistency="strong")


class TestLost:
    def test_connections_that_were_ended_in_the_pool_are_not_met(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        together = threading.Barrier(4)

        def fill(session: Session) -> None:
            session.connection(bind_arguments={"shard": "s0"})
            if not doors.is_async:
                together.wait(PATIENCE)

        for future in [doors.start(fill) for _ in range(4)]:
            future.result(PATIENCE)
        operator.end_others()

        works = [doors.start(KINDS[n % 2](shops[0], f"{entry} {n}")) for n in range(4)]
        assert [work.result(PATIENCE) for work in works] == [None] * 4
        assert len(found(doors, shops[0], entry)) == 4

    @pytest.mark.parametrize("kind", ["insert", "many", "text", "read"])
    def test_a_first_statement_begins_anew(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str, kind: str
    ) -> None:
        """Nobody has seen anything of it, and nobody has sent COMMIT: it is sent once more."""
        row = {"shop": shops[0], "id": entry}

        def work(session: Session) -> None:
            if kind == "insert":
                session.execute(sa.insert(Entry), row)
            elif kind == "many":
                session.execute(sa.insert(Entry), [row, row])
            elif kind == "text":
                session.execute(sa.text(INSERT), row, bind_arguments={"shard": "s0"})
            else:
                session.begin()
                session.scalars(sa.select(Entry).where(Entry.shop == shops[0])).all()
                session.execute(sa.insert(Entry), row)
            session.commit()

        with locked(operator):
            waiting = doors.start(work)
            terminate_blocked(operator)
            terminate_blocked(operator)
            assert not waiting.done()

        assert waiting.result(PATIENCE) is None
        assert len(found(doors, shops[0], entry)) == (2 if kind == "many" else 1)

    def test_what_begins_anew_has_the_settings_of_its_session(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        """Row-level security may hang on them."""
        insert = sa.text(INSERT.replace(":id", ":id || current_setting('app.tenant')"))
        row = {"shop": shops[0], "id": entry}

        def work(session: Session) -> None:
            session.execute(insert, row, bind_arguments={"shard": "s0"})
            session.commit()

        with locked(operator):
            waiting = doors.start(work, settings={"app.tenant": " of tenant 7"})
            terminate_blocked(operator)

        assert waiting.result(PATIENCE) is None
        assert found(doors, shops[0], entry) == [f"{entry} of tenant 7"]

    def test_a_second_statement_is_an_error_and_nothing_is_stored(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        sleep = sa.text("SELECT pg_sleep(:long)").bindparams(long=20)
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[0], "id": entry}))
            sleeping = talk.start(lambda s: s.execute(sleep, bind_arguments={"shard": "s0"}))
            terminate_sleeping(operator)
            with pytest.raises(sa.exc.OperationalError):
                sleeping.result(PATIENCE)
            talk.do(lambda session: session.rollback())
            talk.do(writing(shops[0], f"{entry} 2"))

        assert found(doors, shops[0], entry) == [f"{entry} 2"]

    def test_a_text_that_may_be_several_commands_is_not_sent_twice(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        several = sa.text(
            f"INSERT INTO entry (shop, id) VALUES ({shops[0]}, '{entry}'); COMMIT;"
            " SELECT pg_sleep(20)"
        )
        sleeping = doors.start(lambda s: s.execute(several, bind_arguments={"shard": "s0"}))
        terminate_sleeping(operator)
        with pytest.raises(sa.exc.OperationalError):
            sleeping.result(PATIENCE)

        assert found(doors, shops[0], entry) == [entry]

    def test_what_was_done_on_another_shard_stays(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        with doors.talk() as talk:
            talk.do(lambda s: s.execute(sa.insert(Entry), {"shop": shops[1], "id": entry}))
            with locked(operator):
                waiting = talk.start(writing(shops[0], entry))
                terminate_blocked(operator)
            assert waiting.result(PATIENCE) is None

        for shop in shops:
            assert found(doors, shop, entry) == [entry]

    def test_one_that_is_lost_again_and_again_is_an_error(
        self, doors: Doors, operator: Operator, shops: tuple[int, int], entry: str
    ) -> None:
        with locked(operator):
            waiting = doors.start(writing(shops[0], entry))
            for _ in range(FIRST_TRIES):
                terminate_blocked(operator)
            with pytest.raises(sa.exc.OperationalError):
                waiting.result(PATIENCE)

        assert found(doors, shops[0], entry) == []


def test_a_hold_outlives_a_restart_of_its_primary(
    servers: LocalTopology,
    doors: Doors,
    router: Router,
    operator: Operator,
    shops: tuple[int, int],
    entry: str,
) -> None:
    node = servers.node(operator.primary.name)
    operator.hold(OPERATION)
    node.stop()
    operator.close()
    until(lambda: router.monitor.health.primary("s0") is None)
    waiting = doors.start(writing(shops[0], entry))
    assert waits(waiting)
    node.start()
    until(lambda: router.monitor.health.primary("s0") is not None)
    assert waits(waiting)
    operator.release()

    assert waiting.result(PATIENCE) is None
    assert found(doors, shops[0], entry) == [entry]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_switchover_costs_a_wait_and_no_request(
    sqlroute_topology_factory: TopologyFactory, version: Path | None
) -> None:
    """8 writers in this process and 2 in another one, and readers; the gaps are printed."""
    servers = sqlroute_topology_factory(shards=1, replicas=2, label="by hand", pg_bin=version)
    with started(servers) as router:
        operator, shop = Operator(router), shop_on(router, "s0")
        both = [Doors(router), AsyncDoors(router)]
        with processes(servers, shop, {"other": True}) as pipes:
            writers, readers = Writers(both, shop, 4, "here"), Readers(both, shop)
            time.sleep(0.5)
            steps: dict[str, float] = {"begun": time.monotonic()}
            heir = operator.switch(OPERATION, lambda step: steps.update({step: time.monotonic()}))
            time.sleep(0.5)
            reads, tallies = readers.stop(), [*writers.stop(), *stopped(pipes)]
        tally = Tally(
            [name for each in tallies for name in each.acknowledged],
            [at for each in tallies for at in each.times],
            [error for each in tallies for error in each.errors],
        )
        for step, at in steps.items():
            print(f"{step} at {(at - steps['begun']) * 1000:.0f} ms")
        print(f"{len(tally.acknowledged)} writes, longest gap {tally.longest_gap * 1000:.0f} ms")

        assert tally.errors == []
        assert [error for each in reads.values() for error in each.errors] == []
        for is_async in (False, True):
            read = reads[is_async, "eventual"].times
            assert any(steps["drained"] < at < steps["released"] for at in read)
        stored = heir.rows("SELECT id FROM public.entry")
        assert sorted(row["id"] for row in stored) == sorted(tally.acknowledged)
        assert router.monitor.health.shard("s0").primary == heir.name
        assert not any(router.writes.under_way.values())
        for doors in both:
            doors.close()
        operator.close()


def seen_by(name: str) -> tuple[int, int]:
    """Return the position in the name of a monitor."""
    found = re.search(r" seen=(\d+)/([0-9A-F]+)", name)
    return (int(found[1]), int(found[2], 16)) if found else (0, 0)


def found(doors: Doors, shop: int, entry: str) -> list[str]:
    """Return the entries of a test that are stored, each as often as it is."""
    names = doors.do(entries(shop), consistency="strong")
    return [name for name in names if name.startswith(entry)]


@contextmanager
def locked(operator: Operator) -> Iterator[None]:
    """Let every statement on the entries wait."""
    node = operator.primary.node
    with psycopg.connect(**node.conninfo()) as connection:
        connection.execute("LOCK TABLE entry IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


def terminate_blocked(operator: Operator) -> None:
    """End the one session that waits for a lock."""
    terminate(operator, "wait_event_type = 'Lock'")


def terminate_sleeping(operator: Operator) -> None:
    terminate(operator, "wait_event = 'PgSleep'")


def terminate(operator: Operator, which: str) -> None:
    primary = operator.primary
    ending = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        f" WHERE datname = current_database() AND {which}"
    )
    assert wait_for(lambda: len(primary.rows(ending)) == 1, timeout=PATIENCE)


@contextmanager
def processes(servers: LocalTopology, shop: int, kinds: dict[str, bool]) -> Iterator[list[Pipe]]:
    """Run other processes that write, by name, through async sessions or not."""
    pipes, running = [], []
    try:
        for name, is_async in kinds.items():
            pipe, theirs = SPAWN.Pipe()
            arguments = (theirs, servers.config_path, shop, name, is_async)
            running.append(SPAWN.Process(target=other_process, args=arguments))
            running[-1].start()
            pipes.append(pipe)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        yield pipes
    finally:
        for process, pipe in zip(running, pipes, strict=False):
            process.join(1.0)
            process.kill()
            process.join()
            pipe.close()


def stopped(pipes: list[Pipe]) -> list[Tally]:
    """Stop the writers of other processes, and return what they were told."""
    for pipe in pipes:
        pipe.send("stop")
    return [tally for pipe in pipes for tally in pipe.recv()]


def with_policy(router: Router, **policy: Any) -> Router:
    """Return another router of the same servers."""
    return Router(router.topology, replace(router.policy, **policy))
