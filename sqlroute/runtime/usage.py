"""What the program's statements do with the servers: the monitor asks, planning notes.

Counts may lose one where two threads meet; nothing that is decided by them minds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from sqlroute.routing.balancing import Allowance, admit

IN_USE = 60.0
"""Seconds after its last statement for which a shard is in use."""

FRESH = 20.0
"""Seconds after which a shard that was left alone is asked before it is used again."""


class ProgramUsage:
    """One program's use of the servers.

    Args:
        on_look: called with the name of each node that has answered a probe, in the monitor's
            thread.
        name_of: returns what the monitor's connections to the nodes of a shard are called now.
    """

    def __init__(self, on_look: Callable[[str], None], name_of: Callable[[str], str]) -> None:
        self._on_look = on_look
        self.name_of = name_of
        self._used: dict[str, float] = {}
        self._answered: dict[str, list[float]] = {}
        self._allowances: dict[str, Allowance] = {}
        self._lock = threading.Lock()

    def start(self, shards: Iterable[str]) -> None:
        """Take all shards for used now: they were all asked a moment ago."""
        self._used = dict.fromkeys(shards, time.monotonic())

    def note(self, shard: str) -> bool:
        """Note that a shard is used; say if what is known of it may be old, from before."""
        now = time.monotonic()
        last = self._used.get(shard, 0.0)
        if now - last > 1.0:
            self._used[shard] = now
        return now - last > FRESH

    def answered(self, node: str, seconds: float) -> None:
        """Note a read that a node has answered."""
        sums = self._answered.get(node)
        if sums is None:
            sums = self._answered.setdefault(node, [0.0, 0.0])
        sums[0] += 1
        sums[1] += seconds

    def admit(self, shard: str, rate: float) -> bool:
        """Say if a shard's primary may take one more read in place of its replicas."""
        with self._lock:
            allowance, is_admitted = admit(self._allowances.get(shard), time.monotonic(), rate)
            self._allowances[shard] = allowance
        return is_admitted

    # for the monitor

    def is_used(self, shard: str) -> bool:
        return time.monotonic() - self._used.get(shard, 0.0) < IN_USE

    def take_answered(self, node: str) -> tuple[int, float]:
        self._on_look(node)
        count, seconds = self._answered.pop(node, (0.0, 0.0))
        return int(count), seconds
