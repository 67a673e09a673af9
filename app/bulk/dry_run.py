"""What a bulk retry would do, in sum: the choice of the job, and for each run the rules of its retry, on plain reads.

Nothing is written or locked. Quotas are not counted, as in the dry run of one retry.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import orjson

from app.access.auth import Principal
from app.bulk import choosing, jobs
from app.errors import Invalid, Refusal
from app.runs.dry_run import placement
from app.runs.retry_rules import Next, decide
from app.runs.retry_statements import READ
from app.scheduling.held import check_not_before
from app.scheduling.targets import check_targets
from app.schemas.bulk import BulkRetryCreate, BulkRetryOverrides
from app.schemas.runs import RunRetry
from app.services import Services
from app.stores.database import Connection, Record
from app.stores.statements import statement

SAMPLE = 100  # runs of each code that are named
READ_AT_ONCE = 500  # runs
LANES_AT_ONCE = 500  # lanes that one statement explains

# One run of each lane: all of a lane want the same.
PLACEMENT = statement(
    "bulk.placement",
    placement(
        """
        first.* FROM json_to_recordset(:lanes::json) AS first (
            id uuid, pinned_machine_id uuid, pool_ids uuid[], session_id uuid, lane text, queue_rank smallint)
        """
    ),
)


async def dry_run(services: Services, principal: Principal, options: BulkRetryCreate) -> dict[str, Any]:
    """What the bulk retry would do. Raises Invalid, MachineNotFound, PoolNotFound."""
    organization_id = principal.organization_id
    changes = jobs.changes(options.overrides or BulkRetryOverrides())
    async with services.database.transaction() as connection:
        await check_targets(connection, organization_id, changes)
        await check_not_before(connection, changes.not_before, ("body", "overrides", "not_before"))
        chosen = await choosing.choice(connection, organization_id, options)
        rows = await choosing.read(connection, chosen)
        if rows is None:
            raise await choosing.too_many(services.database, chosen)
        refused = [(row["run_id"], row["code"], row["detail"]) for row in rows if row["code"] is not None]
        lanes: dict[str, list[tuple[UUID, Next]]] = defaultdict(list)
        pending = [row for row in rows if row["code"] is None]
        for begin in range(0, len(pending), READ_AT_ONCE):
            for row, decided in await _decide(
                services, connection, organization_id, pending[begin : begin + READ_AT_ONCE], changes
            ):
                if isinstance(decided, Refusal):
                    refused.append((row["run_id"], decided.code, _sentence(decided)))
                else:
                    lanes[decided.lane].append((row["run_id"], decided))
        will_wait = await _will_wait(connection, organization_id, lanes)
    refusals = Counter(code for _, code, _ in refused)
    return {
        "total": len(rows),
        "would_retry": len(rows) - len(refused),
        "refusals": refusals,
        "will_wait": will_wait,
        "sample": _sample(refused),
    }


async def _decide(
    services: Services, connection: Connection, organization_id: str, rows: Sequence[Record], changes: RunRetry
) -> list[tuple[Record, Next | Refusal]]:
    """What the rules say of each of these runs."""
    found = await connection.fetch(
        READ,
        run_ids=[row["run_id"] for row in rows],
        organization_ids=[organization_id] * len(rows),
        session_ids=[None] * len(rows),
        not_befores=[changes.not_before] * len(rows),
    )
    runs = {run["place"]: run for run in found}
    decided: list[tuple[Record, Next | Refusal]] = []
    for place, row in enumerate(rows, start=1):
        verdict = decide(
            runs.get(place),
            changes,
            new_session_id=None,
            expected_attempt=row["attempt"],
            cooldown_seconds=services.settings.retry_cooldown_seconds,
        )
        following = None if verdict.refusals else verdict.following
        decided.append((row, verdict.refusals[0] if following is None else following))
    return decided


def _sentence(refusal: Refusal) -> str:
    return refusal.errors[0][1] if isinstance(refusal, Invalid) else refusal.detail


def _sample(refused: Iterable[tuple[UUID, str, str]]) -> list[dict[str, object]]:
    seen: Counter[str] = Counter()
    sample: list[dict[str, object]] = []
    for run_id, code, detail in refused:
        seen[code] += 1
        if seen[code] <= SAMPLE:
            sample.append({"run_id": str(run_id), "code": code, "detail": detail})
    return sample


async def _will_wait(
    connection: Connection, organization_id: str, lanes: dict[str, list[tuple[UUID, Next]]]
) -> Counter[str]:
    """How many runs could not start at once, by their reason. Machines that two lanes want count for both."""
    waiting: Counter[str] = Counter()
    first = [_place(*runs[0]) for runs in lanes.values()]
    for begin in range(0, len(first), LANES_AT_ONCE):
        part = orjson.dumps(
            first[begin : begin + LANES_AT_ONCE], default=str
        )  # the driver's UUIDs are of a class of their own
        for row in await connection.fetch(PLACEMENT, organization_id=organization_id, lanes=part):
            runs = lanes[row["lane"]]
            start, reason = _start(row, runs[0][1])
            if len(runs) > start:
                waiting[reason] += len(runs) - start
    return waiting


def _place(run_id: UUID, following: Next) -> dict[str, object]:
    return {
        "id": run_id,
        "pinned_machine_id": following.pinned_machine_id,
        "pool_ids": following.pool_ids,
        "session_id": following.session.id,
        "lane": following.lane,
        "queue_rank": following.queue_rank,
    }


def _start(lane: Record, following: Next) -> tuple[int, str]:
    """How many runs of a lane can start at once, and why the others wait."""
    if lane["reason"] in ("waiting_for_session", "not_before") or not lane["eligible_machines"]:
        return 0, lane["reason"]
    if following.session.id is not None:
        return 1, "waiting_for_session"
    return lane["eligible_machines"], "machine_busy" if following.pinned_machine_id else "waiting_for_machine"
