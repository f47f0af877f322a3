"""Every command against real servers, with good and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine
from sqlalchemy.pool import StaticPool

import sqlroute
from sqlroute.catalog.tables import read_tables
from sqlroute.cli import main
from sqlroute.local.topology import LocalTopology
from sqlroute.routing.sqltext import Role
from sqlroute.testing import TopologyFactory, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

metadata = MetaData()
Table(
    "cli_orders",
    metadata,
    Column("customer", Text, primary_key=True),
    Column("id", Integer, primary_key=True),
    **sqlroute.sharded_by("customer"),
)
Table(
    "cli_kinds",
    metadata,
    Column("id", Integer, primary_key=True),
    **sqlroute.reference_table(),
)

STATEMENTS = """
from sqlalchemy import Column, Integer, MetaData, Table, Text, bindparam, func, select
import sqlroute
orders = Table("cli_orders", MetaData(), Column("customer", Text, primary_key=True),
               Column("id", Integer, primary_key=True), **sqlroute.sharded_by("customer"))
keyed = select(orders).where(orders.c.customer == bindparam("who"))
def top():
    return select(orders.c.id).order_by(orders.c.id).limit(3)
refused = select(func.count(orders.c.id.distinct()))
broken = lambda: 1 / 0
number = 3
"""

Run = Callable[..., tuple[int, str, str]]
Json = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def topology(sqlroute_topology: LocalTopology) -> Iterator[LocalTopology]:
    with sqlroute.Router.from_config(sqlroute_topology.config_path) as router:
        router.create_all(metadata)
        yield sqlroute_topology
        router.drop_all(metadata)


@pytest.fixture
def run(
    topology: LocalTopology, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run the command line; no output may hold the password."""
    monkeypatch.setenv("SQLROUTE_CONFIG", str(topology.config_path))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        assert topology.nodes[0].password.reveal() not in out + err
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def run_json(run: Run) -> Json:
    """Run a command with --json: stdout is one document, whatever happens."""

    def run_json(*arguments: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = run(*arguments, "--json")
        return code, json.loads(out)

    return run_json


@pytest.fixture
def statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "cli_statements.py").write_text(STATEMENTS)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield "cli_statements"
    sys.path[:] = path
    sys.modules.pop("cli_statements", None)


# status


def test_status_shows_roles_positions_and_lag(run_json: Json) -> None:
    """What is shown was observed: one primary a shard, replicas with both measures of lag."""
    code, document = run_json("status")

    roles = [(node["shard"], node["role"]) for node in document["nodes"]]
    assert code == 0
    assert document["healthy"] is True
    assert roles == [(s, r) for s in ("s0", "s1") for r in ("primary", "replica", "replica")]
    for node in document["nodes"]:
        assert node["state"] == "up"
        assert node["timeline"] >= 1
        assert "/" in node["lsn"]
        assert node["rtt_ms"] > 0
        if node["role"] == "replica":
            assert node["lag_bytes"] >= 0
            assert node["lag_seconds"] >= 0
    assert [shard["primary"] for shard in document["shards"]] == ["s0-a", "s1-a"]


def test_humans_read_stderr(run: Run) -> None:
    """Without --json stdout stays empty, so that it can be a pipe."""
    code, out, err = run("status")

    assert code == 0
    assert out == ""
    assert "s1-c" in err
    assert "healthy" in err


