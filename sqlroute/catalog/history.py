"""Read where the timelines of a shard ended: after a failover it says what was kept.

PostgreSQL writes it into a history file at each promotion. ``pg_read_file`` reads that where the
role may (``GRANT pg_read_server_files``); elsewhere ``sqlroute.timeline_history`` does, which
``sqlroute catalog install`` makes with the rights of whoever installs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from sqlroute.catalog.maps import connect
from sqlroute.routing.token import parse_lsn
from sqlroute.topology import Node

log = logging.getLogger("sqlroute.catalog")

_QUERIES = (
    "SELECT pg_read_file('pg_wal/' || lpad(upper(to_hex(%s::int)), 8, '0') || '.history')",
    "SELECT sqlroute.timeline_history(%s)",
)


def read_history(nodes: Iterable[Node], timeline: int, timeout: float) -> dict[int, int] | None:
    """Return the LSN, in bytes, at which each earlier timeline was left.

    Args:
        nodes: whom to ask, all on ``timeline``; one that does not answer is passed over.
        timeout: seconds for each of them to connect.

    Returns:
        By timeline; empty when no node may read it, ``None`` when none has answered.
    """
    import psycopg

    refused: Exception | None = None
    for node in nodes:
        try:
            with connect(node, timeout) as connection:
                for query in _QUERIES:
                    try:
                        (text,) = connection.execute(query, (timeline,)).fetchone()
                    except psycopg.DatabaseError as error:
                        if error.sqlstate is None:
                            raise
                        refused = refused or error
                    else:
                        return parse_history(text)
        except psycopg.OperationalError:
            continue
    if refused is None:
        return None
    log.warning(
        "the history of timeline %d cannot be read (%s), so a token from before it is taken for "
        "kept; grant pg_read_server_files or run `sqlroute catalog install`",
        timeline,
        str(refused).splitlines()[0],
    )
    return {}


def parse_history(text: str) -> dict[int, int]:
    """Return the ends of timelines in a history file: ``1<tab>0/3000150<tab>reason`` a line."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        fields: list[Any] = line.split("\t")
        if len(fields) >= 2 and fields[0].strip().isdigit():
            found[int(fields[0])] = parse_lsn(fields[1].strip())
    return found
