"""What schemathesis cannot know of this service. Loaded by the process that test_fuzz.py starts."""

import json
import os
import re
from typing import Any
from uuid import uuid4

import httpx
import schemathesis

from app.schemas.numbers import is_kept
from app.schemas.webhooks import URL_PATTERN

# The id in the document's examples, and what it stands for: names of fields, and ids that exist.
EXAMPLE = "3c90c3cc-0d44-4b50-8888-8dd25736052a"
TARGETS = {"machine_id", "pool_ids"}  # of a run that waits
THINGS: dict[str, Any] = json.loads(os.environ["FUZZ_THINGS"])

HTTP = httpx.Client(
    base_url=os.environ["FUZZ_URL"], headers={"Authorization": f"Bearer {os.environ['FUZZ_KEY']}"}, trust_env=False
)


@schemathesis.hook
def before_call(_: Any, case: schemathesis.Case[Any], __: Any) -> None:
    """What would make most requests end at the same few refusals is put right before they are sent."""
    if "wait" in case.query:  # nobody waits for half a minute here
        case.query["wait"] = 0 if case.query.get("search") else _shorter(case.query["wait"])
    after = case.query.get("after")
    # A cursor is what a page has said: no pattern makes one of that very list. Those of events are numbers.
    if isinstance(after, str) and re.fullmatch("[A-Za-z0-9_-]{0,200}", after) and not case.path.endswith("/events"):
        case.query["after"] = ""
    if "attempt" in case.query and not case.query.get("run_id"):  # the document says in words that it needs the run
        case.query["run_id"] = str(uuid4())
    key = case.headers.get("Idempotency-Key")
    # A key belongs to one request: the next one with it would be 422.
    if isinstance(key, str) and re.fullmatch("[!-~]{1,255}", key):
        case.headers["Idempotency-Key"] = uuid4().hex
    if case.path.endswith(("/retry", "/retry/dry-run")) and _is_uuid(run_id := case.path_parameters.get("run_id")):
        # Only a run that has ended can be retried.
        HTTP.patch(f"/v1/runs/{run_id}", json={"status": "cancelled"})
    if isinstance(case.body, dict):
        case.body.update(
            {name: THINGS[name] for name in THINGS.keys() & case.body.keys() if EXAMPLE in str(case.body[name])}
        )
        _obey(case.body)
        if case.method == "PATCH" and len(case.body) > 1:
            # Each of these is sent in a request of its own, which the document says in words.
            for name in ("next_retry_at", "not_before"):
                if name in case.body and (case.body[name] is None or _is_time(case.body[name])):
                    del case.body[name]
        if case.method == "PATCH" and case.path.startswith("/v1/runs/") and case.body.keys() - TARGETS - {"reason"}:
            for name in TARGETS & case.body.keys():
                if _is_target(case.body[name]):
                    del case.body[name]
        case.body = _inexact(case.body)


def _inexact(value: Any) -> Any:
    """Whole numbers beyond 64 bits are taken if a double gives them back, which the document says in words. Others are sent."""
    if isinstance(value, dict):
        return {name: _inexact(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_inexact(one) for one in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        while is_kept(value):
            value += 1
    return value


def _shorter(wait: Any) -> Any:
    try:
        return min(float(wait), 0.05)
    except (TypeError, ValueError):
        return wait


def _obey(body: dict[str, Any]) -> None:
    """Rules that the document can only say in words: not both sessions, no alias without one, no claim without the assignment
    that it is of, a run's own outputs."""
    if isinstance(body.get("session_id"), str) and body.get("start_session") is True:
        body["start_session"] = False
    if isinstance(body.get("session_alias"), str) and body.get("session_id") is None:
        body["start_session"] = body.get("start_session") or True
    if isinstance(body.get("claim"), str) and body.get("assignment") is None:
        body["assignment"] = 0
    if isinstance(body.get("url"), str) and re.fullmatch(URL_PATTERN, body["url"]) and len(body["url"]) <= 2048:
        body["url"] = "https://localhost/"  # it may be registered, but is not connected to: nothing leaves this machine
    if isinstance(body.get("output_attachment_ids"), list):
        body["output_attachment_ids"] = [one for one in body["output_attachment_ids"] if not _is_uuid(one)]


def _is_time(value: object) -> bool:
    return isinstance(value, str) and re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt]", value) is not None


def _is_target(value: object) -> bool:
    return value is None or _is_uuid(value) or (isinstance(value, list) and all(map(_is_uuid, value)))


def _is_uuid(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f-]{36}", value) is not None


@schemathesis.check
def documented_code(_: Any, response: schemathesis.Response, case: schemathesis.Case[Any]) -> None:
    """A refusal's code is one that the document names for this operation and status."""
    if response.headers.get("content-type", [""])[0] != "application/problem+json" or response.status_code == 405:
        return
    described = case.operation.definition.raw["responses"].get(str(response.status_code), {}).get("description", "")
    code = response.json()["code"]
    assert f"`{code}`" in described, f"{code} is not documented: {described!r}"
