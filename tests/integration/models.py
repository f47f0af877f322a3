"""A small shop: what the integration tests store, on shards and on one plain server alike."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from sqlroute import reference_table, sharded_by


class Base(orm.DeclarativeBase):
    pass


class Country(Base):
    """A reference table: on every shard in full."""

    __tablename__ = "country"
    __table_args__ = reference_table()

    code: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)


class Rate(Base):
    """A reference table whose values the server makes."""

    __tablename__ = "rate"
    __table_args__ = reference_table()

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[Decimal] = mapped_column(sa.Numeric)
    lossy: Mapped[float | None] = mapped_column(sa.Numeric(30, 18, asdecimal=False))
    extra: Mapped[Any | None] = mapped_column(JSONB)
    made_at: Mapped[dt.datetime] = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp()
    )


class Customer(Base):
    __tablename__ = "customer"
    __table_args__ = sharded_by("id")

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.Text)
    country_code: Mapped[str | None] = mapped_column(sa.ForeignKey("country.code"))
    score: Mapped[int | None] = mapped_column(server_default="7")

    country: Mapped[Country | None] = relationship()
    orders: Mapped[list[Order]] = relationship(
        back_populates="customer", cascade="all, delete-orphan", order_by="Order.id"
    )


class Order(Base):
    """Colocated with its customer; an order without one is refused at COMMIT only."""

    __tablename__ = "order"
    __table_args__ = sharded_by("customer_id")

    customer_id: Mapped[int] = mapped_column(
        sa.ForeignKey("customer.id", deferrable=True, initially="DEFERRED"), primary_key=True
    )
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    amount: Mapped[Decimal | None] = mapped_column(sa.Numeric(12, 2))

    customer: Mapped[Customer] = relationship(back_populates="orders")


class Document(Base):
    __tablename__ = "document"
    __table_args__ = sharded_by("id")

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    title: Mapped[str] = mapped_column(sa.Text)


class Setting(Base):
    __tablename__ = "setting"
    __table_args__ = sharded_by("name")

    name: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    value: Mapped[str | None] = mapped_column(sa.Text)


class Reading(Base):
    __tablename__ = "reading"
    __table_args__ = sharded_by("device", "slot")

    device: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    slot: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int | None] = mapped_column()
