"""Clients of a FastAPI and of a Flask application, while servers behind them come to harm.

First the replicas: killed, stopped, cut off, swallowed by a black hole, held behind, and brought
back. No request may fail, none may find less than its client has written, and none may outlive its
deadline. Then the primary is stopped: requests may fail, but in time.
"""

from __future__ import annotations

import asyncio
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from sqlroute import Router
from sqlroute.health import State as NodeState
from sqlroute.local.node import LocalNode
from sqlroute.local.topology import LocalTopology
from tests.web.apps import fastapi_app, flask_app
from tests.web.apps.models import Base

from .cable import Cable, State

DEADLINE = 3.0
"""Seconds that a request's session may wait."""

SLACK = 0.7
"""Seconds that two cores with everything on them may need beyond it."""

CLIENTS = 3
"""Of each application."""

READS = 4
"""Of each client after each of its writes."""

FAULTS = ("kill", "stop", "cut", "hole", "hold")

STOPS = 3
"""How often the primary is stopped afterwards."""


@dataclass(slots=True)
class Client:
    """What one client has seen. No lock: others only look."""

    app: str
    number: int
    written: int = 0
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    slowest: float = 0.0
    late: list[str] = field(default_factory=list)

    def note(self, what: str, took: float, status: int, text: str, now: str) -> None:
        self.requests += 1
        self.slowest = max(self.slowest, took)
        why = _line(text) if status != 200 else ""
        said = f"{self.app} {what} while {now}: {status} after {took:.2f} s {why}"
        if status != 200:
            self.failures.append(said)
        if took > DEADLINE + SLACK:
            self.late.append(said)

    def check(self, found: int, now: str) -> None:
        if found < self.written:
            self.stale.append(f"{self.app} found {found} of {self.written} while {now}")


@dataclass(slots=True)
class Phase:
    """The clients of a part of the run."""

    name: str
    clients: list[Client]
    seconds: float

    @property
    def requests(self) -> int:
        return sum(client.requests for client in self.clients)

    def all(self, what: str) -> list[str]:
        return [one for client in self.clients for one in getattr(client, what)]

    def lines(self) -> Iterator[str]:
        slowest = max(client.slowest for client in self.clients)
        yield (
            f"{self.name}: {self.requests:,} requests in {self.seconds:.0f} s, "
            f"{len(self.all('failures'))} failed, {len(self.all('stale'))} stale, "
            f"{len(self.all('late'))} later than {DEADLINE:g} s; the slowest took {slowest:.2f} s"
        )
        for what in ("failures", "stale", "late"):
            yield from (f"  {what}: {text}" for text in self.all(what)[:10])


@dataclass(slots=True)
class Report:
    """What was seen."""

    replicas: Phase
    primary: Phase
    faults: Counter[str]
    answered: dict[str, int]

    @property
    def is_clean(self) -> bool:
        first, second = self.replicas, self.primary
        wrong = first.all("failures") + first.all("stale") + first.all("late")
        wrong += second.all("stale") + second.all("late")
        by_replicas = sum(count for node, count in self.answered.items() if node != "s0-a")
        return not wrong and by_replicas > 0 and first.requests > 0 and second.requests > 0

    def lines(self) -> Iterator[str]:
        yield from self.replicas.lines()
        yield "  faults: " + ", ".join(f"{n} x {name}" for name, n in sorted(self.faults.items()))
        yield from self.primary.lines()
        total = sum(self.answered.values()) or 1
        shares = ", ".join(f"{n} {c / total:.0%}" for n, c in sorted(self.answered.items()))
        yield f"reads outside of transactions were answered by {shares}"

    def document(self) -> dict[str, Any]:
        return {"clean": self.is_clean, "lines": list(self.lines())}


class World:
    """The servers, with a cable to each replica, and what is wrong with them now."""

    def __init__(self, topology: LocalTopology, cables: dict[str, Cable], seed: int) -> None:
        self.topology = topology
        self.cables = cables
        self.now = "all is well"
        self.faults: Counter[str] = Counter()
        self._random = Random(seed)

    def harm_replicas(self, seconds: float, router: Router, say: Callable[[int], None]) -> None:
        """Break one replica after the other, and bring each back, for so long."""
        ends = time.monotonic() + seconds
        replicas = self.topology.nodes[1:]
        while time.monotonic() < ends:
            node = self._random.choice(replicas)
            fault = self._random.choice(FAULTS)
            self.faults[fault] += 1
            with self._harmed(node, fault):
                time.sleep(self._random.uniform(0.5, 4.0))
            self.now = f"{node.name} is back from {fault}"
            back = time.monotonic() + 20
            while router.health().of(node.name).state is not NodeState.UP:
                if time.monotonic() > back:
                    raise TimeoutError(f"{node.name} did not come back from {fault}")
                time.sleep(0.05)
            time.sleep(self._random.uniform(0.0, 1.5))
            say(int(time.monotonic() - (ends - seconds)))
        self.now = "all is well"

    @contextmanager
    def _harmed(self, node: LocalNode, fault: str) -> Iterator[None]:
        cable = self.cables[node.name]
        if fault == "hold":
            node.hold_replay(self._random.uniform(0.1, 0.5))
            self.now = f"{node.name} is behind"
            yield
            node.hold_replay(0)
            return
        self.now = f"{node.name}: {fault}"
        begin, end = {
            "kill": (node.kill, node.start),
            "stop": (node.pause, node.resume),
            "cut": (lambda: cable.turn(State.CUT), lambda: cable.turn(State.OPEN)),
            "hole": (lambda: cable.turn(State.HOLE), lambda: cable.turn(State.OPEN)),
        }[fault]
        begin()
        try:
            yield
        finally:
            end()

    def stop_primary(self) -> None:
        """Stop it several times for longer than a request may last."""
        primary = self.topology.nodes[0]
        for _ in range(STOPS):
            time.sleep(1.0)
            primary.pause()
            self.now = "the primary is stopped"
            time.sleep(DEADLINE + 1.0)
            primary.resume()
            self.now = "the primary is back"
        time.sleep(1.0)


