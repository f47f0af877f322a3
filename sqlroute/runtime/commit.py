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

A connection may be lost between a COMMIT and its answer. The error then carries a :class:`Doubt`,
and :mod:`sqlroute.retry` finds out what became of it, if the group was told to ask the server first
who the transaction is (one more round trip).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import await_only, greenlet_spawn

from sqlroute.errors import InDoubtCommit, SQLRouteError, TopologyError

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

IDENTITY = (
    "SELECT pg_current_xact_id_if_assigned(), pg_current_wal_insert_lsn(), "
    "left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), "
    "extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()), pg_backend_pid()"
)
"""Who a transaction is; see :class:`Identity`."""

log = logging.getLogger("sqlroute.commit")

_IDLE, _IN_TRANSACTION, _FAILED, _UNKNOWN = 0, 2, 3, 4  # libpq's PGTransactionStatusType
_GONE = "42704"  # undefined_object: the prepared transaction was finished by somebody else


def gid_of(shard: str, designated: str, transaction: str) -> str:
    """Return the name of a prepared transaction: it says who decides about it."""
    return f"{GID_PREFIX}{designated}:{transaction}:{shard}"


def group_of(connection: Any) -> CommitGroup | None:
    """Return the group of a pooled connection, if its session gave it one."""
    if not isinstance(connection, _ConnectionFairy):  # a first connect, or a bare connection
        return None
    return connection.info.get(GROUP)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a transaction is on its server, asked before its COMMIT.

    Attributes:
        xid: its id; ``None`` when it has none, since it wrote nothing.
        lsn: all that it had written by then is before this position, its commit is after it.
        timeline: of the server.
        life: another text after the server has crashed, which may give the same id again: counters
            of statistics are reset then, and kept over an orderly restart.
        pid: of its backend.
    """

    xid: int | None
    lsn: int
    timeline: int
    life: str
    pid: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """A COMMIT that was sent, and its answer lost.

    Attributes:
        identity: of the transaction, ``None`` when nobody has asked for it.
    """

    shard: str
    identity: Identity | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a commit over several shards has prepared and left behind.

    Attributes:
        designated: the shard that decides about it.
        transaction: its name there.
        shards: where it is prepared.
    """

    designated: str
    transaction: str
    shards: tuple[str, ...]


def doubt_of(error: BaseException | None) -> Doubt | None:
    """Return the doubt that an error of the driver carries."""
    found: Doubt | None = getattr(error, "sqlroute_doubt", None)
    return found


def prepared_of(error: BaseException | None) -> Prepared | None:
    """Return what an error of a commit has left prepared, though it is not committed."""
    found: Prepared | None = getattr(error, "sqlroute_prepared", None)
    return found


