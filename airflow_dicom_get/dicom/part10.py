"""Part 10 files (PS3.10 7.1): preamble, prefix and file meta information before the data set."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from airflow_dicom_get.dicom.header import LONG_VRS

IMPLEMENTATION_CLASS_UID = "2.25.314867509302853911216013580271933427751"
IMPLEMENTATION_VERSION = "DICOMGET_01"

_SHORT = struct.Struct("<HH2sH")
_LONG = struct.Struct("<HH2sHL")
_BEGIN = b"DICM" + _SHORT.pack(2, 0, b"UL", 4)
"""What follows the preamble: the prefix, and the head of the length of the meta information."""
PREAMBLE = 132
"""Bytes before the file meta information. The last four say DICM, and no data set begins with so many zeros."""
META_LIMIT = 1 << 16
"""Bytes of a file that are read for its meta information."""


def _element(element: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if vr in (b"UI", b"OB") else b" "
    if vr == b"OB":
        return _LONG.pack(2, element, vr, 0, len(value)) + value
    return _SHORT.pack(2, element, vr, len(value)) + value


@lru_cache(maxsize=256)
def _tail(syntax: str, own: str, sending: str, receiving: str) -> bytes:
    return (
        _element(0x0010, b"UI", syntax.encode())
        + _element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID.encode())
        + _element(0x0013, b"SH", IMPLEMENTATION_VERSION.encode())
        + _element(0x0016, b"AE", own.encode())
        + _element(0x0017, b"AE", sending.encode())
        + _element(0x0018, b"AE", receiving.encode())
    )


def file_header(sop_class: str, sop_instance: str, syntax: str, *, calling: str, called: str) -> bytes:
    """Preamble, ``DICM`` and group 0002 of an instance that ``calling`` received from ``called``."""
    body = (
        _element(0x0001, b"OB", b"\0\1")
        + _element(0x0002, b"UI", sop_class.encode())
        + _element(0x0003, b"UI", sop_instance.encode())
        + _tail(syntax, calling, called, calling)
    )
    return bytes(128) + _BEGIN + struct.pack("<L", len(body)) + body


class FileMeta(NamedTuple):
    """What the meta information of a file says; ``dataset_offset`` is where its data set begins."""

    sop_class: str
    sop_instance: str
    syntax: str
    dataset_offset: int

    def is_of(self, sop_class: str | None, sop_instance: str, syntax: str | None) -> bool:
        """Whether it says this of the data set behind it."""
        return (self.sop_class, self.sop_instance, self.syntax) == (sop_class, sop_instance, syntax)


def read_file_meta(head: bytes) -> FileMeta | None:
    """Read the meta information from the first bytes of a file; None if it is not a Part 10 file.

    Some write no length of it (0002,0000): then it ends with its group.
    """
    if len(head) < 144 or head[128:134] != _BEGIN[:6]:
        return None
    told = head[128:140] == _BEGIN
    pos, offset = (144, 144 + struct.unpack_from("<L", head, 140)[0]) if told else (PREAMBLE, len(head))
    if offset > len(head):
        return None
    wanted = {0x00020002, 0x00020003, 0x00020010}
    values: dict[int, bytes] = {}
    while pos + 8 <= offset:
        group, element, vr, length = _SHORT.unpack_from(head, pos)
        if not told and group != 2:
            offset = pos
            break
        pos += 8
        if vr in LONG_VRS:
            if pos + 4 > offset:
                return None
            (length,) = struct.unpack_from("<L", head, pos)
            pos += 4
        if group << 16 | element in wanted:
            values[group << 16 | element] = head[pos : pos + length]
        pos += length
    if values.keys() != wanted or pos != offset:
        return None
    text = [values[tag].rstrip(b"\0 ").decode("ascii", "replace") for tag in sorted(wanted)]
    return FileMeta(text[0], text[1], text[2], offset)


def ends_in_meta(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes, which begins with ``head``, is a Part 10 file cut off before its data set."""
    if size < 144:
        return len(head) > 128 and _BEGIN.startswith(head[128:140])
    return head[128:140] == _BEGIN and size < 144 + struct.unpack_from("<L", head, 140)[0]
