"""Names that stand for several servers: DNS is asked again whenever its last answer expires.

One daemon thread for all names of a router, started only if there are any. An answer that fails or
is empty changes nothing: the servers known before stay, since a name server that is away for a
minute must not take the databases with it.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from sqlroute.topology import Topology

log = logging.getLogger("sqlroute.discovery")

SHORTEST, LONGEST = 5.0, 300.0
"""Seconds between two questions for one name, whatever its time to live."""

WITHOUT_TTL = 30.0
"""Seconds where nobody tells a time to live: the system's resolver does not."""

TIMEOUT = 5.0
"""Seconds that one question may take."""


class Answer(NamedTuple):
    """What a name stands for now.

    Attributes:
        addresses: as text, IPv4 or IPv6.
        ttl: seconds for which that may be believed.
    """

    addresses: tuple[str, ...]
    ttl: float


class Discovery:
    """Keeps a topology up to date with DNS.

    Args:
        declared: the topology as configured.
        on_change: called with the topology whenever the addresses have changed, from its thread.
        ask: host -> answer; raises ``OSError`` when there is none. By default DNS, see
            :func:`ask_dns`.
    """

    def __init__(
        self,
        declared: Topology,
        on_change: Callable[[Topology], None],
        ask: Callable[[str], Answer] | None = None,
    ) -> None:
        self._declared = declared
        self._on_change = on_change
        self._ask = ask or ask_dns
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._due: dict[str, float] = {}
        self._failing: set[str] = set()
        self._thread: threading.Thread | None = None
        self._news, self._all_asked = threading.Event(), threading.Event()
        self._is_closed = False

    @property
    def topology(self) -> Topology:
        """The declared one with what is known of its names."""
        return self._declared.discovered(self._addresses)

    def declare(self, topology: Topology) -> None:
        """Ask for other names from now on."""
        self._declared = topology
        self._news.set()

    def start(self, timeout: float) -> None:
        """Start the thread, if there is a name; wait until each was asked once, a while at most."""
        if self._thread is not None or not self._hosts():
            return
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="sqlroute discovery", daemon=True)
        self._thread.start()
        self._all_asked.wait(timeout)

    def close(self) -> None:
        self._is_closed = True
        self._news.set()
        self._thread = None

    def forget(self) -> None:
        """Start anew: also in a child after a fork, where the thread is not."""
        self._thread = None
        self._news, self._all_asked = threading.Event(), threading.Event()
        self._is_closed = False

    def _hosts(self) -> set[str]:
        return {node.host for node in self._declared.nodes() if node.discovers}

    def _run(self) -> None:
        while not self._is_closed:
            self._news.clear()
            self._look(time.monotonic())
            self._all_asked.set()
            due = min((self._due[host] for host in self._hosts()), default=math.inf)
            self._news.wait(min(max(due - time.monotonic(), 0.0), LONGEST))

    def _look(self, now: float) -> None:
        """Ask for the names that are due; publish once if any has changed."""
        hosts = self._hosts()
        before = dict(self._addresses)
        self._addresses = {host: found for host, found in before.items() if host in hosts}
        self._due = {host: at for host, at in self._due.items() if host in hosts}
        for host in sorted(hosts):
            if self._due.get(host, now) <= now:
                self._due[host] = now + self._resolve(host)
        if self._addresses != before:
            self._on_change(self.topology)

    def _resolve(self, host: str) -> float:
        """Note what a name stands for; return the seconds until it is to be asked again."""
        try:
            answer = self._ask(host)
        except OSError as error:
            return self._failed(host, str(error))
        if not answer.addresses:
            return self._failed(host, "it has no address")
        self._failing.discard(host)
        addresses = tuple(sorted(set(answer.addresses)))
        if addresses != self._addresses.get(host):
            log.info("%s is %s", host, ", ".join(addresses))
            self._addresses[host] = addresses
        return min(max(answer.ttl, SHORTEST), LONGEST)

    def _failed(self, host: str, why: str) -> float:
        if host not in self._failing:
            self._failing.add(host)
            kept = ", ".join(self._addresses.get(host, ())) or "its name"
            log.warning("%s cannot be looked up, going on with %s: %s", host, kept, why)
        return SHORTEST


def ask_dns(host: str) -> Answer:
    """Ask for the addresses of a host; with dnspython (the ``dns`` extra) for how long, too.

    What is not in DNS may be in the system's own tables.

    Raises:
        OSError: there are none, or nobody answers.
    """
    try:
        import dns.exception
        import dns.resolver
    except ImportError:
        return _ask_system(host)
    try:
        found = dns.resolver.Resolver().resolve_name(host, lifetime=TIMEOUT)
    except (dns.exception.DNSException, OSError):
        return _ask_system(host)
    ttls = [answer.rrset.ttl for answer in found.values() if answer.rrset is not None]
    return Answer(tuple(found.addresses()), float(min(ttls, default=WITHOUT_TTL)))


def _ask_system(host: str) -> Answer:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return Answer(tuple(str(address[0]) for *_, address in found), WITHOUT_TTL)
