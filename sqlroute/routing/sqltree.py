"""Rebuild a parse tree of PostgreSQL as a SELECT of SQLAlchemy Core, as far as shards depend on it.

Joins, AND-ed conditions, keys, subqueries and CTEs are rebuilt over tables made for the purpose, so
that :mod:`sqlroute.routing.blocks` can walk them. Every other expression becomes an opaque one that
restricts nothing and keeps only its subqueries. A name is resolved to a column only when no valid
query could mean another one by it. Nothing made here is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

from sqlalchemy import types
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import (
    and_,
    except_,
    except_all,
    intersect,
    intersect_all,
    or_,
    select,
    true,
    union,
    union_all,
)
from sqlalchemy.sql import operators as ops
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    ClauseList,
    ColumnElement,
    Tuple,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.schema import Column, MetaData, Table
from sqlalchemy.sql.selectable import CompoundSelect, Join, Select
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.sql.visitors import InternalTraversal

from sqlroute.errors import UnknownName
from sqlroute.routing.declare import kind_of, only_of, reference_table, sharded_by
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.sqlclauses import aggregates_outside, why_not_row_by_row
from sqlroute.routing.sqlvalues import Node, ReadAs, array, constant, read, type_of


class Role(Enum):
    """How the rows of a table are spread over shards."""

    SHARDED = "sharded"
    REFERENCE = "reference"
    UNKNOWN = "unknown"  # a view, a leaf partition, a system table


@dataclass(frozen=True, slots=True)
class TableInfo:
    """What the text's names mean, as read from a server's catalog.

    Attributes:
        name: as messages show it.
        columns: how PostgreSQL hashes each column, ``None`` for a type that is no key.
        key: the shard key of a sharded table.
        keyspace: name of the keyspace it was found in.
        why: for a table of unknown role, what it is.
        is_declared: SQLAlchemy's declaration says so, not what a catalog looks like.
        is_complete: it has no other columns in the database.
    """

    name: str
    role: Role
    columns: Mapping[str, KeyKind | None] = field(default_factory=dict)
    key: tuple[str, ...] = ()
    keyspace: str | None = None
    why: str = ""
    is_declared: bool = False
    is_complete: bool = True

    @property
    def kinds(self) -> tuple[KeyKind, ...]:
        """How each column of the key is hashed."""
        return tuple(kind for name in self.key if (kind := self.columns[name]) is not None)


class UnknownTable(UnknownName):
    """SQL text names a table that is neither declared nor in a catalog.

    Attributes:
        table: its name in the text.
    """

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


Tables: TypeAlias = Mapping[str, TableInfo]
"""Tables by the names that SQL may use for them: with their schema, and without where visible."""


_SET_OPERATIONS: Mapping[tuple[str, bool], Callable[..., CompoundSelect[Any]]] = {
    ("SETOP_UNION", False): union,
    ("SETOP_UNION", True): union_all,
    ("SETOP_INTERSECT", False): intersect,
    ("SETOP_INTERSECT", True): intersect_all,
    ("SETOP_EXCEPT", False): except_,
    ("SETOP_EXCEPT", True): except_all,
}


class _Opaque(ColumnElement[Any]):
    """An expression of which nothing is known but the subqueries in it."""

    inherit_cache = False
    _traverse_internals = [("parts", InternalTraversal.dp_clauseelement_list)]  # noqa: RUF012 - SQLAlchemy's

    def __init__(self, parts: Iterable[Any] = ()) -> None:
        self.parts = list(parts)
        self.type = types.NULLTYPE


class _Merging(FunctionElement[Any]):
    """Stands for what makes one row of several: a function that nothing is known of."""

    inherit_cache = False


@compiles(_Opaque)  # asking a SELECT for its FROM compiles it
def _rendered(*_: Any, **__: Any) -> str:
    return "?"


@dataclass(slots=True)
class _Source:
    """A name in FROM.

    Attributes:
        columns: those that may be resolved to it, with their kind.
        names: of its columns, ``None`` when they are not known.
        is_open: it may have others.
    """

    alias: str
    element: Any
    columns: Mapping[str, tuple[Any, KeyKind]]
    names: frozenset[str] | None
    is_open: bool = False


@dataclass(slots=True)
class _From:
    """An element of FROM with the names it brings; ``merged`` are the columns of USING."""

    element: Any
    sources: list[_Source]
    merged: dict[str, Resolved | None] = field(default_factory=dict)


Resolved: TypeAlias = tuple[Any, KeyKind]
"""A column and how it is hashed."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where a name is looked up: this block, then those around it."""

    items: tuple[_From, ...] = ()
    outer: _Scope | None = None
    ctes: Mapping[str, _Cte | None] = field(default_factory=dict)

    def has(self, path: list[str]) -> bool:
        """Say whether a reference certainly means a column of this block."""
        sources = [source for item in self.items for source in item.sources]
        if len(path) == 1:
            return any(path[0] in source.names for source in sources if source.names is not None)
        return any(path[0] == source.alias for source in sources)

    def around(self) -> Iterator[Any]:
        """Yield what stands in FROM of the blocks around this one."""
        scope = self.outer
        while scope is not None:
            yield from (source.element for item in scope.items for source in item.sources)
            scope = scope.outer

    def column(self, path: list[str]) -> Resolved | None:
        """Return the column that a reference means, ``None`` when that is not certain."""
        scope: _Scope | None = self
        while scope is not None:
            look = _qualified if len(path) == 2 else _unqualified
            is_settled, found = look(path, scope)
            if is_settled:
                return found
            scope = scope.outer
        return None


