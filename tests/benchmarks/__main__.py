"""``python -m tests.benchmarks [NAME ...] [--json]``: print figures with their limits."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .figures import FIGURES
from .pairs import Figure
from .promotion import Counts, promotion
from .streams import Sizes, merge, stream_memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], help="default: all")
    for name, default, what in (
        ("switchovers", Counts().switchovers, "of promotion: switchovers"),
        ("kills", Counts().kills, "of promotion: kills, of each way to fail over"),
        ("patroni", Counts().patroni, "of promotion: switchovers of Patroni, 0 for none"),
        ("merged", Sizes().merged, "of merge: rows of all shards together"),
        ("streamed", Sizes().streamed, "of stream_memory: rows of all shards together"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    counts = Counts(options.switchovers, options.kills, options.patroni)
    sizes = Sizes(options.merged, options.streamed)
    figures: dict[str, Callable[[Path], list[Figure]]] = {
        **FIGURES,
        "promotion": partial(promotion, counts=counts),
        "merge": partial(merge, sizes=sizes),
        "stream_memory": partial(stream_memory, sizes=sizes),
    }
    documents = []
    with tempfile.TemporaryDirectory(prefix="sqlroute-bench-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        for name in options.names or figures:
            for figure in figures[name](Path(directory)):
                documents.append(figure.document())
                if not options.json:
                    print("\n".join(figure.lines()), flush=True)
    if options.json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    return 0 if all(document["met"] for document in documents) else 1


if __name__ == "__main__":
    sys.exit(main())
