"""Which SELECTs merge exactly across shards, what the shards are sent, and each refusal by name."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import func, orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import InvalidRequestError

from sqlroute import sharded_by
from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.merge import merge
from sqlroute.routing.rewrite import Rewritten, analyse, rewrite, rewritten


class Shout(sa.types.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True


class Base(orm.DeclarativeBase):
    pass


class Flight(Base):
    __tablename__ = "flights"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    delay: orm.Mapped[int | None]
    price: orm.Mapped[Decimal] = orm.mapped_column(sa.Numeric(10, 2))
    origin: orm.Mapped[str]
    dest: orm.Mapped[str] = orm.mapped_column(sa.String(collation="de_DE"))
    code: orm.Mapped[str] = orm.mapped_column(sa.CHAR(3))
    loud: orm.Mapped[str] = orm.mapped_column(Shout)
    gate: orm.Mapped[str] = orm.mapped_column(sa.Enum("a", "b", name="gate"))
    legs: orm.Mapped[list[Leg]] = orm.relationship()


class Leg(Base):
    __tablename__ = "legs"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    flight_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("flights.id"))


T = sa.Table(
    "odd",
    sa.MetaData(),
    sa.Column("id", sa.Integer),
    sa.Column("tags", postgresql.ARRAY(sa.Text)),
    sa.Column("doc", postgresql.JSONB),
    sa.Column("wait", sa.Interval),
    sa.Column("loose", postgresql.CITEXT),
    sa.Column("address", postgresql.INET),
    sa.Column("period", postgresql.INT4RANGE),
    sa.Column("hours", sa.Time(timezone=True)),
    sa.Column("unknown"),
    sa.Column("low", sa.REAL),
    sa.Column("variant", sa.String().with_variant(postgresql.CITEXT(), "postgresql")),
)
O = T.c  # noqa: E741 - short, because every case of refusals names a column
F = Flight

sharded = sa.Table(
    "sharded",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger),
    sa.Column("x", sa.Integer),
    **sharded_by("id"),
)
S = sharded.c


def sql(statement: Any) -> str:
    return " ".join(str(statement).split())


def rewrite_here(statement: Any, **parameters: Any) -> Rewritten:
    return rewrite(statement, text_order=TextOrder(True), parameters=parameters)


def test_a_plain_select_is_sent_as_it_is() -> None:
    statement = sa.select(F.id, F.origin).where(F.delay > 5)

    found = rewrite_here(statement)

    assert found.statement is statement
    assert found.spec.describe() == ("shard after shard",)


def test_visible_columns_are_sorted_by_where_they_are() -> None:
    found = rewrite_here(sa.select(F.id, F.delay).order_by(F.delay.desc(), "id"))

    assert found.spec.hidden == 0
    assert [term.column for term in found.spec.order] == [1, 0]
    assert found.spec.describe() == ("order by flights.delay desc, flights.id",)


def test_other_sort_expressions_become_hidden_columns_behind_the_callers() -> None:
    found = rewrite_here(sa.select(F.id).order_by(F.delay % 7, F.origin.desc().nulls_last()))

    assert sql(found.statement) == (
        "SELECT flights.id, flights.delay % :delay_1 AS sqlroute_1, flights.origin AS sqlroute_2 "
        "FROM flights ORDER BY sqlroute_1 ASC, flights.origin DESC NULLS LAST"
    )
    assert [term.column for term in found.spec.order] == [-2, -1]
    assert found.spec.describe() == (
        "order by flights.delay % :delay_1, flights.origin desc nulls last",
    )


def test_a_decorated_type_is_sorted_as_it_is_stored() -> None:
    found = rewrite_here(sa.select(F.loud).order_by(F.loud))

    assert found.spec.hidden == 1
    hidden: Any = list(found.statement.selected_columns)[-1]
    assert isinstance(hidden.type, sa.types.NullType)


@pytest.mark.parametrize("term", ["late", sa.desc("late"), "delay"])
def test_names_are_resolved_as_sqlalchemy_does(term: Any) -> None:
    found = rewrite_here(sa.select(F.id, (F.delay + 1).label("late")).order_by(term))

    assert found.spec.order[0].column == (1 if term != "delay" else -1)


def test_limit_plus_offset_is_pushed_to_each_shard() -> None:
    found = rewrite_here(sa.select(F.id).order_by(F.id).limit(10).offset(5))

    assert found.statement._limit == 15
    assert found.statement._offset_clause is None
    assert found.spec.describe()[-1] == "limit 10 offset 5 after merge; limit 15 per shard"


def test_limits_come_from_the_parameters_of_the_execution() -> None:
    statement = sa.select(F.id).limit(sa.bindparam("n")).offset(sa.bindparam("skip", 2))

    found = rewrite_here(statement, n=7)

    assert (found.spec.limit, found.spec.offset, found.spec.pushed) == (7, 2, 9)
    with pytest.raises(InvalidRequestError, match="'n'"):
        rewrite_here(statement)


def test_no_limit_value_is_no_limit() -> None:
    found = rewrite_here(sa.select(F.id).limit(sa.bindparam("n")).offset(3), n=None)

    assert (found.spec.limit, found.spec.offset, found.spec.pushed) == (None, 3, None)
    assert found.statement._limit_clause is None


def test_a_negative_limit_is_left_for_postgres_to_refuse() -> None:
    found = rewrite_here(sa.select(F.id).limit(-1))

    assert found.statement._limit == -1
    assert found.spec.limit is None


def test_a_limit_beyond_integer_is_not_pushed() -> None:
    found = rewrite_here(sa.select(F.id).limit(2**31 - 1).offset(1))

    assert found.spec.pushed is None
    assert found.statement._limit_clause is None


def test_a_shape_serves_other_values_of_the_statement() -> None:
    def statement(add: int, limit: int) -> Any:
        return sa.select(F.id).order_by(F.delay + add).limit(limit)

    shape = analyse(statement(1, 10), text_order=TextOrder(True))
    found = rewritten(statement(2, 20), shape)

    assert found.spec.limit == 20
    assert found.statement.compile().params == {"delay_1": 2, "param_1": 20}
    first, second = (
        rewritten(statement(n, n), shape).statement._generate_cache_key() for n in (1, 2)
    )
    assert first is not None
    assert second is not None
    assert first.key == second.key


def test_an_average_travels_as_sum_and_count() -> None:
    found = rewrite_here(
        sa.select(F.origin, func.avg(F.delay))
        .group_by(F.origin)
        .order_by(func.avg(F.delay))
        .limit(2)
    )

    assert sql(found.statement) == (
        "SELECT flights.origin, avg(flights.delay) AS avg_1, sum(flights.delay) AS sqlroute_1, "
        "count(flights.delay) AS sqlroute_2 FROM flights GROUP BY flights.origin"
    )
    parts = [[("JFK", 0, 3, 2)], [("JFK", 0, 1, 2), ("LGA", 0, 0, 1)]]
    assert list(merge(parts, found.spec)) == [("LGA", Decimal(0)), ("JFK", Decimal(1))]


def test_filter_of_an_aggregate_stays_on_its_parts() -> None:
    found = rewrite_here(sa.select(func.avg(F.price).filter(F.delay > 3)))

    assert sql(found.statement).count("FILTER (WHERE flights.delay > :delay_1)") == 3


def test_a_single_precision_average_adds_in_double_precision() -> None:
    found = rewrite_here(sa.select(func.avg(O.low)))

    assert "sum(CAST(odd.low AS DOUBLE)) AS sqlroute_1" in sql(found.statement)


def test_columns_beside_a_group_key_come_from_the_group() -> None:
    """PostgreSQL allows only what the key determines, so any shard's value is right."""
    found = rewrite_here(sa.select(F, func.count(Leg.id)).join(F.legs).group_by(F.id))

    assert found.spec.hidden == 1
    assert found.spec.grouping is not None
    assert found.spec.grouping.aggregates[0].column == 1


