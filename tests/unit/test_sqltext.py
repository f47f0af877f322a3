"""SQL text is described as the same statement of SQLAlchemy is: kinds, keys, buckets, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import pytest
from sqlalchemy import BigInteger, Column, MetaData, Table, Text, select

import sqlroute
from sqlroute.cli.explaining import described_text
from sqlroute.errors import CrossShardRefused, MissingShardKey, PlanError, UnknownName
from sqlroute.health import Health, Observation, observe
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.hashing import KeyKind, bucket_of
from sqlroute.routing.plan import Plan, Tier
from sqlroute.routing.planner import plan, plan_rows
from sqlroute.routing.policy import Policy
from sqlroute.routing.sqltext import Role, TableInfo, TextStatement, describe_text
from sqlroute.routing.statement import Kind, Placement, describe
from sqlroute.routing.target import Situation
from sqlroute.topology import Keyspace, Node, Shard, ShardMap, Topology

NUMBER, TEXT, UUID = KeyKind.INTEGER, KeyKind.TEXT, KeyKind.UUID
ONE = "00000000-0000-0000-0000-000000000001"

_TABLES = (
    TableInfo("flights", Role.SHARDED, {"id": NUMBER, "tailnum": TEXT, "dest": TEXT}, ("tailnum",)),
    TableInfo("planes", Role.SHARDED, {"tailnum": TEXT, "year": NUMBER}, ("tailnum",)),
    TableInfo("orders", Role.SHARDED, {"customer": NUMBER, "total": None}, ("customer",)),
    TableInfo("pairs", Role.SHARDED, {"a": NUMBER, "b": UUID, "x": None}, ("a", "b")),
    TableInfo("airlines", Role.REFERENCE, {"carrier": TEXT, "name": TEXT}),
    TableInfo("busy", Role.UNKNOWN, why="a view"),
)
TABLES = {info.name: info for info in _TABLES}
TOPOLOGY = Topology(
    (Keyspace("shop", tuple(Shard(f"s{i}", (Node(f"s{i}-a"),)) for i in range(4))),)
)
SHARD_MAP = ShardMap.even(TOPOLOGY.default)


NONE: Mapping[str, Any] = MappingProxyType({})


def described(sql: str) -> TextStatement:
    return describe_text(sql, TABLES, TOPOLOGY)


def buckets(sql: str, parameters: Mapping[str, Any] = NONE) -> list[Any]:
    """Return for each use of a sharded table its buckets, ``None`` for all."""
    text = described_text(described(sql), parameters)
    found = []
    for use in text.shape.statement.occurrences:
        one = use.recipe.buckets(text.value, use.key.kinds, 64)
        found.append((use.table, None if one is None else set(one)))
    return found


def planned(sql: str, parameters: Mapping[str, Any] = NONE) -> Plan:
    text = described_text(described(sql), parameters)
    health = Health.initial(TOPOLOGY)
    for node in TOPOLOGY.nodes():
        seen = Observation(node.name, 1.0, is_primary=True, timeline=1, lsn=1, accepts_writes=True)
        health = observe(health, seen, 1.0)
    situation = Situation(TOPOLOGY, Policy(), health, {"shop": SHARD_MAP}, Affinity(), {})
    if text.shape.statement.row_keys is not None:
        return plan_rows(text, text.rows(), situation, Random(1))
    return plan(text, situation, Random(1))


def tail(*names: str) -> set[int]:
    return {bucket_of((name,), (TEXT,), 64) for name in names}


# Reading and writing


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT lower(tailnum), count(*) FROM flights GROUP BY 1", Kind.READ),
        ("SELECT current_date, extract(year FROM now()), CASE WHEN true THEN 1 END", Kind.READ),
        ("TABLE airlines", Kind.READ),
        ("SELECT * FROM flights FOR UPDATE", Kind.WRITE),
        ("SELECT * FROM (SELECT * FROM flights FOR SHARE) x", Kind.WRITE),
        ("WITH x AS (DELETE FROM airlines RETURNING *) SELECT * FROM x", Kind.WRITE),
        ("SELECT nextval('orders_id')", Kind.WRITE),
        ("SELECT * INTO copy FROM airlines", Kind.WRITE),
        ("MERGE INTO airlines USING planes ON true WHEN MATCHED THEN DELETE", Kind.WRITE),
        ("SELECT my_function(1)", Kind.UNKNOWN),
        ("SELECT other.lower('x')", Kind.UNKNOWN),
        ("SELECT pg_advisory_lock(1)", Kind.UNKNOWN),
        ("SET search_path = x", Kind.UNKNOWN),
        ("EXPLAIN SELECT 1", Kind.UNKNOWN),
        ("SELECT * FROM busy", Kind.UNKNOWN),
        ("SELECT * FROM pg_class", Kind.UNKNOWN),
    ],
)
def test_only_a_select_of_known_parts_is_a_read(sql: str, kind: Kind) -> None:
    """Locks, DML anywhere, sequences, unknown functions, views: not a read."""
    assert described(sql).statement.kind is kind


def test_reasons_name_what_was_found() -> None:
    """A reader of the plan learns which function was not known."""
    assert described("SELECT f(1)").statement.reasons == (
        "function f() is not known to be read-only",
    )


def test_a_view_says_nothing_of_where_its_rows_are() -> None:
    """What is behind a view is not guessed."""
    statement = described("SELECT * FROM busy").statement

    assert statement.placement is Placement.UNPLACED


# Keys that restrict


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        ("SELECT * FROM flights WHERE tailnum = 'N1'", {}),
        ("SELECT * FROM flights f WHERE 'N1' = f.tailnum AND dest <> 'x'", {}),
        ("SELECT * FROM flights WHERE tailnum = :t", {"t": "N1"}),
        ("SELECT * FROM flights WHERE tailnum = :t::text AND dest = ':x'", {"t": "N1"}),
        ("SELECT * FROM flights WHERE tailnum = %(t)s", {"t": "N1"}),
        ("SELECT * FROM flights WHERE tailnum = $1 -- :comment", {"1": "N1"}),
        ("SELECT * FROM flights WHERE tailnum = E'N\\061'", {}),
        ("SELECT * FROM flights WHERE tailnum IN ('N1')", {}),
        ("SELECT * FROM flights WHERE tailnum = ANY(ARRAY['N1'])", {}),
        ("SELECT * FROM flights WHERE tailnum = ANY(:t)", {"t": "{N1}"}),
        ("SELECT * FROM flights WHERE tailnum = ANY(:t)", {"t": ["N1"]}),
        ("SELECT * FROM flights WHERE tailnum IN ('N1', :t)", {"t": "N1"}),
        ("SELECT * FROM flights WHERE tailnum IS NOT DISTINCT FROM :t", {"t": "N1"}),
        ("SELECT * FROM flights WHERE tailnum IS NOT DISTINCT FROM 'N1'", {}),
        ("SELECT * FROM flights WHERE tailnum = ANY('{N1}'::text[])", {}),
        ("SELECT * FROM flights WHERE (tailnum = 'N1' AND id = 1) OR tailnum = 'N1'", {}),
        ("UPDATE flights SET dest = 'x' WHERE tailnum = 'N1'", {}),
        ("DELETE FROM flights f WHERE f.tailnum = 'N1'", {}),
        ("WITH c AS (SELECT * FROM flights WHERE tailnum = 'N1') SELECT * FROM c", {}),
        ("SELECT * FROM (SELECT * FROM flights WHERE tailnum = 'N1') x", {}),
        ("SELECT (SELECT max(id) FROM flights WHERE tailnum = 'N1')", {}),
        ("SELECT coalesce((SELECT max(id) FROM flights WHERE tailnum = 'N1'), 0)", {}),
    ],
)
def test_a_key_restricts_its_table(sql: str, parameters: dict[str, Any]) -> None:
    """Equalities with constants and parameters, however they are written, give one bucket."""
    assert buckets(sql, parameters) == [("flights", tail("N1"))]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM flights",
        "SELECT * FROM flights WHERE tailnum > 'N1'",
        "SELECT * FROM flights WHERE NOT tailnum = 'N1'",
        "SELECT * FROM flights WHERE tailnum NOT IN ('N1')",
        "SELECT * FROM flights WHERE tailnum = 'N1' OR dest = 'x'",
        "SELECT * FROM flights WHERE lower(tailnum) = 'n1'",
        "SELECT * FROM flights WHERE tailnum::varchar(1) = 'N'",
        "SELECT * FROM flights WHERE tailnum = 'N1'::varchar(1)",
        "SELECT * FROM flights WHERE tailnum = 'N1' || 'x'",
        "SELECT * FROM flights WHERE tailnum OPERATOR(mine.=) 'N1'",
        "SELECT * FROM flights WHERE tailnum LIKE 'N1'",
        "SELECT * FROM flights WHERE tailnum = ALL(ARRAY['N1', 'N2'])",
        "SELECT * FROM flights WHERE tailnum IS NOT DISTINCT FROM NULL",
        "SELECT * FROM flights WHERE tailnum IS DISTINCT FROM 'N1'",
        "SELECT * FROM flights WHERE tailnum BETWEEN 'N1' AND 'N1'",
        "SELECT * FROM flights AS f (tailnum, x, y) WHERE tailnum = 'N1'",
        "SELECT * FROM (SELECT tailnum FROM flights) x WHERE tailnum = 'N1'",
        "SELECT * FROM flights WHERE (tailnum = 'N1') IS TRUE",
        "SELECT count(*) FILTER (WHERE tailnum = 'N1') FROM flights",
        "SELECT 1 FROM flights HAVING bool_and(tailnum = 'N1')",
        "WITH RECURSIVE c AS (SELECT * FROM flights WHERE tailnum = 'N1') SELECT * FROM c",
        "WITH c AS (INSERT INTO flights (tailnum) VALUES ('N1') RETURNING *) SELECT * FROM c",
    ],
)
def test_what_does_not_prove_a_key_means_all_shards(sql: str) -> None:
    """An expression that is not understood never takes a shard away."""
    assert buckets(sql) == [("flights", None)]


@pytest.mark.parametrize(
    ("literal", "is_used"),
    [
        ("7", True),
        ("-7", True),
        ("0", True),
        ("'7'", True),
        ("7::int", True),
        ("99999999999", True),
        ("7.0", False),
        ("'7.5'", False),
        ("'0x1F'", False),
        ("7.6::bigint", False),
        ("7::text", False),
        ("true", False),
    ],
)
def test_a_constant_counts_only_as_postgresql_surely_reads_it(literal: str, is_used: bool) -> None:
    """A numeric, or a text of a form that only newer servers read, is not hashed."""
    ((_, found),) = buckets(f"SELECT * FROM orders WHERE customer = {literal}")

    assert (found is not None) is is_used


@pytest.mark.parametrize(
    "where",
    [
        "customer BETWEEN 7 AND 8",
        "customer >= 7 AND customer < 9",
        "6 < customer AND 8 >= customer",
        "customer BETWEEN :low AND :high",
    ],
)
def test_a_small_range_is_each_integer_in_it(where: str) -> None:
    values = {"low": "7", "high": 8} if ":low" in where else {}

    found = buckets(f"SELECT * FROM orders WHERE {where}", values)

    assert found == [("orders", {bucket_of((key,), (NUMBER,), 64) for key in (7, 8)})]


@pytest.mark.parametrize(
    "where",
    [
        "customer BETWEEN 7 AND 700",
        "customer NOT BETWEEN 7 AND 8",
        "customer BETWEEN SYMMETRIC 7 AND 8",
        "customer > 7",
        "customer > 7 OR customer < 9",
    ],
)
def test_any_other_range_means_all_shards(where: str) -> None:
    assert buckets(f"SELECT * FROM orders WHERE {where}") == [("orders", None)]


def test_zero_is_a_value() -> None:
    """The parse tree leaves 0 out; the key is 0 all the same."""
    found = buckets("SELECT * FROM orders WHERE customer = 0")

    assert found == [("orders", {bucket_of((0,), (NUMBER,), 64)})]


def test_null_matches_no_row() -> None:
    """``key = NULL`` is no bucket at all, not every bucket."""
    assert buckets("SELECT * FROM flights WHERE tailnum = NULL") == [("flights", set())]


@pytest.mark.parametrize(
    "where",
    [
        f"a = 1 AND b = '{ONE}'",
        f"(a, b) = (1, '{ONE}')",
        f"(a, b) IN ((1, '{ONE}'))",
        f"a IN (1) AND b = '{ONE}'::uuid",
        f"(a = 1 AND b = '{ONE}') OR (b = '{ONE}' AND a = 1)",
    ],
)
def test_a_key_of_two_columns_needs_both(where: str) -> None:
    """Row values and AND-ed columns make a whole key; one column alone makes none."""
    from uuid import UUID as Uuid

    found = buckets(f"SELECT * FROM pairs WHERE {where}")

    assert found == [("pairs", {bucket_of((1, Uuid(ONE)), (NUMBER, UUID), 64)})]
    assert buckets("SELECT * FROM pairs WHERE a = 1") == [("pairs", None)]


# Joins


@pytest.mark.parametrize(
    "source",
    [
        "flights f JOIN planes p ON p.tailnum = f.tailnum WHERE f.tailnum = 'N1'",
        "flights f JOIN planes p USING (tailnum) WHERE tailnum = 'N1'",
        "flights f, planes p WHERE p.tailnum = f.tailnum AND p.tailnum = 'N1'",
        "flights f JOIN planes p ON p.tailnum = f.tailnum AND f.tailnum = 'N1'",
        "flights f LEFT JOIN planes p ON p.tailnum = f.tailnum WHERE f.tailnum = 'N1'",
        "flights f LEFT JOIN planes p USING (tailnum) WHERE tailnum = 'N1'",
        "flights f JOIN LATERAL (SELECT 1 FROM airlines) a ON true "
        "JOIN planes p ON p.tailnum = f.tailnum WHERE f.tailnum = 'N1'",
        "flights f JOIN airlines a ON a.carrier = f.tailnum "
        "JOIN planes p ON p.tailnum = a.carrier WHERE a.carrier = 'N1'",
    ],
)
def test_keys_travel_over_equalities(source: str) -> None:
    """Colocated tables that are joined on their keys go where the key of one of them says."""
    text = described(f"SELECT * FROM {source}")

    assert buckets(f"SELECT * FROM {source}") == [("flights", tail("N1")), ("planes", tail("N1"))]
    assert text.statement.hindrance is None


def test_on_of_an_outer_join_never_restricts_the_preserved_side() -> None:
    """The preserved side keeps its rows from every shard; so too behind RIGHT JOIN."""
    on = "p.tailnum = f.tailnum AND p.tailnum = 'N1'"

    left = buckets(f"SELECT * FROM flights f LEFT JOIN planes p ON {on}")
    right = buckets(f"SELECT * FROM planes p RIGHT JOIN flights f ON {on}")
    full = buckets(f"SELECT * FROM flights f FULL JOIN planes p ON {on}")

    assert left == right == [("flights", None), ("planes", tail("N1"))]
    assert full == [("flights", None), ("planes", None)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM flights f JOIN planes p ON p.year = f.id",
        "SELECT * FROM flights f NATURAL JOIN planes p",
        "SELECT * FROM flights, planes",
        "SELECT tailnum FROM flights EXCEPT SELECT tailnum FROM planes",
        "SELECT * FROM flights WHERE EXISTS (SELECT 1 FROM planes WHERE year = 2000)",
        "SELECT * FROM airlines LEFT JOIN flights f ON f.tailnum = carrier",
        "SELECT * FROM (flights JOIN planes USING (tailnum)) AS j",
        "SELECT * FROM flights WHERE tailnum NOT IN (SELECT tailnum FROM planes)",
        "SELECT (SELECT max(f.id) FROM airlines) FROM flights f",
        "SELECT (SELECT max(f.id)) FROM flights f",
        "SELECT * FROM flights WHERE tailnum IN (SELECT tailnum FROM planes LIMIT 1)",
        "SELECT * FROM flights WHERE tailnum IN (SELECT max(tailnum) FROM planes)",
        "SELECT * FROM flights WHERE tailnum > ANY (SELECT tailnum FROM planes)",
        "SELECT * FROM flights ORDER BY id",
        "SELECT * FROM flights LIMIT 1",
        "SELECT * FROM flights OFFSET 1",
        "SELECT DISTINCT id FROM flights",
        "SELECT id FROM flights GROUP BY id",
        "SELECT count(*) FROM flights",
        "SELECT coalesce(max(id), 0) FROM flights",
        "SELECT rank() OVER (ORDER BY id) FROM flights",
        "SELECT 1 FROM flights HAVING true",
        "SELECT * FROM (SELECT * FROM flights LIMIT 1) x",
        "SELECT * FROM (SELECT count(*) FROM flights) x",
        "SELECT * FROM (SELECT DISTINCT dest FROM flights) x",
        "WITH x AS (SELECT max(id) FROM flights) SELECT * FROM x",
    ],
)
def test_what_cannot_run_shard_by_shard_is_hindered(sql: str) -> None:
    """Joins off the key, set operations and free subqueries need one shard."""
    assert described(sql).statement.hindrance is not None


def test_a_name_is_looked_up_from_the_inside_out() -> None:
    """``tailnum`` inside the subquery is the inner table's; qualified, it is the outer one's."""
    inner = buckets(
        "SELECT 1 FROM flights WHERE tailnum = 'N1' AND EXISTS "
        "(SELECT 1 FROM planes WHERE tailnum = 'N2')"
    )
    tied = described(
        "SELECT 1 FROM flights WHERE EXISTS (SELECT 1 FROM planes WHERE tailnum = flights.tailnum)"
    )

    assert inner == [("flights", tail("N1")), ("planes", tail("N2"))]
    assert tied.statement.hindrance is None


@pytest.mark.parametrize(("is_complete", "groups"), [(True, 1), (False, 2)])
def test_a_name_is_not_looked_up_outside_of_a_table_that_may_have_it(
    is_complete: bool, groups: int
) -> None:
    """A mapping may leave a column out: then it is not the outer table's of that name."""
    visits = TableInfo("visits", Role.SHARDED, {"plane": TEXT}, ("plane",), is_complete=is_complete)
    sql = "SELECT 1 FROM flights WHERE EXISTS (SELECT 1 FROM visits WHERE plane = tailnum)"

    text = describe_text(sql, {**TABLES, "visits": visits}, TOPOLOGY)

    assert len({use.group for use in text.statement.occurrences}) == groups


