"""Modes that lie in responses to the C-GET, or flood with them."""

from __future__ import annotations

from itertools import count

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import GET, Behaviour, Retrieval, Spoiler, mode
from airflow_dicom_get.testing.misbehaving.wire import Message


class _AtGet(Behaviour):
    stages = frozenset({GET})


class _Withholds(_AtGet):
    """Never sends the even-numbered instances, whatever is requested."""

    def select(self, request: Row) -> list[Instance]:
        return [i for i in super().select(request) if i.number % 2]

    def withheld(self, retrieval: Retrieval) -> int:
        """About as many as were not sent."""
        return max(1, len(retrieval.instances))


@mode("success_with_failed")
class SuccessWithFailed(_Withholds):
    """Sends half of the instances and says Success, with as many failed in the counters."""

    def final(self, retrieval: Retrieval) -> None:
        failed = self.withheld(retrieval)
        self.get_response(retrieval, 0x0000, {wire.COMPLETED: retrieval.completed, wire.FAILED: failed})


@mode("success_partial")
class SuccessPartial(_Withholds):
    """Sends half of the instances and says Success, with all completed in the counters."""

    def final(self, retrieval: Retrieval) -> None:
        counters: dict[int, wire.Value] = {wire.COMPLETED: retrieval.completed + self.withheld(retrieval)}
        self.get_response(retrieval, 0x0000, counters | {wire.FAILED: 0, wire.WARNING: 0})


@mode("success_nocounts_partial")
class SuccessNoCountsPartial(_Withholds):
    """Sends half of the instances and says Success, without counters anywhere."""

    def pending(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, 0xFF00, {})

    def final(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, 0x0000, {})


@mode("success_zero")
class SuccessZero(_AtGet):
    """Sends nothing and says Success, with nothing completed."""

    def select(self, request: Row) -> list[Instance]:
        return []


@mode("success_zero_lies")
class SuccessZeroLies(_AtGet):
    """Sends nothing and says Success, with all completed in the counters."""

    def get(self, message: Message) -> None:
        asked = archive.parse_identifier(message.data, self.syntax_of(message.context))
        retrieval = Retrieval(message, [])
        self.get_response(retrieval, 0x0000, {wire.COMPLETED: len(archive.select(asked, self.holdings()))})


class _AllSent(_AtGet):
    """Sends every instance and ends with another status than Success."""

    status = 0

    def final(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, self.status, {wire.COMPLETED: 0, wire.FAILED: len(retrieval.instances)})


@mode("b000_all_sent")
class B000AllSent(_AllSent):
    """Sends every instance and ends with B000, all failed in the counters."""

    status = 0xB000


@mode("a702_all_sent")
class A702AllSent(_AllSent):
    """Sends every instance and ends with A702, all failed in the counters."""

    status = 0xA702


@mode("unknown_status")
class UnknownStatus(_AllSent):
    """Sends every instance and ends with the status 1234H, which no standard defines."""

    status = 0x1234


@mode("failed_list_lies")
class FailedListLies(_AtGet):
    """Sends every instance and ends with B000 and a Failed SOP Instance UID List of all of them."""

    def final(self, retrieval: Retrieval) -> None:
        uids = [i.sop for i in retrieval.instances]
        self.get_response(retrieval, 0xB000, retrieval.counters(), uids)


@mode("failed_list_in_command")
class FailedListInCommand(_AtGet):
    """Sends all, and ends with B000 and the Failed SOP Instance UID List in the command set, as Orthanc does."""

    def final(self, retrieval: Retrieval) -> None:
        raw = wire.uid_list([i.sop for i in retrieval.instances])
        message = retrieval.message
        fields: dict[int, wire.Value] = {
            wire.CLASS: message.elements.get(wire.CLASS, b""),
            wire.FIELD: wire.C_GET | wire.RESPONSE,
            wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
            wire.DATA_SET_TYPE: wire.NO_DATA_SET,
            wire.STATUS: 0xB000,
        }
        body = wire.elements(fields) + (b"\x08\x00\x58\x00" + len(raw).to_bytes(4, "little") + raw)
        length = b"\0\0\0\0\4\0\0\0" + len(body).to_bytes(4, "little")
        self.link.send_raw_command(message.context, length + body)


@mode("counters_lie")
class CountersLie(_AtGet):
    """Sends every instance with meaningless counters in all responses, and says Success."""

    def pending(self, retrieval: Retrieval) -> None:
        wild = retrieval.index * 7919
        counters: dict[int, wire.Value] = {wire.REMAINING: 65535 - wild, wire.COMPLETED: wild, wire.FAILED: 65535}
        self.get_response(retrieval, 0xFF00, counters | {wire.WARNING: 1})

    def final(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, 0x0000, {wire.REMAINING: 9, wire.COMPLETED: 65535, wire.FAILED: 65535})


@mode("no_pending")
class NoPending(_AtGet):
    """Sends no Pending responses and no counters, as the standard allows."""

    def pending(self, retrieval: Retrieval) -> None:
        """None is sent."""

    def final(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, 0x0000, {})


