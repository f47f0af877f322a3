"""How to wait, in a thread or in a task: for a while, for a shard's answer, for a primary.

Under AsyncSession nothing here holds a thread while it waits, so that a thousand requests may wait
for one primary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from sqlroute.runtime.engines import Engines
from sqlroute.runtime.limits import Limit
from sqlroute.runtime.writes import Writes

T = TypeVar("T")

LONGEST_PAUSE = 0.2
"""Seconds between two looks of one caller at a shard that has no primary."""

SHORTEST_LOOK = 0.02
"""Seconds that a look at a shard is given at least."""


class Waits:
    """One caller's wait for a primary: the first look at once, further ones with pauses.

    Args:
        patience: seconds to wait; while the shard is held, from the end of that.
        most: callers that may wait for a held shard.
    """

    def __init__(
        self, writes: Writes, shard: str, patience: float, limit: Limit | None, most: int
    ) -> None:
        self._writes, self._shard, self._most = writes, shard, most
        self._patience = patience
        self._limit = limit
        self._until = time.monotonic() + patience
        self._pause = 0.0
        self._is_queued = False

    @property
    def _ends(self) -> float:
        hold = self._writes.hold(self._shard)
        if hold is not None:
            self._until = max(self._until, hold.ends_at + self._patience)
        return self._until if self._limit is None else min(self._until, self._limit.at)

    def left(self) -> float:
        return max(self._ends - time.monotonic(), SHORTEST_LOOK)

    def goes_on(self, engines: Engines, but_not: str | None) -> bool:
        """Wait for a primary, or a pause, and say whether to look once more.

        While the shard is held there are no pauses: its nodes are asked all the time anyway.

        Args:
            but_not: the primary that was known, and of no use.

        Raises:
            NoPrimary: the shard is held, and too many wait for it.
        """
        if self._pause:
            now, ends = time.monotonic(), self._ends
            if now >= ends:
                return False
            hold = self._writes.hold(self._shard)
            if hold is not None and not self._is_queued:
                self._writes.check_room(self._shard, hold, self._most)
                self._is_queued = True
            until = now + self._pause if hold is None else hold.ends_at
            self._writes.await_primary(self._shard, but_not, engines, min(until, ends))
        self._pause = min(2 * self._pause + 0.01, LONGEST_PAUSE)
        return True


async def answered(asked: Future[None], timeout: float) -> None:
    """Wait for an answer that others wait for, too: it must not be cancelled with one of them."""
    import asyncio

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(asked)), timeout)


def sleep(engines: Engines, seconds: float) -> None:
    """Let time pass: of this thread, or of this task alone under AsyncSession."""

    if engines.is_async and in_greenlet():
        import asyncio

        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def blocking(engines: Engines, function: Callable[..., T], *arguments: Any) -> T:
    """Call what blocks: here in a sync program, in a thread under AsyncSession.

    Where an async program calls a plain method, such as ``AsyncSession.get_bind``, it is called
    here, too: at most once per process, for the first look at the servers.
    """

    if not engines.is_async or not in_greenlet():
        return function(*arguments)
    import asyncio

    found: T = await_only(asyncio.to_thread(function, *arguments))
    return found
