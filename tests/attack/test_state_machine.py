"""A run's life in random order against the real services, with a small model beside it that knows only the contract.

Each step is a request (or some at once), a collector's pass on a clock that is ahead, a part that goes away or comes back.
After each the model must agree with what the service shows, and the invariant must hold. It ends with all that is not
named collected, and then with everything deleted.
"""

import asyncio
import copy
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.resources.machines import MACHINE_DELETED
from app.runs.attachments import expire_attachments
from app.scheduling.silence import look_for_silence
from app.stores import deletions
from app.stores.database import Database
from app.stores.files import FileStore
from app.stores.vault import VaultSecrets
from tests.support.client import Client, file_input
from tests.support.concurrent_requests import Call, send_at_once
from tests.support.server import Server, start_server
from tests.support.stack import Stack, settings_of
from tests.support.stored_state import DAY, SEED, SOAK, assert_exactly_named, assert_nothing_lost, collect_all
from tests.support.waiting import NEVER, until

STEPS = 200 * (1 + SOAK)
SECONDS = 60 * (1 + SOAK)  # for all of them, on a busy machine
UNKNOWN = str(uuid4())
MOST_RUNS = 6  # what is looked at after each step grows with them

# --- the model --------------------------------------------------------------------------------------------------------

TERMINAL = {"success", "error", "cancelled", "task_failed"}
NEXT = {"scheduling": {"running", "error", "cancelled"}, "running": TERMINAL}
Body = dict[str, Any]


class Request(NamedTuple):
    """What is sent, and what the model needs to know of it."""

    kind: str
    method: str
    path: str
    body: Body | None = None
    target: str = ""
    key: str | None = None

    @property
    def call(self) -> Call:
        return Call(self.method, self.path, self.body, self.key)


class Outcome(NamedTuple):
    """Status, code of a refusal, and whether it was replayed."""

    status: int
    code: str = ""
    replayed: bool = False


@dataclass
class Attachment:
    run_id: str
    kind: str
    content: bytes
    expired: bool = False
    collected: bool = False


@dataclass
class Run:
    workflow_id: str
    values: Body | None = None
    secrets: dict[str, str] | None = None
    secrets_expired: bool = False
    pin: str | None = None
    pools: list[str] | None = None
    session: str | None = None
    alias: str | None = None
    release: bool | None = None
    priority: bool = False
    status: str = "scheduling"
    attempt: int = 1
    error: list[str] | None = None
    output: Body | None = None
    history: list[Body] | None = None
    assignment: int = 0
    assigned: str | None = None
    awaited: bool = False  # its machine is expected to begin it
    begun: bool = False  # by somebody, in this attempt
    claim: str | None = None  # of whoever has begun it
    archive: list[tuple[int, str, list[str]]] = field(default_factory=list)


@dataclass
class Machine:
    """What is known of the last run that began on it."""

    starts_with_claim: bool = False
    session: str | None = None


def stored(secrets: Body) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in secrets.items()}


def decoded(file: Body) -> bytes:
    return {FILES[0]["content"]: b"one", FILES[1]["content"]: b"two"}[file["content"]]


