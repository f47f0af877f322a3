"""Nodes that an operator adds and removes in a shard's catalog, while routers run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from conftest import until
from sqlalchemy import literal, select

from sqlroute import Router
from sqlroute.catalog import nodes
from sqlroute.local.topology import LocalTopology
from sqlroute.runtime import inquiry

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]

READ = select(literal(1))


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: Any) -> LocalTopology:
    """One shard with two replicas, of which the configuration names one."""
    found: LocalTopology = sqlroute_topology_factory(shards=1, replicas=2, label="announced")
    with Router.from_config(found.config_path) as router:
        router.install_catalog()
    return found


@pytest.fixture(autouse=True)
def nothing_announced(servers: LocalTopology) -> Iterator[None]:
    yield
    with on(servers, "s0-a") as connection:
        connection.execute("DELETE FROM sqlroute.node")
        connection.execute("UPDATE sqlroute.shard SET revision = revision + 1")


@contextmanager
def routing(servers: LocalTopology) -> Iterator[Router]:
    """Route by a file that names two of the three nodes."""
    with Router.from_config(config(servers, "s0-a", "s0-b")) as found:
        found.monitor.ready(5)
        yield found
        found.monitor.ask("s0", 1)  # what was removed last is watched no more


@pytest.fixture
def router(servers: LocalTopology) -> Iterator[Router]:
    with routing(servers) as found:
        yield found


def config(servers: LocalTopology, *names: str) -> dict[str, Any]:
    urls = [servers.node(name).url for name in names]
    return {
        "policy": {"probe_interval": "50ms"},
        "keyspaces": {"main": {"shards": [{"name": "s0", "nodes": urls}]}},
    }


def on(servers: LocalTopology, name: str) -> psycopg.Connection[Any]:
    return psycopg.connect(servers.node(name).url.partition("?")[0], autocommit=True)


def announce(servers: LocalTopology, name: str, *, of: str = "", url: str = "") -> int:
    """Add a node as `sqlroute replica add` does; return the revision."""
    with Router.from_config(servers.config_path) as router:
        url = url or nodes.url_of(router.topology.node(of or name))
    with on(servers, "s0-a") as connection:
        (row,) = connection.execute(nodes.ADD, (name, "s0", url)).fetchall()
    return int(row[0])


def withdraw(servers: LocalTopology, name: str) -> int:
    with on(servers, "s0-a") as connection:
        (row,) = connection.execute(nodes.REMOVE, (name, "s0")).fetchall()
    return int(row[0])


def names(router: Router) -> list[str]:
    return [node.name for node in router.topology.shard("s0").nodes]


def readers(router: Router, count: int = 20) -> set[str]:
    """Return the nodes that reads go to now."""
    found = set()
    for _ in range(count):
        with router.sessionmaker()() as session:
            found.add(session.explain(READ).target.node)
            session.execute(READ)
    return found


def test_an_added_node_takes_reads(servers: LocalTopology, router: Router) -> None:
    """With the credentials and the database of the file, which the catalog does not know."""
    assert readers(router) == {"s0-b"}
    announce(servers, "s0-new", of="s0-c")
    until(lambda: "s0-new" in readers(router))

    assert names(router) == ["s0-a", "s0-b", "s0-new"]
    with on(servers, "s0-a") as connection:
        (url,) = connection.execute("SELECT url FROM sqlroute.node").fetchone() or ()
    assert url == f"postgresql://127.0.0.1:{servers.node('s0-c').port}"


def test_a_removed_node_takes_none_though_the_file_names_it(
    servers: LocalTopology, router: Router
) -> None:
    announce(servers, "s0-c")
    until(lambda: readers(router) == {"s0-b", "s0-c"})
    withdraw(servers, "s0-b")
    until(lambda: names(router) == ["s0-a", "s0-c"])
    assert readers(router) == {"s0-c"}
    withdraw(servers, "s0-c")
    until(lambda: names(router) == ["s0-a"])

    assert readers(router) == {"s0-a"}


def test_what_was_removed_can_be_added_again(servers: LocalTopology, router: Router) -> None:
    assert readers(router) == {"s0-b"}
    withdraw(servers, "s0-b")
    until(lambda: readers(router) == {"s0-a"})
    announce(servers, "s0-b")
    until(lambda: readers(router) == {"s0-b"})


def test_a_router_that_starts_sees_them(servers: LocalTopology) -> None:
    """Soon after its first plan, without anything new."""
    announce(servers, "s0-c")
    withdraw(servers, "s0-b")
    with routing(servers) as router:
        until(lambda: names(router) == ["s0-a", "s0-c"])


def test_who_looks_around_sees_them_at_once(servers: LocalTopology) -> None:
    """As `sqlroute status` does."""
    announce(servers, "s0-c")
    with Router.from_config(config(servers, "s0-a", "s0-b")) as router:
        health = router.look_around()
        assert list(health.nodes) == ["s0-a", "s0-b", "s0-c"]
        assert health.of("s0-c").has_outcome


def test_reload_keeps_them(servers: LocalTopology, router: Router) -> None:
    """Beside what the file says now; a node that both name is one node."""
    announce(servers, "s0-new", of="s0-c")
    until(lambda: names(router) == ["s0-a", "s0-b", "s0-new"])
    router.reload(config(servers, "s0-a"))
    assert names(router) == ["s0-a", "s0-new"]
    router.reload(config(servers, "s0-a", "s0-c"))
    assert names(router) == ["s0-a", "s0-c"]


def test_without_the_primary_a_replica_tells(servers: LocalTopology) -> None:
    """A router that starts while the primary is down."""
    revision = announce(servers, "s0-c")

    def has_it() -> bool:
        with on(servers, "s0-b") as connection:
            found = nodes.read(connection, "s0")
        return found is not None and found.revision == revision

    until(has_it)
    servers.node("s0-a").stop()
    try:
        with routing(servers) as router:
            until(lambda: names(router) == ["s0-a", "s0-b", "s0-c"])
    finally:
        servers.node("s0-a").start()


def test_who_cannot_read_them_tries_again(
    servers: LocalTopology,
    router: Router,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The nodes stay as they are meanwhile, and the reason is logged once."""
    monkeypatch.setattr(inquiry, "PATIENCE", 0.05)
    with on(servers, "s0-a") as connection:
        connection.execute("ALTER TABLE sqlroute.node RENAME TO away")
        connection.execute("UPDATE sqlroute.shard SET revision = revision + 1")
        until(lambda: "nothing changes" in caplog.text)
        assert names(router) == ["s0-a", "s0-b"]
        connection.execute("ALTER TABLE sqlroute.away RENAME TO node")
    announce(servers, "s0-c")
    until(lambda: names(router) == ["s0-a", "s0-b", "s0-c"])

    assert caplog.text.count("nothing changes") == 1
    assert 'relation "sqlroute.node" does not exist' in caplog.text


def test_a_row_that_nobody_understands_is_passed_over(
    servers: LocalTopology, router: Router, caplog: pytest.LogCaptureFixture
) -> None:
    """And quoted nowhere: somebody may have put a password there."""
    announce(servers, "s0-odd", url="mysql://root:hunter2@db:3306")
    announce(servers, "s0-c")
    until(lambda: names(router) == ["s0-a", "s0-b", "s0-c"])

    assert "s0-odd" in caplog.text
    assert "hunter2" not in caplog.text


def test_nothing_is_written_for_another_shard(servers: LocalTopology) -> None:
    """No row of that shard, no node; and a name stays with its shard."""
    with on(servers, "s0-a") as connection:
        assert connection.execute(nodes.ADD, ("x", "s9", "postgresql://db:5432")).fetchall() == []
        assert connection.execute(nodes.REMOVE, ("x", "s9")).fetchall() == []
        (count,) = connection.execute("SELECT count(*) FROM sqlroute.node").fetchone() or ()

    assert count == 0
