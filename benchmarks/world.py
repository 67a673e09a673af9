"""What is measured: real server processes with production settings on a real PostgreSQL (fsync on) and a real OpenBao.

Every request gets a finished run of its own from a stock that is filled by SQL, so that nothing but retries is measured.
The background task of each server works as in production while requests are served.
"""

import asyncio
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar
from uuid import UUID, uuid4

import asyncpg
import psutil

from app.access.auth import digest, new_key
from benchmarks import load
from benchmarks.load import Pressure
from benchmarks.measure import Sample
from dev.run import APP, ROOT, App
from dev.stack import Bao, Part, Postgres, free_port, http

ORGANIZATION = "bench"
AnyPart = TypeVar("AnyPart", bound=Part)
MACHINES = 10  # connected and soon busy: assignment is on, as in production
RETRY_BODY = b'{"input_values": {"customer": "Ada Lovelace", "amount": 120.5, "urgent": true}}'
HISTORY = 4096

# Runs number $2 to $3; run n has the id md5(n). $4 is the history (null: none), $5 whether it has an output attachment,
# $6 the age in days of run 0: each is a second younger than the one before it.
FINISHED = """
WITH fresh AS (
    INSERT INTO runs (id, organization_id, workflow_id, status, attempt, input_values, lane, created_at, queued_at, started_at,
                      ended_at)
    SELECT md5(n::text)::uuid, 'bench', $1, 'success', 1, '{"customer": "Grace", "amount": 12}', 'any', at, at, at,
           at + interval '1 minute'
    FROM generate_series($2::bigint, $3::bigint) AS n,
         LATERAL (SELECT now() - make_interval(days => $6::int) + n * interval '1 s') AS t (at)
), produced AS (
    INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history)
    SELECT md5(n::text)::uuid, 1, '{"receipt": "R-1"}', $4::json FROM generate_series($2::bigint, $3::bigint) AS n
)
INSERT INTO run_attachments (id, organization_id, run_id, attachment_type, filename, content_type, size_bytes, storage_path)
SELECT gen_random_uuid(), 'bench', md5(n::text)::uuid, 'output', 'result.txt', 'text/plain', 6,
       'bench/' || md5(n::text)::uuid || '/' || gen_random_uuid()
FROM generate_series($2::bigint, $3::bigint) AS n WHERE $5
"""


FINISH = """
WITH ended AS (
    UPDATE runs SET status = 'success', started_at = now(), ended_at = now(), assigned_machine_id = NULL, awaited_since = NULL
    WHERE id = ANY($1::uuid[]) AND status IN ('scheduling', 'running') RETURNING id, attempt, secret_path
), kept AS (
    INSERT INTO deletions (store, name, due_at)
    SELECT 'vault', secret_path, now() + interval '1 day' FROM ended WHERE secret_path IS NOT NULL
), handed_in AS (
    INSERT INTO run_attachments (id, organization_id, run_id, attachment_type, filename, content_type, size_bytes, storage_path)
    SELECT gen_random_uuid(), 'bench', id, 'output', 'result.txt', 'text/plain', 6, 'bench/' || id || '/' || gen_random_uuid()
    FROM ended
)
INSERT INTO run_outputs (run_id, attempt, output_data, run_message_history)
SELECT id, attempt, '{"receipt": "R-1"}', $2::json FROM ended
"""


def run_id(number: int) -> str:
    """The id of run `number` in every database here; the same as md5(number::text)::uuid."""
    return str(UUID(hashlib.md5(str(number).encode()).hexdigest()))


