"""The demo's machine: takes the runs of the demo organization, works for a few seconds and reports. Part of `make run`.

It is the executor of `examples/` with other work: it reads a run's secrets in OpenBao itself, by their aliases, with a token
that reads those of the demo organization and nothing else.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from dev.demo import PASSWORD, WORK_SECONDS
from examples.executor import Done, WorkFailed, serve


def work(values: dict[str, Any], secrets: dict[str, Any], files: list[Path]) -> Done:
    """Pretend to log in to an application and to post the files."""
    time.sleep(WORK_SECONDS)
    if secrets.get("password") != PASSWORD:
        raise WorkFailed("The application refused the password. Retry with the one that `make run` prints.")
    output = {
        "receipt": f"R-{int(time.time())}",
        "amount": values.get("amount"),
        "files": {file.name: file.stat().st_size for file in files},
    }
    history = [
        {"role": "user", "content": "Log in, open the invoice and post it."},
        {"role": "assistant", "content": f"Logged in and posted it; the receipt is {output['receipt']}."},
    ]
    return Done(output, f"Receipt {output['receipt']}: {output['amount']} posted.\n".encode(), history)


def main() -> None:
    if "TEMPORAL_ADDRESS" not in os.environ:
        serve(work)
        return
    from examples import temporal_executor  # installed only for `make run TEMPORAL=1`

    asyncio.run(temporal_executor.serve(lambda _, *given: work(*given)))


if __name__ == "__main__":
    main()
