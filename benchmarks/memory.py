"""Peak memory of a server process, by Linux's own high-water mark. Elsewhere it reads as NaN."""

import math
import sys
from pathlib import Path

from dev.stack import Part


class PeakMemory:
    """Growth beyond what the process held when this was made."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._base = _read(part, "VmRSS")

    def reset(self) -> None:
        """Let the high-water mark start again from what is held now."""
        if sys.platform == "linux":
            Path(f"/proc/{self._part.pid}/clear_refs").write_text("5", encoding="ascii")

    def growth(self) -> float:
        """Bytes."""
        return _read(self._part, "VmHWM") - self._base


def resident(part: Part) -> float:
    """Bytes that the process holds now."""
    return _read(part, "VmRSS")


def _read(part: Part, name: str) -> float:
    if sys.platform != "linux":
        return math.nan
    for line in Path(f"/proc/{part.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)
