"""What is measured, group by group. Cases of one group take turns; targets are ratios within a round."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from uuid import UUID, uuid4

from app.config import MIB, Settings
from benchmarks import plans
from benchmarks.carried import files, secret
from benchmarks.handoff import handoff
from benchmarks.life import create, cycle, report, reports
from benchmarks.load import Pressure
from benchmarks.many_runs import many_runs
from benchmarks.measure import Case, Group, Sample, Target, figure, p50, rate
from benchmarks.options import bursts, options
from benchmarks.pgbench import SixStatements
from benchmarks.placing import (
    ADD_MACHINES,
    END_ASSIGNED,
    END_WAITING,
    IDLE,
    UNPLACED,
    add_crowd,
    add_lanes,
    ending,
    idle,
    many,
    soon,
)
from benchmarks.sets import peer, release, sets
from benchmarks.statements import statements
from benchmarks.sustained import sustained
from benchmarks.world import ORGANIZATION, RETRY_BODY, Server, Unplaced, World, run_id
from benchmarks.world import history as history_of

# Without the wide columns: what a user interface asks for.
SOME_FIELDS = "fields=id,workflow_id,machine_id,status,created_at,attempt,error,started_at,ended_at"


def retry(world: World, pressure: Pressure) -> Group:
    server, bare = world.server, world.bare
    clients = pressure.connections
    six = SixStatements(world.postgres, world.small, world.folder)
    return Group(
        "retry",
        f"without files and secrets, {clients} connections, one worker",
        [
            Case("retry", partial(server.retries, pressure)),
            Case("f", partial(bare.repeat, pressure, "POST", "/v1/runs/{id}/retry", body=RETRY_BODY), "bare FastAPI"),
            Case("g", partial(six.on_plain_tables, clients, 8000 // clients), "pgbench, plain tables"),
            Case("g own", partial(six.on_own_tables, clients, 4800 // clients), "pgbench, the service's tables"),
            Case("retry+key", partial(server.retries, pressure, "Idempotency-Key: {id}"), "with Idempotency-Key"),
        ],
        [
            Target("retry / f", rate("retry", "f"), at_least=0.30, beside="PostgreSQL, load; f: load alone"),
            Target("retry / g", rate("retry", "g"), at_least=0.25, beside="PostgreSQL, load; g: pgbench with its load"),
            Target("retry / g own", rate("retry", "g own")),
            Target("retry+key / retry", rate("retry+key", "retry"), at_least=0.92),
            Target("retry: p99 / p50", lambda one: one["retry"].p99 / one["retry"].p50, at_most=5),
            Target("load generator's use of a core at f", figure("f", "client busy"), at_most=0.8),
        ],
        rounds=5,
    )


def scale(world: World, pressure: Pressure) -> Group:
    one, two = world.server, world.server_of(world.small, workers=2)
    cases = [
        Case(f"{workers}w {connections}c", partial(server.retries, replace(pressure, connections=connections)))
        for workers, server, several in ((1, one, (1, 16, 64)), (2, two, (16, 64)))
        for connections in several
    ]
    return Group(
        "scale",
        "retry by workers (w) and connections (c)",
        cases,
        [
            Target("64 / 16 connections, one worker", rate("1w 64c", "1w 16c")),
            Target("2 / 1 workers, 16 connections", rate("2w 16c", "1w 16c")),
            Target("2 / 1 workers, 64 connections", rate("2w 64c", "1w 64c")),
        ],
    )


def placement(world: World, pressure: Pressure) -> Group:
    """Each retry on `placing` gets a machine, which is idle again soon after. `unplaced` is the same without any placement."""
    placing, unplaced = world.database("placed"), world.database("unplaced")
    queue = world.database("queue")
    idle = world.server_of(world.database("idle"))  # no run waits there that could take the machine first
    settings = Settings.model_validate(
        {name.lower(): value for name, value in world.settings(queue, world.folder).items()}
    )
    one, other = world.server_of(placing), world.server_of(unplaced, program=Unplaced)

    for data in (placing, unplaced):
        data.sql(ADD_MACHINES, ORGANIZATION, IDLE)

    def retries(server: Server, end: str, drained: str = "") -> Sample:
        data = server.data
        data.end_active()
        data.sql("VACUUM ANALYZE runs")
        with ending(data, end):
            seen = server.retries(pressure, drained=drained)
        found = "SELECT count(*) FROM runs WHERE id = ANY($1::uuid[]) AND assignment > 0"
        seen.figures["placed %"] = 100 * data.sql(found, list(server.sent))[0]["count"] / len(server.sent)
        return seen

    return Group(
        "placement",
        "from a retry to its machine, and what it costs",
        [
            Case("soon", partial(soon, idle), "one at a time, from the reply to the assignment"),
            Case("many", partial(many, queue, settings), "10,000 waiting, 1,000 machines; p50 and p99 of a pass"),
            Case("placing", partial(retries, one, END_ASSIGNED, UNPLACED), "retries, machines idle throughout"),
            Case("unplaced", partial(retries, other, END_WAITING), "retries, placement turned off"),
        ],
        [
            Target("placing / unplaced", rate("placing", "unplaced"), at_least=0.9),
            Target("placing: percent that got a machine", figure("placing", "placed %"), at_least=100),
            Target(
                "db us, placing / unplaced",
                lambda one: one["placing"].figures["db us"] / one["unplaced"].figures["db us"],
            ),
        ],
        beside="PostgreSQL, load, what ends runs, the placement",
    )


def tenants(world: World, pressure: Pressure) -> Group:
    """Whether anybody's retry waits for what other organizations have waiting."""
    crowd, lanes = world.database("crowd"), world.database("lanes")
    add_crowd(crowd, 10_000)
    key, machine_id = add_lanes(lanes)
    among, beside = world.server_of(crowd), world.server_of(lanes)

    def wake() -> None:
        """A pass over them begins, in which nothing can be placed."""
        status, _ = beside.call("PATCH", f"/v1/machines/{machine_id}", {"name": "woken"}, key=key)
        if status != 200:
            raise RuntimeError(f"A machine's PATCH answered {status}")

    return Group(
        "tenants",
        "from a retry to its machine, among many organizations",
        [
            Case("idle", partial(idle, among), "10,000 others whose runs cannot be placed, nothing asked for"),
            Case("among 10,000", partial(soon, among, 50), "a retry there"),
            Case(
                "beside 120,000",
                partial(soon, beside, 50, wake),
                "a retry beside passes over 120,000 runs in 600 lanes",
            ),
        ],
        [
            Target("idle: percent of a core, app", figure("idle", "app %"), at_most=2),
            Target("idle: percent of a core, PostgreSQL", figure("idle", "postgres %")),
            Target("among 10,000: p50 ms", lambda one: one["among 10,000"].p50, at_most=100),
            Target("beside 120,000: p50 ms", lambda one: one["beside 120,000"].p50, at_most=100),
        ],
    )


