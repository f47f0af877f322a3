"""The engine registry: topology, monitor, shard maps and engines behind all sessions.

One router per process. Making it opens nothing: the monitor starts with the first statement, each
pool with its first connection. It turns a described statement into a plan and sees to the two facts
that a plan may wait for: a replica proved fresh, and the lease of the shard map.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.sql.schema import MetaData, Table

from sqlroute.catalog.functions import FunctionReader
from sqlroute.catalog.readers import Readers
from sqlroute.catalog.tables import KEPT, READ_AGAIN, TableReader
from sqlroute.errors import (
    ConfigError,
    ForeignToken,
    NoEligibleNode,
    NoPrimary,
    ShardMapUnavailable,
    UnknownName,
)
from sqlroute.events import (
    Event,
    Fallback,
    Held,
    LeftOut,
    Listener,
    Listeners,
    NodeChanged,
    PrimaryChanged,
    Released,
    Retried,
    StatementDone,
    log_event,
)
from sqlroute.health import Health, NodeHealth, Role, State
from sqlroute.identity import WrittenFirst
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.balancing import Required, candidates, floor_of
from sqlroute.routing.declare import declaration, shard_key
from sqlroute.routing.functions import known
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.planner import Described, OldMap, Planner, Shape, map_of, plan, plan_rows
from sqlroute.routing.policy import (
    AUTOMATIC,
    Consistency,
    Demand,
    Policy,
    PoolLimits,
    pool_limits,
)
from sqlroute.routing.rows import bucket_of_key
from sqlroute.routing.target import (
    History,
    Question,
    Situation,
    UnknownHistory,
    UnknownReaders,
    Unproven,
    bind_target,
)
from sqlroute.routing.token import Position, format_lsn
from sqlroute.runtime.engines import Engines
from sqlroute.runtime.limits import Limit
from sqlroute.runtime.news import changes, is_another
from sqlroute.runtime.waits import Waits, answered, blocking, sleep
from sqlroute.topology import Announced, Keyspace, ShardMap, Topology, differences

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
    from sqlalchemy.orm import sessionmaker

    from sqlroute.runtime.monitor import Monitor
    from sqlroute.session import RoutingSession
    from sqlroute.session_async import RoutingAsyncSession

T = TypeVar("T")
log = logging.getLogger("sqlroute.router")

READ_ONLY = "25006"
"""SQLSTATE of a write that a server in recovery, or a read-only transaction, refuses."""

TRIES = 8
"""How often a statement is planned anew because servers or the shard map have changed."""


class Router:
    """Routes the sessions it makes.

    Args:
        topology: the servers.
        policy: the rules of choosing.

    Attributes:
        is_sharded: some keyspace has several shards.
        writes: the write transactions of its sessions: which are under way, which wait.
        readers: the databases of coordinators that read replicas.
        written_first: of each entity whose rows are on every shard, which is written first.
        refused_writes: how many statements a replica has refused as writes; they were run again on
            the primary. Each is a read by all that could be proved, and none in fact.
    """

    def __init__(self, topology: Topology, policy: Policy | None = None) -> None:
        self.topology = topology
        self.policy = policy or Policy()
        self.planner = Planner(topology, known(self.policy))
        self._functions = FunctionReader(self.policy.connect_timeout)
        self._tables = TableReader(self.policy.connect_timeout)
        self.readers = Readers(self.policy.connect_timeout)
        # what a program needs when it makes a router, not when it imports one
        from sqlroute.runtime.discovery import Discovery
        from sqlroute.runtime.monitor import Monitor
        from sqlroute.runtime.usage import ProgramUsage
        from sqlroute.runtime.writes import Writes

        self.writes = Writes(lambda: self.monitor)
        self._usage = ProgramUsage(self._looked_at, self.writes.name_of)
        self._turns: Mapping[str, Iterator[int]] = defaultdict(count)
        self._process = _process()

        self.monitor: Monitor = Monitor(
            topology,
            interval=self.policy.probe_interval,
            deadline=self.policy.probe_deadline,
            rate=self.policy.probe_rate,
            usage=self._usage,
            on_health=self._health_changed,
            on_down=self._node_down,
        )
        self._maps: Mapping[str, ShardMap] = MappingProxyType({})
        self._histories: Mapping[str, History] = MappingProxyType({})
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._rng = Random()
        self.refused_writes = 0
        self.is_sharded = any(keyspace.is_sharded for keyspace in topology.keyspaces)
        self.written_first = WrittenFirst(topology)
        self.demand = Demand(self.policy.consistency)
        self.listeners = Listeners()
        self.listeners.add(
            log_event, (LeftOut, Retried)
        )  # the monitor logs what it sees, the rest is debug
        self._has_looked = False  # in this process
        _routers.add(self)
        self._retired_async: list[Engine] = []
        self._reloading = threading.Lock()
        self._discovery = Discovery(
            topology,
            self._use_discovered,
            ask_catalog=self._announced,
        )
        self._source: str | Path | Mapping[str, Any] | None = None
        self._engines = {
            flavour: Engines(
                topology,
                self.policy,
                is_async=flavour,
                on_failure=self._node_failed,
                on_stale_map=self._map_is_stale,
                on_answer=self._usage.answered,
                limits=self._limits,
            )
            for flavour in (False, True)
        }
        self._coordinators = {
            flavour: Engines(
                topology.coordinators,
                self.policy,
                is_async=flavour,
                on_failure=lambda _, __: False,  # nobody watches them
                on_stale_map=lambda _: None,
                on_answer=lambda _, __: None,
                limits=lambda _: pool_limits(self.policy, 0),
            )
            for flavour in (False, True)
        }

    def __repr__(self) -> str:
        shards = ", ".join(self.topology.keyspace_of_shard)
        return f"Router({shards})"

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any] | None = None) -> Router:
        """Make a router from a TOML file, a dict, or what ``SQLROUTE_CONFIG`` names.

        Raises:
            ConfigError: lists every fault with its path.
        """
        from sqlroute.config import load

        settings = load(source)
        router = cls(settings.topology, settings.policy)
        router._source = source
        return router

    def reload(self, source: str | Path | Mapping[str, Any] | Topology | None = None) -> None:
        """Take over nodes that were added, changed or removed, while statements run.

        What is under way on a node that goes ends there; nothing new is sent to it. Shards, their
        keyspaces and buckets stay: moving those is another matter. The policy stays, too.

        Args:
            source: a configuration, or a topology; by default what the router was made from.

        Raises:
            ConfigError: lists every fault with its path; nothing was changed.
        """
        if not isinstance(source, Topology):
            from sqlroute.config import load

            source = load(self._source if source is None else source).topology
        if faults := tuple(differences(self.topology, source)):
            raise ConfigError(faults)
        self._discovery.declare(source)
        self._use_discovered()

    def _use_discovered(self) -> None:
        """Route to the nodes that are known by now."""
        with self._reloading:
            topology = self._discovery.topology
            with self._lock:
                known_so_far = self.planner
                self.planner = Planner(topology, known_so_far.functions, known_so_far.tables)
                self.topology = topology
            self.monitor.set_topology(topology)
            self.readers.forget()
            self.written_first = WrittenFirst(topology)  # of sessions that begin from now on
            coordinators = topology.coordinators
            self._retired_async += self._engines[True].set_topology(topology)
            self._retired_async += self._coordinators[True].set_topology(coordinators)
            for engine in (
                *self._engines[False].set_topology(topology),
                *self._coordinators[False].set_topology(coordinators),
            ):
                engine.pool.dispose()

    def _announced(self, shard: str, revision: int) -> Announced:
        """Return what the catalog of a shard says of its nodes, the primary's first.

        Raises:
            OSError: no node tells of that revision.
        """
        from sqlroute.catalog.nodes import read_newest

        health = self.monitor.health
        known = [node for node in self.topology.shard(shard).nodes if node.name in health.nodes]
        known.sort(key=lambda node: _distance(health.of(node.name)))
        return read_newest(shard, revision, known, self.policy.connect_timeout)

    async def areload(
        self, source: str | Path | Mapping[str, Any] | Topology | None = None
    ) -> None:
        """Do the same in an event loop, which alone can close what its pools keep open.

        Raises: as :meth:`reload`.
        """
        import asyncio

        from sqlalchemy.util import greenlet_spawn

        await asyncio.to_thread(self.reload, source)
        retired, self._retired_async = self._retired_async, []
        for engine in retired:
            await greenlet_spawn(engine.pool.dispose)

    # sessions

    def sessionmaker(self, **options: Any) -> sessionmaker[RoutingSession]:
        """Return SQLAlchemy's ``sessionmaker`` of routed sessions; options go to the Session."""
        from sqlalchemy.orm import sessionmaker

        from sqlroute.session import RoutingSession

        options.setdefault("class_", RoutingSession)
        return sessionmaker(router=self, **options)

    def async_sessionmaker(self, **options: Any) -> async_sessionmaker[RoutingAsyncSession]:
        """Return SQLAlchemy's ``async_sessionmaker`` of routed sessions."""
        from sqlalchemy.ext.asyncio import async_sessionmaker

        from sqlroute.session import RoutingSession
        from sqlroute.session_async import RoutingAsyncSession

        options.setdefault("class_", RoutingAsyncSession)
        options.setdefault("sync_session_class", RoutingSession)
        return async_sessionmaker(router=self, asynchronous=True, **options)

    def run(
        self,
        fn: Callable[[Any], T],
        *,
        session: Any = None,
        attempts: int = 5,
        timeout: float = 30.0,
        **options: Any,
    ) -> T:
        """Call ``fn(session)`` and commit; all of it again after an error that passes by itself.

        Which errors do :func:`sqlroute.is_retryable` says. A commit whose answer is lost is not
        repeated but resolved: the server is asked what became of it. What the function does
        outside of its session may happen more than once.

        Args:
            fn: the unit of work; what it returns is returned.
            session: use this one, not in a transaction; it is rolled back and emptied before
                another attempt. By default each attempt has a new one, closed at its end.
            attempts: at most.
            timeout: seconds after which no attempt begins; a commit in doubt is resolved by then.
                How long one attempt may take says the option ``deadline``.
            options: of new sessions, as of :meth:`sessionmaker`.

        Raises:
            UnknownCommit: a commit may have been done, and nobody can tell.
            InDoubtCommit: it is done, but on some shard not yet visible.
            InvalidRequestError: the session given cannot be used for it.
        """
        from sqlroute.retry import run

        return run(self, fn, session=session, attempts=attempts, timeout=timeout, options=options)

    async def arun(
        self,
        fn: Callable[[Any], Awaitable[T]],
        *,
        session: Any = None,
        attempts: int = 5,
        timeout: float = 30.0,
        **options: Any,
    ) -> T:
        """Await ``fn(session)`` with an ``AsyncSession`` and commit. See :meth:`run`."""
        from sqlroute.retry import arun

        return await arun(
            self, fn, session=session, attempts=attempts, timeout=timeout, options=options
        )

    # the way of a statement

    def plan(  # noqa: PLR0913 - each is a fact of this one execution
        self,
        described: Described,
        affinity: Affinity,
        engines: Engines,
        *,
        demand: Demand,
        keys: list[Any] | None = None,
        exclude: frozenset[str] = frozenset(),
        limit: Limit | None = None,
        is_real: bool = True,
        may_repeat: bool = False,
    ) -> Plan:
        """Plan one execution, after the facts it needs were made sure of.

        Args:
            demand: what the caller asks for.
            keys: the key of each row, for an INSERT into a sharded table.
            exclude: nodes that just failed this statement.
            limit: until when the session may wait.
            is_real: it will be carried out, not only shown.
            may_repeat: a node that has failed may be tried once more if nothing else is left.

        Raises:
            PlanError: it cannot be routed.
            TokenError: what the session has seen is not there.
            TopologyError: no node can take it now.
        """
        situation = self.situation(affinity, engines, demand, exclude)
        situation.may_wait, situation.may_repeat = True, may_repeat
        if is_real:
            situation.admit = self._usage.admit
        waits: Waits | None = None
        if demand.shard is None and self._learns_tables(described.shape, engines):
            described.shape = self.planner.describe(described.statement, parameters=None).shape
        if self._learns_functions(described.shape, engines):
            described.shape = self.planner.describe(described.statement, parameters=None).shape
        tries, asked = 0, set[str]()
        while tries < TRIES:
            tries += 1
            try:
                if keys is None:
                    found = plan(described, situation, self._rng)
                else:
                    found = plan_rows(described, keys, situation, self._rng)
            except NoPrimary as none:
                if demand.partial:  # rather now than whole
                    raise
                waits = waits or self._waits(none.shard, limit)
                if not waits.goes_on(engines, situation.health.shard(none.shard).primary):
                    raise
                self._ask(engines, none.shard, waits.left())
                tries -= 1
            except ShardMapUnavailable:
                if not self._refresh(described.shape.statement.keyspace, engines, newer_than=0):
                    raise
            except (Question, OldMap, UnknownReaders) as question:
                self._answer(question, situation, engines, limit)
                if isinstance(question, Question) and question.shard not in asked:
                    asked.add(question.shard)  # each of many shards may have one
                    tries -= 1
            else:
                if self._is_awake(found, engines) and (
                    not found.epoch or self._confirmed(found, situation, engines)
                ):
                    return found
            situation.renew(self.monitor.health, self._maps)
        raise ShardMapUnavailable(
            "the servers changed faster than the statement could be planned; try again"
        )

    def learn_functions(self, keyspace: Keyspace, engines: Engines) -> bool:
        """Read ``pg_proc`` of a keyspace, if it is time to; say whether it was read.

        Meanwhile others go on with what is known: to the primary.
        """
        if not self._functions.claim(keyspace.name):
            return False
        found = blocking(engines, self._functions.read, keyspace, self.monitor.health)
        if found is None:
            return False
        with self._lock:
            self.planner.functions = self.planner.functions.learnt(keyspace.name, found)
        return True

    def _learns_functions(self, shape: Shape, engines: Engines) -> bool:
        """Say whether more was read of the functions that a shape of the planner's calls."""
        found = shape.statement
        is_open = found.undecided and shape.functions is not None
        return is_open and self.learn_functions(found.keyspace, engines)

    def _learns_tables(self, shape: Shape, engines: Engines) -> bool:
        """Read which tables SQL text may name, if it is time to; say if that told anything new.

        At once where it names one that is not known, though not more than once a second.
        """
        if shape.tables is None:
            return False
        after = READ_AGAIN if shape.statement.untold else KEPT
        before = self.planner.tables
        for keyspace in self.topology.keyspaces:
            if not self._tables.claim(keyspace.name, after):
                continue
            found = blocking(engines, self._tables.read, keyspace, self.monitor.health)
            if found is not None:
                with self._lock:
                    self.planner.tables = self.planner.tables.learnt(keyspace, found)
        return self.planner.tables is not before

    def declare(self, metadata: MetaData) -> None:
        """Make the declarations of a metadata known to SQL text: views, reference tables.

        :meth:`create_all` does so, too. Sharded tables are found in the catalog without it.

        Raises:
            InvalidShardKey, UnknownName: a declaration does not fit its table.
        """
        with self._lock:
            default = self.topology.default
            self.planner.tables = self.planner.tables.declaring(metadata, default)

    def _answer(
        self,
        question: Exception,
        situation: Situation,
        engines: Engines,
        limit: Limit | None = None,
    ) -> None:
        """Find out what planning needs to know, and put it into the situation."""
        if isinstance(question, UnknownReaders):
            blocking(engines, self.readers.read, question.keyspace)
        elif isinstance(question, OldMap):
            if not self._refresh(question.keyspace, engines, newer_than=question.epoch - 1):
                raise ShardMapUnavailable(
                    f"the session has seen epoch {question.epoch} of the shard map of "
                    f"{question.keyspace.name}, and no node has a map as new"
                )
        elif isinstance(question, Unproven):
            situation.may_wait = self._prove(question, situation, engines, limit)
        elif isinstance(question, UnknownHistory):
            self._read_history(question.shard, engines)
            situation.histories = self._histories

    def explain(self, statement: Any, parameters: Any = None, **options: Any) -> Plan:
        """Return the plan that a new session would make for a statement, without running it.

        Args:
            options: of the session: ``consistency``, ``intent``, ``token``.

        Raises: as :meth:`plan`.
        """
        from sqlroute.session import RoutingSession

        with RoutingSession(router=self, **options) as session:
            return session.explain(statement, parameters)

    def situation(
        self,
        affinity: Affinity,
        engines: Engines,
        demand: Demand = AUTOMATIC,
        exclude: frozenset[str] = frozenset(),
    ) -> Situation:
        """Return what is known now."""
        health = self.health(engines)
        return Situation(
            health.topology,  # of the same moment
            self.policy,
            health,
            self._maps,
            affinity,
            engines.loads,
            demand,
            exclude,
            histories=self._histories,
            process=self._process,
            turns=self._turns,
            readers=self.readers.of,
        )

    def health(self, engines: Engines | None = None) -> Health:
        """Return the newest health; the first call in a process waits for the first look at all."""
        if not self._has_looked:
            blocking(engines or self._engines[False], self._first_look)
        return self.monitor.health

    def look_around(self) -> Health:
        """Find all nodes and ask each of them now: those too that only the catalogs announce.

        Without an answer each of these questions takes as long as a connection may, at most.
        """
        timeout = self.policy.connect_timeout
        self._discovery.start(timeout)
        self.monitor.ready(timeout)
        for shard in self.topology.keyspace_of_shard:  # after it what was seen first is told
            self.monitor.ask(shard, self.policy.probe_deadline)
        self._discovery.settle(timeout)
        return self.monitor.ready(timeout)

    def _first_look(self) -> None:
        """Wait until every shard has a primary, at most as long as a connection may take."""
        deadline = time.monotonic() + self.policy.connect_timeout
        with self._starting:
            if self._has_looked:
                return
            self._discovery.start(self.policy.connect_timeout)
            self._usage.start(self.topology.keyspace_of_shard)
            health = self.monitor.ready(self.policy.connect_timeout)
            for shard in self.topology.keyspace_of_shard:
                while health.primary(shard) is None and time.monotonic() < deadline:
                    time.sleep(0.05)  # a refused connection answers at once
                    health = self.monitor.ask(shard, self.policy.probe_deadline)
            self._usage.start(self.topology.keyspace_of_shard)  # the look may have taken long
            self._has_looked = True

    def _looked_at(self, node: str) -> None:
        """Do what is due from time to time: a node has answered the monitor."""
        self._fit_pools(node)
        self.writes.wake()

    def _fit_pools(self, node: str) -> None:
        """Give each pool of a node this process's part of what may be open there."""
        for engines in self._engines.values():
            engines.fit(node)

    def _limits(self, node: str) -> PoolLimits:
        known = self.monitor.health.nodes.get(node)
        if known is None:
            return pool_limits(self.policy, 0)
        return pool_limits(self.policy, known.monitors, known.share)

    def _prove(
        self, question: Unproven, situation: Situation, engines: Engines, limit: Limit | None
    ) -> bool:
        """Ask the replicas of a shard until one has replayed what the session has seen.

        Not longer than the question is worth. Says whether one has.
        """
        shard = question.shard
        tie = situation.affinity.of(shard)
        began = time.monotonic()
        deadline = began + question.patience
        if limit is not None:
            deadline = min(deadline, limit.at)
        pause = 0.0
        while True:
            left = max(deadline - time.monotonic(), 0.005)
            if pause:
                sleep(engines, pause)
            health = self._ask(engines, shard, left)
            pause = min(2 * pause + 0.001, 0.01, left)  # a replica is not asked without rest
            _check_reached(tie.token, health, began)
            floor = situation.floors.get(shard)
            if tie.nodes and floor is None:
                floor = floor_of(shard, health, tie.nodes, began, situation.exclude)
                if floor is not None:
                    situation.floors = {**situation.floors, shard: floor}
            if any(_is_unflushed(p, health) for p in (tie.token, floor) if p is not None):
                return False  # no replica can have it before the primary's WAL writer has run
            if candidates(
                shard,
                health,
                health.topology,
                self.policy,
                Consistency.SESSION,
                Required(tie.token, tie.nodes, floor),
                situation.exclude,
            ).fresh:
                return True
            if time.monotonic() >= deadline:
                return False

    def _ask(self, engines: Engines, shard: str, timeout: float) -> Health:
        """Have all nodes of a shard asked; under AsyncSession without a thread that waits.

        Nodes of a shard that is held are asked all the time, whoever waits for it.
        """
        if self.writes.hold(shard) is not None and self.monitor.health.primary(shard) is None:
            return self.monitor.health
        timeout = min(timeout, self.policy.probe_deadline)
        if not engines.is_async:
            return self.monitor.ask(shard, timeout)
        from sqlalchemy.util import await_only
        from sqlalchemy.util.concurrency import in_greenlet

        if not in_greenlet():
            return self.monitor.ask(shard, timeout)
        await_only(answered(self.monitor.asking(shard), timeout))
        return self.monitor.health

    def look(self, shard: str, engines: Engines) -> Health:
        """Have all nodes of a shard asked now; return the health after that."""
        return self._ask(engines, shard, self.policy.probe_deadline)

    def _waits(self, shard: str, limit: Limit | None) -> Waits:
        """Return the wait of a new transaction for a primary: one may be promoted now.

        Where none was ever seen nobody waits: the configuration is wrong, or the network.
        """
        known = self.monitor.health.shard(shard)
        patience = self.policy.primary_wait if known.highest_timeline else 0
        return Waits(self.writes, shard, patience, limit, self.policy.max_held)

    def acknowledged(self, shard: str, timeline: int, lsn: int) -> None:
        """Note what a commit was acknowledged with: the monitor tells all nodes of the shard."""
        self.writes.acknowledged(shard, timeline, lsn)
        if shard in self.monitor.idle:  # else its next probe is near
            self.monitor.tell(shard)

    def observed(self, affinity: Affinity, engines: Engines) -> Affinity:
        """Return the affinity with a position for all that the session has read.

        Asks the shards whose last read has shown more than is known.

        Raises:
            NoEligibleNode: neither the node of that read nor the primary answers.
        """
        for shard, tie in affinity.shards.items():
            if not tie.nodes:
                continue
            began = time.monotonic()
            floor = None
            while floor is None:
                health = blocking(engines, self.monitor.ask, shard, self.policy.probe_deadline)
                floor = floor_of(shard, health, tie.nodes, began, frozenset())
                if floor is None and time.monotonic() > began + self.policy.probe_deadline:
                    nodes = ", ".join(sorted(node for node, _ in tie.nodes))
                    raise NoEligibleNode(
                        f"the session has read from {nodes}, which does not answer now, nor does "
                        f"the primary of shard {shard}: nobody knows how much it has seen; "
                        "try again",
                        shard,
                    )
            affinity = affinity.seen(self.position(shard, floor.timeline, floor.lsn))
        return affinity

    def position(self, shard: str, timeline: int, lsn: int) -> Position:
        """Return a position of a shard as it is known now."""
        cluster = self.monitor.health.shard(shard).system_identifier
        return Position(shard, self.epoch_of(shard), timeline, lsn, cluster)

    def _read_history(self, shard: str, engines: Engines) -> None:
        """Read where the timelines of a shard ended, from a node on its newest one."""
        from sqlroute.catalog.history import read_history

        health = self.monitor.health
        newest = health.shard(shard).highest_timeline
        nodes = [
            self.topology.node(node.node)
            for node in health.members(shard)
            if node.is_readable and node.timeline == newest
        ]
        ends = blocking(engines, read_history, nodes, newest, self.policy.connect_timeout)
        if ends is None:
            raise NoPrimary(
                f"no node on timeline {newest} of shard {shard} answers, so nobody knows what was "
                "kept of the earlier ones; try again",
                shard,
            )
        with self._lock:
            found = History(newest, ends)
            self._histories = MappingProxyType({**self._histories, shard: found})

    def _is_awake(self, found: Plan, engines: Engines) -> bool:
        """See to it that what is known of the shards of a plan is not from before they idled."""
        is_awake = True
        for shard in (*found.shards, *(gone.shard for gone in found.missing)):
            if self._usage.note(shard):
                self._ask(engines, shard, self.policy.probe_deadline)
                is_awake = False
        return is_awake

    def _confirmed(self, found: Plan, situation: Situation, engines: Engines) -> bool:
        """See to the lease: each shard of a plan must have confirmed the map it was made by.

        For a partial answer, note the one that does not; it is planned anew without it.
        """
        lease = self.policy.map_lease
        health, now = self.monitor.health, time.monotonic()
        for target in found.targets:
            shard = target.shard
            if health.confirmed(shard, found.epoch, now, lease):
                continue
            health = blocking(engines, self.monitor.ask, shard, self.policy.probe_deadline)
            if health.confirmed(shard, found.epoch, time.monotonic(), lease):
                continue
            keyspace = self.topology.keyspace_of_shard[shard]
            newest = health.highest_epoch(shard) or 0
            if newest > found.epoch and self._refresh(keyspace, engines, newer_than=found.epoch):
                return False
            unconfirmed = ShardMapUnavailable(
                f"shard {shard} did not confirm epoch {found.epoch} of the shard map within "
                f"{lease:g} s (it reports {newest or 'nothing'}); it is unreachable or its catalog "
                "is missing: see `sqlroute status`",
                shard,
            )
            if not situation.demand.partial or found.tier is not Tier.SCATTER:
                raise unconfirmed
            situation.silent = {**situation.silent, shard: unconfirmed}
            return False
        return True

    def _refresh(self, keyspace: Keyspace, engines: Engines, newer_than: int) -> bool:
        """Read the map of a keyspace anew; say whether the one in use is newer than an epoch."""
        from sqlroute.catalog.maps import read_newest

        health = self.monitor.health
        nodes = [node for shard in keyspace.shards for node in shard.nodes]
        nodes.sort(key=lambda node: not health.of(node.name).is_readable)
        primaries = [n for n in nodes if health.of(n.name).role is Role.PRIMARY]
        timeout = self.policy.connect_timeout
        found = blocking(engines, read_newest, keyspace, primaries, timeout)
        if found is None:
            found = blocking(engines, read_newest, keyspace, nodes, timeout)
        with self._lock:
            current = self._maps.get(keyspace.name)
            if found is not None and (current is None or current.epoch < found.epoch):
                log.info("shard map of %s: epoch %d", keyspace.name, found.epoch)
                self._maps = MappingProxyType({**self._maps, keyspace.name: found})
                current = found
        return current is not None and current.epoch > newer_than

    def renew_map(self, keyspace: Keyspace, engines: Engines) -> None:
        """Read the map of a keyspace anew for a session, if there is a newer one."""
        self._refresh(keyspace, engines, newer_than=0)

    def read_map(self, keyspace: Keyspace) -> None:
        """Read the map of a keyspace anew, if there is a newer one."""
        self._refresh(keyspace, self._engines[False], newer_than=0)

    def shard_map(self, keyspace: str | None = None) -> ShardMap:
        """Return the newest shard map of a keyspace, read now.

        Raises:
            ShardMapUnavailable: nobody has one.
        """
        found = self.topology.keyspace(keyspace) if keyspace else self.topology.default
        self.health()
        self._refresh(found, self._engines[False], newer_than=0)
        if found.name not in self._maps:
            raise ShardMapUnavailable(
                f"keyspace {found.name} has no shard map; make one by router.create_all(metadata) "
                "or `sqlroute catalog install`"
            )
        return self._maps[found.name]

    def shard_map_of(self, keyspace: Keyspace, engines: Engines) -> ShardMap:
        """Return the shard map in use, read if there is none yet.

        Raises:
            ShardMapUnavailable: nobody has one.
        """
        found = self._maps.get(keyspace.name)
        if found is None:
            self.health(engines)
            self._refresh(keyspace, engines, newer_than=0)
            found = map_of(self.situation(Affinity(), engines), keyspace)
        return found

    def epoch_of(self, shard: str) -> int:
        """Return the epoch of the shard map in use, 0 without one."""
        found = self._maps.get(self.topology.keyspace_of_shard[shard].name)
        return found.epoch if found is not None else 0

    def locate(self, table: Table, key: tuple[Any, ...]) -> tuple[int, str]:
        """Return (bucket, shard) of a key of a sharded table.

        Raises:
            InvalidShardKey, UnownedBucket: the key has no place.
        """
        declared = declaration(table)
        found = self.shard_map(declared.keyspace if declared else None)
        row = dict(zip(shard_key(table).names, key, strict=True))
        bucket = bucket_of_key(table, row, len(found.owners))
        return bucket, found.owner(bucket)

    # servers

    def engines(self, *, is_async: bool) -> Engines:
        """Return the engines of one flavour."""
        return self._engines[is_async]

    def coordinators(self, *, is_async: bool) -> Engines:
        """Return the engines of the coordinators, of one flavour."""
        return self._coordinators[is_async]

    def primary_engine(self, shard: str) -> Any:
        """Return the sync engine of a shard's primary, for work beside sessions.

        Its ``raw_connection()`` may be in AUTOCOMMIT, left so by a read: use ``connect()``.

        Raises:
            NoPrimary: none is known.
        """
        self.topology.shard(shard)
        engines = self._engines[False]
        return engines.engine(self.primary_of(shard, Affinity(), engines).node)

    def async_primary_engine(self, shard: str) -> AsyncEngine:
        """Return the async engine of a shard's primary, for work beside sessions.

        Raises:
            NoPrimary: none is known.
        """
        self.topology.shard(shard)
        engines = self._engines[True]
        found: AsyncEngine = engines.async_engine(self.primary_of(shard, Affinity(), engines).node)
        return found

    def primary_of(
        self,
        shard: str,
        affinity: Affinity,
        engines: Engines,
        demand: Demand = AUTOMATIC,
        limit: Limit | None = None,
    ) -> Target:
        """Return where goes what no statement describes: the primary of a shard.

        In a read-only transaction it is the node that serves that.

        Raises:
            ReadOnlyRefused: only reads were declared.
            TokenError: what the session has seen is not there.
            NoPrimary: none is known, and asking all its nodes found none.
        """
        waits: Waits | None = None
        situation = self.situation(affinity, engines, demand)
        situation.may_wait = affinity.read_only
        if self._usage.note(shard):
            self._ask(engines, shard, self.policy.probe_deadline)
            situation.renew(self.monitor.health, self._maps)
        while True:
            try:
                return bind_target(shard, situation, self._rng)
            except NoPrimary:
                waits = waits or self._waits(shard, limit)
                if not waits.goes_on(engines, situation.health.shard(shard).primary):
                    raise
                self._ask(engines, shard, waits.left())
            except Question as question:
                self._answer(question, situation, engines, limit)
            situation.renew(self.monitor.health, self._maps)

    def listen(self, listener: Listener, *kinds: type[Event]) -> Callable[[], None]:
        """Have a listener told what happens from now on.

        Args:
            listener: called with each event where it happens; must not block.
            kinds: of events, by default all but :class:`StatementDone` and :class:`PlanChosen`,
                which there is one of for each statement.

        Returns:
            A function that ends it.

        Raises:
            TypeError: a kind that is none.
        """
        wanted = kinds or (NodeChanged, PrimaryChanged, Held, Released, Fallback, Retried)
        end = self.listeners.add(listener, wanted)
        if StatementDone in wanted:
            for engines in self._engines.values():
                engines.observe(self._statement_done)
        return end

    def _statement_done(self, node: str, seconds: float, error: str) -> None:
        self.listeners.tell(StatementDone(self._shard(node), node, seconds, error))

    def _node_failed(self, node: str, error: BaseException) -> bool:
        """Note that a node failed; say if it counts against it.

        A refused write does not: a replica should, and on a primary it may be a transaction that
        was set read-only. If it is a primary no longer, a look at its shard shows that.
        """
        if getattr(error, "sqlstate", None) == READ_ONLY:
            known = self.monitor.health.nodes.get(node)
            if known is not None:
                if known.role is not Role.REPLICA:
                    self.monitor.look(known.shard)
                return False
        self.monitor.report_failure(node, error)
        return True

    def _map_is_stale(self, node: str) -> None:
        """Forget the map that sent a row to the wrong shard: the next plan reads it anew."""
        keyspace = self.topology.keyspace_of_shard[self._shard(node)].name
        with self._lock:
            maps = {name: found for name, found in self._maps.items() if name != keyspace}
            self._maps = MappingProxyType(maps)

    def _health_changed(self, old: Health, new: Health) -> None:
        """Have pooled connections replaced that are of no use, or of another time of their node.

        Those of a node that went down; and of one whose role or timeline is another: a connection
        that was opened to a primary must not meet a replica, nor the reverse.
        """
        for name, node in new.nodes.items():
            before = old.nodes.get(name)
            if before is node:
                continue
            went_down = node.state is State.DOWN and (
                before is None or before.state is not State.DOWN
            )
            if went_down or (before is not None and is_another(before, node)):
                for engines in self._engines.values():
                    engines.expire(name)
        for name, shard in new.shards.items():
            if name in old.shards:
                self.writes.changed(old.shards[name], shard)
                if shard.revision != old.shards[name].revision:
                    self._discovery.revised(name, shard.revision)
        for event in changes(old, new, time.monotonic(), self.writes.take_waited):
            self.listeners.tell(event)

    def _node_down(self, node: str) -> None:
        """Cut the reads that wait for a node that hangs: they go on elsewhere."""
        count = sum(engines.cut_reads(node) for engines in self._engines.values())
        if count:
            log.warning("node %s is down: cut %d read(s) that waited for it", node, count)

    # schema

    def install_catalog(self) -> dict[str, ShardMap]:
        """Create or upgrade the ``sqlroute`` schema on every shard, and the first shard map.

        Returns:
            The shard map of each keyspace.
        """
        from sqlroute.catalog import schema

        return schema.install(self)

    def create_all(self, metadata: MetaData) -> None:
        """Create the catalog and the missing tables on every shard: parents, owned leaves.

        Raises:
            InvalidShardKey: a primary key or unique constraint lacks the shard key.
        """
        from sqlroute.catalog import schema

        schema.create_all(self, metadata)
        self.declare(metadata)

    def drop_all(self, metadata: MetaData) -> None:
        """Drop the tables of a metadata on every shard; the catalog stays."""
        from sqlroute.catalog import schema

        schema.drop_all(self, metadata)

    def recover(self, older_than: float = 10.0) -> tuple[Any, ...]:
        """Finish commits over several shards that a killed process left half way.

        Args:
            older_than: seconds a transaction must have been prepared.
        """
        from sqlroute.catalog.recovery import recover

        engines = {shard: self.primary_engine(shard) for shard in self.topology.keyspace_of_shard}
        return recover(engines, older_than)

    def _shard(self, node: str) -> str:
        try:
            return self.topology.shard_of_node[node]
        except KeyError:
            raise UnknownName(f"unknown node {node!r}") from None

    # the end

    def close(self) -> None:
        """Stop the monitor and close all pools of sync engines."""
        self.monitor.close()  # first: what it sees may start a question
        self._discovery.close()
        self._engines[False].close()
        self._coordinators[False].close()
        self._has_looked = False

    async def aclose(self) -> None:
        """Close everything, pools of async engines too, in their event loop."""
        await self._engines[True].aclose()
        await self._coordinators[True].aclose()
        self.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Router:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


