"""The figures. Each starts what it needs, measures against the plain alternative, stops it."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqlroute.routing.hashing import KeyKind, bucket_of

from .outage import outage
from .pairs import Figure, compare, compare_async
from .planning import plan_cached, plan_new, scale_shards, token_check
from .promotion import promotion
from .proxies import versus_proxies
from .scattered import order_limit, scatter
from .servers import ROWS, Account, bench
from .streams import merge, stream_memory
from .trips import round_trips
from .watching import watching


def _by_key(number: int) -> Any:
    return select(Account.name).where(Account.id == number % ROWS)


def routed_read(directory: Path) -> list[Figure]:
    """One keyed read of an object per session, against a plain Session on that replica.

    Beside it the same of a column, where the ORM has less to do.
    """
    with bench(directory, 2, 1) as b:
        routed = b.router.sessionmaker()
        plain = {shard: b.plain(node) for shard, node in b.replicas().items()}

        def get(session: Session, i: int) -> None:
            assert session.get_one(Account, i % ROWS).name

        def column(session: Session, i: int) -> None:
            assert session.scalar(_by_key(i)) is not None

        def pair(read: Callable[[Session, int], None]) -> tuple[Any, Any]:
            def by_router(i: int) -> None:
                with routed() as session:
                    read(session, i)

            def by_hand(i: int) -> None:
                with plain[b.shard_of[i % ROWS]]() as session:
                    read(session, i)

            return by_router, by_hand

        return [
            compare("routed_read", 0.70, *pair(get)),
            compare("routed_read (column)", 0.70, *pair(column)),
        ]


def routed_read_async(directory: Path) -> list[Figure]:
    """The same, of an AsyncSession."""

    async def get(session: AsyncSession, i: int) -> None:
        assert (await session.get_one(Account, i % ROWS)).name

    async def column(session: AsyncSession, i: int) -> None:
        assert await session.scalar(_by_key(i)) is not None

    with bench(directory, 2, 1) as b:

        async def measure() -> list[Figure]:
            routed = b.router.async_sessionmaker()
            plain = {shard: b.plain_async(node) for shard, node in b.replicas().items()}

            def pair(read: Any) -> tuple[Any, Any]:
                async def by_router(i: int) -> None:
                    async with routed() as session:
                        await read(session, i)

                async def by_hand(i: int) -> None:
                    async with plain[b.shard_of[i % ROWS]]() as session:
                        await read(session, i)

                return by_router, by_hand

            try:
                return [
                    await compare_async("routed_read_async", 0.70, *pair(get)),
                    await compare_async("routed_read_async (column)", 0.70, *pair(column)),
                ]
            finally:
                await b.router.aclose()
                for maker in plain.values():
                    await maker.kw["bind"].dispose()

        return asyncio.run(measure())


def write_with_token(directory: Path) -> list[Figure]:
    """A write of one row and its commit, whose token is then known, against a plain Session.

    The plain one knows nothing of where its commit stands. The servers are durable, as those of
    applications are; the second line is without ``fsync``, where nothing hides behind a disk.
    """
    return [
        _write_with_token(directory, "write_with_token", 1.05, durable=True),
        _write_with_token(directory, "write_with_token (no fsync)", math.inf, durable=False),
    ]


def _write_with_token(directory: Path, name: str, limit: float, *, durable: bool) -> Figure:
    with bench(directory, 2, 1, durable=durable) as b:
        routed = b.router.sessionmaker()
        plain = {shard: b.plain(node) for shard, node in b.primaries().items()}

        def write(session: Session, i: int) -> None:
            change = update(Account).where(Account.id == i % ROWS).values(name=f"name {i}")
            session.execute(change)
            session.commit()

        def by_router(i: int) -> None:
            with routed() as session:
                write(session, i)
                assert str(session.token)

        def by_hand(i: int) -> None:
            with plain[b.shard_of[i % ROWS]]() as session:
                write(session, i)

        return compare(name, limit, by_router, by_hand)


def keyed_in_transaction(directory: Path) -> list[Figure]:
    """A keyed read in an open transaction, against plain Sessions chosen by hand.

    By hand means by the same hash: an application knows the key, not the shard.
    """
    with bench(directory, 2, 0) as b:
        plain = {shard: b.plain(node)() for shard, node in b.primaries().items()}
        owners, kinds = b.router.shard_map().owners, (KeyKind.INTEGER,)
        with b.router.sessionmaker()() as session:
            session.begin()

            def by_router(i: int) -> None:
                assert session.scalar(_by_key(i)) is not None

            def by_hand(i: int) -> None:
                shard = owners[bucket_of((i % ROWS,), kinds, len(owners))]
                assert plain[shard].scalar(_by_key(i)) is not None

            try:
                return [compare("keyed_in_transaction", 1.05, by_router, by_hand)]
            finally:
                for one in plain.values():
                    one.close()


def importing(directory: Path) -> list[Figure]:
    """Importing what an application uses, beside sqlalchemy.orm: at most 60 ms more.

    The ratio is of that limit. Byte code is on disk, as it is after an installation.
    """
    del directory
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    used = "from sqlroute import Router, RoutingAsyncSession, RoutingSession, sharded_by"

    def spent(code: str) -> float:
        program = f"import time; s = time.perf_counter(); {code}; print(time.perf_counter() - s)"
        found = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return float(found.stdout)

    spent(f"import sqlalchemy.orm; {used}")
    pairs = [
        (spent(f"import sqlalchemy.orm; {used}"), spent("import sqlalchemy.orm")) for _ in range(21)
    ]
    extra = sorted(with_it - without for with_it, without in pairs)
    middle, low, high = extra[10], extra[5], extra[15]
    spread = (low / 0.06, high / 0.06)
    return [Figure("import", middle / 0.060, 1.0, spread, routed_us=middle * 1e6, plain_us=60_000)]


FIGURES: dict[str, Callable[[Path], list[Figure]]] = {
    "routed_read": routed_read,
    "routed_read_async": routed_read_async,
    "write_with_token": write_with_token,
    "keyed_in_transaction": keyed_in_transaction,
    "round_trips": round_trips,
    "plan_cached": plan_cached,
    "plan_new": plan_new,
    "token_check": token_check,
    "scale_shards": scale_shards,
    "scatter": scatter,
    "merge": merge,
    "order_limit": order_limit,
    "stream_memory": stream_memory,
    "import": importing,
    "versus_proxies": versus_proxies,
    "watching": watching,
    "outage": outage,
    "promotion": promotion,
}
