"""A physical standby of a PostgreSQL."""

import shutil
from pathlib import Path

from dev.stack import Postgres


class Standby(Postgres):
    """A copy of a running primary that follows it, with the same roles and passwords."""

    def __init__(self, data_dir: Path, primary: Postgres) -> None:
        super().__init__(data_dir, fsync=primary.fsync)
        self._primary = primary

    def _creating(self, folder: Path) -> list[str]:
        for name in ("password", "app-password"):
            shutil.copy(self._primary.folder / name, self.folder / name)
        source = f"{self._primary.url}?application_name={self.name}"
        command = [self._binary("pg_basebackup"), "-d", source, "-D", str(folder)]
        return [*command, "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync"]

    def _status(self) -> str:
        found = super()._status()
        return "ready" if found == "standby" else found

    def _ensure_database(self) -> None:
        """It has what the primary has."""
