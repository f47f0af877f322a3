"""The promises of promotions that ``make chaos`` looks at for a long time, for a short one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

import pytest

from sqlroute.local.topology import LocalTopology
from sqlroute.ops.fences import Level
from sqlroute.testing import TopologyFactory

from .promotion import faults
from .promotion.clients import Clients
from .promotion.cluster import Cluster
from .promotion.switchovers import clients_of, one
from .promotion.trial import Leg, Trial

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster(sqlroute_topology_factory: TopologyFactory) -> Iterator[Cluster]:
    topology: LocalTopology = sqlroute_topology_factory(shards=1, replicas=2, label="promotion")
    with Cluster(topology) as cluster:
        yield cluster


@contextmanager
def trial_of(cluster: Cluster, clients: Clients) -> Iterator[Trial]:
    """Give clients at work; their whole history is checked in the end."""
    cluster.empty()
    with Trial(cluster, clients, Random(5)) as trial:
        yield trial
        whole = trial.end()
        assert not whole.broken, "\n".join(whole.evidence())


def test_switchovers_lose_nothing_whatever_clients_do(cluster: Cluster) -> None:
    """3 at L3 and 2 at L4: strangers turn off what asks them not to write, and come back at once.

    Of the requests of routed clients none fails; not one write of anybody is lost.
    """
    with trial_of(cluster, clients_of(cluster, 2)) as trial:
        legs = [one(trial, level) for level in [Level.L3] * 3 + [Level.L4] * 2]

    assert [text for leg in legs for text in leg.evidence()] == []
    assert all(leg.writes and leg.reads and not leg.lost for leg in legs)


def test_weaker_fences_lose_what_strangers_write(cluster: Cluster) -> None:
    """Why the default is L3 and above; and that the checker, and the report, see it."""
    cluster.empty()
    with Trial(cluster, clients_of(cluster, 2), Random(5)) as trial:
        seen = []
        for level in (Level.L1, Level.L2):
            trial.began()
            found = trial.switch(level=level)
            seen.append((found, trial.check(f"at {level.name}")))

    for found, leg in seen:
        (verified,) = (step for step in found["steps"] if step["step"] == "verify")
        assert leg.lost_by_strangers == leg.lost > 0
        assert "lost" in verified["former_wrote"]
        assert not leg.failed


def test_a_failover_loses_no_more_than_it_has_said(cluster: Cluster) -> None:
    suffered(cluster, faults.primary_killed)


def test_a_failover_does_not_wait_for_the_rest_of_a_record(cluster: Cluster) -> None:
    """The primary is lost while it sends a long one: nobody can replay the half that came."""
    suffered(cluster, faults.primary_killed_in_record)


def test_a_killed_command_can_be_finished_or_taken_back(cluster: Cluster) -> None:
    suffered(cluster, faults.command_killed)


def suffered(cluster: Cluster, fault: Callable[[Trial], None]) -> Leg:
    with trial_of(cluster, Clients(cluster.config, writers=2)) as trial:
        trial.began()
        fault(trial)
        leg = trial.check(fault.__name__)

    assert leg.broken == []
    assert leg.writes
    return leg
