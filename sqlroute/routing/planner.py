"""Plan a statement: described once per shape, placed by its keys, sent to a chosen node.

Pure: the shard map, the health, the session's affinity, the time and the randomness are given.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import BindParameter, ClauseElement, ColumnElement
from sqlalchemy.sql.type_api import TypeDecorator

from sqlroute.errors import (
    CrossShardRefused,
    InvalidShardKey,
    MissingShardKey,
    NoEligibleNode,
    NoPrimary,
    PlanError,
    ShardMapUnavailable,
)
from sqlroute.health import Health
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.balancing import candidates, choose, describe_token
from sqlroute.routing.hashing import bucket_of
from sqlroute.routing.keys import Bind, Values, stored
from sqlroute.routing.plan import Plan, Target, Tier
from sqlroute.routing.plan import target as _made
from sqlroute.routing.policy import Consistency, Policy
from sqlroute.routing.rows import bucket_of_key
from sqlroute.routing.statement import Kind, Placement, Statement, describe
from sqlroute.topology import Keyspace, ShardMap, Topology

if TYPE_CHECKING:
    from sqlroute.routing.rewrite import MergeShape, Rewritten

SHAPES = 1_000
"""How many shapes of statements are remembered; beyond it the oldest goes."""


PLANS = 64
"""How many plans of one shape are remembered."""


@dataclass(slots=True)  # not frozen: one is made per statement, and freezing costs 4 us
class Situation:
    """Everything outside the statement that a plan depends on.

    Attributes:
        maps: the shard map of each sharded keyspace, by its name.
        loads: statements under way per node.
        exclude: nodes that failed this very statement.
        shard: the shard that the caller named, if any.
        may_wait: say that a replica must be proved fresh, rather than fall back to the primary.
    """

    topology: Topology
    policy: Policy
    health: Health
    maps: Mapping[str, ShardMap]
    affinity: Affinity
    loads: Mapping[str, int]
    exclude: frozenset[str] = frozenset()
    shard: str | None = None
    may_wait: bool = False


class Unproven(Exception):  # no error: it asks the runtime for a fact
    """No replica is known to have replayed the session's token; ask them, then plan again."""

    def __init__(self, shard: str) -> None:
        self.shard = shard


@dataclass(slots=True)
class Shape:
    """What is remembered of one shape of statement.

    Attributes:
        position: of each bind parameter in the cache key, by the name it had first.
        reads_entities: rows may hold ORM entities, which must carry their shard as identity token.
        key: the one parameter that places every table of it, if it is as simple as that.
        merge: how its answers merge, made when it is first scattered.
        plans: of one shard, by (target, epoch): they differ in nothing else.
        code_points: the collation it was made for.
    """

    statement: Statement
    position: Mapping[str, int]
    reads_entities: bool = True
    key: Bind | None = None
    merge: MergeShape | None = None
    code_points: bool = False
    plans: dict[tuple[Target, int], Plan] = field(default_factory=dict)


@dataclass(slots=True)
class Described:
    """A statement to be executed: its shape, and the way to its values."""

    statement: Any
    shape: Shape
    binds: Any
    parameters: Any

    def value(self, key: str) -> Any:
        """Return the value of a bind parameter.

        Raises:
            KeyError: it has none, or one per row of parameters.
        """
        position = self.shape.position.get(key)
        parameters = self.parameters
        if position is None:
            if isinstance(parameters, Mapping):
                return parameters[key]
            raise KeyError(key)
        bind = self.binds[position]
        if parameters:
            if not isinstance(parameters, Mapping):
                raise KeyError(key)
            if bind.key in parameters:
                return parameters[bind.key]
            if bind.unique and _may_rename(bind, parameters):
                raise KeyError(key)
        if bind.required:
            raise KeyError(key)
        return bind.effective_value


