"""Say what SQL text does: read, write, or what nobody can tell; which functions it calls.

The text is parsed by PostgreSQL's own parser (pgparse, the ``parse`` extra). Proofs go one way:
text that cannot be parsed, holds several statements or a node that is not known to do nothing is no
read, and without the extra no text is. Answers are remembered by text, failures too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlroute.routing.functions import SEQUENCES, FunctionName

TEXTS = 1_000
"""How many texts are remembered; beyond it the least used goes."""

UNPROVED = "text() cannot be proved to be a read"


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What a text does by itself; what its functions do is another question.

    Attributes:
        writes, unknown: why it is no read, or not proved to be one.
        calls: its functions.
        has_tables: it names a table or a view.
        sets: it changes a setting of its connection.
    """

    writes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    calls: tuple[FunctionName, ...] = ()
    has_tables: bool = False
    sets: bool = False


def statement_facts(text: str, expanding: Collection[str] = ()) -> TextFacts:
    """Return the facts of a whole statement.

    Args:
        text: as given to ``text()``: parameters are written ``:name``.
        expanding: names of the parameters that are rendered as a list in parentheses.
    """
    return _statement_facts(named(text, expanding)[0])


def fragment_facts(text: str) -> TextFacts:
    """Return the facts of a part of a statement: expressions, or what stands in ORDER BY."""
    return _fragment_facts(named(text)[0], ("SELECT 1 ORDER BY {}", "SELECT {}"))


def source_facts(text: str) -> TextFacts:
    """Return the facts of a part of a statement that stands in FROM."""
    return _fragment_facts(named(text)[0], ("SELECT 1 FROM {}",))


_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?![:\w])")
_ESCAPED = re.compile(r"\\(:\w*)(?![:\w])")


def named(text: str, expanding: Collection[str] = ()) -> tuple[str, dict[int, str]]:
    """Return text as the server sees it, and the names of its parameters by number.

    ``$1`` stands for ``:name``, ``:name`` for its escaped form, by the same rules as SQLAlchemy's,
    which do not leave out quoted strings either.
    """
    numbers: dict[str, int] = {}

    def replaced(match: re.Match[str]) -> str:
        number = numbers.setdefault(match[1], len(numbers) + 1)
        return f"(${number})" if match[1] in expanding else f"${number}"

    sql = _ESCAPED.sub(r"\1", _PARAMETER.sub(replaced, text))
    return sql, {number: name for name, number in numbers.items()}


@lru_cache(maxsize=TEXTS)
def _statement_facts(sql: str) -> TextFacts:
    root = _one_statement(sql)
    sets = sets_something(sql)
    if root is None:
        return TextFacts(unknown=(UNPROVED,), sets=sets)
    return _facts(root, sets)


@lru_cache(maxsize=TEXTS)
def _fragment_facts(sql: str, places: tuple[str, ...]) -> TextFacts:
    for place in places:
        root = _one_statement(place.format(sql))
        if root is not None and _is_plain(root):
            return _facts(root, sets_something(sql))
    short = f"text {sql[:40]!r} cannot be proved to be a read"
    return TextFacts(unknown=(short,), sets=sets_something(sql))


_PLAIN = frozenset(("targetList", "sortClause", "fromClause", "limitOption", "op"))


def _is_plain(root: Any) -> bool:
    """Say whether a fragment stayed in its place, and brought no clause of its own."""
    return set(root) == {"SelectStmt"} and set(root["SelectStmt"]) <= _PLAIN


def _one_statement(sql: str) -> Any:
    """Return the parse tree of one statement, ``None`` for anything else."""
    if "\0" in sql:  # the parser would stop there
        return None
    try:
        import pgparse
    except ImportError:
        return None
    try:
        statements = pgparse.parse(sql)
    except (pgparse.PGQueryError, ValueError, RecursionError):
        return None
    return statements[0]["stmt"] if len(statements) == 1 else None


_COMMENT = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
_SETTING = re.compile(
    rf'(?:^|;){_COMMENT}(?:SET|RESET|DISCARD)\b|\bset_config"?{_COMMENT}\(',
    re.IGNORECASE | re.DOTALL,
)


def sets_something(sql: str) -> bool:
    """Say whether a text may change a setting of its connection; errs to yes, needs no parser."""
    return _SETTING.search(sql) is not None


