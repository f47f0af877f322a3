"""The operators' commands as programs and people see them: exit codes, documents, refusals."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from promoting import SHARD, Promoting, Stage, kill_at

from sqlroute.cli import main
from sqlroute.ops import commands
from sqlroute.ops.server import wait_for
from sqlroute.testing import TopologyFactory, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

Run = Callable[..., tuple[int, str, str]]

PLAN = {
    *("operation", "kind", "shard", "epoch", "former", "candidate", "siblings", "fence"),
    *("rejoins", "checks", "refused", "steps"),
}
REPORT = {
    *("operation", "kind", "shard", "outcome", "epoch", "primary", "former", "fence"),
    *("write_pause_ms", "acknowledged", "loss", "steps", "waiting"),
}
OPERATION = {"operation", "kind", "shard", "state", "owner", "started", "finished"}


@pytest.fixture(scope="module")
def whole_stage(sqlroute_topology_factory: TopologyFactory) -> Iterator[Stage]:
    stage = Stage(sqlroute_topology_factory(shards=1, replicas=2, label="operations"))
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Stage:
    whole_stage.mend()
    return whole_stage


@pytest.fixture
def run(stage: Stage, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program; no answer holds a password or a traceback."""

    def run(*arguments: str, config: Path = stage.servers.config_path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*arguments, "--config", str(config)])
        out, err = capsys.readouterr()
        assert stage.servers.nodes[0].password.reveal() not in out + err
        assert "Traceback" not in err
        return code, out, err

    return run


def refused(run: Run, stage: Stage, *arguments: str, **how: Any) -> str:
    """Run what is to be refused: exit code 5, and nothing is another than before."""
    before = stage.snapshot()

    code, out, err = run(*arguments, "--json", **how)

    assert code == 5, (code, out, err)
    assert stage.snapshot() == before
    return str(json.loads(out).get("error", {}).get("message") or json.loads(out)["refused"])


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("promote", "s9", "--yes"), "unknown shard 's9'; known: s0"),
        (("promote", "s0", "--to", "s0-q", "--yes"), "has no node 's0-q'; known: s0-a"),
        (("promote", "s0"), "say --yes if that is meant"),
        (("failover", "s9", "--yes"), "unknown shard 's9'"),
        (("failover", "s0", "--yes"), "is the primary of shard s0 and answers"),
        (("rejoin", "s9-a", "--yes"), "unknown node 's9-a'; known: s0-a"),
        (("fence", "s9-a", "--yes"), "unknown node 's9-a'"),
        (("fence", "s0-a"), "say --yes if that is meant"),
        (("fence", "s0-a", "--level", "L5", "--yes"), "fence L5 is not possible on s0-a"),
        (("unfence", "s9-a"), "unknown node 's9-a'"),
        (("replica", "remove", "s9-a", "--yes"), "unknown node 's9-a'"),
        (("replica", "add", "s9", "x", "h:1"), "unknown shard 's9'"),
        (("replica", "add", "s0", "x", "h:1:2"), "write it as"),
        (("op", "show", "nothing"), "unknown operation 'nothing'; `sqlroute op list`"),
        (("op", "resume", "nothing"), "unknown operation 'nothing'"),
        (("op", "abort", "nothing"), "unknown operation 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused(
    stage: Stage, run: Run, arguments: tuple[str, ...], why: str
) -> None:
    assert why in refused(run, stage, *arguments)


def test_the_primary_is_not_its_own_successor(stage: Stage, run: Run) -> None:
    said = refused(run, stage, "promote", SHARD, "--to", stage.primary, "--yes")

    assert "is the primary of shard s0 already" in said


@contextlib.contextmanager
def replay_paused(stage: Stage, node: str) -> Iterator[None]:
    stage.nodes[node].pause_replay()
    try:
        yield
    finally:
        stage.nodes[node].resume_replay()


def test_a_candidate_whose_replay_is_paused_is_refused(stage: Stage, run: Run) -> None:
    """Unless another can be: the best one is taken."""
    (paused, other) = stage.replicas
    with replay_paused(stage, paused):
        said = refused(run, stage, "promote", SHARD, "--to", paused, "--yes")
        code, out, _ = run("promote", SHARD, "--dry-run", "--json")

    assert "pg_wal_replay_resume()" in said
    assert (code, json.loads(out)["candidate"]) == (0, other)


