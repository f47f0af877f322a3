"""Carry out a plan: run one statement of a session where its plan says, and give one result.

Knows how; never where: that is the plan's. A :class:`Call` is the statement on its way, whichever
door it came through, and the one way back into SQLAlchemy's own execution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from operator import and_
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.orm import QueryContext
from sqlalchemy.sql.dml import Insert, UpdateBase
from sqlalchemy.sql.elements import ClauseElement

from sqlroute.coordination import capped, coordinated
from sqlroute.errors import (
    CrossShardRefused,
    DeadlineExceeded,
    NoEligibleNode,
    NoPrimary,
    SQLRouteError,
    TokenError,
    UnknownName,
)
from sqlroute.events import Fallback, LeftOut, PlanChosen, Retried
from sqlroute.health import FENCE
from sqlroute.identity import is_reference
from sqlroute.references import write_everywhere
from sqlroute.results import check_rows, merged, streamed, time_fetches
from sqlroute.routing.declare import Sharded, declaration
from sqlroute.routing.keys import reference_dialect
from sqlroute.routing.plan import Missing, Plan, Target, Tier
from sqlroute.routing.planner import Described
from sqlroute.routing.policy import (
    Demand,
    Intent,
    consistency_named,
    partial_named,
    role_named,
    tier_named,
)
from sqlroute.routing.rows import keyed_rows
from sqlroute.routing.statement import Kind
from sqlroute.runtime.engines import is_old_plan
from sqlroute.runtime.nothing import no_rows
from sqlroute.runtime.scatter import (
    Spares,
    Work,
    is_abandoned,
    none_spared,
    scatter,
    scatter_async,
)
from sqlroute.stale import before_load, buffering, mark

if TYPE_CHECKING:
    from sqlroute.routing.rewrite import Rewritten
    from sqlroute.session import RoutingMixin

log = logging.getLogger("sqlroute.session")

BIND = "_sqlroute_bind"
"""Key of ``bind_arguments`` under which a plan hands its engine or connection to ``get_bind``."""

OPTIONS = frozenset(
    {
        "sqlroute_consistency",
        "sqlroute_partial",
        "sqlroute_role",
        "sqlroute_shard",
        "sqlroute_tier",
    }
)
"""Execution options of sqlroute; another ``sqlroute_...`` is a mistake and refused."""

_READ = Kind.READ.value

NOT_ON_A_STANDBY = frozenset({"25006", "0A000", "55000"})
"""SQLSTATEs of what a server in recovery refuses, and a primary may not.

A write; an unlogged table, of which it has no rows; a function of primaries.
"""

MAX_ROW_BUFFER = 1_000
"""SQLAlchemy's default of rows that a stream without ``yield_per`` fetches at a time."""

UNKNOWN_NAMES = frozenset({"3F000", "42P01", "42703", "42704", "42883"})
"""SQLSTATEs of an unknown schema, table, column, type or function."""

FENCED_TRIES = 8
"""How often a read is planned anew because a server was fenced."""

FIRST_TRIES = 3
"""How often the first statement of a transaction is begun, where its connection is lost."""

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
        self,
        bind: Any,
        *,
        statement: Any = None,
        token: str | None = None,
        scalar: bool = False,
        stale: bool = False,
    ) -> Any:
        """Execute on an engine (in the transaction) or a connection.

        Args:
            statement: instead of the call's own.
            token: identity token of the objects that are loaded.
            stale: a replica answers, with objects.
        """
        local, buffered = buffering(self.local) if stale else (self.local, False)
        result = self.go_on(
            self.statement if statement is None else statement,
            self.parameters,
            execution_options=local if token is None else {**local, **self._token(token)},
            bind_arguments={**self.bind_arguments, BIND: bind},
            _parent_execute_state=self.parent,
            _scalar_result=scalar and not stale,
        )
        if not stale:
            return result
        mark(result, buffered=buffered)
        self.session._stale.meet()
        return result.scalar() if scalar else result

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

    @property
    def batch(self) -> int | None:
        """How many rows a stream gives at a time, ``None`` where it was not said."""
        loading = self.options.get("_sa_orm_load_options")
        size: int | None = self.options.get("yield_per") or getattr(loading, "_yield_per", None)
        return size


