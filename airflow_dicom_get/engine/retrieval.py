"""What the studies of one run share, and where what comes meets the state of a study."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from airflow_dicom_get.config.options import GetOptions
from airflow_dicom_get.engine.contexts import PeerKnowledge
from airflow_dicom_get.engine.events import Events
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.engine.state import Answered, StudyState
from airflow_dicom_get.engine.tags import TagDecoder
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.records import Instance, Key
from airflow_dicom_get.sinks.base import Sink, Taken

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What the studies of one run share.

    Attributes
    ----------
    tags : TagDecoder or None
        Decodes the elements that become columns of the manifest.
    limit : callable
        Asked after each object and before each association; a word ends the run for that reason.
    check_room : callable
        Asked before each study; raises :class:`~airflow_dicom_get.errors.DestinationFull`.
    expect : callable
        Told the SOP classes that are to come.
    """

    options: GetOptions
    query_model: str
    source: Source
    sink: Sink
    peer: PeerKnowledge
    events: Events
    tags: TagDecoder | None = None
    limit: Callable[[], str | None] = lambda: None
    check_room: Callable[[], None] = lambda: None
    expect: Callable[[Iterable[str]], None] = lambda classes: None


class Intake:
    """Where the outcomes of source and destination reach the state of a study. Thread-safe."""

    def __init__(self, retrieval: Retrieval, state: StudyState) -> None:
        self.retrieval, self.state = retrieval, state
        self._mutex = threading.Lock()
        self._in_hand: set[Key] = set()
        """Instances whose record a receiver is filling at this moment."""

    def claim(self, key: Key) -> bool:
        """Whether the record of an instance is the caller's to fill, until it is released: nobody else has it."""
        with self._mutex:
            free = key not in self._in_hand
            self._in_hand.add(key)
            return free

    def release(self, key: Key) -> None:
        """The caller fills it no longer."""
        with self._mutex:
            self._in_hand.discard(key)

    def add_unlisted(self, series: str, sop: str, sop_class: str | None) -> Instance:
        """See :meth:`StudyState.add_unlisted`."""
        with self._mutex:
            return self.state.add_unlisted(series, sop, sop_class)

    def answer(self, uid: str, instance: Instance | None, taken: Taken, size: int) -> None:
        """An object of ``size`` bytes was answered."""
        with self._mutex:
            answered = self.state.answer(uid, instance, taken)
        self._tell(answered, uid, size if answered.error is None else 0)

    def drained(self, size: int) -> None:
        """An object was not taken, and nothing is wrong with it: it is held."""
        self.retrieval.events.drained(size)

    def leave_out(self, key: Key, sop_class: str, size: int) -> None:
        """An object was not taken: it is of a class that is not wanted."""
        self.retrieval.events.drained(size)
        with self._mutex:
            self.state.leave_out(key, sop_class)

    def sent_in_other_syntax(self, key: Key) -> None:
        """See :meth:`StudyState.sent_in_other_syntax`."""
        with self._mutex:
            self.state.sent_in_other_syntax(key)

    def learn_count(self, series: str | None, total: int | None, sent: Collection[Key] | None) -> None:
        """See :meth:`StudyState.learn_count`."""
        with self._mutex:
            self.state.learn_count(series, total, sent)

    def note_unread(self, uids: Iterable[str]) -> None:
        """See :meth:`StudyState.note_unread`."""
        with self._mutex:
            self.state.note_unread(uids)

    def left_to_destination(self, instance: Instance) -> None:
        """See :meth:`StudyState.left_to_destination`."""
        with self._mutex:
            answered = self.state.left_to_destination(instance)
        if answered is not None:
            self._tell_confirmed(answered)

    def confirm(self, *, wait: bool = False) -> None:
        """Note what the destination has confirmed; with ``wait`` all that is still due."""
        for confirmation in self.retrieval.sink.confirmations(wait=wait):
            with self._mutex:
                answered = self.state.confirm(confirmation)
            if answered is not None:
                self._tell_confirmed(answered)

    def _tell_confirmed(self, answered: Answered) -> None:
        if answered.error is None:
            self._tell(answered, answered.record.sop, answered.record.bytes or 0)
        elif answered.stop is not None:
            self.stop(answered.stop)

    def _tell(self, answered: Answered, uid: str, size: int) -> None:
        record, planned = answered.record, answered.record.key not in self.state.unlisted
        self.retrieval.events.arrived(record, uid, answered.error, size, new=answered.new, planned=planned)
        if answered.stop is not None:
            self.stop(answered.stop)

    def after_answer(self) -> None:
        """After each answer: note confirmations, hold the limits."""
        self.confirm()
        self.hold_limits()

    def hold_limits(self) -> None:
        """Stop the run where the source may not be used any more."""
        reason = self.retrieval.limit()
        if reason is not None:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """End the run in order, for a reason of its own, unless it is to end already."""
        if self.state.stop_reason is None and not self.retrieval.source.cancel.ending():
            self.state.stop_reason = reason
            self.retrieval.source.cancel.cancel(reason)

    def remark(self, error: DicomGetError) -> None:
        """Count an error that the run recovers from."""
        self.state.remarks[type(error).__name__] += 1
        log.info("%s", error.message)
