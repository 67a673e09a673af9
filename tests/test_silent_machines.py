"""In time: machines that fall silent are given nothing, and what they do not begin is placed again."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.scheduling.silence import NOT_BEGUN
from tests.support.client import Client
from tests.support.scheduling import assigned, reason
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

CLAIM, OTHER = str(uuid4()), str(uuid4())
LATER = "interval '3 minutes'"  # longer than a machine may be silent, and than it may take to begin a run


def row(stack: Stack, machine: str) -> dict[str, Any]:
    [found] = stack.sql("SELECT *, xmin::text FROM machines WHERE id = $1", machine)
    return found


def status(api: Client, machine: str) -> str:
    return str(api.json_of(api.get(f"/v1/machines/{machine}"))["status"])


def look(api: Client, machine: str, wait: float = 0) -> httpx.Response:
    """An executor looks for work."""
    return api.get("/v1/runs", params={"machine_id": machine, "status": "scheduling", "wait": wait})


def gives_a_sign(api: Client, stack: Stack, machine: str) -> None:
    look(api, machine)
    until(lambda: row(stack, machine)["look_at"], what="the sign of life is written")


def time_passes(stack: Stack, machine: str) -> None:
    """For the machine and what was given to it."""
    stack.sql(
        f"UPDATE machines SET last_seen = last_seen - {LATER}, look_at = look_at - {LATER},"
        f" silenced_at = silenced_at - {LATER} WHERE id = $1",
        machine,
    )
    stack.sql(f"UPDATE runs SET awaited_since = awaited_since - {LATER} WHERE assigned_machine_id = $1", machine)


def falls_silent(api: Client, stack: Stack, machine: str) -> None:
    gives_a_sign(api, stack, machine)
    time_passes(stack, machine)
    until(lambda: status(api, machine) == "disconnected", what="the machine is disconnected")


def logged(server: Server, event: str, **fields: str) -> bool:
    wanted = [f'"event":"{event}"', *(f'"{name}":"{value}"' for name, value in fields.items())]
    return any(all(part in line for part in wanted) for line in server.app.log.read_text().splitlines())


# --- signs of life ----------------------------------------------------------------------------------------------------


def a_run(api: Client, machine: str, **about: object) -> str:
    run_id = str(api.run(machine_id=machine)["id"])
    assigned(api, run_id)
    api.report(run_id, status="running", **about)
    return run_id


def forgotten(stack: Stack, machine: str) -> None:
    """No sign is on its way any more, and none was ever given."""

    def clear() -> bool:
        stack.sql("UPDATE machines SET last_seen = now() - interval '1 hour', look_at = NULL WHERE id = $1", machine)
        return True

    until(lambda: row(stack, machine)["look_at"])
    clear()


def report(api: Client, stack: Stack, machine: str) -> None:
    run_id = a_run(api, machine)
    forgotten(stack, machine)
    api.report(run_id, output_data={"a": 1})


def upload(api: Client, stack: Stack, machine: str) -> None:
    run_id = a_run(api, machine)
    forgotten(stack, machine)
    api.upload(run_id)


def cancel(api: Client, stack: Stack, machine: str) -> None:
    run_id = a_run(api, machine)
    forgotten(stack, machine)
    api.report(run_id, status="cancelled")


def with_its_key(api: Client, stack: Stack, machine: str) -> None:
    key = stack.new_key(api.organization, scopes=["runs:execute"], machine_id=machine)
    assert api.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"}).is_success


def with_another_machines_key(api: Client, stack: Stack, machine: str) -> None:
    key = stack.new_key(api.organization, scopes=["runs:read", "runs:execute"], machine_id=api.machine())
    params = {"machine_id": machine, "status": "scheduling"}
    assert api.get("/v1/runs", params=params, headers={"Authorization": f"Bearer {key}"}).is_success


def with_a_readers_key(api: Client, stack: Stack, machine: str) -> None:
    key = stack.new_key(api.organization, scopes=["runs:read"])
    params = {"machine_id": machine, "status": "scheduling"}
    assert api.get("/v1/runs", params=params, headers={"Authorization": f"Bearer {key}"}).is_success


def of_another_organization(api: Client, stack: Stack, machine: str) -> None:
    key = stack.new_key(f"other-{uuid4().hex}")
    params = {"machine_id": machine, "status": "scheduling"}
    assert api.get("/v1/runs", params=params, headers={"Authorization": f"Bearer {key}"}).is_success


SIGNS: dict[str, Callable[[Client, Stack, str], object]] = {
    "looks for work": lambda api, _, machine: look(api, machine),
    "waits for work": lambda api, _, machine: look(api, machine, wait=0.1),
    "reports": report,
    "uploads": upload,
    "sends anything with the machine's key": with_its_key,
    "is connected": lambda api, _, machine: api.patch(f"/v1/machines/{machine}", json={"status": "connected"}),
}
NO_SIGNS: dict[str, Callable[[Client, Stack, str], object]] = {
    "nothing": lambda _, __, ___: None,
    "is read": lambda api, _, machine: api.get(f"/v1/machines/{machine}"),
    "is looked at": lambda api, _, machine: api.get("/v1/runs", params={"machine_id": machine}),
    "is renamed": lambda api, _, machine: api.patch(f"/v1/machines/{machine}", json={"name": "x"}),
    "a cancel": cancel,
    "a key that executes nothing": with_a_readers_key,
    "the key of another machine": with_another_machines_key,
    "another organization": of_another_organization,
}


@pytest.mark.parametrize("name", SIGNS)
def test_it_is_a_sign_of_life(api: Client, stack: Stack, name: str) -> None:
    machine = api.machine()
    stack.sql("UPDATE machines SET last_seen = now() - interval '1 hour' WHERE id = $1", machine)
    SIGNS[name](api, stack, machine)
    found = until(lambda: (seen := row(stack, machine))["look_at"] and seen, what="the sign of life is written")
    assert datetime.now(UTC) - found["last_seen"] < timedelta(seconds=20)
    assert timedelta(seconds=80) < found["look_at"] - found["last_seen"] < timedelta(seconds=100)


@pytest.mark.parametrize("name", NO_SIGNS)
def test_it_is_no_sign_of_life(api: Client, stack: Stack, name: str) -> None:
    machine, other = api.machine(), api.machine()
    NO_SIGNS[name](api, stack, machine)
    gives_a_sign(api, stack, other)  # what was noted before is written by now
    assert row(stack, machine)["look_at"] is None


def test_it_is_written_once_in_ten_seconds(api: Client, stack: Stack) -> None:
    machine, other = api.machine(), api.machine()
    gives_a_sign(api, stack, machine)
    stack.sql("UPDATE machines SET last_seen = now() - interval '8 s' WHERE id = $1", machine)
    before = row(stack, machine)
    for _ in range(3):
        look(api, machine)
    gives_a_sign(api, stack, other)
    assert row(stack, machine) == before
    stack.sql("UPDATE machines SET last_seen = now() - interval '11 s' WHERE id = $1", machine)
    look(api, machine)
    until(lambda: row(stack, machine)["last_seen"] > before["last_seen"])


def test_a_row_that_is_held_keeps_no_other_sign_waiting(api: Client, stack: Stack) -> None:
    machine, other = api.machine(), api.machine()
    with stack.held("SELECT FROM machines WHERE id = $1 FOR UPDATE", machine):
        look(api, machine)
        gives_a_sign(api, stack, other)


# --- silent machines --------------------------------------------------------------------------------------------------


def test_a_silent_machine_is_given_nothing_until_its_next_sign_of_life(
    api: Client, stack: Stack, server: Server
) -> None:
    machine = api.machine()
    falls_silent(api, stack, machine)
    pinned, any_machine = api.run(machine_id=machine)["id"], api.run()["id"]
    assert (reason(api, pinned), reason(api, any_machine)) == ("machine_not_responding", "waiting_for_machine")
    look(api, machine)
    assert assigned(api, pinned) == machine
    assert status(api, machine) == "connected"
    about = {"machine_id": machine, "organization_id": api.organization}
    assert logged(server, "machine_silent", **about)
    assert logged(server, "machine_back", **about)


def test_a_machine_that_never_gave_a_sign_of_life_is_not_missed(api: Client, stack: Stack) -> None:
    """It was registered by hand, for an executor that is not there yet."""
    machine, other = api.machine(), api.machine()
    stack.sql("UPDATE machines SET last_seen = now() - interval '1 year' WHERE id = $1", machine)
    falls_silent(api, stack, other)
    assert status(api, machine) == "connected"


def test_a_clock_that_is_ahead_hides_no_silence(api: Client, stack: Stack) -> None:
    """An executor may say when it was last heard of."""
    machine = api.machine()
    gives_a_sign(api, stack, machine)
    api.json_of(api.patch(f"/v1/machines/{machine}", json={"last_seen": "2099-01-01T00:00:00Z"}))
    stack.sql("UPDATE machines SET look_at = now() WHERE id = $1", machine)
    until(lambda: row(stack, machine)["last_seen"] < datetime.now(UTC) + timedelta(seconds=1))
    time_passes(stack, machine)
    until(lambda: status(api, machine) == "disconnected", what="the machine is disconnected")


def test_a_machine_that_goes_on_giving_signs_is_not_silent(api: Client, stack: Stack) -> None:
    machine, other = api.machine(), api.machine()
    gives_a_sign(api, stack, machine)
    # It is time to look, and there was a sign a minute ago.
    stack.sql("UPDATE machines SET last_seen = now() - interval '60 s', look_at = now() WHERE id = $1", machine)
    until(lambda: row(stack, machine)["look_at"] - row(stack, machine)["last_seen"] == timedelta(seconds=90))
    assert status(api, machine) == "connected"
    falls_silent(api, stack, other)
    assert status(api, machine) == "connected"


def test_who_disconnects_a_machine_keeps_it_disconnected(api: Client, stack: Stack) -> None:
    machine, silent, other = api.machine(), api.machine(), api.machine()
    falls_silent(api, stack, silent)
    for one in (machine, silent):
        api.json_of(api.patch(f"/v1/machines/{one}", json={"status": "disconnected"}))
        look(api, one)
    gives_a_sign(api, stack, other)
    assert {status(api, one) for one in (machine, silent)} == {"disconnected"}
    run_id = api.run(machine_id=silent)["id"]
    assert reason(api, run_id) == "machine_offline"
    api.json_of(api.patch(f"/v1/machines/{silent}", json={"status": "connected"}))
    assert assigned(api, run_id) == silent


def test_a_machine_with_a_running_run_is_never_silent(api: Client, stack: Stack) -> None:
    machine = api.machine()
    run_id = a_run(api, machine)
    until(lambda: row(stack, machine)["look_at"])
    time_passes(stack, machine)
    until(lambda: row(stack, machine)["look_at"] > datetime.now(UTC), what="the look is put off")
    assert status(api, machine) == "connected"
    api.report(run_id, status="cancelled")  # somebody else's doing
    time_passes(stack, machine)
    until(lambda: status(api, machine) == "disconnected")


# --- runs that nobody begins ------------------------------------------------------------------------------------------


def claims(api: Client, machine: str, **options: object) -> dict[str, Any]:
    """A run that the machine's executor begins and ends, with a claim."""
    run = api.run(machine_id=machine, **options)
    assigned(api, run["id"])
    about = {"assignment": 1, "claim": CLAIM}
    api.report(run["id"], status="running", **about)
    return api.report(run["id"], status="success", **about)


