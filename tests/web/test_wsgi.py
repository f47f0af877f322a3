"""What the WSGI middleware does with the protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from sqlroute import Router
from sqlroute.web import Cookie, session_of
from sqlroute.web.wsgi import RoutingMiddleware

from .apps.models import Article
from .conftest import NEW, OLD, World

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

App = Callable[[Any, Any], Any]


class Answer:
    """What a server gets; the events in their order."""

    def __init__(self, router: Router, app: App, **environ: str) -> None:
        self.events: list[str] = []
        self.headers: dict[str, str] = {}
        self.status = ""
        self.router = router
        self.environ: dict[str, Any] = dict(environ)
        setup_testing_defaults(self.environ)
        self.environ["QUERY_STRING"] = ""
        # checked on both sides by the judge of the standard library
        inner = validator(app) if environ.get("X") != "raw" else app
        carry = Cookie("a secret")
        self.app: App = validator(RoutingMiddleware(inner, router.sessionmaker(), carry))

    def start(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self.events.append(status)
        self.status, self.headers = status, {name.lower(): value for name, value in headers}
        return lambda data: self.events.append(f"write {data.decode()}")

    def serve(self) -> Answer:
        body = self.app(self.environ, self.start)
        try:
            for chunk in body:
                self.events.append(chunk.decode())
        finally:
            body.close()
        return self

    @property
    def checked_out(self) -> int:
        engines = self.router.engines(is_async=False)._engines.values()
        return sum(engine.pool.checkedout() for engine in engines)  # type: ignore[attr-defined]


HEAD: list[tuple[str, str]] = [("Content-Type", "text/plain")]


@pytest.fixture
def router(world: World) -> Iterator[Router]:
    with world.make_router() as router:
        yield router


def write(environ: Any, number: int) -> None:
    session_of(environ).merge(Article(id=number, title=NEW))
    session_of(environ).commit()


def test_a_commit_after_start_response_is_in_time(router: Router, world: World) -> None:
    """The head is held back until the application has returned, as when a framework tears down."""
    number = world.article()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEAD)
        write(environ, number)
        return [b"done"]

    answer = Answer(router, app).serve()

    assert answer.events == ["200 OK", "done"]
    assert answer.headers["set-cookie"].startswith("sqlroute=s0@")


def test_an_application_that_is_a_generator(router: Router, world: World) -> None:
    """Its pieces are passed on one by one, after the head; it ends when the server closes it."""
    number, events = world.article(), []

    def app(environ: Any, start_response: Any) -> Any:
        write(environ, number)
        start_response("200 OK", HEAD)
        try:
            yield b"1"
            events.extend(answer.events)
            yield b"2"
        finally:
            events.append("closed")

    answer = Answer(router, app)
    answer.serve()

    assert answer.events == ["200 OK", "1", "2"]
    assert events == ["200 OK", "1", "closed"]
    assert "set-cookie" in answer.headers


def test_a_body_that_is_written(router: Router, world: World) -> None:
    """By the old ``write``: the head goes before its first piece."""
    number = world.article()

    def app(environ: Any, start_response: Any) -> Any:
        written = start_response("200 OK", HEAD)
        write(environ, number)
        written(b"1")
        written(b"2")
        return [b"3"]

    answer = Answer(router, app).serve()

    assert answer.events == ["200 OK", "write 1", "write 2", "3"]
    assert "set-cookie" in answer.headers


def test_an_error_page_replaces_the_head(router: Router) -> None:
    """One that was not sent yet, by ``exc_info``; the headers of the first are gone."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*HEAD, ("X-First", "1")])
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Oops", HEAD, sys.exc_info())
        return [b"sorry"]

    answer = Answer(router, app).serve()

    assert answer.events == ["500 Oops", "sorry"]
    assert "x-first" not in answer.headers


def test_start_response_twice_is_a_fault(router: Router) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEAD)
        start_response("200 OK", HEAD)
        return [b""]

    with pytest.raises(AssertionError, match="called twice"):
        Answer(router, app, X="raw").serve()


@pytest.mark.parametrize("is_late", [False, True], ids=["before the body", "in the body"])
def test_an_application_that_fails(router: Router, world: World, is_late: bool) -> None:
    """Its session is closed when the error goes through, or when the server closes the body."""
    number = world.article()

    def body(environ: Any) -> Any:
        yield b"1"
        session_of(environ).merge(Article(id=number, title=NEW))
        session_of(environ).flush()
        raise ZeroDivisionError

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEAD)
        if is_late:
            return body(environ)
        list(body(environ))
        return None

    answer = Answer(router, app)
    with pytest.raises(ZeroDivisionError):
        answer.serve()

    assert answer.checked_out == 0
    assert world.title(number) == OLD


def test_a_commit_in_the_body_is_warned_of(
    router: Router, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    number = world.article()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEAD)
        yield b"1"
        write(environ, number)

    answer = Answer(router, app).serve()

    assert "set-cookie" not in answer.headers
    warnings = [r.getMessage() for r in caplog.records if r.name == "sqlroute.web"]
    assert len(warnings) == 1
    assert "GET / committed after its response had begun" in warnings[0]
