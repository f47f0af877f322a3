"""Draw the documents of the commands for a human, by Rich. Draws what a document says, no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from sqlroute.cli.output import Document

SHOWN = 100
"""How many characters of a statement are shown."""

_COLOURS = {"up": "green", "down": "red", "suspect": "yellow", "recovering": "yellow"}


def local(document: Document) -> RenderableType:
    table = new_table("node", "shard", "port", "role", "pid", "state")
    for node in document["nodes"]:
        state = "paused" if node["paused"] else "running" if node["running"] else "stopped"
        colour = "green" if state == "running" else "red"
        row = (node["name"], node["shard"], node["port"], node["role"], node["pid"])
        table.add_row(*map(_text, row), f"[{colour}]{state}[/]")
    hint = f"PostgreSQL {document['version']}; export SQLROUTE_CONFIG={document['config']}"
    return stacked(table, escaped(hint))


def stopped(document: Document) -> RenderableType:
    names = ", ".join(document["stopped"]) or "nothing was running"
    what = "stopped and deleted" if document["deleted"] else "stopped"
    return stacked(escaped(f"{what} in {document['directory']}: {names}"))


def status(document: Document) -> RenderableType:
    table = new_table("node", "shard", "role", "state", "tl", "LSN", "lag bytes", "lag s", "rtt ms")
    for node in document["nodes"]:
        refused = bool(node["refused"])
        colour = "red" if refused else _COLOURS.get(node["state"], "yellow")
        table.add_row(
            *map(_text, (node["node"], node["shard"], node["role"])),
            f"[{colour}]{'refused' if refused else node['state']}[/]",
            *map(_text, (node["timeline"] or None, node["lsn"], node["lag_bytes"])),
            *map(_text, (node["lag_seconds"], node["rtt_ms"])),
        )
    faults = [f"[red]{escaped(fault)}[/]" for fault in document["faults"]]
    return stacked(table, *faults, *([] if faults else ["[green]healthy[/]"]))


def plan(document: Document) -> RenderableType:
    lines = [f"[bold]{document['tier']}[/] ({document['kind']})"]
    if document["epoch"]:
        lines[0] += f", shard map of epoch {document['epoch']}"
    for number, name in enumerate(document["coordinators"]):
        lines.append(f"  {'or ' if number else ''}on [cyan]{escaped(name)}[/]")
    for target in document["targets"]:
        mode = "in the transaction" if target["in_transaction"] else "autocommit"
        where = f"{target['shard']}: {target['role']} {target['node']}, {mode}"
        lines.append(f"  -> [cyan]{escaped(where)}[/] [dim]({escaped(target['reason'])})[/]")
        if target.get("sql"):
            lines.append(f"     sends {escaped(target['sql'])}")
    lines += [f"  merge: {escaped(step)}" for step in document["merge"]]
    lines += [f"  because {escaped(reason)}" for reason in document["reasons"]]
    if document.get("note"):
        lines.append(f"[dim]{escaped(document['note'])}[/]")
    return stacked(*lines)


def advice(document: Document) -> RenderableType:
    calls, statements = document["calls"], document["statements"]
    parts: list[Any] = [f"{statements} statements, {calls} calls, {document['tables']} tables"]
    if document["now"] is not None:
        parts += ["[bold]as it is now[/]", _judged(document["now"]["statements"])]
    if document["schemes"]:
        needs = document["schemes"][0]["needs"]
        parts += ["[bold]keys that were tried, the best first[/]", _schemes(document)]
        parts += [f"for the first, {escaped(need)}" for need in needs]
        parts += ["[bold]under the first of them[/]", _judged(document["best"])]
    return stacked(*parts)


def _schemes(document: Document) -> RenderableType:
    shares, counts = ("score", "one shard", "data spread"), ("several", "coordinator", "refused")
    table = new_table(*shares, *counts, "key", folding=("one shard", "data spread", "key"))
    for scheme in document["schemes"]:
        calls = scheme["calls"]
        key = "\n".join(f"{name}.{column}" for name, column in scheme["key"].items())
        parts = (f"{scheme[name]:.0%}" for name in ("score", "on_one_shard", "data_spread"))
        others = (calls[name] for name in ("several shards", "coordinator", "refused"))
        table.add_row(*parts, *map(_text, others), escaped(key))
    return table


def _judged(statements: list[Document]) -> RenderableType:
    table = new_table("calls", "goes to", "why", "statement", folding=("why", "statement"))
    for one in statements:
        sql = one["sql"] if len(one["sql"]) <= SHOWN else one["sql"][: SHOWN - 1] + "…"
        table.add_row(_text(one["calls"]), one["reach"], escaped(one["why"]), escaped(sql))
    return table


def located(document: Document) -> RenderableType:
    key = ", ".join(f"{name} = {value}" for name, value in document["key"].items())
    rows = [(f"{document['table']} ({key})", f"bucket {document['bucket']}")]
    rows += [(name, _text(document[name])) for name in ("shard", "leaf", "primary", "epoch")]
    table = _plain_table()
    for name, value in rows:
        table.add_row(escaped(name), escaped(value))
    return table


def maps(document: Document) -> RenderableType:
    table = new_table("keyspace", "epoch", "shard", "buckets", "which")
    for keyspace in document["keyspaces"]:
        for owner in keyspace["shards"]:
            count = f"{len(owner['buckets'])} of {keyspace['buckets']}"
            row = (keyspace["keyspace"], keyspace["epoch"], owner["shard"], count)
            table.add_row(*map(_text, row), _ranges(owner["buckets"]))
        if keyspace["unowned"]:
            table.add_row(
                keyspace["keyspace"], "", "[red]nobody[/]", "", _ranges(keyspace["unowned"])
            )
    if not document["keyspaces"]:
        return stacked("no keyspace has several shards, so there is no shard map")
    return table


def config(document: Document) -> RenderableType:
    lines = [f"[green]ok[/] {escaped(_text(document['path']))}"]
    for keyspace in document["keyspaces"]:
        shards = keyspace["shards"]
        nodes = sum(len(found["nodes"]) for found in shards)
        lines.append(
            f"  keyspace {escaped(keyspace['name'])}: {len(shards)} shard(s), {nodes} node(s), "
            f"{keyspace['buckets']} buckets"
        )
    lines.append(f"  consistency {document['policy']['consistency']}, "
                 f"max_lag {document['policy']['max_lag']:g} s")  # fmt: skip
    return stacked(*lines)


def coordinators(document: Document) -> RenderableType:
    table = new_table("coordinator", "keyspace", "reads", "epoch", "tables", "built at")
    lines: list[Any] = [table]
    for found in document["coordinators"]:
        reads = ", ".join(found["replicas"].values()) or ("primaries" if found["epoch"] else None)
        names = ("epoch", "tables", "built_at")
        facts = (_text(found[name] or None) for name in names)
        table.add_row(found["node"], found["keyspace"], _text(reads), *facts)
        lines += [
            f"[yellow]left out:[/] {escaped(name)}: {escaped(why)}"
            for name, why in found["left_out"].items()
        ]
        lines += [f"[red]{escaped(fault)}[/]" for fault in found["faults"]]
    return stacked(*lines)


def recovered(document: Document) -> RenderableType:
    if not document["recovered"]:
        return stacked("nothing to recover")
    table = new_table("shard", "prepared transaction", "outcome")
    for done in document["recovered"]:
        table.add_row(
            done["shard"], done["gid"], "committed" if done["committed"] else "rolled back"
        )
    return table


def step(document: Document) -> RenderableType:
    """Draw one step of the demo: its claim, its plan, what was seen."""
    mark = "[green]✓[/]" if document["ok"] else "[red]✗[/]"
    title = f"{mark} [bold]{escaped(document['title'])}[/]  {document['ms']:.1f} ms"
    lines: list[Any] = ["", title]
    lines += [_indented(f"[dim]{escaped(line.lstrip())}[/]", line) for line in document["plan"]]
    lines += [_indented(escaped(line)) for line in document["seen"]]
    if document["rows"]:
        table = new_table(*document["columns"])
        for row in document["rows"]:
            table.add_row(*map(_text, row))
        lines.append(table)
    return stacked(*lines)


def demo(document: Document) -> RenderableType:
    passed = sum(found["ok"] for found in document["steps"])
    verdict = "[green]every check passed[/]" if document["ok"] else "[red]a check failed[/]"
    lines = [
        "",
        f"{verdict}: {passed} of {len(document['steps'])} steps, {document['seconds']:.1f} s "
        f"in all (servers {document['servers_seconds']:.1f} s, "
        f"data {document['data_seconds']:.1f} s)",
    ]
    if document["kept"]:
        lines.append("The servers are left running:")
        lines += [f"  {escaped(line)}" for line in document["kept"]]
    return stacked(*lines)


def new_table(*columns: str, folding: Sequence[str] = ()) -> Table:
    """Return a table with these columns.

    Args:
        folding: the columns that fold where there is not enough room; by default the first, which
            is a name: it folds before the others lose a digit.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in (folding or columns[:1]), overflow="fold")
    return table


def _plain_table() -> Table:
    from rich.table import Table

    return Table(box=None, show_header=False, pad_edge=False)


def stacked(*parts: Any) -> RenderableType:
    from rich.console import Group

    return Group(*parts)


def _indented(markup: str, like: str = "") -> RenderableType:
    """Indent a text under its step, the lines that it wraps to as well."""
    from rich.padding import Padding

    own = len(like) - len(like.lstrip())
    return Padding(markup, (0, 0, 0, 4 + own))


def _text(value: object) -> str:
    return "-" if value is None or value == "" else escaped(str(value))


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6; a regular map is said by its step."""
    found = list(numbers)
    steps = {later - earlier for earlier, later in pairwise(found)}
    if len(found) > 3 and len(steps) == 1 and steps != {1}:
        return f"{found[0]}, {found[1]}, ... {found[-1]}"
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
