"""Rows in order from four shards as a stream: how fast, and how much is held meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Engine, String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import sqlroute

from .pairs import Figure, compare
from .servers import Bench, bench, url_of

SHARDS = 4
BATCH = 1_000
"""``yield_per`` of all streams."""

ONE = "one_server"
"""The database of the plain Sessions, beside that of a shard."""

MARKS = (0.1, 0.5, 1.0)
"""Of a stream, where its memory is looked at."""

GROWTH = 4.0
"""MiB that a stream may hold more at its end than in its first tenth."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows all shards have together."""

    merged: int = 1_000_000
    streamed: int = 10_000_000


class Base(DeclarativeBase):
    pass


class Event(Base):
    """Rows whose order alternates between the shards, so that a merge has to look at each."""

    __tablename__ = "event"
    __table_args__ = sqlroute.sharded_by("account_id")
    account_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, index=True)
    name: Mapped[str] = mapped_column(String(40))


_COLUMNS = select(Event.account_id, Event.number, Event.name).order_by(Event.number)
_OBJECTS = select(Event).order_by(Event.number)


def merge(directory: Path, sizes: Sizes = Sizes()) -> list[Figure]:
    """Rows in order through ``yield_per``, against the same rows from one server.

    At least 0.8 times the rows per second, so at most 1.25 times the time. Python's garbage
    collector runs, as it does in applications.
    """
    assert gc.isenabled()
    with bench(directory, SHARDS, 0) as b, one_server(b, sizes.merged) as plain:
        fill(b, sizes.merged)
        routed = b.router.sessionmaker()

        def figure(what: str, statement: Any, rounds: int) -> Figure:
            found = compare(
                f"merge: {what}",
                1 / 0.8,
                _reader(routed, statement, sizes.merged),
                _reader(plain, statement, sizes.merged),
                rounds=rounds,
                calls=1,
            )
            return _with_rates(found, sizes.merged)

        return [figure("columns", _COLUMNS, 6), figure("objects", _OBJECTS, 4)]


def stream_memory(directory: Path, sizes: Sizes = Sizes()) -> list[Figure]:
    """The most memory that this process has had while rows in order came from four shards."""
    with bench(directory, SHARDS, 0) as b:
        fill(b, sizes.streamed)
        with b.router.sessionmaker()() as session:
            return [held_while_streaming(session, sizes.streamed)]


def held_while_streaming(session: Session, count: int) -> Figure:
    """Read all events; return how much more was held in the last part than in the first.

    Every row is looked at and let go. The peak of each part is that of the kernel (``VmHWM``).
    """
    rows = iter(session.execute(_COLUMNS, execution_options={"yield_per": BATCH}))
    last, read, peaks = -1, 0, []
    began = time.perf_counter()
    for mark in MARKS:
        _reset_peak()
        for row in islice(rows, round(count * mark) - read):
            assert row.number == last + 1
            last = row.number
        read = last + 1
        peaks.append(_peak())
    seconds = time.perf_counter() - began
    assert next(rows, None) is None
    assert read == count
    notes = [
        f"at {mark:4.0%}: {peak:.1f} MiB at most since the last mark"
        for mark, peak in zip(MARKS, peaks, strict=True)
    ]
    notes.append(f"{count:,} rows of {SHARDS} shards in {seconds:.1f} s")
    growth = peaks[-1] - peaks[0]
    spread = (min(peaks) - peaks[0], max(peaks) - peaks[0])
    return Figure("stream_memory", growth, GROWTH, spread, "MiB", notes=tuple(notes))


def fill(b: Bench, count: int) -> None:
    """Make events 0 to ``count - 1``, in turn on each shard; ``number`` is indexed."""
    b.router.create_all(Base.metadata)
    for place, (shard, node) in enumerate(b.primaries().items()):
        keys = [key for key, owner in b.shard_of.items() if owner == shard]
        numbers = f"generate_series({place}, {count - 1}, {SHARDS})"
        engine = create_engine(url_of(node))
        _insert(engine, keys, numbers)
        engine.dispose()


@contextmanager
def one_server(b: Bench, count: int) -> Iterator[sessionmaker[Session]]:
    """Give plain Sessions on a database that has all the events in one ordinary table."""
    url = url_of(b.topology.shards[0].nodes[0])
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {ONE}")
    admin.dispose()
    engine = create_engine(url.set(database=ONE))
    Base.metadata.create_all(engine)
    _insert(engine, list(b.shard_of), f"generate_series(0, {count - 1})")
    try:
        yield sessionmaker(engine)
    finally:
        engine.dispose()


def _insert(engine: Engine, keys: list[int], numbers: str) -> None:
    rows = text(
        "INSERT INTO event (account_id, number, name) "
        "SELECT (CAST(:keys AS bigint[]))[1 + mod(n, :count)], n, 'event ' || n "
        f"FROM {numbers} AS n"
    )
    with engine.begin() as connection:
        connection.execute(rows, {"keys": keys, "count": len(keys)})
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("VACUUM ANALYZE event")  # no hint bits to set while reading


def _reader(maker: Callable[[], Session], statement: Any, count: int) -> Callable[[int], None]:
    def read(_: int) -> None:
        number = -1
        with maker() as session:
            found = session.execute(statement, execution_options={"yield_per": BATCH})
            for number, row in enumerate(found):  # noqa: B007 - read, and let go
                pass
        assert number == count - 1

    return read


def _with_rates(figure: Figure, count: int) -> Figure:
    assert figure.routed_us is not None
    assert figure.plain_us is not None
    routed, plain = count / figure.routed_us, count / figure.plain_us
    note = (
        f"{count:,} rows: {routed * 1e6:,.0f} a second against {plain * 1e6:,.0f}, "
        f"{routed / plain:.2f}"
    )
    return replace(figure, notes=(note, *figure.notes))


def _reset_peak() -> None:
    """Let the kernel forget the most memory that this process has had."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return the most memory that this process has had since then, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the peak is read on Linux only")