def size(world: World, pressure: Pressure) -> Group:
    small, million = world.server, world.server_of(world.million)
    few = replace(pressure, connections=1)
    return Group(
        "size",
        "retry with 10,000 and with 1,000,000 runs in the table",
        [
            Case("10k", partial(small.retries, pressure)),
            Case("1M", partial(million.retries, pressure)),
            Case("10k 1c", partial(small.retries, few), "one connection"),
            Case("1M 1c", partial(million.retries, few), "one connection"),
        ],
        [
            Target("p50, 1M / 10k", p50("1M", "10k"), at_most=1.2),
            Target("p50, 1M / 10k, one connection", p50("1M 1c", "10k 1c"), at_most=1.2),
        ],
    )


def history(world: World, pressure: Pressure) -> Group:
    fixed = Pressure(min(pressure.connections, 4), seconds=60, warmup=0, limit=200)
    server = world.server
    return Group(
        "history",
        f"retry of runs with short and long histories (random text: the worst case), {fixed.connections} connections",
        [
            Case("1 KB", partial(server.retries, fixed, history_bytes=1024)),
            Case("1 MB", partial(server.retries, fixed, history_bytes=MIB)),
        ],
        [Target("p50, 1 MB / 1 KB", p50("1 MB", "1 KB"), at_most=1.5)],
    )


