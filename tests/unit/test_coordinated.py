"""Which statements a coordinator answers, planned without servers; and what it is built from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from planning import health, situation, statements, topology

from sqlroute.catalog.coordinator import (
    Column,
    Extension,
    Host,
    Leaf,
    Schema,
    ShardFacts,
    TableFacts,
    TypeFacts,
)
from sqlroute.catalog.readers import ASIDE, KEPT, Readers
from sqlroute.errors import (
    CrossShardRefused,
    LostTimeline,
    NoEligibleNode,
    NoPrimary,
    OperationRefused,
    ReadOnlyRefused,
    UnknownName,
)
from sqlroute.health import Role
from sqlroute.ops import foreign
from sqlroute.ops.foreign import Origin
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.plan import Plan, Tier
from sqlroute.routing.planner import Planner, plan
from sqlroute.routing.policy import Consistency, Demand, Intent, Policy, tier_named
from sqlroute.routing.target import History, Situation, UnknownReaders, Unproven
from sqlroute.routing.token import Position
from sqlroute.topology import (
    Coordinator,
    Keyspace,
    Node,
    Reader,
    Secret,
    Shard,
    ShardMap,
    Topology,
)

Customer, Order, Country = statements.Customer, statements.Order, statements.Country


def with_coordinator(of: Topology) -> Topology:
    coordinator = Coordinator((Node("c-a"), Node("c-b")))
    return replace(of, keyspaces=tuple(replace(k, coordinator=coordinator) for k in of.keyspaces))


TWO = with_coordinator(topology(s0="ab", s1="ab"))
ALL = situation(TWO)
DEMANDED = replace(ALL, demand=Demand(by_coordinator=True))
average = sa.select(sa.func.avg(Customer.id)).scalar_subquery()
SUBQUERY = sa.select(Customer).where(Customer.id > average)


def planned(statement: Any, of: Situation = ALL) -> Plan:
    return plan(Planner(of.topology).describe(statement), of, Random(1))


class TestPlans:
    def test_what_shards_cannot_answer_goes_to_the_coordinator(self) -> None:
        """It reads every primary; the plan says why, and whom it may ask."""
        found = planned(SUBQUERY)

        assert found.tier is Tier.COORDINATOR
        assert [str(target) for target in found.targets] == [
            "s0: primary s0-a, autocommit (read by the coordinator)",
            "s1: primary s1-a, autocommit (read by the coordinator)",
        ]
        assert found.coordinators == ("c-a", "c-b")
        assert found.describe()["tier"] == "coordinator"
        assert str(found).splitlines()[:3] == ["coordinator (read)", "  on c-a", "  or on c-b"]
        assert "customer in it is not tied to the shard key around it" in found.reasons[1]
        assert not any("restrict" in reason for reason in found.reasons)

    @pytest.mark.parametrize(
        "statement",
        [sa.select(Customer).where(Customer.id == 5), sa.select(Customer), sa.select(Country)],
    )
    def test_what_shards_can_answer_does_not(self, statement: Any) -> None:
        assert planned(statement).tier is not Tier.COORDINATOR

    def test_text_without_a_place_goes_there(self) -> None:
        found = planned(sa.text("SELECT count(DISTINCT name) FROM customer"))

        assert found.tier is Tier.COORDINATOR

    def test_who_asks_for_it_gets_it(self) -> None:
        assert planned(sa.select(Customer).where(Customer.id == 5), DEMANDED).coordinators

    def test_one_shard_needs_none(self) -> None:
        """The same program, on a keyspace that is not sharded."""
        one = with_coordinator(topology(s0="ab"))
        asked = situation(one)
        asked.demand = replace(asked.demand, by_coordinator=True)

        assert planned(SUBQUERY, asked).tier is Tier.SINGLE

    def test_only_one_tier_can_be_named(self) -> None:
        assert tier_named("coordinator")
        with pytest.raises(UnknownName, match="unknown tier 'single'"):
            tier_named("single")

    def test_without_a_coordinator_the_refusal_stays(self) -> None:
        bare = situation(topology(s0="a", s1="a"))
        with pytest.raises(CrossShardRefused) as caught:
            planned(SUBQUERY, bare)

        assert "coordinator" not in str(caught.value)


B = Reader("c-a/1", {"s0": "s0-b", "s1": "s1-b"})
C = Reader("c-a/2", {"s0": "s0-c", "s1": "s1-c"})
THREE = with_coordinator(topology(s0="abc", s1="abc"))
END = 0x2000
"""Where the log of each primary ends in :func:`planning.health`."""


def reading(*readers: Reader, **changes: Any) -> Situation:
    return replace(situation(THREE), readers=lambda _: readers, **changes)


def nodes(found: Plan) -> list[str]:
    return [target.node for target in found.targets]


class TestReplicas:
    def test_replicas_are_read_where_they_may_be(self) -> None:
        found = planned(SUBQUERY, reading(B))

        assert found.coordinators == ("c-a/1",)
        assert [str(target) for target in found.targets] == [
            "s0: replica s0-b, autocommit (read by the coordinator)",
            "s1: replica s1-b, autocommit (read by the coordinator)",
        ]
        assert [target.life for target in found.replicas] == [0, 0]
        assert found.reasons[-1] == "PostgreSQL answers it on the coordinator"

    def test_they_are_asked_for_once_they_are_needed(self) -> None:
        """A statement that needs primaries asks nobody."""
        unknown = replace(situation(THREE), readers=lambda _: None)
        with pytest.raises(UnknownReaders):
            planned(SUBQUERY, unknown)

        strong = replace(unknown, demand=Demand(Consistency.STRONG))
        assert nodes(planned(SUBQUERY, strong)) == ["s0-a", "s1-a"]

    @pytest.mark.parametrize(
        ("facts", "why"),
        [
            ({"s1-b": {"lag": 8.0}}, "c-a/1: s1-b is 8.0 s behind (max_lag 5 s)"),
            ({"s1-b": {"down": "gone"}}, "c-a/1: s1-b is down (gone)"),
            ({"s1-b": {"unseen": True}}, "c-a/1: s1-b is no replica now"),
            (
                {"s1-a": {"down": "gone"}, "s1-b": {"role": "primary", "timeline": 2}},
                "c-a/1: s1-b is no replica now; `sqlroute coordinator refresh`",
            ),
        ],
    )
    def test_all_of_them_or_primaries(self, facts: Mapping[str, Any], why: str) -> None:
        """One that may not be read is enough; the plan says which, and counts as a fallback."""
        found = planned(SUBQUERY, reading(B, health=health(THREE, facts)))

        assert found.reasons[-1].startswith(f"primaries are read: {why}")
        assert found.coordinators == ("c-a", "c-b")
        assert all(target.is_primary and target.is_fallback for target in found.targets)

    def test_another_database_may_be_better(self) -> None:
        behind = health(THREE, {"s1-b": {"lag": 8.0}})

        assert nodes(planned(SUBQUERY, reading(B, C, health=behind))) == ["s0-c", "s1-c"]
        failed = reading(B, C, exclude=frozenset({"c-a/1"}))
        assert planned(SUBQUERY, failed).coordinators == ("c-a/2",)
        refused = replace(B, refused="could not answer: stale")
        assert planned(SUBQUERY, reading(refused, C)).coordinators == ("c-a/2",)
        assert str(planned(SUBQUERY, reading(refused))).endswith("c-a/1: could not answer: stale")

    def test_they_take_turns(self) -> None:
        turns = defaultdict(count)
        found = [planned(SUBQUERY, reading(B, C, turns=turns)).coordinators for _ in range(4)]

        assert found == [("c-a/1",), ("c-a/2",), ("c-a/1",), ("c-a/2",)]

    def test_a_shard_without_replicas_gives_its_primary(self) -> None:
        found = planned(SUBQUERY, reading(Reader("c-a/1", {"s1": "s1-b"})))

        assert nodes(found) == ["s0-a", "s1-b"]
        assert "the shard has no replicas" in found.targets[0].reason
        assert [target.node for target in found.replicas] == ["s1-b"]

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"demand": Demand(Consistency.STRONG)}, "consistency is strong"),
            ({"demand": Demand(role=Role.PRIMARY)}, "the caller asked for the primary"),
            ({"demand": Demand(intent=Intent.WRITING)}, "the session will write"),
            ({"affinity": Affinity().begun()}, "an explicit transaction"),
            ({"affinity": Affinity().pinned("s1", "s1-a")}, "the transaction is open on the"),
        ],
    )
    def test_who_is_bound_to_primaries_reads_them(
        self, changes: Mapping[str, Any], why: str
    ) -> None:
        found = planned(SUBQUERY, reading(B, **changes))

        assert nodes(found) == ["s0-a", "s1-a"]
        assert found.reasons[-1].startswith(f"primaries are read: {why}")
        assert not any(target.is_fallback for target in found.targets)

    def test_who_asks_for_replicas_gets_them(self) -> None:
        """Or primaries, where none may be read: as any read does."""
        asked = Demand(role=Role.REPLICA)
        assert nodes(planned(SUBQUERY, reading(B, demand=asked))) == ["s0-b", "s1-b"]

        old = health(THREE, {"s0-b": {"lag": 8.0}})
        assert nodes(planned(SUBQUERY, reading(B, demand=asked, health=old))) == ["s0-a", "s1-a"]

    def test_what_the_session_has_seen_must_be_there(self) -> None:
        """It is waited for as any read would; not so where another replica has it."""
        seen = Affinity().seen(Position("s1", 1, 1, END, 2))
        late = {"lsn": END - 8, "lag": 0.01}
        behind = health(THREE, {"s1-b": late, "s1-c": late})
        of = reading(B, C, health=behind, affinity=seen)

        found = planned(SUBQUERY, of)
        assert nodes(found) == ["s0-a", "s1-a"]
        assert "s1-b is not known to have what the session has seen" in found.reasons[-2]
        assert "s1-c is not known to have what the session has seen" in found.reasons[-1]
        with pytest.raises(Unproven):
            planned(SUBQUERY, replace(of, may_wait=True))
        one_has_it = health(THREE, {"s1-b": late})
        waiting = reading(B, health=one_has_it, affinity=seen, may_wait=True)
        assert nodes(planned(SUBQUERY, waiting)) == ["s0-a", "s1-a"]
        fresh = reading(B, C, health=one_has_it, affinity=seen, may_wait=True)
        assert nodes(planned(SUBQUERY, fresh)) == ["s0-c", "s1-c"]

    def test_what_one_replica_has_shown_no_other_may_lack(self) -> None:
        seen = Affinity().reading("s1", "s1-c")
        turns: Any = defaultdict(count)

        for _ in range(2):
            found = planned(SUBQUERY, reading(B, C, affinity=seen, turns=turns))
            assert nodes(found) == ["s0-c", "s1-c"]

    def test_a_read_only_transaction_stays_where_it_is(self) -> None:
        within = Affinity().begun(read_only=True).pinned("s1", "s1-c")

        assert nodes(planned(SUBQUERY, reading(B, C, affinity=within))) == ["s0-c", "s1-c"]

    def test_stale_reads_may_be_of_any_age(self) -> None:
        old = health(THREE, {"s1-b": {"lag": 800.0}})
        found = planned(SUBQUERY, reading(B, health=old, demand=Demand(Consistency.EVENTUAL)))

        assert nodes(found) == ["s0-b", "s1-b"]
        assert not any(target.is_proved for target in found.targets)

    def test_the_policy_may_forbid_primaries(self) -> None:
        """Not where there is nothing else by the configuration."""
        policy = Policy(primary_fallback=False)
        old = health(THREE, {"s1-b": {"lag": 8.0}})
        with pytest.raises(NoEligibleNode, match=r"c-a/1: s1-b is 8\.0 s behind.*primary_fallback"):
            planned(SUBQUERY, reading(B, health=old, policy=policy))

        assert nodes(planned(SUBQUERY, reading(policy=policy))) == ["s0-a", "s1-a"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"policy": Policy(no_coordinator=True)}, "the policy no_coordinator forbids it"),
            ({"demand": Demand(partial=True)}, "it reads all shards or none, and sqlroute_partial"),
            ({"demand": Demand(snapshot="SERIALIZABLE")}, "several shards have no common snapshot"),
        ],
    )
    def test_the_error_says_both_reasons(self, changes: Mapping[str, Any], why: str) -> None:
        with pytest.raises(CrossShardRefused) as caught:
            planned(SUBQUERY, replace(ALL, **changes))

        assert str(caught.value).startswith("subquery: customer in it is not tied")
        assert f"nor may the coordinator answer it: {why}" in str(caught.value)
        assert caught.value.clause == "subquery"

    @pytest.mark.parametrize(
        "statement",
        [
            SUBQUERY.with_for_update(),
            sa.select(sa.func.setval("s", 1)).where(Customer.id > average),
            sa.text("SELECT f(name) FROM customer"),
            sa.text("WITH d AS (DELETE FROM customer RETURNING *) SELECT * FROM d"),
            sa.text("SELECT * FROM pg_class"),
        ],
    )
    def test_what_is_not_proved_to_be_a_read_is_refused(self, statement: Any) -> None:
        with pytest.raises(CrossShardRefused, match="only what is proved to be a read runs there"):
            planned(statement, DEMANDED)

    def test_a_declared_reader_is_told_of_the_write(self) -> None:
        reading = Demand(intent=Intent.READING, by_coordinator=True)
        with pytest.raises(ReadOnlyRefused):
            planned(SUBQUERY.with_for_update(), replace(ALL, demand=reading))

    @pytest.mark.parametrize(
        "text",
        ["SELECT id FROM customer TABLESAMPLE system (1)", "select 1 from a tablesample b(1)"],
    )
    def test_a_sample_is_refused(self, text: str) -> None:
        with pytest.raises(CrossShardRefused, match="TABLESAMPLE would be left out"):
            planned(sa.text(text), DEMANDED)

    def test_a_shard_without_a_primary_is_waited_for(self) -> None:
        """``NoPrimary`` is what the runtime waits on."""
        down = health(TWO, {"s1-a": {"down": "gone"}})
        with pytest.raises(NoPrimary, match="s1"):
            planned(SUBQUERY, replace(ALL, health=down))

    def test_a_token_that_was_lost_is_not_read_past(self) -> None:
        seen = Affinity().seen(Position("s1", 1, 1, 0x2000, 2))
        promoted = health(TWO, {"s1-a": {"timeline": 2}, "s1-b": {"timeline": 2}})
        lost = replace(
            ALL, affinity=seen, health=promoted, histories={"s1": History(2, {1: 0x1000})}
        )
        with pytest.raises(LostTimeline):
            planned(SUBQUERY, lost)

    def test_a_setting_sent_by_hand_stays_behind(self) -> None:
        with pytest.raises(CrossShardRefused, match=r"session\.settings"):
            planned(SUBQUERY, replace(ALL, affinity=Affinity().set_by_hand("s0")))


HOST = Host(18, "UTF8", "C.UTF-8", "C.UTF-8", "c", None, None, None, {"TimeZone": "UTC"})
CUSTOMER = TableFacts(
    "public", "customer", (Column("id", "bigint"), Column('na"me', "text")), "HASH (id)"
)
COUNTRY = TableFacts("public", "country", (Column("code", "text", 'pg_catalog."C"'),))
SCHEMA = Schema(("public",), tables=(COUNTRY, CUSTOMER))
EVEN = ShardMap("shop", ("s0", "s1"), 3)


def facts(shard: str, schema: Schema = SCHEMA, **changes: Any) -> ShardFacts:
    bucket = int(shard[1:])
    leaves = {"public.customer": (Leaf("public", f"customer_b00{bucket}", 2, bucket),)}
    values = {"epoch": 3, "fingerprint": f"f{bucket}", "host": HOST, "leaves": leaves, **changes}
    return ShardFacts(shard, "shop", schema=schema, **values)


def defined(*shards: ShardFacts, **changes: Any) -> foreign.Definition:
    node = Node(
        "s", "db", 5432, "shop", "app", Secret("hunter2"), options=(("sslmode", "require"),)
    )
    origins = {
        each.shard: Origin(each.shard, ((f"{each.shard}-a", 5432), (f"{each.shard}-b", 5433)), node)
        for each in shards
    }
    values: dict[str, Any] = {
        "coordinator": Coordinator(()),
        "connect_timeout": 5.0,
        "role": "app",
        **changes,
    }
    return foreign.define(shards, EVEN, values.pop("origins", origins), **values)


def sql_of(definition: foreign.Definition) -> str:
    return ";\n".join(statement.reveal() for statement in definition.statements)


class TestDefinitions:
    def test_each_bucket_is_read_from_its_owner(self) -> None:
        found = sql_of(defined(facts("s0"), facts("s1")))

        for bucket in (0, 1):
            assert (
                f'CREATE FOREIGN TABLE "public"."customer_b00{bucket}" '
                'PARTITION OF "public"."customer" '
                f'FOR VALUES WITH (MODULUS 2, REMAINDER {bucket}) SERVER "s{bucket}" '
                f"OPTIONS (schema_name 'public', table_name 'customer_b00{bucket}')"
            ) in found
        assert (
            'CREATE FOREIGN TABLE "public"."country" ("code" text COLLATE pg_catalog."C")' in found
        )
        assert '"na""me" text' in found

    def test_the_old_leaf_of_a_moved_bucket_is_not_read(self) -> None:
        """Both shards have one; the shard map says whose counts."""
        both = {"public.customer": tuple(Leaf("public", f"c{i}", 2, i) for i in (0, 1))}
        found = sql_of(defined(facts("s0", leaves=both), facts("s1", leaves=both)))

        assert found.count('PARTITION OF "public"."customer"') == 2
        assert found.count("table_name 'c0'") == found.count("table_name 'c1'") == 1

    def test_a_shard_is_looked_for_among_its_nodes(self) -> None:
        """By libpq, which takes the primary: a promotion needs no new definition."""
        found = sql_of(defined(facts("s0"), facts("s1")))

        assert "host 's0-a,s0-b', port '5432,5433'" in found
        assert found.count("target_session_attrs 'primary'") == 4
        assert "sslmode 'require'" in found

    def test_a_replica_is_read_at_its_one_address(self) -> None:
        """And noted by its name; the other shard has none, so its primary is looked for."""
        node = Node("s0-b", "db", 5433, "shop", options=(("hostaddr", "10.0.0.7"),))
        plain = Node("s1-a", "other")
        origins = {
            "s0": Origin("s0", (("db", 5433),), node, is_replica=True),
            "s1": Origin("s1", (("other", 5432),), plain),
        }
        found = sql_of(defined(facts("s0"), facts("s1"), origins=origins))

        assert "hostaddr '10.0.0.7', host 'db', port '5433'" in found
        assert found.count("target_session_attrs 'standby'") == 2
        assert found.count("target_session_attrs 'primary'") == 2
        assert "VALUES ('shop', 's0', 'f0', 's0-b')" in found
        assert "VALUES ('shop', 's1', 'f1', NULL)" in found

    def test_passwords_are_shown_nowhere(self) -> None:
        definition = defined(facts("s0"), facts("s1"))

        assert "password 'hunter2'" in sql_of(definition)
        assert "hunter2" not in repr(definition)
        assert "hunter2" not in str(definition.statements)

    def test_a_bucket_without_a_partition_is_refused(self) -> None:
        with pytest.raises(
            OperationRefused, match=r"bucket 1 of public\.customer belongs to shard s1"
        ):
            defined(facts("s0"), facts("s1", leaves={}))

    def test_a_node_without_a_host_is_refused(self) -> None:
        origin = Origin("s0", (("", 5432),), Node("s0-a", options=(("service", "x"),)))
        with pytest.raises(OperationRefused, match="has no host"):
            defined(facts("s0"), origins={"s0": origin})

    @pytest.mark.parametrize(
        ("table", "why"),
        [
            (replace(COUNTRY, has_row_security=True), "row-level security"),
            (replace(COUNTRY, columns=(Column("c", "regclass", None, True),)), "c regclass"),
        ],
    )
    def test_what_would_be_answered_differently_is_left_out(
        self, table: TableFacts, why: str
    ) -> None:
        schema = replace(SCHEMA, tables=(table, CUSTOMER))
        found = defined(facts("s0", schema), facts("s1", schema))

        assert why in found.left_out["public.country"]
        assert '"country"' not in sql_of(found)
        assert found.tables == ('"public"."customer"',)

    def test_a_partition_with_row_security_counts_as_well(self) -> None:
        leaf = Leaf("public", "customer_b001", 2, 1, has_row_security=True)
        found = defined(facts("s0"), facts("s1", leaves={"public.customer": (leaf,)}))

        assert "row-level security" in found.left_out["public.customer"]

    def test_tables_that_differ_are_no_reference_tables(self) -> None:
        found = defined(facts("s0"), facts("s1"), differing={"public.country"})

        assert "no reference table" in found.left_out["public.country"]

    def test_types_come_before_the_tables_that_use_them(self) -> None:
        schema = replace(
            SCHEMA,
            extensions=(Extension("citext", "public", "1.6"),),
            types=(
                TypeFacts("public", "mood", ("it's", "b\\c")),
                TypeFacts("public", "d", base="int"),
            ),
        )
        found = sql_of(defined(facts("s0", schema), facts("s1", schema)))

        assert "CREATE TYPE \"public\".\"mood\" AS ENUM ('it''s', E'b\\\\c')" in found
        assert found.index('CREATE EXTENSION IF NOT EXISTS "citext"') < found.index("mood")
        assert found.index("AS int") < found.index('CREATE TABLE "public"."customer"')

    def test_long_names_of_shards_stay_apart(self) -> None:
        long = "s" * 63

        names = {foreign.server_name(long), foreign.check_name(long), foreign.server_name("s")}
        assert len(names) == 3
        assert all(len(name.encode()) <= 63 for name in names)


class TestReplicasRead:
    """Which replica of each shard each of the further databases reads."""

    def test_each_database_reads_the_next_replicas(self) -> None:
        of = topology(s0="abc", s1="ab", s2="a")

        assert foreign.replicas_read(of.default.shards, health(of), 5) == (
            {"s0": "s0-b", "s1": "s1-b"},
            {"s0": "s0-c", "s1": "s1-b"},
        )
        assert len(foreign.replicas_read(of.default.shards, health(of), 1)) == 1

    def test_those_that_answer_come_first(self) -> None:
        """One that is down is read last, not left out: it may come back."""
        of = topology(s0="abc", s1="ab")
        down = health(of, {"s0-b": {"down": "gone"}, "s1-b": {"unseen": True}})

        assert foreign.replicas_read(of.default.shards, down, 2) == (
            {"s0": "s0-c", "s1": "s1-b"},
            {"s0": "s0-b", "s1": "s1-b"},
        )

    def test_roles_count_not_the_order_of_the_configuration(self) -> None:
        of = topology(s0="ab")
        promoted = health(of, {"s0-a": {"role": "replica"}, "s0-b": {"role": "primary"}})

        assert foreign.replicas_read(of.default.shards, promoted, 1) == ({"s0": "s0-a"},)

    def test_nothing_is_built_for_shards_without_replicas(self) -> None:
        """Nor for replicas that are to take no reads."""
        nodes = (Node("s0-a"), Node("s0-b", weight=0))
        of = Topology((Keyspace("shop", (Shard("s0", nodes),)),))

        assert foreign.replicas_read(of.default.shards, health(of), 3) == ()


class TestKnownReaders:
    """What is remembered of databases that read replicas."""

    keyspace = ALL.topology.default

    def test_they_are_asked_anew_from_time_to_time(self) -> None:
        """By one caller, the others go on with what was known."""
        now = 0.0
        known = Readers(1.0, lambda: now)
        assert known.of(self.keyspace) is None

        known.learn(self.keyspace, (B, C))
        assert known.of(self.keyspace) == (B, C)
        now = KEPT
        assert known.of(self.keyspace) is None
        assert known.of(self.keyspace) == (B, C)
        known.forget()
        assert known.of(self.keyspace) is None

    def test_one_that_failed_is_left_alone_longer_each_time(self) -> None:
        """However many statements fail at once; until it answers, or is built anew."""
        now = 0.0
        known = Readers(1.0, lambda: now)

        def refused(first: Reader = B) -> list[str]:
            known.learn(self.keyspace, (first, C))
            return [each.refused for each in known.of(self.keyspace) or ()]

        assert refused() == ["", ""]
        for seconds in (ASIDE, 2 * ASIDE, 4 * ASIDE):
            for _ in range(3):
                known.set_aside("c-a/1", "stale")
            now += seconds - 1
            assert refused() == ["could not answer: stale", ""]
            now += 1
            assert refused() == ["", ""]
        known.answered("c-a/1")
        known.set_aside("c-a/1", "stale")
        now += ASIDE
        assert refused() == ["", ""]
        known.set_aside("c-a/1", "stale")
        assert refused(replace(B, built_at="later")) == ["", ""]

    def test_nobody_asks_where_there_are_none(self) -> None:
        coordinator = Coordinator((Node("c-a"),), replicas=0)
        keyspace = replace(ALL.topology.default, coordinator=coordinator)

        assert Readers(1.0).of(keyspace) == ()

    def test_each_node_has_databases_beside_its_own(self) -> None:
        node = Node("c-a", "db", database="all")
        found = Coordinator((node,), replicas=2).readers(node)

        assert [(each.name, each.database) for each in found] == [
            ("c-a/1", "all_1"),
            ("c-a/2", "all_2"),
        ]
        keyspace = replace(ALL.topology.default, coordinator=Coordinator((node,), replicas=2))
        databases = Topology((keyspace,)).coordinators.nodes()
        assert [each.name for each in databases] == ["c-a", "c-a/1", "c-a/2"]


class TestDisagreements:
    def test_shards_alike_can_be_seen_as_one(self) -> None:
        assert foreign.disagreements([facts("s0"), facts("s1")], EVEN) == ()

    def test_types_made_in_another_order_are_alike(self) -> None:
        one, other = TypeFacts("public", "a", ("x",)), TypeFacts("public", "b", ("y",))
        shards = [facts("s0", replace(SCHEMA, types=(one, other)))]
        shards.append(facts("s1", replace(SCHEMA, types=(other, one))))

        assert foreign.disagreements(shards, EVEN) == ()

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            (facts("s1", epoch=2), "shard s1 is at epoch 2 of the shard map, not 3"),
            (facts("s1", Schema(("public",), tables=(COUNTRY,))), "the tables of shards s0 and s1"),
            (facts("s1", host=replace(HOST, collate="C")), "collate is 'C' on s1 and 'C.UTF-8'"),
            (facts("s1", host=replace(HOST, version="2.36")), "version is '2.36' on s1"),
            (
                facts("s1", host=replace(HOST, settings={"TimeZone": "x"})),
                "setting TimeZone is 'x'",
            ),
            (facts("s1", host=replace(HOST, major=15)), "major version is 15 on s1 and 18 on s0"),
        ],
    )
    def test_each_difference_is_named(self, other: ShardFacts, why: str) -> None:
        (found,) = foreign.disagreements([facts("s0"), other], EVEN)

        assert why in found

    def test_a_name_that_would_be_cut_is_refused(self) -> None:
        with pytest.raises(OperationRefused, match="more than 63 bytes"):
            foreign.database("c" * 62 + "_1", HOST)

    def test_a_database_is_made_alike(self) -> None:
        icu = replace(HOST, provider="i", locale="en-US", rules=None)

        assert foreign.database('c"d', icu) == (
            "CREATE DATABASE \"c\"\"d\" TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C.UTF-8' "
            "LC_CTYPE 'C.UTF-8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
        )

    def test_settings_are_those_of_the_shards(self) -> None:
        own = replace(HOST, settings={"TimeZone": "UTC", "search_path": "public"})
        like = replace(HOST, settings={"TimeZone": "Asia/Tokyo", "search_path": '"$user", shop'})

        assert foreign.settings("c", own, like)[:2] == (
            "ALTER DATABASE \"c\" SET TimeZone = 'Asia/Tokyo'",
            'ALTER DATABASE "c" SET search_path = "$user", shop',
        )
