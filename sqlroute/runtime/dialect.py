"""SQLAlchemy's psycopg dialect with three doors opened: execute, commit and roll back.

*Execute*: inside a scatter the call is handed to a thread, so that several shards work at once
(:mod:`sqlroute.runtime.scatter`). *Commit*: one simple query commits and brings the LSN back in
the same round trip; commits of several shards become one (:mod:`sqlroute.runtime.commit`). Doing
it here, not in a commit event, keeps SQLAlchemy's wrapping of errors, in sync and async alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from greenlet import getcurrent
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import await_only, memoized_property

from sqlroute.errors import DeadlineExceeded
from sqlroute.runtime.commit import CommitGroup, group_of, is_lost
from sqlroute.runtime.limits import Connecting, Limit, limited, waiting
from sqlroute.runtime.scatter import Branch
from sqlroute.runtime.settings import UNSETTLED
from sqlroute.runtime.wire import (
    cannot_surround,
    driver_of,
    execute_opening,
    is_in_pipeline,
    is_surrounded,
    opens,
)

DRIVERNAME = "postgresql+sqlroute"


def start_reading(connection: Any, driver: Any) -> None:
    """Put a pooled connection into AUTOCOMMIT until it goes back to its pool.

    The mode stays on the connection, so that the next read finds it: switching is one flag, but a
    lock and a generator in psycopg. A transaction that begins switches it back (``do_begin``; an
    event would cost every statement of the engine). What the driver says is the truth, not a note
    of ours beside it: a task may be cancelled between the two.
    """
    driver.sqlroute_reads = True
    driver.sqlroute_asked = False
    if not driver.autocommit:
        _set_autocommit(connection, True)


def reads(driver: Any) -> bool:
    """Say if a driver's connection is lent for a read."""
    return getattr(driver, "sqlroute_reads", False)


def _stop_reading(connection: Any) -> None:
    driver = connection.driver_connection
    if driver.autocommit and not reads(driver) and not _is_asked(driver):
        _set_autocommit(connection, False)


def _is_asked(driver: Any) -> bool:
    """Say if AUTOCOMMIT is an isolation level that the application asked for."""
    return getattr(driver, "sqlroute_asked", False)


def _driver(connection: Any) -> Any:
    """Return psycopg's connection of a pooled one, or of one that is none."""
    return getattr(connection, "driver_connection", connection)