class Model:
    """What the contract says about one organization."""

    def __init__(self, workflows: Sequence[str], machines: Sequence[str], pools: Sequence[str]) -> None:
        self.workflows, self.pools = set(workflows), set(pools)
        self.machines = {name: Machine() for name in machines}
        self.runs: dict[str, Run] = {}
        self.attachments: dict[str, Attachment] = {}
        self.keys: dict[str, tuple[Request, int, bytes]] = {}
        self.down: set[str] = set()

    # What may be answered. If more than one refusal applies, any of them may.

    def expect(self, request: Request) -> set[Outcome]:
        if request.key in self.keys:
            first, status, content = self.keys[request.key]
            if first != request:
                return {Outcome(422)}
            run_id = None if request.kind == "bulk" else self._about(request, content)
            gone = run_id is not None and run_id not in self.runs
            return {Outcome(404, "run_not_found", replayed=True) if gone else Outcome(status, replayed=True)}
        refusals, needs, success = getattr(self, f"expect_{request.kind}")(request.target, request.body or {})
        return refusals or {Outcome(503, f"{part}_unavailable") for part in needs & self.down} or {Outcome(success)}

    @staticmethod
    def _about(request: Request, content: bytes) -> str | None:
        """The run that a reply shows something of; None: of none."""
        if not content:
            return None
        reply = json.loads(content)
        return str(reply["run_id" if request.kind in ("upload", "expire") else "id"])

    def _left(self, request: Request, content: bytes) -> bytes:
        """A reply as it is replayed: a bulk's without the runs that are gone."""
        if request.kind != "bulk":
            return content
        reply = json.loads(content)
        reply["created_runs"] = [run for run in reply["created_runs"] if run["id"] in self.runs]
        return json.dumps(reply).encode()

    def expect_create(self, _: str, body: Body) -> tuple[set[Outcome], set[str], int]:
        refusals = self._targets(body)
        if body["workflow_id"] not in self.workflows:
            refusals.add(Outcome(404, "workflow_not_found"))
        joins, starts = bool(body.get("session_id")), bool(body.get("start_session"))
        if (joins and starts) or (body.get("session_alias") and not (joins or starts)):
            refusals = {Outcome(422)}
        return refusals, self._needs(body), 201

    expect_bulk = expect_create

    def expect_retry(self, run_id: str, body: Body) -> tuple[set[Outcome], set[str], int]:
        if body.get("session_id") and body.get("start_session"):
            return {Outcome(422)}, set(), 200
        run = self.runs.get(run_id)
        if run is None:
            return {Outcome(404, "run_not_found")}, set(), 200
        if run.status not in TERMINAL:
            return {Outcome(409, "run_not_terminal")}, set(), 200
        refusals = self._targets(body)
        if body.get("session_alias") and self._next_session(run, body)[0] is None:
            refusals.add(Outcome(422))
        if run.secrets and run.secrets_expired and body.get("sensitive_input_values") is None:
            refusals.add(Outcome(409, "sensitive_inputs_expired"))
        if body.get("file_inputs") is None and any(one.expired for one in self._of(run_id, "input").values()):
            refusals.add(Outcome(409, "input_attachments_expired"))
        return refusals, self._needs(body), 200

    def expect_report(self, run_id: str, body: Body) -> tuple[set[Outcome], set[str], int]:
        run = self.runs.get(run_id)
        if run is None:
            return {Outcome(404, "run_not_found")}, set(), 200
        only_stops = body.get("status") in (None, "cancelled") and body.keys() <= STOPPING
        if late := self._late(run, body, only_stops=only_stops):
            return late, set(), 200
        refusals: set[Outcome] = set()
        status = body.get("status") or run.status
        if status != run.status and status not in NEXT.get(run.status, ()):
            refusals.add(Outcome(409, "invalid_transition"))
        produced = ("error", "output_data", "run_message_history", "output_attachment_ids")
        if status == "scheduling" and any(body.get(name) is not None for name in produced):
            refusals.add(Outcome(409, "invalid_transition"))
        if not refusals and not set(body.get("output_attachment_ids") or ()) <= self._outputs(run_id):
            refusals.add(Outcome(422))
        return refusals, set(), 200

    @staticmethod
    def _late(run: Run, body: Body, *, only_stops: bool = False) -> set[Outcome]:
        """What a report or an upload says of itself, against what the run is at."""
        claim, assignment = body.get("claim"), body.get("assignment")
        if body.get("attempt") not in (None, run.attempt):
            return {Outcome(409, "attempt_superseded")}
        if assignment is not None:
            taken = run.status == "scheduling" and run.assigned is None and run.assignment > 0
            if taken or assignment != run.assignment:
                return {Outcome(409, "assignment_superseded")}
        if (run.begun and claim != run.claim) if claim else (run.claim is not None and not only_stops):
            return {Outcome(409, "already_claimed")}
        return set()

    def expect_upload(self, run_id: str, body: Body) -> tuple[set[Outcome], set[str], int]:
        run = self.runs.get(run_id)
        if run is None:
            return {Outcome(404, "run_not_found")}, set(), 201
        if late := self._late(run, body):
            return late, set(), 201
        return ({Outcome(409, "invalid_transition")} if run.status != "running" else set()), {"storage"}, 201

    def expect_delete(self, run_id: str, _: Body) -> tuple[set[Outcome], set[str], int]:
        return (set() if run_id in self.runs else {Outcome(404, "run_not_found")}), set(), 204

    def expect_delete_workflow(self, workflow_id: str, _: Body) -> tuple[set[Outcome], set[str], int]:
        return (set() if workflow_id in self.workflows else {Outcome(404, "workflow_not_found")}), set(), 204

    def expect_delete_machine(self, machine_id: str, _: Body) -> tuple[set[Outcome], set[str], int]:
        return (set() if machine_id in self.machines else {Outcome(404, "machine_not_found")}), set(), 204

    def expect_expire(self, attachment_id: str, _: Body) -> tuple[set[Outcome], set[str], int]:
        refusals = self._visible(attachment_id)
        if not refusals and self.attachments[attachment_id].collected:
            refusals = {Outcome(409, "input_attachments_expired")}
        return refusals, set(), 200

    def expect_delete_attachment(self, attachment_id: str, _: Body) -> tuple[set[Outcome], set[str], int]:
        return self._visible(attachment_id), set(), 204

    def _visible(self, attachment_id: str) -> set[Outcome]:
        one = self.attachments.get(attachment_id)
        gone = one is None or (one.kind == "output" and one.expired)
        return {Outcome(404, "attachment_not_found")} if gone else set()

    def _targets(self, body: Body) -> set[Outcome]:
        refusals = set()
        if body.get("machine_id") and body["machine_id"] not in self.machines:
            refusals.add(Outcome(404, "machine_not_found"))
        if not set(body.get("pool_ids") or ()) <= self.pools:
            refusals.add(Outcome(404, "pool_not_found"))
        if body.get("session_id") and body["session_id"] not in self.sessions():
            refusals.add(Outcome(404, "session_not_found"))
        return refusals

    def _needs(self, body: Body) -> set[str]:
        needs = {"vault"} if body.get("sensitive_input_values") else set()
        return needs | ({"storage"} if body.get("file_inputs") else set())

    def _of(self, run_id: str, kind: str) -> dict[str, Attachment]:
        return {name: one for name, one in self.attachments.items() if (one.run_id, one.kind) == (run_id, kind)}

    def sessions(self) -> list[str]:
        return list(dict.fromkeys(run.session for run in self.runs.values() if run.session is not None))

    @staticmethod
    def _next_session(run: Run, body: Body) -> tuple[str | None, str | None, bool | None]:
        """`new` stands for the id that the service chooses."""
        session, alias, release = run.session, run.alias, run.release
        if body.get("session_id"):
            session = body["session_id"]
        elif body.get("start_session"):
            session = "new"
        elif body.get("reuse_session") is False:
            session = alias = release = None
        alias = body.get("session_alias") or alias
        return session, alias, release if body.get("release_session_after") is None else body["release_session_after"]

    # What a success changes; `reply` gives the ids that the service chose.

    def apply(self, request: Request, outcome: Outcome, content: bytes) -> bool:
        """False if the reply does not show what it must."""
        if outcome.replayed:
            if outcome.status >= 400:
                return True
            left = self._left(request, self.keys[request.key or ""][2])
            return content == left or (request.kind == "bulk" and json.loads(content) == json.loads(left))
        if outcome.status >= 400:
            return True
        reply = json.loads(content or b"null")
        getattr(self, f"apply_{request.kind}")(request.target, request.body or {}, reply)
        if request.key is not None:
            self.keys[request.key] = (request, outcome.status, content)
        if request.kind in ("create", "retry", "report"):
            return shown(reply) == self.view(reply["id"])
        return True

    def apply_create(self, _: str, body: Body, reply: Body) -> None:
        started = reply["session_id"] if body.get("start_session") else None
        secrets = body.get("sensitive_input_values")
        self.runs[reply["id"]] = Run(
            workflow_id=body["workflow_id"],
            values=body.get("input_values"),
            secrets=None if secrets is None else stored(secrets),
            pin=body.get("machine_id"),
            pools=body.get("pool_ids"),
            session=started or body.get("session_id"),
            alias=body.get("session_alias"),
            release=body.get("release_session_after"),
            priority=bool(body.get("is_priority")),
        )
        self._attach(reply, body)

    def apply_bulk(self, _: str, body: Body, reply: Body) -> None:
        for run in reply["created_runs"]:
            self.apply_create("", body, run)
        assert len(reply["created_runs"]) == body["count"]

    def apply_retry(self, run_id: str, body: Body, reply: Body) -> None:
        run = self.runs[run_id]
        overridden = {name for name, value in body.items() if value is not None}
        overridden -= {"reuse_session"} if body.get("reuse_session") is not False else set()
        overridden -= {"start_session"} if not body.get("start_session") else set()
        run.archive.append((run.attempt, run.status, sorted(overridden)))
        run.status, run.attempt = "scheduling", run.attempt + 1
        run.error = run.output = run.history = run.assigned = run.claim = None
        run.begun = run.awaited = False
        for name in self._of(run_id, "output"):
            del self.attachments[name]
        if body.get("input_values") is not None:
            run.values = body["input_values"]
        if body.get("sensitive_input_values") is not None:
            run.secrets, run.secrets_expired = stored(body["sensitive_input_values"]), False
        if body.get("file_inputs") is not None:
            for name in self._of(run_id, "input"):
                del self.attachments[name]
            self._attach(reply, body)
        if body.get("machine_id"):
            run.pin = body["machine_id"]
        elif body.get("pool_ids") is not None:
            run.pin = None
        if body.get("pool_ids") is not None:
            run.pools = body["pool_ids"]
        old = run.session
        run.session, run.alias, run.release = self._next_session(run, body)
        if run.session == "new":
            run.session = reply["session_id"]
            assert run.session not in (None, old)
        if body.get("is_priority") is not None:
            run.priority = body["is_priority"]

    def apply_report(self, run_id: str, body: Body, _: Body) -> None:
        run = self.runs[run_id]
        if run.status == "scheduling" and body.get("status") == "running":
            run.begun, run.claim = True, body.get("claim")
            if run.assigned is not None:
                self.machines[run.assigned] = Machine(run.claim is not None, run.session)
        run.status = body.get("status") or run.status
        run.error = body.get("error", run.error)
        run.output = body.get("output_data", run.output)
        run.history = body.get("run_message_history", run.history)
        run.values = body.get("input_values", run.values)
        run.release = body.get("release_session_after", run.release)

    def apply_upload(self, run_id: str, body: Body, reply: Body) -> None:
        self.attachments[reply["id"]] = Attachment(run_id, "output", decoded(body))

    def apply_delete(self, run_id: str, _: Body, __: Body) -> None:
        del self.runs[run_id]
        self.attachments = {name: one for name, one in self.attachments.items() if one.run_id != run_id}

    def apply_delete_workflow(self, workflow_id: str, _: Body, __: Body) -> None:
        self.workflows.remove(workflow_id)
        for run_id in [name for name, run in self.runs.items() if run.workflow_id == workflow_id]:
            self.apply_delete(run_id, {}, {})

    def apply_delete_machine(self, machine_id: str, _: Body, __: Body) -> None:
        del self.machines[machine_id]
        for run in self.runs.values():
            if machine_id in (run.pin, run.assigned) and run.status not in TERMINAL:
                run.status, run.error = "error", [MACHINE_DELETED]
            run.pin = None if run.pin == machine_id else run.pin
            run.assigned = None if run.assigned == machine_id else run.assigned

    def apply_expire(self, attachment_id: str, body: Body, _: Body) -> None:
        self.attachments[attachment_id].expired = body["expires_at"] is not None

    def apply_delete_attachment(self, attachment_id: str, _: Body, __: Body) -> None:
        del self.attachments[attachment_id]

    def _attach(self, reply: Body, body: Body) -> None:
        for name, file in zip(reply["input_attachment_ids"], body.get("file_inputs") or (), strict=True):
            self.attachments[name] = Attachment(reply["id"], "input", decoded(file))

    # What happens beside requests.

    def given(self, run_id: str, machine_id: str, machine: Machine) -> None:
        run, self.machines[machine_id] = self.runs[run_id], machine
        run.assigned, run.assignment, run.awaited = machine_id, run.assignment + 1, True

    def time_to_begin_is_over(self) -> None:
        for run in self.runs.values():
            if run.status != "scheduling" or run.assigned is None or not run.awaited:
                continue
            run.awaited = False
            machine = self.machines[run.assigned]
            has_begun = run.session is not None and run.session == machine.session
            if machine.starts_with_claim and run.pin is None and not has_begun:
                run.assigned = None

    def collect(self, ahead: float) -> None:
        if ahead >= DAY:
            for run in self.runs.values():
                run.secrets_expired |= run.status in TERMINAL

    def tidy(self) -> None:
        for name, one in list(self.attachments.items()):
            if one.expired and one.kind == "output":
                del self.attachments[name]
            elif one.expired and self.runs[one.run_id].status in TERMINAL:
                one.collected = True

    # What is shown.

    def _outputs(self, run_id: str) -> set[str]:
        return {name for name, one in self._of(run_id, "output").items() if not one.expired}

    def view(self, run_id: str) -> Body:
        run = self.runs[run_id]
        return {
            "status": run.status,
            "attempt": run.attempt,
            "workflow_id": run.workflow_id,
            "assignment": run.assignment,
            "machine_id": run.assigned or run.pin,
            "assigned_machine_id": run.assigned,
            "error": run.error,
            "output_data": run.output,
            "run_message_history": run.history,
            "output_attachment_ids": sorted(self._outputs(run_id)),
            "input_attachment_ids": sorted(self._of(run_id, "input")),
            "input_values": run.values,
            "pool_ids": run.pools,
            "sensitive_input_aliases": None if run.secrets is None else sorted(run.secrets),
            "session_id": run.session,
            "session_alias": run.alias,
            "release_session_after": run.release,
            "is_priority": run.priority,
        }


