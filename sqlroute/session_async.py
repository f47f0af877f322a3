"""The same for ``AsyncSession``, which runs the sync session in a greenlet: written once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

if TYPE_CHECKING:
    from sqlroute.routing.affinity import Token
    from sqlroute.session import RoutingSession


class RoutingAsyncSession(AsyncSession):
    """A routed ``AsyncSession``; made by ``router.async_sessionmaker()``."""

    sync_session: RoutingSession

    @property
    def tokens(self) -> tuple[Token, ...]:
        """What the session has seen, one token per shard it wrote."""
        return self.sync_session.tokens

    def explain(self, statement: Any, parameters: Any = None) -> Any:
        """Return an awaitable of the plan. See ``RoutingSession.explain``."""
        from sqlalchemy.util import greenlet_spawn

        return greenlet_spawn(self.sync_session.explain, statement, parameters)

    def get_async_bind(self, *arguments: Any, **options: Any) -> Any:
        """Return the ``AsyncEngine`` of the primary. See ``RoutingSession.get_bind``."""
        found = self.sync_session.get_bind(*arguments, **options)
        if isinstance(found, Connection):
            return AsyncConnection._retrieve_proxy_for_target(found)
        routes = self.sync_session._routes
        node = routes.node_of(found)
        return routes.async_engine(node) if node is not None else found
