"""The drop-in Session: three doors (execute, flush, ``connection()``), one decision each.

Every statement of the ORM and of Core passes ``_execute_internal`` and is planned there; ``flush``
asks for a connection per object; ``get_bind`` only looks up what was chosen. Reads that no
transaction needs run in AUTOCOMMIT on a connection that goes back at once: one round trip.
Everything else is an ordinary transaction of SQLAlchemy's on primaries, committed by
:class:`sqlroute.runtime.commit.CommitGroup`.

Why not a ``do_orm_execute`` listener: it would run before those of the application, which may still
change the statement (tenancy, soft deletes), and it costs each statement a second pass through the
ORM's preparation (about 15 us). So a session without listeners is planned directly, and one with
listeners after the last of them.

SQLAlchemy internals used, each checked by ``tests/unit/test_sqlalchemy_internals.py``:
``Session._execute_internal``, ``_connection_for_bind``, ``_autobegin_t``, ``_autoflush``,
``_is_clean``, ``_identity_lookup``, ``connection_callable``, ``_warn_on_events``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.engine.util import TransactionalContext
from sqlalchemy.exc import DBAPIError, OperationalError, UnboundExecutionError
from sqlalchemy.orm import Mapper, ORMExecuteState, Session
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.sql.base import Executable

from sqlroute import stale
from sqlroute.asking import Asking
from sqlroute.coordination import estimated
from sqlroute.errors import (
    CrossShardRefused,
    MissingShardKey,
    NoPrimary,
    PlanError,
    SQLRouteError,
    TokenError,
    UnknownName,
)
from sqlroute.events import Retried
from sqlroute.execution import BIND, Call, execute, explained, plan
from sqlroute.identity import OfAllShards
from sqlroute.references import copy_after_flush
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.declare import Reference, Sharded, declaration, shard_key
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.policy import (
    Consistency,
    Intent,
)
from sqlroute.routing.rows import bucket_of_key, missing, python_default
from sqlroute.routing.target import check_may_write
from sqlroute.routing.token import Token
from sqlroute.runtime.commit import CommitGroup, is_lost
from sqlroute.runtime.limits import Limit, waiting_for
from sqlroute.runtime.settings import Settings
from sqlroute.runtime.waits import LONGEST_PAUSE, sleep
from sqlroute.runtime.writes import has_ended
from sqlroute.stale import StaleWrites

if TYPE_CHECKING:
    from sqlalchemy.sql.schema import Table

    from sqlroute.router import Router
    from sqlroute.runtime.writes import Ticket

    _Base = Session
else:
    _Base = object

_NOTHING: Mapping[str, Any] = MappingProxyType({})

log = logging.getLogger("sqlroute.session")

_ISOLATION_LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class RoutingMixin(Asking, _Base):
    """Routing for any subclass of ``Session``: ``class S(RoutingMixin, sqlmodel.Session)``.

    Args:
        router: knows the servers.
        asynchronous: the session lives under an ``AsyncSession``.
        consistency: what its reads may miss: ``"eventual"``, ``"bounded"``, ``"session"`` or
            ``"strong"``; by default the policy's.
        intent: what it is declared to do: ``"reading"``, ``"writing"`` or ``"lag_tolerant"``.
        token: what it must not read a state from before, see :meth:`follow`.
        settings: run-time parameters of its connections, see :meth:`settings`.
        stale_writes: ``"check"``: an object that a replica gave is compared with the primary's row
            before it is written; ``"allow"``: it is not. See :mod:`sqlroute.stale`.
        deadline: seconds from now within which all must be done, see :meth:`deadline`; by default
            the policy's.

    Raises:
        UnknownName: a consistency, intent or ``stale_writes`` that nobody knows.
        InvalidToken, ForeignToken: the token is none, or of other servers.
        SettingRefused: a setting that sessions may not carry.
    """

    # what few sessions ever change is on the class: making a session is part of each request
    _asks_per_object = False
    _affinity = Affinity()
    _group: CommitGroup | None = None
    _is_proved = True  # the node that is enlisted next has all that the session has seen
    _given_options: Mapping[str, Any] = _NOTHING  # of a statement that listeners see
    _chosen: Engine | Connection | None = None  # by the last plan
    _options: Mapping[str, Any] = _NOTHING  # of the transaction's connections
    _optioned: frozenset[Engine] = frozenset()  # that have them
    _resolves = False  # router.run() wants to learn the outcome of a COMMIT without an answer
    _shard: str | None = None
    _ticket: Ticket | None = None
    _streaming: frozenset[str] = frozenset()

    def __init__(
        self,
        *arguments: Any,
        router: Router,
        asynchronous: bool = False,
        consistency: Consistency | str | None = None,
        intent: Intent | str | None = None,
        token: Token | str | None = None,
        settings: Mapping[str, Any] | None = None,
        stale_writes: str = "check",
        deadline: float | None = None,
        **options: Any,
    ) -> None:
        self._stale = StaleWrites(stale_writes)
        self._router = router
        self._routes = router.engines(is_async=asynchronous)
        self._settings = Settings()
        self._is_sharded = router.is_sharded
        self._ask(router.demand, consistency, intent)
        if token is not None:
            self.follow(token)
        if settings is not None:
            self._settings.want(settings)
        if deadline is None:
            deadline = router.policy.deadline
        if deadline is not None:
            self._limit = Limit.after(deadline)
        super().__init__(*arguments, **options)
        if self._is_sharded:
            self.identity_map = OfAllShards(router.written_first)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, Session) and not any(
            issubclass(base, Session) and issubclass(base, RoutingMixin) for base in cls.__bases__
        ):
            event.listen(cls, "after_begin", _after_begin)
            event.listen(cls, "after_commit", _after_commit)
            event.listen(cls, "after_transaction_end", _after_transaction_end)
            stale.listen(cls)

    @property
    def router(self) -> Router:
        return self._router

    @property
    def bind(self) -> Engine | Connection | None:
        """What the application bound the session to; else, with one shard, its primary's engine.

        For libraries that look at ``session.bind.dialect``. Nothing is routed by it.
        """
        keyspace = self._router.topology.default
        if self._bound is not None or keyspace.is_sharded:
            return self._bound
        shard = keyspace.shards[0]
        primary = self._router.monitor.health.primary(shard.name)
        return self._routes.engine(primary.node if primary is not None else shard.nodes[0].name)

    @bind.setter
    def bind(self, bind: Engine | Connection | None) -> None:
        self._bound = bind

    def explain(self, statement: Any, parameters: Any = None) -> Plan:
        """Return the plan that this session would make for a statement now, without running it.

        Printed, it says the tier, each node with the SQL it would be sent, the merge, and why.

        Raises:
            PlanError: it cannot be routed.
            TopologyError: no node can take it now.
        """
        options = dict(getattr(statement, "_execution_options", {}))
        described = self._router.planner.describe(statement, parameters)
        found, _ = plan(self, described, options, is_real=False)
        found = explained(self, described, found, options)
        if found.tier is Tier.COORDINATOR:
            return estimated(self, statement, parameters, found)
        return found

    # the first door: execute

    def _execute_internal(
        self,
        statement: Any,
        params: Any = None,
        *,
        execution_options: Mapping[str, Any] = _NOTHING,
        bind_arguments: Any = None,
        _parent_execute_state: Any = None,
        _add_event: Any = None,
        _scalar_result: bool = False,
    ) -> Any:
        go_on = super()._execute_internal
        given = bind_arguments or _NOTHING
        is_planned = BIND in given or "bind" in given or _parent_execute_state is not None
        listeners = self.dispatch.do_orm_execute
        if not is_planned and (self._bound is not None or self.binds):
            subject = getattr(statement, "_propagate_attrs", _NOTHING).get("plugin_subject")
            own = self._own_bind(getattr(subject, "mapper", None), statement)
            if own is not None:
                bind_arguments, is_planned = {**given, "bind": own}, True
        if is_planned or listeners or not isinstance(statement, Executable):
            before, self._given_options = self._given_options, execution_options
            try:
                return go_on(
                    statement,
                    params,
                    execution_options=execution_options,
                    bind_arguments=bind_arguments,
                    _parent_execute_state=_parent_execute_state,
                    _add_event=_add_event if is_planned else _after(_add_event),
                    _scalar_result=_scalar_result,
                )
            finally:
                self._given_options = before
        return execute(
            Call(
                self,
                go_on,
                statement,
                params,
                _in_force(self, statement, execution_options),
                execution_options,
                given,
                scalar=_scalar_result,
            )
        )

    def _own_bind(self, mapper: Any, clause: Any = None) -> Engine | Connection | None:
        """Return the bind that the application gave for this, ``None`` for what is routed."""
        if self._bound is None and not self.binds:
            return None
        try:
            found: Engine | Connection = super().get_bind(mapper, clause=clause)
        except UnboundExecutionError:
            return None
        is_ours = isinstance(found, Engine) and self._routes.node_of(found) is not None
        return None if is_ours and found is not self._bound else found

    def _enlisted(self, target: Target) -> Connection:
        """Return the transaction's connection to a node, begun if it is the first."""
        self._is_proved = target.is_proved
        engine = self._routes.engine(target.node)
        connection: Connection = self._connection_for_bind(engine)
        return connection

    def _others(self, table: Table) -> list[Connection]:
        """Return connections to the shards that a reference table is copied to."""
        declared = declaration(table)
        topology = self._router.topology
        name = declared.keyspace if declared is not None else None
        keyspace = topology.keyspace(name) if name else topology.default
        if not keyspace.is_sharded:
            return []
        targets = [self._primary_of(shard) for shard in keyspace.shard_names[1:]]
        for target in targets:
            self._wrote(target.shard)
        return [self._enlisted(target) for target in targets]

    # the second door: flush

    def flush(self, objects: Any = None) -> None:
        """Flush, each object to the shard it belongs to. See ``Session.flush``."""
        arguments = (objects,) if objects is not None else ()
        if (self._affinity.read_only or self._demand.only_reads) and self._has_changes():
            self._check_may_write("a flush")
        if self._is_clean():
            super().flush(*arguments)
            return
        self._asks_per_object = self._is_sharded or self._stale.is_needed
        demand = self._demand
        if not (self._affinity.read_only or demand.only_reads):
            self._demand = replace(demand, intent=Intent.WRITING)  # for what a flush loads itself
        try:
            super().flush(*arguments)
        finally:
            self._demand = demand
            self._asks_per_object = False
            self._stale.flushed()

    @property
    # SQLAlchemy declares an attribute; it reads it anew for each flush
    def connection_callable(self) -> Any:  # type: ignore[override]
        """Ask per object, while a flush writes objects and not what its listeners execute.

        Bulk persistence, which those may use, refuses to run where this is set.
        """
        is_writing = self._asks_per_object and self._warn_on_events and self._shard is None
        return self._connection_of if is_writing else None

    def _check_may_write(self, what: str) -> None:
        check_may_write(self._router.situation(self._affinity, self._routes, self._demand), what)

    def _has_changes(self) -> bool:
        return bool(self.new or self.deleted) or any(map(self.is_modified, self.dirty))

    def _autoflush(self) -> None:
        if not self._is_clean():
            super()._autoflush()

    def _connection_of(self, mapper: Mapper[Any], instance: Any, **__: Any) -> Connection:
        """Return the connection that an object is flushed on, its row checked if a replica's."""
        state = sa_inspect(instance)
        connection = self._connection_of_state(state)
        self._stale.before_write(mapper, state, self._connection_of_state)
        return connection

    def _connection_of_state(self, state: Any) -> Connection:
        own = self._own_bind(state.mapper)
        if own is not None:
            return self._connection_for_bind(own)
        shard = self._shard_of(state)
        if state.key is None and self._router.topology.keyspace_of_shard[shard].is_sharded:
            state.identity_token = shard
        self._wrote(shard)
        engine = self._primary_engine(shard)
        connection: Connection = self._connection_for_bind(engine)
        return connection

    def _shard_of(self, state: Any) -> str:
        tables = state.mapper.tables
        declared = next((t for t in tables if declaration(t) is not None), None)
        keyspace = self._router.topology.default
        # it was chosen because it has a declaration
        if declared is not None and (name := declaration(declared).keyspace):  # type: ignore[union-attr]
            keyspace = self._router.topology.keyspace(name)
        if not keyspace.is_sharded:
            return keyspace.shards[0].name
        if declared is None:
            raise MissingShardKey(
                f"table {state.mapper.local_table} is neither sharded nor a reference table"
            )
        if isinstance(declaration(declared), Reference):
            copy_after_flush(state.mapper)
            return keyspace.shard_names[0]
        if state.key is not None:
            token: str = state.key[2]
            return token
        row = _key_of(state, declared)
        bucket = bucket_of_key(declared, row, keyspace.buckets)
        return self._router.shard_map_of(keyspace, self._routes).owner(bucket)

    # the third door: connection() and everything that asks for a bind

    def get_bind(
        self,
        mapper: Any = None,
        *,
        clause: Any = None,
        bind: Any = None,
        shard: str | None = None,
        **arguments: Any,
    ) -> Engine | Connection:
        """Return what a plan chose, else the primary. It never chooses a replica.

        What the application bound itself, by ``bind``, ``binds`` or ``bind_mapper``, is not routed.

        Args:
            shard: name of the shard, needed where nothing else says it:
                ``session.connection(bind_arguments={"shard": "s0"})``.

        Raises:
            CrossShardRefused: several shards, and nothing says which.
        """
        self._chosen = chosen = arguments.get(BIND)
        found: Engine | Connection | None = chosen if chosen is not None else bind
        if found is not None or (found := self._own_bind(mapper, clause)) is not None:
            return found
        shard = shard or self._shard or self._only_shard(mapper)
        if not isinstance(shard, str):
            raise UnknownName(f"unknown shard {shard!r}; a shard is named by a text")
        self._router.topology.shard(shard)
        if not self._affinity.read_only:
            self._wrote(shard)
        engine = self._primary_engine(shard)
        if self._flushing and (self._settings.is_needed or self._options):
            # a flush asks here, and then its transaction, which knows nothing of settings
            return self._connection_for_bind(engine)
        return engine

    def _only_shard(self, mapper: Any) -> str:
        table: Any = getattr(mapper, "local_table", None)
        declared = declaration(table) if hasattr(table, "info") else None
        topology = self._router.topology
        name = declared.keyspace if declared is not None else None
        keyspace = topology.keyspace(name) if name else topology.default
        if not keyspace.is_sharded:
            return keyspace.shards[0].name
        what = f"a connection for {table}" if table is not None else "a connection"
        raise CrossShardRefused(
            what,
            f"keyspace {keyspace.name} has {len(keyspace.shards)} shards; name one by "
            'bind_arguments={"shard": "..."}, or use session.execute(insert(...), rows) instead of '
            "the bulk_ methods and an association object instead of secondary=",
        )

    def _primary_engine(self, shard: str) -> Engine:
        target = self._primary_of(shard)
        self._check_enlistable(target)
        self._is_proved = target.is_proved
        return self._routes.engine(target.node)

    def _primary_of(self, shard: str) -> Target:
        """Return where a shard's writes go, see ``Router.primary_of``; note a refused token."""
        try:
            return self._router.primary_of(
                shard, self._affinity, self._routes, self._demand, self._limit
            )
        except TokenError as error:
            self.refused_token = error
            raise

    def _check_enlistable(self, target: Target) -> None:
        """Refuse to write on a node that was a replica when the session began to stream from it.

        Raises:
            NoPrimary: its transaction there is none that a commit could cover.
        """
        if target.node in self._streaming and target.is_primary:
            raise NoPrimary(
                f"{target.node} became the primary of shard {target.shard} while the session "
                "streams from it; end the transaction and run it again",
                target.shard,
            )

    @property
    def _is_listened_to(self) -> bool:
        """The application wants to see each transaction begin, that of a read too."""
        listeners: Any = self.dispatch.after_begin
        return len(listeners) > 1  # the first is ours

    def _connection_for_bind(
        self, engine: Any, execution_options: Any = None, **options: Any
    ) -> Connection:
        transaction = self._transaction
        if engine is self._chosen and isinstance(engine, Connection):
            # lent for a read, or a member of the transaction already
            TransactionalContext._trans_ctx_check(self)
            transaction = transaction or self._autobegin_t()
            if transaction._state is not SessionTransactionState.ACTIVE:
                transaction._raise_for_prerequisite_state("execute", transaction._state)
            return engine
        if (
            transaction is not None
            and engine in transaction._connections
            and transaction._state is SessionTransactionState.ACTIVE
            and not (execution_options or self._settings.is_needed)
        ):
            TransactionalContext._trans_ctx_check(self)
            known: Connection = transaction._connections[engine][0]
            return known
        for name in execution_options or ():
            if name[:9] == "sqlroute_":
                raise UnknownName(
                    f"execution option {name} is of statements, not of connections; for these use "
                    'bind_arguments={"shard": "..."} and session.begin(read_only=True)'
                )
        given, until, pause = execution_options, None, 0.0
        while True:
            engine, shard = self._admitted(engine)
            affinity = self._affinity
            if self._options and engine not in self._optioned:
                self._optioned |= {engine}
                execution_options = {**self._options, **(given or {})}
            try:
                found = self._connected(engine, execution_options, **options)
            except BaseException as error:
                self._left(shard)
                now = time.monotonic()
                until = now + self._router.policy.primary_wait if until is None else until
                if not isinstance(error, OperationalError) or now > until:
                    raise
                failed, engine = engine, self._instead_of(engine, error)
                if engine is failed:  # it is there, and takes no more connections, maybe
                    pause = min(2 * pause + 0.01, LONGEST_PAUSE)
                    sleep(self._routes, pause)
                continue
            if shard is None or self._is_nested or not has_ended(found):
                break
            self._left(shard)
            self._forsake(found, affinity)
        if self._settings.is_needed:
            self._settings.give(found)
        return found

    def _admitted(self, engine: Any) -> tuple[Any, str | None]:
        """Register a transaction that may write on a shard, and wait as long as that is held.

        Returns:
            The engine of the primary, which may be another one by then, and the shard; ``None``
            where there is nothing to register.

        Raises:
            NoPrimary: too many wait already, or there is none after that.
            DeadlineExceeded: the session's deadline is before the end of the hold.
        """
        node = self._routes.node_of(engine) if isinstance(engine, Engine) else None
        if node is None or self._affinity.read_only or node in self._streaming:
            return engine, None
        shard = self._routes.shard_of(node)
        ticket, writes = self._ticket, self._router.writes
        if ticket is None:
            ticket = self._ticket = writes.ticket()
        elif shard in ticket.shards:
            return engine, None
        while (hold := ticket.enter(shard)) is not None:
            most = self._router.policy.max_held
            writes.await_release(ticket, shard, hold, self._routes, self._limit, most)
            engine = self._routes.engine(self._primary_of(shard).node)
        return engine, shard

    @property
    def _is_nested(self) -> bool:
        """There is a savepoint, whose root has the same connections: none can be taken out."""
        transaction: Any = self._transaction
        return transaction is not None and transaction.parent is not None

    def _is_in(self, shard: str) -> bool:
        """Say if the transaction may write on a shard already."""
        return self._ticket is not None and shard in self._ticket.shards

    def _left(self, shard: str | None) -> None:
        if shard is not None and self._ticket is not None:
            self._ticket.leave(shard)

    def _forsake(self, connection: Connection, affinity: Affinity) -> None:
        """Take a member out of the transaction, as if it had never joined.

        Only for one that no statement was answered on: nothing of it is anywhere.
        """
        node = self._routes.node_of(connection.engine)
        transaction: Any = self._transaction
        begun: Any = None
        for key in (connection, connection.engine):
            _, begun, *_ = transaction._connections.pop(key)
        self._optioned -= {connection.engine}
        self._affinity = affinity
        if node is not None and self._group is not None:
            self._group.forsake(self._routes.shard_of(node))
        if not connection.invalidated and is_lost(connection.connection):
            connection.invalidate()
        with suppress(DBAPIError):  # it is lost, and so is what began on it
            begun.close()
        connection.close()
        if node is not None:
            self._routes.expire(node)  # those beside it have ended with it
            self._router.monitor.look(self._routes.shard_of(node))

    def _connected(self, engine: Any, execution_options: Any, **options: Any) -> Connection:
        connect = super()._connection_for_bind
        if self._limit is None:
            found: Connection = connect(engine, execution_options, **options)
            return found
        with waiting_for(self._limit):
            found = connect(engine, execution_options, **options)
        if self._routes.node_of(found.engine) is not None:
            driver: Any = found.connection.driver_connection
            driver.sqlroute_limit = self._limit
        return found

    def _instead_of(self, engine: Any, error: OperationalError) -> Engine:
        """Return the engine of the primary that a shard has now: no connection could be made.

        Nothing was sent, so a transaction that begins may begin elsewhere, or a moment later.

        Raises:
            OperationalError: the one given: it is not a primary's, or the pool's connection broke.
            NoPrimary: nor is there another one in time.
        """
        node = self._routes.node_of(engine) if isinstance(engine, Engine) else None
        if (
            node is None
            or error.statement is not None
            or self._affinity.read_only
            or node in self._streaming
        ):
            raise error
        try:
            target = self._primary_of(self._routes.shard_of(node))
        except SQLRouteError as none:
            raise none from error
        if not target.is_primary:
            raise error
        return self._routes.engine(target.node)

    def _wrote(self, shard: str) -> None:
        if self._group is None:
            self._group = CommitGroup(resolves=self._resolves)
        self._group.wrote(shard)

    def _begin_elsewhere(self, affinity: Affinity, shard: str, error: DBAPIError) -> Engine:
        """Return the engine of the primary on which a transaction begins once more.

        Its first statement on the shard was not answered: the application has seen nothing of it,
        and as nobody has sent COMMIT, nothing of it is done. What it did on other shards stays.

        Args:
            affinity: from before that statement.

        Raises:
            DBAPIError: the one given, where that is not so, or the server is the primary still.
            NoPrimary: there is none in time.
        """
        node = self._affinity.of(shard).pinned
        transaction: Any = self._transaction
        engine = self._routes.engine(node) if node is not None else None
        if self._is_nested or transaction is None or engine not in transaction._connections:
            raise error
        connection: Connection = transaction._connections[engine][0]
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise error
        if not error.connection_invalidated:  # it answers: is it no primary any more?
            now = self._router.look(shard, self._routes).primary(shard)
            if now is not None and now.node == node and now.accepts_writes:
                raise error
        self._forsake(connection, affinity)
        self._left(shard)
        line = str(error.orig).partition("\n")[0]
        self._router.listeners.tell(Retried("begin", shard, node or "", line))
        try:
            return self._routes.engine(self._primary_of(shard).node)
        except SQLRouteError as none:
            raise none from error

    @contextmanager
    def _on(self, shard: str) -> Iterator[None]:
        """Answer whoever asks for a bind meanwhile with this shard, as bulk persistence does."""
        before, self._shard = self._shard, shard
        try:
            yield
        finally:
            self._shard = before

    # what a Session offers besides

    def begin(
        self, nested: bool = False, *, read_only: bool = False, isolation_level: str | None = None
    ) -> Any:
        """Begin a transaction, on primaries unless it is read-only. See ``Session.begin``.

        Args:
            read_only: a real read-only transaction, on one replica of each shard it reads. A write
                in it is refused before it is sent. What a session is declared to be reading does
                likewise.
            isolation_level: ``"READ COMMITTED"``, ``"REPEATABLE READ"`` or ``"SERIALIZABLE"``,
                which runs on the primary. Several shards have no common snapshot.

        Raises:
            UnknownName: no such isolation level.
        """
        if isolation_level is not None:
            isolation_level = str(isolation_level).upper().replace("_", " ")
            if isolation_level not in _ISOLATION_LEVELS:
                known = ", ".join(_ISOLATION_LEVELS)
                raise UnknownName(f"unknown isolation level {isolation_level!r}; known: {known}")
        if nested and (read_only or isolation_level):
            raise PlanError("a savepoint has the mode of its transaction; begin that with it")
        transaction = super().begin(nested=nested)
        if nested:
            self._affinity = self._affinity.begun(read_only=self._affinity.read_only)
            return transaction
        read_only = read_only or self._demand.only_reads
        self._affinity = self._affinity.begun(read_only=read_only)
        if isolation_level is not None:
            self._base = replace(self._base, snapshot=isolation_level)
            self._demand = self._demanded()
            self._options = {"isolation_level": isolation_level}
        if read_only:
            self._options = {**self._options, "postgresql_readonly": True}
        return transaction

    def delete(self, instance: object) -> None:
        """Mark as deleted; what it cascades to is loaded from the primary, which has all of it."""
        with self.writing() if not self._demand.only_reads else nullcontext():
            super().delete(instance)

    def delete_all(self, instances: Any) -> None:
        """Mark several objects as deleted. See ``delete``."""
        with self.writing() if not self._demand.only_reads else nullcontext():
            super().delete_all(instances)

    def merge(self, *arguments: Any, **options: Any) -> Any:
        """Merge; its load decides between INSERT and UPDATE, so it reads from the primary."""
        if self._demand.only_reads:
            return super().merge(*arguments, **options)
        with self.writing():
            if options.get("load", True):
                instance = arguments[0] if arguments else options["instance"]
                self._stale.before_merge(stale.given(instance, self), self._connection_of_state)
            return super().merge(*arguments, **options)

    def merge_all(self, instances: Any, **options: Any) -> Any:
        """Merge several objects. See ``merge``."""
        instances = list(instances)
        if self._demand.only_reads:
            return super().merge_all(instances, **options)
        with self.writing():
            if options.get("load", True):
                states = (s for instance in instances for s in stale.given(instance, self))
                self._stale.before_merge(states, self._connection_of_state)
            return super().merge_all(instances, **options)

    def bulk_save_objects(self, objects: Any, *arguments: Any, **options: Any) -> None:
        """Save objects without the unit of work. See ``Session.bulk_save_objects``."""
        objects = list(objects)
        if objects:
            self._check_may_write("bulk_save_objects")
        states = (sa_inspect(found, raiseerr=False) for found in objects)
        self._stale.before_copy(states, self._connection_of_state)
        super().bulk_save_objects(objects, *arguments, **options)

    def expunge_all(self) -> None:
        """Forget all objects. See ``Session.expunge_all``, which ``close`` and ``reset`` call."""
        super().expunge_all()
        if self._is_sharded:
            self.identity_map = OfAllShards(self._router.written_first)

    # fewer parameters by name: what is only handed on is in options
    def _identity_lookup(  # type: ignore[override]
        self, mapper: Any, primary_key_identity: Any, identity_token: Any = None, **options: Any
    ) -> Any:
        """Look for an object under the token of the shard that its key belongs to."""
        if not self.identity_map._dict:
            return None
        lookup = super()._identity_lookup
        if identity_token is not None or not self._is_sharded:
            return lookup(mapper, primary_key_identity, identity_token=identity_token, **options)
        for token in self._tokens_of(mapper, primary_key_identity):
            found = lookup(mapper, primary_key_identity, identity_token=token, **options)
            if found is not None:
                return found
        return None

    def _tokens_of(self, mapper: Any, identity: Any) -> tuple[str | None, ...]:
        table = mapper.local_table
        declared = declaration(table) if hasattr(table, "info") else None
        if declared is None:
            return (None,)
        topology = self._router.topology
        keyspace = topology.keyspace(declared.keyspace) if declared.keyspace else topology.default
        if not isinstance(declared, Sharded):
            return keyspace.shard_names[:1]
        values = identity if isinstance(identity, tuple) else (identity,)
        row = {c.key: value for c, value in zip(mapper.primary_key, values, strict=False)}
        shard_map = self._router.shard_map_of(keyspace, self._routes)
        try:
            return (shard_map.owner(bucket_of_key(table, row, keyspace.buckets)),)
        except SQLRouteError:
            return keyspace.shard_names


