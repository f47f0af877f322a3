"""Read from a server what its tables are: sharded by which key, or held in full.

For what has no Python metadata: SQL text and the command line. A hash partitioned table with as
many partitions as its keyspace has buckets is sharded; any other ordinary table of a keyspace with
several shards can only be a reference table, or one that nobody declared.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlroute.catalog.maps import connect
from sqlroute.health import Health
from sqlroute.health import Role as ServerRole
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.sqltree import Role, TableInfo
from sqlroute.topology import Keyspace, Node

log = logging.getLogger("sqlroute.catalog")

READ_AGAIN = 1.0
"""Seconds from one reading of a keyspace to the next while text names tables that are not known."""

KEPT = 60.0
"""Seconds after which the tables of a keyspace are read anew while statements are text."""

_TABLES = """
SELECT n.nspname, c.relname, c.relkind, c.relispartition, pg_table_is_visible(c.oid),
       p.partstrat = 'h' AND p.partexprs IS NULL,
       p.partattrs::int2[],
       (SELECT bool_and(o.opcdefault) FROM pg_opclass o WHERE o.oid = ANY (p.partclass)),
       (SELECT pg_get_expr(l.relpartbound, l.oid)
          FROM pg_inherits i JOIN pg_class l ON l.oid = i.inhrelid
         WHERE i.inhparent = c.oid AND c.relkind = 'p' LIMIT 1),
       (SELECT json_agg(json_build_array(a.attnum, a.attname, t.typname,
                                         coalesce(k.collisdeterministic, true)) ORDER BY a.attnum)
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
          LEFT JOIN pg_collation k ON k.oid = a.attcollation
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_partitioned_table p ON p.partrelid = c.oid
 WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
   AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
 ORDER BY n.nspname, c.relname
"""
_LEAF = """
SELECT c.relname
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
 WHERE i.inhparent = to_regclass(%s)
   AND pg_get_expr(c.relpartbound, c.oid) = %s
"""

_KINDS = {
    **dict.fromkeys(("int2", "int4", "int8"), KeyKind.INTEGER),
    **dict.fromkeys(("text", "varchar"), KeyKind.TEXT),
    "uuid": KeyKind.UUID,
}
_CATALOG = frozenset(
    {
        "alembic_version",
        "bucket",
        "commit_record",
        "coordinator",
        "coordinator_shard",
        "journal",
        "keyspace",
        "node",
        "operation",
        "operation_step",
        "shard",
    }
)
_OTHERS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def read_tables(keyspace: Keyspace, connection: Any) -> dict[str, TableInfo]:
    """Return the tables of a database by every name that SQL may use for them.

    Args:
        connection: a SQLAlchemy connection to any node of the keyspace.
    """
    return _by_name(connection.exec_driver_sql(_TABLES), keyspace)


class TableReader:
    """Reads the tables of keyspaces, not more often than they may have changed.

    Args:
        timeout: seconds for each node to connect.
        clock: a monotonic clock.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._read_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def claim(self, keyspace: str, after: float) -> bool:
        """Say whether a keyspace was not read for so long; of several callers at once, to one."""
        now = self._clock()
        with self._lock:
            if now - self._read_at.get(keyspace, now - after) < after:
                return False
            self._read_at[keyspace] = now
            return True

    def read(self, keyspace: Keyspace, health: Health) -> dict[str, TableInfo] | None:
        """Return the tables of a keyspace, ``None`` when no node answers."""
        import psycopg

        for node in _readable(keyspace, health):
            try:
                with connect(node, self._timeout) as connection:
                    return _by_name(connection.execute(_TABLES).fetchall(), keyspace)
            except psycopg.Error as error:
                log.info("the tables of %s cannot be read: %s", node.name, error)
        log.warning("the tables of %s: no node answered; text is refused", keyspace.name)
        return None


def _readable(keyspace: Keyspace, health: Health) -> list[Node]:
    """Return the nodes that can be asked, primaries first: they know new tables first."""
    nodes = [node for shard in keyspace.shards for node in shard.nodes]
    known = [node for node in nodes if health.of(node.name).is_readable]
    return sorted(known, key=lambda node: health.of(node.name).role is not ServerRole.PRIMARY)


def _by_name(rows: Iterable[Any], keyspace: Keyspace) -> dict[str, TableInfo]:
    found: dict[str, TableInfo] = {}
    for row in rows:
        schema, name, _, _, is_visible, *_ = row
        info = _info(row, keyspace)
        found[f"{schema}.{name}"] = info
        if is_visible:
            found[name] = info
    return found


def leaf_of(table: TableInfo, bucket: int, buckets: int, connection: Any) -> str | None:
    """Return the name of the partition that holds a bucket, ``None`` where the shard has none."""
    quoted = ".".join('"' + part.replace('"', '""') + '"' for part in table.name.split(".", 1))
    bound = f"FOR VALUES WITH (modulus {buckets}, remainder {bucket})"
    leaf: str | None = connection.exec_driver_sql(_LEAF, (quoted, bound)).scalar()
    return leaf


def _info(row: Any, keyspace: Keyspace) -> TableInfo:
    schema, name, relkind, is_partition, is_visible, is_hashed, key, is_default, bound, found = row
    columns = {n: _KINDS.get(t) if certain else None for _, n, t, certain in found or ()}
    shown = name if is_visible else f"{schema}.{name}"
    is_own = schema == "sqlroute" and name in _CATALOG
    why = "a table of sqlroute's own catalog" if is_own else _why_unknown(relkind, is_partition)
    names: tuple[str, ...] = ()
    if not why and is_hashed:
        by_number = {number: column for number, column, *_ in found}
        names = tuple(by_number[number] for number in key)
        why = _why_not_sharded(names, columns, keyspace, bound, is_default)
    role = Role.SHARDED if names else Role.REFERENCE
    return TableInfo(
        shown, Role.UNKNOWN if why else role, columns, () if why else names, keyspace.name, why
    )


def _why_unknown(relkind: str, is_partition: bool) -> str:
    if is_partition:
        return "a partition, to be reached through its parent"
    return _OTHERS.get(relkind, "")


def _why_not_sharded(
    names: Iterable[str],
    columns: dict[str, KeyKind | None],
    keyspace: Keyspace,
    bound: str | None,
    is_default: bool,
) -> str:
    """Return why a hash partitioned table is none of sqlroute's, an empty text if it is."""
    strange = [name for name in names if columns[name] is None]
    if strange or not is_default:
        return f"partitioned by the hash of {', '.join(names)}, whose type is no shard key's"
    modulus = re.search(r"modulus (\d+)", bound or "")
    if modulus is not None and int(modulus[1]) != keyspace.buckets:
        return (
            f"partitioned with modulus {modulus[1]}, while keyspace {keyspace.name} has "
            f"{keyspace.buckets} buckets"
        )
    return ""
