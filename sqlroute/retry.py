"""Run a whole unit of work again, and find out what became of a COMMIT nobody has answered.

``router.run(fn)`` calls ``fn(session)`` and commits; after an error that passes by itself all of it
happens again, in a new session. What may have been done already is never done twice: when the
connection is lost between a COMMIT and its answer, the server is asked what became of that
transaction (:func:`is_committed`); if it cannot tell, the error says so.

Written once for sync and async: :func:`arun` runs the same code in a greenlet, where the function's
coroutine is awaited, pauses are those of the task alone, and servers are asked in a thread.

The way of a COMMIT in doubt: the driver's error carries a :class:`sqlroute.runtime.commit.Doubt`;
over several shards it is :class:`InDoubtCommit`, whose decision is in a table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import exc as sa_exc
from sqlalchemy.orm.session import SessionTransactionState

from sqlroute.errors import (
    DeadlineExceeded,
    InDoubtCommit,
    SQLRouteError,
    StaleObjectRead,
    UnknownCommit,
)
from sqlroute.routing.token import Position, Token
from sqlroute.runtime.commit import Doubt, Identity, Prepared, doubt_of, gid_of, prepared_of

if TYPE_CHECKING:
    from sqlroute.router import Router
    from sqlroute.runtime.engines import Engines
    from sqlroute.topology import Node

T = TypeVar("T")
log = logging.getLogger("sqlroute.retry")

PASSING = frozenset({"40001", "40P01", "25006", "57P01", "57P02", "57P03", "53300"})
"""SQLSTATEs of what passes by itself, beside class 08: a failed connection.

Serialization failure, deadlock, a write on a server that is no primary any more, a server that
shuts down or starts, too many connections.
"""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds between two attempts: at random below a bound that doubles from the first to this."""

CLEARING = 2.0
"""Seconds that are spent on rolling back, on other shards, what a failed commit has prepared."""

SLICE = 2.0
"""Seconds a server gets for one question; then the shard's primary may be another one."""

_FUTURE = "22023"  # of pg_xact_status(): no transaction had that id yet
_GONE = "42704"  # the prepared transaction was finished by somebody else

_SERVER = (
    "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), "
    "extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())::text"
)
_END = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE pid = %s AND state LIKE 'idle in transaction%%'
   AND backend_xid::text = mod(%s::numeric, 4294967296)::text
