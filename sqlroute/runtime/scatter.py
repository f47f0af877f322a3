"""Run one function per shard at the same time, and build all objects in the calling thread.

Sync: each function runs in a greenlet of its own. Where it would block on a server (the dialect's
``do_execute``) psycopg hands us the socket that it waits for, and the greenlet gives way; when that
is ready the greenlet goes on. So servers work in parallel, and all of Python is in one thread.
Async: the same functions as tasks, since SQLAlchemy's async cursor gives way by itself.

Internal of psycopg used, checked by ``tests/unit/test_psycopg_internals.py``: a connection waits by
its own ``wait``, which drives a generator of what to wait for.

The first error cancels the others, on the servers too; a deadline bounds the whole. Where the
caller spares an error, it becomes the result of its work instead, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from selectors import BaseSelector, DefaultSelector
from typing import Any

from greenlet import getcurrent, greenlet
from sqlalchemy.exc import StatementError
from sqlalchemy.util import await_only, greenlet_spawn

from sqlroute.errors import DeadlineExceeded

CANCEL_TIMEOUT = 2.0
"""Seconds that a server gets to answer a cancel request before its socket is shut."""

CANCEL_PAUSES = (0.05, 0.1, 0.2, 0.4)
"""Seconds that a server gets to end a call after each request to do so."""

Work = tuple[str, Callable[[], Any]]
"""A name for messages ("s0 (s0-b)") and what to do."""

Spares = Callable[[BaseException], bool]
"""Says if an error of one work, or the deadline, leaves the others their results."""


def none_spared(_: BaseException) -> bool:
    """Let every error end the whole."""
    return False


class Branch(greenlet):
    """The greenlet of one shard.

    Attributes:
        connection: psycopg's connection while a call is under way, to cancel it.
        cancelling: held while the server is asked to, so that no call ends before that: a cancel
            that comes late would hit the next statement of the connection.
        is_abandoned: nobody waits for its result any more.
    """

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        super().__init__(function)
        self.name = name
        self.connection: Any = None
        self.cancelling = threading.Lock()
        self.is_abandoned = False

    def call(self, cursor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Make a blocking call, giving way to the other branches while it waits for the server."""
        if self.is_abandoned:  # it would try again elsewhere
            raise _Abandoned("another shard has failed")
        connection = self.connection = cursor.connection
        connection.wait = self._wait
        try:
            return function(*arguments)
        finally:
            del connection.wait
            with self.cancelling:
                self.connection = None

    def _wait(self, steps: Any, *_: Any, **__: Any) -> Any:
        """Do as psycopg's ``Connection.wait``: drive a generator that yields what to wait for."""
        hub, pgconn = self.parent, self.connection.pgconn
        assert hub is not None
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send(hub.switch(pgconn.socket, wanted))
        except StopIteration as end:
            return end.value


def scatter(works: Sequence[Work], timeout: float, spares: Spares = none_spared) -> list[Any]:
    """Run the works in parallel and return their results in order, a spared error as its own.

    Args:
        works: one per shard.
        timeout: seconds for all of them together.
        spares: which errors do not end the whole.

    Raises:
        DeadlineExceeded: not all were done in time; names those that were not.
        Exception: the first error of a work, after all others have ended.
    """
    with DefaultSelector() as selector:
        hub = _Hub(selector, timeout, spares)
        try:
            for name, function in works:
                hub.start(name, function)
            return hub.run()
        finally:
            hub.end()


