"""The source node: how associations with it are opened, and how many at a time."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from airflow_dicom_get.errors import Cancelled, ConnectFailed, DeadlineExceeded, DicomGetError
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association, CancelToken, Throttle
from airflow_dicom_get.net.peer import Peer

log = logging.getLogger(__name__)

_BACKOFF, _GROWTH, _MAX_BACKOFF = 0.5, 3, 30.0
"""The five retries of the default outlast a source that is away for half a minute."""
_UNHEARD = 2
"""Tries again with a node that no connection was ever made to."""
T = TypeVar("T")


class Source:
    """One node that studies are retrieved from, as one run sees it.

    Every association of the run, for lists and for gets alike, is opened here and counts against
    ``max_associations``.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        max_associations: int,
        throttle: Throttle | None = None,
    ) -> None:
        self.peer = peer
        self.node, self.deadlines = peer.node, peer.deadlines
        self.cancel = CancelToken()
        self.opened = 0
        self._throttle = throttle
        self._slots = threading.BoundedSemaphore(max_associations)
        self._mutex = threading.Lock()
        self.operation_limit = (
            time.monotonic() + peer.deadlines.operation if peer.deadlines.operation is not None else float("inf")
        )

    @contextmanager
    def association(self, proposals: Sequence[Proposal], storage_classes: Sequence[str] = ()) -> Iterator[Association]:
        """Open an association; released at the end, aborted if the block raises."""
        with self._slots:
            association = self.peer.open(proposals, self.cancel, storage_classes)
            association.throttle = self._throttle
            association.operation_limit = self.operation_limit
            with self._mutex:
                self.opened += 1
            try:
                yield association
                association.release()
            finally:
                association.abort()

    def check_stopped(self) -> None:
        """Raise where the run was cancelled, or its time is over: nothing new is begun then.

        Raises
        ------
        Cancelled, DeadlineExceeded
        """
        if self.cancel.reason is not None:
            raise Cancelled(f"Cancelled: {self.cancel.reason}.", node=str(self.node))
        if time.monotonic() >= self.operation_limit:
            raise DeadlineExceeded(
                f"The retrieval from {self.node} took longer than the deadline 'operation' "
                f"({self.deadlines.operation:g} s).",
                hint="Run again: what is held is not fetched again.",
                node=str(self.node),
                phase="operation",
                seconds=self.deadlines.operation,
            )

    def patience(self, error: DicomGetError) -> float:
        """Tries that a failure is worth: few where this node has never answered, and may not be there at all."""
        unheard = self.opened == 0 and (isinstance(error, ConnectFailed) or error.facts.get("phase") == "connect")
        return _UNHEARD if unheard else float("inf")

    def back_off(self, failures: int, cause: DicomGetError) -> None:
        """Wait before the next try, exponentially and with jitter; a cancel or the operation's end cuts it short."""
        wait = min(_BACKOFF * _GROWTH ** (failures - 1), _MAX_BACKOFF) * random.uniform(0.75, 1.25)
        log.warning("%s Trying again in %.1f s.", cause.message, wait)
        limit = min(time.monotonic() + wait, self.operation_limit)
        while time.monotonic() < limit and self.cancel.reason is None:
            time.sleep(0.05)

    def with_retries(self, retries: int, proposals: Sequence[Proposal], work: Callable[[Association], T]) -> T:
        """Run ``work`` on an association of its own; transient failures are tried again, ``retries`` times.

        Raises
        ------
        DicomGetError
            What ``work`` or the association raised last.
        """
        failures = 0
        while True:
            self.check_stopped()
            try:
                with self.association(proposals) as association:
                    return work(association)
            except DicomGetError as error:
                failures += 1
                over = isinstance(error, Cancelled) or error.facts.get("phase") == "operation"
                if over or not error.transient or failures > min(retries, self.patience(error)):
                    raise
                self.back_off(failures, error)
