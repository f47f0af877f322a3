"""Celery tasks that see what their publisher has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery

from sqlroute import Router
from sqlroute.ext.celery import RoutedTask, carrying

from .models import Article


def make(router: Router, folder: Path) -> Celery:
    class Task(RoutedTask):
        sessions = router.sessionmaker()

    app = Celery("articles", broker="filesystem://", task_cls=Task)

    @app.task(bind=True, name="sticky")
    def sticky(self: Task, number: int) -> str:
        with self.session() as session:
            return session.get_one(Article, number).title

    @app.task(bind=True, name="always", data_consistency="always")
    def always(self: Task, number: int) -> str:
        with self.session() as session:
            return session.get_one(Article, number).title

    @app.task(bind=True, name="delayed", data_consistency="delayed", delay=5.0)
    def delayed(self: Task, number: int) -> str:
        with self.session() as session:
            return session.get_one(Article, number).title

    _for_tests(app, folder)
    return app


def rename(router: Router, app: Celery, number: int, title: str) -> Any:
    """Write, and publish a task that sees it."""
    with router.sessionmaker()() as session:
        session.merge(Article(id=number, title=title))
        session.commit()
        return app.tasks["sticky"].apply_async((number,), **carrying(session.token))


def _for_tests(app: Celery, folder: Path) -> None:
    import os

    from sqlalchemy import func, select

    for name in ("queue", "control", "results"):
        (folder / name).mkdir(exist_ok=True)
    app.conf.update(
        result_backend=f"file://{folder}/results",
        broker_transport_options={
            "data_folder_in": str(folder / "queue"),
            "data_folder_out": str(folder / "queue"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.05,
        },
    )

    @app.task(bind=True, name="where", data_consistency="delayed", max_retries=0)
    def where(self: Any, number: int, delay: float | None = None) -> dict[str, Any]:
        with self.session() as session:
            return {
                "title": session.scalar(select(Article.title).filter_by(id=number)),
                "on_replica": session.scalar(select(func.pg_is_in_recovery())),
                "put_off": "sqlroute-delayed" in (self.request.headers or {}),
                "retries": self.request.retries,
                "process": os.getpid(),
                "backend": session.scalar(select(func.pg_backend_pid())),
            }
