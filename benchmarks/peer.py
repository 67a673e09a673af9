"""The peer: what a bare job queue's retry in place costs. Procrastinate's retry_job_by_id behind FastAPI, with a bearer key.

It has one table, one status and no rules: no archive, no events, no reply under a key. Its key is compared in memory, where the
service asks its database. `python -m benchmarks.peer PORT URL KEY` runs it, with its packages on PYTHONPATH.
"""

import hmac
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from dev.run import ROOT
from dev.stack import Part, free_port, http

PACKAGES = ("procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9")
FOLDER = ROOT / ".cache" / "peer"
SCHEMA = FOLDER / "procrastinate" / "sql" / "schema.sql"

FAILED = (
    "INSERT INTO procrastinate_jobs (queue_name, task_name, args, status, attempts)"
    " SELECT 'bench', 'run', '{\"customer\": \"Grace\", \"amount\": 12}', 'failed', 1 FROM generate_series(1, $1::int)"
    " RETURNING id"
)


def install() -> Path:
    """The folder with its packages, which are none of ours; filled by pip at the first use."""
    if not SCHEMA.is_file():
        made = FOLDER.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(made), *PACKAGES], check=True
        )
        made.replace(FOLDER)
    return FOLDER


class Peer(Part):
    """It, as a server process."""

    name = "peer"

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder / self.name)
        self.port = free_port()
        self.key = "peer-key"
        self._url = url

    def start(self) -> Self:
        self.launch(
            [sys.executable, "-m", "benchmarks.peer", str(self.port), self._url, self.key],
            {"PATH": os.environ["PATH"], "PYTHONPATH": str(install())},
            cwd=ROOT,
        )
        self.wait_until(self._answers)
        return self

    def _answers(self) -> bool:
        try:
            return http("GET", f"http://127.0.0.1:{self.port}/health")[0] == 200
        except OSError:
            return False


def _serve(port: int, url: str, key: str) -> None:
    # Its packages are there in this process alone.
    import procrastinate  # type: ignore[import-not-found]
    import uvicorn
    from fastapi import Depends, FastAPI, Header, HTTPException

    queue = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=16))

    @asynccontextmanager
    async def opened(_: FastAPI) -> AsyncIterator[None]:
        async with queue.open_async():
            yield

    def known(authorization: Annotated[str, Header()]) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {key}".encode()):
            raise HTTPException(401)

    app = FastAPI(lifespan=opened)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"at": time.time()}

    @app.post("/jobs/{job_id}/retry", dependencies=[Depends(known)])
    async def retry(job_id: int) -> dict[str, Any]:
        at = datetime.now(UTC)
        await queue.job_manager.retry_job_by_id_async(job_id, at)
        return {"id": job_id, "status": "todo", "scheduled_at": at}

    uvicorn.run(
        app,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], sys.argv[3])
