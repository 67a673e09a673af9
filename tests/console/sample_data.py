"""A small company at night, made through the API: what the console is looked at with, by its tests and for its screenshots."""

import base64
import json
import struct
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.client import Client, file_input
from tests.support.stack import Stack
from tests.support.waiting import until

# What a caller may write anywhere: none of it may become more than text.
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def picture(width: int = 320, height: int = 180) -> bytes:
    """A PNG that looks a little like a login form with an error on it."""

    def pixel(x: int, y: int) -> bytes:
        if y < 22:
            return b"\x2b\x3a\x55"
        if 90 < x < 230 and 40 < y < 150:
            if 104 < x < 216 and (58 < y < 72 or 82 < y < 96):
                return b"\xff\xff\xff"
            if 104 < x < 216 and 106 < y < 118:
                return b"\xd8\x3a\x3a"
            if 160 < x < 216 and 126 < y < 140:
                return b"\x2b\x5f\xd9"
            return b"\xe9\xec\xf1"
        return b"\xc4\xcc\xd8"

    rows = b"".join(b"\x00" + b"".join(pixel(x, y) for x in range(width)) for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def failed_login() -> list[dict[str, Any]]:
    """The history of an attempt whose password was wrong, as an executor with a vendor's model reports it."""
    shot = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture()).decode()},
    }
    return [
        {"role": "user", "content": "Log in as ada, open the invoices of September and post each to the ledger."},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I open the ledger and log in."},
                {"type": "tool_use", "id": "t1", "name": "type_text", "input": {"field": "User", "text": "ada"}},
                {
                    "type": "tool_use",
                    "id": "t2",
                    "name": "type_secret",
                    "input": {"field": "Password", "name": "password"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "Login failed: the password is not valid."}, shot],
                }
            ],
        },
        {
            "role": "assistant",
            "content": "The ledger refuses the password of user “ada”. I stop here: after three failures it locks the account.",
        },
    ]


@dataclass
class Scene:
    """Ids by what they are."""

    workflows: dict[str, str] = field(default_factory=dict)
    machines: dict[str, str] = field(default_factory=dict)
    pools: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    endpoints: dict[str, str] = field(default_factory=dict)


def night(stack: Stack, api: Client, *, past: int = 26) -> Scene:
    """Machines, pools, workflows, and runs in every state; the run `failed` is the one to find and to mend.

    `past` is how many other runs have ended.
    """
    scene = Scene()
    for name in ("Post invoices", "Month-end report", "Update supplier data", "Check deliveries"):
        body = {"name": name, "main_prompt": f"{name} in the ledger."}
        scene.workflows[name] = api.json_of(api.post("/v1/workflows", json=body), 201)["id"]
    for number in range(1, 7):
        name = f"desk-{number}"
        body = {"fingerprint": f"{name}-{api.organization}", "unkey_key_id": "key", "name": name, "hostname": name}
        scene.machines[name] = api.json_of(api.post("/v1/machines", json=body), 201)["id"]
    api.json_of(api.patch(f"/v1/machines/{scene.machines['desk-6']}", json={"status": "disconnected"}))
    for name, numbers in {"Finance": (1, 2, 3), "Office": (3, 4, 5, 6)}.items():
        pool = api.json_of(api.post("/v1/pools", json={"name": name}), 201)["id"]
        members = {"machine_ids": [scene.machines[f"desk-{number}"] for number in numbers]}
        api.json_of(api.post(f"/v1/pools/{pool}/machines", json=members))
        scene.pools[name] = pool
    _history(stack, api, scene, past)
    _present(stack, api, scene)
    _later(api, scene)
    _webhooks(stack, api, scene)
    return scene


def _run(api: Client, scene: Scene, workflow: str, **options: object) -> str:
    created = api.json_of(api.post("/v1/runs", json={"workflow_id": scene.workflows[workflow], **options}), 201)
    return str(created["id"])


def _assigned(api: Client, run: str) -> str:
    """The run, when it has its machine."""
    until(lambda: api.get_run(run)["assigned_machine_id"], what="the assignment")
    return run


