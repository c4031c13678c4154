"""Progress of a run: counted here, handed to one callback at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from airflow_dicom_get import clock
from airflow_dicom_get.records import Completed, Instance, SubOperation

log = logging.getLogger(__name__)


class Events:
    """Counts what is taken and tells the callbacks. Calls are serialised; one that raises harms nothing."""

    def __init__(
        self,
        on_sub_operation: Callable[[SubOperation], object] | None = None,
        on_completed: Callable[[Completed], object] | None = None,
    ) -> None:
        self._on_sub_operation = on_sub_operation
        self._on_completed = on_completed
        self._mutex = threading.Lock()
        self._began = clock.monotonic()
        self.expected = 0
        """Instances planned to be fetched, over all studies so far."""
        self.taken = 0
        self._planned_taken = 0
        self.failed = 0
        self.warning = 0
        self.bytes = 0

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return clock.monotonic() - self._began

    def planned(self, count: int) -> None:
        """``count`` more instances are to be fetched, or fewer where it is below zero."""
        with self._mutex:
            self.expected += count

    def arrived(
        self, instance: Instance, uid: str, error: str | None, size: int, *, new: bool, planned: bool = True
    ) -> None:
        """An instance was answered: taken, or refused with ``error``; ``planned`` where it is one of those."""
        with self._mutex:
            if error is None and new:
                self.taken += 1
                self._planned_taken += planned
                self.bytes += size
                self.warning += instance.remarked
            elif error is not None:
                self.failed += 1
            if self._on_sub_operation is None:
                return
            event = SubOperation(
                remaining=max(self.expected - self._planned_taken, 0),
                completed=self.taken,
                failed=self.failed,
                warning=self.warning,
                file=instance.uri if error is None else None,
                sop_instance_uid=uid,
                forwarded_to=instance.forwarded_to,
                forward_status=instance.forward_status,
                forward_error=instance.forward_error,
                error=error,
                bytes=size,
                elapsed_seconds=self.elapsed(),
            )
            self._call(self._on_sub_operation, event)

    def drained(self, size: int) -> None:
        """So many bytes came of what is not taken."""
        with self._mutex:
            self.bytes += size

    def completed(self, event: Completed, *, wait: bool = True) -> None:
        """The run has ended; without ``wait`` it is not told where another callback has not returned."""
        if self._on_completed is None:
            return
        if not self._mutex.acquire(blocking=wait):
            log.error("a callback does not return; the one for the end is not called")
            return
        try:
            self._call(self._on_completed, event)
        finally:
            self._mutex.release()

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call one of the caller's own functions, as those for events are called."""
        with self._mutex:
            self._call(callback, *arguments)

    def _call(self, callback: Callable[..., object], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("a callback failed; the retrieval continues")
