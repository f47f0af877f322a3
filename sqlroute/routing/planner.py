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

from sqlalchemy.sql import Select, visitors
from sqlalchemy.sql.elements import BindParameter, ClauseElement, ColumnElement, TextClause
from sqlalchemy.sql.type_api import TypeDecorator

from sqlroute.errors import (
    CrossShardRefused,
    InvalidShardKey,
    MissingShardKey,
    NoEligibleNode,
    NoPrimary,
    PlanError,
    ShardMapUnavailable,
    TopologyError,
    UnknownName,
)
from sqlroute.health import TextOrder
from sqlroute.routing.coordinated import coordinated
from sqlroute.routing.functions import BUILT_IN, Functions
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.keys import Bind, Unproved, Values, stored
from sqlroute.routing.known import KnownTables
from sqlroute.routing.plan import Missing, Plan, Target, Tier
from sqlroute.routing.rows import bucket_of_key
from sqlroute.routing.statement import Kind, Placement, Statement, describe, text_of
from sqlroute.routing.target import Situation, kind_of, target_of
from sqlroute.topology import Keyspace, ShardMap, Topology

if TYPE_CHECKING:
    from sqlroute.routing.rewrite import Rewritten
    from sqlroute.routing.shapes import MergeShape

SHAPES = 1_000
"""How many shapes of statements are remembered; beyond it the oldest goes."""


class OldMap(Exception):  # no error: it asks the runtime for a fact
    """The session has seen a newer shard map than the one in use: read it, then plan again.

    Attributes:
        epoch: of the map that it has seen.
    """

    def __init__(self, keyspace: Keyspace, epoch: int) -> None:
        super().__init__(keyspace.name, epoch)
        self.keyspace = keyspace
        self.epoch = epoch


@dataclass(frozen=True, slots=True)
class SimpleKey:
    """That ``key = :parameter`` alone places every table of a statement.

    Attributes:
        bind: the parameter.
        kinds: how its value is hashed.
        reasons: of every plan that comes of it.
    """

    bind: Bind
    kinds: tuple[KeyKind, ...]
    reasons: tuple[str, ...]


@dataclass(slots=True)
class Shape:
    """What is remembered of one shape of statement.

    Attributes:
        position: of each bind parameter in the cache key, by the name it had first.
        constants: what SQL text compares with columns, by the names its recipes have for it.
        reads_entities: rows may hold ORM entities, which must carry their shard as identity token.
        key: what places every table of it, if it is as simple as that.
        merge: how its answers merge, made when it is first scattered.
        unmerged: why they do not, as (clause, why), if so.
        text_order: that it was made for.
        functions: what was known when its functions decided its kind, ``None`` if it calls none.
        tables: what was known when SQL text was placed, ``None`` for other statements.
    """

    statement: Statement
    position: Mapping[str, int]
    constants: Mapping[str, Any] = field(default_factory=dict)
    reads_entities: bool = True
    key: SimpleKey | None = None
    merge: MergeShape | None = None
    unmerged: tuple[str, str] | None = None
    text_order: TextOrder | None = None
    functions: Functions | None = None
    tables: KnownTables | None = None

    def distrust(self, reason: str) -> None:
        """Take it from now on for a statement that is not proved to be a read."""
        self.statement = replace(self.statement, kind=Kind.UNKNOWN, reasons=(reason,))
        self.key = _simple_key(self.statement)


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
            if key in self.shape.constants:
                return self.shape.constants[key]
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

    def rows(self) -> list[Mapping[str, Any]]:
        """Return the keys of the rows of an INSERT given as text, row by row of parameters.

        Raises:
            MissingShardKey: a row has none.
        """
        row_keys = self.shape.statement.row_keys or ()
        several = isinstance(self.parameters, list | tuple)
        given = self.parameters if several else [self.parameters]
        each = [replace(self, parameters=parameters) for parameters in given]
        return [_key_of(row, one) for one in each for row in row_keys]


