"""Scan of a data set's first elements: enough to know what an instance is, without decoding it.

Reads elements one after the other up to the last tag that is wanted, whatever the encoding; skips
sequences of undefined length. Works on the bytes that are there and says when more are needed.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Collection
from typing import Protocol

from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE, EXPLICIT_BE, IMPLICIT_LE, UNCOMPRESSED

MAX_HEADER = 1 << 20
"""Bytes of a data set that are read, or inflated, to find the wanted elements."""

SPECIFIC_CHARACTER_SET = 0x00080005
SOP_CLASS_UID, SOP_INSTANCE_UID, MODALITY = 0x00080016, 0x00080018, 0x00080060
PATIENT_ID, STUDY_INSTANCE_UID, SERIES_INSTANCE_UID = 0x00100020, 0x0020000D, 0x0020000E
SERIES_NUMBER, INSTANCE_NUMBER = 0x00200011, 0x00200013
LOSSY_IMAGE_COMPRESSION = 0x00282110

MANDATORY = frozenset({SOP_INSTANCE_UID, STUDY_INSTANCE_UID, SERIES_INSTANCE_UID})
"""Without these an instance has no place in the layout. The class is known from the command."""
_IDENTIFYING = MANDATORY | {SOP_CLASS_UID, PATIENT_ID}
"""Of one of these that stands twice (PS3.5 7.1 allows it once), some readers take the one, and some the other."""

LONG_VRS = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"})
"""VRs whose length has four bytes, behind two that are reserved (PS3.5 7.1.2)."""
_SHORT_VRS = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
     b"ST", b"TM", b"UI", b"UL", b"US"}
)  # fmt: skip
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_MAX_DEPTH = 32
_LONGEST_HEADER = 12
_NEVER = 1 << 62
_BLOCK = 512
"""Bytes that a disk writes at least at once."""
_INFLATE_CHUNK = 1 << 16
_MOST_DEFLATED, _MOST_GROWTH = 256 << 20, 16
"""Bytes that a deflated data set is inflated to at most, and for each byte of it so many more."""
_MOST_STEPS = 100_000
"""Elements and items of it that are followed at most, and for each byte of it one more."""


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
    data: bytes | bytearray | memoryview, encoding: Encoding, wanted: Collection[int], last: int
) -> tuple[dict[int, bytes], bool, int]:
    """Collect the ``wanted`` top-level elements up to tag ``last``.

    Returns
    -------
    (values, done, at)
        Raw values by tag; ``done`` is false if more bytes are needed; ``at`` is where the first element begins
        that was not stepped over. That may lie beyond ``data``.

    Raises
    ------
    HeaderError
        Not a data set in this encoding.
    """
    values: dict[int, bytes] = {}
    pos = at = 0
    end = len(data)
    implicit, unpack_short = encoding.implicit, encoding.explicit_header.unpack_from
    unpack_implicit = encoding.implicit_header.unpack_from
    try:
        while pos < end:
            at = pos
            if end - pos < 8:
                raise _NeedMoreError
            if implicit:
                group, element, length = unpack_implicit(data, pos)
                tag = group << 16 | element
                pos += 8
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
                return values, True, at if length == UNDEFINED else pos + length
            if length == UNDEFINED:
                if tag in _IDENTIFYING:
                    raise HeaderError(f"({group:04X},{element:04X}) has no length")
                pos = _skip_undefined(data, pos, encoding)
                continue
            stop = pos + length
            if stop > end:
                raise _NeedMoreError
            if tag in wanted:
                if tag not in values:
                    values[tag] = bytes(data[pos:stop])
                elif tag in _IDENTIFYING and values[tag] != data[pos:stop]:
                    raise HeaderError(f"({group:04X},{element:04X}) stands in it twice, with two values")
            pos = stop
    except _NeedMoreError:
        return values, False, at
    return values, False, pos


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
    if vr not in LONG_VRS:
        raise HeaderError(f"element ({group:04X},{element:04X}) has no known VR")
    if pos + 12 > len(data):
        raise _NeedMoreError
    length = encoding.u32.unpack_from(data, pos + 8)[0]
    return group << 16 | element, length, pos + 12


_Level = tuple[bool, Encoding]
"""What was begun without a length: whether it is a sequence, else an item, and how it is laid out."""


def _skip_undefined(data: bytes | bytearray | memoryview, pos: int, encoding: Encoding) -> int:
    """Position after a sequence (or UN, PS3.5 6.2.2) of undefined length whose items begin at ``pos``."""
    levels: list[_Level] = [(True, encoding)]
    while levels:
        pos = _step_inside(data, pos, levels)
    return pos


def _step_inside(data: bytes | bytearray | memoryview, pos: int, levels: list[_Level]) -> int:
    """Step over one item, element or delimiter inside ``levels``, outermost first; the position behind it.

    That may lie beyond ``data``. What begins without a length becomes a level, what ends is one no more.
    """
    in_sequence, encoding = levels[-1]
    if in_sequence:
        if pos + 8 > len(data):
            raise _NeedMoreError
        group, element, length = encoding.implicit_header.unpack_from(data, pos)
        tag, pos = group << 16 | element, pos + 8
        if tag == SEQUENCE_END:
            levels.pop()
            return pos
        if tag != ITEM:
            raise HeaderError("a sequence holds something that is not an item")
    else:
        if not encoding.implicit and pos + 8 <= len(data):  # nearly all are short ones
            group, _, vr, short = encoding.explicit_header.unpack_from(data, pos)
            if vr in _SHORT_VRS and group != 0xFFFE:
                return pos + 8 + int(short)
        if encoding is _LITTLE and pos + 6 <= len(data) and bytes(data[pos : pos + 2]) != b"\xfe\xff":
            # A UN of undefined length holds implicit VR items inside an explicit VR data set.
            encoding = levels[-1][1] if _has_vr(data, pos) else _IMPLICIT
            levels[-1] = False, encoding
        tag, length, pos = _element_header(data, pos, encoding)
        if tag == ITEM_END:
            levels.pop()
            return pos
    if length != UNDEFINED:
        return pos + int(length)
    if len(levels) > 2 * _MAX_DEPTH:
        raise HeaderError(f"sequences nest deeper than {_MAX_DEPTH} levels")
    levels.append((not in_sequence, encoding))
    return pos


def _has_vr(data: bytes | bytearray | memoryview, pos: int) -> bool:
    vr = bytes(data[pos + 4 : pos + 6])
    return vr in _SHORT_VRS or vr in LONG_VRS


class Walk(Protocol):
    """Follows a data set as its bytes arrive, to see whether it ends where it says it does.

    One that ends between two elements, though more were to come, is whole: nothing in it says so.
    """

    def feed(self, view: bytes | bytearray | memoryview) -> None:
        """The next bytes, of any number."""

    @property
    def whole(self) -> bool:
        """Whether what was fed is a whole data set; true, too, of a stored one that would cost too much to follow."""

    @property
    def torn(self) -> bool:
        """Whether a part of the data set is lost: it ends inside an element, or goes on as blocks that were never
        written do, with zeros. Other bytes behind its last element are somebody's, and no sign of that."""


