"""Run a part of the suite in several processes and return what became of each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sqlroute.local.topology import LocalTopology
from tests.upstream.servers import make_database
from tests.upstream.settings import VARIABLE, Settings
from tests.upstream.source import unpack

RESULTS, OUTPUT = "results.json", "output.txt"
PROJECT = Path(__file__).parents[2]
OPTIONS = (
    *("-o", "addopts=", "-q", "--tb=short", "-rN", "--no-header", "--strict-markers"),
    *("-p", "warnings", "-p", "no:logging", "-p", "no:cacheprovider"),
    *("-p", "pytest_timeout", "--timeout=180", "-p", "tests.upstream.plugin"),
)


@dataclass(slots=True)
class Outcome:
    """What became of the tests of one run.

    Attributes:
        tests: outcome by test: ``passed``, ``skipped`` or ``failed``.
        texts: why it failed or was skipped.
        counts: statements by who answered.
        broken: processes that did not come to their end, with their last words.
    """

    tests: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [name for name, outcome in self.tests.items() if outcome == "failed"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of some files of the suite.

    Attributes:
        mode: see :class:`tests.upstream.settings.Settings`.
        files: paths inside the sdist.
        is_async: on the async driver.
        stale_writes: of the sessions, ``check`` or ``allow``.
    """

    mode: str
    files: tuple[str, ...]
    is_async: bool = False
    stale_writes: str = "allow"


def run(it: Run, topology: LocalTopology, archive: Path, processes: int) -> Outcome:
    """Run files of the suite, spread over processes, each with a database and a directory."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="sqlroute-upstream-", dir="/var/tmp") as parent:
        roots = [unpack(archive, Path(parent, str(index))) for index in range(processes)]
        shares = _shares(it.files, roots[0], processes)
        started: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for index, (share, root) in enumerate(zip(shares, roots, strict=True)):
                if share:
                    started.append(_start(it, share, root, topology, f"test{index}"))
            for process, _ in started:
                process.wait()
        finally:
            for process, _ in started:
                process.kill()  # of one that has ended it is nothing
                process.wait()
        for _, directory in started:
            _read(directory, outcome)
    return outcome


def _read(directory: Path, outcome: Outcome) -> None:
    results = directory / RESULTS
    if not results.exists():
        said = (directory / OUTPUT).read_text(errors="replace").splitlines()
        outcome.broken.append("\n".join(said[-30:]))
        return
    document = json.loads(results.read_text())
    for name, found in document["tests"].items():
        outcome.tests[name] = found["outcome"]
        outcome.texts[name] = found["text"]
    outcome.counts.update(document["counts"])


def _start(
    it: Run, share: list[str], root: Path, topology: LocalTopology, database: str
) -> tuple[subprocess.Popen[bytes], Path]:
    primary = topology.nodes[0]
    make_database(primary, database)
    told = Settings(
        mode=it.mode,
        nodes=tuple((node.conninfo["host"], node.port) for node in topology.nodes),
        database=database,
        user=primary.user,
        password=primary.password.reveal(),
        stale_writes=it.stale_writes,
        results=str(root.parent / RESULTS),
    )
    driver = "psycopg" if it.mode == "plain" else "sqlroute"
    url = told.url(f"{driver}_async" if it.is_async else driver)
    environment = {
        **os.environ,
        VARIABLE: told.dump(),
        "PYTHONPATH": str(PROJECT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    # -s: the suite then tests the SQLAlchemy that is installed, not the one beside it
    command = (sys.executable, "-s", "-m", "pytest", *OPTIONS, "--dburi", url, *share)
    with (root.parent / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    return process, root.parent


def _shares(files: tuple[str, ...], root: Path, processes: int) -> list[list[str]]:
    """Spread files so that each process gets about the same number of bytes of tests."""
    found = sorted(
        {path for name in files for path in _expanded(root / name)},
        key=lambda path: (-path.stat().st_size, path),
    )
    shares: list[list[str]] = [[] for _ in range(processes)]
    weights = [0] * processes
    for path in found:
        lightest = weights.index(min(weights))
        shares[lightest].append(str(path.relative_to(root)))
        weights[lightest] += path.stat().st_size
    return shares


def _expanded(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.rglob("test_*.py") if "py314" not in p.name)
    return sorted(path.parent.glob(path.name))


__all__ = ["Outcome", "Run", "run"]
