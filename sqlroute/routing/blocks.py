"""Walk the query blocks of a statement: which sharded tables, which keys, joined how.

Only what is AND-ed counts: conjuncts of WHERE and of inner joins restrict everything beside them;
ON of an outer join restricts its nullable side alone; conditions outside a derived table never
restrict the tables inside it. Equalities between columns carry keys from one table to another and
prove that two sharded tables are joined on their keys (*colocated*), so that each shard can join
its own rows.

One table can be used several times in a statement without an alias, once per block; each use has
a number of its own, and a column belongs to the nearest use around it, as SQLAlchemy renders it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.base import _from_objects
from sqlalchemy.sql.dml import Insert, UpdateBase
from sqlalchemy.sql.elements import (
    AbstractTextClause,
    BinaryExpression,
    BindParameter,
    ClauseElement,
    CollectionAggregate,
    ColumnClause,
    ColumnElement,
    False_,
    Label,
    Over,
    Tuple,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.schema import Table
from sqlalchemy.sql.selectable import (
    CTE,
    AliasedReturnsRows,
    CompoundSelect,
    FromClause,
    FromGrouping,
    Join,
    Lateral,
    Select,
    SelectBase,
    _CompoundSelectKeyword,
)

from sqlroute.routing.conditions import (
    Block,
    ColumnId,
    Conjunct,
    WantedKey,
    column_of,
    equalities,
    recipe,
    split,
)
from sqlroute.routing.declare import Sharded, ShardKey, declaration, kind_of, shard_key
from sqlroute.routing.existence import question
from sqlroute.routing.functions import AGGREGATES, HARMLESS
from sqlroute.routing.keys import Recipe, reference_dialect

Query: TypeAlias = Select[Any] | UpdateBase
"""A block of a statement: what reads or writes tables of its own."""

ANY_BUCKET = Recipe()
NO_BUCKET = Recipe(((),))

_ARM_BY_ARM = (_CompoundSelectKeyword.UNION, _CompoundSelectKeyword.UNION_ALL)


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One use of a sharded table in a statement.

    Attributes:
        table: full name.
        key: its shard key.
        recipe: which of its buckets can matter.
        group: occurrences of one group are joined on their keys.
    """

    table: str
    key: ShardKey
    recipe: Recipe
    group: int


@dataclass(frozen=True, slots=True)
class Found:
    """All uses of sharded tables, and what forbids to run the statement shard by shard.

    Attributes:
        required: indexes of the uses without whose rows the statement gives no row at all.
    """

    occurrences: tuple[Occurrence, ...]
    hindrance: tuple[str, str] | None
    required: tuple[int, ...] = ()


def occurrences(core: Any, sharded: tuple[Table, ...], queries: Sequence[Query]) -> Found:
    """Return the uses of sharded tables in a rendered statement.

    The table of an INSERT is no use: its rows carry the keys.

    Args:
        queries: every SELECT, INSERT, UPDATE and DELETE in it, itself included.
    """
    if isinstance(core, CompoundSelect) and core.keyword in _ARM_BY_ARM:
        return _arms(core, sharded)
    asked = question(core)
    if asked is not None and _is_plain(asked.rows):
        inner = [query for query in queries if hash(query) != hash(core)]
        return replace(occurrences(asked.rows, sharded, inner), required=())  # a row of none
    walk = _Walk(core, is_nested=len(queries) > 1)
    if isinstance(core, Select):
        scope = _Scope()
        _select(core, walk, scope, Block())
        if not (_makes_rows(core) or walk.is_aggregated_inside):
            _require(core, scope)
    elif isinstance(core, CompoundSelect):
        walk.seen.add(hash(core))
        walk.hinder(_set_operation(core), "set operations across shards come with the coordinator")
        for arm in core.selects:
            _derived(arm, walk, Block())
    elif isinstance(core, UpdateBase):
        _dml(core, walk, Block())
        if isinstance(core, Insert):
            sharded = tuple(table for table in sharded if hash(table) != hash(core.table))
    elif sharded:
        walk.hinder(type(core).__name__, "its tables cannot be seen")
    _unfollowed(queries, walk)
    return walk.finish(sharded)


