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
         │   ├─ UndeclaredTable         neither sharded nor a reference table, on many shards
         │   ├─ ReadOnlyRefused         a write, where only reads were declared
         │   └─ SettingRefused          a setting that sessions may not carry
         ├─ TokenError
         │   ├─ InvalidToken            the text is no token
         │   ├─ ForeignToken            a token of other servers
         │   └─ LostTimeline            what the token has seen was lost in a failover
         ├─ TopologyError
         │   ├─ NoEligibleNode          no node may take the statement; says which and why
         │   ├─ NoPrimary               no node of the shard is a primary now (retryable)
         │   ├─ PoolExhausted           all connections to a node are in use; says who has them
         │   └─ ShardMapUnavailable     no shard map, or its lease could not be confirmed
         ├─ StaleShardMap               the database refused a row: its bucket moved (retryable)
         ├─ StaleObjectRead             a replica's object whose row is another now (retryable)
         ├─ CoordinatorError            the coordinator cannot answer
         │   ├─ CoordinatorMissing      nothing is installed there
         │   ├─ CoordinatorStale        the shards are not what it was built from any more
         │   ├─ CoordinatorDenied       a role lacks a right, or a password, there or on a shard
         │   └─ CoordinatorUnavailable  it, or a shard behind it, does not answer (retryable)
         ├─ TooManyRows                 a result of more rows than allowed
         ├─ DeadlineExceeded            a scatter outlived its deadline; names the shards
         ├─ InDoubtCommit               a two-phase commit whose second phase is unfinished
         ├─ UnknownCommit               the answer to COMMIT was lost, its outcome stays unknown
         ├─ OperationRefused            an operator's command would do harm; nothing was changed
         ├─ OperationFailed             an operator's command ended midway; says how it goes on
         ├─ DriverError                 a node's machine did not do what its driver asked
         ├─ LocalTopologyError          the local topology cannot be started, or is not there
         └─ CatalogError                the sqlroute schema is missing or too old

The message is one line: what failed, the value, the rule, the next step. ``retryable`` says that
running the whole unit of work again may succeed without any change to it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import SQLAlchemyError, TimeoutError
from sqlalchemy.orm.exc import StaleDataError


class SQLRouteError(SQLAlchemyError):
    """Base of all errors of sqlroute. They can be pickled and copied, whatever they are made of."""

    retryable = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(
    kind: type[SQLRouteError], arguments: tuple[Any, ...], attributes: dict[str, Any]
) -> SQLRouteError:
    found = kind.__new__(kind)
    found.args = arguments
    found.__dict__.update(attributes)
    return found


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
        why: and the way out.
    """

    def __init__(self, clause: str, why: str) -> None:
        self.clause = clause
        self.why = why
        super().__init__(f"{clause}: {why}")


class MissingShardKey(PlanError):
    """A write to a sharded table without the shard key it needs."""


class InvalidShardKey(PlanError):
    """A shard key whose value or type has no bucket."""


class UnownedBucket(PlanError):
    """The bucket of a key is owned by no shard in the map."""


class UndeclaredTable(PlanError):
    """A table of a keyspace with several shards that is neither sharded nor a reference table."""


class ReadOnlyRefused(PlanError):
    """A write, or what cannot be proved to be none, where only reads were declared."""


class SettingRefused(PlanError):
    """A setting that sessions may not carry: routing depends on it, or its name is none."""


class TokenError(SQLRouteError):
    """A token that cannot be followed."""


class InvalidToken(TokenError):
    """The text is no token: it was cut, changed or made by something else."""


class ForeignToken(TokenError):
    """The token was made for other servers: an unknown shard, or another cluster."""


class LostTimeline(TokenError):
    """What the token has seen was lost: a failover promoted a node that had not received it.

    Attributes:
        shard: its name.
        timeline: the lost timeline.
        fork: the LSN up to which it was kept, in bytes.
    """

    def __init__(self, message: str, *, shard: str, timeline: int, fork: int) -> None:
        self.shard = shard
        self.timeline = timeline
        self.fork = fork
        super().__init__(message)


class TopologyError(SQLRouteError):
    """The servers, as they are now, cannot serve the statement."""


class NoEligibleNode(TopologyError):
    """No node may take the statement; the message names each node and why it was refused.

    Attributes:
        shard: its name.
    """

    retryable = True

    def __init__(self, message: str, shard: str = "") -> None:
        self.shard = shard
        super().__init__(message)


class NoPrimary(TopologyError):
    """No node of the shard is known to be a primary.

    Attributes:
        shard: its name.
    """

    retryable = True

    def __init__(self, message: str, shard: str = "") -> None:
        self.shard = shard
        super().__init__(message)


class PoolExhausted(TopologyError, TimeoutError):
    """All connections to a node are in use, and none came back in time; names who holds them.

    Also a ``sqlalchemy.exc.TimeoutError``, as of SQLAlchemy's own pools.
    """

    retryable = True


class ShardMapUnavailable(TopologyError):
    """There is no shard map, or its lease ran out and a shard did not confirm it.

    Attributes:
        shard: which did not; empty where there is no map.
    """

    retryable = True

    def __init__(self, message: str, shard: str = "") -> None:
        self.shard = shard
        super().__init__(message)


class StaleShardMap(SQLRouteError):
    """A shard refused a row whose bucket it does not own: the map in use was old."""

    retryable = True


class StaleObjectRead(SQLRouteError, StaleDataError):
    """Objects loaded from a replica were to be written, but their rows are others by now.

    Also a ``sqlalchemy.orm.exc.StaleDataError``, for code that handles that one already. The values
    are not named: they may be private.

    Attributes:
        objects: for each its class, primary key and the attributes that differ; no attribute where
            the row is gone.
    """

    retryable = True

    def __init__(self, objects: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...]) -> None:
        self.objects = objects
        name, identity, columns = objects[0]
        found = f"{', '.join(columns)} changed" if columns else "its row was deleted"
        others = len(objects) - 1
        more = f" (and {others} more object{'s' * (others > 1)})" if others else ""
        key = ", ".join(map(repr, identity))
        super().__init__(
            f"{name}({key}) was read from a replica and is not the primary's row: {found}{more}; "
            'roll back and run the unit of work again, with consistency="strong" where it must '
            "not meet this"
        )


class CoordinatorError(SQLRouteError):
    """The coordinator cannot answer. The session, and its transaction, go on.

    Attributes:
        node: its name; empty where several were tried.
    """

    def __init__(self, message: str, node: str = "") -> None:
        self.node = node
        super().__init__(message)


class CoordinatorMissing(CoordinatorError):
    """Nothing is installed in the coordinator's database: ``sqlroute coordinator install``."""


