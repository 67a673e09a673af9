"""The status `task_failed`: the executor did its work, and the task itself failed.

An older replica cannot read a run with this status, so older replicas refuse the database from now on. The constraints are
checked without a lock that keeps writers out while all rows are read.

Revision ID: 0029
Revises: 0028
"""

from alembic import op

revision = "0029"
down_revision = "0028"
incompatible = True  # replicas that lack it refuse to serve (migrations/env.py)

BEFORE = {
    "runs": "'scheduling', 'running', 'success', 'cancelled', 'error'",
    "run_attempts": "'success', 'cancelled', 'error'",
}


def _replace(table: str, statuses: str) -> None:
    """Once more after an interruption does no harm."""
    constraint = f"ck_{table}_status"
    op.execute(
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {constraint},"
        f" ADD CONSTRAINT {constraint} CHECK (status IN ({statuses})) NOT VALID"
    )
    op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {constraint}")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for table, statuses in BEFORE.items():
            _replace(table, f"{statuses}, 'task_failed'")


def downgrade() -> None:
    # A changed_at that moves keeps the trigger of 0021 from setting it to now and from emptying the code.
    op.execute(
        "UPDATE runs SET status = 'error', changed_at = changed_at + interval '1 microsecond' WHERE status = 'task_failed'"
    )
    op.execute("UPDATE run_attempts SET status = 'error' WHERE status = 'task_failed'")
    for table, statuses in BEFORE.items():
        _replace(table, statuses)
