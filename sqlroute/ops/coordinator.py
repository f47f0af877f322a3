"""Build, renew, check and remove coordinators: what the operator's commands do.

A coordinator has a database of its own, which reads the primaries, and further ones beside it that
read replicas. Each is built in one transaction from what all shards have told in one snapshot each,
so that statements see the old definition or the new one, never a part.

Where a replica does not answer, or has not replayed a migration yet, its database is built and its
report says so: until it is put right, primaries are read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from sqlroute.catalog import coordinator as catalog
from sqlroute.catalog import install as schema
from sqlroute.catalog.coordinator import Built, Host, ShardFacts
from sqlroute.catalog.maps import connect
from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.health import Health, Role
from sqlroute.operations import Operations, Operator
from sqlroute.ops import foreign
from sqlroute.ops.foreign import Definition, Origin, qualified
from sqlroute.topology import Coordinator, Keyspace, Node, Shard, ShardMap

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from sqlroute.router import Router

LOOKS = 3
"""How often a reference table is compared: a write reaches the shards one after another."""

SETTLING = 5.0
"""Seconds that a replica has to replay what the shards told, before it is said not to have."""

MAINTENANCE = "postgres"
"""The database from which another is made."""

_UNKNOWN_DATABASE = "3D000"


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of one database of a coordinator.

    Attributes:
        node: its name.
        replicas: the node that it reads of each shard of which it does not read the primary.
        epoch: of the shard map that it was built from, 0 where nothing is installed.
        built_at: when that was, as text.
        tables: how many it has.
        left_out: why a table of the shards is not there, by ``schema.name``.
        faults: why statements would not run there, each with the way out.
    """

    keyspace: str
    node: str
    epoch: int = 0
    built_at: str = ""
    tables: int = 0
    left_out: Mapping[str, str] | None = None
    faults: tuple[str, ...] = ()
    replicas: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "keyspace": self.keyspace,
            "node": self.node,
            "epoch": self.epoch,
            "built_at": self.built_at,
            "replicas": dict(self.replicas),
            "tables": self.tables,
            "left_out": dict(self.left_out or {}),
            "faults": list(self.faults),
        }


def _silent(_: str) -> None:
    pass


def install(
    router: Router,
    operations: Operations | None = None,
    *,
    analyze: bool = True,
    say: Callable[[str], None] = _silent,
) -> tuple[Report, ...]:
    """Build every coordinator of the configuration, anew where there is one.

    A database that reads replicas may be reported with faults; one that reads primaries has none.

    Args:
        operations: how operators log in; by default as sessions do.
        analyze: have PostgreSQL look at the tables, without which its plans are guesses.
        say: told of progress.

    Raises:
        OperationRefused: the shards cannot be seen as one, or a database is somebody else's.
        OperationFailed: a server refused a statement; nothing was changed there.
    """
    operations = operations or Operations()
    reports = []
    for keyspace, coordinator in _coordinators(router):
        source = _Source.read(router, keyspace, say)
        for node in coordinator.nodes:
            databases = _databases(router, keyspace, node)
            for each, replicas in databases:
                say(f"{each.name}: building")
                reports.append(_build(router, source, each, replicas, operations, analyze, say))
            _remove_readers(router, keyspace, node, operations, say, kept=len(databases) - 1)
    return tuple(reports)


def refresh(
    router: Router,
    operations: Operations | None = None,
    *,
    analyze: bool = True,
    say: Callable[[str], None] = _silent,
) -> tuple[Report, ...]:
    """Build every coordinator anew after a migration or a move of buckets.

    Raises: as :func:`install`, and
        OperationRefused: one was never installed.
    """
    operations = operations or Operations()
    for keyspace, coordinator in _coordinators(router):
        for node in coordinator.nodes:
            with _connected(_login(node, operations.operator), router) as connection:
                if catalog.read_built(connection, keyspace.name) is None:
                    raise OperationRefused(
                        f"nothing is installed on {node.name}; run `sqlroute coordinator install`"
                    )
    return install(router, operations, analyze=analyze, say=say)


def check(router: Router) -> tuple[Report, ...]:
    """Look at every coordinator as a session would; a fault is what would stop a statement."""
    reports = []
    for keyspace, coordinator in _coordinators(router):
        hosts, faults = _hosts(router, keyspace)
        for node in coordinator.nodes:
            for each, _ in _databases(router, keyspace, node):
                report = _looked_at(router, keyspace, each, hosts)
                reports.append(replace(report, faults=(*report.faults, *faults)))
    return tuple(reports)


