"""Create or upgrade the ``sqlroute`` schema on one shard, by Alembic."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from sqlroute.errors import CatalogError

_REGISTER = """
INSERT INTO sqlroute.shard (name, node, timeline)
VALUES (%s, %s, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int)
ON CONFLICT (name) DO NOTHING
"""

_alone = threading.Lock()
"""Alembic keeps what it works on in the module ``alembic.context``: one upgrade at a time."""


def upgrade(connection: Any, revision: str = "head") -> None:
    """Bring the catalog of one shard to a revision; without effect when it is there.

    Args:
        connection: a SQLAlchemy connection to the shard's primary, in a transaction.

    Raises:
        CatalogError: the application's tables would land in the catalog's schema.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations()))
    config.attributes["connection"] = connection
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('sqlroute.catalog'))")
    with _alone:
        command.upgrade(config, revision)
    if connection.exec_driver_sql("SELECT current_schema()").scalar() == "sqlroute":
        raise CatalogError(
            "schema sqlroute comes first in the search_path, so tables of the application would be "
            "made in it (a role named sqlroute has that); use another role or set the search_path"
        )


def register(connection: Any, shard: str, node: str) -> None:
    """Write the row of a shard where there is none: no promotion yet, and its primary.

    Args:
        connection: a SQLAlchemy connection to that, in a transaction.
    """
    connection.exec_driver_sql(_REGISTER, (shard, node))


def migrations() -> Path:
    """Return the folder of the Alembic environment: in the package, or beside it in a checkout."""
    package = Path(__file__).parent / "migrations"
    checkout = Path(__file__).parents[2] / "migrations"
    for folder in (package, checkout):
        if (folder / "env.py").is_file():
            return folder
    raise CatalogError(f"the migrations of sqlroute are in neither {package} nor {checkout}")
