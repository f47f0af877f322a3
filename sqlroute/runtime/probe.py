"""Asking one server how it is: one short query over one kept connection.

A probe never raises and never takes longer than its deadline. A server under SIGSTOP, or behind a
cut cable, still holds its TCP connections, so the deadline is kept on this side: what is not
answered is abandoned with its socket, and nobody waits for the goodbye.

Runs on the monitor's event loop. Decides nothing: see :mod:`sqlroute.health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlroute.health import Observation, TextOrder, next_count
from sqlroute.topology import Node

if TYPE_CHECKING:
    from psycopg import AsyncConnection

APPLICATION_NAME = "sqlroute monitor"
"""How a monitor's connections begin their name; what follows is said to the servers, see
:mod:`sqlroute.runtime.writes`."""

CHANNEL = "sqlroute"
"""What a primary notifies of when a row of ``sqlroute.shard`` has changed."""

_lives = itertools.count(1)

# Facts that cannot change while a connection lives. Every sort of the builtin provider (17 and
# later) goes by code point, as do C and POSIX, and C.UTF-8 since Debian and glibc 2.35; only in
# UTF-8 are code points also the order of the bytes. daticulocale became datlocale in 17: the row
# is read as JSON. lock_timeout: a migration that locks sqlroute.keyspace must not look like a
# dead server. Columns may have collations of their own, which a program need not know of.
_FACTS = """
SELECT current_setting('server_version_num')::int,
       pg_encoding_to_char(d.encoding) = 'UTF8'
       AND (d.datlocprovider = 'b'
            OR d.datlocprovider = 'c'
               AND d.datcollate IN ('C', 'POSIX', 'C.UTF-8', 'C.UTF8', 'C.utf8')),
       has_function_privilege('pg_control_system()', 'EXECUTE'),
       has_function_privilege('pg_control_recovery()', 'EXECUTE')
       AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE'),
       own.others, own.loose, set_config('lock_timeout', %s, %s)
  FROM pg_database d, (
       SELECT array_agg(it.name) FILTER (WHERE NOT it.by_code_point) AS others,
              array_agg(it.name) FILTER (WHERE it.is_loose) AS loose
         FROM (SELECT c.relname || '.' || a.attname AS name, NOT k.collisdeterministic AS is_loose,
                      k.collprovider = 'b' OR k.collprovider = 'c' AND k.collcollate
                      IN ('C', 'POSIX', 'C.UTF-8', 'C.UTF8', 'C.utf8') AS by_code_point
                 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                 JOIN pg_collation k ON k.oid = a.attcollation AND k.collprovider <> 'd'
                WHERE a.attnum > 0 AND NOT a.attisdropped AND c.oid >= 16384
                  AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition) it) own
 WHERE d.datname = current_database()
"""

_IDENTIFIER = "SELECT system_identifier FROM pg_control_system()"

# A primary's timeline stands in the name of its current WAL file; pg_control_checkpoint() showed
# the old one up to 6 s after a promotion. pg_walfile_name() and the current LSN are errors in
# recovery, which a promotion can end between two expressions but never begin: hence the CASE on a
# single look, whose ELSE arm is safe on both sides. A replica's timeline is the one it receives,
# or without a connection to its primary (and for roles without pg_read_all_stats) the one in its
# control file. The catalog is looked for by has_*_privilege, since to_regclass() raises where the
# role may not use the schema; where both its tables were found before, they are not looked for but
# read, which is an error where they have gone. The name is set by the same query, if there is a new
# one: it costs no round trip of its own.
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
       {found},
       {epoch},
       {shard},
       {monitors},
       CASE WHEN %s::text <> '' THEN set_config('application_name', %s::text, false) END,
       extract(epoch FROM pg_postmaster_start_time())::float8
FROM here {tables} {shard_row}
"""