def test_joined_eager_collections_keep_the_hidden_columns_outside() -> None:
    statement = sa.select(F).options(orm.joinedload(F.legs)).order_by(F.delay + 1).limit(3)

    found = rewrite_here(statement)

    assert found.spec.entities
    assert "anon_1.sqlroute_1" in sql(found.statement).split(" FROM ")[0]


def test_known_functions_of_the_caller_are_accepted() -> None:
    statement = sa.select(func.fare_class(F.price))

    shape = analyse(
        statement, text_order=TextOrder(True), scalar_functions=frozenset({"fare_class"})
    )

    assert shape.describe() == ("shard after shard",)


def test_having_is_taken_off_what_the_shards_are_sent() -> None:
    """But for what only the group key decides: a shard may leave those groups out."""
    found = rewrite_here(
        sa.select(F.origin, func.count())
        .group_by(F.origin)
        .having(func.sum(F.delay) > 10, F.origin != "JFK")
    )

    assert sql(found.statement) == (
        "SELECT flights.origin, count(*) AS count_1, sum(flights.delay) AS sqlroute_1 "
        "FROM flights GROUP BY flights.origin HAVING flights.origin != :origin_1"
    )
    assert found.spec.describe()[-1] == "having sum(flights.delay) > :sum_1"
    assert found.spec.values == (10,)
    parts = [[("LGA", 1, 6)], [("LGA", 2, 5), ("EWR", 9, 10)]]
    assert list(merge(parts, found.spec)) == [("LGA", 3)]


