"""Read ``pg_proc``: which functions are reads, on every shard of a keyspace.

Read once, when a statement first calls a function that nothing else decides, and again at most
every :data:`READ_AGAIN` seconds while statements call functions that were not there. So a function
made later is learnt by its first callers; that one was *replaced* by a volatile one is noticed by
the next reading only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from sqlroute.catalog.maps import connect
from sqlroute.health import Health, Role
from sqlroute.routing.functions import FunctionCatalog, catalog_of, in_common
from sqlroute.topology import Keyspace, Node

log = logging.getLogger("sqlroute.catalog")

READ_AGAIN = 60.0
"""Seconds from one reading of a keyspace to the next."""

TRY_AGAIN = 5.0
"""Seconds after a reading that no node answered."""

_THREADS = 16

# pg_proc calls every aggregate immutable, whatever the functions are that it is made of.
_READ = """
SELECT n.nspname, p.proname,
       bool_or(p.provolatile = 'v' OR EXISTS (
           SELECT FROM pg_catalog.pg_aggregate a JOIN pg_catalog.pg_proc part
             ON part.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn,
                             a.aggdeserialfn, a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
            WHERE p.prokind = 'a' AND a.aggfnoid = p.oid AND part.provolatile = 'v')),
       bool_and(p.provolatile = 'i' AND p.prokind = 'f' AND NOT p.proretset)
  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
 GROUP BY n.nspname, p.proname
"""


class FunctionReader:
    """Reads the functions of keyspaces, not more often than they may have changed.

    Args:
        timeout: seconds for each node to connect.
        clock: a monotonic clock.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._due: dict[str, float] = {}
        self._lock = threading.Lock()

    def claim(self, keyspace: str) -> bool:
        """Say whether it is time to read a keyspace; of several callers at once, to one."""
        now = self._clock()
        with self._lock:
            if now < self._due.get(keyspace, now):
                return False
            self._due[keyspace] = now + READ_AGAIN
            return True

    def read(self, keyspace: Keyspace, health: Health) -> FunctionCatalog | None:
        """Return what holds on every shard that answers, ``None`` when none does."""
        shards = [_readable(shard.nodes, health) for shard in keyspace.shards]
        if len(shards) == 1:
            read = [self._read_shard(shards[0])]
        else:
            with ThreadPoolExecutor(min(_THREADS, len(shards)), "sqlroute-functions") as pool:
                read = list(pool.map(self._read_shard, shards))
        found = in_common(catalog for catalog in read if catalog is not None)
        if found is None:
            log.warning("pg_proc of %s: no node answered; unknown functions are writes", keyspace)
            with self._lock:
                self._due[keyspace.name] = self._clock() + TRY_AGAIN
        return found

    def _read_shard(self, nodes: Iterable[Node]) -> FunctionCatalog | None:
        for node in nodes:
            found = read_functions(node, self._timeout)
            if found is not None:
                return found
        return None


def read_functions(node: Node, timeout: float) -> FunctionCatalog | None:
    """Return the functions of a node, ``None`` when it does not answer.

    Args:
        timeout: seconds to connect.
    """
    import psycopg

    try:
        with connect(node, timeout) as connection:
            return catalog_of(connection.execute(_READ).fetchall())
    except psycopg.Error as error:
        log.info("pg_proc of %s cannot be read: %s", node.name, error)
        return None


def _readable(nodes: Iterable[Node], health: Health) -> list[Node]:
    """Return the nodes that can be asked, the primary first: it knows new functions first."""
    known = [node for node in nodes if health.of(node.name).is_readable]
    return sorted(known, key=lambda node: health.of(node.name).role is not Role.PRIMARY)
