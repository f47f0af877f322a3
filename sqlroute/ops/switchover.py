"""Planned promotion: what comes before the promotion itself, and the way back from there.

Until the candidate is promoted everything can be taken back, and is at once where a step fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from sqlroute.errors import OperationFailed, OperationRefused, SQLRouteError
from sqlroute.ops import fencing, planning, preflight, rejoining, steps
from sqlroute.ops.drivers import Ability
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Plan
from sqlroute.ops.promotion import Promotion, Report, Told, tell_nobody
from sqlroute.ops.server import Server, Unreachable, wait_for
from sqlroute.ops.shard import ShardServers, is_down
from sqlroute.ops.steps import Role, Step, StepName
from sqlroute.routing.token import format_lsn

LONGEST_HOLD = 55.0
"""Seconds; a router ends the hold of one operation after 60."""

OF_STEPS = 15.0
"""Seconds that the steps under a hold may take beside the drain."""

SETTLE = 0.3
"""Seconds for which a standby must be seen not to have been asked to promote."""


class Switchover(Promotion):
    """A planned promotion, or what is left of one, or the way back."""

    unwritten = frozenset({
        StepName.RECORD, StepName.CATCH_UP, StepName.PROMOTE, StepName.ANNOUNCE, StepName.RESTORE,
        StepName.VERIFY, StepName.CLOSE,
    })  # fmt: skip

    # before the pause

    def record(self) -> dict[str, Any]:
        """Write the operation down; from now on no other one begins."""
        change = self.change
        self.records.begin(self._old, change.kind, change.shard, self.written_plan())
        return {}

    def checkpoint(self) -> dict[str, Any]:
        """Write everything out on both, and keep the log that the others will ask for."""
        skipped = []

        def work(name: str) -> None:
            try:
                self.shard.servers[name].checkpoint(max(60.0, self.wishes.timeout))
            except Unreachable:
                raise
            except OperationFailed:  # pg_checkpoint was not granted: a longer pause, no more
                skipped.append(name)

        self.shard.each(work, (self.change.former, self.change.candidate))
        slots = rejoining.slots(self.shard, self.change.siblings)
        if self._candidate.setting("primary_slot_name"):
            slots[self.change.former] = rejoining.slot_of(self.change.former)
        made = [slot for slot in slots.values() if slot and self._candidate.create_slot(slot)]
        return {"skipped": sorted(skipped), "slots": made}

    def repoint(self) -> dict[str, Any]:
        """Let the siblings follow the candidate, and see them do it."""
        rejoining.follow(self.shard, self.change.siblings, self.change.candidate)
        self.shard.each(self._await_stream, self.change.siblings)
        return {"repointed": list(self.change.siblings)}

    def _await_stream(self, name: str) -> None:
        def streams() -> bool:
            return rejoining.streams_from(self.shard, name) == self.change.candidate

        if not wait_for(streams, timeout=self.wishes.timeout, pause=0.01):
            raise OperationFailed(
                f"{name} does not stream from {self.change.candidate} after "
                f"{self.wishes.timeout:g} s; look at its log"
            )

    # the pause

    def hold(self) -> dict[str, Any]:
        """Have the routers begin no write transactions, and wait for the end of all others."""
        seconds = min(LONGEST_HOLD, self.wishes.max_drain + OF_STEPS)
        since = self._old.hold(self.change.operation, seconds)
        self._paused_at = time.monotonic()
        left = (0, 0)

        def is_drained() -> bool:
            nonlocal left
            left = self._old.draining(self.change.operation, since)
            return left == (0, 0)

        wait_for(is_drained, timeout=self.wishes.max_drain)
        self._note_names(self._old.monitors())
        routers, transactions = left
        return {"routers": self._routers, "late_routers": routers, "late": transactions}

    def fence(self) -> dict[str, Any]:
        """Put up the fence, and see that it holds."""
        former, epoch = self.change.former, self.change.epoch
        if self.level is Level.L5:
            # the user's command may cut the server off from everybody: its end is marked before
            below = preflight.strongest_in_sql(self.shard.look().facts[former])
            if below is not Level.NONE:
                fencing.fence(self.shard, former, below, epoch, self.wishes.timeout)
            self._mark()
        found = fencing.fence(self.shard, former, self.level, epoch, self.wishes.timeout)
        self.fence_held = found.level
        return {"fence": found.level.name, "ended": found.ended}

    def catch_up(self) -> dict[str, Any]:
        """Wait until the candidate has replayed the last that the former primary has written."""
        if self._last_position is None:
            self._end_of_former()
        last, position = self._last_position or 0, 0

        def has_all() -> bool:
            nonlocal position
            position = self._candidate.position()
            return position >= last

        if not wait_for(has_all, timeout=self.wishes.timeout, pause=0.001):
            raise OperationFailed(
                f"{self.change.candidate} has replayed up to {format_lsn(position)} after "
                f"{self.wishes.timeout:g} s, and not the last position {format_lsn(last)}"
            )
        return {"last_position": format_lsn(last)}

    def _end_of_former(self) -> None:
        """Learn the last position: of a server that was stopped by its control file."""
        driver = self.shard.driver(self.change.former, Ability.CONTROL)
        if driver is None or not is_down(driver):
            self._mark()
            return
        control = driver.control()
        if not control.was_clean_shutdown:
            raise OperationFailed(
                f"{self.change.former} has crashed ({control.state}) instead of stopping: nobody "
                "knows its last position"
            )
        self.fence_held = max(self.fence_held, Level.L4)
        self._last_position = control.checkpoint + 1

    def _mark(self) -> None:
        self._last_position = self._old.mark()
        self._next_transaction = self._old.next_transaction()

    # the way back

    def restore(self) -> dict[str, Any]:
        """Start the former primary again; the fence of its settings is still up."""
        driver = self.shard.driver(self.change.former, Ability.START)
        if driver is None:
            raise OperationFailed(
                f"{self.change.former} is down and has no driver that can start it; start it by "
                f"hand, then `sqlroute op abort {self.change.operation}`"
            )
        driver.start(max(self.wishes.timeout, 60.0))
        return {}

    def unfence(self) -> dict[str, Any]:
        """Let the former primary take writes again."""
        changed = fencing.unfence(self.shard, self.change.former, self.wishes.timeout)
        return {"settings": list(changed)}

    def point_back(self) -> dict[str, Any]:
        """Let the siblings follow the former primary as before."""
        rejoining.follow(self.shard, self.change.siblings, self.change.former)
        return {"repointed": list(self.change.siblings)}

    def release(self) -> dict[str, Any]:
        """Let the routers go on."""
        self._old.release()
        return {}

    def close(self) -> dict[str, Any]:
        """Write the end down: of the promotion, or of the way back."""
        if not self._candidate.is_standby():
            return super().close()
        self.records.end(self._old, "aborted", self.report("aborted").document())
        return {}

    @property
    def _old(self) -> Server:
        return self.shard.servers[self.change.former]


def switchover(shard: ShardServers, plan: Plan, told: Told = tell_nobody) -> Report:
    """Run a planned promotion; what fails before the point of no return is taken back at once.

    Raises:
        OperationRefused: the plan is refused, or another operation has not ended.
        OperationFailed: it failed. Says whether everything is as before, or how to go on.
    """
    if plan.refusals:
        raise OperationRefused(plan.refusals)
    run = Switchover(shard, plan.change, plan.level, plan.wishes, told)
    return finish(run, iter(plan.steps))


def finish(run: Switchover, left: Iterator[Step]) -> Report:
    """Do what is left of an operation. Raises: as :func:`switchover`."""
    try:
        run.run(left)
    except OperationFailed as error:
        raise _taken_back(run, error) from error
    return run.report()


def take_back(run: Switchover) -> Report:
    """Roll an operation back.

    Raises:
        OperationFailed: the candidate is, or becomes, the primary; or it cannot be done now.
    """
    change = run.change
    if is_promoting(run.shard, change.candidate):
        raise OperationFailed(
            f"{change.candidate} is the primary of shard {change.shard}, or becomes it: the "
            f"operation can only be finished; run `sqlroute op resume {change.operation}`",
            operation=change.operation,
        )
    look = run.shard.look()
    if look.facts[change.former].is_replica:
        raise OperationFailed(
            f"{change.former} is a replica: there is nothing to go back to; see `sqlroute status`",
            operation=change.operation,
        )
    standing = planning.standing(change, look, is_recorded=True)
    if standing.member(change.former).role is Role.DOWN:
        run.fence_held = Level.L4
    run.run(steps.rollback(change, standing))
    return run.report("aborted")


def _taken_back(run: Switchover, error: OperationFailed) -> OperationFailed:
    """Roll back after a failure; return the error that tells what has become of it."""
    operation, former = run.change.operation, run.change.former
    try:
        take_back(run)
    except SQLRouteError as other:
        return OperationFailed(
            f"{error}; and it was not taken back: {other}; look at `sqlroute op show {operation}`, "
            f"then `sqlroute op resume {operation}` or `sqlroute op abort {operation}`",
            operation=operation,
            step=error.step,
        )
    return OperationFailed(
        f"{error}; everything was taken back, {former} is the primary as before", step=error.step
    )


def is_promoting(shard: ShardServers, candidate: str) -> bool:
    """Say if a standby was asked to promote: a request may be on its way for a moment.

    Raises:
        Unreachable: it does not answer, so that nobody can say.
    """
    server = shard.servers[candidate]
    ends = time.monotonic() + SETTLE
    while True:
        if server.is_promoting():
            return True
        if time.monotonic() >= ends:
            return False
        time.sleep(SETTLE / 10)
