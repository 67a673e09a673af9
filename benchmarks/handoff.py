"""What Temporal adds to a run and costs, against the long poll: the same executors, the same runs, a real Temporal server."""

import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Sample, Target, p50, rate
from benchmarks.world import ORGANIZATION, Program, Server, World, cpu_seconds
from dev.stack import Part, Temporal

QUEUE = "benchmark"
AT_ONCE = 10  # machines, and executors
RUNS = 300


class _Side:
    """A server with its executors, and what they cost."""

    def __init__(self, server: Server, begun: Path, parts: Mapping[str, Part]) -> None:
        self.server = server
        self._begun = begun
        self._parts = parts

    def one_at_a_time(self, count: int = 50) -> Sample:
        """From the reply to a creation until its executor begins the work."""
        took = []
        for number in range(count):
            self._create({"number": f"one-{number}"})
            replied = time.time()
            took.append((self._noted(f"one-{number}") - replied) * 1000)
            self._until_done()
        self._begun.unlink()
        took.sort()
        return Sample(1000 / took[len(took) // 2], took[len(took) // 2], took[len(took) * 99 // 100])

    def together(self) -> Sample:
        """So many at once, until all have succeeded."""
        before, began = self._used(), time.monotonic()
        self._create({"customer": "Ada"}, RUNS)
        self._until_done()
        seconds = time.monotonic() - began
        used = {name: (now - before[name]) / RUNS * 1e6 for name, now in self._used().items()}
        return Sample(RUNS / seconds, seconds / RUNS * 1000, seconds / RUNS * 1000, used)

    def _create(self, values: dict[str, str], count: int | None = None) -> None:
        body = {"workflow_id": str(self.server.data.workflow), "input_values": values}
        many = {} if count is None else {"count": count}
        status, reply = self.server.call("POST", "/v1/runs" + ("/bulk" if many else ""), body | many)
        if status != 201:
            raise RuntimeError(f"A creation answered {status}: {reply}")

    def _noted(self, number: str, seconds: float = 30) -> float:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self._begun.read_text().splitlines() if self._begun.exists() else ():
                if line.startswith(f"{number} "):
                    return float(line.split()[1])
            time.sleep(0.002)
        raise TimeoutError("No executor has begun the run")

    def _until_done(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while self.server.data.sql("SELECT FROM runs WHERE status IN ('scheduling', 'running') LIMIT 1"):
            if time.monotonic() > end:
                raise TimeoutError("The runs have not ended")
            time.sleep(0.05)

    def _used(self) -> dict[str, float]:
        app, postgres = self.server.cpu()
        return {"app us": app, "db us": postgres} | {
            f"{name} us": cpu_seconds(part) for name, part in self._parts.items()
        }


def handoff(world: World, _: Pressure) -> Group:
    by_poll, by_temporal = _polled(world), _handed(world)
    return Group(
        "handoff",
        f"long poll and Temporal, {AT_ONCE} machines, the example's executors, runs without work; us of each part for a run",
        [
            Case("poll, one", by_poll.one_at_a_time, "one at a time, from the reply to the executor's work"),
            Case("temporal, one", by_temporal.one_at_a_time, "one at a time"),
            Case("poll", by_poll.together, f"{RUNS} at once, until all have succeeded"),
            Case("temporal", by_temporal.together, f"{RUNS} at once"),
        ],
        [
            Target("p50 to the work, temporal / poll", p50("temporal, one", "poll, one")),
            Target("temporal / poll", rate("temporal", "poll")),
        ],
        beside="PostgreSQL, executors; temporal: Temporal, its workflow worker",
    )


def _polled(world: World) -> _Side:
    server = world.server_of(world.database("polled"))
    machines = server.data.sql("SELECT id::text FROM machines WHERE organization_id = $1", ORGANIZATION)
    begun = world.folder / "begun-by-poll"
    environment = _executor(world, server, begun) | {"MACHINE_IDS": ",".join(row["id"] for row in machines)}
    executors = Program("executors", world.folder / "polled", ["benchmarks.executors"], environment)
    return _Side(server, begun, {"executors": world.start(executors)})


def _handed(world: World) -> _Side:
    temporal = world.start(Temporal(world.folder / "temporal"))
    settings = {
        "TEMPORAL_ADDRESS": temporal.address,
        "TEMPORAL_TASK_QUEUE": QUEUE,
        "MACHINE_SILENCE_SECONDS": "0",
    }
    server = world.server_of(world.database("handed"), settings=settings)
    worker = Program("worker", world.folder / "worker", ["app", "worker"], server.app.environment, world.root)
    begun = world.folder / "begun-by-temporal"
    environment = _executor(world, server, begun) | settings | {"AT_ONCE": str(AT_ONCE)}
    executors = Program("executors", world.folder / "handed", ["benchmarks.executors"], environment)
    parts = {"executors": executors, "temporal": temporal, "worker": worker}
    return _Side(server, begun, parts | {"worker": world.start(worker), "executors": world.start(executors)})


def _executor(world: World, server: Server, begun: Path) -> dict[str, str]:
    return {
        "PATH": "",
        "BEGUN": str(begun),
        "API_URL": server.app.url,
        "API_KEY": server.data.key,
        "VAULT_ADDR": world.bao.address,
        "VAULT_TOKEN": world.bao.executor_token(ORGANIZATION),
    }
