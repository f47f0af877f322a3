"""Which collections of the ORM have members on several shards, and what that means for a merge.

The owner's row is then on every shard, as one of a reference table; a row of a sharded table has
its members beside it, or they are not read in one statement with it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.sql.schema import Table
from sqlalchemy.sql.selectable import GenerativeSelect

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.declare import Reference, declaration

_EAGER_COLLECTIONS = ("eager_row_processor", "user_defined_eager_row_processor")
"""Under which a compile state has the paths of joinedload() and contains_eager()."""


def check_collections(state: Any) -> None:
    """Refuse to fill a collection from the rows of each shard alone.

    Args:
        state: SQLAlchemy's compile state of the statement.

    Raises:
        CrossShardRefused: a collection that is eagerly loaded by a join is spread.
    """
    for key in getattr(state, "attributes", ()):
        if key[0] in _EAGER_COLLECTIONS and _is_spread(key[1][-1]):
            raise CrossShardRefused(
                "eager load",
                f"{key[1][-1]} has members on several shards, and its owner is on each; load it by "
                "selectinload()",
            )


def in_order_of_collection(statement: Any) -> Any:
    """Return a statement in the order of the spread collection it loads, if that is what it does.

    ``subqueryload()`` has SQLAlchemy put that order in when it renders: no clause says it before.
    """
    if not isinstance(statement, GenerativeSelect) or statement._order_by_clauses:
        return statement
    prepared: Any = getattr(statement, "_compile_state_funcs", ())
    for _, relationship in prepared:
        if _is_spread(relationship):
            statement = statement.order_by(*(relationship.order_by or ()))
    return statement


def _is_spread(relationship: Any) -> bool:
    if not getattr(relationship, "uselist", False):
        return False
    target = relationship.secondary
    if target is None:
        target = relationship.mapper.local_table
    return _is_everywhere(relationship.parent.local_table) and not _is_everywhere(target)


def _is_everywhere(table: Any) -> bool:
    return isinstance(table, Table) and isinstance(declaration(table), Reference)
