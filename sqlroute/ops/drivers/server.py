"""The driver of a server whose data directory a :class:`Shell` reaches: all but the transport.

``local``, ``docker`` and ``ssh`` are this with another shell, and with their own ways to stop and
start where they have better ones than ``pg_ctl`` and signals.

What is easily done wrong, and is done here: a stale ``postmaster.pid`` and the orphans of a killed
postmaster are cleared before anything else; ``pg_rewind`` and ``pg_basebackup`` copy the settings
of *another* node, fences included, so that the node's own are given back and fences are removed;
what they leave can only be started as a standby, whatever happens to the command afterwards.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlroute.errors import DriverError
from sqlroute.local.waiting import became_true
from sqlroute.ops.drivers import autoconf, scripts
from sqlroute.ops.drivers.base import (
    WHOLE,
    Ability,
    Control,
    Counted,
    Rewound,
    Source,
    Told,
)
from sqlroute.ops.drivers.hook import Hooked
from sqlroute.ops.drivers.shell import Ran, Shell

_AUTO = "postgresql.auto.conf"
_SHORT = 20.0
_READY = ("ready", "standby")
_NOBODY = ("", "orphans")
_LAST_WORDS = re.compile(r"^.*?(?:FATAL|PANIC|ERROR): +")
_BACKED_UP = re.compile(r"(\d+)/ *(\d+) kB \(")
_REWOUND = re.compile(r"(\d+)/ *\d+ kB \(\d+%\) copied")


@dataclass(frozen=True, slots=True)
class ServerDriver(Hooked):
    """A server that a shell reaches. Subclasses give the shell."""

    @property
    def abilities(self) -> frozenset[Ability]:
        return WHOLE | self.hook_abilities

    @property
    def shell(self) -> Shell:
        """The shell of its machine."""
        raise NotImplementedError

    @property
    def data(self) -> str:
        return self.spec.data

    @property
    def _log(self) -> str:
        return self.spec.log or f"{self.data}.log"

    # Running

    def is_running(self) -> bool:
        return bool(self._script(scripts.STATUS, self.data))

    def stop(self, timeout: float) -> None:
        self._script(scripts.STOP, self.data, timeout=timeout)

    def kill(self, timeout: float) -> None:
        self._script(scripts.KILL, self.data, timeout=timeout)

    def start(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if self._status() in _NOBODY:
            self._clear()
            seen = self._size(self._log)
            self._start(timeout)
            if not self._await_ready(deadline):
                raise self._did_not_start(seen, timeout)
        elif not self._await_ready(deadline):
            raise self._error(f"runs, but takes no connections after {timeout:g} s; look at it")

    def _start(self, timeout: float) -> None:
        options = shlex.join(self._options())
        # pg_ctl says 0 also for a standby that failed at once, and not 0 for one that is only
        # slow: what counts is what the server itself says afterwards.
        seconds = f"{max(timeout, 1):.0f}"
        self.shell.run(
            (
                *(self._tool("pg_ctl"), "start", "-D", self.data, "-l", self._log, "-o", options),
                *("-s", "-w", "-t", seconds),
            ),
            timeout=timeout + 5,
        )

    def _await_ready(self, deadline: float) -> bool:
        """Wait until it takes connections; False where it ended or did not in time."""
        said = ""

        def settled() -> bool:
            nonlocal said
            said = self._status()
            return said in (*_READY, *_NOBODY)

        became_true(settled, timeout=max(deadline - time.monotonic(), 0), every=0.02)
        return said in _READY

    def _status(self) -> str:
        """Return the postmaster's word for its state, ``orphans`` if only others are left."""
        return self._script(scripts.STATUS, self.data).strip()

    # The data

    def control(self) -> Control:
        ran = self.shell.run((self._tool("pg_controldata"), self.data), timeout=_SHORT)
        self._refuse("pg_controldata", ran)
        try:
            return Control.read(ran.output)
        except (KeyError, ValueError) as exc:
            raise self._error(f"pg_controldata says nothing of {exc}") from exc

    def rewind(self, source: Source, timeout: float, progress: Told) -> Rewound:
        deadline = time.monotonic() + timeout
        self._clear()
        if not self.control().was_clean_shutdown:
            progress("recovering from the crash")
            self._recover(deadline)
        self._script(scripts.KEEP_SETTINGS, self.data)
        environment, conninfo = _connection({"dbname": "postgres", **source})
        configured = self._configuration()
        argv = (
            *(self._tool("pg_rewind"), "-D", self.data, f"--source-server={conninfo}"),
            *("--progress", "--no-ensure-shutdown"),
            *((f"--config-file={configured}",) if configured else ()),
        )
        try:
            ran = self.shell.run(
                argv,
                environment=environment,
                timeout=max(deadline - time.monotonic(), 1),
                heard=progress,
            )
        finally:
            # Whatever it has done: never a second primary, and never another node's settings.
            self._script(scripts.STANDBY, self.data)
            self._script(scripts.GIVE_SETTINGS_BACK, self.data)
        self._refuse("pg_rewind", ran)
        self.remove_fence()
        said = f"{ran.output}\n{ran.said}"
        counts = _REWOUND.findall(said)
        words = "no rewind required" if "no rewind required" in said else "rewound"
        return Rewound(words, int(counts[-1]) * 1024 if counts else None)

    def clone(
        self,
        source: Source,
        *,
        slot: str | None,
        timeout: float,
        progress: Counted,
        replace: bool = False,
    ) -> None:
        self._refuse_running("cloned over")
        parent, _, name = self.data.rpartition("/")
        work = self._room(f"{parent}/.{name}.cloning", replace=replace)
        given = {key: value for key, value in source.items() if key != "dbname"}
        environment, conninfo = _connection(given)
        argv = (
            *(self._tool("pg_basebackup"), "-D", work, "-d", conninfo, "-w", "-P"),
            *("-c", "fast", "-X", "stream", *(("-S", slot) if slot else ())),
        )
        before = f"{self.data}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        with self._nothing_half(work):
            ran = self.shell.run(
                argv, environment=environment, timeout=timeout, heard=_counting(progress)
            )
            self._refuse("pg_basebackup", ran)
            self._script(scripts.CARRY, self.data, work)
            self._remove_fence_in(work)
            self._script(scripts.SWAP, self.data, work, before, timeout=_SHORT * 3)
        self._script(scripts.FORGET_SETTINGS, self.data)

    def make_standby(self, primary_conninfo: str, slot: str | None) -> None:
        self._refuse_running("made a standby")
        self._script(scripts.STANDBY, self.data)
        text, _ = autoconf.without_fence(self._read_settings(self.data))
        self._write_settings(self.data, autoconf.as_standby(text, primary_conninfo, slot))

    def settings(self) -> dict[str, str]:
        return autoconf.values(self._read_settings(self.data))

    def remove_fence(self) -> tuple[str, ...]:
        return self._remove_fence_in(self.data)

    # Private

    def _recover(self, deadline: float) -> None:
        """End the recovery of a crashed server, so that pg_rewind finds it cleanly shut down.

        pg_rewind would do it itself, but a fence in the settings keeps its session out, as anybody
        else's. A standby is started as a standby, without a primary: in single-user mode it would
        write a checkpoint of its own where the log of others goes on.
        """
        left = max(deadline - time.monotonic(), 1)
        if self._has("standby.signal"):
            alone = ("listen_addresses=", "unix_socket_directories=/tmp", "restore_command=")
            nobody = ("session_preload_libraries=", "primary_conninfo=", *alone)
            words = [word for setting in nobody for word in ("-c", setting)]
            options = shlex.join((*self._options(), *words))
            given = (self._tool("pg_ctl"), self.data, self._log, options, f"{left:.0f}")
            self._script(scripts.RECOVER, *given, timeout=left + 5)
            return
        configured = self._configuration()
        ran = self.shell.run(
            (
                *(self._tool("postgres"), "--single", "-F", "-D", self.data),
                *(("-c", f"config_file={configured}") if configured else ()),
                *("-c", "session_preload_libraries=", "template1"),
            ),
            timeout=left,
        )
        self._refuse("postgres --single", ran)

    def _options(self) -> tuple[str, ...]:
        """Return the server's options: those that are configured, else those of its last start."""
        given = tuple(shlex.split(self.spec.options)) if self.spec.options else self._last()[1:]
        if self.spec.config and not any("config_file" in word for word in given):
            given = (*given, "-c", f"config_file={self.spec.config}")
        return given

    def _configuration(self) -> str:
        """Return the path of a ``postgresql.conf`` outside of the data directory, else nothing."""
        if self.spec.config:
            return self.spec.config
        words = " ".join(self._options())
        found = re.search(r"config[_-]file=(\S+)", words)
        return found[1] if found else ""

    def _last(self) -> tuple[str, ...]:
        """Return how the server was started last, its program first, without the directory."""
        text = self._read(f"{self.data}/postmaster.opts") or ""
        words = [word.strip().rstrip('"') for word in text.strip().split(' "')]
        while "-D" in words:
            at = words.index("-D")
            del words[at : at + 2]
        return tuple(word for word in words if word)

    def _tool(self, name: str) -> str:
        if self.spec.bin:
            return f"{self.spec.bin}/{name}"
        program = next(iter(self._last()), "")
        return f"{program.rpartition('/')[0]}/{name}" if "/" in program else name

    def _clear(self) -> None:
        ran = self._run_script(scripts.CLEAR, self.data, timeout=_SHORT)
        if ran.code == 3:
            raise self._error("runs; stop it first")
        self._refuse("clearing what a crash has left", ran)

    def _refuse_running(self, what: str) -> None:
        if self.is_running():
            raise self._error(f"runs and cannot be {what}; stop it first")

    def _room(self, work: str, *, replace: bool) -> str:
        ran = self._run_script(scripts.ROOM, self.data, work, "yes" if replace else "no")
        if ran.code == 17:
            raise self._error(
                f"has a data directory {self.data} that is not empty; ask to replace it, which "
                "keeps the old one beside it, or name another one"
            )
        if ran.code == 18:
            raise self._error(
                f"has a data directory {self.data} that is a mount point, which cannot be set "
                "aside; empty it, or mount the directory above it"
            )
        self._refuse(f"making room beside {self.data}", ran)
        return ran.output

    @contextlib.contextmanager
    def _nothing_half(self, work: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with contextlib.suppress(DriverError):
                self._script(scripts.CLEAN_UP, self.data, work, timeout=60)
            raise

    def _has(self, name: str) -> bool:
        return self._read(f"{self.data}/{name}") is not None

    def _read(self, path: str) -> str | None:
        """Return a file of the machine, ``None`` where there is none."""
        ran = self._run_script(scripts.READ, path, timeout=_SHORT)
        if ran.code == 44:
            return None
        self._refuse(f"reading {path}", ran)
        return ran.output

    def _read_settings(self, directory: str) -> str:
        return self._read(f"{directory}/{_AUTO}") or ""

    def _write_settings(self, directory: str, text: str) -> None:
        path = f"{directory}/{_AUTO}"
        ran = self._run_script(scripts.WRITE, path, text=text, timeout=_SHORT)
        self._refuse(f"writing {path}", ran)

    def _remove_fence_in(self, directory: str) -> tuple[str, ...]:
        text, removed = autoconf.without_fence(self._read_settings(directory))
        if removed:
            self._write_settings(directory, text)
        return removed

    def _size(self, path: str) -> int:
        return int(self._run_script(scripts.TAIL, path, "size").output.strip() or 0)

    def _did_not_start(self, seen: int, timeout: float) -> DriverError:
        written = self._run_script(scripts.TAIL, self._log, str(seen + 1)).output
        lines = [line for line in written.splitlines() if line.strip()]
        words = [line for line in lines if re.search(r"(FATAL|PANIC|ERROR): ", line)] or lines
        said = _LAST_WORDS.sub("", words[-1]) if words else "nothing was logged"
        hangs = f"takes no connections after {timeout:g} s"
        what = hangs if self.is_running() else "did not start"
        return self._error(f"{what}: {said}; the whole log is {self._log}")

    def _script(self, script: str, *words: str, timeout: float = _SHORT) -> str:
        ran = self._run_script(script, *words, timeout=timeout)
        self._refuse("a command of its shell", ran)
        return ran.output

    def _run_script(self, script: str, *words: str, text: str = "", timeout: float = _SHORT) -> Ran:
        return self.shell.run(("sh", "-c", script, "sh", *words), text=text, timeout=timeout)

    def _refuse(self, what: str, ran: Ran) -> None:
        if ran.code != 0:
            raise self._error(f"{what} failed: {ran.last_line} (exit code {ran.code})", ran.code)

    def _error(self, text: str, code: int | None = None) -> DriverError:
        return DriverError(
            f"{self.node} ({self.kind} driver) {text}", node=self.node, exit_code=code
        )


def _connection(source: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Return the environment that holds the password, and the other parameters as one text."""
    from psycopg.conninfo import make_conninfo

    given = {key: value for key, value in source.items() if key != "password"}
    password = source.get("password")
    return ({"PGPASSWORD": str(password)} if password else {}), make_conninfo("", **given)


def _counting(progress: Counted) -> Callable[[str], None]:
    def heard(line: str) -> None:
        if found := _BACKED_UP.search(line):
            progress(int(found[1]) * 1024, int(found[2]) * 1024)

    return heard
