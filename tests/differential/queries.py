"""Random SELECTs over a world, from the whole grammar that tier 2 merges, and some beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import distinct_on

from .worlds import INTEGERS, NUMBERS, World

How = Callable[[Any], Any]
"""Turns a value into what must be equal."""


def exactly(value: Any) -> Any:
    """Type and digits."""
    return type(value).__name__, repr(value)


def by_value(value: Any) -> Any:
    """Of equal values (1.0 and 1.00) PostgreSQL leaves open which one stands for both."""
    if isinstance(value, Decimal) and value.is_finite():
        return "Decimal", value
    return exactly(value)


def nearly(value: Any) -> Any:
    """Of sums of floats the last digits hang on the order of the rows."""
    if isinstance(value, float) and math.isfinite(value):
        return "float", float(f"{value:.7e}") if abs(value) > 1e-9 else 0.0
    return exactly(value)


def in_any_order(value: Any) -> Any:
    return type(value).__name__, tuple(sorted(map(repr, value or ())))


@dataclass
class Query:
    """A statement, and how its answers compare.

    Attributes:
        hows: column by column.
        is_total: ORDER BY leaves nothing open.
        what: kind of statement, for the report.
    """

    statement: Any
    hows: list[How]
    is_total: bool
    what: str


@dataclass
class Source:
    """A FROM with the columns that may be used, and those that identify a row."""

    select_from: Any
    columns: list[Any]
    identity: list[Any]
    conditions: list[Any] = field(default_factory=list)


class Grammar:
    """Draws queries over one world."""

    def __init__(self, of: World, random: Random) -> None:
        self.world = of
        self.random = random

    def query(self) -> Query:
        draw = self.random.choice(
            [self.plain, self.plain, self.distinct, self.first_of_each, self.grouped, self.grouped,
             self.aggregated, self.ties, self.united, self.windowed]
        )  # fmt: skip
        return draw()

    # Parts

    def source(self) -> Source:
        own, item, kind = self.world.own, self.world.item, self.world.kind
        on_key = item.c.own_id == own.c.id
        if self._maybe(0.2):
            on_key = sa.and_(on_key, self.condition([*item.c]))
        o, i, k = [*own.c], [*item.c], [*kind.c]
        sources = [
            Source(own, o, [own.c.id]),
            Source(own, o, [own.c.id]),
            Source(item, i, [item.c.own_id, item.c.n]),
            Source(own.join(item, on_key), o + i, [own.c.id, item.c.n]),
            Source(own.outerjoin(item, on_key), o + i, [own.c.id, item.c.n]),
            Source(
                own.join(item, item.c.own_id == own.c.id, full=True),
                o + i,
                [own.c.id, item.c.own_id, item.c.n],
            ),
            Source(own.join(kind, kind.c.code == own.c.own_kind), o + k, [own.c.id]),
            Source(own.outerjoin(kind, kind.c.code == own.c.own_kind), o + k, [own.c.id]),
            Source(kind.outerjoin(own, kind.c.code == own.c.own_kind), o + k, [own.c.id]),
            Source(
                own.join(item, item.c.n == own.c.own_kind),
                o + i,
                [own.c.id, item.c.n, item.c.own_id],
            ),
        ]
        found = self.random.choices(sources, [6, 6, 6, 5, 5, 2, 3, 3, 1, 1])[0]
        if self._maybe(0.5):
            found.conditions.append(self.condition(found.columns))
        if self._maybe(0.1) and own.c.id in found.identity:
            found.conditions.append(self._about_items())
        return found

    def _about_items(self) -> Any:
        own, item = self.world.own, self.world.item
        inner = item.alias()
        tied = sa.select(inner.c.n).where(inner.c.own_id == own.c.id, inner.c.n > 0)
        return self.random.choice(
            [tied.exists(), ~tied.exists(), own.c.id.in_(sa.select(item.alias().c.own_id))]
        )

    def condition(self, columns: list[Any]) -> Any:
        kind = self.random.randint(0, 4)
        one = self._comparison(columns)
        if kind == 0:
            return sa.or_(one, self._comparison(columns))
        if kind == 1:
            return sa.and_(one, self._comparison(columns))
        if kind == 2:
            return sa.not_(one)
        return one

    def _comparison(self, columns: list[Any]) -> Any:
        column = self.random.choice(columns)
        pool = self._pool(column)
        if self._kind(column) in ("doc", "tags"):
            return column.is_(None)
        value = self.random.choice(pool)
        return self.random.choice(
            [
                column == value,
                column != value,
                column > value if self._kind(column) != "flag" else column.is_(True),
                column.is_(None),
                column.is_not(None),
                column.in_(self.random.sample(pool, min(2, len(pool)))),
            ]
        )

    def expression(self, columns: list[Any]) -> Any:
        """Draw a scalar expression of one column."""
        column = self.random.choice(columns)
        kind = self._kind(column)
        found = [column, column]
        if kind in ("small", "own_n"):
            found += [column % 2, -column, func.coalesce(column, 0)]
        if kind in ("price", "exact"):
            found += [func.abs(column), column * 2]
        if kind in ("text", "short"):
            found += [func.length(column), func.upper(column, type_=sa.Text), column + "!"]
        if kind in ("moment", "naive"):
            found += [func.date_trunc("hour", column, type_=column.type)]
        if kind == "day":
            found += [sa.extract("day", column)]
        found.append(sa.case((column.is_(None), 1), else_=0))
        return self.random.choice(found)

    def order(self, terms: list[Any]) -> list[Any]:
        return [self._turned(term) for term in terms]

    def _turned(self, term: Any) -> Any:
        return self.random.choice(
            [term, term.desc(), term.nulls_first(), term.desc().nulls_last(), term.asc()]
        )

    def bounded(self, statement: Any) -> Any:
        if self._maybe(0.4):
            statement = statement.limit(self.random.randint(0, 6))
        return statement.offset(self.random.randint(0, 4)) if self._maybe(0.2) else statement

    # Statements

    def plain(self) -> Query:
        source = self.source()
        columns = self._labelled([self.expression(source.columns) for _ in range(self._few())])
        statement = self._of(source, *columns)
        if self._maybe(0.3):
            return Query(statement, [by_value] * len(columns), False, "rows")
        terms = [self.expression(source.columns) for _ in range(self.random.randint(0, 2))]
        if self._maybe(0.3):
            terms.append(self.random.choice(columns))
        statement = statement.order_by(*self.order([*terms, *source.identity]))
        return Query(self.bounded(statement), [by_value] * len(columns), True, "ordered rows")

    def distinct(self) -> Query:
        source = self.source()
        columns = self._labelled([self.expression(source.columns) for _ in range(self._few())])
        statement = self._of(source, *columns).distinct()
        hows: list[How] = [by_value] * len(columns)
        if self._maybe(0.4):
            return Query(statement, hows, False, "DISTINCT")
        terms = self.random.sample(columns, len(columns))
        statement = self.bounded(statement.order_by(*self.order(terms)))
        return Query(statement, hows, True, "DISTINCT")

    def first_of_each(self) -> Query:
        source = self.source()
        keys = self.random.sample(source.columns, self.random.randint(1, 2))
        columns = self._labelled([self.expression(source.columns) for _ in range(self._few())])
        terms = [*keys, self.random.choice(source.columns), *source.identity]
        statement = self._of(source, *columns).ext(distinct_on(*keys))
        statement = self.bounded(statement.order_by(*self.order(terms)))
        return Query(statement, [by_value] * len(columns), True, "DISTINCT ON")

    def ties(self) -> Query:
        source = self.source()
        columns = self._labelled([self.expression(source.columns) for _ in range(self._few())])
        statement = self._of(source, *columns).order_by(
            self._turned(self.expression(source.columns))
        )
        statement = statement.fetch(self.random.randint(0, 5), with_ties=True)
        return Query(statement, [by_value] * len(columns), False, "WITH TIES")

    def aggregated(self) -> Query:
        source = self.source()
        calls = [self.aggregate(source) for _ in range(self._few())]
        statement = self._of(source, *self._labelled([call for call, _ in calls]))
        if self._maybe(0.2):
            statement = statement.having(self.having(source))
        return Query(statement, [how for _, how in calls], True, "aggregates")

    def grouped(self) -> Query:
        source = self.source()
        keys = [self.expression(source.columns) for _ in range(self.random.randint(1, 2))]
        if self._maybe(0.2):
            keys = [*source.identity[:1], *keys[1:]]
        shown = keys[: self.random.randint(0, len(keys))]
        calls = [self.aggregate(source) for _ in range(self._few())]
        columns = self._labelled([*shown, *(call for call, _ in calls)])
        statement = self._of(source, *columns).group_by(*keys)
        hows = [by_value for _ in shown] + [how for _, how in calls]
        if self._maybe(0.4):
            statement = statement.having(self.having(source))
        if self._maybe(0.3):
            return Query(statement, hows, False, "GROUP BY")
        first = [func.count(), func.sum(self._number(source, INTEGERS))]
        terms = [*self.random.sample(first, self.random.randint(0, 1)), *keys]
        statement = self.bounded(statement.order_by(*self.order(terms)))
        return Query(statement, hows, True, "ordered GROUP BY")

    def united(self) -> Query:
        source = self.source()
        count = self.random.randint(1, 2)
        chosen = [self.random.choice(source.columns) for _ in range(count)]
        arms = [self._of(source, *self._labelled(chosen))]
        for _ in range(self.random.randint(1, 2)):
            arm = sa.select(*self._labelled(chosen)).select_from(source.select_from)
            arms.append(arm.where(self.condition(source.columns)))
        keeps_all = self._maybe(0.5)
        statement = (sa.union_all if keeps_all else sa.union)(*arms)
        hows: list[How] = [by_value] * count
        if self._maybe(0.4):
            return Query(statement, hows, False, "UNION")
        names = [f"c{index}" for index in self.random.sample(range(count), count)]
        terms = [self.random.choice([sa.asc, sa.desc])(name) for name in names]
        statement = self.bounded(statement.order_by(*terms))
        return Query(statement, hows, True, "UNION")

    def windowed(self) -> Query:
        source = self.source()
        by = [source.identity[0]] if self._maybe(0.7) else [self.random.choice(source.columns)]
        window = self.random.choice(
            [
                func.row_number().over(partition_by=by, order_by=source.identity),
                func.count().over(partition_by=by),
                func.sum(self._number(source, INTEGERS)).over(partition_by=by),
            ]
        )
        statement = self._of(source, *self._labelled([source.identity[0], window]))
        return Query(statement, [by_value, by_value], False, "windows")

    # Aggregates

    def aggregate(self, source: Source) -> tuple[Any, How]:
        """Draw an aggregate with the way its results compare."""
        column = self.random.choice(source.columns)
        number = self._number(source, NUMBERS)
        integer = self._number(source, INTEGERS)
        few, other = (self._number(source, _NARROW) for _ in range(2))
        inside = [self._turned(self.random.choice(source.columns)), *source.identity]
        scalar = self.random.choice([c for c in source.columns if self._kind(c) != "mood"])
        text = sa.cast(self.random.choice(source.columns), sa.Text)
        is_float = self._kind(number) == "real"
        near: How = nearly if is_float else exactly
        any_number: How = exactly if self._kind(number) != "real" else nearly
        found: list[tuple[Any, How]] = [
            (func.count(), exactly),
            (func.count(column), exactly),
            (func.sum(number), any_number),
            (func.avg(number), near),
            (func.min(column), by_value),
            (func.max(column), by_value),
            (getattr(func, self.random.choice(_SPREADS))(number), near),
            (getattr(func, self.random.choice(_PAIRS))(few, other), nearly),
            (getattr(func, self.random.choice(_BITS))(integer), exactly),
            (getattr(func, self.random.choice(_BOOLEANS))(self.condition(source.columns)), exactly),
            (func.array_agg(scalar).aggregate_order_by(*inside), exactly),
            (func.array_agg(integer), in_any_order),
            (func.string_agg(text, ",").aggregate_order_by(*inside), exactly),
            (func.json_agg(scalar).aggregate_order_by(*inside), exactly),
            (func.count(source.identity[0].distinct()), exactly),
            (func.count(column.distinct()), exactly),
            (func.max(column.distinct()), by_value),
            (func.coalesce(func.sum(number), 0), any_number),
            (func.sum(integer) * 2 - func.count(), exactly),
            (func.coalesce(func.max(text), "none"), exactly),
            (func.percentile_disc(0.5).within_group(integer), exactly),
        ]
        call, how = self.random.choice(found)
        is_aggregate = hasattr(call, "filter") and getattr(call, "name", None) != "coalesce"
        if self._maybe(0.15) and is_aggregate:
            call = call.filter(self.condition(source.columns))
        return call, how

    def having(self, source: Source) -> Any:
        number, few = self._number(source, INTEGERS), self.random.randint(0, 3)
        text = sa.cast(self.random.choice(source.columns), sa.Text)
        found = [
            func.count() > few,
            func.count() <= few,
            func.count().between(1, few),
            func.sum(number).is_not(None),
            func.sum(number) > few,
            func.avg(number) != few,
            func.count().in_([1, few]),
            func.max(text) > "a",
            func.coalesce(func.sum(number), 0) < few,
            func.bool_and(number > 0),
        ]
        one, other = self.random.choice(found), self.random.choice(found)
        return self.random.choice([one, one, sa.or_(one, other), sa.not_(one)])

    # Little things

    def _of(self, source: Source, *columns: Any) -> Any:
        return sa.select(*columns).select_from(source.select_from).where(*source.conditions)

    def _number(self, source: Source, kinds: tuple[str, ...]) -> Any:
        found = [column for column in source.columns if self._kind(column) in kinds]
        return self.random.choice(found)

    def _labelled(self, columns: list[Any]) -> list[Any]:
        return [column.label(f"c{index}") for index, column in enumerate(columns)]

    def _kind(self, column: Any) -> str:
        return self.world.kinds.get(column.name, "key" if column.name != "n" else "small")

    def _pool(self, column: Any) -> list[Any]:
        if column.name in ("id", "own_id"):
            return self.world.pools["id"]
        if column.name in ("n", "code"):
            return [0, 1, 2]
        return self.world.pools[column.name]

    def _few(self) -> int:
        return self.random.choice([1, 1, 2, 2, 3])

    def _maybe(self, share: float) -> bool:
        return self.random.random() < share


_NARROW = ("small", "price", "real")  # of values so unlike that nothing is left of their digits
_SPREADS = ("stddev", "stddev_pop", "variance", "var_pop", "var_samp", "stddev_samp")
_PAIRS = (
    "covar_pop", "covar_samp", "corr", "regr_count", "regr_avgx", "regr_avgy", "regr_sxx",
    "regr_syy", "regr_sxy", "regr_r2", "regr_slope", "regr_intercept",
)  # fmt: skip
_BITS = ("bit_and", "bit_or", "bit_xor")
_BOOLEANS = ("bool_and", "bool_or", "every")
