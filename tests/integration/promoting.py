"""What the tests of promotions work with: a shard, writers, and commands that are killed.

Imports no pytest: commands that are to be killed run in processes of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from holding import Doors, Writers, shop_on, started
from sqlalchemy.orm import Session

from sqlroute import Router
from sqlroute.config import Settings, load
from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.operations import DriverSpec, Operator
from sqlroute.ops import commands, resuming
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Progress, Report
from sqlroute.ops.server import Server, wait_for
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.topology import Secret

T = TypeVar("T")

SHARD = "s0"
PATIENCE = 20.0
_numbers = itertools.count(1)


@dataclass
class Written:
    """What the writers of one block were told, and what became of it.

    Attributes:
        lost: acknowledged and not there; ``twice``: there more than once.
    """

    acknowledged: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    longest_gap: float = 0.0

    @property
    def is_whole(self) -> bool:
        return bool(self.acknowledged) and not (self.errors or self.lost or self.twice)


class PatientDoors(Doors):
    """Sessions that wait for as long as a hold may last."""

    def do(self, work: Callable[[Session], T], **options: Any) -> T:
        return self.start(work, **options).result(PATIENCE * 2)


class Stage:
    """One shard of three nodes, a router, and the settings of its operator."""

    def __init__(self, servers: LocalTopology) -> None:
        self.servers = servers
        self.settings = load(servers.config_path)
        self.router: Router = started(servers)
        self.shop = shop_on(self.router, SHARD)
        self.doors = PatientDoors(self.router)

    def close(self) -> None:
        self.doors.close()
        self.router.close()

    # Who and what

    @property
    def nodes(self) -> dict[str, LocalNode]:
        return {node.name: node for node in self.servers.shard(SHARD).nodes}

    @property
    def without_drivers(self) -> Settings:
        return replace(self.settings, operations=replace(self.settings.operations, drivers=()))

    def with_driver(self, **changes: Any) -> Settings:
        """Return the settings with another driver for all nodes."""
        (spec,) = self.settings.operations.drivers
        found: DriverSpec = replace(spec, **changes)
        return replace(
            self.settings, operations=replace(self.settings.operations, drivers=(found,))
        )

    def as_role(self, role: str, password: str, settings: Settings | None = None) -> Settings:
        settings = settings or self.without_drivers
        operator = Operator(role, Secret(password))
        return replace(settings, operations=replace(settings.operations, operator=operator))

    def look(self) -> Look:
        with ShardServers(self.settings, SHARD) as shard:
            return shard.look()

    @property
    def primary(self) -> str:
        """Return the primary; of several that one of the newest timeline."""
        look = self.look()
        return max(look.primaries, key=lambda name: look.facts[name].timeline)

    @property
    def replicas(self) -> list[str]:
        return [name for name, facts in self.look().facts.items() if facts.is_replica]

    @contextlib.contextmanager
    def server(self, node: str) -> Iterator[Server]:
        """Give a server as an operator asks it."""
        with ShardServers(self.settings, SHARD) as shard:
            yield shard.server(node)

    def ask(self, node: str, query: str, values: Any = ()) -> Any:
        with self.server(node) as server:
            return server.value(query, values)

    def tell(self, node: str, *statements: str) -> None:
        with self.server(node) as server:
            for statement in statements:
                server.rows(statement)

    def client(self, node: str, **options: Any) -> psycopg.Connection[Any]:
        """Connect as a program that knows nothing of sqlroute."""
        values = {**self.nodes[node].conninfo, "connect_timeout": 3, **options}
        return psycopg.connect(**values, autocommit=True)

    def taking_writes(self) -> list[str]:
        """Return the nodes on which a program could write now, by trying."""
        found = []
        for name in self.nodes:
            with contextlib.suppress(psycopg.Error), self.client(name) as connection:
                connection.execute("CREATE TEMP TABLE probe (x int)")
                connection.execute("SELECT pg_current_xact_id()")
                found.append(name)
        return found

    def snapshot(self) -> dict[str, Any]:
        """Return what a refused command must not have changed."""
        found: dict[str, Any] = {}
        for name in self.nodes:
            with self.server(name) as server:
                standby = server.is_standby()
                found[name] = {
                    "standby": standby,
                    "settings": server.rows(
                        "SELECT name, setting FROM pg_settings WHERE source <> 'session'"
                        " AND source <> 'client' ORDER BY name"
                    ),
                    "files": server.rows("SELECT name, setting FROM pg_file_settings"),
                    "slots": server.rows("SELECT slot_name FROM pg_replication_slots"),
                    "shard": server.rows("SELECT * FROM sqlroute.shard"),
                    "journal": server.rows("SELECT * FROM sqlroute.journal ORDER BY epoch"),
                    "operations": server.rows(
                        "SELECT id, state FROM sqlroute.operation ORDER BY id"
                    ),
                }
        return found

    # Commands

    def promote(self, settings: Settings | None = None, **wishes: Any) -> Report:
        return commands.promote(settings or self.settings, SHARD, Wishes(**wishes))

    def failover(self, settings: Settings | None = None, **wishes: Any) -> Report:
        return commands.failover(settings or self.settings, SHARD, Wishes(**wishes))

    def rejoin(self, node: str, settings: Settings | None = None, **how: Any) -> dict[str, Any]:
        return commands.rejoin(settings or self.settings, node, **how)

    def unended(self) -> list[str]:
        """Return the operations that wait for somebody to end them."""
        found = resuming.list_operations(self.settings)["operations"]
        return [o["operation"] for o in found if o["state"] in ("running", "abandoned")]

    def gives_way(self, work: Callable[[], Any]) -> Any:
        """Do it, as soon as the sessions of a command that was killed have ended."""
        ends = time.monotonic() + PATIENCE
        while True:
            try:
                return work()
            except OperationRefused as error:
                if "another command works" not in str(error) or time.monotonic() > ends:
                    raise
                time.sleep(0.02)

    # Writers

    @contextlib.contextmanager
    def writing(self, count: int = 3) -> Iterator[Written]:
        """Have programs write all the time; what they were told is known at the end."""
        found, name = Written(), f"w{next(_numbers)}"
        writers = Writers([self.doors], self.shop, count, name)
        try:
            time.sleep(0.1)
            yield found
            time.sleep(0.1)
        finally:
            tallies = writers.stop()
            for tally in tallies:
                found.acknowledged += tally.acknowledged
                found.errors += tally.errors
            found.longest_gap = max(tally.longest_gap for tally in tallies)
        there = self.stored(name)
        found.lost = sorted(set(found.acknowledged).difference(there))
        found.twice = sorted({entry for entry in there if there.count(entry) > 1})

    def stored(self, name: str) -> list[str]:
        with self.client(self.primary) as connection:
            query = "SELECT id FROM entry WHERE shop = %s AND id LIKE %s"
            return [row[0] for row in connection.execute(query, (self.shop, f"{name}-%"))]

    # Being whole

    def await_whole(self, epoch: int | None = None) -> None:
        """Wait until all replicas follow one primary and have its newest row of the journal.

        Raises:
            AssertionError: they do not.
        """
        said = ""

        def is_whole() -> bool:
            nonlocal said
            look = self.look()
            said = self._fault(look, epoch)
            return not said

        assert wait_for(is_whole, timeout=PATIENCE, pause=0.05), said

    def _fault(self, look: Look, epoch: int | None) -> str:
        if len(look.primaries) != 1:
            return f"primaries: {look.primaries}"
        (primary,) = look.primaries
        for name, facts in look.facts.items():
            if not facts.answers:
                return f"{name}: {facts.error}"
            if facts.timeline != look.facts[primary].timeline:
                return f"{name} is on timeline {facts.timeline}"
            if look.epochs[name] != look.epochs[primary] or epoch not in (None, look.epoch):
                return f"{name} has epoch {look.epochs[name]}"
            if facts.fence:
                return f"{name} is fenced: {facts.fence.name}"
            if name != primary and not (facts.is_streaming and look.follows[name]):
                return f"{name} does not follow"
        row = look.rows[primary]
        if row.state != "steady" or row.node not in (None, primary):
            return f"the catalog says {row.state}, {row.node}"
        return ""

    def mend(self) -> None:
        """Make the shard whole again, whatever a test has left."""
        if self._is_whole_now():
            return
        for node in self.nodes.values():
            if node.is_paused:
                node.resume()
            node.start() if not node.is_running and not self._has_fence(node) else None
        with contextlib.suppress(Exception):
            for operation in self.unended():
                self._end(operation)
        primary = self.primary
        commands.unfence(self.settings, primary, force=True)
        with self.server(primary) as server:
            server.release()
        for name in self.nodes:
            if name != primary:
                self.rejoin(name, clones=True)
        self.await_whole()

    def _is_whole_now(self) -> bool:
        try:
            return not self._fault(self.look(), None)
        except (OperationFailed, KeyError):
            return False

    def _has_fence(self, node: LocalNode) -> bool:
        return "sqlroute_fence" in (node.data / "postgresql.auto.conf").read_text()

    def _end(self, operation: str) -> None:
        try:
            resuming.abort(self.settings, operation)
        except OperationFailed:
            resuming.resume(self.settings, operation)


# Commands that are killed


@dataclass(frozen=True)
class Promoting:
    """A command that may be killed: what it does, as a value for another process."""

    verb: str
    arguments: tuple[Any, ...] = ()
    wishes: tuple[tuple[str, Any], ...] = ()

    def run(self, settings: Settings, seen: Callable[[str, str], None]) -> Any:
        def told(progress: Progress) -> None:
            seen(progress.step.name.value, progress.state)

        match self.verb:
            case "promote":
                return commands.promote(settings, SHARD, Wishes(**dict(self.wishes)), told=told)
            case "failover":
                return commands.failover(settings, SHARD, Wishes(**dict(self.wishes)), told=told)
            case "resume" | "abort" as verb:
                (operation,) = self.arguments
                do = resuming.resume if verb == "resume" else resuming.abort
                return do(settings, operation, told)
            case "add":
                from sqlroute.ops.replicas import place

                def say(name: str) -> None:
                    seen(name, "begun")

                return commands.add_replica(settings, SHARD, place(*self.arguments), say=say)
        raise ValueError(self.verb)


def _killed(command: Promoting, config: Path, drivers: bool, step: str, state: str) -> None:
    settings = load(config)
    if not drivers:
        settings = replace(settings, operations=replace(settings.operations, drivers=()))

    def seen(name: str, at: str) -> None:
        if (name, at) == (step, state):
            os.kill(os.getpid(), signal.SIGKILL)

    command.run(settings, seen)


def kill_at(
    stage: Stage, command: Promoting, step: str, state: str, *, drivers: bool = True
) -> None:
    """Run a command in a process of its own that is killed as a step begins, or has ended.

    Raises:
        AssertionError: it has ended otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["promoting"])
    arguments = (command, stage.servers.config_path, drivers, step, state)
    process = context.Process(target=_killed, args=arguments)
    process.start()
    process.join(60)
    code = process.exitcode
    process.close()
    assert code == -signal.SIGKILL, f"{command.verb} was not killed at {step} {state}: {code}"


def points(steps: Iterable[str]) -> list[tuple[str, str]]:
    """Return both sides of each step."""
    return [(step, state) for step in steps for state in ("begun", "done")]
