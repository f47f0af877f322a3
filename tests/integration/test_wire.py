"""A transaction that begins with its first statement: what goes wrong there, and what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import Shop, until
from models import Customer
from sqlalchemy import exc, select, update

from sqlroute import Router, RoutingSession

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

IDLE, IN_TRANSACTION, FAILED = 0, 2, 3  # of libpq


@contextmanager
def on_shard(router: Router, shard: str = "s0") -> Iterator[tuple[RoutingSession, Any]]:
    """Lend a session in an explicit transaction, and psycopg's connection of it."""
    with router.sessionmaker()() as session:
        session.begin()
        connection = session.connection(bind_arguments={"shard": shard})
        yield session, connection.connection.driver_connection


def renamed(key: int, name: Any = "new") -> Any:
    return update(Customer).where(Customer.id == key).values(name=name)


class TestOpening:
    def test_statement_and_begin_are_one_message(self, shop: Shop, router: Router) -> None:
        """The server sees an ordinary transaction, begun before the statement."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (session, driver):
            assert driver.pgconn.transaction_status == IDLE
            session.execute(renamed(key))

            assert driver.pgconn.transaction_status == IN_TRANSACTION
            assert (driver._pipeline, driver.pgconn.pipeline_status) == (None, 0)
            session.rollback()
        assert shop.on("s0", "SELECT name FROM customer") == [("old",)]

    @pytest.mark.parametrize("times", [1, 12])
    def test_prepared_or_not(self, shop: Shop, router: Router, times: int) -> None:
        """psycopg prepares a statement the sixth time: then three commands go out together."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        for number in range(times):
            with router.sessionmaker()() as session:
                assert session.execute(renamed(key, f"name {number}")).rowcount == 1
                session.commit()
        assert shop.on("s0", "SELECT name FROM customer") == [(f"name {times - 1}",)]

    def test_prepared_statements_are_evicted(self, shop: Shop, router: Router) -> None:
        """psycopg deallocates what is too much after a statement: outside of the opening."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (_, driver):
            driver.prepare_threshold, driver.prepared_max = 1, 1
        for number in range(12):
            with on_shard(router) as (session, _):
                column = sa.literal_column(str(number)).label("number")
                found = session.execute(select(Customer.name, column).where(Customer.id == key))
                assert found.one() == ("old", number)
        router.engines(is_async=False).expire("s0-a")

    def test_the_error_is_that_of_the_statement(self, shop: Shop, router: Router) -> None:
        """Not "pipeline aborted"; and the transaction has failed, as with psycopg alone."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        for _ in range(8):  # also when it is prepared
            with on_shard(router) as (session, driver):
                with pytest.raises(exc.DBAPIError) as caught:
                    session.execute(select(Customer.id / (Customer.id - key)), {"id": key})
                assert getattr(caught.value.orig, "sqlstate", None) == "22012"
                assert driver.pgconn.transaction_status == FAILED
                session.rollback()
                assert session.scalar(select(Customer.name).where(Customer.id == key)) == "old"

    def test_the_first_statement_breaks_a_constraint(self, shop: Shop, router: Router) -> None:
        """A unique violation is one, in a flush too; the session stays usable."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with router.sessionmaker()() as session:
            session.add(Customer(id=key, name="again"))
            with pytest.raises(exc.IntegrityError, match="duplicate key"):
                session.commit()
            session.rollback()
            session.execute(renamed(key))
            session.commit()
        assert shop.on("s0", "SELECT name FROM customer") == [("new",)]

    def test_a_parameter_that_has_no_text(self, shop: Shop, router: Router) -> None:
        """Nothing was sent: no transaction is open, and none is left half queued."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (session, driver):
            with pytest.raises(exc.ProgrammingError, match="cannot adapt"):
                session.connection(bind_arguments={"shard": "s0"}).exec_driver_sql(
                    "SELECT %s", (object(),)
                )
            assert driver.pgconn.transaction_status == IDLE
            assert (driver._pipeline, driver.pgconn.pipeline_status) == (None, 0)
            assert session.execute(renamed(key)).rowcount == 1

    def test_more_parameters_than_the_protocol_has(self, shop: Shop, router: Router) -> None:
        """libpq refuses to send it, when BEGIN is on its way already."""
        with on_shard(router) as (session, driver):
            connection = session.connection(bind_arguments={"shard": "s0"})
            many = ", ".join(["%s"] * 70_000)
            with pytest.raises(exc.OperationalError, match="65535"):
                connection.exec_driver_sql(f"SELECT 1 WHERE 1 IN ({many})", (1,) * 70_000)
            assert driver.pgconn.pipeline_status == 0
            session.rollback()
            assert not driver.closed

    def test_the_server_goes_away(self, shop: Shop, router: Router) -> None:
        """It says why, and the pool replaces the connection."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (session, driver):
            pid = driver.info.backend_pid
            shop.on("s0", f"SELECT pg_terminate_backend({pid})")
            with pytest.raises(exc.OperationalError) as caught:
                session.execute(renamed(key))
            assert caught.value.connection_invalidated
            session.rollback()
            assert session.execute(renamed(key)).rowcount == 1
            session.commit()
        assert shop.on("s0", "SELECT name FROM customer") == [("new",)]

    def test_isolation_level_and_mode_go_with_it(self, shop: Shop, router: Router) -> None:
        """As the application asked for them."""
        shown = "SELECT current_setting(%s), current_setting(%s)"
        names = ("transaction_isolation", "transaction_read_only")
        with router.sessionmaker()() as session:
            session.begin(isolation_level="SERIALIZABLE")
            connection = session.connection(bind_arguments={"shard": "s0"})
            assert connection.exec_driver_sql(shown, names).one() == ("serializable", "off")
            session.rollback()
            session.begin(read_only=True)
            connection = session.connection(bind_arguments={"shard": "s0"})
            assert connection.exec_driver_sql(shown, names).one() == ("read committed", "on")

    def test_autocommit_begins_nothing(self, shop: Shop, router: Router) -> None:
        """An isolation level of the application's."""
        with router.primary_engine("s0").connect() as found:
            connection = found.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql("SELECT %s::int", (1,))
            assert connection.connection.driver_connection.pgconn.transaction_status == IDLE

    def test_server_side_cursors_declare_themselves(self, shop: Shop, router: Router) -> None:
        """Their BEGIN goes first, as always."""
        keys = shop.keys("s0", 3)
        shop.add(*(Customer(id=key, name="x") for key in keys))
        with on_shard(router) as (session, driver):
            query = select(Customer.id).where(Customer.id.in_(keys)).order_by(Customer.id)
            found = session.execute(
                query, execution_options={"yield_per": 1, "sqlroute_shard": "s0"}
            )
            assert found.scalars().all() == sorted(keys)
            assert driver.pgconn.pipeline_status == 0


