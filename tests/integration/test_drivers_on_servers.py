"""Promises of the node drivers, on real servers: this machine's, over ssh, in containers.

A driver of each kind does the same to a pair of servers. sshd and docker are used where they are;
docker needs an image with PostgreSQL 15 or later, named by SQLROUTE_TEST_IMAGE.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import psycopg
import pytest

from sqlroute import config
from sqlroute.errors import DriverError
from sqlroute.local.processes import postmaster, server_processes
from sqlroute.local.topology import LocalTopology
from sqlroute.operations import DriverSpec, Operations, Operator
from sqlroute.ops.drivers import Ability, Driver, driver_of
from sqlroute.ops.drivers.base import WHOLE
from sqlroute.testing import TopologyFactory, free_ports
from sqlroute.topology import Node, Secret

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

IMAGE = os.environ.get("SQLROUTE_TEST_IMAGE", "")
SSHD = Path("/usr/sbin/sshd")
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
FENCE = "sqlroute_fence_epoch_7"


@dataclass(frozen=True)
class Pair:
    """A primary and the node that follows it, each with its driver."""

    nodes: tuple[Node, Node]
    drivers: tuple[Driver, Driver]

    def swapped(self) -> Pair:
        return Pair((self.nodes[1], self.nodes[0]), (self.drivers[1], self.drivers[0]))

    def follow(self, which: int = 1) -> str:
        """Return the connection of a standby to the other node."""
        node = self.nodes[1 - which]
        password = node.password.reveal() if node.password else ""
        host, port, user = node.host, node.port, node.user
        return f"host={host} port={port} user={user} password={password}"


def ask(node: Node, query: str, **options: Any) -> Any:
    with psycopg.connect(**{**node.conninfo(), **options}, autocommit=True) as connection:
        found = connection.execute(query.encode())
        row = found.fetchone() if found.description else None
        return row[0] if row else None


def eventually(condition: Callable[[], object], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)


def is_refused(node: Node) -> bool:
    try:
        ask(node, "SELECT 1", connect_timeout=3)
    except psycopg.OperationalError as exc:
        return "refused" in str(exc)
    return False


def local_pair(topology: LocalTopology) -> Pair:
    settings = config.load(topology.config_path, environ={})
    nodes = tuple(settings.topology.nodes())[:2]
    first, second = (driver_of(node, "s0", settings.operations) for node in nodes)
    assert first is not None
    assert second is not None
    return Pair((nodes[0], nodes[1]), (first, second))


def settle(pair: Pair) -> Pair:
    """Bring both up as a primary and its standby, whatever a test has done; the primary first."""
    for driver in pair.drivers:
        driver.start(30)
    standby = [ask(node, "SELECT pg_is_in_recovery()") for node in pair.nodes]
    if standby == [True, False]:
        return settle(pair.swapped())
    if standby != [False, True] or not is_streaming(pair.nodes[1]):
        pair.drivers[1].stop(30)
        pair.drivers[1].clone(
            pair.nodes[0].conninfo(), slot=None, timeout=60, progress=no_count, replace=True
        )
        pair.drivers[1].make_standby(pair.follow(), None)
        pair.drivers[1].start(30)
    eventually(lambda: is_streaming(pair.nodes[1]))
    return pair


def is_streaming(node: Node) -> bool:
    return ask(node, "SELECT status FROM pg_stat_wal_receiver") == "streaming"


def no_count(done: int, whole: int) -> None:
    pass


def no_word(line: str) -> None:
    pass


# Where the servers are


@contextmanager
def sshd(user: str) -> Iterator[tuple[Path, int]]:
    """Run an sshd of our own, with keys of our own; gives its directory and port."""
    home = Path(tempfile.mkdtemp(prefix="sqlroute-sshd-"))
    home.chmod(0o755)
    for name in ("host", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True
        )
    (home / "authorized").write_text((home / "key.pub").read_text())
    (home / "bin").mkdir(mode=0o755)
    (home / "log").touch()
    port = free_ports(1)
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\n"
        f"AuthorizedKeysFile {home}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxSessions 50\n"
        f"SetEnv PATH={home}/bin:{os.environ['PATH']}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    command = [SSHD, "-D", "-E", home / "log", "-f", home / "config"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: "listening on" in (home / "log").read_text())
        yield home, port
    finally:
        server.terminate()
        server.wait(10)
        for kept in home.glob("kept-*"):
            end = ["ssh", "-o", f"ControlPath={kept}", "-O", "exit", "127.0.0.1"]
            subprocess.run(end, check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(home)


def ssh_spec(topology: LocalTopology, home: Path, port: int, **more: Any) -> DriverSpec:
    first = topology.nodes[0]
    root = os.geteuid() == 0
    return DriverSpec(
        "*",
        "ssh",
        data=f"{first.data.parent}/{{name}}",
        bin=str(first.pg_bin),
        log=f"{first.log.parent}/{{name}}.log",
        options="-p {port} -c cluster_name={name}",
        host="127.0.0.1",
        port=port,
        user="root" if root else "",
        sudo=first.account.name if root else "",
        ssh_options=(
            *("-i", f"{home}/key", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"),
            *("-o", f"ControlPath={home}/kept-%C"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
        ),
        **more,
    )


def other_drivers(pair: Pair, operations: Operations) -> Pair:
    first, second = (driver_of(node, "s0", operations) for node in pair.nodes)
    assert first is not None
    assert second is not None
    return replace(pair, drivers=(first, second))


@contextmanager
def containers(image: str) -> Iterator[Pair]:
    """Run two servers in containers, the second one following the first."""
    mark = uuid.uuid4().hex[:8]
    port = free_ports(2)
    names = (f"sqlroute-test-{mark}-a", f"sqlroute-test-{mark}-b")
    password = uuid.uuid4().hex
    find = "PATH=$PATH:$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)"
    init = (
        f"{find}; chown postgres /pg; echo {password} > /tmp/pw; exec su postgres -s /bin/sh -c "
        f'"PATH=$PATH initdb -D /pg/data -U app --pwfile=/tmp/pw -A scram-sha-256 '
        "-k -E UTF8 --locale=C.UTF-8 >/dev/null "
        f"&& echo wal_keep_size = 64MB >> /pg/data/postgresql.conf "
        f'&& echo host replication app 127.0.0.1/32 scram-sha-256 >> /pg/data/pg_hba.conf"'
    )
    docker("run", "--rm", "-v", f"{names[0]}:/pg", "--entrypoint", "sh", image, "-c", init)
    chown = ("--entrypoint", "chown", image, "postgres", "/pg")
    docker("run", "--rm", "-v", f"{names[1]}:/pg", *chown)
    for number, name in enumerate(names):
        options = f"-p {port + number} -k /tmp -c cluster_name={name}"
        run = f"{find}; exec postgres -D /pg/data {options}"
        docker(
            *("create", "--name", name, "--network", "host", "-v", f"{name}:/pg", "-u", "postgres"),
            *("--restart", "unless-stopped", "--stop-signal", "INT" if number else "TERM"),
            *("--entrypoint", "sh", image, "-c", run),
        )
    binaries = docker(
        *("run", "--rm", "--entrypoint", "sh", image, "-c", "ls -d /usr/lib/postgresql/*/bin")
    ).split()[-1]
    nodes = tuple(
        Node(name, "127.0.0.1", port + number, "postgres", "app", Secret(password))
        for number, name in enumerate(names)
    )
    spec = DriverSpec("*", "docker", container="{name}", data="/pg/data", bin=binaries)
    operations = Operations(drivers=(spec,))
    first, second = (driver_of(node, "s0", operations) for node in nodes)
    assert first is not None
    assert second is not None
    pair = Pair((nodes[0], nodes[1]), (first, second))
    try:
        first.start(60)
        second.clone(nodes[0].conninfo(), slot=None, timeout=60, progress=no_count)
        second.make_standby(pair.follow(), None)
        second.start(60)
        yield pair
    finally:
        docker("rm", "-f", "-v", *names)
        docker("volume", "rm", *names)


def docker(*words: str) -> str:
    done = subprocess.run(
        ["docker", *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


KINDS = [
    "local",
    pytest.param(
        "local-15",
        marks=pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 from Debian"),
    ),
    pytest.param(
        "ssh",
        marks=pytest.mark.skipif(
            not SSHD.exists() or (os.geteuid() == 0 and not shutil.which("sudo")),
            reason="no sshd, or no sudo",
        ),
    ),
    pytest.param("docker", marks=pytest.mark.skipif(not IMAGE, reason="no SQLROUTE_TEST_IMAGE")),
]


@pytest.fixture(scope="module", params=KINDS)
def base(
    request: pytest.FixtureRequest, sqlroute_topology_factory: TopologyFactory
) -> Iterator[Pair]:
    if request.param == "docker":
        with containers(IMAGE) as pair:
            yield pair
        return
    pg_bin = DEBIAN_15 if request.param == "local-15" else None
    topology = sqlroute_topology_factory(
        shards=1, replicas=1, pg_bin=pg_bin, label=f"drivers-{request.param}"
    )
    if request.param == "ssh":
        with sshd("root") as (home, port):
            specs = (ssh_spec(topology, home, port),)
            yield other_drivers(local_pair(topology), Operations(drivers=specs))
        return
    yield local_pair(topology)


@pytest.fixture
def pair(base: Pair) -> Pair:
    """Give a primary and its standby, both running."""
    return settle(base)


@pytest.fixture(scope="module")
def local(sqlroute_topology_factory: TopologyFactory) -> LocalTopology:
    return sqlroute_topology_factory(shards=1, replicas=1, label="drivers")


# What every kind does


def test_a_stop_ends_sessions_and_gives_the_standby_everything(pair: Pair) -> None:
    """The shutdown checkpoint that ``control`` says is in the standby's log."""
    primary, standby = pair.nodes
    ask(primary, "CREATE TABLE IF NOT EXISTS written (a int)")
    with closing(psycopg.connect(**primary.conninfo(), autocommit=True)) as client:
        client.execute("INSERT INTO written SELECT generate_series(1, 1000)")

        pair.drivers[0].stop(30)

        assert not pair.drivers[0].is_running()
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")
    control = pair.drivers[0].control()
    assert control.was_clean_shutdown
    assert control.state == "shut down"
    assert is_refused(primary)
    receive = f"SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn > {control.checkpoint}"
    eventually(lambda: ask(standby, receive))
    pair.drivers[0].stop(30)  # of what is stopped already: nothing


