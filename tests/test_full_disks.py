"""A full disk takes no replica out of service: readiness says `degraded`, and reads go on."""

from collections.abc import Iterator

import httpx
import pytest

from app.schemas.problems import Health
from tests.support.scrapes import scrape
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database
from tests.support.waiting import until

# What PostgreSQL says when it cannot make a table longer.
FULL = """
    CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$
"""


@pytest.fixture
def own(stack: Stack) -> Iterator[Stack]:
    """A database that only this test fills."""
    with own_database(stack, "disks") as made:
        yield made


def health(server: Server, path: str) -> Health:
    reply = httpx.get(server.url + path, timeout=10, trust_env=False, verify=False)
    assert reply.status_code == 200
    return Health.model_validate(reply.json())


def gauge(server: Server, store: str) -> float:
    return scrape(server.url).total("runs_disk_is_full", store=store)


def test_a_database_whose_disk_is_full(own: Stack) -> None:
    server = start_server(own)
    try:
        with server.client() as api:
            run = api.finished("error")
            assert health(server, "/health/ready").status == "ok"
            assert (gauge(server, "database"), gauge(server, "storage")) == (0, 0)
            own.sql(FULL)
            own.sql("CREATE TRIGGER no_room BEFORE UPDATE ON runs FOR EACH ROW EXECUTE FUNCTION no_room()")
            refused = api.retry(run["id"])
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
            for path in ("/health/ready", "/v1/health/db"):
                seen = health(server, path)
                assert (seen.status, seen.down, seen.reasons) == ("degraded", [], {"database": "disk_full"})
            assert health(server, "/health/live").status == "ok"
            assert api.get_run(run["id"])["attempt"] == 1
            until(lambda: gauge(server, "database") == 1, what="the gauge")
            assert gauge(server, "storage") == 0
    finally:
        server.app.stop()
