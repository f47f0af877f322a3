"""Promises of ``sqlroute.health``: who is up, who is the primary, how old a replica is."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning import CASES

from sqlroute.errors import UnknownName
from sqlroute.health import (
    COUNT_EVERY,
    HISTORY_LENGTH,
    READ_RATE_HALF_LIFE,
    RECHECK,
    UNUSED_FACTOR,
    Health,
    Observation,
    Role,
    State,
    forget,
    next_count,
    observe,
    observed_latency,
    probe_pause,
    statement_failed,
)
from sqlroute.topology import Keyspace, Node, Shard, Topology

CLUSTER = 7001
OTHER_CLUSTER = 7002


def topology(**shards: str) -> Topology:
    """Make one keyspace: ``topology(s0="abc")`` has nodes a, b, c in shard s0."""
    made = tuple(
        Shard(shard, tuple(Node(name, host=name) for name in names))
        for shard, names in shards.items()
    )
    return Topology((Keyspace("shop", made),))


def seen(node: str, at: float, **facts: Any) -> Observation:
    values: dict[str, Any] = {
        "timeline": 1,
        "system_identifier": CLUSTER,
        "lsn": 1000,
        "rtt": 0.001,
        "version": 180006,
    }
    return Observation(node, at, **{**values, **facts})


def primary(node: str, at: float, **facts: Any) -> Observation:
    return seen(node, at, is_primary=True, accepts_writes=True, **facts)


def failed(node: str, at: float, error: str = "connection refused") -> Observation:
    return Observation.failed(node, at, error)


def after(health: Health, *observations: Observation) -> Health:
    """Observe in order, each at the moment it was sent."""
    for observation in observations:
        health = observe(health, observation, observation.at)
    return health


@pytest.fixture
def nothing() -> Health:
    return Health.initial(topology(s0="abc"))


@pytest.fixture
def healthy(nothing: Health) -> Health:
    """a is the primary, b and c are its replicas, all up at time 10."""
    return after(nothing, primary("a", 10), seen("b", 10), seen("c", 10))


def state(health: Health, node: str) -> State:
    return health.of(node).state


class TestStates:
    def test_nothing_is_usable_before_it_was_asked(self, nothing: Health) -> None:
        """A node nobody has asked is no primary and takes no reads."""
        assert nothing.primary("s0") is None
        assert nothing.replicas("s0") == ()
        assert not any(node.is_readable or node.has_outcome for node in nothing.nodes.values())

    def test_first_success_is_up(self, healthy: Health) -> None:
        """A start is not a recovery: one answer is enough."""
        assert [state(healthy, n) for n in "abc"] == [State.UP] * 3
        assert all(node.is_readable for node in healthy.nodes.values())

    def test_one_failed_probe_puts_in_doubt(self, healthy: Health) -> None:
        """One failure is not death, but reads go elsewhere."""
        health = after(healthy, failed("b", 11))

        assert state(health, "b") is State.SUSPECT
        assert not health.of("b").is_readable
        assert health.of("b").last_error == "connection refused"

    def test_doubt_ends_with_one_success(self, healthy: Health) -> None:
        """A lost packet costs one interval, not a gradual return."""
        health = after(healthy, failed("b", 11), seen("b", 12))

        assert state(health, "b") is State.UP
        assert health.of("b").failures == 0

    def test_two_failures_are_down(self, healthy: Health) -> None:
        """The second failure in a row settles it."""
        health = after(healthy, failed("b", 11), failed("b", 12))

        assert state(health, "b") is State.DOWN

    def test_return_is_gradual(self, healthy: Health) -> None:
        """A node that was down takes reads again after three answers in a row."""
        health = after(healthy, failed("b", 11), failed("b", 12))
        states = []
        for at in (13, 14, 15):
            health = after(health, seen("b", at))
            states.append((state(health, "b"), health.of("b").is_readable))

        assert states == [
            (State.RECOVERING, False),
            (State.RECOVERING, False),
            (State.UP, True),
        ]

    def test_failure_while_recovering_is_down_again(self, healthy: Health) -> None:
        """A flapping node does not get the benefit of the doubt."""
        health = after(healthy, failed("b", 11), failed("b", 12), seen("b", 13), failed("b", 14))

        assert state(health, "b") is State.DOWN

    def test_never_answering_node_is_down(self, nothing: Health) -> None:
        """A wrong address shows as down, with its error, after two probes."""
        health = after(nothing, failed("b", 1), failed("b", 2))

        assert state(health, "b") is State.DOWN
        assert health.of("b").has_outcome

    def test_statement_failure_counts_at_once(self, healthy: Health) -> None:
        """What a real statement met needs no second opinion."""
        health = statement_failed(healthy, "b", "server closed the connection", 11)

        assert state(health, "b") is State.DOWN
        assert health.of("b").last_error == "server closed the connection"

    def test_answer_from_before_a_failure_is_ignored(self, healthy: Health) -> None:
        """A probe sent before the crash and read after it does not revive the node."""
        health = statement_failed(healthy, "b", "gone", 11)
        health = observe(health, seen("b", 10.9), 11.1)

        assert state(health, "b") is State.DOWN

    def test_hang_is_remembered_until_an_answer(self, healthy: Health) -> None:
        """Readers must know that sockets of this node may wait for ever."""
        hanging = Observation.failed("b", 11, "no answer", hung=True)
        health = after(healthy, hanging)
        again = after(health, seen("b", 12))

        assert health.of("b").hung
        assert not again.of("b").hung

    def test_round_trip_time_is_a_moving_average(self, healthy: Health) -> None:
        """The first sample counts whole, later ones a fifth."""
        health = after(healthy, seen("b", 11, rtt=0.011))

        assert healthy.of("b").rtt == pytest.approx(0.001)
        assert health.of("b").rtt == pytest.approx(0.003)


class TestPrimary:
    def test_primary_is_what_says_so(self, healthy: Health) -> None:
        """Roles are observed, not configured."""
        chosen = healthy.primary("s0")

        assert chosen is healthy.of("a")
        assert [node.node for node in healthy.replicas("s0")] == ["b", "c"]
        assert healthy.shard("s0").contenders == ("a",)

    def test_promotion_moves_the_primary(self, healthy: Health) -> None:
        """The new primary on the higher timeline takes over at its first answer."""
        health = after(healthy, failed("a", 11), failed("a", 12), primary("b", 12, timeline=2))

        assert health.shard("s0").primary == "b"
        assert [node.node for node in health.replicas("s0")] == ["c"]

    def test_stale_primary_is_refused(self, healthy: Health) -> None:
        """The old primary that comes back takes neither writes nor reads, and is told why."""
        health = after(healthy, primary("b", 11, timeline=2), primary("a", 12))

        assert health.shard("s0").primary == "b"
        assert not health.of("a").is_readable
        assert "timeline 1" in health.of("a").refused
        assert "reached timeline 2" in health.of("a").refused
        assert health.shard("s0").contenders == ("b", "a")

    def test_stale_primary_is_refused_while_the_new_one_is_away(self, healthy: Health) -> None:
        """No primary is better than one whose writes will be lost."""
        health = after(healthy, primary("b", 11, timeline=2))
        health = statement_failed(health, "b", "gone", 12)
        health = after(health, primary("a", 13))

        assert health.primary("s0") is None

    def test_timeline_of_a_replica_proves_a_promotion(self, healthy: Health) -> None:
        """A replica that follows timeline 2 exposes the primary of timeline 1."""
        health = after(healthy, seen("c", 11, timeline=2))

        assert health.primary("s0") is None
        assert health.of("a").refused

    def test_stale_primary_that_rejoined_is_a_replica(self, healthy: Health) -> None:
        """A refusal ends as soon as its reason does."""
        health = after(healthy, primary("b", 11, timeline=2), primary("a", 12))
        health = after(health, seen("a", 13, timeline=2))

        assert health.of("a").refused == ""
        assert health.of("a").is_readable

    def test_higher_epoch_wins_on_one_timeline(self, healthy: Health) -> None:
        """Between two primaries of one timeline, the catalog's epoch decides."""
        health = after(healthy, primary("a", 11, epoch=4), primary("b", 11, epoch=5))

        assert health.shard("s0").primary == "b"
        assert health.shard("s0").contenders == ("b", "a")
        assert "beside b" in health.of("a").refused

    def test_equal_newcomer_does_not_take_over(self, healthy: Health) -> None:
        """Without any reason to prefer one, the primary stays where it is, and is reported."""
        health = after(healthy, primary("c", 11), primary("a", 12), primary("c", 13))

        assert health.shard("s0").primary == "a"
        assert health.shard("s0").contenders == ("a", "c")
        assert not health.of("c").is_readable

    def test_equal_newcomer_does_not_take_over_by_its_place(self, healthy: Health) -> None:
        """The order of the configuration decides nothing while there is a primary."""
        health = after(healthy, primary("b", 11, timeline=2), primary("a", 12, timeline=2))

        assert health.shard("s0").contenders == ("b", "a")

    def test_primary_in_doubt_stays_primary(self, healthy: Health) -> None:
        """One lost probe must not stop writes: there is no other place for them."""
        health = after(healthy, failed("a", 11))

        assert health.shard("s0").primary == "a"

    def test_dead_primary_is_none(self, healthy: Health) -> None:
        """Two failed probes, and there is no primary."""
        health = after(healthy, failed("a", 11), failed("a", 12))

        assert health.primary("s0") is None
        assert health.shard("s0").contenders == ()

    def test_primary_failed_by_statement_returns_when_seen(self, healthy: Health) -> None:
        """It stops being primary at once, and is again with the first probe sent after that."""
        gone = statement_failed(healthy, "a", "terminated", 11)
        back = after(gone, primary("a", 11.1))

        assert gone.primary("s0") is None
        assert back.shard("s0").primary == "a"

    def test_health_of_primary_is_never_old(self, healthy: Health) -> None:
        """What ``primary()`` and ``replicas()`` give is what ``of()`` gives."""
        health = after(healthy, primary("a", 11, lsn=5000), seen("b", 11.5, lsn=2000))

        assert health.primary("s0") is health.of("a")
        assert health.replicas("s0") == (health.of("b"), health.of("c"))


