"""`make run` as a newcomer uses it: what it prints can be pasted, again and again, and it stops when it is told to.

These tests have a stack of their own. `-o` keeps make from installing anything.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from dev.demo import OLD_PASSWORD, PASSWORD, TERMINAL
from dev.stack import free_port, port_problem, usable_port
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parent.parent
READY = "Ready. Ctrl-C stops everything."
SECONDS = 90  # for everything to start, on a machine that does much else


class MakeRun:
    """One `make run`, in a process group of its own as a terminal makes one."""

    def __init__(self, data_dir: Path, port: int | None = None, **more: str) -> None:
        self.data_dir = data_dir
        self.output = data_dir.with_suffix(".out")
        self.port = port or free_port()
        environment = {"PATH": os.environ["PATH"], "DATA_DIR": str(data_dir), "PORT": str(self.port)} | more
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                ["make", "-o", ".venv/run.stamp", "-o", ".venv/dev.stamp", "run"],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.make = psutil.Process(self.process.pid)
        self.tree: set[psutil.Process] = set()

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> "MakeRun":
        def said() -> bool:
            assert self.process.poll() is None, self.printed
            is_printed = text in self.printed  # first: what is printed tells of processes that have started before
            self.tree |= set(self.make.children(recursive=True))
            return is_printed

        until(said, SECONDS, what=f"{text!r} in the output")
        return self

    def facts(self) -> dict[str, str]:
        assert (self.data_dir / "dev.env").stat().st_mode & 0o777 == 0o600
        lines = (self.data_dir / "dev.env").read_text().splitlines()
        return {name: value.strip("'") for name, value in (line.split("=", 1) for line in lines)}

    def api(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.facts()['API_KEY']}"}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30, trust_env=False, verify=False
        )

    def assert_all_gone(self) -> None:
        until(lambda: not any(map(_alive, self.tree)), 30, what="the end of every process")
        assert self.process.wait(10) != 0

    def end(self) -> None:
        """However far it came."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


def part(demo: MakeRun, module: str) -> psutil.Process:
    """The process that runs this module."""

    def find() -> list[psutil.Process]:
        found = []
        for process in demo.tree:
            with suppress(psutil.NoSuchProcess):  # of the tree, many have lived for a moment only
                found += [process] if module in process.cmdline() else []
        return found

    processes: list[psutil.Process] = until(
        find, what=f"a process of {module}"
    )  # it may be about to become that program
    [one] = processes
    return one


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Pasted(NamedTuple):
    first: dict[str, Any]
    second: dict[str, Any]


def paste(demo: MakeRun) -> Pasted:
    """The printed lines in a shell: the reply, and the run at the end of its attempt."""
    lines = demo.printed.partition("\ncurl ")[1:]
    done = subprocess.run(["sh", "-e"], input="".join(lines), capture_output=True, text=True, timeout=60, check=True)
    run = json.loads(done.stdout)
    with demo.api() as api:
        return Pasted(run, until(lambda: _ended(api, run["id"]), 30, what="the end of the attempt"))


def retried(demo: MakeRun, password: str) -> dict[str, Any]:
    """The same without the printed pause: the run at the end of its next attempt."""
    run_id = demo.facts()["DEMO_RUN_ID"]
    with demo.api() as api:
        body = {"sensitive_input_values": {"password": password}}
        assert api.post(f"/v1/runs/{run_id}/retry", json=body).status_code == 200
        run: dict[str, Any] = until(lambda: _ended(api, run_id), 30, what="the end of the attempt")
    return run


def _ended(api: httpx.Client, run_id: str) -> dict[str, Any] | None:
    run: dict[str, Any] = api.get(f"/v1/runs/{run_id}").json()
    return run if run["status"] in TERMINAL else None


def test_the_demo_from_its_first_start_to_a_power_cut(tmp_path: Path) -> None:
    """One test, because starting takes longest."""
    demo = MakeRun(tmp_path / "data").wait_for(READY)
    try:
        what_is_printed_can_be_pasted_again_and_again(demo)
        the_readmes_commands_can_be_pasted_in_order(demo)
        the_tools_of_the_stack_are_at_hand(demo)
        another_password_fails_and_the_printed_one_then_helps(demo)
        no_password_is_in_a_log(demo)
        the_executor_reads_only_the_secrets_of_its_organization(demo)
        the_example_leaves_the_demo_alone(demo)
        it_goes_on_after_a_power_cut_in_the_middle_of_the_work(demo)
    finally:
        demo.end()