def history(size: int) -> str:
    """A message history of about this many bytes. Its text is random: PostgreSQL must not compress it to nothing."""
    messages: list[dict[str, str]] = []
    left = size
    while left > 0:
        part = min(left, 16384)
        messages.append({"role": "assistant", "content": secrets.token_urlsafe(max(1, (part - 40) * 3 // 4))})
        left -= part
    return json.dumps(messages)


class Data:
    """One database with runs in it."""

    def __init__(self, url: str, app_url: str) -> None:
        self.url = url  # as the owner
        self.app_url = app_url  # as the service
        self.key = new_key()
        self.workflow = uuid4()
        self._next = 1
        self._stock: dict[tuple[int | None, bool], range] = {}

    @classmethod
    def create(cls, url: str, app_url: str, runs: int, root: Path = ROOT) -> Self:
        """The schema by the migrations of the checkout at `root`, then `runs` finished runs without history or files."""
        subprocess.run(
            [*APP, "migrate"],
            env={"PATH": os.environ["PATH"], "DATABASE_URL": app_url, "DATABASE_OWNER_URL": url},
            cwd=root,
            capture_output=True,
            check=True,
        )
        data = cls(url, app_url)
        data.sql(
            "INSERT INTO api_keys (id, organization_id, key_hash) VALUES (gen_random_uuid(), $1, $2)",
            ORGANIZATION,
            digest(data.key.encode()),
        )
        data.sql(
            "INSERT INTO workflows (id, organization_id, main_prompt) VALUES ($1, $2, 'Do it.')",
            data.workflow,
            ORGANIZATION,
        )
        data.sql(
            "INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id)"
            " SELECT gen_random_uuid(), $1, n, 'key' FROM generate_series(1, $2::int) AS n",
            ORGANIZATION,
            MACHINES,
        )
        data._add(runs, None, attachment=False, age=30)
        data.sql("VACUUM ANALYZE")
        return data

    def sql(self, query: str, *arguments: object) -> list[Any]:
        """Rows of one statement, as the database's owner."""

        async def fetch() -> list[Any]:
            connection = await asyncpg.connect(self.url, timeout=10)
            try:
                return list(await connection.fetch(query, *arguments))
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def script(self, statements: str) -> None:
        """Run statements as the database's owner."""

        async def execute() -> None:
            connection = await asyncpg.connect(self.url, timeout=10)
            try:
                await connection.execute(statements)
            finally:
                await connection.close()

        asyncio.run(execute())

    def timed(self, query: str, *arguments: object, times: int) -> list[float]:
        """Seconds that a statement takes on one connection."""

        async def run() -> list[float]:
            connection = await asyncpg.connect(self.url, timeout=10, server_settings={"jit": "off"})
            took = []
            try:
                for _ in range(times):
                    began = time.perf_counter()
                    await connection.fetch(query, *arguments)
                    took.append(time.perf_counter() - began)
            finally:
                await connection.close()
            return took

        return asyncio.run(run())

    def widen(self, count: int, history_bytes: int) -> None:
        """Give the newest runs a history."""
        self.sql(
            "UPDATE run_outputs SET run_message_history = $1::json"
            " WHERE run_id IN (SELECT id FROM runs ORDER BY created_at DESC, id DESC LIMIT $2)",
            history(history_bytes),
            count,
        )
        self.sql("VACUUM ANALYZE runs, run_outputs")

    def stock(self, least: int, history_bytes: int | None = HISTORY, *, attachment: bool = True) -> range:
        """The numbers of at least this many finished runs that no request was sent for yet; see `used`."""
        kind = (history_bytes, attachment)
        have = self._stock.get(kind, range(0))
        if len(have) < least:  # what is left over goes to waste: a range must be without gaps
            have = self._add(least, history_bytes, attachment=attachment)
            self.sql("ANALYZE")
        self._stock[kind] = have
        return have

    def used(self, count: int, history_bytes: int | None = HISTORY, *, attachment: bool = True) -> None:
        kind = (history_bytes, attachment)
        self._stock[kind] = self._stock[kind][count:]

    def drain(self, seconds: float = 120, *, also: str = "") -> float:
        """Wait until all that is due or superseded is gone, every webhook is sent, and the query `also` finds nothing; how long
        it took. It is part of what a request costs, and the next measure must not pay for it."""
        left = (
            "SELECT FROM deletions WHERE due_at <= now() UNION ALL SELECT FROM run_outputs WHERE is_superseded"
            " UNION ALL SELECT FROM webhook_events WHERE NOT is_fanned_out"
            " UNION ALL SELECT FROM webhook_deliveries WHERE status = 'pending'"
        )
        query = f"{left} UNION ALL {also} LIMIT 1" if also else f"{left} LIMIT 1"

        async def wait() -> float:
            connection = await asyncpg.connect(self.url, timeout=10)
            began = time.monotonic()
            try:
                while await connection.fetch(query):
                    if time.monotonic() - began > seconds:
                        raise TimeoutError(f"Something was left to do after {seconds:.0f} s")
                    await asyncio.sleep(0.05)
                return time.monotonic() - began
            finally:
                await connection.close()

        return asyncio.run(wait())

    def finish(self, ids: Sequence[str], history_bytes: int = HISTORY) -> None:
        """As their executors' reports do: these runs end, with outputs and a file; their secrets are kept for a day."""
        for low in range(0, len(ids), 5000):
            self.sql(FINISH, list(ids[low : low + 5000]), history(history_bytes))

    def end_active(self) -> None:
        """Nothing waits and nothing runs any more: all machines are idle."""
        self.sql(
            "UPDATE runs SET status = 'cancelled', ended_at = now(), awaited_since = NULL"
            " WHERE status IN ('scheduling', 'running')"
        )

    def _add(self, count: int, history_bytes: int | None, *, attachment: bool, age: int = 90) -> range:
        """The stock is older than the rest, so that the first pages of a list stay as they are."""
        first, self._next = self._next, self._next + count
        text = None if history_bytes is None else history(history_bytes)
        step = 100_000 if (history_bytes or 0) < 100_000 else 200
        for low in range(first, first + count, step):
            high = min(low + step, first + count) - 1
            self.sql(FINISHED, self.workflow, low, high, text, attachment, age)
        return range(first, first + count)


class Server:
    """A server process, and what its requests cost.

    `sent` are the ids of the last load, as far as they were sent; `requests` is how many requests it sent.
    """

    def __init__(self, app: App, port: int, data: Data, postgres: Postgres, bao: Bao) -> None:
        self.app = app
        self.port = port
        self.data = data
        self.sent: Sequence[str] = ()
        self.requests = 0
        self._postgres = postgres
        self._bao = bao
        self._pace = 3000.0  # requests per second, to size the stock

    def head(self, method: str, path: str, *headers: str, body: bytes = b"", key: str | None = None) -> str:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self.port}",
            f"Authorization: Bearer {key or self.data.key}",
            *headers,
        ]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""])

    def get(self, path: str) -> Any:
        status, reply = self.call("GET", path)
        if status != 200:
            raise RuntimeError(f"GET {path} answered {status}")
        return reply

    def call(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key or self.data.key}"}
        return http(method, f"http://127.0.0.1:{self.port}{path}", body, headers)

    def most(self, pressure: Pressure) -> int:
        """More requests than are answered under this pressure."""
        return pressure.limit or int(self._pace * 1.5 * (pressure.seconds + pressure.warmup)) + 100

    def retries(
        self,
        pressure: Pressure,
        *headers: str,
        body: bytes = RETRY_BODY,
        history_bytes: int | None = HISTORY,
        ids: Sequence[str] | None = None,
        drained: str = "",
    ) -> Sample:
        """Retry these runs, or runs of the stock, each once. `{id}` in a header is the run's id; `drained` as of `repeat`."""
        most = self.most(pressure)
        own = ids is None
        if ids is None:
            ids = [run_id(number) for number in self.data.stock(most, history_bytes)[:most]]
        head = self.head("POST", "/v1/runs/{id}/retry", *headers, body=body)
        seen = self.repeat(pressure, head, body=body, ids=ids, drained=drained)
        if own:
            self.data.used(len(self.sent), history_bytes)
            if pressure.limit is None:
                if len(self.sent) >= most:
                    raise RuntimeError("The stock of runs was used up before the time was")
                self._pace = max(self._pace, seen.rate)
        return seen

    def repeat(
        self,
        pressure: Pressure,
        head: str,
        *,
        expect: int = 200,
        body: bytes = b"",
        ids: Sequence[str] = (),
        drained: str = "",
    ) -> Sample:
        """The same request again and again; with ids, `{id}` in its head is the next of them.

        What it costs includes what the background does afterwards, until nothing is due and the query `drained` finds nothing.
        """
        before = self._used()
        outcome = load.run(load.Plan(self.port, pressure, head, expect, body, list(ids)))
        self.sent, self.requests = ids[: outcome.sent], outcome.sent
        drain = self.data.drain(also=drained)
        cost = {name: (used - before[name]) / outcome.sent * 1e6 for name, used in self._used().items()}
        return sample(outcome, cost | {"drain s": drain})

    def cpu(self) -> tuple[float, float]:
        """Seconds of processor time so far: of this server, and of PostgreSQL."""
        return cpu_seconds(self.app), cpu_seconds(self._postgres)

    def _used(self) -> dict[str, float]:
        """Seconds of processor time so far."""
        parts = {"app us": self.app, "db us": self._postgres, "vault us": self._bao}
        return {name: cpu_seconds(part) for name, part in parts.items()}