@dataclass(slots=True)
class Planner:
    """Remembers shapes; otherwise a function from a statement and a situation to a plan."""

    topology: Topology
    _shapes: OrderedDict[Any, Shape] = field(default_factory=OrderedDict)

    def describe(self, statement: Any, parameters: Any = None) -> Described:
        """Describe a statement, from memory when its shape was seen before.

        Raises:
            PlanError: its tables cannot be placed.
        """
        statement = getattr(statement, "_resolved", statement)  # of a lambda statement
        make = getattr(statement, "_generate_cache_key", None)
        cache_key = make() if make is not None else None
        if cache_key is None:
            binds = _binds(statement)
            position = {bind.key: i for i, bind in enumerate(binds)}
            shape = Shape(describe(statement, self.topology), position, _reads_entities(statement))
            return Described(statement, shape, binds, _given(_params(statement), parameters))
        found = self._shapes.get(cache_key.key)
        if found is None:
            position = {bind.key: i for i, bind in enumerate(cache_key.bindparams)}
            description = describe(statement, self.topology)
            found = Shape(
                description, position, _reads_entities(statement), _simple_key(description)
            )
            self._shapes[cache_key.key] = found
            while len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        if cache_key.params:
            parameters = _given(cache_key.params, parameters)
        return Described(statement, found, cache_key.bindparams, parameters)

    def merge(self, described: Described, found: Plan, code_points: bool) -> tuple[Rewritten, Plan]:
        """Return what every shard is sent with its merge, and the plan that tells of it.

        Args:
            code_points: every shard's default collation orders text by code point.

        Raises:
            CrossShardRefused: the answers cannot be merged exactly; names the clause.
        """
        from sqlroute.routing.rewrite import analyse, rewritten  # the largest part, if ever needed

        shape, statement = described.shape, described.statement
        if shape.merge is None or shape.code_points != code_points:
            shape.merge = analyse(statement, text_order_is_code_point=code_points)
            shape.code_points = code_points
        parameters = described.parameters
        given = parameters if isinstance(parameters, Mapping) else None
        result = rewritten(statement, shape.merge, given)
        return result, replace(found, merge=result.spec.describe())


def _binds(statement: Any) -> tuple[BindParameter[Any], ...]:
    """Return the parameters of a statement that SQLAlchemy cannot cache."""
    if not isinstance(statement, ClauseElement):
        return ()
    elements = visitors.iterate(statement)
    return tuple(element for element in elements if isinstance(element, BindParameter))


def _params(statement: Any) -> dict[str, Any]:
    """Return what ``statement.params(...)`` gave to such a statement and to those inside."""
    found: dict[str, Any] = {}
    if isinstance(statement, ClauseElement):
        for element in visitors.iterate(statement):
            found.update(getattr(element, "_params", {}))
    return found


def _given(params: Mapping[str, Any], parameters: Any) -> Any:
    """Return the parameters of one execution, over those given by ``statement.params(...)``."""
    if parameters and not isinstance(parameters, Mapping):
        return parameters  # a row each
    return {**params, **(parameters or {})} or parameters


def _may_rename(bind: BindParameter[Any], parameters: Mapping[str, Any]) -> bool:
    """Say whether a parameter may mean an anonymous one by its name in the SQL, ``id_1``."""
    name = re.compile(re.escape(str(bind._orig_key)) + r"_\d+")
    return any(name.fullmatch(str(given)) for given in parameters)


def _reads_entities(statement: Any) -> bool:
    columns = getattr(statement, "_raw_columns", None)
    return columns is None or any(not isinstance(c, ColumnElement) for c in columns)


def _simple_key(statement: Statement) -> Bind | None:
    """Return the parameter of ``key = :parameter``, when that alone places every table."""
    if statement.placement is not Placement.SHARDED:
        return None
    binds = {occurrence.recipe.simple() for occurrence in statement.occurrences}
    kinds = {occurrence.key.kinds for occurrence in statement.occurrences}
    return binds.pop() if len(binds) == len(kinds) == 1 else None


