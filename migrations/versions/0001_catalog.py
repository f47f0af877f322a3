"""The catalog of a shard: shard map with its epoch, and commit records."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keyspace",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("buckets", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.CheckConstraint("buckets > 0 AND buckets & (buckets - 1) = 0"),
        schema="sqlroute",
    )
    op.create_table(
        "bucket",
        sa.Column("keyspace", sa.Text, sa.ForeignKey("sqlroute.keyspace.name"), primary_key=True),
        sa.Column("bucket", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("shard", sa.Text, nullable=False),
        schema="sqlroute",
    )
    op.create_table(
        "commit_record",
        sa.Column("transaction", sa.Text, primary_key=True),
        sa.Column("aborted", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column(
            "recorded_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        schema="sqlroute",
    )


def downgrade() -> None:
    for table in ("commit_record", "bucket", "keyspace"):
        op.drop_table(table, schema="sqlroute")
