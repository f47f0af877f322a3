"""Names that stand for several servers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from sqlroute.config import load
from sqlroute.errors import ConfigError
from sqlroute.runtime import discovery, inquiry
from sqlroute.runtime.discovery import Answer, Discovery, ask_dns
from sqlroute.topology import Announced, Topology


def topology(*urls: str) -> Topology:
    shards = [{"name": "s0", "nodes": list(urls)}]
    return load({"keyspaces": {"main": {"shards": shards}}}, environ={}).topology


PRIMARY = "postgresql://app@db-a:5432/shop"
NAME = "postgresql://app@replicas.internal:5433/shop?discover=dns&zone=b&sslmode=verify-full"


class TestTopology:
    def test_each_address_is_a_node(self) -> None:
        """With the name for TLS, the address for connecting, and all else as configured."""
        declared = topology(PRIMARY, NAME)
        found = declared.discovered({"replicas.internal": ("10.0.0.1", "fd00::2")})
        nodes = found.shard("s0").nodes

        assert [node.name for node in nodes] == [
            "s0-db-a:5432",
            "s0-replicas.internal:5433@10.0.0.1",
            "s0-replicas.internal:5433@[fd00::2]",
        ]
        assert nodes[1].conninfo() == {
            "host": "replicas.internal",
            "hostaddr": "10.0.0.1",
            "port": 5433,
            "dbname": "shop",
            "user": "app",
            "sslmode": "verify-full",
        }
        assert (nodes[1].zone, nodes[1].discovers) == ("b", False)

    def test_a_name_nobody_knows_stays_a_node(self) -> None:
        """So that `status` can say what is wrong with it."""
        declared = topology(PRIMARY, NAME)
        assert declared.discovered({}) == declared

    def test_without_names_nothing_is_made(self) -> None:
        declared = topology(PRIMARY)
        assert declared.discovered({"db-a": ("10.0.0.1",)}) is declared

    @pytest.mark.parametrize(
        ("url", "fault"),
        [
            ("postgresql://app@db/shop?discover=srv", "discover must be dns"),
            ("postgresql:///shop?service=x&discover=dns", "needs a host name"),
            ("postgresql:///shop?host=/run/postgresql&discover=dns", "needs a host name"),
        ],
    )
    def test_bad_input_is_named(self, url: str, fault: str) -> None:
        with pytest.raises(ConfigError, match=fault):
            topology(url)


class Names:
    """A name server."""

    def __init__(self, *addresses: str, ttl: float = 0.0) -> None:
        self.answer: Answer | OSError = Answer(addresses, ttl)
        self.asked = 0

    def __call__(self, host: str) -> Answer:
        self.asked += 1
        assert host == "replicas.internal"
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def nobody(shard: str, revision: int) -> Announced:
    raise AssertionError("no catalog is asked")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestDiscovery:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(discovery, "SHORTEST", 0.01)
        monkeypatch.setattr(inquiry, "PATIENCE", 0.01)

    def run(self, names: Names) -> tuple[Discovery, list[Topology]]:
        published: list[Topology] = []
        found = Discovery(
            topology(PRIMARY, NAME),
            lambda: published.append(found.topology),
            ask_catalog=nobody,
            ask_name=names,
        )
        found.start(5)
        return found, published

    def test_changes_are_published_once(self) -> None:
        """In whatever order the name server gives them."""
        names = Names("10.0.0.2", "10.0.0.1")
        found, published = self.run(names)
        try:
            until(lambda: names.asked > 3)
            names.answer = Answer(("10.0.0.1", "10.0.0.2", "10.0.0.1"), 0)
            until(lambda: names.asked > 6)
            assert [len(t.shard("s0").nodes) for t in published] == [3]
            names.answer = Answer(("10.0.0.3",), 0)
            until(lambda: len(published) == 2)
            assert [n.name for n in published[-1].shard("s0").nodes][1:] == [
                "s0-replicas.internal:5433@10.0.0.3"
            ]
        finally:
            found.close()

    @pytest.mark.parametrize("failure", [OSError("no answer"), Answer((), 0)])
    def test_a_failure_changes_nothing(
        self, failure: Answer | OSError, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is said once, and the servers known before stay."""
        names = Names("10.0.0.1")
        found, published = self.run(names)
        try:
            names.answer = failure
            before = names.asked
            until(lambda: names.asked > before + 4)
            assert len(published) == 1
            warnings = [r for r in caplog.records if "nothing changes" in r.message]
            assert len(warnings) == 1
            assert "addresses of replicas.internal" in warnings[0].message
        finally:
            found.close()

    def test_an_answer_is_believed_as_long_as_it_says(self) -> None:
        """Within bounds."""
        short, long = Names("10.0.0.1", ttl=0.0), Names("10.0.0.1", ttl=60)
        found, other = self.run(long)[0], self.run(short)[0]
        try:
            until(lambda: short.asked > 10)
            assert long.asked == 1
        finally:
            found.close()
            other.close()

    def test_without_names_there_is_no_thread(self) -> None:
        before = threading.active_count()
        found = Discovery(topology(PRIMARY), lambda: None, ask_catalog=nobody, ask_name=Names())
        found.start(5)
        assert threading.active_count() == before


def test_the_system_is_asked_for_what_dns_does_not_know() -> None:
    """``localhost`` stands in a table of this machine."""
    found = ask_dns("localhost")
    assert {"127.0.0.1", "::1"} & set(found.addresses)
    assert found.ttl > 0
    with pytest.raises(socket.gaierror):
        ask_dns("nobody.invalid")
