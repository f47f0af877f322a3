"""Read AND-ed conditions: which columns they make equal, which keys they leave possible.

Knows one conjunct at a time, and the block whose names it uses; which conjuncts restrict which
tables is :mod:`sqlroute.routing.blocks`. A condition that is not understood restricts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Cast,
    ClauseList,
    CollectionAggregate,
    ColumnElement,
    Grouping,
    Tuple,
    TypeCoerce,
)
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.types import ARRAY, BigInteger, NullType

from sqlroute.routing.declare import kind_of
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.keys import Alternative, Bind, OneOf, Product, Recipe, Rows, Source, Span

ColumnId = tuple[int, str]
"""A column of one use of a table or derived table: number of the use, column key."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a name means inside one query block.

    Attributes:
        uses: number of the use of a FROM element, by its hash (the ORM's annotated copies share
            it); of two uses of one table, the nearer.
        enclosing: FROM elements of all blocks, which explicit correlation may mean.
        nearest: those of this block, which automatic correlation means.
    """

    uses: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    enclosing: frozenset[FromClause] = frozenset()
    nearest: frozenset[FromClause] = frozenset()


@dataclass(frozen=True, slots=True)
class Conjunct:
    """A condition and the block that its names belong to."""

    condition: Any
    block: Block


@dataclass(frozen=True, slots=True)
class WantedKey:
    """The shard key of one use of a table, whose values are looked for.

    Attributes:
        columns: of the key.
        roots: the class of each column: what is equal to it.
        kinds: how each is hashed.
        root: gives the class of a column.
        is_used_once: says whether the statement has a bind parameter in one place only.
    """

    columns: tuple[ColumnId, ...]
    roots: tuple[ColumnId, ...]
    kinds: tuple[KeyKind, ...]
    root: Callable[[ColumnId], ColumnId]
    is_used_once: Callable[[str], bool]


def split(condition: Any) -> Iterator[Any]:
    """Yield the AND-ed parts of a condition."""
    if isinstance(condition, Grouping):
        yield from split(condition.element)
    elif isinstance(condition, LambdaElement):
        yield from split(condition._resolved)
    elif isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        for clause in condition.clauses:
            yield from split(clause)
    else:
        yield condition


def column_of(expression: Any, block: Block) -> ColumnId | None:
    """Return the column that an expression is, ``None`` for any other expression.

    A cast is looked through where it neither changes a value nor fails.
    """
    expression = _uncast(expression)
    table = getattr(expression, "table", None)
    key = getattr(expression, "key", None)
    if table is None or key is None or not isinstance(expression, ColumnElement):
        return None
    use = block.uses.get(hash(table))
    return None if use is None else (use, str(key))


def equalities(condition: Any, block: Block) -> Iterator[tuple[ColumnId, ColumnId]]:
    """Yield the columns that a conjunct makes equal in value and in hash.

    Of types that hash alike only: ``text = citext`` ignores case, ``bigint = double`` rounds.
    ``IS NOT DISTINCT FROM`` is none: a row that an outer join has filled up with NULL meets rows of
    other shards by it.
    """
    if not isinstance(condition, BinaryExpression) or condition.operator is not operators.eq:
        return
    for one, other in _sides(condition):
        a, b = column_of(one, block), column_of(other, block)
        if a is None or b is None:
            continue
        kind = kind_of(one.type)
        if kind is not None and kind is kind_of(other.type):
            yield a, b


def recipe(conjuncts: Iterable[Conjunct], key: WantedKey) -> Recipe:
    """Return which keys AND-ed conditions leave possible."""
    columns: list[list[Source]] = [[] for _ in key.roots]
    bounds: list[list[_Bound]] = [[] for _ in key.roots]
    unions: list[tuple[Alternative, ...]] = []
    for conjunct in conjuncts:
        for index, fact in _facts(conjunct, key):
            if isinstance(fact, _Bound):
                bounds[index].append(fact)
            else:
                columns[index].append(fact)
        if (union := _alternatives(conjunct, key)) is not None:
            unions.append(union)
    sources = [[*found, *_spans(ends)] for found, ends in zip(columns, bounds, strict=True)]
    return Recipe((*unions, *_products(sources)))


def _products(columns: list[list[Source]]) -> Iterator[tuple[Product]]:
    """Yield unions of one product each, in which every source has its say."""
    if not all(columns):
        return
    for turn in range(max(map(len, columns))):
        yield (Product(tuple(sources[min(turn, len(sources) - 1)] for sources in columns)),)


@dataclass(frozen=True, slots=True)
class _Bound:
    """One end of a range of integers; ``is_open``: without the end itself."""

    bind: Bind
    is_low: bool
    is_open: bool


def _spans(bounds: list[_Bound]) -> Iterator[Span]:
    for low in bounds:
        for high in bounds:
            if low.is_low and not high.is_low:
                yield Span(low.bind, high.bind, above=low.is_open, below=high.is_open)


_BOUNDS: Mapping[Any, tuple[bool, bool]] = {
    operators.ge: (True, False),
    operators.gt: (True, True),
    operators.le: (False, False),
    operators.lt: (False, True),
}
"""Of ``column <operator> value``: is the value the low end, is it open."""

_MIRRORED: Mapping[Any, Any] = {
    operators.ge: operators.le,
    operators.gt: operators.lt,
    operators.le: operators.ge,
    operators.lt: operators.gt,
}


def _facts(conjunct: Conjunct, key: WantedKey) -> Iterator[tuple[int, Source | _Bound]]:
    """Yield what one conjunct says of a column of the key, with the index of the column."""
    for expression, operator, value in _comparisons(conjunct.condition):
        identity = column_of(expression, conjunct.block)
        if identity is None:
            continue
        root = key.root(identity)
        for index, wanted in enumerate(key.roots):
            if root == wanted:
                splits = key.is_used_once if identity == key.columns[index] else _never
                fact = _fact(operator, value, key.kinds[index], splits)
                if fact is not None:
                    yield index, fact


def _never(_: str) -> bool:
    """Say that a list is not to be split: its column is equal to the key, but not the key."""
    return False


def _comparisons(condition: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (expression, operator, value) of each comparison of a conjunct, from both its sides."""
    if not isinstance(condition, BinaryExpression):
        return
    operator = condition.operator
    if operator is operators.between_op:
        if not condition.modifiers.get("symmetric"):
            low, high = condition.right.clauses
            yield condition.left, operators.ge, low
            yield condition.left, operators.le, high
        return
    for left, right in _sides(condition):
        yield left, operator, right
        yield right, _MIRRORED.get(operator, operator), left


