"""What query blocks prove, where only PostgreSQL or the ORM knows the construct.

Shapes that SQLite can run are judged by it in ``test_exactness_sim.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from planning import EVERY, FOUR, planned, shards
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Mapped, aliased, mapped_column, relationship

from sqlroute.errors import CrossShardRefused, MissingShardKey
from sqlroute.routing.declare import reference_table, sharded_by
from sqlroute.routing.plan import Tier

metadata = sa.MetaData()
orders = sa.Table(
    "orders",
    metadata,
    sa.Column("customer_id", sa.BigInteger, primary_key=True),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("total", sa.Integer),
    sa.Column("rate", sa.Float),
    **sharded_by("customer_id"),
)
page = sa.Table(
    "page",
    metadata,
    sa.Column("slug", sa.Text, primary_key=True),
    sa.Column("author", CITEXT),
    **sharded_by("slug"),
)
visit = sa.Table(
    "visit", metadata, sa.Column("slug", sa.Text, primary_key=True), **sharded_by("slug")
)
word = sa.Table(
    "word",
    metadata,
    sa.Column("text", CITEXT),
    sa.Column("code", sa.CHAR(5)),
    sa.Column("plain", sa.Text),
    **reference_table(),
)
stock = sa.Table(
    "stock",
    metadata,
    sa.Column("region", sa.Integer, primary_key=True),
    sa.Column("item", sa.Text, primary_key=True),
    sa.Column("left", sa.Integer),
    **sharded_by("region", "item"),
)
move = sa.Table(
    "move",
    metadata,
    sa.Column("region", sa.Integer, primary_key=True),
    sa.Column("item", sa.Text, primary_key=True),
    **sharded_by("region", "item"),
)
key = orders.c.customer_id
a, b = orders.alias("a"), orders.alias("b")
FIVE = ("s1",)


def refused(statement: Any, parameters: Any = None) -> str:
    with pytest.raises(CrossShardRefused) as caught:
        shards(statement, parameters)
    return caught.value.clause


class TestConditions:
    """What may be said of a key besides that it equals a parameter."""

    @pytest.mark.parametrize(
        "condition",
        [
            key.in_([sa.literal(5), sa.bindparam("five", 5)]),
            key == sa.any_(postgresql.array([5, 5])),
            key == sa.any_(sa.literal([5], sa.ARRAY(sa.Integer))),
            key.is_not_distinct_from(5),
            key.between(5, 5),
            sa.and_(key > 4, sa.literal(6) > key),
            sa.and_(orders.c.total > 4, key >= 5, key <= 5),
            sa.tuple_(key, orders.c.total).in_([(5, 1), (5, 2)]),
            sa.tuple_(orders.c.total, key).in_([sa.tuple_(1, 5)]),
            sa.cast(key, sa.BigInteger) == 5,
            key == sa.cast(5, sa.BigInteger),
            sa.type_coerce(key, sa.BigInteger) == 5,
        ],
    )
    def test_five_is_one_shard(self, condition: Any) -> None:
        assert shards(sa.select(orders).where(condition)) == FIVE

    @pytest.mark.parametrize(
        "condition",
        [
            key.in_([sa.literal(5), orders.c.total]),
            key == sa.all_(sa.literal([5], sa.ARRAY(sa.Integer))),
            key.is_distinct_from(5),
            key.is_not_distinct_from(None),
            key.between(5, 5, symmetric=True),
            ~key.between(5, 5),
            key.between(5, 5000),
            key >= 5,
            sa.or_(key >= 5, key <= 5),
            sa.tuple_(key, orders.c.total) > sa.tuple_(5, 1),
            sa.tuple_(key, orders.c.total).not_in([(5, 1)]),
            sa.cast(key, sa.SmallInteger) == 5,
            sa.cast(key, sa.Text).between("5", "5"),
        ],
    )
    def test_what_proves_nothing_is_every_shard(self, condition: Any) -> None:
        assert shards(sa.select(orders).where(condition)) == EVERY

    def test_list_that_is_used_twice_is_not_split(self) -> None:
        """What it is compared with elsewhere may be anywhere."""
        ids = sa.bindparam("ids", expanding=True)
        once = sa.select(orders.c.id).where(key.in_(ids))
        values = {"ids": [1, 2, 3, 4, 5, 6]}

        assert len(planned(once, values, of=FOUR).lists) > 1
        assert planned(once.where(orders.c.total.in_(ids)), values, of=FOUR).lists == ()

    def test_list_of_a_column_that_only_equals_the_key_is_not_split(self) -> None:
        equal = sa.select(orders.c.id).where(orders.c.total == key)
        statement = equal.where(orders.c.total.in_([1, 2, 3, 4, 5, 6]))

        assert planned(statement, of=FOUR).lists == ()


class TestMembership:
    """``key IN (SELECT key ...)`` of a colocated table is answered by each shard for its rows."""

    @pytest.mark.parametrize(
        "inner",
        [
            sa.select(b.c.customer_id).where(b.c.total > 1),
            sa.select(b.c.customer_id.label("x")).group_by(b.c.customer_id),
            sa.select(b.c.customer_id).distinct(),
        ],
    )
    def test_every_shard_answers(self, inner: Any) -> None:
        assert shards(sa.select(a.c.id).where(a.c.customer_id.in_(inner))) == EVERY
        tied = sa.select(a.c.id).where(a.c.customer_id == sa.any_(inner.scalar_subquery()))
        assert shards(tied) == EVERY

    @pytest.mark.parametrize(
        "condition",
        [
            a.c.customer_id.not_in(sa.select(b.c.customer_id)),
            a.c.total.in_(sa.select(b.c.customer_id)),
            a.c.customer_id.in_(sa.select(b.c.total)),
            a.c.customer_id.in_(sa.select(b.c.customer_id).limit(3)),
            a.c.customer_id.in_(sa.select(sa.func.max(b.c.customer_id))),
            sa.or_(a.c.customer_id.in_(sa.select(b.c.customer_id)), a.c.total == 1),
            a.c.customer_id == sa.all_(sa.select(b.c.customer_id).scalar_subquery()),
        ],
    )
    def test_rows_of_other_shards_could_matter(self, condition: Any) -> None:
        assert refused(sa.select(a.c.id).where(condition)) == "subquery"

    def test_key_outside_restricts_inside(self) -> None:
        inside = sa.select(b.c.customer_id)
        statement = sa.select(a.c.id).where(a.c.customer_id.in_(inside), a.c.customer_id == 5)

        assert shards(statement) == FIVE


class TestDerived:
    """A derived table whose rows are each of one shard is a table like any other."""

    @pytest.mark.parametrize(
        "inner",
        [
            sa.select(b.c.customer_id, b.c.total),
            sa.select(b.c.customer_id, b.c.total).distinct(),
            sa.select(b.c.customer_id, sa.func.sum(b.c.total).label("total"))
            .group_by(b.c.customer_id)
            .having(sa.func.count() > 1),
        ],
    )
    @pytest.mark.parametrize("form", ["subquery", "cte"])
    def test_every_shard_has_its_rows(self, inner: Any, form: str) -> None:
        table = getattr(inner, form)("t")

        assert shards(sa.select(table.c.total)) == EVERY
        joined = sa.select(a.c.id).join(table, table.c.customer_id == a.c.customer_id)
        assert shards(joined) == EVERY

    @pytest.mark.parametrize(
        "inner",
        [
            sa.select(b.c.customer_id, b.c.total).limit(2),
            sa.select(b.c.customer_id, b.c.total).ext(postgresql.distinct_on(b.c.total)),
            sa.select(b.c.total).distinct(),
            sa.select(sa.func.sum(b.c.total).label("total")),
            sa.select(b.c.total).group_by(b.c.total),
            sa.select(sa.func.sum(b.c.total).over(order_by=b.c.id).label("total")),
            sa.select(sa.func.my_aggregate(b.c.total).label("total")),
            sa.select(sa.literal_column("sum(total)").label("total")).select_from(b),
        ],
    )
    def test_rows_of_several_shards_in_one_are_refused(self, inner: Any) -> None:
        table = inner.subquery()

        with pytest.raises(CrossShardRefused):
            shards(sa.select(table.c.total))

    def test_grouped_by_a_key_that_may_be_missing_is_refused(self) -> None:
        """A LEFT JOIN without a match groups under NULL, on every shard."""
        joined = a.outerjoin(b, a.c.customer_id == b.c.customer_id)
        inner = sa.select(sa.func.count().label("n")).select_from(joined)
        inner = inner.group_by(b.c.customer_id)

        assert refused(sa.select(inner.subquery())) == "subquery"


class TestNoRow:
    """Nobody is asked where the conditions on a key leave no row, and only rows are wanted."""

    @pytest.mark.parametrize(
        "statement",
        [
            sa.select(orders).where(sa.false()),
            sa.select(orders).where(key == 5, key.in_([])),
            sa.select(orders.c.id).where(key == sa.bindparam("k", None, sa.Integer)),
            sa.select(a.c.id).join(b, a.c.id == b.c.id).where(b.c.customer_id.in_([])),
            sa.select(sa.func.lower("X")).select_from(orders).where(key.in_([])),
            sa.select(sa.func.max(orders.c.id)).where(key.in_([])).group_by(orders.c.total),
        ],
    )
    def test_nobody_is_asked(self, statement: Any) -> None:
        assert planned(statement, of=FOUR).tier is Tier.EMPTY

    @pytest.mark.parametrize(
        "statement",
        [
            sa.select(sa.func.count()).select_from(orders).where(key.in_([])),
            sa.select(sa.func.max(key)).where(sa.false()),
            sa.select(sa.literal(1)).select_from(orders).where(key.in_([])).having(sa.true()),
            sa.select(sa.func.max(key)).where(key.in_([])).group_by(sa.func.rollup(orders.c.total)),
            sa.select(word.c.code).outerjoin(orders, key.in_([])),
            sa.select(sa.select(sa.func.max(orders.c.total)).select_from(word).scalar_subquery())
            .select_from(orders)
            .where(key.in_([])),
            sa.select(orders).where(key.in_([])).with_for_update(),
        ],
    )
    def test_somebody_is_asked_where_there_may_be_a_row(self, statement: Any) -> None:
        assert planned(statement, of=FOUR).targets


class TestLateral:
    """LATERAL sees the tables beside it; what it limits or counts is not split by shard."""

    def test_first_of_each_is_on_the_shard_of_each(self) -> None:
        """Tied by the key, whatever it does with its rows it does with rows of one shard."""
        first = sa.select(b.c.id).where(b.c.customer_id == a.c.customer_id).limit(1).lateral()

        assert shards(sa.select(a.c.id, first.c.id).join(first, sa.true())) == EVERY
        assert shards(sa.select(a.c.id).outerjoin(first, sa.true())) == EVERY

    def test_first_of_all_is_refused_across_shards(self) -> None:
        first = sa.select(b.c.id).where(b.c.total == a.c.total).limit(1).lateral()

        assert refused(sa.select(a.c.id).join(first, sa.true())) == "subquery"

    def test_key_inside_does_not_restrict_outside(self) -> None:
        first = sa.select(b.c.id).where(b.c.customer_id == 5).limit(1).lateral()

        assert refused(sa.select(a.c.id).join(first, sa.true())) == "subquery"

    def test_both_keyed_is_one_shard(self) -> None:
        first = (
            sa.select(b.c.id)
            .where(b.c.customer_id == a.c.customer_id, b.c.customer_id == 5)
            .lateral()
        )
        statement = sa.select(a.c.id).join(first, sa.true()).where(a.c.customer_id == 5)

        assert shards(statement) == FIVE


class TestOtherSources:
    def test_tablesample_is_a_use_of_its_table(self) -> None:
        """Its method is a function that nobody vouches for."""
        assert refused(sa.select(orders.tablesample(10).c.id)) == "statement"

    def test_keyed_tablesample_is_one_shard(self) -> None:
        sample = orders.tablesample(10)

        assert shards(sa.select(sample.c.id).where(sample.c.customer_id == 5)) == FIVE

    def test_values_are_no_table(self) -> None:
        given = sa.values(sa.column("n", sa.Integer), name="given").data([(1,), (2,)])

        assert len(shards(sa.select(given.c.n))) == 1

    def test_keyed_table_beside_values_is_one_shard(self) -> None:
        """SQLAlchemy cannot cache such a statement; its key counts all the same."""
        given = sa.values(sa.column("n", sa.Integer), name="given").data([(1,), (2,)])
        statement = sa.select(orders.c.id).join(given, given.c.n == orders.c.total)

        assert shards(statement.where(key == 5)) == FIVE

    def test_key_equal_to_a_value_of_values_restricts_nothing(self) -> None:
        given = sa.values(sa.column("n", sa.BigInteger), name="given").data([(5,)])

        assert shards(sa.select(orders.c.id).join(given, given.c.n == key)) == EVERY

    def test_subquery_in_a_table_valued_function_is_followed(self) -> None:
        """It stands in FROM, where no walk over WHERE comes by."""
        ids = sa.select(sa.func.array_agg(b.c.id)).scalar_subquery()
        unnested = sa.func.unnest(ids).table_valued("id")
        statement = sa.select(orders.c.id).join(unnested, unnested.c.id == orders.c.id)

        assert refused(statement.where(key == 5)) == "orders"

    def test_text_in_from_hides_a_table(self) -> None:
        statement = sa.select(sa.literal_column("id")).select_from(sa.text("orders"))

        assert refused(statement) == "text()"

    def test_table_known_by_name_only_belongs_nowhere(self) -> None:
        """A light ``table()`` says nothing of sharding."""
        assert refused(sa.select(sa.table("orders", sa.column("id")))) == "statement"

    def test_text_subquery_beside_a_key_belongs_nowhere(self) -> None:
        statement = sa.select(orders).where(key == 5, sa.text("total > (SELECT 1 FROM orders)"))

        assert refused(statement) == "text()"

    def test_simple_text_beside_a_key_hides_nothing(self) -> None:
        assert shards(sa.select(orders).where(key == 5, sa.text("total > 3"))) == FIVE

    def test_key_in_text_restricts_nothing(self) -> None:
        assert shards(sa.select(orders).where(sa.text("customer_id = 5"))) == EVERY

    def test_key_as_literal_column_restricts_nothing(self) -> None:
        assert shards(sa.select(orders).where(sa.literal_column("customer_id") == 5)) == EVERY

    @pytest.mark.parametrize(
        "statement",
        [
            sa.select(orders.c.id).suffix_with("FOR UPDATE"),
            sa.select(orders.c.id).with_statement_hint("FOR UPDATE"),
        ],
    )
    def test_suffix_is_text(self, statement: Any) -> None:
        assert refused(statement.where(key == 5)) == "text()"

    def test_subquery_added_by_a_type_is_not_lost(self) -> None:
        """SQLAlchemy renders it; the statement does not show it."""

        class Ranked(sa.types.TypeDecorator[int]):
            impl = sa.Integer
            cache_ok = True

            def bind_expression(self, bindparam: Any) -> Any:
                everywhere = sa.select(sa.func.count()).select_from(orders.alias())
                return everywhere.scalar_subquery() + bindparam

        beside_key = orders.c.total == sa.literal(3, Ranked())

        with pytest.raises(CrossShardRefused):
            planned(sa.select(orders.c.id).where(orders.c.customer_id == 5, beside_key), of=FOUR)


class TestTypes:
    """Only a comparison of the key's own type says something of its hash."""

    def test_join_with_citext_carries_no_key(self) -> None:
        """``text = citext`` ignores case: 'About' matches the key 'about'."""
        statement = sa.select(page.c.slug).join(word, word.c.text == page.c.slug)

        assert shards(statement.where(word.c.text == "About")) == EVERY

    def test_join_with_char_carries_no_key(self) -> None:
        statement = sa.select(page.c.slug).join(word, word.c.code == page.c.slug)

        assert shards(statement.where(word.c.code == "a    ")) == EVERY

    def test_two_keys_equal_to_a_citext_are_not_equal(self) -> None:
        statement = (
            sa.select(page.c.slug)
            .join(word, word.c.text == page.c.slug)
            .join(visit, visit.c.slug == word.c.text)
        )

        assert refused(statement) == "JOIN"

    def test_two_keys_equal_to_a_text_are_equal(self) -> None:
        statement = (
            sa.select(page.c.slug)
            .join(word, word.c.plain == page.c.slug)
            .join(visit, visit.c.slug == word.c.plain)
        )

        assert shards(statement) == EVERY

    def test_join_with_a_float_carries_no_key(self) -> None:
        statement = sa.select(a.c.id).join(b, b.c.rate == a.c.customer_id)

        assert refused(statement.where(b.c.rate == 5.0, b.c.customer_id == 5)) == "JOIN"

    @pytest.mark.parametrize(
        "value",
        [
            sa.literal("About", CITEXT),
            sa.literal("ab ", sa.CHAR(3)),
            sa.cast("about", sa.CHAR(5)),
            sa.cast("about", sa.String(4)),
            sa.func.lower("About"),
            sa.collate(sa.literal("about"), "C"),
        ],
    )
    def test_value_of_another_type_restricts_nothing(self, value: Any) -> None:
        assert shards(sa.select(page).where(page.c.slug == value)) == EVERY

    def test_collated_key_restricts_nothing(self) -> None:
        assert shards(sa.select(page).where(sa.collate(page.c.slug, "x") == "about")) == EVERY

    def test_key_of_another_type_is_not_colocated(self) -> None:
        statement = sa.select(page.c.slug).join(orders, sa.cast(key, sa.Text) == page.c.slug)

        assert refused(statement) == "JOIN"

    def test_value_is_stored_as_its_own_type_does(self) -> None:
        """Not as the column's: ``literal(x, OtherType)`` is sent as the other type makes it."""

        class Doubled(sa.TypeDecorator[int]):
            impl = sa.BigInteger
            cache_ok = True

            def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
                return None if value is None else value * 2

        plain = shards(sa.select(orders).where(key == 10))

        assert shards(sa.select(orders).where(key == sa.literal(5, Doubled))) == plain


