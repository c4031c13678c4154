"""A progress bar on stderr, if that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from airflow_dicom_get.records import SubOperation
from airflow_dicom_get.result import size_text

_INTERVAL = 0.1


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Callable[[SubOperation], None] | None]:
    """Give a function to call for each instance; None where there is nobody to show a bar to."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    # Only here: a run that shows nothing need not import rich.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[flow]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("instances", total=None, flow="waiting for the source")
        received, shown_at = 0, 0.0

        def show(event: SubOperation) -> None:
            nonlocal received, shown_at
            received += event.bytes
            now = time.monotonic()
            # Thousands of small instances a second: drawing each would cost more than fetching it.
            if now - shown_at < _INTERVAL and event.remaining:
                return
            shown_at = now
            done = event.completed + event.failed
            rate = received / event.elapsed_seconds if event.elapsed_seconds else 0.0
            flow = f"{size_text(received)}, {size_text(rate)}/s"
            bar.update(task, completed=done, total=done + event.remaining, flow=flow)

        yield show
