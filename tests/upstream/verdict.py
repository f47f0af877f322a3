"""Compare what became of the tests with what may fail: ``known.toml`` and the baseline."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.upstream.runs import Outcome

LIMIT = 45
"""Tests that ``known.toml`` may excuse in one run."""

RUNS = ("same-server", "async", "standby")


@dataclass(frozen=True, slots=True)
class Entry:
    """Tests that may fail.

    Attributes:
        test: id of a test, with ``*`` for any text.
        runs: names of the runs it is for.
    """

    test: str
    reason: str
    runs: tuple[str, ...] = RUNS

    def covers(self, name: str) -> bool:
        pattern = ".*".join(re.escape(part) for part in self.test.split("*"))
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a run; nothing, if all are empty.

    Attributes:
        failures: tests that failed and may not.
        lost: tests that pass in the baseline and were skipped or not run here.
        obsolete: entries that fail no longer, with the test that does not.
        excused: tests that failed and may.
        broken: last words of processes that did not come to their end.
    """

    failures: tuple[str, ...]
    lost: tuple[str, ...]
    obsolete: tuple[str, ...]
    excused: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        wrong = self.failures or self.lost or self.obsolete or self.broken
        return not wrong and len(self.excused) <= LIMIT


def read(path: Path) -> tuple[Entry, ...]:
    """Read ``known.toml``.

    Raises:
        SystemExit: an entry is not as it must be.
    """
    found = []
    for row in tomllib.loads(path.read_text()).get("known", ()):
        runs = tuple(row.get("runs", RUNS))
        unknown = {*row} - {"test", "reason", "runs"} or {*runs} - {*RUNS}
        if unknown or not row.get("test") or not row.get("reason"):
            raise SystemExit(f"{path.name}: an entry has a test, a reason and maybe runs: {row}")
        found.append(Entry(row["test"], row["reason"], runs))
    return tuple(found)


def judge(
    name: str, outcome: Outcome, entries: tuple[Entry, ...], baseline: Outcome | None
) -> Verdict:
    """Judge one run.

    Args:
        name: of the run, see :data:`RUNS`.
        baseline: of a Session that changes nothing; what fails there says nothing about ours.
    """
    mine = [entry for entry in entries if name in entry.runs]
    plain = set(baseline.failed) if baseline is not None else set()
    excused = [test for test in outcome.failed if any(entry.covers(test) for entry in mine)]
    failures = [test for test in outcome.failed if test not in {*plain, *excused}]
    lost: list[str] = []
    if baseline is not None:
        ran = {"passed", "failed"}
        lost = [
            test
            for test, was in baseline.tests.items()
            if was == "passed" and outcome.tests.get(test) not in ran
        ]
    obsolete = [
        f"{entry.test} ({test} passes)"
        for entry in mine
        for test, was in outcome.tests.items()
        if was == "passed" and entry.covers(test)
    ]
    found = (failures, lost, obsolete, excused, outcome.broken)
    return Verdict(*(tuple(sorted(names)) for names in found))
