"""The servers of the judge: one PostgreSQL, with or without a standby, a database per process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from sqlroute.local.node import LocalNode
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import LocalTopology, remove, up

PARAMETERS = {
    # a read that goes astray would otherwise wait for a DROP TABLE that waits for it
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",
}
EXTENSIONS = ("hstore", "citext", "btree_gist")
SCHEMAS = ("test_schema", "test_schema_2")


@contextmanager
def servers(*, replicas: int, port: int, pg_bin: Path | None = None) -> Iterator[LocalTopology]:
    """Start one shard; stop it and delete its data at the end."""
    with tempfile.TemporaryDirectory(prefix="sqlroute-upstream-", dir="/var/tmp") as parent:
        Path(parent).chmod(0o755)  # another user of the system runs the servers
        spec = LocalSpec(
            shards=1,
            replicas=replicas,
            port=port,
            directory=Path(parent, "servers"),
            database="test",
            user="scott",
            pg_bin=pg_bin,
            durable=False,
        )
        topology = up(spec)
        try:
            yield topology
        finally:
            remove(spec.directory)


def make_database(primary: LocalNode, name: str) -> tuple[str, ...]:
    """Make a database as the suite wants it, anew; return the extensions this server lacks."""
    missing = []
    with _connected(primary, "postgres") as connection:
        database = sql.Identifier(name)
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(database))
        for parameter, value in PARAMETERS.items():
            change = sql.SQL("ALTER DATABASE {} SET {} = {}")
            connection.execute(change.format(database, sql.Identifier(parameter), value))
    with _connected(primary, name) as connection:
        for schema in SCHEMAS:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        for extension in EXTENSIONS:
            try:
                command = sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(extension))
                connection.execute(command)
            except psycopg.Error:
                missing.append(extension)
    return tuple(missing)


def _connected(node: LocalNode, database: str) -> psycopg.Connection[Any]:
    return psycopg.connect(**{**node.conninfo, "dbname": database}, autocommit=True)
