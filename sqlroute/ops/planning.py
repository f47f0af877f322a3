"""From what the servers of a shard tell to what an operation is to do: who, how, which steps.

Reads and decides; changes nothing. A plan can be shown (``--dry-run``), written down, and made
again from what was written by whoever resumes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlroute.errors import OperationRefused
from sqlroute.ops import preflight, synchronous
from sqlroute.ops.fences import Level
from sqlroute.ops.preflight import Check, NodeFacts, Outcome
from sqlroute.ops.records import new_id, operations
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.ops.steps import Change, Member, Role, Standing, Step, switchover
from sqlroute.routing.token import format_lsn, parse_lsn

_SEEN = re.compile(r" seen=(\d+)/([0-9A-F]+)")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator asks for.

    Attributes:
        to: the node to promote; empty for the best one.
        level: the fence to use; ``None`` for the strongest that is possible.
        max_drain: seconds for which transactions under way may go on, then they are ended.
        max_lag_bytes: how far the candidate may be behind before anything is held.
        timeout: seconds for each thing that a server is waited for.
        rejoins: the former primary is to come back as a replica.
        force: a failover without proof that the primary is gone.
        max_loss_bytes: how many bytes of acknowledged log a failover may lose.
        accepts_loss: a failover may lose whatever is missing, known or not.
        synchronous: ``synchronous_standby_names`` of a primary that cannot be asked.
    """

    to: str = ""
    level: Level | None = None
    max_drain: float = 5.0
    max_lag_bytes: int = 16 << 20
    timeout: float = 30.0
    rejoins: bool = True
    force: bool = False
    max_loss_bytes: int = 0
    accepts_loss: bool = False
    synchronous: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operation is to do.

    Attributes:
        checks: of its preflight; it is not run if one of them refuses.
        steps: that are expected, from how the shard stands now.
        proof: of a failover: why the primary is taken for gone.
    """

    change: Change
    level: Level
    wishes: Wishes
    checks: tuple[Check, ...]
    steps: tuple[Step, ...]

    @property
    def refusals(self) -> tuple[str, ...]:
        return preflight.refusals(self.checks)

    def document(self) -> dict[str, Any]:
        change = self.change
        return {
            "operation": change.operation,
            "kind": change.kind,
            "shard": change.shard,
            "epoch": change.epoch,
            "former": change.former,
            "candidate": change.candidate or None,
            "siblings": list(change.siblings),
            "fence": self.level.name,
            "rejoins": change.rejoins,
            "checks": [check.document() for check in self.checks],
            "refused": list(self.refusals),
            "steps": [
                {"step": step.name.value, "text": step.text, "reversible": step.is_reversible}
                for step in self.steps
            ],
        }


def written(change: Change, level: Level, wishes: Wishes) -> dict[str, Any]:
    """Return an operation as plain values, for whoever resumes it; see :func:`read`."""
    return {"change": asdict(change), "wishes": {**asdict(wishes), "level": level.name}}


def read(values: Mapping[str, Any]) -> tuple[Change, Level, Wishes]:
    """Return what :func:`written` was given."""
    change = dict(values["change"])
    change["siblings"] = tuple(change["siblings"])
    wishes = dict(values["wishes"])
    name = wishes.pop("level")
    level = Level[name]
    return Change(**change), level, Wishes(**wishes, level=level)


def plan_switchover(shard: ShardServers, look: Look, wishes: Wishes) -> Plan:
    """Plan a promotion while the primary lives.

    Raises:
        OperationRefused: there is no primary, or no other node that could be one.
    """
    former = primary_for_switchover(shard, look)
    if wishes.to == former:
        raise OperationRefused(f"{former} is the primary of shard {shard.name} already")
    if wishes.to:
        shard.server(wishes.to)  # an unknown name is an error of its own
    names = [wishes.to] if wishes.to else [name for name in look.facts if name != former]
    if not names:
        raise OperationRefused(
            f"shard {shard.name} has one node, {former}, and nothing to promote; add one with "
            "`sqlroute replica add`"
        )
    best = min(
        (_switchover_to(shard, look, former, name, wishes) for name in names),
        key=lambda plan: (len(plan.refusals), _lag(look, former, plan.change.candidate)),
    )
    if best.refusals:
        return best
    return replace(best, steps=tuple(switchover(best.change, standing(best.change, look))))


def standing(
    change: Change, look: Look, *, is_checkpointed: bool = False, is_recorded: bool = False
) -> Standing:
    """Return how a shard stands for an operation, by what its servers tell.

    Of what no server can tell, the safe answer is taken: a candidate that is no primary yet has to
    catch up again, and a failover proves and chooses again.
    """
    is_promoted = bool(change.candidate) and look.facts[change.candidate].is_primary
    members = tuple(
        Member(
            name,
            Role.DOWN if not facts.answers else Role.PRIMARY if facts.is_primary else Role.REPLICA,
            facts.fence if facts.answers else Level.NONE,
            look.follows.get(name, ""),
        )
        for name, facts in look.facts.items()
    )
    replicas = [name for name, facts in look.facts.items() if facts.is_replica]
    return Standing(
        epoch=look.epoch,
        members=members,
        held=next((row.operation or "" for row in look.rows.values() if row.is_held), ""),
        is_recorded=is_recorded,
        is_checkpointed=is_checkpointed,
        caught_up=is_promoted,
        is_verified=is_promoted
        and all(look.epochs.get(name, 0) >= change.epoch for name in replicas),
        is_gone=is_promoted,
        is_chosen=is_promoted,
    )


def newest_seen(look: Look) -> tuple[int, int] | None:
    """Return the newest (timeline, LSN) that a connected router has acknowledged.

    ``None`` if no router is connected at all; (0, 0) if those that are have acknowledged nothing.
    """
    names = {name for facts in look.facts.values() for name in _monitors(facts)}
    if not names:
        return None
    return max((seen_in(name) for name in names), default=(0, 0))


def seen_in(name: str) -> tuple[int, int]:
    """Return what the name of a monitor's connection says was acknowledged; (0, 0) for nothing."""
    found = _SEEN.search(name)
    return (int(found[1]), int(found[2], 16)) if found else (0, 0)


