"""Files in a real folder and in a real S3 server (SeaweedFS)."""

import asyncio
import errno
import logging
import os
import resource
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import SecretStr

from app.config import MIB, Settings
from app.errors import StorageUnavailable
from app.stores.disks import REMEMBERED_SECONDS, Disk
from app.stores.files import CHUNK, FileMissingError, FileStore
from tests.support.seaweedfs import SeaweedFS

pytestmark = pytest.mark.anyio

RUN = UUID(int=7)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def settings(storage_url: str, **others: Any) -> Settings:
    return Settings(
        database_url=SecretStr("postgresql://unused"),
        vault_addr="http://127.0.0.1:1",
        vault_token=SecretStr("unused"),
        storage_url=storage_url,
        server_key=SecretStr("k" * 32),
        **others,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "not there yet" / "files"


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[FileStore]:
    store = FileStore(settings(folder.as_uri()))
    yield store
    await store.close()


def soon() -> float:
    return time.monotonic() + 60


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def read(store: FileStore, key: str, start: int, end: int) -> bytes:
    return b"".join([chunk async for chunk in await store.stream(key, start, end)])


async def test_folder_roundtrip(store: FileStore, folder: Path) -> None:
    key = store.new_key("org", RUN)
    assert key.startswith(f"org/{RUN}/")
    assert key != store.new_key("org", RUN)
    data = os.urandom(2 * CHUNK + 5)
    await store.put(key, data, deadline=soon(), attributes={"Content-Type": "text/plain"})
    assert (folder / key).read_bytes() == data
    for start, end in ((0, len(data)), (0, 0), (1, 2), (CHUNK - 1, CHUNK + 1), (len(data) - 1, len(data))):
        assert await read(store, key, start, end) == data[start:end]
    assert [len(chunk) async for chunk in await store.stream(key, 0, len(data))] == [CHUNK, CHUNK, 5]
    assert await store.signed_url(key, 60) is None
    assert await store.ready()
    empty = store.new_key("org", RUN)
    await store.put(empty, b"", deadline=soon())
    assert await read(store, empty, 0, 0) == b""


async def test_organization_cannot_leave_its_folder(store: FileStore) -> None:
    for organization in ("", "a/b", "..", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="organization"):
            store.new_key(organization, RUN)


async def test_nothing_is_put_after_the_deadline(store: FileStore, folder: Path) -> None:
    with pytest.raises(StorageUnavailable):
        await store.put(store.new_key("org", RUN), b"x", deadline=time.monotonic())
    assert names(folder) == []


async def test_missing_and_short_files(store: FileStore) -> None:
    key = store.new_key("org", RUN)
    with pytest.raises(FileMissingError):
        await store.stream(key, 0, 1)
    await store.put(key, b"x" * CHUNK, deadline=soon())
    with pytest.raises(FileMissingError):
        await store.stream(key, CHUNK - 1, CHUNK + 1)
    chunks = await store.stream(key, 0, CHUNK + 1)
    await anext(chunks)
    with pytest.raises((FileMissingError, StorageUnavailable)):
        await anext(chunks)


async def test_delete_takes_empty_folders(store: FileStore, folder: Path) -> None:
    kept, gone, never = (store.new_key("org", RUN) for _ in range(3))
    await store.put(kept, b"kept", deadline=soon())
    await store.put(gone, b"gone", deadline=soon())
    for keys in ([gone, never], [gone], [store.new_key("other", uuid4())]):
        assert await store.delete(keys) == set(keys)
    assert files(folder) == [folder / kept]
    assert await store.delete([kept]) == {kept}
    assert names(folder) == []


async def test_puts_and_deletes_in_one_run_at_once(store: FileStore, folder: Path) -> None:
    async def live(number: int) -> str:
        key = store.new_key("org", RUN)
        await store.put(key, b"%d" % number, deadline=soon())
        if number % 8 == 0:
            return key
        assert await read(store, key, 0, len(str(number))) == b"%d" % number
        assert await store.delete([key]) == {key}
        return ""

    for _ in range(5):
        kept = [key for key in await asyncio.gather(*(live(number) for number in range(64))) if key]
        assert files(folder) == sorted(folder / key for key in kept)
        await asyncio.gather(*(store.delete([key]) for key in kept))
        assert names(folder) == []


async def test_two_replicas_in_one_run(store: FileStore, folder: Path) -> None:
    """Each removes the run's folder whenever it is empty for a moment, also while the other one is about to use it."""

    async def live(store: FileStore) -> None:
        for _ in range(100):
            key = store.new_key("org", RUN)
            await store.put(key, b"x", deadline=soon())
            assert await read(store, key, 0, 1) == b"x"
            assert await store.delete([key]) == {key}

    other = FileStore(settings(folder.as_uri()))
    await asyncio.gather(*(live(one) for one in (store, other, store, other)))
    assert names(folder) == []
    await other.close()


async def test_a_put_whose_folder_was_taken_is_tried_again(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a collector does about once in a thousand puts of the test above."""
    real, taken = os.open, iter(range(5))

    def taking(path: Any, flags: int, *arguments: Any, **others: Any) -> int:
        if flags & os.O_CREAT and next(taken, None) is not None:
            (folder / "org" / str(RUN)).rmdir()
        return real(path, flags, *arguments, **others)

    monkeypatch.setattr(os, "open", taking)
    key = store.new_key("org", RUN)
    await store.put(key, b"x", deadline=soon())
    assert await read(store, key, 0, 1) == b"x"


async def test_a_key_is_written_once(store: FileStore) -> None:
    key = store.new_key("org", RUN)
    await store.put(key, b"first", deadline=soon())
    with pytest.raises(StorageUnavailable):
        await store.put(key, b"again", deadline=soon())
    assert await read(store, key, 0, 5) == b"first"


@pytest.mark.parametrize("step", ["mkdir", "open"])
async def test_a_root_that_goes_during_a_put_is_not_made_again(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A root that came back by itself would be in the way of the real one, with bytes in it that then are lost."""
    real, away = getattr(os, step), folder.with_name("away")

    def going(path: Any, *arguments: Any, **others: Any) -> Any:
        if others.get("dir_fd") is not None and folder.exists():
            folder.rename(away)
        return real(path, *arguments, **others)

    key = store.new_key("org", RUN)
    with monkeypatch.context() as patched:
        patched.setattr(os, step, going)
        await store.put(key, b"x", deadline=soon())
    assert names(folder.parent) == ["away"]
    away.rename(folder)
    assert await read(store, key, 0, 1) == b"x"


@contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    away = folder.with_name("away")
    folder.rename(away)
    yield
    away.rename(folder)  # would fail if a put had made the folder again


@contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    with moved_away(folder):
        folder.touch()
        yield
        folder.unlink()


@contextmanager
def organization_replaced_by_a_file(folder: Path) -> Iterator[None]:
    with moved_away(folder / "org"):
        (folder / "org").touch()
        yield
        (folder / "org").unlink()


@pytest.mark.parametrize("unusable", [moved_away, replaced_by_a_file, organization_replaced_by_a_file])
async def test_unusable_folder_and_back(
    store: FileStore, folder: Path, unusable: Callable[[Path], AbstractContextManager[None]]
) -> None:
    key = store.new_key("org", RUN)
    await store.put(key, b"before", deadline=soon())
    with unusable(folder):
        began = time.monotonic()
        results = await asyncio.gather(
            *(store.put(store.new_key("org", RUN), b"x", deadline=soon()) for _ in range(64)),
            *(store.stream(key, 0, 6) for _ in range(64)),
            store.put(store.new_key("org", RUN), os.urandom(5 * MIB), deadline=soon()),
            return_exceptions=True,
        )
        assert await store.delete([key, store.new_key("org", RUN)]) == set()
        assert time.monotonic() - began < 5
        assert {type(result) for result in results} == {StorageUnavailable}
        assert await store.ready() is (unusable is organization_replaced_by_a_file)
    assert await store.ready()
    assert await read(store, key, 0, 6) == b"before"
    await store.put(store.new_key("org", RUN), b"after", deadline=soon())
    assert await store.delete([key]) == {key}


async def test_one_folder_that_fails_does_not_hold_up_the_others(store: FileStore, folder: Path) -> None:
    good, bad = store.new_key("good", RUN), store.new_key("org", RUN)
    await store.put(good, b"x", deadline=soon())
    await store.put(bad, b"x", deadline=soon())
    with organization_replaced_by_a_file(folder):
        assert await store.delete([bad, good]) == {good}
    assert await store.delete([bad]) == {bad}
    assert names(folder) == []


async def test_a_root_that_goes_during_a_delete_does_not_count_as_empty(
    store: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [store.new_key("org", RUN) for _ in range(3)]
    for key in keys:
        await store.put(key, b"x", deadline=soon())
    real, away = os.unlink, folder.with_name("away")

    def going(path: Any, **others: Any) -> None:
        if folder.exists():
            folder.rename(away)
        real(path, **others)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", going)
        assert await store.delete(keys) == set(keys)
    assert names(away) == []


async def test_disk_full(store: FileStore, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    key = store.new_key("org", RUN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(StorageUnavailable):
            await store.put(key, b"x" * 2 * MIB, deadline=soon())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await store.delete([key]) == {key}
    assert names(folder) == []
    await store.put(key, b"x" * 2 * MIB, deadline=soon())


def is_full(store: FileStore) -> bool:
    return store.disk.is_full


async def test_a_full_disk_is_known(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the free space, and by a write that finds no room where there seems to be some, as under a quota."""
    assert await store.ready()
    assert not is_full(store)
    seen = os.statvfs("/")

    def left(**fields: int) -> Callable[[object], os.statvfs_result]:
        names = ["f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_flag"]
        changed = [fields.get(name, getattr(seen, name)) for name in [*names, "f_namemax"]]
        return lambda _: os.statvfs_result(changed)

    for fields, expected in (({"f_bavail": 1}, True), ({}, False), ({"f_files": 9, "f_favail": 0}, True), ({}, False)):
        monkeypatch.setattr(os, "statvfs", left(**fields))
        assert await store.ready()
        assert is_full(store) is expected
    for number in (errno.ENOSPC, errno.EDQUOT):

        def write(*_: object, number: int = number) -> int:
            raise OSError(number, "no room")

        with monkeypatch.context() as full:
            full.setattr(os, "write", write)
            with pytest.raises(StorageUnavailable):
                await store.put(store.new_key("org", RUN), b"x", deadline=soon())
        assert await store.ready()
        assert is_full(store)
        later = time.monotonic() + REMEMBERED_SECONDS
        with monkeypatch.context() as moved:
            moved.setattr("app.stores.disks.time.monotonic", lambda later=later: later)
            assert not is_full(store)
        store.disk = Disk("storage")


async def test_a_folder_that_hangs(store: FileStore, folder: Path) -> None:
    """A pipe blocks its reader for ever, as a dead network folder does; deletes and health have slots of their own."""
    key, other = store.new_key("org", RUN), store.new_key("org", RUN)
    await store.put(other, b"x", deadline=soon())
    os.mkfifo(folder / key)
    began = time.monotonic()
    reads = [asyncio.create_task(store.stream(key, 0, 1)) for _ in range(64)]
    await asyncio.wait(reads, timeout=0.2)
    assert await store.delete([other]) == {other}
    assert await store.ready()
    assert not any(task.done() for task in reads)
    results = await asyncio.gather(*reads, return_exceptions=True)
    assert time.monotonic() - began < 8
    assert {type(result) for result in results} == {StorageUnavailable}
    # Let the threads go: opening the other end makes their reads end.
    os.close(os.open(folder / key, os.O_RDWR | os.O_NONBLOCK))


async def test_errors_and_logs_name_nothing(store: FileStore, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = store.new_key("org", RUN)
    shown = []
    with caplog.at_level(logging.DEBUG):
        for unusable in (moved_away, replaced_by_a_file):
            with unusable(folder), pytest.raises(StorageUnavailable) as caught:
                await store.put(key, b"canary", deadline=soon())
            shown += traceback.format_exception(caught.value)
        (folder / "org").touch()
        with pytest.raises(StorageUnavailable) as caught:
            await store.put(key, b"canary", deadline=soon())
        shown += traceback.format_exception(caught.value)
    text = "".join(shown) + caplog.text
    assert "FileExistsError" in caplog.text or "NotADirectoryError" in caplog.text  # the kind is there for the operator
    for private in (key, str(folder), "canary"):
        assert private not in text.replace('b"canary"', "")  # but for the line of this test itself


@pytest.mark.parametrize("url", ["memory:///", "http://127.0.0.1/", "/plain/path", "file:///dev/null/files"])
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ValueError, match="STORAGE_URL"):
        FileStore(settings(url))


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    seaweedfs = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    yield seaweedfs
    seaweedfs.stop()


@pytest.fixture
async def bucket(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FileStore]:
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{seaweedfs.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = FileStore(settings("s3://files/some/prefix"))
    deadline = time.monotonic() + 30
    while not await started(store):
        assert seaweedfs.process.poll() is None, (seaweedfs.folder / "log").read_text()
        assert time.monotonic() < deadline, "SeaweedFS did not start"
        await asyncio.sleep(0.1)
    yield store
    await store.close()


async def started(store: FileStore) -> bool:
    """Its parts find each other one by one; a put needs all of them, and makes the bucket."""
    try:
        await store.put(store.new_key("org", RUN), b"x", deadline=soon())
    except StorageUnavailable:
        return False
    return True


async def test_s3_roundtrip(bucket: FileStore) -> None:
    assert await bucket.ready()
    key = bucket.new_key("org", RUN)
    data = os.urandom(6 * MIB + 1)  # more than obstore's own limit for one part
    headers = {"Content-Type": "text/plain", "Content-Disposition": 'attachment; filename="r.txt"'}
    await bucket.put(key, data, deadline=soon(), attributes=headers)
    assert await read(bucket, key, 0, len(data)) == data
    assert await read(bucket, key, CHUNK - 1, 2 * CHUNK + 1) == data[CHUNK - 1 : 2 * CHUNK + 1]
    with pytest.raises(FileMissingError):
        await read(bucket, key, len(data) - 1, len(data) + 1)
    url = await bucket.signed_url(key, 60)
    assert url is not None
    assert f"/files/some/prefix/{key}?" in url
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        reply = await client.get(url)
        assert reply.content == data
        assert {name: reply.headers[name] for name in headers} == headers
        assert (await client.get(url.replace(key, bucket.new_key("org", RUN)))).status_code == 403
        assert (await client.get(url.partition("?")[0])).status_code == 403
    assert await bucket.delete([key]) == {key}
    assert await bucket.delete([key]) == {key}
    with pytest.raises(FileMissingError):
        await bucket.stream(key, 0, 1)


async def test_s3_frozen_then_killed(seaweedfs: SeaweedFS, bucket: FileStore) -> None:
    key = bucket.new_key("org", RUN)
    await bucket.put(key, b"before", deadline=soon())
    seaweedfs.freeze()
    began = time.monotonic()
    results = await asyncio.gather(
        *(bucket.put(bucket.new_key("org", RUN), b"x", deadline=soon()) for _ in range(64)),
        bucket.put(bucket.new_key("org", RUN), bytes(25 * MIB), deadline=soon()),
        bucket.ready(),
        return_exceptions=True,
    )
    assert await bucket.delete([bucket.new_key("org", RUN)]) == set()
    assert time.monotonic() - began < 15
    assert results.pop() is False
    assert {type(result) for result in results} == {StorageUnavailable}
    seaweedfs.thaw()
    assert await read(bucket, key, 0, 6) == b"before"
    seaweedfs.stop()
    began = time.monotonic()
    for call in (
        bucket.put(bucket.new_key("org", RUN), b"x", deadline=soon()),
        bucket.stream(key, 0, 1),
    ):
        with pytest.raises(StorageUnavailable):
            await call
    assert await bucket.delete([key]) == set()
    assert not await bucket.ready()
    assert time.monotonic() - began < 8
