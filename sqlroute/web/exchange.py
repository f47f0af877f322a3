"""One request and its response: what the client has seen, and the sessions that go by it.

Made by a middleware, found by :func:`session_of` and :func:`adopt` in what the framework hands
around (ASGI scope, WSGI environ), never in a context variable. It does no I/O: sessions are made
here, which opens nothing, and closed by the middleware.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlroute.errors import ConfigError, ForeignToken
from sqlroute.routing.policy import Consistency, Intent
from sqlroute.routing.token import Token
from sqlroute.web.carriage import Brought, Cookie, Header

KEY = "sqlroute.exchange"
"""Where it lies in a scope or environ."""

log = logging.getLogger("sqlroute.web")


class Exchange:
    """What one request brought and did.

    Args:
        carry: how the client is told.
        header: the text of the request's header that ``carry`` reads.
        make: makes a session.
        reads_only: the request must not write.
    """

    def __init__(
        self,
        carry: Cookie | Header,
        header: str,
        make: Callable[[], Any],
        *,
        reads_only: bool = False,
    ) -> None:
        self._carry = carry
        self._brought = carry.read(header) if header else Brought()
        self._make = make
        self._reads_only = reads_only
        self._refused = False
        self._told: Token | None = None  # what was written when the head of the response went out
        self._adopted: list[Any] = []
        self.made: Any = None
        if self._brought.fault:
            log.info("reading from the primary, a client's token: %s", self._brought.fault)

    @property
    def session(self) -> Any:
        """The session of the request, made when first asked for."""
        if self.made is None:
            made = self._make()
            self.adopt(made)
            self.made = made
        return self.made

    def adopt(self, session: Any) -> None:
        """Let a session go by what the client has seen, and note what it will write."""
        session = getattr(session, "sync_session", session)
        if any(session is known for known in self._adopted):
            return
        brought, strong = self._brought, self._brought.is_strong
        if brought.token:
            try:
                session.follow(brought.token)
            except ForeignToken as error:
                log.info("reading from the primary, a client's token: %s", error)
                self._refused = strong = True
        base = session._base
        session._ask(
            base,
            # who asks for less than this does not ask for the own writes either
            Consistency.STRONG if strong and base.consistency is Consistency.SESSION else None,
            Intent.READING if self._reads_only and base.intent is Intent.AUTOMATIC else None,
        )
        self._adopted.append(session)

    @property
    def _written(self) -> Token:
        found = Token()
        for session in self._adopted:
            found |= session.written
        return found

    def headers(self, present: Iterable[str]) -> list[tuple[str, str]]:
        """Return what the head of the response must say besides: mostly nothing.

        Args:
            present: the names of the headers that it has.
        """
        self._told = written = self._written
        carry, brought = self._carry, self._brought
        refused = self._refused or any(s.refused_token is not None for s in self._adopted)
        if refused or (brought.fault and not brought.is_expired):
            # forgetting it would let the next request read a state from before
            text = carry.text_of_strong()
        elif written and brought.is_strong and not brought.is_expired:
            text = carry.text_of_strong()
        elif written:
            text = carry.text_of(brought.token | written)
        elif brought.is_expired:
            text = ""
        else:
            return []
        found = [carry.answer(text)]
        if not any(name.lower() == "cache-control" for name in present):
            found.append(("Cache-Control", "private"))  # one client's token is not for another
        return found

    def finish(self) -> bool:
        """Let go of the sessions; say whether one has committed too late to tell the client."""
        is_late = self._told is not None and self._written != self._told
        self._adopted.clear()
        self._told = None
        return is_late


def exchange_of(request: Any) -> Exchange:
    """Return the exchange of a request.

    Args:
        request: an ASGI scope, a WSGI environ, or what has one as ``scope`` or ``environ``, as the
            request objects of the frameworks do.

    Raises:
        ConfigError: no middleware has seen the request.
    """
    inner = request
    if not isinstance(request, Mapping):
        inner = getattr(request, "scope", None) or getattr(request, "environ", None) or {}
    found = inner.get(KEY)
    if not isinstance(found, Exchange):
        raise ConfigError(
            (
                "RoutingMiddleware: it has not seen this request, so there is no session for it; "
                "wrap the application in the one of sqlroute.web.asgi or sqlroute.web.wsgi",
            )
        )
    return found


def session_of(request: Any) -> Any:
    """Return the session of a request; the middleware closes it when the response is complete.

    The same one for each call within a request. It is made by the first, and opens nothing.

    Args:
        request: the framework's request object, an ASGI scope or a WSGI environ.

    Raises:
        ConfigError: no middleware has seen the request.
    """
    return exchange_of(request).session


def adopt(request: Any, session: Any) -> Any:
    """Let a session that something else has made for a request take part, and return it.

    It reads nothing older than the client has seen, and what it commits is told to the client. Who
    has made it closes it. A session that takes part already is left as it is.

    Args:
        request: the framework's request object, an ASGI scope or a WSGI environ.
        session: a routed Session or AsyncSession.

    Raises:
        ConfigError: no middleware has seen the request.
    """
    exchange_of(request).adopt(session)
    return session
