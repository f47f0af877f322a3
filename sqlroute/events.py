"""What happens, as frozen records: for logs, metrics, traces, tests.

A :class:`Listener` is called with each record of the kinds it asked for, in the thread where it
happened, before anything goes on there: it must be quick and must not block. What it raises is
logged and goes no further. :func:`log_event` listens by default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from sqlroute.routing.plan import Plan

log = logging.getLogger("sqlroute.events")


@dataclass(frozen=True, slots=True)
class PlanChosen:
    """A statement was planned; nothing was sent yet. A retry is planned again."""

    plan: Plan

    def __str__(self) -> str:
        return str(self.plan)


@dataclass(frozen=True, slots=True)
class StatementDone:
    """A server has answered a statement, or could not.

    Attributes:
        seconds: from sending it to its answer, the rows of a client-side cursor included.
        error: the driver's message, one line; empty if there was none.
    """

    shard: str
    node: str
    seconds: float
    error: str = ""

    def __str__(self) -> str:
        failed = f": {self.error}" if self.error else ""
        return f"{self.node} answered in {self.seconds * 1000:.1f} ms{failed}"


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """What is known of a node has changed: its state, its role, or that it must not be used.

    Attributes:
        before, now: states, as ``up`` or ``down``.
        role: ``primary``, ``replica`` or ``unknown``.
        timeline: 0 if unknown.
        reason: of its last failure; empty if it answers.
        refused: why it must not be used whatever its state; empty if it may be.
    """

    shard: str
    node: str
    before: str
    now: str
    role: str
    timeline: int
    reason: str = ""
    refused: str = ""

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        refused = f"; it is refused: {self.refused}" if self.refused else ""
        return (
            f"node {self.node}: {self.before} -> {self.now} ({self.role}, timeline "
            f"{self.timeline}){why}{refused}"
        )


@dataclass(frozen=True, slots=True)
class PrimaryChanged:
    """A shard has another primary, or none.

    Attributes:
        before, now: names of nodes; ``None`` for none.
        contenders: all that claim to be it, if more than one does.
    """

    shard: str
    before: str | None
    now: str | None
    timeline: int
    contenders: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.now is None:
            return f"shard {self.shard} has lost its primary {self.before}"
        text = (
            f"shard {self.shard}: the primary is {self.now} (timeline {self.timeline}), "
            f"was {self.before or 'unknown'}"
        )
        if len(self.contenders) > 1:
            text += f"; {', '.join(self.contenders)} claim to be it"
        return text


@dataclass(frozen=True, slots=True)
class Held:
    """An operation holds the write transactions of a shard: new ones wait from now on."""

    shard: str
    operation: str

    def __str__(self) -> str:
        return f"shard {self.shard}: operation {self.operation} holds write transactions"


@dataclass(frozen=True, slots=True)
class Released:
    """Write transactions of a shard are held no more.

    Attributes:
        seconds: since that was first seen here.
        waited: how many of this process have waited, at once, at most.
    """

    shard: str
    seconds: float
    waited: int

    def __str__(self) -> str:
        return (
            f"shard {self.shard}: write transactions go on after {self.seconds * 1000:.0f} ms, "
            f"{self.waited} had to wait"
        )


@dataclass(frozen=True, slots=True)
class Fallback:
    """A read goes to the primary, because no replica may take it."""

    shard: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}: a read goes to the primary {self.node}: {self.reason}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A read with ``sqlroute_partial`` was answered without a shard.

    Attributes:
        node: that did not answer; empty where there was none to ask.
    """

    shard: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"shard {self.shard}: a partial answer is without it: {self.reason}"


@dataclass(frozen=True, slots=True)
class Retried:
    """Something is done once more.

    Attributes:
        what: ``read``, on another node; ``write``, which a replica has refused; ``unit``, a unit
            of work of ``router.run``.
        shard, node: where it failed; empty for a unit.
        error: why, one line.
        attempt: the number of the attempt that failed, from 1.
    """

    what: str
    shard: str
    node: str
    error: str
    attempt: int = 1

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        return f"{self.what} failed{where} (attempt {self.attempt}), trying again: {self.error}"


Event: TypeAlias = (
    PlanChosen
    | StatementDone
    | NodeChanged
    | PrimaryChanged
    | Held
    | Released
    | Fallback
    | LeftOut
    | Retried
)

KINDS: tuple[type[Event], ...] = (
    PlanChosen,
    StatementDone,
    NodeChanged,
    PrimaryChanged,
    Held,
    Released,
    Fallback,
    LeftOut,
    Retried,
)


class Listener(Protocol):
    """Whoever wants to know."""

    def __call__(self, event: Event, /) -> None:
        """Take note of what has happened. Must not block."""


class Listeners:
    """Who wants to know what. Reading never locks; a change is a new mapping."""

    def __init__(self) -> None:
        self._of: dict[type[Event], tuple[Listener, ...]] = {}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(found)} {kind.__name__}" for kind, found in self._of.items())
        return f"<Listeners {counts}>"

    def add(self, listener: Listener, kinds: tuple[type[Event], ...]) -> Callable[[], None]:
        """Call a listener from now on; return what ends that.

        Raises:
            TypeError: one of the kinds is none.
        """
        for kind in kinds:
            if kind not in KINDS:
                known = ", ".join(known.__name__ for known in KINDS)
                raise TypeError(f"{kind!r} is no kind of event; known: {known}")
        added = dict.fromkeys(kinds, (listener,))
        self._of = {k: self._of.get(k, ()) + added.get(k, ()) for k in {**self._of, **added}}

        def remove() -> None:
            kept = {
                k: tuple(x for x in found if x is not listener) for k, found in self._of.items()
            }
            self._of = {kind: found for kind, found in kept.items() if found}

        return remove

    def wants(self, kind: type[Event]) -> bool:
        """Say if anybody would be told: making a record costs more than asking."""
        return kind in self._of

    def tell(self, event: Event) -> None:
        for listener in self._of.get(type(event), ()):
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed at %r", event)


def log_event(event: Event) -> None:
    """Log an event: what degrades the service as a warning, changes as info, the rest as debug."""
    level = logging.DEBUG
    if isinstance(event, PrimaryChanged):
        level = logging.WARNING if event.now is None or event.contenders else logging.INFO
    elif isinstance(event, NodeChanged):
        level = logging.WARNING if event.refused else logging.INFO
    elif isinstance(event, LeftOut):
        level = logging.WARNING
    elif isinstance(event, Held | Released | Retried):
        level = logging.INFO
    log.log(level, "%s", event)
