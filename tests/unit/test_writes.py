"""Promises of ``sqlroute.runtime.writes``: who waits, who is woken, and what servers are told."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.util import greenlet_spawn

from sqlroute.errors import DeadlineExceeded, NoPrimary
from sqlroute.health import Health, Observation, observe
from sqlroute.routing.policy import Policy, PoolLimits
from sqlroute.runtime.engines import Engines
from sqlroute.runtime.limits import Limit
from sqlroute.runtime.writes import Ticket, Writes
from sqlroute.topology import Keyspace, Node, Shard, Topology

pytestmark = pytest.mark.timeout(30)

NAMEDATALEN = 64
OPERATION = "0123456789ab"


class Board:
    """Stands where the monitor does: what is known, published by the test; and what was told."""

    def __init__(self) -> None:
        shards = tuple(Shard(name, (Node(f"{name}-a"), Node(f"{name}-b"))) for name in ("s0", "s1"))
        topology = Topology((Keyspace("shop", shards, buckets=16),))
        self.last_health = Health.initial(topology)
        self.told: list[str] = []
        self.writes = Writes(lambda: self)  # type: ignore[arg-type, return-value]
        for shard in ("s0", "s1"):
            self.say(shard)

    def tell(self, shard: str) -> None:
        self.told.append(shard)

    def say(self, shard: str, operation: str = "", seconds: float = 30.0) -> None:
        """Publish what the primary of a shard says: who holds it, or nobody."""
        now = time.monotonic()
        self.publish(
            Observation(
                f"{shard}-a",
                now,
                is_primary=True,
                timeline=1,
                promotion=0,
                operation=operation,
                held_for=seconds,
            )
        )

    def publish(self, observation: Observation) -> None:
        """As the monitor does: first publish, then tell what has changed."""
        old = self.last_health
        self.last_health = observe(old, observation, observation.at)
        shard = self.last_health.of(observation.node).shard
        self.writes.changed(old.shard(shard), self.last_health.shard(shard))


@pytest.fixture
def board() -> Board:
    return Board()


def engines_of(board: Board, *, is_async: bool) -> Engines:
    return Engines(
        board.last_health.topology,
        Policy(),
        is_async=is_async,
        on_failure=lambda *_: False,
        on_stale_map=lambda _: None,
        on_answer=lambda *_: None,
        limits=lambda _: PoolLimits(1, 1),
    )


@pytest.fixture
def engines(board: Board) -> Engines:
    return engines_of(board, is_async=False)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(300) as pool:
        yield pool


@contextmanager
def collecting_always() -> Iterator[None]:
    """Run the garbage collector wherever it could run."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def under_way(board: Board, *shards: str) -> Ticket:
    ticket = board.writes.ticket()
    for shard in shards:
        assert ticket.enter(shard) is None
    return ticket


def await_release(
    board: Board,
    engines: Engines,
    ticket: Ticket | None = None,
    limit: Limit | None = None,
    most: int = 1000,
    shard: str = "s0",
) -> None:
    hold = board.writes.hold(shard)
    assert hold is not None
    ticket = ticket or board.writes.ticket()
    board.writes.await_release(ticket, shard, hold, engines, limit, most)


def waits(future: Future[Any]) -> bool:
    """Say if somebody still waits, after time enough to have gone on."""
    time.sleep(0.05)
    return not future.done()


def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends, "it did not become true"
        time.sleep(0.001)


class TestName:
    def test_it_fits_into_a_name_of_the_server_whatever_is_to_be_said(self, board: Board) -> None:
        """A longer one would be cut, and an operation with half an id is none."""
        board.writes.acknowledged("s0", 999_999, 2**64 - 1)
        board.say("s0", OPERATION)

        name = board.writes.name_of("s0")
        assert name == f"sqlroute monitor seen=999999/FFFFFFFFFFFFFFFF held={OPERATION}"
        assert len(name.encode()) < NAMEDATALEN

    def test_held_is_said_when_nothing_is_under_way_and_not_before(self, board: Board) -> None:
        one, other = under_way(board, "s0"), under_way(board, "s0")
        board.say("s0", OPERATION)
        assert board.writes.name_of("s0") == "sqlroute monitor"

        one.end()
        assert board.told == []
        other.end()

        assert board.told == ["s0"]
        assert board.writes.name_of("s0") == f"sqlroute monitor held={OPERATION}"
        assert board.writes.name_of("s1") == "sqlroute monitor"
        board.say("s0")
        assert board.writes.name_of("s0") == "sqlroute monitor"

    def test_seen_is_the_newest_position_of_the_newest_timeline(self, board: Board) -> None:
        for timeline, lsn in ((1, 0x300), (1, 0x200), (2, 0x100), (1, 0x400)):
            board.writes.acknowledged("s0", timeline, lsn)

        assert board.writes.name_of("s0") == "sqlroute monitor seen=2/100"

    def test_who_comes_while_it_is_held_does_not_take_it_back(self, board: Board) -> None:
        """Else a name would flicker as long as requests arrive, and no drain would be seen."""
        board.say("s0", OPERATION)
        ticket = board.writes.ticket()

        assert ticket.enter("s0") is not None
        assert ticket.shards == ()
        assert board.told == []


