"""Failovers on real servers: proof first, then what may be lost, then the promotion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from holding import writing
from promoting import SHARD, Promoting, Stage, kill_at

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.ops import commands, resuming
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Report
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

WRITERS = 3


@pytest.fixture(scope="module")
def whole_stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="failover"))
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Iterator[Stage]:
    whole_stage.mend()
    yield whole_stage
    for node in whole_stage.nodes.values():
        node.resume()


def lose(stage: Stage, entries: int) -> str:
    """Let the primary acknowledge what no replica has, then kill it; return its name."""
    primary, replicas = stage.primary, stage.replicas
    for name in replicas:
        stage.nodes[name].stop()
    for number in range(entries):
        stage.doors.do(writing(stage.shop, f"lost-{time.monotonic_ns()}-{number}"))
    # the replicas' monitors tell what this router has acknowledged: it must be connected to them
    stage.nodes[primary].kill()
    for name in replicas:
        stage.nodes[name].start()
    return primary


def await_router(stage: Stage) -> None:
    """Wait until a replica hears from the router what it has acknowledged."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'sqlroute monitor seen%'"
    )
    name = stage.replicas[0]
    assert wait_for(lambda: stage.ask(name, query), timeout=10, pause=0.05)


def test_a_failover_after_kill_9_keeps_all_that_replicas_have(stage: Stage) -> None:
    """The primary is proved to be gone by its driver; its next start is that of a standby."""
    former = stage.primary

    with stage.writing(WRITERS) as written:
        stage.nodes[former].kill()
        report = stage.failover(accepts_loss=True)

    assert (report.outcome, report.fence) == ("done", Level.L4)
    assert report.change.candidate == stage.primary
    assert written.twice == []
    assert len(written.errors) <= WRITERS  # what was under way as it died; nobody fails twice
    assert report.loss is not None
    assert f"sqlroute rejoin {former}" in report.waiting[former]
    stage.nodes[former].start()  # by whoever: it is a standby
    assert stage.taking_writes() == [report.change.candidate]
    assert stage.rejoin(former)["node"] == former
    stage.await_whole(report.change.epoch)


def test_a_shard_of_two_nodes_quarantines_its_old_primary(
    sqlroute_topology_factory: TopologyFactory,
) -> None:
    """There is no sibling to repoint; the old primary must not come back as one all the same."""
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=1, label="failover of two"))
    former = stage.primary
    stage.nodes[former].kill()

    report = stage.failover(accepts_loss=True)
    stage.nodes[former].start()

    assert stage.taking_writes() == [report.change.candidate]
    stage.close()


def test_a_primary_that_hangs_is_killed_for_proof(stage: Stage) -> None:
    """Its replicas still say that they stream; a driver that can kill it needs no more."""
    former = stage.primary

    with stage.writing(WRITERS) as written:
        stage.nodes[former].pause()
        report = stage.failover(accepts_loss=True)

    assert report.fence is Level.L4
    assert not stage.nodes[former].is_paused
    assert written.lost == []
    assert stage.rejoin(former)["node"] == former
    stage.await_whole(report.change.epoch)


def test_without_a_driver_a_primary_that_hangs_may_live(stage: Stage) -> None:
    """Refused; forced, its clients are stopped by routers, then by a fence, then by its rejoin."""
    former, settings = stage.primary, stage.without_drivers
    before = time.monotonic()
    stage.nodes[former].pause()

    with pytest.raises(OperationRefused, match=r"may still receive from .*--force"):
        stage.failover(settings, accepts_loss=True)
    assert time.monotonic() - before < 20
    report = stage.failover(settings, accepts_loss=True, force=True)
    stage.nodes[former].resume()

    assert report.fence is Level.NONE
    assert "NOT fenced" in report.waiting[former]
    assert stage.primary == report.change.candidate
    for _ in range(5):  # the router never takes the old one for the primary
        stage.doors.do(writing(stage.shop, f"forced-{time.monotonic_ns()}"))
    query = "SELECT count(*) FROM public.entry WHERE id LIKE 'forced-%'"
    assert stage.ask(report.change.candidate, query) == 5
    assert stage.ask(former, query) == 0
    assert former in stage.taking_writes()
    assert commands.fence(settings, former, waits=5)["fence"] == "L3"
    assert stage.taking_writes() == [report.change.candidate]
    with pytest.raises(OperationRefused, match=f"sqlroute rejoin {former}"):
        commands.unfence(settings, former)
    assert stage.rejoin(former)["way"] == "rewind"
    stage.await_whole(report.change.epoch)


def test_a_silent_replica_may_still_receive(stage: Stage) -> None:
    """Nobody knows what it acknowledges; with the primary seen dead it is of no concern."""
    former, (silent, _) = stage.primary, stage.replicas
    stage.nodes[silent].pause()
    stage.nodes[former].kill()

    with pytest.raises(OperationRefused, match=f"{silent} does not answer either"):
        stage.failover(stage.without_drivers, accepts_loss=True)
    report = stage.failover(accepts_loss=True)

    assert report.outcome == "incomplete"
    assert f"sqlroute rejoin {silent}" in report.waiting[silent]
    stage.nodes[silent].resume()
    assert stage.rejoin(silent)["node"] == silent


