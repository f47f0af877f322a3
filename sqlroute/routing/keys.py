"""Which buckets a statement's conditions allow, as a recipe made once per shape.

A recipe names bind parameters, not values: evaluating it for one execution costs the look-up of
its values and one hash per key. It errs to one side only: a bucket it leaves out cannot hold a
matching row; what it cannot prove it leaves in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from sqlalchemy.sql.type_api import TypeDecorator, TypeEngine

from sqlroute.errors import InvalidShardKey
from sqlroute.routing.hashing import KeyKind, bucket_of

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Dialect

Values = Callable[[str], Any]
"""Gives the value of a bind parameter by its key; raises KeyError when it has none."""

MAX_KEYS = 10_000
"""Beyond so many keys a statement goes to every shard: hashing them would cost more."""


@dataclass(frozen=True, slots=True)
class Bind:
    """The value, or the list of values, of one bind parameter.

    Attributes:
        key: of the bind parameter.
        many: the parameter holds a list (``IN``, ``= ANY``).
        type: its own; the bind processor of that type makes the value that is sent.
    """

    key: str
    many: bool
    type: TypeEngine[Any]

    def read(self, values: Values) -> Sequence[Any]:
        """Return the values of one execution.

        Raises:
            KeyError: it has none, or an iterator, which can be read only once.
        """
        value = values(self.key)
        if not self.many:
            return (value,)
        if value is None:  # ``= ANY(NULL)`` matches no row
            return ()
        if not isinstance(value, Collection):
            raise KeyError(self.key)
        return list(value)


@dataclass(frozen=True, slots=True)
class Product:
    """All combinations of the values of each key column: ``a = 1 AND b IN (2, 3)``."""

    columns: tuple[Bind, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """An intersection of unions of products; empty means that every bucket is possible."""

    unions: tuple[tuple[Product, ...], ...] = ()

    @property
    def is_keyed(self) -> bool:
        return bool(self.unions)

    def simple(self) -> Bind | None:
        """Return the parameter of ``key = :parameter`` when the recipe is no more than that."""
        if len(self.unions) != 1 or len(self.unions[0]) != 1:
            return None
        columns = self.unions[0][0].columns
        return columns[0] if len(columns) == 1 and not columns[0].many else None

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


def _union(
    union: tuple[Product, ...], values: Values, kinds: tuple[KeyKind, ...], buckets: int
) -> frozenset[int] | None:
    found: set[int] = set()
    for alternative in union:
        try:
            columns = [
                [stored(value, bind.type) for value in bind.read(values)]
                for bind in alternative.columns
            ]
        except KeyError:
            return None
        combinations = 1
        for column in columns:
            combinations *= len(column)
        if combinations > MAX_KEYS:
            return None
        for key in product(*columns):
            if None in key:
                continue
            try:
                found.add(bucket_of(key, kinds, buckets))
            except InvalidShardKey:
                return None
    return frozenset(found)


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