class TestTicket:
    def test_a_transaction_that_is_garbage_has_ended(self, board: Board) -> None:
        ticket = under_way(board, "s0", "s1")
        ring = [ticket]
        ring.append(ring)  # type: ignore[arg-type]
        board.say("s0", OPERATION)

        del ticket, ring
        gc.collect()

        assert board.told == ["s0"]
        assert not any(board.writes.under_way.values())

    def test_the_end_of_one_transaction_is_not_that_of_another(self, board: Board) -> None:
        one, other = under_way(board, "s0"), under_way(board, "s0")
        one.end()
        one.end()

        assert len(board.writes.under_way["s0"]) == 1
        other.leave("s0")
        assert len(board.writes.under_way["s0"]) == 0

    def test_the_collector_may_end_transactions_at_any_moment(
        self, board: Board, engines: Engines
    ) -> None:
        """It runs within whatever code made an object: a lock that it took could be held there."""

        def garbage() -> None:
            ring: list[Any] = [under_way(board, "s1")]
            ring.append(ring)

        board.say("s0", OPERATION)
        with collecting_always():
            for position in range(300):
                garbage()
                board.writes.acknowledged("s1", 1, position)
                board.writes.name_of("s1")
                with pytest.raises(DeadlineExceeded):
                    await_release(board, engines, limit=Limit.after(0.0001))
                board.say("s1")
        gc.collect()

        assert not any(board.writes.under_way.values())

    def test_a_forked_child_has_none_of_its_parents_transactions(self, board: Board) -> None:
        ticket = under_way(board, "s0")
        board.writes.forget()
        board.say("s0", OPERATION)

        assert board.writes.name_of("s0") == f"sqlroute monitor held={OPERATION}"
        ticket.end()
        assert not any(board.writes.under_way.values())