def _monitors(facts: NodeFacts) -> Iterable[str]:
    return facts.told.get("monitors") or () if facts.answers else ()


def primary_for_switchover(shard: ShardServers, look: Look) -> str:
    """Return the one primary of a shard.

    Raises:
        OperationRefused: there is none, or more than one.
    """
    if len(look.primaries) > 1:
        raise OperationRefused(
            f"shard {shard.name} has {len(look.primaries)} nodes that are primaries "
            f"({', '.join(look.primaries)}); fence all but the right one with `sqlroute fence "
            "NODE`, then `sqlroute rejoin NODE`"
        )
    if not look.primaries:
        silent = "; ".join(facts.error for facts in look.facts.values() if facts.error)
        raise OperationRefused(
            f"shard {shard.name} has no primary that answers ({silent or 'all are in recovery'}); "
            f"see `sqlroute failover {shard.name} --dry-run`"
        )
    return look.primaries[0]


def _switchover_to(
    shard: ShardServers, look: Look, former: str, candidate: str, wishes: Wishes
) -> Plan:
    old = look.facts[former]
    level = preflight.strongest(old, wishes.level)
    rejoins = wishes.rejoins and old.can_rejoin
    others = [name for name, f in look.facts.items() if f.is_replica and name != candidate]
    siblings = tuple(name for name in others if _source(look, name) == former)
    change = Change(
        operation=new_id(),
        shard=shard.name,
        epoch=look.epoch + 1,
        former=former,
        candidate=candidate,
        siblings=siblings,
        rejoins=rejoins,
    )
    checks = preflight.switchover_checks(
        shard.name,
        look.facts,
        former,
        candidate,
        max_lag_bytes=wishes.max_lag_bytes,
        max_drain=wishes.max_drain,
        level=wishes.level,
        rejoins=wishes.rejoins,
    )
    checks += catalog_checks(shard, look, former)
    checks += _of_siblings(look, others, siblings)
    return Plan(change, level, wishes, tuple(checks), ())


def _source(look: Look, replica: str) -> str:
    """Return the node that a replica is told to receive from, or receives from by its address."""
    return look.follows.get(replica) or look.facts[replica].upstream


def _of_siblings(look: Look, others: Iterable[str], siblings: Iterable[str]) -> list[Check]:
    checks = [
        Check(
            "siblings",
            Outcome.WARNING,
            f"{name} receives from an address that is no node's of the shard: it is not repointed; "
            f"set advertise in [drivers], or run `sqlroute rejoin {name}` afterwards",
        )
        for name in others
        if not _source(look, name)
    ]
    cascading = [
        f"{name} follows {_source(look, name)}"
        for name in others
        if name not in siblings and _source(look, name)
    ]
    moved = ", ".join(siblings)
    text = f"{moved} will follow the new primary" if moved else "none has to be repointed"
    return [*checks, Check("siblings", Outcome.OK, "; ".join((text, *cascading)))]


def catalog_checks(shard: ShardServers, look: Look, former: str) -> list[Check]:
    """Return the checks of what is written down: can it be, and is nothing unfinished."""
    return [*_of_catalog(look, former), *_of_operations(shard, former, look)]