"""
"""A backend that waits for a COMMIT which the network has swallowed would wait for hours. One that
is at work is left alone: it may be waiting for a synchronous standby, and would give that up."""


def is_retryable(error: BaseException) -> bool:
    """Say if running the whole unit of work again may succeed, and cannot do it twice.

    The first error of SQLAlchemy's or of ours decides: the error itself, or of those that it was
    raised from. ``False`` for the loss of a connection between COMMIT and its answer, which
    ``router.run`` alone can resolve.
    """
    links = list(_chain(error))
    if any(doubt_of(link) is not None for link in links):
        return False
    for link in links:
        if isinstance(link, SQLRouteError):
            return link.retryable
        if isinstance(link, sa_exc.DBAPIError):
            return _passes(link)
        if isinstance(link, sa_exc.SQLAlchemyError):
            return False
    return False


def _passes(error: sa_exc.DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    if error.connection_invalidated:
        return True
    if state is None:  # the server has said nothing: it is not there
        return isinstance(error, sa_exc.OperationalError)
    return state in PASSING or state[:2] == "08"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def run(
    router: Router,
    fn: Callable[[Any], T],
    *,
    session: Any,
    attempts: int,
    timeout: float,
    options: Mapping[str, Any],
) -> T:
    """Run a unit of work. See ``Router.run``."""
    from sqlroute.session import RoutingSession

    _check_options(session, options)
    given = dict(options)
    # sessionmaker() would make a class each time, which takes longer than a session
    make = partial(given.pop("class_", RoutingSession), router=router, **given)
    work = _Work(router, fn, session, timeout, make, is_async=False)
    found: T = work.repeat(attempts, timeout)
    return found


async def arun(
    router: Router,
    fn: Callable[[Any], Awaitable[T]],
    *,
    session: Any,
    attempts: int,
    timeout: float,
    options: Mapping[str, Any],
) -> T:
    """Run a unit of work in this task. See ``Router.arun``."""
    from sqlalchemy.util import await_only, greenlet_spawn

    from sqlroute.session import RoutingSession
    from sqlroute.session_async import RoutingAsyncSession

    def call(session: Any) -> T:
        return await_only(fn(session))

    _check_options(session, options)
    given = {"sync_session_class": RoutingSession, **options}
    kind = given.pop("class_", RoutingAsyncSession)
    make = partial(kind, router=router, asynchronous=True, **given)
    work = _Work(router, call, session, timeout, make, is_async=True)
    found: T = await greenlet_spawn(work.repeat, attempts, timeout)
    return found


class _Work:
    """One unit of work and its attempts; under asyncio in a greenlet of its task."""

    def __init__(
        self,
        router: Router,
        call: Callable[[Any], Any],
        session: Any,
        timeout: float,
        make: Callable[[], Any],
        *,
        is_async: bool,
    ) -> None:
        self._router = router
        self._call = call
        self._given = getattr(session, "registry", lambda: session)()  # of a scoped_session
        self._make = make
        self._engines: Engines = router.engines(is_async=is_async)
        self._ends = time.monotonic() + timeout
        self._is_strong = False
        self._may_repeat = False

    def repeat(self, attempts: int, timeout: float) -> Any:
        from tenacity import (
            Retrying,
            retry_if_exception,
            stop_after_attempt,
            stop_after_delay,
            wait_random_exponential,
        )

        from sqlroute.runtime.waits import sleep

        jitter = wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)
        retrying = Retrying(
            sleep=partial(sleep, self._engines),
            stop=stop_after_attempt(attempts) | stop_after_delay(timeout),
            # half: an attempt needs time, too
            wait=lambda state: min(jitter(state), max(self._ends - time.monotonic(), 0) / 2),
            retry=retry_if_exception(lambda e: isinstance(e, Exception) and self._may_repeat),
            before_sleep=_log,
            reraise=True,
        )
        return retrying(self._attempt)

    def _attempt(self) -> Any:
        session = self._given if self._given is not None else self._make()
        sync = _sync(session)
        self._may_repeat = False
        _check_session(sync, self._router)
        error: BaseException | None = None
        resolves, sync._resolves = sync._resolves, True
        before, has_returned = sync.written, False
        try:
            with sync.consistency("strong") if self._is_strong else nullcontext():
                result = self._call(session)
                has_returned = True
                sync.commit()
        except Exception as failed:
            error = failed
            committed = self._outcome(failed, sync)
            if committed and has_returned:
                log.info("the answer to COMMIT was lost; it was done")
                _as_committed(sync)
                error = None
                return result
            has_written = bool(committed) or sync.written != before or _wrote_elsewhere(sync)
            self._judge(failed, sync, has_written=has_written)
            raise
        except BaseException as cancelled:
            error = cancelled
            raise
        finally:
            sync._resolves = resolves
            self._leave(session, sync, error)
        return result

    def _judge(self, error: Exception, sync: Any, *, has_written: bool) -> None:
        """Decide whether there is another attempt."""
        was_lost = any(doubt_of(link) is not None for link in _chain(error))
        in_doubt = any(isinstance(link, InDoubtCommit) for link in _chain(error))
        may_repeat = was_lost or in_doubt or is_retryable(error)
        if may_repeat and has_written:
            error.add_note("router.run() did not run it again: some of it is committed")
        limit = sync._limit
        is_over = self._given is not None and limit is not None and limit.left() <= 0
        self._may_repeat = may_repeat and not has_written and not is_over
        if any(isinstance(link, StaleObjectRead) for link in _chain(error)):
            self._is_strong = True

    def _leave(self, session: Any, sync: Any, error: BaseException | None) -> None:
        """Give the connections back; a session of the caller is as after a rollback, or new."""
        if self._given is None:
            if session is sync:
                sync.close()
            else:
                _close_shielded(session)
        elif error is not None:
            sync.rollback()
            if self._may_repeat:
                sync.expunge_all()

    def _outcome(self, error: Exception, sync: Any) -> bool | None:
        """Return what became of the commit that an error comes from; ``None`` without a doubt.

        Raises:
            UnknownCommit: nobody can tell.
            InDoubtCommit: it is committed, but on some shards not visible yet.
        """
        from sqlroute.runtime.waits import blocking

        limit = sync._limit if self._given is not None else None
        ends = self._ends if limit is None else min(self._ends, limit.at)
        found: tuple[Position, ...] | None = None
        for link in _chain(error):
            doubt, left = doubt_of(link), prepared_of(link)
            asking = _Asking(self._router, ends)
            if isinstance(link, InDoubtCommit):
                found = blocking(self._engines, asking.finish, link)
            elif doubt is not None:
                found = blocking(self._engines, asking.resolve, doubt, error)
            elif left is not None:
                blocking(self._engines, asking.roll_back, left)
                return None
            else:
                continue
            if found is None:
                return False
            token = Token(tuple(sorted(found, key=lambda position: position.shard)))
            sync.follow(token)
            sync._written |= token
            return True
        return None


def _check_options(session: Any, options: Mapping[str, Any]) -> None:
    if session is not None and options:
        raise sa_exc.InvalidRequestError(
            f"run() was given a session, and {', '.join(options)} for new ones; give one of both"
        )


def _sync(session: Any) -> Any:
    return getattr(session, "sync_session", session)


def _check_session(sync: Any, router: Router) -> None:
    """Refuse a session in which a unit of work would not be whole, or its outcome not be known.

    Raises:
        InvalidRequestError: as SQLAlchemy's own of a session that is not in the right state.
    """
    if getattr(sync, "router", None) is not router:
        raise sa_exc.InvalidRequestError(
            f"{sync!r} was not made by this router; leave session= out, or give one that was"
        )
    if sync.twophase:
        raise sa_exc.InvalidRequestError(
            "run() cannot learn the outcome of SQLAlchemy's two-phase commit; leave twophase out: "
            "sqlroute commits several shards atomically by itself"
        )
    if sync.in_transaction():
        raise sa_exc.InvalidRequestError(
            "the session given to run() is in a transaction already, of which run() could repeat "
            "only a part; commit or roll back first, or do all in the function"
        )


def _wrote_elsewhere(sync: Any) -> bool:
    """Say if a commit failed that has a part in databases of the application's own binds."""
    transaction = sync._transaction
    return (
        (sync._bound is not None or bool(sync.binds))
        and transaction is not None
        and transaction._state is SessionTransactionState.PREPARED
    )


