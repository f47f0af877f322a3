"""Run the demo: start servers, load flights, and show five promises kept, each with its proof.

Everything it says is read from the plans that were executed and from the servers that answered; a
promise that is not kept fails its step, and the demo with it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from sqlalchemy import Select, func, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session
from sqlalchemy.sql.schema import Table

from sqlroute.demo.dataset import UNKNOWN_TAIL_NUMBER, rows
from sqlroute.demo.load import JUDGE, counts, load
from sqlroute.demo.schema import Airline, Flight
from sqlroute.errors import LocalTopologyError, SQLRouteError
from sqlroute.local.node import LocalNode
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import LocalTopology, recorded_spec, remove, up
from sqlroute.router import Router
from sqlroute.routing.plan import Plan

SHARDS, REPLICAS = 2, 2
HOLD = 3.0
"""Seconds that every replica is held behind its primary."""

READERS = 4
READS_BEFORE, READS_AFTER = 400, 800
"""Reads that must be done before a replica is killed, and after it."""

PATIENCE = 30.0

Step = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Stage:
    """What every step plays on."""

    router: Router
    topology: LocalTopology
    judge: Engine
    tailnum: str

    def node_at(self, port: int) -> str:
        return next(node.name for node in self.topology.nodes if node.port == port)

    def replicas(self, shard: str) -> list[LocalNode]:
        """Return the nodes of a shard that say that they are replicas."""
        return [
            self.topology.node(replica.node) for replica in self.router.health().replicas(shard)
        ]


class _Plans(logging.Handler):
    """Collects the plans that sessions execute: they log each one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Plan] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            self.found += [value for value in record.args if isinstance(value, Plan)]


