"""Promotion of a shard that Patroni runs: it decides and does it, users see a delay, not errors.

Around Patroni's own switchover sqlroute does what Patroni cannot: routers hold new write
transactions, those under way end, the new primary gets the next epoch and the row of the journal,
and the routers go on. Nothing is fenced, repointed or started here: that is Patroni's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.ext.patroni import Cluster, Member, Patroni
from sqlroute.ops import planning, steps
from sqlroute.ops.fences import Level
from sqlroute.ops.planning import Plan, Wishes
from sqlroute.ops.preflight import Check, Outcome
from sqlroute.ops.promotion import Report, Told, tell_nobody
from sqlroute.ops.records import new_id
from sqlroute.ops.server import wait_for
from sqlroute.ops.shard import Look, ShardServers
from sqlroute.ops.steps import Change, Step
from sqlroute.ops.switchover import Switchover

KIND = "patroni switchover"
DEMOTION = 10.0
"""Seconds that Patroni may take beside the drain: its own pause is 2 to 3."""


def plan_switchover(shard: ShardServers, look: Look, wishes: Wishes, patroni: Patroni) -> Plan:
    """Plan what Patroni is to be asked for; changes nothing.

    Raises:
        OperationRefused: the cluster has no leader, or nobody else that could be it.
        PatroniSilent: its REST API does not answer.
    """
    cluster = patroni.cluster()
    former = planning.primary_for_switchover(shard, look)
    if wishes.to:
        shard.server(wishes.to)
    if wishes.to == former:
        raise OperationRefused(f"{former} is the primary of shard {shard.name} already")
    candidate = wishes.to or _best(shard, cluster, former)
    change = Change(
        operation=new_id(),
        shard=shard.name,
        epoch=look.epoch + 1,
        former=former,
        candidate=candidate,
        kind=KIND,
    )
    checks = [
        *_of_cluster(shard, cluster, former, candidate, wishes),
        *planning.catalog_checks(shard, look, former),
    ]
    left = tuple(steps.delegated(change, planning.standing(change, look)))
    return Plan(change, Level.L4, wishes, tuple(checks), left)


def switchover(
    shard: ShardServers, plan: Plan, patroni: Patroni, told: Told = tell_nobody
) -> Report:
    """Have Patroni switch over, with everything around it.

    Raises:
        OperationRefused: by the plan, or by Patroni; everything is as before.
        OperationFailed: it is not known to have happened; says how it goes on.
    """
    if plan.refusals:
        raise OperationRefused(plan.refusals)
    run = PatroniSwitchover(shard, plan.change, plan.level, plan.wishes, told)
    run.patroni = patroni
    return run.finish(iter(plan.steps))


class PatroniSwitchover(Switchover):
    """One run of a switchover that is Patroni's.

    Attributes:
        patroni: the REST API of the shard's cluster.
    """

    patroni: Patroni

    def finish(self, left: Iterator[Step]) -> Report:
        """Do what is left; where Patroni refuses, the routers go on as before."""
        try:
            self.run(left)
        except OperationRefused:
            if not self._candidate.is_standby():
                raise
            self.give_up()
            raise
        return self.report()

    def give_up(self) -> Report:
        """Let the routers go on with the former primary.

        Raises:
            OperationFailed: it is none any more.
        """
        if self._old.is_standby():
            raise OperationFailed(
                f"{self.change.former} is no primary any more: the operation can only be finished; "
                f"run `sqlroute op resume {self.change.operation}`",
                operation=self.change.operation,
            )
        self._old.release()
        report = self.report("aborted")
        self.records.end(self._old, "aborted", report.document())
        return report

    def hold(self) -> dict[str, Any]:
        """Have the routers begin no write transactions, for as long as Patroni may take."""
        return self.hold_for(self.wishes.max_drain + self.wishes.timeout + DEMOTION)

    def promote(self) -> dict[str, Any]:
        """Ask Patroni, and wait until the new leader is the primary."""
        cluster = self.patroni.cluster()
        former = _member(self.shard, cluster, self.change.former)
        wanted = _member(self.shard, cluster, self.change.candidate)
        found = self.patroni.switchover(former.name, wanted.name, self.wishes.timeout)
        if found.leader != wanted.name:
            self.change = replace(
                self.change, candidate=_node_of(self.shard, self.patroni.cluster(), found.leader)
            )
        self.fence_held = Level.L4
        server = self._candidate
        if not wait_for(lambda: not server.is_standby(), timeout=self.wishes.timeout):
            raise OperationFailed(f"{server.name} leads the cluster and is still in recovery")
        return {"leader": found.leader, "patroni_ms": round(found.seconds * 1000, 1)}

    def verify(self) -> dict[str, Any]:
        """See that all members replay the journal's row, the former primary as a replica too."""
        detail = super().verify()
        if not self._has_replayed(self.change.former):
            self.waiting[self.change.former] = (
                "has not come back as a replica yet; see `patronictl list`"
            )
        return {**detail, "former_wrote": "nothing: Patroni has stopped it"}

    def _has_replayed(self, name: str) -> bool:
        """Wait for a member, also while Patroni starts it again."""
        server = self.shard.servers[name]

        def has_row() -> bool:
            try:
                return server.is_standby() and server.journal_epoch() >= self.change.epoch
            except OperationFailed:
                return False

        return wait_for(has_row, timeout=self.wishes.timeout, pause=0.05)