def run(
    topology: LocalTopology,
    count: int,
    *,
    break_token: bool = False,
    seed: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Let clients ask while servers come to harm.

    Args:
        count: seconds for which replicas do.
        break_token: have clients forget their cookies; stale reads must show.
    """
    with ExitStack() as stack:
        cables = {
            node.name: stack.enter_context(Cable(node.conninfo["host"], node.port))
            for node in topology.nodes[1:]
        }
        world = World(topology, cables, seed)
        routers = [stack.enter_context(Router.from_config(_config(topology, cables)))]
        routers.append(Router.from_config(_config(topology, cables)))  # closed in its own loop
        routers[0].create_all(Base.metadata)
        first = _phase(
            "replicas harmed", routers, world, break_token,
            lambda: world.harm_replicas(count, routers[0], progress),
        )  # fmt: skip
        second = _phase("primary stopped", routers, world, break_token, world.stop_primary)
        answered: Counter[str] = Counter(routers[0].engines(is_async=False).answered)
        answered.update(routers[1].engines(is_async=True).answered)
        asyncio.run(routers[1].aclose())
    return Report(first, second, world.faults, dict(answered))


def _config(topology: LocalTopology, cables: dict[str, Cable]) -> dict[str, Any]:
    text = topology.config_path.read_text()
    for node in topology.nodes:
        if node.name in cables:
            text = text.replace(f":{node.port}/", f":{cables[node.name].port}/")
    found = tomllib.loads(text)
    policy = {"deadline": f"{DEADLINE}s", "probe_interval": "200ms", "primary_wait": "10s"}
    return {**found, "policy": {**found.get("policy", {}), **policy}}


def _phase(
    name: str, routers: list[Router], world: World, break_token: bool, harm: Callable[[], None]
) -> Phase:
    over = threading.Event()
    first = 1 if name.startswith("replicas") else 1_000
    clients = [
        Client(app, first + number)
        for number, app in enumerate(["flask"] * CLIENTS + ["fastapi"] * CLIENTS)
    ]
    flask = flask_app.make(routers[0])
    threads = [
        threading.Thread(target=_ask, args=(flask, client, world, over, break_token))
        for client in clients
        if client.app == "flask"
    ]
    others = [client for client in clients if client.app == "fastapi"]
    threads.append(
        threading.Thread(
            target=lambda: asyncio.run(_ask_all(routers[1], others, world, over, break_token))
        )
    )
    began = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        harm()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return Phase(name, clients, time.monotonic() - began)


def _ask(app: Any, client: Client, world: World, over: threading.Event, break_token: bool) -> None:
    transport = httpx.WSGITransport(app, raise_app_exceptions=False)
    with httpx.Client(transport=transport, base_url="http://site.test") as http:
        while not over.is_set():
            for method, path, value in _next(client):
                began, now = time.monotonic(), world.now
                response = http.request(method, path, params=value)
                _noted(client, method, response, time.monotonic() - began, now, value)
                if break_token:
                    http.cookies.clear()


async def _ask_all(
    router: Router, clients: list[Client], world: World, over: threading.Event, break_token: bool
) -> None:
    app = fastapi_app.make(router)

    async def ask(client: Client) -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://site.test") as http:
            while not over.is_set():
                for method, path, value in _next(client):
                    began, now = time.monotonic(), world.now
                    response = await http.request(method, path, params=value)
                    _noted(client, method, response, time.monotonic() - began, now, value)
                    if break_token:
                        http.cookies.clear()

    await asyncio.gather(*(ask(client) for client in clients))
    await router.engines(is_async=True).aclose()


def _next(client: Client) -> Iterator[tuple[str, str, dict[str, str]]]:
    path = f"/articles/{client.number}"
    yield "POST", path, {"title": str(client.written + 1)}
    if client.written:
        for _ in range(READS):
            yield "GET", path, {}


def _noted(
    client: Client,
    method: str,
    response: httpx.Response,
    took: float,
    now: str,
    value: dict[str, str],
) -> None:
    client.note(method, took, response.status_code, response.text, now)
    if response.status_code != 200:
        return
    if method == "POST":
        client.written = int(value["title"])
    else:
        client.check(int(response.json()["title"]), now)


def _line(text: str) -> str:
    return " ".join(text.split())[:120]
