"""Keys decide where a statement runs; one PostgreSQL that holds all rows says what is right.

Each silent error that the peers of a sharding router are known for has a test that it is none here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import Ran, Shop, until
from models import Base, Country, Customer, Order, Reading, Setting
from sqlalchemy import func, orm, select

from sqlroute import CrossShardRefused, PlanError, RoutingSession, sharded_by
from sqlroute.catalog import ddl

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

SHARDS = ("s0", "s1")


class Sides:
    """The same rows on two shards and on one server; a statement is run on both.

    Attributes:
        here, there: a key of each shard, the smallest.
    """

    def __init__(self, shop: Shop, session: RoutingSession, judge: orm.Session, ran: Ran) -> None:
        self.shop, self.session, self.judge, self.ran = shop, session, judge, ran
        self.mine = {shard: shop.keys(shard, 4) for shard in SHARDS}
        self.keys = sorted(key for keys in self.mine.values() for key in keys)
        self.here, self.there = (self.mine[shard][0] for shard in SHARDS)

    def fill(self) -> None:
        for side in (self.session, self.judge):
            side.add_all(self._rows())
            side.commit()
        self.shop.settle()
        self.session.reset()

    def _rows(self) -> Iterator[Any]:
        yield Country(code="de", name="Germany")
        yield Country(code="fr", name="France")
        for number, key in enumerate(self.keys):
            code = (None, "de", "fr")[number % 3]
            yield Customer(id=key, name=f"c{number % 3}", score=number, country_code=code)
            for order in range(number % 3):
                yield Order(customer_id=key, id=order, amount=number)
        for device in range(6):
            for slot in range(3):
                yield Reading(device=device, slot=slot, value=device * slot)
        for name in ("a", "b", "'1'", "1"):
            yield Setting(name=name, value=name)

    def same(self, statement: Any, parameters: Any = None) -> list[str]:
        """Run a read on both; return the shards that were asked."""
        expected = self.judge.execute(statement, parameters)
        names, rows = list(expected.keys()), list(map(_plain, expected.unique().all()))
        self.ran.clear()
        result = self.session.execute(statement, parameters)
        found = list(result.keys()), Counter(map(_plain, result.unique().all()))
        asked = sorted({node[:2] for node in self.ran.nodes})
        for side in (self.session, self.judge):
            side.rollback()
            side.expunge_all()

        expected_rows = Counter(rows)
        assert found[0] == names
        assert found[1] - expected_rows == Counter(), "rows that are none"
        assert expected_rows - found[1] == Counter(), "rows that are missing"
        return asked


def _plain(row: Any) -> tuple[Any, ...]:
    """Return a row with the columns of its entities."""
    return tuple(
        tuple(getattr(value, c.key) for c in sa.inspect(value).mapper.columns)
        if isinstance(value, Base)
        else value
        for value in row
    )


@pytest.fixture
def sides(
    shop: Shop, session: RoutingSession, postgresql: psycopg.Connection[Any], ran: Ran
) -> Iterator[Sides]:
    info = postgresql.info
    url = sa.URL.create(
        "postgresql+psycopg", info.user, info.password, info.host, info.port, info.dbname
    )
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    Base.metadata.create_all(engine)
    with orm.Session(engine) as judge:
        found = Sides(shop, session, judge, ran)
        found.fill()
        yield found
    engine.dispose()


def test_each_shard_is_sent_just_its_values_of_a_list(sides: Sides) -> None:
    statement = select(Customer).where(Customer.id.in_(sides.keys))

    assert sides.same(statement) == ["s0", "s1"]
    sent = [sql.count("%(") for _, sql in sides.ran.statements]
    assert sent == [4, 4]


class TestNoRow:
    """Conditions that exclude every row: an empty result of the right shape, nobody asked."""

    @pytest.mark.parametrize(
        "condition",
        [
            lambda one, other: sa.and_(Customer.id == one, Customer.id == other),
            lambda *_: Customer.id.in_([]),
            lambda *_: Customer.id == sa.bindparam("none", None, sa.BigInteger),
            lambda one, _: Customer.id.between(one, one - 1),
            lambda *_: sa.false(),
        ],
    )
    def test_columns_and_entities_are_as_of_any_answer(self, sides: Sides, condition: Any) -> None:
        where = condition(sides.here, sides.there)

        assert sides.same(select(Customer.id, Customer.name.label("n")).where(where)) == []
        assert sides.same(select(Customer, Customer.score + 1).where(where)) == []
        assert sides.same(select(func.max(Order.id)).join(Order.customer).where(where).group_by(
            Customer.id)) == []  # fmt: skip

    def test_an_aggregate_still_has_its_row(self, sides: Sides) -> None:
        statement = select(func.count(), func.max(Customer.name)).where(Customer.id.in_([]))

        assert len(sides.same(statement)) == 1
        assert sides.session.scalar(select(func.count(Customer.id)).where(sa.false())) == 0

    def test_a_preserved_side_still_has_its_rows(self, sides: Sides) -> None:
        joined = select(Country.code, Customer.id).outerjoin(Customer, Customer.id.in_([]))

        assert len(sides.same(joined)) == 1

    def test_every_way_to_read_a_result_finds_none(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        nobody = select(Customer).where(Customer.id.in_([]))
        sides.ran.clear()

        assert session.scalars(nobody).all() == []
        assert session.scalar(nobody) is None
        assert session.execute(nobody).mappings().one_or_none() is None
        assert session.execute(nobody.execution_options(yield_per=10)).all() == []
        assert session.query(Customer).filter(Customer.id.in_([])).first() is None
        eager = nobody.options(orm.selectinload(Customer.orders), orm.joinedload(Customer.country))
        assert session.scalars(eager).unique().all() == []
        result = session.execute(select(Customer.id, Customer.score).where(sa.false()))
        assert list(result.keys()) == ["id", "score"]
        assert sides.ran.statements == []
        assert sides.shop.checked_out == 0

    def test_a_write_is_sent_and_counts_no_row(self, sides: Sides, session: RoutingSession) -> None:
        result = session.execute(sa.delete(Customer).where(Customer.id.in_([])))

        assert result.rowcount == 0  # type: ignore[attr-defined]
        assert sides.same(select(func.count()).select_from(Customer))


class TestKnownSilentErrors:
    """What peers are known to route wrongly without an error is right here, or refused."""

    def test_on_of_an_outer_join_does_not_restrict_the_preserved_side(self, sides: Sides) -> None:
        """A walk over the whole statement takes the first ``key = value`` it meets."""
        on = sa.and_(Order.customer_id == Customer.id, Customer.id == sides.here)
        statement = select(Customer.id, Order.id).outerjoin(Order, on)

        assert sides.same(statement) == ["s0", "s1"]

    def test_key_of_a_nullable_side_restricts_only_where_it_excludes(self, sides: Sides) -> None:
        joined = select(Customer.id, Order.id).outerjoin(Customer.orders)

        assert sides.same(joined.where(Order.customer_id == sides.there)) == ["s1"]
        missing = joined.where(sa.or_(Order.customer_id == sides.there, Order.id.is_(None)))
        assert sides.same(missing) == ["s0", "s1"]

    def test_key_in_the_select_list_or_a_case_restricts_nothing(self, sides: Sides) -> None:
        is_here = Customer.id == sides.here

        assert sides.same(select(Customer.id, is_here)) == ["s0", "s1"]
        chosen = select(Customer.id).where(sa.case((is_here, 1), else_=2) < 3)
        assert sides.same(chosen) == ["s0", "s1"]

    def test_key_in_a_scalar_subquery_restricts_only_that(self, sides: Sides) -> None:
        inner = select(func.max(Order.amount)).where(Order.customer_id == sides.here)
        statement = select(Customer.id, inner.scalar_subquery())

        with pytest.raises(CrossShardRefused, match="subquery"):
            sides.session.execute(statement)
        assert sides.same(statement.where(Customer.id == sides.here)) == ["s0"]

    def test_keys_of_an_or_are_all_meant(self, sides: Sides) -> None:
        here, there = Customer.id == sides.here, Customer.id == sides.there

        assert sides.same(select(Customer).where(here | there)) == ["s0", "s1"]
        assert sides.same(select(Customer).where(here | (Customer.score == 7))) == ["s0", "s1"]
        assert sides.same(select(Customer).where(sa.not_(here))) == ["s0", "s1"]

    def test_list_of_keys_of_two_shards_gives_the_rows_of_both(self, sides: Sides) -> None:
        """PgDog #639: one shard's rows at random."""
        both = [sides.here, sides.there, None]

        assert sides.same(select(Customer).where(Customer.id.in_(both))) == ["s0", "s1"]
        array = sa.literal(both, sa.ARRAY(sa.BigInteger))
        assert sides.same(select(Customer).where(Customer.id == sa.any_(array))) == ["s0", "s1"]
        listed = Customer.id.in_([sa.literal(sides.here), sa.bindparam("other", sides.there)])
        assert sides.same(select(Customer).where(listed)) == ["s0", "s1"]

    def test_list_of_row_values_gives_the_rows_of_all(self, sides: Sides) -> None:
        pairs = [(device, slot) for device in range(6) for slot in (0, 2)]
        statement = select(Reading).where(sa.tuple_(Reading.slot, Reading.device).in_(
            [(slot, device) for device, slot in pairs]))  # fmt: skip

        assert sides.same(statement) == ["s0", "s1"]
        assert sum(sql.count("%(") for _, sql in sides.ran.statements) == 2 * len(pairs)

    def test_one_column_of_two_is_no_key(self, sides: Sides) -> None:
        assert sides.same(select(Reading).where(Reading.device == 3)) == ["s0", "s1"]

    def test_parameter_of_another_type_is_compared_as_the_server_does(self, sides: Sides) -> None:
        """``5.0`` and ``'5'`` are found where the row of 5 is, whatever their own hash would be."""
        for value in (
            sa.literal(float(sides.there), sa.Float),
            sa.literal(sides.there, sa.Numeric),
            sa.cast(str(sides.there), sa.BigInteger),
        ):
            assert "s1" in sides.same(select(Customer).where(Customer.id == value))

    def test_text_is_a_key_by_its_characters(self, sides: Sides) -> None:
        for name in ("1", "'1'"):
            assert len(sides.same(select(Setting).where(Setting.name == name))) == 1

    def test_null_is_equal_to_nothing(self, sides: Sides) -> None:
        null = sa.bindparam("key", None, sa.BigInteger)

        assert sides.same(select(Customer).where(Customer.id == null)) == []
        assert sides.same(select(Customer).where(Customer.id.is_(None))) == ["s0", "s1"]
        assert sides.same(select(Customer).where(Customer.id.is_distinct_from(null)))

    def test_key_in_a_cte_restricts_the_cte(self, sides: Sides) -> None:
        """PgDog #380: the first key found routes the whole."""
        one = select(Order).where(Order.customer_id == sides.there).cte()

        assert sides.same(select(one.c.id)) == ["s1"]
        joined = select(Customer.id, one.c.id).outerjoin(one, one.c.customer_id == Customer.id)
        assert sides.same(joined) == ["s0", "s1"]
        assert sides.same(select(Customer).where(Customer.id.in_(select(one.c.customer_id))))

    def test_two_arms_are_two_keys(self, sides: Sides) -> None:
        """PgDog's own test asserts the first arm's shard for both."""
        arms = [select(Customer.id).where(Customer.id == k) for k in (sides.here, sides.there)]

        assert sides.same(sa.union(*arms)) == ["s0", "s1"]
        assert sides.same(sa.union_all(arms[0], arms[0])) == ["s0"]

    def test_join_with_a_reference_table_gives_every_row_once(self, sides: Sides) -> None:
        """SPQR #2232: the rows of one shard. Preserved, a reference table would be doubled."""
        assert sides.same(select(Customer.id, Country.name).join(Customer.country)) == ["s0", "s1"]
        assert sides.same(select(Customer.id, Country.name).outerjoin(Customer.country))
        with pytest.raises(CrossShardRefused, match="LEFT JOIN"):
            sides.session.execute(select(Country.code, Customer.id).outerjoin(
                Customer, Customer.country_code == Country.code))  # fmt: skip

    def test_rows_of_an_insert_go_each_to_its_shard(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        rows = [{"customer_id": key, "id": 77, "amount": 1} for key in sides.keys]
        for side in (session, sides.judge):
            side.execute(sa.insert(Order), rows)
            side.commit()

        assert sides.same(select(Order)) == ["s0", "s1"]

    def test_insert_from_select_is_refused(self, sides: Sides, session: RoutingSession) -> None:
        """Its rows have keys that nobody knows before it runs."""
        rows = select(Order.customer_id, Order.id + 50)

        with pytest.raises(sa.exc.SQLAlchemyError, match="INSERT"):
            session.execute(sa.insert(Order).from_select(["customer_id", "id"], rows))
        assert sides.same(select(func.count()).select_from(Order))

    def test_changed_key_never_leaves_its_shard_unseen(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        """The row moves, or the database refuses it: it is never where its key does not lead."""
        moved = sa.update(Setting).where(Setting.name == "a").values(name="zz")

        try:
            session.execute(moved)
            session.commit()
        except sa.exc.SQLAlchemyError:
            session.rollback()
        else:
            sides.judge.execute(moved)
            sides.judge.commit()
        assert sides.same(select(Setting)) == ["s0", "s1"]
        for name in ("a", "zz"):
            sides.same(select(Setting).where(Setting.name == name))


class TestText:
    """``text()`` is routed as the same statement of SQLAlchemy is."""

    def test_read_by_its_key_goes_to_a_replica_of_one_shard(self, sides: Sides) -> None:
        for sql in (
            "SELECT * FROM customer WHERE id = :key",
            'SELECT c.name, o.amount FROM customer c JOIN "order" o ON o.customer_id = c.id '
            "WHERE c.id = :key ORDER BY o.id LIMIT 1",
            "WITH mine AS (SELECT * FROM customer WHERE id = :key) SELECT count(*) FROM mine",
        ):
            assert sides.same(sa.text(sql), {"key": sides.there}) == ["s1"]
            assert sides.ran.nodes[0] in {"s1-b", "s1-c"}

    def test_key_is_read_as_the_server_reads_it(self, sides: Sides) -> None:
        by_key = sa.text("SELECT * FROM customer WHERE id = :key")

        assert sides.same(by_key, {"key": f" {sides.there} "}) == ["s1"]
        assert sides.same(by_key, {"key": float(sides.there)}) == ["s0", "s1"]
        assert len(sides.same(by_key, {"key": None})) == 1
        named = sa.text("SELECT * FROM setting WHERE name = :name")
        assert len(sides.same(named, {"name": "1"})) == 1

    def test_list_of_keys_runs_on_their_shards(self, sides: Sides) -> None:
        keys = sa.bindparam("keys", expanding=True)
        listed = sa.text("SELECT * FROM customer WHERE id IN :keys").bindparams(keys)
        array = sa.text("SELECT * FROM customer WHERE id = ANY(:keys)")

        for statement in (listed, array):
            assert sides.same(statement, {"keys": sides.keys}) == ["s0", "s1"]
            assert sides.same(statement, {"keys": sides.mine["s1"]}) == ["s1"]

    def test_what_needs_no_rewriting_is_sent_to_every_shard(self, sides: Sides) -> None:
        for sql in (
            "SELECT *, lower(name) AS n FROM customer WHERE score > 2",
            "SELECT c.id, k.name FROM customer c JOIN country k ON k.code = c.country_code",
            'SELECT * FROM customer WHERE id IN (SELECT customer_id FROM "order" WHERE id = 1)',
            "SELECT x.id FROM (SELECT * FROM customer) x WHERE x.id BETWEEN -5 AND 500",
        ):
            assert sides.same(sa.text(sql)) == ["s0", "s1"]

    @pytest.mark.parametrize(
        ("sql", "clause"),
        [
            ("SELECT * FROM customer ORDER BY name", "ORDER BY"),
            ("SELECT count(*) FROM customer", "count"),
            ("SELECT * FROM customer LIMIT 1", "LIMIT"),
            ("SELECT name FROM customer UNION SELECT name FROM customer", "UNION"),
            ("SELECT * FROM customer c JOIN customer d ON d.score = c.id", "JOIN"),
            ("SELECT * FROM customer FOR UPDATE", "locks"),
            ("UPDATE customer SET score = 1", "without its shard key"),
            ("INSERT INTO customer (name) VALUES ('x')", "shard key"),
            ("UPDATE country SET name = 'x'", "every shard"),
            ("TRUNCATE customer", "TRUNCATE"),
            ("SELECT 1; SELECT 2", "one statement"),
            ("SELEC 1", "syntax error"),
        ],
    )
    def test_what_has_no_exact_answer_is_refused(
        self, sides: Sides, session: RoutingSession, sql: str, clause: str
    ) -> None:
        sides.ran.clear()

        with pytest.raises(PlanError, match=clause):
            session.execute(sa.text(sql))
        assert sides.ran.statements == []

    def test_writes_go_to_the_shard_of_their_key(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        insert = sa.text("INSERT INTO customer (name, id) VALUES ('new', :id)")
        rows = [{"id": sides.shop.keys(shard, 5)[-1]} for shard in SHARDS]
        change = sa.text("UPDATE customer SET score = score + 100 WHERE id = :id")
        remove = sa.text('DELETE FROM "order" WHERE customer_id = :id')
        for side in (session, sides.judge):
            side.execute(insert, rows)
            side.execute(change, {"id": sides.there})
            side.execute(remove, {"id": sides.there})
            side.commit()

        assert sides.same(select(Customer)) == ["s0", "s1"]
        assert sides.same(select(Order)) == ["s0", "s1"]

    def test_rows_of_two_shards_in_one_text_are_refused(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        values = ", ".join(f"({sides.shop.keys(shard, 5)[-1]}, 'x')" for shard in SHARDS)

        with pytest.raises(CrossShardRefused, match="list of parameters"):
            session.execute(sa.text(f"INSERT INTO customer (id, name) VALUES {values}"))

    def test_entities_know_their_shard(self, sides: Sides, session: RoutingSession) -> None:
        statement = select(Customer).from_statement(sa.text("SELECT * FROM customer"))
        found = session.scalars(statement).all()

        tokens = {customer.id: sa.inspect(customer).identity_token for customer in found}
        assert tokens == {key: shard for shard in SHARDS for key in sides.mine[shard]}

    def test_a_table_made_later_is_known_within_a_second(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        later = sa.Table(
            "later", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True),
            **sharded_by("id"),
        )  # fmt: skip
        keyed = sa.text("SELECT * FROM later WHERE id = 1")
        with pytest.raises(CrossShardRefused, match="unknown table 'later'"):
            session.execute(keyed)
        for shard in SHARDS:
            with sides.session.router.primary_engine(shard).begin() as connection:
                owned = sides.session.router.shard_map().buckets_of(shard)
                ddl.create(later.metadata, [later], owned, 64, connection)
        sides.shop.settle()

        assert until(lambda: _is_placed(session, keyed)) < 5.0
        for shard in SHARDS:
            sides.shop.on(shard, "DROP TABLE later")


def _is_placed(session: RoutingSession, statement: Any) -> bool:
    try:
        return session.execute(statement).all() == []
    except CrossShardRefused:
        return False


class TestViews:
    """A view that is declared as sharded is a colocated table."""

    def test_view_is_routed_by_its_key(self, sides: Sides) -> None:
        rows = select(Order.customer_id.label("id"), func.count().label("orders"))
        metadata = sa.MetaData()
        view = sa.CreateView(rows.group_by(Order.customer_id), "keen", metadata=metadata).table
        view.info.update(sharded_by("id")["info"])
        sides.session.router.create_all(metadata)
        sides.shop.settle()
        metadata.create_all(sides.judge.connection())
        sides.judge.commit()
        try:
            assert sides.same(select(view).where(view.c.id == sides.there)) == ["s1"]
            joined = select(Customer.id, view.c.orders).outerjoin(view, view.c.id == Customer.id)
            assert sides.same(joined) == ["s0", "s1"]
            assert sides.same(sa.text("SELECT * FROM keen WHERE orders > 1")) == ["s0", "s1"]
            keyed = sa.text("SELECT * FROM keen WHERE id = :id")
            assert sides.same(keyed, {"id": sides.here}) == ["s0"]
        finally:
            sides.session.router.drop_all(metadata)


def test_async_sessions_do_the_same(sides: Sides) -> None:
    async def read() -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        async with sides.session.router.async_sessionmaker()() as session:
            nobody = select(Customer).where(Customer.id.in_([]))
            streamed = await session.stream_scalars(nobody)
            text = await session.execute(sa.text("SELECT id FROM customer"))
            listed = select(Customer.id).where(Customer.id.in_(sides.keys))
            return (
                list(await session.scalars(nobody)),
                await streamed.all(),
                sorted(text.scalars()),
                sorted(await session.scalars(listed)),
            )

    assert asyncio.run(read()) == ([], [], sides.keys, sides.keys)


class TestExplain:
    """What would be done is shown with the SQL of each shard."""

    def test_each_shard_is_shown_its_own_list(self, sides: Sides, session: RoutingSession) -> None:
        keys = [*sides.mine["s0"], sides.there]
        statement = select(Customer.id).where(Customer.id.in_(keys)).order_by(Customer.score)
        sides.ran.clear()
        found = session.explain(statement.limit(2))

        assert [sql.count("id_1_") for sql in found.sql] == [4, 1]
        assert all("score" in sql and "LIMIT" in sql for sql in found.sql)
        assert "sends s1 SELECT" in str(found)
        assert [t["sql"] for t in found.describe()["targets"]] == list(found.sql)
        assert sides.ran.statements == []

    @pytest.mark.parametrize(
        ("statement", "sql"),
        [
            (sa.insert(Customer), "INSERT INTO customer (id, name) VALUES"),
            (
                sa.update(Customer).where(Customer.id == sa.bindparam("id")).values(score=1),
                "UPDATE customer SET score=",
            ),
            (sa.text("DELETE FROM customer WHERE id = :id AND name = :name"), "DELETE FROM"),
        ],
    )
    def test_writes_are_shown_too(
        self, sides: Sides, session: RoutingSession, statement: Any, sql: str
    ) -> None:
        found = session.explain(statement, {"id": sides.there, "name": "x"})

        assert found.shards == ("s1",)
        assert found.sql[0].startswith(sql)

    def test_one_text_for_all_is_shown_once(self, sides: Sides, session: RoutingSession) -> None:
        found = session.explain(sa.text("SELECT *\nFROM customer WHERE id <> :id"), {"id": 1})

        assert str(found).count("sends SELECT * FROM customer WHERE id <> %(id)s") == 1

    def test_a_list_that_is_not_known_is_shown_by_its_name(
        self, sides: Sides, session: RoutingSession
    ) -> None:
        ids = Customer.id.in_(sa.bindparam("ids", expanding=True))

        assert "ids" in session.explain(select(Customer.id).where(ids)).sql[0]
        nobody = session.explain(select(Customer.id).where(ids), {"ids": []})
        assert (nobody.tier.value, nobody.sql) == ("empty", ())


def test_no_row_of_any_type_is_processed(session: RoutingSession) -> None:
    """Numbers ask what the driver has sent, also where nobody has sent anything."""
    found = session.execute(select(Order, Order.amount).where(Order.customer_id.in_([])))

    assert found.all() == []
