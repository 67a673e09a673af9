"""One page of a list: how many items there are, which of them the page shows, and whether it would be too large.

Pages are never cut short: callers add `limit` to `skip`, or go on from the page's `next`. One that would be too large is
refused, with a limit that fits. Other files know the lists, and how rows are read and shown.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from app.errors import Invalid
from app.limits import memory_budget
from app.stores.cursors import cursor, place_after, place_bound, place_written
from app.stores.database import Connection, Database, Record, StatementTimeout
from app.stores.list_totals import EXACT, SECONDS, Total
from app.stores.statements import Statement, composed, fragment, statement


@dataclass(frozen=True, slots=True)
class Listing:
    """A list in descending order, unless it is `ascending`; all else of this is SQL.

    `source` is a table and its alias, `order` names its columns, of which the last one is the key of a row.
    `octets` is about how many bytes of JSON a row takes; `row` is the condition that finds it by `listed.key`.
    """

    name: str
    source: str
    octets: str
    row: str
    order: tuple[str, ...] = ("created_at", "id")
    ascending: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a list that a page shows, and how many bytes it may have. `after` is `next` of the page before."""

    skip: int
    limit: int
    max_bytes: int
    after: str | None = None

    def shown(self, items: Sequence[object], found: "Found") -> dict[str, object]:
        """The page as it is sent."""
        return {
            "items": items,
            "total": found.total.rows,
            "total_is_estimate": found.total.is_estimate,
            "skip": self.skip,
            "limit": self.limit,
            "next": found.next,
        }


@dataclass(frozen=True, slots=True)
class Found:
    """The rows of a page in order, how many the list has in all, and the cursor to go on from; None at the end."""

    rows: list[Record]
    total: Total
    next: str | None
    is_partial: bool = False  # not all rows that the filter leaves were looked at (scans.py)


def where(alias: str, **values: object) -> tuple[str, dict[str, object]]:
    """A condition and its values; None means any. Names that end in `_from` and `_to` are ends of a range that are in it."""
    given = {name: value for name, value in values.items() if value is not None}
    return " AND ".join(f"{alias}.{_compared(name)} :{name}" for name in given), given


def _compared(name: str) -> str:
    if name.endswith("_from"):
        return f"{name.removesuffix('_from')} >="
    return f"{name.removesuffix('_to')} <=" if name.endswith("_to") else f"{name} ="


Read = Callable[[Connection, list[Any]], Awaitable[list[Any]]]


async def page(
    database: Database,
    listing: Listing,
    branches: Sequence[str],
    part: Slice,
    values: Mapping[str, object],
    read: Statement | Read,
    *,
    counted: Sequence[str] | None = None,
    **weighed: object,
) -> Found:
    """The rows of a page, and how many there are in all.

    `branches` are conditions that exclude each other, and `values` theirs; `weighed` are those of the listing. `read` reads the
    rows with these keys: a statement with `:ids`, or a function. `counted` are conditions that mean the same and are counted
    faster. Raises Invalid for a page of more than one row and more bytes than it may have, for a cursor that is none of this
    list's, and for a `skip` that takes too long; QuotaExceeded; Overloaded when there is no room for it in time.
    """
    counted = tuple(counted or branches)
    following = {} if part.after is None else place_after(listing.name, listing.order, part.after)
    many = _Many(database, listing, counted, values)
    if part.skip > EXACT and (total := await many.total()).rows <= part.skip and not total.is_estimate:
        return Found([], total, None)  # rows beyond the end are not looked for
    is_long = many.is_long()

    async def find() -> tuple[Record, list[Record]]:
        async with _in_time(database, part) as connection:
            found = await connection.fetchrow(
                _find(listing, tuple(branches), counted, is_after=part.after is not None),
                skip=part.skip,
                limit=part.limit,
                max_bytes=part.max_bytes,
                counts=not is_long,
                **{**values, **following, **weighed},
            )
            assert found is not None  # noqa: S101 - it has no FROM
            return found, await rows_of(connection, read, list(found["keys"]), found["weight"], part)

    found, rows = await memory_budget.with_room(find)
    # No connection is held while others' counts are waited for.
    total = Total(found["total"]) if not is_long and found["total"] <= EXACT else await many.total()
    return Found(rows, total, None if found["last"] is None else cursor(listing.name, found["last"]))


async def rows_of(
    connection: Connection, read: Statement | Read, keys: list[Any], weight: Sequence[int] | None, part: Slice
) -> list[Any]:
    """The rows with these keys. `weight`: a number of rows from the first on, and their bytes; that of all, or of too many.

    Raises Invalid for a page that would be too large, and NoRoom.
    """
    shown, octets = weight or (0, 0)
    if shown > 1 and octets > part.max_bytes:
        sentence = f"The page would have more than {part.max_bytes} bytes; limit={shown - 1} fits."
        raise Invalid((("query", "limit"), sentence, "page_too_large"))
    memory_budget.reserve_reply(octets)
    if not keys:
        return []
    return await (connection.fetch(read, ids=keys) if isinstance(read, Statement) else read(connection, keys))


async def count(database: Database, listing: Listing, branches: Sequence[str], values: Mapping[str, object]) -> Total:
    """How many rows a list has in all; of a long one, within the last second."""
    return await _Many(database, listing, tuple(branches), values).total()


@asynccontextmanager
async def _in_time(database: Database, part: Slice) -> AsyncIterator[Connection]:
    """A connection. Skipped rows are read, too: far into a long list that takes longer than the statement timeout."""
    try:
        async with database.connection() as connection:
            yield connection
    except StatementTimeout:
        if part.skip <= EXACT:
            raise
        sentence = "Passing over so many items takes too long; go on from a page's `next` by after= instead."
        raise Invalid((("query", "skip"), sentence, "skip_too_large")) from None


