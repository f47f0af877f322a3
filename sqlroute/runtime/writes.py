"""The write transactions of this program: which are under way, which wait, what was acknowledged.

During a switchover an operation holds a shard (:class:`sqlroute.health.Hold`): no new write
transaction is to begin, and those under way are to end. Each one registers *before* it looks for a
hold, and the monitor publishes a hold *before* it looks who is registered; so whatever the moment,
either the transaction sees the hold or the monitor sees the transaction. What this process has to
tell the servers of it is the name of the monitor's connections::

    sqlroute monitor[ seen=<timeline>/<LSN>][ held=<operation>]

``seen``: the newest position that a commit of this process was acknowledged with on the shard.
``held``: no write transaction is under way here and none begins, because of that operation.

Who waits does so in its thread, or task; nobody looks again and again.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for_all
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sqlroute.errors import DeadlineExceeded, NoPrimary
from sqlroute.health import Hold, ShardHealth
from sqlroute.runtime.engines import Engines
from sqlroute.runtime.limits import Limit
from sqlroute.runtime.probe import APPLICATION_NAME

if TYPE_CHECKING:
    from sqlroute.runtime.monitor import Monitor

RAMP = 16
"""How many go on at once when a wait is over; each of them wakes one more. A thousand at once would
meet a server, and an interpreter, that can serve a few at a time, and the first of them would come
last."""

_numbers = itertools.count(1)
_NOTHING = (0, 0)


class Ticket:
    """One session's transaction on the shards it may write to."""

    __slots__ = ("_number", "_writes", "shards")

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._number = next(_numbers)
        self.shards: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Ticket({', '.join(self.shards)})"

    def enter(self, shard: str) -> None:
        """Register, before looking if the shard is held."""
        # one step for the interpreter: threads meet here
        self._writes.under_way[shard].add(self._number)
        self.shards += (shard,)

    def leave(self, shard: str) -> None:
        self.shards = tuple(entered for entered in self.shards if entered != shard)
        self._writes.ended(shard, self._number)

    def end(self) -> None:
        """The transaction is over."""
        shards, self.shards = self.shards, ()
        for shard in shards:
            self._writes.ended(shard, self._number)

    def __del__(self) -> None:
        """A session that nobody has closed is garbage: its connections are rolled back, too."""
        self.end()


