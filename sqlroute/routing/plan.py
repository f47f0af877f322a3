"""The plan of one statement: where it goes and why, as an immutable, printable value.

Targets and plans are tuples, because each statement makes one of each, and a frozen dataclass takes
four times as long. Made anew they cost the same over a thousand shards as over one; looked up, each
of a thousand is so seldom used that the processor has to fetch it from afar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple


class Tier(Enum):
    """How many servers answer, and how their answers become one."""

    SINGLE = "single"
    EMPTY = "empty"  # no row can match: nothing is asked
    SCATTER = "scatter"
    SPLIT = "split"  # rows of one INSERT, each to its own shard
    BROADCAST = "broadcast"  # a reference table is written on every shard
    COORDINATOR = "coordinator"  # PostgreSQL answers, over foreign tables on all shards


class Target(NamedTuple):
    """One node that takes part.

    Attributes:
        is_primary: the node was chosen as the primary of its shard.
        in_transaction: it runs in the session's transaction; else in AUTOCOMMIT, one round trip.
        reason: why this node.
        is_proved: it has all that the session has seen.
        life: of the node, as known when it was chosen.
        is_fallback: a read that no replica may take.
    """

    shard: str
    node: str
    is_primary: bool
    in_transaction: bool
    reason: str
    is_proved: bool = True
    life: int = 0
    is_fallback: bool = False

    def __str__(self) -> str:
        role = "primary" if self.is_primary else "replica"
        mode = "in the transaction" if self.in_transaction else "autocommit"
        return f"{self.shard}: {role} {self.node}, {mode} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Missing:
    """A shard that a partial answer is without.

    Attributes:
        node: that did not answer; empty where there was none to ask.
        reason: names the nodes.
    """

    shard: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}"


class Plan(NamedTuple):
    """What will be done with one statement.

    Attributes:
        tier: one shard, or how several are combined.
        targets: the nodes, one per shard.
        kind: ``read``, ``write`` or ``unknown``.
        epoch: of the shard map that placed it, 0 without a map.
        reasons: why, in the order in which it was decided.
        merge: how the answers of several shards become one, as words.
        rows: for SPLIT, the indexes of the rows of each target.
        coordinators: for COORDINATOR, the nodes that may answer, in the order in which they are
            tried; the targets are what they read.
        lists: for SCATTER, the parameters of which each target is sent just its values; empty where
            all are sent the same.
        missing: for SCATTER, the shards that are left out since no node of them can answer.
        sql: what each target is sent, where the plan is made to be shown.
    """

    tier: Tier
    targets: tuple[Target, ...]
    kind: str
    epoch: int
    reasons: tuple[str, ...]
    merge: tuple[str, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    coordinators: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()
    sql: tuple[str, ...] = ()
    lists: tuple[Mapping[str, list[Any]], ...] = ()

    @property
    def target(self) -> Target:
        """The first node; the only one of a plan of tier SINGLE."""
        return self.targets[0]

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(target.shard for target in self.targets)

    @property
    def replicas(self) -> tuple[Target, ...]:
        """The nodes that are none of their shards' primaries."""
        return tuple(target for target in self.targets if not target.is_primary)

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, the document of ``sqlroute explain --json``."""
        return {
            "tier": self.tier.value,
            "kind": self.kind,
            "epoch": self.epoch,
            "coordinators": list(self.coordinators),
            "targets": [
                {
                    "shard": target.shard,
                    "node": target.node,
                    "role": "primary" if target.is_primary else "replica",
                    "in_transaction": target.in_transaction,
                    "reason": target.reason,
                    **({"sql": self.sql[index]} if self.sql else {}),
                }
                for index, target in enumerate(self.targets)
            ],
            "missing": [{"shard": gone.shard, "reason": gone.reason} for gone in self.missing],
            "merge": list(self.merge),
            "reasons": list(self.reasons),
        }

    def sent(self) -> list[str]:
        """Return what is sent, as lines: once where all are sent the same."""
        if len(set(self.sql)) <= 1:
            return [f"  sends {sql}" for sql in self.sql[:1]]
        return [f"  sends {s} {sql}" for s, sql in zip(self.shards, self.sql, strict=True)]

    def __str__(self) -> str:
        lines = [f"{self.tier.value} ({self.kind})"]
        lines += [f"  on {name}" for name in self.coordinators[:1]]
        lines += [f"  or on {name}" for name in self.coordinators[1:]]
        lines += [f"  -> {target}" for target in self.targets]
        lines += [f"  without {gone}" for gone in self.missing]
        lines += self.sent()
        lines += [f"  merge: {step}" for step in self.merge]
        lines += [f"  because {reason}" for reason in self.reasons]
        return "\n".join(lines)