def not_begun(api: Client, stack: Stack, run_id: str, machine: str) -> None:
    """Time passes for the run alone: its machine gives signs of life."""
    assert assigned(api, run_id) == machine
    stack.sql(f"UPDATE runs SET awaited_since = awaited_since - {LATER} WHERE id = $1", run_id)
    until(lambda: stack.sql("SELECT 1 FROM runs WHERE id = $1 AND awaited_since IS NULL", run_id), what="the timeout")


def test_a_run_that_its_machine_does_not_begin_is_placed_again(api: Client, stack: Stack, server: Server) -> None:
    dead = api.machine()
    claims(api, dead)
    run_id = api.run()["id"]
    [before] = stack.sql("SELECT queued_at, queue_rank, lane FROM runs WHERE id = $1", run_id)
    not_begun(api, stack, run_id, dead)
    assert (status(api, dead), reason(api, run_id)) == ("disconnected", "waiting_for_machine")
    assert stack.sql("SELECT queued_at, queue_rank, lane FROM runs WHERE id = $1", run_id) == [before]
    late = api.patch(f"/v1/runs/{run_id}", json={"status": "running", "assignment": 1, "claim": CLAIM})
    assert (late.status_code, late.json()["code"]) == (409, "assignment_superseded")

    alive = api.machine()
    assert assigned(api, run_id) == alive
    late = api.patch(f"/v1/runs/{run_id}", json={"status": "running", "assignment": 1, "claim": CLAIM})
    assert (late.json()["code"], late.json()["assignment"]) == ("assignment_superseded", 2)
    assert api.report(run_id, status="running", assignment=2, claim=OTHER)["machine_id"] == alive

    def events() -> list[dict[str, Any]]:
        page = api.json_of(api.get(f"/v1/runs/{run_id}/events"))["items"]
        return page if len(page) == 5 else []

    found = until(events)
    assert [event["event"] for event in found] == ["created", "assigned", "unassigned", "assigned", "started"]
    assert (found[2]["from_status"], found[2]["to_status"]) == ("scheduling", "scheduling")
    assert (found[2]["reason"], found[2]["key_id"]) == (NOT_BEGUN.format(120), None)
    assert logged(server, "run_not_begun", run_id=run_id, machine_id=dead, then="placed again")


