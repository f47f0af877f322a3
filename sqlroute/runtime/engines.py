"""Node -> SQLAlchemy engine: one QueuePool per node, made when first needed, disposed once.

Counts what is under way on each node (for choosing) and can cut reads that wait on a node which
is known to be gone, so that a hung server costs a retry instead of a hung request. After a fork
the child forgets its parent's connections without touching their sockets.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

from sqlroute.errors import StaleShardMap
from sqlroute.routing.policy import Policy, PoolLimits
from sqlroute.runtime.limits import Limit, waiting_for
from sqlroute.runtime.scatter import cut
from sqlroute.runtime.settings import with_begin
from sqlroute.topology import Node, Topology

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import ExceptionContext

DriverError = Callable[[str, BaseException], bool]
"""Told of a node that failed; says whether it counts against the node."""

Observer = Callable[[str, float, str], None]
"""Told of a node that has answered a statement, after how many seconds, and with what error."""

_NONE: Mapping[str, str] = MappingProxyType({})

GONE = frozenset({"57P01", "57P02", "57P03", "25006"})
"""SQLSTATEs after which a node must be looked at anew: shutting down, or no primary (any more)."""


class Engines:
    """The engines of one flavour, sync or async.

    Attributes:
        is_async: whether connections need an event loop.
        loads: the reads under way per node; its length is the hint for choosing.
        answered: how many reads each node has answered; threads may lose a count.
    """

    def __init__(
        self,
        topology: Topology,
        policy: Policy,
        *,
        is_async: bool,
        on_failure: DriverError,
        on_stale_map: Callable[[str], None],
        on_answer: Callable[[str, float], None],
        limits: Callable[[str], PoolLimits],
    ) -> None:
        self.is_async = is_async
        self.loads: dict[str, set[object]] = {}
        self.answered: dict[str, int] = {}
        self._topology = topology
        self._policy = policy
        self._on_failure = on_failure
        self._on_stale_map = on_stale_map
        self.on_answer = on_answer
        self._limits = limits
        self.start_reading: Callable[[Any, Any], None]  # known when there is an engine
        self._observer: Observer | None = None
        self._engines: dict[str, Engine] = {}
        self._asyncs: dict[str, Any] = {}
        self._names: dict[Engine, str] = {}
        self._shards: dict[str, str] = {}
        self._lock = threading.Lock()
        _fork_aware.add(self)

    def engine(self, node: str) -> Engine:
        """Return the engine of a node; for async ones its ``sync_engine``."""
        found = self._engines.get(node)
        return found if found is not None else self._make(node)

    def async_engine(self, node: str) -> Any:
        """Return the ``AsyncEngine`` of a node."""
        self.engine(node)
        return self._asyncs[node]

    def shard_of(self, node: str) -> str:
        """Return the shard of a node that has an engine, also when it has left the topology."""
        return self._shards[node]

    def set_topology(self, topology: Topology) -> list[Engine]:
        """Use other nodes from now on; return the engines whose idle connections are to be closed.

        What is in use on a node that went, or has another address, is closed when it comes back. A
        plan that was made a moment ago may still ask for a node that went: its engine stays.
        """
        with self._lock:
            before = {node.name: node for node in self._topology.nodes()}
            self._topology = topology
            known = {node.name: node for node in topology.nodes()}
            gone = [name for name in self._engines if name not in known]
            # one that comes back, too: its pool was retired when it went
            changed = [
                name for name in self._engines if name in known and known[name] != before.get(name)
            ]
            retired = [self._engines[name] for name in (*gone, *changed)]
            for name in changed:
                del self._engines[name], self._asyncs[name]
        for engine in retired:
            engine.pool.is_retired = True  # type: ignore[attr-defined]  # LimitedPool's
        return retired

    def node_of(self, engine: Engine) -> str | None:
        """Return the node of an engine, ``None`` for an engine of somebody else's."""
        return self._names.get(engine)

    def reading(
        self, node: str, settings: Mapping[str, str] = _NONE, limit: Limit | None = None
    ) -> Reading:
        """Lend an AUTOCOMMIT connection for one read, as a context manager.

        With settings it is in a transaction that has them; the pool's reset ends that. Nothing of
        it takes longer than the limit.

        psycopg's client-side cursor has all rows by then, so the result outlives the block.
        """
        return Reading(self, node, settings, limit)

    @contextmanager
    def reading_through(self, nodes: Iterable[str], driver: Any) -> Iterator[None]:
        """Count a statement among the reads of nodes that another server reads for it.

        So it is a load to choose by, and is cut with the others where one of the nodes hangs.

        Args:
            driver: the connection to that server.
        """
        counted = []
        for name in nodes:
            self.engine(name)  # there is nothing to count by without one; opens no connection
            counted.append(self.loads[name])
        for load in counted:
            load.add(driver)
        try:
            yield
        finally:
            for load in counted:
                load.discard(driver)

    def observe(self, observer: Observer) -> None:
        """Tell somebody of each statement that a server has answered, from now on."""
        with self._lock:
            if self._observer is None:
                self._observer = observer
                for engine, name in self._names.items():
                    _observe(engine, name, observer)

    def fit(self, node: str) -> None:
        """Fit a node's pool to how many connections this process may have there now."""
        engine = self._engines.get(node)
        if engine is not None:
            limits, pool = self._limits(node), engine.pool
            pool.fit(limits.kept, limits.most)  # type: ignore[attr-defined]  # LimitedPool's

    def expire(self, node: str) -> None:
        """Have all pooled connections of a node replaced when they are next checked out.

        It is what SQLAlchemy does itself after a disconnect; no socket is touched in this thread.
        """
        engine = self._engines.get(node)
        if engine is not None:
            engine.pool._invalidate_time = time.time()

    def cut_reads(self, node: str) -> int:
        """Cut the sockets of reads under way on a node; return how many there were.

        Who is connecting to it does not wait any longer either.
        """
        drivers: list[Any] = list(self.loads.get(node, ()))
        for driver in drivers:
            cut(driver)
        engine = self._engines.get(node)
        dialect: Any = engine.dialect if engine is not None else None
        return len(drivers) + (dialect.connecting.give_up() if dialect is not None else 0)

    def close(self) -> None:
        """Close all pools. Connections in use are closed when they come back."""
        for engine in self._take():
            engine.dispose()

    async def aclose(self) -> None:
        """Close all pools of async engines, in their event loop."""
        from sqlalchemy.util import greenlet_spawn

        for engine in self._take():
            await greenlet_spawn(engine.dispose)

    def forget(self) -> None:
        """Drop all pools without touching a socket: in a child after a fork."""
        self._lock = threading.Lock()
        for engine in self._take():
            engine.dispose(close=False)

    def _take(self) -> list[Engine]:
        with self._lock:
            engines = list(self._engines.values())
            for table in (self._engines, self._asyncs, self.loads, self._names):
                table.clear()
        return engines

    def _make(self, name: str) -> Engine:
        with self._lock:
            node = self._topology.node(name)
            if name not in self._engines:
                engine, asynchronous = self._create(node)
                self._listen(engine, name)
                if self._observer is not None:
                    _observe(engine, name, self._observer)
                self.loads[name] = set()
                self.answered.setdefault(name, 0)
                self._asyncs[name] = asynchronous
                self._names[engine] = name
                self._shards[name] = self._topology.shard_of_node[name]
                self._engines[name] = engine
            return self._engines[name]

    def _create(self, node: Node) -> tuple[Engine, Any]:
        from sqlroute.runtime.dialect import start_reading  # registers the dialect, too
        from sqlroute.runtime.pools import LimitedAsyncPool, LimitedPool

        self.start_reading = start_reading

        policy, limits = self._policy, self._limits(node.name)
        options: dict[str, Any] = {
            "pool_size": max(limits.kept, 1),  # 0 would be any number
            "max_overflow": -1 if limits.most < 0 else max(limits.most - limits.kept, 0),
            "pool_timeout": policy.pool_timeout,
            "pool_logging_name": node.name,
            "use_native_hstore": False,
            "connect_args": {"connect_timeout": max(1, round(policy.connect_timeout))},
        }
        if node.pooler:  # what was prepared is on one server connection, and the next is another
            options["connect_args"]["prepare_threshold"] = None
        url = _url(node)
        if self.is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            asynchronous = create_async_engine(url, poolclass=LimitedAsyncPool, **options)
            return asynchronous.sync_engine, asynchronous
        from sqlalchemy import create_engine

        return create_engine(url, poolclass=LimitedPool, **options), None

    def _listen(self, engine: Engine, name: str) -> None:
        on_failure, on_stale_map = self._on_failure, self._on_stale_map

        @event.listens_for(engine, "handle_error")
        def note(context: ExceptionContext) -> Exception | None:
            error = context.original_exception
            if not isinstance(error, Exception):  # a task was cancelled: nothing about the node
                return None
            state = getattr(error, "sqlstate", None)
            if context.is_disconnect or state in GONE or context.connection is None:
                if on_failure(name, error) and state is not None:
                    context.is_disconnect = True
            elif is_old_plan(error):
                context.is_disconnect = True  # all connections of this pool have old plans
            elif state == "23514" and "no partition of relation" in str(error):
                on_stale_map(name)
                first = str(error).splitlines()[0]
                return StaleShardMap(
                    f"{name} refused a row: {first}; its bucket is not on this shard, the shard "
                    "map in use was old or the partition was never made; run the unit of work again"
                )
            return None


