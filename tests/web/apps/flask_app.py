"""Flask by itself."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask, request

from sqlroute import Router
from sqlroute.web import Cookie, session_of
from sqlroute.web.wsgi import RoutingMiddleware

from .models import Article, number_of


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    app = Flask(__name__)

    @app.post("/articles/<int:number>")
    def rename(number: int) -> dict[str, str]:
        session = session_of(request)
        session.merge(Article(id=number, title=request.args["title"]))
        session.commit()
        return {"title": request.args["title"]}

    @app.get("/articles/<int:number>")
    def show(number: int) -> dict[str, str]:
        return {"title": session_of(request).get_one(Article, number).title}

    app.wsgi_app = RoutingMiddleware(app.wsgi_app, router.sessionmaker(), Cookie(keys), **options)

    # further routes, for the tests

    @app.get("/broken/<int:number>")
    def broken(number: int) -> None:
        session_of(request).merge(Article(id=number, title="never"))
        session_of(request).flush()
        raise ZeroDivisionError

    @app.get("/same")
    def same() -> dict[str, str]:
        session = session_of(request)
        time.sleep(0.05)  # so that requests overlap
        return {"title": number_of(session, session_of(request))}

    return app
