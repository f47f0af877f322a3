"""One run of an operation: its steps, done on real servers, written down, and reported.

A :class:`Promotion` is told a :class:`~sqlroute.ops.steps.Change` and does the steps that are left;
each step is the method of its name. What a switchover and a failover have in common is here, from
the promotion itself on; :mod:`sqlroute.ops.switchover` and :mod:`sqlroute.ops.failover` add what
comes before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlroute.catalog.history import parse_history
from sqlroute.errors import DriverError, OperationFailed, OperationRefused, SQLRouteError
from sqlroute.ops import planning, rejoining
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Loss, Wishes
from sqlroute.ops.records import Records
from sqlroute.ops.server import Server, wait_for
from sqlroute.ops.shard import ShardServers
from sqlroute.ops.steps import Change, Step, StepName
from sqlroute.routing.token import format_lsn

FIRST_WRITE = 0.5
"""Seconds for which the new primary is watched for the first write of a client."""

_HISTORIES = (
    "SELECT pg_read_file('pg_wal/' || lpad(upper(to_hex(%s::int)), 8, '0') || '.history')",
    "SELECT sqlroute.timeline_history(%s)",
)

_JOURNAL = """
INSERT INTO sqlroute.journal (epoch, shard, node, former, timeline, fork, kind, fence, operation)
VALUES (%s, %s, %s, %s, %s, %s::pg_lsn, %s, %s, %s) ON CONFLICT (epoch) DO NOTHING
"""

_STEADY = """
UPDATE sqlroute.shard
   SET epoch = %s, node = %s, timeline = %s, fork = %s::pg_lsn, state = 'steady',
       operation = NULL, held_until = NULL
