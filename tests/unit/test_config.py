"""Promises of the configuration: all faults at once, each with its path, and never a password."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from psycopg import pq

from sqlroute import config
from sqlroute.config import LIBPQ_PARAMETERS, Settings, describe, load
from sqlroute.errors import ConfigError
from sqlroute.operations import Command, DriverSpec, Operations, Operator
from sqlroute.routing.policy import Consistency, Policy
from sqlroute.topology import Node, Secret

PASSWORD = "hunter2"

EXAMPLE = """
[policy]
max_lag = "2min"
consistency = "bounded"
probe_interval = "250ms"
probe_deadline = 0.25
map_lease = "10s"
token_wait = 0
scatter_timeout = "1.5s"
max_scatter_rows = 10_000
primary_fallback = false
pool_size = 7
max_overflow = -1
pool_timeout = "1h"
connect_timeout = 3
primary_wait = "1.5s"

[keyspaces.shop]
buckets = 16

[[keyspaces.shop.shards]]
name = "s0"
nodes = [
  "postgresql://app@db-a:5432/shop",
  "postgresql+psycopg://app:p%40ss%2Fw@db-b/shop?zone=b&weight=2&name=s0-b&sslmode=require",
]

[[keyspaces.shop.shards]]
name = "s1"
nodes = ["postgres://[2001:db8::1]:6000/shop"]

