"""Part 10 headers: pydicom reads ours, we read ours, and any bytes are read or are no Part 10 file."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from airflow_dicom_get.dicom.part10 import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION,
    META_LIMIT,
    ends_in_meta,
    file_header,
    read_file_meta,
)
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.testing.archive import SOP_CLASS, SOP_INSTANCE, read_header
from airflow_dicom_get.testing.sample_data import usable_pydicom_files

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
HEADER = file_header(CT, "1.2.3", EXPLICIT, calling="US", called="PACS")
UIDS = st.from_regex(r"[0-9]{1,5}(\.[0-9]{1,9}){0,5}", fullmatch=True)
TITLES = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\"), min_size=1, max_size=16
)


@given(UIDS, UIDS, UIDS, TITLES, TITLES, st.binary(max_size=100))
def test_what_is_written_is_read(
    sop_class: str, sop: str, syntax: str, calling: str, called: str, dataset: bytes
) -> None:
    head = file_header(sop_class, sop, syntax, calling=calling, called=called)
    assert len(head) % 2 == 0
    assert read_file_meta(head + dataset) == (sop_class, sop, syntax, len(head))


def test_pydicom_reads_it() -> None:
    meta = dcmread(BytesIO(HEADER)).file_meta
    assert meta.FileMetaInformationGroupLength == len(HEADER) - 144
    assert meta.FileMetaInformationVersion == b"\0\1"
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == (CT, "1.2.3")
    assert meta.TransferSyntaxUID == EXPLICIT
    assert meta.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert meta.ImplementationVersionName == IMPLEMENTATION_VERSION
    assert meta.SourceApplicationEntityTitle == meta.ReceivingApplicationEntityTitle == "US"
    assert meta.SendingApplicationEntityTitle == "PACS"
    tags = [int(element.tag) for element in meta]
    assert tags == sorted(tags)
    assert HEADER[:132] == bytes(128) + b"DICM"


def test_our_own_uid_is_one() -> None:
    assert is_uid(IMPLEMENTATION_CLASS_UID)
    assert len(IMPLEMENTATION_VERSION) <= 16


def test_real_files() -> None:
    """Of the files that others wrote, all whose group length is there and right."""
    read = 0
    for path in usable_pydicom_files():
        syntax, offset, _, row = read_header(path)
        meta = read_file_meta(path.read_bytes()[:META_LIMIT])
        if meta is None:
            continue
        assert (meta.syntax, meta.dataset_offset) == (syntax, offset), path.name
        read += meta.sop_instance == row[SOP_INSTANCE] and meta.sop_class == row[SOP_CLASS]
    assert read > 100


MUTATED = st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)).map(
    lambda x: HEADER[: x[0]] + bytes((x[1],)) + HEADER[x[0] + 1 :]
)


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map((HEADER[:140]).__add__), MUTATED))
def test_any_bytes(head: bytes) -> None:
    meta = read_file_meta(head)
    if meta is not None:
        assert 144 <= meta.dataset_offset <= len(head)
        # No value comes out of the data set.
        assert read_file_meta(head[: meta.dataset_offset]) == meta


@given(st.integers(0, len(HEADER) - 1))
def test_no_part_of_a_header_is_taken_for_a_whole_one(size: int) -> None:
    assert read_file_meta(HEADER[:size]) is None
    assert ends_in_meta(HEADER[:size], size) == (size > 128)


def test_what_lies_behind_the_limit_or_is_no_part_10_file_is_not_cut_off() -> None:
    assert not ends_in_meta(HEADER, len(HEADER))
    assert not ends_in_meta(HEADER[:200], 10**6)
    assert not ends_in_meta(bytes(128) + b"DICM" + bytes(100), 232)
    assert not ends_in_meta(b"moved to another place", 22)


@pytest.mark.parametrize("length", [0, 1, 100, 0x7FFFFFFF, 0xFFFFFFFF])
def test_group_lengths_that_lie(length: int) -> None:
    assert read_file_meta(HEADER[:140] + struct.pack("<L", length) + HEADER[144:] + bytes(64)) is None
