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
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

from sqlroute.errors import StaleShardMap
from sqlroute.routing.policy import Policy
from sqlroute.runtime.scatter import cut
from sqlroute.runtime.settings import with_begin
from sqlroute.topology import Node, Topology

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import ExceptionContext

DriverError = Callable[[str, BaseException], bool]
"""Told of a node that failed; says whether it counts against the node."""

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
    ) -> None:
        self.is_async = is_async
        self.loads: dict[str, set[object]] = {}
        self.answered: dict[str, int] = {}
        self._topology = topology
        self._policy = policy
        self._on_failure = on_failure
        self._on_stale_map = on_stale_map
        self._engines: dict[str, Engine] = {}
        self._asyncs: dict[str, Any] = {}
        self._names: dict[Engine, str] = {}
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

    def node_of(self, engine: Engine) -> str | None:
        """Return the node of an engine, ``None`` for an engine of somebody else's."""
        return self._names.get(engine)

    def reading(self, node: str, settings: Mapping[str, str] = _NONE) -> Reading:
        """Lend an AUTOCOMMIT connection for one read, as a context manager.

        With settings it is in a transaction that has them; the pool's reset ends that.

        psycopg's client-side cursor has all rows by then, so the result outlives the block.
        """
        return Reading(self, node, settings)

    def expire(self, node: str) -> None:
        """Have all pooled connections of a node replaced when they are next checked out.

        It is what SQLAlchemy does itself after a disconnect; no socket is touched in this thread.
        """
        engine = self._engines.get(node)
        if engine is not None:
            engine.pool._invalidate_time = time.time()

    def cut_reads(self, node: str) -> int:
        """Cut the sockets of reads under way on a node; return how many there were."""
        drivers: list[Any] = list(self.loads.get(node, ()))
        for driver in drivers:
            cut(driver)
        return len(drivers)

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
        node = self._topology.node(name)
        with self._lock:
            if name not in self._engines:
                engine, asynchronous = self._create(node)
                self._listen(engine, name)
                self.loads[name] = set()
                self.answered.setdefault(name, 0)
                self._asyncs[name] = asynchronous
                self._names[engine] = name
                self._engines[name] = engine
            return self._engines[name]

    def _create(self, node: Node) -> tuple[Engine, Any]:
        import sqlroute.runtime.dialect  # noqa: F401 - registers the dialect

        policy = self._policy
        options: dict[str, Any] = {
            "pool_size": policy.pool_size,
            "max_overflow": policy.max_overflow,
            "pool_timeout": policy.pool_timeout,
            "use_native_hstore": False,
            "connect_args": {"connect_timeout": max(1, round(policy.connect_timeout))},
        }
        url = _url(node)
        if self.is_async:
            from sqlalchemy.ext.asyncio import create_async_engine

            asynchronous = create_async_engine(url, **options)
            return asynchronous.sync_engine, asynchronous
        from sqlalchemy import create_engine

        return create_engine(url, **options), None

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

    __slots__ = ("_connection", "_driver", "_engines", "_node", "_settings")

    def __init__(self, engines: Engines, node: str, settings: Mapping[str, str]) -> None:
        self._engines, self._node, self._settings = engines, node, settings

    def __enter__(self) -> Connection:
        from sqlroute.runtime.dialect import start_reading

        connection = self._connection = self._engines.engine(self._node).connect()
        fairy = connection.connection
        driver = self._driver = fairy.driver_connection
        # one step for the interpreter, where += is three: threads meet here
        self._engines.loads[self._node].add(driver)
        try:  # switching to AUTOCOMMIT may be cancelled
            start_reading(fairy, driver)
            if self._settings:
                connection.exec_driver_sql(with_begin(self._settings))
        except BaseException:
            self._give_back()
            raise
        return connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._engines.answered[self._node] += 1
        self._give_back()

    def _give_back(self) -> None:
        self._engines.loads[self._node].discard(self._driver)
        self._connection.close()


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
