"""A query as the user writes it, turned into unique keys and C-FIND filters (PS3.4 C.4).

The C-GET carries the level and its unique keys, nothing else: some servers take every further key as
a wider or another question. All other keys are filters, resolved by C-FIND before.

Messages name the key that is wrong, and its value only where that is a UID: other values may
identify a patient.
"""
# ruff: noqa: SIM905 - long lists of words read better as text.

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta, tzinfo
from typing import Any, Literal, cast

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import about, shown
from airflow_dicom_get.config.groups import parse_timezone
from airflow_dicom_get.config.options import OPTIONS
from airflow_dicom_get.dicom.dictionary import Attribute, UnknownAttributeError, find_attribute
from airflow_dicom_get.dicom.levels import LEVELS, UNIQUE_KEYS, FilterLevel, Level, level_of
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import InvalidQuery

Model = Literal["StudyRoot", "PatientRoot"]

_NOT_MATCHING = frozenset(
    "InstanceAvailability QueryRetrieveView RetrieveAETitle SpecificCharacterSet StorageMediaFileSetID "
    "StorageMediaFileSetUID TimezoneOffsetFromUTC NumberOfPatientRelatedInstances NumberOfPatientRelatedSeries "
    "NumberOfPatientRelatedStudies NumberOfSeriesRelatedInstances NumberOfStudyRelatedInstances "
    "NumberOfStudyRelatedSeries".split()
)
"""Keys that only ask for a value, or steer the query."""

_LIKE_A_KEY = re.compile(r"\s*[\w(),]+\s*")
_MATCHING_VRS = frozenset("AE AS CS DA DS DT IS LO LT PN SH ST TM UC UI UR UT".split())


@dataclass(frozen=True, slots=True)
class Filter:
    """A key for C-FIND, and the level on which it is one. An empty value matches everything."""

    tag: int
    keyword: str
    vr: str
    value: str
    level: FilterLevel


@dataclass(frozen=True, slots=True)
class Query:
    """What to retrieve: the level, the unique keys given, and the filters."""

    level: Level
    model: Model
    patient_id: str | None
    """A filter in StudyRoot (and among ``filters`` in both models), the unique key of PATIENT in PatientRoot."""
    studies: tuple[str, ...]
    series: tuple[str, ...]
    instances: tuple[str, ...]
    filters: tuple[Filter, ...]


def parse_query(
    query: Mapping[Any, Any],
    *,
    query_model: str = "StudyRoot",
    timezone: str | tzinfo = "UTC",
    now: datetime | None = None,
    selective: bool = True,
) -> Query:
    r"""Check a query and take it apart.

    Parameters
    ----------
    query : mapping
        Keys are DICOM keywords, ``(gggg,eeee)`` or ``ggggeeee``. UIDs may be a list, or one text with
        backslashes. Dates are ``YYYYMMDD``, ``YYYY-MM-DD``, ``today``, ``today-1``, a date-time with its offset,
        which is the day that it is in ``timezone``, a range of these as ``a/b``, or a DICOM range. Where
        ``QueryRetrieveLevel`` is absent, it is the lowest level whose unique key is given: IMAGE with
        ``SOPInstanceUID``, SERIES with ``SeriesInstanceUID``, else STUDY.
    query_model : str
        ``StudyRoot`` or ``PatientRoot``.
    timezone : str or tzinfo
        Time zone of ``today``, and of the day of a date-time.
    now : datetime, optional
        The present, with a time zone; the clock by default.
    selective : bool
        Whether a key has to select, as for whatever fetches. If not, a lone ``*`` is allowed as the value of any key
        and matches everything (universal matching, PS3.4 C.2.2.2.3).

    Raises
    ------
    InvalidQuery
        A key or value is malformed, a unique key is empty or holds a wildcard, level and keys do not
        fit, or nothing selects.
    InvalidOption
        ``query_model`` or ``timezone`` is not valid.
    """
    model = cast(Model, OPTIONS["query_model"].check("query_model", query_model))
    zone = parse_timezone("timezone", timezone)
    if not isinstance(query, Mapping):
        raise _bad("query", f"{type(query).__name__} is not a mapping", 'Give {"StudyInstanceUID": "1.2.3"}.')
    values = _by_attribute(query)
    everything = [keyword for keyword, (_, value) in values.items() if not selective and value == "*"]
    for keyword in everything:
        if keyword in UNIQUE_KEYS:
            del values[keyword]  # asked for all the same, and never sent by a user as empty
        else:
            values[keyword] = (values[keyword][0], "")
    level_given = values.pop("QueryRetrieveLevel", None)
    uids: dict[str, tuple[str, ...]] = {
        keyword: _parse_uids(keyword, values.pop(keyword)[1], unique=True)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        if keyword in values
    }
    present = (now or datetime.fromtimestamp(clock.now(), zone)).astimezone(zone)
    filters = tuple(_parse_filter(attribute, value, present) for attribute, value in values.values())
    level = _level(level_given[1] if level_given else None, uids)
    patient_id = next((item.value for item in filters if item.keyword == "PatientID"), None)
    if level == "PATIENT" and model != "PatientRoot":
        raise _bad("QueryRetrieveLevel", "PATIENT exists only in PatientRoot", "Set query_model to PatientRoot.")
    if level == "PATIENT" and patient_id is None:
        raise _bad("PatientID", "is missing, and QueryRetrieveLevel PATIENT needs it", "Give it, or use STUDY.")
    if not everything and not uids and not any(item.value.strip("*? -") for item in filters):
        raise _bad(
            "query", "selects nothing", "Give at least one key with a value, such as StudyInstanceUID or StudyDate."
        )
    return Query(
        level,
        model,
        patient_id,
        uids.get("StudyInstanceUID", ()),
        uids.get("SeriesInstanceUID", ()),
        uids.get("SOPInstanceUID", ()),
        filters,
    )


