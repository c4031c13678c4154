"""Modes that break PDUs, fragments and command sets, or stop in the middle of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import islice

from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.archive import Instance
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, Behaviour, Retrieval, Spoiler, mode
from airflow_dicom_get.testing.misbehaving.wire import GoneError, Message

_ZEROS = bytes(1 << 16)


class _AtGet(Behaviour):
    stages = frozenset({GET})


class _MidObject(Spoiler):
    """Sends the command and the first half of the data set of the middle instance, then strikes."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        half = b"".join(instance.pieces())[: instance.size // 2 & ~1]
        for piece, _ in wire.fragments((half,), self.link.fragment_size):
            self.link.send_fragment(context, piece, last=False)
        self.strike(retrieval, instance, context)

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        """What happens with half of the data set sent."""
        raise NotImplementedError


# --- PDUs ----------------------------------------------------------------------------------------


@mode("pdu_huge")
class PduHuge(_MidObject):
    """Announces a P-DATA-TF of 4 GiB less one byte in the middle of an object and sends zeros for it."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(struct.pack(">BBIIBB", wire.P_DATA, 0, 0xFFFFFFFF, 0xFFFFFFFB, context, 0))
        self.link.flood(_ZEROS)


@mode("pdu_over_max")
class PduOverMax(Spoiler):
    """Sends one object in PDUs of four times the length that the client announced."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        size = 4 * max(self.link.peer_max_pdu, 16384)
        data = b"".join(instance.pieces())
        data += bytes(max(0, size - len(data)))
        for piece, last in wire.fragments((data,), size):
            self.link.send_fragment(context, piece, last)
        self.tally(retrieval, instance, self.await_response(retrieval))


@mode("pdu_zero")
class PduZero(_AtGet):
    """Sends a thousand P-DATA-TF of length 0 before the first object."""

    def before(self, retrieval: Retrieval) -> None:
        for _ in range(1000):
            self.link.send(wire.pdu(wire.P_DATA, b""))


@mode("pdu_unknown")
class PduUnknown(Spoiler):
    """Sends a PDU of type 42H instead of an object, then nothing."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(wire.pdu(0x42, bytes(10)))
        self.refuse_to_go_on()


@mode("pdu_length_lies")
class PduLengthLies(Spoiler):
    """Understates the length of a data PDU, so that the rest of it is where a PDU should begin."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        data = b"".join(instance.pieces())[:2048]
        self.link.send(struct.pack(">BBIIBB", wire.P_DATA, 0, 106, len(data) + 2, context, 0) + data)
        self.refuse_to_go_on()


@mode("garbage")
class Garbage(_MidObject):
    """Sends 64 KiB of random bytes in the middle of an object, then nothing."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(b"\xfe" + random.Random(1).randbytes(65535))
        self.refuse_to_go_on()


# --- fragments -----------------------------------------------------------------------------------


class _Fragments(_AtGet):
    """Sends every data set in unusual but legal, or nearly legal, fragments."""

    def send_dataset(self, context: int, pieces: Iterator[bytes]) -> None:
        for piece, last in wire.fragments(pieces, min(self.size, self.link.fragment_size)):
            self.emit(context, bytes(piece), last)

    size = 1 << 20

    def emit(self, context: int, piece: bytes, last: bool) -> None:
        """Send one fragment."""
        raise NotImplementedError


@mode("pdv_odd")
class PdvOdd(_Fragments):
    """Sends data sets in fragments of 1021 bytes, an odd length, which PS3.8 E.1 forbids."""

    size = 1021

    def emit(self, context: int, piece: bytes, last: bool) -> None:
        self.link.send_fragment(context, piece, last)


@mode("pdv_two_byte")
class PdvTwoByte(_Fragments):
    """Sends data sets in fragments of two bytes, 500 of them in a PDU."""

    def send_dataset(self, context: int, pieces: Iterator[bytes]) -> None:
        parts = wire.fragments(pieces, 2)
        limit = max(1, min(500, self.link.fragment_size // 8))
        while group := list(islice(parts, limit)):
            items = (wire.pdv(context, wire.LAST_BIT * last, bytes(piece)) for piece, last in group)
            self.link.send(wire.pdu(wire.P_DATA, b"".join(items)))


@mode("pdv_many")
class PdvMany(_Fragments):
    """Sends data sets with many fragments of a hundred bytes in each PDU."""

    def emit(self, context: int, piece: bytes, last: bool) -> None:
        room = max(100, self.link.fragment_size * 9 // 10)
        for at in range(0, len(piece), room):
            part = piece[at : at + room]
            final = last and at + room >= len(piece)
            items = (
                wire.pdv(context, wire.LAST_BIT * (end and final), bytes(small))
                for small, end in wire.fragments((part,), 100)
            )
            self.link.send(wire.pdu(wire.P_DATA, b"".join(items)))


@mode("pdv_empty")
class PdvEmpty(_Fragments):
    """Sends an empty fragment after each data fragment, and an empty one as the last."""

    size = 4000

    def emit(self, context: int, piece: bytes, last: bool) -> None:
        self.link.send_fragment(context, piece, last=False)
        self.link.send_fragment(context, b"", last)


@mode("pdv_reserved")
class PdvReserved(_Fragments):
    """Sets all reserved bits of the message control headers of data fragments."""

    def emit(self, context: int, piece: bytes, last: bool) -> None:
        self.link.send(wire.p_data(context, 0xFC | wire.LAST_BIT * last, piece))


@mode("pdv_short")
class PdvShort(_MidObject):
    """Sends a fragment whose length exceeds its PDU, then nothing."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(struct.pack(">BBIIBB", wire.P_DATA, 0, 100, 5000, context, 0) + bytes(94))
        self.refuse_to_go_on()


