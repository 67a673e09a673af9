"""POST /v1/runs/{run_id}/retry: the rules, over HTTP, with a look into all three stores."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from tests.support.client import RUN_KEYS, Client, file_input, file_inputs, secret_path
from tests.support.server import Server, start_server
from tests.support.stack import Stack
from tests.support.waiting import until


# Every key of SDK 2.2.69's RunResponse, and ours.
def blob_of(stack: Stack, attachment_id: str) -> str:
    [row] = stack.sql("SELECT storage_path FROM run_attachments WHERE id = $1", attachment_id)
    return str(row["storage_path"])


@pytest.mark.parametrize("status", ["success", "error", "cancelled", "task_failed"])
def test_a_finished_run_is_reset_in_place(api: Client, status: str) -> None:
    before = api.finished(status, input_values={"a": 1})
    reply = api.retry(before["id"])
    assert reply.status_code == 200
    after = reply.json()
    assert after.keys() == RUN_KEYS
    assert after == before | {
        "status": "scheduling",
        "attempt": 2,
        "error": None,
        "error_code": None,
        "workflow_version": None,
        "last_report_at": None,
        "output_data": None,
        "run_message_history": None,
        "output_attachment_ids": [],
        "started_at": None,
        "ended_at": None,
        "changed_at": after["changed_at"],
        "scheduling_reason": "waiting_for_machine",
    }
    assert before["changed_at"] < after["changed_at"]
    assert api.get_run(before["id"]) == after


def test_the_outputs_of_former_attempts_are_removed(api: Client, stack: Stack) -> None:
    run_id = api.finished("error")["id"]
    for attempt in (2, 3):
        assert api.retry(run_id).status_code == 200
        api.report(run_id, status="running")
        api.report(run_id, status="success", output_data={"attempt": attempt})
    # More than one round removes at once, and a run is not shown what is not of its attempt.
    stack.sql(
        "INSERT INTO run_outputs SELECT $1, -n, NULL, json_build_array(repeat('x', 1000)), true"
        " FROM generate_series(1, 500) AS n",
        run_id,
    )
    left = "SELECT attempt, output_data::text AS data FROM run_outputs WHERE run_id = $1"
    until(lambda: stack.sql(left, run_id) == [{"attempt": 3, "data": '{"attempt":3}'}])
    assert api.get_run(run_id)["output_data"] == {"attempt": 3}


def test_an_absent_body_equals_an_empty_object_and_null_equals_absent(api: Client) -> None:
    run = api.finished(input_values={"a": 1}, session_id=None)
    assert api.post(f"/v1/runs/{run['id']}/retry").status_code == 200
    api.report(run["id"], status="error")
    nothing = dict.fromkeys(
        [
            *("input_values", "sensitive_input_values", "file_inputs", "machine_id", "pool_ids", "reuse_session"),
            *("session_id", "release_session_after", "start_session", "session_alias", "is_priority"),
        ]
    )
    after = api.json_of(api.retry(run["id"], **nothing, key_of_a_newer_sdk={"x": 1}))
    assert (after["attempt"], after["input_values"]) == (3, {"a": 1})
    newest, _ = api.json_of(api.get(f"/v1/runs/{run['id']}/attempts"))["items"]
    assert newest["overridden"] == []


@pytest.mark.parametrize("status", ["scheduling", "running"])
def test_an_active_run_is_refused_and_nothing_changes(api: Client, stack: Stack, status: str) -> None:
    run = api.run(sensitive_input_values={"pw": "old"}, file_inputs=[file_input()])
    if status == "running":
        run = api.report(run["id"], status="running")
    secrets, blobs = stack.secret_paths(f"runs/{api.organization}/"), stack.blobs(api.organization)
    refused = api.retry(run["id"], sensitive_input_values={"pw": "new"}, file_inputs=[file_input(b"new")])
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert (problem["code"], problem["status"]) == ("run_not_terminal", 409)
    assert status in problem["detail"]
    assert "cancelled" in problem["detail"]
    assert "Idempotency-Status" not in refused.headers
    assert api.get_run(run["id"]) == run
    assert stack.secret_paths(f"runs/{api.organization}/") == secrets
    assert stack.blobs(api.organization) == blobs
    assert stack.sql("SELECT * FROM deletions WHERE name LIKE '%' || $1 || '%'", api.organization) == []


def test_a_retry_of_another_attempt_than_expected_is_refused(api: Client, stack: Stack) -> None:
    run_id = api.finished()["id"]
    refused = api.retry(run_id, expected_attempt=2)
    assert (refused.status_code, refused.json()["code"], refused.json()["current_attempt"]) == (
        409,
        "attempt_changed",
        1,
    )
    assert api.get_run(run_id)["attempt"] == 1
    assert api.json_of(api.retry(run_id, expected_attempt=1))["attempt"] == 2
    # What has changed since counts more than what the run is doing now.
    late = api.retry(run_id, expected_attempt=1)
    assert (late.status_code, late.json()["code"], late.json()["current_attempt"]) == (409, "attempt_changed", 2)
    dry = api.json_of(api.post(f"/v1/runs/{run_id}/retry?dry_run=true", json={"expected_attempt": 1}))
    assert [refusal["code"] for refusal in dry["refusals"]] == ["attempt_changed", "run_not_terminal"]
    [archived] = stack.sql("SELECT overridden, retried_by, bulk_retry_id FROM run_attempts WHERE run_id = $1", run_id)
    assert archived == {"overridden": [], "retried_by": "request", "bulk_retry_id": None}
    [event] = stack.sql("SELECT by, bulk_retry_id FROM run_events WHERE run_id = $1 AND event = 'retried'", run_id)
    assert event == {"by": "request", "bulk_retry_id": None}


def test_output_attachments_go_with_their_bytes(api: Client, stack: Stack) -> None:
    run = api.finished(file_inputs=[file_input(b"kept")])
    [output], [kept] = run["output_attachment_ids"], run["input_attachment_ids"]
    blob = blob_of(stack, output)
    assert blob in stack.blobs()
    after = api.json_of(api.retry(run["id"]))
    assert after["input_attachment_ids"] == [kept]
    assert api.get(f"/v1/run-attachments/{output}").status_code == 404
    until(lambda: blob not in stack.blobs(), what="the output's bytes are gone")
    assert api.get(f"/v1/run-attachments/{kept}/download").content == b"kept"


def test_inputs_are_replaced_emptied_or_kept(api: Client) -> None:
    run_id = api.finished(input_values={"a": 1, "b": {"c": [1.0, None]}})["id"]
    assert api.json_of(api.retry(run_id))["input_values"] == {"a": 1, "b": {"c": [1.0, None]}}
    api.report(run_id, status="cancelled")
    assert api.json_of(api.retry(run_id, input_values={"z": "é"}))["input_values"] == {"z": "é"}
    api.report(run_id, status="cancelled")
    assert api.json_of(api.retry(run_id, input_values={}))["input_values"] == {}


class TestSecrets:
    def test_values_go_to_vault_and_replies_show_aliases(self, api: Client, stack: Stack) -> None:
        run = api.finished()
        values = {
            "pw": "hunter2",
            "n": 12345678901234567,
            "f": 0.1,
            "t": True,
            "none": None,
            "o": {"a": ["b"]},
            "a/b#c é": "x",
        }
        after = api.json_of(api.retry(run["id"], sensitive_input_values=values))
        path = secret_path(after)
        assert path.startswith(f"runs/{api.organization}/{run['id']}/")
        base = f"://secret/{path}#"
        assert after["sensitive_input_aliases"] == {
            "pw": f"vault{base}pw",
            "n": f"vault+json{base}n",
            "f": f"vault+json{base}f",
            "t": f"vault+json{base}t",
            "none": f"vault+json{base}none",
            "o": f"vault+json{base}o",
            "a/b#c é": f"vault{base}a%2Fb%23c%20%C3%A9",
        }
        assert stack.secret(path) == {
            "pw": "hunter2",
            "n": "12345678901234567",
            "f": "0.1",
            "t": "true",
            "none": "null",
            "o": '{"a":["b"]}',
            "a/b#c é": "x",
        }

    def test_a_new_set_replaces_the_old_which_is_destroyed(self, api: Client, stack: Stack) -> None:
        run = api.finished(sensitive_input_values={"pw": "old", "other": "old too"})
        old = secret_path(run)
        after = api.json_of(api.retry(run["id"], sensitive_input_values={"pw": "new"}))
        new = secret_path(after)
        assert (new != old, list(after["sensitive_input_aliases"])) == (True, ["pw"])
        assert stack.secret(new) == {"pw": "new"}
        until(lambda: stack.secret(old) is None, what="the old secret is destroyed")

    def test_an_empty_object_removes_all(self, api: Client, stack: Stack) -> None:
        run = api.finished(sensitive_input_values={"pw": "old"})
        assert api.json_of(api.retry(run["id"], sensitive_input_values={}))["sensitive_input_aliases"] == {}
        until(lambda: stack.secret(secret_path(run)) is None, what="the secret is destroyed")

    def test_kept_secrets_stay_for_the_next_attempt(self, api: Client, stack: Stack) -> None:
        run = api.finished(sensitive_input_values={"pw": "kept"})
        path = secret_path(run)
        [row] = stack.sql("SELECT due_at > now() + interval '23 hours' AS later FROM deletions WHERE name = $1", path)
        assert row["later"], "retention of a finished run"
        after = api.json_of(api.retry(run["id"]))
        assert after["sensitive_input_aliases"] == run["sensitive_input_aliases"]
        assert stack.sql("SELECT 1 FROM deletions WHERE name = $1", path) == [], "named by an active run"
        assert stack.secret(path) == {"pw": "kept"}

    def test_expired_secrets_refuse_a_retry_that_keeps_them(self, api: Client, stack: Stack) -> None:
        run = api.finished(sensitive_input_values={"pw": "gone", "user": "ada"})
        path = secret_path(run)
        stack.sql("UPDATE deletions SET due_at = now() WHERE name = $1", path)
        until(lambda: stack.secret(path) is None, what="the retention passed")
        before = api.get_run(run["id"])
        assert before == run, "aliases stay visible after expiry"
        for options in ({}, {"file_inputs": [file_input()]}, {"input_values": {"x": 1}}):
            refused = api.retry(run["id"], **options)
            assert (refused.status_code, refused.json()["code"]) == (409, "sensitive_inputs_expired")
            assert "pw, user" in refused.json()["detail"]
        assert api.get_run(run["id"]) == before
        assert api.json_of(api.retry(run["id"], sensitive_input_values={"pw": "new"}))["attempt"] == 2

    def test_retention_zero_destroys_at_once(self, stack: Stack) -> None:
        server = start_server(stack, SECRET_RETENTION_SECONDS=0)
        try:
            with server.client() as api:
                run = api.finished(sensitive_input_values={"pw": "x"})
                until(lambda: stack.secret(secret_path(run)) is None, what="the secret is destroyed")
                assert api.retry(run["id"]).json()["code"] == "sensitive_inputs_expired"
                assert api.json_of(api.retry(run["id"], sensitive_input_values={}))["sensitive_input_aliases"] == {}
        finally:
            server.app.stop()


class TestFiles:
    def test_new_files_replace_the_old(self, api: Client, stack: Stack) -> None:
        run = api.finished(file_inputs=[file_input(b"old", "old.txt")])
        [old] = run["input_attachment_ids"]
        blob = blob_of(stack, old)
        files = [
            file_input(b"%PDF", "a b.pdf", target_path="C:\\in\\a.pdf", cleanup_imports_after_run=True),
            file_input(b"", "é.bin"),
        ]
        after = api.json_of(api.retry(run["id"], file_inputs=files))
        first, second = after["input_attachment_ids"]
        assert api.get_run(run["id"])["input_attachment_ids"] == [first, second]
        shown = api.json_of(api.get(f"/v1/run-attachments/{first}"))
        assert shown | {"created_at": 0, "storage_path": 0} == {
            "id": first,
            "run_id": run["id"],
            "user_id": None,
            "organization_id": api.organization,
            "attachment_type": "input",
            "filename": "a b.pdf",
            "attempt": None,
            "content_type": "application/pdf",
            "size_bytes": 4,
            "storage_path": 0,
            "target_path": "C:\\in\\a.pdf",
            "cleanup_imports_after_run": True,
            "created_at": 0,
            "expires_at": None,
        }
        assert api.get(f"/v1/run-attachments/{first}/download").content == b"%PDF"
        assert api.get(f"/v1/run-attachments/{second}/download").content == b""
        assert api.get(f"/v1/run-attachments/{old}").status_code == 404
        until(lambda: blob not in stack.blobs(), what="the old bytes are gone")
        listed = api.json_of(api.get("/v1/run-attachments", params={"run_id": run["id"]}))
        assert {item["id"] for item in listed["items"]} == {first, second}

    def test_an_empty_list_removes_all(self, api: Client, stack: Stack) -> None:
        run = api.finished(file_inputs=file_inputs(2))
        assert api.json_of(api.retry(run["id"], file_inputs=[]))["input_attachment_ids"] == []
        until(lambda: not stack.blobs(api.organization), what="no bytes are left")

    def test_an_expired_input_refuses_a_retry_that_keeps_it(self, api: Client) -> None:
        run = api.finished(file_inputs=[file_input()])
        [kept] = run["input_attachment_ids"]
        api.json_of(api.put(f"/v1/run-attachments/{kept}", json={"expires_at": "2020-01-01T00:00:00Z"}))
        refused = api.retry(run["id"], sensitive_input_values={"pw": "x"})
        assert (refused.status_code, refused.json()["code"]) == (409, "input_attachments_expired")
        assert api.json_of(api.retry(run["id"], file_inputs=[file_input(b"new")]))["attempt"] == 2

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("filename", ""),
            ("filename", " "),
            ("filename", "."),
            ("filename", ".."),
            ("filename", ". ."),
            ("filename", "\u3000."),
            ("filename", "C:.."),
            ("filename", "c:x"),
            ("filename", "a/b"),
            ("filename", "a\\b"),
            ("filename", "a\x00"),
            ("filename", "a\r\nb"),
            ("filename", "x" * 256),
            ("filename", "é" * 200),
            ("filename", 1),
            ("filename", None),
            ("target_path", "../x"),
            ("target_path", "C:\\a\\..\\b"),
            ("target_path", "/a/./b"),
            ("target_path", "C:..\\x"),
            ("target_path", "C:."),
            ("target_path", "a\\b:..\\c"),
            ("target_path", ". .\\x"),
            ("target_path", ".../x"),
            ("target_path", "a/\u3000..\u3000/x"),
            ("target_path", "a\nb"),
            ("target_path", ""),
            ("target_path", 5),
            ("content", "a"),
            ("content", "YWJj\n"),
            ("content", "YW Jj"),
            ("content", "YWJ"),
            ("content", "YWJj="),
            ("content", "YWJj*"),
            ("content", "_-8="),
            ("content", "é"),
            ("content", None),
            ("content", 1),
            ("cleanup_imports_after_run", "yes"),
        ],
    )
    def test_bad_files_name_the_field(self, api: Client, field: str, value: object) -> None:
        run = api.finished()
        refused = api.retry(run["id"], file_inputs=[file_input(), file_input() | {field: value}])
        assert refused.status_code == 422
        [error] = refused.json()["detail"]
        assert error.keys() == {"loc", "msg", "type"}
        assert error["loc"] == ["body", "file_inputs", 1, field]
        assert api.get_run(run["id"]) == run

    @pytest.mark.parametrize("path", ["C:\\Users\\me\\x.txt", "/home/me/x", "~/x", "\\\\server\\share\\x", "a b/ü.txt"])
    def test_paths_of_the_machine_are_taken(self, api: Client, path: str) -> None:
        run = api.run(file_inputs=[file_input(target_path=path)])
        shown = api.json_of(api.get(f"/v1/run-attachments/{run['input_attachment_ids'][0]}"))
        assert shown["target_path"] == path


class TestMachine:
    def test_a_pin_is_kept_and_an_assignment_dropped(self, api: Client) -> None:
        machine = api.machine()
        pinned = api.run(machine_id=machine)
        until(lambda: api.get_run(pinned["id"])["assigned_machine_id"] == machine, what="the assignment")
        api.report(pinned["id"], status="error")
        api.json_of(api.patch(f"/v1/machines/{machine}", json={"is_available": False}))
        again = api.json_of(api.retry(pinned["id"]))
        assert (again["machine_id"], again["assigned_machine_id"]) == (machine, None)
        assert again["scheduling_reason"] == "machine_offline"
        free = api.run()
        api.json_of(api.patch(f"/v1/runs/{pinned['id']}", json={"status": "cancelled"}))
        api.json_of(api.patch(f"/v1/machines/{machine}", json={"is_available": True}))
        until(lambda: api.get_run(free["id"])["assigned_machine_id"] == machine, what="the assignment")
        ended = api.report(free["id"], status="cancelled")
        assert ended["machine_id"] == machine
        api.json_of(api.patch(f"/v1/machines/{machine}", json={"is_available": False}))
        assert api.json_of(api.retry(free["id"]))["machine_id"] is None

    def test_pins_and_pools(self, api: Client) -> None:
        machine, pool, other = api.machine(is_available=False), api.pool(), api.pool()
        run_id = api.finished()["id"]

        def retry(**options: object) -> tuple[object, object]:
            after = api.json_of(api.retry(run_id, **options))
            api.report(run_id, status="cancelled")
            return after["machine_id"], after["pool_ids"]

        assert retry(machine_id=machine, pool_ids=[pool]) == (machine, [pool])
        assert retry() == (machine, [pool])
        assert retry(pool_ids=[other, pool]) == (None, [other, pool])
        assert retry(machine_id=machine) == (machine, [other, pool])
        assert retry(pool_ids=[]) == (None, [])

    @pytest.mark.parametrize("staged", [False, True])
    def test_unknown_and_foreign_targets(self, api: Client, foreign: Client, staged: bool) -> None:
        run = api.finished()
        more: dict[str, object] = {"sensitive_input_values": {"pw": "x"}} if staged else {}
        session = foreign.run(start_session=True)["session_id"]
        cases: list[tuple[str, object, str]] = [
            ("machine_id", str(uuid4()), "machine_not_found"),
            ("machine_id", foreign.machine(), "machine_not_found"),
            ("pool_ids", [api.pool(), str(uuid4())], "pool_not_found"),
            ("pool_ids", [foreign.pool()], "pool_not_found"),
            ("session_id", str(uuid4()), "session_not_found"),
            ("session_id", session, "session_not_found"),
        ]
        for field, value, code in cases:
            refused = api.retry(run["id"], **{field: value}, **more)
            assert (refused.status_code, refused.json()["code"]) == (404, code)
        assert api.get_run(run["id"]) == run


class TestSession:
    @pytest.fixture
    def joined(self, api: Client) -> dict[str, Any]:
        return api.finished(start_session=True, session_alias="first", release_session_after=False)

    def fields(self, run: dict[str, Any]) -> tuple[object, object, object]:
        return run["session_id"], run["session_alias"], run["release_session_after"]

    def test_a_session_started_at_creation_has_the_runs_id(self, joined: dict[str, Any]) -> None:
        assert self.fields(joined) == (joined["id"], "first", False)

    @pytest.mark.parametrize("reuse", [{}, {"reuse_session": True}, {"reuse_session": None}])
    def test_it_stays(self, api: Client, joined: dict[str, Any], reuse: dict[str, object]) -> None:
        assert self.fields(api.json_of(api.retry(joined["id"], **reuse))) == (joined["id"], "first", False)

    def test_it_is_dropped(self, api: Client, joined: dict[str, Any]) -> None:
        assert self.fields(api.json_of(api.retry(joined["id"], reuse_session=False))) == (None, None, None)

    def test_release_is_applied_last(self, api: Client, joined: dict[str, Any]) -> None:
        after = api.json_of(api.retry(joined["id"], reuse_session=False, release_session_after=True))
        assert self.fields(after) == (None, None, True)

    @pytest.mark.parametrize("reuse", [True, False, None])
    def test_another_is_joined_whatever_reuse_says(
        self, api: Client, joined: dict[str, Any], reuse: bool | None
    ) -> None:
        other = api.run(start_session=True)["session_id"]
        after = api.json_of(api.retry(joined["id"], session_id=other, reuse_session=reuse))
        assert self.fields(after) == (other, "first", False)

    def test_another_with_an_alias(self, api: Client, joined: dict[str, Any]) -> None:
        other = api.run(start_session=True)["session_id"]
        after = api.json_of(
            api.retry(joined["id"], session_id=other, session_alias="second", release_session_after=True)
        )
        assert self.fields(after) == (other, "second", True)

    def test_a_new_one(self, api: Client, joined: dict[str, Any]) -> None:
        after = api.json_of(api.retry(joined["id"], start_session=True, session_alias="fresh"))
        assert after["session_id"] not in (None, joined["session_id"])
        assert after["session_alias"] == "fresh"

    def test_contradictions(self, api: Client, joined: dict[str, Any]) -> None:
        refused = api.retry(joined["id"], start_session=True, session_id=joined["session_id"])
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["body", "start_session"]
        refused = api.retry(joined["id"], reuse_session=False, session_alias="x")
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["body", "session_alias"]
        assert api.get_run(joined["id"]) == joined


def test_the_attempt_is_archived(server: Server, stack: Stack) -> None:
    user = uuid4()
    organization = f"org-{uuid4().hex}"
    with server.client(organization, key=stack.new_key(organization, user)) as api:
        run = api.finished("error", start_session=True)
        api.json_of(
            api.retry(run["id"], input_values={"s": "private"}, sensitive_input_values={"pw": "x"}, start_session=True)
        )
        api.report(run["id"], status="cancelled")
        api.json_of(api.retry(run["id"], reuse_session=False))
        page = api.json_of(api.get(f"/v1/runs/{run['id']}/attempts"))
        newest, oldest = page["items"]
        assert page["total"] == 2
        assert (newest["attempt"], newest["status"], newest["overridden"]) == (2, "cancelled", ["reuse_session"])
        assert oldest["overridden"] == ["input_values", "sensitive_input_values", "start_session"]
        for name in ("status", "error", "error_code", "started_at", "ended_at", "session_id"):
            assert oldest[name] == run[name], name
        assert (oldest["attempt"], oldest["machine_id"], oldest["retried_by_user_id"]) == (1, None, str(user))
        assert oldest["retried_at"] >= run["ended_at"]
        assert oldest["retried_by_key_id"] is not None
        assert "private" not in str(page)
        assert api.json_of(api.get(f"/v1/runs/{run['id']}/attempts?skip=1&limit=1"))["items"] == [oldest]


def test_the_retried_run_goes_to_the_end_of_the_queue(api: Client) -> None:
    retried = api.finished()
    waiting = api.run()
    api.json_of(api.retry(retried["id"]))
    machine = api.machine()
    until(lambda: api.get_run(waiting["id"])["assigned_machine_id"] == machine, what="the older one goes first")
    assert api.get_run(retried["id"])["assigned_machine_id"] is None


def test_priority_is_kept_or_replaced(api: Client) -> None:
    run_id = api.finished(is_priority=True)["id"]
    assert api.json_of(api.retry(run_id))["is_priority"] is True
    api.report(run_id, status="cancelled")
    assert api.json_of(api.retry(run_id, is_priority=False))["is_priority"] is False


@pytest.mark.parametrize("options", [{}, {"sensitive_input_values": {"pw": "x"}, "file_inputs": [file_input()]}])
def test_of_many_at_once_one_wins(api: Client, stack: Stack, options: dict[str, Any]) -> None:
    run = api.finished(sensitive_input_values={"pw": "old"}, file_inputs=[file_input(b"old")])
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: api.retry(run["id"], **options), range(20)))
    assert sorted(reply.status_code for reply in replies) == [200] + [409] * 19
    assert {reply.json()["code"] for reply in replies if reply.status_code == 409} == {"run_not_terminal"}
    [winner] = [reply.json() for reply in replies if reply.status_code == 200]
    assert api.get_run(run["id"]) == winner
    assert winner["attempt"] == 2
    named_secrets, named_blobs = stack.named()
    assert stack.secret_paths(f"runs/{api.organization}/") <= named_secrets
    assert stack.blobs(api.organization) <= named_blobs
    assert stack.secret(secret_path(winner)) is not None


def test_unknown_and_foreign_runs_get_the_same_reply(api: Client, foreign: Client) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs = foreign.finished()
    unknown = api.retry(str(uuid4()), sensitive_input_values={"pw": "x"})
    known = api.retry(theirs["id"], sensitive_input_values={"pw": "x"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "run_not_found")
    assert (unknown.content, unknown.status_code) == (known.content, known.status_code)
    assert foreign.get_run(theirs["id"]) == theirs
