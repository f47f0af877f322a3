"""What planning costs: in microseconds of the thread's own processor time, without any server.

Other programs of the machine and sqlroute's own threads do not count so; the clock on the wall
would show what else runs.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql

from sqlroute.health import Health, Observation, TextOrder, observe
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.balancing import Required, has_replayed
from sqlroute.routing.plan import Plan, Tier
from sqlroute.routing.planner import Planner, plan, plan_rows
from sqlroute.routing.policy import Demand, Policy
from sqlroute.routing.rows import keyed_rows
from sqlroute.routing.target import Situation
from sqlroute.routing.token import Position
from sqlroute.topology import Keyspace, Node, Shard, ShardMap, Topology

from .pairs import Figure, figure_of
from .shapes import Customer, Order, core_shapes, orm_shapes

LSN = 0x2000
ROUNDS = 60
BATCH = 200
SHAPE_ROUNDS = 5


def topology(shards: int, buckets: int = 64) -> Topology:
    """Return a keyspace whose shards have a primary and two replicas each."""
    made = tuple(
        Shard(f"s{i}", tuple(Node(f"s{i}-{letter}") for letter in "abc")) for i in range(shards)
    )
    return Topology((Keyspace("shop", made, buckets),))


def healthy(of: Topology) -> Health:
    """Return the health in which all nodes are up and no replica is behind."""
    found, now = Health.initial(of), time.monotonic()
    for keyspace in of.keyspaces:
        for number, shard in enumerate(keyspace.shards, 1):
            for node in shard.nodes:
                is_primary = node is shard.nodes[0]
                seen = Observation(
                    node.name,
                    now,
                    is_primary=is_primary,
                    timeline=1,
                    system_identifier=number,
                    lsn=LSN,
                    replay_age=None if is_primary else 0.0,
                    rtt=0.001,
                )
                found = observe(found, seen, now)
    return found


class Bench:
    """A planner and what it knows of a healthy topology."""

    def __init__(self, shards: int, affinity: Affinity | None = None, *, buckets: int = 64) -> None:
        self.topology = topology(shards, buckets)
        self.planner = Planner(self.topology)
        self._health = healthy(self.topology)
        self._policy = Policy()
        self._demand = Demand()
        self._rng = Random(1)
        self._affinity = affinity or Affinity()
        keyspaces = self.topology.keyspaces
        self._maps = {k.name: ShardMap.even(k) for k in keyspaces if k.is_sharded}

    def forget(self) -> None:
        self.planner = Planner(self.topology)

    def is_merged(self, statement: Any) -> bool:
        return not isinstance(self.plan(statement), Plan)

    def plan(self, statement: Any) -> Any:
        """Plan a statement as a session does, up to the point where it would be sent."""
        described = self.planner.describe(statement)
        situation = Situation(
            self.topology,
            self._policy,
            self._health,
            self._maps,
            self._affinity,
            {},
            self._demand,
        )
        shape = described.shape.statement
        if shape.insert is not None and shape.keyspace.is_sharded:
            _, keys = keyed_rows(described.statement, None)
            return plan_rows(described, keys, situation, self._rng)
        found = plan(described, situation, self._rng)
        if found.tier is Tier.SCATTER:
            return self.planner.merge(described, found, text_order=TextOrder(True))
        return found


def plan_cached(_: Path) -> list[Figure]:
    """Planning a statement whose shape was seen before, made anew each time as a program does."""
    found = []
    for name, shards in (("4 shards, by key", 4), ("one shard", 1)):
        bench = Bench(shards)
        larger = median(_each(bench.plan, _pages))
        keys = median(_each(_cache_key, _by_key))
        notes = (
            f"a join with three conditions, sorted: {larger:.1f} us",
            f"of it SQLAlchemy's cache key, which it needs itself and keeps: {keys:.1f} us",
        )
        samples = _each(bench.plan, _by_key)
        found.append(figure_of(f"plan_cached: {name}", 15, samples, "us", notes))
    return found


def _by_key() -> list[Any]:
    return [select(Customer).where(Customer.id == i) for i in range(BATCH)]


def _pages() -> list[Any]:
    return [_page(i) for i in range(BATCH)]


def _cache_key(statement: Any) -> Any:
    return statement._generate_cache_key()


def _page(number: int) -> Any:
    return (
        select(Order)
        .join(Order.customer)
        .where(Order.customer_id == number, Order.total > number, Customer.is_active)
        .order_by(Order.placed_at)
        .limit(20)
    )


def plan_new(_: Path) -> list[Figure]:
    """Planning a shape for the first time: the median over an application's statements.

    The process is warm, the planner knows nothing. The merge of what is scattered is part of it.
    """
    found = []
    shapes = {"ORM": orm_shapes, "Core": core_shapes}
    for name, shards in (("one shard", 1), ("4 shards", 4)):
        bench = Bench(shards)
        spent = {kind: _first_times(bench, made) for kind, made in shapes.items()}
        orm = spent["ORM"]
        compiled = median(_compile_times(shapes["ORM"]))
        notes = [
            f"over {len(orm)} shapes, the slowest {max(orm):.0f} us",
            f"{len(spent['Core'])} shapes of Core: median {median(spent['Core']):.0f} us",
            f"SQLAlchemy's own compilation of the same shapes: median {compiled:.0f} us",
        ]
        if shards > 1:
            merged = [us for us, s in zip(orm, orm_shapes(), strict=True) if bench.is_merged(s)]
            notes.append(f"the {len(merged)} of them that are merged: {median(merged):.0f} us")
        found.append(figure_of(f"plan_new: {name}", 400, orm, "us", tuple(notes)))
    return found


def scale_shards(_: Path) -> list[Figure]:
    """Planning a keyed read over 1,024 shards, against the same over 4; each read has another key.

    Both know 4,096 buckets.
    """
    many, few = (Bench(shards, buckets=4_096) for shards in (1_024, 4))
    keys = itertools.count()

    def by_key() -> list[Any]:
        return [select(Customer).where(Customer.id == next(keys)) for _ in range(BATCH)]

    pairs = [
        (median(_each(many.plan, by_key, 1)), median(_each(few.plan, by_key, 1)))
        for _ in range(ROUNDS)
    ]
    low, _, high = quantiles([a / b for a, b in pairs], n=4)
    wide, narrow = (median(side) for side in zip(*pairs, strict=True))
    return [
        Figure("scale_shards", wide / narrow, 1.1, (low, high), routed_us=wide, plain_us=narrow)
    ]


def _first_times(bench: Bench, make: Callable[[], Iterator[Any]]) -> list[float]:
    """Return for each shape what its first plan takes, the median of rounds with a new planner."""
    keys = [statement._generate_cache_key().key for statement in make()]
    assert len(set(keys)) == len(keys), "shapes must differ"
    rounds = []
    for _ in range(SHAPE_ROUNDS):
        bench.forget()
        rounds.append([_spent(bench.plan, statement) for statement in list(make())])
    return [median(spent) for spent in zip(*rounds, strict=True)]


def _compile_times(make: Callable[[], Iterator[Any]]) -> list[float]:
    dialect: Any = postgresql.dialect  # not annotated
    compiling = dialect()
    return [_spent(lambda s: s.compile(dialect=compiling), statement) for statement in make()]


def _spent(work: Callable[[Any], object], value: Any) -> float:
    began = time.thread_time()
    work(value)
    return (time.thread_time() - began) * 1e6


def token_check(_: Path) -> list[Figure]:
    """Proving by its cached replay LSN that a replica has what the token covers."""
    position = Position("s0", 1, 1, LSN - 1, 1)
    replica = healthy(topology(1)).replicas("s0")[0]
    assert has_replayed(replica, position)
    nobody: frozenset[Any] = frozenset()
    required = Required(position, nobody, None)
    times = [replica] * BATCH
    samples = _each(required.is_met_by, lambda: times)
    made = median(
        _each(lambda node: Required(position, nobody, None).is_met_by(node), lambda: times)
    )
    without, having = Bench(1), Bench(1, Affinity().seen(position))
    pairs = [
        (median(_each(having.plan, _by_key, 1)), median(_each(without.plan, _by_key, 1)))
        for _ in range(ROUNDS)
    ]
    more = median(a - b for a, b in pairs)
    notes = (
        f"making the question included: {made:.2f} us",
        f"a plan with a token costs {more:.2f} us more than one without (two replicas)",
    )
    return [figure_of("token_check", 1, samples, "us", notes)]


def _each(
    work: Callable[[Any], object], make: Callable[[], Sequence[Any]], rounds: int = ROUNDS
) -> list[float]:
    """Return the time of one call in microseconds, once per round over values made for it."""
    for value in make():
        work(value)
    gc.collect()
    found = []
    for _ in range(rounds):
        values = make()
        began = time.thread_time()
        for value in values:
            work(value)
        found.append((time.thread_time() - began) / len(values) * 1e6)
    return found
