"""One server process, and clients for it."""

import secrets

from dev.run import App
from dev.stack import free_port
from tests.support.client import Client
from tests.support.fork_server import ForkedApp
from tests.support.stack import Stack


class Server:
    """One server process and clients for it."""

    def __init__(self, stack: Stack, app: App) -> None:
        self.stack = stack
        self.app = app
        self.url = app.url

    def client(self, organization: str | None = None, *, key: str | None = None) -> Client:
        organization = organization or f"org-{secrets.token_hex(6)}"
        key = key or self.stack.new_key(organization)
        headers = {"Authorization": f"Bearer {key}"}
        # There is no TLS here; reading the list of authorities would cost more than most tests' requests.
        client = Client(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)
        client.organization = organization
        return client


def start_server(stack: Stack, **settings: object) -> Server:
    """A server process; the caller stops it with `server.app.stop()`."""
    # Several processes on one port, and metrics that they share, are set up while modules are imported.
    kind = App if "WORKERS" in settings else ForkedApp
    port = free_port()
    environment = stack.environment(PORT=port, **settings)
    return Server(stack, kind(stack.folder / f"server-{port}", f"http://127.0.0.1:{port}", environment).start())
