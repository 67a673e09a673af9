"""Switch bounds off one by one, and see that the test of each one fails: `make mutants`, or ARGS="parameters lanes" for some.

The source is copied once. In the copy one text at a time is replaced by another, and one test runs. Without the change it must
pass: run `make test` first.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180  # for one test: one that hangs has noticed, too
NONE = "10**12"


class Mutant(NamedTuple):
    """A bound that is taken out: `text` becomes `instead` in one file, and `test` must fail."""

    name: str
    file: str
    text: str
    instead: str
    test: str


def without(name: str, file: str, constant: str, test: str) -> Mutant:
    """The constant stands at the beginning of a line, and becomes a number that nothing reaches."""
    return Mutant(name, file, f"\n{constant} = ", f"\n{constant} = {NONE}  # ", test)


REFUSED = "tests/test_request_limits.py"
MUTANTS = (
    without("parameters", "app/api/edge.py", "MAX_PARAMETERS", "tests/test_query.py -k hundred"),
    without("head lines", "app/api/server.py", "MAX_HEAD_LINES", "tests/test_connections.py -k many_tiny_headers"),
    without("target", "app/api/server.py", "MAX_TARGET_BYTES", "tests/test_query.py -k 8_kib"),
    without("long heads", "app/api/server.py", "LONG_HEADS_BYTES", "tests/test_connections.py -k long_heads_share"),
    without("errors shown", "app/api/validation.py", "MAX_ERRORS", f"{REFUSED} -k twenty"),
    without("error", "app/schemas/values.py", "MAX_ERROR_BYTES", REFUSED),
    without("line", "app/schemas/values.py", "MAX_LINE", REFUSED),
    without("description", "app/schemas/values.py", "MAX_DESCRIPTION", REFUSED),
    without("pools", "app/schemas/values.py", "MAX_POOLS", REFUSED),
    without("ids", "app/schemas/values.py", "MAX_IDS", f"{REFUSED} -k list_of_ids"),
    without("variables", "app/schemas/values.py", "MAX_VARIABLES", REFUSED),
    without("prompt", "app/schemas/values.py", "MAX_PROMPT_BYTES", REFUSED),
    without("reason", "app/schemas/values.py", "MAX_REASON", "tests/test_events.py"),
    without("endpoints", "app/resources/webhook_endpoints.py", "MAX_ENDPOINTS", "tests/webhooks/test_endpoints.py"),
    without("secrets", "app/resources/webhook_endpoints.py", "MAX_SECRETS", "tests/webhooks/test_endpoints.py"),
    without("answer", "app/webhooks/sending.py", "MAX_ANSWER", "tests/webhooks/test_sending.py"),
    without("answer's head", "app/webhooks/sending.py", "MAX_HEAD", "tests/webhooks/test_sending.py"),
    without("answer's body", "app/webhooks/sending.py", "MAX_BODY", "tests/webhooks/test_sending.py"),
    without("lanes", "app/runs/queue.py", "LANES_SHOWN", "tests/test_dry_run.py -k long_queue"),
    without("automatic retries", "app/schemas/retry_policies.py", "MAX_RETRIES", "tests/test_retry_policies.py"),
    without("rules", "app/schemas/retry_policies.py", "MAX_RULES", "tests/test_retry_policies.py"),
    without("bulk", "app/schemas/bulk.py", "MAX_RUNS", "tests/test_bulk_retries.py"),
    without("keys used", "app/write_behind/key_usage.py", "MOST_KEYS", "tests/test_last_used.py"),
    Mutant(
        "long polls",
        "app/api/request_quotas.py",
        "\nLONG_POLLS_PART = 2",
        "\nLONG_POLLS_PART = 1",
        "tests/test_quotas.py -k half_of_the_connections",
    ),
    Mutant(
        "fan out",
        "app/webhooks/delivery.py",
        "\nFAN_OUTS = 2",
        "\nFAN_OUTS = 10**6",
        "tests/webhooks/test_delivery.py",
    ),
)


def main(chosen: list[str]) -> int:
    if unknown := set(chosen) - {mutant.name for mutant in MUTANTS}:
        sys.exit(
            f"No bound is called {', '.join(sorted(unknown))}. There are: {', '.join(one.name for one in MUTANTS)}."
        )
    failed = []
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        copy.chmod(0o755)  # PostgreSQL runs as another user
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for file in map(Path, filter(None, files.decode().split("\0"))):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        for mutant in MUTANTS:
            if chosen and mutant.name not in chosen:
                continue
            outcome = _outcome(copy, mutant)
            print(f"{mutant.name}: {outcome}", flush=True)
            failed += [mutant.name] * (outcome != "noticed")
    print(f"{len(failed)} not noticed{': ' if failed else '.'}{', '.join(failed)}")
    return 1 if failed else 0


def _outcome(copy: Path, mutant: Mutant) -> str:
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.text) != 1:
        return f"{mutant.file} has {mutant.text.strip()!r} {source.count(mutant.text)} times"
    path.write_text(source.replace(mutant.text, mutant.instead), encoding="utf-8")
    file, _, expression = mutant.test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", file]
    try:
        done = subprocess.run(
            [*command, *(["-k", expression] if expression else [])],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "noticed"
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode == 1:
        return "noticed"
    return f"NOT noticed by {mutant.test} (pytest ended with {done.returncode})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
