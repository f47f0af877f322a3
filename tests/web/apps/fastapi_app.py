"""FastAPI with async sessions."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

from sqlroute import LostTimeline, Router, RoutingAsyncSession
from sqlroute.web import Cookie, session_of
from sqlroute.web.asgi import RoutingMiddleware

from .models import Article, number_of

api = FastAPI()


def get_session(request: Request) -> RoutingAsyncSession:
    return session_of(request)


Session = Annotated[RoutingAsyncSession, Depends(get_session)]


@api.post("/articles/{number}")
async def rename(number: int, title: str, session: Session) -> dict[str, str]:
    await session.merge(Article(id=number, title=title))
    await session.commit()  # before the handler returns: the cookie goes with the response's head
    return {"title": title}


@api.get("/articles/{number}")
async def show(number: int, session: Session) -> dict[str, str]:
    return {"title": (await session.get_one(Article, number)).title}


@api.exception_handler(LostTimeline)
async def lost(_: Request, __: LostTimeline) -> JSONResponse:
    return JSONResponse({"title": "your last change may be lost"}, 409)


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    carry = Cookie(keys)  # over HTTPS: Cookie(keys, secure=True)
    return RoutingMiddleware(api, router.async_sessionmaker(), carry, **options)


# further routes, for the tests


@api.get("/broken/{number}")
async def broken(number: int, session: Session) -> None:
    await session.merge(Article(id=number, title="never"))
    await session.flush()
    raise ZeroDivisionError


@api.get("/same")
async def same(request: Request, session: Session) -> dict[str, str]:
    await asyncio.sleep(0.05)  # so that requests overlap
    return {"title": number_of(session, session_of(request))}
