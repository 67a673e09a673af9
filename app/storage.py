"""Attachment bytes in a folder or an object store: the only file that imports obstore."""

import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from app.config import MIB, Settings
from app.errors import StorageUnavailable
from app.outside import Slots, fresh_name

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK = MIB  # what a download holds in memory at once

# The collector and the health check never take a slot of a request, nor the other way round.
_COLLECTOR_SLOTS = 2
_HEALTH_SLOTS = 1
# With the default patience of 4 s a request that meets a frozen store is answered in 7 s, with a 25 MB file in 9.5 s.
_LONGEST_WAIT = 3.0
_BYTES_PER_SECOND = 10 * MIB
# Meeting a collector in the same folder is rare, and twice in a row rarer; this many times is another fault.
_FOLDER_ATTEMPTS = 10


class FileMissingError(Exception):
    """The store holds nothing, or too little, under this key."""


class FileStore:
    """One object per file, under a key of its own that is written once.

    obstore runs in threads: a folder blocks by nature. Into a folder we write ourselves, see `_write_file`.
    No exception of obstore leaves this class: they carry paths and URLs.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError if the URL cannot be used. Credentials come from the usual AWS_*, GOOGLE_* or AZURE_*."""
        self._timeout = settings.storage_timeout_seconds
        self._wait = min(self._timeout, _LONGEST_WAIT)
        scheme = urlsplit(settings.storage_url).scheme
        if scheme not in {"file", "s3", "gs", "az"}:
            raise ValueError("STORAGE_URL must begin with file://, s3://, gs:// or az://.")
        try:
            if scheme == "file":
                self._store = from_url(settings.storage_url, mkdir=True)
            else:
                self._store = from_url(
                    settings.storage_url,
                    client_options={
                        # Of a whole request, body included: what bounds the thread after its caller gave up.
                        "timeout": timedelta(seconds=self._patience(settings.max_file_bytes)),
                        # These options replace what obstore itself would take from this variable.
                        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true", "yes"},
                        "connect_timeout": timedelta(seconds=min(self._timeout, 2)),
                    },
                    # Over a dropped connection, not over an outage (obstore's own: 10 times, 3 minutes).
                    retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=self._timeout)},
                )
        except (BaseError, OSError, ValueError):
            raise ValueError(
                "STORAGE_URL cannot be opened: check the folder, or the bucket and its settings."
            ) from None
        self._root = self._store.prefix if isinstance(self._store, LocalStore) else None
        self._requests = Slots("storage", settings.storage_concurrency)
        self._collector = Slots("storage-collector", _COLLECTOR_SLOTS)
        self._health = Slots("storage-health", _HEALTH_SLOTS)

    def new_key(self, organization_id: str, run_id: UUID) -> str:
        """A key that no file ever had; nothing a caller sent is part of it."""
        return fresh_name(organization_id, run_id)

    async def put(self, key: str, data: bytes, *, deadline: float, attributes: Mapping[str, str] | None = None) -> None:
        """Store the bytes; durable when it returns. Not begun after `deadline` (of time.monotonic()).

        `attributes` (Content-Disposition, Content-Type) are what a pre-signed URL answers with; a folder keeps none.
        Raises StorageUnavailable: the file may or may not exist then.
        """
        patience = self._patience(len(data))
        # Nothing is begun that nobody waits for any more.
        begin_by = min(deadline, time.monotonic() + self._wait + patience)
        await self._run(self._requests, partial(self._put, key, data, begin_by, attributes), patience)

    async def stream(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (exclusive), in chunks of at most CHUNK; the first one is read before this returns.

        No slot is held between two chunks. Raises FileMissingError or StorageUnavailable, and so does the iterator.
        """

        async def read(offset: int) -> bytes:
            stop = min(offset + CHUNK, end)
            return await self._run(self._requests, partial(self._read, key, offset, stop), self._patience(CHUNK))

        async def chunks(chunk: bytes, offset: int) -> AsyncIterator[bytes]:
            while chunk:
                yield chunk
                offset += len(chunk)
                chunk = await read(offset) if offset < end else b""

        return chunks(await read(start) if start < end else b"", start)

    async def delete(self, key: str) -> None:
        """Delete the file and the folders that it leaves empty; a missing key counts as deleted.

        Raises StorageUnavailable.
        """
        await self._run(self._collector, partial(self._delete, key), self._timeout)

    async def signed_url(self, key: str, expires_in: int) -> str | None:
        """A URL that reads the file for `expires_in` seconds without our help; None if the store is a folder."""
        store = self._store
        if not isinstance(store, S3Store | GCSStore | AzureStore):
            return None
        # Signing may fetch short-lived credentials over the network.
        sign = partial(obstore.sign, store, "GET", key, timedelta(seconds=expires_in))
        return await self._run(self._requests, sign, self._timeout)

    async def ready(self) -> bool:
        """Whether the folder can be written, or the object store answers. Bounded by twice the timeout."""
        try:
            return await self._run(self._health, self._answers, self._timeout)
        except StorageUnavailable:
            return False

    async def close(self) -> None:
        """Wait for the calls under way."""
        for slots in (self._requests, self._collector, self._health):
            await slots.close()

    def _patience(self, size: int) -> float:
        return self._timeout + size / _BYTES_PER_SECOND

    async def _run(self, slots: Slots, call: Callable[[], T], patience: float) -> T:
        def guarded() -> T:
            try:
                return call()
            except (BaseError, OSError, ValueError) as error:
                # The kind alone: the text of these errors holds paths and URLs.
                log.warning("File store call failed: %s", type(error).__name__)
                raise StorageUnavailable from None

        try:
            return await slots.run(guarded, wait=self._wait, patience=patience)
        except TimeoutError:
            log.warning("The file store did not answer in time")
            raise StorageUnavailable from None

    def _put(self, key: str, data: bytes, begin_by: float, attributes: Mapping[str, str] | None) -> None:
        if time.monotonic() >= begin_by:
            log.warning("The file store was reached too late; the call was not begun")
            raise StorageUnavailable
        # A killed multipart upload would leave parts that no listing shows.
        if self._root is None:
            obstore.put(self._store, key, data, attributes=dict(attributes or {}), use_multipart=False)
            return
        _write_file(self._root, key, data)

    def _read(self, key: str, start: int, stop: int) -> bytes:
        try:
            chunk = bytes(obstore.get_range(self._store, key, start=start, end=stop))
        except FileNotFoundError:
            self._require_root(self._root)
            raise FileMissingError from None
        if len(chunk) != stop - start:
            raise FileMissingError
        return chunk

    def _delete(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            self._require_root(self._root)
        if self._root is None:
            return
        path = self._root / key
        # Make it durable too: a file that came back after a power cut would be on no list.
        for folder in _folders(self._root, path):
            try:
                if not _remove_if_empty(folder):
                    _sync(folder)
                    return
            except FileNotFoundError:
                continue  # another delete took it; what matters now is its parent
        _sync(self._root)

    def _answers(self) -> bool:
        if self._root is not None:
            return self._root.is_dir() and os.access(self._root, os.W_OK | os.X_OK)
        # An answer all the same: S3 says "denied" of a missing key to a role that may not list.
        with suppress(FileNotFoundError, PermissionDeniedError):
            obstore.head(self._store, "ready")
        return True

    def _require_root(self, root: Path | None) -> None:
        """A folder that is gone (not mounted?) must not count as empty."""
        if root is not None and not root.is_dir():
            log.warning("The storage folder is missing")
            raise StorageUnavailable


def _folders(root: Path, path: Path) -> list[Path]:
    """The folders between a file and the root, deepest first."""
    return [folder for folder in path.parents if folder != root and root in folder.parents]


def _write_file(root: Path, key: str, data: bytes) -> None:
    """Write a fresh key below `root`; durable when it returns. Raises OSError; part of the file may exist then.

    obstore's put does not serve here: it makes a missing root again, behind the back of whoever is mounting it; a put that
    is killed leaves a file that it neither lists nor deletes; and it has no fsync. Every step is relative to the root
    opened first, so the bytes are in that very folder, wherever it is moved meanwhile. No rename: nobody reads a key
    before the commit that names it.
    """
    *parents, name = key.split("/")
    with ExitStack() as opened:

        def open_folder(path: str | Path, within: int | None = None) -> int:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=within)
            opened.callback(os.close, folder)
            return folder

        top = open_folder(root)
        for attempt in range(_FOLDER_ATTEMPTS):
            folders = [top]
            try:
                for parent in parents:
                    with suppress(FileExistsError):
                        os.mkdir(parent, dir_fd=folders[-1])
                    folders.append(open_folder(parent, folders[-1]))
                file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folders[-1])
                break
            except FileNotFoundError:  # a collector has removed the folder, empty again, before the file was in it
                if attempt == _FOLDER_ATTEMPTS - 1:
                    raise
                time.sleep(0.001 * (attempt + 1))  # out of step with the other
        with os.fdopen(file, "wb") as output:
            output.write(data)
            output.flush()
            os.fsync(file)
        # The file's name, and the names of the folders that were made.
        for folder in reversed(folders):
            os.fsync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
