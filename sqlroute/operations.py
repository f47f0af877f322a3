"""What the configuration says about operating the servers: as whom, how each machine is reached.

Plain values, without I/O: :mod:`sqlroute.config` makes them, :mod:`sqlroute.ops.drivers` acts on
them. Routers never read them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlroute.topology import Node, Secret

PLACEHOLDERS = ("name", "node", "host", "port", "shard")
"""What ``{...}`` in a driver's texts may stand for; ``node`` is another word for ``name``."""

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")


@dataclass(frozen=True, slots=True)
class Operator:
    """As whom the commands of operators connect to the servers; what is empty is the node's own."""

    user: str = ""
    password: Secret | None = None
    passfile: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A program of the user's with its arguments, which may hold a secret: only its name is shown.

    Attributes:
        words: of the command line, ``{...}`` not filled in yet.
    """

    words: tuple[Secret, ...]

    def argv(self, values: Mapping[str, str]) -> tuple[str, ...]:
        """Return the words with ``{...}`` filled in; a value stays one word, whatever it holds."""
        return tuple(filled(word.reveal(), values) for word in self.words)

    def __str__(self) -> str:
        program = self.words[0].reveal()
        return f"{program} ***" if len(self.words) > 1 else program

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """How the machine of a node, or of each node of a pattern, is reached beside SQL.

    Attributes:
        pattern: the name of a node, or a pattern of names (``*``, ``s0-*``).
        kind: ``local``, ``docker``, ``ssh``, ``program`` or ``hook``.
        advertise: ``host:port`` by which the *other servers* reach the node.
        data: the data directory, on its machine.
        bin: the directory of PostgreSQL's programs there.
        account: local and docker: the user who runs the server; empty for the owner of the data.
        log: where a server that ``pg_ctl`` starts writes what it says before its own log is open.
        options: of the server at its start, ``-p 5433 -c cluster_name=x``.
        config: ``postgresql.conf`` where it is not in the data directory.
        host, user, port, sudo, unit, ssh_options: of an ssh driver. ``sudo`` is the user who runs
            the server where ``user`` is another, ``unit`` the one of systemd that runs it.
        container, docker: of a docker driver; ``docker`` is the program.
        stop, start, kill, status: of a hook driver.
        fence, unfence: of any driver: fence level L5.
        hook_timeout: seconds that a command of the user's may take.
    """

    pattern: str
    kind: str
    advertise: str = ""
    data: str = ""
    bin: str = ""
    account: str = ""
    log: str = ""
    options: str = ""
    config: str = ""
    host: str = ""
    user: str = ""
    port: int | None = None
    sudo: str = ""
    unit: str = ""
    ssh_options: tuple[str, ...] = ()
    container: str = ""
    docker: str = "docker"
    stop: Command | None = None
    start: Command | None = None
    kill: Command | None = None
    status: Command | None = None
    fence: Command | None = None
    unfence: Command | None = None
    hook_timeout: float = 30.0
    values: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def of(self, node: Node, shard: str) -> DriverSpec:
        """Return the description of one node: ``{...}`` filled in in all texts."""
        values = _values(node, shard)
        changed: dict[str, Any] = {"values": values}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ("pattern", "kind"):
                continue
            if isinstance(value, str):
                changed[each.name] = filled(value, values)
            elif isinstance(value, tuple):
                changed[each.name] = tuple(filled(word, values) for word in value)
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class Operations:
    """The tables ``[operator]`` and ``[drivers]``."""

    operator: Operator = Operator()
    drivers: tuple[DriverSpec, ...] = ()

    def spec_of(self, node: Node, shard: str) -> DriverSpec | None:
        """Return how a node's machine is reached, ``None`` where nothing says so.

        The node's own name wins over patterns; among these, the first that is written. A node
        found behind a name of several servers (``db@10.0.0.7``) goes by the configured name too.
        """
        names = (node.name, node.name.partition("@")[0])
        own = [spec for name in names for spec in self.drivers if spec.pattern == name]
        like = [spec for spec in self.drivers if fnmatch.fnmatchcase(node.name, spec.pattern)]
        found = next(iter((*own, *like)), None)
        return None if found is None else found.of(node, shard)

    def advertised(self, node: Node, shard: str) -> tuple[str, int]:
        """Return host and port by which the other servers of its shard reach a node."""
        spec = self.spec_of(node, shard)
        if spec is None or not spec.advertise:
            return _values(node, shard)["host"], node.port
        host, port = address(spec.advertise, node.port)
        return host, port


def is_pattern(name: str) -> bool:
    """Say if a name in ``[drivers]`` may stand for several nodes, those of the future too."""
    return any(letter in name for letter in "*?[")


def unknown_placeholders(text: str) -> tuple[str, ...]:
    """Return what stands in ``{...}`` and means nothing."""
    return tuple(name for name in _PLACEHOLDER.findall(text) if name not in PLACEHOLDERS)


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return the text with the values in the place of ``{...}``; other braces stay."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def address(text: str, port: int) -> tuple[str, int]:
    """Return host and port of ``host``, ``host:port`` or ``[IPv6 address]:port``.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+))(?::([0-9]{1,5}))?", text)
    if found is None or not 1 <= int(found[3] or port) <= 65_535:
        raise ValueError(f"{text!r} is no host:port")
    return found[1] or found[2], int(found[3] or port)


def _values(node: Node, shard: str) -> dict[str, str]:
    host = dict(node.options).get("hostaddr") or node.host
    return {
        "name": node.name,
        "node": node.name,
        "host": host,
        "port": str(node.port),
        "shard": shard,
    }