def _key_of(row: Mapping[str, Bind], described: Described) -> Mapping[str, Any]:
    try:
        return {name: bind.stored(described.value, 1)[0] for name, bind in row.items()}
    except Unproved:
        raise MissingShardKey(
            f"a row of {described.shape.statement.tables[0]} has no value for its shard key "
            f"({', '.join(row)}) that can be read; give it as a parameter of the key's type"
        ) from None


@dataclass(slots=True)
class Planner:
    """Remembers shapes; otherwise a function from a statement and a situation to a plan.

    Attributes:
        functions, tables: what is known of them; replaced by the runtime when it has read more.
    """

    topology: Topology
    functions: Functions = BUILT_IN
    tables: KnownTables = field(default_factory=KnownTables)
    _shapes: OrderedDict[Any, Shape] = field(default_factory=OrderedDict)

    def describe(self, statement: Any, parameters: Any = None) -> Described:
        """Describe a statement, from memory when its shape was seen before.

        Raises:
            PlanError: its tables cannot be placed.
        """
        if type(statement) is Select:
            cache_key = statement._generate_cache_key()
            if cache_key is not None:  # SQLAlchemy will ask for it once more
                statement._set_memoized_attribute("_generate_cache_key", lambda: cache_key)
        else:
            statement = getattr(statement, "_resolved", statement)  # of a lambda statement
            make = getattr(statement, "_generate_cache_key", None)
            cache_key = make() if make is not None else None
        if cache_key is None:
            binds = _binds(statement)
            position = {bind.key: i for i, bind in enumerate(binds)}
            shape = self._shape(statement, position)
            return Described(statement, shape, binds, _given(_params(statement), parameters))
        found = self._shapes.get(cache_key.key)
        if found is None or self._is_outdated(found):
            position = {bind.key: i for i, bind in enumerate(cache_key.bindparams)}
            found = self._shape(statement, position)
            self._shapes[cache_key.key] = found
            while len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        if cache_key.params:
            parameters = _given(cache_key.params, parameters)
        return Described(statement, found, cache_key.bindparams, parameters)

    def _is_outdated(self, shape: Shape) -> bool:
        """Say whether more is known now of what a shape calls and reads."""
        return shape.functions not in (None, self.functions) or (
            shape.tables is not None and shape.tables is not self.tables
        )

    def _shape(self, statement: Any, position: Mapping[str, int]) -> Shape:
        functions, tables = self.functions, self.tables
        clause = text_of(statement) if self._is_sharded else None
        constants: Mapping[str, Any] = {}
        if clause is None:
            description = describe(statement, self.topology, functions)
        else:
            description, constants = self._text(clause, statement)
        return Shape(
            description,
            position,
            constants,
            _reads_entities(statement),
            _simple_key(description),
            functions=functions if description.calls else None,
            tables=None if clause is None else tables,
        )

    @property
    def _is_sharded(self) -> bool:
        return any(keyspace.is_sharded for keyspace in self.topology.keyspaces)

    def _text(self, clause: TextClause, statement: Any) -> tuple[Statement, Mapping[str, Any]]:
        """Describe SQL text by what its tables are known to be; else by what it does alone."""
        from sqlroute.routing.sqltext import describe_clause  # if there is any text at all
        from sqlroute.routing.sqltree import UnknownTable

        try:
            text = describe_clause(clause, self.tables.by_name(), self.topology, self.functions)
        except (PlanError, UnknownName) as unplaced:
            found = describe(statement, self.topology, self.functions)
            untold = (unplaced.table,) if isinstance(unplaced, UnknownTable) else ()
            reasons = (str(unplaced), *found.reasons)
            return replace(found, reasons=reasons, is_text=True, untold=untold), {}
        return text.statement, text.constants

    def merge(
        self, described: Described, found: Plan, text_order: TextOrder
    ) -> tuple[Rewritten, Plan]:
        """Return what every shard is sent with its merge, and the plan that tells of it.

        Args:
            text_order: how the shards' databases compare text.

        Raises:
            CrossShardRefused: the answers cannot be merged exactly; names the clause.
        """
        # the largest part, if ever needed
        from sqlroute.routing.merge import MergeSpec
        from sqlroute.routing.relationships import in_order_of_collection
        from sqlroute.routing.rewrite import Rewritten, analyse, rewritten

        shape, statement = described.shape, described.statement
        if shape.statement.is_text:
            return Rewritten(statement, MergeSpec()), found._replace(merge=MergeSpec().describe())
        parameters = described.parameters
        given = parameters if isinstance(parameters, Mapping) else None
        statement = in_order_of_collection(statement)
        try:
            if shape.merge is None or shape.text_order != text_order:
                shape.merge = analyse(statement, text_order=text_order)
                shape.text_order = text_order
            result = rewritten(statement, shape.merge, given)
        except CrossShardRefused as refused:
            shape.unmerged = refused.clause, refused.why
            raise
        return result, found._replace(merge=result.spec.describe())


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


