"""The driver of a server that runs programs for a role: ``COPY ... TO PROGRAM``.

Nothing but SQL reaches the machine, and only while the server answers: it can stop or kill itself,
and nobody can start it again this way. The program is a signal to the postmaster, sent by a child
of the server as the server's own user; a backend works in the data directory, where
``postmaster.pid`` is. The proof is a refused connection afterwards: a postmaster that is ending
goes on to answer, with an error, until all its children are gone.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlroute.errors import DriverError
from sqlroute.local.waiting import became_true
from sqlroute.ops.drivers.base import Ability
from sqlroute.ops.drivers.hook import Hooked
from sqlroute.ops.fences import NO_FENCE
from sqlroute.topology import Node

if TYPE_CHECKING:
    import psycopg

_EVERY = 0.005
_LONGEST_ATTEMPT = 2.0


@dataclass(frozen=True, slots=True)
class ProgramDriver(Hooked):
    """A server that is asked to end itself.

    Attributes:
        server: where and as whom to connect: a superuser, or a member of
            ``pg_execute_server_program``.
    """

    server: Node

    @property
    def abilities(self) -> frozenset[Ability]:
        return self.hook_abilities | {Ability.STOP, Ability.KILL}

    def stop(self, timeout: float) -> None:
        self._signal("INT", "stop", timeout)

    def kill(self, timeout: float) -> None:
        # Not SIGKILL: the sessions of a killed postmaster would go on for a while. On SIGQUIT it
        # ends them at once, and kills those that do not end within 5 s.
        self._signal("QUIT", "end", timeout)

    def is_running(self) -> bool:
        """Say if anything takes connections there; a firewall's silence is no answer.

        Raises:
            DriverError: the host is silent, so that nobody can say.
        """
        return self._takes_connections(_LONGEST_ATTEMPT)

    def _signal(self, name: str, what: str, timeout: float) -> None:
        import psycopg
        from psycopg import sql

        deadline = time.monotonic() + timeout
        if not self._takes_connections(min(timeout, _LONGEST_ATTEMPT)):
            return
        # The postmaster signals the process groups of its backends, this shell's too, at once.
        program = f"""trap '' TERM QUIT; kill -{name} "$(head -n 1 postmaster.pid)\""""
        copy = sql.SQL("COPY (SELECT 1) TO PROGRAM {}").format(sql.Literal(program))
        try:
            connection = self._connect(timeout)
        except psycopg.Error as exc:
            raise self._failed(what, exc) from exc
        try:
            connection.execute(copy)
        except (psycopg.errors.AdminShutdown, psycopg.errors.CrashShutdown):
            pass  # it was faster than the answer
        except psycopg.Error as exc:
            # Without a reason the connection went away with the server: the proof decides.
            if exc.sqlstate is not None:
                raise self._failed(what, exc) from exc
        finally:
            connection.close()
        if not became_true(
            lambda: not self._takes_connections(max(deadline - time.monotonic(), _EVERY)),
            timeout=max(deadline - time.monotonic(), 0),
            every=_EVERY,
        ):
            raise DriverError(
                f"{self.node} was asked to {what} and still takes connections after {timeout:g} s; "
                "end it by hand on its machine",
                node=self.node,
            )

    def _connect(self, timeout: float) -> psycopg.Connection[Any]:
        import psycopg

        conninfo = self.server.conninfo()
        options = " ".join(filter(None, (conninfo.get("options"), NO_FENCE)))
        try:
            return self._opened({**conninfo, "options": options}, timeout)
        except psycopg.OperationalError as exc:
            if "permission denied to set parameter" not in str(exc):
                raise
            return self._opened(conninfo, timeout)  # no superuser: it cannot pass a fence

    def _opened(self, conninfo: dict[str, Any], timeout: float) -> psycopg.Connection[Any]:
        import psycopg

        seconds = max(int(timeout), 2)
        return psycopg.connect(**conninfo, connect_timeout=seconds, autocommit=True)

    def _takes_connections(self, timeout: float) -> bool:
        place = dict(self.server.options).get("hostaddr") or self.server.host
        try:
            if place.startswith("/"):
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(timeout)
                    probe.connect(f"{place}/.s.PGSQL.{self.server.port}")
            else:
                socket.create_connection((place or "localhost", self.server.port), timeout).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as exc:
            raise DriverError(
                f"{self.node} on port {self.server.port} is silent ({exc}), which does not prove "
                "that it is down; look at its machine",
                node=self.node,
            ) from exc
        return True

    def _failed(self, what: str, exc: Exception) -> DriverError:
        said = " ".join(str(exc).split())
        return DriverError(
            f"{self.node} cannot be asked to {what} by COPY TO PROGRAM: {said}; grant "
            "pg_execute_server_program to the operator, or name another driver",
            node=self.node,
        )
