"""The commands that change a shard: promotion, failover, replicas, fences, operations."""

# ruff: noqa: ARG001, PLR0913, PLR0917 - one parameter per option; --json acts by its callback

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqlroute.cli import draw_operations as draw
from sqlroute.cli.asking import Config, Json, Yes, agreement, confirm, read_settings
from sqlroute.cli.output import OK, REFUSED, RESUMABLE, Output

if TYPE_CHECKING:
    from sqlroute.ops.planning import Plan
    from sqlroute.ops.promotion import Report

replica = typer.Typer(help="Add a replica to a shard, or remove one.")
op = typer.Typer(help="Operations: what runs, what was killed, what has ended.")

To = Annotated[str, typer.Option("--to", metavar="NODE", help="Default: the best one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show preflight and steps, do nothing.")]
FenceLevel = Annotated[
    str, typer.Option("--fence", metavar="L1..L5", help="Default: the strongest possible.")
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for each wait for a server.")]


def promote(
    context: typer.Context,
    shard: str,
    to: To = "",
    fence: FenceLevel = "",
    max_drain: Annotated[
        float, typer.Option(min=0.0, max=40.0, help="Seconds that transactions may go on.")
    ] = 5.0,
    max_lag_bytes: Annotated[int, typer.Option(min=0, help="Of the node to promote.")] = 16 << 20,
    timeout: Timeout = 30.0,
    rejoin: Annotated[
        bool, typer.Option("--rejoin/--no-rejoin", help="The old primary comes back as a replica.")
    ] = True,
    dry_run: DryRun = False,
    yes: Yes = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Make another node the primary while this one lives; nothing is lost, nobody sees an error."""
    from sqlroute.ops import commands
    from sqlroute.ops.planning import Wishes

    wishes = Wishes(
        to=to,
        level=_level(fence),
        max_drain=max_drain,
        max_lag_bytes=max_lag_bytes,
        timeout=timeout,
        rejoins=rejoin,
    )
    settings = read_settings(path, context.obj)
    if dry_run:
        _show_plan(context.obj, commands.plan_promotion(settings, shard, wishes))
    ask = agreement(context.obj, yes, f"promote a node of shard {shard}", draw.plan)
    told = draw.progress(context.obj)
    _show_report(context.obj, commands.promote(settings, shard, wishes, agree=ask, told=told))


def failover(
    context: typer.Context,
    shard: str,
    to: To = "",
    force: Annotated[
        bool, typer.Option("--force", help="Without proof that the primary is gone.")
    ] = False,
    max_loss_bytes: Annotated[
        int, typer.Option(min=0, help="Acknowledged log that may be lost.")
    ] = 0,
    accept_data_loss: Annotated[
        bool, typer.Option("--accept-data-loss", help="Whatever is lost, known or not.")
    ] = False,
    synchronous: Annotated[
        str, typer.Option(metavar="'ANY 1 (a, b)'", help="What the lost primary waited for.")
    ] = "",
    fence: FenceLevel = "",
    timeout: Timeout = 30.0,
    dry_run: DryRun = False,
    yes: Yes = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Make a replica the primary after the primary was lost; says first what may be lost."""
    from sqlroute.ops import commands
    from sqlroute.ops.planning import Wishes

    wishes = Wishes(
        to=to,
        level=_level(fence),
        timeout=timeout,
        rejoins=False,
        force=force,
        max_loss_bytes=max_loss_bytes,
        accepts_loss=accept_data_loss,
        synchronous=synchronous,
    )
    settings = read_settings(path, context.obj)
    if dry_run:
        _show_plan(context.obj, commands.plan_failover(settings, shard, wishes))
    ask = agreement(context.obj, yes, f"fail shard {shard} over", draw.plan)
    told = draw.progress(context.obj)
    _show_report(context.obj, commands.failover(settings, shard, wishes, agree=ask, told=told))


def rejoin(
    context: typer.Context,
    node: str,
    clone: Annotated[
        bool, typer.Option("--clone", help="Copy it anew where nothing less helps.")
    ] = False,
    timeout: Timeout = 60.0,
    yes: Yes = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Bring a node back as a replica: started, else rewound, else (--clone) copied anew."""
    from sqlroute.ops import commands

    settings = read_settings(path, context.obj)
    confirm(f"stop {node} and make it a replica; what only it has is lost", yes, context.obj)
    with draw.counting(context.obj, f"copying {node}") as counted:
        found = commands.rejoin(settings, node, clones=clone, timeout=timeout, counted=counted)
    context.obj.show(found, draw.rejoined)


def fence(
    context: typer.Context,
    node: str,
    level: Annotated[
        str, typer.Option("--level", metavar="L1..L5", help="Default: the strongest possible.")
    ] = "",
    wait: Annotated[
        float, typer.Option("--wait", min=0.0, help="Seconds to try again where it is away.")
    ] = 0.0,
    yes: Yes = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Keep clients from writing to a node: L1 to L3 in SQL, L4 stops it, L5 is your command."""
    from sqlroute.ops import commands

    settings = read_settings(path, context.obj)
    confirm(f"fence {node}: its clients cannot write there any more", yes, context.obj)
    found = commands.fence(settings, node, level=_level(level), waits=wait)
    context.obj.show(found, draw.fenced)


def unfence(
    context: typer.Context,
    node: str,
    force: Annotated[
        bool, typer.Option("--force", help="Even if another node is the primary.")
    ] = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Take every fence off a node."""
    from sqlroute.ops import commands

    settings = read_settings(path, context.obj)
    context.obj.show(commands.unfence(settings, node, force=force), draw.unfenced)


@replica.command("add")
def replica_add(
    context: typer.Context,
    shard: str,
    name: Annotated[str, typer.Argument(help="Of the new node.")],
    address: Annotated[str, typer.Argument(metavar="HOST:PORT")],
    zone: Annotated[str, typer.Option(help="Where it stands.")] = "",
    weight: Annotated[float, typer.Option(min=0.0, help="Its share of the reads.")] = 1.0,
    source: Annotated[
        str, typer.Option("--from", metavar="NODE", help="Default: the least loaded one.")
    ] = "",
    timeout: Timeout = 60.0,
    path: Config = None,
    json: Json = False,
) -> None:
    """Copy a node, start the copy as a replica, see it follow, tell the routers."""
    from sqlroute.ops import commands
    from sqlroute.ops.replicas import place

    settings = read_settings(path, context.obj)
    new = place(name, address, zone, weight)
    with draw.counting(context.obj, f"copying to {name}") as counted:
        found = commands.add_replica(
            settings,
            shard,
            new,
            source=source,
            timeout=timeout,
            say=context.obj.say,
            counted=counted,
        )
    context.obj.show(found, draw.added)


@replica.command("remove")
def replica_remove(
    context: typer.Context,
    node: str,
    stop: Annotated[
        bool, typer.Option("--stop/--keep-running", help="Stop its server by its driver.")
    ] = True,
    yes: Yes = False,
    path: Config = None,
    json: Json = False,
) -> None:
    """Take a replica away: the routers leave it, then it is stopped; its data stay."""
    from sqlroute.ops import commands

    settings = read_settings(path, context.obj)
    confirm(f"remove replica {node}", yes, context.obj)
    context.obj.show(commands.remove_replica(settings, node, stops=stop), draw.removed)


@op.command("list")
def op_list(
    context: typer.Context,
    shard: Annotated[str | None, typer.Option("--shard", help="Of this one only.")] = None,
    path: Config = None,
    json: Json = False,
) -> None:
    """Show the operations of all shards, the newest first."""
    from sqlroute.ops import resuming

    settings = read_settings(path, context.obj)
    context.obj.show(resuming.list_operations(settings, shard), draw.operations)


@op.command("show")
def op_show(
    context: typer.Context, operation: str, path: Config = None, json: Json = False
) -> None:
    """Show an operation: its steps, and its report if it has ended."""
    from sqlroute.ops import resuming

    settings = read_settings(path, context.obj)
    context.obj.show(resuming.show_operation(settings, operation), draw.operation)


@op.command("resume")
def op_resume(
    context: typer.Context, operation: str, path: Config = None, json: Json = False
) -> None:
    """Go on with an operation whose command was killed."""
    from sqlroute.ops import resuming

    settings = read_settings(path, context.obj)
    _show_end(context.obj, resuming.resume(settings, operation, draw.progress(context.obj)))


@op.command("abort")
def op_abort(
    context: typer.Context, operation: str, path: Config = None, json: Json = False
) -> None:
    """Take back an operation whose command was killed, as long as nothing is promoted."""
    from sqlroute.ops import resuming

    settings = read_settings(path, context.obj)
    _show_end(context.obj, resuming.abort(settings, operation, draw.progress(context.obj)))


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (promote, failover, rejoin, fence, unfence):
        app.command()(command)
    app.add_typer(replica, name="replica", no_args_is_help=True)
    app.add_typer(op, name="op", no_args_is_help=True)


def _show_plan(output: Output, plan: Plan) -> None:
    """Show a plan, and end: with the exit code of a refusal if there is one."""
    output.show(plan.document(), draw.plan)
    raise typer.Exit(REFUSED if plan.refusals else OK)


def _show_report(output: Output, report: Report) -> None:
    output.show(report.document(), draw.report)
    raise typer.Exit(RESUMABLE if report.outcome == "incomplete" else OK)


def _show_end(output: Output, ended: Report | dict[str, Any]) -> None:
    if isinstance(ended, dict):
        output.show(ended, draw.plain)
    else:
        _show_report(output, ended)


def _level(name: str) -> Any:
    from sqlroute.ops.fences import Level

    try:
        return Level.named(name) if name else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
