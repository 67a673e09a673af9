"""The demo in the stack of docker-compose.yml: makes a run to retry, prints how, and is the executor of its machine."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from dev import demo, executor
from dev.stack import http

RETENTION = timedelta(days=1)  # SECRET_RETENTION_SECONDS of the stack


def main() -> None:
    state = Path(os.environ["STATE"])
    ready = state / "ready"
    ready.unlink(missing_ok=True)
    token = Path(os.environ["VAULT_TOKEN_FILE"]).read_text(encoding="utf-8").strip()
    vault, url, shown = os.environ["VAULT_ADDR"], os.environ["API_URL"], os.environ["SHOWN_URL"]

    def has_secret(alias: str) -> bool:
        place = urlsplit(alias)
        path = f"{vault}/v1/{place.netloc}/data{place.path}"
        return http("GET", path, headers={"X-Vault-Token": token})[0] == 200

    facts = demo.ensure(state / "demo.json", url, has_secret=has_secret, create_key=_create_key, retention=RETENTION)
    print(f"Console   {shown}/console/   API key {facts.api_key}")
    print(f"API       {shown}/docs")
    print(demo.command(shown, facts), flush=True)
    ready.touch()
    os.environ |= {"API_KEY": facts.executor_key, "MACHINE_ID": facts.machine_id, "VAULT_TOKEN": token}
    executor.main()


def _create_key(organization: str, machine_id: str | None = None) -> str:
    bound = ["--machine", machine_id, "--name", "executor"] if machine_id else []
    command = [sys.executable, "-m", "app", "keys", "create", "--organization", organization, *bound]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"An API key could not be made:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
