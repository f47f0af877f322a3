"""A session over two shards answers, value for value, what one PostgreSQL with all rows answers.

Hypothesis makes the rows: NULLs, duplicates, negative keys, sometimes a shard without any. Both
sides get the same; then every kind of statement runs on both, with values drawn for it. The answer
is the same (in order where the order is total), or the statement is refused before it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, orm, select

from sqlroute import CrossShardRefused, Router, reference_table, sharded_by
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
QUERIES = 12
"""Statements for each set of rows: loading the rows is what takes the time."""


class Base(orm.DeclarativeBase):
    pass


class Region(Base):
    __tablename__ = "d_region"
    __table_args__ = reference_table()

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    label: orm.Mapped[str | None]


class User(Base):
    __tablename__ = "d_user"
    __table_args__ = sharded_by("id")

    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    region: orm.Mapped[int | None]
    age: orm.Mapped[int | None]
    balance: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric)
    name: orm.Mapped[str | None] = orm.mapped_column(sa.Text)

    items: orm.Mapped[list[Item]] = orm.relationship(
        primaryjoin="User.id == foreign(Item.user_id)", order_by="Item.n", viewonly=True
    )


class Item(Base):
    __tablename__ = "d_item"
    __table_args__ = sharded_by("user_id")

    user_id: orm.Mapped[int] = orm.mapped_column(
        sa.BigInteger, primary_key=True, autoincrement=False
    )
    n: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    price: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric(10, 2))
    flag: orm.Mapped[bool | None]


KEYS = (-9, -2, -1, 0, 1, 2, 3, 4, 5, 2**40, -(2**62))
keys = st.sampled_from(KEYS)
small = st.none() | st.integers(-2, 2)
amounts = st.none() | st.sampled_from(
    [Decimal(text) for text in ("0", "0.00", "1.5", "1.50", "-3", "NaN", "1e-12", "99999999999")]
)
prices = st.none() | st.sampled_from([Decimal(text) for text in ("0.00", "1.25", "-7.10")])
names = st.none() | st.sampled_from(["", "a", "A", "b", "é", "z"])
users = st.lists(
    st.fixed_dictionaries(
        {"id": keys, "region": small, "age": small, "balance": amounts, "name": names}
    ),
    unique_by=lambda row: row["id"],
    max_size=9,
)
items = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": keys,
            "n": st.integers(0, 3),
            "price": prices,
            "flag": st.none() | st.booleans(),
        }
    ),
    unique_by=lambda row: (row["user_id"], row["n"]),
    max_size=14,
)
REGIONS = [{"id": i, "label": None if i == 0 else f"r{i % 2}"} for i in (-1, 0, 1)]

bounds = st.fixed_dictionaries(
    {"limit": st.none() | st.integers(0, 6), "offset": st.none() | st.integers(0, 6)}
)
COLUMNS = (User.id, User.region, User.age, User.balance, User.name)
directions = st.sampled_from(
    [
        lambda c: c,
        lambda c: c.desc(),
        lambda c: c.nulls_first(),
        lambda c: c.desc().nulls_last(),
    ]
)
conditions = st.sampled_from(
    [
        User.age > 0,
        User.name.is_(None),
        User.balance >= 0,
        User.region.in_([0, 1, None]),
        User.age + 1 == User.region,
        sa.or_(User.age == 1, User.name == "a"),
        sa.true(),
        User.id.in_([1, 2, -9, 5]),
        User.id.in_([1]),
        User.id == 2,
        sa.and_(User.id == 2, User.id == 3),
        sa.or_(User.id == 2, User.id == 3),
        sa.or_(User.id == 2, User.age == 0),
        User.id > 0,
        sa.not_(User.id == 2),
        User.id.in_([]),
        User.id.not_in([1, 2]),
        sa.tuple_(User.id, User.age).in_([(1, 0), (2, 1)]),
    ]
)


Query = tuple[Any, bool]
"""A statement, and whether its order is total."""


@st.composite
def plain(draw: st.DrawFn) -> Query:
    """Rows of one table: columns or entities, filtered, ordered, cut."""
    chosen = draw(st.sampled_from([(User,), COLUMNS, (User.id, User.name), (User, User.age)]))
    statement = select(*chosen).where(draw(conditions))
    order = draw(st.lists(st.tuples(st.sampled_from(COLUMNS), directions), max_size=2))
    cut = draw(bounds)
    is_total = bool(order) or cut["limit"] is not None or cut["offset"] is not None
    if is_total:
        terms = [direction(column) for column, direction in order]
        statement = statement.order_by(*terms, User.id)
        statement = statement.limit(cut["limit"]).offset(cut["offset"])
    return statement, is_total


@st.composite
def aggregated(draw: st.DrawFn) -> Query:
    """count, sum, min, max and avg, with and without GROUP BY."""
    calls = [
        func.count(),
        func.count(User.age),
        func.sum(User.age),
        func.sum(User.balance),
        func.min(User.name),
        func.max(sa.cast(User.balance, sa.Numeric(30, 12))),  # else 0 and 0.00 tie
        func.avg(User.age),
        func.avg(User.balance),
        func.min(User.id),
        func.max(User.age).filter(User.region > 0),
    ]
    chosen = draw(st.lists(st.sampled_from(range(len(calls))), min_size=1, max_size=4, unique=True))
    columns = [calls[i].label(f"c{i}") for i in chosen]
    groups = draw(
        st.lists(st.sampled_from([User.region, User.name, User.age, User.age % 2]), max_size=2)
    )
    statement = select(*groups, *columns).where(draw(conditions))
    if not groups:
        return statement, True
    statement = statement.group_by(*groups)
    if draw(st.booleans()):
        return statement, False
    first = columns[0].desc().nulls_last()
    cut = draw(bounds)
    statement = statement.order_by(first, *groups)
    return statement.limit(cut["limit"]).offset(cut["offset"]), True


@st.composite
def joined(draw: st.DrawFn) -> Query:
    """Joins on the key, inner and outer, with a reference table, and EXISTS."""
    condition = draw(conditions)
    on_key = Item.user_id == User.id
    shapes: list[Any] = [
        select(User.id, Item.n, Item.price).join(Item, on_key),
        select(User.id, Item.n).outerjoin(Item, on_key),
        select(User.id, Item.n).outerjoin(Item, sa.and_(on_key, Item.flag)),
        select(User.id, Item.n).outerjoin(Item, sa.and_(on_key, User.id == 1)),
        select(User.id, Item.user_id, Item.n).join(Item, on_key, full=True),
        select(User.id, Region.label).join(Region, Region.id == User.region),
        select(User.id, Region.label).outerjoin(Region, Region.id == User.region),
        select(Region.id, User.id).outerjoin(User, Region.id == User.region),
        select(User.id).where(select(Item.n).where(on_key, Item.flag).exists()),
        select(User.id).where(~select(Item.n).where(on_key).exists()),
        select(User.id).where(User.id.in_(select(Item.user_id))),
        select(User.id).where(User.id.not_in(select(Item.user_id))),
        select(User.id, Item.n).where(on_key),
        select(User.id, select(func.count(Item.n)).where(on_key).scalar_subquery().label("c")),
        select(User.id, Item.n).join(Item, Item.n == User.age),
        select(Region.label, func.count(User.id))
        .join(User, Region.id == User.region)
        .group_by(Region.label),
        select(Region.label, func.count(Item.n))
        .select_from(Region)
        .join(User, User.region == Region.id)
        .join(Item, on_key)
        .group_by(Region.label),
        select(Region.label).where(select(User.id).where(User.region == Region.id).exists()),
        select(User).where(User.items.any(Item.price > 0)),
        select(User.id).union(select(Item.user_id)),
        select(User.age).distinct(),
        select(User.age, func.count()).group_by(User.age).having(func.count() > 1),
        select(User.id, func.row_number().over(order_by=User.id)),
        select(func.count(User.age.distinct())),
        select(select(User.id, User.age).where(User.age > 0).subquery()),
        select(func.count()).select_from(select(User.id).where(User.age > 0).subquery()),
        select(func.count()).select_from(select(User.id).limit(3).subquery()),
        select(User.id).where(User.age == select(func.max(User.age)).scalar_subquery()),
        select(select(User.id).where(condition).exists()),
        select(~select(Item.n).join(User, on_key).where(condition).exists()),
        select(select(User.age).group_by(User.age).where(condition).exists().label("any")),
        select(select(func.max(User.age)).where(condition).exists()),
        select(select(User.age).group_by(User.age).having(func.count() > 1).exists()),
        select(select(User.id).where(condition).offset(1).exists()),
    ]
    shape = draw(st.sampled_from(shapes))
    if isinstance(shape, sa.CompoundSelect) or User not in {
        d.get("entity") for d in shape.column_descriptions
    }:
        return shape, False
    if draw(st.booleans()):
        shape = shape.where(condition)
    return shape, False


@st.composite
def loaded(draw: st.DrawFn) -> Query:
    """Entities with their collections."""
    how = draw(st.sampled_from([orm.selectinload, orm.joinedload, orm.lazyload]))
    statement = select(User).where(draw(conditions)).options(how(User.items)).order_by(User.id)
    cut = draw(bounds)
    return statement.limit(cut["limit"]).offset(cut["offset"]), True


queries = st.lists(
    st.one_of(plain(), plain(), aggregated(), joined(), joined(), loaded()),
    min_size=QUERIES,
    max_size=QUERIES,
)

Sides = tuple[Router, sa.Engine]


@pytest.fixture(scope="module")
def sides(sqlroute_topology: LocalTopology, sqlroute_single: LocalNode) -> Iterator[Sides]:
    """The shards, and the judge."""
    url = sa.make_url(sqlroute_single.url.split("?")[0]).set(drivername="postgresql+psycopg")
    judge = sa.create_engine(url)
    with Router.from_config(sqlroute_topology.config_path) as router:
        router.create_all(Base.metadata)
        Base.metadata.drop_all(judge)
        Base.metadata.create_all(judge)
        with router.sessionmaker()() as session, orm.Session(judge) as plain_session:
            for side in (session, plain_session):
                for row in side.scalars(select(Region)):
                    side.delete(row)
                side.flush()
                side.add_all([Region(**row) for row in REGIONS])
                side.commit()
        yield router, judge
        router.drop_all(Base.metadata)
        Base.metadata.drop_all(judge)
    judge.dispose()


def store(session: Any, rows: Any, delete: Callable[[Any], None]) -> None:
    delete(session)
    for entity, found in zip((User, Item), rows, strict=True):
        if found:
            session.execute(sa.insert(entity), found)


def delete_on_shards(session: Any) -> None:
    for shard in ("s0", "s1"):
        for table in (User, Item):
            session.execute(sa.delete(table), execution_options={"sqlroute_shard": shard})


def delete_on_judge(session: Any) -> None:
    session.execute(sa.delete(User))
    session.execute(sa.delete(Item))


def answer(session: Any, statement: Any) -> tuple[list[str], list[Any]]:
    result = session.execute(statement)
    names = list(result.keys())
    return names, [tuple(map(shown, row)) for row in result.unique().all()]


def shown(value: Any) -> Any:
    """Return a value so that equal ones are equal in type and digits too."""
    if isinstance(value, User):
        return (
            *(shown(getattr(value, column.key)) for column in COLUMNS),
            tuple((item.n, shown(item.price), item.flag) for item in value.items),
        )
    return type(value).__name__, str(value)


@EXAMPLES
@given(
    data=st.tuples(users, items),
    lonely=st.booleans(),
    committed=st.booleans(),
    statements=queries,
)
def test_shards_answer_as_one_server(
    sides: Sides, data: Any, lonely: bool, committed: bool, statements: list[Query]
) -> None:
    """The same names, types, digits, NULLs and order; or a refusal before anything runs."""
    router, judge = sides
    if lonely:  # all on one shard, the other is empty
        table = User.__table__
        data = (
            [row for row in data[0] if router.locate(table, (row["id"],))[1] == "s0"],  # type: ignore[arg-type]
            [row for row in data[1] if router.locate(table, (row["user_id"],))[1] == "s0"],  # type: ignore[arg-type]
        )
    with (
        router.sessionmaker()() as session,
        orm.Session(judge) as plain_session,
    ):
        store(session, data, delete_on_shards)
        store(plain_session, data, delete_on_judge)
        if committed:
            session.commit()
            plain_session.commit()
        for statement, is_total in statements:
            names, expected = answer(plain_session, statement)
            try:
                found_names, found = answer(session, statement)
            except CrossShardRefused as refused:
                event(f"refused: {refused.clause}")
                continue
            event("answered")
            assert found_names == names, statement
            if is_total:
                assert found == expected, statement
            else:
                assert Counter(found) == Counter(expected), statement
            if committed:
                session.rollback()
            session.expunge_all()
            plain_session.expunge_all()
