"""Which order an SQL expression has in PostgreSQL, judged by its SQLAlchemy type.

It says whether Python can reproduce the order, or the equality, of an expression's values, and
refuses what it cannot prove: an unknown type, or text whose collation is not by code point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy import types
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    ClauseElement,
    CollationClause,
    ColumnClause,
    ColumnElement,
    Grouping,
    Label,
    TypeCoerce,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import FromClause, SelectBase
from sqlalchemy.sql.type_api import TypeDecorator, TypeEngine

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.combining import Conversion
from sqlroute.routing.keys import reference_dialect
from sqlroute.routing.ordering import Family

CODE_POINT_COLLATIONS = frozenset({"C", "POSIX", "ucs_basic", "pg_c_utf8", "C.UTF-8", "C.utf8"})
"""Collations of PostgreSQL that order text by code point, as Python orders ``str``."""


_KNOWN_COLLATION = re.compile(
    r"default|unicode|ucs_basic|pg_\w+|C|POSIX|C\.UTF-?8|.+-x-icu|[a-z]{2,3}_[A-Z]{2}.*", re.I
)
"""Collations of PostgreSQL and of libc: to all of them only the same text is equal."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By the name that renders a type, not by its class: CITEXT is a subclass of TEXT.
_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_names("smallint small_integer int integer bigint big_integer"), Family.NUMBER),
    **dict.fromkeys(_names("numeric decimal float double double_precision real"), Family.NUMBER),
    **dict.fromkeys(_names("string text varchar unicode unicode_text enum"), Family.TEXT),
    **dict.fromkeys(_names("datetime timestamp"), Family.TIMESTAMP),
    **dict.fromkeys(_names("large_binary bytea"), Family.BYTES),
    "boolean": Family.BOOLEAN,
    "date": Family.DATE,
    "time": Family.TIME,
    "uuid": Family.UUID,
    "char": Family.TEXT,
}

_NUMBERS = _names(
    """
    length char_length character_length octet_length bit_length ascii strpos position
    cardinality array_length array_position num_nulls num_nonnulls width_bucket date_part
    extract mod div gcd lcm sign sqrt cbrt exp ln log log10 power pow pi sin cos tan asin acos
    atan atan2 degrees radians regexp_count regexp_instr scale min_scale factorial
    """
)
_TEXTS = _names(
    """
    concat concat_ws initcap left right lpad rpad md5 quote_ident quote_literal regexp_replace
    regexp_substr repeat replace split_part to_char to_hex translate chr format
    """
)
_TEXT_OF_TEXT = frozenset(
    {"lower", "upper", "trim", "btrim", "ltrim", "rtrim", "substr", "substring", "reverse"}
)
_LIKE_ARGUMENT = frozenset(
    {"abs", "ceil", "ceiling", "floor", "round", "trunc", "coalesce", "greatest", "least", "nullif"}
)
_MOMENTS = frozenset(
    {"date_trunc", "date_bin", "to_timestamp", "make_timestamp", "make_timestamptz"}
)
_DAYS = frozenset({"date", "to_date", "make_date"})
_CLOCKS = _names(
    """
    now current_timestamp current_time current_date localtimestamp localtime transaction_timestamp
    statement_timestamp
    """
)
"""Functions with one value for all rows of a statement, on one server."""