def test_status_of_broken_nodes_is_exit_code_3(
    sqlroute_topology_factory: TopologyFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A primary that is gone and a replica that hangs are both named, with the reason."""
    broken = sqlroute_topology_factory(shards=2, replicas=1, label="cli-broken")
    broken.node("s0-a").kill()
    broken.node("s1-b").pause()
    try:
        started = time.monotonic()
        code = main(["status", "--json", "--config", str(broken.config_path)])
        took = time.monotonic() - started
    finally:
        broken.node("s1-b").resume()
        broken.node("s0-a").start()
    document = json.loads(capsys.readouterr().out)

    assert code == 3
    assert document["healthy"] is False
    assert "shard s0 has no primary" in document["faults"]
    assert any(f.startswith("node s0-a is down: ") for f in document["faults"])
    assert any(f.startswith("node s1-b is") and "no answer" in f for f in document["faults"])
    assert took < 10


def test_status_refuses_a_node_of_another_cluster(
    topology: LocalTopology, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that belongs to another shard's cluster is told apart by its system identifier."""
    text = topology.config_path.read_text()
    mixed = tmp_path / "mixed.toml"
    a, b = topology.node("s0-c"), topology.node("s1-c")
    mixed.write_text(
        text.replace(f":{a.port}/", ":0/").replace(f":{b.port}/", f":{a.port}/")
        .replace(":0/", f":{b.port}/")
    )  # fmt: skip

    code = main(["status", "--json", "--config", str(mixed)])
    document = json.loads(capsys.readouterr().out)

    refused = [node["node"] for node in document["nodes"] if node["refused"]]
    assert code == 3
    assert refused == ["s0-c", "s1-c"]


# shard


def test_locate_finds_the_row_where_it_says(run_json: Json, topology: LocalTopology) -> None:
    """The named partition on the named node takes a row with that key."""
    code, place = run_json("shard", "locate", "cli_orders", "alice")

    node = topology.node(place["primary"])
    with psycopg.connect(**node.conninfo) as connection:
        connection.execute("INSERT INTO cli_orders VALUES ('alice', 1)")
        found = connection.execute("SELECT tableoid::regclass::text FROM cli_orders").fetchone()
        connection.rollback()
    assert code == 0
    assert place["key"] == {"customer": "alice"}
    assert place["leaf"] == f"cli_orders_b{place['bucket']:03d}"
    assert node.shard == place["shard"]
    assert found == (place["leaf"],)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope", "1"), "unknown table 'nope'; sharded tables: cli_orders"),
        (("cli_kinds", "1"), "table cli_kinds is not sharded"),
        (("keyspace", "1"), "keyspace"),
        (("cli_orders", "a", "b"), "1 value(s), not 2"),
    ],
)
def test_locate_refuses_what_has_no_place(run: Run, arguments: tuple[str, ...], words: str) -> None:
    """Unknown tables, unsharded ones, a key with too many columns."""
    code, _, err = run("shard", "locate", *arguments)

    assert code == 2
    assert words in err


def test_map_gives_each_bucket_to_one_shard(run_json: Json) -> None:
    """The map is read from the catalog: all buckets, with the epoch."""
    code, document = run_json("shard", "map")

    (found,) = document["keyspaces"]
    buckets = sorted(bucket for shard in found["shards"] for bucket in shard["buckets"])
    assert code == 0
    assert found["epoch"] >= 1
    assert buckets == list(range(64))
    assert found["unowned"] == []


# explain


def test_explain_statement_is_the_plan_of_a_session(run_json: Json, statements: str) -> None:
    """A keyed select goes to one replica; a parameter is given as text."""
    code, document = run_json(
        "explain", "--statement", f"{statements}:keyed", "--param", "who=alice"
    )
    _, place = run_json("shard", "locate", "cli_orders", "alice")

    (target,) = document["targets"]
    assert code == 0
    assert document["tier"] == "single"
    assert target["shard"] == place["shard"]
    assert target["role"] == "replica"
    assert document["reasons"]


def test_explain_calls_a_callable_and_shows_the_merge(run: Run, statements: str) -> None:
    """The human view has the tier, every shard and the merge."""
    for _ in range(5):  # a replica that is met in the middle of replaying is said to be late
        code, _, err = run("explain", "--statement", f"{statements}:top")
        if "-> s0: replica s0-" in err:
            break

    assert code == 0
    assert "scatter (read)" in err
    assert "-> s0: replica s0-" in err
    assert "merge: limit 3 after merge" in err


def test_explain_tells_a_refusal_with_its_clause(run_json: Json, statements: str) -> None:
    """What cannot be answered exactly is refused, and the clause is a key of its own."""
    code, document = run_json("explain", "--statement", f"{statements}:refused")

    assert code == 1
    assert document["error"]["type"] == "CrossShardRefused"
    assert document["error"]["clause"] == "count(DISTINCT)"


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nothing", 2, "is not module:name"),
        ("no_such_module:x", 2, "no module 'no_such_module'"),
        ("cli_statements:nope", 2, "has no 'nope'"),
        ("cli_statements:number", 2, "no statement"),
        ("cli_statements:broken", 1, "ZeroDivisionError"),
    ],
)
def test_explain_names_what_is_wrong_with_a_statement(
    run: Run, statements: str, name: str, code: int, words: str
) -> None:
    """Bad names are usage; a callable that fails is a failure. One line each."""
    found, _, err = run("explain", "--statement", name)

    assert found == code
    assert words in err
    assert len(err.splitlines()) == 1


