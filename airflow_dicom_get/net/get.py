"""C-GET (PS3.4 C.4.3) as SCU, and the C-STORE sub-operations as SCP, on one association.

The conversation is a loop over fragments: outside an object a command is due, inside one its data.
Whatever breaks that order aborts the association (PS3.8 E.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.command import Command
from airflow_dicom_get.dicom.identifier import FAILED_SOP_INSTANCES
from airflow_dicom_get.dicom.pdata import Fragment
from airflow_dicom_get.errors import (
    AssociationAborted,
    DeadlineExceeded,
    GetNotOffered,
    NotAuthorised,
    PeerProtocolError,
    TooMuch,
)
from airflow_dicom_get.net.association import Association, CancelSeenError
from airflow_dicom_get.net.messages import context_for

STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
PATIENT_ROOT_GET = "1.2.840.10008.5.1.4.1.2.1.3"
MAX_OBJECT, MAX_OBJECT_HOURS = 16 << 30, 6.0
"""Bytes of one object, and hours that it may take to arrive."""
MAX_REST, MAX_REST_SECONDS = 64 << 20, 30.0
"""Bytes of an object that are read on after it was refused, and seconds for them: then its association goes on."""
_CANCEL_GRACE = 1.0
"""Seconds that a source has to end after a C-CANCEL before the association is aborted."""
_ENOUGH_GRACE = 10.0
"""The same where nobody waits for the end of the run."""


@dataclass(slots=True)
class StoreRequest:
    """A C-STORE-RQ whose context was accepted. UIDs are text as received, without padding, unchecked."""

    context_id: int
    context_class: str
    syntax: str
    sop_class: str
    sop_instance: str


class ObjectReceiver(Protocol):
    """What takes the objects of a C-GET. Called by one thread, in this order."""

    def begin(self, request: StoreRequest) -> None:
        """An object begins."""

    def data(self, view: memoryview, last: bool) -> bool:
        """Its next bytes; the view is void when this returns. Whether more of them are wanted: else it is refused."""

    def finish(self) -> int:
        """It is whole; return the status of the C-STORE-RSP."""

    def answered(self) -> None:
        """The C-STORE-RSP was sent."""

    def abandon(self) -> None:
        """It will never be whole."""

    def give_up(self, error: str) -> None:
        """It has gone beyond its bounds, as ``error`` says, and takes its association with it; then it is abandoned."""

    def refused(self, sop_instance: str, status: int) -> None:
        """A C-STORE-RQ was answered with ``status`` without its object: no context, or no data set."""


@dataclass(slots=True)
class GetOutcome:
    """How a C-GET ended, in the words of the peer: claims, no proof.

    ``total`` is what the counters of each response came to, modulo 65,536; None where they differ, or there were none.
    """

    status: int
    remaining: int | None = None
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None
    objects: int = 0
    cancelled: bool = False
    failed_uids: list[str] = field(default_factory=list)
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Most:
    """What one C-GET may bring at most."""

    objects: int
    """A source that sends more is aborted."""
    steps: int | None = None
    """How often a smaller number of remaining ones stands for an object that came; as often as ``objects`` by default.
    """


class _Get:
    def __init__(
        self,
        association: Association,
        context_id: int,
        message_id: int,
        receiver: ObjectReceiver,
        most: Most,
        next_object: float,
        first_object: float,
        enough: Callable[[], bool] | None,
    ) -> None:
        self.association = association
        self.context_id = context_id
        self.message_id = message_id
        self.receiver = receiver
        self.max_objects = most.objects
        self.steps_left = 1 + (most.objects if most.steps is None else most.steps)  # the first number is one, too
        self.next_object, self.first_object = next_object, first_object
        self.enough = enough
        self.objects = 0
        self.totals: set[int] = set()
        self.command = bytearray()
        self.store: Command | None = None  # the C-STORE-RQ whose data set is due
        self.store_context = 0
        self.refusal: int | None = None  # drain its data set and answer this
        self.final: Command | None = None  # a final response whose identifier is due
        self.drain: Command | None = None  # another request whose data set is due
        self.left, self.until = 0, 0.0  # bytes of the data set that may still come, and when the last of them is due
        self.wanted = True
        self.identifier = bytearray()
        self.remaining: int | None = None
        self.cancel_sent = False
        self.heard = False
        self.limit = clock.monotonic() + first_object

    # --- the loop ----------------------------------------------------------------------------

    def run(self) -> GetOutcome:
        association = self.association
        receiver, told = self.receiver, association.told
        try:
            while True:
                if association.cancel.reason is not None and not self.cancel_sent:
                    self._send_cancel()
                association.in_message = self._in_message()
                if self.enough is not None and not association.in_message and not self.cancel_sent and self.enough():
                    self._send_cancel(_ENOUGH_GRACE)
                # Of an object that is to be taken or read on, its own bounds hold: _store_request, _read_rest.
                # The data set of any other message is no progress.
                limit = float("inf") if self.store is not None and not self.cancel_sent else self.limit
                try:
                    fragment = association.fragment(limit, "next_object")
                except CancelSeenError:
                    if not self.cancel_sent:
                        self._send_cancel()
                    self.limit = min(self.limit, clock.monotonic() + _CANCEL_GRACE)
                    continue
                except DeadlineExceeded as late:
                    if self.cancel_sent and late.facts.get("phase") == "next_object":
                        self._abandon()
                        return GetOutcome(s.CANCEL, objects=self.objects, cancelled=True, total=self._total())
                    raise self._late(late) from None
                self.heard = True
                if told is not None and self.store is not None:
                    told.data(len(fragment.data))
                if fragment.is_command:
                    outcome = self._command(fragment)
                    if outcome is not None:
                        return outcome
                elif self.store is not None:
                    if fragment.context_id != self.store_context:
                        raise self._broken(
                            f"sent a data set on presentation context {fragment.context_id} after a command on "
                            f"{self.store_context}"
                        )
                    self.left -= len(fragment.data)
                    if self.left < 0 or association.read_at > self.until:
                        raise self._without_end()
                    if self.refusal is None and not receiver.data(fragment.data, fragment.last) and self.wanted:
                        self._read_rest()
                    if fragment.last:
                        self._stored()
                else:
                    outcome = self._other_data(fragment)
                    if outcome is not None:
                        return outcome
        except BaseException:
            self._abandon()
            association.abort()
            raise
        finally:
            association.in_message = False

    def _in_message(self) -> bool:
        return self.store is not None or self.final is not None or self.drain is not None or len(self.command) > 0

    def _abandon(self) -> None:
        if self.store is not None and self.refusal is None:
            self.receiver.abandon()
        self.store = None

    def _command(self, fragment: Fragment) -> GetOutcome | None:
        if self.store is not None or self.final is not None or self.drain is not None:
            raise self._broken("sent a command where a data set was expected")
        data: bytearray | memoryview = fragment.data
        if self.command or not fragment.last:
            self.command += fragment.data
            if len(self.command) > c.MAX_COMMAND_LENGTH:
                raise self._broken(f"sent a command set of more than {c.MAX_COMMAND_LENGTH} bytes")
            if not fragment.last:
                return None
            data = self.command
        try:
            command = Command(data)
        except PeerProtocolError as error:
            raise self._broken(f"sent an invalid command set ({error})") from error
        self.command = bytearray()
        told = self.association.told
        if told is not None and not (command.field == c.C_GET_RSP and command.has_dataset):
            told.received(fragment.context_id, command)
        if command.field == c.C_STORE_RQ:
            self._store_request(command, fragment.context_id)
        elif command.field == c.C_GET_RSP:
            return self._response(command, fragment.context_id)
        elif command.field & 0x8000 or command.field == c.C_CANCEL_RQ:
            raise self._broken(f"sent message {command.field:04X}H during a C-GET")
        elif command.has_dataset:
            self._read_rest()
            self.drain, self.store_context = command, fragment.context_id
        else:
            self._refuse_operation(command, fragment.context_id)
        return None

    # --- sub-operations ----------------------------------------------------------------------

    def _store_request(self, command: Command, context_id: int) -> None:
        self.objects += 1
        if self.objects > self.max_objects:
            self.association.abort(2)
            raise TooMuch(
                f"{self.association.node} sent more than {self.max_objects} objects in response to one C-GET; "
                "the association was aborted.",
                node=str(self.association.node),
            )
        if command.message_id is None:
            raise self._broken("sent a C-STORE-RQ without message id")
        self.store, self.store_context, self.refusal = command, context_id, None
        self.wanted, self.left = True, MAX_OBJECT
        self.until = clock.monotonic() + MAX_OBJECT_HOURS * 3600
        proposal = self.association.accepted.contexts.get(context_id)
        if proposal is None or context_id == self.context_id:
            self.refusal = s.CLASS_NOT_SUPPORTED
            self._read_rest()
        if not command.has_dataset:
            self.refusal = self.refusal or s.CANNOT_UNDERSTAND
            self._stored()
        elif self.refusal is None and proposal is not None:
            self.receiver.begin(
                StoreRequest(
                    context_id,
                    proposal.abstract_syntax,
                    proposal.transfer_syntax,
                    command.text(c.AFFECTED_SOP_CLASS),
                    command.text(c.AFFECTED_SOP_INSTANCE),
                )
            )

    def _read_rest(self) -> None:
        """A data set is refused: read what is left of it, so that the next message can be, but not for ever."""
        self.wanted, self.left = False, MAX_REST
        self.until = clock.monotonic() + MAX_REST_SECONDS

    def _without_end(self) -> PeerProtocolError:
        """Give up a data set that goes beyond its bounds; the error that ends its association."""
        if self.wanted:
            what = f"sent an instance of more than {MAX_OBJECT >> 30} GiB, or for more than {MAX_OBJECT_HOURS:g} h"
        else:
            what = f"sent more than {MAX_REST >> 20} MiB, or for more than {MAX_REST_SECONDS:g} s, of what was refused"
        error = self._broken(what)
        if self.store is not None and self.refusal is None:
            error.facts["given_up"] = True
            self.receiver.give_up(error.message)
        return error

    def _stored(self) -> None:
        store = self.store
        assert store is not None
        assert store.message_id is not None
        status = self.receiver.finish() if self.refusal is None else self.refusal
        self.store = None
        response = c.c_store_rsp(
            store.raw(c.AFFECTED_SOP_CLASS), store.raw(c.AFFECTED_SOP_INSTANCE), store.message_id, status
        )
        self.association.send_message(self.store_context, response)
        if self.refusal is None:
            self.receiver.answered()
        else:
            self.receiver.refused(store.text(c.AFFECTED_SOP_INSTANCE), self.refusal)
        self._progress()

    def _refuse_operation(self, command: Command, context_id: int) -> None:
        """Answer a request that has no place in a C-GET: C-ECHO is harmless, the rest is refused."""
        elements: dict[int, int | str] = {
            c.COMMAND_FIELD: command.field | 0x8000,
            c.RESPONDED_MESSAGE_ID: command.message_id or 0,
            c.DATASET_TYPE: c.NO_DATASET,
            c.STATUS: s.SUCCESS if command.field == c.C_ECHO_RQ else s.UNRECOGNISED_OPERATION,
        }
        self.association.send_message(context_id, c.encode(elements))

    def _other_data(self, fragment: Fragment) -> GetOutcome | None:
        if self.final is not None:
            self.identifier += fragment.data
            if len(self.identifier) > c.MAX_COMMAND_LENGTH:
                raise self._broken("sent an identifier without end")
            if not fragment.last:
                return None
            if self.association.told is not None:
                self.association.told.received(self.context_id, self.final, self.identifier)
            return self._outcome(self.final)
        if self.drain is None:
            raise self._broken("sent a data set without its command")
        self.left -= len(fragment.data)
        if self.left < 0 or self.association.read_at > self.until:
            raise self._without_end()
        if fragment.last:
            command, self.drain = self.drain, None
            if command.field == c.C_GET_RSP:
                if self.association.told is not None:
                    self.association.told.received(self.context_id, command)
            else:
                self._refuse_operation(command, self.store_context)
        return None

    # --- responses ---------------------------------------------------------------------------

    def _response(self, command: Command, context_id: int) -> GetOutcome | None:
        if context_id != self.context_id:
            raise self._broken(f"answered the C-GET on presentation context {context_id}")
        if command.responded_id != self.message_id:
            raise self._broken(f"answered message {command.responded_id} instead of {self.message_id}")
        if command.status is None:
            raise self._broken("sent a C-GET-RSP without status")
        self._add_up(command)
        if s.is_pending(command.status):
            remaining = command.us(c.REMAINING)
            if remaining is not None and (self.remaining is None or remaining < self.remaining):
                self.remaining = remaining  # the lowest so far: one that goes up and down is no progress
                if self.steps_left:  # nor is one that is counted down from any number
                    self.steps_left -= 1
                    self._progress()
            if command.has_dataset:  # not allowed, and harmless
                self._read_rest()
                self.drain, self.store_context = command, context_id
            return None
        if command.has_dataset:
            self.final = command
            self._progress()  # its identifier is due in the same time
            return None
        return self._outcome(command)

    def _add_up(self, command: Command) -> None:
        """Note what the counters of a response come to; where it leaves them out, it says nothing."""
        remaining, completed = command.us(c.REMAINING), command.us(c.COMPLETED)
        open_ended = s.is_pending(command.status or 0) or command.status == s.CANCEL
        if completed is not None and (remaining is not None or not open_ended):
            others = (remaining or 0) + (command.us(c.FAILED) or 0) + (command.us(c.WARNING) or 0)
            self.totals.add((completed + others) % (1 << 16))

    def _total(self) -> int | None:
        return next(iter(self.totals)) if len(self.totals) == 1 else None

    def _outcome(self, command: Command) -> GetOutcome:
        assert command.status is not None
        return GetOutcome(
            command.status,
            command.us(c.REMAINING),
            command.us(c.COMPLETED),
            command.us(c.FAILED),
            command.us(c.WARNING),
            self.objects,
            self.cancel_sent and command.status == s.CANCEL,
            self._failed_uids(command),
            self._total(),
        )

    def _failed_uids(self, command: Command) -> list[str]:
        """(0008,0058), a hint only: in the identifier, or (one peer) in the command set; empties dropped."""
        from airflow_dicom_get.dicom.header import HeaderError
        from airflow_dicom_get.dicom.identifier import decode_identifier

        raw = command.stray.get(FAILED_SOP_INSTANCES, b"")
        if self.identifier:
            try:
                raw = decode_identifier(self.identifier, {FAILED_SOP_INSTANCES}).get(FAILED_SOP_INSTANCES, raw)
            except HeaderError:
                pass
        return [part.strip("\0 ") for part in raw.decode("ascii", "replace").split("\\") if part.strip("\0 ")]

    # --- limits ------------------------------------------------------------------------------

    def _progress(self) -> None:
        if not self.cancel_sent:
            self.limit = clock.monotonic() + (self.next_object if self.objects else self.first_object)

    def _late(self, late: DeadlineExceeded) -> DeadlineExceeded:
        """The error of a deadline, with the time that was really given."""
        times = self.first_object / self.next_object
        if self.objects or times == 1 or late.facts.get("phase") != "next_object":
            return late
        return DeadlineExceeded(
            f"{self.association.node} sent no first instance within {self.first_object:g} s, {times:g} times "
            "deadlines.next_object, since it lists some as NEARLINE; the association was aborted.",
            hint=late.hint,
            node=str(self.association.node),
            phase="next_object",
            seconds=self.first_object,
        )

    def _send_cancel(self, grace: float = _CANCEL_GRACE) -> None:
        """C-CANCEL-RQ (PS3.7 9.3.3.3), which has no response of its own; none where the last response has come."""
        self.cancel_sent = True
        self.limit = min(self.limit, clock.monotonic() + grace)
        if self.final is not None:
            return
        self.association.send_message(
            self.context_id,
            c.encode(
                {
                    c.COMMAND_FIELD: c.C_CANCEL_RQ,
                    c.RESPONDED_MESSAGE_ID: self.message_id,
                    c.DATASET_TYPE: c.NO_DATASET,
                }
            ),
        )

    def _broken(self, what: str) -> PeerProtocolError:
        self.association.abort(2)
        return PeerProtocolError(
            f"{self.association.node} {what}; the association was aborted.", node=str(self.association.node)
        )


def c_get(
    association: Association,
    model: str,
    identifier: bytes,
    receiver: ObjectReceiver,
    *,
    next_object: float,
    first_object: float | None = None,
    most: Most,
    enough: Callable[[], bool] | None = None,
) -> GetOutcome:
    """Run one C-GET and feed ``receiver``.

    Parameters
    ----------
    model : str
        UID of the retrieve model, one of the two constants of this module.
    identifier : bytes
        Level and unique keys, implicit VR.
    next_object : float
        Seconds that may pass without an object or a smaller number of remaining ones.
    first_object : float
        The same before the first object; ``next_object`` by default.
    most : Most
        What it may bring.
    enough : callable, optional
        Asked between messages; once it is true, a C-CANCEL-RQ is sent, and what still comes is taken.

    Raises
    ------
    GetNotOffered
        No context was accepted for the model.
    NotAuthorised
        The peer hung up on the request itself.
    TooMuch
        It sent more than ``most.objects``.
    AssociationAborted, DeadlineExceeded, PeerProtocolError, Cancelled
    """
    context_id = context_for(association, model)
    node = str(association.node)
    if context_id is None:
        raise GetNotOffered(
            f"{node} does not offer C-GET.",
            hint="Ask the PACS admin to enable C-GET (Study Root or Patient Root).",
            node=node,
        )
    message_id = association.next_message_id()
    association.send_message(
        context_id,
        c.encode(
            {
                c.AFFECTED_SOP_CLASS: model,
                c.COMMAND_FIELD: c.C_GET_RQ,
                c.MESSAGE_ID: message_id,
                c.PRIORITY: 0,
                c.DATASET_TYPE: c.DATASET_FOLLOWS,
            }
        ),
        identifier,
    )
    first = next_object if first_object is None else first_object
    get = _Get(association, context_id, message_id, receiver, most, next_object, first, enough)
    try:
        return get.run()
    except AssociationAborted as error:
        if get.heard or association.cancel.reason is not None:
            raise
        raise NotAuthorised(
            f"{node} accepted the association, but closed it on the C-GET request.",
            hint="Our AE title is probably not allowed to retrieve: ask the PACS admin.",
            node=node,
        ) from error
