"""SIGINT and SIGTERM: the first ends the retrieval in order, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def cancelling(cancel: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``cancel`` with the name of the first signal; give the list of the names that came.

    The second signal ends the process without clean-up. That is safe by design: nothing unfinished
    bears a final name, and the next run cleans up after this one.
    """
    came: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        # os.write, since print may be interrupted in the middle of a print.
        if came:
            os.write(2, b"\ndicom-get: ended at once\n")
            os._exit(_CODES[signal.Signals(number)])
        came.append(signal.Signals(number).name)
        os.write(2, f"\ndicom-get: {came[0]}, ending; a second one ends at once\n".encode())
        cancel(came[0])

    before = {number: signal.signal(number, handle) for number in _CODES}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
