"""The database's roles: the service's own can do no more than it does, and it carries the settings of its sessions."""

import asyncio
import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from app.cli import main
from app.models import Base
from app.stores.setup import GRANTS
from tests.support.pooler import pooler
from tests.support.server import Server, start_server
from tests.support.stack import Stack, migrate
from tests.support.waiting import until

OWNER = "plain_owner"


def run_as(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Rows of the last one, on a connection that sends nothing when it is made."""

    async def run() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            rows: list[asyncpg.Record] = []
            for statement in statements:
                rows = await connection.fetch(statement)
            return [tuple(row.values()) for row in rows]
        finally:
            await connection.close()

    return asyncio.run(run())


@pytest.fixture
def url(stack: Stack) -> Iterator[str]:
    """An empty database beside the others, as the superuser."""
    name = f"roles_{uuid4().hex}"
    stack.sql(f'CREATE DATABASE "{name}"')
    yield stack.postgres.url.rpartition("/")[0] + f"/{name}"
    stack.sql(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def role(stack: Stack, url: str, attributes: str = "") -> Iterator[str]:
    """The URL of a fresh role in that database."""
    name, password = f"role_{secrets.token_hex(6)}", secrets.token_hex(12)
    stack.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' {attributes}")
    place = urlsplit(url)
    yield f"postgresql://{name}:{password}@127.0.0.1:{place.port}{place.path}"
    run_as(url, f"REASSIGN OWNED BY {name} TO runs", f"DROP OWNED BY {name}", f"DROP ROLE {name}")


# --- what the service must not do -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        # Keys: it looks them up, and no more.
        "INSERT INTO api_keys (id, organization_id, key_hash) VALUES (gen_random_uuid(), 'o', sha256('x'))",
        "UPDATE api_keys SET revoked_at = NULL",
        "UPDATE api_keys SET organization_id = 'other'",
        "DELETE FROM api_keys",
        # The archive is added to.
        "UPDATE run_attempts SET status = 'success'",
        "DELETE FROM run_attempts",
        # Nothing but rows.
        "TRUNCATE deletions",
        "CREATE TABLE more (id int)",
        "CREATE TEMPORARY TABLE more (id int)",
        "CREATE SCHEMA more",
        "CREATE FUNCTION more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "ALTER TABLE runs ADD COLUMN more int",
        "ALTER TABLE runs DISABLE TRIGGER ALL",
        "DROP TABLE idempotency_keys",
        "CREATE INDEX ON runs (id)",
        "COMMENT ON TABLE alembic_version IS 'needs 0001'",
        "UPDATE alembic_version SET version_num = '0001'",
        # Nor anything beside them.
        "CREATE ROLE more",
        "CREATE DATABASE more",
        "ALTER ROLE runs PASSWORD 'x'",
        "SET ROLE runs",
        "SET session_replication_role = replica",
        "SELECT * FROM pg_authid",
        "COPY runs TO PROGRAM 'cat'",
        "SELECT pg_read_file('/etc/passwd')",
        "ALTER SYSTEM SET log_statement = 'all'",
    ],
)
def test_the_service_may_not(stack: Stack, statement: str) -> None:
    with pytest.raises(asyncpg.PostgresError) as refused:
        run_as(stack.postgres.app_url, statement)
    assert isinstance(refused.value, asyncpg.InsufficientPrivilegeError), refused.value


def test_the_service_may_write_when_a_key_was_used(stack: Stack) -> None:
    stack.new_key("used")
    run_as(stack.postgres.app_url, "UPDATE api_keys SET last_used_at = now() WHERE organization_id = 'used'")
    assert stack.sql("SELECT 1 AS one FROM api_keys WHERE last_used_at IS NOT NULL AND organization_id = 'used'")


def test_the_service_has_no_attribute_of_power(stack: Stack) -> None:
    [row] = stack.sql(
        "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication FROM pg_roles"
        " WHERE rolname = 'runs_app'"
    )
    assert not any(row.values())
    assert stack.sql("SELECT 1 FROM pg_class WHERE relowner = 'runs_app'::regrole") == []


def test_every_table_has_a_line_of_grants() -> None:
    assert Base.metadata.tables.keys() | {"alembic_version"} == GRANTS.keys(), (
        "say in app/stores/setup.py what the service may do with a new table"
    )


def test_the_database_grants_what_the_list_says_and_nothing_else(stack: Stack) -> None:
    for table, rights in GRANTS.items():
        whole = {right for right in re.sub(r"\w+ \([^)]*\)", "", rights).replace(" ", "").split(",") if right}
        granted = stack.sql(
            "SELECT a.privilege_type FROM pg_class, aclexplode(relacl) AS a"
            " WHERE relname = $1 AND relnamespace = 'public'::regnamespace AND a.grantee = 'runs_app'::regrole",
            table,
        )
        assert {row["privilege_type"] for row in granted} == whole, table
        public = stack.sql(
            "SELECT 1 FROM pg_class, aclexplode(relacl) AS a"
            " WHERE relname = $1 AND relnamespace = 'public'::regnamespace AND a.grantee = 0",
            table,
        )
        assert public == [], table


# --- migrate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def test_an_owner_without_power_is_enough(stack: Stack, url: str, environment: pytest.MonkeyPatch) -> None:
    """No superuser, no CREATEROLE: it owns the database, and the service's role exists."""
    with role(stack, url) as owner, role(stack, url) as app:
        stack.sql(f'ALTER DATABASE "{urlsplit(url).path[1:]}" OWNER TO {urlsplit(owner).username}')
        environment.setenv("DATABASE_URL", app)
        environment.setenv("DATABASE_OWNER_URL", owner)
        assert main(["migrate"]) == 0
        assert main(["keys", "create", "--organization", "o"]) == 0
        run_as(app, "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), 'o', 'x')")
        for statement in ("CREATE TEMPORARY TABLE x (id int)", "CREATE TABLE x (id int)", "DELETE FROM api_keys"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                run_as(app, statement)


def test_an_owner_of_a_schema_alone_is_enough(stack: Stack, url: str, environment: pytest.MonkeyPatch) -> None:
    """The database belongs to somebody else, as on some managed servers."""
    with role(stack, url) as owner, role(stack, url) as app:
        run_as(url, f"ALTER SCHEMA public OWNER TO {urlsplit(owner).username}")
        run_as(url, f'REVOKE TEMPORARY ON DATABASE "{urlsplit(url).path[1:]}" FROM PUBLIC')
        environment.setenv("DATABASE_URL", app)
        environment.setenv("DATABASE_OWNER_URL", owner)
        assert main(["migrate"]) == 0
        assert main(["migrate"]) == 0
        run_as(app, "SELECT FROM runs")
        run_as(url, "ALTER SCHEMA public OWNER TO runs")


@pytest.mark.parametrize("attribute", ["SUPERUSER", "BYPASSRLS", "CREATEROLE", "CREATEDB", "REPLICATION"])
def test_a_role_that_can_do_more_is_refused(
    stack: Stack, url: str, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attribute: str
) -> None:
    with role(stack, url, attribute) as app:
        environment.setenv("DATABASE_URL", app)
        environment.setenv("DATABASE_OWNER_URL", url)
        assert main(["migrate"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("DATABASE_URL")
        assert attribute in line
        assert run_as(url, "SELECT to_regclass('runs')") == [(None,)]


def test_a_role_that_owns_the_tables_is_refused(
    stack: Stack, url: str, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One role did both until now, and the owner is the new one."""
    with role(stack, url) as app:
        run_as(url, f"GRANT CREATE ON SCHEMA public TO {urlsplit(app).username}")
        environment.setenv("DATABASE_URL", app)
        environment.delenv("DATABASE_OWNER_URL", raising=False)
        assert main(["migrate"]) == 0
        environment.setenv("DATABASE_OWNER_URL", url)
        assert main(["migrate"]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert "tables of its own" in line


def test_rights_that_were_given_by_hand_are_taken_again(stack: Stack, url: str) -> None:
    migrate(stack.postgres, url)
    run_as(url, "GRANT ALL ON api_keys, run_attempts TO runs_app", "GRANT CREATE ON SCHEMA public TO runs_app")
    migrate(stack.postgres, url)
    app = stack.postgres.as_app(url)
    for statement in ("DELETE FROM api_keys", "DELETE FROM run_attempts", "CREATE TABLE x (id int)"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            run_as(app, statement)


def test_one_role_for_both_still_works(stack: Stack, url: str, environment: pytest.MonkeyPatch) -> None:
    with role(stack, url) as both:
        run_as(url, f"GRANT CREATE ON SCHEMA public TO {urlsplit(both).username}")
        environment.setenv("DATABASE_URL", both)
        environment.delenv("DATABASE_OWNER_URL", raising=False)
        for _ in range(2):  # the second time its own sessions have the service's settings
            assert main(["migrate"]) == 0
        assert main(["keys", "create", "--organization", "o"]) == 0
        server = start_server(stack.beside(url), DATABASE_URL=both)
        try:
            with server.client() as api:
                api.run()
        finally:
            server.app.stop()


def test_a_migration_waits_for_another_one_for_longer_than_the_roles_settings_allow(
    stack: Stack, url: str, environment: pytest.MonkeyPatch
) -> None:
    with role(stack, url) as both:
        run_as(url, f"GRANT CREATE ON SCHEMA public TO {urlsplit(both).username}")
        environment.setenv("DATABASE_URL", both)
        environment.delenv("DATABASE_OWNER_URL", raising=False)
        assert main(["migrate"]) == 0
        queue = "SELECT pg_advisory_xact_lock(1920298611)"  # "runs" in ASCII
        with ThreadPoolExecutor(1) as threads:
            with stack.beside(url).held(queue):
                late = threads.submit(main, ["migrate"])
                with pytest.raises(TimeoutError):
                    late.result(4)  # lock_timeout is 2 s, statement_timeout 2.7 s
            assert late.result(30) == 0


# --- settings ---------------------------------------------------------------------------------------------------------

SETTINGS = {
    "application_name": "runs-api",
    "enable_seqscan": "off",
    "idle_in_transaction_session_timeout": "10000",
    "jit": "off",
    "lock_timeout": "2000",
    "plan_cache_mode": "force_generic_plan",
    "statement_timeout": "2700",
    "TimeZone": "UTC",
}


def test_a_connection_that_sends_nothing_has_every_setting(stack: Stack) -> None:
    """As a pooler makes it."""
    rows = run_as(stack.postgres.app_url, "SELECT name, setting FROM pg_settings")
    assert {name: setting for name, setting in rows if name in SETTINGS} == SETTINGS


def test_through_a_pooler_the_service_works_and_migrate_says_that_it_must_go_direct(
    stack: Stack, url: str, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pooler(url) as between:
        environment.setenv("DATABASE_URL", between.url(stack.postgres.as_app(url)))
        environment.setenv("DATABASE_OWNER_URL", between.url(url))
        assert main(["migrate"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("DATABASE_OWNER_URL")
        assert "pooler" in line
        environment.setenv("DATABASE_OWNER_URL", url)
        assert main(["migrate"]) == 0
        environment.setenv("DATABASE_OWNER_URL", between.url(url))
        assert main(["keys", "list"]) == 0


@pytest.fixture(scope="module")
def pooled(stack: Stack) -> Iterator[Server]:
    """A server that reaches its database through a pooler."""
    with pooler(stack.postgres.app_url) as between:
        started = start_server(stack, DATABASE_URL=between.url(stack.postgres.app_url))
        yield started
        started.app.stop()
        assert between.clients


@pytest.fixture
def serving(environment: pytest.MonkeyPatch, stack: Stack, url: str) -> None:
    """`serve` up to the point at which it would listen, on a database of its own."""
    environment.setattr("uvicorn.run", lambda *_, **__: None)
    environment.setattr("app.cli.configure", lambda _: None)
    environment.setattr("app.operator.startup.keep_out_of_dumps", lambda: None)
    for setting, given in stack.beside(url).environment(PORT=0).items():
        environment.setenv(setting, given)
    migrate(stack.postgres, url)
    assert main(["serve"]) == 0


@pytest.mark.usefixtures("serving")
def test_a_role_that_lacks_a_setting_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    change = f'ALTER ROLE runs_app IN DATABASE "{urlsplit(url).path[1:]}" SET'
    for name, value in (
        ("enable_seqscan", "on"),
        ("jit", "on"),
        ("plan_cache_mode", "auto"),
        ("TimeZone", "Europe/Paris"),
        ("lock_timeout", "0"),
        ("lock_timeout", "5s"),
        ("statement_timeout", "0"),
        ("statement_timeout", "2800"),  # longer than the client waits for it
        ("idle_in_transaction_session_timeout", "0"),
    ):
        run_as(url, f"{change} {name} = '{value}'")
        assert main(["serve"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("DATABASE_URL")
        assert f"{name}=" in line
        assert "python -m app migrate" in line
        assert "docs/operations.md" in line
        run_as(url, f"{change} {name} = '{SETTINGS[name]}'")
    assert main(["serve"]) == 0


@pytest.mark.usefixtures("serving")
def test_a_client_with_less_patience_needs_a_role_with_less(
    stack: Stack, url: str, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("DATABASE_TIMEOUT_SECONDS", "2.5")
    assert main(["serve"]) == 2
    assert "DATABASE_TIMEOUT_SECONDS" in capsys.readouterr().err
    migrate(stack.postgres, url, DATABASE_TIMEOUT_SECONDS=2.5)
    assert main(["serve"]) == 0
    environment.setenv("DATABASE_TIMEOUT_SECONDS", "5")  # more patience is no trouble
    assert main(["serve"]) == 0


def test_a_server_whose_role_loses_its_settings_says_so(stack: Stack, url: str) -> None:
    migrate(stack.postgres, url)
    own = stack.beside(url)
    server = start_server(own)
    try:
        with server.client() as api:
            api.run()
            own.sql(f'ALTER ROLE runs_app IN DATABASE "{urlsplit(url).path[1:]}" RESET lock_timeout')
            own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'runs_app'")
            lacks = {"database": "role_settings"}
            until(lambda: api.get("/health/ready").json()["reasons"] == lacks, what="it notices")
            reply = api.get("/v1/runs")
            assert (reply.status_code, reply.json()["code"]) == (503, "database_unavailable")
            log = server.app.log.read_text()
            assert len(re.findall("database_unfit.*lock_timeout=0", log)) == 1
            migrate(stack.postgres, url)
            until(lambda: api.get("/v1/runs").status_code == 200, what="it goes on by itself")
    finally:
        server.app.stop()


@pytest.mark.parametrize("key", ["the-key", None])
@pytest.mark.parametrize("secret", [True, False])
@pytest.mark.parametrize("way", ["direct", "pooled"])
def test_a_retry_of_a_row_that_another_transaction_holds(
    request: pytest.FixtureRequest, stack: Stack, *, way: str, key: str | None, secret: bool
) -> None:
    """409 after lock_timeout, and nothing happens later: the server gave up, not the client alone."""
    server: Server = request.getfixturevalue("server" if way == "direct" else "pooled")
    with server.client() as api:
        run = api.finished(sensitive_input_values={"password": "old"} if secret else None)
        body = {"input_values": {"a": 1}} | ({"sensitive_input_values": {"password": "new"}} if secret else {})
        headers = {} if key is None else {"Idempotency-Key": key}
        with stack.held("SELECT 1 FROM runs WHERE id = $1 FOR UPDATE", run["id"]):
            began = time.monotonic()
            reply = api.post(f"/v1/runs/{run['id']}/retry", json=body, headers=headers)
            took = time.monotonic() - began
        assert (reply.status_code, reply.json()["code"]) == (409, "idempotency_in_progress")
        assert (reply.headers["Idempotency-Status"], reply.headers["Retry-After"]) == ("in_progress", "1")
        assert took > 1.9
        assert stack.waiting() == 0
        assert api.get_run(run["id"]) == run
        assert api.retry(run["id"]).status_code == 200
