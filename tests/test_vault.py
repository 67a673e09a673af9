"""Secrets against a real OpenBao, under the service's own policy. Fakes stand in only to fail in a chosen way."""

import asyncio
import json
import logging
import os
import ssl
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest
from pydantic import JsonValue, SecretStr

from app.config import Settings
from app.errors import PayloadTooLarge, VaultUnavailable
from app.stores.vault import MAX_SECRET_BYTES, MAX_SECRET_NAMES, VaultSecrets, aliases
from dev.stack import Bao
from tests.support.movable_address import MovableAddress

pytestmark = pytest.mark.anyio

CANARY = "canary-5f1d7a"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    with Bao(tmp_path_factory.mktemp("stack")) as bao:
        yield bao


def read(bao: Bao, path: str) -> dict[str, str] | None:
    status, reply = bao.call("GET", f"secret/data/{path}")
    return None if status == 404 else reply["data"]["data"]


def approle_logins(bao: Bao) -> int:
    """How many tokens of AppRole logins are alive."""
    accessors = bao.call("LIST", "auth/token/accessors")[1]["data"]["keys"]
    replies = [bao.call("POST", "auth/token/lookup-accessor", {"accessor": one}) for one in accessors]
    return sum(status == 200 and reply["data"]["path"] == "auth/approle/login" for status, reply in replies)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("VAULT_", "BAO_")):
            monkeypatch.delenv(name)


def settings(address: str, **others: Any) -> Settings:
    return Settings(
        database_url=SecretStr("postgresql://unused"),
        vault_addr=address,
        storage_url="file:///unused",
        server_key=SecretStr("k" * 32),
        **others,
    )


@pytest.fixture
async def store(bao: Bao) -> AsyncIterator[VaultSecrets]:
    store = VaultSecrets(settings(bao.address, vault_token=bao.token()))
    yield store
    await store.close()


def soon() -> float:
    return time.monotonic() + 60


def fresh(store: VaultSecrets) -> str:
    return store.new_path("org-1", uuid4())


async def test_values_and_aliases(bao: Bao, store: VaultSecrets) -> None:
    values: dict[str, JsonValue] = {
        "plain": "secret text é\n",
        "json in a string": '{"a": 1}',
        "a#b%c/d?é 名": "x",
        "": "empty name",
        "object": {"user": "u", "nested": [1, None, {"k": True}]},
        "large": 2**80 + 1,
        "float": 0.1,
        "yes": True,
        "nothing": None,
    }
    run = uuid4()
    path = store.new_path("org-1", run)
    assert path.startswith(f"runs/org-1/{run}/")
    assert path != store.new_path("org-1", run)
    await store.write(path, values, deadline=soon())
    shown = aliases(store.mount, values)(path)
    assert shown["a#b%c/d?é 名"] == f"vault://secret/{path}#a%23b%25c%2Fd%3F%C3%A9%20%E5%90%8D"
    held = read(bao, path)
    assert held is not None
    assert list(held) == sorted(values)
    for name, value in values.items():
        kind, _, encoded = shown[name].partition(f"://secret/{path}#")
        assert unquote(encoded) == name
        if isinstance(value, str):
            assert (kind, held[name]) == ("vault", value)
        else:
            assert kind == "vault+json"
            assert json.loads(held[name]) == value


@pytest.mark.parametrize("token", ["service", "root"])
async def test_a_path_is_written_once(bao: Bao, token: str) -> None:
    store = VaultSecrets(settings(bao.address, vault_token=bao.token() if token == "service" else bao.root_token))
    path = fresh(store)
    await store.write(path, {"a": "first"}, deadline=soon())
    with pytest.raises(VaultUnavailable):
        await store.write(path, {"a": "second"}, deadline=soon())
    assert read(bao, path) == {"a": "first"}
    await store.close()


async def test_organization_cannot_leave_its_folder(store: VaultSecrets) -> None:
    for organization in ("", "a/b", "..", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="organization"):
            store.new_path(organization, uuid4())


async def test_nothing_is_written_after_the_deadline(bao: Bao, store: VaultSecrets) -> None:
    path = fresh(store)
    with pytest.raises(VaultUnavailable):
        await store.write(path, {"a": "b"}, deadline=time.monotonic())
    assert read(bao, path) is None


