"""The PACS admin's limits as they act on a running retrieval."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LONGEST_SLEEP = 1.0


class RateLimit:
    """Hold a rate over all associations of a run: a leaky bucket that sleeps after each read.

    Parameters
    ----------
    bytes_per_second : int
        The rate over all who share this object.
    clock, sleep : callable
        Injected by tests.
    """

    def __init__(
        self,
        bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._clock, self._sleep = clock, sleep
        self._mutex = threading.Lock()
        self._free_at = clock()

    def __call__(self, size: int) -> None:
        """Account for ``size`` bytes that were read, and wait as long as the rate asks."""
        with self._mutex:
            now = self._clock()
            self._free_at = max(self._free_at, now) + size / self._rate
            wait = self._free_at - now
        if wait > 0:
            self._sleep(min(wait, _LONGEST_SLEEP))
