"""One run: what it is now, what it was given, its attempts and events, and strings that would like to be more than text."""

import asyncio
import base64
from pathlib import Path
from uuid import uuid4

import pytest
from playwright.async_api import Route, expect

from tests.console.conftest import Console
from tests.console.sample_data import MARKUP, failed_login
from tests.support.client import Client, file_input
from tests.support.stack import Stack
from tests.support.waiting import until


def test_what_went_wrong_stands_first_and_its_history_can_be_read(console: Console, api: Client) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "click", "arguments": '{"button": "Save"}'}}],
        "finish_reason": "tool_calls",
    }
    remote = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "https://elsewhere.example/x.png"}}],
    }
    broken = {"role": "user", "content": [{"type": "image", "source": {"media_type": "image/png", "data": "%%%"}}]}
    odd = {"steps": [1, 2], "at": 1.50}
    api.report(
        run["id"],
        status="error",
        error=["Login failed.\nStep 2.", "The screen was locked."],
        output_data={"posted": 0, "rest": [1001, 1002]},
        run_message_history=[*failed_login(), openai, remote, broken, odd],
    )
    console.sign_in(f"#/runs/{run['id']}")
    for text in (
        "Login failed.\nStep 2.",
        "The screen was locked.",
        '"posted"',
        "I open the ledger and log in.",
        "type_text",
    ):
        console.sees(console.page.locator(".panel").get_by_text(text))
    console.sees(console.page.get_by_text("Login failed: the password is not valid."))
    shown = console.page.get_by_role("button", name="Picture in message 3, enlarge").last
    console.until(
        "() => { const image = document.querySelector('.picture img'); return image.complete && image.naturalWidth === 320 }"
    )
    console.do(shown.click())
    console.sees(console.dialog.get_by_role("img", name="Picture in message 3"))
    console.do(console.page.keyboard.press("Escape"))
    for text in ('"Save"', "finish_reason", "https://elsewhere.example/x.png", "A picture that cannot be read", "1.5"):
        console.do(expect(console.page.locator(".panel")).to_contain_text(text))
    assert not [request for request in console.asked if "elsewhere" in request.url]


def test_the_last_picture_stands_beside_the_error_and_all_are_a_strip(console: Console, api: Client) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    history = [message for _ in range(15) for message in failed_login()]
    api.report(run["id"], status="error", error=["Login failed."], run_message_history=history)
    console.sign_in(f"#/runs/{run['id']}")
    beside = console.page.locator(".beside")
    console.reads(beside, "Login failed.")
    console.sees(beside.get_by_role("button", name="Picture in message 59, enlarge"))
    strip = console.page.get_by_role("group", name="Pictures, the latest first")
    console.do(expect(strip.get_by_role("button")).to_have_count(13))
    console.do(strip.get_by_role("button", name="3 earlier").click())
    console.do(expect(strip.get_by_role("button")).to_have_count(15))
    console.do(beside.get_by_role("button").click())
    console.reads(console.dialog, "15 of 15")
    console.do(console.page.keyboard.press("ArrowLeft"))
    console.reads(console.dialog, "14 of 15")
    console.sees(console.dialog.get_by_role("img", name="Picture in message 55"))
    console.do(console.page.keyboard.press("Escape"))
    console.do(console.page.get_by_role("button", name="To the end").click())
    console.do(expect(console.page.locator(".history > li").last).to_be_in_viewport())
    console.do(expect(console.page.locator(".history > li").last).to_be_focused())


