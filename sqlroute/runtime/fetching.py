"""Bound the fetches of a stream: its statement has been answered, but each batch is asked for anew.

SQLAlchemy asks the driver's cursor for them, past the dialect, so the cursor is the place for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent

from sqlroute.errors import DeadlineExceeded
from sqlroute.runtime.limits import Limit, limited
from sqlroute.runtime.scatter import Branch, too_late
from sqlroute.runtime.wire import driver_of


class TimedCursor:
    """A server-side cursor whose fetches are cut when they take too long.

    Args:
        cursor: the driver's, or SQLAlchemy's async one.
        name: of shard and node, for messages.
        seconds: that the next fetch may take; ``None`` for any.
    """

    def __init__(self, cursor: Any, name: str, seconds: Callable[[], float | None]) -> None:
        self._cursor, self._name, self._seconds = cursor, name, seconds
        self._driver = driver_of(cursor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def fetchone(self) -> Any:
        return self._fetch(self._cursor.fetchone)

    def fetchmany(self, *size: int) -> Any:
        return self._fetch(self._cursor.fetchmany, *size)

    def fetchall(self) -> Any:
        return self._fetch(self._cursor.fetchall)

    def _fetch(self, fetch: Callable[..., Any], *arguments: Any) -> Any:
        if isinstance(branch := getcurrent(), Branch):  # several shards at once, by one deadline
            return branch.call(self._cursor, fetch, *arguments)
        seconds = self._seconds()
        if seconds is None:
            return fetch(*arguments)
        try:
            limit = Limit(time.monotonic() + seconds)
            return limited(self._driver, limit, fetch, *arguments)
        except DeadlineExceeded as error:
            raise too_late([self._name], seconds) from error
