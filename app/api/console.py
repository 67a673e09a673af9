"""The operator's console at /console/: static files of our own. It knows no data: the page asks the public API."""

import json
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from app.api import static_files
from app.api.static_files import TYPES, StaticFile
from app.config import Settings
from app.errors import RouteNotFound

FOLDER: Final = Path(__file__).resolve().parent.parent / "console"
POLICY: Final = f"{static_files.POLICY}; require-trusted-types-for 'script'"  # and no string becomes code or markup


def _limits(settings: Settings) -> bytes:
    """What the page checks before it sends files, as the content of an attribute."""
    limits = {
        "body": settings.max_body_bytes,
        "file": settings.max_file_bytes,
        "files": settings.max_files,
    }
    return json.dumps(limits).replace('"', "&quot;").encode()


def _read(settings: Settings) -> dict[str, StaticFile]:
    contents = {path: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    files = {
        path.name: StaticFile.of(
            path.name, content.replace(b"{limits}", _limits(settings)) if path.suffix == ".html" else content
        )
        for path, content in contents.items()
    }
    return files | {"": files["index.html"]}


def install(app: FastAPI, settings: Settings) -> None:
    """Serve /console/."""
    files = _read(settings)

    async def serve(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise RouteNotFound
        return file.reply(request, POLICY)

    async def add_slash(request: Request) -> Response:
        return RedirectResponse(request.scope.get("root_path", "") + "/console/", 308)

    app.add_route("/console", add_slash, include_in_schema=False)
    app.add_route("/console/{name:path}", serve, include_in_schema=False)