def _simple_key(statement: Statement) -> SimpleKey | None:
    if statement.placement is not Placement.SHARDED:
        return None
    binds = {occurrence.recipe.simple() for occurrence in statement.occurrences}
    kinds = {occurrence.key.kinds for occurrence in statement.occurrences}
    bind = binds.pop() if len(binds) == len(kinds) == 1 else None
    if bind is None:
        return None
    return SimpleKey(bind, kinds.pop(), (*statement.reasons, _on_one_shard(statement)))


def plan(described: Described, situation: Situation, rng: Random) -> Plan:
    """Plan one execution of a described statement (not the rows of an INSERT into a sharded table).

    Raises:
        PlanError: it cannot be routed; nothing was sent.
        TopologyError: no node can take it now.
        Unproven: replicas must be asked first (only when the situation allows to wait).
    """
    statement = described.shape.statement
    try:
        return _by_shards(described, situation, rng)
    except CrossShardRefused as refused:
        if situation.demand.shard is not None or not statement.keyspace.is_sharded:
            raise
        shard_map = map_of(situation, statement.keyspace)
        return coordinated(statement, described.statement, situation, shard_map, refused)


def _by_shards(described: Described, situation: Situation, rng: Random) -> Plan:
    """Plan for the shards alone.

    Raises: as :func:`plan`, and
        CrossShardRefused: it has no exact answer there, or the caller wants the coordinator's.
    """
    statement = described.shape.statement
    keyspace = statement.keyspace
    kind = kind_of(statement, situation)
    if not keyspace.is_sharded:
        shard = keyspace.shards[0].name
        _check_named(situation, keyspace)
        target = target_of(shard, kind, situation, rng)
        return Plan(Tier.SINGLE, (target,), kind.value, 0, statement.reasons)
    if situation.demand.by_coordinator:
        raise CrossShardRefused("sqlroute_tier", "the caller wants the coordinator to answer")
    shard_map = map_of(situation, keyspace)
    found = _keyed(described, situation, shard_map, kind, rng)
    if found is not None:
        return found
    shards, reason = _shards(statement, described.value, situation, shard_map, kind)
    epoch = shard_map.epoch
    reasons = (*statement.reasons, reason)
    if not shards:
        return Plan(Tier.EMPTY, (), kind.value, epoch, reasons)
    if len(shards) == 1:
        target = target_of(shards[0], kind, situation, rng)
        return Plan(Tier.SINGLE, (target,), kind.value, epoch, reasons)
    if statement.placement is Placement.ANYWHERE:
        if statement.is_text:
            raise CrossShardRefused(
                "text()",
                f"reference table {statement.tables[0]} is written on every shard by the rows that "
                "result, which text does not tell; use insert(), update() or delete() of its Table",
            )
        targets = tuple(target_of(shard, Kind.WRITE, situation, rng) for shard in shards)
        return Plan(Tier.BROADCAST, targets, kind.value, epoch, reasons)
    if described.shape.unmerged is not None and keyspace.coordinator is not None:
        raise CrossShardRefused(*described.shape.unmerged)
    if not situation.demand.partial:
        targets = tuple(target_of(shard, kind, situation, rng) for shard in shards)
        lists = _lists(statement, described.value, shard_map, shards)
        return Plan(Tier.SCATTER, targets, kind.value, epoch, reasons, lists=lists)
    targets, missing = _present(shards, kind, situation, rng)
    lists = _lists(statement, described.value, shard_map, tuple(t.shard for t in targets))
    reasons = (*reasons, "sqlroute_partial: a shard that cannot answer is left out")
    return Plan(Tier.SCATTER, targets, kind.value, epoch, reasons, lists=lists, missing=missing)


