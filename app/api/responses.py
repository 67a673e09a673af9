"""Small pieces that every router uses: replies and paging."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from starlette.responses import Response

from app.api.requests import services
from app.idempotency import Reply
from app.limits.quotas import fields
from app.schemas.values import Timestamp
from app.stores.documents import encode
from app.stores.paging import Slice

Skip = Annotated[int, Query(ge=0, le=2**31 - 1, description="Items to pass over, from the first or from `after`.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items in the page.")]
From = Annotated[Timestamp | None, Query(description="At or after this time.")]
To = Annotated[Timestamp | None, Query(description="At or before this time.")]


After = Annotated[
    str | None,
    Query(
        max_length=200,
        description="`next` of the page before, of a list with the same filters; absent: from the first item. Unlike `skip` it"
        " costs no more far down the list, and new items move nothing.",
        json_schema_extra={"pattern": "^[A-Za-z0-9_-]*$"},
    ),
]
EventsAfter = Annotated[
    str | None,
    Query(
        max_length=40,
        description="`next` of the reply before; absent: from the beginning.",
        json_schema_extra={"pattern": r"^([0-9]{1,18}\.[0-9]{1,18})?$"},
    ),
]


async def _part(request: Request, after: After = None, skip: Skip = 0, limit: Limit = 100) -> Slice:
    return Slice(skip, limit, services(request).settings.max_reply_bytes, after or None)


# Which page of a list is asked for.
Part = Annotated[Slice, Depends(_part)]


def including(names: Sequence[str]) -> Any:
    """The parameter `include` of a route that can add these objects."""
    one = f" *({'|'.join(re.escape(name) for name in names)})? *"
    return Query(
        max_length=200,
        description=f"What to add under `included`, with commas: {', '.join(f'`{name}`' for name in names)}.",
        json_schema_extra={"pattern": f"^{one}(,{one})*$"},
    )


# For a filter with a name that says what it compares.
ONLY = Query(description="Only those with this value.")


def json_reply(document: object, headers: Mapping[str, str] | None = None) -> Response:
    """200 with this document."""
    return Response(encode(document), headers=headers, media_type="application/json")


def send(reply: Reply) -> Response:
    """What a write answered, now or the first time."""
    headers = {"Idempotency-Status": "replayed"} if reply.replayed else None
    if reply.standings:
        headers = fields(reply.standings)
    return Response(reply.body, reply.status, headers, None if reply.status == 204 else "application/json")
