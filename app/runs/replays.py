"""What a resend of a write on runs is shown: nothing of a run that is gone; and the run as it is now, if only ids were kept."""

from collections.abc import Sequence
from uuid import UUID

import orjson

from app.access.auth import SEEN, Principal
from app.errors import PayloadTooLarge, RunNotFound
from app.idempotency import Resource
from app.runs import listing, projection
from app.stores.database import Connection
from app.stores.documents import encode
from app.stores.statements import rows_of, statement

LEFT = statement("runs.replays.left", f"SELECT r.id FROM {rows_of('runs', 'run_ids')} AS r WHERE {SEEN}")


async def refuse_gone(connection: Connection, principal: Principal, run_id: UUID) -> None:
    """Raises RunNotFound for a run that is gone. One of a key's own replies may be shown wherever its run is now."""
    if not await connection.fetch(LEFT, run_ids=[run_id], organization_id=principal.organization_id, bound_to=None):
        raise RunNotFound


async def _show_run(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
    return encode(await projection.get(connection, ids[0], principal))


async def _left_of_run(connection: Connection, principal: Principal, ids: Sequence[UUID], body: bytes) -> bytes:
    await refuse_gone(connection, principal, ids[0])
    return body


# The one run of a retry, a report or a create.
RUN = Resource(_show_run, _left_of_run)


def bulk(runs: Sequence[object]) -> bytes:
    """The reply of a bulk: these runs."""
    return encode({"created_runs": runs, "failed_count": 0, "errors": []})


async def _left(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> set[UUID]:
    return {row["id"] for row in await connection.fetch(LEFT, run_ids=ids, **principal.sees())}


async def _left_of_bulk(connection: Connection, principal: Principal, ids: Sequence[UUID], body: bytes) -> bytes:
    left = await _left(connection, principal, ids)
    if len(left) == len(ids):
        return body
    return bulk([run for run in orjson.loads(body)["created_runs"] if UUID(run["id"]) in left])


def bulk_resource(max_reply_bytes: int) -> Resource:
    """All runs of a bulk that are left. Raises PayloadTooLarge for more bytes."""

    async def show(connection: Connection, principal: Principal, ids: Sequence[UUID]) -> bytes:
        left = await _left(connection, principal, ids)
        runs = await listing.read(connection, [run_id for run_id in ids if run_id in left], max_reply_bytes)
        if runs is None:
            raise PayloadTooLarge(
                f"The request has succeeded. As its runs are now, they have more than {max_reply_bytes} bytes; "
                "read them with GET /v1/runs."
            )
        return bulk(runs)

    return Resource(show, _left_of_bulk)
