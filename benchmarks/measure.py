"""Cases measured in turns (A, B, C, A, B, C, ...), medians over the rounds, and ratios within each round.

A neighbour on the machine slows a whole round more than it changes the order within one; so a target looks at the median
of the rounds' ratios, not at the ratio of two medians.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Round = Mapping[str, "Sample"]


@dataclass(frozen=True)
class Sample:
    """One measurement. Latencies in ms; `figures` are what else was seen (microseconds of CPU, megabytes, ...)."""

    rate: float
    p50: float
    p99: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Something to measure; `note` says in the table what it is."""

    name: str
    measure: Callable[[], Sample]
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A figure of a round, mostly a ratio of two cases, and the bounds it should keep. Without bounds it is only shown.

    `beside` is what shares the cores with what is judged, if that is not what the group says.
    """

    name: str
    value: Callable[[Round], float]
    at_least: float | None = None
    at_most: float | None = None
    beside: str | None = None


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other, so they take turns.

    `beside` is what shares the cores with the service while it is measured: a ratio is what it is only beside the same.
    """

    name: str
    title: str
    cases: Sequence[Case]
    targets: Sequence[Target] = ()
    appendix: Callable[[], str] = str  # more to tell once the cases are measured, as Markdown
    beside: str = "PostgreSQL, load"
    rounds: int = 3


@dataclass(frozen=True)
class Verdict:
    """What became of a target, with its worst and best round."""

    name: str
    value: float
    lowest: float
    highest: float
    bound: str
    met: bool | None
    beside: str


@dataclass(frozen=True)
class Result:
    """The medians of a group."""

    name: str
    title: str
    rounds: int
    cases: dict[str, Sample]
    notes: dict[str, str]
    targets: list[Verdict]
    appendix: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def rate(case: str, against: str) -> Callable[[Round], float]:
    return lambda one: one[case].rate / one[against].rate


def p50(case: str, against: str) -> Callable[[Round], float]:
    return lambda one: one[case].p50 / one[against].p50


def figure(case: str, name: str) -> Callable[[Round], float]:
    return lambda one: one[case].figures[name]


def run(group: Group, rounds: int, say: Callable[[str], None]) -> Result:
    seen: list[dict[str, Sample]] = []
    for number in range(rounds):
        one: dict[str, Sample] = {}
        for case in group.cases:
            one[case.name] = sample = case.measure()
            say(f"  {number + 1}/{rounds} {case.name}: {sample.rate:,.1f}/s, p50 {sample.p50:.2f} ms")
        seen.append(one)
    return Result(
        group.name,
        group.title,
        rounds,
        {case.name: _middle([one[case.name] for one in seen]) for case in group.cases},
        {case.name: case.note for case in group.cases},
        [_judge(target, group, seen) for target in group.targets],
        group.appendix(),
    )


def _middle(samples: Sequence[Sample]) -> Sample:
    return Sample(
        median(sample.rate for sample in samples),
        median(sample.p50 for sample in samples),
        median(sample.p99 for sample in samples),
        {name: median(sample.figures[name] for sample in samples) for name in samples[0].figures},
    )


def _judge(target: Target, group: Group, seen: Sequence[Round]) -> Verdict:
    values = [target.value(one) for one in seen]
    value = median(values)
    met: bool | None = None
    bound = ""
    if target.at_least is not None:
        bound, met = f">= {target.at_least:g}", value >= target.at_least
    elif target.at_most is not None:
        bound, met = f"<= {target.at_most:g}", value <= target.at_most
    return Verdict(target.name, value, min(values), max(values), bound, met, target.beside or group.beside)


def table(result: Result) -> str:
    """The group as Markdown."""
    figures = list(dict.fromkeys(name for sample in result.cases.values() for name in sample.figures))
    header = ["", "per second", "p50 ms", "p99 ms", *figures]
    rows = []
    for name, sample in result.cases.items():
        note = result.notes[name]
        rows.append(
            [
                f"{name} ({note})" if note else name,
                number(sample.rate),
                number(sample.p50),
                number(sample.p99),
                *(number(sample.figures[figure]) if figure in sample.figures else "" for figure in figures),
            ]
        )
    lines = [f"### {result.name}: {result.title}", "", *markdown(header, rows)]
    if result.targets:
        judged = [
            [
                verdict.name,
                f"{verdict.value:.3g}",
                f"{verdict.lowest:.3g} to {verdict.highest:.3g}",
                verdict.bound,
                {True: "met", False: "NOT MET", None: ""}[verdict.met],
                verdict.beside,
            ]
            for verdict in result.targets
        ]
        lines += ["", *markdown(["", "median", "rounds", "target", "", "on the same cores"], judged)]
    return "\n".join([*lines, "", result.appendix])


def number(value: float) -> str:
    """As the tables show it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table; all columns but the first hold numbers."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"-{'-' * widths[0]}-", *(f"-{'-' * width}:" for width in widths[1:])]
    return [line(header), f"|{'|'.join(rule)}|", *map(line, rows)]
