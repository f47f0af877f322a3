"""What a replica runs and what it does not: functions as ``pg_proc`` has them, and SQL text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from conftest import until

from sqlroute import Router
from sqlroute.catalog import functions as reading
from sqlroute.catalog.functions import read_functions
from sqlroute.local.topology import LocalTopology
from sqlroute.routing.functions import (
    BUILT_IN,
    CONSTRUCTS,
    EXTENSIONS,
    HARMLESS,
    HARMLESS_VOLATILE,
    FunctionCatalog,
    Functions,
    Verdict,
)
from sqlroute.routing.statement import Kind, describe
from sqlroute.runtime.engines import Engines
from sqlroute.testing import TopologyFactory
from sqlroute.topology import Node

func = sa.func
numbers = itertools.count(1)

SCHEMA = """
CREATE SCHEMA IF NOT EXISTS tools;
CREATE TABLE IF NOT EXISTS thing (id int PRIMARY KEY);
INSERT INTO thing VALUES (1) ON CONFLICT DO NOTHING;
CREATE OR REPLACE FUNCTION f_immutable(x int) RETURNS int
    LANGUAGE sql IMMUTABLE AS 'SELECT x + 1';
CREATE OR REPLACE FUNCTION f_stable(x int) RETURNS bigint
    LANGUAGE sql STABLE AS 'SELECT count(*) + x FROM thing';
CREATE OR REPLACE FUNCTION f_volatile(x int) RETURNS int
    LANGUAGE plpgsql AS 'BEGIN INSERT INTO thing VALUES (x) ON CONFLICT DO NOTHING; RETURN x; END';
CREATE OR REPLACE FUNCTION f_stable_by_name(x int) RETURNS int
    LANGUAGE plpgsql STABLE AS 'BEGIN RETURN f_volatile(x); END';
