"""What befalls servers, networks and the operator's command, one at a time, under clients.

Each function does harm to a trial, does what an operator would do then, and leaves all three nodes
in their places; the check comes after it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from sqlroute.errors import OperationFailed, OperationRefused, SQLRouteError
from sqlroute.local import processes
from sqlroute.local.node import LocalNode
from sqlroute.ops import commands
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Progress
from sqlroute.ops.server import wait_for
from tests.chaos.cable import Cable, State

from .commanding import Command
from .trial import Trial

PATIENCE = 40.0
LOADED = 0.5
"""Seconds of load before the harm."""

TRIES = 5
_PART = 2 << 20
_RECEIVED = "SELECT coalesce(pg_last_wal_receive_lsn() - '0/0', 0)::bigint"
_LONG_RECORD = "SELECT pg_logical_emit_message(false, 'chaos', repeat('x', 200000000))"

Fault = Callable[[Trial], None]


# servers are lost


def primary_killed(trial: Trial) -> None:
    """Kill the primary; what is lost is within the bound that was said."""
    primary = trial.cluster.primary()
    trial.cluster.node(primary).kill()
    trial.fail_over(accepts_loss=True)
    trial.rejoin(primary)


def primary_killed_behind_a_cut(trial: Trial) -> None:
    """Kill a primary that no replica could hear: writes are lost, as many as was said."""
    primary = trial.cluster.primary()
    with _turned(trial.cluster.back[primary], State.HOLE):
        time.sleep(LOADED)
        trial.cluster.node(primary).kill()
        found = trial.fail_over(accepts_loss=True)
    assert found["loss"]["known_bytes"], f"nothing was said to be lost: {found['loss']}"
    trial.rejoin(primary)


def primary_killed_with_quorum(trial: Trial) -> None:
    """Kill the primary while each commit waits for a replica: nothing is lost."""
    trial.cluster.ask_for_quorum()
    time.sleep(LOADED)
    primary = trial.cluster.primary()
    trial.cluster.node(primary).kill()
    found = trial.fail_over()
    trial.rejoin(primary)
    trial.cluster.ask_for_no_quorum()
    assert found["loss"]["quorum"], f"the quorum is no proof: {found['loss']}"


def primary_killed_in_record(trial: Trial) -> None:
    """Kill the primary while it sends a long record: nobody can replay the half that has come."""
    for _ in range(TRIES):
        primary = trial.cluster.primary()
        sending = _under_way(trial, primary)
        trial.cluster.node(primary).kill()
        sending.result(PATIENCE)
        found = trial.fail_over(accepts_loss=True)
        bring_all_back(trial)
        (caught_up,) = (step for step in found["steps"] if step["step"] == "catch_up")
        if caught_up["half_record_bytes"]:
            return
    raise AssertionError(f"a replica had the whole record each of {TRIES} times")


def replica_killed(trial: Trial) -> None:
    """Kill a replica and start it again; a switchover follows."""
    node = _some_replica(trial)
    node.kill()
    time.sleep(LOADED)
    node.start()
    _switch_in_the_end(trial)


def candidate_killed(trial: Trial) -> None:
    """Kill the candidate somewhere in a switchover."""
    _harmed_in_switchover(trial, _some_replica(trial), LocalNode.kill, LocalNode.start)


def primary_killed_in_switchover(trial: Trial) -> None:
    """Kill the primary somewhere in a switchover."""
    primary = trial.cluster.node(trial.cluster.primary())
    _harmed_in_switchover(
        trial, _some_replica(trial), lambda _: primary.kill(), lambda _: primary.start()
    )


# servers hang


def primary_stopped(trial: Trial) -> None:
    """Let the primary hang: the driver kills it, which is the proof."""
    primary = trial.cluster.primary()
    trial.cluster.node(primary).pause()
    try:
        trial.fail_over(accepts_loss=True)
    finally:
        trial.cluster.node(primary).resume()
    trial.rejoin(primary)


def replica_stopped(trial: Trial) -> None:
    """Let a replica hang for a while."""
    node = _some_replica(trial)
    node.pause()
    time.sleep(2.0)
    node.resume()


def candidate_stopped(trial: Trial) -> None:
    """Let the candidate hang somewhere in a switchover, and go on."""
    _harmed_in_switchover(trial, _some_replica(trial), LocalNode.pause, LocalNode.resume)


def primary_stopped_in_switchover(trial: Trial) -> None:
    """Let the primary hang somewhere in a switchover, and go on."""
    primary = trial.cluster.node(trial.cluster.primary())
    _harmed_in_switchover(
        trial, _some_replica(trial), lambda _: primary.pause(), lambda _: primary.resume()
    )


def slow_disk(trial: Trial) -> None:
    """Switch over while those who write the primary's files work in jerks."""
    with _jerking(trial.cluster.node(trial.cluster.primary())):
        time.sleep(LOADED)
        trial.switch(to=_some_replica(trial).name)