def _arms(core: CompoundSelect[Any], sharded: tuple[Table, ...]) -> Found:
    """Return what the arms of a UNION use, each judged by itself.

    Whether the rows of all arms may be put together is a question of the merge.
    """
    found: list[Occurrence] = []
    hindrances: list[tuple[str, str] | None] = []
    for one_arm in core.selects:
        arm: Any = one_arm
        while not isinstance(arm, Select | CompoundSelect) and hasattr(arm, "element"):
            arm = arm.element
        parts = list(visitors.iterate(arm))
        within = {hash(part) for part in parts}
        queries = [part for part in parts if isinstance(part, Select | UpdateBase)]
        own = occurrences(arm, tuple(t for t in sharded if hash(t) in within), queries)
        first = 1 + max((occurrence.group for occurrence in found), default=-1)
        found += [replace(one, group=first + one.group) for one in own.occurrences]
        hindrances.append(own.hindrance)
        if not own.occurrences and core.keyword is _CompoundSelectKeyword.UNION_ALL:
            why = "an arm without a sharded table would come from every shard"
            hindrances.append((_set_operation(core), why))
    seen = {occurrence.table for occurrence in found}
    if not seen.issuperset(table.fullname for table in sharded):
        hindrances.append((_set_operation(core), "a table outside of its arms cannot be followed"))
    return Found(tuple(found), next(filter(None, hindrances), None))


def _require(select: Select[Any], scope: _Scope) -> None:
    """Note the uses without whose rows the whole statement has none."""
    is_never = any(isinstance(part, False_) for part in _conditions(select._where_criteria))
    for leaf in scope.leaves:
        leaf.is_required = True
        if is_never:
            leaf.recipe = NO_BUCKET


def extra_froms(statement: UpdateBase) -> list[FromClause]:
    """Return what UPDATE ... FROM and DELETE ... USING read, as SQLAlchemy finds it."""
    parts = [*getattr(statement, "_where_criteria", ()), *_dml_values(statement)]
    found = [
        *getattr(statement, "_extra_froms", ()),
        *_from_objects(*(part for part in parts if hasattr(part, "_from_objects"))),
    ]
    table = hash(getattr(statement, "table", None))
    return list({hash(source): source for source in found if hash(source) != table}.values())


class _Classes:
    """Union-find over columns that a conjunct makes equal."""

    def __init__(self, parents: dict[ColumnId, ColumnId] | None = None) -> None:
        self.parents = dict(parents or {})

    def root(self, column: ColumnId) -> ColumnId:
        while (parent := self.parents.get(column, column)) != column:
            column = parent
        return column

    def union(self, left: ColumnId, right: ColumnId) -> None:
        self.parents[self.root(left)] = self.root(right)


@dataclass(slots=True)
class _Leaf:
    """A use of a sharded table, found while walking.

    Attributes:
        derived: it is not in the FROM of the whole statement, nor tied to one that is.
        detached: it is in a derived table or CTE: a condition outside ties its rows, not it.
        is_required: without a row of it the statement gives none.
    """

    source: int
    table: Table
    key: ShardKey
    derived: bool
    detached: bool
    classes: _Classes
    recipe: Recipe = ANY_BUCKET
    is_required: bool = False

    def columns(self) -> tuple[ColumnId, ...]:
        return tuple((self.source, name) for name in self.key.names)

    def roots(self) -> tuple[ColumnId, ...]:
        return tuple(self.classes.root(column) for column in self.columns())

    def wanted(self, is_used_once: Callable[[str], bool]) -> WantedKey:
        columns, root = self.columns(), self.classes.root
        return WantedKey(columns, self.roots(), self.key.kinds, root, is_used_once)


