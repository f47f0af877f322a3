"""sqlroute's dialect, counting who answers and seeing who writes past the sessions.

Counted here and not by events: an event on an engine would be seen by the suite's own tests.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool.base import _ConnectionFairy

from sqlroute.runtime.commit import group_of
from sqlroute.runtime.dialect import RoutedAsyncDialect, RoutedDialect, reads

counts: Counter[str] = Counter()
"""Statements of sessions and tests, by who answered."""


class Outside:
    """Commits that no routed session made: fixtures, DDL, plain connections.

    Attributes:
        happened: since the position of the primary was last asked.
    """

    happened = True


class StandInEngine(OptionEngine):
    """The engine that stands for the replica: it shares the test's dialect, events and options."""

    @property
    def _compiled_cache(self) -> Any:
        return self._proxied._compiled_cache  # now: a fixture takes it away for a while

    @_compiled_cache.setter
    def _compiled_cache(self, _: Any) -> None:
        """It has none of its own."""


class Watched(RoutedDialect):
    """What both dialects do besides."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[Any]:
        return WatchedAsyncDialect

    @classmethod
    def load_provisioning(cls) -> None:
        PGDialect_psycopg.load_provisioning()  # type: ignore[no-untyped-call]

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        _count(cursor, context)
        super().do_execute(cursor, statement, parameters, context)

    def do_executemany(
        self, cursor: Any, statement: Any, parameters: Any, context: Any = None
    ) -> None:
        _count(cursor, context)
        super().do_executemany(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]

    def do_execute_no_params(self, cursor: Any, statement: Any, context: Any = None) -> None:
        _count(cursor, context)
        super().do_execute_no_params(cursor, statement, context)

    def do_commit(self, dbapi_connection: Any) -> None:
        if group_of(dbapi_connection) is None:
            Outside.happened = True
        super().do_commit(dbapi_connection)

    def do_commit_twophase(self, connection: Any, *arguments: Any, **options: Any) -> None:
        if not _is_of_a_session(connection):
            Outside.happened = True
        super().do_commit_twophase(connection, *arguments, **options)  # type: ignore[no-untyped-call]


class WatchedDialect(Watched):
    """In place of the sync dialect."""

    supports_statement_cache = True


class WatchedAsyncDialect(Watched, RoutedAsyncDialect):
    """In place of the async dialect."""

    supports_statement_cache = True


def register() -> None:
    """Have the URLs of sqlroute mean the dialects of this module."""
    registry.register("postgresql.sqlroute", __name__, "WatchedDialect")
    registry.register("postgresql.sqlroute_async", __name__, "WatchedAsyncDialect")


def _count(cursor: Any, context: Any) -> None:
    root: Any = getattr(context, "root_connection", None)
    fairy: Any = getattr(root, "_dbapi_connection", None)
    if not isinstance(fairy, _ConnectionFairy):  # the dialect's own first questions
        return
    if isinstance(root.engine, StandInEngine):
        counts["replica"] += 1
        return
    counts["primary"] += 1
    if reads(fairy.driver_connection):
        counts["primary, outside of a transaction"] += 1
        return
    driver: Any = fairy.driver_connection
    if driver.autocommit:
        Outside.happened = True


def _is_of_a_session(connection: Any) -> bool:
    from sqlalchemy.orm.session import _sessions

    for session in list(_sessions.values()):
        transaction = session._transaction
        if transaction is not None and connection in transaction._connections:
            return True
    return False
