"""Choose the node of one shard for one statement, and whether it runs in a transaction.

Pure: what is known, what was seen and what is asked for are given as a :class:`Situation`. Where a
fact is missing that a server could tell, a :class:`Question` is raised; the runtime asks and plans
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from sqlroute.errors import (
    CrossShardRefused,
    ForeignToken,
    LostTimeline,
    NoEligibleNode,
    NoPrimary,
    PlanError,
    ReadOnlyRefused,
    ShardMapUnavailable,
)
from sqlroute.health import Health, NodeHealth, Role, State
from sqlroute.routing.affinity import Affinity, ShardAffinity
from sqlroute.routing.balancing import (
    NOTHING,
    Candidates,
    Pool,
    Required,
    candidates,
    choose,
    describe_token,
    fallback_rate,
    in_doubt,
    patience,
    pool_of,
    refusal,
)
from sqlroute.routing.plan import Target
from sqlroute.routing.policy import AUTOMATIC, Consistency, Demand, Intent, Policy
from sqlroute.routing.statement import Kind, Statement
from sqlroute.routing.token import Position, format_lsn
from sqlroute.topology import Keyspace, Reader, ShardMap, Topology


@dataclass(frozen=True, slots=True)
class History:
    """Where the timelines of a shard ended, as its newest one tells.

    Attributes:
        timeline: the newest one.
        ends: LSN at which each earlier one was left, in bytes; empty when it could not be read.
    """

    timeline: int
    ends: Mapping[int, int] = field(default_factory=dict)


@dataclass(slots=True)  # not frozen: one is made per statement, and freezing costs 4 us
class Situation:
    """Everything outside the statement that a plan depends on.

    Attributes:
        maps: the shard map of each sharded keyspace, by its name.
        loads: the statements under way per node.
        exclude: nodes that failed this very statement.
        may_wait: say that a replica must be proved fresh, rather than fall back to the primary.
        floors: per shard, what covers all that the node of the session's last read has shown.
        histories: of the shards' timelines, as far as they were asked for.
        process: names this process among all that read from the same nodes.
        turns: a counter for each shard, for round robin.
        admit: asked with the shard and the reads per second that its primary may take in place of
            replicas; says if it may take this one. Without it there is no limit.
        silent: shards that were asked to confirm the shard map and did not, with what to say.
        may_repeat: nodes of ``exclude`` may be tried once more when nothing else is left.
        readers: returns the coordinator's databases that read replicas, ``None`` where they must be
            asked for first. Without it there are none.
    """

    topology: Topology
    policy: Policy
    health: Health
    maps: Mapping[str, ShardMap]
    affinity: Affinity
    loads: Mapping[str, Collection[object]]
    demand: Demand = AUTOMATIC
    exclude: frozenset[str] = frozenset()
    may_wait: bool = False
    floors: Mapping[str, Position] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)
    process: str = ""
    turns: Mapping[str, Iterator[int]] | None = None
    admit: Callable[[str, float], bool] | None = None
    may_repeat: bool = False
    readers: Callable[[Keyspace], tuple[Reader, ...] | None] | None = None
    silent: Mapping[str, ShardMapUnavailable] = field(default_factory=dict)

    def renew(self, health: Health, maps: Mapping[str, ShardMap]) -> None:
        """Take over what has become known meanwhile."""
        self.topology, self.health, self.maps = health.topology, health, maps


class Question(Exception):  # no error: it asks the runtime for a fact
    """A fact is missing that servers know; ask them, then plan again."""

    def __init__(self, shard: str) -> None:
        super().__init__(shard)
        self.shard = shard


class Unproven(Question):
    """No replica is known to have replayed what the session has seen.

    Attributes:
        patience: seconds that it is worth to wait for one.
    """

    def __init__(self, shard: str, patience: float) -> None:
        super().__init__(shard)
        self.patience = patience


class UnknownHistory(Question):
    """A token is of an earlier timeline, and where that one ended is not known yet."""


class UnknownReaders(Exception):  # no error: it asks the runtime for a fact
    """Nobody has asked yet which replicas a coordinator's databases read."""

    def __init__(self, keyspace: Keyspace) -> None:
        super().__init__(keyspace.name)
        self.keyspace = keyspace