class ElementWalk:
    """The :class:`Walk` over elements: what it costs grows with their number, not with their bytes.

    Parameters
    ----------
    encoding : Encoding
        How they are laid out.
    at : int
        Where the first element begins that is to be looked at.
    seen : int
        How many bytes stand before the first one that is fed, at most ``at`` where that element was fed in part.
    before : collection of int, optional
        Identifying elements that stand before the first one that is looked at; given, the others are counted.
    """

    __slots__ = (
        "_counts",
        "_encoding",
        "_levels",
        "_next",
        "_piece",
        "_pixels",
        "_size",
        "_zeros",
        "identifying",
        "steps",
    )

    def __init__(
        self,
        encoding: Encoding,
        at: int = 0,
        seen: int = 0,
        before: Collection[int] | None = None,
    ) -> None:
        self._encoding = encoding
        self.steps = 0
        """Elements and items that were stepped over."""
        self._counts = before is not None
        self.identifying = Counter(before or ())
        """How often each element that tells patient, study, series or instance was met, where they are counted."""
        self._size = seen
        self._next = at
        """Where the next header begins, counted from the start of the data set; nowhere behind what cannot be read."""
        self._piece = b""
        """The first bytes of a header that goes on in the next view."""
        self._levels: list[_Level] = []
        self._zeros = self._pixels = False
        """Whether zeros stand where an element should begin; whether the pixel data came before."""

    def feed(self, view: bytes | bytearray | memoryview) -> None:
        """See :meth:`Walk.feed`."""
        before = self._size
        self._size = before + len(view)
        if self._next < self._size:
            self._follow(view, before)

    @property
    def whole(self) -> bool:
        """See :attr:`Walk.whole`."""
        return self._next == self._size and not self._levels

    @property
    def torn(self) -> bool:
        """See :attr:`Walk.torn`."""
        return self._zeros if self._next == _NEVER else self._next > self._size or bool(self._levels)

    def _follow(self, view: bytes | bytearray | memoryview, before: int) -> None:
        data, base = view, before
        if self._piece:
            data, base = self._piece + bytes(view[:_LONGEST_HEADER]), before - len(self._piece)
        try:
            while self._next < self._size:
                if not self._levels and data is view:
                    self._next = base + self._run(view, self._next - base)
                    if self._next >= self._size:
                        break
                self._next = base + self._step(data, self._next - base)
                if data is not view:
                    self._piece, data, base = b"", view, before
                self.steps += 1
        except _NeedMoreError:
            self._piece = bytes(data[self._next - base :])
        except HeaderError:
            rest = bytes(data[self._next - base :][:_BLOCK])
            self._zeros = len(rest) == _BLOCK and not any(rest[_LONGEST_HEADER:])  # a header may be cut, too
            self._zeros = self._zeros or (self._next == 0 and not any(rest[:8]))  # behind nothing nobody put them
            self._zeros = self._zeros and not self._pixels  # hardly anything follows these: they are padding
            self._next, self._piece = _NEVER, b""

    def _run(self, view: bytes | bytearray | memoryview, pos: int) -> int:
        """Step over the next elements of short VRs, which nearly all are, without a call each."""
        encoding, last = self._encoding, len(view) - 8
        if encoding.implicit:
            return pos
        unpack, number, counts = encoding.explicit_header.unpack_from, 0, self._counts
        while pos <= last:
            group, element, vr, length = unpack(view, pos)
            if vr not in _SHORT_VRS or group == 0xFFFE:
                break
            if group <= 0x20 and (group < 4 or (counts and group << 16 | element in _IDENTIFYING)):
                break
            pos += 8 + length
            number += 1
        self.steps += number
        return pos

    def _step(self, data: bytes | bytearray | memoryview, pos: int) -> int:
        if self._levels:
            return _step_inside(data, pos, self._levels)
        tag, length, pos = _element_header(data, pos, self._encoding)
        if tag < 0x00040000 or tag >> 16 == 0xFFFE:
            raise HeaderError("an element does not belong in a data set")
        if tag in _IDENTIFYING:
            self.identifying[tag] += 1
        self._pixels = self._pixels or tag >> 16 == 0x7FE0
        if length == UNDEFINED:
            self._levels.append((True, self._encoding))
            return pos
        return pos + length


