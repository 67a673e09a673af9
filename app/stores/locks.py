"""Every advisory lock of PostgreSQL that the service and its migrations take: its number, and what it keeps apart.

An advisory lock locks no row: it makes transactions take turns where no row could be locked, because the row does not exist yet
or because many rows are counted. All locks but MIGRATION end with their transaction.

Most locks have two numbers: the kind of lock, and a hash of its subject (mostly an organization). Two subjects with the same
hash wait for each other, and nothing worse happens. No two kinds have the same number; no other file writes one.
"""

from typing import Final

# --- one for the whole database ---------------------------------------------------------------------------------------

# Replicas that start together migrate one after the other. A session holds it, because a migration has several transactions.
MIGRATION: Final = 0x72756E73  # "runs" in ASCII

# Two sessions cannot change the settings of one role at once: PostgreSQL ends the second with an error.
ROLE_SETTINGS: Final = MIGRATION + 1

# Replicas that start together give the file store its marker one after the other, so that it gets one.
STORAGE_MARKER: Final = MIGRATION + 2

# --- one for each organization ----------------------------------------------------------------------------------------

# Replicas place the runs of one organization one after the other. A second pass could otherwise take a session that the first
# one is about to make busy and has not committed yet. It is tried, never waited for.
PLACEMENT: Final = 1382379123

# Requests count waiting runs one after the other while little is left of a quota, so that the last place is given once.
QUOTA_TURN: Final = 1903259745

# Requests that are far from the quota hold this lock shared. A bulk that is large for the quota holds it alone.
QUOTA_BESIDE_OTHERS: Final = 1903259746

# Two requests that start a bulk retry count the jobs under way one after the other, so that their limit holds.
BULK_RETRY: Final = 1903259747

# Two requests that create a webhook endpoint count the endpoints one after the other, so that their limit holds.
WEBHOOK_ENDPOINTS: Final = 2003132008  # "webh" in ASCII

# --- one for each Idempotency-Key -------------------------------------------------------------------------------------

# A request that stores a reply holds it until COMMIT. A set of requests tries the lock: the primary key would make the whole
# set wait for a twin of one of its requests.
IDEMPOTENCY_KEY: Final = 1768187245

# --- SQL --------------------------------------------------------------------------------------------------------------

_ORGANIZATION: Final = ":organization_id"


def wait_for(kind: int, subject: str = _ORGANIZATION) -> str:
    """SQL that waits for the lock of this subject (SQL text), until the statement's timeout."""
    return f"pg_advisory_xact_lock({kind}, hashtext({subject}))"


def wait_beside_others(kind: int, subject: str = _ORGANIZATION) -> str:
    """SQL that waits for the lock, which others may hold in this way at the same time."""
    return f"pg_advisory_xact_lock_shared({kind}, hashtext({subject}))"


def try_for(kind: int, subject: str = _ORGANIZATION) -> str:
    """SQL that takes the lock if it is free, and says whether it did."""
    return f"pg_try_advisory_xact_lock({kind}, hashtext({subject}))"


def wait_for_role_settings() -> str:
    """SQL that waits for ROLE_SETTINGS, which has no subject."""
    return f"pg_advisory_xact_lock({ROLE_SETTINGS})"


def wait_for_storage_marker() -> str:
    """SQL that waits for STORAGE_MARKER, which has no subject."""
    return f"pg_advisory_xact_lock({STORAGE_MARKER})"


def try_for_migration() -> str:
    """SQL that takes MIGRATION for the session if it is free, and says whether it did."""
    return f"pg_try_advisory_lock({MIGRATION})"
