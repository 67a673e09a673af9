"""The real thing: each worker has its own PostgreSQL and OpenBao, and drives the real server process over HTTP."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.server import Server, start_server
from tests.support.stack import Stack, own_stack
from tests.support.waiting import NEVER

pytest_plugins = ("tests.support.browser",)

# A shell lets what it starts in the background ignore Ctrl-C, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m alone` imports only the files that have such tests: the others take ten seconds."""
    if config.option.markexpr == "alone" and collection_path.match("test_*.py"):
        return "pytest.mark.alone" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole demos take longest, so they begin first: whatever begins last, the other workers wait for."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that most tests of a worker share; each test has organizations of its own."""
    with own_stack(tmp_path_factory.mktemp("stack")) as made:
        yield made


@pytest.fixture(scope="session")
def server(stack: Stack) -> Iterator[Server]:
    started = start_server(stack)
    yield started
    started.app.stop()


@pytest.fixture(scope="session")
def quiet_server(stack: Stack) -> Iterator[Server]:
    """A server that does nothing by itself within a test: what changes follows from a request and its commit."""
    started = start_server(stack, BACKGROUND_PERIOD_SECONDS=NEVER)
    yield started
    started.app.stop()


@pytest.fixture
def api(server: Server) -> Iterator[Client]:
    """A client of an organization that only this test uses."""
    with server.client() as client:
        yield client


@pytest.fixture
def foreign(server: Server) -> Iterator[Client]:
    """A client of another organization."""
    with server.client() as client:
        yield client
