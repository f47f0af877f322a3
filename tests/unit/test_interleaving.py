"""Rows of several shards in one order, block by block."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from heapq import merge as textbook
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sqlroute.routing.interleaving import Read, in_order
from sqlroute.routing.ordering import Family, SortTerm, block_key, row_key

VALUES = {
    Family.NUMBER: [None, 0, 1, True, -3, 2**70, 0.5, float("nan"), Decimal("1.0"), Decimal("NaN")],
    Family.TEXT: [None, "", "a", "b", "Z"],
    Family.DATE: [None, dt.date(2024, 2, 29), dt.date(1, 1, 1)],
    Family.BOOLEAN: [None, True, False],
}


@st.composite
def orders(draw: st.DrawFn) -> tuple[SortTerm, ...]:
    families = draw(st.lists(st.sampled_from(list(VALUES)), min_size=1, max_size=3))
    return tuple(
        SortTerm(place, family, draw(st.booleans()), draw(st.booleans()), "x")
        for place, family in enumerate(families)
    )


def last_first(fills: Mapping[int, Callable[[], None]]) -> None:
    for index in sorted(fills, reverse=True):
        fills[index]()


@given(st.data(), orders(), st.integers(1, 5), st.sampled_from([None, last_first]))
def test_the_order_and_the_ties_are_those_of_a_merge_row_by_row(
    data: st.DataObject, order: tuple[SortTerm, ...], block: int, read: Read | None
) -> None:
    """Whoever reads the parts, in whatever order."""
    row = st.tuples(*(st.sampled_from(VALUES[term.family]) for term in order))
    key = row_key(order)
    parts = [
        sorted(((*values, (shard, n)) for n, values in enumerate(rows)), key=key)
        for shard, rows in enumerate(data.draw(st.lists(st.lists(row, max_size=12), max_size=4)))
    ]

    found = [row[-1] for row in in_order(parts, block_key(order), block, read)]

    assert found == [row[-1] for row in textbook(*parts, key=key)]


@pytest.mark.parametrize("family", list(VALUES), ids=str)
@pytest.mark.parametrize("descending", [False, True])
def test_the_keys_of_many_rows_are_those_of_each(family: Family, descending: bool) -> None:
    """With NULL and NaN among them and without."""
    terms = (SortTerm(0, family, descending, True, "x"),)
    rows = [(value,) for value in VALUES[family]]
    ordinary = [(value,) for value in VALUES[family] if type(value) is type(VALUES[family][1])]

    for some in (rows, ordinary, []):
        assert block_key(terms)(some) == [row_key(terms)(row) for row in some]


def test_a_block_of_each_part_is_held_and_no_more() -> None:
    read = [0, 0]

    def part(shard: int) -> Iterator[tuple[Any, ...]]:
        for number in range(shard, 1000, 2):
            read[shard] += 1
            yield (number,)

    terms = (SortTerm(0, Family.NUMBER, False, False, "x"),)
    rows = in_order([part(0), part(1)], block_key(terms), 10)

    for taken, (number,) in enumerate(rows):
        assert number == taken
        assert sum(read) - taken <= 2 * 10 + 10  # of the block that is left, and its successor


def test_parts_that_run_low_are_read_together() -> None:
    """So that each is asked for more as often as one of them would be alone."""
    asked: list[list[int]] = []

    def read(fills: Mapping[int, Callable[[], None]]) -> None:
        asked.append(list(fills))
        last_first(fills)

    terms = (SortTerm(0, Family.NUMBER, False, False, "x"),)
    parts = [[(number,) for number in range(shard, 400, 4)] for shard in range(4)]

    assert len(list(in_order(parts, block_key(terms), 10, read))) == 400
    assert asked[:10] == [[0, 1, 2, 3]] * 10