# networks


def cut_from_clients(trial: Trial) -> None:
    """Cut the routers from the primary, then switch over: the operator reaches it."""
    primary = trial.cluster.primary()
    with _turned(trial.cluster.front[primary], State.CUT):
        time.sleep(LOADED)
        trial.switch()


def one_way_from_clients(trial: Trial) -> None:
    """Let the primary hear the routers, or they it, but not both."""
    primary = trial.cluster.primary()
    with _turned(trial.cluster.front[primary], trial.rng.choice((State.DEAF, State.MUTE))):
        time.sleep(2.0)
        trial.switch()


def cut_between_nodes(trial: Trial) -> None:
    """Cut the primary from its replicas for a while: nobody is promoted, all catch up."""
    primary = trial.cluster.primary()
    kind = trial.rng.choice((State.CUT, State.HOLE, State.DEAF, State.MUTE))
    with _turned(trial.cluster.back[primary], kind):
        time.sleep(2.0)
    _switch_in_the_end(trial)


def cut_from_candidate_in_switchover(trial: Trial) -> None:
    """Cut the nodes from each other somewhere in a switchover."""
    primary = trial.cluster.primary()
    kind = trial.rng.choice((State.CUT, State.HOLE, State.DEAF, State.MUTE))
    cable = trial.cluster.back[primary]
    _harmed_in_switchover(
        trial,
        _some_replica(trial),
        lambda _: cable.turn(kind),
        lambda _: cable.turn(State.OPEN),
        timeout=3.0,
    )


# the command


def command_killed(trial: Trial) -> None:
    """Kill the command at any moment of a switchover, then end what it has left."""
    level = trial.rng.choice((Level.L3, Level.L4))
    with Command(trial.cluster, to=_some_replica(trial).name, level=level) as command:
        command.await_begin()
        time.sleep(trial.rng.uniform(0.0, 0.8))
        step = command.kill()
    trial.finish(step)
    bring_all_back(trial)


def failover_killed(trial: Trial) -> None:
    """Kill the command at any moment of a failover, then run it again."""
    primary = trial.cluster.primary()
    trial.cluster.node(primary).kill()
    with Command(trial.cluster, is_failover=True) as command:
        command.await_begin()
        time.sleep(trial.rng.uniform(0.0, 0.3))
        step = command.kill()
    trial.finish(step)
    with contextlib.suppress(OperationRefused):  # it had been finished
        trial.fail_over(accepts_loss=True)
    bring_all_back(trial)


def two_commands(trial: Trial) -> None:
    """Run two switchovers at once, to different nodes: one of them, or both in turn."""
    one, other = trial.cluster.replicas()
    futures = [trial.beside(trial.switch, to=name) for name in (one, other)]
    outcomes = [_outcome(future) for future in futures]
    assert "done" in outcomes, f"neither was done: {outcomes}"
    bring_all_back(trial)


def promotion_in_promotion(trial: Trial) -> None:
    """Begin a switchover while one holds the writes: it is refused, and changes nothing."""
    one, other = trial.cluster.replicas()
    refused: list[str] = []

    def meddle(progress: Progress) -> None:
        if progress.state == "begun" and progress.step.name.value == "fence":
            try:
                commands.promote(trial.cluster.settings, "s0", Wishes(to=other))
            except OperationRefused as error:
                refused.append(str(error))

    commands.promote(trial.cluster.settings, "s0", Wishes(to=one), told=meddle)
    assert refused, "a second switchover was not refused"


def old_primary_returns(trial: Trial) -> None:
    """Start an old primary by hand, as a primary: no router uses it, then it is rejoined."""
    primary = trial.cluster.primary()
    node = trial.cluster.node(primary)
    node.kill()
    trial.fail_over(accepts_loss=True)
    (node.data / "standby.signal").unlink(missing_ok=True)
    _unfence_by_hand(node)
    node.start()
    with psycopg.connect(**node.conninfo, autocommit=True) as connection:
        connection.execute("INSERT INTO written (writer, number) VALUES ('by hand', 1)")
    trial.clients.await_writes(20)
    trial.rejoin(primary)


