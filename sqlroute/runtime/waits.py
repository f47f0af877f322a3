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

T = TypeVar("T")

LONGEST_PAUSE = 0.2
"""Seconds between two looks of one caller at a shard that has no primary."""

SHORTEST_LOOK = 0.02
"""Seconds that a look at a shard is given at least."""


class Waits:
    """One caller's wait for a primary: the first look at once, further ones with pauses."""

    def __init__(self, patience: float, limit: Limit | None) -> None:
        self._began = time.monotonic()
        self._ends = self._began + patience
        if limit is not None:
            self._ends = min(self._ends, limit.at)
        self._pause = 0.0

    def left(self) -> float:
        return max(self._ends - time.monotonic(), SHORTEST_LOOK)

    def goes_on(self, engines: Engines) -> bool:
        """Pause, and say whether to look once more."""
        pause = self._pause
        if pause:
            if time.monotonic() >= self._ends:
                return False
            sleep(engines, min(pause, self.left()))
        self._pause = min(2 * pause + 0.01, LONGEST_PAUSE)
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
