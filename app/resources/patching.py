"""Parts of the routes of workflows, machines and pools: the values that a PATCH sets, and the runs of an object in batches."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel

from app.models import Machine, Pool, Workflow
from app.stores.database import Connection
from app.stores.statements import statement

Table = type[Workflow] | type[Machine] | type[Pool]
Owner = Literal["workflow_id", "assigned_machine_id", "pinned_machine_id"]
OWNERS: tuple[Owner, ...] = ("workflow_id", "assigned_machine_id", "pinned_machine_id")

# Each of these columns has an index in this order; that of workflows has the organization in between. The others must not let
# the organization's index seem as good.
_OF_ORGANIZATION = dict.fromkeys(OWNERS, "organization_id || '' = :organization_id")
_OF_ORGANIZATION["workflow_id"] = "organization_id = :organization_id"
LOCK_RUNS = {
    column: statement(
        f"runs.lock_by.{column}",
        f"""
        SELECT id, created_at FROM runs
        WHERE {column} = :owner_id AND {_OF_ORGANIZATION[column]} AND (created_at, id) < (:created_at, :run_id)
        ORDER BY created_at DESC, id DESC LIMIT 200 FOR UPDATE
        """,
    )
    for column in OWNERS
}


class Change:
    """A PATCH of one row: one statement, whatever the request names."""

    def __init__(self, table: Table, *columns: str, always: str = "") -> None:
        self._columns = columns
        self._nullable = {name for name in columns if table.__table__.c[name].nullable}
        name = table.__tablename__
        sets = [
            f"{column} = CASE WHEN '{column}' = ANY(:named::text[]) THEN :{column} ELSE {column} END"
            for column in columns
        ]
        self._statement = statement(
            f"{name}.change",
            f"""
            UPDATE {name} SET {", ".join([*sets, *([always] if always else [])])}
            WHERE id = :id AND organization_id = :organization_id
            """,
        )

    def named(self, options: BaseModel) -> dict[str, Any]:
        """The columns that the request sets: absent keeps, null clears what may be null and otherwise keeps."""
        given = {name: getattr(options, name) for name in options.model_fields_set.intersection(self._columns)}
        return {name: value for name, value in given.items() if value is not None or name in self._nullable}

    async def apply(
        self, connection: Connection, organization_id: str, row_id: UUID, values: Mapping[str, object]
    ) -> None:
        """Set these columns and keep the others."""
        new = {**dict.fromkeys(self._columns), **values}
        await connection.execute(self._statement, id=row_id, organization_id=organization_id, named=list(values), **new)


async def locked_runs(
    connection: Connection, column: Owner, owner_id: UUID, organization_id: str
) -> AsyncIterator[list[UUID]]:
    """Lock all runs of an organization's workflow or machine, newest first, a batch at a time.

    Work on one batch stays far below the statement timeout.
    """
    created_at, run_id = datetime(9999, 1, 1, tzinfo=UTC), UUID(int=2**128 - 1)
    owner = {"owner_id": owner_id, "organization_id": organization_id}
    while rows := await connection.fetch(LOCK_RUNS[column], **owner, created_at=created_at, run_id=run_id):
        yield [row["id"] for row in rows]
        created_at, run_id = rows[-1]["created_at"], rows[-1]["id"]
