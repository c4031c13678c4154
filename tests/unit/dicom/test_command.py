"""Command sets: any bytes, our own ones read by pynetdicom, and its read by us."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dsutils import decode

from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.errors import PeerProtocolError

UIDS = st.text("0123456789.", min_size=1, max_size=64)
US = st.integers(0, 0xFFFF)
ELEMENTS = st.dictionaries(st.integers(1, 0xFFFF), st.one_of(US, UIDS), max_size=8).map(
    lambda found: {**found, c.COMMAND_FIELD: 1, c.DATASET_TYPE: c.NO_DATASET}
)


def element(tag: int, value: bytes) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value


LEAST = element(c.COMMAND_FIELD, b"\x30\x80") + element(c.DATASET_TYPE, b"\x01\x01")


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(LEAST.__add__)))
def test_any_bytes_are_a_command_or_refused(data: bytes) -> None:
    try:
        command = c.Command(data)
    except PeerProtocolError:
        return
    assert isinstance(command.field, int)
    assert command.status is None or 0 <= command.status <= 0xFFFF
    for tag in (c.AFFECTED_SOP_INSTANCE, c.ERROR_COMMENT):
        assert isinstance(command.text(tag), str)


@given(ELEMENTS)
def test_what_is_encoded_comes_back(elements: dict[int, int | str]) -> None:
    data = c.encode(elements)
    assert len(data) % 2 == 0
    command = c.Command(memoryview(data))
    for tag, value in elements.items():
        if isinstance(value, int):
            assert command.us(tag) == value
        else:
            assert command.text(tag) == value
    (length,) = struct.unpack_from("<L", data, 8)
    assert length == len(data) - 12


@given(UIDS, UIDS, US, US)
def test_the_store_response_is_that_of_the_general_encoder(sop_class: str, sop: str, number: int, status: int) -> None:
    data = c.c_store_rsp(sop_class.encode(), sop.encode(), number, status)
    assert data == c.encode(
        {
            c.AFFECTED_SOP_CLASS: sop_class,
            c.COMMAND_FIELD: c.C_STORE_RSP,
            c.RESPONDED_MESSAGE_ID: number,
            c.DATASET_TYPE: c.NO_DATASET,
            c.STATUS: status,
            c.AFFECTED_SOP_INSTANCE: sop,
        }
    )


def test_pynetdicom_reads_ours() -> None:
    dataset = decode(BytesIO(c.c_store_rsp(b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.3", 7, 0xA700)), True, True)
    assert dataset.CommandField == 0x8001
    assert (dataset.MessageIDBeingRespondedTo, dataset.Status) == (7, 0xA700)
    assert dataset.AffectedSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert dataset.AffectedSOPInstanceUID == "1.2.3"


def test_uids_are_echoed_as_they_came() -> None:
    """A space or a NUL that the source padded with, and a UID that is none."""
    command = c.Command(c.c_store_rsp(b"1.2 ", b"../x", 1, 0))
    assert command.raw(c.AFFECTED_SOP_CLASS) == b"1.2 "
    assert command.text(c.AFFECTED_SOP_CLASS) == "1.2"
    assert command.raw(c.AFFECTED_SOP_INSTANCE) == b"../x"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        LEAST[:-1],
        LEAST + b"\0\0\0",
        LEAST + struct.pack("<HHL", 0, 0x1000, 0xFFFFFFFF),
        element(c.COMMAND_FIELD, b"\x01\x00"),
        element(c.DATASET_TYPE, b"\x01\x01"),
        element(c.COMMAND_FIELD, b"\x01") + element(c.DATASET_TYPE, b"\x01\x01"),
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        c.Command(data)


def test_group_length_may_be_missing_or_wrong() -> None:
    for head in (b"", element(0, struct.pack("<L", 5)), element(0, b"")):
        assert c.Command(head + LEAST).field == c.C_ECHO_RSP


def test_elements_of_other_groups_are_kept_apart() -> None:
    """Orthanc puts its list of failed instances into the command set."""
    command = c.Command(LEAST + element(0x00080058, b"1.2.3\0"))
    assert command.stray == {0x00080058: b"1.2.3\0"}
    assert command.raw(0x0058) == b""


def test_the_first_of_two_counts() -> None:
    assert c.Command(LEAST + element(c.STATUS, b"\0\0") + element(c.STATUS, b"\0\xa7")).status == 0


@pytest.mark.parametrize(("kind", "follows"), [(0x0101, False), (0x0000, True), (0x0001, True), (0x0102, True)])
def test_only_one_value_says_that_no_data_set_follows(kind: int, follows: bool) -> None:
    data = element(c.COMMAND_FIELD, b"\x01\x00") + element(c.DATASET_TYPE, struct.pack("<H", kind))
    assert c.Command(data).has_dataset is follows