class TestWaiting:
    def test_all_who_wait_go_on_when_it_is_released(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        """Some are woken, and each of those wakes one more."""
        board.say("s0", OPERATION)
        waiting = [threads.submit(await_release, board, engines) for _ in range(200)]
        assert all(map(waits, waiting[:2]))

        until(lambda: board.writes.take_waited("s0") == 200)
        board.say("s0")

        for future in waiting:
            assert future.result(5) is None
        assert board.writes.take_waited("s0") == 0

    def test_one_that_gives_up_does_not_break_the_chain(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        board.say("s0", OPERATION)
        hurried = [
            threads.submit(await_release, board, engines, limit=Limit.after(0.01 + i / 1000))
            for i in range(100)
        ]
        waiting = [threads.submit(await_release, board, engines) for _ in range(100)]
        assert waits(waiting[0])
        board.say("s0")

        for future in waiting:
            assert future.result(5) is None
        assert {type(future.exception(5)) for future in hurried} <= {type(None), DeadlineExceeded}

    def test_tasks_wait_without_their_thread_and_may_be_cancelled(self, board: Board) -> None:
        async def main() -> list[Any]:
            engines = engines_of(board, is_async=True)
            waiting = [
                asyncio.ensure_future(greenlet_spawn(await_release, board, engines))
                for _ in range(100)
            ]
            await asyncio.sleep(0.02)
            for task in waiting[::2]:
                task.cancel()
            board.say("s0")
            return await asyncio.gather(*waiting, return_exceptions=True)

        board.say("s0", OPERATION)
        found = asyncio.run(main())

        assert [type(one) for one in found[:2]] == [asyncio.CancelledError, type(None)]
        assert found[1::2] == [None] * 50

    def test_an_event_loop_that_was_closed_keeps_nobody(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        """Its tasks are woken in vain and wake nobody: the next looks of the monitor do."""
        board.say("s0", OPERATION)
        loop, of_tasks = asyncio.new_event_loop(), engines_of(board, is_async=True)
        tasks = [
            loop.create_task(greenlet_spawn(await_release, board, of_tasks)) for _ in range(50)
        ]
        loop.run_until_complete(asyncio.sleep(0.02))
        loop.close()
        waiting = [threads.submit(await_release, board, engines) for _ in range(50)]
        assert waits(waiting[0])
        board.say("s0")
        for _ in range(10):
            board.writes.wake()

        assert [future.result(5) for future in waiting] == [None] * 50
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # as is meant here

    def test_a_hold_that_nobody_ends_is_over_by_itself(
        self, board: Board, engines: Engines
    ) -> None:
        board.say("s0", OPERATION, 0.1)
        began = time.monotonic()
        await_release(board, engines)

        assert 0.08 < time.monotonic() - began < 2
        assert board.writes.hold("s0") is None

    def test_a_hold_that_is_made_longer_is_waited_for(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        board.say("s0", OPERATION, 0.08)
        waiting = threads.submit(await_release, board, engines)
        assert waits(waiting)
        board.say("s0", OPERATION, 30.0)
        time.sleep(0.1)

        assert waits(waiting)
        board.say("s0")
        assert waiting.result(5) is None

    def test_who_waits_for_one_operation_meets_the_next(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        """Each looks anew what there is: it returns, and its transaction may wait once more."""
        board.say("s0", OPERATION)
        waiting = threads.submit(await_release, board, engines)
        assert waits(waiting)
        board.say("s0", "another")

        assert waiting.result(5) is None
        assert board.writes.ticket().enter("s0") == board.writes.hold("s0")

    def test_one_too_many_is_refused_and_told_what_to_do(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        board.say("s0", OPERATION)
        waiting = [threads.submit(await_release, board, engines, most=2) for _ in range(2)]
        assert all(map(waits, waiting))

        with pytest.raises(NoPrimary, match=r"operation 0123456789ab holds .* s0, and 2 wait alr"):
            await_release(board, engines, most=2)
        board.say("s0")
        assert [future.result(5) for future in waiting] == [None, None]

    def test_the_deadline_of_a_session_is_kept(self, board: Board, engines: Engines) -> None:
        board.say("s0", OPERATION)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="nothing was sent"):
            await_release(board, engines, limit=Limit.after(0.05))

        assert 0.04 < time.monotonic() - began < 2

    def test_a_primary_is_waited_for_and_not_the_one_of_no_use(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        ends = time.monotonic() + 10
        await_primary = board.writes.await_primary
        waiting = threads.submit(await_primary, "s0", "s0-a", engines, ends)
        assert waits(waiting)
        board.publish(
            Observation("s0-b", time.monotonic(), is_primary=True, timeline=2, promotion=1)
        )

        assert waiting.result(5) is None
        assert await_primary("s0", None, engines, ends) is None
        assert time.monotonic() < ends - 1


class TestTwoShards:
    def test_a_transaction_on_a_free_shard_waits_for_a_held_one(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        ticket = under_way(board, "s1")
        board.say("s0", OPERATION)
        assert ticket.enter("s0") == board.writes.hold("s0")
        waiting = threads.submit(await_release, board, engines, ticket)
        assert waits(waiting)
        board.say("s0")

        assert waiting.result(5) is None
        assert ticket.enter("s0") is None

    def test_one_on_a_held_shard_waits_for_no_other(self, board: Board) -> None:
        """That shard's operation waits for it; it must not wait for another operation."""
        ticket = under_way(board, "s1")
        board.say("s0", OPERATION)
        board.say("s1", "another")

        assert ticket.enter("s0") is None
        assert board.writes.name_of("s0") == "sqlroute monitor"
        ticket.end()
        assert board.writes.name_of("s0") == f"sqlroute monitor held={OPERATION}"

    def test_one_that_waits_goes_on_when_its_own_shard_is_held(
        self, board: Board, engines: Engines, threads: ThreadPoolExecutor
    ) -> None:
        """Two operations and two transactions over both shards would wait in a ring for ever."""
        ticket = under_way(board, "s1")
        board.say("s0", OPERATION)
        waiting = threads.submit(await_release, board, engines, ticket)
        assert waits(waiting)
        board.say("s1", "another")

        assert waiting.result(5) is None
        assert ticket.enter("s0") is None

    def test_a_new_transaction_waits_though_all_shards_are_held(self, board: Board) -> None:
        board.say("s0", OPERATION)
        board.say("s1", "another")

        for shard in ("s0", "s1"):
            assert board.writes.ticket().enter(shard) == board.writes.hold(shard)


def test_no_transaction_is_missed_by_a_hold_that_begins_meanwhile(
    board: Board, threads: ThreadPoolExecutor
) -> None:
    """Either the transaction sees the hold or the monitor sees the transaction."""
    writing: set[int] = set()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            ticket = board.writes.ticket()
            if ticket.enter("s0") is None:
                writing.add(id(ticket))
                writing.discard(id(ticket))
                ticket.end()

    writers = [threads.submit(write) for _ in range(4)]
    for number in range(200):
        board.say("s0", f"op{number}")
        until(lambda n=number: board.writes.name_of("s0").endswith(f"held=op{n}"))
        assert not writing
        assert board.writes.name_of("s0").endswith(f"held=op{number}")
        board.say("s0")
    stop.set()
    for writer in writers:
        writer.result(5)
