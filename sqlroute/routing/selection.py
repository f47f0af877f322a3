"""The columns of one SELECT while it is analysed: what names mean, and where values are found.

Collects the hidden columns that the merge needs: a value is taken from a visible column where
SQLAlchemy gives it as PostgreSQL compares it, else from a column that is added behind the caller's.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from sqlalchemy.sql.elements import (
    ColumnElement,
    Label,
    Over,
    TextClause,
    Tuple,
    _textual_label_reference,
)
from sqlalchemy.sql.schema import Column, Table
from sqlalchemy.sql.selectable import FromClause

from sqlroute.errors import CrossShardRefused
from sqlroute.health import TextOrder
from sqlroute.routing.aggregates import Form, check_scalar
from sqlroute.routing.families import (
    check_clock,
    has_rank,
    is_loaded_as_stored,
    is_moment_column,
    order_family,
    words,
)
from sqlroute.routing.keys import reference_dialect
from sqlroute.routing.localities import Localities
from sqlroute.routing.ordering import Family, SortTerm
from sqlroute.routing.places import (
    AnySelect,
    OrderTerm,
    Place,
    Slot,
    element_at,
    is_same,
    order_terms,
    slots,
    unlabelled,
)
from sqlroute.routing.shapes import Hidden

Found = tuple[Slot | None, Place, ColumnElement[Any]]
"""The visible column that a name or expression stands for, if any, its place and expression."""


class Selection:
    """What is known of the columns of a statement, and hidden so far.

    Args:
        text_order: how the databases compare text.
        scalar_functions: names of the caller's functions known to be no aggregates.
    """

    def __init__(
        self, statement: AnySelect, text_order: TextOrder, scalar_functions: frozenset[str]
    ) -> None:
        self.statement = statement
        self.text_order = text_order
        self.scalar_functions = scalar_functions
        self.state = compile_state(statement)
        self.slots = tuple(slots(statement))
        self.terms = order_terms(statement)
        self.hidden: list[Hidden] = []
        self.alike: list[tuple[int, str]] = []

    @cached_property
    def localities(self) -> Localities:
        """The shard keys of its FROM."""
        return Localities(_sources(self.statement, self.state))

    def check_scalar(self, expression: Any, clause: str) -> None:
        """Refuse what is not computed from rows of one shard, see :func:`check_scalar`."""
        check_scalar(expression, clause, self.scalar_functions, self._is_local)

    def _is_local(self, window: Over[Any]) -> bool:
        return self.localities.is_local(window)

    def named(self, target: Any, place: Place, clause: str) -> Found:
        """Return what a term of ORDER BY or GROUP BY stands for.

        Raises:
            CrossShardRefused: text, or a name of nothing.
        """
        if isinstance(target, _textual_label_reference):
            return self._by_name(target.element, place, clause)
        if isinstance(target, TextClause):
            raise CrossShardRefused(
                clause, f"text({target.text!r}) cannot be analysed; use columns"
            )
        if isinstance(target, Tuple) or not isinstance(target, ColumnElement):
            raise CrossShardRefused(clause, f"{words(target)}: name its columns one by one")
        expression = unlabelled(target)
        slot = next((slot for slot in self.slots if is_same(slot.expression, expression)), None)
        return slot, place, expression

    def column_of(self, found: Found) -> int:
        """Return the visible column that holds an expression's stored value, or hide one."""
        slot, place, expression = found
        plain = is_loaded_as_stored(expression.type)
        if slot is not None and slot.index is not None and plain:
            return slot.index
        return self.hide(place, Form.AS_IS if plain else Form.AS_STORED)

    def sort_term(self, term: OrderTerm, found: Found, clause: str) -> SortTerm:
        """Return how the merge sorts by an expression.

        Raises:
            CrossShardRefused: Python cannot order its values as PostgreSQL does.
        """
        slot, place, expression = found
        check_clock(expression, clause)
        if has_rank(expression):
            meaning = f"the shards define the enum of {words(expression)} differently"
            self.alike.append((self.hide(place, Form.LABELS), meaning))
            column, family = self.hide(place, Form.RANK), Family.NUMBER
        else:
            family = order_family(expression, clause, self.text_order)
            is_seen = slot is not None and slot.index is not None
            if is_moment_column(expression) and not is_seen:
                # Python has no infinity and no year before 1, which only has to be sorted by
                column, family = self.hide(place, Form.EPOCH), Family.NUMBER
            else:
                column = self.column_of(found)
        return term.sorted_by(column, family, words(expression))

    def hide(self, place: Place, form: Form, number: int = 0) -> int:
        """Return the number of a hidden column, below zero until all of them are known."""
        hidden = Hidden(place, form, number)
        if hidden not in self.hidden:
            self.hidden.append(hidden)
        return -self.hidden.index(hidden) - 1

    def _by_name(self, name: str, place: Place, clause: str) -> Found:
        found = self.state._label_resolve_dict[0].get(name)
        if found is None:
            raise CrossShardRefused(clause, f"{name!r} is no label or column of the statement")
        for slot in self.slots:
            column = element_at(self.statement, slot.place)
            if isinstance(found, Label):
                is_it = isinstance(column, Label) and column.name == found.name
            else:
                is_it = is_same(unlabelled(found), slot.expression)
            if is_it:
                return slot, slot.place, slot.expression
        column = found._deannotate(clone=False)
        if isinstance(column, Column) and isinstance(column.table, Table):
            return None, Place(place.clause, place.item, place.part, column), column
        raise CrossShardRefused(
            clause, f"{name!r} names no column of a table; give the expression instead of its name"
        )


def sources(statement: AnySelect) -> list[FromClause]:
    """Return the FROM elements of a SELECT, as they will be rendered."""
    return _sources(statement, compile_state(statement))


def _sources(statement: AnySelect, state: Any) -> list[FromClause]:
    core = getattr(state, "statement", statement)  # what the ORM has made of it
    found: list[FromClause] = (
        state if core is statement else compile_state(core)
    )._get_display_froms()
    return found


def compile_state(statement: AnySelect) -> Any:
    """Return what SQLAlchemy, or its ORM, makes of a SELECT before rendering it."""
    dialect = reference_dialect()
    compiler: Any = dialect.statement_compiler(dialect, None)
    compiler.stack = []
    factory: Any = statement._compile_state_factory
    return factory(statement, compiler)
