"""`make observe`: Prometheus beside `make run`, with the shipped scrape configuration and alerts, until Ctrl-C.

Needs Prometheus (Debian: apt install prometheus); PROMETHEUS names one that is not on the path.
"""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from dev import running
from dev.stack import Part, StackError, free_port, http, port_problem, private_folder

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
MISSING = "Prometheus is not installed (Debian: apt install prometheus); PROMETHEUS names one that is not on the path."


def binary() -> str | None:
    """The server's program; promtool lies beside it."""
    return shutil.which(os.environ.get("PROMETHEUS") or "prometheus")


class Prometheus(Part):
    """A server that scrapes one service, with the configuration that is shipped."""

    name = "prometheus"

    def __init__(self, data_dir: Path, target: str, *, port: int | None = None, seconds: int = 15) -> None:
        super().__init__(data_dir.resolve() / self.name)
        self._target = urlsplit(target).netloc
        self._port = port or free_port()
        self._seconds = seconds
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> Self:
        program = binary()
        if program is None:
            raise StackError(MISSING)
        self.stop_leftover()
        private_folder(self.folder)
        text = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:8000", self._target)
        text = text.replace("alerts.yml", str(DEPLOY / "prometheus" / "alerts.yml"))
        text = re.sub(r"_interval: 15s", f"_interval: {self._seconds}s", text)
        config = self.folder / "prometheus.yml"
        config.write_text(text, encoding="utf-8")
        options = {"config.file": config, "storage.tsdb.path": self.folder / "data", "log.level": "warn"}
        options["web.listen-address"] = urlsplit(self.url).netloc
        command = [program, *(f"--{name}={value}" for name, value in options.items())]
        self.launch(command, {"PATH": os.environ.get("PATH", os.defpath)})
        self.wait_until(self._ready)
        return self

    def _ready(self) -> bool:
        try:
            return http("GET", f"{self.url}/-/ready", seconds=2)[0] == 200
        except OSError:
            return False


def main() -> None:
    try:
        data_dir = running.find()
    except running.NoStackError as none:
        sys.exit(str(none))
    target = running.facts(data_dir)["API_URL"]
    port = int(os.environ.get("PROMETHEUS_PORT") or 9090)
    if problem := port_problem(port):
        sys.exit(f"Port {port} cannot be used: {problem}. Choose another: make observe PROMETHEUS_PORT={free_port()}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with Prometheus(data_dir, target, port=port, seconds=5) as prometheus:
            print(f"""
Prometheus scrapes {target} every 5 s.

  Graphs    {prometheus.url}/graph?g0.expr=sum%20by%20(outcome)%20(rate(runs_retries_total%5B1m%5D))&g0.tab=0
  Alerts    {prometheus.url}/alerts
  Targets   {prometheus.url}/targets
  Dashboard import {DEPLOY / "grafana" / "runs.json"} into a Grafana with {prometheus.url} as its data source

Grafana itself comes from no package registry that this project uses. Ctrl-C stops Prometheus.""")
            while prometheus.running:
                time.sleep(0.2)
            sys.exit(f"{prometheus.tail()}\n\nPrometheus has ended by itself; its log is {prometheus.log}")
    except KeyboardInterrupt:
        print("\nStopped.")
    except (StackError, OSError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
