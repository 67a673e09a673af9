"""The list of runs: filters, ids, rows that stay where they are, and what stands there when there is nothing."""

import json
import subprocess
from uuid import uuid4

from playwright.async_api import expect

from tests.console.conftest import Console
from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack


def ids(console: Console) -> list[str]:
    found: list[str] = console.do(
        console.rows.locator(".c-id .id").evaluate_all("(nodes) => nodes.map((node) => node.title)")
    )
    return found


def test_a_row_says_what_it_is_and_why_it_is_not_done(console: Console, api: Client) -> None:
    desk = api.machine(name="desk-7")
    waiting = api.run(machine_id=api.machine(name="desk-8", status="disconnected"))
    failed = api.run(machine_id=desk)
    api.report(failed["id"], status="running")
    api.report(failed["id"], status="error", error=["Login failed.\nThe rest of it.", "And more."])
    console.sign_in()
    console.do(expect(console.rows).to_have_count(2))
    assert ids(console) == [failed["id"], waiting["id"]]
    for part in ("error", failed["id"][:8], "Do it.", "1", "desk-7", "Login failed."):
        console.reads(console.rows.nth(0), part)
    for part in ("scheduling", "desk-8", "Its machine is offline"):
        console.reads(console.rows.nth(1), part)
    console.do(expect(console.rows.nth(0)).not_to_contain_text("The rest of it"))


def test_filters_are_in_the_address_and_their_counts_beside_them(console: Console, api: Client) -> None:
    workflow, session = api.workflow(), api.run(start_session=True)
    desk = api.machine(name="desk-7", status="disconnected")
    api.run(workflow_id=workflow)
    api.run(machine_id=desk)
    failed = api.finished("error", workflow_id=workflow)
    api.finished("success")
    console.sign_in()
    chips = console.page.get_by_role("navigation", name="Status")
    for name, number in (
        ("All", 5),
        ("scheduling", 3),
        ("running", 0),
        ("success", 1),
        ("error", 1),
        ("task_failed", 0),
        ("cancelled", 0),
    ):
        console.sees(chips.get_by_role("link", name=f"{name} {number}", exact=True))
    console.do(chips.get_by_role("link", name="error").click())
    console.do(expect(console.rows).to_have_count(1))
    assert ids(console) == [failed["id"]]
    assert console.page.url.endswith("#/runs?status=error")

    console.do(console.page.get_by_role("combobox", name="Workflow").fill(workflow[:8]))
    console.do(console.page.keyboard.press("Enter"))
    console.sees(chips.get_by_role("link", name="All 2", exact=True))
    assert f"workflow={workflow}" in console.page.url
    console.do(console.page.get_by_role("button", name="Clear").click())
    console.do(expect(console.rows).to_have_count(5))

    # An address that somebody was sent says it all.
    for query, number in (
        (f"machine={desk}", 1),
        (f"session={session['session_id']}", 1),
        ("since=1h", 5),
        ("to=2020-01-01T00:00:00.000Z", 0),
        ("from=2020-01-01T00:00:00.000Z&status=success", 1),
        ("status=%3Cscript%3E&workflow=nonsense&before=x", 5),
    ):
        console.go(f"#/runs?{query}")
        console.until("() => !document.querySelector('.skeleton')")
        console.do(expect(console.rows).to_have_count(number))
    console.do(console.page.go_back())
    console.do(expect(console.rows).to_have_count(1))


