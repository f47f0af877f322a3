"""RoutingSession under a Session's own arguments: ``Session(engine)``, ``binds=``, ``bind=``.

The suite gives every Session its engine, a RoutingSession wants a router. So each engine of the
test database is the primary of a router of its own, and its :class:`StandInEngine` the replica;
all that comes after is sqlroute's: planning, affinity, reads in AUTOCOMMIT, the commit group. A
session that is bound to anything else (SQLite, a mock, a Connection) keeps SQLAlchemy's meaning.
"""

from __future__ import annotations

import time
import weakref
from concurrent.futures import Future
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from sqlroute import Router
from sqlroute.execution import BIND
from sqlroute.health import Health, Observation, observe
from sqlroute.routing.policy import Policy, pool_limits
from sqlroute.routing.token import Position, Token, parse_lsn
from sqlroute.runtime.dialect import start_reading
from sqlroute.runtime.engines import Engines
from sqlroute.session import RoutingMixin, _after_begin, _after_commit, _after_transaction_end
from sqlroute.topology import Keyspace, Node, Secret, Shard, Topology
from tests.upstream import settings
from tests.upstream.dialect import Outside, StandInEngine, Watched, counts

TOLD = settings.load()
PRIMARY, REPLICA, SHARD = "s0-a", "s0-b", "s0"
NEWEST = 2**62


def _nodes() -> tuple[Node, ...]:
    places = (TOLD.nodes * 2)[:2]  # without a standby both are the same server
    login = Secret(TOLD.password)
    return tuple(
        Node(name, host, port, TOLD.database, TOLD.user, login)
        for name, (host, port) in zip((PRIMARY, REPLICA), places, strict=True)
    )


TOPOLOGY = Topology((Keyspace("main", (Shard(SHARD, _nodes()),)),))
POLICY = Policy(max_lag=3600.0, token_wait=60.0)


class _SameServer:
    """In place of the monitor, where the replica is the primary's server: always up, never late."""

    idle: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.health = Health.initial(TOPOLOGY)
        self.ask(SHARD, 0.0)

    def ask(self, shard: str, timeout: float) -> Health:
        now = time.monotonic()
        lsn: dict[str, Any] = {"lsn": NEWEST, "timeline": 1}
        primary = Observation(PRIMARY, now, is_primary=True, accepts_writes=True, **lsn)
        replica = Observation(REPLICA, now, received_lsn=NEWEST, replay_age=0.0, **lsn)
        for observation in (primary, replica):
            self.health = observe(self.health, observation, now)
        return self.health

    @property
    def last_health(self) -> Health:
        """What was seen last is what is."""
        return self.health

    def asking(self, shard: str) -> Future[None]:
        """The answer is there."""
        self.ask(shard, 0.0)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def tell(self, shard: str) -> None:
        """Nobody asks."""

    def report_failure(self, node: str, error: object) -> None:
        """A test that breaks its connection breaks no server."""

    def close(self) -> None:
        """There is no thread to end."""


def _watch() -> Any:
    if TOLD.mode != "standby":
        return _SameServer()
    router = Router(TOPOLOGY, POLICY)
    router.health()  # looks at the servers once, before any test
    return router.monitor


_monitor: Any = _watch()


class GivenEngines(Engines):
    """The engines of one test: the one it made, and its stand-in for the replica."""

    def __init__(self, given: Engine | None) -> None:
        is_async = given is not None and given.dialect.is_async
        super().__init__(
            TOPOLOGY,
            POLICY,
            is_async=is_async,
            on_failure=lambda *_: False,
            on_stale_map=lambda _: None,
            on_answer=lambda *_: None,
            limits=lambda _: pool_limits(POLICY, 0),
        )
        self._given = given
        self.start_reading = start_reading

    def _create(self, node: Node) -> tuple[Engine, Any]:
        assert self._given is not None
        return (self._given if node.name == PRIMARY else _stand_in(self._given)), None

    def _listen(self, engine: Engine, name: str) -> None:
        if name == REPLICA:  # the engine of a test has the listeners of the test alone
            super()._listen(engine, name)


class GivenRouter(Router):
    """The router around the engine of a test."""

    def __init__(self, given: Engine | None = None) -> None:
        super().__init__(TOPOLOGY, POLICY)
        self.monitor = _monitor
        self._usage.start(TOPOLOGY.keyspace_of_shard)
        self._has_looked = True
        engines = GivenEngines(given)
        self._engines = {False: engines, True: engines}


NOWHERE = GivenRouter()


def router_of(bind: Any) -> GivenRouter | None:
    """Return the router around an engine of the test database, ``None`` for any other bind."""
    if not isinstance(bind, Engine) or not isinstance(bind.dialect, Watched):
        return None
    url = bind.url
    if (url.host, url.port, url.database) != (*TOLD.nodes[0], TOLD.database):
        return None
    found: GivenRouter | None = bind.__dict__.get("_upstream_router")
    if found is None:
        found = bind.__dict__["_upstream_router"] = GivenRouter(bind)
    return found


