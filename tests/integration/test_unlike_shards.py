"""Promises for shards that are not of one schema, or of another than the program declares.

What would be merged of unlike columns is an error that names the column, the shards and their
nodes; what does not read the column is answered; the session goes on.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, orm, select

from sqlroute import CrossShardRefused, Router, sharded_by
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

ROWS = 12


class Base(orm.DeclarativeBase):
    pass


class Piece(Base):
    __tablename__ = "piece"
    __table_args__ = sharded_by("id")

    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    size: orm.Mapped[int]
    label: orm.Mapped[str] = orm.mapped_column(sa.Text)
    made: orm.Mapped[dt.datetime]


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: Any) -> LocalTopology:
    found: LocalTopology = sqlroute_topology_factory(shards=2, replicas=0, label="unlike")
    return found


@pytest.fixture
def router(servers: LocalTopology) -> Iterator[Router]:
    with Router.from_config(servers.config_path) as router:
        router.drop_all(Base.metadata)
        router.create_all(Base.metadata)
        with router.sessionmaker()() as session:
            day = dt.datetime(2024, 1, 1)
            session.add_all(
                Piece(id=n, size=n % 3, label=str(n), made=day + dt.timedelta(days=n))
                for n in range(ROWS)
            )
            session.commit()
        yield router
        router.drop_all(Base.metadata)


@pytest.fixture
def alter(servers: LocalTopology) -> Callable[..., None]:
    """Change the schema of the second shard, or of those that are named."""

    def alter(*clauses: str, nodes: tuple[str, ...] = ("s1-a",)) -> None:
        for node in nodes:
            with psycopg.connect(**servers.node(node).conninfo, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION IF NOT EXISTS citext")
                for clause in clauses:
                    connection.execute(f"ALTER TABLE piece {clause}".encode())

    return alter


def refused(router: Router, read: Callable[[Any], Any], message: str) -> None:
    """Check that a read is refused, and that the same session answers others after it."""
    with router.sessionmaker()() as session:
        with pytest.raises(CrossShardRefused, match=message):
            read(session)
        assert session.scalar(select(func.count(Piece.id))) == ROWS
        session.rollback()
        engines: Any = router.engines(is_async=False)._engines.values()
        assert not any(engine.pool.checkedout() for engine in engines)


def rows(statement: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda session: session.execute(statement, execution_options=options).all()


READS: dict[str, Callable[[Any], Any]] = {
    "column": rows(select(Piece.size)),
    "entity": rows(select(Piece)),
    "hidden sort column": rows(select(Piece.id).order_by(Piece.size)),
    "distinct": rows(select(Piece.size).distinct()),
    "group": rows(select(Piece.size, func.count()).group_by(Piece.size)),
    "union": rows(select(Piece.size).union(select(Piece.size))),
    "list": rows(select(func.array_agg(Piece.size))),
    "text": rows(sa.text("SELECT size FROM piece")),
    "stream": rows(select(Piece.size).order_by(Piece.size), yield_per=2),
    "partial": rows(select(Piece.size), sqlroute_partial=True),
}


@pytest.mark.parametrize("name", READS)
def test_columns_of_unlike_types_are_not_merged(
    router: Router, alter: Callable[..., None], name: str
) -> None:
    """Python would compare an int with a text, or give both."""
    alter("ALTER size TYPE text")

    where = r"on s0 \(s0-a\), but text on s1 \(s1-a\); bring the shards to one schema"
    refused(router, READS[name], rf"\w+ is _?int4 {where}" if name != "list" else "array_agg_1 is")


@pytest.mark.parametrize(
    ("change", "statement"),
    [
        ("ALTER size TYPE numeric", select(Piece.size)),
        ("ALTER made TYPE timestamptz", select(Piece.made).order_by(Piece.made)),
        ("ALTER made TYPE date", select(func.max(Piece.made))),
    ],
    ids=str,
)
def test_types_that_python_could_compare_are_not_mixed(
    router: Router, alter: Callable[..., None], change: str, statement: Any
) -> None:
    alter(change)

    refused(router, rows(statement), "bring the shards to one schema")


@pytest.mark.parametrize("change", ["ALTER size TYPE bigint", "ALTER label TYPE varchar(9)"])
def test_types_of_the_same_values_are_merged(
    router: Router, alter: Callable[..., None], change: str
) -> None:
    """So that a column can be widened shard by shard; a sum waits for the last one."""
    alter(change)

    with router.sessionmaker()() as session:
        found = session.scalars(select(Piece).order_by(Piece.size, Piece.label.desc())).all()
        most = session.execute(select(func.max(Piece.size), func.max(Piece.label))).one()
    assert [piece.id for piece in found] == [9, 6, 3, 0, 7, 4, 10, 1, 8, 5, 2, 11]
    assert tuple(most) == (2, "9")


def test_text_is_not_answered_under_the_names_of_other_columns(
    router: Router, alter: Callable[..., None]
) -> None:
    """``SELECT *`` gives columns in the order in which they were added."""
    alter("DROP size", "ADD size int NOT NULL DEFAULT 1")

    star = sa.text("SELECT * FROM piece")
    refused(router, rows(star), r"id, size, label, made on s0 .* id, label, made, size on s1")
    with router.sessionmaker()() as session:
        assert len(session.scalars(select(Piece)).all()) == ROWS


def test_a_column_that_one_shard_lacks_is_an_error_that_names_it(
    router: Router, alter: Callable[..., None]
) -> None:
    alter("DROP size")

    refused(router, rows(sa.text("SELECT * FROM piece")), "id, label, made on s1")
    with router.sessionmaker()() as session:
        with pytest.raises(exc.ProgrammingError, match=r"(?s)on s1 \(s1-a\).*size does not exist"):
            session.execute(select(Piece.size)).all()
        assert len(session.scalars(select(Piece.label)).all()) == ROWS


def test_async_sessions_refuse_it_too(router: Router, alter: Callable[..., None]) -> None:
    import asyncio

    alter("ALTER size TYPE text")

    async def main() -> None:
        async with router.async_sessionmaker()() as session:
            for options in ({}, {"yield_per": 2}):
                with pytest.raises(CrossShardRefused, match="size is int4 on s0"):
                    await session.stream(select(Piece.size), execution_options=options)
            assert await session.scalar(select(func.count(Piece.id))) == ROWS
        await router.aclose()

    asyncio.run(main())


P = Piece
WRONGLY_DECLARED: dict[str, tuple[str, Any, str]] = {
    "citext in order": (
        "label TYPE citext",
        select(P.id).order_by(P.label),
        r"ORDER BY: piece\.label is a type of its own on s0 \(s0-a\), and taken for text",
    ),
    "citext in groups": (
        "label TYPE citext",
        select(P.label, func.count()).group_by(P.label),
        "GROUP BY: piece.label is a type of its own",
    ),
    "citext of entities": (
        "label TYPE citext",
        select(P).options(orm.load_only(P.size)).order_by(P.label),
        "ORDER BY: piece.label is a type of its own",
    ),
    "char(n)": ("label TYPE char(9)", select(P.id).order_by(P.label), "bpchar .* taken for text"),
    "money": (
        "size TYPE money USING size::money",
        select(P.size).distinct(),
        "DISTINCT: piece.size is money .* taken for number",
    ),
    "interval": (
        "made TYPE interval USING interval '1 month'",
        select(func.max(P.made)),
        r"max\(piece.made\) is interval",
    ),
    "interval by SQLAlchemy": (
        "size SET DEFAULT 1",
        select((P.made - sa.func.date(P.made, type_=sa.Date)).label("rest")).order_by("rest"),
        "is interval .* taken for timestamp",
    ),
    "stream": ("size TYPE text", select(P.id).order_by(P.size), "is text .* taken for number"),
}


@pytest.mark.parametrize("name", WRONGLY_DECLARED)
def test_what_is_declared_as_another_type_is_not_compared_as_that(
    router: Router, alter: Callable[..., None], name: str
) -> None:
    """Python's order of the one type need not be PostgreSQL's of the other."""
    change, statement, message = WRONGLY_DECLARED[name]
    alter(f"ALTER {change}", nodes=("s0-a", "s1-a"))

    refused(router, rows(statement, **({"yield_per": 2} if name == "stream" else {})), message)


def test_a_collation_that_only_the_servers_know_is_not_merged_by(
    servers: LocalTopology, router: Router, alter: Callable[..., None]
) -> None:
    """Its order is not Python's, and lower() of it has the same; COLLATE "C" says another."""
    both = ("s0-a", "s1-a")
    for name in both:
        with psycopg.connect(**servers.node(name).conninfo, autocommit=True) as connection:
            connection.execute(
                "CREATE COLLATION IF NOT EXISTS own (provider = libc, locale = 'C.utf-8')"
            )
    alter("ALTER label TYPE text COLLATE own", nodes=both)

    with Router.from_config(servers.config_path) as later, later.sessionmaker()() as session:
        for key in (Piece.label, func.lower(Piece.label)):
            with pytest.raises(CrossShardRefused, match="does not order by code point"):
                session.execute(select(key).order_by(key))
        with pytest.raises(CrossShardRefused, match=r"min\(\)"):
            session.execute(select(func.min(Piece.label)))
        found = session.scalars(select(Piece.label).order_by(Piece.label.collate("C"))).all()
        assert found == sorted(map(str, range(ROWS)))
        assert len(session.scalars(select(Piece.label).distinct()).all()) == ROWS