class TestKeysOfTwoColumns:
    whole = (stock.c.region == 1, stock.c.item == "nut")

    def test_both_columns_give_one_shard(self) -> None:
        assert len(shards(sa.select(stock).where(*self.whole))) == 1

    def test_row_value_gives_one_shard(self) -> None:
        pair = sa.tuple_(stock.c.region, stock.c.item) == sa.tuple_(1, "nut")

        assert shards(sa.select(stock).where(pair)) == shards(sa.select(stock).where(*self.whole))

    def test_order_of_the_row_value_does_not_matter(self) -> None:
        pair = sa.tuple_(stock.c.item, stock.c.region) == sa.tuple_("nut", 1)

        assert shards(sa.select(stock).where(pair)) == shards(sa.select(stock).where(*self.whole))

    @pytest.mark.parametrize("condition", whole)
    def test_one_column_restricts_nothing(self, condition: Any) -> None:
        assert shards(sa.select(stock).where(condition)) == EVERY

    def test_lists_are_combined(self) -> None:
        many = shards(sa.select(stock).where(stock.c.region.in_([1, 2]), stock.c.item == "nut"))
        each = [
            shards(sa.select(stock).where(stock.c.region == region, stock.c.item == "nut"))
            for region in (1, 2)
        ]

        assert set(many) == {shard for found in each for shard in found}

    def test_joined_on_one_column_is_not_colocated(self) -> None:
        assert refused(sa.select(stock.c.left).join(move, move.c.item == stock.c.item)) == "JOIN"

    def test_joined_on_both_columns_is_colocated(self) -> None:
        both = (move.c.item == stock.c.item) & (move.c.region == stock.c.region)

        assert shards(sa.select(stock.c.left).join(move, both)) == EVERY

    def test_columns_crossed_are_not_colocated(self) -> None:
        other = stock.alias()
        statement = sa.select(stock.c.left).join(
            other, (other.c.region == stock.c.region) & (other.c.item != stock.c.item)
        )

        assert refused(statement) == "JOIN"

    def test_alternatives_need_the_whole_key_in_each(self) -> None:
        half = sa.or_(sa.and_(*self.whole), stock.c.region == 1)

        assert shards(sa.select(stock).where(half)) == EVERY


