"""Nodes that come back as replicas: started, rewound, or copied anew; never with a fence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from holding import writing
from promoting import Stage

from sqlroute.errors import DriverError, OperationFailed, OperationRefused
from sqlroute.ops import commands
from sqlroute.ops.fences import Level, fence_name
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

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
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="rejoin"))
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Stage:
    whole_stage.mend()
    return whole_stage


@pytest.mark.parametrize("pg_bin", VERSIONS)
def test_a_primary_that_went_past_the_fork_is_rewound(
    sqlroute_topology_factory: TopologyFactory, pg_bin: Path | None
) -> None:
    """Also right after the promotion, when 15's control file still shows the old timeline."""
    stage = Stage(
        sqlroute_topology_factory(shards=1, replicas=1, pg_bin=pg_bin, label="rejoin after fork")
    )
    former = stage.primary
    stage.nodes[former].kill()
    report = stage.failover(stage.without_drivers, accepts_loss=True)
    stage.nodes[former].start()  # by whoever, as the primary that it was
    with stage.client(former) as connection:
        connection.execute("CREATE TABLE astray AS SELECT generate_series(1, 1000) AS n")

    found = stage.rejoin(former)

    assert found["way"] == "rewind"
    assert stage.ask(former, "SELECT to_regclass('public.astray') IS NULL")
    assert stage.ask(former, "SELECT max(epoch) FROM sqlroute.journal") == report.change.epoch
    stage.await_whole(report.change.epoch)
    stage.close()


def test_a_replica_is_followed_or_started(stage: Stage) -> None:
    """What is well stays as it is; what is down or hangs comes up again."""
    name = stage.replicas[0]

    assert stage.rejoin(name)["way"] == "follow"
    stage.nodes[name].stop()
    assert stage.rejoin(name)["way"] == "start"
    stage.nodes[name].pause()
    assert stage.rejoin(name)["way"] == "start"
    stage.await_whole()


def test_a_node_without_data_is_only_cloned_where_that_is_asked_for(stage: Stage) -> None:
    name = stage.replicas[0]
    node = stage.nodes[name]
    node.stop()
    shutil.rmtree(node.data)
    counts: list[tuple[int, int]] = []

    with pytest.raises(OperationFailed, match=r"sqlroute rejoin .* --clone"):
        stage.rejoin(name, timeout=5.0)
    found = stage.rejoin(name, clones=True, counted=lambda done, of: counts.append((done, of)))

    assert found["way"] == "clone"
    assert counts[-1][0] > 0
    stage.await_whole()


def test_a_node_that_follows_nobody_is_pointed_at_the_primary(stage: Stage) -> None:
    """By whoever stopped its receiver; nothing is copied."""
    name = stage.replicas[0]
    with stage.server(name) as server:
        server.stop_receiving()
        assert wait_for(lambda: server.receiver() is None, timeout=10)

    found = stage.rejoin(name)

    assert found["way"] == "start"
    stage.await_whole()


@pytest.mark.parametrize("level", [Level.L1, Level.L2, Level.L3], ids=lambda level: level.name)
def test_a_fence_does_not_travel_with_a_copy(stage: Stage, level: Level) -> None:
    """pg_basebackup copies postgresql.auto.conf, and with it the fence of its source."""
    primary, name = stage.primary, stage.replicas[0]
    node = stage.nodes[name]
    node.stop()
    commands.fence(stage.settings, primary, level=level)
    shutil.rmtree(node.data)

    stage.rejoin(name, clones=True)

    with stage.client(name) as connection:
        assert connection.execute("SHOW session_preload_libraries").fetchone() == ("",)
        assert connection.execute("SHOW default_transaction_read_only").fetchone() == ("off",)
        assert connection.execute("SHOW synchronous_standby_names").fetchone() == ("",)
    commands.unfence(stage.settings, primary)
    assert stage.taking_writes() == [primary]
    stage.await_whole()


def test_a_fence_that_came_with_a_copy_is_found_and_removed(stage: Stage) -> None:
    """One that was made by hand: it is no candidate before."""
    name = stage.replicas[0]
    stage.tell(
        name,
        f"ALTER SYSTEM SET session_preload_libraries = '{fence_name(3)}'",
        "SELECT pg_reload_conf()",
    )

    with pytest.raises(OperationRefused, match=f"sqlroute unfence {name}"):
        stage.promote(to=name)
    assert commands.unfence(stage.settings, name)["settings"] == ["session_preload_libraries"]

    stage.client(name).close()
    assert stage.ask(name, "SELECT count(*) FROM pg_file_settings WHERE setting ~ 'fence'") == 0
    stage.await_whole()


def test_the_primary_cannot_be_rejoined(stage: Stage) -> None:
    primary = stage.primary
    before = stage.snapshot()

    with pytest.raises(OperationRefused, match="promote another node first"):
        stage.rejoin(primary)

    assert stage.snapshot() == before


def test_nothing_is_rejoined_to_a_shard_without_a_primary(stage: Stage) -> None:
    """There would be nobody to follow: failover first."""
    primary, name = stage.primary, stage.replicas[0]
    stage.nodes[primary].stop()

    with pytest.raises(OperationRefused, match="sqlroute failover s0 --dry-run"):
        stage.rejoin(name)

    stage.nodes[primary].start()
    stage.await_whole()


def test_an_error_names_every_way_that_was_tried(stage: Stage) -> None:
    """Its programs are not there: neither starting nor copying works."""
    name = stage.replicas[0]
    stage.nodes[name].stop()
    settings = stage.with_driver(bin="/nowhere/bin")

    with pytest.raises((OperationFailed, DriverError), match=r"/nowhere/bin|did not come back"):
        stage.rejoin(name, settings, timeout=3.0)

    assert stage.rejoin(name)["way"] == "start"
    stage.await_whole()


@pytest.mark.parametrize("pg_bin", VERSIONS)
def test_a_primary_that_crashes_right_after_its_promotion_is_rewound(
    sqlroute_topology_factory: TopologyFactory, pg_bin: Path | None
) -> None:
    """pg_rewind of 15 goes by the timeline in its control file, which is there by a checkpoint."""
    stage = Stage(
        sqlroute_topology_factory(shards=1, replicas=2, pg_bin=pg_bin, label="rejoin after crash")
    )
    first = stage.primary
    stage.nodes[first].kill()
    second = stage.failover(accepts_loss=True).change.candidate
    stage.doors.do(writing(stage.shop, "before its crash"))
    stage.nodes[second].kill()

    report = stage.failover(accepts_loss=True)

    assert stage.rejoin(second)["way"] == "rewind"
    assert stage.rejoin(first)["node"] == first
    stage.await_whole(report.change.epoch)
    stage.close()
