"""The local topology as documents of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import (
    LocalTopology,
    down,
    open_topology,
    recorded_spec,
    remove,
    status,
)


def spec(
    directory: Path,
    *,
    shards: int | None = None,
    replicas: int | None = None,
    port: int | None = None,
    pg_bin: Path | None = None,
    is_new: bool = False,
) -> LocalSpec:
    """Return what is wanted: what is said, else what was built in the directory, else defaults.

    Args:
        is_new: what was built before will be deleted, and only its place counts.
    """
    built = recorded_spec(directory) or LocalSpec()
    usual = LocalSpec(port=built.port) if is_new else built
    return LocalSpec(
        shards=usual.shards if shards is None else shards,
        replicas=usual.replicas if replicas is None else replicas,
        port=usual.port if port is None else port,
        directory=directory,
        pg_bin=pg_bin,
        database=built.database,
        user=built.user,
        durable=built.durable,
    )


def described(topology: LocalTopology) -> dict[str, Any]:
    """Return a topology that is up, as it is now."""
    return local_status(topology.directory)


def local_status(directory: Path) -> dict[str, Any]:
    """Look at each server of a directory.

    Raises:
        LocalTopologyError: there is no topology.
    """
    topology = open_topology(directory)
    nodes = [
        {
            "name": node.name,
            "shard": node.shard,
            "port": node.port,
            "running": node.running,
            "paused": node.paused,
            "pid": node.pid,
            "role": node.role.value,
        }
        for node in status(directory)
    ]
    return {
        "directory": str(topology.directory),
        "config": str(topology.config_path),
        "version": topology.version,
        "running": all(node["running"] and not node["paused"] for node in nodes),
        "nodes": nodes,
    }


def stop(directory: Path, *, delete: bool) -> dict[str, Any]:
    """Stop the servers of a directory, and delete their data if asked to.

    Raises:
        LocalTopologyError: there is no topology.
    """
    place = open_topology(directory).directory
    stopped = down(directory)
    if delete:
        remove(directory)
    return {"directory": str(place), "stopped": list(stopped), "deleted": delete}
