"""What workflows, machines and pools share: what a PATCH sets, and the runs of one in batches."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel

from app.models import Machine, Pool, Workflow
from app.stores.database import Connection

Table = type[Workflow] | type[Machine] | type[Pool]
Owner = Literal["workflow_id", "assigned_machine_id", "pinned_machine_id"]


def changes(table: Table, options: BaseModel) -> dict[str, Any]:
    """The columns that a PATCH sets: absent keeps, null clears what may be null and otherwise keeps."""
    columns = table.__table__.c
    given = {name: getattr(options, name) for name in options.model_fields_set if name in columns}
    return {name: value for name, value in given.items() if value is not None or columns[name].nullable}


async def locked_runs(connection: Connection, column: Owner, owner_id: UUID) -> AsyncIterator[list[UUID]]:
    """Lock all runs of a workflow or machine, newest first, a batch at a time.

    What is done with one batch stays far below the statement timeout. Each of these columns has an index in this order.
    """
    created_at, run_id = datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1)
    statement = (
        f"SELECT id, created_at FROM runs WHERE {column} = $1 AND (created_at, id) < ($2, $3)"
        " ORDER BY created_at DESC, id DESC LIMIT 200 FOR UPDATE"
    )
    while rows := await connection.fetch(statement, owner_id, created_at, run_id):
        yield [row["id"] for row in rows]
        created_at, run_id = rows[-1]["created_at"], rows[-1]["id"]
