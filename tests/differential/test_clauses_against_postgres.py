"""DISTINCT, HAVING, ties, aggregates and odd types merge as one PostgreSQL answers.

As in ``test_merge_against_postgres`` each statement runs on the whole and, rewritten, on each part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on

from sqlroute.errors import CrossShardRefused
from sqlroute.local.node import LocalNode

from .wide import (
    COLUMNS,
    EXAMPLES,
    NUMBERS,
    Judge,
    W,
    Wide,
    by_value,
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


def nearly(value: Any) -> Any:
    """Of sums of floats the last digits hang on the order of the rows, on one server too."""
    if isinstance(value, float) and math.isfinite(value):
        return "float", float(f"{value:.9e}")
    return exactly(value)


bounds = st.none() | st.integers(0, 5)


@EXAMPLES
@given(st.data(), tables)
def test_distinct_rows_are_those_of_one_server(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    names = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3, unique=True))
    chosen = [W[name] for name in names]
    statement = sa.select(*chosen).distinct()
    ordered = data.draw(st.booleans())
    if ordered:
        terms = data.draw(st.permutations(chosen))
        statement = statement.order_by(*(data.draw(directions)(term) for term in terms))
        statement = statement.limit(data.draw(bounds)).offset(data.draw(bounds))

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    how = (by_value,) * len(names)
    if ordered:
        assert shown(merged[1], how) == shown(expected[1], how)
    else:
        assert Counter(shown(merged[1], how)) == Counter(shown(expected[1], how))


@EXAMPLES
@given(st.data(), tables)
def test_distinct_on_keeps_the_first_row_of_all_shards(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    names = data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=2, unique=True))
    keys = [W[name] for name in names]
    other = W[data.draw(st.sampled_from(COLUMNS))]
    terms = [data.draw(directions)(term) for term in (*data.draw(st.permutations(keys)), other)]
    statement = sa.select(W.id, other).ext(distinct_on(*keys)).order_by(*terms, W.id)
    statement = statement.limit(data.draw(bounds)).offset(data.draw(bounds))

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


@EXAMPLES
@given(st.data(), tables)
def test_rows_that_tie_are_fetched_with_the_last_one(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    name, turn = data.draw(st.sampled_from(COLUMNS)), data.draw(directions)
    statement = sa.select(W.id, W.whole).order_by(turn(W[name]))
    statement = statement.fetch(data.draw(st.integers(0, 6)), with_ties=True)
    offset = data.draw(st.integers(0, 3))
    statement = statement.offset(offset)

    merged, expected = judge.merged(statement), judge.expected(statement)

    if offset == 0:
        assert Counter(shown(merged[1])) == Counter(shown(expected[1]))
    else:  # which of the rows that tie at the first place are left out is open
        assert len(merged[1]) == len(expected[1])


def _of_one(name: str) -> Any:
    return lambda data: getattr(func, name)(W[data.draw(st.sampled_from(NUMBERS))])


def _of_pair(name: str) -> Any:
    pairs = st.tuples(*[st.sampled_from(("small", "real", "price"))] * 2)

    def drawn(data: Any) -> Any:
        one, other = data.draw(pairs)
        return getattr(func, name)(W[one], W[other])

    return drawn


SPREADS = ("stddev", "stddev_pop", "stddev_samp", "variance", "var_pop", "var_samp")
REGRESSIONS = [
    "covar_pop",
    "covar_samp",
    "corr",
    "regr_count",
    "regr_avgx",
    "regr_avgy",
    "regr_sxx",
    "regr_syy",
    "regr_sxy",
    "regr_r2",
    "regr_slope",
    "regr_intercept",
]
NOT_EXACT = [
    *((name, _of_one(name)) for name in SPREADS),
    *((name, _of_pair(name)) for name in REGRESSIONS),
]
ANY_ORDER = ("array_agg", "json_agg", "jsonb_agg")


@EXAMPLES
@given(st.data(), tables)
def test_variances_and_regressions(judge: Judge, data: Any, rows: Any) -> None:
    """To the digit of whole and exact numbers; of floats but for the last digits."""
    judge.load(rows)
    calls = [data.draw(st.sampled_from(NOT_EXACT))[1](data) for _ in range(3)]
    if data.draw(st.booleans()):
        calls[0] = calls[0].filter(W.small > data.draw(st.integers(-2, 2)))
    keys = [W[data.draw(st.sampled_from(("flag", "small")))]] if data.draw(st.booleans()) else []
    statement = sa.select(*keys, *calls).select_from(Wide.__table__).group_by(*keys).order_by(*keys)

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1], (nearly,) * 4) == shown(expected[1], (nearly,) * 4)


BOOLEANS: tuple[Any, ...] = (
    func.bool_and(W.flag),
    func.bool_or(W.flag),
    func.every(W.small > 0),
    func.bit_and(W.whole),
    func.bit_or(W.big),
    func.bit_xor(W.small),
    func.bool_or(W.text.is_(None)).filter(W.flag),
)
LISTS: tuple[Any, ...] = (
    func.array_agg(W.id).aggregate_order_by(W.exact.desc().nulls_last(), W.id),
    func.array_agg(W.text).aggregate_order_by(W.text, W.id),
    func.array_agg(aggregate_order_by(W.moment, W.small.desc(), W.id)),
    func.array_agg(W.price).aggregate_order_by(W.id).filter(W.small > 0),
    func.string_agg(W.text, ", ").aggregate_order_by(W.id.desc()),
    func.string_agg(W.text, aggregate_order_by(sa.literal(""), W.text, W.id)),
    func.aggregate_strings(W.text, "|").aggregate_order_by(W.real, W.id),
    func.json_agg(W.big).aggregate_order_by(W.text.desc(), W.id),
    func.jsonb_agg(W.day).aggregate_order_by(W.clock.nulls_first(), W.id),
    func.json_object_agg(W.id, W.text).aggregate_order_by(W.id.desc()),
    func.jsonb_object_agg(W.whole, W.id).aggregate_order_by(W.id).filter(W.whole.is_not(None)),
)


@EXAMPLES
@given(st.data(), tables)
def test_booleans_bits_and_lists(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    calls = data.draw(st.lists(st.sampled_from((*BOOLEANS, *LISTS)), min_size=1, max_size=3))
    keys = [W[data.draw(st.sampled_from(("flag", "small")))]] if data.draw(st.booleans()) else []
    labelled = [call.label(f"c{number}") for number, call in enumerate(calls)]
    statement = sa.select(*keys, *labelled).select_from(Wide.__table__)
    statement = statement.group_by(*keys).order_by(*keys)

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


@pytest.mark.parametrize("name", ANY_ORDER)
@settings(EXAMPLES, max_examples=10)
@given(rows=tables)
def test_lists_without_an_order_hold_the_same_values(judge: Judge, name: str, rows: Any) -> None:
    judge.load(rows)
    statement = sa.select(W.flag, getattr(func, name)(W.whole)).group_by(W.flag).order_by(W.flag)

    merged, expected = judge.merged(statement)[1], judge.expected(statement)[1]

    assert [(row[0], Counter(row[1])) for row in merged] == [
        (row[0], Counter(row[1])) for row in expected
    ]


def _conditions(data: Any) -> Any:
    """Draw a condition over groups by ``small``."""
    number = data.draw(st.integers(-2, 6))
    total, low = func.sum(W.whole), func.min(W.text)
    found = [
        func.count() > number,
        func.count(W.text) <= number,
        func.count().in_([1, 3, number]),
        func.count().not_in([2, number]),
        func.count().between(2, number),
        ~func.count().between(1, number),
        func.avg(W.exact) >= number,
        func.avg(W.real) != 0.5,
        total.is_(None),
        func.max(W.real).is_not(None),
        low > data.draw(st.sampled_from(["", "a", "é"])),
        low.is_distinct_from(func.max(W.text)),
        func.coalesce(total, 0) < number,
        total + func.count() * 2 > number,
        func.bool_and(W.flag),
        func.bool_or(W.flag).is_(True),
        func.max(W.day) == W.day.type.python_type(2024, 2, 29),
        W.small > number - 3,
        W.small.is_(None),
        func.max(W.small) == W.small,
        func.sum(W.big) > func.sum(W.small),
        func.count().filter(W.flag) == 1,
        sa.not_(func.count() > number),
    ]
    one, other = data.draw(st.sampled_from(found)), data.draw(st.sampled_from(found))
    return data.draw(st.sampled_from([one, sa.and_(one, other), sa.or_(one, other)]))


@settings(EXAMPLES, max_examples=150)
@given(st.data(), tables)
def test_having_is_decided_of_whole_groups(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    statement = sa.select(W.small, func.count().label("n")).group_by(W.small)
    statement = statement.having(_conditions(data)).order_by(func.sum(W.price), W.small)
    if data.draw(st.booleans()):
        statement = statement.having(_conditions(data)).limit(data.draw(bounds))

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1]) == shown(expected[1])


def test_having_without_group_by_keeps_the_one_row_or_none(judge: Judge) -> None:
    judge.load([])
    for least, rows in ((0, [(0,)]), (1, [])):
        statement = sa.select(func.count(W.id)).having(func.count() >= least)
        assert [tuple(row) for row in judge.merged(statement)[1]] == rows


COMPUTED: tuple[Any, ...] = (
    func.coalesce(func.sum(W.whole), 0),
    func.coalesce(func.sum(W.big), 0),
    func.coalesce(func.avg(W.real), -1),
    func.coalesce(func.max(W.text), "none"),
    func.coalesce(func.min(W.price), func.max(W.price), 0),
    func.sum(W.exact) * 2 - func.count(),
    func.count() + func.count(W.text),
    func.sum(W.small) - func.coalesce(func.sum(W.whole), 0),
)


@EXAMPLES
@given(st.data(), tables)
def test_expressions_over_aggregates(judge: Judge, data: Any, rows: Any) -> None:
    judge.load(rows)
    columns = data.draw(st.lists(st.sampled_from(COMPUTED), min_size=1, max_size=2))
    shown_columns = [column.label(f"c{number}") for number, column in enumerate(columns)]
    sort = data.draw(st.sampled_from(COMPUTED))
    statement = sa.select(W.flag, *shown_columns).group_by(W.flag).order_by(sort.desc(), W.flag)

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert merged[0] == expected[0]
    assert shown(merged[1], (exactly, by_value, by_value)) == shown(
        expected[1], (exactly, by_value, by_value)
    )


@EXAMPLES
@given(st.data(), tables)
def test_distinct_groups(judge: Judge, data: Any, rows: Any) -> None:
    """Groups of different keys become one row when their aggregates are equal."""
    judge.load(rows)
    key = W[data.draw(st.sampled_from(("small", "text", "day")))]
    statement = sa.select(func.count().label("n"), func.max(W.flag.cast(sa.Integer)).label("m"))
    statement = statement.group_by(key).distinct().order_by("n", sa.desc("m"))

    merged, expected = judge.merged(statement), judge.expected(statement)

    assert shown(merged[1]) == shown(expected[1])


@pytest.mark.parametrize("turn", [sa.asc, sa.desc])
@pytest.mark.parametrize("name", ["at", "d"])
def test_infinite_and_ancient_moments_are_sorted_by(judge: Judge, name: str, turn: Any) -> None:
    """Python has no such values; that they are only sorted by must not matter."""
    connection = judge.connection
    moments = ["-infinity", "infinity", "0044-03-15 BC", "2024-01-01", None, "1999-12-31"]
    for schema in ("whole", "part_0", "part_1", "part_2"):
        connection.execute(sa.text(f"create table {schema}.odd (id int, at timestamp, d date)"))
    for number, moment in enumerate(moments):
        for schema in ("whole", f"part_{number % 3}"):
            connection.execute(
                sa.text(
                    f"insert into {schema}.odd "
                    "values (:id, cast(:m as timestamp), cast(:n as date))"
                ),
                {"id": number, "m": moment, "n": moment},
            )
    metadata = sa.MetaData()
    columns = (sa.Column("id", sa.Integer), sa.Column("at", sa.DateTime), sa.Column("d", sa.Date))
    odd = sa.Table("odd", metadata, *columns)
    statement = sa.select(odd.c.id).order_by(turn(odd.c[name]))

    assert judge.merged(statement)[1] == judge.expected(statement)[1]


def test_enums_that_differ_are_refused(judge: Judge) -> None:
    judge.load([])
    connection = judge.connection
    for number in range(3):
        connection.execute(
            sa.text(f"insert into part_{number}.wide (id, mood) values ({number}, 'ok')")
        )
    connection.execute(sa.text("alter type part_1.mood rename value 'sad' to 'gloomy'"))

    with pytest.raises(CrossShardRefused, match=r"define the enum of wide\.mood differently"):
        judge.merged(sa.select(W.id).order_by(W.mood))


ODD = sa.Table(
    "strange",
    sa.MetaData(),
    sa.Column("id", sa.Integer),
    sa.Column("span", sa.Interval),
    sa.Column("doc", sa.dialects.postgresql.JSONB),
    sa.Column("tags", sa.ARRAY(sa.Integer)),
    sa.Column("loose", sa.dialects.postgresql.CITEXT),
    sa.Column("word", sa.Text(collation="en-x-icu")),
)


@pytest.mark.parametrize("name", ["span", "doc", "tags", "loose", "word"])
def test_types_that_python_orders_differently_are_refused(judge: Judge, name: str) -> None:
    """An interval loses its months in Python, jsonb and arrays have an order of their own."""
    column = ODD.c[name]
    ordered: Callable[[Any], Any] = sa.select(ODD.c.id).order_by
    with pytest.raises(CrossShardRefused):
        judge.merged(ordered(column))
    with pytest.raises(CrossShardRefused):
        judge.merged(sa.select(func.max(column)))
    if name != "word":
        with pytest.raises(CrossShardRefused):
            judge.merged(sa.select(column).distinct())
