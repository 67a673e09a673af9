"""An executor process as there may be two of on a machine: it is the example's, and its work is a line in a file.

API_URL=... API_KEY=... MACHINE_ID=... BEGUN=FILE python -m tests.support.executor_process
"""

import os
import random
import time
from pathlib import Path
from typing import Any

from examples.executor import Done, serve


def work(values: dict[str, Any], secrets: dict[str, Any], files: list[Path]) -> Done:
    """Say that this run was begun, in one write, and take a moment."""
    descriptor = os.open(os.environ["BEGUN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{values['number']}\n".encode())
    os.close(descriptor)
    time.sleep(random.uniform(0, 0.4))
    return Done({"number": values["number"]}, b"done")


if __name__ == "__main__":
    serve(work)