def _history(stack: Stack, api: Client, scene: Scene, past: int) -> None:
    """Runs that have ended, spread over the night."""
    for number in range(past):
        workflow = ["Check deliveries", "Update supplier data", "Month-end report"][number % 3]
        run = _run(api, scene, workflow, machine_id=scene.machines[f"desk-{number % 5 + 1}"])
        api.report(_assigned(api, run), status="running")
        if number in (4, 17):
            api.report(run, status="error", error=["The window “Suppliers” did not appear within 30 s."])
        elif number == 9:
            api.report(run, status="cancelled", error=["Cancelled: the ledger was closed for maintenance."])
        else:
            api.report(run, status="success", output_data={"checked": 12 + number}, run_message_history=[])
        _at(stack, run, minutes=35 + 19 * (26 - number), seconds=20 + 13 * (number % 7))
    failed = _run(
        api,
        scene,
        "Post invoices",
        pool_ids=[scene.pools["Finance"]],
        input_values={"user": "ada", "ledger": "2026", "invoices": [1001, 1002, 1003]},
        sensitive_input_values={"password": "wrong horse", "account": {"number": 4711}},
        file_inputs=[
            file_input(b"%PDF-1.4 invoice 1001\n" * 900, "invoices-september.pdf", target_path="C:\\in\\september.pdf"),
            file_input(b"1001;120.00\n1002;80.50\n", "accounts.csv"),
        ],
    )
    for attempt in (1, 2):
        api.report(_assigned(api, failed), status="running")
        api.upload(failed, picture(), "last-screen.png")
        api.report(
            failed,
            status="error",
            attempt=attempt,
            error=["Login failed: the ledger refused the password of user “ada”.\nStep 2 of 6, window “Sign in”."],
            run_message_history=failed_login(),
        )
        if attempt == 1:
            api.json_of(api.retry(failed, is_priority=True, reason="The ledger was restarted, it may work now."))
    _at(stack, failed, minutes=24, seconds=41)
    stack.sql(
        "UPDATE run_attempts SET started_at = $2, ended_at = $3, retried_at = $4 WHERE run_id = $1",
        failed,
        *(datetime.now(UTC) - timedelta(seconds=seconds) for seconds in (5400, 5340, 1490)),
    )
    stack.sql("UPDATE runs SET created_at = $2 WHERE id = $1", failed, datetime.now(UTC) - timedelta(seconds=5460))
    scene.runs["failed"] = failed


def _present(stack: Stack, api: Client, scene: Scene) -> None:
    """What runs and what waits now."""
    for number, workflow in ((1, "Post invoices"), (4, "Check deliveries")):
        run = _run(api, scene, workflow, machine_id=scene.machines[f"desk-{number}"])
        api.report(_assigned(api, run), status="running")
        _began(stack, run, seconds=95 * number)
        scene.runs[f"running-{number}"] = run
    waiting: list[dict[str, object]] = [{"machine_id": scene.machines[name]} for name in ("desk-6", "desk-1", "desk-1")]
    waiting.append({"pool_ids": list(scene.pools.values()), "machine_id": scene.machines["desk-4"]})
    for number, options in enumerate(waiting):
        run = _run(api, scene, "Update supplier data", **options)
        age = datetime.now(UTC) - timedelta(seconds=700 - 160 * number)
        stack.sql("UPDATE runs SET created_at = $2, queued_at = $2 WHERE id = $1", run, age)
        scene.runs[f"waiting-{number}"] = run


