"""Promises of quorum arithmetic: it says what trying every possibility says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from sqlroute.ops.synchronous import Quorum, parsed

NAMES = ("a", "b", "c", "d")


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from combinations(names, size)


def quorums() -> Iterator[tuple[Quorum, tuple[str, ...]]]:
    """Yield each quorum with the standbys that it may count."""
    for size in range(1, len(NAMES) + 1):
        for number in range(1, size + 1):
            yield Quorum(number, NAMES[:size]), NAMES[:size]
            yield Quorum(number, ("*",)), NAMES[:size]


@pytest.mark.parametrize(("quorum", "there"), list(quorums()), ids=str)
def test_who_was_asked_has_every_commit_exactly_if_no_quorum_misses_them(
    quorum: Quorum, there: tuple[str, ...]
) -> None:
    """A commit may be on any k of the n; among those that were asked must be one of each such k."""
    for asked in subsets(there):
        misses_one = any(not set(asked) & set(k) for k in combinations(there, quorum.number))

        assert quorum.is_proved(asked, len(there)) is not misses_one, asked


@pytest.mark.parametrize(("quorum", "there"), list(quorums()), ids=str)
def test_what_is_needed_is_the_smallest_number_that_is_a_proof(
    quorum: Quorum, there: tuple[str, ...]
) -> None:
    proofs = [len(asked) for asked in subsets(there) if quorum.is_proved(asked, len(there))]

    assert min(proofs) == quorum.needed(len(there))


@pytest.mark.parametrize(
    ("names", "there", "can"),
    [
        ("ANY 1 (a, b)", {"b"}, True),
        ("ANY 1 (a, b)", {"c"}, False),
        ("ANY 2 (a, b)", {"a"}, False),
        ("FIRST 2 (a, b, c)", {"a", "c"}, True),
        ("*", {"x"}, True),
        ("2 (*)", {"x"}, False),
        ("*", set(), False),
    ],
)
def test_commits_return_only_where_enough_standbys_are_there(
    names: str, there: set[str], can: bool
) -> None:
    quorum = parsed(names)

    assert quorum is not None
    assert quorum.can_be_met(there) is can


@pytest.mark.parametrize(
    ("text", "quorum"),
    [
        ("", None),
        ("  ", None),
        ("a", Quorum(1, ("a",))),
        ("a, b", Quorum(1, ("a", "b"))),
        ("2 (a, b)", Quorum(2, ("a", "b"))),
        ("any 1(a,b)", Quorum(1, ("a", "b"))),
        ("FIRST 1 (*)", Quorum(1, ("*",))),
        ('ANY 1 ("s0-a", "say ""x""")', Quorum(1, ("s0-a", 'say "x"'))),
        ('ANY 1 ("a, b", c)', Quorum(1, ("a, b", "c"))),
        ('"any 1 (x)"', Quorum(1, ("any 1 (x)",))),
    ],
)
def test_every_form_of_the_setting_is_understood(text: str, quorum: Quorum | None) -> None:
    assert parsed(text) == quorum


def test_names_are_compared_as_postgresql_does() -> None:
    """Without regard to upper and lower case."""
    quorum = Quorum(1, ("Node-A",))

    assert quorum.can_be_met({"node-a"})
    assert quorum.is_proved({"NODE-A"}, 1)


def test_a_name_that_stands_for_nobody_does_not_count() -> None:
    """Asking others than those that commits wait for proves nothing."""
    assert not Quorum(1, ("a", "b")).is_proved({"c", "d"}, 4)
