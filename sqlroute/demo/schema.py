"""The tables of the demo: flights and planes sharded by tail number, the rest held everywhere."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlroute.routing.declare import reference_table, sharded_by


class Base(DeclarativeBase):
    pass


class Flight(Base):
    """A departure from New York. Its primary key contains the shard key, as it must."""

    __tablename__ = "flights"
    __table_args__ = sharded_by("tailnum")

    tailnum: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    year: Mapped[int]
    month: Mapped[int]
    day: Mapped[int]
    dep_time: Mapped[int | None]
    sched_dep_time: Mapped[int]
    dep_delay: Mapped[int | None]
    arr_time: Mapped[int | None]
    sched_arr_time: Mapped[int]
    arr_delay: Mapped[int | None]
    carrier: Mapped[str]
    flight: Mapped[int]
    origin: Mapped[str]
    dest: Mapped[str]
    air_time: Mapped[int | None]
    distance: Mapped[int]
    hour: Mapped[int]
    minute: Mapped[int]
    time_hour: Mapped[datetime]


class Plane(Base):
    """An aircraft: on the shard of its flights."""

    __tablename__ = "planes"
    __table_args__ = sharded_by("tailnum")

    tailnum: Mapped[str] = mapped_column(primary_key=True)
    year: Mapped[int | None]
    type: Mapped[str | None]
    manufacturer: Mapped[str | None]
    model: Mapped[str | None]
    engines: Mapped[int | None]
    seats: Mapped[int | None]
    speed: Mapped[int | None]
    engine: Mapped[str | None]


class Airline(Base):
    """A carrier; on every shard."""

    __tablename__ = "airlines"
    __table_args__ = reference_table()

    carrier: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class Airport(Base):
    """An airport; on every shard."""

    __tablename__ = "airports"
    __table_args__ = reference_table()

    faa: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    lat: Mapped[float]
    lon: Mapped[float]
    alt: Mapped[int]
    tz: Mapped[int | None]
    dst: Mapped[str | None]
    tzone: Mapped[str | None]