def storage_type(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that PostgreSQL stores, behind decorators and variants."""
    for _ in range(10):  # a decorator of a decorator; never this deep
        variant = type_._variant_mapping.get("postgresql")
        if variant is not None:
            type_ = variant
        elif isinstance(type_, types.Interval):
            break  # a decorator whose implementation is not that of PostgreSQL
        elif isinstance(type_, TypeDecorator):
            type_ = type_.load_dialect_impl(reference_dialect())
        else:
            break
    return type_


def is_loaded_as_stored(type_: TypeEngine[Any]) -> bool:
    """Say whether SQLAlchemy gives values of the type as psycopg loads them."""
    if type_._variant_mapping or not type(type_).__module__.startswith("sqlalchemy."):
        return False
    if isinstance(type_, types.Float):
        return not type_.asdecimal
    if isinstance(type_, types.Numeric):
        return type_.asdecimal
    if isinstance(type_, types.Uuid):
        return type_.as_uuid
    plain = (
        types.Integer,
        types.Boolean,
        types.DateTime,
        types.Date,
        types.Time,
        types.LargeBinary,
    )
    is_text = isinstance(type_, types.String) and not isinstance(type_, types.Enum)
    return is_text or isinstance(type_, plain)


def group_family(
    expression: ColumnElement[Any], text_order: TextOrder, clause: str = "GROUP BY"
) -> Family:
    """Return how values of an expression are told apart.

    Args:
        clause: to blame, as SQL words.

    Raises:
        CrossShardRefused: equal values of its type may not be equal in Python, or those of one
            server are not equal on two.
    """
    check_clock(expression, clause)
    stored = storage_type(expression.type)
    if isinstance(stored, types.Enum):
        return Family.LABEL if stored.native_enum else Family.TEXT
    collation = getattr(stored, "collation", None)
    if collation is not None and _KNOWN_COLLATION.fullmatch(collation) is None:
        raise _refused(expression, clause, f"collation {collation} may take unlike texts for equal")
    family = _family(expression, stored, clause)
    if family is Family.TEXT and (column := _among(text_order.loose, expression)):
        raise _refused(
            expression, clause, f"the collation of {column} may take unlike texts for equal"
        )
    return family


def check_clock(expression: ColumnElement[Any], clause: str) -> None:
    """Refuse what has the time of each shard in it, where rows of several are compared by it.

    Whether something was before that time is a fact of a row, as it is in WHERE.

    Raises:
        CrossShardRefused: says how to have one time for all.
    """
    pending: list[Any] = [expression]
    while pending:
        part = pending.pop()
        if is_source(part) or isinstance(getattr(part, "type", None), types.Boolean):
            continue
        name = str(getattr(part, "name", "")).lower()
        if isinstance(part, FunctionElement) and name in _CLOCKS:
            raise CrossShardRefused(
                clause, f"{name}() is another time on each shard; pass the time as a parameter"
            )
        pending.extend(part.get_children())


def list_family(expression: ColumnElement[Any], clause: str) -> Family:
    """Return of what kind the values of an array are that psycopg loads one by one.

    Raises:
        CrossShardRefused: an array of them is loaded differently.
    """
    stored = storage_type(expression.type)
    if isinstance(stored, types.Enum) and stored.native_enum:
        raise _refused(expression, clause, "an array of enums is no list to psycopg; cast() it")
    return _family(expression, stored, clause)


def has_rank(expression: ColumnElement[Any]) -> bool:
    """Say whether an expression is a column of an enum, which is ordered by its definition."""
    stored = storage_type(expression.type)
    is_enum = isinstance(stored, types.Enum) and stored.native_enum
    return is_enum and isinstance(bare(expression), ColumnClause)


def is_moment_column(expression: ColumnElement[Any]) -> bool:
    """Say whether an expression is a column of moments that Python may have no values for.

    Some dates and timestamps are infinite, and a day ends at the time 24:00.
    """
    stored = storage_type(expression.type)
    is_moment = isinstance(stored, types.Date | types.DateTime | types.Time)
    return is_moment and isinstance(bare(expression), ColumnClause)


def order_family(expression: ColumnElement[Any], clause: str, text_order: TextOrder) -> Family:
    """Return how values of an expression are ordered.

    Args:
        clause: to blame, as SQL words.

    Raises:
        CrossShardRefused: Python cannot order them as PostgreSQL does.
    """
    stored = storage_type(expression.type)
    if isinstance(stored, types.Enum) and stored.native_enum:
        raise _refused(expression, clause, "an enum is ordered by its definition, not by its text")
    collated = _collated(expression)
    operand = stored if collated is None else storage_type(collated.type)
    if isinstance(operand, types.CHAR):
        raise _refused(expression, clause, "char(n) ignores trailing blanks; cast it to text")
    family = _family(expression, stored, clause)
    if family is Family.TEXT and not _is_by_code_point(expression, stored, text_order):
        raise _refused(
            expression, clause, 'its collation does not order by code point; add .collate("C")'
        )
    return family


def number_conversion(type_: TypeEngine[Any], clause: str) -> Conversion | None:
    """Return what SQLAlchemy does to a number of the type, ``None`` for nothing.

    Raises:
        CrossShardRefused: the type is none of SQLAlchemy's number types.
    """
    if isinstance(type_, types.Float | types.Numeric):
        # Chosen by psycopg's dialect from the column's own type, so by the value here.
        return Conversion(type_._effective_decimal_return_scale if type_.asdecimal else None)
    if isinstance(type_, types.Integer | types.NullType):
        return None
    raise CrossShardRefused(
        clause,
        f"its result is declared as {type_!r}; use type_coerce() of the argument to a number type",
    )


def is_single_precision(type_: TypeEngine[Any]) -> bool:
    """Say whether PostgreSQL stores the type as real."""
    stored = storage_type(type_)
    if isinstance(stored, types.REAL):
        return True
    return isinstance(stored, types.Float) and (stored.precision or 53) <= 24


def words(expression: ClauseElement) -> str:
    """Return an expression as one line of SQL words, for messages and plans."""
    try:
        text = str(expression)
    except Exception:  # a message must not fail; what cannot be rendered alone has a class
        return type(expression).__name__
    return " ".join(text.split())


def is_source(element: object) -> bool:
    """Say whether an element gives rows. A function is a FromClause to SQLAlchemy, and a value."""
    is_from = isinstance(element, SelectBase | FromClause)
    return is_from and not isinstance(element, ColumnElement)


def inside(expression: ClauseElement) -> Iterator[ClauseElement]:
    """Yield an expression and all parts of it that belong to the same SELECT."""
    pending: list[Any] = [expression]
    while pending:
        element = pending.pop()
        if is_source(element):
            continue
        yield element
        pending.extend(element.get_children())


def _family(expression: ColumnElement[Any], stored: TypeEngine[Any], clause: str) -> Family:
    collated = _collated(expression)
    if collated is not None:  # citext stays citext under COLLATE, whatever SQLAlchemy says of it
        return _family(collated, storage_type(collated.type), clause)
    if isinstance(stored, types.NullType):
        found = _family_of_function(expression, clause)
        if found is not None:
            return found
        raise _refused(expression, clause, "its type is not known; wrap it in cast()")
    if isinstance(stored, types.Time) and stored.timezone:
        raise _refused(expression, clause, "time with time zone has no such order in Python")
    if isinstance(stored, types.Uuid) and not stored.native_uuid:
        raise _refused(expression, clause, "a uuid stored as char(32); cast it to uuid")
    family = _FAMILIES.get(stored.__visit_name__.lower())
    if family is not None:
        return family
    raise _refused(
        expression, clause, f"Python cannot compare {stored!r} as PostgreSQL does; cast() it"
    )


def _family_of_function(expression: ColumnElement[Any], clause: str) -> Family | None:
    """Return the family of a well-known function that SQLAlchemy has no result type for."""
    function = bare(expression)
    if not isinstance(function, FunctionElement):
        return None
    name = str(getattr(function, "name", "")).lower()
    if name in _NUMBERS:
        return Family.NUMBER
    if name in _TEXTS:
        return Family.TEXT
    if name in _DAYS:
        return Family.DATE
    arguments = [_argument_family(argument, clause) for argument in function.clauses]
    if name in _MOMENTS and None not in arguments:  # of an interval it is an interval
        return Family.TIMESTAMP
    known = [family for family in arguments if family is not None]
    if name in _TEXT_OF_TEXT and arguments[:1] == [Family.TEXT]:
        return Family.TEXT
    if name in _LIKE_ARGUMENT and len(set(known)) == 1:
        return known[0]
    return None


def _argument_family(argument: Any, clause: str) -> Family | None:
    try:
        return _family(argument, storage_type(argument.type), clause)
    except CrossShardRefused:
        return None


def _is_by_code_point(
    expression: ColumnElement[Any], stored: TypeEngine[Any], text_order: TextOrder
) -> bool:
    top = bare(expression)
    if isinstance(top, BinaryExpression) and top.operator is operators.collate:
        return getattr(top.right, "collation", None) in CODE_POINT_COLLATIONS
    if _among(text_order.others, top):
        return False
    if text_order.by_code_point:
        return all(name in CODE_POINT_COLLATIONS for name in _collations(top))
    # Elsewhere in an expression a collation may get lost; of a column it is known.
    collation = getattr(stored, "collation", None)
    return isinstance(top, ColumnClause) and collation in CODE_POINT_COLLATIONS


def _collations(expression: ColumnElement[Any]) -> Iterator[str]:
    """Yield every collation in an expression, also in the subqueries its columns come from."""
    for part in inside(expression):
        if isinstance(part, CollationClause):
            yield part.collation
        elif isinstance(part, ColumnClause):
            collation = getattr(storage_type(part.type), "collation", None)
            if collation is not None:
                yield collation
            for proxy in part._proxies:
                yield from _collations(proxy)


def _among(columns: frozenset[str], expression: ColumnElement[Any]) -> str:
    """Return one of these columns that an expression uses, nothing if it uses none.

    A column whose table is not known may be any of its name.
    """
    for part in inside(expression) if columns else ():
        if not isinstance(part, ColumnClause):
            continue
        table = getattr(part, "table", None)
        for name in columns:
            of_table, _, column = name.rpartition(".")
            if part.name == column and getattr(table, "name", of_table) == of_table:
                return name
        for base in (*part._proxies, *(part.base_columns - {part})):
            if found := _among(columns, base):
                return found
    return ""


def _collated(expression: ColumnElement[Any]) -> ColumnElement[Any] | None:
    """Return what stands under the COLLATE of an expression, ``None`` when it has none."""
    top = bare(expression)
    if isinstance(top, BinaryExpression) and top.operator is operators.collate:
        operand: ColumnElement[Any] = bare(top.left)
        return operand
    return None


def bare(expression: Any) -> Any:
    """Return an expression without its label and parentheses."""
    while isinstance(expression, Label | Grouping | TypeCoerce):
        expression = expression.clause if isinstance(expression, TypeCoerce) else expression.element
    return expression


def _refused(expression: ColumnElement[Any], clause: str, why: str) -> CrossShardRefused:
    return CrossShardRefused(clause, f"{words(expression)} ({expression.type!r}): {why}")