# --- the statements ---------------------------------------------------------------------------------------------------


def newest_first(order: Sequence[str], *, ascending: bool = False) -> str:
    """ORDER BY; `ascending`: the oldest first."""
    return ", ".join(f"{column} {'ASC' if ascending else 'DESC'}" for column in order)


def following(listing: Listing, branches: Sequence[str], limit: str, *, is_after: bool) -> str:
    """SQL for the order's columns of all rows, or of those after a place; without ORDER BY if there is one branch.

    If there are several, each branch gives its own newest, no more than `limit`, in the order of an index; the list is cut from
    their merge.
    """
    columns, order = ", ".join(listing.order), newest_first(listing.order, ascending=listing.ascending)
    after = ""
    if is_after:
        after = f"AND ({columns}) {'>' if listing.ascending else '<'} ({place_bound(listing.order)})"
    chosen = [f"SELECT {columns} FROM {listing.source} WHERE {branch} {after}" for branch in branches]
    if len(chosen) == 1:
        return chosen[0]
    merged = " UNION ALL ".join(f"({one} ORDER BY {order} LIMIT {limit})" for one in chosen)
    return f"SELECT {columns} FROM ({merged}) AS merged"


@lru_cache(maxsize=256)
def _find(listing: Listing, branches: tuple[str, ...], counted: tuple[str, ...], *, is_after: bool) -> Statement:
    """A statement for each shape of a request, made once.

    Keys are found before any row is read that is wide. Then the rows are weighed one after the other, no further than to
    the first that is too much. Rows are counted no further than to see that a list is long.
    """
    total = " + ".join(
        f"(SELECT count(*) FROM (SELECT FROM {listing.source} WHERE {branch} LIMIT {EXACT + 1}) AS few)"
        for branch in counted
    )
    order = newest_first(listing.order, ascending=listing.ascending)
    chosen = following(listing, branches, ":skip::bigint + :limit::bigint + 1", is_after=is_after)
    return composed(
        f"{listing.name}.find",
        fragment(
            f"""
            WITH chosen AS MATERIALIZED (  -- and one more, which says whether there is more
                {chosen} ORDER BY {order} OFFSET :skip::bigint LIMIT :limit::bigint + 1
            ), listed AS MATERIALIZED (
                SELECT *, {listing.order[-1]} AS key, row_number() OVER (ORDER BY {order}) AS n FROM chosen
                ORDER BY {order} LIMIT :limit::bigint
            ), weighed AS (
                SELECT n, sum((SELECT {listing.octets} FROM {listing.source} WHERE {listing.row}))
                              OVER (ORDER BY n ROWS UNBOUNDED PRECEDING) AS octets
                FROM listed
            )
            SELECT CASE WHEN :counts::boolean THEN {total} END AS total, ARRAY(SELECT key FROM listed ORDER BY n) AS keys,
                   (SELECT ARRAY[n, octets::bigint] FROM weighed
                    WHERE (n > 1 AND octets > :max_bytes::bigint) OR n = (SELECT count(*) FROM listed) LIMIT 1) AS weight,
                   (SELECT {place_written(listing.order)} FROM listed
                    WHERE n = :limit::bigint AND (SELECT count(*) FROM chosen) > n) AS last
            """
        ),
    )


@lru_cache(maxsize=256)
def _count(listing: Listing, branches: tuple[str, ...]) -> Statement:
    total = " + ".join(f"(SELECT count(*) FROM {listing.source} WHERE {branch})" for branch in branches)
    return composed(f"{listing.name}.count", fragment(f"SELECT {total} AS total"))


@lru_cache(maxsize=256)
def _estimate(listing: Listing, branches: tuple[str, ...]) -> Statement:
    rows = " UNION ALL ".join(f"(SELECT FROM {listing.source} WHERE {branch})" for branch in branches)
    return composed(f"{listing.name}.estimate", fragment(f"EXPLAIN (FORMAT JSON) {rows}"))


PATIENCE = statement("lists.patience", "SELECT set_config('statement_timeout', :milliseconds::text, true)")


class _Many:
    """A list that may be long, and the count of it that this process shares."""

    def __init__(
        self, database: Database, listing: Listing, branches: tuple[str, ...], values: Mapping[str, object]
    ) -> None:
        self._database = database
        self._listing = listing
        self._branches = branches
        self._values = values
        self._key = (listing.name, branches, tuple(sorted(values.items())))

    def is_long(self) -> bool:
        return self._database.counts.is_long(self._key)

    async def total(self) -> Total:
        """A long list: the count of the last second. A short list: the count as of now."""
        total, is_own = await self._database.counts.get(self._key, self._counted)
        return total if is_own or total.rows > EXACT else await self._counted()

    async def _counted(self) -> Total:
        """All of them; where that takes too long, what PostgreSQL expects."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute(PATIENCE, milliseconds=str(self._database.at_most_ms(SECONDS)))
                return Total(await connection.fetchval(_count(self._listing, self._branches), **self._values))
        except StatementTimeout:
            async with self._database.connection() as connection:
                plan = await connection.fetchval(_estimate(self._listing, self._branches), **self._values)
            return Total(max(EXACT + 1, int(orjson.loads(plan)[0]["Plan"]["Plan Rows"])), is_estimate=True)


def in_order(source: str) -> str:
    """FROM for the rows of `:ids` in that order. One by one: a join planned on an empty table would read all of a full one."""
    table = source.partition(" ")[0]
    return (
        "unnest(:ids::uuid[]) WITH ORDINALITY AS page (id, n)"
        f" CROSS JOIN LATERAL (SELECT * FROM {table} WHERE id = page.id LIMIT 1) AS {source.rpartition(' ')[2]}"
    )
