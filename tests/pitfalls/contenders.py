"""The routers that are compared: the recipe of SQLAlchemy's manual, advanced-alchemy, sqlroute.

Each gives sessions over the same servers with its own defaults. All pools have SQLAlchemy's usual
5 + 10 connections; only the time to wait for one is cut from 30 s, which no scenario needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from random import Random
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import event, orm
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sqlroute import Router

from .servers import Servers, url

POOL: dict[str, Any] = {"pool_timeout": 2.0}


class NotOffered(Exception):
    """A contender has nothing for what a scenario asks; no fault of the contender's."""


class Contender:
    """One router over some servers.

    Attributes:
        name: for the heads of tables.
        offers: features that a scenario may ask for by name.
        notes: what a reader of its outcomes must know.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()
    notes: tuple[str, ...] = ()

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._runner: asyncio.Runner | None = None

    @classmethod
    def version(cls) -> str:
        raise NotImplementedError

    def session(self, **options: Any) -> orm.Session:
        """Make a session; options are those of SQLAlchemy's own ``Session`` and features."""
        raise NotImplementedError

    def async_session(self, **options: Any) -> AsyncSession:
        raise NotImplementedError

    def engines(self) -> list[Engine]:
        """Return the engines that have been used; for async ones their sync engine."""
        raise NotImplementedError

    def need(self, feature: str) -> None:
        """Go on only where the contender has a feature.

        Raises:
            NotOffered: it has not.
        """
        if feature not in self.offers:
            raise NotOffered(feature)

    def run(self, coroutine: Coroutine[Any, Any, str]) -> str:
        """Run a coroutine in the one event loop of this contender."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def held(self) -> int:
        """Count the connections that sessions hold now."""
        return sum(engine.pool.checkedout() for engine in self.engines())  # type: ignore[attr-defined]

    @contextmanager
    def ran(self) -> Iterator[list[str]]:
        """Collect the node of each statement that is sent meanwhile."""
        nodes: list[str] = []

        def note(connection: Any, *_: Any) -> None:
            nodes.append(self.servers.node(connection.engine.url.port))

        event.listen(Engine, "before_cursor_execute", note)
        try:
            yield nodes
        finally:
            event.remove(Engine, "before_cursor_execute", note)

    async def aclose(self) -> None:
        """Close what belongs to the event loop."""

    def close(self) -> None:
        if self._runner is not None:
            self._runner.run(self.aclose())
            self._runner.close()
        for engine in self.engines():
            with suppress(sa.exc.DBAPIError):
                engine.dispose(close=True)


class RecipeSession(orm.Session):
    """What "Custom Vertical Partitioning" in SQLAlchemy's manual describes.

    The manual names UPDATE and DELETE; here any DML goes to the primary, which favours it.
    """

    def __init__(self, *, primary: Engine, replicas: list[Engine], rng: Random, **options: Any):
        self._choices = primary, replicas, rng
        super().__init__(**options)

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Engine:
        primary, replicas, rng = self._choices
        if self._flushing or getattr(clause, "is_dml", False):
            return primary
        return rng.choice(replicas)


class Recipe(Contender):
    name = "recipe of the manual"

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers)
        nodes = [servers.primary, *servers.replicas]
        self._engines = [sa.create_engine(url(node), **POOL) for node in nodes]
        self._async = [create_async_engine(url(node), **POOL) for node in nodes]
        self._rng = Random(1)  # the manual chooses a replica at random

    @classmethod
    def version(cls) -> str:
        return f"SQLAlchemy {sa.__version__}"

    def session(self, **options: Any) -> orm.Session:
        primary, *replicas = self._engines
        return RecipeSession(primary=primary, replicas=replicas, rng=self._rng, **options)

    def async_session(self, **options: Any) -> AsyncSession:
        primary, *replicas = [engine.sync_engine for engine in self._async]
        return AsyncSession(
            sync_session_class=RecipeSession,
            primary=primary,
            replicas=replicas,
            rng=self._rng,
            **options,
        )

    def engines(self) -> list[Engine]:
        return [*self._engines, *(engine.sync_engine for engine in self._async)]

    async def aclose(self) -> None:
        for engine in self._async:
            await engine.dispose()


class AdvancedAlchemy(Contender):
    """advanced-alchemy's routing with its default settings; it is no dependency of sqlroute."""

    name = "advanced-alchemy"

    def __init__(self, servers: Servers) -> None:
        from advanced_alchemy.config.routing import RoutingConfig  # type: ignore[import-not-found]

        super().__init__(servers)
        self._config = RoutingConfig(
            primary_connection_string=_text(servers.primary),
            read_replicas=[_text(node) for node in servers.replicas],
        )
        self._engines: dict[str, Engine] = {}
        self._async: dict[str, Any] = {}
        self._makers: dict[str, Any] = {}  # by options, since each begins its round robin anew

    @classmethod
    def version(cls) -> str:
        return f"advanced-alchemy {metadata.version('advanced-alchemy')}"

    def session(self, **options: Any) -> orm.Session:
        from advanced_alchemy.routing import (  # type: ignore[import-not-found]
            RoutingSyncSessionMaker,
        )

        def engine(text: str) -> Engine:
            if text not in self._engines:
                self._engines[text] = sa.create_engine(text, **POOL)
            return self._engines[text]

        key = repr(sorted(options.items()))
        if key not in self._makers:
            self._makers[key] = RoutingSyncSessionMaker(
                self._config, session_config=options, create_engine_callable=engine
            )
        found: orm.Session = self._makers[key]()
        return found

    def async_session(self, **options: Any) -> AsyncSession:
        from advanced_alchemy.routing import RoutingAsyncSessionMaker

        def engine(text: str) -> Any:
            if text not in self._async:
                self._async[text] = create_async_engine(text, **POOL)
            return self._async[text]

        key = "async" + repr(sorted(options.items()))
        if key not in self._makers:
            self._makers[key] = RoutingAsyncSessionMaker(
                self._config, session_config=options, create_engine_callable=engine
            )
        maker = self._makers[key]
        try:
            found: AsyncSession = maker()
        except AttributeError as error:  # its constructor sets what is a property since 2.1
            self.notes = (
                f"advanced-alchemy's async session cannot be made with SQLAlchemy {sa.__version__} "
                f"(`AttributeError: {error}`). Its rows with AsyncSession show an ordinary "
                "`AsyncSession` over its sync routing session and its own selectors instead.",
            )
            found = self._async_session(maker, options)
        return found

    def _async_session(self, maker: Any, options: dict[str, Any]) -> AsyncSession:
        """Do what its constructor does, without the line that fails."""
        from advanced_alchemy.routing.session import (  # type: ignore[import-not-found]
            RoutingSyncSession,
            _SyncEngineSelectorWrapper,
        )

        selectors = maker._selectors.items()
        return AsyncSession(
            sync_session_class=RoutingSyncSession,
            routing_config=self._config,
            selectors={name: _SyncEngineSelectorWrapper(found) for name, found in selectors},
            default_engine=maker.primary_engine.sync_engine,
            **options,
        )

    def engines(self) -> list[Engine]:
        return [*self._engines.values(), *(e.sync_engine for e in self._async.values())]

    async def aclose(self) -> None:
        for engine in self._async.values():
            await engine.dispose()


class Sqlroute(Contender):
    name = "sqlroute"
    offers = frozenset(
        {
            "declared intents",
            "levels of consistency",
            "options of begin",
            "settings that travel",
            "shards",
            "tokens",
        }
    )

    def __init__(self, servers: Servers, router: Router | None = None) -> None:
        super().__init__(servers)
        self.router = router or Router.from_config(servers.topology.config_path)

    @classmethod
    def version(cls) -> str:
        return f"sqlroute {metadata.version('sqlroute')}"

    def session(self, **options: Any) -> orm.Session:
        return self.router.sessionmaker(**options)()

    def async_session(self, **options: Any) -> AsyncSession:
        return self.router.async_sessionmaker(**options)()

    def engines(self) -> list[Engine]:
        flavours = (self.router.engines(is_async=flavour) for flavour in (False, True))
        return [engine for found in flavours for engine in found._engines.values()]

    async def aclose(self) -> None:
        await self.router.aclose()

    def close(self) -> None:
        super().close()
        self.router.close()


def _text(node: Any) -> str:
    return url(node).render_as_string(hide_password=False)
