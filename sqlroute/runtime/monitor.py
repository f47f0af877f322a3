"""The one thread that watches all servers, and what the rest of the program asks of it.

A daemon thread with an event loop of its own, so that it serves sync and async programs alike. It
probes every node about once per ``interval``, folds what it sees into a :class:`Health` and
publishes that as a whole: readers take the attribute and never lock. It starts when first needed,
again in a forked child, and ends in :meth:`Monitor.close`.

What is decided about a node is decided in :mod:`sqlroute.health`; how it is asked stands in
:mod:`sqlroute.runtime.probe`; this module only says when.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Protocol
from weakref import WeakSet

from sqlroute.health import (
    FENCE,
    Health,
    NodeHealth,
    Observation,
    ShardHealth,
    State,
    observe,
    probe_pause,
    statement_failed,
)
from sqlroute.runtime.probe import Probe, explain
from sqlroute.topology import Node, Topology

log = logging.getLogger("sqlroute.monitor")

JITTER = 0.2
"""Share by which the pauses between probes differ, so that many routers do not probe in step."""

CLOSE_PATIENCE = 2.0
"""Seconds :meth:`Monitor.close` gives the thread; only a callback can take that long."""

SHORTEST_PAUSE = 0.002
"""Seconds from one look at a node to the next, whoever wants it: a program that notifies without
end must not keep the thread, nor the server, busy."""

OnHealth = Callable[[Health, Health], None]
OnDown = Callable[[str], None]

_monitors: WeakSet[Monitor] = WeakSet()


class Usage(Protocol):
    """What a monitor asks the program about its statements. From its thread: must not block."""

    def is_used(self, shard: str) -> bool:
        """Say if statements go to a shard; a new one must :meth:`Monitor.ask` first if not."""

    def take_answered(self, node: str) -> tuple[int, float]:
        """Return how many reads a node has answered since the last call, and their seconds."""

    def name_of(self, shard: str) -> str:
        """Return what the connections to the nodes of a shard are to be called by now."""


class Monitor:
    """Watches the nodes of a topology.

    Args:
        topology: whose nodes.
        interval: seconds between two probes of a node, +-20 %. The cost is about 0.2 ms of this
            process per probe: for thousands of nodes choose a longer one.
        deadline: seconds after which a probe has failed, connecting included.
        on_health: called with the old and the new health when a node's state, role or refusal or
            a shard's primary has changed. From the monitor's thread: it must not block.
        on_down: called with the name of a node that is down because it hangs: what waits for an
            answer from it waits in vain. From the monitor's thread.
        rate: probes per second that one node should answer to all monitors together. Where there
            are more than ``rate * interval`` of them, each one asks less often.
        usage: knows what the program's statements do. The nodes of a shard that it does not use
            are asked 20 times less often. Without it all are used.
        concurrency: probes under way at once. Nodes that are down have as many of their own, so
            that a thousand hanging servers do not delay the news of the others.
    """

    _life: threading.RLock
    _lock: threading.RLock
    _all_seen: threading.Event
    _unseen: set[str]
    _rounds: dict[str, Future[None]]
    _news: deque[tuple[Health, Health, str]]
    idle: frozenset[str]
    """Shards whose nodes are asked rarely now, since nobody uses them."""

    def __init__(
        self,
        topology: Topology,
        *,
        interval: float = 0.5,
        deadline: float = 0.5,
        on_health: OnHealth | None = None,
        on_down: OnDown | None = None,
        rate: float = 100.0,
        usage: Usage | None = None,
        concurrency: int = 64,
    ) -> None:
        self.interval = interval
        self.deadline = deadline
        self.rate = rate
        self._usage = usage
        self.idle = frozenset()
        self.concurrency = concurrency
        self._on_health = on_health
        self._on_down = on_down
        self._health = Health.initial(topology)
        self._watcher: _Watcher | None = None
        self._is_closed = False
        self._is_left_behind = False
        self._make_locks()
        _monitors.add(self)

    def __repr__(self) -> str:
        nodes = self._health.nodes.values()
        up = sum(node.state is State.UP for node in nodes)
        running = "running" if self._watcher is not None else "not running"
        return f"<Monitor {running}, {up} of {len(nodes)} nodes up>"

    @property
    def health(self) -> Health:
        """What is known now: an immutable value. Reading it in a forked child starts the thread."""
        if self._is_left_behind:
            self._run_unless_closed()
        return self._health

    @property
    def last_health(self) -> Health:
        """What was known last. Starts nothing and takes no lock: the garbage collector may ask."""
        return self._health

    def start(self) -> None:
        """Start the thread, also after :meth:`close`; nothing if it runs."""
        self._is_closed = False
        self._run_unless_closed()

    def close(self) -> None:
        """Stop the thread and close its connections; the last health stays readable.

        Takes no longer than :data:`CLOSE_PATIENCE`, whatever the servers do.
        """
        with self._life:
            watcher, self._watcher = self._watcher, None
            self._is_closed, self._is_left_behind = True, False
        if watcher is not None:
            watcher.stop(CLOSE_PATIENCE)
        with self._lock:
            rounds, self._rounds = self._rounds, {}
        for asked in rounds.values():
            _settle(asked)

    def ready(self, timeout: float) -> Health:
        """Start, and return the health once every node was asked with or without an answer.

        After ``timeout`` seconds it returns what is known by then.
        """
        self.start()
        self._all_seen.wait(timeout)
        return self._health

    def ask(self, shard: str, timeout: float) -> Health:
        """Probe all nodes of a shard now, and return the health after that.

        Callers at the same time share one round. It is over when every node has answered or
        failed, or as soon as a primary on a new timeline shows; a node that was hanging before
        is asked and not waited for. Never takes longer than ``timeout`` seconds.

        Raises:
            UnknownName: the topology has no such shard.
        """
        self._health.shard(shard)
        if self._is_closed:
            return self._health
        asked = self._round(shard)
        watcher = self._watcher
        if watcher is None or threading.get_ident() != watcher.thread.ident:
            with contextlib.suppress(TimeoutError):
                asked.result(timeout)
        return self._health

    def asking(self, shard: str) -> Future[None]:
        """Have all nodes of a shard probed now; the future is done when :meth:`ask` would return.

        Shared by all who ask: wait for it, do not cancel it.
        """
        if self._is_closed:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._round(shard)

    def look(self, shard: str) -> None:
        """Have all nodes of a shard probed now, without waiting for it."""
        if not self._is_closed:
            self._round(shard)

    def tell(self, shard: str) -> None:
        """Have the nodes of a shard told at once what there is to tell, without waiting for it."""
        watcher = self._watcher
        if watcher is not None and not self._is_closed:
            self._on_thread(watcher.wake, shard)

    def report_failure(self, node: str, error: BaseException | str) -> None:
        """Note that a real statement could not be run because of its server.

        The node is down, for every reader, when this returns; its shard is asked at once.
        A node that is not, or no longer, in the topology is nobody's concern.
        """
        known = self._health.nodes.get(node)
        if known is None:
            return
        text = explain(error, self._health.topology.node(node))
        self._change(known.shard, lambda old: statement_failed(old, node, text, _now()))
        watcher = self._watcher
        if FENCE in text and watcher is not None:
            # the probe's own connection may be older than the fence, and tells nothing of it
            self._on_thread(watcher.renew, node)
        if not self._is_closed:
            self._round(known.shard)
            self._on_thread(self._tell)
            if watcher is not None and self._health.shard(known.shard).primary is None:
                self._on_thread(watcher.wake, known.shard)  # which is asked more often now

    def set_topology(self, topology: Topology) -> None:
        """Watch another set of nodes; what is known of those that stay is kept."""
        with self._lock:
            self._health = self._health.with_topology(topology)
            names = self._health.nodes
            new = {name for name, node in names.items() if not node.has_outcome}
            self._unseen = (self._unseen & set(names)) | new
            if self._unseen:
                self._all_seen.clear()
            else:
                self._all_seen.set()
        watcher = self._watcher
        if watcher is not None:
            self._on_thread(watcher.watch_topology)

    # from the thread

    def _observed(self, observation: Observation) -> None:
        known = self._health.nodes.get(observation.node)
        if known is None:
            return
        self._change(known.shard, lambda old: observe(old, observation, _now()))
        with self._lock:
            self._unseen.discard(observation.node)
            if not self._unseen:
                self._all_seen.set()
        self._tell()

    def _tell(self) -> None:
        """Report what has changed, in the order it did. Only ever on the monitor's thread."""
        while self._news:
            old, new, shard = self._news.popleft()
            changes = tuple(_changes(old, new, shard))
            for level, text in changes:
                log.log(level, "%s", text)
            if changes and self._on_health is not None:
                try:
                    self._on_health(old, new)
                except Exception:
                    log.exception("on_health failed")
            for name in _new_hanging(old, new, shard):
                if self._on_down is not None:
                    try:
                        self._on_down(name)
                    except Exception:
                        log.exception("on_down failed for node %s", name)

    # inside

    def _make_locks(self) -> None:
        # Reentrant: the garbage collector runs in any thread, also within these, and may unwind a
        # session whose connection is lost, which is then reported here.
        self._life = threading.RLock()
        self._lock = threading.RLock()
        self._all_seen = threading.Event()
        self._unseen = set(self._health.nodes)
        self._rounds = {}
        self._news = deque()

    def _change(self, shard: str, change: Callable[[Health], Health]) -> None:
        """Publish the next health: the lock is held over a pure function, never over I/O."""
        with self._lock:
            old = self._health
            # A concurrent set_topology may have taken the shard away.
            if shard not in old.shards:
                return
            new = change(old)
            while old is not self._health:  # this thread's garbage collector has changed it
                old = self._health
                new = change(old)
            self._health = new
            if new is not old:
                self._news.append((old, new, shard))

    def _run_unless_closed(self) -> None:
        with self._life:
            if self._watcher is not None or self._is_closed:
                return
            with self._lock:
                self._unseen = set(self._health.nodes)
                self._all_seen.clear()
            self._is_left_behind = False
            self._watcher = _Watcher(self)
            self._watcher.start()

    def _round(self, shard: str) -> Future[None]:
        self._run_unless_closed()
        with self._lock:
            asked = self._rounds.get(shard)
            if asked is not None and not asked.done():
                return asked
            asked = self._rounds[shard] = Future()
        watcher = self._watcher
        if watcher is None or not self._on_thread(watcher.begin_round, shard, asked):
            _settle(asked)
        return asked

    def _on_thread(self, call: Callable[..., None], *values: object) -> bool:
        watcher = self._watcher
        if watcher is None:
            return False
        try:
            watcher.loop.call_soon_threadsafe(call, *values)
        except RuntimeError:  # closed meanwhile
            return False
        return True

    def _after_fork_in_child(self) -> None:
        """Forget the parent's thread, which is not here, and its sockets, which are not ours."""
        watcher, self._watcher = self._watcher, None
        self._make_locks()
        if watcher is not None:
            self._is_left_behind = True
            watcher.forsake()


