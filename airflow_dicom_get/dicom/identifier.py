"""Identifiers of C-FIND and C-GET (PS3.4 C.2.2.2, C.4.3): implicit VR little endian, flat.

Implicit VR because its 32-bit lengths carry a UID list of any size; in explicit VR one peer
silently matches a longer list to nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

from airflow_dicom_get.dicom.header import PATIENT_ID, SPECIFIC_CHARACTER_SET, HeaderError, encoding_of, scan_elements
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE

QUERY_RETRIEVE_LEVEL = 0x00080052
STUDY_DATE, STUDY_TIME = 0x00080020, 0x00080030
ACCESSION_NUMBER = 0x00080050
AVAILABLE_TRANSFER_SYNTAX = 0x00083002
SOP_CLASSES_IN_STUDY = 0x00080062
MODALITIES_IN_STUDY = 0x00080061
INSTANCE_AVAILABILITY = 0x00080056
FAILED_SOP_INSTANCES = 0x00080058
PATIENT_RELATED_STUDIES = 0x00201200
STUDY_RELATED_SERIES, STUDY_RELATED_INSTANCES, SERIES_RELATED_INSTANCES = 0x00201206, 0x00201208, 0x00201209

_ELEMENT = struct.Struct("<HHL")
_IMPLICIT = encoding_of(IMPLICIT_LE)


def encode_identifier(elements: Mapping[int, str | bytes | Iterable[str]], uid_tags: Collection[int] = ()) -> bytes:
    """Encode keys in ascending order; several values are joined by a backslash, bytes go as they are.

    Non-ASCII text is sent as UTF-8 with Specific Character Set ISO_IR 192, unless the set is given.
    Values of ``uid_tags`` are padded with NUL, all others with a space (PS3.5 6.2).
    """
    values = {tag: _raw(value) for tag, value in elements.items()}
    if SPECIFIC_CHARACTER_SET not in values and not all(value.isascii() for value in values.values()):
        values[SPECIFIC_CHARACTER_SET] = b"ISO_IR 192"
    out = bytearray()
    for tag in sorted(values):
        value = values[tag]
        if len(value) % 2:
            value += b"\0" if tag in uid_tags else b" "
        out += _ELEMENT.pack(tag >> 16, tag & 0xFFFF, len(value)) + value
    return bytes(out)


def patient_keys(patient_id: bytes, character_set: bytes) -> dict[int, bytes]:
    """The unique key above the study in Patient Root; none where the Patient ID is not known."""
    if not patient_id:
        return {}
    keys = {PATIENT_ID: patient_id}
    return keys if patient_id.isascii() else {**keys, SPECIFIC_CHARACTER_SET: character_set}


def elements_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements of what :func:`encode_identifier` made: tag and raw value."""
    pos = 0
    while pos < len(data):
        group, element, length = _ELEMENT.unpack_from(data, pos)
        pos += _ELEMENT.size + length
        yield group << 16 | element, data[pos - length : pos]


def _raw(value: str | bytes | Iterable[str]) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else "\\".join(value)).encode("utf-8")


def decode_identifier(data: bytes | bytearray, wanted: Collection[int]) -> dict[int, bytes]:
    """The raw values of the ``wanted`` tags that are present.

    Raises
    ------
    HeaderError
        The bytes are no data set in implicit VR.
    """
    values, done, at = scan_elements(bytes(data), _IMPLICIT, wanted, 0x7FDFFFFF)
    if not done and at < len(data):
        raise HeaderError("an element runs past the end of the data set")
    return values


def text_value(raw: bytes | None) -> str | None:
    """A value of ASCII text (CS, IS, UI, ...) without padding; None if absent or empty.

    What is no ASCII, and a NUL within, which PostgreSQL takes in no text, is U+FFFD.
    """
    if not raw:
        return None
    return raw.strip(b"\0 ").decode("ascii", "replace").replace("\0", "\ufffd") or None


def fits_64_bits(number: float) -> bool:
    """Whether a number can be held where rows are kept; an IS value is below 2**31 (PS3.5 6.2)."""
    return -(1 << 63) <= number < 1 << 63


def int_value(raw: bytes | None) -> int | None:
    """An IS value; None if absent, empty, no number, or one beyond 64 bits."""
    if not raw:
        return None
    try:
        number = int(raw.strip(b"\0 "))
    except ValueError:
        return None
    return number if fits_64_bits(number) else None
