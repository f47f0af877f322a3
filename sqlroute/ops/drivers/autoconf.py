"""The text of ``postgresql.auto.conf``: what it sets, and how it is changed. Pure.

PostgreSQL takes the last line of a name; so do these. Lines of other names and comments stay as
they are. The file is only edited while its server is down, else ``ALTER SYSTEM`` is the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sqlroute.ops.fences import (
    PREFIX,
    is_synchronous_fence,
    synchronous_unfenced,
    unfenced,
)

_LINE = re.compile(
    r"^[ \t]*([A-Za-z_][\w.$]*)[ \t]*(?:=[ \t]*|[ \t])('(?:[^'\\]|''|\\.)*'|[^\s#']+)"
)


def values(text: str) -> dict[str, str]:
    """Return what the text sets, names in lower case, values without quotes."""
    found = (_LINE.match(line) for line in text.splitlines())
    return {match[1].lower(): _plain(match[2]) for match in found if match}


def changed(text: str, settings: Mapping[str, str | None]) -> str:
    """Return the text with other settings; ``None`` removes one."""
    kept = [line for line in text.splitlines() if _name(line) not in settings]
    new = [f"{name} = {quoted(value)}" for name, value in settings.items() if value is not None]
    return "".join(f"{line}\n" for line in (*kept, *new))


def without_fence(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the text without any fence, and the names of the settings that were one.

    ``default_transaction_read_only = on`` is taken for one (L1): nothing else sets it by ``ALTER
    SYSTEM`` for a whole server, and a primary with it would refuse every write.
    """
    found = values(text)
    removed: dict[str, str | None] = {}
    libraries = found.get("session_preload_libraries", "")
    if PREFIX in libraries:
        removed["session_preload_libraries"] = unfenced(libraries) or None
    names = found.get("synchronous_standby_names", "")
    if is_synchronous_fence(names):
        removed["synchronous_standby_names"] = synchronous_unfenced(names) or None
    if found.get("default_transaction_read_only", "").lower() in ("on", "true", "yes", "1"):
        removed["default_transaction_read_only"] = None
    return (changed(text, removed), tuple(removed)) if removed else (text, ())


def as_standby(text: str, primary_conninfo: str, slot: str | None) -> str:
    """Return the text for a standby of that primary, without recovery targets.

    The slot is set to nothing, not removed, where there is none: ``postgresql.conf`` may name one.
    """
    gone: dict[str, str | None] = {
        name: None for name in values(text) if name.startswith("recovery_target")
    }
    own = {"primary_conninfo": primary_conninfo, "primary_slot_name": slot or ""}
    return changed(text, {**gone, **own})


def quoted(value: str) -> str:
    """Return a value as the file has it.

    Raises:
        ValueError: it has a line break, which the file cannot hold.
    """
    if "\n" in value or "\r" in value:
        raise ValueError("a setting of PostgreSQL cannot hold a line break")
    inner = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{inner}'"


def _name(line: str) -> str:
    found = _LINE.match(line)
    return found[1].lower() if found else ""


def _plain(value: str) -> str:
    if not value.startswith("'"):
        return value
    return re.sub(r"''|\\(.)", lambda found: found[1] or "'", value[1:-1])
