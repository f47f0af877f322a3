"""What one session has seen and done: the facts that bind its next statement to a node.

A value; a change is a new value. It never knows a connection, only names and positions in the WAL.
Tuples, because each transaction makes several, and a frozen dataclass takes three times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from sqlroute.routing.token import Position, Token, newest


class ShardAffinity(NamedTuple):
    """One session's ties to one shard.

    Attributes:
        nodes: those that have answered, where what they showed may be newer than the token, each
            with its life (:class:`sqlroute.health.Observation`). Nobody knows how new; so a session
            stays with the one it reads from, and leaves it only for one that has passed a position
            observed on it afterwards (:class:`sqlroute.routing.target.Unproven`). More than one
            after reads that asked for no such proof.
        pinned: the node on which the transaction under way is open, if it is.
        token: the newest state the session is known to have seen.
    """

    nodes: frozenset[tuple[str, int]] = frozenset()
    pinned: str | None = None
    token: Position | None = None


NOTHING = ShardAffinity()
_NOBODY: frozenset[tuple[str, int]] = frozenset()
_NO_TIES: Mapping[str, ShardAffinity] = MappingProxyType({})


class Affinity(NamedTuple):
    """All ties of one session.

    Attributes:
        explicit: the transaction under way was begun by ``session.begin()``: it is a primary one.
        read_only: it was begun by ``session.begin(read_only=True)``: it is open on replicas.
        setting: the shard on whose connection a ``SET`` was sent by hand in this transaction.
        epoch: the highest epoch of all tokens.
        last: the shard that the transaction under way used last.
    """

    shards: Mapping[str, ShardAffinity] = _NO_TIES
    explicit: bool = False
    read_only: bool = False
    setting: str | None = None
    epoch: int = 0
    last: str | None = None

    def of(self, shard: str) -> ShardAffinity:
        return self.shards.get(shard, NOTHING)

    @property
    def token(self) -> Token:
        """What is known to have been seen; of a shard with ``nodes`` there may be more."""
        found = [tie.token for tie in self.shards.values() if tie.token is not None]
        return Token(tuple(sorted(found, key=lambda position: position.shard)))

    def reading(self, shard: str, node: str, life: int = 0, *, proved: bool = True) -> Affinity:
        """After a read outside of a transaction.

        Args:
            proved: the node was known to have all that the session had seen.
        """
        tie = self.of(shard)
        nodes = only = _only(node, life)
        if not proved and tie.nodes:
            nodes = tie.nodes | only
        if nodes == tie.nodes:
            return self if self.last == shard else self._replace(last=shard)
        return self._with(shard, ShardAffinity(nodes, tie.pinned, tie.token), self.epoch, shard)

    def pinned(self, shard: str, node: str, life: int = 0, *, proved: bool = True) -> Affinity:
        """After a node was enlisted: what the transaction does on this shard, it does there."""
        tie = self.of(shard)
        if tie.pinned == node:
            return self
        nodes = _only(node, life) if proved else tie.nodes | _only(node, life)
        return self._with(shard, ShardAffinity(nodes, node, tie.token), self.epoch, shard)

    def seen(self, position: Position) -> Affinity:
        """After a position became known to the session. A token never moves back."""
        tie = self.of(position.shard)
        return self._seen(position, tie, tie.nodes)

    def committed(self, position: Position) -> Affinity:
        """After a commit, whose position covers all that the transaction has read, too."""
        return self._seen(position, self.of(position.shard), _NOBODY)

    def _seen(
        self, position: Position, tie: ShardAffinity, nodes: frozenset[tuple[str, int]]
    ) -> Affinity:
        found = position if tie.token is None else newest(tie.token, position)
        if found == tie.token and nodes == tie.nodes:
            return self
        epoch = max(self.epoch, position.epoch)
        return self._with(position.shard, ShardAffinity(nodes, tie.pinned, found), epoch, self.last)

    def begun(self, *, read_only: bool = False) -> Affinity:
        return self._replace(explicit=True, read_only=read_only)

    def set_by_hand(self, shard: str) -> Affinity:
        return self._replace(setting=shard)

    def ended(self) -> Affinity:
        """After the transaction: what was seen remains."""
        kept = {
            shard: ShardAffinity(tie.nodes, None, tie.token) if tie.pinned is not None else tie
            for shard, tie in self.shards.items()
        }
        return Affinity(MappingProxyType(kept), epoch=self.epoch)

    def _with(self, shard: str, tie: ShardAffinity, epoch: int, last: str | None) -> Affinity:
        shards = MappingProxyType({**self.shards, shard: tie})
        return Affinity(shards, self.explicit, self.read_only, self.setting, epoch, last)


_only = lru_cache(maxsize=4096)(lambda node, life: frozenset({(node, life)}))
