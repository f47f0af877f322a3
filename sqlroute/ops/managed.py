"""Who else decides which server of a shard is the primary: an engine or a service that runs it.

A promotion in SQL behind its back would be undone, or be the split that the engine is there to
prevent; so an operator's command asks first. Pure: facts in, a name out. :data:`QUERY` tells the
facts and needs no right beyond connecting; a role with ``pg_read_all_settings`` sees more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUERY = """
SELECT (SELECT coalesce(array_agg(DISTINCT application_name), '{}')
          FROM pg_stat_activity WHERE application_name <> '') AS applications,
       (SELECT coalesce(array_agg(rolname::text), '{}') FROM pg_roles
         WHERE rolname ~ '^(rds|cloudsql|alloydb|azure|pgautofailover)') AS roles,
       (SELECT coalesce(array_agg(nspname::text), '{}') FROM pg_namespace
         WHERE nspname = 'repmgr') AS schemas,
       (SELECT coalesce(array_agg(proname::text), '{}') FROM pg_proc
         WHERE proname = 'aurora_version') AS functions,
       (SELECT coalesce(array_agg(DISTINCT sourcefile), '{}') FROM pg_settings
         WHERE sourcefile IS NOT NULL) AS files,
       (SELECT coalesce(jsonb_object_agg(name, setting), '{}') FROM pg_settings
         WHERE name IN ('archive_command', 'restore_command', 'shared_preload_libraries')
            OR name ~ '^(rds|cloudsql|alloydb|azure)[.]') AS settings
"""
"""The facts of one server, as columns of one row; without parameters."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a server shows that is run by somebody; one of these is enough.

    Attributes:
        engine: as messages call it.
        applications: how the names of connections begin.
        roles, schemas, functions: that exist.
        files: how the names of configuration files end.
        prefixes: how the names of settings begin.
        settings: (name, part of its value).
    """

    engine: str
    applications: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    schemas: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Say if a server shows it. A fact that is missing was not to be seen."""
        found: Mapping[str, str] = facts.get("settings") or {}
        return (
            any(name.startswith(self.applications) for name in facts.get("applications") or ())
            or any(name in self.roles for name in facts.get("roles") or ())
            or any(name in self.schemas for name in facts.get("schemas") or ())
            or any(name in self.functions for name in facts.get("functions") or ())
            or any(name.endswith(self.files) for name in facts.get("files") or ())
            or any(name.startswith(self.prefixes) for name in found)
            or any(part in (found.get(name) or "") for name, part in self.settings)
        )


SIGNATURES = (
    # services first: what runs inside of them is their own affair. Names of roles and settings are
    # those that their documentation reserves (RDS: "rds_superuser"; Cloud SQL: "cloudsqlsuperuser";
    # AlloyDB: "alloydbsuperuser"; Azure: "azure_pg_admin")
    Signature("Amazon Aurora", functions=("aurora_version",)),
    Signature("Amazon RDS", roles=("rdsadmin", "rds_superuser"), prefixes=("rds.",)),
    Signature("AlloyDB", roles=("alloydbadmin", "alloydbsuperuser"), prefixes=("alloydb.",)),
    Signature(
        "Google Cloud SQL", roles=("cloudsqladmin", "cloudsqlsuperuser"), prefixes=("cloudsql.",)
    ),
    Signature(
        "Azure Database for PostgreSQL",
        roles=("azuresu", "azure_superuser", "azure_pg_admin"),
        prefixes=("azure.",),
    ),
    # its instance manager archives and connects by these names (pkg/postgres/configuration.go,
    # pkg/management/postgres/instance.go)
    Signature(
        "CloudNativePG",
        applications=("cnpg-instance-manager", "cnpg_metrics_exporter"),
        settings=(
            ("archive_command", "/controller/manager"),
            ("restore_command", "/controller/manager"),
        ),
    ),
    # its connections are called "Patroni heartbeat" and "Patroni restapi", for every role to see
    # (patroni/postgresql/connection.py); it keeps the original postgresql.conf under another name
    # and includes it (patroni/postgresql/config.py). Seen on PostgreSQL 15 and 18
    Signature(
        "Patroni",
        applications=("Patroni",),
        files=("/postgresql.base.conf",),
    ),
    # the name of the file that its keeper writes and includes (src/bin/pg_autoctl/defaults.h)
    Signature(
        "pg_auto_failover",
        applications=("pgautofailover_standby",),
        roles=("pgautofailover_monitor", "pgautofailover_replicator"),
        files=("/postgresql-auto-failover.conf", "/postgresql-auto-failover-standby.conf"),
    ),
    # its extension's schema is in the database of its own, its library in every one of the server;
    # connections are called after it unless told otherwise (dbutils.c)
    Signature(
        "repmgr",
        applications=("repmgr",),
        schemas=("repmgr",),
        settings=(("shared_preload_libraries", "repmgr"),),
    ),
)


def managed_by(facts: Mapping[str, Any]) -> str:
    """Return who runs a server, empty for a plain one.

    Args:
        facts: the row of :data:`QUERY`, and whatever else.
    """
    return next((each.engine for each in SIGNATURES if each.fits(facts)), "")