@mode("pdv_no_header")
class PdvNoHeader(_MidObject):
    """Sends a fragment of length 1, too short to hold its own header, then nothing."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(struct.pack(">BBIIB", wire.P_DATA, 0, 5, 1, context))
        self.refuse_to_go_on()


@mode("interleave")
class Interleave(Spoiler):
    """Interleaves the fragments of two objects."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        other = retrieval.instances[0]
        self.store_command(retrieval, instance, context)
        size = max(2, instance.size // 4 & ~1)
        first = wire.fragments(instance.pieces(), min(size, self.link.fragment_size))
        second = wire.fragments(other.pieces(), min(size, self.link.fragment_size))
        self.link.send_fragment(context, next(first)[0], last=False)
        self.store_command(retrieval, other, context)
        for (one, last_one), (two, last_two) in zip(first, second, strict=False):
            self.link.send_fragment(context, two, last_two)
            self.link.send_fragment(context, one, last_one)
        self.refuse_to_go_on()


@mode("ctx_switch")
class CtxSwitch(Spoiler):
    """Sends the data set of an object on another context than its command."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.send_dataset(retrieval.message.context, instance.pieces())
        self.tally(retrieval, instance, self.await_response(retrieval))


@mode("ctx_wrong")
class CtxWrong(Spoiler):
    """Sends an object, command and data set, on the context of the C-GET."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.send(retrieval, instance, retrieval.message.context)


# --- command sets --------------------------------------------------------------------------------


@mode("cmd_bomb")
class CmdBomb(Spoiler):
    """Sends command fragments instead of an object, endlessly."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        size = self.link.fragment_size
        self.link.send(wire.p_data(context, wire.COMMAND_BIT, wire.command({wire.FIELD: wire.C_STORE})[:20]))
        self.link.flood(wire.p_data(context, wire.COMMAND_BIT, bytes(size)))


@mode("cmd_garbage")
class CmdGarbage(Spoiler):
    """Sends random bytes as a command set, then nothing."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        noise = random.Random(2).randbytes(120)
        self.link.send(wire.p_data(context, wire.COMMAND_BIT | wire.LAST_BIT, noise))
        self.refuse_to_go_on()


@mode("cmd_nolen")
class CmdNoLen(_AtGet):
    """Leaves the group length out of its C-STORE-RQ command sets."""

    def store_command(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send_raw_command(context, wire.elements(self.store_fields(retrieval, instance)))


@mode("cmd_badlen")
class CmdBadLen(_AtGet):
    """Gives a wrong group length in its C-STORE-RQ command sets."""

    def store_command(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        body = wire.elements(self.store_fields(retrieval, instance))
        self.link.send_raw_command(context, struct.pack("<HHII", 0, 0, 4, 7) + body)


@mode("cmd_fragmented")
class CmdFragmented(_AtGet):
    """Sends its C-STORE-RQ command sets in fragments of seven bytes, each in a PDU of its own."""

    def store_command(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        encoded = wire.command(self.store_fields(retrieval, instance))
        for piece, last in wire.fragments((encoded,), 7):
            self.link.send(wire.p_data(context, wire.COMMAND_BIT | wire.LAST_BIT * last, bytes(piece)))


@mode("store_rq_twice")
class StoreRqTwice(Spoiler):
    """Sends the C-STORE-RQ command of an object twice before its data set."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.store(retrieval, instance, context)
        self.tally(retrieval, instance, self.await_response(retrieval))


@mode("pending_mid_store")
class PendingMidStore(Spoiler):
    """Sends a Pending response between the C-STORE-RQ command of an object and its data set."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.pending(retrieval)
        self.send_dataset(context, instance.pieces())
        self.tally(retrieval, instance, self.await_response(retrieval))


@mode("final_mid_store")
class FinalMidStore(_MidObject):
    """Sends the final response, Success, in the middle of the data set of an object, then nothing."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.get_response(retrieval, 0x0000, {wire.COMPLETED: len(retrieval.instances)})
        self.refuse_to_go_on()


# --- the line goes quiet or away -----------------------------------------------------------------


@mode("silent")
class Silent(_AtGet):
    """Receives the C-GET-RQ and never sends a byte again."""

    def get(self, message: Message) -> None:
        self.link.hold()


@mode("stall_mid")
class StallMid(_MidObject):
    """Stops sending in the middle of an object."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.hold()


@mode("stall_end")
class StallEnd(_AtGet):
    """Sends every object and never the final response."""

    def final(self, retrieval: Retrieval) -> None:
        self.link.hold()


@mode("noread")
class NoRead(Spoiler):
    """Sends an object and never reads again."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store(retrieval, instance, context)
        self.link.hold()


@mode("trickle")
class Trickle(_MidObject):
    """Sends the second half of an object two bytes at a time, with ``param`` seconds (1) after each."""

    param = 1.0

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        rest = b"".join(instance.pieces())[instance.size // 2 & ~1 :]
        self.link.drip(wire.p_data(context, wire.LAST_BIT, rest[: self.link.fragment_size]), self.number, step=2)


@mode("trickle_pdus")
class TricklePdus(_MidObject):
    """Sends the second half of an object in whole PDUs of two bytes each, with ``param`` seconds (1) after each."""

    param = 1.0

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        for piece, last in wire.fragments((b"".join(instance.pieces())[instance.size // 2 & ~1 :],), 2):
            self.link.send_fragment(context, piece, last)
            self.link.wait(self.number)


@mode("slow_line")
class SlowLine(_AtGet):
    """Behaves correctly, but sends its data sets at ``param`` bytes per second (10000), in PDUs of a tenth of that."""

    param = 10_000

    def send_dataset(self, context: int, pieces: Iterator[bytes]) -> None:
        step = max(2, min(int(self.number) // 10, self.link.fragment_size) & ~1)
        for piece, last in wire.fragments(pieces, step):
            self.link.send_fragment(context, piece, last)
            self.link.wait(step / self.number)


@mode("drop")
class Drop(_MidObject):
    """Closes the connection in the middle of an object."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        raise GoneError("dropped on purpose")


@mode("reset")
class Reset(_MidObject):
    """Resets the connection in the middle of an object."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.reset()


@mode("drop_on_get")
class DropOnGet(_AtGet):
    """Closes the connection on the C-GET-RQ, as Orthanc does for an AE title that is not allowed to retrieve."""

    def get(self, message: Message) -> None:
        raise GoneError("dropped on purpose")


@mode("abort_mid")
class AbortMid(_MidObject):
    """Sends an A-ABORT in the middle of an object."""

    def strike(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(wire.abort())
        raise GoneError("aborted on purpose")


@mode("abort_end")
class AbortEnd(_AtGet):
    """Sends every object and then an A-ABORT instead of the final response."""

    def final(self, retrieval: Retrieval) -> None:
        self.link.send(wire.abort(0))
        raise GoneError("aborted on purpose")


@mode("release_mid")
class ReleaseMid(Spoiler):
    """Sends an A-RELEASE-RQ instead of the second half of the objects and of the final response."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.link.send(wire.pdu(wire.RELEASE_RQ, bytes(4)))
        self.link.read_pdu()
        raise GoneError("released on purpose")


class _AtByte(_AtGet):
    fault = ""

    def get(self, message: Message) -> None:
        self.link.fault_at(int(self.number), self.fault)
        super().get(message)


@mode("stall_at")
class StallAt(_AtByte):
    """Stops sending after byte ``param`` (0) of its answer to the C-GET-RQ."""

    fault = "stall"


@mode("close_at")
class CloseAt(_AtByte):
    """Closes the connection after byte ``param`` (0) of its answer to the C-GET-RQ."""

    fault = "close"


@mode("reset_at")
class ResetAt(_AtByte):
    """Resets the connection after byte ``param`` (0) of its answer to the C-GET-RQ."""

    fault = "reset"


@mode("mutate")
class Mutate(Behaviour):
    """Changes, drops or adds a few random bytes in its answers to C-FIND and C-GET; ``param`` (0) is the seed."""

    stages = frozenset({FIND, GET})

    def find(self, message: Message) -> None:
        self.link.mutate(f"{self.param} {self.link.number}")
        super().find(message)

    def get(self, message: Message) -> None:
        self.link.mutate(f"{self.param} {self.link.number}")
        super().get(message)
