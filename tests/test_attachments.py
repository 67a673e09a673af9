"""Files of runs: uploads that a retry overtakes, downloads of any name and range, URLs without a key, expiry."""

import asyncio
import base64
import hmac
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest
from pydantic import SecretStr

from app.config import Settings
from app.runs.attachments import expire_attachments
from app.stores.database import Database
from dev.stack import Postgres
from tests.support.client import Client, file_input
from tests.support.seaweedfs import SeaweedFS
from tests.support.server import Server, start_server
from tests.support.stack import Stack, migrate
from tests.support.waiting import until

SERVER_KEY = "a key of the tests, longer than 32 characters"
HOUR = timedelta(hours=1)


def output(run_id: str, content: bytes = b"result", **more: object) -> dict[str, object]:
    return {
        "run_id": run_id,
        "filename": "out.txt",
        "content": base64.b64encode(content).decode(),
        "content_type": "text/plain",
        "attachment_type": "output",
    } | more


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    return problem


def running(api: Client, **options: object) -> str:
    run_id = str(api.run(**options)["id"])
    api.report(run_id, status="running")
    return run_id


def ago(age: timedelta = HOUR) -> str:
    return (datetime.now(UTC) - age).isoformat()


class TestHandIn:
    def test_what_was_sent_is_shown_and_served(self, api: Client, stack: Stack) -> None:
        run_id = running(api)
        later = datetime.now(UTC) + HOUR
        created = api.json_of(
            api.post(
                "/v1/run-attachments",
                json=output(
                    run_id,
                    b"a,b\n",
                    filename="r.csv",
                    content_type="text/csv; charset=utf-8",
                    target_path=r"C:\out\r.csv",
                    cleanup_imports_after_run=True,
                    expires_at=later.isoformat(),
                ),
            ),
            201,
        )
        assert created["storage_path"] in stack.blobs()
        assert datetime.fromisoformat(created.pop("expires_at")) == later
        assert {name: created[name] for name in created if name not in {"id", "created_at", "storage_path"}} == {
            "run_id": run_id,
            "user_id": None,
            "organization_id": api.organization,
            "attachment_type": "output",
            "filename": "r.csv",
            "content_type": "text/csv; charset=utf-8",
            "size_bytes": 4,
            "target_path": r"C:\out\r.csv",
            "cleanup_imports_after_run": True,
            "attempt": None,
        }
        path = f"/v1/run-attachments/{created['id']}"
        assert api.json_of(api.get(path))["id"] == created["id"]
        assert api.get_run(run_id)["output_attachment_ids"] == [created["id"]]
        reply = api.get(f"{path}/download")
        assert (reply.status_code, reply.content) == (200, b"a,b\n")
        assert reply.headers["content-type"] == "text/csv; charset=utf-8"
        assert reply.headers["content-length"] == "4"
        assert reply.headers["accept-ranges"] == "bytes"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"

    def test_an_empty_file(self, api: Client) -> None:
        made = api.upload(running(api), b"")
        reply = api.get(f"/v1/run-attachments/{made['id']}/download")
        assert (reply.status_code, reply.content, reply.headers["content-length"]) == (200, b"", "0")

    @pytest.mark.parametrize("status", ["scheduling", "success", "error", "cancelled"])
    def test_only_a_running_run_accepts_outputs(self, api: Client, stack: Stack, status: str) -> None:
        run_id = str(api.run()["id"]) if status == "scheduling" else str(api.finished(status)["id"])
        before = stack.blobs(api.organization) if status != "scheduling" else set()
        problem = refused(api.post("/v1/run-attachments", json=output(run_id)), 409, "invalid_transition")
        assert status in problem["detail"]
        assert stack.blobs(api.organization) == before

    def test_inputs_are_not_added_here(self, api: Client) -> None:
        reply = api.post("/v1/run-attachments", json=output(running(api), attachment_type="input"))
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", "attachment_type"]

    def test_an_unknown_run_and_a_foreign_one_are_the_same(self, api: Client, foreign: Client) -> None:
        api.headers["X-Request-ID"] = "the-same"  # which a refusal names
        replies = [api.post("/v1/run-attachments", json=output(run_id)) for run_id in (str(uuid4()), running(foreign))]
        assert refused(replies[0], 404, "run_not_found") == refused(replies[1], 404, "run_not_found")

    @pytest.mark.parametrize("filename", ["a\r\nb", "a\x00b", "a/b", "a\\b", "..", " ", "a\u202etxt.exe", "é" * 128])
    def test_unsafe_names_are_refused(self, api: Client, filename: str) -> None:
        reply = api.post("/v1/run-attachments", json=output(str(uuid4()), filename=filename))
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", "filename"]

    @pytest.mark.parametrize("content_type", ["text", "text/html\r\nX: y", "text/html\n", "té/xt", "text/plain; a"])
    def test_what_is_no_media_type_is_refused(self, api: Client, content_type: str) -> None:
        reply = api.post("/v1/run-attachments", json=output(str(uuid4()), content_type=content_type))
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", "content_type"]

    def test_a_resend_gets_the_first_reply(self, api: Client, stack: Stack) -> None:
        run_id = running(api)
        body, headers = output(run_id), {"Idempotency-Key": secrets.token_hex(8)}
        first = api.post("/v1/run-attachments", json=body, headers=headers)
        api.report(run_id, status="success")  # a resend is not refused by what happened since
        second = api.post("/v1/run-attachments", json=body, headers=headers)
        assert (first.status_code, second.status_code) == (201, 201)
        assert second.content == first.content
        assert second.headers["idempotency-status"] == "replayed"
        assert len(stack.blobs(f"{api.organization}/{run_id}")) == 1
        other = api.post("/v1/run-attachments", json=body | {"filename": "other.txt"}, headers=headers)
        assert other.status_code == 422
        assert other.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    seaweedfs = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    yield seaweedfs
    seaweedfs.stop()