def test_explain_text_goes_where_its_key_is(run_json: Json) -> None:
    """SQL text is placed by the same hash, through the catalog of the server."""
    _, place = run_json("shard", "locate", "cli_orders", "alice")
    code, document = run_json(
        "explain", "SELECT * FROM cli_orders WHERE customer = :c", "--param", "c=alice"
    )
    _, write = run_json("explain", "DELETE FROM cli_orders WHERE customer = 'alice'")

    assert code == 0
    assert [target["shard"] for target in document["targets"]] == [place["shard"]]
    assert document["targets"][0]["role"] == "replica"
    assert "text()" in document["note"]
    assert write["targets"][0]["node"] == place["primary"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--consistency", "strong"), "consistency is strong"),
        (("--role", "primary"), "the caller asked for the primary"),
        (("--intent", "writing"), "the session will write"),
    ],
)
def test_explain_takes_what_a_session_asks_for(
    run_json: Json, statements: str, options: tuple[str, ...], reason: str
) -> None:
    """The plan says why, of text and of a statement alike."""
    for what in (
        ("SELECT * FROM cli_orders WHERE customer = 'alice'",),
        ("--statement", f"{statements}:keyed", "--param", "who=alice"),
    ):
        code, document = run_json("explain", *what, *options)

        assert code == 0
        assert document["targets"][0]["role"] == "primary"
        assert reason in document["targets"][0]["reason"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--consistency", "strict"), "unknown consistency 'strict'; known: eventual"),
        (("--role", "master"), "unknown role 'master'"),
        (("--intent", "read"), "unknown intent 'read'"),
        (("--token", "x"), "'x' is no part of a token"),
        (("--token", "moon@0.1.0/1"), "moon"),
    ],
)
def test_explain_names_a_wrong_wish(run: Run, options: tuple[str, ...], words: str) -> None:
    code, _, err = run("explain", "SELECT 1", *options)

    assert code in (1, 2)
    assert words in err


@pytest.mark.parametrize(
    ("sql", "code", "words"),
    [
        ("SELEC 1", 1, "cannot be parsed"),
        ("SELECT 1; SELECT 2", 1, "one statement"),
        ("SELECT * FROM nope", 2, "unknown table 'nope'"),
        ("SELECT * FROM cli_orders WHERE customer = :c", 2, "'c' is compared with a key"),
        ("SELECT count(*) FROM cli_orders", 1, "count(): SQL text is sent as it is"),
        ("DELETE FROM cli_orders", 1, "without its shard key (customer)"),
        ("INSERT INTO cli_kinds VALUES (1)", 1, "written on every shard"),
        ("SELECT * FROM cli_orders_b000", 1, "is a partition"),
        ("SELECT * FROM pg_class", 1, "a system table"),
    ],
)
def test_explain_text_refuses_with_the_reason(run: Run, sql: str, code: int, words: str) -> None:
    """Nothing is guessed of text: syntax, tables, parameters, shards."""
    found, _, err = run("explain", sql)

    assert found == code
    assert words in " ".join(err.split())


def test_tables_are_read_as_the_server_has_them(postgresql: psycopg.Connection[Any]) -> None:
    """Kinds, keys and roles; what is no table of ours is unknown, with the reason."""
    postgresql.execute("CREATE TABLE sharded (b uuid, a int, c numeric) PARTITION BY HASH (a, b)")
    postgresql.execute(
        "CREATE TABLE leaf PARTITION OF sharded FOR VALUES WITH (MODULUS 64, REMAINDER 1)"
    )
    postgresql.execute("CREATE TABLE strange (a numeric) PARTITION BY HASH (a)")
    postgresql.execute("CREATE TABLE other (a int) PARTITION BY HASH (a)")
    postgresql.execute(
        "CREATE TABLE o1 PARTITION OF other FOR VALUES WITH (MODULUS 4, REMAINDER 1)"
    )
    postgresql.execute('CREATE TABLE plain (t text COLLATE "C")')
    postgresql.execute("CREATE VIEW seen AS SELECT * FROM plain")
    postgresql.execute("CREATE SCHEMA hidden CREATE TABLE inside (a int)")
    postgresql.commit()
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: postgresql, poolclass=StaticPool
    )
    keyspace = sqlroute.Keyspace("k", (sqlroute.Shard("s0", (sqlroute.Node("n"),)),), 64)

    with engine.connect() as connection:
        found = read_tables(keyspace, connection)

    assert found["sharded"].role is Role.SHARDED
    assert found["sharded"].key == ("a", "b")
    assert list(found["sharded"].columns) == ["b", "a", "c"]
    assert found["sharded"].columns["c"] is None
    assert found["plain"].role is Role.REFERENCE
    assert found["public.plain"] == found["plain"]
    assert found["hidden.inside"].name == "hidden.inside"
    assert "inside" not in found
    assert "partition" in found["leaf"].why
    assert "no shard key" in found["strange"].why
    assert "modulus 4" in found["other"].why
    assert found["seen"].why == "a view"


# catalog, 2pc, config


