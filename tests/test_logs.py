"""What the log says: a line for each request, assignment, start, end, release and batch of deletions; why something failed."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.support.scrapes import scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, migrate, own_database, own_stack
from tests.support.waiting import until


@pytest.fixture
def own(stack: Stack) -> Iterator[Stack]:
    with own_database(stack, "logs") as made:
        yield made


def lines(server: Server, event: str, **fields: object) -> list[dict[str, Any]]:
    """The lines of an event with these fields, parsed."""
    found = [json.loads(line) for line in server.app.log.read_text().splitlines() if f'"{event}"' in line]
    return [line for line in found if line.get("event") == event and fields.items() <= line.items()]


def test_a_request_has_its_refusal_key_address_and_bytes_and_a_time_that_everybody_reads(server: Server) -> None:
    with server.client() as api:
        run = api.run()["id"]
        refused = api.post(
            f"/v1/runs/{run}/retry", content=b'{"reason": "why"}', headers={"X-Forwarded-For": "6.6.6.6"}
        )
        [line] = until(lambda: lines(server, "request", request_id=refused.headers["x-request-id"]))
        assert line["code"] == "run_not_terminal"
        assert line["key_id"] == api.json_of(api.get("/v1/whoami"))["key_id"]
        assert line["address"] == "127.0.0.1"
        assert (line["bytes_in"], line["bytes_out"]) == (17, len(refused.content))
        assert line["level"] == "info"
        at = datetime.fromisoformat(line["time"])
        assert line["time"].endswith("Z")
        assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)


def test_only_a_configured_proxy_is_believed_who_the_caller_is(stack: Stack) -> None:
    server = start_server(stack, TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8", BACKGROUND="none")
    try:
        asked = httpx.get(
            f"{server.url}/v1/whoami", headers={"X-Forwarded-For": "6.6.6.6, 203.0.113.7, 10.1.2.3"}, trust_env=False
        )
        [line] = until(lambda: lines(server, "request", request_id=asked.headers["x-request-id"]))
        assert (line["address"], line["code"]) == ("203.0.113.7", "unauthorized")
        assert line["route"] == "/v1/whoami"
    finally:
        server.app.stop()


def test_a_run_has_a_line_for_its_machine_its_start_its_end_and_its_session(own: Stack) -> None:
    server = start_server(own, RUN_SILENCE_SECONDS=1)
    try:
        with server.client() as api:
            machine = api.machine()
            run = api.run(start_session=True, release_session_after=True)["id"]
            [assigned] = until(lambda: lines(server, "run_assigned", run_id=run))
            assert (assigned["machine_id"], assigned["organization_id"]) == (machine, api.organization)
            api.report(run, status="running")
            assert until(lambda: lines(server, "run_started", run_id=run, by="executor"))
            assert until(lambda: lines(server, "run_ended", run_id=run, by="silence", run_status="error"))
            assert until(lambda: lines(server, "session_released", machine_id=machine))

            second = api.run(sensitive_input_values={"password": "hush-hush"})["id"]
            until(lambda: lines(server, "run_assigned", run_id=second))
            api.report(second, status="cancelled")
            assert until(lambda: lines(server, "run_ended", run_id=second, by="caller", run_status="cancelled"))
            third = api.run(machine_id=machine)["id"]
            assert api.delete(f"/v1/machines/{machine}").status_code == 204
            assert until(lambda: lines(server, "run_ended", run_id=third, by="machine_deleted", run_status="error"))
            assert api.delete(f"/v1/runs/{second}").status_code == 204
            [batch] = until(lambda: lines(server, "deleted", store="vault"))
            assert batch["count"] == 1
            assert "hush-hush" not in server.app.log.read_text()
    finally:
        server.app.stop()


def test_what_fails_is_a_warning_and_says_what_kind_of_failure_it_was(tmp_path_factory: pytest.TempPathFactory) -> None:
    with own_stack(tmp_path_factory.mktemp("own")) as own:
        server = start_server(own, LOG_LEVEL="warning")
        try:
            with server.client() as api:
                run = api.finished()["id"]
                own.bao.kill()
                failed = api.retry(run, sensitive_input_values={"password": "new"})
                [line] = until(lambda: lines(server, "request", request_id=failed.headers["x-request-id"]))
                assert (line["level"], line["code"], line["status"]) == ("warning", "vault_unavailable", 503)
                until(lambda: lines(server, "store_lost", store="vault", reason="unreachable"))
                own.postgres.kill()
                refusals = {"code": "database_unavailable", "cause": "refused", "level": "warning"}
                refusals["route"] = "/v1/runs/{run_id}/retry"
                assert until(lambda: api.retry(run).status_code == 503 and lines(server, "request", **refusals))
                until(lambda: lines(server, "store_lost", store="database", reason="unreachable"))
                ready = httpx.get(f"{server.url}/health/ready", trust_env=False)
                [line] = until(lambda: lines(server, "request", request_id=ready.headers["x-request-id"]))
                assert (line["status"], line["down"]) == (503, ["database", "vault"])
                # Many loops have failed by now, and none has a line of its own.
                failures = ("runs_background_failures_total", "database_unavailable")
                until(lambda: scrape(server.url).total(failures[0], code=failures[1]) > 10)
                own.bao.start()
                own.postgres.start()
                until(lambda: {line["store"] for line in lines(server, "store_back")} == {"database", "vault"})
                assert len(lines(server, "store_lost")) == len(lines(server, "store_back")) == 2
                assert all(line["seconds"] > 0 for line in lines(server, "store_back"))
                assert not lines(server, "background_unavailable")
                own.sql("ALTER ROLE runs_app PASSWORD 'another'")
                # It may have connected already with the old one.
                own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'runs_app'")
                refusals["cause"] = "authentication"
                assert until(lambda: api.retry(run).status_code == 503 and lines(server, "request", **refusals))
                assert "password" not in server.app.log.read_text()
        finally:
            server.app.stop()


def test_each_migration_is_a_line(stack: Stack, capfd: pytest.CaptureFixture[str]) -> None:
    stack.sql("CREATE DATABASE lines")
    capfd.readouterr()
    migrate(stack.postgres, f"{stack.postgres.url.rpartition('/')[0]}/lines")
    said = capfd.readouterr().err
    stack.sql("DROP DATABASE lines")
    assert "Migration 0001_schema: " in said
    assert said.count("Migration ") >= 13
