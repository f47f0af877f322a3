"""A promotion as a value: from how a shard stands, the steps that are left.

Pure. :func:`switchover` and :func:`rollback` are iterators of immutable steps, made from a
:class:`Standing` alone; each step says what it makes of one, and :func:`check_invariants` is run on
that. A command that was killed anywhere is therefore resumed by looking at the servers and making
the iterator anew: what is done already does not come again.

Why nothing acknowledged can be lost, and no epoch has two nodes that take writes:

* A candidate becomes the primary only when it has replayed the *last position* of the former one
  (``caught_up``), and that position is taken only after the former one is fenced: from L3 on no
  client of it gets another commit acknowledged. So all that was acknowledged is below it.
* A node is unfenced only as a replica, or by a rollback, which is possible only while the
  candidate is proved to be a standby; the promotion is the one step that cannot be taken back.
* Routers hold new write transactions from before the fence until the first write of the new epoch,
  the journal's row, says who is the primary: a client sees a delay, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from sqlroute.errors import OperationFailed
from sqlroute.ops.fences import Level


class Role(StrEnum):
    """What a node is, to a promotion."""

    PRIMARY = "primary"
    REPLICA = "replica"
    DOWN = "down"


class StepName(StrEnum):
    """The steps of all operations."""

    RECORD = "record"
    CHECKPOINT = "checkpoint"
    REPOINT = "repoint"
    HOLD = "hold"
    FENCE = "fence"
    CATCH_UP = "catch_up"
    PROMOTE = "promote"
    ANNOUNCE = "announce"
    VERIFY = "verify"
    REJOIN = "rejoin"
    CLOSE = "close"
    # of a failover
    PROVE = "prove"
    BLANK = "blank"
    CHOOSE = "choose"
    # of a rollback
    RESTORE = "restore"
    UNFENCE = "unfence"
    POINT_BACK = "point_back"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Member:
    """One node of the shard.

    Attributes:
        fence: the strongest that holds on it; a node that is down has none of its own.
        follows: the node that it is told to receive from; empty for none.
    """

    name: str
    role: Role
    fence: Level = Level.NONE
    follows: str = ""

    @property
    def takes_writes(self) -> bool:
        return self.role is Role.PRIMARY and self.fence is Level.NONE


@dataclass(frozen=True, slots=True)
class Standing:
    """How a shard stands.

    Attributes:
        epoch: of the newest row of the journal.
        held: the operation for which the routers hold write transactions; empty for none.
        is_recorded: the operation's row says that it runs.
        is_checkpointed: lately, so that a stop and a promotion have little to do.
        is_sealed: it was seen that nobody passes the fence of the former primary. A setting alone
            does not say that: a command may have been killed before it ended the old sessions.
        caught_up: the candidate has replayed the last position of the former primary.
        is_verified: every replica has replayed the journal's row.
        is_gone: a failover: it is proved that the former primary takes no writes, or forced.
        is_chosen: a failover: the candidate was chosen after nobody received any more.
    """

    epoch: int
    members: tuple[Member, ...]
    held: str = ""
    is_recorded: bool = False
    is_checkpointed: bool = False
    is_sealed: bool = False
    caught_up: bool = False
    is_verified: bool = False
    is_gone: bool = False
    is_chosen: bool = False

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.name == name)

    def changed(self, name: str, **to: Any) -> Standing:
        """Return the standing with another member of that name; the same if it has none."""
        members = tuple(replace(m, **to) if m.name == name else m for m in self.members)
        return replace(self, members=members)


@dataclass(frozen=True, slots=True)
class Change:
    """What an operation is to bring about.

    Attributes:
        operation: its id.
        epoch: the promotion epoch that it begins.
        former: the primary before it.
        candidate: the primary after it.
        siblings: the other replicas that are there; they follow the candidate from before the
            promotion.
        rejoins: the former primary comes back as a replica.
        kind: ``switchover``, ``failover``, or the name of one that another engine does.
    """

    operation: str
    shard: str
    epoch: int
    former: str
    candidate: str
    siblings: tuple[str, ...] = ()
    rejoins: bool = True
    kind: str = "switchover"


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        is_reversible: up to its end everything can be rolled back.
        text: what it does, for a plan and a log.
    """

    name: StepName
    text: str
    is_reversible: bool = True

    def __str__(self) -> str:
        return f"{self.name.value}: {self.text}"


_Following = Callable[[Change, Standing], Step | None]


def switchover(change: Change, standing: Standing) -> Iterator[Step]:
    """Yield the steps that are left of a planned promotion.

    Raises:
        OperationFailed: a step would break an invariant: the standing is none of this change.
    """
    yield from _walk(change, standing, _forward)


def failover(change: Change, standing: Standing) -> Iterator[Step]:
    """Yield the steps that are left of an unplanned promotion.

    Without a candidate they end with its choice; with it they go on from there.

    Raises:
        OperationFailed: a step would break an invariant.
    """
    yield from _walk(change, standing, _unplanned)