@dataclass(slots=True)
class _Scope:
    """A place in the tree of joins: its conjuncts restrict its leaves and those of its children.

    A child is the nullable side of an outer join; what is found there never restricts its parent.

    Attributes:
        inner: uses in derived tables whose rows are each of one shard.
    """

    leaves: list[_Leaf] = field(default_factory=list)
    conjuncts: list[Conjunct] = field(default_factory=list)
    children: list[_Scope] = field(default_factory=list)
    inner: list[_Leaf] = field(default_factory=list)

    def local(self) -> Iterator[_Leaf]:
        """Yield what is in it and in its children."""
        yield from self.leaves
        yield from self.inner
        for child in self.children:
            yield from child.local()


@dataclass(slots=True)
class _Walk:
    """What is known so far.

    Attributes:
        core: the whole statement.
        is_nested: there are queries in it.
        is_aggregated_inside: a subquery aggregates the rows of a query around it.
    """

    core: Any
    is_nested: bool
    classes: _Classes = field(default_factory=_Classes)
    leaves: list[_Leaf] = field(default_factory=list)
    hindrance: tuple[str, str] | None = None
    is_aggregated_inside: bool = False
    derived: bool = False
    detached: bool = False
    uses: int = 0
    seen: set[int] = field(default_factory=set)
    binds: Counter[str] | None = None

    def is_used_once(self, key: str) -> bool:
        """Say whether a bind parameter is used in one place of the statement only."""
        if self.binds is None:
            elements = visitors.iterate(self.core)
            self.binds = Counter(part.key for part in elements if isinstance(part, BindParameter))
        return self.binds[key] == 1

    def hinder(self, clause: str, why: str) -> None:
        if self.hindrance is None:
            self.hindrance = (clause, why)

    def enter(self, sources: Iterable[Any], around: Block) -> Block:
        """Return the block of these FROM elements; each is a new use."""
        uses = dict(around.uses)
        sources = list(sources)
        for source in sources:
            for name in _names(source):
                self.uses += 1
                uses[hash(name)] = self.uses
        nearest = frozenset(_from_objects(*sources))
        return Block(MappingProxyType(uses), around.enclosing | nearest, nearest)

    def leaf(self, source: int, table: Table) -> _Leaf:
        key = shard_key(table)
        leaf = _Leaf(source, table, key, self.derived, self.detached, self.classes)
        self.leaves.append(leaf)
        return leaf

    def unplaced(self, table: Table) -> None:
        """Note a use of which nothing is known: any row of a sharded table may matter."""
        if not isinstance(declaration(table), Sharded):
            return
        self.hinder(table.fullname, "its use in the statement cannot be followed")
        self.uses += 1
        leaf = self.leaf(self.uses, table)
        leaf.derived, leaf.detached = True, True

    def finish(self, sharded: tuple[Table, ...]) -> Found:
        seen = {leaf.table.fullname for leaf in self.leaves}
        for table in sharded:
            if table.fullname not in seen:  # used in a place this walk does not know
                self.unplaced(table)
        groups: list[_Leaf] = []
        found = []
        for leaf in self.leaves:
            group = next((i for i, other in enumerate(groups) if _colocated(leaf, other)), None)
            if group is None:
                group = len(groups)
                groups.append(leaf)
            found.append(Occurrence(leaf.table.fullname, leaf.key, leaf.recipe, group))
        inside = dict.fromkeys(leaf.table.fullname for leaf in self.leaves if leaf.derived)
        if inside:
            names = " and ".join(inside)
            self.hinder("subquery", f"{names} in it is not tied to the shard key around it")
        if len(groups) > 1:
            names = " and ".join(dict.fromkeys(leaf.table.fullname for leaf in groups))
            self.hinder("JOIN", f"uses of {names} are not joined on their shard keys")
        required = tuple(i for i, leaf in enumerate(self.leaves) if leaf.is_required)
        return Found(tuple(found), self.hindrance, required)


