"""A cluster under its clients and an operator: what scenarios are made of, and their one check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, Self

from sqlroute.errors import OperationFailed, SQLRouteError
from sqlroute.ops import commands, resuming
from sqlroute.ops.planning import Wishes, parse_position

from .clients import Clients, Told
from .cluster import SHARD, Cluster
from .history import Failure, History, Interruption, Passage, faults, longest_gap, lost

PATIENCE = 30.0
AFTER = 0.2
"""Seconds of load after a promotion that belong to its window, in which the gap is looked for."""


@dataclass(slots=True)
class Leg:
    """What was seen between two checks.

    Attributes:
        gap: the longest time without any acknowledged write of a routed client, in seconds.
        failed: requests of routed clients that failed.
        warned: reads that were told that what their token has seen was lost.
        broken: each breach of an invariant.
    """

    name: str
    gap: float = 0.0
    writes: int = 0
    reads: int = 0
    warned: int = 0
    failed: list[Failure] = field(default_factory=list)
    lost: int = 0
    lost_by_strangers: int = 0
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.writes:,} writes, {self.reads:,} reads, longest gap "
            f"{self.gap * 1000:.0f} ms, {len(self.failed)} failed, {self.lost} lost"
        )
        if self.lost_by_strangers:
            text += f" (of these {self.lost_by_strangers} of strangers)"
        if self.warned:
            text += f", {self.warned} reads told of it"
        return "; ".join((text, *self.notes))

    def evidence(self) -> Iterator[str]:
        yield from (f"  BROKEN {text}" for text in self.broken[:10])
        yield from (f"  failed {text}" for text in self.failed[:3])


class Trial:
    """Clients at work on a cluster, from beginning to end of a ``with`` block."""

    def __init__(
        self,
        cluster: Cluster,
        clients: Clients,
        rng: Random,
        *,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.cluster = cluster
        self.clients = clients
        self.rng = rng
        self.say = say
        self._said: dict[int, Passage] = {}
        self._interruptions: list[Interruption] = []
        self._pool = ThreadPoolExecutor(4)
        self._began = time.monotonic()
        self._told = Told()

    def __enter__(self) -> Self:
        self.clients.__enter__()
        try:
            self.clients.await_writes()
        except BaseException:
            self.clients.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.clients.__exit__(None, None, None)
        self._pool.shutdown(wait=False)

    # what an operator does

    def switch(self, **wishes: Any) -> dict[str, Any]:
        """Switch over and return the report's document. Raises: as :func:`commands.promote`."""
        report = commands.promote(self.cluster.settings, SHARD, Wishes(**wishes))
        return self._noted(report.document())

    def fail_over(self, **wishes: Any) -> dict[str, Any]:
        """Fail over and return the report's document. Raises: as :func:`commands.failover`."""
        report = commands.failover(self.cluster.settings, SHARD, Wishes(**wishes))
        return self._noted(report.document())

    def rejoin(self, node: str) -> dict[str, Any]:
        return commands.rejoin(self.cluster.settings, node, clones=True)

    def beside(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Begin something in a thread of its own."""
        return self._pool.submit(work, *arguments, **options)

    def finish(self, step: str = "") -> str:
        """End whatever a command has left, as an operator would, and note how.

        Args:
            step: where the command was interrupted, for the notes.

        Returns:
            ``resumed``, ``aborted`` or ``nothing to do``; empty if nothing helped.
        """
        ends = time.monotonic() + PATIENCE
        operation, errors, way = "", [], ""
        while not way and time.monotonic() < ends:
            try:
                running = [o for o in self._operations() if o["state"] in ("running", "abandoned")]
                if not running:
                    way = "nothing to do"
                    break
                operation = running[0]["operation"]
                way = self._end(operation)
            except (SQLRouteError, LookupError) as error:
                errors.append(str(error))
                time.sleep(0.3)
        if not way:
            self.say(f"  not finished after {step}: {errors[-1:]}")
        self._interruptions.append(Interruption(operation, step, way))
        return way

    # the check

    def began(self) -> None:
        """Begin the window in which a gap is looked for; what was told before is left out of it."""
        self._told = Told()
        self.clients.listen()
        self._began = time.monotonic()

    def check(self, name: str, *, is_whole: bool = False) -> Leg:
        """Check every invariant on what clients were told and servers have.

        Args:
            is_whole: of the whole history, not only of the last two timelines.
        """
        self.clients.await_writes()
        time.sleep(AFTER)
        ended = time.monotonic()
        told = self.clients.listen()
        places = self.cluster.settled()
        return self._judged(name, told, places, ended, is_whole)

    def end(self) -> Leg:
        """Stop the clients and check the whole history."""
        ended = time.monotonic()
        self.clients.stop()
        return self._judged("in all", self.clients.told, self.cluster.settled(), ended, True)

    # inside

    def _judged(self, name: str, told: Told, places: Any, ended: float, is_whole: bool) -> Leg:
        everything, strangers = self.clients.told, self.clients.strangers
        timeline = max((place.timeline for place in places), default=0)
        since = 0 if is_whole else timeline - 1
        history = History(
            acks=tuple(ack for ack in everything.acks if ack.stamp.timeline >= since),
            rows=self.cluster.rows(since),
            reads=tuple(everything.reads if is_whole else told.reads),
            passages=self._passages(),
            places=places,
            interruptions=tuple(self._interruptions),
            strangers=strangers,
        )
        began = self._began
        window = [a for a in everything.acks if a.answered >= began and a.writer not in strangers]
        failed = [f for f in everything.failures if f.ended >= began and f.client not in strangers]
        missing = lost(history)
        broken = list(faults(history))
        broken += [f"a client died: {f.error}" for f in everything.failures if f.what == "died"]
        silent = set(self.cluster.names) - {place.name for place in places}
        broken += [f"{node} does not answer in the end" for node in sorted(silent)]
        self._began = time.monotonic()
        return Leg(
            name,
            gap=longest_gap(window, began, ended),
            writes=len(window),
            reads=len(told.reads),
            warned=len(told.warned),
            failed=failed,
            lost=len(missing),
            lost_by_strangers=sum(ack.writer in strangers for ack in missing),
            broken=broken,
        )

    def _passages(self) -> tuple[Passage, ...]:
        return tuple(
            self._said.get(timeline, Passage(timeline, epoch, False, False, known_bytes=None))
            if kind == "failover"
            else Passage(timeline, epoch)
            for timeline, epoch, kind in self.cluster.journal()
        )

    def _noted(self, document: dict[str, Any]) -> dict[str, Any]:
        """Note what a failover has said that may be lost."""
        said = document["loss"]
        steps = {step["step"]: step for step in document["steps"]}
        if said is not None and "announce" in steps:
            found = steps["announce"]
            _, kept = parse_position(said["position"])
            self._said[found["timeline"]] = Passage(
                timeline=found["timeline"],
                epoch=found["epoch"],
                is_held=False,
                is_lossless=bool(said["quorum"]),
                kept=kept,
                known_bytes=said["known_bytes"],
            )
        return document

    def _operations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = resuming.list_operations(self.cluster.settings)["operations"]
        return found

    def _end(self, operation: str) -> str:
        if self.rng.random() < 0.5:
            try:
                resuming.abort(self.cluster.settings, operation)
            except OperationFailed:  # promoted already: it can only be finished
                pass
            else:
                return "aborted"
        found = resuming.resume(self.cluster.settings, operation)
        if not isinstance(found, dict):
            self._noted(found.document())
        return "resumed"
