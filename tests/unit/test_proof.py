"""Promises of a failover's judgement: is the primary gone, and what may be lost."""

from __future__ import annotations

from typing import Any

import pytest
from operating import look, primary, receiver, replica, row, silent

from sqlroute.ops.failover import Proof, former_of, is_interrupted, is_unannounced, proof
from sqlroute.ops.planning import Loss, Wishes, loss
from sqlroute.ops.preflight import NodeFacts

FRESH = {"receiver": receiver(age=1.0)}
OLD = {"receiver": receiver(age=36.0)}
GONE = {"receiver": None}
REFUSED = silent("a", "connection refused", is_refused=True)
HUNG = silent("a", is_hung=True)
QUIET = silent("c", is_hung=True)
ABSENT = silent("c", "connection refused", is_refused=True)

CASES: list[Any] = [
    # former, replicas, seen down, can kill: holds, needs kill
    ("refused, nobody receives", REFUSED, (replica("b", **GONE),), False, False, True, False),
    ("hung, nobody receives", HUNG, (replica("b", **GONE),), False, False, True, False),
    ("hung, streaming", HUNG, (replica("b", **FRESH),), False, False, False, False),
    ("hung, streams since long", HUNG, (replica("b", **OLD),), False, False, True, False),
    ("hung, streaming, killable", HUNG, (replica("b", **FRESH),), False, True, True, True),
    ("a port that lies", REFUSED, (replica("b", **FRESH),), False, False, False, False),
    ("a quiet replica", REFUSED, (replica("b", **GONE), QUIET), False, False, False, False),
    ("a quiet one, killable", REFUSED, (replica("b", **GONE), QUIET), False, True, True, True),
    ("a replica that is down", REFUSED, (replica("b", **GONE), ABSENT), False, False, True, False),
    ("seen down", HUNG, (replica("b", **FRESH), QUIET), True, True, True, False),
    ("another's stream", HUNG, (replica("b", upstream="c", **FRESH),), False, False, True, False),
    (
        "a stranger's stream",
        HUNG,
        (replica("b", upstream="", **FRESH),),
        False,
        False,
        False,
        False,
    ),
]


