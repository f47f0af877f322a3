"""Promises of the node drivers that need no server: texts, programs, who is reached how."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sqlroute.config import describe, load
from sqlroute.errors import DriverError
from sqlroute.operations import Command, DriverSpec, Operations, Operator
from sqlroute.ops.drivers import Ability, Driver, driver_of, operator_node
from sqlroute.ops.drivers.autoconf import as_standby, changed, values, without_fence
from sqlroute.ops.drivers.base import Control
from sqlroute.ops.drivers.shell import Ran, execute, remotely
from sqlroute.topology import Node, Secret

PASSWORD = "hunter2"
NODE = Node("s0-a", "db-a", 6000, "shop", "app", Secret("of the app"))


# postgresql.auto.conf


def test_settings_are_read_as_postgresql_does() -> None:
    """The last one counts; quotes are doubled, backslashes too, names of any case."""
    text = (
        "# no setting\nwork_mem = '4MB'\nWork_Mem 8MB # why\nx.y = 'it''s \\\\ \\'s'\nport=5433\n"
    )

    found = values(text)

    assert found == {"work_mem": "8MB", "x.y": "it's \\ 's", "port": "5433"}


@pytest.mark.parametrize(
    "value", ["", "plain", "it's", "back\\slash", "'", "host=a password='x y'"]
)
def test_what_is_written_is_read_again(value: str) -> None:
    assert values(changed("", {"a": value})) == {"a": value}


def test_a_value_with_a_line_break_is_refused() -> None:
    with pytest.raises(ValueError, match="line break"):
        changed("", {"a": "x'\ndata_directory='/elsewhere"})


def test_a_change_leaves_the_rest_as_it_is() -> None:
    text = "# by hand\na = '1'\nb = '2'\na = '3'\n"

    assert changed(text, {"a": "4"}) == "# by hand\nb = '2'\na = '4'\n"
    assert changed(text, {"a": None}) == "# by hand\nb = '2'\n"


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("session_preload_libraries = 'sqlroute_fence_epoch_3'", {}),
        (
            "session_preload_libraries = 'sqlroute_fence_epoch_3, auto_explain'",
            {"session_preload_libraries": "auto_explain"},
        ),
        ("synchronous_standby_names = 'sqlroute_fence'", {}),
        ("default_transaction_read_only = 'on'", {}),
    ],
)
def test_every_level_of_a_fence_is_removed(line: str, left: dict[str, str]) -> None:
    text, removed = without_fence(f"work_mem = '4MB'\n{line}\n")

    assert values(text) == {"work_mem": "4MB", **left}
    assert removed == (line.partition(" ")[0],)


def test_what_is_no_fence_stays() -> None:
    text = (
        "session_preload_libraries = 'auto_explain'\nsynchronous_standby_names = 'ANY 1 (a, b)'\n"
    )

    assert without_fence(text) == (text, ())


def test_a_standby_has_its_primary_and_no_target() -> None:
    text = "recovery_target_xid = '7'\nprimary_slot_name = 'old'\nwork_mem = '4MB'\n"

    found = values(as_standby(text, "host=a password='x y'", None))

    assert found == {
        "work_mem": "4MB",
        "primary_conninfo": "host=a password='x y'",
        "primary_slot_name": "",
    }


# pg_controldata

CONTROL = """\
pg_control version number:            1300
Database system identifier:           7312345678901234567
Database cluster state:               shut down in recovery
Latest checkpoint location:           1/2A000028
Latest checkpoint's TimeLineID:       3
Minimum recovery ending location:     1/2A0000A0
Min recovery ending loc's timeline:   3
wal_log_hints setting:                on
Data page checksum version:           0
"""


def test_the_control_file_is_read() -> None:
    found = Control.read(CONTROL)

    assert found == Control(
        "shut down in recovery",
        0x1_2A00_0028,
        3,
        7312345678901234567,
        0x1_2A00_00A0,
        3,
        False,
        True,
    )
    assert found.was_clean_shutdown
    assert found.can_rewind
    assert str(found) == "shut down in recovery at 3/1/2A000028"


def test_a_line_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="Database cluster state"):
        Control.read(CONTROL.replace("cluster state", "state of the cluster"))


# Programs


def test_a_secret_travels_in_the_input_only() -> None:
    environment = {"PGPASSWORD": f"{PASSWORD}'\" $HOME"}
    argv = ("sh", "-c", 'cat; printf "|%s|%s" "$PGPASSWORD" "$1"', "sh", "a  b")

    words, text = remotely(argv, environment, "the input\n", 5.0)
    ran = execute("s0-a", words, text=text, timeout=5)

    assert PASSWORD not in "".join(words)
    assert ran.output == f"the input\n|{PASSWORD}'\" $HOME|a  b"


def test_a_secret_of_two_lines_is_refused() -> None:
    """It would end the environment, and the rest would be the program's input."""
    with pytest.raises(DriverError, match="PGPASSWORD has a line break") as caught:
        remotely(("true",), {"PGPASSWORD": f"a\n{PASSWORD}"}, "", 5.0)

    assert PASSWORD not in str(caught.value)


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"(sleep 1; touch {alive}) & sleep 30"

    with pytest.raises(DriverError, match=r"sh for s0-a did not end in 0\.2 s"):
        execute("s0-a", ("sh", "-c", child), timeout=0.2)

    time.sleep(1.2)  # nothing to await: it must not happen
    assert not alive.exists()