def delegated(change: Change, standing: Standing) -> Iterator[Step]:
    """Yield the steps around a promotion that another engine decides and does.

    It fences, repoints and starts; here is the hold, the epoch and the proof.

    Raises:
        OperationFailed: a step would break an invariant.
    """
    yield from _walk(change, standing, _around)


def rollback(change: Change, standing: Standing) -> Iterator[Step]:
    """Yield the steps that lead back to the former primary.

    Raises:
        OperationFailed: the candidate is the primary already: it can only be finished.
    """
    if standing.member(change.candidate).role is Role.PRIMARY:
        raise OperationFailed(
            f"{change.candidate} is the primary of shard {change.shard} already: the operation "
            f"can only be finished; run `sqlroute op resume {change.operation}`",
            operation=change.operation,
        )
    yield from _walk(change, standing, _backward)


def check_invariants(change: Change, standing: Standing) -> None:
    """Check what must hold after each step; see the module's docstring.

    Raises:
        OperationFailed: names what does not.
    """
    writable = [member.name for member in standing.members if member.takes_writes]
    if len(writable) > 1:
        _broken(change, f"{' and '.join(writable)} would both take writes")
    if not change.candidate:
        return
    candidate = standing.member(change.candidate)
    if change.kind not in ("switchover", "failover"):
        return
    if candidate.role is Role.PRIMARY and not standing.caught_up:
        _broken(change, f"{candidate.name} would be promoted without the last position")
    if change.kind == "failover":
        if candidate.role is Role.PRIMARY and not (standing.is_gone and standing.is_chosen):
            _broken(change, f"{candidate.name} would be promoted beside a primary that may live")
        return
    if candidate.role is Role.PRIMARY:
        for name in _astray(change, standing, change.candidate):
            follows = standing.member(name).follows
            _broken(change, f"{name} would be left behind, following {follows or 'nobody'}")


def effect(change: Change, step: Step, standing: Standing) -> Standing:  # noqa: PLR0912 - a table
    """Return how the shard stands after a step."""
    match step.name:
        case StepName.RECORD:
            return replace(standing, is_recorded=True)
        case StepName.CHECKPOINT:
            return replace(standing, is_checkpointed=True)
        case StepName.REPOINT | StepName.POINT_BACK:
            to = change.candidate if step.name is StepName.REPOINT else change.former
            for name in _astray(change, standing, to):
                standing = standing.changed(name, follows=to)
            return standing
        case StepName.HOLD:
            return replace(standing, held=change.operation)
        case StepName.FENCE:
            return replace(standing, is_sealed=True).changed(change.former, fence=Level.L1)
        case StepName.CATCH_UP:
            return replace(standing, caught_up=True)
        case StepName.PROMOTE:
            if change.kind not in ("switchover", "failover"):  # the engine has demoted the other
                standing = standing.changed(change.former, role=Role.DOWN)
            return standing.changed(change.candidate, role=Role.PRIMARY, follows="")
        case StepName.ANNOUNCE:
            return replace(standing, epoch=change.epoch, held="", is_recorded=True)
        case StepName.VERIFY:
            return replace(standing, is_verified=True)
        case StepName.REJOIN:
            back = {"role": Role.REPLICA, "fence": Level.NONE, "follows": change.candidate}
            return standing.changed(change.former, **back)
        case StepName.RESTORE:
            return standing.changed(change.former, role=Role.PRIMARY, fence=Level.L3)
        case StepName.UNFENCE:
            return replace(standing, is_sealed=False).changed(change.former, fence=Level.NONE)
        case StepName.RELEASE:
            return replace(standing, held="")
        case StepName.CLOSE:
            return replace(standing, is_recorded=False)
        case StepName.PROVE:
            return replace(standing, is_gone=True).changed(change.former, role=Role.DOWN)
        case StepName.BLANK:
            for name in receiving(standing):
                standing = standing.changed(name, follows="")
            return standing
        case StepName.CHOOSE:
            return replace(standing, is_chosen=True)


def receiving(standing: Standing) -> tuple[str, ...]:
    """Return the replicas that receive from a node that is no replica itself.

    One that cascades from another has never more than that has.
    """
    replicas = {member.name: member for member in standing.members if member.role is Role.REPLICA}
    return tuple(m.name for m in replicas.values() if m.follows and m.follows not in replicas)


def _walk(change: Change, standing: Standing, following: _Following) -> Iterator[Step]:
    while (step := following(change, standing)) is not None:
        yield step
        after = effect(change, step, standing)
        check_invariants(change, after)
        if _fails_writes(change, after) and not _fails_writes(change, standing):
            _broken(change, "writes would fail, neither held nor taken by any node")
        standing = after


def _fails_writes(change: Change, at: Standing) -> bool:
    """Say if clients meet errors: no step leads there; a hold that has expired meanwhile does."""
    if change.kind != "switchover" or at.held:
        return False
    ends = (at.member(change.former), at.member(change.candidate))
    return not any(member.takes_writes for member in ends)


