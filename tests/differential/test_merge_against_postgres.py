"""The merge of several parts of a table is, to the digit, what PostgreSQL says of the whole table.

One server holds the rows twice: in schema ``whole``, and dealt at random to ``part_0`` to
``part_2``. Each statement runs on the whole, and rewritten on every part.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import orm
from sqlalchemy.ext.hybrid import hybrid_property

from sqlroute.local.node import LocalNode
from sqlroute.routing.merge import merge
from sqlroute.routing.rewrite import rewrite

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

PARTS = 3
SCHEMAS = ("whole", *(f"part_{number}" for number in range(PARTS)))
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Lowered(sa.types.TypeDecorator[str]):
    """Text that Python sees reversed: its order in Python is not that of the database."""

    impl = sa.Text(collation="C")
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]


class Base(orm.DeclarativeBase):
    pass


class Wide(Base):
    __tablename__ = "wide"

    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, primary_key=True)
    big: orm.Mapped[int | None] = orm.mapped_column(sa.BigInteger)
    whole: orm.Mapped[int | None] = orm.mapped_column(sa.Integer)
    small: orm.Mapped[int | None] = orm.mapped_column(sa.SmallInteger)
    exact: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric)
    price: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric(12, 2))
    lossy: orm.Mapped[float | None] = orm.mapped_column(sa.Numeric(30, 18, asdecimal=False))
    real: orm.Mapped[float | None] = orm.mapped_column(sa.Double)
    text: orm.Mapped[str | None] = orm.mapped_column(sa.Text(collation="C"))
    mirror: orm.Mapped[str | None] = orm.mapped_column(Lowered)
    day: orm.Mapped[dt.date | None] = orm.mapped_column(sa.Date)
    clock: orm.Mapped[dt.time | None] = orm.mapped_column(sa.Time)
    naive: orm.Mapped[dt.datetime | None] = orm.mapped_column(sa.DateTime)
    moment: orm.Mapped[dt.datetime | None] = orm.mapped_column(sa.DateTime(timezone=True))
    flag: orm.Mapped[bool | None] = orm.mapped_column(sa.Boolean)
    key: orm.Mapped[uuid.UUID | None] = orm.mapped_column(sa.Uuid)
    blob: orm.Mapped[bytes | None] = orm.mapped_column(sa.LargeBinary)

    notes: orm.Mapped[list[Note]] = orm.relationship(order_by="Note.id")

    @hybrid_property
    def doubled(self) -> Any:
        return self.small * 2  # type: ignore[operator]


class Note(Base):
    __tablename__ = "note"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    wide_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("wide.id"))


W = Wide.__table__.c
EPOCH = dt.datetime(2024, 11, 3, 4, 0)  # clocks in New York go back at 06:00 UTC

decimals = st.one_of(
    st.sampled_from([Decimal(text) for text in ("NaN", "Infinity", "-Infinity", "0", "0.00")]),
    st.sampled_from([Decimal(text) for text in ("1.0", "1.00", "-1", "9999", "10000", "1e-30")]),
    st.decimals(-(10**6), 10**6, allow_nan=False, places=4),
    st.builds(
        lambda digits, exponent: Decimal((0, digits, exponent)),
        st.lists(st.integers(0, 9), min_size=1, max_size=60).map(tuple),
        st.integers(-40, 0),
    ),
)
INFINITE = [float("nan"), float("inf"), float("-inf")]
UNUSUAL = ("nan", "inf", "-inf", "infinity", "-infinity")
TEXTS = ["", "a", "A", "B", "a b", "ab", "_x", "é", "z", "10", "9", "ﬀ", "😀", "日"]
EXACT = ["NaN", "Infinity", "-Infinity", "0", "0.00", "1.0", "1.00", "-1", "2", "3", "7"]
EXACT += ["9999", "10000", "9999.9999", "1e-30", "0.010", "12345678901234567890"]
EXACT += ["-99999999999999999999.5", "333333333333333333333333333333.3"]
POOLS: dict[str, list[Any]] = {
    "big": [*range(-3, 4), 2**60, -(2**60), 2**60 + 1],
    "whole": [*range(-3, 4), 2**31 - 1, -(2**31)],
    "small": [*range(-3, 4)],
    "exact": [Decimal(text) for text in EXACT],
    "price": [Decimal(text) for text in ("0.00", "1.10", "2.25", "-7.03", "999.99")],
    "lossy": [Decimal("0.1"), *(Decimal("0.1") + Decimal(n) / 10**18 for n in range(1, 6))],
    "real": [*INFINITE, *(n / 4 for n in range(-6, 7))],
    "text": TEXTS,
    "mirror": TEXTS,
    "day": [dt.date(2024, 2, 28) + dt.timedelta(days=n) for n in range(4)],
    "clock": [dt.time(n, 0, 0, n) for n in range(4)],
    "naive": [EPOCH + dt.timedelta(minutes=30 * n) for n in range(7)],
    "moment": [(EPOCH + dt.timedelta(minutes=20 * n)).replace(tzinfo=dt.UTC) for n in range(3, 10)],
    "flag": [True, False],
    "key": [uuid.UUID(int=n << 120 | n) for n in (0, 1, 127, 128, 255)],
    "blob": [b"", b"a", b"\xff", b"\x00", b"ab"],
}
COLUMNS = tuple(POOLS)
NUMBERS = ("big", "whole", "small", "exact", "price", "lossy", "real")


def table(size: int, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """Make rows with many ties, each with the part it goes to; the same for the same arguments."""
    random = Random(seed)
    null_share = random.choice([0.0, 0.15, 0.6])
    shares = random.choice([(1, 1, 1), (8, 1, 1), (1, 0, 0)])
    ordinary = random.random() < 0.5  # no NaN and no Infinity, which hide other sums
    rows = []
    for part in random.choices(range(PARTS), shares, k=size):
        values = {name: random.choice(pool) for name, pool in POOLS.items()}
        for name, value in values.items():
            if random.random() < null_share or (ordinary and str(value).lower() in UNUSUAL):
                values[name] = None
        rows.append((part, values))
    return rows


tables = st.builds(table, st.integers(0, 24), st.integers(0, 2**32))
directions = st.sampled_from(
    [
        lambda c: c,
        lambda c: c.desc(),
        lambda c: c.asc().nulls_first(),
        lambda c: c.desc().nulls_last(),
    ]
)


@dataclass
class Judge:
    """A connection, and the two ways to answer a statement on it."""

    connection: sa.Connection

    def load(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        table: Any = Wide.__table__
        notes: Any = Note.__table__
        self.connection.rollback()  # the rows of the last example were never committed
        for number, (part, values) in enumerate(rows):
            values["lossy"] = (
                values["lossy"] if values["lossy"] is None else Decimal(values["lossy"])
            )
            for schema in ("whole", f"part_{part}"):
                self._run(sa.insert(table), schema, {"id": number, **values})
                for note in range(number % 3):
                    values_of_note = {"id": number * 10 + note, "wide_id": number}
                    self._run(sa.insert(notes), schema, values_of_note)

    def expected(self, statement: Any, parameters: Any = None) -> tuple[list[str], list[Any]]:
        result = self._run(statement, "whole", parameters)
        return list(result.keys()), list(result)

    def merged(self, statement: Any, parameters: Any = None) -> tuple[list[str], list[Any]]:
        found = rewrite(statement, text_order_is_code_point=False, parameters=parameters)
        parts = [
            self._run(found.statement, f"part_{number}", parameters) for number in range(PARTS)
        ]
        keys = list(parts[0].keys())
        visible = keys[: len(keys) - found.spec.hidden]
        return visible, list(merge(parts, found.spec))

    def _run(self, statement: Any, schema: str, parameters: Any) -> sa.Result[Any]:
        options = {"schema_translate_map": {None: schema}}
        return self.connection.execute(statement, parameters, execution_options=options)


@pytest.fixture(scope="module")
def engine(sqlroute_single: LocalNode) -> Iterator[sa.Engine]:
    info = sqlroute_single.conninfo
    url = sa.URL.create(
        "postgresql+psycopg",
        username=info["user"],
        password=info["password"],
        host=info["host"],
        port=info["port"],
        database=info["dbname"],
        query={"options": "-c timezone=America/New_York"},
    )
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for schema in SCHEMAS:
            connection.execute(sa.text(f"drop schema if exists {schema} cascade"))
            connection.execute(sa.text(f"create schema {schema}"))
            options = {"schema_translate_map": {None: schema}}
            Base.metadata.create_all(connection.execution_options(**options))
    yield engine
    with engine.begin() as connection:
        for schema in SCHEMAS:
            connection.execute(sa.text(f"drop schema {schema} cascade"))
    engine.dispose()


@pytest.fixture
def judge(engine: sa.Engine) -> Iterator[Judge]:
    with engine.connect() as connection:
        yield Judge(connection)
        connection.rollback()


def exactly(value: Any) -> Any:
    """Type and digits: Decimals by their text, NaN equal to itself."""
    return type(value).__name__, repr(value)


def by_value(value: Any) -> Any:
    """For the representative of equal values (1.0 and 1.00), which PostgreSQL leaves open."""
    if isinstance(value, Decimal) and value.is_finite():
        return "Decimal", value
    return exactly(value)


def shown(rows: list[Any], how: tuple[Callable[[Any], Any], ...] = ()) -> list[Any]:
    return [
        tuple(
            (how[index] if index < len(how) else exactly)(value) for index, value in enumerate(row)
        )
        for row in rows
    ]


@EXAMPLES
@given(st.data(), tables)
def test_ordered_rows_come_as_from_one_server(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    terms = data.draw(st.lists(st.tuples(st.sampled_from(COLUMNS), directions), max_size=3))
    selected = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4, unique=True))
    limit = data.draw(st.none() | st.integers(0, 9))
    offset = data.draw(st.none() | st.integers(0, 9))
    statement = sa.select(*(W[name] for name in selected))
    statement = statement.order_by(*(turn(W[name]) for name, turn in terms), W.id)
    statement = statement.limit(limit).offset(offset)

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


@EXAMPLES
@given(st.data(), tables)
def test_rows_in_an_order_with_ties_are_the_same_and_sorted(
    judge: Judge, data: Any, rows: Any
) -> None:
    judge.load(rows)
    name, turn = data.draw(st.sampled_from(COLUMNS)), data.draw(directions)
    statement = sa.select(W[name], W.id).order_by(turn(W[name]))

    merged, expected = judge.merged(statement)[1], judge.expected(statement)[1]

    assert Counter(shown(merged)) == Counter(shown(expected))
    order_of = [by_value(row[0]) for row in merged]
    assert order_of == [by_value(row[0]) for row in expected]


EXPRESSIONS: tuple[Any, ...] = (
    W.whole % 2,
    -W.small,
    sa.func.abs(W.exact),
    sa.case((W.flag, W.small), else_=0),
    W.text.is_(None),
    sa.func.length(W.text),
    sa.func.lower(W.text).collate("C"),
    sa.func.coalesce(W.real, 0.5),
    sa.func.date_trunc("hour", W.moment),
    sa.cast(W.naive, sa.Date),
    sa.extract("day", W.day),
    W.mirror,
    W.lossy,
)


@EXAMPLES
@given(st.data(), tables)
def test_order_by_expressions_and_labels(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    expression, turn = data.draw(st.sampled_from(EXPRESSIONS)), data.draw(directions)
    label = expression.label("sorted_by")
    how = data.draw(st.sampled_from(["expression", "label", "name"]))
    statement = sa.select(W.id, W.mirror) if how == "expression" else sa.select(W.id, label)
    term = {"expression": expression, "label": label, "name": None}[how]
    if term is None:
        statement = statement.order_by(sa.desc("sorted_by"), "id")
    else:
        statement = statement.order_by(turn(term), W.id)
    statement = statement.limit(sa.bindparam("n")).offset(sa.bindparam("skip"))
    parameters = {
        "n": data.draw(st.none() | st.integers(0, 5)),
        "skip": data.draw(st.integers(0, 3)),
    }

    merged = judge.merged(statement, parameters)
    expected = judge.expected(statement, parameters)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


def _aggregates(data: Any) -> list[tuple[Any, Callable[[Any], Any]]]:
    """Draw aggregates with the way their results compare."""
    found: list[tuple[Any, Callable[[Any], Any]]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["*", "count", "sum", "avg", "min", "max"]))
        names = NUMBERS if kind in ("sum", "avg") else COLUMNS
        if kind in ("min", "max"):  # PostgreSQL has no min(boolean); of uuid and bytea since 18
            names = tuple(n for n in COLUMNS if n not in ("flag", "key", "blob"))
        column = W[data.draw(st.sampled_from(names))]
        call: Any = sa.func.count() if kind == "*" else getattr(sa.func, kind)(column)
        if data.draw(st.integers(0, 4)) == 0:
            call = call.filter(W.small > data.draw(st.integers(-2, 2)))
        found.append((call, by_value if kind in ("min", "max") else exactly))
    return found


@EXAMPLES
@given(st.data(), tables)
def test_aggregates_without_group_by_are_one_exact_row(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    calls = _aggregates(data)
    statement = sa.select(*(call for call, _ in calls)).select_from(Wide.__table__)

    merged, expected = judge.merged(statement), judge.expected(statement)

    how = tuple(how for _, how in calls)
    assert merged[0] == expected[0]
    assert shown(merged[1], how) == shown(expected[1], how)


GROUP_KEYS: tuple[Any, ...] = (
    *(W[name] for name in COLUMNS),
    W.whole % 2,
    sa.func.lower(W.text, type_=sa.Text),
    sa.func.date_trunc("hour", W.moment),
    W.small.is_(None),
)


@EXAMPLES
@given(st.data(), tables)
def test_groups_are_those_of_one_server(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    keys = data.draw(st.lists(st.sampled_from(GROUP_KEYS), min_size=1, max_size=2))
    shown_keys = keys[: data.draw(st.integers(0, len(keys)))]
    calls = _aggregates(data)
    statement = sa.select(*shown_keys, *(call for call, _ in calls))
    statement = statement.select_from(Wide.__table__).group_by(*keys)

    merged, expected = judge.merged(statement), judge.expected(statement)

    how = (*(by_value for _ in shown_keys), *(how for _, how in calls))
    assert merged[0] == expected[0]
    assert Counter(shown(merged[1], how)) == Counter(shown(expected[1], how))


@EXAMPLES
@given(st.data(), tables)
def test_ordered_groups_with_limit(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    key = W[data.draw(st.sampled_from(["small", "text", "moment", "real", "mirror", "flag"]))]
    call, how = _aggregates(data)[0]
    total = sa.func.avg(W.exact).label("middle")
    turn = data.draw(directions)
    ways: list[list[Any]] = [
        [turn(call), turn(key)],
        [turn(key)],
        [sa.desc("middle"), key],
        [turn(sa.func.sum(W.real)), turn(sa.func.max(W.text)), key],
    ]
    statement = (
        sa.select(key, call, total).group_by(key).order_by(*data.draw(st.sampled_from(ways)))
    )
    statement = statement.limit(data.draw(st.none() | st.integers(0, 6)))
    statement = statement.offset(data.draw(st.none() | st.integers(0, 3)))

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1], (exactly, how)) == shown(expected[1], (exactly, how))


@settings(EXAMPLES, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, PARTS - 1), decimals), max_size=8))
def test_avg_and_sum_of_numeric_have_the_digits_of_postgres(judge: Judge, values: Any) -> None:
    empty = dict.fromkeys(COLUMNS)
    judge.load([(part, {**empty, "exact": value}) for part, value in values])
    statement = sa.select(sa.func.avg(W.exact), sa.func.sum(W.exact), sa.func.count(W.exact))

    assert shown(judge.merged(statement)[1]) == shown(judge.expected(statement)[1])


@pytest.mark.parametrize(
    "declared",
    [sa.Float(), sa.Numeric(), sa.Numeric(asdecimal=False), sa.Float(asdecimal=True), sa.Integer()],
    ids=repr,
)
@pytest.mark.parametrize("column", ["whole", "big", "exact", "price", "lossy", "real"])
def test_declared_result_types_convert_as_sqlalchemy_does(
    judge: Judge, declared: Any, column: str
) -> None:
    empty = dict.fromkeys(COLUMNS)
    judge.load([(n % PARTS, {**empty, column: n}) for n in (1, 2, 4, 4)])
    statement = sa.select(
        sa.func.avg(W[column], type_=declared),
        sa.type_coerce(sa.func.sum(W[column]), declared),
        sa.func.sum(W[column]),
    )

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


def _orm_rows(judge: Judge, statement: Any, shard: str) -> tuple[Any, Any]:
    """Run an ORM statement in a session of its own; return it with its unique result."""
    judge.connection.execution_options(schema_translate_map={None: shard})  # for lazy loads too
    session = orm.Session(judge.connection, join_transaction_mode="create_savepoint")
    return session, session.execute(statement)


ENTITY_STATEMENTS: tuple[Any, ...] = (
    sa.select(Wide).order_by(Wide.text.desc(), Wide.id).limit(4),
    sa.select(Wide).options(orm.joinedload(Wide.notes)).order_by(Wide.whole, Wide.id).limit(3),
    sa.select(Wide).options(orm.joinedload(Wide.notes)).order_by(Wide.small.desc(), Wide.id),
    sa.select(Wide).options(orm.selectinload(Wide.notes)).order_by(Wide.real, Wide.id).offset(2),
    sa.select(Wide)
    .options(orm.joinedload(Wide.notes))
    .order_by(sa.func.abs(Wide.small - 1), Wide.mirror, Wide.id.desc())
    .limit(5)
    .offset(1),
    sa.select(Wide, Wide.mirror).order_by(Wide.doubled, Wide.mirror.desc(), Wide.id).limit(4),
    sa.select(Wide.small, orm.Bundle("pair", Wide.id, Wide.text)).order_by(Wide.small, Wide.id),
    sa.select(Wide.id, Note.id).join(Wide.notes).order_by(Note.id.desc()).limit(6),
    sa.select(Wide.flag, sa.func.count(Note.id), sa.func.avg(Wide.whole))
    .join(Wide.notes)
    .group_by(Wide.flag)
    .order_by(sa.func.count(Note.id), Wide.flag),
    sa.select(Wide, sa.func.count(Note.id))
    .outerjoin(Wide.notes)
    .group_by(*Wide.__table__.c)
    .order_by(sa.func.count(Note.id).desc(), Wide.id)
    .limit(4),
)


@pytest.mark.parametrize("number", range(len(ENTITY_STATEMENTS)))
@settings(EXAMPLES, max_examples=15)
@given(rows=tables)
def test_entities_are_those_of_one_server(judge: Judge, number: int, rows: Any) -> None:
    judge.load(rows)
    statement = ENTITY_STATEMENTS[number]

    def told(row: Any) -> list[Any]:
        return [
            (value.id, value.mirror, [note.id for note in value.notes])
            if isinstance(value, Wide)
            else tuple(map(exactly, value))
            if isinstance(value, tuple)
            else exactly(value)
            for value in row
        ]

    whole, result = _orm_rows(judge, statement, "whole")
    with whole:
        expected_keys = list(result.keys())
        expected = [told(row) for row in result.unique()]
    found = rewrite(statement, text_order_is_code_point=False)
    parts, keys = [], []
    for part in range(PARTS):
        session, result = _orm_rows(judge, found.statement, f"part_{part}")
        with session:
            keys = list(result.keys())
            one = list(result.unique())
            for values in one:
                told(values)  # loads the collections while the session is open
            parts.append(one)

    merged = [told(values) for values in merge(parts, found.spec)]

    assert keys[: len(keys) - found.spec.hidden] == expected_keys
    assert merged == expected


def test_a_sum_beyond_bigint_is_an_error_as_in_postgres(judge: Judge) -> None:
    statement = sa.select(sa.func.sum(W.whole))
    found = rewrite(statement, text_order_is_code_point=False)

    with pytest.raises(Exception, match="bigint out of range"):
        list(merge([[(2**62,)], [(2**62,)]], found.spec))
    with pytest.raises(sa.exc.DBAPIError, match="bigint out of range"):
        judge.connection.execute(sa.text(f"select {2**62} + {2**62}"))


def test_the_shape_is_compiled_once_for_all_limits(judge: Judge) -> None:
    """Another LIMIT, OFFSET or value of the same shape hits SQLAlchemy's compiled cache."""

    def key_of(limit: int, value: int) -> Any:
        statement = sa.select(W.id).where(W.small > value).order_by(W.text).limit(limit).offset(1)
        rewritten = rewrite(statement, text_order_is_code_point=False).statement
        key = rewritten._generate_cache_key()
        assert key is not None
        return key.key

    assert key_of(3, 1) == key_of(7, 2)
