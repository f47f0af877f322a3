"""Read what a coordinator is built from: tables, types and settings of a shard; what it has now.

Everything is read in one snapshot per server and handed out as plain values, which compare equal
when two shards are of the same schema. Names of types come qualified, but for PostgreSQL's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlroute.errors import CatalogError

SETTINGS = (
    "search_path",
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "extra_float_digits",
    "bytea_output",
    "default_text_search_config",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "xmloption",
    "xmlbinary",
    "array_nulls",
    "transform_null_equals",
    "timezone_abbreviations",
)
"""Settings on which the answer to a statement hangs; a coordinator has those of the shards."""

_HOST = """
SELECT current_setting('server_version_num')::int / 10000 AS major,
       pg_encoding_to_char(d.encoding) AS encoding, d.datcollate, d.datctype,
       to_jsonb(d) ->> 'datlocprovider' AS provider,
       coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS locale,
       to_jsonb(d) ->> 'daticurules' AS rules,
       pg_database_collation_actual_version(d.oid) AS version,
       (SELECT jsonb_object_agg(s.name, s.setting) FROM pg_settings s WHERE s.name = ANY (%s))
  FROM pg_database d WHERE d.datname = current_database()
"""
_OWN = "n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'sqlroute')"
_SCHEMAS = f"SELECT n.nspname FROM pg_namespace n WHERE {_OWN} ORDER BY 1"
_EXTENSIONS = """
SELECT e.extname, n.nspname, e.extversion
  FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname <> 'plpgsql' AND e.extname <> 'postgres_fdw'
   AND ((SELECT v.trusted FROM pg_available_extension_versions v
          WHERE v.name = e.extname AND v.version = e.extversion)
        OR EXISTS (SELECT FROM pg_depend d JOIN pg_type t ON t.oid = d.objid
                     JOIN pg_attribute a ON a.atttypid IN (t.oid, t.typarray)
                     JOIN pg_class c ON c.oid = a.attrelid AND c.relkind IN ('r', 'p', 'c')
                    WHERE d.classid = 'pg_type'::regclass AND d.deptype = 'e'
                      AND d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid))
 ORDER BY e.oid
"""
_NOT_OF_AN_EXTENSION = (
    "NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = {}::regclass AND d.objid = {} "
    "AND d.deptype = 'e')"
)
_COLLATIONS = f"""
SELECT n.nspname, c.collname, c.collprovider, c.collisdeterministic, c.collcollate, c.collctype,
       coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale'),
       to_jsonb(c) ->> 'collicurules', pg_collation_actual_version(c.oid)
  FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
 WHERE {_OWN} AND {_NOT_OF_AN_EXTENSION.format("'pg_collation'", "c.oid")} ORDER BY 1, 2
"""
_TYPES = f"""
SELECT n.nspname, t.typname, t.typtype,
       (SELECT array_agg(enumlabel::text ORDER BY enumsortorder)
          FROM pg_enum WHERE enumtypid = t.oid),
       CASE t.typtype WHEN 'd' THEN format_type(t.typbasetype, t.typtypmod) END, t.typnotnull,
       (SELECT format('%%I.%%I', cn.nspname, co.collname) FROM pg_collation co
          JOIN pg_namespace cn ON cn.oid = co.collnamespace
         WHERE co.oid = t.typcollation AND co.collname <> 'default'),
       (SELECT array_agg(pg_get_constraintdef(c.oid) ORDER BY c.conname)
          FROM pg_constraint c WHERE c.contypid = t.oid AND c.contype = 'c'),
       (SELECT jsonb_agg(jsonb_build_array(a.attname, format_type(a.atttypid, a.atttypmod))
                         ORDER BY a.attnum)
          FROM pg_attribute a WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped)
  FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
  LEFT JOIN pg_class r ON r.oid = t.typrelid
 WHERE {_OWN} AND (t.typtype IN ('e', 'd') OR r.relkind = 'c')
   AND {_NOT_OF_AN_EXTENSION.format("'pg_type'", "t.oid")}
 ORDER BY t.typtype = 'e' DESC, t.oid
