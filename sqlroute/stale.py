"""No lost update through a stale read: check what a replica said before it is written over.

Decides, while a session flushes, whether a row is still what its object was loaded from. An object
that a replica gave and that is about to be UPDATEd or DELETEd is read again on the primary, in the
flush's transaction, its row locked: one statement per mapper and shard (500 rows each). Another
value, or no row, is :class:`sqlroute.errors.StaleObjectRead`; nothing of the flush stays.

**Which objects.** SQLAlchemy stamps each object with the number of the load that made it
(``InstanceState.runid``). The loads that replicas answer get a number of another type,
:class:`ReplicaRun`: it costs nothing per object, and it stays with an object that moves to another
session. What a number cannot say (an object that a replica filled in part) is noted by the event
``refresh``. An object is checked once per transaction; what was loaded on a primary is not.

**What is compared.** Every column value that the object was loaded with, not only those that
change. Values that can be changed in place (JSON, arrays, pickles, types of the application) are
kept as they were loaded, pickled; one that has no pickle is not compared, the others are. Not in
the table, so not compared: expressions (``column_property``, hybrids). A collection has no column:
the rows that its change UPDATEs are objects and checked as such; a parent none of whose columns
change is not (unless its class listens to ``before_update``, which may change one); rows of a
``secondary`` table are inserted and deleted one by one, and PostgreSQL's key and SQLAlchemy's count
of matched rows guard them.

**What stays as in SQLAlchemy**: ``update()`` and ``delete()`` statements, the ``bulk_`` methods
that take mappings, ``merge(load=False)`` and objects that come out of a pickle or a cache; objects
that ``expire_on_commit=False`` keeps over the commit that wrote them; children that a delete
cascade has not seen on the replica (a foreign key is loud about them). A Core UPDATE of the own
transaction that an object does not know of makes it stale as well: refresh it before it is changed.

SQLAlchemy internals used, each checked by ``tests/unit/test_sqlalchemy_internals.py``:
``InstanceState.runid``, ``QueryContext.runid``, ``ChunkedIteratorResult.context``,
``UOWTransaction.states`` and ``states_for_mapper_hierarchy``, ``mapperlib._all_registries``,
``_sa_orm_load_options``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Column, bindparam, event, or_, select, tuple_
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, Mapper, QueryContext, mapperlib
from sqlalchemy.orm.base import PASSIVE_NO_INITIALIZE, LoaderCallableStatus
from sqlalchemy.sql.expression import Join
from sqlalchemy.types import TypeDecorator

from sqlroute.errors import StaleObjectRead, UnknownName

State = InstanceState[Any]

CHUNK = 500
"""Rows that one statement checks: its parameters stay far below the protocol's 65,535."""

_SHAPES = 100
"""Statements that are kept for one class: it may be loaded with any part of its columns."""

_MIXED = "sqlroute.mixed"
"""Key of ``InstanceState.info``: a replica filled part of the object."""

_KEPT = "sqlroute.kept"
"""Key of ``InstanceState.info``: pickles of the values that can be changed in place."""

_BUFFER = "prebuffer_rows"
"""The execution option by which ``AsyncSession`` has the rows made into objects at once."""


class ReplicaRun(int):
    """The number of a load that a replica answered; equal to SQLAlchemy's own number."""

    __slots__ = ()


