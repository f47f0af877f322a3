"""One server of a local topology: start it, stop it, break it, hold it back."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlroute.errors import LocalTopologyError
from sqlroute.local import processes
from sqlroute.local.account import Account, run_as
from sqlroute.local.waiting import became_true
from sqlroute.topology import Secret

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.sql import SQL, Composed

HOST = "127.0.0.1"
_START_PATIENCE = 60.0
_STOP_PATIENCE = 20.0
_REPLAY_PATIENCE = 10.0


class Role(StrEnum):
    """What a server is now: seen in its answer, or in its control file when it is down."""

    PRIMARY = "primary"
    REPLICA = "replica"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class LocalNode:
    """A server of a local topology; says nothing about whether it runs.

    Attributes:
        data: its data directory.
        log: its log file.
        pg_bin: the directory of the programs that run it.
        account: the user of the operating system that runs it.
    """

    name: str
    shard: str
    port: int
    data: Path
    log: Path
    pg_bin: Path
    account: Account
    user: str
    password: Secret
    database: str

    @property
    def conninfo(self) -> dict[str, Any]:
        """Parameters for a driver's connect call, the password revealed."""
        return {**self._server, "dbname": self.database}

    @property
    def url(self) -> str:
        """The node's entry in ``sqlroute.toml``, the password revealed."""
        login = f"{self.user}:{self.password.reveal()}"
        return f"postgresql://{login}@{HOST}:{self.port}/{self.database}?name={self.name}"

    @property
    def pid(self) -> int | None:
        """The postmaster's pid; None when the server does not run."""
        return processes.postmaster(self.data)

    @property
    def is_running(self) -> bool:
        """True also for a paused server, which answers nothing."""
        return self.pid is not None

    @property
    def is_paused(self) -> bool:
        return any(process.is_stopped for process in processes.server_processes(self.data))

    @property
    def is_built(self) -> bool:
        """True when there is a whole data directory."""
        return (self.data / "PG_VERSION").exists()

    def start(self) -> None:
        """Start the server and wait until it takes connections; nothing when it runs.

        What a killed server left (``postmaster.pid``, stopped children) is cleared first:
        PostgreSQL takes the zombie of a postmaster for a live one and would refuse.

        Raises:
            LocalTopologyError: it does not start; carries the last words of its log.
        """
        if not self.is_running:
            processes.destroy(self.data)
            (self.data / "postmaster.pid").unlink(missing_ok=True)
            seen = self.log.stat().st_size if self.log.exists() else 0
            # Port and name stand on the command line, not in a file: pg_rewind and pg_basebackup
            # copy the files of another node. The name is also what a standby calls itself when
            # it connects to its primary.
            options = f"-p {self.port} -c cluster_name={self.name}"
            command = ("-D", self.data, "-l", self.log, "-o", options, "-s", "-w")
            patience = ("-t", f"{_START_PATIENCE:.0f}")
            done = run_as(self.account, (self.pg_bin / "pg_ctl", "start", *command, *patience))
            # pg_ctl says 0 for a standby that failed at once: it takes the control file's "shut
            # down in recovery" for a recovery target that was reached.
            if done.code != 0 or not self.is_running:
                raise self._did_not_start(seen)
        became_true(lambda: self.answers() or not self.is_running, timeout=_START_PATIENCE)
        if not self.answers():
            raise self._did_not_start(0)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server, paused or not, and wait until every process is gone.

        Args:
            mode: ``immediate`` stops as after a crash: no checkpoint, recovery at the next start.

        Raises:
            LocalTopologyError: a process survives even SIGKILL.
        """
        number = signal.SIGINT if mode == "fast" else signal.SIGQUIT
        processes.send(number, processes.server_processes(self.data)[:1])
        processes.thaw(self.data)
        became_true(lambda: not processes.server_processes(self.data), timeout=_STOP_PATIENCE)
        processes.destroy(self.data)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL all processes of the server: the port is dead when this returns."""
        processes.destroy(self.data)

    def pause(self) -> None:
        """SIGSTOP all processes of the server: it accepts TCP connections and never answers."""
        processes.freeze(self.data)

    def resume(self) -> None:
        """SIGCONT a paused server."""
        processes.thaw(self.data)

    def hold_replay(self, seconds: float) -> None:
        """Let this replica apply each commit that much later; 0 ends it.

        Raises:
            LocalTopologyError: the node is no replica, or does not answer.
        """
        from psycopg import Error, sql

        delay = f"{round(seconds * 1000)}ms"
        change = sql.SQL("ALTER SYSTEM SET recovery_min_apply_delay = {}").format(delay)
        shown = sql.SQL(
            "SELECT setting::int FROM pg_settings WHERE name = 'recovery_min_apply_delay'"
        )
        self._replica_only("hold_replay")
        try:
            with self._connect() as connection:
                connection.execute(change)
                connection.execute("SELECT pg_reload_conf()")
        except Error as exc:
            raise self._refused(exc) from exc
        # Asked over new connections: they inherit what the postmaster has read.
        if not became_true(
            lambda: self._scalar(shown) == round(seconds * 1000), timeout=_REPLAY_PATIENCE
        ):
            raise LocalTopologyError(f"{self.name} did not take recovery_min_apply_delay {delay}")

    def pause_replay(self) -> None:
        """Stop applying WAL on this replica, until :meth:`resume_replay`; it still receives.

        Raises:
            LocalTopologyError: the node is no replica, or does not answer.
        """
        from psycopg.sql import SQL

        self._replica_only("pause_replay")
        self._scalar(SQL("SELECT pg_wal_replay_pause()"))
        state = SQL("SELECT pg_get_wal_replay_pause_state()")
        if not became_true(lambda: self._scalar(state) == "paused", timeout=_REPLAY_PATIENCE):
            raise LocalTopologyError(
                f"{self.name} was asked to pause its replay and has not; "
                "end hold_replay first, which keeps it from looking"
            )

    def resume_replay(self) -> None:
        """Apply WAL again.

        Raises:
            LocalTopologyError: the node is no replica, or does not answer.
        """
        from psycopg.sql import SQL

        self._replica_only("resume_replay")
        self._scalar(SQL("SELECT pg_wal_replay_resume()"))

    def role(self) -> Role:
        """Ask the server whether it is in recovery; a server that is down, by its control file."""
        from psycopg.sql import SQL

        if not self.is_running:
            return self._recorded_role()
        if self.is_paused:
            return Role.UNKNOWN
        try:
            in_recovery = self._scalar(SQL("SELECT pg_is_in_recovery()"))
        except LocalTopologyError:
            return Role.UNKNOWN
        return Role.REPLICA if in_recovery else Role.PRIMARY

    def answers(self) -> bool:
        """Say whether a client can connect and gets an answer."""
        from psycopg.sql import SQL

        try:
            return bool(self._scalar(SQL("SELECT 1")))
        except LocalTopologyError:
            return False

    @property
    def _server(self) -> dict[str, Any]:
        return {
            "host": HOST,
            "port": self.port,
            "user": self.user,
            "password": self.password.reveal(),
        }

    def _connect(self) -> Connection[Any]:
        """Connect to the database ``postgres``: the user's own may be dropped by a test."""
        import psycopg

        return psycopg.connect(
            **self._server, dbname="postgres", connect_timeout=3, autocommit=True
        )

    def _scalar(self, query: SQL | Composed) -> Any:
        from psycopg import Error

        try:
            with self._connect() as connection:
                row = connection.execute(query).fetchone()
        except Error as exc:
            raise self._refused(exc) from exc
        return row[0] if row is not None else None

    def _replica_only(self, verb: str) -> None:
        role = self.role()
        if role is not Role.REPLICA:
            says = "is not answering" if role is Role.UNKNOWN else f"is a {role.value}"
            if not self.is_running:
                says = "is not running"
            raise LocalTopologyError(f"{verb} needs a running replica, {self.name} {says}")

    def _recorded_role(self) -> Role:
        if not self.is_built:
            return Role.UNKNOWN
        try:
            done = run_as(self.account, (self.pg_bin / "pg_controldata", self.data), timeout=10.0)
        except LocalTopologyError:
            return Role.UNKNOWN
        if done.code != 0:
            return Role.UNKNOWN
        if (self.data / "standby.signal").exists():
            return Role.REPLICA
        state = re.search(r"cluster state: +(.+)", done.output)
        return Role.REPLICA if state is None or "recovery" in state[1] else Role.PRIMARY

    def _refused(self, exc: Exception) -> LocalTopologyError:
        said = " ".join(str(exc).split())
        return LocalTopologyError(f"{self.name} on port {self.port} did not answer: {said}")

    def _did_not_start(self, seen: int) -> LocalTopologyError:
        written = self.log.read_bytes()[seen:] if self.log.exists() else b""
        lines = written.decode(errors="replace").splitlines()
        words = [line for line in lines if re.search(r" (FATAL|PANIC|ERROR): ", line)] or lines
        said = re.sub(r"^.*?(FATAL|PANIC|ERROR): +", "", words[-1]) if words else "nothing logged"
        return LocalTopologyError(
            f"{self.name} did not start on port {self.port}: {said}; the whole log is {self.log}"
        )