def test_a_cancelled_task_leaves_no_pipeline(
    shop: Shop, make_router: Callable[..., Router]
) -> None:
    """The first statement waits for a lock when its task is cancelled; the pool goes on."""
    (key,) = shop.keys("s0")
    shop.add(Customer(id=key, name="old"))

    async def main() -> None:
        router = make_router(pool_size=1, max_overflow=0)
        try:
            with psycopg.connect(**shop.servers.node("s0-a").conninfo) as holder:
                holder.execute("UPDATE customer SET name = 'held'")

                async def change() -> None:
                    async with router.async_sessionmaker()() as session:
                        await session.execute(renamed(key))

                task = asyncio.create_task(change())
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                holder.rollback()
            for _ in range(3):
                async with router.async_sessionmaker()() as session:
                    assert (await session.execute(renamed(key))).rowcount == 1
                    await session.commit()
        finally:
            await router.aclose()

    asyncio.run(main())
    assert shop.on("s0", "SELECT name FROM customer") == [("new",)]


class TestWritten:
    def test_only_own_commits_count(self, shop: Shop, router: Router) -> None:
        """Nothing after reads, nothing after a rollback, nothing of a token that was followed."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with router.sessionmaker()() as session:
            session.scalar(select(Customer.name).where(Customer.id == key))
            token = session.token
            session.commit()
            session.execute(renamed(key))
            assert not session.written
            session.rollback()
            session.follow(token)
            assert not session.written
            session.execute(renamed(key))
            session.commit()
            assert session.written == session.token
            assert [position.shard for position in session.written.positions] == ["s0"]

    def test_two_phase_commits_of_sqlalchemy_count(self, shop: Shop, router: Router) -> None:
        """They bring no position back; the servers are asked."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with router.sessionmaker(twophase=True)() as session:
            session.execute(renamed(key))
            session.commit()
            (position,) = session.written.positions
        at = shop.on("s0", "SELECT pg_current_wal_insert_lsn() - '0/0'")
        assert 0 < position.lsn <= int(at[0][0])


class TestCommit:
    def test_commits_among_others_ask_for_their_kind(self, shop: Shop, router: Router) -> None:
        """Behind another's unflushed WAL the token is the flush position, which replicas reach."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (session, driver):
            session.execute(renamed(key))
            driver.sqlroute_among_others = 5
            session.commit()
            (token,) = session.token.positions
            assert driver.sqlroute_among_others == 4
            flushed = shop.on("s0", "SELECT pg_current_wal_flush_lsn() - '0/0'")
            assert token.lsn <= int(flushed[0][0])

    def test_unflushed_wal_of_others_is_noticed(self, shop: Shop, router: Router) -> None:
        """The first commit there takes the insert position, later ones ask for more."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        noise = "SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000))"
        with (
            psycopg.connect(**shop.servers.node("s0-a").conninfo, autocommit=True) as other,
            router.sessionmaker()() as session,
        ):
            for number in range(200):
                session.execute(renamed(key, str(number)))
                connection = session.connection(bind_arguments={"shard": "s0"})
                driver: Any = connection.connection.driver_connection
                with other.pipeline():  # writes WAL that nobody flushes, as this one commits
                    for _ in range(5):
                        other.execute(noise)
                    session.commit()
                if getattr(driver, "sqlroute_among_others", 0):
                    break
            else:
                pytest.fail("no commit has met another's unflushed WAL")
            (seen,) = session.token.positions
            ask = router.monitor.ask
            until(lambda: all(n.lsn >= seen.lsn for n in ask("s0", 1.0).replicas("s0")))

    @pytest.mark.parametrize("among_others", [0, 5])
    def test_a_failed_transaction_is_not_committed(
        self, shop: Shop, router: Router, among_others: int
    ) -> None:
        """PostgreSQL answers COMMIT with ROLLBACK; that would be a lost write without an error."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="old"))
        with on_shard(router) as (session, driver):
            session.execute(renamed(key))
            driver.sqlroute_among_others = among_others
            with pytest.raises(psycopg.errors.DivisionByZero):
                driver.execute("SELECT 1 / 0")
            with pytest.raises(exc.InternalError, match="aborted"):
                session.commit()
            session.rollback()
        assert shop.on("s0", "SELECT name FROM customer") == [("old",)]
