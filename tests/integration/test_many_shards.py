"""Promises that hold for any number of shards; here each is a database of the same two servers."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from models import Base, Customer
from sqlalchemy import select

from sqlroute import Keyspace, Node, Router, Shard, Topology
from sqlroute.local.node import LocalNode
from sqlroute.router import TRIES
from sqlroute.routing.policy import Policy
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

SHARDS = TRIES + 1


@pytest.fixture
def router(sqlroute_topology_factory: TopologyFactory) -> Iterator[Router]:
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="many shards").nodes
    with psycopg.connect(**servers[0].conninfo, autocommit=True) as connection:
        for number in range(SHARDS):
            connection.execute(f"CREATE DATABASE many_{number}".encode())
    shards = tuple(shard(number, servers) for number in range(SHARDS))
    with Router(Topology((Keyspace("app", shards, 16),)), Policy(probe_deadline=2.0)) as router:
        router.create_all(Base.metadata)
        yield router


def shard(number: int, servers: tuple[LocalNode, ...]) -> Shard:
    nodes = tuple(
        Node(
            f"s{number}-{letter}",
            server.conninfo["host"],
            server.port,
            f"many_{number}",
            server.user,
            server.password,
        )
        for letter, server in zip("ab", servers, strict=True)
    )
    return Shard(f"s{number}", nodes)


def test_own_writes_on_all_shards_are_read_at_once(router: Router) -> None:
    """Each shard's replica must be proved to have them: that is no change of the servers."""
    statement = select(Customer.id).order_by(Customer.id)
    for turn in range(3):
        keys = list(range(1_000 * turn, 1_000 * turn + 200))
        with router.sessionmaker()() as session:
            session.add_all(Customer(id=key, name="own") for key in keys)
            session.commit()
            assert len(session.token.positions) == SHARDS
            found = session.scalars(statement).all()

        assert [key for key in found if key >= keys[0]] == keys