def test_what_was_killed_is_gone_and_starts_again(pair: Pair) -> None:
    primary = pair.nodes[0]
    ask(primary, "CREATE TABLE IF NOT EXISTS written (a int)")

    pair.drivers[0].kill(30)

    assert not pair.drivers[0].is_running()
    assert is_refused(primary)
    assert not pair.drivers[0].control().was_clean_shutdown
    pair.drivers[0].start(30)
    assert pair.drivers[0].is_running()
    assert ask(primary, "SELECT count(*) FROM written") is not None
    assert pair.drivers[0].control().state == "in production"


def test_control_tells_of_the_cluster(pair: Pair) -> None:
    primary = pair.nodes[0]

    controls = [driver.control() for driver in pair.drivers]

    identifier = ask(primary, "SELECT system_identifier FROM pg_control_system()")
    assert [control.system_identifier for control in controls] == [identifier] * 2
    assert controls[0].timeline == ask(primary, "SELECT timeline_id FROM pg_control_checkpoint()")
    assert controls[1].state == "in archive recovery"
    assert controls[0].can_rewind
    assert controls[0].min_recovery == 0
    assert controls[1].min_recovery > 0


@pytest.mark.parametrize("ended", ["stopped", "killed"])
def test_an_old_primary_comes_back_by_a_rewind(pair: Pair, ended: str) -> None:
    """It keeps its own settings, drops what it wrote alone, and no fence stays on it."""
    old, new = pair.nodes
    ask(new, "SELECT pg_promote()")
    ask(new, "CHECKPOINT")  # on 15 pg_rewind sees the old timeline until then
    ask(new, "DROP TABLE IF EXISTS lost")
    ask(new, "ALTER SYSTEM SET work_mem = '9MB'")
    ask(old, "DROP TABLE IF EXISTS lost")
    ask(old, "CREATE TABLE lost AS SELECT generate_series(1, 1000) AS a")
    ask(old, "ALTER SYSTEM SET work_mem = '7MB'")
    ask(old, f"ALTER SYSTEM SET session_preload_libraries = '{FENCE}', 'auto_explain'")
    (pair.drivers[0].stop if ended == "stopped" else pair.drivers[0].kill)(30)
    words: list[str] = []

    done = pair.drivers[0].rewind(new.conninfo(), 60, words.append)
    pair.drivers[0].make_standby(pair.follow(0), None)
    pair.drivers[0].start(30)

    assert done.text == "rewound"
    assert done.copied_bytes
    assert any("diverged" in word for word in words)
    settings = pair.drivers[0].settings()
    assert settings["work_mem"] == "7MB"
    assert settings["session_preload_libraries"] == "auto_explain"
    eventually(lambda: is_streaming(old))
    assert ask(old, "SELECT to_regclass('lost') IS NULL")
    pair.drivers[0].stop(30)
    pair.drivers[0].make_standby(pair.follow(0), None)
    again = pair.drivers[0].rewind(new.conninfo(), 60, no_word)
    assert (again.text, again.copied_bytes) == ("no rewind required", None)


