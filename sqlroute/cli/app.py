"""The commands and their options; what they do stands in functions imported when they run."""

# ruff: noqa: ARG001 - Typer reads the options off the signatures, and --json acts by its callback

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqlroute.cli import draw, operating
from sqlroute.cli.asking import Config, Json, Yes, confirm, read_settings
from sqlroute.cli.output import FAILED, OK, UNHEALTHY, Output

if TYPE_CHECKING:
    from sqlroute.router import Router

app = typer.Typer(
    name="sqlroute",
    help="Database routing for SQLAlchemy and PostgreSQL: read replicas, hash shards, no proxy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
local = typer.Typer(help="Real PostgreSQL servers on this machine, to try things on.")
shard = typer.Typer(help="Where keys and buckets are.")
config = typer.Typer(help="The configuration.")
catalog = typer.Typer(help="The sqlroute schema in the databases.")
two_phase = typer.Typer(help="Commits over several shards.")
coordinator = typer.Typer(help="What answers that cannot be merged: PostgreSQL over all shards.")
for group, name in (
    (local, "local"),
    (shard, "shard"),
    (config, "config"),
    (catalog, "catalog"),
    (two_phase, "2pc"),
    (coordinator, "coordinator"),
):
    app.add_typer(group, name=name, no_args_is_help=True)
operating.register(app)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"sqlroute {version('sqlroute')}")
        raise typer.Exit


Directory = Annotated[Path, typer.Option("--dir", help="Where the servers live.")]
Shards = Annotated[int | None, typer.Option("--shards", help="How many shards.  [default: 2]")]
Replicas = Annotated[
    int | None, typer.Option("--replicas", help="Replicas of each primary.  [default: 2]")
]
Port = Annotated[int | None, typer.Option("--port", help="Of the first server; the others follow.")]
PgBin = Annotated[Path | None, typer.Option("--pg-bin", help="PostgreSQL's bin directory.")]
Parameters = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="May be repeated.")
]
NoAnalyze = Annotated[
    bool, typer.Option("--no-analyze", help="Do not look at the rows for statistics.")
]
HERE = Path("sqlroute-local")


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


# Servers of this machine


@local.command("up")
def local_up(
    context: typer.Context,
    directory: Directory = HERE,
    shards: Shards = None,
    replicas: Replicas = None,
    port: Port = None,
    pg_bin: PgBin = None,
    json: Json = False,
) -> None:
    """Start the servers, building what is not built, and write their sqlroute.toml."""
    from sqlroute.cli.servers import described, spec
    from sqlroute.local.topology import up

    output: Output = context.obj
    wanted = spec(directory, shards=shards, replicas=replicas, port=port, pg_bin=pg_bin)
    output.show(described(up(wanted, output.say)), draw.local)


@local.command("down")
def local_down(
    context: typer.Context,
    directory: Directory = HERE,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the data too.")] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Stop the servers; their data stays unless --delete."""
    from sqlroute.cli.servers import stop

    if delete:
        confirm(f"delete the servers in {directory} and all their data", yes, context.obj)
    context.obj.show(stop(directory, delete=delete), draw.stopped)


@local.command("status")
def local_status(context: typer.Context, directory: Directory = HERE, json: Json = False) -> None:
    """Look at each server; exit code 3 when one does not run."""
    from sqlroute.cli.servers import local_status

    document = local_status(directory)
    context.obj.show(document, draw.local)
    raise typer.Exit(OK if document["running"] else UNHEALTHY)


@local.command("reset")
def local_reset(
    context: typer.Context,
    directory: Directory = HERE,
    shards: Shards = None,
    replicas: Replicas = None,
    port: Port = None,
    pg_bin: PgBin = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete the servers' data and start anew."""
    from sqlroute.cli.servers import described, spec
    from sqlroute.local.topology import reset

    wanted = spec(
        directory, shards=shards, replicas=replicas, port=port, pg_bin=pg_bin, is_new=True
    )
    confirm(f"delete the servers in {directory} and all their data", yes, context.obj)
    context.obj.show(described(reset(wanted, context.obj.say)), draw.local)


# A cluster


@app.command()
def status(context: typer.Context, path: Config = None, json: Json = False) -> None:
    """Show each node: role, position, lag, health; exit code 3 when something is wrong."""
    from sqlroute.cli.cluster import status

    with _router(path, context.obj) as router:
        document = status(router)
    context.obj.show(document, draw.status)
    raise typer.Exit(OK if document["healthy"] else UNHEALTHY)


@app.command()
def explain(  # noqa: PLR0913, PLR0917 - one parameter per option of the command
    context: typer.Context,
    sql: Annotated[str | None, typer.Argument(help="SQL text; needs the extra parse.")] = None,
    statement: Annotated[
        str | None, typer.Option("--statement", metavar="MODULE:NAME", help="Of SQLAlchemy.")
    ] = None,
    parameters: Parameters = None,
    consistency: Annotated[str | None, typer.Option(help="Of the session.")] = None,
    intent: Annotated[str | None, typer.Option(help="Of the session.")] = None,
    role: Annotated[str | None, typer.Option(help="primary or replica.")] = None,
    token: Annotated[str | None, typer.Option(help="What the session has seen.")] = None,
    path: Config = None,
    json: Json = False,
) -> None:
    """Show where a statement would go, and why, without running it."""
    from sqlroute.cli.explaining import Wishes, explain_named, explain_text

    if (sql is None) == (statement is None):
        raise typer.BadParameter("give either SQL text or --statement module:name")
    values = _values(parameters or [])
    wishes = Wishes(consistency, intent, role, token)
    with _router(path, context.obj) as router:
        document = (
            explain_text(router, sql, values, wishes)
            if sql is not None
            else explain_named(router, statement or "", values, wishes)
        )
    context.obj.show(document, draw.plan)


@app.command()
def advise(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, help="SQL, or CSV of pg_stat_statements."),
    ] = None,
    listen: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="SECONDS", help="pg_stat_statements; 0: all so far."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="One database, instead of --config.")] = None,
    path: Config = None,
    json: Json = False,
) -> None:
    """Tell which statements stay on one shard, and which shard key would help; runs none."""
    from sqlroute.cli.advising import advise_counted, advise_file

    if (file is None) == (listen is None):
        raise typer.BadParameter("give either a FILE or --listen SECONDS")
    with _router(path, context.obj, url) as router:
        document = (
            advise_file(router, file) if file is not None else advise_counted(router, listen or 0.0)
        )
    context.obj.show(document, draw.advice)


