"""The nodes of a shard that ``sqlroute replica add`` and ``remove`` announce in its catalog.

A row of ``sqlroute.node`` says where a server stands, never as whom to connect: that is the file's.
Each change raises ``sqlroute.shard.revision``, which every probe of a node brings back, so routers
read these rows when there is something new and never else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from sqlroute.catalog.maps import connect
from sqlroute.errors import DeadlineExceeded
from sqlroute.runtime.inquiry import NoAnswer
from sqlroute.runtime.limits import Limit, limited
from sqlroute.topology import Announced, Node, Place

log = logging.getLogger("sqlroute.catalog")

ADD = """
WITH written AS (
    INSERT INTO sqlroute.node AS n (name, shard, url)
    SELECT g.name, g.shard, g.url
      FROM (VALUES (%s::text, %s::text, %s::text)) g (name, shard, url)
      JOIN sqlroute.shard s ON s.name = g.shard
    ON CONFLICT (name) DO UPDATE SET url = excluded.url, added_at = now(), removed_at = NULL
     WHERE n.shard = excluded.shard
    RETURNING shard),
raised AS (
    UPDATE sqlroute.shard s SET revision = s.revision + 1
      FROM written w WHERE s.name = w.shard
    RETURNING s.name, s.revision)
SELECT r.revision, pg_notify('sqlroute', r.name) IS NOT NULL AS notified FROM raised r
"""
"""Announces a node: name, shard, URL (see :func:`url_of`). One statement, for the primary.

Returns a row with the new ``revision``. No row: the catalog has no such shard, or knows the name as
a node of another; nothing was written.
"""

REMOVE = """
WITH written AS (
    INSERT INTO sqlroute.node AS n (name, shard, url, removed_at)
    SELECT g.name, g.shard, '', now()
      FROM (VALUES (%s::text, %s::text)) g (name, shard)
      JOIN sqlroute.shard s ON s.name = g.shard
    ON CONFLICT (name) DO UPDATE SET removed_at = now() WHERE n.shard = excluded.shard
    RETURNING shard),
raised AS (
    UPDATE sqlroute.shard s SET revision = s.revision + 1
      FROM written w WHERE s.name = w.shard
    RETURNING s.name, s.revision)
SELECT r.revision, pg_notify('sqlroute', r.name) IS NOT NULL AS notified FROM raised r
"""
"""Announces that a node is gone, one of the file's too: name, shard. Else as :data:`ADD`."""

_READ = """
SELECT s.revision, n.name, n.url, n.removed_at IS NOT NULL
  FROM sqlroute.shard s LEFT JOIN sqlroute.node n ON n.shard = s.name
 WHERE s.name = %s ORDER BY n.added_at, n.name
"""

_PARAMETERS = {"host", "zone", "weight", "pooler"}
_FORM = "its URL is not of the form postgresql://host:port?zone=&weight=&pooler="


def read(connection: Any, shard: str) -> Announced | None:
    """Return what a shard's catalog says of its nodes, ``None`` without a row of that shard.

    A row that cannot be understood is passed over, and logged.

    Args:
        connection: of psycopg's, to any node of the shard.
    """
    rows = connection.execute(_READ, (shard,)).fetchall()
    if not rows:
        return None
    added: list[Place] = []
    removed: list[Place] = []
    for _, name, url, is_removed in rows:
        if name is None:  # no node was ever announced
            continue
        try:
            place = place_of(name, url) if url else Place(name, "")
        except ValueError as error:
            log.warning("shard %s: its catalog announces node %s, but %s", shard, name, error)
            continue
        (removed if is_removed else added).append(place)
    here = {(place.host, place.port) for place in added}
    # of one that was added again under another name only the old name is gone
    gone = (p if (p.host, p.port) not in here else Place(p.name, "") for p in removed)
    return Announced(rows[0][0], tuple(added), tuple(gone))


def read_newest(shard: str, revision: int, nodes: Iterable[Node], timeout: float) -> Announced:
    """Return what the first node says that has replayed a revision.

    Args:
        nodes: whom to ask; one that does not answer is passed over.
        timeout: seconds for each of them to connect, and again to answer.

    Raises:
        NoAnswer: none has; names each and why.
    """
    import psycopg

    reasons = []
    for node in nodes:
        try:
            with connect(node, timeout) as connection:
                found = limited(connection, Limit.after(timeout), read, connection, shard)
        except (psycopg.Error, DeadlineExceeded) as error:
            reasons.append(f"{node.name}: {error}")
            continue
        if found is not None and found.revision >= revision:
            return found
        reasons.append(f"{node.name}: revision {found.revision if found else 'unknown'}")
    raise NoAnswer(f"nobody tells of revision {revision} ({'; '.join(reasons) or 'no node'})")


def url_of(node: Node) -> str:
    """Return the URL by which a node is announced: where it stands, without any secret."""
    host = node.host or dict(node.options).get("hostaddr", "")
    given = {
        "host": host if host.startswith("/") else "",
        "zone": node.zone,
        "weight": "" if node.weight == 1 else f"{node.weight:g}",
        "pooler": node.pooler,
    }
    query = urlencode({name: text for name, text in given.items() if text}, quote_via=quote)
    shown = "" if given["host"] else f"[{host}]" if ":" in host else host
    return f"postgresql://{shown}:{node.port}" + (f"?{query}" if query else "")


def place_of(name: str, url: str) -> Place:
    """Return where a node stands that is announced by a URL.

    Raises:
        ValueError: it is not of the form that :func:`url_of` gives; does not quote it.
    """
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
        port, weight = parts.port or 5432, float(query.get("weight", ["1"])[-1])
    except ValueError:  # which quotes what it cannot read
        raise ValueError(_FORM) from None
    given = {key: values[-1] for key, values in query.items()}
    host = given.get("host") or parts.hostname or ""
    is_weight = math.isfinite(weight) and weight >= 0
    if parts.scheme != "postgresql" or not host or not is_weight or given.keys() - _PARAMETERS:
        raise ValueError(_FORM)
    zone, pooler = given.get("zone", ""), given.get("pooler", "")
    return Place(name, host, port, zone, weight, pooler)
