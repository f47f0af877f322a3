"""Who else decides which server is the primary."""

from __future__ import annotations

from typing import Any

import pytest

from sqlroute.ops.managed import managed_by

PLAIN: dict[str, Any] = {
    "applications": ["psql", "sqlroute monitor 1", "s0-b"],
    "roles": [],
    "schemas": [],
    "functions": [],
    "files": ["/var/lib/postgresql/18/main/postgresql.auto.conf", "/etc/postgresql.conf"],
    "settings": {
        "archive_command": "pgbackrest --stanza=main archive-push %p",
        "restore_command": "",
        "shared_preload_libraries": "pg_stat_statements,auto_explain",
    },
}


def test_a_plain_server_is_run_by_nobody() -> None:
    """Whatever is archived, preloaded and connected."""
    assert managed_by(PLAIN) == ""


def test_what_a_role_may_not_see_is_no_sign() -> None:
    """Columns that are null, or not there."""
    assert managed_by(dict.fromkeys(PLAIN)) == ""
    assert managed_by({}) == ""


@pytest.mark.parametrize(
    ("fact", "shown", "engine"),
    [
        ("applications", ["Patroni heartbeat"], "Patroni"),
        ("applications", ["Patroni restapi"], "Patroni"),
        ("files", ["/data/pg0/postgresql.base.conf", "/data/pg0/postgresql.conf"], "Patroni"),
        ("applications", ["cnpg-instance-manager"], "CloudNativePG"),
        (
            "settings",
            {"archive_command": "/controller/manager wal-archive --log-destination /x %p"},
            "CloudNativePG",
        ),
        ("settings", {"shared_preload_libraries": "repmgr,pg_stat_statements"}, "repmgr"),
        ("schemas", ["repmgr"], "repmgr"),
        ("applications", ["repmgr"], "repmgr"),
        ("roles", ["rds_superuser", "rdsadmin"], "Amazon RDS"),
        ("settings", {"rds.extensions": "address_standardizer"}, "Amazon RDS"),
        ("functions", ["aurora_version"], "Amazon Aurora"),
        ("roles", ["cloudsqladmin", "cloudsqlsuperuser"], "Google Cloud SQL"),
        ("settings", {"cloudsql.iam_authentication": "off"}, "Google Cloud SQL"),
        ("roles", ["azure_pg_admin", "azuresu"], "Azure Database for PostgreSQL"),
        ("settings", {"azure.extensions": ""}, "Azure Database for PostgreSQL"),
        ("roles", ["alloydbsuperuser"], "AlloyDB"),
        ("files", ["/pg/postgresql-auto-failover.conf"], "pg_auto_failover"),
    ],
)
def test_each_engine_is_known_by_one_of_its_signs(fact: str, shown: Any, engine: str) -> None:
    assert managed_by({**PLAIN, fact: shown}) == engine


def test_a_service_is_named_before_what_runs_in_it() -> None:
    """Its customers have no other way to promote."""
    facts = {**PLAIN, "roles": ["rdsadmin"], "functions": ["aurora_version"]}
    assert managed_by(facts) == "Amazon Aurora"
    assert managed_by({**PLAIN, "roles": ["azuresu"], "applications": ["Patroni heartbeat"]}) == (
        "Azure Database for PostgreSQL"
    )
