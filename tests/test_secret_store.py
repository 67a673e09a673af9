"""Another store of secrets can take Vault's place: nothing in app/runs knows which one it is (stores/secrets.py)."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from uuid import UUID, uuid4

import orjson
from pydantic import JsonValue

from app.access.auth import Principal
from app.idempotency import Reply, WriteRequest
from app.runs.create import create
from app.runs.retry import Retry, retry_runs
from app.schemas.runs import RunCreate, RunRetry
from app.services import Services
from app.stores.outages import Outage
from app.stores.secrets import SecretStore
from tests.support.client import Client
from tests.support.stack import Stack, settings_of


class InMemory:
    """A store of secrets that a process forgets."""

    writes_at_once = 4
    webhooks_problem = None

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix  # as Vault's, whose collector meets these paths, too
        self.outage = Outage("memory")
        self.kept: dict[str, Mapping[str, JsonValue]] = {}

    def new_path(self, organization_id: str, run_id: UUID) -> str:
        return f"{self._prefix}/{organization_id}/{run_id}/{uuid4().hex}"

    new_webhook_path = new_path

    def size(self, values: Mapping[str, JsonValue]) -> int:
        return len(orjson.dumps(values))

    def aliases(self, values: Mapping[str, JsonValue]) -> Callable[[str], dict[str, str]]:
        return lambda path: {name: f"memory://{path}#{name}" for name in values}

    async def write(self, path: str, values: Mapping[str, JsonValue], *, deadline: float) -> None:
        self.kept[path] = values

    async def read(self, path: str, *, is_shown: bool = False) -> dict[str, str] | None:
        return {name: str(value) for name, value in self.kept[path].items()}

    async def destroy(self, path: str) -> None:
        self.kept.pop(path, None)

    async def problem(self) -> str | None:
        return None

    async def close(self) -> None: ...


def test_runs_keep_their_secrets_in_another_store(stack: Stack, api: Client) -> None:
    [key] = stack.sql("SELECT id FROM api_keys WHERE organization_id = $1", api.organization)
    write = WriteRequest(Principal(key["id"], api.organization, None, ["*"]), None, (b"",), 60, 2**16)
    settings = settings_of(stack)
    workflow, memory = UUID(api.workflow()), InMemory(settings.vault_prefix)
    store: SecretStore = memory

    async def main() -> None:
        opened = Services.open(settings)
        services = replace(opened, secrets=store)
        try:
            made = await create(
                services, write, RunCreate(workflow_id=workflow, sensitive_input_values={"password": "first"})
            )
            run = orjson.loads(made.body)
            assert aliased(run) == {"password": "first"}
            api.report(run["id"], status="cancelled")
            again = RunRetry(sensitive_input_values={"password": "second", "code": 7})
            [retried] = await retry_runs(services, [Retry.of(write, UUID(run["id"]), again)])
            assert isinstance(retried, Reply)
            assert aliased(orjson.loads(retried.body)) == {"password": "second", "code": 7}
        finally:
            await services.close()
            await opened.secrets.close()

    def aliased(run: dict[str, dict[str, str]]) -> dict[str, JsonValue]:
        """The values that the run's aliases lead to."""
        shown = run["sensitive_input_aliases"]
        paths = {name: alias.removeprefix("memory://").rpartition("#")[0] for name, alias in shown.items()}
        return {name: memory.kept[path][name] for name, path in paths.items()}

    asyncio.run(asyncio.wait_for(main(), 30))
