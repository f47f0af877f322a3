"""Which replicas may take a read, why not the others, and which one is chosen."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from planning import health, topology

from sqlroute.routing.balancing import (
    Candidates,
    Required,
    candidates,
    choose,
    describe_token,
    floor_of,
    has_replayed,
    patience,
)
from sqlroute.routing.policy import Consistency, Policy
from sqlroute.routing.token import Position
from sqlroute.topology import Keyspace, Node, Shard, Topology

OF = topology(main="abcd")
BOUNDED = Policy(consistency=Consistency.BOUNDED, max_lag=5.0)
SESSION = Policy(consistency=Consistency.SESSION, max_lag=5.0)
EVENTUAL = Policy(consistency=Consistency.EVENTUAL)


def sort(
    policy: Policy = SESSION,
    *,
    token: Position | None = None,
    nodes: tuple[str, ...] = (),
    floor: Position | None = None,
    exclude: str = "",
    of: Topology = OF,
    **facts: dict[str, Any],
) -> Candidates:
    known = health(of, {f"main-{letter}": fact for letter, fact in facts.items()})
    excluded = frozenset(f"main-{letter}" for letter in exclude)
    required = Required(token, frozenset((node, 0) for node in nodes), floor)
    return candidates("main", known, of, policy, policy.consistency, required, excluded)


def names(found: Candidates) -> str:
    return "".join(node.node[-1] for node in found.fresh)


def test_healthy_replicas_are_fresh() -> None:
    found = sort()

    assert names(found) == "bcd"
    assert found.refused == ()


def test_primary_is_no_candidate() -> None:
    assert "main-a" not in sort(b={"lag": 9.0}, c={"lag": 9.0}, d={"lag": 9.0}).reasons()


@pytest.mark.parametrize("policy", [BOUNDED, SESSION])
def test_lag_has_a_bound(policy: Policy) -> None:
    found = sort(policy, b={"lag": 5.0}, c={"lag": 5.1})

    assert names(found) == "bd"
    assert found.refused == (("main-c", "is 5.1 s behind (max_lag 5 s)"),)


def test_eventual_has_no_bound() -> None:
    assert names(sort(EVENTUAL, b={"lag": 1e6})) == "bcd"


def test_eventual_needs_a_server_that_answers() -> None:
    assert names(sort(EVENTUAL, b={"down": "timed out"})) == "cd"


def test_unknown_lag_is_no_lag_to_rely_on() -> None:
    found = sort(BOUNDED, a={"timeline": 2})

    assert found.fresh == ()
    assert "main-b has an unknown lag" in found.reasons()


def test_refused_server_says_why() -> None:
    found = sort(b={"down": "connection refused"})

    assert found.refused == (("main-b", "is down (connection refused)"),)


def test_node_that_just_failed_is_refused() -> None:
    found = sort(exclude="bc")

    assert names(found) == "d"
    assert found.reasons() == "main-b just failed, main-c just failed"


def test_weight_zero_is_no_reads() -> None:
    nodes = (Node("main-a"), Node("main-b", weight=0), Node("main-c", weight=0.5))
    of = Topology((Keyspace("shop", (Shard("main", nodes),)),))

    found = sort(of=of)

    assert names(found) == "c"
    assert found.reasons() == "main-b has weight 0"


def test_token_must_be_replayed() -> None:
    found = sort(token=Position("main", 1, 1, 0x1001), b={"lag": 1.0})

    assert names(found) == "cd"
    assert found.reasons() == "main-b is not known to have replayed what the session has seen"


def test_replay_up_to_the_token_is_enough() -> None:
    assert names(sort(token=Position("main", 1, 1, 0x1000), b={"lag": 1.0})) == "bcd"


@pytest.mark.parametrize("policy", [BOUNDED, EVENTUAL])
def test_token_is_of_session_consistency_only(policy: Policy) -> None:
    assert names(sort(policy, token=Position("main", 1, 1, 2**40))) == "bcd"


def test_position_on_an_older_timeline_proves_nothing() -> None:
    found = sort(token=Position("main", 1, 2, 1))

    assert found.fresh == ()
    assert len(found.unproven) == 3


def test_refusal_goes_before_the_token() -> None:
    """A replica that is down is not worth asking for its position."""
    found = sort(token=Position("main", 1, 1, 2**40), b={"down": "timed out"}, exclude="c")

    assert [node.node for node in found.unproven] == ["main-d"]


def test_server_that_never_answered_is_named() -> None:
    """It is not known to be a replica, so nothing else would mention it."""
    found = sort(b={"unseen": True}, c={"unseen": True}, d={"unseen": True})

    assert found.reasons() == "main-b is unknown, main-c is unknown, main-d is unknown"


def test_second_primary_is_named() -> None:
    found = sort(b={"role": "primary"}, c={"lag": 9.0}, d={"lag": 9.0})

    assert "main-b" in found.reasons()


def test_shard_without_replicas_says_so() -> None:
    assert sort(of=topology(main="a")).reasons() == "it has none"


class TestChoose:
    fresh = sort().fresh

    def chosen(self, loads: dict[str, int], seed: int = 1) -> str:
        counted = {node: range(load) for node, load in loads.items()}
        return choose(self.fresh, counted, Random(seed)).node

    def test_only_one_is_taken(self) -> None:
        assert choose(self.fresh[:1], {"main-b": range(99)}, Random(1)).node == "main-b"

    def test_equal_loads_share_evenly(self) -> None:
        nodes = [self.chosen({}, seed) for seed in range(600)]

        assert all(150 < nodes.count(node.node) < 250 for node in self.fresh)

    def test_most_loaded_of_three_is_never_taken(self) -> None:
        """Of any two it is the worse one."""
        nodes = {self.chosen({"main-c": 1}, seed) for seed in range(200)}

        assert nodes == {"main-b", "main-d"}

    def test_less_loaded_of_two_is_taken(self) -> None:
        nodes = {
            choose(self.fresh[:2], {"main-b": range(2), "main-c": range(1)}, Random(seed)).node
            for seed in range(50)
        }

        assert nodes == {"main-c"}

    def test_same_randomness_is_the_same_choice(self) -> None:
        assert self.chosen({}, 7) == self.chosen({}, 7)


def test_token_is_described_as_a_position() -> None:
    assert describe_token(Position("main", 1, 1, 0x2000)) == "the session has seen 0/2000"


class TestRequired:
    """Monotonic reads: what the node of the last read has shown must be passed."""

    token = Position("main", 1, 1, 0x1000)

    def test_node_of_the_last_read_needs_no_proof(self) -> None:
        assert names(sort(nodes=("main-c",))) == "c"

    def test_another_node_needs_a_floor(self) -> None:
        found = sort(nodes=("main-c",), floor=Position("main", 0, 1, 0x2000), b={"lag": 1.0})

        assert names(found) == "cd"

    def test_several_nodes_need_a_floor_themselves(self) -> None:
        assert names(sort(nodes=("main-b", "main-c"))) == ""
        floor = Position("main", 0, 1, 0x2000)
        assert names(sort(nodes=("main-b", "main-c"), floor=floor)) == "bcd"

    def test_token_binds_the_node_of_the_last_read_too(self) -> None:
        found = sort(token=Position("main", 1, 1, 0x1001), nodes=("main-b",), b={"lag": 1.0})

        assert names(found) == ""


class TestFloor:
    """A position that covers what a node has shown, observed after it."""

    known = health(OF, {"main-b": {"lag": 1.0}})

    def test_is_the_nodes_own(self) -> None:
        assert floor_of("main", self.known, [("main-b", 0)], 100.0, frozenset()) == Position(
            "main", 0, 1, 0x1000
        )

    def test_observed_before_the_read_is_none(self) -> None:
        assert floor_of("main", self.known, [("main-b", 0)], 100.1, frozenset()) is None

    def test_of_a_node_that_just_failed_is_the_primarys(self) -> None:
        found = floor_of("main", self.known, [("main-b", 0)], 100.0, frozenset({"main-b"}))

        assert found == Position("main", 0, 1, 0x2000)

    def test_of_a_node_that_is_down_is_the_primarys(self) -> None:
        known = health(OF, {"main-b": {"lag": 1.0, "down": "timed out"}})

        assert floor_of("main", known, [("main-b", 0)], 100.0, frozenset()) == Position(
            "main", 0, 1, 0x2000
        )

    def test_of_a_node_that_has_started_over_is_the_primarys(self) -> None:
        """A standby that crashed comes back at an older position than it has shown."""
        found = floor_of("main", self.known, [("main-b", 7)], 100.0, frozenset())

        assert found == Position("main", 0, 1, 0x2000)

    def test_of_several_nodes_is_the_newest(self) -> None:
        found = floor_of("main", self.known, [("main-b", 0), ("main-c", 0)], 100.0, frozenset())

        assert found == Position("main", 0, 1, 0x2000)

    def test_of_a_primary_is_all_that_it_has_inserted(self) -> None:
        """An asynchronous commit is seen before it is flushed."""
        known = health(OF, {"main-a": {"received": 0x2100}})

        assert floor_of("main", known, [("main-a", 0)], 100.0, frozenset()) == Position(
            "main", 0, 1, 0x2100
        )

    def test_nobody_knows_without_both(self) -> None:
        known = health(OF, {"main-a": {"down": "timed out"}, "main-b": {"down": "timed out"}})

        assert floor_of("main", known, [("main-b", 0)], 100.0, frozenset()) is None


class TestPatience:
    def wait(self, *lags: float, policy: Policy = SESSION) -> float:
        facts = {letter: {"lag": lag} for letter, lag in zip("bcd", lags, strict=False)}
        found = sort(token=Position("main", 1, 1, 2**40), **facts)
        return patience(found.unproven, policy)

    def test_is_twice_the_measured_lag_of_the_nearest(self) -> None:
        assert self.wait(0.03, 0.02, 4.0) == pytest.approx(0.06)

    def test_has_an_end(self) -> None:
        assert self.wait(0.09, 0.09, 0.09) == pytest.approx(0.1)

    def test_is_none_for_what_is_far_behind(self) -> None:
        assert self.wait(0.2, 0.5, 4.0) == 0

    def test_is_the_policys_where_it_names_one(self) -> None:
        assert self.wait(3.0, 3.0, 3.0, policy=Policy(token_wait=2.0)) == 2.0


def test_replay_is_compared_within_a_timeline() -> None:
    (node, *_) = sort().fresh

    assert has_replayed(node, Position("main", 1, 1, node.lsn))
    assert not has_replayed(node, Position("main", 1, 1, node.lsn + 1))
    assert not has_replayed(node, Position("main", 1, 2, 0))
