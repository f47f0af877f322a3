"""The servers of the figures: a filled topology, its router, and plain Sessions beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, BigInteger, String, create_engine, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import sqlroute
from sqlroute.local.node import LocalNode
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import LocalTopology, remove, up

ROWS = 1_000
PORT = 29_300


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    __table_args__ = sqlroute.sharded_by("id")
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


@dataclass(frozen=True, slots=True)
class Bench:
    """A filled topology, the router over it, and plain Sessions chosen by hand on its nodes."""

    topology: LocalTopology
    router: sqlroute.Router
    shard_of: dict[int, str]

    def plain(self, node: LocalNode) -> sessionmaker[Session]:
        return sessionmaker(create_engine(url_of(node)))

    def plain_async(self, node: LocalNode) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(create_async_engine(url_of(node)))

    def primaries(self) -> dict[str, LocalNode]:
        return {shard.name: shard.nodes[0] for shard in self.topology.shards}

    def replicas(self) -> dict[str, LocalNode]:
        return {shard.name: shard.nodes[-1] for shard in self.topology.shards}


@contextmanager
def bench(directory: Path, shards: int, replicas: int, *, durable: bool = False) -> Iterator[Bench]:
    """Start servers and fill them with accounts 0 to ROWS - 1."""
    place = directory / f"{shards}x{replicas}{'-durable' * durable}"
    spec = LocalSpec(shards=shards, replicas=replicas, port=PORT, directory=place, durable=durable)
    topology = up(spec)
    try:
        with sqlroute.Router.from_config(topology.config_path) as router:
            router.create_all(Base.metadata)
            with router.sessionmaker()() as session:
                rows = [{"id": i, "name": f"account {i}"} for i in range(ROWS)]
                session.execute(insert(Account), rows)
                session.commit()
                token = {token.shard: token.lsn for token in session.token.positions}
            _await(router, token)
            table = Base.metadata.tables["account"]
            shard_of = {i: router.locate(table, (i,))[1] for i in range(ROWS)}
            yield Bench(topology, router, shard_of)
    finally:
        remove(place)


def url_of(node: LocalNode) -> URL:
    parts = node.conninfo
    return URL.create(
        "postgresql+psycopg",
        parts["user"],
        parts["password"],
        parts["host"],
        parts["port"],
        parts["dbname"],
    )


def _await(router: sqlroute.Router, lsns: dict[str, int]) -> None:
    """Wait until every replica has replayed the rows: a read must find them wherever it goes."""
    deadline = time.monotonic() + 30
    for shard, lsn in lsns.items():
        while any(node.lsn < lsn for node in router.health().replicas(shard)):
            router.monitor.ask(shard, 1.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"replicas of {shard} did not catch up")
