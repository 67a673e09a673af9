"""What each statement of a retry costs the database, by pg_stat_statements: a plan that went wrong shows here first."""

import re
from functools import partial

from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, markdown, number
from benchmarks.world import Data, World

OBSERVED = {"shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "all"}

DEAREST = """
SELECT query, calls, total_exec_time * 1000 AS us, shared_blks_hit + shared_blks_read AS blocks FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY total_exec_time DESC LIMIT 12
"""


def statements(world: World, pressure: Pressure) -> Group:
    server = world.beside("observed", OBSERVED).server
    server.retries(pressure)  # plans are made, connections open
    server.data.sql("CREATE EXTENSION pg_stat_statements")
    server.data.stock(20_000)
    server.data.sql("SELECT pg_stat_statements_reset()")
    [before] = server.data.sql("SELECT count(*) FROM run_attempts")
    return Group(
        "statements",
        "what a retry costs by statement, background work included",
        [Case("retry", partial(server.retries, pressure), "observed by pg_stat_statements")],
        appendix=partial(_table, server.data, before["count"]),
    )


def _table(data: Data, before: int) -> str:
    seen = data.sql(DEAREST)
    [after] = data.sql("SELECT count(*) FROM run_attempts")
    retries = after["count"] - before
    rows = [
        [
            re.sub(r"\s+", " ", row["query"]).replace("|", "")[:70],
            *(number(row[name] / retries) for name in ("calls", "us", "blocks")),
            number(row["us"] / row["calls"]),
        ]
        for row in seen
    ]
    return "\n".join([*markdown(["statement", "calls", "us", "blocks", "us a call"], rows), ""])
