"""Asking one server how it is: one short query over one kept connection.

A probe never raises and never takes longer than its deadline. A server under SIGSTOP, or behind a
cut cable, still holds its TCP connections, so the deadline is kept on this side: what is not
answered is abandoned with its socket, and nobody waits for the goodbye.

Runs on the monitor's event loop. Decides nothing: see :mod:`sqlroute.health`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlroute.health import Observation, next_count
from sqlroute.topology import Node

if TYPE_CHECKING:
    from psycopg import AsyncConnection

APPLICATION_NAME = "sqlroute monitor"

_lives = itertools.count(1)

# Facts that cannot change while a connection lives. Every sort of the builtin provider (17 and
# later) goes by code point, as do C and POSIX, and C.UTF-8 since Debian and glibc 2.35; only in
# UTF-8 are code points also the order of the bytes. daticulocale became datlocale in 17: the row
# is read as JSON. lock_timeout: a migration that locks sqlroute.keyspace must not look like a
# dead server.
_FACTS = """
SELECT current_setting('server_version_num')::int,
       pg_encoding_to_char(d.encoding) = 'UTF8'
       AND (d.datlocprovider = 'b'
            OR d.datlocprovider = 'c'
               AND d.datcollate IN ('C', 'POSIX', 'C.UTF-8', 'C.UTF8', 'C.utf8')),
       has_function_privilege('pg_control_system()', 'EXECUTE'),
       has_function_privilege('pg_control_recovery()', 'EXECUTE')
       AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE'),
       set_config('lock_timeout', %s, %s)
