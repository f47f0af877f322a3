"""What SQLAlchemy's own suite found: the places where a Session's manners are easily lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Ran, Shop
from models import Base, Customer, Order
from sqlalchemy import create_engine, event, exc, func, select, text
from sqlalchemy.orm import Session, selectinload

from sqlroute import Keyspace, Router, Topology, UnknownName

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture
def key(shop: Shop) -> int:
    (key,) = shop.keys("s0")
    shop.add(Customer(id=key, name="x", orders=[Order(id=1, amount=1)]))
    return key


def customer(key: int) -> Any:
    return select(Customer).where(Customer.id == key)


class TestState:
    """A read in AUTOCOMMIT keeps to the state of the session's transaction, too."""

    def test_no_sql_in_a_commit(self, router: Router, key: int) -> None:
        with router.sessionmaker()() as session:
            event.listen(session, "after_commit", lambda s: s.scalar(customer(key)))
            session.begin()
            with pytest.raises(exc.InvalidRequestError, match="no further SQL can be emitted"):
                session.commit()

    def test_no_sql_after_a_commit_within_the_block(self, router: Router, key: int) -> None:
        with router.sessionmaker()() as session, session.begin():
            session.commit()
            with pytest.raises(exc.InvalidRequestError, match="closed transaction inside context"):
                session.scalar(customer(key))

    def test_no_sql_after_a_failed_flush_in_a_subtransaction(
        self, router: Router, key: int
    ) -> None:
        with router.sessionmaker()() as session:
            session.begin()
            session.add(Customer(id=key, name="twice"))
            with pytest.raises(exc.IntegrityError):
                session.flush()
            with pytest.raises(exc.PendingRollbackError):
                session.scalar(customer(key))
            session.rollback()
            assert session.scalar(customer(key)) is not None


class TestStreaming:
    @pytest.mark.parametrize("option", ["yield_per", "stream_results"])
    def test_eager_loaders_of_a_streamed_read(self, router: Router, key: int, option: str) -> None:
        with router.sessionmaker()() as session:
            statement = customer(key).options(selectinload(Customer.orders))
            found = session.scalars(statement.execution_options(**{option: 5})).all()
            assert [order.id for order in found[0].orders] == [1]

    def test_yield_per_of_a_query(self, router: Router, key: int) -> None:
        with router.sessionmaker()() as session:
            query = session.query(Customer).filter(Customer.id == key)
            assert [found.id for found in query.yield_per(1)] == [key]


class TestListeners:
    def test_options_that_a_listener_adds(self, router: Router, key: int, ran: Ran) -> None:
        with router.sessionmaker()() as session:
            event.listen(session, "do_orm_execute", _to_the_primary)
            ran.clear()
            statement = customer(key).options(selectinload(Customer.orders))
            assert session.scalars(statement).all()
            assert set(ran.nodes) == {"s0-a"}


def _to_the_primary(state: Any) -> None:
    state.update_execution_options(sqlroute_role="primary")


class TestBinds:
    """What the application binds itself is not routed, and lives in the same transaction."""

    @pytest.fixture
    def other(self) -> Iterator[Any]:
        engine = create_engine("sqlite://")
        Base.metadata.tables["customer"].create(engine)
        yield engine
        engine.dispose()

    def test_a_mapper_of_another_database(self, router: Router, key: int, other: Any) -> None:
        with router.sessionmaker(binds={Customer: other})() as session:
            session.add(Customer(id=7, name="elsewhere"))
            session.commit()
            assert session.scalars(select(Customer.name)).all() == ["elsewhere"]
            assert session.get_one(Customer, 7).name == "elsewhere"
            assert session.scalar(select(func.count()).select_from(Order)) == 1
            session.get_one(Customer, 7).name = "new"
            session.rollback()
            assert session.scalars(select(Customer.name)).all() == ["elsewhere"]
        with router.sessionmaker()() as session:
            assert session.scalars(select(Customer.name)).all() == ["x"]

    def test_bind_is_there_for_libraries_that_look_at_it(
        self, shop: Shop, router: Router, other: Any
    ) -> None:
        """With one shard it is the primary's engine; and nothing is routed by it."""
        topology = shop.router.topology
        single = Topology((Keyspace("main", topology.default.shards[:1], 1),))
        with Router(single, shop.router.policy) as one, one.sessionmaker()() as session:
            assert session.bind.dialect.name == "postgresql"
            assert session.bind is one.primary_engine("s0")
            assert session.scalar(select(func.pg_is_in_recovery())) is True
            session.bind = other
            assert session.bind is other
            assert session.scalars(select(Customer.name)).all() == []
        with router.sessionmaker()() as session:
            assert session.bind is None

    def test_bind_mapper(self, router: Router, key: int, other: Any) -> None:
        with router.sessionmaker()() as session:
            session.bind_mapper(Customer, other)
            assert session.scalars(select(Customer.name)).all() == []

    def test_a_connection_of_the_callers(self, shop: Shop, router: Router, key: int) -> None:
        """It joins the session's transaction, as with a plain Session."""
        engine = router.primary_engine("s0")
        with engine.connect() as connection, router.sessionmaker()() as session:
            bound = {"bind": connection}
            session.execute(text("UPDATE customer SET name = 'y'"), bind_arguments=bound)
            session.rollback()
            assert shop.on("s0", "SELECT name FROM customer") == [("x",)]
            session.execute(text("UPDATE customer SET name = 'y'"), bind_arguments=bound)
            session.commit()
            assert shop.on("s0", "SELECT name FROM customer") == [("y",)]