_CONTROL_TIMELINE = (
    "(SELECT GREATEST(r.min_recovery_end_timeline, c.timeline_id)"
    " FROM pg_control_recovery() r, pg_control_checkpoint() c)"
)
_TABLES = """, (
    SELECT max(c.oid) FILTER (WHERE c.relname = 'keyspace') AS keyspace,
           max(c.oid) FILTER (WHERE c.relname = 'shard') AS shard
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'sqlroute' AND c.relname IN ('keyspace', 'shard')
    AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
) tables"""
_EPOCH = "(SELECT k.epoch FROM sqlroute.keyspace k WHERE k.name = %s)"
_SHARD = (
    "s.epoch, CASE WHEN s.state = 'switching' THEN s.operation END,"
    " extract(epoch FROM s.held_until - clock_timestamp())::float8, s.revision"
)
_NO_SHARD = "NULL::bigint, NULL::text, NULL::float8, NULL::bigint"
_SHARD_ROW = "LEFT JOIN sqlroute.shard s ON s.name = %s"

_MONITORS = (
    "(SELECT count(*)::int FROM pg_stat_activity"
    " WHERE starts_with(application_name, 'sqlroute monitor'))"
)

# Set by whoever wrote the configuration for the application's connections. A monitor asks each
# server of each role, one at a time, whatever it is.
_NOT_FOR_PROBES = ("target_session_attrs", "load_balance_hosts", "application_name")


class _Row(NamedTuple):
    """What the probe's query returns."""

    standby: bool
    walfile: str | None
    timeline: int | None
    lsn: int | None
    received: int | None
    age: float | None
    writable: bool
    keyspace: int | None
    shard: int | None
    epoch: int | None
    promotion: int | None
    operation: str | None
    held_for: float | None
    revision: int | None
    monitors: int | None
    told: str | None
    started: float


class _Facts(NamedTuple):
    """What is read once per connection."""

    version: int
    text_order: TextOrder
    system_identifier: int
    may_read_control_file: bool


