"""A shard whose servers Patroni runs: three real nodes and an etcd."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import until
from psycopg.rows import dict_row
from sqlalchemy import literal, select, text

from sqlroute import Router
from sqlroute.config import Settings, load
from sqlroute.errors import OperationRefused
from sqlroute.ext.patroni import Patroni
from sqlroute.local.node import LocalNode
from sqlroute.ops import commands, resuming
from sqlroute.ops.managed import QUERY, managed_by
from sqlroute.ops.planning import Plan, Wishes
from sqlroute.testing import free_ports
from sqlroute.testing.patroni import SHORT_TIMES, PatroniCluster, missing
from sqlroute.topology import Place, RestApi, Secret

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(180),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

AUTH = ("ops", "wJ3-rest")
READ = select(literal(1))
EXPECTED = {"NoPrimary", "AdminShutdown", "OperationalError", "ReadOnlySqlTransaction"}
"""What a session may meet while Patroni stops one server and promotes another."""


@pytest.fixture(scope="module")
def cluster(pytestconfig: pytest.Config) -> Iterator[PatroniCluster]:
    """Three nodes; ``pg2`` is to serve no reads."""
    pg_bin = pytestconfig.getoption("--sqlroute-pg-bin")
    with (
        tempfile.TemporaryDirectory(prefix="sqlroute-patroni-") as directory,
        PatroniCluster(
            Path(directory),
            free_ports(8),
            times=SHORT_TIMES,
            auth=AUTH,
            tags={"pg2": {"noloadbalance": True}},
            pg_bin=Path(pg_bin) if pg_bin else None,
        ) as found,
    ):
        Path(directory).chmod(0o755)
        yield found


@pytest.fixture
def patroni(cluster: PatroniCluster) -> Patroni:
    return Patroni(RestApi(cluster.endpoints, AUTH[0], Secret(AUTH[1])))


@pytest.fixture
def router(cluster: PatroniCluster) -> Iterator[Router]:
    """One whose file names no node."""
    with Router.from_config(config(cluster)) as found:
        yield found


def config(cluster: PatroniCluster, **shard: Any) -> dict[str, Any]:
    url = f"postgresql://{cluster.user}:{cluster.password}@/{cluster.database}"
    table = {"name": "s0", "patroni": list(cluster.endpoints), "url": url, **shard}
    return {
        "policy": {"probe_interval": "100ms"},
        "patroni": {"interval": "200ms"},
        "keyspaces": {"shop": {"shards": [table]}},
    }


@dataclass
class Writes:
    """What a plain session has written, and the errors it met."""

    done: list[int] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


@contextmanager
def writing(router: Router) -> Iterator[Writes]:
    """Insert one row after the other in a thread meanwhile; each is tried once."""
    found, over = Writes(), threading.Event()
    with router.sessionmaker()() as session:
        first = (session.scalar(text("SELECT max(id) FROM note")) or 0) + 1

    def work() -> None:
        for i in itertools.count(first):
            if over.is_set():
                return
            try:
                with router.sessionmaker()() as session:
                    session.execute(text("INSERT INTO note VALUES (:id)"), {"id": i})
                    session.commit()
                found.done.append(i)
            except Exception as error:
                name = type(getattr(error, "orig", None) or error).__name__
                found.errors[name] = found.errors.get(name, 0) + 1
            over.wait(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def names(router: Router) -> list[str]:
    return [node.name for node in router.topology.shard("s0").nodes]


def other_than(cluster: PatroniCluster, *taken: str) -> str:
    return next(node.name for node in cluster.nodes if node.name not in taken)


class TestDiscovery:
    def test_the_members_are_the_nodes(self, cluster: PatroniCluster, router: Router) -> None:
        """From the first statement on, with the user and the database of the file."""
        with router.sessionmaker()() as session:
            session.execute(text("CREATE TABLE IF NOT EXISTS note (id bigint PRIMARY KEY)"))
            session.commit()
        assert names(router) == ["s0-pg0", "s0-pg1", "s0-pg2"]
        until(lambda: len(router.monitor.health.replicas("s0")) == 2)

        primary = router.monitor.health.primary("s0")
        assert primary is not None
        assert primary.node == f"s0-{cluster.leader()}"
        assert cluster.password not in repr(router.topology)

    def test_a_tag_keeps_reads_away(self, cluster: PatroniCluster, router: Router) -> None:
        """``noloadbalance``; unless that node is the primary and must answer."""
        router.health()
        until(lambda: all(n.is_readable for n in router.monitor.health.members("s0")))
        seen = set()
        for _ in range(40):
            with router.sessionmaker()() as session:
                seen.add(session.explain(READ).target.node)
        leader = cluster.leader()

        assert seen == {f"s0-{name}" for name in ("pg0", "pg1") if name != leader}

    def test_the_file_may_name_nodes_too(self, cluster: PatroniCluster) -> None:
        """They keep their names there; the others are those of Patroni; any endpoint is enough."""
        first = cluster.nodes[0]
        url = (
            f"postgresql://{cluster.user}:{cluster.password}@127.0.0.1:{first.port}"
            f"/{cluster.database}?name=first&zone=a"
        )
        source = config(cluster, nodes=[url], patroni=["http://127.0.0.1:9", cluster.endpoints[2]])
        del source["keyspaces"]["shop"]["shards"][0]["url"]
        with Router.from_config(source) as router:
            with router.sessionmaker()() as session:
                assert session.scalar(READ) == 1
            assert names(router) == ["first", "s0-pg1", "s0-pg2"]
            assert router.topology.node("first").zone == "a"
            assert router.topology.node("s0-pg1").user == cluster.user


class TestManaged:
    @pytest.mark.parametrize("superuser", [True, False])
    def test_patroni_is_seen_on_each_node(self, cluster: PatroniCluster, superuser: bool) -> None:
        """Primary or not, whatever the role may see."""
        for node in cluster.nodes:
            info = cluster.conninfo(node.name, superuser=superuser)
            with psycopg.connect(**info, row_factory=dict_row) as connection:
                facts = connection.execute(QUERY).fetchone()
            assert facts is not None
            assert managed_by(facts) == "Patroni"

    def test_it_is_seen_while_its_agent_is_away(self, cluster: PatroniCluster) -> None:
        """By the files that it has left, for a role that may see these."""
        info = cluster.conninfo(cluster.nodes[0].name, superuser=True)
        with psycopg.connect(**info, row_factory=dict_row) as connection:
            facts = connection.execute(QUERY).fetchone()
        assert facts is not None
        assert managed_by({**facts, "applications": []}) == "Patroni"

    def test_a_plain_server_is_run_by_nobody(self, sqlroute_single: LocalNode) -> None:
        with psycopg.connect(
            sqlroute_single.url.partition("?")[0], row_factory=dict_row
        ) as connection:
            facts = connection.execute(QUERY).fetchone()
        assert facts is not None
        assert managed_by(facts) == ""


class TestSwitchover:
    def test_what_patroni_refuses(self, cluster: PatroniCluster, patroni: Patroni) -> None:
        """With its words, and nothing is changed."""
        leader = cluster.leader() or ""
        candidate = other_than(cluster, leader)
        with pytest.raises(OperationRefused, match=r"candidate does not exists \(status 412\)"):
            patroni.switchover(leader, "nobody", 10)
        with pytest.raises(OperationRefused, match=r"leader name does not match .*look again"):
            patroni.switchover(candidate, leader, 10)
        with pytest.raises(OperationRefused, match=r"source are the same \(status 400\)"):
            patroni.switchover(leader, leader, 10)
        with pytest.raises(OperationRefused, match=rf"{leader} leads the cluster shop and runs"):
            patroni.failover(candidate, 10)

        assert cluster.leader() == leader

    def test_without_the_password_it_is_refused(self, cluster: PatroniCluster) -> None:
        """By Patroni; reading needs none."""
        patroni = Patroni(RestApi(cluster.endpoints))
        leader = patroni.cluster().leader
        assert leader is not None
        with pytest.raises(OperationRefused, match=r"\(status 401\); give user and password"):
            patroni.switchover(leader.name, other_than(cluster, leader.name), 10)

    def test_writes_go_on_after_it(
        self, cluster: PatroniCluster, patroni: Patroni, router: Router
    ) -> None:
        """The topology follows, and no acknowledged write is lost."""
        before = patroni.cluster()
        leader = before.leader
        assert leader is not None
        candidate = other_than(cluster, leader.name)
        with router.sessionmaker()() as session:
            session.execute(text("CREATE TABLE IF NOT EXISTS note (id bigint PRIMARY KEY)"))
            session.commit()
        with writing(router) as writes:
            until(lambda: len(writes.done) > 20)
            outcome = patroni.switchover(leader.name, candidate, 30)
            count = len(writes.done)
            until(lambda: len(writes.done) > count + 20)

        assert (outcome.former, outcome.leader) == (leader.name, candidate)
        assert outcome.timeline == leader.timeline + 1
        primary = router.monitor.health.primary("s0")
        assert primary is not None
        assert primary.node == f"s0-{candidate}"
        with router.sessionmaker(consistency="strong")() as session:
            stored = set(session.scalars(text("SELECT id FROM note")))
        assert stored >= set(writes.done)
        assert set(writes.errors) <= EXPECTED
        cluster.wait_settled()

    def test_a_paused_cluster_switches_over_on_demand(
        self, cluster: PatroniCluster, patroni: Patroni
    ) -> None:
        """``patronictl pause`` is for what Patroni does by itself."""
        cluster.patch({"pause": True})
        try:
            until(lambda: patroni.cluster().is_paused)
            leader = patroni.cluster().leader
            assert leader is not None
            candidate = other_than(cluster, leader.name)
            assert patroni.switchover(leader.name, candidate, 30).leader == candidate
        finally:
            cluster.patch({"pause": None})
        cluster.wait_settled()
        assert not patroni.cluster().is_paused


# Promotion


def operated(cluster: PatroniCluster) -> Settings:
    """Return the configuration with Patroni's superuser as the operator."""
    table = {"user": "postgres", "password": cluster.password}
    document = {**config(cluster), "operator": table}
    document["patroni"] = {**document["patroni"], "user": AUTH[0], "password": AUTH[1]}
    return load(document)


