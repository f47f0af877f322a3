"""Where a command's answer goes: one JSON document on stdout, or a human's view on stderr.

A command makes a document of plain values and says how to draw it; nothing is drawn that is not in
the document. Errors become one line each, without passwords and tracebacks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Document = Mapping[str, Any]

OK = 0
FAILED = 1
USAGE = 2
UNHEALTHY = 3
RESUMABLE = 4
REFUSED = 5
INTERRUPTED = 130

_USAGE_ERRORS = ("ConfigError", "UnknownName", "InvalidShardKey")


class Refused(Exception):
    """A command would destroy something and was not told that this is meant."""


class Output:
    """One run of the command line.

    Attributes:
        json: the answer is wanted as JSON.
    """

    def __init__(self) -> None:
        self.json = False
        self._secrets: set[str] = set()
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """Rich's console on stderr, made when first drawn on."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, soft_wrap=False)
        return self._console

    def hide(self, secrets: Iterable[str]) -> None:
        """Let no text of this run show these."""
        self._secrets.update(secret for secret in secrets if secret)

    def show(self, document: Document, draw: Callable[[Document], RenderableType]) -> None:
        """Print an answer: the document, or what is drawn of it."""
        if self.json:
            sys.stdout.write(self._masked(json.dumps(document, indent=2)) + "\n")
        else:
            self.console.print(draw(document))

    def say(self, text: str) -> None:
        """Tell a human of progress; silent where JSON is wanted."""
        if not self.json:
            self.console.print(f"[dim]{_escaped(self._masked(text))}[/dim]")

    def failed(self, error: BaseException) -> int:
        """Print an error, one line per fault, and return the exit code it means."""
        lines = tuple(getattr(error, "faults", ())) or (_line(error),)
        lines = tuple(self._masked(line) for line in lines)
        if self.json:
            sys.stdout.write(json.dumps({"error": _document(error, lines)}, indent=2) + "\n")
        for line in lines:
            sys.stderr.write(f"error: {line}\n")
        if isinstance(error, Refused) or _is_a(error, "OperationRefused"):
            return REFUSED
        if getattr(error, "operation", ""):
            return RESUMABLE
        return USAGE if _is_usage(error) else FAILED

    def _masked(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def is_expected(error: BaseException) -> bool:
    """Say whether an error is told in one line; any other is a fault of the program."""
    if isinstance(error, Refused):
        return True
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, SQLAlchemyError | OSError)


def _is_usage(error: BaseException) -> bool:
    return any(_is_a(error, name) for name in _USAGE_ERRORS)


def _is_a(error: BaseException, name: str) -> bool:
    """Say if an error is of a kind of ours, without importing that."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _document(error: BaseException, lines: tuple[str, ...]) -> dict[str, Any]:
    document: dict[str, Any] = {"type": type(error).__name__, "message": "; ".join(lines)}
    if hasattr(error, "faults"):
        document["faults"] = list(lines)
    if hasattr(error, "clause"):
        document["clause"] = error.clause
    return {**document, "retryable": bool(getattr(error, "retryable", False))}


def _line(error: BaseException) -> str:
    """Return the error as one line; SQLAlchemy's add the statement and a link, which say less."""
    original = getattr(error, "orig", None)
    lines = str(original if original is not None else error).strip().splitlines()
    return " ".join(line.strip() for line in lines) if lines else type(error).__name__


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
