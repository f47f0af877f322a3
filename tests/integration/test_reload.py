"""Nodes that come and go while the program runs, and what listeners are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import until
from sqlalchemy import orm, select
from sqlalchemy.orm import Mapped, mapped_column

from sqlroute import Router
from sqlroute.errors import ConfigError
from sqlroute.events import (
    Event,
    Fallback,
    NodeChanged,
    PlanChosen,
    PrimaryChanged,
    Retried,
    StatementDone,
)
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]


class Base(orm.DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


READ = select(Note.text).where(Note.id == 1)


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: Any) -> LocalTopology:
    """One shard with two replicas."""
    found: LocalTopology = sqlroute_topology_factory(shards=1, replicas=2, label="reload")
    with Router.from_config(found.config_path) as router:
        router.create_all(Base.metadata)
        with router.sessionmaker()() as session:
            session.add(Note(id=1, text="old"))
            session.commit()
            (token,) = session.token.positions

        def have_it() -> bool:
            replicas = router.monitor.ask("s0", 1.0).replicas("s0")
            return len(replicas) == 2 and all(node.lsn >= token.lsn for node in replicas)

        until(have_it)
    return found


def config(servers: LocalTopology, *names: str) -> dict[str, Any]:
    """Return a configuration of some of the nodes."""
    urls = [servers.node(name).url for name in names]
    return {
        "policy": {"probe_interval": "100ms"},
        "keyspaces": {"main": {"shards": [{"name": "s0", "nodes": urls}]}},
    }


@contextmanager
def reading(router: Router) -> Iterator[list[Any]]:
    """Read and write in threads meanwhile; whatever goes wrong is in the list."""
    wrong: list[Any] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                with router.sessionmaker()() as session:
                    session.scalar(READ)
                    session.get_one(Note, 1).text = "new"
                    session.commit()
            except Exception as error:
                if type(error).__name__ != "StaleObjectRead":
                    wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        over.set()
        for thread in threads:
            thread.join()


def answered(router: Router, name: str) -> int:
    return router.engines(is_async=False).answered.get(name, 0)


class TestReload:
    def test_nodes_come_and_go_under_load(self, servers: LocalTopology) -> None:
        """No request fails; the new one gets reads, the old one keeps no connection."""
        with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
            router.health()
            with reading(router) as wrong:
                until(lambda: answered(router, "s0-b") > 20)
                assert answered(router, "s0-c") == 0
                router.reload(config(servers, "s0-a", "s0-b", "s0-c"))
                until(lambda: answered(router, "s0-c") > 20)
                router.reload(config(servers, "s0-a", "s0-c"))
                before = answered(router, "s0-c")
                until(lambda: answered(router, "s0-c") > before + 50)
                pool: Any = router.engines(is_async=False)._engines["s0-b"].pool
                until(lambda: pool.checkedin() == 0 and not pool._lent)
                at = answered(router, "s0-b")
                before = answered(router, "s0-c")
                until(lambda: answered(router, "s0-c") > before + 50)
                assert answered(router, "s0-b") == at
            assert wrong == []

    def test_an_open_transaction_goes_on(self, servers: LocalTopology) -> None:
        """Also on a node that went, to its commit."""
        with (
            Router.from_config(config(servers, "s0-a", "s0-b")) as router,
            router.sessionmaker()() as session,
            router.sessionmaker()() as reader,
        ):
            session.get_one(Note, 1).text = "kept"
            session.flush()
            reader.begin(read_only=True)
            assert reader.scalar(READ)
            router.reload(config(servers, "s0-a", "s0-c"))
            assert reader.scalar(READ)
            session.commit()
            assert session.scalar(READ) == "kept"

    def test_the_same_file_is_read_again(self, servers: LocalTopology) -> None:
        """Without an argument."""
        with Router.from_config(servers.config_path) as router:
            router.reload()
            with router.sessionmaker()() as session:
                assert session.scalar(READ)

    def test_async_pools_close_what_is_idle(self, servers: LocalTopology) -> None:
        """In their own loop."""

        async def main() -> None:
            router = Router.from_config(config(servers, "s0-a", "s0-b"))
            async with router.async_sessionmaker()() as session:
                await session.scalar(READ)
            pool: Any = router.engines(is_async=True)._engines["s0-b"].pool
            assert pool.checkedin() == 1
            await router.areload(config(servers, "s0-a", "s0-c"))
            assert pool.checkedin() == 0
            async with router.async_sessionmaker()() as session:
                assert await session.scalar(READ)
            await router.aclose()

        asyncio.run(main())

    def test_other_shards_are_refused(self, servers: LocalTopology) -> None:
        """With the path; the router goes on as it was."""
        wanted = config(servers, "s0-a", "s0-b")
        wanted["keyspaces"]["main"]["shards"][0]["name"] = "s9"
        with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
            with pytest.raises(ConfigError, match=r"keyspaces\.main\.shards: s0 cannot become s9"):
                router.reload(wanted)
            with pytest.raises(ConfigError):
                router.reload({"keyspaces": {}})
            with router.sessionmaker()() as session:
                assert session.scalar(READ)


class TestEvents:
    def test_a_replica_dies_and_comes_back(self, servers: LocalTopology) -> None:
        """Its changes, the read that was sent elsewhere, and the fallback are told."""
        seen: list[Event] = []
        with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
            router.health()
            end = router.listen(seen.append)
            with router.sessionmaker()() as session:
                assert session.scalar(READ)
                servers.node("s0-b").kill()
                assert session.scalar(READ)
            until(lambda: any(isinstance(e, NodeChanged) and e.now == "down" for e in seen))
            with router.sessionmaker()() as session:
                assert session.scalar(READ)
            retried = [event for event in seen if isinstance(event, Retried)]
            fallbacks = [event for event in seen if isinstance(event, Fallback)]
            servers.node("s0-b").start()
            until(lambda: any(isinstance(e, NodeChanged) and e.now == "up" for e in seen))
            end()
            count = len(seen)
            router.listeners.tell(retried[0] if retried else fallbacks[0])

        assert all((event.what, event.node) == ("read", "s0-b") for event in retried)
        assert {(event.shard, event.node) for event in fallbacks} == {("s0", "s0-a")}
        assert "s0-b" in fallbacks[-1].reason
        assert len(seen) == count, "it was told after its end"
        assert not any(isinstance(event, PlanChosen | StatementDone) for event in seen)

    def test_plans_and_statements_on_request(self, servers: LocalTopology) -> None:
        """One each, of flushes too; a listener that fails harms nobody."""
        seen: list[Any] = []

        def broken(event: Event) -> None:
            raise RuntimeError("a listener's own fault")

        with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
            router.health()
            router.listen(broken)
            router.listen(seen.append, PlanChosen, StatementDone)
            with router.sessionmaker()() as session:
                session.scalar(READ)
                session.add(Note(id=2, text="two"))
                session.flush()
                session.rollback()
        plans = [event.plan.target.node for event in seen if isinstance(event, PlanChosen)]
        done = [event for event in seen if isinstance(event, StatementDone)]
        assert plans == ["s0-b"]
        assert [event.node for event in done] == ["s0-b", "s0-a"]
        assert all(0 < event.seconds < 5 and not event.error for event in done)

    def test_what_is_no_kind_is_refused(self, servers: LocalTopology) -> None:
        """It would never be told."""
        with (
            Router.from_config(config(servers, "s0-a")) as router,
            pytest.raises(TypeError, match="is no kind of event; known: PlanChosen"),
        ):
            router.listen(print, int)  # type: ignore[arg-type]


def test_a_promotion_is_told(sqlroute_topology_factory: Any) -> None:
    """Who was the primary, who is it now, on which timeline."""
    servers = sqlroute_topology_factory(shards=1, replicas=1, label="promoted")
    seen: list[Any] = []
    with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
        router.health()
        router.listen(seen.append, PrimaryChanged)
        servers.node("s0-a").kill()
        import psycopg

        with psycopg.connect(**servers.node("s0-b").conninfo, autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        until(lambda: router.health().primary("s0") is not None)
    assert [(event.before, event.now) for event in seen][-1][1] == "s0-b"
    assert seen[-1].timeline == 2
    assert seen[0].before == "s0-a"
