"""What is run again, and what became of a transaction: the rules, without a server."""

from __future__ import annotations

from dataclasses import replace

import psycopg
import pytest
from psycopg import errors as pg
from sqlalchemy import exc

from sqlroute import (
    DeadlineExceeded,
    InDoubtCommit,
    NoPrimary,
    ReadOnlyRefused,
    StaleObjectRead,
    UnknownCommit,
    is_retryable,
)
from sqlroute.retry import PASSING, Seen, Unlearnable, is_committed
from sqlroute.runtime.commit import Doubt, Identity


def wrapped(error: psycopg.Error, *, lost: bool = False) -> exc.DBAPIError:
    """Return an error of the driver as SQLAlchemy raises it."""
    found = exc.DBAPIError.instance(
        "UPDATE t", {}, error, psycopg.Error, connection_invalidated=lost
    )
    assert isinstance(found, exc.DBAPIError)
    found.__cause__ = error
    return found


@pytest.mark.parametrize("state", sorted(PASSING | {"08000", "08006", "08P01"}))
def test_states_that_pass(state: str) -> None:
    error = pg.lookup(state) if state not in ("08000", "08006", "08P01") else psycopg.Error
    made = type("Made", (error,), {"sqlstate": state})("x")

    assert is_retryable(wrapped(made))


@pytest.mark.parametrize(
    "error",
    [pg.UniqueViolation, pg.ForeignKeyViolation, pg.UndefinedTable, pg.QueryCanceled, pg.DiskFull],
)
def test_states_that_stay(error: type[psycopg.Error]) -> None:
    assert not is_retryable(wrapped(error("x")))


def test_a_server_that_is_not_there() -> None:
    """A refused connection has no SQLSTATE; a lost one is marked by SQLAlchemy."""
    assert is_retryable(wrapped(psycopg.OperationalError("connection refused")))
    assert is_retryable(wrapped(psycopg.DatabaseError("x"), lost=True))
    assert not is_retryable(wrapped(psycopg.ProgrammingError("a bug of the program")))


def test_a_lost_answer_to_commit_is_not_run_again() -> None:
    """Whatever was raised from it: it may have been done."""
    lost = psycopg.OperationalError("server closed the connection")
    assert is_retryable(wrapped(lost, lost=True))
    lost.sqlroute_doubt = Doubt("s0", None)  # type: ignore[attr-defined]
    late = DeadlineExceeded("no answer")
    late.__cause__ = lost

    assert not is_retryable(wrapped(lost, lost=True))
    assert not is_retryable(late)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NoPrimary("none", "s0"), True),
        (StaleObjectRead((("Customer", (1,), ()),)), True),
        (DeadlineExceeded("late"), True),
        (ReadOnlyRefused("a write"), False),
        (InDoubtCommit("in doubt"), False),
        (UnknownCommit("unknown", "s0"), False),
        (exc.InvalidRequestError("x"), False),
        (ValueError("x"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_says_it_itself(error: Exception, expected: bool) -> None:
    assert is_retryable(error) is expected


def test_the_first_database_error_of_a_chain_decides() -> None:
    """An application's own error is looked through; a verdict of ours is not."""
    own, verdict = LookupError("of the application"), ReadOnlyRefused("a write")
    own.__cause__ = wrapped(pg.SerializationFailure("x"))
    verdict.__cause__ = wrapped(pg.ReadOnlySqlTransaction("x"))

    assert is_retryable(own)
    assert not is_retryable(verdict)


def test_a_circle_of_causes_ends() -> None:
    one, two = ValueError("1"), ValueError("2")
    one.__cause__, two.__cause__ = two, one

    assert not is_retryable(one)


OURS = Identity(xid=700, lsn=5_000, timeline=3, life="a", pid=1)
SAME = Seen(timeline=3, life="a", status="committed")
CRASHED = replace(SAME, life="b")
PROMOTED = Seen(timeline=4, life="z", status="committed", fork=5_000)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (SAME, True),
        (replace(SAME, status="aborted"), False),
        (replace(SAME, status="in progress"), None),
        (replace(CRASHED, status="aborted"), False),
        (replace(CRASHED, status="future"), False),
        (replace(CRASHED, status="in progress"), False),
        (PROMOTED, True),
        (replace(PROMOTED, fork=4_999), False),
        (replace(PROMOTED, status="aborted"), False),
        (replace(PROMOTED, fork=4_999, status=None), False),
        (replace(SAME, timeline=2), None),
    ],
    ids=repr,
)
def test_what_a_server_says_of_our_transaction(seen: Seen, expected: bool | None) -> None:
    assert is_committed(OURS, seen) is expected


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (CRASHED, "crashed"),
        (replace(SAME, status=None), "forgotten"),
        (replace(PROMOTED, fork=None), "pg_read_server_files"),
    ],
    ids=["crashed", "forgotten", "no history"],
)
def test_what_a_server_cannot_tell(seen: Seen, why: str) -> None:
    """An id may be another transaction's; then nothing is claimed."""
    with pytest.raises(Unlearnable, match=why):
        is_committed(OURS, seen)


def test_a_transaction_without_an_id_has_written_nothing() -> None:
    assert is_committed(replace(OURS, xid=None), SAME) is False