def _sides(condition: BinaryExpression[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs that a comparison compares: several for row values that are equal."""
    left, right = condition.left, condition.right
    if not (isinstance(left, Tuple) and isinstance(right, Tuple)):
        return [(left, right)]
    if condition.operator is not operators.eq:
        return []
    return list(zip(left.clauses, right.clauses, strict=False))


def _fact(
    operator: Any, value: Any, kind: KeyKind, splits: Callable[[str], bool]
) -> Source | _Bound | None:
    if operator in _BOUNDS:
        bind = _one(value, kind) if kind is KeyKind.INTEGER else None
        return None if bind is None else _Bound(bind, *_BOUNDS[operator])
    if operator is operators.is_not_distinct_from:
        return _one(value, kind, matches_null=True)
    if operator is operators.in_op:
        return _listed(value, kind, splits)
    if operator is not operators.eq:
        return None
    if isinstance(value, CollectionAggregate) and value.operator is operators.any_op:
        return _array(value.element, kind, splits)
    return _one(value, kind)


def _one(value: Any, kind: KeyKind, *, matches_null: bool = False) -> Bind | None:
    """Return the parameter that a key is compared with, read through its own type.

    Not through the column's: ``literal(x, OtherType)`` is sent as the other type stores it.
    """
    bind = _uncast(value)
    if not isinstance(bind, BindParameter) or bind.expanding or not _is_sent_as(bind.type, kind):
        return None
    return Bind(bind.key, False, bind.type, matches_null)


def _listed(value: Any, kind: KeyKind, splits: Callable[[str], bool]) -> Source | None:
    value = _ungrouped(value)
    if isinstance(value, BindParameter):
        if not value.expanding or not _is_sent_as(value.type, kind):
            return None
        return Bind(value.key, True, value.type, is_own=splits(value.key))
    return _one_of(value, kind) if isinstance(value, ClauseList) else None


def _array(value: Any, kind: KeyKind, splits: Callable[[str], bool]) -> Source | None:
    value = _ungrouped(value)
    if isinstance(value, BindParameter) and isinstance(value.type, ARRAY):
        item = value.type.item_type
        if _is_sent_as(item, kind) and (value.type.dimensions or 1) == 1:
            return Bind(value.key, True, item, is_own=splits(value.key))
        return None
    return _one_of(value, kind) if hasattr(value, "clauses") else None


def _one_of(values: Any, kind: KeyKind) -> OneOf | None:
    binds = [_one(value, kind) for value in values.clauses]
    known = tuple(bind for bind in binds if bind is not None)
    return OneOf(known) if len(known) == len(binds) else None


def _is_sent_as(type_: Any, kind: KeyKind) -> bool:
    """Say whether the comparison is one of the key's own type: no cast, no other collation."""
    return isinstance(type_, NullType) or kind_of(type_) is kind


def _ungrouped(expression: Any) -> Any:
    while isinstance(expression, Grouping):
        expression = expression.element
    return expression


def _uncast(expression: Any) -> Any:
    while True:
        if isinstance(expression, Grouping):
            expression = expression.element
        elif isinstance(expression, TypeCoerce):  # renders nothing
            if isinstance(expression.typed_expression, BindParameter):
                return expression.typed_expression
            expression = expression.clause
        elif isinstance(expression, Cast) and _changes_nothing(expression):
            expression = expression.clause
        else:
            return expression


def _changes_nothing(cast: Cast[Any]) -> bool:
    """Say whether a cast keeps every value: no shorter text, no smaller integer, no other type."""
    kind = kind_of(cast.type)
    if kind is None or kind is not kind_of(cast.clause.type):
        return False
    if kind is KeyKind.INTEGER:
        return isinstance(cast.type, BigInteger)
    return getattr(cast.type, "length", None) is None


# Alternatives


def _alternatives(conjunct: Conjunct, key: WantedKey) -> tuple[Alternative, ...] | None:
    """Return the whole keys of which a conjunct demands one, ``None`` where it does not.

    ``(k = 1 AND ...) OR k IN (2, 3)``, ``(a, b) IN ((1, 2), (3, 4))``.
    """
    condition = _ungrouped(conjunct.condition)
    if isinstance(condition, BinaryExpression):
        if condition.operator is operators.in_op and isinstance(condition.left, Tuple):
            return _row_values(condition.left, _ungrouped(condition.right), conjunct.block, key)
        return None
    if not isinstance(condition, BooleanClauseList) or condition.operator is not operators.or_:
        return None
    found: list[Alternative] = []
    for arm in condition.clauses:
        inside = recipe([Conjunct(part, conjunct.block) for part in split(arm)], key)
        if not inside.unions:
            return None
        found += inside.unions[0]
    return tuple(found)


def _row_values(
    left: Tuple, right: Any, block: Block, key: WantedKey
) -> tuple[Alternative, ...] | None:
    columns = [column_of(clause, block) for clause in left.clauses]
    classes = [None if column is None else key.root(column) for column in columns]
    if any(root not in classes for root in key.roots):
        return None
    positions = tuple(classes.index(root) for root in key.roots)
    if isinstance(right, BindParameter) and right.expanding:
        types = getattr(right.type, "types", ())
        if len(types) != len(columns):
            return None
        chosen = tuple(types[position] for position in positions)
        if not all(map(_is_sent_as, chosen, key.kinds)):
            return None
        is_own = tuple(columns[position] for position in positions) == key.columns
        is_own = is_own and key.is_used_once(right.key)
        return (Rows(Bind(right.key, True, right.type, is_own=is_own), positions, chosen),)
    if not isinstance(right, ClauseList):
        return None
    found = [_product(row, positions, key) for row in right.clauses]
    known = tuple(product for product in found if product is not None)
    return known if len(known) == len(found) else None


def _product(row: Any, positions: tuple[int, ...], key: WantedKey) -> Product | None:
    row = _ungrouped(row)
    if not isinstance(row, Tuple):
        return None
    parts = [row.clauses[position] for position in positions]
    binds = [_one(part, kind) for part, kind in zip(parts, key.kinds, strict=True)]
    known = tuple(bind for bind in binds if bind is not None)
    return Product(known) if len(known) == len(binds) else None
