"""What can be turned on: what it costs a plain retry, and what quotas keep from a quiet tenant."""

import http.client
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

from app.access.auth import digest, new_key
from benchmarks import load
from benchmarks.load import Plan, Pressure
from benchmarks.measure import Case, Group, Round, Sample, Target
from benchmarks.placing import END_WAITING
from benchmarks.world import Data, Server, World

FAR = 1_000_000_000  # a quota that is counted and never reached
MOST_RUNS = 10_000  # the same of quotas on runs

# Each set of settings has a server of its own, on one database.
OPTIONS: dict[str, dict[str, object]] = {
    "off": {"METRICS": "off"},
    "metrics": {},
    "key quotas": {
        "METRICS": "off",
        "QUOTA_KEY_REQUESTS_PER_MINUTE": FAR,
        "QUOTA_ORGANIZATION_REQUESTS_PER_MINUTE": FAR,
    },
    "all quotas": {
        "METRICS": "off",
        "QUOTA_KEY_REQUESTS_PER_MINUTE": FAR,
        "QUOTA_ORGANIZATION_REQUESTS_PER_MINUTE": FAR,
        "QUOTA_KEY_BYTES_IN_FLIGHT": FAR,
        "QUOTA_ORGANIZATION_BYTES_IN_FLIGHT": FAR,
        "QUOTA_KEY_LONG_POLLS": FAR,
        "QUOTA_ORGANIZATION_LONG_POLLS": FAR,
        "QUOTA_KEY_WAITING_RUNS": MOST_RUNS,
        "QUOTA_ORGANIZATION_WAITING_RUNS": MOST_RUNS,
        "QUOTA_KEY_RUNS_PER_MINUTE": MOST_RUNS,
        "QUOTA_ORGANIZATION_RUNS_PER_MINUTE": MOST_RUNS,
        "QUOTA_ADDRESS_FAILURES_PER_MINUTE": FAR,
    },
}


def options(world: World, pressure: Pressure) -> Group:
    """The database is one of its own: no more runs wait there than a quota allows."""
    data = world.database("options")

    def measure(server: Server) -> Sample:
        data.sql(END_WAITING)  # so that each measure finds as few waiting runs
        data.sql("VACUUM ANALYZE runs")
        return server.retries(pressure)

    servers = {name: world.server_of(data, settings=settings) for name, settings in OPTIONS.items()}
    return Group(
        "options",
        "a plain retry with what can be turned on, and without it",
        [Case(name, partial(measure, server)) for name, server in servers.items()],
        [
            Target(f"app us, {name} / off", partial(_cost, name), at_most=1.02 if name != "all quotas" else None)
            for name in OPTIONS
            if name != "off"
        ],
    )


def _cost(name: str, one: Round) -> float:
    return one[name].figures["app us"] / one["off"].figures["app us"]


# --- bursts -----------------------------------------------------------------------------------------------------------

REQUESTS, OF_ORGANIZATION, FAILURES = 600, 1200, 100  # a minute
ASKS, GAP_SECONDS = 300, 0.01  # of the quiet tenant


def bursts(world: World, pressure: Pressure) -> Group:
    """64 connections send as fast as they are answered, far beyond their quota, while a quiet tenant asks now and then."""
    data = world.database("bursts")
    settings = {
        "QUOTA_KEY_REQUESTS_PER_MINUTE": REQUESTS,
        "QUOTA_ORGANIZATION_REQUESTS_PER_MINUTE": OF_ORGANIZATION,
        "QUOTA_ADDRESS_FAILURES_PER_MINUTE": FAILURES,
    }
    server = world.server_of(data, settings=settings)
    many = replace(pressure, connections=64, warmup=0.5, seconds=ASKS * GAP_SECONDS)
    loud = {
        "one key": [new_key_of(data, "loud")],
        "an organization": [new_key_of(data, "crowd") for _ in range(50)],
        "an address": ["runs_" + "x" * 43],
    }

    # Known to be good before the first burst. A key for each measure: they have quotas, too.
    spare = [new_key_of(data, f"quiet-{number}") for number in range(40)]
    for key in (*spare, *loud["one key"], *loud["an organization"]):
        ask(server, key, 1)
    quiet = iter(spare)

    def beside(keys: Sequence[str]) -> Sample:
        for key in itertools.islice(
            itertools.cycle(keys), OF_ORGANIZATION + len(keys) if len(keys) > 1 else REQUESTS + 1
        ):
            server.call("GET", "/v1/whoami", key=key)
        head = server.head("GET", "/v1/whoami", key="{id}")
        plan = Plan(server.port, many, head, 429, ids=list(itertools.islice(itertools.cycle(keys), 200_000)))
        with ThreadPoolExecutor(1) as pool:
            burst = pool.submit(load.run, plan)
            time.sleep(0.5)
            seen = ask(server, next(quiet), ASKS)
            seen.figures["refused/s"] = burst.result().requests / many.seconds
        return seen

    return Group(
        "bursts",
        "a quiet tenant's GET /v1/whoami, 100 a second, beside bursts beyond a quota",
        [
            Case("alone", lambda: ask(server, next(quiet), ASKS)),
            *(Case(name, partial(beside, keys)) for name, keys in loud.items()),
        ],
        [Target(f"p99, {name} / alone", partial(_p99, name)) for name in loud],
    )


def _p99(name: str, one: Round) -> float:
    return one[name].p99 / one["alone"].p99


def new_key_of(data: Data, organization: str) -> str:
    """An API key of this organization."""
    key = new_key()
    data.sql(
        "INSERT INTO api_keys (id, organization_id, key_hash) VALUES (gen_random_uuid(), $1, $2)",
        organization,
        digest(key.encode()),
    )
    return key


def ask(server: Server, key: str, count: int) -> Sample:
    """A tenant asks who it is, about 100 times a second."""
    took = []
    began = time.perf_counter()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        for _ in range(count):
            sent = time.perf_counter()
            connection.request("GET", "/v1/whoami", headers={"Authorization": f"Bearer {key}"})
            reply = connection.getresponse()
            reply.read()
            if reply.status != 200:
                raise RuntimeError(f"The quiet tenant was answered {reply.status}")
            took.append((time.perf_counter() - sent) * 1000)
            time.sleep(GAP_SECONDS)
    took.sort()
    return Sample(count / (time.perf_counter() - began), took[len(took) // 2], took[len(took) * 99 // 100])
