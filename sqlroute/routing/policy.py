"""The rules of choosing: what staleness a read may have, and how long anything may take.

A plain value, made by :mod:`sqlroute.config` from a file or by hand. It checks nothing; the
configuration does. Times are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Consistency(Enum):
    """What a read may miss.

    Attributes:
        EVENTUAL: anything; any readable replica will do.
        BOUNDED: the last ``max_lag`` seconds.
        SESSION: as BOUNDED, but never what the same session wrote or has read before.
        STRONG: nothing; reads go to the primary.
    """

    EVENTUAL = "eventual"
    BOUNDED = "bounded"
    SESSION = "session"
    STRONG = "strong"


@dataclass(frozen=True, slots=True)
class Policy:
    """How statements are routed and connections opened.

    Attributes:
        max_lag: a replica further behind its primary gets no reads.
        consistency: of sessions that ask for nothing else.
        probe_interval: from one look at a node to the next.
        probe_deadline: a node that has not answered by then did not answer.
        map_lease: how long a shard map is trusted after a shard last confirmed it.
        token_wait: how long a read may wait for a replica to reach the session's token.
        scatter_timeout: for a statement on several shards, altogether.
        primary_fallback: reads go to the primary when no replica is eligible.
        pool_size: connections kept per node.
        max_overflow: connections beyond these under load; -1 for any number.
        pool_timeout: how long a statement may wait for a connection of the pool.
        connect_timeout: for opening one connection.
    """

    max_lag: float = 5.0
    consistency: Consistency = Consistency.SESSION
    probe_interval: float = 0.5
    probe_deadline: float = 0.5
    map_lease: float = 5.0
    token_wait: float = 0.02
    scatter_timeout: float = 30.0
    primary_fallback: bool = True
    pool_size: int = 5
    max_overflow: int = 10
    pool_timeout: float = 30.0
    connect_timeout: float = 5.0