def remove(
    router: Router,
    operations: Operations | None = None,
    say: Callable[[str], None] = _silent,
) -> tuple[Report, ...]:
    """Take away what was built on every coordinator, passwords too; the databases stay.

    Raises:
        OperationRefused: nothing is installed.
        OperationFailed: a server refused a statement; nothing was changed there.
    """
    operations = operations or Operations()
    reports = []
    for keyspace, coordinator in _coordinators(router):
        for node in coordinator.nodes:
            with _connected(_login(node, operations.operator), router) as connection:
                built = catalog.read_built(connection, keyspace.name)
                if built is None:
                    raise OperationRefused(f"nothing is installed on {node.name}")
                _run(connection, node, foreign.removal(built.schemas))
            say(_removed(node))
            reports.append(Report(keyspace.name, node.name))
            for reader in _remove_readers(router, keyspace, node, operations, say):
                reports.append(Report(keyspace.name, reader.name))
    return tuple(reports)


def _removed(node: Node) -> str:
    return f"{node.name}: removed; database {node.database} is empty now, and yours to drop"


def _remove_readers(
    router: Router,
    keyspace: Keyspace,
    node: Node,
    operations: Operations,
    say: Callable[[str], None],
    *,
    kept: int = 0,
) -> list[Node]:
    """Take away what was built in databases that read replicas, but for the first ones.

    Also those that the configuration does not ask for any more. Returns them.
    """
    login = _login(node, operations.operator)
    with _connected(login, router) as connection:
        names = catalog.read_numbered(connection)
    removed = []
    for name in names:
        number = int(name.rpartition("_")[2])
        reader = replace(node, name=f"{node.name}/{number}", database=name)
        if number <= kept:
            continue
        with _connected(replace(login, database=name), router) as connection:
            built = catalog.read_built(connection, keyspace.name)
            if built is None or not built.replicas:
                continue  # somebody else's
            _run(connection, reader, foreign.removal(built.schemas))
        say(_removed(reader))
        removed.append(reader)
    return removed


def _databases(
    router: Router, keyspace: Keyspace, node: Node
) -> list[tuple[Node, Mapping[str, str]]]:
    """Return the databases of a coordinator's node, each with the replicas that it is to read."""
    coordinator = keyspace.coordinator
    assert coordinator is not None
    readers = coordinator.readers(node)
    replicas = foreign.replicas_read(keyspace.shards, router.health(), len(readers))
    return [(node, {}), *zip(readers, replicas, strict=False)]


@dataclass(frozen=True, slots=True)
class _Source:
    """What all coordinators of a keyspace are built from."""

    keyspace: Keyspace
    shard_map: ShardMap
    shards: tuple[ShardFacts, ...]
    differing: frozenset[str]

    @classmethod
    def read(cls, router: Router, keyspace: Keyspace, say: Callable[[str], None]) -> _Source:
        say(f"keyspace {keyspace.name}: reading {len(keyspace.shards)} shards")
        shard_map = router.shard_map(keyspace.name)
        shards = []
        for name in keyspace.shard_names:
            with _snapshot(router, name) as connection:
                shards.append(catalog.read_shard(connection))
        if reasons := foreign.disagreements(shards, shard_map):
            raise OperationRefused(reasons)
        differing = frozenset(
            str(table)
            for table in foreign.reference_tables(shards)
            if not table.has_row_security and not _is_same(router, keyspace, qualified(table))
        )
        return cls(keyspace, shard_map, tuple(shards), differing)


def _is_same(router: Router, keyspace: Keyspace, table: str) -> bool:
    """Say if a table has the same rows on all shards."""
    for _ in range(LOOKS):
        sums = set()
        for shard in keyspace.shard_names:
            with _snapshot(router, shard) as connection:
                sums.add(catalog.read_sum(connection, table))
        if len(sums) == 1:
            return True
    return False


