"""The processes of a server, as the kernel sees them.

A server's processes are found by its data directory: the postmaster by ``postmaster.pid``, checked
against its command line, the rest by their parent or by their working directory, which finds
orphans of a killed postmaster too. A zombie counts as gone: under a PID 1 that does not reap, a
killed PostgreSQL stays one for ever, while its port and memory are free. Linux only (``/proc``).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import LocalTopologyError
from sqlroute.local.waiting import became_true

_PROC = Path("/proc")
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table; ``state`` is the kernel's letter."""

    pid: int
    parent: int
    state: str
    name: str

    @property
    def is_stopped(self) -> bool:
        return self.state in "Tt"


def postmaster(data: Path) -> int | None:
    """Return the pid of the postmaster that runs on a data directory; None if none does.

    A ``postmaster.pid`` left by a killed server may name a zombie, nothing, or by now another
    program: neither counts.
    """
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    found = _process(pid)
    if found is None or found.name != "postgres":
        return None
    return pid if str(data) in _command(pid) or _directory(pid) == str(data) else None


def server_processes(data: Path) -> tuple[Process, ...]:
    """Return all live processes of the server on a data directory, the postmaster first."""
    lead = postmaster(data)
    found = [
        process
        for process in _servers()
        if lead in (process.pid, process.parent) or _directory(process.pid) == str(data)
    ]
    return tuple(sorted(found, key=lambda process: (process.pid != lead, process.pid)))


def freeze(data: Path) -> None:
    """SIGSTOP the server: it still accepts TCP connections and never answers.

    Raises:
        LocalTopologyError: a process did not stop.
    """

    def stopped() -> bool:
        running = [p for p in server_processes(data) if not p.is_stopped]
        send(signal.SIGSTOP, running)
        return not running

    # The postmaster comes first and cannot fork once stopped, so a second look finds all.
    if not became_true(stopped, timeout=_PATIENCE):
        raise LocalTopologyError(f"the server in {data} did not stop on SIGSTOP")


def thaw(data: Path) -> None:
    """SIGCONT the server."""
    send(signal.SIGCONT, reversed(server_processes(data)))


def destroy(data: Path) -> None:
    """SIGKILL every process of the server; its port is dead when this returns.

    Raises:
        LocalTopologyError: a process is still there, which only the kernel can explain.
    """

    def gone() -> bool:
        left = server_processes(data)
        send(signal.SIGKILL, left)
        return not left

    if not became_true(gone, timeout=_PATIENCE):
        pids = ", ".join(str(process.pid) for process in server_processes(data))
        raise LocalTopologyError(f"processes {pids} of {data} survive SIGKILL; look at dmesg")


def send(number: signal.Signals, processes: Iterable[Process]) -> None:
    """Send a signal to each process that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _servers() -> list[Process]:
    try:
        pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    except FileNotFoundError as exc:
        raise LocalTopologyError(
            "the local topology needs Linux's /proc to find its processes; run it in a container"
        ) from exc
    found = (_process(pid) for pid in pids)
    return [process for process in found if process is not None and process.name == "postgres"]


def _process(pid: int) -> Process | None:
    """Read one process; None when there is none, or only a zombie of it."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may itself contain some: the last one closes it.
    head, _, tail = text.rpartition(")")
    state, parent = tail.split()[:2]
    return None if state in "ZX" else Process(pid, int(parent), state, head.partition("(")[2])


def _command(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _directory(pid: int) -> str | None:
    """Return the working directory; None when gone, or not ours to read (root in a container)."""
    try:
        return str((_PROC / str(pid) / "cwd").readlink())
    except OSError:
        return None
