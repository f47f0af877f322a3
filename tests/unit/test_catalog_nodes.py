"""How a node is announced in the catalog: where it stands, and no more."""

from __future__ import annotations

import pytest

from sqlroute.catalog.nodes import place_of, url_of
from sqlroute.topology import Node, Place, Secret


@pytest.mark.parametrize(
    ("node", "url"),
    [
        (Node("n", "db-c"), "postgresql://db-c:5432"),
        (Node("n", "fd00::2", 5433), "postgresql://[fd00::2]:5433"),
        (
            Node("n", "/run/postgresql", zone="eu west&1", weight=0.25),
            "postgresql://:5432?host=%2Frun%2Fpostgresql&zone=eu%20west%261&weight=0.25",
        ),
        (
            Node("n", "db-c", 6432, weight=0, pooler="transaction"),
            "postgresql://db-c:6432?weight=0&pooler=transaction",
        ),
        (Node("n", options=(("hostaddr", "10.0.0.3"),)), "postgresql://10.0.0.3:5432"),
    ],
)
def test_a_url_tells_where_a_node_stands(node: Node, url: str) -> None:
    """And gives the same place back."""
    found = place_of("n", url_of(node))

    assert url_of(node) == url
    assert (found.port, found.zone, found.weight, found.pooler) == (
        node.port,
        node.zone,
        node.weight,
        node.pooler,
    )
    assert found.host == (node.host or "10.0.0.3")


def test_no_credential_is_announced() -> None:
    node = Node("n", "db", 5432, "shop", "app", Secret("hunter2"), options=(("passfile", "/p"),))
    assert url_of(node) == "postgresql://db:5432"


def test_credentials_that_somebody_wrote_there_are_not_read() -> None:
    assert place_of("n", "postgresql://root:hunter2@db/other") == Place("n", "db")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "db:5432",
        "mysql://db:3306",
        "postgresql://",
        "postgresql://db:99999",
        "postgresql://root:hunter2/x@db:5432",
        "postgresql://[db:5432",
        "postgresql://db?weight=-1",
        "postgresql://db?weight=nan",
        "postgresql://db?weight=much",
        "postgresql://db?sslmode=require",
        "postgresql://db?zone",
    ],
)
def test_what_is_no_place_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="not of the form postgresql://host:port") as caught:
        place_of("n", url)
    assert "hunter2" not in str(caught.value)
