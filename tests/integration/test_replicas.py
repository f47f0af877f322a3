"""Replicas that are added and removed while programs work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from promoting import SHARD, Stage

from sqlroute.errors import OperationRefused
from sqlroute.ops import commands
from sqlroute.ops.replicas import place
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="replicas"))
    yield stage
    stage.close()


def add(stage: Stage, name: str, **options: Any) -> dict[str, Any]:
    address = f"127.0.0.1:{free_ports(1)}"
    return commands.add_replica(stage.settings, SHARD, place(name, address), **options)


def knows(stage: Stage, name: str) -> bool:
    return name in [node.name for node in stage.router.topology.shard(SHARD).nodes]


def test_a_replica_is_added_announced_promoted_and_removed(stage: Stage) -> None:
    """Routers that run take it up, lose nothing, and forget it again."""
    said: list[str] = []
    counts: list[tuple[int, int]] = []

    with stage.writing() as written:
        found = add(stage, "s0-x", say=said.append, counted=lambda *at: counts.append(at))
        assert wait_for(lambda: knows(stage, "s0-x"), timeout=10, pause=0.05)
        report = stage.promote(to="s0-x")
        back = stage.promote(to=report.change.former)
        commands.remove_replica(stage.settings, "s0-x")
        assert wait_for(lambda: not knows(stage, "s0-x"), timeout=10, pause=0.05)

    assert written.is_whole, written
    assert said == ["reserve", "copy", "start", "verify", "announce"]
    assert counts
    assert found["source"] in report.change.siblings  # a replica was copied, not the primary
    assert (report.outcome, back.outcome) == ("done", "done")
    assert "s0-x" not in stage.look().facts
    assert stage.ask(stage.primary, "SELECT count(*) FROM pg_replication_slots") == 0
    stage.await_whole()


def test_a_replica_has_a_slot_where_its_siblings_have_one(stage: Stage) -> None:
    primary, sibling = stage.primary, stage.replicas[0]
    with stage.server(primary) as server:
        server.create_slot("of_sibling")
    with stage.server(sibling) as server:
        server.follow("127.0.0.1", stage.nodes[primary].port, "of_sibling")
    active = "SELECT count(*) FROM pg_replication_slots WHERE active"
    assert wait_for(lambda: stage.ask(primary, active) == 1, timeout=10, pause=0.05)

    add(stage, "s0-y")
    assert wait_for(lambda: stage.ask(primary, active) == 2, timeout=10, pause=0.05)
    commands.remove_replica(stage.settings, "s0-y")

    slots = "SELECT string_agg(slot_name, ',') FROM pg_replication_slots"
    assert stage.ask(primary, slots) == "of_sibling"
    with stage.server(sibling) as server:
        server.follow("127.0.0.1", stage.nodes[primary].port)
    with stage.server(primary) as server:
        assert wait_for(lambda: not stage.ask(primary, active), timeout=10, pause=0.05)
        server.drop_slots(["of_sibling"])


@pytest.mark.parametrize(
    ("name", "address", "why"),
    [
        ("s0-b", "127.0.0.1:{free}", "has a node s0-b already; `sqlroute rejoin s0-b"),
        ("bad name", "127.0.0.1:{free}", "is no name of a node"),
        ("s0-z", "127.0.0.1:{used}", "is node s0-a already"),
    ],
)
def test_an_addition_that_cannot_be_is_refused(
    stage: Stage, name: str, address: str, why: str
) -> None:
    before = stage.snapshot()
    where = address.format(free=free_ports(1), used=stage.nodes["s0-a"].port)

    with pytest.raises(OperationRefused, match=why):
        commands.add_replica(stage.settings, SHARD, place(name, where))

    assert stage.snapshot() == before


def test_an_addition_without_a_driver_is_refused(stage: Stage) -> None:
    before = stage.snapshot()
    new = place("s0-z", f"127.0.0.1:{free_ports(1)}")

    with pytest.raises(OperationRefused, match=r"no driver.*\[drivers\]"):
        commands.add_replica(stage.without_drivers, SHARD, new)
    with pytest.raises(OperationRefused, match="s0-q cannot be copied"):
        commands.add_replica(stage.settings, SHARD, new, source="s0-q")

    assert stage.snapshot() == before


def test_an_address_is_host_and_port() -> None:
    with pytest.raises(OperationRefused, match="write it as"):
        place("s0-z", "a:b:c")


def test_who_is_needed_is_not_removed(stage: Stage) -> None:
    """The primary, a source of others, and one without which no commit would return."""
    primary, (middle, last) = stage.primary, stage.replicas
    with stage.server(last) as server:
        server.follow("127.0.0.1", stage.nodes[middle].port)
    names = f'ANY 1 ("{last}")'
    stage.tell(primary, f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    stage.tell(primary, "SELECT pg_reload_conf()")

    with pytest.raises(OperationRefused, match=f"{primary} is the primary"):
        commands.remove_replica(stage.settings, primary)
    with pytest.raises(OperationRefused, match=f"{last} follow.*{middle}"):
        commands.remove_replica(stage.settings, middle)
    with pytest.raises(OperationRefused, match="every commit would hang"):
        commands.remove_replica(stage.settings, last)

    stage.tell(primary, "ALTER SYSTEM RESET synchronous_standby_names", "SELECT pg_reload_conf()")
    stage.rejoin(last)
    stage.await_whole()
