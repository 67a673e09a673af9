"""A small executor: the program on a machine that takes its runs, does them and reports. Copy it and replace `work`.

    API_URL=... API_KEY=... VAULT_ADDR=... VAULT_TOKEN=... MACHINE_ID=... python -m examples.executor

API_KEY needs no more than a key that is bound to the machine (`keys create --machine`) can do: to see and report its runs.
VAULT_TOKEN needs no more than policies/executor.hcl gives: to read the secrets of one organization's runs.
"""

import base64
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import httpx
import hvac

LONG_POLL_SECONDS = 30  # the longest the service holds a request for us
TRIES = 30  # of a report, a second apart
TRY_AGAIN = {408, 429, 500, 502, 503, 504}
KEY_REFUSED = (
    "The service refuses this executor's key (401): the key was revoked, has expired, or is not of this service."
    " Make a key with `python -m app keys create --machine`, set API_KEY, and start the executor again."
)


class WorkFailed(Exception):
    """The work went wrong; the message is shown to people, so it must not contain a secret."""


class Superseded(Exception):
    """The attempt is not ours, or no longer: the run was begun by another process on this machine, placed on another machine,
    cancelled, deleted or retried meanwhile. Drop it."""


@dataclass(frozen=True)
class Done:
    """What came of the work."""

    output: dict[str, Any]
    document: bytes
    history: list[dict[str, Any]] = field(default_factory=list)


# The values, secrets and files of a run; raises WorkFailed.
Work = Callable[[dict[str, Any], dict[str, Any], list[Path]], Done]