def test_a_run_that_is_as_it_was_is_not_sent_again_and_its_history_comes_in_pages(
    console: Console, api: Client
) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    messages = [{"role": "user", "content": f"message {number}"} for number in range(70)]
    api.report(run["id"], status="success", run_message_history=messages)
    console.sign_in(f"#/runs/{run['id']}")
    console.do(expect(console.page.locator(".history > li")).to_have_count(60))
    asked = [request for request in console.sent("GET", f"/v1/runs/{run['id']}") if "/history" not in request.url]
    assert all("run_message_history" not in request.url and "fields=" in request.url for request in asked)
    pages = len(console.sent("GET", "/history"))

    async def next_round() -> int:
        async with console.page.expect_response(lambda reply: f"/v1/runs/{run['id']}?" in reply.url) as heard:
            pass
        return (await heard.value).status

    assert [console.do(next_round()) for _ in range(2)] == [304, 304]
    assert len(console.sent("GET", "/history")) == pages
    console.go(f"#/runs/{run['id']}/json")
    console.reads(console.page.locator(".panel"), "message 0")


def test_a_silent_executor_is_amber_on_the_run_the_list_and_the_queue(
    console: Console, api: Client, stack: Stack
) -> None:
    desk = api.machine(name="desk-7")
    run = api.run(machine_id=desk)
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    api.report(run["id"], status="running")
    until(lambda: api.report(run["id"], run_message_history=[])["is_reporting"])
    stack.sql(
        "UPDATE runs SET started_at = now() - interval '9 min', changed_at = now() - interval '9 min',"
        " reported_at = now() - interval '245 s' WHERE id = $1",
        run["id"],
    )
    console.sign_in()
    console.reads(console.rows.locator(".c-why .wait"), "no report for 4 min")
    console.go("#/queue")
    console.reads(console.page.locator(".machines .wait"), "no report for 4 min")
    console.open_run(run["id"])
    console.reads(console.page.locator(".panel > :first-child"), "No report for 4 min")
    api.report(run["id"], run_message_history=[])
    console.misses(console.page.locator(".panel .is-warn"))


def test_a_waiting_run_is_sent_to_another_machine_and_to_any(console: Console, api: Client) -> None:
    old, new = api.machine(name="desk-7", status="disconnected"), api.machine(name="desk-8", status="disconnected")
    run = api.run(machine_id=old)
    console.sign_in(f"#/runs/{run['id']}")
    console.do(console.page.get_by_role("button", name="Other machine …").click())
    console.do(console.dialog.get_by_label("desk-8").check())
    console.do(console.dialog.get_by_role("button", name="Send it there").click())
    console.reads(console.page.locator(".panel"), "For desk-8")
    assert api.get_run(run["id"])["machine_id"] == new
    console.do(console.page.get_by_role("button", name="Any machine").click())
    console.reads(console.page.locator(".panel"), "For any machine")
    console.go(f"#/runs/{run['id']}/events")
    console.reads(console.page.locator(".events"), "retargeted")


def test_a_long_history_comes_in_parts(console: Console, api: Client) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    messages = [{"role": "user", "content": f"message {number}"} for number in range(200)]
    api.report(run["id"], status="success", run_message_history=[*messages, {"role": "user", "content": "x" * 10_000}])
    console.sign_in(f"#/runs/{run['id']}")
    items = console.page.locator(".history > li")
    console.do(expect(items).to_have_count(60))
    console.do(console.page.get_by_role("button", name="Show all 10,000 characters").click())
    console.reads(items.last, "x" * 10_000)
    console.do(console.page.get_by_role("button", name="Show the 141 before").click())
    console.do(expect(items).to_have_count(201))
    console.do(expect(items.first).to_have_text("usermessage 0"))
    console.do(expect(items.first).to_be_focused())


def test_what_was_unfolded_stays_so_when_names_and_files_arrive(console: Console, api: Client) -> None:
    run = api.run()
    api.json_of(api.patch(f"/v1/workflows/{run['workflow_id']}", json={"name": "Post the invoice"}))
    api.report(run["id"], status="running")
    api.upload(run["id"])
    messages = [{"role": "user", "content": f"message {number}"} for number in range(70)]
    api.report(run["id"], status="success", run_message_history=messages)
    release = asyncio.Event()

    async def late(route: Route) -> None:
        await release.wait()
        await route.continue_()

    console.intercept(f"**/v1/workflows/{run['workflow_id']}", late)
    console.intercept("**/v1/run-attachments?*", late)
    console.sign_in(f"#/runs/{run['id']}")
    items = console.page.locator(".history > li")
    console.do(console.page.get_by_role("button", name="Show the 10 before").click())
    console.do(expect(items).to_have_count(70))
    release.set()
    console.reads(console.page.locator(".runhead"), "Post the invoice")
    console.sees(console.page.get_by_role("button", name="Download out.txt"))
    console.do(expect(items).to_have_count(70))


