"""Unplanned promotion: proof that the primary is gone, and the replica that has received most.

``look`` and ``proof`` change nothing; the first thing that does is that no replica receives any
more, so that no commit can be acknowledged late. What may be lost is said before and, with all that
was received by then, once more after that; where it is too much the replicas receive again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from sqlroute.errors import DriverError, OperationFailed, OperationRefused
from sqlroute.ops import fencing, planning, preflight, rejoining, steps
from sqlroute.ops.drivers import Ability
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Loss, Plan, Wishes
from sqlroute.ops.preflight import Check, NodeFacts, Outcome
from sqlroute.ops.promotion import Promotion, Report, Told, tell_nobody
from sqlroute.ops.records import new_id
from sqlroute.ops.server import stopped_from, wait_for
from sqlroute.ops.shard import Look, ShardServers, is_down
from sqlroute.ops.steps import Change, StepName
from sqlroute.routing.token import format_lsn

PROBES = 3
"""How often a primary that does not answer is asked before it is taken for gone."""

QUIET = 0.1
"""Seconds without progress after which a recovery that waits for log has replayed all it can."""

BUSY = 1.0
"""The same of a recovery that waits for nothing: it reads the half of a record again and again."""

_AWAITS_LOG = ("RecoveryWalStream", "RecoveryRetrieveRetryInterval")

BETWEEN_PROBES = 0.02
"""Seconds between two of them."""

_SUPERSEDED = """
UPDATE sqlroute.operation SET state = 'failed', finished = clock_timestamp()
 WHERE state = 'running' AND id <> %s
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """Why a primary is taken for gone, or why not.

    Attributes:
        texts: what was seen.
        against: what speaks against it; with it a failover needs ``--force``.
        needs_kill: it would be proof to kill the server, which hangs, by its driver.
    """

    texts: tuple[str, ...]
    against: tuple[str, ...] = ()
    needs_kill: bool = False

    @property
    def holds(self) -> bool:
        return not self.against


def proof(look: Look, former: str, *, is_seen_down: bool, can_kill: bool) -> Proof:
    """Judge by what was seen whether a primary takes no more writes. Pure.

    Args:
        is_seen_down: a driver has seen that none of its processes is there.
        can_kill: a driver can end it.
    """
    replicas = [facts for facts in look.facts.values() if facts.is_replica]
    silent = [f for f in look.facts.values() if not f.answers and f.name != former]
    receiving = [facts for facts in replicas if _receives(facts, former)]
    texts = [look.facts[former].error] if former else ["no node is a primary"]
    against = []
    if is_seen_down:
        texts.append(f"{former}: its driver sees no process of it")
        return Proof(tuple(texts))
    if receiving:
        names = ", ".join(f"{f.name} ({_age(f)})" for f in receiving)
        against.append(
            f"{names} may still receive from {former}; a driver that can kill it would be proof, "
            "see [drivers]"
        )
    else:
        texts.append("no replica receives from it" if replicas else "there is no replica")
    against += [
        f"{facts.name} does not answer either ({facts.error}), and may still receive from {former}"
        for facts in silent
        if not facts.is_refused
    ]
    if former and can_kill:
        texts.append(f"the driver of {former} kills whatever may be left of it")
        return Proof(tuple(texts), needs_kill=True)
    return Proof(tuple(texts), tuple(against))


def _receives(facts: NodeFacts, former: str) -> bool:
    """Say if a replica may still be connected to the primary.

    Its receiver says ``streaming`` for up to ``wal_receiver_timeout`` after the last message. After
    half of that it has asked the primary for an answer, which a living one gives at once.
    """
    receiver = facts.told.get("receiver")
    if receiver is None or receiver["status"] != "streaming" or facts.upstream not in (former, ""):
        return False
    timeout = float(facts.setting("wal_receiver_timeout") or 0) / 1000
    age = float(receiver["age"] or 0)
    return timeout <= 0 or age < timeout / 2 + 5


def _age(facts: NodeFacts) -> str:
    receiver: Any = facts.told["receiver"]
    return f"last message {float(receiver['age'] or 0):.1f} s ago"


def former_of(look: Look, nodes: Iterable[str]) -> str:
    """Return the node that was the primary: what the catalog says, else whom the replicas follow.

    Empty if nobody knows.
    """
    names = list(nodes)
    newest = max(look.rows.values(), key=lambda row: row.epoch, default=None)
    if newest is not None and newest.node in names and not look.facts[newest.node].is_replica:
        return newest.node
    followed = [name for name in look.follows.values() if name and not look.facts[name].answers]
    if followed:
        return max(set(followed), key=followed.count)
    silent = [name for name in names if not look.facts[name].answers]
    return silent[0] if len(silent) == 1 else ""