async def test_destroy_removes_versions_and_metadata(bao: Bao, store: VaultSecrets) -> None:
    path = fresh(store)
    await store.write(path, {"a": "b"}, deadline=soon())
    assert bao.call("POST", f"secret/data/{path}", {"data": {"a": "second version"}})[0] == 200
    await store.destroy(path)
    assert bao.call("GET", f"secret/data/{path}")[0] == 404
    assert bao.call("GET", f"secret/metadata/{path}")[0] == 404
    await store.destroy(path)


async def test_destroy_without_the_mount_is_no_success(bao: Bao) -> None:
    store = VaultSecrets(settings(bao.address, vault_token=bao.root_token, vault_mount="elsewhere"))
    with pytest.raises(VaultUnavailable):
        await store.destroy(fresh(store))
    await store.close()


async def test_size_limits(store: VaultSecrets) -> None:
    names: dict[str, JsonValue] = {f"n{i}": "v" for i in range(MAX_SECRET_NAMES)}
    await store.write(fresh(store), names, deadline=soon())
    await store.write(fresh(store), {"a": "x" * (MAX_SECRET_BYTES - len('{"a":""}'))}, deadline=soon())
    too_large: list[dict[str, JsonValue]] = [
        {**names, "more": "v"},
        {"a": "x" * (MAX_SECRET_BYTES - len('{"a":""}') + 1)},
        {"a": "<" * (MAX_SECRET_BYTES // 5)},
    ]
    for values in too_large:
        with pytest.raises(PayloadTooLarge, match="sensitive_input_values"):
            await store.write(fresh(store), values, deadline=soon())


async def test_approle_logs_in_again_once_for_all_threads(bao: Bao) -> None:
    role = "auth/approle/role/short"
    bao.call("POST", role, {"token_policies": "runs-api", "token_ttl": "1s"})
    store = VaultSecrets(
        settings(
            bao.address,
            vault_role_id=bao.call("GET", f"{role}/role-id")[1]["data"]["role_id"],
            vault_secret_id=bao.call("POST", f"{role}/secret-id", {})[1]["data"]["secret_id"],
        )
    )
    await store.write(fresh(store), {"a": "b"}, deadline=soon())
    deadline = time.monotonic() + 10
    while approle_logins(bao):
        assert time.monotonic() < deadline, "the token did not expire"
        await asyncio.sleep(0.1)
    bao.call("POST", role, {"token_policies": "runs-api", "token_ttl": "60s"})
    paths = [fresh(store) for _ in range(32)]
    await asyncio.gather(*(store.write(path, {"a": path}, deadline=soon()) for path in paths))
    assert [read(bao, path) for path in paths] == [{"a": path} for path in paths]
    assert approle_logins(bao) == 1
    await store.close()


async def test_token_file_is_read_again(bao: Bao, tmp_path: Path) -> None:
    file = tmp_path / "token"
    old, new = bao.token(), bao.token()
    file.write_text(old + "\n")
    store = VaultSecrets(settings(bao.address, vault_token_file=file))
    await store.write(fresh(store), {"a": "b"}, deadline=soon())
    assert bao.call("POST", "auth/token/revoke", {"token": old})[0] == 204
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    file.unlink()
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    file.write_text(new)
    path = fresh(store)
    await store.write(path, {"a": "b"}, deadline=soon())
    await store.destroy(path)
    await store.close()


# --- whether the service's own login works ---------------------------------------------------------------------------

OTHER_PREFIX = """
path "secret/data/other/*" { capabilities = ["create"] }
path "secret/metadata/other/*" { capabilities = ["delete"] }
"""
RUNS_ALONE = """
path "secret/data/runs/*" { capabilities = ["create"] }
path "secret/metadata/runs/*" { capabilities = ["delete"] }
"""
CREATE_ONLY = 'path "secret/data/runs/*" { capabilities = ["create"] }'
# As a careful operator may write it: the policy denies even what every token may do.
SELF_DENIED = """
path "auth/token/lookup-self" { capabilities = ["deny"] }
path "sys/capabilities-self" { capabilities = ["deny"] }
path "sys/internal/ui/mounts/*" { capabilities = ["deny"] }
"""


@pytest.mark.parametrize(
    ("policies", "more", "expected"),
    [
        (["runs-api"], {}, None),
        (["root"], {}, None),
        (["runs-api"], {"no_default_policy": True}, None),
        (["runs-api", "self-denied"], {}, None),
        (["runs-api"], {"ttl": "1s"}, "login_refused"),
        (["default"], {}, "login_refused"),
        (["other-prefix"], {}, "login_refused"),
        (["create-only"], {}, "login_refused"),
        (["self-denied"], {}, "login_refused"),
    ],
)
async def test_the_health_check_proves_the_login(
    bao: Bao, policies: list[str], more: dict[str, object], expected: str | None
) -> None:
    for name, text in {"other-prefix": OTHER_PREFIX, "create-only": CREATE_ONLY, "self-denied": SELF_DENIED}.items():
        assert bao.call("PUT", f"sys/policies/acl/{name}", {"policy": text})[0] == 204
    token = bao.call("POST", "auth/token/create", {"policies": policies, **more})[1]["auth"]["client_token"]
    if "ttl" in more:
        end = time.monotonic() + 10
        while bao.call("GET", "auth/token/lookup-self", token=token)[0] == 200:
            assert time.monotonic() < end, "the token did not expire"
            await asyncio.sleep(0.1)
    store = VaultSecrets(settings(bao.address, vault_token=token))
    assert await store.problem() == expected
    assert bao.call("LIST", "secret/metadata/runs/-")[0] == 404  # nothing is ever written for it
    await store.close()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("", "not_granted"),
        ('path "secret/data/runs-webhooks/*" { capabilities = ["create", "read"] }', "not_granted"),
        (
            'path "secret/data/runs-webhooks/*" { capabilities = ["create"] }\n'
            'path "secret/metadata/runs-webhooks/*" { capabilities = ["delete"] }',
            "not_granted",
        ),
        ('path "secret/+/runs-webhooks/*" { capabilities = ["create", "read", "delete"] }', None),
    ],
)
async def test_the_health_check_tells_a_policy_without_webhooks(
    bao: Bao, caplog: pytest.LogCaptureFixture, more: str, problem: str | None
) -> None:
    """As it was before there were any: runs go on, and it is said once."""
    bao.call("PUT", "sys/policies/acl/runs-alone", {"policy": RUNS_ALONE + more})
    store = VaultSecrets(settings(bao.address, vault_token=bao.token("runs-alone")))
    assert store.webhooks_problem is None  # nobody has looked
    assert await store.problem() is None
    assert await store.problem() is None
    assert store.webhooks_problem == problem
    assert caplog.text.count("no webhook is sent") == (1 if problem else 0)
    assert bao.call("LIST", "secret/metadata/runs-webhooks/-")[0] == 404
    await store.close()


