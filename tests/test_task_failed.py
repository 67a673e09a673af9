"""`task_failed`: the executor did its work, and says that the task itself failed. Terminal in every rule."""

from tests.support.client import Client, secret_path
from tests.support.scrapes import scrape
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.waiting import until


def test_it_ends_an_attempt_like_any_other_end(api: Client, server: Server, stack: Stack) -> None:
    machine_id = api.machine()
    run = api.run(
        machine_id=machine_id, start_session=True, release_session_after=True, sensitive_input_values={"pin": "x"}
    )
    until(lambda: api.get_run(run["id"])["assigned_machine_id"])
    api.report(run["id"], status="running")
    counted = {"to": "task_failed", "by": "executor"}
    before = scrape(server.url).value("runs_transitions_total", **counted) or 0
    failed = api.report(run["id"], status="task_failed", error=["The totals differ."], error_code="totals.differ")
    assert (failed["status"], failed["error_code"], failed["next_retry_at"]) == ("task_failed", "totals.differ", None)
    assert failed["ended_at"] >= failed["started_at"]
    assert api.json_of(api.get(f"/v1/machines/{machine_id}"))["reserved_session_id"] is None
    due = "SELECT 1 FROM deletions WHERE store = 'vault' AND name = $1"
    assert stack.sql(due, secret_path(failed)), "its secret is kept for the retention time, and no longer"
    until(lambda: (scrape(server.url).value("runs_transitions_total", **counted) or 0) > before)

    retried = api.json_of(api.retry(run["id"]))
    assert (retried["status"], retried["attempt"], retried["error"]) == ("scheduling", 2, None)
    [archived] = api.json_of(api.get(f"/v1/runs/{run['id']}/attempts"))["items"]
    assert (archived["status"], archived["error"]) == ("task_failed", ["The totals differ."])

    def ends() -> list[tuple[str, str]]:
        events = api.json_of(api.get(f"/v1/runs/{run['id']}/events"))["items"]
        return [(one["from_status"], one["to_status"]) for one in events if one["event"] in ("ended", "retried")]

    assert until(lambda: len(ends()) == 2 and ends()) == [("running", "task_failed"), ("task_failed", "scheduling")]


def test_lists_find_it_and_no_run_is_in_running_checks(api: Client) -> None:
    failed, broken = (api.finished(status)["id"] for status in ("task_failed", "error"))

    def listed(**query: str) -> list[str]:
        page = api.json_of(api.get("/v1/runs", params=query))
        assert page["total"] == len(page["items"])
        return [run["id"] for run in page["items"]]

    for order in ("created", "changed"):
        assert listed(status="task_failed", order=order) == [failed]
        assert listed(status="error", order=order) == [broken]
        assert listed(ended_from="2000-01-01T00:00:00Z", order=order) == [broken, failed]
        assert listed(status="running_checks", order=order) == []
    assert listed(status="running_checks", search="broke") == []
