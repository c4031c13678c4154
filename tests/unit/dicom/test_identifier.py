"""Identifiers: pydicom reads ours, we read anything that is one, and any bytes are read or refused."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pynetdicom.dsutils import decode

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.header import HeaderError

UID_TAGS = frozenset({h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID})
WANTED = UID_TAGS | {i.QUERY_RETRIEVE_LEVEL, h.PATIENT_ID, i.SERIES_RELATED_INSTANCES, h.SPECIFIC_CHARACTER_SET}
ASCII = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="\\"), max_size=40).map(
    str.strip
)


@given(st.dictionaries(st.sampled_from(sorted(WANTED - {h.SPECIFIC_CHARACTER_SET})), ASCII, max_size=6))
def test_what_is_encoded_comes_back(elements: dict[int, str]) -> None:
    data = i.encode_identifier(elements, UID_TAGS)
    found = i.decode_identifier(data, WANTED)
    assert {tag: i.text_value(value) or "" for tag, value in found.items()} == elements
    assert all(len(value) % 2 == 0 for value in found.values())


def test_pydicom_reads_ours() -> None:
    data = i.encode_identifier(
        {
            h.STUDY_INSTANCE_UID: "1.2.3",
            i.QUERY_RETRIEVE_LEVEL: "IMAGE",
            h.SOP_INSTANCE_UID: ["1.2.3.1", "1.2.3.2"],
            h.PATIENT_ID: "A-1",
        },
        UID_TAGS,
    )
    dataset = decode(BytesIO(data), True, True)
    assert [int(element.tag) for element in dataset] == sorted(int(element.tag) for element in dataset)
    assert dataset.QueryRetrieveLevel == "IMAGE"
    assert dataset.SOPInstanceUID == ["1.2.3.1", "1.2.3.2"]
    assert (dataset.StudyInstanceUID, dataset.PatientID) == ("1.2.3", "A-1")
    # UIDs are padded by a NUL, text by a space.
    assert data.endswith(b"\x05\0\0\x001.2.3"[:0] + b"1.2.3\0")


def test_a_list_of_any_length_goes_through() -> None:
    """Longer than 64 KiB: in explicit VR its length would not fit."""
    uids = [f"1.2.826.0.1.3680043.8.498.{n:030}" for n in range(2000)]
    data = i.encode_identifier({h.SOP_INSTANCE_UID: uids}, UID_TAGS)
    assert len(data) > 100_000
    assert decode(BytesIO(data), True, True).SOPInstanceUID == uids


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_other_text_than_ascii_is_sent_as_utf_8_and_says_so(text: str) -> None:
    data = i.encode_identifier({0x00100010: text, h.PATIENT_ID: "1"})
    found = i.decode_identifier(data, {0x00100010, h.SPECIFIC_CHARACTER_SET})
    assert found[h.SPECIFIC_CHARACTER_SET] == b"ISO_IR 192"
    assert decode_bytes(found[0x00100010], convert_encodings("ISO_IR 192"), set()).removesuffix(
        " "
    ) == text.removesuffix(" ")


def written_by_pydicom(dataset: Dataset) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR = file.is_little_endian = True
    write_dataset(file, dataset)
    return file.getvalue()


def test_reads_a_row_with_sequences_in_it() -> None:
    row, item = Dataset(), Dataset()
    item.StudyInstanceUID = "9.9.9"
    row.SOPInstanceUID, row.StudyInstanceUID, row.SeriesInstanceUID = "1.2", "1.3", "1.4"
    row.ReferencedSeriesSequence = row.RequestAttributesSequence = [item, item]
    row.NumberOfSeriesRelatedInstances = "12"
    for undefined in (False, True):
        row["ReferencedSeriesSequence"].is_undefined_length = undefined
        found = i.decode_identifier(written_by_pydicom(row), WANTED)
        assert i.text_value(found[h.STUDY_INSTANCE_UID]) == "1.3"
        assert i.int_value(found[i.SERIES_RELATED_INSTANCES]) == 12


GOOD = i.encode_identifier({h.STUDY_INSTANCE_UID: "1.2.3", i.QUERY_RETRIEVE_LEVEL: "IMAGE"}, UID_TAGS)
MUTATED = st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
    lambda x: GOOD[: x[0]] + bytes((x[1],)) + GOOD[x[0] + 1 :]
)


@given(st.one_of(st.binary(max_size=200), MUTATED, st.binary(max_size=40).map(GOOD.__add__)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = i.decode_identifier(data, WANTED)
    except HeaderError:
        return
    assert found.keys() <= WANTED
    for value in found.values():
        assert len(value) <= len(data)
        i.int_value(value)
        i.text_value(value)


@pytest.mark.parametrize("data", [GOOD[:-1], GOOD[:3], GOOD + struct.pack("<HHL", 0x40, 0, 0xFFFFFFF0)])
def test_rows_that_are_cut_off_are_refused(data: bytes) -> None:
    with pytest.raises(HeaderError):
        i.decode_identifier(data, WANTED)


@pytest.mark.parametrize(
    ("raw", "text", "number"),
    [
        (None, None, None),
        (b"", None, None),
        (b"  ", None, None),
        (b"12 ", "12", 12),
        (b"+7", "+7", 7),
        (b" -3 ", "-3", -3),
        (b"1.2.3\0", "1.2.3", None),
        (b"\xff", "\ufffd", None),
        (b"C\0T", "C\ufffdT", None),
        (b"1" * 5000, "1" * 5000, None),
        (b"9223372036854775807", "9223372036854775807", (1 << 63) - 1),
        (b"9223372036854775808", "9223372036854775808", None),
        (b"-9223372036854775809", "-9223372036854775809", None),
    ],
)
def test_values(raw: bytes | None, text: str | None, number: int | None) -> None:
    assert i.text_value(raw) == text
    assert i.int_value(raw) == number
