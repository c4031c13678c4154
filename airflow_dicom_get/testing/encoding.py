"""Command sets, query answers and P-DATA fragments of the embedded PACS, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

from pydicom.datadict import dictionary_VR
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID

Fragment = tuple[int, bytes]
"""Message control header (PS3.8 E.2) and what follows it in the PDV."""

NO_DATASET = 0x0101
HAS_DATASET = 0x0001

_COMMAND, _LAST = 0x01, 0x02
_ERROR_COMMENT = 0x0902
LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_NUMBERS = {"US": "<H", "SS": "<h", "UL": "<I", "SL": "<i"}


def command_set(elements: Mapping[int, str | int]) -> bytes:
    """A command set (PS3.7 6.3.1), group length included: text is a UID, a number is US."""
    body = bytearray()
    for element in sorted(elements):
        value = elements[element]
        if isinstance(value, int):
            data = struct.pack("<H", value)
        else:
            data = value.encode("ascii")
            # All text here is UIDs, but for Error Comment.
            data += (b" " if element == _ERROR_COMMENT else b"\0") * (len(data) & 1)
        body += struct.pack("<HHI", 0, element, len(data)) + data
    return struct.pack("<HHII", 0, 0, 4, len(body)) + bytes(body)


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    """The data in pieces of ``size`` bytes, the last one with what is left."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def fragments(command: Iterable[bytes], dataset: Iterable[bytes] = ()) -> Iterator[Fragment]:
    """The fragments of one message, one for each chunk of its command set and its data set."""
    for kind, part in ((_COMMAND, command), (0, dataset)):
        yield from _marked(kind, part)


def _marked(kind: int, part: Iterable[bytes]) -> Iterator[Fragment]:
    chunk: bytes | None = None
    for following in part:
        if chunk is not None:
            yield kind, chunk
        chunk = following
    if chunk is not None:
        yield kind | _LAST, chunk


def p_data(context_id: int, fragment: Fragment) -> bytes:
    """A P-DATA-TF PDU with one PDV."""
    control, data = fragment
    return struct.pack(">BBIIBB", 4, 0, len(data) + 6, len(data) + 2, context_id, control) + data


def vr_of(tag: int) -> str:
    """The VR of the dictionary, the first one where it knows several, UN for a tag it does not know."""
    try:
        return dictionary_VR(tag)[:2]
    except KeyError:
        return "UN"


def identifier(values: Mapping[int, str], *, implicit_vr: bool) -> bytes:
    """An identifier in little endian. Text beyond ASCII makes it a UTF-8 one, and says so."""
    if not all(value.isascii() for value in values.values()):
        values = {**values, 0x00080005: "ISO_IR 192"}
    return b"".join(_element(tag, values[tag], implicit_vr) for tag in sorted(values))


def _element(tag: int, text: str, implicit_vr: bool) -> bytes:
    vr = vr_of(tag)
    if vr in _NUMBERS:
        data = b"".join(struct.pack(_NUMBERS[vr], int(number)) for number in text.split("\\") if number)
    else:
        data = text.encode("utf-8")
        if len(data) & 1:
            data += b"\0" if vr == "UI" else b" "
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit_vr:
        return head + struct.pack("<I", len(data)) + data
    if vr in LONG_VRS:
        return head + vr.encode() + struct.pack("<HI", 0, len(data)) + data
    return head + vr.encode() + struct.pack("<H", len(data)) + data


def part10_header(sop_class: str, sop: str, syntax: str, *, sender: str = "") -> bytes:
    """Preamble, prefix and file meta information of a Part 10 file (PS3.10 7.1)."""
    group = struct.pack("<HH2sHI2s", 2, 1, b"OB", 0, 2, b"\0\1")
    for element, vr, text in (
        (0x0002, b"UI", sop_class),
        (0x0003, b"UI", sop),
        (0x0010, b"UI", syntax),
        (0x0012, b"UI", PYNETDICOM_IMPLEMENTATION_UID),
        (0x0016, b"AE", sender.strip()),
    ):
        if text:
            data = text.encode("ascii", "replace")
            data += (b"\0" if vr == b"UI" else b" ") * (len(data) & 1)
            group += struct.pack("<HH2sH", 2, element, vr, len(data)) + data
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(group)) + group
