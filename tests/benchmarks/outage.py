"""Reads while replicas are killed: none fails, none is late, and the primary is spared."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import psycopg
from sqlalchemy.exc import SQLAlchemyError

import sqlroute
from sqlroute.health import State
from sqlroute.local.node import LocalNode

from .pairs import Figure, figure_of
from .servers import ROWS, Account, Bench, bench

THREADS = 4
DEADLINE = 2.0
"""Seconds that a session has, from its making on."""

KILLS = 6
CALM, AFTER = 1.0, 2.5
"""Seconds of load before a kill and after it."""

SHARE = 0.2
"""``primary_fallback_share`` of the last figure."""

WINDOWS, WINDOW = 5, 2.0

_PATIENCE = 30.0
_TRANSACTIONS = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"


@dataclass(slots=True)
class _Seen:
    """What one thread has seen."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class _Load:
    """Threads that read one object per session, as fast as they can, during a ``with`` block."""

    def __init__(self, router: sqlroute.Router) -> None:
        self._sessions = router.sessionmaker(deadline=DEADLINE)
        self._is_over = threading.Event()
        self._seen = [_Seen() for _ in range(THREADS)]
        self._threads = [threading.Thread(target=self._run, args=(seen,)) for seen in self._seen]

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
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def seconds(self) -> list[float]:
        return [second for seen in self._seen for second in seen.seconds]

    @property
    def errors(self) -> Counter[str]:
        return sum((seen.errors for seen in self._seen), Counter())

    @property
    def answered(self) -> int:
        return sum(len(seen.seconds) for seen in self._seen)

    def _run(self, seen: _Seen) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            start = time.perf_counter()
            try:
                with self._sessions() as session:
                    assert session.get_one(Account, number % ROWS).name
            except SQLAlchemyError as error:
                seen.errors[f"{type(error).__name__}: {str(error).splitlines()[0]}"] += 1
                time.sleep(0.001)  # a client that was refused does not spin
            else:
                seen.seconds.append(time.perf_counter() - start)


def outage(directory: Path) -> list[Figure]:
    """Kill one of two replicas under load, then both."""
    with bench(directory, 1, 2) as b:
        return [*_one_of_two(b), _none_left(b)]


def _one_of_two(b: Bench) -> list[Figure]:
    replicas = b.topology.nodes[1:]
    with _Load(b.router) as load:
        for number in range(KILLS):
            node = replicas[number % len(replicas)]
            time.sleep(CALM)
            node.kill()
            time.sleep(AFTER)
            node.start()
            _await_up(b.router)
    errors, slowest = load.errors, sorted(load.seconds)[-KILLS:]
    failed = sum(errors.values())
    notes = (
        f"{KILLS} times kill -9 under {THREADS} threads; {load.answered} reads were answered",
        *(f"{count} times {error}" for error, count in errors.most_common(3)),
    )
    middle = median(load.seconds) * 1e3
    return [
        Figure("outage: failed reads", failed, 0, (failed, failed), "reads", notes=notes),
        replace(
            figure_of("outage: slowest read", DEADLINE, slowest, "s"),
            value=slowest[-1],
            notes=(f"the median of all is {middle:.2f} ms; quartiles are of the {KILLS} slowest",),
        ),
    ]


def _none_left(b: Bench) -> Figure:
    primary, *replicas = b.topology.nodes
    # the reads that are free whatever the share would hide it at the rate of this one process
    policy = replace(b.router.policy, primary_fallback_share=SHARE, primary_fallback_free=0.0)
    with (
        sqlroute.Router(b.router.topology, policy) as router,
        ExitStack() as stack,
        _Load(router) as load,
    ):
        time.sleep(CALM)
        before = _rate(lambda: load.answered)
        for node in replicas:
            stack.callback(node.start)
            node.kill()
        time.sleep(CALM)
        after = [_rate(lambda: _transactions(primary)) for _ in range(WINDOWS)]
    shares = [rate / before for rate in after]
    notes = (
        f"{before:.0f} reads a second before, of the primary {median(after):.0f} after; "
        f"{sum(load.errors.values())} refused",
        *(f"{count} times {error}" for error, count in load.errors.most_common(2)),
    )
    return figure_of("outage: share of the primary", SHARE, shares, "of 1", notes)


def _rate(count: Callable[[], int]) -> float:
    began, before = time.monotonic(), count()
    time.sleep(WINDOW)
    return (count() - before) / (time.monotonic() - began)


def _transactions(node: LocalNode) -> int:
    """Return how many transactions the server itself has counted; each read is one.

    Its processes tell what they have done once a second at most.
    """
    with psycopg.connect(**node.conninfo, autocommit=True) as connection:
        row = connection.execute(_TRANSACTIONS).fetchone()
    assert row is not None
    return int(row[0])


def _await_up(router: sqlroute.Router) -> None:
    deadline = time.monotonic() + _PATIENCE
    while any(node.state is not State.UP for node in router.health().nodes.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all nodes were up again within {_PATIENCE:g} s")
        time.sleep(0.05)
