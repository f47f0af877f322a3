"""Describe a statement once per shape: what it does, which tables, which buckets, what hinders.

It looks at the SELECT that SQLAlchemy will render, with the ORM's joins, aliases and loader
criteria already in it. Of SQL text it asks :mod:`sqlroute.routing.sqlfacts` whether it is a read,
never where its rows are. A description holds no values, so that it serves every execution of the
same shape (see :class:`sqlroute.routing.planner.Planner`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Any

from sqlalchemy.sql import visitors
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import (
    AbstractTextClause,
    BinaryExpression,
    BindParameter,
    ClauseElement,
    ColumnClause,
    TextClause,
    UnaryExpression,
    quoted_name,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.sql.schema import Sequence, Table
from sqlalchemy.sql.selectable import (
    AliasedReturnsRows,
    CompoundSelect,
    Select,
    SelectBase,
    TableClause,
    TextualSelect,
)

from sqlroute.errors import CrossShardRefused, UndeclaredTable
from sqlroute.routing.blocks import Occurrence, Query, extra_froms, occurrences
from sqlroute.routing.declare import (
    Reference,
    Sharded,
    ShardKey,
    declaration,
    only_of,
    shard_key,
)
from sqlroute.routing.functions import BUILT_IN, SEQUENCES, FunctionName, Functions, judge
from sqlroute.routing.keys import Bind, reference_dialect
from sqlroute.routing.sqlfacts import (
    TextFacts,
    fragment_facts,
    is_system_table,
    source_facts,
    statement_facts,
    why_system,
)
from sqlroute.topology import Keyspace, Topology


class Kind(Enum):
    """What a statement does, as far as it can be proved."""

    READ = "read"
    VOUCHED = "vouched"  # nobody can prove it; the caller, or who declared a function, says so
    WRITE = "write"
    UNKNOWN = "unknown"

    __hash__ = object.__hash__  # Enum's own is a function in Python


class Placement(Enum):
    """Where the rows of a statement are."""

    ANYWHERE = "anywhere"  # no table at all, or reference tables only
    SHARDED = "sharded"  # some table is sharded
    UNPLACED = "unplaced"  # nothing says where: text, unknown tables


@dataclass(frozen=True, slots=True)
class Statement:
    """The description of one shape of statement.

    Attributes:
        kind: read, write or unknown; the reasons say why.
        keyspace: that all its tables belong to.
        placement: where its rows are.
        tables: names of its tables, sharded ones first.
        occurrences: each use of a sharded table, with its key recipe and colocation group.
        hindrance: why it can never be scattered, as (clause, why), or ``None``.
        required: indexes of the occurrences without whose rows it gives no row at all.
        insert: the table of an INSERT, whose rows carry the keys.
        target: the table that a DML statement writes.
        sets: it is a ``SET``, ``RESET`` or ``set_config`` sent by hand, which reaches one
            connection only.
        is_text: some of it is text, and what that reads is not looked into.
        calls: its kind hangs on what functions do.
        calls_foreign: on what a function does that is not PostgreSQL's own: a stable one may call
            a volatile one.
        undecided: one of them no list and no catalog knows; a catalog read now might.
        row_keys: of an INSERT given as text, where the keys of its rows are.
        untold: names of tables in text that nobody knows; a catalog read now might.
    """

    kind: Kind
    reasons: tuple[str, ...]
    keyspace: Keyspace
    placement: Placement
    tables: tuple[str, ...] = ()
    occurrences: tuple[Occurrence, ...] = ()
    hindrance: tuple[str, str] | None = None
    insert: Table | None = field(default=None, compare=False)
    target: Table | None = field(default=None, compare=False)
    sets: bool = False
    is_text: bool = False
    calls: bool = False
    calls_foreign: bool = False
    undecided: bool = False
    row_keys: tuple[Mapping[str, Bind], ...] | None = None
    untold: tuple[str, ...] = ()
    required: tuple[int, ...] = ()

    @property
    def key(self) -> ShardKey | None:
        if self.insert is not None and isinstance(declaration(self.insert), Sharded):
            return shard_key(self.insert)
        return self.occurrences[0].key if self.occurrences else None


def describe(statement: Any, topology: Topology, functions: Functions = BUILT_IN) -> Statement:
    """Describe a statement, without its values.

    Args:
        functions: what is known of them.

    Raises:
        UndeclaredTable: a table of a keyspace with several shards declares nothing.
        CrossShardRefused: a reference table is written by what one shard alone would run, or
            ``ONLY`` leaves out the partitions that hold the rows of a sharded table.
        PlanError: tables of two keyspaces in one statement.
    """
    if isinstance(statement, Sequence):
        return _unplaced(topology, Kind.WRITE, "a sequence is advanced on the primary")
    core = _as_rendered(statement)
    if not isinstance(core, SelectBase | UpdateBase | FunctionElement | TextClause):
        what = type(statement).__name__
        return _unplaced(topology, Kind.UNKNOWN, f"{what} cannot be proved to be a read")
    facts = _walk(core)
    keyspace = _keyspace(facts.tables, topology)
    judged = judge(facts.calls, keyspace.name, functions)
    facts.unknown += judged.unknown
    found = with_opaque(_describe(core, facts, keyspace), judged.opaque)
    if not (facts.calls or facts.sets or facts.is_text):
        return found
    return replace(
        found,
        sets=facts.sets,
        is_text=facts.is_text,
        calls=bool(facts.calls),
        calls_foreign=judged.opaque is not None,
        undecided=judged.undecided and found.kind is Kind.UNKNOWN,
    )


def with_opaque(found: Statement, call: str | None) -> Statement:
    """Keep on one shard what calls a function that may look at rows of its own choice."""
    if call is None or not found.keyspace.is_sharded or found.kind is not Kind.READ:
        return found
    why = f"function {call} may read tables, and each shard has its own rows"
    if found.placement is Placement.ANYWHERE:
        return replace(found, placement=Placement.UNPLACED, reasons=(why, *found.reasons))
    return replace(found, hindrance=found.hindrance or (call, why))


def _describe(core: Any, facts: _Facts, keyspace: Keyspace) -> Statement:
    kind, reasons = facts.verdict()
    tables = sorted(facts.tables, key=lambda t: (not _is_sharded(t), t.fullname))
    names = tuple(table.fullname for table in tables)
    target = core.table if isinstance(core, UpdateBase) else None
    target = _plain(target) if isinstance(target, Table) else None
    insert = target if isinstance(core, Insert) else None
    if not keyspace.is_sharded:
        return Statement(
            kind, reasons, keyspace, Placement.ANYWHERE, names, insert=insert, target=target
        )
    for table in tables:
        if declaration(table) is None:
            raise UndeclaredTable(
                f"table {table.fullname} is neither sharded nor a reference table, and keyspace "
                f"{keyspace.name} has {len(keyspace.shards)} shards; declare it by "
                "sqlroute.sharded_by(...) or sqlroute.reference_table() in __table_args__"
            )
    _check_reference_writes(target, facts)
    _check_partitions_are_read(facts)
    if facts.hidden or (kind is Kind.UNKNOWN and not tables):
        placement = Placement.UNPLACED
        reasons = tuple(dict.fromkeys((*facts.hidden, *reasons)))
    elif any(_is_sharded(table) for table in tables):
        placement = Placement.SHARDED
    else:
        placement = Placement.ANYWHERE
    found = occurrences(core, tuple(t for t in tables if _is_sharded(t)), facts.queries)
    return Statement(
        kind,
        reasons,
        keyspace,
        placement,
        names,
        found.occurrences,
        found.hindrance,
        insert,
        target,
        required=found.required,
    )


def _check_reference_writes(target: Table | None, facts: _Facts) -> None:
    """Refuse what would change a reference table on some shards only, or differently.

    Raises:
        CrossShardRefused: a data-modifying CTE writes one, or its new rows come from a shard.
    """
    for table in facts.written:
        if not isinstance(declaration(table), Reference):
            continue
        if table is not target:
            raise CrossShardRefused(
                "data-modifying CTE",
                f"reference table {table.fullname} is written on every shard, which a statement "
                "around it is not; write it by a statement of its own",
            )
        if any(_is_sharded(other) for other in facts.tables):
            raise CrossShardRefused(
                facts.writes[0].split()[0],
                f"reference table {table.fullname} is written on every shard from rows that one "
                "shard holds; read the rows first, then write them",
            )


def _check_partitions_are_read(facts: _Facts) -> None:
    """Refuse ``ONLY`` of a sharded table, which would find no row.

    Raises:
        CrossShardRefused: says so.
    """
    for source in facts.only:
        table = source
        while isinstance(table, AliasedReturnsRows):
            table = table.element
        if isinstance(table, Table) and _is_sharded(_plain(table)):
            raise only_of(table.fullname)


def _is_sharded(table: Table) -> bool:
    return isinstance(declaration(table), Sharded)


def _unplaced(topology: Topology, kind: Kind, reason: str) -> Statement:
    keyspace = topology.default
    placement = Placement.UNPLACED if keyspace.is_sharded else Placement.ANYWHERE
    return Statement(kind, (reason,), keyspace, placement)


def _keyspace(tables: set[Table], topology: Topology) -> Keyspace:
    names: dict[str, str] = {}
    for table in tables:
        declared = declaration(table)
        name = declared.keyspace if declared is not None else None
        names.setdefault(name or topology.default.name, table.fullname)
    if len(names) > 1:
        where = ", ".join(f"{table} in {keyspace}" for keyspace, table in sorted(names.items()))
        raise UndeclaredTable(f"one statement cannot join keyspaces: {where}")
    return topology.keyspace(next(iter(names))) if names else topology.default


def _as_rendered(statement: Any) -> Any:
    """Return the Core statement that will be rendered: the ORM's own compilation of it."""
    if isinstance(statement, UpdateBase) or not isinstance(statement, ClauseElement):
        return statement
    if statement._propagate_attrs.get("compile_state_plugin") != "orm":
        return statement
    factory: Any = getattr(statement, "_compile_state_factory", None)
    if factory is None:
        return statement
    state = factory(statement, _compiler())
    if getattr(state, "multi_row_eager_loaders", False) and not _reads_in_bounds(statement):
        # rendered as a subquery, so that LIMIT counts entities; where its rows are does not change
        unlimited: Any = statement
        state = factory(unlimited.limit(None).offset(None), _compiler())
    return state.statement