@shard.command("locate")
def shard_locate(
    context: typer.Context,
    table: str,
    key: Annotated[list[str], typer.Argument(metavar="KEY...", help="One value per key column.")],
    path: Config = None,
    json: Json = False,
) -> None:
    """Show where the rows with a key are: bucket, partition, shard, primary."""
    from sqlroute.cli.cluster import locate

    with _router(path, context.obj) as router:
        context.obj.show(locate(router, table, tuple(key)), draw.located)


@shard.command("map")
def shard_map(context: typer.Context, path: Config = None, json: Json = False) -> None:
    """Show which shard owns which buckets."""
    from sqlroute.cli.cluster import shard_maps

    with _router(path, context.obj) as router:
        context.obj.show(shard_maps(router), draw.maps)


@config.command("check")
def config_check(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help="Instead of --config.")] = None,
    path: Config = None,
    json: Json = False,
) -> None:
    """Check the configuration, listing every fault."""
    from sqlroute.config import describe, load

    context.obj.show({"ok": True, **describe(load(file or path))}, draw.config)


@catalog.command("install")
def catalog_install(context: typer.Context, path: Config = None, json: Json = False) -> None:
    """Create or upgrade the sqlroute schema on every shard, and the first shard map."""
    from sqlroute.cli.cluster import install

    with _router(path, context.obj) as router:
        context.obj.show(install(router), draw.maps)


@two_phase.command("recover")
def two_phase_recover(
    context: typer.Context,
    older_than: Annotated[
        float, typer.Option(min=0.0, help="Seconds a transaction must have been prepared.")
    ] = 10.0,
    path: Config = None,
    json: Json = False,
) -> None:
    """Finish commits over several shards that a killed process left half way."""
    from sqlroute.cli.cluster import recover

    with _router(path, context.obj) as router:
        context.obj.show(recover(router, older_than), draw.recovered)


@coordinator.command("install")
def coordinator_install(
    context: typer.Context, no_analyze: NoAnalyze = False, path: Config = None, json: Json = False
) -> None:
    """Build the coordinators of the configuration: databases that see all shards as one."""
    from sqlroute.cli import coordinating

    settings = read_settings(path, context.obj)
    document = coordinating.install(settings, not no_analyze, context.obj.say)
    context.obj.show(document, draw.coordinators)


@coordinator.command("refresh")
def coordinator_refresh(
    context: typer.Context, no_analyze: NoAnalyze = False, path: Config = None, json: Json = False
) -> None:
    """Build them anew, after a migration or when buckets have moved."""
    from sqlroute.cli import coordinating

    settings = read_settings(path, context.obj)
    document = coordinating.refresh(settings, not no_analyze, context.obj.say)
    context.obj.show(document, draw.coordinators)


@coordinator.command("check")
def coordinator_check(context: typer.Context, path: Config = None, json: Json = False) -> None:
    """Say whether statements would be answered; exit code 3 when not."""
    from sqlroute.cli import coordinating

    document = coordinating.check(read_settings(path, context.obj))
    context.obj.show(document, draw.coordinators)
    raise typer.Exit(OK if document["healthy"] else UNHEALTHY)


@coordinator.command("remove")
def coordinator_remove(
    context: typer.Context, yes: Yes = False, path: Config = None, json: Json = False
) -> None:
    """Take away what was built, passwords too; shards and databases stay."""
    from sqlroute.cli import coordinating

    settings = read_settings(path, context.obj)
    names = ", ".join(node.name for node in settings.topology.coordinators.nodes())
    confirm(f"drop all tables of coordinator {names}", yes, context.obj)
    context.obj.show(coordinating.remove(settings, context.obj.say), draw.coordinators)


@app.command()
def demo(
    context: typer.Context,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Default: a temporary one.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the servers running.")] = False,
    port: Port = None,
    pg_bin: PgBin = None,
    json: Json = False,
) -> None:
    """Route New York's flights over 2 shards with 2 replicas each, and prove what is promised."""
    from sqlroute.demo.run import run

    output: Output = context.obj
    document = run(
        directory=directory,
        keep=keep,
        port=port,
        pg_bin=pg_bin,
        progress=output.say,
        shown=lambda step: output.console.print(draw.step(step)) if not output.json else None,
    )
    output.show(document, draw.demo)
    raise typer.Exit(OK if document["ok"] else FAILED)


def _router(path: Path | None, output: Output, url: str | None = None) -> Router:
    """Make a router from the configuration, or of one database; passwords are shown nowhere."""
    from sqlroute.router import Router

    one = {"shards": [{"name": "database", "nodes": [url]}]}
    settings = read_settings(path if url is None else {"keyspaces": {"main": one}}, output)
    return Router(settings.topology, settings.policy)


def _values(given: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--param")
        values[name.strip()] = value
    return values
