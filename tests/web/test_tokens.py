"""Tokens that cannot be followed, and tokens in headers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from sqlroute import Token
from sqlroute.routing.token import Position
from sqlroute.testing import TopologyFactory
from sqlroute.web import Cookie, Header
from sqlroute.web.wsgi import RoutingMiddleware

from .apps import fastapi_app, flask_app
from .apps.models import Base
from .conftest import NEW, OLD, Site, World, until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

CARRY = Cookie("a secret")
FOREIGN = {
    "an unknown shard": Position("s9", 7, 1, 2**24, 1),
    "another cluster": Position("s0", 7, 1, 2**24, 1),
}


@pytest.mark.parametrize("name", ["fastapi_app", "flask_app", "litestar_app"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("ignore:The declarative_mixin decorator:DeprecationWarning")
def test_a_foreign_token(
    make_site: Callable[..., Site], world: World, name: str, kind: str
) -> None:
    """Signed by us, but of other servers: at most one request fails, then the primary answers.

    That it names a shard nobody has is seen before the first statement, the rest by that one.
    """
    site, number = make_site(name), world.article()
    browser = site.browser()
    browser.post(number)
    browser.set_cookie(CARRY.text_of(Token((FOREIGN[kind],))))
    site.read_from.clear()

    first = browser.ask("GET", f"/articles/{number}")

    assert first.status_code == (200 if kind == "an unknown shard" else 500)
    assert CARRY.read_text(browser.cookie or "").is_strong
    site.read_from.clear()
    assert browser.title(number) == NEW
    assert site.was_strong


def test_a_lost_write_is_told_once(sqlroute_topology_factory: TopologyFactory) -> None:
    """The application's handler gets the error, handled or not; the next request goes on."""
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="web-lost")
    world = World(servers)
    with world.make_router() as router:
        router.create_all(Base.metadata)
    world.on(world.primary, f"INSERT INTO article VALUES (1, '{OLD}')")
    world.settle()

    def site(module: Any) -> Site:
        return Site(module, world.make_router(), world)

    with site(fastapi_app) as handled, site(flask_app) as unhandled:
        browsers = [handled.browser(), unhandled.browser()]
        world.on(world.replica, "ALTER SYSTEM SET primary_conninfo = ''")
        world.on(world.replica, "SELECT pg_reload_conf()")
        until(lambda: world.on(world.replica, "SELECT count(*) FROM pg_stat_wal_receiver") == 0)
        for browser in browsers:
            assert browser.post(1).status_code == 200
        world.primary.kill()
        world.on(world.replica, "SELECT pg_promote()")
        for one in (handled, unhandled):
            until(lambda s=one: s.router.monitor.ask("s0", 1.0).primary("s0").node == "s0-b")  # type: ignore[misc]

        first = [browser.ask("GET", "/articles/1") for browser in browsers]
        then = [browser.ask("GET", "/articles/1") for browser in browsers]

    assert [found.status_code for found in first] == [409, 500]
    assert first[0].json() == {"title": "your last change may be lost"}
    assert [found.json()["title"] for found in then] == [OLD, OLD]


def test_a_header_for_programs(world: World) -> None:
    """A client sends what the last response that had one has given it."""
    number, carry = world.article(), Header("a secret")
    with world.make_router() as router:
        app = flask_app.make(router)
        app.wsgi_app = RoutingMiddleware(app.wsgi_app._app, router.sessionmaker(), carry)
        client = httpx.Client(transport=httpx.WSGITransport(app), base_url="http://site.test")
        path = f"/articles/{number}"

        token = client.post(path, params={"title": NEW}).headers["Sqlroute-Token"]
        with_it = client.get(path, headers={"Sqlroute-Token": token})
        without = client.get(path)
        forged = client.get(path, headers={"Sqlroute-Token": token + "x"})
        expired = Header("a secret", clock=lambda: 1e9).text_of_strong()
        empty = client.get(path, headers={"Sqlroute-Token": expired}).headers["Sqlroute-Token"]

    titles = [found.json()["title"] for found in (with_it, without, forged)]
    assert titles == [NEW, OLD, NEW]
    assert carry.read(forged.headers["Sqlroute-Token"]).is_strong
    assert "Sqlroute-Token" not in with_it.headers
    assert empty == ""


def test_a_cookie_grows_by_what_is_written(make_site: Callable[..., Site], world: World) -> None:
    """The next write does not forget what the client had seen of other shards before."""
    browser, number = make_site("flask_app").browser(), world.article()
    browser.post(number)
    first = CARRY.read_text(browser.cookie or "").token
    browser.post(number, "newer")
    then = CARRY.read_text(browser.cookie or "").token

    assert first.positions[0].shard == then.positions[0].shard == "s0"
    assert then == first | then
    assert then != first


def test_who_must_read_from_the_primary_still_does_after_a_write(
    make_site: Callable[..., Site], world: World
) -> None:
    """The write is known then, but what was seen before is not."""
    site, number = make_site("starlette_app"), world.article()
    browser = site.browser()
    browser.set_cookie("forged")

    browser.post(number)
    browser.post(number)

    assert CARRY.read_text(browser.cookie or "").is_strong
