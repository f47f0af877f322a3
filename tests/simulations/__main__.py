"""``python -m tests.simulations``: run the full size, write its figures to ``docs/choosing.md``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from sqlroute.routing.policy import Policy

from .losing import replicas_lost, zone_lost
from .pooling import Connections, connections
from .probing import Return, primary_returns, probes

PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"
BEGIN = "<!-- figures: written by `python -m tests.simulations`, do not edit -->\n"
END = "<!-- end of figures -->\n"

SHARDS, PROCESSES = 1000, 500
BUDGET = Policy(connections_per_node=1000, replicas_per_process=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulations", description=__doc__)
    parser.add_argument("--print", action="store_true", help="print, leave the page alone")
    only_print = parser.parse_args().print
    began = time.monotonic()
    text = "\n".join(_figures())
    print(text)
    print(f"took {time.monotonic() - began:.0f} s", file=sys.stderr)
    if not only_print:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        _, end, tail = rest.partition(END)
        assert end, f"{PAGE} has no place for the figures"
        PAGE.write_text(f"{head}{BEGIN}{text}\n{END}{tail}")
    return 0


def _figures() -> Iterator[str]:
    yield "**Probes of one node per second** (`probe_rate` 100, `probe_interval` 0.5 s).\n"
    yield from _block(_probing((1, 10, 40, 50, 100, 200, 300, 400, 500)))
    yield f"\n**Connections of the busiest node** of {SHARDS:,} shards with 3 nodes each."
    yield "The monitors' are counted too. The busiest shard stops answering for ten seconds.\n"
    yield from _block(_pooling())
    yield "\n**A zone is lost**: reads of the busiest replica, 1 is the mean of all before.\n"
    yield from _block(_zones())
    yield "\n**All replicas of a shard are lost**; clients that are refused ask twice as often.\n"
    yield from _block(_fallback((0.1, 0.25, 0.5, 1.0)))
    yield f"\n**A primary comes back** to {PROCESSES} processes; in each 20 writers wait.\n"
    yield from _block(_returning())


def _block(lines: Iterator[str]) -> Iterator[str]:
    yield "```text"
    yield from lines
    yield "```"


def _probing(counts: Sequence[int]) -> Iterator[str]:
    yield "processes  pause s   mean  worst 10 s  while all start"
    for count in counts:
        found = probes(count, Policy(), Random(1))
        bar = "#" * round(found.mean / 2)
        yield (
            f"{count:9}  {found.pause:7.2f}  {found.mean:5.1f}  {found.worst:10.1f}"
            f"  {found.starting:15.1f}  {bar}"
        )


def _pooling() -> Iterator[str]:
    yield "processes  limits                                    primary  replica  processes/replica"
    for processes in (100, 250, PROCESSES):
        found = connections(SHARDS, processes, Policy(), Random(1), seconds=22)
        yield _pool_line(processes, "of each process (by default)", found)
        found = connections(SHARDS, processes, BUDGET, Random(1), seconds=22)
        yield _pool_line(processes, "connections_per_node 1000, one replica", found)


def _pool_line(processes: int, limits: str, found: Connections) -> str:
    spread = "{} to {}".format(*found.processes_per_replica)
    waited = f", {found.waited:.2%} waited" if found.waited else ""
    return f"{processes:9}  {limits:42} {found.primary:6}  {found.replica:7}  {spread}{waited}"


def _zones() -> Iterator[str]:
    found = zone_lost(SHARDS, Random(1), reads=90)
    home = f"{found.at_home:.0%} of the reads stay in their zone"
    yield f"all three zones  {found.before:.2f}  {home}"
    yield (
        f"zone c lost      {found.after:.2f}  of the replicas that have lost their only sibling; "
        f"primaries take {found.by_primaries:.0%}"
    )


def _fallback(shares: Sequence[float]) -> Iterator[str]:
    yield "share  reads/s before  asked for  primary takes"
    for share in shares:
        policy = Policy(primary_fallback_share=share, primary_fallback_free=0.0)
        found = replicas_lost(20, policy)
        bar = "#" * round(found.by_primary / 100)
        figures = f"{found.before:14.0f}  {found.asked:9.0f}  {found.by_primary:13.0f}"
        yield f"{share:5.2f}  {figures}  {bar}"


def _returning() -> Iterator[str]:
    most = Policy().pool_size + Policy().max_overflow
    yield (
        f"at once it would be {PROCESSES * most} connections within {Policy().probe_interval:g} s;"
        " opened in each second after its return (`#` is 50):"
    )
    plain = primary_returns(PROCESSES, Policy(), Random(1))
    yield from _return_lines("connections_per_node not set", plain)
    yield from _return_lines(
        "connections_per_node 1000", primary_returns(PROCESSES, BUDGET, Random(1))
    )


def _return_lines(name: str, found: Return) -> Iterator[str]:
    yield f"{name}: all have found it after {found.found:.1f} s, {found.most} in the worst 0.1 s"
    for second, count in enumerate(found.per_second):
        if second < 14:
            yield f"{second:6} s  {count:5}  {'#' * round(count / 50)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
