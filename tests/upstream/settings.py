"""What the orchestrating process tells the processes that run the suite, by one variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "SQLROUTE_UPSTREAM"


@dataclass(frozen=True, slots=True)
class Settings:
    """How one process runs its share of the suite.

    Attributes:
        mode: ``plain`` (a pass-through subclass of Session), ``routed`` (the replica is a second
            engine on the same server) or ``standby`` (the replica is a standby).
        nodes: (host, port) of the primary, and of the standby if there is one.
        database, user, password: where each of them is asked.
        stale_writes: of the sessions, ``check`` or ``allow``.
        results: file that takes one JSON document per test, and the counts at the end.
    """

    mode: str
    nodes: tuple[tuple[str, int], ...]
    database: str
    user: str
    password: str
    stale_writes: str
    results: str

    def url(self, driver: str) -> str:
        host, port = self.nodes[0]
        login = f"{self.user}:{self.password}"
        return f"postgresql+{driver}://{login}@{host}:{port}/{self.database}"

    def dump(self) -> str:
        return json.dumps(asdict(self))


def load() -> Settings:
    """Return what this process was told."""
    document = json.loads(os.environ[VARIABLE])
    document["nodes"] = tuple((host, port) for host, port in document["nodes"])
    return Settings(**document)
