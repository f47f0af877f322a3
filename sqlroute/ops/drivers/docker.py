"""The driver of a server in a container.

Stops, kills and starts the container, not the process in it: what keeps a container running
(``--restart``) must know that it is meant. Programs of PostgreSQL run in the container where it
runs, else in a helper made of the same image and volumes and removed at once; the data must lie in
a volume or a mount, or the helper would not see it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlroute.errors import DriverError
from sqlroute.local.waiting import became_true
from sqlroute.ops.drivers import scripts
from sqlroute.ops.drivers.server import ServerDriver
from sqlroute.ops.drivers.shell import Heard, Ran, Shell, execute, remotely

_SHORT = 20.0
_GRACE = 10.0
_NOT_IN_TIME = (124, 137)
_STATUS = (
    "-f",
    "{{.State.Running}} {{.State.Pid}} {{.State.ExitCode}}",
)


@dataclass(frozen=True, slots=True)
class ContainerShell:
    """Programs in a container, or beside its volumes.

    Attributes:
        node: for errors.
        docker: the program.
        inside: the words after ``docker`` up to the program: ``exec`` or ``run`` with options.
        helper: the name of the container that ``inside`` makes; empty for none.
    """

    node: str
    docker: str
    inside: tuple[str, ...]
    helper: str = ""

    def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 10.0,
        heard: Heard | None = None,
    ) -> Ran:
        words, given = remotely(argv, environment, text, timeout)
        command = (self.docker, *self.inside, *words)
        try:
            ran = execute(self.node, command, text=given, timeout=timeout + _GRACE, heard=heard)
        except BaseException:
            if self.helper:
                with contextlib.suppress(DriverError):
                    execute(self.node, (self.docker, "rm", "-f", self.helper), timeout=_SHORT)
            raise
        if ran.code in _NOT_IN_TIME:
            name = argv[0].rpartition("/")[2]
            raise DriverError(
                f"{name} for {self.node} did not end in {timeout:g} s and was ended there",
                node=self.node,
                exit_code=ran.code,
            )
        return ran


@dataclass(frozen=True, slots=True)
class DockerDriver(ServerDriver):
    """A server in a container."""

    @property
    def shell(self) -> Shell:
        found = self._inspect()
        user = self.spec.account or self._owner(found)
        if found["State"]["Running"] and not found["State"]["Paused"]:
            inside = ("exec", "-i", "-u", user, self.spec.container)
            return ContainerShell(self.node, self.spec.docker, inside)
        return self._helper(found, user)

    @property
    def data(self) -> str:
        if self.spec.data:
            return self.spec.data
        settings = dict(word.partition("=")[::2] for word in self._inspect()["Config"]["Env"])
        if "PGDATA" not in settings:
            raise self._error("has no PGDATA in its container; set data in [drivers]")
        return str(settings["PGDATA"])

    @property
    def _log(self) -> str:
        return "/tmp/sqlroute-start.log"  # of a helper, gone with it

    def is_running(self) -> bool:
        return self._state()[0]

    def stop(self, timeout: float) -> None:
        found = self._inspect()
        if not found["State"]["Running"]:
            return
        if found["State"]["Restarting"]:
            self._give_up()
            return
        if found["State"]["Paused"]:
            raise self._error("hangs: its container is paused and cannot end; kill it")
        # Not `docker stop`, which kills after ten seconds. Docker takes the container's own stop
        # signal for a wish of its owner, and does not restart it; that of PostgreSQL for a fast
        # stop is SIGINT, so it is sent too where the other one is not the same.
        wish = found["Config"].get("StopSignal") or "SIGTERM"
        self._docker("kill", "-s", wish, self.spec.container)
        if wish.removeprefix("SIG") not in ("INT", "2"):
            self._interrupt()
        if not self._ended(timeout):
            raise self._error(f"did not stop in {timeout:g} s; kill it")
        code = self._state()[1]
        if code not in (0, 130, 143):
            raise self._error(f"ended with exit code {code}, not by a clean stop", code)

    def kill(self, timeout: float) -> None:
        state = self._inspect()["State"]
        if state["Restarting"]:
            self._give_up()
        elif state["Running"]:
            self._docker("kill", "-s", "KILL", self.spec.container, timeout=timeout)
        if not self._ended(timeout):
            raise self._error(f"did not end on SIGKILL in {timeout:g} s; look at docker's log")

    def start(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if not self.is_running():
            self._clear()
            self._docker("start", self.spec.container, timeout=timeout)
        ready = ""

        def settled() -> bool:
            nonlocal ready
            found = self._inspect()
            if not found["State"]["Running"] or found["RestartCount"]:
                return True
            ready = self._ready()
            return ready in ("ready", "standby")

        became_true(settled, timeout=max(deadline - time.monotonic(), 0), every=0.05)
        if ready not in ("ready", "standby"):
            if self._inspect()["RestartCount"]:
                self._give_up()
            raise self._container_did_not_start(timeout)

    def _ready(self) -> str:
        with contextlib.suppress(DriverError):  # it may end in between
            return self._script(scripts.STATUS, self.data).strip()
        return ""

    def _give_up(self) -> None:
        """End a container that docker starts again and again, since its server ends each time."""
        self._docker("stop", "-t", "1", self.spec.container)

    def _interrupt(self) -> None:
        with contextlib.suppress(DriverError):  # it may have ended by the first signal
            self._script(scripts.INTERRUPT, self.data)

    def _ended(self, timeout: float) -> bool:
        return became_true(lambda: not self._state()[0], timeout=timeout, every=0.01)

    def _state(self) -> tuple[bool, int]:
        running, pid, code = self._docker("inspect", *_STATUS, self.spec.container).split()
        return running == "true" or pid != "0", int(code)

    def _helper(self, found: Mapping[str, Any], user: str) -> ContainerShell:
        name = f"sqlroute-{secrets.token_hex(6)}"
        network = str(found["HostConfig"].get("NetworkMode") or "default")
        inside = (
            *("run", "--rm", "-i", "--name", name, "--entrypoint", "", "-u", user),
            *("--volumes-from", self.spec.container),
            *(() if network == "default" else ("--network", network)),
            str(found["Image"]),
        )
        return ContainerShell(self.node, self.spec.docker, inside, name)

    def _owner(self, found: Mapping[str, Any]) -> str:
        """Return who runs the server: the container's user, else the owner of the data."""
        user = str(found["Config"].get("User") or "")
        if user and user.partition(":")[0] not in ("0", "root"):
            return user
        look = ("stat", "-c", "%u:%g", self.data)
        if found["State"]["Running"] and not found["State"]["Paused"]:
            inside = ("exec", "-i", "-u", "0", self.spec.container)
            shell = ContainerShell(self.node, self.spec.docker, inside)
        else:
            shell = self._helper(found, "0")
        ran = shell.run(look, timeout=_SHORT)
        self._refuse(f"looking at {self.data} beside its container", ran)
        return ran.output.strip()

    def _inspect(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(
            self._docker("inspect", "--type", "container", self.spec.container)
        )
        return found[0]

    def _docker(self, *words: str, timeout: float = _SHORT) -> str:
        ran = execute(self.node, (self.spec.docker, *words), timeout=timeout)
        self._refuse(f"{self.spec.docker} {words[0]} {self.spec.container}", ran)
        return ran.output

    def _container_did_not_start(self, timeout: float) -> DriverError:
        with contextlib.suppress(DriverError):
            words = ("logs", "--tail", "50", self.spec.container)
            ran = execute(self.node, (self.spec.docker, *words), timeout=_SHORT)
            lines = [line for line in ran.said.splitlines() if "FATAL" in line or "PANIC" in line]
            said = (lines or ran.said.splitlines() or ["nothing was logged"])[-1].strip()
            return self._error(
                f"did not start in {timeout:g} s: {said}; see {self.spec.docker} logs "
                f"{self.spec.container}"
            )
        return self._error(f"did not start in {timeout:g} s")
