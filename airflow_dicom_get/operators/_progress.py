"""What a task shows while it runs: a log line and a record in the task state store, every few seconds."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_dicom_get.records import Completed, SubOperation

STORE_SECONDS = 5.0
"""The least time between two writes to the state store: each is a round trip through the API server."""
PATIENCE_SECONDS = 1.0
"""How long a write may hold up the retrieval. While the API server is away, Airflow tries each for much longer."""


class Progress:
    """Counts over all retrievals of one task, shown at most every ``interval`` seconds.

    Display only: nothing is ever decided by what stands in the state store. So a write that fails is
    given up silently, one that takes long goes on by itself and none is made meanwhile, and the last one may be up to
    five seconds older than the end of the task. The task itself asks Airflow for nothing before it is over: a worker
    would wait for it in any case, and ``DAG.test`` loses what is asked beside it. A retrieval ends as a context does.
    """

    def __init__(
        self,
        *,
        log: Any,
        store: Any,
        interval: float,
        associations: int,
        phase: str = "get",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._store = store
        self._interval = max(float(interval), 1.0)
        self._associations = associations
        self._phase = phase
        self._clock = clock
        self._started = self._logged = clock()
        self._stored = float("-inf")
        self._writing = threading.Thread()
        # Of the retrievals that have ended, then of the one that runs.
        self._ended = {"done": 0, "total": 0, "failed": 0, "bytes": 0}
        self._running = dict.fromkeys(self._ended, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._settle()

    def on_sub_operation(self, event: SubOperation) -> None:
        """Take one instance that arrived."""
        self._running = {
            "done": event.completed,
            "total": event.completed + event.remaining,
            "failed": event.failed,
            "bytes": self._running["bytes"] + event.bytes,
        }
        self._show()

    def on_completed(self, event: Completed) -> None:
        """Take the end of one retrieval."""
        ended = {
            "done": event.completed,
            "total": event.total,
            "failed": event.failed,
            "bytes": event.bytes,
        }
        self._ended = {name: self._ended[name] + value for name, value in ended.items()}
        self._running = dict.fromkeys(self._ended, 0)
        self._show()

    def finish(self, phase: str) -> None:
        """Show the last state, if the state store may be written again."""
        self._store_if_due(phase, self._clock())
        self._settle()

    def window(self, resume_at: datetime) -> None:
        """Show when the retrieval goes on."""
        self._set("window", {"resume_at": resume_at.isoformat()})
        self._settle()

    def _counts(self) -> dict[str, int]:
        return {name: value + self._running[name] for name, value in self._ended.items()}

    def _show(self) -> None:
        now = self._clock()
        if now - self._logged >= self._interval:
            self._logged = now
            counts = self._counts()
            self._log.info(
                "%d of %d instances, %d failed, %.1f MB, %.1f MB/s",
                counts["done"],
                counts["total"],
                counts["failed"],
                counts["bytes"] / 1e6,
                counts["bytes"] / 1e6 / max(now - self._started, 0.001),
            )
        if now - self._started >= STORE_SECONDS:
            self._store_if_due(self._phase, now)

    def _store_if_due(self, phase: str, now: float) -> None:
        if now - self._stored < max(STORE_SECONDS, self._interval):
            return
        self._stored = now
        counts = self._counts()
        self._set(
            "progress",
            {
                "phase": phase,
                **counts,
                "bytes_per_second": round(counts["bytes"] / max(now - self._started, 0.001)),
                "associations": self._associations,
                "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    def _set(self, key: str, value: dict[str, Any]) -> None:
        if self._store is None or self._writing.is_alive():
            return
        self._writing = threading.Thread(target=self._write, args=(key, value), daemon=True)
        self._writing.start()
        self._writing.join(PATIENCE_SECONDS)

    def _settle(self) -> None:
        """Wait for the write that goes on."""
        if self._writing.is_alive():
            self._writing.join()

    def _write(self, key: str, value: dict[str, Any]) -> None:
        try:
            self._store.set(key, value)
        except Exception as error:
            self._log.debug("The task state store could not be written: %s", error)
