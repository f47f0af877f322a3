"""The statements that the cases in this directory name, and the models behind them."""

from __future__ import annotations

import uuid
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Mapped, aliased, mapped_column, relationship

from sqlroute.routing.declare import reference_table, sharded_by


class Base(orm.DeclarativeBase):
    pass


class Cents(sa.TypeDecorator[int]):
    """Whole euros in Python, cents in the database: the bucket is that of the cents."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else value * 100

    def process_result_value(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else value // 100


class Country(Base):
    __tablename__ = "country"
    __table_args__ = reference_table()

    code: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)


class Customer(Base):
    __tablename__ = "customer"
    __table_args__ = sharded_by("id")

    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    country_code: Mapped[str | None] = mapped_column(sa.ForeignKey("country.code"))

    country: Mapped[Country | None] = relationship()
    orders: Mapped[list[Order]] = relationship(back_populates="customer")


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = sharded_by("customer_id")

    customer_id: Mapped[int] = mapped_column(sa.ForeignKey("customer.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]

    customer: Mapped[Customer] = relationship(back_populates="orders")


class LineItem(Base):
    """A key of two columns."""

    __tablename__ = "line_item"
    __table_args__ = sharded_by("region", "order_id")

    region: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(primary_key=True)
    quantity: Mapped[int]


class Device(Base):
    __tablename__ = "device"
    __table_args__ = sharded_by("id")

    id: Mapped[uuid.UUID] = mapped_column(sa.Uuid, primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(sa.Text)


class Page(Base):
    __tablename__ = "page"
    __table_args__ = sharded_by("slug")

    slug: Mapped[str] = mapped_column(sa.Text, primary_key=True)
    title: Mapped[str] = mapped_column(sa.Text)


class Price(Base):
    __tablename__ = "price"
    __table_args__ = sharded_by("amount")

    amount: Mapped[int] = mapped_column(Cents, primary_key=True)


class Plain(Base):
    """Declares nothing: right on one shard, an error on several."""

    __tablename__ = "plain"

    id: Mapped[int] = mapped_column(primary_key=True)


class Log(Base):
    """Of another keyspace."""

    __tablename__ = "log"
    __table_args__ = reference_table(keyspace="logs")

    id: Mapped[int] = mapped_column(primary_key=True)
    line: Mapped[str] = mapped_column(sa.Text)


customer, orders, country = Customer.__table__, Order.__table__, Country.__table__
other_order = aliased(Order)

by_id = sa.select(Customer).where(Customer.id == sa.bindparam("id"))
ORDERS_OF_CUSTOMER = sa.select(Order.id).where(Order.customer_id == Customer.id)

STATEMENTS: dict[str, Any] = {
    # one shard
    "customer_by_id": by_id,
    "customer_names_by_id": sa.select(Customer.name).where(Customer.id == sa.bindparam("id")),
    "customer_with_orders": by_id.join(Customer.orders),
    "customer_with_all_orders": by_id.outerjoin(Customer.orders),
    "customer_for_update": by_id.with_for_update(),
    "customer_by_text_id": sa.select(Customer).where(
        sa.cast(Customer.id, sa.Text) == sa.bindparam("id")
    ),
    "customers_by_ids": sa.select(Customer).where(
        Customer.id.in_(sa.bindparam("ids", expanding=True))
    ),
    "customer_any_id": sa.select(Customer).where(
        Customer.id == sa.any_(sa.bindparam("ids", type_=sa.ARRAY(sa.BigInteger)))
    ),
    "customer_of_two_ids": sa.select(Customer).where(
        Customer.id == sa.bindparam("one"), Customer.id == sa.bindparam("other")
    ),
    "customer_of_either_id": sa.select(Customer).where(
        (Customer.id == sa.bindparam("one")) | (Customer.id == sa.bindparam("other"))
    ),
    "customer_but_one": sa.select(Customer).where(Customer.id != sa.bindparam("id")),
    "line_item": sa.select(LineItem).where(
        LineItem.region == sa.bindparam("region"), LineItem.order_id == sa.bindparam("order_id")
    ),
    "line_items_of_region": sa.select(LineItem).where(LineItem.region == sa.bindparam("region")),
    "device": sa.select(Device).where(Device.id == sa.bindparam("id")),
    "page": sa.select(Page).where(Page.slug == sa.bindparam("slug")),
    "price": sa.select(Price).where(Price.amount == sa.bindparam("amount")),
    "dearest_order": sa.select(Order).where(
        Order.customer_id == sa.bindparam("id"),
        Order.total == sa.select(sa.func.max(Order.total)).scalar_subquery(),
    ),
    # many shards
    "customers": sa.select(Customer),
    "customers_sorted": sa.select(Customer.id).order_by(Customer.id).limit(3),
    "customers_counted": sa.select(sa.func.count()).select_from(Customer),
    "customers_with_orders": sa.select(Customer.id, Order.id).join(Customer.orders),
    "customers_with_some_order": sa.select(Customer.id).where(
        ORDERS_OF_CUSTOMER.correlate(Customer).exists()
    ),
    "customers_and_countries": sa.select(Customer.id, Country.name).join(Customer.country),
    "countries_and_customers": sa.select(Country.code, Customer.id).outerjoin(
        Customer, Customer.country_code == Country.code
    ),
    "orders_of_equal_total": sa.select(Order.id, other_order.id).join(
        other_order, Order.total == other_order.total
    ),
    "customers_twice": sa.union_all(sa.select(Customer.id), sa.select(Customer.id)),
    "one_and_the_other": sa.union_all(
        sa.select(Customer.name).where(Customer.id == sa.bindparam("one")),
        sa.select(Customer.name).where(Customer.id == sa.bindparam("other")),
    ),
    "customers_for_update": sa.select(Customer).with_for_update(),
    "customers_having_orders": sa.select(Order.customer_id)
    .group_by(Order.customer_id)
    .having(sa.func.count() > 1),
    # no sharded table
    "countries": sa.select(Country),
    "one": sa.select(sa.literal(1)),
    "next_number": sa.select(sa.func.nextval("numbers")),
    "unknown_function": sa.select(sa.func.frobnicate(Country.code)),
    "text": sa.text("CALL work()"),
    "text_read": sa.text("SELECT name FROM customer WHERE id = :id"),
    "text_of_no_table": sa.text("SELECT 1"),
    "text_of_a_constant": sa.text("SELECT name FROM customer WHERE id = 5"),
    "text_of_ids": sa.text("SELECT name FROM customer WHERE id IN :ids").bindparams(
        sa.bindparam("ids", expanding=True)
    ),
    "text_of_a_typed_parameter": sa.text("SELECT * FROM customer WHERE id = :id").bindparams(
        sa.bindparam("id", type_=sa.Float)
    ),
    "entities_of_text": sa.select(Customer).from_statement(
        sa.text("SELECT * FROM customer WHERE id = :id")
    ),
    "text_of_a_reference_table": sa.text("SELECT * FROM country"),
    "text_in_an_order": sa.text("SELECT * FROM customer ORDER BY name"),
    "text_of_an_unknown_table": sa.text("SELECT * FROM nowhere"),
    "text_update": sa.text("UPDATE customer SET name = 'x' WHERE id = :id"),
    "text_update_of_a_reference_table": sa.text("UPDATE country SET name = 'x'"),
    "text_insert": sa.text("INSERT INTO customer (name, id) VALUES (:name, :id)"),
    "text_in_order": sa.select(Customer.id).order_by(sa.text("audit(name)")),
    "plain": sa.select(Plain),
    "logs": sa.select(Log),
    "logs_and_customers": sa.select(Log.line, Customer.name).where(Log.id == Customer.id),
    # writes
    "insert_customer": sa.insert(Customer),
    "insert_orders": sa.insert(Order),
    "insert_device": sa.insert(Device),
    "insert_copies": sa.insert(Order).from_select(
        ["customer_id", "id", "total"], sa.select(other_order.customer_id, other_order.id + 1, 0)
    ),
    "insert_total_of_all": sa.insert(orders).values(
        customer_id=1,
        id=1,
        total=sa.select(sa.func.sum(other_order.total)).scalar_subquery(),
    ),
    "upsert_customer": upsert(customer)
    .values(id=sa.bindparam("key"), name="x")
    .on_conflict_do_nothing(),
    "update_customer": sa.update(Customer)
    .where(Customer.id == sa.bindparam("id"))
    .values(name="new"),
    "update_customers": sa.update(Customer).values(name="new"),
    "delete_orders": sa.delete(Order).where(Order.customer_id == sa.bindparam("id")),
    "update_country": sa.update(Country).values(name="new"),
    "update_country_from_customer": sa.update(Country)
    .where(Country.code == Customer.country_code, Customer.id == sa.bindparam("id"))
    .values(name=Customer.name),
}