def test_values_of_having_come_from_the_parameters_of_the_execution() -> None:
    statement = grouped().having(func.count() > sa.bindparam("n"), func.sum(F.price).in_([1, 2]))
    shape = analyse(statement, text_order=TextOrder(True))

    assert rewritten(statement, shape, {"n": 3}).spec.values == (3, [1, 2])
    with pytest.raises(CrossShardRefused, match="a str is compared with a number"):
        rewritten(statement, shape, {"n": "3"})


def test_groups_by_the_shard_key_are_left_to_each_shard() -> None:
    """Whatever is computed of them, HAVING and LIMIT too."""
    statement = (
        sa.select(S.id, func.count(S.x.distinct()), func.percentile_cont(0.5).within_group(S.x))
        .group_by(S.id, S.x)
        .having(func.max(S.x) / 2 > 1)
        .order_by(func.count())
        .limit(3)
    )

    found = rewrite_here(statement)

    assert found.spec.grouping is None
    assert "HAVING" in sql(found.statement)
    assert found.statement._limit == 3
    assert found.spec.order[0].column == -1


def test_a_key_on_the_nullable_side_of_a_join_keeps_no_group_together() -> None:
    other = sharded.alias()
    joined = sa.select(other.c.id).select_from(sharded.outerjoin(other, other.c.id == S.id))

    assert rewrite_here(joined.group_by(other.c.id)).spec.grouping is not None
    assert rewrite_here(joined.group_by(S.id, other.c.id)).spec.grouping is None


def test_windows_over_the_shard_key_are_rows_values() -> None:
    window = func.row_number().over(partition_by=[S.x, S.id], order_by=S.x)

    assert rewrite_here(sa.select(S.id, window)).spec.describe() == ("shard after shard",)
    with pytest.raises(CrossShardRefused, match="PARTITION BY the shard key"):
        rewrite_here(sa.select(func.row_number().over(partition_by=S.x)))


@pytest.mark.parametrize(
    "call", [func.count(sa.distinct(S.id)), func.sum(S.id.distinct()), func.avg(S.id.distinct())]
)
def test_distinct_values_of_the_shard_key_are_counted_by_each_shard(call: Any) -> None:
    found = rewrite_here(sa.select(call))

    assert "(DISTINCT sharded.id)" in sql(found.statement)
    assert found.spec.grouping is not None