def kind_of(statement: Statement, situation: Situation) -> Kind:
    """Return what a statement counts as, with what the caller vouches for.

    Raises:
        PlanError: what the caller asks for is not to be had for it.
        ReadOnlyRefused: only reads were declared, and it is none.
    """
    kind, demand = statement.kind, situation.demand
    if kind is Kind.READ:
        return Kind.VOUCHED if statement.calls_foreign and not demand.only_reads else kind
    if demand.partial:
        raise PlanError(
            f"sqlroute_partial on what is not proved to be a read ({statement.reasons[0]}): only "
            "reads are answered without a shard; leave it out"
        )
    if demand.role is Role.REPLICA:
        if kind is Kind.WRITE:
            raise PlanError(
                f"sqlroute_role='replica' on a write ({statement.reasons[0]}): a replica takes none"
            )
        return Kind.VOUCHED
    check_may_write(situation, statement.reasons[0])
    return kind


def check_may_write(situation: Situation, what: str) -> None:
    """Refuse a write where only reads were declared.

    Raises:
        ReadOnlyRefused: names what was declared, and the way out.
    """
    if situation.affinity.read_only:
        declared = "the transaction was begun by begin(read_only=True)"
    elif situation.demand.only_reads:
        declared = f"the session is declared {situation.demand.intent.value}"
    else:
        return
    raise ReadOnlyRefused(
        f"{what}, but {declared}; nothing was sent; write in another transaction, or vouch for a "
        "read by execution_options(sqlroute_role='replica')"
    )


def target_of(shard: str, kind: Kind, situation: Situation, rng: Random) -> Target:
    """Choose the node of one shard.

    Raises:
        TokenError: what the session has seen is not of this shard, or was lost.
        NoPrimary, NoEligibleNode: no node can take it now.
        Question: servers must be asked first.
    """
    affinity, demand = situation.affinity, situation.demand
    tie = affinity.of(shard)
    if tie.token is not None:
        _check_token(tie.token, situation)
    _check_setting(shard, affinity)
    if tie.pinned is not None:
        where = "the primary" if not affinity.read_only else "this node"
        reason = f"the transaction is open on {where}"
        return Target(shard, tie.pinned, not affinity.read_only, True, reason)
    if kind is not Kind.READ and kind is not Kind.VOUCHED:
        why = "a write" if kind is Kind.WRITE else "not proved to be a read"
        return Target(shard, _primary(shard, situation), True, True, why)
    if affinity.explicit and not affinity.read_only:
        return Target(shard, _primary(shard, situation), True, True, "an explicit transaction")
    if kind is Kind.VOUCHED and demand.snapshot is None:
        return _for_vouched(shard, tie, situation, rng)
    return _for_read(shard, tie, demand, situation, rng)


def _for_vouched(shard: str, tie: ShardAffinity, situation: Situation, rng: Random) -> Target:
    """Choose the node of what the caller says is a read: on a primary it may prove to be none.

    There it runs in the transaction, so that it can be rolled back and its commit is noticed.

    Raises:
        NoEligibleNode: only reads were declared, and no replica would hold it to that.
    """
    found = _for_read(shard, tie, situation.demand, situation, rng)
    if not found.is_primary or situation.affinity.read_only:
        return found
    if situation.demand.only_reads:
        raise NoEligibleNode(
            f"what cannot be proved to be a read needs a replica of shard {shard} in a session "
            f"declared {situation.demand.intent.value}, and there is none: {found.reason}",
            shard,
        )
    return Target(shard, found.node, True, True, found.reason)