"""
_TABLES = f"""
SELECT n.nspname, c.relname, pg_get_partkeydef(c.oid), c.relrowsecurity,
       (SELECT jsonb_agg(jsonb_build_array(
                   a.attname, format_type(a.atttypid, a.atttypmod),
                   (SELECT format('%%I.%%I', cn.nspname, co.collname) FROM pg_collation co
                      JOIN pg_namespace cn ON cn.oid = co.collnamespace
                     WHERE co.oid = a.attcollation AND a.attcollation <> t.typcollation),
                   coalesce(e.typnamespace, t.typnamespace) = 'pg_catalog'::regnamespace
                       AND coalesce(e.typname, t.typname) ~ '^reg'
                   OR coalesce(e.typnamespace, t.typnamespace) <> 'pg_catalog'::regnamespace
                       AND coalesce(e.typtype, t.typtype) IN ('r', 'm'))
                         ORDER BY a.attnum)
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
          LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typcategory = 'A'
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE {_OWN} AND c.relkind IN ('r', 'p') AND NOT c.relispartition
   AND {_NOT_OF_AN_EXTENSION.format("'pg_class'", "c.oid")}
 ORDER BY 1, 2
"""
_LEAVES = f"""
SELECT n.nspname, p.relname, ln.nspname, l.relname, pg_get_expr(l.relpartbound, l.oid),
       l.relrowsecurity
  FROM pg_inherits i JOIN pg_class l ON l.oid = i.inhrelid AND l.relispartition
  JOIN pg_namespace ln ON ln.oid = l.relnamespace
  JOIN pg_class p ON p.oid = i.inhparent AND p.relkind = 'p'
  JOIN pg_namespace n ON n.oid = p.relnamespace
 WHERE {_OWN} ORDER BY 1, 2, 4
"""
_IS_NEW = """
SELECT EXISTS (SELECT FROM pg_attribute
                WHERE attrelid = to_regclass('sqlroute.shard_state') AND attname = 'started')
"""
_STATE = "SELECT shard, keyspace, epoch, fingerprint FROM sqlroute.shard_state"
_UNREADABLE = f"""
SELECT format('%%I.%%I', n.nspname, c.relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE {_OWN} AND c.relkind IN ('r', 'p') AND NOT has_table_privilege(c.oid, 'SELECT') ORDER BY 1
"""
_FOREIGN = f"""
SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE {_OWN} AND c.relkind <> 'c'
                  AND {_NOT_OF_AN_EXTENSION.format("'pg_class'", "c.oid")})
"""
_SUM = "SELECT count(*), coalesce(bit_xor(hashtextextended(t::text, 0)), 0) FROM {} t"
_BUILT = """
SELECT epoch, schemas, left_out, built_at,
       (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = ANY (schemas) AND c.relkind IN ('p', 'f') AND NOT c.relispartition),
       (SELECT jsonb_object_agg(s.shard, to_jsonb(s) ->> 'node') FROM sqlroute.coordinator_shard s
         WHERE s.keyspace = own.keyspace AND to_jsonb(s) ->> 'node' IS NOT NULL)
  FROM sqlroute.coordinator own WHERE own.keyspace = %s
"""  # as JSON: the column is younger than the table
_NUMBERED = """
SELECT datname FROM pg_database WHERE starts_with(datname, current_database() || '_')
   AND substr(datname, length(current_database()) + 2) ~ '^[0-9]+$' AND datallowconn
 ORDER BY length(datname), datname
"""
_BOUND = re.compile(r"FOR VALUES WITH \(modulus (\d+), remainder (\d+)\)")


@dataclass(frozen=True, slots=True)
class Host:
    """What a server and a database do to text, dates and numbers; equal, or answers may differ.

    Attributes:
        version: of the collation that the database orders text by.
        settings: of :data:`SETTINGS`, those in force.
    """

    major: int
    encoding: str
    collate: str
    ctype: str
    provider: str
    locale: str | None
    rules: str | None
    version: str | None
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        collation: where it is not the type's own.
        is_local: values of its type mean something else on another server, or cannot be made there.
    """

    name: str
    type: str
    collation: str | None = None
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class TableFacts:
    """A table that is no partition.

    Attributes:
        key: what it is partitioned by, as ``HASH (id)``; empty for an ordinary table.
        has_row_security: whoever reads its partitions directly would go round that.
    """

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: str = ""
    has_row_security: bool = False

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A partition on a shard: of which table, and which bucket it holds."""

    schema: str
    name: str
    modulus: int
    bucket: int
    has_row_security: bool = False


@dataclass(frozen=True, slots=True)
class TypeFacts:
    """A type that the application has made.

    Attributes:
        labels: of an enum, in their order.
        base: of a domain, with its ``collation``, ``checks`` and whether it takes no NULL.
        attributes: of a composite type, as (name, type).
    """

    schema: str
    name: str
    labels: tuple[str, ...] = ()
    base: str = ""
    is_not_null: bool = False
    collation: str | None = None
    checks: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Collation:
    """A collation that the application has made."""

    schema: str
    name: str
    provider: str
    is_deterministic: bool
    collate: str | None
    ctype: str | None
    locale: str | None
    rules: str | None
    version: str | None


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension whose types, functions or collations statements may use."""

    name: str
    schema: str
    version: str


@dataclass(frozen=True, slots=True)
class Schema:
    """What the tables of a shard are, apart from the buckets that it owns."""

    schemas: tuple[str, ...]
    extensions: tuple[Extension, ...] = ()
    collations: tuple[Collation, ...] = ()
    types: tuple[TypeFacts, ...] = ()
    tables: tuple[TableFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One shard, all read in one snapshot.

    Attributes:
        shard, keyspace: as its catalog calls them.
        leaves: the partitions of each table, by ``schema.name``.
    """

    shard: str
    keyspace: str
    epoch: int
    fingerprint: str
    host: Host
    schema: Schema
    leaves: Mapping[str, tuple[Leaf, ...]]


@dataclass(frozen=True, slots=True)
class Built:
    """What a coordinator holds.

    Attributes:
        epoch: of the shard map that it was built from.
        schemas: that its tables are in.
        left_out: why a table of the shards is not there, by ``schema.name``.
        at: when it was built, as text.
        tables: how many it has.
        replicas: the node that it reads of each shard of which it does not read the primary.
    """

    epoch: int
    schemas: tuple[str, ...]
    left_out: Mapping[str, str]
    at: str
    tables: int
    replicas: Mapping[str, str]


def read_shard(connection: Any) -> ShardFacts:
    """Read what a coordinator needs to know of a shard.

    Args:
        connection: a SQLAlchemy connection to its primary, in a transaction of one snapshot.

    Raises:
        CatalogError: its catalog is missing or too old, or holds several keyspaces.
    """
    if not connection.exec_driver_sql(_IS_NEW).scalar():
        raise CatalogError(
            "the sqlroute schema of a shard is missing or too old for a coordinator; run "
            "`sqlroute catalog install`"
        )
    host = read_host(connection)
    connection.exec_driver_sql("SET LOCAL search_path = pg_catalog")
    states = connection.exec_driver_sql(_STATE).all()
    if len(states) != 1:
        raise CatalogError(
            f"the catalog of a shard has {len(states)} rows of shards and keyspaces, not one; "
            "give each shard a database of its own"
        )
    shard, keyspace, epoch, fingerprint = states[0]
    return ShardFacts(
        shard, keyspace, epoch, fingerprint, host, _schema(connection), _leaves(connection)
    )


def read_host(connection: Any) -> Host:
    """Read what a database does to text, dates and numbers."""
    return Host(*connection.exec_driver_sql(_HOST, (list(SETTINGS),)).one())


def read_sum(connection: Any, table: str) -> tuple[int, int]:
    """Return (count, checksum) of a table's rows, whatever their order.

    Args:
        table: quoted as SQL needs it.
    """
    count, total = connection.exec_driver_sql(_SUM.format(table)).one()
    return count, total


def read_unreadable(connection: Any) -> tuple[str, ...]:
    """Return the tables and partitions that the role of a connection may not read."""
    return tuple(connection.exec_driver_sql(_UNREADABLE).scalars())


def has_tables(connection: Any) -> bool:
    """Say if a database has tables, views or sequences of somebody's."""
    found: bool = connection.exec_driver_sql(_FOREIGN).scalar_one()
    return found


def read_built(connection: Any, keyspace: str) -> Built | None:
    """Return what a coordinator holds for a keyspace, ``None`` for nothing."""
    exists = connection.exec_driver_sql("SELECT to_regclass('sqlroute.coordinator')").scalar()
    found = connection.exec_driver_sql(_BUILT, (keyspace,)).one_or_none() if exists else None
    if found is None:
        return None
    epoch, schemas, left_out, at, tables, replicas = found
    at = at.isoformat(timespec="seconds")
    return Built(epoch, tuple(schemas), left_out, at, tables, replicas or {})


def read_numbered(connection: Any) -> tuple[str, ...]:
    """Return the databases whose names are this one's and a number."""
    return tuple(connection.exec_driver_sql(_NUMBERED).scalars())


def _schema(connection: Any) -> Schema:
    def rows(query: str) -> Any:
        return connection.exec_driver_sql(query).all()

    return Schema(
        tuple(name for (name,) in rows(_SCHEMAS)),
        tuple(Extension(*row) for row in rows(_EXTENSIONS)),
        tuple(Collation(*row) for row in rows(_COLLATIONS)),
        tuple(_type(row) for row in rows(_TYPES)),
        tuple(_table(row) for row in rows(_TABLES)),
    )


def _type(row: Any) -> TypeFacts:
    schema, name, _, labels, base, is_not_null, collation, checks, attributes = row
    return TypeFacts(
        schema,
        name,
        tuple(labels or ()),
        base or "",
        is_not_null,
        collation if base else None,
        tuple(checks or ()),
        tuple((attribute, of) for attribute, of in attributes or ()),
    )


def _table(row: Any) -> TableFacts:
    schema, name, key, has_row_security, columns = row
    made = tuple(Column(*column) for column in columns or ())
    return TableFacts(schema, name, made, key or "", has_row_security)


def _leaves(connection: Any) -> dict[str, tuple[Leaf, ...]]:
    found: dict[str, tuple[Leaf, ...]] = {}
    for schema, table, own_schema, name, bound, has_row_security in connection.exec_driver_sql(
        _LEAVES
    ):
        match = _BOUND.fullmatch(bound)
        if match is not None:
            leaf = Leaf(own_schema, name, int(match[1]), int(match[2]), has_row_security)
            key = f"{schema}.{table}"
            found[key] = (*found.get(key, ()), leaf)
    return found
