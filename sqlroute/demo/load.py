"""Load the demo's data: sharded tables by COPY, each row to its shard, and all rows to the judge.

The judge is a database beside the first shard's, on the same server: plain tables with all the
rows, so that an answer over two shards can be compared with one server's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from sqlalchemy import create_engine, func, select
from sqlalchemy.engine import URL, Engine

from sqlroute.demo.dataset import COUNTS, Value, rows
from sqlroute.demo.schema import Airline, Airport, Base, Flight, Plane
from sqlroute.local.node import LocalNode
from sqlroute.router import Router
from sqlroute.routing.hashing import KeyKind, buckets_of
from sqlroute.topology import ShardMap

JUDGE = "judge"

Row: TypeAlias = Mapping[str, Value]
Data: TypeAlias = Mapping[str, Sequence[Row]]


def load(router: Router, node: LocalNode) -> Engine:
    """Create the tables and load all data, here and in the judge.

    Args:
        node: the server that the judge lives on.

    Returns:
        an engine of the judge.
    """
    router.create_all(Base.metadata)
    engine = judge_engine(node)
    data: Data = {name: list(rows(name)) for name in COUNTS}
    shard_map = router.shard_map()
    with ThreadPoolExecutor(2) as pool:
        judged = pool.submit(_load_judge, engine, data)
        for model in (Plane, Flight):
            _load_sharded(router, model.__tablename__, data[model.__tablename__], shard_map)
        with router.sessionmaker()() as session:
            for reference in (Airline, Airport):
                session.add_all(reference(**row) for row in data[reference.__tablename__])
            session.commit()
        judged.result()
    for shard in shard_map.shards:
        _analyze(router.primary_engine(shard))
    return engine


def counts(router: Router, shards: Iterable[str]) -> dict[str, dict[str, int]]:
    """Ask each shard's primary how many rows of each table it holds."""
    found: dict[str, dict[str, int]] = {}
    for shard in shards:
        with router.primary_engine(shard).connect() as connection:
            found[shard] = {
                table.name: connection.scalar(select(func.count()).select_from(table)) or 0
                for table in Base.metadata.sorted_tables
            }
    return found


def judge_engine(node: LocalNode) -> Engine:
    """Create the judge's database and tables, and return its engine."""
    import psycopg

    info = node.conninfo
    with psycopg.connect(**{**info, "dbname": "postgres"}, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {JUDGE}")
    engine = create_engine(
        URL.create(
            "postgresql+psycopg",
            username=info["user"],
            password=info["password"],
            host=info["host"],
            port=info["port"],
            database=JUDGE,
        )
    )
    Base.metadata.create_all(engine)  # the declarations change nothing on a plain server
    return engine


def _load_sharded(router: Router, table: str, data: Sequence[Row], shard_map: ShardMap) -> None:
    keys = [row["tailnum"] for row in data]
    per_shard: dict[str, list[Row]] = {}
    for row, bucket in zip(
        data, buckets_of(keys, KeyKind.TEXT, len(shard_map.owners)), strict=True
    ):
        per_shard.setdefault(shard_map.owner(bucket), []).append(row)
    with ThreadPoolExecutor(len(per_shard)) as pool:
        list(
            pool.map(
                lambda shard: _copy(router.primary_engine(shard), {table: per_shard[shard]}),
                per_shard,
            )
        )


def _load_judge(engine: Engine, data: Data) -> None:
    _copy(engine, data)
    _analyze(engine)


def _copy(engine: Engine, data: Data) -> None:
    with engine.begin() as connection:
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor:
            for table, found in data.items():
                columns = ", ".join(found[0])
                with cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy:
                    for row in found:
                        copy.write_row(tuple(row.values()))


def _analyze(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
