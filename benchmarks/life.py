"""The rest of a run's life: it is created, an executor takes it, hands files in and reports."""

import json
from functools import partial
from uuid import UUID

from benchmarks.carried import SECRET_BODY, file_body
from benchmarks.desks import Desks, work
from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Sample, Target, figure, rate
from benchmarks.placing import ADD_MACHINES, ADD_WAITING, UNPLACED
from benchmarks.world import HISTORY, ORGANIZATION, Server, World, history, sample

RUNNING = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, started_at, reported_at)
SELECT gen_random_uuid(), $1, $2, 'running', 'any', now(), now() FROM generate_series(1, $3::int) RETURNING id::text
"""
WAITING = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane)
SELECT gen_random_uuid(), $1, $2, 'scheduling', 'any' FROM generate_series(1, $3::int) RETURNING id::text
"""


def creations(server: Server, pressure: Pressure, carried: bytes = b"{}") -> Sample:
    """New runs, all alike; afterwards none of them waits any more."""
    body = json.dumps(
        {"workflow_id": str(server.data.workflow), "input_values": {"customer": "Ada"}} | json.loads(carried)
    )
    head = server.head("POST", "/v1/runs", body=body.encode())
    seen = server.repeat(pressure, head, expect=201, body=body.encode())
    server.data.end_active()
    return seen


def reports(
    server: Server,
    pressure: Pressure,
    fields: dict[str, object],
    *,
    workflow: UUID | None = None,
    before: str = RUNNING,
) -> Sample:
    """One report for each of so many new runs, which `before` makes."""
    most = server.most(pressure)
    ids = [row["id"] for row in server.data.sql(before, ORGANIZATION, workflow or server.data.workflow, most)]
    server.data.sql("ANALYZE runs")
    body = json.dumps(fields).encode()
    seen = server.repeat(pressure, server.head("PATCH", "/v1/runs/{id}", body=body), body=body, ids=ids)
    if pressure.limit is None and len(server.sent) >= most:
        raise RuntimeError("The stock of runs was used up before the time was")
    server.data.end_active()
    return seen


def create(world: World, pressure: Pressure) -> Group:
    server = world.server_of(world.database("created", 10_000))
    return Group(
        "create",
        f"new runs, {pressure.connections} connections, in a queue that nobody works on",
        [
            Case("create", partial(creations, server, pressure)),
            Case("create+secret", partial(creations, server, pressure, SECRET_BODY), "with one secret"),
            Case("create+file", partial(creations, server, pressure, file_body(1024)), "with a file of 1 KB"),
            Case("retry", partial(server.retries, pressure)),
        ],
        [Target("create / retry", rate("create", "retry"))],
        beside="PostgreSQL, OpenBao (with a secret), load",
    )


def report(world: World, pressure: Pressure) -> Group:
    server = world.server_of(world.database("reported", 10_000))
    done = {"output_data": {"receipt": "R-1"}, "run_message_history": json.loads(history(HISTORY))}
    return Group(
        "report",
        f"reports of executors, {pressure.connections} connections; 4 KB of history with the outputs",
        [
            Case("running", partial(reports, server, pressure, {"status": "running"}, before=WAITING), "begins it"),
            Case(
                "progress", partial(reports, server, pressure, {"status": "running"} | done), "outputs, still running"
            ),
            Case("success", partial(reports, server, pressure, {"status": "success"} | done), "outputs, and it ends"),
            Case("retry", partial(server.retries, pressure)),
        ],
        [
            Target("success / retry", rate("success", "retry"), at_least=0.8),
            Target("running / retry", rate("running", "retry")),
        ],
    )


def cycle(world: World, pressure: Pressure) -> Group:
    data = world.database("cycled")
    server = world.server_of(data)
    data.sql(ADD_MACHINES, ORGANIZATION, max(0, pressure.connections - 10))
    machines = [row["id"] for row in data.sql("SELECT id::text FROM machines LIMIT $1", pressure.connections)]

    def cycles() -> Sample:
        data.sql(ADD_WAITING, ORGANIZATION, data.workflow, int(600 * (pressure.seconds + pressure.warmup)))
        data.sql("ANALYZE")
        server.call("PATCH", f"/v1/machines/{machines[0]}", {"name": "woken"})
        before = server.cpu()
        outcome = work(Desks(server.port, data.key, machines, pressure))
        drain = data.drain()
        app, postgres = (now - then for now, then in zip(server.cpu(), before, strict=True))
        if not data.sql(f"{UNPLACED} LIMIT 1"):
            raise RuntimeError("The waiting runs were used up before the time was")
        data.end_active()
        each = {"app us": app / outcome.sent * 1e6, "db us": postgres / outcome.sent * 1e6, "drain s": drain}
        return sample(outcome, each)

    return Group(
        "cycle",
        f"an executor's whole cycle, {len(machines)} machines: the next run by long poll, running, a file of 1 KB, success",
        [Case("cycle", cycles, "p50 and p99 from one run in hand to the next")],
        [Target("executors' use of a core", figure("cycle", "client busy"), at_most=0.8)],
        beside="PostgreSQL, executors, the placement itself",
    )