class Writes:
    """All write transactions of a router.

    Args:
        monitor: returns the monitor: it knows the health, and tells the servers what there is.

    Attributes:
        under_way: the registered transactions of each shard, by their numbers.
    """

    def __init__(self, monitor: Callable[[], Monitor]) -> None:
        self._monitor = monitor
        self.under_way: dict[str, set[int]] = _Sets()
        self._seen: dict[str, tuple[int, int]] = {}
        self.forget()

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(found)} on {shard}" for shard, found in self.under_way.items())
        return f"<Writes {counts or 'none'} under way>"

    def forget(self) -> None:
        """Start anew, in a child after a fork: its parent's transactions are not its own."""
        self._lock = threading.Lock()
        self._for_release: dict[str, set[Future[None]]] = {}
        self._for_primary: dict[str, set[Future[None]]] = {}
        self._woken: deque[Future[None]] = deque()
        self._waiting: dict[str, int] = {}
        self._waited: dict[str, int] = {}
        self.under_way.clear()

    def ticket(self) -> Ticket:
        """Return what one transaction registers itself with."""
        return Ticket(self)

    def hold(self, shard: str) -> Hold | None:
        """Return the hold that is on now."""
        known = self._monitor().health.shards.get(shard)
        hold = known.hold if known is not None else None
        return hold if hold is not None and time.monotonic() < hold.ends_at else None

    def ended(self, shard: str, number: int) -> None:
        """Note the end of a transaction. Also called by the garbage collector: takes no lock."""
        found = self.under_way[shard]
        found.discard(number)
        if not found and self.hold(shard) is not None:
            self._monitor().tell(shard)

    # what was acknowledged

    def acknowledged(self, shard: str, timeline: int, lsn: int) -> None:
        """Note a position that a commit was acknowledged with."""
        with self._lock:
            if (timeline, lsn) > self._seen.get(shard, _NOTHING):
                self._seen[shard] = timeline, lsn

    def name_of(self, shard: str) -> str:
        """Return what the monitor's connections to a shard's nodes are called now."""
        name = APPLICATION_NAME
        seen = self._seen.get(shard)
        if seen is not None:
            name += f" seen={seen[0]}/{seen[1]:X}"
        hold = self.hold(shard)  # first: who registers after this sees it, too
        if hold is not None and not self.under_way[shard]:
            name += f" held={hold.operation}"
        return name

    # those that wait

    def await_release(
        self, shard: str, hold: Hold, engines: Engines, limit: Limit | None, most: int
    ) -> None:
        """Wait until a hold is over, or another one has begun.

        Raises:
            NoPrimary: too many wait already.
            DeadlineExceeded: the session's deadline is before the end.
        """

        def is_over() -> bool:
            now = self.hold(shard)
            return now is None or now.operation != hold.operation

        with self._queued(shard, hold, most):
            while (now := self.hold(shard)) is not None and now.operation == hold.operation:
                until = now.ends_at if limit is None else min(now.ends_at, limit.at)
                self._wait(self._for_release, shard, is_over, engines, until)
                if limit is not None and limit.left() <= 0 and not is_over():
                    raise DeadlineExceeded(
                        f"operation {hold.operation} holds the write transactions of shard "
                        f"{shard} beyond the session's deadline; nothing was sent; try again or "
                        "give it longer"
                    )

    def await_primary(self, shard: str, engines: Engines, timeout: float, most: int) -> None:
        """Wait until a shard has a primary, for a while.

        Raises:
            NoPrimary: it is held, and too many wait already.
        """

        def is_there() -> bool:
            return self._monitor().health.shard(shard).primary is not None

        hold = self.hold(shard)
        until = time.monotonic() + timeout
        if hold is None:
            self._wait(self._for_primary, shard, is_there, engines, until)
            return
        with self._queued(shard, hold, most):
            self._wait(self._for_primary, shard, is_there, engines, until)

    @contextmanager
    def _queued(self, shard: str, hold: Hold, most: int) -> Iterator[None]:
        """Count who waits under a hold; refuse who would be one too many."""
        with self._lock:
            count = self._waiting.get(shard, 0)
            if count < most:
                self._waiting[shard] = count + 1
                self._waited[shard] = self._waited.get(shard, 0) + 1
        if count >= most:
            raise NoPrimary(
                f"operation {hold.operation} holds the write transactions of shard {shard}, and "
                f"{most} wait already (max_held); nothing was sent; try again later or raise "
                "max_held",
                shard,
            )
        try:
            yield
        finally:
            with self._lock:
                self._waiting[shard] -= 1

    def take_waited(self, shard: str) -> int:
        """Return how many have waited for a held shard since the last call."""
        with self._lock:
            return self._waited.pop(shard, 0)

    def changed(self, old: ShardHealth, new: ShardHealth) -> None:
        """Wake who waits for what has become of a shard. From the monitor's thread."""
        if old.hold is not None and (new.hold is None or new.hold.operation != old.hold.operation):
            self._wake(self._for_release, new.name)
        if new.primary is not None and old.primary != new.primary:
            self._wake(self._for_primary, new.name)

    def _wake(self, waiting: dict[str, set[Future[None]]], shard: str) -> None:
        with self._lock:
            self._woken.extend(waiting.pop(shard, ()))
        for _ in range(RAMP):
            self._wake_one()

    def _wake_one(self) -> None:
        while self._woken:
            with suppress(IndexError, InvalidStateError):  # another thread's; one that has gone
                self._woken.popleft().set_result(None)
                return

    def _wait(
        self,
        waiting: dict[str, set[Future[None]]],
        shard: str,
        is_over: Callable[[], bool],
        engines: Engines,
        until: float,
    ) -> None:
        """Wait for news of a shard; those that come between a look and this are not missed."""
        news: Future[None] = Future()
        with self._lock:
            waiting.setdefault(shard, set()).add(news)
        try:
            timeout = until - time.monotonic()
            if timeout > 0 and not is_over():
                _sleep_until(news, engines, timeout)
        finally:
            with self._lock:
                waiting.get(shard, set()).discard(news)
            if news.cancel() is False:  # it was woken, and wakes the next one: see RAMP
                self._wake_one()


def has_ended(connection: Connection) -> bool:
    """Say if a connection on which nothing is under way was ended by its server.

    What a server says on its own lies in the socket: looking takes no round trip.
    """
    from psycopg import OperationalError

    driver: Any = connection.connection.driver_connection
    try:
        driver.pgconn.consume_input()
    except OperationalError:
        return True
    return False


class _Sets(dict[str, set[int]]):
    """Sets that are made where one is asked for; ``setdefault`` makes one set, whoever is first."""

    def __missing__(self, shard: str) -> set[int]:
        return self.setdefault(shard, set())


def _sleep_until(news: Future[None], engines: Engines, timeout: float) -> None:
    """Wait in this thread, or in this task alone under AsyncSession."""
    if engines.is_async and in_greenlet():
        import asyncio

        await_only(asyncio.wait({asyncio.wrap_future(news)}, timeout=timeout))
    else:
        wait_for_all((news,), timeout)
