"""The tables on all shards of a router: the catalog, and those of a metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.sql.schema import MetaData, Table

from sqlroute.catalog import ddl, maps
from sqlroute.catalog import install as catalog
from sqlroute.routing.declare import declaration
from sqlroute.topology import Keyspace, ShardMap

if TYPE_CHECKING:
    from sqlroute.router import Router


def install(router: Router) -> dict[str, ShardMap]:
    """Create or upgrade the catalog on every shard. See ``Router.install_catalog``."""
    for keyspace in router.topology.keyspaces:
        engines = {shard.name: router.primary_engine(shard.name) for shard in keyspace.shards}
        for shard, engine in engines.items():
            with engine.begin() as connection:
                catalog.upgrade(connection)
                node = router.engines(is_async=False).node_of(engine)
                catalog.register(connection, shard, node or "")
        nodes = [node for shard in keyspace.shards for node in shard.nodes]
        found = maps.read_newest(keyspace, nodes, router.policy.connect_timeout)
        found = found or ShardMap.even(keyspace)
        for engine in engines.values():
            with engine.begin() as connection:
                maps.write(found, connection)
        for shard in engines:
            router.monitor.ask(shard, router.policy.probe_deadline)
        router.read_map(keyspace)
    return {
        keyspace.name: router.shard_map(keyspace.name) for keyspace in router.topology.keyspaces
    }


def create_all(router: Router, metadata: MetaData) -> None:
    """Create the catalog and what is missing of the tables. See ``Router.create_all``."""
    ddl.check(metadata)
    found = install(router)
    for keyspace in router.topology.keyspaces:
        tables = _tables_of(router, keyspace, metadata)
        for shard in keyspace.shards:
            owned = found[keyspace.name].buckets_of(shard.name)
            with router.primary_engine(shard.name).begin() as connection:
                ddl.create(metadata, tables, owned, keyspace.buckets, connection)


def drop_all(router: Router, metadata: MetaData) -> None:
    """Drop the tables of a metadata on every shard."""
    for keyspace in router.topology.keyspaces:
        tables = _tables_of(router, keyspace, metadata)
        for shard in keyspace.shards:
            with router.primary_engine(shard.name).begin() as connection:
                metadata.drop_all(connection, tables=tables)


def _tables_of(router: Router, keyspace: Keyspace, metadata: MetaData) -> list[Table]:
    """Return the tables of a keyspace, those that others refer to first."""
    return [t for t in metadata.sorted_tables if _keyspace_of(router, t) is keyspace]


def _keyspace_of(router: Router, table: Table) -> Keyspace:
    declared = declaration(table)
    name = declared.keyspace if declared is not None else None
    return router.topology.keyspace(name) if name else router.topology.default
