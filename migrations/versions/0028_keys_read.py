"""The scope `keys:read`, and the index of an organization's keys.

The version before knows no such scope: a key that has it may do there what its other scopes say.

Revision ID: 0028
Revises: 0027
"""

from alembic import op

revision = "0028"
down_revision = "0027"

OLD = "'{*,runs:read,runs:write,runs:execute,resources:write,webhooks:write}'"
NEW = "'{*,runs:read,runs:write,runs:execute,resources:write,webhooks:write,keys:read}'"

# Without the id, unlike in other tables: keys are found by their id alone, and a plan that was made while the table was empty
# could then read all of this index for one key. Dropped first: one that was interrupted stays behind, and is no index.
INDEX = [
    "DROP INDEX CONCURRENTLY IF EXISTS ix_api_keys_organization",
    "CREATE INDEX CONCURRENTLY ix_api_keys_organization ON api_keys (organization_id, created_at DESC)",
]


def _allow(scopes: str) -> None:
    op.execute("ALTER TABLE api_keys DROP CONSTRAINT IF EXISTS ck_api_keys_scopes")
    op.execute(
        f"ALTER TABLE api_keys ADD CONSTRAINT ck_api_keys_scopes CHECK (scopes <> '{{}}' AND scopes <@ {scopes})"
    )


def upgrade() -> None:
    _allow(NEW)
    with op.get_context().autocommit_block():
        for statement in INDEX:
            op.execute(statement)


def downgrade() -> None:
    op.execute("DROP INDEX ix_api_keys_organization")
    # A key with no other scope may do nothing any more.
    op.execute(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()), scopes = '{runs:read}' WHERE scopes = '{keys:read}'"
    )
    op.execute("UPDATE api_keys SET scopes = array_remove(scopes, 'keys:read') WHERE 'keys:read' = ANY (scopes)")
    _allow(OLD)