def test_an_id_that_is_pasted_leads_there(console: Console, api: Client) -> None:
    run, desk, workflow = api.run(start_session=True), api.machine(), api.workflow()
    console.tab.expect("status of 404")  # it asks what the id is
    console.sign_in()
    console.sees(console.rows)
    for pasted, address in (
        (run["id"], f"#/runs/{run['id']}"),
        (f" {desk} ", f"#/runs?machine={desk}"),
        (workflow.upper(), f"#/runs?workflow={workflow}"),
        (run["session_id"], f"#/runs/{run['id']}"),  # a session that a run began has that run's id
    ):
        console.do(console.page.keyboard.press("/"))
        console.do(console.page.keyboard.insert_text(pasted))
        console.do(console.page.keyboard.press("Enter"))
        console.until("(address) => location.hash === address", address)
        console.do(console.page.keyboard.press("Escape"))
    for wrong, sentence in ((str(uuid4()), "Nothing with this id"), ("desk-7", "That is no id")):
        console.do(console.page.get_by_role("searchbox", name="Go to").fill(wrong))
        console.do(console.page.keyboard.press("Enter"))
        console.sees(sentence)
    # Pasted anywhere, without a field.
    console.go("#/runs")
    console.do(console.page.get_by_role("searchbox", name="Go to").blur())
    console.do(
        console.page.evaluate(
            "(id) => { const data = new DataTransfer(); data.setData('text/plain', id);"
            " document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true})) }",
            run["id"],
        )
    )
    console.until("(id) => location.hash === `#/runs/${id}`", run["id"])


def test_new_rows_announce_themselves_and_move_nothing(console: Console, api: Client) -> None:
    workflow = api.workflow()
    first, second = (api.run(workflow_id=workflow) for _ in range(2))
    console.sign_in()
    console.do(expect(console.rows).to_have_count(2))
    target = console.rows.nth(1)
    console.do(target.hover())
    before = console.do(target.bounding_box())

    new = [api.run(workflow_id=workflow)["id"] for _ in range(3)]
    api.report(first["id"], status="running")
    news = console.page.get_by_role("button", name="3 new")
    console.sees(news)
    console.reads(console.page.get_by_role("status"), "3 new runs")
    # What changed in a row is shown in its place.
    console.reads(target, "running")
    assert console.do(target.bounding_box()) == before
    assert ids(console) == [second["id"], first["id"]]

    console.do(news.click())
    assert ids(console) == [*reversed(new), second["id"], first["id"]]
    console.do(expect(console.rows.first.get_by_role("link")).to_be_focused())
    console.do(expect(news).to_be_hidden())


def test_a_row_that_leaves_the_list_says_so_and_stays(console: Console, api: Client) -> None:
    gone, retried, kept = (api.finished("error") for _ in range(3))
    console.sign_in("#/runs?status=error")
    console.do(expect(console.rows).to_have_count(3))
    api.retry(retried["id"])
    api.delete(f"/v1/runs/{gone['id']}")
    for position, run in ((1, retried), (2, gone)):
        console.reads(console.rows.nth(position), run["id"][:8])
        console.reads(console.rows.nth(position), "No longer error")
    console.do(expect(console.rows.nth(0)).not_to_contain_text("No longer"))
    assert kept["id"] in ids(console)


def test_pages_go_back_in_time_also_through_runs_of_one_moment(console: Console, api: Client) -> None:
    body = {"workflow_id": api.workflow(), "count": 250}
    made = {run["id"] for run in api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]}
    console.sign_in()
    seen: list[str] = []
    for number in (100, 100, 50):
        console.do(expect(console.rows).to_have_count(number))
        console.until("(seen) => !document.querySelector(`tr a[href='#/runs/${seen}']`)", seen[-1] if seen else "none")
        seen += ids(console)
        if number == 100:
            console.do(console.page.get_by_role("link", name="Older").click())
    assert len(seen) == len(set(seen)) == 250
    assert set(seen) == made
    console.sees("That is all.")
    console.do(console.page.get_by_role("link", name="Newest").click())
    console.until("() => location.hash === '#/runs'")


def test_without_runs_there_is_the_curl_that_makes_one(console: Console, api: Client) -> None:
    console.sign_in()
    console.sees("No runs yet")
    for path, numbers in (("workflows", 0), ("runs", 1)):
        command = console.do(console.page.locator(".notice pre").inner_text())
        command = command.split("\n#")[0].replace("$API_KEY", console.key)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=True)
        assert "id" in json.loads(done.stdout), done.stdout
        assert path in command
        if not numbers:
            console.do(console.page.reload())
            console.sees(json.loads(done.stdout)["id"])
    console.do(expect(console.rows).to_have_count(1))


