"""Lend a connection of a coordinator for one statement, which is checked in its own round trip.

BEGIN, the session's settings, the statement and the check of what it has read are one message
(:class:`sqlroute.runtime.wire.Around`). The connection goes back at once: psycopg's client-side
cursor has all rows by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from sqlalchemy.engine import Connection, Engine

from sqlroute.runtime.limits import Limit, waiting_for
from sqlroute.runtime.settings import set_locally
from sqlroute.runtime.wire import Around

READ_ONLY = "SET TRANSACTION READ ONLY"


@contextmanager
def lent(engine: Engine, around: Around, limit: Limit | None) -> Iterator[Connection]:
    """Lend a connection whose first statement goes out with what is around it."""
    with waiting_for(limit) if limit is not None else nullcontext():
        connection = engine.connect()
    with connection:
        driver: Any = connection.connection.driver_connection
        driver.sqlroute_limit = limit  # the pool takes it off again
        driver.sqlroute_around = around
        try:
            yield connection
        finally:
            driver.sqlroute_around = None


def without(connection: Connection) -> None:
    """Let the next statements of a lent connection go out alone."""
    driver: Any = connection.connection.driver_connection
    driver.sqlroute_around = None


def around(settings: Mapping[str, str], check: str, *, timeout: float, max_rows: int) -> Around:
    """Return what goes with a statement: read-only, the settings and a time limit before it.

    Args:
        timeout: seconds it may take on the server, unless the settings say otherwise.
    """
    bounded = {"statement_timeout": str(max(1, round(timeout * 1000))), **settings}
    return Around((READ_ONLY, set_locally(bounded)), check, max_rows)