def test_lateral_means_its_sibling_not_an_outer_namesake() -> None:
    """The nearest table of that name is meant, or the key of another row would be used."""
    found = buckets(
        "SELECT (SELECT max(p.year) FROM flights f JOIN LATERAL "
        "(SELECT * FROM planes WHERE planes.tailnum = f.tailnum) p ON true) "
        "FROM flights f WHERE f.tailnum = 'N1'"
    )

    assert sorted(found, key=str) == [
        ("flights", None),
        ("flights", tail("N1")),
        ("planes", None),
    ]


def test_text_and_core_are_described_alike() -> None:
    """One set of rules: the same statement by select() gives the same buckets and groups."""
    metadata = MetaData()
    flights = Table(
        "flights",
        metadata,
        Column("tailnum", Text, primary_key=True),
        Column("id", BigInteger, primary_key=True),
        **sqlroute.sharded_by("tailnum"),
    )
    planes = Table(
        "planes",
        metadata,
        Column("tailnum", Text, primary_key=True),
        **sqlroute.sharded_by("tailnum"),
    )
    core = describe(
        select(flights.c.id)
        .join(planes, planes.c.tailnum == flights.c.tailnum)
        .where(flights.c.tailnum.in_(["N1", "N2"])),
        TOPOLOGY,
    )
    text = described(
        "SELECT f.id FROM flights f JOIN planes p ON p.tailnum = f.tailnum "
        "WHERE f.tailnum IN ('N1', 'N2')"
    ).statement

    assert [(use.table, use.group) for use in text.occurrences] == [
        (use.table, use.group) for use in core.occurrences
    ]
    assert text.kind is core.kind
    assert text.hindrance == core.hindrance


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT *, lower(tailnum) FROM flights WHERE id > 3",
        "SELECT * FROM flights f JOIN planes p USING (tailnum)",
        "SELECT * FROM flights WHERE tailnum IN (SELECT tailnum FROM planes WHERE year = 2000)",
        "SELECT * FROM flights WHERE tailnum = ANY (SELECT tailnum FROM planes)",
        "SELECT * FROM (SELECT * FROM flights WHERE id = 1) x JOIN planes USING (tailnum)",
        "WITH x AS (SELECT tailnum FROM flights) SELECT * FROM x",
        "SELECT (SELECT f.id) FROM flights f",
        "SELECT *, (SELECT max(year) FROM planes p WHERE p.tailnum = f.tailnum) FROM flights f",
        "SELECT * FROM flights f, LATERAL (SELECT year FROM planes p WHERE p.tailnum = f.tailnum "
        "ORDER BY year LIMIT 1) x",
    ],
)
def test_rows_of_each_shard_are_the_rows(sql: str) -> None:
    """What needs no rewriting is sent to every shard as it is."""
    assert described(sql).statement.hindrance is None
    assert planned(sql).tier is Tier.SCATTER


