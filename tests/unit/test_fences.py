"""Promises of the texts of fences: what they set can be told, named and taken back."""

from __future__ import annotations

import pytest

from sqlroute.ops import fences
from sqlroute.ops.fences import Level


@pytest.mark.parametrize(
    "before", ["", "auto_explain", "auto_explain, pg_hint_plan", '"with space", b']
)
def test_a_fence_in_the_libraries_is_taken_back_exactly(before: str) -> None:
    fenced = fences.fenced(before, 7)

    assert fenced.startswith("sqlroute_fence_epoch_7")  # first: nothing else is loaded before
    assert fences.epoch_of(fenced) == 7
    assert fences.unfenced(fenced) == before


def test_another_fence_replaces_the_first() -> None:
    twice = fences.fenced(fences.fenced("auto_explain", 7), 8)

    assert fences.epoch_of(twice) == 8
    assert fences.unfenced(twice) == "auto_explain"


@pytest.mark.parametrize("libraries", ["", "auto_explain", "my_sqlroute_fence_epoch_7x"])
def test_other_libraries_are_no_fence(libraries: str) -> None:
    assert fences.epoch_of(libraries) is None


@pytest.mark.parametrize("names", ["", "*", "ANY 1 (a, b)", 'FIRST 2 ("s0-a", "ü")'])
def test_synchronous_names_are_in_their_fence_and_come_back(names: str) -> None:
    fenced = fences.synchronous_fenced(names)

    assert fences.is_synchronous_fence(fenced)
    assert fences.synchronous_fenced(fenced) == fenced  # a second time nothing is lost
    assert fences.synchronous_unfenced(fenced) == names


@pytest.mark.parametrize("names", ["", "a", "sqlroute_fencex", "sqlroute_fence_xyz", "ANY 1 (a)"])
def test_other_names_are_no_fence_and_stay(names: str) -> None:
    assert not fences.is_synchronous_fence(names)
    assert fences.synchronous_unfenced(names) == names


@pytest.mark.parametrize("text", ["l3", "L3"])
def test_levels_have_names(text: str) -> None:
    assert Level.named(text) is Level.L3


@pytest.mark.parametrize("text", ["none", "", "L6", "3"])
def test_an_unknown_level_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="known: L1, L2, L3, L4, L5"):
        Level.named(text)


def test_the_refusal_of_a_fenced_server_is_told_from_others() -> None:
    refusal = 'FATAL:  could not access file "sqlroute_fence_epoch_7": No such file or directory'

    assert fences.is_fence_error(refusal)
    assert not fences.is_fence_error('FATAL:  could not access file "auto_explain"')
