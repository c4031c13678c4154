"""Values of elements as text, numbers and pydicom data sets, whatever a peer has sent.

pydicom's own converters are not used for them: they print values that they find wrong, into warnings and a log that
belong to the whole process, raise the error of one value for all of a data set, and follow sequences as deep as they
nest. Here nothing is said, and a value that cannot be read is empty.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom.identifier import int_value

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_DEPTH = 16
"""How deep sequences may nest in a row of a C-FIND."""
MAX_TEXT = 1 << 10
"""Bytes of a text that is kept for the manifest and is no key."""

_HEADER = struct.Struct("<HHL")
_PADDING = "\0 "
_ESCAPE = b"\x1b"
_LONGEST_CHARACTER_SET = 256
"""Bytes of a Specific Character Set that are read: there are a dozen to name, and texts are decoded by all of them."""
_BY_CHARACTER_SET = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_SINGLE = frozenset({"LT", "ST", "UR", "UT"})
_TEXTS = _BY_CHARACTER_SET | _SINGLE | {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI"}
_NUMBERS = {"AT": "HH", "FD": "d", "FL": "f", "SL": "l", "SS": "h", "SV": "q", "UL": "L", "US": "H", "UV": "Q"}
_RESETS = b"\\\t\n\f\r"
"""Behind these the first character set holds again (PS3.5 6.1.2.5.3); in a PN behind ``^`` and ``=``, too."""


# --- text ----------------------------------------------------------------------------------------


def decode_text(raw: bytes, vr: str, character_set: bytes = b"") -> str:
    """The text of a value with its padding, in Specific Character Set (0008,0005); what cannot be read is replaced."""
    if vr not in _BY_CHARACTER_SET or (raw.isascii() and _ESCAPE not in raw):
        return raw.decode("latin-1")
    encodings = _encodings(character_set[:_LONGEST_CHARACTER_SET])
    if _ESCAPE not in raw:
        return raw.decode(encodings[0], "replace")
    resets = _RESETS + (b"^=" if vr == "PN" else b"")
    return "".join(_fragment(part, encodings, resets) for part in re.findall(rb"^[^\x1b]+|\x1b[^\x1b]*", raw))


@lru_cache(maxsize=64)
def _encodings(character_set: bytes) -> Sequence[str]:
    """The encodings that Python knows of a Specific Character Set; the first one is always there."""
    from pydicom.charset import STAND_ALONE_ENCODINGS, default_encoding, python_encoding

    names = [part.strip(_PADDING) for part in character_set.decode("ascii", "replace").split("\\")]
    # Seen in the field: "ISO-IR 100", "ISO IR 192", "ISO 2022-IR 87".
    names = [re.sub(r"^ISO.IR", "ISO_IR", re.sub(r"^ISO.2022.IR.", "ISO 2022 IR ", name)) for name in names]
    if len(names) > 1:
        names = names[:1] if names[0] in STAND_ALONE_ENCODINGS else [x for x in names if x not in STAND_ALONE_ENCODINGS]
    return tuple(dict.fromkeys(python_encoding.get(name, default_encoding) for name in names))


def _fragment(part: bytes, encodings: Sequence[str], resets: bytes) -> str:
    """A piece that begins with an escape sequence, or with the value (PS3.5 6.1.2.4)."""
    from pydicom.charset import CODES_TO_ENCODINGS, default_encoding, handled_encodings

    size = 4 if part.startswith((b"\x1b$(", b"\x1b$)")) else 3
    encoding = CODES_TO_ENCODINGS.get(part[:size], "") if part.startswith(_ESCAPE) else encodings[0]
    if encoding not in (*encodings, default_encoding):
        return part.decode(encodings[0], "replace")
    if encoding in handled_encodings:  # Python knows the escape sequence
        return part.decode(encoding, "replace")
    if part.startswith(_ESCAPE):
        part = part[size:]
    end = next((at for at, byte in enumerate(part) if byte in resets), len(part))
    return part[:end].decode(encoding, "replace") + part[end:].decode(encodings[0], "replace")


def kept(text: str | None) -> str | None:
    """A text as the manifest keeps it: at most :data:`MAX_TEXT` bytes of UTF-8."""
    if text is None or len(text) * 4 <= MAX_TEXT:
        return text
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore")


def shown_value(raw: bytes, vr: str, character_set: bytes, *, little_endian: bool) -> str | None:
    """A value as the text of a column; None where it is empty, or nothing that a text can show."""
    if vr in _TEXTS:
        text = decode_text(raw, vr, character_set)
        parts = [text] if vr in _SINGLE else text.split("\\")
        ends = _PADDING + "=" * (vr == "PN")
        return "\\".join(part.lstrip(_PADDING).rstrip(ends) for part in parts).strip(_PADDING) or None
    found = _numbers(raw, vr, little_endian)
    return "\\".join(map(str, found)) or None


def _numbers(raw: bytes, vr: str, little_endian: bool) -> list[Any]:
    form = _NUMBERS.get(vr)
    if form is None or len(raw) % struct.calcsize(f"={form}"):
        return []
    found = struct.iter_unpack(f"{'<' if little_endian else '>'}{form}", raw)
    if vr == "AT":
        from pydicom.tag import TupleTag

        return [TupleTag((group, element)) for group, element in found]
    return [number for (number,) in found]


# --- rows ----------------------------------------------------------------------------------------


def dataset_of(data: bytes | bytearray) -> tuple[Dataset, int]:
    """An identifier in implicit VR little endian as a data set of pydicom, and how many objects it is made of.

    These are its elements, items and values: each takes up to 400 bytes, however short it is.

    Raises
    ------
    HeaderError
        It is no data set, or its sequences nest deeper than :data:`MAX_DEPTH`.
    """
    reader = _Reader(bytes(data))
    return reader.dataset(len(data), b"", 0), reader.made


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.made = 0
        """Elements, items and further values of elements so far."""

    def dataset(self, end: int, character_set: bytes, depth: int) -> Dataset:
        """What stands before ``end``, or before the delimiter of an item."""
        from pydicom.dataset import Dataset
        from pydicom.multival import MultiValue

        found = Dataset()
        self.made += 1
        while self._at < end:
            tag, length = self._header(end)
            if tag == h.ITEM_END:
                break
            if tag >> 16 == 0xFFFE:
                raise h.HeaderError("a delimiter stands where an element should")
            vr = _vr_of(tag)
            if length == h.UNDEFINED or vr == "SQ":
                vr, value = "SQ", self._sequence(end, length, character_set, depth)
            else:
                raw = self._take(length, end)
                if tag == h.SPECIFIC_CHARACTER_SET:
                    character_set = raw
                value = _value(raw, vr, character_set)
                self.made += len(value) if isinstance(value, list | MultiValue) else 1
            found.add(_element(tag, vr, value))
        return found

    def _sequence(self, end: int, length: int, character_set: bytes, depth: int) -> Any:
        from pydicom.sequence import Sequence

        if depth >= MAX_DEPTH:
            raise h.HeaderError(f"its sequences nest deeper than {MAX_DEPTH} levels")
        stop = end if length == h.UNDEFINED else self._stop(length, end)
        items = []
        while self._at < stop:
            tag, length = self._header(stop)
            if tag == h.SEQUENCE_END:
                break
            if tag != h.ITEM:
                raise h.HeaderError("a sequence holds something that is not an item")
            item_end = stop if length == h.UNDEFINED else self._stop(length, stop)
            items.append(self.dataset(item_end, character_set, depth + 1))
        return Sequence(items)

    def _header(self, end: int) -> tuple[int, int]:
        group, element, length = _HEADER.unpack(self._take(8, end))
        return group << 16 | element, length

    def _take(self, size: int, end: int) -> bytes:
        begin, self._at = self._at, self._stop(size, end)
        return self._data[begin : self._at]

    def _stop(self, size: int, end: int) -> int:
        if size > end - self._at:
            raise h.HeaderError("an element runs past the end of the data set")
        return self._at + size


def _vr_of(tag: int) -> str:
    """The VR of the data dictionary (PS3.6); what it does not know is UN."""
    from pydicom.datadict import dictionary_VR

    try:
        return dictionary_VR(tag)
    except KeyError:
        if tag >> 16 & 1:
            return "LO" if 0x10 <= tag & 0xFFFF <= 0xFF else "UN"
        return "UN" if tag & 0xFFFF else "UL"


def _element(tag: int, vr: str, value: Any) -> Any:
    from pydicom.dataelem import DataElement
    from pydicom.tag import Tag

    return DataElement(Tag(tag), vr, value, already_converted=True)


def _value(raw: bytes, vr: str, character_set: bytes) -> Any:
    """A value as pydicom has it."""
    from pydicom.dataelem import empty_value_for_VR
    from pydicom.multival import MultiValue

    if vr in _NUMBERS:
        found = _numbers(raw, vr, True)
        return (found if len(found) > 1 else found[0]) if found else None
    if vr not in _TEXTS:
        return raw
    text = decode_text(raw, vr, character_set)
    parts = [part.strip(_PADDING) for part in ([text] if vr in _SINGLE else text.split("\\"))]
    if not any(parts):
        return empty_value_for_VR(vr)
    make = _maker(vr)
    values = [make(part) for part in parts]
    if None in values:  # not all of them are numbers
        return None
    return values[0] if len(values) == 1 else MultiValue(make, values)


def _maker(vr: str) -> Callable[[Any], Any]:
    """What makes the object of pydicom that one value is, and says nothing of what it is made from."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID
    from pydicom.valuerep import PersonName

    if vr == "UI":
        return partial(UID, validation_mode=IGNORE)
    if vr == "PN":
        return partial(PersonName, validation_mode=IGNORE)
    return {"DS": _decimal, "IS": _integer}.get(vr, str)


def _integer(text: Any) -> Any:
    from pydicom.config import IGNORE
    from pydicom.valuerep import IS

    if not isinstance(text, str) or not text:
        return text
    number = int_value(text.encode("ascii", "replace"))
    if number is None:
        return None
    found = IS(number, validation_mode=IGNORE)
    found.original_string = text
    return found


def _decimal(text: Any) -> Any:
    from pydicom.config import IGNORE
    from pydicom.valuerep import DS

    if not isinstance(text, str) or not text:
        return text
    try:
        return DS(text, validation_mode=IGNORE) if math.isfinite(float(text)) else None
    except (ValueError, ArithmeticError):
        return None
