"""Other processes that work for a scenario, each with routers of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .tally import Outcome

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks


class OtherProcess:
    """A process that runs ``work(pipe, config, **options)`` and sends its :class:`Outcome` last.

    What it sends before is numbers: how far it is. A ``with`` block that ends early kills it.
    """

    def __init__(self, work: Callable[..., None], config: Path, **options: Any) -> None:
        self.done = 0
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=work, args=(theirs, config), kwargs=options)
        self._process.start()
        theirs.close()  # so that its end is seen when the process ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.pipe.close()


def outcomes(processes: list[OtherProcess], progress: Callable[[int], None]) -> list[Outcome]:
    """Wait for the end of them all.

    Raises:
        EOFError: one has died.
    """
    found: dict[OtherProcess, Outcome] = {}
    while len(found) < len(processes):
        running = {process.pipe: process for process in processes if process not in found}
        ready = wait(list(running))
        for process in [process for pipe, process in running.items() if pipe in ready]:
            news = process.pipe.recv()
            if isinstance(news, Outcome):
                found[process] = news
            else:
                process.done = news
                progress(sum(each.done for each in processes))
    return [found[process] for process in processes]
