"""The few internals of SQLAlchemy that sqlroute leans on are as it expects them.

A new SQLAlchemy that changes one fails here, by name, not somewhere in a session.
"""

from __future__ import annotations

import inspect

import pytest
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.pool.base import _ConnectionFairy


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_every_statement_passes_execute_internal() -> None:
    """The first door: its parameters are those that the override hands on."""
    assert parameters(Session._execute_internal) == [
        "self",
        "statement",
        "params",
        "execution_options",
        "bind_arguments",
        "_parent_execute_state",
        "_add_event",
        "_scalar_result",
    ]
    for method in (Session.execute, Session.scalar, Session.scalars):
        assert "_execute_internal" in inspect.getsource(method)


def test_an_added_event_runs_after_the_listeners() -> None:
    """The plan is made of what the application's listeners left."""
    source = inspect.getsource(Session._execute_internal)

    assert "list(events_todo) + [_add_event]" in source


@pytest.mark.parametrize(
    "name", ["_autobegin_t", "_autoflush", "_is_clean", "_identity_lookup", "_connection_for_bind"]
)
def test_session_has(name: str) -> None:
    """Methods that RoutingMixin calls or overrides."""
    assert callable(getattr(Session, name))


def test_flush_asks_for_a_connection_per_object() -> None:
    """``connection_callable`` is read by the unit of work, once per flushed object."""
    from sqlalchemy.orm import persistence

    assert Session.connection_callable is None
    assert "connection_callable(base_mapper, state.obj())" in inspect.getsource(
        persistence._connections_for_states
    )


def test_dialect_doors_have_their_signatures() -> None:
    """Commit, begin and roll back get the pool's proxy; execute gets the cursor."""
    assert parameters(PGDialect_psycopg.do_commit) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_begin) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_rollback) == ["self", "dbapi_connection"]
    assert parameters(PGDialect_psycopg.do_execute)[:4] == [
        "self",
        "cursor",
        "statement",
        "parameters",
    ]
    assert isinstance(_ConnectionFairy.info, object)


def test_a_pool_expires_its_connections_by_time() -> None:
    """Connections older than ``_invalidate_time`` are replaced at checkout."""
    pool = QueuePool(lambda: None)  # type: ignore[arg-type,return-value]

    assert pool._invalidate_time == 0


def test_results_can_be_made_of_rows() -> None:
    """A merged result keeps what an ORM result knows of uniqueness and entities."""
    result = IteratorResult(SimpleResultMetaData(["a"]), iter([(1,)]))

    assert result._unique_filter_state is None
    assert hasattr(result, "_attributes")
    assert hasattr(result._metadata, "_reduce")
