"""Plans of short tables stay good when they are long. The version before may go on running; its lists of one state are slower.

While a table is short all its indexes cost the same, also one that must be read as a whole: a list's index has the id as its
last column, and can look a row up by it. PostgreSQL then takes the index that was made last, and a plan that is kept keeps
it. So indexes are made in that order: the widest first, the primary key last. Of a long table nothing needs to be made anew.

The index of states gets a collation of its own: it is for lists, which ask for that. Others that name a state, and a machine
or a session, have better ones. Nobody is kept from writing.

Revision ID: 0019
Revises: 0018
"""

from alembic import op
from sqlalchemy import text

revision = "0019"
down_revision = "0018"

ORDER = {
    "machines": ("pk_machines",),
    "pools": ("pk_pools",),
    "run_attachments": ("ix_run_attachments_run", "pk_run_attachments"),
    "runs": (
        "ix_runs_workflow",
        "ix_runs_session",
        "ix_runs_pinned_machine",
        "ix_runs_assigned_machine",
        "ix_runs_active_session",
        "ix_runs_session_at_work",
        "uq_runs_active_machine",
        "pk_runs",
    ),
    "webhook_deliveries": ("pk_webhook_deliveries",),
    "webhook_endpoints": ("pk_webhook_endpoints",),
    "webhook_events": ("pk_webhook_events",),
    "workflows": ("pk_workflows",),
}
LONG = 8 * 1024 * 1024  # bytes of a table


def _index_of_states(collation: str) -> list[str]:
    return [
        "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_status_new",  # one that was interrupted stays behind, and is no index
        "CREATE INDEX CONCURRENTLY ix_runs_status_new"
        f" ON runs (organization_id, status{collation}, created_at DESC, id DESC)",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_runs_status",
        "ALTER INDEX ix_runs_status_new RENAME TO ix_runs_status",
    ]


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in _index_of_states(' COLLATE "C"'):
            op.execute(statement)
        for table, indexes in ORDER.items():
            for index in indexes:
                for left in ("ccnew", "ccold"):
                    op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {index}_{left}")
                if op.get_bind().execute(text(f"SELECT pg_relation_size('{table}') < {LONG}")).scalar_one():
                    op.execute(f"REINDEX INDEX CONCURRENTLY {index}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for statement in _index_of_states(""):
            op.execute(statement)
