"""A profiler that looks at all threads now and then, so that it costs little and sees waiting as well as work."""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Self

_EVERY = 0.002


class Sampler:
    """Counts in which line of the package each thread is, over the time of a ``with`` block."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self.samples = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._interval = sys.getswitchinterval()
        # A thread that computes gives up the interpreter only so often, and would delay the next look.
        sys.setswitchinterval(_EVERY / 4)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        sys.setswitchinterval(self._interval)

    def _look(self) -> None:
        own = threading.get_ident()
        while not self._end.is_set():
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != own and (place := _place(frame)) is not None:
                    self.counts[names.get(ident, "?"), *place] += 1
            self.samples += 1
            time.sleep(_EVERY)

    def top(self, most: int = 8) -> list[dict[str, str | float]]:
        """The lines most seen: share of the looks, thread, file and source text."""
        return [
            {
                "share": count / max(self.samples, 1),
                "thread": "receiver" if thread == "MainThread" else thread.removeprefix("dicom-get-"),
                "where": "/".join(Path(file).parts[-2:]),
                "line": linecache.getline(file, line).strip(),
            }
            for (thread, file, line), count in self.counts.most_common(most)
        ]


def _place(frame: FrameType | None) -> tuple[str, int] | None:
    """The innermost line of the package; a library's time is its caller's."""
    while frame is not None:
        if "airflow_dicom_get" in frame.f_code.co_filename:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None
