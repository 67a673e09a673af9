"""`runs` in a shell: what it prints, what it changes, its exit status, and where secrets do not go."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs_cli import __version__

from tests.cli.conftest import Terminal
from tests.support.client import Client, file_input
from tests.support.stack import Stack
from tests.support.waiting import until

CANARY = "canary-s3cret-value"


def test_lists_are_for_people_and_for_programs(terminal: Terminal, api: Client) -> None:
    failed = api.finished("error")
    done = api.finished("success")
    table = terminal.run("list").stdout
    assert table.index(done["id"]) < table.index(failed["id"]), "the last changed first"
    assert "it broke" in table
    lines = terminal.run("list", "--status", "error", "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [failed["id"]]
    assert {run["id"] for run in json.loads(terminal.run("list", "-o", "json").stdout)} == {failed["id"], done["id"]}
    assert json.loads(terminal.run("list", "--since", "2100-01-01", "-o", "json").stdout) == []
    assert failed["id"] in terminal.run("list", "--workflow", failed["workflow_id"]).stdout
    assert "0 workflows are called" in terminal.run("list", "--workflow", "none", status=2).stderr
    assert "--since takes" in terminal.run("list", "--since", "yesterday", status=2).stderr


def test_a_run_its_attempts_its_events_the_queue_and_machines(terminal: Terminal, api: Client) -> None:
    run = api.finished("error", input_values={"user": "ada"})
    machine = api.machine(name="desk-7", is_available=False)  # before the retry, so that it never takes the run
    api.json_of(api.retry(run["id"], reason="again"))
    assert "scheduling" in terminal.run("get", run["id"]).stdout
    assert json.loads(terminal.run("get", run["id"], "-o", "json").stdout)["attempt"] == 2
    assert "again" in terminal.run("attempts", run["id"]).stdout
    events = [
        json.loads(line)["event"] for line in terminal.run("events", run["id"], "-o", "jsonl").stdout.splitlines()
    ]
    assert events[0] == "created"
    assert "retried" in events
    assert run["id"] in terminal.run("queue").stdout
    assert "desk-7" in terminal.run("machines").stdout
    assert machine in terminal.run("machines", "-o", "json").stdout


def test_texts_of_others_cannot_act_on_the_terminal(terminal: Terminal, api: Client) -> None:
    run_id = api.run()["id"]
    api.report(run_id, status="error", error=["\x1b]0;owned\x07 \u202e \x7f[bold]"])
    for arguments in (["list"], ["get", run_id], ["get", run_id, "-o", "json"], ["events", run_id]):
        shown = terminal.run(*arguments).stdout
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown), arguments
    assert "[bold]" in terminal.run("get", run_id).stdout


def test_retry_keeps_what_is_not_given_and_asks_nothing_of_programs(terminal: Terminal, api: Client) -> None:
    run = api.finished("error", input_values={"user": "ada", "amount": "1"}, file_inputs=[file_input()])
    forecast = terminal.run("retry", run["id"], "--set", "amount=2", "--dry-run").stdout
    assert "It can be retried, as attempt 2." in forecast
    assert api.get_run(run["id"])["attempt"] == 1
    terminal.run("retry", run["id"], "--set", "amount=2", "--set", "lines:=[1, 2]", "--reason", "typo")
    retried = api.get_run(run["id"])
    assert retried["input_values"] == {"user": "ada", "amount": "2", "lines": [1, 2]}
    assert retried["input_attachment_ids"] == run["input_attachment_ids"]
    refused = terminal.run("retry", run["id"], status=1)
    assert "run_not_terminal" in refused.stderr
    (terminal.home / "in.txt").write_text("new")
    api.report(run["id"], status="cancelled")
    terminal.run("retry", run["id"], "--values", '{"only": 1}', "--file", "in.txt:C:\\in\\in.txt")
    retried = api.get_run(run["id"])
    assert retried["input_values"] == {"only": 1}
    [attachment] = retried["input_attachment_ids"]
    assert api.json_of(api.get(f"/v1/run-attachments/{attachment}"))["target_path"] == "C:\\in\\in.txt"


def test_wait_tells_how_the_attempt_ended(terminal: Terminal, api: Client) -> None:
    run = api.finished("error")
    assert "did not end" in terminal.run("retry", run["id"], "--wait", "--timeout", "1", status=4).stderr
    api.report(run["id"], status="error", error=["again"])
    assert terminal.run("watch", run["id"], status=3).stderr
    api.json_of(api.retry(run["id"]))
    api.report(run["id"], status="running")
    api.report(run["id"], status="success")
    terminal.run("watch", run["id"])


def test_cancel_says_why(terminal: Terminal, api: Client) -> None:
    run_id = api.run()["id"]
    terminal.run("cancel", run_id, "--reason", "wrong invoice")
    assert api.get_run(run_id)["status"] == "cancelled"
    events = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"]
    assert events[-1]["reason"] == "wrong invoice"


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_is_never_taken_from_the_command_line(terminal: Terminal, api: Client) -> None:
    run = api.finished("error")
    refused = terminal.run("retry", run["id"], "--secret", f"password={CANARY}", status=2)
    assert CANARY not in refused.stdout + refused.stderr
    assert api.get_run(run["id"])["attempt"] == 1
    assert "no terminal" in terminal.run("retry", run["id"], "--secret", "password", status=2).stderr


def test_a_secret_comes_from_a_file_or_from_standard_input(terminal: Terminal, api: Client, stack: Stack) -> None:
    run = api.finished("error", sensitive_input_values={"password": "old", "pin": "1"})
    (terminal.home / "pin").write_text("1234\n")
    lost = terminal.run("retry", run["id"], "--secret", "password=-", given=CANARY, status=2)
    assert "also has: pin" in lost.stderr
    done = terminal.run("retry", run["id"], "--secret", "password=-", "--secret", "pin=@pin", given=CANARY + "\n")
    assert CANARY not in done.stdout + done.stderr
    aliases = api.get_run(run["id"])["sensitive_input_aliases"]
    path = aliases["password"].split("://", 1)[1].partition("/")[2].partition("#")[0]
    assert stack.secret(path) == {"password": CANARY, "pin": "1234"}
    written = [
        file for file in terminal.home.rglob("*") if file.is_file() and CANARY in file.read_text(errors="replace")
    ]
    assert written == []


def test_a_secret_is_asked_for_without_echo(terminal: Terminal, api: Client, stack: Stack) -> None:
    run = api.finished("error")
    shown = _typed(terminal, ["retry", run["id"], "--secret", "password"], "password: ", CANARY)
    assert CANARY not in shown
    aliases = until(lambda: api.get_run(run["id"])["sensitive_input_aliases"])
    path = aliases["password"].split("://", 1)[1].partition("/")[2].partition("#")[0]
    assert stack.secret(path) == {"password": CANARY}


def _typed(terminal: Terminal, arguments: list[str], prompt: str, text: str) -> str:
    """What a terminal shows while the text is typed at the prompt."""
    pid, screen = pty.fork()
    if pid == 0:
        os.chdir(terminal.home)
        os.execve(sys.executable, [sys.executable, "-m", "runs_cli.main", *arguments], terminal.environment())
    shown = b""
    typed = False
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the end, on Linux
            break
        if not piece:
            break
        shown += piece
        if not typed and prompt.encode() in shown:
            typed = True
            os.write(screen, text.encode() + b"\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    return shown.decode(errors="replace")


# --- login, help, no network ------------------------------------------------------------------------------------------


def test_login_stores_a_profile_that_only_the_user_reads(terminal: Terminal) -> None:
    nothing = {"RUNS_API_URL": "", "RUNS_API_KEY": ""}
    assert "Log in first" in terminal.run("list", status=2, environment=nothing).stderr
    done = terminal.run("login", "--url", terminal.url, given=terminal.key + "\n", environment=nothing)
    assert terminal.key not in done.stdout + done.stderr
    [file] = (terminal.home / ".config" / "runs-cli").glob("*")
    assert file.stat().st_mode & 0o777 == 0o600
    terminal.run("list", environment=nothing)
    wrong = terminal.run("login", "--url", terminal.url, given="runs_wrong\n", status=1, environment=nothing)
    assert "unauthorized" in wrong.stderr
    terminal.run("list", environment=nothing)  # what was stored is still there


def test_no_service_is_one_sentence(terminal: Terminal) -> None:
    refused = terminal.run(
        "get", "00000000-0000-4000-8000-000000000000", status=1, environment={"RUNS_API_URL": "ftp://127.0.0.1"}
    )
    assert refused.stderr.count("\n") == 1
    assert "Nothing answers" in refused.stderr
    assert "is none" in terminal.run("get", "../whoami", status=2).stderr


def test_every_command_has_help_with_an_example(terminal: Terminal) -> None:
    main = terminal.run("--help").stdout
    names = re.findall(r"^│ ([a-z][a-z-]*) ", main, re.MULTILINE)
    assert {"list", "get", "retry", "retry-all", "watch", "cancel", "bulk", "login", "mcp"} <= set(names)
    for name in set(names) - {"bulk"}:
        assert f"runs {name}" in terminal.run(name, "--help").stdout or name == "login"
    assert "\x1b[" not in main, "no colours where there is no terminal"
    assert terminal.run("--version").stdout == f"runs-cli {__version__}\n"


# --- many -------------------------------------------------------------------------------------------------------------


def failed_runs(api: Client, count: int) -> tuple[str, list[str]]:
    workflow = api.workflow()
    ids = []
    for _ in range(count):
        run_id = api.run(workflow_id=workflow)["id"]
        api.report(run_id, status="error", error=["the application was down"])
        ids.append(run_id)
    return workflow, ids


def test_many_are_foreseen_asked_for_and_retried(terminal: Terminal, api: Client) -> None:
    workflow, ids = failed_runs(api, 4)
    api.json_of(api.retry(ids[3]))
    chosen = ["retry-all", "--workflow", workflow]
    assert "3 of 3 can be retried" in terminal.run(*chosen, "--dry-run").stdout
    assert "Say --yes" in terminal.run(*chosen, status=2).stderr
    assert {api.get_run(one)["attempt"] for one in ids[:3]} == {1}
    done = terminal.run(*chosen, "--yes", "--reason", "it is back").stdout
    assert re.search(r"state\s+completed", done)
    assert [api.get_run(one)["attempt"] for one in ids] == [2, 2, 2, 2]
    job = json.loads(terminal.run("bulk", "ls", "-o", "json").stdout)[0]
    assert (job["retried"], job["reason"]) == (3, "it is back")
    assert "completed" in terminal.run("bulk", "show", job["id"]).stdout
    again = terminal.run("retry-all", "-", "--yes", given="\n".join(ids), status=1)
    assert "4 cannot: run_not_terminal" in again.stdout
    assert "Say which runs" in terminal.run("retry-all", status=2).stderr


def test_ctrl_c_pauses_and_the_job_can_be_resumed_and_aborted(terminal: Terminal, api: Client, tmp_path: Path) -> None:
    workflow, ids = failed_runs(api, 3)
    command = ["retry-all", "--workflow", workflow, "--yes", "--pace", "0.1"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "runs_cli.main", *command], env=terminal.environment(), stdout=said, stderr=said
        )
        try:
            until(lambda: sum(api.get_run(one)["attempt"] - 1 for one in ids) >= 1, what="the first retry")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 4
        finally:
            process.kill()
    [job_id] = re.findall(r"runs bulk resume (\S+)", (tmp_path / "said").read_text())
    assert re.search(r"state\s+paused", terminal.run("bulk", "show", job_id).stdout)
    assert re.search(r"state\s+running", terminal.run("bulk", "resume", job_id).stdout)
    assert re.search(r"state\s+paused", terminal.run("bulk", "pause", job_id).stdout)
    terminal.run("bulk", "abort", job_id)
    until(lambda: "aborted" in terminal.run("bulk", "show", job_id).stdout)
    assert "aborted" in terminal.run("bulk", "show", job_id, "--skipped").stdout


@pytest.mark.parametrize("value", ["red", ""])
def test_no_color(terminal: Terminal, api: Client, value: str) -> None:
    api.finished("error")
    environment = {"FORCE_COLOR": "1"} | ({"NO_COLOR": value} if value else {})
    coloured = "\x1b[31m" in terminal.run("list", environment=environment).stdout
    assert coloured is (not value)
