"""Values of elements: as pydicom reads them where they are in order, and without a word where they are not."""

from __future__ import annotations

import logging
import math
import pickle
import struct
import warnings
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import config
from pydicom.charset import python_encoding
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.valuerep import DSfloat, PersonName

from airflow_dicom_get.dicom import values as v
from airflow_dicom_get.dicom.header import HeaderError


def element(tag: int, raw: bytes) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(raw)) + raw


def written_by_pydicom(dataset: Dataset) -> bytes:
    file = DicomBytesIO()
    file.is_implicit_VR = file.is_little_endian = True
    write_dataset(file, dataset)
    return file.getvalue()


def read_by_pydicom(data: bytes) -> Dataset:
    dataset = read_dataset(BytesIO(data), is_implicit_VR=True, is_little_endian=True)
    dataset.decode()
    return dataset


def row() -> Dataset:
    made, item = Dataset(), Dataset()
    made.SpecificCharacterSet = "ISO_IR 100"
    made.PatientName = "Müller^Jörg=x"
    made.PatientID, made.AccessionNumber = "Ä 1", ["A1", "A2"]
    made.StudyInstanceUID, made.SOPClassesInStudy = "1.2.3", ["1.2", "1.3"]
    made.StudyDate, made.StudyTime, made.RetrieveAETitle = "20240131", "101112.5", "PACS"
    made.NumberOfStudyRelatedInstances, made.SeriesNumber = "0012", None
    made.PixelSpacing, made.PatientWeight = ["0.50", "1e-1"], "71.5"
    made.Rows, made.ReferencedSOPClassUIDInFile = 512, ""
    made.StudyComments = "a\\b"
    item.ReferencedSOPInstanceUID, item.PatientName = "1.2.3.4", "Å^B"
    made.ReferencedStudySequence = [item, Dataset()]
    made.SelectorAttribute = 0x00100010
    return made


@pytest.mark.parametrize("undefined", [False, True])
def test_a_row_in_order_is_read_as_pydicom_reads_it(undefined: bool) -> None:
    made = row()
    made["ReferencedStudySequence"].is_undefined_length = undefined
    data = written_by_pydicom(made)
    ours, theirs = v.dataset_of(data)[0], read_by_pydicom(data)
    assert ours == theirs
    for one, other in zip(ours, theirs, strict=True):
        assert (str(one), type(one.value), one.VR) == (str(other), type(other.value), other.VR)
    assert ours.PatientName.family_name == "Müller"
    assert str(ours.NumberOfStudyRelatedInstances) == "0012"
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert ours.ReferencedStudySequence[0].PatientName == "Å^B"


