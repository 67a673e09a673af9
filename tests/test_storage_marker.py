"""The marker of the file store: an empty folder in its place, or another store, is not taken for it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from app.stores import storage_marker
from app.stores.database import Database
from app.stores.files import FileStore
from tests.support.client import Client, file_input
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_database, settings_of
from tests.support.waiting import until

MARKER = ".runs-store"


@pytest.fixture
def own(stack: Stack) -> Iterator[Stack]:
    with own_database(stack, "marker") as made:
        yield made


def storage_problem(server: Server) -> str | None:
    reasons: dict[str, str] = httpx.get(f"{server.url}/health/ready", trust_env=False).json()["reasons"]
    return reasons.get("storage")


def upload(api: Client, run_id: str) -> httpx.Response:
    body = {"run_id": run_id, "filename": "a", "content": "YQ==", "content_type": "a/b", "attachment_type": "output"}
    return api.post("/v1/run-attachments", json=body)


def test_only_the_store_with_the_databases_marker_is_used(own: Stack, tmp_path: Path) -> None:
    files, away = tmp_path / "files", tmp_path / "away"
    server = start_server(own, STORAGE_URL=files.as_uri())
    try:
        with server.client() as api:
            marker = until(lambda: (files / MARKER).is_file() and (files / MARKER).read_text(), what="the marker")
            [row] = until(lambda: own.sql("SELECT store_id FROM storage_marker"))
            assert row["store_id"] == UUID(marker)
            run = api.run(file_inputs=[file_input(b"kept")])
            api.report(run["id"], status="running")
            path = f"/v1/run-attachments/{run['input_attachment_ids'][0]}/download"
            assert api.get(path).content == b"kept"

            def refused() -> None:
                assert upload(api, run["id"]).json()["code"] == "storage_unavailable"
                assert api.get(path).json()["code"] == "storage_unavailable"
                assert api.get("/v1/runs").status_code == 200

            # An empty folder: not the file's fault, at once and for as long as it is there.
            files.rename(away)
            files.mkdir()
            refused()
            until(lambda: storage_problem(server) == "marker_missing")
            refused()
            assert not list(files.iterdir())
            # The store of another service.
            (files / MARKER).write_text(str(uuid4()))
            until(lambda: storage_problem(server) == "marker_foreign")
            refused()
            (files / MARKER).write_text("nothing of the kind")
            until(lambda: storage_problem(server) == "unreachable")
            refused()
            (files / MARKER).unlink()
            files.rmdir()
            away.rename(files)
            until(lambda: storage_problem(server) is None)
            assert api.get(path).content == b"kept"
            assert upload(api, run["id"]).status_code == 201
            assert (files / MARKER).read_text() == marker
            assert {file.name for file in files.glob(f"{MARKER}*")} == {MARKER}
    finally:
        server.app.stop()
    # A database that holds no id, as after a restore from before, with a folder that lacks all of its files.
    own.sql("DELETE FROM storage_marker")
    empty = tmp_path / "empty"
    settings = settings_of(own, STORAGE_URL=empty.as_uri())

    async def problem() -> str | None:
        database, files = Database(settings), FileStore(settings)
        try:
            return await storage_marker.problem(database, files)
        finally:
            await files.close()
            database.close()

    assert asyncio.run(problem()) == storage_marker.MISSING
    assert not list(empty.iterdir())
    assert not own.sql("SELECT FROM storage_marker")