# Plans


def test_a_key_makes_a_plan_of_one_shard() -> None:
    """The planner is the same as for any statement."""
    found = planned("SELECT * FROM flights WHERE tailnum = 'N1'")

    assert found.tier is Tier.SINGLE
    assert found.shards == (SHARD_MAP.owner(tail("N1").pop()),)


def test_an_insert_goes_where_its_keys_say() -> None:
    """With and without a list of columns, constants and parameters."""
    named = planned("INSERT INTO flights (tailnum, id) VALUES ('N1', 1)")
    whole = planned("INSERT INTO flights VALUES (1, :t)", {"t": "N1"})

    assert named.shards == whole.shards == (SHARD_MAP.owner(tail("N1").pop()),)


def test_what_excludes_every_row_is_still_asked_of_one_shard() -> None:
    """Nobody else knows the columns of a text."""
    found = planned("SELECT * FROM flights WHERE tailnum = NULL")

    assert len(found.shards) == 1


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("UPDATE flights SET dest = 'x'", MissingShardKey),
        ("DELETE FROM flights USING planes WHERE planes.tailnum = 'N1'", MissingShardKey),
        ("INSERT INTO flights (id) VALUES (1)", MissingShardKey),
        ("INSERT INTO flights (tailnum) VALUES (lower('N1'))", MissingShardKey),
        ("INSERT INTO flights (tailnum) SELECT carrier FROM airlines", MissingShardKey),
        ("INSERT INTO flights DEFAULT VALUES", MissingShardKey),
        ("INSERT INTO flights SELECT * FROM flights", CrossShardRefused),
        ("INSERT INTO airlines SELECT tailnum, dest FROM flights", CrossShardRefused),
        ("UPDATE airlines SET name = tailnum FROM flights", CrossShardRefused),
        ("SELECT nextval('x')", CrossShardRefused),
        ("SELECT * INTO copy FROM flights WHERE tailnum = 'N1'", CrossShardRefused),
        ("SELECT * FROM busy", CrossShardRefused),
        ("SELECT * FROM ONLY flights", CrossShardRefused),
        ("DELETE FROM ONLY flights WHERE tailnum = 'N1'", CrossShardRefused),
        ("SET x = 1", CrossShardRefused),
    ],
)
def test_what_cannot_be_placed_is_refused(sql: str, error: type[PlanError]) -> None:
    """No write is sent on a guess."""
    with pytest.raises(error):
        planned(sql)