def _reads_in_bounds(statement: Any) -> bool:
    bounds = (statement._limit_clause, statement._offset_clause)
    return not all(bound is None or isinstance(bound, BindParameter) for bound in bounds)


def text_of(statement: Any) -> TextClause | None:
    """Return the ``text()`` that a statement is, ``None`` for one that is made of more."""
    core = statement
    while isinstance(core, TextualSelect) or _visit_name(core) == "orm_from_statement":
        core = core.element
    return core if isinstance(core, TextClause) else None


def _visit_name(element: Any) -> str | None:
    return getattr(element, "__visit_name__", None)


def _compiler() -> Any:
    dialect = reference_dialect()
    compiler = dialect.statement_compiler(dialect, None)
    compiler.stack = []
    return compiler


@dataclass(slots=True)
class _Facts:
    """What a walk over the whole tree found.

    Attributes:
        tables: read or written.
        queries: in it, itself included.
        calls: its functions, but for those that advance a sequence.
        written: the target of each INSERT, UPDATE and DELETE.
        writes, unknown: why it is no read, or not proved to be one.
        hidden: what may read tables that nobody sees.
        only: what is read or written without its partitions.
        sets: it changes a setting of its connection.
        is_text: some of it is text that may read tables.
        readers: of text that is more than a part of expressions, by its identity.
    """

    tables: set[Table] = field(default_factory=set)
    queries: list[Query] = field(default_factory=list)
    written: set[Table] = field(default_factory=set)
    writes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    calls: list[FunctionName] = field(default_factory=list)
    only: list[Any] = field(default_factory=list)
    sets: bool = False
    is_text: bool = False
    readers: dict[int, Callable[[str], TextFacts]] = field(default_factory=dict)

    def verdict(self) -> tuple[Kind, tuple[str, ...]]:
        if self.writes:
            return Kind.WRITE, tuple(dict.fromkeys(self.writes))
        if self.unknown:
            return Kind.UNKNOWN, tuple(dict.fromkeys(self.unknown))
        return Kind.READ, ("a SELECT of known parts",)


