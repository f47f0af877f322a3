"""Find the shard key in each row of an INSERT, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.sql.dml import Insert
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.schema import Table

from sqlroute.errors import MissingShardKey
from sqlroute.routing.declare import ShardKey, shard_key
from sqlroute.routing.keys import bucket_of_row

Row = Mapping[str, Any]


def keyed_rows(statement: Insert, parameters: Any) -> tuple[list[dict[str, Any]], list[Row]]:
    """Return (parameter rows, key rows) of an INSERT.

    A key that only a Python-side default would give is made here and added to the parameters, so
    that the row is placed by the value that is stored.

    Raises:
        MissingShardKey: a row has no value for a key column that is known before it is sent.
    """
    table = statement.table
    assert isinstance(table, Table)
    key = shard_key(table)
    names = _names(statement, table, key)
    if statement.select is not None:
        raise MissingShardKey(
            f"INSERT ... SELECT into {table.fullname}: the keys ({key}) of its rows are not known "
            "before it runs; read the rows first and insert them"
        )
    given = [parameters] if isinstance(parameters, Mapping) else list(parameters or [{}])
    if statement._multi_values:
        rows = [_by_name(row, table) for rows in statement._multi_values for row in rows]
        return [], [_key_row(_bound(row, given[0]), names, table, None) for row in rows]
    fixed = _by_name(statement._values or {}, table)
    filled = [dict(row) for row in given]
    keys = [_key_row({**_bound(fixed, row), **row}, names, table, row) for row in filled]
    return filled, keys


def bucket_of_key(table: Table, row: Row, buckets: int) -> int:
    """Return the bucket of a row given as column key -> value.

    Raises:
        MissingShardKey: a key column is missing or NULL.
        InvalidShardKey: a value that its type cannot hold.
    """
    key = shard_key(table)
    values = [row.get(name) for name in key.names]
    if None in values:
        raise missing(table, key)
    return bucket_of_row(values, (table.c[name].type for name in key.names), key.kinds, buckets)


def missing(table: Table, key: ShardKey) -> MissingShardKey:
    return MissingShardKey(
        f"a row of {table.fullname} needs its shard key ({key}) before it is sent; give it a value "
        "or a Python-side default such as uuid4, the server cannot make it"
    )


def _names(statement: Insert, table: Table, key: ShardKey) -> dict[str, tuple[str, ...]]:
    """Return for each key column the names that a row may use for it: ORM attributes differ."""
    subject = statement._propagate_attrs.get("plugin_subject")
    mapper: Any = getattr(subject, "mapper", None)
    names: dict[str, tuple[str, ...]] = {}
    for name in key.names:
        column = table.c[name]
        known = [name, column.name]
        if mapper is not None:
            known.insert(0, mapper.get_property_by_column(column).key)
        names[name] = tuple(dict.fromkeys(known))
    return names


def _by_name(values: Any, table: Table) -> dict[str, Any]:
    if isinstance(values, Sequence):
        values = dict(zip(table.columns.keys(), values, strict=False))
    return {str(getattr(name, "key", name)): value for name, value in values.items()}


def _bound(values: Row, parameters: Row) -> dict[str, Any]:
    """Return the values of one row, those of its bind parameters filled in."""
    return {
        name: parameters.get(value.key, value.effective_value)
        if isinstance(value, BindParameter)
        else value
        for name, value in values.items()
    }


def _key_row(
    row: Row, names: dict[str, tuple[str, ...]], table: Table, fill: dict[str, Any] | None
) -> Row:
    found: dict[str, Any] = {}
    for column, spellings in names.items():
        value = next((row[name] for name in spellings if row.get(name) is not None), None)
        if value is None and fill is not None:
            value = python_default(table, column)
            if value is not None:
                fill[spellings[0]] = value
        if value is None or hasattr(value, "get_children"):  # absent, or an SQL expression
            raise missing(table, shard_key(table))
        found[column] = value
    return found


def python_default(table: Table, column: str) -> Any:
    """Return a new value of a column's Python-side default, ``None`` if it has none."""
    default: Any = table.c[column].default
    if default is None or default.is_sequence or default.is_clause_element:
        return None
    return default.arg(None) if default.is_callable else default.arg
