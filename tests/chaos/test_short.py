"""The promises that ``make chaos`` looks at for a long time, for a short one."""

from __future__ import annotations

import pytest

from sqlroute.local.topology import LocalTopology
from sqlroute.testing import TopologyFactory

from . import own_writes, requests, token_reads

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def topology(sqlroute_topology_factory: TopologyFactory) -> LocalTopology:
    return sqlroute_topology_factory(shards=1, replicas=2, label="chaos")


def test_a_token_is_never_read_around(topology: LocalTopology) -> None:
    """20,000 reads, of replicas held behind by up to 200 ms: none finds less than its token."""
    report = token_reads.run(topology, 20_000)

    assert report.is_clean, "\n".join(report.lines())
    assert report.reads >= 20_000


def test_what_was_written_is_read_back_by_every_way(topology: LocalTopology) -> None:
    """``get``, ``refresh``, a lazy load, a new session, another process; up to 500 ms behind."""
    report = own_writes.run(topology, 500)

    assert report.is_clean, "\n".join(report.lines())
    assert report.tally.writes == 500
    assert set(report.tally.reads) == {
        "next session", "get", "refresh", "lazy load", "new session", "another process",
    }  # fmt: skip


def test_requests_survive_what_befalls_servers(
    sqlroute_topology_factory: TopologyFactory,
) -> None:
    """FastAPI and Flask, 20 s of replicas in trouble, then the primary stopped."""
    servers = sqlroute_topology_factory(shards=1, replicas=2, label="requests")
    report = requests.run(servers, 20, seed=3)

    assert report.is_clean, "\n".join(report.lines())
    assert sum(report.faults.values()) > 3


def test_stale_reads_are_found_where_tokens_are_ignored(topology: LocalTopology) -> None:
    """The two above can fail: without tokens every way of reading shows them."""
    reads = token_reads.run(topology, 3_000, break_token=True)
    writes = own_writes.run(topology, 300, break_token=True)

    assert not reads.is_clean
    assert not writes.is_clean
    assert reads.tally.failures == writes.tally.failures == []
    assert {one.way.removeprefix("async ") for one in reads.tally.stale} >= {
        "new session", "get", "refresh", "same session",
    }  # fmt: skip
    assert {one.way for one in writes.tally.stale} >= {
        "get", "refresh", "lazy load", "new session", "another process",
    }  # fmt: skip
