"""``SELECT EXISTS (...)`` of rows on several shards: it is true where it is so on one of them.

What ``session.query(query.exists()).scalar()`` sends: one column, and no FROM of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import UnaryExpression
from sqlalchemy.sql.selectable import Exists, Select

from sqlroute.routing.families import bare

_OTHER_CLAUSES = (
    "_where_criteria",
    "_group_by_clauses",
    "_having_criteria",
    "_order_by_clauses",
    "_distinct",
    "_from_obj",
    "_setup_joins",
    "_independent_ctes",
)
"""Where a SELECT keeps what is more than its columns and its LIMIT."""


@dataclass(frozen=True, slots=True)
class Question:
    """What ``SELECT EXISTS (...)`` asks.

    Attributes:
        rows: are there any of this SELECT.
        is_negated: are there none.
    """

    rows: Select[Any]
    is_negated: bool


def question(statement: Any) -> Question | None:
    """Return what a statement asks, ``None`` where it is not such a one."""
    if not isinstance(statement, Select) or len(statement._raw_columns) != 1:
        return None
    if any(getattr(statement, clause, ()) for clause in _OTHER_CLAUSES):
        return None
    expression, is_negated = bare(statement._raw_columns[0]), False
    while isinstance(expression, UnaryExpression) and expression.operator is operators.inv:
        expression, is_negated = bare(expression.element), not is_negated
    if not isinstance(expression, Exists):
        return None
    rows: Any = expression.element
    while not isinstance(rows, Select) and hasattr(rows, "element"):
        rows = rows.element
    return Question(rows, is_negated) if isinstance(rows, Select) else None
