"""One node of several is wrong: the rest goes on, and everybody is told which and why."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from sqlalchemy import orm, select
from sqlalchemy.orm import Mapped, mapped_column

from sqlroute import ConfigError, Router
from sqlroute.cli import main
from sqlroute.events import Event, NodeChanged
from sqlroute.local.topology import LocalTopology

pytestmark = [pytest.mark.servers, pytest.mark.timeout(90)]


class Base(orm.DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(scope="module")
def servers(sqlroute_topology_factory: Any) -> LocalTopology:
    """One shard with two replicas."""
    found: LocalTopology = sqlroute_topology_factory(shards=1, replicas=2, label="bad nodes")
    with Router.from_config(found.config_path) as router:
        router.create_all(Base.metadata)
    return found


@pytest.fixture(scope="module")
def other(sqlroute_topology_factory: Any) -> LocalTopology:
    """Another cluster."""
    found: LocalTopology = sqlroute_topology_factory(shards=1, replicas=1, label="another cluster")
    return found


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
    subprocess.run(
        ["openssl", "req", "-new", "-x509", "-days", "2", "-nodes", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


@pytest.fixture(scope="module")
def impostor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Speak TLS as PostgreSQL does, with a certificate that is not the one clients trust.

    The server of the wheel is built without TLS; no client gets further than this here.
    """
    directory = tmp_path_factory.mktemp("tls")
    key, own = make_certificate(directory, "own")
    _, trusted = make_certificate(directory, "trusted")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.recv(8)  # SSLRequest
                client.sendall(b"S")
                context.wrap_socket(client, server_side=True).close()

    threading.Thread(target=serve, daemon=True).start()
    port = listener.getsockname()[1]
    tls = f"sslmode=verify-full&sslrootcert={trusted}"
    yield f"postgresql://app@127.0.0.1:{port}/app?name=bad&{tls}"
    listener.close()


@pytest.fixture
def wrong(
    request: pytest.FixtureRequest, servers: LocalTopology, other: LocalTopology
) -> tuple[str, str]:
    """Return the URL of a node that cannot be used, and a pattern of what is said of it."""
    good = servers.node("s0-c").url
    kind = request.param
    if kind == "no such host":
        return "postgresql://app@nobody.invalid/app?name=bad", "nobody|resolve|not known"
    if kind == "wrong password":
        head, _, tail = good.partition("://app:")
        rest = tail.partition("@")[2]
        return f"{head}://app:wrong@{rest}".replace("name=s0-c", "name=bad"), "password"
    if kind == "wrong certificate":
        return request.getfixturevalue("impostor"), "certificate verify failed"
    if kind == "nothing listens":
        return "postgresql://app@127.0.0.1:9/app?name=bad", "refused"
    url = other.node("s0-b").url
    return url.replace("name=s0-b", "name=bad"), "another cluster"


KINDS = (
    "no such host",
    "wrong password",
    "wrong certificate",
    "nothing listens",
    "replica of another cluster",
)


@pytest.mark.parametrize("wrong", KINDS, indirect=True)
class TestOneOfThree:
    def test_the_rest_goes_on(
        self,
        servers: LocalTopology,
        wrong: tuple[str, str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Reads and writes work; the event and the command name the node and the reason."""
        url, reason = wrong
        urls = [servers.node("s0-a").url, servers.node("s0-b").url, url]
        source = {"keyspaces": {"main": {"shards": [{"name": "s0", "nodes": urls}]}}}
        seen: list[Event] = []
        with Router.from_config(source) as router:
            router.listen(seen.append, NodeChanged)
            router.health()
            for _ in range(50):
                with router.sessionmaker()() as session:
                    session.scalar(select(Note.id))
                    session.add(Note())
                    session.commit()
            answered = router.engines(is_async=False).answered
            assert answered.get("s0-b", 0) > 0
            assert answered.get("bad", 0) == 0

            def told() -> list[NodeChanged]:
                return [
                    event
                    for event in seen
                    if isinstance(event, NodeChanged) and event.node == "bad"
                ]

            until(lambda: any(event.reason or event.refused for event in told()))
            texts = [event.reason or event.refused for event in told()]
        assert any(_matches(reason, text) for text in texts), texts

        path = tmp_path / "sqlroute.toml"
        lines = "\n".join(f"  {json.dumps(one)}," for one in urls)
        path.write_text(f'[[keyspaces.main.shards]]\nname = "s0"\nnodes = [\n{lines}\n]\n')
        code = main(["status", "--json", "--config", str(path)])
        document = json.loads(capsys.readouterr().out)
        assert code == 3
        faults = [fault for fault in document["faults"] if "bad" in fault]
        assert any(_matches(reason, fault) for fault in faults), document["faults"]
        assert not any("wrong" in fault and "app:wrong" in fault for fault in faults)


def _matches(pattern: str, text: str) -> bool:
    return any(part in text for part in pattern.split("|"))


def test_two_nodes_of_one_name_are_refused(servers: LocalTopology) -> None:
    """Before anything is opened, with the path."""
    url = servers.node("s0-a").url
    source = {"keyspaces": {"main": {"shards": [{"name": "s0", "nodes": [url, url]}]}}}

    with pytest.raises(ConfigError, match=r"keyspaces\.main\.shards\[0\]\.nodes\[1\]"):
        Router.from_config(source)