def test_with_temporal_a_retry_is_a_workflow(tmp_path: Path) -> None:
    demo = MakeRun(tmp_path / "data", TEMPORAL="1").wait_for(READY)
    try:
        run = retried(demo, PASSWORD)
        assert (run["status"], run["attempt"]) == ("success", 2)
        [address] = re.findall(r"TEMPORAL_ADDRESS is (\S+)\.", demo.printed)
        workflow = ["--workflow-id", f"run-{run['id']}-2-{run['assignment']}", "--address", address]
        program = Path(sys.executable).with_name("temporal")
        done = subprocess.run(
            [program, "workflow", "result", *workflow], capture_output=True, text=True, timeout=30, check=True
        )
        assert "reported" in done.stdout
        [page] = re.findall(r"http://127\.0\.0\.1:\d+/namespaces/\S+", demo.printed)
        assert httpx.get(page, trust_env=False, verify=False).status_code == 200
    finally:
        demo.end()


def what_is_printed_can_be_pasted_again_and_again(demo: MakeRun) -> None:
    with demo.api() as api:
        run = api.get(f"/v1/runs/{demo.facts()['DEMO_RUN_ID']}").json()
    assert (run["status"], run["error"]) == ("error", ["The application refused the password."])
    assert run["run_message_history"]
    assert run["output_attachment_ids"]
    receipts = set()
    for attempt in (2, 3):
        first, second = paste(demo)
        assert (first["status"], first["attempt"], first["error"]) == ("scheduling", attempt, None)
        assert (first["output_attachment_ids"], first["run_message_history"]) == ([], None)
        assert (second["status"], second["attempt"], second["error"]) == ("success", attempt, None)
        assert second["output_data"]["amount"] == "125.00"
        assert second["output_data"]["files"] == {"invoice.txt": 32}
        assert PASSWORD not in json.dumps([first, second])
        receipts.add(second["output_data"]["receipt"])
        [output] = second["output_attachment_ids"]
        with demo.api() as api:
            document = api.get(f"/v1/run-attachments/{output}/download").text
        assert document == f"Receipt {second['output_data']['receipt']}: 125.00 posted.\n"
    assert len(receipts) == 2


