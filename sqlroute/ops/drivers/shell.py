"""Running a program on the machine of a node: the one thing in which drivers truly differ.

A :class:`Shell` runs an argument vector there, as the user who runs the server, with environment
and input, bounded in time. Secrets travel in the environment or the input, never in an argument:
arguments are seen by every user of a machine. Knows nothing of PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from sqlroute.errors import DriverError
from sqlroute.local.account import Account

_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")
_CLIENT_ENVIRONMENT = ("HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK", "DOCKER_HOST", "DOCKER_CONFIG")
_DRAIN = 0.2
_CHUNK = 65_536

Heard = Callable[[str], None]

# Reads NAME=value lines up to an empty one from the input, then becomes the program, which has the
# rest of the input. `timeout` where there is one: a program on another machine would outlive the
# connection that has started it.
_REMOTELY = """
while IFS= read -r line && [ -n "$line" ]; do export "$line"; done
seconds=$1; shift
cd /
if command -v timeout >/dev/null 2>&1; then exec timeout -k 5 "$seconds" "$@"; fi
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A program that has ended; its output and what it said besides."""

    code: int
    output: str
    said: str

    @property
    def last_line(self) -> str:
        """The line that tells most: the first error, the cause of others, else the last."""
        lines = [line.strip() for line in f"{self.output}\n{self.said}".splitlines()]
        told = [line for line in lines if line]
        errors = [line for line in told if "error:" in line.lower() or "FATAL" in line]
        bad = [line for line in told if any(word in line.lower() for word in _BAD)]
        return (errors[:1] or bad or told or [f"exit code {self.code}"])[-1]


_BAD = ("could not", "cannot", "no such", "denied", "failed")


class Shell(Protocol):
    """Runs programs on one machine, as one user."""

    def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 10.0,
        heard: Heard | None = None,
    ) -> Ran:
        """Run a program to its end.

        Args:
            text: its standard input.
            heard: told each line that it writes to standard error, as it comes.

        Raises:
            DriverError: it cannot be run, or did not end in time; it is ended then.
        """


@dataclass(frozen=True, slots=True)
class LocalShell:
    """Programs of this machine.

    Attributes:
        node: for errors.
    """

    node: str
    account: Account

    def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        text: str = "",
        timeout: float = 10.0,
        heard: Heard | None = None,
    ) -> Ran:
        return execute(
            self.node,
            argv,
            environment=environment,
            text=text,
            timeout=timeout,
            heard=heard,
            account=self.account,
        )


def remotely(
    argv: Sequence[str], environment: Mapping[str, str] | None, text: str, timeout: float
) -> tuple[tuple[str, ...], str]:
    """Return argv and input that run a program with an environment, where only those two travel.

    Raises:
        DriverError: a value of the environment has several lines.
    """
    values = {"LC_ALL": "C", "TZ": "UTC", **(environment or {})}
    wrong = [name for name, value in values.items() if "\n" in value or "\0" in value]
    if wrong:
        raise DriverError(f"{', '.join(wrong)} has a line break, which no program can be given")
    head = "".join(f"{name}={value}\n" for name, value in values.items())
    seconds = f"{max(timeout, 0.1):.1f}"
    return ("sh", "-c", _REMOTELY, "sqlroute", seconds, *argv), f"{head}\n{text}"


def execute(
    node: str,
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    text: str = "",
    timeout: float,
    heard: Heard | None = None,
    account: Account | None = None,
) -> Ran:
    """Run a program of this machine to its end.

    The environment is small, as in :func:`sqlroute.local.account.run_as`; without an account it
    also has what ssh and docker need to find their keys and their server.

    Raises:
        DriverError: it cannot be run, or did not end in time.
    """
    name = argv[0].rpartition("/")[2]
    kept = (*_KEPT_ENVIRONMENT, *(() if account else _CLIENT_ENVIRONMENT))
    switches = account is not None and account.switches
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(os.fdopen(os.memfd_create("input"), "w+b"))
        given.write(text.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                list(argv),
                cwd="/",
                env={
                    **{key: os.environ[key] for key in kept if key in os.environ},
                    "LC_ALL": "C",
                    "TZ": "UTC",
                    **(environment or {}),
                },
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a group of its own, to be ended with its children
                user=account.uid if account and switches else None,
                group=account.gid if account and switches else None,
                extra_groups=account.groups if account and switches else None,
            )
        except OSError as exc:
            raise DriverError(
                f"cannot run {argv[0]} for {node}: {(exc.strerror or 'unknown').lower()}; correct "
                "[drivers]",
                node=node,
            ) from exc
        try:
            output, said, in_time = _listen(process, timeout, heard)
        finally:
            _end(process)
    if not in_time:
        raise DriverError(
            f"{name} for {node} did not end in {timeout:g} s and was ended; its machine is slow, "
            "or does not answer",
            node=node,
        )
    return Ran(process.returncode, output, said)


def _listen(
    process: subprocess.Popen[bytes], timeout: float, heard: Heard | None
) -> tuple[str, str, bool]:
    """Collect what a program says until it ends; False if it did not in time.

    Not until its pipes close: what it has left behind (ssh's master connection, a server) may hold
    them open for as long as it lives.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + timeout
    texts: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    told = 0
    with selectors.DefaultSelector() as selector, _end_of(process) as ended:
        selector.register(ended, selectors.EVENT_READ)
        for pipe in texts:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        while True:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            pipes = [key.fileobj for key, _ in ready if key.fileobj is not ended]
            for pipe, into in texts.items():
                if pipe in pipes and not _read(pipe, into):
                    selector.unregister(pipe)
            if heard is not None:
                told = _tell(texts[process.stderr], told, heard)
            if ready and not pipes:  # it has ended, and nothing more is in its pipes
                break
            if time.monotonic() >= deadline:
                break
    output, said = (bytes(texts[pipe]).decode(errors="replace") for pipe in texts)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DRAIN)
    return output, said, process.poll() is not None


@contextlib.contextmanager
def _end_of(process: subprocess.Popen[bytes]) -> Iterator[int]:
    handle = os.pidfd_open(process.pid)
    try:
        yield handle
    finally:
        os.close(handle)


def _read(pipe: IO[bytes], into: bytearray) -> bool:
    """Take what is in a pipe; False when it was closed."""
    found = os.read(pipe.fileno(), _CHUNK)
    into += found
    return bool(found)


def _tell(text: bytearray, told: int, heard: Heard) -> int:
    """Tell the whole lines from ``told`` on; return where the next one begins."""
    while True:
        ends = [at for at in (text.find(b"\n", told), text.find(b"\r", told)) if at >= 0]
        if not ends:
            return told
        line = text[told : min(ends)].decode(errors="replace").strip()
        told = min(ends) + 1
        if line:
            heard(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its children, if it has not ended; close what belongs to it."""
    if process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)
                break
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
