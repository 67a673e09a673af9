"""The command line as a user runs it: a process of its own against the real service."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "clients" / "cli"


@dataclass
class Terminal:
    """Runs `runs ...` with one key, in a home folder of its own."""

    url: str
    key: str
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": str(PACKAGE),
            "RUNS_API_URL": self.url,
            "RUNS_API_KEY": self.key,
            "COLUMNS": "200",
        } | more

    def run(
        self, *arguments: str, status: int = 0, given: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Fails the test unless the command ends with this status, and without a traceback."""
        done = subprocess.run(
            [sys.executable, "-m", "runs_cli.main", *arguments],
            input=given,
            env=self.environment(**(environment or {})),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def terminal(api: Client, server: Server, tmp_path: Path) -> Terminal:
    return Terminal(server.url, api.headers["authorization"].split()[1], tmp_path)
