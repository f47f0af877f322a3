"""``synchronous_standby_names``: who must have a commit before it returns, and what that proves.

Pure. With ``ANY k (n names)``, and likewise with ``FIRST k``, each acknowledged commit was flushed
by k of the n: so of any ``n - k + 1`` of them at least one has it, and the one that has received
most has them all.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_FORM = re.compile(
    r"\s*(?:(?:(?P<method>any|first)\s+)?(?P<number>\d+)\s*\((?P<inner>.*)\)|(?P<plain>.*))\s*",
    re.IGNORECASE | re.DOTALL,
)
_NAME = re.compile(r'"((?:[^"]|"")+)"|([^\s,"]+)')


@dataclass(frozen=True, slots=True)
class Quorum:
    """What a primary waits for.

    Attributes:
        number: of standbys that must have flushed a commit.
        names: of them, ``*`` for any.
    """

    number: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number} of ({', '.join(self.names)})"

    def can_be_met(self, there: Collection[str]) -> bool:
        """Say if so many standbys of those that are there count."""
        if "*" in self.names:
            return len(there) >= self.number
        known = {name.lower() for name in there}
        return sum(name.lower() in known for name in self.names) >= self.number

    def needed(self, standbys: int) -> int:
        """Return how many of them must be asked to have every acknowledged commit.

        Args:
            standbys: how many there are at all, for ``*``.
        """
        count = standbys if "*" in self.names else len(self.names)
        return max(1, count - self.number + 1)

    def is_proved(self, asked: Collection[str], standbys: int) -> bool:
        """Say if those that were asked have every acknowledged commit among them."""
        if "*" in self.names:
            counted = len(asked)
        else:
            known = {name.lower() for name in asked}
            counted = sum(name.lower() in known for name in self.names)
        return counted >= self.needed(standbys)


def parsed(text: str) -> Quorum | None:
    """Return what ``synchronous_standby_names`` asks for, ``None`` for nothing."""
    found = _FORM.fullmatch(text)
    if not text.strip() or found is None:
        return None
    inner = found["inner"] if found["inner"] is not None else found["plain"]
    names = tuple(quoted.replace('""', '"') or plain for quoted, plain in _NAME.findall(inner))
    number = int(found["number"]) if found["number"] else 1
    return Quorum(number, names) if names else None
