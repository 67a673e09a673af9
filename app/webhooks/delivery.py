"""Delivery of webhooks: each event becomes a delivery for each endpoint of its organization. Each delivery is sent until the
receiver confirms it, or until the schedule ends.

Deliveries are sent at least once. A delivery is leased in a transaction, sent while no transaction is open, and settled in
another transaction. A replica that finds a lease that has run out sends the delivery again, under the same id. Two replicas
never send one delivery at the same time: a lease lasts longer than a send, and is checked before a connection is opened.

A dead or slow endpoint delays no other endpoint. Deliveries are leased endpoint by endpoint. Each endpoint and each
organization has a limit of deliveries under way. Failing endpoints and slow endpoints have places of their own.

This file knows nothing of runs: an event is bytes.

One file: a round leases, sends and settles with one set of places.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from functools import cache, partial
from typing import Any, Literal
from uuid import UUID

from app.errors import DatabaseUnavailable, InternalError, VaultUnavailable
from app.services import Services
from app.stores.threads import Slots
from app.telemetry import metrics
from app.telemetry.logs import describe
from app.webhooks import queue, signing
from app.webhooks.addresses import Allowed
from app.webhooks.sending import SEND_SECONDS, TOO_LATE, Answer, Failed, Post, trust

log = logging.getLogger("app.webhooks")

# When a failed delivery is sent again, in seconds after each failure, each a fifth more or less; then never.
SCHEDULE = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 10 * 3600)
JITTER = 0.2
MAX_TRIES = len(SCHEDULE) + 1  # tries of one delivery; the log keeps as many
ASKS_FOR_TIME = frozenset({429, 503})  # their Retry-After counts, up to twice the planned delay
GONE = 410

LEASE_SECONDS = 60.0
POSTPONED_SECONDS = 5.0  # wait of a delivery if its signing secret could not be read
DISABLED_AFTER = timedelta(days=5)
SECRET_SECONDS = 60.0  # how long a signing secret is kept in memory
MAX_SECRETS = 10_000

# Deliveries that a process sends at the same time: in all, for one organization, for one endpoint. An endpoint is failing if
# its last answer was a failure. It is slow if it took longer than SLOW_SECONDS within the last minute, or takes longer now.
Kind = Literal["prompt", "slow", "failing"]
PLACES: dict[Kind, int] = {"prompt": 48, "slow": 48, "failing": 16}
PER_ORGANIZATION, PER_ORGANIZATION_FAILING = 16, 4
PER_ENDPOINT, PER_ENDPOINT_FAILING = 8, 1
SLOW_SECONDS = 0.5
SLOW_FOR_SECONDS = 60.0
MAX_SENDING = sum(PLACES.values())
MAX_SLOW = 10_000  # endpoints that are remembered

BATCH = 100  # events in one round of fanning out, endpoints in one lease
LOOK_AROUND = 1_000  # endpoints looked at in one round
FAN_OUTS = 2  # batches in one round, so that deliveries are sent between them
LEASES = 4  # leases in one round: dropped deliveries take no place, and new events must be fanned out between them
CLOSE_SECONDS = 5.0  # how long a stop waits for deliveries under way

# --- one delivery -----------------------------------------------------------------------------------------------------

# `delivered`; `retried`: it failed and is tried again; `failed`: for good; `disabled`: and with it the endpoint;
# `dropped`: not sent, the endpoint or the run is gone; `postponed`: not sent, and not for the receiver's fault.
Outcome = Literal["delivered", "retried", "failed", "disabled", "dropped", "postponed"]


@dataclass(frozen=True, slots=True)
class Leased:
    """A delivery that this process has leased."""

    id: UUID
    lease: UUID
    tries: int
    endpoint_id: UUID
    organization_id: str
    url: str | None
    is_disabled: bool | None
    is_failing: bool | None
    body: bytes | None
    secret_paths: Sequence[str]
    connect_by: float  # in time.monotonic(): a send that begins later could outlast the lease

    @property
    def dropped_because(self) -> str | None:
        if self.url is None or self.is_disabled:
            return "endpoint_disabled"
        return "run_deleted" if self.body is None else None


def delay_after(
    tries: int,
    retry_after: str | None,
    spread: Callable[[float, float], float],
    now: Callable[[], float] = time.time,
) -> float | None:
    """Seconds until a delivery that has failed once more is tried again, None if it is not. `tries` are those before."""
    if tries >= len(SCHEDULE):
        return None
    planned = SCHEDULE[tries] * spread(1 - JITTER, 1 + JITTER)
    asked = _seconds(retry_after, now)
    return planned if asked is None else min(max(planned, asked), 2 * planned)


def _seconds(retry_after: str | None, now: Callable[[], float]) -> float | None:
    """Retry-After (RFC 9110, 10.2.3): seconds, or a date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:12])
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):  # no date, or a year or an offset beyond all bounds
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now()


