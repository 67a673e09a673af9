"""Retries that meet: by connections, beside a bare queue, without HTTP, and beside a quiet tenant."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from app.config import MIB
from benchmarks import direct, load
from benchmarks.carried import SECRET_BODY, file_body
from benchmarks.load import Plan, Pressure
from benchmarks.measure import Case, Group, Round, Sample, Target, p50, rate
from benchmarks.options import ask, new_key_of
from benchmarks.peer import FAILED, SCHEMA, Peer, install
from benchmarks.world import ORGANIZATION, RETRY_BODY, Data, World, cpu_seconds, run_id, sample

KEY = "Idempotency-Key: {id}"
DIRECT = 1_000  # runs of one call
ASKS = 200  # of the quiet tenant, 100 a second


def sets(world: World, pressure: Pressure) -> Group:
    server, bare = world.server, world.bare
    by_count = {count: replace(pressure, connections=count) for count in pressure.several}
    cases = [
        case
        for count, one in by_count.items()
        for case in (
            Case(f"retry {count}c", partial(server.retries, one)),
            Case(f"f {count}c", partial(bare.repeat, one, "POST", "/v1/runs/{id}/retry", body=RETRY_BODY), "bare"),
        )
    ]
    many = by_count[max(by_count)]
    wanted = {16: 0.30, 64: 0.36}
    return Group(
        "sets",
        "plain retries, by connections (c)",
        [
            *cases,
            Case("direct", partial(_direct, world), f"{DIRECT} runs by one call of retry_runs, no HTTP"),
            Case("retry+key", partial(server.retries, pressure, KEY), "with Idempotency-Key"),
            Case("retry", partial(server.retries, pressure), "without"),
            Case("quiet alone", partial(_quiet, world, None), "another tenant's GET /v1/whoami, 100 a second"),
            Case("quiet", partial(_quiet, world, many), f"beside {many.connections} connections that retry"),
        ],
        [
            *(
                Target(f"retry / f, {count} connections", rate(f"retry {count}c", f"f {count}c"), wanted.get(count))
                for count in by_count
            ),
            Target("direct / retry over HTTP", rate("direct", "retry"), at_least=3),
            Target("retry+key / retry", rate("retry+key", "retry"), at_least=0.92),
            Target("quiet tenant's p99, beside a noisy one / alone", _p99, at_most=2),
        ],
        beside="PostgreSQL, load; f: load alone",
    )


def _p99(one: Round) -> float:
    return one["quiet"].p99 / one["quiet alone"].p99


def _direct(world: World) -> Sample:
    data = world.small
    ids = [run_id(number) for number in data.stock(DIRECT + 1)[: DIRECT + 1]]
    files = world.folder / "direct"
    files.mkdir(exist_ok=True)
    before = cpu_seconds(world.postgres)
    outcome = direct.run(direct.Plan(world.settings(data, files), ORGANIZATION, ids, RETRY_BODY))
    data.used(len(ids))
    data.drain()
    app = outcome.client_busy * outcome.seconds / outcome.requests * 1e6
    return sample(outcome, {"app us": app, "db us": (cpu_seconds(world.postgres) - before) / outcome.sent * 1e6})


def _quiet(world: World, noisy: Pressure | None) -> Sample:
    server = world.server
    key = new_key_of(world.small, "quiet")
    if noisy is None:
        return ask(server, key, ASKS)
    with ThreadPoolExecutor(1) as pool:
        noise = pool.submit(server.retries, replace(noisy, seconds=ASKS / 100 + 0.5))
        seen = ask(server, key, ASKS)
        noise.result()
    return seen


def peer(world: World, pressure: Pressure) -> Group:
    install()
    world.small.sql("CREATE DATABASE peer")
    url = f"{world.postgres.url.rpartition('/')[0]}/peer"
    jobs = Data(url, url)
    jobs.script(SCHEMA.read_text(encoding="utf-8"))
    queue = world.start(Peer(world.folder, url))

    def retries(pressure: Pressure) -> Sample:
        ids = [str(row["id"]) for row in jobs.sql(FAILED, world.server.most(pressure) * 2)]
        jobs.sql("ANALYZE procrastinate_jobs")
        head = "\r\n".join(
            [
                "POST /jobs/{id}/retry HTTP/1.1",
                f"Host: 127.0.0.1:{queue.port}",
                f"Authorization: Bearer {queue.key}",
                "Content-Length: 0\r\n\r\n",
            ]
        )
        app, database = cpu_seconds(queue), cpu_seconds(world.postgres)
        outcome = load.run(Plan(queue.port, pressure, head, ids=ids))
        used = {"app us": cpu_seconds(queue) - app, "db us": cpu_seconds(world.postgres) - database}
        return sample(outcome, {name: seconds / outcome.sent * 1e6 for name, seconds in used.items()})

    return Group(
        "peer",
        f"against a bare queue's retry in place, behind FastAPI with a bearer key, {pressure.connections} connections",
        [
            Case("retry", partial(world.server.retries, pressure)),
            Case("queue", partial(retries, pressure), "Procrastinate's retry_job_by_id"),
        ],
        [Target("retry / queue", rate("retry", "queue"), at_least=2.2), Target("p50", p50("retry", "queue"))],
    )


def release(world: World, pressure: Pressure) -> Group:
    """What a row of the history has."""
    server = world.server
    one, many = replace(pressure, connections=1), replace(pressure, connections=64)
    large = Pressure(pressure.connections, seconds=60, warmup=0, limit=150)
    server.retries(replace(pressure, limit=20_000, seconds=60))  # a database that has been in use
    server.data.sql("ANALYZE")
    return Group(
        "release",
        f"what every release must keep, {pressure.connections} connections where none are named",
        [
            Case("retry", partial(server.retries, pressure)),
            Case("retry 1c", partial(server.retries, one)),
            Case("retry 64c", partial(server.retries, many)),
            Case("retry+key", partial(server.retries, pressure, KEY)),
            Case("secret", partial(server.retries, pressure, body=SECRET_BODY)),
            Case("1 MB file", partial(server.retries, large, body=file_body(MIB))),
        ],
    )
