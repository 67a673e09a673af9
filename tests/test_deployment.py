"""What is shipped to run the service: image, compose file, policies, locked lists. No container engine is needed."""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
import pytest
from ruamel.yaml import YAML

from app import __version__
from app.config import Settings
from dev import create_venv
from dev.stack import Bao, Part, Postgres, free_port, http
from tests.support.stack import Stack
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOT_SETTINGS = {"PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]} | environment
    )


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(ROOT / "docker-compose.yml")
    return content


@pytest.fixture(scope="module")
def dockerfile() -> str:
    """With continued lines joined and comments gone."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())
    return re.sub(r"\\\n\s*", "", text)


# --- image ------------------------------------------------------------------------------------------------------------


def test_the_image_is_linted() -> None:
    linted = run(str(BIN / "hadolint"), "Dockerfile")
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_image_runs_without_root_from_hash_locked_packages(dockerfile: str) -> None:
    assert re.search(r"(?m)^USER 10001:10001$", dockerfile)
    assert "--require-hashes" in dockerfile
    entry_points = re.findall(r"(?m)^ENTRYPOINT (.*)$", dockerfile)
    assert [json.loads(form) for form in entry_points] == [
        ["python", "-m", "dev.compose_demo"],
        ["python", "-m", "app"],
    ]


def test_the_build_context_holds_what_the_image_copies_and_nothing_else(dockerfile: str) -> None:
    copies = [line.split()[1:-1] for line in re.findall(r"(?m)^COPY (?!--from).*$", dockerfile)]
    copied = {source for sources in copies for source in sources}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_what_the_image_copies_is_readable_whatever_the_umask_of_the_checkout_was(dockerfile: str) -> None:
    stages = re.split(r"(?m)^FROM ", dockerfile)[1:]
    for stage in stages:
        if into_srv := re.findall(r"(?m)^COPY (?!--from).* /srv/\S+$", stage):
            assert "chmod -R a+rX /srv" in stage.rpartition(into_srv[-1])[2], stage.splitlines()[0]


def test_the_image_has_nothing_to_install_with(dockerfile: str) -> None:
    assert re.findall(r"-m venv (\S+)", dockerfile) == ["--without-pip"]


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_of_the_image(dockerfile: str, status: int, code: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    command = json.loads(re.findall(r"(?m)^HEALTHCHECK .*?CMD (\[.*\])$", dockerfile)[0])
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        checked = run(sys.executable, *command[1:], PORT=str(server.server_port), http_proxy="http://127.0.0.1:9")
        server.shutdown()
    assert checked.returncode == code, checked.stderr


# --- compose ----------------------------------------------------------------------------------------------------------


def test_the_compose_file_follows_the_specification() -> None:
    checked = run(
        str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml", HOME=str(ROOT)
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_setting_named_in_image_and_compose_file_exists(compose: dict[str, Any], dockerfile: str) -> None:
    known = {name.upper() for name in Settings.model_fields}
    known |= {f"{name}_FILE" for name in known}
    named = set(re.findall(r"(\w+)=", " ".join(re.findall(r"(?m)^ENV (.*)$", dockerfile)))) - NOT_SETTINGS
    assert named
    for service in ("app", "migrate"):
        named |= set(compose["services"][service]["environment"])
    assert named <= known, named - known


def test_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("SECRETS", "VAULT_LOGIN", "VAULT_ADDR"):
        uses = re.findall(rf"\$\{{{name}(.*?)\}}", text)
        assert uses, name
        assert all(use.startswith(":?") for use in uses), (name, uses)
    bundled_vault = [name for name, service in compose["services"].items() if service.get("profiles")]
    assert bundled_vault == ["openbao", "openbao-setup", "demo"]


def test_the_development_file_sets_everything_the_compose_file_requires() -> None:
    lines = (ROOT / "development.env").read_text().splitlines()
    given = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    required = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert required <= given
    assert given - required == {"COMPOSE_PROFILES", "VAULT_ALLOW_HTTP"}


def test_secrets_are_files_and_no_variables(compose: dict[str, Any]) -> None:
    """`docker inspect` shows the variables of a container, and its arguments."""
    folder = ROOT / "deploy/development"
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert {name: one["file"].rpartition("/")[2] for name, one in compose["secrets"].items()} == {
        name: name for name in files
    }
    values = {(folder / name).read_text() for name in files}
    assert all(len(value.split()) == 1 and value == value.strip() for value in values)
    shown = json.dumps(compose) + (ROOT / "development.env").read_text()
    assert not [value for value in values if value not in "development" and value in shown]
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|DATABASE.*URL|_KEY|TOKEN|SECRET_ID", variable)
            assert secret is None or (variable.endswith("_FILE") and str(value).startswith("/run/")), (name, variable)
        for one in service.get("secrets", ()):
            assert f"/run/secrets/{one}" in str(service.get("environment")) or one == "openbao-seal-key", (name, one)


def test_one_service_builds_each_image(compose: dict[str, Any]) -> None:
    """Two that build the same image at the same time fail with the image store of current engines."""
    services = compose["services"]
    builders = [service["image"] for service in services.values() if "build" in service]
    assert sorted(builders) == ["runs-api", "runs-api-demo"]
    users = [service for service in services.values() if service["image"] in builders and "build" not in service]
    assert users
    assert all(service["pull_policy"] == "never" for service in users)


def test_services_have_few_capabilities_and_a_read_only_root(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["memswap_limit"] == service["mem_limit"], name


def test_services_wait_for_what_they_need(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all("healthcheck" in service for service in services.values())
    for name, service in services.items():
        for needed, condition in service.get("depends_on", {}).items():
            ends = services[needed].get("restart") == "no"
            assert condition["condition"] == ("service_completed_successfully" if ends else "service_healthy"), name
            # A service of a profile must not be demanded by one that is always there.
            assert condition.get("required", True) == (
                services[needed].get("profiles") in (None, service.get("profiles"))
            )


def test_every_service_has_limits(compose: dict[str, Any]) -> None:
    assert [name for name, service in compose["services"].items() if not service.get("mem_limit")] == []
    assert [name for name, service in compose["services"].items() if not service.get("pids_limit")] == []


def test_only_the_owner_of_the_tables_gets_the_owners_password(compose: dict[str, Any]) -> None:
    owners = {"postgres-password", "database-owner-url"}
    with_it = {name for name, service in compose["services"].items() if owners & set(service.get("secrets", ()))}
    assert with_it == {"postgres", "postgres-setup", "migrate", "demo"}
    assert compose["services"]["demo"]["profiles"] == ["development"]


def test_the_setup_of_the_databases_role(tmp_path: Path) -> None:
    with Postgres(tmp_path, fsync=False) as postgres:
        place = urlsplit(postgres.url)
        assert place.username
        assert place.password
        owners, services = tmp_path / "owners-password", tmp_path / "services-password"
        owners.write_text(place.password)
        for password in ("first", "it's \\ another"):  # a second start changes it
            services.write_text(password)
            done = run(
                "/bin/sh",
                str(ROOT / "deploy" / "postgres-setup.sh"),
                PATH=f"{postgres.binaries}:{os.environ['PATH']}",
                PGHOST="127.0.0.1",
                PGPORT=str(place.port),
                PGUSER=place.username,
                PGPASSWORD_FILE=str(owners),
                PGDATABASE="runs",
                APP_PASSWORD_FILE=str(services),
            )
            assert done.returncode == 0, done.stderr
            psql = (str(postgres.binaries / "psql"), "-X", "-h", "127.0.0.1", "-p", str(place.port), "-d", "runs")
            asked = run(*psql, "-Atc", "SELECT current_user", PGUSER="runs_app", PGPASSWORD=password)
            assert asked.stdout == "runs_app\n", asked.stderr


class ComposeBao(Part):
    """OpenBao as the compose file starts it, with this machine's folders and ports."""

    name = "compose-openbao"

    def start(self) -> Self:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        data = self.folder / "file"
        data.mkdir(parents=True)
        text = (ROOT / "deploy" / "openbao.hcl").read_text()
        for theirs, ours in {
            "/run/secrets/openbao-seal-key": str(ROOT / "deploy/development/openbao-seal-key"),
            "/openbao/file": str(data),
            "0.0.0.0:8200": f"127.0.0.1:{port}",
            "127.0.0.1:8201": f"127.0.0.1:{free_port()}",
        }.items():
            assert theirs in text
            text = text.replace(theirs, ours)
        configuration = self.folder / "openbao.hcl"
        configuration.write_text(text)
        bao = Bao(self.folder)
        self.launch([str(bao.binary), "server", f"-config={configuration}"], {})
        self.wait_until(lambda: self._status() != 1)
        return self

    def _status(self) -> int:
        """By the container's own health check."""
        return run(str(Bao(self.folder).binary), "status", BAO_ADDR=self.address).returncode


