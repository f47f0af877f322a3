"""Promises of a routed AsyncSession: the same as of a Session, and of cancelled tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import REPLICAS, Ran, Shop, until
from models import Country, Customer, Order
from sqlalchemy import exc, func, orm, select

from sqlroute import (
    CrossShardRefused,
    DeadlineExceeded,
    MissingShardKey,
    Router,
    RoutingAsyncSession,
)

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

COUNT = select(func.count()).select_from(Customer)

Body = Callable[[Router], Awaitable[None]]


@pytest.fixture
def filled(shop: Shop) -> Shop:
    """Five customers on each shard."""
    keys = sorted([*shop.keys("s0", 5), *shop.keys("s1", 5)])
    shop.add(*(Customer(id=key, name=f"c{i}", score=i) for i, key in enumerate(keys)))
    return shop


@pytest.fixture
def run(shop: Shop, make_router: Callable[..., Router]) -> Callable[..., None]:
    """Run a coroutine function with a router of its own event loop; nothing may be left."""

    def run(body: Body, **policy: Any) -> None:
        complaints: list[Any] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(
                lambda _, context: complaints.append(context)
            )
            router = make_router(**policy)
            try:
                await body(router)
                engines = router.engines(is_async=True)._engines.values()
                held = [e for e in engines if e.pool.checkedout()]  # type: ignore[attr-defined]
                assert held == [], "a connection was not given back"
                assert not any(router.engines(is_async=True).loads.values())
            finally:
                await router.aclose()

        asyncio.run(main())
        assert complaints == []

    return run


@asynccontextmanager
async def session_of(router: Router) -> AsyncIterator[RoutingAsyncSession]:
    async with router.async_sessionmaker()() as session:
        yield session


def test_reads_go_to_replicas_and_hold_nothing(
    filled: Shop, run: Callable[..., None], ran: Ran
) -> None:
    """Keyed and scattered reads, in AUTOCOMMIT, with the session still open."""

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            ran.clear()
            key = filled.keys("s1")[0]
            assert (await session.get_one(Customer, key)).id == key
            rows = await session.scalars(select(Customer.score).order_by(Customer.score))
            assert rows.all() == list(range(10))
            assert set(ran.nodes) <= set(REPLICAS)
            engines = router.engines(is_async=True)._engines.values()
            assert sum(e.pool.checkedout() for e in engines) == 0  # type: ignore[attr-defined]
            assert (await session.explain(COUNT)).tier.value == "scatter"

    run(body)


def test_own_writes_are_seen(held: Shop, run: Callable[..., None]) -> None:
    """With every replica 3 s behind: refresh, get, scatter, lazy loads by AsyncAttrs' way."""

    async def body(router: Router) -> None:
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        async with session_of(router) as session:
            session.add(Country(code="DE", name="Germany"))
            added = [
                Customer(id=key, name=str(key), country_code="DE", orders=[Order(id=1)])
                for key in (zero, one)
            ]
            session.add_all(added)
            await session.commit()
            for customer in added:
                await session.refresh(customer)
                assert customer.name == str(customer.id)
            assert await session.scalar(COUNT) == 2
            await session.rollback()
            session.expunge_all()
            loaded = select(Customer).options(
                orm.selectinload(Customer.orders), orm.joinedload(Customer.country)
            )
            found = (await session.scalars(loaded.order_by(Customer.id))).all()
            assert [len(c.orders) for c in found] == [1, 1]
            assert {c.country.name for c in found if c.country} == {"Germany"}
            assert {token.shard for token in (await session.token).positions} == {"s0", "s1"}

    run(body)


def test_two_shards_commit_together(shop: Shop, run: Callable[..., None]) -> None:
    """And roll back together; errors are the same as of a Session."""

    async def body(router: Router) -> None:
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        async with router.async_sessionmaker().begin() as session:
            session.add_all([Customer(id=key, name="x") for key in (zero, one)])
        async with session_of(router) as session:
            session.add_all([Order(customer_id=one, id=1), Order(customer_id=zero + 10**9, id=1)])
            with pytest.raises(exc.IntegrityError):
                await session.commit()
            await session.rollback()
            with pytest.raises(MissingShardKey):
                await session.execute(sa.delete(Customer))
            await session.execute(
                sa.insert(Order), [{"customer_id": k, "id": 2} for k in (zero, one)]
            )
            await session.commit()
            connection = await session.connection(bind_arguments={"shard": "s0"})
            assert (
                await connection.execute(sa.text("SELECT pg_is_in_recovery()"))
            ).scalar() is False
            await session.rollback()
            with pytest.raises(CrossShardRefused):
                await session.connection()

    run(body)
    for shard in ("s0", "s1"):
        assert shop.on(shard, "SELECT count(*) FROM customer") == [(1,)]
        assert shop.on(shard, 'SELECT id FROM "order"') == [(2,)]


def test_one_shard_streams(filled: Shop, run: Callable[..., None]) -> None:
    """session.stream() on one shard, and on several: see ``test_streams``."""

    async def body(router: Router) -> None:
        keys = filled.keys("s0", 5)
        async with session_of(router) as session:
            stream = await session.stream_scalars(select(Customer).where(Customer.id.in_(keys)))
            assert len([customer async for customer in stream]) == 5
            await session.rollback()
            stream = await session.stream_scalars(select(Customer))
            assert len([customer async for customer in stream]) == 10

    run(body)


def test_shards_work_at_the_same_time(filled: Shop, run: Callable[..., None]) -> None:
    """Two times 0.2 s take less than 0.35 s."""

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            await session.scalar(COUNT)
            began = time.monotonic()
            await session.execute(select(func.pg_sleep(0.04), Customer.id))
            assert time.monotonic() - began < 0.35

    run(body)


