"""Whether a row of C-FIND is one that was asked for, and what is said of one that is not."""

from __future__ import annotations

import pytest

from airflow_dicom_get.dicom.header import SPECIFIC_CHARACTER_SET
from airflow_dicom_get.lists.matching import Dropped, Matcher, same_text

ACCESSION, PATIENT_ID, STUDY_DATE, MODALITY, MODALITIES, STUDY, SERIES, NAME, DESCRIPTION, TIME = (
    0x00080050, 0x00100020, 0x00080020, 0x00080060, 0x00080061, 0x0020000D, 0x0020000E, 0x00100010, 0x00081030,
    0x00080030,
)  # fmt: skip


def contradicts(key: int, asked: str, raw: bytes | None, level: str = "STUDY", character_set: bytes = b"") -> bool:
    row = {SPECIFIC_CHARACTER_SET: character_set} | ({} if raw is None else {key: raw})
    return Matcher(level, {key: asked}).contradiction(row) is not None


class TestRows:
    @pytest.mark.parametrize(
        ("key", "asked", "raw"),
        [
            (ACCESSION, "A1", b"A1"), (ACCESSION, "A1", b" A1 \0"), (ACCESSION, "A*", b"A1"), (ACCESSION, "A?", b"A1"),
            (ACCESSION, "A[1]", b"A[1]"), (ACCESSION, "A[1]*", b"A[1]2"), (ACCESSION, "*", b""), (ACCESSION, "", b"X"),
            (PATIENT_ID, "P 1", b"P 1  "), (PATIENT_ID, "p", b"p\\q"),
            (STUDY_DATE, "20240131", b"20240131"), (STUDY_DATE, "20240131", b"2024.01.31"),
            (STUDY_DATE, "20240101-20240201", b"20240131"), (STUDY_DATE, "20240101-", b"20240131"),
            (STUDY_DATE, "-20240201", b"2024.01.31"),
            (MODALITIES, "CT", b"SR\\CT "), (MODALITIES, "C*", b"MR\\CT"), (MODALITY, "CT", b"CT"),
            (STUDY, "1.2\\1.3", b"1.3\0"), (STUDY, "1.2", b"1.2 "),
            (DESCRIPTION, "brain*", b"BRAIN MR"),
            (NAME, "doe", b"Doe^Jane"), (NAME, "DOE^J*", b"Doe^Jane^^Dr."), (NAME, "doe^jane", b"JANE DOE"),
            (NAME, "do?", b"Doe^Jane"), (NAME, "*an*", b"Doe^Jane"), (NAME, "doe^jane", b"Doe^J"),
            (NAME, "M\u00fcller", b"MUELLER^EVA"), (NAME, "Mueller", "M\u00fcller^Eva".encode()),
            (NAME, "Yamada^Tarou", "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce".encode()),
            (NAME, "Yamada^Tarou", "\u5c71\u7530^\u592a\u90ce".encode()), (NAME, "*", b""),
            (NAME, "doe", b"Doe^" + 5000 * b"J"),
            (TIME, "10-11", b"101112"), (TIME, "101130-", b"1011"), (TIME, "-101112", b"10:11:12.5"),
            (TIME, "101112-101112.999999", b"101112.5"), (TIME, "10*", b"101112"), (TIME, "20-21", b""),
        ],
    )  # fmt: skip
    def test_what_was_asked_for(self, key: int, asked: str, raw: bytes) -> None:
        assert not contradicts(key, asked, raw)

    @pytest.mark.parametrize(
        ("key", "asked", "raw"),
        [
            (ACCESSION, "A1", b"A12"), (ACCESSION, "A1", b"a1"), (ACCESSION, "A1", b"0A1"), (ACCESSION, "A1", b""),
            (ACCESSION, "A1", b"  "), (ACCESSION, "A1", None), (ACCESSION, "A*", b"a1"), (ACCESSION, "A?", b"A12"),
            (PATIENT_ID, "P1", b"P10"), (PATIENT_ID, "P1", b"P 1"),
            (STUDY_DATE, "20240131", b"20240130"), (STUDY_DATE, "20240101-20240131", b"20240201"),
            (STUDY_DATE, "20240101-", b"20231231"), (STUDY_DATE, "20240101-", b"2024"), (STUDY_DATE, "20240131", b""),
            (MODALITIES, "CT", b"MR\\SR"), (MODALITIES, "CT", b"ct"), (MODALITIES, "CT", None),
            (STUDY, "1.2\\1.3", b"1.4"), (STUDY, "1.2", None), (DESCRIPTION, "brain", b"KNEE"), (NAME, "doe", None),
            (NAME, "doe", b"Roe^Jane"), (NAME, "doe^jane", b"Doe^John"), (NAME, "doe^jane", b"Roe^Jane"),
            (NAME, "doe*", b"Roe^Jane"), (NAME, "d?e", b"Roe^Jane"), (NAME, "doe", b""),
            (NAME, "\u5c71\u7530", "Suzuki=\u9234\u6728".encode()),
            (TIME, "200000-210000", b"101112"), (TIME, "-101111", b"101112"), (TIME, "101113-", b"10:11:12.9"),
            (TIME, "101112", b"1012"),
            (MODALITY, "CT", None),  # above its level: it was not matched on
        ],
    )  # fmt: skip
    def test_what_was_not(self, key: int, asked: str, raw: bytes | None) -> None:
        assert contradicts(key, asked, raw)

    @pytest.mark.parametrize("raw", [None, b"", b" "])
    def test_below_its_level_absence_says_nothing(self, raw: bytes | None) -> None:
        for key, asked in ((ACCESSION, "A1"), (STUDY_DATE, "20240131"), (STUDY, "1.2"), (PATIENT_ID, "P1")):
            assert not contradicts(key, asked, raw, "SERIES")
        assert not contradicts(SERIES, "1.2", raw, "IMAGE")
        assert contradicts(SERIES, "1.2", raw, "SERIES")
        assert contradicts(STUDY, "1.2", b"1.3", "SERIES")

    @pytest.mark.parametrize(
        ("character_set", "encoding"),
        [(b"ISO_IR 100", "latin-1"), (b"ISO_IR 192", "utf-8"), (b"ISO_IR 144 ", "iso-8859-5"), (b"", "utf-8"),
         (b"", "latin-1"), (b"GB18030", "gb18030"), (b"\\ISO 2022 IR 87", "iso2022_jp")],
    )  # fmt: skip
    def test_values_are_decoded_by_the_character_set_of_the_row(self, character_set: bytes, encoding: str) -> None:
        words = {"iso-8859-5": ("Жук", "Рак"), "gb18030": ("王", "李"), "iso2022_jp": ("山田", "川口")}
        asked, other = words.get(encoding, ("MÜLLER", "MÖLLER"))
        assert not contradicts(PATIENT_ID, asked, asked.encode(encoding) + b" ", character_set=character_set)
        assert contradicts(PATIENT_ID, asked, other.encode(encoding), character_set=character_set)
        assert contradicts(PATIENT_ID, "MULLER", asked.encode(encoding), character_set=character_set)

    def test_other_keys_are_compared_after_decoding_too(self) -> None:
        """Whatever the case; of text in another character set it was taken for granted that it fits."""
        for raw, character_set in (("SCHÄDEL".encode("latin-1"), b"ISO_IR 100"), ("Schädel".encode(), b"ISO_IR 192")):
            assert not contradicts(DESCRIPTION, "schädel*", raw, character_set=character_set)
            assert contradicts(DESCRIPTION, "KNIE*", raw, character_set=character_set)
            assert contradicts(DESCRIPTION, "schäfer*", raw, character_set=character_set)

    @pytest.mark.parametrize(
        ("one", "its", "other", "others", "same"),
        [
            (b"P1", b"", b"P1", b"ISO_IR 192", True),
            (b"P1", b"", b"P2", b"", False),
            (b"\xc4 1", b"ISO_IR 100", "Ä 1".encode(), b"ISO_IR 192", True),
            (b"\xc4 1", b"ISO_IR 100", b"\xc4 1", b"ISO_IR 144", False),
            (b"\xc4 1", b"", "Ä 1".encode(), b"ISO_IR 192", True),
            (b"\xc4 1", b"", "Ä 1".encode(), b"", True),
            (b"\xc4 1", b"", b"A 1", b"", False),
        ],
    )
    def test_texts_in_two_character_sets(self, one: bytes, its: bytes, other: bytes, others: bytes, same: bool) -> None:
        assert same_text(one, its, other, others) is same
        assert same_text(other, others, one, its) is same

    def test_an_unknown_character_set_is_no_crash(self) -> None:
        assert contradicts(PATIENT_ID, "A", b"\xc4", character_set=b"NONSENSE")

    @pytest.mark.parametrize(
        ("asked", "raw", "said"),
        [
            ("A1", b"a1", "writes its AccessionNumber in lower case."),
            ("a1", b"A1", "writes its AccessionNumber in upper case."),
            ("1", b"0001", "writes its AccessionNumber with 3 leading zeros, not 0."),
            ("0a1", b"A1", "writes its AccessionNumber with 0 leading zeros, not 1 and in upper case."),
            ("A1", b"B2", "its AccessionNumber does not match the query."),
        ],
    )
    def test_the_spelling_is_said_and_the_value_never(self, asked: str, raw: bytes, said: str) -> None:
        dropped = Dropped()
        why = Matcher("STUDY", {ACCESSION: asked}).contradiction({ACCESSION: raw})
        assert why is not None
        dropped.add(why, {})
        (remark,) = dropped.remarks()
        assert remark["count"] == 1
        assert said in remark["error"]
        assert raw.decode() not in f"{remark['error']}{remark['hint']}".replace("A C-FIND row", "")

    def test_a_key_without_any_value_is_told_from_one_with_others(self) -> None:
        dropped = Dropped()
        matcher = Matcher("STUDY", {ACCESSION: "A1"})
        for row in ({}, {ACCESSION: b""}):
            why = matcher.contradiction(row)
            assert why is not None
            dropped.add(why, {})
        error = dropped.unsupported()
        assert error is not None
        assert "does not support the key AccessionNumber at STUDY level" in str(error)
        why = matcher.contradiction({ACCESSION: b"B"})
        assert why is not None
        dropped.add(why, {})
        assert dropped.unsupported() is None
