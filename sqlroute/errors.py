"""Every error sqlroute raises, rooted where a SQLAlchemy user already catches.

::

    sqlalchemy.exc.SQLAlchemyError
     └─ SQLRouteError
         ├─ ConfigError                 the configuration is wrong; lists every fault with its path
         ├─ UnknownName                 a node, shard, keyspace, table or option nobody declared
         ├─ PlanError                   a statement cannot be routed; nothing was sent
         │   ├─ CrossShardRefused       no exact answer across shards (yet); names the clause
         │   ├─ MissingShardKey         a write needs the shard key and has none
         │   ├─ InvalidShardKey         a key of a type that has no bucket
         │   ├─ UnownedBucket           the key's bucket has no shard in the map
         │   └─ UndeclaredTable         neither sharded nor a reference table, on many shards
         ├─ TopologyError
         │   ├─ NoEligibleNode          no node may take the statement; says which and why
         │   ├─ NoPrimary               no node of the shard is a primary now (retryable)
         │   └─ ShardMapUnavailable     no shard map, or its lease could not be confirmed
         ├─ StaleShardMap               the database refused a row: its bucket moved (retryable)
         ├─ DeadlineExceeded            a scatter outlived its deadline; names the shards
         ├─ InDoubtCommit               a two-phase commit whose second phase is unfinished
         ├─ LocalTopologyError          the local topology cannot be started, or is not there
         └─ CatalogError                the sqlroute schema is missing or too old

The message is one line: what failed, the value, the rule, the next step. ``retryable`` says that
running the whole unit of work again may succeed without any change to it.
"""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError


class SQLRouteError(SQLAlchemyError):
    """Base of all errors of sqlroute."""

    retryable = False


class ConfigError(SQLRouteError):
    """The configuration is wrong.

    Attributes:
        faults: one text per fault, each starting with the path of the setting.
    """

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


class UnknownName(SQLRouteError):
    """A node, shard, keyspace, table, policy or option that nobody declared."""


class PlanError(SQLRouteError):
    """A statement cannot be routed. Nothing was sent to any server."""


class CrossShardRefused(PlanError):
    """The statement needs several shards and has no exact answer across them.

    Attributes:
        clause: the clause that stands in the way, as SQL words, e.g. ``HAVING``.
    """

    def __init__(self, clause: str, why: str) -> None:
        self.clause = clause
        super().__init__(f"{clause}: {why}")


class MissingShardKey(PlanError):
    """A write to a sharded table without the shard key it needs."""


class InvalidShardKey(PlanError):
    """A shard key whose value or type has no bucket."""


class UnownedBucket(PlanError):
    """The bucket of a key is owned by no shard in the map."""


class UndeclaredTable(PlanError):
    """A table of a keyspace with several shards that is neither sharded nor a reference table."""


class TopologyError(SQLRouteError):
    """The servers, as they are now, cannot serve the statement."""


class NoEligibleNode(TopologyError):
    """No node may take the statement; the message names each node and why it was refused."""

    retryable = True


class NoPrimary(TopologyError):
    """No node of the shard is known to be a primary.

    Attributes:
        shard: its name.
    """

    retryable = True

    def __init__(self, message: str, shard: str = "") -> None:
        self.shard = shard
        super().__init__(message)


class ShardMapUnavailable(TopologyError):
    """There is no shard map, or its lease ran out and no shard confirmed it."""

    retryable = True


class StaleShardMap(SQLRouteError):
    """A shard refused a row whose bucket it does not own: the map in use was old."""

    retryable = True


class DeadlineExceeded(SQLRouteError):
    """A scatter did not finish in its time; the message names the shards still running."""

    retryable = True


class InDoubtCommit(SQLRouteError):
    """A commit over several shards whose second phase could not be finished.

    The decision is recorded; ``sqlroute.catalog.recover`` finishes it.
    """


class LocalTopologyError(SQLRouteError):
    """The local topology cannot be started, stopped or found."""


class CatalogError(SQLRouteError):
    """The ``sqlroute`` schema of a shard is missing, too old or contradicts the configuration."""