def buffering(options: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return options that leave the rows of a load alone, and whether they asked otherwise.

    The load must be marked before its first row becomes an object.
    """
    if not options.get(_BUFFER):
        return options, False
    return {name: value for name, value in options.items() if name != _BUFFER}, True


def mark(result: Any, *, buffered: bool = False) -> None:
    """Note that a replica gave this result, of which no row was fetched yet.

    Args:
        buffered: make its rows into objects now, instead of SQLAlchemy.
    """
    context = getattr(result, "context", None)
    if not isinstance(context, QueryContext):
        return
    context.runid = ReplicaRun(context.runid)
    if buffered:
        chunks = list(result.chunks(None))
        result.chunks = lambda _: iter(chunks)
        result.iterator = chain.from_iterable(chunks)


def is_marked(state: State) -> bool:
    """Say if any of the object's values may be a replica's."""
    return type(state.runid) is ReplicaRun or _MIXED in _info(state)


def before_load(options: Mapping[str, Any]) -> None:
    """Remember what the object to be refreshed was loaded from: its number is about to change."""
    loading = options.get("_sa_orm_load_options") if options else None
    state: State | None = getattr(loading, "_refresh_state", None)
    if state is None or not is_marked(state):
        return
    if _columns(state.mapper).keys() & state.dict.keys():
        state.info[_MIXED] = True
    else:
        state.info.pop(_MIXED, None)  # expired as a whole: nothing of the replica is left


def given(instance: Any, session: Any) -> Iterator[State]:
    """Yield the states that ``merge`` copies into a session: an object and what it cascades to."""
    state: State | None = sa_inspect(instance, raiseerr=False)
    if not isinstance(state, InstanceState):
        return
    for found in (state, *(related for _, _, related, _ in _cascade(state))):
        if found.session_id != session.hash_key:
            yield found


class Lock(Enum):
    """What other transactions may not do to a checked row meanwhile.

    An UPDATE that leaves the key alone needs less than a DELETE: foreign keys may go on referring.
    """

    NONE = "none"
    WEAK = "FOR NO KEY UPDATE"
    STRONG = "FOR UPDATE"


class StaleWrites:
    """The check of one session.

    Args:
        mode: ``"check"`` or ``"allow"``, which never checks.

    Raises:
        UnknownName: neither of them.
    """

    __slots__ = ("_checks", "_is_met", "_seen", "_uow", "_verified")

    def __init__(self, mode: str) -> None:
        if mode not in ("check", "allow"):
            raise UnknownName(f'stale_writes={mode!r} is unknown; it is "check" or "allow"')
        self._checks = mode == "check"
        self._is_met = False
        self._uow: Any = None
        self._seen: set[Mapper[Any]] = set()
        self._verified: dict[Any, WeakSet[State]] = {}

    def __repr__(self) -> str:
        return f"<StaleWrites {'check' if self._checks else 'allow'}>"

    @property
    def is_needed(self) -> bool:
        """Say if the session may hold an object that a replica has given."""
        return self._is_met

    def meet(self) -> None:
        """Note that the session holds such an object from now on."""
        self._is_met = self._checks

    def flushing(self, uow: Any) -> None:
        """Note the unit of work that a flush begins."""
        if self._is_met:
            self._uow = uow
            self._seen.clear()

    def flushed(self) -> None:
        """Forget it."""
        self._uow = None

    def before_write(
        self, base: Mapper[Any], state: State, connection_of: Callable[[State], Connection]
    ) -> None:
        """Check a row that is about to be written, and with it all others of its mappers.

        SQLAlchemy asks for the connection of each object after the foreign keys of its batch were
        set and before anything of the batch is written. What becomes due later (a row that another
        object's ``before_update`` changes) is met by its own call.

        Raises:
            StaleObjectRead: a row is not what its object was loaded from.
        """
        uow = self._uow
        if uow is None:
            return
        if base not in self._seen:
            self._seen.add(base)  # also for a new object, which may replace a deleted one
        elif not self._is_due(state):
            return
        due = [
            found
            for is_deleted in (False, True)
            for found in uow.states_for_mapper_hierarchy(base, is_deleted, False)
            if self._is_due(found)
        ]
        if state not in due and self._is_due(state):
            due.append(state)  # of a post_update
        self._verify(due, connection_of)
        transaction = _transaction(uow.session)
        verified = self._verified.setdefault(transaction, WeakSet())
        for found in due:
            _unmark(found)
            verified.add(found)

    def before_copy(
        self, states: Iterable[State | None], connection_of: Callable[[State], Connection]
    ) -> None:
        """Check objects whose values are written as they are, by ``bulk_save_objects``.

        Raises:
            StaleObjectRead: a row is not what its object was loaded from.
        """
        self._verify(self._copied(states), connection_of)

    def before_merge(
        self, states: Iterable[State], connection_of: Callable[[State], Connection]
    ) -> None:
        """Check objects whose values ``merge`` copies over what it loads from the primary.

        Nothing is locked, as merge itself locks nothing: it may turn out that nothing is written.

        Raises:
            StaleObjectRead: a row is not what its object was loaded from.
        """
        self._verify(self._copied(states), connection_of, Lock.NONE)

    def _copied(self, states: Iterable[State | None]) -> list[State]:
        if not self._checks:
            return []
        return [s for s in states if s is not None and s.key is not None and is_marked(s)]

    def rolled_back(self, transaction: Any) -> None:
        """Check again what was checked in a savepoint whose locks are gone, or in one within it."""
        for within in [t for t in self._verified if transaction in _around(t)]:
            for state in self._verified.pop(within):
                if state.runid is None:
                    state.info[_MIXED] = True
                else:
                    state.runid = ReplicaRun(state.runid)

    def ended(self, transaction: Any) -> None:
        """Forget at the end of a transaction; a savepoint ends before it is ``rolled_back``."""
        if transaction.parent is None:
            self._verified.clear()

    def _is_due(self, state: State) -> bool:
        if state.key is None or not is_marked(state):
            return False
        return self._is_deleted(state) or _is_changed(state)

    def _is_deleted(self, state: State) -> bool:
        is_deleted, _ = self._uow.states.get(state, (False, False)) if self._uow else (False, False)
        return bool(is_deleted)

    def _verify(
        self,
        states: list[State],
        connection_of: Callable[[State], Connection],
        lock: Lock | None = None,
    ) -> None:
        groups: dict[tuple[Mapper[Any], str | None], list[State]] = {}
        for state in states:
            assert state.key is not None
            groups.setdefault((state.mapper, state.key[2]), []).append(state)
        differences: list[tuple[str, tuple[Any, ...], tuple[str, ...]]] = []
        for (mapper, _), group in groups.items():
            connection = connection_of(group[0])
            remaining = iter(_sorted(group))
            while chunk := list(islice(remaining, CHUNK)):
                differences += self._differences(mapper, connection, chunk, lock)
        if differences:
            raise StaleObjectRead(tuple(differences))

    def _differences(
        self, mapper: Mapper[Any], connection: Connection, states: list[State], lock: Lock | None
    ) -> Iterator[tuple[str, tuple[Any, ...], tuple[str, ...]]]:
        loaded = {state: values for state in states if (values := dict(_loaded(state)))}
        names = tuple(sorted(set().union(*loaded.values())))
        if not names:
            return
        if lock is None:
            is_strong = any(self._is_deleted(state) or _changes_key(state) for state in loaded)
            lock = Lock.STRONG if is_strong else Lock.WEAK
        columns, width = _columns(mapper), len(mapper.primary_key)
        keys = [_identity(state) for state in loaded]
        if any(None in key for key in keys):  # a part that an outer join left empty
            one_by_one = or_(*(_equal(mapper.primary_key, key) for key in keys))
            found = connection.execute(_rows(mapper, names, lock).where(one_by_one))
        else:
            values_in = {"keys": [key for (key,) in keys] if width == 1 else keys}
            found = connection.execute(_rows_by_key(mapper, names, lock), values_in)
        rows = {tuple(row[:width]): row[width:] for row in found}
        for state, values in loaded.items():
            row = rows.get(_identity(state))
            if row is None:
                yield mapper.class_.__name__, _identity(state), ()
                continue
            now = dict(zip(names, row, strict=True))
            wrong = tuple(n for n in values if not _is_same(columns[n].type, values[n], now[n]))
            if wrong:
                yield mapper.class_.__name__, _identity(state), wrong


def listen(cls: type) -> None:
    """Follow the flushes, transactions and newcomers of a class of routed sessions."""
    event.listen(cls, "before_flush", lambda session, uow, _: session._stale.flushing(uow))
    event.listen(cls, "after_soft_rollback", lambda session, t: session._stale.rolled_back(t))
    event.listen(cls, "after_transaction_end", lambda session, t: session._stale.ended(t))
    event.listen(cls, "detached_to_persistent", _attached)


def _cascade(state: State) -> Iterator[Any]:
    return state.mapper.cascade_iterator("merge", state)


def _attached(session: Any, instance: Any) -> None:
    if is_marked(sa_inspect(instance)):
        session._stale.meet()


def _info(state: State) -> Mapping[Any, Any]:
    found: Mapping[Any, Any] = state.__dict__.get("info", {})  # as state.info, which would make one
    return found


def _unmark(state: State) -> None:
    if state.runid is not None:
        state.runid = int(state.runid)
    if _info(state):
        state.info.pop(_MIXED, None)
        state.info.pop(_KEPT, None)


def _transaction(session: Any) -> Any:
    """Return what holds the locks taken now: the innermost savepoint, else the transaction."""
    return session.get_nested_transaction() or session.get_transaction()


def _around(transaction: Any) -> Iterator[Any]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


_columns_of: WeakKeyDictionary[Mapper[Any], dict[str, Column[Any]]] = WeakKeyDictionary()


def _columns(mapper: Mapper[Any]) -> dict[str, Column[Any]]:
    """Return the columns that are in the mapper's tables, by attribute; not its expressions."""
    found = _columns_of.get(mapper)
    if found is None:
        stored = mapper.persist_selectable.c
        found = _columns_of[mapper] = {
            prop.key: column
            for prop in mapper.column_attrs
            if isinstance(column := prop.columns[0], Column) and stored.contains_column(column)
        }
    return found


def _is_changed(state: State) -> bool:
    """Say if the object's row is UPDATEd, or may be by what listens to ``before_update``."""
    if state.mapper.dispatch.before_update:
        return True
    for name in _columns(state.mapper).keys() & state.committed_state.keys():
        history = state.get_history(name, PASSIVE_NO_INITIALIZE)
        if history.added or history.deleted:
            return True
    return False


def _changes_key(state: State) -> bool:
    mapper = state.mapper
    return any(
        mapper.get_property_by_column(column).key in state.committed_state
        for column in mapper.primary_key
    )


def _loaded(state: State) -> Iterator[tuple[str, Any]]:
    """Yield the column values that the object was loaded with, as far as they are known."""
    kept = _info(state).get(_KEPT, {})
    for name in _columns(state.mapper):
        if name in kept:
            yield name, pickle.loads(kept[name])
        elif name in state.committed_state:
            value = state.committed_state[name]
            if not isinstance(value, LoaderCallableStatus):
                yield name, value
        elif name in state.dict:
            yield name, state.dict[name]


def _identity(state: State) -> tuple[Any, ...]:
    assert state.key is not None
    return tuple(state.key[1])


def _sorted(states: list[State]) -> list[State]:
    """Return them by primary key, so that two flushes lock in one order."""
    try:
        return sorted(states, key=_identity)
    except TypeError:  # SQLAlchemy says so itself where it matters
        return states


def _rows(mapper: Mapper[Any], names: tuple[str, ...], lock: Lock) -> Any:
    """Return the statement that reads and locks rows, as yet all of them."""
    keys, selectable = mapper.primary_key, mapper.persist_selectable
    columns = _columns(mapper)
    found = (
        select(*keys, *(columns[name] for name in names)).select_from(selectable).order_by(*keys)
    )
    if lock is Lock.NONE:
        return found
    return found.with_for_update(key_share=lock is Lock.WEAK, of=_locked(selectable))


_made: WeakKeyDictionary[Mapper[Any], dict[Any, Any]] = WeakKeyDictionary()


def _rows_by_key(mapper: Mapper[Any], names: tuple[str, ...], lock: Lock) -> Any:
    """Return the statement that reads and locks the rows of ``:keys``, made once."""
    made = _made.setdefault(mapper, {})
    if (names, lock) not in made:
        if len(made) >= _SHAPES:
            made.clear()
        keys = mapper.primary_key
        key: Any = keys[0] if len(keys) == 1 else tuple_(*keys)
        wanted = key.in_(bindparam("keys", expanding=True))
        made[names, lock] = _rows(mapper, names, lock).where(wanted)
    return made[names, lock]


def _equal(keys: tuple[Any, ...], identity: tuple[Any, ...]) -> Any:
    first, *others = (k.is_not_distinct_from(v) for k, v in zip(keys, identity, strict=True))
    for other in others:
        first = first & other
    return first


def _locked(selectable: Any) -> list[Any] | None:
    """Return the tables whose rows are locked; None for all.

    PostgreSQL refuses to lock the side of an outer join that may be empty.
    """
    outer = isinstance(selectable, Join) and not _is_inner(selectable)
    return list(_never_empty(selectable)) or None if outer else None


def _is_inner(selectable: Any) -> bool:
    if not isinstance(selectable, Join):
        return True
    is_outer = selectable.isouter or selectable.full
    return not is_outer and _is_inner(selectable.left) and _is_inner(selectable.right)


def _never_empty(selectable: Any) -> Iterator[Any]:
    if not isinstance(selectable, Join):
        yield selectable
    elif not selectable.full:
        yield from _never_empty(selectable.left)
        if not selectable.isouter:
            yield from _never_empty(selectable.right)


def _is_same(kind: Any, one: Any, other: Any) -> bool:
    """Say if two values of a column are the same, NaN and objects without ``==`` included."""
    if one is None or other is None:
        return one is other
    try:
        if kind.compare_values(one, other):
            return True
    except Exception:  # == of an array type gives no bool, for one
        pass
    pickled = _pickled(one)
    return pickled is not None and pickled == _pickled(other)


_PLAIN: tuple[type[Any], ...] = (dict, list, set)


def _pickled(value: Any) -> bytes | None:
    """Return a value as bytes; a mutable container of SQLAlchemy's as the plain one it wraps."""
    if type(value) not in _PLAIN:
        for plain in _PLAIN:
            if isinstance(value, plain):
                value = plain(value)
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:  # whatever the application's own classes raise
        return None


# what the loads say, of every class that is mapped


def _refreshed(state: State, context: Any, attributes: Iterable[str] | None) -> None:
    """Note who filled an object that was there already; ``attributes`` is None for all of it."""
    if type(getattr(context, "runid", None)) is ReplicaRun:
        if type(state.runid) is not ReplicaRun:
            state.info[_MIXED] = True
    elif is_marked(state) and context is not None:
        others = _columns(state.mapper).keys() & state.dict.keys()
        if attributes is None or not others.difference(attributes):
            if type(state.runid) is ReplicaRun:
                state.runid = int(state.runid)
            state.info.pop(_MIXED, None)


_ATOMS: frozenset[type] = frozenset({type(None), str, bytes, int, float, bool})

_watched: WeakSet[Mapper[Any]] = WeakSet()


def _watch() -> None:
    """Have the values kept that can be changed in place, of each class that may have some."""
    for registry in mapperlib._all_registries():
        # not registry.mappers, which raises for a class whose mapping has failed half way
        mappers = [manager.mapper for manager in list(registry._managers) if manager.is_mapped]
        for mapper in mappers:
            if mapper.configured and mapper not in _watched:
                _watched.add(mapper)
                _watch_class(mapper)


def _watch_class(mapper: Mapper[Any]) -> None:
    columns = _columns(mapper)
    if mapper.class_manager.dispatch.load:  # sqlalchemy.ext.mutable wraps values of any type there
        names = frozenset(columns)
    else:
        names = frozenset(n for n, column in columns.items() if _may_be_mutable(column.type))
    if not names:
        return

    def loaded(state: State, context: Any) -> None:
        if type(getattr(context, "runid", None)) is ReplicaRun:
            _keep(state, names)

    def refreshed(state: State, context: Any, attributes: Iterable[str] | None) -> None:
        concerned = names if attributes is None else names.intersection(attributes)
        kept = _info(state).get(_KEPT)
        if kept:
            for name in concerned:
                kept.pop(name, None)
        if type(getattr(context, "runid", None)) is ReplicaRun:
            _keep(state, concerned)

    event.listen(mapper.class_, "load", loaded, raw=True)
    event.listen(mapper.class_, "refresh", refreshed, raw=True)


def _may_be_mutable(kind: Any) -> bool:
    return isinstance(kind, TypeDecorator) or not kind.hashable


def _keep(state: State, names: Iterable[str]) -> None:
    values, kept = state.dict, {}
    for name in names:
        value = values.get(name)
        if type(value) not in _ATOMS and (pickled := _pickled(value)) is not None:
            kept[name] = pickled
    if kept:
        state.info.setdefault(_KEPT, {}).update(kept)


event.listen(Mapper, "refresh", _refreshed, raw=True)
event.listen(Mapper, "after_configured", _watch)
_watch()