def bring_all_back(trial: Trial) -> None:
    """Do what an operator does at last: fail over if nobody is the primary, rejoin the rest.

    A replica that has received half a record up to the end of a segment ends itself when it follows
    a new primary, which has other log there (PostgreSQL 18, PANIC); only a new copy helps then.
    """
    cluster = trial.cluster
    for name in cluster.names:
        if not cluster.node(name).is_running:
            with contextlib.suppress(SQLRouteError):
                cluster.node(name).start()

    def has_primary() -> bool:
        return any(place.is_primary for place in cluster.places())

    if not wait_for(has_primary, timeout=5.0, pause=0.1):
        trial.fail_over(accepts_loss=True)
    primary = cluster.primary()
    for name in cluster.names:
        if name != primary:
            _rejoin_in_the_end(trial, name)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        primary_killed, primary_killed_behind_a_cut, primary_killed_with_quorum,
        primary_killed_in_record, primary_killed_in_switchover, primary_stopped,
        primary_stopped_in_switchover, candidate_killed, candidate_stopped, replica_killed,
        replica_stopped, slow_disk, cut_from_clients, one_way_from_clients, cut_between_nodes,
        cut_from_candidate_in_switchover, command_killed, failover_killed, two_commands,
        promotion_in_promotion, old_primary_returns,
    )
}  # fmt: skip

PLANNED = frozenset({
    "slow_disk", "cut_from_clients", "command_killed", "two_commands", "promotion_in_promotion",
    "replica_killed", "replica_stopped", "cut_between_nodes",
})  # fmt: skip
"""Harm in which nothing that was acknowledged may be lost, whoever was told."""


# inside


def _under_way(trial: Trial, primary: str) -> Future[None]:
    """Begin to write one record that takes its time; return when a replica has a part of it."""
    with trial.cluster.connect(_some_replica(trial).name) as replica:
        (end,) = replica.execute(_RECEIVED).fetchone() or (0,)
        sending = trial.beside(_send_long_record, trial, primary)

        def has_part() -> bool:
            (now,) = replica.execute(_RECEIVED).fetchone() or (0,)
            return bool(now > end + _PART)

        assert wait_for(has_part, timeout=PATIENCE, pause=0.001), "nothing of the record has come"
    return sending


def _send_long_record(trial: Trial, node: str) -> None:
    with contextlib.suppress(psycopg.Error), trial.cluster.connect(node) as connection:
        connection.execute(_LONG_RECORD)


def _some_replica(trial: Trial) -> LocalNode:
    return trial.cluster.node(trial.rng.choice(trial.cluster.replicas()))


def _switch_in_the_end(trial: Trial) -> None:
    """Switch over as soon as the preflight allows it."""

    def done() -> bool:
        try:
            trial.switch()
        except OperationRefused:
            return False
        return True

    assert wait_for(done, timeout=PATIENCE, pause=0.3), "no switchover was possible afterwards"


def _harmed_in_switchover(
    trial: Trial,
    candidate: LocalNode,
    harm: Callable[[LocalNode], None],
    mend: Callable[[LocalNode], None],
    *,
    timeout: float = 5.0,
) -> None:
    """Begin a switchover, do harm at some moment, mend it, and end what is left."""
    running = trial.beside(
        trial.switch,
        to=candidate.name,
        timeout=timeout,
        level=trial.rng.choice((Level.L3, Level.L4)),
    )
    time.sleep(trial.rng.uniform(0.05, 0.8))
    harm(candidate)
    time.sleep(trial.rng.uniform(0.2, 2.0))
    mend(candidate)
    trial.say(f"  the switchover: {_outcome(running)[:200]}")
    trial.finish("harmed")
    bring_all_back(trial)


def _outcome(running: Future[Any]) -> str:
    try:
        return str(running.result(120)["outcome"])
    except SQLRouteError as error:
        return f"{type(error).__name__}: {error}"


def _rejoin_in_the_end(trial: Trial, name: str) -> None:
    said: list[str] = []

    def back() -> bool:
        try:
            trial.rejoin(name)
        except (OperationFailed, OperationRefused) as error:
            said.append(str(error))
            return False
        return True

    assert wait_for(back, timeout=PATIENCE, pause=0.5), f"{name} does not come back: {said[-1:]}"


def _unfence_by_hand(node: LocalNode) -> None:
    """Take out of a server's files whatever keeps clients from it, as somebody might."""
    path = node.data / "postgresql.auto.conf"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "sqlroute_fence" not in line))


@contextmanager
def _turned(cable: Cable, state: State) -> Iterator[None]:
    cable.turn(state)
    try:
        yield
    finally:
        cable.turn(State.OPEN)


@contextmanager
def _jerking(node: LocalNode) -> Iterator[None]:
    """Stop and continue the writer processes of a server ten times a second."""
    over = threading.Event()

    def jerk() -> None:
        while not over.is_set():
            found = [p for p in processes.server_processes(node.data) if _writes_files(p.pid)]
            processes.send(signal.SIGSTOP, found)
            time.sleep(0.08)
            processes.send(signal.SIGCONT, found)
            over.wait(0.02)

    thread = threading.Thread(target=jerk)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _writes_files(pid: int) -> bool:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return any(name in title for name in ("walwriter", "checkpointer", "background writer"))
