"""``python -m tests.benchmarks [NAME ...] [--json]``: print figures with their limits."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .figures import FIGURES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], help="default: all")
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    documents = []
    with tempfile.TemporaryDirectory(prefix="sqlroute-bench-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        for name in options.names or FIGURES:
            for figure in FIGURES[name](Path(directory)):
                documents.append(figure.document())
                if not options.json:
                    print("\n".join(figure.lines()), flush=True)
    if options.json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    return 0 if all(document["met"] for document in documents) else 1


if __name__ == "__main__":
    sys.exit(main())