def test_distinct_changes_nothing_of_least_and_greatest() -> None:
    found = rewrite_here(sa.select(func.max(F.delay.distinct()), func.bool_or(F.id.distinct() > 1)))

    assert found.spec.grouping is not None


def test_distinct_rows_are_told_apart_as_they_are_stored() -> None:
    """Of an entity by its primary key; hidden, as a decorated type is."""
    found = rewrite_here(sa.select(F, F.loud).distinct())

    assert [key.text for key in found.spec.distinct or ()] == ["flights.id", "flights.loud"]
    assert [key.column for key in found.spec.distinct or ()] == [-2, -1]
    assert sql(found.statement).startswith("SELECT DISTINCT flights.id, ")


def test_distinct_on_keeps_its_order_on_the_shards() -> None:
    statement = sa.select(F.id).ext(postgresql.distinct_on(F.origin))
    found = rewrite_here(statement.order_by(F.origin, F.delay.desc()).limit(2).offset(1))

    assert found.statement._limit == 3
    assert found.spec.describe() == (
        "order by flights.origin, flights.delay desc",
        "distinct flights.origin",
        "limit 2 offset 1 after merge; limit 3 per shard",
    )


def test_ties_are_fetched_from_each_shard() -> None:
    found = rewrite_here(sa.select(F.id).order_by(F.delay).fetch(3, with_ties=True).offset(2))

    assert found.statement._fetch_clause_options == {"with_ties": True, "percent": False}
    assert (found.spec.limit, found.spec.offset, found.spec.pushed) == (3, 2, 5)
    assert found.spec.describe()[-1] == "limit 3 with ties offset 2 after merge; limit 5 per shard"


def test_an_enum_is_ordered_by_the_rank_that_the_server_gives() -> None:
    found = rewrite_here(sa.select(F.id).order_by(F.gate.desc()))

    assert "array_position(enum_range(CAST(NULL AS gate)), flights.gate) AS sqlroute_2" in (
        " ".join(str(found.statement.compile(dialect=postgresql.dialect())).split())  # type: ignore[no-untyped-call]
    )
    assert found.spec.alike[0][0] == -2
    assert found.spec.order[0].column == -1


def test_moments_that_are_not_shown_are_sorted_by_their_seconds() -> None:
    """Infinite ones, and those before Christ, are no values to Python."""
    at = sa.Table(
        "t", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("at", sa.DateTime)
    ).c.at

    found = rewrite_here(sa.select(at.table.c.id).order_by(at))

    assert "EXTRACT(epoch FROM t.at) AS sqlroute_1 FROM t ORDER BY t.at" in sql(found.statement)


def test_a_union_is_merged_like_the_rows_of_one_select() -> None:
    statement = sa.union(sa.select(F.id, F.origin), sa.select(Leg.id, F.origin))
    found = rewrite_here(statement.order_by(sa.desc("origin"), F.id).limit(5))

    assert found.spec.describe() == (
        "order by flights.origin desc, flights.id",
        "distinct flights.id, flights.origin",
        "limit 5 after merge; limit 5 per shard",
    )
    everything = rewrite_here(sa.union_all(sa.select(F.id), sa.select(Leg.id)))
    assert everything.spec.describe() == ("shard after shard",)


TEXT_KEYS = [
    (F.origin.collate("C"), False, True),
    (F.origin.collate("POSIX").desc(), False, True),
    (F.origin, True, True),
    (F.origin, False, False),
    (F.origin.collate("en-x-icu"), True, False),
    (F.dest, True, False),
    (F.dest.collate("C"), True, True),
    (func.lower(F.origin), True, True),
    (func.lower(F.dest), True, False),
    (func.lower(F.origin.collate("C")), False, False),
    (func.lower(F.origin).collate("C"), False, True),
    (sa.select(F.dest).subquery().c.dest, True, False),
]


