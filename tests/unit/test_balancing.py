"""Which replicas may take a read, why not the others, and which one is chosen."""

from __future__ import annotations

import itertools
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
from planning import CASES, health, topology

from sqlroute import errors
from sqlroute.config import load
from sqlroute.errors import ConfigError, NoEligibleNode
from sqlroute.health import Health, NodeHealth, Role, ShardHealth, State
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.balancing import (
    Allowance,
    Candidates,
    Pool,
    Required,
    admit,
    candidates,
    choose,
    describe_token,
    fallback_rate,
    floor_of,
    has_replayed,
    patience,
    replica_subset,
)
from sqlroute.routing.policy import Balancing, Consistency, Policy, PoolLimits, pool_limits
from sqlroute.routing.statement import Kind
from sqlroute.routing.target import Situation, target_of
from sqlroute.routing.token import Position, parse_lsn
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
        return choose(Pool(self.fresh), SESSION, counted, Random(seed)).node

    def test_only_one_is_taken(self) -> None:
        only = Pool(self.fresh[:1])

        assert choose(only, SESSION, {"main-b": range(99)}, Random(1)).node == "main-b"

    def test_equal_loads_share_evenly(self) -> None:
        nodes = [self.chosen({}, seed) for seed in range(600)]

        assert all(150 < nodes.count(node.node) < 250 for node in self.fresh)

    def test_most_loaded_of_three_is_never_taken(self) -> None:
        """Of any two it is the worse one."""
        nodes = {self.chosen({"main-c": 1}, seed) for seed in range(200)}

        assert nodes == {"main-b", "main-d"}

    def test_less_loaded_of_two_is_taken(self) -> None:
        two, loads = Pool(self.fresh[:2]), {"main-b": range(2), "main-c": range(1)}

        nodes = {choose(two, SESSION, loads, Random(seed)).node for seed in range(50)}

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


KNOWN = {
    "name", "policy", "nodes", "primary", "exclude", "may_repeat", "admit", "seen", "draws",
    "tolerance", "expected", "refused",
}  # fmt: skip


def cases() -> Iterator[Any]:
    for path in sorted((CASES / "choosing").glob("*.toml")):
        for case in tomllib.loads(path.read_text())["case"]:
            yield pytest.param(case, id=f"{path.stem}: {case['name']}")


@pytest.mark.parametrize("case", list(cases()))
def test_case(case: dict[str, Any]) -> None:
    """Over many seeded draws each node is chosen as often as its case says, within a tolerance."""
    assert set(case) <= KNOWN, f"unknown: {set(case) - KNOWN}"
    around, rng = _situation(case), Random(1)
    if "refused" in case:
        with pytest.raises(getattr(errors, case["refused"])):
            target_of("s", Kind.READ, around, rng)
        return
    draws, tolerance = case.get("draws", 4000), case.get("tolerance", 0.03)

    found = Counter(target_of("s", Kind.READ, around, rng).node for _ in range(draws))

    assert set(found) == set(case["expected"])
    for node, share in case["expected"].items():
        assert found[node] / draws == pytest.approx(share, abs=tolerance + 1e-5)


def _situation(case: dict[str, Any]) -> Situation:
    rules = dict(case.get("policy", {}))
    if "balancing" in rules:
        rules["balancing"] = Balancing(rules["balancing"])
    nodes, known = [Node("a")], [_known("a", Role.PRIMARY, {"state": case.get("primary", "up")})]
    for name, facts in case["nodes"].items():
        nodes.append(Node(name, zone=facts.get("zone", ""), weight=facts.get("weight", 1.0)))
        known.append(_known(name, Role.REPLICA, facts))
    of = Topology((Keyspace("shop", (Shard("s", tuple(nodes)),)),))
    affinity = Affinity()
    if "seen" in case:
        affinity = affinity.seen(Position("s", 1, 1, parse_lsn(case["seen"])))
    return Situation(
        of,
        Policy(**rules),
        _health(of, known),
        {},
        affinity,
        {name: range(facts.get("load", 0)) for name, facts in case["nodes"].items()},
        exclude=frozenset(case.get("exclude", ())),
        turns={"s": itertools.count()},
        admit=(lambda shard, rate: case["admit"]) if "admit" in case else None,
        may_repeat=case.get("may_repeat", False),
    )


