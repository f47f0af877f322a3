"""What commands have in common: their configuration, and the question before something changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqlroute.cli.output import Output, Refused

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sqlroute.cli.output import Document
    from sqlroute.config import Settings


def _want_json(context: typer.Context, value: bool) -> bool:
    context.obj.json = value
    return value


Config = Annotated[
    Path | None,
    typer.Option("--config", help="Default: $SQLROUTE_CONFIG, else ./sqlroute.toml."),
]
Json = Annotated[
    bool,
    typer.Option("--json", callback=_want_json, is_eager=True, help="One document on stdout."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def read_settings(source: Path | dict[str, Any] | None, output: Output) -> Settings:
    """Read the configuration; its passwords are shown nowhere."""
    from sqlroute.config import load

    settings = load(source)
    secrets = [node.password for node in settings.topology.nodes()]
    secrets.append(settings.operations.operator.password)
    output.hide(secret.reveal() for secret in secrets if secret is not None)
    return settings


def confirm(what: str, yes: bool, output: Output) -> None:
    """Ask before something is changed.

    Raises:
        Refused: nobody said yes.
    """
    if yes:
        return
    if output.json or not sys.stdin.isatty():
        raise Refused(f"this would {what}; say --yes if that is meant")
    if not typer.confirm(f"This will {what}. Go on?", err=True):
        raise Refused("nothing was done")


def agreement(
    output: Output, yes: bool, what: str, draw: Callable[[Document], RenderableType]
) -> Callable[[Any], None]:
    """Return what shows a plan to a human and asks whether it is to be done."""

    def agree(plan: Any) -> None:
        if not output.json:
            output.console.print(draw(plan.document()))
        confirm(what, yes, output)

    return agree
