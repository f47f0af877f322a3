"""All 22 queries of TPC-H through a sharded session give exactly one server's answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import tpch
from coordinated import BUCKETS, Coordinated, coordinated
from sqlalchemy import text

from sqlroute.local.node import LocalNode
from sqlroute.ops import coordinator
from sqlroute.routing.rows import bucket_of_key
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def filled(
    sqlroute_topology_factory: TopologyFactory,
    sqlroute_single: LocalNode,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Coordinated]:
    directory = tmp_path_factory.mktemp("tpch")
    tpch.generate(directory)
    servers = sqlroute_topology_factory(shards=2, replicas=0, label="tpch")
    for shop in coordinated(servers, sqlroute_single, "tpch_coordinator", tpch.metadata):
        fill(shop, directory)
        coordinator.refresh(shop.router)
        yield shop


def fill(shop: Coordinated, directory: Path) -> None:
    """Give each shard its rows, past the router, and the judge all of them."""
    shard_map = shop.router.shard_map()

    def owner(table: sa.Table, key: int) -> str:
        if table.name in ("nation", "region"):
            return ""
        name = next(iter(table.columns)).name
        return shard_map.owner(bucket_of_key(table, {name: key}, BUCKETS))

    for shard in ("s0", "s1"):
        conninfo = shop.servers.shard(shard).nodes[0].conninfo
        tpch.copy(directory, conninfo, lambda t, key, s=shard: owner(t, key) in ("", s))
    tpch.copy(
        directory, {**shop.host.conninfo, "dbname": f"{shop.database}_judge"}, lambda *_: True
    )


@pytest.mark.parametrize("number", tpch.QUERIES)
def test_the_answer_is_that_of_one_server(
    filled: Coordinated, number: int, record_property: pytest.RecordProperty
) -> None:
    """Rows in their order, names and types; the ratio of the times goes into the report."""
    statement = text(tpch.QUERIES[number]).execution_options(sqlroute_tier="coordinator")
    began = time.perf_counter()
    with filled.judge.connect() as plain:
        expected = plain.execute(statement)
        names, rows = list(expected.keys()), expected.all()
    alone = time.perf_counter() - began
    began = time.perf_counter()
    with filled.router.sessionmaker()() as session:
        found = session.execute(statement)
        answer = found.all()
    record_property("ratio", (time.perf_counter() - began) / alone)

    assert list(found.keys()) == names
    assert [tuple(row) for row in answer] == [tuple(row) for row in rows]
    assert [list(map(type, row)) for row in answer] == [list(map(type, row)) for row in rows]