def shown(run: Body) -> Body:
    """What the model has an opinion on."""
    aliases = run["sensitive_input_aliases"]
    return {
        "status": run["status"],
        "attempt": run["attempt"],
        "assignment": run["assignment"],
        "sensitive_input_aliases": None if aliases is None else sorted(aliases),
        "output_attachment_ids": sorted(run["output_attachment_ids"]),
        "input_attachment_ids": sorted(run["input_attachment_ids"]),
        **{
            name: run[name]
            for name in (
                *("workflow_id", "machine_id", "assigned_machine_id", "error", "output_data", "run_message_history"),
                *("input_values", "pool_ids", "session_id", "session_alias", "release_session_after", "is_priority"),
            )
        },
    }


# --- what is sent -----------------------------------------------------------------------------------------------------

FILES = [file_input(b"one", "one.txt"), file_input(b"two", "two.txt", target_path="C:\\in\\two.txt")]
ENDS = st.sampled_from(sorted(TERMINAL))
CLAIMS = [str(uuid4()) for _ in range(2)]  # of two executor processes
STOPPING = {"status", "reason", "release_session_after", "attempt", "assignment", "claim"}
VALUES = st.sampled_from([{}, {"a": 1}, {"b": {"c": [1.5, None]}}])
REPORTED: dict[str, st.SearchStrategy[Any]] = {
    "error": st.sampled_from([None, ["it broke"]]),
    "output_data": st.sampled_from([None, {"answer": 42}]),
    "run_message_history": st.sampled_from([None, [{"role": "assistant"}]]),
    "input_values": VALUES,
    "release_session_after": st.booleans(),
}


