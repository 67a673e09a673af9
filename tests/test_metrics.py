"""GET /metrics: what it shows, that it never falls, and that it answers when nothing else does."""

import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest

from tests.support.outages import is_ready
from tests.support.scrapes import Scrape, scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database, own_stack
from tests.support.waiting import NEVER, until

REQUESTS = "http_server_request_duration_seconds_count"
RETRY = "/v1/runs/{run_id}/retry"
BUCKETS = {
    f"{bound:g}" for bound in (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
}

# Every name with its labels.
PROMISED: dict[str, set[str]] = {
    "http_server_request_duration_seconds": {"http_request_method", "http_route", "http_response_status_code"},
    "http_server_active_requests": set(),
    "runs_build_info": {"version", "python"},
    "runs_retries_total": {"outcome", "code", "by"},
    "runs_planned_retries_total": {"outcome", "code"},
    "runs_planned_retries": set(),
    "runs_planned_retries_oldest_overdue_seconds": set(),
    "runs_transitions_total": {"to", "by"},
    "runs_placement_wait_seconds": set(),
    "runs_waiting": {"reason"},
    "runs_oldest_waiting_age_seconds": set(),
    "runs_held": set(),
    "runs_machines": {"state"},
    "runs_deletions_pending": {"store"},
    "runs_deletions_oldest_age_seconds": {"store"},
    "runs_deletions_failed_total": {"store"},
    "runs_store_call_duration_seconds": {"store", "operation", "outcome"},
    "db_client_operation_duration_seconds": {"db_query_summary"},
    "db_client_connection_count": {"state"},
    "runs_pool_wait_seconds": set(),
    "runs_clock_offset_seconds": set(),
    "runs_disk_is_full": {"store"},
    "runs_commits_given_up_total": set(),
    "runs_set_size": {"what"},
    "runs_idempotency_total": {"outcome"},
    "runs_in_flight_bytes": set(),
    "runs_background_last_success_timestamp_seconds": {"loop"},
    "runs_background_failures_total": {"loop", "code"},
    "runs_scrape_errors_total": set(),
    "runs_dispatches_total": {"kind", "outcome"},
    "runs_dispatches_pending": set(),
    "runs_dispatches_oldest_age_seconds": set(),
    "runs_webhook_deliveries_total": {"outcome"},
    "runs_webhook_oldest_pending_age_seconds": set(),
}


@pytest.fixture
def own(stack: Stack) -> Iterator[Stack]:
    """A database whose runs and machines nobody else counts in."""
    with own_database(stack, "metrics") as made:
        yield made


def test_a_life_cycle_shows_in_every_metric_and_no_id_does(own: Stack) -> None:
    server = start_server(own)
    try:
        with server.client() as api:
            machine = api.machine()
            run = api.run(sensitive_input_values={"password": "hush-hush"}, file_inputs=[])["id"]
            until(lambda: api.get_run(run)["assigned_machine_id"] == machine)
            api.report(run, status="running")
            api.report(run, status="error", error=["it broke"])
            assert api.post(f"/v1/runs/{run}/retry", headers={"Idempotency-Key": "once"}).status_code == 200
            assert api.post(f"/v1/runs/{run}/retry", headers={"Idempotency-Key": "once"}).status_code == 200
            assert api.retry(run).status_code == 409
            assert api.post(f"/v1/runs/{run}/retry?xdry_run=true").status_code == 409
            assert api.post(f"/v1/runs/{run}/retry?dry_run=true").status_code == 200
            assert api.post(f"/v1/runs/{run}/retry?dry%5Frun=true").status_code == 200
            assert api.post(f"/v1/runs/{run}/retry", headers={"Authorization": "Bearer nobody"}).status_code == 401
            assert httpx.get(f"{server.url}/nowhere/{run}", trust_env=False, verify=False).status_code == 404

            seen = scrape(server.url)
            shown = {key[0] for key in seen.values} | seen.types.keys()
            assert PROMISED.keys() <= shown
            for name, labels in seen.values:
                family = next((one for one in PROMISED if re.fullmatch(f"{one}(_bucket|_sum|_count)?", name)), None)
                assert family is None or {label for label, _ in labels} - {"le"} == PROMISED[family], name
            assert seen.value("runs_retries_total", outcome="accepted", code="", by="request") == 1
            assert seen.value("runs_retries_total", outcome="replayed", code="", by="request") == 1
            assert seen.value("runs_retries_total", outcome="refused", code="run_not_terminal", by="request") == 2
            assert seen.value("runs_retries_total", outcome="refused", code="unauthorized", by="request") == 1
            assert seen.value("runs_idempotency_total", outcome="first") == 1
            assert seen.value("runs_idempotency_total", outcome="replayed") == 1
            assert seen.total(REQUESTS, http_route=RETRY, http_response_status_code="200") == 4
            assert seen.value("runs_transitions_total", to="scheduling", by="caller") == 2
            assert (
                seen.total("runs_store_call_duration_seconds_count", store="vault", operation="write", outcome="ok")
                == 1
            )
            assert (
                seen.total("db_client_operation_duration_seconds_count", db_query_summary="runs.retry.switch_staged")
                == 1
            )
            waits = seen.value("runs_pool_wait_seconds_count") or 0
            assert waits >= seen.total(REQUESTS, http_route=RETRY)
            assert 0 < (seen.value("runs_pool_wait_seconds_bucket", le="0.001") or 0) <= waits
            bounds = [
                dict(labels)["le"] for name, labels in seen.values if name == "runs_store_call_duration_seconds_bucket"
            ]
            assert {f"{float(bound):g}" for bound in bounds} == BUCKETS | {"inf"}
            assert len(seen.values) < 8000
            for canary in ("hush-hush", run, machine, api.organization, "once"):
                assert canary not in seen.text
    finally:
        server.app.stop()


def test_whoever_scrapes_alone_sees_what_happened_just_before(own: Stack) -> None:
    """A page is shared only while others still take it."""
    server = start_server(own, BACKGROUND="none")
    try:
        counts = [scrape(server.url).total(REQUESTS, http_route="/metrics") for _ in range(20)]
        assert counts == list(range(20))
    finally:
        server.app.stop()


@pytest.mark.parametrize(
    "name", ["Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-FORWARDED-HOST", "X-Forwarded-Anything"]
)
def test_without_a_token_a_forwarded_request_is_refused(server: Server, name: str) -> None:
    assert httpx.get(f"{server.url}/metrics", trust_env=False, verify=False).status_code == 200
    for method in ("GET", "HEAD"):
        reply = httpx.request(
            method, f"{server.url}/metrics", headers={name: "127.0.0.1"}, trust_env=False, verify=False
        )
        assert reply.status_code == 401
        assert method == "HEAD" or "METRICS_TOKEN" in reply.json()["detail"]


def test_without_a_token_another_machine_is_refused(stack: Stack) -> None:
    """An address of this machine that is not loopback stands for another machine's."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    open_to_all = start_server(stack, HOST="0.0.0.0", BACKGROUND="only")
    try:
        url = open_to_all.url.replace("127.0.0.1", address)
        reply = httpx.get(f"{url}/metrics", trust_env=False, verify=False)
        assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
        assert "METRICS_TOKEN" in reply.json()["detail"]
        assert httpx.get(f"{open_to_all.url}/metrics", trust_env=False, verify=False).status_code == 200
    finally:
        open_to_all.app.stop()


def own_address() -> str | None:
    found = (one.address for some in psutil.net_if_addrs().values() for one in some if one.family is socket.AF_INET)
    return next((address for address in found if not address.startswith("127.")), None)


def test_it_is_off_when_it_is_turned_off_and_asks_for_its_token(stack: Stack) -> None:
    off = start_server(stack, METRICS="off", BACKGROUND="none")
    guarded = start_server(stack, METRICS_TOKEN="a token of the tests", BACKGROUND="only")
    try:
        assert httpx.get(f"{off.url}/metrics", trust_env=False, verify=False).json()["code"] == "route_not_found"
        for given in (None, "Bearer", "Bearer a token of the test", "Basic a token of the tests", "Bearer \xfc"):
            headers = [] if given is None else [(b"Authorization", given.encode("latin-1"))]
            reply = httpx.get(f"{guarded.url}/metrics", headers=headers, trust_env=False, verify=False)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert scrape(guarded.url, "a token of the tests").value("runs_scrape_errors_total") == 0
    finally:
        off.app.stop()
        guarded.app.stop()


def test_counters_of_two_processes_never_fall_and_end_exact_also_when_one_is_killed(own: Stack, tmp_path: Path) -> None:
    server = start_server(own, WORKERS=2, PROMETHEUS_MULTIPROC_DIR=tmp_path / "shared")
    seen: list[Scrape] = []

    def look() -> Scrape:
        found = scrape(server.url)
        for key, before in (seen[-1].counts() if seen else {}).items():
            assert found.values.get(key, -1) >= before, f"{key} fell from {before}"
        seen.append(found)
        return found

    try:
        with server.client() as api:
            runs = [api.finished()["id"] for _ in range(4)]
            before = look()

            def ask(number: int) -> int:
                """On a connection of its own: any of the processes may take it."""
                connection = HTTPConnection(server.url.removeprefix("http://"), timeout=30)
                with closing(connection):
                    connection.request("GET", f"/v1/runs/{runs[number % 4]}", headers=dict(api.headers))
                    return connection.getresponse().status

            with ThreadPoolExecutor(8) as pool:
                answers = pool.map(ask, range(1000))
                for _ in range(50):
                    look()
                assert set(answers) == {200}
            route = "/v1/runs/{run_id}"
            counted = [one.total(REQUESTS, http_route=route, http_request_method="GET") for one in (before, look())]
            assert counted[1] - counted[0] == 1000
            assert seen[-1].value("http_server_active_requests") == 1  # the scrape itself

            workers = [
                one for one in psutil.Process(server.app.pid).children() if "spawn_main" in " ".join(one.cmdline())
            ]
            assert len(workers) == 2
            workers[0].send_signal(signal.SIGKILL)
            workers[0].wait(10)
            until(lambda: is_ready(server))
            assert look().total(REQUESTS, http_route=route, http_request_method="GET") == counted[1]
            assert set(map(ask, range(20))) == {200}
            assert look().total(REQUESTS, http_route=route, http_request_method="GET") == counted[1] + 20
            assert seen[-1].value("http_server_active_requests") == 1
    finally:
        server.app.stop()
    # Another start begins anew.
    server = start_server(own, WORKERS=2, PROMETHEUS_MULTIPROC_DIR=tmp_path / "shared")
    try:
        assert scrape(server.url).total(REQUESTS, http_request_method="GET", http_route="/v1/runs/{run_id}") == 0
    finally:
        server.app.stop()


def test_gauges_tell_why_runs_wait_which_machines_there_are_and_what_is_due_for_deletion(own: Stack) -> None:
    own.sql(
        "INSERT INTO deletions (store, name, due_at, failures) VALUES ('vault', 'runs/a/b/c', now() + interval '300 s', 9),"
        " ('storage', 'later', now() + interval '100 s', 0)"
    )
    server = start_server(own, BACKGROUND_PERIOD_SECONDS=NEVER)
    try:
        with server.client() as api:
            offline = api.machine(status="disconnected")
            api.machine(is_available=False)
            for _ in range(3):
                api.run(machine_id=offline)
            api.run(pool_ids=[api.pool()])
            own.sql("UPDATE runs SET queued_at = now() - interval '1 hour' WHERE pinned_machine_id IS NOT NULL")
            seen = scrape(server.url)
            assert seen.value("runs_waiting", reason="machine_offline") == 3
            assert seen.value("runs_waiting", reason="no_machine_in_pools") == 1
            assert seen.value("runs_waiting", reason="machine_busy") == 0
            assert 3600 <= (seen.value("runs_oldest_waiting_age_seconds") or 0) < 3700
            assert seen.value("runs_machines", state="disconnected") == 1
            assert seen.value("runs_machines", state="unavailable") == 1
            assert seen.value("runs_machines", state="busy") == 0
            assert seen.value("runs_deletions_pending", store="vault") == 1
            assert seen.value("runs_deletions_pending", store="files") == 0
            # Taken nine times: 5, 10, 20, ... 320, 320, 320 s apart, and 300 s remain of the last.
            age = seen.value("runs_deletions_oldest_age_seconds", store="vault") or 0
            assert 5 * 127 + 2 * 320 - 300 <= age < 5 * 127 + 2 * 320 - 200
    finally:
        server.app.stop()


def test_without_postgresql_it_answers_and_counts_that_it_cannot_tell(tmp_path_factory: pytest.TempPathFactory) -> None:
    with own_stack(tmp_path_factory.mktemp("own")) as own:
        server = start_server(own)
        try:
            own.postgres.freeze()
            try:
                until(lambda: scrape(server.url).value("runs_scrape_errors_total"))
                seen = scrape(server.url)
                assert seen.value("runs_machines", state="idle") is None
                assert until(
                    lambda: scrape(server.url).total("runs_background_failures_total", code="database_unavailable")
                )
            finally:
                own.postgres.thaw()
            until(lambda: scrape(server.url).value("runs_machines", state="idle") == 0)
        finally:
            server.app.stop()


def test_whoever_tries_every_method_path_and_error_makes_no_more_series_than_there_may_be(server: Server) -> None:
    with server.client() as api:

        def attack(number: int) -> int:
            method = ("GET", "POST", "PUT", "PATCH", "DELETE", "BREW", f"X{number}")[number % 7]
            path = ("/v1/runs", f"/v1/runs/{uuid4()}", f"/v1/{number}", f"/v1/machines/{number}", "/docs")[number % 5]
            return api.request(method, f"{path}?n={number}", content=b"{" * (number % 3)).status_code

        with ThreadPoolExecutor(8) as pool:
            assert 500 not in set(pool.map(attack, range(200)))
        seen = scrape(server.url)
        names = {dict(labels).get("http_request_method", "GET") for _, labels in seen.values}
        assert names <= {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "_OTHER"}
        assert len(seen.values) < 8000
