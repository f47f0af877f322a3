"""Promises of the monitor, on real servers: what it sees, how soon, and that it never hangs."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sqlroute.errors import UnknownName
from sqlroute.health import Health, NodeHealth, Role, State
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.runtime.monitor import Monitor
from sqlroute.runtime.probe import APPLICATION_NAME, Probe
from sqlroute.testing import TopologyFactory
from sqlroute.topology import Keyspace, Node, Secret, Shard, Topology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
needs_15 = pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 from Debian")
INTERVAL = 0.2
DEADLINE = 0.3

MakeMonitor = Callable[..., Monitor]


def node_of(local: LocalNode) -> Node:
    return Node(local.name, "127.0.0.1", local.port, local.database, local.user, local.password)


def topology_of(*nodes: Node) -> Topology:
    """Make one keyspace of one shard s0."""
    return Topology((Keyspace("app", (Shard("s0", nodes),)),))


def execute(local: LocalNode, statement: str) -> Any:
    with psycopg.connect(**local.conninfo, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchone() if cursor.description else None


def watching(local: LocalNode) -> set[int]:
    """Return the backends of monitors on a server."""
    with psycopg.connect(**local.conninfo, autocommit=True) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", [APPLICATION_NAME]
        )
        return {pid for (pid,) in found}


def until(condition: Callable[[], object], timeout: float = 10.0) -> float:
    """Wait until it is true; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "it did not become true"
        time.sleep(0.002)
    return time.monotonic() - began


@pytest.fixture
def make_monitor() -> Iterator[MakeMonitor]:
    """Make monitors that are closed at the end."""
    made: list[Monitor] = []

    def make(nodes: Iterable[Node], **options: Any) -> Monitor:
        options = {"interval": INTERVAL, "deadline": DEADLINE, **options}
        monitor = Monitor(topology_of(*nodes), **options)
        made.append(monitor)
        return monitor

    yield make
    for monitor in made:
        monitor.close()


@pytest.fixture(params=[None, pytest.param(DEBIAN_15, marks=needs_15)], ids=["newest", "15"])
def servers(
    request: pytest.FixtureRequest, sqlroute_topology_factory: TopologyFactory
) -> LocalTopology:
    """A primary a and replicas b and c."""
    return sqlroute_topology_factory(shards=1, replicas=2, pg_bin=request.param, label="monitor")


@pytest.fixture
def one(sqlroute_topology_factory: TopologyFactory) -> Iterator[LocalTopology]:
    """The same with the default PostgreSQL, put right after the test."""
    servers = sqlroute_topology_factory(shards=1, replicas=2, label="monitor")
    yield servers
    for node in servers.nodes:
        node.resume()
        node.start()