def test_a_crashed_standby_is_rewound_too(pair: Pair) -> None:
    """As a standby, without its primary: its recovery writes nothing into the log."""
    standby = pair.drivers[1]
    ask(pair.nodes[0], "CREATE TABLE IF NOT EXISTS written (a int)")
    standby.kill(30)

    done = standby.rewind(pair.nodes[0].conninfo(), 60, no_word)

    assert done.text == "no rewind required"
    assert standby.control().state == "shut down in recovery"
    standby.make_standby(pair.follow(), None)
    standby.start(30)
    eventually(lambda: is_streaming(pair.nodes[1]))


def test_a_clone_replaces_a_directory_and_drops_the_fence_that_came_along(pair: Pair) -> None:
    """Its settings stay its own; the slot that is named keeps the log meanwhile."""
    primary, replica = pair.nodes
    ask(primary, "SELECT pg_create_physical_replication_slot('keeper', true)")
    ask(primary, f"ALTER SYSTEM SET session_preload_libraries = '{FENCE}'")
    ask(replica, "ALTER SYSTEM SET work_mem = '6MB'")
    ask(replica, "ALTER SYSTEM SET default_transaction_read_only = on")
    pair.drivers[1].stop(30)
    counted: list[tuple[int, int]] = []

    try:
        pair.drivers[1].clone(
            primary.conninfo(),
            slot="keeper",
            timeout=60,
            progress=lambda done, whole: counted.append((done, whole)),
            replace=True,
        )
        settings = pair.drivers[1].settings()
        pair.drivers[1].make_standby(pair.follow(), "keeper")
        pair.drivers[1].start(30)

        assert settings["work_mem"] == "6MB"
        assert FENCE not in settings.get("session_preload_libraries", "")
        assert "default_transaction_read_only" not in settings
        assert counted[-1][0] == counted[-1][1] > 1_000_000
        eventually(lambda: ask(primary, "SELECT active FROM pg_replication_slots"))
    finally:
        ask(primary, "ALTER SYSTEM RESET session_preload_libraries")
        pair.drivers[1].stop(30)
        pair.drivers[1].make_standby(pair.follow(), None)
        ask(primary, "SELECT pg_drop_replication_slot('keeper')")