class _Hub:
    def __init__(self, selector: BaseSelector, timeout: float, spares: Spares) -> None:
        self._selector = selector
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._spares = spares
        self._branches: list[Branch] = []
        self._results: dict[Branch, Any] = {}
        self._waiting: set[Branch] = set()
        self._error: BaseException | None = None

    def start(self, name: str, function: Callable[[], Any]) -> None:
        branch = Branch(name, function)
        branch.gr_context = copy_context()
        self._branches.append(branch)
        if self._error is None:
            self._resume(branch)

    def run(self) -> list[Any]:
        while self._waiting:
            left = None if self._error else max(0.0, self._deadline - time.monotonic())
            try:
                ready = self._selector.select(left)
            except BaseException as interrupt:  # what is under way must end before we do
                self._fail(interrupt)
                self._error = interrupt  # whatever has ended it before
                continue
            if not ready and self._error is None:
                late = [branch.name for branch in self._branches if branch in self._waiting]
                self._fail(too_late(late, self._timeout))
            for key, events in ready:
                self._selector.unregister(key.fileobj)
                self._waiting.remove(key.data)
                self._resume(key.data, events)
        if self._error is not None and not self._spares(self._error):
            raise self._error
        return [self._results.get(branch, self._error) for branch in self._branches]

    def end(self) -> None:
        """End what still waits: a signal may raise its exception anywhere, also within the hub."""
        while self._waiting:
            branch = self._waiting.pop()
            with contextlib.suppress(Exception):  # no answer
                branch.connection.cancel_safe(timeout=CANCEL_TIMEOUT)
            cut(branch.connection)
            with contextlib.suppress(BaseException):  # the one that ended all of it goes on
                branch.throw(_Abandoned("the statement was interrupted"))

    def _resume(self, branch: Branch, *events: int) -> None:
        """Let a branch run until it waits for its server again, or to its end."""
        try:
            found = branch.switch(*events)
        except BaseException as error:  # raised by run() when all have ended
            locate(error, branch.name)
            if self._error is None and self._spares(error):
                self._results[branch] = error
            else:
                self._fail(error)
            return
        if branch.dead:
            self._results[branch] = found
        else:
            descriptor, wanted = found
            self._selector.register(descriptor, wanted, branch)
            self._waiting.add(branch)

    def _fail(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        for branch in self._waiting:
            branch.is_abandoned = True
            threading.Thread(target=_cancel, args=(branch,), daemon=True).start()


def is_abandoned() -> bool:
    """Say if nobody waits for what runs here any more, so that it need not try again."""
    branch = getcurrent()
    return isinstance(branch, Branch) and branch.is_abandoned


class _Abandoned(Exception):
    """Thrown into a branch whose result nobody waits for any more."""


def locate(error: BaseException, name: str) -> None:
    """Have an error say where it comes from; SQLAlchemy's own in its text."""
    where = f"on {name}"
    if isinstance(error, StatementError):
        if where not in error.detail:
            error.add_detail(where)
    elif where not in getattr(error, "__notes__", ()):
        error.add_note(where)


def too_late(names: Sequence[str], timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no answer within {timeout:g} s from {', '.join(names)}; raise scatter_timeout, or the "
        "session's deadline, or restrict the statement"
    )


def _cancel(branch: Branch) -> None:
    """Cancel a branch's call on the server; a server that does not answer loses the socket.

    Asked more than once: a cancel that overtakes its query is lost. And only while the call lasts:
    later the connection serves somebody else.
    """
    connection = branch.connection
    with contextlib.suppress(Exception):  # no answer
        for pause in CANCEL_PAUSES:
            with branch.cancelling:
                if branch.connection is not connection:
                    return
                connection.cancel_safe(timeout=CANCEL_TIMEOUT)
            time.sleep(pause)
    with branch.cancelling:
        if connection is not None and branch.connection is connection:
            cut(connection)


def cut(connection: Any) -> None:
    """Shut a psycopg connection's socket, so that whoever waits on it gets an error now."""
    with contextlib.suppress(OSError, Exception):
        connection.sqlroute_cut = True
        duplicate = socket.socket(fileno=os.dup(connection.pgconn.socket))
        try:
            duplicate.shutdown(socket.SHUT_RDWR)
        finally:
            duplicate.close()


def is_useless(connection: Any) -> bool:
    """Say if a psycopg connection is closed, or was cut, which it notices at its next use only."""
    return connection is not None and (
        connection.closed or getattr(connection, "sqlroute_cut", False)
    )


def scatter_async(works: Sequence[Work], timeout: float, spares: Spares = none_spared) -> list[Any]:
    """Do the same under AsyncSession: called in its greenlet, it awaits one task per work.

    Raises: as :func:`scatter`.
    """
    result: list[Any] = await_only(_gather(works, timeout, spares))
    return result


async def _gather(works: Sequence[Work], timeout: float, spares: Spares) -> list[Any]:
    import asyncio

    tasks = [asyncio.create_task(greenlet_spawn(function), name=name) for name, function in works]
    try:
        until = time.monotonic() + timeout
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(
                pending,
                timeout=max(0.0, until - time.monotonic()),
                return_when=asyncio.FIRST_EXCEPTION,
            )
            for task in done:
                error = task.exception()
                if error is not None:
                    locate(error, task.get_name())
                    if not spares(error):
                        raise error
            if not done:
                break
        late = too_late([task.get_name() for task in tasks if task in pending], timeout)
        if pending and not spares(late):
            raise late
        return [late if task in pending else task.exception() or task.result() for task in tasks]
    finally:
        await _abandon([task for task in tasks if not task.done()])
        for task in tasks:
            if not task.cancelled():
                task.exception()  # asked for, or asyncio logs that nobody did


async def _abandon(tasks: list[Any]) -> None:
    """Cancel tasks until they end.

    On the first cancellation psycopg asks the server to cancel and waits for it; a hung server
    never answers, and only a second one makes psycopg give up.
    """
    import asyncio

    patience = CANCEL_TIMEOUT
    while tasks:
        for task in tasks:
            task.cancel()
        _, pending = await asyncio.wait(tasks, timeout=patience)
        tasks, patience = list(pending), CANCEL_TIMEOUT / 8
