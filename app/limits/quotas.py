"""Quotas: how much one party may use, how much of it is left, and how a reply says so.

A party is a key, an organization or an address; this module knows their names and numbers only. Each process counts
for itself. Quotas on runs are counted in the database (runs/quotas.py). The library `limits` was tried: a count costs 13 us
and the standing for a reply another 13 us, while a plain retry costs 350 us and both costs are 2 us here. It also keeps every
party in memory; this module forgets the oldest ones.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11: lists of structured fields (RFC 9651).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil

from app.config import Settings
from app.errors import QuotaExceeded
from app.telemetry import metrics

MINUTE = 60

# Parties that a count remembers at once. A client with more addresses can make it forget; no client can make it grow.
MOST_PARTIES = 20_000

# When a quota will have room again is known only of those that are by the minute.
RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Policy:
    """A quota of one kind of party. `window` is in seconds; None: the quota is on what a party uses at the same time."""

    name: str
    quota: int
    what: str  # the thing that the quota counts, as a word for a sentence
    unit: str = "requests"  # as the draft's registry of quota units names it
    window: int | None = None

    def near(self, left: int) -> bool:
        """Whether so little is left that a reply tells it."""
        return left * 10 < self.quota


@dataclass(frozen=True, slots=True)
class Standing:
    """How much of a quota is left, and in how many seconds all or more of it is there again, if that is known."""

    policy: Policy
    left: int
    seconds: int | None = None


def fields(standings: Sequence[Standing]) -> dict[str, str]:
    """The two header fields for these quotas."""
    policies, states = [], []
    for standing in standings:
        policy = standing.policy
        unit = "" if policy.unit == "requests" else f';qu="{policy.unit}"'
        window = "" if policy.window is None else f";w={policy.window}"
        until = "" if standing.seconds is None else f";t={standing.seconds}"
        policies.append(f'"{policy.name}";q={policy.quota}{unit}{window}')
        states.append(f'"{policy.name}";r={standing.left}{until}')
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}


def beyond(standing: Standing) -> QuotaExceeded:
    """The refusal of a request after which less than 0 is left."""
    refusal = exceeded(replace(standing, left=0))
    refusal.times = -standing.left
    return refusal


def exceeded(*standings: Standing, is_too_large: bool = False) -> QuotaExceeded:
    """The refusal of a request that would go beyond these quotas; `is_too_large`: whenever it is sent."""
    for one in standings:
        metrics.quota_refusals.add(one.policy.name)
    wait = max(RETRY_SECONDS if one.seconds is None else one.seconds for one in standings)
    quota = " and ".join(
        f"{one.policy.name} ({one.policy.quota} {one.policy.what}{' a minute' if one.policy.window else ' at once'})"
        for one in standings
    )
    advice = "Ask for fewer at a time." if is_too_large else f"Send the request again in {wait} s."
    return QuotaExceeded(
        f"This request goes over the quota {quota}; nothing was changed. {advice}",
        headers=fields(standings) | {"Retry-After": str(wait)},
        **{"violated-policies": [one.policy.name for one in standings]},
    )


class PerMinute:
    """How often each party did something within a minute that began when it first did."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        # When the minute ends, and how much is left of it. In the order in which the minutes began.
        self._minutes: dict[object, list[float]] = {}

    def count(self, party: object, now: float) -> Standing | None:
        """Once more. None while much is left; less than 0 left is too much."""
        minute = self._minutes.get(party)
        if minute is None or minute[0] <= now:
            minute = self._begin(party, now)
        minute[1] -= 1
        left = minute[1]
        return Standing(self.policy, int(left), ceil(minute[0] - now)) if left * 10 < self.policy.quota else None

    def is_spent(self, party: object, now: float) -> bool:
        """Whether a party has nothing left. This call does not count."""
        minute = self._minutes.get(party)
        return minute is not None and minute[0] > now and minute[1] <= 0

    def _begin(self, party: object, now: float) -> list[float]:
        minute = [now + MINUTE, self.policy.quota]
        _begin(self._minutes, party, minute, now)
        return minute


