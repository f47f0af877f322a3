"""What the ASGI middleware does with the messages of the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, text

from sqlroute import Router
from sqlroute.errors import ConfigError
from sqlroute.web import Cookie, adopt, session_of
from sqlroute.web.asgi import RoutingMiddleware

from .apps.models import Article
from .conftest import NEW, OLD, World, until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(60)]

Handler = Callable[[Any, Any, Any], Awaitable[None]]
CARRY = Cookie("a secret")


@pytest.fixture
def router(world: World) -> Iterator[Router]:
    with world.make_router() as router:
        yield router


async def call(
    router: Router, handler: Handler, *, headers: Any = (), scope: Any = None, **options: Any
) -> list[Any]:
    """Return the messages that a server gets for one request."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    options.setdefault("carry", CARRY)
    sessions = options.pop("sessions", None) or router.async_sessionmaker()
    app = RoutingMiddleware(handler, sessions, **options)
    scope = scope or {"type": "http", "method": "GET", "path": "/", "headers": list(headers)}
    try:
        await app(scope, asyncio.Queue().get, send)
    finally:
        in_use = [e.pool.checkedout() for e in router.engines(is_async=True)._engines.values()]
        await router.aclose()
        assert sum(in_use) == 0, "a connection was not given back"
    return sent


async def ok(send: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def writing(number: int, *headers: tuple[bytes, bytes]) -> Handler:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await session_of(scope).merge(Article(id=number, title=NEW))
        await session_of(scope).commit()
        await ok(send, *headers)

    return handler


def reading(number: int, found: list[str]) -> Handler:
    async def handler(scope: Any, receive: Any, send: Any) -> None:
        found.append((await session_of(scope).get_one(Article, number)).title)
        await ok(send)

    return handler


def cookie_of(sent: list[Any]) -> str:
    (value,) = [value for name, value in sent[0]["headers"] if name == b"set-cookie"]
    return value.decode().split(";")[0]


def test_other_protocols_pass_through(router: Router) -> None:
    """A websocket has no session, which is an error that says so."""
    seen = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        with pytest.raises(ConfigError, match="has not seen this request"):
            session_of(scope)

    scope = {"type": "websocket", "path": "/"}
    asyncio.run(call(router, handler, scope=scope))

    assert seen[0] is scope


def test_a_cookie_header_in_parts(router: Router, world: World) -> None:
    """HTTP/2 may split it; a header of another name is not looked at."""
    number, found = world.article(), []
    cookie = cookie_of(asyncio.run(call(router, writing(number))))
    headers = [(b"cookie", b"a=b"), (b"cookie", cookie.encode()), (b"cookie2", b"sqlroute=x")]

    sent = asyncio.run(call(router, reading(number, found), headers=headers))
    asyncio.run(call(router, reading(number, found)))

    assert found == [NEW, OLD]
    assert sent[0]["headers"] == []


def test_a_cache_control_of_the_application_stays(router: Router, world: World) -> None:
    handler = writing(world.article(), (b"Cache-Control", b"no-store"))

    headers = asyncio.run(call(router, handler))[0]["headers"]

    assert [v for n, v in headers if n.lower() == b"cache-control"] == [b"no-store"]


def test_a_response_is_passed_on_as_it_comes(router: Router) -> None:
    """Nothing is held back, and no session is made for who asks for none."""

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await send({"type": "http.response.body", "body": b"2"})

    def sessions() -> Any:
        raise AssertionError("a session was made")

    sent = asyncio.run(call(router, handler, sessions=sessions))

    assert sent == [
        {"type": "http.response.start", "status": 200},
        {"type": "http.response.body", "body": b"1", "more_body": True},
        {"type": "http.response.body", "body": b"2"},
    ]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "threads"])
def test_a_request_that_is_cancelled_gives_its_connections_back(
    router: Router, world: World, is_async: bool
) -> None:
    """As when a client goes away: in the middle of a transaction, and again while it closes."""
    number = world.article()
    closed = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        session, article = session_of(scope), Article(id=number, title=NEW)
        if is_async:
            await session.merge(article)
            await session.flush()
        else:
            await asyncio.to_thread(session.merge, article)
            await asyncio.to_thread(session.flush)
        under_way.set()
        await asyncio.Event().wait()

    async def main() -> None:
        nonlocal under_way
        under_way = asyncio.Event()
        task = asyncio.ensure_future(app(scope, asyncio.Queue().get, asyncio.Queue().put))
        await under_way.wait()
        assert in_use() == 1
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while in_use():
            await asyncio.sleep(0.01)
        closed.append(True)
        await router.aclose()

    def in_use() -> int:
        engines = router.engines(is_async=is_async)._engines.values()
        return sum(engine.pool.checkedout() for engine in engines)

    under_way: asyncio.Event
    sessions = router.async_sessionmaker() if is_async else router.sessionmaker()
    app = RoutingMiddleware(handler, sessions, CARRY)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(main())

    assert closed
    assert world.title(number) == OLD


def test_sessions_that_ask_for_less_are_not_lifted(router: Router, world: World) -> None:
    """A cookie that is not trusted is no reason to read more than the session asks for."""
    number, titles = world.article(), []
    asyncio.run(call(router, writing(number)))

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        for consistency in ("eventual", "session"):
            async with router.async_sessionmaker(consistency=consistency)() as session:
                assert adopt(scope, adopt(scope, session)) is session
                titles.append(await session.scalar(select(Article.title).filter_by(id=number)))
        await ok(send)

    asyncio.run(call(router, handler, headers=[(b"cookie", b"sqlroute=x")]))

    assert titles == [OLD, NEW]


def test_a_session_that_takes_part_is_told_of(router: Router, world: World) -> None:
    """What any of them commits is in the one cookie."""
    one, other, found = world.article(), world.article(), []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        for number in (one, other):
            async with router.async_sessionmaker()() as session:
                adopt(scope, session)
                await session.merge(Article(id=number, title=NEW))
                await session.commit()
        await ok(send)

    cookie = cookie_of(asyncio.run(call(router, handler))).encode()
    for number in (one, other):
        asyncio.run(call(router, reading(number, found), headers=[(b"cookie", cookie)]))

    assert found == [NEW, NEW]


def test_a_session_is_free_of_the_request_afterwards(router: Router, world: World) -> None:
    """Nothing of the exchange stays on a session that outlives it."""
    number, kept = world.article(), []
    cookie = cookie_of(asyncio.run(call(router, writing(number)))).encode()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        kept.append(adopt(scope, router.sessionmaker()()))
        await ok(send)

    asyncio.run(call(router, handler, headers=[(b"cookie", cookie)]))

    assert not {"_execute_internal", "flush"} & set(vars(kept[0]))
    with kept[0] as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_settles(world: World) -> None:
    """The replica is held behind, not stopped: what was written arrives there."""
    until(lambda: world.on(world.replica, "SELECT count(*) FROM article") == 500)
