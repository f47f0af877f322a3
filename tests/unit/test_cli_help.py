"""The command line without a server: help, completion, bad usage, bad files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sqlroute.cli import main

HEAVY = "{'sqlalchemy', 'alembic', 'psycopg', 'pgparse'}"
COMMANDS = [
    [],
    ["local"],
    ["local", "up"],
    ["local", "down"],
    ["local", "status"],
    ["local", "reset"],
    ["status"],
    ["explain"],
    ["advise"],
    ["shard", "locate"],
    ["shard", "map"],
    ["config", "check"],
    ["catalog", "install"],
    ["2pc", "recover"],
    ["coordinator", "install"],
    ["coordinator", "refresh"],
    ["coordinator", "check"],
    ["coordinator", "remove"],
    ["demo"],
    ["promote"],
    ["failover"],
    ["rejoin"],
    ["fence"],
    ["unfence"],
    ["replica"],
    ["replica", "add"],
    ["replica", "remove"],
    ["op"],
    ["op", "list"],
    ["op", "show"],
    ["op", "resume"],
    ["op", "abort"],
]


def run_and_list_modules(arguments: list[str], **environ: str) -> str:
    code = (
        "import sys, io, contextlib\n"
        "from sqlroute.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    code = main({arguments!r})\n"
        f"print(code, sorted({HEAVY} & set(sys.modules)), len(out.getvalue()) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environ},
    )
    return done.stdout.strip()


def test_help_imports_neither_sqlalchemy_nor_a_driver() -> None:
    """Help answers at once: what a command needs is imported when it runs."""
    assert run_and_list_modules(["--help"]) == "0 [] True"
    assert run_and_list_modules(["explain", "--help"]) == "0 [] True"
    assert run_and_list_modules(["promote", "--help"]) == "0 [] True"
    assert run_and_list_modules(["op", "resume", "--help"]) == "0 [] True"


def test_completion_imports_neither_sqlalchemy_nor_a_driver() -> None:
    """A press of TAB is no wait."""
    seen = run_and_list_modules(
        [], _SQLROUTE_COMPLETE="complete_bash", COMP_WORDS="sqlroute sha", COMP_CWORD="1"
    )

    assert seen == "0 [] True"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_has_a_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command says what it does."""
    assert main([*command, "--help"]) == 0
    assert "Usage: sqlroute" in capsys.readouterr().out


def test_missing_typer_is_a_clear_error() -> None:
    """Without the extra the program says which one it needs, and shows no traceback."""
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from sqlroute.cli import main\n"
        "sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer; install sqlroute[cli]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["status", "--nonsense"],
        ["explain"],
        ["advise"],
        ["advise", "--listen", "-1"],
        ["advise", "no-such-file.sql"],
        ["explain", "SELECT 1", "--statement", "a:b"],
        ["explain", "SELECT 1", "--param", "novalue"],
        ["shard", "locate", "flights"],
        ["2pc", "recover", "--older-than=-1"],
        ["local", "up", "--shards", "many"],
        ["status", "--config", "/nowhere/sqlroute.toml"],
        ["promote"],
        ["promote", "s0", "--fence", "L9"],
        ["promote", "s0", "--max-drain=-1"],
        ["promote", "s0", "--config", "/nowhere/sqlroute.toml"],
        ["failover", "s0", "--max-loss-bytes", "some"],
        ["fence", "s0-a", "--level", "none"],
        ["op", "abort"],
        ["replica", "add", "s0", "s0-d"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown commands, options and values, and a missing file: usage, not failure."""
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_config_check_lists_every_fault_and_no_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per fault with its path; a password of a faulty URL is in none."""
    file = tmp_path / "sqlroute.toml"
    file.write_text(
        "[keyspaces.a]\nbuckets = 3\n[[keyspaces.a.shards]]\nname = 's0'\n"
        "nodes = ['postgresql://u:hunter2@h:99999/x']\n"
    )

    code = main(["config", "check", "--config", str(file), "--json"])
    out, err = capsys.readouterr()

    faults = json.loads(out)["error"]["faults"]
    assert code == 2
    assert [fault.split(":")[0] for fault in faults] == [
        "keyspaces.a.buckets",
        "keyspaces.a.shards[0].nodes[0]",
    ]
    assert err.splitlines() == [f"error: {fault}" for fault in faults]
    assert "hunter2" not in out + err


def test_config_check_says_ok_and_masks_passwords(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good file is summed up; --json gives all of it but its secrets."""
    file = tmp_path / "sqlroute.toml"
    file.write_text(
        "[keyspaces.a]\n[[keyspaces.a.shards]]\nname = 's0'\n"
        "nodes = ['postgresql://u:hunter2@h/x']\n"
    )

    assert main(["config", "check", str(file)]) == 0
    human = capsys.readouterr()
    assert main(["config", "check", str(file), "--json"]) == 0
    machine = capsys.readouterr()

    assert "ok" in human.err
    assert human.out == ""
    assert json.loads(machine.out)["keyspaces"][0]["shards"][0]["nodes"][0]["host"] == "h"
    assert "hunter2" not in human.err + machine.out + machine.err


def test_local_commands_without_a_topology_fail_clearly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to stop or to look at, and the error says so."""
    for verb in ("down", "status"):
        assert main(["local", verb, "--dir", str(tmp_path)]) == 1
        assert "no local topology in" in capsys.readouterr().err


def test_what_destroys_is_refused_without_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nobody can be asked, --yes is needed: exit code 5, and nothing was done."""
    keep = tmp_path / "topology.json"

    assert main(["local", "reset", "--dir", str(tmp_path), "--json"]) == 5
    assert main(["local", "down", "--delete", "--dir", str(tmp_path), "--json"]) == 5
    assert "--yes" in capsys.readouterr().err
    assert not keep.exists()


def test_local_up_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shard, a directory that is somebody else's."""
    (tmp_path / "mine.txt").write_text("mine")

    assert main(["local", "up", "--dir", str(tmp_path), "--shards", "0"]) == 1
    assert "at least 1 shard" in capsys.readouterr().err
    assert main(["local", "up", "--dir", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
