"""Database routing for SQLAlchemy and PostgreSQL: read replicas, hash shards, no proxy.

The names are imported when first used (PEP 562), so that a module of this package which needs no
SQLAlchemy, such as the command line that prints its help, does not load it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlroute.errors import (
        CatalogError,
        ConfigError,
        CrossShardRefused,
        DeadlineExceeded,
        ForeignToken,
        InDoubtCommit,
        InvalidShardKey,
        InvalidToken,
        LostTimeline,
        MissingShardKey,
        NoEligibleNode,
        NoPrimary,
        PlanError,
        PoolExhausted,
        ReadOnlyRefused,
        SettingRefused,
        SQLRouteError,
        StaleObjectRead,
        StaleShardMap,
        TokenError,
        TopologyError,
        UnknownCommit,
        UnknownName,
        UnownedBucket,
    )
    from sqlroute.retry import is_retryable
    from sqlroute.router import Router
    from sqlroute.routing.declare import reference_table, sharded_by
    from sqlroute.routing.plan import Plan
    from sqlroute.routing.policy import Consistency, Policy
    from sqlroute.routing.token import Token
    from sqlroute.session import RoutingMixin, RoutingSession
    from sqlroute.session_async import RoutingAsyncSession
    from sqlroute.topology import Keyspace, Node, Shard, ShardMap, Topology

__all__ = [
    "CatalogError",
    "ConfigError",
    "Consistency",
    "CrossShardRefused",
    "DeadlineExceeded",
    "ForeignToken",
    "InDoubtCommit",
    "InvalidShardKey",
    "InvalidToken",
    "Keyspace",
    "LostTimeline",
    "MissingShardKey",
    "NoEligibleNode",
    "NoPrimary",
    "Node",
    "Plan",
    "PlanError",
    "Policy",
    "PoolExhausted",
    "ReadOnlyRefused",
    "Router",
    "RoutingAsyncSession",
    "RoutingMixin",
    "RoutingSession",
    "SQLRouteError",
    "SettingRefused",
    "Shard",
    "ShardMap",
    "StaleObjectRead",
    "StaleShardMap",
    "Token",
    "TokenError",
    "Topology",
    "TopologyError",
    "UnknownCommit",
    "UnknownName",
    "UnownedBucket",
    "is_retryable",
    "reference_table",
    "sharded_by",
]

_MODULES = {
    "CatalogError": "sqlroute.errors",
    "ConfigError": "sqlroute.errors",
    "Consistency": "sqlroute.routing.policy",
    "CrossShardRefused": "sqlroute.errors",
    "DeadlineExceeded": "sqlroute.errors",
    "ForeignToken": "sqlroute.errors",
    "InDoubtCommit": "sqlroute.errors",
    "InvalidShardKey": "sqlroute.errors",
    "InvalidToken": "sqlroute.errors",
    "Keyspace": "sqlroute.topology",
    "LostTimeline": "sqlroute.errors",
    "MissingShardKey": "sqlroute.errors",
    "NoEligibleNode": "sqlroute.errors",
    "NoPrimary": "sqlroute.errors",
    "Node": "sqlroute.topology",
    "Plan": "sqlroute.routing.plan",
    "PlanError": "sqlroute.errors",
    "PoolExhausted": "sqlroute.errors",
    "Policy": "sqlroute.routing.policy",
    "ReadOnlyRefused": "sqlroute.errors",
    "Router": "sqlroute.router",
    "RoutingAsyncSession": "sqlroute.session_async",
    "RoutingMixin": "sqlroute.session",
    "RoutingSession": "sqlroute.session",
    "SQLRouteError": "sqlroute.errors",
    "SettingRefused": "sqlroute.errors",
    "Shard": "sqlroute.topology",
    "ShardMap": "sqlroute.topology",
    "StaleObjectRead": "sqlroute.errors",
    "StaleShardMap": "sqlroute.errors",
    "Token": "sqlroute.routing.token",
    "Topology": "sqlroute.topology",
    "TopologyError": "sqlroute.errors",
    "TokenError": "sqlroute.errors",
    "UnknownCommit": "sqlroute.errors",
    "UnknownName": "sqlroute.errors",
    "UnownedBucket": "sqlroute.errors",
    "is_retryable": "sqlroute.retry",
    "reference_table": "sqlroute.routing.declare",
    "sharded_by": "sqlroute.routing.declare",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