def _build(
    router: Router,
    source: _Source,
    node: Node,
    replicas: Mapping[str, str],
    operations: Operations,
    analyze: bool,
    say: Callable[[str], None],
) -> Report:
    keyspace = source.keyspace
    assert keyspace.coordinator is not None
    login = _login(node, operations.operator)
    host = source.shards[0].host
    _make_database(router, login, host, say)
    with _connected(login, router) as connection:
        built = catalog.read_built(connection, keyspace.name)
        if built is None and catalog.has_tables(connection):
            raise OperationRefused(
                f"database {node.database} of {node.name} has tables of its own; give the "
                "coordinator a database that nothing else uses, it is made if it is not there"
            )
        if built is not None and bool(built.replicas) != bool(replicas):
            raise OperationRefused(
                f"database {node.database} of {node.name} is a coordinator's that reads "
                f"{'replicas' if built.replicas else 'primaries'}; remove that first, or give this "
                "one another database"
            )
        own = catalog.read_host(connection)
        alike = replace(own, settings=host.settings)  # those it can be given
        shard = source.shards[0].shard
        if reasons := foreign.host_differences(alike, host, node.name, shard):
            raise OperationRefused(
                f"{'; '.join(reasons)}: text or numbers would mean something else there; drop the "
                "database, it is made as it must be, or use a server of the same version"
            )
        schema.upgrade(connection)
        definition = foreign.define(
            source.shards,
            source.shard_map,
            {s.name: _origin(s, operations, replicas.get(s.name)) for s in keyspace.shards},
            coordinator=keyspace.coordinator,
            connect_timeout=router.policy.connect_timeout,
            role=node.user,
            differing=source.differing,
        )
        schemas = dict.fromkeys((*(built.schemas if built else ()), "public"))
        _run(
            connection,
            node,
            (
                *foreign.settings(node.database, own, host),
                *foreign.removal(schemas),
                *(statement.reveal() for statement in definition.statements),
            ),
        )
    _settle(router, replicas)
    report = _looked_at(router, keyspace, node, {shard: host})
    if report.faults and not replicas:
        raise OperationFailed(
            f"{node.name} was built, but would not answer: {'; '.join(report.faults)}",
            step="check",
        )
    if analyze and not report.faults:
        _analyze(router, login, definition, say)
    return report


def _settle(router: Router, replicas: Mapping[str, str]) -> None:
    """Wait until replicas have replayed what the shards told, though not for what is down."""
    ends = time.monotonic() + SETTLING
    for shard, node in replicas.items():
        primary = router.monitor.ask(shard, router.policy.probe_deadline).primary(shard)
        while primary is not None and time.monotonic() < ends:
            known = router.monitor.ask(shard, router.policy.probe_deadline).of(node)
            if not known.is_readable or known.lsn >= primary.lsn:
                break
            time.sleep(0.05)


def _report(keyspace: Keyspace, node: Node, built: Built) -> Report:
    return Report(
        keyspace.name,
        node.name,
        built.epoch,
        built.at,
        built.tables,
        built.left_out,
        replicas=built.replicas,
    )


def _analyze(
    router: Router, login: Node, definition: Definition, say: Callable[[str], None]
) -> None:
    for table in definition.tables:
        say(f"{login.name}: looking at {table}")
        with _connected(login, router) as connection:
            _run(connection, login, (f"ANALYZE {table}",))


def _looked_at(router: Router, keyspace: Keyspace, node: Node, hosts: Mapping[str, Host]) -> Report:
    """Report on one database, by the role that sessions have there."""
    health, report = router.health(), Report(keyspace.name, node.name)
    try:
        with _connected(node, router) as connection:
            built = catalog.read_built(connection, keyspace.name)
            if built is None:
                fault = f"nothing is installed on {node.name}; run `sqlroute coordinator install`"
                return replace(report, faults=(fault,))
            faults = []
            own = catalog.read_host(connection)
            for shard, host in hosts.items():
                faults += foreign.host_differences(own, host, node.name, shard)
            faults += _unreadable(built.replicas, health)
            report = replace(_report(keyspace, node, built), faults=tuple(faults))
            if faults and built.replicas:  # who would hang may be among them
                return report
            floors = json.dumps(_floors(keyspace, built.replicas, health))
            epoch = router.shard_map(keyspace.name).epoch
            connection.exec_driver_sql(
                "SELECT sqlroute.coordinator_check(%s, %s, %s::jsonb)",
                (keyspace.name, epoch, floors),
            )
    except DBAPIError as error:
        fault = f"{_line(error)}; see `sqlroute status`, then run `sqlroute coordinator refresh`"
        return replace(report, faults=(f"{node.name}: {fault}",))
    except OperationFailed as error:
        return replace(report, faults=(str(error),))
    return report


def _unreadable(replicas: Mapping[str, str], health: Health) -> Iterator[str]:
    """Yield why a database that reads replicas would not be asked: primaries are, meanwhile."""
    for shard, name in replicas.items():
        known = health.nodes.get(name)
        if known is None or known.shard != shard:
            why = f"is no node of shard {shard} any more"
        elif known.role is not Role.REPLICA:
            why = f"is {known.state.value}, and no replica ({known.role.value})"
        elif not known.is_readable:
            why = f"is {known.state.value}: {known.refused or known.last_error}"
        else:
            continue
        yield (
            f"{name} {why}; primaries are read instead: bring it back, or have other replicas "
            "read by `sqlroute coordinator refresh`"
        )


