"""Peak memory of a server process, by Linux's own high-water mark. Elsewhere it reads as NaN."""

import math
import sys
from pathlib import Path

from dev.stack import Part


class PeakMemory:
    """Growth beyond what the process held when this was made."""

    def __init__(self, part: Part) -> None:
        self._folder = Path(f"/proc/{part.pid}")
        self._base = self._read("VmRSS")

    def reset(self) -> None:
        """Let the high-water mark start again from what is held now."""
        if sys.platform == "linux":
            (self._folder / "clear_refs").write_text("5", encoding="ascii")

    def growth(self) -> float:
        """Bytes."""
        return self._read("VmHWM") - self._base

    def _read(self, name: str) -> float:
        if sys.platform != "linux":
            return math.nan
        for line in (self._folder / "status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise ValueError(name)