class TestCluster:
    def test_node_of_another_cluster_is_refused(self, healthy: Health) -> None:
        """A wrong address is named with both identifiers."""
        health = after(healthy, seen("c", 11, system_identifier=OTHER_CLUSTER))

        assert not health.of("c").is_readable
        assert str(CLUSTER) in health.of("c").refused
        assert str(OTHER_CLUSTER) in health.of("c").refused

    def test_majority_names_the_cluster(self, nothing: Health) -> None:
        """That the wrong node answered first does not make it right."""
        health = after(
            nothing,
            primary("c", 1, system_identifier=OTHER_CLUSTER, timeline=9, epoch=99),
            primary("a", 2),
            seen("b", 3),
        )

        assert health.shard("s0").system_identifier == CLUSTER
        assert health.shard("s0").primary == "a"
        assert health.of("c").refused
        assert not health.of("a").refused
        assert health.shard("s0").highest == (0, 1)

    def test_of_two_the_one_with_a_primary(self) -> None:
        """With one vote each, the cluster one can write to."""
        health = Health.initial(topology(s0="ab"))
        health = after(health, seen("b", 1, system_identifier=OTHER_CLUSTER), primary("a", 2))

        assert health.shard("s0").primary == "a"
        assert health.of("b").refused

    def test_settled_cluster_is_not_outvoted(self, healthy: Health) -> None:
        """A wrong DNS answer for two nodes of three stops the shard, it does not exchange it."""
        health = after(
            healthy,
            primary("a", 11, system_identifier=OTHER_CLUSTER),
            seen("b", 11, system_identifier=OTHER_CLUSTER),
        )

        assert health.shard("s0").system_identifier == CLUSTER
        assert health.primary("s0") is None

    def test_unknown_identifier_is_accepted(self, healthy: Health) -> None:
        """A role that may not read the control file can still watch."""
        health = after(healthy, seen("c", 11, system_identifier=0))

        assert health.of("c").is_readable

    def test_forget_lets_a_rebuilt_shard_in(self, healthy: Health) -> None:
        """After an operator rebuilt the shard, its new cluster and low timeline are taken."""
        health = after(healthy, primary("a", 11, timeline=7))
        health = after(forget(health, "s0"), primary("a", 12, system_identifier=OTHER_CLUSTER))

        assert health.shard("s0").primary == "a"
        assert health.shard("s0").highest_timeline == 1
        assert state(health, "b") is State.UNKNOWN


