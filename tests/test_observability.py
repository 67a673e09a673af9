"""Alerts and dashboard, proved with the real Prometheus: each alert fires and clears, and each panel shows something."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from ruamel.yaml import YAML

from dev.prometheus import MISSING, Prometheus, binary
from dev.stack import http
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "runs.json"


def installed() -> str:
    """The server's program. Without it the test is skipped, or fails if PROMETHEUS says that there must be one."""
    found = binary()
    if found is None:
        if "PROMETHEUS" in os.environ:
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    return found


def alerts() -> list[dict[str, Any]]:
    document = YAML(typ="safe").load(RULES / "alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def promtool(*arguments: str) -> None:
    program = Path(installed()).with_name("promtool")
    done = subprocess.run([program, *arguments], cwd=RULES, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_and_clears() -> None:
    promtool("check", "config", "prometheus.yml")
    files = sorted(file.name for file in RULES.glob("*_test.yml"))
    promtool("test", "rules", *files)
    tested = {test["name"] for file in files for test in YAML(typ="safe").load(RULES / file)["tests"]}
    assert tested == {alert["alert"] for alert in alerts()}


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    page = (ROOT / "docs/runbooks.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"(?m)^### ", page)
    runbooks = dict(section.split("\n", 1) for section in sections)
    assert runbooks.keys() == {alert["alert"] for alert in alerts()}
    for alert in alerts():
        base, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert (base, anchor) == ("https://runs.example.com/docs/runbooks.md", alert["alert"].lower())
    for name, text in runbooks.items():
        order = [text.index(part) for part in ("**Means**: ", "**Hurts**: ", "```\n", "**Ends**: ")]
        assert order == sorted(order), name
        commands = text.split("```")[1].strip().splitlines()
        assert len(commands) == 3, f"{name}: three commands"
        assert all(re.search(r" {2,}# \S", line) for line in commands), (
            f"{name}: what to expect stands behind each command"
        )


def test_each_panel_says_what_it_shows() -> None:
    shown = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in shown}) == len(shown) > 30
    assert [panel["title"] for panel in shown if len(panel.get("description", "").split()) < 8] == []
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in shown}
    assert len(places) == len(shown), "two panels in one place"


def test_alerts_and_panels_name_only_metrics_that_there_are(server: Server) -> None:
    shown = set(re.findall(r"(?m)^# TYPE (\S+)", http("GET", f"{server.url}/metrics")[1])) | {"up"}
    shown.add("runs_quota_refusals_total")  # there with the first refusal
    for text in (*(alert["expr"] for alert in alerts()), *(expression for _, expression in panels())):
        for name in re.findall(r"\b(?:runs|http|db)_[a-z_]+", re.sub(r"\{.*?\}|by \(.*?\)", "", text)):
            assert re.sub("_(bucket|sum|count)$", "", name) in shown or name in shown, name


def test_the_docs_name_every_metric_and_every_line_of_the_log_and_no_other() -> None:
    docs = (ROOT / "docs" / "observability.md").read_text()
    metrics = docs.partition("## Metrics")[2].partition("## Logs")[0]
    metric = r"(?:runs|http_server|db_client)_[a-z_]+"
    source = (ROOT / "app" / "telemetry" / "metrics.py").read_text()
    named = {name for row in re.findall(r"(?m)^\| (`[^|]*) \|", metrics) for name in re.findall(metric, row)}
    assert named == set(re.findall(f'"({metric})"', source))

    logs = docs.partition("## Logs")[2].partition("## Traces")[0]
    sources = "".join(file.read_text() for file in (ROOT / "app").rglob("*.py"))
    events = set(re.findall(r'"event": "([a-z_]+)"', sources)) | {"run_assigned", "run_started", "run_ended"}
    listed = {name for row in re.findall(r"(?m)^\| (`[^|]*) \|", logs) for name in re.findall(r"`([a-z_]+)`", row)}
    assert listed - {"event"} == events
    causes = set(re.findall(r'(?:kind = |Unreachable\()"([a-z_]+)"', sources))
    assert causes <= set(re.findall(r"`([a-z_]+)`", logs))


def test_each_panel_shows_something_after_the_life_of_a_run(stack: Stack, tmp_path: Path) -> None:
    installed()
    with own_database(stack, "panels") as own:
        server = start_server(own)
        try:
            with server.client() as api, Prometheus(tmp_path, server.url, seconds=1) as prometheus:
                machine = api.machine()
                run = api.run(sensitive_input_values={"password": "wrong"})["id"]
                until(lambda: api.get_run(run)["assigned_machine_id"] == machine)
                api.report(run, status="running")
                api.report(run, status="error", error=["Login failed."])
                assert api.retry(run, sensitive_input_values={"password": "right"}).status_code == 200
                assert api.retry(run).status_code == 409

                def shows(expression: str) -> bool:
                    status, reply = http("GET", f"{prometheus.url}/api/v1/query?query={quote(expression)}")
                    assert status == 200, reply
                    return bool(reply["data"]["result"])

                for title, expression in panels():
                    until(partial(shows, expression), what=f"{title}: {expression}")
                status, reply = http("GET", f"{prometheus.url}/api/v1/rules")
                assert (status, reply["status"]) == (200, "success")
                health = {rule["name"]: rule["health"] for group in reply["data"]["groups"] for rule in group["rules"]}
                assert set(health.values()) <= {"ok", "unknown"}, health
        finally:
            server.app.stop()
