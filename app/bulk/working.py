"""The work on bulk retries: set after set, organizations in turns, until every run was retried or skipped.

A set is one transaction. It locks the row of the job, and this lock is the lease: a replica that is killed loses the lock with
its connection, and another replica goes on. The transaction switches the runs and decides their items, so no run is retried
without a decided item. Each item knows the attempt that it was chosen with: a run at another attempt is skipped.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from app.access.auth import Actor, Principal
from app.bulk import jobs
from app.errors import InternalError, Invalid, QuotaExceeded, Refusal, Unavailable
from app.idempotency import Reply
from app.runs.retry import Outcome, Retry, retry_runs
from app.schemas.bulk import BulkRetryOverrides
from app.services import Services
from app.stores.database import Connection, Database, Record
from app.stores.statements import statement
from app.telemetry import metrics

log = logging.getLogger("app.bulk")

SET = 64  # runs in one transaction
SET_BYTES = 1024 * 1024  # bytes of new input values of all runs of a set
TURNS = 16  # in one round of the loop
PACED_SECONDS = 0.25  # seconds of a job's pace that one set may take
LOOK_AGAIN_SECONDS = 1.0  # at what a job waits for
BUSY_SECONDS = 0.1  # before runs are tried again that others hold

# --- the statements ---------------------------------------------------------------------------------------------------

# The organization that had no turn for the longest time, and of its jobs the same.
TAKE_JOB = statement(
    "bulk.claim",
    """
    SELECT b.id, b.organization_id, b.key_id, b.user_id, b.request_id, b.traceparent, b.reason, b.overrides, b.pace_per_second,
           b.first, b.is_first_over, b.stop_after_failures, b.failures_forgiven, b.retried,
           (SELECT true FROM api_keys k WHERE k.id = b.key_id AND k.revoked_at IS NULL
                AND (k.expires_at IS NULL OR k.expires_at > now()) LIMIT 1) IS NOT NULL AS key_is_valid
    FROM bulk_retries b
    WHERE b.state = 'running' AND b.due_at <= clock_timestamp()
    ORDER BY (SELECT max(o.moved_at) FROM bulk_retries o
              WHERE o.organization_id = b.organization_id AND o.state IN ('running', 'paused')), b.moved_at
    LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED
    """,
)

NEXT_DUE = statement(
    "bulk.next_due",
    "SELECT extract(epoch FROM min(due_at) - clock_timestamp())::float8 FROM bulk_retries WHERE state = 'running'",
)

# After the lock, by a statement of its own: it sees what the replica before has committed. The order has the outcome, and no
# condition says that it is one: so only the index by outcome serves it, and never the primary key, by which every set would
# read all items that were decided before it.
TAKE = statement(
    "bulk.take",
    """
    SELECT place, run_id, attempt FROM bulk_retry_items
    WHERE bulk_retry_id = :bulk_retry_id AND outcome BETWEEN 'pending' AND 'pending' ORDER BY outcome, place LIMIT :most
    """,
)

# Only the replica that has locked the job changes its items.
DECIDE = statement(
    "bulk.decide",
    """
    UPDATE bulk_retry_items
    SET outcome = (:outcomes::text[])[array_position(:places::integer[], place)],
        code = (:codes::text[])[array_position(:places::integer[], place)],
        detail = (:details::text[])[array_position(:places::integer[], place)],
        decided_at = clock_timestamp()
    WHERE ctid = ANY (ARRAY(
        SELECT item.tid FROM unnest(:places::integer[]) AS decided (place), LATERAL (
            SELECT ctid AS tid FROM bulk_retry_items WHERE bulk_retry_id = :bulk_retry_id AND place = decided.place OFFSET 0
        ) AS item
    ))
    """,
)

# A job that was behind its pace catches up at most a second of it.
MOVE = statement(
    "bulk.move",
    """
    UPDATE bulk_retries
    SET retried = retried + :retried, skipped = skipped + :skipped, moved_at = clock_timestamp(), waiting_for = :waiting_for,
        is_first_over = is_first_over OR :is_first_over,
        due_at = greatest(greatest(due_at, clock_timestamp() - interval '1 s') + make_interval(secs => :pace_seconds),
                          clock_timestamp() + make_interval(secs => :wait_seconds)),
        state = CASE WHEN total = retried + skipped + :retried + :skipped THEN 'completed' ELSE state END,
        ended_at = CASE WHEN total = retried + skipped + :retried + :skipped THEN clock_timestamp() END
    WHERE id = :bulk_retry_id
    RETURNING state
    """,
)

PAUSE = statement(
    "bulk.pause_by_itself",
    """
    UPDATE bulk_retries SET state = 'paused', pause_reason = :pause_reason, waiting_for = NULL, moved_at = clock_timestamp()
    WHERE id = :bulk_retry_id
    """,
)

LOCK_RUNNING = statement(
    "bulk.lock_running",
    "SELECT id FROM bulk_retries WHERE id = :bulk_retry_id AND state = 'running' FOR NO KEY UPDATE SKIP LOCKED",
)

# A set that has failed: others first.
POSTPONE = statement(
    "bulk.postpone",
    """
    UPDATE bulk_retries
    SET moved_at = clock_timestamp(), due_at = clock_timestamp() + make_interval(secs => :wait_seconds)
    WHERE id = :bulk_retry_id AND state = 'running'
    """,
)

# Its items go with it: one at a time.
PRUNE = statement(
    "bulk.prune",
    """
    DELETE FROM bulk_retries WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM bulk_retries WHERE ended_at <= now() - make_interval(days => :days)
        ORDER BY ended_at LIMIT 1 FOR UPDATE SKIP LOCKED))
    """,
)


async def prune_bulk_retries(database: Database, days: int) -> bool:
    """Remove one job that ended too many days ago; whether there may be more."""
    if days == 0:
        return False
    async with database.connection() as connection:
        return await connection.execute(PRUNE, days=days) != "DELETE 0"


# --- one set ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Decided:
    """The outcomes of the runs of a set. Those that are not in it stay pending."""

    places: list[int] = field(default_factory=list)
    codes: list[str | None] = field(default_factory=list)
    details: list[str | None] = field(default_factory=list)
    waiting_for: str | None = None
    wait_seconds: float | None = None

    @property
    def retried(self) -> int:
        return self.codes.count(None)

    @property
    def skipped(self) -> int:
        return len(self.codes) - self.retried

    def add(self, place: int, outcome: Outcome) -> None:
        """A run without a place in the queue, or that another transaction holds, is asked again later."""
        match outcome:
            case Reply():
                self._decide(place)
            case QuotaExceeded():
                self.waiting_for, self.wait_seconds = "quota", LOOK_AGAIN_SECONDS
            case Unavailable():
                self.wait_seconds = LOOK_AGAIN_SECONDS
            case Invalid():
                self._decide(place, outcome.code, outcome.errors[0][1])
            case Refusal():
                self._decide(place, outcome.code, outcome.detail)

    def _decide(self, place: int, code: str | None = None, detail: str | None = None) -> None:
        self.places.append(place)
        self.codes.append(code)
        self.details.append(detail)


class Worker:
    """The work of one process. `round` is one turn of its loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._database = services.database
        self._one_by_one: set[UUID] = set()  # jobs of which a set has failed: one of its runs is to blame

    async def round(self) -> bool | float | None:
        """Some sets. Whether there is more to do now, or in how many seconds there will be. Raises DatabaseUnavailable."""
        async with self._database.connection() as connection:
            seconds: float | None = await connection.fetchval(NEXT_DUE)
        if seconds is None:
            self._one_by_one.clear()
            return None
        if seconds > 0:
            return seconds
        for _ in range(TURNS):
            if not await self._turn():  # other replicas have the others
                return BUSY_SECONDS
        return True

    async def _turn(self) -> bool:
        """Work on one set of the next job; False if there is none. Raises DatabaseUnavailable."""
        job: Record | None = None
        try:
            async with self._database.transaction() as connection:
                job = await connection.fetchrow(TAKE_JOB)
                if job is not None:
                    await self._work(connection, job)
        except Exception as error:
            if job is not None:
                await self._failed(job, error)
            raise
        return job is not None

    async def _work(self, connection: Connection, job: Record) -> None:
        job_id: UUID = job["id"]
        if not job["key_is_valid"]:
            await jobs.end(
                connection,
                job_id,
                "failed",
                failure="key_revoked",
                code="key_revoked",
                detail="The API key that created the bulk retry was revoked or has expired.",
            )
            connection.after_commit(
                lambda: _tell(job, {"event": "bulk_retry_ended", "state": "failed", "code": "key_revoked"})
            )
            return
        is_first_over = job["is_first_over"] or not job["first"]
        if job["stop_after_failures"] or not is_first_over:
            ended = (await jobs.results(connection, [job_id]))[str(job_id)]
            is_first_over = is_first_over or ended["succeeded"] >= job["first"]
            if (pause_reason := _pauses(job, ended, is_first_over=is_first_over)) is not None:
                await connection.execute(PAUSE, bulk_retry_id=job_id, pause_reason=pause_reason)
                connection.after_commit(
                    lambda: _tell(job, {"event": "bulk_retry_paused", "pause_reason": pause_reason})
                )
                return
        most = _most(job, is_first_over=is_first_over, alone=job_id in self._one_by_one)
        if not most:
            decided = _Decided(waiting_for="first", wait_seconds=LOOK_AGAIN_SECONDS)
        else:
            decided = await self._retry(connection, job, most)
        await self._settle(connection, job, decided, is_first_over=is_first_over)

    async def _retry(self, connection: Connection, job: Record, most: int) -> _Decided:
        items = await connection.fetch(TAKE, bulk_retry_id=job["id"], most=most)
        outcomes = await retry_runs(self._services, _retries(job, items), connection=connection)
        decided = _Decided()
        for item, outcome in zip(items, outcomes, strict=True):
            decided.add(item["place"], outcome)
        if items and not decided.places and decided.wait_seconds is None:
            decided.wait_seconds = BUSY_SECONDS
        return decided

    async def _settle(self, connection: Connection, job: Record, decided: _Decided, *, is_first_over: bool) -> None:
        if decided.places:
            await connection.execute(
                DECIDE,
                bulk_retry_id=job["id"],
                places=decided.places,
                outcomes=["retried" if code is None else "skipped" for code in decided.codes],
                codes=decided.codes,
                details=decided.details,
            )
        pace = job["pace_per_second"]
        state = await connection.fetchval(
            MOVE,
            bulk_retry_id=job["id"],
            retried=decided.retried,
            skipped=decided.skipped,
            waiting_for=decided.waiting_for,
            is_first_over=is_first_over,
            pace_seconds=decided.retried / pace if pace else 0.0,
            wait_seconds=decided.wait_seconds,
        )

        def tell() -> None:
            for code, number in Counter(decided.codes).items():
                metrics.retries.add("accepted" if code is None else "refused", code or "", "bulk", count=number)
            if decided.retried:
                metrics.transitions.add("scheduling", "caller", count=decided.retried)
                self._services.wakeups.wake(job["organization_id"])
            if decided.places:
                _tell(job, {"event": "bulk_retry_set", "retried": decided.retried, "skipped": decided.skipped})
            if state == "completed":
                _tell(job, {"event": "bulk_retry_ended", "state": state})

        connection.after_commit(tell)

    async def _failed(self, job: Record, error: Exception) -> None:
        """Others go first now. A run that no set can be made with is skipped, so that the job ends."""
        job_id: UUID = job["id"]
        is_own_defect = not isinstance(error, Unavailable)
        async with self._database.transaction() as connection:
            is_alone = is_own_defect and job_id in self._one_by_one
            if is_alone and await connection.fetchrow(LOCK_RUNNING, bulk_retry_id=job_id) is not None:
                decided = _Decided()
                for item in await connection.fetch(TAKE, bulk_retry_id=job_id, most=1):
                    decided.add(item["place"], InternalError())
                await self._settle(connection, job, decided, is_first_over=job["is_first_over"])
                return
            await connection.execute(POSTPONE, bulk_retry_id=job_id, wait_seconds=LOOK_AGAIN_SECONDS)
        if is_own_defect:
            self._one_by_one.add(job_id)


