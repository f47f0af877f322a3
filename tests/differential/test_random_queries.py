"""Random queries over random schemas, on 1 to 4 shards: each is exact, or refused.

``make differential`` compares 20,000; here it is 1,500. The seed is printed, and makes the same
worlds, rows and queries again: ``python -m tests.differential 1500 --seed N``.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from sqlroute.testing import TopologyFactory

from .campaign import run

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

COUNT = int(os.environ.get("SQLROUTE_DIFFERENTIAL", "1500"))


def test_every_answer_is_that_of_one_server_or_refused(
    sqlroute_topology_factory: TopologyFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers = sqlroute_topology_factory(shards=4, replicas=0, label="differential")
    seed = random.SystemRandom().randrange(10**6)

    report = run(servers, COUNT, seed)

    lines = "\n".join(report.lines())
    with capsys.disabled():
        print(f"\n{lines}")
    assert report.different == [], lines
    assert report.total == COUNT
    assert report.scattered > COUNT / 2  # else it has proved little
    unlisted = {reason.partition(":")[0] for reason in report.refused} - listed_clauses()
    assert not unlisted, "docs/explanation/exactness.md does not say that these are refused"


def listed_clauses() -> set[str]:
    """Return the clauses in the list of what is refused."""
    page = Path(__file__).parents[2] / "docs" / "explanation" / "exactness.md"
    table = page.read_text().partition("## What is refused, in one list")[2]
    rows = (line for line in table.splitlines() if line.startswith("| `"))
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
