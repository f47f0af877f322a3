"""What an operator's command asks of one server, and tells it, in SQL.

One connection per node, of the operator's role, with the fences passed on purpose and commits that
wait for no standby: a synchronous one that is away must not stop the command that brings another.
Every statement has a time limit on this side, too: a server under SIGSTOP accepts connections and
never answers. Decides nothing: see :mod:`sqlroute.ops.preflight` and :mod:`sqlroute.ops.steps`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from sqlroute.errors import DeadlineExceeded, OperationFailed
from sqlroute.ops import fences
from sqlroute.routing.token import parse_lsn
from sqlroute.runtime.limits import Connecting, Limit, limited
from sqlroute.topology import Node

APPLICATION_NAME = "sqlroute operator"
SHORTEST_HOLD = 5.0
"""Seconds that must be left of a hold, else it is renewed."""

STOPPED = "sqlroute stopped"
"""Begins the ``fallback_application_name`` of a receiver that a failover has stopped: what follows
is where it had received from."""

_NOWHERE = "/sqlroute-stopped"
"""Where a stopped receiver looks for its primary: a directory of sockets that is not there."""

_OPTIONS = (
    "-c synchronous_commit=local -c lock_timeout=3s -c search_path=pg_catalog"
    " -c statement_timeout=0 -c idle_in_transaction_session_timeout=0"
)

_PASSED = ("session_preload_libraries", "default_transaction_read_only")
"""What :data:`fences.NO_FENCE` sets for the session itself."""

T = TypeVar("T")

_NOT_FOR_OPERATORS = (
    "application_name",
    "connect_timeout",
    "load_balance_hosts",
    "target_session_attrs",
)

_FACTS = """
SELECT pg_is_in_recovery() AS standby,
       (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
       current_setting('server_version_num')::int AS version,
       CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END
           AS walfile,
       CASE WHEN pg_is_in_recovery() THEN
           COALESCE((SELECT received_tli FROM pg_stat_wal_receiver),
                    (SELECT GREATEST(r.min_recovery_end_timeline, c.timeline_id)
                       FROM pg_control_recovery() r, pg_control_checkpoint() c)) END AS timeline,
       CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_flush_lsn()
            ELSE pg_last_wal_replay_lsn() END::text AS replayed,
       CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn()
            ELSE GREATEST(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) END::text
           AS received,
       CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() END AS pause_state,
       (SELECT to_jsonb(r) FROM (SELECT status, sender_host, sender_port, slot_name, received_tli,
           extract(epoch FROM clock_timestamp() - last_msg_receipt_time)::float8 AS age
           FROM pg_stat_wal_receiver) r) AS receiver,
       (SELECT coalesce(jsonb_agg(to_jsonb(s)), '[]') FROM (SELECT application_name AS name, state,
           client_addr::text AS address, sync_state FROM pg_stat_replication) s) AS senders,
       (SELECT coalesce(jsonb_agg(to_jsonb(s)), '[]') FROM (SELECT slot_name AS name, slot_type AS
           type, active, to_jsonb(p) ->> 'failover' AS failover, database
           FROM pg_replication_slots p) s) AS slots,
       (SELECT count(*) FROM pg_prepared_xacts) AS prepared,
       (SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
          FROM pg_stat_activity WHERE backend_type = 'client backend'
           AND pid <> pg_backend_pid()) AS oldest_transaction,
       (SELECT count(*) FROM pg_stat_progress_basebackup) AS backups,
       (SELECT to_jsonb(a) FROM (SELECT failed_count, last_failed_time > coalesce(
           last_archived_time, '-infinity') AS failing FROM pg_stat_archiver) a) AS archiver,
       (SELECT coalesce(jsonb_object_agg(extname, extversion), '{}') FROM pg_extension)
           AS extensions,
       (SELECT jsonb_build_array(datcollate, to_jsonb(d) ->> 'datcollversion',
           pg_database_collation_actual_version(oid))
          FROM pg_database d WHERE datname = current_database()) AS collation,
       (SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL) AS subscriptions,
       (SELECT jsonb_object_agg(name, setting) FROM pg_settings WHERE name = ANY (%s)) AS settings,
       (SELECT array_agg(application_name) FROM pg_stat_activity
         WHERE application_name LIKE 'sqlroute monitor%%') AS monitors
"""

SETTINGS = (
    "archive_mode",
    "cluster_name",
    "data_checksums",
    "data_directory",
    "default_transaction_read_only",
    "full_page_writes",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_replication_slots",
    "max_wal_senders",
    "max_worker_processes",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_min_apply_delay",
    "session_preload_libraries",
    "synchronous_standby_names",
    "wal_keep_size",
    "wal_level",
    "wal_log_hints",
    "wal_receiver_timeout",
)

_OF_FENCES = (
    "session_preload_libraries",
    "default_transaction_read_only",
    "synchronous_standby_names",
)

_MAY_READ_FILES = """
SELECT has_table_privilege('pg_file_settings', 'SELECT')
       AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE')
"""

_FILES = """
SELECT DISTINCT ON (name) name, setting FROM pg_file_settings WHERE name = ANY (%s)
 ORDER BY name, seqno DESC
"""

_RIGHTS = """
SELECT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       has_parameter_privilege('default_transaction_read_only', 'ALTER SYSTEM') AS l1,
       has_parameter_privilege('synchronous_standby_names', 'ALTER SYSTEM') AS l2,
       has_parameter_privilege('session_preload_libraries', 'ALTER SYSTEM') AS l3,
       has_parameter_privilege('session_preload_libraries', 'SET') AS passes,
       has_table_privilege('pg_file_settings', 'SELECT')
           AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE') AS files,
       has_parameter_privilege('primary_conninfo', 'ALTER SYSTEM') AS repoint,
       has_function_privilege('pg_reload_conf()', 'EXECUTE') AS reload,
       has_function_privilege('pg_promote(boolean, integer)', 'EXECUTE') AS promote,
       pg_has_role('pg_signal_backend', 'USAGE') AS signal,
       pg_has_role('pg_checkpoint', 'USAGE') AS checkpoint,
       pg_has_role('pg_read_all_stats', 'USAGE') AS stats,
       pg_has_role('pg_read_all_settings', 'USAGE') AS settings,
       pg_has_role('pg_execute_server_program', 'USAGE') AS program,
       coalesce((SELECT bool_and(has_table_privilege(c.oid, 'INSERT')
                                 AND has_table_privilege(c.oid, 'UPDATE'))
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                  WHERE n.nspname = 'sqlroute' AND has_schema_privilege(n.oid, 'USAGE')
                    AND c.relname IN ('shard', 'journal', 'operation', 'operation_step')), false)
           AS catalog
"""

_SHARD = """
SELECT name, epoch, node, timeline, state, operation, revision,
       extract(epoch FROM held_until - clock_timestamp())::float8 AS left,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(n.name, n.url, n.removed_at IS NOT NULL)
               ORDER BY n.added_at), '[]') FROM sqlroute.node n) AS announced
  FROM sqlroute.shard