FROM pg_database d WHERE d.datname = current_database()
"""

_IDENTIFIER = "SELECT system_identifier FROM pg_control_system()"

# A primary's timeline stands in the name of its current WAL file; pg_control_checkpoint() showed
# the old one up to 6 s after a promotion. pg_walfile_name() and the current LSN are errors in
# recovery, which a promotion can end between two expressions but never begin: hence the CASE on a
# single look, whose ELSE arm is safe on both sides. A replica's timeline is the one it receives,
# or without a connection to its primary (and for roles without pg_read_all_stats) the one in its
# control file. The catalog is looked for by has_*_privilege, since to_regclass() raises where the
# role may not use the schema.
_PROBE = """
WITH here AS MATERIALIZED (SELECT pg_is_in_recovery() AS standby)
SELECT here.standby,
       CASE WHEN NOT here.standby THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
       CASE WHEN here.standby THEN
           COALESCE((SELECT received_tli FROM pg_stat_wal_receiver), {control_timeline}) END,
       CASE WHEN here.standby THEN pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')
            ELSE pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0') END::bigint,
       CASE WHEN here.standby THEN pg_wal_lsn_diff(
           GREATEST(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0')
            ELSE pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') END::bigint,
       CASE WHEN here.standby THEN
           extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) END::float8,
       current_setting('default_transaction_read_only') = 'off',
       (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'sqlroute' AND c.relname = 'keyspace'
        AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')),
       {epoch},
       {monitors},
       extract(epoch FROM pg_postmaster_start_time())::float8
FROM here
"""

_CONTROL_TIMELINE = (
    "(SELECT GREATEST(r.min_recovery_end_timeline, c.timeline_id)"
    " FROM pg_control_recovery() r, pg_control_checkpoint() c)"
)
_EPOCH = "(SELECT k.epoch FROM sqlroute.keyspace k WHERE k.name = %s)"

_MONITORS = (
    "(SELECT count(*)::int FROM pg_stat_activity WHERE application_name = 'sqlroute monitor')"
)

# Set by whoever wrote the configuration for the application's connections. A monitor asks each
# server of each role, one at a time, whatever it is.
_NOT_FOR_PROBES = ("target_session_attrs", "load_balance_hosts", "application_name")


class _Facts(NamedTuple):
    """What is read once per connection."""

    version: int
    orders_by_code_point: bool
    system_identifier: int
    may_read_control_file: bool


class Probe:
    """Asks one node, again and again, over one connection.

    For one event loop; one :meth:`observe` at a time.

    Args:
        node: the server.
        keyspace: whose row of ``sqlroute.keyspace`` holds the epoch of the shard's map.
        on_wake: called when the idle connection says something on its own, which is nearly always
            that it has ended: the death of a server is then known in milliseconds.
    """

    def __init__(
        self, node: Node, keyspace: str, *, on_wake: Callable[[], None] | None = None
    ) -> None:
        self.node = node
        self._keyspace = keyspace
        self._on_wake = on_wake
        self._connection: AsyncConnection[Any] | None = None
        self._watched: int | None = None
        self._facts: _Facts | None = None
        self._life = 0
        self._started = 0.0
        self._lock_timeout = ""
        self._catalog: int | None = None
        self._unreadable_catalog: int | None = None
        self._monitors = 0
        self._until_count = 0

    def __repr__(self) -> str:
        return f"Probe({self.node.name}, {'connected' if self._connection else 'not connected'})"

    async def observe(self, deadline: float) -> Observation:
        """Ask once; return what was seen, or that and why nothing was, within the deadline."""
        sent = time.monotonic()
        self._unwatch()
        asking = asyncio.get_running_loop().create_task(self._ask(sent, deadline))
        try:
            await asyncio.wait({asking}, timeout=deadline)
        finally:
            answered = asking.done()
            if not answered:
                await self._abandon(asking)
        if not answered:
            self.drop()
            return Observation.failed(
                self.node.name, sent, f"no answer within {deadline:g} s", hung=True
            )
        error = asking.exception()
        if error is None:
            self._watch()
            return asking.result()
        self.drop()
        if not isinstance(error, Exception):
            raise error
        return Observation.failed(self.node.name, sent, explain(error, self.node))

    def drop(self) -> None:
        """Close the connection without waiting for anything."""
        self._unwatch()
        connection, self._connection = self._connection, None
        self._facts = self._catalog = self._unreadable_catalog = None
        if connection is not None:
            connection.pgconn.finish()

    def fileno(self) -> int | None:
        """Return the descriptor of the kept connection, if there is one."""
        if self._connection is None or self._connection.closed:
            return None
        return self._connection.pgconn.socket

    async def _abandon(self, asking: asyncio.Task[Observation]) -> None:
        """Cancel until it has ended: whatever waits in there for a server, or again, gives up."""
        while not asking.done():
            asking.cancel()
            await asyncio.sleep(0)
        if not asking.cancelled():
            asking.exception()

    async def _ask(self, sent: float, deadline: float) -> Observation:
        from psycopg import OperationalError

        is_kept = self._connection is not None
        try:
            return await self._ask_over(await self._connected(deadline), sent)
        except OperationalError:
            # A kept connection that has ended may have been ended by an operator, or by a restart
            # that is over: whether the server is there, only a new one can tell.
            if not is_kept or not self._is_broken():
                raise
        self.drop()
        return await self._ask_over(await self._connected(deadline), sent)

    async def _ask_over(
        self, connected: tuple[AsyncConnection[Any], _Facts], sent: float
    ) -> Observation:
        connection, facts = connected
        asked = time.monotonic()
        row: Sequence[Any] = await self._query(connection, facts)
        rtt = time.monotonic() - asked
        *row, started = row
        standby, walfile, timeline, lsn, received, age, writable, catalog, epoch, monitors = row
        if started != self._started:  # behind a pooler our connection outlives the server
            self._started, self._life = started, next(_lives)
        if monitors is None:
            self._until_count -= 1
        else:
            self._until_count = next_count(self._monitors, monitors) - 1
            self._monitors = monitors
        if catalog != self._catalog:
            self._catalog = catalog
            if catalog is not None and epoch is None and catalog != self._unreadable_catalog:
                epoch = (await self._query(connection, facts))[-3]
        return Observation(
            node=self.node.name,
            at=sent,
            is_primary=not standby,
            timeline=int(walfile, 16) if walfile else timeline or 0,
            system_identifier=facts.system_identifier,
            lsn=lsn or 0,
            received_lsn=received,
            replay_age=age,
            rtt=rtt,
            epoch=epoch,
            version=facts.version,
            orders_by_code_point=facts.orders_by_code_point,
            accepts_writes=not standby and writable,
            life=self._life,
            monitors=monitors or 0,
        )

    async def _query(self, connection: AsyncConnection[Any], facts: _Facts) -> tuple[Any, ...]:
        """Return the row of the probe, with the epoch if there is a catalog that can be read.

        The catalog may be dropped, locked or made otherwise since the last look. Then the same is
        asked without it, in a second round trip, and a table that is not ours is left alone until
        another one has its name.
        """
        from psycopg import ProgrammingError, errors

        counts = self._until_count <= 0
        if self._catalog is not None and self._catalog != self._unreadable_catalog:
            try:
                return await self._row(
                    connection,
                    _statement(facts.may_read_control_file, has_catalog=True, counts=counts),
                    (self._keyspace,),
                )
            except errors.LockNotAvailable:
                pass
            except ProgrammingError:  # no such table, column or right: the classes 42 and 3F
                self._unreadable_catalog = self._catalog
        return await self._row(
            connection,
            _statement(facts.may_read_control_file, has_catalog=False, counts=counts),
        )

    async def _row(
        self, connection: AsyncConnection[Any], statement: str, values: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        if not self.node.pooler:
            return await _prepared_row(connection, statement, values)
        return await _row_of_transaction(connection, self._lock_timeout, statement, values)

    def _is_broken(self) -> bool:
        return self._connection is not None and self._connection.closed

    async def _connected(self, deadline: float) -> tuple[AsyncConnection[Any], _Facts]:
        if self._connection is not None and self._facts is not None:
            return self._connection, self._facts
        connection = await _connection_class().connect(
            **_parameters(self.node),
            autocommit=True,
            prepare_threshold=None if self.node.pooler else 0,
        )
        self._connection = connection
        self._life = next(_lives)
        self._lock_timeout = f"{max(1, round(deadline * 1000 / 4))}ms"
        row = await _row(connection, _FACTS, (self._lock_timeout, bool(self.node.pooler)))
        version, by_code_point, may_identify, may_read_control_file, _ = row
        identifier = (await _row(connection, _IDENTIFIER))[0] if may_identify else 0
        self._facts = _Facts(version, by_code_point, identifier, may_read_control_file)
        # The first run of a statement on a connection is planned and fills the server's caches: it
        # takes 20 times as long and would spoil the round-trip time.
        self._until_count = 0
        for counts in (False, True):
            await self._row(
                connection, _statement(may_read_control_file, has_catalog=False, counts=counts)
            )
        return connection, self._facts

    def _watch(self) -> None:
        fileno = self.fileno()
        if self._on_wake is None or fileno is None:
            return
        self._watched = fileno
        asyncio.get_running_loop().add_reader(fileno, self._woken)

    def _unwatch(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None

    def _woken(self) -> None:
        self._unwatch()
        if self._on_wake is not None:
            self._on_wake()


def explain(error: BaseException | str, node: Node) -> str:
    """Return the first line of an error, with every secret of the node masked."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    for secret in _secrets(node):
        text = text.replace(secret, "***")
    return text


def _secrets(node: Node) -> tuple[str, ...]:
    options = tuple(value for key, value in node.options if "password" in key and value)
    password = node.password.reveal() if node.password is not None else ""
    return (password, *options) if password else options


def _parameters(node: Node) -> Mapping[str, Any]:
    values = {k: v for k, v in node.conninfo().items() if k not in _NOT_FOR_PROBES}
    return {**values, "application_name": APPLICATION_NAME}


@cache
def _statement(may_read_control_file: bool, *, has_catalog: bool, counts: bool) -> str:
    return _PROBE.format(
        control_timeline=_CONTROL_TIMELINE if may_read_control_file else "0",
        epoch=_EPOCH if has_catalog else "NULL::bigint",
        monitors=_MONITORS if counts else "NULL::int",
    )


async def _row(
    connection: AsyncConnection[Any], statement: str, values: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    from psycopg import rows

    async with connection.cursor(row_factory=rows.tuple_row, binary=True) as cursor:
        # psycopg takes a literal type for queries; these are built from constants of this module.
        await cursor.execute(statement.encode(), values)
        row = await cursor.fetchone()
    assert row is not None
    return row


async def _prepared_row(
    connection: AsyncConnection[Any], statement: str, values: tuple[str, ...]
) -> tuple[Any, ...]:
    """Do the same with less ado: it runs for each node in each interval, for ever.

    A cursor costs as much again as the query. So libpq is spoken to directly, and psycopg only
    turns the result into values.
    """
    from psycopg.adapt import Transformer
    from psycopg.errors import error_from_result
    from psycopg.generators import execute
    from psycopg.pq import ExecStatus, Format

    pgconn, names = connection.pgconn, connection.__dict__.setdefault("sqlroute_prepared", {})

    def ask(name: bytes) -> Any:
        if statement not in names:
            query = statement.replace("%s", "$1").replace("%%", "%")
            pgconn.send_prepare(name, query.encode())
            check((yield from execute(pgconn)))
            names[statement] = name
        given = [value.encode() for value in values]
        pgconn.send_query_prepared(name, given or None, result_format=Format.BINARY)
        return check((yield from execute(pgconn)))

    def check(results: list[Any]) -> Any:
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:
                raise error_from_result(result)
        return results[-1]

    result = await connection.wait(ask(names.get(statement) or f"probe{len(names)}".encode()))
    transformer = Transformer(connection)
    transformer.set_pgresult(result)
    row = transformer.load_row(0, tuple)
    assert row is not None
    return row


async def _row_of_transaction(
    connection: AsyncConnection[Any], lock_timeout: str, statement: str, values: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Do the same through a pooler, to whose connections nothing may stick.

    Two commands as one simple query are one transaction, and the setting ends with it.
    """
    from psycopg import AsyncClientCursor, rows

    setting = f"SELECT set_config('lock_timeout', '{lock_timeout}', true)"
    async with AsyncClientCursor(connection, row_factory=rows.tuple_row) as cursor:
        await cursor.execute(f"{setting}; {statement}".encode(), values)
        cursor.nextset()
        row = await cursor.fetchone()
    assert row is not None
    return row


@cache
def _connection_class() -> type[AsyncConnection[Any]]:
    """Return psycopg's class without its goodbye to a cancelled query.

    When a task is cancelled in a query, psycopg opens another connection to cancel it on the
    server, waits up to 5 s and logs a warning. All that is in vain on a server that hangs, twice
    a second; a query of the monitor is worth nothing and can be left to its fate.
    """
    from psycopg import AsyncConnection, waiting

    class ProbeConnection(AsyncConnection[Any]):
        async def wait(self, gen: Any, interval: float = 1.0, timeout: float | None = None) -> Any:
            # psycopg's own default here is to look again at once, which is a busy loop
            return await waiting.wait_async(gen, self.pgconn.socket, interval, timeout)

    return ProbeConnection
