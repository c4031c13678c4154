"""What becomes of each object that a source sends: checked against the plan, written, answered.

A call of a sink may block forever, as on a file server that is dead, and nothing can end it. The
association that waits for it is aborted by a thread beside the receiver (:func:`attended`): the PACS is
not held, and what the destination does after all still counts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.identifier import int_value, text_value
from airflow_dicom_get.dicom.syntaxes import LOSSY, UNCOMPRESSED
from airflow_dicom_get.dicom.uids import is_uid, uid_or_blank, uid_value
from airflow_dicom_get.dicom.values import kept
from airflow_dicom_get.engine.retrieval import Intake
from airflow_dicom_get.errors import DestinationFull, DestinationSlow, ForwardLate, ForwardLost, SinkError
from airflow_dicom_get.net.association import STUCK, Association
from airflow_dicom_get.net.get import StoreRequest
from airflow_dicom_get.records import Instance, Key
from airflow_dicom_get.sinks.base import Taken, Writer
from airflow_dicom_get.vocabulary import MAYBE_CONVERTED, TRIED_IN_VAIN, Exactness

log = logging.getLogger(__name__)

_NEVER = float("inf")
_INTERVAL = 0.2
"""Seconds between two looks at how long the destination has been busy."""
_CANCEL_GRACE = 2.0
"""Seconds that a destination may take after the run was cancelled; none after a second cancel."""

_WANTED = h.MANDATORY | {
    h.SOP_CLASS_UID,
    h.PATIENT_ID,
    h.MODALITY,
    h.SERIES_NUMBER,
    h.INSTANCE_NUMBER,
    h.LOSSY_IMAGE_COMPRESSION,
}


class Receiver:
    """The :class:`~airflow_dicom_get.net.get.ObjectReceiver` of one association of a study's run."""

    def __init__(self, intake: Intake, association: int) -> None:
        self._intake, self._state, self._retrieval = intake, intake.state, intake.retrieval
        self._association = association
        self._deadlines = intake.retrieval.source.deadlines
        self._tags = intake.retrieval.tags
        tags = self._tags.numbers | {h.SPECIFIC_CHARACTER_SET} if self._tags is not None else frozenset()
        self._of_patient = self._state.scope.of_patient
        patient = {h.SPECIFIC_CHARACTER_SET} if self._of_patient else frozenset()
        self._wanted = frozenset(_WANTED | tags | patient)
        self._last_tag = max(self._wanted)
        self._began = 0.0
        self.came_at = _NEVER
        """When the data came that the destination has in hand; in the future while it has none."""
        self.limit = self._deadlines.stall
        """Seconds that it has for them."""
        self._request: StoreRequest | None = None
        self._scan: h.HeaderScan | None = None
        self._walk: h.ElementWalk | h.DeflateWalk | None = None
        self._patient_told = False
        """Whether its header has a Patient ID."""
        self._head = bytearray()
        self._writer: Writer | None = None
        self._instance: Instance | None = None
        self._claimed: Key | None = None
        """The instance whose record is being filled here, and on no other association."""
        self._size = 0
        self._refusal: Taken | None = None
        self._drains = False
        self._unwanted: Key | None = None
        """The instance that came, where its class is not wanted."""
        self.confirms = False
        """Whether what is held is asked for once more, to see what else comes: it is drained, and not compared."""
        self.came: set[Key] | None = None
        """What was sent since this was set to an empty set; what names no instance as ("", its SOP Instance UID), which
        is empty where that is malformed."""

    def begin(self, request: StoreRequest) -> None:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        self._began = clock.monotonic()
        self._request = request
        self._writer = self._instance = self._refusal = self._walk = None
        self._drains, self._unwanted = False, None
        self._size = 0
        self.limit = self._deadlines.stall
        self._scan = h.HeaderScan(request.syntax, self._wanted, self._last_tag)
        if not is_uid(request.sop_instance):
            self._refuse(s.MISMATCH, "bad_uid", "The C-STORE-RQ names no valid SOP Instance UID.")
        elif request.sop_class != request.context_class:
            self._refuse(
                s.MISMATCH, "uid_mismatch", "The C-STORE-RQ names a different SOP class than its presentation context."
            )

    def _refuse(self, status: int, reason: str, error: str) -> Literal[False]:
        self._refusal = Taken(status, reason, error)
        return False

    def _drain(self) -> Literal[False]:
        self._drains, self._refusal = True, Taken(s.SUCCESS)
        return False

    def data(self, view: memoryview, last: bool) -> bool:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        self._size += len(view)
        if last:
            self.limit = self._deadlines.sub_operation
        self.came_at = clock.monotonic()
        if self._refusal is None:
            self._write(view, last)
            if not last:
                self._hold("stall", "left its sender unread for")
        if not last:
            self.came_at = _NEVER
        return self._refusal is None or self._drains

    def _hold(self, deadline: str, what: str) -> None:
        """Give the association up where the destination has kept it waiting too long; never answer late."""
        waited, limit = clock.monotonic() - self.came_at, self.limit
        if waited > limit:
            raise DestinationSlow(
                f"The destination {what} {waited:.1f} s; the deadline {deadline!r} is {limit:g} s. "
                "The association was aborted.",
                hint="Is the destination overloaded? Instances that it confirms count, and are not fetched again.",
                phase=deadline,
            )

    def _write(self, view: memoryview, last: bool) -> None:
        try:
            if self._writer is not None:
                self._writer.write(view)
                if self._walk is not None:
                    self._walk.feed(view)
            else:
                self._begin_writing(view, last)
        except h.HeaderError as error:
            empty = self._size == 0
            self._refuse(
                s.CANNOT_UNDERSTAND,
                "empty_dataset" if empty else "unparsable",
                f"The data set cannot be read: {error}.",
            )
        except ForwardLost:
            raise
        except SinkError as error:
            self._sink_failed(error)

    def _begin_writing(self, view: memoryview, last: bool) -> None:
        """Collect the header; once it is there and in order, give the sink what has come so far."""
        assert self._scan is not None
        self._scan.feed(view, last=last)
        if not self._scan.done:
            self._head += view
        elif self._identify():
            assert self._instance is not None
            begun = self._retrieval.sink.begin(self._instance)
            if isinstance(begun, Taken):
                self._refusal = begun
                return
            self._writer = begun
            if self._head:
                self._writer.write(memoryview(self._head))
                self._head = bytearray()
            self._writer.write(view)

    def _sink_failed(self, error: SinkError) -> None:
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        full = isinstance(error, DestinationFull)
        self._refuse(s.OUT_OF_RESOURCES, "destination_full" if full else "destination_error", str(error))

    def _identify(self) -> bool:
        """Hold the header against command, context and plan, and find the instance's record; whether it may be kept."""
        request, scan = self._request, self._scan
        assert request is not None
        assert scan is not None
        values = scan.values
        self._walk, self._scan = scan.walk, None
        self._patient_told = h.PATIENT_ID in values
        sop = uid_value(values[h.SOP_INSTANCE_UID])
        study = uid_value(values[h.STUDY_INSTANCE_UID])
        series = uid_value(values[h.SERIES_INSTANCE_UID])
        if sop is None or study is None or series is None:
            return self._refuse(s.MISMATCH, "bad_uid", "The data set contains an invalid UID.")
        sop_class = text_value(values.get(h.SOP_CLASS_UID))
        if sop != request.sop_instance or sop_class not in (request.sop_class, None):
            return self._refuse(
                s.MISMATCH, "uid_mismatch", "The data set names a different instance or SOP class than its command."
            )
        if self.came is not None:
            self.came.add((series, sop))
        if study != self._state.scope.study:
            return self._refuse(s.NOT_AUTHORISED, "foreign_study", "The instance belongs to another study.")
        if self._state.sop_classes is not None and request.sop_class not in self._state.sop_classes:
            self._unwanted = series, sop
            return self._refuse(s.NOT_AUTHORISED, "not_asked", "Its SOP class is not wanted.")
        if self._state.listed_elsewhere(series, sop):
            return self._refuse(s.MISMATCH, "uid_mismatch", f"Its data set names series {series}, the list another.")
        instance = self._state.instances.get((series, sop))
        if instance is None and not self._state.in_scope(series, sop):
            return self._refuse(s.NOT_AUTHORISED, "not_asked", "The instance is outside the scope of the request.")
        if instance is None:
            instance = self._intake.add_unlisted(sys.intern(series), sop, request.sop_class)
        if self._intake.claim(instance.key):
            self._claimed = instance.key
        if instance.state is not None and instance.state not in TRIED_IN_VAIN:
            if self.confirms:
                return self._drain()
            self._release()
        if self._claimed is None:
            if instance.syntax not in (None, request.syntax):
                self._intake.sent_in_other_syntax(instance.key)
                return self._drain()
            # Sent twice, by turns or at the same time, or held before: judged by the sink, without touching the
            # first one's record.
            instance = Instance(study, instance.series, sop, request.sop_class)
        instance.sop_class = request.sop_class
        instance.syntax = request.syntax
        instance.modality = instance.modality or kept(text_value(values.get(h.MODALITY)))
        instance.series_number = (
            instance.series_number if instance.series_number is not None else int_value(values.get(h.SERIES_NUMBER))
        )
        instance.instance_number = int_value(values.get(h.INSTANCE_NUMBER)) or instance.instance_number
        instance.exactness = self._exactness(instance, values)
        instance.other_patient = self._of_patient and not self._state.scope.is_of_patient(
            values.get(h.PATIENT_ID, b""), values.get(h.SPECIFIC_CHARACTER_SET, b"")
        )
        if self._tags is not None:
            instance.tags = self._tags.decode(values, request.syntax)
        self._instance = instance
        if self._retrieval.options.require_exact and instance.exactness in MAYBE_CONVERTED:
            return self._refuse(
                s.MISMATCH, "syntax_refused", "The PACS may have converted it, and require_exact is set."
            )
        return True

    def _contradicted(self) -> Taken | None:
        """What the rest of its data set says against its header; a refusal where it names its instance twice."""
        if self._instance is None or self._walk is None:
            return None
        self._instance.truncated = not self._walk.whole
        met = self._walk.identifying
        for tag in met:
            if met[tag] > 1:
                assert self._writer is not None
                self._writer.abort()
                text = f"The data set cannot be read: ({tag >> 16:04X},{tag & 0xFFFF:04X}) stands in it twice."
                return Taken(s.CANNOT_UNDERSTAND, "unparsable", text)
        if self._of_patient and met[h.PATIENT_ID] and not self._patient_told:
            self._instance.other_patient = True  # it stands behind where a reader looks for it, and is not compared
        return None

    def _note_unread(self, sop_instance: str) -> None:
        """Note that something came whose data set does not tell what it is."""
        if self.came is not None:
            self.came.add(("", uid_or_blank(sop_instance)))

    def _release(self) -> None:
        """Let another association fill the record."""
        if self._claimed is not None:
            self._intake.release(self._claimed)
            self._claimed = None

    def _exactness(self, instance: Instance, values: dict[int, bytes]) -> Exactness:
        """What is known of a conversion by the source."""
        syntax = instance.syntax
        assert syntax is not None
        if instance.listed_syntax:
            return "as_listed" if instance.listed_syntax == syntax else "converted"
        if syntax not in UNCOMPRESSED:
            return "as_received"
        if values.get(h.LOSSY_IMAGE_COMPRESSION, b"").strip(b"\0 ") == b"01" and syntax not in LOSSY:
            return "converted"
        return "as_received" if self._retrieval.peer.converts is False else "peer_choice"

    def finish(self) -> int:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        self._head = bytearray()
        assert self._request is not None
        if self._drains or self._unwanted is not None:
            self._release()
            self._set_aside(self._request)
            self._hold("sub_operation", "took an instance in")
            self.came_at = _NEVER
            return s.SUCCESS if self._drains else s.NOT_AUTHORISED
        taken = self._refusal
        if self._instance is None:
            self._note_unread(self._request.sop_instance)
        if taken is None and self._writer is None:
            taken = Taken(s.CANNOT_UNDERSTAND, "empty_dataset", "The data set is empty.")
        if taken is None:
            assert self._writer is not None
            try:
                taken = self._contradicted() or self._writer.take()
            except ForwardLate:
                assert self._instance is not None
                self._intake.left_to_destination(self._instance)
                self._release()
                raise
        elif self._writer is not None:
            self._writer.abort()
        self._writer = None
        instance = self._instance
        self._answer(self._request, taken)
        status = taken.status
        if status == s.SUCCESS and instance is not None and self._retrieval.options.ack == "durable":
            self._intake.confirm(wait=True)
            status = s.OUT_OF_RESOURCES if instance.state == "failed" else s.SUCCESS
        self._hold("sub_operation", "took an instance in")
        self.came_at = _NEVER
        return status

    def _set_aside(self, request: StoreRequest) -> None:
        if self._unwanted is not None:
            self._intake.leave_out(self._unwanted, request.sop_class, self._size)
        else:
            self._intake.drained(self._size)

    def _answer(self, request: StoreRequest, taken: Taken) -> None:
        instance = self._instance
        if instance is not None:
            instance.association = self._association
            instance.received_at = clock.now()
            instance.duration_ms = int((clock.monotonic() - self._began) * 1000)
            instance.dimse_status = taken.status
        self._intake.answer(request.sop_instance, instance, taken, self._size)
        self._release()

    def answered(self) -> None:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        self._intake.after_answer()

    def give_up(self, error: str) -> None:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        assert self._request is not None
        if self._unwanted is not None:
            self._set_aside(self._request)
            return
        taken = self._refusal
        if taken is None or self._drains:
            taken = Taken(s.OUT_OF_RESOURCES, "too_large", error)
        self._answer(self._request, taken)

    def abandon(self) -> None:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
        self._release()
        self._head = bytearray()

    def refused(self, sop_instance: str, status: int) -> None:
        """See :class:`~airflow_dicom_get.net.get.ObjectReceiver`."""
        self._note_unread(sop_instance)
        if status == s.CANNOT_UNDERSTAND:
            taken = Taken(status, "empty_dataset", "The C-STORE-RQ had no data set.")
        else:
            taken = Taken(
                status, "class_refused", "The C-STORE-RQ came on a presentation context that is not for storage."
            )
        self._intake.answer(sop_instance, None, taken, 0)


@contextmanager
def attended(association: Association, receiver: Receiver) -> Iterator[None]:
    """Abort an association as soon as the destination is late with what came over it; and the run where it stays so."""
    over = clock.event()
    beside = clock.spawn(lambda: _attend(association, receiver, over), "dicom-get-attend")
    try:
        yield
    finally:
        over.set()
        beside.join()


def _attend(association: Association, receiver: Receiver, over: clock.Event) -> None:
    aborted = False
    while not over.wait(_INTERVAL):
        limit, cancel = receiver.limit, association.cancel
        waited = clock.monotonic() - receiver.came_at
        if waited > association.deadlines.next_object:
            cancel.abort(STUCK)
        if cancel.reason is not None:
            limit = 0.0 if cancel.hard else min(limit, _CANCEL_GRACE)
        if waited > limit and not aborted:
            log.warning(
                "The destination has not returned for %.1f s; aborting the association with %s.",
                waited,
                association.node,
            )
            association.abort()
            aborted = True
        if aborted and cancel.hard:
            return