def _walk(core: Any) -> _Facts:
    facts = _Facts()
    if isinstance(core, TextClause):
        facts.readers[id(core)] = _statement_reader(core)
    for element in _elements(core):
        note = _note_of(element.__class__)
        if note is not None:
            note(element, facts)
        if hasattr(type(element), "_compiler_dispatcher"):
            what = type(element).__name__
            facts.unknown.append(f"{what}, compiled by @compiles, is not known to be read-only")
    return facts


def _elements(core: Any) -> Iterator[Any]:
    """Yield every element, also what DML reads besides its table, and what it returns.

    A parent comes before what is in it.
    """
    seen: set[int] = set()
    added: list[Any] = []  # kept alive, so that no other element gets the identity of one
    stack = [core]
    while stack:
        for element in visitors.iterate(stack.pop()):
            if id(element) in seen:
                continue
            seen.add(id(element))
            yield element
            if isinstance(element, UpdateBase):
                stack += [*extra_froms(element), *getattr(element, "_returning", ())]
            elif isinstance(element, BindParameter | Select):
                added += _added_by_types(element)
    for expression in added:
        yield from visitors.iterate(expression)


def _added_by_types(element: BindParameter[Any] | Select[Any]) -> Iterator[Any]:
    """Yield what the types of values sent and columns fetched add when SQL is rendered."""
    dialect = reference_dialect()
    if isinstance(element, BindParameter):
        sent: Any = element.type.dialect_impl(dialect)
        if sent._has_bind_expression:
            yield sent.bind_expression(element)
        return
    for column in element._all_selected_columns:
        type_ = getattr(column, "type", None)
        if type_ is not None:
            fetched: Any = type_.dialect_impl(dialect)
            if fetched._has_column_expression:
                yield fetched.column_expression(column)


