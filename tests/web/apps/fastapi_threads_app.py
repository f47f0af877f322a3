"""FastAPI with handlers that run in threads, sync sessions, and a commit by the dependency."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request

from sqlroute import Router, RoutingSession
from sqlroute.web import Cookie, session_of
from sqlroute.web.asgi import RoutingMiddleware

from .models import Article, number_of

api = FastAPI()


def get_session(request: Request) -> Iterator[RoutingSession]:
    session = session_of(request)
    yield session
    session.commit()


# scope="function": it ends, and so commits, before the response begins
Session = Annotated[RoutingSession, Depends(get_session, scope="function")]
TooLate = Annotated[RoutingSession, Depends(get_session, scope="request")]


@api.post("/articles/{number}")
def rename(number: int, title: str, session: Session) -> dict[str, str]:
    session.merge(Article(id=number, title=title))
    return {"title": title}


@api.get("/articles/{number}")
def show(number: int, session: Session) -> dict[str, str]:
    return {"title": session.get_one(Article, number).title}


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    api.user_middleware.clear()
    api.middleware_stack = None
    api.add_middleware(
        RoutingMiddleware, sessions=router.sessionmaker(), carry=Cookie(keys), **options
    )
    return api


# further routes, for the tests


@api.post("/late/{number}")
def late(number: int, title: str, session: TooLate) -> dict[str, str]:
    session.merge(Article(id=number, title=title))
    return {"title": title}


@api.get("/broken/{number}")
def broken(number: int, session: Session) -> None:
    session.merge(Article(id=number, title="never"))
    session.flush()
    raise ZeroDivisionError


@api.get("/same")
def same(request: Request, session: Session) -> dict[str, str]:
    time.sleep(0.05)  # so that requests overlap
    return {"title": number_of(session, session_of(request))}
