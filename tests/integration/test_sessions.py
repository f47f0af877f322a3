"""Promises of a routed session on real servers: where statements go, and what they see."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import PRIMARIES, REPLICAS, Ran, Shop, until
from models import Base, Country, Customer, Document, Order, Rate, Reading, Setting
from sqlalchemy import exc, func, orm, select

from sqlroute import Router, RoutingMixin, RoutingSession
from sqlroute.errors import (
    CrossShardRefused,
    MissingShardKey,
    PlanError,
    StaleShardMap,
    UnknownName,
    UnownedBucket,
)
from sqlroute.routing.token import parse_lsn
from sqlroute.topology import ShardMap

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

PORT = func.inet_server_port()


def two_customers(shop: Shop) -> tuple[int, int]:
    """Store one customer on each shard; return their keys."""
    zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
    shop.add(Customer(id=zero, name="zero"), Customer(id=one, name="one"))
    return zero, one


class TestReads:
    def test_a_read_goes_to_a_replica_in_autocommit(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """One round trip on a replica, and the connection is back in its pool at once."""
        zero, _ = two_customers(shop)

        session.execute(select(func.count()).where(Customer.id == zero))  # opens the connection
        before = shop.checked_out
        ran.clear()
        idle = "SELECT xact_start IS NOT NULL FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        found = session.execute(
            select(Customer.name, func.pg_is_in_recovery()).where(Customer.id == zero)
        ).one()

        assert (found.name, found[1]) == ("zero", True)
        assert (before, shop.checked_out) == (0, 0)
        assert len(ran.statements) == 1
        assert ran.nodes[0] in ("s0-b", "s0-c")
        states = shop.at(
            ran.nodes[0],
            "SELECT state FROM pg_stat_activity WHERE backend_type = 'client backend' "
            "AND application_name NOT LIKE 'sqlroute%' AND pid <> pg_backend_pid()",
        )
        assert {state for (state,) in states} <= {"idle"}, idle

    def test_entities_are_loaded_after_the_connection_went_back(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """A result outlives its connection."""
        zero, _ = two_customers(shop)

        result = session.execute(select(Customer).where(Customer.id == zero))

        assert shop.checked_out == 0
        assert result.scalar_one().name == "zero"

    def test_one_replica_per_shard_serves_a_transaction(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """Two reads of one transaction see one replica, so time does not run back between them."""
        zero, one = two_customers(shop)

        for _ in range(5):
            seen = {
                (key, session.scalar(select(PORT).where(Customer.id == key)))
                for _ in range(8)
                for key in (zero, one)
            }
            session.commit()
            assert len(seen) == 2

    def test_reads_are_spread_over_the_replicas(self, shop: Shop, router: Router) -> None:
        """Different sessions use different replicas."""
        zero, _ = two_customers(shop)
        make = router.sessionmaker()

        seen = set()
        for _ in range(40):
            with make() as session:
                seen.add(shop.node(session.scalar(select(PORT).where(Customer.id == zero)) or 0))
        assert seen == {"s0-b", "s0-c"}

    def test_in_runs_on_the_shards_of_its_values(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """IN asks one shard when all its keys live there, and both when they do not."""
        zeros, (one,) = shop.keys("s0", 3), shop.keys("s1")
        shop.add(*(Customer(id=key, name=f"c{key}") for key in (*zeros, one)))

        ran.clear()
        same = session.scalars(select(Customer).where(Customer.id.in_(zeros))).all()
        assert {node[:2] for node in ran.nodes} == {"s0"}
        ran.clear()
        both = session.scalars(
            select(Customer).where(Customer.id.in_([*zeros, one])).order_by(Customer.id)
        ).all()
        assert {node[:2] for node in ran.nodes} == {"s0", "s1"}
        assert sorted(c.id for c in same) == sorted(zeros)
        assert [c.id for c in both] == sorted([*zeros, one])

    def test_a_read_of_nothing_gives_an_empty_result(self, session: RoutingSession) -> None:
        """Conditions that exclude every row still give a result of the right shape."""
        result = session.execute(select(Customer.id, Customer.name).where(Customer.id.in_([])))

        assert list(result.keys()) == ["id", "name"]
        assert result.all() == []

    def test_an_unknown_option_is_refused(self, session: RoutingSession) -> None:
        """A misspelt option is an error, never ignored."""
        with pytest.raises(UnknownName, match="sqlroute_chard"):
            session.execute(select(Customer), execution_options={"sqlroute_chard": "s0"})
        with pytest.raises(PlanError, match="s9"):
            session.execute(select(Customer), execution_options={"sqlroute_shard": "s9"})

    def test_a_named_shard_is_used(self, shop: Shop, router: Router, ran: Ran) -> None:
        """By an option of the call, of the statement, or of the whole session."""
        two_customers(shop)
        named = {"sqlroute_shard": "s1"}
        names = select(Customer.name)

        with router.sessionmaker()() as session:
            assert session.scalars(names, execution_options=named).all() == ["one"]
            assert session.scalars(names.execution_options(**named)).all() == ["one"]
            assert session.scalars(sa.text("SELECT 1"), execution_options=named).all() == [1]
        with router.sessionmaker(execution_options=named)() as session:
            assert session.scalars(names).all() == ["one"]


class TestPrimary:
    def test_reads_after_a_write_stay_on_the_primary(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """Within the transaction, and only those of the shard that was written."""
        zero, one = two_customers(shop)

        session.execute(sa.update(Customer).where(Customer.id == zero).values(name="new"))
        ran.clear()
        assert session.scalar(select(Customer.name).where(Customer.id == zero)) == "new"
        assert session.scalar(select(Customer.name).where(Customer.id == one)) == "one"
        session.rollback()

        assert ran.nodes[0] == "s0-a"
        assert ran.nodes[1] in ("s1-b", "s1-c")

    def test_pending_objects_are_seen_by_reads(self, shop: Shop, session: RoutingSession) -> None:
        """Autoflush comes before the plan: a read sees what the session has added."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        session.add_all([Customer(id=zero, name="a"), Customer(id=one, name="b")])

        assert session.scalar(select(Customer.name).where(Customer.id == zero)) == "a"
        assert session.scalar(select(func.count()).select_from(Customer)) == 2
        session.rollback()

    def test_an_explicit_begin_is_a_primary_transaction(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """session.begin() says that writes will come: its reads are the primary's."""
        zero, _ = two_customers(shop)
        ran.clear()

        with session.begin():
            session.scalars(select(Customer).where(Customer.id == zero)).all()
            session.scalars(select(Customer)).all()
        assert set(ran.nodes) == set(PRIMARIES)
        ran.clear()
        session.scalars(select(Customer).where(Customer.id == zero)).all()
        assert set(ran.nodes) <= set(REPLICAS)

    def test_what_is_no_proved_read_goes_to_the_primary(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """Locks, writes in CTEs, sequences, advisory locks, text and unknown functions."""
        zero, _ = two_customers(shop)
        key = Customer.id == zero
        inserted = (
            sa.insert(Order.__table__)  # type: ignore[arg-type]
            .values(customer_id=zero, id=1)
            .returning(Order.__table__.c.id)
            .cte()
        )
        s0 = {"sqlroute_shard": "s0"}
        locked = select(Customer.id).where(key).with_for_update().subquery()
        statements: list[Any] = [
            select(Customer).where(key).with_for_update(),
            select(Customer).where(key).with_for_update(read=True),
            select(locked.c.id),
            select(inserted.c.id).execution_options(**s0),
            select(func.nextval("rate_id_seq")).execution_options(**s0),
            select(func.pg_advisory_xact_lock(7)).execution_options(**s0),
            select(func.pg_try_advisory_xact_lock(7), Customer.id).where(key),
            select(func.txid_current(), Customer.id).where(key),
            sa.text("SELECT nextval('rate_id_seq')").execution_options(**s0),
            select(sa.text("pg_backend_pid()")).where(key).execution_options(**s0),
            sa.Sequence("rate_id_seq"),
        ]
        for statement in statements:
            options = s0 if isinstance(statement, sa.Sequence) else {}
            ran.clear()
            session.scalar(statement, execution_options=options)
            assert set(ran.nodes) <= {"s0-a"}, statement
            assert ran.nodes, statement
            session.rollback()
        ran.clear()
        with pytest.raises(exc.ProgrammingError, match="some_schema"):
            session.execute(select(func.some_schema.count(Customer.id)).where(key))
        assert ran.nodes == ["s0-a"]

    def test_get_with_for_update_locks_on_the_primary(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """session.get(..., with_for_update=True) and refresh(with_for_update=...)."""
        zero, _ = two_customers(shop)
        ran.clear()

        customer = session.get_one(Customer, zero, with_for_update=True)
        session.refresh(customer, with_for_update=True)

        assert ran.nodes == ["s0-a", "s0-a"]

    def test_a_connection_pins_its_shard(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """session.connection() is the primary's, and the transaction's reads follow it."""
        zero, one = two_customers(shop)

        with pytest.raises(CrossShardRefused, match="bind_arguments"):
            session.connection()
        connection = session.connection(bind_arguments={"shard": "s0"})
        connection.execute(sa.text("CREATE TEMP TABLE t ON COMMIT DROP AS SELECT 1 AS x"))
        ran.clear()
        session.execute(select(Customer).where(Customer.id == zero))
        session.execute(select(Customer).where(Customer.id == one))
        session.rollback()

        assert ran.nodes[0] == "s0-a"
        assert ran.nodes[1] in ("s1-b", "s1-c")
        with pytest.raises(UnknownName, match="s9"):
            session.connection(bind_arguments={"shard": "s9"})

    def test_merge_reads_the_primary(self, held: Shop, session: RoutingSession) -> None:
        """Its load decides between INSERT and UPDATE, so it must not be an old one."""
        zero = held.keys("s0")[0]
        held.on("s0", f"INSERT INTO customer (id, name) VALUES ({zero}, 'there')")

        session.merge(Customer(id=zero, name="merged"))
        session.commit()

        assert held.on("s0", "SELECT name FROM customer") == [("merged",)]

    def test_strong_consistency_reads_the_primary(
        self, shop: Shop, make_router: Callable[..., Router], ran: Ran
    ) -> None:
        """consistency = strong: every read is the primary's."""
        from sqlroute import Consistency

        two_customers(shop)
        ran.clear()
        with make_router(consistency=Consistency.STRONG).sessionmaker()() as session:
            session.scalars(select(Customer)).all()
        assert set(ran.nodes) == set(PRIMARIES)


class TestOwnWrites:
    """Every replica is held 3 s behind."""

    def test_attributes_after_a_commit_are_the_written_ones(
        self, held: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """expire_on_commit reloads what was written, never what was before."""
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        added = [Customer(id=zero, name="a"), Customer(id=one, name="b")]
        session.add_all(added)
        session.commit()
        assert [(c.name, c.score) for c in added] == [("a", 7), ("b", 7)]
        added[0].name = "changed"
        session.commit()
        assert added[0].name == "changed"
        session.refresh(added[0])
        assert added[0].name == "changed"

    def test_new_reads_see_the_write(self, held: Shop, session: RoutingSession) -> None:
        """get, a keyed select, a scattered select and a lazy load, in later transactions."""
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        session.add(Customer(id=zero, name="a", orders=[Order(id=1, amount=Decimal("1.50"))]))
        session.add(Customer(id=one, name="b"))
        session.commit()
        session.expunge_all()

        found = session.get(Customer, zero)
        assert found is not None
        assert [order.amount for order in found.orders] == [Decimal("1.50")]
        session.rollback()
        assert session.scalar(select(Customer.name).where(Customer.id == one)) == "b"
        session.rollback()
        names = session.scalars(select(Customer.name).order_by(Customer.name)).all()
        assert names == ["a", "b"]
        session.close()
        assert session.scalar(select(func.count()).select_from(Customer)) == 2

    def test_writes_by_core_text_and_connection_are_seen(
        self, held: Shop, session: RoutingSession
    ) -> None:
        """Whichever door a write takes, its session sees it afterwards."""
        keys = held.keys("s0", 5)
        session.execute(sa.insert(Customer), [{"id": keys[0], "name": "bulk"}])
        session.commit()
        assert session.scalar(select(Customer.name).where(Customer.id == keys[0])) == "bulk"
        session.rollback()
        insert = "INSERT INTO customer (id, name) VALUES (:id, 'text')"
        s0 = {"sqlroute_shard": "s0"}
        session.execute(sa.text(insert), {"id": keys[1]}, execution_options=s0)
        session.commit()
        assert session.scalar(select(Customer.name).where(Customer.id == keys[1])) == "text"
        session.rollback()
        connection = session.connection(bind_arguments={"shard": "s0"})
        connection.execute(sa.text(insert), {"id": keys[2]})
        session.commit()
        assert session.scalar(select(Customer.name).where(Customer.id == keys[2])) == "text"
        session.rollback()
        session.execute(sa.delete(Customer).where(Customer.id == keys[2]))
        session.commit()
        assert session.scalar(select(Customer.name).where(Customer.id == keys[2])) is None

    def test_reference_rows_are_seen(self, held: Shop, session: RoutingSession) -> None:
        """A reference row written on all shards is seen from each."""
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        session.add(Country(code="FR", name="France"))
        session.flush()
        session.add_all([Customer(id=k, name="x", country_code="FR") for k in (zero, one)])
        session.commit()

        joined = select(Customer.id, Country.name).join(Country).order_by(Customer.id)
        assert session.execute(joined).all() == [(k, "France") for k in sorted((zero, one))]
        session.rollback()
        assert session.scalar(select(Country.name)) == "France"

    def test_twophase_sessions_see_their_writes(self, held: Shop, router: Router) -> None:
        """Session(twophase=True): SQLAlchemy's own two-phase commit leaves tokens too."""
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        with router.sessionmaker(twophase=True)() as session:
            added = [Customer(id=zero, name="a"), Customer(id=one, name="b")]
            session.add_all(added)
            session.commit()
            assert [c.name for c in added] == ["a", "b"]
            assert {token.shard for token in session.token.positions} == {"s0", "s1"}

    def test_the_replicas_are_used_again(
        self, held: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """Once a replica has replayed the token it takes the session's reads again."""
        zero = held.keys("s0")[0]
        session.add(Customer(id=zero, name="a"))
        session.commit()
        ran.clear()

        def is_replica() -> bool:
            session.rollback()
            found = session.execute(
                select(Customer.name, func.pg_is_in_recovery()).where(Customer.id == zero)
            ).one()
            assert found.name == "a"
            return bool(found[1])

        assert not is_replica()
        assert 0.5 < until(is_replica, 10) < 6

    def test_other_sessions_still_read_replicas(self, held: Shop, router: Router) -> None:
        """A session that has written nothing needs no primary."""
        zero = held.keys("s0")[0]
        with router.sessionmaker()() as writer, router.sessionmaker()() as reader:
            writer.add(Customer(id=zero, name="a"))
            writer.commit()
            assert reader.scalar(select(func.pg_is_in_recovery()).select_from(Country)) is None
            assert reader.scalar(select(Customer.name).where(Customer.id == zero)) is None

    def test_token_covers_a_commit_that_is_not_flushed_yet(
        self, shop: Shop, router: Router
    ) -> None:
        """With synchronous_commit = off the flush position may be before the own commit."""
        (key,) = shop.keys("s0")
        shop.add(Customer(id=key, name="flushed"))
        with router.sessionmaker()() as session:
            connection = session.connection(bind_arguments={"shard": "s0"})
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            session.execute(sa.update(Customer).where(Customer.id == key).values(name="unflushed"))
            before = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()").scalar_one()
            session.commit()
            (token,) = session.token.positions

        assert token.lsn > parse_lsn(before)


class TestObjects:
    def test_get_finds_the_identity_map_without_sql(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """For each kind of key."""
        zero, one = two_customers(shop)
        document = Document(title="d")
        shop.add(Setting(name="é", value="v"), Reading(device=-1, slot=2, value=3), document)
        wanted: list[tuple[Any, Any]] = [
            (Customer, zero),
            (Customer, one),
            (Setting, "é"),
            (Reading, (-1, 2)),
            (Reading, {"device": -1, "slot": 2}),
        ]
        found = [session.get_one(entity, key) for entity, key in wanted]

        ran.clear()
        assert [session.get(entity, key) for entity, key in wanted] == found
        assert ran.statements == []

    def test_each_object_carries_its_shard(self, shop: Shop, session: RoutingSession) -> None:
        """Loaded, scattered or flushed: the identity token is the shard."""
        zero, one = two_customers(shop)
        new = shop.keys("s1", 2)[1]
        session.add(Customer(id=new, name="new"))
        session.flush()
        everyone = session.scalars(select(Customer)).all()
        tokens = {c.id: sa.inspect(c).identity_token for c in everyone}
        assert tokens == {zero: "s0", one: "s1", new: "s1"}
        session.rollback()
        one_row = session.get_one(Customer, one)
        assert sa.inspect(one_row).identity_key[2] == "s1"

    def test_equal_keys_of_two_shards_are_two_objects(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """Orders 1 of two customers do not collide."""
        zero, one = two_customers(shop)
        shop.add(
            Order(customer_id=zero, id=1, amount=Decimal(10)),
            Order(customer_id=one, id=1, amount=Decimal(20)),
        )

        orders = session.scalars(select(Order).where(Order.id == 1).order_by(Order.amount)).all()

        assert [(o.customer_id, o.amount) for o in orders] == [(zero, 10), (one, 20)]

    def test_relationships_load_from_their_shards(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """Lazy, selectin, joined and subquery loads give what was stored, one shard a parent."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        shop.add(Country(code="DE", name="Germany"))
        shop.add(
            *(
                Customer(
                    id=key,
                    name=str(key),
                    country_code="DE",
                    orders=[Order(id=i, amount=Decimal(key * 10 + i)) for i in range(3)],
                )
                for key in (zero, one)
            )
        )
        expected = {key: [Decimal(key * 10 + i) for i in range(3)] for key in (zero, one)}

        for loader in (orm.lazyload, orm.selectinload, orm.joinedload, orm.immediateload):
            for keys in ([zero], [one], [zero, one]):
                session.rollback()
                session.expunge_all()
                ran.clear()
                statement = (
                    select(Customer)
                    .where(Customer.id.in_(keys))
                    .options(loader(Customer.orders), loader(Customer.country))
                    .order_by(Customer.id)
                )
                found = session.scalars(statement).unique().all()
                loaded = {c.id: [o.amount for o in c.orders] for c in found}
                assert loaded == {key: expected[key] for key in keys}, loader
                assert [c.country.name for c in found if c.country] == ["Germany"] * len(keys)
                assert all(o.customer is c for c in found for o in c.orders)
                if keys == [one] and loader is not orm.lazyload:
                    assert {node[:2] for node in ran.nodes} == {"s1"}, loader

    def test_a_refresh_goes_to_the_home_of_the_object(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """refresh(), expired attributes and deferred columns ask one shard."""
        _, one = two_customers(shop)
        customer = session.get_one(Customer, one, options=[orm.defer(Customer.score)])
        ran.clear()

        assert customer.score == 7
        session.refresh(customer)
        session.expire(customer)
        assert customer.name == "one"
        assert len(ran.nodes) == 3
        assert {node[:2] for node in ran.nodes} == {"s1"}

    def test_a_cascade_deletes_on_the_shard(self, shop: Shop, session: RoutingSession) -> None:
        """Deleting a parent deletes its children where they are."""
        zero, one = two_customers(shop)
        shop.add(*(Order(customer_id=key, id=1) for key in (zero, one)))

        for customer in session.scalars(select(Customer)).all():
            session.delete(customer)
        session.commit()

        for shard in ("s0", "s1"):
            assert shop.on(shard, 'SELECT count(*) FROM "order"') == [(0,)]
            assert shop.on(shard, "SELECT count(*) FROM customer") == [(0,)]

    def test_savepoints_roll_back_on_all_shards(self, shop: Shop, session: RoutingSession) -> None:
        """begin_nested() covers every shard that takes part, before and after it."""
        zeros, ones = shop.keys("s0", 3), shop.keys("s1", 3)
        session.add(Customer(id=zeros[0], name="kept"))
        session.flush()
        with session.begin_nested() as savepoint:
            session.add_all([Customer(id=key, name="lost") for key in (zeros[1], ones[1])])
            session.flush()
            savepoint.rollback()
        with session.begin_nested():
            session.add_all([Customer(id=key, name="kept") for key in (zeros[2], ones[2])])
        session.commit()

        rows = sorted(shop.on("s0", "SELECT id FROM customer"))
        rows += sorted(shop.on("s1", "SELECT id FROM customer"))
        assert rows == [(zeros[0],), (zeros[2],), (ones[2],)]

    def test_a_rollback_leaves_nothing(self, shop: Shop, session: RoutingSession) -> None:
        """On any shard; and the session reads replicas again."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        session.add_all([Customer(id=key, name="x") for key in (zero, one)])
        session.flush()
        session.rollback()

        assert session.scalar(select(func.count()).select_from(Customer)) == 0
        until(lambda: session.scalars(select(func.pg_is_in_recovery())).one() is True)

    def test_expire_on_commit_false_reads_nothing(
        self, shop: Shop, router: Router, ran: Ran
    ) -> None:
        """As with a plain sessionmaker."""
        zero = shop.keys("s0")[0]
        with router.sessionmaker(expire_on_commit=False)() as session:
            customer = Customer(id=zero, name="x")
            session.add(customer)
            session.commit()
            ran.clear()
            assert customer.name == "x"
            assert ran.statements == []

    def test_merged_many_to_one_finds_the_reference_row(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """A many-to-one to a reference table is read once and then found in the session."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        shop.add(Country(code="DE", name="Germany"))
        shop.add(*(Customer(id=k, name="x", country_code="DE") for k in (zero, one)))

        customers = session.scalars(select(Customer).order_by(Customer.id)).all()
        ran.clear()
        countries = [customer.country for customer in customers]

        assert countries[0] is countries[1]
        assert len(ran.statements) == 1

    def test_a_shared_reference_object_is_written_once(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """Changing a reference object changes its row on all shards."""
        shop.add(Country(code="DE", name="Germany"))
        country = session.get_one(Country, "DE")
        country.name = "Deutschland"
        session.commit()

        for shard in ("s0", "s1"):
            assert shop.on(shard, "SELECT name FROM country") == [("Deutschland",)]


class TestWrites:
    def test_bulk_inserts_are_split(self, shop: Shop, session: RoutingSession) -> None:
        """session.execute(insert(...), rows) puts each row on its shard, by ORM and by Core."""
        keys = [*shop.keys("s0", 4), *shop.keys("s1", 4)]
        rows = [{"id": key, "name": f"n{key}"} for key in keys]

        session.execute(sa.insert(Customer), rows[::2])
        session.execute(sa.insert(Customer.__table__), rows[1::2])  # type: ignore[arg-type]
        session.commit()

        assert sorted(shop.on("s0", "SELECT id FROM customer")) == [(k,) for k in sorted(keys[:4])]
        assert sorted(shop.on("s1", "SELECT id FROM customer")) == [(k,) for k in sorted(keys[4:])]

    def test_python_defaults_make_keys(self, shop: Shop, session: RoutingSession) -> None:
        """A uuid key by default=uuid4: by flush, by ORM bulk, by Core, one row and many."""
        flushed = [Document(title=f"f{i}") for i in range(20)]
        session.add_all(flushed)
        session.flush()
        session.execute(sa.insert(Document), [{"title": f"b{i}"} for i in range(20)])
        core = sa.insert(Document.__table__)  # type: ignore[arg-type]
        session.execute(core, [{"title": f"c{i}"} for i in range(20)])
        session.execute(core.values(title="v"))
        session.execute(sa.insert(Document).values(title="w"))
        chosen = uuid.uuid4()
        session.execute(core, {"id": chosen, "title": "x"})
        session.commit()

        found = [set(shop.on(shard, "SELECT id FROM document")) for shard in ("s0", "s1")]
        assert len(found[0]) + len(found[1]) == 63
        assert min(map(len, found)) > 10
        for shard, ids in zip(("s0", "s1"), found, strict=True):
            assert all(shop.router.locate(Document.__table__, i)[1] == shard for i in ids)  # type: ignore[arg-type]
        assert session.get_one(Document, chosen).title == "x"
        assert all(session.get(Document, d.id) is d for d in flushed)

    def test_keyed_dml_goes_to_its_shard(
        self, shop: Shop, session: RoutingSession, ran: Ran
    ) -> None:
        """UPDATE and DELETE by key, with RETURNING, with each synchronize_session."""
        zero, one = two_customers(shop)
        loaded = session.get_one(Customer, one)
        session.commit()
        for how in ("evaluate", "fetch", "auto", False):
            ran.clear()
            changed = session.execute(
                sa.update(Customer).where(Customer.id == one).values(name=f"by {how}"),
                execution_options={"synchronize_session": how},
            )
            assert changed.rowcount == 1  # type: ignore[attr-defined]
            assert set(ran.nodes) == {"s1-a"}
            session.commit()
            assert loaded.name == f"by {how}"
        returned = session.execute(
            sa.update(Customer).where(Customer.id == zero).values(score=1).returning(Customer)
        ).scalar_one()
        assert (returned.id, returned.score) == (zero, 1)
        assert sa.inspect(returned).identity_token == "s0"
        gone = session.execute(sa.delete(Customer).where(Customer.id == one))
        session.commit()
        assert gone.rowcount == 1  # type: ignore[attr-defined]
        assert shop.on("s1", "SELECT count(*) FROM customer") == [(0,)]

    def test_bulk_update_by_key_is_routed_or_refused(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """update() with a list of rows by primary key never writes on a wrong shard only."""
        zero, one = two_customers(shop)
        rows = [{"id": zero, "name": "A"}, {"id": one, "name": "B"}]

        try:
            session.execute(sa.update(Customer), rows)
        except PlanError:
            session.rollback()
            return
        session.commit()
        assert shop.on("s0", "SELECT name FROM customer") == [("A",)]
        assert shop.on("s1", "SELECT name FROM customer") == [("B",)]

    def test_a_write_without_its_key_is_refused(self, shop: Shop, session: RoutingSession) -> None:
        """Typed, before anything is sent."""
        two_customers(shop)
        for statement in (
            sa.update(Customer).values(name="x"),
            sa.delete(Customer).where(Customer.name == "zero"),
            sa.insert(Customer).values(name="nobody"),
            sa.insert(Order.__table__).from_select(  # type: ignore[arg-type]
                ["customer_id", "id"], select(Customer.id, Customer.id)
            ),
        ):
            with pytest.raises(MissingShardKey):
                session.execute(statement)
        session.add(Setting(value="nameless"))
        with pytest.raises(MissingShardKey, match="name"):
            session.flush()
        session.rollback()

    def test_the_legacy_bulk_methods_are_refused_with_the_way_out(
        self, shop: Shop, session: RoutingSession
    ) -> None:
        """bulk_save_objects and friends ask for no shard, so they get none."""
        zero = shop.keys("s0")[0]
        with pytest.raises(CrossShardRefused, match="insert"):
            session.bulk_save_objects([Customer(id=zero, name="x")])
        session.rollback()
        with pytest.raises(CrossShardRefused, match="insert"):
            session.bulk_insert_mappings(Customer.__mapper__, [{"id": zero, "name": "x"}])

    def test_a_changed_key_never_misplaces_a_row(self, shop: Shop, session: RoutingSession) -> None:
        """A new key of another shard is refused by the database, typed; the row stays."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        shop.add(Customer(id=zero, name="zero"))
        customer = session.get_one(Customer, zero)
        customer.id = one
        with pytest.raises(StaleShardMap):
            session.flush()
        session.rollback()
        with pytest.raises(StaleShardMap):
            session.execute(sa.update(Customer).where(Customer.id == zero).values(id=one))
        session.rollback()

        assert shop.on("s0", "SELECT id FROM customer") == [(zero,)]
        assert shop.on("s1", "SELECT id FROM customer") == []

    def test_a_misrouted_row_is_refused(self, shop: Shop, session: RoutingSession) -> None:
        """A missing leaf gives StaleShardMap, by flush and by Core; the session goes on."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        bucket, _ = shop.router.locate(Base.metadata.tables["customer"], (zero,))
        leaf = f"customer_b{bucket:03d}"
        shop.on("s0", f"ALTER TABLE customer DETACH PARTITION {leaf}")
        try:
            session.add_all([Customer(id=zero, name="x"), Customer(id=one, name="y")])
            with pytest.raises(StaleShardMap, match="s0-a"):
                session.commit()
            session.rollback()
            with pytest.raises(StaleShardMap):
                session.execute(sa.insert(Customer), [{"id": zero, "name": "x"}])
            session.rollback()
            assert session.scalar(select(func.count()).select_from(Customer)) == 0
        finally:
            remainder = f"WITH (MODULUS 64, REMAINDER {bucket})"
            shop.on("s0", f"ALTER TABLE customer ATTACH PARTITION {leaf} FOR VALUES {remainder}")
        session.add(Customer(id=zero, name="x"))
        session.commit()
        assert shop.on("s1", "SELECT count(*) FROM customer") == [(0,)]

    def test_a_bucket_without_owner_is_an_error(
        self, shop: Shop, make_router: Callable[..., Router]
    ) -> None:
        """For reads and writes of its keys; other keys are served."""
        zero, one = two_customers(shop)
        router = make_router()
        table = Base.metadata.tables["customer"]
        bucket, _ = router.locate(table, (zero,))
        known = router.shard_map()
        owners = (*known.owners[:bucket], "", *known.owners[bucket + 1 :])
        router._maps = {known.keyspace: ShardMap(known.keyspace, owners, known.epoch)}
        with router.sessionmaker()() as session:
            assert session.scalar(select(Customer.name).where(Customer.id == one)) == "one"
            for statement in (
                select(Customer).where(Customer.id == zero),
                sa.insert(Customer).values(id=zero, name="x"),
                sa.delete(Customer).where(Customer.id == zero),
            ):
                with pytest.raises(UnownedBucket, match=f"bucket {bucket} "):
                    session.execute(statement)
            session.add(Customer(id=zero, name="x"))
            with pytest.raises(UnownedBucket):
                session.flush()

    def test_a_raised_error_is_sqlalchemys_own(self, shop: Shop, session: RoutingSession) -> None:
        """An ordinary constraint violation stays an IntegrityError; the session can go on."""
        zero, _ = two_customers(shop)
        session.add(Customer(id=zero, name="again"))
        with pytest.raises(exc.IntegrityError):
            session.flush()
        session.rollback()
        with pytest.raises(exc.IntegrityError):
            session.execute(sa.insert(Customer).values(id=zero, name="again"))
        session.rollback()
        assert session.get_one(Customer, zero).name == "zero"


class TestFactories:
    def test_a_session_class_of_ones_own(self, shop: Shop, router: Router) -> None:
        """class S(RoutingMixin, Session), also subclassed, with listeners of its own."""

        class Own(RoutingMixin, orm.Session):
            pass

        class Sub(Own):
            pass

        zero, one = two_customers(shop)
        seen: list[str] = []

        @sa.event.listens_for(Sub, "do_orm_execute")
        def only_zero(state: orm.ORMExecuteState) -> None:
            seen.append("listener")
            if state.is_select and not state.is_column_load:
                criterion = orm.with_loader_criteria(Customer, Customer.name != "one")
                state.statement = state.statement.options(criterion)

        for cls in (Own, Sub):
            with orm.sessionmaker(class_=cls, router=router)() as session:
                assert session.get_one(Customer, zero).name == "zero"
                names = session.scalars(select(Customer.name).order_by(Customer.name)).all()
                expected = ["zero"] if cls is Sub else ["one", "zero"]
                assert names == expected
                session.add(Customer(id=shop.keys("s0", 2)[1], name="new"))
                session.commit()
                assert session.token.positions
                session.execute(sa.delete(Customer).where(Customer.id == shop.keys("s0", 2)[1]))
                session.commit()
        assert seen
        assert one

    def test_scoped_session(self, shop: Shop, router: Router) -> None:
        """scoped_session(router.sessionmaker()) works as with a plain one."""
        zero, _ = two_customers(shop)
        scoped = orm.scoped_session(router.sessionmaker())
        try:
            assert scoped.get_one(Customer, zero).name == "zero"
            scoped.add(Customer(id=shop.keys("s0", 2)[1], name="new"))
            scoped.commit()
            assert scoped.scalar(select(func.count()).select_from(Customer)) == 3
        finally:
            scoped.remove()

    def test_sessionmaker_begin_commits(self, shop: Shop, router: Router) -> None:
        """with router.sessionmaker().begin() as session: commits at its end."""
        zero, one = shop.keys("s0")[0], shop.keys("s1")[0]
        with router.sessionmaker().begin() as session:
            session.add_all([Customer(id=key, name="x") for key in (zero, one)])
        assert shop.on("s0", "SELECT id FROM customer") == [(zero,)]
        assert shop.on("s1", "SELECT id FROM customer") == [(one,)]

    def test_twophase_commits_and_rolls_back(self, shop: Shop, router: Router) -> None:
        """SQLAlchemy's own two-phase commit, after reads on replicas, prepared and not."""
        zeros, ones = shop.keys("s0", 3), shop.keys("s1", 3)
        shop.add(Customer(id=zeros[0], name="zero"))
        with router.sessionmaker(twophase=True)() as session:
            session.scalars(select(Customer)).all()
            session.scalars(
                select(Customer).where(Customer.id == zeros[0]).execution_options(yield_per=1)
            ).all()
            session.add_all([Customer(id=key, name="x") for key in (zeros[1], ones[1])])
            session.commit()
            session.add_all([Customer(id=key, name="x") for key in (zeros[2], ones[2])])
            session.flush()
            session.prepare()
            session.rollback()
            assert session.scalar(select(func.count()).select_from(Customer)) == 3

    def test_autocommit_isolation_is_respected(self, shop: Shop, session: RoutingSession) -> None:
        """A connection that the caller put into AUTOCOMMIT stays there."""
        shop.add(Customer(id=shop.keys("s0")[0], name="x"))
        connection = session.connection(
            bind_arguments={"shard": "s0"}, execution_options={"isolation_level": "AUTOCOMMIT"}
        )
        connection.execute(sa.text("UPDATE customer SET name = 'kept'"))
        session.rollback()
        assert shop.on("s0", "SELECT name FROM customer") == [("kept",)]

    def test_isolation_levels_do_not_leak(self, shop: Shop, router: Router) -> None:
        """A pooled connection forgets what one session asked of it."""
        for level in ("SERIALIZABLE", "REPEATABLE READ", "AUTOCOMMIT"):
            with router.sessionmaker()() as session:
                connection = session.connection(
                    bind_arguments={"shard": "s0"}, execution_options={"isolation_level": level}
                )
                connection.execute(sa.text("SELECT 1"))
            with router.sessionmaker()() as session, session.begin():
                s0 = {"sqlroute_shard": "s0"}
                session.execute(select(Customer), execution_options=s0).all()
                shown = session.scalar(sa.text("SHOW transaction_isolation"), execution_options=s0)
                assert shown == "read committed"

    def test_rate_defaults_come_back(self, shop: Shop, session: RoutingSession) -> None:
        """Server-made values of a flushed object are read like any other."""
        rate = Rate(value=Decimal("1.10"))
        session.add(rate)
        session.commit()
        assert rate.id > 0
        assert rate.made_at.tzinfo is not None
