"""Promises of the signed text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlroute import Token
from sqlroute.errors import ConfigError
from sqlroute.routing.token import Position
from sqlroute.web.carriage import LONGEST, NOTHING, STRONG, Brought, Cookie, Header

TOKEN = Token.parse("s0@7.1.0/16B3748.65f1c2d3e4b5a697+s1@7.2.1/0.65f1c2d3e4b5a698")
NOW = 1_800_000_000.0


def at(seconds: float) -> Callable[[], float]:
    return lambda: NOW + seconds


def cookie(keys: Any = "key", seconds: float = 0, **options: Any) -> Cookie:
    return Cookie(keys, clock=at(seconds), **options)


class TestReading:
    def test_what_was_signed_comes_back(self) -> None:
        carry = cookie()

        assert carry.read_text(carry.text_of(TOKEN)) == Brought(TOKEN)
        assert carry.read_text(carry.text_of_strong()) == STRONG

    def test_nothing_was_sent(self) -> None:
        assert cookie().read("other=1; sqlroute2=x") == NOTHING
        assert cookie().read("sqlroute=") == NOTHING
        assert Header("key").read("  ") == NOTHING

    def test_it_is_found_among_other_cookies(self) -> None:
        text = cookie().text_of(TOKEN)

        assert cookie().read(f'a=b; xsqlroute=1;sqlroute="{text}"; c') == Brought(TOKEN)

    def test_every_letter_counts(self) -> None:
        """A text with one letter changed is not trusted, whichever it is."""
        text = cookie().text_of(TOKEN)
        for place, letter in enumerate(text):
            # the last letter of base64 has bits that mean nothing
            other = {"A": "g", "g": "A"}.get(letter, "A")
            found = cookie().read_text(text[:place] + other + text[place + 1 :])
            assert found.is_strong, place
            assert found.fault, place

    @given(st.text())
    def test_any_text_has_an_answer(self, text: str) -> None:
        for found in (Header("key").read(text), cookie().read(f"sqlroute={text}")):
            assert found == NOTHING or found.fault

    def test_a_text_without_a_token_that_we_have_signed(self) -> None:
        found = cookie().read_text(cookie()._signer.sign("nonsense").decode())

        assert (found.fault, found.is_strong) == ("what was signed is no token", True)

    def test_it_expires(self) -> None:
        text = cookie().text_of(TOKEN)

        assert cookie(seconds=60).read_text(text) == Brought(TOKEN)
        found = cookie(seconds=61).read_text(text)
        assert (found.is_expired, found.is_strong, found.token) == (True, True, Token())

    def test_another_server_whose_clock_is_ahead(self) -> None:
        assert cookie(seconds=-3600).read_text(cookie().text_of(TOKEN)) == Brought(TOKEN)

    def test_a_megabyte_costs_nothing(self) -> None:
        """It is refused by its length: neither parsed nor hashed."""
        huge = "sqlroute=" + "x.y;" * 2**18
        began = time.perf_counter()
        for _ in range(100):
            assert cookie_of_all.read(huge).fault
            assert cookie_of_all.read_text(huge).fault

        assert time.perf_counter() - began < 0.1


cookie_of_all = cookie()


class TestKeys:
    def test_the_first_key_signs_and_all_verify(self) -> None:
        text = cookie(["new", "old"]).text_of(TOKEN)

        assert cookie("new").read_text(text) == Brought(TOKEN)
        assert cookie("old").read_text(text).fault == "its signature is none of ours"
        assert cookie(["new", "old"]).read_text(cookie("old").text_of(TOKEN)) == Brought(TOKEN)

    @pytest.mark.parametrize("keys", ["", [], [""], ["key", ""], [b"key"]])
    def test_keys_are_secret_texts(self, keys: Any) -> None:
        with pytest.raises(ConfigError, match="keys: at least one secret text"):
            Cookie(keys)


class TestWriting:
    def test_a_token_of_too_many_shards(self) -> None:
        """What does not fit into a cookie is not cut: the client reads from the primary."""
        few = Token(tuple(Position(f"shard-{n:04}", 7, 1, 2**40, 2**60) for n in range(60)))
        many = Token(tuple(Position(f"shard-{n:04}", 7, 1, 2**40, 2**60) for n in range(120)))

        assert cookie().read_text(cookie().text_of(few)) == Brought(few)
        assert len(cookie().text_of(few)) <= LONGEST
        assert cookie().read_text(cookie().text_of(many)) == STRONG

    def test_the_cookie(self) -> None:
        name, value = cookie(
            name="__Secure-seen", path="/app", domain="a.test", secure=True, same_site="Strict"
        ).answer("x.y")

        assert name == "Set-Cookie"
        assert value == (
            "__Secure-seen=x.y; Max-Age=60; Path=/app; Domain=a.test; Secure; HttpOnly; "
            "SameSite=Strict"
        )
        assert cookie().answer("") == (
            "Set-Cookie",
            "sqlroute=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax",
        )

    def test_the_header(self) -> None:
        assert Header("key").answer("x.y") == ("Sqlroute-Token", "x.y")
        assert Header("key", name="Seen").answer("") == ("Seen", "")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"name": "a b"},
            {"name": ""},
            {"path": "/;x"},
            {"domain": "a\r\nb"},
            {"same_site": "lax"},
            {"max_age": 0},
        ],
    )
    def test_what_no_cookie_can_have(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            cookie(**wrong)
