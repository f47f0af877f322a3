"""Which tables SQL text may name, and when the catalog is asked again."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sqlroute import reference_table, sharded_by
from sqlroute.catalog.tables import KEPT, READ_AGAIN, TableReader
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.known import KnownTables
from sqlroute.routing.sqltree import Role, TableInfo
from sqlroute.topology import Keyspace, Node, Shard

TWO = Keyspace("shop", tuple(Shard(f"s{i}", (Node(f"s{i}-a"),)) for i in range(2)))
ONE = Keyspace("logs", (Shard("l0", (Node("l0-a"),)),))


class Cents(sa.TypeDecorator[int]):
    impl = sa.Integer
    cache_ok = True


def declared(*tables: tuple[str, dict[str, Any]]) -> KnownTables:
    metadata = sa.MetaData()
    for name, options in tables:
        key = sa.Column("Key", Cents, key="key", primary_key=True)
        sa.Table(name, metadata, key, sa.Column("at", sa.Date), **options)
    return KnownTables().declaring(metadata, TWO)


def ordinary(name: str = "plain") -> dict[str, TableInfo]:
    return {name: TableInfo(name, Role.REFERENCE, {"id": KeyKind.INTEGER}, keyspace="shop")}


def test_declared_columns_have_the_names_and_hashes_of_the_database() -> None:
    """SQL knows no attribute names, and hashes what the type stores."""
    info = declared(("price", sharded_by("key"))).by_name()["price"]

    assert (info.role, info.key, info.keyspace) == (Role.SHARDED, ("Key",), "shop")
    assert info.columns == {"Key": KeyKind.INTEGER, "at": None}
    assert info.is_declared


def test_table_that_declares_nothing_is_left_to_the_catalog() -> None:
    assert declared(("plain", {})).by_name() == {}


def test_ordinary_table_of_several_shards_may_differ_on_each() -> None:
    """Only a declaration makes it a reference table."""
    known = KnownTables().learnt(TWO, ordinary())

    assert known.by_name()["plain"].role is Role.UNKNOWN
    assert "router.declare(metadata)" in known.by_name()["plain"].why


def test_ordinary_table_of_one_shard_is_where_it_is() -> None:
    assert KnownTables().learnt(ONE, ordinary()).by_name()["plain"].role is Role.REFERENCE


def test_declaration_wins_over_the_catalog() -> None:
    known = declared(("plain", reference_table())).learnt(TWO, ordinary())

    assert known.by_name()["plain"].role is Role.REFERENCE


def test_declared_table_has_the_columns_of_the_database_too() -> None:
    """A mapping may leave columns out; until the catalog was read, there may be others."""
    known = declared(("plain", reference_table()))

    assert not known.by_name()["plain"].is_complete
    read = known.learnt(TWO, ordinary()).by_name()["plain"]
    assert read.is_complete
    assert set(read.columns) == {"Key", "at", "id"}


def test_reading_that_says_nothing_new_changes_nothing() -> None:
    """So that what was described by it is kept."""
    known = KnownTables().learnt(TWO, ordinary())

    assert known.learnt(TWO, ordinary()) is known
    assert known.learnt(TWO, ordinary("other")) is not known


def test_catalog_is_read_once_by_whoever_comes_first() -> None:
    now = 100.0
    reader = TableReader(1.0, clock=lambda: now)

    assert reader.claim("shop", KEPT)
    assert not reader.claim("shop", KEPT)
    assert reader.claim("logs", KEPT)


def test_unknown_name_is_looked_up_at_most_once_a_second() -> None:
    now = 100.0
    reader = TableReader(1.0, clock=lambda: now)
    reader.claim("shop", READ_AGAIN)

    now += READ_AGAIN / 2
    assert not reader.claim("shop", READ_AGAIN)
    now += READ_AGAIN
    assert not reader.claim("shop", KEPT)
    assert reader.claim("shop", READ_AGAIN)
    now += KEPT
    assert reader.claim("shop", KEPT)
