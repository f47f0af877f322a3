"""The figures. Each starts what it needs, measures against the plain alternative, stops it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, String, create_engine, func, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import sqlroute
from sqlroute.local.node import LocalNode
from sqlroute.local.spec import LocalSpec
from sqlroute.local.topology import LocalTopology, down, remove, up
from sqlroute.routing.hashing import KeyKind, bucket_of
from tests.benchmarks.pairs import Figure, compare

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
        info = node.conninfo
        url = (
            f"postgresql+psycopg://{info['user']}:{info['password']}@{info['host']}:{info['port']}"
            f"/{info['dbname']}"
        )
        return sessionmaker(create_engine(url))

    def primaries(self) -> dict[str, LocalNode]:
        return {shard.name: shard.nodes[0] for shard in self.topology.shards}

    def replicas(self) -> dict[str, LocalNode]:
        return {shard.name: shard.nodes[-1] for shard in self.topology.shards}


@contextmanager
def bench(directory: Path, shards: int, replicas: int) -> Iterator[Bench]:
    """Start servers and fill them with accounts 0 to ROWS - 1."""
    place = directory / f"{shards}x{replicas}"
    spec = LocalSpec(shards=shards, replicas=replicas, port=PORT, directory=place, durable=False)
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
        down(place)
        remove(place)


def _await(router: sqlroute.Router, lsns: dict[str, int]) -> None:
    """Wait until every replica has replayed the rows: a read must find them wherever it goes."""
    deadline = time.monotonic() + 30
    for shard, lsn in lsns.items():
        while any(node.lsn < lsn for node in router.health().replicas(shard)):
            router.monitor.ask(shard, 1.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"replicas of {shard} did not catch up")


def _by_key(number: int) -> Any:
    return select(Account.name).where(Account.id == number % ROWS)


def routed_read(directory: Path) -> Figure:
    """One keyed replica read per session, against a plain Session on that replica."""
    with bench(directory, 2, 1) as b:
        routed = b.router.sessionmaker()
        plain = {shard: b.plain(node) for shard, node in b.replicas().items()}

        def by_router(i: int) -> None:
            with routed() as session:
                assert session.scalar(_by_key(i)) is not None

        def by_hand(i: int) -> None:
            with plain[b.shard_of[i % ROWS]]() as session:
                assert session.scalar(_by_key(i)) is not None

        return compare("routed_read", 0.75, by_router, by_hand)


def keyed_in_transaction(directory: Path) -> Figure:
    """A keyed read in an open transaction, against plain Sessions chosen by hand.

    By hand means by the same hash: an application knows the key, not the shard.
    """
    with bench(directory, 2, 0) as b:
        plain = {shard: b.plain(node)() for shard, node in b.primaries().items()}
        owners, kinds = b.router.shard_map().owners, (KeyKind.INTEGER,)
        with b.router.sessionmaker()() as session:
            session.begin()

            def by_router(i: int) -> None:
                assert session.scalar(_by_key(i)) is not None

            def by_hand(i: int) -> None:
                shard = owners[bucket_of((i % ROWS,), kinds, len(owners))]
                assert plain[shard].scalar(_by_key(i)) is not None

            try:
                return compare("keyed_in_transaction", 1.10, by_router, by_hand)
            finally:
                for one in plain.values():
                    one.close()


def scatter(directory: Path) -> Figure:
    """A statement of 20 ms on 4 shards at once, against the slowest of them alone."""
    with bench(directory, 4, 0) as b:
        nap = select(func.pg_sleep(0.02)).scalar_subquery()  # evaluated once a statement
        slow = select(func.count()).select_from(Account).where(nap.is_not(None))
        routed = b.router.sessionmaker()
        plain = {shard: b.plain(node) for shard, node in b.primaries().items()}

        def by_router(_: int) -> None:
            with routed() as session:
                assert session.scalar(slow) == ROWS

        def timed(maker: sessionmaker[Session]) -> float:
            start = time.perf_counter()
            with maker() as session:
                session.scalar(slow)
            return time.perf_counter() - start

        medians = {
            shard: sorted(timed(maker) for _ in range(21))[10] for shard, maker in plain.items()
        }
        slowest = plain[max(medians, key=lambda shard: medians[shard])]

        return compare("scatter", 1.30, by_router, lambda _: timed(slowest), rounds=10, calls=15)


def importing(directory: Path) -> Figure:
    """Importing what an application uses, beside sqlalchemy.orm: at most 60 ms more.

    The ratio is of that limit. Byte code is on disk, as it is after an installation.
    """
    del directory
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    used = "from sqlroute import Router, RoutingAsyncSession, RoutingSession, sharded_by"

    def spent(code: str) -> float:
        program = f"import time; s = time.perf_counter(); {code}; print(time.perf_counter() - s)"
        found = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return float(found.stdout)

    spent(f"import sqlalchemy.orm; {used}")
    pairs = [
        (spent(f"import sqlalchemy.orm; {used}"), spent("import sqlalchemy.orm")) for _ in range(21)
    ]
    extra = sorted(with_it - without for with_it, without in pairs)
    middle, low, high = extra[10], extra[5], extra[15]
    return Figure("import", middle / 0.060, 1.0, middle * 1e6, 60_000, (low / 0.06, high / 0.06))


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "routed_read": routed_read,
    "keyed_in_transaction": keyed_in_transaction,
    "scatter": scatter,
    "import": importing,
}
