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
``_is_clean``, ``_identity_lookup``, ``connection_callable``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import Mapper, ORMExecuteState, Session
from sqlalchemy.sql.base import Executable

from sqlroute.errors import CrossShardRefused, MissingShardKey, SQLRouteError
from sqlroute.execution import BIND, Call, execute, merge_of, plan
from sqlroute.references import copy_after_flush
from sqlroute.routing.affinity import Affinity, Token, parse_lsn
from sqlroute.routing.declare import Reference, Sharded, declaration, shard_key
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.rows import bucket_of_key, missing, python_default
from sqlroute.runtime.commit import CommitGroup

if TYPE_CHECKING:
    from sqlalchemy.sql.schema import Table

    from sqlroute.router import Router

    _Base = Session
else:
    _Base = object

_NOTHING: Mapping[str, Any] = {}


class RoutingMixin(_Base):
    """Routing for any subclass of ``Session``: ``class S(RoutingMixin, sqlmodel.Session)``.

    Args:
        router: knows the servers.
        asynchronous: the session lives under an ``AsyncSession``.
    """

    def __init__(
        self, *arguments: Any, router: Router, asynchronous: bool = False, **options: Any
    ) -> None:
        self._router = router
        self._routes = router.engines(is_async=asynchronous)
        self._affinity = Affinity()
        self._group: CommitGroup | None = None
        self._writing = False
        self._shard: str | None = None
        self._streaming: frozenset[str] = frozenset()
        self._is_sharded = any(k.is_sharded for k in router.topology.keyspaces)
        super().__init__(*arguments, **options)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, Session) and not any(
            issubclass(base, Session) and issubclass(base, RoutingMixin) for base in cls.__bases__
        ):
            event.listen(cls, "after_begin", _after_begin)
            event.listen(cls, "after_commit", _after_commit)
            event.listen(cls, "after_transaction_end", _after_transaction_end)

    @property
    def router(self) -> Router:
        return self._router

    @property
    def tokens(self) -> tuple[Token, ...]:
        """What the session has seen, one token per shard it wrote."""
        ties = self._affinity.shards.values()
        return tuple(tie.token for tie in ties if tie.token is not None)

    def explain(self, statement: Any, parameters: Any = None) -> Plan:
        """Return the plan that this session would make for a statement now, without running it.

        Raises:
            PlanError: it cannot be routed.
            TopologyError: no node can take it now.
        """
        options = dict(getattr(statement, "_execution_options", {}))
        described = self._router.planner.describe(statement, parameters)
        found, _ = plan(self, described, options)
        return merge_of(self, described, found)[1] if found.tier is Tier.SCATTER else found

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
        if is_planned or listeners or not isinstance(statement, Executable):
            return go_on(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
                _parent_execute_state=_parent_execute_state,
                _add_event=_add_event if is_planned else _listened,
                _scalar_result=_scalar_result,
            )
        own = self.execution_options
        options: Mapping[str, Any] = statement._execution_options
        if own or execution_options:
            options = {**own, **options, **execution_options}
        return execute(
            Call(
                self,
                go_on,
                statement,
                params,
                options,
                execution_options,
                given,
                scalar=_scalar_result,
            )
        )

    def _enlisted(self, target: Target) -> Connection:
        """Return the transaction's connection to a node, begun if it is the first."""
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
        targets = [
            self._router.primary_of(shard, self._affinity, self._routes)
            for shard in keyspace.shard_names[1:]
        ]
        for target in targets:
            self._wrote(target.shard)
        return [self._enlisted(target) for target in targets]

    # the second door: flush

    def flush(self, objects: Any = None) -> None:
        """Flush, each object to the shard it belongs to. See ``Session.flush``."""
        arguments = (objects,) if objects is not None else ()
        if not self._is_sharded or self._is_clean():
            super().flush(*arguments)
            return
        # a method where SQLAlchemy declares a protocol with more optional arguments
        self.connection_callable = self._connection_of  # type: ignore[assignment]
        try:
            super().flush(*arguments)
        finally:
            self.connection_callable = None

    def _autoflush(self) -> None:
        if not self._is_clean():
            super()._autoflush()

    def _connection_of(self, _: Mapper[Any], instance: Any, **__: Any) -> Connection:
        """Return the connection that an object is flushed on."""
        state = sa_inspect(instance)
        shard = self._shard_of(state)
        if state.key is None:
            state.identity_token = shard
        self._wrote(shard)
        engine = self._primary_engine(shard)
        connection: Connection = self._connection_for_bind(engine)
        return connection

    def _shard_of(self, state: Any) -> str:
        tables = state.mapper.tables
        declared = next((t for t in tables if declaration(t) is not None), None)
        keyspace = self._router.topology.default
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

        Args:
            shard: name of the shard, needed where nothing else says it:
                ``session.connection(bind_arguments={"shard": "s0"})``.

        Raises:
            CrossShardRefused: several shards, and nothing says which.
        """
        chosen = arguments.get(BIND)
        if chosen is not None or bind is not None:
            found: Engine | Connection = chosen if chosen is not None else bind
            return found
        shard = shard or self._shard or self._only_shard(mapper)
        self._router.topology.shard(shard)
        self._wrote(shard)
        return self._primary_engine(shard)

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
        target = self._router.primary_of(shard, self._affinity, self._routes)
        return self._routes.engine(target.node)

    def _connection_for_bind(
        self, engine: Any, execution_options: Any = None, **options: Any
    ) -> Connection:
        if isinstance(engine, Connection):  # a read, or a member of the transaction already
            if self._transaction is None:
                self._autobegin_t()
            return engine
        found: Connection = super()._connection_for_bind(engine, execution_options, **options)
        return found

    def _wrote(self, shard: str) -> None:
        if self._group is None:
            self._group = CommitGroup()
        self._group.wrote(shard)

    @contextmanager
    def _on(self, shard: str) -> Iterator[None]:
        """Answer whoever asks for a bind meanwhile with this shard, as bulk persistence does."""
        before, self._shard = self._shard, shard
        try:
            yield
        finally:
            self._shard = before

    def _ask_positions(self, group: CommitGroup) -> None:
        """Ask for the positions that SQLAlchemy's own two-phase commit has not brought along."""
        for shard in group.writers:
            node = self._routes.node_of(self._primary_engine(shard))
            assert node is not None
            with self._routes.reading(node) as connection:
                found = connection.exec_driver_sql("SELECT pg_current_wal_flush_lsn()")
                group.lsns[shard] = parse_lsn(found.scalar_one())

    # what a Session offers besides

    def begin(self, nested: bool = False) -> Any:
        """Begin a transaction on the primaries. See ``Session.begin``."""
        transaction = super().begin(nested=nested)
        self._affinity = self._affinity.begun()
        return transaction

    def merge(self, *arguments: Any, **options: Any) -> Any:
        """Merge; its load decides between INSERT and UPDATE, so it reads from the primary."""
        with self._as_write():
            return super().merge(*arguments, **options)

    @contextmanager
    def _as_write(self) -> Iterator[None]:
        before, self._writing = self._writing, True
        try:
            yield
        finally:
            self._writing = before

    def _identity_lookup(  # type: ignore[override]
        self, mapper: Any, primary_key_identity: Any, identity_token: Any = None, **options: Any
    ) -> Any:
        """Look for an object under the token of the shard that its key belongs to."""
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
            return keyspace.shard_names
        values = identity if isinstance(identity, tuple) else (identity,)
        row = {c.key: value for c, value in zip(mapper.primary_key, values, strict=False)}
        shard_map = self._router.shard_map_of(keyspace, self._routes)
        try:
            return (shard_map.owner(bucket_of_key(table, row, keyspace.buckets)),)
        except SQLRouteError:
            return keyspace.shard_names


