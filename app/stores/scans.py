"""One page of a list with a filter that no index serves. Rows are looked at one by one, in the order of an index.

No more than ROWS rows are looked at for a page, and none after SECONDS. The page says so (`is_partial`), and its cursor goes on
where the scan stopped, also if the page is empty. The total is what was found so far.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from app.limits import memory_budget
from app.stores import cursors, paging, search
from app.stores.database import Connection, Database, StatementTimeout
from app.stores.list_totals import Total
from app.stores.paging import Found, Listing, Read, Slice
from app.stores.statements import Statement, composed, fragment

ROWS: Final = 10_000
SECONDS: Final = 1.0

# A page that is full is not kept waiting for a better total for longer than this.
FULL_SECONDS: Final = 0.2

# How long a slice should take: what is begun is finished.
SLICE_SECONDS: Final = 0.1

# In a cursor: no row is before it.
BEFORE_ALL: Final = f"{cursors.microseconds(datetime.max.replace(tzinfo=UTC))} {UUID(int=2**128 - 1)}"


@dataclass(frozen=True, slots=True)
class Scan:
    """Rows in the order of an index, and which of them are wanted; all of this is SQL, and `values` are its parameters.

    `listing` has the order of the scan; `branches` are conditions that exclude each other and that the index serves; `matches`
    is what each row is asked. `shown` has the order of the list: if that is another one, each page is cut from what a scan
    from the newest row on finds. `slice` is how many rows are looked at first: few, if looking at one may take long.
    `first` are keys of rows that come before all others, which `matches` leaves out.
    """

    listing: Listing
    branches: tuple[str, ...]
    matches: str
    values: Mapping[str, object]
    shown: Listing
    slice: int = ROWS
    first: Sequence[UUID] = ()

    @property
    def goes_on(self) -> bool:
        """Whether a page's cursor is a place in the scan."""
        return self.listing.order == self.shown.order

    @property
    def name(self) -> str:
        """The name in its cursors."""
        return f"{self.shown.name}.scan"


@dataclass(slots=True)
class _Seen:
    """How far a scan has come."""

    after: dict[str, object]
    last: str | None = None  # the last row that was looked at, as a cursor has it
    rows: int = 0
    is_all: bool = False
    found: list[tuple[str, UUID]] = field(default_factory=list)  # with the place of each in the list


async def scan(database: Database, wanted: Scan, part: Slice, read: Statement | Read, **weighed: object) -> Found:
    """The rows of a page. Raises what paging.page raises, but for a `skip` that takes too long."""
    place = {}
    if part.after is not None:
        place = cursors.place_after(wanted.name, (*wanted.shown.order, "found_before"), part.after)
    before = place.pop("after_found_before", 0)
    assert isinstance(before, int)  # noqa: S101 - what its pattern matches
    seen = _Seen(place if wanted.goes_on else {})
    await _look(database, wanted, seen, part.skip + part.limit)
    found, total = seen.found, before + len(seen.found)
    if not wanted.goes_on:
        found, total = sorted(found, key=_newest, reverse=True), len(found) + len(wanted.first)
        if part.after is not None:
            found = [one for one in found if _newest(one) < tuple(_order(value) for value in place.values())]
    elif part.after is None:
        total += len(wanted.first)
    if part.after is None:
        found = [(BEFORE_ALL, key) for key in wanted.first] + found
    shown = found[part.skip : part.skip + part.limit]

    async def read_page() -> list[Any]:
        keys = [key for _, key in shown]
        async with database.connection() as connection:
            weight = await connection.fetchval(_weigh(wanted.shown), ids=keys, max_bytes=part.max_bytes, **weighed)
            return await paging.rows_of(connection, read, keys, weight, part)

    rows = await memory_budget.with_room(read_page)
    following = None
    if len(found) > part.skip + part.limit:
        following = cursors.cursor(wanted.name, f"{shown[-1][0]} {before + part.skip + part.limit}")
    elif wanted.goes_on and not seen.is_all and seen.last is not None:
        following = cursors.cursor(wanted.name, f"{seen.last} {before + len(found)}")
    return Found(rows, Total(total, not seen.is_all), following, not seen.is_all)


async def page_of_search(
    database: Database,
    listing: Listing,
    branches: Sequence[str],
    part: Slice,
    values: Mapping[str, object],
    read: Statement | Read,
    searched: str,
    texts: Sequence[str],
) -> Found:
    """As paging.page; with a text that is searched for, a scan for it in these SQL texts of each row."""
    if not searched:
        return await paging.page(database, listing, branches, part, values, read)
    matches, named = search.found_in(*texts), {**values, "pattern": search.pattern(searched)}
    return await scan(database, Scan(listing, tuple(branches), matches, named, listing), part, read)


