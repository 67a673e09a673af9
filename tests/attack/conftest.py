"""Stacks of their own for the attacks: they read the whole list of deletions, turn clocks and break parts."""

from collections.abc import Iterator

import pytest

from tests.support.stack import Stack, own_stack


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For attacks that leave the parts alone."""
    # Twenty requests wait in one queue for one row on a machine that does other things: that is no fault.
    with own_stack(tmp_path_factory.mktemp("attacked"), DATABASE_TIMEOUT_SECONDS="5") as made:
        yield made


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """For attacks that freeze and kill parts; each test leaves them running."""
    with own_stack(tmp_path_factory.mktemp("broken")) as made:
        yield made
