"""What a statement does and where its rows are, as far as it can be proved."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from planning import statements, topology
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from sqlroute.errors import CrossShardRefused, UndeclaredTable
from sqlroute.routing.declare import reference_table
from sqlroute.routing.statement import Kind, Placement, Statement, describe
from sqlroute.topology import Keyspace, Node, Shard, Topology

Customer, Order, Country = statements.Customer, statements.Order, statements.Country
STATEMENTS = statements.STATEMENTS
MANY = topology(s0="a", s1="a")
ONE = topology(main="ab")


class Nameless(FunctionElement[int]):
    inherit_cache = True


class Custom(sa.ColumnElement[int]):
    inherit_cache = True


@compiles(Nameless)
def _nameless(element: Any, compiler: Any, **options: Any) -> str:
    return "nextval('numbers')"


@compiles(Custom)
def _custom(element: Any, compiler: Any, **options: Any) -> str:
    return "nextval('numbers')"


def kind(statement: Any, of: Topology = ONE) -> Kind:
    return describe(statement, of).kind


def describe_many(statement: Any) -> Statement:
    return describe(statement, MANY)


@pytest.mark.parametrize(
    "statement",
    [
        sa.select(Customer).with_hint(Customer, "ONLY", "postgresql"),
        sa.select(Order).where(Order.customer_id == 1).with_hint(Order.__table__, "only"),
        sa.select(sa.select(Customer.id).with_hint(Customer, "ONLY").subquery()),
        sa.delete(Customer).where(Customer.id == 1).with_hint("ONLY"),
    ],
)
def test_a_sharded_table_is_not_read_without_its_partitions(statement: Any) -> None:
    """PostgreSQL would find no row, and a plain table has them all."""
    with pytest.raises(CrossShardRefused, match=r"ONLY: (customer|orders) is sharded"):
        describe_many(statement)


class TestKind:
    """What cannot be proved to be a read is not one."""

    @pytest.mark.parametrize(
        "statement",
        [
            sa.select(Customer),
            sa.select(sa.literal(1)),
            sa.select(sa.func.count()).select_from(Customer),
            sa.select(sa.func.pg_catalog.lower("X")),
            sa.select(sa.func.now(), sa.func.random(), sa.func.clock_timestamp()),
            sa.select(sa.func.row_number().over(order_by=Customer.id)),
            sa.select(sa.func.percentile_cont(0.5).within_group(Customer.id)),
            sa.select(sa.func.count().filter(Customer.id > 1)),
            sa.select(Customer).order_by(sa.text("name DESC")),
            sa.select(Customer).where(sa.text("name = 'x'")),
            sa.union(sa.select(Customer.id), sa.select(Order.id)),
            sa.select(sa.select(Customer.id).cte().c.id),
            sa.func.now(),
        ],
    )
    def test_read(self, statement: Any) -> None:
        assert kind(statement) is Kind.READ

    @pytest.mark.parametrize(
        "statement",
        [
            sa.insert(Customer),
            sa.update(Customer).values(name="x"),
            sa.delete(Customer),
            sa.select(Customer).with_for_update(),
            sa.select(Customer).with_for_update(read=True),
            sa.select(sa.select(Customer).with_for_update().subquery()),
            sa.select(Country).where(
                Country.name.in_(sa.select(Customer.name).with_for_update(skip_locked=True))
            ),
            sa.union(sa.select(Customer.id), sa.select(Order.id)).with_for_update(),
            sa.select(sa.delete(Order).returning(Order.id).cte().c.id),
            sa.select(sa.literal(1)).add_cte(sa.delete(Order).returning(Order.id).cte()),
            sa.select(sa.func.nextval("numbers")),
            sa.select(sa.Sequence("numbers").next_value()),
            sa.Sequence("numbers"),
        ],
    )
    def test_write(self, statement: Any) -> None:
        assert kind(statement) is Kind.WRITE

    @pytest.mark.parametrize(
        "statement",
        [
            sa.text("CALL work()"),
            sa.text("SELECT frobnicate()").columns(sa.column("n")),
            sa.select(sa.text("SELECT frobnicate() AS n").columns(sa.column("n")).subquery()),
            sa.select(sa.func.pg_advisory_lock(1)),
            sa.select(sa.func.frobnicate(1)),
            sa.select(sa.func.my.lower("X")),
            sa.select(Customer).where(sa.func.frobnicate(Customer.id) == 1),
            sa.select(sa.literal_column("frobnicate(1)")),
            sa.select(Customer).where(sa.text("frobnicate(id)")),
            sa.select(Customer).order_by(sa.text("frobnicate(id)")),
            sa.select(Customer).suffix_with("FOR UPDATE"),
            sa.select(Customer).with_statement_hint("FOR UPDATE"),
            sa.select(Customer).prefix_with("frobnicate(),"),
            sa.select(Nameless()),
            sa.select(Custom()),
            sa.func.frobnicate(),
            sa.schema.CreateTable(Customer.__table__),
        ],
    )
    def test_unknown(self, statement: Any) -> None:
        assert kind(statement) is Kind.UNKNOWN

    def test_reasons_say_what_is_not_known(self) -> None:
        found = describe(sa.select(sa.func.frobnicate(1)), ONE)

        assert found.reasons == ("function frobnicate() is not known to be read-only",)


class TestPlacement:
    @pytest.mark.parametrize("name", ["countries", "one"])
    def test_reference_tables_and_no_table_are_anywhere(self, name: str) -> None:
        assert describe_many(STATEMENTS[name]).placement is Placement.ANYWHERE

    def test_one_sharded_table_places_the_statement(self) -> None:
        found = describe_many(STATEMENTS["customers_and_countries"])

        assert found.placement is Placement.SHARDED
        assert found.tables == ("customer", "country")
        assert [occurrence.table for occurrence in found.occurrences] == ["customer"]

    @pytest.mark.parametrize("name", ["text", "next_number"])
    def test_text_and_bare_functions_are_nowhere(self, name: str) -> None:
        found = describe_many(STATEMENTS[name])

        assert found.placement in (Placement.UNPLACED, Placement.ANYWHERE)
        assert found.kind is not Kind.READ

    def test_tables_of_dml_are_all_seen(self) -> None:
        """UPDATE ... FROM and DELETE ... USING name their tables in WHERE alone."""
        update = sa.update(Customer).where(Customer.id == Order.customer_id).values(name="x")
        delete = sa.delete(Customer).where(Customer.id == Order.customer_id)

        assert describe_many(update).tables == ("customer", "orders")
        assert describe_many(delete).tables == ("customer", "orders")

    def test_tables_of_returning_are_seen(self) -> None:
        count = sa.select(sa.func.count()).select_from(Order).scalar_subquery()
        statement = sa.delete(Country).where(Country.code == "x").returning(count)

        with pytest.raises(CrossShardRefused, match="country"):
            describe_many(statement)

    def test_each_use_of_a_table_is_an_occurrence(self) -> None:
        found = describe_many(STATEMENTS["orders_of_equal_total"])

        assert [occurrence.group for occurrence in found.occurrences] == [0, 1]
        assert found.hindrance is not None

    def test_colocated_uses_are_one_group(self) -> None:
        found = describe_many(STATEMENTS["customers_with_orders"])

        assert [occurrence.group for occurrence in found.occurrences] == [0, 0]
        assert found.hindrance is None

    def test_insert_has_its_table_and_key(self) -> None:
        found = describe_many(STATEMENTS["insert_orders"])

        assert found.insert is Order.__table__
        assert found.target is Order.__table__
        assert str(found.key) == "customer_id"
        assert found.occurrences == ()

    def test_nothing_is_placed_in_a_keyspace_of_one_shard(self) -> None:
        found = describe(STATEMENTS["orders_of_equal_total"], ONE)

        assert found.placement is Placement.ANYWHERE
        assert found.occurrences == ()

    def test_undeclared_table_is_refused_on_several_shards(self) -> None:
        with pytest.raises(UndeclaredTable, match=r"plain .*sharded_by"):
            describe_many(STATEMENTS["plain"])

    def test_undeclared_table_in_a_subquery_is_refused(self) -> None:
        statement = sa.select(Customer).where(Customer.id.in_(sa.select(statements.Plain.id)))

        with pytest.raises(UndeclaredTable, match="plain"):
            describe_many(statement)

    def test_undeclared_table_beside_dml_is_refused(self) -> None:
        statement = sa.delete(Customer).where(Customer.id == statements.Plain.id)

        with pytest.raises(UndeclaredTable, match="plain"):
            describe_many(statement)


class TestReferenceWrites:
    """A reference table is the same everywhere, or worth nothing."""

    def test_from_a_sharded_table_is_refused(self) -> None:
        statement = sa.insert(Country).from_select(
            ["code", "name"], sa.select(Customer.country_code, Customer.name)
        )

        with pytest.raises(CrossShardRefused) as caught:
            describe_many(statement)

        assert caught.value.clause == "INSERT"

    def test_from_a_reference_table_is_right(self) -> None:
        currency = sa.Table("currency", sa.MetaData(), sa.Column("code"), **reference_table())
        statement = sa.update(Country).where(Country.code == currency.c.code).values(name="x")

        assert describe_many(statement).placement is Placement.ANYWHERE

    def test_in_a_cte_is_refused(self) -> None:
        gone = sa.delete(Country).returning(Country.code).cte()

        with pytest.raises(CrossShardRefused) as caught:
            describe_many(sa.select(gone.c.code))

        assert caught.value.clause == "data-modifying CTE"

    def test_on_one_shard_is_anything(self) -> None:
        gone = sa.delete(Country).returning(Country.code).cte()

        assert kind(sa.select(gone.c.code)) is Kind.WRITE


class TestKeyspaces:
    two = Topology(
        (
            Keyspace("shop", (Shard("s0", (Node("a"),)), Shard("s1", (Node("b"),)))),
            Keyspace("logs", (Shard("l0", (Node("c"),)),)),
        )
    )

    def test_table_names_its_keyspace(self) -> None:
        assert describe(STATEMENTS["logs"], self.two).keyspace.name == "logs"

    def test_table_without_a_name_is_of_the_first(self) -> None:
        assert describe(STATEMENTS["customers"], self.two).keyspace.name == "shop"

    def test_two_keyspaces_are_refused(self) -> None:
        with pytest.raises(UndeclaredTable, match="customer in shop"):
            describe(STATEMENTS["logs_and_customers"], self.two)
