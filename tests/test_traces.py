"""Traces: the very bytes that a collector gets, what is in them and what never is; and that off is off."""

import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import ConfigurationError
from app.telemetry import tracing
from tests.support.client import file_input
from tests.support.otlp_collector import Collector
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_stack
from tests.support.waiting import until

SERVER, CLIENT, ERROR = 2, 3, 2
CANARY = "canary-7f3a9"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(scope="module")
def traced(stack: Stack, collector: Collector) -> Iterator[Server]:
    server = start_server(
        stack,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=ours",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=tests",
        OTEL_BSP_SCHEDULE_DELAY=100,
        OTEL_TRACES_SAMPLER_ARG=0,
        FASTAPI_OTEL_AUTO_CONFIGURE="true",  # FastAPI's own spans and logs must stay off all the same
    )
    yield server
    server.app.stop()


def sampled(flags: str = "01") -> tuple[str, str, dict[str, str]]:
    """Trace, span and header of a caller."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, {"traceparent": f"00-{trace_id}-{span_id}-{flags}", "tracestate": f"a={CANARY}"}


def tree(collector: Collector, trace_id: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The server span of this name and those below it, once they are there."""

    def root() -> dict[str, Any] | None:
        return next((one for one in collector.spans(trace_id) if one["name"] == name), None)

    found = until(root)
    return found, [one for one in collector.spans(trace_id) if one["parent"] == found["id"]]


def test_a_retry_is_a_tree_of_named_spans_without_anything_that_was_sent(
    traced: Server, collector: Collector, stack: Stack
) -> None:
    with traced.client() as api:
        run = api.finished("error")["id"]
        trace_id, span_id, headers = sampled()
        retried = api.post(
            f"/v1/runs/{run}/retry?canary={CANARY}",
            headers=headers | {"Idempotency-Key": CANARY, "baggage": f"b={CANARY}"},
            json={
                "sensitive_input_values": {CANARY: CANARY},
                "input_values": {"text": CANARY},
                "reason": CANARY,
                "file_inputs": [file_input(CANARY.encode(), f"{CANARY}.txt")],
            },
        )
        shown = api.json_of(retried)
        server, below = tree(collector, trace_id, "POST /v1/runs/{run_id}/retry")
        assert (server["parent"], server["kind"], server["status"], server["events"]) == (span_id, SERVER, 0, 0)
        assert server["attributes"] == {
            "http.request.method": "POST",
            "http.route": "/v1/runs/{run_id}/retry",
            "http.response.status_code": 200,
            "network.protocol.version": "1.1",
            "url.path": f"/v1/runs/{run}/retry",
            "url.scheme": "http",
        }
        assert server["resource"]["service.name"] == "runs-api"
        assert server["resource"]["deployment.environment.name"] == "tests"
        names = [one["name"] for one in below]
        assert {"auth.authenticate", "runs.retry.read", "deletions.stage", "runs.retry.switch_staged"} <= set(names)
        assert names.count("POST /v1/{mount}/data/{path}") == names.count("PUT /{key}") == 1
        for one in below:
            assert (one["kind"], one["status"], one["events"]) == (CLIENT, 0, 0)
            if "url.template" in one["attributes"]:
                assert one["attributes"].keys() == {"http.request.method", "url.template"}
            else:
                database = stack.url.rpartition("/")[2]
                assert one["attributes"] == {
                    "db.system.name": "postgresql",
                    "db.namespace": database,
                    "db.query.summary": one["name"],
                }
        assert CANARY.encode() not in b"".join(collector.raw)
        assert collector.headers[-1]["x-tenant"] == "ours"

        # The attempt carries the trace on to its executor, whose report joins it; the line in the log names it.
        assert shown["traceparent"] == api.get_run(run)["traceparent"] == f"00-{trace_id}-{server['id']}-01"
        reported = api.patch(
            f"/v1/runs/{run}", json={"status": "running"}, headers={"traceparent": shown["traceparent"]}
        )
        assert reported.status_code == 200
        report, _ = tree(collector, trace_id, "PATCH /v1/runs/{run_id}")
        assert report["parent"] == server["id"]
        assert f'"trace_id":"{trace_id}"' in traced.app.log.read_text()


def test_every_operation_of_a_store_has_a_name_for_its_span() -> None:
    operations = {
        (store, operation)
        for store, file in (("files", "files.py"), ("vault", "vault.py"))
        for operation in re.findall(
            r'_(?:run|call|measured)\((?:self\._\w+, )?"(\w+)"',
            (Path(tracing.__file__).parents[1] / "stores" / file).read_text(),
        )
    }
    assert len(operations) >= 10
    assert operations <= tracing._STORE_CALLS.keys()


