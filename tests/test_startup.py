"""The first start: each wrong way to start is one line that names the setting and the fix, and never a value."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx
import pytest

from app.cli import main
from app.config import Settings
from app.stores.database import connect
from dev.run import ROOT
from dev.stack import free_port, http
from tests.support.client import Client
from tests.support.fork_server import fork_service, run_forked
from tests.support.server import start_server
from tests.support.stack import Stack, migrate
from tests.support.waiting import until

CANARY = "canary-5f1d7a"
WITH_DATABASE = (["serve"], ["migrate"], ["keys", "list"])


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a server of this stack is started with, and nothing else that is a setting."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in stack.environment(PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    # What belongs to a process of its own, and this one is the test runner's.
    monkeypatch.setattr("app.cli.configure", lambda _: None)
    monkeypatch.setattr("app.operator.startup.keep_out_of_dumps", lambda: None)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("it started"))
    return monkeypatch


@pytest.fixture
def url(stack: Stack) -> Iterator[str]:
    """An empty database beside the others."""
    name = f"start_{uuid4().hex}"
    stack.sql(f'CREATE DATABASE "{name}"')
    yield stack.postgres.url.rpartition("/")[0] + f"/{name}"
    stack.sql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command ends with."""

    def run(*command: str) -> str:
        capsys.readouterr()  # what came before it: each migration is a line
        assert main(list(command)) == 2
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line]
        assert len(lines) == 1, shown.err
        assert CANARY not in shown.out + shown.err
        assert "Traceback" not in shown.out + shown.err
        return lines[0]

    return run


def upgrade(stack: Stack, url: str, revision: str) -> None:
    environment = {"PATH": "", "DATABASE_URL": stack.postgres.as_app(url), "DATABASE_OWNER_URL": url}
    done = run_forked(environment, "alembic", "upgrade", revision)
    assert done.returncode == 0, done.stderr


def with_canary(url: str) -> str:
    return url.replace("//", f"//{CANARY}:{CANARY}@", 1)


