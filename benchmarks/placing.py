"""How soon a retried run has its machine, and how many runs are placed in a second."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID, uuid4

import asyncpg

from app.access.auth import digest, new_key
from app.config import Settings
from app.scheduling.placement import Left, place
from app.scheduling.rounds import ALL_SLICES
from app.stores.database import Database
from benchmarks.measure import Sample
from benchmarks.world import ORGANIZATION, Data, Server, run_id

ADD_MACHINES = """
INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id)
SELECT gen_random_uuid(), $1, n, 'key' FROM generate_series(1, $2::int) AS n
"""

ADD_WAITING = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane)
SELECT gen_random_uuid(), $1, $2, 'scheduling', 'any' FROM generate_series(1, $3::int)
"""

END_ASSIGNED = """
UPDATE runs SET status = 'cancelled', ended_at = now() WHERE status = 'scheduling' AND assigned_machine_id IS NOT NULL
"""


# The same without any placement: both are ended, so that both pay for it.
END_WAITING = """
UPDATE runs SET status = 'cancelled', ended_at = now() WHERE status = 'scheduling' AND assigned_machine_id IS NULL
"""

# Fewer than one pass looks at, and many more than are taken between two endings.
IDLE = 900
ENDING_SECONDS = 0.05

# Whatever still waits for a machine.
UNPLACED = "SELECT FROM runs WHERE status = 'scheduling' AND assigned_machine_id IS NULL"


@contextmanager
def ending(data: Data, sql: str) -> Iterator[None]:
    """Meanwhile runs are ended by this, all the time: their machines stay idle, however fast the service is."""
    stop = threading.Event()

    async def end() -> None:
        connection = await asyncpg.connect(data.url, timeout=10)
        try:
            while not stop.is_set():
                await connection.execute(sql)
                await asyncio.sleep(ENDING_SECONDS)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(asyncio.run, end())
        try:
            yield
        finally:
            stop.set()
            done.result()


