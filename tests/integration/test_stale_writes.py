"""No lost update through a stale read: two sessions read on a replica 3 s behind, one wins."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import REPLICAS, Shop, until
from models import Country, Customer, Order
from sqlalchemy import event, orm, select
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    Mapped,
    composite,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    synonym,
)

from sqlroute import Router, RoutingSession
from sqlroute.errors import StaleObjectRead, UnknownName
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]


class Base(orm.DeclarativeBase):
    pass


@dataclass
class Point:
    x: int
    y: int


tagged = sa.Table(
    "tagged",
    Base.metadata,
    sa.Column("item_id", sa.ForeignKey("item.id"), primary_key=True),
    sa.Column("tag_id", sa.ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="tag")


class Shelf(Base):
    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="shelf")
    items: Mapped[list[Item]] = relationship(
        back_populates="shelf", order_by="Item.id", passive_deletes=False
    )
    boxes: Mapped[list[Box]] = relationship(cascade="all, delete-orphan", order_by="Box.id")


class Box(Base):
    """No backref: its foreign key is set inside the flush only."""

    __tablename__ = "box"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="box")
    shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("shelf.id"))


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="old")
    stock: Mapped[int] = mapped_column(default=0)
    weight: Mapped[float | None]
    data: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSONB))
    plain: Mapped[Any | None] = mapped_column(JSONB)
    sizes: Mapped[list[float] | None] = mapped_column(ARRAY(sa.Float))
    pickled: Mapped[Any | None] = mapped_column(sa.PickleType)
    text: Mapped[str | None] = mapped_column(sa.Text, deferred=True)
    x: Mapped[int] = mapped_column(default=0)
    y: Mapped[int] = mapped_column(default=0)
    shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("shelf.id"))
    made_at: Mapped[dt.datetime] = mapped_column(server_default=sa.func.clock_timestamp())
    changed_at: Mapped[dt.datetime | None] = mapped_column(onupdate=sa.func.clock_timestamp())
    doubled: Mapped[int] = mapped_column(sa.Computed("stock * 2", persisted=True))

    point: Mapped[Point] = composite(Point, "x", "y")
    label = synonym("name")
    shelf: Mapped[Shelf | None] = relationship(back_populates="items")
    tags: Mapped[list[Tag]] = relationship(secondary=tagged)

    @hybrid_property
    def loud(self) -> str:
        return self.name.upper()

    @loud.inplace.setter
    def _set_loud(self, value: str) -> None:
        self.name = value.lower()


Item.others = orm.column_property(  # type: ignore[attr-defined]
    select(sa.func.count()).select_from(tagged).where(tagged.c.item_id == Item.id).scalar_subquery()
)


class Counted(Base):
    __tablename__ = "counted"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="old")
    version: Mapped[int] = mapped_column()

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Person(Base):
    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    name: Mapped[str] = mapped_column(default="old")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


class Engineer(Person):
    __tablename__ = "engineer"

    id: Mapped[int] = mapped_column(sa.ForeignKey("person.id"), primary_key=True)
    machine: Mapped[str] = mapped_column(default="old")

    __mapper_args__ = {"polymorphic_identity": "engineer"}  # noqa: RUF012


class Node(Base):
    """Refers to itself, so that a flush writes its rows one by one."""

    __tablename__ = "node"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="old")
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id"))
    favourite_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id"))

    children: Mapped[list[Node]] = relationship(foreign_keys=parent_id, order_by="Node.id")
    favourite: Mapped[Node | None] = relationship(
        foreign_keys=favourite_id, remote_side=id, post_update=True
    )


class Listened(Base):
    """Changed by its own ``before_update``, after SQLAlchemy has asked for the connection."""

    __tablename__ = "listened"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="old")
    touched: Mapped[int] = mapped_column(default=0)
    notes: Mapped[list[Note]] = relationship()


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    listened_id: Mapped[int | None] = mapped_column(sa.ForeignKey("listened.id"))


@event.listens_for(Listened, "before_update")
def _touch(_: Any, __: Any, target: Listened) -> None:
    target.touched += 1


left = sa.Table(
    "left",
    Base.metadata,
    sa.Column("left_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text),
)
right = sa.Table(
    "right",
    Base.metadata,
    sa.Column("right_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("owner", sa.ForeignKey("left.left_id")),
    sa.Column("note", sa.Text),
)


class Pair(Base):
    """Of an outer join: PostgreSQL locks one side only, and half the key may be NULL."""

    __table__ = sa.outerjoin(left, right, left.c.left_id == right.c.owner)


_STATE = (
    "SELECT pg_is_in_recovery(), current_setting('recovery_min_apply_delay')",
    "SELECT status, flushed_lsn, latest_end_lsn, last_msg_receipt_time, now() "
    "FROM pg_stat_wal_receiver",
    "SELECT application_name, state, sent_lsn, replay_lsn FROM pg_stat_replication",
    "SELECT pid, backend_type, state, wait_event_type, wait_event, now() - xact_start, query "
    "FROM pg_stat_activity WHERE pid <> pg_backend_pid()",
    "SELECT pid, relation::regclass, mode, granted FROM pg_locks WHERE relation > 16384",
)


class Stock:
    """One shard whose replica is held 3 s behind as soon as the test's rows are on it."""

    def __init__(self, servers: LocalTopology, router: Router) -> None:
        self.servers, self.router = servers, router
        self.replica = servers.node("s0-b")
        self.ran: list[str] = []

    def add(self, *objects: Any) -> None:
        """Store objects, wait until the replica has them, and hold it."""
        with self.session() as session:
            session.add_all(objects)
            session.commit()
        self.wait()
        self.replica.hold_replay(3.0)

    def wait(self) -> None:
        primary = self.router.monitor.ask("s0", 1.0).primary("s0")
        assert primary is not None
        lsn = primary.lsn
        try:
            until(lambda: all(node.is_readable and node.lsn >= lsn for node in self._replicas()))
        except AssertionError as late:
            raise AssertionError(f"the replica is not at {lsn:X}: {self._state()}") from late

    def _state(self) -> str:
        """Say what the servers are doing, for a failure that nobody has explained yet."""
        import psycopg

        found = [str(self._replicas())]
        for node in self.servers.nodes:
            with psycopg.connect(**node.conninfo, autocommit=True) as connection:
                for query in _STATE:
                    found.append(f"{node.name}: {connection.execute(query).fetchall()}")
        return "\n".join(found)

    def _replicas(self) -> Any:
        return self.router.monitor.ask("s0", 1.0).replicas("s0")

    def session(self, **options: Any) -> RoutingSession:
        return self.router.sessionmaker(**options)()

    def write(self, statement: str) -> None:
        """Write on the primary as another program would."""
        import psycopg

        with psycopg.connect(**self.servers.node("s0-a").conninfo, autocommit=True) as connection:
            connection.execute(statement.encode())

    def now(self, statement: Any) -> Any:
        """Read on the primary."""
        with self.session() as session, session.begin():
            return session.scalars(statement).unique().all()

    @property
    def checks(self) -> int:
        """Count the statements that locked rows to compare them."""
        return sum(
            statement.startswith("SELECT") and " FOR " in statement for statement in self.ran
        )