def run(
    *,
    directory: Path | None = None,
    keep: bool = False,
    port: int | None = None,
    pg_bin: Path | None = None,
    progress: Callable[[str], None] | None = None,
    shown: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Run the demo and return its document.

    Args:
        directory: for the servers; a temporary one if not given.
        keep: leave the servers running; the document says how to reach them.
        port: of the first server; free ones are looked for if not given.
        progress: told what is being prepared.
        shown: told of each step when it is done.

    Raises:
        LocalTopologyError: the servers cannot be started.
    """
    say, show = progress or _nothing, shown or _nothing
    started = time.monotonic()
    with _servers(directory, keep=keep, port=port, pg_bin=pg_bin, say=say) as topology:
        up_at = time.monotonic()
        say(f"{len(topology.nodes)} servers are up after {up_at - started:.1f} s; loading the data")
        with Router.from_config(topology.config_path) as router:
            judge = load(
                router, topology.node(_primary(router, router.topology.default.shards[0].name))
            )
            try:
                _await_replicas(router)
                loaded_at = time.monotonic()
                stage = _Stage(router, topology, judge, _busiest_plane())
                held = counts(router, router.shard_map().shards)
                steps = []
                for play in (_keyed_read, _own_write, _top_ten, _aggregate, _killed_replica):
                    steps.append(play(stage))
                    show(steps[-1])
            finally:
                judge.dispose()
        kept = _how_to_connect(topology) if keep else []
    return {
        "ok": all(step["ok"] for step in steps),
        "seconds": round(time.monotonic() - started, 2),
        "servers_seconds": round(up_at - started, 2),
        "data_seconds": round(loaded_at - up_at, 2),
        "postgresql": topology.version,
        "rows": held,
        "steps": steps,
        "directory": str(topology.directory) if keep else None,
        "config": str(topology.config_path) if keep else None,
        "kept": kept,
    }


# The steps


def _keyed_read(stage: _Stage) -> Step:
    statement = (
        select(Flight.id, Flight.day, Flight.origin, Flight.dest, func.inet_server_port())
        .where(Flight.tailnum == stage.tailnum)
        .order_by(Flight.id)
    )
    with stage.router.sessionmaker()() as session:
        found, plan, ms = _timed(session, statement)
    again = []
    for _ in range(20):
        with stage.router.sessionmaker()() as session:
            again.append(_timed(session, statement)[2])
    with Session(stage.judge) as plain:
        expected = [row[:-1] for row in plain.execute(statement)]
    answered = stage.node_at(found[0][-1])
    shard = stage.router.locate(_flights(), (stage.tailnum,))[1]
    is_replica = answered in [node.name for node in stage.replicas(shard)]
    return {
        "name": "keyed_read",
        "title": f"A keyed read: the flights of {stage.tailnum}",
        "ok": [row[:-1] for row in found] == expected
        and plan.target.node == answered
        and is_replica,
        "ms": ms,
        "plan": str(plan).splitlines(),
        "plan_document": plan.describe(),
        "seen": [
            f"{len(found)} rows from {answered}, as the server says; "
            f"one server with all the data has {len(expected)}",
            f"20 times again, a new session each: median {median(again):.2f} ms",
        ],
        "columns": [],
        "rows": [],
        "facts": {
            "rows": len(found),
            "expected_rows": len(expected),
            "node": answered,
            "shard": shard,
            "is_replica": is_replica,
            "median_ms": round(median(again), 3),
        },
    }


def _own_write(stage: _Stage) -> Step:
    shard = stage.router.locate(_flights(), (stage.tailnum,))[1]
    everywhere = [r for name in stage.router.shard_map().shards for r in stage.replicas(name)]
    _each(lambda node: node.hold_replay(HOLD), everywhere)
    values = _new_flight(stage.tailnum)
    statement = select(Flight.id, func.inet_server_port()).where(
        Flight.tailnum == stage.tailnum, Flight.id == values["id"]
    )
    try:
        with stage.router.sessionmaker()() as session:
            session.add(Flight(**values))
            before = time.monotonic()
            session.commit()
            committed = time.monotonic()
            found, plan, ms = _timed(session, statement)
        on_replicas = {node.name: _has(node, values) for node in stage.replicas(shard)}
        asked = time.monotonic() - committed
        on_primary = _has(stage.topology.node(_primary(stage.router, shard)), values)
    finally:
        _each(lambda node: node.hold_replay(0), everywhere)
    _await_replicas(stage.router)
    later = {node.name: _has(node, values) for node in stage.replicas(shard)}
    with stage.judge.begin() as connection:
        connection.execute(insert(Flight), values)
    answered = stage.node_at(found[0][-1]) if found else None
    behind = not any(on_replicas.values()) and bool(on_replicas) and on_primary
    return {
        "name": "own_write",
        "title": f"A read of one's own write, every replica held {HOLD:g} s behind",
        "ok": len(found) == 1 and behind and answered == plan.target.node and all(later.values()),
        "ms": ms,
        "plan": str(plan).splitlines(),
        "plan_document": plan.describe(),
        "seen": [
            f"committed in {(committed - before) * 1000:.1f} ms, read back: {len(found)} row "
            f"from {answered}",
            f"asked directly {asked * 1000:.0f} ms after the commit: "
            + ", ".join(f"{name} {_has_words(has)}" for name, has in on_replicas.items()),
            "released, they have it: " + ", ".join(name for name, has in later.items() if has),
        ],
        "columns": [],
        "rows": [],
        "facts": {
            "rows": len(found),
            "node": answered,
            "held_seconds": HOLD,
            "replicas_with_row": [name for name, has in on_replicas.items() if has],
            "replicas_without_row": [name for name, has in on_replicas.items() if not has],
            "replicas_with_row_later": [name for name, has in later.items() if has],
            "asked_after_ms": round(asked * 1000, 1),
        },
    }


def _top_ten(stage: _Stage) -> Step:
    statement = (
        select(
            Flight.dep_delay, Airline.name, Flight.flight, Flight.tailnum, Flight.dest, Flight.id
        )
        .join(Airline, Airline.carrier == Flight.carrier)
        .where(Flight.dep_delay.is_not(None))
        .order_by(Flight.dep_delay.desc(), Flight.id)
        .limit(10)
    )
    columns = ["delay", "airline", "flight", "tail number", "to", "id"]
    return _compared(
        stage, "top_ten", "A cross-shard top ten: the latest departures", statement, columns
    )


def _aggregate(stage: _Stage) -> Step:
    statement = (
        select(
            Flight.carrier,
            func.count(),
            func.avg(Flight.dep_delay),
            func.max(Flight.dep_delay),
            func.sum(Flight.distance),
        )
        .group_by(Flight.carrier)
        .order_by(func.count().desc(), Flight.carrier)
    )
    columns = ["carrier", "flights", "average delay", "longest", "miles"]
    title = "A cross-shard aggregate, checked against one server"
    return _compared(stage, "aggregate", title, statement, columns)


def _compared(stage: _Stage, name: str, title: str, statement: Any, columns: list[str]) -> Step:
    """Run a statement over all shards, and on the one server that has all the rows."""
    with stage.router.sessionmaker()() as session:
        found, plan, ms = _timed(session, statement)
        plan = plan._replace(merge=session.explain(statement).merge)
    with Session(stage.judge) as plain:
        expected, judge_ms = _rows_timed(plain, statement)
    types = [[type(value) for value in row] for row in found]
    same_types = types == [[type(value) for value in row] for row in expected]
    equal = found == expected and same_types
    over_all = set(plan.shards) == set(stage.router.shard_map().shards)
    verdict = "equal to" if equal else "DIFFERENT from"
    return {
        "name": name,
        "title": title,
        "ok": equal and over_all and bool(found),
        "ms": ms,
        "plan": str(plan).splitlines(),
        "plan_document": plan.describe(),
        "seen": [
            f"{len(found)} rows, {verdict} the {len(expected)} of one server with all the data "
            f"({judge_ms:.1f} ms there): values, types and order"
        ],
        "columns": columns,
        "rows": [[_shown(value) for value in row] for row in found],
        "facts": {
            "rows": len(found),
            "equal": equal,
            "shards": list(plan.shards),
            "judge_ms": judge_ms,
        },
    }


def _killed_replica(stage: _Stage) -> Step:
    shard = stage.router.locate(_flights(), (stage.tailnum,))[1]
    victim = stage.replicas(shard)[0]
    plan = stage.router.explain(_port_of(stage.tailnum))
    reads = _Reads(stage)
    started = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(reads.read_on) for _ in range(READERS)]
        try:
            reads.wait_for(READS_BEFORE)
            victim.kill()
            killed = time.monotonic()
            reads.wait_for(reads.count() + READS_AFTER)
        finally:
            reads.stop.set()
        for reader in readers:
            reader.result()
    was_down = not victim.is_running
    before = [read for read in reads.done if read[0] < killed]
    after = [read for read in reads.done if read[0] >= killed]
    slowest = max(took for _, took, _ in reads.done) * 1000
    victim.start()
    by_node = [Counter(stage.node_at(port) for *_, port in part) for part in (before, after)]
    is_proof = by_node[0][victim.name] > 0 and by_node[1][victim.name] == 0 and was_down
    return {
        "name": "replica_killed",
        "title": f"Replica {victim.name} killed (-9) in the middle of reads",
        "ok": is_proof and not reads.failures and len(after) >= READS_AFTER,
        "ms": round((time.monotonic() - started) * 1000, 2),
        "plan": str(plan).splitlines(),
        "plan_document": plan.describe(),
        "seen": [
            f"{len(before)} reads before ({_by_node(by_node[0])}), {len(after)} after "
            f"({_by_node(by_node[1])}), by {READERS} threads",
            f"{len(reads.failures)} failed, the slowest took {slowest:.1f} ms",
            *sorted(set(reads.failures))[:3],
        ],
        "columns": [],
        "rows": [],
        "facts": {
            "node": victim.name,
            "was_down": was_down,
            "reads_before": len(before),
            "reads_after": len(after),
            "from_victim_before": by_node[0][victim.name],
            "from_victim_after": by_node[1][victim.name],
            "failures": len(reads.failures),
            "slowest_ms": round(slowest, 2),
        },
    }


class _Reads:
    """Reads in a loop, each in a session of its own, and who answered."""

    def __init__(self, stage: _Stage) -> None:
        self.done: list[tuple[float, float, int]] = []
        self.failures: list[str] = []
        self.stop = threading.Event()
        self._sessions = stage.router.sessionmaker()
        self._statement = _port_of(stage.tailnum)

    def count(self) -> int:
        return len(self.done) + len(self.failures)

    def read_on(self) -> None:
        """Read until told to stop."""
        while not self.stop.is_set():
            started = time.monotonic()
            try:
                with self._sessions() as session:
                    port = session.execute(self._statement).all()[0][0]
            except Exception as error:  # counted and shown: that is the question
                self.failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
            else:
                self.done.append((started, time.monotonic() - started, port))

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.count() < count and time.monotonic() < deadline:
            time.sleep(0.005)


# What the steps ask


def _timed(session: Session, statement: Any) -> tuple[list[tuple[Any, ...]], Plan, float]:
    """Return rows, the plan that was executed, and milliseconds."""
    logger = logging.getLogger("sqlroute.session")
    plans, level, propagates = _Plans(), logger.level, logger.propagate
    logger.addHandler(plans)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        found, ms = _rows_timed(session, statement)
    finally:
        logger.removeHandler(plans)
        logger.setLevel(level)
        logger.propagate = propagates
    return found, plans.found[0], ms


def _rows_timed(session: Session, statement: Any) -> tuple[list[tuple[Any, ...]], float]:
    started = time.perf_counter()
    found = [tuple(row) for row in session.execute(statement)]
    return found, round((time.perf_counter() - started) * 1000, 2)


def _port_of(tailnum: str) -> Select[Any]:
    return select(func.inet_server_port()).where(Flight.tailnum == tailnum).limit(1)


def _has(node: LocalNode, values: Mapping[str, Any]) -> bool:
    """Ask one server itself, past the router, whether it has a flight."""
    import psycopg

    with psycopg.connect(**node.conninfo, connect_timeout=5, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*) FROM flights WHERE tailnum = %s AND id = %s",
            (values["tailnum"], values["id"]),
        ).fetchone()
    return row is not None and row[0] == 1


def _has_words(has: bool) -> str:
    return "has the row" if has else "does not have the row"


def _new_flight(tailnum: str) -> dict[str, Any]:
    """Return one more flight of a plane: its last one, with a new number."""
    found = [row for row in rows("flights") if row["tailnum"] == tailnum]
    return {**found[-1], "id": 1_000_000, "time_hour": datetime(2013, 2, 1)}


def _busiest_plane() -> str:
    planes = Counter(str(row["tailnum"]) for row in rows("flights"))
    del planes[UNKNOWN_TAIL_NUMBER]
    return planes.most_common(1)[0][0]


def _flights() -> Table:
    table = Flight.__table__
    assert isinstance(table, Table)
    return table


def _by_node(found: Counter[str]) -> str:
    return ", ".join(f"{node} {count}" for node, count in sorted(found.items()))


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


# Servers


@contextmanager
def _servers(
    directory: Path | None,
    *,
    keep: bool,
    port: int | None,
    pg_bin: Path | None,
    say: Callable[[str], None],
) -> Iterator[LocalTopology]:
    from sqlroute.testing import free_ports

    if directory is not None and recorded_spec(directory) is not None:
        raise LocalTopologyError(
            f"{directory} holds servers already; name another directory, or delete them by "
            f"`sqlroute local down --delete --dir {directory}`"
        )
    place = directory or Path(tempfile.mkdtemp(prefix="sqlroute-demo-"))
    if directory is None:
        place.chmod(0o755)  # the user that runs the servers must reach it
    is_done = False
    try:
        spec = LocalSpec(
            shards=SHARDS,
            replicas=REPLICAS,
            port=port or free_ports(SHARDS * (1 + REPLICAS)),
            directory=place,
            pg_bin=pg_bin,
            durable=keep,
        )
        yield _to_its_end(lambda: up(spec, say))
        is_done = True
    finally:
        if not (keep and is_done):
            if recorded_spec(place) is not None:
                remove(place)
            if directory is None:
                shutil.rmtree(place, ignore_errors=True)


def _primary(router: Router, shard: str) -> str:
    primary = router.health().primary(shard)
    if primary is None:
        raise SQLRouteError(f"shard {shard} has no primary; see `sqlroute status`")
    return primary.node


def _await_replicas(router: Router) -> None:
    """Wait until every replica has replayed all that its primary had at some moment from now."""
    deadline = time.monotonic() + PATIENCE
    for shard in router.topology.keyspace_of_shard:
        first = router.monitor.ask(shard, router.policy.probe_deadline).primary(shard)
        wanted = first.lsn if first is not None else 0
        while True:
            health = router.monitor.ask(shard, router.policy.probe_deadline)
            if all(node.is_readable and node.lsn >= wanted for node in health.replicas(shard)):
                break
            if time.monotonic() > deadline:
                raise SQLRouteError(f"replicas of shard {shard} did not catch up in {PATIENCE:g} s")
            time.sleep(0.02)


def _how_to_connect(topology: LocalTopology) -> list[str]:
    """Return commands; the password stands in a file that only the user can read."""
    first = topology.nodes[0]
    passfile = topology.directory / "pgpass"
    passfile.touch(mode=0o600)
    passfile.write_text(f"{first.conninfo['host']}:*:*:{first.user}:{first.password.reveal()}\n")
    start = f"PGPASSFILE={passfile} psql -h {first.conninfo['host']} -U {first.user}"
    return [
        f"export SQLROUTE_CONFIG={topology.config_path}",
        "sqlroute status",
        *(f"{start} -p {node.port} {node.database}   # {node.name}" for node in topology.nodes),
        f"{start} -p {first.port} {JUDGE}   # all rows in plain tables",
        f"sqlroute local down --delete --dir {topology.directory}",
    ]


def _to_its_end(do: Callable[[], T]) -> T:
    """Do it in a thread: Ctrl-C interrupts the wait, which ends only when the thread has."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        wait([future])
    return future.result()


def _each(do: Callable[[LocalNode], None], nodes: list[LocalNode]) -> None:
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(do, nodes))


def _nothing(_: object) -> None:
    pass