def _present(
    shards: tuple[str, ...], kind: Kind, situation: Situation, rng: Random
) -> tuple[tuple[Target, ...], tuple[Missing, ...]]:
    """Return where a partial answer comes from, and the shards that it is without.

    Raises:
        TopologyError: no shard is left.
    """
    targets: list[Target] = []
    missing: list[Missing] = []
    first: TopologyError | None = None
    for shard in shards:
        try:
            if shard in situation.silent:
                raise situation.silent[shard]
            targets.append(target_of(shard, kind, situation, rng))
        except (NoPrimary, NoEligibleNode, ShardMapUnavailable) as error:
            first = first or error
            missing.append(Missing(shard, "", str(error)))
    if first is not None and not targets:
        raise first
    return tuple(targets), tuple(missing)


def _keyed(
    described: Described, situation: Situation, shard_map: ShardMap, kind: Kind, rng: Random
) -> Plan | None:
    """Plan the most frequent statement, ``key = :parameter``, with the least work."""
    key = described.shape.key
    if key is None or situation.demand.shard is not None:
        return None
    bind = key.bind
    try:
        value = described.value(bind.key)
        if type(value) is not int or isinstance(bind.type, TypeDecorator):
            value = stored(value, bind.type)
        bucket = bucket_of((value,), key.kinds, described.shape.statement.keyspace.buckets)
    except (KeyError, InvalidShardKey):
        return None
    if value is None:
        return None
    target = target_of(shard_map.owner(bucket), kind, situation, rng)
    return Plan(Tier.SINGLE, (target,), kind.value, shard_map.epoch, key.reasons)


def plan_rows(described: Described, keys: list[Any], situation: Situation, rng: Random) -> Plan:
    """Plan an INSERT into a sharded table: each row to the shard of its key.

    Raises:
        MissingShardKey, InvalidShardKey, UnownedBucket: a row cannot be placed.
        CrossShardRefused: a subquery in its values reads what another shard holds.
    """
    statement = described.shape.statement
    table = statement.insert
    assert table is not None
    kind_of(statement, situation)
    shard_map = map_of(situation, statement.keyspace)
    rows: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        bucket = bucket_of_key(table, key, statement.keyspace.buckets)
        rows.setdefault(shard_map.owner(bucket), []).append(index)
    shards = tuple(rows) or shard_map.shards[:1]
    read, _ = _holders(statement, described.value, shard_map)
    if read and (len(shards) > 1 or not read <= set(shards)):
        raise CrossShardRefused(
            "subquery in INSERT",
            f"it reads shards {', '.join(sorted(read))}, the rows go to "
            f"{', '.join(sorted(shards))}; read the values first and insert them",
        )
    targets = tuple(target_of(shard, Kind.WRITE, situation, rng) for shard in shards)
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


def map_of(situation: Situation, keyspace: Keyspace) -> ShardMap:
    """Return the shard map of a keyspace.

    Raises:
        ShardMapUnavailable: it was never read.
        OldMap: the session has seen a newer one.
    """
    found = situation.maps.get(keyspace.name)
    if found is None:
        raise ShardMapUnavailable(
            f"keyspace {keyspace.name} has {len(keyspace.shards)} shards and no shard map; "
            "make one by router.create_all(metadata) or `sqlroute catalog install`"
        )
    affinity = situation.affinity
    if affinity.epoch > found.epoch:
        ties = (affinity.of(shard.name) for shard in keyspace.shards)
        epoch = max((tie.token.epoch for tie in ties if tie.token is not None), default=0)
        if epoch > found.epoch:
            raise OldMap(keyspace, epoch)
    return found