@pytest.mark.parametrize("mount", ["missing", "version-1"])
async def test_the_health_check_proves_the_mount(bao: Bao, mount: str) -> None:
    bao.call("POST", "sys/mounts/version-1", {"type": "kv", "options": {"version": "1"}})
    store = VaultSecrets(settings(bao.address, vault_token=bao.root_token, vault_mount=mount))
    assert await store.problem() == "login_refused"
    await store.close()


@pytest.mark.parametrize("role_id", ["right", "wrong"])
async def test_the_health_check_logs_in_by_approle(bao: Bao, role_id: str) -> None:
    right, secret_id = bao.approle()
    given = {"vault_role_id": right if role_id == "right" else "wrong", "vault_secret_id": secret_id}
    store = VaultSecrets(settings(bao.address, **given))
    before = approle_logins(bao)
    for _ in range(3):
        assert await store.problem() == (None if role_id == "right" else "login_refused")
    assert approle_logins(bao) - before == (1 if role_id == "right" else 0)
    await store.close()


async def test_the_health_check_notices_a_login_that_stopped_working_and_one_that_works_again(
    bao: Bao, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    old, new = bao.token(), bao.token()
    file.write_text(old)
    store = VaultSecrets(settings(bao.address, vault_token_file=file))
    assert await store.problem() is None
    bao.call("POST", "auth/token/revoke", {"token": old})
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):  # at once: a call that failed withdraws what was proven before
            assert await store.problem() == "login_refused"
        file.write_text(new)
        end = time.monotonic() + 15
        while await store.problem() is not None:
            assert time.monotonic() < end, "the new login is not noticed"
            await asyncio.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "app.stores.vault"]
    assert ["refuses" in line for line in lines] == [True, False], lines  # one line for each change
    assert old not in caplog.text
    assert new not in caplog.text
    await store.close()


@pytest.mark.parametrize("given", [{}, {"vault_token": "a", "vault_role_id": "b"}])
def test_exactly_one_login(given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".vault-token").write_text("somebody else's")
    with pytest.raises(ValueError, match="VAULT_TOKEN_FILE"):
        VaultSecrets(settings("http://127.0.0.1:1", **given))


