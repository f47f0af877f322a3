"""``python -m tests.chaos NAME [--count N]``: break servers, look for a lie.

Exits 1 when a read was stale, when something acknowledged was lost or failed that must not, or when
the run proves nothing (no replica answered, or none was behind); the evidence is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlroute.testing import TopologyFactory

from . import own_writes, requests, token_reads
from .promotion import full_disk, storm, switchovers
from .promotion.faults import FAULTS


@dataclass(frozen=True, slots=True)
class Scenario:
    """What can be run.

    Attributes:
        count: without ``--count``; of what is meant, ``unit`` says.
        options: of the command line, that it takes besides.
    """

    run: Callable[..., Any]
    count: int
    unit: str
    options: tuple[str, ...] = ()


SCENARIOS = {
    "token_reads": Scenario(token_reads.run, 1_000_000, "reads", ("break_token",)),
    "own_writes": Scenario(own_writes.run, 100_000, "writes", ("break_token",)),
    "requests": Scenario(requests.run, 600, "seconds", ("break_token",)),
    "switchovers": Scenario(switchovers.run, 100, "switchovers", ("fence",)),
    "storm": Scenario(storm.run, 2 * len(FAULTS), "faults", ("names",)),
    "full_disk": Scenario(full_disk.run, 2, "times"),
}


def main() -> int:
    options = _parser().parse_args()
    logging.getLogger("sqlroute").setLevel(logging.ERROR)
    scenario = SCENARIOS[options.name]
    if options.name == "full_disk" and (why := full_disk.obstacle()):
        print(f"full_disk was not run: {why}", file=sys.stderr)
        return 0
    seed = random.randrange(1_000_000) if options.seed is None else options.seed
    print(f"{options.name}: seed {seed}", file=sys.stderr)
    given = {name: getattr(options, name) for name in scenario.options}
    told = "progress" if "break_token" in scenario.options else "say"
    with TopologyFactory() as factory:
        report = scenario.run(
            factory(shards=1, replicas=2, label="chaos"),
            options.count or scenario.count,
            seed=seed,
            **given,
            **{told: _progress() if told == "progress" else _say},
        )
    if options.json:
        print(json.dumps(report.document(), indent=2))
    else:
        print("\n".join(report.lines()))
    return 0 if report.is_clean else 1


def _parser() -> argparse.ArgumentParser:
    counts = ", ".join(f"{one.count:,} {one.unit}" for one in SCENARIOS.values())
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--count", type=int, help=f"default: {counts}")
    parser.add_argument("--seed", type=int, help="default: by chance; it is printed")
    parser.add_argument(
        "--break-token", action="store_true", help="take the tokens away: stale reads must show"
    )
    parser.add_argument(
        "--fence", choices=("L1", "L2", "L3", "L4"), default="L3", help="of switchovers"
    )
    parser.add_argument(
        "--faults", dest="names", nargs="+", choices=FAULTS, default=tuple(FAULTS),
        metavar="FAULT", help=f"of a storm; default: all of {', '.join(FAULTS)}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    return parser


def _progress() -> Callable[[int], None]:
    """Return what says every 10 s how far it is."""
    began = said = time.monotonic()

    def say(done: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10:
            said = now
            print(f"{done:,} after {now - began:.0f} s", file=sys.stderr, flush=True)

    return say


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
