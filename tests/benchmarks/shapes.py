"""The statements of an application: some hundred shapes, as an ORM application writes them.

All can be planned on one shard and on four: most name the customer they are about, as a sharded
application does, the others are merged.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    String,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    contains_eager,
    joinedload,
    load_only,
    mapped_column,
    relationship,
    selectinload,
)

import sqlroute

KEY = 42


class Base(DeclarativeBase):
    pass


class Country(Base):
    __tablename__ = "country"
    __table_args__ = sqlroute.reference_table()

    code: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str]
    region: Mapped[str]


class Customer(Base):
    __tablename__ = "customer"
    __table_args__ = sqlroute.sharded_by("id")

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    country_code: Mapped[str] = mapped_column(ForeignKey("country.code"))
    created_at: Mapped[dt.datetime]
    is_active: Mapped[bool]
    credit: Mapped[int]

    country: Mapped[Country] = relationship()
    orders: Mapped[list[Order]] = relationship(back_populates="customer")


class Order(Base):
    __tablename__ = "order"
    __table_args__ = sqlroute.sharded_by("customer_id")

    customer_id: Mapped[int] = mapped_column(ForeignKey("customer.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    total: Mapped[int]
    placed_at: Mapped[dt.datetime]
    note: Mapped[str | None]

    customer: Mapped[Customer] = relationship(back_populates="orders")


class Payment(Base):
    __tablename__ = "payment"
    __table_args__ = sqlroute.sharded_by("customer_id")

    customer_id: Mapped[int] = mapped_column(ForeignKey("customer.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    amount: Mapped[int]
    method: Mapped[str]
    paid_at: Mapped[dt.datetime | None]


ENTITIES: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
    (Customer, Customer.id, ("name", "email", "country_code", "is_active", "credit")),
    (Order, Order.customer_id, ("id", "status", "total", "placed_at", "note")),
    (Payment, Payment.customer_id, ("id", "order_id", "amount", "method", "paid_at")),
)
"""Class, shard key, and columns that are filtered and sorted by."""


def orm_shapes() -> Iterator[Any]:
    """Yield what an ORM application sends: mostly objects, by key and something else."""
    yield from _lists()
    yield from _loads()
    yield from _columns()
    yield from _counts()
    yield from _writes()


def core_shapes() -> Iterator[Any]:
    """Yield the same kinds of statements over tables, without the ORM."""
    for entity, key, columns in ENTITIES:
        table = entity.__table__
        shard = table.c[key.key]
        for one, other in itertools.permutations(columns, 2):
            yield (
                select(table.c[one], table.c[other])
                .where(shard == KEY, table.c[one].is_not(None))
                .order_by(table.c[other])
            )
        for name in columns:
            yield select(table).where(shard == KEY, table.c[name].is_(None))
            yield select(table.c[name], func.count()).where(shard == KEY).group_by(table.c[name])
    order, payment = Order.__table__, Payment.__table__
    joined = order.join(payment, order.c.customer_id == payment.c.customer_id)
    for name in ("id", "order_id", "amount", "method", "paid_at"):
        yield (
            select(order.c.id, payment.c[name])
            .select_from(joined)
            .where(order.c.customer_id == KEY, payment.c[name].is_not(None))
        )


def _condition(column: Any) -> Any:
    """Return a condition as filters of a web page make them, another for each type."""
    kind = column.type.python_type
    if kind is bool:
        return column.is_(True)
    if kind is int:
        return column > 5
    if kind is str:
        return column.in_(["a", "b"])
    return column < dt.datetime(2026, 1, 1)


def _lists() -> Iterator[Any]:
    """Yield lists of objects: filters, sorting, pages."""
    for entity, key, columns in ENTITIES:
        yield select(entity).where(key == KEY)
        for name in columns:
            column = getattr(entity, name)
            yield select(entity).where(key == KEY, _condition(column))
            yield select(entity).where(key == KEY).order_by(column.desc()).limit(20).offset(40)
            yield select(entity).where(_condition(column))
        for one, other in itertools.permutations(columns, 2):
            a, b = getattr(entity, one), getattr(entity, other)
            yield select(entity).where(key == KEY, _condition(a)).order_by(b).limit(20)
        for one, other in itertools.combinations(columns, 2):
            a, b = getattr(entity, one), getattr(entity, other)
            yield (
                select(entity).where(
                    key == KEY, or_(_condition(a), and_(_condition(b), a.is_not(None)))
                )
            )


def _loads() -> Iterator[Any]:
    """Yield objects with others: joins, eager loads, subqueries."""
    for name in ("status", "total", "placed_at", "note"):
        column = getattr(Order, name)
        yield select(Customer).join(Customer.orders).where(Customer.id == KEY, _condition(column))
        yield (
            select(Order)
            .join(Order.customer)
            .where(Order.customer_id == KEY, Customer.is_active)
            .options(contains_eager(Order.customer))
            .order_by(column)
        )
        yield (
            select(Order)
            .where(Order.customer_id == KEY, _condition(column))
            .options(joinedload(Order.customer).joinedload(Customer.country))
        )
        yield (
            select(Order)
            .where(Order.customer_id == KEY)
            .options(selectinload(Order.customer), load_only(Order.id, column))
        )
        yield select(Customer).where(Customer.id == KEY, Customer.orders.any(_condition(column)))
        yield (
            select(Customer).where(
                Customer.id == KEY,
                exists().where(Order.customer_id == Customer.id, _condition(column)),
            )
        )
        yield _newest_of(column)
        yield _older_than_another(column)
    for name in ("name", "email", "credit"):
        column = getattr(Customer, name)
        yield (
            select(Customer, Country)
            .join(Customer.country)
            .where(Customer.id == KEY, Country.region == "EU")
            .order_by(column)
        )
        yield (
            select(Customer)
            .where(Customer.id.in_([1, 2, 3]))
            .order_by(Customer.credit, column.is_(None))
        )


def _newest_of(column: Any) -> Any:
    newest = (
        select(func.max(column).label("newest"), Order.customer_id)
        .where(Order.customer_id == KEY)
        .group_by(Order.customer_id)
        .cte("newest")
    )
    return (
        select(Order)
        .join(newest, and_(newest.c.customer_id == Order.customer_id, newest.c.newest == column))
        .where(Order.customer_id == KEY)
    )


def _older_than_another(column: Any) -> Any:
    other = aliased(Order)
    return (
        select(Order)
        .join(other, and_(other.customer_id == Order.customer_id, other.id > Order.id))
        .where(Order.customer_id == KEY, column == getattr(other, column.key))
    )


def _columns() -> Iterator[Any]:
    for entity, key, columns in ENTITIES:
        for one, other in itertools.combinations(columns, 2):
            a, b = getattr(entity, one), getattr(entity, other)
            yield select(a, b).where(key == KEY)
        for name in columns:
            column = getattr(entity, name)
            yield select(key, case((column.is_(None), 0), else_=1).label("has")).where(key == KEY)


def _counts() -> Iterator[Any]:
    for entity, key, columns in ENTITIES:
        for name in columns:
            column = getattr(entity, name)
            yield select(func.count()).select_from(entity).where(key == KEY, _condition(column))
            yield (
                select(column, func.count(), func.max(key))
                .where(key == KEY)
                .group_by(column)
                .order_by(column)
            )
            yield select(func.count()).select_from(entity).where(column.is_not(None))


def _writes() -> Iterator[Any]:
    for entity, key, columns in ENTITIES:
        for name in columns:
            column = getattr(entity, name)
            yield update(entity).where(key == KEY).values({column: None})
            yield delete(entity).where(key == KEY, _condition(column))
            yield insert(entity).values({"id": KEY, key.key: KEY, column.key: KEY})
