"""Carry out a plan: run one statement of a session where its plan says, and give one result.

Knows how; never where: that is the plan's. A :class:`Call` is the statement on its way, whichever
door it came through, and the one way back into SQLAlchemy's own execution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Connection, Result
from sqlalchemy.orm import QueryContext

from sqlroute.errors import CrossShardRefused, SQLRouteError, UnknownName
from sqlroute.references import write_everywhere
from sqlroute.results import merged
from sqlroute.routing.declare import Sharded, declaration
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.planner import Described
from sqlroute.routing.rows import keyed_rows
from sqlroute.routing.statement import Kind
from sqlroute.runtime.scatter import scatter, scatter_async

if TYPE_CHECKING:
    from sqlroute.routing.rewrite import Rewritten
    from sqlroute.session import RoutingMixin

log = logging.getLogger("sqlroute.session")

BIND = "_sqlroute_bind"
"""Key of ``bind_arguments`` under which a plan hands its engine or connection to ``get_bind``."""

OPTIONS = frozenset({"sqlroute_shard"})
"""Execution options of sqlroute; another ``sqlroute_...`` is a mistake and refused."""

_READ = Kind.READ.value

RETRIED = frozenset({"57P01", "57P02", "57P03", "40001", "40P01"})
"""SQLSTATEs after which a read outside a transaction is tried on another node."""


@dataclass(slots=True)
class Call:
    """One statement on its way.

    Attributes:
        go_on: SQLAlchemy's own execution.
        options: execution options in force: of the session, the statement and the call.
        local: those of the call alone, handed on to SQLAlchemy.
        parent: the ``ORMExecuteState`` of the application's own listeners, if it has any.
        scalar: the caller wants the first column of the first row only.
    """

    session: RoutingMixin
    go_on: Callable[..., Any]
    statement: Any
    parameters: Any
    options: Mapping[str, Any]
    local: Any
    bind_arguments: Mapping[str, Any]
    parent: Any = None
    scalar: bool = False

    def run(
        self, bind: Any, *, statement: Any = None, token: str | None = None, scalar: bool = False
    ) -> Any:
        """Execute on an engine (in the transaction) or a connection.

        Args:
            statement: instead of the call's own.
            token: identity token of the objects that are loaded.
        """
        local = self.local
        return self.go_on(
            self.statement if statement is None else statement,
            self.parameters,
            execution_options=local if token is None else {**local, **self._token(token)},
            bind_arguments={**self.bind_arguments, BIND: bind},
            _parent_execute_state=self.parent,
            _scalar_result=scalar,
        )

    def _token(self, shard: str) -> Mapping[str, Any]:
        """Return the options that give loaded objects their shard, those of RETURNING too."""
        if not getattr(self.statement, "_returning", ()):
            return _token(shard)
        name = "_sa_orm_load_options"
        loading = self.local.get(name, QueryContext.default_load_options)
        return {**_token(shard), name: loading + {"_identity_token": shard}}

    @property
    def is_streaming(self) -> bool:
        return _is_streaming(self.options)


def execute(call: Call) -> Any:
    """Plan a statement and run it.

    Raises:
        PlanError: it cannot be routed; nothing was sent.
        TopologyError: no node can take it now.
    """
    session = call.session
    _flush_first(call)
    described = session._router.planner.describe(call.statement, call.parameters)
    options = call.options
    if session._is_sharded and described.shape.reads_entities:
        home = _home(options)
        if home is not None and "sqlroute_shard" not in options:
            options = {**options, "sqlroute_shard": home}
    found, filled = plan(session, described, options)
    if filled:
        call.parameters = filled if isinstance(call.parameters, list | tuple) else filled[0]
    if found.tier is Tier.SINGLE:
        return _single(call, described, found)
    if found.tier is Tier.SCATTER:
        result = _scatter(call, described, found)
    elif found.tier is Tier.SPLIT:
        result = _split(call, found)
    else:
        result = _broadcast(call, described, found)
    return result.scalar() if call.scalar else result


def plan(
    session: RoutingMixin,
    described: Described,
    options: Mapping[str, Any],
    exclude: frozenset[str] = frozenset(),
) -> tuple[Plan, list[dict[str, Any]] | None]:
    """Return the plan, and for an INSERT by rows its parameters with keys filled in."""
    for name in options:
        if name[:9] == "sqlroute_" and name not in OPTIONS:
            raise UnknownName(
                f"unknown execution option {name}; known: {', '.join(sorted(OPTIONS))}"
            )
    affinity = session._affinity
    if session._writing or (session.twophase and _is_streaming(options)):
        affinity = affinity.begun()  # a replica that streams could not be prepared
    shard = options.get("sqlroute_shard")
    insert, keys, filled = described.shape.statement.insert, None, None
    if (
        insert is not None
        and shard is None
        and described.shape.statement.keyspace.is_sharded
        and isinstance(declaration(insert), Sharded)
    ):
        filled, keys = keyed_rows(described.statement, described.parameters)
    found = session._router.plan(
        described, affinity, session._routes, keys=keys, shard=shard, exclude=exclude
    )
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", found)
    return found, filled


def merge_of(session: RoutingMixin, described: Described, found: Plan) -> tuple[Rewritten, Plan]:
    """Return what every shard of a scatter is sent, and the plan that tells how it merges.

    Raises:
        CrossShardRefused: it has no exact merge; names the clause.
    """
    health = session._router.health(session._routes)
    code_points = all(health.of(target.node).orders_by_code_point for target in found.targets)
    return session._router.planner.merge(described, found, code_points)


def _single(call: Call, described: Described, found: Plan) -> Any:
    target = found.target
    token = target.shard if found.epoch and described.shape.reads_entities else None
    if not target.in_transaction and not call.is_streaming:
        return _read(call, described, target, token, scalar=call.scalar)
    engine = call.session._routes.engine(target.node)
    if not target.in_transaction:
        call.session._streaming |= {target.node}
    if found.kind == _READ:
        return call.run(engine, token=token, scalar=call.scalar)
    return _write(call, target, token=token, scalar=call.scalar)


def _write(call: Call, target: Target, *, token: str | None, scalar: bool = False) -> Any:
    """Write on one shard. Bulk persistence ignores ``bind_arguments``: it asks for a bind."""
    session = call.session
    session._wrote(target.shard)
    with session._on(target.shard):
        return call.run(session._routes.engine(target.node), token=token, scalar=scalar)


def _read(
    call: Call,
    described: Described,
    target: Target,
    token: str | None,
    *,
    statement: Any = None,
    scalar: bool = False,
) -> Any:
    """Run a proved read in AUTOCOMMIT; where a node fails, run it once more on another."""
    session, shard = call.session, target.shard
    exclude: frozenset[str] = frozenset()
    while True:
        try:
            with session._routes.reading(target.node) as connection:
                result = call.run(connection, statement=statement, token=token, scalar=scalar)
        except sa_exc.DBAPIError as error:
            if not _may_be_retried(error):
                raise
            exclude |= {target.node}
            log.info("read failed on %s, trying another node: %s", target.node, error.orig)
            named = {"sqlroute_shard": shard} if session._is_sharded else {}
            try:
                target = plan(session, described, named, exclude)[0].target
            except SQLRouteError as none_left:
                raise none_left from error
            if target.in_transaction:
                raise
        else:
            if not target.is_primary:
                session._affinity = session._affinity.reading(shard, target.node)
            return result


def _scatter(call: Call, described: Described, found: Plan) -> Result[Any]:
    if call.is_streaming:
        raise CrossShardRefused(
            "yield_per", "streaming over several shards comes later; read without it, or by key"
        )
    session = call.session
    rewritten, found = merge_of(session, described, found)
    works = [
        (f"{target.shard} ({target.node})", _work(call, described, target, rewritten.statement))
        for target in found.targets
    ]
    timeout = session._router.policy.scatter_timeout
    if session._routes.is_async:
        results = scatter_async(works, timeout)
    else:
        results = scatter(works, session._router.threads(), timeout)
    return merged(results, rewritten)


def _work(call: Call, described: Described, target: Target, statement: Any) -> Callable[[], Any]:
    """Return what one shard of a scatter does; its connection of the transaction is taken now.

    A Session provisions one connection at a time, so not within the branches.
    """
    if not target.in_transaction:
        return lambda: _read(call, described, target, target.shard, statement=statement)
    connection = call.session._enlisted(target)
    return lambda: call.run(connection, statement=statement, token=target.shard)


def _split(call: Call, found: Plan) -> Result[Any]:
    """Send each row of an INSERT to its shard; the commit makes them one."""
    rows = call.parameters
    if not isinstance(rows, list | tuple):
        raise CrossShardRefused(
            "INSERT ... VALUES",
            "its rows belong to several shards; "
            "pass them as a list of parameters: session.execute(insert(table), rows)",
        )
    if getattr(call.statement, "_returning", ()):
        raise CrossShardRefused(
            "RETURNING", "rows of several shards have no order; insert them shard by shard"
        )
    results = []
    for target, indexes in zip(found.targets, found.rows, strict=True):
        call.parameters = [rows[index] for index in indexes]
        results.append(_write(call, target, token=target.shard))
    first: Result[Any] = results[0]
    return first.merge(*results[1:])


def _broadcast(call: Call, described: Described, found: Plan) -> Result[Any]:
    """Write a reference table: on the first shard, then the same rows on the others."""
    table = described.shape.statement.target
    assert table is not None
    session = call.session
    for target in found.targets:
        session._wrote(target.shard)
    first, *others = [session._enlisted(target) for target in found.targets]
    token = found.target.shard

    def run(statement: Any) -> Any:
        with session._on(token):
            return call.run(first, statement=statement, token=token)

    return write_everywhere(call.statement, table, run, others)


def _flush_first(call: Call) -> None:
    """Flush before planning: what is pending may turn a read into one of the own writes.

    SQLAlchemy flushes later, when the connection is chosen already; whether it would is asked of
    the same options.
    """
    session: Any = call.session
    if session._is_clean():
        return
    if call.statement._propagate_attrs.get("compile_state_plugin") == "orm":
        options = call.options
        for name in ("_sa_orm_load_options", "_sa_orm_update_options"):
            if not getattr(options.get(name), "_autoflush", True):
                return
        if options.get("autoflush") is False:
            return
    session._autoflush()


def _home(options: Mapping[str, Any]) -> str | None:
    """Return the shard of the object whose columns are loaded, if that is what happens."""
    loading = options.get("_sa_orm_load_options")
    refreshed: Any = getattr(loading, "_refresh_state", None)
    if refreshed is None or refreshed.key is None:
        return None
    token: str | None = refreshed.key[2]
    return token


def _is_streaming(options: Mapping[str, Any]) -> bool:
    return bool(options.get("yield_per") or options.get("stream_results"))


def _may_be_retried(error: sa_exc.DBAPIError) -> bool:
    """Say if a failed read outside a transaction may be sent to another node."""
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, sa_exc.OperationalError)
    return error.connection_invalidated or state in RETRIED or state.startswith("08")


@cache
def _token(shard: str) -> dict[str, Any]:
    return {"identity_token": shard}


__all__ = ["BIND", "Call", "Connection", "execute", "merge_of", "plan"]
