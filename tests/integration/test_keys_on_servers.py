"""Keys decide where a statement runs; one PostgreSQL that holds all rows says what is right.

Each silent error that the peers of a sharding router are known for has a test that it is none here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import Ran, Shop
from models import Base, Country, Customer, Order, Reading, Setting
from sqlalchemy import func, orm, select

from sqlroute import RoutingSession

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
        names, rows = list(expected.keys()), [_plain(row) for row in expected.unique()]
        self.ran.clear()
        result = self.session.execute(statement, parameters)
        found = list(result.keys()), Counter(_plain(row) for row in result.unique())
        asked = sorted({node[:2] for node in self.ran.nodes})
        self.session.reset()
        self.judge.reset()

        assert found == (names, Counter(rows))
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