class DeflateWalk:
    """The :class:`Walk` over a deflated data set, whose stream says where it ends.

    Parameters
    ----------
    bits : int
        What zlib is told of the stream: by default that it has no header of zlib's.
    arrives : bool
        Whether it is held to its last element: what stands where it is not followed may deny its header.
    """

    __slots__ = ("_arrives", "_elements", "_inflate", "_known", "_left", "_steps", "beyond")

    def __init__(self, *, bits: int = -zlib.MAX_WBITS, arrives: bool = False) -> None:
        self._elements = ElementWalk(_LITTLE, before=())
        self._inflate = zlib.decompressobj(bits)
        self._left, self._steps = _MOST_DEFLATED, _MOST_STEPS
        self._arrives = arrives
        self._known: bool | None = None
        self.beyond = False
        """Whether it inflates to more than is followed of one of its size."""

    def feed(self, view: bytes | bytearray | memoryview) -> None:
        """See :meth:`Walk.feed`."""
        inflate = self._inflate
        self._left += _MOST_GROWTH * len(view)
        self._steps += len(view)
        try:
            for start in range(0, len(view), _INFLATE_CHUNK):
                rest: bytes | bytearray | memoryview = view[start : start + _INFLATE_CHUNK]
                while rest and not inflate.eof and self._known is None:
                    plain = inflate.decompress(rest, MAX_HEADER)
                    self._left -= len(plain)
                    self._elements.feed(plain)
                    rest = inflate.unconsumed_tail
                    if self._left <= 0 or self._elements.steps > self._steps:
                        self._known = self.beyond = True
        except zlib.error:
            self._known = False

    @property
    def whole(self) -> bool:
        """See :attr:`Walk.whole`."""
        if self._arrives and (self.beyond or not self._elements.whole):
            return False
        return self._known if self._known is not None else self._inflate.eof

    @property
    def torn(self) -> bool:
        """See :attr:`Walk.torn`."""
        return not self.whole

    @property
    def identifying(self) -> Counter[int]:
        """See :class:`ElementWalk`."""
        return self._elements.identifying


class _EitherWalk:
    """Two walks over one data set, of which one lays its elements out as they are."""

    def __init__(self, *walks: Walk) -> None:
        self._walks = walks

    def feed(self, view: bytes | bytearray | memoryview) -> None:
        """See :meth:`Walk.feed`."""
        for walk in self._walks:
            walk.feed(view)

    @property
    def whole(self) -> bool:
        """See :attr:`Walk.whole`."""
        return any(walk.whole for walk in self._walks)

    @property
    def torn(self) -> bool:
        """See :attr:`Walk.torn`."""
        return all(walk.torn for walk in self._walks)