def test_a_program_that_leaves_a_child_behind_is_not_waited_for() -> None:
    """As ssh its kept connection, which holds the pipes open."""
    began = time.monotonic()

    ran = execute("s0-a", ("sh", "-c", "echo done; sleep 5 &"), timeout=4)

    assert ran == Ran(0, "done\n", "")
    assert time.monotonic() - began < 2


def test_lines_are_told_as_they_come() -> None:
    told: list[tuple[str, float]] = []
    script = "printf 'one\\rtwo\\n' >&2; sleep 0.3; printf 'three\\n' >&2; echo out"

    ran = execute(
        "s0-a",
        ("sh", "-c", script),
        timeout=5,
        heard=lambda line: told.append((line, time.monotonic())),
    )

    assert [line for line, _ in told] == ["one", "two", "three"]
    assert told[2][1] - told[1][1] > 0.2
    assert ran.output == "out\n"


def test_more_output_than_a_pipe_holds_is_read() -> None:
    ran = execute("s0-a", (sys.executable, "-c", "print('x' * 300_000)"), timeout=20)

    assert len(ran.output) == 300_001


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DriverError, match="cannot run /nowhere/x for s0-a: no such file"):
        execute("s0-a", ("/nowhere/x",), timeout=1)


@pytest.mark.parametrize(
    ("ran", "line"),
    [
        (Ran(1, "", ""), "exit code 1"),
        (Ran(1, "", "warning: x\n"), "warning: x"),
        (
            Ran(1, "", "pg_x: error: the cause\npg_x: error: so it ended\n"),
            "pg_x: error: the cause",
        ),
        (Ran(1, "out\n", "sh: cannot do it\nbye\n"), "sh: cannot do it"),
    ],
)
def test_the_line_that_tells_most_is_quoted(ran: Ran, line: str) -> None:
    assert ran.last_line == line


# Which driver a node has


def test_the_name_wins_over_patterns_and_these_go_in_order() -> None:
    operations = Operations(
        drivers=(
            DriverSpec("s0-*", "ssh", data="/like"),
            DriverSpec("*", "ssh", data="/any"),
            DriverSpec("s0-a", "ssh", data="/own"),
        )
    )

    found = {
        name: spec.data
        for name in ("s0-a", "s0-b", "s1-a", "s0-a@10.0.0.7")
        if (spec := operations.spec_of(Node(name), "s")) is not None
    }

    assert found == {"s0-a": "/own", "s0-b": "/like", "s1-a": "/any", "s0-a@10.0.0.7": "/own"}
    assert Operations().spec_of(NODE, "s0") is None
    assert driver_of(NODE, "s0", Operations()) is None


def test_places_are_filled_in_for_each_node() -> None:
    spec = DriverSpec(
        "*",
        "ssh",
        data="/data/{shard}/{name}",
        host="{host}",
        options="-p {port} -c cluster_name={node} {other}",
        ssh_options=("-i", "/keys/{name}"),
        advertise="{name}.internal:{port}",
    )
    operations = Operations(drivers=(spec,))

    found = operations.spec_of(NODE, "s0")

    assert found is not None
    assert (found.data, found.host) == ("/data/s0/s0-a", "db-a")
    assert found.options == "-p 6000 -c cluster_name=s0-a {other}"
    assert found.ssh_options == ("-i", "/keys/s0-a")
    assert operations.advertised(NODE, "s0") == ("s0-a.internal", 6000)
    assert Operations().advertised(NODE, "s0") == ("db-a", 6000)


