"""Real PostgreSQL servers for tests, those of sqlroute and of programs that use it.

:class:`TopologyFactory` works in any test runner; :mod:`sqlroute.testing.plugin` wraps it in
fixtures for pytest. Importing this module imports no driver and starts nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from sqlroute.local.topology import LocalTopology

__all__ = ["TopologyFactory"]

# Below the ephemeral ports (32768 and up), above the services of a developer's machine.
_PORTS = range(20000, 32000)


class TopologyFactory:
    """Start local topologies, each kind once, and stop all of them at the end.

    Their data lies in temporary directories and does not survive a crash of the machine
    (``fsync`` is off). What is left when the interpreter ends is stopped then; after a SIGKILL of
    the test run the servers go on.

    Args:
        pg_bin: PostgreSQL's bin directory for calls that name none; None finds one.
    """

    def __init__(self, pg_bin: Path | None = None) -> None:
        self._pg_bin = pg_bin
        self._started: dict[tuple[int, int, Path | None, str], LocalTopology] = {}
        self._directories: list[Path] = []

    def __call__(
        self, *, shards: int = 2, replicas: int = 2, pg_bin: Path | None = None, label: str = ""
    ) -> LocalTopology:
        """Return a running topology; the same one for the same arguments.

        Args:
            label: a test that breaks its servers gives one, to have a topology to itself.

        Raises:
            LocalTopologyError: it cannot be started.
        """
        key = (shards, replicas, pg_bin or self._pg_bin, label)
        if key not in self._started:
            self._started[key] = self._start(shards, replicas, pg_bin or self._pg_bin)
        return self._started[key]

    def close(self) -> None:
        """Stop every server and delete its data, even where one of them fails to stop.

        Raises:
            ExceptionGroup: of what failed; all the rest was done.
        """
        from sqlroute.local.topology import recorded_spec, remove

        atexit.unregister(self.close)
        failures: list[Exception] = []
        while self._directories:
            directory = self._directories.pop()
            try:
                if recorded_spec(directory) is not None:
                    remove(directory)
                shutil.rmtree(directory)
            except Exception as exc:
                failures.append(exc)
        self._started.clear()
        if failures:
            raise ExceptionGroup("servers of the tests that could not be removed", failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, shards: int, replicas: int, pg_bin: Path | None) -> LocalTopology:
        from sqlroute.local.spec import LocalSpec
        from sqlroute.local.topology import up

        if not self._directories:
            # Also when pytest ends without its finalizers, by sys.exit or an internal error.
            atexit.register(self.close)
        directory = Path(tempfile.mkdtemp(prefix="sqlroute-test-"))
        directory.chmod(0o755)  # pytest's own tmp_path is closed to the user that runs the servers
        self._directories.append(directory)
        with _alone():
            port = free_ports(shards * (1 + replicas))
            spec = LocalSpec(
                shards=shards,
                replicas=replicas,
                port=port,
                directory=directory,
                pg_bin=pg_bin,
                durable=False,
            )
            return up(spec)


def free_ports(count: int) -> int:
    """Return the first of ``count`` neighbouring ports that nobody listens on, below 32768."""
    while True:
        first = random.choice(_PORTS[: -count or None])
        if all(_is_free(port) for port in range(first, first + count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other test runs (xdist's workers) from choosing the same ports until ours are in use."""
    path = Path(tempfile.gettempdir()) / f"sqlroute-test-ports-{os.geteuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
