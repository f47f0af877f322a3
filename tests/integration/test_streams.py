"""Promises of streams over several shards: in order, held flat, closed by everything that ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import Shop
from models import Customer, Order
from sqlalchemy import exc, func, orm, select

from sqlroute import CrossShardRefused, Router, RoutingSession

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

ROWS = 60


@pytest.fixture
def filled(shop: Shop) -> Shop:
    """Customers whose scores alternate between the shards, each with an order."""
    pairs = zip(shop.keys("s0", ROWS // 2), shop.keys("s1", ROWS // 2), strict=True)
    keys = [key for pair in pairs for key in pair]
    customers = [Customer(id=key, name=f"c{i % 3}", score=i) for i, key in enumerate(keys)]
    for customer in customers:
        customer.orders.append(Order(id=1, amount=customer.score))
    shop.add(*customers)
    return shop


ORDERED = select(Customer).order_by(Customer.score)
BY_TEN = {"yield_per": 10}


def cursors(session: RoutingSession) -> int:
    """Count the cursors that are open on the connections of the session's transaction."""
    transaction: Any = session.get_transaction()
    connections = {id(found[0]): found[0] for found in transaction._connections.values()}
    return sum(
        connection.exec_driver_sql("SELECT count(*) FROM pg_cursors").scalar_one()
        for connection in connections.values()
    )