class Probe:
    """Asks one node, again and again, over one connection.

    For one event loop; one :meth:`observe` at a time.

    Args:
        node: the server.
        keyspace: whose row of ``sqlroute.keyspace`` holds the epoch of the shard's map.
        on_wake: called when the idle connection says something on its own: that it has ended, so
            that the death of a server is known in milliseconds, or that a primary's row of
            ``sqlroute.shard`` has changed.
        shard: the node's, whose row of ``sqlroute.shard`` tells of promotions.
        name: returns what the connection is to be called, asked before each query: how this
            process tells the servers what they should know of it.
    """

    def __init__(
        self,
        node: Node,
        keyspace: str,
        *,
        on_wake: Callable[[], None] | None = None,
        shard: str = "",
        name: Callable[[], str] | None = None,
    ) -> None:
        self.node = node
        self._keyspace = keyspace
        self._shard = shard
        self._on_wake = on_wake
        self._name = name
        self._named = ""
        self._is_outdated = False
        self._listens = False
        self._was_notified = False
        self._connection: AsyncConnection[Any] | None = None
        self._watched: int | None = None
        self._facts: _Facts | None = None
        self._life = 0
        self._started = 0.0
        self._lock_timeout = ""
        self._keyspace_table: int | None = None
        self._shard_table: int | None = None
        self._unreadable: frozenset[int] = frozenset()
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
            if self._was_notified and self._on_wake is not None:
                self._on_wake()  # it came with the answer, which may be from before it
            return asking.result()
        self.drop()
        if not isinstance(error, Exception):
            raise error
        return Observation.failed(self.node.name, sent, explain(error, self.node))

    def drop(self) -> None:
        """Close the connection without waiting for anything."""
        self._unwatch()
        connection, self._connection = self._connection, None
        self._facts = self._keyspace_table = self._shard_table = None
        self._unreadable = frozenset()
        self._listens = self._was_notified = self._is_outdated = False
        if connection is not None:
            connection.pgconn.finish()

    def renew(self) -> None:
        """Ask over a new connection the next time: only that shows whether the server takes one."""
        self._is_outdated = True

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
        row = await self._query(connection, facts)
        rtt = time.monotonic() - asked
        if not row.standby and not self._listens and not self.node.pooler:
            await self._listen(connection)
            row = await self._query(connection, facts)  # what was notified before is in this one
        if row.started != self._started:  # behind a pooler our connection outlives the server
            self._started, self._life = row.started, next(_lives)
        if row.monitors is None:
            self._until_count -= 1
        else:
            self._until_count = next_count(self._monitors, row.monitors) - 1
            self._monitors = row.monitors
        if (row.keyspace, row.shard) != (self._keyspace_table, self._shard_table):
            self._keyspace_table, self._shard_table = row.keyspace, row.shard
            if any(self._readable):
                row = row._replace(**_of_catalog(await self._query(connection, facts)))
        return Observation(
            node=self.node.name,
            at=sent,
            is_primary=not row.standby,
            timeline=int(row.walfile, 16) if row.walfile else row.timeline or 0,
            system_identifier=facts.system_identifier,
            lsn=row.lsn or 0,
            received_lsn=row.received,
            replay_age=row.age,
            rtt=rtt,
            epoch=row.epoch,
            version=facts.version,
            text_order=facts.text_order,
            accepts_writes=not row.standby and row.writable,
            life=self._life,
            started=row.started,
            monitors=row.monitors or 0,
            promotion=row.promotion,
            operation=row.operation or "",
            held_for=row.held_for or 0.0,
            revision=row.revision or 0,
        )

    async def _listen(self, connection: AsyncConnection[Any]) -> None:
        """Have a primary tell at once when its row has changed. A standby would refuse that."""
        from psycopg import Error

        connection.add_notify_handler(self._note)  # without one psycopg keeps all, for ever
        with contextlib.suppress(Error):  # a proxy may refuse it; a lost connection shows below
            await _command(connection, f"LISTEN {CHANNEL}")
        self._listens = True

    def _note(self, _: object) -> None:
        self._was_notified = True

    @property
    def _readable(self) -> tuple[bool, bool]:
        """Whether there is a table of keyspaces, and one of the shard, that can be read."""
        keyspace, shard = self._keyspace_table, self._shard_table
        return (
            keyspace is not None and keyspace not in self._unreadable,
            shard is not None and shard not in self._unreadable and bool(self._shard),
        )

    async def _query(self, connection: AsyncConnection[Any], facts: _Facts) -> _Row:
        """Return the row of the probe, with what can be read of the catalog.

        The catalog may be dropped, locked or made otherwise since the last look. Then the same is
        asked without it, in further round trips, and a table that is not ours is left alone until
        another one has its name.
        """
        from psycopg import ProgrammingError, errors

        keyspace, shard = self._readable
        # with both; where that fails, with each alone: it shows which of them is wrong
        for has_keyspace, has_shard in dict.fromkeys(
            ((keyspace, shard), (keyspace, False), (False, shard))
        ):
            if not (has_keyspace or has_shard):
                continue
            try:
                found = await self._ask_for(connection, facts, has_keyspace, has_shard)
            except errors.LockNotAvailable:
                break
            except ProgrammingError:  # no such table, column or right: the classes 42 and 3F
                continue
            if has_keyspace is not keyspace:
                self._unreadable |= {self._keyspace_table or 0}
            if has_shard is not shard:
                self._unreadable |= {self._shard_table or 0}
            return found
        else:
            self._unreadable |= {self._keyspace_table or 0, self._shard_table or 0}
        return await self._ask_for(connection, facts, False, False)

    async def _ask_for(
        self, connection: AsyncConnection[Any], facts: _Facts, has_keyspace: bool, has_shard: bool
    ) -> _Row:
        name = "" if self._name is None or self.node.pooler else self._name()
        given = "" if name == self._named else name
        if self._listens:
            _forget_notifications(connection)
            self._was_notified = False
        statement = _statement(
            facts.may_read_control_file,
            has_keyspace=has_keyspace,
            has_shard=has_shard,
            counts=self._until_count <= 0,
        )
        keyspace = (self._keyspace,) if has_keyspace else ()
        shard = (self._shard,) if has_shard else ()
        row = _Row(*await self._row(connection, statement, (*keyspace, given, given, *shard)))
        self._named = given or self._named
        if has_keyspace and has_shard:
            return row._replace(keyspace=self._keyspace_table, shard=self._shard_table)
        return row

    async def _row(
        self, connection: AsyncConnection[Any], statement: str, values: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        if not self.node.pooler:
            return await _prepared_row(connection, statement, values)
        return await _row_of_transaction(connection, self._lock_timeout, statement, values)

    def _is_broken(self) -> bool:
        return self._connection is not None and self._connection.closed

    async def _connected(self, deadline: float) -> tuple[AsyncConnection[Any], _Facts]:
        if self._is_outdated:
            self.drop()
        if self._connection is not None and self._facts is not None:
            return self._connection, self._facts
        name = self._name() if self._name is not None and not self.node.pooler else ""
        connection = await _connection_class().connect(
            **_parameters(self.node, name or APPLICATION_NAME),
            autocommit=True,
            prepare_threshold=None if self.node.pooler else 0,
        )
        self._connection, self._named = connection, name
        self._life = next(_lives)
        self._lock_timeout = f"{max(1, round(deadline * 1000 / 4))}ms"
        row = await _row(connection, _FACTS, (self._lock_timeout, bool(self.node.pooler)))
        version, by_code_point, may_identify, may_read_control_file, others, loose, _ = row
        text_order = TextOrder(by_code_point, frozenset(others or ()), frozenset(loose or ()))
        identifier = (await _row(connection, _IDENTIFIER))[0] if may_identify else 0
        self._facts = _Facts(version, text_order, identifier, may_read_control_file)
        # The first run of a statement on a connection is planned and fills the server's caches: it
        # takes 20 times as long and would spoil the round-trip time.
        self._until_count = 0
        for counts in (False, True):
            statement = _statement(
                may_read_control_file, has_keyspace=False, has_shard=False, counts=counts
            )
            await self._row(connection, statement, ("", ""))
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


def _parameters(node: Node, name: str) -> Mapping[str, Any]:
    values = {k: v for k, v in node.conninfo().items() if k not in _NOT_FOR_PROBES}
    return {**values, "application_name": name}


@cache
def _statement(
    may_read_control_file: bool, *, has_keyspace: bool, has_shard: bool, counts: bool
) -> str:
    return _PROBE.format(
        control_timeline=_CONTROL_TIMELINE if may_read_control_file else "0",
        epoch=_EPOCH if has_keyspace else "NULL::bigint",
        shard=_SHARD if has_shard else _NO_SHARD,
        shard_row=_SHARD_ROW if has_shard else "",
        monitors=_MONITORS if counts else "NULL::int",
        found="NULL::oid, NULL::oid"
        if has_keyspace and has_shard
        else "tables.keyspace, tables.shard",
        tables="" if has_keyspace and has_shard else _TABLES,
    )


def _of_catalog(row: _Row) -> dict[str, Any]:
    """Return what a row says of the catalog."""
    names = ("epoch", "promotion", "operation", "held_for", "revision")
    return {name: getattr(row, name) for name in names}


def _forget_notifications(connection: AsyncConnection[Any]) -> None:
    """Take what has come before a query: its answer is newer, and needs no further look for it."""
    pgconn = connection.pgconn
    pgconn.consume_input()
    while pgconn.notifies() is not None:
        pass


async def _command(connection: AsyncConnection[Any], text: str) -> None:
    async with connection.cursor() as cursor:
        await cursor.execute(text.encode())


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
            pgconn.send_prepare(name, _numbered(statement).encode())
            check((yield from execute(pgconn)))
            names[statement] = name
        given: list[bytes] = [value.encode() for value in values]
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


def _numbered(statement: str) -> str:
    """Return a statement of psycopg's with the server's placeholders."""
    first, *others = statement.split("%s")
    return first + "".join(f"${number}{part}" for number, part in enumerate(others, 1))


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
