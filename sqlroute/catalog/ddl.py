"""Create the tables of a metadata on one shard: parents of all, leaves of the owned buckets.

A sharded table is ``PARTITION BY HASH (key)`` with one leaf per bucket. A shard has only the leaves
it owns, so the database itself refuses a row that does not belong there (SQLSTATE 23514).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from sqlalchemy.sql.schema import MetaData, Table, UniqueConstraint

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.declare import Sharded, ShardKey, declaration, shard_key

MAX_NAME = 63
"""Bytes of an identifier that PostgreSQL keeps."""


def check(metadata: MetaData) -> None:
    """Check that each sharded table can be partitioned by its key.

    Raises:
        InvalidShardKey: a primary key or unique constraint does not contain the key.
    """
    for table in sharded_tables(metadata):
        key = shard_key(table)
        uniques: list[Any] = [c for c in table.constraints if isinstance(c, UniqueConstraint)]
        uniques += [index for index in table.indexes if index.unique]
        if table.primary_key.columns:
            uniques.append(table.primary_key)
        for unique in uniques:
            _check_contains(unique, table, key)


def _check_contains(unique: Any, table: Table, key: ShardKey) -> None:
    names = {column.key for column in unique.columns}
    if not names.issuperset(key.names):
        what = (
            "primary key" if unique is table.primary_key else f"unique {unique.name or ''}".strip()
        )
        raise InvalidShardKey(
            f"the {what} ({', '.join(sorted(map(str, names)))}) of {table.fullname} must contain "
            f"its shard key ({key}): PostgreSQL checks uniqueness within a partition only"
        )


def sharded_tables(metadata: MetaData) -> list[Table]:
    """Return the sharded tables, those that others refer to first; a view is none."""
    return [t for t in metadata.sorted_tables if _is_partitioned(t)]


def _is_partitioned(table: Table) -> bool:
    return isinstance(declaration(table), Sharded) and not table.is_view


def create(
    metadata: MetaData, tables: Iterable[Table], owned: Iterable[int], buckets: int, connection: Any
) -> None:
    """Create what is missing of the tables on one shard.

    Args:
        tables: those of the shard's keyspace.
        owned: buckets of the shard.
        connection: a SQLAlchemy connection to its primary, in a transaction.
    """
    chosen = list(tables)
    shadow = MetaData(schema=metadata.schema, naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        copy = table.to_metadata(shadow)
        if _is_partitioned(table):
            columns = ", ".join(
                _quoted(connection, table.c[n].name) for n in shard_key(table).names
            )
            copy.dialect_options["postgresql"]["partition_by"] = f"HASH ({columns})"
    copies = [shadow.tables[table.key] for table in chosen]
    shadow.create_all(connection, tables=copies)
    statements = [
        _leaf(connection, table, bucket, buckets)
        for table in chosen
        if _is_partitioned(table)
        for bucket in owned
    ]
    if statements:
        connection.exec_driver_sql(";\n".join(statements))


def _leaf(connection: Any, table: Table, bucket: int, buckets: int) -> str:
    parent = connection.dialect.identifier_preparer.format_table(table)
    name = _quoted(connection, leaf_name(table.name, bucket, buckets))
    if table.schema:
        name = f"{_quoted(connection, table.schema)}.{name}"
    return (
        f"CREATE TABLE IF NOT EXISTS {name} PARTITION OF {parent} "
        f"FOR VALUES WITH (MODULUS {buckets}, REMAINDER {bucket})"
    )


def leaf_name(table: str, bucket: int, buckets: int) -> str:
    """Return the name of a leaf partition, ``orders_b017``; long names keep a hash of the rest."""
    suffix = f"_b{bucket:0{max(3, len(str(buckets - 1)))}d}"
    if len(table.encode()) + len(suffix) <= MAX_NAME:
        return table + suffix
    digest = hashlib.sha256(table.encode()).hexdigest()[:8]
    kept = table.encode()[: MAX_NAME - len(suffix) - 9].decode(errors="ignore")
    return f"{kept}_{digest}{suffix}"


def _quoted(connection: Any, name: str) -> str:
    quoted: str = connection.dialect.identifier_preparer.quote(name)
    return quoted