@pytest.fixture(scope="module")
def _stock(sqlroute_topology_factory: Any) -> Iterator[Stock]:
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="stale")
    with Router.from_config(servers.config_path) as router:
        stock = Stock(servers, router)
        stock.write("ALTER ROLE ALL SET lock_timeout = '10s'")
        router.create_all(Base.metadata)
        yield stock


@pytest.fixture
def stock(_stock: Stock) -> Iterator[Stock]:
    _stock.replica.hold_replay(0)
    names = ", ".join(f'"{name}"' for name in Base.metadata.tables)
    _stock.write(f"TRUNCATE {names}")
    _stock.wait()

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        _stock.ran.append(" ".join(statement.split()))

    _stock.ran.clear()
    event.listen(sa.Engine, "before_cursor_execute", note)
    yield _stock
    event.remove(sa.Engine, "before_cursor_execute", note)
    _stock.replica.hold_replay(0)


Change = Callable[[Any, RoutingSession], None]


def rename(name: str) -> Change:
    def change(found: Any, _: RoutingSession) -> None:
        found.name = name

    return change


def delete(found: Any, session: RoutingSession) -> None:
    session.delete(found)


def race(
    stock: Stock, kind: type, first: Change, second: Change, **options: Any
) -> Exception | None:
    """Let two sessions read row 1 on the replica and change it; return the second's error."""
    with stock.session(**options) as one, stock.session(**options) as two:
        mine, yours = one.get(kind, 1), two.get(kind, 1)
        first(mine, one)
        one.commit()
        second(yours, two)
        try:
            two.commit()
        except StaleObjectRead as error:
            two.rollback()
            return error
        return None


def set_(**values: Any) -> Change:
    def change(found: Any, _: RoutingSession) -> None:
        for name, value in values.items():
            setattr(found, name, value)

    return change


def in_place(name: str) -> Change:
    def change(found: Any, _: RoutingSession) -> None:
        getattr(found, name)["mine"] = 1

    return change


def in_place_flagged(name: str) -> Change:
    def change(found: Any, _: RoutingSession) -> None:
        getattr(found, name)["mine"] = 1
        orm.attributes.flag_modified(found, name)

    return change


