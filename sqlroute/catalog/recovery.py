"""Finish commits over several shards that a killed process left half way.

A prepared transaction names the shard that decides about it. The row in that shard's
``sqlroute.commit_record`` is the decision; where it is missing, recovery writes "aborted" itself:
the primary key makes a coordinator that is merely slow fail, instead of both deciding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from sqlroute.errors import InDoubtCommit

GID_LIKE = "sqlroute:%"

_PREPARED = """
SELECT gid FROM pg_prepared_xacts
 WHERE database = current_database() AND gid LIKE %s
   AND prepared < now() - make_interval(secs => %s)
"""
ABORT = """
INSERT INTO sqlroute.commit_record (transaction, aborted) VALUES (%s, true)
ON CONFLICT (transaction) DO NOTHING
"""
_TAKEN = ("42704", "55000")  # it does not exist any more, it is busy
DECISION = "SELECT aborted FROM sqlroute.commit_record WHERE transaction = %s"


@dataclass(frozen=True, slots=True)
class Recovered:
    """One prepared transaction that was finished."""

    shard: str
    gid: str
    committed: bool


def recover(engines: Mapping[str, Any], older_than: float = 10.0) -> tuple[Recovered, ...]:
    """Finish all prepared transactions of sqlroute.

    Args:
        engines: for each shard the SQLAlchemy engine of its primary.
        older_than: seconds that a transaction must have been prepared; a younger one may still
            be in the hands of its process.

    Raises:
        InDoubtCommit: some could not be finished by this role; all others were.
    """
    finished: list[Recovered] = []
    refused: list[str] = []
    for shard, engine in engines.items():
        with _connect(engine).execution_options(isolation_level="AUTOCOMMIT") as connection:
            gids = connection.exec_driver_sql(_PREPARED, (GID_LIKE, older_than)).scalars().all()
            for gid in gids:
                _, designated, transaction, _ = gid.split(":")
                if designated not in engines:
                    continue  # another keyspace's or an unreachable shard's decision
                committed = _decide(engines[designated], transaction)
                try:
                    done = _finish(connection, gid, "COMMIT" if committed else "ROLLBACK")
                except DBAPIError as error:  # prepared by another role, say: go on with the rest
                    refused.append(f"{gid} on {shard}: {str(error.orig).splitlines()[0]}")
                    continue
                if done:
                    finished.append(Recovered(shard, gid, committed))
    if refused:
        raise InDoubtCommit(
            f"{len(finished)} prepared transaction(s) finished, {len(refused)} refused: "
            f"{'; '.join(refused)}; run it as the role that prepared them, or as a superuser"
        )
    return tuple(finished)


def _connect(engine: Any) -> Any:
    """Connect, not by a pooled connection that the crash has cut."""
    connection = engine.connect()
    try:
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError as error:
        connection.close()
        if not error.connection_invalidated:
            raise
        return engine.connect()  # the pool is renewed
    connection.rollback()
    return connection


def _finish(connection: Any, gid: str, verb: str) -> bool:
    """Finish one; say whether it was done here, not by its coordinator or another recovery."""
    quoted = gid.replace("'", "''")
    try:
        connection.exec_driver_sql(f"{verb} PREPARED '{quoted}'")
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in _TAKEN:
            return False
        raise
    return True


def _decide(engine: Any, transaction: str) -> bool:
    with _connect(engine) as connection, connection.begin():
        connection.exec_driver_sql(ABORT, (transaction,))
        aborted = connection.exec_driver_sql(DECISION, (transaction,)).scalar_one()
    return not aborted
