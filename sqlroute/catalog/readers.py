"""Which replicas the further databases of a coordinator read: asked of themselves, and remembered.

What is remembered may be wrong: it only chooses. Each statement is checked to have read what its
plan says (``sqlroute.coordinator_check``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from sqlroute.catalog.maps import connect
from sqlroute.topology import Keyspace, Node, Reader

log = logging.getLogger("sqlroute.catalog")

KEPT = 10.0
"""Seconds for which it is remembered."""

ASIDE = 10.0
"""Seconds for which one that could not answer is left alone; twice as long each time that it is
tried in vain again..."""

ASIDE_AT_MOST = 300.0
"""...up to this."""

_REPLICAS = """
SELECT s.shard, s.node, c.built_at::text
  FROM sqlroute.coordinator c JOIN sqlroute.coordinator_shard s USING (keyspace)
 WHERE keyspace = %s AND s.node IS NOT NULL
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
        self._aside: dict[str, tuple[float, float, str]] = {}  # until when, how long, why

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
        if now >= until:
            self._known[keyspace.name] = readers, now + KEPT
            return None
        return tuple(self._judged(reader, now) for reader in readers) if self._aside else readers

    def _judged(self, reader: Reader, now: float) -> Reader:
        until, _, why = self._aside.get(reader.node, (now, 0.0, ""))
        return replace(reader, refused=f"could not answer: {why}") if now < until else reader

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
        known, _ = self._known.get(keyspace.name, ((), 0.0))
        before = {reader.node: reader for reader in known}
        for reader in readers:
            if before.get(reader.node, reader) != reader:
                self.answered(reader.node)  # it was built anew since it failed
        self._known[keyspace.name] = readers, self._clock() + KEPT

    def set_aside(self, node: str, why: str) -> None:
        """Leave one alone for a while that could not answer."""
        now = self._clock()
        until, before, _ = self._aside.get(node, (now, 0.0, ""))
        if now < until:
            return  # several statements have failed at once
        seconds = min(2 * before, ASIDE_AT_MOST) if before else ASIDE
        self._aside[node] = now + seconds, seconds, why

    def answered(self, node: str) -> None:
        """Forget that one could not answer."""
        self._aside.pop(node, None)

    def forget(self) -> None:
        """Forget all: the configuration has changed."""
        self._known, self._aside = {}, {}


def _read(node: Node, keyspace: Keyspace, timeout: float) -> Reader | None:
    """Return what a database reads, ``None`` where it is not there or reads primaries."""
    import psycopg

    try:
        with connect(node, timeout) as connection:
            rows = connection.execute(_REPLICAS, (keyspace.name,)).fetchall()
    except psycopg.Error as error:
        log.info("%s reads no replicas: %s", node.name, str(error).partition("\n")[0])
        return None
    return Reader(node.name, {shard: name for shard, name, _ in rows}, rows[0][2]) if rows else None
