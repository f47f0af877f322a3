"""Coordinator: what a shard says of itself where a replica answers, and a check that takes those.

A replica is told by when its server was started, which the router knows of each node: that moment
is another one on every server, and after every start. ``coordinator_shard.node`` names the replica
that a coordinator's further database reads; the primary's row has none.
"""

import runpy
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# One look at the role: a promotion may end recovery between two expressions, never begin it.
STATE = """
CREATE OR REPLACE VIEW sqlroute.shard_state AS
SELECT s.name AS shard, k.name AS keyspace, k.epoch, sqlroute.fingerprint() AS fingerprint,
       CASE WHEN NOT here.is_replica
            THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int
        END AS timeline,
       CASE WHEN NOT here.is_replica THEN pg_current_wal_flush_lsn()
            ELSE pg_last_wal_replay_lsn() END AS lsn,
       here.is_replica, extract(epoch FROM pg_postmaster_start_time())::float8 AS started
  FROM sqlroute.shard s, sqlroute.keyspace k, (SELECT pg_is_in_recovery() AS is_replica) here
"""

# floors: for each shard the timeline of its primary, a position that must have been reached, and
# when the server was started, if it must be a replica. That a replica had reached what the session
# has seen before the statement began is what the router knows: a position that is read here is of
# later. Since replay only goes on within one life of a server, it is enough to see that it is this
# one; the position tells one that has crashed and begun anew from an earlier one.
CHECK = """
CREATE OR REPLACE FUNCTION
sqlroute.coordinator_check(of_keyspace text, known_epoch bigint, floors jsonb)
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
        SELECT d.shard, d.node, d.fingerprint AS expected, s.*
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
        ELSIF least ->> 2 IS NOT NULL
              AND (NOT it.is_replica OR it.started IS DISTINCT FROM (least ->> 2)::float8) THEN
            RAISE EXCEPTION 'what it reads shard % from, %, is not the replica that was meant, '
                'was promoted or has begun anew', it.shard, coalesce(it.node, 'a primary')
                USING ERRCODE = 'SR014';
        ELSIF least ->> 2 IS NULL
              AND (it.timeline IS NULL OR it.timeline IS DISTINCT FROM (least ->> 0)::int) THEN
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
    op.add_column("coordinator_shard", sa.Column("node", sa.Text), schema="sqlroute")
    op.execute(STATE)
    op.execute(CHECK)


def downgrade() -> None:
    before = runpy.run_path(str(Path(__file__).with_name("0004_coordinator.py")))
    op.execute("DROP VIEW sqlroute.shard_state")  # columns can be added to a view, not taken away
    op.execute(before["STATE"])
    op.execute("DROP FUNCTION sqlroute.coordinator_check(text, bigint, jsonb)")
    op.execute(before["CHECK"])
    op.drop_column("coordinator_shard", "node", schema="sqlroute")
