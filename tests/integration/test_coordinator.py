"""Promises of the coordinator: exact answers of PostgreSQL itself, or an error that helps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until
from coordinated import BUCKETS, Coordinated, coordinated
from models import Base, Country, Customer, Order, Setting
from psycopg import sql
from sqlalchemy import func, orm, select, text
from sqlalchemy import inspect as sa_inspect

from sqlroute import (
    CrossShardRefused,
    DeadlineExceeded,
    NoPrimary,
    RoutingSession,
    UnknownName,
    reference_table,
)
from sqlroute.catalog import maps
from sqlroute.cli import main
from sqlroute.errors import (
    CatalogError,
    CoordinatorDenied,
    CoordinatorMissing,
    CoordinatorStale,
    CoordinatorUnavailable,
    OperationRefused,
    TooManyRows,
)
from sqlroute.local.node import LocalNode
from sqlroute.operations import Operations, Operator
from sqlroute.ops import coordinator
from sqlroute.testing import TopologyFactory, free_ports
from sqlroute.topology import Secret, ShardMap

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

CUSTOMERS = [
    {
        "id": i,
        "name": ("Zoë", "anna", "Bob", "émile", "zed", "")[i % 6],
        "country_code": ("at", "be", None)[i % 3],
        "score": None if i % 7 == 0 else i % 11,
    }
    for i in range(1, 61)
]
ORDERS = [
    {"customer_id": 1 + (i * 7) % 60, "id": i, "amount": Decimal(i * i % 97) / 4}
    for i in range(1, 201)
]
COUNTRIES = [{"code": code, "name": name} for code, name in (("at", "Austria"), ("be", "Belgium"))]


@pytest.fixture(scope="module")
def _shop(
    sqlroute_topology_factory: TopologyFactory, sqlroute_single: LocalNode
) -> Iterator[Coordinated]:
    servers = sqlroute_topology_factory(shards=2, replicas=1, label="coordinated")
    yield from coordinated(servers, sqlroute_single, "shop_coordinator", Base.metadata)


@pytest.fixture
def shop(_shop: Coordinated) -> Iterator[Coordinated]:
    """The shop, filled; the coordinator fresh, its connections given back at the end."""
    _shop.empty()
    _shop.fill({"country": COUNTRIES, "customer": CUSTOMERS, "order": ORDERS})
    yield _shop
    engines = _shop.router.coordinators(is_async=False)._engines.values()
    assert sum(engine.pool.checkedout() for engine in engines) == 0  # type: ignore[attr-defined]


@pytest.fixture
def session(shop: Coordinated) -> Iterator[RoutingSession]:
    with shop.router.sessionmaker()() as session:
        yield session


other = orm.aliased(Customer)
own = orm.aliased(Order)
_mean = select(func.avg(Customer.score)).scalar_subquery()
_few = Customer.id < 12
_ordered = select(func.sum(own.amount)).where(own.id == Customer.id).scalar_subquery()
_first = select(Customer.id, Customer.score).where(Customer.score < 4)
_second = select(Customer.id, Customer.score).where(Customer.score > 2)
_tree = select(sa.literal(1).label("n")).cte("tree", recursive=True)
_tree = _tree.union_all(select(_tree.c.n + 1).where(_tree.c.n < 5))
_lateral = (
    select(Order.id, Order.amount)
    .where(Order.id > Customer.id)
    .order_by(Order.id)
    .limit(2)
    .lateral("l")
)
STATEMENTS: dict[str, Any] = {
    "join off the key": select(Customer.id, Order.id, Order.amount)
    .join(Order, Order.id == Customer.id)
    .order_by(Customer.id),
    "outer join off the key": select(Customer.id, Order.amount)
    .outerjoin(Order, Order.id == Customer.id * 10)
    .order_by(Customer.id, Order.amount),
    "self join": select(Customer.id, other.id)
    .join(other, other.score == Customer.score)
    .order_by(Customer.id, other.id),
    "count(DISTINCT)": select(func.count(sa.distinct(Customer.name))),
    "count(DISTINCT) by group": select(
        Customer.country_code, func.count(sa.distinct(Customer.score)), func.count()
    )
    .group_by(Customer.country_code)
    .order_by(Customer.country_code.nulls_first()),
    "percentiles": select(
        func.percentile_cont(0.5).within_group(Order.amount),
        func.percentile_disc(0.9).within_group(Order.amount.desc()),
        func.mode().within_group(Customer.name),
    )
    .select_from(Customer)
    .join(Order, Order.id == Customer.id),
    "window": select(
        Customer.id,
        func.rank().over(partition_by=Customer.country_code, order_by=Customer.score.desc()),
        func.lag(Customer.name).over(order_by=Customer.id),
    ).order_by(Customer.id),
    "ROLLUP": select(
        Customer.country_code, Customer.score, func.count(), func.grouping(Customer.score)
    )
    .group_by(func.rollup(Customer.country_code, Customer.score))
    .order_by(text("1, 2, 3, 4")),
    "CUBE": select(Customer.country_code, Customer.name, func.sum(Customer.score))
    .group_by(func.cube(Customer.country_code, Customer.name))
    .order_by(text("1, 2, 3")),
    "GROUPING SETS": select(Customer.country_code, Customer.name, func.avg(Customer.score))
    .group_by(
        func.grouping_sets(sa.tuple_(Customer.country_code), sa.tuple_(Customer.name), sa.tuple_())
    )
    .order_by(text("1, 2, 3")),
    "subquery": select(Customer.id).where(Customer.score > _mean).order_by(Customer.id),
    "correlated subquery": select(Customer.id, _ordered).where(_few).order_by(Customer.id),
    "recursive CTE": select(_tree.c.n, Customer.id)
    .join(Customer, Customer.score == _tree.c.n)
    .order_by(_tree.c.n, Customer.id),
    "EXCEPT": _first.except_(_second).order_by("id"),
    "INTERSECT": _first.intersect(_second).order_by("id"),
    "LATERAL": select(Customer.id, _lateral.c.id, _lateral.c.amount)
    .join(_lateral, sa.true())
    .where(_few)
    .order_by(Customer.id, _lateral.c.id),
    "reference table in a join off the key": select(Country.name, func.count(sa.distinct(Order.id)))
    .select_from(Customer)
    .join(Country, Country.code == Customer.country_code)
    .join(Order, Order.id == Customer.id)
    .group_by(Country.name)
    .order_by(Country.name),
    "text": text(
        "SELECT name, count(DISTINCT score) FROM customer WHERE score > :least "
        "GROUP BY name ORDER BY name"
    ).bindparams(least=2),
}


class TestAnswers:
    @pytest.mark.parametrize("name", STATEMENTS)
    def test_the_answer_is_that_of_one_server(
        self, shop: Coordinated, session: RoutingSession, name: str
    ) -> None:
        """Rows, their order, names and types of columns."""
        statement = STATEMENTS[name]
        with orm.Session(shop.judge) as plain:
            expected = plain.execute(statement)
            names, rows = list(expected.keys()), expected.all()

        assert session.explain(statement).tier.value == "coordinator"
        found = session.execute(statement)
        assert list(found.keys()) == names
        answer = found.all()
        assert answer == rows
        assert [list(map(type, row)) for row in answer] == [list(map(type, row)) for row in rows]
        assert rows

    def test_an_empty_table_has_an_empty_answer(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        shop.empty()

        assert session.execute(STATEMENTS["self join"]).all() == []
        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 0

    def test_an_error_of_the_statement_is_postgres_own(self, session: RoutingSession) -> None:
        """And the session goes on."""
        statement = select(func.count(sa.distinct(1 / (Customer.score - Customer.score))))
        with pytest.raises(sa.exc.DataError, match="division by zero"):
            session.execute(statement)

        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_under_asyncio(self, shop: Coordinated) -> None:
        async def ran() -> tuple[Any, Any]:
            async with shop.router.async_sessionmaker()() as session:
                found = await session.scalars(
                    select(Customer).where(Customer.score > _mean).order_by(Customer.id)
                )
                first = found.all()[0]
                tokens = sa_inspect(first).identity_token
                return await session.scalar(STATEMENTS["count(DISTINCT)"]), (first.id, tokens)

        async def whole() -> tuple[Any, Any]:
            try:
                return await ran()
            finally:
                await shop.router.coordinators(is_async=True).aclose()
                await shop.router.engines(is_async=True).aclose()

        count, (key, token) = asyncio.run(whole())
        assert count == 6
        assert token == shop.shard_of(key)

    def test_settings_of_the_session_count(self, shop: Coordinated) -> None:
        """What depends on a setting is computed where the setting is."""
        statement = text("SELECT count(DISTINCT id), min(to_timestamp(score)::text) FROM customer")
        with shop.router.sessionmaker()(settings={"TimeZone": "Asia/Tokyo"}) as session:
            assert session.execute(statement).one() == (60, "1970-01-01 09:00:00+09")
        with shop.router.sessionmaker()() as session:
            assert session.execute(statement).scalars("min").one() != "1970-01-01 09:00:00+09"


class TestEntities:
    def test_an_entity_knows_its_shard(self, shop: Coordinated, session: RoutingSession) -> None:
        """Both of a pair whose halves live on different shards, each found again by its key."""
        pairs = session.execute(
            select(Customer, other).join(other, other.id == Customer.id + 1).order_by(Customer.id)
        ).all()
        tokens = [tuple(sa_inspect(each).identity_token for each in pair) for pair in pairs]

        assert ("s0", "s1") in tokens
        for pair, token in zip(pairs, tokens, strict=True):
            for each, shard in zip(pair, token, strict=True):
                assert shop.shard_of(each.id) == shard
                assert session.get(Customer, each.id) is each

    def test_an_entity_that_is_there_is_the_same(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        known = session.get(Customer, shop.keys("s1")[0])

        found = session.scalars(select(Customer).where(Customer.score > _mean - 100)).all()
        assert sum(each is known for each in found) == 1
        assert len(set(map(id, found))) == len({each.id for each in found})

    def test_an_entity_goes_home(self, shop: Coordinated, session: RoutingSession) -> None:
        """Changed, refreshed, its collection loaded: all on its own shard."""
        found = session.scalars(
            select(Customer).where(Customer.score > _mean).order_by(Customer.id)
        ).all()
        for each in found:
            each.name = f"new {each.id}"
        session.commit()

        for each in found:
            session.refresh(each)
            assert each.name == f"new {each.id}"
            assert {order.customer_id for order in each.orders} <= {each.id}
        shards = [shop.shard_of(each.id) for each in found]
        for each, shard in zip(found, shards, strict=True):
            stored = shop.on(shard, f"SELECT name FROM customer WHERE id = {each.id}")
            assert stored == [(f"new {each.id}",)]

    @pytest.mark.parametrize("load", [orm.joinedload, orm.selectinload, orm.subqueryload])
    def test_collections_are_loaded_with_it(
        self, shop: Coordinated, session: RoutingSession, load: Any
    ) -> None:
        statement = select(Customer).where(Customer.score > _mean).order_by(Customer.id)
        with orm.Session(shop.judge) as plain:
            expected = [
                (each.id, [order.id for order in each.orders]) for each in plain.scalars(statement)
            ]
        found = session.scalars(statement.options(load(Customer.orders))).unique().all()
        session.rollback()
        shops = [(each.id, [order.id for order in each.__dict__["orders"]]) for each in found]

        assert shops == expected
        orders = [order for each in found for order in each.__dict__["orders"]]
        assert all(
            sa_inspect(order).identity_token == sa_inspect(order.customer).identity_token
            for order in orders
        )

    def test_a_collection_of_merged_objects_may_need_it(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """The shards answer the statement, the coordinator what an eager loader makes of it."""
        statement = (
            select(Customer)
            .order_by(Customer.id)
            .limit(5)
            .options(orm.subqueryload(Customer.orders))
        )
        with orm.Session(shop.judge) as plain:
            expected = [
                (each.id, [order.id for order in each.orders]) for each in plain.scalars(statement)
            ]

        found = session.scalars(statement).all()
        assert [(each.id, [order.id for order in each.orders]) for each in found] == expected

    def test_reference_entities_have_a_shard_that_has_them(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """The one in the session, if there is one."""
        known = session.get(Country, "be")
        found = session.execute(
            select(Country, Order)
            .select_from(Customer)
            .join(Country, Country.code == Customer.country_code)
            .join(Order, Order.id == Customer.id)
            .order_by(Order.id)
        ).all()

        countries = {row.Country.code: row.Country for row in found}
        assert countries["be"] is known
        countries["at"].name = "Österreich"
        session.commit()
        for shard in ("s0", "s1"):
            assert shop.on(shard, "SELECT name FROM country WHERE code = 'at'") == [("Österreich",)]

    def test_an_outer_join_without_a_row_gives_none(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        rows = session.execute(
            select(Customer, Order).outerjoin(Order, Order.id == Customer.id + 1_000)
        ).all()

        assert len(rows) == 60
        assert all(row.Order is None for row in rows)

    def test_an_entity_without_its_key_is_refused(self, session: RoutingSession) -> None:
        """Mapped to a primary key that does not say the shard."""
        registry = orm.registry()

        class Numbered:
            pass

        registry.map_imperatively(Numbered, Order.__table__, primary_key=[Order.__table__.c.id])
        numbered = orm.aliased(Numbered)
        statement = select(numbered).where(
            numbered.amount > select(func.avg(Order.amount)).scalar_subquery()  # type: ignore[attr-defined]
        )
        with pytest.raises(CrossShardRefused, match="does not contain the shard key"):
            session.scalars(statement).all()
        registry.dispose()

        assert session.scalar(select(func.count(sa.distinct(Order.id)))) == 200


def made(session: Any) -> int:
    """Count the customers that the session holds."""
    return sum(isinstance(each, Customer) for each in session.identity_map.values())


class TestStreams:
    """All rows are fetched at once; their objects are made batch by batch."""

    above = select(Customer).where(Customer.score > _mean - 100).order_by(Customer.id)

    def test_objects_are_made_when_their_batch_is_asked_for(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        with orm.Session(shop.judge) as plain:
            expected = [each.id for each in plain.scalars(self.above)]
        found = session.scalars(self.above.execution_options(yield_per=7))
        partitions = found.partitions()

        first = next(partitions)
        assert (len(first), made(session)) == (7, 7)
        assert {sa_inspect(each).identity_token for each in first} == {"s0", "s1"}
        second = next(partitions)
        assert (len(second), made(session)) == (7, 14)
        rest = [each for batch in partitions for each in batch]
        assert [each.id for each in (*first, *second, *rest)] == expected
        assert all(sa_inspect(each).identity_token == shop.shard_of(each.id) for each in rest)

    @pytest.mark.parametrize("size", [3, 1_000])
    def test_rows_come_in_partitions(
        self, shop: Coordinated, session: RoutingSession, size: int
    ) -> None:
        statement = STATEMENTS["self join"]
        with shop.judge.connect() as plain:
            expected = plain.execute(statement).all()
        options = {"yield_per": size}
        batches = list(session.execute(statement, execution_options=options).partitions())

        assert [row for batch in batches for row in batch] == expected
        assert {len(batch) for batch in batches[:-1]} <= {size}

    def test_a_caller_may_say_the_size_later(self, session: RoutingSession) -> None:
        found = session.scalars(self.above, execution_options={"stream_results": True})

        assert len(found.fetchmany(5)) == made(session) == 5
        assert len(found.all()) > 5
        query = session.query(Customer).where(Customer.score > _mean - 100).yield_per(4)
        assert len(list(query)) == made(session)

    def test_related_objects_come_with_their_batch(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        statement = self.above.options(orm.selectinload(Customer.orders))
        found = session.scalars(statement.execution_options(yield_per=6))
        batch = next(found.partitions())

        assert len(batch) == 6
        for each in batch:
            with shop.judge.connect() as plain:
                ids = select(Order.id).where(Order.customer_id == each.id)
                expected = set(plain.scalars(ids))
            assert {order.id for order in each.__dict__["orders"]} == expected

    def test_more_rows_than_the_cap_are_refused(self, shop: Coordinated) -> None:
        """Before the first batch: a stream is not a way round it."""
        with (
            shop.routed(max_rows=20) as router,
            router.sessionmaker()() as session,
            pytest.raises(TooManyRows),
        ):
            session.scalars(self.above.execution_options(yield_per=5))

    def test_under_asyncio(self, shop: Coordinated) -> None:
        async def ran() -> tuple[list[int], list[int]]:
            async with shop.router.async_sessionmaker()() as session:
                found = await session.stream_scalars(self.above, execution_options={"yield_per": 8})
                sizes, seen = [], []
                async for batch in found.partitions():
                    sizes.append(made(session))
                    seen += [each.id for each in batch]
                return sizes, seen

        async def whole() -> tuple[list[int], list[int]]:
            try:
                return await ran()
            finally:
                await shop.router.coordinators(is_async=True).aclose()
                await shop.router.engines(is_async=True).aclose()

        sizes, seen = asyncio.run(whole())
        with orm.Session(shop.judge) as plain:
            assert seen == [each.id for each in plain.scalars(self.above)]
        assert sizes[0] == 8


class TestOwnWrites:
    def test_what_was_committed_is_read(self, shop: Coordinated) -> None:
        for i in range(20):
            with shop.router.sessionmaker()() as session:
                key = shop.keys("s1" if i % 2 else "s0")[0]
                session.execute(
                    sa.update(Customer).where(Customer.id == key).values(name=f"own {i}")
                )
                session.commit()
                names = select(func.count(sa.distinct(Customer.id))).where(
                    Customer.name == f"own {i}"
                )
                assert session.scalar(names) == 1

    def test_uncommitted_writes_are_refused(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        """They would be missing; with the explanation, and before anything was sent."""
        session.add(Customer(id=1_000, name="pending"))
        with pytest.raises(CrossShardRefused, match=r"sees only what is committed; commit first"):
            session.scalar(STATEMENTS["count(DISTINCT)"])
        session.commit()

        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 7

    def test_after_a_rollback_it_is_read_again(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        session.execute(sa.update(Customer).where(Customer.id == 1).values(name="gone"))
        session.rollback()

        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_a_token_is_respected(self, shop: Coordinated) -> None:
        """A coordinator that reads from before it is refused: as of a primary left behind."""
        with shop.router.sessionmaker()() as session:
            session.execute(sa.update(Customer).where(Customer.id == 1).values(name="seen"))
            session.commit()
            token = session.token
        ahead = replace(
            token, positions=tuple(replace(p, lsn=p.lsn + (1 << 30)) for p in token.positions)
        )
        with shop.router.sessionmaker()(token=token) as session:
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 7
        with (
            shop.router.sessionmaker()(token=ahead) as session,
            pytest.raises(CoordinatorUnavailable, match=r"it reads shard s\d at .* before"),
        ):
            session.execute(STATEMENTS["subquery"])

    def test_a_snapshot_is_refused(self, session: RoutingSession) -> None:
        session.begin(isolation_level="REPEATABLE READ")
        with pytest.raises(CrossShardRefused, match="no common snapshot"):
            session.scalar(STATEMENTS["count(DISTINCT)"])

    def test_a_read_only_transaction_may_ask(self, session: RoutingSession) -> None:
        with session.begin(read_only=True):
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6


@pytest.fixture
def changed(shop: Coordinated) -> Iterator[Coordinated]:
    """A shop whose schema a test may change; it is put right afterwards."""
    yield shop
    shop.on_all("DROP TABLE IF EXISTS secret, note, local CASCADE")
    shop.on_all("ALTER TABLE customer DROP COLUMN IF EXISTS extra")
    shop.on_all('ALTER TABLE "order" ALTER COLUMN amount TYPE numeric(12, 2)')
    coordinator.install(shop.router, analyze=False)


class TestStale:
    def test_a_changed_schema_is_refused_until_refreshed(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """Also one that the statement would not notice, and one that has reached one shard only."""
        changed.on("s0", "ALTER TABLE customer ADD COLUMN extra int")
        with pytest.raises(CoordinatorStale, match="run `sqlroute coordinator refresh`"):
            session.scalar(STATEMENTS["count(DISTINCT)"])
        with pytest.raises(OperationRefused, match=r"shards s0 and s1 differ.*same migration"):
            changed.refresh()
        changed.on("s1", "ALTER TABLE customer ADD COLUMN extra int")
        changed.refresh()

        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6
        assert session.execute(text("SELECT count(DISTINCT extra) FROM customer")).scalar() == 0

    def test_a_column_that_went_is_no_error_of_the_statement(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        changed.on_all("ALTER TABLE customer ADD COLUMN extra int")
        changed.refresh()
        changed.on_all("ALTER TABLE customer DROP COLUMN extra")

        with pytest.raises(CoordinatorStale):
            session.execute(text("SELECT count(DISTINCT extra) FROM customer"))

    def test_a_table_that_is_rewritten_meanwhile_is_not_empty(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """A rewritten table looks empty to older snapshots: the answer would be wrong."""
        shard = changed.servers.shard("s1").nodes[0]
        statement = select(
            func.count(sa.distinct(Customer.id)),
            select(func.count(sa.distinct(Order.id))).scalar_subquery(),
        )
        seen: list[Any] = []

        def ask_it() -> None:
            try:
                seen.append(session.execute(statement).one())
            except Exception as error:
                seen.append(error)

        with psycopg.connect(**shard.conninfo) as writer:
            writer.execute('ALTER TABLE "order" ALTER COLUMN amount TYPE double precision')
            thread = threading.Thread(target=ask_it)
            thread.start()
            until(
                lambda: changed.on(
                    "s1", "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'"
                )
            )
            writer.commit()
        thread.join()

        assert isinstance(seen[0], CoordinatorStale)

    def test_a_newer_shard_map_is_refused_until_refreshed(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """As after a move of a bucket; routers that have not heard of it learn it on the way."""
        found = changed.router.shard_map()
        with changed.routed() as router, router.sessionmaker()() as another:
            another.scalar(STATEMENTS["count(DISTINCT)"])
            publish(changed, replace(found, epoch=found.epoch + 1))
            with pytest.raises(CoordinatorStale, match=rf"epoch {found.epoch} of the shard map"):
                session.scalar(STATEMENTS["count(DISTINCT)"])
            changed.refresh()

            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6
            assert another.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_a_bucket_that_moved_is_read_where_it_is(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """The old leaf may still be there; its rows count once."""
        before = changed.router.shard_map()
        key = changed.keys("s0")[0]
        bucket, _ = changed.router.locate(Customer.__table__, (key,))  # type: ignore[arg-type]
        move(changed, bucket, ("customer", "order"))
        after = before.moved(bucket, "s1")
        publish(changed, after)
        try:
            with pytest.raises(OperationRefused, match=r"bucket \d+ of public.document"):
                changed.refresh()
            move(changed, bucket, ("document", "reading", "setting"))
            changed.refresh()

            counts = select(func.count(sa.distinct(Customer.score)), func.count(Customer.id))
            assert session.execute(counts).one()[1] == 60
            found = session.scalars(select(Customer).where(Customer.score > _mean - 100))
            tokens = {each.id: sa_inspect(each).identity_token for each in found}
            assert tokens[key] == "s1"
        finally:
            publish(changed, replace(before, epoch=after.epoch + 1))
            for table in reversed(changed.metadata.sorted_tables):
                leaf = f'"{table.name}_b{bucket:03}"'
                if changed.on("s1", f"SELECT to_regclass('{leaf}')") != [(None,)]:
                    changed.on("s1", f'ALTER TABLE "{table.name}" DETACH PARTITION {leaf}')
                    changed.on("s1", f"DROP TABLE {leaf}")


def publish(shop: Coordinated, shard_map: ShardMap) -> None:
    """Write a shard map on every shard, as the end of a move does."""
    for shard in ("s0", "s1"):
        with shop.router.primary_engine(shard).begin() as connection:
            maps.write(shard_map, connection)
    shop.router.read_map(shop.router.topology.default)


def move(shop: Coordinated, bucket: int, tables: tuple[str, ...]) -> None:
    """Copy a bucket from s0 to s1; the old leaves stay."""
    source, target = (shop.servers.shard(shard).nodes[0].conninfo for shard in ("s0", "s1"))
    with psycopg.connect(**source) as old, psycopg.connect(**target) as new:
        for table in tables:
            leaf = sql.Identifier(f"{table}_b{bucket:03}")
            new.execute(
                sql.SQL(
                    "CREATE TABLE {} PARTITION OF {} FOR VALUES WITH (MODULUS {}, REMAINDER {})"
                ).format(leaf, sql.Identifier(table), BUCKETS, bucket)
            )
            for row in old.execute(sql.SQL("SELECT * FROM {}").format(leaf)):
                values = sql.SQL(", ").join(map(sql.Literal, row))
                new.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(leaf, values))


TYPES = """
    CREATE EXTENSION citext;
    CREATE SCHEMA "odd Names";
    CREATE TYPE mood AS ENUM ('sad', 'it''s ok', 'happy');
    CREATE TYPE "odd Names".pair AS (a int, "B b" text);
    CREATE DOMAIN positive AS int NOT NULL CHECK (VALUE > 0);
    CREATE COLLATION "odd Names"."by Byte" (provider = libc, locale = 'C');
    CREATE TABLE "odd Names"."typed %" (
        id bigint, mood mood, moods mood[], number positive, word citext,
        pair "odd Names".pair, document jsonb, span interval, exact numeric, rounded float8,
        single real, at timestamptz, day date, bytes bytea, range int4range, text text
        COLLATE "odd Names"."by Byte", list text[], flag bool, "char" "char", fixed char(5),
        bits bit(3)
    ) """
_VALUES = """
    (1, 'happy', '{sad,happy}', 1, 'Word', '(1,"x, y")', '{"a": [1, 2.50, null]}',
     '1 mon -1 day 00:00:00.000001', 'NaN', 'NaN', '0.1', 'infinity', '-infinity', '\\x00ff',
     '[1,5)', 'Zoë', '{a,NULL,"b c"}', true, 'x', 'ab', '101'),
    (2, 'sad', '{}', 2, 'word', NULL, 'null', '-2 years', '1.10', '-Infinity', '1e-40',
     '2026-03-29 02:30:00.123456+02', '0044-03-15 BC', '', 'empty', 'zoe', '{}', false, '', '',
     '000'),
    (3, 'it''s ok', NULL, 3, '', '(,)', '[]', '0', '0.000', 0.1 + 0.2::float8, 'Infinity',
     '4713-11-25 00:00:00 BC', '2024-02-29', '\\x5c', '(,)', '', '{{1,2},{3,4}}', NULL, NULL, NULL,
     NULL)"""


class TestTypes:
    """Of the application and PostgreSQL's own: they arrive as they were stored."""

    @pytest.fixture
    def typed(self, changed: Coordinated) -> Iterator[Coordinated]:
        table, leaf = '"odd Names"."typed %"', '"odd Names"."typed %_b{:03}"'
        shard_map = changed.router.shard_map()
        for shard in ("s0", "s1"):
            changed.on(shard, f"{TYPES} PARTITION BY HASH (id)")
            for bucket in shard_map.buckets_of(shard):
                name, bound = leaf.format(bucket), f"MODULUS {BUCKETS}, REMAINDER {bucket}"
                changed.on(
                    shard, f"CREATE TABLE {name} PARTITION OF {table} FOR VALUES WITH ({bound})"
                )
            changed.on(shard, f"CREATE TABLE staging AS SELECT * FROM {table}")
            changed.on(shard, f"INSERT INTO staging VALUES {_VALUES}")
            owned = " OR ".join(
                f"satisfies_hash_partition('{table}'::regclass, {BUCKETS}, {bucket}, id)"
                for bucket in shard_map.buckets_of(shard)
            )
            changed.on(shard, f"INSERT INTO {table} SELECT * FROM staging WHERE {owned}")
            changed.on(shard, "DROP TABLE staging")
        drop = 'DROP SCHEMA "odd Names" CASCADE; DROP TYPE mood, positive; DROP EXTENSION citext'
        with changed.judge.connect() as plain:
            statement = f"{TYPES}; INSERT INTO {table} VALUES {_VALUES}".replace("%", "%%")
            plain.exec_driver_sql(statement)
            plain.commit()
        changed.refresh()
        yield changed
        changed.on_all(drop)
        with changed.judge.connect() as plain:
            plain.exec_driver_sql(drop)
            plain.commit()

    def test_values_are_those_of_one_server(
        self, typed: Coordinated, session: RoutingSession
    ) -> None:
        """All columns of all rows, joined off the key, as text and as values; and their order."""
        table = '"odd Names"."typed %"'
        joined = f"FROM {table} a JOIN {table} b ON b.id = a.id % 3 + 1"
        columns = [
            *("mood", "moods", "number", "word", "pair", "document", "span", "exact", "rounded"),
            *("single", "bytes", "range", "text", "list", "flag", '"char"', "fixed", "bits"),
        ]  # Python has no dates as early and late as the others
        values = ", ".join(f"a.{column}" for column in columns)
        statements = [
            f"SELECT a::text, b::text {joined} ORDER BY a.id",
            f"SELECT {values} {joined} ORDER BY a.id",
            f"SELECT a.id {joined} ORDER BY a.at",
            f"SELECT a.id {joined} ORDER BY a.day",
            *(f"SELECT a.id {joined} ORDER BY a.{column}, a.id" for column in columns),
            f"SELECT count(DISTINCT word), count(*) FROM {table} WHERE word = 'WORD'",
            f"SELECT max(mood), min(mood), count(DISTINCT mood) FROM {table} WHERE mood > 'sad'",
            f'SELECT (pair)."B b", count(DISTINCT id) FROM {table} GROUP BY 1 ORDER BY 1',
        ]
        for statement in statements:
            with typed.judge.connect() as plain:
                expected = plain.execute(text(statement)).all()
            found = session.execute(text(statement)).all()
            assert repr(found) == repr(expected), statement  # of NaN, too

    def test_an_enum_that_grows_is_noticed(
        self, typed: Coordinated, session: RoutingSession
    ) -> None:
        typed.on_all("ALTER TYPE mood ADD VALUE 'angry' BEFORE 'sad'")

        with pytest.raises(CoordinatorStale):
            session.scalar(STATEMENTS["count(DISTINCT)"])