def _known(name: str, role: Role, facts: dict[str, Any]) -> NodeHealth:
    return NodeHealth(
        name,
        "s",
        State(facts.get("state", "up")),
        role,
        timeline=1,
        lsn=0x1000,
        lag_seconds=facts.get("lag", 0.0),
        rtt=facts.get("rtt", 1.0) / 1000,
        share=facts.get("share", 1.0),
    )


def _health(of: Topology, known: list[NodeHealth], **facts: Any) -> Health:
    primary, *replicas = known
    there = primary if primary.state is State.UP else None
    shard = ShardHealth(
        "s",
        tuple(node.node for node in known),
        primary=there and there.node,
        primary_health=there,
        replicas=tuple(replicas),
        highest_timeline=1,
        **facts,
    )
    nodes = {node.node: node for node in known}
    return Health(of, MappingProxyType(nodes), MappingProxyType({"s": shard}))


def test_refusal_beyond_the_share_names_it_and_each_node() -> None:
    case = {"admit": False, "nodes": {"b": {"state": "down"}, "c": {"lag": 9.0}}}

    with pytest.raises(NoEligibleNode) as caught:
        target_of("s", Kind.READ, _situation(case), Random(1))

    for words in ("no more than 1000 reads/s", "primary_fallback_share 0.5", "b is down", "c is 9"):
        assert words in str(caught.value)


def test_round_robin_is_in_order() -> None:
    case = {"policy": {"balancing": "round_robin"}, "nodes": {"b": {}, "c": {}, "d": {}}}
    around = _situation(case)

    nodes = [target_of("s", Kind.READ, around, Random(1)).node for _ in range(6)]

    assert nodes == ["b", "c", "d", "b", "c", "d"]


def test_round_robin_interleaves_weights() -> None:
    """No node is asked for long runs: of weights 2 and 1 at most four times in a row, and once."""
    nodes = {"b": {"weight": 2}, "c": {"weight": 1}}
    around = _situation({"policy": {"balancing": "round_robin"}, "nodes": nodes})

    found = "".join(target_of("s", Kind.READ, around, Random(1)).node for _ in range(300))

    assert "bbbbb" not in found
    assert "cc" not in found


class TestSubset:
    """Each process reads from a few replicas of a shard."""

    nodes = tuple(NodeHealth(f"n{i}", "s") for i in range(10))

    def of(self, process: int, nodes: tuple[NodeHealth, ...] | None = None) -> set[str]:
        chosen = replica_subset(f"host-{process}", nodes or self.nodes, 3)
        assert len(chosen) == 3
        return {node.node for node in chosen}

    def test_is_the_same_each_time(self) -> None:
        assert self.of(7) == self.of(7, tuple(reversed(self.nodes)))

    def test_processes_are_spread_evenly(self) -> None:
        found = Counter(name for process in range(1000) for name in self.of(process))

        assert min(found.values()) > 250
        assert max(found.values()) < 350

    def test_only_who_used_a_node_that_left_moves(self) -> None:
        left = self.nodes[1:]
        for process in range(200):
            before, after = self.of(process), self.of(process, left)

            assert len(before - after) == ("n0" in before)

    def test_all_is_the_default(self) -> None:
        assert replica_subset("host-1", self.nodes, 0) == self.nodes
        assert replica_subset("", self.nodes, 3) == self.nodes

    def test_narrows_the_choice_of_a_process(self) -> None:
        nodes: dict[str, Any] = {name: {} for name in "bcde"}
        around = _situation({"policy": {"replicas_per_process": 2}, "nodes": nodes})
        around.process = "host-1"

        found = {target_of("s", Kind.READ, around, Random(seed)).node for seed in range(50)}

        assert len(found) == 2


