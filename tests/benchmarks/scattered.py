"""Reads on several shards at once, against plain Sessions on the same shards."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Engine, event, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from .pairs import Figure, compare, compare_async
from .servers import ROWS, Account, Bench, bench

SHARDS = (4, 8)
NAP = 0.02

_SHORT = select(func.count()).select_from(Account)
_SLOW = _SHORT.where(select(func.pg_sleep(NAP)).scalar_subquery().is_not(None))  # naps once

PAGES = ((10, 0), (20, 100), (1, 119))
"""LIMIT and OFFSET; each shard has more rows than both together."""


def scatter(directory: Path) -> list[Figure]:
    """A statement on all shards: of 20 ms, and one that is over before a thread is awake.

    The first against the slowest shard alone, the other against all of them one after another.
    """
    found = []
    for shards in SHARDS:
        with bench(directory, shards, 0) as b:
            found += [*_scatter(b), *asyncio.run(_scatter_async(b))]
    return found


def _scatter(b: Bench) -> list[Figure]:
    routed = b.router.sessionmaker()
    plain = {shard: b.plain(node) for shard, node in b.primaries().items()}
    spent = {shard: median(_seconds(maker) for _ in range(21)) for shard, maker in plain.items()}
    slowest = plain[max(spent, key=lambda shard: spent[shard])]

    def by_router(statement: Any) -> Any:
        def read(_: int) -> None:
            with routed() as session:
                assert session.scalar(statement) == ROWS

        return read

    def of_slowest(_: int) -> None:
        _scalar(slowest, _SLOW)

    def one_by_one(_: int) -> None:
        assert sum(_scalar(maker, _SHORT) for maker in plain.values()) == ROWS

    try:
        return [
            compare(_name(b, "20 ms"), 1.2, by_router(_SLOW), of_slowest, rounds=10, calls=15),
            compare(_name(b, "short"), 1.0, by_router(_SHORT), one_by_one, rounds=20, calls=50),
        ]
    finally:
        for maker in plain.values():
            maker.kw["bind"].dispose()


async def _scatter_async(b: Bench) -> list[Figure]:
    routed = b.router.async_sessionmaker()
    plain = {shard: b.plain_async(node) for shard, node in b.primaries().items()}
    spent = {
        shard: median([await _seconds_async(maker) for _ in range(21)])
        for shard, maker in plain.items()
    }
    slowest = plain[max(spent, key=lambda shard: spent[shard])]

    def by_router(statement: Any) -> Any:
        async def read(_: int) -> None:
            async with routed() as session:
                assert await session.scalar(statement) == ROWS

        return read

    async def of_slowest(_: int) -> None:
        await _scalar_async(slowest, _SLOW)

    async def one_by_one(_: int) -> None:
        assert sum([await _scalar_async(maker, _SHORT) for maker in plain.values()]) == ROWS

    try:
        slow, short = by_router(_SLOW), by_router(_SHORT)
        return [
            await compare_async(
                _name(b, "async, 20 ms"), 1.2, slow, of_slowest, rounds=10, calls=15
            ),
            await compare_async(
                _name(b, "async, short"), 1.0, short, one_by_one, rounds=20, calls=50
            ),
        ]
    finally:
        await b.router.aclose()
        for maker in plain.values():
            await maker.kw["bind"].dispose()


def _name(b: Bench, what: str) -> str:
    return f"scatter: {len(b.topology.shards)} shards, {what}"


def _scalar(maker: sessionmaker[Session], statement: Any) -> int:
    with maker() as session:
        found: int = session.scalar(statement)
    return found


async def _scalar_async(maker: async_sessionmaker[AsyncSession], statement: Any) -> int:
    async with maker() as session:
        found: int = await session.scalar(statement)
    return found


def _seconds(maker: sessionmaker[Session]) -> float:
    began = time.perf_counter()
    _scalar(maker, _SLOW)
    return time.perf_counter() - began


async def _seconds_async(maker: async_sessionmaker[AsyncSession]) -> float:
    began = time.perf_counter()
    await _scalar_async(maker, _SLOW)
    return time.perf_counter() - began


def order_limit(directory: Path) -> list[Figure]:
    """Rows that each shard sends for a page in order: at most LIMIT + OFFSET."""
    with bench(directory, 4, 0) as b, b.router.sessionmaker()() as session:
        return [fetched_for_pages(session)]


def fetched_for_pages(session: Session) -> Figure:
    """Read pages; return the most rows that a shard has sent, as a share of LIMIT + OFFSET.

    Counted are the rows of psycopg's cursors, which have them all when ``execute`` returns.
    """
    shares = []
    notes = []
    for what, rows in (("columns", select(Account.id, Account.name)), ("objects", select(Account))):
        for limit, offset in PAGES:
            page = rows.order_by(Account.id.desc()).limit(limit).offset(offset)
            with _counted() as fetched:
                found = [row.id for row in _ids(session, page)]
            assert found == list(range(ROWS))[::-1][offset : offset + limit]
            assert len(fetched) == 4, fetched
            shares += [count / (limit + offset) for count in fetched.values()]
            counts = ", ".join(map(str, fetched.values()))
            notes.append(f"{what}, LIMIT {limit} OFFSET {offset}: {counts} rows")
    most, least = max(shares), min(shares)
    return Figure("order_limit", most, 1.0, (least, most), notes=tuple(notes))


def _ids(session: Session, page: Any) -> Any:
    found = session.execute(page)
    return found.scalars() if len(found.keys()) == 1 else found


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Count the rows that come from each server, by host and port, during a block."""
    fetched: Counter[str] = Counter()

    def note(connection: Any, cursor: Any, *_: Any) -> None:
        fetched[f"{cursor.connection.info.host}:{cursor.connection.info.port}"] += cursor.rowcount

    event.listen(Engine, "after_cursor_execute", note)
    try:
        yield fetched
    finally:
        event.remove(Engine, "after_cursor_execute", note)
