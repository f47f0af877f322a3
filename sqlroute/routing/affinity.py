"""What one session has seen and done: the facts that bind its next statement to a node.

A value; a change is a new value. It never knows a connection, only names and positions in the WAL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sqlroute.errors import PlanError


@dataclass(frozen=True, slots=True)
class Token:
    """What a session has seen of a shard: it must never read a state from before it.

    Attributes:
        shard: name of the shard.
        epoch: of the shard map when the token was made, 0 without a map.
        timeline: of the primary that acknowledged, 0 when it was not known.
        lsn: WAL position as an integer number of bytes.
    """

    shard: str
    epoch: int
    timeline: int
    lsn: int

    def __str__(self) -> str:
        return f"{self.shard}@{self.epoch}.{self.timeline}.{format_lsn(self.lsn)}"


@dataclass(frozen=True, slots=True)
class ShardAffinity:
    """One session's ties to one shard.

    Attributes:
        replica: the node that serves the reads of the transaction under way, if one was chosen.
        pinned: the transaction under way is open on the primary, so its reads go there.
        token: the newest state the session has seen; survives the transaction.
    """

    replica: str | None = None
    pinned: bool = False
    token: Token | None = None


NOTHING = ShardAffinity()
_NO_TIES: Mapping[str, ShardAffinity] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Affinity:
    """All ties of one session.

    Attributes:
        explicit: the transaction under way was begun by ``session.begin()``: it is a primary one.
    """

    shards: Mapping[str, ShardAffinity] = field(default_factory=lambda: _NO_TIES)
    explicit: bool = False

    def of(self, shard: str) -> ShardAffinity:
        return self.shards.get(shard, NOTHING)

    def reading(self, shard: str, node: str) -> Affinity:
        """After a read: the transaction stays with this replica."""
        tie = self.of(shard)
        if tie.replica == node:
            return self
        return self._with(shard, replace(tie, replica=node))

    def pinned(self, shard: str) -> Affinity:
        """After the primary was enlisted: the transaction's reads of this shard go to it."""
        tie = self.of(shard)
        if tie.pinned:
            return self
        return self._with(shard, replace(tie, pinned=True))

    def committed(self, token: Token) -> Affinity:
        """After a commit: later reads must have replayed it. A token never moves back."""
        tie = self.of(token.shard)
        newest = token if tie.token is None else _newest(tie.token, token)
        if newest == tie.token:
            return self
        return self._with(token.shard, replace(tie, token=newest))

    def begun(self) -> Affinity:
        return replace(self, explicit=True)

    def ended(self) -> Affinity:
        """After the transaction: only the tokens remain."""
        kept = {
            shard: ShardAffinity(token=tie.token)
            for shard, tie in self.shards.items()
            if tie.token is not None
        }
        return Affinity(MappingProxyType(kept))

    def _with(self, shard: str, tie: ShardAffinity) -> Affinity:
        return replace(self, shards=MappingProxyType({**self.shards, shard: tie}))


def _newest(old: Token, new: Token) -> Token:
    """Return the token that demands more; of an unknown timeline, all that either demands."""
    if old.timeline and new.timeline:
        return max(old, new, key=lambda token: (token.timeline, token.lsn))
    return replace(new, timeline=max(old.timeline, new.timeline), lsn=max(old.lsn, new.lsn))


def format_lsn(lsn: int) -> str:
    """Return a WAL position as PostgreSQL writes it, ``0/16B3748``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Return the WAL position written in ``text``.

    Raises:
        PlanError: the text is no WAL position.
    """
    if re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", text) is None:
        raise PlanError(f"{text!r} is no WAL position; it looks like 0/16B3748")
    high, low = text.split("/")
    return (int(high, 16) << 32) | int(low, 16)
