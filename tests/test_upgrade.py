"""An upgrade: the version before and this one serve one migrated database, and nobody notices which one answers."""

from pathlib import Path

import pytest

from dev.stack import free_port
from tests.sdk import environment
from tests.sdk.environment import NEWEST
from tests.support.concurrent_requests import Call, finished_runs, send_at_once, tally
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.versions import Balancer, NoHistoryError, OlderApp, version_before

INCOMPATIBLE = "incompatible = True"  # what the file of a migration says that older replicas do not bear


def test_the_version_before_and_this_one_pass_the_sdks_methods_together(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "before"
    source.mkdir()
    try:
        commit = version_before(source)
    except NoHistoryError as problem:
        pytest.skip(f"the version before is not known: {problem}")
    older = {file.name for file in (source / "migrations/versions").glob("[0-9]*.py")}
    new = [file for file in Path("migrations/versions").glob("[0-9]*.py") if file.name not in older]
    if any(INCOMPATIBLE in file.read_text(encoding="utf-8") for file in new):
        pytest.skip("the newest migration is marked: older replicas refuse the database")
    with own_database(stack, "versions") as own:
        this = start_server(own)
        port = free_port()
        app = OlderApp(source, own.folder / f"server-{port}", f"http://127.0.0.1:{port}", own.environment(PORT=port))
        try:
            before = Server(own, app)
            app.start()
            with Balancer(this.url, before.url) as both:
                clients = {style: this.client() for style in ("sync", "async")}
                job = {
                    "url": both.url,
                    "keys": {style: client.headers["authorization"].split()[1] for style, client in clients.items()},
                    "foreign_key": own.new_key("foreign"),
                }
                report = environment.run(NEWEST, "every_method.py", job)
                outcomes = [outcome for styles in report["results"].values() for outcome in styles.values()]
                assert set(outcomes) == {"ok"}, f"with {commit}: {report['results']}"
                assert min(both.served[this.url], both.served[before.url]) > 50, both.served
            # One winner, whichever version a retry comes to; and a reply of one is replayed by the other.
            with this.client() as api:
                urls = [this.url, before.url]
                for run_id in finished_runs(api, 3):
                    answers = send_at_once(api, [Call("POST", f"/v1/runs/{run_id}/retry")] * 6, urls=urls)
                    assert tally(answers) == {"200": 1, "409 run_not_terminal": 5}
                [run_id] = finished_runs(api, 1)
                answers = send_at_once(api, [Call("POST", f"/v1/runs/{run_id}/retry", key="once")] * 6, urls=urls)
                assert tally(answers) == {"200": 6}
                assert len({answer.content for answer in answers}) == 1
        finally:
            app.stop()
            this.app.stop()
