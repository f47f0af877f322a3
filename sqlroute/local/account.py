"""As which user of the operating system the servers run.

PostgreSQL refuses to run as root. An ordinary user's servers run as that user; root's run as
``postgres`` if that user exists, else as ``nobody`` (a number without an entry in the user
database fails in initdb). Decides also what such a user can reach; changes no permission of
anything that is not sqlroute's own.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlroute.errors import LocalTopologyError

_CANDIDATES = ("postgres", "nobody")
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True, slots=True)
class Account:
    """A user that runs servers.

    Attributes:
        switches: this process is root, and must become the user to run a server.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    switches: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """A program that has ended."""

    code: int
    output: str


def server_account() -> Account:
    """Choose the user that new servers run as.

    Raises:
        LocalTopologyError: this is root, and there is neither ``postgres`` nor ``nobody``.
    """
    if os.geteuid() != 0:
        return _account(_entry(os.geteuid()), switches=False)
    for name in _CANDIDATES:
        try:
            return _account(pwd.getpwnam(name), switches=True)
        except KeyError:
            continue
    raise LocalTopologyError(
        "PostgreSQL refuses to run as root and there is no user postgres or nobody; "
        "create one of them, or run as an ordinary user"
    )


def owner_account(path: Path) -> Account:
    """Return the user that owns existing data: its servers must go on running as that user."""
    uid = path.stat().st_uid
    if os.geteuid() != 0 or uid == 0:
        return server_account()
    return _account(_entry(uid), switches=True)


def closed_parent(path: Path, account: Account) -> Path | None:
    """Return the uppermost directory above ``path`` that the user cannot pass; None if none."""
    parents = reversed(path.parents)
    return next((p for p in parents if not _allows(p, account, stat.S_IXOTH)), None)


def obstacle(path: Path, account: Account, *, execute: bool = False) -> Path | None:
    """Return what keeps the user from reading ``path``: it or a directory above; None if nothing.

    Args:
        execute: the file must be executable too. Directories always must.
    """
    closed = closed_parent(path, account)
    if closed is not None:
        return closed
    wanted = stat.S_IROTH | (stat.S_IXOTH if execute or path.is_dir() else 0)
    return None if _allows(path, account, wanted) else path


def give(path: Path, account: Account) -> None:
    """Make the user the owner of a file or directory of ours."""
    if account.switches:
        os.chown(path, account.uid, account.gid)


def run_as(
    account: Account,
    command: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> Finished:
    """Run a program to its end as the user.

    The environment is small and fixed: a ``PGPORT``, ``PGDATA`` or locale of the caller's shell
    must not change what is built. It runs in ``/``, since the user may be unable to read ours.

    Raises:
        LocalTopologyError: it cannot be run, or did not end in time.
    """
    words = [str(word) for word in command]
    kept = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
    try:
        done = subprocess.run(
            words,
            check=False,
            cwd="/",
            env={**kept, "LC_ALL": "C", "TZ": "UTC", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            user=account.uid if account.switches else None,
            group=account.gid if account.switches else None,
            extra_groups=account.groups if account.switches else None,
        )
    except subprocess.TimeoutExpired as exc:
        raise LocalTopologyError(
            f"{Path(words[0]).name} did not end in {timeout:g} s; is the machine overloaded?"
        ) from exc
    except OSError as exc:
        raise LocalTopologyError(
            f"cannot run {words[0]} as user {account.name}: {exc.strerror}; "
            "name another bin directory with --pg-bin"
        ) from exc
    return Finished(done.returncode, done.stdout)


def _entry(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise LocalTopologyError(
            f"uid {uid} has no entry in the user database, which PostgreSQL needs; "
            "add one, or run as another user"
        ) from None


def _account(entry: pwd.struct_passwd, *, switches: bool) -> Account:
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid) if switches else os.getgroups()
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(groups), switches)


def _allows(path: Path, account: Account, wanted: int) -> bool:
    """Say whether the mode bits grant the user ``wanted`` (bits of "other")."""
    if not account.switches:
        ways = ((stat.S_IROTH, os.R_OK), (stat.S_IXOTH, os.X_OK))
        return all(os.access(path, way) for bit, way in ways if wanted & bit)
    try:
        found = path.stat()
    except OSError:
        return False
    if found.st_uid == account.uid:
        shift = 6
    elif found.st_gid == account.gid or found.st_gid in account.groups:
        shift = 3
    else:
        shift = 0
    return (found.st_mode >> shift) & wanted == wanted
