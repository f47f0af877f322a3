"""Promises of the demo's data: what is in it, exactly, and in which Python types."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from sqlroute.demo import dataset
from sqlroute.demo.dataset import COUNTS, UNKNOWN_TAIL_NUMBER, Value, rows
from sqlroute.errors import UnknownName


@pytest.fixture(scope="module")
def flights() -> list[dict[str, Value]]:
    return list(rows("flights"))


def missing(table: list[dict[str, Value]]) -> dict[str, int]:
    """Return the number of NULLs of each column that has any."""
    return dict(Counter(column for row in table for column, v in row.items() if v is None))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_table_has_its_number_of_rows(name: str, count: int) -> None:
    assert sum(1 for _ in rows(name)) == count


def test_the_flights_are_those_of_january(flights: list[dict[str, Value]]) -> None:
    assert flights[0] == {
        "id": 1,
        "year": 2013,
        "month": 1,
        "day": 1,
        "dep_time": 517,
        "sched_dep_time": 515,
        "dep_delay": 2,
        "arr_time": 830,
        "sched_arr_time": 819,
        "arr_delay": 11,
        "carrier": "UA",
        "flight": 1545,
        "tailnum": "N14228",
        "origin": "EWR",
        "dest": "IAH",
        "air_time": 227,
        "distance": 1400,
        "hour": 5,
        "minute": 15,
        "time_hour": datetime(2013, 1, 1, 10),
    }
    assert {(row["year"], row["month"]) for row in flights} == {(2013, 1)}
    assert {row["origin"] for row in flights} == {"EWR", "JFK", "LGA"}


def test_a_flight_has_an_id_of_its_own(flights: list[dict[str, Value]]) -> None:
    assert [row["id"] for row in flights] == list(range(1, 27_005))


def test_what_was_not_recorded_is_none(flights: list[dict[str, Value]]) -> None:
    assert missing(flights) == {
        "dep_time": 521,
        "dep_delay": 521,
        "arr_time": 536,
        "arr_delay": 606,
        "air_time": 606,
    }


def test_every_flight_has_a_tail_number(flights: list[dict[str, Value]]) -> None:
    tails = Counter(row["tailnum"] for row in flights)

    assert tails[UNKNOWN_TAIL_NUMBER] == 155
    assert len(tails) == 3_149


def test_the_planes_are_those_that_flew(flights: list[dict[str, Value]]) -> None:
    planes = list(rows("planes"))
    numbers = [str(row["tailnum"]) for row in planes]

    assert set(numbers) <= {row["tailnum"] for row in flights}
    assert numbers == sorted(set(numbers))
    assert missing(planes)["speed"] > 2_000


def test_every_airline_is_known_and_four_destinations_are_not(
    flights: list[dict[str, Value]],
) -> None:
    airlines = {row["carrier"] for row in rows("airlines")}
    airports = {row["faa"] for row in rows("airports")}

    assert {row["carrier"] for row in flights} <= airlines
    assert {row["dest"] for row in flights} - airports == {"BQN", "PSE", "SJU", "STT"}


def test_an_airport_has_typed_columns() -> None:
    assert next(rows("airports")) == {
        "faa": "04G",
        "name": "Lansdowne Airport",
        "lat": 41.1304722,
        "lon": -80.6195833,
        "alt": 1044,
        "tz": -5,
        "dst": "A",
        "tzone": "America/New_York",
    }
    assert missing(list(rows("airports"))) == {"tzone": 3}


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(UnknownName, match="'weather' of the demo; known: flights, planes"):
        next(rows("weather"))


def test_the_files_are_small_and_carry_no_time() -> None:
    packed = [path.read_bytes() for path in (Path(dataset.__file__).parent / "data").glob("*.gz")]

    assert len(packed) == len(COUNTS)
    assert sum(map(len, packed)) < 1_000_000
    assert {data[3:8] for data in packed} == {bytes(5)}