def plan_failover(shard: ShardServers, look: Look, wishes: Wishes) -> Plan:
    """Plan a failover by how the shard stands now; changes nothing.

    Raises:
        OperationRefused: the primary lives, or there is nobody to promote.
    """
    if is_unannounced(look):
        return _plan_of_rest(shard, look, wishes)
    if look.primaries:
        undone = f"`sqlroute op abort failover-{shard.name}` lets its replicas receive again; "
        raise OperationRefused(
            f"{', '.join(look.primaries)} is the primary of shard {shard.name} and answers: "
            f"{undone if is_interrupted(look) else ''}`sqlroute promote {shard.name}` loses "
            "nothing; stop it first if it must go"
        )
    former = former_of(look, shard.nodes)
    replicas = [name for name, facts in look.facts.items() if facts.is_replica]
    if wishes.to:
        shard.server(wishes.to)
        if wishes.to not in replicas:
            why = look.facts[wishes.to].error or "it is no replica"
            raise OperationRefused(f"{wishes.to} cannot be promoted: {why}; name another with --to")
    if not replicas:
        silent = "; ".join(f.error for f in look.facts.values() if f.error)
        raise OperationRefused(
            f"no replica of shard {shard.name} answers ({silent}): there is nothing to promote; "
            "start a node, or restore a backup"
        )
    candidate = wishes.to or planning.chosen(look, replicas)
    change = Change(
        operation=new_id(),
        shard=shard.name,
        epoch=look.epoch + 1,
        former=former,
        candidate=candidate,
        siblings=_siblings(look, candidate, former),
        rejoins=False,
        kind="failover",
    )
    found = _proof_of(shard, look, former)
    most = planning.chosen(look, replicas)
    expected = _loss(shard, look, most, replicas, former, wishes)
    checks = _checks(shard, look, candidate, found, expected, wishes)
    left = tuple(steps.failover(change, planning.standing(change, look)))
    return Plan(change, wishes.level or Level.L4, wishes, tuple(checks), left)


def failover(shard: ShardServers, plan: Plan, told: Told = tell_nobody) -> Report:
    """Run a failover.

    Raises:
        OperationRefused: it is not proved that the primary is gone, or too much would be lost;
            everything is as before.
        OperationFailed: it failed midway; run it again.
    """
    if plan.refusals:
        raise OperationRefused(plan.refusals)
    run = Failover(shard, plan.change, plan.level, plan.wishes, told)
    run.look = shard.look()
    if not run.look.facts[plan.change.candidate].is_primary:
        is_open = replace(plan.change, candidate="")
        run.run(steps.failover(is_open, planning.standing(is_open, run.look)))
    standing = planning.standing(run.change, run.look)
    run.run(steps.failover(run.change, replace(standing, is_gone=True, is_chosen=True)))
    return run.report()