def _note_select(element: Select[Any], facts: _Facts) -> None:
    facts.queries.append(element)
    sources: Any = element._from_obj
    facts.readers |= {id(text): source_facts for text in sources if isinstance(text, TextClause)}
    _note_lock(element, facts)
    if element._suffixes or element._statement_hints:
        _hide("a suffix or hint is text", facts)
    for prefix, _ in element._prefixes:
        _note_text(getattr(prefix, "text", "()"), facts)
    _note_hints(element, facts)


def _note_hints(element: Any, facts: _Facts) -> None:
    hints: Mapping[tuple[Any, str], str] = getattr(element, "_hints", {})
    facts.only += [source for (source, _), hint in hints.items() if hint.upper() == "ONLY"]


def _note_lock(element: Select[Any] | CompoundSelect[Any], facts: _Facts) -> None:
    if element._for_update_arg is not None:
        facts.writes.append("FOR UPDATE or FOR SHARE locks rows")


def _hide(reason: str, facts: _Facts) -> None:
    facts.unknown.append(reason)
    facts.hidden.append(reason)


def _plain(table: Table) -> Table:
    """Return the table behind the ORM's annotated copy."""
    plain = table._deannotate() if table._annotations else table
    return plain if isinstance(plain, Table) else table


def _note_table(element: Table, facts: _Facts) -> None:
    facts.tables.add(_plain(element))
    _note_name(element, facts)


def _note_named(element: TableClause, facts: _Facts) -> None:
    facts.hidden.append(f"table {element.name} is known by name only; use its Table")
    _note_name(element, facts)


def _note_name(element: TableClause, facts: _Facts) -> None:
    if is_system_table(element.schema, element.name):
        facts.unknown.append(why_system(element.name))


def _note_dml(element: UpdateBase, facts: _Facts) -> None:
    verb = type(element).__name__.replace("Annotated", "").upper()
    facts.queries.append(element)
    facts.writes.append(f"{verb} writes" if isinstance(element, Insert | Update | Delete) else verb)
    table = element.table
    if isinstance(table, Table):
        facts.tables.add(_plain(table))
        facts.written.add(_plain(table))
    _note_hints(element, facts)


