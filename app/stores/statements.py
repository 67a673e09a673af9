"""Statements: SQL or SQLAlchemy Core, compiled by SQLAlchemy once (those of lists at their first use); asyncpg runs them.

Parameters have names, in the SQL (`:run_id`) and in the call (`run_id=...`), and a missing or unknown one is a TypeError. The
name of a statement leads its SQL as a comment, so that logs, pg_stat_statements and spans speak of the same thing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
from sqlalchemy import ColumnElement, TextClause, literal_column, text
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

_DIALECT = sqlalchemy_asyncpg.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy leaves dialects untyped
_NAME = re.compile(r"[a-z_]+(\.[a-z_]+)+")

# Every statement of the service by its name, for the tests that prepare and plan all of them.
REGISTRY: dict[str, "Statement"] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """SQL as asyncpg takes it, and the names of its $1, $2, ... in that order."""

    name: str
    sql: str
    parameters: tuple[str, ...]
    values: Mapping[str, object] = field(default_factory=dict)  # for a list that was composed for one request

    def arguments(self, given: Mapping[str, object]) -> list[object]:
        """The values in the order of the SQL. Raises TypeError for a missing or an unknown name."""
        values = {**self.values, **given} if self.values else given
        try:
            found = [values[name] for name in self.parameters]
        except KeyError as missing:
            raise TypeError(f"{self.name} needs {missing}") from None
        if len(found) != len(values):
            raise TypeError(f"{self.name} has no {', '.join(sorted(values.keys() - set(self.parameters)))}")
        return found


def statement(name: str, written: str | ClauseElement) -> Statement:
    """A statement that is compiled now and kept in the registry.

    `written` is SQL with `:names`, or SQLAlchemy Core. Raises TypeError for a name that is taken or a value that is not
    spelled out: a constant that PostgreSQL does not see cannot match a partial index (use `constant`).
    """
    if not _NAME.fullmatch(name) or name in REGISTRY:
        raise TypeError(f"{name} is taken or is no name of a statement")
    made = REGISTRY[name] = _compiled(name, fragment(written) if isinstance(written, str) else written)
    if made.values:
        raise TypeError(f"{name} has values without a name: {', '.join(made.values)}")
    return made


def composed(name: str, written: ClauseElement) -> Statement:
    """A list with conditions that depend on the request: compiled for this request, with the values that it was made of."""
    return _compiled(name, written)


def constant(value: str) -> ColumnElement[str]:
    """A text of ours that stands in the SQL itself."""
    return literal_column("'" + value.replace("'", "''") + "'")


def fragment(written: str) -> TextClause:
    """SQL with `:names`, as a part of a statement of SQLAlchemy's."""
    return text(
        written.strip().replace("::", r"\:\:")
    )  # else it would read the cast in `:values::json` as part of a name


def rows_of(table: str, ids: str) -> str:
    """A subquery for the rows of `table` with one of the `:ids`, and the place of each as `tid`.

    Each is looked up by its key, before anything else is asked of it. With `id = ANY (...)`, a join, or a condition that
    another index could serve, a plan that was made while the table was short reads all of an index when it is long.
    """
    return (
        f"(SELECT one.* FROM unnest(:{ids}::uuid[]) AS wanted (id),"
        f" LATERAL (SELECT ctid AS tid, * FROM {table} WHERE id = wanted.id OFFSET 0) AS one)"
    )


def loose_scan(
    name: str,
    key: str,
    source: str,
    *,
    after: str = "",
    columns: str = "",
    order: str = "",
    beyond: str = "",
    most: str = "",
) -> str:
    """A part of WITH RECURSIVE: the first row of each value of `key`, in the order of an index, and its number `n` from 1.

    One look into the index finds each value, however many rows have it; SELECT DISTINCT would read all rows. `source` is a
    table and its condition. `after` is where the scan begins; `beyond` says what comes after a row of the scan, if that
    is not the row's own value; `most` limits the number of values. Values are not null.
    """
    columns, order = f"{key}{columns and ', '}{columns}", f"{key}{order and ', '}{order}"
    column = key.rpartition(".")[2]
    begin = f" AND {key} > {after}" if after else ""
    end = f" WHERE {name}.n < {most}" if most else ""
    return f"""{name} AS (
        (SELECT 1::bigint AS n, {columns} FROM {source}{begin} ORDER BY {order} LIMIT 1)
        UNION ALL
        SELECT {name}.n + 1, next.* FROM {name} CROSS JOIN LATERAL (
            SELECT {columns} FROM {source} AND {key} > {beyond or f"{name}.{column}"} ORDER BY {order} LIMIT 1
        ) AS next{end}
    )"""


def locked(table: str, ids: str, strength: str, where: str = "true") -> str:
    """SQL that locks those rows of `table` in the order of their ids, and selects the ids.

    Each is looked up by its key, as in `rows_of`. `where` is about its other columns; a row that it excludes is not locked.
    """
    return f"""
    SELECT one.id FROM (SELECT DISTINCT unnest(:{ids}::uuid[]) AS id ORDER BY id) AS wanted,
         LATERAL (SELECT id FROM {table} WHERE id = wanted.id AND {where} {strength} OFFSET 0) AS one
    """


def by_id(table: str, ids: str, where: str = "true") -> str:
    """A condition for those rows of `table` with one of the `:ids`, looked up like that; `where` speaks of `one`.

    Only for rows that this transaction has locked: those stay where they are.
    """
    return f"ctid = ANY (ARRAY(SELECT tid FROM {rows_of(table, ids)} AS one WHERE {where}))"


def _compiled(name: str, clause: ClauseElement) -> Statement:
    compiled = clause.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - what a dialect makes of anything but DDL
    parameters = tuple(compiled.positiontup or ())
    values = {key: compiled.params[key] for key in parameters if not _is_open(compiled, key)}
    return Statement(name, f"/* {name} */ {compiled}", parameters, values)


def _is_open(compiled: SQLCompiler, key: str) -> bool:
    """Whether a parameter gets its value in the call."""
    bound = compiled.binds.get(key)
    return bound is not None and bound.required


def json_bytes(value: object) -> bytes | None:
    """A value as our connections take it for a `json` column; None is NULL."""
    return None if value is None else orjson.dumps(value)