def test_a_node_that_is_wanted_catches_up_from_the_one_that_has_most(stage: Stage) -> None:
    former, (wanted, other) = stage.primary, stage.replicas
    stage.nodes[wanted].stop()
    for number in range(5):
        stage.doors.do(writing(stage.shop, f"most-{former}-{number}"))
    query = f"SELECT count(*) FROM public.entry WHERE id LIKE 'most-{former}-%'"
    assert wait_for(lambda: stage.ask(other, query) == 5, timeout=10, pause=0.02)
    stage.nodes[former].kill()
    stage.nodes[wanted].start()

    report = stage.failover(to=wanted, accepts_loss=True)

    assert report.change.candidate == stage.primary == wanted
    assert stage.ask(wanted, query) == 5
    stage.rejoin(former)
    stage.await_whole(report.change.epoch)


def test_a_quorum_proves_that_nothing_is_lost(stage: Stage) -> None:
    """ANY 1 of two: both must be asked, and one has every commit. Known from the files."""
    former, (one, two) = stage.primary, stage.replicas
    names = f'ANY 1 ("{one}", "{two}")'
    stage.tell(former, f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    stage.tell(former, "SELECT pg_reload_conf()")

    with stage.writing(WRITERS) as written:
        stage.nodes[former].kill()
        report = stage.failover()  # no word of accepting a loss

    assert report.loss is not None
    assert "nothing acknowledged is lost" in report.loss.text
    assert "2 of 2 were asked (needed: 2)" in report.loss.quorum
    assert written.lost == []
    assert len(written.errors) <= WRITERS
    stage.rejoin(former)
    stage.tell(former, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")


def test_a_quorum_that_cannot_be_asked_proves_nothing(stage: Stage) -> None:
    """One of two is down: it may be the one that has the last commit."""
    former, (one, two) = stage.primary, stage.replicas
    stage.nodes[one].stop()
    stage.nodes[former].kill()
    wishes = Wishes(synchronous=f'ANY 1 ("{one}", "{two}")')

    plan = commands.plan_failover(stage.settings, SHARD, wishes)

    assert "nothing acknowledged is lost" not in next(
        check.text for check in plan.checks if check.name == "loss"
    )


def test_a_loss_is_bounded_before_it_is_accepted(stage: Stage) -> None:
    """More than the bound is refused, and all is as before; what is lost is below what was said."""
    former = lose(stage, 20)
    await_router(stage)

    with pytest.raises(OperationRefused, match=r"up to \d+ bytes are lost.*--accept-data-loss"):
        stage.failover()
    assert all(stage.look().follows.values())  # the replicas still want to receive
    plan = commands.plan_failover(stage.settings, SHARD, Wishes(accepts_loss=True))
    report = stage.failover(max_loss_bytes=1 << 20)

    assert plan.refusals == ()
    assert report.loss is not None
    assert report.loss.known_bytes is not None
    assert 20 * 100 < report.loss.known_bytes < 1 << 20
    lost = "SELECT count(*) FROM public.entry WHERE id LIKE 'lost-%'"
    assert stage.ask(report.change.candidate, lost) == 0  # 20 rows: no more than was said
    assert report.acknowledged["present"] is False
    assert stage.rejoin(former)["way"] == "rewind"
    stage.await_whole(report.change.epoch)


def test_an_interrupted_failover_can_be_undone(stage: Stage) -> None:
    """The replicas receive again, also from a primary that has come back in the meantime."""
    former = stage.primary
    stage.nodes[former].kill()
    kill_at(stage, Promoting("failover", wishes=(("accepts_loss", True),)), "choose", "done")
    assert stage.unended() == [f"failover-{SHARD}"]
    stage.nodes[former].start()
    assert stage.unended() == [f"failover-{SHARD}"]

    with pytest.raises(OperationRefused, match=f"op abort failover-{SHARD}"):
        stage.gives_way(stage.failover)
    found = stage.gives_way(lambda: resuming.abort(stage.settings, f"failover-{SHARD}"))

    assert sorted(found["repointed"]) == sorted(set(stage.nodes) - {former})
    assert stage.unended() == []
    stage.await_whole()
    assert stage.primary == former


def test_a_failover_that_has_promoted_cannot_be_undone(stage: Stage) -> None:
    """Pointing its siblings back would leave them with a dead primary."""
    stage.nodes[stage.primary].kill()
    kill_at(stage, Promoting("failover", wishes=(("accepts_loss", True),)), "promote", "done")

    with pytest.raises(OperationFailed, match=f"op resume failover-{SHARD}"):
        stage.gives_way(lambda: resuming.abort(stage.settings, f"failover-{SHARD}"))
    report = resuming.resume(stage.settings, f"failover-{SHARD}")

    assert isinstance(report, Report)
    assert report.outcome == "done"


def test_of_two_failovers_one_is_refused(stage: Stage) -> None:
    """They meet at the locks of the replicas; one epoch begins."""
    epoch = stage.look().epoch
    stage.nodes[stage.primary].kill()

    def fail_over(_: int) -> str:
        try:
            return stage.failover(accepts_loss=True).outcome
        except OperationRefused as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(fail_over, range(2)))

    assert found[1] == "done"
    assert "another command works" in found[0] or "is the primary" in found[0]
    assert stage.look().epoch == epoch + 1


def test_a_failover_supersedes_an_abandoned_switchover(stage: Stage) -> None:
    """The primary died under it: its record ends as failed, its hold goes with the new epoch."""
    former = stage.primary
    kill_at(stage, Promoting("promote", wishes=(("level", Level.L3),)), "fence", "done")
    (operation,) = stage.unended()
    stage.nodes[former].kill()

    with stage.writing(WRITERS) as written:
        report = stage.gives_way(lambda: stage.failover(accepts_loss=True))

    assert written.is_whole, written
    assert stage.unended() == []
    assert resuming.show_operation(stage.settings, operation)["state"] == "failed"
    assert stage.rejoin(former)["node"] == former
    stage.await_whole(report.change.epoch)
