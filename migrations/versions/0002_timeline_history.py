"""A function that reads a timeline's history file with the rights of whoever installs it."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # SECURITY DEFINER: the number is all that a caller chooses of the path
    op.execute(
        """
        CREATE FUNCTION sqlroute.timeline_history(timeline integer) RETURNS text
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS
        $$ SELECT pg_read_file('pg_wal/' || lpad(upper(to_hex(timeline)), 8, '0') || '.history') $$
        """
    )


def downgrade() -> None:
    op.execute("DROP FUNCTION sqlroute.timeline_history(integer)")
