"""Queries: what is taken, what is refused before any traffic, and what it becomes."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.engine.query import Filter, Query, parse_query
from airflow_dicom_get.errors import InvalidOption, InvalidQuery

NOW = datetime(2024, 3, 1, 2, 30, tzinfo=UTC)


def parse(query: object, model: str = "StudyRoot", timezone: str = "UTC") -> Query:
    return parse_query(query, query_model=model, timezone=timezone, now=NOW)  # type: ignore[arg-type]


def only_filter(query: dict[str, object], timezone: str = "UTC") -> Filter:
    (found,) = parse(query, timezone=timezone).filters
    return found


class TestKeys:
    @pytest.mark.parametrize(
        "key", ["StudyInstanceUID", "(0020,000D)", "(0020, 000d)", "0020000D", "0020,000d", 0x0020000D]
    )
    def test_a_key_is_a_keyword_or_a_tag(self, key: object) -> None:
        assert parse({key: "1.2.3"}).studies == ("1.2.3",)

    @pytest.mark.parametrize(
        ("key", "hint"),
        [
            ("Modalty", "Did you mean Modality?"),
            ("study_instance_uid", "Did you mean StudyInstanceUID?"),
            ("patientid", "Did you mean PatientID?"),
            ("Xyzzy", "Give a keyword such as"),
            ("", "Give a keyword such as"),
            ("(0009,0010)", "Give an attribute of the DICOM standard."),
            ("(0020,FFFE)", "Give a keyword such as"),
        ],
    )
    def test_unknown_keys_are_refused_with_a_suggestion(self, key: str, hint: str) -> None:
        with pytest.raises(InvalidQuery, match=re.escape(hint)):
            parse({key: "1", "StudyInstanceUID": "1.2"})

    @pytest.mark.parametrize(
        "key",
        [
            "PixelData", "RequestAttributesSequence", "TransferSyntaxUID", "(0000,0100)", "Rows", "RetrieveAETitle",
            "SpecificCharacterSet", "NumberOfStudyRelatedInstances", "InstanceAvailability", "LUTData",
        ],
    )  # fmt: skip
    def test_keys_that_match_nothing_are_refused(self, key: str) -> None:
        with pytest.raises(InvalidQuery, match="is not a matching key"):
            parse({key: "1", "StudyInstanceUID": "1.2"})

    def test_a_key_given_twice_is_refused(self) -> None:
        with pytest.raises(InvalidQuery, match="StudyInstanceUID is given twice"):
            parse({"StudyInstanceUID": "1.2", "0020000D": "1.3"})

    @pytest.mark.parametrize("query", ["1.2.3", None, ["1.2.3"], 7])
    def test_what_is_no_mapping_is_refused(self, query: object) -> None:
        with pytest.raises(InvalidQuery, match="is not a mapping"):
            parse(query)

    @pytest.mark.parametrize("key", [None, 1.5, True, -1, 1 << 40, b"PatientID"])
    def test_what_is_no_key_is_refused(self, key: object) -> None:
        with pytest.raises(InvalidQuery):
            parse({key: "1"})


class TestUids:
    def test_lists(self) -> None:
        assert parse({"StudyInstanceUID": ["1.2", "1.3", "1.2"]}).studies == ("1.2", "1.3")
        assert parse({"StudyInstanceUID": "1.2\\1.3"}).studies == ("1.2", "1.3")
        assert parse({"StudyInstanceUID": ("1.2 ", "1.3\0")}).studies == ("1.2", "1.3")

    def test_uid_filters_take_lists_too(self) -> None:
        found = parse({"StudyInstanceUID": "1.2", "SOPClassUID": ["1.5", "1.6"]}).filters
        assert [(item.value, item.level) for item in found] == [("1.5\\1.6", "IMAGE")]

    @pytest.mark.parametrize(
        "value",
        [
            "1..2",
            ".1",
            "1.",
            "1.2/3",
            "a.b",
            "1" * 65,
            "1.２",
            ["1.2", ""],
            ["1.2", None],
            5,
            None,
            b"1.2",
            {},
            "-1",
        ],
    )
    def test_malformed_uids_are_refused(self, value: object) -> None:
        with pytest.raises(InvalidQuery, match=r"^StudyInstanceUID: "):
            parse({"StudyInstanceUID": value, "StudyDate": "today"})

    @pytest.mark.parametrize("key", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
    @pytest.mark.parametrize("value", ["1.2*", "*", "1.2?3", "1.2\\1.3*"])
    def test_wildcards_are_refused(self, key: str, value: str) -> None:
        with pytest.raises(InvalidQuery, match=f"{key} contains a wildcard"):
            parse({key: value, "AccessionNumber": "A1"})

    @pytest.mark.parametrize("key", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
    @pytest.mark.parametrize("value", ["", " ", [], "\0"])
    def test_empty_unique_keys_are_refused(self, key: str, value: object) -> None:
        # Two servers take an empty Study Instance UID for the whole archive.
        with pytest.raises(InvalidQuery, match=f"^{key} is empty"):
            parse({key: value, "StudyDate": "today"})

    @given(st.text("0123456789.*? \\ax\0", max_size=70))
    def test_what_passes_is_safe_as_a_path(self, text: str) -> None:
        try:
            found = parse({"StudyInstanceUID": text}).studies
        except InvalidQuery:
            return
        assert found
        assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)*", uid) and len(uid) <= 64 for uid in found)

    @given(st.lists(st.from_regex(r"[0-9]{1,9}(\.[0-9]{1,9}){0,4}", fullmatch=True), min_size=1, max_size=9))
    def test_list_and_text_are_the_same(self, uids: list[str]) -> None:
        assert parse({"SOPInstanceUID": uids}) == parse({"SOPInstanceUID": "\\".join(uids)})


class TestLevels:
    @pytest.mark.parametrize(
        ("query", "level"),
        [
            ({"StudyInstanceUID": "1"}, "STUDY"),
            ({"StudyDate": "today"}, "STUDY"),
            ({"StudyInstanceUID": "1", "Modality": "CT"}, "STUDY"),
            ({"StudyInstanceUID": "1", "SeriesInstanceUID": "2"}, "SERIES"),
            ({"StudyInstanceUID": "1", "SeriesInstanceUID": "2", "SOPInstanceUID": "3"}, "IMAGE"),
            ({"StudyInstanceUID": "1", "QueryRetrieveLevel": "series"}, "SERIES"),
            ({"SeriesInstanceUID": "2", "QueryRetrieveLevel": "IMAGE"}, "IMAGE"),
        ],
    )
    def test_the_lowest_unique_key_decides_unless_told(self, query: dict[str, str], level: str) -> None:
        assert parse(query).level == level

    @pytest.mark.parametrize("level", ["FRAME", "INSTANCE", "", "STUDY ROOT", 7])
    def test_unknown_levels_are_refused(self, level: object) -> None:
        with pytest.raises(InvalidQuery, match=r"^QueryRetrieveLevel: "):
            parse({"StudyInstanceUID": "1", "QueryRetrieveLevel": level})

    @pytest.mark.parametrize(("level", "key"), [("STUDY", "SeriesInstanceUID"), ("SERIES", "SOPInstanceUID")])
    def test_unique_keys_below_the_level_are_refused(self, level: str, key: str) -> None:
        with pytest.raises(InvalidQuery, match=f"^{key} is below QueryRetrieveLevel {level}"):
            parse({"StudyInstanceUID": "1", key: "2", "QueryRetrieveLevel": level})

    def test_patient_level(self) -> None:
        found = parse({"QueryRetrieveLevel": "PATIENT", "PatientID": "P1"}, "PatientRoot")
        assert (found.level, found.patient_id) == ("PATIENT", "P1")
        with pytest.raises(InvalidQuery, match="only in PatientRoot"):
            parse({"QueryRetrieveLevel": "PATIENT", "PatientID": "P1"})
        with pytest.raises(InvalidQuery, match=r"^PatientID is missing"):
            parse({"QueryRetrieveLevel": "PATIENT", "PatientName": "X"}, "PatientRoot")

    def test_model(self) -> None:
        assert parse({"StudyInstanceUID": "1"}, "PatientRoot").model == "PatientRoot"
        with pytest.raises(InvalidOption, match=r"^query_model: "):
            parse({"StudyInstanceUID": "1"}, "STUDY")

    @pytest.mark.parametrize(
        ("key", "value", "level"),
        [
            ("PatientName", "M*", "STUDY"), ("AccessionNumber", "A1", "STUDY"), ("ModalitiesInStudy", "CT", "STUDY"),
            ("StudyDescription", "*head*", "STUDY"), ("Modality", "CT", "SERIES"), ("SeriesNumber", 3, "SERIES"),
            ("SeriesDescription", "Axial", "SERIES"), ("BodyPartExamined", "HEAD", "SERIES"),
            ("ProtocolName", "x", "SERIES"), ("StationName", "S", "SERIES"), ("SeriesDate", "20240101", "SERIES"),
            ("InstanceNumber", "7", "IMAGE"), ("SOPClassUID", "1.2", "IMAGE"), ("ContentDate", "20240101", "IMAGE"),
        ],
    )  # fmt: skip
    def test_level_of_each_filter(self, key: str, value: object, level: str) -> None:
        (found,) = parse({"StudyInstanceUID": "1", key: value}).filters
        assert (found.keyword, found.value, found.level) == (key, str(value), level)


class TestSelective:
    @pytest.mark.parametrize(
        "query",
        [{}, {"PatientName": "*"}, {"PatientName": ""}, {"Modality": "?*"}, {"QueryRetrieveLevel": "STUDY"},
         {"StudyDate": "", "AccessionNumber": None}],
    )  # fmt: skip
    def test_a_query_for_everything_is_refused(self, query: dict[str, object]) -> None:
        with pytest.raises(InvalidQuery, match="selects nothing"):
            parse(query)

    def test_empty_keys_beside_a_selective_one_ask_for_their_value(self) -> None:
        found = parse({"StudyDate": "today", "PatientName": "", "AccessionNumber": None})
        assert [item.value for item in found.filters] == ["20240301", "", ""]

    def test_patient_id_is_a_filter_too(self) -> None:
        for model in ("StudyRoot", "PatientRoot"):
            found = parse({"StudyInstanceUID": "1", "PatientID": " P1 "}, model)
            assert found.patient_id == "P1"
            assert [(item.tag, item.vr, item.value) for item in found.filters] == [(0x00100020, "LO", "P1")]

    @pytest.mark.parametrize("value", ["P*", "P?", "*"])
    def test_wildcards_in_the_patient_id_are_refused(self, value: str) -> None:
        with pytest.raises(InvalidQuery, match=r"^PatientID contains a wildcard"):
            parse({"PatientID": value})


class TestDates:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("20240102", "20240102"), ("2024-01-02", "20240102"), (20240102, "20240102"),
            (date(2024, 1, 2), "20240102"),
            (datetime(2024, 1, 2, 3, tzinfo=UTC), "20240102"), (" today ", "20240301"), ("TODAY-1", "20240229"),
            ("today-60", "20240101"), ("2024-01-01/2024-01-31", "20240101-20240131"),
            ("today-7 / today", "20240223-20240301"), ("2024-01-01/", "20240101-"), ("/today-1", "-20240229"),
            ("20240101-20240131", "20240101-20240131"), ("20240101-", "20240101-"), ("-20240131", "-20240131"),
            ("20240101/2024-01-01", "20240101-20240101"),
        ],
    )  # fmt: skip
    def test_forms(self, value: object, expected: str) -> None:
        assert only_filter({"StudyDate": value}).value == expected

    @pytest.mark.parametrize(
        ("value", "berlin", "new_york"),
        [
            ("2024-01-15 23:30:00+00:00", "20240116", "20240115"),  # {{ logical_date }}
            ("2024-01-15T23:30:00+00:00", "20240116", "20240115"),  # {{ ts }}
            ("20240115T233000+0000", "20240116", "20240115"),  # {{ ts_nodash_with_tz }}
            ("2024-01-15T23:30:00.123456Z", "20240116", "20240115"),
            ("2024-01-15 23:30+0100", "20240115", "20240115"),
            (datetime(2024, 1, 15, 23, 30, tzinfo=UTC), "20240116", "20240115"),
            ("2024-01-14 23:30:00+00:00 / 2024-01-15 23:30:00+00:00", "20240115-20240116", "20240114-20240115"),
            ("2024-01-14/2024-01-15T23:30:00Z", "20240114-20240116", "20240114-20240115"),
        ],
    )
    def test_a_date_time_is_the_day_that_it_is_at_the_node(self, value: object, berlin: str, new_york: str) -> None:
        assert only_filter({"StudyDate": value}, "Europe/Berlin").value == berlin
        assert only_filter({"StudyDate": value}, "America/New_York").value == new_york

    @pytest.mark.parametrize("value", ["2024-01-15 23:30:00", "2024-01-15T23:30", "20240115T233000"])
    def test_a_date_time_without_an_offset_could_be_either_day(self, value: str) -> None:
        with pytest.raises(InvalidQuery, match="StudyDate is a date-time without an offset"):
            parse({"StudyDate": value})

    @pytest.mark.parametrize("value", [None, "None", " none ", "null"])
    def test_a_date_that_a_template_rendered_to_null_is_none(self, value: object) -> None:
        with pytest.raises(InvalidQuery, match="StudyDate is null, not a date") as caught:
            parse({"StudyDate": value, "Modality": "CT"})
        assert "without a logical date" in str(caught.value)

    def test_today_is_the_day_at_the_node(self) -> None:
        assert only_filter({"StudyDate": "today"}, "America/New_York").value == "20240229"
        assert only_filter({"StudyDate": "today"}, "Asia/Tokyo").value == "20240301"

    @pytest.mark.parametrize(
        "value",
        ["20240230", "2024-13-01", "2024", "yesterday", "today+1", "20240102-20240101", "today/today-1", "-", "/",
         "2024.01.01", "01.02.2024", "20240101\\20240102", "2024*", "today-999999",
         "2024-02-30T10:00Z", "2024-01-15T25:00Z", "0001-01-01T00:00+14:00", "20240115T10:00Z",
         ["20240101"], 1.5, "２０２４0101"],
    )  # fmt: skip
    def test_what_is_no_date_is_refused_without_showing_it(self, value: object) -> None:
        with pytest.raises(InvalidQuery, match=r"^StudyDate\b") as caught:
            parse({"StudyDate": value})
        if isinstance(value, str) and value[0] == "2":
            assert value not in str(caught.value)

    @given(st.dates(), st.dates())
    def test_ranges_hold_the_days_between(self, one: date, two: date) -> None:
        first, last = sorted((one, two))
        value = only_filter({"StudyDate": f"{first.isoformat()}/{last.isoformat()}"}).value
        assert value == f"{first.isoformat()}-{last.isoformat()}".replace("-", "", 2)[
            :8
        ] + "-" + last.isoformat().replace("-", "")

    @given(st.integers(0, 3000), st.sampled_from(["UTC", "Pacific/Apia", "America/New_York"]))
    def test_relative_days(self, days: int, zone: str) -> None:
        expected = NOW.astimezone(ZoneInfo(zone)).date() - timedelta(days=days)
        assert only_filter({"StudyDate": f"today-{days}"}, zone).value == f"{expected:%Y%m%d}"


class TestTexts:
    @pytest.mark.parametrize("value", ["1000-1200", "101010.5", "10", "-12", "0830-"])
    def test_times_pass(self, value: str) -> None:
        assert only_filter({"StudyTime": value}).value == value

    @pytest.mark.parametrize("value", ["25", "10:00", "1000/1200", "*", "2", "1061"])
    def test_what_is_no_time_is_refused(self, value: str) -> None:
        with pytest.raises(InvalidQuery, match=r"^StudyTime is not a valid value of VR TM"):
            parse({"StudyTime": value})

    @pytest.mark.parametrize(
        ("key", "value", "what"),
        [
            ("ModalitiesInStudy", "CT\\MR", "several values"), ("Modality", ["CT", "MR"], "is a list"),
            ("SeriesNumber", "1-3", "VR IS"), ("PatientName", "A\x1b[2J", "control character"),
            ("AccessionNumber", b"A1", "is not text"), ("AccessionNumber", {"a": 1}, "is not text"),
            ("AccessionNumber", True, "is not text"), ("PatientAge", "18", "VR AS"),
        ],
    )  # fmt: skip
    def test_malformed_values_are_refused(self, key: str, value: object, what: str) -> None:
        with pytest.raises(InvalidQuery, match=f"^{key}\\b.*{what}"):
            parse({"StudyInstanceUID": "1", key: value})

    @pytest.mark.parametrize("value", ["", " ", None])
    def test_an_empty_patient_id_is_refused(self, value: object) -> None:
        with pytest.raises(InvalidQuery, match=r"^PatientID is empty"):
            parse({"PatientID": value, "StudyDate": "today"})

    @given(
        st.sampled_from(["PatientName", "PatientID", "AccessionNumber", "StudyDate", "StudyTime", "SeriesNumber"]),
        st.text(max_size=30),
    )
    def test_messages_never_show_what_may_identify_a_patient(self, key: str, value: str) -> None:
        marked = f"\\QQQ{value}QQQ"
        with pytest.raises(InvalidQuery) as caught:
            parse({key: marked})
        assert "QQQ" not in str(caught.value)