@pytest.mark.parametrize(
    ("sql", "parameters", "words"),
    [
        ("SELEC 1", {}, 'cannot be parsed: syntax error at or near "SELEC"'),
        ("SELECT 1; SELECT 2", {}, "one statement is described at a time"),
        ("", {}, "one statement is described at a time"),
        ("SELECT * FROM nope", {}, "unknown table 'nope'; known: airlines, flights"),
        ("SELECT * FROM other.flights", {}, "unknown table 'other.flights'"),
        ("SELECT 1", {"x": 1}, "has no parameter 'x'; it has: none"),
        ("SELECT * FROM flights WHERE tailnum = :t", {}, "'t' is compared with a key"),
        ("SELECT * FROM flights WHERE tailnum IN ('a', :t)", {}, "'t' is compared with a key"),
    ],
)
def test_bad_input_is_named(sql: str, parameters: dict[str, Any], words: str) -> None:
    """Syntax, tables and parameters: the message says which one, and what is known."""
    with pytest.raises((PlanError, UnknownName), match=words.replace("(", r"\(")):
        described_text(described(sql), parameters)


def test_ordinary_tables_are_said_to_be_taken_for_reference_tables() -> None:
    """The catalog of a server cannot tell them apart, so the plan says what was assumed."""
    reasons = described("SELECT * FROM airlines").statement.reasons

    assert "ordinary tables are taken for reference tables: airlines" in reasons


@pytest.mark.parametrize("sql", ["SELECT 1", "SELECT now()", "SELECT (SELECT 1)"])
def test_a_read_of_no_table_runs_anywhere(sql: str) -> None:
    """As the same statement of SQLAlchemy's does: the plan does not refuse what is proved."""
    assert planned(sql).tier is Tier.SINGLE


def test_an_unknown_function_of_no_table_is_refused() -> None:
    """Nothing says on which shard it would do what it does."""
    with pytest.raises(CrossShardRefused):
        planned("SELECT do_something()")
