"""Round trips of a read and of a write, routed and plain, sync and async, counted on the wire."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, select, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import sqlroute
from sqlroute.local.topology import LocalTopology

from .pairs import Figure, figure_of
from .servers import ROWS, Account, bench, url_of
from .wire import Wire

WARM = 12
"""Times before it counts: psycopg prepares a statement the sixth time, a round trip more."""

TIMES = 10

Counted = dict[str, list[int]]
"""What was done, as ``routed read``, to the round trips of each time."""

LIMITS = {"read": 1, "write": 3}

_NEW = itertools.count(ROWS)


def round_trips(directory: Path) -> list[Figure]:
    """Round trips on warm connections: a routed read, a write of one row with its token."""
    with bench(directory, 1, 1) as b:
        counted = {**count(b.topology), **asyncio.run(count_async(b.topology))}
    found = []
    for name, limit in LIMITS.items():
        for flavour in ("", "async "):
            plain = max(counted[f"{flavour}plain {name}"])
            note = f"a plain {'AsyncSession' if flavour else 'Session'} needs {plain}"
            notes = [note]
            if name == "write":
                flushed = max(counted[f"{flavour}routed flush"])
                notes.append(f"flushing a new object instead of UPDATE: {flushed}")
                modified = max(counted[f"{flavour}routed change"])
                by_hand = max(counted[f"{flavour}plain change"])
                notes.append(
                    f"loading an object from a replica, changing it, commit: {modified} "
                    f"(plain {by_hand})"
                )
            times = counted[f"{flavour}routed {name}"]
            figure = figure_of(
                f"round_trips: {flavour}{name}", limit, times, "round trips", tuple(notes)
            )
            found.append(figure)
    return found


def count(topology: LocalTopology) -> Counted:
    """Count what Sessions need. The accounts 0 to ``WARM + TIMES`` must be there."""
    found: Counted = {}
    with Wire(topology) as wire:
        engine = create_engine(_url(topology, wire))
        with sqlroute.Router.from_config(wire.config()) as router:
            for who, maker in (
                ("plain", lambda: Session(engine)),
                ("routed", router.sessionmaker()),
            ):
                for what, work in WORKS.items():
                    counts = [
                        wire.count(partial(_with, maker, work, i)) for i in range(WARM + TIMES)
                    ]
                    found[f"{who} {what}"] = counts[WARM:]
        engine.dispose()
    return found


async def count_async(topology: LocalTopology) -> Counted:
    """Count what AsyncSessions need for the same."""
    found: Counted = {}
    with Wire(topology) as wire:
        engine = create_async_engine(_url(topology, wire))
        async with sqlroute.Router.from_config(wire.config()) as router:
            for who, maker in (
                ("plain", lambda: AsyncSession(engine)),
                ("routed", router.async_sessionmaker()),
            ):
                for what, work in WORKS.items():
                    counts = [
                        await wire.count_async(partial(_with_async, maker, work, i))
                        for i in range(WARM + TIMES)
                    ]
                    found[f"async {who} {what}"] = counts[WARM:]
        await engine.dispose()
    return found


def _with(maker: Any, work: Callable[[Any, int], None], number: int) -> None:
    with maker() as session:
        work(session, number)


async def _with_async(maker: Any, work: Callable[[Any, int], None], number: int) -> None:
    async with maker() as session:
        await session.run_sync(work, number)


def _read(session: Any, number: int) -> None:
    assert session.scalar(select(Account.name).where(Account.id == number)) is not None


def _write(session: Any, number: int) -> None:
    session.execute(_change(number))
    session.commit()
    assert str(getattr(session, "token", "none"))


def _flush(session: Any, _: int) -> None:
    session.add(Account(id=next(_NEW), name="new"))
    session.commit()


def _modify(session: Any, number: int) -> None:
    account = session.get_one(Account, number)
    account.name = f"{account.name}+"[-40:]
    session.commit()


def _change(number: int) -> Any:
    return update(Account).where(Account.id == number).values(name=f"name {number}")


WORKS: dict[str, Callable[[Any, int], None]] = {
    "read": _read,
    "write": _write,
    "flush": _flush,
    "change": _modify,
}


def _url(topology: LocalTopology, wire: Wire) -> URL:
    primary = topology.nodes[0]
    return url_of(primary).set(port=wire.ports[primary.name])
