"""Write reference tables everywhere: run once on the first shard, copy the rows to the others.

Copying rows instead of repeating statements keeps all shards equal whatever the statement is:
sequences, ``now()``, random values and triggers run once. The first shard's row locks order
concurrent writers; :mod:`sqlroute.runtime.commit` makes the copies one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Text, bindparam, cast, event, select, tuple_
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.engine import Connection, CursorResult, Result
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.dml import Delete, Update
from sqlalchemy.sql.schema import Table

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.declare import Reference, declaration


def write_everywhere(
    statement: Any,
    table: Table,
    run: Callable[[Any], Result[Any]],
    others: Sequence[Connection],
) -> Result[Any]:
    """Run an INSERT, UPDATE or DELETE of a reference table on one shard, copy its rows to others.

    Args:
        run: executes on the first shard.

    Returns:
        The first shard's result; its ``rowcount`` is that of the statement.

    Raises:
        CrossShardRefused: the statement has a RETURNING of its own, or the table no primary key.
    """
    if getattr(statement, "_returning", ()):
        raise CrossShardRefused(
            "RETURNING", f"of reference table {table.fullname}; read the rows after writing them"
        )
    if not table.primary_key.columns:
        raise CrossShardRefused(table.fullname, "a reference table needs a primary key")
    _check_keys_stay(statement, table)
    is_delete = isinstance(statement, Delete)
    wanted = table.primary_key.columns if is_delete else _as_text(table)
    result = run(statement.returning(*wanted))
    rows = [tuple(row) for row in result]
    (_delete if is_delete else _put)(table, rows, others)
    if not isinstance(result, CursorResult):  # the ORM's, which has none for RETURNING
        result.rowcount = len(rows)  # type: ignore[attr-defined]  # made here
    return result


def _check_keys_stay(statement: Any, table: Table) -> None:
    """Refuse an UPDATE of the primary key: RETURNING tells of new keys only.

    Raises:
        CrossShardRefused: it sets a column of the primary key.
    """
    if not isinstance(statement, Update):
        return
    ordered = getattr(statement, "_ordered_values", None) or ()
    named = [*(statement._values or {}), *(name for name, _ in ordered)]
    names = {str(getattr(name, "key", name)) for name in named}
    keys = {str(column.key) for column in table.primary_key.columns} & names
    if keys:
        raise CrossShardRefused(
            f"UPDATE of {', '.join(sorted(keys))}",
            f"the primary key of reference table {table.fullname}; change the objects and flush, "
            "or delete the rows and insert them",
        )


def copy_after_flush(mapper: Mapper[Any]) -> None:
    """See to it that each row a flush writes for this mapper is copied at once.

    At once, because rows of other tables in the same flush may refer to it, on every shard.
    """
    if not event.contains(mapper, "after_insert", _inserted):
        event.listen(mapper, "after_insert", _inserted)
        event.listen(mapper, "after_update", _updated)
        event.listen(mapper, "after_delete", _deleted)


def _inserted(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    _copy(connection, target, None, mapper.primary_key_from_instance(target))


def _updated(mapper: Mapper[Any], connection: Connection, target: Any) -> None:
    _copy(connection, target, _old_key(target), mapper.primary_key_from_instance(target))


def _deleted(_: Mapper[Any], connection: Connection, target: Any) -> None:
    _copy(connection, target, _old_key(target), None)


def _old_key(target: Any) -> Sequence[Any]:
    key: Sequence[Any] = sa_inspect(target).key[1]
    return key


def _copy(
    first: Connection, target: Any, old: Sequence[Any] | None, new: Sequence[Any] | None
) -> None:
    """Make the other shards' row equal to the first shard's."""
    state = sa_inspect(target)
    others_of = getattr(state.session, "_others", None)
    if others_of is None:
        return  # a plain Session on one database
    tables = state.mapper.tables  # of a joined inheritance the parent's first
    for table in tables if new is not None else reversed(tables):
        if isinstance(declaration(table), Reference):
            others = others_of(table)
            if new is None:
                _delete(table, [tuple(old or ())], others)
            elif old is None or tuple(old) == tuple(new):
                _put(table, [_row(table, new, first)], others)
            else:
                _replace(table, tuple(old), _row(table, new, first), others)


def _row(table: Table, key: Sequence[Any], connection: Connection) -> tuple[Any, ...]:
    columns = table.primary_key.columns
    wanted = [column == value for column, value in zip(columns, key, strict=True)]
    return tuple(connection.execute(select(*_as_text(table)).where(*wanted)).one())


def _columns(table: Table) -> list[Any]:
    return [column for column in table.columns if column.computed is None]


def _as_text(table: Table) -> list[Any]:
    """Return the columns as PostgreSQL writes them: exact, where a type of Python may not be."""
    return [cast(column, Text).label(f"v{i}") for i, column in enumerate(_columns(table))]


def _from_text(table: Table) -> dict[Any, Any]:
    return {
        column.name: cast(bindparam(f"v{i}", type_=Text), column.type)
        for i, column in enumerate(_columns(table))
    }


def _values(row: tuple[Any, ...]) -> dict[str, Any]:
    return {f"v{i}": value for i, value in enumerate(row)}


def _put(table: Table, rows: list[tuple[Any, ...]], others: Sequence[Connection]) -> None:
    if not rows:
        return
    from sqlalchemy.dialects.postgresql import insert as upsert

    keys = set(table.primary_key.columns)
    statement = upsert(table).values(_from_text(table))
    changed = {c.name: statement.excluded[c.name] for c in _columns(table) if c not in keys}
    names = [column.name for column in table.primary_key.columns]
    on_conflict: dict[str, Any] = {"index_elements": names}
    put = (
        statement.on_conflict_do_update(set_=changed, **on_conflict)
        if changed
        else statement.on_conflict_do_nothing(**on_conflict)
    )
    for connection in others:
        connection.execute(put, [_values(row) for row in rows])


def _replace(
    table: Table, key: tuple[Any, ...], row: tuple[Any, ...], others: Sequence[Connection]
) -> None:
    """Change a row and its primary key, as the first shard did: by an UPDATE, for what cascades."""
    wanted = [c == value for c, value in zip(table.primary_key.columns, key, strict=True)]
    statement = table.update().where(*wanted).values(_from_text(table))
    for connection in others:
        connection.execute(statement, _values(row))


def _delete(table: Table, keys: list[tuple[Any, ...]], others: Sequence[Connection]) -> None:
    if not keys:
        return
    statement = table.delete().where(tuple_(*table.primary_key.columns).in_(keys))
    for connection in others:
        connection.execute(statement)
