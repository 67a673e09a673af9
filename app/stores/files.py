"""Attachment bytes in a folder or an object store: the only file that imports obstore.

It knows keys and bytes, not their owners.

One file: every call of a folder checks the store's marker in the same step in which it reads, writes or deletes, so the marker
and the steps of a folder cannot be read apart.
"""

import asyncio
import errno
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit
from uuid import UUID

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from app.config import MIB, Settings
from app.errors import StorageUnavailable
from app.stores.disks import Disk
from app.stores.outages import Outage
from app.stores.threads import Slots, fresh_name, measured

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK = MIB  # what a download holds in memory at once

# The collector and the health check never take a slot of a request, nor the other way round.
_COLLECTOR_SLOTS = 4
_HEALTH_SLOTS = 1
# With the default patience of 4 s a request that meets a frozen store is answered in 7 s, with a 25 MB file in 9.5 s.
_LONGEST_WAIT = 3.0
_BYTES_PER_SECOND = 10 * MIB
# Meeting a collector in the same folder is rare, and twice in a row rarer; this many times is another fault.
_FOLDER_ATTEMPTS = 10
# What a write says that found no room, and how much there must be before the disk counts as full.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_LEAST_FREE_BYTES = MIB
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL


# What browsers take for a script, whatever else it may be (WHATWG, MIME sniffing, section 4.6), and what styles a page.
_ACTIVE = re.compile(
    r"(text|application)/(x-)?(java|ecma)script|text/javascript1\.[0-9]|text/(jscript|livescript|css)|application/wasm"
    r"|(text|application)/(xsl|xslt\+xml)",
    re.IGNORECASE,
)


def file_headers(filename: str, content_type: str) -> dict[str, str]:
    """How a file is answered, by us and by a pre-signed URL: as a download, whatever its name and type are."""
    # For clients that do not know filename*: nothing that needs quoting or that a parser could read as syntax.
    plain = re.sub(r"[^A-Za-z0-9 ._()+,=@-]", "_", filename)
    return {
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}",
        "Content-Type": "application/octet-stream" if is_active(content_type) else content_type,
    }


def is_active(content_type: str) -> bool:
    """Whether a page could load a file of this type as its script or its style sheet."""
    return _ACTIVE.fullmatch(content_type.partition(";")[0].strip()) is not None


# The key of the store's marker (storage_marker.py). A folder gets it by way of a file with a longer name.
MARKER = ".runs-store"
_MARKER_BYTES = 36


class FileMissingError(Exception):
    """The store holds nothing, or too little, under this key."""