class _Ends(Spoiler):
    status = 0

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        retrieval.failed.append(instance.sop)

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        if not retrieval.failed:
            super().operate(retrieval, instance)

    def pending(self, retrieval: Retrieval) -> None:
        if not retrieval.failed:
            super().pending(retrieval)

    def final(self, retrieval: Retrieval) -> None:
        counters = retrieval.counters()
        del counters[wire.REMAINING]
        self.get_response(retrieval, self.status, counters)


@mode("c000_half")
class C000Half(_Ends):
    """Sends the first half of the instances and ends with C000."""

    status = 0xC000


@mode("fe00_unasked")
class Fe00Unasked(_Ends):
    """Sends the first half of the instances and ends with FE00, cancelled, although nobody cancelled."""

    status = 0xFE00


@mode("a702_then_ok")
class A702ThenOk(_AtGet):
    """Answers the first C-GET only with A702, and later ones correctly."""

    heal_after = 1

    def get(self, message: Message) -> None:
        self.respond(message, 0xA702)


@mode("get_fails")
class GetFails(_AtGet):
    """Answers every C-GET only with the failure status ``param`` (0xC001)."""

    param = 0xC001

    def get(self, message: Message) -> None:
        self.respond(message, int(self.number))


@mode("nostatus")
class NoStatus(_AtGet):
    """Sends every instance and a final response without a Status."""

    def final(self, retrieval: Retrieval) -> None:
        self.get_response(retrieval, None, {wire.COMPLETED: retrieval.completed})


@mode("msgid")
class MsgId(_AtGet):
    """Sends every instance and a final response to a message ID that nobody sent."""

    def final(self, retrieval: Retrieval) -> None:
        fields: dict[int, wire.Value] = {
            wire.CLASS: retrieval.message.elements.get(wire.CLASS, b""),
            wire.FIELD: wire.C_GET | wire.RESPONSE,
            wire.RESPONDED_ID: retrieval.message.number(wire.MESSAGE_ID) + 1000,
            wire.STATUS: 0x0000,
        }
        self.send_response(retrieval.message, fields)


@mode("second_final")
class SecondFinal(_AtGet):
    """Sends the final response twice."""

    def after(self, retrieval: Retrieval) -> None:
        self.final(retrieval)


@mode("store_after_final")
class StoreAfterFinal(_AtGet):
    """Sends one more object, of the same series but not listed, after the final response."""

    def after(self, retrieval: Retrieval) -> None:
        if retrieval.instances:
            extra = archive.another(retrieval.instances[0], 902)
            context = self.context_for(extra)
            if context is not None:
                self.store(retrieval, extra, context)


@mode("pending_flood")
class PendingFlood(Spoiler):
    """Sends Pending responses instead of an object, endlessly and as fast as it can."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        fields = retrieval.counters() | {
            wire.CLASS: retrieval.message.elements.get(wire.CLASS, b""),
            wire.FIELD: wire.C_GET | wire.RESPONSE,
            wire.RESPONDED_ID: retrieval.message.number(wire.MESSAGE_ID),
            wire.DATA_SET_TYPE: wire.NO_DATA_SET,
            wire.STATUS: 0xFF00,
        }
        one = wire.p_data(retrieval.message.context, wire.COMMAND_BIT | wire.LAST_BIT, wire.command(fields))
        self.link.flood(one * 64)


@mode("pending_wobble")
class PendingWobble(Spoiler):
    """Sends a Pending response every ``param`` seconds (0.1), endlessly, with a remaining count that varies."""

    param = 0.1

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        for number in count():
            self.get_response(retrieval, 0xFF00, retrieval.counters() | {wire.REMAINING: 3 + number % 2})
            self.link.wait(self.number)


@mode("pending_slow")
class PendingSlow(Spoiler):
    """Sends a Pending response every ``param`` seconds (1), endlessly, and no object."""

    param = 1.0

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        while True:
            self.pending(retrieval)
            self.link.wait(self.number)


@mode("error_comment")
class ErrorComment(_AtGet):
    """Answers every C-GET with C000 and an Error Comment with a patient's name, a line break and an escape."""

    def get(self, message: Message) -> None:
        fields: dict[int, wire.Value] = {
            wire.CLASS: message.elements.get(wire.CLASS, b""),
            wire.FIELD: wire.C_GET | wire.RESPONSE,
            wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
            wire.STATUS: 0xC000,
            wire.ERROR_COMMENT: f"no {archive.PATIENT_NAME}\n\x1b[31mFAKELOGLINE " + "x" * 200,
        }
        self.send_response(message, fields)


@mode("cancel_ignored")
class CancelIgnored(_AtGet):
    """Ignores a C-CANCEL-RQ and waits ``param`` seconds (0.2) before each object."""

    param = 0.2

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        retrieval.cancelled = False
        self.link.wait(self.number)
        super().operate(retrieval, instance)
        retrieval.cancelled = False

    def look_for_cancel(self, retrieval: Retrieval) -> None:
        super().look_for_cancel(retrieval)
        retrieval.cancelled = False


@mode("lists_refused")
class ListsRefused(_AtGet):
    """Answers a C-GET for more than one UID with C413, as pynetdicom's qrscp does."""

    def select(self, request: Row) -> list[Instance]:
        if len(archive.asked_uids(request)[1]) > 1:
            raise archive.RefusedError(0xC413)
        return super().select(request)
