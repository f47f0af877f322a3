"""The pitfalls, each as one or more scenarios: run against a contender, say what was observed.

A scenario does what an application does and returns what came of it in a few words. An error of
the contender is an outcome too, by its type and SQLSTATE. Which outcome is wanted stands beside it.
Numbers are those of the project's list of pitfalls of routing in ``get_bind``; number 0 holds what
is no pitfall of the list but a price that somebody pays.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import exc, func, orm, select
from sqlalchemy.dialects import postgresql

from sqlroute import Router

from .contenders import Contender, NotOffered, Sqlroute
from .models import Box, Item, Parcel, ShardedBase, Slot, bumping
from .servers import World, ask, until, url

Scenario = Callable[[Any], str]

PORT = func.inet_server_port()
TENANT = func.current_setting("app.tenant", True)
TICKET = sa.Sequence("ticket")

CORRECT = "correct"
PRIMARY = "on the primary"
REPLICA = "on a replica"


@dataclass(frozen=True, slots=True)
class Case:
    """One scenario.

    Attributes:
        number: of the pitfall.
        title: what the application does.
        wanted: outcomes that are right; the first is what sqlroute promises.
        place: the servers it runs on: ``main``, ``pair``, or ``shards``.
    """

    number: int
    name: str
    title: str
    wanted: tuple[str, ...]
    place: str
    scenario: Scenario


CASES: list[Case] = []


def pitfall(
    number: int, title: str, *wanted: str, place: str = "main"
) -> Callable[[Scenario], Scenario]:
    """Enter a scenario of a pitfall; without ``wanted`` the wanted outcome is "correct"."""

    def enter(scenario: Scenario) -> Scenario:
        name = scenario.__name__
        CASES.append(Case(number, name, title, wanted or (CORRECT,), place, scenario))
        return scenario

    return enter


def observe(case: Case, contender: Contender) -> str:
    """Run a scenario in a context of its own and say what came of it."""
    try:
        return contextvars.copy_context().run(case.scenario, contender)
    except NotOffered as missing:
        return f"not offered ({missing})"
    except (exc.SQLAlchemyError, psycopg.Error) as error:
        return failure(error)
    except Exception as error:  # a fault of the contender's: no outcome that anybody wants
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def failure(error: BaseException) -> str:
    """Name an error by its type, and by its SQLSTATE when the server raised it."""
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    name = type(error).__name__ if state is None else f"{type(error).__name__} {state}"
    return f"error: {name} (read-only)" if state == "25006" else f"error: {name}"


def compared(read: Any, wrote: Any) -> str:
    """Say whether what was read is what was written."""
    return CORRECT if read == wrote else f"old value read ({read}, wrote {wrote})"


def stored(found: Any, expected: Any) -> str:
    """Say whether the primary holds what it should."""
    return CORRECT if found == expected else f"the primary holds {found} instead of {expected}"


def where(c: Contender, nodes: list[str]) -> str:
    """Say in words on which nodes statements ran."""
    primary = c.servers.primary.name
    replicas = {node for node in nodes if node != primary}
    if not replicas:
        return PRIMARY
    on_replicas = REPLICA if len(replicas) == 1 else f"on {len(replicas)} replicas"
    return f"{on_replicas} and the primary" if primary in nodes else on_replicas


@contextmanager
def stored_box(c: Contender, session: orm.Session) -> Iterator[Box]:
    """Give a box that the session has loaded."""
    box = session.get(Box, c.servers.row())
    assert box is not None
    yield box


# 1 to 6: own writes


@pitfall(1, "add, commit, read an attribute")
def add_commit_attribute(c: Contender) -> str:
    with c.session() as session:
        box = Box(id=c.servers.new(), value=77)
        session.add(box)
        session.commit()
        return compared(box.value, 77)


@pitfall(1, "the same, with AsyncSession (`await session.refresh`)")
def add_commit_attribute_async(c: Contender) -> str:
    async def main() -> str:
        async with c.async_session() as session:
            box = Box(id=c.servers.new(), value=77)
            session.add(box)
            await session.commit()
            await session.refresh(box)
            return compared(box.value, 77)

    return c.run(main())


@pitfall(1, "add, commit, `session.get` after `expunge_all`, `expire_on_commit=False`")
def add_commit_get(c: Contender) -> str:
    with c.session(expire_on_commit=False) as session:
        box = Box(id=c.servers.new(), value=77)
        session.add(box)
        session.commit()
        session.expunge_all()
        found = session.get(Box, box.id)
        return compared(found.value if found else None, 77)


@pitfall(2, "change, commit, read the attribute")
def change_commit_attribute(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        box.value = 77
        session.commit()
        return compared(box.value, 77)


@pitfall(2, "write 77, commit, `value += 1`, commit")
def change_twice(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        box.value = 77
        session.commit()
        box.value += 1
        session.commit()
        found = c.servers.value(box.id)
        return CORRECT if found == 78 else f"lost update ({found} stored, 78 expected)"


@pitfall(
    2,
    "another program writes 10; load (replica: 1), `value += 1`, commit",
    "error: StaleObjectRead",
    CORRECT,
)
def change_a_stale_object(c: Contender) -> str:
    row = c.servers.row()
    c.servers.written(row, 10)
    with c.session() as session:
        box = session.get_one(Box, row)
        box.value += 1
        session.commit()
    found = c.servers.value(row)
    return CORRECT if found == 11 else f"lost update ({found} stored, 11 expected)"


@pitfall(3, "add, commit, `session.refresh`")
def add_commit_refresh(c: Contender) -> str:
    with c.session() as session:
        box = Box(id=c.servers.new(), value=77)
        session.add(box)
        session.commit()
        session.refresh(box)
        return compared(box.value, 77)


@pitfall(4, "flush a child, lazy-load the parent's collection in the same transaction")
def flush_then_lazy_load(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        session.add(Item(id=c.servers.new(), box_id=box.id))
        session.flush()
        found = len(box.items)
        return CORRECT if found == 1 else f"{found} of 1 children read"


@pitfall(4, "the same after the commit")
def commit_then_lazy_load(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        session.add(Item(id=c.servers.new(), box_id=box.id))
        session.commit()
        found = len(box.items)
        return CORRECT if found == 1 else f"{found} of 1 children read"


@pitfall(5, "read, write, read again in one transaction")
def read_write_read(c: Contender) -> str:
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    with c.session() as session:
        session.scalar(value)
        session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        return compared(session.scalar(value), 77)


@pitfall(5, "the same inside `with session.begin():`; nodes used", PRIMARY)
def read_write_read_begun(c: Contender) -> str:
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    with c.session() as session, c.ran() as nodes, session.begin():
        session.scalar(value)
        session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        session.scalar(value)
    return where(c, nodes)


@pitfall(5, "the same, announced by `with session.writing():`; nodes used", PRIMARY)
def read_write_read_announced(c: Contender) -> str:
    c.need("declared intents")
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    session: Any
    with c.session() as session, c.ran() as nodes, session.writing():
        session.scalar(value)
        session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        session.scalar(value)
        session.commit()
    return where(c, nodes)


@pitfall(6, "`session.merge` of a row that no replica has yet, commit")
def merge_a_new_row(c: Contender) -> str:
    row = c.servers.new()
    c.servers.written(row, 1)
    with c.session() as session:
        session.merge(Box(id=row, value=77))
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(6, "`session.merge` with the value that the stale replica still shows, commit")
def merge_a_changed_row(c: Contender) -> str:
    row = c.servers.row()
    c.servers.written(row, 5)
    with c.session() as session:
        session.merge(Box(id=row, value=1))
        session.commit()
    return stored(c.servers.value(row), 1)


# 7 to 14: what is a read


def locked(c: Contender, row: int) -> str:
    """Say whether a row is locked on the primary."""
    try:
        c.servers.on_primary(f"SELECT 1 FROM box WHERE id = {row} FOR UPDATE NOWAIT")
    except psycopg.errors.LockNotAvailable:
        return "locked"
    return "not locked"


@pitfall(7, "`select(...).with_for_update()`", "locked")
def select_for_update(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.scalars(select(Box).where(Box.id == row).with_for_update()).one()
        return locked(c, row)


@pitfall(7, "`session.get(..., with_for_update=True)`", "locked")
def get_for_update(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.get(Box, row, with_for_update=True)
        return locked(c, row)


@pitfall(7, "`session.refresh(box, with_for_update=True)`", "locked")
def refresh_for_update(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        session.refresh(box, with_for_update=True)
        return locked(c, box.id)


@pitfall(7, "FOR UPDATE in a subquery", "locked")
def subquery_for_update(c: Contender) -> str:
    row = c.servers.row()
    inner = select(Box.id).where(Box.id == row).with_for_update().subquery()
    with c.session() as session:
        session.execute(select(inner.c.id)).one()
        return locked(c, row)


@pitfall(7, "FOR SHARE in a CTE, with AsyncSession", "locked")
def cte_for_share_async(c: Contender) -> str:
    row = c.servers.row()
    inner = select(Box.id).where(Box.id == row).with_for_update(read=True).cte()

    async def main() -> str:
        async with c.async_session() as session:
            (await session.execute(select(inner.c.id))).one()
            return locked(c, row)

    return c.run(main())


def ran_where(c: Contender, statement: Any) -> str:
    with c.session() as session:
        with c.ran() as nodes:
            session.execute(statement)
        session.commit()
        return where(c, nodes)


@pitfall(8, "`select(func.nextval(...))`", PRIMARY)
def select_nextval(c: Contender) -> str:
    return ran_where(c, select(func.nextval("ticket")))


@pitfall(8, "`session.scalar(Sequence(...))`", PRIMARY)
def scalar_sequence(c: Contender) -> str:
    with c.session() as session:
        with c.ran() as nodes:
            session.scalar(TICKET)
        session.commit()
        return where(c, nodes)


@pitfall(8, "`select(sequence.next_value())`", PRIMARY)
def select_next_value(c: Contender) -> str:
    return ran_where(c, select(TICKET.next_value()))


@pitfall(8, "`select(func.setval(...))`", PRIMARY)
def select_setval(c: Contender) -> str:
    return ran_where(c, select(func.setval("ticket", 1000)))


@pitfall(8, "a user's VOLATILE function that writes", PRIMARY)
def select_volatile(c: Contender) -> str:
    before = c.servers.on_primary("SELECT count(*) FROM bumps")
    found = ran_where(c, select(func.bump()))
    after = c.servers.on_primary("SELECT count(*) FROM bumps")
    return found if after == before + 1 else f"{found}, {after - before} rows written"


@pitfall(8, "a view that hides such a function", CORRECT)
def select_hidden_volatile(c: Contender) -> str:
    before = c.servers.on_primary("SELECT count(*) FROM bumps")
    with c.session() as session:
        session.execute(select(bumping.c.bumped)).one()
        session.commit()
    written = c.servers.on_primary("SELECT count(*) FROM bumps") - before
    return CORRECT if written == 1 else f"{written} rows written instead of 1"


@pitfall(8, "a user's IMMUTABLE function", REPLICA)
def select_immutable(c: Contender) -> str:
    return ran_where(c, select(func.twice(21)))


@pitfall(9, '`text("INSERT ...")`, commit')
def text_insert(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        session.execute(sa.text("INSERT INTO box (id, value) VALUES (:id, 77)"), {"id": row})
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(9, '`text("WITH ... INSERT ... SELECT")`, commit')
def text_cte_insert(c: Contender) -> str:
    row = c.servers.new()
    statement = (
        "WITH made AS (INSERT INTO box (id, value) VALUES (:id, 77) RETURNING id) "
        "SELECT id FROM made"
    )
    with c.session() as session:
        session.execute(sa.text(statement), {"id": row})
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(9, '`session.connection().exec_driver_sql("INSERT ...")`, commit')
def driver_sql_insert(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        session.connection().exec_driver_sql(f"INSERT INTO box (id, value) VALUES ({row}, 77)")
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(9, '`text("SELECT ...")` after the own commit')
def text_select_after_commit(c: Contender) -> str:
    with c.session() as session:
        row = c.servers.new()
        session.add(Box(id=row, value=77))
        session.commit()
        statement = sa.text("SELECT value FROM box WHERE id = :id")
        return compared(session.scalar(statement, {"id": row}), 77)


@pitfall(9, '`text("SELECT ...")` of plain columns, no write before', REPLICA)
def text_select(c: Contender) -> str:
    return ran_where(c, sa.text("SELECT value FROM box WHERE id = :id").bindparams(id=1))


def inserting(row: int) -> Any:
    return sa.insert(Box).values(id=row, value=77).returning(Box.id).cte()


@pitfall(10, "SELECT from a CTE that inserts, commit")
def cte_insert(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        session.execute(select(inserting(row).c.id)).one()
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(10, "the CTE that inserts nested in a subquery, commit")
def nested_cte_insert(c: Contender) -> str:
    row = c.servers.new()
    inner = select(inserting(row).c.id).subquery()
    with c.session() as session:
        session.execute(select(func.count()).select_from(inner)).one()
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(10, "the CTE that inserts in a UNION, ORM entities read, commit")
def union_cte_insert(c: Contender) -> str:
    row = c.servers.new()
    ids = sa.union_all(select(inserting(row).c.id), select(Box.id).where(Box.id == 1)).subquery()
    with c.session() as session:
        session.scalars(select(Box).where(Box.id.in_(select(ids.c.id)))).all()
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(11, "`session.connection()`: the node", PRIMARY)
def bare_connection(c: Contender) -> str:
    with c.session() as session:
        return c.servers.place(session.connection().scalar(select(PORT)) or 0)


@pitfall(11, "`await session.connection()`: the node", PRIMARY)
def bare_connection_async(c: Contender) -> str:
    async def main() -> str:
        async with c.async_session() as session:
            connection = await session.connection()
            return c.servers.place(await connection.scalar(select(PORT)) or 0)

    return c.run(main())


@pitfall(11, "INSERT on `session.connection()`, then `session.scalar(select(...))`")
def connection_then_select(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        session.connection().execute(sa.insert(Box).values(id=row, value=77))
        return compared(session.scalar(select(Box.value).where(Box.id == row)), 77)


def updated(c: Contender, how: str) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        session.execute(
            sa.update(Box).where(Box.id == box.id).values(value=Box.value + 76),
            execution_options={"synchronize_session": how},
        )
        seen = box.value
        session.commit()
        final = stored(c.servers.value(box.id), 77)
        return compared(seen, 77) if final == CORRECT else final


@pitfall(12, 'ORM UPDATE with `synchronize_session="fetch"`')
def update_fetch(c: Contender) -> str:
    return updated(c, "fetch")


@pitfall(12, 'ORM UPDATE with `synchronize_session="evaluate"`')
def update_evaluate(c: Contender) -> str:
    return updated(c, "evaluate")


@pitfall(12, 'ORM DELETE with `synchronize_session="fetch"`')
def delete_fetch(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        row = box.id
        session.execute(
            sa.delete(Box).where(Box.id == row),
            execution_options={"synchronize_session": "fetch"},
        )
        gone = box not in session
        session.commit()
        return stored(c.servers.value(row), None) if gone else "the object is still in the session"


@pitfall(13, "`session.query(Box).filter(...).delete()`, commit")
def query_delete(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.query(Box).filter(Box.id == row).delete()
        session.commit()
    return stored(c.servers.value(row), None)


@pitfall(13, "`session.query(Box).filter(...).update(...)`, read back, commit")
def query_update(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.query(Box).filter(Box.id == row).update({"value": 77})
        seen = session.query(Box.value).filter(Box.id == row).scalar()
        session.commit()
    final = stored(c.servers.value(row), 77)
    return compared(seen, 77) if final == CORRECT else final


def bulk(c: Contender, rows: list[int], write: Callable[[orm.Session], object]) -> str:
    """Write many rows; read them in the same transaction and after it."""
    count = select(func.count()).where(Box.id.in_(rows), Box.value == 77)
    with c.session() as session:
        write(session)
        during = session.scalar(count)
        session.commit()
        after = session.scalar(count)
    if during == after == len(rows):
        return CORRECT
    return f"{during} of {len(rows)} rows read in the transaction, {after} after it"


@pitfall(14, "`bulk_save_objects`, then read them")
def bulk_save_objects(c: Contender) -> str:
    rows = [c.servers.new() for _ in range(3)]
    boxes = [Box(id=row, value=77) for row in rows]
    return bulk(c, rows, lambda session: session.bulk_save_objects(boxes))


@pitfall(14, "`bulk_insert_mappings`, then read them")
def bulk_insert_mappings(c: Contender) -> str:
    rows = [c.servers.new() for _ in range(3)]
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(c, rows, lambda session: session.bulk_insert_mappings(Box, values))


@pitfall(14, "`bulk_update_mappings`, then read them")
def bulk_update_mappings(c: Contender) -> str:
    rows = [c.servers.row() for _ in range(3)]
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(c, rows, lambda session: session.bulk_update_mappings(Box, values))


@pitfall(14, "`execute(insert(Box), rows)`, then read them")
def bulk_insert(c: Contender) -> str:
    rows = [c.servers.new() for _ in range(3)]
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(c, rows, lambda session: session.execute(sa.insert(Box), values))


@pitfall(14, "`execute(update(Box), rows)` by primary key, then read them")
def bulk_update(c: Contender) -> str:
    rows = [c.servers.row() for _ in range(3)]
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(c, rows, lambda session: session.execute(sa.update(Box), values))


@pitfall(14, "`insert(Box).returning(Box)` of many rows, then read them")
def bulk_insert_returning(c: Contender) -> str:
    rows = [c.servers.new() for _ in range(3)]
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(
        c, rows, lambda session: session.scalars(sa.insert(Box).returning(Box), values).all()
    )


@pitfall(14, "upsert (`ON CONFLICT DO UPDATE`) of old and new rows, then read them")
def bulk_upsert(c: Contender) -> str:
    rows = [c.servers.row(), c.servers.new(), c.servers.new()]
    upsert = postgresql.insert(Box).on_conflict_do_update(index_elements=["id"], set_={"value": 77})
    values = [{"id": row, "value": 77} for row in rows]
    return bulk(c, rows, lambda session: session.execute(upsert, values))


# 15 to 22: transactions and connections


@pitfall(15, "`twophase=True`: read, write, commit, read back")
def two_phase(c: Contender) -> str:
    row = c.servers.row()
    with c.session(twophase=True) as session:
        box = session.get_one(Box, row)
        box.value = 77
        session.commit()
        seen = box.value
    left = c.servers.on_primary("SELECT count(*) FROM pg_prepared_xacts")
    if left:
        return f"{left} prepared transactions left behind"
    final = stored(c.servers.value(row), 77)
    return compared(seen, 77) if final == CORRECT else final


@pitfall(15, "`twophase=True`: only reads, commit")
def two_phase_reading(c: Contender) -> str:
    with c.session(twophase=True) as session:
        session.get_one(Box, c.servers.row())
        session.commit()
    return CORRECT


@pitfall(15, "`twophase=True`: `session.prepare()`, commit")
def two_phase_prepared(c: Contender) -> str:
    row = c.servers.row()
    with c.session(twophase=True) as session:
        session.get_one(Box, row).value = 77
        session.flush()
        session.prepare()
        session.commit()
    return stored(c.servers.value(row), 77)


@pitfall(16, "savepoints: write in one, undo another, read between")
def savepoints(c: Contender) -> str:
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    with c.session() as session:
        session.scalar(value)
        with session.begin_nested():
            session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        kept = session.scalar(value)
        undone = session.begin_nested()
        session.execute(sa.update(Box).where(Box.id == row).values(value=88))
        undone.rollback()
        seen = session.scalar(value)
        session.commit()
    if (kept, seen) != (77, 77):
        return compared(kept if kept != 77 else seen, 77)
    return stored(c.servers.value(row), 77)


@pitfall(16, "the same with ORM objects and AsyncSession")
def savepoints_async(c: Contender) -> str:
    row = c.servers.row()

    async def main() -> str:
        async with c.async_session() as session:
            box = await session.get_one(Box, row)
            async with session.begin_nested():
                box.value = 77
            await session.refresh(box)
            kept = box.value
            undone = await session.begin_nested()
            box.value = 88
            await session.flush()
            await undone.rollback()
            await session.refresh(box)
            seen = box.value
            await session.commit()
        if (kept, seen) != (77, 77):
            return compared(kept if kept != 77 else seen, 77)
        return stored(c.servers.value(row), 77)

    return c.run(main())


ISOLATION = func.current_setting("transaction_isolation")


def isolation_of_read(c: Contender, session: orm.Session) -> str:
    isolation, port = session.execute(select(ISOLATION, PORT)).one()
    return f"{isolation} {c.servers.place(port)}"


@pitfall(
    17,
    '`session.connection(execution_options={"isolation_level": "SERIALIZABLE"})`, read',
    "serializable on the primary",
)
def serializable_connection(c: Contender) -> str:
    with c.session() as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        return isolation_of_read(c, session)


@pitfall(
    17,
    '`Session(execution_options={"isolation_level": "SERIALIZABLE"})`, read',
    "serializable on the primary",
)
def serializable_session(c: Contender) -> str:
    with c.session(execution_options={"isolation_level": "SERIALIZABLE"}) as session:
        return isolation_of_read(c, session)


@pitfall(17, '`session.begin(isolation_level="SERIALIZABLE")`', "serializable on the primary")
def serializable_begin(c: Contender) -> str:
    c.need("options of begin")
    session: Any = c.session()
    with session, session.begin(isolation_level="SERIALIZABLE"):
        return isolation_of_read(c, session)


@pitfall(
    17,
    '`session.begin(isolation_level="SERIALIZABLE")`, a flush first, then a read',
    "serializable on the primary",
)
def serializable_flush(c: Contender) -> str:
    c.need("options of begin")
    session: Any = c.session()
    with session, session.begin(isolation_level="SERIALIZABLE"):
        session.add(Box(id=c.servers.new(), value=1))
        session.flush()
        return isolation_of_read(c, session)


def settled(seen: str | None) -> str:
    return CORRECT if seen == "7" else f"the setting is lost (read: {seen or 'none'})"


@pitfall(18, '`text("SET LOCAL app.tenant = 7")`, then read')
def set_local(c: Contender) -> str:
    with c.session() as session:
        session.execute(sa.text("SET LOCAL app.tenant = '7'"))
        seen = {session.scalar(select(TENANT)) for _ in range(6)}
        return settled(next((value for value in seen if value != "7"), "7"))


@pitfall(18, "`select(func.set_config(...))`, then read")
def set_config(c: Contender) -> str:
    with c.session() as session:
        session.execute(select(func.set_config("app.tenant", "7", True)))
        seen = {session.scalar(select(TENANT)) for _ in range(6)}
        return settled(next((value for value in seen if value != "7"), "7"))


@pitfall(18, "`set_config`, then INSERT of a row whose default is the setting")
def set_config_then_write(c: Contender) -> str:
    with c.session() as session:
        session.execute(select(func.set_config("app.tenant", "7", True)))
        box = Box(id=c.servers.new(), value=1)
        session.add(box)
        session.flush()
        row = box.id
        session.commit()
    return settled(c.servers.on_primary(f"SELECT tenant FROM box WHERE id = {row}"))


@pitfall(18, "`session.settings(...)`: read on a replica, write, read; then another session")
def settings(c: Contender) -> str:
    c.need("settings that travel")
    row = c.servers.new()
    session: Any
    with c.session() as session, c.ran() as nodes:
        session.settings(**{"app.tenant": "7"})
        seen = [session.scalar(select(TENANT)) for _ in range(3)]
        read_at = where(c, nodes)
        session.add(Box(id=row, value=1))
        session.commit()
        seen.append(session.scalar(select(TENANT)))
    seen.append(c.servers.on_primary(f"SELECT tenant FROM box WHERE id = {row}"))
    lost = next((value for value in seen if value != "7"), "7")
    if read_at != REPLICA or lost != "7":
        return f"{settled(lost)}, read {read_at}"
    leaked = set()
    for make in (select(TENANT), select(TENANT).with_for_update()):
        for _ in range(4):
            with c.session() as other:
                leaked.add(other.scalar(make) or "")
    return CORRECT if leaked == {""} else f"the next session reads {leaked}"


@pitfall(18, "the same with AsyncSession and the option `settings=`")
def settings_async(c: Contender) -> str:
    c.need("settings that travel")
    row = c.servers.new()

    async def main() -> str:
        async with c.async_session(settings={"app.tenant": "7"}) as session:
            seen = [await session.scalar(select(TENANT)) for _ in range(3)]
            session.add(Box(id=row, value=1))
            await session.commit()
            seen.append(await session.scalar(select(TENANT)))
        async with c.async_session() as session:
            leaked = {await session.scalar(select(TENANT)) or "" for _ in range(4)}
        seen.append(c.servers.on_primary(f"SELECT tenant FROM box WHERE id = {row}"))
        lost = next((value for value in seen if value != "7"), "7")
        if lost != "7":
            return settled(lost)
        return CORRECT if leaked == {""} else f"the next session reads {leaked}"

    return c.run(main())


def tenants(c: Contender, write: Callable[[Any, int], object]) -> str:
    """Write a row as the first statement of a session with settings; say what it was given."""
    row = c.servers.new()
    with c.session(settings={"app.tenant": "7"}) as session:
        write(session, row)
        session.commit()
    return settled(c.servers.on_primary(f"SELECT tenant FROM box WHERE id = {row}"))


@pitfall(18, "`settings=`, the first statement is a flush")
def settings_flush(c: Contender) -> str:
    c.need("settings that travel")
    return tenants(c, lambda session, row: session.add(Box(id=row, value=1)))


@pitfall(18, "`settings=`, the first statement is `bulk_insert_mappings`")
def settings_bulk(c: Contender) -> str:
    c.need("settings that travel")
    values = {"value": 1}
    return tenants(
        c, lambda session, row: session.bulk_insert_mappings(Box, [{"id": row, **values}])
    )


@pitfall(18, "`settings=`, the first statement is `execute(insert(Box), rows)`")
def settings_insert(c: Contender) -> str:
    c.need("settings that travel")
    values = {"value": 1}
    return tenants(c, lambda session, row: session.execute(sa.insert(Box), [{"id": row, **values}]))


@pitfall(18, "`settings=`, the first statement goes by `session.connection()`")
def settings_connection(c: Contender) -> str:
    c.need("settings that travel")
    return tenants(
        c,
        lambda session, row: session.connection().execute(sa.insert(Box).values(id=row, value=1)),
    )


@pitfall(18, "a setting changed after the first flush; a second flush, nothing read between")
def settings_changed(c: Contender) -> str:
    c.need("settings that travel")

    def write(session: Any, row: int) -> None:
        session.settings(**{"app.tenant": "6"})
        session.add(Box(id=c.servers.new(), value=1))
        session.flush()
        session.settings(**{"app.tenant": "7"})
        session.add(Box(id=row, value=1))
        session.flush()

    return tenants(c, write)


@pitfall(18, "a setting with a name that is none", "error: SettingRefused")
def settings_refused(c: Contender) -> str:
    c.need("settings that travel")
    session: Any
    with c.session() as session:
        session.settings(**{"app.tenant = '8'; --": "7"})
        session.scalar(select(TENANT))
    return "accepted"


@pitfall(
    18,
    "`set_config` by hand on one shard, then a read of all",
    "error: CrossShardRefused",
    place="shards",
)
def set_config_then_scatter(c: Contender) -> str:
    with c.session() as session:
        session.execute(
            select(func.set_config("app.tenant", "7", True)),
            execution_options={"sqlroute_shard": "s0"},
        )
        session.execute(select(func.count()).select_from(Parcel)).all()
    return "read with the setting on one shard only"


@pitfall(19, "another program holds an advisory lock on the primary; try to take it", "excluded")
def try_advisory_lock(c: Contender) -> str:
    key = c.servers.new()
    with psycopg.connect(**c.servers.primary.conninfo) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [key])
        with c.session() as session:
            taken = session.scalar(select(func.pg_try_advisory_xact_lock(key)))
            return "taken twice" if taken else "excluded"


@pitfall(19, "the session takes the lock; another program tries", "excluded")
def hold_advisory_lock(c: Contender) -> str:
    key = c.servers.new()
    with c.session() as session:
        session.execute(select(func.pg_advisory_xact_lock(key)))
        taken = c.servers.on_primary(f"SELECT pg_try_advisory_xact_lock({key})")
        return "taken twice" if taken else "excluded"


def scratch(c: Contender) -> sa.Table:
    name = f"scratch_{c.servers.new()}"
    return sa.Table(name, sa.MetaData(), sa.Column("n", sa.Integer), prefixes=["TEMPORARY"])


@pitfall(20, "temporary table by `create(session.connection())`, insert, select")
def temporary_table(c: Contender) -> str:
    table = scratch(c)
    with c.session() as session:
        table.create(session.connection())
        session.execute(sa.insert(table).values(n=77))
        return compared(session.scalar(select(table.c.n)), 77)


@pitfall(20, "temporary table by `execute(CreateTable(...))`, insert, select")
def temporary_table_by_ddl(c: Contender) -> str:
    table = scratch(c)
    with c.session() as session:
        session.execute(sa.schema.CreateTable(table))
        session.execute(sa.insert(table).values(n=77))
        return compared(session.scalar(select(table.c.n)), 77)


@pitfall(21, "connections held after a read, in an open session", "0", "1")
def held_after_read(c: Contender) -> str:
    with c.session() as session:
        session.scalars(select(Box).where(Box.id == 1)).all()
        return str(c.held())


@pitfall(21, "connections held after a read and a write, before the commit", "1")
def held_after_write(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.scalars(select(Box).where(Box.id == row)).all()
        session.execute(sa.update(Box).where(Box.id == row).values(value=2))
        return str(c.held())


@pitfall(21, "35 sessions at once, each after one read; pools of 5 + 10 connections")
def many_sessions(c: Contender) -> str:
    sessions = [c.session() for _ in range(35)]
    try:
        for session in sessions:
            session.scalar(select(Box.value).where(Box.id == 1))
        return f"{c.held()} connections held" if c.held() else CORRECT
    finally:
        for session in sessions:
            session.close()


@pitfall(22, "10 reads of one transaction: nodes", REPLICA, PRIMARY)
def one_transaction(c: Contender) -> str:
    with c.session() as session, c.ran() as nodes:
        for _ in range(10):
            session.scalar(select(Box.value).where(Box.id == 1))
    return where(c, nodes)


def monotonic(seen: list[Any]) -> str:
    newest = seen.index(77) if 77 in seen else len(seen)
    backwards = seen[newest:].count(1)
    if newest == len(seen):
        return f"the new value never read in {len(seen)} reads"
    return CORRECT if not backwards else "time runs backwards: the old value after the new one"


@pitfall(22, "one replica is behind: a session reads the new value, then 40 transactions read it")
def monotonic_in_a_session(c: Contender) -> str:
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    with c.servers.following(c.servers.replicas[0]):
        c.servers.written(row, 77)
        c.servers.settle(c.servers.replicas[0])
        for _ in range(40):
            with c.session() as session:
                seen = [session.scalar(value)]
                if seen != [77]:
                    continue  # began on the replica that is behind, as the next session may not
                for _ in range(40):
                    session.commit()
                    seen.append(session.scalar(value))
                break
    return monotonic(seen)


@pitfall(22, "the same, a session per request, the token handed on")
def monotonic_over_requests(c: Contender) -> str:
    c.need("tokens")
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    token: str | None = None
    with c.servers.following(c.servers.replicas[0]):
        c.servers.written(row, 77)
        c.servers.settle(c.servers.replicas[0])
        seen = []
        for _ in range(40):
            session: Any
            with c.session(token=token) as session:
                seen.append(session.scalar(value))
                if seen[-1] == 77:
                    token = str(session.token)
    return monotonic(seen)


# 23, 24: servers that change


@pitfall(23, "the primary becomes a replica under pooled connections; write, commit", place="pair")
def demoted_primary(c: Contender) -> str:
    row, key = c.servers.new(), c.servers.new()
    with c.session() as session:
        session.add(Box(id=key, value=1))
        session.commit()
    c.servers.switch()
    failures = []
    for _ in range(4):
        try:
            with c.session() as session:
                session.add(Box(id=row, value=77))
                session.commit()
                break
        except exc.SQLAlchemyError as error:
            failures.append(failure(error))
    if c.servers.value(row) == 77:
        return CORRECT if len(failures) <= 1 else f"written after {len(failures)} errors"
    return f"{len(failures)} of 4 writes fail, the last: {failures[-1]}"


@pitfall(24, "the replica cancels a read by a recovery conflict (40001)", place="pair")
def recovery_conflict(c: Contender) -> str:
    replica = c.servers.replicas[0]
    ask(replica, "ALTER SYSTEM SET max_standby_streaming_delay = 0")
    ask(replica, "SELECT pg_reload_conf()")
    until(lambda: ask(replica, "SHOW max_standby_streaming_delay")[0][0] == "0")
    slow = select(Box.value, func.pg_sleep(1.5)).where(Box.id == 1)
    running = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT box.value, pg_sleep%'"
    running += " AND state = 'active'"

    def read() -> str:
        with c.session() as session:
            return compared(session.execute(slow).one().value, 1)

    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(read)
            until(lambda: answer.done() or ask(replica, running))
            # The replica must take this lock too, and may not wait for readers.
            c.servers.on_primary("BEGIN; LOCK TABLE box IN ACCESS EXCLUSIVE MODE; COMMIT")
            return answer.result()
    finally:
        ask(replica, "ALTER SYSTEM RESET max_standby_streaming_delay")
        ask(replica, "SELECT pg_reload_conf()")


# 25, 26: shards, snapshots


@pitfall(
    25,
    "objects of two shards in one session: load, change, refresh, merge, commit",
    place="shards",
)
def identity_over_shards(c: Sqlroute) -> str:
    parcels = Parcel.__table__
    router = c.router
    assert isinstance(parcels, sa.Table)
    homes: dict[str, int] = {}
    for key in range(1, 1000):
        homes.setdefault(router.locate(parcels, (key,))[1], key)
        if len(homes) == 2:
            break
    keys = sorted(homes.values())
    with c.session() as session:
        session.add_all([Parcel(id=key, value=1) for key in keys])
        session.commit()
        session.expunge_all()
        found = session.scalars(select(Parcel).where(Parcel.id.in_(keys))).all()
        tokens = {parcel.id: sa.inspect(parcel).identity_token for parcel in found}
        if tokens != {key: shard for shard, key in homes.items()}:
            return f"identity tokens {tokens}"
        for parcel in found:
            parcel.value = parcel.id
        session.commit()
        for parcel in found:
            session.refresh(parcel)
            if session.get(Parcel, parcel.id) is not parcel:
                return "one row is two objects"
            session.merge(Parcel(id=parcel.id, value=parcel.id + 1))
        session.commit()
    stored_at = {}
    for shard, key in homes.items():
        node = router.topology.shard(shard).nodes[0]
        engine = router.engines(is_async=False).engine(node.name)
        with engine.connect() as connection:
            rows = connection.execute(select(Parcel.id, Parcel.value)).all()
        stored_at[key] = [tuple(row) for row in rows]
    wanted = {key: [(key, key + 1)] for key in keys}
    return CORRECT if stored_at == wanted else f"stored {stored_at}"


@pitfall(
    26,
    'two reads at `isolation_level="REPEATABLE READ"` by `session.connection(...)`',
    "repeatable read on the primary",
    "repeatable read on a replica",
)
def repeatable_read_connection(c: Contender) -> str:
    with c.session() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        seen = [isolation_of_read(c, session) for _ in range(6)]
    return ", ".join(dict.fromkeys(seen))


@pitfall(
    26,
    '`begin(read_only=True, isolation_level="REPEATABLE READ")`: a write is replayed between reads',
    "one snapshot, repeatable read on a replica",
)
def repeatable_read_replica(c: Contender) -> str:
    c.need("options of begin")
    row = c.servers.row()
    value = select(Box.value).where(Box.id == row)
    session: Any = c.session()
    with (
        c.servers.following(),
        session,
        session.begin(read_only=True, isolation_level="REPEATABLE READ"),
    ):
        where_read = isolation_of_read(c, session)
        before = session.scalar(value)
        c.servers.written(row, 77)
        c.servers.settle()
        after = session.scalar(value)
    snapshots = "one snapshot" if (before, after) == (1, 1) else f"read {before}, then {after}"
    return f"{snapshots}, {where_read}"


@pitfall(26, "`begin(read_only=True)`, then a write", "error: ReadOnlyRefused; the session goes on")
def read_only_then_write(c: Contender) -> str:
    c.need("options of begin")
    row = c.servers.row()
    session: Any
    with c.session() as session:
        try:
            with session.begin(read_only=True):
                session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        except exc.SQLAlchemyError as error:
            refused = failure(error)
        else:
            refused = "accepted"
        session.execute(sa.update(Box).where(Box.id == row).values(value=78))
        session.commit()
        goes_on = session.scalar(select(Box.value).where(Box.id == row)) == 78
    return f"{refused}; the session {'goes on' if goes_on else 'is broken'}"


# 27 to 30


@pitfall(27, "another session commits between the own flush and the own read")
def foreign_commit(c: Contender) -> str:
    row = c.servers.row()
    with c.session() as session:
        session.execute(sa.update(Box).where(Box.id == row).values(value=77))
        with c.session() as other:
            other.execute(sa.update(Box).where(Box.id == c.servers.row()).values(value=2))
            other.commit()
        return compared(session.scalar(select(Box.value).where(Box.id == row)), 77)


@pitfall(27, "commit, then `refresh` in another thread")
def refresh_in_a_thread(c: Contender) -> str:
    with c.session() as session:
        box = session.get_one(Box, c.servers.row())
        box.value = 77
        session.commit()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(session.refresh, box).result()
        return compared(box.value, 77)


@pitfall(27, "commit, then `refresh` in another task (AsyncSession)")
def refresh_in_a_task(c: Contender) -> str:
    async def main() -> str:
        async with c.async_session() as session:
            box = await session.get_one(Box, c.servers.row())
            box.value = 77
            await session.commit()
            await asyncio.create_task(session.refresh(box))
            return compared(box.value, 77)

    return c.run(main())


@pitfall(27, "write in one task, read in a child task, before the commit")
def read_in_a_child_task(c: Contender) -> str:
    row = c.servers.row()

    async def main() -> str:
        async with c.async_session() as session:
            update = sa.update(Box).where(Box.id == row).values(value=77)
            await asyncio.create_task(session.execute(update))
            value = session.scalar(select(Box.value).where(Box.id == row))
            return compared(await asyncio.create_task(value), 77)

    return c.run(main())


@pitfall(27, "commit; a new session (the next request), given the token if there is one, reads")
def next_request(c: Contender) -> str:
    row = c.servers.row()
    first: Any
    with c.session() as first:
        first.execute(sa.update(Box).where(Box.id == row).values(value=77))
        first.commit()
        options = {"token": str(first.token)} if "tokens" in c.offers else {}
    with c.session(**options) as session:
        return compared(session.scalar(select(Box.value).where(Box.id == row)), 77)


@pitfall(27, "the same with AsyncSession in another task")
def next_request_async(c: Contender) -> str:
    row = c.servers.row()

    async def write() -> dict[str, Any]:
        session: Any
        async with c.async_session() as session:
            await session.execute(sa.update(Box).where(Box.id == row).values(value=77))
            await session.commit()
            return {"token": str(await session.token)} if "tokens" in c.offers else {}

    async def main() -> str:
        options = await asyncio.create_task(write())
        async with c.async_session(**options) as session:
            return compared(await session.scalar(select(Box.value).where(Box.id == row)), 77)

    return c.run(main())


@pitfall(28, "add, flush, read a server default (`eager_defaults` off)")
def server_default_after_flush(c: Contender) -> str:
    with c.session() as session:
        box = Box(id=c.servers.new(), value=77)
        session.add(box)
        session.flush()
        return compared(box.made_by, "the server")


@pitfall(28, "the same after the commit")
def server_default_after_commit(c: Contender) -> str:
    with c.session() as session:
        box = Box(id=c.servers.new(), value=77)
        session.add(box)
        session.commit()
        return compared(box.made_by, "the server")


@pitfall(28, "`insert(Box).returning(Box)`: objects and their lazy loads")
def insert_returning(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        insert = sa.insert(Box).values(id=row, value=77).returning(Box)
        box = session.scalars(insert).one()
        session.add(Item(id=c.servers.new(), box_id=row))
        session.flush()
        if len(box.items) != 1:
            return f"{len(box.items)} of 1 children read"
        return compared((box.value, box.made_by), (77, "the server"))


@pitfall(29, "nodes listed in any order, the replica first: write, commit", place="pair")
def replica_listed_first(c: Contender) -> str:
    nodes = [*c.servers.replicas, c.servers.primary]
    row = c.servers.new()
    if not isinstance(c, Sqlroute):
        raise NotOffered("roles are told, not found")
    found = {"keyspaces": {"app": {"shards": [{"name": "s0", "nodes": [n.url for n in nodes]}]}}}
    other = Sqlroute(c.servers, Router.from_config(found))
    try:
        with other.session() as session:
            session.add(Box(id=row, value=77))
            session.commit()
    finally:
        other.close()
    return stored(c.servers.value(row), 77)


@pitfall(
    29,
    "the same by one URL with all hosts and `target_session_attrs=read-write`; a switchover; write",
    "error: ConfigError",
    "correct; a session of one engine, no routing",
    place="pair",
)
def multi_host_url(c: Contender) -> str:
    nodes = [*c.servers.replicas, c.servers.primary]
    parts = nodes[0].conninfo
    hosts = ",".join(f"{node.conninfo['host']}:{node.port}" for node in nodes)
    if isinstance(c, Sqlroute):
        login = f"{parts['user']}:{parts['password']}"
        text = f"postgresql://{login}@{hosts}/{parts['dbname']}?target_session_attrs=read-write"
        Router.from_config({"keyspaces": {"app": {"shards": [{"name": "s0", "nodes": [text]}]}}})
        return "accepted"
    engine = sa.create_engine(
        url(nodes[0])
        .set(host=None, port=None)
        .update_query_pairs(
            [*(("host", host) for host in hosts.split(",")), ("target_session_attrs", "read-write")]
        ),
        pool_pre_ping=True,
    )
    rows = [c.servers.new(), c.servers.new()]
    try:
        for row in rows:
            with orm.Session(engine) as session:
                session.add(Box(id=row, value=77))
                session.commit()
            if row == rows[0]:
                c.servers.switch()
    finally:
        engine.dispose()
    found = stored([c.servers.value(row) for row in rows], [77, 77])
    return f"{found}; a session of one engine, no routing"


def clean(c: Contender, row: int) -> str:
    """Say whether a failed commit has left anything behind: a row, a transaction, a connection."""
    if c.held():
        return f"{c.held()} connections held"
    idle = (
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
        "AND backend_type = 'client backend'"
    )
    if c.servers.on_primary(idle):
        return "a pooled connection is in a transaction"
    if c.servers.on_primary("SELECT count(*) FROM pg_prepared_xacts"):
        return "a prepared transaction is left"
    for _ in range(3):
        with c.session() as session:
            # by DML, which every contender sends to the primary
            touched = sa.update(Slot).where(Slot.id == row).values(place=0).returning(Slot.id)
            if session.scalars(touched).all():
                return "the row is seen by the next session"
    return "clean"


@pitfall(
    30,
    "a deferred constraint fails at COMMIT",
    "error: IntegrityError 23505; clean",
)
def failing_commit(c: Contender) -> str:
    row, place = c.servers.new(), c.servers.new()
    c.servers.on_primary(f"INSERT INTO slot (id, place) VALUES ({c.servers.new()}, {place})")
    with c.session() as session:
        session.add(Slot(id=row, place=place))
        session.flush()
        try:
            session.commit()
        except exc.DBAPIError as error:
            failed = failure(error)
            session.rollback()
        else:
            failed = "no error"
        session.add(Slot(id=c.servers.new(), place=c.servers.new()))
        session.commit()
    return f"{failed}; {clean(c, row)}"


@pitfall(
    30,
    "the same with `twophase=True`: it fails at PREPARE",
    "error: IntegrityError 23505; clean",
)
def failing_prepare(c: Contender) -> str:
    row, place = c.servers.new(), c.servers.new()
    c.servers.on_primary(f"INSERT INTO slot (id, place) VALUES ({c.servers.new()}, {place})")
    with c.session(twophase=True) as session:
        session.add(Slot(id=row, place=place))
        session.flush()
        try:
            session.commit()
        except exc.DBAPIError as error:
            failed = failure(error)
            session.rollback()
        else:
            failed = "no error"
    return f"{failed}; {clean(c, row)}"


@pitfall(
    30,
    "the same with AsyncSession",
    "error: IntegrityError 23505; clean",
)
def failing_commit_async(c: Contender) -> str:
    return _failing_async(c)


def _failing_async(c: Contender, **options: Any) -> str:
    row, place = c.servers.new(), c.servers.new()
    c.servers.on_primary(f"INSERT INTO slot (id, place) VALUES ({c.servers.new()}, {place})")

    async def main() -> str:
        async with c.async_session(**options) as session:
            session.add(Slot(id=row, place=place))
            await session.flush()
            try:
                await session.commit()
            except exc.DBAPIError as error:
                await session.rollback()
                return failure(error)
        return "no error"

    return f"{c.run(main())}; {clean(c, row)}"


@pitfall(
    30,
    "both: AsyncSession with `twophase=True`",
    "error: IntegrityError 23505; clean",
)
def failing_prepare_async(c: Contender) -> str:
    return _failing_async(c, twophase=True)


@pitfall(
    30,
    "the server ends the connection before COMMIT; the unit of work is run again",
    "error: OperationalError 57P01; clean, then written",
)
def killed_before_commit(c: Contender) -> str:
    row = c.servers.new()
    with c.session() as session:
        insert = sa.insert(Slot).values(id=row, place=row).returning(func.pg_backend_pid())
        pid = session.scalar(insert)
        c.servers.on_primary(f"SELECT pg_terminate_backend({pid}, 5000)")
        try:
            session.commit()
        except exc.DBAPIError as error:
            failed = failure(error)
            session.rollback()
        else:
            failed = "no error"
    state = clean(c, row)
    with c.session() as session:
        session.add(Slot(id=row, place=row))
        session.commit()
    again = c.servers.on_primary(f"SELECT count(*) FROM slot WHERE id = {row}") == 1
    return f"{failed}; {state}, then {'written' if again else 'not written'}"


# prices: no pitfalls, but what somebody pays


@pitfall(0, "a plain read in a new session: node", REPLICA)
def plain_read(c: Contender) -> str:
    return ran_where(c, select(Box.value).where(Box.id == 1))


@pitfall(0, "a read within 3 s of the session's own commit: node", PRIMARY)
def read_after_commit(c: Contender) -> str:
    with c.session() as session:
        session.execute(sa.update(Box).where(Box.id == c.servers.row()).values(value=2))
        session.commit()
        with c.ran() as nodes:
            session.scalar(select(Box.value).where(Box.id == 1))
        return where(c, nodes)


@pitfall(0, "a read inside `with session.begin():`: node", PRIMARY)
def begun_read(c: Contender) -> str:
    with c.session() as session, session.begin(), c.ran() as nodes:
        session.scalar(select(Box.value).where(Box.id == 1))
    return where(c, nodes)


@pitfall(0, "a user's IMMUTABLE function in `text()`: node", REPLICA)
def text_function(c: Contender) -> str:
    return ran_where(c, sa.text("SELECT twice(21)"))


@pitfall(0, "another session has just written; a session without its token reads", "old value read")
def foreign_write(c: Contender) -> str:
    row = c.servers.row()
    c.servers.written(row, 77)
    with c.session() as session:
        found = session.scalar(select(Box.value).where(Box.id == row))
    return CORRECT if found == 77 else "old value read"


@pitfall(0, 'the same with `consistency="strong"`')
def foreign_write_strong(c: Contender) -> str:
    c.need("levels of consistency")
    row = c.servers.row()
    c.servers.written(row, 77)
    with c.session(consistency="strong") as session:
        return compared(session.scalar(select(Box.value).where(Box.id == row)), 77)


def contend(kind: type[Contender], world: World) -> Iterator[tuple[Case, str, Contender]]:
    """Run all scenarios against one kind of contender."""
    main = kind(world.main)
    try:
        for case in CASES:
            yield case, run(case, kind, main, world), main
    finally:
        main.close()


def run(case: Case, kind: type[Contender], main: Contender, world: World) -> str:
    """Run one scenario: on the common servers, or with a contender of its own on others."""
    if case.place == "main":
        return observe(case, main)
    if case.place == "pair":
        other = kind(world.pair)
    elif kind is Sqlroute:
        router = Router.from_config(world.shards.config_path)
        router.create_all(ShardedBase.metadata)
        for shard in router.topology.keyspace_of_shard:
            with router.primary_engine(shard).begin() as connection:
                connection.execute(sa.delete(Parcel))
        other = Sqlroute(main.servers, router)
    else:
        return "not offered (shards)"
    try:
        return observe(case, other)
    finally:
        other.close()