def test_inputs_show_values_exactly_secrets_by_name_and_files(console: Console, api: Client) -> None:
    run = api.finished(
        "error",
        input_values={"user": "ada", "account": 9007199254740993, "rate": 1.0, "nested": {"a": [True, None]}},
        sensitive_input_values={"password": "canary-1", "pin": 1234},
        file_inputs=[file_input(b"x" * 2048, "invoice.pdf", target_path="C:\\in\\invoice.pdf")],
    )
    console.sign_in(f"#/runs/{run['id']}/inputs")
    panel = console.page.locator(".panel")
    for text in (
        "ada",
        "9007199254740993",
        "password",
        "vault://",
        "vault+json://",
        "invoice.pdf",
        "2.0 KiB",
        "C:\\in\\invoice.pdf",
    ):
        console.reads(panel, text)
    assert "canary-1" not in console.do(console.page.content())
    console.go(f"#/runs/{run['id']}/json")
    console.reads(panel, '"account": 9007199254740993')


def test_files_are_saved_under_their_own_names_with_the_key_in_no_url(console: Console, api: Client) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    hostile = "<img src=x onerror=alert(1)>.html"
    api.upload(run["id"], b"<script>document.title = 'owned'</script>", hostile)
    api.upload(run["id"], b"\x00\x01\x02", "résumé 100%.bin")
    api.report(run["id"], status="success")
    console.sign_in(f"#/runs/{run['id']}")
    for name, content in (
        (hostile, b"<script>document.title = 'owned'</script>"),
        ("résumé 100%.bin", b"\x00\x01\x02"),
    ):

        async def save(name: str = name) -> tuple[str, Path]:
            async with console.page.expect_download() as started:
                await console.page.get_by_role("button", name=f"Download {name}", exact=True).click()
            download = await started.value
            return download.suggested_filename, Path(await download.path())

        saved, path = console.do(save())
        assert path.read_bytes() == content
        # The browser replaces what a file name cannot hold.
        assert saved == name.replace("<", "_").replace(">", "_").replace("?", "_"), saved
    assert "owned" not in console.do(console.page.title())
    assert all("signature" not in request.url and console.key not in request.url for request in console.asked)


def test_attempts_tell_who_why_how_long_and_what_was_changed(console: Console, api: Client, stack: Stack) -> None:
    run = api.finished("error", machine_id=api.machine(name="desk-7"))
    api.json_of(
        api.retry(run["id"], input_values={"user": "ada"}, is_priority=True, reason="The ledger was restarted.")
    )
    api.report(run["id"], status="running")
    stack.sql("UPDATE runs SET started_at = queued_at + interval '90 seconds' WHERE id = $1", run["id"])
    stack.sql("UPDATE run_attempts SET ended_at = started_at + interval '7 seconds' WHERE run_id = $1", run["id"])
    console.sign_in(f"#/runs/{run['id']}/attempts")
    items = console.page.locator(".attempts > li")
    console.do(expect(items).to_have_count(2))
    for text in (
        "Attempt 2",
        "running",
        "The ledger was restarted.",
        "values",
        "priority",
        "waited 1 min 30 s",
    ):
        console.reads(items.nth(0), text)
    for text in ("Attempt 1", "error", "it broke", "ran 7.0 s"):
        console.reads(items.nth(1), text)
    console.do(expect(items.nth(0).locator(".bar")).to_have_count(2))