def test_a_candidate_that_is_behind_is_refused(stage: Stage, run: Run) -> None:
    """By the bytes that it has not replayed."""
    node = stage.replicas[0]
    with replay_paused(stage, node):
        with stage.client(stage.primary) as connection:
            connection.execute("CREATE TABLE ballast AS SELECT generate_series(1, 9999) AS n")
        arguments = ("promote", SHARD, "--to", node, "--max-lag-bytes", "1000", "--yes")
        said = refused(run, stage, *arguments)
    with stage.client(stage.primary) as connection:
        connection.execute("DROP TABLE ballast")

    assert re.search(r"is \d+ bytes behind s0-. \(limit 1000\)", said)


def test_a_candidate_that_replays_late_is_refused(stage: Stage, run: Run) -> None:
    node = stage.replicas[0]
    stage.nodes[node].hold_replay(1.5)
    try:
        said = refused(run, stage, "promote", SHARD, "--to", node, "--yes")
    finally:
        stage.nodes[node].hold_replay(0)

    assert "replays 1500 ms late (recovery_min_apply_delay)" in said


def test_a_cascading_candidate_is_refused(stage: Stage, run: Run) -> None:
    (middle, last) = stage.replicas
    with stage.server(last) as server:
        server.follow("127.0.0.1", stage.nodes[middle].port)
    assert wait_for(lambda: stage.look().facts[last].upstream == middle, timeout=10, pause=0.05)

    said = refused(run, stage, "promote", SHARD, "--to", last, "--yes")

    assert f"{last} receives from {middle}, not from" in said
    stage.rejoin(last)


def test_a_node_of_another_timeline_is_refused(stage: Stage, run: Run) -> None:
    """It was promoted by somebody behind our back: two primaries, and nobody knows which."""
    stray = stage.replicas[0]
    stage.tell(stray, "SELECT pg_promote()")
    try:
        said = refused(run, stage, "promote", SHARD, "--yes")
    finally:
        stage.nodes[stray].stop()
        stage.rejoin(stray, clones=True) if _is_primary_elsewhere(stage, stray) else None

    assert "has 2 nodes that are primaries" in said
    assert "sqlroute fence" in said


def _is_primary_elsewhere(stage: Stage, node: str) -> bool:
    return stage.primary != node


def test_no_candidate_at_all_is_refused(stage: Stage, run: Run) -> None:
    for name in stage.replicas:
        stage.nodes[name].stop()
    try:
        code, out, _ = run("promote", SHARD, "--yes", "--json")
    finally:
        for node in stage.nodes.values():
            node.start()

    assert code == 5
    assert "does not answer" in json.loads(out)["error"]["message"]


