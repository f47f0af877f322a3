"""Commit what one session wrote: with its LSN, and atomically over several shards.

One shard: ``COMMIT; SELECT flush, insert`` as one simple query, one round trip. The two positions
are the same unless others write at the same moment; the *insert* position always covers the commit.
But with another transaction's unflushed WAL before it no standby could reach it for a while, so
while they differ, the next commits of the connection ask more, which costs the server some 25 us:
the *flush* position covers a commit that has an xid (else it flushed nothing) and was not made
under ``synchronous_commit = off``. (In an implicit pipeline the LSN came *before* the commit record
in 50 of 50 tries, so a pipeline is no way.)

Several shards that wrote: two-phase commit. All but the first are prepared; the first commits in
one phase and carries the commit record: that row *is* the decision. The rest is then committed.
Whoever finds a prepared transaction later asks the first shard for the row
(:func:`sqlroute.catalog.recovery.recover`); nothing is guessed. This order needs 7 round trips for
two shards, preparing the first one too would need 9.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import await_only, greenlet_spawn

from sqlroute.errors import InDoubtCommit, TopologyError

GROUP = "sqlroute.group"
COMMIT_WITH_LSN = "COMMIT; SELECT pg_current_wal_flush_lsn(), pg_current_wal_insert_lsn()"
KIND_OF_COMMIT = "SELECT current_setting('synchronous_commit'), pg_current_xact_id_if_assigned(); "
COMMITS_AMONG_OTHERS = 100
"""After the two positions differed, for how many commits of the connection their kind is asked."""

AS_LOGIN_ROLE = "SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL role TO DEFAULT"
"""Sent before what a transaction of several shards does on its own account.

