"""Write the comparison page: the prose of ``page.md`` around tables of what was observed."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from .cases import Case

PROSE = Path(__file__).with_name("page.md")

GROUPS = ((1, 6), (7, 14), (15, 22), (23, 26), (27, 30), (0, 0))
"""The first and last pitfall of each table, ``$table_1_6`` in the prose."""


@dataclass(frozen=True, slots=True)
class Column:
    """The outcomes of one contender, by the name of the case."""

    name: str
    version: str
    outcomes: Mapping[str, str]
    notes: tuple[str, ...] = ()


def is_right(case: Case, outcome: str) -> bool:
    return outcome in case.wanted


def page(
    cases: Sequence[Case], columns: Sequence[Column], *, postgresql: str, behind: float
) -> str:
    """Return the page as Markdown."""
    notes = dict.fromkeys(note for column in columns for note in column.notes)
    tables = {
        f"table_{first}_{last}": _table([c for c in cases if first <= c.number <= last], columns)
        for first, last in GROUPS
    }
    return Template(PROSE.read_text()).substitute(
        tables,
        behind=f"{behind:g}",
        postgresql=postgresql,
        python=platform.python_version(),
        versions=", ".join(column.version for column in columns),
        notes="\n".join(f"* {note}" for note in notes),
        summary=_summary(cases, columns),
    )


def _summary(cases: Sequence[Case], columns: Sequence[Column]) -> str:
    judged = [case for case in cases if case.number]
    marks = [[_mark(case, column.outcomes[case.name]) for case in judged] for column in columns]
    lines = [
        [f"{len(judged)} programs", *(column.name for column in columns)],
        ["---"] * (len(columns) + 1),
        ["✓ right", *(str(found.count("✓")) for found in marks)],
        ["✗ wrong", *(str(found.count("✗")) for found in marks)],
        ["of these without an error", *(str(_silent(judged, column)) for column in columns)],
        ["– nothing to run", *(str(found.count("–")) for found in marks)],
    ]
    return "\n".join(_row(line) for line in lines)


def _silent(cases: Sequence[Case], column: Column) -> int:
    """Count the wrong outcomes that no error told of."""
    outcomes = [(case, column.outcomes[case.name]) for case in cases]
    return sum(_mark(case, found) == "✗" and "error:" not in found for case, found in outcomes)


def _table(cases: Sequence[Case], columns: Sequence[Column]) -> str:
    heads = ["", "the program", *(column.name for column in columns)]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for case in cases:
        cells = [_cell(case, column.outcomes[case.name]) for column in columns]
        lines.append(_row([_label(case, cases), case.title, *cells]))
    return "\n".join(lines)


def _label(case: Case, cases: Sequence[Case]) -> str:
    """Return 1a, 1b... where a pitfall has several programs."""
    if not case.number:
        return ""
    alike = [other.name for other in cases if other.number == case.number]
    letter = chr(ord("a") + alike.index(case.name)) if len(alike) > 1 else ""
    return f"{case.number}{letter}"


def _cell(case: Case, outcome: str) -> str:
    mark = _mark(case, outcome)
    return f"{mark} {outcome}" if case.number or mark == "–" else outcome


def _mark(case: Case, outcome: str) -> str:
    if outcome.startswith("not offered"):
        return "–"
    return "✓" if is_right(case, outcome) else "✗"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