def _best(shard: ShardServers, cluster: Cluster, former: str) -> str:
    """Return the node that Patroni would take: synchronous ones first, then the least lag."""
    found = [m for m in cluster.members if m.role != "leader" and not _why_not(m)]
    names = {m.name: _name(shard, m) for m in found}
    found = [m for m in found if names[m.name] not in ("", former)]
    if not found:
        reasons = "; ".join(f"{m.name} {_why_not(m)}" for m in cluster.members if _why_not(m))
        raise OperationRefused(
            f"the cluster {cluster.scope} has no member to promote ({reasons or 'one member'}); "
            "see `patronictl list`"
        )
    best = min(found, key=lambda m: (not m.role.endswith("standby"), m.lag_bytes or 0))
    return names[best.name]


def _why_not(member: Member) -> str:
    if member.role == "leader":
        return ""
    if str(member.tags.get("nofailover", "")).lower() in ("true", "yes", "on", "1"):
        return "is tagged nofailover"
    if member.state not in ("running", "streaming"):
        return f"is {member.state}"
    return ""


def _of_cluster(
    shard: ShardServers, cluster: Cluster, former: str, candidate: str, wishes: Wishes
) -> list[Check]:
    leader = cluster.leader
    if leader is None or _name(shard, leader) != former:
        who = leader.name if leader else "nobody"
        text = f"Patroni says that {who} leads, {former} is the primary; see `patronictl list`"
        return [Check("patroni", Outcome.REFUSED, text)]
    member = _member(shard, cluster, candidate)
    checks = [Check("patroni", Outcome.OK, f"{leader.name} leads the cluster {cluster.scope}")]
    why = _why_not(member)
    lag = member.lag_bytes
    if why:
        checks.append(Check("candidate", Outcome.REFUSED, f"{member.name} {why}"))
    elif lag is not None and lag > wishes.max_lag_bytes:
        text = f"{member.name} is {lag} bytes behind (limit {wishes.max_lag_bytes}); wait"
        checks.append(Check("candidate", Outcome.REFUSED, text))
    else:
        checks.append(Check("candidate", Outcome.OK, f"{member.name} is {member.state}"))
    if cluster.is_paused:
        text = "Patroni is paused: it does this, and nothing else by itself"
        checks.append(Check("patroni", Outcome.WARNING, text))
    if cluster.scheduled is not None:
        text = (
            f"Patroni will switch over by itself at {cluster.scheduled.at}; flush that first with "
            "`patronictl flush`"
        )
        checks.append(Check("patroni", Outcome.REFUSED, text))
    if wishes.level is not None:
        text = f"the fence is Patroni's: {wishes.level.name} is not used"
        checks.append(Check("fence", Outcome.WARNING, text))
    return checks


def _member(shard: ShardServers, cluster: Cluster, node: str) -> Member:
    found = [member for member in cluster.members if _name(shard, member) == node]
    if not found:
        names = ", ".join(member.name for member in cluster.members)
        raise OperationRefused(
            f"{node} is no member of the cluster {cluster.scope} by its address; members: {names}"
        )
    return found[0]


def _name(shard: ShardServers, member: Member) -> str:
    """Return the node that a member is, empty if none of the shard's."""
    return shard.named(member.host, member.port) if member.host else ""


def _node_of(shard: ShardServers, cluster: Cluster, member: str) -> str:
    found = cluster.member(member)
    name = _name(shard, found) if found is not None else ""
    if not name:
        raise OperationFailed(f"the new leader {member} is no node of shard {shard.name}")
    return name
