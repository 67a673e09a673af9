"""The loops of a process: the work after a commit, and the work that is due by time.

They are woken after commits and also look by themselves, so nothing depends on a wake-up; every replica has them, and row
locks divide their work.

What a round does, and its SQL, stand with its subject. Here is only when it is done.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from app.bulk.working import Worker, prune_bulk_retries
from app.errors import DatabaseUnavailable, InternalError, Unavailable
from app.events import prune_events
from app.idempotency import forget_keys
from app.retry_policies.working import RetryWorker
from app.runs.attachments import expire_attachments
from app.runs.ending import end_silent_runs, note_expired_secrets
from app.runs.listing import announce_assignments
from app.runs.outputs import prune_outputs
from app.runs.retention import prune_attempts, remove_old_runs
from app.scheduling.held import release_due
from app.scheduling.rounds import look_around, place_large, place_woken
from app.scheduling.silence import look_for_silence
from app.services import Services
from app.stores.deletions import collect_all
from app.stores.health import CHECK_SECONDS, LOST_CHECK_SECONDS, STORES, Checks
from app.stores.notify import tell
from app.stores.pool import party
from app.telemetry import metrics
from app.telemetry.logs import describe
from app.webhooks.delivery import Deliverer
from app.webhooks.queue import prune_webhooks

log = logging.getLogger("app.background")

# At most a period: requests have most of the process.
REST_FOR_WORK = 4

# Bulk retries rest less: beside requests the connections and the runs' locks divide the work.
BULK_REST_FOR_WORK = 0.1

# Webhooks too: what ends while much is fanned out waits for a round and a rest.
WEBHOOKS_REST_FOR_WORK = 0.2

# Seconds after which a loop that has nothing to look for by itself goes on with what a failure left.
TRY_AGAIN = 1.0

# How often the machine's clock is compared with the database's, beside each connect.
CLOCK_SECONDS = 60.0

# How often the database is asked whether its disk is full, beside each write that finds no room.
DISK_SECONDS = 10.0

# A process tells others at most so often: the server lets those who tell commit one after the other.
TELL_REST = 0.02


@dataclass(frozen=True, slots=True)
class Loop:
    """A round again and again: when it is woken, when the last one said that there is more (now, or in so many seconds), and
    at least once a period.

    `rest` is the least time between two rounds, and `rest_for_work` how many times as long as its round a loop rests: a lone
    wake-up is answered at once, and under load each round does more for its price. All times are seconds. `close` ends
    what rounds have left under way.
    """

    name: str
    round: Callable[[], Awaitable[bool | float | None]]
    period: float
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    rest: float = 0
    rest_for_work: float = REST_FOR_WORK
    close: Callable[[], Awaitable[None]] | None = None

    async def run(self, checks: Checks) -> None:
        """Until cancelled."""
        party.set(f"loop {self.name}")
        for code in (DatabaseUnavailable.code, InternalError.code):
            metrics.loop_failures.add(self.name, code, count=0)
        try:
            await self._rounds(checks)
        finally:
            if self.close is not None:
                await self.close()

    async def _rounds(self, checks: Checks) -> None:
        telling: asyncio.Task[None] | None = None
        while True:
            began = time.monotonic()
            more: bool | float | None = False
            try:
                more = await self.round()
                metrics.loop_success.set(time.time(), self.name)
            except Unavailable as error:
                metrics.loop_failures.add(self.name, error.code)
                line = {"event": "background_unavailable", "work": self.name, "code": error.code}
                line |= {} if error.kind is None else {"cause": error.kind}
                if telling is None or telling.done():  # a loop does not wait for a check of a store
                    telling = asyncio.create_task(checks.tell(log, error, line))
                self.wake.clear()  # whatever is woken now meets the same failure: wait a period
            except Exception as error:  # noqa: BLE001 - one bad round must not end the loop for ever
                metrics.loop_failures.add(self.name, InternalError.code)
                log.error({"event": "background_failed", "work": self.name, **describe(error)})
            await asyncio.sleep(min(max(self.rest, self.rest_for_work * (time.monotonic() - began)), self.period))
            if more is True:
                continue
            try:
                async with asyncio.timeout(min(more or self.period, self.period)):
                    await self.wake.wait()
            except TimeoutError:
                continue
            finally:
                self.wake.clear()


def loops(services: Services) -> list[Loop]:
    """One for each task, so that a frozen Vault never delays an assignment."""
    settings, database, wakeups = services.settings, services.database, services.wakeups
    period = settings.background_period_seconds
    answers, settles = settings.background != "only", settings.background != "none"
    channels = wakeups.listens_to(answers=answers)
    telling = [
        Loop("tell", partial(tell, database, wakeups), TRY_AGAIN, wakeups.to_tell, rest=TELL_REST, rest_for_work=0),
        Loop("clock", database.measure_clock, CLOCK_SECONDS),
        Loop("database_disk", database.look_at_disk, DISK_SECONDS),
        Loop("listen", partial(database.listen, channels, wakeups.heard), TRY_AGAIN),
        *(
            Loop(
                f"{store}_check",
                partial(services.checks.look, store),
                CHECK_SECONDS,
                services.checks.suspected(store),
                rest=LOST_CHECK_SECONDS,
                rest_for_work=0,
            )
            for store in STORES
        ),
    ]
    if answers:
        used, signs = services.keys_used, services.signs_of_life
        telling += [
            Loop("assignments", partial(announce_assignments, services), period),
            Loop("signs_of_life", _waking(services, partial(signs.write, database)), TRY_AGAIN, signs.event, rest=0.5),
            Loop("last_used", partial(used.write, database), TRY_AGAIN, used.event, rest=1.0),
            Loop("stored_replies", partial(services.replies.exchange, database), period),
        ]
    if not settles:
        return telling
    deliverer = Deliverer(services)

    async def collect() -> None:
        if services.files.own_marker is None:  # what an unmounted folder lacks would count as deleted
            await services.checks.problem("storage")
        await collect_all(database, services.secrets, services.files, noted=note_expired_secrets)

    return [
        *telling,
        # It is organizations that rest here, each by itself: none waits for what another one costs.
        Loop("placement", partial(place_woken, services), TRY_AGAIN, wakeups.placement.event, rest_for_work=0),
        Loop(
            "large_placement", partial(place_large, services), TRY_AGAIN, wakeups.large_placement.event, rest_for_work=0
        ),
        Loop("look_around", partial(look_around, services), period),
        Loop("held_runs", partial(release_due, services), TRY_AGAIN),
        Loop("deletions", collect, period, wakeups.collector, rest=0.1),
        Loop("silent_runs", _waking(services, partial(end_silent_runs, database, settings)), period),
        Loop("silent_machines", _waking(services, partial(look_for_silence, database, settings)), period),
        Loop("expired_attachments", _waking(services, partial(expire_attachments, database)), period),
        Loop("idempotency_keys", partial(forget_keys, database), period),
        Loop("outputs", partial(prune_outputs, database), period),
        Loop("old_runs", partial(remove_old_runs, database, settings), period),
        Loop("old_attempts", partial(prune_attempts, database, settings.attempt_retention_days), period),
        Loop("events", partial(prune_events, database, settings.event_retention_days), period),
        Loop(
            "webhooks",
            deliverer.round,
            period,
            wakeups.deliveries,
            rest=0.02,
            rest_for_work=WEBHOOKS_REST_FOR_WORK,
            close=deliverer.close,
        ),
        Loop("old_webhooks", partial(prune_webhooks, database, settings.webhook_retention_days), period),
        Loop("bulk_retries", Worker(services).round, TRY_AGAIN, wakeups.bulk_retries, rest_for_work=BULK_REST_FOR_WORK),
        Loop("planned_retries", RetryWorker(services).round, TRY_AGAIN, rest_for_work=BULK_REST_FOR_WORK),
        Loop("old_bulk_retries", partial(prune_bulk_retries, database, settings.event_retention_days), period),
        *_handing_over(services),
    ]


def _handing_over(services: Services) -> list[Loop]:
    if not services.settings.hands_over:
        return []
    from app.handoff.temporal import SWEEP_SECONDS, Dispatcher

    dispatcher = Dispatcher(services)
    period, wake = services.settings.background_period_seconds, services.wakeups.dispatches
    return [
        Loop("dispatches", dispatcher.round, period, wake, rest_for_work=0),
        Loop("handing_over_again", dispatcher.sweep, SWEEP_SECONDS),
    ]


async def run(services: Services) -> None:
    """All loops, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for loop in loops(services):
            group.create_task(loop.run(services.checks))


def _waking(services: Services, work: Callable[[], Awaitable[set[str]]]) -> Callable[[], Awaitable[None]]:
    """A round that wakes the organizations for which it did something."""

    async def work_and_wake() -> None:
        for organization_id in await work():
            services.wakeups.wake(organization_id)
            services.wakeups.deliver()

    return work_and_wake