def test_a_plan_prepared_before_a_migration(
    shop: Shop, make_router: Callable[..., Router], key: int
) -> None:
    """psycopg keeps prepared statements for the life of a connection that never rolls back."""
    router = make_router(pool_size=1, max_overflow=0)
    note = "CREATE TABLE note (id int PRIMARY KEY, n int); INSERT INTO note VALUES (1, 2)"
    shop.on("s0", note)
    statement = text("SELECT * FROM note").execution_options(
        sqlroute_shard="s0", sqlroute_role="replica", sqlroute_consistency="eventual"
    )
    try:
        shop.settle()
        with router.sessionmaker()() as session:
            for _ in range(20):
                assert session.execute(statement).all() == [(1, 2)]
        shop.on("s0", "ALTER TABLE note ALTER n TYPE text")
        shop.settle()
        with router.sessionmaker()() as session:
            for _ in range(20):
                assert session.execute(statement).all() == [(1, "2")]
        assert router.refused_writes == 0
    finally:
        shop.on("s0", "DROP TABLE note")
        shop.settle()


def test_a_table_that_replicas_do_not_have_yet(
    held: Shop, make_router: Callable[..., Router]
) -> None:
    """A migration is late there, too; the primary knows the name, or says that nobody does."""
    router = make_router(max_lag=60, consistency="bounded")
    held.on("s0", "CREATE TABLE fresh AS SELECT 1 AS one")
    try:
        statement = text("SELECT one FROM fresh").execution_options(sqlroute_shard="s0")
        with router.sessionmaker()() as session:
            assert session.scalar(statement) == 1
            assert session.scalar(statement) == 1
            nobody = text("SELECT one FROM nowhere").execution_options(sqlroute_shard="s0")
            with pytest.raises(exc.ProgrammingError, match="nowhere"):
                session.scalar(nobody)
    finally:
        held.on("s0", "DROP TABLE fresh")


def test_an_unlogged_table_is_read_on_the_primary(shop: Shop, router: Router) -> None:
    """A standby has no rows of it and says so; the primary has them."""
    shop.on("s0", "CREATE UNLOGGED TABLE scratch AS SELECT 1 AS one")
    try:
        shop.settle()
        statement = text("SELECT one FROM scratch").execution_options(sqlroute_shard="s0")
        before = router.refused_writes
        for _ in range(2):
            with router.sessionmaker()() as session:
                assert session.scalar(statement) == 1
        assert router.refused_writes == before + 1  # remembered
    finally:
        shop.on("s0", "DROP TABLE scratch")
        shop.settle()


def test_plain_sessions_agree(shop: Shop, router: Router, key: int) -> None:
    """The judge of the states above: the same calls raise the same of a plain Session."""
    with Session(router.primary_engine("s0")) as session, session.begin():
        session.commit()
        with pytest.raises(exc.InvalidRequestError, match="closed transaction inside context"):
            session.scalar(customer(key))


def test_a_stable_function_that_writes_can_be_rolled_back(shop: Shop, router: Router) -> None:
    """Its volatility is a lie, which a primary does not notice."""
    shop.on("s0", "CREATE TABLE hit (n int); "
            "CREATE FUNCTION hits() RETURNS int VOLATILE LANGUAGE sql AS "
            "'INSERT INTO hit VALUES (1) RETURNING n'; "
            "CREATE FUNCTION looks() RETURNS int STABLE LANGUAGE plpgsql AS "
            "'BEGIN RETURN hits(); END'")  # fmt: skip
    shop.settle()
    try:
        statement = select(func.looks()).execution_options(sqlroute_shard="s0")
        with router.sessionmaker(consistency="strong")() as session:
            for _ in range(2):
                session.scalar(statement)
                session.rollback()
        assert shop.on("s0", "SELECT count(*) FROM hit") == [(0,)]
        with router.sessionmaker(consistency="strong")() as session:
            session.scalar(statement)
            session.commit()
        assert shop.on("s0", "SELECT count(*) FROM hit") == [(1,)]
    finally:
        shop.on("s0", "DROP FUNCTION looks(); DROP FUNCTION hits(); DROP TABLE hit")
        shop.settle()


def test_options_of_statements_are_none_of_connections(router: Router) -> None:
    with router.sessionmaker()() as session, pytest.raises(UnknownName, match="of statements"):
        session.connection(
            bind_arguments={"shard": "s0"}, execution_options={"sqlroute_role": "replica"}
        )