def beside_patroni(cluster: PatroniCluster) -> Settings:
    """Return a configuration that does not know of Patroni."""
    urls = [
        f"postgresql://{cluster.user}:{cluster.password}@127.0.0.1:{node.port}/{cluster.database}"
        f"?name=s0-{node.name}"
        for node in cluster.nodes
    ]
    return load(
        {
            "operator": {"user": "postgres", "password": cluster.password},
            "keyspaces": {"shop": {"shards": [{"name": "s0", "nodes": urls}]}},
        }
    )


@pytest.fixture
def catalog(cluster: PatroniCluster, router: Router) -> Router:
    """Give the router of a shard with a table and a catalog."""
    cluster.wait_settled()
    with router.sessionmaker()() as session:
        session.execute(text("CREATE TABLE IF NOT EXISTS note (id bigint PRIMARY KEY)"))
        session.commit()
    router.install_catalog()
    return router


def test_a_promotion_around_patroni_s_own_fails_no_request(
    cluster: PatroniCluster, catalog: Router
) -> None:
    """Without the hold plain sessions meet errors here; with it they wait."""
    settings = operated(cluster)
    with writing(catalog) as writes:
        until(lambda: len(writes.done) > 20)
        before = commands.plan_promotion(settings, "s0", Wishes())
        report = commands.promote(settings, "s0", Wishes())
        until(lambda: len(writes.done) > 40)

    assert not before.refusals
    assert writes.errors == {}
    assert report.outcome == "done", report.waiting
    assert report.change.former == before.change.former
    assert catalog.health().primary("s0").node == report.change.candidate  # type: ignore[union-attr]
    found = resuming.list_operations(settings)["operations"][0]
    assert (found["kind"], found["state"]) == ("patroni switchover", "done")
    with psycopg.connect(**cluster.conninfo(report.change.candidate.removeprefix("s0-"))) as c:
        stored = {row[0] for row in c.execute("SELECT id FROM note")}
    assert set(writes.done) <= stored


