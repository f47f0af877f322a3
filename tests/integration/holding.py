"""What the tests of holds and promotions work with: conversations with sessions, and an operator.

Imports no pytest: other processes import it, too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import Mapped, Session, mapped_column

from sqlroute import Router, sharded_by
from sqlroute.local.topology import LocalTopology
from sqlroute.ops import fences
from sqlroute.ops.server import Server, wait_for

T = TypeVar("T")
Work = Callable[[Session], T]

PATIENCE = 10.0


class Base(orm.DeclarativeBase):
    pass


class Entry(Base):
    """What one write has stored, in a shop that lives on one shard.

    The server makes the key, so that what is sent twice is stored twice.
    """

    __tablename__ = "entry"
    __table_args__ = sharded_by("shop")

    shop: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    key: Mapped[uuid.UUID] = mapped_column(
        primary_key=True, server_default=sa.func.gen_random_uuid()
    )
    id: Mapped[str] = mapped_column(sa.Text)


def writing(shop: int, entry: str) -> Work[None]:
    """Return a unit of work that stores one entry."""

    def work(session: Session) -> None:
        session.execute(sa.insert(Entry), {"shop": shop, "id": entry})
        session.commit()

    return work


def storing(shop: int, entry: str) -> Work[None]:
    """Return the same by the unit of work."""

    def work(session: Session) -> None:
        session.add(Entry(shop=shop, id=entry))
        session.commit()

    return work


def entries(shop: int) -> Work[list[str]]:
    """Return a unit of work that reads the entries of a shop, each as often as it is there."""
    statement = sa.select(Entry.id).where(Entry.shop == shop).order_by(Entry.id)

    def work(session: Session) -> list[str]:
        return list(session.scalars(statement))

    return work


class Talk:
    """A conversation with one session, step by step. Also a context manager."""

    def __init__(self, doors: Doors, session: Any) -> None:
        self._doors = doors
        self.session = session

    def start(self, work: Work[T]) -> Future[T]:
        """Begin a step; what it blocks on blocks nobody else."""
        return self._doors.run(self.session, work)

    def do(self, work: Work[T]) -> T:
        """Take a step and return what it brings."""
        return self.start(work).result(PATIENCE)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.do(lambda session: session.close())


class Doors:
    """Sessions of one kind of a router; works are given as functions of a sync Session."""

    is_async = False

    def __init__(self, router: Router) -> None:
        self.router = router
        self._threads = ThreadPoolExecutor(64)

    def close(self) -> None:
        self._threads.shutdown()

    def talk(self, **options: Any) -> Talk:
        return Talk(self, self.router.sessionmaker(**options)())

    def run(self, session: Any, work: Work[T]) -> Future[T]:
        return self._threads.submit(work, session)

    def start(self, work: Work[T], **options: Any) -> Future[T]:
        """Begin a unit of work in a session of its own."""

        def run() -> T:
            with self.router.sessionmaker(**options)() as session:
                return work(session)

        return self._threads.submit(run)

    def do(self, work: Work[T], **options: Any) -> T:
        return self.start(work, **options).result(PATIENCE)


class AsyncDoors(Doors):
    """The same by tasks of an event loop that runs in a thread."""

    is_async = True

    def __init__(self, router: Router) -> None:
        self.router = router
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.call(self.router.engines(is_async=True).aclose()).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()

    def call(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def talk(self, **options: Any) -> Talk:
        return Talk(self, self.router.async_sessionmaker(**options)())

    def run(self, session: Any, work: Work[T]) -> Future[T]:
        return self.call(session.run_sync(work))

    def start(self, work: Work[T], **options: Any) -> Future[T]:
        async def run() -> T:
            async with self.router.async_sessionmaker(**options)() as session:
                return await session.run_sync(work)

        return self.call(run())


class Operator:
    """What an operator does with the nodes of one shard, by hand."""

    def __init__(self, router: Router, shard: str = "s0") -> None:
        self.router = router
        self.shard = shard
        nodes = router.topology.shard(shard).nodes
        self.servers = {node.name: Server(node) for node in nodes}

    def close(self) -> None:
        for server in self.servers.values():
            server.close()

    @property
    def primary(self) -> Server:
        return next(server for server in self.servers.values() if not server.is_standby())

    @property
    def standbys(self) -> list[Server]:
        return [server for server in self.servers.values() if server.is_standby()]

    def hold(self, operation: str, seconds: float = 30.0) -> None:
        """Hold the shard, and wait until this router knows."""
        self.primary.hold(operation, seconds)
        self.await_hold(operation)

    def release(self) -> None:
        self.primary.release()
        self.await_hold(None)

    def await_hold(self, operation: str | None) -> None:
        def is_known() -> bool:
            hold = self.router.writes.hold(self.shard)
            return (hold.operation if hold else None) == operation

        assert wait_for(is_known, timeout=PATIENCE), f"{operation} is not known"

    def names(self, server: Server | None = None) -> list[str]:
        return (server or self.primary).monitors()

    def is_drained(self, operation: str, server: Server | None = None) -> bool:
        """Say if all routers say that nothing is under way."""
        names = self.names(server)
        return bool(names) and all(name.endswith(f" held={operation}") for name in names)

    def fence(self, server: Server, epoch: int) -> None:
        """Refuse each new session, by the fence of level 3."""
        libraries = server.setting("session_preload_libraries")
        server.alter(session_preload_libraries=fences.fenced(libraries, epoch))
        assert wait_for(server.is_refused, timeout=PATIENCE), f"{server.name} is not fenced"

    def unfence(self, server: Server) -> None:
        server.alter(session_preload_libraries=None)
        assert wait_for(lambda: not server.is_refused(), timeout=PATIENCE)

    def end_others(self) -> None:
        """End all other sessions of the primary, and wait until they have ended."""
        self.primary.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def switch(self, operation: str, on_step: Callable[[str], None] = lambda _: None) -> Server:
        """Promote the first standby while programs write, and return it."""
        old, (heir, *others) = self.primary, self.standbys
        for server in (old, heir):
            server.checkpoint(PATIENCE)
        for server in others:
            server.follow(str(heir.node.host), heir.node.port)
        old.hold(operation, 20.0)
        assert wait_for(lambda: self.is_drained(operation, old), timeout=PATIENCE)
        on_step("drained")
        self.fence(old, 2)
        old.terminate_others()
        assert wait_for(lambda: old.others() == 0, timeout=PATIENCE)
        on_step("fenced")
        end = old.mark()
        assert wait_for(lambda: heir.position() >= end, timeout=PATIENCE)
        heir.promote()
        assert wait_for(lambda: not heir.is_standby(), timeout=PATIENCE, pause=0.001)
        on_step("promoted")
        heir.transaction(
            (
                "UPDATE sqlroute.shard SET epoch = epoch + 1, node = %s, timeline = %s,"
                " state = 'steady', operation = NULL, held_until = NULL",
                (heir.name, heir.timeline()),
            ),
            ("SELECT pg_notify('sqlroute', %s)", (self.shard,)),
        )
        on_step("released")
        return heir


@dataclass
class Tally:
    """What writers have been told: entries acknowledged, when, and what failed."""

    acknowledged: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def longest_gap(self) -> float:
        """Seconds between two acknowledged writes, of all writers together."""
        times = sorted(self.times)
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    def note(self, entry: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            self.acknowledged.append(entry)
            self.times.append(time.monotonic())


def write_on(doors: Doors, shop: int, names: str, stop: threading.Event) -> Tally:
    """Write one entry after the other, of sessions of their own, until told to stop."""
    tally, number = Tally(), 0
    while not stop.is_set():
        number += 1
        entry = f"{names}-{number}"
        work = (writing, storing)[number % 2](shop, entry)
        tally.note(entry, lambda work=work: doors.do(work))
        stop.wait(0.002)
    return tally


def read_on(doors: Doors, shop: int, consistency: str, stop: threading.Event) -> Tally:
    """Read, by sessions of their own, until told to stop."""
    tally = Tally()
    work = entries(shop)
    while not stop.is_set():
        tally.note(consistency, lambda: doors.do(work, consistency=consistency))
        stop.wait(0.01)
    return tally


class Readers:
    """Threads that read what is eventually there, and what is there now, until :meth:`stop`."""

    def __init__(self, doors: list[Doors], shop: int) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2 * len(doors))
        self._tallies = {
            (each.is_async, consistency): self._pool.submit(
                read_on, each, shop, consistency, self._stop
            )
            for each in doors
            for consistency in ("eventual", "strong")
        }

    def stop(self) -> dict[tuple[bool, str], Tally]:
        self._stop.set()
        tallies = {kind: tally.result(PATIENCE) for kind, tally in self._tallies.items()}
        self._pool.shutdown()
        return tallies


class Writers:
    """Threads that write through sync and async sessions until :meth:`stop`."""

    def __init__(self, doors: list[Doors], shop: int, count: int, name: str) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(count * len(doors))
        self._tallies = [
            self._pool.submit(write_on, each, shop, f"{name}-{i}-{n}", self._stop)
            for i, each in enumerate(doors)
            for n in range(count)
        ]

    def stop(self) -> list[Tally]:
        self._stop.set()
        tallies = [tally.result(PATIENCE) for tally in self._tallies]
        self._pool.shutdown()
        return tallies


def other_process(pipe: Pipe, config: Path, shop: int, name: str, is_async: bool) -> None:
    """Write through a router of its own, until the pipe says so; then send the tallies."""
    with Router.from_config(config) as router:
        doors = AsyncDoors(router) if is_async else Doors(router)
        doors.do(writing(shop, f"{name}-first"))
        writers = Writers([doors], shop, 2, name)
        pipe.send("ready")
        pipe.recv()
        tallies = writers.stop()
        tallies.append(Tally([f"{name}-first"]))
        doors.close()
    pipe.send(tallies)


def forking(pipe: Pipe, config: Path, shop: int, name: str) -> None:
    """Fork with a transaction under way, and write in both."""
    with Router.from_config(config) as router:
        session = router.sessionmaker()()
        session.execute(sa.insert(Entry), {"shop": shop, "id": f"{name} parent"})
        done, ended = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ended[1])
            Doors(router).do(writing(shop, f"{name} child"))
            os.write(done[1], b".")
            os.read(ended[0], 1)  # until the parent has ended
            os._exit(0)
        os.read(done[0], 1)
        pipe.send("child has written")
        pipe.recv()
        session.commit()
        session.close()
        pipe.send("parent has written")
        pipe.recv()
        os.close(ended[1])
        os.waitpid(child, 0)


def shop_on(router: Router, shard: str) -> int:
    """Return the smallest number of a shop that lives on a shard."""
    table = Base.metadata.tables["entry"]
    return next(n for n in range(1, 10_000) if router.locate(table, (n,))[1] == shard)


def started(servers: LocalTopology) -> Router:
    """Return a router whose servers have the tables."""
    router = Router.from_config(servers.config_path)
    router.create_all(Base.metadata)
    return router