def soon(server: Server, count: int = 200, before: Callable[[], object] | None = None) -> Sample:
    """From the reply to a retry until its assignment can be read, one run after the other, each pinned to an idle machine.

    `before` is called before each of them.
    """
    data = server.data
    machine_id = uuid4()
    data.sql(
        "INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id) VALUES ($1, $2, 'one', 'key')",
        machine_id,
        ORGANIZATION,
    )
    numbers = data.stock(count)[:count]
    data.used(count)

    async def measure() -> list[float]:
        connection = await asyncpg.connect(data.url, timeout=10)
        took = []
        try:
            for number in numbers:
                run = run_id(number)
                if before is not None:
                    await asyncio.to_thread(before)
                call = (f"/v1/runs/{run}/retry", {"machine_id": str(machine_id)})
                status, reply = await asyncio.to_thread(server.call, "POST", *call)
                began = time.perf_counter()
                if status != 200:
                    raise RuntimeError(f"A retry answered {status}: {reply}")
                while (
                    await connection.fetchval("SELECT assigned_machine_id FROM runs WHERE id = $1", UUID(run)) is None
                ):
                    if time.perf_counter() - began > 10:
                        raise TimeoutError("A retried run got no machine")
                took.append((time.perf_counter() - began) * 1000)
                await connection.execute(END_ASSIGNED + " AND assigned_machine_id = $1", machine_id)
        finally:
            await connection.close()
        return sorted(took)

    took = asyncio.run(measure())
    data.sql("UPDATE machines SET is_available = false WHERE id = $1", machine_id)
    return Sample(1000 / took[len(took) // 2], took[len(took) // 2], took[len(took) * 99 // 100])


def many(data: Data, settings: Settings, waiting: int = 10_000, machines: int = 1000) -> Sample:
    """Passes over so many waiting runs until all are placed; assignments in a second, and how long a pass takes."""
    organization = f"queue-{uuid4()}"
    data.sql(ADD_MACHINES, organization, machines)
    data.sql(ADD_WAITING, organization, data.workflow, waiting)
    data.sql("ANALYZE")

    async def measure() -> tuple[int, list[float]]:
        database = Database(settings)
        connection = await asyncpg.connect(data.url, timeout=10)
        placed, slices, took = 0, 1, []
        try:
            while placed < waiting:
                before, again = placed, True
                while again:
                    began = time.perf_counter()
                    one = await place(database, organization, slices=slices)
                    took.append((time.perf_counter() - began) * 1000)
                    placed += len(one.placed)
                    if one.left is Left.LARGE:
                        slices = ALL_SLICES  # as the service goes on then
                    again = one.left in (Left.MORE, Left.LARGE)
                if placed == before:
                    raise RuntimeError("Nothing was placed though machines are idle")
                await connection.execute(END_ASSIGNED)
        finally:
            await connection.close()
            database.close()
        return placed, sorted(took)

    placed, took = asyncio.run(measure())
    return Sample(placed / sum(took) * 1000, took[len(took) // 2], took[len(took) * 99 // 100])


# $1 other organizations, each with two idle machines, one that is offline, and two runs that cannot be placed: one wants a pool
# that has no machine, the other starts a session on the machine that is offline.
CROWD = """
WITH organizations AS (
    SELECT 'crowd-' || n AS organization_id, md5('crowd' || n)::uuid AS id FROM generate_series(1, $1::int) AS n
), workflow AS (
    INSERT INTO workflows (id, organization_id, main_prompt) SELECT id, organization_id, 'Do it.' FROM organizations
), pool AS (
    INSERT INTO pools (id, organization_id, name) SELECT id, organization_id, 'empty' FROM organizations
)
INSERT INTO machines (id, organization_id, fingerprint, unkey_key_id, status)
SELECT md5(organization_id || n)::uuid, organization_id, n, 'key', CASE n WHEN 3 THEN 'disconnected' ELSE 'connected' END
FROM organizations, generate_series(1, 3) AS n
"""
CROWD_WAITING = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, pool_ids, session_id, pinned_machine_id)
SELECT gen_random_uuid(), organization_id, id, 'scheduling', wish.* FROM workflows, LATERAL (
    VALUES ('pools:' || id, ARRAY[id], NULL::uuid, NULL::uuid),
           ('session:' || id, NULL, id, md5(organization_id || 3)::uuid)
) AS wish WHERE organization_id LIKE 'crowd-%'
"""

# One organization with $2 waiting runs in $3 lanes, each for a pool without machines, and 200 machines that suit none of them.
LANES = """
INSERT INTO runs (id, organization_id, workflow_id, status, lane, pool_ids, queued_at)
SELECT gen_random_uuid(), 'lanes', $1, 'scheduling', 'pools:' || n % $3::int, ARRAY[md5((n % $3)::text)::uuid],
       now() + n * interval '1 us'
FROM generate_series(1, $2::int) AS n
"""


def add_crowd(data: Data, organizations: int) -> None:
    data.sql(CROWD, organizations)
    data.sql(CROWD_WAITING)
    data.sql("VACUUM ANALYZE")


def add_lanes(data: Data, runs: int = 120_000, lanes: int = 600) -> tuple[str, str]:
    """The key of their organization, and one of its machines."""
    key = new_key()
    data.sql(
        "INSERT INTO api_keys (id, organization_id, key_hash) VALUES (gen_random_uuid(), 'lanes', $1)",
        digest(key.encode()),
    )
    data.sql(ADD_MACHINES, "lanes", 200)
    data.sql(LANES, data.workflow, runs, lanes)
    data.sql("VACUUM ANALYZE")
    [row] = data.sql("SELECT id::text FROM machines WHERE organization_id = 'lanes' LIMIT 1")
    return key, row["id"]


def idle(server: Server, seconds: float = 20) -> Sample:
    """What a server costs that nobody asks for anything, in percent of a core."""
    before = server.cpu()
    time.sleep(seconds)
    app, postgres = (100 * (now - then) / seconds for now, then in zip(server.cpu(), before, strict=True))
    return Sample(0, 0, 0, {"app %": app, "postgres %": postgres})