def _newest(one: tuple[str, UUID]) -> tuple[int, int]:
    moment, _, key = one[0].partition(" ")
    return int(moment), UUID(key).int


def _order(value: object) -> int:
    return value.int if isinstance(value, UUID) else cursors.microseconds(value)


async def _look(database: Database, wanted: Scan, seen: _Seen, enough: int) -> None:
    """Look at rows until there are no more, or they were enough, or it took long enough."""
    began, size = time.monotonic(), wanted.slice
    try:
        async with database.transaction() as connection:
            if size < ROWS:
                await connection.execute(paging.PATIENCE, milliseconds=str(database.at_most_ms(SECONDS)))
            while not seen.is_all:
                started = time.monotonic()
                await _look_on(connection, wanted, seen, min(size, ROWS - seen.rows) or 1)
                now = time.monotonic()
                if seen.rows > ROWS or now - began > (FULL_SECONDS if len(seen.found) > enough else SECONDS):
                    return
                size = max(1, min(ROWS, 4 * size, int(size * SLICE_SECONDS / max(now - started, 0.001))))
    except StatementTimeout:
        if seen.rows == 0:  # else it would stop at the same row each time
            async with database.connection() as connection:
                await _look_on(connection, wanted, seen, 1)


async def _look_on(connection: Connection, wanted: Scan, seen: _Seen, size: int) -> None:
    """Look at `size` more rows. One more than ROWS only says that there are more."""
    statement = _look_at(wanted.listing, wanted.branches, wanted.matches, wanted.shown, is_after=bool(seen.after))
    row = await connection.fetchrow(statement, slice=size, **wanted.values, **seen.after)
    assert row is not None  # noqa: S101 - an aggregate
    seen.is_all = row["seen"] < size
    if seen.rows == ROWS:
        seen.rows += row["seen"]
        return
    seen.rows += row["seen"]
    seen.found += zip(row["places"], row["keys"], strict=True)
    if row["last"] is not None:
        seen.last = row["last"]
        seen.after = cursors.read_place(wanted.listing.order, row["last"])


@lru_cache(maxsize=256)
def _look_at(listing: Listing, branches: tuple[str, ...], matches: str, shown: Listing, *, is_after: bool) -> Statement:
    """A statement for each shape of a request, made once."""
    order, columns = paging.newest_first(listing.order), ", ".join(listing.order)
    table, alias = listing.source.partition(" ")[0], listing.source.rpartition(" ")[2]
    key = listing.order[-1]
    of_row = ", ".join(f"{alias}.{name}" for name in shown.order)
    return composed(
        f"{listing.name}.scan",
        fragment(
            f"""
            SELECT count(*)::integer AS seen, max(place) FILTER (WHERE n = :slice::bigint) AS last,
                   coalesce(array_agg(key ORDER BY n) FILTER (WHERE is_found), '{{}}') AS keys,
                   coalesce(array_agg(shown ORDER BY n) FILTER (WHERE is_found), '{{}}') AS places
            FROM (
                SELECT looked.n, looked.place, looked.{key} AS key, ({matches}) AS is_found,
                       (SELECT {cursors.place_written(shown.order)} FROM (SELECT {of_row}) AS one) AS shown
                FROM (
                    SELECT {columns}, {cursors.place_written(listing.order)} AS place, row_number() OVER (ORDER BY {order}) AS n
                    FROM ({paging.following(listing, branches, ":slice::bigint", is_after=is_after)}
                          ORDER BY {order} LIMIT :slice::bigint) AS chosen
                ) AS looked
                CROSS JOIN LATERAL (SELECT * FROM {table} WHERE {key} = looked.{key} LIMIT 1) AS {alias}
                OFFSET 0  -- else each row would be asked twice, once for each of the arrays
            ) AS asked
            """
        ),
    )


@lru_cache(maxsize=16)
def _weigh(listing: Listing) -> Statement:
    """What rows_of wants to know of these keys: as with pages, no further than to the first row that is too much.

    A row that was deleted since the scan weighs nothing.
    """
    return composed(
        f"{listing.name}.weigh",
        fragment(
            f"""
            SELECT ARRAY[n, octets::bigint] FROM (
                SELECT n, sum(coalesce((SELECT {listing.octets} FROM {listing.source} WHERE {listing.row}), 0))
                          OVER (ORDER BY n ROWS UNBOUNDED PRECEDING) AS octets
                FROM unnest(:ids::uuid[]) WITH ORDINALITY AS listed (key, n)
            ) AS weighed
            WHERE (n > 1 AND octets > :max_bytes::bigint) OR n = cardinality(:ids::uuid[]) LIMIT 1
            """
        ),
    )