def _stand_in(given: Engine) -> Engine:
    return StandbyEngine(given, {}) if TOLD.mode == "standby" else StandInEngine(given, {})


class StandbyEngine(StandInEngine):
    """A stand-in with a pool of its own, of connections to the standby."""

    @property
    def pool(self) -> Any:  # type: ignore[override]
        own = self._proxied.pool
        twin = own.__dict__.get("_upstream_twin")
        if twin is None:
            twin = own.__dict__["_upstream_twin"] = own.recreate()
            host, port = TOLD.nodes[1]
            arguments, options = self.dialect.create_connect_args(
                self.url.set(host=host, port=port)
            )
            twin._creator = lambda: self.dialect.connect(*arguments, **options)
        return twin


_dispose = Engine.dispose


def _dispose_both(self: Engine, close: bool = True) -> None:
    twin = self.pool.__dict__.pop("_upstream_twin", None)
    if twin is not None and close:
        twin.dispose()
    _dispose(self, close)


class Ledger:
    """What has been committed, and by which session: all others must see it.

    It keeps the newest position, and the newest one of somebody else than who made that.
    """

    def __init__(self) -> None:
        self._newest: tuple[int, Any] = (0, None)
        self._other: tuple[int, Any] = (0, None)

    def add(self, lsn: int, owner: Any) -> None:
        if lsn <= self._newest[0]:
            return
        if self._newest[1] is None or self._newest[1]() is not owner:
            self._other = self._newest
        self._newest = (lsn, None if owner is None else weakref.ref(owner))

    def seen_by(self, session: Any) -> int:
        lsn, owner = self._newest
        return self._other[0] if owner is not None and owner() is session else lsn


ledger = Ledger()


def _follow(session: Any) -> None:
    """Have a session follow what others have committed; its own commits are the router's job."""
    if Outside.happened:
        Outside.happened = False
        ledger.add(_position(), None)
    lsn = ledger.seen_by(session)
    if lsn:
        timeline = _monitor.health.primary(SHARD).timeline
        session.follow(Token((Position(SHARD, 0, timeline, lsn),)))


_asking: list[Any] = []


def _position() -> int:
    import psycopg

    if not _asking:
        _asking.append(psycopg.connect(**TOPOLOGY.node(PRIMARY).conninfo(), autocommit=True))
    (found,) = _asking[0].execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    return parse_lsn(found)


def _own_commit(session: Any) -> None:
    position = session._affinity.token.of(SHARD)
    if position is not None:
        ledger.add(position.lsn, session)


class JudgedSession(RoutingMixin, Session):
    """RoutingSession for the arguments of Session."""

    def __init__(self, bind: Any = None, **options: Any) -> None:
        router = router_of(bind) or NOWHERE
        is_async = router._engines[False].is_async
        options.setdefault("stale_writes", TOLD.stale_writes)
        super().__init__(bind, router=router, asynchronous=is_async, **options)

    @property
    def bind(self) -> Any:
        """What a test gave: a session of the product has a router instead, and shows its engine."""
        return self._bound

    @bind.setter
    def bind(self, bind: Any) -> None:
        self._bound = bind

    def _execute_internal(self, statement: Any, params: Any = None, **options: Any) -> Any:
        given = options.get("bind_arguments") or {}
        if BIND not in given and "bind" not in given:
            if self.bind is None and not self.binds:  # SQLAlchemy says so better than a router
                return Session._execute_internal(self, statement, params, **options)
            if TOLD.mode == "standby":
                _follow(self)
        return super()._execute_internal(statement, params, **options)

    def _own_bind(self, mapper: Any, clause: Any = None) -> Any:
        """Have routed what is bound to the test database, leave the rest to SQLAlchemy."""
        found = Session.get_bind(self, mapper, clause=clause)
        if self._adopts(found):
            return None
        counts["questions for a bind that is not routed"] += 1
        return found

    def _adopts(self, bind: Any) -> bool:
        """Say if a bind is routed; a session keeps its router while a transaction is open."""
        router = router_of(bind)
        if router is None:
            return False
        if router is not self._router:
            if self._transaction is not None and self._transaction._connections:
                return False
            self._router, self._routes = router, router._engines[False]
        return True


_LISTENERS = (
    ("after_begin", _after_begin),
    ("after_commit", _after_commit),
    ("after_commit", _own_commit),
    ("after_transaction_end", _after_transaction_end),
)


def listen_again() -> None:
    """Listen as RoutingMixin does, where the suite has cleared the events of every Session."""
    for name, function in _LISTENERS:
        heard = getattr(JudgedSession.dispatch, name)._clslevel.get(JudgedSession, ())
        if function not in heard:
            event.listen(JudgedSession, name, function)


if TOLD.mode == "standby":
    Engine.dispose = _dispose_both  # type: ignore[method-assign]
    event.listen(JudgedSession, "after_commit", _own_commit)
