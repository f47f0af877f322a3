"""Topology and shard maps are values: a change is a new one, a wrong name is an error."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from sqlroute.errors import UnknownName, UnownedBucket
from sqlroute.topology import (
    Announced,
    Keyspace,
    Node,
    Place,
    Secret,
    Shard,
    ShardMap,
    Topology,
)

SHOP = Keyspace("shop", (Shard("s0", (Node("a"), Node("b"))), Shard("s1", (Node("c"),))), buckets=8)
LOGS = Keyspace("logs", (Shard("l0", (Node("d"),)),))
TOPOLOGY = Topology((SHOP, LOGS))


class TestSecret:
    secret = Secret("hunter2")

    @pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, "%s".__mod__])
    def test_no_text_shows_it(self, show: Any) -> None:
        assert show(self.secret) == "***"
        assert "hunter2" not in show((self.secret,))

    def test_node_does_not_show_it(self) -> None:
        assert "hunter2" not in repr(Node("a", password=self.secret))

    def test_connection_gets_it(self) -> None:
        assert Node("a", password=self.secret).conninfo()["password"] == "hunter2"

    def test_equal_texts_are_equal_secrets(self) -> None:
        assert Secret("x") == Secret("x")
        assert hash(Secret("x")) == hash(Secret("x"))
        assert Secret("x") != Secret("y")
        assert Secret("x") != "x"


class TestNode:
    def test_only_what_is_said_goes_to_libpq(self) -> None:
        assert Node("a").conninfo() == {"port": 5432}

    def test_everything_that_is_said_goes_to_libpq(self) -> None:
        node = Node("a", "db", 6432, "shop", "app", options=(("sslmode", "require"),))

        assert node.conninfo() == {
            "host": "db", "port": 6432, "dbname": "shop", "user": "app", "sslmode": "require",
        }  # fmt: skip

    def test_service_names_its_own_port(self) -> None:
        assert Node("a", options=(("service", "shop"),)).conninfo() == {"service": "shop"}

    def test_port_that_is_said_wins_over_the_service(self) -> None:
        node = Node("a", port=6432, options=(("service", "shop"),))

        assert node.conninfo() == {"service": "shop", "port": 6432}

    def test_name_is_its_text(self) -> None:
        assert str(Node("a", "db")) == "a"


class TestNames:
    def test_everything_is_found_by_name(self) -> None:
        assert TOPOLOGY.keyspace("logs") is LOGS
        assert TOPOLOGY.shard("s1") is SHOP.shards[1]
        assert TOPOLOGY.node("d") is LOGS.shards[0].nodes[0]
        assert TOPOLOGY.shard_of_node["b"] == "s0"
        assert TOPOLOGY.keyspace_of_shard["l0"] is LOGS

    @pytest.mark.parametrize(
        ("what", "known"),
        [("keyspace", "shop, logs"), ("shard", "s0, s1, l0"), ("node", "a, b, c, d")],
    )
    def test_unknown_name_lists_the_known_ones(self, what: str, known: str) -> None:
        with pytest.raises(UnknownName) as caught:
            getattr(TOPOLOGY, what)("nix")

        assert str(caught.value) == f"unknown {what} 'nix'; known: {known}"

    def test_first_keyspace_is_the_default(self) -> None:
        assert TOPOLOGY.default is SHOP

    def test_one_shard_is_not_sharded(self) -> None:
        assert SHOP.is_sharded
        assert not LOGS.is_sharded

    def test_nodes_come_in_the_order_of_the_configuration(self) -> None:
        assert [node.name for node in TOPOLOGY.nodes()] == ["a", "b", "c", "d"]

    def test_values_cannot_be_changed(self) -> None:
        with pytest.raises(FrozenInstanceError):
            SHOP.buckets = 16  # type: ignore[misc]
        with pytest.raises(TypeError):
            TOPOLOGY.shard_of_node["a"] = "s1"  # type: ignore[index]


class TestShardMap:
    even = ShardMap.even(SHOP)

    def test_even_map_is_regular(self) -> None:
        assert self.even.owners == ("s0", "s1") * 4
        assert self.even.epoch == 1

    def test_every_bucket_has_one_owner(self) -> None:
        buckets = [self.even.buckets_of(shard) for shard in self.even.shards]

        assert sorted(bucket for found in buckets for bucket in found) == list(range(8))

    def test_owner_of_a_bucket(self) -> None:
        assert [self.even.owner(bucket) for bucket in (0, 1, 7)] == ["s0", "s1", "s1"]

    def test_move_is_the_next_epoch(self) -> None:
        moved = self.even.moved(0, "s1")

        assert (moved.owner(0), moved.epoch) == ("s1", 2)
        assert moved.owners[1:] == self.even.owners[1:]
        assert (self.even.owner(0), self.even.epoch) == ("s0", 1)

    def test_shard_that_lost_its_last_bucket_is_gone(self) -> None:
        found = self.even
        for bucket in found.buckets_of("s0"):
            found = found.moved(bucket, "s1")

        assert found.shards == ("s1",)
        assert found.buckets_of("s0") == ()

    def test_bucket_of_nobody_is_an_error(self) -> None:
        hole = ShardMap("shop", ("s0", ""), 3)

        assert hole.shards == ("s0",)
        with pytest.raises(UnownedBucket, match=r"bucket 1 of keyspace shop .* epoch 3"):
            hole.owner(1)

    def test_a_map_with_gaps_is_not_all_shards(self) -> None:
        """A scatter over it would pass for the whole table and not be it."""
        self.even.check_complete()
        with pytest.raises(UnownedBucket, match="bucket 1"):
            ShardMap("shop", ("s0", ""), 3).check_complete()

    def test_equal_maps_are_equal(self) -> None:
        assert ShardMap.even(SHOP) == self.even
        assert self.even.moved(0, "s0") != self.even


class TestPlaces:
    """Servers that no file names."""

    LOGIN = Node(
        "s0-a",
        "db-a",
        5433,
        "shop",
        "app",
        Secret("pw"),
        zone="a",
        weight=2,
        options=(("hostaddr", "10.0.0.1"), ("sslmode", "verify-full")),
        pooler="transaction",
    )
    SHARD = Shard("s0", (LOGIN, Node("s0-b", "db-b")))

    def test_they_are_connected_as_the_first_of_the_file(self) -> None:
        """All that is of one server alone is their own."""
        assert self.LOGIN.placed(Place("s0-c", "db-c", 5434, "c", 0.5)) == Node(
            "s0-c",
            "db-c",
            5434,
            "shop",
            "app",
            Secret("pw"),
            zone="c",
            weight=0.5,
            options=(("sslmode", "verify-full"),),
        )

    def test_a_port_of_theirs_is_before_that_of_a_service_file(self) -> None:
        """Also the port that is the usual one."""
        login = Node("s0-a", options=(("service", "shop"),))
        assert "port" not in login.conninfo()
        assert login.placed(Place("s0-c", "db-c")).conninfo() == {
            "service": "shop",
            "host": "db-c",
            "port": "5432",
        }

    def test_what_the_file_names_keeps_its_name(self) -> None:
        """Where another source tells the same server."""
        members = (Place("s0-pg0", "db-a", 5433), Place("s0-pg1", "db-c"))
        found = self.SHARD.consisting_of(members)
        assert found.nodes == (self.LOGIN, self.LOGIN.placed(members[1]))

    def test_added_and_removed(self) -> None:
        """By the name, or by the address; an address that is there already is no new node."""
        added = (Place("s0-c", "db-c"), Place("again", "db-a", 5433), Place("s0-b", "elsewhere"))
        found = self.SHARD.announced(Announced(1, added))
        assert [node.name for node in found.nodes] == ["s0-a", "s0-b", "s0-c"]
        found = self.SHARD.announced(Announced(2, added, (Place("x", "db-b"), Place("s0-a", ""))))
        assert [node.name for node in found.nodes] == ["s0-c", "again", "s0-b"]

    def test_the_last_node_stays(self) -> None:
        everything = (Place("s0-a", ""), Place("s0-b", ""))
        assert self.SHARD.announced(Announced(1, (), everything)).nodes == (self.LOGIN,)

    def test_names_stay_unique_over_all_shards(self) -> None:
        """A member goes by its address where its name is taken; what is announced does not come."""
        topology = Topology((Keyspace("shop", (self.SHARD, Shard("s1", (Node("s1-x", "db-x"),)))),))
        found = topology.consisting_of({"s1": (Place("s0-a", "db-y", 5435),)})
        assert [n.name for n in found.nodes()] == ["s0-a", "s0-b", "s1-db-y:5435"]
        place = (Place("new", "db-n"),)
        found = topology.announced({"s0": Announced(1, place), "s1": Announced(1, place)})
        assert found.shard_of_node["new"] == "s0"
        assert [n.name for n in found.nodes()] == ["s0-a", "s0-b", "new", "s1-x"]

    def test_without_news_nothing_is_made(self) -> None:
        topology = Topology((Keyspace("shop", (self.SHARD,)),))
        assert topology.announced({"s0": Announced(7)}) is topology
        assert topology.consisting_of({}) is topology
