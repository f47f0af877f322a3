"""A real Patroni cluster for tests: one etcd and some nodes, on this machine.

Needs the program ``etcd`` and the package ``patroni[etcd3,psycopg3]`` in the environment of this
interpreter; :func:`missing` says which of them is not there. Each node is a Patroni of its own with
a REST API, as a user would run it; nothing here knows how sqlroute uses them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlroute.errors import LocalTopologyError
from sqlroute.local import processes
from sqlroute.local.account import Account, give, obstacle, server_account
from sqlroute.local.binaries import find_binaries
from sqlroute.local.waiting import became_true

HOST = "127.0.0.1"
_PATIENCE = 60.0
_ASK = 2.0


@dataclass(frozen=True, slots=True)
class Times:
    """Patroni's own: how long a leader's lease is, and how often each node looks.

    Patroni asks that ``loop_wait + 2 * retry_timeout <= ttl`` and that ``ttl`` be 20 or more.
    """

    ttl: int = 30
    loop_wait: int = 10
    retry_timeout: int = 10


DEFAULT_TIMES = Times()
SHORT_TIMES = Times(ttl=20, loop_wait=2, retry_timeout=3)
"""The shortest lease that Patroni takes: a lost node is replaced after about 20 s."""


@dataclass(frozen=True, slots=True)
class PatroniNode:
    """One Patroni and its PostgreSQL."""

    name: str
    directory: Path
    port: int
    api_port: int

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def config(self) -> Path:
        return self.directory / "patroni.yml"

    @property
    def log(self) -> Path:
        return self.directory / "patroni.log"

    @property
    def api(self) -> str:
        return f"http://{HOST}:{self.api_port}"


@dataclass
class PatroniCluster:
    """etcd and Patroni nodes, started together and stopped by :meth:`close`.

    Args:
        directory: an empty one that the servers' user can pass.
        port: the first of ``2 + 2 * count`` free ports.
        count: of nodes, named ``pg0``, ``pg1``...
        durable: the data survives a crash of the machine; off, fsync costs nothing.
        auth: the REST API's user and password, for what changes something.
        tags: of nodes, by name.
        pg_bin: PostgreSQL's bin directory; None finds one.
    """

    directory: Path
    port: int
    count: int = 3
    times: Times = DEFAULT_TIMES
    durable: bool = False
    auth: tuple[str, str] | None = None
    tags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pg_bin: Path | None = None
    scope: str = "shop"
    database: str = "shop"
    user: str = "app"
    password: str = field(default_factory=lambda: secrets.token_hex(12), repr=False)
    nodes: tuple[PatroniNode, ...] = field(init=False, default=())
    _account: Account = field(init=False, repr=False)
    _running: dict[str, subprocess.Popen[bytes]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._account = server_account()
        self._running = {}
        self.nodes = tuple(
            PatroniNode(f"pg{i}", self.directory / f"pg{i}", self.port + 2 + 2 * i, 0)
            for i in range(self.count)
        )
        self.nodes = tuple(
            PatroniNode(node.name, node.directory, node.port, node.port + 1) for node in self.nodes
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs of the REST APIs."""
        return tuple(node.api for node in self.nodes)

    def node(self, name: str) -> PatroniNode:
        return next(node for node in self.nodes if node.name == name)

    def conninfo(self, name: str, *, superuser: bool = False) -> dict[str, Any]:
        """Return parameters for a driver's connect call, the password revealed."""
        server = {"host": HOST, "port": self.node(name).port, "connect_timeout": 3}
        if superuser:
            return {**server, "user": "postgres", "password": self.password, "dbname": "postgres"}
        return {**server, "user": self.user, "password": self.password, "dbname": self.database}

    def start(self) -> None:
        """Start all of it; return when there is a leader and every other node streams.

        Raises:
            LocalTopologyError: something does not start; names its log.
        """
        if lacking := missing():
            raise LocalTopologyError(f"no Patroni cluster: {lacking}")
        give(self.directory, self._account)
        self._start_etcd()
        for node in self.nodes:
            node.directory.mkdir()
            give(node.directory, self._account)
            node.config.write_text(json.dumps(self._config(node), indent=2))
            node.config.chmod(0o600)
            give(node.config, self._account)
            self.start_node(node.name)
        if not became_true(self.is_settled, timeout=_PATIENCE, every=0.1):
            raise LocalTopologyError(
                f"the Patroni cluster did not come up in {_PATIENCE:g} s: {self._last_words()}"
            )
        self._make_user()

    def close(self) -> None:
        """Kill all that was started, by pid."""
        for name in [*(n.name for n in self.nodes if n.name in self._running), "etcd"]:
            self._end(name, signal.SIGKILL)
        for node in self.nodes:
            if node.data.exists():
                processes.destroy(node.data)

    def start_node(self, name: str) -> None:
        """Start a node's Patroni, which starts its PostgreSQL. Does not wait for that."""
        node = self.node(name)
        with node.log.open("ab") as log:
            command = [*self._as_account(), sys.executable, "-m", "patroni", str(node.config)]
            self._running[name] = self._spawn(command, log)

    def kill_agent(self, name: str) -> None:
        """SIGKILL a node's Patroni; its PostgreSQL goes on."""
        self._end(name, signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """SIGKILL a node's Patroni and its PostgreSQL, as when the machine is lost."""
        self._end(name, signal.SIGKILL)
        processes.destroy(self.node(name).data)

    def stop_node(self, name: str) -> None:
        """Have a node's Patroni stop its PostgreSQL and end."""
        self._end(name, signal.SIGTERM)

    def cluster(self) -> dict[str, Any]:
        """Return what ``GET /cluster`` of the first node that answers says; empty if none does."""
        for node in self.nodes:
            with (
                contextlib.suppress(OSError, ValueError),
                urllib.request.urlopen(f"{node.api}/cluster", timeout=_ASK) as answer,
            ):
                found: dict[str, Any] = json.load(answer)
                return found
        return {}

    def leader(self) -> str | None:
        """Return the name of the running leader."""
        for member in self.cluster().get("members", ()):
            if member["role"] == "leader" and member["state"] == "running":
                return str(member["name"])
        return None

    def is_settled(self) -> bool:
        """Say whether a leader runs, and every other node streams on its timeline."""
        members = self.cluster().get("members", ())
        leaders = [m for m in members if m["role"] == "leader" and m["state"] == "running"]
        others = [m for m in members if m["role"] != "leader"]
        if len(leaders) != 1 or len(others) != self.count - 1:
            return False
        timeline = leaders[0].get("timeline")
        return all(m["state"] == "streaming" and m.get("timeline") == timeline for m in others)

    def wait_settled(self, timeout: float = _PATIENCE) -> None:
        """Wait for :meth:`is_settled`.

        Raises:
            LocalTopologyError: it is not, after ``timeout`` seconds.
        """
        if not became_true(self.is_settled, timeout=timeout, every=0.1):
            raise LocalTopologyError(
                f"the Patroni cluster did not settle in {timeout:g} s: {self._last_words()}"
            )

    def patch(self, change: Mapping[str, Any]) -> None:
        """``PATCH /config``: change the cluster's dynamic configuration."""
        body = json.dumps(change).encode()
        request = urllib.request.Request(f"{self.nodes[0].api}/config", body, method="PATCH")
        request.add_header("Content-Type", "application/json")
        if self.auth is not None:
            import base64

            word = base64.b64encode(":".join(self.auth).encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        with urllib.request.urlopen(request, timeout=_ASK):
            pass

    def _start_etcd(self) -> None:
        data = self.directory / "etcd"
        data.mkdir(mode=0o700)
        give(data, self._account)
        clients, peers = f"http://{HOST}:{self.port}", f"http://{HOST}:{self.port + 1}"
        options = {
            "data-dir": str(data),
            "listen-client-urls": clients,
            "advertise-client-urls": clients,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": f"default={peers}",
        }
        command = [str(_etcd()), *(word for k, v in options.items() for word in (f"--{k}", v))]
        log_path = self.directory / "etcd.log"
        with log_path.open("ab") as log:
            self._running["etcd"] = self._spawn([*self._as_account(), *command], log)
        if not became_true(lambda: _answers(f"{clients}/health"), timeout=_PATIENCE, every=0.05):
            raise LocalTopologyError(f"etcd does not answer on {clients}; its log is {log_path}")

    def _spawn(self, command: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
        kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
        environment = {
            **kept,
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATRONI_LOG_LEVEL": "INFO",
        }
        return subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _as_account(self) -> list[str]:
        """Return the words that make a program run as the servers' user.

        This Python may lie where that user cannot look (under ``/root``). Then the program keeps
        one right of root's, to pass by file permissions.
        """
        account = self._account
        if not account.switches:
            return []
        words = ["setpriv", f"--reuid={account.uid}", f"--regid={account.gid}", "--init-groups"]
        here = (Path(sys.executable), Path(sys.executable).resolve(), Path(__file__))
        if any(obstacle(path, account) for path in here):
            words += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        return words

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _config(self, node: PatroniNode) -> dict[str, Any]:
        """Return a node's configuration; JSON is YAML, too."""
        postgres = {
            "max_connections": 100,
            "shared_buffers": "64MB",
            "wal_keep_size": "256MB",
            "wal_log_hints": "on",
        }
        if not self.durable:
            postgres |= {"fsync": "off"}
        auth: dict[str, Any] = {}
        if self.auth is not None:
            auth = {"authentication": {"username": self.auth[0], "password": self.auth[1]}}
        login = {"username": "postgres", "password": self.password}
        return {
            "scope": self.scope,
            "name": node.name,
            "restapi": {
                "listen": f"{HOST}:{node.api_port}",
                "connect_address": f"{HOST}:{node.api_port}",
                **auth,
            },
            "tags": dict(self.tags.get(node.name, {})),
            "etcd3": {"host": f"{HOST}:{self.port}"},
            "bootstrap": {
                "dcs": {
                    "ttl": self.times.ttl,
                    "loop_wait": self.times.loop_wait,
                    "retry_timeout": self.times.retry_timeout,
                    "postgresql": {"use_pg_rewind": True, "parameters": postgres},
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"{HOST}:{node.port}",
                "connect_address": f"{HOST}:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(find_binaries(self.pg_bin, account=self._account).path),
                "pgpass": str(node.directory / "pgpass"),
                "pg_hba": [
                    "local all all scram-sha-256",
                    "host all all 127.0.0.1/32 scram-sha-256",
                    "host replication all 127.0.0.1/32 scram-sha-256",
                ],
                "authentication": {"superuser": login, "replication": {**login}},
                "parameters": {"unix_socket_directories": str(node.directory)},
            },
        }

    def _make_user(self) -> None:
        """Create what an application connects as, and to."""
        import psycopg
        from psycopg import sql

        leader = self.leader()
        assert leader is not None
        with psycopg.connect(**self.conninfo(leader, superuser=True), autocommit=True) as admin:
            user, database = sql.Identifier(self.user), sql.Identifier(self.database)
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(user, self.password))
            admin.execute(sql.SQL("GRANT pg_monitor TO {}").format(user))
            admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, user))
        if not became_true(self._can_log_in, timeout=_PATIENCE, every=0.05):
            raise LocalTopologyError(f"not every node has replayed that {self.user} was made")

    def _can_log_in(self) -> bool:
        """Say if the application's user gets in everywhere: replicas replay its making."""
        import psycopg

        try:
            for node in self.nodes:
                psycopg.connect(**self.conninfo(node.name)).close()
        except psycopg.OperationalError:
            return False
        return True

    def _last_words(self) -> str:
        words = []
        for node in self.nodes:
            lines = node.log.read_text(errors="replace").splitlines() if node.log.exists() else []
            words.append(f"{node.name}: {lines[-1] if lines else 'nothing logged'}")
        return "; ".join(words)


def missing() -> str | None:
    """Return what is not installed here, with the way to get it; None if all is there."""
    if _etcd() is None:
        return "etcd is not installed; apt-get install etcd-server"
    if importlib.util.find_spec("patroni") is None:
        return "patroni is not installed; pip install 'patroni[etcd3,psycopg3]'"
    if server_account().switches and shutil.which("setpriv") is None:
        return "setpriv is not installed; apt-get install util-linux, or run as an ordinary user"
    return None


def _etcd() -> Path | None:
    found = shutil.which("etcd")
    return Path(found) if found else None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_ASK) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
