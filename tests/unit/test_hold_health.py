"""Promises of ``sqlroute.health`` about holds and fences: who may write to a shard now."""

from __future__ import annotations

from typing import Any

import pytest

from sqlroute.health import (
    FENCE,
    HELD_PAUSE,
    HELD_RATE,
    LONGEST_HOLD,
    LOST_PAUSE,
    RECHECK,
    Health,
    Hold,
    NodeHealth,
    Observation,
    State,
    forget,
    observe,
    probe_pause,
    statement_failed,
)
from sqlroute.topology import Keyspace, Node, Shard, Topology

FENCED = f'FATAL: could not access file "{FENCE}7": No such file or directory'


@pytest.fixture
def steady() -> Health:
    """A shard of three nodes, a its primary, and nothing asked for."""
    nodes = tuple(Node(name, host=name) for name in "abc")
    found = Health.initial(Topology((Keyspace("shop", (Shard("s0", nodes),)),)))
    return after(found, primary("a", 0.0), replica("b", 0.0), replica("c", 0.0))


def seen(node: str, at: float, **facts: Any) -> Observation:
    values: dict[str, Any] = {"timeline": 1, "system_identifier": 7001, "lsn": 1000, "promotion": 0}
    return Observation(node, at, **{**values, "life": 1, **facts})


def primary(node: str, at: float, **facts: Any) -> Observation:
    return seen(node, at, is_primary=True, accepts_writes=True, **facts)


def replica(node: str, at: float, **facts: Any) -> Observation:
    return seen(node, at, **facts)


def failed(node: str, at: float, error: str = "connection refused") -> Observation:
    return Observation.failed(node, at, error)


def after(health: Health, *observations: Observation) -> Health:
    """Observe in order, each at the moment it was sent."""
    for observation in observations:
        health = observe(health, observation, observation.at)
    return health


def holding(
    at: float, seconds: float, operation: str = "op1", node: str = "a", **facts: Any
) -> Any:
    return primary(node, at, operation=operation, held_for=seconds, **facts)


def hold_of(health: Health) -> Hold | None:
    return health.shard("s0").hold


class TestHold:
    def test_a_primary_begins_it_and_ends_it(self, steady: Health) -> None:
        held = after(steady, holding(1.0, 10.0))
        released = after(held, primary("a", 2.0))

        assert hold_of(held) == Hold("op1", 1.0, 11.0)
        assert hold_of(released) is None

    def test_a_replica_neither_begins_nor_ends_it(self, steady: Health) -> None:
        """It shows what the primary said some time ago."""
        told = after(steady, replica("b", 1.0, operation="op1", held_for=10.0))
        held = after(steady, holding(1.0, 10.0), replica("b", 2.0))

        assert hold_of(told) is None
        assert hold_of(held) is not None

    def test_it_outlives_its_primary_until_the_time_is_over(self, steady: Health) -> None:
        held = after(steady, holding(1.0, 10.0), failed("a", 2.0), failed("a", 3.0))
        over = after(held, failed("a", 11.1))

        assert held.primary("s0") is None
        assert hold_of(held) == Hold("op1", 1.0, 11.0)
        assert hold_of(over) is None

    def test_a_new_primary_goes_on_with_it_and_ends_it(self, steady: Health) -> None:
        held = after(steady, holding(1.0, 10.0), failed("a", 2.0), failed("a", 3.0))
        promoted = after(held, holding(4.0, 7.0, node="b", timeline=2))
        steady_again = after(promoted, primary("b", 5.0, timeline=2, promotion=1))

        assert hold_of(promoted) == Hold("op1", 1.0, 11.0)
        assert hold_of(steady_again) is None

    def test_who_was_left_behind_is_not_heard(self, steady: Health) -> None:
        """The old primary, whose row nobody has changed, comes back for a moment."""
        moved = after(
            steady,
            holding(1.0, 10.0),
            failed("a", 2.0),
            failed("a", 3.0),
            primary("b", 4.0, timeline=2, promotion=1),
            holding(5.0, 6.0),
        )

        assert moved.primary("s0") == moved.of("b")
        assert hold_of(moved) is None

    def test_a_catalog_that_cannot_be_read_changes_nothing(self, steady: Health) -> None:
        held = after(steady, holding(1.0, 10.0), primary("a", 2.0, promotion=None))

        assert hold_of(held) == Hold("op1", 1.0, 11.0)

    def test_it_can_be_made_longer_and_shorter(self, steady: Health) -> None:
        longer = after(steady, holding(1.0, 10.0), holding(2.0, 20.0))
        shorter = after(longer, holding(3.0, 1.0))

        assert hold_of(longer) == Hold("op1", 1.0, 22.0)
        assert hold_of(shorter) == Hold("op1", 1.0, 4.0)

    def test_no_operation_holds_longer_than_the_longest_hold(self, steady: Health) -> None:
        held = after(steady, holding(1.0, 3600.0), holding(30.0, 3600.0))
        over = after(held, holding(1.0 + LONGEST_HOLD, 3600.0))
        still_over = after(over, holding(2.0 + LONGEST_HOLD, 3600.0))
        another = after(still_over, holding(3.0 + LONGEST_HOLD, 5.0, operation="op2"))

        assert hold_of(held) == Hold("op1", 1.0, 1.0 + LONGEST_HOLD)
        assert hold_of(over) is None
        assert hold_of(still_over) is None
        assert hold_of(another) == Hold("op2", 3.0 + LONGEST_HOLD, 8.0 + LONGEST_HOLD)

    def test_the_longest_hold_ends_without_its_primary_too(self, steady: Health) -> None:
        gone = after(steady, holding(1.0, 3600.0), failed("a", 2.0), failed("a", 3.0))
        over = after(gone, failed("a", 1.0 + LONGEST_HOLD))
        back = after(over, *(holding(2.0 + LONGEST_HOLD + i, 3500.0) for i in range(4)))

        assert hold_of(gone) is not None
        assert hold_of(over) is None
        assert hold_of(back) is None

    def test_one_whose_time_is_over_never_begins(self, steady: Health) -> None:
        """An operator was killed, and the server comes back much later."""
        assert hold_of(after(steady, holding(1.0, -5.0))) is None
        assert hold_of(after(steady, holding(1.0, 0.0))) is None

    def test_another_operation_begins_its_own(self, steady: Health) -> None:
        first = after(steady, holding(1.0, 10.0))
        second = after(first, holding(2.0, 10.0, operation="op2"))

        assert hold_of(second) == Hold("op2", 2.0, 12.0)

    def test_a_shard_that_is_forgotten_is_not_held(self, steady: Health) -> None:
        assert hold_of(forget(after(steady, holding(1.0, 10.0)), "s0")) is None


