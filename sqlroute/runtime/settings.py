"""Settings that travel: run-time parameters that every connection of a session is given.

Row-level security often hangs on one, so a connection that misses it shows other people's rows.
They are set for a transaction only (``set_config(..., true)``), so that the server itself undoes
them before the connection serves somebody else, also when this process dies in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

from sqlroute.errors import PlanError, SettingRefused

UNSETTLED = "sqlroute.unsettled"
"""Set in a connection's ``info`` when a savepoint was rolled back, by whomever."""

_NONE: Mapping[str, str] = MappingProxyType({})

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
    if not isinstance(settings, Mapping):
        raise SettingRefused(f"settings are names with values, not {settings!r:.80}")
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
    if isinstance(value, str) and "\0" not in value and _is_unicode(value):
        return value
    raise SettingRefused(
        f"setting {name} has a value of type {type(value).__name__}; it must be text without NUL, "
        "a number or a bool"
    )


def _is_unicode(text: str) -> bool:
    """Say if a text has no half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class Wish:
    """The settings of one call, which hold for a block or, if it is none, for the session."""

    __slots__ = ("is_block", "values")

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values
        self.is_block = False


class Settings:
    """What one session wants its connections to have, and what they have been given.

    Attributes:
        wanted: by name; a new value with each change.
    """

    __slots__ = ("_before", "_given", "_wishes", "wanted")

    def __init__(self) -> None:
        self.wanted: Mapping[str, str] = _NONE
        self._wishes: list[Wish] = []
        self._given: dict[Any, dict[str, str | None]] = {}
        self._before: dict[Any, dict[str, str]] = {}

    @property
    def is_needed(self) -> bool:
        """Whether a connection of the transaction may need to be given or taken something."""
        return bool(self.wanted or self._given)

    def want(self, settings: Mapping[str, Any]) -> Block:
        """Add to what is wanted.

        Returns:
            A context manager that takes it back.

        Raises:
            SettingRefused: a setting that sessions may not carry.
        """
        wish = Wish(checked(settings))
        if len(self._wishes) > 1 and not any(w.is_block for w in self._wishes[-2:]):
            self._wishes[-2:] = [Wish({**self._wishes[-2].values, **self._wishes[-1].values})]
        self._wishes.append(wish)
        self._merge()
        return Block(self, wish)

    def take_back(self, wish: Wish) -> None:
        """Forget one wish; later ones stay."""
        self._wishes = [kept for kept in self._wishes if kept is not wish]
        self._merge()

    def _merge(self) -> None:
        merged = {name: value for wish in self._wishes for name, value in wish.values.items()}
        self.wanted = MappingProxyType(merged)

    def give(self, connection: Any) -> None:
        """Bring a connection of the transaction up to what is wanted, if it is not.

        Args:
            connection: a SQLAlchemy connection.

        Raises:
            PlanError: its isolation level is AUTOCOMMIT, in which nothing is undone.
        """
        if connection.info.pop(UNSETTLED, False):
            self.unsettled()
        given, wanted = self._given.get(connection, {}), self.wanted
        if given == wanted:
            return
        if connection.connection.driver_connection.autocommit:
            raise PlanError(
                "settings need a transaction, and the session's isolation level is AUTOCOMMIT; "
                "leave one of them out"
            )
        before = self._before.setdefault(connection, {})
        new = [name for name in wanted if name not in before]
        if new:
            found = connection.exec_driver_sql(*_current(new)).one()
            before.update(zip(new, found, strict=True))
        changed = {**{name: before[name] for name in given if name not in wanted}, **wanted}
        connection.exec_driver_sql(*_in_transaction(changed))
        self._given[connection] = dict(wanted)

    def unsettled(self) -> None:
        """After a savepoint: what it has set may have gone with it, or come back."""
        self._given = {
            connection: dict.fromkeys(names) for connection, names in self._before.items()
        }

    def ended(self) -> None:
        """After the transaction: the server has undone all of it."""
        self._given.clear()
        self._before.clear()


class Block:
    """What :meth:`Settings.want` returns."""

    def __init__(self, settings: Settings, wish: Wish) -> None:
        self._settings = settings
        self._wish = wish

    def __enter__(self) -> None:
        self._wish.is_block = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._settings.take_back(self._wish)


def with_begin(settings: Mapping[str, str]) -> str:
    """Return one simple query that begins a read-only transaction and sets them, one round trip."""
    return f"BEGIN READ ONLY; {set_locally(settings).replace('%', '%%')}"  # for the driver


def set_locally(settings: Mapping[str, str]) -> str:
    """Return the command that sets them in the transaction under way, for libpq itself."""
    calls = ", ".join(
        f"set_config({literal(name)}, {literal(value)}, true)" for name, value in settings.items()
    )
    return f"SELECT {calls}"


def _in_transaction(settings: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return the statement that sets them in the transaction under way, and its parameters."""
    calls = ", ".join("set_config(%s, %s, true)" for _ in settings)
    return f"SELECT {calls}", tuple(text for pair in settings.items() for text in pair)


def _current(names: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return the statement that asks for the values in force, and its parameters."""
    calls = ", ".join("coalesce(current_setting(%s, true), '')" for _ in names)
    return f"SELECT {calls}", tuple(names)


def literal(text: str) -> str:
    """Quote a text, whatever standard_conforming_strings is."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"