def _begin(spans: dict[object, list[float]], party: object, span: list[float], now: float) -> None:
    """Begin a party's span of time. Spans that are over are dropped, and the oldest ones if there are too many."""
    spans.pop(party, None)
    while spans:
        oldest = next(iter(spans))
        if spans[oldest][0] > now and len(spans) < MOST_PARTIES:
            break
        del spans[oldest]
    spans[party] = span


@dataclass(slots=True)
class Allowance:
    """How often a party may act uncounted, after a count has shown how far it is from its quota."""

    until: float = 0.0
    left: int = 0
    under_way: int = 0
    is_counting: bool = False

    def is_to_be_counted(self, now: float) -> bool:
        """False for the first of a second, and while there is something left or a count is under way."""
        if self.until <= now:
            self.until, self.left = now + 1, 0
            return False
        return self.left < 1 and not self.is_counting

    @contextmanager
    def counting(self) -> Iterator[Callable[[int], None]]:
        """Call what this yields with how many the count allows. It has not seen those that were under way when it began."""
        unseen, self.is_counting = self.under_way, True

        def allow(count: int) -> None:
            self.left = max(count - unseen, 0)

        try:
            yield allow
        finally:
            self.is_counting = False

    def take(self) -> bool:
        """Whether one may go uncounted. If so, call `end` when it has ended."""
        if self.left < 1:
            return False
        self.left -= 1
        self.under_way += 1
        return True

    def end(self) -> None:
        """Note that an action that was taken is committed, or has failed."""
        self.under_way -= 1


class Allowances:
    """The allowance of each party, for as long as it is used."""

    def __init__(self) -> None:
        self._parties: dict[object, Allowance] = {}

    def of(self, party: object, now: float) -> Allowance:
        """The allowance of a party. The oldest unused allowances are dropped."""
        allowance = self._parties.get(party)
        if allowance is None:
            for oldest in list(islice(self._parties, 2)):
                if (old := self._parties.pop(oldest)).under_way or old.is_counting or old.until > now:
                    self._parties[oldest] = old
            allowance = self._parties[party] = Allowance()
        return allowance


class AtOnce:
    """How much each party holds at the same time. A party that holds nothing may always begin, whatever the amount."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._held: dict[object, int] = {}

    def refusal(self, party: object, more: int, own: int) -> Standing | None:
        """Where the party stands if a request that holds `own` may not have so much more."""
        others = self._held.get(party, 0) - own
        if others <= 0 or others + own + more <= self.policy.quota:
            return None
        return Standing(self.policy, max(self.policy.quota - others - own, 0))

    def add(self, party: object, count: int) -> None:
        """A negative count gives back."""
        held = self._held.get(party, 0) + count
        if held:
            self._held[party] = held
        else:
            self._held.pop(party, None)

    @contextmanager
    def one_more(self, party: object) -> Iterator[None]:
        """Count one within the block. The caller has asked `refusal` before."""
        self.add(party, 1)
        try:
            yield
        finally:
            self.add(party, -1)


@dataclass(frozen=True, slots=True)
class RunQuotas:
    """The quotas on runs, for a key and for its organization; None: no quota."""

    key_waiting: Policy | None
    organization_waiting: Policy | None
    key_created: Policy | None
    organization_created: Policy | None
    allowances: Allowances = field(default_factory=Allowances, compare=False)

    @classmethod
    def of(cls, settings: Settings) -> "RunQuotas | None":
        """None if there are none."""
        own = cls(
            policy("key-waiting-runs", settings.quota_key_waiting_runs, "waiting runs", unit="runs"),
            policy("organization-waiting-runs", settings.quota_organization_waiting_runs, "waiting runs", unit="runs"),
            policy("key-runs", settings.quota_key_runs_per_minute, "new runs", unit="runs", window=MINUTE),
            policy(
                "organization-runs", settings.quota_organization_runs_per_minute, "new runs", unit="runs", window=MINUTE
            ),
        )
        return own if own != cls(None, None, None, None) else None


def policy(name: str, quota: int, what: str, *, unit: str = "requests", window: int | None = None) -> Policy | None:
    """A quota of 0 is none."""
    return Policy(name, quota, what, unit, window) if quota else None