class TestFence:
    def test_a_fenced_primary_is_none(self, steady: Health) -> None:
        """One refused session is enough: the look at it over an older connection still succeeds."""
        by_statement = statement_failed(steady, "a", FENCED, 1.0)
        by_probe = after(steady, failed("a", 1.0, FENCED))

        for health in (by_statement, by_probe):
            answered = after(health, primary("a", 2.0))
            assert answered.primary("s0") is None
            assert answered.of("a").refused == f"fenced: {FENCED}"

    def test_an_answer_over_a_new_connection_ends_it(self, steady: Health) -> None:
        fenced = after(steady, failed("a", 1.0, FENCED))
        free = after(fenced, primary("a", 2.0, life=2))

        assert free.of("a").fenced == ""
        assert free.primary("s0") == free.of("a")

    def test_another_failure_does_not_end_it(self, steady: Health) -> None:
        health = after(steady, failed("a", 1.0, FENCED), failed("a", 2.0, "connection refused"))

        assert health.of("a").fenced == FENCED

    def test_a_fenced_replica_is_not_read_from(self, steady: Health) -> None:
        fenced = after(steady, failed("b", 1.0, FENCED), replica("b", 2.0))

        assert not fenced.of("b").is_readable
        assert fenced.primary("s0") == fenced.of("a")

    def test_of_two_primaries_the_one_that_is_not_fenced_is_chosen(self, steady: Health) -> None:
        health = after(steady, failed("a", 1.0, FENCED), primary("b", 2.0), primary("a", 3.0))

        assert health.primary("s0") == health.of("b")


class TestPause:
    def test_a_held_shard_is_looked_at_often_by_few_and_less_often_by_many(self) -> None:
        few, many = (NodeHealth("a", "s0", monitors=count) for count in (2, 500))

        assert probe_pause(few, interval=0.5, rate=100.0, is_held=True) == HELD_PAUSE
        assert probe_pause(many, interval=0.5, rate=100.0, is_held=True) == 500 / HELD_RATE

    def test_a_shard_that_has_lost_its_primary_is_looked_at_often(self) -> None:
        few, many = (NodeHealth("a", "s0", monitors=count) for count in (2, 500))

        assert probe_pause(few, interval=0.5, rate=100.0, is_lost=True) == LOST_PAUSE
        assert probe_pause(many, interval=0.5, rate=100.0, is_lost=True) == 500 / HELD_RATE

    def test_what_is_down_is_looked_at_less_often_than_who_may_be_next(self) -> None:
        down = NodeHealth("a", "s0", state=State.DOWN)

        pause = probe_pause(down, interval=0.5, rate=100.0, is_held=True)
        assert pause == pytest.approx(HELD_PAUSE / RECHECK)