class CoordinatorStale(CoordinatorError):
    """Schema or shard map have changed since it was built: ``sqlroute coordinator refresh``."""


class CoordinatorDenied(CoordinatorError):
    """A role lacks a right or a password on the coordinator, or on a shard behind it."""


class CoordinatorUnavailable(CoordinatorError):
    """The coordinator, or a shard behind it, does not answer, or is not what the session needs."""

    retryable = True


class TooManyRows(SQLRouteError):
    """A result has more rows than the configuration allows.

    Attributes:
        max_rows: how many it allows.
    """

    def __init__(self, message: str, max_rows: int = 0) -> None:
        self.max_rows = max_rows
        super().__init__(message)


class DeadlineExceeded(SQLRouteError):
    """A scatter did not finish in its time; the message names the shards still running."""

    retryable = True


class InDoubtCommit(SQLRouteError):
    """A commit over several shards whose second phase could not be finished.

    The decision is recorded; ``sqlroute.catalog.recover`` finishes it.

    Attributes:
        shard: the one whose ``sqlroute.commit_record`` holds the decision.
        transaction: its name there.
        shards: all that it wrote on.
        unfinished: those on which it is still prepared.
        is_committed: ``None`` where the decision is not known here.
    """

    def __init__(
        self,
        message: str,
        *,
        shard: str = "",
        transaction: str = "",
        shards: tuple[str, ...] = (),
        unfinished: tuple[str, ...] = (),
        is_committed: bool | None = None,
    ) -> None:
        self.shard = shard
        self.transaction = transaction
        self.shards = shards
        self.unfinished = unfinished
        self.is_committed = is_committed
        super().__init__(message)


class UnknownCommit(SQLRouteError):
    """The answer to a COMMIT was lost, and ``router.run`` could not learn its outcome.

    It was not run again, since it may have been done.

    Attributes:
        shard: its name.
    """

    def __init__(self, message: str, shard: str = "") -> None:
        self.shard = shard
        super().__init__(message)


class OperationRefused(SQLRouteError):
    """An operator's command was refused before it changed anything.

    Attributes:
        reasons: one text per reason, each with the way out.
    """

    def __init__(self, reasons: tuple[str, ...] | str) -> None:
        self.reasons = (reasons,) if isinstance(reasons, str) else reasons
        super().__init__("; ".join(self.reasons))

    @property
    def faults(self) -> tuple[str, ...]:
        """The reasons, one line each."""
        return self.reasons


class OperationFailed(SQLRouteError):
    """A step of an operator's command failed.

    Attributes:
        operation: its id, by which it is resumed or aborted; empty where there is none.
        step: the step that failed; empty if none had begun.
    """

    def __init__(self, message: str, *, operation: str = "", step: str = "") -> None:
        self.operation = operation
        self.step = step
        super().__init__(message)


class DriverError(SQLRouteError):
    """The machine of a node could not be reached beside SQL, or did not do what was asked.

    Attributes:
        node: its name.
        exit_code: of the program that failed; ``None`` where none has ended.
    """

    def __init__(self, message: str, *, node: str = "", exit_code: int | None = None) -> None:
        self.node = node
        self.exit_code = exit_code
        super().__init__(message)


class LocalTopologyError(SQLRouteError):
    """The local topology cannot be started, stopped or found."""


class CatalogError(SQLRouteError):
    """The ``sqlroute`` schema of a shard is missing, too old or contradicts the configuration."""