def plan(described: Described, situation: Situation, rng: Random) -> Plan:
    """Plan one execution of a described statement (not the rows of an INSERT into a sharded table).

    Raises:
        PlanError: it cannot be routed; nothing was sent.
        TopologyError: no node can take it now.
        Unproven: replicas must be asked first (only when the situation allows to wait).
    """
    statement = described.shape.statement
    keyspace = statement.keyspace
    if not keyspace.is_sharded:
        shard = keyspace.shards[0].name
        _check_named(situation, keyspace)
        target = _target(shard, statement.kind, situation, rng)
        return Plan(Tier.SINGLE, (target,), statement.kind.value, 0, statement.reasons)
    shard_map = map_of(situation, keyspace)
    found = _keyed(described, situation, shard_map, rng)
    if found is not None:
        return found
    shards, reason = _shards(statement, described.value, situation, shard_map)
    epoch = shard_map.epoch
    reasons = (*statement.reasons, reason)
    if len(shards) == 1:
        target = _target(shards[0], statement.kind, situation, rng)
        return Plan(Tier.SINGLE, (target,), statement.kind.value, epoch, reasons)
    if statement.placement is Placement.ANYWHERE:
        targets = tuple(_target(shard, Kind.WRITE, situation, rng) for shard in shards)
        return Plan(Tier.BROADCAST, targets, statement.kind.value, epoch, reasons)
    targets = tuple(_target(shard, statement.kind, situation, rng) for shard in shards)
    return Plan(Tier.SCATTER, targets, statement.kind.value, epoch, reasons)


def _keyed(
    described: Described, situation: Situation, shard_map: ShardMap, rng: Random
) -> Plan | None:
    """Plan the most frequent statement, ``key = :parameter``, with the least work."""
    shape = described.shape
    key = shape.key
    if key is None or situation.shard is not None:
        return None
    statement = shape.statement
    kinds = statement.occurrences[0].key.kinds
    try:
        value = described.value(key.key)
        if type(value) is not int or isinstance(key.type, TypeDecorator):
            value = stored(value, key.type)
        bucket = bucket_of((value,), kinds, statement.keyspace.buckets)
    except (KeyError, InvalidShardKey):
        return None
    if value is None:
        return None
    target = _target(shard_map.owner(bucket), statement.kind, situation, rng)
    found = shape.plans.get((target, shard_map.epoch))
    if found is None:
        reasons = (*statement.reasons, _on_one_shard(statement))
        found = Plan(Tier.SINGLE, (target,), statement.kind.value, shard_map.epoch, reasons)
        if len(shape.plans) >= PLANS:
            shape.plans.clear()
        shape.plans[target, shard_map.epoch] = found
    return found


def plan_rows(described: Described, keys: list[Any], situation: Situation, rng: Random) -> Plan:
    """Plan an INSERT into a sharded table: each row to the shard of its key.

    Raises:
        MissingShardKey, InvalidShardKey, UnownedBucket: a row cannot be placed.
        CrossShardRefused: a subquery in its values reads what another shard holds.
    """
    statement = described.shape.statement
    table = statement.insert
    assert table is not None
    shard_map = map_of(situation, statement.keyspace)
    rows: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        bucket = bucket_of_key(table, key, statement.keyspace.buckets)
        rows.setdefault(shard_map.owner(bucket), []).append(index)
    shards = tuple(rows) or shard_map.shards[:1]
    read = _holders(statement, described.value, shard_map)
    if read and (len(shards) > 1 or not read <= set(shards)):
        raise CrossShardRefused(
            "subquery in INSERT",
            f"it reads shards {', '.join(sorted(read))}, the rows go to "
            f"{', '.join(sorted(shards))}; read the values first and insert them",
        )
    targets = tuple(_target(shard, Kind.WRITE, situation, rng) for shard in shards)
    tier = Tier.SINGLE if len(targets) == 1 else Tier.SPLIT
    reason = f"{len(keys)} row(s) placed by their key ({statement.key or table.name})"
    return Plan(
        tier,
        targets,
        statement.kind.value,
        shard_map.epoch,
        (*statement.reasons, reason),
        rows=tuple(tuple(rows.get(shard, ())) for shard in shards),
    )


