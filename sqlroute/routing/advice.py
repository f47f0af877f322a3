"""Judge SQL text without running it: which statements stay on one shard, under which shard key.

Values are not known, only shapes: a statement that compares its whole key with one parameter is on
one shard, whatever the parameter is. A *scheme* says which table is sharded by which column; what
it leaves out is a reference table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, ColumnElement
from sqlalchemy.sql.schema import Table

from sqlroute.errors import PlanError, UnknownName
from sqlroute.routing.functions import AGGREGATES, BUILT_IN, Functions
from sqlroute.routing.keys import Bind, Product, Recipe
from sqlroute.routing.sqltext import TextStatement, describe_text, inserted, rebuilt
from sqlroute.routing.sqltree import Role, TableInfo, Tables
from sqlroute.routing.statement import Kind, Placement, Statement
from sqlroute.topology import Keyspace, Node, Shard, Topology

MOST_SCHEMES = 30
"""How many schemes are tried; each is all statements once more."""

Column = tuple[str, str]
"""Table and column, by name."""


class Reach(Enum):
    """How far a statement goes."""

    ONE = "one shard"
    MANY = "several shards"
    COORDINATOR = "coordinator"
    REFUSED = "refused"
    NONE = "no table"  # of the user's: a command, a look at the system tables


@dataclass(frozen=True, slots=True)
class Shape:
    """One statement of an application, and how often it ran."""

    sql: str
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Judged:
    """What a statement would do, and why."""

    shape: Shape
    reach: Reach
    why: str


@dataclass(frozen=True, slots=True)
class Scheme:
    """Which column each sharded table is sharded by, in the order of the tables' names."""

    columns: tuple[Column, ...]

    @property
    def keys(self) -> Mapping[str, str]:
        return dict(self.columns)

    def __str__(self) -> str:
        return ", ".join(f"{table}.{column}" for table, column in self.columns)


@dataclass(frozen=True, slots=True)
class Verdict:
    """All statements under one scheme.

    Attributes:
        spread: share of the data, 0 to 1, that the scheme spreads over shards.
    """

    scheme: Scheme
    judged: tuple[Judged, ...]
    spread: float

    def calls(self, reach: Reach) -> int:
        return sum(one.shape.calls for one in self.judged if one.reach is reach)

    @property
    def share(self) -> float:
        """Share of the calls, 0 to 1, that stay on one shard."""
        counted = sum(self.calls(reach) for reach in Reach if reach is not Reach.NONE)
        return self.calls(Reach.ONE) / counted if counted else 0.0

    @property
    def score(self) -> float:
        """Share of the calls on one shard times share of the data that is spread."""
        return self.share * self.spread


def judge_shape(
    shape: Shape, tables: Tables, topology: Topology, functions: Functions = BUILT_IN
) -> Judged:
    """Say how far a statement goes, without values for its parameters."""
    try:
        text = describe_text(shape.sql, tables, topology, functions)
    except (PlanError, UnknownName) as error:
        return Judged(shape, Reach.REFUSED, str(error))
    reach, why = _reach(text)
    return Judged(shape, reach, why)


def _reach(text: TextStatement) -> tuple[Reach, str]:
    statement = text.statement
    if not any(name for name in statement.tables if not name.startswith("pg_")):
        return Reach.NONE, "it reads no table"
    if statement.placement is Placement.UNPLACED:
        return Reach.REFUSED, statement.reasons[0]
    if statement.row_keys is not None:
        return Reach.ONE, "each row goes to the shard of its key"
    if statement.placement is Placement.ANYWHERE:
        if statement.target is None:
            return Reach.ONE, "its tables are held in full on every shard"
        return Reach.MANY, "a reference table is written on every shard"
    if len({use.group for use in statement.occurrences}) == 1:
        keys = [_keyed(use.recipe) for use in statement.occurrences]
        if all(key is not None for key in keys):
            return (Reach.ONE, "by its key") if all(keys) else (Reach.MANY, "by a list of keys")
    return _unkeyed(text, statement)


def _keyed(recipe: Recipe) -> bool | None:
    """Say if a recipe means one key; ``None`` where it means any."""
    if not recipe.is_keyed:
        return None
    return any(len(union) == 1 and _is_one_key(union[0]) for union in recipe.unions)


def _is_one_key(alternative: object) -> bool:
    return isinstance(alternative, Product) and all(
        isinstance(column, Bind) and not column.many for column in alternative.columns
    )


def _unkeyed(text: TextStatement, statement: Statement) -> tuple[Reach, str]:
    if statement.kind is not Kind.READ:
        return Reach.REFUSED, f"{statement.reasons[0]} without the shard key ({statement.key})"
    strange = [clause for clause in text.clauses if not _is_merged(clause)]
    if strange:
        return Reach.COORDINATOR, f"{strange[0]} over several shards"
    if statement.hindrance is not None and statement.hindrance[0] not in text.clauses:
        return Reach.COORDINATOR, ": ".join(statement.hindrance)
    if text.clauses:
        clauses = ", ".join(dict.fromkeys(text.clauses))
        return Reach.MANY, f"{clauses} merged, as select(); as text() it needs the coordinator"
    return Reach.MANY, f"no condition on the key ({statement.key})"