_PARTS = """
    A_ArrayExpr A_Const A_Expr A_Indices A_Indirection A_Star Alias BitString BoolExpr Boolean
    BooleanTest CTECycleClause CTESearchClause CaseExpr CaseWhen CoalesceExpr CollateClause
    ColumnRef CommonTableExpr Float FuncCall GroupingFunc GroupingSet Integer JoinExpr List
    MinMaxExpr NamedArgExpr NullTest ParamRef RangeFunction RangeSubselect RangeTableFunc
    RangeTableFuncCol RangeTableSample RangeVar ResTarget RowExpr SQLValueFunction SelectStmt SortBy
    String SubLink TypeCast TypeName WindowDef WithClause XmlExpr XmlSerialize
    JsonArgument JsonArrayAgg JsonArrayConstructor JsonArrayQueryConstructor JsonBehavior
    JsonFuncExpr JsonIsPredicate JsonKeyValue JsonObjectAgg JsonObjectConstructor JsonOutput
    JsonParseExpr JsonReturning JsonScalarExpr JsonSerializeExpr JsonTable JsonTableColumn
    JsonTablePathSpec JsonValueExpr
    MultiAssignRef SetToDefault InferClause MergeWhenClause"""
_HARMLESS_NODES = frozenset(_PARTS.split())
"""Nodes that do nothing by themselves; the last line are parts of what writes anyway."""

_WRITES = {
    "InsertStmt": "INSERT writes",
    "UpdateStmt": "UPDATE writes",
    "DeleteStmt": "DELETE writes",
    "MergeStmt": "MERGE writes",
}


def nodes(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every named node, in the order of the text, however deep they are."""
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        name, value = stack.pop()
        if name:
            yield name, value
        if name in _CLAUSES:
            continue
        if isinstance(value, Mapping):
            inner = [(key if _is_node(key) else "", item) for key, item in value.items()]
            stack += reversed(inner)
        elif isinstance(value, list):
            stack += [("", item) for item in reversed(value)]


_CLAUSES = ("lockingClause", "intoClause")


def _is_node(name: str) -> bool:
    return name[:1].isupper() or name in _CLAUSES


def tree_facts(root: Any) -> TextFacts:
    """Return the facts of a parse tree, its tables left aside."""
    writes: list[str] = []
    unknown: list[str] = []
    calls: list[FunctionName] = []
    has_tables = False
    for name, value in nodes(root):
        if name in _WRITES:
            writes.append(_WRITES[name])
        elif name == "lockingClause":
            writes.append("FOR UPDATE or FOR SHARE locks rows")
        elif name == "intoClause":
            writes.append("SELECT INTO makes a table")
        elif name == "FuncCall":
            calls.append(_called(value))
        elif name == "RangeVar":
            has_tables = True
        elif name not in _HARMLESS_NODES:
            unknown.append(f"{_words(name)} cannot be proved to be a read")
    calls = list(dict.fromkeys(calls))
    writes += [
        f"{name}() advances a sequence"
        for schema, name in calls
        if name in SEQUENCES and schema in ("", "pg_catalog")
    ]
    return TextFacts(
        tuple(dict.fromkeys(writes)), tuple(dict.fromkeys(unknown)), tuple(calls), has_tables
    )


def _facts(root: Any, sets: bool) -> TextFacts:
    """Return the facts of a tree; each server has its own system tables, so they are no read."""
    found = tree_facts(root)
    unknown = dict.fromkeys(found.unknown)
    for name, value in nodes(root):
        if name == "RangeVar" and is_system_table(value.get("schemaname"), value["relname"]):
            unknown[why_system(value["relname"])] = None
    return TextFacts(found.writes, tuple(unknown), found.calls, found.has_tables, sets)


def is_system_table(schema: str | None, name: str) -> bool:
    """Say whether a name means a table of PostgreSQL's own."""
    return name.startswith("pg_") if not schema else schema in ("pg_catalog", "information_schema")


def why_system(name: str) -> str:
    return f"{name} is a system table, of which each server has its own"


def _called(call: Mapping[str, Any]) -> FunctionName:
    *schema, name = [part.get("String", {}).get("sval", "") for part in call["funcname"]]
    return ".".join(schema), name


def _words(node: str) -> str:
    """``VariableSetStmt`` as ``VARIABLE SET``."""
    return " ".join(re.findall("[A-Z][a-z]+|[A-Z]+(?![a-z])", node.removesuffix("Stmt"))).upper()