class TestAdmit:
    """The primary takes so many reads per second in place of the replicas."""

    def taken(self, rate: float, asked: float, seconds: float = 10.0) -> int:
        state, taken = None, 0
        for number in range(round(asked * seconds)):
            state, found = admit(state, number / asked, rate)
            taken += found
        return taken

    @pytest.mark.parametrize("rate", [0.5, 10.0, 1000.0])
    def test_no_more_than_the_rate(self, rate: float) -> None:
        assert rate * 10 * 0.95 <= self.taken(rate, 5 * rate + 10) <= rate * 10 * 1.05 + 1

    def test_all_below_the_rate(self) -> None:
        assert self.taken(100.0, 90.0) == 900

    def test_nothing_without_a_rate_but_the_first(self) -> None:
        assert self.taken(0.0, 100.0) == 1

    def test_what_was_not_used_is_not_kept_for_long(self) -> None:
        """An hour of rest is no leave for an hour's reads at once."""
        state, taken = Allowance(0.0, 0.0), 0
        for _ in range(1000):
            state, found = admit(state, 3600.0, 100.0)
            taken += found

        assert taken == 25

    def test_a_clock_that_stands_still_gives_nothing(self) -> None:
        state, _ = admit(None, 5.0, 1.0)

        assert not admit(state, 5.0, 1.0)[1]
        assert not admit(state, 4.0, 1.0)[1]


def test_fallback_rate_is_a_share_of_the_former_reads_and_a_part_of_the_free_ones() -> None:
    of = Topology((Keyspace("shop", (Shard("s", (Node("a"), Node("b"))),)),))
    primary = replace(_known("a", Role.PRIMARY, {}), monitors=10)
    known = _health(of, [primary, _known("b", Role.REPLICA, {"state": "down"})], read_rate=400.0)

    assert fallback_rate("s", known, Policy()) == pytest.approx(0.5 * 400 + 1000 / 10)


class TestPoolLimits:
    policy = Policy(pool_size=5, max_overflow=10, connections_per_node=200)

    def test_without_a_budget_they_are_those_of_the_process(self) -> None:
        assert pool_limits(Policy(pool_size=5, max_overflow=10), 400) == PoolLimits(5, 15)
        assert pool_limits(Policy(pool_size=5, max_overflow=-1), 400) == PoolLimits(5, -1)

    @pytest.mark.parametrize("max_overflow", [-1, 0, 10, 1000])
    @pytest.mark.parametrize("processes", range(1, 101))
    def test_all_processes_are_within_the_budget(self, processes: int, max_overflow: int) -> None:
        """Their monitors included, and each may have one connection at least."""
        found = pool_limits(replace(self.policy, max_overflow=max_overflow), processes)

        assert processes + processes * found.most <= 200
        assert found.most >= 1
        assert found.kept <= found.most

    def test_budget_too_small_keeps_nothing_open(self) -> None:
        assert pool_limits(self.policy, 150) == PoolLimits(0, 1)

    def test_node_that_comes_back_gets_its_connections_gradually(self) -> None:
        limits = [pool_limits(Policy(), 1, share).most for share in (0.1, 0.5, 1.0)]

        assert limits == [1, 7, 15]


class TestConfig:
    """The options of choosing can be written in a file, and what nobody knows is a fault."""

    def policy(self, **options: Any) -> Policy:
        shards = [{"name": "s0", "nodes": ["postgresql://db/shop"]}]
        written = {"policy": options, "keyspaces": {"shop": {"shards": shards}}}
        return load(written, environ={}).policy

    def test_options_are_read(self) -> None:
        found = self.policy(
            balancing="round_robin",
            latency_window="20ms",
            zone="b",
            primary_fallback_share="0.25",
            primary_fallback_free=50,
            replicas_per_process=2,
            probe_rate=20,
            connections_per_node=500,
        )

        assert found == Policy(
            balancing=Balancing.ROUND_ROBIN,
            latency_window=0.02,
            zone="b",
            primary_fallback_share=0.25,
            primary_fallback_free=50.0,
            replicas_per_process=2,
            probe_rate=20.0,
            connections_per_node=500,
        )

    @pytest.mark.parametrize(
        ("option", "value", "text"),
        [
            ("balancing", "fastest", "must be one of 'p2c', 'weighted', 'round_robin'"),
            ("primary_fallback_share", 1.5, "must be a share, 0 to 1"),
            ("primary_fallback_share", "half", "must be a number, 0 or more"),
            ("primary_fallback_share", True, "must be a number, 0 or more"),
            ("primary_fallback_free", -1, "must be a number, 0 or more"),
            ("probe_rate", 0, "must be more than 0"),
            ("connections_per_node", -1, "must be at least 0"),
            ("replicas_per_process", 1.5, "must be a whole number"),
        ],
    )
    def test_faults(self, option: str, value: object, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            self.policy(**{option: value})

        assert text in caught.value.faults[0]
        assert caught.value.faults[0].startswith(f"policy.{option}: ")
