"""An engine that answers every SELECT with no row, without a server.

For a statement whose conditions exclude every row. SQLAlchemy compiles it and makes its result as
of any other, so that columns, types, entities and scalars are what a server's answer would have.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import Engine
from sqlalchemy.engine.url import make_url
from sqlalchemy.pool import NullPool

NUMERIC = 1700
"""The type code of every column. Only SQLAlchemy's numbers look at it, and refuse to be without."""


@cache
def no_rows() -> Engine:
    """Return the engine; there is one per process, and it holds nothing."""
    dialect = _Dialect(dbapi=PGDialect_psycopg.import_dbapi())  # type: ignore[no-untyped-call]
    connect: Any = _Connection
    return Engine(NullPool(connect, dialect=dialect), dialect, make_url("postgresql+psycopg://"))


class _Cursor:
    arraysize = 1
    rowcount = 0
    description: Any = None

    def execute(self, *_: Any) -> None:
        """Do nothing for those who set up each connection of any engine, too."""

    def fetchone(self) -> None:
        return None

    def fetchmany(self, _size: int = 1) -> list[Any]:
        return []

    def fetchall(self) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class _Connection:
    def cursor(self) -> _Cursor:
        return _Cursor()


# "type: ignore[no-untyped-call]" and Any: the methods of SQLAlchemy's dialects are not annotated
class _Dialect(PGDialect_psycopg):
    """Sends nothing; a result has the columns that the statement was compiled with."""

    supports_statement_cache = True
    supports_server_side_cursors = False

    def do_execute(
        self,
        cursor: Any,
        statement: Any,  # noqa: ARG002 - the name is SQLAlchemy's
        parameters: Any,  # noqa: ARG002 - likewise
        context: Any = None,
    ) -> None:
        columns = context.compiled._result_columns
        cursor.description = [(column.keyname, NUMERIC, *[None] * 5) for column in columns]

    def do_begin(self, dbapi_connection: Any) -> None:
        pass

    def do_rollback(self, dbapi_connection: Any) -> None:
        pass

    def do_commit(self, dbapi_connection: Any) -> None:
        pass

    def do_close(self, dbapi_connection: Any) -> None:
        pass
