"""The quotas that are decided before a body is read: requests, bytes in flight, long polls, and failed authentications.

They are counted in this process: with several processes, each allows the full quota. A refused request has cost only the
statement that finds its key. A caller that goes on after many refusals gets the next ones late: refusing takes time from
others.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from starlette.types import Scope

from app.access.auth import Principal, digest
from app.api.client_address import subscriber
from app.config import Settings
from app.errors import QuotaExceeded, Unauthorized
from app.limits.memory_budget import Reservation
from app.limits.quotas import MINUTE, MOST_PARTIES, AtOnce, PerMinute, Policy, Standing, beyond, exceeded, policy

# An organization's long polls may take this part of the connections, so that others always find some.
LONG_POLLS_PART = 2

# The first refusals of a minute are sent at once, later ones after HELD_SECONDS. Waiting refusals take up connections, so at
# most MOST_HELD may wait; further ones are sent at once, too.
REFUSED_AT_ONCE = 100
HELD_SECONDS = 0.1
MOST_HELD = 100


class Limits:
    """The counts of one process. A quota that is not set costs one comparison."""

    def __init__(self, settings: Settings, connections: int) -> None:
        self._held = 0

        def by_minute(name: str, quota: int, what: str) -> PerMinute | None:
            found = policy(name, quota, what, window=MINUTE)
            return None if found is None else PerMinute(found)

        def at_once(found: Policy | None) -> AtOnce | None:
            return None if found is None else AtOnce(found)

        self._key_requests = by_minute("key-requests", settings.quota_key_requests_per_minute, "requests")
        self._organization_requests = by_minute(
            "organization-requests", settings.quota_organization_requests_per_minute, "requests"
        )
        unit = "content-bytes"
        self._key_bytes = at_once(policy("key-bytes", settings.quota_key_bytes_in_flight, "bytes", unit=unit))
        self._organization_bytes = at_once(
            policy("organization-bytes", settings.quota_organization_bytes_in_flight, "bytes", unit=unit)
        )
        unit = "concurrent-requests"
        self._key_polls = at_once(policy("key-long-polls", settings.quota_key_long_polls, "long polls", unit=unit))
        self._organization_polls = at_once(
            policy(
                "organization-long-polls",
                # Also without a quota: an authenticated connection makes no room for new connections.
                min(settings.quota_organization_long_polls or connections, connections // LONG_POLLS_PART),
                "long polls",
                unit=unit,
            )
        )
        failures = by_minute(
            "address-failures", settings.quota_address_failures_per_minute, "requests without a valid key"
        )
        self.strangers = None if failures is None else Strangers(failures)

    def request(self, principal: Principal) -> list[Standing]:
        """One more request. Where the caller stands of which little is left. Raises QuotaExceeded."""
        standings: list[Standing] = []
        if self._key_requests is None and self._organization_requests is None:
            return standings
        now = time.monotonic()
        for count, party in (
            (self._key_requests, principal.key_id),
            (self._organization_requests, principal.organization_id),
        ):
            if count is not None and (standing := count.count(party, now)) is not None:
                if standing.left < 0:
                    raise beyond(standing)
                standings.append(standing)
        return standings

    async def hold_back(self, refusal: QuotaExceeded) -> None:
        """Wait before a refusal is sent to a caller that goes on after many refusals."""
        if refusal.times > REFUSED_AT_ONCE and self._held < MOST_HELD:
            self._held += 1
            try:
                await asyncio.sleep(HELD_SECONDS)
            finally:
                self._held -= 1

    def meter(self, memory: Reservation, principal: Principal) -> None:
        """Count the memory of the request for its key and its organization from now on."""
        memory.meters = [
            (meter, party)
            for meter, party in (
                (self._key_bytes, principal.key_id),
                (self._organization_bytes, principal.organization_id),
            )
            if meter is not None
        ]

    @contextmanager
    def long_poll(self, principal: Principal) -> Iterator[None]:
        """Around a request that waits. Raises QuotaExceeded."""
        with ExitStack() as held:
            for polls, party in (
                (self._key_polls, principal.key_id),
                (self._organization_polls, principal.organization_id),
            ):
                if polls is not None:
                    if (standing := polls.refusal(party, 1, 0)) is not None:
                        raise exceeded(standing)
                    held.enter_context(polls.one_more(party))
            yield


class Strangers:
    """Failed authentications of each address.

    After too many failures, requests from the address are refused until its minute is over. Keys that have been valid before
    are still accepted, so that other clients of the same address can go on.
    """

    def __init__(self, failures: PerMinute) -> None:
        self._failures = failures
        self._good: dict[bytes, None] = {}  # digests, the last used at the end

    def check(self, scope: Scope, key: bytes) -> None:
        """Before the key is looked up. Raises QuotaExceeded."""
        who, now = subscriber(scope), time.monotonic()
        if self._failures.is_spent(who, now) and digest(key) not in self._good:
            raise self._refused(who, now)

    def knows(self, key: bytes) -> None:
        """The key is good."""
        hashed = digest(key)
        self._good.pop(hashed, None)
        self._good[hashed] = None
        if len(self._good) > MOST_PARTIES:
            del self._good[next(iter(self._good))]

    def failed(self, scope: Scope, key: bytes | None) -> Unauthorized | QuotaExceeded:
        """One more failure, and how it is answered."""
        if key is not None:
            self._good.pop(digest(key), None)
        now, who = time.monotonic(), subscriber(scope)
        if self._failures.is_spent(who, now):
            return self._refused(who, now)
        self._failures.count(who, now)
        return Unauthorized()

    def _refused(self, who: str, now: float) -> QuotaExceeded:
        standing = self._failures.count(who, now)
        assert standing is not None  # noqa: S101 - nothing was left before
        return beyond(standing)
