"""What is measured, group by group. Cases of one group take turns; targets are ratios within a round."""

from collections.abc import Callable

from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Round, Target
from benchmarks.pgbench import SixStatements
from benchmarks.world import RETRY_BODY, World


def rate(case: str, against: str) -> Callable[[Round], float]:
    return lambda one: one[case].rate / one[against].rate


def p50(case: str, against: str) -> Callable[[Round], float]:
    return lambda one: one[case].p50 / one[against].p50


def retry(world: World, pressure: Pressure) -> Group:
    server, bare = world.server, world.bare
    six = SixStatements(world.postgres, world.small, world.folder)
    clients = pressure.connections
    return Group(
        "retry",
        f"without files and secrets, {clients} connections, one worker",
        [
            Case("retry", lambda: server.retries(pressure)),
            Case("f", lambda: bare.repeat(pressure, "POST", "/v1/runs/{id}/retry", body=RETRY_BODY), "bare FastAPI"),
            Case("g", lambda: six.on_plain_tables(clients, 8000 // clients), "pgbench, plain tables"),
            Case("g own", lambda: six.on_own_tables(clients, 4800 // clients), "pgbench, the service's tables"),
            Case("retry+key", lambda: server.retries(pressure, "Idempotency-Key: {id}"), "with Idempotency-Key"),
        ],
        [
            Target("retry / f", rate("retry", "f"), at_least=0.20),
            Target("retry / g", rate("retry", "g"), at_least=0.25),
            Target("retry / g own", rate("retry", "g own")),
            Target("retry+key / retry", rate("retry+key", "retry"), at_least=0.85),
            Target("retry p99 / p50", lambda one: one["retry"].p99 / one["retry"].p50, at_most=5),
            Target("load generator busy at f", lambda one: one["f"].figures["client busy"], at_most=0.8),
        ],
    )


GROUPS: dict[str, Callable[[World, Pressure], Group]] = {"retry": retry}