"""

_HAS_CATALOG = """
SELECT coalesce(bool_or(c.relname = 'shard') AND bool_and(has_table_privilege(c.oid, 'SELECT')),
                false)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = 'sqlroute' AND has_schema_privilege(n.oid, 'USAGE')
   AND c.relname IN ('shard', 'node', 'journal', 'operation', 'operation_step')
"""

_DRAINING = """
SELECT count(*) FILTER (WHERE datname = current_database() AND starts_with(application_name,
           'sqlroute monitor') AND application_name NOT LIKE %s) AS routers,
       count(*) FILTER (WHERE xact_start < %s::timestamptz AND state <> 'idle'
           AND wait_event IS DISTINCT FROM 'SyncRep') AS transactions
  FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


@dataclass(frozen=True, slots=True)
class ShardRow:
    """The row of ``sqlroute.shard`` as one node shows it.

    Attributes:
        left: seconds that the hold may still last; ``None`` without one.
        announced: name, URL, and whether it was removed again, of each node that the catalog adds
            to the configuration.
    """

    name: str
    epoch: int
    node: str | None
    timeline: int | None
    state: str
    operation: str | None
    revision: int
    left: float | None
    announced: list[tuple[str, str, bool]]

    @property
    def is_held(self) -> bool:
        """Routers hold write transactions, and will for long enough to go on under that."""
        return self.state == "switching" and (self.left or 0) > SHORTEST_HOLD