def _colocated(leaf: _Leaf, other: _Leaf) -> bool:
    """Two uses whose keys are equal column by column, in the classes of the inner one."""
    if leaf.key.kinds != other.key.kinds:
        return False
    classes = leaf.classes
    return leaf.roots() == tuple(classes.root(column) for column in other.columns())


def _unfollowed(queries: Iterable[Query], walk: _Walk) -> None:
    """Note every table of a query that this walk did not come by, wherever it stands."""
    for element in queries:
        if hash(element) in walk.seen:
            continue
        tables = [inner for inner in visitors.iterate(element) if isinstance(inner, Table)]
        if isinstance(element, UpdateBase) and isinstance(element.table, Table):
            tables.append(element.table)
        for table in tables:
            walk.unplaced(table)


def _select(
    select: Select[Any],
    walk: _Walk,
    scope: _Scope,
    around: Block,
    inherited: Iterable[Conjunct] = (),
    *,
    in_from: bool = False,
    member: Sequence[ColumnId | None] = (),
) -> Block:
    """Walk one block.

    Args:
        inherited: conjuncts that hold for each outer row around it.
        member: of ``member IN (SELECT ...)``: the columns that its own must equal to count.
    """
    walk.seen.add(hash(select))
    sources = _sources(select, around, in_from=in_from)
    block = walk.enter(sources, around)
    first = len(walk.leaves)
    for source in sources:
        _source(source, walk, scope, block)
    _learn(select._where_criteria, scope, walk, block)
    if member and not _chooses_rows(select):
        _tie_output(select, member, walk, block)
    conditions = [*inherited, *scope.conjuncts]
    _restrict(scope, list(inherited), walk)
    clauses: list[Any] = [
        *select._raw_columns,
        *select._where_criteria,
        *select._having_criteria,
        *select._order_by_clauses,
        *select._group_by_clauses,
        *(join.onclause for source in sources for join in _joins(source)),
    ]
    if around.uses:
        _refuse_outer_aggregates(clauses, walk, block, sources)
    if walk.is_nested:
        _subqueries(clauses, walk, block, set(sources), first, conditions, scope.conjuncts)
    return block


def _tie_output(
    select: Select[Any], member: Sequence[ColumnId | None], walk: _Walk, block: Block
) -> None:
    for outer, column in zip(member, select._all_selected_columns, strict=False):
        own = column_of(column.element if isinstance(column, Label) else column, block)
        if outer is not None and own is not None:
            walk.classes.union(own, outer)


EXTENSION_CLAUSES = (
    "_post_select_clause",
    "_pre_columns_clause",
    "_post_criteria_clause",
    "_post_body_clause",
)
"""Where a SELECT keeps what extends its syntax, as DISTINCT ON of the dialect does."""


def _chooses_rows(select: Select[Any]) -> bool:
    """Say if which rows it gives hangs on rows that it does not give: LIMIT, DISTINCT ON."""
    return (
        select._limit_clause is not None
        or select._offset_clause is not None
        or select._fetch_clause is not None
        or bool(select._distinct_on)
        or any(getattr(select, name, None) is not None for name in EXTENSION_CLAUSES)
    )


def _is_plain(select: Select[Any]) -> bool:
    """Say if its rows over all shards are those of each shard, one after the other."""
    is_filtered = bool(select._having_criteria)
    return not (_chooses_rows(select) or _makes_rows(select) or is_filtered)


def _makes_rows(select: Select[Any]) -> bool:
    """Say if it may give a row of no rows: an aggregate without GROUP BY does.

    A function that is not known may be an aggregate, and text may hold one.
    """
    if select._group_by_clauses:
        return any(map(_may_aggregate, _parts(select._group_by_clauses, ClauseElement)))
    if select._having_criteria:
        return True
    clauses = (*select._raw_columns, *select._order_by_clauses)
    return any(map(_may_aggregate, _parts(clauses, ClauseElement)))