def execute(call: Call) -> Any:
    """Plan a statement and run it.

    Raises:
        PlanError: it cannot be routed; nothing was sent.
        TopologyError: no node can take it now.
    """
    session = call.session
    before_load(call.local)
    _flush_first(call)
    described = session._router.planner.describe(call.statement, call.parameters)
    options = call.options
    named = call.bind_arguments.get("shard")
    if named is not None:
        options = {**options, "sqlroute_shard": named}
    if session._is_sharded and described.shape.reads_entities:
        home = _home(options)
        if home is not None and "sqlroute_shard" not in options:
            options = {**options, "sqlroute_shard": home}
    if options.get("sqlroute_partial") and "sa_top_level_orm_context" not in call.local:
        session.missing_shards = ()
    found, filled = plan(session, described, options)
    if filled:
        call.parameters = filled if isinstance(call.parameters, list | tuple) else filled[0]
    if found.tier is Tier.SINGLE:
        result = _single(call, described, found)
        if session._limit is not None and call.is_streaming and not call.scalar:
            time_fetches(result, _name(found.target), partial(_deadline_left, session))
        return result
    if found.tier is Tier.EMPTY:
        return _empty(call)
    if found.tier is Tier.SCATTER:
        result = _scatter(call, described, found, options)
    elif found.tier is Tier.COORDINATOR:
        return coordinated(
            call, described, found, partial(_planned_again, call, described, options)
        )
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
    *,
    is_real: bool = True,
    may_repeat: bool = False,
) -> tuple[Plan, list[dict[str, Any]] | None]:
    """Return the plan, and for an INSERT by rows its parameters with keys filled in."""
    demand = _demanded(session, options) if options else session._demand
    insert, keys, filled = described.shape.statement.insert, None, None
    if (
        insert is not None
        and demand.shard is None
        and described.shape.statement.keyspace.is_sharded
        and isinstance(declaration(insert), Sharded)
    ):
        if described.shape.statement.row_keys is not None:
            keys = described.rows()
        else:
            filled, keys = keyed_rows(described.statement, described.parameters)
    try:
        found = session._router.plan(
            described,
            session._affinity,
            session._routes,
            demand=demand,
            keys=keys,
            exclude=exclude,
            limit=session._limit,
            is_real=is_real,
            may_repeat=may_repeat,
        )
    except TokenError as error:
        session.refused_token = error
        raise
    if demand.partial and found.tier is Tier.SCATTER:
        _check_partial(session, options)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", found)
    listeners = session._router.listeners
    if not is_real:
        return found, filled
    if listeners.wants(PlanChosen):
        listeners.tell(PlanChosen(found))
    if listeners.wants(Fallback):
        for target in found.targets:
            if target.is_fallback:
                listeners.tell(Fallback(target.shard, target.node, target.reason))
    return found, filled


def _check_partial(session: RoutingMixin, options: Mapping[str, Any]) -> None:
    """Refuse to leave shards out where nobody could tell what the answer means.

    Raises:
        CrossShardRefused: the transaction has written; or a stream may lose a shard midway.
    """
    written = session._group.writers if session._group is not None else ()
    if written:
        raise CrossShardRefused(
            "sqlroute_partial",
            f"the transaction has written on shard {', '.join(written)}, and what it reads must "
            "not be without that; commit first, or leave it out",
        )
    if _is_streaming(options):
        raise CrossShardRefused(
            "sqlroute_partial",
            "a stream may lose a shard when some of its rows were given already; leave yield_per "
            "and stream_results out, or sqlroute_partial",
        )


def _demanded(session: RoutingMixin, options: Mapping[str, Any]) -> Demand:
    """Return what the session and the execution options ask for.

    Raises:
        UnknownName: an option, or the value of one, that nobody knows.
    """
    demand = session._demand
    for name, value in options.items():
        if name == "isolation_level":
            if str(value).upper() in ("REPEATABLE READ", "SERIALIZABLE"):
                demand = replace(demand, snapshot=str(value).upper())
        elif name[:9] != "sqlroute_":
            continue
        elif name == "sqlroute_shard":
            demand = replace(demand, shard=value)
        elif name == "sqlroute_consistency":
            demand = replace(demand, consistency=consistency_named(value))
        elif name == "sqlroute_role":
            demand = replace(demand, role=role_named(value))
        elif name == "sqlroute_tier":
            demand = replace(demand, by_coordinator=tier_named(value))
        elif name == "sqlroute_partial":
            demand = replace(demand, partial=partial_named(value))
        else:
            raise UnknownName(
                f"unknown execution option {name}; known: {', '.join(sorted(OPTIONS))}"
            )
    if session.twophase and not demand.only_reads and _is_streaming(options):
        return replace(demand, intent=Intent.WRITING)  # a replica could not be prepared
    return demand


