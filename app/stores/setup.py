"""What `migrate` leaves in a database beside the tables, and whether a database fits this version of the service.

Three things: what the service's role may do with each table, the settings that its sessions have, and a mark that says which
replicas may go on beside a migration. It knows SQL and no connections; `migrations/env.py` writes, `database.py` checks.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from app import FILES
from app.errors import DatabaseUnavailable
from app.stores.statements import statement

# --- what the service's role may do -----------------------------------------------------------------------------------

_ALL = "SELECT, INSERT, UPDATE, DELETE"

# The whole of it; each run of `migrate` takes everything and gives this. A new table needs a line here. What is only ever
# added to gets no UPDATE and no DELETE: rows that a foreign key removes go with the owner's rights.
GRANTS = {
    "alembic_version": "SELECT",
    "api_keys": "SELECT, UPDATE (last_used_at)",  # `keys` makes and revokes them, as the owner
    "bulk_retries": _ALL,
    "planned_retries": _ALL,
    "bulk_retry_items": "SELECT, INSERT, UPDATE",  # they go with their job
    "deletions": _ALL,
    "dispatches": _ALL,
    "idempotency_keys": _ALL,
    "machines": _ALL,
    "pool_machines": "SELECT, INSERT, DELETE",
    "pools": _ALL,
    "run_attachments": _ALL,
    "run_attempts": "SELECT, INSERT",
    "run_events": "SELECT, INSERT",
    "run_outputs": _ALL,
    "runs": _ALL,
    "shared_rounds": _ALL,
    "storage_marker": "SELECT, INSERT",
    "stored_replies": _ALL,
    "webhook_deliveries": _ALL,
    "webhook_endpoints": _ALL,
    "webhook_events": _ALL,
    "webhook_recoveries": _ALL,
    "webhook_secrets": _ALL,
    "workflow_versions": "SELECT, INSERT, DELETE",
    "workflows": _ALL,
}

# What it may do beyond that, only through functions that run as the owner.
FUNCTIONS = ("prune_run_events(integer, integer)", "prune_run_attempts(integer, integer)")


def limits(role: str, schema: str, database: str) -> list[str]:
    """Statements that leave the role nothing but rows. The names are quoted already."""
    return [
        # Everybody has TEMPORARY by default, and before PostgreSQL 15 had CREATE in `public`. This database is the service's.
        f"REVOKE CREATE, TEMPORARY ON DATABASE {database} FROM PUBLIC, {role}",
        f"REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC, {role}",
        f"GRANT USAGE ON SCHEMA {schema} TO {role}",
    ]


def table_grants(role: str, schema: str) -> list[str]:
    """Statements that take the role all rights to the tables and give it those of GRANTS."""
    return [
        *(f"REVOKE ALL ON {schema}.{table} FROM {role}" for table in GRANTS),
        *(f"GRANT {rights} ON {schema}.{table} TO {role}" for table, rights in GRANTS.items()),
        *(f"GRANT EXECUTE ON FUNCTION {schema}.{function} TO {role}" for function in FUNCTIONS),
    ]


# What a role has beyond that, in words. :role is its name, :schema and :database are those of the tables.
TOO_MUCH = """
SELECT CASE WHEN rolsuper THEN ARRAY['SUPERUSER'] ELSE array_remove(ARRAY[
    CASE WHEN rolbypassrls THEN 'BYPASSRLS' END,
    CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
    CASE WHEN rolcreatedb THEN 'CREATEDB' END,
    CASE WHEN rolreplication THEN 'REPLICATION' END,
    CASE WHEN pg_has_role(oid, current_user, 'MEMBER') THEN 'membership in the owner''s role' END,
    CASE WHEN has_database_privilege(oid, :database, 'CREATE, TEMPORARY') THEN 'CREATE or TEMPORARY on the database' END,
    CASE WHEN has_schema_privilege(oid, :schema, 'CREATE') THEN 'CREATE on the schema' END,
    CASE WHEN EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                      WHERE c.relowner = pg_roles.oid AND n.nspname = :schema) THEN 'tables of its own' END
], NULL) END
FROM pg_roles WHERE rolname = :role
"""

# --- what its sessions are like ---------------------------------------------------------------------------------------

# The role carries these: nothing is sent when a connection is made, because a pooler (PgBouncer) would refuse it, or drop it.
_EXACTLY = {
    # Plans are kept. One made while a table was empty, as the deletion list often is, would read all of it once it is full;
    # everything here has an index.
    "enable_seqscan": "off",
    "jit": "off",  # short statements: compiling them costs more than it saves
    # One plan for each statement and connection. With `auto`, a statement with a condition that is switched off (`:quota IS
    # NULL OR ...`) or with an array is planned anew at each call: PostgreSQL takes the plan for these values for cheaper.
    "plan_cache_mode": "force_generic_plan",
    "TimeZone": "UTC",  # how times are shown in documents that PostgreSQL makes
}
_AT_MOST_MS = {
    "lock_timeout": 2_000,  # the longest wait for a twin at the switch
    "idle_in_transaction_session_timeout": 10_000,  # a frozen replica must not hold a run's row
}
CHECKED = [*_EXACTLY, *_AT_MOST_MS, "statement_timeout"]  # what FITS is asked for


def statement_timeout_ms(patience: float) -> int:
    """Ends before our own timeout: the server then says that nothing was done, while our timeout says nothing."""
    return int(patience * 900)


def role_settings(patience: float) -> dict[str, str]:
    """What `migrate` sets for the role. `patience` is DATABASE_TIMEOUT_SECONDS."""
    statement_timeout = statement_timeout_ms(patience)
    at_most = _AT_MOST_MS | {"lock_timeout": min(_AT_MOST_MS["lock_timeout"], statement_timeout * 3 // 4)}
    return {
        "application_name": "runs-api",  # shown in pg_stat_activity; nothing depends on it
        **_EXACTLY,
        **{name: str(value) for name, value in at_most.items()},
        "statement_timeout": str(statement_timeout),
    }


# Formatted by the server, which knows how its names are quoted.
CARRY = statement(
    "setup.carry",
    "SELECT format('ALTER ROLE %I IN DATABASE %I SET %I = %L', current_user, current_database(), :name::text, :value::text)",
)

# --- whether it fits --------------------------------------------------------------------------------------------------

_VERSIONS = FILES / "migrations" / "versions"

# "needs 0002" as the comment of alembic_version: who does not know migration 0002 must not serve this database.
_MARK = "needs "

_IS_READ_ONLY = "pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean"

FITS = statement(
    "setup.fits",
    f"""
    SELECT name, setting, (SELECT version_num FROM alembic_version) AS revision,
           obj_description('alembic_version'::regclass, 'pg_class') AS mark, {_IS_READ_ONLY} AS is_read_only,
           extract(epoch FROM clock_timestamp())::float8 AS now
    FROM pg_settings WHERE name = ANY(:names)
    """,
)


# A standby, and a server or role with default_transaction_read_only.
IS_READ_ONLY = statement("setup.is_read_only", f"SELECT {_IS_READ_ONLY}")

NOW = statement("setup.now", "SELECT extract(epoch FROM clock_timestamp())::float8")

# Together they sort 4 MiB in a temporary file, which needs room on the same disk as tables do.
LITTLE_MEMORY = statement("setup.little_memory", "SELECT set_config('work_mem', '64kB', true)")
TEMPORARY_FILE = statement(
    "setup.temporary_file",
    """
    SELECT max(length(filler)) FROM (
        SELECT repeat(number::text, 1000) AS filler FROM generate_series(1000, 2000) AS number ORDER BY number % 7 OFFSET 0
    ) AS sorted
    """,
)

# A role that may read this table was set up by `migrate`.
READABLE = statement("setup.readable", "SELECT 1 FROM runs LIMIT 1")


class Unfit(DatabaseUnavailable):
    """The database answers and cannot be used as it is. `reason` is for readiness, `line` for the operator."""

    detail = "The database is not set up for this version of the service; nothing was changed. Its operator must act."

    def __init__(self, reason: str, line: str) -> None:
        super().__init__()
        self.kind = reason
        self.reason = reason
        self.line = line


class NotMigrated(Unfit):
    """Tables, columns or rights are missing."""

    def __init__(self, found: str) -> None:
        super().__init__("not_migrated", f"{found}: run `python -m app migrate`.")


@cache
def known_revisions() -> tuple[str, ...]:
    """The migrations that this version has, oldest first."""
    return tuple(sorted(file.name.partition("_")[0] for file in _VERSIONS.glob("[0-9]*.py")))


def mark(revision: str | None) -> str | None:
    """The comment for a database in which this is the newest migration that older replicas do not bear."""
    return None if revision is None else _MARK + revision


def is_newer(revision: str | None) -> bool:
    """Whether a later version has migrated the database."""
    return revision is not None and revision not in known_revisions()


def check_mark(revision: str | None, comment: str | None) -> None:
    """Raises Unfit when a later version has made the database unusable for this one."""
    needed = (comment or "").removeprefix(_MARK)
    if needed and needed not in known_revisions():
        raise Unfit(
            "incompatible",
            f"the database is at migration {revision}, and {needed} is marked incompatible with versions that lack it; "
            f"this one ends at {known_revisions()[-1]}. Start the version that migrated it, or downgrade the database.",
        )


def check_schema(row: Mapping[str, Any]) -> str:
    """The database's revision, from a row of FITS. Raises Unfit."""
    revision, needed = row["revision"], known_revisions()[-1]
    if revision != needed:
        if not is_newer(revision):
            at = "has not been migrated" if revision is None else f"is at migration {revision}"
            raise NotMigrated(f"the database {at}, and this version needs {needed}")
        check_mark(revision, row["mark"])
    return str(revision)


def check_session(rows: Sequence[Mapping[str, Any]], patience: float) -> None:
    """Whether the role carries its settings, from the rows of FITS. Raises Unfit."""
    found = {row["name"]: row["setting"] for row in rows}
    bounds = _AT_MOST_MS | {"statement_timeout": statement_timeout_ms(patience)}
    wrong = [name for name, value in _EXACTLY.items() if found.get(name) != value]
    wrong += [name for name, most in bounds.items() if not 0 < int(found.get(name, 0)) <= most]
    if wrong:
        seen = ", ".join(f"{name}={found.get(name)}" for name in wrong)
        raise Unfit(
            "role_settings",
            f"a connection has {seen}, which its role must carry otherwise: run `python -m app migrate` with this "
            "DATABASE_URL and DATABASE_TIMEOUT_SECONDS, and let a pooler in between reconnect "
            "(docs/operations.md, PgBouncer).",
        )
