"""One page of a list: how many items there are, which of them the page shows, and whether it would be too large.

Pages are never cut short: callers add `limit` to `skip`. One that would be too large is refused, with a limit that fits. What
is listed, and how its rows are read and shown, is known elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from app.errors import Invalid
from app.stores.database import Connection, Record
from app.stores.statements import Statement, composed, fragment


@dataclass(frozen=True, slots=True)
class Listing:
    """A list in descending order; all of this is SQL.

    `source` is a table and its alias, `order` names its columns, of which the last one is the key of a row.
    `octets` is about how many bytes of JSON a row takes; `row` is the condition that finds it by `listed.key`.
    """

    name: str
    source: str
    octets: str
    row: str
    order: tuple[str, ...] = ("created_at", "id")


@dataclass(frozen=True, slots=True)
class Slice:
    """Which part of a list a page shows, and how many bytes it may have."""

    skip: int
    limit: int
    max_bytes: int

    def shown(self, items: Sequence[object], total: int) -> dict[str, object]:
        """The page as it is sent."""
        return {"items": items, "total": total, "skip": self.skip, "limit": self.limit}


def where(alias: str, **values: object) -> tuple[str, dict[str, object]]:
    """A condition and its values; None means any. Names that end in `_from` and `_to` are ends of a range that are in it."""
    given = {name: value for name, value in values.items() if value is not None}
    return " AND ".join(f"{alias}.{_compared(name)} :{name}" for name in given), given


def _compared(name: str) -> str:
    if name.endswith("_from"):
        return f"{name.removesuffix('_from')} >="
    return f"{name.removesuffix('_to')} <=" if name.endswith("_to") else f"{name} ="


async def find(
    connection: Connection, listing: Listing, branches: tuple[str, ...], part: Slice, **values: object
) -> tuple[list[object], int]:
    """The keys of the rows that a page shows, in order, and how many rows there are in all.

    `branches` are conditions that exclude each other; `values` are theirs and those of the listing. Raises Invalid if the page
    would have more than one row and more bytes than it may.
    """
    statement = _find(listing, branches)
    found = await connection.fetchrow(statement, skip=part.skip, limit=part.limit, max_bytes=part.max_bytes, **values)
    assert found is not None  # noqa: S101 - it has no FROM
    if found["over"] is not None:
        sentence = f"The page would have more than {part.max_bytes} bytes; limit={found['over'] - 1} fits."
        raise Invalid((("query", "limit"), sentence, "page_too_large"))
    return found["keys"], found["total"]


async def page(
    connection: Connection, listing: Listing, rows: Statement, condition: str, part: Slice, **values: object
) -> tuple[list[Record], int]:
    """The rows of a page, as `rows` reads those of `:ids`, and how many there are in all. Raises Invalid as `find` does."""
    ids, total = await find(connection, listing, (condition,), part, **values)
    return await connection.fetch(rows, ids=ids) if ids else [], total


@lru_cache(maxsize=256)
def _find(listing: Listing, branches: tuple[str, ...]) -> Statement:
    """A statement for each shape of a request, made once.

    Keys are found before any row is read that is wide. Then the rows are weighed one after the other, no further than to
    the first that is too much.
    """
    total = " + ".join(f"(SELECT count(*) FROM {listing.source} WHERE {branch})" for branch in branches)
    columns, newest_first = ", ".join(listing.order), ", ".join(f"{column} DESC" for column in listing.order)
    chosen = [f"SELECT {columns} FROM {listing.source} WHERE {branch}" for branch in branches]
    if len(chosen) > 1:
        # Each branch gives its own newest, in the order of an index; the page is cut from their merge.
        each = f"ORDER BY {newest_first} LIMIT :skip::bigint + :limit::bigint"
        merged = " UNION ALL ".join(f"({one} {each})" for one in chosen)
        chosen = [f"SELECT {columns} FROM ({merged}) AS merged"]
    return composed(
        f"{listing.name}.find",
        fragment(
            f"""
            WITH chosen AS MATERIALIZED (
                {chosen[0]} ORDER BY {newest_first} OFFSET :skip::bigint LIMIT :limit::bigint
            ), listed AS MATERIALIZED (
                SELECT {listing.order[-1]} AS key, row_number() OVER (ORDER BY {newest_first}) AS n FROM chosen
            ), weighed AS (
                SELECT n, sum((SELECT {listing.octets} FROM {listing.source} WHERE {listing.row}))
                              OVER (ORDER BY n ROWS UNBOUNDED PRECEDING) AS octets
                FROM listed
            )
            SELECT {total} AS total, ARRAY(SELECT key FROM listed ORDER BY n) AS keys,
                   (SELECT n FROM weighed WHERE n > 1 AND octets > :max_bytes::bigint LIMIT 1) AS over
            """
        ),
    )


def in_order(source: str) -> str:
    """FROM for the rows of `:ids` in that order. One by one: a join planned on an empty table would read all of a full one."""
    table = source.partition(" ")[0]
    return (
        "unnest(:ids::uuid[]) WITH ORDINALITY AS page (id, n)"
        f" CROSS JOIN LATERAL (SELECT * FROM {table} WHERE id = page.id LIMIT 1) AS {source.rpartition(' ')[2]}"
    )