class Deliverer:
    """Delivery in one process. `round` is one turn of its loop; deliveries go on between the turns."""

    def __init__(self, services: Services, *, ahead: timedelta = timedelta(0)) -> None:
        """`ahead` reads the database's clock that much later. Raises ValueError for settings that cannot be used."""
        settings = services.settings
        self._services = services
        self._database = services.database
        self._allowed = Allowed.parse(settings.webhook_allow)
        self._context = cache(partial(trust, settings.webhook_cacert))
        self._slots = Slots("webhooks", MAX_SENDING)
        self._ahead = ahead
        self._secrets: dict[str, tuple[str | None, float]] = {}
        self._ready: dict[UUID, str] = {}  # endpoints that may have something due, with their organizations
        self._sending: dict[asyncio.Task[None], Leased] = {}
        self._lingering: dict[UUID, Leased] = {}  # given up, by lease; their threads still wait, as for a name server
        self._slow_until: dict[UUID, float] = {}  # in time.monotonic(), by endpoint
        self._posts: set[Post] = set()
        self._is_closing = False
        self._look_around_at = 0.0
        self._looked_up_to = UUID(int=0)
        self._fanned_out_up_to = ""  # an organization

    @property
    def is_sending(self) -> bool:
        """Something is under way."""
        return bool(self._sending)

    async def round(self) -> bool:
        """Fan out what is new, look for what is due, and begin to send as much as there are places for; whether there is more
        to do at once."""
        is_behind = False
        for _ in range(FAN_OUTS):
            is_behind = await self._fan_out()
            if not is_behind:
                break
        more = False
        if time.monotonic() >= self._look_around_at:
            self._look_around_at = time.monotonic() + self._services.settings.background_period_seconds
            more = await self._recover()
            await self._look_around()
        for _ in range(LEASES):
            if not await self._lease():
                return more or is_behind
        return True

    async def close(self) -> None:
        """Wait CLOSE_SECONDS for deliveries under way, then break them off. Another process sends these again."""
        self._is_closing = True
        if self._sending:
            await asyncio.wait(self._sending, timeout=CLOSE_SECONDS)
        for post in self._posts:
            post.abort()
        if self._sending:
            await asyncio.wait(self._sending, timeout=CLOSE_SECONDS)
        for task in self._sending:
            task.cancel()
        await self._slots.close()

    # --- due deliveries ---

    async def _fan_out(self) -> bool:
        """Fan out one batch of new events; whether there may be more."""
        after = self._fanned_out_up_to
        async with self._database.connection() as connection:
            rows = await connection.fetch(queue.FAN_OUT, after=after, batch=BATCH)
        self._ready |= {row["endpoint_id"]: row["organization_id"] for row in rows if row["endpoint_id"] is not None}
        self._fanned_out_up_to = (rows[0]["last"] if rows else None) or ""
        taken = Counter({row["id"]: row["organization_id"] for row in rows}.values())
        return after != "" or any(count >= rows[0]["share"] for count in taken.values())

    async def _look_around(self) -> None:
        """Find endpoints with due deliveries, also those that another process left; a part of all endpoints each time."""
        async with self._database.connection() as connection:
            endpoints = await connection.fetch(
                queue.PENDING_ENDPOINTS, after=self._looked_up_to, ahead=self._ahead, batch=LOOK_AROUND
            )
        self._looked_up_to = endpoints[-1]["endpoint_id"] if len(endpoints) == LOOK_AROUND else UUID(int=0)
        self._ready |= {row["endpoint_id"]: row["organization_id"] for row in endpoints if row["is_due"]}

    async def _recover(self) -> bool:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(queue.RECOVER, batch=BATCH)
        if row is None:
            return False
        self._ready[row["endpoint_id"]] = row["organization_id"]
        self._look_around_at = 0.0
        return True

    async def _lease(self) -> bool:
        """Lease what there are places for and begin to send it; whether there may be more to lease now."""
        places = self._places()
        if not places:
            return False
        connect_by = time.monotonic() + LEASE_SECONDS - SEND_SECONDS
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                queue.LEASE,
                endpoint_ids=list(places),
                places=[healthy for healthy, _ in places.values()],
                places_failing=[failing for _, failing in places.values()],
                ahead=self._ahead,
                lease_seconds=LEASE_SECONDS,
            )
        leased = [Leased(**row, connect_by=connect_by) for row in rows]
        counts = Counter(one.endpoint_id for one in leased)
        for endpoint_id, (healthy, failing) in places.items():
            # Taken less than was asked for: nothing more is due now. Else it stays, behind the others.
            organization_id = self._ready.pop(endpoint_id)
            if counts[endpoint_id] >= max(min(healthy, failing), 1):
                self._ready[endpoint_id] = organization_id
        dropped = [one for one in leased if one.dropped_because]
        if dropped:
            await self._drop(dropped)
        for one in leased:
            if not one.dropped_because:
                task = asyncio.create_task(self._deliver(one))
                self._sending[task] = one
                task.add_done_callback(self._done)
        return bool(leased)

    def _places(self) -> dict[UUID, tuple[int, int]]:
        """For each endpoint that has its turn: how many of its deliveries may begin now, and how many if it is failing."""
        sending = {one.lease: one for one in self._sending.values()}
        under_way = (sending | self._lingering).values()
        kinds = Counter(self._kind_of(one.endpoint_id, is_failing=bool(one.is_failing)) for one in sending.values())
        kinds.update(
            "failing" if one.is_failing else "slow" for one in self._lingering.values() if one.lease not in sending
        )
        most = MAX_SENDING - len(under_way)
        free = {kind: places - kinds[kind] for kind, places in PLACES.items()}
        of_organization = Counter((one.organization_id, bool(one.is_failing)) for one in under_way)
        of_endpoint = Counter(one.endpoint_id for one in under_way)
        share = max(1, free["prompt"] // max(1, len(self._ready)))
        places: dict[UUID, tuple[int, int]] = {}
        for endpoint_id, organization_id in self._ready.items():
            kind = self._kind_of(endpoint_id)
            healthy = min(
                share,
                most,
                free[kind],
                PER_ORGANIZATION - of_organization[organization_id, False],
                PER_ENDPOINT - of_endpoint[endpoint_id],
            )
            failing = min(
                1,
                most,
                free["failing"],
                PER_ORGANIZATION_FAILING - of_organization[organization_id, True],
                PER_ENDPOINT_FAILING - of_endpoint[endpoint_id],
            )
            healthy, failing = max(healthy, 0), max(failing, 0)
            if healthy or failing:
                places[endpoint_id] = (healthy, failing)
                most -= max(healthy, failing)
                free[kind] -= healthy
                free["failing"] -= failing
                of_organization[organization_id, False] += healthy
                of_organization[organization_id, True] += failing
            if len(places) == BATCH:
                break
        return places

    def _kind_of(self, endpoint_id: UUID, *, is_failing: bool = False) -> Kind:
        """The kind of places that the endpoint's deliveries take."""
        if is_failing:
            return "failing"
        return "slow" if self._slow_until.get(endpoint_id, 0.0) > time.monotonic() else "prompt"

    def _takes_long(self, endpoint_id: UUID) -> None:
        """From now on its deliveries, those under way too, take no place of a healthy endpoint's."""
        if len(self._slow_until) >= MAX_SLOW:
            self._slow_until.clear()
        self._slow_until[endpoint_id] = time.monotonic() + SLOW_FOR_SECONDS
        self._services.wakeups.deliveries.set()

    async def _drop(self, dropped: Sequence[Leased]) -> None:
        async with self._database.connection() as connection:
            await connection.execute(
                queue.DROP,
                ids=[one.id for one in dropped],
                leases=[one.lease for one in dropped],
                errors=[one.dropped_because for one in dropped],
            )
        metrics.webhook_deliveries.add("dropped", count=len(dropped))

    # --- sending ---

    def _done(self, task: asyncio.Task[None]) -> None:
        one = self._sending.pop(task)
        self._ready.setdefault(one.endpoint_id, one.organization_id)
        self._services.wakeups.deliveries.set()

    async def _deliver(self, one: Leased) -> None:
        """Send one and settle what became of it. If that cannot be written, the lease runs out and it is sent again."""
        try:
            outcome = await self._try(one)
            metrics.webhook_deliveries.add(outcome)
            line = {
                "event": "webhook",
                "outcome": outcome,
                "delivery_id": str(one.id),
                "endpoint_id": str(one.endpoint_id),
            }
            log.log(logging.WARNING if outcome in ("failed", "disabled") else logging.DEBUG, line)
        except DatabaseUnavailable as error:
            log.warning({"event": "webhook_not_settled", "delivery_id": str(one.id), "code": error.code})
        except Exception as error:  # noqa: BLE001 - one bad delivery must not end the others
            self._broke(one, error)

    def _thread_ended(self, one: Leased) -> None:
        """Its place is free."""
        if self._lingering.pop(one.lease, None) is not None:
            self._ready.setdefault(one.endpoint_id, one.organization_id)
            self._services.wakeups.deliveries.set()

    async def _try(self, one: Leased) -> Outcome:
        """A defect of ours is a failed try like any other: else it would be sent again for ever."""
        began = time.monotonic()
        try:
            return await self._send(one)
        except DatabaseUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._broke(one, error)
            return await self._settle(one, None, InternalError.code, round(1000 * (time.monotonic() - began)))

    def _broke(self, one: Leased, error: Exception) -> None:
        log.error({"event": "webhook_broke", "delivery_id": str(one.id), **describe(error)})

    async def _send(self, one: Leased) -> Outcome:
        try:
            secrets = [secret for path in one.secret_paths if (secret := await self._secret(path)) is not None]
        except VaultUnavailable:
            return await self._postpone(one)
        if not secrets:
            log.warning({"event": "webhook_secret_missing", "endpoint_id": str(one.endpoint_id)})
            return await self._postpone(one)
        post = Post(self._allowed, self._context)
        self._posts.add(post)
        began: float | None = None
        has_ended = False
        loop = asyncio.get_running_loop()

        def send() -> Answer:
            nonlocal began, has_ended
            began = time.monotonic()
            try:
                return self._post(post, one, secrets)
            finally:
                has_ended = True
                loop.call_soon_threadsafe(self._thread_ended, one)

        slow = loop.call_later(SLOW_SECONDS, self._takes_long, one.endpoint_id)
        answer, error = None, None
        try:
            answer = await self._slots.run(send, wait=SEND_SECONDS, patience=SEND_SECONDS)
        except TimeoutError:
            error = "timeout"
        except Failed as failed:
            error = failed.code
        finally:
            slow.cancel()
            post.abort()  # nothing waits for the thread any more
            if began is not None and not has_ended:
                self._lingering[one.lease] = one  # nothing interrupts a look-up of a name: it keeps its place
            self._posts.discard(post)
        if began is None or error == TOO_LATE or (self._is_closing and error is not None):
            return await self._postpone(one)
        return await self._settle(one, answer, error, round(1000 * (time.monotonic() - began)))

    def _post(self, post: Post, one: Leased, secrets: Sequence[str]) -> Answer:
        """In a thread: sign now, so that the timestamp is that of sending, and send."""
        assert one.url is not None and one.body is not None  # noqa: S101, PT018 - else it was dropped
        signed = signing.headers(str(one.id), int(self._database.clock.now()), one.body, secrets)
        headers = {"Content-Type": "application/json", "User-Agent": "runs-api", **signed}
        return post.send(one.url, headers, one.body, connect_by=one.connect_by)

    async def _settle(self, one: Leased, answer: Answer | None, error: str | None, duration_ms: int) -> Outcome:
        is_success = answer is not None and 200 <= answer.status < 300
        is_gone = answer is not None and answer.status == GONE
        asked = answer.retry_after if answer is not None and answer.status in ASKS_FOR_TIME else None
        delay = (
            None if is_success or is_gone else delay_after(one.tries, asked, random.uniform, self._database.clock.now)
        )
        status = "delivered" if is_success else "failed" if delay is None else "pending"
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                queue.SETTLE,
                id=one.id,
                lease=one.lease,
                status=status,
                delay=delay or 0.0,
                duration_ms=duration_ms,
                response_status=None if answer is None else answer.status,
                response_body=None if answer is None else answer.body.decode(errors="replace").replace("\0", "\ufffd"),
                error=error,
                most_tries=MAX_TRIES,
                is_success=is_success,
                is_gone=is_gone,
                after=DISABLED_AFTER,
            )
        if is_success:
            return "delivered"
        if row is not None and row["disabled_because"] is not None:
            return "disabled"
        return "failed" if delay is None else "retried"

    async def _postpone(self, one: Leased) -> Outcome:
        async with self._database.connection() as connection:
            await connection.execute(queue.POSTPONE, id=one.id, lease=one.lease, delay=POSTPONED_SECONDS)
        return "postponed"

    async def _secret(self, path: str) -> str | None:
        """A signing secret, kept for a minute. Raises VaultUnavailable."""
        now = time.monotonic()
        found = self._secrets.get(path)
        if found is None or found[1] <= now:
            values: dict[str, Any] | None = await self._services.secrets.read(path)
            if len(self._secrets) >= MAX_SECRETS:
                self._secrets.clear()
            found = self._secrets[path] = (None if values is None else values["secret"], now + SECRET_SECONDS)
        return found[0]
