"""The example's executors for many machines in one process: `python -m benchmarks.executors`.

With TEMPORAL_ADDRESS they get their runs from Temporal, else each waits by long poll for its own of MACHINE_IDS. Their work
is a line in the file BEGUN: the run's number, and when.
"""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import hvac

from examples import temporal_executor
from examples.executor import Done, Executor


def work(values: dict[str, Any], _secrets: dict[str, Any], _files: list[Path]) -> Done:
    """In one write, so that no line is torn."""
    descriptor = os.open(os.environ["BEGUN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{values.get('number', '-')} {time.time()}\n".encode())
    os.close(descriptor)
    return Done({"receipt": "R-1"}, b"done")


def by_long_poll() -> None:
    setting = os.environ
    headers = {"Authorization": f"Bearer {setting['API_KEY']}"}
    limits = httpx.Limits(max_connections=None)
    api = httpx.Client(base_url=setting["API_URL"], headers=headers, timeout=60, limits=limits)
    vault = hvac.Client(url=setting["VAULT_ADDR"], token=setting["VAULT_TOKEN"], timeout=10)
    desks = [
        threading.Thread(target=Executor(api, vault, machine_id, work).serve)
        for machine_id in setting["MACHINE_IDS"].split(",")
    ]
    for desk in desks:
        desk.start()


if __name__ == "__main__":
    if "TEMPORAL_ADDRESS" in os.environ:
        asyncio.run(temporal_executor.serve(lambda _, *given: work(*given)))
    else:
        by_long_poll()