class Reading:
    """What :meth:`Engines.reading` returns; a generator would take three times as long."""

    __slots__ = ("_began", "_connection", "_driver", "_engines", "_limit", "_node", "_settings")

    def __init__(
        self, engines: Engines, node: str, settings: Mapping[str, str], limit: Limit | None
    ) -> None:
        self._engines, self._node, self._settings, self._limit = engines, node, settings, limit

    def __enter__(self) -> Connection:
        engine = self._engines.engine(self._node)
        if self._limit is None:
            connection = self._connection = engine.connect()
        else:
            with waiting_for(self._limit):
                connection = self._connection = engine.connect()
        fairy = connection.connection
        driver: Any = fairy.driver_connection
        self._driver = driver
        # one step for the interpreter, where += is three: threads meet here
        self._engines.loads[self._node].add(driver)
        try:  # switching to AUTOCOMMIT may be cancelled
            self._engines.start_reading(fairy, driver)
            if self._limit is not None:
                driver.sqlroute_limit = self._limit
            if self._settings:
                connection.exec_driver_sql(with_begin(self._settings))
        except BaseException:
            self._give_back()
            raise
        self._began = time.perf_counter()
        return connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            engines, node = self._engines, self._node
            engines.answered[node] += 1
            engines.on_answer(node, time.perf_counter() - self._began)
        self._give_back()

    def _give_back(self) -> None:
        self._engines.loads[self._node].discard(self._driver)
        self._connection.close()


