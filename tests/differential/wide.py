"""A table of every type, whole in one schema and dealt to three others, and who judges a merge."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from sqlalchemy import orm
from sqlalchemy.ext.hybrid import hybrid_property

from sqlroute.health import TextOrder
from sqlroute.local.node import LocalNode
from sqlroute.routing.merge import merge
from sqlroute.routing.rewrite import rewrite

PARTS = 3
SCHEMAS = ("whole", *(f"part_{number}" for number in range(PARTS)))
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Lowered(sa.types.TypeDecorator[str]):
    """Text that Python sees reversed: its order in Python is not that of the database."""

    impl = sa.Text(collation="C")
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else value[::-1]


class Base(orm.DeclarativeBase):
    pass


class Wide(Base):
    __tablename__ = "wide"

    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, primary_key=True)
    big: orm.Mapped[int | None] = orm.mapped_column(sa.BigInteger)
    whole: orm.Mapped[int | None] = orm.mapped_column(sa.Integer)
    small: orm.Mapped[int | None] = orm.mapped_column(sa.SmallInteger)
    exact: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric)
    price: orm.Mapped[Decimal | None] = orm.mapped_column(sa.Numeric(12, 2))
    lossy: orm.Mapped[float | None] = orm.mapped_column(sa.Numeric(30, 18, asdecimal=False))
    real: orm.Mapped[float | None] = orm.mapped_column(sa.Double)
    text: orm.Mapped[str | None] = orm.mapped_column(sa.Text(collation="C"))
    mirror: orm.Mapped[str | None] = orm.mapped_column(Lowered)
    day: orm.Mapped[dt.date | None] = orm.mapped_column(sa.Date)
    clock: orm.Mapped[dt.time | None] = orm.mapped_column(sa.Time)
    naive: orm.Mapped[dt.datetime | None] = orm.mapped_column(sa.DateTime)
    moment: orm.Mapped[dt.datetime | None] = orm.mapped_column(sa.DateTime(timezone=True))
    flag: orm.Mapped[bool | None] = orm.mapped_column(sa.Boolean)
    key: orm.Mapped[uuid.UUID | None] = orm.mapped_column(sa.Uuid)
    blob: orm.Mapped[bytes | None] = orm.mapped_column(sa.LargeBinary)
    mood: orm.Mapped[str | None] = orm.mapped_column(sa.Enum("sad", "ok", "happy", name="mood"))

    notes: orm.Mapped[list[Note]] = orm.relationship(order_by="Note.id")

    @hybrid_property
    def doubled(self) -> Any:
        return self.small * 2  # type: ignore[operator]


class Note(Base):
    __tablename__ = "note"

    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    wide_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("wide.id"))


W = Wide.__table__.c
EPOCH = dt.datetime(2024, 11, 3, 4, 0)  # clocks in New York go back at 06:00 UTC

decimals = st.one_of(
    st.sampled_from([Decimal(text) for text in ("NaN", "Infinity", "-Infinity", "0", "0.00")]),
    st.sampled_from([Decimal(text) for text in ("1.0", "1.00", "-1", "9999", "10000", "1e-30")]),
    st.decimals(-(10**6), 10**6, allow_nan=False, places=4),
    st.builds(
        lambda digits, exponent: Decimal((0, digits, exponent)),
        st.lists(st.integers(0, 9), min_size=1, max_size=60).map(tuple),
        st.integers(-40, 0),
    ),
)
INFINITE = [float("nan"), float("inf"), float("-inf")]
UNUSUAL = ("nan", "inf", "-inf", "infinity", "-infinity")
TEXTS = ["", "a", "A", "B", "a b", "ab", "_x", "é", "z", "10", "9", "ﬀ", "😀", "日"]
EXACT = ["NaN", "Infinity", "-Infinity", "0", "0.00", "1.0", "1.00", "-1", "2", "3", "7"]
EXACT += ["9999", "10000", "9999.9999", "1e-30", "0.010", "12345678901234567890"]
EXACT += ["-99999999999999999999.5", "333333333333333333333333333333.3"]
POOLS: dict[str, list[Any]] = {
    "big": [*range(-3, 4), 2**60, -(2**60), 2**60 + 1],
    "whole": [*range(-3, 4), 2**31 - 1, -(2**31)],
    "small": [*range(-3, 4)],
    "exact": [Decimal(text) for text in EXACT],
    "price": [Decimal(text) for text in ("0.00", "1.10", "2.25", "-7.03", "999.99")],
    "lossy": [Decimal("0.1"), *(Decimal("0.1") + Decimal(n) / 10**18 for n in range(1, 6))],
    "real": [*INFINITE, *(n / 4 for n in range(-6, 7))],
    "text": TEXTS,
    "mirror": TEXTS,
    "day": [dt.date(2024, 2, 28) + dt.timedelta(days=n) for n in range(4)],
    "clock": [dt.time(n, 0, 0, n) for n in range(4)],
    "naive": [EPOCH + dt.timedelta(minutes=30 * n) for n in range(7)],
    "moment": [(EPOCH + dt.timedelta(minutes=20 * n)).replace(tzinfo=dt.UTC) for n in range(3, 10)],
    "flag": [True, False],
    "key": [uuid.UUID(int=n << 120 | n) for n in (0, 1, 127, 128, 255)],
    "blob": [b"", b"a", b"\xff", b"\x00", b"ab"],
    "mood": ["sad", "ok", "happy"],
}
COLUMNS = tuple(POOLS)
NUMBERS = ("big", "whole", "small", "exact", "price", "lossy", "real")


def table(size: int, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """Make rows with many ties, each with the part it goes to; the same for the same arguments."""
    random = Random(seed)
    null_share = random.choice([0.0, 0.15, 0.6])
    shares = random.choice([(1, 1, 1), (8, 1, 1), (1, 0, 0)])
    ordinary = random.random() < 0.5  # no NaN and no Infinity, which hide other sums
    rows = []
    for part in random.choices(range(PARTS), shares, k=size):
        values = {name: random.choice(pool) for name, pool in POOLS.items()}
        for name, value in values.items():
            if random.random() < null_share or (ordinary and str(value).lower() in UNUSUAL):
                values[name] = None
        rows.append((part, values))
    return rows


tables = st.builds(table, st.integers(0, 24), st.integers(0, 2**32))
directions = st.sampled_from(
    [
        lambda c: c,
        lambda c: c.desc(),
        lambda c: c.asc().nulls_first(),
        lambda c: c.desc().nulls_last(),
    ]
)


@dataclass
class Judge:
    """A connection, and the two ways to answer a statement on it."""

    connection: sa.Connection

    def load(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        table: Any = Wide.__table__
        notes: Any = Note.__table__
        self.connection.rollback()  # the rows of the last example were never committed
        for number, (part, values) in enumerate(rows):
            values["lossy"] = (
                values["lossy"] if values["lossy"] is None else Decimal(values["lossy"])
            )
            for schema in ("whole", f"part_{part}"):
                self._run(sa.insert(table), schema, {"id": number, **values})
                for note in range(number % 3):
                    values_of_note = {"id": number * 10 + note, "wide_id": number}
                    self._run(sa.insert(notes), schema, values_of_note)

    def expected(self, statement: Any, parameters: Any = None) -> tuple[list[str], list[Any]]:
        result = self._run(statement, "whole", parameters)
        return list(result.keys()), list(result)

    def merged(self, statement: Any, parameters: Any = None) -> tuple[list[str], list[Any]]:
        found = rewrite(statement, text_order=TextOrder(False), parameters=parameters)
        parts = [
            self._run(found.statement, f"part_{number}", parameters) for number in range(PARTS)
        ]
        keys = list(parts[0].keys())
        visible = keys[: len(keys) - found.spec.hidden]
        return visible, list(merge(parts, found.spec))

    def _run(self, statement: Any, schema: str, parameters: Any) -> sa.Result[Any]:
        options = {"schema_translate_map": {None: schema}}
        return self.connection.execute(statement, parameters, execution_options=options)


def wide_engine(node: LocalNode) -> Iterator[sa.Engine]:
    """Make the schemas on a server, and take them away again."""
    info = node.conninfo
    url = sa.URL.create(
        "postgresql+psycopg",
        username=info["user"],
        password=info["password"],
        host=info["host"],
        port=info["port"],
        database=info["dbname"],
        query={"options": "-c timezone=America/New_York"},
    )
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for schema in SCHEMAS:
            connection.execute(sa.text(f"drop schema if exists {schema} cascade"))
            connection.execute(sa.text(f"create schema {schema}"))
            options = {"schema_translate_map": {None: schema}}
            Base.metadata.create_all(connection.execution_options(**options))
    yield engine
    with engine.begin() as connection:
        for schema in SCHEMAS:
            connection.execute(sa.text(f"drop schema {schema} cascade"))
    engine.dispose()


def exactly(value: Any) -> Any:
    """Type and digits: Decimals by their text, NaN equal to itself."""
    return type(value).__name__, repr(value)


def by_value(value: Any) -> Any:
    """For the representative of equal values (1.0 and 1.00), which PostgreSQL leaves open."""
    if isinstance(value, Decimal) and value.is_finite():
        return "Decimal", value
    return exactly(value)


def shown(rows: list[Any], how: tuple[Callable[[Any], Any], ...] = ()) -> list[Any]:
    return [
        tuple(
            (how[index] if index < len(how) else exactly)(value) for index, value in enumerate(row)
        )
        for row in rows
    ]