class Unreachable(OperationFailed):
    """A server does not answer the operator.

    Attributes:
        refused: nothing listens there: its port answers that at once.
        hung: it accepts connections, or holds them, and says nothing.
    """

    def __init__(self, message: str, *, refused: bool = False, hung: bool = False) -> None:
        self.refused = refused
        self.hung = hung
        super().__init__(message)


class Server:
    """One server, as an operator sees it.

    Args:
        node: with the operator's credentials.
        patience: seconds that connecting and each statement may take.

    Attributes:
        claim: a query that takes a lock for the session, and says if it did. A connection that was
            lost has lost it, too: each new one begins with it.
    """

    def __init__(self, node: Node, *, patience: float = 5.0) -> None:
        self.node = node
        self.patience = patience
        self.claim = ""
        self._connection: psycopg.Connection[Any] | None = None
        self._has_passed = False

    def __repr__(self) -> str:
        state = "connected" if self._connection is not None else "not connected"
        return f"<Server {self.node.name}, {state}>"

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    def close(self) -> None:
        """Close the connection without a word: the server may hang."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.pgconn.finish()

    # asking

    def rows(self, query: str | sql.Composable, values: Any = ()) -> list[dict[str, Any]]:
        """Run one statement and return its rows.

        Raises:
            Unreachable: the server does not answer in time, or is not there.
            OperationFailed: it refuses.
        """
        connection = self._connected()
        text: Any = query.as_string() if isinstance(query, sql.Composable) else query
        try:
            limit = Limit.after(self.patience)
            cursor = limited(connection, limit, connection.execute, text, values or None)
            # an empty description: rows without columns, as of SELECT FROM
            return [] if cursor.description is None else cursor.fetchall()
        except DeadlineExceeded as error:
            self.close()
            raise self._silent() from error
        except psycopg.Error as error:
            if connection.closed or error.sqlstate is None or error.sqlstate.startswith("57P"):
                self.close()
                raise Unreachable(self._said(error)) from error
            raise OperationFailed(self._said(error)) from error

    def row(self, query: str | sql.Composable, values: Any = ()) -> dict[str, Any]:
        """Return the only row of a statement. Raises: as :meth:`rows`."""
        return self.rows(query, values)[0]

    def value(self, query: str | sql.Composable, values: Any = ()) -> Any:
        """Return the only value of a statement. Raises: as :meth:`rows`."""
        return next(iter(self.row(query, values).values()))

    def is_standby(self) -> bool:
        return bool(self.value("SELECT pg_is_in_recovery()"))

    def facts(self) -> dict[str, Any]:
        """Return all that a preflight wants to know. Raises: as :meth:`rows`."""
        told = {**self.row(_FACTS, (list(SETTINGS),)), "rights": self.row(_RIGHTS)}
        told["files"] = self._in_files(*_OF_FENCES) if told["rights"]["files"] else {}
        if self._has_passed:
            told["settings"].update({name: self.setting_of_all(name) for name in _PASSED})
        return told

    def shard_row(self) -> ShardRow | None:
        """Return the shard's row, ``None`` without a catalog that has one and may be read."""
        if not self.value(_HAS_CATALOG):
            return None
        rows = self.rows(_SHARD)
        return ShardRow(**rows[0]) if rows else None

    def journal_epoch(self) -> int:
        """Return the epoch of the newest row of the journal here; 0 without any."""
        return int(self.value("SELECT coalesce(max(epoch), 0) FROM sqlroute.journal"))

    def next_transaction(self) -> int:
        """Return the id that the next writing transaction will get; reads take none."""
        return int(self.value("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))

    def position(self) -> int:
        """Return what a primary has flushed, or a standby has replayed, in bytes."""
        return _lsn(
            self.value(
                "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()"
                " ELSE pg_current_wal_flush_lsn() END)::text"
            )
        )

    def received(self) -> int:
        """Return what a standby has on its own disk, in bytes."""
        return _lsn(
            self.value("SELECT GREATEST(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text")
        )

    def recovery_event(self) -> str:
        """Return what the recovery of a standby waits for.

        Empty where it works, or where the role may not see that.
        """
        rows = self.rows(
            "SELECT coalesce(wait_event, '') AS event FROM pg_stat_activity"
            " WHERE backend_type = 'startup'"
        )
        return str(rows[0]["event"]) if rows else ""

    def timeline(self) -> int:
        """Return a primary's timeline; a control file may show the old one for seconds."""
        return int(self.value("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)"), 16)

    def monitors(self) -> list[str]:
        """Return the application names of the routers that watch this server."""
        rows = self.rows(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE application_name LIKE 'sqlroute monitor%'"
        )
        return [row["application_name"] for row in rows]

    def setting(self, name: str) -> str:
        return str(self.value("SELECT current_setting(%s)", (name,)))

    def setting_of_all(self, name: str) -> str:
        """Return a server-wide setting, by the files where the role may read them.

        What they say holds from the next reload on; this session's own may be another.
        """
        if self.value(_MAY_READ_FILES):
            found = self._in_files(name)
            if name in found or (self._has_passed and name in _PASSED):
                return found.get(name, "")
        return self.setting(name)

    def configured(self, name: str) -> str:
        """Return what the files say of a setting beside ``ALTER SYSTEM``, empty for nothing."""
        if not self.value(_MAY_READ_FILES):
            return ""
        rows = self.rows(
            "SELECT setting FROM pg_file_settings WHERE name = %s"
            " AND sourcefile !~ '/postgresql[.]auto[.]conf$' ORDER BY seqno DESC LIMIT 1",
            (name,),
        )
        return str(rows[0]["setting"]) if rows else ""

    def may_alter(self, name: str) -> bool:
        return bool(self.value("SELECT has_parameter_privilege(%s, 'ALTER SYSTEM')", (name,)))

    def follows(self) -> dict[str, Any]:
        """Return where a standby is told to receive from, as libpq parameters."""
        return conninfo_to_dict(self.setting("primary_conninfo"))

    # telling

    def alter(self, **settings: str | None) -> None:
        """Set server-wide settings, ``None`` to reset, and have them read."""
        for name, value in settings.items():
            if value is None:
                self.rows(sql.SQL("ALTER SYSTEM RESET {}").format(sql.Identifier(name)))
            else:
                self.rows(
                    sql.SQL("ALTER SYSTEM SET {} = {}").format(
                        sql.Identifier(name), sql.Literal(value)
                    )
                )
        self.rows("SELECT pg_reload_conf()")

    def checkpoint(self, patience: float) -> None:
        """Write everything out, so that a stop or a promotion soon has little to do."""
        with self._patient(patience):
            self.rows("CHECKPOINT")

    def follow(self, host: str, port: int, slot: str | None = None) -> None:
        """Have a standby receive from another node; all else of its conninfo stays.

        Args:
            slot: its replication slot there; ``None`` for none.
        """
        known = self.follows()
        if str(known.get("fallback_application_name", "")).startswith(STOPPED):
            known.pop("fallback_application_name")
        known.pop("hostaddr", None)
        self.alter(
            primary_conninfo=make_conninfo(**{**known, "host": host, "port": port}),
            primary_slot_name=slot or "",
        )

    def stop_receiving(self) -> None:
        """Have a standby receive from nobody; where it received from stays written down."""
        known = self.follows()
        if known.get("host") == _NOWHERE:
            return
        was = f"{STOPPED} {known.get('host', '')} {known.get('port', 5432)}"
        known.pop("hostaddr", None)
        self.alter(
            primary_conninfo=make_conninfo(
                **{**known, "host": _NOWHERE, "fallback_application_name": was}
            )
        )

    def stopped_from(self) -> tuple[str, int] | None:
        """Return where a stopped receiver had received from; ``None`` if it is not stopped."""
        return stopped_from(self.follows())

    def receiver(self) -> dict[str, Any] | None:
        """Return the state of a standby's receiver, ``None`` if there is none."""
        rows = self.rows(
            "SELECT pid, status, sender_host, sender_port, received_tli,"
            " extract(epoch FROM clock_timestamp() - last_msg_receipt_time)::float8 AS age"
            " FROM pg_stat_wal_receiver"
        )
        return rows[0] if rows else None

    def create_slot(self, name: str) -> bool:
        """Create a physical slot that keeps WAL from now on; say if it was not there."""
        return bool(
            self.rows(
                "SELECT pg_create_physical_replication_slot(%s, true) WHERE NOT EXISTS"
                " (SELECT FROM pg_replication_slots WHERE slot_name = %s)",
                (name, name),
            )
        )

    def has_slots(self, names: list[str]) -> bool:
        return bool(
            self.value(
                "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = ANY (%s))",
                (names,),
            )
        )

    def drop_slots(self, names: list[str]) -> None:
        """Drop physical slots that nobody uses; others are left alone."""
        self.rows(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
            " WHERE slot_name = ANY (%s) AND slot_type = 'physical' AND NOT active",
            (names,),
        )

    def hold(self, operation: str, seconds: float) -> str:
        """Ask the routers to start no more write transactions on the shard.

        Returns:
            The server's time of that.
        """
        found = self.transaction(
            (
                "UPDATE sqlroute.shard SET state = 'switching', operation = %s,"
                " held_until = clock_timestamp() + make_interval(secs => %s)",
                (operation, seconds),
            ),
            (
                "SELECT clock_timestamp()::text AS now,"
                " pg_notify('sqlroute', (SELECT name FROM sqlroute.shard))",
                (),
            ),
        )
        return str(found[0]["now"])

    def release(self) -> None:
        """Let the routers write again."""
        self.transaction(
            (
                "UPDATE sqlroute.shard SET state = 'steady', operation = NULL, held_until = NULL",
                (),
            ),
            ("SELECT pg_notify('sqlroute', (SELECT name FROM sqlroute.shard))", ()),
        )

    def transaction(self, *statements: tuple[str, Any]) -> list[dict[str, Any]]:
        """Run statements as one transaction; return the rows of the last one."""
        found: list[dict[str, Any]] = []
        self.rows("BEGIN READ WRITE")
        try:
            for query, values in statements:
                found = self.rows(query, values)
            self.rows("COMMIT")
        except OperationFailed:
            if self._connection is not None and not self._connection.closed:
                self.rows("ROLLBACK")
            raise
        return found

    def others(self) -> int:
        """Count the client sessions beside the operator's."""
        return int(
            self.value(
                "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND pid <> pg_backend_pid()"
            )
        )

    def draining(self, operation: str, since: str) -> tuple[int, int]:
        """Count what must end before writes are drained.

        A session that waits for a synchronous standby has committed already and does not count.

        Args:
            since: a time of the server's: of the hold.

        Returns:
            Routers that have write transactions under way, or have not seen the hold yet; client
            sessions in a transaction that began before that, of routers and of others.
        """
        row = self.row(_DRAINING, (f"% held={operation}", since))
        return int(row["routers"]), int(row["transactions"])

    def terminate_others(self) -> int:
        """End all client sessions beside this one; return how many were there."""
        return len(
            self.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )

    def mark(self) -> int:
        """Write a marker and return the position up to which the log is flushed with it."""
        self.rows("BEGIN READ WRITE")
        self.rows("SELECT pg_logical_emit_message(true, 'sqlroute', 'the end of this epoch')")
        self.rows("COMMIT")
        return self.position()

    def promote(self) -> None:
        """Ask a standby to become the primary; returns at once."""
        self.rows("SELECT pg_promote(false)")

    def is_promoting(self) -> bool:
        """Say if somebody has asked a standby to become the primary: it will, whatever follows.

        The request is a file until the postmaster has seen it, and then known to the recovery
        process, without which no pause of it can be ended.
        """
        try:
            asked = self.value(
                "SELECT (pg_stat_file('promote', true)).size IS NOT NULL"
                " OR NOT pg_is_in_recovery() OR pg_wal_replay_resume() IS NULL"
            )
        except Unreachable:
            raise
        except OperationFailed as error:
            if "promotion is ongoing" in str(error) or "not in progress" in str(error):
                return True
            raise
        return bool(asked)

    def is_refused(self) -> bool:
        """Try an ordinary session; say if a fence refuses it.

        Raises:
            Unreachable: nobody answers at all.
        """
        values = {k: v for k, v in self.node.conninfo().items() if k != "options"}
        try:
            connection = connect(values, self.patience)
        except DeadlineExceeded as error:
            raise self._silent() from error
        except psycopg.OperationalError as error:
            if fences.is_fence_error(str(error)):
                return True
            if _is_full(error):
                return False
            raise Unreachable(self._said(error), refused=_is_refused(error)) from error
        connection.pgconn.finish()
        return False

    # inside

    def _in_files(self, *names: str) -> dict[str, str]:
        return {row["name"]: str(row["setting"]) for row in self.rows(_FILES, (list(names),))}

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        self.close()
        try:
            try:
                self._connection, self._has_passed = self._opened(), False
            except psycopg.OperationalError as error:
                if not fences.is_fence_error(str(error)):
                    raise
                # only now: with these options a session does not see its server's own settings
                self._connection, self._has_passed = self._opened(fences.NO_FENCE), True
            self._claimed(self._connection)
        except DeadlineExceeded as error:
            raise self._silent() from error
        except psycopg.OperationalError as error:
            raise Unreachable(self._said(error), refused=_is_refused(error)) from error
        return self._connection

    def _claimed(self, connection: psycopg.Connection[Any]) -> None:
        def is_claimed() -> bool:
            limit = Limit.after(self.patience)
            row = limited(connection, limit, connection.execute, self.claim.encode()).fetchone()
            return bool(row and next(iter(row.values())))

        # the session before, whose connection was lost, may take a moment to end
        if self.claim and not wait_for(is_claimed, timeout=self.patience, pause=0.05):
            self.close()
            raise OperationFailed(
                f"another command works on {self.name}, to which the connection was lost; nothing "
                "more is done here, look at `sqlroute op list`"
            )

    def _opened(self, *more: str) -> psycopg.Connection[Any]:
        values: dict[str, Any] = dict(self.node.conninfo())
        words = (str(values.get("options", "")), _OPTIONS, *more)
        values["options"] = " ".join(word for word in words if word)
        return connect(values, self.patience)

    @contextmanager
    def _patient(self, patience: float) -> Iterator[None]:
        before, self.patience = self.patience, patience
        try:
            yield
        finally:
            self.patience = before

    def _silent(self) -> Unreachable:
        return Unreachable(f"{self.name}: no answer within {self.patience:g} s", hung=True)

    def _said(self, error: BaseException) -> str:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        text = lines[0] if lines else type(error).__name__
        password = self.node.password
        if password is not None and password.reveal():
            text = text.replace(password.reveal(), "***")
        return f"{self.node.name}: {text}"


def connect(values: Mapping[str, Any], patience: float) -> psycopg.Connection[Any]:
    """Connect, in AUTOCOMMIT, rows as dicts.

    libpq's own time limit has whole seconds and is per address; so the time is kept here.

    Raises:
        psycopg.OperationalError: it is not there, or refuses.
        DeadlineExceeded: it did not answer in time.
    """
    known = {k: v for k, v in values.items() if k not in _NOT_FOR_OPERATORS}

    def work() -> psycopg.Connection[Any]:
        return psycopg.connect(
            **known,
            application_name=APPLICATION_NAME,
            connect_timeout=max(2, round(patience + 1)),  # libpq takes 1 for 2
            autocommit=True,
            row_factory=dict_row,
            prepare_threshold=None,
        )

    return Connecting().connect(Limit.after(patience), work)


def stopped_from(conninfo: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return where a receiver stopped by a failover had received from; ``None`` for others."""
    was = str(conninfo.get("fallback_application_name", ""))
    if conninfo.get("host") != _NOWHERE or not was.startswith(STOPPED):
        return None
    host, _, port = was.removeprefix(STOPPED).strip().rpartition(" ")
    return host, int(port)


def is_at(host: str, port: int, other_host: str, other_port: int) -> bool:
    """Say if two addresses are the same place; names are looked up."""
    if int(port) != int(other_port):
        return False
    return host == other_host or bool(_addresses(host) & _addresses(other_host))


def wait_for(condition: Callable[[], T], *, timeout: float, pause: float = 0.002) -> T:
    """Return the first true answer, or the last false one when the time is over."""
    ends = time.monotonic() + timeout
    while True:
        found = condition()
        if found or time.monotonic() >= ends:
            return found
        time.sleep(pause)


def _addresses(host: str) -> set[str]:
    if host.startswith("/") or not host:
        return {host}
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return {host}


def _lsn(text: str | None) -> int:
    return parse_lsn(text) if text else 0


def _is_full(error: BaseException) -> bool:
    text = str(error)
    return "too many clients" in text or "connection slots are reserved" in text


def _is_refused(error: BaseException) -> bool:
    return "Connection refused" in str(error)
