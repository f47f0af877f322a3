"""What a session has seen, as a value that travels: to the next request, a job, another process.

A token is one :class:`Position` per shard. Whoever follows it never reads a state from before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

from sqlroute.errors import InvalidToken, PlanError


@dataclass(frozen=True, slots=True)
class Position:
    """A state of one shard.

    Attributes:
        shard: name of the shard.
        epoch: of the shard map when it was seen, 0 without a map.
        timeline: of the node that showed it, 0 when it was not known.
        lsn: WAL position as an integer number of bytes.
        cluster: PostgreSQL's system identifier of the shard, 0 when it was not known.
    """

    shard: str
    epoch: int
    timeline: int
    lsn: int
    cluster: int = 0

    def __str__(self) -> str:
        text = f"{_quoted(self.shard)}@{self.epoch}.{self.timeline}.{format_lsn(self.lsn)}"
        return f"{text}.{self.cluster:x}" if self.cluster else text


_quoted = lru_cache(maxsize=4096)(quote)


def newest(old: Position, new: Position) -> Position:
    """Return the position that demands more; of an unknown timeline, all that either demands."""
    if old.timeline and new.timeline:
        timeline, lsn = max((old.timeline, old.lsn), (new.timeline, new.lsn))
    else:
        timeline, lsn = max(old.timeline, new.timeline), max(old.lsn, new.lsn)
    epoch, cluster = max(old.epoch, new.epoch), new.cluster or old.cluster
    return Position(new.shard, epoch, timeline, lsn, cluster)


_POSITION = re.compile(
    r"([A-Za-z0-9_.~%-]{1,800})@([0-9]{1,19})\.([0-9]{1,10})\.([0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8})"
    r"(?:\.([0-9a-f]{1,16}))?",
    re.ASCII,
)
_LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
_LONGEST = 65_536


@dataclass(frozen=True, slots=True)
class Token:
    """What a session has seen of each shard; false when it has seen nothing.

    Its text, ``s0@7.1.0/16B3748.65f1c2d3e4b5a697``, is made of letters that cookies, headers and
    URLs may hold, one part per shard joined by ``+``: shard, epoch of the shard map, timeline, LSN
    and the system identifier of the cluster.
    """

    positions: tuple[Position, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Token:
        """Return the token that ``str(token)`` wrote.

        Raises:
            InvalidToken: the text is none.
        """
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise InvalidToken(f"a token is a text of at most {_LONGEST} letters, as str(token)")
        positions: dict[str, Position] = {}
        for part in text.split("+") if text else ():
            match = _POSITION.fullmatch(part)
            if match is None:
                raise InvalidToken(
                    f"{part[:80]!r} is no part of a token; it looks like s0@7.1.0/16B3748"
                )
            shard, epoch, timeline, lsn, cluster = match.groups()
            shard = unquote(shard)
            if shard in positions:
                raise InvalidToken(f"shard {shard!r} stands twice in the token")
            positions[shard] = Position(
                shard, int(epoch), int(timeline), parse_lsn(lsn), int(cluster or "0", 16)
            )
        return cls(tuple(sorted(positions.values(), key=lambda position: position.shard)))

    def of(self, shard: str) -> Position | None:
        """Return what was seen of a shard, ``None`` for nothing."""
        return next((p for p in self.positions if p.shard == shard), None)

    def __or__(self, other: Token) -> Token:
        """Return the token of whoever has seen both."""
        if not isinstance(other, Token):
            return NotImplemented
        found = {position.shard: position for position in self.positions}
        for position in other.positions:
            known = found.get(position.shard)
            found[position.shard] = position if known is None else newest(known, position)
        return Token(tuple(found[shard] for shard in sorted(found)))

    def __bool__(self) -> bool:
        return bool(self.positions)

    def __str__(self) -> str:
        return "+".join(map(str, self.positions))


def format_lsn(lsn: int) -> str:
    """Return a WAL position as PostgreSQL writes it, ``0/16B3748``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Return the WAL position written in ``text``.

    Raises:
        PlanError: the text is no WAL position.
    """
    if _LSN.fullmatch(text) is None:
        raise PlanError(f"{text!r} is no WAL position; it looks like 0/16B3748")
    high, low = text.split("/")
    return (int(high, 16) << 32) | int(low, 16)
