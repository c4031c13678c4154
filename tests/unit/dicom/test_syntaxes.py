"""Transfer syntaxes per class: what real files have is proposed, in an order that keeps the bytes."""

from __future__ import annotations

import pytest
from pydicom._uid_dict import UID_dictionary

from airflow_dicom_get.dicom import syntaxes as sx
from airflow_dicom_get.dicom.status import describe, is_pending
from airflow_dicom_get.dicom.uids import is_uid, uid_value
from airflow_dicom_get.engine.contexts import ROOM
from airflow_dicom_get.testing.archive import SOP_CLASS, read_header
from airflow_dicom_get.testing.sample_data import PRIVATE_CLASS, usable_pydicom_files

CLASSES = sx.all_storage_classes()
MODALITIES = ("CT", "MR", "US", "SR", "RTDOSE", "SEG", "SM", "PT")


def test_what_real_files_have_is_proposed() -> None:
    for path in usable_pydicom_files():
        syntax, _, _, row = read_header(path)
        assert syntax in sx.candidates(row[SOP_CLASS]), path.name


@pytest.mark.parametrize("sop_class", [*CLASSES, PRIVATE_CLASS])
def test_the_order_of_proposal(sop_class: str) -> None:
    found = sx.candidates(sop_class)
    assert found[:2] == (sx.EXPLICIT_LE, sx.IMPLICIT_LE)
    assert found[-2:] == (sx.DEFLATED_LE, sx.EXPLICIT_BE)
    assert len(set(found)) == len(found) <= ROOM
    for uid in found:
        assert UID_dictionary[uid][1] == "Transfer Syntax", uid


def test_families() -> None:
    report, video, image = ("1.2.840.10008.5.1.4.1.1." + tail for tail in ("88.22", "77.1.4.1", "2"))
    assert set(sx.candidates(report)) == sx.UNCOMPRESSED
    mpeg = "1.2.840.10008.1.2.4.102"
    assert mpeg in sx.candidates(video)
    assert mpeg not in sx.candidates(image)
    jpeg = "1.2.840.10008.1.2.4.50"
    assert jpeg in sx.candidates(image)
    # What is not known may be an image.
    assert sx.candidates(PRIVATE_CLASS) == sx.candidates(image)


def test_names_of_families_hold_whole_components() -> None:
    """…88 is a family, …881 is none; …9.1.1 is of the family 9, …9x is not."""
    root = "1.2.840.10008.5.1.4.1.1."
    for stem, family in (("88.11", True), ("881", False), ("9.1.1", True), ("91.1", True), ("92", False)):
        assert (set(sx.candidates(root + stem)) == sx.UNCOMPRESSED) is family


def test_all_storage_classes() -> None:
    assert len(CLASSES) == len(set(CLASSES)) > 150
    assert CLASSES[0] == "1.2.840.10008.5.1.4.1.1.2"
    for uid in CLASSES:
        assert UID_dictionary[uid][1] == "SOP Class", uid
        assert "Storage" in UID_dictionary[uid][0], uid


def test_no_storage_class_but_the_directory_is_left_out() -> None:
    known = {
        uid for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and name.endswith("Storage")
    }
    left_out = {UID_dictionary[uid][0] for uid in known - set(CLASSES)}
    assert not {name for name in left_out if "Commitment" not in name and "Directory" not in name}


@pytest.mark.parametrize("modality", sx._BY_MODALITY)
def test_classes_of_modalities_exist(modality: str) -> None:
    found = sx.classes_of_modality(modality)
    assert len(set(found)) == len(found)
    for uid in found:
        assert UID_dictionary[uid][1] == "SOP Class", (modality, uid)


@pytest.mark.parametrize("modality", [None, "", "XX"])
def test_of_an_unknown_modality_nothing_is_known(modality: str | None) -> None:
    assert sx.classes_of_modality(modality) == ()


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_common_class_of_a_modality_comes_first(modality: str) -> None:
    first = UID_dictionary[sx.classes_of_modality(modality)[0]][4]
    assert first in (
        "CTImageStorage", "MRImageStorage", "UltrasoundImageStorage", "BasicTextSRStorage", "RTDoseStorage",
        "SegmentationStorage", "VLWholeSlideMicroscopyImageStorage", "PositronEmissionTomographyImageStorage",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("1.2.840", True), ("0", True), ("1.02.3", True), ("1" * 64, True), ("1" * 65, False), ("", False),
        (".", False), ("..", False), ("1..2", False), (".1", False), ("1.", False), ("1.2a", False), ("1/2", False),
        ("1.2\n", False), ("1.2\0", False), ("../1", False), ("١.٢", False), ("1.2 ", False),
    ],
)  # fmt: skip
def test_uids_that_may_be_path_components(text: str, good: bool) -> None:
    assert is_uid(text) is good


@pytest.mark.parametrize(
    ("raw", "uid"),
    [
        (b"1.2.3\0", "1.2.3"), (b"1.2.3 ", "1.2.3"), (b"1.2.3", "1.2.3"), (b"1.2.3\0\0", None), (b"1.2\0.3", None),
        (b"", None), (b"\0", None), (b"\xff\xfe", None), (b"1.2\\1.3", None),
    ],
)  # fmt: skip
def test_one_pad_is_taken_off(raw: bytes, uid: str | None) -> None:
    assert uid_value(raw) == uid


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "no status"), (0, "0000H (success)"), (0xFE00, "FE00H (cancelled)"),
        (0xA702, "A702H (out of resources: cannot perform sub-operations)"),
        (0xA7FE, "A7FEH (out of resources)"), (0xC413, "C413H (unable to process)"), (0x1234, "1234H (unknown status)"),
    ],
)  # fmt: skip
def test_statuses_are_described(status: int | None, text: str) -> None:
    assert describe(status) == text


def test_pending() -> None:
    assert [status for status in range(0x10000) if is_pending(status)] == [0xFF00, 0xFF01]