def the_readmes_commands_can_be_pasted_in_order(demo: MakeRun) -> None:
    """All of them into one shell, which ends at the first one that fails."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    pasted = "\necho\n".join(blocks).replace(".data/dev.env", str(demo.data_dir / "dev.env"))
    done = subprocess.run(
        ["bash", "-e"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DATA_DIR": str(demo.data_dir)},
        input=pasted,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    replies = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    retried_demo, dry_run, retried_run, attempts = replies
    assert (retried_demo["status"], retried_demo["error"]) == ("scheduling", None)
    assert (dry_run["would_retry"], dry_run["attempt"]) == (True, 2)
    assert (retried_run["id"], retried_run["attempt"]) == (dry_run["run_id"], 2)
    assert [one["status"] for one in attempts["items"]] == ["error"]
    assert "dashboard" in done.stdout, "the new key is in the list of keys"
    with demo.api() as api:
        assert until(lambda: _ended(api, retried_run["id"]), 30)["output_data"]["amount"] == "99.00"
        until(lambda: _ended(api, retried_demo["id"]), 30)


def the_tools_of_the_stack_are_at_hand(demo: MakeRun) -> None:
    def make(*arguments: str) -> str:
        done = subprocess.run(
            ["make", "-o", ".venv/run.stamp", *arguments],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATA_DIR": str(demo.data_dir)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert demo.facts()["DEMO_RUN_ID"] in make("psql", "ARGS=-c 'SELECT id FROM runs'")
    assert demo.facts()["DEMO_RUN_ID"] in make("bao")


def another_password_fails_and_the_printed_one_then_helps(demo: MakeRun) -> None:
    failed = retried(demo, OLD_PASSWORD)
    assert (failed["status"], failed["output_attachment_ids"]) == ("error", [])
    assert "`make run` prints" in failed["error"][0]
    assert retried(demo, PASSWORD)["status"] == "success"


def no_password_is_in_a_log(demo: MakeRun) -> None:
    logs = list(demo.data_dir.glob("*/*.log"))
    assert len(logs) == 4
    for log in logs:
        text = log.read_text(errors="replace")
        assert PASSWORD not in text
        assert OLD_PASSWORD not in text


def the_executor_reads_only_the_secrets_of_its_organization(demo: MakeRun) -> None:
    environment = part(demo, "dev.executor").environ()
    headers = {"X-Vault-Token": environment["VAULT_TOKEN"]}
    for organization, status in (("demo", 404), ("example", 403)):
        url = f"{demo.facts()['VAULT_ADDR']}/v1/secret/data/runs/{organization}/{'0' * 8}"
        assert httpx.get(url, headers=headers, trust_env=False, verify=False).status_code == status
    # And no settings of ours or of whoever has started make.
    assert environment.keys() <= {"API_URL", "API_KEY", "VAULT_ADDR", "VAULT_TOKEN", "MACHINE_ID", "LC_CTYPE"}


def the_example_leaves_the_demo_alone(demo: MakeRun) -> None:
    with demo.api() as api:
        before = api.get("/v1/runs").json()["total"]
        done = subprocess.run(
            [sys.executable, "-m", "examples.lifecycle"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATA_DIR": str(demo.data_dir)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert api.get("/v1/runs").json()["total"] == before
        assert [machine["hostname"] for machine in api.get("/v1/machines").json()["items"]] == ["demo"]


def it_goes_on_after_a_power_cut_in_the_middle_of_the_work(demo: MakeRun) -> None:
    run_id = demo.facts()["DEMO_RUN_ID"]
    with demo.api() as api:
        assert api.post(f"/v1/runs/{run_id}/retry").status_code == 200
        until(lambda: api.get(f"/v1/runs/{run_id}").json()["status"] == "running")
    part(demo, "dev.run").kill()
    demo.assert_all_gone()
    again = MakeRun(demo.data_dir, demo.port).wait_for(READY)
    try:
        assert again.facts()["DEMO_RUN_ID"] == run_id
        assert retried(again, PASSWORD)["status"] == "success"
        again.process.send_signal(signal.SIGINT if sys.platform == "linux" else signal.SIGTERM)
        again.assert_all_gone()
    finally:
        again.end()


# --- stopping ---------------------------------------------------------------------------------------------------------


SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL", "Ctrl-C")
AFTER = [("Starting PostgreSQL", name) for name in SIGNALS]
AFTER += [(READY, name) for name in SIGNALS if os.environ.get("SOAK")]  # the test above has one of these


@pytest.mark.parametrize(("text", "name"), AFTER)
def test_a_signal_to_make_alone_stops_everything(
    name: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The same folder for all: the second start of a stack takes a second, the first takes ten.
    folder = tmp_path_factory.getbasetemp() / "stopped"
    folder.mkdir(exist_ok=True)
    if name == "SIGINT" and sys.platform != "linux":
        pytest.skip("only Linux tells whether make was interrupted")
    started = MakeRun(folder / "data")
    try:
        started.wait_for(text)
        began = time.monotonic()
        if name == "Ctrl-C":
            os.killpg(started.process.pid, signal.SIGINT)
        else:
            started.process.send_signal(getattr(signal, name))
        started.assert_all_gone()
        assert time.monotonic() - began < 25
        assert "Traceback" not in started.printed
        assert "Stopped. `make run` continues" in started.printed
    finally:
        started.end()


# --- ports and installing ---------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_answered_with_one_that_is_free(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = subprocess.run(
            [sys.executable, "-m", "dev.run"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path / "data"), "PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 1
        [suggested] = re.findall(r"Choose another: make run PORT=(\d+)", refused.stderr)
        assert int(suggested) != port
        assert port_problem(int(suggested)) is None


@pytest.mark.parametrize("privileged", [1, 80, 443, 1023])
def test_the_substitute_of_a_privileged_port_is_not_privileged(privileged: int) -> None:
    assert usable_port(privileged) >= privileged + 8000


def test_there_is_always_another_port() -> None:
    assert 1024 <= usable_port(65535) < 65535


def installed(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    """What dev/install.py says and does, with a list that asks for this and no index to get it from."""
    wanted = folder / "wanted.lock"
    wanted.write_text(f"--no-index\n{what} --hash=sha256:{'0' * 64}\n")
    command = [sys.executable, "dev/install.py", str(wanted)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_installing_says_what_fails(tmp_path: Path) -> None:
    done = installed(tmp_path, "nothing-of-this-name==1.0")
    assert done.returncode == 1
    assert done.stdout.startswith("Installing 1 locked packages ...\n")
    assert "nothing-of-this-name==1.0" in done.stderr


def test_installing_what_is_there_succeeds(tmp_path: Path) -> None:
    done = installed(tmp_path, f"httpx=={httpx.__version__}")
    assert (done.returncode, done.stderr) == (0, "")
