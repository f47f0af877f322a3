"""Reads under tokens: whoever follows one never finds less than it covers, nor ever goes back.

Writers raise counters and hand (row, value, token) on. Readers, sync and async, read them in the
session that wrote, in sessions that last, in new ones with the token, with two tokens at once, and
hand on in turn what they have seen, which may be newer than what they were told.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from sqlroute import Router
from sqlroute.local.topology import LocalTopology

from .lagging import Lagging, fill
from .models import ROWS, Counter
from .processes import OtherProcess, outcomes
from .tally import Outcome, Report, Seen, Tally, answered_by, guarded

PROCESSES = 2
WRITERS = 2
"""Per process, as the readers."""

READERS = 5
TASKS = 6
"""Of the one event loop, beside the threads of the readers."""

COMMITS_PER_SESSION = 20
HANDOVERS_PER_SESSION = 40
LONGEST = 0.2


def run(
    topology: LocalTopology,
    count: int,
    *,
    break_token: bool = False,
    seed: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Read until ``count`` reads were checked.

    Args:
        break_token: let sessions ignore their tokens: stale reads must be found then.
    """
    with Router.from_config(topology.config_path) as router:
        fill(router)
    began = time.monotonic()
    with Lagging(topology, LONGEST, seed) as lag, ExitStack() as stack:
        share = -(-count // PROCESSES)
        options = {"count": share, "break_token": break_token, "seed": seed}
        processes = [
            stack.enter_context(OtherProcess(work, topology.config_path, number=n, **options))
            for n in range(PROCESSES)
        ]
        found = outcomes(processes, progress)
    return Report.of("token_reads", topology, found, lag, time.monotonic() - began)


def work(
    pipe: Connection, config: Path, *, number: int, count: int, break_token: bool, seed: int
) -> None:
    """Read as many times, in a process of its own, and send the outcome."""
    logging.getLogger("sqlroute").setLevel(logging.ERROR)
    with Router.from_config(config) as router, Router.from_config(config) as asynchronous:
        mine = range(number, ROWS, PROCESSES)
        options = without_tokens() if break_token else {}
        scene = _Scene(router, asynchronous, mine, options, seed + 10 * number)
        scene.play(count, pipe.send)
        pipe.send(Outcome(Tally.total(scene.tallies), answered_by(router, asynchronous)))


def without_tokens() -> dict[str, Any]:
    """Return the options of sessions that do not care what they have seen."""
    return {"consistency": "bounded", "stale_writes": "allow"}


def value_of(row: int) -> Any:
    return select(Counter.value).where(Counter.id == row)


class _Scene:
    """The threads, and what they share."""

    def __init__(
        self,
        router: Router,
        asynchronous: Router,
        rows: range,
        options: dict[str, Any],
        seed: int,
    ) -> None:
        self.tallies: list[Tally] = []
        self._rows = rows
        self._seed = seed
        self._stop = threading.Event()
        self._handed: queue.Queue[Seen] = queue.Queue(maxsize=16)
        self._is_broken = bool(options)
        self._asynchronous = asynchronous
        self._sessions: sessionmaker[Any] = router.sessionmaker(**options)
        self._async_sessions = asynchronous.async_sessionmaker(**options)

    def play(self, count: int, progress: Callable[[int], None]) -> None:
        works = [self._writer(k) for k in range(WRITERS)]
        works += [self._reader(k) for k in range(READERS)]
        works.append(lambda tally: asyncio.run(self._read_async(tally)))
        self.tallies = [Tally() for _ in works]
        threads = [
            threading.Thread(target=guarded, args=(tally, work, self._stop))
            for tally, work in zip(self.tallies, works, strict=True)
        ]
        for thread in threads:
            thread.start()
        while not self._stop.wait(0.2):
            done = sum(tally.reads.total() for tally in self.tallies)
            progress(done)
            if done >= count:
                self._stop.set()
        for thread in threads:
            thread.join()

    def _writer(self, number: int) -> Callable[[Tally], None]:
        def write(tally: Tally) -> None:
            rng = Random(self._seed * 1000 + number)
            mine = self._rows[number::WRITERS]
            values = dict.fromkeys(mine, 0)
            while not self._stop.is_set():
                with self._sessions() as session:
                    for _ in range(COMMITS_PER_SESSION):
                        row = rng.choice(mine)
                        values[row] += 1
                        self._write(session, row, values[row], rng)
                        tally.writes += 1
                        seen = Seen(row, values[row], str(session.token))
                        self._hand(seen)
                        read_value(session, seen, tally, "same session")

        return write

    def _write(self, session: Session, row: int, value: int, rng: Random) -> None:
        if rng.random() < 0.5:
            counter = session.get_one(Counter, row, with_for_update=True)
            counter.value = value
            session.commit()
        else:
            session.execute(update(Counter).where(Counter.id == row).values(value=value))
            session.commit()
        session.expunge_all()

    def _hand(self, seen: Seen) -> None:
        while not self._stop.is_set():
            try:
                self._handed.put(seen, timeout=0.1)
            except queue.Full:
                continue
            return

    def _take(self) -> Seen | None:
        while not self._stop.is_set():
            try:
                return self._handed.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def _reader(self, number: int) -> Callable[[Tally], None]:
        def read(tally: Tally) -> None:
            rng = Random(self._seed * 2000 + number)
            earlier: deque[Seen] = deque(maxlen=200)
            while not self._stop.is_set():
                with self._sessions() as lasting:
                    highest: dict[int, int] = {}
                    for _ in range(HANDOVERS_PER_SESSION):
                        seen = self._take()
                        if seen is None:
                            return
                        earlier.append(seen)
                        other = rng.choice(earlier)
                        with self._sessions(token=self._given(seen)) as session:
                            read_as_told(session, seen, tally)
                        with self._sessions(token=self._given(other)) as session:
                            read_older(session, seen, other, tally, self._given(seen))
                        if rng.random() < 0.15:
                            with self._sessions(token=self._given(other)) as session:
                                further = read_on(session, seen.row, other, tally)
                            with self._sessions(token=self._given(further)) as session:
                                read_value(session, further, tally, "token of a reader")
                        self._follow(lasting, seen)
                        read_lasting(lasting, seen, tally, highest)

        return read

    async def _read_async(self, tally: Tally) -> None:
        async with self._asynchronous:
            await asyncio.gather(*(self._task(n, tally) for n in range(TASKS)))

    async def _task(self, number: int, tally: Tally) -> None:
        """Do as the readers do, on async sessions; ``run_sync`` runs the same checks on them."""
        rng = Random(self._seed * 3000 + number)
        earlier: deque[Seen] = deque(maxlen=200)
        while not self._stop.is_set():
            async with self._async_sessions() as lasting:
                highest: dict[int, int] = {}
                for _ in range(HANDOVERS_PER_SESSION):
                    seen = await asyncio.to_thread(self._take)
                    if seen is None:
                        return
                    earlier.append(seen)
                    other = rng.choice(earlier)
                    async with self._async_sessions(token=self._given(seen)) as session:
                        with tally.timed():
                            found = await session.scalar(value_of(seen.row))
                        way = "async new session"
                        tally.check(way, seen, found, session.sync_session, value_of(seen.row))
                        await session.run_sync(read_as_told, seen, tally, "async ")
                    async with self._async_sessions(token=self._given(other)) as session:
                        token = self._given(seen)
                        await session.run_sync(read_older, seen, other, tally, token, "async ")
                    if rng.random() < 0.15:
                        async with self._async_sessions(token=self._given(other)) as session:
                            args = (seen.row, other, tally, "async ")
                            further = await session.run_sync(read_on, *args)
                        async with self._async_sessions(token=self._given(further)) as session:
                            way = "async token of a reader"
                            await session.run_sync(read_value, further, tally, way)
                    self._follow(lasting, seen)
                    await lasting.run_sync(read_lasting, seen, tally, highest, "async ")

    def _given(self, seen: Seen) -> str | None:
        return None if self._is_broken else seen.token

    def _follow(self, session: Any, seen: Seen) -> None:
        if not self._is_broken:
            session.follow(seen.token)


def read_as_told(session: Any, seen: Seen, tally: Tally, prefix: str = "") -> None:
    """Read in a new session what its token covers, as a column and as an object, twice."""
    read_value(session, seen, tally, f"{prefix}new session")
    with tally.timed():
        counter = session.get(Counter, seen.row)
    found = counter.value if counter is not None else None
    tally.check(f"{prefix}get", seen, found, session, value_of(seen.row))
    if counter is not None:
        with tally.timed():
            session.refresh(counter)
        tally.check(f"{prefix}refresh", seen, counter.value, session, value_of(seen.row))


def read_older(
    session: Any, seen: Seen, other: Seen, tally: Tally, token: str | None, prefix: str = ""
) -> None:
    """Read under an older token, then follow the newer one too: both hold from then on."""
    read_value(session, other, tally, f"{prefix}older token")
    if token is not None:
        session.follow(token)
    read_value(session, seen, tally, f"{prefix}two tokens")
    read_value(session, other, tally, f"{prefix}two tokens")


def read_on(session: Any, row: int, other: Seen, tally: Tally, prefix: str = "") -> Seen:
    """Read any row, of which the token says nothing, and return what was seen with a token."""
    read_value(session, other, tally, f"{prefix}older token")
    value = session.scalar(value_of(row))
    return Seen(row, value, str(session.token))


def read_lasting(
    session: Any, seen: Seen, tally: Tally, highest: dict[int, int], prefix: str = ""
) -> None:
    """Read in a session that lasts: never less than it has found before."""
    for row in (seen.row, *list(highest)[-4:]):
        least = max(highest.get(row, 0), seen.value if row == seen.row else 0)
        expected = Seen(row, least, seen.token)
        found = read_value(session, expected, tally, f"{prefix}lasting session")
        highest.pop(row, None)  # the newest stand last
        highest[row] = max(found or 0, least)


def read_value(session: Any, seen: Seen, tally: Tally, way: str) -> int | None:
    statement = value_of(seen.row)
    with tally.timed():
        found: int | None = session.scalar(statement)
    tally.check(way, seen, found, session, statement)
    return found
