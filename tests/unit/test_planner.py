"""A plan of each execution: shapes are remembered, values are not."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from planning import EVERY, FOUR, health, planned, shards, situation, statements, topology

from sqlroute.errors import (
    CrossShardRefused,
    MissingShardKey,
    NoPrimary,
    PlanError,
    ShardMapUnavailable,
)
from sqlroute.routing.affinity import Affinity
from sqlroute.routing.plan import Tier
from sqlroute.routing.planner import (
    SHAPES,
    Planner,
    plan,
)
from sqlroute.routing.policy import Policy
from sqlroute.routing.target import Unproven, bind_target
from sqlroute.routing.token import Position
from sqlroute.topology import ShardMap

Customer, Order, Country = statements.Customer, statements.Order, statements.Country
ONE, OTHER = 5, 1
AT_ONE, AT_OTHER = ("s1",), ("s0",)


@pytest.fixture
def planner() -> Planner:
    return Planner(FOUR.topology)


def shape_of(planner: Planner, statement: Any, parameters: Any = None) -> Any:
    return planner.describe(statement, parameters).shape


class TestShapes:
    """A shape is described once; every execution brings its own values."""

    def test_another_value_is_the_same_shape(self, planner: Planner) -> None:
        one = sa.select(Customer).where(Customer.id == ONE)
        other = sa.select(Customer).where(Customer.id == OTHER)

        assert shape_of(planner, one) is shape_of(planner, other)

    def test_another_value_is_another_shard(self, planner: Planner) -> None:
        one = sa.select(Customer).where(Customer.id == ONE)
        other = sa.select(Customer).where(Customer.id == OTHER)

        assert shards(one, planner=planner) == AT_ONE
        assert shards(other, planner=planner) == AT_OTHER
        assert shards(one, planner=planner) == AT_ONE

    def test_values_beside_the_key_do_not_change_places(self, planner: Planner) -> None:
        def of(key: int, name: str) -> Any:
            return sa.select(Customer).where(Customer.name == name, Customer.id == key)

        assert shards(of(ONE, "x"), planner=planner) == AT_ONE
        assert shards(of(OTHER, "y"), planner=planner) == AT_OTHER

    def test_one_statement_with_other_parameters(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == sa.bindparam("key"))

        assert shards(statement, {"key": ONE}, planner=planner) == AT_ONE
        assert shards(statement, {"key": OTHER}, planner=planner) == AT_OTHER

    def test_parameters_win_over_the_value_inside(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == sa.bindparam("key", OTHER))

        assert shards(statement, planner=planner) == AT_OTHER
        assert shards(statement, {"key": ONE}, planner=planner) == AT_ONE

    def test_params_of_a_statement_are_its_values(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == sa.bindparam("key", OTHER))

        assert shards(statement, planner=planner) == AT_OTHER
        assert shards(statement.params(key=ONE), planner=planner) == AT_ONE

    def test_another_name_of_the_parameter(self, planner: Planner) -> None:
        """Names of parameters are no part of a shape, so the first one must not be remembered."""
        for name, key, expected in (("a", ONE, AT_ONE), ("b", OTHER, AT_OTHER)):
            statement = sa.select(Customer).where(Customer.id == sa.bindparam(name))

            assert shards(statement, {name: key}, planner=planner) == expected

    def test_lists_of_other_lengths(self, planner: Planner) -> None:
        for keys, expected in (([ONE], AT_ONE), ([ONE, OTHER], ("s0", "s1")), ([], ())):
            statement = sa.select(Customer).where(Customer.id.in_(keys))

            assert shards(statement, planner=planner) == expected

    def test_null_after_a_value(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == sa.bindparam("key"))
        shards(statement, {"key": ONE}, planner=planner)

        assert shards(statement, {"key": None}, planner=planner) == ()

    def test_parameter_without_a_value_may_be_anywhere(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == sa.bindparam("key"))

        assert shards(statement, planner=planner) == EVERY

    def test_anonymous_parameter_given_by_its_name_in_the_sql(self, planner: Planner) -> None:
        """SQLAlchemy lets ``id_1`` replace the value inside."""
        statement = sa.select(Customer).where(Customer.id == OTHER)

        assert shards(statement, {"id_1": ONE}, planner=planner) == EVERY
        assert shards(statement, {"unrelated": ONE}, planner=planner) == AT_OTHER

    def test_callable_parameter(self, planner: Planner) -> None:
        key = sa.bindparam("key", callable_=lambda: ONE, type_=sa.BigInteger)

        assert shards(sa.select(Customer).where(Customer.id == key), planner=planner) == AT_ONE

    def test_lambda_statement(self, planner: Planner) -> None:
        def of(key: int) -> Any:
            return sa.lambda_stmt(lambda: sa.select(Customer).where(Customer.id == key))

        assert shards(of(ONE), planner=planner) == AT_ONE
        assert shards(of(OTHER), planner=planner) == AT_OTHER

    def test_lambda_criteria(self, planner: Planner) -> None:
        def of(key: int) -> Any:
            return sa.select(Customer).where(lambda: Customer.id == key)

        assert shards(of(ONE), planner=planner) == AT_ONE
        assert shards(of(OTHER), planner=planner) == AT_OTHER

    def test_loader_criteria(self, planner: Planner) -> None:
        def of(key: int) -> Any:
            only = sa.orm.with_loader_criteria(Order, Order.customer_id == key)
            return sa.select(Order).options(only)

        assert shards(of(ONE), planner=planner) == AT_ONE
        assert shards(of(OTHER), planner=planner) == AT_OTHER

    def test_statement_that_cannot_be_cached(self, planner: Planner) -> None:
        class Uncached(sa.TypeDecorator[int]):
            impl = sa.BigInteger
            cache_ok = False

        key = sa.literal(ONE, Uncached())

        assert shards(sa.select(Customer).where(Customer.id == key), planner=planner) == AT_ONE

    def test_shapes_are_not_kept_without_end(self, planner: Planner) -> None:
        for number in range(SHAPES + 10):
            planner.describe(sa.select(sa.literal(1).label(f"n{number}")))

        first = sa.select(sa.literal(1).label("n0"))
        assert shape_of(planner, first) is shape_of(planner, first)

    def test_a_statement_that_is_refused_is_refused_again(self, planner: Planner) -> None:
        statement = statements.STATEMENTS["orders_of_equal_total"]

        for _ in range(2):
            with pytest.raises(CrossShardRefused):
                shards(statement, planner=planner)

    def test_a_merge_serves_other_limits(self, planner: Planner) -> None:
        for limit in (3, 7):
            statement = sa.select(Customer.id).order_by(Customer.id).limit(limit)
            found = planned(statement, of=FOUR, planner=planner)

            assert f"limit {limit} after merge; limit {limit} per shard" in found.merge


class TestManyRows:
    """One statement with a row of parameters each has no single key."""

    @pytest.mark.parametrize("rows", [[{"key": ONE}], [{"key": ONE}, {"key": OTHER}]])
    def test_update_is_refused(self, planner: Planner, rows: Any) -> None:
        """Also where the parameter has a value inside, which no row uses."""
        statement = sa.update(Customer).where(Customer.id == sa.bindparam("key", OTHER))

        with pytest.raises(MissingShardKey):
            shards(statement.values(name="x"), rows, planner=planner)

    def test_insert_is_split(self, planner: Planner) -> None:
        rows = [{"id": key, "name": "x"} for key in (ONE, OTHER, ONE)]

        found = planned(sa.insert(Customer), rows, of=FOUR, planner=planner)

        assert found.tier is Tier.SPLIT
        assert dict(zip(found.shards, found.rows, strict=True)) == {"s1": (0, 2), "s0": (1,)}

    def test_insert_of_one_shard_is_whole(self, planner: Planner) -> None:
        found = planned(sa.insert(Customer), [{"id": ONE}, {"id": ONE}], of=FOUR, planner=planner)

        assert found.tier is Tier.SINGLE

    def test_insert_of_several_shards_with_a_subquery_is_refused(self, planner: Planner) -> None:
        total = sa.select(sa.func.sum(Order.total)).where(Order.customer_id == ONE)
        statement = sa.insert(Order).values(id=1, total=total.scalar_subquery())

        with pytest.raises(CrossShardRefused):
            planned(
                statement, [{"customer_id": ONE}, {"customer_id": OTHER}], of=FOUR, planner=planner
            )

    def test_insert_with_a_subquery_of_reference_tables_is_right(self, planner: Planner) -> None:
        count = sa.select(sa.func.count()).select_from(Country).scalar_subquery()
        statement = sa.insert(Order).values(id=1, total=count)

        assert planned(statement, {"customer_id": ONE}, of=FOUR, planner=planner).shards == AT_ONE


class TestMaps:
    def test_moved_bucket_is_where_the_new_map_says(self, planner: Planner) -> None:
        """A shape is remembered, a map is not."""
        statement = sa.select(Customer).where(Customer.id == ONE)
        before = planned(statement, of=FOUR, planner=planner)
        old = FOUR.maps["shop"]
        new = ShardMap("shop", ("s3",) * len(old.owners), old.epoch + 1)
        after = planned(statement, of=situation(FOUR.topology, maps={"shop": new}), planner=planner)

        assert (before.shards, before.epoch) == (AT_ONE, 1)
        assert (after.shards, after.epoch) == (("s3",), 2)

    def test_scatter_leaves_out_shards_without_buckets(self, planner: Planner) -> None:
        owners = tuple("s0" if i % 2 else "s2" for i in range(16))
        around = situation(FOUR.topology, maps={"shop": ShardMap("shop", owners)})

        found = planned(sa.select(Customer), of=around, planner=planner)

        assert set(found.shards) == {"s0", "s2"}

    def test_reasons_of_a_remembered_shape_are_whole(self, planner: Planner) -> None:
        statement = sa.select(Customer).where(Customer.id == ONE)

        assert planned(statement, of=FOUR, planner=planner) == planned(
            statement, of=FOUR, planner=planner
        )

    def test_kind_is_never_taken_from_another_statement(self, planner: Planner) -> None:
        read = sa.select(Customer).where(Customer.id == ONE)
        lock = read.with_for_update()

        assert planned(read, of=FOUR, planner=planner).kind == "read"
        assert planned(lock, of=FOUR, planner=planner).kind == "write"

    def test_distrusted_shape_goes_to_primaries_and_says_why(self, planner: Planner) -> None:
        around = situation(topology(s0="ab", s1="ab", s2="ab", s3="ab"))
        read = sa.select(Customer).where(Customer.id == ONE)
        before = planned(read, of=around, planner=planner)

        shape_of(planner, read).distrust("s1-b refused it as a write")
        after = planned(read, of=around, planner=planner)

        assert (before.target.node, after.target.node) == ("s1-b", "s1-a")
        assert after.reasons[0] == "s1-b refused it as a write"
        assert after.reasons[1:] == before.reasons[1:]


class TestNodes:
    of = topology(s0="abc", s1="abc")
    statement = sa.select(Customer).where(Customer.id == ONE)

    def choose(self, seed: int = 1, **changes: Any) -> str:
        around = situation(self.of, **changes)
        return planned(self.statement, of=around, seed=seed).target.node

    def test_every_replica_gets_its_share(self) -> None:
        nodes = [self.choose(seed) for seed in range(200)]

        assert {nodes.count(node) > 60 for node in ("s1-b", "s1-c")} == {True}

    def test_less_loaded_replica_is_taken(self) -> None:
        nodes = {self.choose(seed, loads={"s1-b": 3, "s1-c": 1}) for seed in range(20)}

        assert nodes == {"s1-c"}

    def test_first_read_of_a_read_only_transaction_is_in_it(self) -> None:
        """What is remembered for reads outside of transactions is not what it gets."""
        for affinity, expected in ((Affinity(), False), (Affinity().begun(read_only=True), True)):
            around = situation(self.of, affinity=affinity)

            assert planned(self.statement, of=around).target.in_transaction is expected

    def test_policies_share_a_health_and_no_choice(self) -> None:
        """The health remembers which replicas a policy allows."""
        late = health(self.of, {"s1-b": {"lag": 3.0}, "s1-c": {"lag": 0.1}})
        for most, expected in ((5.0, {"s1-b", "s1-c"}), (1.0, {"s1-c"}), (5.0, {"s1-b", "s1-c"})):
            policy = Policy(max_lag=most)

            nodes = {self.choose(seed, health=late, policy=policy) for seed in range(20)}

            assert nodes == expected

    def test_ties_of_another_shard_do_not_matter(self) -> None:
        nodes = {self.choose(seed, affinity=Affinity().pinned("s0", "s0-a")) for seed in range(20)}

        assert nodes == {"s1-b", "s1-c"}

    def test_unproven_names_the_shard_to_ask(self) -> None:
        affinity = Affinity().committed(Position("s1", 1, 1, 2**40))
        around = situation(self.of, affinity=affinity, may_wait=True)

        with pytest.raises(Unproven) as caught:
            planned(self.statement, of=around)

        assert caught.value.shard == "s1"

    def test_fresh_replica_is_taken_without_asking_the_others(self) -> None:
        facts = {"s1-b": {"lag": 1.0}}
        affinity = Affinity().committed(Position("s1", 1, 1, 0x2000))

        nodes = {
            self.choose(seed, affinity=affinity, may_wait=True, health=health(self.of, facts))
            for seed in range(20)
        }

        assert nodes == {"s1-c"}

    def test_bind_is_in_the_transaction(self) -> None:
        target = bind_target("s1", situation(self.of), Random(1))

        assert (target.node, target.is_primary, target.in_transaction) == ("s1-a", True, True)

    def test_bind_without_a_primary(self) -> None:
        gone = health(self.of, {"s1-a": {"down": "connection refused"}})

        with pytest.raises(NoPrimary, match=r"s1-a is down \(connection refused\)") as caught:
            bind_target("s1", situation(self.of, health=gone), Random(1))

        assert caught.value.retryable

    def test_planning_is_a_function_of_its_arguments(self) -> None:
        planner = Planner(self.of)
        around = situation(self.of, policy=Policy())
        described = planner.describe(sa.select(Customer))

        assert plan(described, around, Random(3)) == plan(described, around, Random(3))

    def test_plan_is_json_ready(self) -> None:
        found = planned(self.statement, of=situation(self.of)).describe()

        assert found["tier"] == "single"
        assert found["targets"][0]["role"] == "replica"
        names = {"tier", "kind", "epoch", "coordinators", "targets", "missing", "merge", "reasons"}
        assert set(found) == names


class TestPartial:
    """Shards that cannot answer are left out of a read of several, if the caller says so."""

    of = topology(s0="ab", s1="ab", s2="a")
    keys = tuple(range(1, 40))

    def around(self, *gone: str, **changes: Any) -> Any:
        facts = {node: {"down": "connection refused"} for node in gone}
        return situation(self.of, **{"partial": True, "health": health(self.of, facts), **changes})

    def test_the_others_answer_and_it_is_named(self) -> None:
        found = planned(sa.select(Customer), of=self.around("s1-a", "s1-b"))

        assert (found.tier, found.shards) == (Tier.SCATTER, ("s0", "s2"))
        (missing,) = found.missing
        assert missing.shard == "s1"
        assert "s1-a is down (connection refused)" in missing.reason

    def test_a_shard_that_is_left_answers_alone(self) -> None:
        """Merged still: what it is sent is a part of an aggregate."""
        found = planned(sa.select(Customer), of=self.around("s1-a", "s1-b", "s2-a"))

        assert (found.tier, found.shards) == (Tier.SCATTER, ("s0",))

    def test_a_shard_with_a_replica_is_not_left_out(self) -> None:
        found = planned(sa.select(Customer), of=self.around("s1-a"))

        assert found.shards == ("s0", "s1", "s2")
        assert found.missing == ()

    def test_a_shard_that_did_not_confirm_the_map_is_left_out(self) -> None:
        silent = {"s2": ShardMapUnavailable("shard s2 did not confirm epoch 1", "s2")}
        found = planned(sa.select(Customer), of=self.around(silent=silent))

        assert found.shards == ("s0", "s1")
        assert [str(gone) for gone in found.missing] == ["s2: shard s2 did not confirm epoch 1"]

    def test_each_shard_is_sent_its_own_keys(self) -> None:
        statement = sa.select(Customer).where(Customer.id.in_(self.keys))
        whole = planned(statement, of=situation(self.of))
        found = planned(statement, of=self.around("s1-a", "s1-b"))

        def lists(plan: Any) -> dict[str, Any]:
            sent = (list(mine.values()) for mine in plan.lists)
            return dict(zip(plan.shards, sent, strict=True))

        assert lists(found) == {k: v for k, v in lists(whole).items() if k != "s1"}

    def test_no_shard_at_all_is_an_error(self) -> None:
        with pytest.raises(NoPrimary, match="shard s0 has no primary"):
            planned(sa.select(Customer), of=self.around("s0-a", "s0-b", "s1-a", "s1-b", "s2-a"))

    def test_without_it_a_shard_that_is_down_is_an_error(self) -> None:
        with pytest.raises(NoPrimary, match="shard s1 has no primary"):
            planned(sa.select(Customer), of=self.around("s1-a", "s1-b", partial=False))

    @pytest.mark.parametrize(
        "statement",
        [
            sa.update(Customer).where(Customer.id == ONE).values(name="x"),
            sa.insert(Customer).values(id=ONE, name="x"),
            sa.select(Customer).with_for_update(),
            sa.text("SELECT something()"),
        ],
        ids=["update", "insert", "lock", "unknown"],
    )
    def test_only_reads_may_be(self, statement: Any) -> None:
        with pytest.raises(PlanError, match="sqlroute_partial on what is not proved to be a read"):
            planned(statement, of=self.around())
