"""Merging rows of shards: order, limit, groups and PostgreSQL's arithmetic, without a database."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.combining import Aggregate, AggregateKind, Conversion
from sqlroute.routing.expressions import Column, Operation, Operator, Parameter, Term, evaluate
from sqlroute.routing.merge import Grouping, GroupKey, MergeSpec, merge
from sqlroute.routing.moments import Moments, combined, exact_deviation, exact_variance
from sqlroute.routing.numeric import add, add_as_sum, average
from sqlroute.routing.ordering import Family, SortTerm

NAN, INF = float("nan"), float("inf")


def term(
    column: int = 0,
    family: Family = Family.NUMBER,
    *,
    desc: bool = False,
    nulls_first: bool | None = None,
) -> SortTerm:
    return SortTerm(column, family, desc, desc if nulls_first is None else nulls_first, "x")


def aggregate(kind: AggregateKind, column: int, *, family: Family = Family.NUMBER) -> Aggregate:
    return Aggregate(kind, column, (column,), family, None, kind.value)


def column_of(parts: list[list[Any]], *order: SortTerm, **spec: Any) -> list[Any]:
    rows = [[(value,) for value in part] for part in parts]
    return [row[0] for row in merge(rows, MergeSpec(order=order, **spec))]


def test_without_order_shard_follows_shard() -> None:
    assert column_of([[3, 1], [2]]) == [3, 1, 2]


@pytest.mark.parametrize(
    ("order", "parts", "expected"),
    [
        (term(), [[1, 3, None], [2, None]], [1, 2, 3, None, None]),
        (term(desc=True), [[None, 3, 1], [2]], [None, 3, 2, 1]),
        (term(nulls_first=True), [[None, 1], [None, 0]], [None, None, 0, 1]),
        (term(desc=True, nulls_first=False), [[3, None], [4]], [4, 3, None]),
        (term(), [[-INF, INF, NAN, None], [1.5]], [-INF, 1.5, INF, NAN, None]),
        (term(desc=True), [[NAN, INF], [NAN, 2.0]], [NAN, NAN, INF, 2.0]),
        (term(), [[Decimal("-Infinity"), Decimal("NaN")], [7]], ["-Infinity", 7, "NaN"]),
        (term(family=Family.TEXT), [["B", "é"], ["a", "ﬀ", "😀"]], ["B", "a", "é", "ﬀ", "😀"]),
        (term(family=Family.TEXT, desc=True), [["é", "B"], ["a"]], ["é", "a", "B"]),
        (
            term(family=Family.BOOLEAN, desc=True),
            [[None, True], [True, False]],
            [None, True, True, False],
        ),
    ],
)
def test_order_is_that_of_postgres(
    order: SortTerm, parts: list[list[Any]], expected: list[Any]
) -> None:
    assert [str(value) for value in column_of(parts, order)] == [str(v) for v in expected]


def test_descending_decimals_compare_with_all_their_digits() -> None:
    small, large = Decimal("1" * 40 + "1"), Decimal("1" * 40 + "2")

    assert column_of([[small], [large]], term(desc=True)) == [large, small]


def test_moments_sort_by_their_instant_when_clocks_go_back() -> None:
    """01:30 EDT is before 01:10 EST, though Python compares them by the wall clock."""
    zone = zoneinfo.ZoneInfo("America/New_York")
    summer = dt.datetime(2024, 11, 3, 1, 30, tzinfo=zone)
    winter = dt.datetime(2024, 11, 3, 1, 10, tzinfo=zone, fold=1)

    assert column_of([[winter], [summer]], term(family=Family.TIMESTAMP)) == [summer, winter]
    descending = term(family=Family.TIMESTAMP, desc=True)
    assert column_of([[summer], [winter]], descending) == [winter, summer]


def test_ties_come_in_the_order_of_the_shards() -> None:
    parts = [[(1, "a"), (1, "b")], [(1, "c")], [(0, "d"), (1, "e")]]

    merged = list(merge(parts, MergeSpec(order=(term(),))))

    assert [row[1] for row in merged] == ["d", "a", "b", "c", "e"]


def test_terms_after_the_first_break_its_ties() -> None:
    parts = [[(1, "b"), (1, "a")], [(1, "c"), (2, "z")]]
    order = (term(), term(1, Family.TEXT, desc=True))

    merged = list(merge(parts, MergeSpec(order=order)))

    assert merged == [(1, "c"), (1, "b"), (1, "a"), (2, "z")]


def test_hidden_columns_are_sorted_by_and_not_shown() -> None:
    spec = MergeSpec(hidden=1, order=(term(-1),))

    assert list(merge([[("a", 1)], [("b", 0)]], spec)) == [("b",), ("a",)]


def test_limit_and_offset_count_rows_of_the_whole() -> None:
    parts = [[0, 2, 4, 6], [1, 3, 5]]

    assert column_of(parts, term(), limit=3, offset=2) == [2, 3, 4]
    assert column_of(parts, term(), offset=5) == [5, 6]
    assert column_of(parts, limit=5) == [0, 2, 4, 6, 1]


def test_no_more_rows_are_read_than_the_limit_needs() -> None:
    read: list[int] = []

    def shard(start: int) -> Iterator[tuple[int]]:
        for value in range(start, 1000, 2):
            read.append(value)
            yield (value,)

    merged = merge([shard(0), shard(1)], MergeSpec(order=(term(),), limit=2, offset=1))

    assert [row[0] for row in merged] == [1, 2]
    assert len(read) <= 2 * 3  # LIMIT + OFFSET of each


def test_limit_zero_reads_nothing() -> None:
    reads: list[int] = []

    def shard() -> Iterator[tuple[None]]:
        reads.append(1)
        yield (None,)

    assert list(merge([shard()], MergeSpec(limit=0, offset=3))) == []
    assert reads == []


def test_partial_aggregates_make_one_row() -> None:
    grouping = Grouping(
        (),
        (
            aggregate(AggregateKind.COUNT, 0),
            aggregate(AggregateKind.SUM, 1),
            aggregate(AggregateKind.MIN, 2, family=Family.TEXT),
            aggregate(AggregateKind.MAX, 3),
        ),
    )
    parts: list[list[Any]] = [[(2, 10, "b", None)], [(0, None, None, None)], [(1, 5, "a", NAN)]]

    (row,) = merge(parts, MergeSpec(grouping=grouping))

    assert row[:3] == (3, 15, "a")
    assert row[3] != row[3]  # NaN, the greatest number


def test_groups_are_joined_by_the_equality_of_postgres() -> None:
    """NULL is a group, 1.0 is 1.00, NaN is NaN, -0.0 is 0.0."""
    grouping = Grouping((GroupKey(0, Family.NUMBER, "x"),), (aggregate(AggregateKind.COUNT, 1),))
    values = [None, Decimal("1.0"), NAN, -0.0]
    same = [None, Decimal("1.00"), float("nan"), 0.0]

    merged = list(
        merge([[(v, 1) for v in values], [(v, 2) for v in same]], MergeSpec(grouping=grouping))
    )

    assert [row[1] for row in merged] == [3, 3, 3, 3]


def test_average_divides_sums_by_counts_and_sorts_by_the_result() -> None:
    avg = Aggregate(AggregateKind.AVG, 1, (-2, -1), Family.NUMBER, None, "avg(x)")
    grouping = Grouping((GroupKey(0, Family.TEXT, "k"),), (avg,))
    spec = MergeSpec(hidden=2, grouping=grouping, order=(term(-2, desc=True, nulls_first=False),))
    parts: list[list[Any]] = [
        [("a", Decimal("9"), 1, 1), ("b", Decimal("5"), 5, 1), ("c", None, None, 0)],
        [("a", Decimal("9"), 4, 1)],
    ]

    merged = list(merge(parts, spec))

    assert [tuple(map(str, row)) for row in merged] == [
        ("b", "5.0000000000000000"),
        ("a", "2.5000000000000000"),
        ("c", "None"),
    ]


def test_results_convert_as_their_declared_type() -> None:
    assert Conversion(None)(Decimal("1.50")) == 1.5
    assert str(Conversion(3)(0.5)) == "0.500"
    assert str(Conversion(3)(Decimal("0.5"))) == "0.5"
    assert Conversion(3)(None) is None


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        ("10", 3, "3.3333333333333333"),
        ("20000", 3, "6666.6666666666666667"),
        ("1", 3, "0.33333333333333333333"),
        ("-2", 3, "-0.66666666666666666667"),
        ("0.00", 3, "0E-20"),
        ("1E-20", 2, "5.0000000000000000000E-21"),
        ("123456789012345678901234567890", 7, "17636684144620811271604938270"),
        ("NaN", 2, "NaN"),
        ("-Infinity", 2, "-Infinity"),
    ],
)
def test_numeric_division_has_the_scale_of_postgres(total: str, count: int, expected: str) -> None:
    assert str(average(Decimal(total), count)) == expected


def test_sums_are_exact_at_any_length() -> None:
    long, short = Decimal("1" * 50), Decimal("0.010")

    assert str(add(long, short)) == "1" * 50 + ".010"
    assert str(add(Decimal("Infinity"), Decimal("-Infinity"))) == "NaN"


def test_overflows_raise_as_in_postgres() -> None:
    with pytest.raises(CrossShardRefused, match="sum: bigint out of range"):
        add_as_sum(2**62, 2**62)
    with pytest.raises(CrossShardRefused, match="overflow of double precision"):
        add(1.7e308, 1.7e308)
    assert add(INF, 1.0) == INF


def test_a_spec_tells_its_steps() -> None:
    grouping = Grouping((GroupKey(0, Family.TEXT, "t.k"),), (aggregate(AggregateKind.COUNT, 1),))
    order = (SortTerm(1, Family.NUMBER, True, False, "count(*)"),)

    assert MergeSpec(grouping=grouping, order=order, limit=10, offset=5).describe() == (
        "group by t.k",
        "count: sum of partial counts",
        "order by count(*) desc nulls last",
        "limit 10 offset 5 after merge; all rows of each shard",
    )
    assert MergeSpec(order=(term(),), limit=10, offset=5, pushed=15).describe() == (
        "order by x",
        "limit 10 offset 5 after merge; limit 15 per shard",
    )
    assert MergeSpec().describe() == ("shard after shard",)


def test_equal_rows_are_one_whatever_their_digits() -> None:
    """NULL is NULL, NaN is NaN, 1.0 is 1.00; across shards that are not ordered, too."""
    keys = (GroupKey(0, Family.NUMBER, "x"),)

    found = column_of([[None, Decimal("1.0"), NAN], [None, Decimal("1.00"), NAN, 2]], distinct=keys)

    assert [str(value) for value in found] == ["None", "1.0", "nan", "2"]


def test_distinct_remembers_one_place_of_the_order_only() -> None:
    keys = (GroupKey(0, Family.NUMBER, "x"), GroupKey(1, Family.TEXT, "y"))
    parts = [[(1, "b"), (2, "a")], [(1, "a"), (1, "b"), (2, "a")]]

    merged = list(merge(parts, MergeSpec(order=(term(),), distinct=keys, limit=2, offset=1)))

    assert merged == [(1, "a"), (2, "a")]


def test_the_first_of_each_kind_is_kept() -> None:
    """DISTINCT ON: the order decides which row of its kind is the first, over all shards."""
    spec = MergeSpec(
        order=(term(), term(1, desc=True)), distinct=(GroupKey(0, Family.NUMBER, "x"),)
    )

    assert list(merge([[(1, 5), (2, 1)], [(1, 9), (3, 0)]], spec)) == [(1, 9), (2, 1), (3, 0)]


def test_rows_that_tie_with_the_last_one_are_kept() -> None:
    parts = [[1, 2, 2, 3], [2, 2, 4]]

    assert column_of(parts, term(), limit=2, offset=1, ties=True) == [2, 2, 2, 2]
    assert column_of(parts, term(), limit=20, ties=True) == [1, 2, 2, 2, 2, 3, 4]
    assert column_of([[], []], term(), limit=1, ties=True) == []


def test_shards_that_differ_in_what_must_be_alike_are_refused() -> None:
    spec = MergeSpec(hidden=1, order=(term(),), alike=((-1, "the enums differ"),))

    assert list(merge([[(1, 7)], [(2, 7)], []], spec)) == [(1,), (2,)]
    with pytest.raises(CrossShardRefused, match="the enums differ"):
        list(merge([[(1, 7)], [(2, 8)]], spec))


def test_having_is_decided_of_the_merged_group() -> None:
    """A group of two rows on two shards has count 2; an unknown condition keeps no group."""
    condition = Operation(
        Operator.GT, (Column(1), Parameter(0, Family.NUMBER, "count(*) > 1")), Family.NUMBER
    )
    grouping = Grouping(
        (GroupKey(0, Family.TEXT, "k"),),
        (aggregate(AggregateKind.COUNT, 1),),
        having=((condition, "count(*) > 1"),),
    )
    parts: list[list[Any]] = [[("a", 1), ("b", 1)], [("a", 1)]]

    assert list(merge(parts, MergeSpec(grouping=grouping, values=(1,)))) == [("a", 2)]
    assert list(merge(parts, MergeSpec(grouping=grouping, values=(None,)))) == []


X: Term = Column(0)
Y: Term = Column(1)


@pytest.mark.parametrize(
    ("term", "row", "expected"),
    [
        (Operation(Operator.AND, (X, Y)), (None, False), False),
        (Operation(Operator.AND, (X, Y)), (None, True), None),
        (Operation(Operator.OR, (X, Y)), (None, True), True),
        (Operation(Operator.OR, (X, Y)), (None, False), None),
        (Operation(Operator.NOT, (X,)), (None,), None),
        (Operation(Operator.EQ, (X, Y), Family.NUMBER), (NAN, NAN), True),
        (Operation(Operator.LT, (X, Y), Family.NUMBER), (INF, NAN), True),
        (Operation(Operator.EQ, (X, Y), Family.NUMBER), (0.1, Decimal("0.1")), True),
        (Operation(Operator.EQ, (X, Y), Family.NUMBER), (None, None), None),
        (Operation(Operator.DISTINCT, (X, Y), Family.NUMBER), (None, None), False),
        (Operation(Operator.DISTINCT, (X, Y), Family.NUMBER), (None, 1), True),
        (Operation(Operator.IN, (X, Parameter(0, Family.NUMBER, ""))), (3,), None),
        (Operation(Operator.IN, (X, Parameter(0, Family.NUMBER, ""))), (1,), True),
        (Operation(Operator.IS_TRUE, (X,)), (None,), False),
        (Operation(Operator.COALESCE, (X, Y)), (None, "y"), "y"),
        (Operation(Operator.ADD, (X, Y)), (1, Decimal("0.50")), Decimal("1.50")),
        (Operation(Operator.MULTIPLY, (X, Y)), (Decimal("1.5"), 0.5), 0.75),
        (Operation(Operator.SUBTRACT, (X, Y)), (None, 1), None),
    ],
)
def test_terms_have_the_three_values_of_sql(term: Term, row: Any, expected: Any) -> None:
    assert evaluate(term, row, ([1, None],)) is expected or (
        evaluate(term, row, ([1, None],)) == expected and expected is not None
    )


def test_a_product_beyond_bigint_raises_as_in_postgres() -> None:
    with pytest.raises(CrossShardRefused, match="bigint out of range"):
        evaluate(Operation(Operator.MULTIPLY, (X, Y)), (2**40, 2**40), ())


@pytest.mark.parametrize(
    ("values", "pop", "samp", "deviation"),
    [
        (["1", "2", "4"], "1.5555555555555556", "2.3333333333333333", "1.5275252316519467"),
        (["1.5", "1.5"], "0", "0", "0"),
        (["7"], "0", "None", "None"),
        (["NaN", "1"], "NaN", "NaN", "NaN"),
        ([], "None", "None", "None"),
    ],
)
def test_variances_have_the_digits_of_postgres(
    values: list[str], pop: str, samp: str, deviation: str
) -> None:
    numbers = [Decimal(value) for value in values]
    parts = sum(numbers, Decimal(0)), len(numbers), sum((n * n for n in numbers), Decimal(0))

    assert str(exact_variance(*parts, sample=False)) == pop
    assert str(exact_variance(*parts, sample=True)) == samp
    assert str(exact_deviation(*parts, sample=True)) == deviation


def test_moments_of_two_shards_are_those_of_all_rows() -> None:
    """(1, 2), (3, 5) on one shard and (8, 1) on the other; an empty shard changes nothing."""
    one = Moments(2, 4.0, 2.0, 7.0, 4.5, 3.0)
    other = Moments(1, 8.0, 0.0, 1.0, 0.0, 0.0)

    found = combined(combined(Moments(0), one), combined(other, Moments(0)))

    assert found.n == 3
    assert found.xx == pytest.approx(26.0)
    assert found.yy == pytest.approx(26 / 3)
    assert found.xy == pytest.approx(-7.0)
    with pytest.raises(CrossShardRefused, match="overflow"):
        combined(Moments(1, 1e308, 1e308), Moments(1, -1e308, 1e308))


def test_lists_of_the_shards_are_merged_in_their_order() -> None:
    """(values, sort values): ties keep the order of the shards."""
    listed = Aggregate(
        AggregateKind.ARRAY_AGG, 0, (0, 1), Family.TEXT, None, "a", order=(term(1, desc=True),)
    )
    joined = Aggregate(AggregateKind.STRING_AGG, 0, (1, 2), Family.TEXT, None, "s")
    parts: list[list[Any]] = [[(["a", "b"], [None, 3])], [(None, None)], [(["c", "d"], [3, 1])]]

    (row,) = merge(parts, MergeSpec(hidden=1, grouping=Grouping((), (listed,))))
    assert row == (["a", "b", "c", "d"],)
    texts: list[list[Any]] = [[("", ["x"], ",")], [("", None, None)], [("", ["y", "z"], ",")]]
    (row,) = merge(texts, MergeSpec(hidden=2, grouping=Grouping((), (joined,))))
    assert row == ("x,y,z",)
