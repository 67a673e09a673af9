"""One run as a caller reads it: all of it or some of its keys, with a tag for `If-None-Match`.

The tag is weak and made by the database, from the versions of the run's row and of its outputs' row, from what is computed on
reading, and from the keys that are shown. To make it, no long column is read.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app import __version__
from app.access.auth import SEEN, Principal
from app.errors import RunNotFound
from app.limits import memory_budget
from app.runs import projection
from app.runs.listing import FIELDS, PRODUCED, bits, if_shown, is_shown
from app.stores.database import Connection, Database
from app.stores.statements import statement

# Keys that are computed on reading. Whatever else a reply shows is in one of the two rows.
_COMPUTED = (
    *("machine_id", "scheduling_reason", "next_retry_at", "retries_left"),
    *("input_attachment_ids", "output_attachment_ids"),
)

_WHOLE = f"""
    FROM (
        SELECT {", ".join(f"{if_shown(name, column)} AS {name}" for name, column in projection.RUN_COLUMNS.items())},
            r.xmin::text AS run_version, o.version AS outputs_version
        FROM runs r {projection.RUN_SOURCE} LEFT JOIN LATERAL (
            SELECT *, xmin::text AS version FROM run_outputs
            WHERE {is_shown(*PRODUCED)} AND run_id = r.id AND attempt = r.attempt LIMIT 1
        ) AS o ON true
        WHERE r.id = :run_id AND {SEEN} OFFSET 0
    ) AS whole
"""
_TAGGED = f"json_build_array(:salt::text, run_version, outputs_version, {', '.join(_COMPUTED)})"
_TAG = f"""'W/"' || left(encode(sha256(convert_to({_TAGGED}::text, 'UTF8')), 'hex'), 32) || '"'"""
_SHOWN = ", ".join(projection.RUN_COLUMNS)

TAG = statement("runs.tag", f"SELECT {_TAG} {_WHOLE}")
READ = statement("runs.read", f"SELECT {_SHOWN}, {_TAG} AS tag {_WHOLE} WHERE {projection.OCTETS} <= :most::bigint")
WEIGH = statement("runs.read.weigh", f"SELECT {projection.OCTETS} {_WHOLE}")


@dataclass(frozen=True, slots=True)
class Tagged:
    """A run, and the tag of this reply; no run if the caller has it already."""

    tag: str
    run: dict[str, Any] | None


async def read(
    database: Database,
    run_id: UUID,
    principal: Principal,
    fields: Collection[str] = FIELDS,
    known: Collection[str] = (),
) -> Tagged:
    """These keys of a run, unless its tag is `known`. A long run waits for room in memory.

    Raises RunNotFound, QuotaExceeded and Overloaded.
    """
    # A later version may show more, or show it otherwise.
    named: dict[str, Any] = {"run_id": run_id, "shown": bits(fields), **principal.sees()}
    salted = named | {"salt": ",".join((__version__, *sorted(fields)))}

    async def find() -> Tagged:
        async with database.connection() as connection:
            if known:
                tag = await connection.fetchval(TAG, **salted)
                if tag is None:
                    raise RunNotFound
                if tag in known:
                    return Tagged(tag, None)
            return await _find(connection, named, salted, fields)

    return await memory_budget.with_room(find)


async def _find(
    connection: Connection, named: dict[str, Any], salted: dict[str, Any], fields: Collection[str]
) -> Tagged:
    row = await connection.fetchrow(READ, **salted, most=projection.ORDINARY_BYTES)
    while row is None:  # rarely: it is long, and perhaps longer now
        octets = await connection.fetchval(WEIGH, **named)
        if octets is None:
            raise RunNotFound
        memory_budget.reserve_reply(octets)
        row = await connection.fetchrow(READ, **salted, most=octets)
    run = projection.run(row)
    tag = run.pop("tag")
    return Tagged(tag, {name: value for name, value in run.items() if name in fields})
