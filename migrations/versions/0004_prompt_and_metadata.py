"""A run can have a prompt and models of its own, and an attempt reports what it used.

Revision ID: 0004
Revises: 0003
"""

from alembic import op

revision = "0004"
down_revision = "0003"

UP = [
    "ALTER TABLE runs ADD COLUMN main_prompt text, ADD COLUMN model_metadata json",
    "ALTER TABLE run_outputs ADD COLUMN usage_metadata json",
]

DOWN = [
    "ALTER TABLE runs DROP COLUMN main_prompt, DROP COLUMN model_metadata",
    "ALTER TABLE run_outputs DROP COLUMN usage_metadata",
]


def upgrade() -> None:
    for statement in UP:
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