class Failover(Promotion):
    """An unplanned promotion, or what is left of one.

    Attributes:
        look: the newest at the shard.
    """

    look: Look

    unwritten = frozenset(StepName) - {StepName.VERIFY}

    def prove(self) -> dict[str, Any]:
        """See once more that the primary is gone; kill one that hangs where that is the proof."""
        self._paused_at = time.monotonic()
        former = self.change.former
        found = _proof_of(self.shard, self.look, former, probes=1)
        is_back = bool(self.look.primaries)  # not even --force means that
        if not found.holds and (is_back or not self.wishes.force):
            raise OperationRefused(found.against)
        if found.needs_kill:
            driver = self.shard.driver(former, Ability.KILL)
            if driver is not None:
                driver.kill(self.wishes.timeout)
                self.fence_held = Level.L4
        return {"proof": list(found.texts), "forced": not found.holds}

    def blank(self) -> dict[str, Any]:
        """Let no replica receive any more: what is acknowledged from now on is none of ours."""
        names = steps.receiving(planning.standing(self.change, self.look))
        if names:
            self.shard.each(self._stop_receiving, names)
        return {"stopped": list(names)}

    def choose(self) -> dict[str, Any]:
        """Choose who has received most, say what is lost; where too much is, undo the last step."""
        look = self.look = self.shard.look()
        replicas = [name for name, facts in look.facts.items() if facts.is_replica]
        if not replicas:
            raise OperationFailed("no replica answers any more")
        most = planning.chosen(look, replicas)
        self._note_routers(look)
        loss = _loss(self.shard, look, most, replicas, self.change.former, self.wishes)
        refusal = loss.refusal(self.wishes)
        if refusal:
            undo(self.shard)
            raise OperationRefused(refusal)
        candidate = self.change.candidate
        if self.wishes.to and planning.received(look.facts[candidate]) < planning.received(
            look.facts[most]
        ):
            self._catch_up_from(most)
        elif not self.wishes.to and candidate != most:
            self.change = replace(
                self.change,
                candidate=most,
                siblings=_siblings(look, most, self.change.former),
            )
        self.loss = replace(loss, chosen=self.change.candidate)
        return {"loss": self.loss.text}

    def fence(self) -> dict[str, Any]:
        """Fence the old primary as far as it can be reached, and say how far that is."""
        detail: dict[str, Any] = {}
        former = self.change.former
        driver = self.shard.driver(former, Ability.KILL) if former else None
        if driver is not None:
            try:
                driver.kill(self.wishes.timeout)
                self.fence_held = Level.L4
            except DriverError as error:
                detail["driver"] = str(error)
        hook = self.shard.driver(former, Ability.FENCE) if former else None
        if hook is not None and (self.level is Level.L5 or self.fence_held < Level.L4):
            try:
                hook.fence(self.wishes.timeout)
                self.fence_held = Level.L5
            except DriverError as error:
                detail["hook"] = str(error)
        if self.fence_held is Level.NONE and former:
            with contextlib.suppress(OperationFailed, DriverError):
                self.fence_held = self._fence_in_sql()
        return {"fence": self.fence_held.name, **detail}

    def catch_up(self) -> dict[str, Any]:
        """Wait until the candidate has replayed all that it has received.

        What it has received may end within a record, which nobody can replay: the primary was lost
        while it sent a long one. Then recovery has got no further for a while. To go on too early
        would lose nothing: a promotion itself first replays all that is there.
        """
        server = self._candidate
        last, position, since = server.received(), 0, time.monotonic()

        def has_all() -> bool:
            nonlocal position, since
            found = server.position()
            if found > position:
                position, since = found, time.monotonic()
            if position >= last:
                return True
            quiet = time.monotonic() - since
            if quiet < QUIET:
                return False
            event = server.recovery_event()
            return event in _AWAITS_LOG or (quiet >= BUSY and not event)

        if not wait_for(has_all, timeout=self.wishes.timeout, pause=0.001):
            raise OperationFailed(
                f"{server.name} has replayed {format_lsn(position)} after {self.wishes.timeout:g} "
                f"s, and not {format_lsn(last)}, which it has received; is its replay paused?"
            )
        self._last_position = position
        return {"last_position": format_lsn(position), "half_record_bytes": max(last - position, 0)}

    def repoint(self) -> dict[str, Any]:
        """Let the siblings follow the new primary; who does not is told of by the verification."""
        self._await_first_write()
        host, port = self.shard.address(self.change.candidate)
        slots = rejoining.slots(self.shard, self._answering(self.change.siblings))

        def follow(name: str) -> None:
            slot = slots[name] or None
            if slot is not None:
                self._candidate.create_slot(slot)
            self.shard.servers[name].follow(host, port, slot)

        if slots:
            self.shard.each(follow, slots)
        return {"repointed": list(slots)}

    def close(self) -> dict[str, Any]:
        """Write the end down; the old primary waits for its rejoin, as a standby if it starts."""
        quarantine = self._quarantine()
        if self.fence_held is Level.NONE and self.change.former:
            former = self.change.former
            self.waiting[former] = (
                f"is NOT fenced: routers refuse it by its epoch, nothing stops other clients; run "
                f"`sqlroute fence {former} --wait 60`, then `sqlroute rejoin {former}`"
            )
        return {**super().close(), "quarantine": quarantine}

    # inside

    def _before_journal(self) -> Iterable[tuple[str, Any]]:
        change = self.change
        return (
            (_SUPERSEDED, (change.operation,)),
            *self.records.begin_statements(change.kind, change.shard, self.written_plan()),
        )

    def _stop_receiving(self, name: str) -> None:
        server = self.shard.servers[name]
        server.stop_receiving()
        if not wait_for(lambda: server.receiver() is None, timeout=self.wishes.timeout):
            raise OperationFailed(
                f"the receiver of {name} does not end; end it by hand, then run this again"
            )

    def _note_routers(self, look: Look) -> None:
        for facts in look.facts.values():
            if facts.answers:
                self._note_names(facts.told.get("monitors") or ())

    def _catch_up_from(self, most: str) -> None:
        """Let the node that is wanted receive the rest from the one that has most."""
        wanted = self._candidate
        target = self.shard.servers[most].received()
        host, port = self.shard.address(most)
        wanted.follow(host, port)
        if not wait_for(
            lambda: wanted.received() >= target, timeout=self.wishes.timeout, pause=0.005
        ):
            undo(self.shard)
            raise OperationFailed(
                f"{wanted.name} has not received from {most} what it lacks after "
                f"{self.wishes.timeout:g} s; leave --to out to promote {most}"
            )
        self._stop_receiving(wanted.name)

    def _quarantine(self) -> str:
        """Let the next start of the old primary be that of a standby, whoever starts it."""
        former = self.change.former
        driver = self.shard.driver(former, Ability.CONFIGURE, Ability.KILL) if former else None
        if driver is None:
            return "none: it has no driver that could"
        if self._is_standby(former):
            return "none: it is a replica again"
        try:
            driver.kill(self.wishes.timeout)  # whoever has started it again in the meantime
            driver.make_standby(rejoining.conninfo(self.shard, former, self.change.candidate), None)
        except DriverError as error:
            return f"none: {error}"
        self.fence_held = max(self.fence_held, Level.L4)
        return "it can only start as a standby"

    def _is_standby(self, name: str) -> bool:
        try:
            return self.shard.servers[name].is_standby()
        except OperationFailed:
            return False

    def _fence_in_sql(self) -> Level:
        facts = self.shard.look().facts[self.change.former]
        level = preflight.strongest_in_sql(facts) if facts.is_primary else Level.NONE
        if level is Level.NONE:
            return level
        timeout, epoch = self.wishes.timeout, self.change.epoch
        return fencing.fence(self.shard, self.change.former, level, epoch, timeout).level

    def _answering(self, names: Iterable[str]) -> list[str]:
        found = []
        for name in names:
            if fencing.is_up(self.shard.servers[name]):
                found.append(name)
            else:
                self.waiting[name] = f"does not answer; run `sqlroute rejoin {name}` when it does"
        return found