def counted_with(name: str) -> Any:
    """Return a statement for the coordinator over a reference table and a sharded one."""
    table = sa.Table(name, sa.MetaData(), sa.Column("id", sa.Integer), **reference_table())
    pairs = table.join(Customer.__table__, sa.true())
    return select(
        func.count(sa.distinct(table.c.id)), func.count(sa.distinct(Customer.name))
    ).select_from(pairs)


class TestLeftOut:
    def test_row_security_cannot_be_gone_round(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """It holds for a table, not for its partitions, which the coordinator would read."""
        changed.on_all("CREATE TABLE secret (id int)")
        changed.on_all("ALTER TABLE secret ENABLE ROW LEVEL SECURITY")
        changed.refresh()

        with pytest.raises(CrossShardRefused, match=r"public\.secret \(it has row-level security"):
            session.execute(counted_with("secret"))

    def test_row_security_that_comes_later_is_noticed(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        changed.on_all("CREATE TABLE secret (id int)")
        changed.refresh()
        changed.on_all("ALTER TABLE secret ENABLE ROW LEVEL SECURITY")

        with pytest.raises(CoordinatorStale):
            session.execute(counted_with("secret"))

    def test_a_table_that_each_shard_fills_itself_is_no_reference_table(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        changed.on_all("CREATE TABLE local (id int)")
        changed.on("s1", "INSERT INTO local VALUES (1)")
        changed.refresh()

        with pytest.raises(CrossShardRefused, match="its rows are not the same on all shards"):
            session.execute(counted_with("local"))

    def test_text_names_no_table_of_which_nothing_is_declared(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """Its rows may have been the same on all shards when the coordinator was made."""
        changed.on_all("CREATE TABLE local (id int)")
        changed.refresh()

        with pytest.raises(CrossShardRefused, match="declare it by reference_table"):
            session.execute(text("SELECT count(DISTINCT id) FROM local"))

    def test_names_of_other_tables_mean_something_else(
        self, changed: Coordinated, session: RoutingSession
    ) -> None:
        """``regclass`` is a number of one server's."""
        changed.on_all("CREATE TABLE note (id int, of regclass)")
        changed.refresh()

        with pytest.raises(CrossShardRefused, match="of regclass"):
            session.execute(counted_with("note"))


class TestRefusals:
    def test_policies_forbid(self, shop: Coordinated) -> None:
        with shop.routed(no_coordinator=True) as router, router.sessionmaker()() as session:
            with pytest.raises(CrossShardRefused, match="policy no_coordinator"):
                session.scalar(STATEMENTS["count(DISTINCT)"])
            assert session.scalar(select(func.count()).select_from(Customer)) == 60
        with shop.routed(no_scatter=True) as router, router.sessionmaker()() as session:
            with pytest.raises(CrossShardRefused, match="policy no_scatter"):
                session.scalar(select(func.count()).select_from(Customer))
            assert session.get(Customer, 1) is not None
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_a_result_over_the_cap_is_refused(self, shop: Coordinated) -> None:
        joined = select(Customer.id, other.id).join(other, other.score <= Customer.score)
        written = text("SELECT a.id FROM customer a, customer b WHERE a.score <= b.score")
        with shop.routed(max_rows=100) as router, router.sessionmaker()() as session:
            for statement in (joined, written):
                with pytest.raises(TooManyRows, match="max_rows = 100"):
                    session.execute(statement)
            assert len(session.execute(joined.limit(100)).all()) == 100

    def test_a_statement_over_its_time_is_ended(self, shop: Coordinated) -> None:
        long = text("SELECT count(DISTINCT (a.id, b.id, c.id, d.id)) "
                    "FROM customer a, customer b, customer c, customer d")  # fmt: skip
        with shop.routed(timeout=0.3) as router, router.sessionmaker()() as session:
            with pytest.raises(DeadlineExceeded, match=r"timeout = 0\.3 s"):
                session.execute(long)
            assert session.get(Customer, 1) is not None

    def test_only_reads_are_sent(self, shop: Coordinated, session: RoutingSession) -> None:
        """What an option asks for must be proved as well."""
        there = {"sqlroute_tier": "coordinator"}
        for statement in (
            text("DELETE FROM customer"),
            text("SELECT nextval('s'), id FROM customer"),
            text("SELECT id FROM customer FOR UPDATE"),
            text("SELECT 1; SELECT 2"),
            select(Customer.id).with_for_update(),
        ):
            with pytest.raises(CrossShardRefused, match="only what is proved to be a read"):
                session.execute(statement, execution_options=there)
        with pytest.raises(UnknownName, match="sqlroute_tier may be"):
            session.execute(text("SELECT 1"), execution_options={"sqlroute_tier": "scatter"})

    def test_a_sample_is_refused(self, session: RoutingSession) -> None:
        """PostgreSQL leaves TABLESAMPLE out for foreign tables, without an error."""
        sampled = orm.aliased(Customer, sa.tablesample(Customer.__table__, func.bernoulli(1)))
        statement = select(func.count(sa.distinct(sampled.id)))
        with pytest.raises(CrossShardRefused, match=r"bernoulli\(\) is volatile"):
            session.execute(statement)
        with pytest.raises(CrossShardRefused, match="TABLESAMPLE"):
            session.execute(text("SELECT count(DISTINCT id) FROM customer TABLESAMPLE system (1)"))

    def test_functional_dependence_is_refused_with_the_way_out(
        self, session: RoutingSession
    ) -> None:
        statement = text("SELECT c.id, c.name, count(DISTINCT o.id) FROM customer c "
                         'JOIN "order" o ON o.id = c.id GROUP BY c.id')  # fmt: skip
        with pytest.raises(CrossShardRefused, match="knows no primary keys, name each column"):
            session.execute(statement)

    def test_without_a_coordinator_the_error_is_the_same_as_ever(self, shop: Coordinated) -> None:
        keyspace = replace(shop.router.topology.default, coordinator=None)
        topology = replace(shop.router.topology, keyspaces=(keyspace,))
        with type(shop.router)(topology, shop.router.policy) as router:
            with router.sessionmaker()() as session:
                with pytest.raises(CrossShardRefused, match="not tied to the shard key"):
                    session.execute(STATEMENTS["subquery"])
                with pytest.raises(CrossShardRefused, match=r"add \[keyspaces\.app\.coordinator\]"):
                    session.execute(
                        STATEMENTS["subquery"], execution_options={"sqlroute_tier": "coordinator"}
                    )
            with pytest.raises(OperationRefused, match="no keyspace has a coordinator"):
                coordinator.install(router)

    @pytest.mark.parametrize("options", [{"no_parameters": True}, {}])
    def test_nothing_goes_out_unchecked(
        self, session: RoutingSession, options: dict[str, Any]
    ) -> None:
        statement = text("SELECT count(DISTINCT id) FROM customer WHERE 1 = 1")
        rows = None if options else [{"a": 1}, {"a": 2}]
        with pytest.raises((CrossShardRefused, sa.exc.InvalidRequestError)):
            session.execute(statement, rows, execution_options=options).all()


class TestFaults:
    def test_one_that_is_down_is_said_or_replaced(self, shop: Coordinated) -> None:
        """The next of its nodes answers; where none does, the error names it."""
        closed = replace(shop.node, name="c-closed", port=free_ports(1))
        with shop.routed(nodes=(closed,)) as router, router.sessionmaker()() as session:
            with pytest.raises(CoordinatorUnavailable, match="c-closed does not answer"):
                session.scalar(STATEMENTS["count(DISTINCT)"])
            assert session.get(Customer, 1) is not None
        with shop.routed(nodes=(closed, shop.node)) as router, router.sessionmaker()() as session:
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_one_that_is_not_installed_is_said(self, shop: Coordinated) -> None:
        empty = replace(shop.node, name="c-empty", database="postgres")
        with shop.routed(nodes=(empty,)) as router, router.sessionmaker()() as session:
            with pytest.raises(CoordinatorMissing, match="run `sqlroute coordinator install`"):
                session.scalar(STATEMENTS["count(DISTINCT)"])
            (report,) = coordinator.check(router)
            assert "nothing is installed" in report.faults[0]
            with pytest.raises(OperationRefused, match="nothing is installed"):
                coordinator.remove(router)

    def test_a_database_of_somebody_else_is_left_alone(self, shop: Coordinated) -> None:
        taken = replace(shop.node, database=f"{shop.database}_judge")
        with (
            shop.routed(nodes=(taken,)) as router,
            pytest.raises(OperationRefused, match="has tables of its own"),
        ):
            coordinator.install(router)

        with shop.judge.connect() as plain:
            assert plain.scalar(select(func.count()).select_from(Customer)) == 60

    def test_a_role_without_rights_is_said(self, shop: Coordinated) -> None:
        shop.there("DROP ROLE IF EXISTS stranger")
        shop.there("CREATE ROLE stranger LOGIN PASSWORD 'p'")
        stranger = replace(shop.node, name="c-stranger", user="stranger", password=Secret("p"))
        with shop.routed(nodes=(stranger,)) as router, router.sessionmaker()() as session:
            with pytest.raises(CoordinatorDenied, match="c-stranger may not answer"):
                session.scalar(STATEMENTS["count(DISTINCT)"])
            assert session.get(Customer, 1) is not None
        shop.there("DROP ROLE stranger")

    def test_a_password_is_in_no_error(self, shop: Coordinated, caplog: Any) -> None:
        wrong = replace(shop.node, password=Secret("hunter2"))
        with (
            shop.routed(nodes=(wrong,)) as router,
            router.sessionmaker()() as session,
            pytest.raises(CoordinatorUnavailable) as caught,
        ):
            session.scalar(STATEMENTS["count(DISTINCT)"])
        shown = caplog.text + str(caught.value) + repr(caught.value.__cause__)

        assert "hunter2" not in shown

    def test_a_shard_that_is_down_is_said(self, shop: Coordinated) -> None:
        server = shop.servers.shard("s1").nodes[0]
        with shop.routed(primary_wait=0.5) as router, router.sessionmaker()() as session:
            session.scalar(STATEMENTS["count(DISTINCT)"])
            server.stop()
            try:
                with pytest.raises((NoPrimary, CoordinatorUnavailable), match="s1"):
                    session.scalar(STATEMENTS["count(DISTINCT)"])
                assert session.get(Customer, shop.keys("s0")[0]) is not None
            finally:
                server.start()
            for each in (router, shop.router):
                until(lambda r=each: r.monitor.ask("s1", 1.0).primary("s1") is not None)
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6


class TestOperations:
    def test_it_is_shown_what_it_costs(self, session: RoutingSession) -> None:
        found = session.explain(STATEMENTS["subquery"])

        assert found.describe()["coordinators"] == ["c-a"]
        assert "rows at a cost of" in found.merge[0]
        assert any("not tied to the shard key" in reason for reason in found.reasons)
        assert "on c-a" in str(found)

    def test_check_says_that_all_is_well(self, shop: Coordinated) -> None:
        (report,) = coordinator.check(shop.router)

        assert report.faults == ()
        assert report.epoch == shop.router.shard_map().epoch
        assert report.tables == len(Base.metadata.tables)

    def test_check_finds_another_order_of_text(self, shop: Coordinated) -> None:
        """Text would be ordered in another way than on the shards."""
        shop.there("DROP DATABASE IF EXISTS other_collation")
        shop.there("CREATE DATABASE other_collation TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
        elsewhere = replace(shop.node, name="c-other", database="other_collation")
        with (
            shop.routed(nodes=(elsewhere,)) as router,
            pytest.raises(OperationRefused, match="collate is 'C' on c-other"),
        ):
            coordinator.install(router, analyze=False)
        shop.there("DROP DATABASE other_collation")

    def test_a_plain_role_is_enough_for_sessions(self, shop: Coordinated) -> None:
        """A superuser builds it for them."""
        shop.there("DROP DATABASE IF EXISTS plain_coordinator")
        shop.there("DROP ROLE IF EXISTS plain")
        shop.there("CREATE ROLE plain LOGIN PASSWORD 'p'")
        operator = Operator(user=shop.node.user, password=shop.node.password)
        plain = replace(
            shop.node,
            name="c-plain",
            user="plain",
            password=Secret("p"),
            database="plain_coordinator",
        )
        with shop.routed(nodes=(plain,)) as router, router.sessionmaker()() as session:
            coordinator.install(router, Operations(operator))
            assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6
            assert coordinator.check(router)[0].faults == ()
        shop.there("DROP DATABASE plain_coordinator")
        shop.there("DROP ROLE plain")

    def test_removed_it_is_missing_and_can_be_built_again(
        self, shop: Coordinated, session: RoutingSession
    ) -> None:
        coordinator.remove(shop.router)
        assert shop.there("SELECT count(*) FROM pg_user_mappings") == [(0,)]
        with pytest.raises(CoordinatorMissing):
            session.scalar(STATEMENTS["count(DISTINCT)"])
        with pytest.raises(OperationRefused, match="coordinator install"):
            shop.refresh()
        coordinator.install(shop.router, analyze=False)

        assert session.scalar(STATEMENTS["count(DISTINCT)"]) == 6

    def test_a_shard_without_its_catalog_is_said(
        self, sqlroute_topology_factory: TopologyFactory, shop: Coordinated
    ) -> None:
        shop.on("s1", "ALTER VIEW sqlroute.shard_state RENAME TO hidden")
        try:
            with pytest.raises(CatalogError, match="sqlroute catalog install"):
                coordinator.install(shop.router)
        finally:
            shop.on("s1", "ALTER VIEW sqlroute.hidden RENAME TO shard_state")


class TestCommands:
    @pytest.fixture
    def run(
        self,
        shop: Coordinated,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> Callable[..., tuple[int, str, str]]:
        """Run the command line; no output may hold a password."""
        password = shop.host.password.reveal()
        there = f"postgresql://app:{password}@127.0.0.1:{shop.host.port}/{shop.database}?name=c-a"
        file = tmp_path / "sqlroute.toml"
        file.write_text(
            shop.servers.config_path.read_text().replace("buckets = 64", f"buckets = {BUCKETS}")
            + f'\n[keyspaces.app.coordinator]\nnodes = ["{there}"]\n'
        )
        monkeypatch.setenv("SQLROUTE_CONFIG", str(file))
        monkeypatch.setenv("COLUMNS", "200")

        def run(*arguments: str) -> tuple[int, str, str]:
            code = main(["coordinator", *arguments])
            found = capsys.readouterr()
            for node in (*shop.servers.nodes, shop.host):
                assert node.password.reveal() not in found.out + found.err
            return code, found.out, found.err

        return run

    def test_each_says_what_it_has_done(
        self, shop: Coordinated, run: Callable[..., tuple[int, str, str]]
    ) -> None:
        """As JSON for programs, as a table for people; exit code 3 where nothing is installed."""
        code, out, err = run("check")
        assert code == 3
        assert "c-a/1" in out + err
        assert run("install", "--no-analyze")[0] == 0
        code, out, _ = run("check", "--json")
        assert code == 0
        found = json.loads(out)["coordinators"]
        assert [(each["node"], each["tables"], each["faults"]) for each in found] == [
            ("c-a", 7, []),
            ("c-a/1", 7, []),
        ]
        assert found[1]["replicas"] == {"s0": "s0-b", "s1": "s1-b"}
        assert "s0-b, s1-b" in "".join(run("check")[1:])

        code, out, err = run("remove", "--json")
        assert (code, "say --yes" in err) == (5, True)
        assert run("remove", "--yes")[0] == 0
        code, _, err = run("check")
        assert code == 3
        assert "run `sqlroute coordinator install`" in err
        code, out, err = run("refresh")
        assert code == 5
        assert "nothing is installed on c-a" in err
        code, out, err = run("install")
        assert code == 0
        assert 'looking at "public"."customer"' in err
        code, out, _ = run("refresh", "--no-analyze", "--json")
        assert json.loads(out)["healthy"]


class TestFailover:
    """The last: one of the servers does not come back."""

    def test_it_follows_a_promotion(self, shop: Coordinated, session: RoutingSession) -> None:
        """Without a refresh; what was written on the new primary is read."""
        counted = select(func.count(sa.distinct(Setting.value)))
        session.add_all(Setting(name=f"n{i}", value=str(i % 5)) for i in range(20))
        session.commit()
        assert session.scalar(counted) == 5
        old, heir = shop.servers.shard("s1").nodes
        until(lambda: shop.at(heir, "SELECT count(*) FROM setting") > [(0,)])
        old.stop("immediate")
        shop.at(heir, "SELECT pg_promote()")
        until(lambda: primary_of(shop, "s1") == heir.name)
        session.rollback()
        session.add_all(Setting(name=f"m{i}", value=f"new {i % 3}") for i in range(20))
        session.commit()

        assert session.scalar(counted) == 8


def primary_of(shop: Coordinated, shard: str) -> str:
    found = shop.router.monitor.ask(shard, 1.0).primary(shard)
    return found.node if found is not None else ""
