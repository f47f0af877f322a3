"""The middleware for ASGI applications: FastAPI, Starlette, Litestar, Quart.

Pure ASGI: it passes messages on as they come, and changes at most the head of a response.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from sqlroute.web.carriage import Cookie, Header
from sqlroute.web.exchange import KEY, Exchange

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("sqlroute.web")


class RoutingMiddleware:
    """Gives each HTTP request one session, and its client the token of what that has written.

    Websockets and lifespans pass through.

    Args:
        app: the application.
        sessions: what makes the sessions: ``router.async_sessionmaker()``, or
            ``router.sessionmaker()`` for handlers that run in threads.
        carry: how the token travels, a :class:`~sqlroute.web.Cookie` or
            :class:`~sqlroute.web.Header`.
        read_only_methods: requests whose sessions must not write, ``("GET", "HEAD")`` say. A write
            in them is ``ReadOnlyRefused``, so it is off by default.
    """

    def __init__(
        self,
        app: App,
        sessions: Callable[[], Any],
        carry: Cookie | Header,
        *,
        read_only_methods: Collection[str] = (),
    ) -> None:
        self._app = app
        self._sessions = sessions
        self._carry = carry
        self._source = carry.source.encode("latin-1")
        self._joint = "; " if isinstance(carry, Cookie) else ","  # HTTP/2 may split cookies
        self._read_only_methods = frozenset(read_only_methods)
        self._closing: set[asyncio.Future[Any]] = set()
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        source = self._source
        texts = [value.decode("latin-1") for name, value in scope["headers"] if name == source]
        exchange = Exchange(
            self._carry,
            self._joint.join(texts),
            self._sessions,
            reads_only=scope["method"] in self._read_only_methods,
        )

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = message.get("headers", ())
                added = exchange.headers(name.decode("latin-1") for name, _ in present)
                if added:
                    encoded = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in added]
                    message = {**message, "headers": [*present, *encoded]}
            await send(message)

        try:
            await self._app({**scope, KEY: exchange}, receive, answer)
        finally:
            is_late = exchange.finish()
            if exchange.made is not None:
                await self._close(exchange.made)
            if is_late and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "%s %s committed after its response had begun, too late to tell the client, "
                    "whose next request may not see it; commit before the handler returns "
                    "(said once)",
                    scope["method"],
                    scope["path"],
                )

    async def _close(self, session: Any) -> None:
        """Close a session to the end, even if this task is cancelled meanwhile."""
        if isinstance(session, AsyncSession):
            closing = asyncio.ensure_future(session.close())
        else:
            closing = asyncio.ensure_future(asyncio.to_thread(session.close))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)
