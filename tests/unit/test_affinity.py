"""What a session has seen and done, as values that never take back what they promised."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import permutations

import pytest

from sqlroute.errors import PlanError
from sqlroute.routing.affinity import Affinity, ShardAffinity, Token, format_lsn, parse_lsn


def token(lsn: int, timeline: int = 1, shard: str = "s0", epoch: int = 1) -> Token:
    return Token(shard, epoch, timeline, lsn)


def after(*tokens: Token) -> Token | None:
    affinity = Affinity()
    for one in tokens:
        affinity = affinity.committed(one)
    return affinity.of("s0").token


def test_new_session_has_no_ties() -> None:
    assert Affinity().of("s0") == ShardAffinity(replica=None, pinned=False, token=None)
    assert not Affinity().explicit


class TestTokens:
    def test_first_token_is_kept(self) -> None:
        assert after(token(5)) == token(5)

    @pytest.mark.parametrize("order", list(permutations([token(5), token(9), token(7)])))
    def test_token_never_moves_back(self, order: tuple[Token, ...]) -> None:
        """Threads and requests may report their commits in any order."""
        assert after(*order) == token(9)

    @pytest.mark.parametrize("order", list(permutations([token(900, 1), token(400, 2)])))
    def test_newer_timeline_is_newer_whatever_its_position(self, order: tuple[Token, ...]) -> None:
        """After a failover the log may go on from before the lost end of the old one."""
        assert after(*order) == token(400, 2)

    @pytest.mark.parametrize("order", list(permutations([token(100, 3), token(200, 0)])))
    def test_unknown_timeline_does_not_lose_the_position(self, order: tuple[Token, ...]) -> None:
        """A write acknowledged by a primary nobody has probed yet must be read back, too."""
        found = after(*order)

        assert found is not None
        assert (found.timeline, found.lsn) == (3, 200)

    def test_known_timeline_after_an_unknown_one_keeps_the_position(self) -> None:
        found = after(token(200, 0), token(150, 1))

        assert found is not None
        assert (found.timeline, found.lsn) == (1, 200)

    def test_older_token_changes_nothing(self) -> None:
        affinity = Affinity().committed(token(9))

        assert affinity.committed(token(5)) is affinity

    def test_tokens_of_shards_are_their_own(self) -> None:
        affinity = Affinity().committed(token(9)).committed(token(5, shard="s1"))

        assert affinity.of("s0").token == token(9)
        assert affinity.of("s1").token == token(5, shard="s1")

    def test_token_is_printed_as_postgresql_writes_positions(self) -> None:
        assert str(token(0x16B3748, timeline=3, epoch=7)) == "s0@7.3.0/16B3748"


class TestTransaction:
    def test_reads_stay_with_their_replica(self) -> None:
        affinity = Affinity().reading("s0", "s0-b")

        assert affinity.of("s0").replica == "s0-b"
        assert affinity.reading("s0", "s0-b") is affinity

    def test_pin_is_of_one_shard(self) -> None:
        affinity = Affinity().pinned("s0")

        assert affinity.of("s0").pinned
        assert not affinity.of("s1").pinned
        assert affinity.pinned("s0") is affinity

    def test_only_tokens_survive_its_end(self) -> None:
        affinity = Affinity().begun().pinned("s0").reading("s1", "s1-b").committed(token(9))

        ended = affinity.ended()

        assert ended.of("s0") == ShardAffinity(token=token(9))
        assert ended.of("s1") == ShardAffinity()
        assert not ended.explicit

    def test_begun_is_explicit(self) -> None:
        assert Affinity().begun().explicit

    def test_change_is_a_new_value(self) -> None:
        affinity = Affinity()

        affinity.pinned("s0").committed(token(9)).begun()

        assert affinity == Affinity()
        with pytest.raises(FrozenInstanceError):
            affinity.explicit = True  # type: ignore[misc]

    def test_ties_cannot_be_changed_in_place(self) -> None:
        affinity = Affinity().pinned("s0")

        with pytest.raises(TypeError):
            affinity.shards["s1"] = ShardAffinity()  # type: ignore[index]


class TestPositions:
    @pytest.mark.parametrize(
        ("lsn", "text"),
        [(0, "0/0"), (0x16B3748, "0/16B3748"), (2**32, "1/0"), (2**64 - 1, "FFFFFFFF/FFFFFFFF")],
    )
    def test_text_and_number_are_the_same(self, lsn: int, text: str) -> None:
        assert format_lsn(lsn) == text
        assert parse_lsn(text) == lsn

    def test_lower_case_is_read(self) -> None:
        assert parse_lsn("0/16b3748") == 0x16B3748

    @pytest.mark.parametrize(
        "text",
        ["", "0", "0/", "/0", "0/G", "0/0/0", " 0/0", "0/0 ", "0/0\n", "123456789/0", "-1/0"],
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(PlanError, match="no WAL position"):
            parse_lsn(text)
