"""``python -m tests.upstream``: run SQLAlchemy's own suite with RoutingSession as its Session.

Without options: test/orm and test/ext, the replica being a second engine on the same server, next
to a baseline with a Session that changes nothing; then the core files on a real standby held 0, 50
and 200 ms behind. Exit code 1: a test failed that tests/upstream/known.toml does not list, or a
listed one passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from sqlroute.local.topology import LocalTopology
from tests.upstream.runs import Outcome, Run, run
from tests.upstream.servers import servers
from tests.upstream.source import sdist
from tests.upstream.verdict import LIMIT, Entry, judge, read

DETAILS = 20
"""Failures that are printed with their last words."""

HERE = Path(__file__).parent
ALL = ("test/orm", "test/ext")
ASYNC = ("test/ext/asyncio",)
SHORT = tuple(
    f"test/orm/test_{name}.py"
    for name in ("session", "transaction", "merge", "expire", "versioning", "cascade", "bind")
)
CORE = tuple(
    f"test/orm/test_{name}.py"
    for name in (
        *("session", "transaction", "unitofwork", "unitofworkv2", "merge", "lazy_relations"),
        *("eager_relations", "selectin_relations", "cascade", "mapper", "query", "relationships"),
        *("expire", "versioning", "manytomany", "onetoone", "dynamic", "deferred", "events"),
        *("load_on_fks", "naturalpks", "joins", "scoping", "bind", "froms", "cycles", "defaults"),
    )
)


def main() -> int:
    options = _options()
    entries = read(options.known)
    archive = sdist(options.cache)
    good = True
    holds = options.standby if options.standby else [] if options.short else [0, 50, 200]
    if not options.standby:
        with servers(replicas=0, port=options.port, pg_bin=options.pg_bin) as topology:
            routed = Run("routed", SHORT if options.short else ALL, False, options.stale_writes)
            good &= _same_server(routed, entries, topology, archive, options.processes)
            if not options.short:
                good &= _async(entries, topology, archive)
    if holds:
        with servers(replicas=1, port=options.port, pg_bin=options.pg_bin) as topology:
            held = Run("standby", CORE, False, options.stale_writes)
            for hold in holds:
                good &= _standby(hold, held, entries, topology, archive, options.processes)
    print(
        "as good as SQLAlchemy's own Session" if good else "NOT as good as SQLAlchemy's own Session"
    )
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument("--short", action="store_true", help="some files only, for CI")
    parser.add_argument(
        "--standby",
        type=int,
        action="append",
        metavar="MS",
        help="only the core files on a standby held so far behind; may be repeated",
    )
    parser.add_argument(
        "--stale-writes",
        choices=("allow", "check"),
        default="allow",
        help="of the sessions; the check is one statement more, which many tests count",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=21000, help="of the first server")
    parser.add_argument("--pg-bin", type=Path, help="PostgreSQL's programs; default: found")
    parser.add_argument("--known", type=Path, default=HERE / "known.toml")
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / "build" / "upstream")
    return parser.parse_args()


def _same_server(
    it: Run,
    entries: tuple[Entry, ...],
    topology: LocalTopology,
    archive: Path,
    processes: int,
) -> bool:
    baseline = _timed("baseline", replace(it, mode="plain"), topology, archive, processes)
    outcome = _timed("same-server", it, topology, archive, processes)
    return _told("same-server", outcome, entries, baseline)


def _async(entries: tuple[Entry, ...], topology: LocalTopology, archive: Path) -> bool:
    baseline = _timed("baseline", Run("plain", ASYNC, is_async=True), topology, archive, 1)
    outcome = _timed("async", Run("routed", ASYNC, is_async=True), topology, archive, 1)
    return _told("async", outcome, entries, baseline)


def _standby(
    hold: int,
    it: Run,
    entries: tuple[Entry, ...],
    topology: LocalTopology,
    archive: Path,
    processes: int,
) -> bool:
    topology.nodes[1].hold_replay(hold / 1000)
    title = f"standby {hold} ms behind"
    # waiting costs no processor time, so more processes wait at once
    outcome = _timed(title, it, topology, archive, processes * (2 if hold else 1))
    if not outcome.counts["replica"]:
        print("  no statement reached the standby: this proves nothing")
        return False
    return _told("standby", outcome, entries, None)


def _timed(title: str, it: Run, topology: LocalTopology, archive: Path, processes: int) -> Outcome:
    began = time.monotonic()
    outcome = run(it, topology, archive, processes)
    tests = list(outcome.tests.values())
    figures = ", ".join(f"{tests.count(what)} {what}" for what in ("passed", "failed", "skipped"))
    print(f"{title}: {figures} in {time.monotonic() - began:.0f} s", flush=True)
    if outcome.counts:
        said = ", ".join(f"{count} {who}" for who, count in sorted(outcome.counts.items()))
        print(f"  statements by who answered: {said}", flush=True)
    return outcome


def _told(
    name: str, outcome: Outcome, entries: tuple[Entry, ...], baseline: Outcome | None
) -> bool:
    verdict = judge(name, outcome, entries, baseline)
    print(f"  {len(verdict.excused)} of at most {LIMIT} tests excused by known.toml")
    for number, test in enumerate(verdict.failures):
        print(f"  FAILED {test}")
        if number < DETAILS:
            for line in outcome.texts[test].strip().splitlines()[-6:]:
                print(f"      {line}")
    for test in verdict.lost:
        print(f"  NOT RUN, though the baseline passes: {test}")
    for entry in verdict.obsolete:
        print(f"  OBSOLETE entry in known.toml: {entry}")
    for words in verdict.broken:
        print(f"  BROKEN, a process did not come to its end:\n{words}")
    return verdict.is_good


if __name__ == "__main__":
    sys.exit(main())