def _may_aggregate(part: Any) -> bool:
    if isinstance(part, FunctionElement):
        name = getattr(part, "name", None)
        return name in AGGREGATES or name not in HARMLESS
    if isinstance(part, ColumnClause):
        return part.is_literal and "(" in part.name  # no call is without it
    return isinstance(part, AbstractTextClause) and "(" in getattr(part, "text", "(")


def _is_local(select: Select[Any], scope: _Scope, block: Block) -> bool:
    """Say if each row of a derived table is made of rows of one shard.

    So it is when the rows are given as they are, and when they are grouped by the shard key.
    """
    clauses = (*select._raw_columns, *select._order_by_clauses)
    if _chooses_rows(select) or any(True for _ in _parts(clauses, Over)):
        return False
    keys = [leaf.columns() for leaf in scope.leaves]
    if select._distinct:
        return _covers(keys, select._all_selected_columns, block)
    if select._group_by_clauses:
        return _covers(keys, select._group_by_clauses, block)
    return not _makes_rows(select)


def _covers(keys: Iterable[tuple[ColumnId, ...]], columns: Iterable[Any], block: Block) -> bool:
    bare = (column.element if isinstance(column, Label) else column for column in columns)
    found = {column_of(column, block) for column in bare}
    return any(found.issuperset(key) for key in keys)


def _refuse_outer_aggregates(
    clauses: Iterable[Any], walk: _Walk, block: Block, sources: Iterable[Any]
) -> None:
    """Hinder ``(SELECT max(outer.x) FROM inner)``: it aggregates the rows of the query around.

    So says the SQL standard of an aggregate whose columns all belong to an enclosing query.
    """
    own = {use for source in sources for use in _uses(source, block)}
    for call in _parts(clauses, FunctionElement):
        if getattr(call, "name", None) not in AGGREGATES:
            continue
        columns = [column_of(part, block) for part in _parts([call], ColumnElement)]
        used = {column[0] for column in columns if column is not None}
        if used and not used & own:
            walk.is_aggregated_inside = True
            walk.hinder("subquery", f"{call.name}() in it aggregates the rows of the outer query")


def _sources(select: Select[Any], around: Block, *, in_from: bool) -> list[FromClause]:
    """Return the FROM that SQLAlchemy will render: without what is correlated, and no less.

    A sole FROM element is never correlated by itself: ``SELECT avg(o.total) FROM o`` inside a
    SELECT from ``o`` reads the whole table. So does a table of a block further out than the next.
    """
    dialect = reference_dialect()
    compiler: Any = dialect.statement_compiler(dialect, None)
    compiler.stack = []
    make: Any = select._compile_state_factory
    explicit = around.enclosing - around.nearest if in_from else around.enclosing
    found: list[FromClause] = make(select, compiler)._get_display_froms(
        explicit_correlate_froms=explicit,
        implicit_correlate_froms=frozenset() if in_from else around.nearest,
    )
    return found


def _dml(statement: UpdateBase, walk: _Walk, around: Block) -> None:
    walk.seen.add(hash(statement))
    values = [value for value in _dml_values(statement) if hasattr(value, "get_children")]
    clauses = [*values, *getattr(statement, "_returning", ())]
    if isinstance(statement, Insert):
        if statement.select is not None:
            _derived(statement.select, walk, around)
        _subqueries(clauses, walk, around, set(), len(walk.leaves), [])
        return
    scope = _Scope()
    sources: list[Any] = [statement.table, *extra_froms(statement)]
    block = walk.enter(sources, around)
    first = len(walk.leaves)
    for source in sources:
        _source(source, walk, scope, block)
    criteria = tuple(getattr(statement, "_where_criteria", ()))
    _learn(criteria, scope, walk, block)
    _restrict(scope, [], walk)
    inside = [*criteria, *clauses]
    _subqueries(inside, walk, block, set(), first, scope.conjuncts, scope.conjuncts)


