"""Whether the rate of a plain retry, memory and tables stay as they are for minutes."""

from statistics import median

from benchmarks.load import Pressure
from benchmarks.measure import Case, Group, Sample, Target, figure, markdown, number
from benchmarks.memory import resident
from benchmarks.world import Data, World, run_id

SLICE = 10.0  # seconds
TIMES = 100  # as long as another measure

SIZES = """
SELECT relname AS name, pg_total_relation_size(relid) / 1e6 AS mb, n_live_tup AS rows, n_dead_tup AS dead
FROM pg_stat_user_tables ORDER BY 2 DESC LIMIT 8
"""


def sustained(world: World, pressure: Pressure) -> Group:
    """Slices of full load on the same runs again and again: between two, those that were retried end as by a report."""
    data = world.database("sustained", 10_000)
    server = world.server_of(data)
    slices = max(3, round(pressure.seconds * TIMES / SLICE))
    each = Pressure(pressure.connections, SLICE, pressure.warmup)
    sizes: list[list[tuple[str, float, int, int]]] = []
    course: list[tuple[float, float]] = []  # the rate and the memory of each slice

    def slope(values: list[float]) -> float:
        """Of a straight line through these, for each minute of load."""
        middle = (len(values) - 1) / 2
        over = sum((place - middle) * value for place, value in enumerate(values))
        return over / sum((place - middle) ** 2 for place in range(len(values))) * 60 / SLICE

    def measure() -> Sample:
        most = server.most(each)
        ids = [run_id(one) for one in data.stock(most)[:most]]
        data.used(most)
        server.retries(pressure, ids=ids)  # its usual size
        data.finish(server.sent)
        sizes.append(_sizes(data))
        seen: list[Sample] = []
        for _ in range(slices):
            seen.append(server.retries(each, ids=ids))
            course.append((seen[-1].rate, resident(server.app) / 1e6))
            data.finish(server.sent)
        sizes.append(_sizes(data))
        rates, memory = [one.rate for one in seen], [mb for _, mb in course[-slices:]]
        return Sample(
            median(rates),
            median(one.p50 for one in seen),
            max(one.p99 for one in seen),
            {
                **{name: median(one.figures[name] for one in seen) for name in seen[0].figures},
                "lowest": min(rates),
                "%/min": 100 * slope(rates) / median(rates),
                "RSS MB": memory[-1],
                "RSS MB/min": slope(memory),
            },
        )

    def told() -> str:
        before, after = ({one[0]: one for one in found} for found in sizes[-2:])
        rows = [
            [name, number(before[name][1]) if name in before else "", number(mb), f"{rows:,}", f"{dead:,}"]
            for name, mb, rows, dead in after.values()
        ]
        lines = markdown(["table", "MB before", "MB after", "rows", "dead"], rows)
        each_slice = [[f"{place + 1}", number(rate), number(mb)] for place, (rate, mb) in enumerate(course[-slices:])]
        return "\n".join([*lines, "", *markdown(["slice", "per second", "RSS MB"], each_slice), ""])

    return Group(
        "sustained",
        f"plain retries for {slices * SLICE:.0f} s in slices of {SLICE:.0f} s, {pressure.connections} connections",
        [Case("retry", measure, "p99: of the worst slice")],
        [
            Target("rate: percent a minute", figure("retry", "%/min"), at_least=-2),
            Target("memory: MB a minute", figure("retry", "RSS MB/min"), at_most=2),
        ],
        appendix=told,
        beside="PostgreSQL with its autovacuum, load",
        rounds=1,
    )


def _sizes(data: Data) -> list[tuple[str, float, int, int]]:
    return [(row["name"], float(row["mb"]), row["rows"], row["dead"]) for row in data.sql(SIZES)]