def test_the_operator_connects_as_himself() -> None:
    """And never as himself with the password of the node's own user."""
    nodes = {
        "nothing": operator_node(NODE, Operations()),
        "user": operator_node(NODE, Operations(Operator("postgres"))),
        "all": operator_node(NODE, Operations(Operator("postgres", Secret(PASSWORD)))),
        "file": operator_node(NODE, Operations(Operator("postgres", passfile="/etc/pass"))),
    }

    assert nodes["nothing"] == NODE
    assert nodes["user"].conninfo() == {
        "host": "db-a", "port": 6000, "dbname": "shop", "user": "postgres",
    }  # fmt: skip
    assert nodes["all"].conninfo()["password"] == PASSWORD
    assert nodes["file"].conninfo()["passfile"] == "/etc/pass"
    assert nodes["file"].password is None


# The user's commands


def hook(**commands: str) -> Driver:
    source = {
        "keyspaces": {
            "k": {"shards": [{"name": "s0", "nodes": ["postgresql://db-a/x?name=s0-a"]}]}
        },
        "drivers": {"*": {"kind": "hook", "hook_timeout": "2s", **commands}},
    }
    settings = load(source, environ={})
    (node,) = settings.topology.nodes()
    found = driver_of(node, "s0", settings.operations)
    assert found is not None
    return found


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_hook_gets_words_and_an_environment(tmp_path: Path) -> None:
    """No shell sees them: what looks like one's syntax is text."""
    path = script(
        tmp_path, f'printf "%s\\n" "$@" "$SQLROUTE_NODE $SQLROUTE_ACTION" > {tmp_path}/out'
    )
    driver = hook(fence=f"{path} '{{node}} {{host}}' {{port}} {{shard}} ';$(touch {tmp_path}/bad)'")

    driver.fence(5)

    words = (tmp_path / "out").read_text().splitlines()
    assert words == ["s0-a db-a", "5432", "s0", f";$(touch {tmp_path}/bad)", "s0-a fence"]
    assert not (tmp_path / "bad").exists()


def test_a_hook_can_what_it_has_commands_for() -> None:
    driver = hook(fence="true", stop="true", unfence="true")

    assert driver.abilities == {Ability.FENCE, Ability.UNFENCE, Ability.STOP}
    driver.stop(5)
    driver.unfence(5)
    with pytest.raises(DriverError, match="the hook driver of s0-a cannot rewind it"):
        driver.rewind({}, 5, print)
    with pytest.raises(DriverError, match="cannot start it"):
        driver.start(5)
    with pytest.raises(DriverError, match="cannot see if it runs"):
        driver.is_running()


def test_a_hook_that_fails_has_not_fenced(tmp_path: Path) -> None:
    driver = hook(fence=f"{script(tmp_path, 'echo no such host >&2; exit 7')} --token {PASSWORD}")

    with pytest.raises(
        DriverError, match=r"fence of s0-a by .*exit code 7.*: no such host"
    ) as caught:
        driver.fence(5)

    assert caught.value.exit_code == 7
    assert caught.value.node == "s0-a"
    assert PASSWORD not in f"{caught.value} {caught.value!r} {driver!r}"


def test_a_hook_that_hangs_has_not_fenced() -> None:
    driver = hook(fence="sleep 30")
    began = time.monotonic()

    with pytest.raises(DriverError, match=r"sleep for s0-a did not end in 0\.3 s"):
        driver.fence(0.3)

    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("code", "runs"), [(0, True), (1, False), (3, False)])
def test_the_status_of_a_hook_is_its_exit_code(tmp_path: Path, code: int, runs: bool) -> None:
    assert hook(status=f"{script(tmp_path, f'exit {code}')}", stop="true").is_running() is runs


def test_a_status_that_is_neither_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="exit code 4; 0 means that it runs"):
        hook(status=f"{script(tmp_path, 'exit 4')}", stop="true").is_running()


def test_any_driver_may_have_a_fence_of_the_users() -> None:
    spec = DriverSpec("*", "local", data="/nowhere", fence=Command((Secret("true"),)))
    driver = driver_of(NODE, "s0", Operations(drivers=(spec,)))
    assert driver is not None

    driver.fence(5)

    assert Ability.FENCE in driver.abilities
    assert Ability.STOP in driver.abilities


def test_a_driver_shows_no_secret() -> None:
    source: dict[str, Any] = {
        "keyspaces": {"k": {"shards": [{"name": "s0", "nodes": ["postgresql://db-a/x"]}]}},
        "operator": {"user": "postgres", "password": "${PW}"},
        "drivers": {"*": {"kind": "program", "fence": "fence-it --token ${PW} {node}"}},
    }
    settings = load(source, environ={"PW": PASSWORD})
    (node,) = settings.topology.nodes()

    driver = driver_of(node, "s0", settings.operations)

    shown = f"{driver!r} {settings!r} {describe(settings)}"
    assert PASSWORD not in shown
    assert "fence-it ***" in shown