def merge_of(
    session: RoutingMixin,
    described: Described,
    found: Plan,
    options: Mapping[str, Any],
    *,
    is_real: bool = True,
) -> tuple[Rewritten | None, Plan]:
    """Return what every shard of a scatter is sent, and the plan that tells how it merges.

    Where there is no exact merge and a coordinator may answer: nothing, and the plan for that.

    Raises:
        CrossShardRefused: neither, or the policy forbids to merge; names the clause.
    """
    router = session._router
    health = router.health(session._routes)
    orders = (health.of(target.node).text_order for target in found.targets)
    try:
        merged = router.planner.merge(described, found, reduce(and_, orders))
    except CrossShardRefused:
        if described.shape.statement.keyspace.coordinator is None:
            raise
        return None, plan(session, described, options, is_real=is_real)[0]
    if router.policy.no_scatter:
        raise CrossShardRefused(
            "several shards",
            f"{found.reasons[-1]}, and the policy no_scatter allows one; add the shard key",
        )
    return merged


def explained(
    session: RoutingMixin, described: Described, found: Plan, options: Mapping[str, Any]
) -> Plan:
    """Return a plan with its merge, and with the SQL that each of its nodes would be sent.

    Raises:
        CrossShardRefused: it has no exact merge; names the clause.
    """
    statements = [described.statement] * len(found.targets)
    if found.tier is Tier.SCATTER:
        rewritten, found = merge_of(session, described, found, options, is_real=False)
        if rewritten is None:
            return found
        lists = found.lists or ({},) * len(found.targets)
        statements = [rewritten.statement.params(_by_key(described, own)) for own in lists]
    given = described.parameters if isinstance(described.parameters, Mapping) else {}
    return found._replace(sql=tuple(_sql(statement, given) for statement in statements))


def _sql(statement: Any, given: Mapping[str, Any]) -> str:
    """Return the SQL of a statement, its parameters by name; a list that is not known by a mark."""
    if not isinstance(statement, ClauseElement):  # a sequence
        return repr(statement)
    columns = [*given] if isinstance(statement, Insert) and given else None
    if not isinstance(statement, UpdateBase):
        own: Any = getattr(statement, "_params", {})
        statement = statement.params({k: v for k, v in given.items() if k not in own})
    compile = partial(statement.compile, dialect=reference_dialect(), column_keys=columns)
    try:
        compiled = compile(compile_kwargs={"render_postcompile": True})
    except sa_exc.InvalidRequestError:
        compiled = compile()
    return " ".join(str(compiled).split())


def _single(call: Call, described: Described, found: Plan) -> Any:
    target = found.target
    session = call.session
    token = target.shard if found.epoch and described.shape.reads_entities else None
    if _is_autocommit(call, target):
        return _read(call, described, target, token, scalar=call.scalar)
    engine = session._routes.engine(target.node)
    session._is_proved = target.is_proved
    if not target.in_transaction:
        _begin_reading(session, target)
    if not target.is_primary:
        stale = _is_stale_load(described, target)
        return call.run(engine, token=token, scalar=call.scalar, stale=stale)
    if found.kind == _READ:
        read = partial(call.run, token=token, scalar=call.scalar)
        return _first(call, described, target, read)
    result = _first(call, described, target, partial(_write, call, target, token, call.scalar))
    if described.shape.statement.is_text:
        session._settings.unsettled()  # it may have been ROLLBACK TO SAVEPOINT, or a SET
    if described.shape.statement.sets:
        session._affinity = session._affinity.set_by_hand(target.shard)
    return result


def _empty(call: Call) -> Any:
    """Give a result without rows that is otherwise like any other; no server is asked."""
    with no_rows().connect() as connection:
        return call.run(connection, scalar=call.scalar)


def _is_autocommit(call: Call, target: Target) -> bool:
    """Say if a statement runs outside of any transaction.

    A cursor that stays open needs one; the application may listen for its begin, to set what
    guards its rows; and where the session streams from a node already, another connection to that
    would only be one more.
    """
    session = call.session
    return not (
        target.in_transaction
        or call.is_streaming
        or target.node in session._streaming
        or session._is_listened_to
    )