class TestSight:
    def test_everything_is_known_when_ready(
        self, servers: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """Roles, timeline, identity, version and position of each node, after one look."""
        health = make_monitor(map(node_of, servers.nodes)).ready(5)

        a, b, c = (health.of(node.name) for node in servers.nodes)
        assert [node.role for node in (a, b, c)] == [Role.PRIMARY, Role.REPLICA, Role.REPLICA]
        assert [node.state for node in (a, b, c)] == [State.UP] * 3
        assert {node.timeline for node in (a, b, c)} == {1}
        assert len({node.system_identifier for node in (a, b, c)} - {0}) == 1
        assert {node.version // 10000 for node in (a, b, c)} == {servers.version}
        assert [node.accepts_writes for node in (a, b, c)] == [True, False, False]
        assert all(0 < node.rtt < DEADLINE for node in (a, b, c))
        assert b.received_lsn is not None
        assert b.received_lsn >= b.lsn > 0
        assert health.primary("s0") is a

    def test_lag_is_seen_in_bytes_and_seconds(
        self, servers: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A replica whose replay stands still ages; when it has caught up it is fresh."""
        a, b, c = servers.nodes
        monitor = make_monitor(map(node_of, servers.nodes))
        monitor.ready(5)
        b.pause_replay()
        try:
            execute(a, "CREATE TABLE IF NOT EXISTS lag AS SELECT generate_series(1, 10000) n")
            execute(a, "DROP TABLE lag")
            paused = time.monotonic()
            until(lambda: (monitor.health.of(b.name).lag_seconds or 0) > 0.5)
            behind = monitor.health.of(b.name)
            assert (behind.lag_bytes or 0) > 10_000
            assert 0.5 < (behind.lag_seconds or 0) < time.monotonic() - paused + 1.5
            assert behind.received_lsn is not None
            assert behind.received_lsn > behind.lsn
            until(lambda: monitor.health.of(c.name).lag_bytes == 0)
        finally:
            b.resume_replay()

        until(lambda: monitor.health.of(b.name).lag_seconds == 0)

    def test_role_without_rights_still_sees(
        self, servers: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A role that may read neither the control file nor the catalog sees roles and lag."""
        a, b, _ = servers.nodes
        functions = "pg_control_system(), pg_control_recovery(), pg_control_checkpoint()"
        execute(a, "CREATE ROLE watcher LOGIN PASSWORD 'w'")
        execute(a, "CREATE SCHEMA sqlroute")
        execute(a, f"REVOKE EXECUTE ON FUNCTION {functions} FROM public")
        try:
            until(lambda: execute(b, "SELECT 1 FROM pg_roles WHERE rolname = 'watcher'"))
            nodes = [
                replace(node_of(node), user="watcher", password=Secret("w"))
                for node in servers.nodes
            ]
            health = make_monitor(nodes).ready(5)

            assert [health.of(n.name).state for n in nodes] == [State.UP] * 3
            assert health.shard("s0").primary == a.name
            assert health.of(b.name).lag_bytes is not None
            assert health.of(b.name).system_identifier == 0
        finally:
            execute(a, f"GRANT EXECUTE ON FUNCTION {functions} TO public")
            execute(a, "DROP SCHEMA sqlroute")
            execute(a, "DROP ROLE watcher")

    def test_ordinary_role_sees_the_timeline_of_replicas(
        self, servers: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """Without pg_read_all_stats, the control file has it."""
        a, b, _ = servers.nodes
        execute(a, "CREATE ROLE ordinary LOGIN PASSWORD 'w'")
        try:
            until(lambda: execute(b, "SELECT 1 FROM pg_roles WHERE rolname = 'ordinary'"))
            nodes = [
                replace(node_of(node), user="ordinary", password=Secret("w"))
                for node in servers.nodes
            ]
            health = make_monitor(nodes).ready(5)

            assert {health.of(node.name).timeline for node in nodes} == {1}
            assert health.of(b.name).system_identifier > 0
        finally:
            execute(a, "DROP ROLE ordinary")

    def test_fenced_primary_accepts_no_writes(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A reload of default_transaction_read_only is seen on the kept connection."""
        a = one.nodes[0]
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        execute(a, "ALTER SYSTEM SET default_transaction_read_only = on")
        execute(a, "SELECT pg_reload_conf()")
        try:
            until(lambda: not monitor.health.of(a.name).accepts_writes)
            assert monitor.health.shard("s0").primary == a.name
        finally:
            with psycopg.connect(**a.conninfo, autocommit=True) as connection:
                connection.execute("SET default_transaction_read_only = off")
                connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
                connection.execute("SELECT pg_reload_conf()")


class TestCatalog:
    @pytest.fixture
    def primary(self, servers: LocalTopology) -> Iterator[LocalNode]:
        yield servers.nodes[0]
        execute(servers.nodes[0], "DROP SCHEMA IF EXISTS sqlroute CASCADE")

    def install(self, primary: LocalNode, epoch: int) -> None:
        execute(primary, "CREATE SCHEMA IF NOT EXISTS sqlroute")
        execute(
            primary,
            "CREATE TABLE sqlroute.keyspace (name text PRIMARY KEY, buckets int, epoch bigint)",
        )
        execute(primary, f"INSERT INTO sqlroute.keyspace VALUES ('app', 64, {epoch})")

    def test_epoch_follows_the_catalog(
        self, servers: LocalTopology, primary: LocalNode, make_monitor: MakeMonitor
    ) -> None:
        """Installed later, changed, dropped and made again: seen on the same connections."""
        monitor = make_monitor(map(node_of, servers.nodes))
        assert monitor.ready(5).highest_epoch("s0") is None
        before = watching(primary)

        self.install(primary, 7)
        until(lambda: all(n.epoch == 7 for n in monitor.health.nodes.values()))
        assert monitor.health.confirmed("s0", 7, time.monotonic(), 5)

        execute(primary, "UPDATE sqlroute.keyspace SET epoch = 8")
        until(lambda: all(n.epoch == 8 for n in monitor.health.nodes.values()))

        execute(primary, "DROP TABLE sqlroute.keyspace")
        until(lambda: all(n.epoch is None for n in monitor.health.nodes.values()))
        self.install(primary, 9)
        until(lambda: monitor.health.confirmed("s0", 9, time.monotonic(), 5))
        assert all(node.state is State.UP for node in monitor.health.nodes.values())
        assert watching(primary) == before

    def test_locked_catalog_does_not_look_like_a_dead_server(
        self, servers: LocalTopology, primary: LocalNode, make_monitor: MakeMonitor
    ) -> None:
        """A migration that holds the table costs the epoch, not the node."""
        self.install(primary, 7)
        monitor = make_monitor([node_of(primary)])
        monitor.ready(5)
        until(lambda: monitor.health.of(primary.name).epoch == 7)
        with psycopg.connect(**primary.conninfo) as connection:
            connection.execute("LOCK TABLE sqlroute.keyspace IN ACCESS EXCLUSIVE MODE")
            until(lambda: monitor.health.of(primary.name).epoch is None)
            for _ in range(3):
                assert monitor.ask("s0", 5).of(primary.name).state is State.UP

        until(lambda: monitor.health.of(primary.name).epoch == 7)

    def test_foreign_table_of_that_name_is_left_alone(
        self, servers: LocalTopology, primary: LocalNode, make_monitor: MakeMonitor
    ) -> None:
        """Somebody else's sqlroute.keyspace gives no epoch and no storm of errors."""
        execute(primary, "CREATE SCHEMA sqlroute")
        execute(primary, "CREATE TABLE sqlroute.keyspace (unlike text)")
        monitor = make_monitor([node_of(primary)])
        monitor.ready(5)
        written = primary.log.stat().st_size
        for _ in range(5):
            assert monitor.ask("s0", 5).of(primary.name).state is State.UP

        assert monitor.health.of(primary.name).epoch is None
        with primary.log.open(errors="replace") as log:
            log.seek(written)
            assert "does not exist" not in log.read()


class TestFailures:
    def test_killed_replica_is_known_at_once(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """The end of the idle connection tells, not the next probe: milliseconds."""
        b = one.nodes[1]
        monitor = make_monitor(map(node_of, one.nodes), interval=2.0)
        monitor.ready(5)

        b.kill()
        in_doubt = until(lambda: not monitor.health.of(b.name).is_readable)
        down = until(lambda: monitor.health.of(b.name).state is State.DOWN)

        assert in_doubt < 0.5
        assert in_doubt + down < 1.0
        b.start()
        until(lambda: monitor.health.of(b.name).is_readable)

    def test_hanging_replica_is_known_within_its_deadlines(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """SIGSTOP: two deadlines and the pauses between; whoever waits there is told."""
        hanging: list[str] = []
        b = one.nodes[1]
        monitor = make_monitor(map(node_of, one.nodes), on_down=hanging.append)
        monitor.ready(5)

        b.pause()
        in_doubt = until(lambda: not monitor.health.of(b.name).is_readable)
        down = until(lambda: monitor.health.of(b.name).state is State.DOWN)

        assert in_doubt < 1.2 * INTERVAL + DEADLINE + 0.3
        assert in_doubt + down < 1.3 * INTERVAL + 2 * DEADLINE + 0.3
        until(lambda: hanging == [b.name])
        assert all(monitor.health.of(n.name).is_readable for n in (one.nodes[0], one.nodes[2]))
        b.resume()
        until(lambda: monitor.health.of(b.name).is_readable)

    def test_abandoned_probes_leave_nothing(self, one: LocalTopology) -> None:
        """Probes of a hanging server keep the deadline, block no loop, leak no descriptor."""
        b = one.nodes[1]

        async def probe_hanging() -> tuple[list[float], float, int, int]:
            probe = Probe(node_of(b), "app")
            assert (await probe.observe(DEADLINE)).error is None
            before, longest = _descriptors(), 0.0

            async def tick() -> None:
                nonlocal longest
                while True:
                    began = time.perf_counter()
                    await asyncio.sleep(0.001)
                    longest = max(longest, time.perf_counter() - began)

            await asyncio.to_thread(b.pause)
            ticking = asyncio.create_task(tick())
            took = []
            for _ in range(5):
                began = time.perf_counter()
                assert (await probe.observe(0.1)).hung
                took.append(time.perf_counter() - began)
            ticking.cancel()
            after = _descriptors()
            await asyncio.to_thread(b.resume)
            assert (await probe.observe(2)).error is None
            probe.drop()
            return took, longest, before, after

        took, longest, before, after = asyncio.run(probe_hanging())

        assert max(took) < 0.1 + 0.1
        assert longest < 0.1
        assert after <= before

    def test_ask_is_bounded_on_a_hanging_node(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """First within the caller's time; once the hang is known, nobody waits for that node."""
        b = one.nodes[1]
        monitor = make_monitor(map(node_of, one.nodes), interval=2.0, deadline=1.0)
        monitor.ready(5)
        b.pause()

        began = time.monotonic()
        monitor.ask("s0", 0.2)
        first = time.monotonic() - began
        until(lambda: monitor.health.of(b.name).state is State.DOWN)
        began = time.monotonic()
        health = monitor.ask("s0", 5)
        later = time.monotonic() - began

        assert first < 0.35
        assert later < 0.5
        assert health.of(one.nodes[2].name).seen_at >= began

    def test_concurrent_askers_share_one_round(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A thundering herd costs a server a few probes, not one for each."""
        monitor = make_monitor(map(node_of, one.nodes), interval=60.0)
        monitor.ready(5)
        a = one.nodes[0]
        seen_before = monitor.health.of(a.name).successes
        threads = [threading.Thread(target=monitor.ask, args=("s0", 5)) for _ in range(50)]
        one.nodes[1].pause()  # so that the round lasts until all have come
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert monitor.health.of(a.name).successes - seen_before <= 3

    def test_reported_failure_is_visible_at_once(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """The reporter itself never picks that node again; the server, alive, is soon back."""
        a = one.nodes[0]
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)

        monitor.report_failure(a.name, psycopg.OperationalError("terminating\nDETAIL: more"))
        reported = monitor.health

        assert reported.of(a.name).state in (State.DOWN, State.RECOVERING)
        assert reported.of(a.name).last_error == "terminating"
        until(lambda: monitor.health.shard("s0").primary == a.name, 1)
        until(lambda: monitor.health.of(a.name).is_readable)

    def test_ended_monitor_connection_is_no_failure(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """An operator may terminate our backend: the server is not down for that."""
        a = one.nodes[0]
        seen: list[State] = []
        monitor = make_monitor(
            map(node_of, one.nodes), on_health=lambda _, new: seen.append(new.of(a.name).state)
        )
        monitor.ready(5)
        until(lambda: seen[-3:] == [State.UP] * 3 or len(watching(a)) == 1)
        (before,) = watching(a)
        execute(a, f"SELECT pg_terminate_backend({before})")
        until(lambda: watching(a) not in (set(), {before}))

        assert set(seen) <= {State.UNKNOWN, State.UP}

    def test_wrong_password_stops_nobody_else(
        self, one: LocalTopology, make_monitor: MakeMonitor, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One node cannot be asked: it says why, without the password; the rest is watched."""
        caplog.set_level(logging.DEBUG)
        a, b, c = map(node_of, one.nodes)
        b = replace(b, password=Secret("hunter2"))
        monitor = make_monitor([a, b, c])
        health = monitor.ready(5)

        assert health.of(b.name).last_error.endswith(
            'FATAL:  password authentication failed for user "app"'
        )
        assert health.of(c.name).is_readable
        until(lambda: monitor.health.of(b.name).state is State.DOWN)
        assert "hunter2" not in caplog.text + repr(monitor.health)

    @pytest.mark.parametrize(
        "bad",
        [
            {"options": (("passfle", "hunter2"),)},
            {"options": (("sslmode", "hunter2"),), "password": Secret("hunter2")},
            {"options": (("sslpassword", "hunter2"), ("sslmode", "very"))},
            {"host": "hunter2.invalid", "password": Secret("hunter2")},
        ],
    )
    def test_bad_configuration_is_told_in_one_line(
        self, make_monitor: MakeMonitor, bad: dict[str, Any]
    ) -> None:
        """libpq's own complaint, its first line, with every secret masked."""
        node = Node("x", **{"host": "127.0.0.1", "port": 1, **bad})
        health = make_monitor([node], deadline=5.0).ready(10)

        error = health.of("x").last_error
        assert error
        assert "\n" not in error
        assert "hunter2" not in error

    def test_node_of_another_cluster_is_refused(
        self, sqlroute_topology: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A wrong address is refused by its system identifier and takes no part."""
        a, b, _ = sqlroute_topology.shard("s0").nodes
        stranger = sqlroute_topology.shard("s1").nodes[0]
        health = make_monitor(map(node_of, (stranger, a, b))).ready(5)

        assert health.shard("s0").primary == a.name
        assert not health.of(stranger.name).is_readable
        assert "another cluster" in health.of(stranger.name).refused


class TestPromotion:
    def test_promotion_is_noticed_and_the_stale_primary_refused(
        self,
        sqlroute_topology_factory: TopologyFactory,
        make_monitor: MakeMonitor,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The new primary takes over while the old one still answers; two are reported."""
        caplog.set_level(logging.INFO, "sqlroute.monitor")
        servers = sqlroute_topology_factory(shards=1, replicas=1, label="monitor-promotion")
        old, new = servers.nodes
        changes: list[tuple[str | None, str | None]] = []

        def note(before: Health, after: Health) -> None:
            changes.append((before.shard("s0").primary, after.shard("s0").primary))

        monitor = make_monitor(map(node_of, servers.nodes), on_health=note)
        monitor.ready(5)
        execute(new, "SELECT pg_promote(true)")
        took = until(lambda: monitor.health.shard("s0").primary == new.name)
        health = monitor.ask("s0", 2)

        assert took < 1.2 * INTERVAL + 0.3
        assert health.of(new.name).timeline == 2
        assert health.shard("s0").highest_timeline == 2
        assert health.shard("s0").contenders == (new.name, old.name)
        assert "reached timeline 2" in health.of(old.name).refused
        assert not health.of(old.name).is_readable
        until(lambda: (old.name, new.name) in changes)
        until(lambda: "more than one primary" in caplog.text)

    def test_lost_primary_is_a_warning(
        self, one: LocalTopology, make_monitor: MakeMonitor, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A shard without a primary is degraded, and the log says so."""
        caplog.set_level(logging.INFO, "sqlroute.monitor")
        a = one.nodes[0]
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        a.kill()
        until(lambda: monitor.health.primary("s0") is None)

        until(lambda: f"shard s0 has lost its primary {a.name}" in caplog.text)
        levels = {r.levelname for r in caplog.records if "lost its primary" in r.message}
        assert levels == {"WARNING"}


class TestLife:
    def test_making_a_monitor_starts_nothing(self, one: LocalTopology) -> None:
        """The thread comes with the first need."""
        before = threading.active_count()
        monitor = Monitor(topology_of(*map(node_of, one.nodes)))

        assert threading.active_count() == before
        assert monitor.health.primary("s0") is None

    def test_start_from_many_threads_starts_one(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """Idempotent, whoever comes first."""
        before = _threads()
        monitor = make_monitor(map(node_of, one.nodes))
        threads = [threading.Thread(target=monitor.start) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(_threads() - before) == 1

    def test_close_leaves_no_thread_and_no_connection(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """Also when a server hangs; the last health stays readable, stragglers start nothing."""
        a, b, _ = one.nodes
        before = _threads()
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        assert len(watching(a)) == 1
        descriptors = _descriptors()
        b.pause()
        began = time.monotonic()
        monitor.close()
        took = time.monotonic() - began
        monitor.report_failure(a.name, "too late")
        monitor.ask("s0", 5)

        assert took < 0.5
        assert _threads() <= before
        assert _descriptors() < descriptors
        until(lambda: watching(a) == set())
        assert monitor.health.of(a.name).last_error == "too late"

    def test_closed_monitor_can_start_again(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """As an engine can after dispose()."""
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        monitor.close()
        closed_at = time.monotonic()

        assert monitor.ready(5).of(one.nodes[0].name).seen_at > closed_at

    def test_ready_waits_no_longer_than_told(self, make_monitor: MakeMonitor) -> None:
        """A server that never answers costs the caller the timeout, not more."""
        with_nobody_reading = Node("x", host="10.255.255.1")
        monitor = make_monitor([with_nobody_reading], deadline=5.0)

        began = time.monotonic()
        monitor.ready(0.2)

        assert time.monotonic() - began < 0.4

    def test_topology_may_change_while_running(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """New nodes are watched, removed ones are let go, the rest is not asked to start over."""
        a, b, c = map(node_of, one.nodes)
        monitor = make_monitor([a, b])
        monitor.ready(5)
        until(lambda: len(watching(one.nodes[1])) == 1)
        before = watching(one.nodes[0])
        monitor.set_topology(topology_of(a, c))
        health = monitor.ready(5)

        assert health.of(c.name).role is Role.REPLICA
        assert watching(one.nodes[0]) == before
        until(lambda: watching(one.nodes[1]) == set())
        with pytest.raises(UnknownName):
            monitor.health.of(b.name)

    def test_faulty_callback_stops_nothing(
        self, one: LocalTopology, make_monitor: MakeMonitor, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error of a listener is logged; watching goes on."""

        def fail(old: Health, new: Health) -> None:
            raise RuntimeError("no")

        monitor = make_monitor(map(node_of, one.nodes), on_health=fail)
        health = monitor.ready(5)

        assert all(node.state is State.UP for node in health.nodes.values())
        until(lambda: "on_health failed" in caplog.text)

    def test_forked_child_watches_with_its_own_connections(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """The child starts a monitor of its own and never touches the parent's sockets."""
        a = one.nodes[0]
        others = _sockets()
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        before = watching(a)
        inherited = _sockets() - others
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _run_child(writer, lambda: _seen_in_child(monitor, inherited))
        os.close(writer)
        answered, _, _ = select.select([reader], [], [], 20)
        told = os.read(reader, 1000).decode() if answered else "nothing"
        os.close(reader)
        os.waitpid(child, 0)

        assert told == "fresh"
        for _ in range(3):
            seen_at = time.monotonic()
            assert monitor.ask("s0", 5).of(a.name).seen_at >= seen_at
        assert before <= watching(a)
        until(lambda: watching(a) == before)

    def test_unused_child_leaves_the_parent_alone(
        self, one: LocalTopology, make_monitor: MakeMonitor
    ) -> None:
        """A child that only exits, with all its destructors, ends no connection of the parent."""
        a = one.nodes[0]
        monitor = make_monitor(map(node_of, one.nodes))
        monitor.ready(5)
        before = watching(a)
        for _ in range(5):
            child = os.fork()
            if child == 0:
                _run_child(None, lambda: "")
            os.waitpid(child, 0)

        assert _errors_of(monitor.ask("s0", 5).nodes.values()) == []
        assert watching(a) == before


def _errors_of(nodes: Iterable[NodeHealth]) -> list[str]:
    return [node.last_error for node in nodes if node.last_error]


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _threads() -> set[threading.Thread]:
    """Threads of monitors; another fixture's router may have one, too."""
    return {thread for thread in threading.enumerate() if thread.name == "sqlroute monitor"}


def _sockets() -> set[str]:
    """Return the open sockets of this process, by inode."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def _seen_in_child(monitor: Monitor, inherited: set[str]) -> str:
    import gc

    forked_at = time.monotonic()
    still_open = _sockets() & inherited
    if len(still_open) > 1:  # one end of the loop's own pair may stay
        return f"inherited sockets are open: {still_open}"
    gc.collect()
    health = monitor.ready(5)
    stale = [node.node for node in health.nodes.values() if node.seen_at < forked_at]
    monitor.close()
    return f"stale: {stale}" if stale else "fresh"


def _run_child(writer: int | None, work: Callable[[], str]) -> None:
    """Run in a forked child and leave without pytest's own end."""
    try:
        said = work()
    except BaseException as exc:
        said = repr(exc)
    if writer is not None:
        os.write(writer, said.encode())
    os._exit(0)


class SomeUse:
    """A program that uses its shards, or does not."""

    def __init__(self, is_used: bool) -> None:
        self.is_now = is_used

    def is_used(self, shard: str) -> bool:
        return self.is_now

    def take_answered(self, node: str) -> tuple[int, float]:
        return 0, 0.0

    def name_of(self, shard: str) -> str:
        return APPLICATION_NAME


def test_a_shard_that_is_used_again_is_watched_again(
    servers: LocalTopology, make_monitor: MakeMonitor
) -> None:
    """Its nodes are asked 20 times less often while nobody uses it; one question ends that."""
    use = SomeUse(is_used=False)
    nodes = [node_of(node) for node in servers.nodes]
    monitor = make_monitor(nodes, usage=use)
    monitor.ready(5)
    seen = {monitor.health.of(node.name).seen_at for node in nodes}
    time.sleep(5 * INTERVAL)
    assert {monitor.health.of(node.name).seen_at for node in nodes} == seen
    use.is_now = True
    monitor.ask("s0", 1.0)
    for _ in range(3):
        before = monitor.health.of(nodes[0].name).seen_at
        assert until(lambda at=before: monitor.health.of(nodes[0].name).seen_at > at) < 5 * INTERVAL


def test_what_the_garbage_collector_reports_stops_nobody(make_monitor: MakeMonitor) -> None:
    """It runs within any function, and may end what holds a connection that is lost."""
    nodes = [Node(name, host="127.0.0.1", port=1) for name in ("s0-a", "s0-b")]
    monitor = make_monitor(nodes)

    class Held:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            monitor.report_failure("s0-b", "server closed the connection")

    def report() -> None:
        for objects in range(1, 400):  # until it runs: so it runs at any moment of a report
            gc.collect()
            Held()
            gc.set_threshold(objects)
            monitor.report_failure("s0-a", "server closed the connection")

    before = gc.get_threshold()
    gc.freeze()  # what was there before: it is not to be looked through each time
    try:
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(20)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()

    assert not thread.is_alive()
    assert monitor.health.of("s0-a").state is State.DOWN
    assert monitor.health.of("s0-b").state is State.DOWN


def test_a_new_router_watches_from_the_start(servers: LocalTopology) -> None:
    """All its shards count as used when it begins."""
    from sqlroute import Router

    with Router.from_config(servers.config_path) as router:
        node = servers.nodes[0].name
        router.health()
        for _ in range(3):
            before = router.monitor.health.of(node).seen_at
            assert until(lambda at=before: router.monitor.health.of(node).seen_at > at) < 3
