"""A primary and a replica that is held 3 s behind, and applications in front of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Self

import httpx
import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from sqlroute import Router
from sqlroute.local.topology import LocalTopology
from sqlroute.testing import TopologyFactory

from .apps.models import Base

BEHIND = 3.0
OLD, NEW = "old", "new"

WSGI = ("flask_app", "flask_sqlalchemy_app", "flask_lite_app")
ASGI = ("fastapi_app", "fastapi_threads_app", "starlette_app", "litestar_app", "sqlmodel_app")


class World:
    """The servers, and what a test asks of them past any router."""

    def __init__(self, servers: LocalTopology) -> None:
        self.servers = servers
        self.primary, self.replica = servers.nodes
        # a router that has just begun takes a replica for as old as what that replayed last
        self.config = servers.directory / "web.toml"
        text = servers.config_path.read_text()
        self.config.write_text(text.replace("[policy]", "[policy]\nmax_lag = 60"))
        self._articles = itertools.count(1)

    def make_router(self) -> Router:
        return Router.from_config(self.config)

    def article(self) -> int:
        """Return the number of an article that all servers have, with the title ``old``."""
        return next(self._articles)

    def title(self, number: int) -> str:
        return str(self.on(self.primary, f"SELECT title FROM article WHERE id = {number}"))

    def on(self, node: Any, statement: str) -> Any:
        with psycopg.connect(**node.conninfo, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]

    def settle(self) -> None:
        """Wait until the replica has what the primary has written."""
        lsn = self.on(self.primary, "SELECT pg_current_wal_flush_lsn()")
        reached = f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'"
        until(lambda: self.on(self.replica, reached))


@dataclass
class Browser:
    """A client with cookies of its own."""

    site: Site
    client: Any

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.site.run(self.client.request(method, path, **options))

    def post(self, number: int, title: str = NEW, path: str = "articles") -> httpx.Response:
        return self.ask("POST", f"/{path}/{number}", params={"title": title})

    def title(self, number: int) -> str:
        response = self.ask("GET", f"/articles/{number}")
        assert response.status_code == 200, response.text
        return str(response.json()["title"])

    @property
    def cookie(self) -> str | None:
        return self.client.cookies.get("sqlroute")

    def set_cookie(self, value: str) -> None:
        """Have this cookie and no other, as httpx would send it."""
        self.client.cookies.clear()
        self.client.cookies.set("sqlroute", value, domain="site.test")


class Site:
    """An application at work.

    Attributes:
        app: the application.
        read_from: the ports where statements were run.
    """

    def __init__(self, module: ModuleType, router: Router, world: World, **options: Any) -> None:
        self.router, self.world = router, world
        self.is_async = module.__name__.endswith(tuple(ASGI))
        self.app = module.make(router, **options)
        self.read_from: list[int] = []
        self._runner: Any = asyncio.Runner() if self.is_async else None

    def run(self, response: Any) -> Any:
        return self._runner.run(response) if self.is_async else response

    def browser(self) -> Browser:
        options: dict[str, Any] = {"base_url": "http://site.test"}
        if self.is_async:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            return Browser(self, httpx.AsyncClient(transport=transport, **options))
        wsgi = httpx.WSGITransport(self.app, raise_app_exceptions=False)
        return Browser(self, httpx.Client(transport=wsgi, **options))

    def together(self, path: str, count: int) -> list[httpx.Response]:
        """Return the responses to as many requests at once, each by a browser of its own."""
        clients = [self.browser().client for _ in range(count)]
        if not self.is_async:
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(lambda client: client.get(path), clients))

        async def gathered() -> list[httpx.Response]:
            return await asyncio.gather(*(client.get(path) for client in clients))

        return self._runner.run(gathered())

    @property
    def checked_out(self) -> int:
        pools = [self.router.engines(is_async=flavour)._engines for flavour in (False, True)]
        return sum(e.pool.checkedout() for pool in pools for e in pool.values())  # type: ignore[attr-defined]

    def note(self, connection: Any, *_: Any) -> None:
        self.read_from.append(connection.engine.url.port)

    @property
    def was_strong(self) -> bool:
        """Nothing was asked of the replica since the last time of asking this."""
        found, self.read_from = set(self.read_from), []
        assert found, "nothing was asked at all"
        return found == {self.world.primary.port}

    def __enter__(self) -> Self:
        event.listen(Engine, "before_cursor_execute", self.note)
        if self.is_async:
            self._runner.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(Engine, "before_cursor_execute", self.note)
        left = self.checked_out
        if self.is_async:
            self._runner.run(self._stop())
            self._runner.run(self.router.aclose())
            self._runner.close()
        else:
            self.router.close()
        assert left == 0, "a connection was not given back"

    async def _start(self) -> None:
        """Begin the lifespan, as a server does: in a task of its own."""
        self._inbox, self._outbox = asyncio.Queue[Any](), asyncio.Queue[Any]()
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._life = asyncio.ensure_future(self.app(scope, self._inbox.get, self._outbox.put))
        self._inbox.put_nowait({"type": "lifespan.startup"})
        assert await self._outbox.get() == {"type": "lifespan.startup.complete"}

    async def _stop(self) -> None:
        self._inbox.put_nowait({"type": "lifespan.shutdown"})
        assert await self._outbox.get() == {"type": "lifespan.shutdown.complete"}
        await self._life


def until(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait until it is true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "it did not become true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def world(sqlroute_topology_factory: TopologyFactory) -> World:
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="web")
    found = World(servers)
    found.replica.hold_replay(0)
    with found.make_router() as router:
        Base.metadata.create_all(router.primary_engine("s0"))
    found.on(found.primary, "DELETE FROM article")
    found.on(
        found.primary, f"INSERT INTO article SELECT n, '{OLD}' FROM generate_series(1, 500) AS n"
    )
    found.settle()
    found.replica.hold_replay(BEHIND)
    return found


@pytest.fixture
def make_site(world: World) -> Iterator[Callable[..., Site]]:
    """Make a site of the name of its module; closed at the end, with all connections given back."""
    made: list[Site] = []

    def make(name: str, **options: Any) -> Site:
        module = import_module(f".apps.{name}", __package__)
        made.append(Site(module, world.make_router(), world, **options).__enter__())
        return made[-1]

    yield make
    for site in made:
        site.__exit__()


@pytest.fixture(params=ASGI + WSGI)
def site(request: pytest.FixtureRequest, make_site: Callable[..., Site]) -> Site:
    return make_site(request.param)