def _for_read(
    shard: str, tie: ShardAffinity, demand: Demand, situation: Situation, rng: Random
) -> Target:
    """Choose the node of a read that nothing binds to the primary's transaction."""
    within = situation.affinity.read_only
    if not within and demand.intent is Intent.WRITING:
        return Target(shard, _primary(shard, situation), True, True, "the session will write")
    if demand.snapshot is not None and (not within or demand.snapshot == "SERIALIZABLE"):
        why = f"isolation level {demand.snapshot} needs a transaction on the primary"
        return Target(shard, _primary(shard, situation), True, True, why)
    if demand.role is Role.PRIMARY:
        why = "the caller asked for the primary"
        return Target(shard, _primary(shard, situation), True, within, why)
    consistency = consistency_of(demand)
    if consistency is Consistency.STRONG:
        return Target(shard, _primary(shard, situation), True, within, "consistency is strong")
    policy, health, topology = situation.policy, situation.health, situation.topology
    sessional = consistency is Consistency.SESSION
    if tie.token is None and not tie.nodes and not situation.exclude:
        ready = _ready(shard, situation, consistency)
        if ready.targets is None:
            return _fallback(shard, ready.found, situation, consistency, NOTHING, rng)
        target = choose(ready.targets, policy, situation.loads, rng, _turns(shard, situation))
        return target._replace(in_transaction=True) if within else target
    required = Required(tie.token, tie.nodes, situation.floors.get(shard))
    if len(tie.nodes) == 1:
        ((node, life),) = tie.nodes
        known = health.nodes.get(node)
        bounds = None if consistency is Consistency.EVENTUAL else policy
        if (
            known is not None
            and known.life == life
            and known.role is Role.REPLICA
            and (not sessional or required.is_met_by(known))
            and refusal(known, topology, bounds, situation.exclude) is None
        ):
            return Target(shard, node, False, within, "the session reads from it", True, life)
    found = candidates(shard, health, topology, policy, consistency, required, situation.exclude)
    if found.fresh:
        chosen = _chosen(shard, found.fresh, situation, consistency, rng)
        if chosen.state is not State.UP:
            why = _SLOW
        elif tie.token is None or not sessional:
            why = "a healthy replica"
        else:
            why = f"has replayed what {describe_token(tie.token)}"
        return Target(shard, chosen.node, False, within, why, sessional, chosen.life)
    if found.unproven and situation.may_wait:
        time = patience(found.unproven, policy)
        if time > 0:
            raise Unproven(shard, time)
    return _fallback(shard, found, situation, consistency, required if sessional else NOTHING, rng)


@dataclass(frozen=True, slots=True)
class Ready:
    """Where the reads of sessions go that have seen nothing yet: the same for all of them.

    Attributes:
        policy: by which the replicas were sorted.
        pool: the fresh ones; ``None`` if there are none.
        targets: what each of them is chosen as, outside of a transaction.
    """

    policy: Policy
    found: Candidates
    pool: Pool[NodeHealth] | None = None
    targets: Pool[Target] | None = None


def _ready(shard: str, situation: Situation, consistency: Consistency) -> Ready:
    """Sort the replicas for a session that has seen nothing yet; once for each state of a shard."""
    health, policy = situation.health, situation.policy
    memory = health.shard(shard).memory
    known: Ready | None = memory.get(consistency)
    if known is not None and known.policy is policy:
        return known
    topology = situation.topology
    found = candidates(shard, health, topology, policy, consistency, NOTHING, frozenset())
    ready = Ready(policy, found)
    if found.fresh:
        pool = pool_of(shard, found.fresh, health, topology, policy, situation.process)
        is_proved = consistency is Consistency.SESSION

        def target(node: NodeHealth) -> Target:
            why = "a healthy replica" if node.state is State.UP else _SLOW
            return Target(shard, node.node, False, False, why, is_proved, node.life)

        ready = Ready(policy, found, pool, pool.each(target))
    memory[consistency] = ready
    return ready


def _chosen(
    shard: str,
    nodes: tuple[NodeHealth, ...],
    situation: Situation,
    consistency: Consistency,
    rng: Random,
) -> NodeHealth:
    """Choose of nodes that were sorted for one session: mostly the same as for all."""
    ready, policy = _ready(shard, situation, consistency), situation.policy
    pool = ready.pool
    if pool is None or ready.found.fresh != nodes:
        health, topology = situation.health, situation.topology
        pool = pool_of(shard, nodes, health, topology, policy, situation.process)
    return choose(pool, policy, situation.loads, rng, _turns(shard, situation))


def _turns(shard: str, situation: Situation) -> Iterator[int] | None:
    return None if situation.turns is None else situation.turns[shard]


