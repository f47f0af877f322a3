"""Promises of round trips: counted on the wire, so they hold on any machine."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import insert

import sqlroute
from sqlroute.testing import TopologyFactory

from .servers import Account, Base
from .trips import TIMES, WARM, Counted, count, count_async

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def counted(sqlroute_topology_factory: TopologyFactory) -> Counted:
    """What each kind of session needs, on a primary and a replica."""
    topology = sqlroute_topology_factory(shards=1, replicas=1, label="round trips")
    with sqlroute.Router.from_config(topology.config_path) as router:
        router.create_all(Base.metadata)
        with router.sessionmaker()() as session:
            rows = [{"id": i, "name": "old"} for i in range(WARM + TIMES)]
            session.execute(insert(Account), rows)
            session.commit()
            (position,) = session.token.positions
        while any(n.lsn < position.lsn for n in router.monitor.ask("s0", 1.0).replicas("s0")):
            time.sleep(0.01)
    return {**count(topology), **asyncio.run(count_async(topology))}


@pytest.mark.parametrize("flavour", ["", "async "])
class TestRoundTrips:
    def test_a_read_needs_one(self, counted: Counted, flavour: str) -> None:
        """A plain session needs three: BEGIN, SELECT, ROLLBACK."""
        assert counted[f"{flavour}routed read"] == [1] * TIMES
        assert counted[f"{flavour}plain read"] == [3] * TIMES

    @pytest.mark.parametrize("what", ["write", "flush"])
    def test_a_write_knows_its_token_for_nothing(
        self, counted: Counted, flavour: str, what: str
    ) -> None:
        """BEGIN with the write, COMMIT with the token; a plain session sends BEGIN by itself."""
        assert counted[f"{flavour}routed {what}"] == [2] * TIMES
        assert counted[f"{flavour}plain {what}"] == [3] * TIMES

    def test_the_check_of_a_stale_object_costs_one(self, counted: Counted, flavour: str) -> None:
        """Read, BEGIN with the check, write, COMMIT: in all as many as of a plain session."""
        assert counted[f"{flavour}plain change"] == [4] * TIMES
        assert counted[f"{flavour}routed change"] == [4] * TIMES