OWN = TextOrder(True, others=frozenset({"flights.origin", "planes.loud"}))
USES_IT = [
    F.origin,
    func.lower(F.origin),
    orm.aliased(F).origin,
    sa.select(F.origin).subquery().c[0],
]
OTHERS = [F.loud, F.origin.collate("C"), func.lower(F.origin).collate("C")]


@pytest.mark.parametrize("key", USES_IT, ids=str)
def test_a_column_is_ordered_by_the_collation_that_the_server_has_for_it(key: Any) -> None:
    """Though the program declares none."""
    rewrite(sa.select(key).order_by(key), text_order=TextOrder(True))

    with pytest.raises(CrossShardRefused, match=r'add \.collate\("C"\)'):
        rewrite(sa.select(key).order_by(key), text_order=OWN)
    with pytest.raises(CrossShardRefused, match=r'add \.collate\("C"\)'):
        rewrite(sa.select(func.max(key)), text_order=OWN)
    loose = TextOrder(True, others=OWN.others, loose=OWN.others)
    for statement in (sa.select(key).distinct(), sa.select(key, func.count()).group_by(key)):
        rewrite(statement, text_order=OWN)
        with pytest.raises(CrossShardRefused, match="may take unlike texts for equal"):
            rewrite(statement, text_order=loose)


@pytest.mark.parametrize("key", OTHERS, ids=str)
def test_other_columns_are_ordered_as_ever(key: Any) -> None:
    rewrite(sa.select(key).order_by(key), text_order=OWN)


@pytest.mark.parametrize(("key", "default_is_code_point", "accepted"), TEXT_KEYS)
def test_text_is_ordered_only_by_code_point(
    key: Any, default_is_code_point: bool, accepted: bool
) -> None:
    statement = sa.select(key).order_by(key)
    if accepted:
        rewrite(statement, text_order=TextOrder(default_is_code_point))
        return

    with pytest.raises(CrossShardRefused, match=r'add \.collate\("C"\)'):
        rewrite(statement, text_order=TextOrder(default_is_code_point))


def grouped(*columns: Any) -> Any:
    return sa.select(F.origin, *columns).group_by(F.origin)


class Mine(sa.ColumnElement[int]):
    inherit_cache = False
    type = sa.Integer()