def test_catalog_install_twice_changes_nothing(run_json: Json) -> None:
    """Installing what is there keeps the epoch."""
    _, before = run_json("shard", "map")
    code, after = run_json("catalog", "install")

    assert code == 0
    assert after == before


def test_recover_finishes_what_was_left(run_json: Json, topology: LocalTopology) -> None:
    """A prepared transaction without a commit record is rolled back; then there is nothing."""
    with psycopg.connect(**topology.node("s1-a").conninfo, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO cli_kinds VALUES (99)")
        connection.execute("PREPARE TRANSACTION 'sqlroute:s0:cli-test:s1'")
        code, document = run_json("2pc", "recover", "--older-than", "0")
        left = connection.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone()

    assert code == 0
    assert document == {
        "recovered": [{"shard": "s1", "gid": "sqlroute:s0:cli-test:s1", "committed": False}]
    }
    assert left == (0,)
    assert run_json("2pc", "recover", "--older-than", "0") == (0, {"recovered": []})


def test_config_check_of_a_ready_file(run_json: Json, topology: LocalTopology) -> None:
    """The file that `local up` writes has no fault."""
    code, document = run_json("config", "check")

    assert code == 0
    assert document["ok"] is True
    assert document["path"] == str(topology.config_path)


def test_unreachable_servers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, no password: which node does not answer, and why."""
    file = tmp_path / "dead.toml"
    port = free_ports(1)
    file.write_text(
        "[policy]\nconnect_timeout = '1s'\n[keyspaces.a]\n[[keyspaces.a.shards]]\nname = 's0'\n"
        f"nodes = ['postgresql://u:hunter2@127.0.0.1:{port}/x']\n"
    )

    code = main(["catalog", "install", "--config", str(file)])
    out, err = capsys.readouterr()

    assert code == 1
    assert out == ""
    assert err.startswith("error: shard s0 has no primary now")
    assert len(err.splitlines()) == 1
    assert "hunter2" not in err


# local


def test_local_up_status_reset_down(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The whole life of a topology, each verb with its document and exit code."""
    directory = Path(tempfile.mkdtemp(prefix="sqlroute-cli-"))
    directory.chmod(0o755)
    size = ("--shards", "1", "--replicas", "1", "--port", str(free_ports(2)))
    place = ("--dir", str(directory), "--json")
    try:
        assert main_json("local", "up", *size, *place)[0] == 0
        code, again = main_json("local", "up", *place)
        assert code == 0
        assert [(n["name"], n["role"]) for n in again["nodes"]] == [
            ("s0-a", "primary"),
            ("s0-b", "replica"),
        ]
        os.kill(again["nodes"][1]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while main_json("local", "status", *place)[1]["running"]:
            assert time.monotonic() < deadline
        assert main_json("local", "status", *place)[0] == 3
        assert main_json("local", "reset", *place)[0] == 5
        code, fresh = main_json("local", "reset", "--yes", "--replicas", "0", *size[:2], *place)
        assert code == 0
        assert [node["name"] for node in fresh["nodes"]] == ["s0-a"]
        assert main_json("local", "down", *place) == (
            0,
            {"directory": str(directory), "stopped": ["s0-a"], "deleted": False},
        )
        assert main_json("local", "down", "--delete", "--yes", *place)[1]["deleted"] is True
        assert list(directory.iterdir()) == []
    finally:
        if (directory / "topology.json").exists():
            main_json("local", "down", "--delete", "--yes", *place)
        shutil.rmtree(directory)


@pytest.mark.parametrize("moment", ["initdb", "loading the data"])
def test_ctrl_c_ends_the_demo_and_leaves_no_server(moment: str) -> None:
    """Exit code 130, no traceback, and the servers it started are gone."""
    program = Path(sys.executable).parent / "sqlroute"
    directory = Path(tempfile.mkdtemp(prefix="sqlroute-cli-"))
    directory.chmod(0o755)
    try:
        with subprocess.Popen(
            [program, "demo", "--dir", str(directory)],
            stderr=subprocess.PIPE,
            text=True,
            # a shell that runs the tests in the background has Ctrl-C ignored for all of them
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        ) as started:
            assert started.stderr is not None
            next(line for line in started.stderr if moment in line)
            started.send_signal(signal.SIGINT)
            rest = started.stderr.read()

        assert started.returncode == 130
        assert "Traceback" not in rest
        assert list(directory.iterdir()) == []
    finally:
        if (directory / "topology.json").exists():
            main_json("local", "down", "--delete", "--yes", "--dir", str(directory), "--json")
        shutil.rmtree(directory)


def main_json(*arguments: str) -> tuple[int, dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(arguments)
    return code, json.loads(out.getvalue())
