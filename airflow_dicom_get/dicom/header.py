"""Scan of a data set's first elements: enough to know what an instance is, without decoding it.

Reads elements one after the other up to the last tag that is wanted, whatever the encoding; skips
sequences of undefined length. Works on the bytes that are there and says when more are needed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection

from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE, EXPLICIT_BE, IMPLICIT_LE, UNCOMPRESSED

MAX_HEADER = 1 << 20
"""Bytes of a data set that are read, or inflated, to find the wanted elements."""

SPECIFIC_CHARACTER_SET = 0x00080005
SOP_CLASS_UID, SOP_INSTANCE_UID, MODALITY = 0x00080016, 0x00080018, 0x00080060
STUDY_INSTANCE_UID, SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
SERIES_NUMBER, INSTANCE_NUMBER = 0x00200011, 0x00200013
LOSSY_IMAGE_COMPRESSION = 0x00282110

MANDATORY = frozenset({SOP_INSTANCE_UID, STUDY_INSTANCE_UID, SERIES_INSTANCE_UID})
"""Without these an instance has no place in the layout. The class is known from the command."""

_LONG_VRS = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"})
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
     b"ST", b"TM", b"UI", b"UL", b"US"}
)  # fmt: skip
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 32
_INFLATE_CHUNK = 1 << 16


class HeaderError(ValueError):
    """The bytes are no data set in the transfer syntax that they came under."""


class _NeedMoreError(Exception):
    pass


class Encoding:
    """How the elements of a transfer syntax are laid out."""

    __slots__ = ("explicit_header", "implicit", "implicit_header", "tag", "u16", "u32")

    def __init__(self, implicit: bool, order: str) -> None:
        self.implicit = implicit
        self.tag = struct.Struct(order + "HH")
        self.u16 = struct.Struct(order + "H")
        self.u32 = struct.Struct(order + "L")
        self.implicit_header = struct.Struct(order + "HHL")
        self.explicit_header = struct.Struct(order + "HH2sH")
        """Of an element with a short VR."""


_IMPLICIT = Encoding(True, "<")
_LITTLE = Encoding(False, "<")
_BIG = Encoding(False, ">")


def encoding_of(syntax: str) -> Encoding:
    """The element layout of a transfer syntax (PS3.5 A); compressed ones are explicit VR little endian."""
    if syntax == IMPLICIT_LE:
        return _IMPLICIT
    return _BIG if syntax == EXPLICIT_BE else _LITTLE


def scan_elements(
    data: bytes | bytearray | memoryview, encoding: Encoding, wanted: Collection[int], last: int, *, whole: bool = False
) -> tuple[dict[int, bytes], bool]:
    """Collect the ``wanted`` top-level elements up to tag ``last``.

    Parameters
    ----------
    whole : bool
        ``data`` is all there is: an element that runs past its end is an error.

    Returns
    -------
    (values, done)
        Raw values by tag; ``done`` is false if more bytes are needed.

    Raises
    ------
    HeaderError
        Not a data set in this encoding.
    """
    values: dict[int, bytes] = {}
    pos, end = 0, len(data)
    implicit, unpack_short = encoding.implicit, encoding.explicit_header.unpack_from
    try:
        while pos < end:
            if implicit or end - pos < 8:
                tag, length, pos = _element_header(data, pos, encoding)
            else:  # nearly all elements are short ones: read them without a call each
                group, element, vr, length = unpack_short(data, pos)
                if vr in _SHORT_VRS and group != 0xFFFE:
                    tag = group << 16 | element
                    pos += 8
                else:
                    tag, length, pos = _element_header(data, pos, encoding)
            if tag < 0x00080000:
                if tag < 0x00040000 or tag >> 16 == 0xFFFE:
                    raise HeaderError(f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}) does not belong in a data set")
            elif tag > last and (values.keys() >= MANDATORY or tag >= 0x7FE00000):
                return values, True
            if length == _UNDEFINED:
                pos = _skip_undefined(data, pos, encoding, 0)
                continue
            stop = pos + length
            if stop > end:
                raise _NeedMoreError
            if tag in wanted:
                values.setdefault(tag, bytes(data[pos:stop]))
            pos = stop
    except _NeedMoreError:
        if whole:
            raise HeaderError("an element runs past the end of the data set") from None
        return values, False
    return values, whole


def _element_header(data: bytes | bytearray | memoryview, pos: int, encoding: Encoding) -> tuple[int, int, int]:
    """Tag, length and position of the value of the element at ``pos``."""
    if pos + 8 > len(data):
        raise _NeedMoreError
    if encoding.implicit:
        group, element, length = encoding.implicit_header.unpack_from(data, pos)
        return group << 16 | element, length, pos + 8
    group, element = encoding.tag.unpack_from(data, pos)
    if group == 0xFFFE:
        return group << 16 | element, encoding.u32.unpack_from(data, pos + 4)[0], pos + 8
    vr = bytes(data[pos + 4 : pos + 6])
    if vr in _SHORT_VRS:
        return group << 16 | element, encoding.u16.unpack_from(data, pos + 6)[0], pos + 8
    if vr not in _LONG_VRS:
        raise HeaderError(f"element ({group:04X},{element:04X}) has no known VR")
    if pos + 12 > len(data):
        raise _NeedMoreError
    length = encoding.u32.unpack_from(data, pos + 8)[0]
    return group << 16 | element, length, pos + 12


def _skip_undefined(data: bytes | bytearray | memoryview, pos: int, encoding: Encoding, depth: int) -> int:
    """Position after a sequence (or UN, PS3.5 6.2.2) of undefined length whose items begin at ``pos``."""
    if depth > _MAX_DEPTH:
        raise HeaderError(f"sequences nest deeper than {_MAX_DEPTH} levels")
    while True:
        if pos + 8 > len(data):
            raise _NeedMoreError
        group, element, length = encoding.implicit_header.unpack_from(data, pos)
        tag = group << 16 | element
        pos += 8
        if tag == _SEQUENCE_END:
            return pos
        if tag != _ITEM:
            raise HeaderError("a sequence holds something that is not an item")
        if length != _UNDEFINED:
            pos += length
            continue
        items = encoding
        while True:
            if not items.implicit and pos + 6 <= len(data) and bytes(data[pos : pos + 2]) != b"\xfe\xff":
                # A UN of undefined length holds implicit VR items inside an explicit VR data set.
                vr = bytes(data[pos + 4 : pos + 6])
                if items is _LITTLE and vr not in _SHORT_VRS and vr not in _LONG_VRS:
                    items = _IMPLICIT
            tag, length, pos = _element_header(data, pos, items)
            if tag == _ITEM_END:
                break
            pos = _skip_undefined(data, pos, items, depth + 1) if length == _UNDEFINED else pos + length


def ends_whole(data: memoryview, syntax: str) -> bool:
    """Whether no element of a data set runs past its end. One that was cut between two elements is not noticed."""
    if syntax == DEFLATED_LE:
        return _inflates_whole(data)
    for encoding in (encoding_of(syntax), *(() if syntax in UNCOMPRESSED else (_IMPLICIT,))):
        try:
            scan_elements(data, encoding, (), 0xFFFFFFFF, whole=True)
            return True
        except HeaderError:
            continue
    return False


def _inflates_whole(data: memoryview) -> bool:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for start in range(0, len(data), _INFLATE_CHUNK):
            rest: bytes | memoryview = data[start : start + _INFLATE_CHUNK]
            while rest and not inflate.eof:
                inflate.decompress(rest, MAX_HEADER)
                rest = inflate.unconsumed_tail
    except zlib.error:
        return False
    return inflate.eof


class HeaderScan:
    """Scan one instance's data set while its fragments arrive.

    Feed it until :attr:`done`; then :attr:`values` holds the raw values found.
    """

    __slots__ = ("_encoding", "_inflate", "_last", "_next_try", "_plain", "_syntax", "_wanted", "done", "values")

    def __init__(self, syntax: str, wanted: frozenset[int], last: int) -> None:
        self._syntax = syntax
        self._encoding = encoding_of(syntax)
        self._wanted = wanted
        self._last = last
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if syntax == DEFLATED_LE else None
        self._plain = bytearray()
        self._next_try = 0
        self.values: dict[int, bytes] = {}
        self.done = False

    def feed(self, view: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """Take the next bytes of the data set; ``last`` if none follow.

        Raises
        ------
        HeaderError
            Not a data set in its transfer syntax, or a mandatory UID is not within :data:`MAX_HEADER`.
        """
        data: bytes | bytearray | memoryview = view
        damaged = False
        if self._inflate is not None:
            damaged = not self._inflated(self._inflate, view)
            data = self._plain
        elif self._plain:
            self._plain += view[: MAX_HEADER - len(self._plain)]
            data = self._plain
        full = len(data) >= MAX_HEADER
        if len(data) < self._next_try and not (last or full or damaged):
            return
        if full:
            data = data[:MAX_HEADER]
        self.values, self.done = self._scan(data, whole=last and not (full or damaged))
        if damaged and not (self.done or full):
            raise HeaderError("the deflated data set cannot be inflated")
        if last or full:
            self.done = True
        if self.done:
            if not self.values.keys() >= MANDATORY:
                missing = sorted(MANDATORY - self.values.keys())
                raise HeaderError("no " + ", ".join(f"({t >> 16:04X},{t & 0xFFFF:04X})" for t in missing))
            self._plain = bytearray()
            return
        if data is view:
            self._plain += view
        self._next_try = 2 * len(self._plain)  # each try starts from the beginning: keep their cost linear

    def _inflated(self, inflate: zlib._Decompress, view: bytes | bytearray | memoryview) -> bool:
        """Inflate the next bytes, to at most :data:`MAX_HEADER` in all; whether they are undamaged.

        What stands before the damage counts: the header may be there, whatever the fragments are.
        """
        before = inflate.copy()
        try:
            self._plain += inflate.decompress(view, max(MAX_HEADER - len(self._plain), 1))
            return True
        except zlib.error:
            pass
        try:
            for at in range(len(view)):
                self._plain += before.decompress(view[at : at + 1], max(MAX_HEADER - len(self._plain), 1))
        except zlib.error:
            pass
        return False

    def _scan(self, data: bytes | bytearray | memoryview, whole: bool) -> tuple[dict[int, bytes], bool]:
        try:
            return scan_elements(data, self._encoding, self._wanted, self._last, whole=whole)
        except HeaderError:
            if self._syntax in UNCOMPRESSED:
                raise
            # Seen in the field: encapsulated pixel data in a data set of implicit VR.
            return scan_elements(data, _IMPLICIT, self._wanted, self._last, whole=whole)
