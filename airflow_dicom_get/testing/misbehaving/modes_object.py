"""Modes that send wrong, strange or too many objects."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, repeat

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Element, Instance
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, Behaviour, Retrieval, Spoiler, mode

_SOP, _STUDY, _SERIES, _SOP_CLASS = 0x00080018, 0x0020000D, 0x0020000E, 0x00080016


class _AtGet(Behaviour):
    stages = frozenset({GET})


class _OtherBytes(Spoiler):
    """Sends other bytes as the data set of the middle instance, under its right command."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.send_dataset(context, iter(self.bytes_for(instance)))
        self.tally(retrieval, instance, self.await_response(retrieval))

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        """The pieces that go out."""
        raise NotImplementedError


def _rewritten(instance: Instance, changes: dict[int, str]) -> list[Element]:
    return [(tag, vr, changes.get(tag, value)) for tag, vr, value in instance.elements()]


def _with_pixels(elements: Iterable[Element], size: int, syntax: str = wire.EXPLICIT_LE) -> bytes:
    head = archive.encode(elements, syntax)
    pixels = bytes(max(2, size - len(head) - 12) & ~1)
    return head + archive.encode([(0x7FE00010, b"OB", pixels)], syntax)


# --- UIDs ----------------------------------------------------------------------------------------

_HOSTILE_UIDS = {
    "traversal": ("../../../../PWNED", "is a relative path out of the folder"),
    "absolute": ("/tmp/PWNED", "is an absolute path"),
    "dotdot": ("..", "is the parent folder"),
    "newline": ("1.2\n\x1b[31mFAKELOGLINE", "holds a line break and a terminal escape"),
    "nul": ("1.2\x00.3", "holds a NUL"),
    "long": ("1." + "2" * 198, "has 200 characters"),
    "letters": ("1.2.ABC", "holds letters"),
    "empty": ("", "is empty"),
}


def _register_uid_mode(name: str, uid: str, what: str) -> None:
    class HostileUid(Spoiler):
        def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
            fields = self.store_fields(retrieval, instance) | {wire.INSTANCE: uid}
            self.link.send_command(context, fields)
            self.send_dataset(context, iter([_with_pixels(_rewritten(instance, {_SOP: uid}), instance.size)]))
            self.tally(retrieval, instance, self.await_response(retrieval))

    HostileUid.__doc__ = f"Sends an object whose SOP Instance UID, in command and data set, {what}."
    mode(f"uid_{name}")(HostileUid)


for _name, (_value, _what) in _HOSTILE_UIDS.items():
    _register_uid_mode(_name, _value, _what)


@mode("uid_mismatch")
class UidMismatch(_OtherBytes):
    """Sends an object whose data set has another SOP Instance UID than its command."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        yield _with_pixels(_rewritten(instance, {_SOP: instance.sop + "1"}), instance.size)


@mode("class_mismatch")
class ClassMismatch(_OtherBytes):
    """Sends an object whose data set has another SOP Class UID than its command and context."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        other = archive.MR if instance.sop_class != archive.MR else archive.CT
        yield _with_pixels(_rewritten(instance, {_SOP_CLASS: other}), instance.size)


@mode("ds_traversal")
class DsTraversal(_OtherBytes):
    """Sends an object whose Study and Series Instance UIDs, in the data set, are paths."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        paths = {_STUDY: "../../PWNED", _SERIES: "/tmp/PWNED"}
        yield _with_pixels(_rewritten(instance, paths), instance.size)


# --- data sets -----------------------------------------------------------------------------------


@mode("ds_group2")
class DsGroup2(_OtherBytes):
    """Sends an object whose data set begins with file meta elements."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        yield archive.encode([(0x00020010, b"UI", instance.syntax)], wire.EXPLICIT_LE)
        yield from instance.pieces()


@mode("ds_preamble")
class DsPreamble(_OtherBytes):
    """Sends a complete Part 10 file, including the preamble, as a data set."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        meta = archive.encode(
            [
                (0x00020001, b"OB", b"\0\1"),
                (0x00020002, b"UI", instance.sop_class),
                (0x00020003, b"UI", instance.sop),
                (0x00020010, b"UI", instance.syntax),
            ],
            wire.EXPLICIT_LE,
        )
        yield bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta
        yield from instance.pieces()


@mode("ds_othersyntax")
class DsOtherSyntax(_OtherBytes):
    """Sends an object in implicit VR on a context of another transfer syntax."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        other = wire.IMPLICIT_LE if instance.syntax != wire.IMPLICIT_LE else wire.EXPLICIT_LE
        return instance.pieces(other)


@mode("ds_truncated")
class DsTruncated(_OtherBytes):
    """Sends an object whose data set ends 100 bytes before the end of its last element."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        yield b"".join(instance.pieces())[:-100]


@mode("ds_length_lies")
class DsLengthLies(_OtherBytes):
    """Sends an object with an early element that claims 4 GiB."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        yield archive.encode([(0x00080005, b"CS", "ISO_IR 100")], wire.EXPLICIT_LE)
        yield struct.pack("<HH2sHI", 0x0008, 0x0006, b"UN", 0, 0xFFFFFFF0)
        yield from instance.pieces()


