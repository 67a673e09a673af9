"""A physical standby of a PostgreSQL, and an address that can be moved from one server to another."""

import shutil
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from dev.stack import Postgres


class Standby(Postgres):
    """A copy of a running primary that follows it, with the same roles and passwords."""

    def __init__(self, data_dir: Path, primary: Postgres) -> None:
        super().__init__(data_dir, fsync=primary.fsync)
        self._primary = primary

    def _creating(self, folder: Path) -> list[str]:
        for name in ("password", "app-password"):
            shutil.copy(self._primary.folder / name, self.folder / name)
        source = f"{self._primary.url}?application_name={self.name}"
        command = [self._binary("pg_basebackup"), "-d", source, "-D", str(folder)]
        return [*command, "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"]

    def _status(self) -> str:
        found = super()._status()
        return "ready" if found == "standby" else found

    def _ensure_database(self) -> None:
        """It has what the primary has."""


class MovableAddress:
    """A port of 127.0.0.1 that leads to a server. Connections that were made stay with their server when it is moved."""

    def __init__(self, server: Postgres) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._server = server
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def url(self, url: str) -> str:
        """The same database and role, by this address."""
        before, _, after = url.rpartition("@")
        return f"{before}@127.0.0.1:{self.port}/{after.partition('/')[2]}"

    def move_to(self, server: Postgres) -> None:
        """New connections lead there."""
        self._server = server

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._server.port)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