Only the role that prepared a transaction may finish it, and a session's ``SET LOCAL ROLE`` is over
by then. Deferred constraints are checked before, as the role that the application wants.
"""
GID_PREFIX = "sqlroute:"

log = logging.getLogger("sqlroute.commit")

_IDLE, _FAILED, _UNKNOWN = 0, 3, 4  # libpq's PGTransactionStatusType
_GONE = "42704"  # undefined_object: the prepared transaction was finished by somebody else


def gid_of(shard: str, designated: str, transaction: str) -> str:
    """Return the name of a prepared transaction: it says who decides about it."""
    return f"{GID_PREFIX}{designated}:{transaction}:{shard}"


def group_of(connection: Any) -> CommitGroup | None:
    """Return the group of a pooled connection, if its session gave it one."""
    if not isinstance(connection, _ConnectionFairy):  # a first connect, or a bare connection
        return None
    return connection.info.get(GROUP)


class CommitGroup:
    """The primaries enlisted in one transaction of a session.

    Attributes:
        lsns: after the commit, a position of each shard that covers all the transaction saw.
    """

    def __init__(self) -> None:
        self.lsns: dict[str, int] = {}
        self._connections: dict[str, Any] = {}
        self._wrote: dict[str, None] = {}
        self._done = False

    def __repr__(self) -> str:
        return f"CommitGroup({', '.join(self._connections)}; wrote {', '.join(self._wrote)})"

    def enlist(self, shard: str, connection: Any) -> None:
        self._connections[shard] = connection
        connection.info[GROUP] = self

    def wrote(self, shard: str) -> None:
        self._wrote[shard] = None

    @property
    def writers(self) -> tuple[str, ...]:
        """The shards that were written."""
        return tuple(self._wrote)

    @staticmethod
    def leave(connection: Any) -> None:
        if isinstance(connection, _ConnectionFairy):
            connection.info.pop(GROUP, None)

    def commit(self, connection: Any) -> None:
        """Commit one member; the first call of a group that wrote on several commits them all.

        Raises:
            InDoubtCommit: the decision is recorded but could not be carried out everywhere.
            TopologyError: a shard allows no prepared transactions.
        """
        self.leave(connection)
        if self._done:
            return
        if len(self._connections) == 1:  # whether it wrote or not
            self._commit_one(next(iter(self._connections)), connection)
            return
        writers = sorted(s for s in self._wrote if _status(self._connections.get(s)) != _IDLE)
        shard = next(s for s, member in self._connections.items() if member is connection)
        if len(writers) > 1:
            self._done = True
            self._check_alive(writers)
            if _is_async(connection):
                _to_the_end(self._commit_all, writers)
            else:
                self._commit_all(writers)
        elif writers and shard not in writers:
            return  # its turn is after the writer's, which alone decides
        else:
            self._commit_one(shard, connection)
        if writers:
            self._done = True
            self._end_readers(set(writers))

    def _commit_one(self, shard: str, connection: Any) -> None:
        lsn = commit_with_lsn(connection)
        if lsn is not None:
            self.lsns[shard] = lsn

    def _end_readers(self, writers: set[str]) -> None:
        """End the members that only read; one that is lost takes nothing back."""
        for shard, member in self._connections.items():
            if shard not in writers:
                try:
                    self._commit_one(shard, member)
                except Exception as error:
                    log.info("shard %s, which was only read, did not commit: %s", shard, error)

    def _check_alive(self, writers: list[str]) -> None:
        """Refuse to commit one part of a transaction whose other part is lost already.

        PostgreSQL answers COMMIT and PREPARE of a failed transaction with ROLLBACK, not an error.
        """
        from psycopg import OperationalError
        from psycopg.errors import InFailedSqlTransaction

        for shard in writers:
            status = _status(self._connections[shard])
            if status == _FAILED:
                raise InFailedSqlTransaction(
                    f"the transaction has failed on shard {shard}; nothing was committed anywhere"
                )
            if status == _UNKNOWN:
                raise OperationalError(
                    f"the connection to shard {shard} is lost; nothing was committed anywhere"
                )

    def _commit_all(self, writers: list[str]) -> None:
        designated, *others = writers
        transaction = uuid.uuid4().hex
        gids = {shard: gid_of(shard, designated, transaction) for shard in others}
        prepared: list[str] = []
        try:
            for shard in others:
                prepared.append(shard)  # before: its answer may be what gets lost
                self._prepare(shard, gids[shard])
            record = f"INSERT INTO sqlroute.commit_record (transaction) VALUES ('{transaction}')"  # noqa: S608 - a uuid
            _run(self._connections[designated], f"{AS_LOGIN_ROLE}; {record}")
        except BaseException:
            self._undo(prepared, gids)
            raise
        self._decide(designated, prepared, gids)
        self._finish(others, gids)

    def _prepare(self, shard: str, gid: str) -> None:
        try:
            _run(self._connections[shard], f"{AS_LOGIN_ROLE}; PREPARE TRANSACTION '{gid}'")
        except Exception as error:
            if getattr(error, "sqlstate", None) == "55000":
                raise TopologyError(
                    f"the transaction wrote on several shards and shard {shard} allows no prepared "
                    "transactions; set max_prepared_transactions above 0 and restart it"
                ) from error
            raise

    def _decide(self, designated: str, prepared: list[str], gids: dict[str, str]) -> None:
        connection = self._connections[designated]
        try:
            lsn = commit_with_lsn(connection)
        except Exception as error:
            if is_lost(connection):
                raise InDoubtCommit(
                    f"shard {designated} was lost while it decided; the outcome is in its "
                    "sqlroute.commit_record, `sqlroute 2pc recover` finishes the others"
                ) from error
            self._undo(prepared, gids)
            raise
        if lsn is not None:
            self.lsns[designated] = lsn

    def _finish(self, others: list[str], gids: dict[str, str]) -> None:
        unfinished = []
        for shard in others:
            connection = self._connections[shard]
            try:
                lsn = _outside(connection, f"COMMIT PREPARED '{gids[shard]}'")
            except Exception as error:
                if getattr(error, "sqlstate", None) != _GONE:
                    unfinished.append(f"{shard} ({str(error).splitlines()[0]})")
                    continue
                lsn = _ask(connection)  # recovery was faster
            if lsn is not None:
                self.lsns[shard] = lsn
        if unfinished:
            raise InDoubtCommit(
                f"the transaction is committed, but not yet on {', '.join(unfinished)}; "
                "`sqlroute 2pc recover` finishes it"
            )

    def _undo(self, prepared: list[str], gids: dict[str, str]) -> None:
        """Roll back what was prepared; what cannot be reached is left to recovery."""
        for shard in prepared:
            try:
                _outside(self._connections[shard], f"ROLLBACK PREPARED '{gids[shard]}'")
            except Exception:  # no record exists, so recovery rolls it back
                continue


def _to_the_end(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function to its end in async, also when the task that calls it is cancelled.

    Between PREPARE and the last COMMIT PREPARED rows are locked until somebody finishes it. The
    cancellation is raised after that.
    """
    import asyncio

    async def run() -> None:
        task = asyncio.ensure_future(greenlet_spawn(function, *arguments))
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                if task.cancelled():
                    raise
                cancelled = error
            except Exception:  # raised below, with what came between
                break
        error_of_task = task.exception()
        if error_of_task is not None:
            raise error_of_task
        if cancelled is not None:
            raise cancelled

    await_only(run())


