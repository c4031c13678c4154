"""The PACS admin's limits as they act on a running retrieval."""

from __future__ import annotations

import threading

from airflow_dicom_get import clock

_SLICE = 0.05
"""Seconds that one read may cost at the rate: short, so that each association is read often."""
_CREDIT = 0.1
"""Seconds that may be caught up after a wait for the source, or a sleep that took too long."""
_LEAST_READ = 256
_LONGEST_SLEEP = 10.0
"""Well below the deadline ``stall``: a source that is not read gives up."""


class RateLimit:
    """Hold a rate over all associations of a run: a leaky bucket that sleeps after each read.

    Parameters
    ----------
    bytes_per_second : int
        The rate over all who share this object.

    Attributes
    ----------
    most : int
        Bytes that one read should take at most.
    """

    def __init__(
        self,
        bytes_per_second: int,
    ) -> None:
        self.most = max(int(bytes_per_second * _SLICE), _LEAST_READ)
        self._rate = bytes_per_second
        self._mutex = threading.Lock()
        self._free_at = clock.monotonic()

    def __call__(self, size: int) -> None:
        """Account for ``size`` bytes that were read, and wait as long as the rate asks."""
        with self._mutex:
            now = clock.monotonic()
            self._free_at = max(self._free_at, now - _CREDIT) + size / self._rate
            wait = self._free_at - now
        if wait > 0:
            clock.sleep(min(wait, _LONGEST_SLEEP))
