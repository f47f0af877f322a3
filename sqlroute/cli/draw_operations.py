"""Draw plans, progress and reports of operations for a human. Draws what a document says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sqlroute.cli.draw import escaped, new_table, stacked

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sqlroute.cli.output import Document, Output

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "refused": "[red]refused[/]"}
_SHOWN = {
    "hold": ("routers", "late_routers", "late"),
    "fence": ("fence", "ended"),
    "catch_up": ("last_position",),
    "announce": ("epoch", "timeline", "fork"),
    "repoint": ("repointed",),
    "close": ("quarantine",),
    "verify": ("replayed", "former_wrote"),
    "rejoin": ("way", "error"),
    "prove": ("proof",),
    "blank": ("stopped",),
    "choose": ("loss",),
}


def plan(document: Document) -> RenderableType:
    checks = new_table("check", "", "seen", folding=("seen",))
    for check in document["checks"]:
        checks.add_row(check["check"], _MARKS[check["outcome"]], escaped(check["text"]))
    steps = new_table("step", "", "what", folding=("what",))
    for step in document["steps"]:
        mark = "" if step["reversible"] else "[dim]no way back[/]"
        steps.add_row(step["step"], mark, escaped(step["text"]))
    former, candidate = document["former"] or "nobody", document["candidate"]
    head = (
        f"[bold]{document['kind']}[/] of shard {escaped(document['shard'])}: {escaped(former)} -> "
        f"{escaped(candidate or 'nobody')}, fence {document['fence']}, epoch {document['epoch']}"
    )
    refused = [f"[red]refused:[/] {escaped(text)}" for text in document["refused"]]
    return stacked(head, checks, *([] if refused else [steps]), *refused)


def progress(output: Output) -> Callable[[Any], None]:
    """Return what tells of each step as it ends; silent where JSON is wanted."""

    def told(seen: Any) -> None:
        if output.json or seen.state == "begun":
            return
        mark = "[green]✓[/]" if seen.state == "done" else "[red]✗[/]"
        detail = _detail(seen.step.name.value, seen.detail)
        text = f"{mark} {seen.step.name.value:<11} {seen.ms:>8.1f} ms  {detail}"
        output.console.print(text, highlight=False)

    return told


def report(document: Document) -> RenderableType:
    colour = "green" if document["outcome"] == "done" else "yellow"
    found = [
        f"[{colour}]{document['outcome']}[/]: {escaped(document['primary'])} is the primary of "
        f"shard {escaped(document['shard'])}, epoch {document['epoch']}, fence "
        f"{document['fence']}, operation {document['operation']}"
    ]
    pause = document["write_pause_ms"]
    if document["outcome"] != "aborted":
        found.append(
            "write pause: no client wrote within half a second"
            if pause is None
            else f"write pause: {pause:.0f} ms, from the hold to a client's first write"
        )
        found.append(f"acknowledged: {escaped(document['acknowledged']['text'])}")
    if document["loss"] is not None:
        found.append(f"loss: {escaped(document['loss']['text'])}")
    found += [
        f"[yellow]{escaped(node)}[/] {escaped(what)}" for node, what in document["waiting"].items()
    ]
    return stacked(*found)


def rejoined(document: Document) -> RenderableType:
    ways = {
        "follow": "followed it already",
        "start": "was started as its replica",
        "rewind": "was rewound and started",
        "clone": "was copied anew and started",
    }
    return stacked(
        f"[green]{escaped(document['node'])}[/] follows {escaped(document['primary'])}: it "
        f"{ways[document['way']]}"
    )


def fenced(document: Document) -> RenderableType:
    return stacked(
        f"{escaped(document['node'])} is fenced at {document['fence']}, {document['ended']} "
        "session(s) were ended"
    )


def unfenced(document: Document) -> RenderableType:
    changed = ", ".join(document["settings"]) or "it had no fence"
    return stacked(f"{escaped(document['node'])} is not fenced ({escaped(changed)})")


def added(document: Document) -> RenderableType:
    return stacked(
        f"[green]{escaped(document['node'])}[/] is a replica of shard {escaped(document['shard'])},"
        f" copied from {escaped(document['source'])}; the routers were told"
    )


def removed(document: Document) -> RenderableType:
    return stacked(
        f"{escaped(document['node'])} is no node of shard {escaped(document['shard'])} any more; "
        f"its server: {escaped(document['server'])}"
    )


def operations(document: Document) -> RenderableType:
    found = new_table(
        "operation", "kind", "shard", "state", "owner", "started", folding=("started",)
    )
    for each in document["operations"]:
        row = ("operation", "kind", "shard", "state", "owner", "started")
        found.add_row(*(escaped(str(each[name] or "-")) for name in row))
    return found if document["operations"] else stacked("no operation was ever run")


def operation(document: Document) -> RenderableType:
    head = (
        f"[bold]{document['kind']}[/] {document['operation']} of shard "
        f"{escaped(document['shard'])}: {document['state']}, by {escaped(document['owner'] or '-')}"
    )
    steps = new_table("step", "state", "ms", "seen", folding=("seen",))
    for step in document["steps"]:
        ms = "" if step["ms"] is None else f"{step['ms']:.1f}"
        steps.add_row(step["name"], step["state"], ms, _detail(step["name"], step["detail"] or {}))
    parts = [head, steps]
    if document["report"] and "outcome" in document["report"]:
        parts.append(report(document["report"]))
    return stacked(*parts)


def plain(document: Document) -> RenderableType:
    return stacked(*(f"{name}: {escaped(str(value))}" for name, value in document.items()))


@contextlib.contextmanager
def counting(output: Output, what: str) -> Iterator[Callable[[int, int], None]]:
    """Give what is told of the bytes of a copy, drawn as a bar; nothing where JSON is wanted."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    if output.json:
        yield _count_nothing
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.console, transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, whole: bar.update(task, completed=done, total=whole, visible=True)


def _detail(step: str, detail: Any) -> str:
    names = ("error", *_SHOWN.get(step, ()))
    told = []
    for name in dict.fromkeys(names):
        value = detail.get(name)
        if value in (None, "", [], 0):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        told.append(text if name in ("loss", "error", "proof") else f"{name} {text}")
    return escaped("; ".join(told))


def _count_nothing(done: int, whole: int) -> None:
    """Hear of progress and draw nothing."""
