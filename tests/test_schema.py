"""The database's schema: the migrations make what the models say, can be undone, and may run together."""

import asyncio
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from app.scheduling.lanes import lane
from dev import settings_page
from tests.support.fork_server import run_forked
from tests.support.stack import Stack


@pytest.fixture
def url(stack: Stack) -> Iterator[str]:
    """An empty database beside the others."""
    name = f"schema_{uuid4().hex}"
    stack.sql(f'CREATE DATABASE "{name}"')
    yield stack.postgres.url.rpartition("/")[0] + f"/{name}"
    stack.sql(f'DROP DATABASE "{name}" WITH (FORCE)')


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked({"PATH": "", "DATABASE_URL": url}, "alembic", *arguments)


def test_models_and_migrations_agree_and_can_be_undone(url: str) -> None:
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "head"], ["check"]):
        done = alembic(url, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def rows_of(url: str, *statements: str) -> list[Any]:
    """Rows of the last of these statements, as tuples."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            for statement in statements:
                rows = await connection.fetch(statement)
            return [tuple(row.values()) for row in rows]
        finally:
            await connection.close()

    return asyncio.run(run())


def test_what_runs_have_produced_moves_with_them(url: str) -> None:
    """0002 and back, with data."""
    columns = "(id, organization_id, workflow_id, status, lane, attempt, ended_at"
    first = "SELECT id, attempt, {0}output_data::text AS data, {0}run_message_history::text AS history FROM "
    assert alembic(url, "upgrade", "0001").returncode == 0
    before = rows_of(
        url,
        "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), 'o', 'x')",
        f"INSERT INTO runs {columns}, output_data, run_message_history)"
        " SELECT gen_random_uuid(), 'o', id, 'success', 'any', n, now(),"
        " CASE WHEN n > 1 THEN json_build_object('n', n) END, CASE WHEN n > 2 THEN '[{}]'::json END"
        " FROM workflows, generate_series(1, 3) AS n",
        first.format("") + "runs ORDER BY attempt",
    )
    assert [row[1:] for row in before] == [(1, None, None), (2, '{"n" : 2}', None), (3, '{"n" : 3}', "[{}]")]
    moved = first.format("o.").replace("attempt", "r.attempt")
    moved += "runs r LEFT JOIN run_outputs o ON run_id = id AND o.attempt = r.attempt ORDER BY r.attempt"
    assert alembic(url, "upgrade", "0002").returncode == 0
    assert rows_of(url, moved) == before
    assert alembic(url, "downgrade", "0001").returncode == 0
    assert rows_of(url, first.format("") + "runs ORDER BY attempt") == before


def test_the_lanes_of_waiting_runs_are_hashed(url: str) -> None:
    """0003 and back: what waits stands in the lane that a new run with the same wishes gets."""
    pools = [uuid4() for _ in range(3)]
    written = {lane(None, None, pools[:count], False)[0]: ",".join(sorted(map(str, pools[:count]))) for count in (1, 3)}
    run = (
        "INSERT INTO runs (id, organization_id, workflow_id, status, ended_at, lane, pool_ids)"
        " SELECT gen_random_uuid(), 'o', id, '{}', {}, '{}', '{}' FROM workflows"
    )
    both = "{" + f"{pools[2]},{pools[1]},{pools[0]},{pools[1]}" + "}"
    assert alembic(url, "upgrade", "0002").returncode == 0
    lanes = "SELECT lane FROM runs ORDER BY lane"
    before = rows_of(
        url,
        "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), 'o', 'x')",
        *(
            run.format("scheduling", "NULL", f"pools:{ids}", "{" + ids + "}" if "," not in ids else both)
            for ids in written.values()
        ),
        run.format("scheduling", "NULL", "any", "{}"),
        run.format("success", "now()", "pools:that-it-waited-in", "{}"),
        lanes,
    )
    assert alembic(url, "upgrade", "0003").returncode == 0
    assert rows_of(url, lanes) == sorted([("any",), ("pools:that-it-waited-in",), *((name,) for name in written)])
    assert alembic(url, "downgrade", "0002").returncode == 0
    assert rows_of(url, lanes) == before


def test_runs_whose_task_failed_have_failed_for_the_version_before(url: str) -> None:
    """0029 and back, with data: neither the code of the error nor the time of the end is lost."""
    assert alembic(url, "upgrade", "0029").returncode == 0
    shown = "SELECT status, error_code, changed_at > now() - interval '1 hour' FROM runs"
    columns = "(id, organization_id, workflow_id, status, lane, attempt, ended_at, changed_at, error_code)"
    before = rows_of(
        url,
        "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), 'o', 'x')",
        f"INSERT INTO runs {columns} SELECT gen_random_uuid(), 'o', id, 'task_failed', 'any', 2, now(),"
        " now() - interval '1 day', 'totals.differ' FROM workflows",
        "INSERT INTO run_attempts (run_id, attempt, status, overridden) SELECT id, 1, 'task_failed', '{}' FROM runs",
        shown,
    )
    assert before == [("task_failed", "totals.differ", False)]
    done = alembic(url, "downgrade", "0028")
    assert done.returncode == 0, done.stderr
    assert rows_of(url, shown) == [("error", "totals.differ", False)]
    assert rows_of(url, "SELECT status FROM run_attempts") == [("error",)]
    assert alembic(url, "upgrade", "head").returncode == 0


def test_replicas_may_migrate_together(url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: alembic(url, "upgrade", "head"), range(3)))
    assert [one.returncode for one in done] == [0, 0, 0], [one.stderr for one in done]


def test_every_constraint_has_a_name_of_ours(stack: Stack) -> None:
    rows = stack.sql(
        "SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'"
        " AND conrelid <> 'alembic_version'::regclass AND conname !~ '^(pk|fk|uq|ck)_'"
    )
    assert rows == []


INSERT_RUN = (
    "INSERT INTO runs (id, organization_id, workflow_id, status, lane{columns})"
    " VALUES (gen_random_uuid(), 'o', '{workflow}', {status}, 'any'{values})"
)


@pytest.mark.parametrize(
    ("status", "columns", "values"),
    [
        ("'done'", "", ""),
        ("'scheduling'", ", error", ", '{}'"),
        ("'scheduling'", ", started_at", ", now()"),
        ("'running'", "", ""),
        ("'success'", "", ""),
        ("'scheduling'", ", session_alias", ", 'x'"),
        ("'scheduling'", ", secret_path", ", 'x'"),
        ("'scheduling'", ", attempt", ", 0"),
    ],
)
def test_the_database_refuses_what_must_not_be(stack: Stack, status: str, columns: str, values: str) -> None:
    workflow = uuid4()
    stack.sql("INSERT INTO workflows (id, organization_id, main_prompt) VALUES ($1, 'o', 'x')", workflow)
    with pytest.raises(asyncpg.CheckViolationError):
        stack.sql(INSERT_RUN.format(workflow=workflow, status=status, columns=columns, values=values))


def test_rows_that_name_something_are_not_removed_by_a_cascade(stack: Stack) -> None:
    workflow = uuid4()
    stack.sql("INSERT INTO workflows (id, organization_id, main_prompt) VALUES ($1, 'o', 'x')", workflow)
    stack.sql(INSERT_RUN.format(workflow=workflow, status="'scheduling'", columns="", values=""))
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        stack.sql("DELETE FROM workflows WHERE id = $1", workflow)


def test_the_settings_page_is_up_to_date() -> None:
    shown = settings_page.PAGE.read_text(encoding="utf-8")
    assert shown == settings_page.page(), "run `python -m dev.settings_page`"
