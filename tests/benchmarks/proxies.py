"""The same read through sqlroute and through the proxies that an application could stand behind.

The proxies are Debian's. Each runs in the foreground, as the user that runs the servers, from a
configuration of its own, and is stopped by its process at the end. The application behind one is
plain SQLAlchemy with its own pool, as it would be there.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import psycopg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from sqlroute.local.account import give
from sqlroute.local.node import HOST, LocalNode

from . import servers
from .pairs import Figure
from .servers import ROWS, Account, bench, url_of

PACKAGES = {"pgbouncer": "pgbouncer", "haproxy": "haproxy", "pgpool": "pgpool2"}
"""A proxy's program to its package."""

LIMITS = {"pgbouncer": 0.65, "haproxy": 0.65, "pgpool": 0.45}

ROUNDS, CALLS = 30, 60

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # where Debian has them
_POLICY = Path("/usr/sbin/policy-rc.d")
_PATIENCE = 20.0
_FIRST_PORT = 50  # after the servers' first

_Times = dict[str, list[list[float]]]
"""Way to the seconds of each call of each round."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that runs.

    Attributes:
        front: the node behind it, at the proxy's port.
        log: what the proxy writes.
    """

    name: str
    front: LocalNode
    log: Path
    process: subprocess.Popen[bytes]

    def sessions(self) -> sessionmaker[Session]:
        """Return plain Sessions that go through it."""
        # PgBouncer before 1.21 gives a transaction any server connection, also one that has not
        # what psycopg has prepared, so whoever stands behind it turns that off.
        arguments = {"prepare_threshold": None} if self.name == "pgbouncer" else {}
        return sessionmaker(create_engine(url_of(self.front), connect_args=arguments))


def versus_proxies(directory: Path) -> list[Figure]:
    """One object by its key per session: through sqlroute, and through each proxy."""
    missing = install()
    if missing:
        note = f"not measured: install {', '.join(PACKAGES[name] for name in missing)}"
        spread = (math.inf, math.inf)
        return [
            Figure(f"versus_proxies: {name}", math.inf, limit, spread, notes=(note,))
            for name, limit in LIMITS.items()
        ]
    with bench(directory, 1, 1) as b, contextlib.ExitStack() as stack:
        primary, replica = b.topology.nodes
        first = servers.PORT + _FIRST_PORT
        proxies = (
            stack.enter_context(pgbouncer(directory, replica, first)),
            stack.enter_context(haproxy(directory, replica, first + 1)),
            stack.enter_context(pgpool(directory, primary, replica, first + 2)),
        )
        makers = {"no proxy": b.plain(replica), **{p.name: p.sessions() for p in proxies}}
        ways = {name: _reader(maker) for name, maker in makers.items()}
        times = _in_turn({"sqlroute": _reader(b.router.sessionmaker()), **ways})
        for maker in makers.values():
            maker.kw["bind"].dispose()
    direct = _middle(times["no proxy"]) * 1e6
    note = f"a plain Session without a proxy: {direct:.0f} us"
    return [_figure(name, limit, times, note) for name, limit in LIMITS.items()]


def _reader(maker: Callable[[], Session]) -> Callable[[int], None]:
    def read(number: int) -> None:
        with maker() as session:
            assert session.get_one(Account, number % ROWS).name

    return read


def _in_turn(ways: Mapping[str, Callable[[int], None]]) -> _Times:
    """Time all ways in each round, every round beginning with another one."""
    for read in ways.values():
        for i in range(CALLS):
            read(i)
    names = list(ways)
    found: _Times = {name: [] for name in names}
    gc.collect()
    for number in range(ROUNDS):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            found[name].append([_timed(ways[name], number * CALLS + i) for i in range(CALLS)])
    return found


def _timed(read: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    read(number)
    return time.perf_counter() - start


def _middle(rounds: list[list[float]]) -> float:
    return median(seconds for times in rounds for seconds in times)


def _figure(name: str, limit: float, times: _Times, note: str) -> Figure:
    pairs = zip(times["sqlroute"], times[name], strict=True)
    low, _, high = quantiles([median(own) / median(other) for own, other in pairs], n=4)
    own, other = _middle(times["sqlroute"]), _middle(times[name])
    return Figure(
        f"versus_proxies: {name}",
        own / other,
        limit,
        (low, high),
        routed_us=own * 1e6,
        plain_us=other * 1e6,
        notes=(note,),
    )


# the proxies


def install() -> list[str]:
    """Install the proxies that are missing, if this is root on Debian; return those still missing.

    Nothing of them is started or enabled: they run here, and only while they are needed.
    """
    missing = _missing()
    if not missing or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return missing
    packages = [PACKAGES[name] for name in missing]
    with _no_service():
        _apt("apt-get", "update", "-q")
        _apt("apt-get", "install", "-qy", "--no-install-recommends", *packages)
        for package in packages:
            _apt("deb-systemd-helper", "disable", f"{package}.service", package=package)
    return _missing()


def _apt(*command: str, package: str = "") -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if package:  # Debian's helper refuses to work for anything but a package's own script
        environment["DPKG_MAINTSCRIPT_PACKAGE"] = package
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(command)}: {done.stderr.strip()}")