def _floors(
    keyspace: Keyspace, replicas: Mapping[str, str], health: Health
) -> dict[str, tuple[int | None, None, float | None]]:
    """Return what the check expects: see :data:`sqlroute.coordination.Floor`."""
    return {
        name: (None, None, health.of(replicas[name]).started)
        if name in replicas
        else (health.shard(name).highest_timeline, None, None)
        for name in keyspace.shard_names
    }


def _hosts(router: Router, keyspace: Keyspace) -> tuple[dict[str, Host], tuple[str, ...]]:
    """Return what each shard does to text and numbers, and which tables may not be read there."""
    hosts, faults = {}, []
    for shard in keyspace.shard_names:
        with _snapshot(router, shard) as connection:
            hosts[shard] = catalog.read_host(connection)
            names = catalog.read_unreadable(connection)
        if names:
            faults.append(
                f"the role of sessions may not read {names[0]} of shard {shard}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + "; GRANT SELECT on the partitions too, since they are read one by one"
            )
    return hosts, tuple(faults)


def _coordinators(router: Router) -> Iterator[tuple[Keyspace, Coordinator]]:
    """Yield each keyspace that has a coordinator.

    Raises:
        OperationRefused: none has.
    """
    found = [(k, k.coordinator) for k in router.topology.keyspaces if k.coordinator is not None]
    if not found:
        name = router.topology.default.name
        raise OperationRefused(
            f"no keyspace has a coordinator; add [keyspaces.{name}.coordinator] with "
            'nodes = ["postgresql://..."] to the configuration'
        )
    yield from found


def _login(node: Node, operator: Operator) -> Node:
    """Return a node as the operator logs in there."""
    if not operator.user:
        return node
    options = node.options
    if operator.passfile:
        options = (*options, ("passfile", operator.passfile))
    return replace(node, user=operator.user, password=operator.password, options=options)


def _origin(shard: Shard, operations: Operations, replica: str | None) -> Origin:
    nodes = [node for node in shard.nodes if replica in (None, node.name)]
    addresses = tuple(operations.advertised(node, shard.name) for node in nodes)
    return Origin(shard.name, addresses, nodes[0], is_replica=replica is not None)


def _make_database(router: Router, login: Node, like: Host, say: Callable[[str], None]) -> None:
    """Make the coordinator's database if it is not there."""
    try:
        with _connected(login, router):
            return
    except OperationFailed as error:
        if getattr(error.__cause__, "sqlstate", None) != _UNKNOWN_DATABASE and (
            f'database "{login.database}" does not exist' not in str(error)
        ):
            raise
    statement = foreign.database(login.database, like)
    say(f"{login.name}: {statement}")
    maintenance = replace(login, database=MAINTENANCE)
    with _connected(maintenance, router, autocommit=True) as connection:
        _run(connection, login, (statement,))


@contextmanager
def _snapshot(router: Router, shard: str) -> Iterator[Connection]:
    """Lend a connection to a shard's primary, reading one snapshot."""
    engine = router.primary_engine(shard).execution_options(
        isolation_level="REPEATABLE READ", postgresql_readonly=True
    )
    with engine.connect() as connection:
        yield connection


@contextmanager
def _connected(node: Node, router: Router, *, autocommit: bool = False) -> Iterator[Connection]:
    """Lend a connection to a coordinator, in a transaction that commits at the end.

    Raises:
        OperationFailed: it cannot be reached.
    """

    def connected() -> Any:
        found = connect(node, router.policy.connect_timeout)
        found.autocommit = autocommit
        return found

    engine = create_engine("postgresql+psycopg://", creator=connected, poolclass=NullPool)
    try:
        connection = engine.connect()
    except DBAPIError as error:
        raise OperationFailed(
            f"coordinator {node.name} cannot be reached: {_line(error)}; start it, or correct "
            "nodes in its table of the configuration",
            step="connect",
        ) from error.orig
    with connection, connection.begin():
        yield connection


def _run(connection: Connection, node: Node, statements: Sequence[str]) -> None:
    """Run statements that may hold passwords: none of them is in an error.

    Raises:
        OperationFailed: the server's words.
    """
    import psycopg

    cursor: Any = connection.connection.cursor()
    for statement in statements:
        try:
            cursor.execute(statement)
        except psycopg.Error as error:
            said = error.diag.message_primary or type(error).__name__
            what = " ".join(statement.split()[:3])
            raise OperationFailed(
                f"{node.name} refused {what}: {said}; nothing was changed there", step=what
            ) from None


def _line(error: DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]