class TestOneWins:
    @pytest.mark.parametrize("expire", [True, False])
    @pytest.mark.parametrize(
        ("kind", "first", "second", "differ"),
        [
            (Item, rename("one"), rename("two"), {"name", "changed_at"}),
            (Item, set_(stock=1), set_(name="two"), {"stock", "doubled", "changed_at"}),
            (Item, set_(label="one"), set_(label="two"), {"name", "changed_at"}),
            (Item, set_(loud="ONE"), set_(loud="TWO"), {"name", "changed_at"}),
            (Item, set_(point=Point(1, 1)), set_(point=Point(2, 2)), {"x", "y", "changed_at"}),
            (Item, in_place("data"), in_place("data"), {"data", "changed_at"}),
            (Item, in_place_flagged("plain"), in_place_flagged("plain"), {"plain", "changed_at"}),
            (Item, in_place_flagged("pickled"), in_place_flagged("pickled"), None),
            (Item, set_(shelf_id=1), set_(shelf_id=2), {"shelf_id", "changed_at"}),
            (Counted, rename("one"), rename("two"), {"name", "version"}),
            (Engineer, rename("one"), set_(machine="two"), {"name"}),
            (Engineer, set_(machine="one"), rename("two"), {"machine"}),
            (Person, set_(name="one"), set_(name="two"), {"name"}),
            (Item, rename("one"), delete, {"name", "changed_at"}),
            (Counted, rename("one"), delete, {"name", "version"}),
            (Engineer, set_(machine="one"), delete, {"machine"}),
            (Item, delete, rename("two"), set()),
            (Item, delete, delete, set()),
            (Engineer, delete, set_(machine="two"), set()),
            (Counted, delete, delete, set()),
            (Listened, rename("one"), rename("two"), {"name", "touched"}),
        ],
    )
    def test_of_two_sessions_that_read_one_row_on_a_replica(
        self, stock: Stock, kind: type, first: Change, second: Change, differ: Any, expire: bool
    ) -> None:
        """The first to commit wins; the other learns the row and what differs, never a value."""
        row = {"id": 1}
        if kind is Item:
            row |= {"data": {"a": "secret"}, "plain": {"a": 1}, "pickled": {"a": 1}}
        stock.add(Shelf(id=1), Shelf(id=2), kind(**row))

        error = race(stock, kind, first, second, expire_on_commit=expire)

        assert isinstance(error, StaleObjectRead)
        assert isinstance(error, orm.exc.StaleDataError)
        assert error.retryable
        ((name, identity, columns),) = error.objects
        assert identity == (1,)
        assert name in {kind.__name__, "Engineer"}
        if differ is not None:
            assert set(columns) == differ
        assert "secret" not in str(error)
        assert f"{name}(1)" in str(error)

    def test_the_loser_wins_when_it_runs_again(self, stock: Stock) -> None:
        """The session is usable after the rollback, and a read of the primary's row is written."""
        stock.add(Item(id=1))
        with stock.session() as two:
            yours = two.get(Item, 1)
            stock.write("UPDATE item SET stock = 5")
            assert yours is not None
            yours.stock += 1
            with pytest.raises(StaleObjectRead):
                two.commit()
            two.rollback()
            with two.begin():
                again = two.get(Item, 1)
                assert again is not None
                again.stock += 1

        assert stock.now(select(Item.stock)) == [6]

    def test_among_many_rows_all_that_differ_are_named(self, stock: Stock) -> None:
        """One statement checks the rows of one class; none of them is written."""
        stock.add(*(Item(id=i) for i in range(1, 6)))
        with stock.session() as session:
            items = session.scalars(select(Item).order_by(Item.id)).all()
            stock.write("UPDATE item SET stock = 5 WHERE id IN (2, 4)")
            for item in items:
                item.name = "new"
            stock.ran.clear()
            with pytest.raises(StaleObjectRead) as caught:
                session.flush()

        assert [identity for _, identity, _ in caught.value.objects] == [(2,), (4,)]
        assert "and 1 more object" in str(caught.value)
        assert stock.checks == 1
        assert not any(statement.startswith("UPDATE") for statement in stock.ran)

    def test_more_rows_than_one_statement_checks(self, stock: Stock) -> None:
        stock.add(*(Tag(id=i) for i in range(1101)))
        with stock.session() as session:
            tags = session.scalars(select(Tag)).all()
            stock.write("UPDATE tag SET name = 'x' WHERE id = 1100")
            for tag in tags:
                tag.name = "new"
            stock.ran.clear()
            with pytest.raises(StaleObjectRead) as caught:
                session.flush()

        assert [identity for _, identity, _ in caught.value.objects] == [(1100,)]
        assert stock.checks == 3