def test_filters_that_match_nothing_can_be_dropped(console: Console, api: Client) -> None:
    api.run()
    console.sign_in("#/runs?status=cancelled")
    console.sees("No run matches these filters")
    console.do(console.page.get_by_role("button", name="Show all runs").click())
    console.do(expect(console.rows).to_have_count(1))


def test_it_is_read_with_the_keyboard_alone(console: Console, api: Client) -> None:
    runs = [api.finished("error")["id"] for _ in range(3)][::-1]
    console.sign_in()
    console.do(expect(console.rows).to_have_count(3))
    press = console.page.keyboard.press
    for key, position in (("j", 0), ("j", 1), ("j", 2), ("j", 2), ("k", 1)):
        console.do(press(key))
        console.do(expect(console.rows.nth(position).get_by_role("link")).to_be_focused())
    console.do(press("Enter"))
    console.sees(console.page.locator(".runhead .id", has_text=runs[1]))
    console.do(console.page.go_back())
    console.do(expect(console.rows).to_have_count(3))
    console.do(expect(console.rows.nth(1).get_by_role("link")).to_be_focused())  # where one was
    console.do(press("k"))
    console.do(press("r"))
    console.sees(console.dialog)
    console.until("(id) => location.hash === `#/runs/${id}/now`", runs[0])
    console.do(press("Escape"))
    console.misses(console.dialog)
    console.do(press("?"))
    console.sees("pause or go on updating")
    # Single keys can be turned off, for those whose voice or hands press them unasked.
    console.do(console.dialog.get_by_label("Single keys are shortcuts").uncheck())
    console.do(press("Escape"))
    console.do(press("r"))
    console.misses(console.dialog)
    console.do(press("?"))
    console.do(console.dialog.get_by_label("Single keys are shortcuts").check())
    console.do(press("Escape"))
    console.do(press("p"))
    console.sees("paused")
    console.do(press("p"))
    console.sees("updated")


def test_it_asks_every_two_seconds_while_it_is_seen_and_never_else(console: Console, api: Client) -> None:
    api.run()
    console.do(console.page.clock.install())
    console.sign_in()
    console.do(expect(console.rows).to_have_count(1))

    def lists() -> int:
        return len([request for request in console.sent("GET", "/v1/runs?") if "scheduling_reason" in request.url])

    def until_it_asks() -> int:
        """Seconds of the page's clock."""
        before = lists()
        for second in range(1, 120):
            console.do(console.page.clock.run_for(1000))
            console.do(console.page.wait_for_timeout(30))  # replies come by the real clock
            if lists() > before:
                return second
        raise AssertionError("it does not ask")

    def asks_within(seconds: int) -> int:
        before = lists()
        for _ in range(seconds):
            console.do(console.page.clock.run_for(1000))
            console.do(console.page.wait_for_timeout(5))
        return lists() - before

    until_it_asks()
    assert until_it_asks() >= 2
    console.do(console.page.keyboard.press("p"))
    assert asks_within(40) == 0
    console.sees("paused, ")
    console.do(console.page.keyboard.press("p"))
    until_it_asks()
    hide = (
        "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')) }"
    )
    console.do(console.page.evaluate(hide, True))
    assert asks_within(40) == 0
    before = lists()
    console.do(console.page.evaluate(hide, False))
    asks_within(1)
    assert lists() > before  # at once, and not when its turn would have come


def test_when_the_service_cannot_be_reached_what_is_known_stays_and_it_tries_again(
    console: Console, api: Client
) -> None:
    console.tab.expect("ERR_INTERNET_DISCONNECTED")
    run = api.run()
    console.sign_in()
    console.do(expect(console.rows).to_have_count(1))
    console.do(console.page.context.set_offline(True))
    console.sees("This computer is offline.")
    console.sees("What you see is of")
    console.sees("Again in")
    console.reads(console.rows, run["id"][:8])
    console.do(console.page.context.set_offline(False))
    console.do(expect(console.page.locator(".banner")).to_be_empty())