def _check_token(token: Position, situation: Situation) -> None:
    """Refuse to go on after a token that this shard, as it is now, cannot answer.

    Raises:
        ForeignToken: another cluster made it.
        LostTimeline: a failover left behind what it has seen.
        NoPrimary: it has seen a timeline that no node is known to be on.
        UnknownHistory: it is of an earlier timeline, and nobody has asked yet where that ended.
    """
    shard = situation.health.shard(token.shard)
    if token.cluster and shard.system_identifier not in (0, token.cluster):
        raise ForeignToken(
            f"the token of shard {token.shard} was made by cluster {token.cluster:x}, the shard's "
            f"is {shard.system_identifier:x}; drop the token"
        )
    if token.timeline in (0, shard.highest_timeline):
        return
    if token.timeline > shard.highest_timeline:
        raise NoPrimary(
            f"the session has seen timeline {token.timeline} of shard {token.shard}, and no node "
            f"is known to be past timeline {shard.highest_timeline}; try again",
            token.shard,
        )
    history = situation.histories.get(token.shard)
    if history is None or history.timeline != shard.highest_timeline:
        raise UnknownHistory(token.shard)
    end = history.ends.get(token.timeline)
    if end is not None and token.lsn > end:
        raise LostTimeline(
            f"the session has seen {format_lsn(token.lsn)} on timeline {token.timeline} of shard "
            f"{token.shard}, which was left at {format_lsn(end)} by a failover: what lay beyond is "
            "lost; tell the user, and go on with a new session without the token",
            shard=token.shard,
            timeline=token.timeline,
            fork=end,
        )


def read_beside(
    shard: str, situation: Situation, reason: str, *, is_fallback: bool = False
) -> Target:
    """Return the primary of a shard for a read that the session's transaction has no part in.

    Raises: as :func:`target_of`.
    """
    _check_ties(shard, situation)
    node = _primary(shard, situation)
    life = situation.health.of(node).life
    return Target(shard, node, True, False, reason, True, life, is_fallback)


def replica_beside(shard: str, node: str, situation: Situation, reason: str) -> Target:
    """Return a certain replica of a shard for such a read, if it may take that as any other.

    Raises: as :func:`target_of`, and
        NoEligibleNode: it may not; says why.
        Unproven: no replica is known to have what the session has seen.
    """
    _check_ties(shard, situation)
    affinity, policy = situation.affinity, situation.policy
    tie, consistency = affinity.of(shard), consistency_of(situation.demand)
    if tie.pinned is not None and tie.pinned != node:
        raise NoEligibleNode(f"{node} is not {tie.pinned}, which serves the transaction", shard)
    required = Required(tie.token, tie.nodes, situation.floors.get(shard))
    found = candidates(
        shard,
        situation.health,
        situation.topology,
        policy,
        consistency,
        required,
        situation.exclude,
    )
    for known in found.fresh:
        if known.node == node:
            sessional = consistency is Consistency.SESSION
            return Target(shard, node, False, False, reason, sessional, known.life)
    if any(known.node == node for known in found.unproven):
        time = patience(found.unproven, policy)
        if situation.may_wait and not found.fresh and time > 0:
            raise Unproven(shard, time)
        raise NoEligibleNode(f"{node} is not known to have what the session has seen", shard)
    why = dict(found.refused).get(node, "is no replica now; `sqlroute coordinator refresh`")
    raise NoEligibleNode(f"{node} {why}", shard)


def why_primary(shard: str, situation: Situation) -> str:
    """Return why a read must be of the primary, whatever the replicas are; nothing if it need not.

    What the transaction has met there is part of what the session has seen, and no position tells.
    """
    affinity, demand = situation.affinity, situation.demand
    if not affinity.read_only:
        if affinity.explicit:
            return "an explicit transaction"
        if affinity.of(shard).pinned is not None:
            return "the transaction is open on the primary"
        if demand.intent is Intent.WRITING:
            return "the session will write"
    if demand.role is Role.PRIMARY:
        return "the caller asked for the primary"
    return "consistency is strong" if consistency_of(demand) is Consistency.STRONG else ""


def consistency_of(demand: Demand) -> Consistency:
    """Return what a read may miss, by all that was asked for."""
    if demand.intent is Intent.LAG_TOLERANT:
        return Consistency.EVENTUAL
    return demand.consistency


def _check_ties(shard: str, situation: Situation) -> None:
    token = situation.affinity.of(shard).token
    if token is not None:
        _check_token(token, situation)
    _check_setting(shard, situation.affinity)


def _check_setting(shard: str, affinity: Affinity) -> None:
    """Refuse a shard that lacks a setting which was sent to another one.

    Raises:
        CrossShardRefused: the way out is in it.
    """
    if affinity.setting is not None and affinity.setting != shard:
        raise CrossShardRefused(
            "SET",
            f"a setting was sent by hand to shard {affinity.setting} in this transaction, and "
            f"shard {shard} does not have it; use session.settings(...), which travels",
        )


