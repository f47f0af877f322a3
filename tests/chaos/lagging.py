"""Servers whose replicas are held behind at random, and how far behind they really were."""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, LiteralString, Self

import psycopg
from sqlalchemy import insert

from sqlroute import Router
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.routing.token import parse_lsn

from .models import ROWS, SLOTS, Base, Counter, Slot

LOOK_EVERY = 0.01
SAMPLES = 0.1
"""Share of the looks at the primary after which the replicas are looked at, too."""

RUNNING = 0.25
"""Share of the longest pause that a replica may at most follow freely between two pauses."""

_Connection = psycopg.Connection[Any]


class Lagging:
    """Pauses and resumes the replay of each replica, on its own, while the block lasts.

    Args:
        longest: seconds that a pause lasts at most.
        seed: of the lengths of the pauses.

    Attributes:
        lags: what was measured, in seconds: at a moment, how long ago the primary was first seen
            past the position that a replica has replayed; 0 when the replica is as far. The truth
            is up to ``LOOK_EVERY`` more.
        pauses: how many there were.
    """

    def __init__(self, topology: LocalTopology, longest: float, seed: int) -> None:
        self.lags: list[float] = []
        self.pauses = 0
        self._primary, *self._replicas = topology.nodes
        self._longest = longest
        self._seed = seed
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        works = [partial(self._hold, number, node) for number, node in enumerate(self._replicas)]
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,)) for work in (*works, self._measure)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._failures and error is None:
            raise self._failures[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except psycopg.Error as error:
            self._failures.append(error)

    def _hold(self, number: int, node: LocalNode) -> None:
        rng = Random(self._seed * 100 + number)
        with _connect(node) as connection:
            try:
                while not self._stop.is_set():
                    connection.execute("SELECT pg_wal_replay_pause()")
                    self._stop.wait(rng.uniform(0, self._longest))
                    connection.execute("SELECT pg_wal_replay_resume()")
                    self.pauses += 1  # threads may lose one
                    self._stop.wait(rng.uniform(0, self._longest * RUNNING))
            finally:
                with contextlib.suppress(psycopg.Error):
                    connection.execute("SELECT pg_wal_replay_resume()")

    def _measure(self) -> None:
        rng = Random(self._seed)
        lsns: list[int] = []  # of the primary, ascending, and when each was first seen
        times: list[float] = []
        with contextlib.ExitStack() as stack:
            primary = stack.enter_context(_connect(self._primary))
            replicas = [stack.enter_context(_connect(node)) for node in self._replicas]
            while not self._stop.wait(LOOK_EVERY):
                lsn = _lsn(primary, "pg_current_wal_flush_lsn()")
                if not lsns or lsn > lsns[-1]:
                    lsns.append(lsn)
                    times.append(time.monotonic())
                if rng.random() >= SAMPLES:
                    continue
                for replica in replicas:
                    now = time.monotonic()
                    replayed = _lsn(replica, "pg_last_wal_replay_lsn()")
                    missing = bisect.bisect_right(lsns, replayed)
                    since = times[missing] if missing < len(times) else now
                    self.lags.append(max(0.0, now - since))


def _connect(node: LocalNode) -> _Connection:
    return psycopg.connect(**node.conninfo, autocommit=True)


def _lsn(connection: _Connection, function: LiteralString) -> int:
    row = connection.execute(f"SELECT {function}::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


def fill(router: Router) -> None:
    """Make the counters anew, all 0, and wait until each replica has them."""
    router.drop_all(Base.metadata)
    router.create_all(Base.metadata)
    with router.sessionmaker()() as session:
        session.execute(insert(Counter), [{"id": i, "value": 0} for i in range(ROWS)])
        slots = [
            {"counter_id": i, "number": n, "value": 0} for i in range(ROWS) for n in range(SLOTS)
        ]
        session.execute(insert(Slot), slots)
        session.commit()
        (position,) = session.token.positions
    deadline = time.monotonic() + 30
    while any(n.lsn < position.lsn for n in router.monitor.ask("s0", 1.0).replicas("s0")):
        if time.monotonic() > deadline:
            raise TimeoutError("the replicas did not catch up within 30 s")
