"""Commands of the user's: a driver made of them alone, and the fence that any driver may have.

A command is run on *this* machine, without a shell, ``{node}``, ``{host}``, ``{port}`` and
``{shard}`` filled in word by word; ``SQLROUTE_NODE`` and its like are in its environment. Exit code
0 means done; anything else, or no end in time, that it was not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlroute.errors import DriverError
from sqlroute.operations import Command, DriverSpec
from sqlroute.ops.drivers.base import Ability, Refusing
from sqlroute.ops.drivers.shell import Ran, execute

_OF_STATUS = {0: True, 1: False, 3: False}  # 3: "not running", of init scripts and systemctl


@dataclass(frozen=True, slots=True)
class Hooked(Refusing):
    """A driver with the user's ``fence`` and ``unfence``, where the configuration has them."""

    spec: DriverSpec

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def abilities(self) -> frozenset[Ability]:
        return self.hook_abilities

    @property
    def hook_abilities(self) -> frozenset[Ability]:
        given = {Ability.FENCE: self.spec.fence, Ability.UNFENCE: self.spec.unfence}
        return frozenset(ability for ability, command in given.items() if command is not None)

    def fence(self, timeout: float) -> None:
        if self.spec.fence is None:
            self._cannot("fence it")
        self._done("fence", self.spec.fence, timeout)

    def unfence(self, timeout: float) -> None:
        if self.spec.unfence is None:
            self._cannot("unfence it")
        self._done("unfence", self.spec.unfence, timeout)

    def _done(self, what: str, command: Command, timeout: float) -> None:
        ran = self._run(what, command, timeout)
        if ran.code != 0:
            raise DriverError(
                f"{what} of {self.node} by {command} failed (exit code {ran.code})"
                f"{_said(ran)}; nothing is known of what it has done",
                node=self.node,
                exit_code=ran.code,
            )

    def _run(self, what: str, command: Command, timeout: float) -> Ran:
        values = self.spec.values
        own = {f"SQLROUTE_{name.upper()}": value for name, value in values.items()}
        environment = {**os.environ, **own, "SQLROUTE_ACTION": what}
        argv = command.argv(values)
        limit = min(timeout, self.spec.hook_timeout)
        return execute(self.node, argv, environment=environment, timeout=limit)


@dataclass(frozen=True, slots=True)
class HookDriver(Hooked):
    """A machine of which only the user's commands know how it is reached."""

    @property
    def abilities(self) -> frozenset[Ability]:
        given = {
            Ability.STOP: self.spec.stop,
            Ability.START: self.spec.start,
            Ability.KILL: self.spec.kill,
        }
        own = (ability for ability, command in given.items() if command is not None)
        return self.hook_abilities | frozenset(own)

    def stop(self, timeout: float) -> None:
        if self.spec.stop is None:
            self._cannot("stop it")
        self._done("stop", self.spec.stop, timeout)

    def kill(self, timeout: float) -> None:
        if self.spec.kill is None:
            self._cannot("kill it")
        self._done("kill", self.spec.kill, timeout)

    def start(self, timeout: float) -> None:
        if self.spec.start is None:
            self._cannot("start it")
        self._done("start", self.spec.start, timeout)

    def is_running(self) -> bool:
        """Ask the user's ``status``: exit code 0 if it runs, 1 or 3 if not."""
        if self.spec.status is None:
            self._cannot("see if it runs")
        ran = self._run("status", self.spec.status, self.spec.hook_timeout)
        if ran.code not in _OF_STATUS:
            raise DriverError(
                f"status of {self.node} by {self.spec.status} ended with exit code {ran.code}"
                f"{_said(ran)}; 0 means that it runs, 1 or 3 that it does not",
                node=self.node,
                exit_code=ran.code,
            )
        return _OF_STATUS[ran.code]


def _said(ran: Ran) -> str:
    said = ran.last_line
    return "" if said.startswith("exit code") else f": {said[:200]}"
