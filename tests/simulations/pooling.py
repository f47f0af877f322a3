"""How many connections the nodes have when every process uses every shard now and then."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from sqlroute.health import NodeHealth
from sqlroute.routing.balancing import replica_subset
from sqlroute.routing.policy import Policy, pool_limits

WRITES = 0.2
READ_SECONDS, WRITE_SECONDS = 0.003, 0.010


@dataclass(frozen=True, slots=True)
class Connections:
    """Connections of nodes, the monitors' included, at their most.

    Attributes:
        primary, replica: of the node of that role that had the most.
        processes_per_replica: that read from one replica, at the fewest and at the most.
        waited: share of the statements that found all connections of their process in use.
    """

    primary: int
    replica: int
    processes_per_replica: tuple[int, int]
    waited: float
    statements: int


@dataclass(slots=True)
class _Pair:
    """The connections of a process to a node."""

    used: int = 0
    idle: int = 0


def connections(
    shards: int,
    processes: int,
    policy: Policy,
    rng: Random,
    *,
    per_second: float = 40.0,
    seconds: float = 30.0,
) -> Connections:
    """Let each process send statements to shards, some of which are more popular than others.

    A process that has used a node once watches it, by one connection. The nodes of the most popular
    shard stop answering for ten seconds in the middle: what they were sent stays under way.
    """
    hangs, answers = seconds / 2, seconds / 2 + 10
    subsets = [
        [_replica(process, shard, policy) for shard in range(shards)]
        for process in range(processes)
    ]
    readers = Counter((shard, chosen) for of in subsets for shard, chosen in enumerate(of))
    pairs: dict[tuple[int, int, int], _Pair] = {}
    watching: Counter[tuple[int, int]] = Counter()
    open_now: Counter[tuple[int, int]] = Counter()
    most: Counter[tuple[int, int]] = Counter()
    ends: list[tuple[float, int, int, int]] = []
    waited = statements = 0
    for at, process, shard in _arrivals(shards, processes, per_second, seconds, rng):
        while ends and ends[0][0] <= at:
            _, *key = heapq.heappop(ends)
            _give_back(tuple(key), pairs, watching, open_now, policy)
        statements += 1
        is_write = rng.random() < WRITES
        role = 0 if is_write else 1 + subsets[process][shard]
        node, key = (shard, role), (process, shard, role)
        if key not in pairs:
            pairs[key] = _Pair()
            watching[node] += 1
        pair, limits = pairs[key], pool_limits(policy, watching[node])
        if pair.idle:
            pair.idle -= 1
        elif limits.most < 0 or pair.used < limits.most:
            open_now[node] += 1
        else:
            waited += 1
            continue
        pair.used += 1
        most[node] = max(most[node], open_now[node] + watching[node])
        time = rng.expovariate(1 / (WRITE_SECONDS if is_write else READ_SECONDS))
        start = answers if shard == 0 and hangs < at < answers else at
        heapq.heappush(ends, (start + time, *key))
    replicas = [readers[shard, chosen] for shard in range(shards) for chosen in (0, 1)]
    return Connections(
        max((count for (_, role), count in most.items() if role == 0), default=0),
        max((count for (_, role), count in most.items() if role), default=0),
        (min(replicas), max(replicas)),
        waited / statements,
        statements,
    )


def _arrivals(
    shards: int, processes: int, per_second: float, seconds: float, rng: Random
) -> Iterator[tuple[float, int, int]]:
    weights = list(accumulate(1 / (rank + 10) for rank in range(shards)))
    total, at = processes * per_second, 0.0
    numbers = range(shards)
    while (at := at + rng.expovariate(total)) < seconds:
        yield at, rng.randrange(processes), rng.choices(numbers, cum_weights=weights)[0]


def _give_back(
    key: tuple[int, ...],
    pairs: dict[tuple[int, int, int], _Pair],
    watching: Counter[tuple[int, int]],
    open_now: Counter[tuple[int, int]],
    policy: Policy,
) -> None:
    process, shard, role = key
    pair, node = pairs[process, shard, role], (shard, role)
    pair.used -= 1
    limits = pool_limits(policy, watching[node])
    if pair.idle < limits.kept:
        pair.idle += 1
    else:
        open_now[node] -= 1


def _replica(process: int, shard: int, policy: Policy) -> int:
    """Return which of the two replicas of a shard a process reads from: 0 or 1."""
    nodes = (NodeHealth(f"s{shard}-b", f"s{shard}"), NodeHealth(f"s{shard}-c", f"s{shard}"))
    chosen = replica_subset(f"host-{process}", nodes, policy.replicas_per_process)
    return nodes.index(chosen[process % len(chosen)])