class FileStore:
    """One object per file, under a key of its own that is written once.

    obstore runs in threads: a folder blocks by nature.
    No exception of obstore leaves this class: they carry paths and URLs.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError if the URL cannot be used. Credentials come from the usual AWS_*, GOOGLE_* or AZURE_*."""
        self._timeout = settings.storage_timeout_seconds
        self._wait = min(self._timeout, _LONGEST_WAIT)
        scheme, host, path = urlsplit(settings.storage_url)[:3]
        if scheme not in {"file", "s3", "gs", "az"}:
            raise ValueError("STORAGE_URL: it must begin with file://, s3://, gs:// or az://.")
        if scheme == "file" and (host or not path.strip("/")):
            raise ValueError("STORAGE_URL: it must name a folder of its own, as in file:///data/files.")
        try:
            if scheme == "file":
                self._store = from_url(settings.storage_url, mkdir=True)
            else:
                self._store = from_url(
                    settings.storage_url,
                    client_options={
                        # Timeout of a whole request with its body. It bounds the thread after its caller has given up.
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
                "STORAGE_URL: it cannot be opened; look at the folder and who may write there, or at the bucket and its "
                "AWS_*, GOOGLE_* or AZURE_* variables."
            ) from None
        self._root = self._store.prefix if isinstance(self._store, LocalStore) else None
        if self._root is not None and not os.access(self._root, os.W_OK | os.X_OK):
            raise ValueError(
                f"STORAGE_URL: user {os.geteuid()} may not write in the folder, or it is mounted read-only."
            )
        self.disk = Disk("storage")
        self.outage = Outage("storage")
        self.own_marker: str | None = None  # that the database holds; None: not known yet
        self.is_own = True  # until a check finds another marker
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
        # No call begins after its caller has given up.
        begin_by = min(deadline, time.monotonic() + self._wait + patience)
        await self._run(self._requests, "write", partial(self._put, key, data, begin_by, attributes), patience)

    async def stream(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (exclusive), in chunks of at most CHUNK; the first one is read before this returns.

        No slot is held between two chunks. Raises FileMissingError or StorageUnavailable, and so does the iterator.
        """

        async def read(offset: int) -> bytes:
            stop = min(offset + CHUNK, end)
            call = partial(self._read, key, offset, stop)
            return await self._run(self._requests, "read", call, self._patience(CHUNK))

        async def chunks(chunk: bytes, offset: int) -> AsyncIterator[bytes]:
            while chunk:
                yield chunk
                offset += len(chunk)
                chunk = await read(offset) if offset < end else b""

        return chunks(await read(start) if start < end else b"", start)

    async def delete(self, keys: Sequence[str]) -> set[str]:
        """Delete files and the folders that they leave empty; a missing key counts as deleted.

        Returns the keys that are gone, for good. What failed is logged by kind.
        """
        if self._root is not None:  # one call for all: a thread for each would cost more than the deleting
            calls = [partial(self._delete_files, self._root, keys)]
        else:
            calls = [partial(self._delete_object, key) for key in keys]
        results = await asyncio.gather(
            *(self._run(self._collector, "delete", call, self._timeout) for call in calls), return_exceptions=True
        )
        gone: set[str] = set()
        for result in results:
            if isinstance(result, set):
                gone |= result
            elif not isinstance(result, StorageUnavailable):
                raise result
        return gone

    async def signed_url(self, key: str, expires_in: int) -> str | None:
        """A URL that reads the file for `expires_in` seconds without our help; None if the store is a folder.

        Raises StorageUnavailable.
        """
        store = self._store
        if not isinstance(store, S3Store | GCSStore | AzureStore):
            return None
        # Signing may fetch short-lived credentials over the network.
        sign = partial(obstore.sign, store, "GET", key, timedelta(seconds=expires_in))
        return await self._run(self._requests, "sign", sign, self._timeout)

    async def list_names(self, page: int) -> AsyncIterator[list[str]]:
        """The keys of all files, in pages of at most that many. Raises StorageUnavailable."""
        pages = self._walk(page) if self._root is not None else self._listed(page)
        while names := await self._run(self._requests, "list", partial(next, pages, []), self._patience(0)):
            yield names

    def _walk(self, page: int) -> Iterator[list[str]]:
        self._require_root(self._root)
        found: list[str] = []
        for folder, _, names in os.walk(self._root or ""):
            for name in names:
                if name.startswith(MARKER):
                    continue
                found.append(str((Path(folder) / name).relative_to(self._root or "")))
                if len(found) == page:
                    yield found
                    found = []
        yield found

    def _listed(self, page: int) -> Iterator[list[str]]:
        for objects in obstore.list(self._store, chunk_size=page):
            yield [found["path"] for found in objects if not found["path"].startswith(MARKER)]

    async def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none. Raises StorageUnavailable."""

        def look() -> int | None:
            try:
                if self._root is not None:
                    self._require_root(self._root)
                    return (self._root / key).stat().st_size
                return obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

        return await self._run(self._requests, "size", look, self._timeout)

    async def marker(self) -> str | None:
        """The store's marker; None if there is none. Raises StorageUnavailable, also for one that is no id."""
        return await self._run(self._health, "marker", self._marker, self._timeout)

    async def write_marker(self, marker: str) -> str:
        """Give the store its marker, unless another process was faster; returns the marker that is there then.

        Raises StorageUnavailable.
        """

        def write() -> str:
            if self._root is None:
                obstore.put(self._store, MARKER, marker.encode(), use_multipart=False)
            else:
                _write_marker(self._root, marker)
            return self._marker() or marker

        return await self._run(self._health, "marker", write, self._timeout)

    def _marker(self) -> str | None:
        try:
            if self._root is not None:
                self._require_root(self._root)
                found = (self._root / MARKER).read_bytes()[: _MARKER_BYTES + 1]
            else:
                found = bytes(obstore.get_range(self._store, MARKER, start=0, end=_MARKER_BYTES))
            return str(UUID(found.decode("ascii").strip()))
        except (FileNotFoundError, PermissionDeniedError):
            return None

    def _require_own(self) -> None:
        """Raises StorageUnavailable for a folder that is not the database's store, however short ago that was found."""
        if self._root is not None and self.own_marker is not None and self._marker() != self.own_marker:
            self.is_own = False
            raise StorageUnavailable

    async def ready(self) -> bool:
        """Whether the folder can be written, or the object store answers. Bounded by twice the timeout."""
        try:
            return await self._run(self._health, "health", self._answers, self._timeout)
        except StorageUnavailable:
            return False

    async def close(self) -> None:
        """Wait for the calls under way."""
        for slots in (self._requests, self._collector, self._health):
            await slots.close()

    def _patience(self, size: int) -> float:
        return self._timeout + size / _BYTES_PER_SECOND

    async def _run(self, slots: Slots, operation: str, call: Callable[[], T], patience: float) -> T:
        def guarded() -> T:
            if not self.is_own and slots is not self._health:
                raise StorageUnavailable
            try:
                return call()
            except (BaseError, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    self.disk.refused()
                # The kind alone: the text of these errors holds paths and URLs.
                log.log(self.outage.level, "File store call failed: %s", type(error).__name__)
                raise StorageUnavailable from None

        with measured("files", operation):
            try:
                return await slots.run(guarded, wait=self._wait, patience=patience)
            except TimeoutError:
                log.log(self.outage.level, "The file store did not answer in time")
                self.outage.suspected.set()
                raise StorageUnavailable from None
            except StorageUnavailable:
                self.outage.suspected.set()
                raise

    def _put(self, key: str, data: bytes, begin_by: float, attributes: Mapping[str, str] | None) -> None:
        if time.monotonic() >= begin_by:
            log.log(self.outage.level, "The file store was reached too late; the call was not begun")
            raise StorageUnavailable
        # A killed multipart upload would leave parts that no listing shows.
        if self._root is None:
            obstore.put(self._store, key, data, attributes=dict(attributes or {}), use_multipart=False)
            return
        self._require_own()
        _write_file(self._root, key, data)

    def _read(self, key: str, start: int, stop: int) -> bytes:
        try:
            chunk = bytes(obstore.get_range(self._store, key, start=start, end=stop))
        except FileNotFoundError:
            self._require_root(self._root)
            self._require_own()
            raise FileMissingError from None
        if len(chunk) != stop - start:
            raise FileMissingError
        return chunk

    def _delete_files(self, root: Path, keys: Sequence[str]) -> set[str]:
        self._require_own()
        return _delete_files(root, keys)

    def _delete_object(self, key: str) -> set[str]:
        with suppress(FileNotFoundError):
            obstore.delete(self._store, key)
        return {key}

    def _answers(self) -> bool:
        if self._root is not None:
            self.disk.seen(full=_is_full(self._root))
            return self._root.is_dir() and os.access(self._root, os.W_OK | os.X_OK)
        # An answer all the same: S3 says "denied" of a missing key to a role that may not list.
        with suppress(FileNotFoundError, PermissionDeniedError):
            obstore.head(self._store, "ready")
        return True

    def _require_root(self, root: Path | None) -> None:
        """A folder that is gone (not mounted?) must not count as empty."""
        if root is not None and not root.is_dir():
            log.log(self.outage.level, "The storage folder is missing")
            raise StorageUnavailable


# --- a folder as the store --------------------------------------------------------------------------------------------
#
# obstore does not serve for writing and deleting here: its put makes a missing root again, behind the back of whoever is
# mounting it; a put that is killed leaves a file that it neither lists nor deletes; and it has no fsync. Every step below is
# relative to the root that was opened first, so it happens in that very folder, wherever it is moved meanwhile.


@contextmanager
def _opened(path: str | Path, within: int | None = None) -> Iterator[int]:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=within)
    try:
        yield folder
    finally:
        os.close(folder)


def _is_full(root: Path) -> bool:
    """Whether the disk has no room, or no name, for one more file. Raises OSError."""
    left = os.statvfs(root)
    return left.f_bavail * left.f_frsize < _LEAST_FREE_BYTES or (left.f_files > 0 and left.f_favail == 0)


def _write_file(root: Path, key: str, data: bytes) -> None:
    """Write a fresh key; durable when it returns. Raises OSError; part of the file may exist then.

    No rename at the end: nobody reads a key before the commit that names it.

    A file survives a power cut by its bytes and their number, by its name in the folder, and by the name of each folder in the
    one above. Those are made durable too when the folders were there already: whoever made them may not have come to it.
    """
    folders = [_parent(key)]
    while above := _parent(folders[-1]):
        folders.append(above)
    with _opened(root) as top:
        for attempt in range(_FOLDER_ATTEMPTS):
            try:
                for folder in reversed(folders):
                    with suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=top)
                file = os.open(key, _NEW_FILE, 0o666, dir_fd=top)
                break
            except FileNotFoundError:  # a collector has removed the folder, empty again, before the file was in it
                if attempt == _FOLDER_ATTEMPTS - 1:
                    raise
                time.sleep(0.001 * (attempt + 1))  # out of step with the other
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
        # Now none of them is empty, and none can go.
        for folder in folders:
            with _opened(folder, top) as descriptor:
                os.fsync(descriptor)
        os.fsync(top)


def _write_marker(root: Path, marker: str) -> None:
    """Under its name only once it is whole, and never over another one. Raises OSError."""
    fresh = f"{MARKER}-{marker}"
    with _opened(root) as top:
        file = os.open(fresh, _NEW_FILE, 0o666, dir_fd=top)
        try:
            os.write(file, marker.encode())
            os.fsync(file)
            try:
                os.link(fresh, MARKER, src_dir_fd=top, dst_dir_fd=top)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.rename(fresh, MARKER, src_dir_fd=top, dst_dir_fd=top)
        finally:
            os.close(file)
            with suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=top)
        os.fsync(top)


