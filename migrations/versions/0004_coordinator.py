"""Coordinator: what a shard says of its schema, and a coordinator of what it was built from.

A shard answers ``sqlroute.shard_state``. The two tables and the function are of use in a
coordinator's database only; there ``sqlroute.coordinator_state`` is made with the foreign tables.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# All that a statement on foreign tables leans on: columns, types, partitions, row security. Leaves
# have their parent's columns. What the catalog shows is of the snapshot that is in use.
FINGERPRINT = """
CREATE FUNCTION sqlroute.fingerprint() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog AS $$
WITH space AS (
    SELECT oid, nspname FROM pg_namespace
     WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'sqlroute')
), relation AS (
    SELECT c.*, s.nspname FROM pg_class c JOIN space s ON s.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'c')
), fact AS (
    SELECT format('%I.%I %s %s %s', nspname, relname, relkind, relrowsecurity,
                  CASE WHEN relispartition THEN pg_get_expr(relpartbound, oid)
                       WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END) AS line
      FROM relation
    UNION ALL
    SELECT format('%I.%I.%I %s %s %s', nspname, relname, attname, attnum,
                  format_type(atttypid, atttypmod), attcollation::regcollation)
      FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid
     WHERE a.attnum > 0 AND NOT a.attisdropped AND NOT r.relispartition
    UNION ALL
    SELECT format('%I.%I %s', nspname, typname,
                  (SELECT string_agg(quote_literal(enumlabel), ' ' ORDER BY enumsortorder)
                     FROM pg_enum WHERE enumtypid = t.oid))
      FROM pg_type t JOIN space s ON s.oid = t.typnamespace WHERE t.typtype = 'e'
    UNION ALL
    SELECT format('%I.%I %s %s %s %s', nspname, typname, format_type(typbasetype, typtypmod),
                  typnotnull, typcollation::regcollation,
                  (SELECT string_agg(pg_get_constraintdef(c.oid), ' ' ORDER BY c.conname)
                     FROM pg_constraint c WHERE c.contypid = t.oid))
      FROM pg_type t JOIN space s ON s.oid = t.typnamespace WHERE t.typtype = 'd'
    UNION ALL
    SELECT format('%I %s', extname, extversion) FROM pg_extension
)
SELECT md5(string_agg(line, E'\\n' ORDER BY line COLLATE "C")) FROM fact
$$
"""

STATE = """
CREATE VIEW sqlroute.shard_state AS
SELECT s.name AS shard, k.name AS keyspace, k.epoch, sqlroute.fingerprint() AS fingerprint,
       CASE WHEN NOT pg_is_in_recovery()
            THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
        END AS timeline,
       CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_flush_lsn() END AS lsn
  FROM sqlroute.shard s, sqlroute.keyspace k
"""

# Called after a statement and in its transaction, which holds locks on all that it has read: what a
# second connection to each shard sees of the schema now is what the statement has met.
CHECK = """
CREATE FUNCTION sqlroute.coordinator_check(of_keyspace text, known_epoch bigint, floors jsonb)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    own sqlroute.coordinator;
    it record;
    least jsonb;
BEGIN
    SELECT * INTO own FROM sqlroute.coordinator WHERE keyspace = of_keyspace;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'nothing is installed for keyspace %', of_keyspace USING ERRCODE = 'SR011';
    ELSIF own.epoch < known_epoch THEN
        RAISE EXCEPTION 'it was built from epoch % of the shard map, which is at %',
            own.epoch, known_epoch USING ERRCODE = 'SR012';
    ELSIF own.epoch > known_epoch THEN
        RAISE EXCEPTION 'it was built from epoch %', own.epoch USING ERRCODE = 'SR013';
    END IF;
    FOR it IN
        SELECT d.shard, d.fingerprint AS expected, s.*
          FROM sqlroute.coordinator_state s FULL JOIN sqlroute.coordinator_shard d
            ON d.shard = s.asked
         WHERE d.keyspace = of_keyspace OR d.keyspace IS NULL
    LOOP
        least := floors -> it.shard;
        IF it.shard IS NULL OR it.answered IS DISTINCT FROM it.shard THEN
            RAISE EXCEPTION 'what it takes for shard % is %', coalesce(it.shard, it.asked),
                coalesce(it.answered, 'no shard') USING ERRCODE = 'SR012';
        ELSIF it.epoch IS DISTINCT FROM own.epoch THEN
            RAISE EXCEPTION 'it was built from epoch % of the shard map, and shard % is at %',
                own.epoch, it.shard, it.epoch USING ERRCODE = 'SR012';
        ELSIF it.is_schema AND it.fingerprint IS DISTINCT FROM it.expected THEN
            RAISE EXCEPTION 'the schema of shard % has changed', it.shard USING ERRCODE = 'SR012';
        ELSIF it.timeline IS NULL OR it.timeline IS DISTINCT FROM (least ->> 0)::int THEN
            RAISE EXCEPTION 'it reads shard % on timeline %, not %', it.shard,
                coalesce(it.timeline::text, 'of a replica'), least ->> 0 USING ERRCODE = 'SR014';
        ELSIF it.lsn < (least ->> 1)::pg_lsn THEN
            RAISE EXCEPTION 'it reads shard % at %, before %', it.shard, it.lsn, least ->> 1
                USING ERRCODE = 'SR014';
        END IF;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    op.create_table(
        "coordinator",
        sa.Column("keyspace", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("schemas", sa.ARRAY(sa.Text), nullable=False),
        sa.Column("left_out", JSONB, nullable=False),
        sa.Column(
            "built_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        schema="sqlroute",
    )
    op.create_table(
        "coordinator_shard",
        sa.Column(
            "keyspace",
            sa.Text,
            sa.ForeignKey("sqlroute.coordinator.keyspace", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("shard", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text, nullable=False),
        schema="sqlroute",
    )
    for statement in (FINGERPRINT, STATE, CHECK):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP FUNCTION sqlroute.coordinator_check(text, bigint, jsonb)")
    op.execute("DROP VIEW sqlroute.shard_state")
    op.execute("DROP FUNCTION sqlroute.fingerprint()")
    for table in ("coordinator_shard", "coordinator"):
        op.drop_table(table, schema="sqlroute")
