"""Read the data of the demo: flights, planes, airlines and airports as rows of Python values.

The files come with the package, see ``sqlroute/demo/data/README.md``. No database is needed here;
what is done with the rows is the caller's.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from importlib.resources import files
from types import MappingProxyType
from typing import TypeAlias

from sqlroute.errors import UnknownName

UNKNOWN_TAIL_NUMBER = "unknown"
"""The tail number of a flight whose aircraft was not recorded: a shard key is NOT NULL."""

Value: TypeAlias = int | float | str | datetime | None


def _naive_utc(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")


_FLIGHT_TEXTS = ("carrier", "tailnum", "origin", "dest")
_FLIGHT_NUMBERS = (
    *("id", "year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time"),
    *("sched_arr_time", "arr_delay", "flight", "air_time", "distance", "hour", "minute"),
)
_COLUMNS: Mapping[str, Mapping[str, Callable[[str], Value]]] = {
    "flights": {
        **dict.fromkeys(_FLIGHT_NUMBERS, int),
        **dict.fromkeys(_FLIGHT_TEXTS, str),
        "time_hour": _naive_utc,
    },
    "planes": {
        **dict.fromkeys(("year", "engines", "seats", "speed"), int),
        **dict.fromkeys(("tailnum", "type", "manufacturer", "model", "engine"), str),
    },
    "airlines": dict.fromkeys(("carrier", "name"), str),
    "airports": {
        **dict.fromkeys(("lat", "lon"), float),
        **dict.fromkeys(("alt", "tz"), int),
        **dict.fromkeys(("faa", "name", "dst", "tzone"), str),
    },
}

COUNTS: Mapping[str, int] = MappingProxyType(
    {"flights": 27_004, "planes": 2_609, "airlines": 16, "airports": 1_458}
)
"""The tables there are, and the number of rows of each."""


def rows(name: str) -> Iterator[dict[str, Value]]:
    """Yield the rows of a table, columns in the order of the file.

    Numbers are ``int``, coordinates ``float``, ``time_hour`` is a ``datetime`` without a time zone
    that means UTC, and what was not recorded is ``None``; only a flight without a tail number has
    ``UNKNOWN_TAIL_NUMBER`` instead. The file is read as the rows are taken.

    Raises:
        UnknownName: there is no such table, at the first row.
    """
    try:
        types = _COLUMNS[name]
    except KeyError:
        known = ", ".join(_COLUMNS)
        raise UnknownName(f"unknown table {name!r} of the demo; known: {known}") from None
    with (
        (files("sqlroute.demo") / "data" / f"{name}.csv.gz").open("rb") as packed,
        gzip.open(packed) as unpacked,
        io.TextIOWrapper(unpacked, "utf-8", newline="") as text,
    ):
        lines = csv.reader(text)
        columns = [(column, types[column]) for column in next(lines)]
        for line in lines:
            yield {
                column: type_(field) if field else None
                for (column, type_), field in zip(columns, line, strict=True)
            }