class Executor:
    """One machine's worker."""

    def __init__(self, api: httpx.Client, vault: hvac.Client, machine_id: str, work: Work) -> None:
        self.api = api
        self.vault = vault
        self.machine_id = machine_id
        self.claim = str(uuid4())  # of this process: if another one works for the machine, one of them begins a run
        self.work = work

    def serve(self) -> None:
        """Until killed: wait for a run, do it. Raises SystemExit if the service refuses the key."""
        while True:
            try:
                if (run := self.take()) is not None:
                    self.execute(run)
            except Superseded:
                say(f"attempt {run['attempt'] if run else '?'} is no longer ours, dropped")
            except httpx.HTTPStatusError as problem:
                if problem.response.status_code == 401:
                    raise SystemExit(KEY_REFUSED) from None
                say(f"the service answered {problem.response.status_code}, again in 1 s")
                time.sleep(1)
            except httpx.HTTPError as problem:
                say(f"the service cannot be reached ({problem}), again in 1 s")
                time.sleep(1)

    def take(self) -> dict[str, Any] | None:
        """The run that was assigned to this machine, as soon as there is one; None after a while without any."""
        reply = self.api.get(
            "/v1/runs",
            params={"machine_id": self.machine_id, "status": "scheduling", "wait": LONG_POLL_SECONDS},
            timeout=LONG_POLL_SECONDS + 10,
        )
        for run in reply.raise_for_status().json()["items"]:
            # machine_id may be a wish (a pinned run that waits); assigned_machine_id is the decision.
            if run["assigned_machine_id"] == self.machine_id:
                found: dict[str, Any] = run
                return found
        return None

    def execute(self, run: dict[str, Any]) -> None:
        """One attempt from `running` to its end.

        If the service cannot be reached for the last report, the run stays `running`: RUN_SILENCE_SECONDS ends such runs.
        """
        self.report(run, status="running")
        say(f"took run {run['id']}, attempt {run['attempt']}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                secrets = self.resolve(run["sensitive_input_aliases"] or {})
                files = self.download(run["input_attachment_ids"], Path(folder))
                say(f"has secrets {sorted(secrets)} and files {[file.name for file in files]}")
                done = self.work(run["input_values"] or {}, secrets, files)
                self.upload(run, "receipt.txt", done.document)
            except WorkFailed as problem:
                self.report(run, status="error", error=[str(problem)])
                say(f"reported error: {problem}")
            except (Superseded, httpx.HTTPError):
                raise
            except Exception as problem:  # noqa: BLE001 - the attempt must end, and unforeseen messages may hold secrets
                self.report(run, status="error", error=[f"The executor failed: {type(problem).__name__}."])
                say(f"failed: {type(problem).__name__}")
            else:
                self.report(run, status="success", output_data=done.output, run_message_history=done.history)
                say(f"reported success: {done.output}")

    def report(self, run: dict[str, Any], **fields: Any) -> None:
        """A PATCH of the run. Raises Superseded."""
        self.send("PATCH", f"/v1/runs/{run['id']}", run, fields)

    def send(self, method: str, path: str, run: dict[str, Any], fields: dict[str, Any]) -> None:
        """A write about our work on a run. Raises Superseded.

        It says what it is about, so that a late one spoils nothing: which attempt, which assignment to a machine, and which
        process. It is sent again until it is answered; its key keeps the second from doing anything.
        """
        about = {"attempt": run["attempt"], "assignment": run["assignment"], "claim": self.claim}
        headers = {"Idempotency-Key": str(uuid4())}
        if run.get("traceparent"):
            headers["traceparent"] = run[
                "traceparent"
            ]  # our reports then stand in the trace of the request that queued it
        for left in reversed(range(TRIES)):
            try:
                reply = self.api.request(method, path, json=about | fields, headers=headers)
            except httpx.TransportError:
                if not left:
                    raise
            else:
                in_progress = "Idempotency-Status" in reply.headers and reply.status_code == 409
                if reply.status_code in (404, 409) and not in_progress:
                    raise Superseded
                if not left or not (in_progress or reply.status_code in TRY_AGAIN):
                    reply.raise_for_status()
                    return
            time.sleep(1)

    def resolve(self, aliases: dict[str, str]) -> dict[str, Any]:
        """Secrets by name, from the aliases of a run.

        vault://<mount>/<path>#<name> is a string, vault+json://<mount>/<path>#<name> any other value as JSON text;
        the name of the variable is percent-encoded.
        """
        documents: dict[tuple[str, str], dict[str, str]] = {}  # all variables of a run are in one secret
        values: dict[str, Any] = {}
        for variable, alias in aliases.items():
            place = urlsplit(alias)
            mount, path = place.netloc, place.path.lstrip("/")
            if (mount, path) not in documents:
                secret = self.vault.secrets.kv.v2.read_secret_version(
                    mount_point=mount, path=path, raise_on_deleted_version=True
                )
                documents[mount, path] = secret["data"]["data"]
            text = documents[mount, path][unquote(place.fragment)]
            values[variable] = json.loads(text) if place.scheme == "vault+json" else text
        return values

    def download(self, attachment_ids: list[str], folder: Path) -> list[Path]:
        """The run's input files, under their own names (the service refuses names that are paths)."""
        files = []
        for attachment_id in attachment_ids:
            described = self.api.get(f"/v1/run-attachments/{attachment_id}").raise_for_status().json()
            file = folder / described["filename"]
            with (
                self.api.stream("GET", f"/v1/run-attachments/{attachment_id}/download") as reply,
                file.open("wb") as to,
            ):
                for chunk in reply.raise_for_status().iter_bytes():
                    to.write(chunk)
            files.append(file)
        return files

    def upload(self, run: dict[str, Any], filename: str, content: bytes) -> None:
        """An output file; refused when the run is no longer running."""
        fields = {
            "run_id": run["id"],
            "filename": filename,
            "content": base64.b64encode(content).decode(),
            "content_type": "text/plain",
            "attachment_type": "output",
        }
        self.send("POST", "/v1/run-attachments", run, fields)


def work(values: dict[str, Any], secrets: dict[str, Any], files: list[Path]) -> Done:
    """What a real executor does on its desktop: here, log in and post each file."""
    if secrets.get("password") != "correct horse":  # what the pretended application accepts
        raise WorkFailed(f"The application refused the password of user {values.get('user')!r}.")
    lines = [f"{file.name}: {len(file.read_bytes())} bytes, posted by {values['user']}\n" for file in files]
    return Done({"posted": len(lines), "booked_on": secrets["account"]["number"]}, "".join(lines).encode())


def say(text: str) -> None:
    print(f"{datetime.now().astimezone():%H:%M:%S.%f}"[:-3], " executor ", text, flush=True)


def serve(work: Work) -> None:
    """As the environment says, until killed."""
    setting = os.environ
    api = httpx.Client(
        base_url=setting["API_URL"], headers={"Authorization": f"Bearer {setting['API_KEY']}"}, timeout=30
    )
    vault = hvac.Client(url=setting["VAULT_ADDR"], token=setting["VAULT_TOKEN"], timeout=10)
    Executor(api, vault, setting["MACHINE_ID"], work).serve()


if __name__ == "__main__":
    serve(work)
