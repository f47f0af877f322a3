"""Promises of create_all and the catalog: owned leaves only, and a map that is read as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import Shop
from models import Base, Customer
from sqlalchemy import select

from sqlroute import (
    CatalogError,
    InvalidShardKey,
    NoPrimary,
    Router,
    ShardMap,
    Topology,
    reference_table,
    sharded_by,
)
from sqlroute.catalog import install, maps
from sqlroute.topology import Keyspace, Shard

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

LEAVES = """
SELECT p.relname, c.relname FROM pg_inherits i
  JOIN pg_class p ON p.oid = i.inhparent JOIN pg_class c ON c.oid = i.inhrelid
 WHERE p.relkind = 'p' ORDER BY 1, 2
"""


@pytest.fixture
def metadata(shop: Shop) -> Iterator[sa.MetaData]:
    """Tables of a test, dropped at its end."""
    metadata = sa.MetaData()
    yield metadata
    shop.router.drop_all(metadata)


class TestTables:
    def test_a_shard_has_the_leaves_it_owns(self, shop: Shop) -> None:
        """Every bucket's leaf exists once, on the shard that the map says; references nowhere."""
        owners = shop.router.shard_map().owners
        sharded = {"customer", "order", "document", "setting", "reading"}
        for shard in ("s0", "s1"):
            expected = {
                (table, f"{table}_b{bucket:03d}")
                for table in sharded
                for bucket, owner in enumerate(owners)
                if owner == shard
            }
            leaves = {(p, c) for p, c in shop.on(shard, LEAVES) if "_b" in c and p in sharded}
            assert leaves == expected
            kinds = dict(
                shop.on(
                    shard,
                    "SELECT relname, relkind::text FROM pg_class WHERE relname IN "
                    "('country', 'rate', 'customer')",
                )
            )
            assert kinds == {"country": "r", "rate": "r", "customer": "p"}

    def test_the_database_refuses_a_misrouted_row(self, shop: Shop) -> None:
        """Whoever sends it: SQLSTATE 23514."""
        foreign = shop.keys("s1")[0]
        with pytest.raises(psycopg.errors.CheckViolation, match="no partition of relation"):
            shop.on("s0", f"INSERT INTO customer (id, name) VALUES ({foreign}, 'x')")

    def test_a_second_create_all_changes_nothing(self, shop: Shop) -> None:
        """Neither relations nor rows nor the epoch."""
        shop.add(Customer(id=1, name="x"))
        state = "SELECT oid, relname FROM pg_class ORDER BY oid"
        before = [shop.on(shard, state) for shard in ("s0", "s1")], shop.router.shard_map()
        shop.router.create_all(Base.metadata)

        after = [shop.on(shard, state) for shard in ("s0", "s1")], shop.router.shard_map()
        assert before == after

    def test_a_new_table_is_added(self, shop: Shop, metadata: sa.MetaData) -> None:
        """With odd names, a schema of its own, indexes, and a foreign key to a colocated table."""
        for shard in ("s0", "s1"):
            shop.on(shard, 'CREATE SCHEMA IF NOT EXISTS "Other"')
        sa.Table(
            'We"ird % Table' + "x" * 45,
            metadata,
            sa.Column("Key %", sa.Text, primary_key=True, key="k"),
            sa.Column("v", sa.Integer, index=True),
            schema="Other",
            **sharded_by("Key %"),
        )
        sa.Table(
            "child",
            metadata,
            sa.Column("customer_id", sa.BigInteger, primary_key=True),
            sa.Column("n", sa.Integer, sa.Identity(), primary_key=True),
            **sharded_by("customer_id"),
        )
        shop.router.create_all(metadata)
        shop.router.create_all(metadata)
        weird = next(t for t in metadata.sorted_tables if t.schema)
        with shop.router.sessionmaker()() as session:
            session.execute(sa.insert(weird), [{"k": f"k{i}", "v": i} for i in range(20)])
            session.commit()
            assert session.scalar(select(sa.func.sum(weird.c.v))) == 190
            assert session.scalar(select(weird.c.v).where(weird.c.k == "k7")) == 7

    @pytest.mark.parametrize("fault", ["primary key", "unique", "unique index", "no type"])
    def test_keys_that_cannot_work_are_refused(
        self, shop: Shop, metadata: sa.MetaData, fault: str
    ) -> None:
        """Before anything is created, naming table and key."""
        parts: dict[str, list[Any]] = {
            "primary key": [sa.Column("id", sa.Integer, primary_key=True), sa.Column("k", sa.Text)],
            "unique": [
                sa.Column("k", sa.Text, primary_key=True),
                sa.Column("u", sa.Text, unique=True),
            ],
            "unique index": [
                sa.Column("k", sa.Text, primary_key=True),
                sa.Column("u", sa.Text),
                sa.Index("only_u", "u", unique=True),
            ],
            "no type": [sa.Column("k", sa.Date, primary_key=True)],
        }
        sa.Table(
            "fine", metadata, sa.Column("id", sa.Integer, primary_key=True), **reference_table()
        )
        sa.Table("bad", metadata, *parts[fault], **sharded_by("k"))

        with pytest.raises(InvalidShardKey, match="bad"):
            shop.router.create_all(metadata)
        assert shop.on("s0", "SELECT to_regclass('fine')") == [(None,)]


