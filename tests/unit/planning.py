"""What the tests of planning share: a topology, its health, and a plan of a statement."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from sqlroute.health import Health, Observation, TextOrder, observe
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.declare import Sharded, declaration
from sqlroute.routing.plan import Plan
from sqlroute.routing.planner import Planner, plan, plan_rows
from sqlroute.routing.policy import Demand, Policy
from sqlroute.routing.rows import keyed_rows
from sqlroute.routing.target import Situation
from sqlroute.topology import Keyspace, Node, Shard, ShardMap, Topology

CASES = Path(__file__).parent.parent / "cases"
NOW = 100.0
END = 0x2000
"""Where the log of every primary ends."""


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sqlroute_case_statements", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


statements = _load(CASES / "statements.py")


def topology(*, buckets: int = 16, **shards: str | list[Any]) -> Topology:
    """Make one keyspace: ``topology(s0="ab")`` has the nodes s0-a and s0-b."""
    made = tuple(
        Shard(shard, tuple(Node(f"{shard}-{letter}") for letter in letters))
        for shard, letters in shards.items()
    )
    return Topology((Keyspace("shop", made, buckets),))


def health(of: Topology, facts: Mapping[str, Mapping[str, Any]] | None = None) -> Health:
    """Make the health in which the first node of each shard is its primary and all is well.

    Facts of a node: ``lag`` in seconds, ``down`` with the error, ``role``, ``lsn``, ``timeline``,
    ``received``, ``unseen``.
    """
    facts = facts or {}
    found = Health.initial(of)
    for keyspace in of.keyspaces:
        for number, shard in enumerate(keyspace.shards, 1):
            for node in shard.nodes:
                fact = dict(facts.get(node.name, {}))
                if fact.get("unseen"):
                    continue
                first = "primary" if node is shard.nodes[0] else "replica"
                is_primary = fact.get("role", first) == "primary"
                lag = fact.get("lag", 0.0)
                seen = Observation(
                    node.name,
                    NOW,
                    is_primary=is_primary,
                    timeline=fact.get("timeline", 1),
                    system_identifier=number,
                    lsn=fact.get("lsn", END - 0x1000 if lag else END),
                    received_lsn=fact.get("received"),
                    replay_age=None if is_primary else lag,
                    rtt=0.001,
                )
                found = observe(found, seen, NOW)
                if "down" in fact:
                    for _ in range(2):
                        gone = Observation.failed(node.name, NOW, fact["down"])
                        found = observe(found, gone, NOW)
    return found


def situation(of: Topology, **changes: Any) -> Situation:
    """Make the situation in which all is well, then change it.

    ``loads`` are numbers; ``shard``, ``role``, ``intent``, ``snapshot``, ``partial`` are demands.
    """
    names = ("shard", "role", "intent", "snapshot", "partial")
    demands = {name: changes.pop(name) for name in names if name in changes}
    policy = changes.get("policy", Policy())
    changes["loads"] = {n: range(count) for n, count in changes.get("loads", {}).items()}
    maps = {k.name: ShardMap.even(k) for k in of.keyspaces if k.is_sharded}
    values: dict[str, Any] = {
        "topology": of,
        "policy": Policy(),
        "health": health(of),
        "maps": maps,
        "affinity": Affinity(),
        "demand": Demand(policy.consistency, **demands),
        **changes,
    }
    return Situation(**values)


def planned(
    statement: Any,
    parameters: Any = None,
    *,
    of: Situation,
    planner: Planner | None = None,
    seed: int = 1,
) -> Plan:
    """Plan one execution as a session does, the merge of a scatter included."""
    planner = planner or Planner(of.topology)
    described = planner.describe(statement, parameters)
    target = described.shape.statement.insert
    keyspace = described.shape.statement.keyspace
    rng = Random(seed)
    if (
        target is not None
        and keyspace.is_sharded
        and isinstance(declaration(target), Sharded)
        and of.demand.shard is None
    ):
        if described.shape.statement.row_keys is not None:
            keys: list[Any] = described.rows()
        else:
            _, keys = keyed_rows(described.statement, parameters)
        return plan_rows(described, keys, of, rng)
    found = plan(described, of, rng)
    if found.tier.value == "scatter":
        return planner.merge(described, found, text_order=TextOrder(True))[1]
    return found


def shards(statement: Any, parameters: Any = None, **options: Any) -> tuple[str, ...]:
    """Return the shards of a statement on a healthy topology of four shards."""
    return tuple(sorted(planned(statement, parameters, of=FOUR, **options).shards))


FOUR = situation(topology(s0="a", s1="a", s2="a", s3="a"))
EVERY = ("s0", "s1", "s2", "s3")
