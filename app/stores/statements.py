"""Statements: what SQLAlchemy writes, as asyncpg takes it."""

import orjson
from sqlalchemy.dialects.postgresql import asyncpg as sqlalchemy_asyncpg
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

_DIALECT = sqlalchemy_asyncpg.dialect()  # type: ignore[no-untyped-call] # SQLAlchemy leaves dialects untyped


def sql(statement: ClauseElement) -> tuple[str, list[object]]:
    """A SQLAlchemy Core statement as asyncpg takes it: text with $1, $2, ... and the values in that order."""
    compiled = statement.compile(dialect=_DIALECT)
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - what a dialect makes of anything but DDL
    return str(compiled), [compiled.params[name] for name in compiled.positiontup or ()]


def json_text(value: object) -> str | None:
    """A value as asyncpg takes it for a `json` column; None is NULL."""
    return None if value is None else orjson.dumps(value).decode()
