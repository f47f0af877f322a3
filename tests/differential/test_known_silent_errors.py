"""What other routers get wrong without a word, each by its name.

Every case is a statement that is known to be answered wrongly somewhere: by a proxy that merges
less than it is asked for, or by putting the shards' rows one after the other. The rows are dealt so
that this shows: what a naive merge says differs from what one PostgreSQL says, and we say the same
as PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import func, orm, select
from sqlalchemy.dialects.postgresql import distinct_on

from sqlroute import CrossShardRefused, Router, sharded_by
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

metadata = sa.MetaData()
flights = sa.Table(
    "silent_flight",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("origin", sa.Text),
    sa.Column("delay", sa.Integer),
    sa.Column("price", sa.Numeric(10, 2)),
    sa.Column("label", sa.Text),
    **sharded_by("id"),
)
F = flights.c
SHARDS = ("s0", "s1")
ORIGINS = ("JFK", "LGA", "EWR")


@dataclass
class Sides:
    """The shards, the judge, and the naive way."""

    router: Router
    engine: sa.Engine

    def one_server(self, statement: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    def shards(self, statement: Any) -> list[Any]:
        with self.router.sessionmaker()() as session:
            return [tuple(row) for row in session.execute(statement)]

    def naive(self, statement: Any) -> list[Any]:
        """Put the shards' own answers one after the other."""
        found: list[Any] = []
        with self.router.sessionmaker()() as session:
            for shard in SHARDS:
                named = statement.execution_options(sqlroute_shard=shard)
                found += [tuple(row) for row in session.execute(named)]
        return found

    def check(self, statement: Any) -> None:
        """Assert that we answer as one server does, where a naive merge would not."""
        expected = self.one_server(statement)
        assert self.shards(statement) == expected
        assert self.naive(statement) != expected, "the rows do not show the error"


@pytest.fixture(scope="module")
def sides(sqlroute_topology: LocalTopology, sqlroute_single: LocalNode) -> Iterator[Sides]:
    url = sa.make_url(sqlroute_single.url.split("?")[0]).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url)
    rows = [
        {
            "id": n,
            "origin": ORIGINS[n % 3],
            "delay": None if n % 5 == 0 else (n * 7) % 13,
            "price": Decimal(n % 7) + Decimal("0.25"),
            "label": str(n),
        }
        for n in range(1, 31)
    ]
    with Router.from_config(sqlroute_topology.config_path) as router:
        router.drop_all(metadata)
        router.create_all(metadata)
        metadata.drop_all(engine)
        metadata.create_all(engine)
        for make in (router.sessionmaker(), orm.sessionmaker(engine)):
            with make() as session:
                session.execute(sa.insert(flights), rows)
                session.commit()
        yield Sides(router, engine)
        router.drop_all(metadata)
        metadata.drop_all(engine)
    engine.dispose()


def test_order_by_a_column_that_is_not_selected(sides: Sides) -> None:
    """PgDog leaves the rows unsorted (its issue 1135)."""
    sides.check(select(F.id).order_by(F.price, F.id))


def test_order_by_an_expression(sides: Sides) -> None:
    """PgDog leaves the rows unsorted."""
    sides.check(select(F.id).order_by(F.id % 7, F.id))


@pytest.mark.parametrize("turned", [F.delay.nulls_first(), F.delay.desc().nulls_last()])
def test_nulls_first_and_last_are_kept(sides: Sides, turned: Any) -> None:
    """PgDog ignores them."""
    sides.check(select(F.delay, F.id).order_by(turned, F.id))


def test_numbers_are_not_sorted_as_text(sides: Sides) -> None:
    """SPQR compares every sort value with the operator of text: 10 before 9."""
    sides.check(select(F.id).order_by(F.id))
    assert sides.shards(select(F.id).order_by(F.id))[8:10] == [(9,), (10,)]


def test_text_is_not_sorted_as_numbers(sides: Sides) -> None:
    sides.check(select(F.label).order_by(F.label))


def test_text_of_another_collation_is_refused(sides: Sides) -> None:
    """PgDog and SPQR compare bytes, whatever the collation."""
    with pytest.raises(CrossShardRefused, match=r'add \.collate\("C"\)'):
        sides.shards(select(F.id).order_by(F.label.collate("en-x-icu")))


def test_a_limit_counts_rows_of_all_shards(sides: Sides) -> None:
    """SQLAlchemy's ShardedSession gives LIMIT rows of each."""
    sides.check(select(F.id).order_by(F.id).limit(4))


def test_an_offset_counts_rows_of_all_shards(sides: Sides) -> None:
    """Pushed to the shards as it is, it skips rows of each."""
    sides.check(select(F.id).order_by(F.id).limit(4).offset(5))
    sides.check(select(F.id).order_by(F.id).offset(28))


def test_ties_are_ties_of_all_shards(sides: Sides) -> None:
    sides.check(select(F.price).order_by(F.price).fetch(5, with_ties=True))


def test_distinct_rows_are_distinct_over_all_shards(sides: Sides) -> None:
    """SPQR has no DISTINCT across shards; concatenation repeats."""
    sides.check(select(F.origin).distinct().order_by(F.origin))


