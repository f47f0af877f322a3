"""The same for ``AsyncSession``, which runs the sync session in a greenlet: written once."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, AsyncSessionTransaction
from sqlalchemy.util import greenlet_spawn

if TYPE_CHECKING:
    from sqlroute.routing.plan import Plan
    from sqlroute.routing.policy import Consistency
    from sqlroute.routing.token import Token
    from sqlroute.session import RoutingSession


class RoutingAsyncSession(AsyncSession):
    """A routed ``AsyncSession``; made by ``router.async_sessionmaker()``.

    Its options are those of :class:`sqlroute.session.RoutingMixin`.
    """

    sync_session: RoutingSession

    @property
    def token(self) -> Awaitable[Token]:
        """What the session has seen, to be awaited: ``await session.token``."""
        return greenlet_spawn(lambda: self.sync_session.token)

    @property
    def written(self) -> Token:
        """What the session has committed itself; false if nothing. Asks no server."""
        return self.sync_session.written

    @property
    def missing_shards(self) -> tuple[str, ...]:
        """What the last partial answer was without. See ``RoutingSession.missing_shards``."""
        return self.sync_session.missing_shards

    def follow(self, token: Token | str) -> None:
        """Never read a state from before a token. See ``RoutingSession.follow``."""
        self.sync_session.follow(token)

    def consistency(self, consistency: Consistency | str) -> AbstractContextManager[None]:
        """Read with another consistency within a ``with`` block."""
        return self.sync_session.consistency(consistency)

    def reading(self) -> AbstractContextManager[None]:
        """Declare a ``with`` block to read only."""
        return self.sync_session.reading()

    def writing(self) -> AbstractContextManager[None]:
        """Declare that a ``with`` block will write."""
        return self.sync_session.writing()

    def lag_tolerant(self) -> AbstractContextManager[None]:
        """Declare a ``with`` block to read only, and data of any age."""
        return self.sync_session.lag_tolerant()

    def deadline(self, seconds: float) -> AbstractContextManager[None]:
        """Wait for nothing in a ``with`` block beyond so many seconds from now."""
        return self.sync_session.deadline(seconds)

    def settings(self, **settings: Any) -> AbstractContextManager[None]:
        """Give run-time parameters to every connection. See ``RoutingSession.settings``."""
        return self.sync_session.settings(**settings)

    def begin(
        self, *, read_only: bool = False, isolation_level: str | None = None
    ) -> AsyncSessionTransaction:
        """Begin a transaction. See ``RoutingSession.begin``."""
        return _Transaction(self, read_only=read_only, isolation_level=isolation_level)

    def explain(self, statement: Any, parameters: Any = None) -> Awaitable[Plan]:
        """Return an awaitable of the plan. See ``RoutingSession.explain``."""
        return greenlet_spawn(self.sync_session.explain, statement, parameters)

    def get_async_bind(self, *arguments: Any, **options: Any) -> Any:
        """Return the ``AsyncEngine`` of the primary. See ``RoutingSession.get_bind``."""
        found = self.sync_session.get_bind(*arguments, **options)
        if isinstance(found, Connection):
            return AsyncConnection._retrieve_proxy_for_target(found)
        routes = self.sync_session._routes
        node = routes.node_of(found)
        return routes.async_engine(node) if node is not None else found


class _Transaction(AsyncSessionTransaction):
    """A transaction whose begin has options."""

    __slots__ = ("_begin",)

    def __init__(self, session: RoutingAsyncSession, **options: Any) -> None:
        super().__init__(session)
        self._begin = partial(session.sync_session.begin, **options)

    async def start(self, is_ctxmanager: bool = False) -> AsyncSessionTransaction:
        self.sync_transaction = self._assign_proxied(await greenlet_spawn(self._begin))
        if is_ctxmanager:
            assert self.sync_transaction
            self.sync_transaction.__enter__()
        return self