def _limited(driver: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Call what waits for the server, as long as the session that has the connection may wait."""
    limit = getattr(driver, "sqlroute_limit", None)
    if limit is None:
        function(*arguments)
    else:
        limited(driver, limit, function, *arguments)


async def _connect(connecting: Connecting, *arguments: Any, **parameters: Any) -> Any:
    from psycopg import AsyncConnection

    connect = partial(AsyncConnection.connect, *arguments, **parameters)
    return await connecting.connect_async(waiting.get(), connect)


def _set_autocommit(connection: Any, value: bool) -> None:
    found = connection.driver_connection.set_autocommit(value)
    if connection.dbapi_connection is not connection.driver_connection:
        await_only(found)


# "type: ignore[no-untyped-call]" below: the methods of SQLAlchemy's dialects are not annotated
class _Doors(PGDialect_psycopg):
    supports_statement_cache = True

    @memoized_property
    def connecting(self) -> Connecting:
        """The connections that this engine opens now."""
        return Connecting()

    def connect(self, *arguments: Any, **parameters: Any) -> Any:
        connect = partial(super().connect, *arguments, **parameters)
        if not self.is_async:
            return self.connecting.connect(waiting.get(), connect)
        return connect(async_creator_fn=partial(_connect, self.connecting))

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        driver = driver_of(cursor)
        surrounded = is_surrounded(driver)
        if not surrounded and isinstance(branch := getcurrent(), Branch):
            branch.call(cursor, cursor.execute, statement, parameters)
            return
        execute = cursor.execute
        # without parameters a text may be several commands, unless one is all that is allowed
        if (parameters or surrounded) and opens(cursor, driver):
            execute = partial(execute_opening, driver, cursor)
        elif surrounded:
            raise cannot_surround()
        limit = getattr(driver, "sqlroute_limit", None)
        if limit is None:
            execute(statement, parameters)
        else:
            limited(driver, limit, execute, statement, parameters)

    def do_execute_no_params(self, cursor: Any, statement: Any, context: Any = None) -> None:
        driver = driver_of(cursor)
        if is_surrounded(driver):
            raise cannot_surround()
        if isinstance(branch := getcurrent(), Branch):
            branch.call(cursor, cursor.execute, statement)
        else:
            _limited(driver, cursor.execute, statement)

    def do_executemany(
        self, cursor: Any, statement: Any, parameters: Any, context: Any = None
    ) -> None:
        driver = driver_of(cursor)
        if is_surrounded(driver):
            raise cannot_surround()
        _limited(driver, cursor.executemany, statement, parameters)

    def set_isolation_level(self, dbapi_connection: Any, level: Any) -> None:
        driver = self.get_driver_connection(dbapi_connection)
        driver.sqlroute_asked = level == "AUTOCOMMIT"
        super().set_isolation_level(dbapi_connection, level)  # type: ignore[no-untyped-call]

    def set_readonly(self, connection: Any, value: Any) -> None:
        # None where SQLAlchemy's reset says False: psycopg would begin READ WRITE, which a server
        # in recovery refuses
        super().set_readonly(connection, True if value else None)  # type: ignore[no-untyped-call]

    def do_begin(self, dbapi_connection: Any) -> None:
        if isinstance(dbapi_connection, _ConnectionFairy):
            _stop_reading(dbapi_connection)

    def do_begin_twophase(self, connection: Any, xid: Any) -> None:
        _stop_reading(connection.connection)
        super().do_begin_twophase(connection, xid)  # type: ignore[no-untyped-call]

    def do_prepare_twophase(self, connection: Any, xid: Any) -> None:
        try:
            super().do_prepare_twophase(connection, xid)  # type: ignore[no-untyped-call]
        except Exception:
            # psycopg 3.3 takes it for prepared already, and its ROLLBACK PREPARED would be the
            # error that the application sees
            driver = connection.connection.driver_connection
            if getattr(driver, "_tpc", None):
                driver._tpc = (driver._tpc[0], False)
            raise

    def do_rollback_to_savepoint(self, connection: Any, name: Any) -> None:
        super().do_rollback_to_savepoint(connection, name)  # type: ignore[no-untyped-call]
        connection.info[UNSETTLED] = True

    def do_commit(self, dbapi_connection: Any) -> None:
        group = group_of(dbapi_connection)
        commit = super().do_commit if group is None else group.commit
        try:
            _limited(_driver(dbapi_connection), commit, dbapi_connection)
        except DeadlineExceeded as error:
            error.retryable = error.__cause__ is None  # it was sent: nobody knows if it was done
            raise

    def do_rollback(self, dbapi_connection: Any) -> None:
        if isinstance(dbapi_connection, _ConnectionFairy):
            driver = dbapi_connection.driver_connection
            if driver is None or is_in_pipeline(driver):
                dbapi_connection.invalidate()
                return
            driver.sqlroute_reads = False
            limit, driver.sqlroute_limit = getattr(driver, "sqlroute_limit", None), None
            CommitGroup.leave(dbapi_connection)
            if driver.pgconn.transaction_status == 0 and not driver._tpc:
                return  # nothing was begun, or it has ended
            if is_lost(dbapi_connection):  # in a commit: the server has rolled back long since
                dbapi_connection.invalidate(soft=True)
                return
            if limit is not None:
                self._roll_back_within(limit, dbapi_connection)
                return
        super().do_rollback(dbapi_connection)  # type: ignore[no-untyped-call]

    def _roll_back_within(self, limit: Limit, connection: _ConnectionFairy) -> None:
        """Roll back, unless that takes too long: a server rolls back whom it has lost."""
        try:
            limited(connection.driver_connection, limit, super().do_rollback, connection)
        except DeadlineExceeded:
            connection.invalidate()


class RoutedDialect(_Doors):
    """The sync dialect of all engines of sqlroute."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[Any]:
        return RoutedAsyncDialect


class RoutedAsyncDialect(_Doors, PGDialectAsync_psycopg):
    """The async dialect of all engines of sqlroute."""

    supports_statement_cache = True


registry.register("postgresql.sqlroute", __name__, "RoutedDialect")