@pytest.fixture
def compose_bao(tmp_path: Path) -> Iterator[ComposeBao]:
    with ComposeBao(tmp_path / "bao") as bao:
        yield bao


def test_the_setup_of_the_development_vault(compose_bao: ComposeBao, tmp_path: Path) -> None:
    keys, login = tmp_path / "keys", tmp_path / "login"
    executor = tmp_path / "executor"
    for folder in (keys, login, executor):
        folder.mkdir()
    binaries = Bao(tmp_path).binary.parent

    def set_up() -> tuple[str, str]:
        done = run(
            "/bin/sh",
            str(ROOT / "deploy" / "openbao-setup.sh"),
            PATH=f"{binaries}:{os.environ['PATH']}",
            HOME=str(tmp_path),
            BAO_ADDR=compose_bao.address,
            KEYS=str(keys),
            LOGIN=str(login),
            POLICIES=str(ROOT / "policies"),
            OWNER=str(os.geteuid()),
            EXECUTOR=str(executor),
            ORGANIZATION="demo",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return (login / "role-id").read_text(), (login / "secret-id").read_text()

    role_id, secret_id = set_up()
    assert set_up() == (role_id, secret_id)  # a second start changes nothing
    assert (login / "secret-id").stat().st_mode & 0o777 == 0o600
    url = f"{compose_bao.address}/v1"
    status, reply = http("POST", f"{url}/auth/approle/login", {"role_id": role_id, "secret_id": secret_id})
    assert status == 200
    token = {"X-Vault-Token": reply["auth"]["client_token"]}
    assert http("POST", f"{url}/secret/data/runs/org/run/1", {"data": {"a": "b"}}, token)[0] == 200
    assert http("GET", f"{url}/secret/data/runs/org/run/1", None, token)[0] == 403
    assert http("POST", f"{url}/secret/data/runs/demo/run/1", {"data": {"a": "b"}}, token)[0] == 200
    executors = {"X-Vault-Token": (executor / "token").read_text().strip()}
    assert http("GET", f"{url}/secret/data/runs/demo/run/1", None, executors)[0] == 200
    assert http("GET", f"{url}/secret/data/runs/org/run/1", None, executors)[0] == 403


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    yaml = YAML(typ="safe")
    return [part for file in sorted((ROOT / "deploy/kubernetes").glob("*.yaml")) for part in yaml.load_all(file)]


@pytest.fixture(scope="module")
def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The templates, by component."""
    templates = [one["spec"]["template"] for one in manifests if one["kind"] in {"Deployment", "Job"}]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"] for one in templates}


def test_the_manifests_are_what_kubernetes_takes(tmp_path: Path) -> None:
    files = sorted(map(str, (ROOT / "deploy/kubernetes").glob("*.yaml")))
    checked = run(str(BIN / "kubernetes-validate"), "--strict", *files)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(files[0]).read_text().replace("readinessProbe", "readynessProbe"))
    assert run(str(BIN / "kubernetes-validate"), "--strict", str(wrong)).returncode != 0


def test_everything_in_the_cluster_is_labelled_and_selected_by_labels(manifests: list[dict[str, Any]]) -> None:
    names = ("name", "instance", "version", "component", "part-of", "managed-by")
    for one in manifests:
        labels = one["metadata"]["labels"]
        assert set(labels) == {f"app.kubernetes.io/{name}" for name in names}
        assert labels["app.kubernetes.io/version"] == __version__
        spec = one.get("spec", {})
        selector = spec.get("selector", {})
        selector = selector.get("matchLabels", selector)
        assert selector.items() <= labels.items(), one["metadata"]["name"]
        if "template" in spec:
            assert spec["template"]["metadata"]["labels"] == labels
    budgets = {one["metadata"]["name"] for one in manifests if one["kind"] == "PodDisruptionBudget"}
    assert budgets == {one["metadata"]["name"] for one in manifests if one["kind"] == "Deployment"}


def test_pods_are_restricted_and_have_limits(pods: dict[str, dict[str, Any]]) -> None:
    assert pods.keys() == {"api", "settling", "migrate"}
    for pod in pods.values():
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert pod["automountServiceAccountToken"] is False
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"] == f"runs-api:{__version__}"
        assert container["resources"]["limits"].keys() == {"memory", "ephemeral-storage"}
        assert container["resources"]["requests"].keys() == {"cpu", "memory", "ephemeral-storage"}
        if container["args"] == ["serve"]:
            assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
            # The default of SHUTDOWN_SECONDS, after the time in which nobody is sent here any more.
            rest = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert pod["terminationGracePeriodSeconds"] > rest + Settings.model_fields["shutdown_seconds"].default


def test_settings_in_the_cluster_exist_and_secrets_are_files_of_whom_they_concern(
    manifests: list[dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    [config] = [one["data"] for one in manifests if one["kind"] == "ConfigMap"]
    of_pods = {name: [one["name"] for one in pod["containers"][0].get("env", ())] for name, pod in pods.items()}
    names = {
        name.removesuffix("_FILE") for name in (*config, *of_pods["api"], *of_pods["settling"], *of_pods["migrate"])
    }
    assert {name.lower() for name in names} <= Settings.model_fields.keys()
    secret = {"DATABASE_URL", "DATABASE_OWNER_URL", "SERVER_KEY", "METRICS_TOKEN", "VAULT_ROLE_ID", "VAULT_SECRET_ID"}
    assert not secret & {*config, *(name for pod in of_pods.values() for name in pod)}
    assert [pods[name]["containers"][0]["env"][0]["value"] for name in ("api", "settling")] == ["none", "only"]
    assert [name for name, pod in pods.items() if "runs-api-owner" in json.dumps(pod)] == ["migrate"]
    required = {name for name, field in Settings.model_fields.items() if field.is_required()}
    assert {name.upper() for name in required} <= {name.removesuffix("_FILE") for name in config}


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bao(stack: Stack) -> Bao:
    return stack.bao


def test_the_service_may_create_and_destroy_and_nothing_else(bao: Bao) -> None:
    token = bao.token()
    secret = {"data": {"password": "x"}, "options": {"cas": 0}}
    data, metadata = "secret/data/runs/policy/run/1", "secret/metadata/runs/policy/run/1"
    assert bao.call("POST", data, secret, token=token)[0] == 200
    assert bao.call("POST", data, secret, token=token)[0] == 403  # not even the same again
    assert bao.call("POST", data, {"data": {"password": "y"}}, token=token)[0] == 403
    assert bao.call("GET", data, token=token)[0] == 403
    assert bao.call("GET", metadata, token=token)[0] == 403
    assert bao.call("LIST", "secret/metadata/runs/policy/run", token=token)[0] == 403
    assert bao.call("LIST", "secret/metadata/runs", token=token)[0] == 403
    assert bao.call("DELETE", data, token=token)[0] == 403  # it would keep the value
    assert bao.call("POST", "secret/data/other/1", secret, token=token)[0] == 403
    assert bao.call("DELETE", metadata, token=token)[0] == 204
    assert bao.call("GET", data)[0] == 404


def test_an_executor_reads_one_organization_and_nothing_else(bao: Bao) -> None:
    secret = {"data": {"password": "x"}}
    for organization in ("acme", "acme2"):
        assert bao.call("POST", f"secret/data/runs/{organization}/run/1", secret)[0] == 200
    token = bao.executor_token("acme")
    own, other = "secret/data/runs/acme/run/1", "secret/data/runs/acme2/run/1"
    assert bao.call("GET", own, token=token)[1]["data"]["data"] == {"password": "x"}
    assert bao.call("GET", other, token=token)[0] == 403
    assert bao.call("LIST", "secret/metadata/runs/acme", token=token)[0] == 403
    assert bao.call("POST", own, secret, token=token)[0] == 403
    assert bao.call("DELETE", "secret/metadata/runs/acme/run/1", token=token)[0] == 403


# --- make run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "machine", "libc", "missing", "sentence"),
    [
        ("Linux", "x86_64", "glibc", None, None),
        ("Linux", "aarch64", "glibc", None, None),
        ("Darwin", "arm64", "", None, None),
        ("Linux", "x86_64", "glibc", "ensurepip", "apt install python3-venv"),
        ("Linux", "x86_64", "", None, "musl"),
        ("Linux", "riscv64", "glibc", None, "riscv64"),
        ("Windows", "AMD64", "", None, "Windows"),
    ],
)
def test_what_a_machine_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, libc: str, missing: str | None, sentence: str | None
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, ""))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find_spec(name))
    told = create_venv.problem()
    assert (told is None) if sentence is None else (told is not None and sentence in told)


def test_a_registry_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.lock"
    wanted.write_text(f"there-is-no-such-package==1.0 --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    refused = run(sys.executable, "dev/install.py", str(wanted), **nowhere)
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == [
        "No package registry can be reached, and nothing was installed: look at the network, then run make again."
    ]


def test_ctrl_c_while_the_environment_is_made_shows_no_traceback(tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    making = subprocess.Popen(
        [sys.executable, "dev/create_venv.py", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until(lambda: (folder / "bin" / "python").exists(), what="a part of the environment")
    os.killpg(making.pid, signal.SIGINT)
    said, _ = making.communicate(timeout=30)
    assert making.returncode == 130
    assert said.splitlines() == [f"Creating {folder} (some 10 s) ..."]


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refused = run(sys.executable, "-m", "dev.run", PORT=port, DATA_DIR=str(tmp_path))
    assert refused.returncode == 1
    assert f"Port {port} cannot be used" in refused.stderr
    assert "make run PORT=" in refused.stderr


# --- the embedded stack -----------------------------------------------------------------------------------------------


def test_a_killed_parent_takes_its_database_along_and_the_data_survive(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dev.stack import Postgres\n"
        "postgres = Postgres(Path(sys.argv[1])).start(); print(postgres.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        psql = str(Postgres(tmp_path).binaries / "psql")
        password = (tmp_path / "postgresql" / "password").read_text()
        port = (tmp_path / "postgresql" / "port").read_text()
        address = f"postgresql://runs:{password}@127.0.0.1:{port}/runs"
        assert run(psql, "-X", "-d", address, "-c", "CREATE TABLE kept (id int)").returncode == 0
        orphan = psutil.Process(pid)
        parent.kill()
    with Postgres(tmp_path) as again:
        assert again.pid != pid
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert run(psql, "-X", "-d", again.url, "-c", "SELECT id FROM kept").returncode == 0


def test_the_state_is_private(tmp_path: Path) -> None:
    with Bao(tmp_path) as bao:
        secrets = [bao.folder / name for name in ("root-token", "seal.key", "config.json", "openbao.log")]
        assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)


# --- locked lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.name for path in sorted(ROOT.glob("requirements*.lock"))])
def test_locked_lists_have_hashes_and_name_no_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    entries = text.replace("\\\n", " ").splitlines()
    assert entries
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries)


def test_locked_lists_agree_with_each_other() -> None:
    def versions(name: str) -> dict[str, str]:
        entries = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
        return {package: version for package, _, version in (shlex.split(line)[0].partition("==") for line in entries)}

    everything = versions("requirements-dev.lock")
    for smaller in ("requirements.lock", "requirements-demo.lock", "requirements-stack.lock"):
        assert versions(smaller).items() <= everything.items()
