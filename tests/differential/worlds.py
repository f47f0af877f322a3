"""Random worlds: schemas of every type, and their rows, from one seed.

A world has two tables that are sharded alike (``own`` and ``item``, colocated by the key) and a
reference table (``kind``). Values come from small pools, so that rows meet, tie and repeat.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from sqlroute import reference_table, sharded_by

NULL_SHARES = (0.0, 0.1, 0.5)
DAY = dt.datetime(2024, 11, 3, 4, 0)


def _numbers(*texts: str) -> list[Decimal]:
    return [Decimal(text) for text in texts]


Type = tuple[Callable[[], Any], list[Any]]
"""How a column of the type is declared, and its values."""

TYPES: dict[str, Type] = {
    "small": (sa.SmallInteger, [-2, -1, 0, 1, 2, 3]),
    "whole": (sa.Integer, [-1, 0, 1, 2, 2**31 - 1, -(2**31)]),
    "big": (sa.BigInteger, [-1, 0, 1, 2, 2**62, -(2**62)]),
    "exact": (
        sa.Numeric,
        _numbers(
            "0", "0.00", "1.5", "1.50", "-3", "NaN", "Infinity", "-Infinity", "1e-12", "7.125"
        ),
    ),
    "price": (lambda: sa.Numeric(12, 2), _numbers("0.00", "1.25", "-7.10", "99999.99")),
    "real": (sa.Double, [-1.5, -0.25, 0.0, 0.5, 2.0, float("nan"), float("inf"), float("-inf")]),
    "text": (sa.Text, ["", "a", "A", "B", "a b", "é", "z", "10", "9", "日"]),
    "short": (lambda: sa.String(8), ["", "a", "b", "B ", "x"]),
    "padded": (lambda: sa.CHAR(3), ["a", "b", "ab"]),
    "flag": (sa.Boolean, [True, False]),
    "day": (sa.Date, [dt.date(2024, 2, 27) + dt.timedelta(days=n) for n in range(4)]),
    "naive": (sa.DateTime, [DAY + dt.timedelta(minutes=30 * n) for n in range(5)]),
    "moment": (
        lambda: sa.DateTime(timezone=True),
        [(DAY + dt.timedelta(minutes=20 * n)).replace(tzinfo=dt.UTC) for n in range(5)],
    ),
    "clock": (sa.Time, [dt.time(n, 0, 0, n) for n in range(3)]),
    "span": (sa.Interval, [dt.timedelta(days=n, seconds=n) for n in range(-1, 3)]),
    "key": (sa.Uuid, [uuid.UUID(int=n << 120 | n) for n in (0, 1, 128, 255)]),
    "blob": (sa.LargeBinary, [b"", b"a", b"\xff", b"ab"]),
    "doc": (postgresql.JSONB, [1, "a", [1, 2], {"b": 1, "a": None}]),
    "tags": (lambda: sa.ARRAY(sa.Integer), [[], [1], [1, 2], [2]]),
}
NUMBERS = ("small", "whole", "big", "exact", "price", "real")
INTEGERS = ("small", "whole", "big")
KEYS: dict[str, Type] = {
    "bigint": (sa.BigInteger, [-9, -2, -1, 0, 1, 2, 3, 4, 5, 2**40, -(2**62)]),
    "integer": (sa.Integer, [*range(-3, 9)]),
    "text": (sa.Text, ["", "a", "A", "b", "é", "zz", "10", "9", "0"]),
    "uuid": (sa.Uuid, [uuid.UUID(int=n * 12345678901234567) for n in range(9)]),
}


@dataclass(frozen=True, slots=True)
class World:
    """One schema.

    Attributes:
        kinds: what type a column has, by its name, in all tables alike.
        pools: its values.
    """

    metadata: sa.MetaData
    own: sa.Table
    item: sa.Table
    kind: sa.Table
    kinds: dict[str, str]
    pools: dict[str, list[Any]]

    def rows(self, random: Random) -> dict[str, list[dict[str, Any]]]:
        """Return rows for each table by its role; some have no table rows at all."""
        share = random.choice(NULL_SHARES)
        keys = random.sample(self.pools["id"], random.randint(0, len(self.pools["id"])))
        if random.random() < 0.1:
            keys = keys[:1]
        own = [{"id": key, **self._values(self.own, random, share)} for key in keys]
        places = {
            (random.choice(self.pools["id"]), random.randint(0, 3))
            for _ in range(random.randint(0, 20))
        }
        item = [
            {"own_id": key, "n": n, **self._values(self.item, random, share)}
            for key, n in sorted(places, key=str)
        ]
        kind = [{"code": code, **self._values(self.kind, random, share)} for code in range(3)]
        return {"own": own, "item": item, "kind": kind}

    def _values(self, table: sa.Table, random: Random, share: float) -> dict[str, Any]:
        """Draw the values of what is no key."""
        names = [column.name for column in table.c if not column.primary_key]
        return {
            name: None if random.random() < share else random.choice(self.pools[name])
            for name in names
        }


def world(random: Random, number: int) -> World:
    """Make a schema with names of its own."""
    metadata = sa.MetaData()
    mood = sa.Enum("sad", "ok", "happy", name=f"mood{number}", metadata=metadata)
    types: dict[str, Type] = {**TYPES, "mood": (lambda: mood, ["sad", "ok", "happy"])}
    key_type, key_pool = KEYS[random.choice([*KEYS])]
    kinds: dict[str, str] = {}
    pools: dict[str, list[Any]] = {"id": key_pool}

    def columns(prefix: str, count: int) -> list[sa.Column[Any]]:
        found = []
        for index, kind in enumerate(random.sample([*types], count)):
            name = f"{prefix}{index}_{kind}"
            kinds[name], pools[name] = kind, types[kind][1]
            found.append(sa.Column(name, types[kind][0]()))
        return found

    def link(name: str) -> sa.Column[Any]:
        kinds[name], pools[name] = "small", [0, 1, 2, 3]
        return sa.Column(name, sa.Integer)

    primary: dict[str, Any] = {"primary_key": True, "autoincrement": False}
    own = sa.Table(
        f"own{number}", metadata, sa.Column("id", key_type, **primary),
        link("own_kind"), *columns("o", random.randint(3, 6)), **sharded_by("id"),
    )  # fmt: skip
    item = sa.Table(
        f"item{number}", metadata, sa.Column("own_id", key_type, **primary),
        sa.Column("n", sa.Integer, **primary), link("item_kind"),
        *columns("i", random.randint(2, 5)), **sharded_by("own_id"),
    )  # fmt: skip
    kind = sa.Table(
        f"kind{number}", metadata, sa.Column("code", sa.Integer, **primary),
        *columns("k", 2), **reference_table(),
    )  # fmt: skip
    return World(metadata, own, item, kind, kinds, pools)