@pytest.mark.parametrize("name", sorted(name for name in python_encoding if name))
def test_texts_of_every_character_set_are_read_as_pydicom_reads_them(name: str) -> None:
    letters = {"iso_ir_126": "Διον", "iso_ir_127": "قباني", "iso_ir_138": "שרון", "iso_ir_144": "Люк",
               "euc_kr": "김희중", "shift_jis": "ﾔﾏﾀﾞ", "iso2022_jp": "山田", "iso_ir_166": "นาม",
               "GB18030": "王小东", "GBK": "王小东", "UTF8": "王 Ä"}  # fmt: skip
    made = Dataset()
    made.SpecificCharacterSet = name if "2022" not in name else ["", name]
    made.PatientID = made.PatientName = letters.get(python_encoding[name], "abc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = written_by_pydicom(made)
        theirs = read_by_pydicom(data)
    ours = v.dataset_of(data)[0]
    assert (ours.PatientID, str(ours.PatientName)) == (theirs.PatientID, str(theirs.PatientName))


@pytest.fixture(autouse=True)
def nothing_is_said(caplog: pytest.LogCaptureFixture) -> object:
    """Neither warnings (which are errors in tests) nor logs, also where the user has pydicom raise for bad values."""
    caplog.set_level(logging.INFO, "pydicom")
    before = config.settings.reading_validation_mode
    config.settings.reading_validation_mode = config.RAISE
    yield
    config.settings.reading_validation_mode = before
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


@pytest.mark.parametrize(
    ("keyword", "tag", "raw", "value"),
    [
        ("SeriesNumber", 0x00200011, b"SMITH^JOHN", None),
        ("SeriesNumber", 0x00200011, b"9" * 20, None),
        ("SeriesNumber", 0x00200011, b"9" * 5000, None),
        ("SeriesNumber", 0x00200011, b"1\\x", None),
        ("PatientWeight", 0x00101030, b"nan", None),
        ("PatientWeight", 0x00101030, b"1e999", None),
        ("PatientWeight", 0x00101030, b"heavy", None),
        ("StudyDate", 0x00080020, b"SMITH^JOHN", "SMITH^JOHN"),
        ("Modality", 0x00080060, b"x" * 300, "x" * 300),
        ("AccessionNumber", 0x00080050, b"x" * 3000, "x" * 3000),
        ("PatientID", 0x00100020, b"\xff\xfe", "ÿþ"),
        ("StudyInstanceUID", 0x0020000D, b"SMITH^JOHN\0\0", "SMITH^JOHN"),
        ("PatientName", 0x00100010, b"^" * 70 + b"=" * 9, "^" * 70),
        ("Rows", 0x00280010, b"123", None),
    ],
)
def test_a_value_out_of_order_costs_itself(keyword: str, tag: int, raw: bytes, value: object) -> None:
    data = element(0x00080052, b"STUDY ") + element(tag, raw)
    found = v.dataset_of(data if tag > 0x00080052 else element(tag, raw) + element(0x00080052, b"STUDY "))[0]
    assert found[keyword].value == value
    assert found.QueryRetrieveLevel == "STUDY"


def test_kinds_of_numbers() -> None:
    found = v.dataset_of(element(0x00101030, b"71.50 ") + element(0x00281053, b"1\\\\2"))[0]
    assert isinstance(found.PatientWeight, DSfloat)
    assert (found.PatientWeight, str(found.PatientWeight)) == (71.5, "71.50")
    assert list(found.RescaleSlope) == [1.0, "", 2.0]
    assert isinstance(v.dataset_of(element(0x00100010, b"A^B"))[0].PatientName, PersonName)


def nested(levels: int, undefined: bool) -> bytes:
    """Sequences in sequences."""
    data = b""
    for _ in range(levels):
        if undefined:
            item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + data + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
            data = struct.pack("<HHL", 8, 0x1110, 0xFFFFFFFF) + item + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
        else:
            data = element(0x00081110, struct.pack("<HHL", 0xFFFE, 0xE000, len(data)) + data)
    return data


@pytest.mark.parametrize("undefined", [False, True])
def test_sequences_nest_sixteen_deep_and_no_deeper(undefined: bool) -> None:
    assert isinstance(v.dataset_of(nested(16, undefined))[0].ReferencedStudySequence, Sequence)
    for levels in (17, 500, 3000):
        with pytest.raises(HeaderError, match="deeper than 16"):
            v.dataset_of(nested(levels, undefined))


GOOD = written_by_pydicom(row())


@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4)).map(
            lambda x: GOOD[: x[0]] + x[1] + GOOD[x[0] + len(x[1]) :]
        ),
    )
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = v.dataset_of(data)[0]
    except HeaderError:
        return
    str(found)
    for one in found:
        if one.VR in ("IS", "DS") and isinstance(one.value, float | int):
            assert math.isfinite(one.value)


_VRS = sorted({"LO", "SH", "PN", "UT", "CS", "IS", "DS", "UI", "DA", "US", "FD", "AT", "UN", "SQ", "US or SS"})
_SETS = st.one_of(st.binary(max_size=30), st.sampled_from([name.encode() for name in python_encoding]), st.just(
    b"\\ISO 2022 IR 87\\ISO 2022 IR 149\\GBK\\idna\\undefined\\punycode"))  # fmt: skip


@given(st.binary(max_size=60), st.sampled_from(_VRS), _SETS, st.booleans())
def test_any_value_in_any_character_set_is_a_text_or_none(
    raw: bytes, vr: str, character_set: bytes, little: bool
) -> None:
    text = v.kept(v.shown_value(raw, vr, character_set, little_endian=little))
    assert text is None or (text.encode() and len(text.encode()) <= v.MAX_TEXT)


@pytest.mark.parametrize("text", ["x" * 1024, "ä" * 512, "x" * 1023 + "ä", "山" * 400, "", None])
def test_what_is_kept_of_a_text(text: str | None) -> None:
    found = v.kept(text)
    if text is None or len(text.encode()) <= 1024:
        assert found == text
    else:
        assert found is not None
        assert text.startswith(found)
        assert 1020 < len(found.encode()) <= 1024
