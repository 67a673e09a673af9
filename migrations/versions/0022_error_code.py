"""What went wrong, as a word that programs compare: of a run and of each archived attempt.

The version before may go on running. It leaves the column as it is when it ends or retries a run, so the trigger that sets
`changed_at` for it empties the code, too.

Revision ID: 0022
Revises: 0021
"""

from alembic import op

revision = "0022"
down_revision = "0021"


def _trigger(also: str) -> str:
    return f"""
    CREATE OR REPLACE FUNCTION set_changed_at() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.changed_at := clock_timestamp();
        {also}
        RETURN NEW;
    END
    $$
    """


def upgrade() -> None:
    op.execute("ALTER TABLE runs ADD COLUMN error_code text")
    op.execute("ALTER TABLE run_attempts ADD COLUMN error_code text")
    op.execute(_trigger("NEW.error_code := NULL;"))


def downgrade() -> None:
    op.execute(_trigger(""))
    op.execute("ALTER TABLE run_attempts DROP COLUMN error_code")
    op.execute("ALTER TABLE runs DROP COLUMN error_code")
