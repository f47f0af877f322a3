"""The specification of routing: each case of ``tests/cases/*.toml`` is planned as it says."""

from __future__ import annotations

import tomllib
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from planning import CASES, health, planned, situation, statements

from sqlroute import errors
from sqlroute.routing import target
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.known import KnownTables
from sqlroute.routing.planner import Planner
from sqlroute.routing.policy import Consistency, Policy, intent_named, role_named
from sqlroute.routing.target import History, Situation
from sqlroute.routing.token import Position, parse_lsn
from sqlroute.topology import Keyspace, Node, Shard, ShardMap, Topology

KNOWN = {
    "name", "statement", "parameters", "policy", "nodes", "session", "map", "shard", "exclude",
    "may_wait", "topology", "plan", "refused", "role", "intent", "snapshot", "floors", "histories",
}  # fmt: skip


def cases() -> Iterator[Any]:
    for path in sorted(CASES.glob("*.toml")):
        document = tomllib.loads(path.read_text())
        for case in document["case"]:
            made = {"topology": document["topology"], **case}
            yield pytest.param(made, id=f"{path.stem}: {case['name']}")


@pytest.mark.parametrize("case", list(cases()))
def test_case(case: dict[str, Any]) -> None:
    """A case names its plan in full, or the class, the clause and the words of its refusal."""
    assert set(case) <= KNOWN, f"unknown: {set(case) - KNOWN}"
    assert ("plan" in case) != ("refused" in case)
    statement = statements.STATEMENTS[case["statement"]]
    parameters = _parameters(case.get("parameters"))
    around = _situation(case)
    tables = KnownTables().declaring(statements.Base.metadata, around.topology.default)
    planner = Planner(around.topology, tables=tables)
    if "plan" in case:
        found = planned(statement, parameters, of=around, planner=planner)
        assert str(found) == case["plan"].strip()
        return
    refused = case["refused"]
    kind = getattr(errors, refused["error"], None) or getattr(target, refused["error"])

    with pytest.raises(kind) as caught:
        planned(statement, parameters, of=around, planner=planner)

    assert type(caught.value) is kind
    assert getattr(caught.value, "clause", None) == refused.get("clause")
    for words in refused.get("says", []):
        assert words in str(caught.value)


def test_every_statement_is_used() -> None:
    """A statement that no case names specifies nothing."""
    named = {case.values[0]["statement"] for case in cases()}

    assert named == set(statements.STATEMENTS)


def _parameters(given: Any) -> Any:
    if isinstance(given, list):
        return [_parameters(row) for row in given]
    if isinstance(given, dict):
        return {key: _value(value) for key, value in given.items()}
    return given


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("uuid:"):
        return uuid.UUID(value.removeprefix("uuid:"))
    if isinstance(value, list):
        return [_value(one) for one in value]
    return None if value == "NULL" else value


def _situation(case: dict[str, Any]) -> Situation:
    topology = _topology(case["topology"])
    rules = dict(case.get("policy", {}))
    if "consistency" in rules:
        rules["consistency"] = Consistency(rules["consistency"])
    maps = {k.name: ShardMap.even(k) for k in topology.keyspaces if k.is_sharded}
    if "map" in case:
        keyspace = topology.default
        owners = tuple(case["map"].get("owners", maps[keyspace.name].owners))
        maps = {keyspace.name: ShardMap(keyspace.name, owners, case["map"].get("epoch", 1))}
        maps = {} if case["map"].get("missing") else maps
    return situation(
        topology,
        policy=Policy(**rules),
        health=health(topology, case.get("nodes")),
        maps=maps,
        affinity=_affinity(case.get("session", {})),
        exclude=frozenset(case.get("exclude", ())),
        may_wait=case.get("may_wait", False),
        floors={s: _position(s, at) for s, at in case.get("floors", {}).items()},
        histories={
            shard: History(
                given["timeline"], {int(t): parse_lsn(at) for t, at in given["ends"].items()}
            )
            for shard, given in case.get("histories", {}).items()
        },
        **_demands(case),
    )


def _demands(case: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: case[name] for name in ("shard", "snapshot") if name in case}
    if "role" in case:
        found["role"] = role_named(case["role"])
    if "intent" in case:
        found["intent"] = intent_named(case["intent"])
    return found


def _history(given: dict[str, Any]) -> History:
    ends = {int(timeline): parse_lsn(at) for timeline, at in given["ends"].items()}
    return History(given["timeline"], ends)


def _position(shard: str, at: str, timeline: int = 1, epoch: int = 1, cluster: int = 0) -> Position:
    return Position(shard, epoch, timeline, parse_lsn(at), cluster)


def _topology(given: dict[str, Any]) -> Topology:
    keyspaces = []
    for name, rules in given.items():
        weights = rules.get("weights", {})
        shards = tuple(
            Shard(shard, tuple(Node(node, weight=weights.get(node, 1.0)) for node in nodes))
            for shard, nodes in rules["shards"].items()
        )
        keyspaces.append(Keyspace(name, shards, rules.get("buckets", 16)))
    return Topology(tuple(keyspaces))


def _affinity(given: dict[str, Any]) -> Affinity:
    affinity = Affinity()
    for shard in given.get("pinned", ()):
        affinity = affinity.pinned(shard, given.get("on", f"{shard}-a"))
    for shard, node in given.get("reading", {}).items():
        affinity = affinity.reading(shard, node)
    for shard, lsn in given.get("seen", {}).items():
        names = ("timeline", "epoch", "cluster")
        facts = {name: given[name] for name in names if name in given}
        affinity = affinity.seen(_position(shard, lsn, **facts))
    if "set" in given:
        affinity = affinity.set_by_hand(given["set"])
    if given.get("read_only"):
        return affinity.begun(read_only=True)
    return affinity.begun() if given.get("explicit") else affinity
