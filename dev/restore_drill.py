"""A drill of backup and restore: dump the database, restore the dump beside it, and compare the copy with the stores.

    make restore-drill

It takes the stack that `make run` has started, or the one that the environment names. It changes nothing of it: the dump is
restored into a database of its own, the files are copied into a temporary folder, and both are removed afterwards. Secrets stay
in Vault: the comparison looks at their names. Exit status 0: everything that the restored database names is there.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg

from dev.running import NoStackError, facts, find

TABLES = ("workflows", "machines", "pools", "runs", "run_outputs", "run_attempts", "run_attachments", "api_keys")
COUNTS = " UNION ALL ".join(f"SELECT '{table}' AS name, count(*) AS rows FROM {table}" for table in TABLES)


class DrillFailed(Exception):
    """A step did not work, or the copy is not what was dumped."""


def in_database(url: str, name: str) -> str:
    """The same server and role, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def run(command: list[str], environment: Mapping[str, str], *, shown: str = "", may_differ: bool = False) -> str:
    """What the command prints. Raises DrillFailed; passwords in URLs are not shown."""
    began = time.monotonic()
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode > (1 if may_differ else 0):
        raise DrillFailed(f"{shown or command[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{time.monotonic() - began:5.1f} s  {shown or command[0]}", flush=True)
    return done.stdout


async def dump(owner: str, file: Path, environment: Mapping[str, str]) -> dict[str, int]:
    """Dump the database while the service goes on; returns the rows of each table, as the dump has them."""
    connection = await asyncpg.connect(owner)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
            counts = await rows(connection)
            command = ["pg_dump", "-Fc", f"--snapshot={snapshot}", "-f", str(file), owner]
            await asyncio.to_thread(run, command, environment, shown="pg_dump -Fc")
    finally:
        await connection.close()
    return counts


async def rows(connection: asyncpg.Connection) -> dict[str, int]:
    """The rows of each table."""
    return {row["name"]: row["rows"] for row in await connection.fetch(COUNTS)}


async def execute(owner: str, sql: str) -> None:
    connection = await asyncpg.connect(owner)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def drill(environment: Mapping[str, str]) -> None:
    """Dump, restore, migrate and compare. Raises DrillFailed."""
    owner, app = environment["DATABASE_OWNER_URL"], environment["DATABASE_URL"]
    files = Path(unquote(urlsplit(environment["STORAGE_URL"]).path))
    name = f"restore_drill_{uuid4().hex[:8]}"
    copy = in_database(owner, name)
    with tempfile.TemporaryDirectory(prefix="restore-drill-") as folder:
        dumped, restored = Path(folder) / "runs.dump", Path(folder) / "files"
        before = await dump(owner, dumped, environment)
        shutil.copytree(files, restored)  # after the dump: it has every file that the dump names
        await execute(owner, f"CREATE DATABASE {name}")
        try:
            run(["pg_restore", "--exit-on-error", "-d", copy, str(dumped)], environment, shown="pg_restore")
            there = {**environment, "DATABASE_OWNER_URL": copy, "DATABASE_URL": in_database(app, name)}
            there["STORAGE_URL"] = restored.as_uri()
            there.pop("SERVER_KEY", None)  # a comparison needs none
            run([sys.executable, "-m", "app", "migrate"], there, shown="python -m app migrate")
            connection = await asyncpg.connect(copy)
            try:
                after = await rows(connection)
            finally:
                await connection.close()
            command = [sys.executable, "-m", "app", "stores", "compare"]
            found = run(command, there, shown="python -m app stores compare", may_differ=True)
        finally:
            await execute(owner, f"DROP DATABASE {name} WITH (FORCE)")
    print("Rows: " + ", ".join(f"{table} {count}" for table, count in after.items()))
    if after != before:
        raise DrillFailed(f"The restored database has other rows than the dump: {before}.")
    # Secrets and files that the dump does not name are of later requests, and do no harm.
    missing = [line for line in found.splitlines() if line.startswith("missing")]
    if missing:
        raise DrillFailed("\n".join(missing))
    print("The restored database has all its rows, and the stores have everything that it names.")


def environment() -> dict[str, str]:
    """Of the stack that `make run` has started, unless the environment names a database. Raises NoStackError."""
    own = dict(os.environ)
    if "DATABASE_OWNER_URL" in own:
        return own
    data_dir = find()
    return own | facts(data_dir) | {"PATH": f"{data_dir / 'bin'}:{own['PATH']}"}


def main() -> int:
    try:
        asyncio.run(drill(environment()))
    except (DrillFailed, NoStackError) as problem:
        print(f"The drill failed: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