def test_the_machine_is_connected_again_by_its_next_sign_of_life(api: Client, stack: Stack) -> None:
    machine = api.machine()
    claims(api, machine)
    run_id = api.run()["id"]
    not_begun(api, stack, run_id, machine)
    look(api, machine)
    assert assigned(api, run_id) == machine
    assert api.get_run(run_id)["assignment"] == 2
    assert status(api, machine) == "connected"


def test_nothing_is_taken_from_a_machine_that_begins_without_claims(api: Client, stack: Stack) -> None:
    """Its executor could be late, and nothing would keep it from beginning what another machine has begun."""
    machine, new = api.machine(), api.machine(is_available=False)
    claims(api, machine)
    a_run(api, machine)  # the last one counts
    api.json_of(api.patch(f"/v1/runs/{look_running(api)}", json={"status": "success"}))
    runs = {machine: api.run()["id"]}
    assert assigned(api, runs[machine]) == machine
    api.json_of(api.patch(f"/v1/machines/{new}", json={"is_available": True}))
    runs[new] = api.run()["id"]  # nothing was ever begun there
    for one, run_id in runs.items():
        not_begun(api, stack, run_id, one)
        assert (status(api, one), reason(api, run_id)) == ("connected", "assigned")
        assert api.report(run_id, status="running")["machine_id"] == one