def test_events_tell_each_change_also_of_a_run_that_is_gone(console: Console, api: Client) -> None:
    console.tab.expect("status of 404")
    run = api.finished("error")
    api.json_of(api.retry(run["id"], reason="once more"))
    console.sign_in(f"#/runs/{run['id']}/events")
    events = console.page.locator(".events > li")
    for text in ("created", "started", "ended", "retried", "once more"):
        console.reads(console.page.locator(".events"), text)
    console.do(expect(events.first).to_contain_text("retried"))  # the newest first
    assert api.delete(f"/v1/runs/{run['id']}?reason=mistake").status_code == 204
    console.sees("This run was deleted")
    console.reads(events.first, "deleted")
    console.reads(events.first, "mistake")
    console.misses(console.page.get_by_role("button", name="Retry …"))


def test_an_unknown_run_says_what_it_may_be(console: Console, foreign: Client) -> None:
    console.tab.expect("status of 404")
    console.sign_in()
    for run in (str(uuid4()), foreign.finished()["id"]):
        console.go(f"#/runs/{run}")
        console.sees("No run with this id")
        console.do(console.page.get_by_role("link", name="To the runs").click())
        console.sees("No runs yet")


def test_it_follows_a_run_to_its_end(console: Console, api: Client) -> None:
    run = api.run(machine_id=api.machine(status="disconnected"))
    console.sign_in(f"#/runs/{run['id']}")
    title = console.page.locator(".runhead")
    console.reads(title, "scheduling")
    console.sees("Its machine is offline")
    button = console.page.get_by_role("button", name="Retry …")
    console.do(expect(button).to_have_attribute("aria-disabled", "true"))
    console.do(
        expect(button).to_have_accessible_description("It is waiting for a machine. Retry works when it has ended.")
    )
    api.report(run["id"], status="running")
    console.reads(title, "running")
    console.do(
        expect(button).to_have_accessible_description(
            "It is running. Retry works when it has ended; cancel it if its executor died."
        )
    )
    console.do(button.click(force=True))
    console.misses(console.dialog)
    api.report(run["id"], status="success", output_data={"answer": 42})
    console.reads(title, "success")
    console.sees('"answer"')
    console.do(expect(button).not_to_have_attribute("aria-disabled", "true"))


def test_an_active_run_can_be_cancelled_with_a_reason(console: Console, api: Client) -> None:
    run = api.run()
    api.report(run["id"], status="running")
    console.sign_in(f"#/runs/{run['id']}")
    console.do(console.page.get_by_role("button", name="Cancel run …").click())
    console.do(console.dialog.get_by_label("Reason").fill("Its desktop hangs."))
    console.do(console.dialog.get_by_role("button", name="Cancel run").dblclick())
    console.reads(console.page.locator(".runhead"), "cancelled")
    first = console.page.locator(".panel > :first-child")
    console.reads(first, "Cancelled by you (this key), ")
    console.reads(first, "Its desktop hangs.")
    console.misses("Nothing was reported")
    [sent] = console.sent("PATCH", run["id"])
    assert sent.headers["idempotency-key"]
    events = api.json_of(api.get(f"/v1/runs/{run['id']}/events"))["items"]
    assert [event["reason"] for event in events if event["event"] == "ended"] == ["Its desktop hangs."]