def webhooks(world: World, pressure: Pressure) -> Group:
    """A workflow that wants messages and one that does not, beside each other. The messages are sent meanwhile."""
    data = world.database("webhooks")
    server = world.server_of(data)
    few = Pressure(min(pressure.connections, 4), seconds=60, warmup=0, limit=150)
    unwanted = uuid4()
    data.sql(
        "INSERT INTO workflows (id, organization_id, main_prompt) VALUES ($1, $2, 'Do it.')", unwanted, ORGANIZATION
    )
    data.sql("UPDATE workflows SET is_webhooks_enabled = true WHERE id = $1", data.workflow)
    receiver = f"http://127.0.0.1:{world.bare.port}/v1/runs/{uuid4()}/retry"  # it answers 200 to any object
    status, _ = server.call("POST", "/v1/webhook-endpoints", {"url": receiver})
    if status != 201:
        raise RuntimeError(f"The endpoint's creation answered {status}")

    def end(workflow: UUID, history_bytes: int) -> Sample:
        messages = json.loads(history_of(history_bytes))
        return reports(server, few, {"status": "success", "run_message_history": messages}, workflow=workflow)

    sizes = {"1 KB": 1024, "100 KB": 100 * 1024, "1 MB": MIB}
    return Group(
        "webhooks",
        f"a report that ends a run, by its history (random text), with a webhook and without, {few.connections} connections",
        [
            Case(f"{size} {what}", partial(end, workflow, length))
            for size, length in sizes.items()
            for what, workflow in (("without", unwanted), ("with", data.workflow))
        ],
        [
            Target(f"p50, {size}, with / without", p50(f"{size} with", f"{size} without"), at_most=most)
            for size, most in (("1 KB", None), ("100 KB", None), ("1 MB", 1.2))
        ],
    )


def refused(world: World, pressure: Pressure) -> Group:
    server = world.server
    [number] = world.small.stock(1)[:1]
    world.small.used(1)
    path = f"/v1/runs/{run_id(number)}/retry"
    server.call("POST", path, {})  # from now on it is not terminal

    def post(path: str, expect: int, *, body: bytes = RETRY_BODY, key: str | None = None) -> Callable[[], Sample]:
        head = server.head("POST", path, body=body, key=key)
        return partial(server.repeat, pressure, head, expect=expect, body=body)

    unknown = "rk_" + "x" * 43
    cases = [
        Case("retry", partial(server.retries, pressure)),
        Case("401", post(path, 401, body=b"", key=unknown), "unknown key, no body"),
        Case("401+body", post(path, 401, key=unknown), "the server closes: each request is a new connection"),
        Case("404", post(f"/v1/runs/{uuid4()}/retry", 404)),
        Case("409", post(path, 409), "run is not terminal"),
        Case("422", post(path, 422, body=b'{"file_inputs": [{"filename": "a", "content": "?"}]}'), "bad base64"),
    ]
    return Group(
        "refused",
        "refusals must be cheaper than what they refuse",
        cases,
        [Target(f"{case.name} / retry", rate(case.name, "retry"), at_least=1) for case in cases[1:]],
    )


def frozen(world: World, pressure: Pressure) -> Group:
    server = world.server

    def without_vault() -> Sample:
        world.bao.freeze()
        try:
            return server.retries(pressure)
        finally:
            world.bao.thaw()

    return Group(
        "frozen",
        "retry without secrets while OpenBao is frozen",
        [Case("answering", partial(server.retries, pressure)), Case("frozen", without_vault)],
        [
            Target("p50, frozen / answering", p50("frozen", "answering"), at_most=1.15),
            Target("frozen / answering", rate("frozen", "answering")),
        ],
    )


def lists(world: World, pressure: Pressure) -> Group:
    # Nothing else runs there: retries make the counts of a page dear until autovacuum has been by.
    small = world.server_of(world.database("listed", 10_000))
    bare, million = world.bare, world.server_of(world.million)
    page = "/v1/runs?limit=100"
    [newest] = small.get("/v1/runs?limit=1")["items"]
    [newest_of_million] = million.get("/v1/runs?limit=1")["items"]
    return Group(
        "lists",
        "a page of 100 runs without history, and one run",
        [
            Case("page f", partial(bare.repeat, pressure, "GET", page), "bare FastAPI, an equal page"),
            Case("page", partial(small.repeat, pressure, small.head("GET", page)), "10,000 runs"),
            Case("page fields", partial(small.repeat, pressure, small.head("GET", f"{page}&{SOME_FIELDS}"))),
            Case("page 1M", partial(million.repeat, pressure, million.head("GET", page)), "1,000,000 runs"),
            Case("run f", partial(bare.repeat, pressure, "GET", "/v1/runs/{id}"), "bare FastAPI"),
            Case("run", partial(small.repeat, pressure, small.head("GET", f"/v1/runs/{newest['id']}"))),
            Case(
                "run 1M", partial(million.repeat, pressure, million.head("GET", f"/v1/runs/{newest_of_million['id']}"))
            ),
        ],
        [
            Target("page / page f", rate("page", "page f"), at_least=0.3),
            Target("page 1M / page f", rate("page 1M", "page f"), at_least=0.25),
            Target("page fields / page", rate("page fields", "page")),
            Target("run / run f", rate("run", "run f"), at_least=0.3),
            Target("run 1M / run", rate("run 1M", "run"), at_least=0.8),
        ],
        beside="PostgreSQL, load; f: load alone",
    )