def _check_named(situation: Situation, keyspace: Keyspace) -> None:
    if situation.demand.shard is not None and situation.demand.shard not in keyspace.shard_names:
        raise PlanError(
            f"sqlroute_shard={situation.demand.shard!r} is no shard of keyspace {keyspace.name} "
            f"({', '.join(keyspace.shard_names)})"
        )


def _shards(
    statement: Statement, values: Values, situation: Situation, shard_map: ShardMap, kind: Kind
) -> tuple[tuple[str, ...], str]:
    """Return the shards of a statement of a sharded keyspace, and why these.

    None at all where its conditions exclude every row and nothing but rows is asked for.
    """
    keyspace = statement.keyspace
    if situation.demand.shard is not None:
        _check_named(situation, keyspace)
        if statement.target is not None and statement.placement is Placement.ANYWHERE:
            raise PlanError(
                f"reference table {statement.target.fullname} is written on every shard, not on "
                f"{situation.demand.shard} alone; leave sqlroute_shard out"
            )
        return (situation.demand.shard,), "the caller named the shard"
    if statement.placement is Placement.UNPLACED:
        raise CrossShardRefused(
            "text()" if statement.kind is Kind.UNKNOWN or statement.is_text else "statement",
            f"keyspace {keyspace.name} has {len(keyspace.shards)} shards and nothing says where "
            f"this belongs ({statement.reasons[0]}); name a shard by "
            "execution_options(sqlroute_shard=...)",
        )
    if statement.placement is Placement.ANYWHERE:
        return _anywhere(statement, situation, shard_map, kind)
    found, is_empty = _holders(statement, values, shard_map)
    if is_empty and kind is Kind.READ and not statement.is_text:  # of text no column is known
        return (), f"its conditions on the key ({statement.key}) exclude every row"
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


def _holders(statement: Statement, values: Values, shard_map: ShardMap) -> tuple[set[str], bool]:
    """Return the shards that can hold a row it reads, and whether it can give none at all."""
    found: set[str] = set()
    is_empty = False
    for index, occurrence in enumerate(statement.occurrences):
        buckets = occurrence.recipe.buckets(
            values, occurrence.key.kinds, statement.keyspace.buckets
        )
        if buckets is None:
            shard_map.check_complete()
            found.update(shard_map.shards)
        else:
            is_empty |= not buckets and index in statement.required
            found.update(shard_map.owner(bucket) for bucket in buckets)
    return found, is_empty


def _lists(
    statement: Statement, values: Values, shard_map: ShardMap, shards: tuple[str, ...]
) -> tuple[Mapping[str, list[Any]], ...]:
    """Return per shard the values of its own of each list that is compared with a key."""
    shares: dict[str, Mapping[str, list[Any]]] = {}
    if statement.is_text:  # nobody counts how often a text uses its parameters
        return ()
    for occurrence in statement.occurrences:
        kinds, buckets = occurrence.key.kinds, statement.keyspace.buckets
        shares |= occurrence.recipe.shares(values, kinds, buckets, shard_map.owner)
    if not shares:
        return ()
    return tuple({key: share.get(shard, []) for key, share in shares.items()} for shard in shards)


def _on_one_shard(statement: Statement) -> str:
    return f"its key ({statement.key}) is on one shard"


def _anywhere(
    statement: Statement, situation: Situation, shard_map: ShardMap, kind: Kind
) -> tuple[tuple[str, ...], str]:
    if kind is Kind.READ or not statement.tables:
        if kind is not Kind.READ:
            raise CrossShardRefused(
                "statement",
                f"{statement.reasons[0]} and nothing says on which shard; name one by "
                "execution_options(sqlroute_shard=...)",
            )
        last = situation.affinity.last
        shard = last if last in shard_map.shards else shard_map.shards[0]
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
    if statement.kind is not Kind.READ:  # vouched for or not: nobody knows how it would merge
        raise CrossShardRefused(
            "SELECT ... FOR UPDATE" if "lock" in statement.reasons[0] else "statement",
            f"{statement.reasons[0]}; on several shards only reads are merged; "
            "restrict it to one shard by its key",
        )
