"""Fences: what keeps clients from writing to a server that is no primary any more.

Pure. How far each level holds, by what was seen with a client that does all it may to go on writing
(docs/explanation of promotion): L1 is a courtesy, since any client may turn
``default_transaction_read_only`` off again; under L2 its commits do not return, unless it asks for
``synchronous_commit = local``; L3 refuses every new ordinary session and ends the old ones; only
L4 and L5 also stop superusers and what runs inside the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum

PREFIX = "sqlroute_fence_epoch_"
"""A library that nobody has: a session that must load it cannot begin, and its error names it."""

SYNCHRONOUS = "sqlroute_fence"
"""Begins the name of a standby that nobody has, for which commits wait; the rest of the name is
what ``synchronous_standby_names`` was before, in hexadecimal, so that it can be given back."""

NO_FENCE = "-c session_preload_libraries= -c default_transaction_read_only=off"
"""Options of a session: with them a superuser passes the fences L1 and L3, on purpose; no ordinary
role may set that."""


class Level(IntEnum):
    """How strong a fence is."""

    NONE = 0
    L1 = 1
    """New transactions are read-only, unless the client says otherwise."""
    L2 = 2
    """Commits wait for a standby that does not exist, besides."""
    L3 = 3
    """No new ordinary session; the old ones were ended. Survives a restart."""
    L4 = 4
    """The server is stopped, and that was seen."""
    L5 = 5
    """The user's own hook has fenced it."""

    @classmethod
    def named(cls, text: str) -> Level:
        """Return a level by its name.

        Raises:
            ValueError: there is none of that name.
        """
        found = cls.__members__.get(text.upper())
        if found is None or found is cls.NONE:
            raise ValueError(f"unknown fence level {text!r}; known: L1, L2, L3, L4, L5")
        return found


def fence_name(epoch: int) -> str:
    return f"{PREFIX}{epoch}"


def epoch_of(libraries: str) -> int | None:
    """Return the epoch that a fence in ``session_preload_libraries`` ends, ``None`` without one."""
    found = re.search(rf"\b{PREFIX}(\d+)\b", libraries)
    return int(found[1]) if found else None


def fenced(libraries: str, epoch: int) -> str:
    """Return ``session_preload_libraries`` with a fence first; any earlier fence is replaced."""
    return ", ".join((fence_name(epoch), *_others(libraries)))


def unfenced(libraries: str) -> str:
    """Return ``session_preload_libraries`` without any fence."""
    return ", ".join(_others(libraries))


def synchronous_fenced(names: str) -> str:
    """Return ``synchronous_standby_names`` that no set of standbys can satisfy."""
    if is_synchronous_fence(names):
        return names
    return f"{SYNCHRONOUS}_{names.encode().hex()}"


def synchronous_unfenced(names: str) -> str:
    """Return ``synchronous_standby_names`` as it was before its fence."""
    if not is_synchronous_fence(names):
        return names
    return bytes.fromhex(names.removeprefix(SYNCHRONOUS).lstrip("_")).decode()


def is_synchronous_fence(names: str) -> bool:
    return re.fullmatch(rf"{SYNCHRONOUS}(_([0-9a-f]{{2}})*)?", names) is not None


def is_fence_error(text: str) -> bool:
    """Say if the text of a refused connection is that of a fence."""
    return PREFIX in text


def _others(libraries: str) -> Iterable[str]:
    names = (name.strip() for name in libraries.split(","))
    return [name for name in names if name and not name.strip('"').startswith(PREFIX)]
