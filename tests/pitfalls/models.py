"""What the scenarios store. The server makes some values, so that an INSERT shows where it ran."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column, relationship

from sqlroute import sharded_by

SEEDED = range(1, 2001)
"""Ids of the boxes that are there from the start, each with value 1."""


class Base(orm.DeclarativeBase):
    pass


class Box(Base):
    __tablename__ = "box"
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012 - SQLAlchemy's own idiom

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    value: Mapped[int]
    tenant: Mapped[str | None] = mapped_column(
        server_default=sa.text("current_setting('app.tenant', true)")
    )
    made_by: Mapped[str | None] = mapped_column(server_default=sa.text("'the server'"))

    items: Mapped[list[Item]] = relationship(back_populates="box", order_by="Item.id")


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    box_id: Mapped[int] = mapped_column(sa.ForeignKey("box.id"))

    box: Mapped[Box] = relationship(back_populates="items")


class Slot(Base):
    """Its unique constraint is checked at COMMIT."""

    __tablename__ = "slot"
    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    place: Mapped[int]


bumping = sa.Table("bumping", sa.MetaData(), sa.Column("bumped", sa.Integer))
"""A view whose SELECT calls a function that writes: nothing in the statement says so."""

FUNCTIONS = """
CREATE SEQUENCE ticket;
CREATE TABLE bumps (at timestamptz DEFAULT clock_timestamp());
CREATE FUNCTION bump() RETURNS integer LANGUAGE sql VOLATILE AS
  'INSERT INTO bumps DEFAULT VALUES; SELECT 1';
CREATE FUNCTION twice(n integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 2 * n';
CREATE VIEW bumping AS SELECT bump() AS bumped;
"""


class ShardedBase(orm.DeclarativeBase):
    pass


class Parcel(ShardedBase):
    __tablename__ = "parcel"
    __table_args__ = sharded_by("id")

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    value: Mapped[int]
