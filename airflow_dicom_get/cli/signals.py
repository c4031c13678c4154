"""SIGINT and SIGTERM: the first ends the retrieval in order, the second aborts it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from airflow_dicom_get.cli.streams import write_at_once

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def cancelling(cancel: Callable[[str], None]) -> Iterator[None]:
    """Call ``cancel`` with the name of the signal: once to end in order, twice to abort.

    The third signal ends the process without clean-up. That is safe by design: nothing unfinished
    bears a final name, and the next run cleans up after this one.
    """
    came = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        name = signal.Signals(number).name
        # What is said goes out at once, since the signal may come in the middle of a print.
        if came > 2:
            write_at_once("dicom-get: stopped at once\n")
            os._exit(_CODES[signal.Signals(number)])
        cancel(name)
        what = "stopping; a second signal aborts" if came == 1 else "aborting"
        # In a terminal the bar stands in this line.
        line = "\r\x1b[2K" if os.isatty(2) else ""
        write_at_once(f"{line}dicom-get: {name}, {what}\n")

    before = {number: signal.signal(number, handle) for number in _CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
