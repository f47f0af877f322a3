"""What a node driver can do: the values and the protocol, and the errors they share.

A driver reaches the *machine* of a node, beside SQL: it stops and starts the server there, reads
its control file, rewinds and clones its data. It decides nothing: when a server may be stopped or
rewound is for the operation that asks. Every call blocks, is bounded in time, and either has done
what it says when it returns, or raises :class:`~sqlroute.errors.DriverError`.
"""

# ruff: noqa: ARG002  (the signatures are those of Driver)
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, Protocol

from sqlroute.errors import DriverError
from sqlroute.routing.token import format_lsn, parse_lsn

Source = Mapping[str, Any]
"""libpq parameters of the server to copy from, as :meth:`sqlroute.topology.Node.conninfo`."""

Told = Callable[[str], None]
"""Called with each line of progress."""

Counted = Callable[[int, int], None]
"""Called with the bytes that were copied and those of the whole."""


class Ability(StrEnum):
    """What a driver can do at all; a server's state may forbid it at the moment."""

    STOP = "stop"
    START = "start"
    KILL = "kill"
    CONTROL = "control"
    REWIND = "rewind"
    CLONE = "clone"
    CONFIGURE = "configure"
    FENCE = "fence"
    UNFENCE = "unfence"


WHOLE = frozenset(Ability) - {Ability.FENCE, Ability.UNFENCE}
"""The abilities of a driver that can run programs beside the data."""


@dataclass(frozen=True, slots=True)
class Control:
    """What ``pg_controldata`` says of a data directory; while the server runs, of the past.

    Attributes:
        state: in its words, ``shut down``, ``in production``, ``in archive recovery``...
        checkpoint: where the *record* of the last checkpoint begins. After a clean stop it is the
            last one of the log: a replica whose replay position is greater has all of it.
        timeline: of that checkpoint. It lags behind a promotion by up to a checkpoint.
        min_recovery: a standby is consistent from here on; 0 on a primary.
        min_recovery_timeline: of that position.
        has_checksums, has_log_hints: pg_rewind needs one of them.
    """

    state: str
    checkpoint: int
    timeline: int
    system_identifier: int
    min_recovery: int
    min_recovery_timeline: int
    has_checksums: bool
    has_log_hints: bool

    @property
    def was_clean_shutdown(self) -> bool:
        return self.state in ("shut down", "shut down in recovery")

    @property
    def can_rewind(self) -> bool:
        return self.has_checksums or self.has_log_hints

    def __str__(self) -> str:
        return f"{self.state} at {self.timeline}/{format_lsn(self.checkpoint)}"

    @classmethod
    def read(cls, text: str) -> Control:
        """Read what ``pg_controldata`` printed in the C locale.

        Raises:
            KeyError: a line is missing.
        """
        found = dict(re.findall(r"^([^:\n]+): +(\S.*?) *$", text, re.MULTILINE))
        return cls(
            state=found["Database cluster state"],
            checkpoint=parse_lsn(found["Latest checkpoint location"]),
            timeline=int(found["Latest checkpoint's TimeLineID"]),
            system_identifier=int(found["Database system identifier"]),
            min_recovery=parse_lsn(found["Minimum recovery ending location"]),
            min_recovery_timeline=int(found["Min recovery ending loc's timeline"]),
            has_checksums=found["Data page checksum version"] != "0",
            has_log_hints=found["wal_log_hints setting"] == "on",
        )


@dataclass(frozen=True, slots=True)
class Rewound:
    """What ``pg_rewind`` did.

    Attributes:
        text: its last words.
        copied_bytes: ``None`` where it found nothing to rewind, and changed nothing.
    """

    text: str
    copied_bytes: int | None


class Driver(Protocol):
    """The way to the machine of one node. All times are seconds."""

    @property
    def kind(self) -> str:
        """``local``, ``docker``, ``ssh``, ``program`` or ``hook``."""

    @property
    def abilities(self) -> frozenset[Ability]: ...

    def stop(self, timeout: float) -> None:
        """Stop the server and see that it is gone: sessions end, replicas get all of its WAL.

        A server that hangs is not woken up: it would go on writing. :meth:`kill` it.
        """

    def kill(self, timeout: float) -> None:
        """End the server at once, as a crash would, one that hangs too; see that it is gone."""

    def start(self, timeout: float) -> None:
        """Start the server, return when it takes connections; nothing if it runs.

        Raises:
            DriverError: with the last words of its log.
        """

    def is_running(self) -> bool:
        """Say if any process of the server is there, also one that hangs."""

    def control(self) -> Control:
        """Read the control file."""

    def rewind(self, source: Source, timeout: float, progress: Told) -> Rewound:
        """Take back what a stopped server has written past the fork from the source's history.

        Its own settings stay, without any fence. It can only be started as a standby afterwards;
        :meth:`make_standby` says of whom. A rewind that was interrupted may be asked for again,
        but PostgreSQL promises nothing about it: clone where it fails.
        """

    def clone(
        self,
        source: Source,
        *,
        slot: str | None,
        timeout: float,
        progress: Counted,
        replace: bool = False,
    ) -> None:
        """Copy the source into the data directory, which must be missing or empty.

        Built under another name, renamed when whole; it can only be started as a standby.

        Args:
            slot: of the source, which must exist: keeps the WAL until the copy is whole.
            replace: a data directory that is there is kept as ``<data>.before-<time>``, its
                settings are the new one's; back in its place if the clone fails.
        """

    def make_standby(self, primary_conninfo: str, slot: str | None) -> None:
        """Let the next start be that of a standby; recovery targets and fences are removed."""

    def settings(self) -> dict[str, str]:
        """Return what ``postgresql.auto.conf`` sets."""

    def remove_fence(self) -> tuple[str, ...]:
        """Remove every fence from ``postgresql.auto.conf``; return the settings it changed."""

    def fence(self, timeout: float) -> None:
        """Run the user's command that keeps the node from its clients (level L5)."""

    def unfence(self, timeout: float) -> None:
        """Run the user's command that lets them come back."""


@dataclass(frozen=True, slots=True)
class Refusing:
    """A driver that can do nothing; those that can do something begin here.

    Attributes:
        node: its name, for errors.
    """

    node: str

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset()

    def stop(self, timeout: float) -> None:
        self._cannot("stop it")

    def kill(self, timeout: float) -> None:
        self._cannot("kill it")

    def start(self, timeout: float) -> None:
        self._cannot("start it")

    def is_running(self) -> bool:
        self._cannot("see if it runs")

    def control(self) -> Control:
        self._cannot("read its control file")

    def rewind(self, source: Source, timeout: float, progress: Told) -> Rewound:
        self._cannot("rewind it")

    def clone(
        self,
        source: Source,
        *,
        slot: str | None,
        timeout: float,
        progress: Counted,
        replace: bool = False,
    ) -> None:
        self._cannot("clone it")

    def make_standby(self, primary_conninfo: str, slot: str | None) -> None:
        self._cannot("make it a standby")

    def settings(self) -> dict[str, str]:
        self._cannot("read its settings")

    def remove_fence(self) -> tuple[str, ...]:
        self._cannot("edit its settings")

    def fence(self, timeout: float) -> None:
        self._cannot("fence it")

    def unfence(self, timeout: float) -> None:
        self._cannot("unfence it")

    def _cannot(self, what: str) -> NoReturn:
        able = ", ".join(sorted(self.abilities)) or "nothing"
        raise DriverError(
            f"the {self.kind} driver of {self.node} cannot {what} (it can: {able}); do it by hand, "
            "or give the node another driver in [drivers]",
            node=self.node,
        )
