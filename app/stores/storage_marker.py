"""The marker of the file store: a file with an id that the database holds, too.

A folder that was not mounted looks like a store in which every file is missing, and what is deleted there stays in the real
store. So the marker is written once, while the database holds no id yet. From then on a store without it, or with another one,
is not used, and nobody writes it again.
"""

from uuid import UUID, uuid4

from app.stores import locks
from app.stores.database import Connection, Database
from app.stores.files import FileStore
from app.stores.statements import statement

MISSING = "marker_missing"  # why the store is not used: an empty folder, or another bucket
FOREIGN = "marker_foreign"  # the store of another service

# If the database names files, the store must have one of so many before it gets its marker.
_LOOKED_AT = 10

OWN = statement("storage_marker.own", "SELECT (SELECT store_id FROM storage_marker WHERE is_only) AS store_id")
LOCK = statement("storage_marker.lock", f"SELECT {locks.wait_for_storage_marker()}")
KEEP = statement("storage_marker.keep", "INSERT INTO storage_marker (store_id) VALUES (:store_id)")
SOME_FILES = statement(
    "storage_marker.some_files",
    """
    SELECT storage_path FROM run_attachments
    WHERE storage_path IS NOT NULL AND (expires_at IS NULL OR expires_at > now()) ORDER BY id LIMIT :most
    """,
)


async def problem(database: Database, files: FileStore) -> str | None:
    """Why the store is not the database's own; None: it is. The store gets its marker if the database holds no id yet.

    Raises DatabaseUnavailable and StorageUnavailable.
    """
    if files.own_marker is None:
        async with database.connection() as connection:
            own: UUID | None = await connection.fetchval(OWN)
        if own is None:
            async with database.transaction() as connection:
                own = await _mark(connection, files)
        if own is None:
            files.is_own = False
            return MISSING
        files.own_marker = str(own)
    found = await files.marker()
    files.is_own = found == files.own_marker
    if files.is_own:
        return None
    return MISSING if found is None else FOREIGN


async def _mark(connection: Connection, files: FileStore) -> UUID | None:
    """The id that the database holds from now on; None if the store lacks the files that the database names."""
    await connection.execute(LOCK)  # replicas take turns
    own: UUID | None = await connection.fetchval(OWN)
    if own is not None:
        return own
    found = await files.marker()
    if found is None:
        named = [row["storage_path"] for row in await connection.fetch(SOME_FILES, most=_LOOKED_AT)]
        if named and not any([await files.size(name) is not None for name in named]):
            return None
        found = await files.write_marker(str(uuid4()))
    own = UUID(found)  # of a store that another database uses, too: it may be the one from which this one was restored
    await connection.execute(KEEP, store_id=own)
    return own