def primary_target(shard: str, situation: Situation) -> Target:
    """Return the primary of a shard, for a write that no statement describes (a flush).

    Raises:
        NoPrimary: none is known.
    """
    return _made(shard, _primary(shard, situation), True, True, "a write")


def map_of(situation: Situation, keyspace: Keyspace) -> ShardMap:
    """Return the shard map of a keyspace.

    Raises:
        ShardMapUnavailable: it was never read.
    """
    found = situation.maps.get(keyspace.name)
    if found is None:
        raise ShardMapUnavailable(
            f"keyspace {keyspace.name} has {len(keyspace.shards)} shards and no shard map; "
            "make one by router.create_all(metadata) or `sqlroute catalog install`"
        )
    return found


def _check_named(situation: Situation, keyspace: Keyspace) -> None:
    if situation.shard is not None and situation.shard not in keyspace.shard_names:
        raise PlanError(
            f"sqlroute_shard={situation.shard!r} is no shard of keyspace {keyspace.name} "
            f"({', '.join(keyspace.shard_names)})"
        )


def _shards(
    statement: Statement, values: Values, situation: Situation, shard_map: ShardMap
) -> tuple[tuple[str, ...], str]:
    """Return the shards of a statement of a sharded keyspace, and why these."""
    keyspace = statement.keyspace
    if situation.shard is not None:
        _check_named(situation, keyspace)
        if statement.target is not None and statement.placement is Placement.ANYWHERE:
            raise PlanError(
                f"reference table {statement.target.fullname} is written on every shard, not on "
                f"{situation.shard} alone; leave sqlroute_shard out"
            )
        return (situation.shard,), "the caller named the shard"
    if statement.placement is Placement.UNPLACED:
        raise CrossShardRefused(
            "text()" if statement.kind is Kind.UNKNOWN else "statement",
            f"keyspace {keyspace.name} has {len(keyspace.shards)} shards and nothing says where "
            f"this belongs ({statement.reasons[0]}); name a shard by "
            "execution_options(sqlroute_shard=...)",
        )
    if statement.placement is Placement.ANYWHERE:
        return _anywhere(statement, situation, shard_map)
    found = _holders(statement, values, shard_map)
    if not found:
        return (
            shard_map.shards[0],
        ), "its conditions on the key exclude every row; any shard says so"
    if len(found) == 1:
        return tuple(found), _on_one_shard(statement)
    _check_scatter(statement)
    shards = tuple(shard for shard in shard_map.shards if shard in found)
    reason = f"its key ({statement.key}) allows {len(shards)} of {len(shard_map.shards)} shards"
    return shards, reason


def _holders(statement: Statement, values: Values, shard_map: ShardMap) -> set[str]:
    """Return the shards that can hold a row that the statement reads."""
    found: set[str] = set()
    for occurrence in statement.occurrences:
        buckets = occurrence.recipe.buckets(
            values, occurrence.key.kinds, statement.keyspace.buckets
        )
        if buckets is None:
            shard_map.check_complete()
            found.update(shard_map.shards)
        else:
            found.update(shard_map.owner(bucket) for bucket in buckets)
    return found


def _on_one_shard(statement: Statement) -> str:
    return f"its key ({statement.key}) is on one shard"


def _anywhere(
    statement: Statement, situation: Situation, shard_map: ShardMap
) -> tuple[tuple[str, ...], str]:
    if statement.kind is Kind.READ or not statement.tables:
        if statement.kind is not Kind.READ:
            raise CrossShardRefused(
                "statement",
                f"{statement.reasons[0]} and nothing says on which shard; name one by "
                "execution_options(sqlroute_shard=...)",
            )
        tied = next((s for s in shard_map.shards if situation.affinity.of(s).replica), None)
        shard = tied or shard_map.shards[0]
        return (shard,), "its tables are held in full on every shard"
    if statement.target is None:
        first = statement.keyspace.shard_names[0]
        return (first,), "not proved to be a read; reference tables are locked on the first shard"
    return statement.keyspace.shard_names, "a reference table is written on every shard"