def _dml_values(statement: Any) -> Iterator[Any]:
    yield from (getattr(statement, "_values", None) or {}).values()
    yield from (value for _, value in getattr(statement, "_ordered_values", None) or ())
    for rows in getattr(statement, "_multi_values", ()):
        for row in rows:
            yield from row.values() if isinstance(row, Mapping) else row


def _source(source: Any, walk: _Walk, scope: _Scope, block: Block) -> None:
    """Walk one element of FROM."""
    if isinstance(source, FromGrouping):
        _source(source.element, walk, scope, block)
    elif isinstance(source, Join):
        _join(source, walk, scope, block)
    elif (table := _table_of(source)) is not None:
        if isinstance(declaration(table), Sharded):
            scope.leaves.append(walk.leaf(block.uses[hash(source)], table))
    elif isinstance(source, AliasedReturnsRows):
        _derived_table(source, walk, scope, block)


def _table_of(source: Any) -> Table | None:
    while isinstance(source, AliasedReturnsRows) and not isinstance(source, CTE):
        source = source.element
    return source if isinstance(source, Table) else None


def _join(join: Join, walk: _Walk, scope: _Scope, block: Block) -> None:
    conditions = [] if join.onclause is None else list(split(join.onclause))
    if not join.full and not join.isouter:
        _source(join.left, walk, scope, block)
        _source(join.right, walk, scope, block)
        _learn(conditions, scope, walk, block)
        return
    left, right = (_Scope() if join.full else scope), _Scope()
    before = len(walk.leaves)
    _source(join.left, walk, left, block)
    between = len(walk.leaves)
    _source(join.right, walk, right, block)
    left_sharded, right_sharded = between > before, len(walk.leaves) > between
    pairs = [pair for condition in conditions for pair in equalities(condition, block)]
    near = _uses(join.right, block)
    if join.full:
        scope.children.append(left)
        _tie_both(pairs, _uses(join.left, block), near, walk)
    else:
        right.conjuncts += [Conjunct(condition, block) for condition in conditions]
        _tie(pairs, near, walk)
    scope.children.append(right)
    if join.full and left_sharded != right_sharded:
        walk.hinder("FULL JOIN", "rows of the unsharded side would appear on every shard")
    elif right_sharded and not left_sharded:
        walk.hinder(
            "LEFT JOIN", "rows of the preserved, unsharded side would appear on every shard"
        )


def _uses(source: Any, block: Block) -> set[int]:
    return {block.uses[hash(name)] for name in _names(source)}


def _tie(pairs: list[tuple[ColumnId, ColumnId]], near: set[int], walk: _Walk) -> None:
    """Tie each column of the nullable side of a LEFT JOIN to at most one beyond it.

    The equalities of ON hold wherever the nullable side has a row, and only there. So
    ``c.k = a.k AND c.k = b.k`` in the ON of ``LEFT JOIN c`` says nothing of ``a.k = b.k``; neither
    does ``c.k = a.k AND c.x = b.k AND c.k = c.x``.
    """
    tied: list[ColumnId] = []
    root = walk.classes.root
    for one, other in pairs:
        inside, beyond = (one, other) if one[0] in near else (other, one)
        if inside[0] not in near:
            continue
        is_tied = any(root(column) == root(inside) for column in tied)
        if beyond[0] not in near:
            if is_tied:
                continue
            tied.append(inside)
        elif is_tied and any(root(column) == root(beyond) for column in tied):
            continue
        walk.classes.union(inside, beyond)


def _tie_both(
    pairs: list[tuple[ColumnId, ColumnId]], left: set[int], right: set[int], walk: _Walk
) -> None:
    """Tie the two sides of a FULL JOIN: each column to at most one of the other side.

    Rows of both sides appear without a match, so that ON proves nothing within one side.
    """
    tied: list[ColumnId] = []
    root = walk.classes.root
    for one, other in pairs:
        sides = {one[0] in left, other[0] in left}, {one[0] in right, other[0] in right}
        if sides != ({True, False}, {True, False}):
            continue
        if any(root(column) in (root(one), root(other)) for column in tied):
            continue
        tied += (one, other)
        walk.classes.union(one, other)