class TestCatalog:
    def test_an_upgrade_is_idempotent(self, shop: Shop) -> None:
        """Run twice, and by two at once."""
        from concurrent.futures import ThreadPoolExecutor

        def upgrade(_: int) -> None:
            with shop.router.primary_engine("s0").begin() as connection:
                install.upgrade(connection)

        before = shop.on("s0", "SELECT oid FROM pg_class ORDER BY 1")
        shard_map = shop.router.shard_map()
        upgrade(0)
        upgrade(1)
        assert shop.on("s0", "SELECT oid FROM pg_class ORDER BY 1") == before
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: shop.router.install_catalog(), range(2)))
        assert shop.router.shard_map() == shard_map

    def test_the_map_is_read_as_it_was_written(self, shop: Shop) -> None:
        """The highest epoch of any shard wins; an older map never replaces a newer one."""
        keyspace = Keyspace("other", shop.router.topology.default.shards, 8)
        first = ShardMap.even(keyspace)
        nodes = [node for shard in keyspace.shards for node in shard.nodes if node.name[-1] == "a"]
        try:
            for shard in ("s0", "s1"):
                self.write(shop, shard, first)
            assert maps.read_newest(keyspace, nodes, 3.0) == first
            second = first.moved(3, "s0")
            self.write(shop, "s1", second)
            assert maps.read_newest(keyspace, nodes, 3.0) == second
            self.write(shop, "s1", first)
            assert maps.read_newest(keyspace, nodes, 3.0) == second
        finally:
            for shard in ("s0", "s1"):
                shop.on(shard, "DELETE FROM sqlroute.bucket WHERE keyspace = 'other'")
                shop.on(shard, "DELETE FROM sqlroute.keyspace WHERE name = 'other'")

    def write(self, shop: Shop, shard: str, shard_map: ShardMap) -> None:
        with shop.router.primary_engine(shard).begin() as connection:
            maps.write(shard_map, connection)

    def test_a_router_follows_the_epoch(
        self, shop: Shop, make_router: Callable[..., Router]
    ) -> None:
        """A new map is used once the probes have seen its epoch."""
        from conftest import until

        router = make_router(map_lease=0.5, probe_interval=0.1)
        known = router.shard_map()
        newer = replace(known, epoch=known.epoch + 1)
        for shard in ("s0", "s1"):
            self.write(shop, shard, newer)

        def epoch() -> int:
            return router.explain(select(Customer).where(Customer.id == 1)).epoch

        assert until(lambda: epoch() == newer.epoch, 5) < 3
        with shop.router.sessionmaker()() as session:  # the others too
            assert session.scalar(select(sa.func.count()).select_from(Customer)) == 0

    def test_a_wrong_number_of_buckets_is_refused(self, shop: Shop) -> None:
        """The number is fixed for life; the error names both."""
        found = shop.router.topology.default
        with Router(Topology((replace(found, buckets=32),))) as router:
            with pytest.raises(CatalogError, match="32 buckets in the configuration and 64"):
                router.shard_map()
            with (
                router.sessionmaker()() as session,
                pytest.raises(CatalogError, match="fixed for life"),
            ):
                session.execute(select(Customer))

    def test_a_node_of_another_cluster_is_refused(self, shop: Shop) -> None:
        """A replica of s1 listed under s0 gets no reads; status says why."""
        found = shop.router.topology.default
        s0, s1 = found.shards
        mixed = Shard("s0", (s0.nodes[0], s1.nodes[1]))
        with Router(Topology((Keyspace("solo", (mixed,)),))) as router:
            with router.sessionmaker()() as session:
                for _ in range(10):
                    port = session.scalar(select(sa.func.inet_server_port()))
                    assert shop.node(port or 0) == "s0-a"
                    session.rollback()
            assert "system identifier" in router.health().of(s1.nodes[1].name).refused

    def test_no_server_is_a_typed_error(self, shop: Shop) -> None:
        """Nothing listens: NoPrimary names the nodes, within the time to connect."""
        node = replace(shop.router.topology.default.shards[0].nodes[0], port=1, name="nobody")
        topology = Topology((Keyspace("solo", (Shard("s0", (node,)),)),))
        policy = replace(shop.router.policy, connect_timeout=1.0)
        with (
            Router(topology, policy) as router,
            router.sessionmaker()() as session,
            pytest.raises(NoPrimary, match="nobody"),
        ):
            session.execute(select(1))
