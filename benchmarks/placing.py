"""How soon a retried run has its machine, and how many runs are placed in a second."""

import asyncio
import time
from uuid import UUID, uuid4

import asyncpg

from app.config import Settings
from app.scheduling.placement import Left, place
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


def soon(server: Server, count: int = 200) -> Sample:
    """From the reply to a retry until its assignment can be read, one run after the other, each pinned to an idle machine."""
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
        placed, took = 0, []
        try:
            while placed < waiting:
                again = True
                while again:
                    began = time.perf_counter()
                    one = await place(database, organization)
                    took.append((time.perf_counter() - began) * 1000)
                    placed += len(one.placed)
                    again = one.left is Left.MORE
                await connection.execute(END_ASSIGNED)
        finally:
            await connection.close()
            database.close()
        return placed, sorted(took)

    placed, took = asyncio.run(measure())
    return Sample(placed / sum(took) * 1000, took[len(took) // 2], took[len(took) * 99 // 100])
