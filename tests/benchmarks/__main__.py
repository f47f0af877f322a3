"""``python -m tests.benchmarks [NAME ...] [--json]``: print figures as ratios in one run."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.figures import FIGURES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], help="default: all")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    documents = []
    with tempfile.TemporaryDirectory(prefix="sqlroute-bench-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        for name in options.names or FIGURES:
            figure = FIGURES[name](Path(directory))
            documents.append(figure.document())
            if not options.json:
                verdict = "ok" if figure.is_met else "NOT MET"
                low, high = figure.spread
                print(
                    f"{name:22} {figure.ratio:6.3f}  (limit {figure.limit:.2f}, quartiles "
                    f"{low:.2f} to {high:.2f})  {verdict}  "
                    f"[{figure.routed_us:.0f} us against {figure.plain_us:.0f} us]"
                )
    if options.json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    return 0 if all(document["met"] for document in documents) else 1


if __name__ == "__main__":
    sys.exit(main())