def _of_catalog(look: Look, former: str) -> list[Check]:
    row = look.rows.get(former)
    if row is None:
        text = (
            f"{former} has no sqlroute catalog that the operator can read, so that nothing could "
            "be written down; run `sqlroute catalog install`, or name a role with rights in it in "
            "[operator]"
        )
        return [Check("catalog", Outcome.REFUSED, text)]
    if not look.facts[former].told["rights"]["catalog"]:
        text = (
            f"the operator's role may not write into the sqlroute catalog of {former}; GRANT "
            "INSERT, UPDATE ON ALL TABLES IN SCHEMA sqlroute TO it, or name another in [operator]"
        )
        return [Check("catalog", Outcome.REFUSED, text)]
    return [Check("catalog", Outcome.OK, f"epoch {row.epoch} of shard {row.name}")]


def _of_operations(shard: ShardServers, former: str, look: Look) -> list[Check]:
    if former not in look.rows:
        return []
    running = [found for found in operations(shard.servers[former]) if found.is_running]
    return [
        Check(
            "operations",
            Outcome.REFUSED,
            f"operation {found.id} ({found.kind}) has not ended; look at it with `sqlroute op show "
            f"{found.id}`, then `sqlroute op resume {found.id}` or `sqlroute op abort {found.id}`",
        )
        for found in running
    ] or [Check("operations", Outcome.OK, "none is under way")]


def _lag(look: Look, former: str, candidate: str) -> int:
    return max(0, look.facts[former].received - look.facts[candidate].replayed)


# Failover


@dataclass(frozen=True, slots=True)
class Loss:
    """What a failover to a node may lose of what was acknowledged.

    Attributes:
        known_bytes: by the newest position that connected routers have acknowledged; ``None`` if
            no router is connected, so that nobody knows.
        quorum: what synchronous replication proves; empty if nothing.
    """

    chosen: str
    position: str
    newest: str
    known_bytes: int | None
    quorum: str = ""

    @property
    def text(self) -> str:
        has = f"{self.chosen} has received up to {self.position}"
        if self.quorum:
            return f"{has}; nothing acknowledged is lost: {self.quorum}"
        if self.known_bytes is None:
            return f"{has}; what is lost is not known: no router is connected that could tell"
        if self.known_bytes == 0:
            newest = f" ({self.newest})" if self.newest else ""
            return f"{has}; nothing that the connected routers have acknowledged{newest} is lost"
        return (
            f"{has}, the connected routers have acknowledged up to {self.newest}: up to "
            f"{self.known_bytes} bytes are lost"
        )

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "text": self.text}

    def refusal(self, wishes: Wishes) -> str:
        """Return why the loss is too much, empty if it is not."""
        if self.quorum or wishes.accepts_loss:
            return ""
        if self.known_bytes is None:
            return f"{self.text}; pass --accept-data-loss if that is meant"
        if self.known_bytes > wishes.max_loss_bytes:
            return (
                f"{self.text}, more than --max-loss-bytes {wishes.max_loss_bytes}; start the old "
                "primary again if it can be, or pass --accept-data-loss"
            )
        return ""


def chosen(look: Look, candidates: Iterable[str]) -> str:
    """Return the replica that has received most: the newest timeline, then the position."""
    return max(candidates, key=lambda name: received(look.facts[name]))


def received(facts: NodeFacts) -> tuple[int, int]:
    return facts.timeline, facts.received


def loss(look: Look, candidate: str, asked: Iterable[str], names: str, replicas: int) -> Loss:
    """Return what is lost if a node is promoted that has all that the asked ones have received.

    Args:
        asked: the replicas that have told what they have received, and receive no more.
        names: ``synchronous_standby_names`` of the former primary.
        replicas: how many there are at all.
    """
    facts = look.facts[candidate]
    at = received(facts)
    newest = newest_seen(look)
    known = None
    if newest is not None:
        known = 0 if newest <= at else max(newest[1] - at[1], 1)
    quorum = synchronous.parsed(names)
    called = {look.facts[name].setting("cluster_name") or name for name in asked}
    proof = ""
    if quorum is not None and quorum.is_proved(called, replicas):
        proof = (
            f"each commit was flushed by {quorum}, and {len(called)} of {replicas} were asked "
            f"(needed: {quorum.needed(replicas)})"
        )
    return Loss(
        candidate,
        _shown(at),
        "" if not newest or newest == (0, 0) else _shown(newest),
        known,
        proof,
    )


def _shown(position: tuple[int, int]) -> str:
    return f"{position[0]}/{format_lsn(position[1])}"


def parse_position(text: str) -> tuple[int, int]:
    timeline, _, lsn = text.partition("/")
    return int(timeline), parse_lsn(lsn)
