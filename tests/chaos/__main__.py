"""``python -m tests.chaos NAME [--count N]``: break servers, look for a lie.

Exits 1 when a read was stale, when something failed, or when the run proves nothing (no replica
answered, or none was behind); the evidence is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from sqlroute.testing import TopologyFactory

from . import own_writes, requests, token_reads

SCENARIOS: dict[str, tuple[Callable[..., Any], int]] = {
    "token_reads": (token_reads.run, 1_000_000),
    "own_writes": (own_writes.run, 100_000),
    "requests": (requests.run, 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("--count", type=int, help="default: a million reads, 100,000 writes, 600 s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--break-token", action="store_true", help="take the tokens away: stale reads must show"
    )
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    logging.getLogger("sqlroute").setLevel(logging.ERROR)
    scenario, count = SCENARIOS[options.name]
    with TopologyFactory() as factory:
        report = scenario(
            factory(shards=1, replicas=2, label="chaos"),
            options.count or count,
            break_token=options.break_token,
            seed=options.seed,
            progress=_progress(),
        )
    if options.json:
        print(json.dumps(report.document(), indent=2))
    else:
        print("\n".join(report.lines()))
    return 0 if report.is_clean else 1


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


if __name__ == "__main__":
    sys.exit(main())
