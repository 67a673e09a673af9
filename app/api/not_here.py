"""Routes of the vendor's API that this service does not have: they are refused by name, not as unknown paths."""

import re

# What all begins like this is the vendor's, and none of it is here.
_FAMILIES = (
    *("chains", "computer", "connections", "credentials", "model-configurations", "models", "provider-credentials"),
    *(
        "request-logs",
        "tags",
        "test",
        "trajectories",
        "usage",
        "workflow-chains",
        "workflow-tag-groups",
        "workflow-tags",
    ),
)
# Below resources that are here. `{run_id}` and `{workflow_id}` would take some of them for an id.
_PATHS = (
    "/v1/machines/{machine_id}/cyberdriver/shutdown",
    "/v1/machines/{machine_id}/cyberdriver/web-session",
    "/v1/runs/chain",
    "/v1/runs/{run_id}/generate-trajectory",
    "/v1/runs/{run_id}/image/signed-url",
    "/v1/runs/{run_id}/llm-costs",
    "/v1/runs/{run_id}/trajectory",
    "/v1/workflows/bulk/tags",
    "/v1/workflows/prompt-image",
    "/v1/workflows/prompt-image/signed-url",
    "/v1/workflows/prompt-images",
    "/v1/workflows/{workflow_id}/duplicate",
    "/v1/workflows/{workflow_id}/latest-trajectory",
    "/v1/workflows/{workflow_id}/merge",
    "/v1/workflows/{workflow_id}/tags",
    "/v1/workflows/{workflow_id}/tags/{tag_id}",
)
_ALL = [(name, re.compile(re.sub(r"\{\w+\}", "[^/]+", name))) for name in _PATHS] + [
    (f"/v1/{family}", re.compile(f"/v1/{family}(/.*)?")) for family in _FAMILIES
]


def vendors_route(path: str) -> str | None:
    """The name of the vendor's route that this path belongs to, if it is one that is not here."""
    return next((name for name, pattern in _ALL if pattern.fullmatch(path)), None)