def test_a_set_is_one_span_that_is_linked_with_the_other_requests(
    traced: Server, collector: Collector, stack: Stack
) -> None:
    with traced.client() as api, ThreadPoolExecutor(12) as threads:
        runs = [api.finished("error")["id"] for _ in range(12)]
        traces, header_fields = [], []
        for _ in runs:
            trace_id, _, headers = sampled()
            traces.append(trace_id)
            header_fields.append(headers)
        with stack.held("LOCK TABLE run_attempts IN ACCESS EXCLUSIVE MODE"):
            replies = [
                threads.submit(api.post, f"/v1/runs/{run_id}/retry", headers=headers)
                for run_id, headers in zip(runs, header_fields, strict=True)
            ]
            until(lambda: stack.waiting() >= 2, what="a set that waits beside the first one")
        assert [reply.result().status_code for reply in replies] == [200] * 12

    def of_sets() -> list[dict[str, Any]] | None:
        found = [one for trace in traces for one in collector.spans(trace) if one["name"] == "runs.retry.switch"]
        return found if len(found) + sum(len(one["links"]) for one in found) == 12 else None

    spans = until(of_sets, what="each request in one span, as its parent or as a link")
    assert any(one["links"] for one in spans)
    assert set().union(*(one["links"] for one in spans)) < set(traces)


def test_what_is_refused_is_no_error_and_what_fails_is_one_with_its_code(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> None:
    with own_stack(tmp_path_factory.mktemp("own")) as own:
        server = start_server(own, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY=100)
        try:
            with server.client() as api:
                run = api.finished()["id"]
                trace_id, _, headers = sampled()
                assert api.request("PROPFIND", f"/v1/runs/{run}", headers=headers).status_code == 405
                assert api.post("/v1/runs/nothing/retry", headers=headers).status_code == 422
                until(lambda: len([one for one in collector.spans(trace_id) if one["kind"] == SERVER]) == 2)
                served = [one for one in collector.spans(trace_id) if one["kind"] == SERVER]
                assert {one["status"] for one in served} == {0}
                assert {one["attributes"]["http.request.method"] for one in served} == {"_OTHER", "POST"}
                assert any(one["name"].startswith("HTTP") for one in served)

                own.bao.kill()
                trace_id, _, headers = sampled()
                secret = {"sensitive_input_values": {"password": CANARY}}
                assert api.post(f"/v1/runs/{run}/retry", json=secret, headers=headers).status_code == 503
                root, below = tree(collector, trace_id, "POST /v1/runs/{run_id}/retry")
                assert (root["status"], root["attributes"]["error.type"], root["message"]) == (
                    ERROR,
                    "vault_unavailable",
                    "",
                )
                [call] = [one for one in below if one["name"] == "POST /v1/{mount}/data/{path}"]
                assert (call["status"], call["attributes"]["error.type"]) == (ERROR, "vault_unavailable")
                own.postgres.kill()
                trace_id, _, headers = sampled()
                until(lambda: api.get(f"/v1/runs/{run}", headers=headers).status_code == 503)
                assert until(lambda: collector.spans(trace_id))[0]["attributes"]["error.type"] == "database_unavailable"
                assert CANARY.encode() not in b"".join(collector.raw)
        finally:
            server.app.stop()


def test_what_is_not_sampled_makes_no_span_but_keeps_its_trace(traced: Server, collector: Collector) -> None:
    with traced.client() as api:
        workflow = api.workflow()
        ids = []
        for headers in (
            {},
            sampled("00")[2],
            {"traceparent": "00-" + "0" * 32 + "-1111111111111111-01"},
            {"traceparent": CANARY},
        ):
            made = api.json_of(api.post("/v1/runs", json={"workflow_id": workflow}, headers=headers), 201)
            version, trace_id, _, flags = made["traceparent"].split("-")
            assert (version, flags) == ("00", "00")
            ids.append(trace_id)
        trace_id, _, headers = sampled()
        api.post("/v1/runs", json={"workflow_id": workflow}, headers=headers)
        tree(collector, trace_id, "POST /v1/runs")
        assert not any(collector.spans(one) for one in ids)


def test_off_a_callers_trace_is_handed_on_and_nothing_else_is_done(server: Server) -> None:
    with server.client() as api:
        trace_id, span_id, headers = sampled()
        workflow = api.workflow()
        made = api.json_of(api.post("/v1/runs", json={"workflow_id": workflow}, headers=headers), 201)
        assert made["traceparent"] == f"00-{trace_id}-{span_id}-01"
        assert api.run()["traceparent"] is None
        assert CANARY not in api.get(f"/v1/runs/{made['id']}").text
        until(lambda: f'"trace_id":"{trace_id}"' in server.app.log.read_text())


def test_a_collector_that_does_not_answer_holds_up_nobody(stack: Stack) -> None:
    server = start_server(stack, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_TRACES_SAMPLER="always_on")
    try:
        assert httpx.get(f"{server.url}/health/ready", trust_env=False, verify=False).status_code == 200
        with server.client() as api:
            assert api.run()["traceparent"].endswith("-01")
    finally:
        began = time.monotonic()
        server.app.stop(30)
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_SAMPLER_ARG": "2"},
            "OTEL_TRACES_SAMPLER_ARG",
        ),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^{named}: "):
        tracing.check()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.check()


def test_without_the_packages_a_start_ends_with_one_line(stack: Stack, tmp_path: Path) -> None:
    # As on a machine where only requirements.lock is installed.
    hide = "import sys; sys.modules['opentelemetry.sdk'] = None; from app.cli import main; sys.exit(main(['serve']))"
    done = subprocess.run(
        [sys.executable, "-c", hide],
        env=stack.environment(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318"),
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("OTEL_EXPORTER_OTLP_ENDPOINT: it needs the packages for traces.")
