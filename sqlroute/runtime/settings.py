"""Settings that travel: run-time parameters that every connection of a session is given.

Row-level security often hangs on one, so a connection that misses it shows other people's rows.
They are set for a transaction only (``set_config(..., true)``), so that the server itself undoes
them before the connection serves somebody else, also when this process dies in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlroute.errors import SettingRefused

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*", re.ASCII)

_ROUTING = "routing decides it; use session.begin(read_only=..., isolation_level=...)"
_DRIVER = "psycopg depends on it"
_REFUSED = {
    "transaction_read_only": _ROUTING,
    "default_transaction_read_only": _ROUTING,
    "transaction_isolation": _ROUTING,
    "default_transaction_isolation": _ROUTING,
    "transaction_deferrable": _ROUTING,
    "default_transaction_deferrable": _ROUTING,
    "client_encoding": _DRIVER,
    "standard_conforming_strings": _DRIVER,
    "session_authorization": "it outlives the transaction; use role",
    "is_superuser": "the server sets it",
}


def checked(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as PostgreSQL takes them, names in lower case.

    Raises:
        SettingRefused: a name is none, a value has no text, or routing depends on the setting.
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise SettingRefused(f"{name!r} is no name of a setting; it looks like app.tenant")
        if (why := _REFUSED.get(name.lower())) is not None:
            raise SettingRefused(f"setting {name} may not be carried by a session: {why}")
        found[name.lower()] = _text(name, value)
    return found


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str) and "\0" not in value:
        return value
    raise SettingRefused(
        f"setting {name} has a value of type {type(value).__name__}; it must be text without NUL, "
        "a number or a bool"
    )


def in_transaction(settings: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return the statement that sets them in the transaction under way, and its parameters."""
    calls = ", ".join("set_config(%s, %s, true)" for _ in settings)
    return f"SELECT {calls}", tuple(text for pair in settings.items() for text in pair)


def with_begin(settings: Mapping[str, str]) -> str:
    """Return one simple query that begins a read-only transaction and sets them, one round trip."""
    calls = ", ".join(
        f"set_config({_literal(name)}, {_literal(value)}, true)" for name, value in settings.items()
    )
    return f"BEGIN READ ONLY; SELECT {calls}"


def current(names: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return the statement that asks for the values in force, and its parameters."""
    calls = ", ".join("coalesce(current_setting(%s, true), '')" for _ in names)
    return f"SELECT {calls}", tuple(names)


def _literal(text: str) -> str:
    """Quote a text: % doubled for the driver, backslashes as they are (strings conform)."""
    return "'" + text.replace("'", "''").replace("%", "%%") + "'"
