"""Patroni's REST API: what it tells of a cluster, and what is made of its answers.

The API here is an HTTP server that says what Patroni 4.1 was seen to say; a real one is asked in
``tests/integration/test_patroni.py``.
"""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sqlroute import Router
from sqlroute.config import describe, load
from sqlroute.errors import ConfigError, NoPrimary, OperationFailed, OperationRefused
from sqlroute.ext import patroni
from sqlroute.ext.patroni import Cluster, Member, Patroni, PatroniSilent, Scheduled, cluster_of
from sqlroute.runtime import inquiry
from sqlroute.runtime.discovery import Discovery
from sqlroute.testing import free_ports
from sqlroute.topology import Announced, RestApi, Secret, Topology

PASSWORD = "hunter2"


def member(name: str, role: str = "replica", **said: Any) -> dict[str, Any]:
    state = "running" if role == "leader" else "streaming"
    port = 5400 + int(name[-1])
    found = {"name": name, "role": role, "state": state, "host": "10.0.0.1", "port": port}
    return {**found, "timeline": 1, **said}


class Api:
    """One REST API, for all members: who leads, and what is answered, is set by the test."""

    def __init__(self, port: int, scheme: str = "http") -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.members = [member("pg0", "leader"), member("pg1"), member("pg2", lag=16)]
        self.more: dict[str, Any] = {}
        self.status = 200
        self.promoted: set[str] = set()
        self.answer: Callable[[], tuple[int, str] | None] = lambda: (200, "done")
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.credentials: list[tuple[str, str | None]] = []

    def said(self) -> dict[str, Any]:
        """Return the body of ``GET /cluster``."""
        api = {"api_url": f"{self.url}/patroni"}
        return {"members": [{**api, **m} for m in self.members], "scope": "shop", **self.more}

    def lead(self, name: str, *, is_promoted: bool = True) -> None:
        """Let a member hold the lease; its server is the primary at once or not yet."""
        self.members = [
            {**m, "role": "leader" if m["name"] == name else "replica", "state": "running"}
            for m in self.members
        ]
        self.promoted = {name} if is_promoted else set()