def test_ten_thousand_runs_are_painted_within_a_second(
    console: Console, api: Client, stack: Stack, server: Server
) -> None:
    workflow = api.workflow()
    stack.sql(
        "INSERT INTO runs (id, organization_id, workflow_id, status, lane, created_at, ended_at, error)"
        " SELECT gen_random_uuid(), $1, $2, CASE n % 3 WHEN 0 THEN 'success' WHEN 1 THEN 'error' ELSE 'cancelled' END, '',"
        " now() - n * interval '1 minute', now(), ARRAY['The window did not appear.'] FROM generate_series(1, 10000) n",
        api.organization,
        workflow,
    )
    console.sign_in()  # the browser has compiled the modules, as after the first visit
    console.do(expect(console.rows).to_have_count(100))
    console.sees("100 of 10,000 runs")
    best = min(_painted(console) for _ in range(3))
    assert best < 1000, f"{best:.0f} ms"


def _painted(console: Console) -> float:
    """Milliseconds from the beginning of the navigation until the rows are painted."""
    console.do(
        console.page.add_init_script(
            """new MutationObserver((_, observer) => {
                 if (document.querySelectorAll("table.runs tbody tr").length < 100) return;
                 observer.disconnect();
                 requestAnimationFrame(() => requestAnimationFrame(() => { window.painted = performance.now(); }));
               }).observe(document, { childList: true, subtree: true });"""
        )
    )
    console.do(console.page.reload())
    console.until("() => window.painted")
    return float(console.do(console.page.evaluate("window.painted")))


def test_the_last_changed_come_first_and_search_finds_by_text_and_by_the_beginning_of_an_id(
    console: Console, api: Client
) -> None:
    old, new = (api.run(input_values={"customer": name})["id"] for name in ("Ada", "Grace"))
    api.report(old, status="error", error=["Login failed."])
    console.sign_in()
    console.do(expect(console.rows).to_have_count(2))
    assert ids(console) == [new, old]
    console.do(console.page.get_by_label("Order").select_option("changed"))
    console.reads(console.page.locator(".summary"), "last changed first")
    console.do(expect(console.rows).to_have_count(2))
    assert ids(console) == [old, new]
    search = console.page.get_by_role("searchbox", name="Search in")
    for text, found in (("Grace", new), ("login FAILED", old), (new[:8], new)):
        console.do(search.fill(text))
        console.do(search.press("Enter"))
        console.do(expect(console.rows).to_have_count(1))
        console.until("(id) => document.querySelector('.c-id .id')?.title === id", found)


def test_the_workflow_filter_finds_any_of_ten_thousand_by_typing(console: Console, api: Client, stack: Stack) -> None:
    stack.sql(
        "INSERT INTO workflows (id, organization_id, name, main_prompt, created_at)"
        " SELECT gen_random_uuid(), $1, 'Workflow ' || n, 'x', now() - n * interval '1 s' FROM generate_series(1, 10000) n",
        api.organization,
    )
    [row] = stack.sql(
        "SELECT id::text FROM workflows WHERE organization_id = $1 AND name = 'Workflow 9876'", api.organization
    )
    api.run()
    run = api.run(workflow_id=row["id"])["id"]
    console.sign_in()
    console.do(expect(console.rows).to_have_count(2))
    finder = console.page.get_by_role("combobox", name="Workflow")
    console.do(finder.press_sequentially("flow 987"))
    options = console.page.locator(".popup:visible").get_by_role("option")
    console.reads(console.page.locator(".popup:visible"), "Workflow 9876")
    console.do(finder.press_sequentially("6"))
    console.do(expect(options).to_have_count(1))
    for key in ("ArrowDown", "Enter"):
        console.do(finder.press(key))
    console.until("(id) => location.hash === `#/runs?workflow=${id}`", row["id"])
    console.do(expect(console.rows).to_have_count(1))
    assert ids(console) == [run]
    console.do(expect(finder).to_have_value("Workflow 9876"))
    # What chooses nothing says so, and the list stays as it was.
    console.do(finder.fill("no such name"))
    console.sees(console.page.get_by_text("No name or id has this text."))
    console.do(finder.blur())
    console.sees("No workflow was chosen for “no such name”")
    assert ids(console) == [run]
    console.do(finder.fill(""))
    console.do(expect(console.rows).to_have_count(2))
    console.misses("Not applied")