REFUSED: list[tuple[Any, str]] = [
    (sa.select(O.id, O.tags).distinct(), "DISTINCT"),
    (sa.select(orm.Bundle("all", F.id)).distinct(), "DISTINCT"),
    (sa.select(F.id).distinct().order_by(F.delay), "ORDER BY"),
    (grouped().ext(postgresql.distinct_on(F.origin)), "DISTINCT ON"),
    (sa.select(F.id).ext(postgresql.distinct_on(O.doc)), "DISTINCT ON"),
    (grouped().having(func.sum(F.delay) / 2 > 1), "sum()"),
    (grouped().having(func.min(O.low) > 1), "HAVING"),
    (grouped().having(func.sum(F.delay) > sa.select(F.id).scalar_subquery()), "HAVING"),
    (grouped().having(func.max(F.delay) + 1 > 5), "HAVING"),
    (grouped().having(func.array_agg(F.id) == [1]), "array_agg()"),
    (sa.select(func.count()).having(F.id > 1), "HAVING"),
    (sa.select(func.current_date() - F.id).distinct(), "DISTINCT"),
    (sa.select(func.count()).group_by(func.date_trunc("hour", func.now())), "GROUP BY"),
    (sa.select(F.id).order_by(sa.extract("epoch", func.now()) - F.delay), "ORDER BY"),
    (sa.union(sa.select(func.localtimestamp()), sa.select(func.now())), "UNION"),
    (sa.select(F.id).fetch(3, with_ties=True), "FETCH"),
    (sa.select(F.id).order_by(F.id).fetch(3, percent=True), "FETCH PERCENT"),
    (sa.select(F.id).limit(sa.literal_column("1 + 1")), "LIMIT"),
    (sa.select(F.id).offset(func.length("abc")), "OFFSET"),
    (sa.select(F.id).prefix_with("DISTINCT"), "prefix or suffix"),
    (sa.except_(sa.select(F.id), sa.select(Leg.id)), "EXCEPT"),
    (sa.intersect(sa.select(F.id), sa.select(Leg.id)), "INTERSECT"),
    (sa.union(sa.select(F.id).limit(1), sa.select(Leg.id)), "UNION"),
    (sa.union(sa.select(func.max(F.id)), sa.select(Leg.id)), "UNION"),
    (sa.union(sa.select(F.loud), sa.select(F.origin)), "UNION"),
    (sa.union(sa.select(F.id), sa.select(F.origin)), "UNION"),
    (sa.union_all(sa.select(F.id).distinct(), sa.select(Leg.id)), "UNION ALL"),
    (sa.union_all(sa.select(F.id), sa.select(Leg.id)).order_by(F.delay), "ORDER BY"),
    (sa.union_all(sa.select(F.dest), sa.select(F.dest)).order_by("dest"), "ORDER BY"),
    (sa.union_all(sa.select(func.row_number().over()), sa.select(Leg.id)), "OVER"),
    (sa.select(func.row_number().over(order_by=F.id)), "OVER"),
    (sa.select(F.id).order_by(func.rank().over(order_by=F.id)), "OVER"),
    (sa.select(func.percentile_cont(0.5).within_group(F.delay)), "WITHIN GROUP"),
    (sa.select(func.count(F.origin.distinct())), "count(DISTINCT)"),
    (sa.select(func.sum(sa.distinct(F.delay))), "sum(DISTINCT)"),
    (grouped(func.stddev(O.unknown)), "stddev()"),
    (grouped(func.stddev(F.origin)), "stddev()"),
    (grouped(func.array_agg(F.id.distinct())), "array_agg(DISTINCT)"),
    (grouped(func.array_agg(O.tags)), "array_agg()"),
    (grouped(func.array_agg(F.gate)), "array_agg()"),
    (grouped(func.array_agg(F.loud)), "array_agg()"),
    (grouped(func.string_agg(F.origin, F.dest)), "string_agg()"),
    (grouped(func.string_agg(F.id, ",")), "string_agg()"),
    (grouped(func.json_agg(F.id).aggregate_order_by(F.dest)), "json_agg()"),
    (grouped(func.bit_and(F.price)), "bit_and()"),
    (grouped(func.bool_and(F.delay > 1, type_=Shout)), "bool_and()"),
    (grouped(func.regr_slope(F.delay)), "regr_slope()"),
    (grouped(func.mode().within_group(F.delay)), "WITHIN GROUP"),
    (sa.select(func.my_agg(F.id)), "my_agg()"),
    (sa.select(func.public.count(F.id)), "count()"),
    (grouped(func.unnest(sa.literal([1, 2], postgresql.ARRAY(sa.Integer)))), "unnest()"),
    (grouped(func.sum(F.delay) / 2), "sum()"),
    (grouped(func.coalesce(func.sum(F.delay + 1), 0)), "select list"),
    (grouped(sa.cast(func.avg(F.delay), sa.Integer)), "avg()"),
    (grouped(func.count()).order_by(-func.count()), "count()"),
    (sa.select(orm.Bundle("all", func.count(F.id))), "count()"),
    (sa.select(F.delay).group_by(func.rollup(F.delay)), "ROLLUP"),
    (sa.select(F.delay).group_by(func.cube(F.delay)), "CUBE"),
    (sa.select(F.delay).group_by(func.grouping_sets(sa.tuple_(F.delay))), "GROUPING SETS"),
    (sa.select(F.delay).group_by(sa.tuple_(F.delay, F.id)), "GROUP BY"),
    (sa.select(F.delay).group_by(sa.text("1")), "GROUP BY"),
    (sa.select(F.id).order_by(sa.text("id desc")), "ORDER BY"),
    (sa.select(F.id).order_by(sa.literal_column("1")), "ORDER BY"),
    (sa.select(F.id).order_by("nowhere"), "ORDER BY"),
    (sa.select(sa.text("count(*)")).select_from(F), "select list"),
    (sa.select(sa.text("DISTINCT id")).select_from(F), "select list"),
    (sa.select(sa.literal_column("array_agg(id)")).select_from(F), "select list"),
    (grouped(sa.literal_column("id"), func.count()), "select list"),
    (sa.select(sa.text("origin"), func.count()).select_from(F).group_by(F.origin), "select list"),
    (sa.select(func.sum(sa.literal_column("delay"))), "sum()"),
    (sa.select(Mine()), "select list"),
    (sa.select(func.sum(F.origin)), "sum()"),
    (sa.select(func.avg(O.wait)), "avg()"),
    (sa.select(func.avg(O.unknown)), "avg()"),
    (sa.select(func.sum(O.low)), "sum()"),
    (sa.select(func.max(F.dest)), "max()"),
    (sa.select(func.min(O.tags)), "min()"),
    (sa.select(func.sum(func.sum(F.delay))), "sum()"),
    (sa.select(func.sum(F.delay, type_=Shout)), "sum()"),
    (sa.select(F.id).order_by(sa.func.coalesce(F.gate, "a", type_=F.gate.type)), "ORDER BY"),
    (sa.select(F.id).order_by(F.code), "ORDER BY"),
    (sa.select(F.id).order_by(F.code.collate("C")), "ORDER BY"),
    (sa.select(O.id).order_by(O.loose.collate("C")), "ORDER BY"),
    *((sa.select(O.id).order_by(column), "ORDER BY") for column in list(O)[1:9]),
    (sa.select(O.id).order_by(O.variant), "ORDER BY"),
    (sa.select(O.id).order_by(func.lower(O.period)), "ORDER BY"),
    (sa.select(O.id).order_by(func.date_trunc("day", O.wait)), "ORDER BY"),
    *((sa.select(column).group_by(column), "GROUP BY") for column in list(O)[1:9]),
    (sa.select(O.id).order_by(F.id), "FROM"),
    (sa.select(F).options(orm.joinedload(F.legs)).join(F.legs).limit(3), "LIMIT"),
]