def test_a_clone_that_fails_leaves_all_as_it_was(pair: Pair) -> None:
    primary, replica = pair.nodes
    wrong = replace(primary, password=Secret("hunter2"))
    with pytest.raises(DriverError, match=f"{replica.name} .* runs and cannot be cloned over"):
        pair.drivers[1].clone(primary.conninfo(), slot=None, timeout=60, progress=no_count)
    pair.drivers[1].stop(30)

    with pytest.raises(DriverError, match="is not empty; ask to replace it"):
        pair.drivers[1].clone(primary.conninfo(), slot=None, timeout=60, progress=no_count)
    with pytest.raises(DriverError, match="password authentication failed") as caught:
        pair.drivers[1].clone(
            wrong.conninfo(), slot=None, timeout=60, progress=no_count, replace=True
        )
    with pytest.raises(DriverError, match='slot "nowhere" does not exist'):
        pair.drivers[1].clone(
            primary.conninfo(), slot="nowhere", timeout=60, progress=no_count, replace=True
        )

    assert "hunter2" not in repr(caught.value)
    assert caught.value.exit_code == 1
    pair.drivers[1].start(30)
    eventually(lambda: is_streaming(replica))


def test_what_does_not_start_says_why(pair: Pair) -> None:
    """The last words of its log, or of its container's; a target of recovery does not stay."""
    driver = pair.drivers[1]
    ask(pair.nodes[1], "ALTER SYSTEM SET recovery_target_timeline = '99'")
    driver.stop(30)

    with pytest.raises(DriverError, match="recovery target timeline 99 does not exist") as caught:
        driver.start(10)

    assert "\n" not in str(caught.value)
    driver.make_standby(pair.follow(), None)
    driver.start(30)
    eventually(lambda: is_streaming(pair.nodes[1]))