def test_what_patroni_refuses_lets_the_routers_go_on(
    cluster: PatroniCluster, catalog: Router
) -> None:
    """The candidate's agent dies between the plan and the switchover."""
    settings = operated(cluster)
    lost: list[str] = []

    def lose(plan: Plan) -> None:
        lost.append(plan.change.candidate.removeprefix("s0-"))
        cluster.kill_agent(lost[0])

    try:
        with pytest.raises(OperationRefused, match="Patroni refuses the switchover"):
            commands.promote(settings, "s0", Wishes(), agree=lose)
        with catalog.sessionmaker(deadline=5.0)() as session:
            session.execute(text("INSERT INTO note VALUES (-1)"))
            session.commit()
        assert resuming.list_operations(settings)["operations"][0]["state"] == "aborted"
    finally:
        cluster.start_node(lost[0])
        cluster.wait_settled()


def test_servers_of_patroni_are_not_promoted_in_sql(
    cluster: PatroniCluster, catalog: Router
) -> None:
    """Patroni would undo it."""
    plan = commands.plan_promotion(beside_patroni(cluster), "s0", Wishes())

    assert any("is run by another engine" in text and "Patroni" in text for text in plan.refusals)
    with pytest.raises(OperationRefused, match="Patroni"):
        commands.promote(beside_patroni(cluster), "s0", Wishes())


def test_what_is_patroni_s_is_left_to_it(cluster: PatroniCluster) -> None:
    """Failing over, adding, removing, bringing back."""
    settings = operated(cluster)
    new = Place("s0-new", "127.0.0.1", 1)

    for verb in (
        lambda: commands.failover(settings, "s0", Wishes()),
        lambda: commands.plan_failover(settings, "s0", Wishes()),
        lambda: commands.add_replica(settings, "s0", new),
        lambda: commands.remove_replica(settings, "s0-pg1"),
        lambda: commands.rejoin(settings, "s0-pg1"),
    ):
        with pytest.raises(OperationRefused, match="Patroni runs shard s0 and"):
            verb()
