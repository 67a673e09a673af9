"""The lane of runs that ask for pools names them by a hash: an entry of its index has room for the ids of 71 pools.

The version before may go on running: to it, as to this one, a lane is a name that runs with the same wishes share. Between
the two, runs that want the same pools may stand in two lanes; lanes compete by their first runs, so none of them loses its
turn.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"

# Only waiting runs stand in a lane; a retry gives the others a new one.
WAITING = "status = 'scheduling' AND assigned_machine_id IS NULL"

UP = f"""
UPDATE runs SET lane = 'pools:' || encode(sha256(convert_to(substr(lane, length('pools:') + 1), 'UTF8')), 'hex')
WHERE {WAITING} AND lane LIKE 'pools:%-%'
"""

# Those that ask for more pools keep the hash, which is as good as any name.
DOWN = f"""
UPDATE runs SET lane = 'pools:' || (
    SELECT string_agg(DISTINCT pool_id::text, ',' ORDER BY pool_id::text) FROM unnest(pool_ids) AS pool_id
)
WHERE {WAITING} AND lane LIKE 'pools:%' AND lane NOT LIKE '%-%' AND cardinality(pool_ids) <= 70
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