async def test_frozen(bao: Bao, store: VaultSecrets) -> None:
    await store.write(fresh(store), {"a": "b"}, deadline=soon())
    assert await store.problem() is None
    bao.freeze()
    try:
        began = time.monotonic()
        results = await asyncio.gather(
            *(store.write(fresh(store), {"a": "b"}, deadline=soon()) for _ in range(64)),
            store.destroy(fresh(store)),
            store.problem(),
            return_exceptions=True,
        )
        assert time.monotonic() - began < 9
        assert results.pop() == "unreachable"
        assert {type(result) for result in results} == {VaultUnavailable}
    finally:
        bao.thaw()
    path = fresh(store)
    await store.write(path, {"a": "b"}, deadline=soon())
    assert read(bao, path) == {"a": "b"}
    assert await store.problem() is None


async def test_killed_and_back(bao: Bao, store: VaultSecrets) -> None:
    kept = fresh(store)
    await asyncio.gather(*(store.write(path, {"a": "b"}, deadline=soon()) for path in (kept, fresh(store))))
    bao.kill()
    began = time.monotonic()
    assert await store.problem() == "unreachable"
    for call in (store.write(fresh(store), {"a": "b"}, deadline=soon()), store.destroy(kept)):
        with pytest.raises(VaultUnavailable):
            await call
    assert time.monotonic() - began < 9
    bao.start()  # in this thread: a child ends with the thread that started it
    assert await store.problem() is None
    # Every thread's old connection is dead, and none of them costs a request.
    await asyncio.gather(*(store.write(fresh(store), {"a": "b"}, deadline=soon()) for _ in range(32)))
    await store.destroy(kept)
    assert read(bao, kept) is None


# --- the address moves to another node --------------------------------------------------------------------------------


@contextmanager
def node_that_cannot_serve(status: int) -> Iterator[int]:
    """A node that keeps connections open and answers everything with this status. Its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b'{"errors":["Vault is sealed"]}'
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self._answer
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            pass

    node = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=node.serve_forever, args=(0.05,))
    thread.start()
    yield node.server_address[1]
    node.shutdown()
    thread.join()
    node.server_close()


async def write_many(store: VaultSecrets, count: int) -> int:
    """So many at once; how many of them failed."""
    writes = (store.write(fresh(store), {"a": "b"}, deadline=soon()) for _ in range(count))
    return sum(result is not None for result in await asyncio.gather(*writes, return_exceptions=True))


@pytest.mark.parametrize("status", [503, 500, 502, 429, 473, 307])
async def test_connections_to_a_node_that_cannot_serve_are_given_up(bao: Bao, status: int) -> None:
    with node_that_cannot_serve(status) as broken, MovableAddress(broken) as address:
        store = VaultSecrets(settings(f"http://127.0.0.1:{address.port}", vault_token=bao.token()))
        assert await write_many(store, 32) == 32
        address.move_to(urlsplit(bao.address).port or 0)
        assert await write_many(store, 32) == 0
        await store.close()


async def test_one_answer_is_enough_for_all_connections(bao: Bao, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is sealed while connections to it are open, and the address moves: the first failure is the last."""
    monkeypatch.setattr("app.stores.vault_connections.YOUNG_SECONDS", 0.0)
    with MovableAddress(urlsplit(bao.address).port or 0) as address:
        store = VaultSecrets(settings(f"http://127.0.0.1:{address.port}", vault_token=bao.token()))
        assert await write_many(store, 16) == 0
        bao.freeze()
        try:
            assert await write_many(store, 1) == 1
        finally:
            bao.thaw()
        opened = address.accepted
        assert await write_many(store, 16) == 0
        assert address.accepted - opened >= 8, "connections from before were used again"
        await store.close()


async def test_connections_have_an_age(bao: Bao, monkeypatch: pytest.MonkeyPatch) -> None:
    with MovableAddress(urlsplit(bao.address).port or 0) as address:
        store = VaultSecrets(settings(f"http://127.0.0.1:{address.port}", vault_token=bao.token()))
        for _ in range(3):
            assert await write_many(store, 1) == 0
        assert address.accepted == 1
        monkeypatch.setattr("app.stores.vault_connections.MAX_AGE_SECONDS", 0.0)
        for _ in range(3):
            assert await write_many(store, 1) == 0
        assert address.accepted == 4
        await store.close()


