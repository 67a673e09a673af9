"""What many clients saw of a run, of two servers of which one is killed, is what one client after the other could have seen.

Each answer is recorded with when its request was sent and when the answer came. For each run there must be one order of its
requests in which every answer follows from the rules, and which no request leaves before it was sent or after it was answered
(linearizability, found by the search of Wing and Gong with the memory that Lowe added). A request without a clear answer may
have taken effect at any time after it was sent, or never.
"""

import asyncio
import math
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support.client import Client
from tests.support.server import start_server
from tests.support.stack import Stack
from tests.support.stored_state import SEED, SOAK
from tests.support.waiting import until

CLIENTS = 16
RUNS = 4
SECONDS = 4 * (1 + SOAK)
FIRST_OUTPUT = 0
MOST_OF_A_RUN = 400  # requests: the search takes long for more

# --- the rules --------------------------------------------------------------------------------------------------------

ENDED = {"success", "error", "cancelled"}
NEXT = {"scheduling": {"running", "error", "cancelled"}, "running": ENDED}


class State(NamedTuple):
    """What the rules go by; of a run that is deleted only `status` counts."""

    status: str
    attempt: int
    output: int | None


class Answer(NamedTuple):
    """Status and code of a reply, and what a 200 shows."""

    status: int
    code: str = ""
    shown: State | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One request. `attempt`: which one it expects or is meant for."""

    kind: str
    to: str = ""
    attempt: int | None = None
    output: int | None = None

    def apply(self, state: State) -> tuple[State, Answer]:
        """What the rules say, for a run in this state."""
        if state.status == "deleted":
            return state, Answer(404, "run_not_found")
        if self.kind == "get":
            return state, Answer(200, shown=state)
        if self.kind == "delete":
            return state._replace(status="deleted"), Answer(204)
        if self.kind == "retry":
            if self.attempt not in (None, state.attempt):
                return state, Answer(409, "attempt_changed")
            if state.status not in ENDED:
                return state, Answer(409, "run_not_terminal")
            state = State("scheduling", state.attempt + 1, None)
            return state, Answer(200, shown=state)
        if self.attempt not in (None, state.attempt):
            return state, Answer(409, "attempt_superseded")
        if self.to != state.status and self.to not in NEXT.get(state.status, ()):
            return state, Answer(409, "invalid_transition")
        state = State(self.to, state.attempt, state.output if self.output is None else self.output)
        return state, Answer(200, shown=state)

    def request(self, run_id: str) -> tuple[str, str, dict[str, Any] | None]:
        """Method, path and body."""
        path = f"/v1/runs/{run_id}"
        if self.kind == "retry":
            return "POST", f"{path}/retry", {} if self.attempt is None else {"expected_attempt": self.attempt}
        if self.kind == "report":
            body: dict[str, Any] = {"status": self.to}
            if self.attempt is not None:
                body["attempt"] = self.attempt
            if self.output is not None:
                body["output_data"] = {"number": self.output}
            return "PATCH", path, body
        return {"get": "GET", "delete": "DELETE"}[self.kind], path, None


class Seen(NamedTuple):
    """`ended` is infinite and `answer` None if nobody knows what became of it."""

    operation: Operation
    began: float
    ended: float
    answer: Answer | None


def order_of(history: Sequence[Seen], start: State) -> list[Seen] | None:
    """An order that the rules explain; None if there is none."""
    history = sorted(history, key=lambda one: one.began)
    known = sum(1 << place for place, one in enumerate(history) if one.answer is not None)
    dead_ends: set[tuple[int, State]] = set()
    path: list[tuple[int, State, list[int]]] = [(0, start, _may_be_next(history, 0))]
    order: list[int] = []
    while path:
        done, state, choices = path[-1]
        if done & known == known:
            return [history[place] for place in order]
        while choices:
            place = choices.pop()
            after, answer = history[place].operation.apply(state)
            step = done | 1 << place, after
            if history[place].answer in (None, answer) and step not in dead_ends:
                order.append(place)
                path.append((*step, _may_be_next(history, step[0])))
                break
        else:
            dead_ends.add((done, state))
            path.pop()
            if order:
                order.pop()
    return None


def unexplained(history: Sequence[Seen], start: State) -> Seen | None:
    """The first answer that has no place, of those in the order in which they came; None if each has one."""
    answered = sorted((one for one in history if one.answer is not None), key=lambda one: one.ended)

    def is_explained(count: int) -> bool:
        later = answered[count:] + [one for one in history if one.answer is None]
        cut = [Seen(one.operation, one.began, math.inf, None) for one in later]
        return order_of([*answered[:count], *cut], start) is not None

    if is_explained(len(answered)):
        return None
    return answered[bisect_left(range(1, len(answered) + 1), True, key=lambda count: not is_explained(count))]


def _may_be_next(history: Sequence[Seen], done: int) -> list[int]:
    """Those that were sent before any of the others that are left was answered; the first answered comes last."""
    left = [place for place in range(len(history)) if not done >> place & 1]
    first_answer = min(history[place].ended for place in left) if left else math.inf
    return sorted(
        (place for place in left if history[place].began <= first_answer), key=lambda place: -history[place].ended
    )


# --- the search itself ------------------------------------------------------------------------------------------------

FAILED = State("error", 1, None)
RETRIED = State("scheduling", 2, None)
RETRY, GET = Operation("retry"), Operation("get")


@pytest.mark.parametrize(
    ("history", "is_explained"),
    [
        ([Seen(RETRY, 0, 2, Answer(200, shown=RETRIED)), Seen(GET, 1, 3, Answer(200, shown=FAILED))], True),
        ([Seen(RETRY, 0, 2, Answer(200, shown=RETRIED)), Seen(GET, 3, 4, Answer(200, shown=FAILED))], False),
        ([Seen(RETRY, 0, 2, Answer(200, shown=RETRIED)), Seen(RETRY, 1, 3, Answer(200, shown=RETRIED))], False),
        ([Seen(RETRY, 0, 2, Answer(200, shown=RETRIED)), Seen(RETRY, 1, 3, Answer(409, "run_not_terminal"))], True),
        ([Seen(RETRY, 0, math.inf, None), Seen(GET, 5, 6, Answer(200, shown=RETRIED))], True),
        ([Seen(RETRY, 0, math.inf, None), Seen(GET, 5, 6, Answer(200, shown=FAILED))], True),
        ([Seen(GET, 5, 6, Answer(200, shown=RETRIED))], False),
    ],
)
def test_the_search_tells_an_order_from_none(history: list[Seen], is_explained: bool) -> None:
    assert (order_of(history, FAILED) is not None) is is_explained


# --- clients ----------------------------------------------------------------------------------------------------------


class Recorder:
    """Sixteen clients of two servers, and what they saw of each run."""

    def __init__(self, client: Client, runs: Sequence[str], seed: int) -> None:
        self.runs = runs
        self.random = random.Random(seed)
        self.seen: dict[str, list[Seen]] = {run_id: [] for run_id in runs}
        self.attempts = dict.fromkeys(runs, 1)
        self._headers = {"Authorization": client.headers["Authorization"]}
        self._outputs = 0

    def _operation(self, run_id: str, end: float) -> Operation:
        kind = self.random.choices(
            ["retry", "report", "get", "delete"], [4, 5, 2, 0.2 if time.monotonic() > end - 1 else 0]
        )[0]
        attempt = self.random.choice([None, self.attempts[run_id]])
        if kind == "report":
            self._outputs += 1
            to = self.random.choice(["running", "success", "error", "cancelled"])
            return Operation(kind, to, attempt, self._outputs if to != "cancelled" else None)
        return Operation(kind, attempt=attempt if kind == "retry" else None)

    async def send_until(self, end: float, urls: list[str]) -> None:
        """One client: the next request when the last one is answered."""
        async with httpx.AsyncClient(headers=self._headers, timeout=10, trust_env=False, verify=False) as client:
            while time.monotonic() < end:
                run_id = self.random.choice(self.runs)
                if len(self.seen[run_id]) >= MOST_OF_A_RUN:
                    return
                operation = self._operation(run_id, end)
                method, path, body = operation.request(run_id)
                began = time.monotonic()
                try:
                    reply = await client.request(method, f"{self.random.choice(urls)}{path}", json=body)
                except httpx.ConnectError:
                    continue  # it was not sent
                except httpx.HTTPError:
                    answer, ended = None, math.inf
                else:
                    if reply.status_code == 409 and reply.json()["code"] == "idempotency_in_progress":
                        continue  # others held the run for too long, and nothing has changed
                    answer, ended = self._answer(run_id, reply), time.monotonic()
                if answer is not None or operation.kind != "get":
                    self.seen[run_id].append(Seen(operation, began, ended if answer else math.inf, answer))

    def _answer(self, run_id: str, reply: httpx.Response) -> Answer | None:
        if reply.status_code == 204:
            return Answer(204)
        body = reply.json()
        if reply.status_code == 503:
            return None
        if reply.status_code != 200:
            return Answer(reply.status_code, body["code"])
        self.attempts[run_id] = max(self.attempts[run_id], body["attempt"])
        output = None if body["output_data"] is None else body["output_data"].get("number", FIRST_OUTPUT)
        return Answer(200, shown=State(body["status"], body["attempt"], output))


def test_every_answer_has_a_place_in_one_order(attacked: Stack) -> None:
    one, two = start_server(attacked), start_server(attacked)
    started = [one, two]
    api = one.client()
    try:
        runs = [api.finished("error")["id"] for _ in range(RUNS)]
        recorder = Recorder(api, runs, SEED)
        urls = [one.url, two.url]

        async def attack() -> None:
            end = time.monotonic() + SECONDS
            clients = [asyncio.create_task(recorder.send_until(end, urls)) for _ in range(CLIENTS)]
            await asyncio.to_thread(until, lambda: sum(map(len, recorder.seen.values())) >= 5 * CLIENTS)
            await asyncio.to_thread(two.app.kill)
            three = await asyncio.to_thread(start_server, attacked)
            started.append(three)
            urls[1] = three.url
            await asyncio.gather(*clients)

        asyncio.run(attack())
    finally:
        for server in started:
            server.app.stop()
        api.close()
    counted = Counter(
        f"{seen.operation.kind} {'unknown' if seen.answer is None else seen.answer.status}"
        for history in recorder.seen.values()
        for seen in history
    )
    print(dict(sorted(counted.items())), "attempts", sum(recorder.attempts.values()))
    assert counted["retry 200"] >= 5 * RUNS
    assert counted["report 200"] >= 5 * RUNS
    for history in recorder.seen.values():
        wrong = unexplained(history, State("error", 1, FIRST_OUTPUT))
        around = [one for one in history if wrong and wrong.began - 0.5 < one.ended and one.began < wrong.ended]
        assert wrong is None, "\n".join(["", *map(str, around), f"unexplained: {wrong}"])
