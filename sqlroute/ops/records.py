"""What is written down about an operator's commands, in the catalog of the shard itself.

``sqlroute.operation`` has a row per command, ``sqlroute.operation_step`` one per step. They are a
record for people and for whoever resumes: what is left to do is never taken from them, but from the
servers (:mod:`sqlroute.ops.steps`). While a shard has no node that takes writes, steps are kept in
memory and written down with the first transaction of the new primary.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.ops.server import Server, Unreachable

LEASE = 60.0
"""Seconds after its last sign of life for which nobody else may go on with an operation."""

NOTIFY = "SELECT pg_notify('sqlroute', (SELECT name FROM sqlroute.shard))"

_ALL = """
SELECT id, kind, shard, state, plan, owner, started, deadline, finished, report,
       deadline > clock_timestamp() AS is_leased
  FROM sqlroute.operation ORDER BY started DESC
"""

_BEGIN = """
INSERT INTO sqlroute.operation (id, kind, shard, state, plan, owner, deadline)
SELECT %s, %s, %s, 'running', %s::jsonb, %s, clock_timestamp() + make_interval(secs => %s)
 WHERE NOT EXISTS (SELECT FROM sqlroute.operation WHERE state = 'running')
RETURNING id
"""

_STEP = """
INSERT INTO sqlroute.operation_step (operation, number, name, state, ms, detail)
VALUES (%s, %s, %s, %s, %s, %s::jsonb)
ON CONFLICT (operation, number)
DO UPDATE SET state = excluded.state, ms = excluded.ms, detail = excluded.detail
"""

_ALIVE = """
UPDATE sqlroute.operation SET deadline = clock_timestamp() + make_interval(secs => %s), owner = %s
 WHERE id = %s AND state = 'running'
"""

_END = """
UPDATE sqlroute.operation SET state = %s, finished = clock_timestamp(), report = %s::jsonb
 WHERE id = %s
"""


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of ``sqlroute.operation``.

    Attributes:
        state: ``running``, ``done``, ``aborted`` or ``failed``.
        is_leased: its owner has shown life lately, by the server's clock.
    """

    id: str
    kind: str
    shard: str
    state: str
    plan: Mapping[str, Any]
    owner: str
    started: datetime
    deadline: datetime
    finished: datetime | None
    report: Mapping[str, Any] | None
    is_leased: bool

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    @property
    def is_abandoned(self) -> bool:
        """Nobody works on it any more: its lease is over, or its process was one of this machine.

        A process that has its number by now lives for another purpose; then the lease decides.
        """
        host, _, pid = self.owner.rpartition("/")
        is_here = host == socket.gethostname() and pid.isdigit()
        return self.is_running and (
            not self.is_leased or (is_here and not Path(f"/proc/{pid}").exists())
        )

    def document(self) -> dict[str, Any]:
        return {
            "operation": self.id,
            "kind": self.kind,
            "shard": self.shard,
            "state": "abandoned" if self.is_abandoned else self.state,
            "owner": self.owner,
            "started": self.started.isoformat(),
            "finished": None if self.finished is None else self.finished.isoformat(),
        }


def new_id() -> str:
    """Return a new operation's id: 12 letters, which fit into the name of a connection."""
    return secrets.token_hex(6)


def owner() -> str:
    """Return who this process is to others: host and number."""
    return f"{socket.gethostname()}/{os.getpid()}"


class Records:
    """The record of one operation.

    Args:
        id: the operation's.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self._steps: list[tuple[str, Any]] = []
        self._number = 0

    def begin(self, server: Server, kind: str, shard: str, plan: Mapping[str, Any]) -> None:
        """Write the operation down; it runs from now on, and no other one may begin.

        Raises:
            OperationRefused: another one runs.
        """
        found = server.transaction(*self.begin_statements(kind, shard, plan))
        if not found:
            running = next((o for o in operations(server) if o.is_running), None)
            other = running.id if running is not None else "another operation"
            raise OperationRefused(
                f"operation {other} on shard {shard} has not ended; look at it with `sqlroute op "
                f"show {other}`, then `sqlroute op resume {other}` or `sqlroute op abort {other}`"
            )

    def begin_statements(
        self, kind: str, shard: str, plan: Mapping[str, Any]
    ) -> tuple[tuple[str, Any], ...]:
        """Return what :meth:`begin` does; the last one returns no row if another one runs."""
        return (
            ("SELECT name FROM sqlroute.shard FOR UPDATE", ()),
            (_BEGIN, (self.id, kind, shard, json.dumps(plan), owner(), LEASE)),
        )

    def take_over(self, server: Server) -> None:
        """Go on with an operation of another process, under its id."""
        rows = server.rows(
            "SELECT coalesce(max(number), 0) AS last FROM sqlroute.operation_step"
            " WHERE operation = %s",
            (self.id,),
        )
        self._number = int(rows[0]["last"])

    def begun(self, step: str) -> None:
        self._number += 1
        self._note(step, "begun", None, None)

    def ended(self, step: str, state: str, ms: float, detail: Mapping[str, Any]) -> None:
        self._note(step, state, round(ms, 3), detail)

    def _note(self, step: str, state: str, ms: float | None, detail: Any) -> None:
        told = None if detail is None else json.dumps(detail)
        self._steps.append((_STEP, (self.id, self._number, step, state, ms, told)))

    @property
    def statements(self) -> tuple[tuple[str, Any], ...]:
        """What is not written down yet, with a sign of life, to be part of a transaction."""
        return (*self._steps, (_ALIVE, (LEASE, owner(), self.id)))

    def written(self) -> None:
        """What was not written down now is."""
        self._steps.clear()

    def write(self, server: Server) -> None:
        """Write down what is not yet; where the server takes no writes it stays in memory."""
        try:
            server.transaction(*self.statements)
        except OperationFailed:
            return
        self.written()

    def end(self, server: Server, state: str, report: Mapping[str, Any]) -> None:
        """Write the end down.

        Raises:
            OperationFailed: the server does not take it.
        """
        server.transaction(*self.statements, (_END, (state, json.dumps(report), self.id)))
        self.written()


def operations(server: Server) -> list[Operation]:
    """Return all operations that a node knows of, the newest first; none without a catalog."""
    if server.shard_row() is None:
        return []
    return [Operation(**row) for row in server.rows(_ALL)]


def steps(server: Server, operation: str) -> list[dict[str, Any]]:
    """Return the steps of an operation as they were written down."""
    return server.rows(
        "SELECT number, name, state, ms, detail, at FROM sqlroute.operation_step"
        " WHERE operation = %s ORDER BY number",
        (operation,),
    )


def is_writable(server: Server) -> bool:
    """Say if a node is a primary that answers."""
    try:
        return not server.is_standby()
    except Unreachable:
        return False
