"""Starlette."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sqlroute import Router
from sqlroute.web import Cookie, session_of
from sqlroute.web.asgi import RoutingMiddleware

from .models import Article, number_of


async def rename(request: Request) -> JSONResponse:
    session = session_of(request)
    title = request.query_params["title"]
    await session.merge(Article(id=request.path_params["number"], title=title))
    await session.commit()
    return JSONResponse({"title": title})


async def show(request: Request) -> JSONResponse:
    article = await session_of(request).get_one(Article, request.path_params["number"])
    return JSONResponse({"title": article.title})


async def broken(request: Request) -> None:
    await session_of(request).merge(Article(id=request.path_params["number"], title="never"))
    await session_of(request).flush()
    raise ZeroDivisionError


async def same(request: Request) -> JSONResponse:
    session = session_of(request)
    await asyncio.sleep(0.05)  # so that requests overlap
    return JSONResponse({"title": number_of(session, session_of(request))})


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    app = Starlette(
        routes=[
            Route("/articles/{number:int}", rename, methods=["POST"]),
            Route("/articles/{number:int}", show),
            Route("/broken/{number:int}", broken),
            Route("/same", same),
        ]
    )
    return RoutingMiddleware(app, router.async_sessionmaker(), Cookie(keys), **options)
