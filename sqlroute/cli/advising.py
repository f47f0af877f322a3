"""Advise on sharding: which statements of an application stay on one shard, under which key.

The statements come from a file, or from ``pg_stat_statements`` of the servers: what it has counted,
or what it counts from now on. Nothing of them is run. Tables, sizes and unique keys are read from
the catalog of the database, sharded or not.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import exc as sa_exc

from sqlroute.cli.cluster import tables_of
from sqlroute.errors import CatalogError, PlanError
from sqlroute.router import Router
from sqlroute.routing.advice import Judged, Reach, Shape, Verdict, advise, judge_shape
from sqlroute.routing.sqltext import statements
from sqlroute.routing.sqltree import Role, Tables

BEST = 5
"""How many schemes are shown."""

_SIZES = """
SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END,
       coalesce((SELECT sum(pg_total_relation_size(t.relid)) FROM pg_partition_tree(c.oid) t),
                pg_total_relation_size(c.oid))
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
   AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
"""
_UNIQUE = """
SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END,
       i.indisprimary, array_agg(a.attname::text)
  FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey)
 WHERE i.indisunique AND NOT c.relispartition
   AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
 GROUP BY i.indexrelid, n.nspname, c.relname, c.oid, i.indisprimary
"""
_COUNTED = """
SELECT query, sum(calls)::bigint
  FROM pg_stat_statements
 WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
 GROUP BY query
"""


def advise_file(router: Router, path: Path) -> dict[str, Any]:
    """Advise on the statements in a file.

    Args:
        path: statements parted by ``;``, or one in each line; or CSV with a column ``query``, and
            ``calls`` if it was counted, as of ``pg_stat_statements``.

    Raises:
        PlanError: it is neither.
    """
    return _advice(router, read_statements(path))


def advise_counted(
    router: Router, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Advise on what ``pg_stat_statements`` has counted on the primaries.

    Args:
        seconds: only what runs within so many seconds from now on; 0 for all so far.

    Raises:
        CatalogError: a server has no ``pg_stat_statements``.
    """
    if seconds <= 0:
        return _advice(router, _counted(router))
    before = _counted(router)
    sleep(seconds)
    return _advice(router, _counted(router) - before)


def read_statements(path: Path) -> Counter[str]:
    """Return the statements in a file and how often each ran, see :func:`advise_file`.

    Raises:
        PlanError: nobody can read it.
    """
    text = path.read_text()
    if path.suffix.lower() != ".csv":
        return Counter(_normal(statement) for statement in statements(text))
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text))
    if "query" not in (rows.fieldnames or ()):
        raise PlanError(
            f"{path} has no column 'query'; it must have a header, and is what "
            f"`COPY (TABLE pg_stat_statements) TO STDOUT (FORMAT csv, HEADER)` gives"
        )
    found: Counter[str] = Counter()
    for row in rows:
        found[row["query"]] += int(row.get("calls") or 1)
    return found


def _normal(sql: str) -> str:
    """Return a statement with ``$n`` for its constants, so that equal shapes are counted as one."""
    import pgparse

    try:
        return str(pgparse.normalize(sql))
    except pgparse.PGQueryError:
        return sql


def _counted(router: Router) -> Counter[str]:
    found: Counter[str] = Counter()
    for shard in router.topology.keyspace_of_shard:
        try:
            rows = _read(router, shard, _COUNTED)
        except sa_exc.DBAPIError as error:
            raise CatalogError(
                f"pg_stat_statements of shard {shard} cannot be read: "
                f"{str(error.orig).splitlines()[0]}; add it to shared_preload_libraries, restart "
                "the server and CREATE EXTENSION pg_stat_statements, or give a FILE of statements"
            ) from error
        found.update({str(sql): int(calls) for sql, calls in rows})
    return found


def _read(router: Router, shard: str, sql: str) -> list[Any]:
    with router.primary_engine(shard).connect() as connection:
        return list(connection.exec_driver_sql(sql))


def _advice(router: Router, counted: Mapping[str, int]) -> dict[str, Any]:
    """Return the document: what the statements do now, and under which key they would do better."""
    router.health()
    tables = tables_of(router)
    shapes = tuple(Shape(sql, calls) for sql, calls in counted.items() if calls > 0)
    functions = router.planner.functions
    sizes: Counter[str] = Counter()
    for shard in router.topology.keyspace_of_shard:
        sizes.update({name: int(size) for name, size in _read(router, shard, _SIZES)})
    first = next(iter(router.topology.keyspace_of_shard))
    uniques = _read(router, first, _UNIQUE)
    now = None
    if router.is_sharded:
        judged = [judge_shape(shape, tables, router.topology, functions) for shape in shapes]
        now = _tally(judged) | {"statements": _listed(judged)}
    verdicts = advise(shapes, tables, sizes, functions)
    best = _listed(verdicts[0].judged) if verdicts else []
    return {
        "statements": len(shapes),
        "calls": sum(shape.calls for shape in shapes),
        "tables": len({t.name for t in tables.values() if t.role is not Role.UNKNOWN}),
        "now": now,
        "schemes": [_scheme(verdict, uniques, tables) for verdict in verdicts[:BEST]],
        "best": best,
    }


def _tally(judged: Iterable[Judged]) -> dict[str, Any]:
    calls: Counter[Reach] = Counter()
    for one in judged:
        calls[one.reach] += one.shape.calls
    return {"calls": {reach.value: calls[reach] for reach in Reach}}


def _listed(judged: Iterable[Judged]) -> list[dict[str, Any]]:
    """Return the statements, those that go furthest and run most often first."""
    order = (Reach.REFUSED, Reach.COORDINATOR, Reach.MANY, Reach.ONE)
    kept = [one for one in judged if one.reach in order]
    kept.sort(key=lambda one: (order.index(one.reach), -one.shape.calls))
    return [
        {
            "sql": " ".join(one.shape.sql.split()),
            "calls": one.shape.calls,
            "reach": one.reach.value,
            "why": one.why,
        }
        for one in kept
    ]


def _scheme(verdict: Verdict, uniques: Iterable[Any], tables: Tables) -> dict[str, Any]:
    keys = verdict.scheme.keys
    needs = []
    for table, is_primary, columns in uniques:
        key = keys.get(table)
        if key is not None and key not in columns and tables[table].role is not Role.UNKNOWN:
            what = "primary key" if is_primary else "unique index"
            needs.append(f"the {what} ({', '.join(columns)}) of {table} must contain {key}")
    return {
        "key": dict(keys),
        "score": round(verdict.score, 3),
        "on_one_shard": round(verdict.share, 3),
        "data_spread": round(verdict.spread, 3),
        **_tally(verdict.judged),
        "needs": needs,
    }
