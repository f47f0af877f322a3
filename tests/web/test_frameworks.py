"""What the middlewares promise, in each framework: requests see what their client has written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sqlroute.web import Cookie

from .conftest import NEW, OLD, Site, World

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(120),
    # advanced-alchemy 1.12 still decorates its mixins so
    pytest.mark.filterwarnings("ignore:The declarative_mixin decorator:DeprecationWarning"),
]


def test_a_client_reads_its_own_write(site: Site, world: World) -> None:
    """Who brings the cookie sees the write at once; who does not may read from the replica."""
    mine, others, number = site.browser(), site.browser(), world.article()

    assert mine.title(number) == OLD
    assert mine.post(number).status_code == 200
    assert mine.title(number) == NEW
    assert others.title(number) == OLD


def test_only_a_write_is_told(site: Site, world: World) -> None:
    """A response to a request that wrote nothing has no header of ours."""
    browser, number = site.browser(), world.article()
    before = browser.ask("GET", f"/articles/{number}")
    written = browser.post(number)
    cookie = browser.cookie
    after = browser.ask("GET", f"/articles/{number}")

    assert "set-cookie" not in before.headers
    assert "cache-control" not in before.headers
    assert "HttpOnly" in written.headers["set-cookie"]
    assert "SameSite=Lax" in written.headers["set-cookie"]
    assert written.headers["cache-control"] == "private"
    assert "set-cookie" not in after.headers
    assert browser.cookie == cookie


@pytest.mark.parametrize("bad", ["forged", "unsigned", "nonsense", "huge"])
def test_a_cookie_that_is_not_trusted_reads_from_the_primary(
    site: Site, world: World, bad: str
) -> None:
    """And so do the next requests, as nobody knows what the client has seen."""
    browser, number = site.browser(), world.article()
    browser.post(number)
    good = browser.cookie
    assert good is not None
    forged = Cookie("another secret").text_of_strong()
    token = good.rsplit(".", 2)[0]
    browser.set_cookie({"forged": forged, "unsigned": token, "huge": "x" * 2**20}.get(bad, "x"))
    site.read_from.clear()

    assert browser.title(number) == NEW
    assert site.was_strong
    assert len(browser.cookie or "") < 100, "it was not replaced"
    assert browser.title(number) == NEW
    assert site.was_strong


def test_an_expired_cookie_reads_from_the_primary_once(site: Site, world: World) -> None:
    """It is older than any replica is behind, so the next request needs none."""
    browser, number = site.browser(), world.article()
    browser.set_cookie(Cookie("a secret", clock=lambda: 1e9).text_of_strong())

    response = browser.ask("GET", f"/articles/{number}")

    assert response.json() == {**response.json(), "title": OLD}
    assert site.was_strong
    assert "Max-Age=0" in response.headers["set-cookie"]
    assert browser.cookie is None


def test_an_error_leaves_nothing_behind(site: Site, world: World) -> None:
    """No connection is checked out, and nothing is committed or told."""
    browser, number = site.browser(), world.article()

    response = browser.ask("GET", f"/broken/{number}")

    assert response.status_code == 500
    assert "set-cookie" not in response.headers
    assert site.checked_out == 0
    assert world.title(number) == OLD


def test_each_request_has_one_session_of_its_own(site: Site) -> None:
    found = [response.json()["title"] for response in site.together("/same", 8)]

    assert len(set(found)) == 8
    assert all(number.isdigit() for number in found), "two in one request"


def test_keys_rotate(make_site: Callable[..., Site], world: World) -> None:
    """A cookie that an old key has signed is good, and the next one is signed by the new key."""
    old = make_site("starlette_app", keys=("old key",)).browser()
    new = make_site("starlette_app", keys=("new key", "old key")).browser()
    number = world.article()
    old.post(number)
    new.set_cookie(old.cookie or "")

    assert new.title(number) == NEW
    assert new.cookie == old.cookie
    new.post(number)
    assert Cookie("new key").read_text(new.cookie or "").fault == ""


@pytest.mark.parametrize("name", ["fastapi_app", "flask_app", "litestar_app"])
def test_reading_methods_cannot_write(
    make_site: Callable[..., Site], world: World, name: str
) -> None:
    site, number = make_site(name, read_only_methods=("GET", "HEAD")), world.article()
    browser = site.browser()

    assert browser.title(number) == OLD
    assert browser.ask("GET", f"/broken/{number}").status_code == 500
    assert set(site.read_from) == {world.replica.port}, "a write was sent"
    assert browser.post(number).status_code == 200
    assert browser.title(number) == NEW


def test_a_commit_after_the_response_is_warned_of_once(
    make_site: Callable[..., Site], world: World, caplog: pytest.LogCaptureFixture
) -> None:
    browser, number = make_site("fastapi_threads_app").browser(), world.article()

    late = browser.post(number, path="late")
    browser.post(number, "newer", path="late")

    assert "set-cookie" not in late.headers
    assert world.title(number) == "newer"
    warnings = [r.getMessage() for r in caplog.records if r.name == "sqlroute.web"]
    assert len(warnings) == 1
    assert f"POST /late/{number} committed after its response had begun" in warnings[0]


def test_the_plugin_of_advanced_alchemy_commits_in_time(
    make_site: Callable[..., Site], world: World
) -> None:
    browser, number = make_site("litestar_app", commit="autocommit").browser(), world.article()

    browser.post(number, path="auto")

    assert browser.title(number) == NEW


def test_flask_sqlalchemy_paginates_on_a_replica(
    make_site: Callable[..., Site], world: World
) -> None:
    site = make_site("flask_sqlalchemy_app")

    assert site.browser().ask("GET", "/pages/3").status_code == 200
    assert set(site.read_from) == {world.replica.port}
