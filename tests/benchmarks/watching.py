"""What it costs to watch 300 nodes, and how soon the death of one is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sqlroute.config import load
from sqlroute.health import Health, State
from sqlroute.local.node import LocalNode
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import LocalTopology, remove, up
from sqlroute.runtime.monitor import Monitor
from sqlroute.topology import Keyspace, Node, Shard, Topology

from . import servers
from .pairs import Figure, figure_of

SHARDS, REPLICAS, NAMES = 10, 2, 10
"""30 servers, each under 10 names: 300 nodes, each with a connection and probes of its own."""

INTERVAL = 1.0
WINDOWS, WINDOW = 15, 2.0
DEATHS = 7

_PATIENCE = 60.0


class _Diary:
    """When the monitor first said of a node that it is not up, and that it is down."""

    def __init__(self) -> None:
        self.doubted: dict[str, float] = {}
        self.down: dict[str, float] = {}

    def note(self, old: Health, new: Health) -> None:
        now = time.monotonic()
        for name, node in new.nodes.items():
            if node is old.nodes[name]:
                continue
            if node.state is not State.UP:
                self.doubted.setdefault(name, now)
            if node.state is State.DOWN:
                self.down.setdefault(name, now)


@dataclass(frozen=True, slots=True)
class _Death:
    """Seconds until each name of a server that died was no longer up, and until it was down."""

    doubted: list[float]
    down: list[float]


def watching(directory: Path) -> list[Figure]:
    """One thread watches 300 nodes, a probe of each about every second."""
    diary = _Diary()
    with _servers(directory) as local:
        topology = _many_names(local)
        monitor = Monitor(topology, interval=INTERVAL, on_health=diary.note)
        try:
            monitor.ready(_PATIENCE)
            _await_all_up(monitor)
            shares = [_share(monitor) for _ in range(WINDOWS)]
            replicas = [node for shard in local.shards for node in shard.nodes[1:]][:DEATHS]
            killed = [_die(monitor, diary, node, LocalNode.kill) for node in replicas]
            stopped = [_die(monitor, diary, node, LocalNode.pause) for node in replicas]
            replicas[0].pause()
            try:
                while_one_hangs = [_share(monitor) for _ in range(3)]
            finally:
                replicas[0].resume()
        finally:
            monitor.close()
    return [_cost(shares, while_one_hangs), _noticed(killed, stopped)]


@contextmanager
def _servers(directory: Path) -> Iterator[LocalTopology]:
    place = directory / "watching"
    port = servers.PORT
    spec = LocalSpec(SHARDS, REPLICAS, port=port, directory=place, durable=False)
    topology = up(spec)
    try:
        yield topology
    finally:
        remove(place)


def _many_names(local: LocalTopology) -> Topology:
    """Return a topology in which each server is there under several names, in as many keyspaces."""
    (written,) = load(local.config_path).topology.keyspaces
    return Topology(
        tuple(
            Keyspace(
                f"{written.name}{i}",
                tuple(
                    Shard(f"{shard.name}-{i}", tuple(_renamed(node, i) for node in shard.nodes))
                    for shard in written.shards
                ),
            )
            for i in range(NAMES)
        )
    )


def _renamed(node: Node, number: int) -> Node:
    return Node(
        f"{node.name}-{number}", node.host, node.port, node.database, node.user, node.password
    )


def _share(monitor: Monitor) -> float:
    """Return the share of one core, in percent, that the monitor's thread needs for a while."""
    (thread,) = (t for t in threading.enumerate() if t.name == "sqlroute monitor")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    began, worked = time.monotonic(), time.clock_gettime(clock)
    time.sleep(WINDOW)
    return 100 * (time.clock_gettime(clock) - worked) / (time.monotonic() - began)


def _cost(shares: list[float], while_one_hangs: list[float]) -> Figure:
    count = SHARDS * (REPLICAS + 1)
    each = median(shares) / 100 * INTERVAL / (count * NAMES) * 1e6
    notes = (
        f"{count * NAMES} nodes: {count} real servers under {NAMES} names each, a probe of each "
        f"every {INTERVAL:g} s; {each:.0f} us a probe",
        f"while one of the {count} servers is under SIGSTOP: {median(while_one_hangs):.1f} %",
    )
    return figure_of("watching: cost", 10.0, shares, "% of a core", notes)


def _die(
    monitor: Monitor, diary: _Diary, node: LocalNode, how: Callable[[LocalNode], None]
) -> _Death:
    """Let a server die; return when each of its names was noticed, all being up again."""
    names = [f"{node.name}-{i}" for i in range(NAMES)]
    diary.doubted.clear()
    diary.down.clear()
    began = time.monotonic()
    how(node)
    try:
        _await(lambda: all(name in diary.down for name in names), f"{node.name} seen down")
    finally:
        node.resume()
        node.start()
    _await_all_up(monitor)
    doubted = [diary.doubted[name] - began for name in names]
    return _Death(doubted, [diary.down[name] - began for name in names])


def _noticed(killed: list[_Death], stopped: list[_Death]) -> Figure:
    seconds = [second for death in killed for second in death.down]
    doubted = [second for death in stopped for second in death.doubted]
    down = [second for death in stopped for second in death.down]
    notes = (
        f"kill -9 of {len(killed)} servers, {NAMES} names each: down at the latest after "
        f"{max(seconds):.2f} s",
        f"SIGSTOP of the same: no more reads after {median(doubted):.2f} s (at the latest "
        f"{max(doubted):.2f} s), down after {median(down):.2f} s ({max(down):.2f} s)",
    )
    return figure_of("watching: a death", 1.5, seconds, "s", notes)


def _await_all_up(monitor: Monitor) -> None:
    _await(
        lambda: all(node.state is State.UP for node in monitor.health.nodes.values()),
        "all nodes up",
    )


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {_PATIENCE:g} s: {what}")
        time.sleep(0.02)