def walk_of(syntax: str) -> Walk:
    """Follow a data set of a transfer syntax from its first byte, as far as its bytes go."""
    if syntax == DEFLATED_LE:
        return DeflateWalk()
    if syntax in UNCOMPRESSED:
        return ElementWalk(encoding_of(syntax))
    return _EitherWalk(ElementWalk(_LITTLE), ElementWalk(_IMPLICIT))  # see HeaderScan


def walk_of_other_layouts() -> Walk:
    """Follow a data set from its first byte in whatever layout it may be whole, whatever its file says of it."""
    layouts = (_LITTLE, _IMPLICIT, _BIG)
    return _EitherWalk(*map(ElementWalk, layouts), DeflateWalk(), DeflateWalk(bits=zlib.MAX_WBITS))


class HeaderScan:
    """Scan one instance's data set while its fragments arrive.

    Feed it until :attr:`done`; then :attr:`values` holds the raw values found, and :attr:`walk` goes on from there.
    """

    __slots__ = (
        "_encoding",
        "_inflate",
        "_last",
        "_next_try",
        "_plain",
        "_syntax",
        "_taken",
        "_wanted",
        "done",
        "values",
        "walk",
    )

    def __init__(self, syntax: str, wanted: frozenset[int], last: int) -> None:
        self._syntax = syntax
        self._encoding = encoding_of(syntax)
        self._wanted = wanted
        self._last = last
        deflated = syntax == DEFLATED_LE
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if deflated else None
        self._plain = bytearray()
        self._taken = 0
        """Bytes that were fed of a deflated data set."""
        self._next_try = 0
        self.values: dict[int, bytes] = {}
        self.done = False
        self.walk: ElementWalk | DeflateWalk | None = DeflateWalk(arrives=True) if deflated else None
        """Once it is done: what was fed so far is behind it; feed it what follows, to know whether it ends whole."""

    def feed(self, view: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """Take the next bytes of the data set; ``last`` if none follow.

        Raises
        ------
        HeaderError
            Not a data set in its transfer syntax, or a mandatory UID is not within :data:`MAX_HEADER`, of what is
            inflated or of what it is inflated from.
        """
        data: bytes | bytearray | memoryview = view
        damaged = False
        beyond: bytes | bytearray | memoryview = b""
        if self._inflate is not None:
            assert self.walk is not None
            self.walk.feed(view)
            damaged = not self._inflated(self._inflate, view)
            self._taken += len(view)
            last = last or self._inflate.eof  # whatever follows the end of its stream is none of it
            data = self._plain
        elif len(self._plain) + len(view) > MAX_HEADER or self._plain:
            room = MAX_HEADER - len(self._plain)
            data, beyond = view[:room], view[room:]
            if self._plain:
                self._plain += data
                data = self._plain
        full = len(data) >= MAX_HEADER or self._taken >= MAX_HEADER
        if len(data) < self._next_try and not (last or full or damaged):
            return
        if full:
            data = data[:MAX_HEADER]
        self.values, self.done, at = self._scan(data)
        if damaged and not (self.done or full):
            raise HeaderError("the deflated data set cannot be inflated")
        broken_off = last and not (self.done or full) and at < len(data)
        if last or full:
            self.done = True
        if self.done:
            if not self.values.keys() >= MANDATORY:
                if broken_off:
                    raise HeaderError("an element runs past the end of the data set")
                missing = sorted(MANDATORY - self.values.keys())
                raise HeaderError("no " + ", ".join(f"({t >> 16:04X},{t & 0xFFFF:04X})" for t in missing))
            if self.walk is None:
                seen = len(data)
                before = self.values.keys() & _IDENTIFYING
                self.walk = ElementWalk(self._encoding, at, min(at, seen), before)
                if at < seen:
                    self.walk.feed(data[at:])
                if beyond:
                    self.walk.feed(beyond)
            self._plain = bytearray()
            return
        if data is view:
            self._plain += view
        self._next_try = 2 * len(self._plain)  # each try starts from the beginning: keep their cost linear

    def _inflated(self, inflate: zlib._Decompress, view: bytes | bytearray | memoryview) -> bool:
        """Inflate the next bytes, to at most :data:`MAX_HEADER` in all; whether they are undamaged.

        What stands before the damage counts: the header may be there, whatever the fragments are.
        """
        if not view:
            return True  # at no cost: a peer may send any number of empty fragments
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

    def _scan(self, data: bytes | bytearray | memoryview) -> tuple[dict[int, bytes], bool, int]:
        try:
            return scan_elements(data, self._encoding, self._wanted, self._last)
        except HeaderError:
            if self._syntax in UNCOMPRESSED:
                raise
            # Seen in the field: encapsulated pixel data in a data set of implicit VR.
            found = scan_elements(data, _IMPLICIT, self._wanted, self._last)
            self._encoding = _IMPLICIT
            return found
