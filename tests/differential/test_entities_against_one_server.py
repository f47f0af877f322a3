"""Objects over several shards are those of one server: loads, criteria, properties, inheritance.

Every statement runs on a sharded session and on a plain one with the same rows; what the objects
tell of themselves, their collections included, is the same, and so is the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import func, orm, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.hybrid import hybrid_property

from sqlroute import CrossShardRefused, Router, reference_table, sharded_by
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


class Base(orm.DeclarativeBase):
    pass


class City(Base):
    __tablename__ = "e_city"
    __table_args__ = reference_table()

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    name: orm.Mapped[str]

    people: orm.Mapped[list[Person]] = orm.relationship(
        primaryjoin="City.id == foreign(Person.city_id)",
        order_by="Person.age.desc(), Person.id",
        viewonly=True,
    )


class Capital(City):
    __tablename__ = "e_capital"
    __table_args__ = reference_table()

    id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("e_city.id"), primary_key=True)
    seat: orm.Mapped[str]


class Person(Base):
    __tablename__ = "e_person"
    __table_args__ = sharded_by("id")

    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    name: orm.Mapped[str]
    age: orm.Mapped[int | None]
    city_id: orm.Mapped[int | None]

    city: orm.Mapped[City | None] = orm.relationship(
        primaryjoin="foreign(Person.city_id) == City.id", viewonly=True
    )
    pets: orm.Mapped[list[Pet]] = orm.relationship(
        primaryjoin="Person.id == foreign(Pet.person_id)", order_by="Pet.n", viewonly=True
    )

    @hybrid_property
    def doubled(self) -> Any:
        return self.age * 2 if self.age is not None else None

    @doubled.inplace.expression
    @classmethod
    def _doubled(cls) -> Any:
        return cls.age * 2


class Pet(Base):
    __tablename__ = "e_pet"
    __table_args__ = sharded_by("person_id")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "pet"}  # noqa: RUF012

    person_id: orm.Mapped[int] = orm.mapped_column(
        sa.BigInteger, primary_key=True, autoincrement=False
    )
    n: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    kind: orm.Mapped[str]
    weight: orm.Mapped[int | None]


class Cat(Pet):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012

    lives: orm.Mapped[int | None]


class Dog(Pet):
    __tablename__ = "e_dog"
    __table_args__ = (
        sa.ForeignKeyConstraint(["person_id", "n"], ["e_pet.person_id", "e_pet.n"]),
        sharded_by("person_id"),
    )
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    person_id: orm.Mapped[int] = orm.mapped_column(
        sa.BigInteger, primary_key=True, autoincrement=False
    )
    n: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    tricks: orm.Mapped[int]


Person.pet_count = orm.column_property(  # type: ignore[attr-defined]
    select(func.count(Pet.n))
    .where(Pet.person_id == Person.id)
    .correlate_except(Pet)
    .scalar_subquery()
)
Person.shout = orm.column_property(func.upper(Person.name))  # type: ignore[attr-defined]

CITIES = [City(id=n, name=name) for n, name in enumerate(("Rome", "Oslo", "Nice"))]


def people() -> list[Any]:
    found: list[Any] = []
    for n in range(24):
        age = None if n % 7 == 0 else n % 5
        city = None if n % 6 == 0 else n % 4
        found.append(Person(id=n * 7 - 30, name=f"p{n % 4}", age=age, city_id=city))
        for number in range(n % 4):
            shared = {"person_id": n * 7 - 30, "n": number, "weight": (n + number) % 3}
            made = (Pet, Cat, Dog)[(n + number) % 3]
            own = {Pet: {}, Cat: {"lives": 9 - number}, Dog: {"tricks": n}}[made]
            found.append(made(**shared, **own))
    return found


Sides = tuple[Router, sa.Engine]


@pytest.fixture(scope="module")
def sides(sqlroute_topology: LocalTopology, sqlroute_single: LocalNode) -> Iterator[Sides]:
    url = sa.make_url(sqlroute_single.url.split("?")[0]).set(drivername="postgresql+psycopg")
    judge = sa.create_engine(url)
    with Router.from_config(sqlroute_topology.config_path) as router:
        router.drop_all(Base.metadata)
        router.create_all(Base.metadata)
        Base.metadata.drop_all(judge)
        Base.metadata.create_all(judge)
        for make in (router.sessionmaker(), orm.sessionmaker(judge)):
            with make() as session:
                session.add_all([City(id=city.id, name=city.name) for city in CITIES])
                session.flush()
                session.add_all(people())
                session.commit()
        yield router, judge
        router.drop_all(Base.metadata)
        Base.metadata.drop_all(judge)
    judge.dispose()


def told(value: Any) -> Any:
    """Return what an object tells of itself, loading what it has not."""
    if isinstance(value, Person):
        pets = [told(pet) for pet in value.pets]
        city = value.city.name if value.city else None
        own = (value.id, value.name, value.age, value.doubled)
        return (*own, value.pet_count, value.shout, city, pets)  # type: ignore[attr-defined]
    if isinstance(value, Pet):
        extra = getattr(value, "lives", None), getattr(value, "tricks", None)
        return (type(value).__name__, value.person_id, value.n, value.kind, value.weight, *extra)
    if isinstance(value, City):
        return value.id, value.name
    if isinstance(value, tuple | list | sa.Row):
        return [told(one) for one in value]
    return value


def asked(session: Any, ask: Callable[[Any], Any]) -> Any:
    found = ask(session)
    return [told(one) for one in found] if isinstance(found, list) else told(found)


def rows(statement: Any) -> Callable[[Any], Any]:
    return lambda session: session.execute(statement).unique().all()


def plain_rows(statement: Any) -> Callable[[Any], Any]:
    return lambda session: session.execute(statement).all()


P = Person
doubled = Person.doubled.expression
people_in_order = select(P).order_by(P.age.desc().nulls_last(), P.id)
wide = orm.with_polymorphic(Pet, [Cat, Dog])
other = orm.aliased(Person)
only_heavy = orm.with_loader_criteria(Pet, Pet.weight > 0)

ASKS: dict[str, Callable[[Any], Any]] = {
    "entities": rows(people_in_order),
    "entities by what is not selected": rows(select(P).order_by(func.length(P.name), -P.id)),
    "joined collections": rows(people_in_order.options(orm.joinedload(P.pets))),
    "joined collections, limited": rows(
        people_in_order.options(orm.joinedload(P.pets)).limit(5).offset(3)
    ),
    "selectin collections": rows(people_in_order.options(orm.selectinload(P.pets)).limit(7)),
    "subquery collections": rows(people_in_order.options(orm.subqueryload(P.pets))),
    "subquery collections, limited": rows(
        people_in_order.options(orm.subqueryload(P.pets)).limit(4)
    ),
    "immediate and joined": rows(
        people_in_order.options(orm.immediateload(P.pets), orm.joinedload(P.city))
    ),
    "contains_eager": rows(
        select(P).join(P.pets).options(orm.contains_eager(P.pets)).order_by(P.id, Pet.n)
    ),
    "loader criteria": rows(people_in_order.options(only_heavy, orm.selectinload(P.pets))),
    "loader criteria, joined": rows(people_in_order.options(only_heavy, orm.joinedload(P.pets))),
    "loader criteria of the entity": rows(
        people_in_order.options(orm.with_loader_criteria(P, P.age > 1))
    ),
    "hybrid": rows(select(P.id, P.doubled).where(P.doubled > 2).order_by(P.doubled, P.id)),
    "hybrids grouped": rows(select(doubled, func.count()).group_by(doubled).order_by(doubled)),
    "column property": rows(select(P).where(P.pet_count > 1).order_by(P.pet_count, P.id)),  # type: ignore[attr-defined]
    "column property in order": rows(select(P).order_by(P.shout.desc(), P.id).limit(6)),  # type: ignore[attr-defined]
    "deferred": rows(select(P).options(orm.defer(P.name)).order_by(P.id).limit(3)),
    "load only": rows(select(P).options(orm.load_only(P.age)).order_by(P.age, P.id)),
    "polymorphic": rows(select(Pet).order_by(Pet.weight, Pet.person_id, Pet.n)),
    "polymorphic, selectin": rows(
        select(Pet)
        .options(orm.selectin_polymorphic(Pet, [Cat, Dog]))
        .order_by(Pet.person_id, Pet.n)
    ),
    "with_polymorphic": rows(select(wide).order_by(wide.Dog.tricks.desc(), wide.person_id, wide.n)),
    "a subclass": rows(select(Dog).order_by(Dog.tricks, Dog.person_id, Dog.n)),
    "a single-table subclass": rows(select(Cat).order_by(Cat.lives, Cat.person_id, Cat.n)),
    "subclasses counted": rows(
        select(Pet.kind, func.count(), func.max(Cat.lives)).group_by(Pet.kind).order_by(Pet.kind)
    ),
    "distinct entities": rows(select(P).join(P.pets).distinct().order_by(P.id)),
    "distinct reference entities": rows(select(City).join(P, P.city_id == City.id).distinct()),
    "an entity of two": rows(select(P, Pet).join(P.pets).order_by(P.age, P.id, Pet.n).limit(9)),
    "an alias": rows(select(other).order_by(other.name, other.id.desc())),
    "relationship conditions": rows(select(P).where(P.pets.any(Pet.weight == 2)).order_by(P.id)),
    "bundles": rows(select(orm.Bundle("b", P.id, P.name)).order_by(P.id)),
    "a union of entities": rows(
        select(P.id, P.name)
        .where(P.age > 3)
        .union(select(P.id, P.name).where(P.age < 1))
        .order_by("id")
    ),
    "having": rows(
        select(P.name, func.count(Pet.n))
        .outerjoin(P.pets)
        .group_by(P.name)
        .having(func.count(Pet.n) > 8)
        .order_by(P.name)
    ),
    "groups of entities": plain_rows(
        select(P, func.count(Pet.n), func.array_agg(Pet.weight).aggregate_order_by(Pet.n))
        .join(P.pets)
        .group_by(P.id)
        .order_by(func.count(Pet.n).desc(), P.id)
        .limit(5)
    ),
    "first of each": rows(select(P).ext(distinct_on(P.name)).order_by(P.name, P.age.desc(), P.id)),
    "windows over the key": rows(
        select(
            Pet.person_id, func.rank().over(partition_by=Pet.person_id, order_by=Pet.weight), Pet.n
        ).order_by(Pet.person_id, Pet.n)
    ),
    "scalars": lambda s: s.scalars(people_in_order.options(orm.selectinload(P.pets))).all(),
    "mappings": lambda s: [
        dict(row) for row in s.execute(select(P.id, P.name).order_by(P.id)).mappings()
    ],
    "partitions": lambda s: [list(part) for part in s.scalars(people_in_order).partitions(5)],
    "one": lambda s: s.scalars(select(P).where(P.name == "p1").order_by(P.id).limit(1)).one(),
    "Query.all": lambda s: s.query(P).order_by(P.name, P.id).all(),
    "Query.first": lambda s: s.query(P).order_by(P.age.desc().nulls_last(), P.id).first(),
    "Query.one": lambda s: s.query(P).filter(P.id == -30).one(),
    "Query.get": lambda s: s.get(P, 5),
    "Query slices": lambda s: s.query(P).order_by(P.id)[3:7],
    "Query.with_entities": lambda s: (
        s.query(P).with_entities(P.name).distinct().order_by(P.name).all()
    ),
    "Query.exists": lambda s: s.query(s.query(P).filter(P.age == 4).exists()).scalar(),
    "Query.exists, of none": lambda s: [
        s.query(asked.exists()).scalar()
        for asked in (s.query(P).filter(P.age > 4), s.query(P).join(P.pets).filter(Pet.n == 2))
    ],
    "Query.count": lambda s: s.query(P).count(),
    "Query.scalar": lambda s: s.query(func.max(P.age)).scalar(),
    "yield_per": lambda s: list(s.query(P).order_by(P.id).yield_per(4)),
    "yield_per with selectin": lambda s: list(
        s.scalars(people_in_order.options(orm.selectinload(P.pets)).execution_options(yield_per=5))
    ),
}

cities = select(City).order_by(City.id)
cities_of_people = cities.join(City.people)


def people_of(statement: Any) -> Callable[[Any], Any]:
    return lambda s: [[city.name, city.people] for city in s.scalars(statement).unique()]


def changed_by_update(session: Any) -> Any:
    people = session.scalars(people_in_order.options(orm.joinedload(P.city))).all()
    session.execute(sa.update(City).where(City.id == 1).values(name="Lima"))
    return people


def merged_into(session: Any) -> Any:
    people = session.scalars(people_in_order.options(orm.joinedload(P.city))).all()
    session.merge(City(id=1, name="Lima"))
    return people


def one_object_for_each_city(session: Any) -> Any:
    """Loaded by joins on both shards, lazily, by key, and after all was forgotten."""
    met = []
    for options in (orm.joinedload(P.city), orm.lazyload(P.city)):
        people = session.scalars(people_in_order.options(options)).all()
        cities = {id(person.city) for person in people if person.city is not None}
        met += [len(cities), session.get(City, 1) in {person.city for person in people}]
        session.expunge_all()
    return met


ASKS |= {
    "reference entities, unique": rows(cities_of_people),
    "reference entities beside columns, unique": rows(
        select(City, P.age).join(City.people).order_by(City.id, P.age)
    ),
    "collections of reference entities": people_of(cities),
    "their selectin collections": people_of(cities.options(orm.selectinload(City.people))),
    "their subquery collections": people_of(cities.options(orm.subqueryload(City.people))),
    "one object for each row of a reference table": one_object_for_each_city,
    "reference objects after an UPDATE": changed_by_update,
    "reference objects after merge()": merged_into,
}

REFUSED: dict[str, Callable[[Any], Any]] = {
    "contains_eager of a reference entity": people_of(
        cities_of_people.options(orm.contains_eager(City.people))
    ),
    "inner joinedload of a reference entity": people_of(
        cities.options(orm.joinedload(City.people, innerjoin=True))
    ),
    "subquery collections, limited": ASKS.pop("subquery collections, limited"),
    "pets of another": rows(select(P, other).where(P.age == other.age)),
    "a window over all": rows(select(P.id, func.rank().over(order_by=P.age))),
}
"""What needs the rows of other shards: tier 3."""


@pytest.mark.parametrize("name", ASKS)
def test_objects_are_those_of_one_server(sides: Sides, name: str) -> None:
    router, judge = sides
    with router.sessionmaker()() as session, orm.Session(judge) as plain:
        expected = asked(plain, ASKS[name])
        found = asked(session, ASKS[name])

    if name == "distinct reference entities":
        found, expected = sorted(found), sorted(expected)
    assert found == expected
    assert expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_rows_of_other_shards_is_refused(sides: Sides, name: str) -> None:
    router, _ = sides
    with router.sessionmaker()() as session, pytest.raises(CrossShardRefused):
        asked(session, REFUSED[name])


def test_objects_of_a_merge_go_home_when_they_are_written(sides: Sides) -> None:
    """Each carries its shard: a change of the first of many is flushed to where it lives."""
    router, _ = sides
    with router.sessionmaker()() as session:
        first, *_, last = session.scalars(people_in_order.options(orm.joinedload(P.pets))).unique()
        first.name, last.name = "first", "last"
        session.flush()
        names = session.scalars(select(P.name).where(P.id.in_([first.id, last.id]))).all()
        session.rollback()

    assert sorted(names) == ["first", "last"]


def test_an_entity_of_two_reference_tables_is_deleted_on_every_shard(sides: Sides) -> None:
    """The child's row before its parent's, which it refers to."""
    router, _ = sides
    with router.sessionmaker()() as session:
        session.add(Capital(id=9, name="Bern", seat="Bundeshaus"))
        session.commit()
        session.delete(session.get_one(Capital, 9))
        session.commit()
        left = [
            session.scalar(
                select(func.count()).select_from(entity).where(entity.id == 9),
                execution_options={"sqlroute_shard": shard},
            )
            for entity in (City, Capital)
            for shard in ("s0", "s1")
        ]

    assert left == [0, 0, 0, 0]