def _listened(state: ORMExecuteState) -> Result[Any]:
    """Plan what the application's own listeners have made of a statement: called after them."""
    session: Any = state.session
    found: Result[Any] = execute(
        Call(
            session,
            session._execute_internal,
            state.statement,
            state.parameters,
            state.execution_options,
            state.local_execution_options,
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
    """A connection joined the transaction: a primary pins its shard and joins the commit."""
    node = session._routes.node_of(connection.engine)
    if node is None or transaction.nested:
        return
    if node in session._streaming:
        return  # a replica; it has no part in the commit
    shard = session._router.topology.shard_of_node[node]
    session._affinity = session._affinity.pinned(shard)
    if session._group is None:
        session._group = CommitGroup()
    if not session.twophase:
        session._group.enlist(shard, connection.connection)


def _after_commit(session: Any) -> None:
    group = session._group
    if group is None:
        return
    router = session._router
    if session.twophase:
        session._ask_positions(group)
    health = router.monitor.health
    for shard, lsn in group.lsns.items():
        primary = health.primary(shard)
        timeline = primary.timeline if primary is not None else 0
        epoch = router.epoch_of(shard)
        session._affinity = session._affinity.committed(Token(shard, epoch, timeline, lsn))


def _after_transaction_end(session: Any, transaction: Any) -> None:
    if transaction.parent is None:
        session._affinity = session._affinity.ended()
        session._group = None
        session._streaming = frozenset()


class RoutingSession(RoutingMixin, Session):
    """A routed ``Session``; made by ``router.sessionmaker()``."""