class TestLag:
    def test_no_bytes_behind_is_no_lag(self, healthy: Health) -> None:
        """On a primary idle for an hour, a replica with all its log is fresh."""
        health = after(healthy, seen("b", 11, replay_age=3600.0))

        assert health.of("b").lag_bytes == 0
        assert health.of("b").lag_seconds == 0

    def test_burst_after_idle_hour_is_not_an_hour(self, healthy: Health) -> None:
        """The replica had everything half a second ago; the age of the last commit misleads."""
        health = after(healthy, primary("a", 3600), primary("a", 3600.5, lsn=9000))
        health = observe(health, seen("b", 3600.6, lsn=1500, replay_age=3599.0), 3600.7)

        assert health.of("b").lag_bytes == 7500
        assert health.of("b").lag_seconds == pytest.approx(0.7)

    def test_age_is_used_where_it_is_finer(self, healthy: Health) -> None:
        """Under steady writes the time stamps are finer than the probes."""
        health = after(healthy, primary("a", 20, lsn=9000))
        health = observe(health, seen("b", 20.5, lsn=8000, replay_age=0.02), 20.5)

        assert health.of("b").lag_seconds == pytest.approx(0.02)

    def test_news_of_the_primary_makes_replicas_older(self, healthy: Health) -> None:
        """The lag follows when the primary moves on and the replica was not asked again."""
        health = after(healthy, primary("a", 11), primary("a", 12, lsn=4000))

        assert health.of("b").lag_bytes == 3000
        assert health.of("b").lag_seconds == pytest.approx(1)
        assert health.replicas("s0")[0].lag_bytes == 3000

    def test_lag_is_unknown_without_a_primary(self, nothing: Health) -> None:
        """Bytes need a primary; the age alone is still a bound in seconds."""
        health = after(nothing, seen("b", 1, replay_age=2.0), seen("c", 1))

        assert (health.of("b").lag_bytes, health.of("b").lag_seconds) == (None, 2.0)
        assert (health.of("c").lag_bytes, health.of("c").lag_seconds) == (None, None)

    def test_lag_stays_known_when_the_primary_dies(self, healthy: Health) -> None:
        """A replica that has all the dead primary was seen to have is fresh."""
        health = after(healthy, failed("a", 11), failed("a", 12), seen("b", 13))

        assert health.of("b").lag_seconds == 0

    def test_replica_on_an_older_timeline_has_no_lag(self, healthy: Health) -> None:
        """It may have replayed what the promotion left behind: positions do not compare."""
        health = after(healthy, primary("b", 11, timeline=2, lsn=1100), seen("c", 12, lsn=1200))

        assert (health.of("c").lag_bytes, health.of("c").lag_seconds) == (None, None)

    def test_lost_positions_leave_the_history(self, healthy: Health) -> None:
        """The old primary had written more than the new one got: that is no lag."""
        health = after(healthy, primary("a", 11, lsn=9000), primary("b", 12, timeline=2, lsn=5000))
        health = after(health, seen("c", 13, timeline=2, lsn=5000))

        assert health.shard("s0").history == ((10, 1000), (12, 5000))
        assert health.of("c").lag_bytes == 0

    def test_primary_has_no_lag(self, healthy: Health) -> None:
        """Lag is a word for replicas."""
        assert healthy.of("a").lag_bytes is None

    def test_idle_primary_keeps_one_entry(self, healthy: Health) -> None:
        """Only the newest moment of a position says anything."""
        health = after(healthy, *(primary("a", 11 + i) for i in range(50)))

        assert health.shard("s0").history == ((60, 1000),)

    def test_age_grows_until_the_next_look(self, nothing: Health) -> None:
        """What was 2 s old when the replica was asked is 5 s old 3 s later."""
        health = after(nothing, seen("b", 1, replay_age=2.0))
        health = observe(health, seen("c", 4), 4)

        assert health.of("b").lag_seconds == 5

    def test_history_reaches_far_back(self, healthy: Health) -> None:
        """A replica ten times the length of the history behind still has a lag, if a coarse one."""
        last = 10 * HISTORY_LENGTH
        health = after(healthy, *(primary("a", 10 + i, lsn=1000 + i) for i in range(1, last)))
        health = observe(health, seen("b", 10 + last, lsn=1020), 10 + last)

        lag = health.of("b").lag_seconds
        assert lag is not None
        assert last - 20 <= lag <= last

    @given(
        st.lists(
            st.tuples(st.floats(0.01, 5), st.integers(0, 1000)),
            min_size=1,
            max_size=3 * HISTORY_LENGTH,
        ),
        st.floats(0, 1),
    )
    def test_lag_is_never_shorter_than_the_truth(
        self, steps: list[tuple[float, int]], share: float
    ) -> None:
        """However long the history was and however it was thinned, lag errs on the old side."""
        health = Health.initial(topology(s0="ab"))
        now, lsn, truth = 0.0, 1000, []
        for pause, written in steps:
            now, lsn = now + pause, lsn + written
            truth.append((now, lsn))
            health = observe(health, primary("a", now, lsn=lsn), now)
        replayed = 1000 + round(share * (lsn - 1000))
        health = observe(health, seen("b", now, lsn=replayed), now)

        history = health.shard("s0").history
        assert len(history) <= HISTORY_LENGTH
        assert list(history) == sorted(history)
        lag = health.of("b").lag_seconds
        held = [at for at, position in truth if position <= replayed]
        if lag is not None:
            assert held or lag == 0
            assert lag == 0 or lag >= now - held[-1] - 1e-9
        if lag == 0:
            assert replayed >= lsn or held[-1] == now


