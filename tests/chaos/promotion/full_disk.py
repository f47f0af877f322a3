"""A node whose disk is full: a small file system in memory in the place of its data directory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

import psycopg

from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.ops.server import wait_for

from .clients import Clients
from .cluster import Cluster
from .faults import bring_all_back
from .storm import Storm
from .trial import Trial

SIZE = "480m"
_MESSAGE = "SELECT pg_logical_emit_message(false, 'chaos', repeat('x', 1000000))"
_NO_ROOM = "No space left on device"
_PATIENCE = 30.0


def obstacle() -> str | None:
    """Return why no small disk can be had here; ``None`` if it can."""
    return None if os.geteuid() == 0 else "only root may mount one"


def run(
    topology: LocalTopology,
    count: int,
    *,
    seed: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Storm:
    """Fill the disk of a replica, then of the primary, so often; each time all come back."""
    report, began = Storm("full disk"), time.monotonic()
    with (
        _small_disk(topology.nodes[-1], topology) as replica,
        _small_disk(topology.nodes[0], topology) as primary,
        Cluster(_with(topology, replica, primary)) as cluster,
        Trial(cluster, Clients(cluster.config, writers=2), Random(seed), say=say) as trial,
    ):
        for _ in range(count):
            for harm, node in ((_of_replica, replica), (_of_primary, primary)):
                trial.began()
                harm(trial, node)
                report.legs.append(trial.check(f"full disk of {node.name}"))
                say(str(report.legs[-1]))
        report.whole = trial.end()
    report.seconds = time.monotonic() - began
    return report


def _of_replica(trial: Trial, node: LocalNode) -> None:
    """Without it the others go on; with room it comes back, and may be the primary."""
    if trial.cluster.primary() == node.name:
        trial.switch()
    before = node.log.stat().st_size
    with _full(node):
        _write_until(trial, lambda: _NO_ROOM in _said_since(node, before))
    trial.rejoin(node.name)
    trial.switch(to=node.name)


def _of_primary(trial: Trial, node: LocalNode) -> None:
    """It crashes; another becomes the primary, and it comes back with room."""
    if trial.cluster.primary() != node.name:
        trial.switch(to=node.name)
    before = node.log.stat().st_size
    with _full(node):
        _write_until(trial, lambda: "PANIC" in _said_since(node, before))
        node.kill()  # it may try to start again and again
        trial.fail_over(accepts_loss=True)
    bring_all_back(trial)


def _said_since(node: LocalNode, size: int) -> str:
    """Return what a server has logged beyond a size of its log."""
    return node.log.read_bytes()[size:].decode(errors="replace")


def _write_until(trial: Trial, is_over: Callable[[], bool]) -> None:
    """Write log on the primary until the disk is seen to be full.

    Raises:
        TimeoutError: nothing comes of it.
    """
    primary = trial.cluster.primary()

    def wrote_and_over() -> bool:
        with contextlib.suppress(psycopg.Error), trial.cluster.connect(primary) as connection:
            for _ in range(16):
                connection.execute(_MESSAGE)
        return is_over()

    if not wait_for(wrote_and_over, timeout=_PATIENCE, pause=0.1):
        raise TimeoutError(f"a full disk has changed nothing after {_PATIENCE:g} s")


@contextmanager
def _full(node: LocalNode) -> Iterator[None]:
    ballast = node.data / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def _small_disk(node: LocalNode, topology: LocalTopology) -> Iterator[LocalNode]:
    """Put the data of a server that runs on a disk of its own, until the end of the block.

    Yields:
        The node, with its data there: below the mount point, so that a new copy can take its place.
    """
    node.stop()
    disk, aside = topology.directory / f"disk-{node.name}", node.data.with_name(f".{node.name}")
    disk.mkdir(mode=0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], check=True)
    moved = replace(node, data=disk / "data")
    try:
        subprocess.run(["cp", "-a", node.data, moved.data], check=True)
        owner = node.data.stat()
        os.chown(disk, owner.st_uid, owner.st_gid)
        node.data.rename(aside)
        node.data.symlink_to(moved.data)  # where the drivers look for it
        moved.start()
        yield moved
    finally:
        moved.stop("immediate")
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()
        if aside.exists():
            node.data.unlink(missing_ok=True)
            aside.rename(node.data)


def _with(topology: LocalTopology, *nodes: LocalNode) -> LocalTopology:
    """Return the topology with other nodes in the place of those of their names."""
    known = {node.name: node for node in nodes}
    shards = (
        replace(shard, nodes=tuple(known.get(node.name, node) for node in shard.nodes))
        for shard in topology.shards
    )
    return replace(topology, shards=tuple(shards))
