"""The clock that every side is measured by."""

import time
from collections.abc import Callable


def timed(once: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of so many calls, which have done their work when they return."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return seconds
