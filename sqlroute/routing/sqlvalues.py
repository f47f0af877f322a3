"""Read constants and parameters of SQL text as the column that they are compared with reads them.

Errs to one side: a value that PostgreSQL might read in another way is no value here, so that it
restricts nothing.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import types
from sqlalchemy.sql.type_api import TypeEngine

from sqlroute.routing.hashing import KeyKind

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import Dialect

Node: TypeAlias = Mapping[str, Any]
"""A node of the parse tree, or the value of one: ``{"ColumnRef": {"fields": [...]}}``."""

_CASTS: Mapping[str, KeyKind] = {
    **dict.fromkeys(("int2", "int4", "int8", "smallint", "integer", "bigint"), KeyKind.INTEGER),
    **dict.fromkeys(("text", "varchar"), KeyKind.TEXT),
    "uuid": KeyKind.UUID,
}


def constant(node: Node, kind: KeyKind, *, many: bool = False) -> tuple[int | None, Any] | None:
    """Return (number of the parameter, value) of a constant, ``None`` for anything else.

    A cast is looked through only where it cannot change the value: to the kind of the column, and
    from a quoted literal, a parameter or a number of that kind.
    """
    if "TypeCast" in node:
        cast = node["TypeCast"]
        type_ = cast["typeName"]
        names = [part["String"]["sval"] for part in type_.get("names", [])]
        is_array = "arrayBounds" in type_
        if _CASTS.get(names[-1]) is not kind or "typmods" in type_ or is_array != many:
            return None
        return constant(cast["arg"], kind, many=many)
    if "ParamRef" in node:
        return node["ParamRef"].get("number", 0), None
    if "A_Const" not in node:
        return None
    value = node["A_Const"]
    if value.get("isnull"):
        return (None, None) if not many else None
    if "sval" in value:
        return None, value["sval"].get("sval", "")
    if kind is not KeyKind.INTEGER or many:
        return None
    if "ival" in value:
        return None, value["ival"].get("ival", 0)
    digits = value.get("fval", {}).get("fval", "")
    if re.fullmatch(r"-?\d{1,18}", digits):
        return None, int(digits)
    return None


def read(value: Any, kind: KeyKind) -> Any:
    """Return a value as the column's type reads it.

    Raises:
        ValueError: it is not certain how PostgreSQL would read it.
    """
    if not isinstance(value, str) or kind is KeyKind.TEXT:
        return value
    if kind is KeyKind.UUID:
        return uuid.UUID(value)
    if not re.fullmatch(r"\s*[+-]?\d{1,19}\s*", value, re.ASCII):
        raise ValueError(value)
    return int(value)


def array(value: Any) -> list[Any]:
    """Return the elements of an array given as a sequence or as ``{a,b}``.

    Raises:
        ValueError: it is written in a way that only PostgreSQL reads.
    """
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if not isinstance(value, str) or not re.fullmatch(r'\{[^{}"\\]*\}', value):
        raise ValueError(value)
    inner = value[1:-1].strip()
    items = [item.strip() for item in inner.split(",")] if inner else []
    return [None if item.upper() == "NULL" else item for item in items]


def type_of(kind: KeyKind | None) -> TypeEngine[Any]:
    """Return the type of a column that PostgreSQL hashes so."""
    if kind is KeyKind.INTEGER:
        return types.BigInteger()
    if kind is KeyKind.TEXT:
        return types.Text()
    return types.Uuid() if kind is KeyKind.UUID else types.NULLTYPE


class ReadAs(types.TypeDecorator[Any]):
    """The type of a parameter in SQL text: its own, then read as a column of a kind reads it."""

    impl = types.Text
    cache_ok = True

    def __init__(self, kind: KeyKind, own: TypeEngine[Any] = types.NULLTYPE) -> None:
        super().__init__()
        self.kind = kind
        self.own = own

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return type_of(self.kind).dialect_impl(dialect)

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        sent = self.own.dialect_impl(dialect).bind_processor(dialect)

        def process(value: Any) -> Any:
            value = value if sent is None else sent(value)
            try:
                return read(value, self.kind)
            except ValueError:
                raise Unreadable(value) from None

        return process


class Unreadable(KeyError):
    """A value of which it is not certain how PostgreSQL would read it."""