def test_distinct_on_chooses_the_first_of_all_shards(sides: Sides) -> None:
    sides.check(select(F.origin, F.id).ext(distinct_on(F.origin)).order_by(F.origin, F.price, F.id))


def test_counts_and_sums_are_of_all_shards(sides: Sides) -> None:
    """SQLAlchemy's ShardedSession gives one row for each shard."""
    sides.check(select(func.count(), func.sum(F.delay), func.min(F.label), func.max(F.price)))


def test_an_average_is_no_average_of_averages(sides: Sides) -> None:
    sides.check(select(func.avg(F.delay)))
    sides.check(select(F.origin, func.avg(F.price)).group_by(F.origin).order_by(F.origin))


def test_deviations_are_exact(sides: Sides) -> None:
    """PgDog's documentation calls its own an approximation."""
    sides.check(select(func.stddev(F.price), func.var_pop(F.delay), func.variance(F.id)))


def test_lists_keep_their_order_over_all_shards(sides: Sides) -> None:
    """PgDog refuses array_agg; the shards' lists one after the other are not in order."""
    sides.check(
        select(
            func.array_agg(F.id).aggregate_order_by(F.price, F.id),
            func.string_agg(F.label, "+").aggregate_order_by(F.delay.desc(), F.id),
        )
    )


def test_group_by_an_expression(sides: Sides) -> None:
    """PgDog leaves the shards' groups as they are."""
    parity = (F.id % 3).label("parity")
    sides.check(select(parity, func.count()).group_by("parity").order_by("parity"))


def test_having_is_of_whole_groups(sides: Sides) -> None:
    """PgDog lets each shard filter its part of a group (its issue 695)."""
    counted = select(F.origin, func.count()).group_by(F.origin).order_by(F.origin)
    sides.check(counted.having(func.count() >= 10))
    sides.check(counted.having(func.sum(F.delay) > 40, func.min(F.id) < 3))


def test_groups_are_ordered_by_their_whole_aggregate(sides: Sides) -> None:
    summed = select(F.origin).group_by(F.origin)
    sides.check(summed.order_by(func.sum(F.delay).desc(), F.origin).limit(2))


def test_a_limit_of_groups_is_not_pushed(sides: Sides) -> None:
    """A shard's first groups are not the first groups."""
    prices = select(F.price, func.count()).group_by(F.price)
    sides.check(prices.order_by(func.count().desc(), F.price).limit(3))


def test_filter_of_an_aggregate_is_kept(sides: Sides) -> None:
    """PgDog does not look at it."""
    sides.check(select(func.count().filter(F.delay > 5), func.avg(F.delay).filter(F.id < 9)))


def test_arms_of_a_union_go_to_shards_of_their_own(sides: Sides) -> None:
    """PgDog sends all arms to the shard of the first key it meets."""
    keys = [key for (key,) in sides.naive(select(func.min(F.id)))]
    statement = sa.union(*(select(F.id).where(F.id == key) for key in keys))

    assert sorted(sides.shards(statement)) == sorted((key,) for key in keys)
    assert len(keys) == len(SHARDS)


def test_a_union_is_distinct_over_all_shards(sides: Sides) -> None:
    both = sa.union(select(F.origin).where(F.id < 20), select(F.origin).where(F.id > 10))
    sides.check(both.order_by("origin"))


def test_a_limit_of_a_set_operation_counts_all_arms_and_shards(sides: Sides) -> None:
    both = sa.union_all(select(F.id).where(F.id < 9), select(F.id).where(F.id > 20))
    sides.check(both.order_by("id").limit(5).offset(2))


@pytest.mark.parametrize("operation", [sa.except_, sa.intersect])
def test_other_set_operations_are_refused(sides: Sides, operation: Any) -> None:
    """Each shard's difference is not the difference: PgDog does not look at them."""
    statement = operation(select(F.origin).where(F.price > 1), select(F.origin).where(F.price < 2))
    with pytest.raises(CrossShardRefused):
        sides.shards(statement)


@pytest.mark.parametrize(
    "statement",
    [
        select(func.count(F.origin.distinct())),
        select(func.sum(F.delay.distinct())),
        select(F.id, func.rank().over(order_by=F.price)),
        select(F.id, func.sum(F.delay).over(partition_by=F.origin)),
        select(func.percentile_cont(0.5).within_group(F.delay)),
        select(F.origin, func.count()).group_by(func.rollup(F.origin)),
        select(func.mode().within_group(F.origin)),
        select(func.my_own_aggregate(F.delay)),
    ],
    ids=str,
)
def test_what_needs_rows_of_other_shards_is_refused(sides: Sides, statement: Any) -> None:
    """Windows, DISTINCT aggregates and percentiles: PgDog runs some of them shard by shard."""
    with pytest.raises(CrossShardRefused):
        sides.shards(statement)


def test_keys_are_distinct_over_all_shards_by_themselves(sides: Sides) -> None:
    """The one count(DISTINCT) that adds up: equal keys are on one shard."""
    sides.check(select(func.count(F.id.distinct())))
