"""The database fails over: what was answered is there, and the service is back by itself, on the server that takes writes."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.client import Client
from tests.support.concurrent_requests import Answer, Call, finished_runs, send_at_once, tally
from tests.support.faults import FaultyServer
from tests.support.movable_address import MovableAddress
from tests.support.outages import is_ready
from tests.support.server import Server
from tests.support.stack import Stack
from tests.support.standby import Standby
from tests.support.waiting import until

RECOVERY_SECONDS = 10
AT_ONCE = 32
LISTENERS = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_is_in_recovery%' AND application_name = 'runs-api'"


def readiness(server: Server) -> tuple[int, dict[str, str]]:
    reply = httpx.get(f"{server.url}/health/ready", timeout=10, trust_env=False, verify=False)
    return reply.status_code, reply.json()["reasons"]


def retries(run_ids: list[str]) -> list[Call]:
    return [Call("POST", f"/v1/runs/{run_id}/retry", {}, f"key-{run_id}") for run_id in run_ids]


def write_until_answered(client: Client, run_id: str) -> tuple[float, list[Answer]]:
    """Send a retry until it is answered 200; after how many seconds, and what was answered before."""
    began = time.monotonic()
    refused: list[Answer] = []
    while True:
        [answer] = send_at_once(client, retries([run_id]))
        if answer.status == 200:
            return time.monotonic() - began, refused
        refused.append(answer)
        assert time.monotonic() - began < RECOVERY_SECONDS, [one.content for one in refused[-3:]]


# --- one server that takes no writes for a while ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(broken: Stack) -> Iterator[FaultyServer]:
    with FaultyServer(broken, BACKGROUND_PERIOD_SECONDS=0.2) as started:
        until(lambda: is_ready(started))
        yield started


RELOAD = "SELECT pg_reload_conf()"
BREAK_OFF = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'runs_app'"
READ_ONLY = {
    "server": (
        ["ALTER SYSTEM SET default_transaction_read_only = on", RELOAD],
        ["ALTER SYSTEM RESET default_transaction_read_only", RELOAD],
    ),
    "role": (
        ["ALTER ROLE runs_app SET default_transaction_read_only = on", BREAK_OFF],
        ["ALTER ROLE runs_app RESET default_transaction_read_only"],
    ),
}


@pytest.mark.parametrize("name", READ_ONLY)
def test_a_server_that_takes_no_writes_for_a_while(broken: Stack, server: FaultyServer, name: str) -> None:
    """Connections that were good before notice it, whether by a write or by readiness, and come back by themselves."""
    begin, end = READ_ONLY[name]
    with server.client() as client:
        run_ids = finished_runs(client, 2 * AT_ONCE)
        assert set(tally(send_at_once(client, retries(run_ids[:AT_ONCE])))) == {
            "200"
        }  # the pool is full of connections
        for statement in begin:
            broken.sql(statement)
        try:
            until(lambda: readiness(server) == (503, {"database": "read_only"}), what="readiness that says it")
            answers = send_at_once(client, retries(run_ids[AT_ONCE:]))
            assert set(tally(answers)) == {"503 database_unavailable"}
            assert all("nothing was changed" in answer.detail for answer in answers)
        finally:
            for statement in end:
                broken.sql(statement)
        seconds, _ = write_until_answered(client, run_ids[-1])
        assert set(tally(send_at_once(client, retries(run_ids[AT_ONCE:])))) == {"200"}
        until(lambda: is_ready(server), what="readiness")
        until(lambda: broken.sql(LISTENERS), RECOVERY_SECONDS, what="LISTEN again")
    print(f"{name}: writes again after {seconds:.1f} s")


# --- two servers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def standby(broken: Stack, tmp_path: Path) -> Iterator[Standby]:
    """A synchronous standby of the stack's PostgreSQL, which the test may promote."""
    with Standby(tmp_path, broken.postgres) as started:
        broken.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        broken.sql("SELECT pg_reload_conf()")
        until(
            lambda: broken.sql("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"),
            what="a synchronous standby",
        )
        yield started
    # Killed, not asked: nobody confirms its commits any more.
    broken.postgres.kill()
    settings = broken.postgres.folder / "data" / "postgresql.auto.conf"
    lines = settings.read_text().splitlines(keepends=True)
    settings.write_text("".join(line for line in lines if not line.startswith("synchronous_standby_names")))
    broken.postgres.start()