class TestEpoch:
    def test_epoch_is_confirmed_for_a_lease(self, healthy: Health) -> None:
        """A map may be used for the lease after the probe that showed its epoch was sent."""
        health = after(healthy, primary("a", 11, epoch=3))

        assert health.confirmed("s0", 3, now=16, lease=5)
        assert not health.confirmed("s0", 3, now=16.1, lease=5)
        assert not health.confirmed("s0", 2, now=11, lease=5)

    def test_higher_epoch_ends_the_lease_at_once(self, healthy: Health) -> None:
        """One node with a newer map is enough, even if others still show the old one."""
        health = after(healthy, primary("a", 11, epoch=4), seen("b", 11, epoch=3))

        assert health.highest_epoch("s0") == 4
        assert not health.confirmed("s0", 3, now=11, lease=5)
        assert health.confirmed("s0", 4, now=11, lease=5)

    def test_new_epoch_does_not_inherit_a_lease(self, healthy: Health) -> None:
        """An epoch only a refused node showed ends the lease of the old one and has none itself."""
        health = after(healthy, primary("b", 11, timeline=2, epoch=3), primary("a", 12, epoch=4))

        assert health.of("a").refused
        assert not health.confirmed("s0", 3, now=12, lease=5)
        assert not health.confirmed("s0", 4, now=12, lease=5)

    def test_epoch_of_another_cluster_is_not_ours(self, healthy: Health) -> None:
        """A wrong address neither raises the epoch nor ends a lease."""
        health = after(healthy, primary("a", 11, epoch=3))
        health = after(health, primary("b", 12, epoch=4, system_identifier=OTHER_CLUSTER))

        assert health.highest_epoch("s0") == 3
        assert health.confirmed("s0", 3, now=12, lease=5)

    def test_replica_confirms_when_the_primary_is_away(self, healthy: Health) -> None:
        """A dead primary does not take the shard map with it."""
        health = after(healthy, primary("a", 11, epoch=3))
        health = after(health, failed("a", 12), failed("a", 13), seen("b", 20, epoch=3))

        assert health.confirmed("s0", 3, now=21, lease=5)

    def test_word_of_a_lagging_replica_is_as_old_as_its_lag(self, healthy: Health) -> None:
        """It shows the epoch of the moment it has replayed up to."""
        health = after(healthy, primary("a", 11, epoch=3), primary("a", 12, lsn=9000, epoch=3))
        health = after(health, failed("a", 30), failed("a", 31), seen("b", 32, epoch=3, lsn=2000))

        assert health.of("b").lag_seconds == 21
        assert not health.confirmed("s0", 3, now=32, lease=5)

    def test_without_a_catalog_nothing_is_confirmed(self, healthy: Health) -> None:
        """No catalog, no epoch."""
        assert healthy.highest_epoch("s0") is None
        assert not healthy.confirmed("s0", 0, now=10, lease=5)

    def test_highest_epoch_never_falls(self, healthy: Health) -> None:
        """A catalog that is dropped, or copied from an old backup, does not lower it."""
        health = after(healthy, primary("a", 11, epoch=4), primary("a", 12))
        health = after(health, primary("a", 13, epoch=2))

        assert health.highest_epoch("s0") == 4


