"""Stacks of their own for the attacks: they read the whole list of deletions, turn clocks and break parts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.stack import Bao, Postgres
from tests.conftest import Stack, migrate


def own_stack(folder: Path, **settings: str) -> Iterator[Stack]:
    with Postgres(folder, fsync=False) as postgres, Bao(folder) as bao:
        migrate(postgres, **settings)
        yield Stack(folder, postgres, bao, **settings)


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For attacks that leave the parts alone."""
    # Twenty requests wait in one queue for one row on a machine that does other things: that is no fault.
    yield from own_stack(tmp_path_factory.mktemp("attacked"), DATABASE_TIMEOUT_SECONDS="5")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For attacks that freeze and kill parts; each test leaves them running."""
    yield from own_stack(tmp_path_factory.mktemp("broken"))
