"""The middleware for WSGI applications: Flask and others.

The head of a response is held back until the application has returned it as a whole, as PEP 3333
allows, so that what is committed while a framework tears its request down is told to the client,
too. A body is passed on piece by piece.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from sqlroute.web.carriage import Cookie, Header
from sqlroute.web.exchange import KEY, Exchange

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
StartResponse = Callable[..., Callable[[bytes], object]]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

log = logging.getLogger("sqlroute.web")


class RoutingMiddleware:
    """Gives each request one session, and its client the token of what that has written.

    Args:
        app: the application, ``flask_app.wsgi_app`` say.
        sessions: what makes the sessions: ``router.sessionmaker()``.
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
        self._source = "HTTP_" + carry.source.upper().replace("-", "_")
        self._read_only_methods = frozenset(read_only_methods)
        self._has_warned = False

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        exchange = Exchange(
            self._carry,
            environ.get(self._source, ""),
            self._sessions,
            reads_only=environ["REQUEST_METHOD"] in self._read_only_methods,
        )
        environ[KEY] = exchange
        head = _Head(exchange, start_response)
        what = f"{environ['REQUEST_METHOD']} {environ.get('PATH_INFO', '')}"
        try:
            body = self._app(environ, head.start)
            head.send()
        except BaseException:
            self._end(exchange, what)
            raise
        return _Body(body, head, lambda: self._end(exchange, what))

    def _end(self, exchange: Exchange, what: str) -> None:
        is_late = exchange.finish()
        if exchange.made is not None:
            exchange.made.close()
        if is_late and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s committed after its response had begun, too late to tell the client, whose "
                "next request may not see it; commit before the body is sent (said once)",
                what,
            )


class _Head:
    """The head of a response, held back."""

    def __init__(self, exchange: Exchange, start_response: StartResponse) -> None:
        self._exchange = exchange
        self._start_response = start_response
        self._held: tuple[str, Headers, Any] | None = None
        self._write: Callable[[bytes], object] | None = None

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        if self._write is not None:  # the server knows whether it is too late for another head
            return self._start_response(status, headers, exc_info)
        if self._held is not None and exc_info is None:
            raise AssertionError("start_response was called twice without exc_info")
        self._held = (status, headers, exc_info)
        return self._written

    def send(self) -> None:
        """Send the head, if there is one that was not sent."""
        if self._held is None:
            return
        (status, headers, exc_info), self._held = self._held, None
        headers = [*headers, *self._exchange.headers(name for name, _ in headers)]
        if exc_info is None:
            self._write = self._start_response(status, headers)
        else:
            self._write = self._start_response(status, headers, exc_info)

    def _written(self, data: bytes) -> object:
        self.send()
        assert self._write is not None
        return self._write(data)


class _Body:
    """The body of a response; the request ends when it is closed."""

    def __init__(self, chunks: Iterable[bytes], head: _Head, end: Callable[[], None]) -> None:
        self._chunks = chunks
        self._iterator: Iterator[bytes] | None = None
        self._head = head
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._iterator is None:
            self._iterator = iter(self._chunks)
        try:
            chunk = next(self._iterator)
        except StopIteration:
            self._head.send()
            raise
        self._head.send()  # a generator has called start_response now
        return chunk

    def close(self) -> None:
        try:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
        finally:
            self._end()