_routers: weakref.WeakSet[Router] = weakref.WeakSet()


def _start_anew() -> None:
    """In a child after a fork: neither threads nor locks of the parent are of use."""
    for router in list(_routers):
        router._has_looked = False
        router._reloading = threading.Lock()
        router._discovery.forget()
        router._process = _process()
        router.writes.forget()
        router._lock, router._starting = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_start_anew)


def _distance(node: NodeHealth) -> tuple[bool, bool, int]:
    """Return by what to sort nodes of a shard: what was written last is there first."""
    return (not node.is_readable, node.role is not Role.PRIMARY, -node.lsn)


def _process() -> str:
    """Return a name of this process among all that read from the same servers."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _check_reached(token: Position | None, health: Health, since: float) -> None:
    """Refuse a token that its shard has never got to: of a state that a restored backup undid.

    Raises:
        ForeignToken: the primary, asked after ``since``, is not as far on the same timeline.
    """
    primary = health.primary(token.shard) if token is not None else None
    if token is None or primary is None or primary.lsn_at < since:
        return
    end = max(primary.lsn, primary.received_lsn or 0)
    if token.timeline == primary.timeline and token.lsn > end:
        raise ForeignToken(
            f"the token has seen {format_lsn(token.lsn)} of shard {token.shard}, whose primary has "
            f"got to {format_lsn(end)}: a backup was restored, or the token was made up; drop it"
        )


def _is_unflushed(position: Position, health: Health) -> bool:
    primary = health.primary(position.shard)
    return primary is not None and position.lsn > primary.lsn
