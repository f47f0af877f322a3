"""Flask with Flask-SQLAlchemy-Lite."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask, current_app, has_request_context, request
from flask_sqlalchemy_lite import SQLAlchemy

from sqlroute import Router, RoutingSession
from sqlroute.web import Cookie, adopt
from sqlroute.web.wsgi import RoutingMiddleware

from .models import Article, number_of


class RoutedSession(RoutingSession):
    """``db.session``, routed."""

    def __init__(self, bind: object = None, **options: Any) -> None:
        # not bound to the extension's engine, which would take all statements
        super().__init__(router=current_app.extensions["sqlroute"], **options)
        if has_request_context():  # not in a shell or a command
            adopt(request, self)


db = SQLAlchemy(session_options={"class_": RoutedSession})


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": router.primary_engine("s0").url}
    app.extensions["sqlroute"] = router
    db.init_app(app)

    @app.post("/articles/<int:number>")
    def rename(number: int) -> dict[str, str]:
        db.session.merge(Article(id=number, title=request.args["title"]))
        db.session.commit()
        return {"title": request.args["title"]}

    @app.get("/articles/<int:number>")
    def show(number: int) -> dict[str, str]:
        return {"title": db.get_or_abort(Article, number).title}

    app.wsgi_app = RoutingMiddleware(app.wsgi_app, router.sessionmaker(), Cookie(keys), **options)

    # further routes, for the tests

    @app.get("/broken/<int:number>")
    def broken(number: int) -> None:
        db.session.merge(Article(id=number, title="never"))
        db.session.flush()
        raise ZeroDivisionError

    @app.get("/same")
    def same() -> dict[str, str]:
        session = db.session
        time.sleep(0.05)  # so that requests overlap
        return {"title": number_of(session, db.session)}

    return app
