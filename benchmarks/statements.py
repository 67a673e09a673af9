"""What each statement of a request costs the database, by pg_stat_statements: a plan that went wrong shows here first."""

import json
import re
from collections.abc import Callable
from functools import partial

from benchmarks.carried import SECRET_BODY, file_body
from benchmarks.life import WAITING, creations, reports
from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Sample, markdown, number
from benchmarks.placing import ADD_MACHINES, END_ASSIGNED, IDLE, UNPLACED, ending
from benchmarks.world import HISTORY, ORGANIZATION, Data, World, history
from dev.stack import Postgres

OBSERVED = {"shared_preload_libraries": "pg_stat_statements", "pg_stat_statements.track": "all"}

DEAREST = """
SELECT query, calls, total_exec_time * 1000 AS us, shared_blks_hit + shared_blks_read AS blocks FROM pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND userid = (SELECT oid FROM pg_roles WHERE rolname = $1::text)  -- what we do to prepare is not the service's
ORDER BY total_exec_time DESC LIMIT 12
"""


def statements(world: World, pressure: Pressure) -> Group:
    server = world.beside("observed", OBSERVED).server
    data = server.data
    server.retries(pressure)  # plans are made, connections open
    data.sql("CREATE EXTENSION pg_stat_statements")
    data.stock(20_000)
    tables: dict[str, str] = {}

    def observed(name: str, measure: Callable[[], Sample]) -> Case:
        def see() -> Sample:
            data.sql("SELECT pg_stat_statements_reset()")
            seen = measure()
            tables[name] = _table(data, server.requests)
            return seen

        return Case(name, see)

    def placed() -> Sample:
        if data.sql("SELECT count(*) FROM machines")[0]["count"] < IDLE:  # before, the few there are were busy
            data.sql(ADD_MACHINES, ORGANIZATION, IDLE)
        data.end_active()
        with ending(data, END_ASSIGNED):
            return server.retries(pressure, drained=UNPLACED)

    done = {"status": "success", "run_message_history": json.loads(history(HISTORY))}
    return Group(
        "statements",
        "what a request costs by statement, background work included; observed by pg_stat_statements",
        [
            observed("retry", partial(server.retries, pressure)),
            observed("retry, secret", partial(server.retries, pressure, body=SECRET_BODY)),
            observed("retry, file", partial(server.retries, pressure, body=file_body(1024))),
            observed("create", partial(creations, server, pressure)),
            observed("report running", partial(reports, server, pressure, {"status": "running"}, before=WAITING)),
            observed("report success", partial(reports, server, pressure, done)),
            observed("retry, placed", placed),
        ],
        appendix=lambda: "\n".join(f"#### {name}\n\n{table}" for name, table in tables.items()),
        beside="PostgreSQL with pg_stat_statements, load",
        rounds=1,
    )


def _table(data: Data, requests: int) -> str:
    rows = [
        [
            re.sub(r"\s+", " ", row["query"]).replace("|", "")[:70],
            *(number(row[name] / requests) for name in ("calls", "us", "blocks")),
            number(row["us"] / row["calls"]),
        ]
        for row in data.sql(DEAREST, Postgres.app_user)
    ]
    return "\n".join([*markdown(["statement", "calls", "us", "blocks", "us a call"], rows), ""])
