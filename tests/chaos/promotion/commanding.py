"""The operator's command in a process of its own, so that it can be killed at any moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection as Pipe
from types import TracebackType
from typing import Any, Self

from sqlroute.config import load
from sqlroute.errors import SQLRouteError
from sqlroute.ops import commands
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Wishes
from sqlroute.ops.promotion import Progress

from .cluster import SHARD, Cluster

PATIENCE = 30.0
_SPAWN = multiprocessing.get_context("spawn")


class Command:
    """A promotion or a failover that runs until it is killed, or ends."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        to: str = "",
        level: Level | None = None,
        is_failover: bool = False,
    ) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        wishes = Wishes(to=to, level=level, accepts_loss=is_failover)
        work = failing_over if is_failover else promoting
        self._process = _SPAWN.Process(target=work, args=(theirs, cluster.operator, wishes))
        self._process.start()
        theirs.close()
        self.steps: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._pipe.close()

    def await_begin(self) -> None:
        """Wait for its first step.

        Raises:
            TimeoutError: it has not begun.
        """
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"the command has not begun after {PATIENCE:g} s")

    def kill(self) -> str:
        """SIGKILL it; return how far it was: the last step that it told of, and its state."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        try:
            while self._pipe.poll():
                self.steps.append(self._pipe.recv())
        except (EOFError, OSError):  # all was read
            pass
        return self.steps[-1] if self.steps else "nothing"


def promoting(pipe: Pipe, config: Mapping[str, Any], wishes: Wishes) -> None:
    _run(pipe, commands.promote, config, wishes)


def failing_over(pipe: Pipe, config: Mapping[str, Any], wishes: Wishes) -> None:
    _run(pipe, commands.failover, config, wishes)


def _run(pipe: Pipe, command: Any, config: Mapping[str, Any], wishes: Wishes) -> None:
    def told(progress: Progress) -> None:
        pipe.send(f"{progress.step.name.value} {progress.state}")

    try:
        command(load(config), SHARD, wishes, told=told)
    except SQLRouteError as error:
        pipe.send(f"ended by {error}")
