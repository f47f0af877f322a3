"""``sqlroute advise`` on a database that is not sharded, and on one that is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sqlroute.cli import main
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from sqlroute.testing import TopologyFactory

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

SCHEMA = """
CREATE TABLE account (id bigint PRIMARY KEY, name text);
CREATE TABLE invoice (id bigint PRIMARY KEY, account_id bigint REFERENCES account, total numeric);
CREATE TABLE currency (code text PRIMARY KEY);
INSERT INTO account SELECT i, 'a' FROM generate_series(1, 500) i;
INSERT INTO invoice SELECT i, i % 500 + 1, i FROM generate_series(1, 5000) i;
"""
STATEMENTS = """
SELECT * FROM account WHERE id = 7;
SELECT * FROM account WHERE id = 8;
SELECT a.name, i.total FROM account a JOIN invoice i ON i.account_id = a.id WHERE a.id = :id;
SELECT * FROM invoice WHERE id = 12;
SELECT count(DISTINCT total) FROM invoice;
SELECT * FROM currency;
SELECT * FROM forgotten
"""


@pytest.fixture(scope="module")
def plain(sqlroute_topology_factory: TopologyFactory) -> LocalNode:
    """One server with three ordinary tables, which counts its statements."""
    node = sqlroute_topology_factory(shards=1, replicas=0, label="advise").nodes[0]
    with psycopg.connect(**node.conninfo, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'")
        connection.execute(SCHEMA)
    return node


@pytest.fixture
def advise(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def advise(*arguments: str) -> dict[str, Any]:
        code = main(["advise", *arguments, "--json"])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {"code": code, **document}

    return advise


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "statements.sql"
    found.write_text(STATEMENTS)
    return found


def test_key_of_an_unsharded_database_is_found(
    plain: LocalNode, advise: Callable[..., dict[str, Any]], file: Path
) -> None:
    """Equal shapes are counted as one; what the key would need is said."""
    found = advise(str(file), "--url", plain.url)

    best = found["schemes"][0]
    assert (found["code"], found["statements"], found["calls"]) == (0, 6, 7)
    assert best["key"] == {"account": "id", "invoice": "account_id"}
    assert best["calls"]["one shard"] == 4
    assert best["needs"] == ["the primary key (id) of invoice must contain account_id"]
    reaches = {one["sql"]: one["reach"] for one in found["best"]}
    assert reaches["SELECT count(DISTINCT total) FROM invoice"] == "coordinator"
    assert reaches["SELECT * FROM forgotten"] == "refused"
    assert found["now"] is None


@pytest.fixture
def advised(sqlroute_topology: LocalTopology) -> Iterator[LocalTopology]:
    """Two shards with a table that is sharded by its id."""

    def on_each_shard(sql: str) -> None:
        for node in ("s0-a", "s1-a"):
            conninfo = sqlroute_topology.node(node).conninfo
            with psycopg.connect(**conninfo, autocommit=True) as connection:
                connection.execute(sql.encode())

    on_each_shard("CREATE TABLE advised (id bigint) PARTITION BY HASH (id)")
    yield sqlroute_topology
    on_each_shard("DROP TABLE advised")


def test_sharded_database_is_judged_as_it_is(
    advised: LocalTopology, advise: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    text = tmp_path / "some.sql"
    text.write_text("SELECT * FROM advised WHERE id = 1\nSELECT * FROM advised\n")

    found = advise(str(text), "--config", str(advised.config_path))

    assert [one["reach"] for one in found["now"]["statements"]] == ["several shards", "one shard"]


def test_statements_of_a_running_application_are_counted_by_the_server(
    plain: LocalNode, advise: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Without ``pg_stat_statements`` the way out is said; with it, its CSV says the same."""
    missing = advise("--listen", "0", "--url", plain.url)
    assert missing["code"] == 1
    assert "CREATE EXTENSION pg_stat_statements" in missing["error"]["message"]

    plain.stop()
    plain.start()
    with psycopg.connect(**plain.conninfo, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION pg_stat_statements")
        for key in range(20):
            connection.execute("SELECT * FROM account WHERE id = %s", (key,))
        rows = connection.execute("SELECT query, calls FROM pg_stat_statements").fetchall()
    export = tmp_path / "export.csv"
    with export.open("w", newline="") as out:
        csv.writer(out).writerows([("query", "calls"), *rows])

    for found in (
        advise("--listen", "0", "--url", plain.url),
        advise(str(export), "--url", plain.url),
    ):
        assert found["schemes"][0]["key"] == {"account": "id"}
        assert found["schemes"][0]["calls"]["one shard"] == 20
    quiet = advise("--listen", "0.1", "--url", plain.url)
    assert quiet["schemes"] == []


def test_bad_input_says_the_way_out(
    plain: LocalNode, advise: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    export = tmp_path / "export.csv"
    export.write_text("sql,calls\nSELECT 1,2\n")

    found = advise(str(export), "--url", plain.url)

    assert found["code"] == 1
    assert "no column 'query'" in found["error"]["message"]
