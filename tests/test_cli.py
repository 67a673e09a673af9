"""The command line: API keys from creation to revocation, settings from files, and a start that fails without a leak."""

import json
import re
from pathlib import Path
from uuid import uuid4

import pytest

from app import __version__
from app.cli import main
from app.config import Settings
from tests.support.server import Server
from tests.support.stack import Stack


@pytest.fixture(autouse=True)
def environment(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a server of this stack is started with, and nothing else that is a setting."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in stack.environment(DATABASE_OWNER_URL=stack.url).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def organization() -> str:
    return f"org-{uuid4().hex}"


def test_a_key_from_creation_to_revocation(
    server: Server, organization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    user_id = str(uuid4())
    assert main(["keys", "create", "--organization", organization, "--user", user_id, "--name", "ci"]) == 0
    key = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"runs_[A-Za-z0-9_-]{43}", key)
    with server.client(organization, key=key) as api:
        assert api.run()["user_id"] == user_id

        assert main(["keys", "list", "--organization", organization]) == 0
        header, line = capsys.readouterr().out.splitlines()
        shown = dict(zip(header.split(), line.split(), strict=True))
        key_id = shown["ID"]
        assert (shown["ORGANIZATION_ID"], shown["USER_ID"], shown["NAME"], shown["SCOPES"]) == (
            organization,
            user_id,
            "ci",
            "*",
        )
        assert key not in line

        for _ in range(2):  # a second time is harmless
            assert main(["keys", "revoke", key_id]) == 0
        assert api.get("/v1/runs").status_code == 401
    assert main(["keys", "revoke", str(uuid4())]) == 1


def test_a_name_acts_on_no_terminal(organization: str, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "x\x1b[2J\x9b31m\x7f\u202egpj.exe\r\nroot"
    assert main(["keys", "create", "--organization", organization, "--name", evil]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--organization", organization]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 2
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert "x\\x1b[2J\\x9b31m\\x7f\\u202egpj.exe\\r\\nroot" in shown
    assert main(["keys", "list", "--organization", organization, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == evil


def test_a_key_that_expires(server: Server, organization: str, capsys: pytest.CaptureFixture[str]) -> None:
    for days, status in (("1", 200), ("-1", 401)):
        assert main(["keys", "create", "--organization", organization, f"--expires-in-days={days}"]) == 0
        key = capsys.readouterr().out.splitlines()[-1]
        with server.client(organization, key=key) as api:
            assert api.get("/v1/runs").status_code == status


@pytest.mark.parametrize("days", ["nan", "inf", "1e9", "soon"])
def test_how_long_a_key_lives_must_be_a_number(
    days: str, organization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["keys", "create", "--organization", organization, "--expires-in-days", days])
    assert "argument --expires-in-days: must be a number, at most 1,000,000" in capsys.readouterr().err


def test_what_went_wrong_is_not_where_the_key_is_read(organization: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--organization", organization, "--machine", str(uuid4())]) == 1
    assert main(["keys", "rotate", str(uuid4())]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "é", "a\n"])
def test_an_organization_must_fit_a_path_in_vault(name: str, stack: Stack) -> None:
    assert main(["keys", "create", f"--organization={name}"]) == 2
    assert stack.sql("SELECT 1 FROM api_keys WHERE organization_id = $1", name) == []


def test_settings_from_files(environment: pytest.MonkeyPatch, tmp_path: Path, stack: Stack, organization: str) -> None:
    secret = tmp_path / "database-url"
    secret.write_text(stack.postgres.url + "\n")
    for name in ("DATABASE_URL", "DATABASE_OWNER_URL"):
        environment.delenv(name)
    environment.setenv("DATABASE_URL_FILE", str(secret))
    assert main(["keys", "create", "--organization", organization]) == 0
    assert stack.sql("SELECT 1 AS found FROM api_keys WHERE organization_id = $1", organization) == [{"found": 1}]


def test_a_start_that_fails_names_the_settings_and_shows_no_value(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("PORT", "canary-port")
    environment.setenv("SERVER_KEY", "canary-key")
    environment.setenv("DATABASE_URL", "postgresql://canary-user:canary-password@host/database")
    environment.delenv("STORAGE_URL")
    assert main(["serve"]) == 2
    shown = capsys.readouterr()
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == ["PORT", "STORAGE_URL", "SERVER_KEY"]
    with pytest.raises(ValueError, match="server_key") as failure:
        Settings()  # as a worker process does
    assert "canary" not in shown.out + shown.err + str(failure.value)


def test_the_version_is_said_everywhere(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert re.fullmatch(rf"{re.escape(__version__)} \(commit [0-9a-f]{{12}}\)", capsys.readouterr().out.strip())
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    assert f'version = "{__version__}"' in project.read_text()
    with server.client() as api:
        assert api.get("/openapi.json").json()["info"]["version"] == __version__


def test_an_executors_key_is_bound_to_its_machine(
    server: Server, organization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create = ["keys", "create", "--organization", organization]
    with server.client(organization) as api:
        machine = api.machine()
    assert main([*create, "--machine", machine]) == 0
    *_, told, key = capsys.readouterr().out.splitlines()
    with server.client(organization, key=key) as executor:
        who = executor.json_of(executor.get("/v1/whoami"))
        assert (who["machine_id"], who["scopes"]) == (machine, ["runs:read", "runs:execute"])
        assert who["key_id"] in told
    assert main([*create, "--machine", str(uuid4())]) == 1
    assert main([*create, "--machine", machine, "--scope", "runs:write"]) == 2
    assert main([*create, "--scope", "runs:execute"]) == 2


def test_a_key_is_rotated_with_an_overlap(
    server: Server, organization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "create", "--organization", organization, "--scope", "runs:read", "--name", "n"]) == 0
    old = capsys.readouterr().out.splitlines()[-1]
    assert main(["keys", "list", "--organization", organization, "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["scopes"]) == ("n", ["runs:read"])
    assert main(["keys", "rotate", listed["id"], "--overlap-hours", "1"]) == 0
    new = capsys.readouterr().out.splitlines()[-1]
    for key in (old, new):
        with server.client(organization, key=key) as api:
            assert api.json_of(api.get("/v1/whoami"))["scopes"] == ["runs:read"]
    assert main(["keys", "rotate", listed["id"], "--overlap-hours", "0"]) == 0
    capsys.readouterr()
    with server.client(organization, key=old) as api:
        assert api.get("/v1/whoami").status_code == 401
    assert main(["keys", "rotate", listed["id"]]) == 1