def mostly(known: Sequence[str], unknown: str = UNKNOWN) -> st.SearchStrategy[str]:
    return st.sampled_from([*known, *known, *known, unknown])


# --- the machine ------------------------------------------------------------------------------------------------------


class QuickStack(Stack):
    """The same stack, and a collector that runs when it is told to."""

    def connect(self) -> None:
        # Made once: making them asks Vault, which may be down later.
        self._settings = settings = settings_of(self)
        self._runner = asyncio.Runner()
        self._database = Database(settings)
        self._vault, self._files = VaultSecrets(settings), FileStore(settings)

    def close(self) -> None:
        self._database.close()
        self._runner.run(self._vault.close())
        self._runner.run(self._files.close())
        self._runner.close()

    def collect(self, ahead: float) -> None:
        """All that is due on a clock that is `ahead` seconds later."""
        later = timedelta(seconds=ahead)
        while self._runner.run(deletions.collect(self._database, self._vault, self._files, ahead=later)):
            pass

    def tidy(self) -> None:
        self._runner.run(expire_attachments(self._database))

    def silence(self) -> None:
        """Take what was not begun in time from its machine, and disconnect machines that gave no sign of life."""
        self._runner.run(look_for_silence(self._database, self._settings))


class Lifecycle(RuleBasedStateMachine):
    """Rules draw requests; the model says what must come of them.

    What is drawn from stands in order of creation, not of its random ids, so that a seed brings the same steps back.
    """

    stack: ClassVar[QuickStack]
    servers: ClassVar[list[Server]]
    counts: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.client: Client = self.servers[0].client()
        # Offline: what waits is never assigned, so that nothing but the steps changes anything.
        machines = [self.client.machine(status="disconnected") for _ in range(2)]
        self.all_machines, self.all_pools = machines, [self.client.pool() for _ in range(2)]
        self.all_workflows = [self.client.workflow() for _ in range(2)]
        # All that can have happened; more than one only between requests sent at once and the look at what came of them.
        self.models = [Model(self.all_workflows, machines, self.all_pools)]

    @property
    def model(self) -> Model:
        return self.models[0]

    # -- drawing

    def overrides(self, data: st.DataObject, *more: str) -> Body:
        model = self.model
        known: dict[str, st.SearchStrategy[Any]] = {
            "input_values": VALUES,
            "sensitive_input_values": st.sampled_from([{}, {"password": "one"}, {"password": "two", "pin": 7}]),
            "file_inputs": st.sampled_from([[], FILES[:1], FILES]),
            "machine_id": mostly([name for name in self.all_machines if name in model.machines]),
            "pool_ids": st.lists(mostly(self.all_pools), max_size=2),
            "session_id": mostly(model.sessions()),
            "start_session": st.booleans(),
            "session_alias": st.sampled_from(["one", "two"]),
            "release_session_after": st.booleans(),
            "is_priority": st.booleans(),
            "reuse_session": st.sampled_from([False, True, None]),
        }
        names = [*(name for name in known if name != "reuse_session"), *more]
        chosen = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True), "overrides")
        return {name: data.draw(known[name], name) for name in chosen}

    def has(self, *status: str) -> bool:
        return any(run.status in status for run in self.model.runs.values())

    def a_run(self, data: st.DataObject, *status: str) -> str:
        """Mostly one in such a status; any other and unknown ones too."""
        runs = self.model.runs
        likely = [run_id for run_id, run in runs.items() if run.status in status]
        return data.draw(st.sampled_from([*likely * 6, *runs, UNKNOWN]), "run")

    def create(self, data: st.DataObject) -> Request:
        body = {
            "workflow_id": data.draw(
                mostly([name for name in self.all_workflows if name in self.model.workflows]), "workflow"
            )
        } | self.overrides(data)
        if data.draw(st.integers(0, 3), "bulk") == 3:
            return Request("bulk", "POST", "/v1/runs/bulk", body | {"count": 2})
        return Request("create", "POST", "/v1/runs", body)

    def retry(self, data: st.DataObject, run_id: str | None = None) -> Request:
        run_id = run_id or self.a_run(data, *sorted(TERMINAL))
        return Request("retry", "POST", f"/v1/runs/{run_id}/retry", self.overrides(data, "reuse_session"), run_id)

    def report(self, data: st.DataObject, run_id: str | None = None) -> Request:
        run_id = run_id or self.a_run(data, "scheduling", "running")
        run = self.model.runs.get(run_id)
        chosen = data.draw(st.lists(st.sampled_from(sorted(REPORTED)), max_size=2, unique=True), "reported")
        body = {name: data.draw(REPORTED[name], name) for name in chosen}
        likely = sorted(NEXT.get(run.status, TERMINAL)) if run is not None else []
        status = data.draw(st.sampled_from([*likely * 3, None, "scheduling", "running", "success"]), "status")
        attempts = [None, *([run.attempt, run.attempt, max(run.attempt - 1, 1)] if run is not None else [1])]
        body |= {"status": status, "attempt": data.draw(st.sampled_from(attempts), "attempt")}
        body |= self.of_a_process(data, run)
        if data.draw(st.booleans(), "outputs"):
            own = [
                name for name, one in self.model.attachments.items() if one.run_id == run_id and one.kind == "output"
            ]
            body["output_attachment_ids"] = data.draw(st.lists(mostly(own), max_size=2, unique=True), "ids")
        return Request("report", "PATCH", f"/v1/runs/{run_id}", body, run_id)

    def of_a_process(self, data: st.DataObject, run: Run | None) -> Body:
        """What an executor says of itself: nothing, as the vendor's do, or which process it is, and of which assignment."""
        claims = [None, *CLAIMS] if run is None or run.claim is None else [None, *CLAIMS, *[run.claim] * 3]
        claim = data.draw(st.sampled_from(claims), "claim")
        if claim is None:
            return {}
        current = 0 if run is None else run.assignment
        return {"claim": claim, "assignment": data.draw(st.sampled_from([*[current] * 4, current + 1]), "assignment")}

    def upload(self, data: st.DataObject, run_id: str | None = None) -> Request:
        run_id = run_id or self.a_run(data, "running")
        more = {"run_id": run_id, "content_type": "text/plain", "attachment_type": "output"}
        more |= self.of_a_process(data, self.model.runs.get(run_id))
        file = data.draw(st.sampled_from(FILES), "file")
        return Request("upload", "POST", "/v1/run-attachments", file | more, run_id)

    def delete(self, data: st.DataObject, run_id: str | None = None) -> Request:
        run_id = run_id or self.a_run(data, *sorted(TERMINAL))
        return Request("delete", "DELETE", f"/v1/runs/{run_id}", target=run_id)

    def change_attachment(self, data: st.DataObject) -> Request:
        name = data.draw(mostly(list(self.model.attachments)), "attachment")
        if data.draw(st.integers(0, 2), "delete") == 2:
            return Request("delete_attachment", "DELETE", f"/v1/run-attachments/{name}", target=name)
        body = {"expires_at": data.draw(st.sampled_from(["2020-01-01T00:00:00Z", None]), "expires_at")}
        return Request("expire", "PUT", f"/v1/run-attachments/{name}", body, name)

    def delete_owner(self, data: st.DataObject) -> Request:
        kind = data.draw(st.sampled_from(["machine", "workflow"]), "kind")
        name = data.draw(st.sampled_from(getattr(self, f"all_{kind}s")), kind)
        return Request(f"delete_{kind}", "DELETE", f"/v1/{kind}s/{name}", target=name)

    # -- sending

    def send(self, *requests: Request) -> None:
        answers = send_at_once(
            self.client, [request.call for request in requests], urls=[one.url for one in self.servers]
        )
        done = []
        for request, answer in zip(requests, answers, strict=True):
            replayed = answer.headers.get("Idempotency-Status") == "replayed"
            outcome = Outcome(answer.status, answer.code, replayed)
            note(f"{request} -> {outcome}")
            self.counts[f"{request.kind} {outcome.status} {outcome.code}".strip()] += 1
            done.append((request, outcome, answer.content))
        self.counts["requests"] += len(done)
        # In some order, one after the other, they must have had these outcomes.
        models = []
        for order in itertools.permutations(done):
            model = copy.deepcopy(self.model)
            if all(self.agrees(model, *one, alone=len(done) == 1) for one in order):
                models.append(model)
        assert models, [(outcome, self.model.expect(request)) for request, outcome, _ in done]
        self.models = models

    @staticmethod
    def agrees(model: Model, request: Request, outcome: Outcome, content: bytes, *, alone: bool) -> bool:
        expected = model.expect(request)
        if not alone:
            if outcome.code == "idempotency_in_progress":
                return True
            # It was accepted for an attempt that is over, or comes for one that has not begun: one is as good as the other.
            if request.kind == "upload" and outcome.code == "attempt_superseded":
                outcome = Outcome(409, "invalid_transition")
        return outcome in expected and model.apply(request, outcome, content)

    def with_key(self, data: st.DataObject, request: Request) -> Request:
        return request._replace(key=uuid4().hex) if data.draw(st.booleans(), "key") else request

    # -- rules; one that stands twice is drawn twice as often

    @initialize(data=st.data())
    def some_runs(self, data: st.DataObject) -> None:
        """One waits, one runs and one has ended, with much to keep."""
        body = {"workflow_id": self.all_workflows[0], "count": 3, "input_values": {"a": 1}, "start_session": True}
        body |= {"sensitive_input_values": {"password": "first"}, "file_inputs": FILES[:1]}
        self.send(Request("bulk", "POST", "/v1/runs/bulk", body))
        for run_id in list(self.model.runs)[1:]:
            self.send(Request("report", "PATCH", f"/v1/runs/{run_id}", {"status": "running"}, run_id))
        self.send(Request("report", "PATCH", f"/v1/runs/{run_id}", {"status": data.draw(ENDS, "end")}, run_id))

    @precondition(lambda self: len(self.model.runs) < MOST_RUNS)
    @rule(data=st.data())
    def creates(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.create(data)))

    @rule(data=st.data())
    def reports(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.report(data)))

    @precondition(lambda self: self.has("scheduling", "running"))
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        """What an executor does: it begins, hands in a file, and ends."""
        active = [run_id for run_id, run in self.model.runs.items() if run.status not in TERMINAL]
        run_id = data.draw(st.sampled_from(active), "run")
        path = f"/v1/runs/{run_id}"
        run = self.model.runs[run_id]
        claim = data.draw(st.sampled_from([None, CLAIMS[0]]), "process") if run.claim is None else run.claim
        about = {"claim": claim, "assignment": run.assignment} if claim and (run.claim or not run.begun) else {}
        self.send(Request("report", "PATCH", path, {"status": "running"} | about, run_id))
        file = {"run_id": run_id, "content_type": "text/plain", "attachment_type": "output"} | FILES[1] | about
        self.send(Request("upload", "POST", "/v1/run-attachments", file, run_id))
        body = {"status": data.draw(ENDS, "end"), "output_data": {"answer": 42}, "error": ["it broke"]} | about
        self.send(Request("report", "PATCH", path, body, run_id))

    finishes_another = finishes

    @precondition(lambda self: self.has(*TERMINAL))
    @rule(data=st.data())
    def retries(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.retry(data)))

    retries_another = retries

    @precondition(lambda self: self.has("running"))
    @rule(data=st.data())
    def uploads(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.upload(data)))

    @precondition(lambda self: self.model.attachments)
    @rule(data=st.data())
    def changes_an_attachment(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.change_attachment(data)))

    @precondition(lambda self: len(self.model.runs) > 3)
    @rule(data=st.data())
    def deletes(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.delete(data)))

    @precondition(lambda self: len(self.model.runs) > 4)
    @rule(data=st.data())
    def deletes_an_owner(self, data: st.DataObject) -> None:
        self.send(self.with_key(data, self.delete_owner(data)))

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data())
    def sends_some_at_once(self, data: st.DataObject) -> None:
        """All about one run, so that they meet."""
        others = st.sampled_from(["retry", "report", "upload", "retry", "delete"])
        first = self.retry(data) if self.has(*TERMINAL) else self.report(data)
        kinds = data.draw(st.lists(others, min_size=1, max_size=2), "others")
        requests = [first, *(getattr(self, kind)(data, first.target) for kind in kinds)]
        self.send(*(self.with_key(data, request) for request in requests))

    sends_more_at_once = sends_some_at_once

    @precondition(lambda self: self.has(*TERMINAL))
    @rule(data=st.data())
    def sends_twins(self, data: st.DataObject) -> None:
        request = self.retry(data)._replace(key=uuid4().hex)
        self.send(request, request)

    @precondition(lambda self: self.model.keys)
    @rule(data=st.data())
    def resends(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.model.keys)), "sent")
        first, _, _ = self.model.keys[key]
        other = data.draw(st.sampled_from(["", "", "body", "run"]), "difference")
        if other == "body":
            first = first._replace(body=(first.body or {}) | {"unknown to this server": 1})
        elif other == "run":
            first = self.retry(data)._replace(key=key)
        self.send(first)

    @precondition(lambda self: self.free_machines() and self.waiting())
    @rule(data=st.data())
    def a_run_is_given_to_a_machine(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(self.waiting()), "run")
        machine_id = data.draw(st.sampled_from(self.free_machines()), "machine")
        self.stack.sql(
            "UPDATE runs SET assigned_machine_id = $2, assignment = assignment + 1, awaited_since = now() WHERE id = $1",
            run_id,
            machine_id,
        )
        # As the last run that began on it has left it.
        machine = Machine(starts_with_claim=data.draw(st.booleans(), "claims"))
        self.stack.sql(
            "UPDATE machines SET starts_with_claim = $2, begun_session_id = NULL WHERE id = $1",
            machine_id,
            machine.starts_with_claim,
        )
        self.model.given(run_id, machine_id, machine)

    is_given = is_given_again = a_run_is_given_to_a_machine

    @precondition(lambda self: any(run.awaited for run in self.model.runs.values()))
    @rule()
    def the_time_to_begin_is_over(self) -> None:
        """The machines have fallen silent, too; which ends no run."""
        organization = self.client.organization
        past = "interval '1 hour'"
        self.stack.sql(
            f"UPDATE runs SET awaited_since = awaited_since - {past} WHERE organization_id = $1", organization
        )
        self.stack.sql(
            f"UPDATE machines SET last_seen = last_seen - {past}, look_at = now() - {past} WHERE organization_id = $1",
            organization,
        )
        self.stack.silence()
        before = len(self.waiting())
        self.model.time_to_begin_is_over()
        self.counts["timeouts"] += 1
        self.counts["taken back"] += len(self.waiting()) - before

    time_is_over = is_over_again = the_time_to_begin_is_over

    def waiting(self) -> list[str]:
        return [name for name, run in self.model.runs.items() if run.status == "scheduling" and run.assigned is None]

    def free_machines(self) -> list[str]:
        busy = {run.assigned for run in self.model.runs.values() if run.status not in TERMINAL}
        return [name for name in self.all_machines if name in self.model.machines and name not in busy]

    @rule(ahead=st.sampled_from([0, 3600, 2 * DAY]))
    def a_collector_passes(self, ahead: float) -> None:
        self.stack.collect(ahead)
        self.model.collect(ahead)

    @precondition(lambda self: any(one.expired for one in self.model.attachments.values()))
    @rule()
    def expired_files_are_collected(self) -> None:
        self.stack.tidy()
        self.model.tidy()

    @precondition(lambda self: not self.model.down)
    @rule(parts=st.sampled_from([("vault",), ("storage",), ("vault", "storage")]))
    def parts_go_away(self, parts: tuple[str, ...]) -> None:
        if "vault" in parts:
            self.stack.bao.kill()
        if "storage" in parts:
            self.stack.files.rename(self.stack.folder / "elsewhere")
        self.model.down.update(parts)
        self.counts["outages"] += 1

    @precondition(lambda self: self.model.down)
    @rule()
    def parts_are_back(self) -> None:
        if "vault" in self.model.down:
            self.stack.bao.start()
        if "storage" in self.model.down:
            (self.stack.folder / "elsewhere").rename(self.stack.files)
        self.model.down.clear()
        until(lambda: all(ready(server) for server in self.servers), what="recovery without a restart")

    come_back = parts_are_back

    # -- looking

    @invariant()
    def the_service_shows_what_the_model_says(self) -> None:
        runs = self.client.json_of(self.client.get("/v1/runs?limit=1000"))["items"]
        listed = {run["id"]: shown(run) for run in runs}
        expected = [{run_id: model.view(run_id) for run_id in model.runs} for model in self.models]
        assert listed in expected
        self.models = [model for model, views in zip(self.models, expected, strict=True) if views == listed]
        query = (
            "SELECT run_id::text, t.attempt, t.status, overridden FROM run_attempts t JOIN runs r ON r.id = run_id"
            " WHERE organization_id = $1 ORDER BY t.attempt"
        )
        archive: dict[str, list[tuple[int, str, list[str]]]] = {run_id: [] for run_id in listed}
        for row in self.stack.sql(query, self.client.organization):
            archive[row["run_id"]].append((row["attempt"], row["status"], row["overridden"]))
        archives = [{run_id: run.archive for run_id, run in model.runs.items()} for model in self.models]
        assert archive in archives
        self.models = [model for model, one in zip(self.models, archives, strict=True) if one == archive]
        self.counts["steps"] += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.model.down:
            return
        seen = assert_nothing_lost(self.stack, self.client.organization)
        for row in seen.runs:
            run = self.model.runs[str(row["id"])]
            if not run.secrets_expired:
                assert row["secrets"] == (run.secrets or {})
        files = {str(row["id"]): row["bytes"] for row in seen.attachments}
        kept = {name: one.content for name, one in self.model.attachments.items() if not one.collected}
        assert files.keys() == self.model.attachments.keys()
        assert {name: files[name] for name in kept} == kept

    def teardown(self) -> None:
        if self.model.down:
            self.parts_are_back()
        with closing(self.client):
            assert_exactly_named(self.stack, self.client.organization)
            for workflow_id in self.model.workflows:
                assert self.client.delete(f"/v1/workflows/{workflow_id}").status_code == 204
            collect_all(self.stack)
            assert self.stack.secret_paths(f"runs/{self.client.organization}/") == set()
            assert self.stack.blobs(self.client.organization) == set()
            self.stack.sql("DELETE FROM idempotency_keys")
        self.counts["lives"] += 1


