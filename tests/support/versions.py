"""The version of the service before this one, and a balancer that gives requests to both in turn."""

import http.client
import itertools
import subprocess
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from dev.run import APP, ROOT, App


class NoHistoryError(Exception):
    """Why the version before cannot be had."""


def version_before(folder: Path) -> str:
    """Put the last version that lacks the newest migration into a folder, and return its commit. Raises NoHistoryError."""
    newest = max(file.name for file in (ROOT / "migrations/versions").glob("[0-9]*.py"))
    added = _git("log", "--format=%H", "--diff-filter=AR", "-1", "--", f"migrations/versions/{newest}").decode().strip()
    # One that is not committed yet comes after all that is.
    commit = _git("rev-parse", "--verify", "--quiet", f"{added}^{{commit}}^" if added else "HEAD").decode().strip()
    with tarfile.open(fileobj=BytesIO(_git("archive", commit, "app", "migrations", "alembic.ini"))) as archive:
        archive.extractall(folder, filter="data")
    return commit


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False, timeout=60)
    except FileNotFoundError:
        raise NoHistoryError("git is not installed") from None
    if done.returncode:
        raise NoHistoryError(f"git {arguments[0]} fails here: is this a clone with its history?")
    return done.stdout


class OlderApp(App):
    """The service from another folder, with the packages of this one."""

    def __init__(self, source: Path, data_dir: Path, url: str, environment: dict[str, str]) -> None:
        super().__init__(data_dir, url, environment)
        self._source = source

    def start(self) -> Self:
        self.launch([*APP, "serve"], self.environment, cwd=self._source)
        self.wait_until(self._ready)
        return self


class Balancer:
    """Each request goes to the next of the servers, whatever connection it comes on."""

    def __init__(self, *urls: str) -> None:
        turns, lock = itertools.cycle(urls), threading.Lock()
        served = self.served = Counter[str]()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    url = next(turns)
                    served[url] += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                reply = connection.getresponse()
                content = reply.read()
                connection.close()
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                        self.send_header(name, value)
                if reply.status != 204:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - as http.server calls them

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
