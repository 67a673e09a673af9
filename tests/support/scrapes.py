"""What Prometheus would see: a scrape, as values by name and labels."""

import re
from collections.abc import Mapping

import httpx

# Name, and the labels in order.
Series = tuple[str, tuple[tuple[str, str], ...]]

_LINE = re.compile(r"([a-z_:]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


class Scrape:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self.values: dict[Series, float] = {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                self.types[name] = kind
            elif not line.startswith("#"):
                name, labels, value = _LINE.fullmatch(line).groups()  # type: ignore[union-attr] # else the test fails
                key = name, tuple(sorted(_LABEL.findall(labels or "")))
                assert key not in self.values, f"shown twice: {key}"
                self.values[key] = float(value)

    def value(self, name: str, **labels: str) -> float | None:
        """Of one series; None if it is not there."""
        return self.values.get((name, tuple(sorted(labels.items()))))

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series that have these labels."""
        return sum(
            value
            for (found, has), value in self.values.items()
            if found == name and labels.items() <= dict(has).items()
        )

    def counts(self) -> Mapping[Series, float]:
        """Whatever may never fall."""
        gauges = {name for name, kind in self.types.items() if kind == "gauge"}
        return {key: value for key, value in self.values.items() if key[0] not in gauges}


def scrape(url: str, token: str | None = None) -> Scrape:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    reply = httpx.get(f"{url}/metrics", headers=headers, timeout=30, trust_env=False, verify=False)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(reply.text)