def bind_target(shard: str, situation: Situation, rng: Random) -> Target:
    """Return where goes what no statement describes (a flush, ``session.connection()``).

    The primary; in a read-only transaction its own node, where the server refuses writes.

    Raises: as :func:`target_of`, and
        ReadOnlyRefused: only reads were declared, and no transaction holds it to that.
    """
    if situation.affinity.read_only:
        return target_of(shard, Kind.READ, situation, rng)
    check_may_write(situation, "a connection that may write")
    return target_of(shard, Kind.WRITE, situation, rng)


_SLOW = "a slow replica: no other may take it"


def _fallback(
    shard: str,
    found: Candidates,
    situation: Situation,
    consistency: Consistency,
    required: Required,
    rng: Random,
) -> Target:
    """Send a read to the primary when no replica may take it, and the primary may.

    Else to a replica in doubt, if there is one that is fresh enough: better than an error.

    Raises:
        NoEligibleNode: the primary may not take it, or not more of them.
        NoPrimary: there is none.
    """
    within, policy = situation.affinity.read_only, situation.policy
    if len(situation.topology.shard(shard).nodes) == 1:
        why = "the shard has no replicas"
        return Target(shard, _primary(shard, situation), True, within, why)
    reasons = found.reasons()
    if not policy.primary_fallback:
        why = f"{reasons}; set primary_fallback = true or raise max_lag"
        refused = f"no replica of shard {shard} may take the read: {why}"
    elif refused := _over_share(shard, found, situation):
        refused += reasons
    else:
        primary = situation.health.primary(shard)
        if primary is not None and primary.node not in situation.exclude:
            why = f"no replica may take it: {reasons}"
            return Target(shard, primary.node, True, within, why, is_fallback=True)
    bounds = None if consistency is Consistency.EVENTUAL else policy
    failed = situation.exclude if situation.may_repeat else frozenset()
    last = in_doubt(shard, situation.health, situation.topology, bounds, required, failed)
    if last:
        chosen = _chosen(shard, last, situation, consistency, rng)
        sessional = consistency is Consistency.SESSION
        why = f"in doubt, but no other may take it: {reasons}"
        return Target(shard, chosen.node, False, within, why, sessional, chosen.life)
    if refused:
        raise NoEligibleNode(refused, shard)
    return Target(shard, _primary(shard, situation), True, within, "")  # says that there is none


def _over_share(shard: str, found: Candidates, situation: Situation) -> str:
    """Say that the primary has taken its share of the reads of replicas; empty if it has not.

    A session that has only seen more than the replicas have is no reason to spare the primary: they
    are there, and take the reads of the others.
    """
    policy, health = situation.policy, situation.health
    share = policy.primary_fallback_share
    primary = health.primary(shard)
    if share >= 1 or situation.admit is None or found.unproven or primary is None:
        return ""
    topology = situation.topology
    if not any(n.weight > 0 for n in topology.shard(shard).nodes if n.name != primary.node):
        return ""
    rate = fallback_rate(shard, health, policy)
    if situation.admit(shard, rate):
        return ""
    before = health.shard(shard).read_rate
    return (
        f"no replica of shard {shard} may take the read, and {primary.node} takes no more than "
        f"{rate:.0f} reads/s in their place (primary_fallback_share {share:g} of {before:.0f}/s, "
        "and its free ones); try again later, bring a replica back or raise the share: "
    )


def _primary(shard: str, situation: Situation) -> str:
    primary = situation.health.primary(shard)
    if primary is None or primary.node in situation.exclude:
        states = ", ".join(
            f"{node.name} just failed"
            if node.name in situation.exclude
            else f"{node.name} {_state(situation.health, node.name)}"
            for node in situation.topology.shard(shard).nodes
        )
        if not states:  # the configuration leaves them to Patroni
            raise NoPrimary(
                f"no node of shard {shard} is known: Patroni has not told them yet; see that one "
                "of its REST APIs runs and can be reached from here",
                shard,
            )
        raise NoPrimary(
            f"shard {shard} has no primary now: {states}; try again or promote a node", shard
        )
    return primary.node


def _state(health: Health, name: str) -> str:
    node = health.of(name)
    detail = node.refused or node.last_error
    return f"is {node.state.value}" + (f" ({detail})" if detail else f" {node.role.value}")