[keyspaces.accounts]
shards = [{ name = "a0", nodes = ["postgresql:///accounts?host=/run/postgresql"] }]
"""


def shop(*nodes: object, **more: object) -> dict[str, Any]:
    """Return a configuration of one shard with these nodes."""
    return {"keyspaces": {"shop": {"shards": [{"name": "s0", "nodes": list(nodes)}], **more}}}


def node(url: str) -> Node:
    return load(shop(url), environ={}).topology.default.shards[0].nodes[0]


def faults(source: Mapping[str, Any] | str | Path, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(source, environ=environ)
    return caught.value.faults


def url_faults(*urls: object) -> list[str]:
    """Return the faults of nodes without their paths, which are checked here."""
    found = []
    for fault in faults(shop(*urls)):
        path, text = fault.split(": ", 1)
        assert path.startswith("keyspaces.shop.shards[0].nodes[")
        found.append(text)
    return found


# What is read


def test_a_file_gives_a_topology_and_a_policy(tmp_path: Path) -> None:
    file = tmp_path / "sqlroute.toml"
    file.write_text(EXAMPLE)

    settings = load(file, environ={})

    assert settings.path == file
    assert settings.policy == Policy(
        max_lag=120.0,
        consistency=Consistency.BOUNDED,
        probe_interval=0.25,
        probe_deadline=0.25,
        map_lease=10.0,
        token_wait=0.0,
        scatter_timeout=1.5,
        max_scatter_rows=10_000,
        primary_fallback=False,
        pool_size=7,
        max_overflow=-1,
        pool_timeout=3600.0,
        connect_timeout=3.0,
        primary_wait=1.5,
    )
    shop_, accounts = settings.topology.keyspaces
    assert (shop_.name, shop_.buckets, shop_.shard_names) == ("shop", 16, ("s0", "s1"))
    assert (accounts.name, accounts.buckets, accounts.shard_names) == ("accounts", 64, ("a0",))
    assert list(settings.topology.nodes()) == [
        Node("s0-db-a:5432", "db-a", 5432, "shop", "app"),
        Node(
            "s0-b",
            "db-b",
            5432,
            "shop",
            "app",
            Secret("p@ss/w"),
            "b",
            2.0,
            (("sslmode", "require"),),
        ),
        Node("s1-[2001:db8::1]:6000", "2001:db8::1", 6000, "shop"),
        Node("a0-/run/postgresql:5432", "/run/postgresql", 5432, "accounts"),
    ]


def test_what_is_not_said_has_the_default_of_policy() -> None:
    assert load(shop("postgresql://db/shop"), environ={}).policy == Policy()


def test_every_field_of_policy_can_be_set() -> None:
    names = {field.name for field in dataclasses.fields(Policy)}

    described = describe(load(shop("postgresql://db/shop"), environ={}))["policy"]

    assert set(described) == names
    assert (
        load({**shop("postgresql://db/shop"), "policy": described}, environ={}).policy == Policy()
    )


def test_a_mapping_is_read_and_left_as_it_was() -> None:
    source = {**shop("postgresql://${HOST}/shop"), "policy": {"max_lag": "1s"}}
    before = json.dumps(source)

    settings = load(source, environ={"HOST": "db-a", "SQLROUTE_POLICY__MAX_LAG": "3s"})

    assert settings.path is None
    assert settings.topology.node("s0-db-a:5432").host == "db-a"
    assert json.dumps(source) == before


def test_settings_are_frozen() -> None:
    settings = load(shop("postgresql://db/shop"), environ={})

    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.policy = Policy()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://db", Node("s0-db:5432", "db")),
        ("postgresql://db?name=a&weight=0", Node("a", "db", weight=0.0)),
        ("postgresql://u:a:b@db/x", Node("s0-db:5432", "db", 5432, "x", "u", Secret("a:b"))),
        (
            "postgresql://u%40corp:%25@db/",
            Node("s0-db:5432", "db", user="u@corp", password=Secret("%")),
        ),
        ("postgresql://%2Ftmp/x", Node("s0-/tmp:5432", "/tmp", database="x")),
        ("postgresql:///x?host=/tmp&port=6000", Node("s0-/tmp:6000", "/tmp", 6000, "x")),
        ("postgresql://?host=db&user=u&dbname=x", Node("s0-db:5432", "db", database="x", user="u")),
        (
            "postgresql://u@db/x?password=%26",
            Node("s0-db:5432", "db", database="x", user="u", password=Secret("&")),
        ),
        (
            "postgresql://?service=shop&passfile=/etc/pgpass",
            Node("s0-shop:5432", options=(("service", "shop"), ("passfile", "/etc/pgpass"))),
        ),
        (
            "postgresql://db/x?options=-c%20a=b+c&application_name=web&",
            Node(
                "s0-db:5432",
                "db",
                database="x",
                options=(("options", "-c a=b+c"), ("application_name", "web")),
            ),
        ),
    ],
)
def test_a_url_gives_a_node(url: str, expected: Node) -> None:
    assert node(url) == expected


def test_a_socket_directory_keeps_its_letters() -> None:
    assert node("postgresql://%2FTmp%2FPG/x").host == "/Tmp/PG"


def test_every_parameter_of_libpq_is_taken_or_refused_with_a_reason() -> None:
    ours = LIBPQ_PARAMETERS | set(config._REFUSED)

    assert {option.keyword.decode() for option in pq.Conninfo.get_defaults()} <= ours


def test_the_file_is_found_by_the_variable_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here, other = tmp_path / "sqlroute.toml", tmp_path / "other.toml"
    here.write_text(EXAMPLE)
    other.write_text(EXAMPLE)

    assert load(environ={}).path == here
    assert load(environ={"SQLROUTE_CONFIG": str(other)}).path == other


def test_the_environment_of_the_process_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(EXAMPLE)
    monkeypatch.setenv("SQLROUTE_CONFIG", str(file))
    monkeypatch.setenv("SQLROUTE_POLICY__MAX_LAG", "9s")

    assert load().policy.max_lag == 9.0


def test_the_environment_wins_over_the_file_in_the_policy() -> None:
    settings = load(
        {**shop("postgresql://db/shop"), "policy": {"max_lag": "1s", "pool_size": 3}},
        environ={
            "SQLROUTE_POLICY__MAX_LAG": "250ms",
            "sqlroute_policy__consistency": "strong",
            "SQLROUTE_POLICY__PRIMARY_FALLBACK": "false",
            "SQLROUTE_POLICY__MAX_OVERFLOW": "0",
            "SQLROUTE_SOMETHING_ELSE": "1",
            "SQLROUTE_KEYSPACES": "1",
        },
    )

    assert settings.policy == Policy(
        max_lag=0.25,
        consistency=Consistency.STRONG,
        primary_fallback=False,
        max_overflow=0,
        pool_size=3,
    )


def test_variables_are_filled_into_texts() -> None:
    settings = load(
        {
            "policy": {"max_lag": "${LAG:-7s}", "pool_size": "${SIZE}"},
            "keyspaces": {
                "shop": {
                    "shards": [
                        {
                            "name": "${SHARD:-s9}",
                            "nodes": ["postgresql://app:${PW}@${HOST:-db}:${PORT:-6000}/shop"],
                        }
                    ]
                }
            },
        },
        environ={"SIZE": "4", "PW": PASSWORD, "HOST": "", "PORT": "6001"},
    )

    assert (settings.policy.max_lag, settings.policy.pool_size) == (7.0, 4)
    assert settings.topology.node("s9-db:6001").password == Secret(PASSWORD)


def test_importing_the_topology_and_policy_needs_no_pydantic() -> None:
    code = (
        "import sys, sqlroute.routing.policy, sqlroute.topology; "
        "sys.exit(any('pydantic' in name for name in sys.modules))"
    )
    root = str(Path(config.__file__).parents[1])

    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})


# Faults


def test_all_faults_are_reported_at_once() -> None:
    found = faults(
        {
            "polcy": 1,
            "policy": {"max_lag": "5 parsecs", "consistncy": "session"},
            "keyspaces": {
                "shop": {
                    "buckets": 63,
                    "shards": [
                        {"name": "s0", "nodes": ["mysql://db/shop", 5]},
                        {"name": "s0", "nodes": "postgresql://db/shop"},
                        {"name": "s1", "nodes": ["postgresql://${HOST}/shop"]},
                    ],
                },
                "other": {"shards": [{"name": "o0", "nodes": ["postgresql://db/a?sslmod=x"]}]},
            },
        },
        SQLROUTE_POLICY__POOL_SIZE="many",
    )

    assert {fault.split(": ")[0] for fault in found} == {
        "polcy",
        "policy.max_lag",
        "policy.consistncy",
        "SQLROUTE_POLICY__POOL_SIZE",
        "keyspaces.shop.buckets",
        "keyspaces.shop.shards[0].nodes[0]",
        "keyspaces.shop.shards[0].nodes[1]",
        "keyspaces.shop.shards[1].name",
        "keyspaces.shop.shards[1].nodes",
        "keyspaces.shop.shards[2].nodes[0]",
        "keyspaces.other.shards[0].nodes[0]",
    }
    assert len(found) == 11


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_lag", "5 parsecs", '\'5 parsecs\' is no duration; write "250ms", "5s"'),
        ("max_lag", "", "'' is no duration"),
        ("max_lag", "-5s", "'-5s' is no duration"),
        ("max_lag", -5, "-5 must not be negative"),
        ("max_lag", float("nan"), "nan is no duration"),
        ("max_lag", float("inf"), "inf is no duration"),
        ("max_lag", True, "True is no duration"),
        ("max_lag", ["5s"], "is no duration"),
        ("probe_interval", 0, "0 must be more than 0 seconds"),
        ("probe_deadline", "0ms", "'0ms' must be more than 0 seconds"),
        ("consistency", "sesion", "must be one of 'eventual', 'bounded', 'session' or 'strong'"),
        ("primary_fallback", "maybe", "'maybe' must be true or false"),
        ("pool_size", "many", "'many' must be a whole number"),
        ("pool_size", 1.5, "1.5 must be a whole number"),
        ("pool_size", True, "True must be a whole number"),
        ("pool_size", 0, "0 must be at least 1"),
        ("max_overflow", -2, "-2 must be at least -1"),
        ("allow_functions", ["f", "Audit"], "'Audit' is no name of a function"),
        ("deny_functions", ["a.b.c"], "'a.b.c' is no name of a function"),
        ("deny_functions", 1, "must be a list"),
        ("max_lagg", 1, "unknown setting; did you mean max_lag?"),
        ("colour", 1, "unknown setting; known: allow_functions, balancing, "),
    ],
)
def test_a_fault_of_the_policy(name: str, value: object, text: str) -> None:
    (fault,) = faults({**shop("postgresql://db/shop"), "policy": {name: value}})

    assert re.match(rf"policy\.{name}(\[\d\])?: ", fault)
    assert text in fault


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ({}, "keyspaces: is missing; add a table [keyspaces.NAME]"),
        ({"keyspaces": {}}, "keyspaces: is empty; add a table [keyspaces.NAME]"),
        ({"keyspaces": []}, "keyspaces: must be a table, not a list"),
        ({"keyspaces": {"shop": 1}}, "keyspaces.shop: must be a table, not int"),
        ({"keyspaces": {"shop": {}}}, "keyspaces.shop.shards: is missing; a shard is a table"),
        ({"keyspaces": {"shop": {"shards": []}}}, "keyspaces.shop.shards: is empty; a shard is"),
        ({"keyspaces": {"shop": {"shards": {}}}}, "keyspaces.shop.shards: must be a list, not a"),
        (
            {"keyspaces": {"shop": {"shards": ["postgresql://app:hunter2@db/x"]}}},
            "keyspaces.shop.shards[0]: must be a table, not a text",
        ),
        (
            {"keyspaces": {"shop": {"shards": [{"nodes": ["postgresql://db/x"]}]}}},
            "keyspaces.shop.shards[0].name: is missing",
        ),
        (
            {"keyspaces": {"shop": {"shards": [{"name": "s 0", "nodes": ["postgresql://db"]}]}}},
            "keyspaces.shop.shards[0].name: a name has 1 to 63 letters",
        ),
        (
            {"keyspaces": {"shop": {"shards": [{"name": "", "nodes": ["postgresql://db"]}]}}},
            "keyspaces.shop.shards[0].name: a name has 1 to 63 letters",
        ),
        (
            {"keyspaces": {"my shop": shop("postgresql://db/x")["keyspaces"]["shop"]}},
            "keyspaces.my shop: a name has 1 to 63 letters",
        ),
        (
            {"keyspaces": {"shop": {"shards": [{"name": "s0"}]}}},
            "keyspaces.shop.shards[0].nodes: is missing; a node is a text",
        ),
        (shop(), "keyspaces.shop.shards[0].nodes: is empty; a node is a text"),
        (shop(5), "keyspaces.shop.shards[0].nodes[0]: must be a text, not int"),
        (shop(["x"]), "keyspaces.shop.shards[0].nodes[0]: must be a text, not a list"),
        ({**shop("postgresql://db"), "policy": 5}, "policy: must be a table, not int"),
        (
            {**shop("postgresql://db"), "keyspace": {}},
            "keyspace: unknown setting; did you mean key",
        ),
        (
            shop("postgresql://db", bukets=4),
            "keyspaces.shop.bukets: unknown setting; did you mean b",
        ),
        *[
            (shop("postgresql://db", buckets=n), f"keyspaces.shop.buckets: {n!r} must be a ")
            for n in (0, -2, 3, 63, 131_072, True, "x", 2.5)
        ],
    ],
)
def test_a_fault_of_form(source: dict[str, Any], fault: str) -> None:
    (found,) = faults(source)

    assert found.startswith(fault)


@pytest.mark.parametrize("buckets", [1, 2, 64, 65_536, "32"])
def test_buckets_may_be_any_power_of_two_to_65536(buckets: object) -> None:
    settings = load(shop("postgresql://db", buckets=buckets), environ={})

    assert settings.topology.default.buckets == int(str(buckets))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "is no URL; write postgresql://user@host:5432/database"),
        ("db-a:5432", "is no URL"),
        ("host=db dbname=shop", "is no URL"),
        ("mysql+pymysql://db/x", "scheme mysql+pymysql is not one of postgresql, postgresql+ps"),
        ("postgresql+asyncpg://db/x", "scheme postgresql+asyncpg is not one of"),
        ("postgresql://", "no host; write one, or ?host=/socket/directory, or ?service=name"),
        ("postgresql:///shop", "no host"),
        ("postgresql://a,b/shop", "must have one host"),
        ("postgresql://a:1,b:2/shop", "port must be a number, 1 to 65535"),
        ("postgresql:///x?host=a,b", "must have one host"),
        ("postgresql://[::1/shop", "must have one host"),
        ("postgresql://db:0/x", "port must be a number, 1 to 65535"),
        ("postgresql://db:65536/x", "port must be a number"),
        ("postgresql://db:five/x", "port must be a number"),
        ("postgresql://db/x?port=x", "port must be a number"),
        ("postgresql://db/x/y", "must have one database after the host"),
        ("postgresql://db/my shop", "has a space or a control character"),
        ("postgresql://db/x\n", "has a space or a control character"),
        ("postgresql://u:%zz@db/x", "password has a wrong percent-encoding; '%' itself is %25"),
        ("postgresql://u:%ff@db/x", "password has a wrong percent-encoding"),
        ("postgresql://u:%00@db/x", "password has a wrong percent-encoding"),
        ("postgresql://db/x?sslmod=require", "unknown parameter sslmod; did you mean sslmode?"),
        ("postgresql://db/x?colour=red", "unknown parameter colour"),
        ("postgresql://db/x?zone", "a parameter after '?' is not of the form name=value"),
        ("postgresql://db/x?=1", "a parameter after '?' is not of the form name=value"),
        ("postgresql://db/x?zone=a&zone=b", "parameter zone is given twice"),
        ("postgresql://db/x?dbname=y", "dbname is given twice, before and after '?'"),
        ("postgresql://db:1/x?port=2", "port is given twice"),
        ("postgresql://db/x?weight=-1", "weight '-1' must be a number, 0 or more"),
        ("postgresql://db/x?weight=nan", "weight 'nan' must be a number"),
        ("postgresql://db/x?weight=much", "weight 'much' must be a number"),
        ("postgresql://db/x?name=", "name must be a text without spaces"),
        ("postgresql://db/x?name=a%20b", "name must be a text without spaces"),
        ("postgresql://db/x?target_session_attrs=primary", "target_session_attrs is refused: sqlr"),
        ("postgresql://db/x?replication=database", "replication is refused: a node is queried"),
        ("postgresql://db/x?sslpassword=hunter2", "sslpassword is refused: it is a secret"),
    ],
)
def test_a_fault_of_a_url(url: str, text: str) -> None:
    (fault,) = url_faults(url)

    assert text in fault


def test_one_url_may_have_several_faults() -> None:
    assert len(url_faults("postgresql://db:x/y?weight=-1&colour=red")) == 3


def test_shard_names_are_unique_over_all_keyspaces() -> None:
    source = {
        "keyspaces": {
            "a": {"shards": [{"name": "s0", "nodes": ["postgresql://db-a/x"]}]},
            "b": {"shards": [{"name": "s0", "nodes": ["postgresql://db-b/x"]}]},
        }
    }

    assert faults(source) == (
        "keyspaces.b.shards[0].name: shard name s0 is taken by keyspaces.a.shards[0].name; "
        "names are unique over all keyspaces",
    )


def test_node_names_are_unique_over_all_keyspaces() -> None:
    assert faults(shop("postgresql://db-a/x", "postgresql://db-b/x?name=s0-db-a:5432")) == (
        "keyspaces.shop.shards[0].nodes[1]: node name s0-db-a:5432 is taken by "
        "keyspaces.shop.shards[0].nodes[0]; names are unique over all keyspaces; "
        "write ?name= for another",
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("postgresql://db/x", "postgresql://DB:5432/x"),
        ("postgresql://db/x?name=a", "postgres://other@db/x?name=b&sslmode=require"),
        ("postgresql://?service=x", "postgresql://?service=x&name=b"),
        ("postgresql:///x?host=/tmp", "postgresql://%2Ftmp/x"),
    ],
)
def test_a_server_and_database_is_listed_once(first: str, second: str) -> None:
    (fault,) = faults(shop(first, second))

    assert fault == (
        "keyspaces.shop.shards[0].nodes[1]: the same server and database as "
        "keyspaces.shop.shards[0].nodes[0]; each node is listed once"
    )


def test_two_databases_of_one_server_may_be_two_nodes() -> None:
    settings = load(shop("postgresql://db/x", "postgresql://db/y?name=y"), environ={})

    assert len(list(settings.topology.nodes())) == 2


def test_a_missing_variable_is_named_with_its_path() -> None:
    assert faults(shop("postgresql://app:${DB_PASSWORD}@db:no-port/x")) == (
        "keyspaces.shop.shards[0].nodes[0]: environment variable DB_PASSWORD is not set; "
        "set it or write ${DB_PASSWORD:-default}",
    )


def test_a_missing_variable_in_a_name_is_one_fault() -> None:
    source = {"keyspaces": {"shop": {"shards": [{"name": "${S}", "nodes": ["postgresql://db"]}]}}}

    (fault,) = faults(source)

    assert fault.startswith("keyspaces.shop.shards[0].name: environment variable S is not set")


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "${A", "${A-b}"])
def test_a_broken_variable_is_a_fault(text: str) -> None:
    (fault,) = faults({**shop("postgresql://db/x"), "policy": {"max_lag": text}})

    assert fault == "policy.max_lag: '${' begins no variable; write ${VAR} or ${VAR:-default}"


def test_a_wrong_value_is_shown_as_the_file_has_it() -> None:
    source = {**shop("postgresql://db/x"), "policy": {"max_lag": "${LAG}"}}

    (fault,) = faults(source, LAG=PASSWORD)

    assert fault.startswith("policy.max_lag: '${LAG}' is no duration")


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("SQLROUTE_POLICY__MAX_LAGG", "1s", "unknown setting; did you mean max_lag?"),
        ("SQLROUTE_POLICY__MAX_LAG", "soon", "'soon' is no duration"),
        ("SQLROUTE_POLICY__", "1s", "unknown setting"),
        ("SQLROUTE_POLICY__MAX_LAG__X", "1s", "is no duration"),
    ],
)
def test_a_fault_of_the_environment_names_the_variable(
    variable: str, value: str, text: str
) -> None:
    (fault,) = faults(shop("postgresql://db/x"), **{variable: value})

    assert fault.startswith(f"{variable.removesuffix('__X')}: ")
    assert text in fault


def test_without_a_file_the_fault_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match="`sqlroute local up`") as caught:
        load(environ={})

    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[policy\n", "line 1, column 8: no valid TOML: expected ']' at the end of a table"),
        (b"a = 1\na = 2\n", "line 2, column 6: no valid TOML: cannot overwrite a value"),
        (b"[policy]\nmax_lag = 5s\n", "line 2"),
        (b"a = 'x", "no valid TOML"),
        (b"a = '\xff'", "is not encoded in UTF-8, as TOML must be"),
    ],
)
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)

    (fault,) = faults(file)

    assert fault.startswith(f"{file}: ")
    assert text in fault


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (fault,) = faults(str(tmp_path / "none.toml"))

    assert fault.startswith(f"{tmp_path / 'none.toml'}: no such file")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path)

    assert fault == f"{tmp_path}: cannot be read: is a directory"


# Secrets


def _file(content: str) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        file = directory / "secret.toml"
        file.write_text(content)
        return file

    return write


LEAKY: list[Mapping[str, Any] | Callable[[Path], Path]] = [
    shop(f"postgresql://app:{PASSWORD}@db:x/shop"),
    shop(f"mysql://app:{PASSWORD}@db/shop"),
    shop(f"app:{PASSWORD}@db/shop"),
    shop(f"postgresql://app:a@{PASSWORD}@db/shop"),
    shop(f"postgresql://app:a/{PASSWORD}@db/shop"),
    shop(f"postgresql://app:a?{PASSWORD}=1@db/shop"),
    shop(f"postgresql://app:1?{PASSWORD}=1@db/shop"),
    shop(f"postgresql://app:a#{PASSWORD}@db/shop"),
    shop(f"postgresql://app:a:{PASSWORD}@db,db2/shop"),
    shop(f"postgresql://app:[{PASSWORD}@db/shop?weight=x"),
    shop(f"postgresql://app:{PASSWORD}%@db/shop"),
    shop(f"postgresql://app:{PASSWORD}\u2100@db/shop?weight=x"),
    shop(f"postgresql://app:{PASSWORD} @db/shop"),
    shop(f"postgresql://app:{PASSWORD}"),
    shop(f"postgresql://app@db/shop?password={PASSWORD}&weight=x"),
    shop(f"postgresql://app@db/shop?sslpassword={PASSWORD}"),
    shop(f"postgresql://app@db/shop?oauth_client_secret={PASSWORD}"),
    shop(*[f"postgresql://app:{PASSWORD}@db/shop"] * 2),
    shop([f"postgresql://app:{PASSWORD}@db/shop"]),
    shop("postgresql://app:${PW}@db:x/shop"),
    shop("${URL}&weight=x"),
    {"keyspaces": {"shop": {"shards": [f"postgresql://app:{PASSWORD}@db/shop"]}}},
    {"keyspaces": {"shop": {"shards": f"postgresql://app:{PASSWORD}@db/shop"}}},
    {"keyspaces": {"shop": f"postgresql://app:{PASSWORD}@db/shop"}},
    {"keyspaces": f"postgresql://app:{PASSWORD}@db/shop"},
    {"keyspaces": {f"postgresql://app:{PASSWORD}@db/shop": 1}},
    {"keyspaces": {"shop": {"shards": [{"name": f"postgresql://a:{PASSWORD}@b", "nodes": []}]}}},
    {**shop("postgresql://db/x"), f"postgresql://app:{PASSWORD}@db/shop": 1},
    {**shop("postgresql://db/x"), "policy": f"postgresql://app:{PASSWORD}@db/shop"},
    {**shop("postgresql://db/x"), "policy": {"max_lag": f"postgresql://app:{PASSWORD}@db/shop"}},
    {**shop("postgresql://db/x"), "policy": {"max_lag": "${URL}"}},
    _file(f'[keyspaces.shop]\nnodes = ["postgresql://app:{PASSWORD}@db/shop"\n'),
    _file(f'a = "postgresql://app:{PASSWORD}@db/shop'),
    _file(f"a = postgresql://app:{PASSWORD}@db/shop"),
]


@pytest.mark.parametrize("source", LEAKY)
def test_no_fault_shows_a_password(
    tmp_path: Path, source: Mapping[str, Any] | Callable[[Path], Path]
) -> None:
    """Neither the faults nor any exception that comes along with them."""
    environ = {"PW": PASSWORD, "URL": f"postgresql://app:{PASSWORD}@db/shop?zone=a"}

    with pytest.raises(ConfigError) as caught:
        load(source(tmp_path) if callable(source) else source, environ=environ)

    error = caught.value
    shown = [str(error), repr(error), repr(error.args), "".join(traceback.format_exception(error))]
    assert [text for text in shown if PASSWORD in text] == []
    assert error.__cause__ is None
    assert error.__context__ is None


def test_settings_show_no_password() -> None:
    settings = load(
        shop(
            f"postgresql://app:{PASSWORD}@db-a/shop",
            f"postgresql://app@db-b/shop?password={PASSWORD}",
        ),
        environ={},
    )

    shown = [repr(settings), str(settings), json.dumps(describe(settings)), f"{settings.topology}"]
    assert [text for text in shown if PASSWORD in text] == []
    assert [each.conninfo()["password"] for each in settings.topology.nodes()] == [PASSWORD] * 2


def test_functions_are_lists_of_names() -> None:
    """An environment variable holds them in one text."""
    source = {**shop("postgresql://db/shop"), "policy": {"allow_functions": ["app.f", "g$1"]}}

    policy = load(source, environ={"SQLROUTE_POLICY__DENY_FUNCTIONS": "audit, app.log"}).policy

    assert policy.allow_functions == ("app.f", "g$1")
    assert policy.deny_functions == ("audit", "app.log")


# Operators and drivers


def operated(drivers: object = None, **operator: object) -> dict[str, Any]:
    """Return a configuration of two nodes, s0-a and s0-b, with these tables."""
    nodes = [f"postgresql://db-{letter}/shop?name=s0-{letter}" for letter in "ab"]
    tables = {"operator": operator} if operator else {}
    return {**shop(*nodes), **tables, **({} if drivers is None else {"drivers": drivers})}


def test_drivers_and_the_operator_are_read() -> None:
    source = operated(
        {
            "s0-a": {"kind": "local", "data": "/data/", "options": "-p 5433", "advertise": "a:1"},
            "*": {
                "kind": "ssh",
                "data": "/data/{name}",
                "unit": "pg@{port}",
                "port": 2222,
                "ssh_options": ["-i", "key"],
                "fence": ["fence", "{node}"],
                "hook_timeout": "1min",
            },
        },
        user="postgres",
        password="${PW}",
    )

    found = load(source, environ={"PW": PASSWORD}).operations

    assert found.operator == Operator("postgres", Secret(PASSWORD), "")
    own, like = found.drivers
    assert own == DriverSpec("s0-a", "local", data="/data", options="-p 5433", advertise="a:1")
    assert (like.pattern, like.unit, like.port, like.hook_timeout) == ("*", "pg@{port}", 2222, 60.0)
    assert like.ssh_options == ("-i", "key")
    assert like.fence == Command((Secret("fence"), Secret("{node}")))
    assert load(operated(), environ={}).operations == Operations()


LOCAL = {"kind": "local", "data": "/data"}


@pytest.mark.parametrize(
    ("drivers", "fault"),
    [
        ({"s0-c": LOCAL}, "drivers.s0-c: no node has this name; did you mean s0-"),
        ({"zz": LOCAL}, "drivers.zz: no node has this name; known: s0-a, s0-b; a name with *"),
        ({"s0-a": {"data": "/x"}}, "drivers.s0-a.kind: is missing"),
        ({"s0-a": {"kind": "locl"}}, "drivers.s0-a.kind: 'locl' must be one of 'local', 'docker'"),
        ({"s0-a": {"kind": "local"}}, "drivers.s0-a.data: is missing: a driver of kind local"),
        ({"s0-a": {"kind": "docker"}}, "drivers.s0-a.container: is missing"),
        ({"s0-a": {**LOCAL, "unit": "x"}}, "drivers.s0-a.unit: is nothing of a driver of kind"),
        ({"s0-a": {**LOCAL, "dat": "x"}}, "drivers.s0-a.dat: unknown setting; did you mean data?"),
        ({"s0-a": {**LOCAL, "data": "x"}}, "drivers.s0-a.data: must be a whole path"),
        ({"s0-a": {**LOCAL, "log": "/{nam}"}}, "drivers.s0-a.log: {nam} stands for nothing; known"),
        ({"s0-a": {**LOCAL, "options": "'"}}, "drivers.s0-a.options: cannot be split into words"),
        ({"s0-a": {**LOCAL, "advertise": "a:b"}}, "drivers.s0-a.advertise: must be host:port"),
        ({"s0-a": {**LOCAL, "account": "-x"}}, "drivers.s0-a.account: must be one word"),
        ({"s0-a": {**LOCAL, "fence": ""}}, "drivers.s0-a.fence: is empty; name a program"),
        ({"s0-a": {**LOCAL, "fence": "f 'x"}}, "drivers.s0-a.fence: cannot be split into words"),
        ({"s0-a": {**LOCAL, "fence": 5}}, "drivers.s0-a.fence: must be a command"),
        ({"s0-a": {**LOCAL, "fence": "f {nod}"}}, "drivers.s0-a.fence: {nod} stands for nothing"),
        ({"s0-a": {**LOCAL, "hook_timeout": 0}}, "drivers.s0-a.hook_timeout: 0 must be more than"),
        ({"*": {"kind": "hook"}}, "drivers.*: has no command; add one of stop, start, kill, fence"),
        ({"*": {"kind": "ssh", "data": "/d", "port": 0}}, "drivers.*.port: 0 must be at least 1"),
        ([], "drivers: must be a table, not a list"),
    ],
)
def test_a_fault_of_a_driver(drivers: object, fault: str) -> None:
    (found,) = faults(operated(drivers))

    assert found.startswith(fault)


def test_a_fault_of_the_operator() -> None:
    (found,) = faults(operated(usr="postgres"))

    assert found == "operator.usr: unknown setting; did you mean user?"


@pytest.mark.parametrize(
    "source",
    [
        operated({"s0-a": {**LOCAL, "fence": f"f --token '{PASSWORD}"}}),
        operated({"s0-a": {**LOCAL, "fence": f"f {{{PASSWORD[:-1]}}} {PASSWORD}"}}),
        operated({"s0-a": {**LOCAL, "options": f"'{PASSWORD}"}}),
        operated(None, password=[PASSWORD]),
        operated(None, user=5, password=PASSWORD),
    ],
)
def test_no_fault_of_operations_shows_a_secret(source: dict[str, Any]) -> None:
    assert not [fault for fault in faults(source) if PASSWORD in fault]


def test_describe_gives_json() -> None:
    settings = load(
        shop(f"postgresql://app:{PASSWORD}@db/shop?zone=b&sslmode=require", buckets=4), environ={}
    )

    described = describe(Settings(settings.topology, settings.policy, Path("/etc/sqlroute.toml")))

    assert json.loads(json.dumps(described)) == {
        "path": "/etc/sqlroute.toml",
        "policy": {
            **dataclasses.asdict(Policy()),
            "consistency": "session",
            "allow_functions": [],
            "deny_functions": [],
        },
        "keyspaces": [
            {
                "name": "shop",
                "buckets": 4,
                "coordinator": None,
                "shards": [
                    {
                        "name": "s0",
                        "nodes": [
                            {
                                "name": "s0-db:5432",
                                "host": "db",
                                "port": 5432,
                                "database": "shop",
                                "user": "app",
                                "password": "***",
                                "zone": "b",
                                "weight": 1.0,
                                "options": {"sslmode": "require"},
                                "pooler": "",
                            }
                        ],
                        "patroni": None,
                    }
                ],
            }
        ],
        "operator": {"user": "", "password": None, "passfile": ""},
        "drivers": [],
    }


def with_coordinator(**table: Any) -> dict[str, Any]:
    return shop("postgresql://app@db/shop", coordinator=table)


def test_a_coordinator_is_read() -> None:
    source = with_coordinator(
        nodes=["postgresql://app@c:5433/all", "postgresql://app@d/all?name=c-b"],
        max_rows=10,
        timeout="2min",
        replicas=2,
    )

    keyspace = load(source, environ={}).topology.default
    assert keyspace.coordinator is not None
    assert [node.name for node in keyspace.coordinator.nodes] == ["shop-coordinator-c:5433", "c-b"]
    assert (keyspace.coordinator.max_rows, keyspace.coordinator.timeout) == (10, 120.0)
    assert keyspace.coordinator.replicas == 2
    assert [node.name for node in load(source, environ={}).topology.nodes()] == ["s0-db:5432"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({}, "keyspaces.shop.coordinator.nodes: is missing; a node is a text"),
        ({"nodes": []}, "keyspaces.shop.coordinator.nodes: is empty"),
        ({"nodes": ["x"]}, "keyspaces.shop.coordinator.nodes[0]: is no URL"),
        ({"nodes": ["postgresql://c/x"], "max_rows": 0}, "max_rows: 0 must be at least 1"),
        ({"nodes": ["postgresql://c/x"], "replicas": -1}, "replicas: -1 must be at least 0"),
        ({"nodes": ["postgresql://c/x"], "timeout": 0}, "timeout: 0 must be more than 0 seconds"),
        ({"nodes": ["postgresql://c/x"], "fetchsize": 1}, "did you mean fetch_size?"),
        ({"nodes": ["postgresql://db/shop"]}, "nodes[0]: the same server and database as"),
    ],
)
def test_faults_of_a_coordinator_are_listed(table: dict[str, Any], fault: str) -> None:
    assert any(fault in found for found in faults(with_coordinator(**table)))


def test_a_tier_can_be_forbidden_from_the_environment() -> None:
    found = load(
        shop("postgresql://app@db/shop"),
        environ={"SQLROUTE_POLICY__NO_SCATTER": "true", "SQLROUTE_POLICY__NO_COORDINATOR": "1"},
    ).policy

    assert (found.no_scatter, found.no_coordinator) == (True, True)