def pages(world: World, pressure: Pressure) -> Group:
    """Where a list's time goes when the table is large."""
    server = world.server_of(world.million)
    data = world.million
    few = replace(pressure, connections=1, seconds=min(pressure.seconds, 1.0))
    deep = server.get("/v1/runs?limit=1&skip=899999").get("next", "")  # an older version has none

    def get(query: str) -> Callable[[], Sample]:
        return partial(server.repeat, few, server.head("GET", f"/v1/runs?limit=100{query}"))

    def total() -> Sample:
        took = sorted(data.timed("SELECT count(*) FROM runs r WHERE r.organization_id = $1", ORGANIZATION, times=10))
        return Sample(1 / took[5], took[5] * 1000, took[-1] * 1000)

    return Group(
        "pages",
        "pages of 100 of 1,000,000 runs, one connection",
        [
            Case("total", total, "the count alone"),
            *(Case(f"skip {skip:,}", get(f"&skip={skip}")) for skip in (0, 10_000, 100_000, 900_000)),
            Case("after 900,000", get(f"&after={deep}"), "the page that skip finds there, by its cursor"),
            Case("status, few", get("&status=scheduling"), "a filter with few runs"),
            Case("status, most", get("&status=success"), "a filter with most runs"),
            Case("fields", get(f"&{SOME_FIELDS}")),
        ],
        [
            Target("p50, skip 900,000 / skip 0", p50("skip 900,000", "skip 0")),
            Target("p50, after 900,000 / skip 0", p50("after 900,000", "skip 0"), at_most=1.2),
            Target("p50, total / skip 0", p50("total", "skip 0")),
        ],
        appendix=partial(plans.of_million, data),
    )


def big_histories(world: World, pressure: Pressure) -> Group:
    """After `pages`: it makes the newest runs wide."""
    server, data = world.server_of(world.million), world.million
    newest = server.get("/v1/runs?limit=1")["items"][0]["id"]
    before = partial(server.repeat, pressure, server.head("GET", f"/v1/runs?limit=100&skip=100&{SOME_FIELDS}"))
    wide = partial(server.repeat, pressure, server.head("GET", f"/v1/runs?limit=100&{SOME_FIELDS}"))
    data.widen(100, MIB)
    return Group(
        "wide",
        "a page of 100 runs with and without histories of 1 MB, by `fields=`, which leaves the history out",
        [
            Case("narrow", before),
            Case("wide", wide),
            Case(
                "run",
                partial(server.repeat, replace(pressure, connections=1), server.head("GET", f"/v1/runs/{newest}")),
            ),
        ],
        [Target("p50, wide / narrow", p50("wide", "narrow"), at_most=1.2)],
    )


GROUPS: dict[str, Callable[[World, Pressure], Group]] = {
    "retry": retry,
    "sets": sets,
    "peer": peer,
    "release": release,
    "statements": statements,
    "scale": scale,
    "create": create,
    "report": report,
    "cycle": cycle,
    "placement": placement,
    "tenants": tenants,
    "history": history,
    "webhooks": webhooks,
    "secret": secret,
    "files": files,
    "refused": refused,
    "options": options,
    "bursts": bursts,
    "frozen": frozen,
    "size": size,
    "lists": lists,
    "pages": pages,
    "wide": big_histories,
    "many": many_runs,
    "handoff": handoff,
    "sustained": sustained,
}

# Not part of a run of everything, which would take several minutes longer.
LONG = ("release", "sustained")