def _log(state: Any) -> None:
    error = state.outcome.exception()
    log.info(
        "attempt %d failed, the next in %.2f s: %s",
        state.attempt_number,
        state.upcoming_sleep,
        str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def _close_shielded(session: Any) -> None:
    """Close an AsyncSession to the end, as its own ``async with`` does, whoever cancels."""
    import asyncio

    from sqlalchemy.util import await_only

    await_only(asyncio.shield(asyncio.ensure_future(session.close())))


def _as_committed(sync: Any) -> None:
    """Bring a session to where its COMMIT would have left it, had it been answered.

    A rollback would take new objects out of it, and give back those that were deleted.
    """
    objects = list(sync.identity_map.values())
    sync.reset()
    sync.add_all(objects)
    sync.commit()  # sends nothing; expires the objects, and its events tell who listens


@dataclass(frozen=True, slots=True)
class Seen:
    """What a primary says of a transaction.

    Attributes:
        status: of ``pg_xact_status``: ``"committed"``, ``"aborted"``, ``"in progress"``; ``None``
            for one too old to tell, ``"future"`` for an id that nobody has had yet.
        fork: where the transaction's timeline was left, if the server is on a newer one; ``None``
            where that is not known.
    """

    timeline: int
    life: str
    status: str | None
    fork: int | None = None


class Unlearnable(Exception):
    """The outcome of a transaction cannot be told; its text says why."""


def is_committed(identity: Identity, seen: Seen) -> bool | None:
    """Judge what became of a transaction; ``None`` when it is too early to tell.

    An id alone proves nothing. After a crash ids that never reached the disk are given again, on
    the same timeline; a promoted standby goes on from the ids that it has received. So:

    * Left before the transaction's last own record, its timeline cannot hold the COMMIT that came
      after that. Left behind it, the new primary knows the id.
    * After a crash on the same timeline "committed" may be said of another transaction. Anything
      else is true of ours, too: whose id was given again was lost.

    Not seen: a crash of the old primary and a promotion, both within the time of one question.

    Raises:
        Unlearnable: it will not be known later either.
    """
    if identity.xid is None:
        return False  # it wrote nothing
    if seen.timeline < identity.timeline:
        return None  # a primary of the past
    has_crashed = seen.timeline == identity.timeline and seen.life != identity.life
    if seen.timeline > identity.timeline:
        if seen.fork is None:
            raise Unlearnable(
                f"where timeline {identity.timeline} was left cannot be read; grant "
                "pg_read_server_files or run `sqlroute catalog install`"
            )
        if seen.fork < identity.lsn:
            return False
    if seen.status is None:
        raise Unlearnable("it is so old that the server has forgotten it")
    if seen.status == "in progress":
        return False if has_crashed else None
    if seen.status != "committed":
        return False
    if has_crashed:
        raise Unlearnable("the server has crashed since, and may have given its id to another")
    return True


class _Asking:
    """Questions to primaries about a commit, until a moment. It blocks: not for an event loop."""

    def __init__(self, router: Router, ends: float) -> None:
        self._router = router
        self._ends = ends

    def resolve(self, doubt: Doubt, error: Exception) -> tuple[Position, ...] | None:
        """Return a position that covers the commit; ``None`` if it was not done.

        Raises:
            UnknownCommit: nobody can tell.
        """
        shard, identity = doubt.shard, doubt.identity
        if identity is None:
            why: object = "its id was not asked for"
        elif identity.xid is None:
            return None
        else:
            try:
                return self._primary(shard, partial(self._look, shard, identity)) or None
            except Unlearnable as found:
                why = f"of transaction {identity.xid}, {found}"
        raise UnknownCommit(
            f"the answer to COMMIT on shard {shard} was lost and its outcome cannot be learnt: "
            f"{why}; look whether what it wrote is there before you run it again",
            shard,
        ) from error

    def _look(
        self, shard: str, identity: Identity, connection: Any, node: Node
    ) -> tuple[Position, ...] | None:
        """Return positions if it is committed, none if not, ``None`` to ask again."""
        walfile, life = connection.execute(_SERVER).fetchone()
        timeline, fork = int(walfile, 16), None
        if timeline > identity.timeline:
            fork = self._fork(node, identity.timeline, timeline)
        status = _status(connection, identity)
        found = is_committed(identity, Seen(timeline, life or "", status, fork))
        if found is None:
            ended = connection.execute(_END, (identity.pid, identity.xid)).fetchall()
            if ended:
                log.info("ended backend %d, whose client is lost", identity.pid)
            return None
        return (self._position(shard, connection),) if found else ()

    def _fork(self, node: Node, timeline: int, newest: int) -> int | None:
        from sqlroute.catalog.history import read_history

        ends = read_history([node], newest, SLICE)
        return None if ends is None else ends.get(timeline)

    def _position(self, shard: str, connection: Any) -> Position:
        """Return a position after all that is visible now."""
        walfile, lsn = connection.execute(
            "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), "
            "(pg_current_wal_insert_lsn() - '0/0')::bigint"
        ).fetchone()
        return self._router.position(shard, int(walfile, 16), int(lsn))

    def finish(self, error: InDoubtCommit) -> tuple[Position, ...] | None:
        """Carry the decision of a commit over several shards out; return as :meth:`resolve`.

        Raises:
            UnknownCommit: the shard that decides cannot be asked.
            InDoubtCommit: it is committed and some shard does not answer.
        """
        left = Prepared(error.shard, error.transaction, error.unfinished)
        if not left.transaction:
            raise error
        try:
            committed = error.is_committed or self._primary(
                left.designated, partial(_decided, left.transaction)
            )
        except Unlearnable as why:
            raise UnknownCommit(
                f"shard {left.designated} was lost while it decided about transaction "
                f"{left.transaction}, and cannot be asked: {why}; `sqlroute 2pc recover` finishes "
                "it, look whether what it wrote is there before you run it again",
                left.designated,
            ) from error
        if not committed:
            self.roll_back(left)
            return None
        try:
            for shard in left.shards:
                self._primary(shard, partial(_finished, "COMMIT", self._gid(left, shard)))
            return tuple(self._primary(s, partial(self._at, s)) for s in error.shards)
        except Unlearnable as why:
            error.add_note(f"router.run() did not run it again, and could not finish it: {why}")
            raise error from error.__cause__

    def _at(self, shard: str, connection: Any, _: Node) -> Position:
        return self._position(shard, connection)

    def roll_back(self, left: Prepared) -> None:
        """Roll back what was prepared, whose locks the next attempt would wait for."""
        self._ends = min(self._ends, time.monotonic() + CLEARING)
        for shard in left.shards:
            try:
                self._primary(shard, partial(_finished, "ROLLBACK", self._gid(left, shard)))
            except Unlearnable as why:
                log.warning("prepared on shard %s and not rolled back: %s", shard, why)

    def _gid(self, left: Prepared, shard: str) -> str:
        return gid_of(shard, left.designated, left.transaction)

    def _primary(self, shard: str, question: Callable[[Any, Node], T | None]) -> T:
        """Ask the primary of a shard until it answers, whichever node that is by then.

        Raises:
            Unlearnable: the time is over, or it will never be known.
        """
        from psycopg import Error

        router, pause, why = self._router, 0.02, "no primary was found"
        while True:
            left = max(self._ends - time.monotonic(), 0.0)
            primary = router.monitor.ask(shard, router.policy.probe_deadline).primary(shard)
            if primary is not None:
                node = router.topology.node(primary.node)
                try:
                    found = _asked(node, question)
                except (Error, DeadlineExceeded) as error:
                    why = f"{node.name}: {str(error).splitlines()[0]}"
                else:
                    if found is not None:
                        return found
                    why = f"{node.name} has not finished it"
            if left <= 0:
                raise Unlearnable(f"the time is over; {why}")
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.25)


