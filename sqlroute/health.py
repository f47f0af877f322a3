"""What is known of each server now: role, position, lag, and whether it may be used.

Pure: ``(old health, observation, now) -> new health``. Nothing here does I/O, reads a clock, logs
or locks; ``now`` is a parameter, in monotonic seconds. The monitor makes observations and
publishes the values; every statement reads them, so the read side is one dictionary look-up.

States of a node, with hysteresis::

    UNKNOWN ──success──> UP ──1 failed probe──> SUSPECT ──failure──> DOWN ──success──> RECOVERING
                         ^ └──failed statement───────────────────────^ ^                  │ │
                         │<──success── (SUSPECT)                       └─────failure──────┘ │
                         └────────────────────────── 2 more successes ──────────────────────┘

A replica that answers, but much later than the others of its shard, is SLOW for a time that
doubles when it happens again: it takes no reads as long as another one may. At most half of the
replicas that answer are SLOW at once. Meanwhile it is looked at in the background, by the monitor's
one probe at a time. A node that comes back, from DOWN or from SLOW, begins with a small ``share``
of the reads that grows with the time.

SUSPECT is not readable, even after one failure and even though most single failures mean little:
reading from a replica in doubt can cost a request its whole deadline, while reading from another
one, or from the primary, costs nothing. A doubt lasts only until the next probe. A *primary* in
doubt stays the primary: there is no other place to write to, and a write that meets a dead server
fails by itself.

All times are the moments a probe was *sent*. What a server answers was true at some moment after
that, and positions in the log and epochs only grow, so every figure derived here errs on the side
of "older than it is".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from sqlroute.errors import UnknownName
from sqlroute.topology import Topology

FAILURES_TO_DOWN = 2
"""Consecutive failed probes that make a node DOWN. One can be a lost packet or a probe's own
connection that an operator ended; a second one a moment later is not."""

SUCCESSES_TO_UP = 2
"""Successes a RECOVERING node needs beyond the one that woke it: re-entry is gradual."""

RTT_ALPHA = 0.2
"""Weight of the newest round-trip time (the value of MongoDB's server selection specification)."""

USUAL_ALPHA = 0.002
"""Weight of the newest round trip in what is usual for a node, when it is a longer one: a far node
is not a slow one, and a network that has changed for good is the usual one after some minutes."""

SLOW_FACTOR = 3.0
"""A node is slow that takes this many times as long as the median of the others..."""

SLOW_BY = 0.05
"""...and these seconds more: 3 ms instead of 1 ms are nobody's concern."""

SLOW_PROBES = 3
"""Looks in a row that must find a node slow. One long answer may be the monitor's own pause."""

SLOW_STATEMENTS = 5
"""Statements between two probes from which on their time counts in full; fewer are chance."""

SLOW_FOR = 10.0
"""Seconds for which a slow node is set aside; twice as long each time it happens again..."""

SLOW_FOR_AT_MOST = 300.0
"""...up to this, and from the start when it was well for a while."""

FIRST_SHARE = 0.1
"""Share of its reads that a node begins with when it comes back; its caches may be cold."""

RETURN = 10.0
"""Seconds after which it has all of them."""

READ_RATE_HALF_LIFE = 3600.0
"""Seconds after which half is forgotten of how many reads the replicas of a shard once took."""

RECHECK = 0.1
"""Share of the pause after which a node in doubt is asked again."""

RATE_MARGIN = 0.8
"""Share of the rate of probes that is planned for: pauses are random, and counts are late."""

COUNT_EVERY = 4
"""Probes of a monitor from one count of all monitors to the next: counting takes a server that has
hundreds of connections longer than all the rest of a probe."""

UNUSED_FACTOR = 20.0
"""How much longer the pauses are for a node that nobody uses."""

HELD_PAUSE = 0.005
"""Seconds between two looks at a node while write transactions wait for its shard..."""

HELD_RATE = 1000.0
"""...as far as all monitors together stay under so many looks per second."""

LOST_PAUSE = 0.02
"""Seconds between two looks at a node whose shard has lost its primary: callers wait for the next
one. Under the same rate."""

HISTORY_LENGTH = 128
"""Positions of the primary kept per shard. Beyond it, every second one of the older half goes: the
reach doubles and the older figures of lag get coarser, always towards more lag."""

LONGEST_HOLD = 60.0
"""Seconds after which a hold of one operation is over, whatever its shard says: an operation that
asks for more has a fault, and requests would pile up for it."""

FENCE = "sqlroute_fence_epoch_"
"""Part of the error with which a fenced server refuses each new session."""

NEVER = float("-inf")


class Role(Enum):
    """What a server says it is."""

    PRIMARY = "primary"
    REPLICA = "replica"
    UNKNOWN = "unknown"


class State(Enum):
    """How far a server is trusted to answer."""

    UNKNOWN = "unknown"
    UP = "up"
    SUSPECT = "suspect"
    SLOW = "slow"
    DOWN = "down"
    RECOVERING = "recovering"


@dataclass(frozen=True, slots=True)
class Hold:
    """An operation wants no new write transactions on a shard for a while.

    Attributes:
        operation: its id.
        since: when it was first seen.
        ends_at: when it is over even if nobody says so: never before the server's ``held_until``.
    """

    operation: str
    since: float
    ends_at: float


@dataclass(frozen=True, slots=True)
class TextOrder:
    """How a database compares text.

    Attributes:
        by_code_point: so does its default collation.
        others: columns of a collation of their own that does not, as ``table.column``.
        loose: those of them whose collation takes unlike texts for equal.
    """

    by_code_point: bool = False
    others: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()

    def __and__(self, other: TextOrder) -> TextOrder:
        """Return what holds of both."""
        if self == other:
            return self
        return TextOrder(
            self.by_code_point and other.by_code_point,
            self.others | other.others,
            self.loose | other.loose,
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """What one probe of one node brought back.

    Attributes:
        at: when the probe was sent.
        error: why it failed, one line; None if it did not.
        hung: it failed by its deadline, so connections to the node may hang too.
        timeline: 0 if unknown.
        system_identifier: 0 if the role may not read it.
        lsn: in bytes; flushed on a primary, replayed on a replica.
        received_lsn: what a replica holds on its own disk, or a primary has inserted into its log,
            flushed or not, in bytes.
        life: another number whenever the probe had to connect anew: the server may have crashed,
            and a standby then starts over from before what it has shown.
        started: when the server was, by its own clock: no two servers have the same, to the
            microsecond, nor one server after another start.
        replay_age: seconds since the time stamp of the last transaction a replica replayed.
        rtt: seconds of the probe's round trip, without connecting.
        epoch: of the shard map in the shard's catalog; None without a catalog.
        version: ``server_version_num``.
        text_order: how the database compares text.
        accepts_writes: a primary on which a plain transaction is not read-only.
        monitors: how many are connected to the node, this one included; 0 if not counted.
        promotion: how many promotions sqlroute has made of the shard, by its catalog; None where
            that does not say.
        operation: which holds the shard's write transactions; empty if none does.
        held_for: seconds for which it does, by the server's clock.
        revision: grows with each node that is added to the shard or removed in its catalog.
        statements: reads of this process that the node has answered since the last observation.
        statement_seconds: what they took, altogether.
    """

    node: str
    at: float
    error: str | None = None
    hung: bool = False
    is_primary: bool = False
    timeline: int = 0
    system_identifier: int = 0
    lsn: int = 0
    received_lsn: int | None = None
    replay_age: float | None = None
    rtt: float = 0.0
    epoch: int | None = None
    version: int = 0
    text_order: TextOrder = TextOrder()
    accepts_writes: bool = False
    life: int = 0
    started: float = 0.0
    monitors: int = 0
    promotion: int | None = None
    operation: str = ""
    held_for: float = 0.0
    revision: int = 0
    statements: int = 0
    statement_seconds: float = 0.0

    @classmethod
    def failed(cls, node: str, at: float, error: str, *, hung: bool = False) -> Observation:
        """Return the observation that a node could not be asked."""
        return cls(node, at, error or "no reason given", hung)


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """What is known of one node.

    Attributes:
        lsn, received_lsn: see :class:`Observation`; as of ``lsn_at``.
        lag_bytes: log the shard's primary has and this replica has not replayed; None if unknown.
        lag_seconds: this replica holds all that the primary had that long ago; None if unknown.
        rtt: moving average, seconds.
        failures: in a row. successes: in a row since the last failure.
        refused: not empty: must not be used whatever its state, and why.
        hung: its last failure was a deadline.
        epoch, epoch_at: of the shard map in its catalog, and when that was asked.
        life, started: as in :class:`Observation`.
        seen_at: when the last probe that succeeded was sent; minus infinity before the first.
        failed_at: when the last failure was noted.
        usual_rtt: what is usual for this node, by which a far one differs from a slow one.
        latency: moving average of what statements took, seconds; 0 before the first.
        read_rate: moving average of the reads that it answered to this process per second.
        slow: observations in a row that found it slow.
        slow_until: it is set aside until then; minus infinity if it is not.
        slow_for: how long it was set aside the last time, and ``slow_ended`` until when.
        returned_at: when it answered again after it was down, or was let in again after it was
            slow; minus infinity if it never was.
        share: of the reads that its weight entitles it to; below 1 soon after its return.
        monitors: how many watch it, as last counted.
        promotion, operation, revision: see :class:`Observation`; as last known.
        held_until: when the hold of ``operation`` ends.
        fenced: not empty: it has refused a new session, and with these words. It is not used until
            a connection that was opened after that has brought an answer.
    """

    node: str
    shard: str
    state: State = State.UNKNOWN
    role: Role = Role.UNKNOWN
    timeline: int = 0
    system_identifier: int = 0
    lsn: int = 0
    lsn_at: float = NEVER
    received_lsn: int | None = None
    replay_age: float | None = None
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    rtt: float = 0.0
    failures: int = 0
    successes: int = 0
    last_error: str = ""
    refused: str = ""
    hung: bool = False
    epoch: int | None = None
    epoch_at: float = NEVER
    version: int = 0
    text_order: TextOrder = TextOrder()
    accepts_writes: bool = False
    life: int = 0
    started: float = 0.0
    seen_at: float = NEVER
    failed_at: float = NEVER
    usual_rtt: float = 0.0
    latency: float = 0.0
    read_rate: float = 0.0
    slow: int = 0
    slow_until: float = NEVER
    slow_for: float = 0.0
    slow_ended: float = NEVER
    returned_at: float = NEVER
    share: float = 1.0
    monitors: int = 0
    promotion: int | None = None
    operation: str = ""
    held_until: float = NEVER
    revision: int = 0
    fenced: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether a read may go here, lag aside."""
        return self.state is State.UP and not self.refused and self.role is not Role.UNKNOWN

    @property
    def has_outcome(self) -> bool:
        """Whether it was asked at least once, with or without an answer."""
        return self.failures > 0 or self.seen_at > NEVER


@dataclass(frozen=True, slots=True)
class ShardHealth:
    """What is known of one shard.

    Attributes:
        members: its nodes in the order of the configuration.
        memory: what others have derived from this very value and will ask for again.
        primary: name of the node to write to; None if there is none now.
        contenders: all nodes that claim to be its primary now, the chosen one first. More than
            one means that two servers may both be taking writes.
        replicas: nodes in recovery, whatever their state, in the order of the configuration.
        highest_epoch, highest_timeline: ever seen on a node of this cluster.
        system_identifier: of its cluster; 0 if none was seen.
        is_settled: more than half of its nodes have shown that identifier, so it stays.
        history: (time, LSN) of its primary, ascending in both: at that time the primary's flushed
            log ended at that LSN or before.
        confirmed_at: when the highest epoch was last known to be the one in force.
        read_rate: the most reads per second that its replicas have answered to this process
            lately, as of ``read_rate_at``; it halves in an hour, and stays when they are gone.
        hold: no new write transactions now, as its primary has said last; it outlives that.
        spent: the operation whose hold was ended here, after :data:`LONGEST_HOLD`.
        revision: of its nodes in the catalog, the highest ever seen.
    """

    name: str
    members: tuple[str, ...]
    memory: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    primary: str | None = None
    primary_health: NodeHealth | None = field(default=None, repr=False)
    contenders: tuple[str, ...] = ()
    replicas: tuple[NodeHealth, ...] = field(default=(), repr=False)
    highest_epoch: int | None = None
    highest_timeline: int = 0
    system_identifier: int = 0
    is_settled: bool = False
    history: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    confirmed_at: float = NEVER
    read_rate: float = 0.0
    read_rate_at: float = NEVER
    hold: Hold | None = None
    spent: str = ""
    revision: int = 0

    @property
    def highest(self) -> tuple[int, int]:
        """The highest (epoch, timeline) ever seen; an absent catalog counts as epoch 0."""
        return (self.highest_epoch or 0, self.highest_timeline)


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of all nodes and shards: one immutable value, published whole."""

    topology: Topology = field(repr=False)
    nodes: MappingProxyType[str, NodeHealth]
    shards: MappingProxyType[str, ShardHealth]

    @classmethod
    def initial(cls, topology: Topology) -> Health:
        """Return the health of a topology of which nothing was asked yet."""
        return cls(topology, MappingProxyType({}), MappingProxyType({})).with_topology(topology)

    def of(self, node: str) -> NodeHealth:
        """Return what is known of a node.

        Raises:
            UnknownName: the topology has no such node.
        """
        try:
            return self.nodes[node]
        except KeyError:
            raise UnknownName(f"unknown node {node!r}; known: {', '.join(self.nodes)}") from None

    def shard(self, name: str) -> ShardHealth:
        """Return what is known of a shard.

        Raises:
            UnknownName: the topology has no such shard.
        """
        try:
            return self.shards[name]
        except KeyError:
            raise UnknownName(f"unknown shard {name!r}; known: {', '.join(self.shards)}") from None

    def primary(self, shard: str) -> NodeHealth | None:
        """Return the node to write to, None if there is none now."""
        return self.shard(shard).primary_health

    def replicas(self, shard: str) -> tuple[NodeHealth, ...]:
        """Return the nodes in recovery, whatever their state: see ``is_readable`` of each."""
        return self.shard(shard).replicas

    def members(self, shard: str) -> tuple[NodeHealth, ...]:
        """Return all nodes of a shard, for messages that must name each of them."""
        return tuple(self.nodes[name] for name in self.shard(shard).members)

    def highest_epoch(self, shard: str) -> int | None:
        """Return the highest map epoch a node of the shard ever showed, None without a catalog."""
        return self.shard(shard).highest_epoch

    def confirmed(self, shard: str, epoch: int, now: float, lease: float) -> bool:
        """Say whether a map of this epoch may still be used.

        True if a node of the shard reported exactly this epoch within ``lease`` seconds and none
        ever reported a higher one. A replica's word is as old as its lag: what it shows was the
        primary's epoch at the moment it has replayed up to, not at the moment it was asked.
        """
        known = self.shard(shard)
        return known.highest_epoch == epoch and now - known.confirmed_at <= lease

    def with_topology(self, topology: Topology) -> Health:
        """Return the health for another topology: nodes that did not change keep what is known.

        A shard of which no node is left is a new shard that has an old name.
        """
        nodes: dict[str, NodeHealth] = {}
        shards: dict[str, ShardHealth] = {}
        for keyspace in topology.keyspaces:
            for shard in keyspace.shards:
                members = tuple(node.name for node in shard.nodes)
                kept = {name: self.nodes[name] for name in members if self._keeps(topology, name)}
                nodes |= {name: kept.get(name, NodeHealth(name, shard.name)) for name in members}
                known = ShardHealth(shard.name, members)
                if kept:
                    known = replace(self.shards[shard.name], members=members)
                known, changed = _elect(known, nodes)
                nodes.update(changed)
                shards[shard.name] = known
        return Health(topology, MappingProxyType(nodes), MappingProxyType(shards))

    def _keeps(self, topology: Topology, node: str) -> bool:
        return (
            node in self.nodes
            and self.topology.node(node) == topology.node(node)
            and self.topology.shard_of_node[node] == topology.shard_of_node[node]
        )


def observe(health: Health, observation: Observation, now: float) -> Health:
    """Return the health after a probe.

    A probe that was sent before a statement failed on that node and came back later says nothing
    of the failure, and is dropped: else a server that just died would be taken for recovering.
    So is the probe of a node that has left the topology.
    """
    node = health.nodes.get(observation.node)
    if node is None:
        return health
    if observation.error is not None:
        return _replaced(health, _after_failure(node, observation), now)
    if observation.at < node.failed_at:
        return health
    peers = [peer for peer in health.shards[node.shard].replicas if peer.node != node.node]
    return _replaced(health, _after_success(node, observation, peers, now), now)


def observed_latency(
    health: Health, node: str, statements: int, seconds: float, now: float
) -> Health:
    """Return the health after some statements that a node has answered, by their time altogether.

    For who keeps no monitor; the monitor hands them over with its next observation, which costs
    nothing more. Whether the node is slow is judged at that.

    Raises:
        UnknownName: the topology has no such node.
    """
    known = health.of(node)
    return _replaced(health, replace(known, latency=_latency(known, statements, seconds)), now)


def probe_pause(
    node: NodeHealth | None,
    *,
    interval: float,
    rate: float,
    is_used: bool = True,
    is_held: bool = False,
    is_lost: bool = False,
) -> float:
    """Return the seconds until a node should be asked again, before they are made random.

    Each monitor that is connected to a node asks it as seldom as keeps all of them together under
    a rate. It follows that the more there are, the older is what each of them knows.

    Args:
        interval: the shortest pause.
        rate: probes per second that one node should answer, to all monitors together.
        is_used: statements go there.
        is_held: its shard's write transactions are held: callers wait for the end of that.
        is_lost: its shard had a primary and has none, while statements go there.
    """
    monitors = node.monitors if node is not None else 0
    pause = max(interval, monitors / (rate * RATE_MARGIN))
    if is_held or is_lost:
        pause = max(HELD_PAUSE if is_held else LOST_PAUSE, monitors / HELD_RATE)
        # it will hardly be the next primary, and connecting costs more than asking
        return pause / RECHECK if node is not None and node.state is State.DOWN else pause
    if node is not None and node.failures == 1 and node.state is not State.DOWN:
        return pause * RECHECK
    return pause if is_used else pause * UNUSED_FACTOR


def next_count(before: int, counted: int) -> int:
    """Return after how many probes the monitors of a node should be counted again.

    The next time while their number changes, as when a program is deployed.
    """
    return COUNT_EVERY if abs(counted - before) <= 0.1 * before else 1


def statement_failed(health: Health, node: str, error: str, now: float) -> Health:
    """Return the health after a real statement could not be run because of its server.

    Counts at once, without hysteresis: somebody's request has already paid for it. The node is
    no primary until a probe sent after this moment has found it to be one.
    """
    known = health.of(node)
    failed = replace(
        known,
        state=State.DOWN,
        failures=max(known.failures + 1, FAILURES_TO_DOWN),
        successes=0,
        last_error=error,
        hung=False,
        failed_at=now,
        fenced=_fence(error) or known.fenced,
    )
    return _replaced(health, failed, now)


def forget(health: Health, shard: str) -> Health:
    """Return the health with nothing known of a shard, not even its highest timeline.

    For an operator who has rebuilt a shard from a backup: the rules against stale primaries and
    foreign clusters would refuse it for good.
    """
    members = health.shard(shard).members
    nodes = {**health.nodes, **{name: NodeHealth(name, shard) for name in members}}
    shards = {**health.shards, shard: ShardHealth(shard, members)}
    return Health(health.topology, MappingProxyType(nodes), MappingProxyType(shards))


def _after_failure(node: NodeHealth, observation: Observation) -> NodeHealth:
    failures = node.failures + 1
    state = node.state
    if failures >= FAILURES_TO_DOWN or state is State.RECOVERING:
        state = State.DOWN
    elif state in (State.UP, State.SLOW):
        state = State.SUSPECT
    return replace(
        node,
        state=state,
        failures=failures,
        successes=0,
        last_error=observation.error or "",
        hung=observation.hung,
        failed_at=max(node.failed_at, observation.at),
        fenced=_fence(observation.error or "") or node.fenced,
    )


def _fence(error: str) -> str:
    """Return the words of a fence, empty if an error is of another kind."""
    return error if FENCE in error else ""


def _after_success(
    node: NodeHealth, seen: Observation, peers: Iterable[NodeHealth], now: float
) -> NodeHealth:
    successes = node.successes + 1
    is_back = node.state is State.RECOVERING and successes > SUCCESSES_TO_UP
    state = State.UP
    if node.state is State.DOWN or (node.state is State.RECOVERING and not is_back):
        state = State.RECOVERING
    known_rtt = node.rtt or seen.rtt
    usual = node.usual_rtt or seen.rtt
    longer = seen.rtt - usual
    gap = seen.at - node.seen_at
    reads = seen.statements / gap if 0 < gap < float("inf") else 0.0
    answered = replace(
        node,
        state=state,
        role=Role.PRIMARY if seen.is_primary else Role.REPLICA,
        timeline=seen.timeline,
        system_identifier=seen.system_identifier,
        lsn=seen.lsn,
        lsn_at=seen.at,
        received_lsn=seen.received_lsn,
        replay_age=None if seen.replay_age is None else max(0.0, seen.replay_age),
        rtt=known_rtt + RTT_ALPHA * (seen.rtt - known_rtt),
        failures=0,
        successes=successes,
        hung=False,
        epoch=seen.epoch,
        epoch_at=node.epoch_at if seen.epoch is None else seen.at,
        version=seen.version,
        text_order=seen.text_order,
        accepts_writes=seen.accepts_writes,
        life=seen.life,
        started=seen.started,
        seen_at=seen.at,
        usual_rtt=usual + (longer * USUAL_ALPHA if longer > 0 else longer),
        latency=_latency(node, seen.statements, seen.statement_seconds),
        read_rate=node.read_rate + RTT_ALPHA * (reads - node.read_rate),
        returned_at=_returned_at(node, seen),
        monitors=seen.monitors or node.monitors,
        # an answer over a connection that is older than the fence says nothing of that
        fenced="" if seen.life != node.life else node.fenced,
    )
    if seen.promotion is not None:  # else the catalog could not be read this time
        answered = replace(
            answered,
            promotion=seen.promotion,
            operation=seen.operation,
            # from the moment of the answer on: it must not end before the server's clock says so
            held_until=now + seen.held_for if seen.operation else NEVER,
            revision=seen.revision,
        )
    judged = _judged(answered, seen, peers)
    share = min(1.0, max(FIRST_SHARE, (seen.at - judged.returned_at) / RETURN))
    return judged if judged.share == share else replace(judged, share=share)


def _returned_at(node: NodeHealth, seen: Observation) -> float:
    """Return when a node has come back, whose share of the work then grows slowly.

    One that was promoted has not come back: it has served reads all the time, its caches are warm,
    and all that waited for a primary is waiting for it.
    """
    if seen.is_primary and node.role is Role.REPLICA:
        return NEVER
    return seen.at if node.state is State.DOWN else node.returned_at


def _latency(node: NodeHealth, statements: int, seconds: float) -> float:
    """Return the moving average of what statements take; a few of them count for less."""
    if statements <= 0:
        return node.latency
    mean = seconds / statements
    alpha = RTT_ALPHA * min(1.0, statements / SLOW_STATEMENTS)
    return node.latency + alpha * (mean - node.latency) if node.latency else mean


def _judged(node: NodeHealth, seen: Observation, peers: Iterable[NodeHealth]) -> NodeHealth:
    """Return a node that has answered with the verdict on its slowness.

    Its average must be out of line, so that a single long answer sets nobody aside, and so must
    be its newest answer, so that a single one does not count again and again through the average.
    """
    if node.role is not Role.REPLICA:
        return node if node.slow_until == NEVER else replace(node, slow=0, slow_until=NEVER)
    why = _slowness(node, seen, [peer for peer in peers if peer.state is State.UP])
    slow = node.slow + 1 if why else 0
    if node.state is not State.UP:
        return node if slow == node.slow else replace(node, slow=slow)
    if node.slow_until > seen.at:
        return replace(node, state=State.SLOW, slow=slow)
    if node.slow_until > NEVER and not why:
        # Its statements are counted anew: the old ones are those for which it was set aside.
        return replace(
            node,
            slow=0,
            slow_until=NEVER,
            slow_ended=seen.at,
            returned_at=seen.at,
            latency=0.0,
        )
    if node.slow_until > NEVER or (slow >= SLOW_PROBES and _may_be_set_aside(peers)):
        is_repeated = seen.at - node.slow_ended <= max(60.0, 2 * node.slow_for)
        again = is_repeated or node.slow_until > NEVER
        time = min(SLOW_FOR_AT_MOST, 2 * node.slow_for) if again else SLOW_FOR
        return replace(
            node,
            state=State.SLOW,
            slow=slow,
            slow_until=seen.at + time,
            slow_for=time,
            last_error=why,
        )
    return node if slow == node.slow else replace(node, slow=slow)


def _slowness(node: NodeHealth, seen: Observation, peers: list[NodeHealth]) -> str:
    """Say how a node is slower than the others of its shard; empty if it is not, or is alone."""
    if not peers:
        return ""
    usual = node.usual_rtt
    limit = SLOW_BY + SLOW_FACTOR * _median([max(0.0, p.rtt - p.usual_rtt) for p in peers])
    taken = min(seen.rtt, node.rtt)
    if taken - usual > limit and taken > SLOW_FACTOR * usual:
        return f"a probe takes {node.rtt * 1e3:.0f} ms, {usual * 1e3:.0f} ms is usual"
    others = [max(0.0, peer.latency - peer.usual_rtt) for peer in peers if peer.latency]
    if seen.statements < SLOW_STATEMENTS or not others:
        return ""
    limit = SLOW_BY + SLOW_FACTOR * _median(others)
    if min(seen.statement_seconds / seen.statements, node.latency) - usual > limit:
        theirs = _median([peer.latency for peer in peers if peer.latency])
        return f"reads take {node.latency * 1e3:.0f} ms, on others {theirs * 1e3:.0f} ms"
    return ""


def _may_be_set_aside(peers: Iterable[NodeHealth]) -> bool:
    """Say if one more replica may be slow: at most half of those that answer."""
    answering = [peer.state for peer in peers if peer.state in (State.UP, State.SLOW)]
    return 2 * (answering.count(State.SLOW) + 1) <= len(answering) + 1


def _let_in(shard: ShardHealth, nodes: Mapping[str, NodeHealth]) -> dict[str, NodeHealth]:
    """Return slow replicas that are needed now, since others went down: the best first."""
    states = [nodes[name].state for name in shard.members if nodes[name].role is Role.REPLICA]
    too_many = states.count(State.SLOW) - (states.count(State.SLOW) + states.count(State.UP)) // 2
    if too_many <= 0:
        return {}
    slow = [nodes[name] for name in shard.members if nodes[name].state is State.SLOW]
    slow.sort(key=lambda node: node.latency + node.rtt)
    return {
        node.node: replace(node, state=State.UP, slow=0, slow_until=NEVER)
        for node in slow[:too_many]
    }


def _median(values: list[float]) -> float:
    """Return the median, of two in the middle the higher one."""
    return sorted(values)[len(values) // 2]


def _replaced(health: Health, node: NodeHealth, now: float) -> Health:
    """Return the health with one node changed and all that follows from it in its shard."""
    # copy() of a mapping proxy is the copy of its dict, 25 times as fast as unpacking it.
    nodes = health.nodes.copy()
    nodes[node.node] = node
    shard = health.shards[node.shard]
    if any(replica.state is State.SLOW for replica in shard.replicas):
        nodes.update(_let_in(shard, nodes))
    shard, changed = _elect(shard, nodes)
    nodes.update(changed)
    shard = _held(shard, shard.primary_health, now)
    shard = _remember(shard, shard.primary_health)
    nodes.update(_measured(shard, nodes, now))
    shard = _with_read_rate(_with_replicas(shard, nodes, now), now)
    shards = health.shards.copy()
    shards[node.shard] = shard
    return Health(health.topology, MappingProxyType(nodes), MappingProxyType(shards))


def _elect(
    shard: ShardHealth, nodes: Mapping[str, NodeHealth]
) -> tuple[ShardHealth, dict[str, NodeHealth]]:
    """Return the shard with its cluster and its primary settled, and the nodes that changed.

    Three refusals, all derived anew each time, so that a node that was put right comes back:
    a node of another cluster; a primary on a timeline below the highest ever seen in the shard
    (it was left behind by a promotion, MongoDB's stale-primary rule); and of two primaries on
    the highest timeline, the one of fewer promotions, then with the lower epoch, or else the
    newcomer. Without the last two, reads could go to a server whose data are no longer the
    shard's. A fenced node is refused whatever it is.
    """
    members = [nodes[name] for name in shard.members]
    identifier = _identifier(shard, members)
    if identifier != shard.system_identifier:
        shard = ShardHealth(shard.name, shard.members, system_identifier=identifier)
    shown = sum(m.system_identifier == identifier for m in members)
    own = [m for m in members if m.system_identifier in (0, identifier)]
    epochs = [m.epoch for m in own if m.epoch is not None]
    timeline = max((m.timeline for m in own), default=0)
    highest_timeline = max(shard.highest_timeline, timeline)
    highest_epoch = max(epochs) if epochs else None
    if shard.highest_epoch is not None:
        highest_epoch = max(shard.highest_epoch, highest_epoch or 0)
    confirmed_at = shard.confirmed_at if highest_epoch == shard.highest_epoch else NEVER

    claims = [
        m
        for m in own
        if m.role is Role.PRIMARY and m.state not in (State.DOWN, State.UNKNOWN) and not m.fenced
    ]
    claims.sort(
        key=lambda m: (m.timeline >= highest_timeline, *_rank(m), m.node == shard.primary),
        reverse=True,
    )
    chosen = claims[0] if claims and claims[0].timeline >= highest_timeline else None
    shard = replace(
        shard,
        primary=chosen.node if chosen else None,
        contenders=tuple(m.node for m in claims),
        highest_epoch=highest_epoch,
        highest_timeline=highest_timeline,
        is_settled=shard.is_settled or (identifier != 0 and 2 * shown > len(members)),
        confirmed_at=confirmed_at,
        revision=max(shard.revision, *(m.revision for m in own)) if own else shard.revision,
    )

    changed = {}
    for member in members:
        refused = _refusal(shard, member, chosen)
        if refused != member.refused:
            changed[member.node] = replace(member, refused=refused)
    now_known = {**{m.node: m for m in members}, **changed}
    return _with_replicas(shard, now_known, NEVER), changed


def _held(shard: ShardHealth, primary: NodeHealth | None, now: float) -> ShardHealth:
    """Return the shard with the hold that its primary tells of, or with the end of it.

    A primary that is not there has nothing to say: it may have been stopped *because* of the hold,
    which then lasts until another primary ends it, or its time is over. What a primary says that
    was left behind by a promotion is not heard at all: it is not the shard's.
    """
    hold, spent = shard.hold, shard.spent
    if primary is not None and primary.failures == 0 and primary.promotion is not None:
        if not primary.operation or primary.operation == spent:
            hold = None
        else:
            is_new = hold is None or hold.operation != primary.operation
            since = now if hold is None or is_new else hold.since
            hold = Hold(primary.operation, since, min(primary.held_until, since + LONGEST_HOLD))
    if hold is not None and now >= hold.ends_at:
        spent = hold.operation if now >= hold.since + LONGEST_HOLD else spent
        hold = None
    if hold == shard.hold and spent == shard.spent:
        return shard
    return replace(shard, hold=hold, spent=spent)


def _identifier(shard: ShardHealth, members: Iterable[NodeHealth]) -> int:
    """Return the system identifier of the shard's cluster, 0 if no node has shown one.

    Settled, until :func:`forget`, once more than half of the configured nodes have shown it: a
    wrong DNS answer must not turn a whole shard into another cluster. Before that the larger
    number of nodes wins, then the one with a primary, then the one seen first, which is the only
    rule that decides while a single node has answered.
    """
    if shard.is_settled:
        return shard.system_identifier
    votes: dict[int, tuple[int, bool, bool]] = {}
    for member in members:
        identifier = member.system_identifier
        if identifier:
            count, primary, known = votes.get(identifier, (0, False, False))
            votes[identifier] = (
                count + 1,
                primary or member.role is Role.PRIMARY,
                known or identifier == shard.system_identifier,
            )
    if not votes:
        return shard.system_identifier
    return max(votes, key=votes.__getitem__)


def _rank(node: NodeHealth) -> tuple[int, int, int]:
    return (node.promotion or 0, node.epoch or 0, node.timeline)


def _refusal(shard: ShardHealth, node: NodeHealth, chosen: NodeHealth | None) -> str:
    if node.system_identifier not in (0, shard.system_identifier):
        return (
            f"system identifier {node.system_identifier} is not {shard.system_identifier}, the one "
            f"of shard {shard.name}: the node belongs to another cluster; correct its address"
        )
    if node.fenced:
        return f"fenced: {node.fenced}"
    if node.role is not Role.PRIMARY:
        return ""
    if node.timeline < shard.highest_timeline:
        return (
            f"claims to be the primary on timeline {node.timeline}, but shard {shard.name} has "
            f"reached timeline {shard.highest_timeline}; fence it and rejoin it as a replica"
        )
    if chosen is not None and node.node != chosen.node:
        return (
            f"claims to be the primary beside {chosen.node}, which is at epoch {chosen.epoch or 0} "
            f"and timeline {chosen.timeline}, promotion {chosen.promotion or 0}; "
            "fence it and rejoin it as a replica"
        )
    return ""


def _remember(shard: ShardHealth, primary: NodeHealth | None) -> ShardHealth:
    """Return the shard with the primary's position appended to its history.

    Positions above the newest one were lost with a timeline, and go. Those below it stay valid
    over a promotion: at that time the *surviving* log ended there or before.
    """
    if primary is None or primary.lsn_at == NEVER:
        return shard
    history = shard.history
    if history and history[-1] == (primary.lsn_at, primary.lsn):
        return shard
    if history and primary.lsn_at < history[-1][0]:
        return shard
    kept = list(history)
    while kept and kept[-1][1] >= primary.lsn:
        kept.pop()
    kept.append((primary.lsn_at, primary.lsn))
    if len(kept) > HISTORY_LENGTH:
        half = len(kept) // 2
        kept = kept[:half:2] + kept[half:]
    return replace(shard, history=tuple(kept))


def _measured(
    shard: ShardHealth, nodes: Mapping[str, NodeHealth], now: float
) -> dict[str, NodeHealth]:
    """Return the replicas whose lag has changed."""
    changed = {}
    for name in shard.members:
        node = nodes[name]
        lag_bytes, lag_seconds = _lag(shard, node, now)
        if (lag_bytes, lag_seconds) != (node.lag_bytes, node.lag_seconds):
            changed[name] = replace(node, lag_bytes=lag_bytes, lag_seconds=lag_seconds)
    return changed


def _lag(shard: ShardHealth, node: NodeHealth, now: float) -> tuple[int | None, float | None]:
    """Return how far a node is behind its shard's primary, in bytes and in seconds.

    Two upper bounds, each wrong alone. The age of the last replayed transaction grows without end
    while the primary is idle, and one byte written after an idle hour would make a replica look an
    hour old. The primary's history says: at time t its log ended at L or before, and this replica
    has replayed L, so it holds everything from before t; but it is only as fine as the probes. The
    smaller one is the answer, and zero bytes behind is zero whatever they say.

    As long as no primary was ever seen, only the age is known. None on both where a replica is on
    an older timeline than the primary: it may have replayed what the promotion left behind.
    """
    if node.role is not Role.REPLICA or node.refused:
        return None, None
    primary = shard.primary_health
    if primary is not None and 0 < node.timeline < primary.timeline:
        return None, None
    lag_bytes = max(0, shard.history[-1][1] - node.lsn) if shard.history else None
    if lag_bytes == 0:
        return 0, 0.0
    bounds = []
    if node.replay_age is not None:
        bounds.append(node.replay_age + max(0.0, now - node.lsn_at))
    reached = bisect_right(shard.history, node.lsn, key=lambda entry: entry[1])
    if reached:
        bounds.append(max(0.0, now - shard.history[reached - 1][0]))
    return lag_bytes, min(bounds) if bounds else None


def _with_replicas(shard: ShardHealth, nodes: Mapping[str, NodeHealth], now: float) -> ShardHealth:
    """Return the shard with what its readers look up, taken from the final values of its nodes."""
    members = [nodes[name] for name in shard.members]
    confirmed_at = shard.confirmed_at
    for member in members:
        if member.epoch is not None and member.epoch == shard.highest_epoch:
            confirmed_at = max(confirmed_at, _confirmation(shard, member, now))
    return replace(
        shard,
        primary_health=nodes[shard.primary] if shard.primary else None,
        replicas=tuple(m for m in members if m.role is Role.REPLICA),
        confirmed_at=confirmed_at,
    )


def _with_read_rate(shard: ShardHealth, now: float) -> ShardHealth:
    """Return the shard with the most reads per second that its replicas have answered lately."""
    rate = sum(node.read_rate for node in shard.replicas if node.state is State.UP)
    if rate <= 0 and shard.read_rate <= 0:
        return shard
    age = max(0.0, now - shard.read_rate_at) if shard.read_rate_at > NEVER else 0.0
    kept = shard.read_rate * 0.5 ** (age / READ_RATE_HALF_LIFE)
    return replace(shard, read_rate=max(rate, kept), read_rate_at=now)


def _confirmation(shard: ShardHealth, node: NodeHealth, now: float) -> float:
    """Return the moment at which the node's epoch is known to have been the one in force."""
    if node.refused:
        return NEVER
    if node.role is Role.PRIMARY or node.lag_bytes == 0 or not shard.history:
        return node.epoch_at
    if node.lag_seconds is None:
        return NEVER
    return min(node.epoch_at, now - node.lag_seconds)
