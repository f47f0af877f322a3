"""Read and write the shard map of a keyspace.

The first shard is the authority; the others hold copies that carry the epoch, and the highest
epoch wins, so that one lost shard stops nobody from starting.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlroute.errors import CatalogError
from sqlroute.topology import Keyspace, Node, ShardMap

_READ = """
SELECT k.buckets, k.epoch, b.bucket, b.shard
  FROM sqlroute.keyspace k LEFT JOIN sqlroute.bucket b ON b.keyspace = k.name
 WHERE k.name = %s
"""


def read_newest(keyspace: Keyspace, nodes: Iterable[Node], timeout: float) -> ShardMap | None:
    """Return the map with the highest epoch that one of the nodes knows, ``None`` without any.

    Args:
        nodes: whom to ask; one that does not answer is passed over.
        timeout: seconds for each of them to connect.

    Raises:
        CatalogError: a map contradicts the configuration.
    """
    newest: ShardMap | None = None
    for node in nodes:
        found = _read(keyspace, node, timeout)
        if found is not None and (newest is None or found.epoch > newest.epoch):
            newest = found
    return newest


def _read(keyspace: Keyspace, node: Node, timeout: float) -> ShardMap | None:
    import psycopg

    try:
        with connect(node, timeout) as connection:
            rows = connection.execute(_READ, (keyspace.name,)).fetchall()
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
        return None
    return _from_rows(keyspace, node, rows)


def _from_rows(keyspace: Keyspace, node: Node, rows: list[Any]) -> ShardMap | None:
    if not rows:
        return None
    buckets, epoch = rows[0][0], rows[0][1]
    if buckets != keyspace.buckets:
        raise CatalogError(
            f"keyspace {keyspace.name} has {keyspace.buckets} buckets in the configuration and "
            f"{buckets} in the catalog of {node.name}; the number is fixed for life, "
            "correct the configuration"
        )
    owners = [""] * buckets
    for _, _, bucket, shard in rows:
        if bucket is not None:
            owners[bucket] = shard
    unknown = sorted({owner for owner in owners if owner} - set(keyspace.shard_names))
    if unknown:
        raise CatalogError(
            f"the shard map of keyspace {keyspace.name} on {node.name} names shard(s) "
            f"{', '.join(unknown)} that the configuration does not"
        )
    return ShardMap(keyspace.name, tuple(owners), epoch)


def write(shard_map: ShardMap, connection: Any) -> None:
    """Write a map on one shard, never over a newer one, in the transaction of ``connection``.

    Args:
        connection: a SQLAlchemy connection to the shard's primary.
    """
    keyspace, buckets = shard_map.keyspace, len(shard_map.owners)
    written = connection.exec_driver_sql(
        "INSERT INTO sqlroute.keyspace (name, buckets, epoch) VALUES (%s, %s, %s) "
        "ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch "
        "WHERE sqlroute.keyspace.epoch <= excluded.epoch",
        (keyspace, buckets, shard_map.epoch),
    )
    if written.rowcount == 0:  # a newer one is there
        return
    connection.exec_driver_sql("DELETE FROM sqlroute.bucket WHERE keyspace = %s", (keyspace,))
    owned = [(keyspace, i, owner) for i, owner in enumerate(shard_map.owners) if owner]
    connection.exec_driver_sql(
        "INSERT INTO sqlroute.bucket (keyspace, bucket, shard) VALUES (%s, %s, %s)", owned
    )


def connect(node: Node, timeout: float) -> Any:
    """Return a connection of psycopg's in AUTOCOMMIT."""
    import psycopg

    return psycopg.connect(
        **node.conninfo(), connect_timeout=max(1, round(timeout)), autocommit=True
    )
