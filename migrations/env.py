"""Alembic environment of the ``sqlroute`` schema: run by ``sqlroute.catalog.install``."""

from alembic import context

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit(
        "run `sqlroute catalog install` (or router.install_catalog()): it gives each shard's "
        "connection to this environment"
    )

context.configure(
    connection=connection,
    target_metadata=None,
    version_table="alembic_version",
    version_table_schema="sqlroute",
)
with context.begin_transaction():
    connection.exec_driver_sql("CREATE SCHEMA IF NOT EXISTS sqlroute")
    context.run_migrations()
