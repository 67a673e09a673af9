"""Keys have scopes, and an executor's is bound to its machine. Every key made before may do everything, as it could.

Revision ID: 0007
Revises: 0006
"""

from alembic import op

revision = "0007"
down_revision = "0006"

UP = """
ALTER TABLE api_keys
    ADD COLUMN scopes text[] NOT NULL DEFAULT '{*}'
        CONSTRAINT ck_api_keys_scopes
        CHECK (scopes <> '{}' AND scopes <@ '{*,runs:read,runs:write,runs:execute,resources:write,webhooks:write}'),
    ADD COLUMN machine_id uuid
        CONSTRAINT ck_api_keys_bound CHECK (machine_id IS NULL OR scopes <@ '{runs:read,runs:execute}')
"""

# A limited key would become one that may do everything: it goes.
DOWN = [
    "DELETE FROM api_keys WHERE scopes <> '{*}'",
    "ALTER TABLE api_keys DROP COLUMN machine_id, DROP COLUMN scopes",
]


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    for statement in DOWN:
        op.execute(statement)
