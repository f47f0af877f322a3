"""Which buckets a statement's conditions allow, as a recipe made once per shape.

A recipe names bind parameters, not values: evaluating it for one execution costs the look-up of
its values and one hash per key. It errs to one side only: a bucket it leaves out cannot hold a
matching row; what it cannot prove it leaves in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy.sql.type_api import TypeDecorator, TypeEngine

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.sqlvalues import array

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Dialect

Values = Callable[[str], Any]
"""Gives the value of a bind parameter by its key; raises KeyError when it has none."""

MAX_KEYS = 10_000
"""Beyond so many keys a statement goes to every shard: hashing them would cost more."""


class Unproved(Exception):  # no error: the condition restricts nothing in this execution
    """What a condition compares the key with is not known, or too much."""


# Where the values of one key column come from


@dataclass(frozen=True, slots=True)
class Bind:
    """The value, or the list of values, of one bind parameter.

    Attributes:
        key: of the bind parameter.
        many: the parameter holds a list (``IN``, ``= ANY``).
        type: its own; the bind processor of that type makes the value that is sent.
        matches_null: NULL is a value like any other (``IS NOT DISTINCT FROM``).
        is_own: nothing else in the statement uses the list, so that each shard may be sent just
            its values of it.
    """

    key: str
    many: bool
    type: TypeEngine[Any]
    matches_null: bool = False
    is_own: bool = False

    def given(self, values: Values) -> Sequence[Any]:
        """Return the values of one execution as the caller gave them.

        Raises:
            Unproved: it has none, or an iterator, which can be read only once.
        """
        try:
            value = values(self.key)
        except KeyError:
            raise Unproved from None
        if not self.many:
            return (value,)
        if value is None:  # ``= ANY(NULL)`` matches no row
            return ()
        if isinstance(value, str):  # PostgreSQL reads ``'{1,2}'`` as an array
            try:
                return array(value)
            except ValueError:
                raise Unproved from None
        if not isinstance(value, Collection):
            raise Unproved
        return list(value)

    def stored(self, values: Values, most: int) -> list[Any]:
        """Return the values of one execution as the database stores them.

        Args:
            most: more of them are not worth hashing.

        Raises:
            Unproved: not known, or more than that.
        """
        given = self.given(values)
        if len(given) > most or (self.matches_null and None in given):
            raise Unproved
        return [_stored(value, self.type) for value in given]


@dataclass(frozen=True, slots=True)
class OneOf:
    """A list that is written out: ``IN (1, :two, 3)``."""

    binds: tuple[Bind, ...]

    def stored(self, values: Values, most: int) -> list[Any]:
        return [value for bind in self.binds for value in bind.stored(values, most)]


@dataclass(frozen=True, slots=True)
class Span:
    """The integers between two parameters: ``BETWEEN``, ``>= AND <``.

    Attributes:
        above, below: the bound itself is not meant.
    """

    low: Bind
    high: Bind
    above: bool = False
    below: bool = False

    def stored(self, values: Values, most: int) -> list[Any]:
        """Return every integer between the bounds, none where a bound is NULL.

        Raises:
            Unproved: there are more than ``most``, or a bound is no integer.
        """
        (low,), (high,) = self.low.stored(values, 1), self.high.stored(values, 1)
        if low is None or high is None:
            return []
        if type(low) is not int or type(high) is not int:
            raise Unproved
        first, last = low + self.above, high - self.below
        if last - first >= most:
            raise Unproved
        return list(range(first, last + 1))


Source: TypeAlias = Bind | OneOf | Span


# Whole keys


@dataclass(frozen=True, slots=True)
class Product:
    """All combinations of the values of each key column: ``a = 1 AND b IN (2, 3)``."""

    columns: tuple[Source, ...]

    def keys(self, values: Values, buckets: int) -> Iterator[tuple[Any, ...]]:
        """Yield the keys of one execution.

        Raises:
            Unproved: they are not known, or too many.
        """
        return product(*_bounded([_column(c, values, buckets) for c in self.columns]))

    def shared(self, values: Values, buckets: int) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """Yield (parameter, value of its list, a key with that value) for lists that can be split.

        Raises:
            Unproved: as :meth:`keys`.
        """
        columns = [_column(column, values, buckets) for column in self.columns]
        for index, column in enumerate(self.columns):
            if not isinstance(column, Bind) or not (column.many and column.is_own):
                continue
            for given, value in zip(column.given(values), columns[index], strict=True):
                around = [*columns[:index], [value], *columns[index + 1 :]]
                for key in product(*_bounded(around)):
                    yield column.key, given, key


@dataclass(frozen=True, slots=True)
class Rows:
    """A list of row values that hold the key: ``(a, b) IN ((1, 2), (3, 4))``.

    Attributes:
        positions: of the columns of the key in each row.
        bind: its type is that of a row.
    """

    bind: Bind
    positions: tuple[int, ...]
    types: tuple[TypeEngine[Any], ...]

    def keys(self, values: Values, _buckets: int) -> Iterator[tuple[Any, ...]]:
        """Yield the keys of one execution.

        Raises:
            Unproved: they are not known, or too many.
        """
        given = self.bind.given(values)
        if len(given) > MAX_KEYS:
            raise Unproved
        return (self._key(row) for row in given)

    def shared(self, values: Values, buckets: int) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
        """Yield (parameter, row of its list, the key in it), if the list can be split.

        Raises:
            Unproved: as :meth:`keys`.
        """
        if self.bind.is_own:
            rows = self.bind.given(values)
            for row, key in zip(rows, self.keys(values, buckets), strict=True):
                yield self.bind.key, row, key

    def _key(self, row: Any) -> tuple[Any, ...]:
        try:
            parts = [row[position] for position in self.positions]
        except (TypeError, IndexError, KeyError):
            raise Unproved from None
        return tuple(_stored(part, type_) for part, type_ in zip(parts, self.types, strict=True))


Alternative: TypeAlias = Product | Rows


@dataclass(frozen=True, slots=True)
class Recipe:
    """An intersection of unions of whole keys; empty means that every bucket is possible.

    A union of nothing allows no bucket: ``WHERE false``.
    """

    unions: tuple[tuple[Alternative, ...], ...] = ()

    @property
    def is_keyed(self) -> bool:
        return bool(self.unions)

    @property
    def binds(self) -> Iterator[Bind]:
        """Every parameter that has a say."""
        for union in self.unions:
            for alternative in union:
                yield from _binds(alternative)

    def simple(self) -> Bind | None:
        """Return the parameter of ``key = :parameter`` when the recipe is no more than that."""
        if len(self.unions) != 1 or len(self.unions[0]) != 1:
            return None
        only = self.unions[0][0]
        if not isinstance(only, Product) or len(only.columns) != 1:
            return None
        bind = only.columns[0]
        return bind if isinstance(bind, Bind) and not (bind.many or bind.matches_null) else None

    def both(self, other: Recipe) -> Recipe:
        return Recipe((*self.unions, *other.unions))

    def buckets(
        self, values: Values, kinds: tuple[KeyKind, ...], buckets: int
    ) -> frozenset[int] | None:
        """Return the buckets that can hold a matching row, ``None`` for all of them.

        A NULL matches no row. A value of another Python type than the key's is not hashed, since
        PostgreSQL would compare it after a cast: then all buckets are possible.
        """
        allowed: frozenset[int] | None = None
        for union in self.unions:
            found = _union(union, values, kinds, buckets)
            if found is not None:
                allowed = found if allowed is None else allowed & found
        return allowed

    def shares(
        self,
        values: Values,
        kinds: tuple[KeyKind, ...],
        buckets: int,
        owner: Callable[[int], str],
    ) -> Mapping[str, Mapping[str, list[Any]]]:
        """Return by parameter, then by shard, the values of a list that the shard can match.

        Of lists that can be split only: another value of the list is on no row of that shard.
        """
        found: dict[str, dict[str, list[Any]]] = {}
        for union in self.unions:
            for alternative in union:
                shares = _shares(alternative, values, kinds, buckets, owner)
                if shares is not None:
                    found.update(shares)
        return found


def _binds(alternative: Alternative) -> Iterator[Bind]:
    if isinstance(alternative, Rows):
        yield alternative.bind
        return
    for column in alternative.columns:
        if isinstance(column, Bind):
            yield column
        elif isinstance(column, OneOf):
            yield from column.binds
        else:
            yield from (column.low, column.high)


def _column(column: Source, values: Values, buckets: int) -> list[Any]:
    return column.stored(values, buckets if isinstance(column, Span) else MAX_KEYS)


def _bounded(columns: list[list[Any]]) -> list[list[Any]]:
    combinations = 1
    for column in columns:
        combinations *= len(column)
    if combinations > MAX_KEYS:
        raise Unproved
    return columns


def _union(
    union: tuple[Alternative, ...], values: Values, kinds: tuple[KeyKind, ...], buckets: int
) -> frozenset[int] | None:
    found: set[int] = set()
    try:
        for alternative in union:
            for key in alternative.keys(values, buckets):
                if None not in key:
                    found.add(bucket_of(key, kinds, buckets))
    except (Unproved, InvalidShardKey):
        return None
    return frozenset(found)


def _shares(
    alternative: Alternative,
    values: Values,
    kinds: tuple[KeyKind, ...],
    buckets: int,
    owner: Callable[[int], str],
) -> Mapping[str, dict[str, list[Any]]] | None:
    """Return the shares of the lists of one alternative, ``None`` where it proves nothing."""
    found: dict[str, dict[str, list[Any]]] = {}
    try:
        for parameter, value, key in alternative.shared(values, buckets):
            shares = found.setdefault(parameter, {})
            if None in key:
                continue
            share = shares.setdefault(owner(bucket_of(key, kinds, buckets)), [])
            if not share or share[-1] is not value:
                share.append(value)
    except (Unproved, InvalidShardKey):
        return None
    return found


def _stored(value: Any, type_: TypeEngine[Any]) -> Any:
    """Return the value as the database stores it.

    Raises:
        Unproved: the type knows no such value; the statement will fail where it is sent.
    """
    try:
        return stored(value, type_)
    except KeyError:
        raise Unproved from None


def stored(value: Any, type_: TypeEngine[Any]) -> Any:
    """Return the value as the database stores it: through the type's own bind processing."""
    if value is None or (type(value) is int and not isinstance(type_, TypeDecorator)):
        return value
    processor = _processor(type_)
    return value if processor is None else processor(value)


def bucket_of_row(
    key: Iterable[Any],
    types: Iterable[TypeEngine[Any]],
    kinds: tuple[KeyKind, ...],
    buckets: int,
) -> int:
    """Return the bucket of a row to be written.

    Raises:
        InvalidShardKey: a value that the key's type cannot hold.
    """
    values = tuple(stored(value, type_) for value, type_ in zip(key, types, strict=True))
    return bucket_of(values, kinds, buckets)


_processors: dict[TypeEngine[Any], Callable[[Any], Any] | None] = {}


def _processor(type_: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    try:
        return _processors[type_]
    except KeyError:
        dialect = reference_dialect()
        processor = type_.dialect_impl(dialect).bind_processor(dialect)
        if len(_processors) > 1000:
            _processors.clear()
        return _processors.setdefault(type_, processor)


@cache
def reference_dialect() -> Dialect:
    """Return the dialect that statements are described with; it never connects."""
    from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

    return PGDialect_psycopg()  # type: ignore[no-untyped-call]  # not annotated
