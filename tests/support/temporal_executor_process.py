"""An executor process that Temporal brings its runs to: the example's, whose work is a line in a file.

The settings of examples/temporal_executor.py, and BEGUN: the file. A run's `input_values` have its `number`, and perhaps
`seconds`, how long its work takes. Each line is what happened (`begun`, `called_off`), the number and when. With GIVES_UP it
ends an attempt without a report.
"""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from examples.executor import Done, Superseded
from examples.temporal_executor import serve


class GivesUp(httpx.HTTPError):
    """As if the service could not be reached: the attempt is not reported. Its text holds all that the executor has."""

    def __init__(self, *given: object) -> None:
        super().__init__(repr(given))


def work(stopped: threading.Event, values: dict[str, Any], secrets: dict[str, Any], files: list[Path]) -> Done:
    note("begun", values["number"])
    if "GIVES_UP" in os.environ:
        raise GivesUp(values, secrets)
    if stopped.wait(values.get("seconds", 0.05)):
        note("called_off", values["number"])
        raise Superseded
    return Done({"number": values["number"], "secrets": len(secrets)}, b"done")


def note(what: str, number: object) -> None:
    """In one write, so that no line is torn."""
    descriptor = os.open(os.environ["BEGUN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {number} {time.time()}\n".encode())
    os.close(descriptor)


if __name__ == "__main__":
    asyncio.run(serve(work))
