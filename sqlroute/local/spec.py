"""What a local topology shall be: how many shards and replicas, where, on which ports."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import LocalTopologyError

LAST_PORT = 32767  # above it the kernel hands out ports to clients: a server there meets "in use"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class Place:
    """The name and port of one node."""

    name: str
    shard: str
    port: int


@dataclass(frozen=True, slots=True)
class LocalSpec:
    """A topology of real PostgreSQL servers on this machine.

    Attributes:
        replicas: per shard, beside its primary.
        port: of the first node; the others follow.
        directory: holds data, logs, the state file and ``sqlroute.toml``.
        pg_bin: PostgreSQL's bin directory; None finds one.
        durable: ``fsync``; a test that never survives a crash of the machine can do without.

    Raises:
        LocalTopologyError: a value is out of its range.
    """

    shards: int = 2
    replicas: int = 2
    port: int = 27100
    directory: Path = Path("sqlroute-local")
    pg_bin: Path | None = None
    database: str = "app"
    user: str = "app"
    durable: bool = True

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise LocalTopologyError(f"shards={self.shards}: a topology has at least 1 shard")
        if not 0 <= self.replicas < len(_LETTERS):
            raise LocalTopologyError(
                f"replicas={self.replicas}: a shard has 0 to {len(_LETTERS) - 1} replicas"
            )
        count = self.shards * (1 + self.replicas)
        if self.port < 1 or self.port + count - 1 > LAST_PORT:
            raise LocalTopologyError(
                f"{count} nodes from port {self.port} on need ports 1 to {LAST_PORT} (above are "
                f"the clients'); choose a --port up to {LAST_PORT - count + 1} or fewer nodes"
            )
        for what, value in (("database", self.database), ("user", self.user)):
            if not _NAME.fullmatch(value) or value.startswith("pg_"):
                raise LocalTopologyError(
                    f"{what}={value!r}: use lower-case letters, digits and _, not starting with "
                    "a digit or pg_"
                )

    def places(self) -> tuple[Place, ...]:
        """Name the nodes, ``s0-a`` first, with their ports."""
        names = [
            (f"s{s}", _LETTERS[n]) for s in range(self.shards) for n in range(self.replicas + 1)
        ]
        return tuple(
            Place(f"{shard}-{letter}", shard, self.port + index)
            for index, (shard, letter) in enumerate(names)
        )
