"""``python -m tests.pitfalls [--only NAME]``: run the scenarios, write ``docs/comparison.md``.

Needs advanced-alchemy beside sqlroute: ``make comparison`` sees to it. Exits 1 when sqlroute does
not do what it promises; the page is written all the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sqlroute.testing import TopologyFactory

from .cases import CASES, contend
from .contenders import AdvancedAlchemy, Contender, Recipe, Sqlroute
from .page import Column, is_right, page
from .servers import BEHIND, World, ask

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"

KINDS: tuple[type[Contender], ...] = (Recipe, AdvancedAlchemy, Sqlroute)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pitfalls", description=__doc__)
    parser.add_argument(
        "--only", choices=[k.__name__.lower() for k in KINDS], help="print, no page"
    )
    only = parser.parse_args().only
    # The pools log each connection that a contender leaves broken; the outcomes tell it too.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    logging.getLogger("sqlroute").setLevel(logging.CRITICAL)
    columns = []
    with TopologyFactory() as factory:
        world = World(factory)
        for kind in KINDS:
            if only in (None, kind.__name__.lower()):
                columns.append(_column(kind, world))
        (postgresql,) = ask(world.main.primary, "SHOW server_version")[0]
    if only is None:
        PAGE.write_text(page(CASES, columns, postgresql=postgresql, behind=BEHIND))
        print(f"wrote {PAGE.relative_to(Path.cwd())}", file=sys.stderr)
    wrong = [
        f"{case.number} {case.name}: {column.outcomes[case.name]} (wanted: {case.wanted[0]})"
        for column in columns
        if column.name == Sqlroute.name
        for case in CASES
        if not is_right(case, column.outcomes[case.name])
    ]
    for line in wrong:
        print(f"sqlroute breaks its promise in pitfall {line}", file=sys.stderr)
    return 1 if wrong else 0


def _column(kind: type[Contender], world: World) -> Column:
    outcomes = {}
    notes: tuple[str, ...] = ()
    for case, outcome, contender in contend(kind, world):
        outcomes[case.name] = outcome
        notes = contender.notes
        mark = "ok" if is_right(case, outcome) else "--"
        print(f"{kind.name:20} {case.number:2} {mark} {case.name:28} {outcome}", file=sys.stderr)
    return Column(kind.name, kind.version(), outcomes, notes)


if __name__ == "__main__":
    sys.exit(main())
