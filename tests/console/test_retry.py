"""The retry dialog: each kind of override, what it sends and what not, and everything that can stand in its way."""

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from playwright.async_api import Route, expect

from tests.console.conftest import Console, body
from tests.support.client import Client, file_input
from tests.support.stack import Stack
from tests.support.waiting import until


def sent(console: Console) -> dict[str, Any]:
    """The body of the one retry that was sent."""
    until(lambda: (console.do(console.page.wait_for_timeout(20)), console.retries())[1], what="the retry")
    [request] = console.retries()
    return body(request)


def confirm(console: Console, attempt: int = 2) -> dict[str, Any]:
    """Press it, see that it worked, and return what was sent."""
    console.do(console.send.click())
    console.misses(console.dialog)
    console.sees(f"Attempt {attempt} is queued")
    return sent(console)


# --- keep, change, empty ----------------------------------------------------------------------------------------------


def test_a_plain_retry_keeps_everything(console: Console, api: Client) -> None:
    run = api.finished("error", input_values={"user": "ada"}, sensitive_input_values={"password": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    assert confirm(console) == {}
    after = api.get_run(run["id"])
    assert (after["attempt"], after["input_values"]) == (2, {"user": "ada"})
    assert after["sensitive_input_aliases"] == run["sensitive_input_aliases"]
    console.reads(console.page.locator(".runhead"), "scheduling")
    console.do(expect(console.page.get_by_role("button", name="Retry …")).to_be_focused())


def test_values_are_changed_one_by_one_and_stay_exact(console: Console, api: Client) -> None:
    values = {"user": "ada", "account": 9007199254740993, "rate": 1.0, "__proto__": "x", "lines": "a\nb", "old": True}
    run = api.finished("error", input_values=values)
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Values", "Change")
    console.do(field.get_by_label("Value of user").fill("grace"))
    console.do(field.get_by_role("button", name="Remove old").click())
    console.do(field.get_by_role("button", name="Add a value").click())
    console.do(field.get_by_label("Name").last.fill("more"))
    console.do(field.get_by_label("Value", exact=True).fill('{"a": [1, null'))
    console.do(field.get_by_label("Kind of value").last.select_option("JSON"))
    console.do(console.send.click())
    console.reads(field, "“more” is not valid JSON")
    console.do(expect(field.get_by_label("Value", exact=True)).to_be_focused())
    console.do(field.get_by_label("Value", exact=True).fill('{"a": [1, null]}'))
    confirm(console)
    [request] = console.retries()
    assert request.post_data is not None
    assert '"account":9007199254740993' in request.post_data
    expected = values | {"user": "grace", "more": {"a": [1, None]}}
    del expected["old"]
    assert api.get_run(run["id"])["input_values"] == expected


def test_values_are_emptied(console: Console, api: Client) -> None:
    run = api.finished(input_values={"user": "ada"})
    console.sign_in()
    console.open_retry(run["id"])
    console.choose("Values", "Empty")
    assert confirm(console) == {"input_values": {}}
    assert api.get_run(run["id"])["input_values"] == {}


def test_all_secrets_are_needed_when_one_is_replaced(console: Console, api: Client, stack: Stack) -> None:
    run = api.finished("error", sensitive_input_values={"password": "old", "account": {"number": 1}})
    console.sign_in()
    console.open_retry(run["id"])
    console.reads(console.field("Secrets"), "password, account")
    field = console.choose("Secrets", "Change")
    console.reads(field, "replaces all secrets at once")
    inputs = field.locator("[data-secret]")
    assert console.do(inputs.evaluate_all("(nodes) => nodes.map((node) => node.value + node.type)")) == ["password"] * 2
    console.do(field.get_by_label("password", exact=True).fill("correct horse"))
    console.do(console.send.click())
    console.reads(field, "“account” is missing")
    assert console.retries() == []
    console.do(inputs.nth(1).fill("number 1"))
    console.do(console.send.click())
    console.reads(field, "“account” must be valid JSON")
    console.do(inputs.nth(1).fill('{"number": 9007199254740993}'))
    confirm(console)
    [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", run["id"])
    assert stack.secret(row["secret_path"]) == {"password": "correct horse", "account": '{"number":9007199254740993}'}
    aliases = api.get_run(run["id"])["sensitive_input_aliases"]
    assert {name: alias.split(":")[0] for name, alias in aliases.items()} == {
        "password": "vault",
        "account": "vault+json",
    }


def test_a_secret_of_several_lines_keeps_them(console: Console, api: Client, stack: Stack) -> None:
    run = api.finished("error", sensitive_input_values={"key": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.locator("[data-secret]").focus())
    pem = "-----BEGIN KEY-----\nabc\n-----END KEY-----\n"
    paste = (
        "(text) => { const data = new DataTransfer(); data.setData('text/plain', text);"
        " document.activeElement.dispatchEvent(new ClipboardEvent('paste',"
        " {clipboardData: data, bubbles: true, cancelable: true})) }"
    )
    console.do(console.page.evaluate(paste, pem))
    area = field.locator("textarea[data-secret]")
    console.do(expect(area).to_have_css("-webkit-text-security", "disc"))
    console.do(field.get_by_role("button", name="Show key").click())
    console.do(expect(area).not_to_have_css("-webkit-text-security", "disc"))
    confirm(console)
    [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", run["id"])
    assert stack.secret(row["secret_path"]) == {"key": pem}


def test_secrets_are_added_and_emptied(console: Console, api: Client, stack: Stack) -> None:
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.get_by_role("button", name="Add a secret").click())
    console.do(field.get_by_label("Name of the secret").fill("token"))
    console.do(field.get_by_label("Secret", exact=True).fill("t"))
    assert confirm(console) == {"sensitive_input_values": {"token": "t"}}
    api.report(run["id"], status="cancelled")
    console.open_retry(run["id"])
    console.reads(console.choose("Secrets", "Empty"), "The old ones are destroyed")
    console.do(console.send.click())
    console.sees("Attempt 3 is queued")
    assert not api.get_run(run["id"])["sensitive_input_aliases"]


def test_files_are_replaced_with_their_paths(console: Console, api: Client) -> None:
    run = api.finished("error", file_inputs=[file_input(b"old", "old.txt")])
    console.sign_in()
    console.open_retry(run["id"])
    console.reads(console.field("Files"), "old.txt (3 B)")
    field = console.choose("Files", "Change")
    console.do(console.send.click())
    console.reads(field, "Choose a file")
    files: list[Any] = [
        {"name": "a b.txt", "mimeType": "text/plain", "buffer": b"hello"},
        {"name": "empty.bin", "mimeType": "", "buffer": b""},
        {"name": "wrong.txt", "mimeType": "", "buffer": b"x"},
    ]
    console.do(field.locator("input[type=file]").set_input_files(files))
    console.reads(field, "3 files, 6 B")
    console.do(field.get_by_role("button", name="Remove wrong.txt").click())
    console.do(field.get_by_label("Path on the machine for a b.txt").fill("C:\\in\\a.txt"))
    console.do(field.get_by_label("Delete it there after the run").first.check())
    request = confirm(console)
    assert request["file_inputs"] == [
        {
            "filename": "a b.txt",
            "content": "aGVsbG8=",
            "target_path": "C:\\in\\a.txt",
            "cleanup_imports_after_run": True,
        },
        {"filename": "empty.bin", "content": ""},
    ]
    kept = api.get_run(run["id"])["input_attachment_ids"]
    names = [api.json_of(api.get(f"/v1/run-attachments/{one}"))["filename"] for one in kept]
    assert sorted(names) == ["a b.txt", "empty.bin"]


def test_too_large_files_are_refused_by_the_page_itself(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Files", "Change")
    add = (
        "(node, sizes) => { const all = new DataTransfer();"
        " for (const [name, size] of sizes) all.items.add(new File([new Uint8Array(size)], name));"
        " node.files = all.files; node.dispatchEvent(new Event('change', {bubbles: true})) }"
    )
    mib = 1024 * 1024
    for files, sentence in (
        ([["big.iso", 51 * mib]], "“big.iso” has 51 MiB; a file may have 50 MiB"),
        ([["a", 40 * mib], ["b", 40 * mib]], "a request may have 100 MiB"),
        ([[f"{number}.txt", 1] for number in range(101)], "These are 101 files; a retry takes 100"),
    ):
        console.do(field.locator("input[type=file]").evaluate(add, files))
        console.reads(field, sentence)
        console.do(console.send.click())
        console.reads(field, sentence)
        console.do(
            field.locator("ul.files").evaluate(
                "(list) => list.querySelectorAll('li > button').forEach((b) => b.click())"
            )
        )
    assert console.retries() == []


def test_another_machine_is_chosen_and_the_one_that_failed_is_marked(console: Console, api: Client) -> None:
    failed = api.machine(name="desk-1")
    other = api.machine(name="desk-2", status="disconnected")
    run = api.run()
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    api.report(run["id"], status="running")
    api.report(run["id"], status="error", error=["it broke"])
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Machine", "Change")
    console.do(console.send.click())
    console.reads(field, "Choose a machine")
    console.reads(field.locator("label", has_text="desk-1"), "attempt 1 failed here")
    console.reads(field.locator("label", has_text="desk-2"), "offline")
    console.do(field.get_by_label("desk-2").check())
    assert confirm(console) == {"machine_id": other}
    assert failed != api.get_run(run["id"])["machine_id"] == other


def test_pools_are_chosen_or_any_machine(console: Console, api: Client) -> None:
    api.json_of(api.post("/v1/pools", json={"name": "Finance"}), 201)
    office = api.json_of(api.post("/v1/pools", json={"name": "Office"}), 201)["id"]
    run = api.finished("error", machine_id=api.machine(status="disconnected"))
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Machine", "Change")
    console.do(field.locator("label", has_text="All machines of pools").click())
    console.do(field.get_by_label("Office").check())
    assert confirm(console) == {"pool_ids": [office]}
    api.report(run["id"], status="cancelled")
    console.open_retry(run["id"])
    console.choose("Machine", "Any")
    console.do(console.send.click())
    console.sees("Attempt 3 is queued")
    assert api.get_run(run["id"])["pool_ids"] == []


@pytest.mark.parametrize("kind", ["new", "join", "empty"])
def test_sessions(console: Console, api: Client, kind: str) -> None:
    session = api.run(start_session=True)["session_id"]
    run = api.finished("error", start_session=True, session_alias="morning")
    console.sign_in()
    console.open_retry(run["id"])
    console.reads(console.field("Session"), "morning")
    field = console.choose("Session", "Empty" if kind == "empty" else "Change")
    if kind == "join":
        console.do(field.locator("label", has_text="Join one").click())
        console.do(console.send.click())
        console.reads(field, "Paste the session's id")
        console.do(field.get_by_label("Id of the session").fill(session))
    if kind != "empty":
        console.do(field.get_by_label("Its name in the session").fill("evening"))
        console.do(field.get_by_label("Release the machine afterwards").select_option("yes"))
    more = {"session_alias": "evening", "release_session_after": True}
    expected: dict[str, Any] = {
        "new": {"start_session": True, **more},
        "join": {"session_id": session, **more},
        "empty": {"reuse_session": False},
    }[kind]
    assert confirm(console) == expected
    after = api.get_run(run["id"])
    assert (after["session_id"] == session) == (kind == "join")
    assert (after["session_id"] is None) == (kind == "empty")


@pytest.mark.parametrize(("mode", "before", "sends"), [("Priority", False, True), ("Normal", True, False)])
def test_priority_and_a_reason(console: Console, api: Client, mode: str, before: bool, sends: bool) -> None:
    run = api.finished("error", is_priority=before)
    console.sign_in()
    console.open_retry(run["id"])
    console.choose("Priority", mode)
    console.do(console.dialog.get_by_label("Reason").fill(" The ledger is back. "))
    assert confirm(console) == {"is_priority": sends, "reason": "The ledger is back."}


# --- said beforehand --------------------------------------------------------------------------------------------------


def dry_runs(console: Console) -> list[dict[str, Any]]:
    return [body(request) for request in console.sent("POST", "dry_run=true")]


def test_it_says_beforehand_what_will_happen(console: Console, api: Client) -> None:
    desk = api.machine(name="desk-2")
    run = api.finished("error", input_values={"user": "ada"}, sensitive_input_values={"password": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    aside = console.dialog.get_by_role("complementary", name="What will happen")
    for text in (
        "Attempt 2 will be queued, under the same id",
        "Cleared\nthe error, the result, the history, 1 output file",
        "Kept\nvalues, secrets",
        "Replaced\nnothing",
        "Secrets\npassword\nkept until",
        "Where\nany machine\n1 machine could take it now",
        "Then\nIt starts at once",
    ):
        console.until("(text) => document.querySelector('aside').innerText.includes(text)", text)
    console.choose("Values", "Empty")
    console.reads(aside, "Replacedvalues")
    field = console.choose("Machine", "Change")
    console.do(field.get_by_label("desk-2").check())
    console.reads(aside, "only desk-2")
    api.json_of(api.patch(f"/v1/machines/{desk}", json={"is_available": False}))
    console.choose("Priority", "Priority")
    console.reads(aside, "Its machine is offline")
    assert api.get_run(run["id"])["attempt"] == 1


def test_it_asks_once_after_the_last_change_with_names_and_without_values(console: Console, api: Client) -> None:
    secrets = {"password": "old", "account": {"number": 1}}
    run = api.finished("error", sensitive_input_values=secrets)
    console.sign_in()
    console.open_retry(run["id"])
    console.sees(console.dialog.get_by_text("Attempt 2 will be queued"))
    files = console.choose("Files", "Change")
    content: Any = {"name": "a.txt", "mimeType": "", "buffer": b"the content of the file"}
    console.do(files.locator("input[type=file]").set_input_files([content]))
    field = console.choose("Secrets", "Change")
    until(lambda: (console.do(console.page.wait_for_timeout(50)), len(dry_runs(console)[-1]) == 2)[1])
    before = len(dry_runs(console))
    typed = """async (input) => {
        for (const character of "canary") {
            input.value += character;
            input.dispatchEvent(new Event("input", {bubbles: true}));
            await new Promise((done) => setTimeout(done, 20));
        }
        return performance.now();
    }"""
    last = console.do(field.get_by_label("password", exact=True).evaluate(typed))
    until(lambda: (console.do(console.page.wait_for_timeout(50)), len(dry_runs(console)) > before)[1])
    asked = "performance.getEntriesByType('resource').filter((one) => one.name.includes('dry_run')).at(-1).startTime"
    console.until(f"(last) => ({asked}) > last", last)
    assert 260 < console.do(console.page.evaluate(asked)) - last < 2000
    assert len(dry_runs(console)) == before + 1
    assert dry_runs(console)[-1] == {
        "sensitive_input_values": {"password": "", "account": ""},
        "file_inputs": [{"filename": "a.txt", "content": ""}],
    }
    assert all("canary" not in str(asked) for asked in dry_runs(console))


def test_what_would_be_refused_is_told_and_cannot_be_pressed_until_it_passes(console: Console, api: Client) -> None:
    run = api.finished("error")
    pool = api.pool()
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Machine", "Change")
    console.do(field.locator("label", has_text="All machines of pools").click())
    console.do(field.get_by_role("checkbox", name="pool").check())
    console.reads(console.dialog.get_by_role("complementary"), "No machine is in all its pools")
    api.delete(f"/v1/pools/{pool}")
    console.do(console.dialog.get_by_label("Reason").fill("x"))
    console.sees("It would be refused")
    console.sees("No pool with this id exists")
    console.do(expect(console.send).to_have_attribute("aria-disabled", "true"))
    console.do(console.send.click(force=True))
    assert console.retries() == []
    console.choose("Machine", "Keep")
    console.do(expect(console.send).not_to_have_attribute("aria-disabled", "true"))
    confirm(console)


def test_when_it_cannot_be_asked_it_says_so_and_the_retry_still_works(console: Console, api: Client) -> None:
    console.tab.expect("ERR_FAILED|status of 422")
    run = api.finished("error")
    console.sign_in()

    async def lose(route: Route) -> None:
        await route.abort()

    console.intercept("**/retry?dry_run=true", lose)
    console.open_retry(run["id"])
    console.sees("It could not be asked")
    confirm(console)


def test_a_replica_without_dry_runs_takes_no_question_for_an_order(console: Console, api: Client) -> None:
    """While a version is rolled out, the replica that answers may not know the parameter: it must not retry."""
    console.tab.expect("status of 422")
    run = api.finished("error")
    console.sign_in()

    async def forget_the_parameter(route: Route) -> None:
        await route.continue_(url=route.request.url.replace("dry_run", "unknown"))

    console.intercept("**/retry?dry_run=true", forget_the_parameter)
    console.open_retry(run["id"])
    console.sees("This service cannot say beforehand")
    assert api.get_run(run["id"])["attempt"] == 1
    console.do(console.send.click())
    console.sees("Attempt 2 is queued")


# --- once -------------------------------------------------------------------------------------------------------------


def test_a_double_click_is_one_attempt(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    console.do(console.send.dblclick())
    console.sees("Attempt 2 is queued")
    assert len(console.retries()) == 1
    assert api.get_run(run["id"])["attempt"] == 2


def test_a_lost_reply_is_sent_again_under_the_same_key_and_is_one_attempt(console: Console, api: Client) -> None:
    console.tab.expect("ERR_FAILED")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    lost = 0

    async def lose(route: Route) -> None:
        nonlocal lost
        if "dry_run" in route.request.url:
            await route.continue_()
            return
        if not lost:
            lost += 1
            await route.fetch()  # it arrives and takes effect, and nobody hears of it
            await route.abort()
            return
        await route.continue_()

    console.intercept("**/retry*", lose)
    console.do(console.send.click())
    console.sees("Whether it took effect is not known")
    console.sees("Again in")
    console.sees("Attempt 2 is queued")
    assert lost == 1
    keys = {request.headers["idempotency-key"] for request in console.retries()}
    assert (len(console.retries()), len(keys)) == (2, 1)
    assert api.get_run(run["id"])["attempt"] == 2


def test_another_dialog_has_another_key(console: Console, api: Client) -> None:
    run = api.finished("error")
    console.sign_in()
    for attempt in (2, 3):
        console.open_retry(run["id"])
        console.do(console.send.click())
        console.sees(f"Attempt {attempt} is queued")
        api.report(run["id"], status="cancelled")
        console.reads(console.page.locator(".runhead"), "cancelled")
    assert len({request.headers["idempotency-key"] for request in console.retries()}) == 2


def test_two_tabs_are_one_attempt(console: Console, api: Client) -> None:
    console.tab.expect("status of 409")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    # The other tab was quicker, and this one has not heard of it yet.
    console.intercept(f"**/v1/runs/{run['id']}", _hold)
    api.json_of(api.retry(run["id"]))
    console.do(console.send.click())
    console.sees("The run is scheduling")
    console.sees("Somebody else may have retried it")
    assert api.get_run(run["id"])["attempt"] == 2


async def _hold(route: Route) -> None:
    del route  # it never gets an answer


# --- what stands in the way -------------------------------------------------------------------------------------------


def test_expired_secrets_are_asked_for(console: Console, api: Client, stack: Stack) -> None:
    console.tab.expect("status of 409")
    run = api.finished("error", sensitive_input_values={"password": "old"})
    stack.sql(
        "UPDATE deletions SET due_at = now() WHERE name = (SELECT secret_path FROM runs WHERE id = $1)", run["id"]
    )
    console.sign_in()
    console.open_retry(run["id"])
    # The reason stands beside the button, and the dialog opens where it can be mended.
    obstacle = console.page.locator("#obstacle")
    secret = console.field("Secrets").locator("[data-secret]")
    console.sees(secret)
    console.reads(obstacle, "stored secrets have expired: password")
    console.do(secret.fill("new"))
    confirm_after_refusal(console, {"sensitive_input_values": {"password": "new"}})


def confirm_after_refusal(console: Console, expected: dict[str, Any]) -> None:
    console.do(console.send.click())
    console.sees("Attempt 2 is queued")
    assert body(console.retries()[-1]) == expected


def test_expired_files_are_asked_for(console: Console, api: Client) -> None:
    console.tab.expect("status of 409")
    run = api.finished("error", file_inputs=[file_input()])
    past = {"expires_at": "2020-01-01T00:00:00Z"}
    api.json_of(api.put(f"/v1/run-attachments/{run['input_attachment_ids'][0]}", json=past))
    console.sign_in()
    console.open_retry(run["id"])
    console.do(expect(console.field("Files").get_by_label("Change", exact=True)).to_be_checked())
    console.reads(console.dialog.get_by_role("complementary"), "An input attachment of the run has expired")
    console.choose("Files", "Empty")
    confirm_after_refusal(console, {"file_inputs": []})


def test_a_refusal_is_shown_where_it_is_mended(console: Console, api: Client) -> None:
    console.tab.expect("status of 4")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    for code, status, shows in (
        ("machine_not_found", 404, "Machine"),
        ("pool_not_found", 404, "Machine"),
        ("session_not_found", 404, "Session"),
        ("payload_too_large", 413, "Files"),
        ("sensitive_inputs_expired", 409, "Secrets"),
        ("input_attachments_expired", 409, "Files"),
    ):
        for kept in ("Secrets", "Files"):
            console.choose(kept, "Keep")
        console.intercept("**/retry", _answer(status, code, f"The sentence of {code}."))
        console.do(console.send.click())
        console.reads(console.field(shows).get_by_role("alert"), f"The sentence of {code}.")
        console.do(expect(console.send).to_be_enabled())
        console.release("**/retry")


def test_a_refusal_that_nothing_here_mends_is_told_and_not_sent_again(console: Console, api: Client) -> None:
    console.tab.expect("status of 4")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    for number, (status, code) in enumerate(
        ((403, "insufficient_scope"), (404, "run_not_found"), (409, "run_not_terminal"), (409, "retry_too_soon"))
    ):
        console.intercept("**/retry", _answer(status, code, f"The sentence of {code}."))
        console.do(console.send.click())
        console.reads(console.dialog.locator("footer").get_by_role("alert"), f"The sentence of {code}.")
        console.release("**/retry")
        assert len(console.retries()) == number + 1
    confirm_after_refusal(console, {})


def _answer(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None
) -> Callable[[Route], Coroutine[Any, Any, None]]:
    async def answer(route: Route) -> None:
        problem = {"type": f"urn:problem:{code}", "title": "", "status": status, "detail": detail, "code": code}
        headers_ = {"Content-Type": "application/problem+json", "X-Request-ID": "r1", **(headers or {})}
        await route.fulfill(status=status, headers=headers_, body=json.dumps(problem))

    return answer


@pytest.mark.parametrize(
    ("status", "code", "headers"),
    [
        (503, "vault_unavailable", {"Retry-After": "1"}),
        (429, "quota_exceeded", {"Retry-After": "1"}),
        (409, "idempotency_in_progress", {"Retry-After": "1", "Idempotency-Status": "in_progress"}),
    ],
)
def test_what_passes_is_counted_down_and_sent_again_under_the_same_key(
    console: Console, api: Client, status: int, code: str, headers: dict[str, str]
) -> None:
    console.tab.expect(f"status of {status}")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    console.choose("Values", "Empty")
    console.intercept("**/retry", _answer(status, code, "Not now.", headers))
    console.do(console.send.click())
    console.sees("Not now.")
    console.sees("Again in 1 s")
    until(lambda: (console.do(console.page.wait_for_timeout(50)), len(console.retries()) >= 2)[1])
    console.release("**/retry")
    console.sees("Attempt 2 is queued")
    assert len({(request.headers["idempotency-key"], request.post_data) for request in console.retries()}) == 1
    assert api.get_run(run["id"])["attempt"] == 2


def test_a_frozen_vault_is_waited_for_and_waiting_can_be_stopped(console: Console, api: Client, stack: Stack) -> None:
    console.tab.expect("status of 503")
    run = api.finished("error", sensitive_input_values={"password": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.locator("[data-secret]").fill("new"))
    stack.bao.freeze()
    try:
        console.do(console.send.click())
        console.sees("The secret store did not answer in time")
        console.sees("Again in")
        console.do(console.dialog.get_by_role("button", name="Stop").click())
        console.do(expect(field.locator("[data-secret]")).to_be_editable())
    finally:
        stack.bao.thaw()
    # Nothing has changed, nothing is lost: what was typed is still there.
    assert api.get_run(run["id"])["attempt"] == 1
    console.do(console.send.click())
    console.sees("Attempt 2 is queued")
    [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", run["id"])
    assert stack.secret(row["secret_path"]) == {"password": "new"}


def test_a_422_marks_the_field_that_it_names(console: Console, api: Client) -> None:
    console.tab.expect("status of 422")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    fields = ("Values", "Secrets", "Files", "Machine", "Session", "Priority")
    for loc, shows in (
        (["input_values"], "Values"),
        (["sensitive_input_values"], "Secrets"),
        (["file_inputs", 0, "filename"], "Files"),
        (["machine_id"], "Machine"),
        (["pool_ids", 0], "Machine"),
        (["session_id"], "Session"),
        (["session_alias"], "Session"),
        (["start_session"], "Session"),
        (["release_session_after"], "Session"),
        (["is_priority"], "Priority"),
    ):
        console.choose(shows, "Keep")

        console.intercept("**/retry", _invalid(["body", *loc], f"Not {loc}."))
        console.do(console.send.click())
        field = console.field(shows)
        console.reads(field.get_by_role("alert"), f"Not {loc}.")
        marked = field.locator("[aria-invalid=true]").first
        console.do(expect(marked).to_be_focused())
        console.do(expect(marked).to_have_accessible_description(f"Not {loc}."))
        for other in set(fields) - {shows}:
            console.misses(console.field(other).get_by_role("alert"))
        console.release("**/retry")
        console.choose(shows, "Any" if shows == "Machine" else "Normal" if shows == "Priority" else "Empty")
        console.misses(field.get_by_role("alert"))


def _invalid(loc: Sequence[object], sentence: str) -> Callable[[Route], Coroutine[Any, Any, None]]:
    async def answer(route: Route) -> None:
        await route.fulfill(status=422, json={"detail": [{"loc": loc, "msg": sentence, "type": "x"}]})

    return answer


def test_the_services_own_422s_name_fields_that_are_there(console: Console, api: Client) -> None:
    console.tab.expect("status of 422")
    run = api.finished("error")
    console.sign_in()
    console.open_retry(run["id"])
    files = console.choose("Files", "Change")
    hostile: Any = {"name": "fine.txt", "mimeType": "", "buffer": b"x"}
    console.do(files.locator("input[type=file]").set_input_files([hostile]))
    path = files.get_by_label("Path on the machine for fine.txt")
    console.do(path.fill("..\\..\\windows\\system32"))
    console.do(console.send.click())
    console.reads(files.get_by_role("alert"), "“fine.txt”: ")
    console.do(expect(path).to_have_attribute("aria-invalid", "true"))
    console.do(path.fill("C:\\in\\fine.txt"))
    console.misses(files.get_by_role("alert"))
    confirm_after_refusal(
        console, {"file_inputs": [{"filename": "fine.txt", "content": "eA==", "target_path": "C:\\in\\fine.txt"}]}
    )


# --- secrets stay secret ----------------------------------------------------------------------------------------------


def test_a_typed_secret_is_afterwards_nowhere_but_in_the_retry(console: Console, api: Client) -> None:
    canary = "canary-5f1d9c"
    said: list[str] = []
    console.page.on("console", lambda message: said.append(message.text))
    run = api.finished("error", sensitive_input_values={"password": "old", "more": "old"})
    console.do(console.page.context.grant_permissions(["clipboard-read", "clipboard-write"]))
    console.sign_in()
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.get_by_label("password", exact=True).press_sequentially(canary))
    console.do(field.locator("[data-secret]").nth(1).fill(canary + "-2"))
    console.do(field.get_by_role("button", name="Show password").click())
    console.do(console.dialog.get_by_label("Reason").fill("corrected"))
    for language in ("curl", "Python"):
        console.do(console.dialog.get_by_role("button", name=language).click())
        console.sees(f"{language} copied")
        copied = console.do(console.page.evaluate("navigator.clipboard.readText()"))
        assert canary not in copied
        assert "password" in copied
    console.do(console.page.wait_for_timeout(500))  # longer than a dry run waits for the last change
    confirm(console)
    for tab in ("now", "inputs", "attempts", "events", "json"):
        console.open_run(run["id"], tab)
        assert canary not in console.do(console.page.content())
    state = "JSON.stringify([{...sessionStorage}, {...localStorage}, location.href, document.cookie, history.state])"
    assert canary not in console.do(console.page.evaluate(state))
    values = "[...document.querySelectorAll('input, textarea')].map((node) => node.value).join()"
    assert canary not in console.do(console.page.evaluate(values))
    assert not [text for text in said if canary in text]
    carrying = [request for request in console.asked if canary in f"{request.url}{request.headers}{request.post_data}"]
    assert carrying == console.retries()
    assert len(carrying) == 1


def test_closing_asks_before_it_forgets_and_forgets_then(console: Console, api: Client) -> None:
    run = api.finished("error", sensitive_input_values={"password": "old"})
    console.sign_in()
    console.open_retry(run["id"])
    console.do(console.page.keyboard.press("Escape"))  # nothing was chosen: it closes at once
    console.misses(console.dialog)
    console.open_retry(run["id"])
    field = console.choose("Secrets", "Change")
    console.do(field.locator("[data-secret]").fill("typed"))
    console.do(console.page.keyboard.press("Escape"))
    console.sees("Discard what you have chosen and typed?")
    console.do(console.page.get_by_role("button", name="Stay").click())
    console.do(expect(field.locator("[data-secret]")).to_have_value("typed"))
    console.do(console.page.keyboard.press("Escape"))
    console.do(console.page.get_by_role("button", name="Discard").click())
    console.misses(console.dialog)
    console.open_retry(run["id"])
    console.do(expect(console.choose("Secrets", "Change").locator("[data-secret]")).to_have_value(""))
    assert console.retries() == []


def test_it_is_done_with_the_keyboard_alone(console: Console, api: Client, stack: Stack) -> None:
    """Find what failed, correct the password, choose another machine, say why, retry, watch it succeed."""
    api.machine(name="desk-1", status="disconnected")
    other = api.machine(name="desk-2")
    run = api.finished("error", sensitive_input_values={"password": "wrong"})
    console.sign_in("#/runs?status=error")
    console.do(expect(console.rows).to_have_count(1))
    press = console.page.keyboard.press

    def tab_to(selector: str) -> None:
        for _ in range(60):
            if console.do(console.page.evaluate("(selector) => document.activeElement.matches(selector)", selector)):
                return
            console.do(press("Tab"))
        raise AssertionError(f"Tab does not reach {selector}")

    console.do(press("j"))
    console.do(press("Enter"))
    console.sees("it broke")
    console.do(press("r"))
    console.sees(console.dialog)
    tab_to("fieldset:nth-of-type(2) input[value=keep]")
    console.do(press("ArrowRight"))
    tab_to("[data-secret]")
    console.do(console.page.keyboard.type("correct horse"))
    tab_to("fieldset:nth-of-type(4) input[value=keep]")
    console.do(press("ArrowRight"))
    tab_to(".picks input")
    console.do(press("ArrowDown"))
    console.do(expect(console.dialog.get_by_label("desk-2")).to_be_checked())
    tab_to("input[maxlength='500']")
    console.do(console.page.keyboard.type("The password was wrong."))
    tab_to("footer .primary")
    console.do(press("Enter"))
    console.sees("Attempt 2 is queued")
    until(lambda: api.get_run(run["id"])["assigned_machine_id"] == other)
    api.report(run["id"], status="running")
    api.report(run["id"], status="success")
    console.reads(console.page.locator(".runhead"), "success")
    [row] = stack.sql("SELECT secret_path FROM runs WHERE id = $1", run["id"])
    assert stack.secret(row["secret_path"]) == {"password": "correct horse"}


def test_a_retry_onto_a_dead_machine_is_amber_and_any_machine_is_one_press_away(console: Console, api: Client) -> None:
    desk = api.machine(status="disconnected")
    run = api.run(machine_id=desk)
    api.report(run["id"], status="error", error=["it broke"])
    api.machine()
    console.sign_in()
    console.open_retry(run["id"])
    verdict = console.dialog.locator(".verdict")
    console.reads(verdict, "will be queued, and no machine can take it now")
    console.do(expect(verdict.locator(".icon-warn")).to_have_count(1))
    console.do(verdict.get_by_role("button", name="Any machine").click())
    console.reads(verdict, "will be queued, under the same id")
    console.do(console.send.click())
    console.reads(console.page.locator(".runhead"), "attempt 2")
    assert [body(request) for request in console.retries()] == [{"pool_ids": []}]