CREATE OR REPLACE FUNCTION f_mixed(x int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';
CREATE OR REPLACE FUNCTION f_mixed(x text) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
CREATE OR REPLACE FUNCTION tools.f_twice(x int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';
CREATE OR REPLACE FUNCTION public.f_twice(x int) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
CREATE OR REPLACE FUNCTION lower(thing) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT ''x''';
CREATE OR REPLACE FUNCTION f_step(int, int) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT $1 + $2';
CREATE OR REPLACE AGGREGATE f_sum(int) (sfunc = f_step, stype = int, initcond = '0');
CREATE OR REPLACE AGGREGATE f_max(int) (sfunc = int4larger, stype = int);
CREATE OR REPLACE VIEW things AS SELECT id FROM thing;
CREATE EXTENSION IF NOT EXISTS fuzzystrmatch;
CREATE EXTENSION IF NOT EXISTS dblink;
"""


class Servers:
    """One shard with a replica, and the functions of the tests."""

    def __init__(self, topology: LocalTopology, router: Router) -> None:
        self._topology = topology
        self.router = router
        self.shard = next(iter(router.topology.keyspace_of_shard))
        self.nodes = {node.name: node.conninfo for node in topology.nodes}

    def run(self, sql: str) -> None:
        """Run SQL on the primary, as another program would, and wait until the replica has it."""
        with psycopg.connect(**self.nodes[f"{self.shard}-a"], autocommit=True) as connection:
            connection.execute(sql.encode())
        monitor, shard = self.router.monitor, self.shard
        primary = monitor.ask(shard, 1.0).primary(shard)
        assert primary is not None
        until(lambda: all(n.lsn >= primary.lsn for n in monitor.ask(shard, 1.0).replicas(shard)))

    def replica(self) -> Any:
        name = f"{self.shard}-b"
        return psycopg.connect(**self.nodes[name], autocommit=True)

    @property
    def node(self) -> Node:
        return self.router.topology.shard(self.shard).nodes[0]


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: TopologyFactory) -> Iterator[Servers]:
    topology = sqlroute_topology_factory(shards=1, replicas=1, label="functions")
    with Router.from_config(topology.config_path) as router:
        router.health()
        made = Servers(topology, router)
        made.run(SCHEMA)
        yield made


@pytest.fixture
def make(servers: Servers) -> Iterator[Callable[..., Router]]:
    """Make a router that has read nothing yet."""
    made: list[Router] = []

    def router(**policy: Any) -> Router:
        found = servers.router
        made.append(Router(found.topology, replace(found.policy, **policy)))
        return made[-1]

    yield router
    for each in made:
        each.close()


@pytest.fixture
def router(make: Callable[..., Router]) -> Router:
    return make()


@pytest.fixture(scope="module")
def catalog(servers: Servers) -> FunctionCatalog:
    found = read_functions(servers.node, 5.0)
    assert found is not None
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes whose ``pg_proc`` was read."""
    found: list[str] = []
    original = reading.read_functions

    def read(node: Node, timeout: float) -> FunctionCatalog | None:
        found.append(node.name)
        return original(node, timeout)

    monkeypatch.setattr(reading, "read_functions", read)
    return found


def is_replica(router: Router, statement: Any) -> bool:
    """Run a statement and say whether a replica answered."""
    with router.sessionmaker()() as session:
        found = session.explain(statement)
        session.execute(statement)
        session.rollback()
    return not found.target.is_primary


class TestFunctions:
    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            (func.f_immutable(1), True),
            (func.f_stable(1), True),
            (func.F_Stable(1), True),
            (func.public.f_stable(1), True),
            (func.f_volatile(1), False),
            (func.f_mixed(1), False),
            (func.tools.f_twice(1), True),
            (func.f_twice(1), False),
            (func.levenshtein("a", "b"), True),
            (func.f_max(1), True),
            (func.f_sum(1), False),
            (func.frobnicate, None),
            (func.pg_get_userbyid(10), True),
            (func.hashint4(1), True),
        ],
    )
    def test_replica_runs_what_is_not_volatile(
        self, router: Router, call: Any, expected: bool | None
    ) -> None:
        """All overloads of all schemas count, and the functions that an aggregate is made of."""
        if expected is None:
            with router.sessionmaker()() as session:
                assert session.explain(sa.select(call())).target.is_primary
            return
        assert is_replica(router, sa.select(call)) is expected

    def test_volatile_function_did_write(self, servers: Servers, router: Router) -> None:
        number = 1_000 + next(numbers)
        with router.sessionmaker()() as session:
            session.execute(sa.select(func.f_volatile(number)))
            session.commit()

        with psycopg.connect(**servers.nodes[f"{servers.shard}-a"]) as connection:
            found = connection.execute("SELECT 1 FROM thing WHERE id = %s", (number,)).fetchall()
        assert found == [(1,)]

    def test_stable_function_that_calls_a_volatile_one_runs_on_the_primary(
        self, servers: Servers, router: Router
    ) -> None:
        """A replica refuses it (25006), so it is run again where it may write."""
        number = 1_000 + next(numbers)
        with router.sessionmaker()() as session:
            call = sa.select(func.f_stable_by_name(number))
            assert not session.explain(call).target.is_primary
            found = session.scalar(call)

        assert found == number
        assert router.refused_writes == 1

    def test_pg_proc_is_read_once(self, router: Router, reads: list[str]) -> None:
        statements = [func.f_stable(1), func.f_volatile(1), func.frobnicate(), func.f_immutable(1)]
        with router.sessionmaker()() as session:
            for call in statements * 3:
                session.explain(sa.select(call))

        assert len(reads) == 1

    def test_pg_proc_is_not_read_for_known_functions(
        self, router: Router, reads: list[str]
    ) -> None:
        statement = sa.select(func.count(), func.max(sa.literal(1)), func.random())

        assert is_replica(router, statement)
        assert reads == []

    def test_own_overload_of_a_built_in_name_is_seen_once_read(self, router: Router) -> None:
        lower = sa.select(func.lower("X"))
        before = is_replica(router, lower)
        is_replica(router, sa.select(func.f_stable(1)))

        assert before
        assert not is_replica(router, lower)
        assert is_replica(router, sa.select(func.pg_catalog.lower("X")))

    def test_function_made_later_is_learnt(
        self, servers: Servers, router: Router, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not by the next statement, but by the first one after a while."""
        name = f"f_later_{next(numbers)}"
        statement = sa.select(getattr(func, name)())
        is_replica(router, sa.select(func.f_stable(1)))
        servers.run(f"CREATE FUNCTION {name}() RETURNS int LANGUAGE sql STABLE AS 'SELECT 1'")

        soon = is_replica(router, statement)
        router._functions._due.clear()
        later = is_replica(router, statement)

        assert (soon, later) == (False, True)

    def test_nobody_answers(self, router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then an unknown function is no read, and known ones are."""
        monkeypatch.setattr(reading, "read_functions", lambda *_: None)

        assert not is_replica(router, sa.select(func.f_stable(1)))
        assert is_replica(router, sa.select(func.lower("X")))

    def test_lists_of_the_policy_win(self, make: Callable[..., Router]) -> None:
        router = make(allow_functions=("f_twice",), deny_functions=("f_stable", "now"))

        assert is_replica(router, sa.select(func.f_twice(1)))
        assert not is_replica(router, sa.select(func.f_stable(1)))
        assert not is_replica(router, sa.select(func.now()))

    async def _async(self, router: Router) -> bool:
        async with router.async_sessionmaker()() as session:
            statement = sa.select(func.pg_is_in_recovery(), func.f_stable(1))
            row = (await session.execute(statement)).one()
        await router.aclose()
        return bool(row[0])

    def test_async_session_learns_too(self, router: Router) -> None:
        import asyncio

        assert asyncio.run(self._async(router))


class TestText:
    @pytest.mark.parametrize(
        ("sql", "parameters", "expected"),
        [
            ("SELECT pg_is_in_recovery()", {}, True),
            ("SELECT pg_is_in_recovery(), :x || '%', 5 % 2, 'a:b'", {"x": "y"}, True),
            ("SELECT pg_is_in_recovery(), f_stable(:x) FROM things", {"x": 1}, True),
            ("WITH t AS (SELECT 1) SELECT pg_is_in_recovery() FROM t", {}, True),
            ("SELECT pg_is_in_recovery() WHERE 1 IN :ids", {"ids": [1, 2]}, True),
            ("SELECT pg_is_in_recovery() FROM thing WHERE id = 1 FOR UPDATE", {}, False),
            ("SELECT pg_is_in_recovery() FROM f_volatile(:x)", {"x": 1}, False),
            ("SELECT pg_is_in_recovery() FROM pg_advisory_xact_lock(1)", {}, False),
            ("SELECT pg_is_in_recovery() FROM pg_stat_activity LIMIT 1", {}, False),
            (
                "WITH t AS (INSERT INTO thing VALUES (1) ON CONFLICT DO NOTHING RETURNING id) "
                "SELECT pg_is_in_recovery() FROM (SELECT count(*) FROM t) x",
                {},
                False,
            ),
        ],
    )
    def test_text_runs_where_it_may(
        self, router: Router, sql: str, parameters: dict[str, Any], expected: bool
    ) -> None:
        text = sa.text(sql)
        if "ids" in parameters:
            text = text.bindparams(sa.bindparam("ids", expanding=True))
        with router.sessionmaker()() as session:
            assert session.execute(text, parameters).scalars().first() is expected

    @pytest.mark.parametrize(
        "sql", ["SET LOCAL work_mem = '1MB'", "LOCK TABLE thing", "DO 'BEGIN END'", "LISTEN x"]
    )
    def test_other_text_runs_on_the_primary(self, router: Router, sql: str) -> None:
        assert not is_replica(router, sa.text(sql))

    def test_error_in_text_is_postgresqls(self, router: Router) -> None:
        """Text that cannot be parsed here is for the server to refuse."""
        with router.sessionmaker()() as session, pytest.raises(sa.exc.ProgrammingError):
            session.execute(sa.text("SELEC 1"))


DANGEROUS = [
    "pg_advisory_lock(1)",
    "pg_advisory_lock_shared(1)",
    "pg_advisory_xact_lock(1)",
    "pg_advisory_unlock(1)",
    "pg_advisory_unlock_all()",
    "pg_try_advisory_lock(1)",
    "pg_try_advisory_xact_lock_shared(1)",
    "set_config('app.x', '1', true)",
    "setseed(0.5)",
    "pg_notify('x', 'y')",
    "nextval('numbers')",
    "setval('numbers', 5)",
    "currval('numbers')",
    "lastval()",
    "lo_create(0)",
    "lo_from_bytea(0, 'x')",
    "lo_unlink(1)",
    "txid_current()",
    "pg_current_xact_id()",
    "pg_backend_pid()",
    "pg_cancel_backend(0)",
    "pg_terminate_backend(0)",
    "pg_stat_reset()",
    "pg_stat_get_wal_senders()",
    "pg_promote()",
    "pg_switch_wal()",
    "pg_wal_replay_pause()",
    "pg_reload_conf()",
    "pg_export_snapshot()",
    "pg_read_file('x')",
    "pg_logical_emit_message(true, 'x', 'y')",
    "pg_create_restore_point('x')",
    "pg_create_physical_replication_slot('x')",
    "pg_replication_origin_create('x')",
    "dblink('x', 'y')",
    "dblink_exec('x', 'y')",
    "query_to_xml('DELETE FROM thing', true, true, '')",
    "table_to_xml('thing', true, true, '')",
    "database_to_xml(true, true, '')",
    "cursor_to_xml('c', 1, true, true, '')",
    "ts_stat('SELECT 1')",
    "ts_rewrite('a', 'SELECT 1')",
]


@pytest.mark.parametrize("call", DANGEROUS)
def test_dangerous_function_is_never_a_read(catalog: FunctionCatalog, call: str) -> None:
    """With ``pg_proc`` and without: as text, and as a part of a statement given as text."""
    name = call.partition("(")[0]
    learnt = BUILT_IN.learnt("app", catalog)
    for functions in (BUILT_IN, learnt):
        for statement in (
            sa.text(f"SELECT {call}"),
            sa.select(sa.literal_column(call)),
            sa.select(getattr(func, name)()),
            sa.select(getattr(func.pg_catalog, name)()),
        ):
            topology = _topology()
            assert describe(statement, topology, functions).kind is not Kind.READ


def test_advisory_lock_excludes_others(servers: Servers, router: Router) -> None:
    """Taken on a replica it would succeed and exclude nobody."""
    lock = sa.select(func.pg_try_advisory_xact_lock(4711))
    with servers.replica() as connection:
        on_replica = connection.execute("SELECT pg_try_advisory_lock(4711)").fetchone()
        maker = router.sessionmaker()
        with maker() as one, maker() as other:
            taken = one.scalar(lock), other.scalar(lock)

    assert on_replica == (True,)
    assert taken == (True, False)


def test_names_that_need_no_catalog_are_what_pg_proc_says(
    catalog: FunctionCatalog, servers: Servers
) -> None:
    """Each is stable or immutable there, or listed as volatile without an effect, or no function.

    Names that came with a later version of PostgreSQL are absent from an earlier one.
    """
    newer = {"erf", "any_value", "array_sample", "array_shuffle", "random_normal"}
    newer |= {"uuidv4", "uuidv7"}
    absent = {name for name in HARMLESS if ("pg_catalog", name) not in catalog}
    volatile = {
        name
        for name in HARMLESS - absent
        if BUILT_IN.learnt("app", {("pg_catalog", name): catalog["pg_catalog", name]}).verdict(
            ("pg_catalog", name), "app"
        )
        is not Verdict.PLAIN
    }

    assert absent - CONSTRUCTS - EXTENSIONS <= newer
    assert volatile == set()
    assert {n for n in HARMLESS_VOLATILE if ("pg_catalog", n) in catalog} >= {"random", "pg_sleep"}


def test_no_volatile_function_of_postgresql_is_a_read(
    servers: Servers, catalog: FunctionCatalog
) -> None:
    functions: Functions = BUILT_IN.learnt("app", catalog)
    with servers.replica() as connection:
        rows = connection.execute(
            "SELECT DISTINCT proname FROM pg_proc WHERE provolatile = 'v' "
            "AND pronamespace = 'pg_catalog'::regnamespace"
        ).fetchall()
    names = {name for (name,) in rows}

    read = {name for name in names if functions.verdict(("", name), "app").is_read}

    assert len(names) > 200
    assert read <= HARMLESS_VOLATILE


def test_router_asks_the_primary_first(servers: Servers, router: Router, reads: list[str]) -> None:
    """It knows new functions first."""
    is_replica(router, sa.select(func.f_stable(1)))

    assert reads == [f"{servers.shard}-a"]
    assert isinstance(router.engines(is_async=False), Engines)


def _topology() -> Any:
    from sqlroute.topology import Keyspace, Shard, Topology

    return Topology((Keyspace("app", (Shard("s0", (Node("s0-a"),)),)),))
