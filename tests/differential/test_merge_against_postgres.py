"""The merge of several parts of a table is, to the digit, what PostgreSQL says of the whole table.

One server holds the rows twice: in schema ``whole``, and dealt at random to ``part_0`` to
``part_2``. Each statement runs on the whole, and rewritten on every part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import orm

from sqlroute.health import TextOrder
from sqlroute.local.node import LocalNode
from sqlroute.routing.merge import merge
from sqlroute.routing.rewrite import rewrite

from .wide import (
    COLUMNS,
    EXAMPLES,
    NUMBERS,
    PARTS,
    Judge,
    Note,
    W,
    Wide,
    by_value,
    decimals,
    directions,
    exactly,
    shown,
    tables,
    wide_engine,
)

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def engine(sqlroute_single: LocalNode) -> Iterator[sa.Engine]:
    yield from wide_engine(sqlroute_single)


@pytest.fixture
def judge(engine: sa.Engine) -> Iterator[Judge]:
    with engine.connect() as connection:
        yield Judge(connection)
        connection.rollback()


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
            names = tuple(n for n in COLUMNS if n not in ("flag", "key", "blob", "mood"))
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
    found = rewrite(statement, text_order=TextOrder(False))
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
    found = rewrite(statement, text_order=TextOrder(False))

    with pytest.raises(Exception, match="bigint out of range"):
        list(merge([[(2**62,)], [(2**62,)]], found.spec))
    with pytest.raises(sa.exc.DBAPIError, match="bigint out of range"):
        judge.connection.execute(sa.text(f"select {2**62} + {2**62}"))


def test_the_shape_is_compiled_once_for_all_limits(judge: Judge) -> None:
    """Another LIMIT, OFFSET or value of the same shape hits SQLAlchemy's compiled cache."""

    def key_of(limit: int, value: int) -> Any:
        statement = sa.select(W.id).where(W.small > value).order_by(W.text).limit(limit).offset(1)
        rewritten = rewrite(statement, text_order=TextOrder(False)).statement
        key = rewritten._generate_cache_key()
        assert key is not None
        return key.key

    assert key_of(3, 1) == key_of(7, 2)