def _bad(key: str, what: str, hint: str) -> InvalidQuery:
    return InvalidQuery(about(key, what), hint=hint, key=key)


def _by_attribute(query: Mapping[Any, Any]) -> dict[str, tuple[Attribute, Any]]:
    found: dict[str, tuple[Attribute, Any]] = {}
    for key, value in query.items():
        name = f"{key:08x}" if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 1 << 32 else key
        if not isinstance(name, str):
            raise _bad(
                shown(key), "is not a query key", "Give a keyword such as StudyInstanceUID, or a tag as (gggg,eeee)."
            )
        try:
            attribute = find_attribute(name)
        except UnknownAttributeError as error:
            # Of what no key looks like, a part may be a value.
            said = shown(name) if _LIKE_A_KEY.fullmatch(name) else "A key"
            raise _bad(said, error.what, error.hint) from None
        if attribute.keyword in found:
            raise _bad(attribute.keyword, "is given twice", "Give it once; write several UIDs as a list.")
        if attribute.keyword != "QueryRetrieveLevel" and (
            attribute.group in (0x0000, 0x0002)
            or attribute.vr not in _MATCHING_VRS
            or attribute.keyword in _NOT_MATCHING
        ):
            raise _bad(attribute.keyword, "is not a matching key", "Omit it from the query.")
        found[attribute.keyword] = (attribute, value)
    return found


def _level(given: Any, uids: Mapping[str, tuple[str, ...]]) -> Level:
    lowest = max((UNIQUE_KEYS[keyword] for keyword in uids), key=LEVELS.index, default="STUDY")
    if given is None:
        return cast(Level, lowest)
    level = given.strip().upper() if isinstance(given, str) else given
    if level not in LEVELS:
        hint = "Use IMAGE for single instances." if level in ("INSTANCE", "FRAME") else f"Use {', '.join(LEVELS)}."
        raise _bad("QueryRetrieveLevel", f"{shown(given)} is not a query level", hint)
    for keyword in uids:
        if LEVELS.index(UNIQUE_KEYS[keyword]) > LEVELS.index(level):
            raise _bad(keyword, f"is below QueryRetrieveLevel {level}", f"Use {UNIQUE_KEYS[keyword]}, or omit the key.")
    return cast(Level, level)


# --- values ----------------------------------------------------------------------------------------


def _parse_uids(keyword: str, value: Any, *, unique: bool) -> tuple[str, ...]:
    if isinstance(value, str):
        parts: Iterable[Any] = value.split("\\")
    elif isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        parts = value
    else:
        raise _bad(keyword, f"{type(value).__name__} is not a valid UID", "Give a UID, or a list of UIDs.")
    # One NUL or space may pad the value of a data set.
    uids = [part.strip().rstrip("\0") if isinstance(part, str) else part for part in parts]
    if not uids or uids == [""]:
        if unique:
            raise _bad(keyword, "is empty, which some servers take for the whole archive", "Omit it, or give a value.")
        return ()
    for uid in uids:
        if isinstance(uid, str) and ("*" in uid or "?" in uid):
            raise _bad(keyword, "contains a wildcard", "Give whole UIDs, and use other keys to search.")
        if not isinstance(uid, str) or not is_uid(uid):
            raise _bad(
                keyword, f"{shown(uid)} is not a valid UID", "A UID is 1 to 64 digits and dots, without empty parts."
            )
    return tuple(dict.fromkeys(uids))


