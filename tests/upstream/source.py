"""The sources of the installed SQLAlchemy: its wheel carries no tests, its sdist does."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

_WANTED = ("test/", "lib/sqlalchemy/testing/plugin/", "setup.cfg", "pyproject.toml")


def sdist(cache: Path) -> Path:
    """Return the sdist of the installed version, downloaded unless the cache has it.

    Raises:
        SystemExit: the package index did not give it.
    """
    wanted = version("sqlalchemy")
    cache.mkdir(parents=True, exist_ok=True)
    found = cache / f"sqlalchemy-{wanted}.tar.gz"
    said = ""
    # an environment made by uv has no pip of its own
    for python in (sys.executable, getattr(sys, "_base_executable", sys.executable)):
        if found.exists():
            break
        pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet", "download")
        command = (*pip, "--no-binary", ":all:", "--no-deps", "--dest", str(cache))
        done = subprocess.run(
            [*command, f"sqlalchemy=={wanted}"], check=False, capture_output=True, text=True
        )
        said = (done.stderr or done.stdout or "nothing was said").strip().splitlines()[-1]
    if not found.exists():
        raise SystemExit(f"pip gave no sdist of sqlalchemy {wanted}: {said}")
    return found


def unpack(archive: Path, directory: Path) -> Path:
    """Unpack what the suite needs; return its root. Each process that runs it needs its own."""
    directory.mkdir(parents=True)
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        wanted = tuple(f"{root}/{name}" for name in _WANTED)
        members = [member for member in tar.getmembers() if member.name.startswith(wanted)]
        tar.extractall(directory, members=members, filter="data")
    return directory / root