class TestRelationships:
    def test_a_many_to_one_that_both_reassign(self, stock: Stock) -> None:
        """Its foreign key is set inside the flush."""
        stock.add(Shelf(id=1), Shelf(id=2), Item(id=1))

        def move(shelf: int) -> Change:
            def change(found: Any, session: RoutingSession) -> None:
                found.shelf = session.get(Shelf, shelf)

            return change

        error = race(stock, Item, move(1), move(2))

        assert isinstance(error, StaleObjectRead)
        assert stock.now(select(Item.shelf_id)) == [1]

    @pytest.mark.parametrize(("kind", "name"), [(Item, "items"), (Box, "boxes")])
    def test_a_child_that_both_append(self, stock: Stock, kind: Any, name: str) -> None:
        """The child's row is UPDATEd, so the child is checked, with a backref or without."""
        stock.add(Shelf(id=1), Shelf(id=2), kind(id=7))

        def append(shelf: int) -> Change:
            def change(found: Any, session: RoutingSession) -> None:
                parent = session.get(Shelf, shelf)
                getattr(parent, name).append(found)

            return change

        with stock.session() as one, stock.session() as two:
            mine, yours = one.get(kind, 7), two.get(kind, 7)
            append(1)(mine, one)
            one.commit()
            append(2)(yours, two)
            with pytest.raises(StaleObjectRead) as caught:
                two.commit()

        assert caught.value.objects[0][0] == kind.__name__
        assert stock.now(select(kind.shelf_id)) == [1]

    def test_a_child_that_is_removed(self, stock: Stock) -> None:
        stock.add(Shelf(id=1, items=[Item(id=7)]))
        with stock.session() as session:
            shelf = session.get(Shelf, 1)
            assert shelf is not None
            assert [item.id for item in shelf.items] == [7]
            stock.write("UPDATE item SET stock = 9")
            shelf.items.clear()
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Item", (7,), ("stock", "doubled")),)

    def test_an_orphan_that_is_deleted_inside_the_flush(self, stock: Stock) -> None:
        stock.add(Shelf(id=1, boxes=[Box(id=1), Box(id=2)]))
        with stock.session() as session:
            shelf = session.get(Shelf, 1)
            assert shelf is not None
            assert len(shelf.boxes) == 2
            stock.write("UPDATE box SET name = 'new' WHERE id = 2")
            shelf.boxes.clear()
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Box", (2,), ("name",)),)

    def test_children_of_a_parent_that_is_deleted(self, stock: Stock) -> None:
        """Rows that a cascade deletes, and those whose foreign key it sets to NULL."""
        stock.add(Shelf(id=1, boxes=[Box(id=1)], items=[Item(id=1)]))
        for statement, name in (
            ("UPDATE box SET name = 'new'", "Box"),
            ("UPDATE item SET stock = 3", "Item"),
        ):
            with stock.session() as session:
                shelf = session.get(Shelf, 1)
                assert shelf is not None
                assert len(shelf.boxes) + len(shelf.items) == 2
                stock.write(statement)
                session.delete(shelf)
                with pytest.raises(StaleObjectRead) as caught:
                    session.commit()
            assert caught.value.objects[0][0] == name
            stock.replica.hold_replay(0)
            stock.wait()
            stock.replica.hold_replay(3.0)

    def test_a_parent_whose_columns_do_not_change_is_not_compared(self, stock: Stock) -> None:
        """Appending to a collection does not write the parent's row."""
        stock.add(Shelf(id=1))
        with stock.session() as session:
            shelf = session.get(Shelf, 1)
            assert shelf is not None
            stock.write("UPDATE shelf SET name = 'new'")
            shelf.boxes.append(Box(id=1))
            session.commit()

        assert stock.now(select(Shelf.name)) == ["new"]
        assert stock.now(select(Box.shelf_id)) == [1]

    def test_rows_of_a_secondary_table_that_both_insert(self, stock: Stock) -> None:
        """The key of the association refuses the second."""
        stock.add(Tag(id=1), Item(id=1))

        def tag(found: Any, session: RoutingSession) -> None:
            found.tags.append(session.get(Tag, 1))

        with pytest.raises(sa.exc.IntegrityError):
            race(stock, Item, tag, tag)

    def test_rows_of_a_secondary_table_that_both_delete(self, stock: Stock) -> None:
        """SQLAlchemy counts the rows of the association that were matched."""
        stock.add(Item(id=1, tags=[Tag(id=1)]))

        def untag(found: Any, _: RoutingSession) -> None:
            found.tags.clear()

        with stock.session() as one, stock.session() as two:
            mine, yours = one.get(Item, 1), two.get(Item, 1)
            assert mine is not None
            assert yours is not None
            assert len(yours.tags) == 1
            untag(mine, one)
            one.commit()
            untag(yours, two)
            with pytest.raises(orm.exc.StaleDataError):
                two.commit()

    def test_rows_that_refer_to_their_own_table(self, stock: Stock) -> None:
        """Their UPDATEs are ordered one by one; each is checked before it is sent."""
        stock.add(Node(id=1, children=[Node(id=2, children=[Node(id=3)])]))
        with stock.session() as session:
            one, two, three = session.scalars(select(Node).order_by(Node.id)).all()
            assert [two.children, one.children] == [[three], [two]]
            stock.write("UPDATE node SET name = 'new' WHERE id = 3")
            two.children.remove(three)
            one.children.append(three)
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Node", (3,), ("name",)),)

    def test_a_post_update(self, stock: Stock) -> None:
        """An UPDATE that follows the others, and has no mapper event."""
        stock.add(Node(id=1), Node(id=2))
        with stock.session() as session:
            one, two = session.scalars(select(Node).order_by(Node.id)).all()
            stock.write("UPDATE node SET name = 'new' WHERE id = 1")
            one.favourite = two
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Node", (1,), ("name",)),)

    def test_what_before_update_changes(self, stock: Stock) -> None:
        """A listener makes an UPDATE of an object that had no change of its own."""
        stock.add(Listened(id=1))
        with stock.session() as session:
            found = session.get(Listened, 1)
            assert found is not None
            stock.write("UPDATE listened SET touched = 9")
            found.notes.append(Note(id=1))
            with pytest.raises(StaleObjectRead):
                session.commit()

        assert stock.now(select(Listened.touched)) == [9]

    def test_a_new_object_that_takes_the_place_of_a_deleted_one(self, stock: Stock) -> None:
        """SQLAlchemy makes one UPDATE of the DELETE and the INSERT."""
        stock.add(Item(id=1))
        with stock.session() as session:
            session.delete(session.get(Item, 1))
            session.add(Item(id=1, name="another"))
            stock.write("UPDATE item SET stock = 9")
            with pytest.raises(StaleObjectRead):
                session.commit()


