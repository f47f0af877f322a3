"""Clients in processes of their own, and what they were told.

Each routed process writes in some threads or tasks, and in others reads what any process has
written, under its token. A stranger uses plain psycopg: it turns off whatever asks it not to write,
and comes back at once wherever it was thrown out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from random import Random
from types import TracebackType
from typing import Any, Self

import psycopg
from sqlalchemy.exc import SQLAlchemyError

from sqlroute import Router
from sqlroute.errors import LostTimeline

from .history import Ack, Failure, Read, Stamp
from .models import INSERT, STRANGER, newest, write

Config = Mapping[str, Any]

PAUSE = 0.002
"""Seconds between two writes of a client."""

LOYAL = 0.3
"""Seconds for which a stranger comes back to the node that it wrote to, before it asks others."""

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
_PATIENCE = 60.0


@dataclass(slots=True)
class Told:
    """What clients were told. Appended to by many threads, which no list minds.

    Attributes:
        warned: reads that were refused since their token was lost in a failover.
    """

    acks: list[Ack] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def add(self, other: Told) -> None:
        self.acks += other.acks
        self.failures += other.failures
        self.reads += other.reads
        self.warned += other.warned

    def take(self) -> Told:
        """Return what there is, and begin anew."""
        kinds: tuple[list[Any], ...] = (self.acks, self.failures, self.reads, self.warned)
        found = [kind[: len(kind)] for kind in kinds]
        for kind, taken in zip(kinds, found, strict=True):
            del kind[: len(taken)]  # what was appended since stays
        return Told(*found)


class Process:
    """A process that runs ``work(pipe, *arguments)`` and tells what it was told when asked.

    A ``with`` block that ends early kills it.
    """

    def __init__(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=work, args=(theirs, name, *arguments), name=name)
        self._process.start()
        theirs.close()

    def ask(self, word: str) -> Told:
        """Send ``tell`` or ``stop`` and return what it was told since. Raises: EOFError: it died"""
        self._pipe.send(word)
        if not self._pipe.poll(_PATIENCE):
            raise TimeoutError(f"client {self.name} does not answer after {_PATIENCE:g} s")
        found: Told = self._pipe.recv()
        return found

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


class Clients:
    """All clients of a scenario, during a ``with`` block.

    Args:
        config: of the routers.
        writers: of each routed process.
        strangers: connection parameters of all nodes, for who does not go through a router; none
            without them.
        is_mixed: one of the two processes is async, and in it the time of day jumps.
    """

    def __init__(
        self,
        config: Config,
        *,
        writers: int = 4,
        readers: int = 2,
        strangers: tuple[Mapping[str, Any], ...] = (),
        is_mixed: bool = True,
    ) -> None:
        self.told = Told()
        self.strangers: frozenset[str] = frozenset()
        self._tokens: Any = _SPAWN.Queue(256)
        kinds = (by_threads, by_tasks) if is_mixed else (by_threads, by_threads)
        self._works: dict[str, tuple[Any, ...]] = {
            f"{kind.__name__}-{number}": (kind, config, writers, readers, self._tokens)
            for number, kind in enumerate(kinds)
        }
        for name, is_local in (("stranger-local", True), ("stranger-on", False)):
            if strangers:
                self._works[name] = (haunt, strangers, is_local)
                self.strangers |= {name}
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        for name, work in self._works.items():
            self._processes.append(Process(name, *work))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        self._tokens.close()

    def listen(self) -> Told:
        """Return what they were told since the last time, which is also added to all of it."""
        return self._ask("tell")

    def stop(self) -> Told:
        """Let them end their last request, and return the rest."""
        return self._ask("stop")

    def await_writes(self, count: int = 1) -> None:
        """Wait until every process has been acknowledged something, from now on.

        Raises:
            TimeoutError: one was not.
        """
        ends = time.monotonic() + _PATIENCE
        for process in self._processes:
            seen = 0
            while seen < count:
                found = process.ask("tell")
                self.told.add(found)
                seen += len(found.acks)
                if time.monotonic() > ends:
                    said = self.told.failures[-1:] or "nothing"
                    raise TimeoutError(f"{process.name} writes nothing; last: {said}")
                time.sleep(0.01)

    def _ask(self, word: str) -> Told:
        found = Told()
        for process in self._processes:
            found.add(process.ask(word))
        self.told.add(found)
        return found


def by_threads(
    pipe: Pipe, name: str, config: Config, writers: int, readers: int, tokens: Any
) -> None:
    """Write and read through a router, in threads."""
    _quiet()
    told, over = Told(), threading.Event()
    with Router.from_config(config) as router:
        sessions = router.sessionmaker()

        def keep_writing(writer: str) -> None:
            for number in itertools.count(1):
                if over.wait(PAUSE):
                    return
                with _noted(told, writer, number, tokens) as note, sessions() as session:
                    note(*write(session, writer, number))

        def keep_reading(reader: str) -> None:
            while not over.is_set():
                with contextlib.suppress(queue.Empty):
                    writer, number, token = tokens.get(timeout=0.1)
                    with _checked(told, reader, writer, number, token) as check:  # noqa: SIM117
                        with sessions(token=token) as session:
                            check(newest(session, writer))

        work: list[tuple[Callable[[str], None], str]] = []
        work += [(keep_writing, f"{name}-w{i}") for i in range(writers)]
        work += [(keep_reading, f"{name}-r{i}") for i in range(readers)]
        threads = [threading.Thread(target=_alive, args=(told, *one)) for one in work]
        for thread in threads:
            thread.start()
        _serve(pipe, told)
        over.set()
        for thread in threads:
            thread.join()
    _leave(pipe, told, tokens)


def by_tasks(
    pipe: Pipe, name: str, config: Config, writers: int, readers: int, tokens: Any
) -> None:
    """Write and read through a router, in tasks, while the time of day jumps."""
    _quiet()
    told = Told()

    async def work() -> None:
        over = asyncio.Event()
        router = Router.from_config(config)
        sessions = router.async_sessionmaker()

        async def keep_writing(writer: str) -> None:
            for number in itertools.count(1):
                await asyncio.sleep(PAUSE)
                if over.is_set():
                    return
                with _noted(told, writer, number, tokens) as note:
                    async with sessions() as session:
                        note(*await session.run_sync(write, writer, number))

        async def keep_reading(reader: str) -> None:
            while not over.is_set():
                try:
                    writer, number, token = tokens.get_nowait()
                except queue.Empty:
                    await asyncio.sleep(0.005)
                    continue
                with _checked(told, reader, writer, number, token) as check:
                    async with sessions(token=token) as session:
                        check(await session.run_sync(newest, writer))

        tasks = [asyncio.create_task(keep_writing(f"{name}-w{i}")) for i in range(writers)]
        tasks += [asyncio.create_task(keep_reading(f"{name}-r{i}")) for i in range(readers)]
        await asyncio.to_thread(_serve, pipe, told)
        over.set()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if end is not None:
                told.failures.append(Failure(name, "died", repr(end), 0.0, time.monotonic()))
        await router.aclose()

    with jumping():
        asyncio.run(work())
    _leave(pipe, told, tokens)


def haunt(pipe: Pipe, name: str, nodes: tuple[Mapping[str, Any], ...], is_local: bool) -> None:
    """Write past every router and every courtesy, as an ordinary role can."""
    told, over = Told(), threading.Event()
    options = "-c default_transaction_read_only=off"
    if is_local:
        options += " -c synchronous_commit=local"
    numbers = itertools.count(1)

    def stay(node: Mapping[str, Any]) -> bool:
        """Write to one node until it ends that; say if it took anything."""
        took = False
        known = {**node, "user": STRANGER, "password": STRANGER, "options": options}
        sent = time.monotonic()
        try:
            with psycopg.connect(**known, autocommit=True, connect_timeout=2) as connection:
                while not over.is_set():
                    number, sent = next(numbers), time.monotonic()
                    row = connection.execute(INSERT, (name, number)).fetchone()
                    assert row is not None
                    told.acks.append(Ack(name, number, Stamp(*row), sent, time.monotonic()))
                    took = True
                    over.wait(PAUSE)
        except psycopg.Error as error:
            told.failures.append(Failure(name, "write", _line(error), sent, time.monotonic()))
        return took

    def roam(_: str) -> None:
        for node in itertools.cycle(nodes):
            loyal_until = time.monotonic()
            while not over.is_set():
                if stay(node):
                    loyal_until = time.monotonic() + LOYAL
                if time.monotonic() >= loyal_until:
                    break
            if over.is_set():
                return

    thread = threading.Thread(target=_alive, args=(told, roam, name))
    thread.start()
    _serve(pipe, told)
    over.set()
    thread.join()
    pipe.send(told.take())


@contextlib.contextmanager
def jumping() -> Iterator[None]:
    """Let the time of day jump by up to an hour, ten times a second, for Python code here."""
    own, rng, over = time.time, Random(), threading.Event()
    offset = 0.0

    def jump() -> None:
        nonlocal offset
        while not over.wait(0.1):
            offset = rng.uniform(-3600, 3600)

    thread = threading.Thread(target=jump)
    thread.start()
    time.time = lambda: own() + offset
    try:
        yield
    finally:
        time.time = own
        over.set()
        thread.join()


# inside


@contextlib.contextmanager
def _noted(
    told: Told, writer: str, number: int, tokens: Any
) -> Iterator[Callable[[Stamp, int, str], None]]:
    sent = time.monotonic()

    def note(stamp: Stamp, lsn: int, token: str) -> None:
        told.acks.append(Ack(writer, number, stamp, sent, time.monotonic(), lsn))
        with contextlib.suppress(queue.Full):
            tokens.put_nowait((writer, number, token))

    try:
        yield note
    except SQLAlchemyError as error:
        told.failures.append(Failure(writer, "write", _line(error), sent, time.monotonic()))


@contextlib.contextmanager
def _checked(
    told: Told, reader: str, writer: str, number: int, token: str
) -> Iterator[Callable[[int], None]]:
    sent = time.monotonic()
    try:
        yield lambda found: told.reads.append(Read(reader, writer, number, found, token))
    except LostTimeline as error:
        told.warned.append(_line(error))
    except SQLAlchemyError as error:
        told.failures.append(Failure(reader, "read", _line(error), sent, time.monotonic()))


def _alive(told: Told, work: Callable[[str], None], name: str) -> None:
    try:
        work(name)
    except Exception:
        said = traceback.format_exc()
        told.failures.append(Failure(name, "died", said, 0.0, time.monotonic()))


def _serve(pipe: Pipe, told: Told) -> None:
    while pipe.recv() != "stop":
        pipe.send(told.take())


def _leave(pipe: Pipe, told: Told, tokens: Any) -> None:
    pipe.send(told.take())
    tokens.cancel_join_thread()  # what nobody has read holds up nobody


def _quiet() -> None:
    logging.getLogger("sqlroute").setLevel(logging.CRITICAL)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
