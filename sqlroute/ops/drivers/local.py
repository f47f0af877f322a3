"""The driver of a server on this machine.

Stops and kills by signals to the processes themselves: the kernel says when the postmaster is gone
(a pidfd), where ``pg_ctl`` looks ten times a second. Everything else is
:class:`~sqlroute.ops.drivers.server.ServerDriver`.
"""

from __future__ import annotations

import os
import pwd
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import DriverError, LocalTopologyError
from sqlroute.local import processes
from sqlroute.local.account import Account, owner_account
from sqlroute.local.waiting import became_true
from sqlroute.ops.drivers.server import ServerDriver
from sqlroute.ops.drivers.shell import LocalShell, Shell

_EVERY = 0.001


@dataclass(frozen=True, slots=True)
class LocalDriver(ServerDriver):
    """A server of this machine; this program is root, or the user who runs it."""

    @property
    def shell(self) -> Shell:
        return LocalShell(self.node, self._account())

    @property
    def data(self) -> str:
        return str(self._path)

    @property
    def _path(self) -> Path:
        return Path(self.spec.data).resolve()

    def is_running(self) -> bool:
        return bool(processes.server_processes(self._path))

    def stop(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        data = self._path
        pid = processes.postmaster(data)
        if pid is not None:
            self._interrupt(pid, data, deadline, timeout)
        # A postmaster ends after its children, a killed one before them.
        if not became_true(
            lambda: not processes.server_processes(data),
            timeout=max(deadline - time.monotonic(), _EVERY),
            every=_EVERY,
        ):
            raise self._did_not_end("stop", timeout)

    def kill(self, timeout: float) -> None:
        data = self._path

        def gone() -> bool:
            left = processes.server_processes(data)
            self._signal(signal.SIGKILL, left)
            return not left

        if not became_true(gone, timeout=timeout, every=_EVERY):
            raise self._did_not_end("end on SIGKILL", timeout)

    def _interrupt(self, pid: int, data: Path, deadline: float, timeout: float) -> None:
        stopped = [p for p in processes.server_processes(data) if p.is_stopped]
        if stopped:
            raise self._error(
                f"hangs: process {stopped[0].pid} is stopped and cannot end; kill the server"
            )
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if processes.postmaster(data) == pid:  # the number was not given to another since
                signal.pidfd_send_signal(handle, signal.SIGINT)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise self._did_not_end("stop", timeout)
        except PermissionError as exc:
            raise self._not_mine() from exc
        finally:
            os.close(handle)

    def _signal(self, number: signal.Signals, found: tuple[processes.Process, ...]) -> None:
        try:
            processes.send(number, found)
        except PermissionError as exc:
            raise self._not_mine() from exc

    def _account(self) -> Account:
        path = self._path
        try:
            if self.spec.account:
                return self._named_account()
            place = next(place for place in (path, *path.parents) if place.exists())
            account = owner_account(place)
            if account.uid != place.stat().st_uid and place == path:
                raise self._not_mine()
        except (OSError, LocalTopologyError) as exc:
            raise self._error(f"has no user to run it: {exc}; set account in [drivers]") from exc
        return account

    def _named_account(self) -> Account:
        try:
            entry = pwd.getpwnam(self.spec.account)
        except KeyError:
            raise self._error(
                f"has account {self.spec.account!r}, which this machine does not know"
            ) from None
        if os.geteuid() not in (0, entry.pw_uid):
            raise self._not_mine()
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        switches = os.geteuid() == 0
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups), switches)

    def _did_not_end(self, what: str, timeout: float) -> DriverError:
        pids = ", ".join(str(found.pid) for found in processes.server_processes(self._path))
        return self._error(f"did not {what} in {timeout:g} s (processes {pids}); kill it")

    def _not_mine(self) -> DriverError:
        return self._error(
            f"is run by another user: {self.data} is not this program's; run it as root or as "
            "that user, or use an ssh driver with sudo"
        )