def test_markup_in_every_string_that_a_caller_can_set_stays_text(console: Console, api: Client, stack: Stack) -> None:
    workflow = api.json_of(api.post("/v1/workflows", json={"name": MARKUP[:255], "main_prompt": MARKUP}), 201)["id"]
    body = {"fingerprint": MARKUP, "unkey_key_id": "key", "name": MARKUP, "hostname": MARKUP}
    desk = api.json_of(api.post("/v1/machines", json=body), 201)["id"]
    pool = api.json_of(api.post("/v1/pools", json={"name": MARKUP, "description": MARKUP}), 201)["id"]
    api.json_of(api.post(f"/v1/pools/{pool}/machines", json={"machine_ids": [desk]}))
    evil = {
        "role": MARKUP,
        "content": [{"type": "text", "text": MARKUP}, {"type": MARKUP}, {"type": "tool_use", "name": MARKUP}],
    }
    link = {"role": "user", "content": [{"type": "image_url", "image_url": "javascript:document.title='owned'"}]}
    svg = base64.b64encode(f"<svg xmlns='http://www.w3.org/2000/svg'>{MARKUP}</svg>".encode()).decode()
    drawing = {"role": "user", "content": [{"type": "image", "source": {"media_type": "image/svg+xml", "data": svg}}]}
    run = api.run(
        workflow_id=workflow,
        pool_ids=[pool],
        input_values={MARKUP: MARKUP, "__proto__": {"x": MARKUP}, "constructor": "\u202etxt.exe"},
        sensitive_input_values={MARKUP: "x"},
        start_session=True,
        session_alias=MARKUP,
        file_inputs=[file_input(b"x")],
    )
    # Such names are refused now; those that are stored stay.
    stack.sql(
        "UPDATE run_attachments SET filename = $2, target_path = $3 WHERE run_id = $1",
        run["id"],
        MARKUP.replace("/", "_"),
        MARKUP,
    )
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    for _ in range(2):
        api.report(run["id"], status="running")
        api.upload(run["id"], b"x", MARKUP.replace("/", "_"))
        api.report(
            run["id"],
            status="error",
            error=[MARKUP, "\u202eevil"],
            output_data={MARKUP: MARKUP},
            run_message_history=[evil, link, drawing],
            reason=MARKUP,
        )
        if api.get_run(run["id"])["attempt"] == 1:
            api.json_of(api.retry(run["id"], reason=MARKUP))
            until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    console.sign_in()
    console.reads(console.rows, MARKUP)
    for tab in ("now", "inputs", "attempts", "events", "json"):
        console.open_run(run["id"], tab)
        console.do(expect(console.page.locator(".panel")).to_contain_text("<img src=x onerror="))
    console.open_retry(run["id"])
    for legend in ("Values", "Secrets", "Machine"):
        console.choose(legend, "Change")
    console.sees(console.dialog.get_by_text("<img src=x onerror="))
    console.do(console.page.keyboard.press("Escape"))
    console.do(console.page.get_by_role("button", name="Discard").click())
    console.go("#/queue")
    console.do(expect(console.page.locator(".machines")).to_contain_text(MARKUP))
    assert "owned" not in console.do(console.page.title()).replace("='owned'", "")
    made = "document.querySelectorAll('img[src=x], main script, svg svg, a[href^=javascript]').length"
    assert console.do(console.page.evaluate(made)) == 0


def test_what_is_copied_is_what_a_shell_and_python_understand(console: Console, api: Client) -> None:
    run = api.finished("error", input_values={"user": 'O\'Brien $(id) `id` \\ "x"'})
    console.do(console.page.context.grant_permissions(["clipboard-read", "clipboard-write"]))
    console.sign_in(f"#/runs/{run['id']}/json")
    for name, start in (("Copy as curl", "curl -sS http"), ("Copy as Python", "import os")):
        console.do(console.page.get_by_role("button", name=name).click())
        console.sees("copied")
        text = console.do(console.page.evaluate("navigator.clipboard.readText()"))
        assert text.startswith(start)
        assert run["id"] in text
        assert console.key not in text


@pytest.mark.parametrize("path", ["inputs", "attempts", "json", "nonsense"])
def test_each_part_has_an_address(console: Console, api: Client, path: str) -> None:
    run = api.finished()
    console.sign_in(f"#/runs/{run['id']}/{path}")
    current = console.page.get_by_role("navigation", name="About this run").locator("[aria-current=page]")
    console.do(expect(current).to_have_text({"nonsense": "Now", "json": "JSON"}.get(path, path.capitalize())))
    console.sees(console.page.get_by_role("heading", level=1))