def _missing() -> list[str]:
    return [name for name in PACKAGES if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def _no_service() -> Iterator[None]:
    """Forbid Debian's packages to start what they install, unless there is such a rule already."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()


@contextlib.contextmanager
def pgbouncer(directory: Path, node: LocalNode, port: int) -> Iterator[Proxy]:
    """Run PgBouncer in transaction mode before a node."""
    place = _place(directory, f"pgbouncer-{port}", node)
    users = _file(place, "users.txt", f'"{node.user}" "{node.password.reveal()}"', node)
    config = f"""
        [databases]
        {node.database} = host={HOST} port={node.port} dbname={node.database}
        [pgbouncer]
        listen_addr = {HOST}
        listen_port = {port}
        unix_socket_dir =
        auth_type = scram-sha-256
        auth_file = {users}
        pool_mode = transaction
        max_client_conn = 500
        default_pool_size = 20
        server_login_retry = 2
    """
    command = ("pgbouncer", _file(place, "pgbouncer.ini", config, node))
    with _running("pgbouncer", place, command, node, port) as proxy:
        yield proxy


@contextlib.contextmanager
def haproxy(directory: Path, node: LocalNode, port: int) -> Iterator[Proxy]:
    """Run HAProxy before a node; it looks at no byte of what it carries."""
    place = _place(directory, f"haproxy-{port}", node)
    config = f"""
        defaults
          mode tcp
          timeout connect 5s
          timeout client 10m
          timeout server 10m
        listen replicas
          bind {HOST}:{port}
          server {node.name} {HOST}:{node.port} check
    """
    command = ("haproxy", "-db", "-f", _file(place, "haproxy.cfg", config, node))
    with _running("haproxy", place, command, node, port) as proxy:
        yield proxy


@contextlib.contextmanager
def pgpool(directory: Path, primary: LocalNode, replica: LocalNode, port: int) -> Iterator[Proxy]:
    """Run Pgpool-II before a primary and its replica, which takes all reads, by statement."""
    place = _place(directory, f"pgpool-{port}", primary)
    secret = primary.password.reveal()
    _file(place, "pool_passwd", f"{primary.user}:TEXT{secret}", primary)
    rules = _file(place, "pool_hba.conf", "host all all 127.0.0.1/32 scram-sha-256", primary)
    admins = _file(place, "pcp.conf", "", primary)
    key = _file(place, "key", secret, primary)
    config = f"""
        backend_clustering_mode = 'streaming_replication'
        listen_addresses = '{HOST}'
        port = {port}
        pcp_listen_addresses = ''
        pcp_port = {port + 1}
        socket_dir = '{place}'
        pcp_socket_dir = '{place}'
        pid_file_name = '{place}/pgpool.pid'
        logdir = '{place}'
        pool_passwd = '{place}/pool_passwd'
        enable_pool_hba = on
        backend_hostname0 = '{HOST}'
        backend_port0 = {primary.port}
        backend_weight0 = 0
        backend_flag0 = 'ALWAYS_PRIMARY|DISALLOW_TO_FAILOVER'
        backend_hostname1 = '{HOST}'
        backend_port1 = {replica.port}
        backend_weight1 = 1
        backend_flag1 = 'DISALLOW_TO_FAILOVER'
        load_balance_mode = on
        statement_level_load_balance = on
        num_init_children = 16
        max_pool = 2
        sr_check_user = '{primary.user}'
        sr_check_password = '{secret}'
        sr_check_database = '{primary.database}'
    """
    main = _file(place, "pgpool.conf", config, primary)
    command = ("pgpool", "-n", "-f", main, "-a", rules, "-F", admins, "-k", key)
    with _running("pgpool", place, command, replica, port) as proxy:
        yield proxy


def _place(directory: Path, name: str, node: LocalNode) -> Path:
    place = directory / name
    place.mkdir(mode=0o700)
    give(place, node.account)
    return place


def _file(place: Path, name: str, text: str, node: LocalNode) -> Path:
    path = place / name
    path.touch(mode=0o600)
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
    give(path, node.account)
    return path


@contextlib.contextmanager
def _running(
    name: str, place: Path, command: tuple[str | Path, ...], node: LocalNode, port: int
) -> Iterator[Proxy]:
    """Run a proxy until the end of the block, having waited until a statement came through it."""
    program = shutil.which(name, path=_PATH)
    if program is None:
        raise FileNotFoundError(f"{name} is not installed; apt-get install {PACKAGES[name]}")
    account = node.account
    log = place / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *map(str, command[1:])],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=account.uid if account.switches else None,
            group=account.gid if account.switches else None,
            extra_groups=account.groups if account.switches else None,
        )
    proxy = Proxy(name, replace(node, port=port), log, process)
    try:
        _await(proxy, node)
        yield proxy
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(proxy: Proxy, node: LocalNode) -> None:
    """Wait until a statement comes through; see that it is the node who answers."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with psycopg.connect(**proxy.front.conninfo, connect_timeout=5) as connection:
                row = connection.execute("SELECT inet_server_port()", prepare=False).fetchone()
                break
        except psycopg.OperationalError as error:
            if proxy.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            said = proxy.log.read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError(f"{proxy.name} does not answer: {error}; {said}") from error
    if row != (node.port,):
        raise RuntimeError(f"{proxy.name} sends reads to port {row}, not to {node.name}")
