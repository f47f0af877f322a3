"""The examples of the README and of docs run as they are printed, one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "shards"),
    [
        ("README.md", 2),
        ("docs/sessions.md", 1),
        ("docs/failover.md", 1),
        ("docs/how-to/coordinator.md", 2),
        ("docs/explanation/exactness.md", 2),
        ("docs/reference/keys.md", 2),
    ],
)
def test_examples_run(
    page: str, shards: int, tmp_path: Path, sqlroute_topology_factory: TopologyFactory
) -> None:
    """Any error, or warning, fails."""
    servers = sqlroute_topology_factory(shards=shards, replicas=2, label="docs")
    (tmp_path / "sqlroute-local").mkdir()
    config = tmp_path / "sqlroute-local" / "sqlroute.toml"
    config.write_text(servers.config_path.read_text())
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.M)
    assert len(blocks) >= 2
    program = tmp_path / "app.py"
    program.write_text("\n".join(blocks))

    found = subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert found.returncode == 0, found.stderr