def _forward(change: Change, at: Standing) -> Step | None:
    former, candidate = at.member(change.former), at.member(change.candidate)
    if candidate.role is not Role.PRIMARY:
        if former.role is Role.PRIMARY:
            if not at.is_recorded:
                return Step(StepName.RECORD, f"lock shard {change.shard}, write the operation down")
            if former.fence is not Level.NONE and not at.held:
                return Step(StepName.HOLD, "the fence is up, and writes fail: hold them again")
            if not at.is_checkpointed:
                return Step(StepName.CHECKPOINT, f"of {former.name} and {candidate.name}")
            late = _astray(change, at, candidate.name)
            if late:
                return Step(StepName.REPOINT, f"{', '.join(late)} to follow {candidate.name}")
            if not at.held:
                return Step(StepName.HOLD, "routers start no write transactions; drain the others")
            if not at.is_sealed:
                return Step(StepName.FENCE, f"{former.name} takes no more writes")
        if not at.caught_up:
            return Step(StepName.CATCH_UP, f"{candidate.name} to the last position")
        return Step(StepName.PROMOTE, f"{candidate.name}; no way back from here", False)
    if at.epoch < change.epoch:
        return Step(StepName.ANNOUNCE, f"epoch {change.epoch}, release the routers", False)
    if not at.is_verified:
        return Step(StepName.VERIFY, "every replica replays the journal's row", False)
    is_back = former.role is Role.REPLICA and former.fence is Level.NONE
    if change.rejoins and not is_back:
        return Step(StepName.REJOIN, f"{former.name} as a replica", False)
    if at.is_recorded:
        return Step(StepName.CLOSE, "the report", False)
    return None


def _unplanned(change: Change, at: Standing) -> Step | None:
    promoted = bool(change.candidate) and at.member(change.candidate).role is Role.PRIMARY
    if not promoted:
        if not at.is_gone:
            return Step(StepName.PROVE, f"{change.former or 'the primary'} is gone")
        still = receiving(at)
        if still:
            return Step(StepName.BLANK, f"{', '.join(still)} receive from nobody")
        if not at.is_chosen:
            return Step(StepName.CHOOSE, "who has received most; what may be lost")
        if not change.candidate:
            return None
        if change.former and at.member(change.former).fence is Level.NONE:
            return Step(StepName.FENCE, f"{change.former}, as far as it can be reached")
        if not at.caught_up:
            return Step(StepName.CATCH_UP, f"{change.candidate} replays all it has received")
        return Step(StepName.PROMOTE, f"{change.candidate}; no way back from here", False)
    if at.epoch < change.epoch:
        return Step(StepName.ANNOUNCE, f"epoch {change.epoch}, release the routers", False)
    late = _astray(change, at, change.candidate)
    if late:
        return Step(StepName.REPOINT, f"{', '.join(late)} to follow {change.candidate}", False)
    if not at.is_verified:
        return Step(StepName.VERIFY, "every replica replays the journal's row", False)
    if at.is_recorded:
        return Step(StepName.CLOSE, "the report", False)
    return None


def _around(change: Change, at: Standing) -> Step | None:
    if at.member(change.candidate).role is not Role.PRIMARY:
        if not at.is_recorded:
            return Step(StepName.RECORD, f"lock shard {change.shard}, write the operation down")
        if not at.held:
            return Step(StepName.HOLD, "routers start no write transactions; drain the others")
        text = f"have {change.former} replaced by {change.candidate}"
        return Step(StepName.PROMOTE, text, False)
    if at.epoch < change.epoch:
        return Step(StepName.ANNOUNCE, f"epoch {change.epoch}, release the routers", False)
    if not at.is_verified:
        return Step(StepName.VERIFY, "every replica replays the journal's row", False)
    if at.is_recorded:
        return Step(StepName.CLOSE, "the report", False)
    return None


def _backward(change: Change, at: Standing) -> Step | None:
    former = at.member(change.former)
    if former.role is not Role.PRIMARY:
        return Step(StepName.RESTORE, f"start {former.name}, fenced; {change.candidate} follows it")
    if former.fence is not Level.NONE:
        return Step(StepName.UNFENCE, f"{former.name} takes writes again")
    if at.held:
        return Step(StepName.RELEASE, "the routers go on")
    astray = _astray(change, at, former.name)
    if astray:
        return Step(StepName.POINT_BACK, f"{', '.join(astray)} to follow {former.name}")
    if at.is_recorded:
        return Step(StepName.CLOSE, "aborted")
    return None


def _astray(change: Change, at: Standing, source: str) -> list[str]:
    """Return the siblings that follow another node; those that are down follow nobody."""
    members = (at.member(name) for name in change.siblings)
    return [m.name for m in members if m.role is Role.REPLICA and m.follows != source]


def _broken(change: Change, what: str) -> None:
    raise OperationFailed(
        f"operation {change.operation} on shard {change.shard} would break an invariant: {what}; "
        "nothing more is done, look at `sqlroute status`",
        operation=change.operation,
    )