def _in_force(session: Any, statement: Any, local: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the execution options of a statement: of session, statement and call.

    An eager loader's statement has those of the statement it loads for, besides.
    """
    options: Mapping[str, Any] = statement._execution_options
    own = session.execution_options
    if not own and not local:
        return options
    top = local.get("sa_top_level_orm_context")
    if top is not None:
        options = {**top.query._execution_options, **top.execution_options, **options}
    return {**own, **options, **local}


def _after(added: Callable[[ORMExecuteState], Any] | None) -> Callable[[ORMExecuteState], Any]:
    """Return the last listener of all: after that of a caller of SQLAlchemy's own, if any."""
    return _listened if added is None else lambda state: added(state) or _listened(state)


def _listened(state: ORMExecuteState) -> Result[Any]:
    """Plan what the application's own listeners have made of a statement: called after them."""
    session: Any = state.session
    # not state.execution_options: SQLAlchemy has put there what only its first pass needs, and has
    # not put there what the listeners added
    local = {**session._given_options, **state._update_execution_options}
    found: Result[Any] = execute(
        Call(
            session,
            session._execute_internal,
            state.statement,
            state.parameters,
            _in_force(session, state.statement, local),
            local,
            {**state.bind_arguments, "_sa_skip_events": True},
            parent=state,
        )
    )
    return found


def _key_of(state: Any, table: Table) -> dict[str, Any]:
    """Return the shard key of a new object; one that only a Python default gives is made now."""
    row: dict[str, Any] = {}
    for name in shard_key(table).names:
        attribute = state.mapper.get_property_by_column(table.c[name]).key
        value = state.dict.get(attribute)
        if value is None and (value := python_default(table, name)) is not None:
            setattr(state.obj(), attribute, value)
        if value is None or hasattr(value, "get_children"):
            raise missing(table, shard_key(table))
        row[name] = value
    return row


def _after_begin(session: Any, transaction: Any, connection: Connection) -> None:
    """A connection joined the transaction: its node serves what the transaction does there."""
    node = session._routes.node_of(connection.engine)
    if node is None or transaction.nested:
        return
    if node in session._streaming:
        return  # a replica; it has no part in the commit
    shard = session._routes.shard_of(node)
    known = session._router.monitor.health.nodes.get(node)
    life = known.life if known is not None else 0
    proved = session._is_proved
    session._affinity = session._affinity.pinned(shard, node, life, proved=proved)
    if session._affinity.read_only:
        return
    if session._group is None:
        session._group = CommitGroup(resolves=session._resolves)
    if not session.twophase:
        session._group.enlist(shard, connection.connection)


def _after_commit(session: Any) -> None:
    group = session._group
    if group is None:
        return
    router, affinity = session._router, session._affinity
    nodes = router.monitor.health.nodes
    lsns = group.lsns
    writers = group.writers
    for shard, lsn in lsns.items():
        known = nodes.get(affinity.of(shard).pinned)
        position = router.position(shard, known.timeline if known is not None else 0, lsn)
        affinity = affinity.committed(position)
        if shard in writers:
            router.acknowledged(shard, position.timeline, lsn)
    if not all(shard in lsns for shard in writers):
        affinity = _look_behind(session, affinity)  # a two-phase commit of SQLAlchemy's own
        for shard in writers:
            if shard not in lsns and (found := affinity.of(shard).token) is not None:
                router.acknowledged(shard, found.timeline, found.lsn)
    session._affinity = affinity
    if writers:
        seen = (affinity.of(shard).token for shard in writers)
        session._written |= Token(tuple(position for position in seen if position is not None))


def _look_behind(session: Any, affinity: Affinity) -> Affinity:
    """Return the affinity with positions observed after a commit that brought none back."""
    try:
        found: Affinity = session._router.observed(affinity, session._routes)
    except SQLRouteError as error:  # the session stays with the nodes it has written on
        log.warning("the position of a two-phase commit is not known: %s", error)
        return affinity
    return found


def _after_transaction_end(session: Any, transaction: Any) -> None:
    if transaction.nested:
        session._settings.unsettled()
    if transaction.parent is None:
        session._affinity = session._affinity.ended()
        if session._ticket is not None:
            session._ticket.end()
            session._ticket = None
        if session._group is not None:
            session._group = None
        if session._streaming:
            session._streaming = frozenset()
        if session._settings.is_needed:
            session._settings.ended()
        if session._options:
            session._options = _NOTHING
            session._optioned = frozenset()
            session._base = replace(session._base, snapshot=None)
            session._demand = session._demanded()


class RoutingSession(RoutingMixin, Session):
    """A routed ``Session``; made by ``router.sessionmaker()``."""
