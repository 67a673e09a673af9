"""The organization's keys as a caller sees them, and their names beside what they did."""

from uuid import uuid4

from tests.support.client import Client
from tests.support.server import Server
from tests.support.stack import Stack

SHOWN = {
    *("id", "organization_id", "name", "scopes", "machine_id", "user_id"),
    *("created_at", "last_used_at", "expires_at", "revoked_at"),
}


def name(stack: Stack, api: Client, named: str) -> str:
    """Name the client's key; returns its id."""
    key_id: str = api.json_of(api.get("/v1/whoami"))["key_id"]
    stack.sql("UPDATE api_keys SET name = $1 WHERE id = $2", named, key_id)
    return key_id


def test_an_organization_sees_its_keys_and_never_a_key(api: Client, foreign: Client, stack: Stack) -> None:
    own = name(stack, api, "ada's laptop")
    revoked = stack.new_key(api.organization, scopes=["runs:read"])
    stack.sql(
        "UPDATE api_keys SET revoked_at = now() WHERE scopes = '{runs:read}' AND organization_id = $1", api.organization
    )
    name(stack, foreign, "of another organization")
    page = api.json_of(api.get("/v1/keys"))
    assert (page["total"], page["next"]) == (2, None)
    newest, oldest = page["items"]
    assert set(newest) == set(oldest) == SHOWN
    assert (oldest["id"], oldest["name"], oldest["scopes"], oldest["revoked_at"]) == (own, "ada's laptop", ["*"], None)
    assert newest["revoked_at"] is not None
    text = api.get("/v1/keys").text
    assert revoked not in text
    assert api.headers["authorization"].split()[1] not in text
    assert "key_hash" not in text
    first = api.json_of(api.get("/v1/keys", params={"limit": 1}))
    rest = api.json_of(api.get("/v1/keys", params={"limit": 1, "after": first["next"]}))
    assert [first["items"], rest["items"]] == [[newest], [oldest]]


def test_reading_keys_needs_a_scope_of_its_own(server: Server) -> None:
    organization = f"org-{uuid4().hex[:12]}"
    for scopes, status in ((["runs:read", "webhooks:write"], 403), (["keys:read"], 200)):
        with server.client(organization, key=server.stack.new_key(organization, scopes=scopes)) as client:
            assert client.get("/v1/keys").status_code == status
            assert client.get("/v1/runs").status_code == (200 if "runs:read" in scopes else 403)


def test_attempts_and_events_say_the_name_of_the_key(api: Client, server: Server, stack: Stack) -> None:
    run = api.finished("error")["id"]
    with server.client(api.organization, key=stack.new_key(api.organization, scopes=["*"])) as other:
        key_id = name(stack, other, "nightly job")
        assert other.retry(run).status_code == 200
    [attempt] = api.json_of(api.get(f"/v1/runs/{run}/attempts"))["items"]
    assert (attempt["retried_by_key_id"], attempt["retried_by_key_name"]) == (key_id, "nightly job")
    name(stack, api, "ada's laptop")
    for path in (f"/v1/runs/{run}/events", "/v1/events"):
        found = {event["event"]: event["by_key_name"] for event in api.json_of(api.get(path))["items"]}
        assert (found["created"], found["retried"]) == ("ada's laptop", "nightly job"), path
    stack.sql("UPDATE api_keys SET name = NULL WHERE id = $1", key_id)
    [attempt] = api.json_of(api.get(f"/v1/runs/{run}/attempts"))["items"]
    assert attempt["retried_by_key_name"] is None
