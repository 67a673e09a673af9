"""The rules of a retry policy: whether an attempt that has ended is to be retried by itself, and when.

Pure: nothing is read, written or made up here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson

# Statuses for which a run may be retried by itself. A cancelled run is never retried: a caller wanted it to stop.
FAILED = frozenset({"error", "task_failed"})


class Rule(NamedTuple):
    """Which endings are retried: all that is given must hold."""

    status: str
    error_contains: str | None
    error_code: str | None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """A policy as a workflow stores it. Keys that a newer version has stored are ignored."""

    max_retries: int
    delays_seconds: Sequence[float]  # before the first retry, the second, ...; the last one repeats
    jitter: float
    rules: Sequence[Rule]  # none: every ending in `error`
    avoids_last_machine: bool
    sends_every_ending: bool

    @classmethod
    def parse(cls, stored: str | bytes) -> "RetryPolicy":
        policy: dict[str, Any] = orjson.loads(stored)
        rules = [
            Rule(one["status"], one.get("error_contains"), one.get("error_code")) for one in policy.get("on") or ()
        ]
        return cls(
            policy["max_retries"],
            policy["delays_seconds"],
            policy["jitter"],
            rules,
            policy["avoid_last_machine"],
            policy["webhooks"] == "every",
        )

    def matching_rule(self, ending: "Ending") -> int | None:
        """The number of the first rule that matches, from 1; 0 if the policy has no rules; None if nothing matches."""
        if not self.rules:
            return 0 if ending.status == "error" else None
        for number, rule in enumerate(self.rules, 1):
            if (
                rule.status == ending.status
                and rule.error_code in (None, ending.error_code)
                and (rule.error_contains is None or any(rule.error_contains in line for line in ending.error))
            ):
                return number
        return None


@dataclass(frozen=True, slots=True)
class Ending:
    """What the rules need to know of an attempt that has ended."""

    status: str
    error: Sequence[str]
    error_code: str | None
    ended_at: datetime  # by the database's clock
    automatic_retries: int | None  # retries since a caller last asked for this run; None: none are wanted
    has_secret: bool
    inputs_expire_at: datetime | None  # when the first input file expires


@dataclass(frozen=True, slots=True)
class Planned:
    """The attempt is to be retried."""

    due_at: datetime
    rule: int
    avoids_last_machine: bool
    owes_event: bool  # its `run_complete` was not sent, and is if the plan is dropped


@dataclass(frozen=True, slots=True)
class Dropped:
    """The attempt would be retried, but by then it could not: the code of the refusal that the retry would meet."""

    code: str
    rule: int


def decide(
    policy: RetryPolicy, ending: Ending, *, spread: float, cooldown_seconds: float, keeps_secrets: bool
) -> Planned | Dropped | None:
    """What follows from an ending; None: nothing.

    `spread` is a number from -1 to 1 that says where within the jitter the delay lies. `keeps_secrets`: a finished run's secret
    is kept for a time, and not destroyed at once.
    """
    if ending.automatic_retries is None or ending.automatic_retries >= policy.max_retries:
        return None
    rule = policy.matching_rule(ending)
    if rule is None:
        return None
    if ending.has_secret and not keeps_secrets:
        return Dropped("sensitive_inputs_expired", rule)
    delay = policy.delays_seconds[min(ending.automatic_retries, len(policy.delays_seconds) - 1)]
    delay *= 1 + policy.jitter * spread
    due_at = ending.ended_at + timedelta(seconds=max(delay, cooldown_seconds))
    if ending.inputs_expire_at is not None and ending.inputs_expire_at <= due_at:
        return Dropped("input_attachments_expired", rule)
    return Planned(due_at, rule, policy.avoids_last_machine, owes_event=not policy.sends_every_ending)


def reason(rule: int) -> str:
    """Why a run is retried, for the archive and the events."""
    return f"Rule {rule} of the workflow's retry policy matched." if rule else "The workflow's retry policy."
