"""What a session has seen, as a text that travels."""

from __future__ import annotations

from itertools import permutations

import pytest

from sqlroute.errors import InvalidToken, PlanError
from sqlroute.routing.token import Position, Token, format_lsn, newest, parse_lsn

ONE = Position("s0", 7, 3, 0x16B3748, 0x65F1C2D3E4B5A697)
OTHER = Position("s1", 7, 1, 0x1000)


class TestText:
    def test_position_is_printed_as_postgresql_writes_it(self) -> None:
        assert str(OTHER) == "s1@7.1.0/1000"
        assert str(ONE) == "s0@7.3.0/16B3748.65f1c2d3e4b5a697"

    @pytest.mark.parametrize(
        "token",
        [
            Token(),
            Token((ONE,)),
            Token((ONE, OTHER)),
            Token((Position("köln.west", 0, 0, 0),)),
            Token((Position("a", 2**63 - 1, 2**32 - 1, 2**64 - 1, 2**64 - 1),)),
        ],
    )
    def test_text_is_the_whole_token(self, token: Token) -> None:
        assert Token.parse(str(token)) == token

    def test_text_is_fit_for_headers_and_cookies(self) -> None:
        text = str(Token((ONE, Position("köln", 0, 1, 5))))

        assert text.isascii()
        assert not set(text) & set(' ",;\\')

    @pytest.mark.parametrize(
        "text",
        [
            "s0",
            "s0@7.3",
            "s0@7.3.16B3748",
            "s0@7.3.0/16B3748.",
            "s0@7.3.0/16B3748.XYZ",
            "s0@-7.3.0/1",
            "s0@7.3.0/1+",
            "+s0@7.3.0/1",
            " s0@7.3.0/1",
            "s0@7.3.0/1\n",
            "@7.3.0/1",
            "s0@٧.3.0/1",
            "s0@7.3.0/1, s1@7.3.0/1",
            "DROP TABLE customer",
            "x" * 100_000,
        ],
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidToken):
            Token.parse(text)

    @pytest.mark.parametrize("given", [None, 5, b"s0@7.3.0/1", ("s0", 1)])
    def test_only_text_is_read(self, given: object) -> None:
        with pytest.raises(InvalidToken):
            Token.parse(given)  # type: ignore[arg-type]

    def test_shard_stands_once(self) -> None:
        with pytest.raises(InvalidToken, match="'s0' stands twice"):
            Token.parse("s0@7.3.0/1+s0@7.3.0/2")

    def test_message_shows_no_more_than_the_start(self) -> None:
        with pytest.raises(InvalidToken) as caught:
            Token.parse("x" * 5_000)

        assert len(str(caught.value)) < 300


class TestUnion:
    def test_nothing_seen_is_false(self) -> None:
        assert not Token()
        assert Token((ONE,))

    def test_of_a_shard(self) -> None:
        assert Token((ONE, OTHER)).of("s1") == OTHER
        assert Token((ONE,)).of("s1") is None

    def test_whoever_has_seen_both(self) -> None:
        later = Position("s0", 8, 3, 0x16B3749)

        found = Token((ONE, OTHER)) | Token((later,))

        assert found.of("s0") == Position("s0", 8, 3, 0x16B3749, ONE.cluster)
        assert found.of("s1") == OTHER


class TestNewest:
    def one(self, lsn: int, timeline: int = 1, epoch: int = 1) -> Position:
        return Position("s0", epoch, timeline, lsn)

    @pytest.mark.parametrize("order", list(permutations([(900, 1), (400, 2)])))
    def test_newer_timeline_is_newer_whatever_its_lsn(
        self, order: tuple[tuple[int, int], ...]
    ) -> None:
        """After a failover the log may go on from before the lost end of the old one."""
        old, new = (self.one(*fact) for fact in order)

        assert newest(old, new) == self.one(400, 2)

    @pytest.mark.parametrize("order", list(permutations([(100, 3), (200, 0)])))
    def test_unknown_timeline_does_not_lose_the_lsn(
        self, order: tuple[tuple[int, int], ...]
    ) -> None:
        """A write acknowledged by a primary nobody has probed yet must be read back, too."""
        old, new = (self.one(*fact) for fact in order)

        assert newest(old, new) == self.one(200, 3)

    def test_epoch_is_the_highest_of_both(self) -> None:
        """An older position may have been seen under a newer map."""
        assert newest(self.one(9, epoch=1), self.one(5, epoch=4)) == self.one(9, epoch=4)


class TestLSN:
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
