"""Litestar with advanced-alchemy, whose plugin makes the sessions."""

from __future__ import annotations

import asyncio
from typing import Any

from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyInitPlugin
from litestar import Litestar, Request, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from litestar.types import Scope
from sqlalchemy.ext.asyncio import AsyncSession

from sqlroute import Router
from sqlroute.web import Cookie, adopt
from sqlroute.web.asgi import RoutingMiddleware

from .models import Article, number_of


class Config(SQLAlchemyAsyncConfig):
    """Lets the plugin's sessions take part."""

    def provide_session(self, state: State, scope: Scope) -> AsyncSession:
        return adopt(scope, super().provide_session(state, scope))


@post("/articles/{number:int}", status_code=200)
async def rename(
    number: FromPath[int], title: FromQuery[str], db_session: NamedDependency[AsyncSession]
) -> dict[str, str]:
    await db_session.merge(Article(id=number, title=title))
    await db_session.commit()  # the plugin's "autocommit" answers 200 even if its commit fails
    return {"title": title}


@get("/articles/{number:int}")
async def show(number: FromPath[int], db_session: NamedDependency[AsyncSession]) -> dict[str, str]:
    return {"title": (await db_session.get_one(Article, number)).title}


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    sessions = router.async_sessionmaker(expire_on_commit=False)
    config = Config(
        session_maker=sessions,
        engine_instance=router.async_primary_engine("s0"),  # for its commands
        before_send_handler=options.pop("commit", None),
    )
    app = Litestar([rename, show, *_MORE], plugins=[SQLAlchemyInitPlugin(config)])
    # around the application, not in its list of middlewares: the plugin commits after those
    return RoutingMiddleware(app, sessions, Cookie(keys), **options)


# further routes, for the tests


@post("/auto/{number:int}", status_code=200)
async def auto(
    number: FromPath[int], title: FromQuery[str], db_session: NamedDependency[AsyncSession]
) -> None:
    await db_session.merge(Article(id=number, title=title))


@get("/broken/{number:int}")
async def broken(number: FromPath[int], db_session: NamedDependency[AsyncSession]) -> None:
    await db_session.merge(Article(id=number, title="never"))
    await db_session.flush()
    raise ZeroDivisionError


@get("/same")
async def same(request: Request, db_session: NamedDependency[AsyncSession]) -> dict[str, str]:
    await asyncio.sleep(0.05)  # so that requests overlap
    return {"title": number_of(db_session)}


_MORE = [auto, broken, same]