@pytest.fixture(scope="module")
def objects(stack: Stack, seaweedfs: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose files are in an S3 store; with a database of its own, because a deletion list is for one store."""
    folder = tmp_path_factory.mktemp("objects")
    with Postgres(folder, fsync=False) as postgres:
        migrate(postgres)
        server = start_server(
            Stack(folder, postgres, stack.bao),
            STORAGE_URL="s3://files",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{seaweedfs.port}",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="secret",
            AWS_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
        )
        with server.client() as client:
            # Its parts find each other one by one; a put needs all of them, and makes the bucket.
            body = output(running(client))
            until(lambda: client.post("/v1/run-attachments", json=body).status_code == 201, 30, what="S3 is up")
        yield server
        server.app.stop()


class TestOvertaken:
    """The run changes between the check and the switch of an upload, which waits for a frozen store."""

    @staticmethod
    def retried(api: Client, run_id: str) -> None:
        api.report(run_id, status="error")
        api.json_of(api.retry(run_id))
        api.report(run_id, status="running")

    @staticmethod
    def ended(api: Client, run_id: str) -> None:
        api.report(run_id, status="success")

    @staticmethod
    def deleted(api: Client, run_id: str) -> None:
        assert api.delete(f"/v1/runs/{run_id}").status_code == 204

    @pytest.mark.parametrize(
        ("overtake", "status", "code"),
        [
            (retried, 409, "attempt_superseded"),
            (ended, 409, "invalid_transition"),
            (deleted, 404, "run_not_found"),
        ],
    )
    def test_it_is_refused_and_its_bytes_stay_listed(
        self, objects: Server, seaweedfs: SeaweedFS, overtake: Callable[[Client, str], None], status: int, code: str
    ) -> None:
        with objects.client() as api, ThreadPoolExecutor(1) as uploads:
            run_id = running(api)

            def listed() -> list[dict[str, Any]]:
                return objects.stack.sql(
                    "SELECT due_at > now() AS later FROM deletions WHERE name LIKE $1", f"%/{run_id}/%"
                )

            seaweedfs.freeze()
            try:
                upload = uploads.submit(api.post, "/v1/run-attachments", json=output(run_id))
                until(listed, what="the upload is being staged")
                overtake(api, run_id)
                assert not upload.done()
            finally:
                seaweedfs.thaw()
            refused(upload.result(), status, code)
            assert listed() == [{"later": True}]
            assert objects.stack.sql("SELECT 1 FROM run_attachments WHERE run_id = $1", run_id) == []

    def test_staged_bytes_that_are_being_deleted_are_not_used(self, objects: Server, seaweedfs: SeaweedFS) -> None:
        """The upload was stalled for longer than the grace time."""
        with objects.client() as api, ThreadPoolExecutor(1) as uploads:
            run_id = running(api)
            condemn = "UPDATE deletions SET condemned_at = now() WHERE name LIKE $1 RETURNING name"
            seaweedfs.freeze()
            try:
                upload = uploads.submit(api.post, "/v1/run-attachments", json=output(run_id))
                until(lambda: objects.stack.sql(condemn, f"%/{run_id}/%"), what="the upload is being staged")
            finally:
                seaweedfs.thaw()
            refused(upload.result(), 503, "storage_unavailable")
            assert api.get_run(run_id)["output_attachment_ids"] == []

    def test_it_waits_for_whoever_changes_the_run(self, api: Client, stack: Stack) -> None:
        run_id = running(api)

        async def end_the_run(upload: Callable[[], httpx.Response]) -> httpx.Response:
            connection = await asyncpg.connect(stack.postgres.url, timeout=10)
            try:
                async with connection.transaction():
                    await connection.execute("UPDATE runs SET status = 'error', ended_at = now() WHERE id = $1", run_id)
                    reply = asyncio.create_task(asyncio.to_thread(upload))
                    waits = "SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))"
                    while not await connection.fetch(waits):
                        assert not reply.done(), reply.result().text
                        await asyncio.sleep(0.01)
                return await reply
            finally:
                await connection.close()

        reply = asyncio.run(end_the_run(lambda: api.post("/v1/run-attachments", json=output(run_id))))
        refused(reply, 409, "invalid_transition")


def test_a_store_that_is_down_is_503_and_nothing_changes(objects: Server, seaweedfs: SeaweedFS) -> None:
    with objects.client() as api, ThreadPoolExecutor(2) as callers:
        run_id = running(api)
        made = api.upload(run_id)
        seaweedfs.freeze()
        try:
            calls = [
                callers.submit(api.post, "/v1/run-attachments", json=output(run_id)),
                callers.submit(api.get, f"/v1/run-attachments/{made['id']}/download"),
            ]
            replies = [call.result() for call in calls]
        finally:
            seaweedfs.thaw()
        for reply in replies:
            refused(reply, 503, "storage_unavailable")
            assert int(reply.headers["retry-after"]) > 0
        assert api.get_run(run_id)["output_attachment_ids"] == [made["id"]]


def test_an_object_store_signs_its_own_urls(objects: Server, seaweedfs: SeaweedFS) -> None:
    with objects.client() as api:
        made = api.upload(running(api), b"from S3", 'a "b";é.txt')
        run = api.run(file_inputs=[file_input(b"%PDF", "é.pdf")])
        for attachment_id, content, media_type in (
            (made["id"], b"from S3", "text/plain"),
            (run["input_attachment_ids"][0], b"%PDF", "application/pdf"),
        ):
            path = f"/v1/run-attachments/{attachment_id}"
            signed = api.json_of(api.get(f"{path}/download-url", params={"expires_in": 60}))
            assert signed["expires_in"] == 60
            assert signed["url"].startswith(f"http://127.0.0.1:{seaweedfs.port}/")
            ours, theirs = api.get(f"{path}/download"), httpx.get(signed["url"], trust_env=False, verify=False)
            assert ours.content == theirs.content == content
            assert ours.headers["content-type"] == theirs.headers["content-type"] == media_type
            assert ours.headers["content-disposition"] == theirs.headers["content-disposition"]


class TestDownload:
    @pytest.mark.parametrize(
        ("filename", "plain"),
        [
            ("report.pdf", "report.pdf"),
            ('a"b.txt', "a_b.txt"),
            ("a;b=c, d.txt", "a_b=c, d.txt"),
            ("naïve ☃ 報告.pdf", "na_ve _ __.pdf"),
            ("100%41.txt", "100_41.txt"),
            ("'a'*<b>|?:.html", "_a___b____.html"),
            ("🦆" * 63, "_" * 63),
            (" .a ", " .a "),
        ],
    )
    def test_any_name_is_a_safe_header(self, api: Client, filename: str, plain: str) -> None:
        made = api.upload(running(api), b"x", filename)
        assert made["filename"] == filename
        header = api.get(f"/v1/run-attachments/{made['id']}/download").headers["content-disposition"]
        # RFC 6266 with RFC 8187's alphabet: nothing else may be in it.
        match = re.fullmatch(
            r"attachment; filename=\"([^\"\\%;]*)\"; filename\*=UTF-8''((?:[A-Za-z0-9!#$&+.^_`|~-]|%[0-9A-F]{2})*)",
            header,
        )
        assert match is not None, header
        assert match[1] == plain
        assert unquote(match[2], errors="strict") == filename

    def test_a_page_is_never_shown(self, api: Client) -> None:
        page = output(running(api), b"<script>", filename="a.html", content_type="text/html")
        made = api.json_of(api.post("/v1/run-attachments", json=page), 201)
        reply = api.get(f"/v1/run-attachments/{made['id']}/download")
        assert reply.headers["content-type"] == "text/html"
        assert reply.headers["content-disposition"].startswith("attachment;")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-security-policy"] == "sandbox"

    @pytest.mark.parametrize(
        "content_type",
        [
            *(
                "text/javascript",
                "application/javascript",
                "TEXT/JavaScript; charset=utf-8",
                "application/x-javascript",
            ),
            *("text/ecmascript", "application/x-ecmascript", "text/javascript1.5", "text/jscript", "text/livescript"),
            *("text/css", "application/wasm"),
        ],
    )
    def test_a_file_is_no_script_and_no_style_of_our_own_pages(self, api: Client, content_type: str) -> None:
        """Their policies allow what comes from our own origin."""
        script = output(running(api), b"alert(1)", filename="a.js", content_type=content_type)
        made = api.json_of(api.post("/v1/run-attachments", json=script), 201)
        assert made["content_type"] == content_type
        signed = api.get(f"/v1/run-attachments/{made['id']}/download-url").json()["url"]
        for url in (f"/v1/run-attachments/{made['id']}/download", signed):
            for headers in ({}, {"Range": "bytes=0-1"}):
                reply = api.get(url, headers=headers)
                assert reply.headers["content-type"] == "application/octet-stream"
                assert reply.headers["content-security-policy"] == "sandbox"

    @pytest.mark.parametrize(
        ("asked", "sent"),
        [
            ("bytes=0-0", "0-0"),
            ("bytes=2-5", "2-5"),
            ("BYTES=2-5", "2-5"),
            ("bytes=4-", "4-9"),
            ("bytes=0-999999999999999999999999", "0-9"),
            ("bytes=-3", "7-9"),
            ("bytes=-999999999999999999999999", "0-9"),
            ("bytes=9-9", "9-9"),
        ],
    )
    def test_one_range(self, api: Client, asked: str, sent: str) -> None:
        made = api.upload(running(api), b"0123456789")
        reply = api.get(f"/v1/run-attachments/{made['id']}/download", headers={"Range": asked})
        first, last = map(int, sent.split("-"))
        assert (reply.status_code, reply.content) == (206, b"0123456789"[first : last + 1])
        assert reply.headers["content-range"] == f"bytes {sent}/10"
        assert reply.headers["content-length"] == str(last + 1 - first)

    @pytest.mark.parametrize(
        "asked",
        ["bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,3-4", "bytes=a-b", "lines=0-1", "bytes 0-1", "bytes=0-1-2", "x"],
    )
    def test_what_is_not_one_range_is_ignored(self, api: Client, asked: str) -> None:
        made = api.upload(running(api), b"0123456789")
        reply = api.get(f"/v1/run-attachments/{made['id']}/download", headers={"Range": asked})
        assert (reply.status_code, reply.content) == (200, b"0123456789")
        assert "content-range" not in reply.headers

    @pytest.mark.parametrize(
        ("content", "asked"),
        [
            (b"0123456789", "bytes=10-"),
            (b"0123456789", "bytes=10-20"),
            (b"0123456789", "bytes=999999999999999999999-"),
            (b"0123456789", "bytes=-0"),
            (b"", "bytes=0-"),
            (b"", "bytes=-0"),
        ],
    )
    def test_a_range_outside_the_file(self, api: Client, content: bytes, asked: str) -> None:
        made = api.upload(running(api), content)
        reply = api.get(f"/v1/run-attachments/{made['id']}/download", headers={"Range": asked})
        refused(reply, 416, "range_not_satisfiable")
        assert reply.headers["content-range"] == f"bytes */{len(content)}"

    def test_the_end_of_an_empty_file_is_all_of_it(self, api: Client) -> None:
        made = api.upload(running(api), b"")
        reply = api.get(f"/v1/run-attachments/{made['id']}/download", headers={"Range": "bytes=-5"})
        assert (reply.status_code, reply.content) == (200, b"")

    def test_a_download_goes_on_only_with_the_same_file(self, api: Client) -> None:
        run_id = running(api)
        one, other = (api.upload(run_id, b"0123456789") for _ in range(2))
        path = f"/v1/run-attachments/{one['id']}/download"
        etag = api.get(path).headers["etag"]
        assert re.fullmatch(r'"[^"]+"', etag)
        strange = api.get(f"/v1/run-attachments/{other['id']}/download").headers["etag"]
        for validator, status in (
            (etag, 206),
            (strange, 200),
            (f"W/{etag}", 200),
            ("Tue, 01 Jan 2030 00:00:00 GMT", 200),
        ):
            reply = api.get(path, headers={"Range": "bytes=5-", "If-Range": validator})
            assert reply.status_code == status, validator

    def test_many_slow_readers_hold_no_connection_to_the_database(self, stack: Stack) -> None:
        server = start_server(stack, DATABASE_POOL_SIZE=2)
        try:
            with server.client() as api, ExitStack() as readers:
                run_id = running(api)
                content = random.Random(1).randbytes(24 * 2**20)  # far more than the sockets' buffers
                made = api.upload(run_id, content)
                path = f"/v1/run-attachments/{made['id']}/download"
                slow = [readers.enter_context(api.stream("GET", path)) for _ in range(4)]
                assert [reply.status_code for reply in slow] == [200] * 4
                assert api.get_run(run_id)["output_attachment_ids"] == [made["id"]]
                assert b"".join(slow[0].iter_bytes()) == content
                # What is deleted meanwhile ends early, and the reader can tell.
                assert api.delete(f"/v1/run-attachments/{made['id']}").status_code == 204
                until(lambda: made["storage_path"] not in stack.blobs(api.organization), what="the bytes are gone")
                with pytest.raises(httpx.RemoteProtocolError):
                    slow[1].read()
        finally:
            server.app.stop()


def signed(attachment_id: str, expires: int | str, key: str = SERVER_KEY) -> str:
    mac = hmac.new(key.encode(), f"download\n{attachment_id}\n{expires}".encode(), "sha256").hexdigest()
    return f"/downloads/{attachment_id}?expires={expires}&signature={mac}"


class TestUrl:
    def url(self, api: Client, attachment_id: str, **params: int) -> str:
        reply = api.json_of(api.get(f"/v1/run-attachments/{attachment_id}/download-url", params=params))
        assert reply["expires_in"] == params.get("expires_in", 300)
        return str(reply["url"])

    def test_it_works_without_a_key(self, api: Client, server: Server) -> None:
        made = api.upload(running(api), b"0123456789", "é.txt")
        for params in ({}, {"expires_in": 10}, {"expires_in": 3600}):
            before = int(time.time())
            url = self.url(api, made["id"], **params)
            assert url.startswith(f"{server.url}/downloads/{made['id']}?")
            expires = int(parse_qs(urlsplit(url).query)["expires"][0])
            assert before <= expires - params.get("expires_in", 300) <= time.time()
            keyless = httpx.get(url, trust_env=False, verify=False)
            own = api.get(f"/v1/run-attachments/{made['id']}/download")
            assert (keyless.status_code, keyless.content) == (200, b"0123456789")
            for name in ("content-disposition", "content-type", "etag", "x-content-type-options", "cache-control"):
                assert keyless.headers[name] == own.headers[name]
            part = httpx.get(url, headers={"Range": "bytes=-2"}, trust_env=False, verify=False)
            assert (part.status_code, part.content) == (206, b"89")

    @pytest.mark.parametrize("expires_in", ["9", "3601", "-1", "x", "1e3", "60.5", ""])
    def test_its_life_has_limits(self, api: Client, expires_in: str) -> None:
        made = api.upload(running(api))
        reply = api.get(f"/v1/run-attachments/{made['id']}/download-url", params={"expires_in": expires_in})
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["query", "expires_in"]

    def test_whatever_is_wrong_with_it_looks_the_same(self, api: Client, server: Server) -> None:
        run_id = running(api)
        one, other = (str(api.upload(run_id)["id"]) for _ in range(2))
        later, past = int(time.time()) + 60, int(time.time()) - 1
        good = signed(one, later)
        signature = good.rpartition("=")[2]
        same = {"X-Request-ID": "the-same"}  # which a refusal names
        with httpx.Client(base_url=server.url, trust_env=False, verify=False, headers=same) as anyone:
            assert anyone.get(good).status_code == 200
            bad = [
                signed(one, past),
                signed(str(uuid4()), later),
                signed(one, later, "some other key, longer than 32 characters"),
                good.replace(one, other),
                good.replace(one, one.upper()),
                good.replace(str(later), str(later + 1)),
                good.replace(str(later), f"+{later}"),
                good[:-1],
                good[:-1] + ("0" if good[-1] != "0" else "1"),
                good.replace(signature, signature.upper()),
                good.replace(signature, "é" * 64),
                good.replace(signature, "%00%ff"),
                good + "0",
                good.partition("&")[0],
                good.replace("expires", "expire"),
                f"/downloads/{one}",
            ]
            replies = [anyone.get(url) for url in bad]
            problems = [refused(reply, 404, "attachment_not_found") for reply in replies]
            assert all(problem == problems[0] for problem in problems)
            assert anyone.post(good).status_code == 405

    def test_a_file_that_the_store_has_lost_is_gone_and_no_wrong_id(
        self, api: Client, stack: Stack, server: Server
    ) -> None:
        run_id = running(api)
        made = api.upload(run_id)
        url = self.url(api, made["id"])
        (stack.files / made["storage_path"]).unlink()
        path = f"/v1/run-attachments/{made['id']}"
        for reply in (api.get(f"{path}/download"), api.head(f"{path}/download"), httpx.get(url, trust_env=False)):
            assert reply.status_code == 410
        refused(api.get(f"{path}/download"), 410, "attachment_bytes_missing")
        assert api.get(path).status_code == 200
        line = f'"event":"attachment_bytes_missing","attachment_id":"{made["id"]}"'
        until(lambda: line in server.app.log.read_text(), what="the warning")
        assert api.delete(path).status_code == 204
        refused(api.get(f"{path}/download"), 404, "attachment_not_found")

    def test_it_ends_with_the_file(self, api: Client) -> None:
        run_id = running(api)
        urls = {}
        for end in ("deleted", "expired"):
            made = api.upload(run_id)
            urls[end] = self.url(api, made["id"])
            assert httpx.get(urls[end], trust_env=False, verify=False).status_code == 200
            path = f"/v1/run-attachments/{made['id']}"
            if end == "deleted":
                assert api.delete(path).status_code == 204
            else:
                api.json_of(api.put(path, json={"expires_at": ago()}))
            refused(httpx.get(urls[end], trust_env=False, verify=False), 404, "attachment_not_found")
            refused(api.get(f"{path}/download-url"), 404, "attachment_not_found")

    def test_keys_rotate_and_the_base_can_be_set(self, stack: Stack, api: Client) -> None:
        made = api.upload(running(api))
        old = urlsplit(self.url(api, made["id"]))
        rotated = start_server(
            stack,
            SERVER_KEY="the next key of the tests, also long",
            SERVER_KEY_PREVIOUS=SERVER_KEY,
            PUBLIC_URL="https://files.example/base/",
        )
        try:
            assert httpx.get(f"{rotated.url}{old.path}?{old.query}", trust_env=False, verify=False).status_code == 200
            key = api.headers["Authorization"].removeprefix("Bearer ")
            with rotated.client(api.organization, key=key) as client:
                new = self.url(client, made["id"])
            assert new.startswith(f"https://files.example/base/downloads/{made['id']}?")
            own = new.removeprefix("https://files.example/base")
            assert httpx.get(f"{rotated.url}{own}", trust_env=False, verify=False).status_code == 200
            refused(api.get(own), 404, "attachment_not_found")  # signed by a key that the first server does not know
        finally:
            rotated.app.stop()


class TestList:
    def test_newest_first_by_page_and_filter(self, api: Client, foreign: Client) -> None:
        foreign.upload(running(foreign))
        inputs = [file_input(name.encode(), name) for name in ("1", "2", "3")]
        first, second = running(api, file_inputs=inputs), running(api)
        made = [api.upload(run_id)["id"] for run_id in (first, second, first)]

        def listed(**params: object) -> tuple[list[str], int]:
            reply = api.json_of(api.get("/v1/run-attachments", params=params))  # type: ignore[arg-type]
            assert (reply["skip"], reply["limit"]) == (params.get("skip", 0), params.get("limit", 100))
            return [item["id"] for item in reply["items"]], reply["total"]

        given = api.get_run(first)["input_attachment_ids"]
        assert [api.get(f"/v1/run-attachments/{one}").json()["filename"] for one in given] == ["1", "2", "3"]
        everything = [*reversed(made), *reversed(given)]
        assert listed() == (everything, 6)
        assert listed(skip=1, limit=2) == (everything[1:3], 6)
        assert listed(skip=6) == ([], 6)
        assert listed(attachment_type="output") == ([made[2], made[1], made[0]], 3)
        assert listed(run_id=first, attachment_type="output") == ([made[2], made[0]], 2)
        assert listed(run_id=first, attachment_type="input") == (everything[3:], 3)
        assert listed(run_id=second) == ([made[1]], 1)
        assert listed(run_id=str(uuid4())) == ([], 0)

    @pytest.mark.parametrize(
        "params", [{"attachment_type": "x"}, {"run_id": "x"}, {"skip": -1}, {"limit": 0}, {"limit": 1001}]
    )
    def test_bad_filters_are_refused(self, api: Client, params: dict[str, str | int]) -> None:
        reply = api.get("/v1/run-attachments", params=params)
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["query", *params]


def test_unknown_and_foreign_attachments_get_the_same_reply(api: Client, foreign: Client, stack: Stack) -> None:
    api.headers["X-Request-ID"] = "the-same"  # which a refusal names
    theirs = foreign.upload(running(foreign))
    bodies = set()
    for attachment_id in (theirs["id"], str(uuid4())):
        path = f"/v1/run-attachments/{attachment_id}"
        for reply in (
            api.get(path),
            api.put(path, json={"expires_at": ago()}),
            api.delete(path),
            api.get(f"{path}/download"),
            api.get(f"{path}/download-url"),
        ):
            refused(reply, 404, "attachment_not_found")
            bodies.add(reply.content)
    assert len(bodies) == 1
    assert foreign.json_of(foreign.get(f"/v1/run-attachments/{theirs['id']}")) == theirs
    assert theirs["storage_path"] in stack.blobs()


def look_for_expired(stack: Stack, ahead: timedelta = timedelta(0)) -> None:
    """One round of what the background task does, with the database's clock read that much later."""

    async def collect() -> None:
        database = Database(
            Settings(
                database_url=SecretStr(stack.postgres.app_url),
                vault_addr=stack.bao.address,
                vault_token=SecretStr("unused"),
                storage_url=stack.files.as_uri(),
                server_key=SecretStr(SERVER_KEY),
            )
        )
        try:
            await expire_attachments(database, ahead=ahead)
        finally:
            database.close()

    asyncio.run(collect())


class TestExpiry:
    def test_absent_keeps_and_null_removes(self, api: Client) -> None:
        path = f"/v1/run-attachments/{api.upload(running(api))['id']}"
        before = api.json_of(api.get(path))
        later = (datetime.now(UTC) + HOUR).replace(microsecond=5)
        after = api.json_of(api.put(path, json={"expires_at": later.isoformat()}))
        assert datetime.fromisoformat(after["expires_at"]) == later
        assert after | {"expires_at": None} == before
        for unchanged in (api.put(path, json={}), api.put(path), api.put(path, json={"filename": "x"}), api.get(path)):
            assert api.json_of(unchanged) == after
        assert api.json_of(api.put(path, json={"expires_at": None})) == before

    @pytest.mark.parametrize(
        "value", [5, "tomorrow", "2026-01-31", True, "2026-13-01T00:00:00Z", "99999-01-01T00:00:00Z"]
    )
    def test_what_is_no_time_is_refused(self, api: Client, value: object) -> None:
        path = f"/v1/run-attachments/{api.upload(running(api))['id']}"
        reply = api.put(path, json={"expires_at": value})
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == ["body", "expires_at"]

    def test_an_output_is_gone_at_once_and_its_bytes_soon(self, api: Client, stack: Stack) -> None:
        run_id = running(api)
        kept, gone = api.upload(run_id), api.upload(run_id)
        path = f"/v1/run-attachments/{gone['id']}"
        assert api.json_of(api.put(path, json={"expires_at": ago()}))["id"] == gone["id"]
        for reply in (
            api.get(path),
            api.get(f"{path}/download"),
            api.put(path, json={"expires_at": None}),
            api.delete(path),
        ):
            refused(reply, 404, "attachment_not_found")
        listed = api.json_of(api.get("/v1/run-attachments", params={"run_id": run_id}))
        assert ([item["id"] for item in listed["items"]], listed["total"]) == ([kept["id"]], 1)
        until(lambda: stack.blobs(api.organization) == {kept["storage_path"]}, what="the expired bytes are gone")
        assert api.get_run(run_id)["output_attachment_ids"] == [kept["id"]]

    def test_the_time_comes_by_itself(self, api: Client, stack: Stack) -> None:
        run_id = running(api)
        soon, late = datetime.now(UTC) + HOUR, datetime.now(UTC) + 3 * HOUR
        made = [
            api.json_of(api.post("/v1/run-attachments", json=output(run_id, expires_at=end.isoformat())), 201)
            for end in (soon, late)
        ]
        look_for_expired(stack)
        assert api.get_run(run_id)["output_attachment_ids"] == [one["id"] for one in made]
        look_for_expired(stack, ahead=2 * HOUR)
        assert api.get_run(run_id)["output_attachment_ids"] == [made[1]["id"]]
        until(lambda: stack.blobs(api.organization) == {made[1]["storage_path"]}, what="the expired bytes are gone")

    def test_an_active_run_keeps_its_input_until_it_ends(self, api: Client, stack: Stack) -> None:
        run = api.run(file_inputs=[file_input(b"hello")])
        [attachment_id] = run["input_attachment_ids"]
        path = f"/v1/run-attachments/{attachment_id}"
        [blob] = stack.blobs(api.organization)
        expired = api.json_of(api.put(path, json={"expires_at": ago()}))
        refused(api.get(f"{path}/download"), 404, "attachment_not_found")
        look_for_expired(stack)
        assert api.json_of(api.get(path)) == expired
        assert stack.sql("SELECT 1 FROM deletions WHERE name = $1", blob) == []

        # Kept after all: the bytes are still there.
        api.json_of(api.put(path, json={"expires_at": None}))
        assert api.get(f"{path}/download").content == b"hello"

        api.json_of(api.put(path, json={"expires_at": ago()}))
        api.report(run["id"], status="cancelled")
        until(lambda: not stack.blobs(api.organization), what="the expired bytes are gone")
        gone = api.json_of(api.get(path))
        assert gone["storage_path"] == ""
        assert api.get_run(run["id"])["input_attachment_ids"] == [attachment_id]
        refused(api.get(f"{path}/download"), 404, "attachment_not_found")
        refused(api.put(path, json={"expires_at": None}), 409, "input_attachments_expired")
        assert api.json_of(api.put(path, json={})) == gone
        refused(api.retry(run["id"]), 409, "input_attachments_expired")
        # Without the row nothing is missing any more.
        assert api.delete(path).status_code == 204
        assert api.json_of(api.retry(run["id"]))["input_attachment_ids"] == []


class TestDelete:
    def test_the_row_goes_at_once_and_the_bytes_soon(self, api: Client, stack: Stack) -> None:
        run = api.finished(file_inputs=[file_input()])
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        for attachment_id in (*run["input_attachment_ids"], *run["output_attachment_ids"]):
            path = f"/v1/run-attachments/{attachment_id}"
            reply = api.delete(path)
            assert (reply.status_code, reply.content) == (204, b"")
            refused(api.get(path), 404, "attachment_not_found")
            refused(api.get(f"{path}/download"), 404, "attachment_not_found")
            refused(api.delete(path), 404, "attachment_not_found")
        after = api.get_run(run["id"])
        assert (after["input_attachment_ids"], after["output_attachment_ids"]) == ([], [])
        until(lambda: not stack.blobs(api.organization), what="the bytes are gone")
        made = api.upload(running(api))
        for status in (None, "replayed"):
            reply = api.delete(f"/v1/run-attachments/{made['id']}", headers=headers)
            assert (reply.status_code, reply.headers.get("idempotency-status")) == (204, status)

    def test_also_an_input_of_an_active_run(self, api: Client, stack: Stack) -> None:
        run = api.run(file_inputs=[file_input(filename="wrong.txt"), file_input(filename="right.txt")])
        wrong, right = run["input_attachment_ids"]
        assert api.delete(f"/v1/run-attachments/{wrong}").status_code == 204
        assert api.get_run(run["id"])["input_attachment_ids"] == [right]
        until(lambda: len(stack.blobs(api.organization)) == 1, what="the bytes are gone")

    def test_against_a_retry_nothing_is_lost_or_half_done(self, api: Client, stack: Stack) -> None:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(10):
                run = api.finished(file_inputs=[file_input()])
                paths = [
                    f"/v1/run-attachments/{one}"
                    for one in (*run["input_attachment_ids"], *run["output_attachment_ids"])
                ]
                deletes = [threads.submit(api.delete, path) for path in paths]
                retried = threads.submit(api.retry, run["id"])
                assert {one.result().status_code for one in deletes} <= {204, 404}
                after = api.json_of(retried.result())
                assert after["output_attachment_ids"] == []
                assert deletes[0].result().status_code == 204  # a retry that keeps the input does not remove it
        until(lambda: not stack.blobs(api.organization), what="the bytes are gone")