def _parse_filter(attribute: Attribute, value: Any, present: datetime) -> Filter:
    keyword, vr = attribute.keyword, attribute.vr
    if value is None and vr != "DA":
        value = ""
    if vr == "UI":
        text = "\\".join(_parse_uids(keyword, value, unique=False))
    elif vr == "DA":
        text = _parse_date(keyword, value, present)
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        what = "is a list, and only UIDs can be matched by a list" if isinstance(value, list | tuple) else "is not text"
        raise _bad(keyword, what, "Give a string.")
    else:
        text = str(value).strip(" ")
        if "\\" in text:
            raise _bad(keyword, "has several values, and only UIDs can be matched by a list", "Query once per value.")
        if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
            raise _bad(keyword, "contains a control character", "Remove it.")
        _check_text(keyword, vr, text)
    return Filter(attribute.tag, keyword, vr, text, level_of(keyword))


_TIME = r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-5]\d(?:\.\d{1,6})?)?)?"
_PATTERNS = {
    "TM": re.compile(rf"{_TIME}|{_TIME}-|-{_TIME}|{_TIME}-{_TIME}", re.ASCII),
    "IS": re.compile(r"[+-]?\d{1,12}", re.ASCII),
    "AS": re.compile(r"\d{3}[DWMY]", re.ASCII),
}
_FORMS = {
    "TM": "Write HHMMSS, or a range as HHMMSS-HHMMSS.",
    "IS": "Give a whole number.",
    "AS": "Write nnn and one of D, W, M, Y, as in 018M.",
}


def _check_text(keyword: str, vr: str, text: str) -> None:
    if keyword == "PatientID":
        if not text:
            raise _bad(keyword, "is empty", "Omit it, or give a value.")
        if "*" in text or "?" in text:
            raise _bad(keyword, "contains a wildcard", "Give the whole ID.")
    if text and vr in _PATTERNS and not _PATTERNS[vr].fullmatch(text):
        raise _bad(keyword, f"is not a valid value of VR {vr}", _FORMS[vr])


_MOMENT = (
    r"(?:\d{4}-\d{2}-\d{2}[t ]\d{2}:\d{2}(?::\d{2}(?:\.\d{1,9})?)?(?:z|[+-]\d{2}:?\d{2})?"
    r"|\d{8}t\d{6}(?:z|[+-]\d{4})?)"
)
"""A date-time as Airflow's templates render it: ``logical_date``, ``ts``, ``ts_nodash_with_tz``."""
_DAY = rf"today(?:-\d{{1,5}})?|\d{{8}}|\d{{4}}-\d{{2}}-\d{{2}}|{_MOMENT}"
_DAYS = re.compile(rf"(?P<one>{_DAY})|(?P<a>{_DAY})?\s*/\s*(?P<b>{_DAY})?|(?P<c>\d{{8}})?-(?P<d>\d{{8}})?", re.ASCII)


def _parse_date(keyword: str, value: Any, present: datetime) -> str:
    """A date, or a range of dates, as DICOM writes it (PS3.4 C.2.2.2.5)."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        value = _day_of(keyword, value, present)
    if isinstance(value, date):
        return f"{value:%Y%m%d}"
    text = str(value).strip() if isinstance(value, str | int) else None
    if text == "":
        return ""
    if value is None or (text and text.lower() in ("none", "null")):
        hint = "In Airflow, a run that was triggered without a logical date has no dates: give it one, or use a param."
        raise _bad(keyword, "is null, not a date", hint)
    match = _DAYS.fullmatch(text.lower()) if text else None
    if not match:
        raise _bad(keyword, "is not a valid date", "Write YYYYMMDD, YYYY-MM-DD, today, today-1, or a range as a/b.")
    if match["one"]:
        return _day(keyword, match["one"], present)
    first, last = (
        _day(keyword, part, present) if part else "" for part in (match["a"] or match["c"], match["b"] or match["d"])
    )
    if not first and not last:
        raise _bad(keyword, "is a range without ends", "Give at least one end.")
    if first and last and first > last:
        raise _bad(keyword, "is a range that ends before it begins", "Write the earlier date first.")
    return f"{first}-{last}"


def _day(keyword: str, text: str, present: datetime) -> str:
    try:
        if text.startswith("today"):
            day = present.date() - timedelta(days=int(text[6:] or 0))
        elif len(text) > len("2024-01-31"):
            day = _day_of(keyword, datetime.fromisoformat(text.upper()), present)
        else:
            day = datetime.strptime(text.replace("-", ""), "%Y%m%d").date()
    except InvalidQuery:
        raise
    except (ValueError, OverflowError):
        raise _bad(keyword, "contains a day that does not exist", "Check day and month.") from None
    return f"{day.year:04}{day:%m%d}"


def _day_of(keyword: str, moment: datetime, present: datetime) -> date:
    """The day that a moment is where the node is."""
    if moment.tzinfo is None:
        raise _bad(keyword, "is a date-time without an offset", "Add one, as in +01:00, or give the date alone.")
    try:
        return moment.astimezone(present.tzinfo).date()
    except OverflowError:
        raise _bad(keyword, "contains a day that does not exist", "Check day and month.") from None