class _Handler(BaseHTTPRequestHandler):
    api: Api

    def do_GET(self) -> None:
        self.api.credentials.append(("GET", self.headers.get("Authorization")))
        if self.path == "/cluster":
            self._say(self.api.status, json.dumps(self.api.said()))
        else:
            role = "primary" if self.api.promoted else "replica"
            self._say(200, json.dumps({"state": "running", "role": role, "timeline": 2}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.api.credentials.append(("POST", self.headers.get("Authorization")))
        self.api.asked.append(("POST", self.path, body))
        answer = self.api.answer()
        if answer is not None:
            self._say(*answer)

    def _say(self, status: int, text: str) -> None:
        with suppress(ConnectionError):  # who has seen enough does not wait for it
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(api: Api, context: ssl.SSLContext | None = None) -> Iterator[Api]:
    handler = type("Handler", (_Handler,), {"api": api})
    with ThreadingHTTPServer(("127.0.0.1", api.port), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def api() -> Iterator[Api]:
    with serving(Api(free_ports(1))) as found:
        yield found


@pytest.fixture
def dead() -> str:
    """The URL of an API that is not there."""
    return f"http://127.0.0.1:{free_ports(1)}"


def client(*endpoints: str, **options: Any) -> Patroni:
    return Patroni(RestApi(endpoints, "ops", Secret(PASSWORD), timeout=1.0, **options))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestCluster:
    def test_it_is_read_as_patroni_tells_it(self) -> None:
        """In pause, with a switchover that is to come, a member without a server yet, and tags."""
        said = {
            "members": [
                {
                    "name": "pg0",
                    "role": "leader",
                    "state": "running",
                    "api_url": "https://10.0.0.1:8008/patroni",
                    "host": "10.0.0.1",
                    "port": 5433,
                    "timeline": 7,
                },
                {
                    "name": "pg1",
                    "role": "sync_standby",
                    "state": "streaming",
                    "host": "10.0.0.2",
                    "port": 5432,
                    "timeline": 7,
                    "lag": 16,
                    "tags": {"noloadbalance": True, "nofailover": True},
                },
                {"name": "pg2", "role": "replica", "state": "creating replica", "lag": "unknown"},
            ],
            "pause": True,
            "scheduled_switchover": {"at": "2026-11-29T03:00:00+00:00", "from": "pg0"},
            "scope": "shop",
        }
        found = cluster_of(said)

        assert found == Cluster(
            scope="shop",
            members=(
                Member("pg0", "leader", "running", "10.0.0.1", 5433, "https://10.0.0.1:8008", 7),
                Member(
                    "pg1",
                    "sync_standby",
                    "streaming",
                    "10.0.0.2",
                    5432,
                    timeline=7,
                    lag_bytes=16,
                    tags={"noloadbalance": True, "nofailover": True},
                ),
                Member("pg2", "replica", "creating replica"),
            ),
            is_paused=True,
            scheduled=Scheduled("2026-11-29T03:00:00+00:00", "pg0"),
        )
        assert found.leader is found.members[0]
        assert found.member("pg1") is found.member_at("10.0.0.2", 5432)
        assert found.member("pg9") is None
        assert [m.takes_reads for m in found.members] == [True, False, True]

    def test_a_cluster_may_have_no_leader(self) -> None:
        """Nor does the leader of a standby cluster take writes."""
        said = {"members": [member("pg0", "standby_leader"), member("pg1")]}
        assert cluster_of(said).leader is None

    @pytest.mark.parametrize(
        "said", [None, [], "x", {}, {"members": [{}]}, {"members": [member("pg0", port="x")]}]
    )
    def test_what_is_no_cluster_is_refused(self, said: Any) -> None:
        with pytest.raises(ValueError, match="none of Patroni's"):
            cluster_of(said)


class TestReading:
    def test_any_endpoint_that_answers_is_enough(self, api: Api, dead: str) -> None:
        asked = client(dead, api.url)
        assert [m.name for m in asked.cluster().members] == ["pg0", "pg1", "pg2"]

    def test_nobody_answers(self, api: Api, dead: str) -> None:
        """Each is named, with its reason."""
        api.status = 503
        with pytest.raises(PatroniSilent) as caught:
            client(dead, api.url).cluster()
        assert f"{dead}: [Errno 111] Connection refused" in str(caught.value)
        assert f"{api.url}: status 503" in str(caught.value)

    def test_another_server_is_not_believed(self, api: Api) -> None:
        api.more = {"members": "none"}
        with pytest.raises(PatroniSilent, match="none of Patroni's GET /cluster"):
            client(api.url).cluster()

    def test_reading_sends_no_password(self, api: Api) -> None:
        """It needs none, and may go in clear."""
        client(api.url).cluster()
        assert api.credentials == [("GET", None)]
        assert PASSWORD not in repr(client(api.url).api)


class TestChange:
    def test_it_is_over_when_the_new_leader_is_the_primary(self, api: Api) -> None:
        """Neither before, when it only holds the lease, nor when Patroni says so at last."""
        over = threading.Event()

        def slow() -> tuple[int, str]:
            api.lead("pg1", is_promoted=False)
            before = len(api.credentials)
            until(lambda: len(api.credentials) > before + 6)
            api.lead("pg1")
            over.wait(5)
            return 200, 'Successfully switched over to "pg1"'

        api.answer = slow
        outcome = client(api.url).switchover("pg0", "pg1", 5)
        assert api.promoted == {"pg1"}
        over.set()

        assert (outcome.former, outcome.leader, outcome.timeline) == ("pg0", "pg1", 2)
        assert outcome.text == ""

    def test_it_is_asked_for_once_with_the_password(self, api: Api, dead: str) -> None:
        """At the leader's own API first; another that can be reached will do."""

        def done() -> tuple[int, str]:
            api.lead("pg1")
            return 200, 'Successfully switched over to "pg1"'

        api.answer = done
        api.members[0]["api_url"] = f"{dead}/patroni"
        client(api.url).switchover("pg0", "pg1", 5)

        assert api.asked == [("POST", "/switchover", {"leader": "pg0", "candidate": "pg1"})]
        sent = [words for method, words in api.credentials if method == "POST"]
        assert sent == ["Basic b3BzOmh1bnRlcjI="]

    @pytest.mark.parametrize(
        ("status", "said", "way"),
        [
            (412, "candidate does not exists", "choose a member"),
            (412, "leader name does not match", "look again"),
            (412, "candidate name does not match with sync_standby", "synchronous members"),
            (412, "switchover is not possible: no good candidates have been found", "lag, tags"),
            (400, "Switchover target and source are the same", "choose another"),
            (401, "no auth header received", r"\[patroni\]"),
            (403, "client certificate required", r"\[patroni\]"),
            (403, "Access is denied", r"\[patroni\]"),
        ],
    )
    def test_a_refusal_has_patronis_words_and_the_way_out(
        self, api: Api, status: int, said: str, way: str
    ) -> None:
        api.answer = lambda: (status, said)
        with pytest.raises(OperationRefused, match=rf"{said} \(status {status}\); .*{way}"):
            client(api.url).switchover("pg0", "pg1", 5)

    def test_a_failover_is_not_asked_of_whom_it_replaces(self, api: Api) -> None:
        """Who hangs accepts the request and never answers."""
        with serving(Api(free_ports(1))) as hanging:
            api.members[0]["api_url"] = f"{hanging.url}/patroni"
            hanging.status = 503

            def done() -> tuple[int, str]:
                api.lead("pg1")
                return 200, "done"

            api.answer = done
            client(hanging.url, api.url).failover("pg1", 5, is_forced=True)

            assert hanging.asked == []

    def test_without_its_own_api_the_timeline_shows_the_promotion(
        self, api: Api, dead: str
    ) -> None:
        """One that cannot be reached from here, or is not told."""
        for url in (f"{dead}/patroni", None):
            api.lead("pg0")
            api.members = [{**m, "timeline": 1, "api_url": url} for m in api.members]

            def done() -> tuple[int, str]:
                api.lead("pg1")
                looks = len(api.credentials)
                until(lambda: len(api.credentials) > looks + 2)
                api.members = [{**m, "timeline": 2} for m in api.members]
                return 200, "done"

            api.answer = done
            assert client(api.url).switchover("pg0", "pg1", 5).timeline == 2

    def test_another_member_may_become_the_leader(self, api: Api) -> None:
        def other() -> tuple[int, str]:
            api.lead("pg2")
            return 200, 'Switched over to "pg2" instead of "pg1"'

        api.answer = other
        outcome = client(api.url).switchover("pg0", "pg1", 5)
        assert (outcome.candidate, outcome.leader) == ("pg1", "pg2")

    @pytest.mark.parametrize("answer", [(503, "Switchover status unknown"), None])
    def test_without_an_answer_the_cluster_tells(
        self, api: Api, answer: tuple[int, str] | None
    ) -> None:
        """Patroni does not know, or the connection has ended: it was done all the same."""
        answered = threading.Event()

        def unknown() -> tuple[int, str] | None:
            answered.set()
            return answer

        api.answer = unknown
        later = threading.Thread(target=lambda: answered.wait(5) and api.lead("pg1"))
        later.start()
        outcome = client(api.url).switchover("pg0", "pg1", 5)
        later.join()

        assert outcome.leader == "pg1"
        assert len(api.asked) == 1

    def test_a_failure_is_said_early(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """With who leads now; the time that is left is not waited for."""
        monkeypatch.setattr(patroni, "GRACE", 0.1)
        api.answer = lambda: (503, "Switchover failed")
        began = time.monotonic()
        with pytest.raises(OperationFailed, match="503 Switchover failed") as caught:
            client(api.url).switchover("pg0", "pg1", 60)

        assert "pg0 (running) leads the cluster" in str(caught.value)
        assert time.monotonic() - began < 5

    def test_the_time_is_kept(self, api: Api) -> None:
        """What is not there by then may still come, says the error."""
        over = threading.Event()
        api.answer = lambda: (over.wait(5), (200, ""))[1]
        with pytest.raises(OperationFailed, match=r"was not done in 0\.[0-9] s.*may still happen"):
            client(api.url).switchover("pg0", "pg1", 0.2)
        over.set()

    def test_a_failover_is_for_a_cluster_without_a_leader(self, api: Api) -> None:
        """Or one where it is forced."""

        def done() -> tuple[int, str]:
            api.lead("pg1")
            return 200, 'Successfully failed over to "pg1"'

        api.answer = done
        with pytest.raises(OperationRefused, match="pg0 leads the cluster shop and runs"):
            client(api.url).failover("pg1", 5)
        api.members[0]["role"] = "replica"
        outcome = client(api.url).failover("pg1", 5)
        assert (outcome.former, outcome.leader) == (None, "pg1")

        api.lead("pg0")
        assert client(api.url).failover("pg1", 5, is_forced=True).former == "pg0"
        assert api.asked == [("POST", "/failover", {"candidate": "pg1"})] * 2


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """One of 127.0.0.1 that signs itself, for both sides."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    names = ["-subj", "/CN=patroni", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", *curve, *names]
    command += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return {"ca_file": str(cert), "cert_file": str(cert), "key_file": str(key)}


@pytest.fixture
def tls_api(certificate: dict[str, str]) -> Iterator[Api]:
    """One that asks for the client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate["cert_file"], certificate["key_file"])
    context.load_verify_locations(certificate["ca_file"])
    context.verify_mode = ssl.CERT_REQUIRED
    with serving(Api(free_ports(1), "https"), context) as found:
        yield found


class TestTLS:
    def test_both_sides_are_checked(self, tls_api: Api, certificate: dict[str, str]) -> None:
        """The API's certificate by the file of the configuration, ours by the API."""
        assert client(tls_api.url, **certificate).cluster().scope == "shop"
        with pytest.raises(PatroniSilent, match="certificate verify failed"):
            client(tls_api.url).cluster()
        with pytest.raises(PatroniSilent):
            client(tls_api.url, ca_file=certificate["ca_file"]).cluster()
        with pytest.raises(PatroniSilent, match="No such file"):
            client(tls_api.url, ca_file="/missing.pem").cluster()

    def test_the_password_does_not_leave_it(
        self, tls_api: Api, api: Api, certificate: dict[str, str]
    ) -> None:
        """A leader whose API is said to be in clear is not sent it; another is asked."""

        def done() -> tuple[int, str]:
            tls_api.lead("pg1")
            return 200, "done"

        tls_api.answer = done
        tls_api.members[0]["api_url"] = f"{api.url}/patroni"
        client(tls_api.url, **certificate).switchover("pg0", "pg1", 5)

        assert api.asked == []
        assert len(tls_api.asked) == 1


def topology(*endpoints: str, **shard: Any) -> Topology:
    table = {"name": "s0", "patroni": list(endpoints), "url": "postgresql://app@/shop", **shard}
    source = {
        "patroni": {"interval": 0.02},
        "keyspaces": {"main": {"shards": [table]}},
    }
    return load(source, environ={}).topology


def nobody(shard: str, revision: int) -> Announced:
    raise AssertionError("no catalog is asked")


class TestDiscovery:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inquiry, "PATIENCE", 0.02)

    @contextmanager
    def discovering(self, declared: Topology) -> Iterator[tuple[Discovery, list[list[str]]]]:
        seen: list[list[str]] = []
        found = Discovery(declared, lambda: seen.append(names(found)), ask_catalog=nobody)
        found.start(5)
        try:
            yield found, seen
        finally:
            found.close()

    def test_members_come_and_go(self, api: Api) -> None:
        """Each change is published once, and no credential is Patroni's."""
        with self.discovering(topology(api.url)) as (found, seen):
            assert names(found) == ["s0-pg0", "s0-pg1", "s0-pg2"]
            node = found.topology.node("s0-pg1")
            assert (node.host, node.port, node.user) == ("10.0.0.1", 5401, "app")
            api.members = [*api.members[:2], member("pg3", tags={"noloadbalance": True})]
            until(lambda: len(seen) == 2)
            assert seen[1] == ["s0-pg0", "s0-pg1", "s0-pg3"]
            assert found.topology.node("s0-pg3").weight == 0
            until(lambda: len(api.credentials) > 10)
            assert len(seen) == 2

    def test_an_outage_changes_nothing(
        self, api: Api, dead: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is said once; what changed meanwhile is seen afterwards."""
        with self.discovering(topology(dead, api.url)) as (found, _):
            api.status = 503
            until(lambda: "nothing changes" in caplog.text)
            before = len(api.credentials)
            until(lambda: len(api.credentials) > before + 3)
            assert names(found) == ["s0-pg0", "s0-pg1", "s0-pg2"]
            assert caplog.text.count("nothing changes") == 1
            api.members = api.members[:1]
            api.status = 200
            until(lambda: names(found) == ["s0-pg0"])

    def test_a_cluster_without_members_is_no_answer(self, api: Api) -> None:
        """Nor one whose members nobody can connect to yet."""
        with self.discovering(topology(api.url)) as (found, _):
            api.members = [{"name": "pg9", "role": "replica", "state": "creating replica"}]
            before = len(api.credentials)
            until(lambda: len(api.credentials) > before + 3)
            assert names(found) == ["s0-pg0", "s0-pg1", "s0-pg2"]

    def test_the_nodes_of_the_file_stand_in_at_first(self, api: Api, dead: str) -> None:
        """And are called as there, where they are members."""
        nodes = ["postgresql://app@10.0.0.1:5401/shop?name=mine", "postgresql://app@old/shop"]
        with self.discovering(topology(dead, nodes=nodes)) as (found, _):
            assert names(found) == ["mine", "s0-old:5432"]
            found.declare(topology(api.url, nodes=nodes))
            until(lambda: names(found) == ["s0-pg0", "mine", "s0-pg2"])


def names(found: Discovery) -> list[str]:
    return [node.name for node in found.topology.shard("s0").nodes]


def test_a_router_without_any_node_says_so(dead: str) -> None:
    """Patroni is asked for them, and does not answer."""
    source = {
        "policy": {"connect_timeout": 0.1},
        "keyspaces": {
            "main": {"shards": [{"name": "s0", "patroni": [dead], "url": "postgresql://app@/x"}]}
        },
    }
    with (
        Router.from_config(source) as router,
        router.sessionmaker()() as session,
        pytest.raises(NoPrimary, match="no node of shard s0 is known: Patroni has not told"),
    ):
        session.connection()


def shop(**table: Any) -> dict[str, Any]:
    return {"keyspaces": {"shop": {"shards": [{"name": "s0", **table}]}}}


class TestConfig:
    def test_a_shard_whose_nodes_patroni_knows(self) -> None:
        source = shop(patroni=["http://db-a", "https://[::1]:9000/"], url="postgresql://app:pw@/x")
        source["patroni"] = {"user": "ops", "password": "${REST}", "interval": "2s"}
        found = load(source, environ={"REST": PASSWORD})
        shard = found.topology.shard("s0")

        assert shard.nodes == ()
        assert shard.patroni == RestApi(
            ("http://db-a:8008", "https://[::1]:9000"), "ops", Secret(PASSWORD), interval=2.0
        )
        assert shard.login is not None
        assert (shard.login.user, shard.login.database) == ("app", "x")
        shown = json.dumps(describe(found))
        assert "https://[::1]:9000" in shown
        assert PASSWORD not in shown + repr(found)
        assert "pw" not in shown

    @pytest.mark.parametrize(
        ("table", "fault"),
        [
            ({"patroni": []}, r"patroni: is empty; the REST API of a member is a text"),
            ({"patroni": ["http://db"]}, r"url: is missing; write \"postgresql://user@/database"),
            ({"patroni": ["db-a:8008"]}, r"patroni\[0\]: is no REST API; write http://host:8008"),
            ({"patroni": ["http://db/x"]}, r"patroni\[0\]: is no REST API"),
            ({"patroni": ["http://db:99999"]}, r"patroni\[0\]: is no REST API"),
            ({"patroni": ["http://a:hunter2@db"]}, r"patroni\[0\]: has a user or password; these"),
            ({"patroni": "http://db"}, r"patroni: must be a list"),
            ({"patroni": [7]}, r"patroni\[0\]: must be a text"),
            (
                {"patroni": ["http://db"], "url": "postgresql://app@db/x"},
                r"url: has a host or port: Patroni tells them",
            ),
            (
                {"patroni": ["http://db"], "url": "postgresql://app@/x?weight=2"},
                r"url: parameter weight is of a single node",
            ),
            ({"patroni": ["http://db"], "url": "app"}, r"url: is no URL"),
            (
                {"patroni": ["http://db"], "nodes": ["postgresql://db/x?discover=dns"]},
                r"nodes\[0\]: discover stands beside patroni",
            ),
            (
                {"nodes": ["postgresql://db/x"], "url": "postgresql://app@/x"},
                r"url: is for the members of Patroni; name its APIs in patroni",
            ),
        ],
    )
    def test_a_fault_of_a_shard(self, table: dict[str, Any], fault: str) -> None:
        with pytest.raises(ConfigError, match=rf"keyspaces\.shop\.shards\[0\]\.{fault}") as caught:
            load(shop(**table), environ={})
        assert PASSWORD not in str(caught.value)
        assert len(caught.value.faults) <= 2

    @pytest.mark.parametrize(
        ("table", "fault"),
        [
            ({"password": PASSWORD}, r"patroni\.user: is missing: password is given"),
            ({"user": "ops"}, r"patroni\.password: is missing: user is given"),
            ({"key_file": "k.pem"}, r"patroni\.cert_file: is missing: key_file is given"),
            ({"interval": 0}, r"patroni\.interval: 0 must be more than 0 seconds"),
            ({"passwort": PASSWORD}, r"patroni\.passwort: unknown setting; did you mean password"),
            ({"password": ["hunter2"]}, r"patroni\.password: must be a text, not a list"),
        ],
    )
    def test_a_fault_of_the_access(self, table: dict[str, Any], fault: str) -> None:
        source = shop(patroni=["http://db"], url="postgresql://app@/x")
        with pytest.raises(ConfigError, match=fault) as caught:
            load({**source, "patroni": table}, environ={})
        assert PASSWORD not in str(caught.value)

    def test_the_page_shows_what_is_read(self) -> None:
        """Each configuration in ``docs/how-to/patroni.md``."""
        page = (Path(__file__).parents[2] / "docs/how-to/patroni.md").read_text()
        shown = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        environ = {"PGPASSWORD": "x", "PATRONI_PASSWORD": "y"}
        found = [load(tomllib.loads(text), environ=environ) for text in shown]
        first, second = (settings.topology.shard("s0") for settings in found)

        assert first.patroni is not None
        assert (first.patroni.interval, first.patroni.timeout) == (10.0, 2.0)
        assert first.nodes == ()
        assert [node.zone for node in second.nodes] == ["a", "b"]

    def test_an_access_that_nobody_uses_is_a_fault(self) -> None:
        source = {**shop(nodes=["postgresql://db/x"]), "patroni": {"timeout": 1}}
        with pytest.raises(ConfigError, match=r"patroni: no shard has patroni = \[\.\.\.\]"):
            load(source, environ={})