def _note_function(element: FunctionElement[Any], facts: _Facts) -> None:
    name = _stored(getattr(element, "name", None) or type(element).__name__)
    if name in SEQUENCES:
        facts.writes.append(f"{name}() advances a sequence")
        return
    schema = ".".join(_stored(part) for part in getattr(element, "packagenames", ()))
    facts.calls.append((schema, name))
    facts.sets |= name == "set_config"


def _stored(name: str) -> str:
    """Return a name as PostgreSQL stores it: in lower case, where SQLAlchemy does not quote it."""
    is_quoted = isinstance(name, quoted_name) and name.quote is not False
    if is_quoted or re.fullmatch(r"[A-Za-z0-9_$]+", name) is None:
        return str(name)
    return name.lower()


_OPERATOR = re.compile(
    r"[^\w\s();'\"]+|[A-Za-z ]+|OPERATOR\s*\([\w.]*[^\w\s();'\"]+\)", re.IGNORECASE
)


def _note_operator(element: BinaryExpression[Any] | UnaryExpression[Any], facts: _Facts) -> None:
    """An operator given by ``.op(...)`` is rendered as it is written, whatever that is."""
    is_unary = isinstance(element, UnaryExpression)
    for operator in (element.operator, element.modifier if is_unary else None):
        if isinstance(operator, custom_op) and not _OPERATOR.fullmatch(operator.opstring.strip()):
            short = operator.opstring[:40]
            _hide(f"operator {short!r} cannot be proved to be a read", facts)


def _note_textual(element: TextualSelect, facts: _Facts) -> None:
    if isinstance(element.element, TextClause):
        facts.readers[id(element.element)] = _statement_reader(element.element)


def _statement_reader(text: TextClause) -> Callable[[str], TextFacts]:
    lists = [name for name, bind in text._bindparams.items() if bind.expanding]
    return lambda sql: statement_facts(sql, lists)


def _note_clause(element: TextClause, facts: _Facts) -> None:
    _note_text(element.text, facts, facts.readers.get(id(element)))


def _note_other_text(element: AbstractTextClause, facts: _Facts) -> None:
    _hide(f"{type(element).__name__} cannot be proved to be a read", facts)


def _note_column(element: ColumnClause[Any], facts: _Facts) -> None:
    if element.is_literal and element.name != "*":
        _note_text(element.name, facts)


_SIMPLE_TEXT = re.compile(
    r"(?!.*\b(select|table|values|for|into)\b)[^();]*", re.IGNORECASE | re.DOTALL
)


def _note_text(
    text: str, facts: _Facts, facts_of: Callable[[str], TextFacts] | None = None
) -> None:
    """Note what a text does.

    Args:
        facts_of: reads a text that is more than a part of expressions. Such a part without calls
            and subqueries, as ``x DESC``, hides nothing.
    """
    if facts_of is None:
        if _SIMPLE_TEXT.fullmatch(text) is not None:
            return
        facts_of = fragment_facts
    found = facts_of(text)
    facts.writes += found.writes
    facts.unknown += found.unknown
    facts.calls += found.calls
    facts.sets |= found.sets
    is_bare = not (found.writes or found.unknown or found.has_tables)
    if not is_bare or facts_of is fragment_facts:
        short = " ".join(text.split())[:40]
        facts.is_text = True
        facts.hidden += found.unknown or (f"which rows {short!r} reads is not looked into",)


_NOTES: tuple[tuple[type[Any], Callable[[Any, _Facts], None]], ...] = (
    (Table, _note_table),
    (UpdateBase, _note_dml),
    (Select, _note_select),
    (CompoundSelect, _note_lock),
    (TextualSelect, _note_textual),
    (TableClause, _note_named),
    (FunctionElement, _note_function),
    (TextClause, _note_clause),
    (AbstractTextClause, _note_other_text),
    (ColumnClause, _note_column),
    (BinaryExpression, _note_operator),
    (UnaryExpression, _note_operator),
)


@lru_cache(maxsize=1_000)  # a statement has many elements, of few types
def _note_of(kind: type[Any]) -> Callable[[Any, _Facts], None] | None:
    """Return what notes the elements of a type, ``None`` where they mean nothing by themselves."""
    return next((note for base, note in _NOTES if issubclass(kind, base)), None)