def test_search_takes_the_name_of_a_workflow_and_of_a_session(console: Console, api: Client) -> None:
    workflow = api.workflow()
    api.json_of(api.patch(f"/v1/workflows/{workflow}", json={"name": "Month-end report"}))
    named = api.run(workflow_id=workflow)["id"]
    alone = api.run(input_values={"about": "the month-END report"}, start_session=True, session_alias="Till 4")["id"]
    console.sign_in()
    console.do(expect(console.rows).to_have_count(2))
    search = console.page.get_by_role("searchbox", name="Search in")
    for text, found in (("month-end REPORT", alone), ("till 4", alone)):
        console.do(search.fill(text))
        console.do(search.press("Enter"))
        console.until("(id) => document.querySelector('.c-id .id')?.title === id", found)
        console.do(expect(console.rows).to_have_count(1))
        if found == alone and "month" in text:
            console.sees(console.page.get_by_role("link", name="Month-end report"))
    api.delete(f"/v1/runs/{alone}?reason=x")
    console.do(search.fill("month-end"))
    console.do(search.press("Enter"))
    console.until("(id) => location.hash === `#/runs?workflow=${id}`", workflow)
    console.until("(id) => document.querySelector('.c-id .id')?.title === id", named)


def test_an_address_with_a_filter_that_cannot_be_applied_says_so(console: Console, api: Client) -> None:
    api.run()
    console.sign_in("#/runs?session=till&status=lost&colour=red")
    console.do(expect(console.rows).to_have_count(1))
    refused = console.page.locator(".unapplied")
    for text in ("“till” is no id of a session", "there is no status “lost”", "there is no filter “colour”"):
        console.reads(refused, text)
    console.go("#/runs?status=scheduling")
    console.do(expect(refused).to_be_empty())


def test_back_from_a_run_keeps_place_and_focus_and_its_neighbours_are_a_key_away(console: Console, api: Client) -> None:
    workflow = api.workflow()
    body = {"workflow_id": workflow, "count": 60}
    runs = [run["id"] for run in api.json_of(api.post("/v1/runs/bulk", json=body), 201)["created_runs"]]
    console.sign_in()
    console.do(expect(console.rows).to_have_count(60))
    target = console.rows.nth(50).get_by_role("link")
    opened = ids(console)[50]
    assert opened in runs
    console.do(target.scroll_into_view_if_needed())
    before = console.do(console.page.evaluate("scrollY"))
    assert before > 0
    console.do(target.click())
    console.sees(console.page.locator(".runhead .id", has_text=opened))
    _, after = (link for link in ids_of_neighbours(console) if link.startswith("#/runs/"))
    console.do(console.page.get_by_role("link", name="Next run").click())
    console.until("(hash) => location.hash === hash", after)
    console.do(console.page.get_by_role("link", name="Previous run").click())
    console.until("(id) => location.hash.includes(id)", opened)
    console.do(console.page.get_by_role("link", name="Runs", exact=True).last.click())
    console.do(expect(console.rows).to_have_count(60))
    console.do(expect(console.rows.nth(50).get_by_role("link")).to_be_focused())
    assert abs(console.do(console.page.evaluate("scrollY")) - before) < 5


def ids_of_neighbours(console: Console) -> list[str]:
    links = console.page.get_by_role("navigation", name="The list").get_by_role("link", name="run")
    found: list[str] = console.do(links.evaluate_all("(nodes) => nodes.map((node) => node.hash)"))
    return found
