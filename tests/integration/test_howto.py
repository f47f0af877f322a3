"""The how-to pages that a new user follows: their commands run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sqlroute.testing import free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Give a directory that the servers' user can pass, and see that nothing runs there after."""
    with tempfile.TemporaryDirectory(prefix="sqlroute-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        try:
            yield path
        finally:
            run("sqlroute local down --delete --yes || true", path)


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("SQLROUTE_CONFIG", None)
    return subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def test_promote(directory: Path) -> None:
    """Dry run, switchover, failover after kill -9, rejoin, more and fewer nodes, a fence."""
    page = (PAGES / "promote.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)
    (directory / "writer.py").write_text(program)
    port = free_ports(4)
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.M))
    script = script.replace("--replicas 2", f"--replicas 2 --port {port}")
    script = script.replace("127.0.0.1:15499", f"127.0.0.1:{port + 3}")

    found = run(f"set -e\n{script}", directory)

    assert found.returncode == 0, found.stderr[-3000:]
    assert "longest time between two writes" in found.stdout
    assert found.stderr.count("done:") == 2
    assert "s0-b follows" in found.stderr
    assert "s0-d is a replica of shard s0" in found.stderr