class TestDml:
    def test_delete_using_another_use_of_the_table_is_refused(self) -> None:
        statement = sa.delete(orders).where(key == 5, b.c.total == orders.c.total)

        with pytest.raises(MissingShardKey):
            shards(statement)

    def test_delete_using_a_colocated_table_is_one_shard(self) -> None:
        statement = sa.delete(orders).where(key == 5, b.c.customer_id == key)

        assert shards(statement) == FIVE

    def test_returning_a_subquery_of_every_shard_is_refused(self) -> None:
        every = sa.select(sa.func.count()).select_from(b).scalar_subquery()

        with pytest.raises(MissingShardKey):
            shards(sa.delete(orders).where(key == 5).returning(every))

    def test_on_conflict_with_a_subquery_of_every_shard_is_refused(self) -> None:
        every = sa.select(sa.func.count()).select_from(b).scalar_subquery()
        statement = upsert(orders).values(customer_id=5, id=1, total=1)
        statement = statement.on_conflict_do_update(
            index_elements=["customer_id", "id"], set_={"total": every}
        )

        assert refused(statement) == "subquery in INSERT"

    def test_on_conflict_with_the_excluded_row_is_one_shard(self) -> None:
        statement = upsert(orders).values(customer_id=5, id=1, total=1)
        statement = statement.on_conflict_do_update(
            index_elements=["customer_id", "id"], set_={"total": statement.excluded.total}
        )

        assert shards(statement) == FIVE

    def test_cte_that_deletes_one_shards_rows_is_one_shard(self) -> None:
        gone = sa.delete(orders).where(key == 5).returning(orders.c.id).cte()

        assert shards(sa.select(gone.c.id)) == FIVE

    def test_cte_that_deletes_elsewhere_is_refused(self) -> None:
        gone = sa.delete(orders).where(key == 1).returning(orders.c.id).cte()

        assert refused(sa.select(a.c.id).where(a.c.customer_id == 5).add_cte(gone)) == "orders"

    def test_cte_that_inserts_is_refused(self) -> None:
        """Nobody asks for the keys of its rows."""
        made = sa.insert(orders).values(customer_id=1, id=1).returning(orders.c.id).cte()

        assert refused(sa.select(made.c.id)) == "data-modifying CTE"

    def test_cte_that_writes_a_reference_table_is_refused(self) -> None:
        """It would run on one shard; the copies on the others would differ from then on."""
        made = sa.insert(word).values(text="x").returning(word.c.text).cte()

        assert refused(sa.select(a.c.id).where(a.c.customer_id == 5).add_cte(made)) == (
            "data-modifying CTE"
        )


