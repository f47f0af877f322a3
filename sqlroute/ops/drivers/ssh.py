"""The driver of a server on another machine, over ssh.

Programs run there as the user who runs the server, by ``sudo`` where the login is another.
One connection is opened and kept for a minute (ssh's own ``ControlMaster``), so that a command
costs a round trip, not a handshake. ``ssh`` never asks anything: keys and known hosts are yours.
With ``unit`` systemd stops and starts the server, else ``pg_ctl`` and signals do.
"""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import DriverError
from sqlroute.local.waiting import became_true
from sqlroute.ops.drivers.server import ServerDriver
from sqlroute.ops.drivers.shell import Heard, Ran, Shell, execute, remotely

_LOST = 255
_NOT_IN_TIME = (124, 137)
_GRACE = 10.0
_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=5"),
    *("-o", "ServerAliveInterval=2", "-o", "ServerAliveCountMax=3"),
)


@dataclass(frozen=True, slots=True)
class SshShell:
    """Programs of another machine.

    Attributes:
        node: for errors.
        prefix: the words that make the login another user, none where it is the right one.
    """

    node: str
    ssh: tuple[str, ...]
    prefix: tuple[str, ...] = ()

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
        # What stands after the host is one text for the shell of the login there.
        command = (*self.ssh, shlex.join((*self.prefix, *words)))
        ran = execute(self.node, command, text=given, timeout=timeout + _GRACE, heard=heard)
        name = argv[0].rpartition("/")[2]
        if ran.code == _LOST:
            raise DriverError(
                f"the machine of {self.node} cannot be reached by ssh: {ran.last_line}; try "
                f"`{shlex.join(self.ssh)} true`",
                node=self.node,
                exit_code=ran.code,
            )
        if ran.code in _NOT_IN_TIME:
            raise DriverError(
                f"{name} for {self.node} did not end in {timeout:g} s and was ended there",
                node=self.node,
                exit_code=ran.code,
            )
        return ran


@dataclass(frozen=True, slots=True)
class SshDriver(ServerDriver):
    """A server of another machine."""

    @property
    def shell(self) -> Shell:
        prefix = ("sudo", "-n", "-u", self.spec.sudo, "--") if self.spec.sudo else ()
        return SshShell(self.node, self._ssh(), prefix)

    def stop(self, timeout: float) -> None:
        if not self.spec.unit:
            ServerDriver.stop(self, timeout)
            return
        self._systemctl(timeout, "stop", self.spec.unit)
        self._gone(timeout)

    def kill(self, timeout: float) -> None:
        if not self.spec.unit:
            ServerDriver.kill(self, timeout)
            return
        # The stop comes first: a unit that is to be restarted after a failure (Restart=) is not,
        # once it is being stopped.
        self._systemctl(timeout, "stop", "--no-block", self.spec.unit)
        ServerDriver.kill(self, timeout)
        self._systemctl(timeout, "stop", self.spec.unit)

    def _start(self, timeout: float) -> None:
        if not self.spec.unit:
            ServerDriver._start(self, timeout)
            return
        self._systemctl(timeout, "start", self.spec.unit)

    def _gone(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if not became_true(
            lambda: not self.is_running(), timeout=max(deadline - time.monotonic(), 0), every=0.02
        ):
            raise self._error(
                f"still runs after systemctl stop {self.spec.unit}: it is not that unit's server, "
                "or another one starts it again"
            )

    def _systemctl(self, timeout: float, *words: str) -> None:
        # sudo's user runs the server and may not touch units: root does.
        login = self.spec.user or os.environ.get("USER", "")
        prefix = () if login == "root" else ("sudo", "-n", "--")
        shell = SshShell(self.node, self._ssh(), prefix)
        ran = shell.run(("systemctl", *words), timeout=timeout)
        self._refuse(f"systemctl {' '.join(words)}", ran)

    def _ssh(self) -> tuple[str, ...]:
        spec = self.spec
        kept = (
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={_sockets()}/%C"),
            *("-o", "ControlPersist=60"),
        )
        login = (*(("-l", spec.user) if spec.user else ()),)
        port = (*(("-p", str(spec.port)) if spec.port else ()),)
        host = spec.host or spec.values["host"]
        # The first of two values wins: the user's stand before ours.
        return ("ssh", *spec.ssh_options, *_OPTIONS, *kept, *login, *port, "--", host)


def _sockets() -> Path:
    """Return the directory of ssh's kept connections, which only this user may enter.

    Raises:
        DriverError: somebody else has made it.
    """
    path = Path(tempfile.gettempdir()) / f"sqlroute-ssh-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise DriverError(f"{path} is not a directory of this user alone; remove it")
    return path
