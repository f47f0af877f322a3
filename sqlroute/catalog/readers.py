"""Which replicas the further databases of a coordinator read: asked of themselves, and remembered.

What is remembered may be wrong: it only chooses. Each statement is checked to have read what its
plan says (``sqlroute.coordinator_check``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sqlroute.catalog.maps import connect
from sqlroute.topology import Keyspace, Node, Reader

log = logging.getLogger("sqlroute.catalog")

KEPT = 10.0
"""Seconds for which it is remembered, and for which one that could not answer is left alone."""

_REPLICAS = """
SELECT shard, node FROM sqlroute.coordinator_shard WHERE keyspace = %s AND node IS NOT NULL
"""


class Readers:
    """Knows the databases that read replicas.

    Without a lock: what is kept is replaced as a whole, and two who read it at once read the same.

    Args:
        timeout: seconds for each database to connect.
        clock: a monotonic clock.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._known: dict[str, tuple[tuple[Reader, ...], float]] = {}

    def of(self, keyspace: Keyspace) -> tuple[Reader, ...] | None:
        """Return those of a keyspace; ``None`` when it is time to :meth:`read` them.

        Of several callers at once one is told so, the others go on with what was known.
        """
        if keyspace.coordinator is None or not keyspace.coordinator.replicas:
            return ()
        known, now = self._known.get(keyspace.name), self._clock()
        if known is None:
            return None
        readers, until = known
        if now < until:
            return readers
        self._known[keyspace.name] = readers, now + KEPT
        return None

    def read(self, keyspace: Keyspace) -> None:
        """Ask the databases of a coordinator's first node that answers."""
        coordinator = keyspace.coordinator
        found: tuple[Reader, ...] = ()
        for node in coordinator.nodes if coordinator is not None else ():
            assert coordinator is not None
            asked = [_read(each, keyspace, self._timeout) for each in coordinator.readers(node)]
            found = tuple(reader for reader in asked if reader is not None)
            if found:
                break
        self.learn(keyspace, found)

    def learn(self, keyspace: Keyspace, readers: tuple[Reader, ...]) -> None:
        """Remember those of a keyspace as of now."""
        self._known[keyspace.name] = readers, self._clock() + KEPT

    def set_aside(self, keyspace: Keyspace, node: str) -> None:
        """Leave one alone that could not answer, until they are read anew."""
        readers, until = self._known.get(keyspace.name, ((), 0.0))
        kept = tuple(reader for reader in readers if reader.node != node)
        self._known[keyspace.name] = kept, until

    def forget(self) -> None:
        """Forget all: the configuration has changed."""
        self._known = {}


def _read(node: Node, keyspace: Keyspace, timeout: float) -> Reader | None:
    """Return what a database reads, ``None`` where it is not there or reads primaries."""
    import psycopg

    try:
        with connect(node, timeout) as connection:
            found = dict(connection.execute(_REPLICAS, (keyspace.name,)).fetchall())
    except psycopg.Error as error:
        log.info("%s reads no replicas: %s", node.name, str(error).partition("\n")[0])
        return None
    return Reader(node.name, found) if found else None
