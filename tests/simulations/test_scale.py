"""Promises about sizes that no test machine has, at a tenth of the size of the page."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sqlroute.routing.policy import Policy

from .losing import replicas_lost, zone_lost
from .pooling import connections
from .probing import primary_returns, probes

BUDGET = Policy(connections_per_node=200, replicas_per_process=1)


@pytest.mark.parametrize("processes", [1, 5, 50, 150])
def test_probes_of_a_node_stay_under_their_rate(processes: int) -> None:
    found = probes(processes, Policy(probe_rate=20.0), Random(1), seconds=160)

    assert found.worst <= 20.0


def test_few_monitors_probe_at_their_interval() -> None:
    """Nothing is stretched that need not be."""
    found = probes(5, Policy(probe_rate=20.0, probe_interval=0.5), Random(1))

    assert found.pause == pytest.approx(0.5, rel=0.1)


def test_connections_of_a_node_stay_within_their_budget() -> None:
    found = connections(50, 100, BUDGET, Random(1), seconds=20)

    assert found.primary <= 200
    assert found.replica <= 200
    assert found.waited < 0.05  # what the shard that hangs is sent


def test_without_a_budget_connections_grow_with_the_processes() -> None:
    """The simulation is able to break the promise."""
    found = connections(50, 100, Policy(), Random(1), seconds=20)

    assert found.primary > 200


def test_processes_are_spread_over_the_replicas() -> None:
    fewest, most = connections(50, 100, BUDGET, Random(1), seconds=1).processes_per_replica

    assert fewest >= 30
    assert most <= 70


def test_lost_zone_does_not_overload_the_rest() -> None:
    """Where one of two replicas is left it takes the reads of both, and no primary takes any."""
    found = zone_lost(60, Random(1))

    assert found.after <= 2.0
    assert found.by_primaries == 0.0


def test_reads_stay_in_their_zone() -> None:
    """Two thirds can: in the zone of its primary a shard has no replica."""
    assert zone_lost(60, Random(1)).at_home == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_primary_takes_its_share_of_the_former_reads(share: float) -> None:
    """However often clients ask again."""
    policy = Policy(primary_fallback_share=share, primary_fallback_free=0.0)
    found = replicas_lost(5, policy)

    assert found.by_primary <= found.before * share * 1.05
    assert found.by_primary >= found.before * share * 0.9


def test_small_programs_do_not_notice_the_share() -> None:
    found = replicas_lost(2, Policy(), rate=200.0)

    assert found.by_primary == pytest.approx(found.asked)


def test_primary_that_comes_back_is_not_stampeded() -> None:
    policy = Policy(connections_per_node=0)
    found = primary_returns(100, policy, Random(1))
    at_once = primary_returns(100, replace(policy, probe_rate=1e9), Random(1), seconds=5)

    assert sum(found.per_second[:1]) <= 0.2 * 100 * 15
    assert found.found <= 2.0
    assert at_once.found <= 0.7