def commit_with_lsn(connection: Any) -> int | None:
    """Commit and return its LSN, ``None`` when nothing was sent or it is a standby.

    Raises:
        InFailedSqlTransaction: a statement has failed; psycopg would roll back without a word.
    """
    driver = connection.driver_connection
    status = driver.pgconn.transaction_status
    if status == _IDLE:  # psycopg never sent a BEGIN
        return None
    among_others = getattr(driver, "sqlroute_among_others", 0)
    if among_others or status == _FAILED:
        driver.sqlroute_among_others = max(among_others - 1, 0)
        before, _, after = _run(connection, KIND_OF_COMMIT + COMMIT_WITH_LSN, needed=2)
        is_flushed = before.get_value(0, 0) != b"off" and before.get_value(0, 1) is not None
        position = after.get_value(0, 0 if is_flushed else 1)
    else:
        _, after = _run(connection, COMMIT_WITH_LSN, needed=1)
        position = after.get_value(0, 1)
        if position != after.get_value(0, 0):
            driver.sqlroute_among_others = COMMITS_AMONG_OTHERS
    return None if position is None else _lsn(position)  # a standby has none


def _outside(connection: Any, command: str) -> int | None:
    """Run a command that PostgreSQL allows outside of a transaction only; return the LSN."""
    _autocommit(connection, True)
    try:
        _run(connection, command)
        return _ask(connection)
    finally:
        if not is_lost(connection):
            _autocommit(connection, False)


def _ask(connection: Any) -> int:
    (result,) = _run(connection, "SELECT pg_current_wal_flush_lsn()")
    return _lsn(result.get_value(0, 0))


def _run(connection: Any, command: str, needed: int | None = None) -> list[Any]:
    """Send one simple query; return libpq's results."""
    from sqlroute.runtime import wire  # psycopg: not at import

    return wire.command(connection, command, needed)


def _lsn(text: bytes) -> int:
    high, _, low = text.partition(b"/")
    return int(high, 16) << 32 | int(low, 16)


def _autocommit(connection: Any, value: bool) -> None:
    found = connection.driver_connection.set_autocommit(value)
    if _is_async(connection):
        await_only(found)


def _is_async(connection: Any) -> bool:
    return connection.dbapi_connection is not connection.driver_connection


def _status(connection: Any) -> int:
    """Return libpq's transaction status, idle for a shard that never gave a connection."""
    if connection is None:
        return _IDLE
    driver = connection.driver_connection
    return _UNKNOWN if driver is None else int(driver.pgconn.transaction_status)


def is_lost(connection: Any) -> bool:
    """Say if a pooled connection has lost its server."""
    driver = connection.driver_connection
    return driver is None or bool(driver.closed or driver.broken)
