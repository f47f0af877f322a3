"""Nodes that the file does not name: behind a name in DNS, in a Patroni cluster, in the catalog.

Three kinds of questions, each with a thread of its own that is there only if it has something to
ask for (:mod:`sqlroute.runtime.inquiry`). What they find is put onto the declared topology in this
order, so that a node that an operator has removed stays away whoever else names it.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from sqlroute.runtime.inquiry import Inquiry, NoAnswer, Reply
from sqlroute.topology import Announced, Place, RestApi, Topology

SHORTEST, LONGEST = 5.0, 300.0
"""Seconds between two questions for one name, whatever its time to live."""

WITHOUT_TTL = 30.0
"""Seconds where nobody tells a time to live: the system's resolver does not."""

TIMEOUT = 5.0
"""Seconds that one question may take."""

Addresses = tuple[str, ...]
Members = tuple[Place, ...]


class Answer(NamedTuple):
    """What a name stands for now.

    Attributes:
        addresses: as text, IPv4 or IPv6.
        ttl: seconds for which that may be believed.
    """

    addresses: Addresses
    ttl: float


class Discovery:
    """Keeps a topology up to date.

    Args:
        declared: the topology as configured.
        on_change: called from a thread of its own whenever :attr:`topology` has changed.
        ask_catalog: a shard, and the revision that is known to be there -> what its catalog says of
            its nodes, by then or later.
        ask_name: host -> its addresses. By default DNS, see :func:`ask_dns`.
        ask_cluster: a shard and the API of its Patroni -> the members. By default that API.

    Each of the three raises ``OSError`` where there is no answer.
    """

    def __init__(
        self,
        declared: Topology,
        on_change: Callable[[], None],
        *,
        ask_catalog: Callable[[str, int], Announced],
        ask_name: Callable[[str], Answer] | None = None,
        ask_cluster: Callable[[str, RestApi], Members] | None = None,
    ) -> None:
        self._declared = declared
        self._ask_name = ask_name or ask_dns
        self._ask_cluster = ask_cluster or ask_patroni
        self._ask_catalog = ask_catalog
        self._revisions: dict[str, int] = {}
        self._names = Inquiry("addresses", self._hosts, self._addresses, on_change)
        self._clusters = Inquiry("members", self._clustered, self._members, on_change)
        self._catalogs = Inquiry("catalog", self._revised, self._announced, on_change)

    @property
    def topology(self) -> Topology:
        """The declared one with what is known beside it."""
        found = self._declared.discovered(self._names.known)
        found = found.consisting_of(self._clusters.known)
        return found.announced(self._catalogs.known)

    def declare(self, topology: Topology) -> None:
        """Go by another topology from now on."""
        self._declared = topology
        for inquiry in self._inquiries():
            inquiry.wake()

    def revised(self, shard: str, revision: int) -> None:
        """Read the nodes in a shard's catalog anew, if what is known is of another revision.

        Does not wait for it.
        """
        self._revisions[shard] = revision
        known = self._catalogs.known.get(shard)
        if known is None or known.revision != revision:
            self._catalogs.renew(shard)

    def start(self, timeout: float) -> None:
        """Start the threads that are needed; wait until each has asked once, a while at most.

        Not for the catalogs: their nodes are used as soon as they are known.
        """
        deadline = time.monotonic() + timeout
        asked = [inquiry.start() for inquiry in self._inquiries()]
        for each in asked[:2]:
            each.wait(max(deadline - time.monotonic(), 0.0))

    def settle(self, timeout: float) -> None:
        """Wait until there is nothing more to ask for now, of the catalogs neither."""
        deadline = time.monotonic() + timeout
        for inquiry in self._inquiries():
            inquiry.start().wait(max(deadline - time.monotonic(), 0.0))

    def close(self) -> None:
        for inquiry in self._inquiries():
            inquiry.close()

    def forget(self) -> None:
        """Start anew in a child after a fork, where the threads are not."""
        for inquiry in self._inquiries():
            inquiry.forget()

    def _inquiries(self) -> tuple[Inquiry[Addresses], Inquiry[Members], Inquiry[Announced]]:
        return self._names, self._clusters, self._catalogs

    def _hosts(self) -> frozenset[str]:
        return frozenset(node.host for node in self._declared.nodes() if node.discovers)

    def _clustered(self) -> frozenset[str]:
        return frozenset(s.name for k in self._declared.keyspaces for s in k.shards if s.patroni)

    def _revised(self) -> frozenset[str]:
        return frozenset(self._revisions)

    def _addresses(self, host: str) -> Reply[Addresses]:
        found = self._ask_name(host)
        if not found.addresses:
            raise NoAnswer("it has no address")
        seconds = min(max(found.ttl, SHORTEST), LONGEST)
        return Reply(tuple(sorted(set(found.addresses))), seconds)

    def _members(self, shard: str) -> Reply[Members]:
        api = self._declared.shard(shard).patroni
        if api is None:
            raise NoAnswer("by now its nodes are not those of a Patroni cluster")
        found = self._ask_cluster(shard, api)
        if not found:
            raise NoAnswer("the cluster has no member")
        return Reply(found, api.interval)

    def _announced(self, shard: str) -> Reply[Announced]:
        return Reply(self._ask_catalog(shard, self._revisions[shard]), math.inf)


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


def ask_patroni(shard: str, api: RestApi) -> Members:
    """Ask Patroni for the members of a cluster.

    Raises:
        OSError: it does not answer.
    """
    from sqlroute.ext.patroni import ask_members  # which needs http, ssl, json: few programs do

    return ask_members(shard, api)
