"""Describe SQL text as :mod:`sqlroute.routing.statement` describes statements of SQLAlchemy.

The text is parsed by PostgreSQL's own parser (pgparse) and rebuilt, as far as shards depend on it,
by :mod:`sqlroute.routing.sqltree`, so that one set of rules serves both. What is not understood
makes a statement unknown, and a sharded table where it is not followed means all shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.sql.elements import TextClause
from sqlalchemy.sql.schema import Table

from sqlroute.errors import CrossShardRefused, MissingShardKey, PlanError
from sqlroute.routing.blocks import ANY_BUCKET, Occurrence
from sqlroute.routing.declare import shard_key
from sqlroute.routing.functions import BUILT_IN, Functions, Judgement, judge
from sqlroute.routing.keys import Bind
from sqlroute.routing.sqlclauses import clauses, why_not_row_by_row
from sqlroute.routing.sqlfacts import TextFacts, named, nodes, sets_something, tree_facts
from sqlroute.routing.sqltree import Role, TableInfo, Tables, Tree
from sqlroute.routing.sqlvalues import Node
from sqlroute.routing.statement import Kind, Placement, Statement, describe, with_opaque
from sqlroute.topology import Keyspace, Topology

__all__ = ["Role", "TableInfo", "Tables", "TextStatement", "describe_clause", "describe_text"]


@dataclass(frozen=True, slots=True)
class TextStatement:
    """SQL text, described.

    Attributes:
        constants: values that it compares with columns, by the names its recipes have for them.
        names: of its parameters.
        clauses: of a SELECT, what makes more of several rows than those rows.
    """

    sql: str
    statement: Statement
    constants: Mapping[str, Any]
    names: frozenset[str]
    clauses: tuple[str, ...] = ()


def describe_text(
    sql: str, tables: Tables, topology: Topology, functions: Functions = BUILT_IN
) -> TextStatement:
    """Describe one statement given as text, without the values of its parameters.

    Args:
        sql: parameters are written ``:name``, ``%(name)s`` or ``$1``; the last is named ``"1"``.
        tables: what exists.
        functions: what is known of them.

    Raises:
        PlanError: it is not one statement of valid SQL, or cannot be placed.
        UnknownName: a table that nobody knows.
    """
    numbered, names = _numbered(sql)
    return _described(sql, numbered, Tree(tables, names), topology, functions)


def describe_clause(
    clause: TextClause, tables: Tables, topology: Topology, functions: Functions = BUILT_IN
) -> TextStatement:
    """Describe a ``text()`` of SQLAlchemy, whose parameters are read by its rules.

    Args:
        tables: what exists.
        functions: what is known of them.

    Raises: as :func:`describe_text`.
    """
    binds = clause._bindparams
    expanding = frozenset(name for name, bind in binds.items() if bind.expanding)
    sql, names = named(clause.text, expanding)
    tree = Tree(tables, names, {name: bind.type for name, bind in binds.items()}, expanding)
    return _described(clause.text, sql, tree, topology, functions)


def rebuilt(sql: str, tables: Tables) -> Any:
    """Return a statement as far as it was understood, over tables made for it; never to be run.

    Raises: as :func:`describe_text`.
    """
    numbered, names = _numbered(sql)
    (name, body), *_ = _parsed(numbered, sql).items()
    tree = Tree(tables, names)
    if name == "SelectStmt":
        return tree.query(body)
    if name in ("InsertStmt", "UpdateStmt", "DeleteStmt"):
        return tree.written(body)
    raise PlanError(f"{sql[:60]!r} is no query")


def inserted(sql: str, tables: Tables) -> list[tuple[str, str]]:
    """Return (table, column) of each column that an INSERT gives a constant or a parameter.

    Raises: as :func:`describe_text`.
    """
    numbered, names = _numbered(sql)
    root = _parsed(numbered, sql)
    if "InsertStmt" not in root:
        return []
    body, tree = root["InsertStmt"], Tree(tables, names)
    info = tree.info(body["relation"])
    lists = body.get("selectStmt", {}).get("SelectStmt", {}).get("valuesLists", [])
    columns = _columns(body, info)
    found = []
    for row in lists[:1]:
        for column, node in zip(columns, row["List"]["items"], strict=False):
            kind = info.columns.get(column)
            if kind is not None and tree.bind(node, kind) is not None:
                found.append((info.name, column))
    return found


def statements(sql: str) -> list[str]:
    """Return the statements of a text, which are parted by ``;``, or one in each line.

    Raises:
        PlanError: neither can be parsed.
    """
    numbered, _ = _numbered(sql)
    lines = [line for line in numbered.splitlines() if line.strip()]
    if ";" not in numbered:
        return [line for line in lines if not line.lstrip().startswith("--")]
    text = numbered.encode()
    found = []
    for statement in _all_parsed(numbered):
        start = statement.get("stmt_location", 0)
        length = statement.get("stmt_len", 0) or len(text) - start
        found.append(text[start : start + length].decode().strip())
    return found


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
    statements = _all_parsed(numbered)
    if len(statements) != 1:
        raise PlanError(f"one statement is described at a time, {sql[:60]!r} has {len(statements)}")
    root: Node = statements[0]["stmt"]
    return root


def _all_parsed(numbered: str) -> list[Node]:
    try:
        import pgparse
    except ImportError:
        raise PlanError(
            "SQL text is parsed by pgparse, which is not installed; install sqlroute[parse]"
        ) from None
    try:
        found: list[Node] = pgparse.parse(numbered)
    except pgparse.PGQueryError as exc:
        message = exc.args[0] if exc.args else str(exc)
        raise PlanError(f"the SQL text cannot be parsed: {message}") from None
    return found


# What the whole tree says of reading and writing


def _verdict(facts: TextFacts, judged: Judgement) -> tuple[Kind, tuple[str, ...]]:
    if facts.writes:
        return Kind.WRITE, facts.writes
    if unknown := (*facts.unknown, *judged.unknown):
        return Kind.UNKNOWN, unknown
    return Kind.READ, ("a SELECT of known parts",)


# The description


def _described(
    sql: str, numbered: str, tree: Tree, topology: Topology, functions: Functions
) -> TextStatement:
    root = _parsed(numbered, sql)
    facts = tree_facts(root)
    found = _statement(root, facts, tree, topology, functions)
    judged = judge(facts.calls, found.keyspace.name, functions)
    found = replace(
        found,
        is_text=True,
        sets=sets_something(sql),
        calls=bool(facts.calls),
        calls_foreign=judged.opaque is not None,
        undecided=judged.undecided and found.kind is Kind.UNKNOWN,
    )
    more = tuple(clauses(root["SelectStmt"])) if "SelectStmt" in root else ()
    return TextStatement(sql, found, tree.constants, frozenset(tree.names.values()), more)


def _statement(
    root: Node, facts: TextFacts, tree: Tree, topology: Topology, functions: Functions
) -> Statement:
    (name, body), *_ = root.items()
    if name not in ("SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt"):
        keyspace = _keyspace(tree, topology)
        kind, reasons = _verdict(facts, judge(facts.calls, keyspace.name, functions))
        return _unplaced(kind, reasons, tree, keyspace)
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
        return _unplaced(kind, reasons, tree, keyspace)
    found = _with_unfollowed(describe(core, topology), unfollowed, tree)
    reasons = (*reasons, *_assumptions(found, tree))
    found = replace(found, kind=kind, reasons=reasons, target=target)
    if kind is Kind.READ and not found.tables:
        # what the tree holds opaque is proved harmless here, so nothing ties it to a shard
        found = replace(found, placement=Placement.ANYWHERE)
    found = with_opaque(found, judged.opaque)
    if tree.outside:
        why = f"{tree.outside[0]} in it may aggregate the rows of the query around it"
        found = replace(found, hindrance=found.hindrance or ("subquery", why))
    if name == "SelectStmt" and found.hindrance is None:
        found = replace(found, hindrance=_hindrance(body))
    if name == "InsertStmt":
        rows = _rows(body, unfollowed, tree) if found.keyspace.is_sharded else None
        found = replace(found, insert=target, occurrences=(), row_keys=rows)
    return found


def _hindrance(body: Node) -> tuple[str, str] | None:
    clause = why_not_row_by_row(body)
    if clause is None:
        return None
    return clause, "SQL text is sent as it is, so rows of several shards are not merged by it"


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
    taken = (i for i in tree.used.values() if i.role is Role.REFERENCE and not i.is_declared)
    names = [info.name for info in taken]
    if not names:
        return ()
    return (f"ordinary tables are taken for reference tables: {', '.join(names)}",)


def _rows(
    body: Node, unfollowed: list[TableInfo], tree: Tree
) -> tuple[Mapping[str, Bind], ...] | None:
    """Return where the keys of the rows of an INSERT are, ``None`` if its table is not sharded.

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
    columns = _columns(body, info)
    return tuple(_row(info, columns, row["List"]["items"], tree) for row in lists)


def _columns(body: Node, info: TableInfo) -> list[str]:
    return [item["ResTarget"]["name"] for item in body.get("cols", [])] or [*info.columns]


def _row(info: TableInfo, columns: list[str], items: list[Node], tree: Tree) -> Mapping[str, Bind]:
    given = dict(zip(columns, items, strict=False))
    row: dict[str, Bind] = {}
    for name, kind in zip(info.key, info.kinds, strict=True):
        bind = tree.bind(given[name], kind) if name in given else None
        if bind is None or bind.expanding:
            raise MissingShardKey(
                f"a row of {info.name} needs its shard key ({', '.join(info.key)}) as a "
                "constant or a parameter; the server cannot make it"
            )
        row[name] = Bind(bind.key, False, bind.type)
    return row
