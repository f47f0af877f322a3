"""Planned promotion: what comes before the promotion itself, and the way back from there.

Until the candidate is promoted everything can be taken back, and is at once where a step fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqlroute.errors import OperationFailed, OperationRefused, SQLRouteError
from sqlroute.ops import fencing, planning, preflight, rejoining, steps
from sqlroute.ops.drivers import Ability
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Plan
from sqlroute.ops.promotion import Promotion, Report, Told, tell_nobody
from sqlroute.ops.records import steps as steps_written
from sqlroute.ops.server import Server, Unreachable, wait_for
from sqlroute.ops.shard import ShardServers, is_down
from sqlroute.ops.steps import Role, Step, StepName
from sqlroute.routing.token import format_lsn

LONGEST_HOLD = 55.0
"""Seconds; a router ends the hold of one operation after 60."""

OF_STEPS = 15.0
"""Seconds that the steps under a hold may take beside the drain, which ends so long before it."""

MARGIN = 1.0
"""Seconds before the end of a hold in which everything must be taken back."""

SETTLE = 0.3
"""Seconds for which a standby must be seen not to have been asked to promote."""

IN_RECOVERY = ("shut down in recovery", "in archive recovery")
"""What the control file of a standby says that is down."""


class Switchover(Promotion):
    """A planned promotion, or what is left of one, or the way back."""

    unwritten = frozenset({
        StepName.RECORD, StepName.CATCH_UP, StepName.PROMOTE, StepName.ANNOUNCE, StepName.RESTORE,
        StepName.VERIFY, StepName.CLOSE,
    })  # fmt: skip

    _hold_ends: float | None = None
    _goes_back = False
    _is_ours = False
    """This run has begun the operation and has not asked for the promotion: so nobody has."""

    def finish(self, left: Iterator[Step]) -> Report:
        """Do what is left; where that fails before the promotion, take back what was done.

        Raises:
            OperationRefused: another operation has not ended.
            OperationFailed: it failed. Says whether everything is as before, or how to go on.
        """
        try:
            self.run(left)
        except OperationRefused:
            raise
        except OperationFailed as error:
            raise self._taken_back(error) from error
        except BaseException:  # Ctrl-C, or whoever is told has gone: writes must not stay held
            self._told = tell_nobody
            if self._is_ours:
                with contextlib.suppress(SQLRouteError):
                    self.give_up()
            raise
        return self.report()

    def give_up(self) -> Report:
        """Take everything back.

        Raises:
            OperationFailed: the candidate is, or becomes, the primary; or it cannot be done now.
        """
        change = self.change
        if not self._is_ours and is_promoting(self.shard, change.candidate, change.former):
            raise OperationFailed(
                f"{change.candidate} is the primary of shard {change.shard}, or becomes it: the "
                f"operation can only be finished; run `sqlroute op resume {change.operation}`",
                operation=change.operation,
            )
        look = self.shard.look()
        if look.facts[change.former].is_replica:
            raise OperationFailed(
                f"{change.former} is a replica: there is nothing to go back to; see `sqlroute "
                "status`",
                operation=change.operation,
            )
        standing = planning.standing(change, look, is_recorded=True)
        standing = replace(standing, held=change.operation)  # one that is over is released, too
        if standing.member(change.former).role is Role.DOWN:
            self.fence_held = Level.L4
        self._goes_back = True
        self.run(steps.rollback(change, standing))
        return self.report("aborted")

    def _taken_back(self, error: OperationFailed) -> OperationFailed:
        """Roll back after a failure; return the error that tells what has become of it."""
        operation, former = self.change.operation, self.change.former
        try:
            self.give_up()
        except SQLRouteError as other:
            return OperationFailed(
                f"{error}; and it was not taken back: {other}; look at `sqlroute op show "
                f"{operation}`, then `sqlroute op resume {operation}` or `sqlroute op abort "
                f"{operation}`",
                operation=operation,
                step=error.step,
            )
        return OperationFailed(
            f"{error}; everything was taken back, {former} is the primary as before",
            step=error.step,
        )

    # before the pause

    def record(self) -> dict[str, Any]:
        """Write the operation down; from now on no other one begins."""
        change = self.change
        self.records.begin(self._old, change.kind, change.shard, self.written_plan())
        self._is_ours = True
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
        return self.hold_for(self.wishes.max_drain + OF_STEPS)

    def hold_for(self, seconds: float) -> dict[str, Any]:
        """Hold for some seconds, or until the routers are told otherwise; wait for the drain."""
        seconds = min(LONGEST_HOLD, seconds)
        since = self._old.hold(self.change.operation, seconds)
        self._paused_at = time.monotonic()
        self._hold_ends = self._paused_at + seconds
        left = (0, 0)

        def is_drained() -> bool:
            nonlocal left
            left = self._old.draining(self.change.operation, since)
            return left == (0, 0)

        wait_for(is_drained, timeout=min(self.wishes.max_drain, seconds - OF_STEPS))
        self._note_names(self._old.monitors())
        routers, transactions = left
        return {"routers": self._routers, "late_routers": routers, "late": transactions}

    def fence(self) -> dict[str, Any]:
        """Put up the fence, and see that it holds."""
        former, epoch = self.change.former, self.change.epoch
        if self.level is Level.L5 or (
            self.level is Level.L4 and self.shard.driver(former, Ability.CONTROL) is None
        ):
            # nobody can ask it for its end afterwards: that is marked before, under a fence in SQL
            below = preflight.strongest_in_sql(self.shard.look().facts[former])
            if below is not Level.NONE:
                fencing.fence(self.shard, former, below, epoch, self._patience)
            self._mark()
        found = fencing.fence(self.shard, former, self.level, epoch, self._patience)
        self.fence_held = found.level
        return {"fence": found.level.name, "ended": found.ended}

    def catch_up(self) -> dict[str, Any]:
        """Wait until the candidate has replayed the last that the former primary has written."""
        if self._last_position is None:
            self._end_of_former()
        self._await_last()
        if not wait_for(self._is_quiet, timeout=self._patience):
            raise OperationFailed(
                f"clients go on writing to {self.change.former} in spite of its fence; end them, "
                "or use a driver (L4)"
            )
        return {"last_position": format_lsn(self._last_position or 0)}

    def _is_quiet(self) -> bool:
        """Say if nobody has come through the fence; who has is ended, and the end marked anew.

        Before 18 ``pg_stat_activity`` does not show a session that is still authenticating, and it
        has the settings of when it began: it is let in after the fence was seen to hold.
        """
        if self.level is not Level.L3 or self._next_transaction is None:
            return True
        came = self._old.terminate_others()
        if not came and self._old.next_transaction() == self._next_transaction:
            return True
        self._mark()
        self._await_last()
        return False

    def _await_last(self) -> None:
        last, position, patience = self._last_position or 0, 0, self._patience

        def has_all() -> bool:
            nonlocal position
            position = self._candidate.position()
            return position >= last

        if not wait_for(has_all, timeout=patience, pause=0.001):
            raise OperationFailed(
                f"{self.change.candidate} has replayed up to {format_lsn(position)} after "
                f"{patience:g} s, and not the last position {format_lsn(last)}"
            )

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

    def promote(self) -> dict[str, Any]:
        """Make the candidate the primary."""
        self._is_ours = False
        return super().promote()

    # the way back

    def restore(self) -> dict[str, Any]:
        """Start the former primary again, its fence taken out of its settings where that can be."""
        hook = self.shard.driver(self.change.former, Ability.UNFENCE)
        if hook is not None:
            hook.unfence(self.wishes.timeout)
            if fencing.is_up(self._old):  # it was only cut off
                return {}
        driver = self.shard.driver(self.change.former, Ability.START)
        if driver is None:
            raise OperationFailed(
                f"{self.change.former} is down and has no driver that can start it; start it by "
                f"hand, then `sqlroute op abort {self.change.operation}`"
            )
        if Ability.CONFIGURE in driver.abilities:
            driver.remove_fence()  # who is no superuser could not take it off once it runs
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
        if not self._goes_back:
            return super().close()
        self._drop_slots()
        self.records.end(self._old, "aborted", self.report("aborted").document())
        return {}

    def _drop_slots(self) -> None:
        """Drop the slots that were made on the candidate: they would keep its log for ever."""
        names = [
            slot
            for row in steps_written(self._old, self.change.operation)
            if row["name"] == StepName.CHECKPOINT and row["state"] == "done"
            for slot in row["detail"]["slots"]
        ]

        def are_dropped() -> bool:
            self._candidate.drop_slots(names)  # those that are not in use any more
            return not self._candidate.has_slots(names)

        with contextlib.suppress(OperationFailed):
            if names:
                wait_for(are_dropped, timeout=SETTLE * 10, pause=SETTLE / 10)

    @property
    def _patience(self) -> float:
        """Seconds for a step of the pause: it must not outlast the hold, or writes would fail."""
        if self._hold_ends is None:
            return self.wishes.timeout
        left = self._hold_ends - time.monotonic() - MARGIN
        return round(max(min(self.wishes.timeout, left), MARGIN), 1)

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
    return run.finish(iter(plan.steps))


def is_promoting(shard: ShardServers, candidate: str, former: str) -> bool:
    """Say if a standby was asked to promote: a request may be on its way for a moment.

    One that is down was not, if its control file is that of a standby: its next start is made one.

    Raises:
        OperationFailed: it does not answer, so that nobody can say.
    """
    server = shard.servers[candidate]
    try:
        return _is_asked(server)
    except Unreachable as error:
        driver = shard.driver(candidate, Ability.CONTROL, Ability.CONFIGURE)
        if driver is not None and is_down(driver):
            if driver.control().state not in IN_RECOVERY:
                return True
            # killed in the middle of its promotion it has lost standby.signal already
            slot = driver.settings().get("primary_slot_name")
            driver.make_standby(rejoining.conninfo(shard, candidate, former), slot)
            return False
        raise OperationFailed(
            f"{error}: nobody can say whether it was asked to promote; start it, then try again"
        ) from error


def _is_asked(server: Server) -> bool:
    ends = time.monotonic() + SETTLE
    while True:
        if server.is_promoting():
            return True
        if time.monotonic() >= ends:
            return False
        time.sleep(SETTLE / 10)