_MERGED = {"ORDER BY", "LIMIT", "OFFSET", "GROUP BY", "HAVING", "DISTINCT"}
_NOT_MERGED = {"percentile_cont()", "percentile_disc()", "mode()", "rank()", "grouping()"}


def _is_merged(clause: str) -> bool:
    is_aggregate = clause.endswith("()") and clause[:-2] in AGGREGATES
    return clause in _MERGED or (is_aggregate and clause not in _NOT_MERGED)


# Schemes


def schemes(shapes: Iterable[Shape], tables: Tables) -> tuple[Scheme, ...]:
    """Return the schemes worth trying, those of the columns that are compared most often first.

    Columns that statements make equal belong together: tables sharded by them are joined on their
    keys. So do columns of one name, such as ``customer_id``; not ``id``, which each table has.
    A table with two such columns gives a scheme for each.
    """
    found = _Compared()
    for shape in shapes:
        found.read(shape, tables)
    made: dict[Scheme, None] = {}
    for (table, column), _ in found.calls.most_common():
        keys = {table: column}
        for other, name in found.together((table, column)):
            keys.setdefault(other, name)
        made[Scheme(tuple(sorted(keys.items())))] = None
    return tuple(made)[:MOST_SCHEMES]


@dataclass(slots=True)
class _Compared:
    """Columns that statements compare, how often, and with which other columns."""

    calls: Counter[Column] = field(default_factory=Counter)
    equal: dict[Column, Counter[Column]] = field(default_factory=dict)

    def read(self, shape: Shape, tables: Tables) -> None:
        try:
            core = rebuilt(shape.sql, tables)
            given = inserted(shape.sql, tables)
        except (PlanError, UnknownName):
            return
        for column in given:
            self.calls[column] += shape.calls
        for element in visitors.iterate(core):
            if isinstance(element, BinaryExpression) and element.operator in _EQUAL:
                self._note(list(_columns(element, tables)), shape.calls)

    def _note(self, columns: list[Column], calls: int) -> None:
        for column in columns:
            self.calls[column] += calls
            others = self.equal.setdefault(column, Counter())
            others.update({other: calls for other in columns if other[0] != column[0]})

    def together(self, column: Column) -> Iterator[Column]:
        """Yield the columns equal to one, nearest and most often compared first."""
        seen, queue = {column}, [column]
        while queue:
            near = queue.pop(0)
            equal = [other for other, _ in self.equal.get(near, Counter()).most_common()]
            for other in [*equal, *self._namesakes(near)]:
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
                    yield other

    def _namesakes(self, column: Column) -> list[Column]:
        name = column[1]
        return [other for other in self.calls if other[1] == name] if "_" in name else []


_EQUAL = (operators.eq, operators.in_op)


def _columns(comparison: BinaryExpression[object], tables: Tables) -> Iterator[Column]:
    for side in (comparison.left, comparison.right):
        if not isinstance(side, ColumnElement) or isinstance(side, BindParameter):
            continue
        for base in side.base_columns:
            table = getattr(base, "table", None)
            if isinstance(table, Table) and table.name in tables:
                yield table.name, str(base.key)


def under(scheme: Scheme, tables: Tables) -> Tables:
    """Return the tables as a scheme would have them."""
    keys = scheme.keys

    def changed(info: TableInfo) -> TableInfo:
        if info.role is Role.UNKNOWN:
            return info
        key = keys.get(info.name)
        if key is None:
            return replace(info, role=Role.REFERENCE, key=(), keyspace="advice", is_declared=True)
        return replace(info, role=Role.SHARDED, key=(key,), keyspace="advice")

    return {name: changed(info) for name, info in tables.items()}


FOUR_SHARDS = Topology(
    (Keyspace("advice", tuple(Shard(f"s{i}", (Node(f"s{i}-a"),)) for i in range(4))),)
)
"""Where schemes are tried: any number of shards above one gives the same answers."""


def advise(
    shapes: Iterable[Shape],
    tables: Tables,
    sizes: Mapping[str, int],
    functions: Functions = BUILT_IN,
) -> tuple[Verdict, ...]:
    """Try each scheme on all statements; return the verdicts, the best first.

    Args:
        sizes: bytes of each table; a table of which nothing is known counts as one byte.
    """
    shapes = tuple(shapes)
    known = {info.name for info in tables.values() if info.role is not Role.UNKNOWN}
    total = sum(sizes.get(name, 0) + 1 for name in known)
    verdicts = []
    for scheme in schemes(shapes, tables):
        made = under(scheme, tables)
        judged = tuple(judge_shape(shape, made, FOUR_SHARDS, functions) for shape in shapes)
        spread = sum(sizes.get(name, 0) + 1 for name in scheme.keys) / total
        verdicts.append(Verdict(scheme, judged, spread))
    return tuple(sorted(verdicts, key=lambda verdict: verdict.score, reverse=True))
