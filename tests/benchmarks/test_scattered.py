"""Promises of reads over several shards that hold on any machine: what is fetched, what is held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import insert

import sqlroute
from sqlroute import Router
from sqlroute.testing import TopologyFactory

from .pairs import Figure
from .scattered import fetched_for_pages
from .servers import ROWS, Account, Base, Bench
from .streams import SHARDS, fill, held_while_streaming

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

STREAMED = 100_000


@pytest.fixture(scope="module")
def filled(sqlroute_topology_factory: TopologyFactory) -> Iterator[Bench]:
    """Four shards with the accounts and a few events."""
    topology = sqlroute_topology_factory(shards=SHARDS, replicas=0, label="scattered")
    with sqlroute.Router.from_config(topology.config_path) as router:
        router.create_all(Base.metadata)
        with router.sessionmaker()() as session:
            session.execute(insert(Account), [{"id": i, "name": f"{i}"} for i in range(ROWS)])
            session.commit()
        made = Bench(topology, router, _shards(router))
        fill(made, STREAMED)
        yield made


def _shards(router: Router) -> dict[int, str]:
    table = Base.metadata.tables["account"]
    return {i: router.locate(table, (i,))[1] for i in range(ROWS)}


def test_a_page_is_fetched_from_each_shard_up_to_its_end_at_most(filled: Bench) -> None:
    with filled.router.sessionmaker()() as session:
        found: Figure = fetched_for_pages(session)

    assert found.is_met, found.notes


def test_a_stream_in_order_holds_no_more_at_its_end(filled: Bench) -> None:
    """All rows of it would be some 30 MiB."""
    with filled.router.sessionmaker()() as session:
        found: Figure = held_while_streaming(session, STREAMED)

    assert found.is_met, found.notes