@pytest.mark.parametrize("shard", ["s0", "s1"])
def test_one_shards_error_cancels_the_other(
    filled: Shop, run: Callable[..., None], shard: str
) -> None:
    """At once, and the session goes on."""
    bad = Customer.id.in_(filled.keys(shard, 5))
    broken = sa.case(
        (bad, sa.cast(1 / func.nullif(Customer.score - Customer.score, -1), sa.Text)),
        else_=sa.cast(func.pg_sleep(20), sa.Text),
    )

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            await session.scalar(COUNT)
            began = time.monotonic()
            with pytest.raises(exc.DataError, match="division by zero"):
                await session.execute(select(broken))
            assert time.monotonic() - began < 3
            assert await session.scalar(COUNT) == 10

    run(body)


def test_both_shards_errors_are_one(filled: Shop, run: Callable[..., None]) -> None:
    """No error of another shard is left for the event loop to complain of."""

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            for _ in range(5):
                with pytest.raises(exc.DataError):
                    await session.execute(select(1 / (Customer.score - Customer.score)))

    run(body)


def test_a_deadline_bounds_the_whole(filled: Shop, run: Callable[..., None]) -> None:
    """DeadlineExceeded, and the session goes on."""

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            await session.scalar(COUNT)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="s0"):
                await session.execute(select(func.pg_sleep(20), Customer.id))
            assert time.monotonic() - began < 3
            assert await session.scalar(COUNT) == 10

    run(body, scatter_timeout=0.5)


@pytest.mark.parametrize("scattered", [False, True], ids=["read", "scatter"])
def test_a_cancelled_task_leaks_nothing(
    filled: Shop, run: Callable[..., None], scattered: bool
) -> None:
    """The server stops working for it, its connections come back, its session can go on."""
    key = filled.keys("s0")[0]

    def slow(seconds: float) -> Any:
        statement = select(func.pg_sleep(seconds), Customer.id)
        return statement if scattered else statement.where(Customer.id == key)

    def running() -> int:
        query = (
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep%' "
            "AND pid <> pg_backend_pid()"
        )
        return sum(len(filled.at(node.name, query)) for node in filled.servers.nodes)

    async def body(router: Router) -> None:
        async with session_of(router) as session:
            for delay in (0.0, 0.001, 0.01, None, None):
                # a cancel that overtakes its query is lost: long is what is seen to run
                task = asyncio.create_task(session.execute(slow(20 if delay is None else 0.2)))
                if delay is None:
                    while running() < (2 if scattered else 1):
                        await asyncio.sleep(0.02)
                else:
                    await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await session.rollback()
                assert await session.scalar(COUNT) == 10

    run(body)
    until(lambda: running() == 0)


def test_a_cancelled_write_leaves_nothing(filled: Shop, run: Callable[..., None]) -> None:
    """Cancelled anywhere in a write and its commit over two shards: all or nothing, no leak."""
    zero, one = filled.keys("s0", 6)[5], filled.keys("s1", 6)[5]

    async def write(router: Router) -> None:
        async with router.async_sessionmaker().begin() as session:
            session.add_all([Customer(id=key, name="x") for key in (zero, one)])

    async def body(router: Router) -> None:
        await write(router)
        remove = sa.delete(Customer)
        for step in range(25):
            async with router.async_sessionmaker().begin() as session:
                for key in (zero, one):
                    await session.execute(remove.where(Customer.id == key))
            task = asyncio.create_task(write(router))
            await asyncio.sleep(step * 0.0008)
            task.cancel()
            await asyncio.wait([task])
            await asyncio.to_thread(router.recover, 0)
            async with session_of(router) as session, session.begin():
                found = await session.scalars(
                    select(Customer.id).where(Customer.id.in_([zero, one]))
                )
                assert len(found.all()) in (0, 2), step

    run(body)


def test_concurrent_tasks(shop: Shop, run: Callable[..., None]) -> None:
    """30 tasks with sessions of their own write on both shards and read it back."""
    keys = [*shop.keys("s0", 30), *shop.keys("s1", 30)]

    async def body(router: Router) -> None:
        async def work(number: int) -> None:
            mine = [keys[number], keys[number + 30]]
            for i in range(3):
                async with session_of(router) as session:
                    for key in mine:
                        await session.merge(Customer(id=key, name=f"{i}"))
                    await session.commit()
                    own = select(Customer.name).where(Customer.id.in_(mine))
                    assert (await session.scalars(own)).all() == [f"{i}"] * 2

        await asyncio.gather(*(work(number) for number in range(30)))

    run(body)
    assert shop.on("s1", "SELECT count(*) FROM customer") == [(30,)]


def test_a_paused_replica_fails_no_task(filled: Shop, run: Callable[..., None]) -> None:
    """SIGSTOP of a replica during reads of many tasks: none fails, the slowest takes under 3 s."""
    victim = filled.servers.node("s1-b")
    key = filled.keys("s1")[0]

    async def body(router: Router) -> None:
        times: list[float] = []

        async def read(until_: float) -> None:
            while time.monotonic() < until_:
                began = time.monotonic()
                async with session_of(router) as session:
                    assert (await session.get_one(Customer, key)).id == key
                    assert await session.scalar(COUNT) == 10
                times.append(time.monotonic() - began)

        readers = [asyncio.create_task(read(time.monotonic() + 3)) for _ in range(6)]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(victim.pause)
        await asyncio.gather(*readers)
        assert max(times) < 3

    try:
        run(body)
    finally:
        victim.resume()
    monitor = filled.router.monitor
    until(lambda: monitor.ask("s1", 1.0).of("s1-b").is_readable)
