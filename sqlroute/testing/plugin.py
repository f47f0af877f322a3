"""The pytest plugin: fixtures that give real PostgreSQL servers.

Loaded by every pytest of an environment that has sqlroute, so it imports neither SQLAlchemy nor
psycopg nor the launcher before a fixture is used.

========================== ======= ==============================================================
``sqlroute_topology_factory`` session ``factory(shards=, replicas=, pg_bin=None, label="")``
``sqlroute_topology``         session 2 shards, each a primary and 2 replicas
``sqlroute_single``           session one plain server, the judge that holds all the data
========================== ======= ==============================================================

``--sqlroute-pg-bin=DIR`` (with the equals sign: pytest takes a bare path for its root), the
environment variable ``SQLROUTE_PG_BIN`` or the ini option ``sqlroute_pg_bin``, in this order,
choose the PostgreSQL.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sqlroute.testing import TopologyFactory

if TYPE_CHECKING:
    from sqlroute.local.node import LocalNode
    from sqlroute.local.topology import LocalTopology


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "PostgreSQL's bin directory for the servers of the tests"
    parser.getgroup("sqlroute").addoption("--sqlroute-pg-bin", metavar="DIR", help=what)
    parser.addini("sqlroute_pg_bin", what, default="")


@pytest.fixture(scope="session")
def sqlroute_topology_factory(pytestconfig: pytest.Config) -> Iterator[TopologyFactory]:
    """Start topologies on demand; the same arguments give the same running servers."""
    chosen = (
        pytestconfig.getoption("--sqlroute-pg-bin")
        or os.environ.get("SQLROUTE_PG_BIN")
        or pytestconfig.getini("sqlroute_pg_bin")
    )
    # SIGTERM (timeout(1), a cancelled CI job) ends Python without finalizers and without atexit,
    # and would leave the servers: let it end the session as Ctrl-C does.
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with TopologyFactory(Path(chosen) if chosen else None) as factory:
            yield factory
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def sqlroute_topology(sqlroute_topology_factory: TopologyFactory) -> LocalTopology:
    """Give 2 shards, each a primary and 2 replicas."""
    return sqlroute_topology_factory(shards=2, replicas=2)


@pytest.fixture(scope="session")
def sqlroute_single(sqlroute_topology_factory: TopologyFactory) -> LocalNode:
    """Give one plain server of the same version: what a routed statement is compared with."""
    return sqlroute_topology_factory(shards=1, replicas=0, label="single").nodes[0]