class _Watched:
    """One node and the probe of it that is under way."""

    __slots__ = ("asking", "is_used", "node", "probe", "shard", "task", "wake")

    def __init__(self, node: Node, shard: str, keyspace: str, usage: Usage | None) -> None:
        self.node = node
        self.shard = shard
        self.wake = asyncio.Event()
        self.is_used = True  # when its pause began
        self.probe = Probe(
            node,
            keyspace,
            on_wake=self.wake.set,
            shard=shard,
            name=None if usage is None else partial(usage.name_of, shard),
        )
        self.asking: asyncio.Task[Observation] | None = None
        self.task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<watched {self.node.name}>"

    def tasks(self) -> Iterator[asyncio.Task[Observation] | asyncio.Task[None]]:
        for task in (self.task, self.asking):
            if task is not None:
                yield task


class _Watcher:
    """One life of the monitor's thread: its loop, its tasks, its connections."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        self.thread = threading.Thread(target=self._run, name="sqlroute monitor", daemon=True)
        self._stopped = asyncio.Event()
        self._watched: dict[str, _Watched] = {}
        self._rounds: set[asyncio.Task[None]] = set()
        self._ended: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(monitor.concurrency)
        self._slots_of_the_down = asyncio.Semaphore(monitor.concurrency)
        self._random = Random()

    def start(self) -> None:
        self.thread.start()

    def stop(self, patience: float) -> None:
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._stopped.set)
        if threading.get_ident() != self.thread.ident:
            self.thread.join(patience)

    def forsake(self) -> None:
        """Close the descriptors a forked child has inherited, without a word to the servers.

        No object is closed: libpq would say goodbye on the parent's connection, and the loop
        would take its sockets out of the epoll instance that parent and child share. The objects
        themselves stay for ever: the frames of the thread that is not here still hold them.
        """
        kept = {watched.probe.fileno() for watched in list(self._watched.values())}
        waited_for = {key.fd for key in (self._selector.get_map() or {}).values()}
        for fileno in kept | waited_for:
            if fileno is not None and fileno >= 0:
                with contextlib.suppress(OSError):
                    os.close(fileno)
        self._selector.close()

    def watch_topology(self) -> None:
        """Begin to watch nodes that came, end it for those that went."""
        topology = self._monitor.health.topology
        wanted = {node.name: node for node in topology.nodes()}
        for name, watched in list(self._watched.items()):
            if (
                wanted.get(name) != watched.node
                or topology.shard_of_node.get(name) != watched.shard
            ):
                del self._watched[name]
                self._keep(self._ended, self._end((watched,)))
        for name, node in wanted.items():
            if name not in self._watched:
                shard = topology.shard_of_node[name]
                keyspace = topology.keyspace_of_shard[shard].name
                watched = _Watched(node, shard, keyspace, self._monitor._usage)
                watched.task = self.loop.create_task(self._watch(watched))
                self._watched[name] = watched

    def wake(self, shard: str) -> None:
        for watched in self._watched.values():
            if watched.shard == shard:
                watched.wake.set()

    def renew(self, node: str) -> None:
        watched = self._watched.get(node)
        if watched is not None:
            watched.probe.renew()
            watched.wake.set()

    def begin_round(self, shard: str, asked: Future[None]) -> None:
        self._keep(self._rounds, self._ask(shard, asked))

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._main())
        except Exception:
            log.exception("the monitor has ended by a fault of its own")
        finally:
            self.loop.close()

    async def _main(self) -> None:
        self.watch_topology()
        await self._stopped.wait()
        for task in self._rounds:  # first: a round that goes on may begin another probe
            task.cancel()
        # what ends the watch of a node that went must come to its end: it closes a connection
        await asyncio.gather(*self._rounds, *self._ended, return_exceptions=True)
        await self._end(tuple(self._watched.values()))

    async def _end(self, ended: tuple[_Watched, ...]) -> None:
        tasks = [task for watched in ended for task in watched.tasks()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for watched in ended:
            watched.probe.drop()

    async def _watch(self, watched: _Watched) -> None:
        while True:
            known = self._health_of(watched)
            is_down = known is not None and known.state is State.DOWN
            try:
                async with self._slots_of_the_down if is_down else self._slots:
                    await self._fresh(watched)  # one under way tells what there was at its begin
            except Exception:
                log.exception("probing node %s failed by a fault of the monitor", watched.node)
            began = self.loop.time()
            timer = self.loop.call_later(self._pause(watched), watched.wake.set)
            await watched.wake.wait()
            timer.cancel()
            rest = began + SHORTEST_PAUSE - self.loop.time()
            if rest > 0:
                await asyncio.sleep(rest)
            watched.wake.clear()

    def _pause(self, watched: _Watched) -> float:
        usage = self._monitor._usage
        watched.is_used = usage is None or usage.is_used(watched.shard)
        idle = self._monitor.idle
        if watched.is_used is (watched.shard in idle):
            self._monitor.idle = idle ^ {watched.shard}
        shard = self._monitor.health.shards.get(watched.shard)
        pause = probe_pause(
            self._health_of(watched),
            interval=self._monitor.interval,
            rate=self._monitor.rate,
            is_used=watched.is_used,
            is_held=shard is not None and shard.hold is not None,
            is_lost=watched.is_used
            and shard is not None
            and shard.primary is None
            and shard.highest_timeline > 0,
        )
        return pause * self._random.uniform(1 - JITTER, 1 + JITTER)

    async def _observe(self, watched: _Watched) -> Observation:
        """Probe a node, or join the probe that is under way."""
        if watched.asking is None:
            watched.asking = self.loop.create_task(self._probe(watched))
        return await asyncio.shield(watched.asking)

    async def _probe(self, watched: _Watched) -> Observation:
        try:
            observation = await watched.probe.observe(self._monitor.deadline)
        finally:
            watched.asking = None
        usage = self._monitor._usage
        if usage is not None and observation.error is None:
            statements, seconds = usage.take_answered(observation.node)
            observation = replace(observation, statements=statements, statement_seconds=seconds)
        before = self._monitor.health.shards.get(watched.shard)
        self._monitor._observed(observation)
        now = self._monitor.health.shards.get(watched.shard)
        if before is not None and now is not None and _is_urgent(before, now):
            self.wake(watched.shard)  # all its nodes are told, and asked more often or less
        return observation

    async def _ask(self, shard: str, asked: Future[None]) -> None:
        before = self._monitor.health
        members = [w for w in self._watched.values() if w.shard == shard]
        probes = {w.node.name: self.loop.create_task(self._fresh(w)) for w in members}
        try:
            awaited = {probes[name] for name in probes if not _hangs(before.nodes.get(name))}
            pending = awaited or set(probes.values())
            while pending and not self._has_promotion(before, shard):
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            _settle(asked)
            await asyncio.gather(*probes.values(), return_exceptions=True)
            for watched in members:
                if not watched.is_used:  # its pause is that of a shard that nobody uses
                    watched.wake.set()
        finally:
            _settle(asked)
            for probe in probes.values():
                probe.cancel()
            await asyncio.gather(*probes.values(), return_exceptions=True)

    async def _fresh(self, watched: _Watched) -> None:
        """Probe a node, not counting an answer to a question that was asked before this."""
        if watched.asking is not None:
            earlier = await asyncio.shield(watched.asking)
            if earlier.error is not None:
                return
        await self._observe(watched)

    def _has_promotion(self, before: Health, shard: str) -> bool:
        old, new = before.shards.get(shard), self._monitor.health.shards.get(shard)
        if old is None or new is None or new.primary is None:
            return False
        return new.highest_timeline > old.highest_timeline > 0

    def _health_of(self, watched: _Watched) -> NodeHealth | None:
        return self._monitor.health.nodes.get(watched.node.name)

    def _keep(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _is_urgent(before: ShardHealth, now: ShardHealth) -> bool:
    """Say if callers wait since a moment ago, or need not any more."""
    has_lost_primary = before.primary is not None and now.primary is None
    return has_lost_primary or (before.hold is None) != (now.hold is None)


def _changes(old: Health, new: Health, shard: str) -> Iterator[tuple[int, str]]:
    """Say what changed in a shard that somebody would like to know: (level of the log, text)."""
    was_shard, is_shard = old.shards.get(shard), new.shards.get(shard)
    if was_shard is None or is_shard is None:
        return
    for name in is_shard.members:
        was, now = old.nodes.get(name), new.nodes[name]
        if was is None or was is now:
            continue
        if was.state is not now.state:
            why = "" if now.state in (State.UP, State.RECOVERING) else f": {now.last_error}"
            yield logging.INFO, f"node {name}: {was.state.value} -> {now.state.value}{why}"
        if was.role is not now.role:
            yield (
                logging.INFO,
                f"node {name}: {was.role.value} -> {now.role.value} (timeline {now.timeline})",
            )
        if now.refused and was.refused != now.refused:
            yield logging.WARNING, f"node {name} is refused: {now.refused}"
        elif was.refused and not now.refused:
            yield logging.INFO, f"node {name} is refused no more"
    if was_shard.primary != is_shard.primary:
        if is_shard.primary is None:
            yield logging.WARNING, f"shard {shard} has lost its primary {was_shard.primary}"
        else:
            yield (
                logging.INFO,
                f"shard {shard}: the primary is {is_shard.primary} (timeline "
                f"{is_shard.highest_timeline}), was {was_shard.primary or 'unknown'}",
            )
    was_hold, hold = was_shard.hold, is_shard.hold
    if hold is not None and (was_hold is None or was_hold.operation != hold.operation):
        yield (
            logging.INFO,
            f"shard {shard}: operation {hold.operation} holds write transactions, "
            f"{max(hold.ends_at - hold.since, 0):.1f} s at most",
        )
    elif was_hold is not None and hold is None:
        yield logging.INFO, f"shard {shard}: operation {was_hold.operation} holds no more"
    if was_shard.revision != is_shard.revision:
        yield logging.DEBUG, f"shard {shard}: its nodes are at revision {is_shard.revision}"
    if len(is_shard.contenders) > 1 and is_shard.contenders != was_shard.contenders:
        names = ", ".join(is_shard.contenders)
        yield logging.WARNING, f"shard {shard} has more than one primary: {names}"


def _new_hanging(old: Health, new: Health, shard: str) -> Iterator[str]:
    known = new.shards.get(shard)
    for name in known.members if known is not None else ():
        node, before = new.nodes[name], old.nodes.get(name)
        if new.topology.node(name).pooler:
            # it keeps clients of a server that is gone waiting, and refuses new ones at once
            if node.state is State.DOWN and (before is None or before.state is not State.DOWN):
                yield name
        elif _hangs(node) and not _hangs(before):
            yield name


def _hangs(node: NodeHealth | None) -> bool:
    return node is not None and node.hung and node.state is State.DOWN


def _settle(asked: Future[None]) -> None:
    with contextlib.suppress(InvalidStateError):  # settled already, by close() or by the round
        asked.set_result(None)


def _now() -> float:
    return time.monotonic()


def _after_fork_in_child() -> None:
    for monitor in list(_monitors):
        monitor._after_fork_in_child()


def _close_all() -> None:
    for monitor in list(_monitors):
        monitor.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
# A daemon thread is stopped anywhere at the end of the interpreter; its connections would end
# without a goodbye, and each server would log that.
atexit.register(_close_all)
