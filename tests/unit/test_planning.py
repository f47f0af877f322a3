"""Promises of planning: how a shard stands, what is written down, what a plan shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from operating import look, primary, replica, row, silent

from sqlroute.ops.fences import Level, fence_name
from sqlroute.ops.planning import (
    Plan,
    Wishes,
    chosen,
    newest_seen,
    parse_position,
    read,
    seen_in,
    standing,
    written,
)
from sqlroute.ops.preflight import Check, Outcome
from sqlroute.ops.steps import Change, Role, Step, StepName

CHANGE = Change("op", "s0", 2, "a", "b", ("c",))


def test_what_is_written_down_is_read_again() -> None:
    wishes = Wishes(to="b", max_drain=1.5, rejoins=False, synchronous="ANY 1 (b)")

    change, level, again = read(written(CHANGE, Level.L3, wishes))

    assert (change, level) == (CHANGE, Level.L3)
    assert again == replace(wishes, level=Level.L3)


def test_what_no_server_tells_is_taken_for_not_done() -> None:
    """A fence that is set may not hold, and the position of who was killed is nobody's."""
    fenced = primary(settings={"session_preload_libraries": fence_name(2)})

    at = standing(CHANGE, look(fenced, replica("b"), replica("c")))

    assert at.member("a").fence is Level.L3
    assert not at.is_sealed
    assert not any((at.caught_up, at.is_checkpointed, at.is_gone, at.is_chosen, at.is_verified))


def test_a_promotion_that_is_seen_needs_no_further_proof() -> None:
    at = standing(CHANGE, look(silent("a"), primary("b", timeline=2), replica("c", upstream="b")))

    assert at.member("a").role is Role.DOWN
    assert at.member("c").follows == "b"
    assert at.caught_up
    assert not at.is_verified  # nobody has the row of epoch 2


def test_a_promotion_is_verified_when_all_replicas_have_its_row() -> None:
    nodes = silent("a"), primary("b", timeline=2), replica("c", upstream="b")

    assert standing(CHANGE, look(*nodes, epochs={"b": 2, "c": 2})).is_verified
    assert not standing(CHANGE, look(*nodes, epochs={"b": 2, "c": 1})).is_verified


@pytest.mark.parametrize(
    ("state", "left", "held"),
    [
        ("switching", 20.0, "op"),
        ("switching", 5.0, ""),
        ("switching", -1.0, ""),
        ("switching", None, ""),
        ("steady", None, ""),
    ],
)
def test_a_hold_counts_only_if_it_lasts_long_enough(
    state: str, left: float | None, held: str
) -> None:
    """Under one that is about to end nothing may be fenced."""
    rows = {"a": row(state=state, left=left, operation="op")}

    assert standing(CHANGE, look(primary(), replica("b"), replica("c"), rows=rows)).held == held


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("sqlroute monitor", (0, 0)),
        ("sqlroute monitor seen=3/1F held=0123456789ab", (3, 31)),
        ("sqlroute monitor held=0123456789ab", (0, 0)),
        ("psql seen=", (0, 0)),
    ],
)
def test_routers_say_in_their_names_what_they_have_acknowledged(
    name: str, seen: tuple[int, int]
) -> None:
    assert seen_in(name) == seen


def test_the_newest_of_all_routers_counts_and_no_router_is_not_nothing() -> None:
    """A later timeline before a greater position."""
    names = ["sqlroute monitor seen=1/FFFF", "sqlroute monitor seen=2/1", "sqlroute monitor"]

    assert newest_seen(look(silent(), replica(monitors=names))) == (2, 1)
    assert newest_seen(look(silent(), replica(monitors=["sqlroute monitor"]))) == (0, 0)
    assert newest_seen(look(silent(), replica(monitors=None))) is None


def test_who_has_received_most_is_chosen() -> None:
    """What has been received, not replayed; the timeline before the position."""
    at = look(
        silent(),
        replica("b", lsn=0x3000, replayed="0/1"),
        replica("c", lsn=0x2000),
        replica("d", lsn=0x1000, timeline=2),
    )

    assert chosen(at, ["b", "c"]) == "b"
    assert chosen(at, ["b", "c", "d"]) == "d"


def test_positions_are_read_as_they_are_shown() -> None:
    assert parse_position("3/0/1F") == (3, 31)


def test_a_plan_shows_its_checks_and_steps() -> None:
    """The keys are those that programs read."""
    checks = Check("lag", Outcome.REFUSED, "too far"), Check("roles", Outcome.OK, "fine")
    step = Step(StepName.PROMOTE, "b; no way back from here", is_reversible=False)
    plan = Plan(CHANGE, Level.L4, Wishes(), checks, (step,))

    document: dict[str, Any] = plan.document()

    assert plan.refusals == ("too far",)
    assert document == {
        "operation": "op",
        "kind": "switchover",
        "shard": "s0",
        "epoch": 2,
        "former": "a",
        "candidate": "b",
        "siblings": ["c"],
        "fence": "L4",
        "rejoins": True,
        "checks": [
            {"check": "lag", "outcome": "refused", "text": "too far"},
            {"check": "roles", "outcome": "ok", "text": "fine"},
        ],
        "refused": ["too far"],
        "steps": [
            {"step": "promote", "text": "b; no way back from here", "reversible": False},
        ],
    }
