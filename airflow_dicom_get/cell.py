"""In a cell of a notebook: a bar for what runs, and an interrupt that ends it in order.

Nothing here does anything outside a Jupyter kernel, and IPython is never imported where it is not at work already.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from airflow_dicom_get import clock
from airflow_dicom_get.records import SubOperation
from airflow_dicom_get.result import size_text

_INTERVAL = 0.2
_ABORTED = 2
"""Interrupts that are taken as a wish to end; one more is Python's own KeyboardInterrupt."""

OnSubOperation = Callable[[SubOperation], object]


def in_kernel() -> bool:
    """Whether this runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def at_cell(cancel: Callable[[str], None], callback: OnSubOperation | None) -> Iterator[OnSubOperation | None]:
    """Give the callback for what runs: the caller's own, else that of a bar below the cell.

    An interrupt of the kernel calls ``cancel``, once to end in order and twice to abort, so that the verdict is still
    found and the manifest written.
    """
    if not in_kernel():
        yield callback
        return
    with _interrupts(cancel):
        if callback is not None:
            yield callback
            return
        bar = _Bar()
        try:
            yield bar.show
        finally:
            bar.end()


@contextmanager
def _interrupts(cancel: Callable[[str], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > _ABORTED:
            raise KeyboardInterrupt
        cancel("interrupted")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Bar:
    """Shows itself with the first instance; what stays at the end are numbers that no clock has part in."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._handle: Any = DisplayHandle()  # type: ignore[no-untyped-call]
        self._shown_at: float | None = None
        self._received = 0
        self._ended = False
        self._event: SubOperation | None = None

    def show(self, event: SubOperation) -> None:
        """Take one instance; draw it unless the last drawing was a moment ago."""
        self._event = event
        self._received += event.bytes
        now = clock.monotonic()
        if self._shown_at is None:
            self._handle.display(self)
        elif now - self._shown_at >= _INTERVAL:
            self._handle.update(self)
        else:
            return
        self._shown_at = now

    def end(self) -> None:
        """Draw the last numbers."""
        self._ended = True
        if self._event is not None:
            self._handle.update(self)

    def _numbers(self) -> tuple[int, int, str]:
        event = self._event
        assert event is not None
        done = event.completed + event.failed
        total = done + event.remaining
        text = f"{done} of {total} instances, {size_text(self._received)}"
        if not self._ended and event.elapsed_seconds:
            text += f", {size_text(self._received / event.elapsed_seconds)}/s"
        return done, total, text

    def __repr__(self) -> str:
        return self._numbers()[2]

    def _repr_html_(self) -> str:
        done, total, text = self._numbers()
        return f"<progress value='{done}' max='{total}' style='width: 20em'></progress> {text}"