# Local servers


def test_a_new_node_of_a_fenced_primary_is_not_fenced(local: LocalTopology) -> None:
    """The primary's settings come along, its fence does not; started, it is a standby."""
    pair = settle(local_pair(local))
    primary = pair.nodes[0]
    settings = config.load(local.config_path, environ={})
    new = replace(primary, name="s0-z", port=free_ports(1))
    driver = driver_of(new, "s0", settings.operations)
    assert driver is not None
    ask(primary, "ALTER SYSTEM SET work_mem = '8MB'")
    ask(primary, f"ALTER SYSTEM SET session_preload_libraries = '{FENCE}'")
    ask(primary, "SELECT pg_reload_conf()")

    try:
        driver.clone(primary.conninfo(), slot=None, timeout=60, progress=no_count)
    finally:
        unfenced = {"options": "-c session_preload_libraries="}
        ask(primary, "ALTER SYSTEM RESET session_preload_libraries", **unfenced)
        ask(primary, "SELECT pg_reload_conf()", **unfenced)

    assert driver.settings()["work_mem"] == "8MB"
    assert "session_preload_libraries" not in driver.settings()
    driver.start(20)
    assert ask(new, "SELECT pg_is_in_recovery()")
    driver.stop(20)


def test_a_stop_under_load_takes_less_than_the_poll_of_pg_ctl(local: LocalTopology) -> None:
    """pg_ctl looks every 100 ms; 8 clients that write are ended, and none lost its last commit."""
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip("the machine is busy with other work: a time says nothing")
    took = []
    for _ in range(3):
        pair = settle(local_pair(local))
        ask(pair.nodes[0], "CREATE TABLE IF NOT EXISTS load (client int, n int)")
        ask(pair.nodes[0], "TRUNCATE load")
        acknowledged, ended = [0] * 8, Event()

        def write(client: int, node: Node, counts: list[int], end: Event) -> None:
            with closing(psycopg.connect(**node.conninfo(), autocommit=True)) as connection:
                try:
                    while not end.is_set():
                        n = counts[client] + 1
                        connection.execute("INSERT INTO load VALUES (%s, %s)", (client, n))
                        counts[client] = n
                        time.sleep(0.001)
                except psycopg.OperationalError:
                    return

        with ThreadPoolExecutor(8) as pool:
            for client in range(8):
                pool.submit(write, client, pair.nodes[0], acknowledged, ended)
            try:
                eventually(lambda counts=acknowledged: min(counts) > 5)
                ask(pair.nodes[0], "CHECKPOINT")
                began = time.monotonic()
                pair.drivers[0].stop(30)
                took.append(time.monotonic() - began)
            finally:
                ended.set()

        written, standby = sum(acknowledged), pair.nodes[1]
        eventually(lambda n=standby, w=written: ask(n, "SELECT count(*) FROM load") >= w)
    print("stop under 8 writers: " + ", ".join(f"{s * 1000:.0f} ms" for s in took))
    assert min(took) < 0.1


def test_a_hung_server_is_killed_but_not_stopped(local: LocalTopology) -> None:
    """A stop would have to wake it up, and it would go on writing."""
    pair = settle(local_pair(local))
    server = local.node(pair.nodes[0].name)
    server.pause()

    with pytest.raises(DriverError, match=r"hangs: process .*; kill the server"):
        pair.drivers[0].stop(5)

    assert server.is_paused
    began = time.monotonic()
    pair.drivers[0].kill(5)
    assert time.monotonic() - began < 2
    assert server_processes(server.data) == ()
    assert is_refused(pair.nodes[0])