class TestValues:
    def test_observing_leaves_the_old_value_alone(self, healthy: Health) -> None:
        """Readers may keep a health as long as they like."""
        before = dict(healthy.nodes), dict(healthy.shards)
        after(healthy, primary("b", 11, timeline=2), failed("a", 12))

        assert (dict(healthy.nodes), dict(healthy.shards)) == before

    def test_health_cannot_be_changed(self, healthy: Health) -> None:
        """Neither the value nor its mappings."""
        with pytest.raises(FrozenInstanceError):
            healthy.nodes = {}  # type: ignore[misc, assignment]
        with pytest.raises(TypeError):
            healthy.nodes["a"] = healthy.of("b")  # type: ignore[index]

    def test_shards_do_not_touch_each_other(self) -> None:
        """What happens to a shard leaves the values of the others as they are."""
        health = Health.initial(topology(s0="ab", s1="cd"))
        health = after(health, primary("a", 1), primary("c", 1, system_identifier=OTHER_CLUSTER))
        later = after(health, failed("a", 2), failed("a", 3))

        assert later.shard("s1") is health.shard("s1")
        assert later.shard("s1").primary == "c"

    def test_observation_of_a_removed_node_is_dropped(self, healthy: Health) -> None:
        """A probe may come back after its node has left."""
        assert observe(healthy, seen("z", 11), 11) is healthy

    def test_unknown_names_are_errors(self, healthy: Health) -> None:
        """Never silently nothing."""
        with pytest.raises(UnknownName, match="unknown node 'z'; known: a, b, c"):
            healthy.of("z")
        with pytest.raises(UnknownName, match="unknown shard 's9'; known: s0"):
            healthy.primary("s9")
        with pytest.raises(UnknownName):
            statement_failed(healthy, "z", "gone", 11)

    def test_topology_change_keeps_what_is_known(self, healthy: Health) -> None:
        """Nodes that stay keep their state; new ones are unknown; the removed are gone."""
        health = healthy.with_topology(topology(s0="abd", s1="e"))

        assert health.of("b") == healthy.of("b")
        assert state(health, "d") is State.UNKNOWN
        assert "c" not in health.nodes
        assert health.shard("s0").primary == "a"
        assert [node.node for node in health.members("s0")] == ["a", "b", "d"]
        assert [node.node for node in health.replicas("s0")] == ["b"]
        assert health.shard("s1").primary is None

    def test_removed_primary_is_no_primary(self, healthy: Health) -> None:
        """A primary that left the topology is not written to."""
        health = healthy.with_topology(topology(s0="bc"))

        assert health.primary("s0") is None

    def test_removed_node_leaves_its_timeline_behind(self, healthy: Health) -> None:
        """The old primary does not come back because the new one left the configuration."""
        health = after(healthy, primary("b", 11, timeline=2)).with_topology(topology(s0="ac"))
        health = after(health, primary("a", 12))

        assert health.shard("s0").highest_timeline == 2
        assert health.primary("s0") is None

    def test_node_with_another_address_is_unknown(self, healthy: Health) -> None:
        """A name says nothing about the server behind a new address."""
        moved = topology(s0="abc")
        nodes = tuple(
            replace(node, host="elsewhere") if node.name == "b" else node for node in moved.nodes()
        )
        health = healthy.with_topology(Topology((Keyspace("shop", (Shard("s0", nodes),)),)))

        assert state(health, "b") is State.UNKNOWN
        assert state(health, "a") is State.UP

    def test_replaced_shard_is_a_new_one(self, healthy: Health) -> None:
        """No node left: another cluster under the old name is welcome."""
        health = healthy.with_topology(topology(s0="xy"))
        health = after(health, primary("x", 11, system_identifier=OTHER_CLUSTER))

        assert health.shard("s0").primary == "x"

    def test_roles_are_known_by_value(self, healthy: Health) -> None:
        """Roles and states print as words in logs."""
        assert healthy.of("a").role is Role.PRIMARY
        assert (Role.REPLICA.value, State.RECOVERING.value) == ("replica", "recovering")


