"""The rules of choosing: what staleness a read may have, and how long anything may take.

Plain values. A :class:`Policy` is made by :mod:`sqlroute.config` from a file or by hand; it checks
nothing, the configuration does. Times are in seconds. A :class:`Demand` is what the caller asks for
beside it: per session, block or statement.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
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
        snapshot: an isolation level that holds a snapshot was asked for, which a read in
            AUTOCOMMIT does not: so it needs a transaction.
    """

    consistency: Consistency = Consistency.SESSION
    intent: Intent = Intent.AUTOMATIC
    shard: str | None = None
    role: Role | None = None
    snapshot: str | None = None

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
        pool_size: connections kept per node.
        max_overflow: connections beyond these under load; -1 for any number.
        pool_timeout: how long a statement may wait for a connection of the pool.
        connect_timeout: for opening one connection.
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
    pool_size: int = 5
    max_overflow: int = 10
    pool_timeout: float = 30.0
    connect_timeout: float = 5.0
    allow_functions: tuple[str, ...] = ()
    deny_functions: tuple[str, ...] = ()
