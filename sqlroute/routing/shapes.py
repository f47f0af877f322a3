"""How the statements of one shape merge: places and columns, no expressions and no values.

Made once per shape by :mod:`sqlroute.routing.analysis`; what each execution adds is in
:mod:`sqlroute.routing.rewrite`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlroute.routing.aggregates import Form
from sqlroute.routing.expressions import moved
from sqlroute.routing.merge import Grouping, GroupKey, describe_steps
from sqlroute.routing.ordering import Family, SortTerm
from sqlroute.routing.places import Place

HIDDEN = "sqlroute_"
"""How the names of the columns begin that shards add, before their number from 1."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A column that each shard adds behind the caller's.

    Attributes:
        number: for a list of sort values, which term of the ORDER BY inside the aggregate.
    """

    place: Place
    form: Form
    number: int = 0


@dataclass(frozen=True, slots=True)
class OrderClause:
    """One term of ORDER BY in the statement that is sent.

    Attributes:
        hidden: index of the hidden column to sort by instead of the expression, if any.
    """

    place: Place
    hidden: int | None
    descending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True)
class ValuePlace:
    """Where the value of a parameter in an expression over aggregates comes from.

    Attributes:
        place: of the whole expression.
        number: of the bind parameter inside it.
        family: what it is compared with, and the comparison, for people.
    """

    place: Place
    number: int
    family: Family
    text: str


@dataclass(frozen=True, slots=True)
class MergeShape:
    """How every statement of one shape merges.

    Attributes:
        order_clauses: terms of the ORDER BY that is sent.
        order, distinct, alike, entities: see :class:`~sqlroute.routing.merge.MergeSpec`.
        kept_having: which conditions of HAVING each shard decides for itself.
        values: the parameters of terms over aggregates.
    """

    hidden: tuple[Hidden, ...] = ()
    order: tuple[SortTerm, ...] = ()
    order_clauses: tuple[OrderClause, ...] = ()
    grouping: Grouping | None = None
    distinct: tuple[GroupKey, ...] | None = None
    alike: tuple[tuple[int, str], ...] = ()
    kept_having: tuple[int, ...] = ()
    values: tuple[ValuePlace, ...] = ()
    has_limit: bool = False
    has_ties: bool = False
    entities: bool = False

    def describe(self) -> tuple[str, ...]:
        """Return the steps of the merge as words, without the values of an execution."""
        limit = ("limit and offset after merge",) if self.has_limit else ()
        return (*describe_steps(self.grouping, self.order, self.distinct), *limit)


def with_final_columns(shape: MergeShape) -> MergeShape:
    """Turn numbers of hidden columns, -1 for the first, into indexes from the end of a row."""
    hidden = len(shape.hidden)

    def final(column: int) -> int:
        return column if column >= 0 else -hidden - column - 1

    order = tuple(replace(term, column=final(term.column)) for term in shape.order)
    alike = tuple((final(column), meaning) for column, meaning in shape.alike)
    distinct = shape.distinct
    if distinct is not None:
        distinct = tuple(replace(key, column=final(key.column)) for key in distinct)
    grouping = shape.grouping
    if grouping is not None:
        grouping = Grouping(
            tuple(replace(key, column=final(key.column)) for key in grouping.keys),
            tuple(
                replace(
                    aggregate,
                    parts=tuple(map(final, aggregate.parts)),
                    order=tuple(replace(t, column=final(t.column)) for t in aggregate.order),
                )
                for aggregate in grouping.aggregates
            ),
            tuple(
                replace(one, column=final(one.column), term=moved(one.term, final))
                for one in grouping.computed
            ),
            tuple((moved(term, final), text) for term, text in grouping.having),
        )
    return replace(shape, order=order, alike=alike, distinct=distinct, grouping=grouping)