def cases() -> Iterator[Any]:
    for path in sorted((CASES / "health").glob("*.toml")):
        for case in tomllib.loads(path.read_text())["case"]:
            yield pytest.param(case, id=f"{path.stem}: {case['name']}")


@pytest.mark.parametrize("case", list(cases()))
def test_case(case: dict[str, Any]) -> None:
    """After each step of a case the nodes are in the states that it names."""
    names = sorted({name for step in case["steps"] for name in step["probes"]})
    health, at = Health.initial(topology(s0="".join(names))), 10.0
    for number, step in enumerate(case["steps"]):
        assert set(step) <= {"probes", "reads", "times", "states", "share", "slow"}
        for _ in range(step.get("times", 1)):
            health, at = _stepped(health, step, at), at + 0.5

        states = {node: health.of(node).state.value for node in step.get("states", {})}
        assert states == step.get("states", {}), f"step {number}"
        for node, share in step.get("share", {}).items():
            assert health.of(node).share == pytest.approx(share), f"step {number}"
        slow = [node for node in health.nodes.values() if node.state is State.SLOW]
        assert len(slow) == step.get("slow", len(slow)), f"step {number}"


def _stepped(health: Health, step: dict[str, Any], at: float) -> Health:
    for node, found in step["probes"].items():
        reads, time = step.get("reads", {}).get(node, (0, 0))
        answered = {"statements": reads, "statement_seconds": reads * time / 1000}
        if found == "gone":
            health = statement_failed(health, node, "connection reset", at)
        elif isinstance(found, str):
            failure = Observation.failed(node, at, found, hung=found == "hung")
            health = observe(health, failure, at)
        else:
            kind = primary if node == "a" else seen
            health = observe(health, kind(node, at, rtt=found / 1000, **answered), at)
    return health


