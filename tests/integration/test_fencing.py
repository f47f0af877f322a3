"""Fences on real servers, against clients that try to pass them, and for roles with few rights."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from promoting import SHARD, Promoting, Stage, kill_at

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.ops import commands, resuming
from sqlroute.ops.fences import Level, fence_name
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Progress
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

ROLE, PASSWORD = "of_the_operator", "of the operator"
GRANTS = (
    "ALTER SYSTEM ON PARAMETER default_transaction_read_only, synchronous_standby_names,"
    " session_preload_libraries, primary_conninfo, primary_slot_name",
    "SET ON PARAMETER session_preload_libraries",
    "EXECUTE ON FUNCTION pg_reload_conf(), pg_promote(boolean, integer),"
    " pg_show_all_file_settings(), pg_stat_file(text, boolean), pg_wal_replay_resume()",
    "SELECT ON pg_file_settings",
    "USAGE ON SCHEMA sqlroute",
    "SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA sqlroute",
)

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
VERSIONS = [
    pytest.param(None, id="newest"),
    pytest.param(
        DEBIAN_15,
        id="15",
        marks=pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="no PostgreSQL 15 from Debian"),
    ),
]


@pytest.fixture(scope="module")
def whole_stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="fencing"))
    stage.tell(
        stage.primary,
        f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'",
        f"GRANT pg_monitor, pg_signal_backend, pg_checkpoint TO {ROLE}",
        *(f"GRANT {grant} TO {ROLE}" for grant in GRANTS),
        "CREATE ROLE nobody LOGIN PASSWORD 'of nobody'",
        "CREATE ROLE client LOGIN PASSWORD 'of a client'",
        "CREATE TABLE public.note (id bigint)",
        "GRANT ALL ON public.note TO client",
    )
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Stage:
    whole_stage.mend()
    return whole_stage


def client(stage: Stage, node: str) -> psycopg.Connection:
    return stage.client(node, user="client", password="of a client")


@contextlib.contextmanager
def no_router(stage: Stage) -> Iterator[None]:
    """Let nobody but programs of the role ``client`` be connected: superusers cannot be ended."""
    stage.router.close()
    try:
        yield
    finally:
        stage.mend()
        fresh = Stage(stage.servers)
        stage.router, stage.doors = fresh.router, fresh.doors


# What a fence is worth


class Adversary(threading.Thread):
    """A client that does all it may to go on writing on one node, until it is stopped."""

    def __init__(self, stage: Stage, node: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[int] = []
        self._stage, self._node = stage, node
        self._over = threading.Event()

    def run(self) -> None:
        number = time.monotonic_ns()
        while not self._over.is_set():
            with contextlib.suppress(psycopg.Error), client(self._stage, self._node) as connection:
                connection.execute("SET default_transaction_read_only = off")
                connection.execute("SET synchronous_commit = local")
                while not self._over.is_set():
                    number += 1
                    connection.execute("INSERT INTO public.note VALUES (%s)", (number,))
                    self.acknowledged.append(number)

    def stop(self) -> list[int]:
        self._over.set()
        self.join(10)
        return self.acknowledged


@pytest.mark.parametrize("level", [Level.L3, Level.L4], ids=lambda level: level.name)
def test_nothing_that_an_adversary_was_told_is_lost(stage: Stage, level: Level) -> None:
    """He turns read-only off and waits for no standby; from L3 on that is of no use."""
    adversary = Adversary(stage, stage.primary)
    adversary.start()

    report = stage.promote(level=level, max_drain=0.3)

    acknowledged = adversary.stop()
    rows = "SELECT coalesce(array_agg(id), '{}') FROM public.note"
    assert acknowledged
    assert set(acknowledged) <= set(stage.ask(report.change.candidate, rows))
    stage.await_whole(report.change.epoch)


class Authenticating:
    """A client in the middle of its authentication, by SCRAM, until it goes on."""

    def __init__(self, stage: Stage, node: str) -> None:
        server = stage.nodes[node]
        self._socket = socket.create_connection(("127.0.0.1", server.port), 10)
        words = ("user", "client", "database", server.database, "")
        self._send(b"", struct.pack("!i", 3 << 16), *(word.encode() + b"\0" for word in words))
        assert self._receive()[0] == b"R"
        nonce = base64.b64encode(os.urandom(18)).decode()
        self._bare = f"n=,r={nonce}"
        first = f"n,,{self._bare}".encode()
        self._send(b"p", b"SCRAM-SHA-256\0", struct.pack("!i", len(first)), first)
        self._said = self._receive()[1][4:].decode()

    def go_on(self, *statements: str) -> bool:
        """End the authentication and run statements; say if all were acknowledged."""
        said = dict(part.split("=", 1) for part in self._said.split(","))
        salt, rounds = base64.b64decode(said["s"]), int(said["i"])
        salted = hashlib.pbkdf2_hmac("sha256", b"of a client", salt, rounds)
        key = hmac.digest(salted, b"Client Key", "sha256")
        final = f"c=biws,r={said['r']}"
        text = f"{self._bare},{self._said},{final}".encode()
        signature = hmac.digest(hashlib.sha256(key).digest(), text, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        try:
            self._send(b"p", f"{final},p={base64.b64encode(proof).decode()}".encode())
            self._await_ready()
            for statement in statements:
                self._send(b"Q", statement.encode() + b"\0")
                self._await_ready()
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()

    def _await_ready(self) -> None:
        while (kind := self._receive()[0]) != b"Z":
            if kind == b"E":
                raise ConnectionRefusedError

    def _send(self, kind: bytes, *parts: bytes) -> None:
        body = b"".join(parts)
        self._socket.sendall(kind + struct.pack("!i", len(body) + 4) + body)

    def _receive(self) -> tuple[bytes, bytes]:
        head = self._exactly(5)
        return head[:1], self._exactly(struct.unpack("!i", head[1:])[0] - 4)

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            part = self._socket.recv(count - len(found))
            if not part:
                raise ConnectionResetError
            found += part
        return found


@pytest.mark.parametrize("pg_bin", VERSIONS)
def test_a_client_that_authenticates_while_the_fence_goes_up_loses_nothing(
    sqlroute_topology_factory: TopologyFactory, pg_bin: Path | None
) -> None:
    """It began before and is let in after: before 18 nobody sees it until then."""
    servers = sqlroute_topology_factory(shards=1, replicas=1, pg_bin=pg_bin, label="authenticating")
    stage = Stage(servers)
    stage.tell(
        stage.primary,
        "CREATE ROLE client LOGIN PASSWORD 'of a client'",
        "CREATE TABLE public.note (id bigint)",
        "GRANT ALL ON public.note TO client",
    )
    late = Authenticating(stage, stage.primary)
    acknowledged: list[bool] = []

    def told(progress: Progress) -> None:
        if (progress.step.name, progress.state) == ("catch_up", "begun"):
            settings = "SET default_transaction_read_only = off; SET synchronous_commit = local"
            acknowledged.append(late.go_on(settings, "INSERT INTO public.note VALUES (7)"))

    report = commands.promote(stage.settings, SHARD, Wishes(level=Level.L3), told=told)

    late.close()
    found = stage.ask(report.change.candidate, "SELECT count(*) FROM public.note")
    version = stage.look().facts[report.change.candidate].version
    assert report.outcome == "done"
    assert acknowledged == [version < 18]
    assert found == int(version < 18)
    stage.close()


def test_a_fence_of_level_3_survives_a_restart_and_is_passed_on_purpose(stage: Stage) -> None:
    primary = stage.primary
    with contextlib.closing(client(stage, primary)) as older:
        found = commands.fence(stage.settings, primary, level=Level.L3)

        with pytest.raises(psycopg.OperationalError):
            older.execute("SELECT 1")
    assert found["fence"] == "L3"
    assert found["ended"] >= 1
    stage.nodes[primary].stop()
    with contextlib.suppress(Exception):  # it waits for an answer, which a fence gives nobody
        stage.with_driver()
        commands.shard_of(stage.settings, primary)
    _start(stage, primary)
    with pytest.raises(psycopg.OperationalError, match=fence_name(stage.look().epoch + 1)):
        client(stage, primary)
    options = "-c session_preload_libraries= -c default_transaction_read_only=off"
    stage.client(primary, options=options).close()
    assert stage.taking_writes() == []
    assert commands.unfence(stage.settings, primary)["settings"]
    assert stage.taking_writes() == [primary]


def _start(stage: Stage, name: str) -> None:
    from sqlroute.ops.shard import ShardServers

    with ShardServers(stage.settings, SHARD) as shard:
        driver = shard.drivers[name]
        assert driver is not None
        driver.start(30)


def test_a_server_whose_connections_are_all_taken_is_fenced(stage: Stage) -> None:
    """Nobody can try an ordinary session then; theirs are ended first."""
    primary = stage.primary
    taken: list[psycopg.Connection] = []
    try:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                taken.append(client(stage, primary))

        assert commands.fence(stage.settings, primary, level=Level.L3)["fence"] == "L3"
    finally:
        for connection in taken:
            connection.close()
    commands.unfence(stage.settings, primary)


def test_a_fence_that_nobody_has_read_yet_is_taken_off(stage: Stage) -> None:
    """Its command was killed before the reload: the next one would bring it up."""
    primary = stage.primary
    stage.tell(primary, f"ALTER SYSTEM SET session_preload_libraries = '{fence_name(9)}'")
    assert stage.look().facts[primary].fence is Level.L3

    changed = commands.unfence(stage.settings, primary)["settings"]

    stage.tell(primary, "SELECT pg_reload_conf()")
    assert changed == ["session_preload_libraries"]
    assert stage.taking_writes() == [primary]


def test_a_fence_whose_command_was_killed_before_it_held_is_put_up_again(stage: Stage) -> None:
    """The setting alone proves nothing: who was connected before goes on writing."""
    former = stage.primary
    kill_at(stage, Promoting("promote", wishes=(("level", Level.L3),)), "fence", "begun")
    (operation,) = stage.unended()
    adversary = Adversary(stage, former)
    adversary.start()
    while not adversary.acknowledged:
        time.sleep(0.01)
    stage.tell(
        former,
        f"ALTER SYSTEM SET session_preload_libraries = '{fence_name(stage.look().epoch + 1)}'",
        "SELECT pg_reload_conf()",
    )  # as far as the fence had come

    report = stage.gives_way(lambda: resuming.resume(stage.settings, operation))

    acknowledged = adversary.stop()
    rows = "SELECT coalesce(array_agg(id), '{}') FROM public.note"
    assert set(acknowledged) <= set(stage.ask(stage.primary, rows))
    assert report.outcome == "done"
    stage.await_whole()


@pytest.mark.parametrize("way", ["resume", "abort"])
def test_a_hold_that_ended_under_a_fence_stops_nobody(stage: Stage, way: str) -> None:
    """Whoever was killed has left it to expire: it is renewed, or the fence taken off."""
    former = stage.primary
    kill_at(stage, Promoting("promote", wishes=(("level", Level.L3),)), "fence", "done")
    (operation,) = stage.unended()
    with stage.server(former) as server:
        server.transaction(("UPDATE sqlroute.shard SET held_until = clock_timestamp()", ()))

    do = resuming.resume if way == "resume" else resuming.abort
    report = stage.gives_way(lambda: do(stage.settings, operation))

    names = [step["step"] for step in report.steps]
    assert names[0] == ("hold" if way == "resume" else "unfence")
    assert (stage.primary == former) is (way == "abort")
    assert stage.unended() == []
    stage.await_whole()


# Who may do what


def test_a_role_with_grants_alone_can_promote(stage: Stage) -> None:
    """No superuser, no driver: L3; and it takes the fence off again."""
    former = stage.primary
    settings = stage.as_role(ROLE, PASSWORD)
    with no_router(stage):
        report = commands.promote(settings, SHARD, Wishes())

        assert report.fence is Level.L3
        assert stage.taking_writes() == [report.change.candidate]
        assert stage.rejoin(former)["way"] == "rewind"


def test_a_role_with_grants_alone_can_take_a_killed_switchover_back(stage: Stage) -> None:
    """Its new session passes the fence that the killed one has put up."""
    former = stage.primary
    settings = stage.as_role(ROLE, PASSWORD)
    with no_router(stage):
        kill_at(
            stage,
            Promoting("promote", wishes=(("level", Level.L3),)),
            "fence",
            "done",
            drivers=False,
        )
        (operation,) = stage.unended()

        stage.gives_way(lambda: resuming.abort(settings, operation))

        assert stage.taking_writes() == [former]
        assert stage.unended() == []


@pytest.mark.parametrize("right", ["pg_monitor", "pg_signal_backend"])
def test_a_role_that_does_not_see_or_end_other_sessions_cannot_fence(
    stage: Stage, right: str
) -> None:
    """It would count no sessions, and take that for proof."""
    primary = stage.primary
    settings = stage.as_role(ROLE, PASSWORD)
    stage.tell(primary, f"REVOKE {right} FROM {ROLE}")
    stage.await_whole()
    try:
        before = stage.snapshot()
        with pytest.raises(OperationRefused, match=f"GRANT {right}"):
            stage.promote(settings, level=Level.L3)

        assert stage.snapshot() == before
    finally:
        stage.tell(primary, f"GRANT {right} TO {ROLE}")


def test_a_role_without_rights_is_refused(stage: Stage) -> None:
    settings = stage.as_role("nobody", "of nobody")
    before = stage.snapshot()

    with pytest.raises(OperationRefused) as refused:
        stage.promote(settings)

    said = str(refused.value)
    assert "GRANT ALTER SYSTEM ON PARAMETER session_preload_libraries" in said
    assert "[operator]" in said
    assert stage.snapshot() == before


# While a command works


END_OPERATOR = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'sqlroute operator'"
)


@pytest.mark.parametrize("step", ["record", "hold", "fence", "promote"])
def test_an_operator_whose_session_is_ended_goes_on_or_takes_everything_back(
    stage: Stage, step: str
) -> None:
    """By somebody who ends all sessions: there is one primary, and nothing is left behind."""
    former = stage.primary
    options = "-c session_preload_libraries= -c default_transaction_read_only=off"

    def told(progress: Progress) -> None:
        if (progress.step.name, progress.state) == (step, "done"):
            for name in stage.nodes:
                with stage.client(name, options=options) as connection:
                    connection.execute(END_OPERATOR)

    with stage.writing() as written:
        try:
            outcome = commands.promote(
                stage.settings, SHARD, Wishes(level=Level.L3), told=told
            ).outcome
        except OperationFailed as error:
            outcome = "taken back" if "everything was taken back" in str(error) else "resumable"
        for operation in stage.unended():
            stage.gives_way(lambda operation=operation: resuming.resume(stage.settings, operation))

    assert written.is_whole, written
    assert stage.taking_writes() == [stage.primary]
    assert (stage.primary == former) is (outcome == "taken back")
    assert outcome != "taken back" or step != "promote"
    stage.await_whole()


def test_an_operator_who_has_lost_the_lock_to_another_does_nothing_more(stage: Stage) -> None:
    """His session was ended, and another command has come in: two would fight over the fence."""
    former = stage.primary
    lock = "SELECT pg_advisory_lock(hashtextextended('sqlroute operation', 0))"
    thief = stage.client(former)

    def told(progress: Progress) -> None:
        if (progress.step.name, progress.state) == ("checkpoint", "done"):
            thief.execute(END_OPERATOR)
            thief.execute(lock)

    with pytest.raises(OperationFailed, match="another command works on"):
        commands.promote(stage.settings, SHARD, Wishes(level=Level.L3), told=told)
    thief.close()

    assert stage.taking_writes() == [former]
    (operation,) = stage.unended()
    stage.gives_way(lambda: resuming.abort(stage.settings, operation))
    stage.await_whole()


def test_a_node_is_not_unfenced_under_a_promotion(stage: Stage) -> None:
    """What it would take then is lost."""
    former = stage.primary
    refusals: list[str] = []

    def told(progress: Progress) -> None:
        if (progress.step.name, progress.state) == ("fence", "done"):
            try:
                commands.unfence(stage.settings, former)
            except OperationRefused as error:
                refusals.append(str(error))

    commands.promote(stage.settings, SHARD, Wishes(level=Level.L3), told=told)

    assert len(refusals) == 1
    assert "another command works on shard s0" in refusals[0]
    stage.await_whole()


def test_a_fence_waits_for_a_node_that_is_away(stage: Stage) -> None:
    """--wait tries again until it is there."""
    name = stage.replicas[0]
    settings = replace(stage.without_drivers)
    stage.nodes[name].stop()
    with pytest.raises(OperationRefused, match="--wait"):
        commands.fence(settings, name)
    timer = threading.Timer(0.5, stage.nodes[name].start)
    timer.start()

    found = commands.fence(settings, name, waits=20)

    timer.join()
    assert found["fence"] == "L3"
    commands.unfence(settings, name)