"""

_LAST = "SELECT pg_current_xact_id()::text AS id, pg_notify('sqlroute', %s)"


@dataclass(frozen=True, slots=True)
class Progress:
    """A step begins, or has ended.

    Attributes:
        state: ``begun``, ``done`` or ``failed``.
        detail: what was seen, as plain values.
    """

    operation: str
    step: Step
    state: str
    ms: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)


Told = Callable[[Progress], None]


def tell_nobody(progress: Progress) -> None:
    """Hear of progress and do nothing."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an operation has done.

    Attributes:
        outcome: ``done``; ``incomplete`` where some node has still to be rejoined; ``aborted``.
        steps: name, milliseconds and detail of each, in order.
        fence: the level that held on the former primary.
        write_pause_ms: from the moment when writes were held (of a failover: when it began) to the
            first write of a client on the new primary; ``None`` if none wrote within half a second.
        acknowledged: the newest position that connected routers have acknowledged, and whether the
            new primary has it.
        waiting: nodes that have not replayed the journal's row yet, with what to do.
    """

    change: Change
    outcome: str
    fence: Level
    steps: tuple[Mapping[str, Any], ...]
    write_pause_ms: float | None = None
    acknowledged: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    waiting: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        is_back = self.outcome == "aborted"
        return {
            "operation": self.change.operation,
            "kind": self.change.kind,
            "shard": self.change.shard,
            "outcome": self.outcome,
            "epoch": self.change.epoch - is_back,
            "primary": self.change.former if is_back else self.change.candidate,
            "former": self.change.former,
            "fence": self.fence.name,
            "write_pause_ms": self.write_pause_ms,
            "acknowledged": dict(self.acknowledged),
            "loss": None if self.loss is None else self.loss.document(),
            "steps": [dict(step) for step in self.steps],
            "waiting": dict(self.waiting),
        }


class Promotion:
    """One run of one operation on the servers of a shard.

    Args:
        level: the fence to use.
        told: called with each step's begin and end, in this thread.

    Attributes:
        fence_held: the level that holds on the former primary, as far as this run has seen.
        waiting: nodes that have still to be rejoined, and how.
    """

    unwritten: frozenset[StepName] = frozenset()
    """Steps that are not written down before they begin: no node may write then, or the first write
    of a client is waited for."""

    def __init__(
        self,
        shard: ShardServers,
        change: Change,
        level: Level,
        wishes: Wishes,
        told: Told = tell_nobody,
    ) -> None:
        self.shard = shard
        self.change = change
        self.level = level
        self.wishes = wishes
        self.records = Records(change.operation)
        self.fence_held = Level.NONE
        self.loss: Loss | None = None
        self.waiting: dict[str, str] = {}
        self._told = told
        self._done: list[Mapping[str, Any]] = []
        self._paused_at: float | None = None
        self._last_position: int | None = None
        self._next_transaction: int | None = None
        self._timeline = 0
        self._fork: int | None = None
        self._announced_id: int | None = None
        self._first_write_at: float | None = None
        self._seen = (0, 0)
        self._routers = 0

    def run(self, left: Iterator[Step]) -> None:
        """Do the steps that are left, one after the other.

        Raises:
            OperationFailed: one failed; the servers are as it has left them.
        """
        for step in left:
            self._run(step)

    def report(self, outcome: str = "") -> Report:
        """Return what was done; without an outcome it is one of an operation that has ended."""
        pause = None
        if self._paused_at is not None and self._first_write_at is not None:
            pause = round((self._first_write_at - self._paused_at) * 1000, 1)
        return Report(
            change=self.change,
            outcome=outcome or ("incomplete" if self._is_incomplete else "done"),
            fence=self.fence_held,
            steps=tuple(self._done),
            write_pause_ms=pause,
            acknowledged=self._acknowledged(),
            loss=self.loss,
            waiting=dict(self.waiting),
        )

    @property
    def _is_incomplete(self) -> bool:
        """A node is not there that should be; a former primary that was not to come back may be."""
        return any(name != self.change.former or self.change.rejoins for name in self.waiting)

    def written_plan(self) -> dict[str, Any]:
        """Return what whoever resumes the operation needs to know."""
        return planning.written(self.change, self.level, self.wishes)

    def _run(self, step: Step) -> None:
        name = step.name.value
        self._told(Progress(self.change.operation, step, "begun"))
        self.records.begun(name)
        if step.name not in self.unwritten:
            self._write_down()
        began = time.monotonic()
        try:
            detail = getattr(self, name)()
        except OperationRefused:
            raise
        except SQLRouteError as error:
            ms = (time.monotonic() - began) * 1000
            why = {"error": str(error)}
            self.records.ended(name, "failed", ms, why)
            self._told(Progress(self.change.operation, step, "failed", ms, why))
            raise OperationFailed(
                f"step {name} of operation {self.change.operation} failed: {error}",
                operation=self.change.operation,
                step=name,
            ) from error
        ms = (time.monotonic() - began) * 1000
        self._done.append({"step": name, "ms": round(ms, 1), **detail})
        self.records.ended(name, "done", ms, detail)
        self._told(Progress(self.change.operation, step, "done", ms, detail))

    def _write_down(self) -> None:
        """Write down what has happened, where a node takes writes."""
        for server in (self._candidate, self._former):
            if server is not None and server.is_connected:
                with contextlib.suppress(OperationFailed):
                    if not server.is_standby():
                        self.records.write(server)
                        return

    @property
    def _former(self) -> Server | None:
        return self.shard.servers.get(self.change.former)

    @property
    def _candidate(self) -> Server:
        return self.shard.servers[self.change.candidate]

    # steps

    def promote(self) -> dict[str, Any]:
        """Make the candidate the primary."""
        server = self._candidate
        server.promote()
        if not wait_for(lambda: not server.is_standby(), timeout=self.wishes.timeout, pause=0.001):
            raise OperationFailed(
                f"{server.name} was asked to promote and is still in recovery after "
                f"{self.wishes.timeout:g} s; look at its log, then `sqlroute op resume "
                f"{self.change.operation}`"
            )
        return {}

    def announce(self) -> dict[str, Any]:
        """Write the first rows of the epoch: whoever replays them follows the right primary."""
        server, change = self._candidate, self.change
        self._timeline = server.timeline()
        self._fork = _fork_of(server, self._timeline)
        fork = None if self._fork is None else format_lsn(self._fork)
        fence = self.fence_held.name if self.fence_held is not Level.NONE else "none"
        row = (
            *(change.epoch, change.shard, change.candidate, change.former or None),
            *(self._timeline, fork, change.kind, fence, change.operation),
        )
        found = server.transaction(
            *self._before_journal(),
            (_JOURNAL, row),
            (_STEADY, (change.epoch, change.candidate, self._timeline, fork)),
            *self.records.statements,
            (_LAST, (change.shard,)),
        )
        self.records.written()
        self._announced_id = int(found[0]["id"])
        return {"epoch": change.epoch, "timeline": self._timeline, "fork": fork}

    def verify(self) -> dict[str, Any]:
        """Wait until every replica has replayed the journal's row: nothing less is a proof."""
        self._await_first_write()
        look = self.shard.look()
        for facts in look.facts.values():
            if facts.answers:
                self._note_names(facts.told.get("monitors") or ())
            elif facts.name != self.change.former:
                self.waiting[facts.name] = (
                    f"does not answer ({facts.error}); run `sqlroute rejoin {facts.name}` when it "
                    "does"
                )
        replicas = [name for name, facts in look.facts.items() if facts.is_replica]
        seen = self.shard.each(self._has_replayed, replicas) if replicas else {}
        for name in (name for name, has in seen.items() if not has):
            self.waiting[name] = (
                f"has not replayed the journal's row of epoch {self.change.epoch} after "
                f"{self.wishes.timeout:g} s; run `sqlroute rejoin {name}`"
            )
        return {
            "replayed": [name for name, has in seen.items() if has],
            "former_wrote": self._former_wrote(),
        }

    def rejoin(self) -> dict[str, Any]:
        """Let the former primary come back as a replica; that it does not is told, no failure."""
        try:
            return rejoining.rejoin(
                self.shard,
                self.change.former,
                self.change.candidate,
                epoch=self.change.epoch,
                timeout=max(self.wishes.timeout, 60.0),
            )
        except (OperationRefused, OperationFailed, DriverError) as error:
            self.waiting[self.change.former] = (
                f"did not come back ({error}); run `sqlroute rejoin {self.change.former}`"
            )
            return {"error": str(error)}

    def close(self) -> dict[str, Any]:
        """Write the end down, with the report."""
        former = self.change.former
        if former and not self.change.rejoins:
            is_fenced = self.fence_held is not Level.NONE
            self.waiting.setdefault(
                former,
                f"is {'fenced' if is_fenced else 'NOT fenced'}, and stays away until "
                f"`sqlroute rejoin {former}`",
            )
        self.records.end(self._candidate, "done", self.report().document())
        # until a checkpoint the control file has the old timeline: should the new primary crash
        # now, pg_rewind of 15 takes it for one that was never promoted, and fails
        with contextlib.suppress(OperationFailed):
            self._candidate.checkpoint(max(60.0, self.wishes.timeout))
        return {}

    # inside

    def _before_journal(self) -> Iterable[tuple[str, Any]]:
        """Return statements that the transaction of the announcement begins with."""
        return ()

    def _has_replayed(self, name: str) -> bool:
        server = self.shard.servers[name]
        try:
            return wait_for(
                lambda: server.journal_epoch() >= self.change.epoch,
                timeout=self.wishes.timeout,
                pause=0.005,
            )
        except OperationFailed:
            return False

    def _former_wrote(self) -> str:
        """Say whether the former primary has written anything after its last position."""
        if self.fence_held is Level.L4:
            return "nothing: it is down"
        if self._next_transaction is None or self._former is None:
            return "not known"
        try:
            after = self._former.next_transaction()
        except OperationFailed:
            return "not known: it does not answer"
        count = after - self._next_transaction
        return f"{count} transaction(s) that are lost" if count else "nothing"

    def _await_first_write(self) -> None:
        if self._announced_id is None:
            return
        own, self._announced_id = self._announced_id + 1, None

        def somebody_wrote() -> bool:
            return self._candidate.next_transaction() > own

        with contextlib.suppress(OperationFailed):
            if wait_for(somebody_wrote, timeout=FIRST_WRITE, pause=0.001):
                self._first_write_at = time.monotonic()

    def _note_names(self, names: Iterable[str]) -> None:
        """Note what routers say in the names of their connections."""
        seen = [planning.seen_in(name) for name in names]
        self._routers = max(self._routers, len(seen))
        before = [at for at in seen if not self._timeline or at[0] < self._timeline]
        self._seen = max(self._seen, *before, (0, 0))

    def _acknowledged(self) -> dict[str, Any]:
        """Compare what routers have acknowledged with what the new primary has."""
        if not self._routers:
            return {"routers": 0, "text": "no router was connected that could tell"}
        if self._seen == (0, 0):
            return {"routers": self._routers, "text": "the routers had acknowledged nothing"}
        timeline, lsn = self._seen
        newest = f"{timeline}/{format_lsn(lsn)}"
        end = self._fork if self._fork is not None else self._last_position
        if end is None:
            text = f"acknowledged up to {newest}; where the new timeline began is not known"
        elif lsn <= end:
            text = f"all is there: acknowledged up to {newest}, kept up to {format_lsn(end)}"
        else:
            text = f"acknowledged up to {newest}, kept only up to {format_lsn(end)}"
        return {
            "routers": self._routers,
            "newest": newest,
            "kept": None if end is None else format_lsn(end),
            "present": None if end is None else lsn <= end,
            "text": text,
        }


def _fork_of(server: Server, timeline: int) -> int | None:
    """Return where a timeline began, if the role may read that."""
    for query in _HISTORIES:
        with contextlib.suppress(OperationFailed):
            text = str(server.value(query, (timeline,)))
            return max(parse_history(text).values(), default=None)
    return None
