"""Tokens over a failover: what was kept is read, what was lost is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until

from sqlroute import LostTimeline, Router
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(180)]

METADATA = sa.MetaData()
note = sa.Table("note", METADATA, sa.Column("id", sa.Integer, primary_key=True))


@pytest.fixture
def servers(
    sqlroute_topology_factory: Callable[..., LocalTopology], has_catalog: bool
) -> LocalTopology:
    label = f"failover, catalog {has_catalog}"
    return sqlroute_topology_factory(shards=1, replicas=2, label=label)


@pytest.mark.parametrize("has_catalog", [True, False])
def test_a_lost_write_is_told_and_a_kept_one_is_read(
    servers: LocalTopology, has_catalog: bool
) -> None:
    """One write is replayed before the failover, the next is not: a typed error for that one."""
    primary, heir, other = servers.nodes
    with Router.from_config(servers.config_path) as router:
        if has_catalog:
            router.create_all(METADATA)
        else:  # the owner of the servers may read their files
            METADATA.create_all(router.primary_engine("s0"))
        session_of = router.sessionmaker
        with session_of()() as session:
            session.execute(sa.insert(note), {"id": 1})
            session.commit()
            kept = session.token
        for node in (heir, other):
            until(lambda n=node: sql(n, "SELECT to_regclass('note')"))  # the table is there, too
            until(lambda n=node: sql(n, "SELECT count(*) FROM note") == 1)
            sql(node, "ALTER SYSTEM SET primary_conninfo = ''")
            sql(node, "SELECT pg_reload_conf()")
            until(lambda n=node: sql(n, "SELECT count(*) FROM pg_stat_wal_receiver") == 0)
        with session_of()() as session:
            session.execute(sa.insert(note), {"id": 2})
            session.commit()
            lost = session.token
        primary.kill()
        sql(heir, "SELECT pg_promote()")
        until(lambda: is_primary(router, heir.name))
        sql(heir, "CHECKPOINT")

        count = sa.select(sa.func.count()).select_from(note)
        with session_of(token=kept)() as session:
            assert session.scalar(count) == 1
        with session_of(token=str(lost))() as session:
            for statement in (count, sa.insert(note).values(id=3)):
                with pytest.raises(LostTimeline, match=r"left at .* by a failover") as caught:
                    session.execute(statement)
                assert (caught.value.shard, caught.value.timeline) == ("s0", 1)
                assert caught.value.fork < lost.positions[0].lsn
            session.rollback()
        with session_of(consistency="eventual")() as session:
            assert session.scalar(count) == 1
        with session_of()() as session:
            session.execute(sa.insert(note), {"id": 3})
            session.commit()
            assert session.token.positions[0].timeline == 2
            assert session.scalar(count) == 2

    with Router.from_config(servers.config_path) as anew:  # one that has seen no failover
        with anew.sessionmaker(token=lost)() as session, pytest.raises(LostTimeline):
            session.scalar(count)
        with anew.sessionmaker(token=kept)() as session:
            assert session.scalar(count) == 2

    if not has_catalog:
        return
    poor = Router.from_config(stripped(servers))  # may not read files of the server
    with poor, poor.sessionmaker(token=lost)() as session, pytest.raises(LostTimeline):
        session.scalar(count)


def stripped(servers: LocalTopology) -> dict[str, Any]:
    """Return the configuration with a role that owns nothing, for which the catalog reads."""
    heir = servers.nodes[1]
    sql(heir, "CREATE ROLE clerk LOGIN PASSWORD 'x'")
    sql(
        heir,
        "GRANT USAGE ON SCHEMA sqlroute TO clerk; GRANT SELECT ON sqlroute.keyspace, note TO clerk",
    )
    nodes = [
        f"postgresql://clerk:x@{n.conninfo['host']}:{n.port}/{n.conninfo['dbname']}"
        for n in servers.nodes
    ]
    return {"keyspaces": {"app": {"buckets": 16, "shards": [{"name": "s0", "nodes": nodes}]}}}


def is_primary(router: Router, name: str) -> bool:
    found = router.monitor.ask("s0", 1.0).primary("s0")
    return found is not None and found.node == name


def sql(node: Any, statement: str) -> Any:
    with psycopg.connect(**node.conninfo, autocommit=True) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None
