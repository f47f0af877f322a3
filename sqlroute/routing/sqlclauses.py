"""Which clauses of a parsed SELECT make more of rows than those rows: order, groups, aggregates.

They are what cannot be sent to several shards as it stands. Looks at the parse tree of PostgreSQL
alone; which tables a name means is :mod:`sqlroute.routing.sqltree`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlroute.routing.functions import AGGREGATES
from sqlroute.routing.sqlvalues import Node

_CLAUSES = {
    "sortClause": "ORDER BY",
    "limitCount": "LIMIT",
    "limitOffset": "OFFSET",
    "distinctClause": "DISTINCT",
    "groupClause": "GROUP BY",
    "havingClause": "HAVING",
    "windowClause": "WINDOW",
    "valuesLists": "VALUES",
}


def why_not_row_by_row(body: Node) -> str | None:
    """Return the clause by which a SELECT is more than the rows of each shard, one after another.

    ``None`` where it is just those.
    """
    return next(clauses(body), None)


def clauses(body: Node) -> Iterator[str]:
    """Yield the clauses of a SELECT that make more of several rows, subqueries aside."""
    operation = body.get("op", "SETOP_NONE")
    if operation != "SETOP_NONE":
        yield str(operation.removeprefix("SETOP_"))
    for clause, name in _CLAUSES.items():
        if body.get(clause):
            is_on = clause == "distinctClause" and body[clause][0]
            yield "DISTINCT ON" if is_on else name
    yield from _aggregates([body.get("targetList", []), body.get("sortClause", [])])


def _aggregates(tree: Any) -> Iterator[str]:
    """Yield the calls of aggregates and window functions, those in subqueries aside."""
    if isinstance(tree, list):
        for item in tree:
            yield from _aggregates(item)
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            if name == "SelectStmt":
                continue
            if name == "FuncCall":
                yield from _aggregate(value)
            elif name in ("JsonArrayAgg", "JsonObjectAgg", "GroupingFunc"):
                yield name
            yield from _aggregates(value)


def _aggregate(call: Node) -> Iterator[str]:
    called = call["funcname"][-1]["String"]["sval"]
    if "over" in call:
        yield f"{called}() OVER"
    elif called in AGGREGATES:
        yield f"{called}(DISTINCT)" if call.get("agg_distinct") else f"{called}()"


def aggregates_outside(body: Node, has: Callable[[list[str]], bool]) -> Iterator[str]:
    """Yield the aggregates in a subquery of which no column is certainly its own.

    Where all columns of an aggregate belong to an enclosing query, it aggregates the rows of that.

    Args:
        has: says whether a name certainly means a column of the subquery's own FROM.
    """
    for call in _calls(
        [body.get(clause) for clause in ("targetList", "havingClause", "sortClause")]
    ):
        name = next(_aggregate(call), None)
        paths = [_path(node) for node in _references(call)]
        if name is not None and paths and not any(map(has, paths)):
            yield name


def _calls(tree: Any) -> Iterator[Node]:
    if isinstance(tree, list):
        for item in tree:
            yield from _calls(item)
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            if name == "FuncCall":
                yield value
            if name != "SelectStmt":
                yield from _calls(value)


def _references(tree: Any) -> Iterator[Node]:
    if isinstance(tree, list):
        for item in tree:
            yield from _references(item)
    elif isinstance(tree, Mapping):
        if "ColumnRef" in tree:
            yield tree
        for value in tree.values():
            yield from _references(value)


def _path(node: Node) -> list[str]:
    return [part.get("String", {}).get("sval", "") for part in node["ColumnRef"]["fields"]]