def _observe(engine: Engine, name: str, observer: Observer) -> None:
    """Time each statement of an engine. Only where somebody wants it: it is not free."""

    @event.listens_for(engine, "before_cursor_execute")
    def begin(_: Any, __: Any, ___: Any, ____: Any, context: Any, _____: Any) -> None:
        context.sqlroute_began = time.perf_counter()

    @event.listens_for(engine, "after_cursor_execute")
    def end(_: Any, __: Any, ___: Any, ____: Any, context: Any, _____: Any) -> None:
        observer(name, time.perf_counter() - context.sqlroute_began, "")

    @event.listens_for(engine, "handle_error")
    def fail(context: ExceptionContext) -> None:
        began = getattr(context.execution_context, "sqlroute_began", None)
        if began is not None:
            text = str(context.original_exception).partition("\n")[0]
            observer(name, time.perf_counter() - began, text)


def is_old_plan(error: BaseException | None) -> bool:
    """Say if a prepared statement was outlived by the columns of its table.

    psycopg forgets its prepared statements at a ROLLBACK, which a plain Session's connection has
    after each use and one that reads in AUTOCOMMIT never.
    """
    state = getattr(error, "sqlstate", None)
    return state == "0A000" and "cached plan must not change result type" in str(error)


def _url(node: Node) -> URL:
    from sqlroute.runtime.dialect import DRIVERNAME

    return URL.create(
        DRIVERNAME,
        username=node.user or None,
        password=node.password.reveal() if node.password else None,
        host=node.host or None,
        port=node.port,
        database=node.database or None,
        query=dict(node.options),
    )


_fork_aware: weakref.WeakSet[Engines] = weakref.WeakSet()


def _forget_all() -> None:
    for engines in list(_fork_aware):
        engines.forget()


os.register_at_fork(after_in_child=_forget_all)