def _check_scatter(statement: Statement) -> None:
    """Refuse what has no exact answer on several shards.

    Raises:
        MissingShardKey: an UPDATE or DELETE without its key.
        CrossShardRefused: any other statement that is no plain read.
    """
    if statement.target is not None:
        raise MissingShardKey(
            f"{statement.reasons[0]} to {statement.target.fullname} without its shard key "
            f"({statement.key}) in WHERE; add the key, or name a shard by "
            "execution_options(sqlroute_shard=...)"
        )
    if statement.hindrance is not None:
        clause, why = statement.hindrance
        raise CrossShardRefused(clause, f"{why}; restrict it to one shard by its key")
    if statement.kind is not Kind.READ:
        raise CrossShardRefused(
            "SELECT ... FOR UPDATE" if "lock" in statement.reasons[0] else "statement",
            f"{statement.reasons[0]}; on several shards only reads are merged; "
            "restrict it to one shard by its key",
        )


def _target(shard: str, kind: Kind, situation: Situation, rng: Random) -> Target:
    """Choose the node of one shard."""
    tie = situation.affinity.of(shard)
    if kind is not Kind.READ:
        why = "a write" if kind is Kind.WRITE else "not proved to be a read"
        return _made(shard, _primary(shard, situation), True, True, why)
    if situation.affinity.explicit or tie.pinned:
        why = "the transaction is open on the primary" if tie.pinned else "an explicit transaction"
        return _made(shard, _primary(shard, situation), True, True, why)
    policy = situation.policy
    if policy.consistency is Consistency.STRONG:
        return _made(shard, _primary(shard, situation), True, False, "consistency is strong")
    found = candidates(
        shard, situation.health, situation.topology, policy, tie.token, situation.exclude
    )
    for node in found.fresh:
        if node.node == tie.replica:
            return _made(shard, node.node, False, False, "the transaction reads from it")
    if found.fresh:
        node = choose(found.fresh, situation.loads, rng)
        why = (
            "a healthy replica"
            if tie.token is None or policy.consistency is not Consistency.SESSION
            else f"has replayed what {describe_token(tie.token)}"
        )
        return _made(shard, node.node, False, False, why)
    if found.unproven and situation.may_wait:
        raise Unproven(shard)
    return _fallback(shard, found.reasons(), situation)


def _fallback(shard: str, reasons: str, situation: Situation) -> Target:
    """Send a read to the primary when no replica may take it."""
    no_replicas = len(situation.topology.shard(shard).nodes) == 1
    if not no_replicas and not situation.policy.primary_fallback:
        raise NoEligibleNode(
            f"no replica of shard {shard} may take the read: {reasons}; "
            "set primary_fallback = true or raise max_lag"
        )
    why = "the shard has no replicas" if no_replicas else f"no replica may take it: {reasons}"
    return _made(shard, _primary(shard, situation), True, False, why)


def _primary(shard: str, situation: Situation) -> str:
    primary = situation.health.primary(shard)
    if primary is None or primary.node in situation.exclude:
        states = ", ".join(
            f"{node.name} just failed"
            if node.name in situation.exclude
            else f"{node.name} {_state(situation.health, node.name)}"
            for node in situation.topology.shard(shard).nodes
        )
        raise NoPrimary(
            f"shard {shard} has no primary now: {states}; try again or promote a node", shard
        )
    return primary.node


def _state(health: Health, name: str) -> str:
    node = health.of(name)
    detail = node.refused or node.last_error
    return f"is {node.state.value}" + (f" ({detail})" if detail else f" {node.role.value}")
