"""What the configuration says exists: nodes, shards, keyspaces and the shard map.

All values are frozen; a change is a new value. Roles are *not* here: which node is the primary
is a fact that is observed (see :mod:`sqlroute.health`), never configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from sqlroute.errors import UnknownName, UnownedBucket

T = TypeVar("T")


class Secret:
    """A text that no repr, log, error or formatted string ever shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class Node:
    """One PostgreSQL server, as configured.

    Attributes:
        name: unique in the topology, ``shard-host:port`` unless the URL names one (``?name=``).
        host, port, database, user: where and as whom to connect; empty means libpq's default.
        password: kept out of every output.
        zone: where the node stands; empty if not said. Programs of the same zone prefer it.
        weight: its share of the reads among the replicas of its shard; 0 for none.
        options: further libpq parameters (``sslmode``, ``passfile``, ``service``...).
        pooler: ``"transaction"`` where a pooler, as PgBouncer, stands before the server and gives
            each transaction another connection: nothing may outlive a transaction there.
        discovers: the host is a name of several servers, see :meth:`Topology.discovered`.
    """

    name: str
    host: str = ""
    port: int = 5432
    database: str = ""
    user: str = ""
    password: Secret | None = None
    zone: str = ""
    weight: float = 1.0
    options: tuple[tuple[str, str], ...] = ()
    pooler: str = ""
    discovers: bool = False

    def at(self, name: str, address: str) -> Node:
        """Return one of the servers that the host is a name of; TLS still checks that name."""
        options = (*self.options, ("hostaddr", address))
        return replace(self, name=name, options=options, discovers=False)

    def conninfo(self) -> dict[str, Any]:
        """Return libpq parameters, the password revealed: only for a driver's connect call."""
        values: dict[str, Any] = dict(self.options)
        if "service" not in values or self.port != 5432:  # a service names its own port
            values["port"] = self.port
        for key, value in (("host", self.host), ("dbname", self.database), ("user", self.user)):
            if value:
                values[key] = value
        if self.password is not None:
            values["password"] = self.password.reveal()
        return values

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Shard:
    """A primary and its replicas, holding some of the data of a keyspace."""

    name: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Coordinator:
    """Databases that see all shards of a keyspace, as partitions of foreign tables.

    Attributes:
        nodes: each has all of it; the first that answers is used.
        max_rows: a result of more is refused.
        timeout: seconds that a statement may take there.
        fetch_size: rows that it takes from a shard at a time.
        use_remote_estimate: it asks the shards what each part of a statement would cost. That is
            some round trips per partition, and without it PostgreSQL never looks up rows by a key
            that another table gives: a statement of 0.1 s may take minutes.
    """

    nodes: tuple[Node, ...]
    max_rows: int = 1_000_000
    timeout: float = 60.0
    fetch_size: int = 10_000
    use_remote_estimate: bool = True


@dataclass(frozen=True)
class Keyspace:
    """Tables that share a type of sharding key and a set of shards.

    Attributes:
        buckets: number of hash partitions of the key, a power of two, fixed for life.
        coordinator: answers what cannot be merged, if there is one.
    """

    name: str
    shards: tuple[Shard, ...]
    buckets: int = 64
    coordinator: Coordinator | None = None

    @cached_property
    def is_sharded(self) -> bool:
        return len(self.shards) > 1

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        return tuple(shard.name for shard in self.shards)