@dataclass(frozen=True, slots=True)
class _Cte:
    element: Any
    names: frozenset[str] | None
    kinds: Mapping[str, KeyKind]


def _qualified(path: list[str], scope: _Scope) -> tuple[bool, Resolved | None]:
    """Return whether the search ends in this block, and with which column."""
    for item in scope.items:
        for source in item.sources:
            if source.alias == path[0]:
                return True, source.columns.get(path[1])
    return False, None


def _unqualified(path: list[str], scope: _Scope) -> tuple[bool, Resolved | None]:
    """Return whether the search ends in this block, and with which column.

    A valid query has the name once, or once merged by USING: so the one source known to have it
    is meant, even beside sources whose columns are not known.
    """
    name = path[0]
    holders: list[Resolved | None] = []
    is_open = False
    for item in scope.items:
        if name in item.merged:
            holders.append(item.merged[name])
            continue
        for source in item.sources:
            if source.names is None:
                is_open = True
            elif name in source.names:
                holders.append(source.columns.get(name))
            else:
                is_open |= source.is_open
    if len(holders) == 1:
        return True, holders[0]
    return bool(holders) or is_open, None


@dataclass(slots=True)
class Tree:
    """One parse tree being read: the tables it uses, the values it compares with.

    Attributes:
        names: of the parameters, by their number.
        types: that the parameters have before SQL sees them, if any, by name.
        expanding: names of the parameters that are rendered as a list in parentheses.
        constants: values that are compared with columns, by the bind parameters made for them.
        used: the tables met so far, by name.
        followed: identities of the nodes of tables that were rebuilt.
        outside: aggregates in subqueries that may be those of the query around.
    """

    tables: Tables
    names: Mapping[int, str]
    types: Mapping[str, TypeEngine[Any]] = field(default_factory=dict)
    expanding: Collection[str] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    used: dict[str, TableInfo] = field(default_factory=dict)
    followed: set[int] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)
    _made: dict[str, Table] = field(default_factory=dict)

    def query(self, body: Node) -> Any:
        """Return the Core statement of a ``SelectStmt``."""
        return self._select(body, _Scope())

    def written(self, body: Node) -> Any:
        """Return a SELECT with the tables and conditions of an INSERT, UPDATE or DELETE."""
        scope = self._with_ctes(body, _Scope())
        own = self._table_item(body["relation"], is_target=True)
        others = [*body.get("fromClause", []), *body.get("usingClause", [])]
        inner = self._from_clause(others, scope, (own,))
        rest = [body.get("targetList"), body.get("returningList")]
        return self._block(inner, body.get("whereClause"), [], rest)

    # tables

    def info(self, node: Node) -> TableInfo:
        """Return what a name in FROM is.

        Raises:
            UnknownTable: no such table.
        """
        schema, name = node.get("schemaname"), node["relname"]
        shown = f"{schema}.{name}" if schema else name
        found = self.tables.get(shown)
        if found is None and (schema in ("pg_catalog", "information_schema") or (
            schema is None and name.startswith("pg_")
        )):  # fmt: skip
            found = TableInfo(
                shown, Role.UNKNOWN, why="a system table, of which each server has its own"
            )
        if found is None:
            known = sorted({i.name for i in self.tables.values() if i.role is not Role.UNKNOWN})
            raise UnknownTable(
                f"unknown table {shown!r}; known: {', '.join(known) or 'none'}", shown
            )
        self.used.setdefault(found.name, found)
        return found

    def table(self, info: TableInfo) -> Table:
        """Return the table made for an info: the same one each time."""
        if info.name not in self._made:
            declared = reference_table(info.keyspace)
            if info.role is Role.SHARDED:
                declared = sharded_by(*info.key, keyspace=info.keyspace)
            columns = [Column(name, type_of(kind)) for name, kind in info.columns.items()]
            self._made[info.name] = Table(info.name, MetaData(), *columns, **declared)
        return self._made[info.name]

    def _table_item(self, node: Node, *, is_target: bool = False) -> _From:
        self.followed.add(id(node))
        info = self.info(node)
        if info.role is Role.SHARDED and "inh" not in node:
            raise only_of(info.name)
        table: Any = self.table(info)
        element = table if is_target else table.alias()
        columns = {
            name: (element.c[name], kind) for name, kind in info.columns.items() if kind is not None
        }
        alias = node.get("alias", {})
        names: frozenset[str] | None = frozenset(info.columns)
        if "colnames" in alias:
            columns, names = {}, None
        name = alias.get("aliasname", node["relname"])
        source = _Source(name, element, columns, names, is_open=not info.is_complete)
        return _From(element, [source])

    # FROM

    def _from_clause(
        self, nodes: Iterable[Node], scope: _Scope, items: tuple[_From, ...] = ()
    ) -> _Scope:
        for node in nodes:
            around = replace(scope, items=items, outer=scope)
            found = self._from(node, around)
            items = (*items, found)
        return _Scope(items, scope if scope.items else scope.outer, scope.ctes)

    def _from(self, node: Node, scope: _Scope) -> _From:
        """Return an element of FROM; ``scope`` holds what stands before it, for LATERAL."""
        (name, value), *_ = node.items()
        if name == "RangeVar":
            cte = value["relname"] if "schemaname" not in value else None
            if cte is not None and cte in scope.ctes:
                return self._cte_item(value, scope.ctes[cte])
            return self._table_item(value)
        if name == "JoinExpr" and "alias" not in value and "join_using_alias" not in value:
            return self._join(value, scope)
        if name == "RangeSubselect":
            return self._derived(value, scope)
        alias = value.get("alias", {}).get("aliasname", "")
        parts = _Opaque(self._parts(value, scope)) if name == "RangeFunction" else _Opaque()
        element = select(parts.label("c")).subquery()
        return _From(element, [_Source(alias, element, {}, None)])

    def _cte_item(self, node: Node, cte: _Cte | None) -> _From:
        self.followed.add(id(node))
        alias = node.get("alias", {})
        name = alias.get("aliasname", node["relname"])
        if cte is None:
            element: Any = select(_Opaque().label("c")).subquery()
            return _From(element, [_Source(name, element, {}, None)])
        element = cte.element.alias()
        if "colnames" in alias:
            return _From(element, [_Source(name, element, {}, None)])
        columns = {column: (element.c[column], kind) for column, kind in cte.kinds.items()}
        return _From(element, [_Source(name, element, columns, cte.names)])

    def _derived(self, value: Node, scope: _Scope) -> _From:
        lateral = bool(value.get("lateral"))
        around = scope if lateral else replace(scope, items=())
        body = value["subquery"]["SelectStmt"]
        inner, names, kinds = self._query(body, around)
        element: Any = inner.lateral() if lateral else inner.subquery()
        alias = value.get("alias", {})
        if "colnames" in alias:
            names, kinds = None, {}
        columns = {name: (element.c[name], kind) for name, kind in kinds.items()}
        return _From(element, [_Source(alias.get("aliasname", ""), element, columns, names)])

    def _join(self, value: Node, scope: _Scope) -> _From:
        left = self._from(value["larg"], scope)
        right = self._from(value["rarg"], replace(scope, items=(*scope.items, left)))
        kind = value["jointype"]
        conditions, merged = self._using(value, left, right)
        if "quals" in value:
            inner = replace(scope, items=(left, right), outer=scope)
            conditions.append(self._condition(value["quals"], inner))
        onclause: Any = and_(true(), *conditions) if conditions else true()
        first, second = (right, left) if kind == "JOIN_RIGHT" else (left, right)
        element = Join(
            first.element,
            second.element,
            onclause,
            isouter=kind != "JOIN_INNER",
            full=kind not in ("JOIN_INNER", "JOIN_LEFT", "JOIN_RIGHT"),
        )
        return _From(element, left.sources + right.sources, merged)

    def _using(
        self, value: Node, left: _From, right: _From
    ) -> tuple[list[Any], dict[str, Resolved | None]]:
        """Return the equalities of USING and the columns it merges.

        NATURAL gives no equality: which columns it means is not worth knowing here.
        """
        merged = {**left.merged, **right.merged}
        conditions: list[Any] = []
        for item in value.get("usingClause", []):
            name = item["String"]["sval"]
            one, other = _Scope((left,)).column([name]), _Scope((right,)).column([name])
            if one is not None and other is not None and one[1] is other[1]:
                conditions.append(BinaryExpression(one[0], other[0], ops.eq))
            kept = {"JOIN_INNER": one, "JOIN_LEFT": one, "JOIN_RIGHT": other}
            merged[name] = kept.get(value["jointype"])
        if value.get("isNatural"):
            sides = [{n for s in side.sources for n in s.names or ()} for side in (left, right)]
            merged |= dict.fromkeys(sides[0] & sides[1])
        return conditions, merged

    # SELECT

    def _with_ctes(self, body: Node, scope: _Scope) -> _Scope:
        clause = body.get("withClause")
        if clause is None:
            return scope
        for item in clause["ctes"]:
            cte = item["CommonTableExpr"]
            found = None
            query = cte["ctequery"].get("SelectStmt")
            if query is not None and not clause.get("recursive") and "aliascolnames" not in cte:
                inner, names, kinds = self._query(query, replace(scope, items=()))
                found = _Cte(inner.cte(cte["ctename"]), names, kinds)
            scope = replace(scope, ctes={**scope.ctes, cte["ctename"]: found})
        return scope

    def _select(self, body: Node, scope: _Scope) -> Any:
        return self._query(body, scope)[0]

    def _query(
        self, body: Node, scope: _Scope
    ) -> tuple[Any, frozenset[str] | None, Mapping[str, KeyKind]]:
        """Return a SELECT, the names of its columns (``None``: not known) and their kinds."""
        scope = self._with_ctes(body, scope)
        if body.get("op", "SETOP_NONE") != "SETOP_NONE":
            return self._compound(body, scope), None, {}
        inner = self._from_clause(body.get("fromClause", []), scope)
        columns: list[Any] = []
        kinds: dict[str, KeyKind] = {}
        names: set[str] | None = set()
        for value in _outputs(body, inner):
            found = _output(value, inner)
            if found is None or found[0] in kinds:
                names = None
                columns += self._parts(value, inner)
                continue
            name, resolved = found
            if resolved is None:
                columns.append(_Opaque(self._parts(value["val"], inner)))
            else:
                columns.append(resolved[0])
                kinds[name] = resolved[1]
            if names is not None:
                names.add(name)
        known = frozenset(names) if names is not None else None
        if inner.outer is not None:
            self.outside += aggregates_outside(body, inner.has)
        rest = [
            body.get(clause)
            for clause in (
                *("distinctClause", "havingClause", "groupClause", "windowClause", "sortClause"),
                *("limitOffset", "limitCount", "valuesLists"),
            )
        ]
        plain = [column for column in columns if not isinstance(column, _Opaque)]
        opaque: list[Any] = [column for column in columns if isinstance(column, _Opaque)]
        if why_not_row_by_row(body) is not None:
            opaque.append(_Merging())
        kept = {name: kind for name, kind in kinds.items() if any(c.key == name for c in plain)}
        block = self._block(inner, body.get("whereClause"), plain, rest, opaque)
        return block, known, kept

    def _block(
        self,
        scope: _Scope,
        where: Node | None,
        columns: list[Any],
        rest: list[Any],
        opaque: Iterable[Any] = (),
    ) -> Select[Any]:
        parts = [*opaque, *self._parts(rest, scope)]
        found: Select[Any] = select(*columns, _Opaque(parts).label("sqlroute_rest"))
        for item in scope.items:
            found = found.select_from(item.element)
        if around := list(scope.around()):  # a SELECT without FROM would be no query otherwise
            found = found.correlate(*around)
        return found if where is None else found.where(self._condition(where, scope))

    def _compound(self, body: Node, scope: _Scope) -> CompoundSelect[Any]:
        arms = [self._select(body[side], scope) for side in ("larg", "rarg")]
        narrow = [
            arm.with_only_columns(_Opaque(arm._raw_columns).label("c"), maintain_column_froms=False)
            if isinstance(arm, Select)
            else arm
            for arm in arms
        ]
        return _SET_OPERATIONS[body["op"], bool(body.get("all"))](*narrow)

    # expressions

    def _condition(self, node: Node, scope: _Scope) -> Any:
        """Return an expression as far as it can restrict a key, else an opaque one."""
        (name, value), *_ = node.items()
        if name == "BoolExpr" and value["boolop"] in ("AND_EXPR", "OR_EXPR"):
            join = and_ if value["boolop"] == "AND_EXPR" else or_
            return join(*(self._condition(arm, scope) for arm in value["args"]))
        found = None
        if name == "A_Expr":
            found = self._comparison(value, scope)
        elif name == "SubLink" and value["subLinkType"] == "ANY_SUBLINK":
            found = self._membership(value, scope)
        return _Opaque(self._parts(node, scope)) if found is None else found

    def _comparison(self, value: Node, scope: _Scope) -> Any | None:
        left, right = value.get("lexpr", {}), value.get("rexpr", {})
        kind, items = value["kind"], right.get("List", {}).get("items", [])
        if kind == "AEXPR_BETWEEN":
            low = self._bounded(left, items[0], ops.ge, scope)
            high = self._bounded(left, items[1], ops.le, scope)
            return None if low is None or high is None else and_(low, high)
        operator = _operator(value)
        if kind == "AEXPR_OP" and operator in _MIRRORED:
            found = self._bounded(left, right, operator, scope)
            if found is None:
                found = self._bounded(right, left, _MIRRORED[operator], scope)
            return found
        if operator is not ops.eq:
            return None
        if kind == "AEXPR_NOT_DISTINCT":
            return self._bounded(left, right, ops.is_not_distinct_from, scope)
        if kind == "AEXPR_OP":
            return self._equal(left, right, scope)
        if kind == "AEXPR_IN" and "RowExpr" in left:
            pairs = [self._equal(left, item, scope) for item in items]
            known = [pair for pair in pairs if pair is not None]
            return or_(*known) if known and len(known) == len(items) else None
        if kind == "AEXPR_IN":
            return self._one_of(left, items, scope)
        if kind == "AEXPR_OP_ANY" and "A_ArrayExpr" in right:
            return self._one_of(left, right["A_ArrayExpr"].get("elements", []), scope)
        return self._any_of(left, right, scope) if kind == "AEXPR_OP_ANY" else None

    def _bounded(self, left: Node, right: Node, operator: Any, scope: _Scope) -> Any | None:
        column = _column(left, scope)
        bind = None if column is None else self.bind(right, column[1])
        return (
            None if column is None or bind is None else BinaryExpression(column[0], bind, operator)
        )

    def _membership(self, value: Node, scope: _Scope) -> Any | None:
        """Return ``column IN (SELECT column ...)``, ``None`` where the columns are not certain."""
        body = value["subselect"]["SelectStmt"]
        test = value["testexpr"]
        tests = test["RowExpr"].get("args", []) if "RowExpr" in test else [test]
        columns = [_column(node, scope) for node in tests]
        known = [column[0] for column in columns if column is not None]
        is_equal = "operName" not in value or _name(value["operName"]) == "="
        if not is_equal or len(known) < len(tests) or why_not_row_by_row(body) is not None:
            return None
        inner = self._select(body, scope)
        is_star = any(_is_star(target["ResTarget"]) for target in body.get("targetList", []))
        if is_star or len(inner._raw_columns) != len(tests) + 1:
            return None  # of some column only the rest that stands behind the others is known
        left = Tuple(*known) if len(known) > 1 else known[0]
        return BinaryExpression(left, inner.scalar_subquery(), ops.in_op)

    def _equal(self, left: Node, right: Node, scope: _Scope) -> Any | None:
        if "RowExpr" in left and "RowExpr" in right:
            ones, others = left["RowExpr"].get("args", []), right["RowExpr"].get("args", [])
            if len(ones) != len(others):
                return None
            pairs = [self._equal(a, b, scope) for a, b in zip(ones, others, strict=True)]
            known = [pair for pair in pairs if pair is not None]
            return and_(*known) if known else None
        one, other = _column(left, scope), _column(right, scope)
        if one is not None and other is not None:
            same = one[1] is other[1]
            return BinaryExpression(one[0], other[0], ops.eq) if same else None
        column, constant = (one, right) if one is not None else (other, left)
        if column is None:
            return None
        bind = self.bind(constant, column[1])
        return None if bind is None else BinaryExpression(column[0], bind, ops.eq)

    def _any_of(self, left: Node, array: Node, scope: _Scope) -> Any | None:
        column = _column(left, scope)
        bind = None if column is None else self.bind(array, column[1], many=True)
        return (
            None if column is None or bind is None else BinaryExpression(column[0], bind, ops.in_op)
        )

    def _one_of(self, left: Node, items: list[Node], scope: _Scope) -> Any | None:
        column = _column(left, scope)
        if column is None:
            return None
        binds = [self.bind(item, column[1]) for item in items]
        known = [bind for bind in binds if bind is not None]
        if len(known) < len(binds):
            return None
        if len(known) == 1 and known[0].expanding:
            return BinaryExpression(column[0], known[0], ops.in_op)
        listed: Any = ClauseList(*known, group=False)
        return BinaryExpression(column[0], listed, ops.in_op)

    def bind(self, node: Node, kind: KeyKind, *, many: bool = False) -> BindParameter[Any] | None:
        """Return the parameter of a constant or a parameter, ``None`` for anything else."""
        found = constant(node, kind, many=many)
        if found is None:
            return None
        number, value = found
        if number is None:
            return self._constant(value, kind, many=many)
        name = self.names[number]
        own = self.types.get(name, types.NULLTYPE)
        if many and isinstance(own, types.ARRAY):
            own = own.item_type
        if not isinstance(own, types.NullType) and kind_of(own) is not kind:
            return None  # it is compared as another type: by other rules, with another hash
        is_list = many or name in self.expanding
        return BindParameter(name, None, type_=ReadAs(kind, own), expanding=is_list, required=False)

    def _constant(self, value: Any, kind: KeyKind, *, many: bool) -> BindParameter[Any] | None:
        try:
            value = [read(item, kind) for item in array(value)] if many else read(value, kind)
        except ValueError:
            return None
        key = f"constant {len(self.constants) + 1}"
        self.constants[key] = value
        return BindParameter(key, value, type_=type_of(kind), expanding=many, required=False)

    def _parts(self, tree: Any, scope: _Scope) -> list[Any]:
        """Return the subqueries of an expression, whatever stands around them."""
        found: list[Any] = []
        if isinstance(tree, list):
            for item in tree:
                found += self._parts(item, scope)
        elif isinstance(tree, Mapping):
            for name, value in tree.items():
                if name == "SelectStmt":
                    found.append(self._select(value, scope).scalar_subquery())
                else:
                    found += self._parts(value, scope)
        return found


