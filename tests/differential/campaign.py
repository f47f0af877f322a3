"""Run random queries on shards and on one PostgreSQL: each answer is equal, or refused.

A run is known by its seed: the same seed makes the same worlds, rows and queries.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import exc, orm

from sqlroute import CrossShardRefused, Router
from sqlroute.local.topology import LocalTopology

from .queries import Grammar, Query
from .worlds import World, world

QUERIES_PER_ROWS = 25
ROWS_PER_WORLD = 6
BUCKETS = 8
OPTIONS = "-ctimezone=America/New_York"  # no blank: an URL would make a plus of it


@dataclass
class Report:
    """What a run has found.

    Attributes:
        refused: refusals by their clause and reason.
        failed: queries that both sides gave an error for.
        different: evidence.
    """

    seed: int
    compared: int = 0
    scattered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    different: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.asked.values())

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        refused = sum(self.refused.values())
        yield f"seed {self.seed}: {self.total} queries, {self.compared} answered alike"
        yield f"  {self.scattered} of these on several shards; {self.failed} errors on both sides"
        yield f"  refused: {refused} ({100 * refused / max(1, self.total):.1f} %)"
        yield from (f"    {count:6} {clause}" for clause, count in self.refused.most_common())
        yield "  asked: " + ", ".join(f"{n} {what}" for what, n in self.asked.most_common())
        yield f"  different: {len(self.different)}"
        yield from self.different[:5]


def run(
    servers: LocalTopology, count: int, seed: int, progress: Callable[[int], None] = lambda _: None
) -> Report:
    """Compare ``count`` random queries, on 1 to 4 shards.

    Args:
        servers: four, each a shard without replicas; the first also has the judge's database.
    """
    report = Report(seed)
    random = Random(seed)
    number = 0
    with ExitStack() as stack:
        judge = stack.enter_context(_judge(servers))
        routers: dict[int, Router] = {}
        while report.total < count:
            shards = random.choices((1, 2, 3, 4), (1, 3, 2, 4))[0]
            if shards not in routers:
                routers[shards] = stack.enter_context(_router(servers, shards))
            number += 1
            _world(report, Random(random.random()), number, routers[shards], judge, count)
            progress(report.total)
    return report


def _world(
    report: Report, random: Random, number: int, router: Router, judge: sa.Engine, count: int
) -> None:
    made = world(random, number)
    made.metadata.create_all(judge)
    router.create_all(made.metadata)
    for _ in range(ROWS_PER_WORLD):
        rows = made.rows(random)
        with router.sessionmaker()() as session, orm.Session(judge) as plain:
            for side in (session, plain):
                _store(side, made, rows)
                side.commit()
            grammar = Grammar(made, random)
            for _ in range(QUERIES_PER_ROWS):
                if report.total < count:
                    _compare(report, grammar.query(), session, plain)


def _store(session: Any, made: World, rows: dict[str, list[dict[str, Any]]]) -> None:
    shards = session.router.topology.default.shard_names if hasattr(session, "router") else [None]
    for role, table in (("item", made.item), ("own", made.own), ("kind", made.kind)):
        for shard in shards if role != "kind" else [None]:
            options = {} if shard is None else {"sqlroute_shard": shard}
            session.execute(sa.delete(table), execution_options=options)
        if rows[role]:
            session.execute(sa.insert(table), rows[role])


def _compare(report: Report, query: Query, session: Any, plain: Any) -> None:
    report.asked[query.what] += 1
    expected = _answer(plain, query)
    try:
        found = _answer(session, query)
    except CrossShardRefused as refused:
        report.refused[_reason(refused)] += 1
        session.rollback()
        return
    if isinstance(expected, str) and isinstance(found, str):
        report.failed += 1
    elif found != expected:
        report.different.append(_evidence(report, query, session, found, expected))
    else:
        report.compared += 1
        report.scattered += session.explain(query.statement).tier.value == "scatter"


def _reason(refused: CrossShardRefused) -> str:
    """Return why, without what: the message tells the expression before its last colon."""
    why = re.sub(r".+ it needs", "it needs", str(refused).rpartition(": ")[2])
    return f"{refused.clause}: {re.sub(r'[a-z]+[0-9]+[.a-z0-9_]*', '...', why).partition(';')[0]}"


def _answer(session: Any, query: Query) -> Any:
    """Return names and rows, or the SQLSTATE of an error."""
    try:
        result = session.execute(query.statement)
        names, rows = list(result.keys()), result.all()
    except exc.DBAPIError as error:
        session.rollback()
        return str(getattr(error.orig, "sqlstate", error))
    shown = [tuple(how(value) for how, value in zip(query.hows, row, strict=True)) for row in rows]
    return names, shown if query.is_total else Counter(shown)


def _evidence(report: Report, query: Query, session: Any, found: Any, expected: Any) -> str:
    statement = query.statement.compile(
        dialect=session.router.primary_engine(
            session.router.topology.default.shard_names[0]
        ).dialect
    )
    return (
        f"seed {report.seed}, query {report.total} ({query.what}):\n{statement}\n"
        f"{statement.params}\n{session.explain(query.statement)}\n"
        f"found:    {found}\nexpected: {expected}\n"
    )


@contextmanager
def _judge(servers: LocalTopology) -> Iterator[sa.Engine]:
    engine = sa.create_engine(_url(servers, 0, _database(servers, 0, "judge")))
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _router(servers: LocalTopology, shards: int) -> Iterator[Router]:
    """Make a router over the first servers, in a database of each for this number of shards."""
    nodes = [
        _url(servers, index, _database(servers, index, f"of_{shards}")) for index in range(shards)
    ]
    named = [
        {
            "name": f"s{index}",
            "nodes": [f"{url.render_as_string(hide_password=False)}&name=s{index}-a"],
        }
        for index, url in enumerate(nodes)
    ]
    with Router.from_config({"keyspaces": {"app": {"buckets": BUCKETS, "shards": named}}}) as made:
        yield made


def _database(servers: LocalTopology, index: int, name: str) -> str:
    with psycopg.connect(**servers.nodes[index].conninfo, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}".encode())
        connection.execute(f"CREATE DATABASE {name}".encode())
    return name


def _url(servers: LocalTopology, index: int, database: str) -> sa.URL:
    info = servers.nodes[index].conninfo
    return sa.URL.create(
        "postgresql+psycopg",
        username=info["user"],
        password=info["password"],
        host=info["host"],
        port=info["port"],
        database=database,
        query={"options": OPTIONS},
    )