@dataclass(frozen=True)
class Topology:
    """All keyspaces; names of shards and of nodes are unique over all of them."""

    keyspaces: tuple[Keyspace, ...]

    @cached_property
    def default(self) -> Keyspace:
        """The first keyspace: the one of tables that name none."""
        return self.keyspaces[0]

    @cached_property
    def _keyspaces(self) -> Mapping[str, Keyspace]:
        return MappingProxyType({keyspace.name: keyspace for keyspace in self.keyspaces})

    @cached_property
    def _shards(self) -> Mapping[str, Shard]:
        return MappingProxyType({s.name: s for k in self.keyspaces for s in k.shards})

    @cached_property
    def _nodes(self) -> Mapping[str, Node]:
        return MappingProxyType({node.name: node for node in self.nodes()})

    @cached_property
    def shard_of_node(self) -> Mapping[str, str]:
        return MappingProxyType({n.name: s.name for s in self._shards.values() for n in s.nodes})

    @cached_property
    def keyspace_of_shard(self) -> Mapping[str, Keyspace]:
        return MappingProxyType({s.name: k for k in self.keyspaces for s in k.shards})

    @cached_property
    def coordinators(self) -> Topology:
        """Return the coordinators, each as the one shard of a keyspace of its own."""
        return Topology(
            tuple(
                Keyspace(k.name, (Shard(f"{k.name}-coordinator", k.coordinator.nodes),), 1)
                for k in self.keyspaces
                if k.coordinator is not None
            )
        )

    def nodes(self) -> Iterator[Node]:
        for keyspace in self.keyspaces:
            for shard in keyspace.shards:
                yield from shard.nodes

    def discovered(self, addresses: Mapping[str, tuple[str, ...]]) -> Topology:
        """Return the topology with a node for each address of the names that stand for several.

        Args:
            addresses: of each host, as text. A host that is missing stays one node by its name.
        """
        if not any(node.discovers for node in self.nodes()):
            return self
        keyspaces = []
        for keyspace in self.keyspaces:
            shards = tuple(
                replace(shard, nodes=tuple(_of_names(shard, addresses)))
                for shard in keyspace.shards
            )
            keyspaces.append(replace(keyspace, shards=shards))
        return Topology(tuple(keyspaces))

    def keyspace(self, name: str) -> Keyspace:
        return _named(self._keyspaces, name, "keyspace")

    def shard(self, name: str) -> Shard:
        return _named(self._shards, name, "shard")

    def node(self, name: str) -> Node:
        return _named(self._nodes, name, "node")


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Which shard owns each bucket of a keyspace, and since which epoch.

    Attributes:
        owners: the shard of bucket ``i`` at index ``i``; ``""`` where nobody owns it.
        epoch: grows by one at each change of the map.
    """

    keyspace: str
    owners: tuple[str, ...]
    epoch: int = 1
    _shards: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        seen = dict.fromkeys(owner for owner in self.owners if owner)
        object.__setattr__(self, "_shards", tuple(seen))

    @property
    def shards(self) -> tuple[str, ...]:
        """Shards that own at least one bucket."""
        return self._shards

    def owner(self, bucket: int) -> str:
        """Return the shard of a bucket.

        Raises:
            UnownedBucket: no shard owns it.
        """
        owner = self.owners[bucket]
        if not owner:
            raise UnownedBucket(
                f"bucket {bucket} of keyspace {self.keyspace} is owned by no shard in the map of "
                f"epoch {self.epoch}; assign it in sqlroute.bucket of the catalog"
            )
        return owner

    def check_complete(self) -> None:
        """Refuse a map with gaps: "all shards" would not be all rows.

        Raises:
            UnownedBucket: names the first bucket that no shard owns.
        """
        if "" in self.owners:
            self.owner(self.owners.index(""))

    def buckets_of(self, shard: str) -> tuple[int, ...]:
        return tuple(i for i, owner in enumerate(self.owners) if owner == shard)

    def moved(self, bucket: int, shard: str) -> ShardMap:
        """Return the map after one bucket went to another shard: the next epoch."""
        owners = (*self.owners[:bucket], shard, *self.owners[bucket + 1 :])
        return replace(self, owners=owners, epoch=self.epoch + 1)

    @classmethod
    def even(cls, keyspace: Keyspace) -> ShardMap:
        """Spread buckets evenly: bucket ``i`` to shard ``i mod shards``, a regular map."""
        names = keyspace.shard_names
        return cls(keyspace.name, tuple(names[i % len(names)] for i in range(keyspace.buckets)))


def differences(old: Topology, new: Topology) -> Iterator[str]:
    """Yield what may not change while a router runs, each with its path in the configuration."""
    if [k.name for k in old.keyspaces] != [k.name for k in new.keyspaces]:
        yield "keyspaces: names and order cannot change while the router runs; make a new one"
        return
    for before, now in zip(old.keyspaces, new.keyspaces, strict=True):
        path = f"keyspaces.{now.name}"
        if before.buckets != now.buckets:
            yield f"{path}.buckets: is {before.buckets} for life, not {now.buckets}"
        if before.shard_names != now.shard_names:
            yield (
                f"{path}.shards: {', '.join(before.shard_names)} cannot become "
                f"{', '.join(now.shard_names)} while the router runs; make a new one"
            )


def _of_names(shard: Shard, addresses: Mapping[str, tuple[str, ...]]) -> Iterator[Node]:
    for node in shard.nodes:
        known = addresses.get(node.host, ()) if node.discovers else ()
        for address in known:
            shown = f"[{address}]" if ":" in address else address
            yield node.at(f"{node.name}@{shown}", address)
        if not known:
            yield node


def _named(known: Mapping[str, T], name: str, what: str) -> T:
    try:
        return known[name]
    except KeyError:
        names = ", ".join(known) or "none"
        raise UnknownName(f"unknown {what} {name!r}; known: {names}") from None
