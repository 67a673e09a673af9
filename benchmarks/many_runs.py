"""Many runs at once: bulk retries against retries over HTTP, what others notice of one, lists by change, and search."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Sample, Target, p50, rate
from benchmarks.options import new_key_of
from benchmarks.world import Data, Server, World, run_id

RUNS = 10_000  # of one job
LOOK_SECONDS = 0.05
PATIENCE_SECONDS = 300

CROWD = "crowd"
FAILED = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, ended_at)
SELECT gen_random_uuid(), $1, $2, 'error', 'any', now() FROM generate_series(1, $3::int)
"""
NEEDLE = "needle-in-the-haystack"


def many_runs(world: World, pressure: Pressure) -> Group:
    data = world.database("many")
    server, million = world.server_of(data), world.server_of(world.million)
    key = new_key_of(data, CROWD)
    one = replace(pressure, connections=1, limit=400)
    few = replace(pressure, connections=1, seconds=min(pressure.seconds, 1.0))
    world.million.sql(
        "UPDATE runs SET input_values = json_build_object('note', $1::text)"
        " WHERE id = (SELECT id FROM runs ORDER BY created_at DESC, id DESC OFFSET 9000 LIMIT 1)",
        NEEDLE,
    )

    def page(query: str) -> Sample:
        return million.repeat(few, million.head("GET", f"/v1/runs?limit=100{query}"))

    return Group(
        "many",
        f"bulk retries of {RUNS} runs, and lists of 1,000,000",
        [
            Case("retry", partial(server.retries, pressure), "over HTTP"),
            Case("job", partial(_job, server, data), f"a bulk retry of {RUNS} such runs"),
            Case("retry alone", partial(server.retries, one), "one connection"),
            Case(
                "retry beside", partial(_beside, server, data, key, one), "the same beside another organization's job"
            ),
            Case("by creation", partial(page, "&status=success"), "a page of 100 of 1,000,000"),
            Case("by change", partial(page, "&status=success&order=changed")),
            Case("search", partial(page, f"&search={NEEDLE}"), "a text in one of the newest 10,000"),
        ],
        [
            Target("job / retry over HTTP", rate("job", "retry"), at_least=3),
            Target(
                "retry's p99, beside a job / alone",
                lambda seen: seen["retry beside"].p99 / seen["retry alone"].p99,
                at_most=2,
            ),
            Target("p50, by change / by creation", p50("by change", "by creation"), at_most=1.5),
            Target("search: p50 ms", lambda seen: seen["search"].p50, at_most=300),
        ],
    )


def _start(server: Server, body: dict[str, Any], key: str | None = None) -> str:
    status, job = server.call("POST", "/v1/bulk-retries", body, key=key)
    if status != 202:
        raise RuntimeError(f"The bulk retry answered {status}: {job}")
    return str(job["id"])


def _job(server: Server, data: Data) -> Sample:
    """From the request to the last run's retry."""
    ids = [run_id(number) for number in data.stock(RUNS)[:RUNS]]
    app, database = server.cpu()
    began = time.perf_counter()
    job_id = _start(server, {"run_ids": ids})
    while (job := server.get(f"/v1/bulk-retries/{job_id}"))["state"] == "running":
        if time.perf_counter() - began > PATIENCE_SECONDS:
            raise TimeoutError(f"The bulk retry took too long: {job}")
        time.sleep(LOOK_SECONDS)
    seconds = time.perf_counter() - began
    if job["retried"] != RUNS:
        raise RuntimeError(f"Not all were retried: {job}")
    data.used(RUNS)
    data.drain()
    used = [after - before for after, before in zip(server.cpu(), (app, database), strict=True)]
    cost = {name: cpu / RUNS * 1e6 for name, cpu in zip(("app us", "db us"), used, strict=True)}
    return Sample(RUNS / seconds, seconds * 1000, seconds * 1000, cost)


def _beside(server: Server, data: Data, key: str, one: Pressure) -> Sample:
    """Plain retries while another organization's job runs all the time."""
    [row] = data.sql(
        "INSERT INTO workflows (id, organization_id, main_prompt) VALUES (gen_random_uuid(), $1, 'Do it.') RETURNING id",
        CROWD,
    )
    data.sql(FAILED, CROWD, row["id"], RUNS)
    data.stock(server.most(one))
    job_id = _start(server, {"filter": {"workflow_id": str(row["id"])}}, key)
    seen = server.retries(one)
    status, job = server.call("POST", f"/v1/bulk-retries/{job_id}/abort", key=key)
    if status != 200 or job["state"] != "aborted":
        raise RuntimeError(f"The job was over before the retries were: {job}")
    data.sql("UPDATE runs SET status = 'cancelled', ended_at = now() WHERE organization_id = $1", CROWD)
    return seen
