"""Describe SQL text as :mod:`sqlroute.routing.statement` describes statements of SQLAlchemy.

The text is parsed by PostgreSQL's own parser (pgparse) and rebuilt, as far as shards depend on it,
by :mod:`sqlroute.routing.sqltree`, so that one set of rules serves both. What is not understood
makes a statement unknown, and a sharded table where it is not followed means all shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sqlalchemy.sql.schema import Table

from sqlroute.errors import CrossShardRefused, MissingShardKey, PlanError, UnknownName
from sqlroute.routing.blocks import ANY_BUCKET, Occurrence
from sqlroute.routing.declare import shard_key
from sqlroute.routing.functions import BUILT_IN, Functions, Judgement, judge
from sqlroute.routing.hashing import KeyKind
from sqlroute.routing.planner import Described, Shape
from sqlroute.routing.sqlfacts import TextFacts, nodes, sets_something, tree_facts
from sqlroute.routing.sqltree import Role, TableInfo, Tables, Tree
from sqlroute.routing.sqlvalues import Node, constant, read
from sqlroute.routing.statement import Kind, Placement, Statement, describe, with_opaque
from sqlroute.topology import Keyspace, Topology

__all__ = ["Role", "TableInfo", "Tables", "TextStatement", "describe_text"]


@dataclass(frozen=True, slots=True)
class TextStatement:
    """SQL text, ready for the planner.

    Attributes:
        values: of the parameters and of the constants that are compared with columns.
        rows: the keys of an INSERT into a sharded table.
    """

    sql: str
    statement: Statement
    values: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...] | None = None

    def described(self) -> Described:
        """Return what :func:`sqlroute.routing.planner.plan` takes."""
        return Described(self.sql, Shape(self.statement, {}), (), self.values)


def describe_text(
    sql: str,
    tables: Tables,
    topology: Topology,
    parameters: Mapping[str, Any] = MappingProxyType({}),
    functions: Functions = BUILT_IN,
) -> TextStatement:
    """Describe one statement given as text.

    Args:
        sql: parameters are written ``:name``, ``%(name)s`` or ``$1``.
        tables: what exists.
        parameters: their values by name, ``"1"`` for ``$1``; a text is read as the type of the
            column it is compared with, as PostgreSQL reads a quoted literal.
        functions: what is known of them.

    Raises:
        PlanError: it is not one statement of valid SQL, or cannot be placed.
        UnknownName: a table or parameter that nobody knows, or a parameter without its value.
    """
    numbered, names = _numbered(sql)
    root = _parsed(numbered, sql)
    _check_names(parameters, names)
    found = _described(sql, root, Tree(tables, names, parameters), topology, functions)
    statement = replace(found.statement, sets=sets_something(sql), undecided=False)
    return replace(found, statement=statement)


# Text to tree


_TOKEN = re.compile(
    r"""
      \b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
    | \$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$ | --[^\n]* | /\*.*?\*/ | ::
    | (?<![:\w]):(?P<colon>[A-Za-z_]\w*) | %\((?P<percent>\w+)\)s | \$(?P<number>\d+)
    """,
    re.VERBOSE | re.DOTALL,
)


def _numbered(sql: str) -> tuple[str, dict[int, str]]:
    """Return the text with ``$n`` for every parameter, and their names by number."""
    used = [int(m["number"]) for m in _TOKEN.finditer(sql) if m["number"]]
    names = {number: str(number) for number in used}
    numbers: dict[str, int] = {}

    def replaced(match: re.Match[str]) -> str:
        name = match["colon"] or match["percent"]
        if not name:
            return match[0]
        number = numbers.setdefault(name, max(used, default=0) + len(numbers) + 1)
        names[number] = name
        return f"${number}"

    return _TOKEN.sub(replaced, sql), names


def _parsed(numbered: str, sql: str) -> Node:
    try:
        import pgparse
    except ImportError:
        raise PlanError(
            "SQL text is parsed by pgparse, which is not installed; install sqlroute[parse]"
        ) from None
    try:
        statements = pgparse.parse(numbered)
    except pgparse.PGQueryError as exc:
        message = exc.args[0] if exc.args else str(exc)
        raise PlanError(f"the SQL text cannot be parsed: {message}") from None
    if len(statements) != 1:
        raise PlanError(f"one statement is described at a time, {sql[:60]!r} has {len(statements)}")
    root: Node = statements[0]["stmt"]
    return root


def _check_names(parameters: Mapping[str, Any], names: Mapping[int, str]) -> None:
    unknown = sorted(set(parameters) - set(names.values()))
    if unknown:
        known = ", ".join(dict.fromkeys(names.values())) or "none"
        raise UnknownName(f"the SQL text has no parameter {unknown[0]!r}; it has: {known}")


# What the whole tree says of reading and writing


def _verdict(facts: TextFacts, judged: Judgement) -> tuple[Kind, tuple[str, ...]]:
    if facts.writes:
        return Kind.WRITE, facts.writes
    if unknown := (*facts.unknown, *judged.unknown):
        return Kind.UNKNOWN, unknown
    return Kind.READ, ("a SELECT of known parts",)


# The description


def _described(
    sql: str, root: Node, tree: Tree, topology: Topology, functions: Functions
) -> TextStatement:
    facts = tree_facts(root)
    (name, body), *_ = root.items()
    if name not in ("SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt"):
        keyspace = _keyspace(tree, topology)
        kind, reasons = _verdict(facts, judge(facts.calls, keyspace.name, functions))
        return TextStatement(sql, _unplaced(kind, reasons, tree, keyspace), {})
    target = tree.table(tree.info(body["relation"])) if "relation" in body else None
    core = tree.query(body) if target is None else tree.written(body)
    unfollowed = _unfollowed(root, tree)
    _check_target(target, tree)
    keyspace = _keyspace(tree, topology)
    judged = judge(facts.calls, keyspace.name, functions)
    kind, reasons = _verdict(facts, judged)
    unknown = [info for info in tree.used.values() if info.role is Role.UNKNOWN]
    if unknown:
        if kind is Kind.READ:
            kind, reasons = Kind.UNKNOWN, ()
        reasons = (*reasons, *(f"{info.name} is {info.why}" for info in unknown))
    if unknown or any(name == "intoClause" for name, _ in nodes(root)):
        return TextStatement(sql, _unplaced(kind, reasons, tree, keyspace), {})
    found = _with_unfollowed(describe(core, topology), unfollowed, tree)
    reasons = (*reasons, *_assumptions(found, tree))
    found = replace(found, kind=kind, reasons=reasons, target=target)
    if kind is Kind.READ and not found.tables:
        # what the tree holds opaque is proved harmless here, so nothing ties it to a shard
        found = replace(found, placement=Placement.ANYWHERE)
    found = with_opaque(found, judged.opaque)
    rows = None
    if name == "InsertStmt":
        found = replace(found, insert=target, occurrences=())  # its rows carry the keys
        if found.keyspace.is_sharded:
            rows = _rows(body, unfollowed, tree)
    _check_values(found, tree)
    return TextStatement(sql, found, tree.values, rows)


def _keyspace(tree: Tree, topology: Topology) -> Keyspace:
    keyspaces = {info.keyspace for info in tree.used.values() if info.keyspace}
    name = next(iter(keyspaces)) if len(keyspaces) == 1 else None
    return topology.keyspace(name) if name else topology.default


def _unplaced(kind: Kind, reasons: tuple[str, ...], tree: Tree, keyspace: Keyspace) -> Statement:
    placement = Placement.UNPLACED if keyspace.is_sharded else Placement.ANYWHERE
    return Statement(kind, reasons, keyspace, placement, tuple(tree.used))


def _unfollowed(root: Node, tree: Tree) -> list[TableInfo]:
    """Return the sharded tables in places that were not rebuilt."""
    ctes = {value["ctename"] for name, value in nodes(root) if name == "CommonTableExpr"}
    found = []
    for node in _relations(root):
        name = node["relname"]
        is_cte = name in ctes and "schemaname" not in node and name not in tree.tables
        if id(node) in tree.followed or is_cte:
            continue
        info = tree.info(node)
        if info.role is Role.SHARDED:
            found.append(info)
    return found


def _relations(node: Any) -> Iterator[Node]:
    """Yield each place that names a table; what a lock names stands in FROM too."""
    if isinstance(node, list):
        for item in node:
            yield from _relations(item)
    elif isinstance(node, Mapping):
        if "relname" in node:
            yield node
        for name, value in node.items():
            if name not in ("lockingClause", "intoClause"):
                yield from _relations(value)


def _with_unfollowed(found: Statement, unfollowed: list[TableInfo], tree: Tree) -> Statement:
    if not unfollowed or not found.keyspace.is_sharded:
        return found
    last = max((occurrence.group for occurrence in found.occurrences), default=-1)
    more = tuple(
        Occurrence(info.name, shard_key(tree.table(info)), ANY_BUCKET, last + i)
        for i, info in enumerate(unfollowed, 1)
    )
    why = "its use in the statement cannot be followed"
    return replace(
        found,
        placement=Placement.SHARDED,
        tables=tuple(dict.fromkeys((*(info.name for info in unfollowed), *found.tables))),
        occurrences=(*found.occurrences, *more),
        hindrance=found.hindrance or (unfollowed[0].name, why),
    )


def _check_target(target: Table | None, tree: Tree) -> None:
    """Refuse a write to a reference table that rows of one shard would decide.

    Raises:
        CrossShardRefused: it would leave the copies different.
    """
    if target is None or tree.used[target.name].role is not Role.REFERENCE:
        return
    if any(info.role is Role.SHARDED for info in tree.used.values()):
        raise CrossShardRefused(
            f"a write to {target.name}",
            "it is taken for a reference table, the same on every shard, and the statement "
            "reads sharded tables, which differ; read the values first",
        )


def _assumptions(found: Statement, tree: Tree) -> tuple[str, ...]:
    if not found.keyspace.is_sharded:
        return ()
    names = [info.name for info in tree.used.values() if info.role is Role.REFERENCE]
    if not names:
        return ()
    return (f"ordinary tables are taken for reference tables: {', '.join(names)}",)


def _check_values(found: Statement, tree: Tree) -> None:
    """See that each parameter that decides about shards has a value.

    Raises:
        UnknownName: one has none.
    """
    for occurrence in found.occurrences:
        for bind in occurrence.recipe.binds:
            if bind.key in tree.missing:
                raise _without_value(tree.missing[bind.key])


def _without_value(name: str) -> UnknownName:
    return UnknownName(
        f"parameter {name!r} is compared with a key and has no value; give it by --param {name}=..."
    )


def _rows(
    body: Node, unfollowed: list[TableInfo], tree: Tree
) -> tuple[Mapping[str, Any], ...] | None:
    """Return the keys of the rows of an INSERT, ``None`` if its table is not sharded.

    Raises:
        MissingShardKey: the text does not say a key.
        CrossShardRefused: it reads a sharded table.
    """
    info = tree.info(body["relation"])
    if info.role is not Role.SHARDED:
        return None
    if unfollowed:
        raise CrossShardRefused(
            f"INSERT ... {unfollowed[0].name}",
            "an INSERT that reads a sharded table; read the values first",
        )
    lists = body.get("selectStmt", {}).get("SelectStmt", {}).get("valuesLists")
    if lists is None:
        raise MissingShardKey(
            f"rows for {info.name} come from no VALUES: their keys ({', '.join(info.key)}) "
            "are not known before it runs; read the rows first and insert them"
        )
    columns = [item["ResTarget"]["name"] for item in body.get("cols", [])] or [*info.columns]
    return tuple(_row(info, columns, row["List"]["items"], tree) for row in lists)


def _row(info: TableInfo, columns: list[str], items: list[Node], tree: Tree) -> Mapping[str, Any]:
    given = dict(zip(columns, items, strict=False))
    row: dict[str, Any] = {}
    for name, kind in zip(info.key, info.kinds, strict=True):
        row[name] = _key(given[name], kind, tree) if name in given else None
        if row[name] is None:
            raise MissingShardKey(
                f"a row of {info.name} needs its shard key ({', '.join(info.key)}) as a "
                "constant or a parameter; the server cannot make it"
            )
    return row


def _key(node: Node, kind: KeyKind, tree: Tree) -> Any:
    """Return the value of a key in VALUES, ``None`` where only the server knows it."""
    number, value = constant(node, kind) or (None, None)
    if number is not None:
        name = tree.names[number]
        if name not in tree.parameters:
            raise _without_value(name)
        value = tree.parameters[name]
    try:
        return read(value, kind)
    except ValueError:
        return None
