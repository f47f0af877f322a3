"""How a table says where its rows live, and which types can be a key."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import CITEXT, DOMAIN, ENUM, INET, UUID
from sqlalchemy.schema import CreateTable

from sqlroute.errors import InvalidShardKey, UnknownName
from sqlroute.routing.declare import (
    Reference,
    Sharded,
    declaration,
    kind_of,
    reference_table,
    shard_key,
    sharded_by,
)
from sqlroute.routing.hashing import KeyKind


class Guid(sa.TypeDecorator[Any]):
    """SQLAlchemy's own recipe: uuid on PostgreSQL, CHAR(32) elsewhere."""

    impl = sa.CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        chosen = UUID() if dialect.name == "postgresql" else sa.CHAR(32)
        return dialect.type_descriptor(chosen)


class Wrapped(sa.TypeDecorator[Any]):
    impl = Guid
    cache_ok = True


class Lowered(sa.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return sa.func.lower(bindparam)


class Name(sa.types.UserDefinedType[str]):
    def get_col_spec(self, **options: Any) -> str:
        return "NAME"


def table(type_: Any, *, by: str = "key", key: str | None = None) -> sa.Table:
    column = sa.Column("key", type_, primary_key=True, key=key)
    return sa.Table("t", sa.MetaData(), column, **sharded_by(by))


@pytest.mark.parametrize(
    ("type_", "kind"),
    [
        (sa.SmallInteger(), KeyKind.INTEGER),
        (sa.Integer(), KeyKind.INTEGER),
        (sa.BigInteger(), KeyKind.INTEGER),
        (sa.Text(), KeyKind.TEXT),
        (sa.String(), KeyKind.TEXT),
        (sa.String(36), KeyKind.TEXT),
        (sa.Unicode(9), KeyKind.TEXT),
        (sa.Text(collation="C"), KeyKind.TEXT),
        (sa.Uuid(), KeyKind.UUID),
        (sa.Uuid(as_uuid=False), KeyKind.UUID),
        (UUID(), KeyKind.UUID),
        (Guid(), KeyKind.UUID),
        (Wrapped(), KeyKind.UUID),
        (sa.String(36).with_variant(UUID(), "postgresql"), KeyKind.UUID),
        (sa.BigInteger().with_variant(sa.Integer(), "sqlite"), KeyKind.INTEGER),
    ],
)
def test_kind_is_that_of_the_type_postgresql_gets(type_: Any, kind: KeyKind) -> None:
    assert kind_of(type_) is kind
    assert shard_key(table(type_)).kinds == (kind,)


@pytest.mark.parametrize(
    "type_",
    [
        sa.CHAR(5),
        sa.Numeric(),
        sa.Float(),
        sa.Boolean(),
        sa.Date(),
        sa.DateTime(),
        sa.LargeBinary(),
        sa.JSON(),
        sa.ARRAY(sa.Integer),
        sa.Enum("a", "b", name="ab"),
        sa.Enum("a", "b", native_enum=False),
        ENUM("a", name="a"),
        CITEXT(),
        INET(),
        DOMAIN("positive", sa.Integer),
        sa.Uuid(native_uuid=False),
        sa.Uuid().with_variant(sa.CHAR(32), "postgresql"),
        Lowered(),
        Name(),
        sa.types.NullType(),
    ],
)
def test_other_types_are_no_key(type_: Any) -> None:
    """Their hash is another, or only the server can compute it."""
    assert kind_of(type_) is None
    with pytest.raises(InvalidShardKey, match=r"shard key t\.key has type"):
        shard_key(table(type_))


def test_declaration_travels_in_info() -> None:
    assert declaration(table(sa.Integer())) == Sharded(("key",))
    assert declaration(sa.Table("r", sa.MetaData(), **reference_table())) == Reference()
    assert declaration(sa.Table("n", sa.MetaData())) is None


def test_declaration_names_its_keyspace() -> None:
    assert sharded_by("a", keyspace="logs")["info"]["sqlroute"].keyspace == "logs"
    assert reference_table("logs")["info"]["sqlroute"].keyspace == "logs"


def test_declaration_changes_no_ddl() -> None:
    """The same metadata still makes plain tables on one plain PostgreSQL."""
    assert "PARTITION" not in str(CreateTable(table(sa.Integer())))


def test_declaration_survives_a_copy_to_other_metadata() -> None:
    copy = table(sa.Integer()).to_metadata(sa.MetaData())

    assert shard_key(copy).names == ("key",)


def test_foreign_content_of_info_is_no_declaration() -> None:
    assert declaration(sa.Table("n", sa.MetaData(), info={"sqlroute": "customer_id"})) is None


def test_key_needs_a_column() -> None:
    with pytest.raises(InvalidShardKey, match="at least one column"):
        sharded_by()


def test_key_column_must_exist() -> None:
    with pytest.raises(
        UnknownName, match=r"unknown shard key column 'nokey' of table t; known: key"
    ):
        shard_key(table(sa.Integer(), by="nokey"))


@pytest.mark.parametrize("by", ["key", "attribute"])
def test_column_is_found_by_name_and_by_key(by: str) -> None:
    assert shard_key(table(sa.Integer(), by=by, key="attribute")).names == ("attribute",)


def test_columns_keep_the_order_of_the_hash() -> None:
    made = sa.Table(
        "t",
        sa.MetaData(),
        sa.Column("a", sa.Integer),
        sa.Column("b", sa.Text),
        **sharded_by("b", "a"),
    )

    assert shard_key(made).names == ("b", "a")
    assert shard_key(made).kinds == (KeyKind.TEXT, KeyKind.INTEGER)
    assert str(shard_key(made)) == "b, a"