class Bare(Part):
    """(f), as a server process."""

    name = "bare"

    def __init__(self, folder: Path, documents: dict[str, Any]) -> None:
        super().__init__(folder / self.name)
        self.port = free_port()
        self._documents = folder / "documents.json"
        self._documents.write_text(json.dumps(documents), encoding="utf-8")

    def start(self) -> Self:
        self.launch(
            [sys.executable, "-m", "benchmarks.bare", str(self.port), str(self._documents)],
            {"PATH": os.environ["PATH"]},
            cwd=ROOT,
        )
        self.wait_until(self._answers)
        return self

    def repeat(self, pressure: Pressure, method: str, path: str, *, body: bytes = b"") -> Sample:
        """`{id}` in the path is another id in each request."""
        head = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        ids = range(20_000 * int(pressure.seconds + pressure.warmup + 1)) if "{id}" in path else ()
        used = cpu_seconds(self)
        outcome = load.run(
            load.Plan(
                self.port,
                pressure,
                "\r\n".join([*head, "", ""]),
                body=body,
                ids=[run_id(number) for number in ids],
            )
        )
        return sample(outcome, {"app us": (cpu_seconds(self) - used) / outcome.sent * 1e6})

    def _answers(self) -> bool:
        try:
            return http("GET", f"http://127.0.0.1:{self.port}/v1/runs/{uuid4()}")[0] == 200
        except OSError:
            return False


