"""SQLAlchemy's pools, which know who holds their connections and how long somebody may wait."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from sqlalchemy import exc
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, QueuePool

from sqlroute.errors import PoolExhausted
from sqlroute.runtime.limits import waiting
from sqlroute.runtime.scatter import is_useless

SHOWN = 5
"""How many holders an error names, those that hold longest."""


class LimitedPool(QueuePool):
    """A pool of one node; its logging name is the node's."""

    is_retired = False
    """Its node has left the topology: what comes back is closed."""

    _patience: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._lent: dict[Any, tuple[Any, float]] = {}
        super().__init__(*arguments, **options)

    @property
    def _timeout(self) -> float:
        limit = waiting.get()
        return self._patience if limit is None else min(self._patience, max(limit.left(), 0.0))

    @_timeout.setter
    def _timeout(self, seconds: float) -> None:
        self._patience = seconds

    def fit(self, kept: int, most: int) -> None:
        """Keep at most so many connections open, and open at most so many; -1 for any number.

        From any thread. Those that are too many are closed when they come back.
        """
        kept, queue = max(kept, 1), self._pool  # 0 would be any number
        overflow = -1 if most < 0 else max(most - kept, 0)
        if (kept, overflow) == (queue.maxsize, self._max_overflow):
            return
        with self._overflow_lock:
            self._overflow += queue.maxsize - kept  # it counts from the connections kept
            self._max_overflow = overflow
            for bounded in (queue, queue.__dict__.get("_queue")):  # asyncio's has its own bound
                for name in ("maxsize", "_maxsize"):
                    if bounded is not None and name in bounded.__dict__:
                        setattr(bounded, name, kept)

    def _do_get(self) -> ConnectionPoolEntry:
        began = time.monotonic()
        try:
            found = super()._do_get()
        except PoolExhausted:  # it calls itself where a connection came back meanwhile
            raise
        except exc.TimeoutError as error:
            raise PoolExhausted(self._who(time.monotonic() - began)) from error
        who = _task() if self._is_asyncio else threading.get_ident()
        self._lent[found] = who, time.monotonic()
        return found

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._lent.pop(record, None)
        if self.is_retired:
            record.close()
            self._dec_overflow()
            return
        if is_useless(record.driver_connection):
            record.close()  # the next who gets it opens it anew
        super()._do_return_conn(record)

    def _who(self, waited: float) -> str:
        """Say who holds the connections: threads or tasks, those first that hold them longest."""
        now = time.monotonic()
        held = sorted(self._lent.copy().values(), key=lambda holder: holder[1])
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        shown = [f"{_name(who, names)} for {now - since:.1f} s" for who, since in held[:SHOWN]]
        more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
        return (
            f"no connection to {self.logging_name} within {waited:.1f} s: all {len(held)} "
            f"(pool_size {self.size()}, max_overflow {self._max_overflow}) are held, by "
            f"{', '.join(shown) or 'nobody any more'}{more}; close sessions sooner, or raise "
            "pool_size"
        )


class LimitedAsyncPool(LimitedPool, AsyncAdaptedQueuePool):
    """The same for async engines."""


def _task() -> Any:
    task = asyncio.current_task()
    return threading.get_ident() if task is None else task


def _name(who: Any, threads: dict[int | None, str]) -> str:
    if isinstance(who, asyncio.Task):
        return f"task {who.get_name()}"
    return f"thread {threads.get(who, f'{who}, which has ended')}"