def ready(server: Server) -> bool:
    return httpx.get(f"{server.url}/health/ready", timeout=10, trust_env=False, verify=False).status_code == 200


@pytest.fixture
def quick(broken: Stack) -> Iterator[QuickStack]:
    stack = QuickStack(broken.folder, broken.postgres, broken.bao)
    stack.connect()
    with stack.keeping_connections():
        yield stack
    stack.close()


@pytest.fixture
def servers(broken: Stack) -> Iterator[list[Server]]:
    """They collect when they are woken, and by themselves never."""
    started = [start_server(broken, BACKGROUND_PERIOD_SECONDS=NEVER) for _ in range(2)]
    yield started
    for server in started:
        server.app.stop()


def test_a_runs_life_in_any_order(quick: QuickStack, servers: list[Server]) -> None:
    counts: Counter[str] = Counter()
    end = time.monotonic() + SECONDS
    for number in itertools.count():
        print(f"round {number}: SEED={SEED}")
        machine = type("Round", (Lifecycle,), {"stack": quick, "servers": servers, "counts": counts})
        try:
            run_state_machine_as_test(
                seed(SEED + number)(machine),
                settings=settings(
                    max_examples=4,
                    stateful_step_count=50,
                    database=None,  # what is found is brought back by its seed
                    deadline=None,  # the parts are real
                    suppress_health_check=list(HealthCheck),  # they watch over speed, and the parts are real
                    # Shrinking takes minutes: only when somebody looks for the cause. The steps are printed anyway.
                    phases=[Phase.generate, Phase.shrink] if "SEED" in os.environ else [Phase.generate],
                ),
            )
        except FlakyStrategyDefinition as inconsistent:
            # Two lives that began alike could go on differently, because the parts are real: no check of ours has failed.
            print(f"round {number} ended early: {type(inconsistent).__name__}")
        if counts["steps"] >= STEPS:
            break
        assert time.monotonic() < end, f"too few steps: {counts}"
    print(dict(sorted(counts.items())))
    assert counts["requests"] >= STEPS / 2, "steps that ask for nothing prove nothing"
