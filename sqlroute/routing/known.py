"""Which tables SQL text may name: those that SQLAlchemy declares, then those of the catalogs.

A catalog tells sharded tables by their partitions. An ordinary table of a keyspace with several
shards may be a reference table, or one with other rows on each shard; only a declaration says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from sqlalchemy.sql.schema import MetaData, Table

from sqlroute.routing.declare import Reference, Sharded, declaration, kind_of, shard_key
from sqlroute.routing.sqltree import Role, TableInfo, Tables
from sqlroute.topology import Keyspace

UNDECLARED = (
    "an ordinary table, which need not have the same rows on every shard; if it has, declare it by "
    "reference_table() and tell the router by router.declare(metadata)"
)


@dataclass(frozen=True, slots=True)
class KnownTables:
    """The tables that are known.

    Attributes:
        declared: by their names in SQL.
        catalogs: those of each keyspace that was read, by its name.
    """

    declared: Tables = field(default_factory=lambda: MappingProxyType({}))
    catalogs: Mapping[str, Tables] = field(default_factory=lambda: MappingProxyType({}))

    def __repr__(self) -> str:
        read = ", ".join(f"{name}: {len(of)}" for name, of in self.catalogs.items())
        return f"KnownTables(declared={len(self.declared)}, catalogs={{{read}}})"

    def by_name(self) -> Tables:
        """Return all of them by name: what is declared wins, then the keyspace read first.

        A declared table has the columns of the database, too: a mapping may leave some out.
        """
        found: dict[str, TableInfo] = {}
        for catalog in self.catalogs.values():
            found = {**catalog, **found}
        for name, info in self.declared.items():
            columns = found[name].columns if name in found else {}
            is_complete = name in found
            found[name] = replace(
                info, columns={**columns, **info.columns}, is_complete=is_complete
            )
        return found

    def declaring(self, metadata: MetaData, default: Keyspace) -> KnownTables:
        """Return the same with the declared tables of a metadata.

        Args:
            default: the keyspace of tables that name none.
        """
        found = {
            table.fullname: _info(table, default.name)
            for table in metadata.tables.values()
            if declaration(table) is not None
        }
        return replace(self, declared=MappingProxyType({**self.declared, **found}))

    def learnt(self, keyspace: Keyspace, tables: Tables) -> KnownTables:
        """Return the same with a catalog; itself when that says nothing new."""
        if keyspace.is_sharded:
            tables = {name: _as_proved(info) for name, info in tables.items()}
        if self.catalogs.get(keyspace.name) == tables:
            return self
        return replace(self, catalogs=MappingProxyType({**self.catalogs, keyspace.name: tables}))


def _info(table: Table, default: str) -> TableInfo:
    declared = declaration(table)
    assert isinstance(declared, Sharded | Reference)
    columns = {column.name: kind_of(column.type) for column in table.columns}
    key: tuple[str, ...] = ()
    if isinstance(declared, Sharded):
        key = tuple(table.c[name].name for name in shard_key(table).names)
    role = Role.SHARDED if key else Role.REFERENCE
    keyspace = declared.keyspace or default
    return TableInfo(
        table.fullname, role, columns, key, keyspace, is_declared=True, is_complete=False
    )


def _as_proved(info: TableInfo) -> TableInfo:
    if info.role is not Role.REFERENCE:
        return info
    return replace(info, role=Role.UNKNOWN, why=UNDECLARED)