def _later(api: Client, scene: Scene) -> None:
    """A run that is held for two hours, and one that its workflow's policy will retry."""
    at = datetime.now(UTC) + timedelta(hours=2, seconds=30)
    scene.runs["held"] = _run(api, scene, "Month-end report", not_before=at.isoformat())
    policy = {
        "max_retries": 3,
        "delays_seconds": [600, 1800, 3600],
        "jitter": 0.1,
        "on": [{"status": "error", "error_contains": "did not appear"}, {"status": "error", "error_code": "timeout"}],
    }
    workflow = scene.workflows["Check deliveries"]
    api.json_of(api.patch(f"/v1/workflows/{workflow}", json={"retry_policy": policy}))
    planned = _run(api, scene, "Check deliveries", machine_id=scene.machines["desk-2"])
    api.report(_assigned(api, planned), status="running")
    api.report(planned, status="error", error=["The window “Deliveries” did not appear within 30 s."])
    scene.runs["planned"] = planned


def _webhooks(stack: Stack, api: Client, scene: Scene) -> None:
    """Two endpoints, and what they were sent of the failed run. Nothing is due within the test, so nothing is connected to."""
    for name, url in (
        ("ledger", "https://ledger.acme.example/hooks/runs"),
        ("chat", "https://chat.acme.example/in/4711"),
    ):
        scene.endpoints[name] = api.webhook_endpoint()
        stack.sql(
            "UPDATE webhook_endpoints SET url = $2, description = $3, created_at = now() - interval '3 days',"
            " failing_since = CASE WHEN $3 = 'chat' THEN now() - interval '38 minutes' END WHERE id = $1",
            scene.endpoints[name],
            url,
            name,
        )
    for attempt, minutes in ((1, 88), (2, 24)):
        [event] = stack.sql(
            "INSERT INTO webhook_events (id, organization_id, run_id, attempt, event_type, occurred_at, body, is_fanned_out)"
            " VALUES (gen_random_uuid(), $1, $2, $3, 'run_complete', now() - make_interval(mins => $4), '{}', true)"
            " RETURNING id",
            api.organization,
            scene.runs["failed"],
            attempt,
            minutes,
        )
        for name in scene.endpoints:
            _delivery(
                stack, api, scene.endpoints[name], event["id"], minutes, [503, 503, None] if name == "chat" else [204]
            )


def _delivery(stack: Stack, api: Client, endpoint: str, event: object, minutes: int, answers: list[int | None]) -> None:
    """One that was answered so, the last answer last; a failed one of more than an hour ago is not tried any more."""
    delivered = answers[-1] == 204
    tries = [
        {
            "tried_at": (datetime.now(UTC) - timedelta(minutes=minutes - 6 * number)).isoformat(),
            "duration_ms": 41 if answer else 15_003,
            "response_status": answer,
            "response_body": '{"error": "queue is full"}' if answer == 503 else "",
            "error": None if answer else "timeout",
        }
        for number, answer in enumerate(answers)
    ][::-1]
    stack.sql(
        "INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id, status, tries, due_at, created_at,"
        " tried_at, duration_ms, response_status, response_body, error, last_tries)"
        " VALUES (gen_random_uuid(), $1, $2::text::uuid, $3, $4, $5, now() + interval '17 minutes',"
        " now() - make_interval(mins => $6), $7::text::timestamptz, $8, $9, $10, $11, $12)",
        event,
        endpoint,
        api.organization,
        "delivered" if delivered else "failed" if minutes > 60 else "pending",
        len(tries),
        minutes,
        *tries[0].values(),
        json.dumps(tries),
    )


def _at(stack: Stack, run: str, *, minutes: float, seconds: float) -> None:
    """As if it had been created so long ago, waited a little and run for those seconds."""
    created = datetime.now(UTC) - timedelta(minutes=minutes)
    began = created + timedelta(seconds=3 + minutes % 7)
    stack.sql(
        "UPDATE runs SET created_at = $2, queued_at = $2, started_at = $3, ended_at = $4 WHERE id = $1",
        run,
        created,
        began,
        began + timedelta(seconds=seconds),
    )


def _began(stack: Stack, run: str, *, seconds: float) -> None:
    began = datetime.now(UTC) - timedelta(seconds=seconds)
    created = began - timedelta(seconds=4)
    stack.sql("UPDATE runs SET created_at = $2, queued_at = $2, started_at = $3 WHERE id = $1", run, created, began)
