"""Temporal with everything around it; one set that tests share, which leave it running."""

from collections.abc import Iterator

import pytest

from tests.support.client import Client
from tests.support.handoff import HandOff, handing_over
from tests.support.server import Server
from tests.support.stack import Stack, own_database


@pytest.fixture(scope="package")
def handoff(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandOff]:
    """With a workflow worker. No other server works on its database."""
    with own_database(stack, "handoff") as own, handing_over(own, tmp_path_factory.mktemp("temporal")) as made:
        made.worker()
        yield made


@pytest.fixture(scope="package")
def handing_server(handoff: HandOff) -> Server:
    return handoff.server()


@pytest.fixture
def client(handing_server: Server) -> Iterator[Client]:
    """Of an organization that only this test uses."""
    with handing_server.client() as client:
        yield client
