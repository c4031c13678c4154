"""The source node: how associations with it are opened, and how many at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from airflow_dicom_get.errors import Cancelled, DicomGetError, SinkError
from airflow_dicom_get.lists.whole import Cuts
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import OVER, STUCK, Association, CancelToken, Throttle, time_is_over
from airflow_dicom_get.net.peer import Peer
from airflow_dicom_get.net.retries import allowed, back_off, no_contact

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
        list_limit: Sequence[int] | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        self.peer = peer.of_run()
        self.cuts = Cuts(list_limit)
        """Where it may cut its answers to C-FIND, as far as this run has seen."""
        self.node, self.deadlines = peer.node, peer.deadlines
        self.cancel = cancel or CancelToken(peer.deadlines.operation)
        self.opened = 0
        self.answered = False
        """Whether the node has sent anything over an association."""
        self._throttle = throttle
        self._slots = threading.BoundedSemaphore(max_associations)
        self._mutex = threading.Lock()

    @contextmanager
    def association(self, proposals: Sequence[Proposal], storage_classes: Sequence[str] = ()) -> Iterator[Association]:
        """Open an association; released at the end, aborted if the block raises."""
        try:
            with self._slots, self._opened(proposals, storage_classes) as association:
                yield association
        except DicomGetError as error:
            worth = no_contact(error, reached=self.opened > 0, answered=self.answered)
            if worth is not None:
                error.facts["retries"] = worth
            raise

    @contextmanager
    def _opened(self, proposals: Sequence[Proposal], storage_classes: Sequence[str]) -> Iterator[Association]:
        association = self.peer.open(proposals, self.cancel, storage_classes)
        association.throttle = self._throttle
        with self._mutex:
            self.opened += 1
        try:
            yield association
            association.release()
        finally:
            association.abort()
            with self._mutex:
                self.answered = self.answered or association.answered

    def check_stopped(self) -> None:
        """Raise where the run is to end: nothing new is begun then.

        Raises
        ------
        Cancelled, DeadlineExceeded
        """
        if self.cancel.ending():
            raise self.why_ended()

    def why_ended(self) -> DicomGetError:
        """What ends the run: a cancel, that its time is over, or that the destination does not take or not return."""
        reason = self.cancel.reason
        if reason in (None, OVER):
            return time_is_over(self.node, self.deadlines)
        if reason == STUCK:
            return SinkError(
                f"The destination has not returned from a call for {self.deadlines.next_object:g} s "
                "(deadlines.next_object).",
                hint="Check its mount, then run again: what is held is not fetched again.",
            )
        if reason == SinkError.word:
            return SinkError(
                "The destination failed to store several instances in a row, and the retrieval was ended.",
                hint="The errors of the instances say why. Run again: what is held is not fetched again.",
                retries=0,
            )
        return Cancelled(f"Cancelled: {reason}.", node=str(self.node))

    def end_at_once(self, error: BaseException) -> None:
        """Abort all associations: something came that no part of a run expects, as an exception of a callback."""
        self.cancel.abort(type(error).__name__)

    def back_off(self, failures: int, cause: DicomGetError, retries: int) -> None:
        """Wait before the next try; a cancel or the operation's end cuts it short."""
        back_off(failures, cause.message, allowed(cause, retries), self.cancel, self.cancel.over_at)

    def with_retries(
        self,
        retries: int,
        proposals: Sequence[Proposal],
        work: Callable[[Association], T],
        storage_classes: Sequence[str] = (),
    ) -> T:
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
                with self.association(proposals, storage_classes) as association:
                    return work(association)
            except DicomGetError as error:
                failures += 1
                if isinstance(error, Cancelled) or failures > allowed(error, retries):
                    raise
                self.back_off(failures, error, retries)
