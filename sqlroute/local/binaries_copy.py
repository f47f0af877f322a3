"""A copy of PostgreSQL's programs that the servers' user can read.

A virtual environment under root's home (mode 0700) cannot be read by ``postgres`` or ``nobody``.
The tree is copied once into ``/var/tmp``, under a name made of the size and time of its
``postgres``, and used from there by all topologies. Changes nothing in the original.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sqlroute.errors import LocalTopologyError

CACHE = Path("/var/tmp")  # kept over a reboot, and open to every user on any Unix


def readable_copy(pieces: Sequence[Path], *, key: Path, cache: Path | None = None) -> Path:
    """Return a directory with a copy of each piece under its own name, for everybody to read.

    Two processes may copy at once: each fills a directory of its own and renames it, the second
    finds the name taken and drops its work. No reader ever sees half a tree.

    Args:
        key: the file whose size and time of change name the copy.
        cache: where to put it; None for :data:`CACHE`.

    Raises:
        LocalTopologyError: it cannot be written, or somebody else owns that name.
    """
    seen = key.stat()
    name = f"sqlroute-postgres-{os.geteuid()}-{seen.st_mtime_ns:x}-{seen.st_size:x}"
    target = (cache or CACHE) / name
    if not target.exists():
        try:
            _fill(target, pieces)
        except OSError as exc:
            raise LocalTopologyError(
                f"cannot copy PostgreSQL's programs to {target}: {exc}; "
                "free some space there, or name another bin directory with --pg-bin"
            ) from exc
    _refuse_foreign(target)
    return target


def _fill(target: Path, pieces: Sequence[Path]) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for piece in pieces:
            shutil.copytree(piece, work / piece.name, symlinks=True, ignore=_unneeded)
        _open_to_all(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unneeded(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name in {"__pycache__", "include"} or name.endswith(".a")}


def _open_to_all(root: Path) -> None:
    for folder, _, names in os.walk(root):
        Path(folder).chmod(0o755)
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def _refuse_foreign(target: Path) -> None:
    """Refuse a tree that another user could have laid there: its programs would be run."""
    found = target.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise LocalTopologyError(
            f"{target} is not a directory that only this user can write; "
            "remove it, or name a bin directory with --pg-bin"
        )
