"""What is known of a cluster, as documents of plain values: nodes, keys, buckets, the catalog."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlroute.catalog.tables import leaf_of, read_tables
from sqlroute.errors import InvalidShardKey, NoPrimary, UnknownName
from sqlroute.health import Health, NodeHealth, State
from sqlroute.router import Router
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.sqltree import Role, TableInfo
from sqlroute.routing.sqlvalues import read
from sqlroute.routing.token import format_lsn
from sqlroute.topology import Keyspace, ShardMap

LOOKS = 2
"""How often each node is asked: lag needs a primary's position from before, and one failure can be
a lost packet."""


def status(router: Router) -> dict[str, Any]:
    """Look at every node now.

    ``healthy`` is false when a shard has no primary, or more than one, or a node cannot be used.
    """
    router.look_around()
    for _ in range(LOOKS):
        for shard in router.topology.keyspace_of_shard:
            router.monitor.ask(shard, router.policy.probe_deadline)
    health = router.monitor.health
    shards = [_shard(name, health) for name in router.topology.keyspace_of_shard]
    nodes = [_node(health.of(node.name)) for node in router.topology.nodes()]
    faults = [fault for shard in shards for fault in shard.pop("faults")]
    faults += [
        f"node {node['node']} is {node['state']}: {node['refused'] or node['error'] or 'no answer'}"
        for node in nodes
        if node["state"] != State.UP.value or node["refused"]
    ]
    return {"healthy": not faults, "faults": faults, "shards": shards, "nodes": nodes}


def _shard(name: str, health: Health) -> dict[str, Any]:
    known = health.shard(name)
    faults = []
    if known.primary is None:
        faults.append(f"shard {name} has no primary")
    if len(known.contenders) > 1:
        claims = ", ".join(known.contenders)
        faults.append(
            f"shard {name} has {len(known.contenders)} nodes that claim to be its primary "
            f"({claims}); fence all but {known.primary}"
        )
    return {
        "shard": name,
        "keyspace": health.topology.keyspace_of_shard[name].name,
        "primary": known.primary,
        "contenders": list(known.contenders),
        "epoch": known.highest_epoch,
        "timeline": known.highest_timeline,
        "faults": faults,
    }


def _node(node: NodeHealth) -> dict[str, Any]:
    return {
        "node": node.node,
        "shard": node.shard,
        "role": node.role.value,
        "state": node.state.value,
        "timeline": node.timeline,
        "lsn": format_lsn(node.lsn) if node.lsn else None,
        "lag_bytes": node.lag_bytes,
        "lag_seconds": None if node.lag_seconds is None else round(node.lag_seconds, 3),
        "rtt_ms": round(node.rtt * 1000, 3) if node.rtt else None,
        "epoch": node.epoch,
        "error": node.last_error if node.state is not State.UP else "",
        "refused": node.refused,
    }


# Keys and buckets


def tables_of(router: Router) -> dict[str, TableInfo]:
    """Return the tables of all keyspaces; where two have one of the same name, the first wins.

    Raises:
        NoPrimary: no shard of a keyspace can be asked.
    """
    found: dict[str, TableInfo] = {}
    for keyspace in router.topology.keyspaces:
        with _any_primary(router, keyspace).connect() as connection:
            found = {**read_tables(keyspace, connection), **found}
    return found


def _any_primary(router: Router, keyspace: Keyspace) -> Any:
    *others, last = keyspace.shard_names
    for shard in others:
        try:
            return router.primary_engine(shard)
        except NoPrimary:
            continue
    return router.primary_engine(last)


def locate(router: Router, table: str, key: tuple[str, ...]) -> dict[str, Any]:
    """Say where the rows of a sharded table with a key are.

    Args:
        key: as text, one per column of the shard key.

    Raises:
        UnknownName: no such table, or it is not sharded.
        InvalidShardKey: the key is not of the columns' types.
        UnownedBucket: no shard has its bucket.
    """
    tables = tables_of(router)
    info = tables.get(table)
    if info is None or info.role is not Role.SHARDED:
        raise _no_sharded_table(table, info, tables.values())
    values = tuple(_value(text, kind) for text, kind in zip(key, info.kinds, strict=False))
    if len(key) != len(info.key):
        raise InvalidShardKey(
            f"the shard key of {info.name} is ({', '.join(info.key)}): "
            f"{len(info.key)} value(s), not {len(key)}"
        )
    keyspace = router.topology.keyspace(info.keyspace or router.topology.default.name)
    document: dict[str, Any] = {
        "table": info.name,
        "key": dict(zip(info.key, key, strict=True)),
        "keyspace": keyspace.name,
    }
    if not keyspace.is_sharded:
        return {**document, **_place(router, keyspace, info, values, None)}
    return {**document, **_place(router, keyspace, info, values, router.shard_map(keyspace.name))}


def _place(
    router: Router,
    keyspace: Keyspace,
    info: TableInfo,
    values: tuple[object, ...],
    shard_map: ShardMap | None,
) -> dict[str, Any]:
    bucket = bucket_of(values, info.kinds, keyspace.buckets)
    shard = shard_map.owner(bucket) if shard_map is not None else keyspace.shard_names[0]
    primary = router.health().primary(shard)
    leaf = None
    if primary is not None:
        with router.primary_engine(shard).connect() as connection:
            leaf = leaf_of(info, bucket, keyspace.buckets, connection)
    return {
        "bucket": bucket,
        "buckets": keyspace.buckets,
        "shard": shard,
        "leaf": leaf,
        "primary": primary.node if primary is not None else None,
        "epoch": shard_map.epoch if shard_map is not None else 0,
    }


def _no_sharded_table(
    table: str, info: TableInfo | None, tables: Iterable[TableInfo]
) -> UnknownName:
    names = sorted({found.name for found in tables if found.role is Role.SHARDED})
    known = f"sharded tables: {', '.join(names) or 'none'}"
    if info is None:
        return UnknownName(f"unknown table {table!r}; {known}")
    what = info.why or "held in full on every shard"
    return UnknownName(f"table {table} is not sharded ({what}); {known}")


def _value(text: str, kind: KeyKind) -> object:
    try:
        return read(text, kind)
    except ValueError:
        raise InvalidShardKey(f"{text!r} is no {kind.value} key") from None


def shard_maps(router: Router) -> dict[str, Any]:
    """Return the shard map of each keyspace with several shards, read now.

    Raises:
        ShardMapUnavailable: nobody has one.
    """
    return {
        "keyspaces": [
            _map(router.shard_map(keyspace.name))
            for keyspace in router.topology.keyspaces
            if keyspace.is_sharded
        ]
    }


def _map(found: ShardMap) -> dict[str, Any]:
    unowned = [bucket for bucket, owner in enumerate(found.owners) if not owner]
    return {
        "keyspace": found.keyspace,
        "epoch": found.epoch,
        "buckets": len(found.owners),
        "shards": [
            {"shard": shard, "buckets": list(found.buckets_of(shard))} for shard in found.shards
        ],
        "unowned": unowned,
    }


# The catalog


def install(router: Router) -> dict[str, Any]:
    """Create or upgrade the catalog on every shard; see :meth:`Router.install_catalog`."""
    return {"keyspaces": [_map(found) for found in router.install_catalog().values()]}


def recover(router: Router, older_than: float) -> dict[str, Any]:
    """Finish half-way commits over several shards; see :meth:`Router.recover`."""
    return {
        "recovered": [
            {"shard": done.shard, "gid": done.gid, "committed": done.committed}
            for done in router.recover(older_than)
        ]
    }