def look_running(api: Client) -> str:
    [run] = api.json_of(api.get("/v1/runs", params={"status": "running"}))["items"]
    return str(run["id"])


def test_a_pinned_run_stays_and_says_that_its_machine_does_not_respond(
    api: Client, stack: Stack, server: Server
) -> None:
    machine, _ = api.machine(), api.machine()
    claims(api, machine)
    run_id = api.run(machine_id=machine)["id"]
    not_begun(api, stack, run_id, machine)
    assert api.get_run(run_id)["assigned_machine_id"] == machine
    assert (status(api, machine), reason(api, run_id)) == ("disconnected", "machine_not_responding")
    lanes = api.json_of(api.get("/v1/runs", params={"machine_id": machine, "status": "scheduling"}))["items"]
    assert [run["scheduling_reason"] for run in lanes] == ["machine_not_responding"]
    assert until(lambda: reason(api, run_id) == "assigned"), "that look was a sign of life"
    assert api.report(run_id, status="running", assignment=1, claim=CLAIM)["machine_id"] == machine
    assert logged(server, "run_not_begun", run_id=run_id, then="stays")


def test_a_session_that_has_begun_stays_on_its_machine(api: Client, stack: Stack) -> None:
    machine = api.machine()
    session = claims(api, machine, start_session=True)["session_id"]
    other = api.machine()
    run_id = api.run(session_id=session)["id"]
    not_begun(api, stack, run_id, machine)
    assert api.get_run(run_id)["assigned_machine_id"] == machine
    assert reason(api, run_id) == "machine_not_responding"
    assert row(stack, machine)["reserved_session_id"] is not None
    assert status(api, other) == "connected"


