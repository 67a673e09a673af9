"""Which methods a path answers: every path OPTIONS, and every path with a GET also HEAD. And which route a path belongs to."""

import re
from collections.abc import Sequence

from starlette.routing import Match, Route
from starlette.types import Scope

_EVERY = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"


class Methods:
    """The methods of each route of an application."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._methods: dict[str, set[str]] = {}  # by template: each method of a path is a route of its own
        for route in routes:
            self._methods.setdefault(route.path, {"OPTIONS"}).update(route.methods or ())
        for methods in self._methods.values():
            if "GET" in methods:
                methods.add("HEAD")
        # The template with the fewest parameters is the path's: /v1/runs/bulk is no run.
        self._routes = sorted(routes, key=lambda route: len(route.param_convertors))
        self._templates = list(dict.fromkeys(route.path for route in self._routes))
        self._any = re.compile("|".join(f"({_pattern(template)})" for template in self._templates))

    def allow(self, scope: Scope) -> str | None:
        """What the header Allow says of the path; None: there is nothing at it. It depends on the path's template alone."""
        if scope["path"] == "*":
            return _EVERY
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                return ", ".join(sorted(self._methods[route.path]))
        return None

    def template(self, path: str) -> str | None:
        """The template of the path's route, for a request that was refused before it was routed."""
        found = self._any.fullmatch(path)
        return None if found is None or found.lastindex is None else self._templates[found.lastindex - 1]


def _pattern(template: str) -> str:
    """As a regular expression without groups: the template's place among the others is that of its group."""
    pieces = re.split(r"(\{[^}]*\})", template)
    return "".join(
        ".*" if piece.endswith(":path}") else "[^/]+" if piece.startswith("{") else re.escape(piece) for piece in pieces
    )
