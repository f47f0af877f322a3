"""Promises of the preflight: what is in the way is refused, with the way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from operating import LOCAL, RIGHTS, primary, receiver, replica, silent

from sqlroute.ops.fences import Level, fence_name, synchronous_fenced
from sqlroute.ops.preflight import (
    Check,
    NodeFacts,
    Outcome,
    possible_levels,
    refusals,
    strongest,
    strongest_in_sql,
    switchover_checks,
)

NO_RIGHTS = dict.fromkeys(RIGHTS, False)


def checks(*nodes: NodeFacts, **changes: Any) -> list[Check]:
    options: dict[str, Any] = {
        "max_lag_bytes": 1000,
        "max_drain": 5.0,
        "level": None,
        "rejoins": True,
        **changes,
    }
    return switchover_checks("s0", {f.name: f for f in nodes}, "a", "b", **options)


def texts(found: list[Check], outcome: Outcome) -> str:
    return "\n".join(check.text for check in found if check.outcome is outcome)


def test_a_healthy_shard_is_ready() -> None:
    """Every check is ok, and each says what was seen."""
    found = checks(primary(), replica(), replica("c"))

    assert {check.outcome for check in found} == {Outcome.OK}
    assert all(check.text for check in found)
    assert len({check.name for check in found}) >= 10


REFUSED: list[Any] = [
    (
        "managed",
        (replace(primary(), managed_by="Patroni"), replica()),
        "run by another engine (a by Patroni)",
        "promote with its own command",
    ),
    ("two primaries", (primary(), replica(), primary("c")), "2 nodes that are", "sqlroute fence"),
    ("timeline", (primary(timeline=2), replica()), "b is on timeline 1, a on 2", "sqlroute rejoin"),
    ("silent", (primary(), silent("b")), "b does not answer", "--to"),
    ("no replica", (primary(), primary("b")), "b is no replica", "--to"),
    ("foreign", (primary(), replica(system_identifier=2)), "belongs to another", "correct its"),
    ("no stream", (primary(), replica(receiver=None)), "b receives from nobody", "sqlroute rejoin"),
    (
        "stopped stream",
        (primary(), replica(receiver=receiver(status="stopping"))),
        "b receives from nobody",
        "sqlroute rejoin",
    ),
    ("cascading", (primary(), replica(upstream="c"), replica("c")), "receives from c", "--to"),
    ("stranger", (primary(), replica(upstream="")), "from h, no node of the shard", "--to"),
    ("lag", (primary(lsn=0x2000), replica()), "4096 bytes behind a (limit 1000)", "--max-lag-byt"),
    ("paused", (primary(), replica(pause_state="paused")), "is paused", "pg_wal_replay_resume()"),
    ("pausing", (primary(), replica(pause_state="pause requested")), "is paused", "replay_resume"),
    (
        "late",
        (primary(), replica(settings={"recovery_min_apply_delay": "3000"})),
        "replays 3000 ms late",
        "reset it",
    ),
    ("version", (primary(), replica(version=170000)), "PostgreSQL 17, a 18", "the same version"),
    (
        "may not promote",
        (primary(), replica(rights={**NO_RIGHTS, "stats": True, "settings": True})),
        "may not promote b",
        "GRANT EXECUTE ON FUNCTION pg_promote",
    ),
    (
        "sees nothing",
        (primary(), replica(rights={**NO_RIGHTS, "promote": True})),
        "neither the sessions nor the settings of b",
        "GRANT pg_monitor",
    ),
    (
        "no senders",
        (primary(), replica(settings={"max_wal_senders": "0"})),
        "b allows no walsenders",
        "nobody could follow",
    ),
    (
        "no slots",
        (
            primary(slots=[{"name": "x", "type": "physical", "failover": None}]),
            replica(settings={"max_replication_slots": "0"}),
        ),
        "0 free replication slots, 1 are needed",
        "raise max_replication_slots",
    ),
    (
        "no fence",
        (replace(primary(rights=NO_RIGHTS), abilities=frozenset()), replica()),
        "no fence possible on a (possible: none)",
        "GRANT ALTER SYSTEM ON PARAMETER session_preload_libraries",
    ),
    ("backup", (primary(backups=1), replica()), "1 base backup(s) run on a", "wait for them"),
    (
        "quorum",
        (primary(), replica(settings={"synchronous_standby_names": "ANY 1 (x)"})),
        "would wait for 1 of (x), and only a would be there",
        "correct synchronous_standby_names on b",
    ),
    (
        "copied fence",
        (primary(), replica(settings={"session_preload_libraries": fence_name(3)})),
        "b carries a fence itself (L3)",
        "sqlroute unfence b",
    ),
]


@pytest.mark.parametrize(
    ("nodes", "why", "way_out"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_in_the_way_is_refused_with_the_way_out(
    nodes: tuple[NodeFacts, ...], why: str, way_out: str
) -> None:
    found = [text for text in refusals(checks(*nodes)) if why in text]

    assert found, texts(checks(*nodes), Outcome.REFUSED)
    assert way_out in found[0]


WARNED: list[Any] = [
    ("silent third", (primary(), replica(), silent("c")), "c does not answer", {}),
    ("other timeline", (primary(), replica(), replica("c", timeline=9)), "not all nodes are", {}),
    (
        "less",
        (primary(), replica(settings={"max_connections": "50"})),
        "allows less: max_connections 50 (now 100)",
        {},
    ),
    ("wal_level", (primary(settings={"wal_level": "logical"}), replica()), "wal_level is rep", {}),
    ("senders", (primary(senders=[{}] * 11), replica()), "0 of 10 walsenders of b in use, 11", {}),
    (
        "logical slots",
        (primary(slots=[{"name": "sub", "type": "logical", "failover": "false"}]), replica()),
        "sub will not be there on b",
        {},
    ),
    ("weak fence", (primary(), replica()), "L1 on a", {"level": Level.L1}),
    ("subscription", (primary(subscriptions=1), replica()), "1 running sub", {"level": Level.L3}),
    (
        "no rewind",
        (primary(settings={"data_checksums": "off", "wal_log_hints": "off"}), replica()),
        "only a new base backup",
        {},
    ),
    ("pages", (primary(), replica(settings={"full_page_writes": "off"})), "pg_rewind refuses", {}),
    (
        "no start",
        (replace(primary(), abilities=frozenset()), replica()),
        "stays fenced until `sqlroute rejoin a`",
        {},
    ),
    ("prepared", (primary(prepared=2), replica()), "2 on a: they survive", {}),
    ("long", (primary(oldest_transaction=61.0), replica()), "a runs for 61 s", {}),
    (
        "archive",
        (
            primary(settings={"archive_mode": "on"}, archiver={"failing": True, "failed_count": 4}),
            replica(settings={"archive_mode": "on"}),
        ),
        "fails (4 times)",
        {},
    ),
    (
        "no quorum after",
        (primary(settings={"synchronous_standby_names": "b"}), replica()),
        "a commits synchronously, b would not",
        {},
    ),
    (
        "collation",
        (primary(collation=["C", "1", "1"]), replica(collation=["C", "1", "2"])),
        "REINDEX",
        {},
    ),
]


@pytest.mark.parametrize(
    ("nodes", "why", "options"), [case[1:] for case in WARNED], ids=[case[0] for case in WARNED]
)
def test_what_may_surprise_is_a_warning_and_refuses_nothing(
    nodes: tuple[NodeFacts, ...], why: str, options: dict[str, Any]
) -> None:
    found = checks(*nodes, **options)

    assert why in texts(found, Outcome.WARNING)
    assert refusals(found) == ()


def test_all_that_is_in_the_way_is_shown_at_once() -> None:
    """One look, not one error after the other."""
    nodes = primary(backups=1), replica(pause_state="paused", receiver=None)

    assert len(refusals(checks(*nodes))) == 3


def test_logical_slots_that_fail_over_survive() -> None:
    """From 17 on; no warning then."""
    slot = {"name": "sub", "type": "logical", "failover": "true"}

    assert "sub" not in texts(checks(primary(slots=[slot]), replica()), Outcome.WARNING)
    old = primary(slots=[slot], version=160000), replica(version=160000)
    assert "sub" in texts(checks(*old), Outcome.WARNING)


# Fences


@pytest.mark.parametrize(
    ("lacking", "possible"),
    [
        ((), [Level.L1, Level.L2, Level.L3]),
        (("l2",), [Level.L1, Level.L3]),
        (("l3",), [Level.L1, Level.L2]),
        (("l1",), []),
        (("reload",), []),
        (("signal",), []),
        *(((right,), [Level.L1, Level.L2]) for right in ("passes", "stats", "settings", "files")),
    ],
)
def test_a_fence_needs_all_rights_to_hold_and_to_be_taken_off(
    lacking: tuple[str, ...], possible: list[Level]
) -> None:
    """Who does not see other sessions, or could not come back himself, has no L3."""
    rights = {"superuser": False, **dict.fromkeys(lacking, False)}
    facts = replace(primary(rights=rights), abilities=frozenset())

    assert possible_levels(facts) == possible
    assert strongest(facts) == (possible[-1] if possible else Level.NONE)


def test_the_strongest_fence_is_the_stop_and_a_hook_is_used_where_it_is_wanted() -> None:
    facts = replace(primary(), abilities=LOCAL | {"fence"})

    assert strongest(facts) is Level.L4
    assert strongest(facts, Level.L5) is Level.L5
    assert strongest_in_sql(facts) is Level.L3
    assert strongest(replace(facts, abilities=frozenset({"fence"}))) is Level.L5
    assert strongest(replace(facts, abilities=frozenset()), Level.L4) is Level.NONE


def test_a_node_that_is_silent_can_only_be_fenced_by_its_machine() -> None:
    assert possible_levels(silent()) == [Level.L4]
    assert strongest_in_sql(silent()) is Level.NONE


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, Level.NONE),
        ({"default_transaction_read_only": "on"}, Level.L1),
        ({"synchronous_standby_names": synchronous_fenced("x")}, Level.L2),
        ({"session_preload_libraries": fence_name(2)}, Level.L3),
    ],
)
@pytest.mark.parametrize("where", ["settings", "files"])
def test_a_fence_is_seen_in_the_settings_and_in_the_files(
    settings: dict[str, str], level: Level, where: str
) -> None:
    """One whose command was killed before the reload comes up with the next one."""
    assert primary(**{where: settings}).fence is level