def _pauses(job: Record, ended: Record, *, is_first_over: bool) -> str | None:
    """Why a job does not go on by itself."""
    if job["stop_after_failures"] and ended["failed"] - job["failures_forgiven"] >= job["stop_after_failures"]:
        return "stop_after_failures"
    if not is_first_over and (ended["failed"] or ended["cancelled"] or ended["gone"]):
        return "first_failed"
    return None


def _most(job: Record, *, is_first_over: bool, alone: bool) -> int:
    """How many runs its next set may have; 0: the first have not ended yet."""
    most = 1 if alone else max(1, min(SET, SET_BYTES // len(job["overrides"])))
    if job["pace_per_second"]:
        most = min(most, max(1, int(job["pace_per_second"] * PACED_SECONDS)))
    if not is_first_over:
        most = min(most, job["first"] - job["retried"])
    return most


def _retries(job: Record, items: Sequence[Record]) -> list[Retry]:
    options = jobs.changes(BulkRetryOverrides.model_validate_json(job["overrides"]), job["reason"])
    actor = Actor(job["key_id"], job["user_id"], job["request_id"], job["reason"], "bulk", job["id"])
    principal = Principal(job["key_id"], job["organization_id"], job["user_id"])
    return [
        Retry(
            item["run_id"],
            job["organization_id"],
            actor,
            options,
            expected_attempt=item["attempt"],
            principal=principal,
            traceparent=job["traceparent"],
        )
        for item in items
    ]


def _tell(job: Record, line: dict[str, object]) -> None:
    log.info(line | {"bulk_retry_id": job["id"], "organization_id": job["organization_id"]})