@pytest.mark.parametrize(
    ("statement", "clause"),
    REFUSED,
    ids=[f"{number}-{clause}" for number, (_, clause) in enumerate(REFUSED)],
)
def test_what_has_no_exact_merge_is_refused_by_name(statement: Any, clause: str) -> None:
    with pytest.raises(CrossShardRefused) as caught:
        analyse(statement, text_order=TextOrder(True))

    assert caught.value.clause == clause
    assert str(caught.value).startswith(f"{clause}: ")


def test_whether_something_was_before_now_is_a_fact_of_a_row() -> None:
    """As in WHERE: what is late is counted by the clock of its shard."""
    is_late = sa.case((sa.func.to_timestamp(F.delay) < func.now(), "late"), else_="in time")
    statement = sa.select(func.count()).select_from(F).group_by(is_late)

    assert analyse(statement, text_order=TextOrder(True)).grouping is not None


def test_a_refusal_names_the_expression_its_type_and_the_way_out() -> None:
    with pytest.raises(CrossShardRefused) as caught:
        analyse(sa.select(F.id).order_by(F.dest), text_order=TextOrder(True))

    assert str(caught.value) == (
        "ORDER BY: flights.dest (String(collation='de_DE')): its collation does not order by code "
        'point; add .collate("C")'
    )