def _begin_reading(session: RoutingMixin, target: Target) -> None:
    """Let a node serve reads in a transaction that its commit has no part in, if a replica."""
    if not target.is_primary:
        session._streaming |= {target.node}
        session._affinity = session._affinity.reading(
            target.shard, target.node, target.life, proved=target.is_proved
        )


def _first(call: Call, described: Described, target: Target, run: Callable[[Engine], Any]) -> Any:
    """Run a statement on a primary; if it begins the transaction there and is lost, begin anew.

    Not so a text without parameters: it may hold several commands, COMMIT among them.
    """
    session = call.session
    engine = session._routes.engine(target.node)
    may_be_several = described.shape.statement.is_text and not call.parameters
    if may_be_several or session._affinity.read_only or session._is_in(target.shard):
        return run(engine)
    affinity, tries = session._affinity, 0
    while True:
        try:
            return run(engine)
        except sa_exc.DBAPIError as error:
            tries += 1
            if tries == FIRST_TRIES or not _is_lost(error):
                raise
            engine = session._begin_elsewhere(affinity, target.shard, error)


def _write(
    call: Call, target: Target, token: str | None, scalar: bool, engine: Engine | None = None
) -> Any:
    """Write on one shard. Bulk persistence ignores ``bind_arguments``: it asks for a bind."""
    session = call.session
    session._check_enlistable(target)
    session._wrote(target.shard)
    if engine is None:
        engine = session._routes.engine(target.node)
    with session._on(target.shard):
        return call.run(engine, token=token, scalar=scalar)


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
    again, failures, fenced = False, 0, 0
    while True:
        try:
            with session._routes.reading(
                target.node, session._settings.wanted, session._limit
            ) as connection:
                result = call.run(
                    connection,
                    statement=statement,
                    token=token,
                    scalar=scalar,
                    stale=_is_stale_load(described, target),
                )
        except sa_exc.DBAPIError as error:
            if is_abandoned():
                raise
            if statement is None and _is_refused_write(error, target):
                return _on_primary(call, described, target, token, error)
            if is_old_plan(error.orig) and not again:
                again = True  # on the same node: its connections have been replaced
                continue
            options = {**call.options, "sqlroute_shard": shard}
            if _has_old_schema(error, target):
                options["sqlroute_role"] = "primary"
            elif FENCE in str(error.orig) and fenced < FENCED_TRIES:
                fenced += 1  # nothing was sent, and the node is refused as long as it is fenced
            elif _may_be_retried(error):
                exclude |= {target.node}
                failures += 1
            else:
                raise
            session._router.listeners.tell(
                Retried("read", shard, target.node, _line(error), len(exclude) or 1)
            )
            try:
                # the first time only: else a conflict that lasts would be met for ever
                found, _ = plan(session, described, options, exclude, may_repeat=failures == 1)
                target = found.target
            except SQLRouteError as none_left:
                raise none_left from error
            if target.in_transaction:
                raise
        else:
            session._affinity = session._affinity.reading(
                shard, target.node, target.life, proved=target.is_proved
            )
            return result


def _on_primary(
    call: Call, described: Described, refused: Target, token: str | None, error: sa_exc.DBAPIError
) -> Any:
    """Run what a replica has refused as a write on the primary, in the transaction.

    A stable function may call a volatile one; from now on the shape is taken for what it is.

    Raises:
        ReadOnlyRefused: only reads were declared.
    """
    session = call.session
    session._router.listeners.tell(Retried("write", refused.shard, refused.node, _line(error)))
    described.shape.distrust(f"{refused.node} refused it as a write")
    session._router.refused_writes += 1
    try:
        target = session._primary_of(refused.shard)
    except SQLRouteError as cannot:
        raise cannot from error
    return _write(call, target, token, call.scalar)


def _planned_again(
    call: Call, described: Described, options: Mapping[str, Any], exclude: frozenset[str]
) -> Plan:
    """Return the plan for the coordinator after the shards, or their map, were looked at anew."""
    return plan(call.session, described, options, exclude)[0]


