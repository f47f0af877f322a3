"""The checker can fail: for each invariant a history that breaks it, and only it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .history import (
    Ack,
    History,
    Interruption,
    Passage,
    Place,
    Read,
    Row,
    Stamp,
    faults,
    longest_gap,
)

OLD, NEW = Stamp("a", 1, 1), Stamp("b", 2, 2)
ACKS = (
    Ack("w", 1, OLD, sent=1.0, answered=1.1, lsn=100),
    Ack("w", 2, OLD, sent=2.0, answered=2.1, lsn=200),
    Ack("w", 3, NEW, sent=3.0, answered=3.1, lsn=300),
)
SOUND = History(
    acks=ACKS,
    rows=tuple(Row(ack.writer, ack.number, ack.stamp) for ack in ACKS),
    reads=(Read("r", "w", at_least=2, found=3, token="t"),),
    passages=(Passage(timeline=2),),
    places=(Place("a", False, 2, 2), Place("b", True, 2, 2)),
    interruptions=(Interruption("o", "fence", "resumed"),),
)
WITHOUT_2 = (SOUND.rows[0], SOUND.rows[2])
FAILOVER = Passage(timeline=2, epoch=2, is_held=False, is_lossless=False, kept=150, known_bytes=50)

BROKEN = {
    "lost in a switchover": (replace(SOUND, rows=WITHOUT_2), "may lose nothing"),
    "lost without a promotion": (replace(SOUND, rows=SOUND.rows[:2]), "without any promotion"),
    "lost beyond the bound": (
        replace(SOUND, rows=WITHOUT_2, passages=(replace(FAILOVER, known_bytes=49),)),
        "beyond what was said",
    ),
    "doubled": (replace(SOUND, rows=(*SOUND.rows, SOUND.rows[0])), "stored 2 times"),
    "two nodes in an epoch": (
        replace(SOUND, acks=(*ACKS, Ack("w", 4, Stamp("c", 2, 3), 4.0, 4.1, 400)),
                rows=(*SOUND.rows, Row("w", 4, Stamp("c", 2, 3)))),
        "two nodes took writes in epoch 2",
    ),
    "an old reign after a new one": (
        replace(SOUND, acks=(*ACKS, Ack("w", 4, OLD, 4.0, 4.1, 250)),
                rows=(*SOUND.rows, Row("w", 4, OLD))),
        "taken by an old reign",
    ),
    "a read before its token": (
        replace(SOUND, reads=(Read("r", "w", at_least=2, found=1, token="t"),)),
        "read before its token",
    ),
    "two primaries": (
        replace(SOUND, places=(Place("a", True, 2, 2), Place("b", True, 2, 2))),
        "not one primary: a, b",
    ),
    "an old timeline": (
        replace(SOUND, places=(Place("a", False, 2, 1), Place("b", True, 2, 2))),
        "a is on timeline 1, not 2",
    ),
    "a journal not replayed": (
        replace(SOUND, places=(Place("a", False, 1, 2), Place("b", True, 2, 2))),
        "a has replayed the journal up to 1, not 2",
    ),
    "a command left alone": (
        replace(SOUND, interruptions=(Interruption("o", "fence", ""),)),
        "neither resumed nor rolled back",
    ),
}  # fmt: skip


def test_a_sound_history_has_no_fault() -> None:
    assert list(faults(SOUND)) == []


@pytest.mark.parametrize(("history", "said"), BROKEN.values(), ids=BROKEN)
def test_each_breach_is_found(history: History, said: str) -> None:
    (found,) = faults(history)

    assert said in found


def test_a_loss_that_was_said_before_is_no_breach() -> None:
    assert list(faults(replace(SOUND, rows=WITHOUT_2, passages=(FAILOVER,)))) == []


def test_a_node_may_take_writes_before_its_epoch_is_named_after_a_failover_only() -> None:
    early = Ack("w", 3, Stamp("b", 1, 2), sent=3.0, answered=3.1, lsn=300)
    history = replace(
        SOUND, acks=(*ACKS[:2], early), rows=(*SOUND.rows[:2], Row("w", 3, early.stamp))
    )

    assert list(faults(replace(history, passages=(FAILOVER,)))) == []
    assert list(faults(history)) == ["two nodes took writes in epoch 1: a, b"]


def test_strangers_count_where_nothing_may_be_lost() -> None:
    """Nobody knows what they have been told, so no bound holds for them; a quorum does."""
    strange = replace(SOUND, rows=WITHOUT_2, strangers=frozenset({"w"}))
    unknown = replace(FAILOVER, known_bytes=0)

    assert list(faults(replace(strange, passages=(unknown,)))) == []
    assert len(list(faults(strange))) == 1


def test_a_gap_counts_though_nobody_has_written_since() -> None:
    assert longest_gap(ACKS, 0.9, 3.2) == pytest.approx(1.0)
    assert longest_gap(ACKS, 0.9, 9.0) == pytest.approx(5.9)