def _delete_files(root: Path, keys: Sequence[str]) -> set[str]:
    """Delete files and the folders that they leave empty; returns the keys that are gone, durably. Raises OSError."""
    changed: dict[str, set[str]] = defaultdict(set)  # by folder, what must not come back after a power cut
    gone: set[str] = set()
    with _opened(root) as top:
        for key in keys:
            try:
                with suppress(FileNotFoundError):
                    os.unlink(key, dir_fd=top)
                changed[_remove_empty(top, _parent(key))].add(key)
            except OSError as error:
                log.warning("A file could not be deleted: %s", type(error).__name__)
        for folder, deleted in changed.items():
            try:
                _sync(top, folder)
            except OSError as error:
                log.warning("A folder could not be synced: %s", type(error).__name__)
            else:
                gone |= deleted
    return gone


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _remove_empty(top: int, folder: str) -> str:
    """Remove a folder and those above it, up to the first that is not empty; returns that one."""
    while folder:
        try:
            os.rmdir(folder, dir_fd=top)
        except FileNotFoundError:
            pass  # another delete took it
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return folder
        folder = _parent(folder)
    return "."


def _sync(top: int, folder: str) -> None:
    """Make what happened in this folder durable; if it went meanwhile, in the one above it."""
    try:
        with _opened(folder, top) as descriptor:
            os.fsync(descriptor)
    except FileNotFoundError:
        _sync(top, _parent(folder) or ".")
