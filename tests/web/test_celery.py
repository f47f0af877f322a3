"""Tasks in a real worker that forks, over a replica held behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqlroute import Token, UnknownName
from sqlroute.ext.celery import carrying
from sqlroute.routing.token import Position

from .apps import celery_app
from .apps.models import Article
from .conftest import NEW, OLD, World

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]


class Worker:
    """A worker with two processes, and the application that publishes to it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.router = world.make_router()
        self.app = celery_app.make(self.router, folder)
        environ = {
            **os.environ,
            "SQLROUTE_CONFIG": str(world.config),
            "SQLROUTE_TEST_FOLDER": str(folder),
        }
        command = "-A tests.web.apps.celery_worker worker -P prefork -c 2 -E --without-mingle"
        self.log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery", *command.split(), "--without-gossip"],
            cwd=ROOT,
            env=environ,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def write(self, number: int) -> Token:
        with self.router.sessionmaker()() as session:
            session.merge(Article(id=number, title=NEW))
            session.commit()
            return session.token

    def send(self, name: str, number: int, token: Token | str = "", **options: Any) -> Any:
        carried = carrying(token) if token else {}
        return self.app.tasks[name].apply_async((number,), **carried, **options)

    def ask(self, name: str, number: int, token: Token | str = "", **options: Any) -> Any:
        return self.result(self.send(name, number, token, **options))

    def result(self, sent: Any) -> Any:
        try:
            return sent.get(timeout=30, interval=0.02)
        except Exception as error:
            error.add_note((self.folder / "log").read_text()[-4000:])
            raise

    def stop(self) -> dict[str, int]:
        """End it warmly; return what its parent process has noted."""
        self._process.terminate()
        self._process.wait(30)
        self.router.close()
        self.log.close()
        found: dict[str, int] = json.loads((self.folder / "parent.json").read_text())
        return found


@pytest.fixture(scope="module")
def worker(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(world, tmp_path_factory.mktemp("celery"))
    try:
        yield worker
    finally:
        if worker._process.poll() is None:
            worker.stop()


def test_a_sticky_task_sees_what_its_publisher_wrote(worker: Worker, world: World) -> None:
    """And one that carries no token may not."""
    number = world.article()
    sent = celery_app.rename(worker.router, worker.app, number, NEW)

    assert worker.result(sent) == NEW
    number = world.article()
    worker.write(number)
    assert worker.ask("sticky", number) == OLD


def test_an_always_task_needs_no_token(worker: Worker, world: World) -> None:
    number = world.article()
    worker.write(number)

    assert worker.ask("always", number) == NEW


def test_a_delayed_task_waits_for_the_replica(worker: Worker, world: World) -> None:
    """It is put off, once and without counting as a retry, and then reads from the replica."""
    number = world.article()
    token = worker.write(number)
    where = worker.app.tasks["where"]

    early = worker.ask("where", number, token)
    assert (early["title"], early["put_off"], early["retries"]) == (NEW, True, 0)
    assert not early["on_replica"], "one second later the replica is still behind"
    assert where.max_retries == 0
    assert worker.ask("delayed", world.article(), token) == OLD
    late = worker.ask("where", number, token)
    assert (late["title"], late["put_off"], late["on_replica"]) == (NEW, False, True)


def test_a_token_that_cannot_be_followed(worker: Worker, world: World) -> None:
    """The task reads from the primary."""
    number = world.article()
    worker.write(number)

    assert worker.ask("sticky", number, "nonsense") == NEW
    assert worker.ask("sticky", number, Token((Position("s9", 1, 1, 1, 1),))) == NEW
    assert worker.ask("delayed", number, "nonsense") == NEW


def test_a_task_that_is_called_here(worker: Worker, world: World) -> None:
    """Without a message there is no token, and nothing is put off."""
    number = world.article()
    worker.write(number)

    assert worker.app.tasks["sticky"](number) == OLD
    assert worker.app.tasks["delayed"].apply((number,)).get() == OLD
    eager = worker.app.tasks["delayed"].apply((number,), **carrying(worker.write(number)))
    assert eager.get() == NEW


def test_an_unknown_consistency(worker: Worker) -> None:
    task = worker.app.tasks["sticky"]
    task.data_consistency = "sometimes"
    try:
        with pytest.raises(UnknownName, match="unknown data_consistency 'sometimes' of task stick"):
            task(1)
    finally:
        task.data_consistency = "sticky"


def test_connections_are_not_shared_over_a_fork(worker: Worker, world: World) -> None:
    """The children have their own; that of the parent, opened before, still serves it at the end.

    The last test: it stops the worker.
    """
    number = world.article()
    sent = [worker.send("where", number) for _ in range(40)]
    found = [worker.result(result) for result in sent]
    children = {(each["process"], each["backend"]) for each in found}
    parent = worker.stop()

    assert len({process for process, _ in children}) == 2, "one child did all the work"
    assert len({backend for _, backend in children}) >= 2
    assert parent["process"] not in {process for process, _ in children}
    assert parent["before"] not in {backend for _, backend in children}
    assert parent["after"] == parent["before"]