def _scatter(call: Call, described: Described, found: Plan, options: Mapping[str, Any]) -> Any:
    from sqlroute.columns import check_columns

    session = call.session
    rewritten, found = merge_of(session, described, found, options)
    if rewritten is None:
        again = partial(_planned_again, call, described, options)
        return coordinated(replace(call, scalar=False), described, found, again)
    if call.is_streaming:  # the shards share a batch: no more rows are held than by one server's
        size = call.batch
        option, whole = ("yield_per", size) if size else ("max_row_buffer", _buffer(call.options))
        share = max(1, whole // len(found.targets))
        call.local = {**call.local, option: share}
    most, statement = session._router.policy.max_scatter_rows, rewritten.statement
    if most and not call.is_streaming:
        statement = capped(statement, most)
        call.local = {**call.local, "preserve_rowcount": True}  # the cursor may be closed by then
    is_partial = options.get("sqlroute_partial", False)
    spares = _is_absence if is_partial else none_spared
    results = _run(session, _works(call, described, found, statement, spares), spares)
    targets = found.targets
    if is_partial:
        targets, results = _present(session, found, results)
    try:
        check_columns(targets, results, rewritten.spec)
    except CrossShardRefused:
        for result in results:
            result.close()
        raise
    names = [_name(target) for target in targets]
    if call.is_streaming:
        for result, name in zip(results, names, strict=True):
            time_fetches(result, name, partial(_time_left, session))
        return streamed(results, rewritten, names, size, share, partial(_fetch, session, names))
    if most:
        check_rows(results, most)
    return merged(results, rewritten, names)


def _works(
    call: Call, described: Described, found: Plan, statement: Any, spares: Spares
) -> list[Work]:
    """Return what each shard of a scatter does, by its name; a spared error is raised there."""
    works: list[Work] = []
    for index, target in enumerate(found.targets):
        own, sent = call, statement
        if found.lists:
            own, sent = _with_lists(call, described, statement, found.lists[index])
        try:
            work = _work(own, described, target, sent)
        except Exception as error:
            if not spares(error):
                raise
            work = partial(_fail, error)
        works.append((_name(target), work))
    return works


def _fail(error: Exception) -> None:
    raise error


def _name(target: Target) -> str:
    return f"{target.shard} ({target.node})"


def _time_left(session: RoutingMixin) -> float:
    """Return how many seconds a statement on several shards, or a batch of its rows, may take."""
    timeout = session._router.policy.scatter_timeout
    return timeout if session._limit is None else min(timeout, session._limit.left())


def _deadline_left(session: RoutingMixin) -> float | None:
    return None if session._limit is None else session._limit.left()


def _run(session: RoutingMixin, works: list[Work], spares: Spares) -> list[Any]:
    """Run the works of a scatter in the time there is, see :mod:`sqlroute.runtime.scatter`."""
    if session._limit is not None:
        session._limit.check("a statement on several shards")
    timeout = _time_left(session)
    if session._routes.is_async:
        return scatter_async(works, timeout, spares)
    return scatter(works, timeout, spares)


def _fetch(
    session: RoutingMixin, names: Sequence[str], fills: Mapping[int, Callable[[], None]]
) -> None:
    """Fetch rows of a stream from one shard, or from several at the same time."""
    if len(fills) == 1:
        (fill,) = fills.values()
        fill()
    else:
        _run(session, [(names[index], fill) for index, fill in fills.items()], none_spared)


def _is_absence(error: BaseException) -> bool:
    """Say if an error means that a shard cannot answer, and not that the statement is wrong.

    A transaction that was lost there earlier is not begun anew: it was one with what it had read.
    """
    absent = NoPrimary | NoEligibleNode | DeadlineExceeded | sa_exc.PendingRollbackError
    return isinstance(error, absent) or (isinstance(error, sa_exc.DBAPIError) and _is_gone(error))


def _present(
    session: RoutingMixin, found: Plan, results: list[Any]
) -> tuple[tuple[Target, ...], list[Any]]:
    """Return the shards that have answered, and their results; tell of those that have not.

    Raises:
        Exception: the first shard's, where none has.
    """
    answers = list(zip(found.targets, results, strict=True))
    present = [(where, what) for where, what in answers if not isinstance(what, Exception)]
    if not present:
        raise results[0]
    absent = [
        Missing(where.shard, where.node, _reason(what))
        for where, what in answers
        if isinstance(what, Exception)
    ]
    missing = (*found.missing, *absent)
    for gone in missing:
        session._router.listeners.tell(LeftOut(gone.shard, gone.node, gone.reason))
    names = (*session.missing_shards, *(gone.shard for gone in missing))
    session.missing_shards = tuple(dict.fromkeys(names))
    return tuple(where for where, _ in present), [what for _, what in present]


def _with_lists(
    call: Call, described: Described, statement: Any, lists: Mapping[str, Any]
) -> tuple[Call, Any]:
    """Return call and statement with what one shard is sent of each list of keys."""
    own = _by_key(described, lists)
    given = call.parameters
    if given:
        call = replace(call, parameters={**given, **{k: v for k, v in own.items() if k in given}})
    return call, statement.params(own)


def _by_key(described: Described, lists: Mapping[str, Any]) -> dict[str, Any]:
    """Return lists by the keys that this statement's bind parameters have; a shape's are others."""
    position, binds = described.shape.position, described.binds
    return {
        binds[position[key]].key if key in position else key: values
        for key, values in lists.items()
    }


def _work(call: Call, described: Described, target: Target, statement: Any) -> Callable[[], Any]:
    """Return what one shard of a scatter does; its connection of the transaction is taken now.

    A Session provisions one connection at a time, so not within the branches.
    """
    if _is_autocommit(call, target):
        return lambda: _read(call, described, target, target.shard, statement=statement)
    if not target.in_transaction:
        _begin_reading(call.session, target)
    connection, stale = call.session._enlisted(target), _is_stale_load(described, target)
    return lambda: call.run(connection, statement=statement, token=target.shard, stale=stale)


def _split(call: Call, found: Plan) -> Result[Any]:
    """Send each row of an INSERT to its shard; the commit makes them one."""
    rows = call.parameters
    if not isinstance(rows, list | tuple) or len(rows) != sum(map(len, found.rows)):
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
        results.append(_write(call, target, target.shard, False))
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
    """Return the shard of the object whose columns are loaded, if that is what happens.

    None of a row that is on every shard: any may answer.
    """
    loading = options.get("_sa_orm_load_options")
    refreshed: Any = getattr(loading, "_refresh_state", None)
    if refreshed is None or refreshed.key is None or is_reference(refreshed.mapper):
        return None
    token: str | None = refreshed.key[2]
    return token


def _is_stale_load(described: Described, target: Target) -> bool:
    """Say if objects come from a replica, and must be checked before they are written."""
    return not target.is_primary and described.shape.reads_entities


def _buffer(options: Mapping[str, Any]) -> int:
    """Return how many rows a stream of which nothing was said fetches at a time."""
    return int(options.get("max_row_buffer", MAX_ROW_BUFFER))


def _is_streaming(options: Mapping[str, Any]) -> bool:
    loading = options.get("_sa_orm_load_options")  # Query.yield_per() is noted there alone
    return bool(
        options.get("yield_per")
        or options.get("stream_results")
        or getattr(loading, "_yield_per", None)
    )


def _line(error: sa_exc.DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]


def _reason(error: Exception) -> str:
    return _line(error) if isinstance(error, sa_exc.DBAPIError) else str(error)


def _is_gone(error: sa_exc.DBAPIError) -> bool:
    """Say if a server was lost, or could not be connected to."""
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or (
        state is None and isinstance(error, sa_exc.OperationalError)
    )


def _is_refused_write(error: sa_exc.DBAPIError, target: Target) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    return not target.is_primary and state in NOT_ON_A_STANDBY and not is_old_plan(error.orig)


def _has_old_schema(error: sa_exc.DBAPIError, target: Target) -> bool:
    """Say if a name is unknown to a replica, which may not have replayed a migration yet."""
    return not target.is_primary and getattr(error.orig, "sqlstate", None) in UNKNOWN_NAMES


def _may_be_retried(error: sa_exc.DBAPIError) -> bool:
    """Say if a failed read outside a transaction may be sent to another node."""
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, sa_exc.OperationalError)
    return error.connection_invalidated or state in RETRIED or state.startswith("08")


def _is_lost(error: sa_exc.DBAPIError) -> bool:
    """Say if a statement was lost with its server, or has met one that is no primary any more."""
    return error.connection_invalidated or getattr(error.orig, "sqlstate", None) == "25006"


@cache
def _token(shard: str) -> dict[str, Any]:
    return {"identity_token": shard}


__all__ = ["BIND", "Call", "Connection", "execute", "explained", "merge_of", "plan"]
