"""Commands killed by SIGKILL on both sides of every step, while programs write.

After each of them ``op list`` shows it, and it is gone on with or taken back: nothing is lost, no
write fails, one node takes writes, all others have the journal's row. A run covers each point of a
switchover once, going on and going back by turns, and the begin of each step of the others;
``SQLROUTE_SWEEP=full`` covers both sides of every step and both ways, at L3 too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from promoting import Promoting, Stage, kill_at, points

from sqlroute.errors import OperationFailed
from sqlroute.ops import commands, resuming
from sqlroute.ops.fences import Level
from sqlroute.ops.promotion import Report
from sqlroute.testing import TopologyFactory, free_ports

IS_FULL = os.environ.get("SQLROUTE_SWEEP") == "full"

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

PLANNED = (
    *("record", "checkpoint", "repoint", "hold", "fence", "catch_up"),
    *("promote", "announce", "verify", "rejoin", "close"),
)
UNPLANNED = (
    *("prove", "blank", "choose", "fence", "catch_up"),
    *("promote", "announce", "repoint", "verify", "close"),
)
BACK = ("restore", "unfence", "release", "point_back", "close")
ADDING = ("reserve", "copy", "start", "verify", "announce")

NOTHING_YET = {("record", "begun")}
ALL_DONE = {("close", "done")}
PROMOTED = set(points(PLANNED[PLANNED.index("promote") + 1 :])) | {("promote", "done")}
covered: list[str] = []


@pytest.fixture(scope="module")
def stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="sweep"))
    yield stage
    stage.close()
    print(f"\ncrash sweep: {len(covered)} points: {'; '.join(covered)}")


def _others(steps: tuple[str, ...]) -> list[tuple[str, str]]:
    return points(steps) if IS_FULL else [(step, "begun") for step in steps]


def _planned() -> Iterator[tuple[str, str, str, Level]]:
    for number, (step, state) in enumerate(points(PLANNED)):
        ways = ("resume", "abort") if IS_FULL else (("resume", "abort")[number % 2],)
        for way in ways:
            yield step, state, way, Level.L4
        if IS_FULL or step == "fence":
            for way in ("resume", "abort"):
                yield step, state, way, Level.L3


@pytest.mark.parametrize(("step", "state", "way", "level"), list(_planned()))
def test_a_switchover_killed_at_any_step_can_be_ended(
    stage: Stage, step: str, state: str, way: str, level: Level
) -> None:
    stage.mend()
    former, epoch = stage.primary, stage.look().epoch
    point = (step, state)

    with stage.writing(2) as written:
        kill_at(stage, Promoting("promote", wishes=(("level", level),)), step, state)
        unended = stage.unended()
        assert len(unended) == (point not in NOTHING_YET | ALL_DONE), unended
        if unended:
            _end(stage, unended[0], way, is_promoted=point in PROMOTED)

    goes_back = point in NOTHING_YET or (way == "abort" and point not in PROMOTED)
    assert written.is_whole, written
    assert (stage.primary == former) is goes_back
    assert stage.taking_writes() == [stage.primary]
    assert stage.unended() == []
    stage.await_whole(epoch if goes_back else epoch + 1)
    covered.append(f"{level.name} {step} {state} {way}")


def _end(stage: Stage, operation: str, way: str, *, is_promoted: bool) -> None:
    if way == "abort" and is_promoted:
        with pytest.raises(OperationFailed, match=f"op resume {operation}"):
            stage.gives_way(lambda: resuming.abort(stage.settings, operation))
        way = "resume"
    do = resuming.resume if way == "resume" else resuming.abort
    report = stage.gives_way(lambda: do(stage.settings, operation))
    assert isinstance(report, Report)
    assert report.outcome == ("done" if way == "resume" else "aborted")


@pytest.mark.parametrize(("step", "state"), _others(BACK))
def test_the_way_back_killed_at_any_step_can_be_ended(stage: Stage, step: str, state: str) -> None:
    """It is taken back again, or gone on with: the other way is still open."""
    stage.mend()
    former = stage.primary

    with stage.writing(2) as written:
        kill_at(stage, Promoting("promote"), "catch_up", "done")
        (operation,) = stage.unended()
        kill_at(stage, Promoting("abort", (operation,)), step, state)
        way = resuming.resume if step == "unfence" else resuming.abort
        if (step, state) != ("close", "done"):
            stage.gives_way(lambda: way(stage.settings, operation))

    assert written.is_whole, written
    assert (stage.primary == former) is (way is resuming.abort)
    assert stage.taking_writes() == [stage.primary]
    assert stage.unended() == []
    stage.await_whole()
    covered.append(f"abort {step} {state}")


@pytest.mark.parametrize(("step", "state"), _others(UNPLANNED))
def test_a_failover_killed_at_any_step_can_be_ended(stage: Stage, step: str, state: str) -> None:
    """By resuming it, also where no node could write it down."""
    stage.mend()
    former, epoch = stage.primary, stage.look().epoch
    stage.nodes[former].kill()

    kill_at(stage, Promoting("failover", wishes=(("accepts_loss", True),)), step, state)
    unended = stage.unended()
    if (step, state) in {("prove", "begun"), ("prove", "done"), ("blank", "begun")}:
        assert unended == []  # nothing was changed but what was dead already
        stage.gives_way(lambda: stage.failover(accepts_loss=True))
    elif (step, state) != ("close", "done"):
        (operation,) = unended
        stage.gives_way(lambda: resuming.resume(stage.settings, operation))

    assert stage.unended() == []
    assert stage.taking_writes() == [stage.primary]
    assert stage.primary != former
    assert stage.rejoin(former)["node"] == former
    stage.await_whole(epoch + 1)
    covered.append(f"failover {step} {state}")


def _adding() -> Iterator[tuple[str, str]]:
    for number, step in enumerate(ADDING):
        yield step, ("resume", "abort")[number % 2]
        if IS_FULL or step == "announce":
            yield step, ("resume", "abort")[1 - number % 2]


@pytest.mark.parametrize(("step", "way"), list(_adding()))
def test_an_addition_killed_at_any_step_can_be_ended(stage: Stage, step: str, way: str) -> None:
    stage.mend()
    name, port = f"s0-{step}-{way}", free_ports(1)
    node = f"127.0.0.1:{port}"

    kill_at(stage, Promoting("add", (name, node)), step, "begun")
    (operation,) = stage.unended()
    do = resuming.resume if way == "resume" else resuming.abort
    stage.gives_way(lambda: do(stage.settings, operation))

    assert stage.unended() == []
    look = stage.look()
    assert (name in look.facts) is (way == "resume")
    if way == "resume":
        assert look.facts[name].is_replica
        commands.remove_replica(stage.settings, name)
    assert stage.ask(stage.primary, "SELECT count(*) FROM pg_replication_slots") == 0
    covered.append(f"add {step} {way}")
