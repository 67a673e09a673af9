"""What workflows, machines and pools share: a page of rows, what a PATCH sets, and the runs of one in batches."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import ColumnElement, func, literal_column, select
from sqlalchemy.orm import InstrumentedAttribute

from app.models import Machine, Pool, Workflow
from app.stores.database import Connection, Record
from app.stores.statements import sql

Table = type[Workflow] | type[Machine] | type[Pool]
Owner = Literal["workflow_id", "assigned_machine_id", "pinned_machine_id"]


def within(
    column: InstrumentedAttribute[datetime], start: datetime | None, end: datetime | None
) -> list[ColumnElement[bool]]:
    """Conditions for a time between two others, both included; None leaves a side open."""
    after = [] if start is None else [column >= start]
    return after if end is None else [*after, column <= end]


async def page(
    connection: Connection,
    table: Table,
    columns: Mapping[str, str],
    where: Sequence[ColumnElement[bool]],
    skip: int,
    limit: int,
) -> tuple[list[Record], int]:
    """These columns of one page, newest first, and how many rows there are in all."""
    statement, values = sql(select(func.count()).select_from(table).where(*where))
    total: int = await connection.fetchval(statement, *values)
    if total <= skip:
        return [], total
    shown: list[ColumnElement[Any]] = [literal_column(text).label(name) for name, text in columns.items()]
    newest = select(*shown).select_from(table).where(*where).order_by(table.created_at.desc(), table.id.desc())
    statement, values = sql(newest.offset(skip).limit(limit))
    return await connection.fetch(statement, *values), total


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
