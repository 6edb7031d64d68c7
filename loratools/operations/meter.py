"""What a long command cost: wall time and the process's largest resident memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


class Meter:
    """Started when it is made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def read(self) -> dict[str, Any]:
        """`seconds` since the start, and `peak_rss_mb`, None where the system does not tell."""
        return {"seconds": round(time.monotonic() - self._started, 3), "peak_rss_mb": _peak_memory()}


def _peak_memory() -> float | None:
    """VmHWM in MB; getrusage would count that of the parent this process was forked from."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM:")), None)
