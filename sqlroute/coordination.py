"""Carry out a plan for the coordinator: one statement, checked in its own round trip.

What the coordinator answers counts only if the check passes that goes out behind the statement: its
definition is the shards' schema and shard map, and it has read from the nodes of the plan: from the
primaries that this router knows, at or past what the session has seen, or from replicas that were
known to have that before. Every failure becomes an error that says the way out; the session's own
transaction has no part in any of it. What replicas could not answer, primaries are asked.

Settings of the session are set on the coordinator. That is enough: ``postgres_fdw`` sends shards
only what no setting changes, and tables with row-level security are not there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.selectable import GenerativeSelect

from sqlroute.errors import (
    CoordinatorDenied,
    CoordinatorError,
    CoordinatorMissing,
    CoordinatorStale,
    CoordinatorUnavailable,
    CrossShardRefused,
    DeadlineExceeded,
    SQLRouteError,
)
from sqlroute.events import Retried
from sqlroute.identity import BY_KEY, tokens_by_key
from sqlroute.results import at_once, in_batches
from sqlroute.routing.plan import Plan
from sqlroute.routing.token import format_lsn
from sqlroute.runtime.lending import around, lent, without
from sqlroute.runtime.limits import Limit
from sqlroute.runtime.settings import literal

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from sqlroute.execution import Call
    from sqlroute.health import Health
    from sqlroute.routing.plan import Target
    from sqlroute.routing.planner import Described
    from sqlroute.session import RoutingMixin
    from sqlroute.topology import Keyspace

log = logging.getLogger("sqlroute.session")

TRIES = 3
"""How often a statement is planned anew because a shard did not answer, or has a new primary."""

GRACE = 2.0
"""Seconds that the coordinator has to say itself that a statement takes too long."""

NOT_INSTALLED, STALE, OLD_ROUTER, BEHIND = "SR011", "SR012", "SR013", "SR014"
"""SQLSTATEs of ``sqlroute.coordinator_check``."""

Floor = tuple[int | None, str | None, float | None]
"""What the check expects of a shard: the timeline of its primary, a position, and the start of the
server that is a replica."""

_NAME = "name"
"""The clause of an error of a name that is unknown there."""

_REFRESH = "run `sqlroute coordinator refresh`"
_UNKNOWN = frozenset({"3F000", "42P01", "42703", "42704", "42883"})
_DENIED = frozenset({"42501", "2F003", "28000", "28P01"})
_GONE = frozenset({"57P01", "57P02", "57P03", "25006"})
_ROWS_ONLY = {"prebuffer_rows": False, "yield_per": None, "stream_results": False}
_ON_REPLICAS_ONLY = frozenset({"0A000", "25006", "40001", "40P01", "55000", "57P04"})
_LEFT_OUT = "SELECT key, value FROM sqlroute.coordinator, jsonb_each_text(left_out) ORDER BY 1"


def coordinated(
    call: Call, described: Described, found: Plan, plan_again: Callable[[frozenset[str]], Plan]
) -> Any:
    """Run a statement on a coordinator.

    Args:
        plan_again: returns a new plan after the shards were looked at anew, without databases that
            could not answer from replicas.

    Raises:
        CrossShardRefused: the session's own writes would be missing, or it uses what is not there.
        CoordinatorError: it cannot answer; says why and the way out.
        TooManyRows, DeadlineExceeded: it was more than is allowed.
    """
    session = call.session
    _check_unwritten(session, found)
    keyspace = described.shape.statement.keyspace
    tries, failed = 1, frozenset[str]()
    while True:
        node = found.coordinators[0]
        try:
            result = _on_any(call, described, found)
        except (SQLRouteError, DBAPIError) as error:
            if _is_of_replicas(error, found):
                failed |= {node}
                if isinstance(error, CoordinatorError):  # not this statement's own matter
                    session._router.readers.set_aside(node, str(error))
            elif not isinstance(error, CoordinatorUnavailable) or tries == TRIES:
                raise
            else:
                tries += 1
            session._router.listeners.tell(
                Retried("read", ", ".join(found.shards), node, str(error), tries + len(failed))
            )
            _look_anew(session, keyspace, found)
            found = plan_again(failed)
            if not found.coordinators:  # with the map as it is now, one shard has all of it
                raise
        else:
            session._router.readers.answered(node)
            for target in found.targets:  # none may read what is older from now on
                session._affinity = session._affinity.reading(
                    target.shard, target.node, target.life, proved=target.is_proved
                )
            return result


def estimated(session: RoutingMixin, statement: Any, parameters: Any, found: Plan) -> Plan:
    """Return a plan for the coordinator with what PostgreSQL thinks it costs."""
    keyspace = session._router.topology.keyspace_of_shard[found.shards[0]]
    try:
        with _lent(session, keyspace, found.coordinators[0], found) as connection:
            (document,) = connection.execute(_Explain(statement), parameters or {}).scalar_one()
    except (DBAPIError, SQLRouteError) as error:
        line = str(getattr(error, "orig", error)).partition("\n")[0]
        return found._replace(merge=(f"no estimate: {line}",))
    top = document["Plan"]
    scans = sum(1 for node in _nodes(top) if node["Node Type"] == "Foreign Scan")
    return found._replace(
        merge=(
            f"PostgreSQL estimates {top['Plan Rows']} rows at a cost of {top['Total Cost']}, "
            f"by {scans} statement{'s' * (scans != 1)} to shards",
        ),
    )


def _is_of_replicas(error: Exception, found: Plan) -> bool:
    """Say if primaries may answer what replicas have not.

    They may be gone, hold what the statement needs no more (a conflict with recovery) or not yet (a
    migration), or never have had it (an unlogged table).
    """
    if not found.replicas:
        return False
    if isinstance(error, CrossShardRefused):
        return error.clause == _NAME
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return isinstance(error, CoordinatorError) or state in _ON_REPLICAS_ONLY


class _Explain(Executable, ClauseElement):
    inherit_cache = False

    def __init__(self, statement: Any) -> None:
        self.statement = statement


@compiles(_Explain)
def _compile_explain(element: _Explain, compiler: Any, **options: Any) -> str:
    return f"EXPLAIN (FORMAT JSON) {compiler.process(element.statement, **options)}"


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for part in plan.get("Plans", ()) for node in _nodes(part))]


def _check_unwritten(session: RoutingMixin, found: Plan) -> None:
    """Refuse to read past the session's own writes, which no other connection sees yet.

    Raises:
        CrossShardRefused: the transaction has written.
    """
    group = session._group
    written = sorted(set(group.writers).intersection(found.shards)) if group is not None else []
    if written:
        raise CrossShardRefused(
            "own writes",
            f"the transaction has written on shard {', '.join(written)}, and the coordinator, "
            "which this statement needs, sees only what is committed; commit first, or restrict "
            f"the statement to one shard by its key ({found.reasons[-2]})",
        )


def _on_any(call: Call, described: Described, found: Plan) -> Any:
    """Run on the first coordinator that can answer; where none can, say why the first cannot."""
    first: CoordinatorError | None = None
    for node in found.coordinators:
        if first is not None:
            log.warning("%s is asked instead: %s", node, first)
        try:
            return _on(call, described, node, found)
        except CoordinatorDenied:
            raise
        except CoordinatorError as error:
            first = first or error
    assert first is not None
    raise first


def _on(call: Call, described: Described, node: str, found: Plan) -> Any:
    session, keyspace = call.session, described.shape.statement.keyspace
    coordinator = keyspace.coordinator
    assert coordinator is not None
    reads_entities = described.shape.reads_entities
    once = replace(
        call,
        statement=capped(call.statement, coordinator.max_rows),
        local={**call.local, **_ROWS_ONLY},
    )
    try:
        with (
            _lent(session, keyspace, node, found) as connection,
            _counted(session, found, connection),
        ):
            try:
                with tokens_by_key(session):
                    result = once.run(
                        connection,
                        token=BY_KEY if reads_entities else None,
                        stale=bool(found.replicas) and reads_entities,
                    )
            except DBAPIError as error:
                reason = _explained(error, node, coordinator.timeout) or _diagnosed(
                    error, connection, _check(session, keyspace, found), node
                )
                if reason is None:
                    raise
                raise reason from error
    except OperationalError as error:
        if error.statement is not None:
            raise
        raise _unreachable(error, node) from error
    _check_lives(session, found)
    if call.is_streaming and not call.scalar:
        return in_batches(result, session, call.batch)
    made = at_once(result, session)
    return made.scalar() if call.scalar else made


def _lent(
    session: RoutingMixin, keyspace: Keyspace, node: str, found: Plan
) -> AbstractContextManager[Connection]:
    """Lend a connection for the one statement of a plan."""
    coordinator = keyspace.coordinator
    assert coordinator is not None
    engines = session._router.coordinators(is_async=session._routes.is_async)
    surrounding = around(
        session._settings.wanted,
        _check(session, keyspace, found),
        timeout=coordinator.timeout,
        max_rows=coordinator.max_rows,
    )
    limit = Limit.after(coordinator.timeout + GRACE, within=session._limit)
    return lent(engines.engine(node), surrounding, limit)


def _counted(
    session: RoutingMixin, found: Plan, connection: Connection
) -> AbstractContextManager[None]:
    """Count a statement among the reads of the replicas that are read for it."""
    driver = connection.connection.driver_connection
    return session._routes.reading_through((each.node for each in found.replicas), driver)


def _check_lives(session: RoutingMixin, found: Plan) -> None:
    """Refuse what was read from a replica that has begun anew since it was chosen.

    After a crash it begins from before what it had shown, which is what it was chosen by.

    Raises:
        CoordinatorUnavailable: names it.
    """
    health = session._router.health(session._routes)
    for target in found.replicas:
        known = health.nodes.get(target.node)
        if known is None or known.life != target.life:
            raise CoordinatorUnavailable(
                f"{target.node}, which coordinator {found.coordinators[0]} has read, has begun "
                "anew meanwhile; try again",
                found.coordinators[0],
            )


def _check(session: RoutingMixin, keyspace: Keyspace, found: Plan) -> str:
    """Return the command that fails unless the coordinator has seen what it must."""
    health = session._router.health(session._routes)
    floors = {target.shard: _floor(session, health, target) for target in found.targets}
    return (
        f"SELECT sqlroute.coordinator_check({literal(keyspace.name)}, {found.epoch}, "
        f"{literal(json.dumps(floors))}::jsonb)"
    )


def _floor(session: RoutingMixin, health: Health, target: Target) -> Floor:
    """Return what must be true of the node that a shard was read from."""
    if not target.is_primary:
        known = health.of(target.node)
        return None, format_lsn(known.lsn), known.started
    timeline = health.shard(target.shard).highest_timeline
    token = session._affinity.of(target.shard).token
    is_known = token is not None and token.timeline in (0, timeline)
    return timeline, format_lsn(token.lsn) if token is not None and is_known else None, None


def capped(statement: Any, max_rows: int) -> Any:
    """Return a statement that does not send many more rows than are allowed, where that is easy."""
    if (
        not isinstance(statement, GenerativeSelect)
        or statement._limit_clause is not None
        or statement._fetch_clause is not None
    ):
        return statement
    return statement.limit(max_rows + 1)


def _look_anew(session: RoutingMixin, keyspace: Keyspace, found: Plan) -> None:
    router, engines = session._router, session._routes
    for shard in found.shards:
        router.look(shard, engines)
    router.renew_map(keyspace, engines)


def _explained(error: DBAPIError, node: str, timeout: float = 0.0) -> SQLRouteError | None:
    """Return the error that a failure means by its SQLSTATE alone."""
    state = getattr(error.orig, "sqlstate", None) or ""
    line = str(error.orig).partition("\n")[0]
    if state == NOT_INSTALLED:
        return _missing(node, line)
    if state == STALE:
        return CoordinatorStale(f"coordinator {node} is stale: {line}; {_REFRESH}", node)
    if state in (OLD_ROUTER, BEHIND):
        return CoordinatorUnavailable(
            f"coordinator {node} and this program see other shards: {line}; try again", node
        )
    if state == "57014" and "statement timeout" in line:
        return DeadlineExceeded(
            f"coordinator {node} did not answer within timeout = {timeout:g} s; "
            "restrict the statement, or raise it in the coordinator's table of the configuration"
        )
    if state in _DENIED or "user mapping not found" in line:
        return CoordinatorDenied(
            f"coordinator {node} may not answer: {line}; grant the right there and on the shards, "
            "partitions included, see `sqlroute coordinator check`",
            node,
        )
    if error.connection_invalidated or not state:
        return _unreachable(error, node)
    if state.startswith("08") or state in _GONE:
        return CoordinatorUnavailable(
            f"coordinator {node} cannot read a shard: {line}; try again, see `sqlroute status`, "
            f"and where the shard has other nodes now {_REFRESH}",
            node,
        )
    return None


def _missing(node: str, line: str) -> CoordinatorMissing:
    return CoordinatorMissing(
        f"coordinator {node} is not ready: {line}; run `sqlroute coordinator install`", node
    )


def _unreachable(error: DBAPIError, node: str) -> CoordinatorUnavailable:
    line = str(error.orig).partition("\n")[0]
    return CoordinatorUnavailable(
        f"coordinator {node} does not answer: {line}; start it, or name another in nodes", node
    )


def _diagnosed(
    error: DBAPIError, connection: Connection, check: str, node: str
) -> SQLRouteError | None:
    """Return what is wrong with the coordinator, or what the statement misses there, if so.

    A definition that is stale shows as any error: of a column that went, of a type.
    """
    without(connection)
    connection.rollback()
    try:
        connection.exec_driver_sql(check.replace("%", "%%"))
        left_out = connection.exec_driver_sql(_LEFT_OUT).all()
    except DBAPIError as cause:
        state = getattr(cause.orig, "sqlstate", None)
        if state in _UNKNOWN:
            return _missing(node, str(cause.orig).partition("\n")[0])
        return _explained(cause, node)
    state, line = getattr(error.orig, "sqlstate", None), str(error.orig).partition("\n")[0]
    if state in _UNKNOWN:
        why = "".join(f"; left out: {table} ({reason})" for table, reason in left_out)
        return CrossShardRefused(_NAME, f"{line} on coordinator {node}{why}")
    if state == "42803":
        return CrossShardRefused(
            "GROUP BY", f"{line}; the coordinator knows no primary keys, name each column"
        )
    return None
