"""Say which shard an object belongs to where its row does not: the identity maps of sessions.

A row of a reference table is on every shard, and one object: :class:`OfAllShards` keeps it under
the identity token of the shard that is written first, whichever shard it was read from.

Rows of a coordinator do not say their shard at all. The primary key of a sharded table contains its
shard key, so the key of an object says where its row is. SQLAlchemy looks for each row's object in
the identity map, and puts a new one there: both go through :class:`ByKey` while rows of a
coordinator become objects, which finds the identity token of the shard in the place of
:data:`BY_KEY`. So an object that is there already is found, and a new one is refreshed, lazily
loaded and flushed on its own shard.

SQLAlchemy internals used, checked by ``tests/unit/test_sqlalchemy_internals.py``: the attributes of
``IdentityMap``, and that loading asks it by ``get`` and ``_add_unpresent`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Mapper, class_mapper
from sqlalchemy.orm.identity import _WeakInstanceDict

from sqlroute.errors import CrossShardRefused
from sqlroute.routing.declare import Reference, declaration
from sqlroute.topology import Topology

if TYPE_CHECKING:
    from sqlroute.session import RoutingMixin

BY_KEY = "?"
"""The identity token of rows whose shard their key tells. No shard has this name."""


class WrittenFirst(dict[type, str | None]):
    """The shard that rows of a reference table are written on first, by entity; ``None`` of others.

    A dict that finds what it is asked for, since it is asked of each row that becomes an object.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __missing__(self, entity: type) -> str | None:
        found = self[entity] = self._of(class_mapper(entity))
        return found

    def _of(self, mapper: Mapper[Any]) -> str | None:
        if not is_reference(mapper):
            return None
        name = declaration(mapper.local_table).keyspace  # type: ignore[arg-type, union-attr]
        keyspace = self._topology.keyspace(name) if name else self._topology.default
        return keyspace.shard_names[0] if keyspace.is_sharded else None


class OfAllShards(_WeakInstanceDict):
    """An identity map in which rows of a reference table have one object each."""

    def __init__(self, written_first: WrittenFirst) -> None:
        super().__init__()
        self._written_first = written_first

    # both are called for each row, so they do themselves the little that super() would

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the object of a key, whichever shard its row was read from."""
        shard = self._written_first[key[0]]
        state = self._dict.get(key if shard is None else (key[0], key[1], shard))
        found = None if state is None else state.obj()
        return default if found is None else found

    def _add_unpresent(self, state: Any, key: Any) -> None:
        shard = self._written_first[key[0]]
        if shard is not None:
            key = (key[0], key[1], shard)
            state.key, state.identity_token = key, shard
        self._dict[key] = state
        state._instance_dict = self._wr


class ByKey(_WeakInstanceDict):
    """An identity map over another one's content, which fills in tokens."""

    def __init__(self, session: RoutingMixin, content: Any) -> None:
        self._dict, self._modified, self._wr = content._dict, content._modified, content._wr
        self._session = session

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the object of a key, whichever shard it is on."""
        if key[2] != BY_KEY:
            return super().get(key, default)
        if None in key[1]:  # of an outer join
            return default
        return super().get(self._of_shard(key), default)

    def _add_unpresent(self, state: Any, key: Any) -> None:
        if key[2] == BY_KEY:
            key = self._of_shard(key)
            state.key, state.identity_token = key, key[2]
        super()._add_unpresent(state, key)

    def _of_shard(self, key: Any) -> Any:
        mapper: Mapper[Any] = class_mapper(key[0])
        tokens = self._session._tokens_of(mapper, key[1])
        keys = [(key[0], key[1], token) for token in tokens]
        if len(keys) > 1:
            raise CrossShardRefused(
                f"entity {mapper.class_.__name__}",
                "its primary key does not contain the shard key, so the shard of an object that "
                "the coordinator has read is not known; select its columns instead",
            )
        return keys[0]


def is_reference(mapper: Mapper[Any]) -> bool:
    """Say whether the rows of an entity are on every shard."""
    table: Any = mapper.local_table
    return hasattr(table, "info") and isinstance(declaration(table), Reference)


@contextmanager
def tokens_by_key(session: Any) -> Iterator[None]:
    """Let objects that are loaded meanwhile under :data:`BY_KEY` have their shard's token."""
    own = session.identity_map
    session.identity_map = ByKey(session, own)
    try:
        yield
    finally:
        session.identity_map = own
