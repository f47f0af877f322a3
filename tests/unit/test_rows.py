"""The key of each row of an INSERT is found before anything is sent."""

from __future__ import annotations

import uuid
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, mapped_column

from sqlroute.errors import InvalidShardKey, MissingShardKey
from sqlroute.routing.declare import sharded_by
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.rows import bucket_of_key, keyed_rows, python_default

numbers = count(100)


class Base(orm.DeclarativeBase):
    pass


class Order(Base):
    """Attribute, key and name of its key column all differ from each other."""

    __tablename__ = "orders"
    __table_args__ = sharded_by("customer_no")

    buyer: Mapped[int] = mapped_column("customer_no", primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None]


class Device(Base):
    __tablename__ = "device"
    __table_args__ = sharded_by("id")

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str | None]


table = sa.Table(
    "plain",
    sa.MetaData(),
    sa.Column("region", sa.Integer, primary_key=True, default=7),
    sa.Column("item", sa.Text, primary_key=True),
    sa.Column("left", sa.Integer),
    **sharded_by("region", "item"),
)
numbered = sa.Table(
    "numbered",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, default=lambda: next(numbers)),
    sa.Column("made", sa.Integer, default=sa.func.now()),
    sa.Column("server", sa.Integer, server_default="7"),
    sa.Column("number", sa.Integer, sa.Sequence("numbers")),
    **sharded_by("id"),
)


def keys(statement: Any, parameters: Any = None) -> list[dict[str, Any]]:
    return [dict(row) for row in keyed_rows(statement, parameters)[1]]


class TestWhereTheKeyStands:
    @pytest.mark.parametrize(
        ("statement", "parameters"),
        [
            (sa.insert(Order), {"buyer": 5, "id": 1}),
            (sa.insert(Order), {"customer_no": 5, "id": 1}),
            (sa.insert(Order.__table__), {"customer_no": 5, "id": 1}),
            (sa.insert(Order).values(buyer=5, id=1), None),
            (sa.insert(Order).values({Order.buyer: 5, Order.id: 1}), None),
            (sa.insert(Order.__table__).values(customer_no=5, id=1), None),
            (sa.insert(Order.__table__).values((5, 1, None)), None),
            (sa.insert(Order).values(buyer=5), {"id": 1}),
            (sa.insert(Order).values(buyer=sa.literal(5)), {"id": 1}),
            (sa.insert(Order).values(buyer=sa.bindparam("b")), {"b": 5, "id": 1}),
            (sa.insert(Order).values(buyer=sa.bindparam("b", 1)), {"b": 5, "id": 1}),
            (sa.insert(Order).values(buyer=sa.bindparam("b", 5)), {"id": 1}),
            (sa.insert(Order).values([{"buyer": 5, "id": 1}]), None),
            (sa.insert(Order).values([{"buyer": sa.bindparam("b"), "id": 1}]), {"b": 5}),
        ],
    )
    def test_one_row(self, statement: Any, parameters: Any) -> None:
        assert keys(statement, parameters) == [{"customer_no": 5}]

    def test_parameters_win_over_values(self) -> None:
        assert keys(sa.insert(Order).values(buyer=1), {"buyer": 5}) == [{"customer_no": 5}]

    def test_rows_keep_their_order(self) -> None:
        rows = [{"buyer": key, "id": 1} for key in (3, 1, 2)]

        assert [row["customer_no"] for row in keys(sa.insert(Order), rows)] == [3, 1, 2]

    def test_many_values_keep_their_order(self) -> None:
        statement = sa.insert(Order).values([{"buyer": key, "id": 1} for key in (3, 1, 2)])

        assert [row["customer_no"] for row in keys(statement)] == [3, 1, 2]

    def test_rows_share_the_values_of_the_statement(self) -> None:
        statement = sa.insert(table).values(region=1)

        assert keys(statement, [{"item": "a"}, {"item": "b"}]) == [
            {"region": 1, "item": "a"},
            {"region": 1, "item": "b"},
        ]


class TestDefaults:
    """A Python-side default is made early, and the row is stored with that very value."""

    def test_default_is_made_and_sent(self) -> None:
        filled, found = keyed_rows(sa.insert(Device), [{"name": "x"}, {"name": "y"}])

        assert [row["id"] for row in filled] == [row["id"] for row in found]
        assert filled[0]["id"] != filled[1]["id"]

    def test_given_key_is_kept(self) -> None:
        key = uuid.uuid4()

        assert keys(sa.insert(Device), {"id": key}) == [{"id": key}]

    def test_callers_rows_are_not_changed(self) -> None:
        row = {"name": "x"}

        keyed_rows(sa.insert(Device), row)

        assert row == {"name": "x"}

    def test_scalar_default(self) -> None:
        assert keys(sa.insert(table), {"item": "a"}) == [{"region": 7, "item": "a"}]

    def test_callable_default(self) -> None:
        assert keys(sa.insert(numbered), {})[0]["id"] >= 100

    @pytest.mark.parametrize("column", ["made", "server", "number"])
    def test_default_of_the_server_is_none(self, column: str) -> None:
        assert python_default(numbered, column) is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("statement", "parameters"),
        [
            (sa.insert(Order), {"id": 1}),
            (sa.insert(Order), {"buyer": None, "id": 1}),
            (sa.insert(Order), None),
            (sa.insert(Order), [{"buyer": 5, "id": 1}, {"id": 2}]),
            (sa.insert(Order).values([{"buyer": 5, "id": 1}, {"id": 2}]), None),
            (sa.insert(Order).values(buyer=sa.bindparam("b")), {"id": 1}),
            (sa.insert(Order).values(buyer=sa.func.random()), {"id": 1}),
            (sa.insert(Order).values(buyer=sa.select(1).scalar_subquery()), {"id": 1}),
            (sa.insert(table), {"region": 1}),
        ],
    )
    def test_row_without_its_key(self, statement: Any, parameters: Any) -> None:
        with pytest.raises(MissingShardKey, match="needs its shard key"):
            keyed_rows(statement, parameters)

    def test_rows_that_only_the_server_knows(self) -> None:
        statement = sa.insert(Order).from_select(["buyer"], sa.select(Order.id))

        with pytest.raises(MissingShardKey, match="read the rows first"):
            keyed_rows(statement, None)


class TestBuckets:
    def test_bucket_is_that_of_the_hash(self) -> None:
        row = {"region": 1, "item": "nut"}
        kinds = (KeyKind.INTEGER, KeyKind.TEXT)

        assert bucket_of_key(table, row, 64) == bucket_of((1, "nut"), kinds, 64)

    @pytest.mark.parametrize("row", [{}, {"region": 1}, {"region": 1, "item": None}])
    def test_part_of_a_key_is_no_key(self, row: dict[str, Any]) -> None:
        with pytest.raises(MissingShardKey, match=r"plain needs its shard key \(region, item\)"):
            bucket_of_key(table, row, 64)

    def test_value_that_its_type_cannot_hold(self) -> None:
        with pytest.raises(InvalidShardKey):
            bucket_of_key(table, {"region": "one", "item": "nut"}, 64)