class TestReading:
    def test_objects_come_in_order(self, filled: Shop, session: RoutingSession) -> None:
        found = session.scalars(ORDERED, execution_options=BY_TEN)

        assert [customer.score for customer in found] == list(range(ROWS))

    def test_no_more_than_a_batch_is_held(self, filled: Shop, session: RoutingSession) -> None:
        """The batch is shared between the shards; what was read and let go is gone."""
        found = session.scalars(ORDERED, execution_options=BY_TEN)

        held = 0
        for number, _ in enumerate(found):
            held = max(held, len(session.identity_map.values()))
            assert number < ROWS
        assert held <= 2 * 10  # a batch, and the one that is being handed out

    def test_shards_are_read_at_the_same_time(self, filled: Shop, session: RoutingSession) -> None:
        """As long as one shard would take, where each row takes its time."""
        slow = sa.cast(func.pg_sleep(0.03), sa.Text)  # volatile: computed after it was sorted
        statement = select(Customer.score, slow).order_by(Customer.score)

        began = time.monotonic()
        found = session.execute(statement, execution_options={"yield_per": 20})
        assert [row.score for row in found] == list(range(ROWS))
        assert time.monotonic() - began < 0.03 * ROWS * 0.8

    @pytest.mark.parametrize("ask", ["statement", "call", "query", "result"])
    def test_every_way_to_ask_for_it(self, filled: Shop, session: RoutingSession, ask: str) -> None:
        if ask == "query":
            query = session.query(Customer.score).order_by(Customer.score)
            assert [row[0] for row in query.yield_per(7)] == list(range(ROWS))
            return
        statement = select(Customer.score).order_by(Customer.score.desc())
        if ask == "statement":
            found = session.execute(statement.execution_options(yield_per=7))
        elif ask == "call":
            found = session.execute(statement, execution_options={"yield_per": 7})
        else:
            found = session.execute(statement, execution_options={"stream_results": True})
            found = found.yield_per(7)

        assert [len(part) for part in found.partitions()] == [7] * 8 + [4]

    def test_results_of_streams_read_like_any_other(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """scalars, mappings, first, fetchmany, columns; limits, groups and distinct rows."""
        statement = select(Customer.score, Customer.name.label("n")).order_by(Customer.score)

        def run(found: Any = statement) -> Any:
            return session.execute(found, execution_options=BY_TEN)

        with run() as found:
            assert list(found.keys()) == ["score", "n"]
            assert found.mappings().fetchmany(1) == [{"score": 0, "n": "c0"}]
        assert run().first() == (0, "c0")
        assert run().scalars().all() == list(range(ROWS))
        assert run(statement.limit(3).offset(50)).scalars().all() == [50, 51, 52]
        names = select(Customer.name, func.count()).group_by(Customer.name)
        assert run(names.order_by(Customer.name)).all() == [("c0", 20), ("c1", 20), ("c2", 20)]
        assert run(select(Customer.name).distinct().order_by(Customer.name)).all() == [
            ("c0",), ("c1",), ("c2",),
        ]  # fmt: skip

    def test_collections_are_loaded_batch_by_batch(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """selectinload beside an open stream: each object's orders from its own shard."""
        statement = ORDERED.options(orm.selectinload(Customer.orders))
        found = session.scalars(statement, execution_options=BY_TEN)

        assert [int(customer.orders[0].amount or 0) for customer in found] == list(range(ROWS))

    def test_joined_collections_are_refused_as_on_one_server(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        statement = ORDERED.options(orm.joinedload(Customer.orders))

        with pytest.raises(exc.InvalidRequestError, match="joinedload"):
            session.scalars(statement, execution_options=BY_TEN).all()
        session.rollback()

    def test_what_has_no_merge_is_refused_before_it_runs(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        with pytest.raises(CrossShardRefused, match="OVER"):
            session.execute(select(func.rank().over()).select_from(Customer), BY_TEN)
        assert session.get_transaction() is None or cursors(session) == 0


class TestEnding:
    def test_the_last_row_closes_the_cursors(self, filled: Shop, session: RoutingSession) -> None:
        session.scalars(ORDERED, execution_options=BY_TEN).all()

        assert cursors(session) == 0

    @pytest.mark.parametrize("read", [0, 1, 15])
    def test_closing_early_closes_the_cursors(
        self, filled: Shop, session: RoutingSession, read: int
    ) -> None:
        """The session goes on; its connections come back at the end of the transaction."""
        found = session.scalars(ORDERED, execution_options=BY_TEN)
        found.fetchmany(read)
        found.close()

        assert cursors(session) == 0
        assert session.scalar(select(func.count()).select_from(Customer)) == ROWS
        session.rollback()
        assert filled.checked_out == 0

    def test_a_limit_that_is_reached_closes_the_cursors(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """DISTINCT reads no further than its last row, on no shard."""
        statement = select(Customer.name).distinct().order_by(Customer.name).limit(2)
        assert session.scalars(statement, execution_options=BY_TEN).all() == ["c0", "c1"]

        assert cursors(session) == 0

    def test_a_late_error_of_one_shard_ends_the_stream(
        self, filled: Shop, session: RoutingSession
    ) -> None:
        """An error in the middle is that of the server, and leaves nothing open."""
        late = filled.keys("s1", ROWS // 2)[-1]
        zero = sa.case((Customer.id == late, 0), else_=1)
        # what is volatile PostgreSQL computes after it has sorted
        bad = 1 / (zero + sa.cast(func.floor(func.random()), sa.Integer))
        statement = select(Customer.score, bad).order_by(Customer.score)
        rows: list[int] = []
        stream = session.execute(statement, execution_options={"yield_per": 4})

        with pytest.raises(exc.DataError, match="division by zero"):
            rows.extend(row.score for row in stream)
        assert rows == list(range(len(rows)))
        assert 0 < len(rows) < ROWS
        session.rollback()
        assert filled.checked_out == 0
        assert session.scalar(select(func.count()).select_from(Customer)) == ROWS


class TestAsync:
    def test_streams_are_the_same_under_asyncio(
        self, filled: Shop, make_router: Callable[..., Router]
    ) -> None:
        async def main() -> None:
            router = make_router()
            try:
                async with router.async_sessionmaker()() as session:
                    found = await session.stream_scalars(ORDERED, execution_options=BY_TEN)
                    sizes, scores = [], []
                    async for part in found.partitions():
                        sizes.append(len(part))
                        scores += [customer.score for customer in part]
                    assert sizes == [10] * 6
                    assert scores == list(range(ROWS))
                    columns = select(Customer.score, Customer.name).order_by(Customer.score)
                    rows = await session.stream(columns, execution_options=BY_TEN)
                    assert [row.score async for row in rows] == list(range(ROWS))
                    streamed = await session.stream(select(Customer.score).order_by("score"))
                    assert (await streamed.first()) == (0,)
                    early = await session.stream_scalars(ORDERED, execution_options=BY_TEN)
                    assert (await early.fetchmany(3))[2].score == 2
                    await early.close()
                    assert await session.scalar(select(func.count()).select_from(Customer)) == ROWS
                    with pytest.raises(exc.InvalidRequestError, match="stream"):
                        await session.execute(ORDERED, execution_options=BY_TEN)
                engines = router.engines(is_async=True)._engines.values()
                assert not any(engine.pool.checkedout() for engine in engines)  # type: ignore[attr-defined]
            finally:
                await router.aclose()

        asyncio.run(main())
