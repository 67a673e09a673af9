"""The way in: /docs, which is Swagger UI without any other host, the manual as Markdown under /docs/, /llms.txt, and /.

The files of Swagger UI come from a package that carries them; nothing of it is imported. FastAPI's own page loads them from a
content delivery network and starts them by a script within the page: our policy forbids both.
"""

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import FILES
from app.api.static_files import StaticFile
from app.errors import RouteNotFound

_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")


def install(app: FastAPI, *, console: bool) -> None:
    """Serve /docs and what it needs, and /."""
    here = Path(__file__).parent
    index = StaticFile.of("index.html", (here / "index.html").read_bytes())
    paths = [here / "start.js", *(_package("fastapi_swagger") / "resources" / name for name in _SWAGGER_UI)]
    assets = {path.name: StaticFile.of(path.name, path.read_bytes()) for path in paths}
    manual = _manual(app.title)
    places = {"docs": "/docs", "openapi": "/openapi.json", "health": "/health/ready"}
    places |= {"console": "/console/"} if console else {}

    async def page(request: Request) -> Response:
        return index.reply(request)

    # In a thread: the first one who asks for a file waits until it is compressed.
    def asset(request: Request) -> Response:
        if (file := assets.get(request.path_params["name"])) is None:
            raise RouteNotFound
        return file.reply(request)

    async def manual_page(request: Request) -> Response:
        if (file := manual.get(request.path_params["name"])) is None:
            raise RouteNotFound
        return file.reply(request)

    async def overview(request: Request) -> Response:
        return manual["llms.txt"].reply(request)

    def icon(request: Request) -> Response:
        return assets["favicon-32x32.png"].reply(request)

    async def root(request: Request) -> Response:
        """Browsers go to the page, programs learn where to look."""
        headers = {"Vary": "Accept"}
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("docs", 307, headers)
        return JSONResponse({"title": app.title, "version": app.version} | places, headers=headers)

    app.add_route("/", root, include_in_schema=False)
    app.add_route("/docs", page, include_in_schema=False)
    app.add_route("/docs/{name}", manual_page, include_in_schema=False)
    app.add_route("/llms.txt", overview, include_in_schema=False)
    app.add_route("/favicon.ico", icon, include_in_schema=False)
    app.add_route("/docs-assets/{name}", asset, include_in_schema=False)


def _manual(title: str) -> dict[str, StaticFile]:
    """Every page of docs/, and a list of them for language models (llmstxt.org)."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted((FILES / "docs").glob("*.md"))}
    lines = [
        f"# {title}",
        "",
        "> Desktop-automation runs: create them, execute them, and retry an ended run in place.",
        "",
    ]
    lines += ["## Docs", "", "- [OpenAPI document](/openapi.json): every route, field and error"]
    for name, text in pages.items():
        heading, _, body = text.partition("\n")
        lines.append(f"- [{heading.removeprefix('# ')}](/docs/{name}): {_first_sentence(body)}")
    pages["llms.txt"] = "\n".join(lines) + "\n"
    return {name: StaticFile.of(name, text.encode()) for name, text in pages.items()}


def _first_sentence(text: str) -> str:
    paragraph = next(part for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith("#"))
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".")


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The package {name} is not installed.", name=name)
    return Path(spec.origin).parent
