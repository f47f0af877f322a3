"""The few internals of psycopg that sqlroute leans on are as it expects them.

A new psycopg that changes one fails here, by name, not somewhere in a transaction.
"""

from __future__ import annotations

import inspect
from selectors import EVENT_READ, EVENT_WRITE

import psycopg
from psycopg import Connection, Cursor, Pipeline, generators, waiting
from psycopg.errors import UniqueViolation, error_from_result
from sqlalchemy.dialects.postgresql.psycopg import AsyncAdapt_psycopg_cursor


def source(function: object) -> str:
    return inspect.getsource(function)  # type: ignore[arg-type]


def test_a_cursor_queues_where_its_connection_has_a_pipeline() -> None:
    """BEGIN, PREPARE and the statement: each one call and one place for its result."""
    assert "self._pipeline.command_queue.append(" in source(Connection._exec_command)
    assert "self._pipeline.result_queue.append(None)" in source(Connection._exec_command)
    for method in (Cursor._send_prepare, Cursor._execute_send, Cursor._send_query_prepared):
        assert "self._conn._pipeline.command_queue.append(" in source(method)
    assert "self._conn._pipeline.result_queue.append(None)" in source(Cursor._send_prepare)
    assert "self._conn._pipeline.result_queue.append((self, queued))" in source(
        Cursor._maybe_prepare_gen
    )


def test_begin_is_followed_by_a_sync_of_the_pipeline() -> None:
    """The wait that ``Opening`` leaves out."""
    body = source(Connection._start_query)
    assert body.index("_exec_command") < body.index("yield from self._pipeline._sync_gen()")


def test_a_cursor_communicates_after_all_was_queued() -> None:
    """And what it does after that asks the connection for its pipeline anew."""
    body = source(Cursor._execute_gen)
    assert (
        body.index("_start_query")
        < body.index("_maybe_prepare_gen")
        < body.index("yield from self._conn._pipeline._communicate_gen()")
        < body.index("_prepared.maintain_gen(self._conn)")
    )


def test_a_pipeline_hands_results_on() -> None:
    """Errors are raised by it, results end up in the cursor."""
    assert list(inspect.signature(Pipeline._process_results).parameters) == [
        "self",
        "queued",
        "results",
    ]
    assert "error_from_result(" in source(Pipeline._process_results)


def test_generators_for_results() -> None:
    """Public by name, not documented."""
    for name in ("execute", "fetch_many", "send"):
        assert callable(getattr(generators, name))


def test_errors_are_made_of_results() -> None:
    """The class of an error is that of its SQLSTATE."""
    assert list(inspect.signature(error_from_result).parameters) == ["result", "encoding"]
    assert psycopg.errors.lookup("23505") is UniqueViolation


def test_two_phase_state_of_a_connection() -> None:
    """Left alone by a rollback that finds nothing begun."""
    assert "self._tpc" in source(Connection._rollback_gen)


def test_async_cursor_of_sqlalchemy_knows_its_connection() -> None:
    """``_connection`` is psycopg's own."""
    assert "_connection" in AsyncAdapt_psycopg_cursor.__mro__[1].__slots__  # type: ignore[attr-defined]


def test_a_connection_waits_by_its_own_wait() -> None:
    """A scatter puts its own in place, on the connection, and drives the same generators."""
    assert "self._conn.wait(" in source(Cursor.execute)
    assert "gen, self.pgconn.socket" in source(Connection.wait)
    assert (waiting.Ready.R, waiting.Ready.W) == (EVENT_READ, EVENT_WRITE)
    assert (waiting.Wait.R, waiting.Wait.W) == (EVENT_READ, EVENT_WRITE)
