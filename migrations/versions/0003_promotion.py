"""Promotion: who is the primary since when, operations and their steps, replicas added later."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NOW = sa.func.now()


def upgrade() -> None:
    # one row: it commits in the order of the shard's own log, and a probe reads it each time
    op.create_table(
        "shard",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("node", sa.Text),
        sa.Column("timeline", sa.Integer),
        sa.Column("fork", sa.Text),
        sa.Column("state", sa.Text, nullable=False, server_default="steady"),
        sa.Column("operation", sa.Text),
        sa.Column("held_until", sa.DateTime(timezone=True)),
        sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"),
        sa.CheckConstraint("state IN ('steady', 'switching')"),
        schema="sqlroute",
    )
    op.execute("ALTER TABLE sqlroute.shard ALTER COLUMN fork TYPE pg_lsn USING fork::pg_lsn")
    op.create_table(
        "journal",
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("shard", sa.Text, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("former", sa.Text),
        sa.Column("timeline", sa.Integer, nullable=False),
        sa.Column("fork", sa.Text),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("fence", sa.Text, nullable=False),
        sa.Column("operation", sa.Text),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        schema="sqlroute",
    )
    op.execute("ALTER TABLE sqlroute.journal ALTER COLUMN fork TYPE pg_lsn USING fork::pg_lsn")
    op.create_table(
        "operation",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("shard", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("plan", JSONB, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished", sa.DateTime(timezone=True)),
        sa.Column("report", JSONB),
        sa.CheckConstraint("state IN ('running', 'done', 'aborted', 'failed')"),
        schema="sqlroute",
    )
    op.create_table(
        "operation_step",
        sa.Column(
            "operation",
            sa.Text,
            sa.ForeignKey("sqlroute.operation.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ms", sa.Float),
        sa.Column("detail", JSONB),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.CheckConstraint("state IN ('begun', 'done', 'failed')"),
        schema="sqlroute",
    )
    op.create_table(
        "node",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("shard", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False, server_default=NOW),
        sa.Column("removed_at", sa.DateTime(timezone=True)),
        schema="sqlroute",
    )


def downgrade() -> None:
    for table in ("node", "operation_step", "operation", "journal", "shard"):
        op.drop_table(table, schema="sqlroute")
