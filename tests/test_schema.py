"""The database's schema: the migrations make what the models say, can be undone, and may run together."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import asyncpg
import pytest

from dev.readme import README, replaced, settings_table
from dev.run import ROOT
from tests.conftest import Stack


@pytest.fixture
def url(stack: Stack) -> Iterator[str]:
    """An empty database beside the others."""
    name = f"schema_{uuid4().hex}"
    stack.sql(f'CREATE DATABASE "{name}"')
    yield stack.postgres.url.rpartition("/")[0] + f"/{name}"
    stack.sql(f'DROP DATABASE "{name}" WITH (FORCE)')


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "", "DATABASE_URL": url}
    command = [sys.executable, "-W", "error", "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_models_and_migrations_agree_and_can_be_undone(url: str) -> None:
    for arguments in (["upgrade", "head"], ["check"], ["downgrade", "base"], ["upgrade", "head"], ["check"]):
        done = alembic(url, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


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


def test_the_readme_lists_every_setting() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == replaced(text, "settings", settings_table()), "run `python -m dev.readme`"
