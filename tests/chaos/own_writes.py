"""What a session has written it reads, by whatever way, and so does whoever has its token.

Each cycle writes, commits, and reads back through ``get``, ``refresh``, a lazy load, a new session
with the token, and another process with the token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import update

from sqlroute import Router
from sqlroute.local.topology import LocalTopology

from .lagging import Lagging, fill
from .models import ROWS, SLOTS, Counter, Slot
from .processes import OtherProcess, outcomes
from .tally import Outcome, Report, Seen, Tally, answered_by, guarded
from .token_reads import read_value, value_of, without_tokens

THREADS = 8
FOLLOWERS = 4
LONGEST = 0.5


def run(
    topology: LocalTopology,
    count: int,
    *,
    break_token: bool = False,
    seed: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Write and read back ``count`` times.

    Args:
        break_token: let sessions ignore their tokens: stale reads must be found then.
    """
    options = without_tokens() if break_token else {}
    with Router.from_config(topology.config_path) as router:
        fill(router)
        began = time.monotonic()
        with (
            Lagging(topology, LONGEST, seed) as lag,
            OtherProcess(follow, topology.config_path, break_token=break_token) as other,
        ):
            lock = threading.Lock()

            def send(seen: Seen | None) -> None:
                with lock:  # threads share the pipe; a full one holds all of them back
                    other.pipe.send(seen)

            writers = _Writers(router.sessionmaker(**options), send, break_token, seed)
            writers.play(count, progress)
            send(None)
            elsewhere = outcomes([other], lambda _: None)
        here = Outcome(Tally.total(writers.tallies), answered_by(router))
    seconds = time.monotonic() - began
    return Report.of("own_writes", topology, [here, *elsewhere], lag, seconds)


def follow(pipe: Connection, config: Path, *, break_token: bool) -> None:
    """Read what comes through the pipe, in a process of its own, and send the outcome."""
    logging.getLogger("sqlroute").setLevel(logging.ERROR)
    taking = threading.Lock()
    stop = threading.Event()
    with Router.from_config(config) as router:
        sessions: Any = router.sessionmaker(**(without_tokens() if break_token else {}))

        def take() -> Seen | None:
            with taking:
                seen: Seen | None = None if stop.is_set() else pipe.recv()
                if seen is None:
                    stop.set()
                return seen

        def read(tally: Tally) -> None:
            while (seen := take()) is not None:
                with sessions(token=None if break_token else seen.token) as session:
                    read_value(session, seen, tally, "another process")

        tallies = [Tally() for _ in range(FOLLOWERS)]
        threads = [threading.Thread(target=guarded, args=(tally, read, stop)) for tally in tallies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(Outcome(Tally.total(tallies), answered_by(router)))


class _Writers:
    """The threads that write and read back, and what they share."""

    def __init__(
        self, sessions: Any, send: Callable[[Seen], None], is_broken: bool, seed: int
    ) -> None:
        self.tallies = [Tally() for _ in range(THREADS)]
        self._sessions = sessions
        self._send = send
        self._is_broken = is_broken
        self._seed = seed
        self._stop = threading.Event()

    def play(self, count: int, progress: Callable[[int], None]) -> None:
        threads = [
            threading.Thread(
                target=guarded, args=(tally, partial(self._work, number, count), self._stop)
            )
            for number, tally in enumerate(self.tallies)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                progress(sum(tally.writes for tally in self.tallies))

    def _work(self, number: int, count: int, tally: Tally) -> None:
        rng = Random(self._seed * 1000 + number)
        mine = range(number, ROWS, THREADS)
        values = dict.fromkeys(mine, 0)
        cookie = ""
        for _ in range(number, count, THREADS):
            if self._stop.is_set():
                return
            row = rng.choice(mine)
            cookie = self._cycle(Seen(row, values[row], cookie), tally)
            values[row] += 1

    def _cycle(self, before: Seen, tally: Tally) -> str:
        """Write a row that nobody else writes and read it back; return the newest token."""
        row, value = before.row, before.value + 1
        with self._sessions(token=self._given(before)) as session:
            counter = _get(session, before, tally, "next session")
            counter.value = value
            slot = update(Slot).where(Slot.counter_id == row, Slot.number == value % SLOTS)
            session.execute(slot.values(value=value))
            session.commit()
            tally.writes += 1
            seen = Seen(row, value, str(session.token))
            self._send(seen)

            session.expunge_all()
            counter = _get(session, seen, tally, "get")
            with tally.timed():
                session.refresh(counter)
            tally.check("refresh", seen, counter.value, session, value_of(row))
            with tally.timed():
                slots = counter.slots
            tally.check("lazy load", seen, max(s.value for s in slots), session, value_of(row))
        with self._sessions(token=self._given(seen)) as session:
            read_value(session, seen, tally, "new session")
        return seen.token

    def _given(self, seen: Seen) -> str | None:
        return None if self._is_broken else seen.token


def _get(session: Any, seen: Seen, tally: Tally, way: str) -> Counter:
    with tally.timed():
        counter: Counter = session.get_one(Counter, seen.row)
    tally.check(way, seen, counter.value, session, value_of(seen.row))
    return counter