class TestWhatWasLoaded:
    def test_only_what_the_replica_gave_is_compared(self, stock: Stock) -> None:
        """A column that was not loaded cannot be stale."""
        stock.add(Item(id=1, text="long"))
        with stock.session() as session:
            item = session.scalars(select(Item).options(load_only(Item.name))).one()
            stock.write("UPDATE item SET stock = 9, text = 'other'")
            item.name = "new"
            session.commit()

        assert stock.now(select(Item.stock)) == [9]

    def test_a_deferred_column_that_was_read_is_compared(self, stock: Stock) -> None:
        stock.add(Item(id=1, text="long"))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            assert item.text == "long"
            stock.write("UPDATE item SET text = 'other'")
            item.name = "new"
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Item", (1,), ("text",)),)

    def test_a_column_read_on_the_primary_does_not_make_the_others_fresh(
        self, stock: Stock
    ) -> None:
        """A deferred column that is read later, in the transaction, gives the object a new run."""
        stock.add(Item(id=1, text="long"), Tag(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9, text = 'other'")
            session.add(Tag(id=2))
            session.flush()  # pins the transaction to the primary
            assert item.text == "other"
            item.name = "new"
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert set(caught.value.objects[0][2]) == {"stock", "doubled"}

    def test_an_expired_object_that_a_query_on_a_replica_fills(self, stock: Stock) -> None:
        """SQLAlchemy fills what is expired without a new run number."""
        stock.add(Item(id=1), Item(id=2))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            session.rollback()
            items = session.scalars(select(Item).order_by(Item.id)).all()
            assert items[0] is item
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                session.commit()

    def test_an_object_made_here_that_a_query_on_a_replica_fills(self, stock: Stock) -> None:
        """It has no run number at all."""
        stock.add()
        with stock.session() as session:
            item = Item(id=1)
            session.add(item)
            session.commit()
            stock.replica.hold_replay(0)
            stock.wait()
            stock.replica.hold_replay(3.0)
            assert session.scalars(select(Item)).one() is item
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                session.commit()

    @pytest.mark.parametrize("half", [False, True])
    def test_a_class_of_an_outer_join(self, stock: Stock, half: bool) -> None:
        stock.write("INSERT INTO \"left\" VALUES (1, 'old')")
        if not half:
            stock.write("INSERT INTO \"right\" VALUES (2, 1, 'old')")
        stock.add(Tag(id=1))
        for statement in ("SELECT 1", "UPDATE \"left\" SET name = 'theirs'"):
            with stock.session() as session:
                pair: Any = session.scalars(select(Pair)).one()
                stock.write(statement)
                pair.name = "mine"
                if statement == "SELECT 1":
                    session.flush()
                    session.rollback()
                else:
                    with pytest.raises(StaleObjectRead) as caught:
                        session.flush()

        assert caught.value.objects == (("Pair", (1, None if half else 2), ("name",)),)

    @pytest.mark.parametrize("lock", [False, True])
    def test_an_object_refreshed_on_the_primary_is_not_checked(
        self, stock: Stock, lock: bool
    ) -> None:
        """``refresh`` in the transaction is the other way to be safe."""
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9")
            session.add(Tag(id=1))
            session.flush()
            session.refresh(item, with_for_update=lock)
            assert item.stock == 9
            item.name = "new"
            stock.ran.clear()
            session.commit()

        assert stock.checks == 0

    def test_what_the_primary_gave_in_the_transaction_is_not_checked(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session, session.begin():
            item = session.get(Item, 1)
            assert item is not None
            item.name = "new"
            stock.ran.clear()

        assert stock.checks == 0

    def test_populate_existing_on_the_primary_makes_an_object_fresh(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9")
            session.add(Tag(id=1))
            session.flush()
            session.scalars(select(Item).execution_options(populate_existing=True)).all()
            item.name = "new"
            session.commit()

        assert stock.now(select(Item.stock)) == [9]

    @pytest.mark.parametrize("how", ["scalar", "scalars", "selectin", "lazy", "stream", "query"])
    def test_every_way_of_loading_counts(self, stock: Stock, how: str) -> None:
        stock.add(Shelf(id=1, items=[Item(id=1)]))
        with stock.session() as session:
            item: Any
            if how == "scalar":
                item = session.scalar(select(Item))
            elif how == "scalars":
                item = session.scalars(select(Item)).one()
            elif how == "selectin":
                item = (
                    session.scalars(select(Shelf).options(selectinload(Shelf.items))).one().items[0]
                )
            elif how == "lazy":
                item = session.scalars(select(Shelf)).one().items[0]
            elif how == "stream":
                options = {"yield_per": 1}
                item = next(iter(session.scalars(select(Item), execution_options=options).all()))
            else:
                item = session.query(Item).one()
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                session.commit()

    def test_nan_and_objects_without_equality_are_what_they_were(self, stock: Stock) -> None:
        """A value that is not equal to itself is no difference."""
        stock.add(Item(id=1, weight=math.nan, sizes=[1.0, math.nan], pickled=Opaque(3)))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            item.name = "new"
            session.commit()

        assert stock.now(select(Item.name)) == ["new"]

    def test_a_detached_object_keeps_what_it_was_loaded_from(self, stock: Stock) -> None:
        """It is added to a session that has read nothing itself."""
        stock.add(Item(id=1))
        with stock.session() as one:
            item = one.get(Item, 1)
            assert item is not None
        stock.write("UPDATE item SET stock = 9")
        with stock.session() as two:
            two.add(item)
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                two.commit()

    @pytest.mark.parametrize("several", [False, True])
    def test_merge_writes_no_stale_value(self, stock: Stock, several: bool) -> None:
        """``merge`` copies what it is given over the primary's row, the unchanged values too."""
        stock.add(Item(id=1))
        with stock.session() as one:
            item = one.get(Item, 1)
            assert item is not None
        item.name = "new"
        stock.write("UPDATE item SET stock = 9")
        with stock.session() as two:
            with pytest.raises(StaleObjectRead):
                two.merge_all([item]) if several else two.merge(item)
            two.commit()

        assert stock.now(select(Item.stock)) == [9]

    def test_merge_into_an_object_that_a_replica_gave(self, stock: Stock) -> None:
        """Nothing is loaded then, so the flush checks."""
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            stock.write("UPDATE item SET stock = 9")
            merged = session.merge(Item(id=1, name="new"))
            assert merged is item
            with pytest.raises(StaleObjectRead):
                session.commit()

    def test_bulk_save_objects(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with session.no_autoflush, pytest.raises(StaleObjectRead):
                session.bulk_save_objects([item])

        assert stock.now(select(Item.name)) == ["old"]


class Opaque:
    """Equal to nothing but itself."""

    def __init__(self, value: int) -> None:
        self.value = value


class TestTransactions:
    def test_a_row_is_checked_once_and_stays_locked(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.ran.clear()
            for name in ("a", "b", "c"):
                item.name = name
                session.flush()
            with pytest.raises(Exception, match="lock timeout"):
                stock.write("SET lock_timeout = '50ms'; UPDATE item SET stock = 9")
            session.commit()

        assert stock.checks == 1
        assert " FOR NO KEY UPDATE" in next(s for s in stock.ran if " FOR " in s)

    def test_a_delete_takes_the_lock_it_needs(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            session.delete(session.get(Item, 1))
            stock.ran.clear()
            session.commit()

        assert any(statement.endswith(" FOR UPDATE") for statement in stock.ran)
        assert stock.now(select(Item.id)) == []

    @pytest.mark.parametrize("change", [rename("new"), delete])
    def test_after_a_savepoint_is_rolled_back_it_is_checked_again(
        self, stock: Stock, change: Change
    ) -> None:
        """The savepoint's locks are gone with it."""
        stock.add(Item(id=1), Tag(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            savepoint = session.begin_nested()
            change(item, session)
            session.flush()
            savepoint.rollback()
            stock.write("UPDATE item SET stock = 9")
            is_expired = "name" not in item.__dict__
            item.name = "two"
            if is_expired:
                session.commit()
            else:
                with pytest.raises(StaleObjectRead):
                    session.commit()
                session.rollback()

        assert stock.now(select(Item.stock)) == [9]

    def test_a_released_savepoint_keeps_the_lock(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.ran.clear()
            with session.begin_nested():
                item.name = "one"
            item.name = "two"
            session.commit()

        assert stock.checks == 1
        assert stock.now(select(Item.name)) == ["two"]

    def test_a_savepoint_can_be_tried_again(self, stock: Stock) -> None:
        """The stale flush costs the savepoint, not the transaction."""
        stock.add(Item(id=1), Tag(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9")
            session.add(Tag(id=2))
            session.flush()
            with pytest.raises(StaleObjectRead), session.begin_nested():
                item.name = "one"
            item.stock += 1
            session.commit()

        assert stock.now(select(Item.stock)) == [10]

    def test_autoflush_checks_too(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                session.scalars(select(Tag)).all()

    def test_an_object_without_net_change_is_not_checked(self, stock: Stock) -> None:
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            item.name = "new"
            item.name = "old"
            stock.write("UPDATE item SET stock = 9")
            stock.ran.clear()
            session.commit()

        assert stock.checks == 0

    def test_objects_kept_over_a_commit_are_plain(self, stock: Stock) -> None:
        """What the session wrote itself is no read of a replica, as SQLAlchemy has it."""
        stock.add(Item(id=1), Item(id=2))
        with stock.session(expire_on_commit=False) as session:
            one, two = session.scalars(select(Item).order_by(Item.id)).all()
            one.name = "one"
            session.commit()
            stock.write("UPDATE item SET stock = 9")
            one.name = "again"
            session.commit()
            two.name = "two"
            with pytest.raises(StaleObjectRead):
                session.commit()

    def test_defaults_of_the_server_are_read_back_and_compared(self, stock: Stock) -> None:
        """What an UPDATE made on the server does not look stale to the next transaction."""
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None
            for stock_now in (1, 2):
                item.stock = stock_now
                session.commit()
                assert item.doubled == 2 * stock_now
                assert item.changed_at is not None

    def test_a_session_that_never_met_a_replica_pays_nothing(self, stock: Stock) -> None:
        stock.add()
        with stock.session() as session:
            session.add(Item(id=1))
            session.commit()
            stock.ran.clear()
            with session.begin():
                found = session.get(Item, 1)
                assert found is not None
                found.name = "new"

        assert stock.checks == 0


class TestTheSwitch:
    def test_allow_is_plain_sqlalchemy(self, stock: Stock) -> None:
        stock.add(Item(id=1))

        error = race(stock, Item, set_(stock=1), set_(stock=2), stale_writes="allow")

        assert error is None
        assert stock.now(select(Item.stock)) == [2]

    @pytest.mark.parametrize("value", ["", "Check", None, True])
    def test_an_unknown_value_is_refused(self, stock: Stock, value: Any) -> None:
        with pytest.raises(
            UnknownName, match=r'stale_writes=.* is unknown; it is "check" or "allow"'
        ):
            stock.session(stale_writes=value)


def test_async_sessions_check_too(stock: Stock) -> None:
    """``AsyncSession`` has rows made into objects before it can be told whose they are."""
    stock.add(Shelf(id=1, items=[Item(id=1)]))

    async def run(statement: Any, pick: Callable[[Any], Any]) -> None:
        async with stock.router.async_sessionmaker()() as session:
            item = pick((await session.scalars(statement)).one())
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                await session.commit()
            await session.rollback()

    async def main() -> None:
        try:
            await run(select(Item), lambda found: found)
            await run(select(Shelf).options(selectinload(Shelf.items)), lambda s: s.items[0])
        finally:
            await stock.router.aclose()

    stock.write("UPDATE item SET stock = 9")
    asyncio.run(main())


class TestShards:
    def test_objects_of_two_shards_in_one_flush(self, held: Shop) -> None:
        """Each shard's rows are checked on its own primary, in the transaction."""
        zero, one = held.keys("s0")[0], held.keys("s1")[0]
        with held.router.sessionmaker()() as session:
            session.add_all([Customer(id=zero, name="old"), Customer(id=one, name="old")])
            session.commit()
        until(lambda: _customers(held) == 2)
        with held.router.sessionmaker()() as first, held.router.sessionmaker()() as second:
            mine = first.scalars(select(Customer).order_by(Customer.id)).all()
            yours = second.scalars(select(Customer).order_by(Customer.id)).all()
            mine[0].name = "first"
            first.commit()
            for customer in yours:
                customer.name = "second"
            with pytest.raises(StaleObjectRead) as caught:
                second.commit()
            second.rollback()

        assert [identity for _, identity, _ in caught.value.objects] == [(min(zero, one),)]
        assert held.on("s0", "SELECT name FROM customer") + held.on(
            "s1", "SELECT name FROM customer"
        ) in ([("first",), ("old",)], [("old",), ("first",)])

    def test_a_row_of_a_reference_table(self, held: Shop) -> None:
        """It may have been read from any shard; the first one's row is the one that counts."""
        with held.router.sessionmaker()() as session:
            session.add(Country(code="de", name="old"))
            session.commit()
        until(lambda: all(held.at(n, "SELECT 1 FROM country") for n in REPLICAS))
        with held.router.sessionmaker()() as session:
            country = session.get(Country, "de")
            assert country is not None
            for shard in ("s0", "s1"):
                held.on(shard, "UPDATE country SET name = 'new'")
            country.name = "mine"
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Country", ("de",), ("name",)),)

    def test_a_child_with_the_shard_key(self, held: Shop) -> None:
        key = held.keys("s0")[0]
        with held.router.sessionmaker()() as session:
            session.add(Customer(id=key, name="old", orders=[Order(id=1, amount=1)]))
            session.commit()
        until(lambda: _customers(held) == 1)
        with held.router.sessionmaker()() as session:
            order = session.get(Order, (key, 1))
            assert order is not None
            held.on("s0", 'UPDATE "order" SET amount = 2')
            order.amount = 3
            with pytest.raises(StaleObjectRead) as caught:
                session.commit()

        assert caught.value.objects == (("Order", (key, 1), ("amount",)),)


def _customers(shop: Shop) -> int:
    """Count the customers that every replica has."""
    counts = [shop.at(node, "SELECT count(*) FROM customer")[0][0] for node in ("s0-b", "s0-c")]
    more = [shop.at(node, "SELECT count(*) FROM customer")[0][0] for node in ("s1-b", "s1-c")]
    return min(counts) + min(more)


class TestLoadsOfAWrite:
    @pytest.mark.parametrize("read_before", [False, True])
    def test_children_that_only_the_primary_has_yet(self, stock: Stock, read_before: bool) -> None:
        """A delete and its flush load the children from the primary: none is left behind."""
        stock.add(Shelf(id=1, items=[Item(id=1)], boxes=[Box(id=1)]))
        with stock.session() as session:
            shelf = session.get(Shelf, 1)
            if read_before:
                session.scalars(select(Box)).all()
            stock.write(
                "INSERT INTO item (id, name, stock, x, y, shelf_id) VALUES (2, 'n', 0, 0, 0, 1);"
                "INSERT INTO box (id, name, shelf_id) VALUES (2, 'n', 1)"
            )
            session.delete(shelf)
            session.commit()

        assert stock.now(select(Item.id).where(Item.shelf_id.is_(None))) == [1, 2]
        assert stock.now(select(Box.id)) == []

    def test_a_listener_may_write_in_bulk_within_the_flush(self, stock: Stock) -> None:
        """Asking per object for a connection must not get in the way of bulk persistence."""
        stock.add(Item(id=1))
        with stock.session() as session:
            item = session.get(Item, 1)
            assert item is not None

            def audit(_: Any, uow: Any, *__: Any) -> None:
                session.execute(sa.insert(Tag), [{"id": len(audits) + 1, "name": "audit"}])
                audits.append(uow)

            audits: list[Any] = []
            event.listen(session, "before_flush", audit)
            event.listen(session, "after_flush", audit)
            item.name = "new"
            session.commit()

        assert stock.now(select(Tag.id)) == [1, 2]


class TestInTheSameMoment:
    def test_one_of_several_threads_wins(self, stock: Stock) -> None:
        """All have read the same row on the replica, and flush at once."""
        stock.add(Item(id=1))
        ready = threading.Barrier(4)

        def add_one() -> bool:
            with stock.session() as session:
                item = session.get(Item, 1)
                assert item is not None
                assert item.stock == 0
                item.stock += 1
                ready.wait(20)
                try:
                    session.commit()
                except StaleObjectRead:
                    return False
                return True

        with ThreadPoolExecutor(4) as pool:
            won = [future.result() for future in [pool.submit(add_one) for _ in range(4)]]

        assert sorted(won) == [False, False, False, True]
        assert stock.now(select(Item.stock)) == [1]

    def test_a_read_only_transaction_counts_as_a_read(self, stock: Stock) -> None:
        """What it loaded on its replica is checked when a later transaction writes it."""
        stock.add(Item(id=1))
        with stock.session(expire_on_commit=False) as session:
            with session.begin(read_only=True):
                item = session.get(Item, 1)
                assert item is not None
            stock.write("UPDATE item SET stock = 9")
            item.name = "new"
            with pytest.raises(StaleObjectRead):
                session.commit()
