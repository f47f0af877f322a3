"""What is known of an object that a replica gave: without servers, on plain sessions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import JSON, ForeignKey, create_engine, inspect, orm, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import StaticPool

from sqlroute.errors import StaleObjectRead, UnknownName
from sqlroute.stale import ReplicaRun, StaleWrites, before_load, buffering, is_marked, mark


class Base(orm.DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    data: Mapped[Any] = mapped_column(JSON, deferred=True)
    children: Mapped[list[Child]] = relationship()


class Child(Base):
    __tablename__ = "child"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Parent(id=1, name="one", data={"a": 1}, children=[Child(id=1)]))
        session.commit()
        session.expunge_all()
        yield session
    engine.dispose()


def from_replica(session: Session, statement: Any) -> Any:
    """Load as a replica's answer is loaded."""
    result = session.execute(statement)
    mark(result)
    return result.scalars().all()


def marked(instance: object) -> bool:
    return is_marked(inspect(instance))


def test_what_a_replica_gave_is_marked(session: Session) -> None:
    (parent,) = from_replica(session, select(Parent))

    assert marked(parent)


def test_what_a_primary_gave_is_not(session: Session) -> None:
    assert not marked(session.get(Parent, 1))


def test_a_mark_is_equal_to_the_number_it_replaces() -> None:
    """SQLAlchemy compares the numbers of loads, row by row."""
    assert ReplicaRun(7) == 7
    assert hash(ReplicaRun(7)) == hash(7)


def test_rows_of_columns_have_nothing_to_mark(session: Session) -> None:
    result = session.connection().execute(select(Parent.id))
    mark(result)

    assert result.scalars().all() == [1]


def test_the_mark_goes_with_the_object(session: Session) -> None:
    """It is the object's, not the session's."""
    (parent,) = from_replica(session, select(Parent))
    session.expunge(parent)

    assert marked(parent)


def test_what_a_replica_fills_is_marked(session: Session) -> None:
    """An object that the session has, expired, is filled without a new number."""
    parent = session.get_one(Parent, 1)
    session.expire(parent)
    from_replica(session, select(Parent))

    assert parent.name == "one"
    assert marked(parent)


def test_an_object_filled_anew_by_the_primary_is_not_marked(session: Session) -> None:
    (parent,) = from_replica(session, select(Parent))
    session.expire(parent)
    session.scalars(select(Parent)).all()

    assert not marked(parent)


def test_a_column_from_the_primary_leaves_the_mark(session: Session) -> None:
    """A deferred column gives the object the number of another load."""
    (parent,) = from_replica(session, select(Parent))
    original = session._execute_internal

    def told(statement: Any, params: Any = None, **options: Any) -> Any:
        before_load(options.get("execution_options") or {})
        return original(statement, params, **options)

    session._execute_internal = told  # type: ignore[method-assign]

    assert parent.data == {"a": 1}
    assert marked(parent)


def test_a_refresh_on_the_primary_takes_the_mark_away(session: Session) -> None:
    (parent,) = from_replica(session, select(Parent))
    session.refresh(parent)

    assert not marked(parent)


def test_an_update_statement_does_not_disturb_the_marks(session: Session) -> None:
    """It tells objects their new values by an event without a load."""
    (parent,) = from_replica(session, select(Parent))
    session.execute(update(Parent).values(name="two"))

    assert parent.name == "two"
    assert marked(parent)


def test_rows_are_made_into_objects_at_once_where_that_was_asked_for(session: Session) -> None:
    """``AsyncSession`` asks for it: later there is no greenlet to load in."""
    options, buffered = buffering({"prebuffer_rows": True, "other": 1})
    result = session.execute(select(Parent), execution_options=options)
    mark(result, buffered=buffered)

    assert options == {"other": 1}
    assert len(session.identity_map.all_states()) == 1
    assert [marked(parent) for parent in result.scalars()] == [True]


def test_other_options_are_left_as_they_are() -> None:
    options = {"other": 1}

    assert buffering(options) == (options, False)


@pytest.mark.parametrize("mode", ["check", "allow"])
def test_the_switch_says_what_it_is(mode: str) -> None:
    assert repr(StaleWrites(mode)) == f"<StaleWrites {mode}>"


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(UnknownName) as caught:
        StaleWrites("sometimes")

    message = 'stale_writes=\'sometimes\' is unknown; it is "check" or "allow"'
    assert str(caught.value) == message


def test_a_session_that_allows_never_needs_a_check() -> None:
    allowing, checking = StaleWrites("allow"), StaleWrites("check")
    for writes in (allowing, checking):
        writes.meet()

    assert (allowing.is_needed, checking.is_needed) == (False, True)


def test_the_error_names_the_row_and_what_to_do() -> None:
    error = StaleObjectRead((("Item", (1, "a"), ("name", "stock")), ("Item", (2, "b"), ())))

    assert str(error) == (
        "Item(1, 'a') was read from a replica and is not the primary's row: name, stock changed "
        "(and 1 more object); roll back and run the unit of work again, "
        'with consistency="strong" where it must not meet this'
    )
    assert error.retryable
    assert isinstance(error, SQLAlchemyError)
    assert isinstance(error, StaleDataError)
    assert copy.copy(error).objects == error.objects


def test_the_error_says_that_a_row_is_gone() -> None:
    assert "its row was deleted;" in str(StaleObjectRead((("Item", (1,), ()),)))
