"""Flask with Flask-SQLAlchemy."""

from __future__ import annotations

import time
from typing import Any

from flask import Flask, current_app, has_request_context, request
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlroute import Router, RoutingMixin
from sqlroute.web import Cookie, adopt
from sqlroute.web.wsgi import RoutingMiddleware

from .models import number_of


class RoutedSession(RoutingMixin, Session):
    """``db.session``, routed."""

    def __init__(self, db: SQLAlchemy, **options: Any) -> None:
        super().__init__(db, router=current_app.extensions["sqlroute"], **options)
        if has_request_context():  # not in a shell or a command
            adopt(request, self)


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base, session_options={"class_": RoutedSession})


class Article(db.Model):
    __tablename__ = "article"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


def make(router: Router, keys: tuple[str, ...] = ("a secret",), **options: Any) -> Any:
    app = Flask(__name__)
    # for db.engine: create_all, migrations
    app.config["SQLALCHEMY_DATABASE_URI"] = router.primary_engine("s0").url
    app.extensions["sqlroute"] = router
    db.init_app(app)

    @app.post("/articles/<int:number>")
    def rename(number: int) -> dict[str, str]:
        db.session.merge(Article(id=number, title=request.args["title"]))
        db.session.commit()
        return {"title": request.args["title"]}

    @app.get("/articles/<int:number>")
    def show(number: int) -> dict[str, str]:
        return {"title": db.get_or_404(Article, number).title}

    app.wsgi_app = RoutingMiddleware(app.wsgi_app, router.sessionmaker(), Cookie(keys), **options)

    # further routes, for the tests

    @app.get("/pages/<int:number>")
    def pages(number: int) -> dict[str, str]:
        found = db.paginate(db.select(Article).order_by(Article.id), per_page=number)
        return {"title": found.items[0].title}

    @app.get("/broken/<int:number>")
    def broken(number: int) -> None:
        db.session.merge(Article(id=number, title="never"))
        db.session.flush()
        raise ZeroDivisionError

    @app.get("/same")
    def same() -> dict[str, str]:
        session = db.session()
        time.sleep(0.05)  # so that requests overlap
        return {"title": number_of(session, db.session())}

    return app
