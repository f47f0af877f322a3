"""``python -m tests.differential [COUNT] [--seed N]``: random queries, each equal or refused.

Exits 1 when an answer differs from that of one PostgreSQL; the evidence and the seed are printed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys

from sqlroute.testing import TopologyFactory

from .campaign import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    logging.getLogger("sqlroute").setLevel(logging.ERROR)
    print(f"seed {options.seed}", flush=True)
    with TopologyFactory() as factory:
        servers = factory(shards=4, replicas=0, label="differential")
        report = run(servers, options.count, options.seed, lambda done: print(done, flush=True))
    print("\n".join(report.lines()))
    return 1 if report.different else 0


if __name__ == "__main__":
    sys.exit(main())