def _column(node: Node, scope: _Scope) -> Resolved | None:
    fields = node.get("ColumnRef", {}).get("fields", [])
    path = [field["String"]["sval"] for field in fields if "String" in field]
    if len(path) != len(fields) or len(path) not in (1, 2):
        return None
    return scope.column(path)


def _outputs(body: Node, scope: _Scope) -> Iterator[Node]:
    """Yield the items of the select list, for ``*`` the columns that it means if known."""
    for target in body.get("targetList", []):
        value = target["ResTarget"]
        expanded = _expanded(value, scope) if _is_star(value) else None
        if expanded is None:
            yield value
            continue
        for path in expanded:
            fields = [{"String": {"sval": part}} for part in path]
            yield {"val": {"ColumnRef": {"fields": fields}}}


def _is_star(value: Node) -> bool:
    fields = value["val"].get("ColumnRef", {}).get("fields", [])
    return bool(fields) and "A_Star" in fields[-1]


def _expanded(value: Node, scope: _Scope) -> list[tuple[str, str]] | None:
    """Return the columns of ``*`` or ``alias.*``, in no order; ``None`` if not certain."""
    *owner, _ = value["val"]["ColumnRef"]["fields"]
    alias = owner[0].get("String", {}).get("sval") if owner else None
    sources = [source for item in scope.items for source in item.sources]
    aliases = [source.alias for source in sources]
    is_merged = not owner and any(item.merged for item in scope.items)
    if len(owner) > 1 or is_merged or "" in aliases or len(set(aliases)) < len(aliases):
        return None
    chosen = [source for source in sources if alias in (None, source.alias)]
    if any(source.names is None or source.is_open for source in chosen):
        return None
    return [(source.alias, name) for source in chosen for name in source.names or ()]


def _output(value: Node, scope: _Scope) -> tuple[str, Resolved | None] | None:
    """Return name and column of an item of the select list; ``None`` for ``*`` and the nameless."""
    node = value["val"]
    resolved = _column(node, scope)
    fields = node.get("ColumnRef", {}).get("fields", [])
    if fields and "String" in fields[-1]:
        own = fields[-1]["String"]["sval"]
        name = value.get("name", own)
        return name, resolved if resolved is not None and resolved[0].key == name else None
    if "name" in value:
        return value["name"], None
    return None


_OPERATORS = {"=": ops.eq, ">=": ops.ge, ">": ops.gt, "<=": ops.le, "<": ops.lt}
_MIRRORED = {ops.ge: ops.le, ops.gt: ops.lt, ops.le: ops.ge, ops.lt: ops.gt}


def _operator(value: Node) -> Any | None:
    return _OPERATORS.get(_name(value["name"]))


def _name(parts: list[Node]) -> str:
    """Return the name of PostgreSQL's own operator, an empty text for any other."""
    *schema, name = [part.get("String", {}).get("sval", "") for part in parts]
    return name if schema in ([], ["pg_catalog"]) else ""