def kill_when_retried(broken: Stack, organization: str) -> None:
    query = "SELECT 1 FROM runs WHERE organization_id = $1 AND attempt = 2"
    until(lambda: broken.sql(query, organization), what="the first retry")
    broken.postgres.kill()


def promoted(broken: Stack, standby: Standby) -> Stack:
    """The standby takes writes. Returns the stack with it in the place of the primary."""
    now = Stack(broken.folder, standby, broken.bao, **broken.settings)
    assert now.sql("SELECT pg_promote(true, 10) AS done") == [{"done": True}]
    return now


def test_the_primary_dies_under_load_and_its_address_moves_early(broken: Stack, standby: Standby) -> None:
    """The address leads to the standby before that is promoted: connections to it must not be kept."""
    with MovableAddress(broken.postgres.port) as address:
        url = address.url(broken.postgres.app_url)
        with FaultyServer(broken, DATABASE_URL=url) as server, server.client() as client:
            run_ids = finished_runs(client, 4 * AT_ONCE)
            kill = threading.Thread(target=kill_when_retried, args=(broken, client.organization))
            kill.start()
            answers = send_at_once(client, retries(run_ids))
            kill.join()
            print(tally(answers))
            assert set(tally(answers)) == {"200", "503 database_unavailable"}
            address.move_to(standby.port)
            until(lambda: readiness(server) == (503, {"database": "read_only"}), what="readiness that says it")
            new = promoted(broken, standby)
            seconds, _ = write_until_answered(client, run_ids[0])
            print(f"writes again after {seconds:.1f} s")
            until(lambda: is_ready(server), what="readiness")
            for run_id, answer in zip(run_ids, answers, strict=True):
                [run] = new.sql("SELECT attempt FROM runs WHERE id = $1::text::uuid", run_id)
                assert answer.status != 200 or run["attempt"] == 2, "an answered retry is lost"
            resent = send_at_once(client, retries(run_ids))
            assert tally(resent) == {"200": len(run_ids)}
            for first, second in zip(answers, resent, strict=True):
                assert first.status != 200 or first.content == second.content, "not the first reply"
            until(lambda: new.sql(LISTENERS), RECOVERY_SECONDS, what="LISTEN again")


def test_the_first_of_two_servers_falls_silent(broken: Stack, standby: Standby) -> None:
    """Both stand in the URL. A frozen server still accepts connections and answers none."""
    first, second = broken.postgres.app_url, f"127.0.0.1:{standby.port}"
    before, _, after = first.rpartition("/")
    with (
        FaultyServer(broken, DATABASE_URL=f"{before},{second}/{after}") as server,
        server.client() as client,
    ):
        run_ids = finished_runs(client, AT_ONCE)
        assert set(tally(send_at_once(client, retries(run_ids[1:])))) == {"200"}  # the pool is full of connections
        broken.postgres.freeze()
        new = promoted(broken, standby)
        seconds, refused = write_until_answered(client, run_ids[0])
        print(f"writes again after {seconds:.1f} s and {len(refused)} refusals")
        assert len(refused) <= 2, "each connection had a timeout of its own"
        until(lambda: is_ready(server), what="readiness")
        until(lambda: new.sql(LISTENERS), RECOVERY_SECONDS, what="LISTEN again")
        assert set(tally(send_at_once(client, retries(run_ids)))) == {"200"}


def test_a_frozen_standby_is_told(broken: Stack, standby: Standby) -> None:
    """Commits that nobody confirms are given up, and counted."""
    with FaultyServer(broken) as server, server.client() as client:
        [run_id] = finished_runs(client, 1)
        standby.freeze()
        try:
            [answer] = send_at_once(client, retries([run_id]))
            assert (answer.status, "may have taken effect" in answer.detail) == (503, True)
            metrics = httpx.get(f"{server.url}/metrics", trust_env=False, verify=False).text
            [line] = [line for line in metrics.splitlines() if line.startswith("runs_commits_given_up_total")]
            assert float(line.split()[-1]) >= 1
        finally:
            standby.thaw()
        assert set(tally(send_at_once(client, retries([run_id])))) == {"200"}
