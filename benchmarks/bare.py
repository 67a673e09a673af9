"""(f): what the framework alone costs. The service's request and reply models, ordinary routes, no database.

`python -m benchmarks.bare PORT DOCUMENTS`: the file holds a run and a page of runs as the service answered them, so that
these routes send the same bytes through their response models.
"""

import json
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import uvicorn
from fastapi import FastAPI

from app.schemas.runs import RunProjection, RunResponse, RunRetry
from app.schemas.values import Page


def create_app(documents: Path) -> FastAPI:
    known = json.loads(documents.read_text(encoding="utf-8"))
    # As Python values: a service that had read them from somewhere would not hold ids and times as text.
    run = RunResponse.model_validate(known["run"]).model_dump()
    page = Page[RunProjection].model_validate(known["page"]).model_dump()
    app = FastAPI()

    @app.post("/v1/runs/{run_id}/retry", response_model=RunResponse)
    async def retry(run_id: UUID, options: RunRetry) -> dict[str, Any]:
        return run | {"id": run_id, "input_values": options.input_values}

    @app.get("/v1/runs", response_model=Page[RunProjection])
    async def list_runs(skip: int = 0, limit: int = 100) -> dict[str, Any]:
        return page | {"skip": skip, "limit": limit}

    @app.get("/v1/runs/{run_id}", response_model=RunResponse)
    async def get_run(run_id: UUID) -> dict[str, Any]:
        return run | {"id": run_id}

    return app


if __name__ == "__main__":
    uvicorn.run(
        create_app(Path(sys.argv[2])),
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
    )
