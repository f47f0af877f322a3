"""Building the data directories of a shard: a primary from initdb, replicas from base backups.

Each shard gets an initdb of its own, since a copied template has the same system identifier and a
replica could follow the wrong shard unnoticed. A directory is built under another name and renamed
when it is whole, so that an interrupted build is never taken for a server.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlroute.errors import LocalTopologyError
from sqlroute.local.account import Finished, give, run_as
from sqlroute.local.binaries import Binaries
from sqlroute.local.node import HOST, LocalNode
from sqlroute.local.waiting import became_true

_STREAMING_PATIENCE = 60.0
_SEGMENT_MB = 4  # 16 MB per node are zero-filled and synced otherwise

_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # their paths are limited to 107 bytes, and nobody needs them
    "max_connections": "200",
    "shared_buffers": "32MB",
    "max_locks_per_transaction": "256",  # partitioned tables: one lock per leaf
    "max_prepared_transactions": "64",
    "wal_level": "logical",
    "wal_log_hints": "on",
    "wal_keep_size": "128MB",  # pg_rewind needs segments that a checkpoint would recycle
    "max_wal_size": "256MB",
    "min_wal_size": "32MB",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_worker_processes": "20",
    "max_logical_replication_workers": "12",
    "hot_standby": "on",
    "hot_standby_feedback": "on",
    "max_standby_streaming_delay": "5s",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
    "log_line_prefix": "%m [%p] %a ",
}


def build_primary(node: LocalNode, binaries: Binaries, *, durable: bool) -> None:
    """Make an empty cluster: UTF8, C.UTF-8 (else C), checksums, scram for every connection.

    Raises:
        LocalTopologyError: initdb failed.
    """
    work = _fresh(node)
    secret = work.with_name(f".{node.name}.password")
    secret.touch(mode=0o600)
    secret.write_text(node.password.reveal() + "\n")
    give(secret, node.account)
    try:
        done = _initdb(node, binaries, work, secret, locale="C.UTF-8", durable=durable)
        if done.code != 0 and "locale" in done.output:
            done = _initdb(node, binaries, _fresh(node), secret, locale="C", durable=durable)
    finally:
        secret.unlink()
    _refuse_failure(done, "initdb", node)
    with (work / "postgresql.conf").open("a") as file:
        file.write(_settings(binaries.version, durable=durable))
    work.rename(node.data)


def build_replica(
    node: LocalNode, primary: LocalNode, binaries: Binaries, *, durable: bool
) -> None:
    """Take a base backup of a running primary, to follow it by streaming.

    No replication slot: a replica that a test killed must not fill the disk with kept WAL.

    Raises:
        LocalTopologyError: pg_basebackup failed.
    """
    work = _fresh(node)
    command = (
        *(binaries.tool("pg_basebackup"), "-D", work, "-h", HOST, "-p", str(primary.port)),
        *("-U", primary.user, "-w", "-c", "fast", "-X", "stream", "--no-manifest"),
        *(() if durable else ("--no-sync",)),
    )
    password = primary.password.reveal()
    done = run_as(node.account, command, environment={"PGPASSWORD": password})
    _refuse_failure(done, "pg_basebackup", node)
    source = f"host={HOST} port={primary.port} user={primary.user} password={password}"
    with (work / "postgresql.auto.conf").open("a") as file:
        file.write(f"primary_conninfo = '{source}'\n")
    signal = work / "standby.signal"
    signal.touch(mode=0o600)
    give(signal, node.account)
    work.rename(node.data)


def ensure_database(primary: LocalNode) -> None:
    """Create the application's database unless it is there.

    Raises:
        LocalTopologyError: the primary refused.
    """
    import psycopg
    from psycopg import sql

    try:
        with psycopg.connect(
            **{**primary.conninfo, "dbname": "postgres"}, connect_timeout=10, autocommit=True
        ) as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (primary.database,)
            )
            if found.fetchone() is None:
                name = sql.Identifier(primary.database)
                connection.execute(sql.SQL("CREATE DATABASE {}").format(name))
    except psycopg.Error as exc:
        raise LocalTopologyError(
            f"cannot create database {primary.database} on {primary.name}: {exc}; "
            f"the log is {primary.log}"
        ) from exc


def await_streaming(primary: LocalNode, replicas: tuple[LocalNode, ...]) -> None:
    """Wait until each replica receives WAL from the primary.

    Raises:
        LocalTopologyError: one does not; names it.
    """
    import psycopg

    names = {replica.name for replica in replicas}
    try:
        with psycopg.connect(**primary.conninfo, connect_timeout=10, autocommit=True) as connection:

            def missing() -> set[str]:
                rows = connection.execute(
                    "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'"
                )
                return names - {row[0] for row in rows}

            if became_true(lambda: not missing(), timeout=_STREAMING_PATIENCE):
                return
            late = ", ".join(sorted(missing()))
    except psycopg.Error as exc:
        raise LocalTopologyError(
            f"{primary.name} went away while its replicas connected: {exc}; "
            f"the log is {primary.log}"
        ) from exc
    raise LocalTopologyError(
        f"{late} did not start streaming from {primary.name}; the logs are in {primary.log.parent}"
    )


def _initdb(
    node: LocalNode, binaries: Binaries, work: Path, secret: Path, *, locale: str, durable: bool
) -> Finished:
    command = (
        *(binaries.tool("initdb"), "-D", work, "-U", node.user, "--pwfile", secret),
        *("--auth=scram-sha-256", "--encoding=UTF8", f"--locale={locale}", "--data-checksums"),
        *(f"--wal-segsize={_SEGMENT_MB}", "--no-instructions"),
        *(() if durable else ("--no-sync",)),
    )
    return run_as(node.account, command)


def _settings(version: int, *, durable: bool) -> str:
    values = dict(_SETTINGS)
    if version >= 18:
        values["io_method"] = "sync"  # "worker", the default, costs three processes per server
    if not durable:
        values["fsync"] = "off"
    return "\n# sqlroute local\n" + "".join(f"{k} = '{v}'\n" for k, v in values.items())


def _fresh(node: LocalNode) -> Path:
    work = node.data.with_name(f".{node.name}.building")
    if work.exists():
        shutil.rmtree(work)
    return work


def _refuse_failure(done: Finished, program: str, node: LocalNode) -> None:
    if done.code == 0:
        return
    lines = [line for line in done.output.splitlines() if "error:" in line or "FATAL" in line]
    said = (lines or done.output.splitlines() or [f"exit code {done.code}"])[-1].strip()
    raise LocalTopologyError(f"{program} of {node.name} failed: {said}")