@mode("ds_garbage")
class DsGarbage(_OtherBytes):
    """Sends random bytes as a data set."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        yield b"\xff\xfe" + archive.noise(99)[: max(2, instance.size & ~1)]


@mode("deflate_bomb")
class DeflateBomb(_AtGet):
    """Sends, on deflated contexts if there are any, objects of 1 MiB that inflate to 1 GiB before the Study UID."""

    def context_for(self, instance: Instance) -> int | None:
        deflated = super().context_for(replace(instance, syntax=wire.DEFLATED_LE))
        return deflated if deflated is not None else super().context_for(instance)

    def store(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.send_dataset(context, iter(_bomb(instance)))
        self.count(instance)


def _bomb(instance: Instance) -> Iterable[bytes]:
    elements = instance.elements()
    head = [e for e in elements if e[0] < 0x00090000]
    tail = [e for e in elements if e[0] > 0x00090000]
    packer = zlib.compressobj(wbits=-15)
    claim = struct.pack("<HH2sHI", 0x0009, 0x0010, b"OB", 0, 1 << 30)
    yield packer.compress(archive.encode(head, wire.EXPLICIT_LE) + claim) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush a block depends on nothing before it, so one packed MiB can be sent 1024 times.
    mebibyte = zlib.compressobj(wbits=-15)
    yield from repeat(mebibyte.compress(bytes(1 << 20)) + mebibyte.flush(zlib.Z_FULL_FLUSH), 1024)
    yield packer.compress(archive.encode(tail, wire.EXPLICIT_LE)) + packer.flush()


class _OtherValues(_AtGet):
    """Sends other values than its archive holds."""

    def store(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        changed = _rewritten(instance, self.changes(instance))
        self.send_dataset(context, iter([_with_pixels(changed, instance.size, instance.syntax)]))
        self.count(instance)

    def changes(self, instance: Instance) -> dict[int, str]:
        """Values by tag."""
        raise NotImplementedError


_NAME = archive.PATIENT_NAME
_ODD = {
    0x00080005: f"ISO 8859\\{_NAME}\\GBK",
    0x00080020: _NAME,
    0x00080030: _NAME * 3,
    0x00080060: "x" * 40,
    0x00100020: "\xff" * 80,
    0x00200010: _NAME * 9,
    0x00200011: _NAME,
    0x00200013: "9" * 20,
}


@mode("odd_values")
class OddValues(_OtherValues):
    """Puts a patient's name and numbers of twenty digits where they do not belong, in rows and objects."""

    stages = frozenset({FIND, GET})

    def rows(self, level: str, query: archive.Row) -> Iterator[archive.Row]:
        for row in super().rows(level, query):
            yield row | {tag: value for tag, value in _ODD.items() if tag in row or tag == 0x00080005}

    def changes(self, instance: Instance) -> dict[int, str]:
        return _ODD


@mode("huge_modality")
class HugeModality(_OtherValues):
    """Sends objects in implicit VR with a Modality of ``param`` bytes (900,000), for which explicit VR has no room."""

    param = 900_000

    def changes(self, instance: Instance) -> dict[int, str]:
        return {0x00080060: "M" * int(self.number)} if instance.syntax == wire.IMPLICIT_LE else {}


@mode("other_patient")
class OtherPatient(_OtherValues):
    """Sends the objects of its study with the Patient ID ``param`` (OTHER)."""

    param = "OTHER"

    def changes(self, instance: Instance) -> dict[int, str]:
        return {0x00100020: str(self.param)}


