"""The write transactions of this program: which are under way, which wait, what was acknowledged.

During a switchover an operation holds a shard (:class:`sqlroute.health.Hold`): no new write
transaction is to begin, and those under way are to end. Each one registers *before* it looks for a
hold, and the monitor publishes a hold *before* it looks who is registered; so whatever the moment,
either the transaction sees the hold or the monitor sees the transaction. What this process has to
tell the servers of it is the name of the monitor's connections::

    sqlroute monitor[ seen=<timeline>/<LSN>][ held=<operation>]

``seen``: the newest position that a commit of this process was acknowledged with on the shard.
``held``: no write transaction is under way here and none begins, because of that operation.

A name has room for 63 bytes. This one fits whatever the position is, as long as the operation's id
has 12 letters and the shard has seen fewer than a million promotions.

Who waits does so in its thread, or task; nobody looks again and again.

The garbage collector ends transactions, too, and unwinds tasks that wait. It runs at any moment in
any thread, so nothing that it may call takes a lock: sets and dicts are changed in single steps.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import wait as wait_for_all
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

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

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)

_numbers = itertools.count(1)
_NOTHING = (0, 0)


class News(Enum):
    """What somebody may wait for in a shard."""

    HELD = "held"
    RELEASED = "released"
    PRIMARY = "primary"


class Ticket:
    """One session's transaction on the shards it may write to."""

    __slots__ = ("_number", "_writes", "shards")

    def __init__(self, writes: Writes) -> None:
        self._writes = writes
        self._number = next(_numbers)
        self.shards: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Ticket({', '.join(self.shards)})"

    def enter(self, shard: str) -> Hold | None:
        """Register on a shard, unless a hold is in the way, which is returned."""
        writes = self._writes
        hold = writes.hold_for(self, shard)
        if hold is not None:
            return hold
        # one step for the interpreter: threads meet here
        writes.under_way[shard].add(self._number)
        self.shards += (shard,)
        hold = writes.hold_for(self, shard)  # which may have begun before that was to be seen
        if hold is not None:
            self.leave(shard)
        return hold

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
        self._waiting: dict[tuple[News, str], set[Future[None]]] = _Sets()
        self._woken: deque[Future[None]] = deque()
        self._most_waiting: dict[str, int] = {}
        self.under_way.clear()

    def ticket(self) -> Ticket:
        """Return what one transaction registers itself with."""
        return Ticket(self)

    def hold(self, shard: str) -> Hold | None:
        """Return the hold that is on now."""
        known = self._monitor().last_health.shards.get(shard)
        hold = known.hold if known is not None else None
        return hold if hold is not None and time.monotonic() < hold.ends_at else None

    def hold_for(self, ticket: Ticket, shard: str) -> Hold | None:
        """Return the hold that a transaction has to wait for before it writes on one more shard.

        One that is under way on a shard that is held itself waits for nothing: that operation
        waits for it. Else two operations, and two transactions over both shards, would wait for
        each other in a ring. No others begin on those shards, so they are soon few.
        """
        hold = self.hold(shard)
        if hold is None:
            return None
        others = (other for other in ticket.shards if other != shard)
        return None if any(self.hold(other) is not None for other in others) else hold

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
        self,
        ticket: Ticket,
        shard: str,
        hold: Hold,
        engines: Engines,
        limit: Limit | None,
        most: int,
    ) -> None:
        """Wait until a hold is over, or another one has begun, or a transaction need not wait.

        Raises:
            NoPrimary: too many wait already.
            DeadlineExceeded: the session's deadline is before the end.
        """

        def in_the_way() -> Hold | None:
            now = self.hold_for(ticket, shard)
            return now if now is not None and now.operation == hold.operation else None

        wanted = [(News.RELEASED, shard), *((News.HELD, other) for other in ticket.shards)]
        self.check_room(shard, hold, most)
        while (now := in_the_way()) is not None:
            if limit is not None and limit.left() <= 0:
                raise DeadlineExceeded(
                    f"operation {hold.operation} holds the write transactions of shard {shard} "
                    "beyond the session's deadline; nothing was sent; try again or give it longer"
                )
            until = now.ends_at if limit is None else min(now.ends_at, limit.at)
            self._wait(wanted, lambda: in_the_way() is None, engines, until)

    def await_primary(
        self, shard: str, but_not: str | None, engines: Engines, until: float
    ) -> None:
        """Wait until a shard has a primary, or another one than that of no use, for a while."""

        def is_there() -> bool:
            return self._monitor().last_health.shard(shard).primary not in (None, but_not)

        self._wait([(News.PRIMARY, shard)], is_there, engines, until)

    def check_room(self, shard: str, hold: Hold, most: int) -> None:
        """Refuse who would be one too many of those that wait for a held shard.

        Raises:
            NoPrimary: so many wait already.
        """
        waiting = (self._waiting[kind, shard] for kind in (News.RELEASED, News.PRIMARY))
        count = 1 + sum(map(len, waiting))
        if count > most:
            raise NoPrimary(
                f"operation {hold.operation} holds the write transactions of shard {shard}, and "
                f"{most} wait already (max_held); nothing was sent; try again later or raise "
                "max_held",
                shard,
            )
        self._most_waiting[shard] = max(count, self._most_waiting.get(shard, 0))

    def take_waited(self, shard: str) -> int:
        """Return how many have waited at once for a held shard, at most, since the last call."""
        return self._most_waiting.pop(shard, 0)

    def changed(self, old: ShardHealth, new: ShardHealth) -> None:
        """Wake who waits for what has become of a shard. From the monitor's thread."""
        was, now = (shard.hold.operation if shard.hold else None for shard in (old, new))
        if was != now:
            self._wake(News.RELEASED if was is not None else News.HELD, new.name)
        if new.primary is not None and old.primary != new.primary:
            self._wake(News.PRIMARY, new.name)

    def wake(self) -> None:
        """Wake some of those that may go on.

        Also called now and then: who should have woken them may be gone, with its event loop.
        """
        for _ in range(RAMP):
            self._wake_one()

    def _wake(self, kind: News, shard: str) -> None:
        # what joins the set after this has not looked yet, and sees what there is
        self._woken.extend(tuple(self._waiting.pop((kind, shard), ())))
        self.wake()

    def _wake_one(self) -> None:
        while self._woken:
            with suppress(IndexError, InvalidStateError):  # another thread's; one that has gone
                self._woken.popleft().set_result(None)
                return

    def _wait(
        self,
        wanted: list[tuple[News, str]],
        is_over: Callable[[], bool],
        engines: Engines,
        until: float,
    ) -> None:
        """Wait for news; those that come between a look and this are not missed."""
        news: Future[None] = Future()
        for kind in wanted:
            self._waiting[kind].add(news)
        try:
            timeout = until - time.monotonic()
            if timeout > 0 and not is_over():
                _sleep_until(news, engines, timeout)
        finally:
            for kind in wanted:
                self._waiting[kind].discard(news)
            if news.cancel() is False:  # it was woken, and wakes the next one: see RAMP
                self._wake_one()


def has_ended(connection: Connection) -> bool:
    """Say if a connection on which nothing is under way was ended by its server.

    What a server says on its own lies in the socket: looking takes no round trip.
    """
    from psycopg import OperationalError

    pgconn = connection.connection.driver_connection.pgconn  # type: ignore[union-attr]
    try:
        pgconn.consume_input()  # reads the server's last words...
        pgconn.consume_input()  # ...and then the end
    except OperationalError:
        return True
    return False


class _Sets(dict[K, set[V]]):
    """Sets that are made where one is asked for; ``setdefault`` makes one set, whoever is first."""

    def __missing__(self, key: K) -> set[V]:
        return self.setdefault(key, set())


def _sleep_until(news: Future[None], engines: Engines, timeout: float) -> None:
    """Wait in this thread, or in this task alone under AsyncSession."""
    if engines.is_async and in_greenlet():
        import asyncio

        await_only(asyncio.wait({asyncio.wrap_future(news)}, timeout=timeout))
    else:
        wait_for_all((news,), timeout)
