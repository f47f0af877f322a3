"""Switchovers on real servers under writers: nothing is lost, nobody sees an error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from promoting import SHARD, Stage

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.operations import Command
from sqlroute.ops import commands
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Progress
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory
from sqlroute.topology import Secret

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def whole_stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="switchovers"))
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Iterator[Stage]:
    yield whole_stage
    whole_stage.mend()


@pytest.mark.parametrize("level", [Level.L4, Level.L3, Level.L2, Level.L1], ids=lambda x: x.name)
def test_a_switchover_loses_nothing_and_fails_nobody(stage: Stage, level: Level) -> None:
    """At each level, for programs that keep to the rules; all nodes end on the new timeline."""
    former = stage.primary

    with stage.writing() as written:
        report = stage.promote(level=level)

    assert written.is_whole, written
    assert (report.outcome, report.fence) == ("done", level)
    assert report.change.former == former
    assert report.write_pause_ms is not None
    assert report.acknowledged["present"] is True
    assert report.document()["steps"][-1]["step"] == "close"
    assert stage.taking_writes() == [report.change.candidate]
    stage.await_whole(report.change.epoch)


def test_a_users_command_is_the_fence_of_level_5(stage: Stage, tmp_path: Path) -> None:
    """It is told whom to fence; the end of the server is marked before, under L3."""
    note = tmp_path / "fenced"
    hook = Command(tuple(Secret(word) for word in ("sh", "-c", f"echo {{node}} >> {note}")))
    settings = stage.with_driver(fence=hook, unfence=hook)
    former = stage.primary

    with stage.writing() as written:
        report = stage.promote(settings, level=Level.L5)

    assert written.is_whole, written
    assert (report.outcome, report.fence) == ("done", Level.L5)
    assert note.read_text().split() == [former]
    stage.await_whole(report.change.epoch)


def test_a_switchover_with_a_failing_hook_is_taken_back(stage: Stage) -> None:
    settings = stage.with_driver(fence=Command((Secret("false"),)))
    former = stage.primary

    with stage.writing() as written, pytest.raises(OperationFailed, match="everything was taken"):
        stage.promote(settings, level=Level.L5)

    assert written.is_whole, written
    assert stage.primary == former
    stage.await_whole()


def test_hooks_that_stop_and_start_are_enough(stage: Stage, tmp_path: Path) -> None:
    """Nobody can read the control file then: its end is marked before it is stopped."""
    node = stage.nodes[stage.primary]
    ctl = f"{node.pg_bin}/pg_ctl -D {node.data.parent}/{{node}} -s"
    hook = {
        "stop": f"{ctl} -w -m fast stop",
        "start": f"{ctl} -w -l {tmp_path}/log -o '-p {{port}} -c cluster_name={{node}}' start",
        "status": f"{ctl} status",
    }
    run_as = ("runuser", "-u", node.account.name, "--") if node.account.switches else ()
    words = {
        verb: Command(tuple(Secret(word) for word in (*run_as, "sh", "-c", line)))
        for verb, line in hook.items()
    }
    tmp_path.chmod(0o777)
    settings = stage.with_driver(kind="hook", **words)

    with stage.writing() as written:
        report = stage.promote(settings, level=Level.L4)

    assert written.is_whole, written
    assert report.fence is Level.L4
    assert set(report.waiting) == {report.change.former}  # nobody could configure it
    assert stage.taking_writes() == [report.change.candidate]


def test_without_any_driver_the_former_primary_stays_fenced(stage: Stage) -> None:
    """L3 is the strongest in SQL; it stays up until somebody can reach the machine."""
    former = stage.primary

    with stage.writing() as written:
        report = stage.promote(stage.without_drivers)

    assert written.is_whole, written
    assert report.fence is Level.L3
    assert f"sqlroute rejoin {former}" in report.waiting[former]
    assert report.outcome == "done"
    with pytest.raises(psycopg.OperationalError, match="sqlroute_fence_epoch_"):
        stage.client(former)
    with pytest.raises(OperationRefused, match=r"no driver.*\[drivers\]"):
        stage.rejoin(former, stage.without_drivers)
    assert stage.rejoin(former)["way"] == "rewind"
    stage.await_whole(report.change.epoch)


def test_synchronous_names_are_kept_through_a_fence(stage: Stage) -> None:
    """The former primary has them again as a replica, whether L2 or L3 was its fence."""
    former = stage.primary
    names = 'ANY 1 ("s0-a", "s0-b", "s0-c")'
    stage.tell(former, f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    stage.tell(former, "SELECT pg_reload_conf()")
    try:
        with stage.writing() as written:
            stage.promote(level=Level.L3)

        assert written.is_whole, written
        assert stage.ask(former, "SHOW synchronous_standby_names") == names
    finally:
        for name in stage.nodes:
            stage.tell(name, "ALTER SYSTEM RESET synchronous_standby_names")
            stage.tell(name, "SELECT pg_reload_conf()")


QUORUM = 'synchronous_standby_names = \'ANY 1 ("s0-a", "s0-b", "s0-c")\''


@pytest.mark.parametrize("before", ["none", "by ALTER SYSTEM", "in postgresql.conf"])
def test_all_is_as_before_when_a_switchover_is_taken_back(stage: Stage, before: str) -> None:
    """Also the quorum that its commits wait for: the fence gives it back where it was set."""
    former = stage.primary
    file = stage.nodes[former].data / "postgresql.conf"
    text = file.read_text()
    if before == "by ALTER SYSTEM":
        stage.tell(former, f"ALTER SYSTEM SET {QUORUM}")
    elif before == "in postgresql.conf":
        file.write_text(f"{text}\n{QUORUM}\n")
    stage.tell(former, "SELECT pg_reload_conf()")
    (candidate, *_) = stage.replicas
    files = "SELECT jsonb_object_agg(name, setting) FROM pg_file_settings"
    settings = stage.ask(former, files)

    def pause(progress: Progress) -> None:
        if (progress.step.name, progress.state) == ("fence", "done"):
            stage.nodes[candidate].pause_replay()

    wishes = Wishes(to=candidate, level=Level.L3, timeout=1.0)
    try:
        with stage.writing() as written, pytest.raises(OperationFailed) as failed:
            commands.promote(stage.settings, SHARD, wishes, told=pause)

        stage.nodes[candidate].resume_replay()
        assert "everything was taken back" in str(failed.value)
        assert not failed.value.operation
        assert written.is_whole, written
        assert stage.ask(former, files) == settings
        assert stage.unended() == []
        assert stage.primary == former
        stage.await_whole()
    finally:
        file.write_text(text)
        stage.tell(former, "ALTER SYSTEM RESET synchronous_standby_names")
        stage.tell(former, "SELECT pg_reload_conf()")


@pytest.mark.parametrize("point", [("fence", "done"), ("promote", "begun")], ids="-".join)
def test_the_way_back_does_not_need_the_candidate(stage: Stage, point: tuple[str, str]) -> None:
    """It dies before it promotes: the former primary goes on, and it can only follow that."""
    former, (candidate, *_) = stage.primary, stage.replicas

    def kill(progress: Progress) -> None:
        if (progress.step.name, progress.state) == point:
            stage.nodes[candidate].kill()

    with stage.writing() as written, pytest.raises(OperationFailed, match="was taken back"):
        commands.promote(stage.settings, SHARD, Wishes(to=candidate, timeout=3.0), told=kill)

    assert written.is_whole, written
    assert stage.taking_writes() == [former]
    assert stage.unended() == []
    stage.nodes[candidate].start()
    stage.await_whole()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_who_is_told_can_go_away(stage: Stage, error: type[BaseException]) -> None:
    """Ctrl-C, or a pipe that nobody reads any more, leaves no writes held."""
    former = stage.primary

    def leave(progress: Progress) -> None:
        if (progress.step.name, progress.state) == ("fence", "done"):
            raise error

    with stage.writing() as written, pytest.raises(error):
        commands.promote(stage.settings, SHARD, Wishes(), told=leave)

    assert written.is_whole, written
    assert stage.taking_writes() == [former]
    assert stage.unended() == []
    stage.await_whole()


def test_a_cascading_replica_follows_its_source_through_the_switchover(stage: Stage) -> None:
    """Nobody repoints it, and it gets the row of the journal from the new primary."""
    (middle, last) = stage.replicas
    with stage.server(last) as server:
        server.follow("127.0.0.1", stage.nodes[middle].port)
    assert wait_for(lambda: stage.look().facts[last].upstream == middle, timeout=10, pause=0.05)

    with stage.writing() as written:
        report = stage.promote(to=middle)

    assert written.is_whole, written
    assert report.change.siblings == ()
    assert last in next(s for s in report.steps if s["step"] == "verify")["replayed"]
    stage.await_whole(report.change.epoch)


def test_slots_are_carried_over(stage: Stage) -> None:
    """Replicas that have slots have them on the new primary; none is left on the former one."""
    former = stage.primary
    names = {name: name.replace("-", "_") for name in stage.replicas}
    with stage.server(former) as server:
        for slot in names.values():
            server.create_slot(slot)
    for name, slot in names.items():
        with stage.server(name) as server:
            server.follow("127.0.0.1", stage.nodes[former].port, slot)
    active = "SELECT count(*) FROM pg_replication_slots WHERE active"
    assert wait_for(lambda: stage.ask(former, active) == 2, timeout=10, pause=0.05)

    report = stage.promote()

    stage.await_whole(report.change.epoch)
    assert stage.ask(report.change.candidate, active) == 2
    assert stage.ask(former, "SELECT count(*) FROM pg_replication_slots") == 0
    new = report.change.candidate
    for name in stage.replicas:
        with stage.server(name) as server:
            server.follow("127.0.0.1", stage.nodes[new].port)
    with stage.server(new) as server:
        slots = [slot["slot_name"] for slot in server.rows("SELECT * FROM pg_replication_slots")]
        assert wait_for(
            lambda: not server.rows("SELECT FROM pg_replication_slots WHERE active"), timeout=10
        )
        server.drop_slots(slots)


def test_slots_that_were_made_are_dropped_on_the_way_back(stage: Stage) -> None:
    """They would keep the candidate's log for ever."""
    former, (candidate, sibling) = stage.primary, stage.replicas
    with stage.server(former) as server:
        server.create_slot("kept")
    with stage.server(sibling) as server:
        server.follow("127.0.0.1", stage.nodes[former].port, "kept")
    settings = stage.with_driver(fence=Command((Secret("false"),)))

    with pytest.raises(OperationFailed, match="was taken back"):
        stage.promote(settings, to=candidate, level=Level.L5)

    assert stage.ask(candidate, "SELECT count(*) FROM pg_replication_slots") == 0
    assert stage.ask(sibling, "SHOW primary_slot_name") == "kept"
    with stage.server(sibling) as server:
        server.follow("127.0.0.1", stage.nodes[former].port)
    with stage.server(former) as server:
        assert wait_for(
            lambda: not server.rows("SELECT FROM pg_replication_slots WHERE active"), timeout=10
        )
        server.drop_slots(["kept"])


def test_the_timeline_is_known_before_the_control_file_says_it(stage: Stage) -> None:
    """pg_control_checkpoint shows the old one for seconds; a second switchover does not wait."""
    first = stage.promote()
    second = stage.promote()

    assert second.change.epoch == first.change.epoch + 1
    assert (second.change.former, second.outcome) == (first.change.candidate, "done")
    stage.await_whole(second.change.epoch)


def test_long_transactions_are_ended_by_the_drain(stage: Stage) -> None:
    """Their time is --max-drain; the others go on."""
    with contextlib.closing(stage.client(stage.primary)) as idle:
        idle.execute("BEGIN")
        idle.execute("SELECT pg_current_xact_id()")
        with stage.writing() as written:
            began = time.monotonic()
            report = stage.promote(max_drain=0.5)
            took = time.monotonic() - began

        assert written.is_whole, written
        hold: Any = next(step for step in report.steps if step["step"] == "hold")
        assert hold["late"] == 1
        assert 500 <= hold["ms"] < 1500
        assert took < 20
        with pytest.raises(psycopg.OperationalError):
            idle.execute("COMMIT")
    stage.await_whole(report.change.epoch)