def test_orphans_of_a_killed_postmaster_are_cleared_at_the_start(local: LocalTopology) -> None:
    pair = settle(local_pair(local))
    server = local.node(pair.nodes[0].name)
    lead = postmaster(server.data)
    assert lead is not None
    for process in server_processes(server.data)[1:]:
        os.kill(process.pid, signal.SIGSTOP)  # else they end with it
    os.kill(lead, signal.SIGKILL)
    eventually(lambda: postmaster(server.data) is None)
    assert pair.drivers[0].is_running()

    pair.drivers[0].start(30)

    assert ask(pair.nodes[0], "SELECT 1") == 1
    assert not any(process.is_stopped for process in server_processes(server.data))


def test_a_server_without_configured_options_starts_as_it_did_before(local: LocalTopology) -> None:
    """``postmaster.opts`` has them, and the directory of its programs."""
    pair = settle(local_pair(local))
    server = local.node(pair.nodes[0].name)
    spec = DriverSpec("*", "local", data=str(server.data), log=str(server.log))
    driver = driver_of(pair.nodes[0], "s0", Operations(drivers=(spec,)))
    assert driver is not None

    driver.stop(30)
    driver.start(30)

    assert ask(pair.nodes[0], "SHOW cluster_name") == server.name


def test_a_rewind_that_is_interrupted_does_not_lose_the_settings(local: LocalTopology) -> None:
    """They were put aside before, and those that were put aside are given back later."""
    pair = settle(local_pair(local))
    old, new = pair.nodes
    data = local.node(old.name).data
    ask(old, "ALTER SYSTEM SET work_mem = '3MB'")
    pair.drivers[0].stop(30)
    ask(new, "SELECT pg_promote()")
    ask(new, "CHECKPOINT")
    kept = data.with_name(f"{data.name}.settings")
    shutil.copytree(data, kept, ignore=lambda _, names: [n for n in names if "auto" not in n])
    for path in (kept, *kept.iterdir()):
        shutil.chown(path, local.nodes[0].account.uid, local.nodes[0].account.gid)
    (data / "postgresql.auto.conf").write_text("work_mem = '99MB'\n")

    pair.drivers[0].rewind(new.conninfo(), 60, no_word)

    assert pair.drivers[0].settings()["work_mem"] == "3MB"
    assert not kept.exists()


# A server that runs programs for a role


def program_driver(node: Node, operator: Operator = Operator()) -> Driver:  # noqa: B008
    found = driver_of(node, "s0", Operations(operator, (DriverSpec("*", "program"),)))
    assert found is not None
    assert found.abilities == {Ability.STOP, Ability.KILL}
    return found


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_a_server_ends_itself_by_a_program(local: LocalTopology, verb: str) -> None:
    """Also one that is fenced, where the operator is a superuser."""
    pair = settle(local_pair(local))
    node = pair.nodes[0]
    driver = program_driver(node)
    ask(node, f"ALTER SYSTEM SET session_preload_libraries = '{FENCE}'")
    ask(node, "SELECT pg_reload_conf()")

    getattr(driver, verb)(10)

    assert is_refused(node)
    assert not driver.is_running()
    assert pair.drivers[0].control().was_clean_shutdown is (verb == "stop")
    getattr(driver, verb)(10)  # of what is down already: nothing
    assert pair.drivers[0].remove_fence() == ("session_preload_libraries",)


def test_a_role_without_the_right_is_told_which_one(local: LocalTopology) -> None:
    pair = settle(local_pair(local))
    ask(pair.nodes[0], "DROP ROLE IF EXISTS nobody_special")
    ask(pair.nodes[0], "CREATE ROLE nobody_special LOGIN PASSWORD 'hunter2'")
    operator = Operator("nobody_special", Secret("hunter2"))

    with pytest.raises(DriverError, match="grant pg_execute_server_program") as caught:
        program_driver(pair.nodes[0], operator).stop(5)

    assert "hunter2" not in str(caught.value)
    assert ask(pair.nodes[0], "SELECT 1") == 1


