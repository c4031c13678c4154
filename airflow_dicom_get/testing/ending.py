"""Serve until SIGINT or SIGTERM."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INTERVAL = 0.1


@contextmanager
def told_to_end() -> Iterator[Callable[[], None]]:
    """Give a function that waits for SIGINT or SIGTERM, also for one that came since this was entered."""
    came: list[int] = []

    def wait() -> None:
        # Not an Event: a signal that comes just before the wait on a lock does not end that wait, and a handler that
        # interrupts Event.wait where it holds its lock waits for itself.
        while not came:
            time.sleep(_INTERVAL)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
