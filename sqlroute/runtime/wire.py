"""Two short cuts through psycopg: a transaction begun with its first statement, a plain command.

psycopg sends BEGIN by itself, one round trip before the first statement of a transaction; even its
own pipeline waits for the answer. Here both go out together (:class:`Opening`). And what a commit
sends needs no cursor: the results of libpq are read as they are (:func:`command`).

Internals of psycopg used, each checked by ``tests/unit/test_psycopg_internals.py``:
``Connection._pipeline``, ``BasePipeline._communicate_gen``, ``_sync_gen``, ``_process_results``,
``command_queue`` and ``result_queue``, and ``AsyncAdapt_psycopg_cursor._connection`` of SQLAlchemy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from psycopg import Cursor, Error, OperationalError, Pipeline
from psycopg.errors import error_from_result
from psycopg.generators import execute, fetch_many, send
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from sqlalchemy.dialects.postgresql.psycopg import AsyncAdapt_psycopg_cursor
from sqlalchemy.util import await_only

from sqlroute.errors import CrossShardRefused, TooManyRows

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

_HAS_PIPELINES = Pipeline.is_supported()
_CLIENT_SIDE = (Cursor, AsyncAdapt_psycopg_cursor)


@dataclass(frozen=True, slots=True)
class Around:
    """What goes out with the one statement of a transaction, in the same round trip.

    Attributes:
        before: commands between BEGIN and the statement.
        after: a command after it; where that fails, so does the statement.
        max_rows: an answer of more rows is refused.
    """

    before: tuple[str, ...]
    after: str
    max_rows: int


class Opening(Pipeline):
    """What a connection takes for its pipeline during one statement: BEGIN goes with that.

    The cursor queues its commands here, as in any pipeline of psycopg's, BEGIN before them; they
    are sent, and their results awaited, when it asks for that at the end.
    """

    around: Around | None = None

    def _sync_gen(self) -> PQGen[None]:
        """Do not wait for the answer to BEGIN."""
        yield from ()

    def _communicate_gen(self) -> PQGen[None]:
        """Send all that is queued as one message, and give each result to whom it belongs.

        Raises:
            Error: the first one; those of the commands after it are its consequence.
        """
        self._conn._pipeline = None  # what the cursor does later is not part of it
        if self.around is not None:
            self._surround(self.around)
        pgconn, queue = self.pgconn, []
        failed: Error | None = None
        pgconn.enter_pipeline_mode()
        try:
            for call, queued in zip(self.command_queue, self.result_queue, strict=True):
                call()
                queue.append(queued)
        except Error as error:  # of libpq: too many parameters
            failed = error
        pgconn.pipeline_sync()
        yield from send(pgconn)
        for queued in queue:
            results = yield from fetch_many(pgconn)
            if not results:  # the connection was lost with an earlier command
                failed = failed or OperationalError("the connection is lost")
                break
            try:
                self._process_results(queued, results)
            except Error as error:
                failed = failed or error
        if pgconn.status != ConnStatus.BAD:
            yield from fetch_many(pgconn)  # the answer to the sync
            pgconn.exit_pipeline_mode()
        if failed is not None:
            raise failed

    def _surround(self, around: Around) -> None:
        """Queue what goes with the statement: BEGIN is first in the queue, the statement last."""
        for number, text in enumerate(around.before, 1):
            self.command_queue.insert(number, self._command(text))
            self.result_queue.insert(number, None)
        self.command_queue.append(self._command(around.after))
        self.result_queue.append(None)

    def _command(self, text: str) -> partial[None]:
        return partial(self.pgconn.send_query_params, text.encode(), None)


def driver_of(cursor: Any) -> Any:
    """Return psycopg's connection of a cursor, sync or async."""
    return (
        cursor._connection if isinstance(cursor, AsyncAdapt_psycopg_cursor) else cursor.connection
    )


def opens(cursor: Any, driver: Any) -> bool:
    """Say if the next statement of a cursor begins a transaction, and may go out with its BEGIN.

    Server-side cursors declare themselves first.
    """
    return (
        driver.pgconn.transaction_status == TransactionStatus.IDLE
        and not driver.autocommit
        and type(cursor) in _CLIENT_SIDE
        and driver._pipeline is None
        and _HAS_PIPELINES
    )


def is_surrounded(driver: Any) -> bool:
    """Say if something goes out with the next statement of a connection."""
    return getattr(driver, "sqlroute_around", None) is not None


def cannot_surround() -> CrossShardRefused:
    """Return the error of a statement that would go out without what must go with it."""
    return CrossShardRefused(
        "coordinator",
        "its check goes out with one plain statement; leave out lists of parameters and "
        "no_parameters, and use psycopg with a libpq of version 14 or later",
    )


def execute_opening(driver: Any, cursor: Any, statement: Any, parameters: Any) -> None:
    """Execute a statement with parameters, BEGIN before it, in one round trip.

    Raises:
        TooManyRows: see :class:`Around`.
    """
    driver._pipeline = opening = Opening(driver)
    opening.around = around = getattr(driver, "sqlroute_around", None)
    try:
        cursor.execute(statement, parameters)
    finally:
        driver._pipeline = None  # nothing was sent, where a parameter could not be converted
    if around is not None and cursor.rowcount > around.max_rows:
        raise TooManyRows(
            f"the answer has more than max_rows = {around.max_rows} rows; add a LIMIT or "
            "conditions, or raise it in the coordinator's table of the configuration",
            around.max_rows,
        )


def is_in_pipeline(driver: Any) -> bool:
    """Say if a connection was left in the middle of a pipeline, by a task that was cancelled."""
    return driver._pipeline is not None or driver.pgconn.pipeline_status != 0


def command(connection: Any, text: str, needed: int | None = None) -> list[PGresult]:
    """Send one simple query of one or more commands; return their results.

    Nothing is converted, nor prepared. A transaction is not begun for it.

    Args:
        connection: a pooled connection, sync or async.
        needed: how many of the commands must succeed; by default all.

    Raises:
        Error: the first that a needed command has caused; those after it did not run.
    """
    driver = connection.driver_connection
    if connection.dbapi_connection is driver:
        with driver.lock:
            found: list[PGresult] = driver.wait(_talk(driver.pgconn, text, needed))
            return found
    return await_only(_command(driver, text, needed))


async def _command(driver: Any, text: str, needed: int | None) -> list[PGresult]:
    async with driver.lock:
        found: list[PGresult] = await driver.wait(_talk(driver.pgconn, text, needed))
        return found


def _talk(pgconn: Any, text: str, needed: int | None) -> PQGen[list[PGresult]]:
    pgconn.send_query(text.encode())
    results: list[PGresult] = yield from execute(pgconn)
    for result in results[:needed]:
        if result.status == ExecStatus.FATAL_ERROR:
            raise error_from_result(result, encoding="utf-8")
    return results