class Base(orm.DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    __table_args__ = sharded_by("id")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    kind: Mapped[str] = mapped_column(sa.Text)
    name: Mapped[str] = mapped_column("full_name", sa.Text)
    orders: Mapped[list[Order]] = relationship(back_populates="customer")


class Company(Customer):
    __tablename__ = "company"
    __table_args__ = sharded_by("id")
    __mapper_args__ = {"polymorphic_identity": "company"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.ForeignKey("customer.id"), primary_key=True)
    tax_id: Mapped[str] = mapped_column(sa.Text)


class Order(Base):
    __tablename__ = "customer_order"
    __table_args__ = sharded_by("customer_no")

    buyer: Mapped[int] = mapped_column(
        "customer_no", sa.ForeignKey("customer.id"), primary_key=True
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[Customer] = relationship(back_populates="orders")


Customer.order_count = orm.column_property(
    sa.select(sa.func.count())
    .where(Order.buyer == Customer.id)
    .correlate_except(Order)
    .scalar_subquery(),
    deferred=True,
)


class TestOrm:
    """The SELECT that the ORM will render is what counts, with its own joins and criteria."""

    def test_key_by_an_attribute_of_another_name(self) -> None:
        assert shards(sa.select(Order).where(Order.buyer == 5)) == FIVE

    def test_joined_inheritance_is_colocated(self) -> None:
        assert shards(sa.select(Company)) == EVERY

    def test_joined_inheritance_by_key(self) -> None:
        assert shards(sa.select(Company).where(Company.id == 5)) == FIVE

    def test_joined_eager_load_by_key(self) -> None:
        statement = sa.select(Customer).options(orm.joinedload(Customer.orders))

        assert shards(statement.where(Customer.id == 5)) == FIVE

    def test_limited_joined_eager_load_is_of_every_shard(self) -> None:
        """The ORM puts the limited entities into a subquery; where they are does not change."""
        statement = sa.select(Customer).options(orm.joinedload(Customer.orders)).limit(3)

        assert shards(statement) == EVERY

    def test_limited_joined_eager_load_by_key(self) -> None:
        statement = sa.select(Customer).options(orm.joinedload(Customer.orders)).limit(3)

        assert shards(statement.where(Customer.id == 5)) == FIVE

    def test_alias_is_keyed_by_its_own_conditions(self) -> None:
        other = aliased(Order)
        statement = sa.select(Order.id, other.id).join(other, other.id == Order.id)

        assert refused(statement.where(Order.buyer == 5)) == "JOIN"
        assert shards(statement.where(Order.buyer == 5, other.buyer == 5)) == FIVE

    def test_relationship_comparison(self) -> None:
        some = sa.select(Customer.id).where(Customer.orders.any(Order.id == 1))

        assert shards(some) == EVERY
        assert shards(some.where(Customer.id == 5)) == FIVE

    def test_correlated_column_property_stays_local(self) -> None:
        statement = sa.select(Customer).options(orm.undefer(Customer.order_count))

        assert shards(statement) == EVERY
        assert shards(statement.where(Customer.id == 5)) == FIVE

    def test_loader_criteria_restrict(self) -> None:
        only = orm.with_loader_criteria(Order, Order.buyer == 5)

        assert shards(sa.select(Order).options(only)) == FIVE

    def test_loader_criteria_of_the_nullable_side_do_not_restrict_the_other(self) -> None:
        only = orm.with_loader_criteria(Order, Order.buyer == 5)
        statement = sa.select(Customer.id, Order.id).outerjoin(Customer.orders).options(only)

        assert shards(statement) == EVERY

    def test_nested_orm_select_is_followed(self) -> None:
        inner = (
            sa.select(Order.buyer.label("buyer"))
            .join(Order.customer)
            .where(Customer.name == "x")
            .subquery()
        )
        statement = sa.select(Customer.id).join(inner, inner.c.buyer == Customer.id)

        assert shards(statement.where(Customer.id == 5)) == EVERY

    def test_update_by_key(self) -> None:
        assert shards(sa.update(Customer).where(Customer.id == 5).values(name="x")) == FIVE


class TestExistence:
    """``SELECT EXISTS (...)`` is asked of each shard, where its rows are those of each."""

    def test_it_goes_to_the_shards_of_its_rows(self) -> None:
        assert shards(sa.select(sa.select(orders).where(key == 5).exists())) == FIVE
        assert shards(sa.select(~sa.select(orders).exists())) == EVERY
        joined = (
            sa.select(sa.literal_column("1"))
            .select_from(a)
            .join(b, a.c.customer_id == b.c.customer_id)
            .exists()
        )
        assert shards(sa.select(joined.label("any")).limit(1)) == EVERY

    @pytest.mark.parametrize(
        "rows",
        [
            sa.select(sa.func.max(orders.c.total)),
            sa.select(sa.literal_column("max(total)")).select_from(orders),
            sa.select(orders.c.total).group_by(orders.c.total).having(sa.func.count() > 1),
            sa.select(orders).limit(1),
            sa.select(orders).offset(1),
            sa.select(a).join(b, a.c.total == b.c.total),
            sa.select(word).outerjoin(orders, orders.c.total == 1),
            sa.select(key).union(sa.select(key)),
        ],
    )
    def test_what_one_shard_cannot_say_is_refused(self, rows: Any) -> None:
        with pytest.raises(CrossShardRefused):
            shards(sa.select(rows.exists()))

    def test_beside_anything_else_it_is_a_subquery_like_any_other(self) -> None:
        is_there = sa.select(orders).exists()
        for statement in (
            sa.select(is_there, sa.literal(1)),
            sa.select(is_there).where(is_there),
            sa.select(sa.cast(is_there, sa.Integer)),
        ):
            assert refused(statement) == "subquery"