def test_a_shard_of_one_node_is_refused(
    sqlroute_topology_factory: TopologyFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Stage(sqlroute_topology_factory(shards=1, replicas=0, label="operations on one"))

    code = main(["promote", SHARD, "--yes", "--config", str(one.servers.config_path)])

    assert code == 5
    assert "nothing to promote; add one with `sqlroute replica add`" in capsys.readouterr().err
    one.close()


def test_a_shard_without_a_catalog_is_refused(
    sqlroute_topology_factory: TopologyFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing could be written down, and no router told."""
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="operations without catalog")

    code = main(["promote", SHARD, "--yes", "--config", str(servers.config_path)])

    assert code == 5
    assert "run `sqlroute catalog install`" in capsys.readouterr().err


def test_a_catalog_that_cannot_be_written_is_refused(stage: Stage) -> None:
    """By a role that may do all the rest."""
    primary = stage.primary
    stage.tell(
        primary,
        "CREATE ROLE reader LOGIN PASSWORD 'of the reader'",
        "GRANT pg_monitor TO reader",
        "GRANT USAGE ON SCHEMA sqlroute TO reader",
        "GRANT SELECT ON ALL TABLES IN SCHEMA sqlroute TO reader",
    )
    stage.await_whole()

    settings = stage.as_role("reader", "of the reader", stage.settings)
    plan = commands.plan_promotion(settings, SHARD, _wishes())

    assert any("GRANT INSERT, UPDATE ON ALL TABLES" in text for text in plan.refusals)


def _wishes() -> Any:
    from sqlroute.ops.planning import Wishes

    return Wishes()


def test_a_base_backup_is_not_broken(stage: Stage, run: Run) -> None:
    """It would fail with the server that it copies."""
    primary = stage.primary
    with stage.client(primary, replication="yes") as walsender:
        # its result is not read: the server waits for us, in the middle of the backup
        walsender.pgconn.send_query(b"BASE_BACKUP (LABEL 'x', CHECKPOINT 'fast')")
        walsender.pgconn.flush()
        running = "SELECT count(*) FROM pg_stat_progress_basebackup"
        assert wait_for(lambda: stage.ask(primary, running), timeout=10, pause=0.02)

        code, out, _ = run("promote", SHARD, "--yes", "--json")
        walsender.pgconn.finish()

    assert code == 5
    assert "base backup(s) run on" in json.loads(out)["error"]["message"]


def test_a_server_of_another_engine_is_refused(stage: Stage, run: Run) -> None:
    """Patroni's own session is there: it would undo a promotion in SQL."""
    with stage.client(stage.primary, application_name="Patroni heartbeat"):
        code, out, _ = run("promote", SHARD, "--yes", "--json")

    assert code == 5
    assert "run by another engine" in json.loads(out)["error"]["message"]
    assert "Patroni" in out


def test_of_two_commands_one_is_refused(stage: Stage, run: Run) -> None:
    """The second one names who is at work, and where to look."""
    is_asking, may_go = threading.Event(), threading.Event()

    def agree(_: Any) -> None:
        is_asking.set()
        may_go.wait(30)

    first = threading.Thread(
        target=commands.promote, args=(stage.settings, SHARD, _wishes()), kwargs={"agree": agree}
    )
    first.start()
    assert is_asking.wait(30)
    codes = {}
    for verb in (("promote", SHARD), ("rejoin", stage.replicas[0]), ("failover", SHARD)):
        code, out, _ = run(*verb, "--yes", "--json")
        codes[verb[0]] = code
        assert "another command works on shard s0 (session " in out
        assert "sqlroute op list" in out
    may_go.set()
    first.join(60)

    assert set(codes.values()) == {5}
    stage.await_whole()


# What programs read


def test_a_dry_run_shows_the_plan_and_changes_nothing(stage: Stage, run: Run) -> None:
    before = stage.snapshot()

    code, out, err = run("promote", SHARD, "--dry-run", "--json")
    plan = json.loads(out)

    assert (code, err) == (0, "")
    assert plan.keys() == PLAN
    assert plan["former"] == stage.primary
    assert [step["step"] for step in plan["steps"]][-1] == "close"
    assert {check["outcome"] for check in plan["checks"]} <= {"ok", "warning"}
    assert stage.snapshot() == before


def test_a_dry_run_of_a_refused_plan_shows_all_of_it(stage: Stage, run: Run) -> None:
    with replay_paused(stage, stage.replicas[0]):
        code, out, _ = run("promote", SHARD, "--to", stage.replicas[0], "--dry-run", "--json")

    assert code == 5
    assert json.loads(out)["refused"]
    assert json.loads(out)["steps"] == []


def test_people_see_progress_on_stderr_and_programs_one_document(stage: Stage, run: Run) -> None:
    """stdout is a pipe: nothing but the document is ever on it."""
    code, out, err = run("promote", SHARD, "--yes", "--json")
    report = json.loads(out)

    assert (code, err) == (0, "")
    assert report.keys() == REPORT
    assert (report["outcome"], report["primary"]) == ("done", stage.primary)
    assert report["acknowledged"]["routers"] == 1
    code, out, err = run("promote", SHARD, "--yes")
    assert (code, out) == (0, "")
    for step in ("record", "hold", "fence", "promote", "announce", "rejoin"):
        assert re.search(rf"✓ {step} +\d+\.\d ms", err), step
    assert "write pause" in err

    code, out, _ = run("op", "list", "--json")
    newest, *_ = json.loads(out)["operations"]
    assert newest.keys() == OPERATION
    assert newest["state"] == "done"
    code, out, _ = run("op", "show", newest["operation"], "--json")
    shown = json.loads(out)
    assert shown.keys() == OPERATION | {"steps", "plan", "report"}
    assert [step["name"] for step in shown["steps"]][:2] == ["record", "checkpoint"]
    assert shown["report"]["outcome"] == "done"
    code, _, err = run("op", "show", newest["operation"])
    assert (code, "catch_up" in err) == (0, True)
    code, out, _ = run("op", "resume", newest["operation"], "--json")
    assert (code, "has ended: it is done" in out) == (5, True)


def test_a_failover_document_says_what_is_lost(stage: Stage, run: Run) -> None:
    former = stage.primary
    stage.nodes[former].kill()

    code, out, _ = run("failover", SHARD, "--dry-run", "--accept-data-loss", "--json")
    assert (code, json.loads(out).keys()) == (0, PLAN)
    code, out, err = run("failover", SHARD, "--yes", "--accept-data-loss", "--json")
    report = json.loads(out)

    assert (code, err) == (0, "")
    assert report.keys() == REPORT
    assert report["loss"].keys() >= {"chosen", "position", "newest", "known_bytes", "text"}
    assert list(report["waiting"]) == [former]
    code, out, _ = run("rejoin", former, "--yes", "--json")
    assert (code, json.loads(out)["primary"]) == (0, report["primary"])


def test_an_operation_that_was_killed_is_resumable(stage: Stage, run: Run) -> None:
    """Exit code 4 is for who has to go on; the list says which."""
    kill_at(stage, Promoting("promote"), "promote", "done")

    code, out, _ = run("op", "list", "--json")
    newest = json.loads(out)["operations"][0]
    said = refused_while(run, "promote", SHARD, "--yes")
    failed, _, err = run("op", "abort", newest["operation"])
    code, out, _ = run("op", "resume", newest["operation"], "--json")

    assert newest["state"] == "abandoned"
    assert f"sqlroute op resume {newest['operation']}" in said
    assert failed == 4
    assert "it can only be finished" in err.replace("\n", " ") or "can only be" in err
    assert (code, json.loads(out)["outcome"]) == (0, "done")
    stage.await_whole()


def refused_while(run: Run, *arguments: str) -> str:
    code, out, _ = run(*arguments, "--json")
    assert code == 5, out
    return out


def test_a_failure_that_was_taken_back_is_exit_code_1(
    stage: Stage, run: Run, tmp_path: Path
) -> None:
    """Nothing has to be gone on with."""
    text = stage.servers.config_path.read_text()
    config = tmp_path / "sqlroute.toml"
    config.write_text(text.replace('kind = "local"', 'kind = "local", fence = ["false"]'))

    code, out, _ = run("promote", SHARD, "--fence", "L5", "--yes", "--json", config=config)

    assert code == 1
    assert "everything was taken back" in json.loads(out)["error"]["message"]
    stage.await_whole()


def test_an_incomplete_end_is_exit_code_4(stage: Stage, run: Run) -> None:
    """The promotion is done; a node has to be rejoined by hand."""
    sibling = stage.replicas[1]
    stage.nodes[sibling].stop()

    code, out, _ = run("promote", SHARD, "--to", stage.replicas[0], "--yes", "--json")

    assert code == 4
    assert f"sqlroute rejoin {sibling}" in json.loads(out)["waiting"][sibling]
    assert run("rejoin", sibling, "--yes")[0] == 0
    stage.await_whole()


def test_fences_and_replicas_have_documents(stage: Stage, run: Run) -> None:
    name = stage.replicas[0]

    code, out, _ = run("fence", name, "--level", "L3", "--yes", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"node": name, "shard": SHARD, "fence": "L3", "ended": json.loads(out)["ended"]},
    )
    with pytest.raises(psycopg.OperationalError):
        stage.client(name)
    code, out, _ = run("unfence", name, "--json")
    assert (code, json.loads(out).keys()) == (0, {"node", "shard", "settings"})
    code, out, err = run("replica", "add", SHARD, "s0-cli", f"127.0.0.1:{free_ports(1)}", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["node"] == "s0-cli"
    code, out, _ = run("replica", "remove", "s0-cli", "--yes", "--json")
    assert (code, json.loads(out)["server"]) == (0, "stopped")
    assert run("replica", "remove", "s0-cli", "--yes")[0] == 5
