"""Transactions of a routed session: read-only ones, isolation, savepoints, settings that travel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import Ran, Shop
from models import Customer, Order
from sqlalchemy import exc, func, select, text, update

from sqlroute import (
    CrossShardRefused,
    PlanError,
    ReadOnlyRefused,
    Router,
    SettingRefused,
    UnknownName,
)

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

S0: dict[str, Any] = {"sqlroute_shard": "s0"}
VOUCHED: dict[str, Any] = {**S0, "sqlroute_role": "replica"}
REPLICAS = {"s0-b", "s0-c"}


@pytest.fixture
def keys(shop: Shop) -> tuple[int, int]:
    """A customer of each shard."""
    keys = shop.keys("s0")[0], shop.keys("s1")[0]
    shop.add(*(Customer(id=key, name="old") for key in keys))
    return keys


def name_of(key: int) -> Any:
    return select(Customer.name).where(Customer.id == key)


class TestReadOnly:
    def test_is_one_transaction_of_one_replica(
        self, router: Router, keys: tuple[int, int], ran: Ran
    ) -> None:
        """Each statement in it goes to the same replica, which knows that it is read-only."""
        with router.sessionmaker()() as session, session.begin(read_only=True):
            for _ in range(6):
                assert session.scalar(name_of(keys[0])) == "old"
            assert len(set(ran.nodes)) == 1
            assert set(ran.nodes) <= REPLICAS
            shown = session.scalar(text("SHOW transaction_read_only"), execution_options=VOUCHED)
            assert shown == "on"
            began = select(func.now())
            assert session.scalar(began, execution_options=S0) == session.scalar(
                began, execution_options=S0
            )

    def test_repeatable_read_holds_its_snapshot(
        self, shop: Shop, router: Router, keys: tuple[int, int]
    ) -> None:
        with router.sessionmaker()() as session:
            for level, expected in [("REPEATABLE READ", "old"), ("READ COMMITTED", "new")]:
                shop.on("s0", f"UPDATE customer SET name = 'old' WHERE id = {keys[0]}")
                shop.settle()
                with session.begin(read_only=True, isolation_level=level):
                    assert session.scalar(name_of(keys[0])) == "old"
                    shop.on("s0", f"UPDATE customer SET name = 'new' WHERE id = {keys[0]}")
                    shop.settle()
                    assert session.scalar(name_of(keys[0])) == expected
                assert session.scalar(name_of(keys[0])) == "new"
                session.rollback()

    def test_a_write_is_refused_before_it_is_sent(
        self, router: Router, keys: tuple[int, int], ran: Ran
    ) -> None:
        """At each door; the transaction goes on."""
        with router.sessionmaker()() as session, session.begin(read_only=True):
            customer = session.get_one(Customer, keys[0])
            ran.clear()
            for statement in (
                update(Customer).where(Customer.id == keys[0]).values(name="new"),
                sa.insert(Customer),
                select(Customer.id).where(Customer.id == keys[0]).with_for_update(),
                select(func.nextval("rate_id_seq")).execution_options(**S0),
                select(func.pg_advisory_lock(1)).execution_options(**S0),
            ):
                rows = [{"id": keys[0], "name": "x"}] if isinstance(statement, sa.Insert) else None
                with pytest.raises(ReadOnlyRefused, match=r"begun by begin\(read_only=True\)"):
                    session.execute(statement, rows)
            customer.name = "new"
            with pytest.raises(ReadOnlyRefused, match="a flush, but the transaction was begun"):
                session.flush()
            assert ran.statements == []
            session.expire(customer)
            assert customer.name == "old"

    def test_connection_is_the_transactions_own(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        """What no plan sees is refused by the server."""
        with router.sessionmaker()() as session, session.begin(read_only=True):
            connection = session.connection(bind_arguments={"shard": "s0"})
            assert connection.scalar(text("SELECT pg_is_in_recovery()")) is True
            with pytest.raises(exc.DBAPIError, match="read-only transaction"):
                connection.execute(text("CREATE TABLE nothing ()"))

    def test_serializable_runs_on_the_primary(self, router: Router, keys: tuple[int, int]) -> None:
        """A standby refuses it."""
        with router.sessionmaker()() as session:
            with session.begin(read_only=True, isolation_level="serializable"):
                assert (
                    session.scalar(select(func.pg_is_in_recovery()), execution_options=S0) is False
                )
                setting = text("SELECT current_setting('transaction_isolation'), "
                               "current_setting('transaction_read_only')")  # fmt: skip
                found = session.execute(setting, execution_options=VOUCHED).one()
                assert tuple(found) == ("serializable", "on")
            with session.begin():
                setting = text("SHOW transaction_read_only")
                assert session.scalar(setting, execution_options=S0) == "off"

    def test_covers_several_shards(self, router: Router, keys: tuple[int, int], ran: Ran) -> None:
        with router.sessionmaker()() as session, session.begin(read_only=True):
            names = session.scalars(select(Customer.name)).all()
            names += session.scalars(select(Customer.name)).all()
            assert names == ["old"] * 4
            assert len(set(ran.nodes)) == 2
            assert all(node[-1] in "bc" for node in ran.nodes)

    def test_sees_the_own_writes_before_it(
        self, keys: tuple[int, int], held: Shop, router: Router
    ) -> None:
        with router.sessionmaker()() as session:
            session.execute(update(Customer).where(Customer.id == keys[0]).values(name="new"))
            session.commit()
            with session.begin(read_only=True):
                assert session.scalar(name_of(keys[0])) == "new"
            with session.begin(read_only=True), session.consistency("eventual"):
                assert session.scalar(name_of(keys[0])) == "old"

    def test_async(self, keys: tuple[int, int], make_router: Callable[..., Router]) -> None:
        async def body() -> None:
            async with make_router() as router, router.async_sessionmaker()() as session:
                async with session.begin(read_only=True, isolation_level="REPEATABLE READ"):
                    assert await session.scalar(name_of(keys[0])) == "old"
                    shown = text("SHOW transaction_isolation")
                    found = await session.scalar(shown, execution_options=VOUCHED)
                    assert found == "repeatable read"
                    with pytest.raises(ReadOnlyRefused):
                        await session.execute(update(Customer).values(name="x"))
                async with session.begin():
                    session.add(Order(customer_id=keys[0], id=1, amount=1))
                found = await session.scalar(select(func.count()).select_from(Order))
                assert found == 1

        asyncio.run(body())


class TestPools:
    """A pooled connection serves the next session as if nothing had been."""

    def test_after_every_kind_of_transaction(
        self, make_router: Callable[..., Router], keys: tuple[int, int]
    ) -> None:
        router = make_router(pool_size=1, max_overflow=0)
        streamed = name_of(keys[0]).execution_options(yield_per=1)
        levels = (None, "REPEATABLE READ", "SERIALIZABLE", "READ COMMITTED")
        with router.sessionmaker()() as session:
            for level in levels:
                for read_only in (True, False):
                    with session.begin(read_only=read_only, isolation_level=level):
                        assert session.scalar(name_of(keys[0])) == "old"
                    assert session.scalar(name_of(keys[0])) == "old"
                    assert session.scalars(streamed).all() == ["old"]
                    session.rollback()
                    shown = text("SHOW transaction_isolation").execution_options(**S0)
                    assert session.scalar(shown) == "read committed"
                    session.execute(
                        update(Customer).where(Customer.id == keys[0]).values(name="old")
                    )
                    session.commit()

    def test_reads_within_a_streamed_read_need_no_second_connection(
        self, make_router: Callable[..., Router], keys: tuple[int, int]
    ) -> None:
        """Else as many loops as the pool has connections wait for each other."""
        router = make_router(pool_size=1, max_overflow=0, pool_timeout=1.0)
        with router.sessionmaker()() as session:
            streamed = select(Customer).where(Customer.id == keys[0])
            for customer in session.scalars(streamed.execution_options(yield_per=1)):
                assert customer.orders == []
                assert session.scalar(name_of(keys[0])) == "old"

    def test_two_phase_commits_need_no_second_connection(
        self, held: Shop, make_router: Callable[..., Router]
    ) -> None:
        router = make_router(pool_size=1, max_overflow=0, pool_timeout=1.0)
        key = held.keys("s0")[0]
        with router.sessionmaker(twophase=True)() as session:
            session.add(Customer(id=key, name="new"))
            session.commit()
            assert session.scalar(name_of(key)) == "new"
            token = session.token
        with router.sessionmaker(token=token)() as session:
            assert session.scalar(name_of(key)) == "new"

    def test_a_refused_write_says_nothing_of_the_primary(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        """One transaction was read-only; the server is as good as before."""
        with router.sessionmaker(consistency="strong")() as session:
            with session.begin(read_only=True):
                connection = session.connection(bind_arguments={"shard": "s0"})
                with pytest.raises(exc.DBAPIError, match="read-only transaction"):
                    connection.execute(text("CREATE TABLE nothing ()"))
            assert router.monitor.health.of("s0-a").is_readable
            session.execute(update(Customer).where(Customer.id == keys[0]).values(name="new"))
            session.commit()


class TestListeners:
    def test_of_after_begin_see_every_transaction(
        self, router: Router, keys: tuple[int, int], ran: Ran
    ) -> None:
        """Many applications set what guards their rows there; so a read begins one for them."""
        tenant = func.current_setting("app.tenant", True)

        def guard(_: Any, __: Any, connection: Any) -> None:
            connection.execute(text("SELECT set_config('app.tenant', '7', true)"))

        with router.sessionmaker()() as session:
            sa.event.listen(session, "after_begin", guard)
            ran.clear()
            read = select(tenant, Customer.id).where(Customer.id == keys[0])
            assert session.scalars(read).all() == ["7"]
            assert set(ran.nodes) <= REPLICAS
            assert session.scalars(select(tenant, Customer.id)).all() == ["7", "7"]
            session.commit()
            assert session.scalars(select(tenant, Customer.id)).all() == ["7", "7"]


def test_a_shard_is_named_as_for_a_connection(
    shop: Shop, router: Router, keys: tuple[int, int]
) -> None:
    with router.sessionmaker()() as session:
        named = {"bind_arguments": {"shard": "s1"}}
        assert session.scalars(select(Customer.id), **named).all() == [keys[1]]
        for wrong in ("moon", ["s0"]):
            named = {"bind_arguments": {"shard": wrong}}
            with pytest.raises((UnknownName, PlanError)):
                session.connection(**named)
            with pytest.raises((UnknownName, PlanError)):
                session.scalars(select(Customer.id), **named)


class TestIsolation:
    def test_of_a_transaction_on_the_primary(self, router: Router, keys: tuple[int, int]) -> None:
        shown = text("SHOW transaction_isolation")
        with router.sessionmaker()() as session:
            with session.begin(isolation_level="REPEATABLE READ"):
                assert session.scalar(shown, execution_options=S0) == "repeatable read"
            with session.begin():
                assert session.scalar(shown, execution_options=S0) == "read committed"

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    def test_of_a_session_needs_a_transaction(
        self, shop: Shop, router: Router, keys: tuple[int, int], level: str
    ) -> None:
        """Reads in AUTOCOMMIT would hold no snapshot."""
        options = {"isolation_level": level}
        with router.sessionmaker(execution_options=options)() as session:
            assert session.scalar(name_of(keys[0])) == "old"
            shop.on("s0", f"UPDATE customer SET name = 'new' WHERE id = {keys[0]}")
            shop.settle()
            assert session.scalar(name_of(keys[0])) == "old"
            session.commit()
            assert session.scalar(name_of(keys[0])) == "new"

    def test_autocommit_writes_are_seen(
        self, keys: tuple[int, int], held: Shop, router: Router
    ) -> None:
        """No COMMIT brings a position along, so the primary is asked before a replica is used."""
        options = {"isolation_level": "AUTOCOMMIT"}
        with router.sessionmaker(execution_options=options)() as session:
            session.execute(update(Customer).where(Customer.id == keys[0]).values(name="new"))
            session.commit()
            assert session.scalar(name_of(keys[0])) == "new"
            token = session.token
        with router.sessionmaker(token=token)() as session:
            assert session.scalar(name_of(keys[0])) == "new"

    def test_unknown_level(self, router: Router, ran: Ran) -> None:
        with router.sessionmaker()() as session:
            with pytest.raises(UnknownName, match="unknown isolation level 'CHAOS'; known: READ"):
                session.begin(isolation_level="chaos")
            with pytest.raises(PlanError, match="a savepoint has the mode of its transaction"):
                session.begin(nested=True, read_only=True)
            assert not session.in_transaction()
        assert ran.statements == []


class TestSettings:
    setting = staticmethod(lambda: select(func.current_setting("app.tenant", True)))

    def value(self, session: Any, **options: Any) -> Any:
        return session.scalar(self.setting(), execution_options={**S0, **options})

    def test_reach_replicas_primaries_and_both_shards(
        self, router: Router, keys: tuple[int, int], ran: Ran
    ) -> None:
        tenant = func.current_setting("app.tenant", True)
        with router.sessionmaker(settings={"app.tenant": 7})() as session:
            assert self.value(session) == "7"
            assert set(ran.nodes) <= REPLICAS
            assert self.value(session, sqlroute_role="primary") == "7"
            assert session.scalars(select(tenant, Customer.id)).all() == ["7", "7"]
            session.begin_nested()
            assert session.scalars(select(tenant, Customer.id).with_for_update().where(
                Customer.id == keys[0])).all() == ["7"]  # fmt: skip
            connection = session.connection(bind_arguments={"shard": "s1"})
            assert connection.scalar(self.setting()) == "7"
            session.rollback()
            with session.begin(read_only=True):
                assert self.value(session) == "7"

    def test_are_undone_before_somebody_else_gets_the_connection(
        self, make_router: Callable[..., Router], keys: tuple[int, int]
    ) -> None:
        """One connection per node, so the next session has the very same one."""
        router = make_router(pool_size=1, max_overflow=0)
        for end in ("commit", "rollback", "close"):
            with router.sessionmaker(settings={"app.tenant": "7"})() as session:
                assert self.value(session) == "7"
                session.execute(update(Customer).where(Customer.id == keys[0]).values(name="x"))
                assert self.value(session) == "7"
                getattr(session, end)()
            with router.sessionmaker()() as session:
                for _ in range(4):
                    assert self.value(session) in (None, "")
                assert self.value(session, sqlroute_role="primary") in (None, "")
                session.rollback()
                session.begin()
                assert self.value(session) in (None, "")

    def test_are_undone_after_an_error(
        self, make_router: Callable[..., Router], keys: tuple[int, int]
    ) -> None:
        router = make_router(pool_size=1, max_overflow=0)
        with router.sessionmaker(settings={"app.tenant": "7"})() as session:
            for _ in range(4):
                with pytest.raises(exc.DBAPIError, match="division by zero"):
                    session.scalar(select(sa.literal(1) / sa.literal(0)), execution_options=S0)
            assert self.value(session) == "7"
        with router.sessionmaker()() as session:
            assert {self.value(session) for _ in range(4)} <= {None, ""}

    def test_a_block_restores_what_was(self, router: Router, keys: tuple[int, int]) -> None:
        """Within a transaction, too."""
        with router.sessionmaker(settings={"app.tenant": "7"})() as session:
            with session.settings(**{"app.tenant": "8", "app.user": "it's 100%\\"}):
                assert self.value(session) == "8"
                user = select(func.current_setting("app.user", True))
                assert session.scalar(user, execution_options=S0) == "it's 100%\\"
            assert self.value(session) == "7"
            session.begin_nested()
            assert self.value(session) == "7"
            with session.settings(**{"app.tenant": "8", "app.user": "it's 100%\\"}):
                assert self.value(session) == "8"
                assert session.scalar(user, execution_options=S0) == "it's 100%\\"
            assert self.value(session) == "7"
            assert session.scalar(user, execution_options=S0) == ""

    def test_survive_a_savepoint_that_is_rolled_back(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        with router.sessionmaker()() as session:
            session.begin()
            assert self.value(session) in (None, "")
            savepoint = session.begin_nested()
            session.settings(**{"app.tenant": "7"})
            assert self.value(session) == "7"
            savepoint.rollback()
            assert self.value(session) == "7"

    def test_end_with_their_block_whatever_savepoints_do(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        user = select(func.current_setting("app.user", True))
        with router.sessionmaker()() as session, session.begin():
            with session.settings(**{"app.tenant": "7"}):
                assert self.value(session) == "7"
                with session.begin_nested():
                    pass
            assert self.value(session) == ""
            with session.settings(**{"app.tenant": "8"}):
                assert self.value(session) == "8"
            savepoint = session.begin_nested()
            assert self.value(session) == ""
            savepoint.rollback()
            session.settings(**{"app.user": "x"})
            assert session.scalar(user, execution_options=S0) == "x"
            assert self.value(session) == ""

    def test_end_with_their_own_block_in_any_order(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        """As two generators of a web framework may end; what holds for the session stays."""
        with router.sessionmaker()() as session:
            one = session.settings(**{"app.tenant": "1"})
            two = session.settings(**{"app.tenant": "2"})
            reading, tolerant = session.reading(), session.lag_tolerant()
            for block in (one, two, reading, tolerant):
                block.__enter__()
            session.settings(**{"app.user": "x"})
            assert self.value(session) == "2"
            one.__exit__(None, None, None)
            assert self.value(session) == "2"
            two.__exit__(None, None, None)
            assert self.value(session) in (None, "")
            user = select(func.current_setting("app.user", True))
            assert session.scalar(user, execution_options=S0) == "x"
            reading.__exit__(None, None, None)
            with pytest.raises(ReadOnlyRefused, match="lag_tolerant"):
                session.execute(update(Customer).values(name="y"))
            tolerant.__exit__(None, None, None)
            session.execute(update(Customer).where(Customer.id == keys[0]).values(name="y"))

    def test_of_a_session_that_lives_long_take_no_room(self, router: Router) -> None:
        with router.sessionmaker()() as session:
            for number in range(50):
                session.settings(**{"app.tenant": number})
                with session.settings(**{"app.user": number}):
                    pass
            assert self.value(session) == "49"
            assert len(session._settings._wishes) <= 2

    def test_survive_savepoints_that_the_session_does_not_know(
        self, router: Router, keys: tuple[int, int]
    ) -> None:
        with router.sessionmaker()() as session, session.begin():
            connection = session.connection(bind_arguments={"shard": "s0"})
            savepoint = connection.begin_nested()
            session.settings(**{"app.tenant": "7"})
            assert self.value(session) == "7"
            savepoint.rollback()
            assert self.value(session) == "7"
            session.execute(text("SAVEPOINT a"), execution_options=S0)
            session.settings(**{"app.tenant": "8"})
            assert self.value(session) == "8"
            session.execute(text("ROLLBACK TO SAVEPOINT a"), execution_options=S0)
            assert self.value(session) == "8"

    def test_reach_a_flush_and_a_bulk_insert(
        self, shop: Shop, router: Router, keys: tuple[int, int]
    ) -> None:
        """As the first thing of a transaction, on both shards."""
        tenant = func.current_setting("app.tenant", True)
        zero, one = shop.keys("s0", 3)[1:], shop.keys("s1", 3)[1:]
        with router.sessionmaker(settings={"app.tenant": "7"})() as session:
            session.add_all(Customer(id=key, name=tenant) for key in (zero[0], one[0]))
            session.commit()
            for key in (zero[1], one[1]):
                session.execute(sa.insert(Customer).values(id=key, name=tenant))
            session.commit()
        for shard in ("s0", "s1"):
            found = shop.on(shard, "SELECT name FROM customer ORDER BY name")
            assert found == [("7",), ("7",), ("old",)], shard

    def test_of_a_role_commit_on_two_shards(self, shop: Shop, keys: tuple[int, int]) -> None:
        """Only the role that prepared may finish: it is the one that logs in."""
        for shard in ("s0", "s1"):
            shop.on(shard, "DROP ROLE IF EXISTS clerk; CREATE ROLE clerk; "
                    "GRANT SELECT, UPDATE ON customer TO clerk; "
                    "CREATE ROLE web LOGIN PASSWORD 'x' IN ROLE clerk; "
                    "GRANT USAGE ON SCHEMA sqlroute TO web; "
                    "GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA sqlroute TO web")  # fmt: skip
        try:
            nodes = {
                s.name: [f"postgresql://web:x@{n.conninfo['host']}:{n.port}/{n.conninfo['dbname']}"
                         for n in s.nodes]
                for s in shop.servers.shards
            }  # fmt: skip
            shards = [{"name": name, "nodes": urls} for name, urls in nodes.items()]
            keyspace = shop.router.topology.default
            rules = {"buckets": keyspace.buckets, "shards": shards}
            with (
                Router.from_config({"keyspaces": {keyspace.name: rules}}) as router,
                router.sessionmaker(settings={"role": "clerk"})() as session,
            ):
                for customer in session.scalars(select(Customer)):
                    customer.name = "new"
                session.commit()
                assert session.scalars(select(Customer.name)).all() == ["new", "new"]
        finally:
            for shard in ("s0", "s1"):
                shop.on(shard, "DROP OWNED BY web; DROP ROLE web; "
                        "DROP OWNED BY clerk; DROP ROLE clerk")  # fmt: skip

    @pytest.mark.parametrize(
        "value", ["\\', true); SET default_transaction_read_only=on; --", "E'%s"]
    )
    def test_are_quoted(self, shop: Shop, keys: tuple[int, int], value: str) -> None:
        """Also where strings do not conform to the standard, which a database may say."""
        shop.on("s0", "ALTER ROLE ALL SET standard_conforming_strings = off")
        try:
            router = Router(shop.router.topology, shop.router.policy)
            with router, router.sessionmaker(settings={"app.tenant": value})() as session:
                assert self.value(session) == value
                session.begin_nested()
                assert self.value(session) == value
        finally:
            shop.on("s0", "ALTER ROLE ALL RESET standard_conforming_strings")

    def test_guard_rows_on_every_node(
        self, shop: Shop, router: Router, keys: tuple[int, int]
    ) -> None:
        """Row-level security keyed on a setting holds on replicas, primaries and in scatters."""
        for shard in ("s0", "s1"):
            shop.on(shard, "DROP ROLE IF EXISTS clerk; CREATE ROLE clerk; "
                    "GRANT SELECT, UPDATE ON customer TO clerk; "
                    "ALTER TABLE customer ENABLE ROW LEVEL SECURITY; "
                    "CREATE POLICY own ON customer USING "
                    "(name = current_setting('app.tenant', true))")  # fmt: skip
        shop.settle()
        try:
            names = select(Customer.name)
            settings = {"role": "clerk", "app.tenant": "old"}
            with router.sessionmaker(settings=settings)() as session:
                assert session.scalars(names).all() == ["old", "old"]
                assert session.scalars(names.with_for_update().where(
                    Customer.id == keys[0])).all() == ["old"]  # fmt: skip
                session.rollback()
                session.settings(**{"app.tenant": "mine"})
                assert session.scalars(names).all() == []
                assert session.scalar(name_of(keys[0])) is None
                session.rollback()
                with session.begin():
                    assert session.scalar(name_of(keys[0])) is None
            with router.sessionmaker()() as session:
                assert session.scalars(names).all() == ["old", "old"]
        finally:
            for shard in ("s0", "s1"):
                shop.on(shard, "DROP POLICY own ON customer; "
                        "ALTER TABLE customer DISABLE ROW LEVEL SECURITY; "
                        "DROP OWNED BY clerk; DROP ROLE clerk")  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("transaction_read_only", "off", "routing decides it"),
            ("Default_Transaction_Isolation", "x", "routing decides it"),
            ("client_encoding", "LATIN1", "psycopg depends on it"),
            ("session_authorization", "postgres", "use role"),
            ("app.tenant; DROP TABLE customer", "7", "no name of a setting"),
            ("", "7", "no name of a setting"),
            ("app.tenant", None, "has a value of type NoneType"),
            ("app.tenant", b"7", "has a value of type bytes"),
            ("app.tenant", "a\0b", "without NUL"),
            ("app.tenant", "\ud800", "without NUL"),
            (5, "7", "no name of a setting"),
        ],
    )
    def test_that_may_not_be_carried(
        self, router: Router, ran: Ran, name: str, value: Any, message: str
    ) -> None:
        with router.sessionmaker()() as session:
            with pytest.raises(SettingRefused, match=message):
                router.sessionmaker(settings={name: value})()
            assert ran.statements == []
            assert self.value(session) in (None, "")

    def test_that_the_server_refuses_is_its_error(self, router: Router) -> None:
        with router.sessionmaker()() as session:
            with (
                session.settings(wal_level="minimal"),
                pytest.raises(exc.DBAPIError, match="wal_level"),
            ):
                self.value(session)
            assert self.value(session) in (None, "")

    def test_async(self, keys: tuple[int, int], make_router: Callable[..., Router]) -> None:
        tenant = func.current_setting("app.tenant", True)

        async def body() -> None:
            async with make_router(pool_size=1, max_overflow=0) as router:
                async with router.async_sessionmaker(settings={"app.tenant": 7})() as session:
                    found = await session.scalars(select(tenant, Customer.id))
                    assert found.all() == ["7", "7"]
                    with session.settings(**{"app.tenant": 8}):
                        assert await session.scalar(self.setting(), execution_options=S0) == "8"
                    async with session.begin_nested():
                        assert await session.scalar(self.setting(), execution_options=S0) == "7"
                async with router.async_sessionmaker()() as session:
                    found = await session.scalar(self.setting(), execution_options=S0)
                    assert found in (None, "")

        asyncio.run(body())


class TestSetByHand:
    @pytest.mark.parametrize(
        "statement",
        [
            text("SET LOCAL app.tenant = '7'"),
            text("SELECT set_config('app.tenant', '7', true)"),
            select(func.set_config("app.tenant", "7", True)),
        ],
    )
    def test_pins_the_session_to_its_node(
        self, router: Router, keys: tuple[int, int], ran: Ran, statement: Any
    ) -> None:
        """Reads of that shard have the setting; another shard does not, so it is refused."""
        with router.sessionmaker()() as session:
            session.execute(statement, execution_options=S0)
            tenant = select(func.current_setting("app.tenant", True))
            assert session.scalar(tenant, execution_options=S0) == "7"
            assert session.scalar(name_of(keys[0])) == "old"
            assert set(ran.nodes) == {"s0-a"}
            for read in (select(Customer.name), name_of(keys[1])):
                with pytest.raises(CrossShardRefused, match=r"use session.settings\(...\)"):
                    session.execute(read)
            session.rollback()
            assert session.scalars(select(Customer.name)).all() == ["old", "old"]
