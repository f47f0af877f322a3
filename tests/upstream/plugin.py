"""The pytest plugin that puts a Session in place of SQLAlchemy's and writes down each outcome.

Loaded by ``-p`` before the suite's own plugin: nothing of SQLAlchemy may be imported before the
session starts, or the suite's assertions are not rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.upstream import settings

_outcomes: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    """Register our dialect before the suite makes its engines, the Session after it."""
    mode = settings.load().mode
    if mode != "plain":
        from tests.upstream import dialect

        dialect.register()
    result = yield
    # the extension must have taken the original for its base
    import sqlalchemy.ext.horizontal_shard  # noqa: F401

    module = "plain" if mode == "plain" else "adapter"
    _substitute(import_module(f"tests.upstream.{module}").JudgedSession)
    return result


def _substitute(cls: Any) -> None:
    import sqlalchemy.ext.asyncio.session
    import sqlalchemy.orm.scoping
    import sqlalchemy.orm.session

    for module in (sqlalchemy.orm, sqlalchemy.orm.session, sqlalchemy.orm.scoping):
        module.Session = cls  # type: ignore[attr-defined]
    defaults: Any = sqlalchemy.orm.sessionmaker.__init__.__kwdefaults__
    defaults["class_"] = cls
    sqlalchemy.ext.asyncio.session.AsyncSession.sync_session_class = cls


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Put back the listeners of the class: tests of events clear those of every Session."""
    if settings.load().mode != "plain":
        from tests.upstream.adapter import listen_again

        listen_again()
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "text": ""})
    if report.outcome == "failed" or (report.outcome == "skipped" and found["outcome"] == "passed"):
        found["outcome"] = report.outcome
        found["text"] += f"[{report.when}] {report.longreprtext}\n"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome == "failed":
        _outcomes[report.nodeid] = {"outcome": "failed", "text": report.longreprtext}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    told = settings.load()
    counts: dict[str, int] = {}
    if told.mode != "plain":
        from tests.upstream import dialect

        counts = dict(dialect.counts)
    document = {"tests": _outcomes, "counts": counts}
    Path(told.results).write_text(json.dumps(document))
