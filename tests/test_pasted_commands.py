"""The commands of the docs whose surroundings a test has: as somebody pastes them into a shell."""

import re
import shlex
import subprocess
from uuid import uuid4

import pytest

from dev.run import ROOT
from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack


def blocks(page: str, language: str = "") -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def environment(api: Client, server: Server, **more: str) -> dict[str, str]:
    key = api.headers["Authorization"].split()[1]
    return {"PATH": server.stack.environment()["PATH"], "API_URL": server.url, "API_KEY": key} | more


def pasted(text: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash"], input=f"set -e\n{text}", env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_is_held_and_then_started(api: Client, server: Server) -> None:
    run_id = api.finished("error")["id"]
    hold, start = blocks("later.md", "sh")
    pasted(hold, environment(api, server, RUN_ID=run_id))
    held = api.get_run(run_id)
    assert (held["attempt"], held["scheduling_reason"]) == (2, "not_before")
    pasted(start, environment(api, server, RUN_ID=run_id))
    assert api.get_run(run_id)["not_before"] is None


RUNBOOK = [line for block in blocks("runbooks.md") for line in block.splitlines()]
OF_THE_DATABASE = sorted({line for line in RUNBOOK if line.startswith("psql $DATABASE_OWNER_URL -Atc ")})
OF_THE_API = sorted({line for line in RUNBOOK if line.startswith("curl ") and "$API_URL/v1" in line})


def test_every_query_of_the_runbook_is_one_that_postgresql_takes(stack: Stack) -> None:
    assert len(OF_THE_DATABASE) > 8
    for line in OF_THE_DATABASE:
        command = shlex.split(line.split("    #")[0].split(";")[0], comments=True)
        stack.sql(command[3])


@pytest.mark.parametrize("line", OF_THE_API)
def test_every_request_of_the_runbook_is_answered(api: Client, server: Server, line: str) -> None:
    ids = {
        "MACHINE_ID": api.machine(),
        "RUN_ID": api.run()["id"],
        "ENDPOINT_ID": api.webhook_endpoint(),
        "SESSION_ID": str(uuid4()),
    }
    command, _, _ = line.partition("    #")
    said = pasted(command.replace("-sS", "-sS --fail-with-body"), environment(api, server, **ids))
    assert said.startswith(("{", "[")) or " | " in command