class TestMemory:
    def test_probe_of_one_shard_makes_no_other_forget(self) -> None:
        """Over a thousand shards one is probed all the time."""
        health = Health.initial(topology(s0="ab", s1="cd"))
        for shard in ("s0", "s1"):
            health.shard(shard).memory["derived"] = shard

        probed = after(health, primary("a", 11))

        assert probed.shard("s0").memory == {}
        assert probed.shard("s1").memory == {"derived": "s1"}

    def test_what_was_derived_is_no_part_of_the_value(self, healthy: Health) -> None:
        again = after(healthy, primary("a", 10))
        again.shard("s0").memory["derived"] = 1

        assert again.shard("s0") == after(healthy, primary("a", 10)).shard("s0")

    def test_another_topology_forgets(self, healthy: Health) -> None:
        """The weight of a node is the topology's."""
        healthy.shard("s0").memory["derived"] = 1

        assert healthy.with_topology(healthy.topology).shard("s0").memory == {}


class TestSlow:
    def slow(self, healthy: Health) -> Health:
        """c answers in 400 ms since time 11."""
        for number in range(4):
            healthy = after(healthy, seen("b", 11 + number), seen("c", 11 + number, rtt=0.4))
        return healthy

    def test_slow_node_says_why(self, healthy: Health) -> None:
        health = self.slow(healthy)

        assert not health.of("c").is_readable
        assert health.of("c").last_error == "a probe takes 196 ms, 3 ms is usual"

    def test_time_away_has_an_end(self, healthy: Health) -> None:
        """However long it is slow, it is looked at again within minutes."""
        for number in range(2000):
            at = 11 + number
            healthy = after(healthy, seen("b", at), seen("c", at, rtt=0.4))
        node = healthy.of("c")

        assert node.slow_for <= 300
        assert node.slow_until - node.seen_at <= 300

    def test_promoted_node_is_not_slow(self, healthy: Health) -> None:
        """There is no other to write to."""
        health = after(self.slow(healthy), primary("c", 15, timeline=2))

        assert state(health, "c") is State.UP
        assert health.primary("s0") == health.of("c")

    def test_reads_are_measured_anew_after_the_return(self, healthy: Health) -> None:
        """They would make the others look fast, and those for which it went are long ago."""
        health = self.slow(observed_latency(healthy, "c", 50, 20.0, 11))
        for at in range(15, 30):
            health = after(health, seen("b", at), seen("c", at))

        assert state(health, "c") is State.UP
        assert health.of("c").latency == 0.0

    def test_latency_is_a_moving_average_of_batches(self, healthy: Health) -> None:
        health = observed_latency(healthy, "b", 10, 0.1, 11)
        health = observed_latency(health, "b", 10, 0.2, 12)

        assert health.of("b").latency == pytest.approx(0.8 * 0.01 + 0.2 * 0.02)

    def test_few_statements_count_for_less(self, healthy: Health) -> None:
        health = observed_latency(healthy, "b", 10, 0.1, 11)
        health = observed_latency(health, "b", 1, 1.01, 12)

        assert health.of("b").latency == pytest.approx(0.01 + 0.04 * 1.0)

    def test_no_statements_say_nothing(self, healthy: Health) -> None:
        health = observed_latency(healthy, "b", 0, 0.0, 11)

        assert health.of("b").latency == 0.0


