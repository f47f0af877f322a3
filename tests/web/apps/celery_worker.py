"""The worker of the tests: its router has open connections before it forks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celery.signals import worker_shutdown
from sqlalchemy import func, select

from sqlroute import Router

from .celery_app import make

FOLDER = Path(os.environ["SQLROUTE_TEST_FOLDER"])

router = Router.from_config()


def backend() -> int:
    with router.sessionmaker()() as session:
        return session.scalar(select(func.pg_backend_pid()))


before = backend()
app = make(router, FOLDER)


@worker_shutdown.connect
def note(**_: Any) -> None:
    """Say whether the parent's own connection has outlived its children."""
    found = {"process": os.getpid(), "before": before, "after": backend()}
    (FOLDER / "parent.json").write_text(json.dumps(found))
