"""Two versions of the service in turns: this checkout and another, each with a PostgreSQL and an OpenBao of its own.

A ratio within a round says what a change gave on a machine whose load differs from hour to hour. The measuring is this
checkout's for both, so the other one must know what is asked of it.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import Group, Sample, markdown, number

# Of a case, what is compared beside its rate and p50: figures of which less is better.
COSTS = ("app us", "db us", "vault us")


Turns = dict[str, list[tuple[Sample, Sample]]]

# What a release must keep of the one before: the least ratio of rates by case. p50 of one connection may be 1.05 times as long.
KEPT = {"retry": 0.95, "retry 64c": 0.95, "retry+key": 0.95, "secret": 0.95, "1 MB file": 0.95, "retry 1c": 0.95}


def in_turns(ours: Group, other: Group, rounds: int, say: Callable[[str], None]) -> Turns:
    """The cases of both groups in turns; who goes first changes from round to round."""
    seen: dict[str, list[tuple[Sample, Sample]]] = {case.name: [] for case in ours.cases}
    for turn in range(rounds):
        for mine, theirs in zip(ours.cases, other.cases, strict=True):
            if turn % 2 == 0:
                one, two = mine.measure(), theirs.measure()
            else:
                two, one = theirs.measure(), mine.measure()
            seen[mine.name].append((one, two))
            rates = f"{one.rate:,.1f}/s, other {two.rate:,.1f}/s"
            say(f"  {turn + 1}/{rounds} {mine.name}: {rates}, p50 {one.p50:.2f} and {two.p50:.2f} ms")
    return seen


def row(name: str, seen: Turns) -> tuple[str, list[str]]:
    """A line of the history of releases, as Markdown, and what got slower than KEPT allows."""
    cells, slower = [name], []
    for case, samples in seen.items():
        ratio = median(one.rate / two.rate for one, two in samples)
        app = _ratio([(one.figures["app us"], two.figures["app us"]) for one, two in samples])
        database = _ratio([(one.figures.get("db us", 0), two.figures.get("db us", 0)) for one, two in samples])
        cells.append(f"{ratio:.2f} ({app}, {database})" if database else f"{ratio:.2f}")
        if ratio < KEPT.get(case, 0):
            slower.append(
                f"{case}: {ratio:.2f} times the rate of the release before, and at least {KEPT[case]} is wanted"
            )
    return f"| {' | '.join(cells)} |", slower


def compare(ours: Group, seen: Turns) -> str:
    """What `in_turns` has seen, as Markdown."""
    rows = []
    for name, samples in seen.items():
        ratios = [one.rate / two.rate for one, two in samples if two.rate]
        figures = [(one.figures, two.figures) for one, two in samples]
        costs = [_ratio([(one.get(cost, 0), two.get(cost, 0)) for one, two in figures]) for cost in COSTS]
        rows.append(
            [
                name,
                number(median(one.rate for one, _ in samples)),
                number(median(two.rate for _, two in samples)),
                f"{median(ratios):.3f}" if ratios else "",
                f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "",
                _ratio([(one.p50, two.p50) for one, two in samples]),
                *costs,
            ]
        )
    header = ["", "per second", "other", "ratio", "rounds", "p50 ratio", *(f"{cost} ratio" for cost in COSTS)]
    return "\n".join([f"### {ours.name}: this checkout / the other", "", *markdown(header, rows), ""])


def _ratio(pairs: list[tuple[float, float]]) -> str:
    ratios = [one / two for one, two in pairs if two]
    return f"{median(ratios):.3f}" if ratios else ""


def checkout(text: str) -> Path:
    """The folder of another checkout. Raises ValueError for anything else."""
    folder = Path(text).resolve()
    if not (folder / "app" / "main.py").is_file():
        raise ValueError(f"{text} is no checkout of this project")
    return folder