def _derived_table(source: Any, walk: _Walk, scope: _Scope, block: Block) -> None:
    """A subquery in FROM: its conditions hold outside, the outer ones do not hold inside."""
    element = source.element
    while isinstance(element, AliasedReturnsRows):
        element = element.element
    if isinstance(element, UpdateBase):
        walk.hinder("data-modifying CTE", "its rows cannot be split by shard")
        before, walk.derived = walk.derived, True
        _dml(element, walk, block)
        table = element.table
        if isinstance(element, Insert) and isinstance(table, Table):
            walk.unplaced(table)  # nobody asks for the keys of its rows
        walk.derived = before
        return
    if isinstance(source, Lateral):
        classes, first = walk.classes, len(walk.leaves)
        walk.classes = _Classes(classes.parents)
        _derived(element, walk, block)
        siblings = set(block.uses.values())
        anchors = [x for x in walk.leaves[:first] if not x.derived and x.source in siblings]
        _release(walk.leaves[first:], anchors)
        walk.classes = classes
        return
    before, walk.detached = walk.detached, True
    inner = _derived(element, walk, block, in_from=True)
    walk.detached = before
    if inner is None or (isinstance(source, CTE) and source.recursive):
        return  # each turn of a recursion reads other rows than those of its first SELECT
    conditions, inner_block = inner
    if _is_local(_bare(element), conditions, inner_block):
        for leaf in conditions.local():
            leaf.derived, leaf.detached = walk.derived, before
            scope.inner.append(leaf)
    for name, column in source.c.items():
        if (found := _origin(column, inner_block)) is not None:
            walk.classes.union((block.uses[hash(source)], name), found)
    scope.conjuncts += conditions.conjuncts


def _origin(column: Any, inner: Block) -> ColumnId | None:
    """Return the column of the inner block that a column of a derived table is."""
    found: ColumnId | None = None
    while found is None:
        proxies: list[Any] = list(getattr(column, "_proxies", ()))
        if not proxies or any(getattr(p, "element", None) is not proxies[0] for p in proxies[1:]):
            return None
        column = proxies[0]  # behind it may be the label that it has inside
        found = column_of(column, inner)
    return found


def _bare(element: Any) -> Any:
    while not isinstance(element, Select | CompoundSelect) and hasattr(element, "element"):
        element = element.element
    return element


def _derived(
    element: Any,
    walk: _Walk,
    around: Block,
    inherited: Iterable[Conjunct] = (),
    *,
    in_from: bool = False,
    member: Sequence[ColumnId | None] = (),
) -> tuple[_Scope, Block] | None:
    element = _bare(element)
    before, walk.derived = walk.derived, True
    try:
        if isinstance(element, CompoundSelect):
            walk.seen.add(hash(element))
            walk.hinder(_set_operation(element), "set operations across shards are not merged")
            for arm in element.selects:
                _derived(arm, walk, around, inherited, in_from=in_from)
        elif isinstance(element, Select):
            scope = _Scope()
            block = _select(element, walk, scope, around, inherited, in_from=in_from, member=member)
            return scope, block
        return None
    finally:
        walk.derived = before


def _subqueries(
    clauses: Iterable[Any],
    walk: _Walk,
    block: Block,
    sources: set[Any],
    first: int,
    conditions: list[Conjunct],
    demanded: Iterable[Conjunct] = (),
) -> None:
    """Walk EXISTS, IN (SELECT) and scalar subqueries; tied to the outer key they stay local.

    Args:
        demanded: conjuncts of the block itself.
    """
    anchors = [leaf for leaf in walk.leaves[first:] if not leaf.derived]
    members = dict(_memberships(demanded))
    for select in _nested_selects(clauses, sources):
        outer_classes, before = walk.classes, len(walk.leaves)
        walk.classes = _Classes(outer_classes.parents)
        _derived(select, walk, block, conditions, member=members.get(hash(select), ()))
        _release(walk.leaves[before:], anchors)
        walk.classes = outer_classes