@pytest.mark.parametrize(
    ("given", "setting", "fix"),
    [
        # Vault
        ({"VAULT_TOKEN": None}, "VAULT_TOKEN, VAULT_TOKEN_FILE or VAULT_ROLE_ID", "exactly one"),
        ({"VAULT_ROLE_ID": CANARY}, "VAULT_TOKEN, VAULT_TOKEN_FILE or VAULT_ROLE_ID", "exactly one"),
        ({"VAULT_TOKEN": None, "VAULT_SECRET_ID": CANARY}, "VAULT_TOKEN, VAULT_TOKEN_FILE", "exactly one"),
        ({"VAULT_TOKEN": None, "VAULT_TOKEN_FILE": "/nowhere/token"}, "VAULT_TOKEN_FILE", "No such file"),
        ({"VAULT_ADDR": None}, "VAULT_ADDR", "is not set"),
        ({"VAULT_ADDR": "x"}, "VAULT_ADDR", "https://"),
        ({"VAULT_ADDR": "ftp://vault"}, "VAULT_ADDR", "https://"),
        ({"VAULT_ADDR": "https://"}, "VAULT_ADDR", "https://"),
        ({"VAULT_ADDR": "https://vault:x"}, "VAULT_ADDR", "https://"),
        ({"VAULT_ADDR": with_canary("https://vault")}, "VAULT_ADDR", "https://"),
        ({"VAULT_ADDR": "http://vault:8200"}, "VAULT_ADDR", "VAULT_ALLOW_HTTP=true"),
        ({"VAULT_ADDR": "http://10.1.2.3:8200"}, "VAULT_ADDR", "VAULT_ALLOW_HTTP=true"),
        ({"VAULT_CACERT": "/nowhere/ca.pem"}, "VAULT_CACERT", "PEM"),
        ({"VAULT_CACERT": __file__}, "VAULT_CACERT", "PEM"),
        # PostgreSQL
        ({"DATABASE_URL": None}, "DATABASE_URL", "postgresql://"),
        ({"DATABASE_URL": ""}, "DATABASE_URL", "postgresql://"),
        ({"DATABASE_URL": with_canary("mysql://host/runs")}, "DATABASE_URL", "postgresql://"),
        ({"DATABASE_URL": f"postgresql://{CANARY}:p#x@127.0.0.1/runs"}, "DATABASE_URL", "percent-encode"),
        ({"DATABASE_URL": f"{with_canary('postgresql://127.0.0.1/runs')}?sslmode=x"}, "DATABASE_URL", "parameters"),
        # Files
        ({"STORAGE_URL": None}, "STORAGE_URL", "file:///"),
        ({"STORAGE_URL": f"/{CANARY}"}, "STORAGE_URL", "file://"),
        ({"STORAGE_URL": f"ftp://{CANARY}"}, "STORAGE_URL", "s3://"),
        ({"STORAGE_URL": f"file://{CANARY}/files"}, "STORAGE_URL", "file:///"),
        ({"STORAGE_URL": "file:///"}, "STORAGE_URL", "folder"),
        ({"STORAGE_URL": f"file:///proc/{CANARY}"}, "STORAGE_URL", "folder"),
        ({"STORAGE_URL": Path(__file__).as_uri()}, "STORAGE_URL", "folder"),
        ({"STORAGE_URL": "s3://"}, "STORAGE_URL", "bucket"),
        ({"STORAGE_URL": "az://container"}, "STORAGE_URL", "AZURE_"),
        # The rest
        ({"SERVER_KEY": None}, "SERVER_KEY", "is not set"),
        ({"SERVER_KEY": ""}, "SERVER_KEY", "is not set"),
        ({"SERVER_KEY": CANARY}, "SERVER_KEY", "32 characters"),
        ({"SERVER_KEY_PREVIOUS": CANARY}, "SERVER_KEY_PREVIOUS", "32 characters"),
        ({"SERVER_KEY": None, "SERVER_KEY_FILE": f"/nowhere/{CANARY}"}, "SERVER_KEY_FILE", "No such file"),
        ({"SERVER_KEY": None, "SERVER_KEY_FILE": "/dev/null"}, "SERVER_KEY_FILE", "empty"),
        ({"SERVER_KEY": None, "SERVER_KEY_FILE": "/usr/bin"}, "SERVER_KEY_FILE", "directory"),
        ({"SERVER_KEY_FILE": "/dev/null"}, "SERVER_KEY", "SERVER_KEY_FILE"),
        ({"PORT": "http"}, "PORT", "integer"),
        ({"PORT": "70000"}, "PORT", "65535"),
        ({"HOST": "no such host"}, "HOST", "address"),
        ({"HOST": "203.0.113.1"}, "HOST", "address"),
        ({"WORKERS": "0"}, "WORKERS", "greater than or equal to 1"),
        ({"WORKERS": "many"}, "WORKERS", "integer"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL", "'debug', 'info', 'warning' or 'error'"),
        ({"CORS_ORIGINS": "example.com"}, "CORS_ORIGINS", "https://"),
        ({"CORS_ORIGINS": "https://example.com/path"}, "CORS_ORIGINS", "https://"),
        ({"PUBLIC_URL": "runs.example.com"}, "PUBLIC_URL", "https://"),
        # Webhooks
        ({"WEBHOOK_ALLOW": f"10.0.0.0/8,{CANARY}/"}, "WEBHOOK_ALLOW", "entry 2 is neither a network"),
        ({"WEBHOOK_ALLOW": "10.0.0.1/8"}, "WEBHOOK_ALLOW", "entry 1 is neither a network"),
        ({"WEBHOOK_CACERT": "/nowhere/ca.pem"}, "WEBHOOK_CACERT", "PEM"),
        ({"WEBHOOK_CACERT": __file__}, "WEBHOOK_CACERT", "PEM"),
        # Temporal
        ({"TEMPORAL_ADDRESS": "https://temporal.example:7233"}, "TEMPORAL_ADDRESS", "without https://"),
        ({"TEMPORAL_ADDRESS": "temporal.example"}, "TEMPORAL_ADDRESS", "temporal.example.com:7233"),
        ({"TEMPORAL_ADDRESS": f"{CANARY}:{CANARY}@temporal.example:7233"}, "TEMPORAL_ADDRESS", "must be like"),
        ({"TEMPORAL_TLS_SERVER_CA_CERT_PATH": "/nowhere/ca.pem"}, "TEMPORAL_TLS_SERVER_CA_CERT_PATH", "PEM"),
        ({"TEMPORAL_TLS_SERVER_CA_CERT_PATH": __file__}, "TEMPORAL_TLS_SERVER_CA_CERT_PATH", "PEM"),
        ({"TEMPORAL_TLS_CLIENT_CERT_PATH": __file__}, "TEMPORAL_TLS_CLIENT_CERT_PATH", "set both"),
        (
            {"TEMPORAL_TLS_CLIENT_CERT_PATH": __file__, "TEMPORAL_TLS_CLIENT_KEY_PATH": __file__},
            "TEMPORAL_TLS_CLIENT_CERT_PATH",
            "PEM",
        ),
        ({"TEMPORAL_API_KEY": CANARY, "TEMPORAL_TLS": "false"}, "TEMPORAL_TLS", "clear text"),
        ({"TEMPORAL_TASK_QUEUE": f"queue-{{{CANARY}}}"}, "TEMPORAL_TASK_QUEUE", "for each machine"),
        ({"RUN_HEARTBEAT_SECONDS": "0"}, "RUN_HEARTBEAT_SECONDS", "greater than or equal to"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_line(
    environment: pytest.MonkeyPatch,
    refused: Callable[..., str],
    given: dict[str, str | None],
    setting: str,
    fix: str,
) -> None:
    for name, value in given.items():
        if value is None:
            environment.delenv(name)
        else:
            environment.setenv(name, value)
    line = refused("serve")
    assert line.startswith(f"{setting}"), line
    assert fix in line, line


def test_every_wrong_setting_is_named_at_once(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("PORT", "http")
    environment.setenv("SERVER_KEY", CANARY)
    environment.delenv("STORAGE_URL")
    environment.delenv("VAULT_ADDR")
    assert main(["serve"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["PORT", "VAULT_ADDR", "STORAGE_URL", "SERVER_KEY"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8200", "http://localhost:8200/", "http://[::1]:8200"])
def test_a_vault_on_this_machine_may_be_plain_http(address: str) -> None:
    os.environ["VAULT_ADDR"] = address
    assert not Settings().vault_addr.endswith("/")


def test_a_vault_in_a_trusted_network_may_be_plain_http(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VAULT_ADDR", "http://vault:8200")
    environment.setenv("VAULT_ALLOW_HTTP", "true")
    assert Settings().vault_addr == "http://vault:8200"


def test_an_empty_variable_is_one_that_is_not_set(environment: pytest.MonkeyPatch) -> None:
    """As a compose file passes it on: `NAME: ${NAME:-}`."""
    for name in ("PUBLIC_URL", "VAULT_ROLE_ID", "SERVER_KEY_PREVIOUS", "CORS_ORIGINS", "WORKERS", "DATABASE_URL_FILE"):
        environment.setenv(name, "")
    settings = Settings()
    assert (settings.public_url, settings.vault_role_id, settings.server_key_previous) == (None, None, None)
    assert (settings.cors_origins, settings.workers) == ([], 1)


def test_a_taken_port(environment: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        environment.setenv("PORT", str(other.getsockname()[1]))
        line = refused("serve")
    assert line.startswith("PORT")
    assert "in use" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    environment.setenv("STORAGE_URL", tmp_path.as_uri())
    assert "STORAGE_URL" in refused("serve")


@pytest.mark.parametrize("command", WITH_DATABASE, ids=" ".join)
def test_a_database_that_refuses_us(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], stack: Stack, command: list[str]
) -> None:
    base = re.sub(r"//.*@", f"//runs:{CANARY}@", stack.postgres.url)
    environment.setenv("DATABASE_URL", base)
    line = refused(*command)
    assert line.startswith("DATABASE_URL")
    assert "password" in line
    environment.setenv("DATABASE_URL", f"{stack.postgres.url}_{CANARY}")
    line = refused(*command)
    assert line.startswith("DATABASE_URL")
    assert "does not exist" in line


@pytest.mark.parametrize("command", WITH_DATABASE[1:], ids=" ".join)
@pytest.mark.parametrize(
    ("host", "cause"), [("127.0.0.1:1", "nothing listens"), ("nowhere.invalid", "host name cannot be resolved")]
)
def test_commands_without_a_database(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], command: list[str], host: str, cause: str
) -> None:
    environment.setenv("DATABASE_URL", with_canary(f"postgresql://{host}/runs"))
    line = refused(*command)
    assert line.startswith("DATABASE_URL")
    assert cause in line


@pytest.mark.parametrize("command", [["serve"], ["keys", "list"]], ids=" ".join)
@pytest.mark.parametrize("revision", [None, "0001"])
def test_a_database_that_was_not_migrated(
    environment: pytest.MonkeyPatch,
    refused: Callable[..., str],
    url: str,
    stack: Stack,
    command: list[str],
    revision: str | None,
) -> None:
    if revision is not None:
        upgrade(stack, url, revision)
    environment.setenv("DATABASE_URL", stack.postgres.as_app(url))
    environment.setenv("DATABASE_OWNER_URL", url)
    assert "python -m app migrate" in refused(*command)


# --- newer databases --------------------------------------------------------------------------------------------------


def later(stack: Stack, url: str, mark: str | None) -> None:
    """The database as a version from the future leaves it."""
    stack.beside(url).sql("UPDATE alembic_version SET version_num = '9999'")
    if mark is not None:
        stack.beside(url).sql(f"COMMENT ON TABLE alembic_version IS '{mark}'")


class Serving:
    """`python -m app serve` as a process of its own, ready or not."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.log = folder / "log"
        self.process = fork_service(environment, self.log)
        self.url = f"http://127.0.0.1:{environment['PORT']}"

    def status(self, path: str) -> int:
        try:
            return http("GET", self.url + path)[0]
        except OSError:
            return 0

    def lines(self, text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if text in line]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Serving]]:
    started: list[Serving] = []

    def start(environment: dict[str, str]) -> Serving:
        serving = Serving(environment, tmp_path)
        started.append(serving)
        until(lambda: serving.status("/health/live") == 200 or serving.process.poll() is not None, what="an answer")
        return serving

    yield start
    for one in started:
        one.stop()


def test_a_newer_database_is_served_with_one_warning(
    stack: Stack, url: str, serve: Callable[[dict[str, str]], Serving]
) -> None:
    migrate(stack.postgres, url)
    later(stack, url, None)
    serving = serve(stack.environment(PORT=free_port(), DATABASE_URL=stack.postgres.as_app(url)))
    until(lambda: serving.status("/health/ready") == 200, what="it serves")
    assert [line["level"] for line in serving.lines("database_is_newer")] == ["warning"]


def test_a_newer_database_that_says_it_is_incompatible_is_refused(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], stack: Stack, url: str
) -> None:
    migrate(stack.postgres, url)
    later(stack, url, "needs 9998")
    environment.setenv("DATABASE_URL", stack.postgres.as_app(url))
    environment.setenv("DATABASE_OWNER_URL", url)
    for command in ("serve", "migrate"):
        line = refused(command)
        assert line.startswith("DATABASE_URL")
        assert "9998" in line
    later(stack, url, "needs 0001")  # which we have
    assert main(["migrate"]) == 0


def test_the_mark_follows_the_migrations(stack: Stack, url: str) -> None:
    mark = "SELECT obj_description('alembic_version'::regclass, 'pg_class') AS mark"
    upgrade(stack, url, "0001")
    assert stack.beside(url).sql(mark) == [{"mark": None}]
    upgrade(stack, url, "0002")  # which moves columns that the version before reads
    assert stack.beside(url).sql(mark) == [{"mark": "needs 0002"}]


# --- without a database -----------------------------------------------------------------------------------------------


def test_without_postgresql_the_service_starts_and_says_so(
    stack: Stack, serve: Callable[[dict[str, str]], Serving]
) -> None:
    address = f"postgresql://runs:{CANARY}@127.0.0.1:{free_port()}/runs"
    serving = serve(stack.environment(PORT=free_port(), DATABASE_URL=address))
    until(lambda: readiness(serving.url) == (503, {"database": "unreachable"}), what="readiness says it")
    assert len(serving.lines("database_unreachable")) == 1
    assert CANARY not in serving.log.read_text()


def test_a_wrong_vault_login_is_told_by_readiness(stack: Stack, serve: Callable[[dict[str, str]], Serving]) -> None:
    serving = serve(stack.environment(PORT=free_port(), VAULT_TOKEN=CANARY))
    until(lambda: readiness(serving.url) == (503, {"vault": "login_refused"}), what="readiness says it")
    assert CANARY not in serving.log.read_text()


def test_a_policy_from_before_webhooks_is_told_at_the_start_and_by_readiness(
    stack: Stack, serve: Callable[[dict[str, str]], Serving]
) -> None:
    """The replica serves all the same. When the policy has been written again, that is noticed."""
    before = 'path "secret/data/runs/*" { capabilities = ["create"] }\n'
    before += 'path "secret/metadata/runs/*" { capabilities = ["delete"] }\n'
    policy = "sys/policies/acl/before-webhooks"
    stack.bao.call("PUT", policy, {"policy": before})
    serving = serve(stack.environment(PORT=free_port(), VAULT_TOKEN=stack.bao.token("before-webhooks")))
    until(lambda: "no webhook is sent" in serving.log.read_text(), what="the log says it before anybody asks")
    assert readiness(serving.url) == (200, {"webhooks": "not_granted"})
    more = 'path "secret/+/runs-webhooks/*" { capabilities = ["create", "read", "delete"] }'
    stack.bao.call("PUT", policy, {"policy": before + more})
    until(lambda: readiness(serving.url) == (200, {}), what="it is noticed")


def test_a_database_that_is_unmigrated_while_we_run(stack: Stack, url: str) -> None:
    migrate(stack.postgres, url)
    own = stack.beside(url)
    server = start_server(own)
    try:
        with server.client() as api:
            run = api.finished()
            own.sql("ALTER SCHEMA public RENAME TO elsewhere")
            own.sql("CREATE SCHEMA public")
            _refused_as_unmigrated(server.url, api, run["id"])
            own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'runs_app'")
            _refused_as_unmigrated(server.url, api, run["id"])  # on new connections too
            log = server.app.log.read_text()
            assert len([line for line in log.splitlines() if "database_unfit" in line]) == 1, log
            assert "python -m app migrate" in log
            own.sql("DROP SCHEMA public")
            own.sql("ALTER SCHEMA elsewhere RENAME TO public")
            until(lambda: api.retry(run["id"]).status_code == 200, what="it goes on by itself")
    finally:
        server.app.stop()


def readiness(url: str) -> tuple[int, dict[str, str]]:
    """The answer holds for a second, and on a busy machine a store may miss its time."""
    reply = httpx.get(f"{url}/health/ready", timeout=20, trust_env=False, verify=False)
    return reply.status_code, reply.json()["reasons"]


def _refused_as_unmigrated(url: str, api: Client, run_id: str) -> None:
    for _ in range(5):
        reply = api.retry(run_id)
        assert (reply.status_code, reply.json()["code"]) == (503, "database_unavailable")
    until(lambda: readiness(url) == (503, {"database": "not_migrated"}), what="readiness says it")


def test_a_real_start_that_fails_shows_one_line(stack: Stack) -> None:
    """As a process: nothing that Python or the server prints by itself."""
    environment = stack.environment(VAULT_ADDR="x")
    ended = subprocess.run(
        [sys.executable, "-m", "app", "serve"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1)


# --- parameters of the database's URLs --------------------------------------------------------------------------------

# All parameters of libpq 18 (PQconndefaults) but those of the place, the user and files that must exist, with a value each.
OF_LIBPQ = {
    "connect_timeout": "5", "channel_binding": "require", "client_encoding": "LATIN1", "options": "-c jit=off",
    "application_name": "other", "fallback_application_name": "other", "keepalives": "1", "keepalives_idle": "30",
    "keepalives_interval": "10", "keepalives_count": "3", "tcp_user_timeout": "30000", "sslmode": "prefer",
    "sslnegotiation": "postgres", "sslcompression": "0", "sslcertmode": "allow", "sslsni": "1", "sslcrldir": "/nowhere",
    "sslpassword": CANARY, "requirepeer": "postgres", "require_auth": "scram-sha-256", "gssencmode": "disable",
    "krbsrvname": "postgres", "gsslib": "gssapi", "gssdelegation": "0", "replication": "false",
    "ssl_min_protocol_version": "TLSv1.2", "ssl_max_protocol_version": "TLSv1.3", "min_protocol_version": "3.0",
    "max_protocol_version": "latest", "target_session_attrs": "read-write", "load_balance_hosts": "random",
    "scram_client_key": CANARY, "scram_server_key": CANARY, "oauth_issuer": "https://issuer.example", "oauth_client_id": "id",
    "oauth_client_secret": CANARY, "oauth_scope": "openid", "sslkeylogfile": f"/nowhere/{CANARY}", "hostaddr": "127.0.0.1",
}  # fmt: skip
# And what is no parameter of libpq, and is sent to the server.
OF_SESSIONS = {"search_path": "public", "statement_timeout": "2000", "TimeZone": "UTC", "my.own": "x"}


def test_parameters_that_libpq_knows_do_no_harm(stack: Stack, serve: Callable[[dict[str, str]], Serving]) -> None:
    url = stack.environment()["DATABASE_URL"]

    async def connect_with_each() -> None:
        for name, value in (OF_LIBPQ | OF_SESSIONS).items():
            connection = await connect(f"{url}?{urlencode({name: value})}", 5, 5)
            assert await connection.fetchval("SELECT 1") == 1, name
            await connection.close()

    asyncio.run(connect_with_each())
    whole = f"{url}?{urlencode(OF_LIBPQ)}"
    serving = serve(stack.environment(PORT=free_port(), DATABASE_URL=whole, DATABASE_DIRECT_URL=whole))
    until(lambda: serving.status("/health/ready") == 200, what="it serves")
    lines = serving.lines("database_parameters_ignored")
    assert [line["setting"] for line in lines] == ["DATABASE_URL", "DATABASE_DIRECT_URL"]
    assert {"keepalives", "channel_binding", "client_encoding", "hostaddr"} <= set(lines[0]["ignored"])
    assert lines[0]["not_enforced"] == ["channel_binding", "require_auth", "requirepeer", "sslcrldir"]
    assert not serving.lines("background_unavailable"), "LISTEN failed"
    assert CANARY not in serving.log.read_text()


async def shown_by(url: str, setting: str) -> str:
    connection = await connect(url, 5, 5)
    found: str = await connection.fetchval(f"SHOW {setting}")
    await connection.close()
    return found


def test_parameters_that_are_translated(stack: Stack) -> None:
    url = stack.environment()["DATABASE_URL"]

    def shown(query: str, setting: str) -> str:
        return asyncio.run(shown_by(f"{url}?{query}", setting))

    assert shown("fallback_application_name=spare", "application_name") == "spare"
    assert shown("application_name=first&fallback_application_name=spare", "application_name") == "first"
    assert shown("options=-c%20work_mem%3D7MB", "work_mem") == "7MB"
    assert shown("search_path=elsewhere", "search_path") == "elsewhere"
    assert shown("client_encoding=LATIN1", "client_encoding") == "UTF8"
    # Where the server is: in the query, by address, and in second place.
    before, _, place = url.rpartition("@")
    port, _, database = place.removeprefix("127.0.0.1:").partition("/")
    for servers in (
        f"@/{database}?host=127.0.0.1&port={port}",
        f"@/{database}?hostaddr=127.0.0.1&port={port}",
        f"@127.0.0.1:1,127.0.0.1:{port}/{database}",
        f"@/{database}?host=127.0.0.1,127.0.0.1&port=1,{port}",
    ):
        assert asyncio.run(shown_by(before + servers, "port")) == port


@pytest.mark.parametrize("setting", ["DATABASE_URL", "DATABASE_OWNER_URL", "DATABASE_DIRECT_URL"])
@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("pgbouncer=true", "pgbouncer"),
        ("schema=other", "search_path"),
        ("connection_limit=5", "DATABASE_POOL_SIZE"),
        (f"nonsense={CANARY}", "nonsense"),
        ("ssl=require", "sslmode"),
        (f"service={CANARY}", "service"),
        (f"servicefile=/nowhere/{CANARY}", "servicefile"),
        (f"passfile=/nowhere/{CANARY}", "passfile"),
        (f"passfile={__file__}", "passfile"),
        (f"connect_timeout={CANARY}", "connect_timeout"),
        ("target_session_attrs=standby", "target_session_attrs"),
        (f"load_balance_hosts={CANARY}", "load_balance_hosts"),
        (f"host=first,second&port=1,2,{CANARY}", "port"),
        (f"{CANARY}.%0A=1&sslmode", "parameters"),
        (f"a%26{CANARY}%3D=1", "no usable name"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], setting: str, query: str, named: str
) -> None:
    place = "" if query.startswith("host=") else "127.0.0.1"
    environment.setenv(setting, f"postgresql://runs@{place}/runs?{query}")
    line = refused("migrate" if setting == "DATABASE_OWNER_URL" else "serve")
    assert line.startswith(f"{setting}: "), line
    assert named in line, line


def test_a_setting_that_the_server_refuses(
    environment: pytest.MonkeyPatch, refused: Callable[..., str], stack: Stack
) -> None:
    for query in ("options=-c%20nonsense%3D1", "statement_timeout=soon", "sslmode=disable&options=-c%20port%3D1"):
        environment.setenv("DATABASE_URL", f"{stack.environment()['DATABASE_URL']}?{query}")
        line = refused("serve")
        assert line.startswith("DATABASE_URL"), line
        assert "query" in line, line
