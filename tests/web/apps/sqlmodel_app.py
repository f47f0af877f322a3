"""SQLModel's Session, with FastAPI."""

from __future__ import annotations

import time
from typing import Annotated, Any

import sqlmodel
from fastapi import Depends, FastAPI, Request
from sqlmodel import Field, SQLModel, select

from sqlroute import Router, RoutingMixin
from sqlroute.web import Cookie, session_of
from sqlroute.web.asgi import RoutingMiddleware

from .models import number_of


class Story(SQLModel, table=True):
    __tablename__ = "article"

    id: int | None = Field(default=None, primary_key=True)
    title: str


class RoutedSession(RoutingMixin, sqlmodel.Session):
    """``session.exec``, routed."""


api = FastAPI()


def get_session(request: Request) -> RoutedSession:
    return session_of(request)


Session = Annotated[RoutedSession, Depends(get_session)]


@api.post("/articles/{number}")
def rename(number: int, title: str, session: Session) -> Story:
    story = session.merge(Story(id=number, title=title))
    session.commit()
    session.refresh(story)
    return story


@api.get("/articles/{number}")
def show(number: int, session: Session) -> Story:
    return session.exec(select(Story).where(Story.id == number)).one()


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    sessions = router.sessionmaker(class_=RoutedSession)
    return RoutingMiddleware(api, sessions, Cookie(keys), **options)


# further routes, for the tests


@api.get("/broken/{number}")
def broken(number: int, session: Session) -> None:
    session.merge(Story(id=number, title="never"))
    session.flush()
    raise ZeroDivisionError


@api.get("/same")
def same(request: Request, session: Session) -> dict[str, str]:
    time.sleep(0.05)  # so that requests overlap
    return {"title": number_of(session, session_of(request))}