def is_interrupted(look: Look) -> bool:
    """Say if a failover has not ended: replicas are stopped, or a promotion is not announced."""
    return is_unannounced(look) or any(
        facts.is_replica and _was_stopped(facts) for facts in look.facts.values()
    )


def undo(shard: ShardServers) -> list[str]:
    """Let replicas that a failover has stopped receive again, as they did; return their names.

    Where another node has become the primary since, they follow that.

    Raises:
        OperationFailed: one does not answer, or the failover has promoted a replica already.
    """
    look = shard.look()
    if is_unannounced(look):
        raise OperationFailed(
            f"{look.primaries[0]} is promoted already: the failover can only be finished; run "
            f"`sqlroute op resume failover-{shard.name}`"
        )
    primary = look.primaries[0] if len(look.primaries) == 1 else ""
    found = []
    for name, server in shard.servers.items():
        if not fencing.is_up(server) or not server.is_standby():
            continue
        was = server.stopped_from()
        if was is not None:
            source = shard.address(primary) if primary else was
            server.follow(*source, server.setting("primary_slot_name") or None)
            found.append(name)
    return found


def _was_stopped(facts: NodeFacts) -> bool:
    return stopped_from(conninfo_to_dict(facts.setting("primary_conninfo"))) is not None


def is_unannounced(look: Look) -> bool:
    """Say if the one primary is on a newer timeline than the catalog knows: not yet announced."""
    if len(look.primaries) != 1 or look.facts[look.primaries[0]].managed_by:
        return False
    (name,) = look.primaries
    row = look.rows.get(name)
    return (
        row is not None and bool(row.timeline) and look.facts[name].timeline > (row.timeline or 0)
    )