def _release(leaves: Iterable[_Leaf], anchors: Sequence[_Leaf]) -> None:
    """Note the uses whose rows are on the shard of the outer row that they are tied to."""
    for leaf in leaves:
        if not leaf.detached and any(_colocated(leaf, anchor) for anchor in anchors):
            leaf.derived = False


def _memberships(conjuncts: Iterable[Conjunct]) -> Iterator[tuple[int, list[ColumnId | None]]]:
    """Yield (SELECT, columns) of ``columns IN (SELECT ...)`` and ``column = ANY (SELECT ...)``.

    Where that is demanded: rows on other shards can only make false of it, which NULL is too.
    """
    for conjunct in conjuncts:
        condition = conjunct.condition
        if not isinstance(condition, BinaryExpression):
            continue
        found: Any = condition.right
        if condition.operator is operators.eq and isinstance(found, CollectionAggregate):
            found = found.element if found.operator is operators.any_op else None
        elif condition.operator is not operators.in_op:
            continue
        while not isinstance(found, SelectBase) and hasattr(found, "element"):
            found = found.element
        if isinstance(found, Select):
            left = condition.left
            columns = left.clauses if isinstance(left, Tuple) else [left]
            yield hash(found), [_hashed(column, conjunct.block) for column in columns]


def _hashed(column: Any, block: Block) -> ColumnId | None:
    return column_of(column, block) if kind_of(column.type) is not None else None


def _nested_selects(clauses: Iterable[Any], skip: set[Any]) -> Iterator[Any]:
    return (part for part in _parts(clauses, SelectBase) if part not in skip)


def _parts(clauses: Iterable[Any], kind: type[Any]) -> Iterator[Any]:
    """Yield the elements of a kind in these clauses, without what is inside subqueries."""
    stack = [clause for clause in clauses if clause is not None]
    seen: set[int] = set()
    while stack:
        element = stack.pop()
        if id(element) in seen:
            continue
        seen.add(id(element))
        if isinstance(element, kind):
            yield element
        if isinstance(element, FunctionElement) or not isinstance(element, FromClause | SelectBase):
            stack.extend(element.get_children())  # a function is a FROM element, too


def _names(source: Any) -> Iterator[Any]:
    if isinstance(source, FromGrouping):
        yield from _names(source.element)
    elif isinstance(source, Join):
        yield from _names(source.left)
        yield from _names(source.right)
    else:
        yield source


def _joins(source: Any) -> Iterator[Join]:
    if isinstance(source, FromGrouping):
        yield from _joins(source.element)
    elif isinstance(source, Join):
        yield source
        yield from _joins(source.left)
        yield from _joins(source.right)


def _conditions(criteria: Iterable[Any]) -> Iterator[Any]:
    return (part for condition in criteria for part in split(condition))


def _learn(conditions: Iterable[Any], scope: _Scope, walk: _Walk, block: Block) -> None:
    """Add AND-ed conditions to a scope, and note the equalities among columns in them."""
    conjuncts = list(_conditions(conditions))
    for conjunct in conjuncts:
        for left, right in equalities(conjunct, block):
            walk.classes.union(left, right)
    scope.conjuncts += [Conjunct(conjunct, block) for conjunct in conjuncts]


def _restrict(scope: _Scope, inherited: list[Conjunct], walk: _Walk) -> None:
    """Give each leaf the recipe that the conjuncts of its scope and of those around it make."""
    conditions = [*inherited, *scope.conjuncts]
    for leaf in scope.leaves:
        leaf.recipe = recipe(conditions, leaf.wanted(walk.is_used_once))
    for child in scope.children:
        _restrict(child, conditions, walk)


def _set_operation(core: CompoundSelect[Any]) -> str:
    return str(core.keyword.value)
