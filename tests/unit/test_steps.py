"""Promises of a promotion as a value: every standing that can come about is tried.

What servers cannot tell is forgotten whenever a command is killed (:func:`forgotten`); from what
is left, going on ends in the goal, and going back where it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest

from sqlroute.errors import OperationFailed
from sqlroute.ops.fences import Level
from sqlroute.ops.steps import (
    Change,
    Member,
    Role,
    Standing,
    Step,
    StepName,
    check_invariants,
    effect,
    failover,
    receiving,
    rollback,
    switchover,
)

Making = Callable[[Change, Standing], Iterator[Step]]

PAIR = ("a", "b")
TRIO = ("a", "b", "c")
CHANGES = [
    pytest.param(Change("op", "s0", 2, "a", "b"), PAIR, id="two nodes"),
    pytest.param(Change("op", "s0", 2, "a", "b", ("c",)), TRIO, id="three nodes"),
    pytest.param(Change("op", "s0", 2, "a", "b", ("c",), rejoins=False), TRIO, id="not rejoined"),
]
FAILOVERS = [
    pytest.param(Change("op", "s0", 2, "a", "b", rejoins=False, kind="failover"), PAIR, id="two"),
    pytest.param(
        Change("op", "s0", 2, "a", "b", ("c",), rejoins=False, kind="failover"), TRIO, id="three"
    ),
]


def steady(names: Iterable[str], former: Role = Role.PRIMARY) -> Standing:
    """Return a shard whose first node is the primary, or was."""
    first, *others = names
    replicas = (Member(name, Role.REPLICA, follows=first) for name in others)
    return Standing(1, (Member(first, former), *replicas))


def forgotten(change: Change, at: Standing) -> Iterator[Standing]:
    """Yield how a shard may be found after its command was killed: the hold may be over."""
    is_promoted = at.member(change.candidate).role is Role.PRIMARY
    found = replace(
        at,
        is_checkpointed=False,
        is_sealed=False,
        caught_up=is_promoted,
        is_gone=is_promoted,
        is_chosen=is_promoted,
    )
    yield found
    yield replace(found, held="")


def outcomes(change: Change, step: Step, at: Standing) -> Iterator[Standing]:
    """Yield what a step makes: a fence may also be the end of the server."""
    yield effect(change, step, at)
    if step.name is StepName.FENCE:
        yield effect(change, step, at).changed(change.former, role=Role.DOWN, fence=Level.NONE)


def first(left: Iterator[Step]) -> Step | None:
    try:
        return next(left, None)
    except OperationFailed:  # a rollback of what is promoted
        return None


def reachable(change: Change, start: Standing, making: Iterable[Making]) -> set[Standing]:
    """Return all standings that a command, killed and begun again in any way, may leave."""
    seen: set[Standing] = set()
    todo = [start]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        todo += forgotten(change, at)
        for make in making:
            step = first(make(change, at))
            if step is not None:
                todo += outcomes(change, step, at)
    return seen


def are_served(at: Standing) -> bool:
    """Say if clients meet no errors: their writes are taken, or held."""
    return bool(at.held) or any(member.takes_writes for member in at.members)


def ended(change: Change, at: Standing, make: Making) -> tuple[Standing, list[StepName]]:
    """Do all that is left; check what must hold on the way."""
    names = []
    for step in make(change, at):
        was_promoted = at.member(change.candidate).role is Role.PRIMARY
        assert step.is_reversible or was_promoted or step.name is StepName.PROMOTE, step
        had_way = are_served(at)
        at = effect(change, step, at)
        assert are_served(at) or not had_way or change.kind == "failover", step
        assert sum(member.takes_writes for member in at.members) <= 1, step
        names.append(step.name)
        assert len(names) < 30, names
    return at, names


# Switchover


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_a_switchover_killed_anywhere_ends_in_its_goal(
    change: Change, names: tuple[str, ...]
) -> None:
    """From every standing that it, or its way back, may have left."""
    found = reachable(change, steady(names), (switchover, rollback))

    for start in found:
        at, _ = ended(change, replace(start, is_recorded=True), switchover)
        former, candidate = at.member("a"), at.member("b")
        assert candidate.takes_writes
        assert not former.takes_writes
        assert former.follows == "b" or not change.rejoins
        assert all(at.member(name).follows == "b" for name in change.siblings)
        assert (at.epoch, at.held, at.is_recorded, at.is_verified) == (2, "", False, True)
    assert len(found) > 20


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_a_switchover_killed_anywhere_can_be_taken_back_until_it_has_promoted(
    change: Change, names: tuple[str, ...]
) -> None:
    found = reachable(change, steady(names), (switchover, rollback))
    before = [at for at in found if at.member("b").role is not Role.PRIMARY]

    for start in before:
        at, _ = ended(change, replace(start, is_recorded=True), rollback)
        assert at.member("a").takes_writes
        assert all(at.member(name).follows == "a" for name in change.siblings)
        assert (at.epoch, at.held, at.is_recorded) == (1, "", False)
    for start in found.difference(before):
        with pytest.raises(OperationFailed, match="op resume op"):
            next(rollback(change, start))
    assert before
    assert len(before) < len(found)


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_nothing_is_promoted_before_the_fence_was_seen_and_the_last_position_replayed(
    change: Change, names: tuple[str, ...]
) -> None:
    """What whoever was killed has seen is worth nothing: both are done again."""
    for start in reachable(change, steady(names), (switchover, rollback)):
        for at in forgotten(change, start):
            _, done = ended(change, at, switchover)
            if StepName.PROMOTE not in done:
                continue
            before = done[: done.index(StepName.PROMOTE)]
            assert StepName.CATCH_UP in before
            if at.member("a").role is Role.PRIMARY:
                assert before.index(StepName.FENCE) < before.index(StepName.CATCH_UP)


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_writes_are_held_before_the_fence_and_until_the_new_epoch(
    change: Change, names: tuple[str, ...]
) -> None:
    at = steady(names)

    for step in switchover(change, at):
        if step.name in (StepName.FENCE, StepName.CATCH_UP, StepName.PROMOTE, StepName.ANNOUNCE):
            assert at.held == "op"
        at = effect(change, step, at)

    assert not at.held


def test_a_hold_that_is_over_is_renewed_before_anything_else() -> None:
    """Its command was killed after the fence: each moment without a hold is one of errors."""
    change = Change("op", "s0", 2, "a", "b", ("c",))
    at = replace(steady(TRIO).changed("a", fence=Level.L3), is_recorded=True)

    step = next(switchover(change, at))

    assert step.name is StepName.HOLD


@pytest.mark.parametrize("down", ["before", "after"])
def test_a_sibling_that_goes_down_is_in_nobodys_way(down: str) -> None:
    """It cannot be repointed, before the promotion or after; whoever verifies tells of it."""
    change = Change("op", "s0", 2, "a", "b", ("c",))
    at = steady(TRIO)
    if down == "after":
        for step in switchover(change, at):
            at = effect(change, step, at)
            if step.name is StepName.PROMOTE:
                break
    at = at.changed("c", role=Role.DOWN, follows="")

    end, done = ended(change, replace(at, is_recorded=True), switchover)

    assert end.member("b").takes_writes
    assert StepName.REPOINT not in done
    if down == "before":
        end, done = ended(change, replace(at, is_recorded=True, held="op"), rollback)
        assert end.member("a").takes_writes
        assert StepName.POINT_BACK not in done


def test_writes_go_on_before_the_siblings_are_pointed_back() -> None:
    """Whoever waits for a sibling must not make clients wait."""
    change = Change("op", "s0", 2, "a", "b", ("c",))
    at = steady(TRIO).changed("a", fence=Level.L3).changed("c", follows="b")

    _, done = ended(change, replace(at, held="op", is_recorded=True), rollback)

    assert done == [StepName.UNFENCE, StepName.RELEASE, StepName.POINT_BACK, StepName.CLOSE]


# Failover


@pytest.mark.parametrize(("change", "names"), FAILOVERS)
@pytest.mark.parametrize("former", [Role.DOWN, Role.PRIMARY])
def test_a_failover_killed_anywhere_ends_in_its_goal(
    change: Change, names: tuple[str, ...], former: Role
) -> None:
    """Also one that was forced against a primary that may live."""
    found = reachable(change, steady(names, former), (failover,))

    for start in [left for at in found for left in forgotten(change, at)]:
        at, done = ended(change, start, failover)
        assert at.member("b").takes_writes
        assert all(at.member(name).follows == "b" for name in change.siblings)
        assert (at.epoch, at.is_recorded) == (2, False)
        if StepName.PROMOTE in done:
            before = done[: done.index(StepName.PROMOTE)]
            assert before.index(StepName.PROVE) < before.index(StepName.CHOOSE)
            assert before.index(StepName.CHOOSE) < before.index(StepName.CATCH_UP)
    assert len(found) > 10


def test_no_replica_receives_when_a_failover_chooses() -> None:
    """Else a commit could be acknowledged after its choice, and lost."""
    change = Change("op", "s0", 2, "a", "", ("c",), rejoins=False, kind="failover")
    at = steady(("a", "b", "c"), Role.DOWN)

    for step in failover(change, at):
        if step.name is StepName.CHOOSE:
            assert receiving(at) == ()
        at = effect(change, step, at)

    assert at.is_chosen
    assert [m.role for m in at.members] == [Role.DOWN, Role.REPLICA, Role.REPLICA]


def test_a_replica_of_a_replica_keeps_its_source_in_a_failover() -> None:
    """It never has more than that has."""
    at = steady(("a", "b", "c"), Role.DOWN).changed("c", follows="b")

    assert receiving(at) == ("b",)


# The invariants themselves


@pytest.mark.parametrize(
    ("at", "kind", "text"),
    [
        (
            replace(steady(TRIO).changed("b", role=Role.PRIMARY), caught_up=True),
            "switchover",
            "a and b would both take writes",
        ),
        (
            steady(TRIO, Role.DOWN).changed("b", role=Role.PRIMARY),
            "switchover",
            "without the last position",
        ),
        (
            replace(steady(TRIO, Role.DOWN).changed("b", role=Role.PRIMARY), caught_up=True),
            "switchover",
            "c would be left behind, following a",
        ),
        (
            replace(steady(TRIO, Role.DOWN).changed("b", role=Role.PRIMARY), caught_up=True),
            "failover",
            "beside a primary that may live",
        ),
    ],
)
def test_a_standing_that_must_not_be_is_named(at: Standing, kind: str, text: str) -> None:
    change = Change("op", "s0", 2, "a", "b", ("c",), kind=kind)

    with pytest.raises(OperationFailed, match=text) as caught:
        check_invariants(change, at)

    assert caught.value.operation == "op"
