"""What the configuration says exists: nodes, shards, keyspaces and the shard map.

All values are frozen; a change is a new value. Roles are *not* here: which node is the primary
is a fact that is observed (see :mod:`sqlroute.health`), never configured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from sqlroute.errors import UnknownName, UnownedBucket

T = TypeVar("T")

NOBODY: Mapping[str, str] = MappingProxyType({})


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

    def placed(self, place: Place) -> Node:
        """Return another server of the same cluster: credentials, database and options are kept."""
        options = {k: v for k, v in self.options if k != "hostaddr"}
        if "service" in options:
            options["port"] = str(place.port)  # else the service's own, see conninfo()
        return replace(
            self,
            name=place.name,
            host=place.host,
            port=place.port,
            zone=place.zone,
            weight=place.weight,
            pooler=place.pooler,
            options=tuple(options.items()),
            discovers=False,
        )

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
class Place:
    """Where a server stands that no file names: what else it takes to connect its shard knows.

    Attributes:
        name, host, port, zone, weight, pooler: see :class:`Node`.
    """

    name: str
    host: str
    port: int = 5432
    zone: str = ""
    weight: float = 1.0
    pooler: str = ""


@dataclass(frozen=True, slots=True)
class Announced:
    """What the catalog of a shard says of its nodes, beside the file.

    Attributes:
        revision: of ``sqlroute.shard``, which grows with each change of these.
        added: by ``sqlroute replica add``.
        removed: names and, where they are known, hosts and ports of nodes that were removed.
    """

    revision: int
    added: tuple[Place, ...] = ()
    removed: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class RestApi:
    """How Patroni's REST API is reached.

    Attributes:
        endpoints: ``http://host:port``, each the API of one member.
        user, password: for what changes something; reading needs none.
        ca_file: PEM file of who may have signed the API's certificate; empty for the system's.
        cert_file, key_file: a client's certificate, where the API asks for one.
        interval: seconds from one look at the cluster to the next.
        timeout: seconds that connecting to an endpoint, and its answer, may take.
    """

    endpoints: tuple[str, ...]
    user: str = ""
    password: Secret | None = None
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    interval: float = 10.0
    timeout: float = 2.0


@dataclass(frozen=True, slots=True)
class Shard:
    """A primary and its replicas, holding some of the data of a keyspace.

    Attributes:
        nodes: may be empty as long as Patroni has not said which there are.
        patroni: whose members the nodes are; ``None`` where the file alone says which there are.
        login: a node without a host: as whom, and to which database, nodes that the file does not
            name are connected. ``None`` for that of the first node.
    """

    name: str
    nodes: tuple[Node, ...]
    patroni: RestApi | None = None
    login: Node | None = None

    @property
    def template(self) -> Node:
        """What a node that the file does not name is made of."""
        return self.nodes[0] if self.login is None else self.login

    def consisting_of(self, members: Iterable[Place], owners: Mapping[str, str] = NOBODY) -> Shard:
        """Return the shard with these servers and no other.

        One that the file names is called as there, and keeps its zone and weight.

        Args:
            owners: the shards of all nodes, by name. A member by the name of another shard's node
                goes by its address.
        """
        known = {(node.host, node.port): node for node in self.nodes}
        nodes = []
        for place in members:
            is_free = owners.get(place.name, self.name) == self.name
            name = place.name if is_free else f"{self.name}-{place.host}:{place.port}"
            new = self.template.placed(replace(place, name=name))
            nodes.append(known.get((place.host, place.port), new))
        return replace(self, nodes=tuple(nodes), login=self.template)

    def announced(self, news: Announced, owners: Mapping[str, str] = NOBODY) -> Shard:
        """Return the shard with the nodes that were added and without those that were removed.

        The last one stays, whatever is said of it: nobody could tell of its successor. What was
        added and has a name or an address that another node has is that node already.

        Args:
            owners: the shards of all nodes, by name.
        """
        nodes = [node for node in self.nodes if not _is_one_of(node, news.removed)]
        for place in news.added:
            is_free = owners.get(place.name, self.name) == self.name
            if is_free and not _is_one_of(place, nodes):
                nodes.append(self.template.placed(place))
        return replace(self, nodes=tuple(nodes) or self.nodes[:1])


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
        replicas: how many further databases each node has that read a replica of each shard.
    """

    nodes: tuple[Node, ...]
    max_rows: int = 1_000_000
    timeout: float = 60.0
    fetch_size: int = 10_000
    use_remote_estimate: bool = True
    replicas: int = 1

    def readers(self, node: Node) -> tuple[Node, ...]:
        """Return the databases beside that of a node which read replicas."""
        return tuple(
            replace(node, name=f"{node.name}/{number}", database=f"{node.database}_{number}")
            for number in range(1, self.replicas + 1)
            if node.database
        )


@dataclass(frozen=True, slots=True)
class Reader:
    """A database of a coordinator that reads replicas.

    Attributes:
        node: its name among the nodes of coordinators.
        replicas: the node that it reads of each shard; a shard that is missing here has none, and
            its primary is read.
        built_at: another one when it was built anew.
        refused: not empty: it is left alone for now, and why.
    """

    node: str
    replicas: Mapping[str, str]
    built_at: str = ""
    refused: str = ""


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
                Keyspace(k.name, (Shard(f"{k.name}-coordinator", _databases(k.coordinator)),), 1)
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
        return self._with_each(lambda s, _: replace(s, nodes=tuple(_of_names(s, addresses))))

    def consisting_of(self, members: Mapping[str, tuple[Place, ...]]) -> Topology:
        """Return the topology with other servers in the shards that are named."""
        if not members:
            return self
        return self._with_each(
            lambda s, owners: s.consisting_of(members[s.name], owners) if s.name in members else s
        )

    def announced(self, news: Mapping[str, Announced]) -> Topology:
        """Return the topology with what the catalogs of some shards say of their nodes."""
        if not any(said.added or said.removed for said in news.values()):
            return self
        return self._with_each(
            lambda s, owners: s.announced(news[s.name], owners) if s.name in news and s.nodes else s
        )

    def _with_each(self, change: Callable[[Shard, Mapping[str, str]], Shard]) -> Topology:
        """Return the topology of changed shards.

        Args:
            change: called with a shard, and the shards of all nodes by name.
        """
        owners = dict(self.shard_of_node)
        keyspaces = []
        for keyspace in self.keyspaces:
            shards = []
            for shard in keyspace.shards:
                shards.append(change(shard, owners))
                owners |= {node.name: shard.name for node in shards[-1].nodes}
            keyspaces.append(replace(keyspace, shards=tuple(shards)))
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


def _databases(coordinator: Coordinator) -> tuple[Node, ...]:
    return tuple(
        database for node in coordinator.nodes for database in (node, *coordinator.readers(node))
    )


def _is_one_of(node: Node | Place, others: Iterable[Node | Place]) -> bool:
    return any(
        node.name == other.name
        or (other.host != "" and (node.host, node.port) == (other.host, other.port))
        for other in others
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
