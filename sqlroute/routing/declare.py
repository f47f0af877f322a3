"""How a table says where its rows live: sharded by a key, or held in full on every shard.

The declaration travels in ``Table.info`` and changes nothing else, so that the same metadata
still creates plain tables on one plain PostgreSQL (for tests, or before sharding).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import types
from sqlalchemy.sql.schema import Column, Table
from sqlalchemy.sql.type_api import TypeEngine

from sqlroute.errors import CrossShardRefused, InvalidShardKey, UnknownName
from sqlroute.routing.hashing import KeyKind

INFO_KEY = "sqlroute"

_KINDS = {
    "SMALLINT": KeyKind.INTEGER,
    "INTEGER": KeyKind.INTEGER,
    "BIGINT": KeyKind.INTEGER,
    "TEXT": KeyKind.TEXT,
    "VARCHAR": KeyKind.TEXT,
    "UUID": KeyKind.UUID,
}


@dataclass(frozen=True, slots=True)
class Sharded:
    """A table whose rows live on the shard of the bucket of their key."""

    columns: tuple[str, ...]
    keyspace: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """A small table held in full on every shard of its keyspace."""

    keyspace: str | None = None


@dataclass(frozen=True, slots=True)
class ShardKey:
    """The key columns of one sharded table, resolved against the table.

    Attributes:
        names: attribute keys of the columns (``Column.key``), in the order of the hash.
        kinds: how PostgreSQL hashes each of them.
    """

    table: str
    names: tuple[str, ...]
    kinds: tuple[KeyKind, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)


def sharded_by(*columns: str, keyspace: str | None = None) -> dict[str, Any]:
    """Declare a table sharded by the hash of its key columns.

    Use it as ``__table_args__``, or as the last element of that tuple, or as keyword arguments of
    ``Table``. Primary key and unique constraints of the table must contain the key columns.

    Args:
        columns: names of the key columns: smallint to bigint, text, uuid.
        keyspace: name of the keyspace, the first of the topology if not given.
    """
    if not columns:
        raise InvalidShardKey("sharded_by() needs at least one column name")
    return {"info": {INFO_KEY: Sharded(tuple(columns), keyspace)}}


def reference_table(keyspace: str | None = None) -> dict[str, Any]:
    """Declare a small table held in full on every shard, written to all of them atomically."""
    return {"info": {INFO_KEY: Reference(keyspace)}}


def declaration(table: Table) -> Sharded | Reference | None:
    """Return what the table declares, ``None`` for a table that declares nothing."""
    found = table.info.get(INFO_KEY)
    return found if isinstance(found, Sharded | Reference) else None


def shard_key(table: Table) -> ShardKey:
    """Resolve the key of a sharded table.

    Raises:
        UnknownName: the table has no such column.
        InvalidShardKey: a type whose hash PostgreSQL and sqlroute do not share.
    """
    declared = declaration(table)
    assert isinstance(declared, Sharded)
    cached = table.info.get("sqlroute.key")
    if isinstance(cached, ShardKey):
        return cached
    columns = tuple(_column(table, name) for name in declared.columns)
    key = ShardKey(
        table.fullname,
        tuple(str(column.key) for column in columns),
        tuple(_kind(column) for column in columns),
    )
    table.info["sqlroute.key"] = key
    return key


def only_of(name: str) -> CrossShardRefused:
    """Return the error of ``ONLY`` before a sharded table: the rows are in its partitions."""
    return CrossShardRefused(
        "ONLY", f"{name} is sharded, so its rows are in partitions of it; leave ONLY out"
    )


def _column(table: Table, name: str) -> Column[Any]:
    for column in table.columns:
        if name in (column.name, column.key):
            return column
    raise UnknownName(
        f"unknown shard key column {name!r} of table {table.fullname}; "
        f"known: {', '.join(c.name for c in table.columns)}"
    )


def _kind(column: Column[Any]) -> KeyKind:
    kind = kind_of(column.type)
    if kind is None:
        raise InvalidShardKey(
            f"shard key {column.table.name}.{column.name} has type {column.type!r}; "
            "a key is a smallint, integer, bigint, text, varchar or uuid column"
        )
    return kind


@lru_cache(maxsize=1_000)  # SQLAlchemy remembers by type objects, too: they are hashable
def kind_of(type_: TypeEngine[Any]) -> KeyKind | None:
    """Return how PostgreSQL hashes values of a type, ``None`` where sqlroute does not know.

    What counts is the type that PostgreSQL gets, with ``with_variant`` and ``load_dialect_impl``. A
    type that wraps its values in SQL (``bind_expression``) stores what only the server can compute.
    """
    from sqlroute.routing.keys import reference_dialect

    dialect = reference_dialect()
    found: Any = type_.dialect_impl(dialect)
    if type_._has_bind_expression or found._has_bind_expression:
        return None
    while isinstance(found, types.TypeDecorator):
        found = found.impl_instance
    if isinstance(found, types.NullType | types.Enum):
        return None
    words = re.split(r"[ (]", str(type_.compile(dialect=dialect)).upper(), maxsplit=1)
    return _KINDS.get(words[0])
