"""The moment until which a session may wait, kept on this side whatever the servers do.

A server under SIGSTOP, or behind a cut cable, keeps its connections open and never answers; no
time-out of its own can help. So one thread watches the calls that have a deadline and shuts the
socket of one that outlives it (:class:`Watch`); whoever waits there gets an error at once, sync and
async alike. Waiting for the pool, and for a new connection, is bounded too.

A :class:`Limit` belongs to a session. Drivers' connections carry that of the session that has them;
what runs below SQLAlchemy's pool, where no argument reaches, finds it in :data:`waiting`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from sqlroute.errors import DeadlineExceeded, UnknownName
from sqlroute.runtime.scatter import cut

T = TypeVar("T")

CANCEL_TIMEOUT = 1.0
"""Seconds a server gets to answer a request to cancel what nobody waits for any more."""


class Limit:
    """Until when a session may wait, in monotonic seconds."""

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at = at

    def __repr__(self) -> str:
        return f"Limit({self.left():.3f} s left)"

    @classmethod
    def after(cls, seconds: float, within: Limit | None = None) -> Limit:
        """Return a limit some seconds from now, and not later than another one.

        Raises:
            UnknownName: not a number of seconds above 0.
        """
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 < seconds < math.inf:
            raise UnknownName(f"deadline={seconds!r}; it is a number of seconds above 0")
        at = time.monotonic() + seconds
        return cls(at if within is None else min(at, within.at))

    def left(self) -> float:
        return self.at - time.monotonic()

    def check(self, what: str) -> None:
        """Refuse to begin what nobody would wait for.

        Raises:
            DeadlineExceeded: it is over.
        """
        if self.left() <= 0:
            raise DeadlineExceeded(f"the session's deadline is over; {what} was not begun")


waiting: ContextVar[Limit | None] = ContextVar("sqlroute.waiting", default=None)
"""The limit of whoever waits for a connection now. An argument, in effect: never a state."""


@contextlib.contextmanager
def waiting_for(limit: Limit) -> Iterator[None]:
    """Let whatever waits below know the limit."""
    token = waiting.set(limit)
    try:
        yield
    finally:
        waiting.reset(token)


class Watch:
    """One thread that shuts the sockets of calls that outlive their limit."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._calls: list[tuple[float, int, _Call]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def begin(self, driver: Any, at: float) -> _Call:
        """Watch a call on a driver's connection until :meth:`_Call.end`."""
        call = _Call(driver)
        with self._news:
            heapq.heappush(self._calls, (at, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="sqlroute deadlines", daemon=True
                )
                self._thread.start()
            elif self._calls[0][2] is call:
                self._news.notify()
        return call

    def _run(self) -> None:
        while True:
            with self._news:
                while self._calls and self._calls[0][2].is_over:
                    heapq.heappop(self._calls)
                if not self._calls:
                    if not self._news.wait(timeout=60.0) and not self._calls:
                        self._thread = None  # nobody has needed it for a while
                        return
                    continue
                at, _, call = self._calls[0]
                left = at - time.monotonic()
                if left > 0:
                    self._news.wait(left)
                    continue
                heapq.heappop(self._calls)
            call.expire()


class _Call:
    """One call under way; its end and its expiry exclude each other."""

    __slots__ = ("_driver", "_lock", "has_expired", "is_over")

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self.is_over = False
        self.has_expired = False

    def end(self) -> bool:
        """Note that the call is over; say whether it was cut."""
        with self._lock:
            self.is_over = True
            return self.has_expired

    def expire(self) -> None:
        """Cut the call, unless it is over: then the connection may serve somebody else."""
        with self._lock:
            if self.is_over:
                return
            self.is_over = self.has_expired = True
            cancel = _canceller(self._driver)
            cut(self._driver)
        if cancel is not None:  # the server would go on with it for nobody
            threading.Thread(target=_cancel, args=(cancel,), daemon=True).start()


def _canceller(driver: Any) -> Any:
    with contextlib.suppress(Exception):
        return driver.pgconn.cancel_conn()
    return None


def _cancel(request: Any) -> None:
    """Ask the server to cancel, by a connection of its own."""
    from psycopg.generators import cancel
    from psycopg.waiting import wait_conn

    with contextlib.suppress(Exception):
        request.start()
        wait_conn(cancel(request), interval=0.1, timeout=CANCEL_TIMEOUT)
    with contextlib.suppress(Exception):
        request.finish()


watch = Watch()


def limited(driver: Any, limit: Limit, function: Callable[..., T], *arguments: Any) -> T:
    """Call what waits for a server's answer, until the limit at most.

    Raises:
        DeadlineExceeded: it was cut; what was sent may or may not have been done.
    """
    info = driver.pgconn
    limit.check(f"a statement on {_address(info)}")
    call = watch.begin(driver, limit.at)
    try:
        found = function(*arguments)
    except BaseException as error:
        if call.end() and isinstance(error, Exception):
            raise DeadlineExceeded(
                f"no answer from {_address(info)} within the session's deadline; the connection "
                "was cut"
            ) from error
        raise
    if call.end():
        driver.pgconn.finish()  # it was answered at the very last moment, on a socket that is shut
    return found


class Connecting:
    """Connections that are being opened to one node. Where it turns out to hang, they are given up.

    Opening one cannot be cut as a call on an open one can: looking up a name has no socket. So it
    happens in a thread, or task, that is left behind.
    """

    def __init__(self) -> None:
        self._under_way: set[Callable[[], object]] = set()

    def give_up(self) -> int:
        """Have all who wait get an error now; return how many there were."""
        waiting = list(self._under_way)
        for abort in waiting:
            abort()
        return len(waiting)

    def connect(self, limit: Limit | None, connect: Callable[[], T]) -> T:
        """Connect, for as long as the limit allows and the node is not given up.

        Raises:
            DeadlineExceeded: it took longer than the limit.
            OperationalError: psycopg's, also where it was given up.
        """
        if limit is not None:
            limit.check("a connection")
        found: Future[T] = Future()

        def run() -> None:
            try:
                result = connect()
            except BaseException as error:
                with contextlib.suppress(InvalidStateError):
                    found.set_exception(error)
                return
            try:
                found.set_result(result)
            except InvalidStateError:  # nobody waits for it any more
                cast(Any, result).close()

        def abort() -> None:
            with contextlib.suppress(InvalidStateError):
                found.set_exception(_given_up())

        self._under_way.add(abort)
        try:
            threading.Thread(target=run, name="sqlroute connect", daemon=True).start()
            return found.result(None if limit is None else max(limit.left(), 0))
        except TimeoutError as error:
            with contextlib.suppress(InvalidStateError):
                found.set_exception(_given_up())
                raise DeadlineExceeded("no connection within the session's deadline") from error
            return found.result()  # it came at the very last moment
        finally:
            self._under_way.discard(abort)

    async def connect_async(self, limit: Limit | None, connect: Callable[[], Any]) -> Any:
        """Do the same in an event loop.

        Raises: as :meth:`connect`.
        """
        import asyncio

        if limit is not None:
            limit.check("a connection")
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(connect())
        is_given_up = False

        def give_up() -> None:
            nonlocal is_given_up
            is_given_up = True
            task.cancel()

        def abort() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(give_up)

        self._under_way.add(abort)
        try:
            await asyncio.wait({task}, timeout=None if limit is None else max(limit.left(), 0))
            if not task.done():
                raise DeadlineExceeded("no connection within the session's deadline")
            if is_given_up and task.cancelled():
                raise _given_up()
            return task.result()
        finally:
            self._under_way.discard(abort)
            if not task.done():
                task.cancel()


def _given_up() -> Exception:
    from psycopg import OperationalError

    return OperationalError("the node does not answer: connecting was given up")


def _address(pgconn: Any) -> str:
    try:
        return f"{pgconn.host.decode()}:{pgconn.port.decode()}"
    except Exception:  # closed meanwhile
        return "the server"
