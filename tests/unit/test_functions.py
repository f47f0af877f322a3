"""What is known of functions decides what is a read: lists first, then pg_proc, else unknown."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from planning import topology
from sqlalchemy.sql.elements import quoted_name

from sqlroute.catalog import functions as reading
from sqlroute.catalog.functions import READ_AGAIN, TRY_AGAIN, FunctionReader
from sqlroute.health import Health
from sqlroute.routing.functions import (
    BUILT_IN,
    FunctionCatalog,
    Functions,
    Verdict,
    catalog_of,
    in_common,
    known,
)
from sqlroute.routing.planner import Planner
from sqlroute.routing.policy import Policy
from sqlroute.routing.sqlfacts import named, sets_something, statement_facts
from sqlroute.routing.statement import Kind, Placement, Statement, describe
from sqlroute.topology import Topology

ONE = topology(main="ab")
MANY = topology(s0="a", s1="a")
Rows = list[tuple[str, str, bool, bool]]
ROWS: Rows = [  # schema, name, any is volatile, all are plain
    ("pg_catalog", "lower", False, True),
    ("pg_catalog", "now", False, False),
    ("pg_catalog", "random", True, False),
    ("pg_catalog", "pg_advisory_lock", True, False),
    ("pg_catalog", "pg_stat_get_wal_senders", False, False),
    ("pg_catalog", "hash_numeric", False, True),
    ("public", "plain", False, True),
    ("public", "total", False, False),
    ("public", "audit", True, False),
    ("app", "mixed", False, False),
    ("public", "mixed", True, False),
]
CATALOG = catalog_of(ROWS)


def functions(allow: tuple[str, ...] = (), deny: tuple[str, ...] = ()) -> Functions:
    found = known(replace(Policy(), allow_functions=allow, deny_functions=deny))
    return found.learnt("shop", CATALOG)


def verdict(name: str, of: Functions) -> Verdict:
    schema, _, bare = name.rpartition(".")
    return of.verdict((schema, bare), "shop")


def described(statement: Any, of: Functions = BUILT_IN, on: Topology = ONE) -> Statement:
    return describe(statement, on, of)


class TestVerdict:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("lower", Verdict.PLAIN),
            ("pg_catalog.lower", Verdict.PLAIN),
            ("app.lower", Verdict.UNDECIDED),
            ("coalesce", Verdict.PLAIN),
            ("now", Verdict.PLAIN),
            ("random", Verdict.PLAIN),
            ("hash_numeric", Verdict.PLAIN),
            ("plain", Verdict.PLAIN),
            ("total", Verdict.READ),
            ("audit", Verdict.VOLATILE),
            ("public.audit", Verdict.VOLATILE),
            ("mixed", Verdict.VOLATILE),
            ("app.mixed", Verdict.READ),
            ("frobnicate", Verdict.UNDECIDED),
            ("any_value", Verdict.UNDECIDED),
            ("pg_advisory_lock", Verdict.DENIED),
            ("pg_stat_get_wal_senders", Verdict.DENIED),
            ("set_config", Verdict.DENIED),
            ("dblink", Verdict.DENIED),
            ("public.dblink_exec", Verdict.DENIED),
        ],
    )
    def test_of_a_catalog(self, name: str, expected: Verdict) -> None:
        """A name is a read if none of the functions it may mean is volatile."""
        assert verdict(name, functions()) is expected

    @pytest.mark.parametrize("name", ["total", "plain", "hash_numeric", "my.lower"])
    def test_without_a_catalog_only_the_list_counts(self, name: str) -> None:
        assert verdict(name, BUILT_IN) is Verdict.UNDECIDED

    def test_of_another_keyspace_says_nothing(self) -> None:
        assert functions().verdict(("", "total"), "logs") is Verdict.UNDECIDED

    def test_own_volatile_function_of_a_built_in_name_is_seen(self) -> None:
        catalog = catalog_of([*ROWS, ("public", "lower", True, False)])

        assert verdict("lower", BUILT_IN.learnt("shop", catalog)) is Verdict.VOLATILE

    @pytest.mark.parametrize("allowed", ["audit", "public.audit"])
    def test_allowed_function_is_a_read(self, allowed: str) -> None:
        assert verdict("public.audit", functions(allow=(allowed,))) is Verdict.READ

    def test_allowed_built_in_function_is_as_plain_as_before(self) -> None:
        assert verdict("lower", functions(allow=("lower",))) is Verdict.PLAIN

    def test_allowed_with_its_schema_says_nothing_of_the_bare_name(self) -> None:
        """``audit()`` may mean the one of another schema."""
        assert verdict("audit", functions(allow=("public.audit",))) is Verdict.VOLATILE

    @pytest.mark.parametrize("denied", ["total", "public.total"])
    @pytest.mark.parametrize("called", ["total", "public.total"])
    def test_denied_function_is_none(self, denied: str, called: str) -> None:
        """A bare name may mean the denied one, and a denied bare name means every schema."""
        assert verdict(called, functions(deny=(denied,))) is Verdict.DENIED

    def test_deny_wins(self) -> None:
        assert verdict("total", functions(("total",), ("total",))) is Verdict.DENIED

    def test_built_in_function_can_be_denied(self) -> None:
        assert verdict("random", functions(deny=("random",))) is Verdict.DENIED


class TestShards:
    def test_what_one_shard_lacks_is_unknown(self) -> None:
        other = catalog_of(row for row in ROWS if row[1] != "total")

        found = in_common([CATALOG, other])

        assert found is not None
        assert ("", "total") not in found
        assert ("public", "plain") in found

    def test_worst_shard_decides(self) -> None:
        other = catalog_of([*ROWS, ("app", "total", True, False)])

        found = in_common([CATALOG, other])

        assert verdict("total", BUILT_IN.learnt("shop", found or {})) is Verdict.VOLATILE

    def test_no_shard_is_nothing(self) -> None:
        assert in_common([]) is None

    def test_same_again_changes_nothing(self) -> None:
        """Shapes are described anew only when more is known."""
        found = functions()

        assert found.learnt("shop", catalog_of(ROWS)) is found


class TestStatement:
    def test_stable_function_is_a_read(self) -> None:
        assert described(sa.select(sa.func.total()), functions()).kind is Kind.READ

    def test_volatile_function_is_named(self) -> None:
        found = described(sa.select(sa.func.audit()), functions())

        assert found.kind is Kind.UNKNOWN
        assert found.reasons == ("function audit() is volatile in pg_proc, so it may write",)
        assert not found.undecided

    def test_reasons_stand_in_the_order_of_the_statement(self) -> None:
        calls = [getattr(sa.func, f"f{number}")() for number in range(9)]
        found = described(sa.select(*calls, *calls))

        assert [reason.split()[1] for reason in found.reasons] == [f"f{n}()" for n in range(9)]

    def test_unknown_function_is_undecided(self) -> None:
        assert described(sa.select(sa.func.total())).undecided

    def test_built_in_functions_need_no_catalog(self) -> None:
        """A statement of known functions never makes anybody read ``pg_proc``."""
        found = described(sa.select(sa.func.lower("X"), sa.func.random()))

        assert not found.undecided

    def test_write_needs_no_catalog(self) -> None:
        table = sa.table("t", sa.column("x"))
        found = described(sa.insert(table).values(x=sa.func.frobnicate()))

        assert found.kind is Kind.WRITE
        assert not found.undecided

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("TOTAL", Kind.READ),
            (quoted_name("TOTAL", True), Kind.UNKNOWN),
            (quoted_name("total", True), Kind.READ),
            (quoted_name("Lower", True), Kind.UNKNOWN),
            (quoted_name("Lower", None), Kind.UNKNOWN),
            ("to-tal", Kind.UNKNOWN),
        ],
    )
    def test_name_is_the_one_that_postgresql_sees(self, name: str, kind: Kind) -> None:
        """What SQLAlchemy quotes keeps its case, everything else is folded."""
        assert described(sa.select(getattr(sa.func, name)()), functions()).kind is kind

    @pytest.mark.parametrize(
        ("operator", "kind"),
        [
            ("@@@", Kind.READ),
            ("OPERATOR(app.@@)", Kind.READ),
            ("AT TIME ZONE", Kind.READ),
            ("+ audit() +", Kind.UNKNOWN),
            ("; DELETE FROM t; --", Kind.UNKNOWN),
        ],
    )
    def test_own_operator_calls_nothing(self, operator: str, kind: Kind) -> None:
        statement = sa.select(sa.column("x").op(operator)(sa.column("y")))

        assert described(statement).kind is kind

    def test_functions_added_by_types_count(self) -> None:
        """SQLAlchemy renders them; the statement does not show them."""

        class Sent(sa.types.UserDefinedType[Any]):
            cache_ok = True

            def bind_expression(self, bindvalue: Any) -> Any:
                return sa.func.audit(bindvalue)

        class Fetched(sa.types.UserDefinedType[Any]):
            cache_ok = True

            def column_expression(self, column: Any) -> Any:
                return sa.func.audit(column)

        table = sa.table("t", sa.column("x", Fetched()), sa.column("y", Sent()))

        assert described(sa.select(table.c.x), functions()).kind is Kind.UNKNOWN
        assert described(sa.select(sa.literal(1, Sent())), functions()).kind is Kind.UNKNOWN
        assert described(sa.select(sa.func.lower(table.c.x)), functions()).kind is Kind.READ

    @pytest.mark.parametrize(
        ("table", "kind"),
        [
            (sa.table("pg_stat_activity"), Kind.UNKNOWN),
            (sa.Table("pg_locks", sa.MetaData(), sa.Column("pid")), Kind.UNKNOWN),
            (sa.Table("tables", sa.MetaData(schema="information_schema")), Kind.UNKNOWN),
            (sa.table("pg_things", schema="app"), Kind.READ),
        ],
    )
    def test_system_table_is_the_primarys(self, table: Any, kind: Kind) -> None:
        """Each server has its own, so that a replica would tell of itself."""
        assert described(sa.select(sa.literal(1)).select_from(table)).kind is kind

    def test_function_that_may_read_tables_stays_on_one_shard(self) -> None:
        """Each shard would compute it from its own rows."""
        from planning import statements

        many = described(sa.select(statements.Customer.id, sa.func.total()), functions(), MANY)
        bare = described(sa.select(sa.func.total()), functions(), MANY)
        plain = described(sa.select(sa.func.plain()), functions(), MANY)

        assert many.kind is Kind.READ
        assert many.hindrance is not None
        assert many.hindrance[0] == "total()"
        assert bare.placement is Placement.UNPLACED
        assert plain.placement is Placement.ANYWHERE


class TestSets:
    @pytest.mark.parametrize(
        "statement",
        [
            sa.text("SET LOCAL app.tenant = '7'"),
            sa.text("/* why */ -- so\n set role x"),
            sa.text("SELECT 1; RESET ALL"),
            sa.text("DISCARD ALL"),
            sa.text("SELECT pg_catalog . set_config ('a', 'b', true)"),
            sa.select(sa.func.set_config("a", "b", True)),
            sa.select(sa.select(sa.func.pg_catalog.SET_CONFIG("a", "b", True)).subquery()),
            sa.select(sa.literal_column("set_config('a', 'b', true)")),
        ],
    )
    def test_setting_sent_by_hand_is_seen(self, statement: Any) -> None:
        found = described(statement)

        assert found.sets
        assert found.kind is not Kind.READ

    @pytest.mark.parametrize(
        "statement", [sa.text("SELECT a FROM settings"), sa.text("UPDATE t SET x = 1")]
    )
    def test_nothing_else_is(self, statement: Any) -> None:
        assert not described(statement).sets

    def test_seen_without_the_parser(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pgparse", None)

        assert described(sa.text("SET app.one = 1")).sets
        assert sets_something("select set_config('app.two', '2', true)")


class TestText:
    @pytest.mark.parametrize(
        "text",
        [
            "SELECT 1",
            "  -- hello\n SELECT lower(:x)::text, '10:30'::time, 5 % 2 FROM t WHERE x LIKE '%y'",
            "WITH a AS (SELECT 1) SELECT * FROM a UNION ALL TABLE t ORDER BY 1 LIMIT :n",
            "VALUES (1), (2)",
            "SELECT total(), now() FROM app.v",
            "SELECT '\\:x'",
            "SELECT x\\:\\:int FROM t",
        ],
    )
    def test_proved_read(self, text: str) -> None:
        assert described(sa.text(text), functions()).kind is Kind.READ

    @pytest.mark.parametrize(
        "text",
        [
            "SELECT audit()",
            "SELECT app.frobnicate()",
            "SELECT pg_advisory_lock(1)",
            "SELECT set_config('a', 'b', true)",
            "SELECT * FROM pg_stat_activity",
            "SELECT * FROM information_schema.tables",
            "SELECT 1; SELECT 2",
            "SELECT 1; DROP TABLE t",
            "SELECT 1\0; DROP TABLE t",
            "SELEC",
            "",
            "SET x = 1",
            "RESET x",
            "DISCARD ALL",
            "SHOW x",
            "LISTEN x",
            "NOTIFY x",
            "LOCK t",
            "DO 'BEGIN END'",
            "CALL work()",
            "COPY t TO STDOUT",
            "EXPLAIN ANALYZE SELECT 1",
            "BEGIN",
            "PREPARE x AS SELECT 1",
            "EXECUTE x",
            "DECLARE c CURSOR FOR SELECT 1",
            "FETCH ALL FROM c",
            "CREATE TEMP TABLE x AS SELECT 1",
            "REFRESH MATERIALIZED VIEW v",
            "VACUUM",
        ],
    )
    def test_unproved(self, text: str) -> None:
        assert described(sa.text(text), functions()).kind is Kind.UNKNOWN

    @pytest.mark.parametrize(
        "text",
        [
            "DELETE FROM t",
            "WITH a AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM a",
            "SELECT * FROM t FOR UPDATE",
            "SELECT * FROM (SELECT * FROM t FOR SHARE) x",
            "SELECT * INTO copy FROM t",
            "SELECT nextval('numbers')",
            "EXPLAIN ANALYZE DELETE FROM t",
        ],
    )
    def test_write(self, text: str) -> None:
        assert described(sa.text(text), functions()).kind is Kind.WRITE

    def test_list_parameter(self) -> None:
        """``IN :ids`` is no SQL before SQLAlchemy has put the parentheses around it."""
        text = sa.text("SELECT * FROM t WHERE id IN :ids")
        expanding = text.bindparams(sa.bindparam("ids", expanding=True))

        assert described(text).kind is Kind.UNKNOWN
        assert described(expanding).kind is Kind.READ

    def test_columns_and_entities_from_text(self) -> None:
        from planning import statements

        text = sa.text("SELECT id FROM customer")

        assert described(text.columns(sa.column("id"))).kind is Kind.READ
        assert described(sa.select(statements.Customer).from_statement(text)).kind is Kind.READ
        assert described(sa.select(text.columns(sa.column("id")).subquery())).kind is Kind.READ

    @pytest.mark.parametrize(
        ("statement", "kind"),
        [
            (sa.select(sa.literal_column("lower(x)")), Kind.READ),
            (sa.select(sa.literal_column("audit(x)")), Kind.UNKNOWN),
            (sa.select(sa.literal(1)).where(sa.text("total() > :n")), Kind.READ),
            (sa.select(sa.literal(1)).order_by(sa.text("lower(x) DESC, 2")), Kind.READ),
            (sa.select(sa.literal(1)).order_by(sa.text("x FOR UPDATE")), Kind.UNKNOWN),
            (sa.select(sa.literal(1)).order_by(sa.text("x LIMIT audit()")), Kind.UNKNOWN),
            (sa.select(sa.literal(1)).select_from(sa.text("v JOIN w ON true")), Kind.READ),
            (sa.select(sa.literal(1)).select_from(sa.text("audit()")), Kind.UNKNOWN),
            (sa.select(sa.literal(1)).select_from(sa.text("pg_locks")), Kind.UNKNOWN),
            (sa.select(sa.literal(1)).where(sa.text("(SELECT 1 FOR UPDATE) = 1")), Kind.WRITE),
            (sa.select(sa.literal(1)).where(sa.text("a) OR audit(b")), Kind.UNKNOWN),
        ],
    )
    def test_parts_of_statements(self, statement: Any, kind: Kind) -> None:
        assert described(statement, functions()).kind is kind

    @pytest.mark.parametrize("text", ["SELECT 1 FROM t", "DELETE FROM t", "SELECT audit()"])
    def test_says_nothing_of_where_its_rows_are(self, text: str) -> None:
        found = described(sa.text(text), functions(), MANY)

        assert found.placement is Placement.UNPLACED

    def test_of_no_table_is_anywhere(self) -> None:
        assert described(sa.text("SELECT 1"), on=MANY).placement is Placement.ANYWHERE

    def test_deep_text_is_no_error(self) -> None:
        deep = "SELECT " + "+".join(["1"] * 5_000)

        assert described(sa.text(deep)).kind is Kind.UNKNOWN

    def test_without_the_parser_nothing_is_proved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pgparse", None)

        assert described(sa.text("SELECT 'no parser'")).kind is Kind.UNKNOWN

    def test_text_is_parsed_once(self) -> None:
        first = statement_facts("SELECT 'once'")

        assert statement_facts("SELECT 'once'") is first

    @pytest.mark.parametrize(
        ("text", "sent"),
        [
            ("a = :x AND b = :y AND c = :x", "a = $1 AND b = $2 AND c = $1"),
            ("a::int, :x::int", "a::int, :x::int"),
            (r"\:x", ":x"),
            (r"a\:\:int", "a::int"),
        ],
    )
    def test_parameters_are_found_as_sqlalchemy_finds_them(self, text: str, sent: str) -> None:
        from sqlalchemy.dialects import postgresql

        dialect = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
        compiled = sa.text(text).compile(dialect=dialect)

        assert named(text)[0] == sent
        assert str(compiled) == sent


class TestPlanner:
    statement = sa.select(sa.func.total(1))

    def test_what_is_learnt_describes_shapes_anew(self) -> None:
        planner = Planner(ONE)
        before = planner.describe(self.statement).shape
        planner.functions = functions()

        after = planner.describe(self.statement).shape

        assert before.statement.kind is Kind.UNKNOWN
        assert after.statement.kind is Kind.READ
        assert planner.describe(self.statement).shape is after

    def test_shape_without_functions_is_kept(self) -> None:
        planner, statement = Planner(ONE), sa.select(sa.literal(1))
        before = planner.describe(statement).shape
        planner.functions = functions()

        assert planner.describe(statement).shape is before


class TestReader:
    def test_reads_again_after_a_while_only(self) -> None:
        now = [100.0]
        reader = FunctionReader(1.0, lambda: now[0])

        assert reader.claim("shop")
        assert not reader.claim("shop")
        assert reader.claim("logs")
        now[0] += READ_AGAIN
        assert reader.claim("shop")

    def test_tries_again_sooner_when_nobody_answered(self) -> None:
        now = [100.0]
        reader = FunctionReader(1.0, lambda: now[0])
        reader.claim("shop")

        assert reader.read(ONE.default, Health.initial(ONE)) is None
        assert not reader.claim("shop")
        now[0] += TRY_AGAIN
        assert reader.claim("shop")

    def test_shard_that_does_not_answer_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the other shards say counts until it answers."""
        from planning import health

        def read(node: Any, timeout: float) -> FunctionCatalog | None:
            return None if node.name == "s1-a" else CATALOG

        monkeypatch.setattr(reading, "read_functions", read)

        assert FunctionReader(1.0).read(MANY.default, health(MANY)) == CATALOG
