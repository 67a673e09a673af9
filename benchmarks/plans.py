"""What PostgreSQL does for a list of 1,000,000 runs: EXPLAIN ANALYZE of the very statements that the service sends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
from pydantic import SecretStr

from app.access.auth import AUTHENTICATE, digest
from app.config import MIB, Settings
from app.models import RunStatus
from app.runs import projection, retry_statements
from app.runs.listing import FIELDS, RunFilter, list_runs
from app.stores.database import Connection, Database, Record
from app.stores.paging import Slice
from benchmarks.world import ORGANIZATION, Data, run_id

EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF)"


class _Explained:
    """A driver's connection that runs each statement twice, once to see its plan."""

    def __init__(self, connection: Any, plans: list[str]) -> None:
        self._connection = connection
        self._plans = plans

    async def _explain(self, sql: str, *args: object) -> None:
        rows = await self._connection.fetch(f"{EXPLAIN} {sql}", *args)
        self._plans.append("\n".join(row[0] for row in rows))

    async def execute(self, sql: str, *args: object) -> str:
        done: str = await self._connection.execute(sql, *args)
        return done

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        await self._explain(sql, *args)
        rows: list[Record] = await self._connection.fetch(sql, *args)
        return rows

    async def fetchrow(self, sql: str, *args: object) -> Record | None:
        await self._explain(sql, *args)
        row: Record | None = await self._connection.fetchrow(sql, *args)
        return row

    async def fetchval(self, sql: str, *args: object) -> Any:
        await self._explain(sql, *args)
        return await self._connection.fetchval(sql, *args)


class _ExplainedDatabase(Database):
    """Gives that connection to whoever asks for one."""

    def __init__(self, data: Data, connection: Connection) -> None:
        super().__init__(Settings.model_construct(database_url=SecretStr(data.app_url)))
        self._only = connection

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        yield self._only


def of_million(data: Data) -> str:
    """The plans, as Markdown."""
    return asyncio.run(_explain(data))


async def _explain(data: Data) -> str:
    plans: list[str] = []
    raw = await asyncpg.connect(data.app_url, timeout=10)
    try:
        connection = Connection(_Explained(raw, plans))
        database = _ExplainedDatabase(data, connection)
        everything = RunFilter(ORGANIZATION)
        sections: list[tuple[str, list[str]]] = []

        def section(title: str) -> None:
            sections.append((title, plans[:]))
            plans.clear()

        await connection.fetchrow(AUTHENTICATE, key_hash=digest(data.key.encode()))
        section("authenticate")
        await connection.fetchrow(projection.GET_RUN, run_id=run_id(1), organization_id=ORGANIZATION, bound_to=None)
        section("one run")
        await connection.fetchrow(retry_statements.READ, run_id=run_id(1), organization_id=ORGANIZATION)
        section("retry: read")
        first = Slice(0, 100, 32 * MIB)
        await list_runs(database, everything, FIELDS, first)
        section("list: the newest page, then its total")
        await list_runs(database, everything, FIELDS, Slice(900_000, 100, 32 * MIB))
        section("list: skip=900000")
        of_workflow = RunFilter(ORGANIZATION, workflow_id=data.workflow, status=RunStatus.SUCCESS)
        await list_runs(database, of_workflow, FIELDS, first)
        section("list: workflow_id and status")
        await list_runs(
            database, RunFilter(ORGANIZATION, created_at_from=datetime(2020, 1, 1, tzinfo=UTC)), FIELDS, first
        )
        section("list: created_at_from")
        [machine] = await raw.fetch("SELECT id FROM machines LIMIT 1")
        await list_runs(database, RunFilter(ORGANIZATION, machine_id=machine["id"]), FIELDS, first)
        section("list: machine_id")
    finally:
        await raw.close()
    return "\n".join(
        f"#### {title}\n\n" + "\n".join(f"```\n{plan}\n```\n" for plan in found) for title, found in sections
    )