async def test_errors_and_logs_tell_nothing(
    bao: Bao, store: VaultSecrets, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(f"{CANARY}-token")
    dead = VaultSecrets(settings("http://127.0.0.1:1", vault_token=f"{CANARY}-token"))
    refused = VaultSecrets(settings(bao.address, vault_token_file=token_file))
    path = fresh(store)
    with caplog.at_level(logging.DEBUG):
        await store.write(path, {"name": CANARY}, deadline=soon())
        for failing in (store, dead, refused):
            with pytest.raises(VaultUnavailable) as caught:
                await failing.write(path, {"name": CANARY, "other": {"nested": CANARY}}, deadline=soon())
            shown = "".join(traceback.format_exception(caught.value))
            assert CANARY not in shown
            assert path not in shown
            assert "hvac" not in shown.replace("hvac.Client", "")
    assert "POST" in caplog.text  # debug logging was on
    assert CANARY not in caplog.text
    await dead.close()
    await refused.close()


class Fake(ThreadingHTTPServer):
    """Answers as it is told, and remembers what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.replies: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.asked: list[tuple[str, str | None]] = []  # under which path, and in which namespace
        self.release = threading.Event()

    def handle_error(self, *_: object) -> None: ...  # whoever does not believe the certificate hangs up


class FakeHandler(BaseHTTPRequestHandler):
    server: Fake

    def do_POST(self) -> None:
        self.server.seen.append((self.command, self.headers["X-Vault-Token"]))
        self.server.asked.append((self.path, self.headers["X-Vault-Namespace"]))
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        reply = self.server.replies.get(self.command)
        if reply is None:
            self.server.release.wait(30)
            self.close_connection = True
            return
        status, headers, body = reply
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_DELETE = do_POST  # noqa: N815 - the names that the base class looks for

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as fake:
        thread = threading.Thread(target=fake.serve_forever, args=(0.02,))
        thread.start()
        yield fake
        fake.release.set()
        fake.shutdown()
        thread.join()


async def test_the_health_check_asks_seldom(fake: Fake) -> None:
    """Whoever polls it without a key must not make Vault work."""
    store = VaultSecrets(settings(fake.address, vault_token="t"))
    fake.replies["GET"] = (200, {}, b'{"data": {"type": "kv", "options": {"version": "2"}}}')
    may = {
        f"secret/{kind}/{prefix}/-/-/-": ["create", "read", "delete"]
        for kind in ("data", "metadata")
        for prefix in ("runs", "runs-webhooks")
    }
    fake.replies["POST"] = (200, {}, json.dumps({"data": may}).encode())
    for _ in range(20):
        assert await store.problem() is None
    assert [token for _, token in fake.seen].count("t") == 2
    await store.close()


async def test_a_lost_reply_is_never_sent_again(fake: Fake) -> None:
    store = VaultSecrets(settings(fake.address, vault_token="t"))
    fake.release.set()
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    assert fake.seen == [("POST", "t")]
    await store.close()


async def test_a_redirect_is_neither_followed_nor_taken_for_success(fake: Fake, bao: Bao) -> None:
    store = VaultSecrets(settings(fake.address, vault_token=bao.root_token))
    path = fresh(store)
    for status in (301, 307, 308):
        fake.replies["POST"] = fake.replies["DELETE"] = (
            status,
            {"Location": f"{bao.address}/v1/secret/data/{path}"},
            b"",
        )
        with pytest.raises(VaultUnavailable):
            await store.write(path, {"a": "b"}, deadline=soon())
        with pytest.raises(VaultUnavailable):
            await store.destroy(path)
    assert len(fake.seen) == 6
    assert read(bao, path) is None
    await store.close()


async def test_an_address_with_a_path_a_namespace_and_a_proxy_in_the_environment(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    store = VaultSecrets(settings(f"{fake.address}/behind", vault_token="t", vault_namespace="team"))
    fake.replies["POST"] = (200, {}, b"{}")
    path = fresh(store)
    await store.write(path, {"a": "b"}, deadline=soon())
    assert fake.asked == [(f"/behind/v1/secret/data/{path}", "team")]
    await store.close()


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.2"])
async def test_the_certificate_is_checked(fake: Fake, bao: Bao, tmp_path: Path, name: str, *, trusted: bool) -> None:
    mount = f"pki-{uuid4()}"
    assert bao.call("POST", f"sys/mounts/{mount}", {"type": "pki"})[0] == 204
    root = bao.call("POST", f"{mount}/root/generate/internal", {"common_name": "our own authority"})[1]["data"]
    bao.call("POST", f"{mount}/roles/server", {"allow_any_name": True, "max_ttl": "1h"})
    issued = bao.call("POST", f"{mount}/issue/server", {"common_name": "vault.example", "ip_sans": name})[1]["data"]
    ca, chain = tmp_path / "ca.pem", tmp_path / "chain.pem"
    ca.write_text(root["certificate"])
    chain.write_text(issued["private_key"] + "\n" + issued["certificate"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    fake.socket = context.wrap_socket(fake.socket, server_side=True, do_handshake_on_connect=False)
    fake.replies["POST"] = (200, {}, b"{}")
    store = VaultSecrets(
        settings(fake.address.replace("http:", "https:"), vault_token="t", **({"vault_cacert": ca} if trusted else {}))
    )
    if trusted and name == "127.0.0.1":
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    else:
        with pytest.raises(VaultUnavailable):
            await store.write(fresh(store), {"a": "b"}, deadline=soon())
    assert len(fake.seen) == (1 if trusted and name == "127.0.0.1" else 0)
    await store.close()


async def test_a_store_with_a_lower_limit(fake: Fake) -> None:
    store = VaultSecrets(settings(fake.address, vault_token="t"))
    error = b'{"errors":["1 error occurred: put failed due to value being too large; max 1048576 bytes"]}'
    fake.replies["POST"] = (500, {}, error)
    with pytest.raises(PayloadTooLarge):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    await store.close()


@pytest.mark.parametrize("status", [200, 204, 500])
@pytest.mark.parametrize("body", [b"[1]", b"<html>", b"", b'{"errors": [1]}', b'{"errors": null}'])
async def test_answers_that_are_not_vaults(fake: Fake, status: int, body: bytes, tmp_path: Path) -> None:
    store = VaultSecrets(settings(fake.address, vault_role_id="r"))
    fake.replies["POST"] = (status, {}, b"" if status == 204 else body)
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    await store.close()
    (tmp_path / "token").write_text("no header \u540d\n")
    store = VaultSecrets(settings(fake.address, vault_token_file=tmp_path / "token"))
    with pytest.raises(VaultUnavailable):
        await store.write(fresh(store), {"a": "b"}, deadline=soon())
    await store.close()


async def test_slow_writes_leave_the_collector_its_slots(fake: Fake) -> None:
    store = VaultSecrets(settings(fake.address, vault_token="t", vault_concurrency=1))
    fake.replies["DELETE"] = (204, {}, b"")
    writes = [asyncio.create_task(store.write(fresh(store), {"a": "b"}, deadline=soon())) for _ in range(2)]
    deadline = time.monotonic() + 5
    while not fake.seen:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await store.destroy(fresh(store))
    assert not any(write.done() for write in writes)
    fake.release.set()
    assert {type(result) for result in await asyncio.gather(*writes, return_exceptions=True)} == {VaultUnavailable}
    await store.close()


async def test_a_secret_goes_with_one_call_which_is_in_no_writes_way(fake: Fake) -> None:
    store = VaultSecrets(settings(fake.address, vault_token="t", vault_concurrency=1))
    fake.replies["POST"] = (200, {}, b"{}")
    deletes = [asyncio.create_task(store.destroy(fresh(store))) for _ in range(8)]
    deadline = time.monotonic() + 5
    while len(fake.seen) < 4:  # as many as the collector may have under way, and none is answered
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await store.write(fresh(store), {"a": "b"}, deadline=soon())
    assert not any(delete.done() for delete in deletes)
    fake.replies["DELETE"] = (204, {}, b"")
    fake.release.set()
    done = await asyncio.gather(*deletes, return_exceptions=True)
    # Four lost their answer, which is not sent again by itself; each of the others took one call.
    assert [type(result) for result in done] == [VaultUnavailable] * 4 + [type(None)] * 4
    assert [method for method, _ in fake.seen].count("DELETE") == 8
    await store.close()


async def test_a_caller_that_leaves_keeps_the_slot_until_its_call_ends(fake: Fake) -> None:
    store = VaultSecrets(settings(fake.address, vault_token="t", vault_concurrency=1))
    first = asyncio.create_task(store.write(fresh(store), {"a": "b"}, deadline=soon()))
    deadline = time.monotonic() + 5
    while not fake.seen:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    first.cancel()
    second = asyncio.create_task(store.write(fresh(store), {"a": "b"}, deadline=soon()))
    await asyncio.wait({second}, timeout=0.3)
    assert len(fake.seen) == 1
    fake.replies["POST"] = (200, {}, b"{}")
    fake.release.set()
    await second
    assert len(fake.seen) == 2
    await store.close()
