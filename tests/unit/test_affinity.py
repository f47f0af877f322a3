"""What a session has seen and done, as values that never take back what they promised."""

from __future__ import annotations

from itertools import permutations

import pytest

from sqlroute.routing.affinity import Affinity, ShardAffinity
from sqlroute.routing.token import Position, Token


def at(lsn: int, shard: str = "s0", epoch: int = 1) -> Position:
    return Position(shard, epoch, 1, lsn)


def only(*nodes: str) -> frozenset[tuple[str, int]]:
    return frozenset((node, 0) for node in nodes)


def test_new_session_has_no_ties() -> None:
    assert Affinity().of("s0") == ShardAffinity(nodes=frozenset(), pinned=None, token=None)
    assert not Affinity().explicit
    assert Affinity().token == Token()


class TestSeen:
    @pytest.mark.parametrize("order", list(permutations([at(5), at(9), at(7)])))
    def test_token_never_moves_back(self, order: tuple[Position, ...]) -> None:
        """Threads and requests may report their commits in any order."""
        affinity = Affinity()
        for position in order:
            affinity = affinity.seen(position)

        assert affinity.of("s0").token == at(9)

    def test_older_position_changes_nothing(self) -> None:
        affinity = Affinity().seen(at(9))

        assert affinity.seen(at(5)) is affinity

    def test_shards_are_their_own(self) -> None:
        affinity = Affinity().seen(at(9)).seen(at(5, "s1"))

        assert affinity.token == Token((at(9), at(5, "s1")))

    def test_epoch_is_the_highest_of_all(self) -> None:
        affinity = Affinity().seen(at(9, epoch=3)).seen(at(5, "s1", epoch=2))

        assert affinity.epoch == 3
        assert affinity.ended().epoch == 3

    def test_a_given_token_leaves_the_node(self) -> None:
        """What the node has shown may be newer still."""
        affinity = Affinity().reading("s0", "s0-b").seen(at(9))

        assert affinity.of("s0") == ShardAffinity(only("s0-b"), token=at(9))

    def test_a_commit_covers_all_reads_of_its_transaction(self) -> None:
        affinity = Affinity().pinned("s0", "s0-a").committed(at(9))

        assert affinity.of("s0") == ShardAffinity(pinned="s0-a", token=at(9))
        assert affinity.ended().of("s0") == ShardAffinity(token=at(9))


class TestTransaction:
    def test_reads_stay_with_their_node(self) -> None:
        affinity = Affinity().reading("s0", "s0-b")

        assert affinity.of("s0").nodes == only("s0-b")
        assert affinity.reading("s0", "s0-b") is affinity

    def test_an_unproved_read_adds_its_node(self) -> None:
        """What the others have shown is not forgotten: it may be newer."""
        affinity = Affinity().reading("s0", "s0-a").reading("s0", "s0-b", proved=False)

        assert affinity.of("s0").nodes == only("s0-a", "s0-b")
        assert affinity.reading("s0", "s0-c").of("s0").nodes == only("s0-c")
        assert Affinity().reading("s0", "s0-b", proved=False).of("s0").nodes == only("s0-b")

    def test_pin_is_of_one_shard(self) -> None:
        affinity = Affinity().pinned("s0", "s0-a")

        assert affinity.of("s0") == ShardAffinity(only("s0-a"), "s0-a")
        assert affinity.of("s1").pinned is None
        assert affinity.pinned("s0", "s0-a") is affinity

    def test_what_was_seen_survives_its_end(self) -> None:
        """After a rollback, too: nobody knows how new the primary's rows were."""
        affinity = Affinity().begun().pinned("s0", "s0-a").reading("s1", "s1-b").seen(at(9))

        ended = affinity.set_by_hand("s0").ended()

        assert ended.of("s0") == ShardAffinity(only("s0-a"), token=at(9))
        assert ended.of("s1") == ShardAffinity(only("s1-b"))
        assert (ended.explicit, ended.read_only, ended.setting) == (False, False, None)

    def test_begun_is_explicit(self) -> None:
        assert Affinity().begun().explicit
        assert not Affinity().begun().read_only
        assert Affinity().begun(read_only=True).read_only

    def test_change_is_a_new_value(self) -> None:
        affinity = Affinity()

        affinity.pinned("s0", "s0-a").committed(at(9)).begun().set_by_hand("s0")

        assert affinity == Affinity()
        with pytest.raises(AttributeError):
            affinity.explicit = True  # type: ignore[misc]

    def test_ties_cannot_be_changed_in_place(self) -> None:
        affinity = Affinity().pinned("s0", "s0-a")

        with pytest.raises(TypeError):
            affinity.shards["s1"] = ShardAffinity()  # type: ignore[index]
