"""Write the definition of a coordinator: the tables of all shards as one, over ``postgres_fdw``.

Pure: from what the shards have told to statements. A sharded table is partitioned by hash as on the
shards, each leaf a foreign table on the shard that owns its bucket, so that any shard map will do;
a reference table is a foreign table on the first shard. Each shard is two foreign servers: the
second has a connection, and so a snapshot, of its own, by which a check sees the schema as it is at
that moment (``sqlroute.coordinator_check``, migrations 0004 and 0005).

A coordinator's own database reads the primaries, found by libpq among all nodes of a shard. Each of
its further databases reads one certain replica of each shard (:func:`replicas_read`), since a
router must know before a statement who will be read.

What PostgreSQL would answer differently there is left out with the reason: a statement that uses it
is refused, never wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from sqlroute.catalog.coordinator import (
    Collation,
    Column,
    Extension,
    Host,
    Leaf,
    Schema,
    ShardFacts,
    TableFacts,
    TypeFacts,
)
from sqlroute.errors import OperationRefused
from sqlroute.health import Health
from sqlroute.topology import Coordinator, Node, Secret, Shard, ShardMap

MAX_NAME = 63
"""Bytes of an identifier that PostgreSQL keeps."""

_OF_NODES = ("host", "hostaddr", "port", "dbname", "user", "password", "service")
"""Connection parameters that are not handed on as they are."""

_PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}


@dataclass(frozen=True, slots=True)
class Origin:
    """How the coordinator reaches a shard.

    Attributes:
        addresses: host and port of each node that may be read, as the coordinator sees them.
        node: the first of them, whose login and connection parameters are used.
        is_replica: the one node is read as a replica; else that one of them is the primary.
    """

    shard: str
    addresses: tuple[tuple[str, int], ...]
    node: Node
    is_replica: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """All statements that make a coordinator, in their order, for one transaction.

    Attributes:
        left_out: why a table of the shards is not there, by ``schema.name``.
        tables: those that are, quoted as SQL needs it.
    """

    statements: tuple[Secret, ...]  # user mappings have passwords
    left_out: Mapping[str, str]
    tables: tuple[str, ...]


def disagreements(shards: Sequence[ShardFacts], shard_map: ShardMap) -> tuple[str, ...]:
    """Return why several shards cannot be seen as one, nothing where they can."""
    first, *others = shards
    found = [
        f"shard {each.shard} is at epoch {each.epoch} of the shard map, not {shard_map.epoch}"
        for each in shards
        if each.epoch != shard_map.epoch
    ]
    for other in others:
        found += host_differences(other.host, first.host, other.shard, first.shard)
        for each in fields(Schema):  # in any order: they were made in any order
            mine, theirs = (set(getattr(s.schema, each.name)) for s in (first, other))
            if mine != theirs:
                one = min(map(str, mine ^ theirs))
                found.append(
                    f"the {each.name} of shards {first.shard} and {other.shard} differ, as {one}; "
                    "bring both to the same migration"
                )
    return tuple(found)


def host_differences(own: Host, other: Host, name: str, other_name: str) -> list[str]:
    """Return why two databases may answer the same statement differently."""
    found = []
    for each in fields(Host):
        mine, theirs = getattr(own, each.name), getattr(other, each.name)
        if each.name == "settings":
            found += [
                f"setting {key} is {mine.get(key)!r} on {name} and {value!r} on {other_name}"
                for key, value in theirs.items()
                if mine.get(key) != value
            ]
        elif mine != theirs:
            what = "major version" if each.name == "major" else each.name
            found.append(f"{what} is {mine!r} on {name} and {theirs!r} on {other_name}")
    return found


def define(
    shards: Sequence[ShardFacts],
    shard_map: ShardMap,
    origins: Mapping[str, Origin],
    *,
    coordinator: Coordinator,
    connect_timeout: float,
    role: str,
    differing: Iterable[str] = (),
) -> Definition:
    """Return the definition of a coordinator.

    Args:
        shards: those of the keyspace; they agree (:func:`disagreements`).
        role: of sessions that will read there; empty for whoever builds it.
        differing: tables that are not partitioned and differ between the shards.

    Raises:
        OperationRefused: a bucket has no partition, or a shard cannot be named to the coordinator.
    """
    schema = shards[0].schema
    left_out = dict(_left_out(shards, len(shard_map.owners), differing))
    kept = [table for table in schema.tables if str(table) not in left_out]
    statements = [
        "CREATE EXTENSION IF NOT EXISTS postgres_fdw SCHEMA sqlroute",
        *_servers(shards, origins, coordinator, connect_timeout, role, schema.extensions),
        *(f"CREATE SCHEMA IF NOT EXISTS {quoted(name)}" for name in schema.schemas),
        *map(_extension, schema.extensions),
        *map(_collation, schema.collations),
        *map(_type, schema.types),
    ]
    for table in kept:
        statements += _table(table, shards, shard_map)
    statements += _states(shards)
    if role:
        statements += _grants(schema, role)
    statements += _notes(shards, shard_map, schema, left_out, origins)
    return Definition(tuple(map(Secret, statements)), left_out, tuple(map(qualified, kept)))


def replicas_read(
    shards: Iterable[Shard], health: Health, most: int
) -> tuple[Mapping[str, str], ...]:
    """Return the replica of each shard that each of the further databases reads.

    The first one reads the first replicas, and so on; a shard that has fewer begins again. Those
    that answer come first. A shard without replicas is missing: its primary is read.

    Args:
        most: databases; as many as the shard with the most replicas has are enough.
    """
    replicas = {}
    for shard in shards:
        primary = health.shard(shard.name).primary
        names = [node.name for node in shard.nodes if node.weight > 0 and node.name != primary]
        names.sort(key=lambda name: not health.of(name).is_readable)
        if names:
            replicas[shard.name] = names
    count = min(most, max(map(len, replicas.values()), default=0))
    return tuple(
        {shard: names[number % len(names)] for shard, names in replicas.items()}
        for number in range(count)
    )


def reference_tables(shards: Sequence[ShardFacts]) -> tuple[TableFacts, ...]:
    """Return the tables that every shard must hold in full."""
    return tuple(table for table in shards[0].schema.tables if not table.key.startswith("HASH"))


def removal(schemas: Iterable[str]) -> tuple[str, ...]:
    """Return the statements that take away what a definition has made, but for the database."""
    return (
        "DO $$ DECLARE it text; BEGIN FOR it IN SELECT srvname FROM pg_foreign_server LOOP "
        "EXECUTE format('DROP SERVER %I CASCADE', it); END LOOP; END $$",
        *(f"DROP SCHEMA IF EXISTS {quoted(name)} CASCADE" for name in schemas),
        "CREATE SCHEMA IF NOT EXISTS public",
        "GRANT USAGE ON SCHEMA public TO PUBLIC",
        "DELETE FROM sqlroute.coordinator",
    )


def database(name: str, like: Host) -> str:
    """Return the statement that makes a database which orders text as another one.

    Raises:
        OperationRefused: PostgreSQL would cut its name, which may be that of another one then.
    """
    if len(name.encode()) > MAX_NAME:
        raise OperationRefused(
            f"{name} is no name of a database: it has more than {MAX_NAME} bytes; give the "
            "coordinator's a shorter one"
        )
    provider = _PROVIDERS[like.provider]
    options = [
        f"ENCODING {literal(like.encoding)}",
        f"LC_COLLATE {literal(like.collate)}",
        f"LC_CTYPE {literal(like.ctype)}",
        f"LOCALE_PROVIDER {provider}",
    ]
    if like.locale is not None:
        options.append(f"{provider.upper()}_LOCALE {literal(like.locale)}")
    if like.rules is not None:
        options.append(f"ICU_RULES {literal(like.rules)}")
    return f"CREATE DATABASE {quoted(name)} TEMPLATE template0 {' '.join(options)}"


def settings(database_name: str, own: Host, like: Host) -> tuple[str, ...]:
    """Return the statements that give a database the settings of the shards, and its own."""
    wanted = {
        name: value for name, value in like.settings.items() if own.settings.get(name) != value
    }
    wanted |= {"enable_partitionwise_join": "on", "enable_partitionwise_aggregate": "on"}
    return tuple(
        f"ALTER DATABASE {quoted(database_name)} SET {name} = "
        f"{value if name == 'search_path' else literal(value)}"  # that is a list of names
        for name, value in wanted.items()
    )


def quoted(name: str) -> str:
    """Return a name as SQL needs it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL needs it, whatever standard_conforming_strings is."""
    escaped = text.replace("'", "''")
    return "E'" + escaped.replace("\\", "\\\\") + "'" if "\\" in text else f"'{escaped}'"


def qualified(table: TableFacts) -> str:
    """Return the name of a table with its schema as SQL needs it."""
    return f"{quoted(table.schema)}.{quoted(table.name)}"


def _left_out(
    shards: Sequence[ShardFacts], buckets: int, differing: Iterable[str]
) -> Iterator[tuple[str, str]]:
    for table in shards[0].schema.tables:
        leaves = [leaf for shard in shards for leaf in shard.leaves.get(str(table), ())]
        local = [f"{column.name} {column.type}" for column in table.columns if column.is_local]
        if table.has_row_security or any(leaf.has_row_security for leaf in leaves):
            yield str(table), "it has row-level security, which holds on its shards only"
        elif local:
            yield str(table), f"{', '.join(local)}: values of that type have no place elsewhere"
        elif table.key.startswith("HASH") and any(leaf.modulus != buckets for leaf in leaves):
            yield str(table), f"it is partitioned by hash, but not into {buckets} buckets"
        elif str(table) in differing:
            yield str(table), "its rows are not the same on all shards, so it is no reference table"


def _servers(
    shards: Sequence[ShardFacts],
    origins: Mapping[str, Origin],
    coordinator: Coordinator,
    connect_timeout: float,
    role: str,
    extensions: Iterable[Extension],
) -> Iterator[str]:
    tuning = {
        "fetch_size": str(coordinator.fetch_size),
        "async_capable": "true",
        "parallel_commit": "true",
        "use_remote_estimate": "true" if coordinator.use_remote_estimate else "false",
        "extensions": ",".join(quoted(extension.name) for extension in extensions),
        "connect_timeout": str(max(1, round(connect_timeout))),
    }
    for shard in shards:
        origin = origins[shard.shard]
        options = {**_place(origin), **{name: value for name, value in tuning.items() if value}}
        login = {"user": origin.node.user}
        if origin.node.password is not None:
            login["password"] = origin.node.password.reveal()
        for server in (server_name(shard.shard), check_name(shard.shard)):
            name = quoted(server)
            yield f"CREATE SERVER {name} FOREIGN DATA WRAPPER postgres_fdw {_options(options)}"
            for who in ("CURRENT_USER", *([quoted(role)] if role else [])):  # one looks at the rows
                yield (
                    f"CREATE USER MAPPING IF NOT EXISTS FOR {who} SERVER {name} {_options(login)}"
                )


def _place(origin: Origin) -> dict[str, str]:
    """Return where a shard is: all its nodes, of which libpq takes the primary; or a replica.

    Raises:
        OperationRefused: a node is known by a libpq service only.
    """
    node, options = origin.node, dict(origin.node.options)
    if not all(host for host, _ in origin.addresses):
        raise OperationRefused(
            f"a node of shard {origin.shard} has no host that a coordinator could be told; write "
            "its host and port into the configuration, or `advertise` into its [drivers] table"
        )
    address = {}
    if origin.is_replica and origin.addresses[0] == (node.host, node.port):
        address["hostaddr"] = options.get("hostaddr", "")  # one server of those with that name
    return {
        **{name: value for name, value in options.items() if name not in _OF_NODES},
        **address,
        "host": ",".join(host for host, _ in origin.addresses),
        "port": ",".join(str(port) for _, port in origin.addresses),
        "dbname": node.database,
        "target_session_attrs": "standby" if origin.is_replica else "primary",
    }


def server_name(shard: str) -> str:
    """Return the name of the foreign server that statements read a shard by."""
    return _short(shard, "")


def check_name(shard: str) -> str:
    """Return the name of the foreign server that checks look at a shard by."""
    return _short(shard, ":now")  # no name of a shard has a colon


def _short(name: str, suffix: str) -> str:
    if len((name + suffix).encode()) <= MAX_NAME:
        return name + suffix
    return hashlib.sha256(name.encode()).hexdigest()[:32] + (suffix or ":")


def _options(options: Mapping[str, str]) -> str:
    given = ", ".join(f"{name} {literal(value)}" for name, value in options.items() if value)
    return f"OPTIONS ({given})" if given else ""


def _extension(extension: Extension) -> str:
    return (
        f"CREATE EXTENSION IF NOT EXISTS {quoted(extension.name)} "
        f"SCHEMA {quoted(extension.schema)} VERSION {literal(extension.version)}"
    )


def _collation(found: Collation) -> str:
    options = {"provider": _PROVIDERS[found.provider]}
    if found.locale is not None:
        options["locale"] = literal(found.locale)
    else:
        options |= {
            "lc_collate": literal(found.collate or ""),
            "lc_ctype": literal(found.ctype or ""),
        }
    if found.rules is not None:
        options["rules"] = literal(found.rules)
    options["deterministic"] = "true" if found.is_deterministic else "false"
    given = ", ".join(f"{name} = {value}" for name, value in options.items())
    return f"CREATE COLLATION {quoted(found.schema)}.{quoted(found.name)} ({given})"


def _type(found: TypeFacts) -> str:
    name = f"{quoted(found.schema)}.{quoted(found.name)}"
    if found.labels:
        return f"CREATE TYPE {name} AS ENUM ({', '.join(map(literal, found.labels))})"
    if not found.base:
        attributes = ", ".join(f"{quoted(attribute)} {of}" for attribute, of in found.attributes)
        return f"CREATE TYPE {name} AS ({attributes})"
    collation = f" COLLATE {found.collation}" if found.collation else ""
    not_null = " NOT NULL" if found.is_not_null else ""
    checks = "".join(f" {check}" for check in found.checks)
    return f"CREATE DOMAIN {name} AS {found.base}{collation}{not_null}{checks}"


def _table(table: TableFacts, shards: Sequence[ShardFacts], shard_map: ShardMap) -> Iterator[str]:
    """Yield the statements for a table; without NOT NULL, for PostgreSQL to lean on nothing."""
    columns = ", ".join(map(_column, table.columns))
    if not table.key.startswith("HASH"):
        options = _options({"schema_name": table.schema, "table_name": table.name})
        server = quoted(server_name(shards[0].shard))
        yield f"CREATE FOREIGN TABLE {qualified(table)} ({columns}) SERVER {server} {options}"
        return
    yield f"CREATE TABLE {qualified(table)} ({columns}) PARTITION BY {table.key}"
    leaves = {shard.shard: _by_bucket(shard, table) for shard in shards}
    for bucket, owner in enumerate(shard_map.owners):
        leaf = leaves.get(owner, {}).get(bucket)
        if leaf is None:
            raise OperationRefused(
                f"bucket {bucket} of {table} belongs to shard {owner or '(none)'}, which has no "
                "partition for it; make it by router.create_all(metadata)"
            )
        options = _options({"schema_name": leaf.schema, "table_name": leaf.name})
        yield (
            f"CREATE FOREIGN TABLE {quoted(leaf.schema)}.{quoted(leaf.name)} "
            f"PARTITION OF {qualified(table)} "
            f"FOR VALUES WITH (MODULUS {leaf.modulus}, REMAINDER {bucket}) "
            f"SERVER {quoted(server_name(owner))} {options}"
        )


def _by_bucket(shard: ShardFacts, table: TableFacts) -> dict[int, Leaf]:
    return {leaf.bucket: leaf for leaf in shard.leaves.get(str(table), ())}


def _column(column: Column) -> str:
    collation = f" COLLATE {column.collation}" if column.collation else ""
    return f"{quoted(column.name)} {column.type}{collation}"


def _states(shards: Sequence[ShardFacts]) -> Iterator[str]:
    """Yield what ``sqlroute.coordinator_check`` reads: each shard by both of its servers."""
    columns = (
        "shard text, epoch bigint, fingerprint text, timeline int, lsn pg_lsn, "
        "is_replica boolean, started float8"
    )
    options = _options({"schema_name": "sqlroute", "table_name": "shard_state"})
    arms = []
    for number, shard in enumerate(shards):
        name = literal(shard.shard)
        for table, server, fingerprint in (
            (f"sqlroute.state_{number}", server_name(shard.shard), "NULL::text"),
            (f"sqlroute.now_{number}", check_name(shard.shard), "fingerprint"),
        ):
            yield f"CREATE FOREIGN TABLE {table} ({columns}) SERVER {quoted(server)} {options}"
            is_schema = "true" if fingerprint == "fingerprint" else "false"
            arms.append(
                f"SELECT {name}::text AS asked, {is_schema} AS is_schema, shard AS answered, "
                f"epoch, {fingerprint} AS fingerprint, timeline, lsn, is_replica, started "
                f"FROM {table}"
            )
    # by the user mapping of whoever asks, not of the owner
    options = "WITH (security_invoker = true)"
    yield f"CREATE VIEW sqlroute.coordinator_state {options} AS {' UNION ALL '.join(arms)}"


def _grants(schema: Schema, role: str) -> Iterator[str]:
    for name in ("sqlroute", *schema.schemas):
        yield f"GRANT USAGE ON SCHEMA {quoted(name)} TO {quoted(role)}"
        yield f"GRANT SELECT ON ALL TABLES IN SCHEMA {quoted(name)} TO {quoted(role)}"


def _notes(
    shards: Sequence[ShardFacts],
    shard_map: ShardMap,
    schema: Schema,
    left_out: Mapping[str, str],
    origins: Mapping[str, Origin],
) -> Iterator[str]:
    keyspace = literal(shard_map.keyspace)
    names = ", ".join(map(literal, schema.schemas))
    yield (
        "INSERT INTO sqlroute.coordinator (keyspace, epoch, schemas, left_out) VALUES "
        f"({keyspace}, {shard_map.epoch}, ARRAY[{names}]::text[], "
        f"{literal(json.dumps(dict(left_out)))}::jsonb)"
    )
    for shard in shards:
        origin = origins[shard.shard]
        node = literal(origin.node.name) if origin.is_replica else "NULL"
        yield (
            "INSERT INTO sqlroute.coordinator_shard (keyspace, shard, fingerprint, node) VALUES "
            f"({keyspace}, {literal(shard.shard)}, {literal(shard.fingerprint)}, {node})"
        )