# Over ssh


@pytest.fixture
def far(local: LocalTopology) -> Iterator[tuple[Pair, Path, DriverSpec]]:
    if not SSHD.exists() or (os.geteuid() == 0 and not shutil.which("sudo")):
        pytest.skip("no sshd, or no sudo")
    with sshd("root") as (home, port):
        spec = ssh_spec(local, home, port)
        yield settle(local_pair(local)), home, spec


def test_systemd_stops_and_starts_where_a_unit_is_named(
    local: LocalTopology, far: tuple[Pair, Path, DriverSpec]
) -> None:
    """With a systemctl of our own on the machine's path, since no systemd runs in a container."""
    pair, home, spec = far
    node = pair.nodes[0]
    server = local.node(node.name)
    calls = home / "calls"
    calls.touch(mode=0o666)
    ctl = f"sudo -n -u {server.account.name} {server.pg_bin}/pg_ctl -D {server.data} -s -w"
    fake = home / "bin" / "systemctl"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$1 $2" in\n'
        f"  stop\\ --no-block) ;;\n  stop*) {ctl} -m fast stop 2>/dev/null; true ;;\n"
        f'  start*) {ctl} -l {server.log} -o "-p {server.port}" start ;;\nesac\n'
    )
    fake.chmod(0o755)
    driver = driver_of(node, "s0", Operations(drivers=(replace(spec, unit="pg@{name}"),)))
    assert driver is not None

    driver.stop(20)
    stopped = driver.control()
    driver.start(20)
    driver.kill(20)

    assert stopped.was_clean_shutdown
    assert not driver.is_running()
    unit = f"pg@{node.name}"
    assert calls.read_text().split("\n")[:-1] == [
        f"stop {unit}",
        f"start {unit}",
        f"stop --no-block {unit}",
        f"stop {unit}",
    ]


def test_a_command_over_the_kept_connection_is_fast(far: tuple[Pair, Path, DriverSpec]) -> None:
    pair, _, spec = far
    driver = driver_of(pair.nodes[0], "s0", Operations(drivers=(spec,)))
    assert driver is not None
    driver.is_running()

    began = time.monotonic()
    for _ in range(5):
        assert driver.is_running()
    took = (time.monotonic() - began) / 5

    print(f"a command over ssh: {took * 1000:.0f} ms")
    assert took < 0.5


def test_a_machine_that_is_not_there_is_an_error(far: tuple[Pair, Path, DriverSpec]) -> None:
    pair, _, spec = far
    closed = replace(spec, port=free_ports(1))
    driver = driver_of(pair.nodes[0], "s0", Operations(drivers=(closed,)))
    assert driver is not None

    with pytest.raises(DriverError, match=r"cannot be reached by ssh: .*[Cc]onnection refused"):
        driver.stop(5)


def test_passwords_are_in_no_argument_of_another_machine(
    far: tuple[Pair, Path, DriverSpec],
) -> None:
    """Neither of ours nor of its programs: those of pg_basebackup are looked at while it runs."""
    pair, _, spec = far
    driver = driver_of(pair.nodes[1], "s0", Operations(drivers=(spec,)))
    assert driver is not None
    driver.stop(20)
    password = pair.nodes[0].password
    assert password is not None
    seen: set[str] = set()
    done = Event()

    def look() -> None:
        while not done.wait(0.002):
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(entry.read_text(errors="replace"))
                except OSError:
                    continue

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            driver.clone(
                pair.nodes[0].conninfo(), slot=None, timeout=60, progress=no_count, replace=True
            )
            driver.make_standby(pair.follow(), None)
        finally:
            done.set()
        looking.result()

    assert any(re.search(r"pg_basebackup\0-D", words) for words in seen)
    assert not [words for words in seen if password.reveal() in words]


def test_every_kind_says_what_it_can(local: LocalTopology) -> None:
    node = local_pair(local).nodes[0]
    kinds = {"local": WHOLE, "ssh": WHOLE, "docker": WHOLE}

    found = {
        kind: driver_of(node, "s0", Operations(drivers=(DriverSpec("*", kind),))) for kind in kinds
    }

    assert {kind: driver and driver.abilities for kind, driver in found.items()} == kinds