class TestReadRate:
    def read(self, health: Health, begin: int, end: int, **reads: int) -> Health:
        for at in range(begin, end):
            for node, count in reads.items():
                seen_now = seen(node, at, statements=count, statement_seconds=0.01)
                health = observe(health, seen_now, at)
        return health

    def test_is_that_of_all_replicas(self, healthy: Health) -> None:
        health = self.read(healthy, 11, 50, b=100, c=300)

        assert health.shard("s0").read_rate == pytest.approx(400, rel=0.01)

    def test_stays_when_replicas_die(self, healthy: Health) -> None:
        """What the primary may take of them is told by it."""
        health = self.read(healthy, 11, 50, b=100, c=300)
        health = after(health, failed("b", 50), failed("b", 51), failed("c", 52), failed("c", 53))

        assert health.shard("s0").read_rate == pytest.approx(400, rel=0.01)

    def test_counts_nobodys_reads_twice(self, healthy: Health) -> None:
        """One replica takes what another one took."""
        health = self.read(healthy, 11, 50, b=200, c=200)
        health = after(health, failed("b", 50), failed("b", 51))
        health = self.read(health, 51, 100, c=400)

        assert health.shard("s0").read_rate == pytest.approx(400, rel=0.01)

    def test_is_forgotten_slowly(self, healthy: Health) -> None:
        health = self.read(healthy, 11, 50, b=100, c=300)
        health = self.read(health, 50, 49 + int(READ_RATE_HALF_LIFE), b=0, c=0)

        assert health.shard("s0").read_rate == pytest.approx(200, rel=0.01)


class TestProbePause:
    def pause(self, node: Any, **options: Any) -> float:
        return probe_pause(node, **{"interval": 0.5, "rate": 100.0, **options})

    def watched(self, healthy: Health, monitors: int) -> Health:
        return after(healthy, seen("b", 11, monitors=monitors))

    def test_is_the_interval_for_few_monitors(self, healthy: Health) -> None:
        assert self.pause(None) == 0.5
        assert self.pause(healthy.of("b")) == 0.5
        assert self.pause(self.watched(healthy, 40).of("b")) == 0.5

    @pytest.mark.parametrize("monitors", [50, 100, 500, 5000])
    def test_all_together_are_under_the_rate(self, healthy: Health, monitors: int) -> None:
        pause = self.pause(self.watched(healthy, monitors).of("b"))

        assert monitors / pause == pytest.approx(80.0)

    def test_number_of_monitors_is_remembered(self, healthy: Health) -> None:
        """Not every probe counts them, and a node that fails counts nothing."""
        health = after(self.watched(healthy, 500), seen("b", 12), failed("b", 13), failed("b", 14))

        assert self.pause(health.of("b")) == pytest.approx(6.25)

    def test_node_in_doubt_is_asked_again_soon(self, healthy: Health) -> None:
        health = after(healthy, failed("b", 11))

        assert self.pause(health.of("b")) == 0.5 * RECHECK

    def test_nodes_of_unused_shards_are_asked_seldom(self, healthy: Health) -> None:
        assert self.pause(healthy.of("b"), is_used=False) == 0.5 * UNUSED_FACTOR

    def test_monitors_are_counted_now_and_then(self) -> None:
        assert next_count(100, 105) == COUNT_EVERY

    def test_monitors_are_counted_while_they_come_and_go(self) -> None:
        assert next_count(0, 1) == next_count(100, 150) == next_count(100, 20) == 1