def _asked(node: Node, question: Callable[[Any, Node], T]) -> T:
    """Ask a server over a connection of its own, not longer than a slice."""
    from sqlroute.catalog.maps import connect
    from sqlroute.runtime.limits import Limit, limited

    with connect(node, SLICE) as connection:
        return limited(connection, Limit.after(SLICE), question, connection, node)


def _status(connection: Any, identity: Identity) -> str | None:
    from psycopg import DatabaseError

    try:
        query = "SELECT pg_xact_status(%s::text::xid8)"
        (found,) = connection.execute(query, (str(identity.xid),)).fetchone()
    except DatabaseError as error:
        if error.sqlstate == _FUTURE:
            return "future"
        raise
    status: str | None = found
    return status


def _decided(transaction: str, connection: Any, _: Node) -> bool:
    """Return the decision, made now where none was: by the way of recovery."""
    from sqlroute.catalog import recovery

    connection.execute(recovery.ABORT, (transaction,))
    (aborted,) = connection.execute(recovery.DECISION, (transaction,)).fetchone()
    return not aborted


def _finished(verb: str, gid: str, connection: Any, _: Node) -> bool:
    from psycopg import DatabaseError

    try:
        connection.execute(f"{verb} PREPARED '{gid}'")
    except DatabaseError as error:
        if error.sqlstate != _GONE:
            raise
    return True


__all__ = ["Seen", "Unlearnable", "arun", "is_committed", "is_retryable", "run"]