def test_a_session_that_has_not_begun_goes_to_another_machine(api: Client, stack: Stack) -> None:
    machine = api.machine()
    claims(api, machine)
    run = api.run(start_session=True)
    second = api.run(session_id=run["session_id"])["id"]
    not_begun(api, stack, run["id"], machine)
    assert row(stack, machine)["reserved_session_id"] is None
    other = api.machine()
    assert assigned(api, run["id"]) == other
    assert str(row(stack, other)["reserved_session_id"]) == run["session_id"]
    assert reason(api, second) == "waiting_for_session"


def test_a_run_is_also_taken_from_a_machine_that_somebody_disconnected(api: Client, stack: Stack) -> None:
    """It is not connected again by a sign of life."""
    machine = api.machine()
    claims(api, machine)
    run_id = api.run()["id"]
    assigned(api, run_id)
    api.json_of(api.patch(f"/v1/machines/{machine}", json={"status": "disconnected"}))
    not_begun(api, stack, run_id, machine)
    other = api.machine()
    assert assigned(api, run_id) == other
    look(api, machine)
    gives_a_sign(api, stack, other)
    assert status(api, machine) == "disconnected"


def test_a_machine_that_somebody_holds_is_not_judged_and_its_run_can_begin(api: Client, stack: Stack) -> None:
    machine, other = api.machine(), api.machine()
    claims(api, machine)
    claims(api, other)
    run_id, second = api.run(machine_id=machine)["id"], api.run()["id"]
    assert (assigned(api, run_id), assigned(api, second)) == (machine, other)
    with stack.held("SELECT FROM machines WHERE id = $1 FOR NO KEY UPDATE", machine):
        stack.sql(f"UPDATE runs SET awaited_since = awaited_since - {LATER} WHERE id = $1", run_id)
        not_begun(api, stack, second, other)  # so there was a round
        assert api.report(run_id, status="running", assignment=1, claim=CLAIM)["machine_id"] == machine
    assert status(api, machine) == "connected"


# --- in real time -----------------------------------------------------------------------------------------------------


@pytest.fixture
def strict(stack: Stack) -> Iterator[Server]:
    """A server that notices silence after 2 s."""
    with own_database(stack, "silence") as own:
        started = start_server(own, MACHINE_SILENCE_SECONDS=2)
        yield started
        started.app.stop()


WAIT = """
import sys, urllib.request
url, key = sys.argv[1:]
urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})).read()
"""


def test_an_executor_that_waits_is_not_silent_and_one_that_died_waiting_is(strict: Server) -> None:
    with strict.client() as api:
        machine = api.machine()
        url = f"{strict.url}/v1/runs?machine_id={machine}&status=scheduling&wait=30"
        key = api.headers["authorization"].split()[1]
        waiting = subprocess.Popen([sys.executable, "-c", WAIT, url, key])
        until(lambda: row(strict.stack, machine)["look_at"])
        began = time.monotonic()
        # More than twice as long as it may be silent.
        until(lambda: status(api, machine) != "connected" or time.monotonic() > began + 5)
        assert status(api, machine) == "connected"
        assert waiting.poll() is None
        waiting.kill()
        waiting.wait()
        until(lambda: status(api, machine) == "disconnected")