@mode("no_dataset")
class NoDataset(Spoiler):
    """Sends a C-STORE-RQ that says it has no data set."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        fields = self.store_fields(retrieval, instance) | {wire.DATA_SET_TYPE: wire.NO_DATA_SET}
        self.link.send_command(context, fields)
        self.tally(retrieval, instance, self.await_response(retrieval))


@mode("empty_dataset")
class EmptyDataset(_OtherBytes):
    """Sends a C-STORE-RQ with a data set of no bytes."""

    def bytes_for(self, instance: Instance) -> Iterable[bytes]:
        return ()


@mode("endless_object")
class EndlessObject(Spoiler):
    """Sends an object whose pixel data has undefined length and no end."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store_command(retrieval, instance, context)
        self.send_dataset(context, chain((self.head(instance),), repeat(_FRAME)))

    def head(self, instance: Instance) -> bytes:
        """What stands before its first frame."""
        head = archive.encode(instance.elements(), instance.syntax)
        return head + struct.pack("<HH2sHIHHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0)


_FRAME = struct.pack("<HHI", 0xFFFE, 0xE000, 1 << 16) + bytes(1 << 16)


@mode("endless_garbage")
class EndlessGarbage(EndlessObject):
    """Sends an object that begins with random bytes and has no end."""

    def head(self, instance: Instance) -> bytes:
        return b"\xff\xfe" + archive.noise(99)


@mode("endless_on_context")
class EndlessOnContext(EndlessObject):
    """Sends an object without end, command and data set, on the context of the C-GET."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        super().spoil(retrieval, instance, retrieval.message.context)


# --- objects that were not asked for --------------------------------------------------------------


@mode("foreign_study")
class ForeignStudy(_AtGet):
    """Sends an object of another study before those that were requested."""

    def before(self, retrieval: Retrieval) -> None:
        for instance in self.unasked(retrieval.instances):
            context = self.context_for(instance)
            if context is not None:
                self.store(retrieval, instance, context)
                self.await_response(retrieval)

    def unasked(self, asked: Sequence[Instance]) -> Iterable[Instance]:
        """What is sent before ``asked``, and not counted in the responses."""
        return [archive.another(asked[0], 1, study=archive.FOREIGN_STUDY_UID)] if asked else []


@mode("extra_instance")
class ExtraInstance(ForeignStudy):
    """Sends, before those that were requested, an object of the same series that C-FIND never lists."""

    def unasked(self, asked: Sequence[Instance]) -> Iterable[Instance]:
        return [archive.another(asked[0], 901)] if asked else []


@mode("dup_same")
class DupSame(Spoiler):
    """Sends an object twice, with the same bytes."""

    salt = 0

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.store(retrieval, instance, context)
        self.await_response(retrieval)
        self.send(retrieval, replace(instance, salt=self.salt), context)


@mode("dup_diff")
class DupDiff(DupSame):
    """Sends an object twice, the second time with other pixel data."""

    salt = 7


@mode("dup_othersyntax")
class DupOtherSyntax(Spoiler):
    """Sends an object twice, the second time in another transfer syntax."""

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        self.send(retrieval, instance, context)
        for answer in self.link.answers:
            if answer.result == 0 and answer.abstract == instance.sop_class and instance.syntax not in answer.syntaxes:
                self.store(retrieval, replace(instance, syntax=answer.syntaxes[0]), answer.id)
                self.await_response(retrieval)
                return


@mode("endless_objects")
class EndlessObjects(ForeignStudy):
    """Sends new objects of the requested study, endlessly."""

    def unasked(self, asked: Sequence[Instance]) -> Iterable[Instance]:
        return (archive.another(asked[0], number) for number in count(1001)) if asked else []


# --- requests that have no place in a C-GET --------------------------------------------------------


class _Request(Spoiler):
    fields: dict[int, wire.Value]

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        number = self.link.next_message_id()
        asked = self.request(retrieval)
        self.link.send_command(retrieval.message.context, asked | {wire.MESSAGE_ID: number})
        self.await_response(retrieval)
        self.send(retrieval, instance, context)

    def request(self, retrieval: Retrieval) -> dict[int, wire.Value]:
        """The command elements of the request."""
        raise NotImplementedError


@mode("extra_command")
class ExtraCommand(_Request):
    """Sends a C-ECHO-RQ between two objects, on the context of the C-GET."""

    def request(self, retrieval: Retrieval) -> dict[int, wire.Value]:
        return {wire.CLASS: wire.VERIFICATION, wire.FIELD: wire.C_ECHO, wire.DATA_SET_TYPE: wire.NO_DATA_SET}


@mode("ncreate")
class NCreate(_Request):
    """Sends an N-CREATE-RQ without a data set between two objects, on the context of the C-GET."""

    def request(self, retrieval: Retrieval) -> dict[int, wire.Value]:
        return {
            wire.CLASS: "1.2.840.10008.3.1.2.3.3",
            wire.FIELD: wire.N_CREATE,
            wire.DATA_SET_TYPE: wire.NO_DATA_SET,
            wire.INSTANCE: "2.25.1",
        }


@mode("same_msgid")
class SameMsgId(_AtGet):
    """Gives every C-STORE-RQ the message ID of the C-GET-RQ."""

    def store_fields(self, retrieval: Retrieval, instance: Instance) -> dict[int, wire.Value]:
        number = retrieval.message.number(wire.MESSAGE_ID)
        return super().store_fields(retrieval, instance) | {wire.MESSAGE_ID: number}


@mode("slow_objects")
class SlowObjects(_AtGet):
    """Behaves correctly, but waits ``param`` seconds (1) before each object."""

    param = 1.0

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        self.link.wait(self.number)
        super().operate(retrieval, instance)


@mode("pipelined")
class Pipelined(_AtGet):
    """Sends all objects without waiting for the responses, and reads these at the end."""

    def operate(self, retrieval: Retrieval, instance: Instance) -> None:
        context = self.context_for(instance)
        if context is None:
            retrieval.failed.append(instance.sop)
        else:
            self.store(retrieval, instance, context)

    def pending(self, retrieval: Retrieval) -> None:
        """None: the answers are not known yet."""

    def look_for_cancel(self, retrieval: Retrieval) -> None:
        """Not looked for: what waits to be read are answers."""

    def final(self, retrieval: Retrieval) -> None:
        sent: Sequence[Instance] = [i for i in retrieval.instances if i.sop not in retrieval.failed]
        for instance in sent:
            self.tally(retrieval, instance, self.await_response(retrieval))
        super().final(retrieval)
