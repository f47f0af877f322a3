"""The rules of choosing: what staleness a read may have, and how long anything may take.

Plain values. A :class:`Policy` is made by :mod:`sqlroute.config` from a file or by hand; it checks
nothing, the configuration does. Times are in seconds. A :class:`Demand` is what the caller asks for
beside it: per session, block or statement.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, TypeVar

from sqlroute.errors import UnknownName
from sqlroute.health import Role

_Named = TypeVar("_Named", bound=Enum)


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

    __hash__ = object.__hash__  # Enum's own is a function in Python


class Balancing(StrEnum):
    """How one of several eligible replicas is chosen; the weights of nodes count in all of them.

    Attributes:
        P2C: of two at random the one with fewer statements under way.
        WEIGHTED: at random.
        ROUND_ROBIN: in turn.
        LEAST_CONNECTIONS: the one with the fewest statements under way.
    """

    P2C = "p2c"
    WEIGHTED = "weighted"
    ROUND_ROBIN = "round_robin"
    LEAST_CONNECTIONS = "least_connections"


class Intent(Enum):
    """What a session, or a block of it, is declared to do.

    Attributes:
        AUTOMATIC: whatever comes; each statement is looked at.
        READING: only reads; a write is refused before it is sent.
        WRITING: it will write; so its reads go to the primary from the first one on, in the same
            transaction and snapshot as the writes.
        LAG_TOLERANT: only reads, and of any age.
    """

    AUTOMATIC = "automatic"
    READING = "reading"
    WRITING = "writing"
    LAG_TOLERANT = "lag_tolerant"


@dataclass(frozen=True, slots=True)
class Demand:
    """What the caller asks for.

    Attributes:
        shard: the shard that the caller named, if any.
        role: PRIMARY to read from the primary; REPLICA where the caller vouches that what cannot
            be proved to be a read is one.
        by_coordinator: the caller wants the coordinator to answer.
        partial: a read of several shards is answered without those that cannot answer now.
        snapshot: an isolation level that holds a snapshot was asked for, which a read in
            AUTOCOMMIT does not: so it needs a transaction.
    """

    consistency: Consistency = Consistency.SESSION
    intent: Intent = Intent.AUTOMATIC
    shard: str | None = None
    role: Role | None = None
    snapshot: str | None = None
    by_coordinator: bool = False
    partial: bool = False

    @property
    def only_reads(self) -> bool:
        return self.intent is Intent.READING or self.intent is Intent.LAG_TOLERANT


AUTOMATIC = Demand()


def consistency_named(name: Any) -> Consistency:
    """Return the consistency of a name.

    Raises:
        UnknownName: there is none.
    """
    return _named(Consistency, name, "consistency")


def intent_named(name: Any) -> Intent:
    """Return the intent of a name.

    Raises:
        UnknownName: there is none.
    """
    return _named(Intent, name, "intent")


def role_named(name: Any) -> Role:
    """Return the role, primary or replica, of a name.

    Raises:
        UnknownName: there is none.
    """
    if name in (Role.PRIMARY.value, Role.REPLICA.value):
        return Role(name)
    raise UnknownName(f"unknown role {name!r}; known: primary, replica")


def tier_named(name: Any) -> bool:
    """Say that a tier was named; only the coordinator can be asked for.

    Raises:
        UnknownName: there is none of that name, or none that may be named.
    """
    if name == "coordinator":
        return True
    raise UnknownName(f"unknown tier {name!r}; sqlroute_tier may be: coordinator")


def partial_named(value: Any) -> bool:
    """Return whether an answer may be partial.

    Raises:
        UnknownName: it is no bool.
    """
    if isinstance(value, bool):
        return value
    raise UnknownName(f"sqlroute_partial={value!r}; it is True or False")


def _named(kind: type[_Named], name: Any, what: str) -> _Named:
    if isinstance(name, kind):
        return name
    try:
        return kind(name)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise UnknownName(f"unknown {what} {name!r}; known: {known}") from None


@dataclass(frozen=True, slots=True)
class Policy:
    """How statements are routed and connections opened.

    Attributes:
        max_lag: a replica further behind its primary gets no reads.
        consistency: of sessions that ask for nothing else.
        probe_interval: from one look at a node to the next.
        probe_deadline: a node that has not answered by then did not answer.
        map_lease: how long a shard map is trusted after a shard last confirmed it.
        token_wait: how long a read may wait for a replica to reach the session's token, before
            it goes to the primary; ``None`` for as long as replicas are measured to take, at most
            0.1 s.
        scatter_timeout: for a statement on several shards, altogether.
        primary_fallback: reads go to the primary when no replica is eligible.
        primary_fallback_share: then at most this share of the reads that the replicas took before,
            1 for all there are. Where a replica is only not known to have what the session has
            seen, its reads are not counted.
        primary_fallback_free: reads per second that a primary takes in any case, of all processes
            that watch it together.
        balancing: how one of several eligible replicas is chosen.
        latency_window: only replicas are chosen that answer probes this many seconds later than
            the nearest one, or sooner.
        zone: where this process runs; replicas in the same zone are read from as long as they are
            able to. Empty for no preference.
        replicas_per_process: how many replicas of a shard a process reads from, others being for
            other processes; 0 for all. A replica that may not be read from is replaced.
        probe_rate: probes per second that a node should answer to the monitors of all processes.
        connections_per_node: that all processes together should open to a node; 0 for no limit
            beyond those of each process.
        pool_size: connections kept per node.
        max_overflow: connections beyond these under load; -1 for any number.
        pool_timeout: how long a statement may wait for a connection of the pool.
        connect_timeout: for opening one connection.
        primary_wait: how long a new transaction waits where its shard has lost its primary, which
            may be promoted at this moment.
        max_held: write transactions of a process that wait for a shard while an operation holds it;
            what comes beyond these is refused at once.
        max_scatter_rows: a statement on several shards may fetch from all of them together, streams
            excepted; 0 for any number.
        no_scatter: statements on several shards are not merged but refused.
        no_coordinator: nothing is sent to a coordinator; what only that could answer is refused.
        deadline: of sessions that name none: how long each may wait in all; ``None`` for no limit.
        allow_functions: names of functions that are reads, whatever ``pg_proc`` says: ``f`` in any
            schema, or ``schema.f``.
        deny_functions: names of functions that are none; wins over ``allow_functions``.
    """

    max_lag: float = 5.0
    consistency: Consistency = Consistency.SESSION
    probe_interval: float = 0.5
    probe_deadline: float = 0.5
    map_lease: float = 5.0
    token_wait: float | None = None
    scatter_timeout: float = 30.0
    primary_fallback: bool = True
    primary_fallback_share: float = 0.5
    primary_fallback_free: float = 1000.0
    balancing: Balancing = Balancing.P2C
    latency_window: float = 0.015
    zone: str = ""
    replicas_per_process: int = 0
    probe_rate: float = 100.0
    connections_per_node: int = 0
    pool_size: int = 5
    max_overflow: int = 10
    pool_timeout: float = 30.0
    connect_timeout: float = 5.0
    primary_wait: float = 5.0
    max_held: int = 1000
    max_scatter_rows: int = 0
    no_scatter: bool = False
    no_coordinator: bool = False
    deadline: float | None = None
    allow_functions: tuple[str, ...] = ()
    deny_functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many connections a process may have to a node.

    Attributes:
        kept: open though nobody uses them.
        most: altogether; at least one, else nothing would work; -1 for any number.
    """

    kept: int
    most: int


def pool_limits(policy: Policy, monitors: int, share: float = 1.0) -> PoolLimits:
    """Return a process's part of what may be open to a node.

    All parts and the monitors' connections together are within ``connections_per_node``, if that
    is at least two for each process.

    Args:
        monitors: how many processes watch the node, by a connection each, which counts too; 0 if
            that is not known.
        share: of a node that has just come back; what waited for it does not come all at once.
    """
    unlimited = policy.max_overflow < 0
    own = policy.pool_size + policy.max_overflow
    if policy.connections_per_node > 0:
        processes = max(1, monitors)
        part = max(0, policy.connections_per_node - processes) // processes
        own, unlimited = part if unlimited else min(own, part), False
    if unlimited and share >= 1:
        return PoolLimits(policy.pool_size, -1)
    own = policy.pool_size if unlimited else own
    return PoolLimits(min(policy.pool_size, own), max(1, int(own * share)))