class Service(App):
    """The service of the checkout at `root`."""

    arguments: tuple[str, ...] = ("app", "serve")

    def __init__(self, folder: Path, url: str, environment: Mapping[str, str], root: Path) -> None:
        super().__init__(folder, url, environment)
        self._root = root

    def start(self) -> Self:
        self.launch([sys.executable, "-m", *self.arguments], self.environment, cwd=self._root)
        self.wait_until(self._ready)
        return self


class Unplaced(Service):
    """The service without its placement."""

    arguments = ("benchmarks.unplaced",)


class Program(Part):
    """Another program of the checkout at `root`, as a process."""

    def __init__(
        self, name: str, folder: Path, module: Sequence[str], environment: Mapping[str, str], root: Path = ROOT
    ) -> None:
        self.name = name
        super().__init__(folder)
        self._root = root
        self._command = [sys.executable, "-m", *module]
        self._environment = environment

    def start(self) -> Self:
        self.launch(self._command, self._environment, cwd=self._root)
        return self


class World:
    """Starts what a group asks for, once; stops everything at the end. `root` is the checkout whose service it is."""

    def __init__(self, folder: Path, options: Mapping[str, str] | None = None, root: Path = ROOT) -> None:
        self.folder = folder
        self.root = root
        self._options = options
        self._started = ExitStack()
        self._servers: dict[tuple[object, ...], Server] = {}

    def __enter__(self) -> Self:
        self.postgres = self._started.enter_context(Postgres(self.folder, fsync=True, options=self._options))
        self.bao = self._started.enter_context(Bao(self.folder))
        self.vault_token = self.bao.token()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    @cached_property
    def small(self) -> Data:
        """10,000 runs beside the stock."""
        return Data.create(self.postgres.url, self.postgres.app_url, 10_000, self.root)

    @cached_property
    def million(self) -> Data:
        """1,000,000 runs beside the stock, in a database of its own."""
        return self.database("million", 1_000_000)

    @property
    def server(self) -> Server:
        """One worker on the small database."""
        return self.server_of(self.small)

    def database(self, name: str, runs: int = 0) -> Data:
        """A database of its own."""
        self.small.sql(f"CREATE DATABASE {name}")
        url = f"{self.postgres.url.rpartition('/')[0]}/{name}"
        return Data.create(url, self.postgres.as_app(url), runs, self.root)

    def beside(self, name: str, options: Mapping[str, str]) -> "World":
        """Another world, whose PostgreSQL has other settings."""
        folder = self.folder / name
        folder.mkdir()
        return self._started.enter_context(World(folder, options, self.root))

    def start(self, part: AnyPart) -> AnyPart:
        """Until the end of this world."""
        self._started.enter_context(part)
        return part

    def server_of(
        self,
        data: Data,
        workers: int = 1,
        program: type[Service] = Service,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> Server:
        kind = (data.url, workers, program, *sorted(settings.items()))
        if kind not in self._servers:
            folder = self.folder / f"server{len(self._servers)}"
            files = folder / "files"
            files.mkdir(parents=True)
            port = free_port()
            environment = self.settings(data, files) | {
                "PATH": os.environ["PATH"],
                "PORT": str(port),
                "WORKERS": str(workers),
                "LOG_LEVEL": "info",
                "NO_PROXY": "127.0.0.1",
            }
            environment |= {name: str(value) for name, value in settings.items()}
            app = self.start(program(folder, f"http://127.0.0.1:{port}", environment, self.root))
            self._servers[kind] = Server(app, port, data, self.postgres, self.bao)
        return self._servers[kind]

    def settings(self, data: Data, files: Path) -> dict[str, str]:
        """What any process of the service must know."""
        return {
            "DATABASE_URL": data.app_url,
            "VAULT_ADDR": self.bao.address,
            "VAULT_TOKEN": self.vault_token,
            "STORAGE_URL": files.as_uri(),
            "SERVER_KEY": secrets.token_hex(32),
            "WEBHOOK_ALLOW": "127.0.0.0/8",
        }

    @cached_property
    def bare(self) -> Bare:
        """(f) with what the service itself answers to a retry and to a list."""
        [number] = self.small.stock(1)[:1]
        status, run = self.server.call("POST", f"/v1/runs/{run_id(number)}/retry", json.loads(RETRY_BODY))
        if status != 200:
            raise RuntimeError(f"The first retry answered {status}: {run}")
        self.small.used(1)
        return self.start(Bare(self.folder, {"run": run, "page": self.server.get("/v1/runs?limit=100")}))


def sample(outcome: load.Outcome, cost: dict[str, float]) -> Sample:
    figures = cost | {"client busy": outcome.client_busy}
    return Sample(outcome.requests / outcome.seconds, outcome.p50, outcome.p99, figures)


def cpu_seconds(part: Part) -> float:
    """Processor time of a part so far: its living processes, and the ended ones that its first process waited for."""
    used = 0.0
    for process in processes(part):
        with suppress(psutil.NoSuchProcess):  # a connection's process ended meanwhile: it is in the next line's sum
            used += sum(process.cpu_times()[:2])
    ended = psutil.Process(part.pid).cpu_times()
    return used + ended.children_user + ended.children_system


def processes(part: Part) -> list[psutil.Process]:
    parent = psutil.Process(part.pid)
    return [parent, *parent.children(recursive=True)]