class CommitGroup:
    """The primaries enlisted in one transaction of a session.

    Args:
        resolves: ask who the transaction is before its COMMIT, so that its outcome can be learnt.

    Attributes:
        lsns: after the commit, a position of each shard that covers all the transaction saw.
    """

    def __init__(self, *, resolves: bool = False) -> None:
        self.lsns: dict[str, int] = {}
        self._resolves = resolves
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

    def forsake(self, shard: str) -> None:
        """Let a member go that was lost before it has answered anything."""
        self.leave(self._connections.pop(shard, None))

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
        try:
            self._commit(connection)
        except BaseException as error:
            _end(connection, error)
            raise

    def _commit(self, connection: Any) -> None:
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
        commit = self._commit_writer if shard in self._wrote else _commit_reader
        lsn = commit(shard, connection)
        if lsn is not None:
            self.lsns[shard] = lsn

    def _commit_writer(self, shard: str, connection: Any) -> int | None:
        """Commit; an error says if nobody knows whether that was done."""
        status = _status(connection)
        identity = identity_of(connection) if self._resolves and status == _IN_TRANSACTION else None
        try:
            return commit_with_lsn(connection)
        except Exception as error:
            if status == _IN_TRANSACTION and is_lost(connection):
                # a note on psycopg's own error, which SQLAlchemy wraps as ever: no type declares it
                error.sqlroute_doubt = Doubt(shard, identity)  # type: ignore[attr-defined]
                error.add_note(
                    f"the answer to COMMIT on shard {shard} was lost: it may have been done or not;"
                    " router.run() finds that out"
                )
            raise

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
        except BaseException as error:
            self._undo(prepared, gids, error)
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
                    "sqlroute.commit_record, `sqlroute 2pc recover` finishes the others",
                    shard=designated,
                    transaction=_transaction_of(gids),
                    shards=(designated, *prepared),
                    unfinished=tuple(prepared),
                ) from error
            self._undo(prepared, gids, error)
            raise
        if lsn is not None:
            self.lsns[designated] = lsn

    def _finish(self, others: list[str], gids: dict[str, str]) -> None:
        unfinished: dict[str, str] = {}
        for shard in others:
            connection = self._connections[shard]
            try:
                lsn = _outside(connection, f"COMMIT PREPARED '{gids[shard]}'")
            except Exception as error:
                if getattr(error, "sqlstate", None) != _GONE:
                    unfinished[shard] = f"{shard} ({str(error).splitlines()[0]})"
                    continue
                lsn = _ask(connection)  # recovery was faster
            if lsn is not None:
                self.lsns[shard] = lsn
        if unfinished:
            raise InDoubtCommit(
                f"the transaction is committed, but not yet on {', '.join(unfinished.values())}; "
                "`sqlroute 2pc recover` finishes it",
                shard=_designated_of(gids),
                transaction=_transaction_of(gids),
                shards=(_designated_of(gids), *others),
                unfinished=tuple(unfinished),
                is_committed=True,
            )

    def _undo(self, prepared: list[str], gids: dict[str, str], cause: BaseException) -> None:
        """Roll back what was prepared; what cannot be reached is left to recovery."""
        left = []
        for shard in prepared:
            try:
                _outside(self._connections[shard], f"ROLLBACK PREPARED '{gids[shard]}'")
            except Exception as error:  # no record exists, so recovery rolls it back
                if getattr(error, "sqlstate", None) != _GONE:
                    left.append(shard)
        if left:
            # a note on somebody else's error, as above
            cause.sqlroute_prepared = Prepared(  # type: ignore[attr-defined]
                _designated_of(gids), _transaction_of(gids), tuple(left)
            )


def _designated_of(gids: dict[str, str]) -> str:
    return next(iter(gids.values())).split(":")[1]


def _transaction_of(gids: dict[str, str]) -> str:
    return next(iter(gids.values())).split(":")[2]


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


def _end(connection: Any, error: BaseException) -> None:
    """End the transaction of a connection whose commit has failed, maybe because of another one.

    SQLAlchemy takes such a transaction for ended: where the session is closed without a rollback,
    it would put the connection into its pool with the transaction open, for the next to commit.
    """
    status = _status(connection)
    if status == _IDLE or connection.driver_connection is None:
        return
    try:
        if status in (_IN_TRANSACTION, _FAILED):
            _run(connection, "ROLLBACK")
        elif not isinstance(error, Exception) or isinstance(error, SQLRouteError):
            connection.invalidate()  # cancelled in the middle, or lost: SQLAlchemy does not know
    except Exception as failed:
        log.info("a connection is dropped, it could not be rolled back: %s", failed)
        connection.invalidate()


def _commit_reader(_: str, connection: Any) -> int | None:
    return commit_with_lsn(connection)


def identity_of(connection: Any) -> Identity:
    """Ask who the transaction of a pooled connection is."""
    (found,) = _run(connection, IDENTITY)
    xid, lsn, timeline, life, pid = (found.get_value(0, i) for i in range(5))
    return Identity(
        None if xid is None else int(xid),
        _lsn(lsn),
        int(timeline, 16),
        (life or b"").decode(),
        int(pid),
    )


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