def _plan_of_rest(shard: ShardServers, look: Look, wishes: Wishes) -> Plan:
    """Plan what is left after a promotion that nobody has announced: of a command that was killed,
    or by hand."""
    (candidate,) = look.primaries
    row = look.rows[candidate]
    former = row.node if row.node in shard.nodes and row.node != candidate else ""
    siblings = tuple(name for name, f in look.facts.items() if f.is_replica)
    change = Change(
        operation=new_id(),
        shard=shard.name,
        epoch=look.epoch + 1,
        former=former or "",
        candidate=candidate,
        siblings=siblings,
        rejoins=False,
        kind="failover",
    )
    text = f"{candidate} was promoted (timeline {look.facts[candidate].timeline}), not announced"
    checks = (Check("primary", Outcome.WARNING, f"{text}: what is left of that is done"),)
    standing = planning.standing(change, look)
    left = tuple(steps.failover(change, standing))
    return Plan(change, wishes.level or Level.L4, wishes, checks, left)


def _proof_of(shard: ShardServers, look: Look, former: str, *, probes: int = PROBES) -> Proof:
    if not former:
        return proof(look, former, is_seen_down=False, can_kill=False)
    if look.facts[former].is_primary:
        return Proof((), (f"{former} answers and is the primary",))
    server = shard.servers[former]
    for _ in range(probes - 1):
        time.sleep(BETWEEN_PROBES)
        if fencing.is_up(server):
            return Proof((), (f"{former} answers again",))
    driver = shard.drivers[former]
    return proof(
        look,
        former,
        is_seen_down=is_down(driver),
        can_kill=shard.driver(former, Ability.KILL) is not None,
    )


def _loss(
    shard: ShardServers, look: Look, chosen: str, replicas: list[str], former: str, wishes: Wishes
) -> Loss:
    names = wishes.synchronous or _synchronous(shard, look, former)
    count = len([name for name in shard.nodes if name != former])
    return planning.loss(look, chosen, replicas, names, count)


def _synchronous(shard: ShardServers, look: Look, former: str) -> str:
    """Return ``synchronous_standby_names`` of a primary that is gone.

    By its own files where a driver reads them, else what all replicas have, which are usually
    configured alike; else nothing is known, and nothing proved.
    """
    driver = shard.driver(former, Ability.CONFIGURE) if former else None
    if driver is not None:
        with contextlib.suppress(DriverError):
            own = driver.settings().get("synchronous_standby_names")
            if own is not None:
                return own
    found = {
        facts.setting("synchronous_standby_names")
        for facts in look.facts.values()
        if facts.is_replica
    }
    return found.pop() if len(found) == 1 else ""


def _siblings(look: Look, candidate: str, former: str) -> tuple[str, ...]:
    """Return the replicas that must follow the candidate; those of other replicas stay theirs."""
    found = []
    for name, facts in look.facts.items():
        follows = look.follows.get(name) or facts.upstream
        if facts.is_replica and name != candidate and follows in ("", former, candidate):
            found.append(name)
    return tuple(found)


def _checks(
    shard: ShardServers,
    look: Look,
    candidate: str,
    found: Proof,
    expected: Loss,
    wishes: Wishes,
) -> list[Check]:
    managed = sorted({f"{f.name} by {f.managed_by}" for f in look.facts.values() if f.managed_by})
    checks = [
        Check(
            "managed",
            Outcome.REFUSED,
            f"shard {shard.name} is run by another engine ({', '.join(managed)}), which decides "
            "itself; use its own command",
        )
        for _ in managed[:1]
    ]
    checks += [Check("proof", Outcome.OK, text) for text in found.texts]
    for text in found.against:
        outcome = Outcome.WARNING if wishes.force else Outcome.REFUSED
        how = "forced" if wishes.force else "stop it for sure and pass --force"
        checks.append(Check("proof", outcome, f"{text}; {how}"))
    refusal = expected.refusal(wishes)
    if refusal:
        checks.append(Check("loss", Outcome.REFUSED, refusal))
    else:
        checks.append(Check("loss", Outcome.OK, expected.text))
    new = look.facts[candidate]
    if new.told["pause_state"] not in (None, "not paused"):
        checks.append(
            Check(
                "replay",
                Outcome.REFUSED,
                f"the replay of {candidate} is paused; run SELECT pg_wal_replay_resume() there, or "
                "name another with --to",
            )
        )
    if candidate not in look.rows:
        checks.append(
            Check(
                "catalog",
                Outcome.REFUSED,
                f"{candidate} has no sqlroute catalog: its promotion could not be announced",
            )
        )
    if not new.may("promote"):
        checks.append(
            Check(
                "rights",
                Outcome.REFUSED,
                f"the operator's role may not promote {candidate}; name a superuser in [operator]",
            )
        )
    return checks
