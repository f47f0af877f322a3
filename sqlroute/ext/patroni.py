"""Patroni, where it runs a shard's cluster: which nodes there are, and who changes their roles.

Reads ``GET /cluster`` of its REST API, and has it switch over or fail over; never promotes anything
beside it, never writes to its store or its configuration. Which node is the primary is observed by
SQL here as everywhere. Codes and texts are those of Patroni 4.1 (``patroni/api.py``).
"""

from __future__ import annotations

import json
import logging
import select
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sqlroute.errors import OperationFailed, OperationRefused
from sqlroute.topology import Place, RestApi

log = logging.getLogger("sqlroute.patroni")

PORT = 8008
"""Where the REST API listens unless told otherwise."""

LARGEST = 16 * 2**20
"""Bytes of an answer that are read: a cluster of a thousand members says less."""

PAUSE = 0.05
"""Seconds from one look at a cluster whose leader changes to the next."""

GRACE = 3.0
"""Seconds in which the leader may still change after Patroni has said that it failed."""

_REFUSED = (400, 401, 403, 404, 405, 409, 411, 412, 422)


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the cluster, as Patroni says.

    Attributes:
        role: ``leader``, ``replica``, ``sync_standby``, ``quorum_standby``, ``standby_leader``.
        state: ``running``, ``streaming``, ``starting``, ``stopped``, ``creating replica`` ...
        host, port: of PostgreSQL; empty as long as Patroni does not know.
        api: of its own REST API, ``http://host:port``.
        timeline: 0 if unknown.
        lag_bytes: behind the leader; ``None`` if unknown, and of the leader.
        tags: as in its configuration: ``nofailover``, ``noloadbalance`` ...
    """

    name: str
    role: str
    state: str
    host: str = ""
    port: int = 5432
    api: str = ""
    timeline: int = 0
    lag_bytes: int | None = None
    tags: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def takes_reads(self) -> bool:
        return str(self.tags.get("noloadbalance", "")).lower() not in ("true", "yes", "on", "1")


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A switchover that Patroni will do by itself.

    Attributes:
        at: ISO 8601.
        leader, candidate: empty if Patroni may choose.
    """

    at: str
    leader: str = ""
    candidate: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """All members at one moment.

    Attributes:
        is_paused: Patroni changes no role by itself (``patronictl pause``).
    """

    scope: str
    members: tuple[Member, ...]
    is_paused: bool = False
    scheduled: Scheduled | None = None

    @property
    def leader(self) -> Member | None:
        """Who holds the lease of the primary; ``None`` in a cluster that has lost it."""
        return next((member for member in self.members if member.role == "leader"), None)

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def member_at(self, host: str, port: int) -> Member | None:
        """Return the member whose PostgreSQL listens there."""
        found = (m for m in self.members if (m.host, m.port) == (host, port))
        return next(found, None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A change of the leader that was asked for and has happened.

    Attributes:
        former: who was the leader; ``None`` where there was none.
        candidate: who was to become it, and ``leader`` who did: not always the same.
        timeline: of the new leader, 0 if it did not say.
        text: what Patroni answered; empty if the change was seen before it did.
        seconds: since it was asked for.
    """

    former: str | None
    candidate: str
    leader: str
    timeline: int
    text: str
    seconds: float


class PatroniSilent(OperationFailed):
    """No REST API of a cluster gives an answer of use."""


class Patroni:
    """The REST API of one cluster.

    Args:
        api: how it is reached. Any endpoint that answers is enough.
    """

    def __init__(self, api: RestApi) -> None:
        if not api.endpoints:
            raise ValueError("no endpoint of Patroni's REST API; give one, http://host:8008")
        self.api = api
        self._last = api.endpoints[0]

    def __repr__(self) -> str:
        return f"<Patroni {', '.join(self.api.endpoints)}>"

    def cluster(self) -> Cluster:
        """Return the cluster as the first endpoint that answers sees it.

        Raises:
            PatroniSilent: none does; names each and why.
        """
        failures = []
        for endpoint in self._endpoints():
            try:
                reply = self._get(endpoint, "/cluster")
                if reply.status == 200:
                    found = cluster_of(json.loads(reply.text))
                    self._last = endpoint
                    return found
                failures.append(f"{endpoint}: status {reply.status}")
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{endpoint}: {_reason(error)}")
        raise PatroniSilent(
            f"no REST API of Patroni answers ({'; '.join(failures)}); see that one of them runs "
            "and can be reached from here"
        )

    def switchover(self, leader: str, candidate: str, timeout: float) -> Outcome:
        """Make a member the leader in the place of another, and wait until it is the primary.

        Args:
            leader: who is it now. Patroni refuses if it is not.
            timeout: seconds.

        Raises:
            OperationRefused: with Patroni's reason; nothing was changed.
            OperationFailed: it was asked for and is not there in time; what became of it is said as
                far as it is known.
        """
        return self._change(
            "switchover", {"leader": leader, "candidate": candidate}, self.cluster(), timeout
        )

    def failover(self, candidate: str, timeout: float, *, is_forced: bool = False) -> Outcome:
        """Make a member the leader where there is none, and wait until it is the primary.

        Args:
            timeout: seconds.
            is_forced: also where there is a leader that runs.

        Raises: as :meth:`switchover`.
        """
        before = self.cluster()
        leader = before.leader
        if leader is not None and leader.state == "running" and not is_forced:
            raise OperationRefused(
                f"{leader.name} leads the cluster {before.scope} and runs: a failover may lose "
                "what it has acknowledged; switch over instead, or force it"
            )
        return self._change("failover", {"candidate": candidate}, before, timeout)

    # changing the leader

    def _change(
        self, action: str, wanted: Mapping[str, str], before: Cluster, timeout: float
    ) -> Outcome:
        """Have the leader changed and look at the cluster until it has.

        Patroni's own answer comes up to a second after the fact, so it is not waited for: as soon
        as the new leader itself says that it is the primary the change is over.
        """
        began = time.monotonic()
        deadline = began + timeout
        former = before.leader.name if before.leader else None
        said = ""
        with closing(self._send(action, wanted, before)) as waiting:
            while True:
                reply = waiting.poll(PAUSE)
                if reply is not None:
                    said = f"{reply.status} {reply.text}".strip()
                    if reply.status in _REFUSED:
                        raise OperationRefused(_refusal(action, wanted["candidate"], reply))
                    if reply.status == 503 and "failed" in reply.text:
                        deadline = min(deadline, time.monotonic() + GRACE)
                leader = self._promoted(before)
                now = time.monotonic()
                if leader is not None:
                    candidate = wanted["candidate"]
                    return Outcome(
                        former, candidate, leader.name, leader.timeline, said, now - began
                    )
                if now > deadline:
                    raise self._undone(action, wanted, former, said, now - began)

    def _promoted(self, before: Cluster) -> Member | None:
        """Return the leader if it is another one than before and its server is the primary."""
        try:
            leader = self.cluster().leader
        except PatroniSilent as error:
            log.info("while the leader changes: %s", error)
            return None
        if leader is None or leader.state != "running":
            return None
        former = before.leader
        if former is not None and leader.name == former.name:
            return None
        now = self._as_it_says_itself(leader)
        if now is not None:
            return now if now.role == "leader" else None
        is_promoted = leader.timeline > max((m.timeline for m in before.members), default=0)
        return leader if is_promoted else None

    def _as_it_says_itself(self, leader: Member) -> Member | None:
        """Return a leader by its own API, as a replica until it is promoted; None if it is silent.

        ``/cluster`` calls it the leader from when it holds the lease, 0.1 s before its server is
        promoted, and tells the new timeline a second late.
        """
        if not leader.api:
            return None
        try:
            said = json.loads(self._get(leader.api, "/patroni").text)
            is_primary = said["role"] in ("primary", "master")  # the latter before Patroni 4
            timeline = int(said.get("timeline") or 0)
        except (OSError, HTTPException, LookupError, TypeError, ValueError):
            return None
        return replace(leader, role="leader" if is_primary else "replica", timeline=timeline)

    def _undone(
        self, action: str, wanted: Mapping[str, str], former: str | None, said: str, seconds: float
    ) -> OperationFailed:
        try:
            cluster = self.cluster()
            leader = cluster.leader
            now = f"{leader.name} ({leader.state}) leads" if leader else "nobody leads"
        except PatroniSilent:
            now = "nobody says who leads"
        return OperationFailed(
            f"the {action} from {former or 'no leader'} to {wanted['candidate']} was not done in "
            f"{seconds:.1f} s: {now} the cluster; Patroni says {said or 'nothing'}; it may still "
            "happen: see `patronictl list` before trying again",
            step=action,
        )

    # HTTP

    def _endpoints(self) -> Iterator[str]:
        """Yield all endpoints, the one that has answered last first."""
        last = self._last
        yield last
        yield from (endpoint for endpoint in self.api.endpoints if endpoint != last)

    def _get(self, endpoint: str, path: str) -> _Reply:
        with closing(self._connection(endpoint, self.api.timeout)) as connection:
            connection.request("GET", path)
            return _read(connection.getresponse())

    def _send(self, action: str, wanted: Mapping[str, str], cluster: Cluster) -> _Waiting:
        """Ask the first API that can be reached; it is asked only once.

        That of the leader, except for a failover: who is to be replaced may hang.

        Raises:
            PatroniSilent: none can be reached; nothing was asked for.
        """
        headers = {"Content-Type": "application/json", **self._authorization()}
        api = cluster.leader.api if cluster.leader else ""
        own = [api] if self._is_trusted(api) else []
        others = [endpoint for endpoint in self._endpoints() if endpoint != api]
        failures = []
        for endpoint in [*others, *own] if action == "failover" else [*own, *others]:
            connection = self._connection(endpoint, self.api.timeout)
            try:
                connection.connect()
            except OSError as error:
                failures.append(f"{endpoint}: {_reason(error)}")
                continue
            return _Waiting(connection, f"/{action}", json.dumps(wanted), headers)
        raise PatroniSilent(
            f"no REST API of Patroni takes the {action} ({'; '.join(failures)}); nothing was "
            "changed"
        )

    def _is_trusted(self, endpoint: str) -> bool:
        """Say if the password may go there: not in clear where the configured ones use TLS."""
        return urlsplit(endpoint).scheme in {urlsplit(each).scheme for each in self.api.endpoints}

    def _authorization(self) -> dict[str, str]:
        if self.api.password is None:
            return {}
        words = f"{self.api.user}:{self.api.password.reveal()}".encode()
        return {"Authorization": f"Basic {b64encode(words).decode()}"}

    def _connection(self, endpoint: str, timeout: float) -> HTTPConnection:
        # not urllib.request: it would go through the proxy of the environment, follow redirects
        # with the password, and wait for an answer before anything else could be done
        url = urlsplit(endpoint)
        host, port = url.hostname or "", url.port or PORT
        if url.scheme != "https":
            return HTTPConnection(host, port, timeout=timeout)
        context = ssl.create_default_context(cafile=self.api.ca_file or None)
        if self.api.cert_file:
            context.load_cert_chain(self.api.cert_file, self.api.key_file or None)
        return HTTPSConnection(host, port, timeout=timeout, context=context)


class _Reply(NamedTuple):
    status: int
    text: str


class _Waiting:
    """A request whose answer takes its time. If it breaks there is none: it may have been done."""

    def __init__(
        self, connection: HTTPConnection, path: str, body: str, headers: dict[str, str]
    ) -> None:
        self._connection: HTTPConnection | None = connection
        try:
            connection.request("POST", path, body, headers)
        except (OSError, HTTPException) as error:
            self._break(error)

    def poll(self, seconds: float) -> _Reply | None:
        """Wait for the answer a while; return it once, when it is there."""
        connection = self._connection
        waited_for = [] if connection is None else [connection.sock]
        is_there = select.select(waited_for, [], [], seconds)[0]
        if connection is None or not is_there:
            return None
        try:
            reply = _read(connection.getresponse())
        except (OSError, HTTPException) as error:
            self._break(error)
            return None
        self.close()
        return reply

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _break(self, error: Exception) -> None:
        log.warning("no answer from Patroni, its cluster shows what became of it: %s", error)
        self.close()


def cluster_of(said: Any) -> Cluster:
    """Return the cluster of which ``GET /cluster`` has told.

    Raises:
        ValueError: this is not what Patroni says.
    """
    try:
        later = said.get("scheduled_switchover")
        return Cluster(
            scope=str(said.get("scope", "")),
            members=tuple(map(_member, said["members"])),
            is_paused=bool(said.get("pause")),
            scheduled=_scheduled(later) if later else None,
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError("the answer is none of Patroni's GET /cluster") from error


def ask_members(shard: str, api: RestApi) -> tuple[Place, ...]:
    """Return where the servers of a shard's Patroni cluster stand, whatever their state.

    Each is called by the shard's name and the member's. One that serves no reads for Patroni
    (``noloadbalance``) has no share of them here.

    Raises:
        OSError: no endpoint answers.
    """
    try:
        cluster = _client(api).cluster()
    except PatroniSilent as error:
        raise OSError(str(error)) from error
    return tuple(
        Place(f"{shard}-{m.name}", m.host, m.port, weight=1.0 if m.takes_reads else 0.0)
        for m in cluster.members
        if m.host
    )


def _scheduled(said: Any) -> Scheduled:
    return Scheduled(str(said["at"]), said.get("from") or "", said.get("to") or "")


def _member(said: Any) -> Member:
    api = urlsplit(str(said.get("api_url") or ""))
    lag = said.get("lag")
    return Member(
        name=str(said["name"]),
        role=str(said["role"]),
        state=str(said["state"]),
        host=str(said.get("host", "")),
        port=int(said.get("port", 5432)),
        api=f"{api.scheme}://{api.netloc}" if api.netloc else "",
        timeline=int(said.get("timeline") or 0),
        lag_bytes=lag if isinstance(lag, int) else None,
        tags=MappingProxyType(dict(said.get("tags") or {})),
    )


def _refusal(action: str, candidate: str, reply: _Reply) -> str:
    """Return Patroni's words and the way out."""
    if reply.status in (401, 403):
        way = "give user and password of its REST API, or a client's certificate, in [patroni]"
    elif "leader name" in reply.text:
        way = "its leader is another by now: look again"
    elif "does not exist" in reply.text:
        way = "choose a member that `patronictl list` shows"
    else:
        way = "`patronictl list` shows lag, tags and synchronous members; choose another"
    said = reply.text or "no reason given"
    return f"Patroni refuses the {action} to {candidate}: {said} (status {reply.status}); {way}"


def _read(answer: HTTPResponse) -> _Reply:
    return _Reply(answer.status, answer.read(LARGEST).decode("utf-8", "replace").strip())


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


@cache
def _client(api: RestApi) -> Patroni:
    """Return the same client for the same cluster: it knows which endpoint has answered last."""
    return Patroni(api)