@pytest.mark.parametrize(
    ("former", "others", "is_seen_down", "can_kill", "holds", "needs_kill"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_a_primary_is_gone_only_if_nobody_can_hear_from_it(
    former: NodeFacts,
    others: tuple[NodeFacts, ...],
    is_seen_down: bool,
    can_kill: bool,
    holds: bool,
    needs_kill: bool,
) -> None:
    """What a replica still receives, or may receive, is a sign of life; a kill ends that."""
    found = proof(look(former, *others), "a", is_seen_down=is_seen_down, can_kill=can_kill)

    assert (found.holds, found.needs_kill) == (holds, needs_kill)
    assert found.holds or all("a" in text for text in found.against)


def test_a_stream_is_old_by_the_timeout_of_its_receiver() -> None:
    """After half of it the receiver has asked for an answer, which the living give at once."""
    short = {"wal_receiver_timeout": "10000"}
    never = {"wal_receiver_timeout": "0"}
    aged = {"receiver": receiver(age=11.0)}

    def judged(**settings: Any) -> Proof:
        at = look(HUNG, replica("b", **aged, **settings))
        return proof(at, "a", is_seen_down=False, can_kill=False)

    assert judged(settings=short).holds
    assert not judged().holds
    assert not judged(settings=never).holds


def test_the_proof_says_what_was_seen() -> None:
    found = proof(look(HUNG, replica("b", **FRESH)), "a", is_seen_down=False, can_kill=False)

    assert found.texts == ("a: no answer within 2 s",)
    assert "b (last message 1.0 s ago) may still receive from a" in found.against[0]
    assert "[drivers]" in found.against[0]


@pytest.mark.parametrize(
    ("at", "former"),
    [
        (look(silent("a"), replica("b"), replica("c")), "a"),
        (look(silent("a"), replica("b"), rows={}), "a"),  # whom it follows
        (look(silent("a"), replica("b"), rows={}, follows={"b": ""}), "a"),  # who is silent
        (look(silent("a"), silent("c"), replica("b"), rows={}, follows={"b": ""}), ""),
        (look(replica("a"), replica("b"), rows={"a": row("a")}), ""),  # it is a replica by now
        (look(silent("a"), silent("c"), replica("b"), rows={"b": row("c")}), "c"),
    ],
)
def test_who_was_the_primary_is_known_from_the_catalog_or_the_replicas(
    at: Any, former: str
) -> None:
    assert former_of(at, at.facts) == former


# What may be lost


def lost(seen: str | None, *, lsn: int = 0x1000, timeline: int = 1, **options: Any) -> Loss:
    """Return the loss if b is promoted, and a router has acknowledged so much."""
    monitors = [] if seen is None else [f"sqlroute monitor{seen}"]
    at = look(silent("a"), replica("b", lsn=lsn, timeline=timeline, monitors=monitors))
    return loss(at, "b", options.pop("asked", ["b"]), options.pop("names", ""), 1)


@pytest.mark.parametrize(
    ("seen", "known"),
    [
        (" seen=1/FFF", 0),
        (" seen=1/1000 held=abc", 0),
        (" seen=1/1001", 1),
        (" seen=1/2000", 0x1000),
        (" seen=2/10", 1),  # of a timeline that nobody has: something is lost, not how much
        ("", 0),
        (None, None),
    ],
)
def test_the_loss_is_what_routers_have_acknowledged_beyond_it(
    seen: str | None, known: int | None
) -> None:
    assert lost(seen).known_bytes == known


def test_what_was_acknowledged_on_an_older_timeline_is_there() -> None:
    """Its position may be the greater one."""
    assert lost(" seen=1/FFFF", timeline=2).known_bytes == 0


@pytest.mark.parametrize(
    ("seen", "wishes", "refused"),
    [
        (" seen=1/1000", Wishes(), ""),
        (" seen=1/2000", Wishes(), "more than --max-loss-bytes 0"),
        (" seen=1/2000", Wishes(max_loss_bytes=4096), ""),
        (" seen=1/2000", Wishes(max_loss_bytes=4095), "up to 4096 bytes are lost"),
        (" seen=1/2000", Wishes(accepts_loss=True), ""),
        (None, Wishes(), "no router is connected"),
        (None, Wishes(max_loss_bytes=1 << 30), "--accept-data-loss"),
        (None, Wishes(accepts_loss=True), ""),
        (" seen=1/2000", Wishes(force=True), "more than"),  # that is another question
    ],
)
def test_a_loss_is_refused_until_it_is_accepted(
    seen: str | None, wishes: Wishes, refused: str
) -> None:
    refusal = lost(seen).refusal(wishes)

    assert refused in refusal
    assert bool(refusal) is bool(refused)


def test_a_quorum_that_was_asked_proves_that_nothing_is_lost() -> None:
    """Whatever routers tell, or if there is none."""
    proved = lost(None, names="ANY 1 (b)")

    assert proved.refusal(Wishes()) == ""
    assert "nothing acknowledged is lost" in proved.text
    assert lost(None, names="ANY 1 (b, c)").refusal(Wishes())
    assert lost(None, names="ANY 1 (c)").refusal(Wishes())


def test_standbys_count_by_the_names_that_they_give_themselves() -> None:
    """That is cluster_name where it is set."""
    at = look(silent("a"), replica("b", settings={"cluster_name": "east"}))

    assert loss(at, "b", ["b"], "ANY 1 (east)", 1).quorum
    assert not loss(at, "b", ["b"], "ANY 1 (b)", 1).quorum


# What a killed failover has left


STOPPED = {
    "primary_conninfo": "host=/sqlroute-stopped fallback_application_name='sqlroute stopped h 1'"
}


@pytest.mark.parametrize(
    ("at", "interrupted", "unannounced"),
    [
        (look(primary(), replica()), False, False),
        (look(silent(), replica()), False, False),
        (look(silent(), replica(settings=STOPPED)), True, False),
        (look(primary(), replica(settings=STOPPED)), True, False),  # the old one is back
        (look(primary("b", timeline=2), silent()), True, True),
        (look(primary("b", timeline=2), silent(), rows={"b": row(timeline=2)}), False, False),
        (look(primary("b", timeline=2), silent(), rows={}), False, False),
    ],
)
def test_what_a_killed_failover_has_left_is_seen(
    at: Any, interrupted: bool, unannounced: bool
) -> None:
    """Replicas that receive from nobody, or a primary of a timeline that the catalog lacks."""
    assert (is_interrupted(at), is_unannounced(at)) == (interrupted, unannounced)
