"""Facts of servers, made up: what the tests of preflight, planning and proof begin with."""

from __future__ import annotations

from typing import Any

from sqlroute.ops.preflight import NodeFacts
from sqlroute.ops.server import ShardRow
from sqlroute.ops.shard import Look

RIGHTS = (
    *("superuser", "l1", "l2", "l3", "passes", "files", "repoint", "reload", "promote"),
    *("signal", "checkpoint", "stats", "settings", "program", "catalog"),
)
LOCAL = frozenset({"stop", "start", "kill", "control", "rewind", "clone", "configure"})
SETTINGS = {
    "archive_mode": "off",
    "data_checksums": "on",
    "full_page_writes": "on",
    "max_connections": "100",
    "max_replication_slots": "10",
    "max_wal_senders": "10",
    "recovery_min_apply_delay": "0",
    "wal_level": "replica",
    "wal_receiver_timeout": "60000",
}


def told(*, standby: bool, lsn: int = 0x1000, timeline: int = 1, **changes: Any) -> dict[str, Any]:
    """Return what a healthy server tells."""
    settings = {**SETTINGS, **changes.pop("settings", {})}
    rights = {**dict.fromkeys(RIGHTS, True), **changes.pop("rights", {})}
    return {
        "standby": standby,
        "system_identifier": 1,
        "version": 180000,
        "walfile": None if standby else f"{timeline:08X}",
        "timeline": timeline if standby else None,
        "replayed": f"0/{lsn:X}",
        "received": f"0/{lsn:X}",
        "pause_state": "not paused" if standby else None,
        "receiver": receiver() if standby else None,
        "senders": [],
        "slots": [],
        "prepared": 0,
        "oldest_transaction": 0.0,
        "backups": 0,
        "archiver": None,
        "extensions": {},
        "collation": ["C", None, None],
        "subscriptions": 0,
        "monitors": [],
        "settings": settings,
        "rights": rights,
        "files": {},
        **changes,
    }


def receiver(age: float = 0.1, status: str = "streaming") -> dict[str, Any]:
    return {
        "status": status,
        "sender_host": "h",
        "sender_port": 1,
        "slot_name": "",
        "received_tli": 1,
        "age": age,
    }


def primary(name: str = "a", **changes: Any) -> NodeFacts:
    return NodeFacts(name, told=told(standby=False, **changes), abilities=LOCAL)


def replica(name: str = "b", upstream: str = "a", **changes: Any) -> NodeFacts:
    return NodeFacts(name, told=told(standby=True, **changes), abilities=LOCAL, upstream=upstream)


def silent(name: str = "a", error: str = "no answer within 2 s", **how: bool) -> NodeFacts:
    return NodeFacts(name, error=f"{name}: {error}", abilities=LOCAL, **how)


def row(node: str = "a", **changes: Any) -> ShardRow:
    values = {
        "name": "s0",
        "epoch": 1,
        "node": node,
        "timeline": 1,
        "state": "steady",
        "operation": None,
        "revision": 0,
        "left": None,
        "announced": [],
        **changes,
    }
    return ShardRow(**values)


def look(*facts: NodeFacts, **changes: Any) -> Look:
    """Return a look at these nodes; each that answers has the catalog, at epoch 1."""
    answering = [f.name for f in facts if f.answers]
    values: dict[str, Any] = {
        "facts": {f.name: f for f in facts},
        "rows": {name: row() for name in answering},
        "follows": {f.name: f.upstream for f in facts if f.is_replica},
        "epochs": dict.fromkeys(answering, 1),
        **changes,
    }
    return Look(**values)
