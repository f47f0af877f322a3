"""The demo keeps its promises, and would say so if it did not."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from sqlroute.cli import main
from sqlroute.demo.dataset import COUNTS
from sqlroute.errors import LocalTopologyError

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["demo", "--json"])
    found: dict[str, Any] = json.loads(out.getvalue())
    assert code == (0 if found["ok"] else 1)
    return found


def step(document: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in document["steps"] if s["name"] == name)
    return found


def test_every_step_passes_in_a_minute(document: dict[str, Any]) -> None:
    """All five, with their plans and times, within the time a visitor has."""
    assert [(found["name"], found["ok"]) for found in document["steps"]] == [
        ("keyed_read", True),
        ("own_write", True),
        ("top_ten", True),
        ("aggregate", True),
        ("replica_killed", True),
    ]
    assert all(found["ms"] > 0 and found["plan"] for found in document["steps"])
    assert document["seconds"] < 60


def test_every_row_is_there_once(document: dict[str, Any]) -> None:
    """Sharded rows on one shard each, none of them empty; reference rows on every shard."""
    per_shard = document["rows"].values()

    assert len(per_shard) == 2
    for table in ("flights", "planes"):
        assert sum(held[table] for held in per_shard) == COUNTS[table]
        assert all(held[table] > 0 for held in per_shard)
    for table in ("airlines", "airports"):
        assert [held[table] for held in per_shard] == [COUNTS[table]] * 2


def test_a_keyed_read_is_answered_by_one_replica(document: dict[str, Any]) -> None:
    """The node of the plan is the one that answered, and no primary."""
    found = step(document, "keyed_read")

    (target,) = found["plan_document"]["targets"]
    assert target["role"] == "replica"
    assert target["node"] == found["facts"]["node"]
    assert found["facts"]["rows"] == found["facts"]["expected_rows"] > 10


def test_the_own_write_is_read_while_no_replica_has_it(document: dict[str, Any]) -> None:
    """The row came from the primary, both replicas did not have it, and had it later."""
    found = step(document, "own_write")

    assert found["plan_document"]["targets"][0]["role"] == "primary"
    assert found["facts"]["rows"] == 1
    assert len(found["facts"]["replicas_without_row"]) == 2
    assert found["facts"]["asked_after_ms"] < 3000
    assert found["facts"]["replicas_with_row_later"] == found["facts"]["replicas_without_row"]


@pytest.mark.parametrize(("name", "rows"), [("top_ten", 10), ("aggregate", 16)])
def test_answers_over_two_shards_equal_one_server(
    document: dict[str, Any], name: str, rows: int
) -> None:
    """The merged rows are those of the database that holds everything."""
    found = step(document, name)

    assert found["plan_document"]["tier"] == "scatter"
    assert len(found["facts"]["shards"]) == 2
    assert found["facts"]["equal"] is True
    assert found["facts"]["rows"] == len(found["rows"]) == rows


def test_no_read_fails_when_a_replica_is_killed(document: dict[str, Any]) -> None:
    """The killed replica answered before and not after; every read was answered."""
    facts = step(document, "replica_killed")["facts"]

    assert facts["was_down"] is True
    assert facts["from_victim_before"] > 0
    assert facts["from_victim_after"] == 0
    assert facts["failures"] == 0
    assert facts["reads_after"] >= 800


def test_a_directory_with_servers_is_not_taken_over(
    sqlroute_topology: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo deletes its servers at the end, so it never uses somebody's."""
    directory: Path = sqlroute_topology.directory

    assert main(["demo", "--dir", str(directory)]) == 1
    assert "holds servers already" in capsys.readouterr().err
    assert all(node.is_running for node in sqlroute_topology.nodes)


def test_a_bad_directory_is_a_clear_error(tmp_path: Path) -> None:
    """Nothing is deleted where the demo could not start."""
    from sqlroute.demo.run import run

    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(LocalTopologyError, match="not empty"):
        run(directory=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
