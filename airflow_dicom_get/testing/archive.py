"""The folder behind the embedded PACS: an index of its Part 10 files, with query and selection."""

from __future__ import annotations

import re
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial

from airflow_dicom_get.testing.encoding import vr_of

LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UNIQUE_KEYS = {"PATIENT": 0x00100020, "STUDY": 0x0020000D, "SERIES": 0x0020000E, "IMAGE": 0x00080018}

CHARACTER_SET, SOP_CLASS, SOP_INSTANCE = 0x00080005, 0x00080016, 0x00080018
PATIENT_ID, STUDY_UID, SERIES_UID = 0x00100020, 0x0020000D, 0x0020000E
ACCESSION = 0x00080050
RETRIEVE_LEVEL, RETRIEVE_AE, AVAILABILITY = 0x00080052, 0x00080054, 0x00080056
MODALITY, MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY = 0x00080060, 0x00080061, 0x00080062
AVAILABLE_SYNTAX = 0x00083002
PATIENT_STUDIES, PATIENT_SERIES, PATIENT_INSTANCES = 0x00201200, 0x00201202, 0x00201204
STUDY_SERIES, STUDY_INSTANCES, SERIES_INSTANCES = 0x00201206, 0x00201208, 0x00201209

_STORED_KEYS = {
    "PATIENT": (0x00100010, PATIENT_ID, 0x00100030, 0x00100040),
    "STUDY": (0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00081030, 0x00101010, STUDY_UID, 0x00200010),
    "SERIES": (
        0x00080021, 0x00080031, MODALITY, 0x00080070, 0x0008103E, 0x00180015, 0x00181030, SERIES_UID, 0x00200011,
    ),
    "IMAGE": (
        0x00080008, SOP_CLASS, SOP_INSTANCE, 0x00080023, 0x00080033, 0x00200012, 0x00200013, 0x00280008, 0x00280010,
        0x00280011,
    ),
}  # fmt: skip
_COMPUTED_KEYS = {
    "PATIENT": (PATIENT_STUDIES, PATIENT_SERIES, PATIENT_INSTANCES),
    "STUDY": (MODALITIES_IN_STUDY, SOP_CLASSES_IN_STUDY, STUDY_SERIES, STUDY_INSTANCES),
    "SERIES": (SERIES_INSTANCES,),
    "IMAGE": (AVAILABLE_SYNTAX,),
}
_COUNTED = frozenset(_COMPUTED_KEYS["STUDY"])
_LEVEL_OF = {tag: level for level in LEVELS for tag in (*_STORED_KEYS[level], *_COMPUTED_KEYS[level])}
_WANTED = [tag for tags in _STORED_KEYS.values() for tag in tags]
_LAST_WANTED = max(_WANTED)
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")

Row = dict[int, str]


class NotIndexedError(ValueError):
    """The file cannot be served: the message says why, without naming anything of the patient."""


class BadIdentifierError(ValueError):
    """A retrieve identifier that does not match the SOP class (status A900)."""

    def __init__(self, comment: str, tag: int = 0) -> None:
        super().__init__(comment)
        self.tag = tag


class Entry:
    """One file: where its data set lies, and the keys of the IMAGE level."""

    __slots__ = ("keys", "length", "offset", "path", "sop", "sop_class", "syntax")

    def __init__(self, path: Path, offset: int, length: int, syntax: str, keys: Row) -> None:
        self.path, self.offset, self.length, self.syntax = path, offset, length, syntax
        self.sop, self.sop_class = keys[SOP_INSTANCE], keys[SOP_CLASS]
        self.keys = keys


class Series:
    """The keys of a series and its entries by SOP Instance UID."""

    __slots__ = ("entries", "keys")

    def __init__(self, keys: Row) -> None:
        self.keys = keys
        self.entries: dict[str, Entry] = {}


class Study:
    """The keys of a patient and a study, and its series by UID."""

    __slots__ = ("keys", "patient", "series")

    def __init__(self, patient: Row, keys: Row) -> None:
        self.patient, self.keys = patient, keys
        self.series: dict[str, Series] = {}

    def entries(self) -> Iterator[Entry]:
        for series in self.series.values():
            yield from series.entries.values()

    def instances(self) -> int:
        return sum(len(series.entries) for series in self.series.values())


class Archive:
    """An index over a folder. Only headers are read; every answer is drawn from memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped: dict[Path, str] = {}
        self._studies: dict[str, Study] = {}
        self._by_accession: dict[str, dict[str, Study]] = {}
        """Studies by each value of their Accession Number, by UID: lists are queried by it, value by value."""
        self._lock = threading.Lock()

    def load(self) -> None:
        """Index every Part 10 file below the folder; what cannot be served goes to ``skipped``."""
        with warnings.catch_warnings():
            # Odd real files make pydicom talk; whether they can be served is decided here.
            warnings.simplefilter("ignore")
            for path in sorted(path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".part"):
                try:
                    self.add(path)
                except NotIndexedError as reason:
                    self.skipped[path] = str(reason)

    def add(self, path: Path, *, replace: bool = False) -> Entry:
        """Index one file, or raise `NotIndexedError`; an instance that is there already stays, unless ``replace``."""
        syntax, offset, length, row = read_header(path)
        keys = {level: {tag: row[tag] for tag in _STORED_KEYS[level] if tag in row} for level in LEVELS}
        entry = Entry(path, offset, length, syntax, keys["IMAGE"])
        with self._lock:
            study = self._study(row[STUDY_UID], keys)
            known = next((held for held in study.series.values() if entry.sop in held.entries), None)
            if known and not replace:
                raise NotIndexedError(f"the same SOP instance as {known.entries[entry.sop].path.name}")
            if known:
                del known.entries[entry.sop]
            study.series.setdefault(row[SERIES_UID], Series(keys["SERIES"])).entries[entry.sop] = entry
        return entry

    def _study(self, uid: str, keys: Mapping[str, Row]) -> Study:
        if uid not in self._studies:
            study = self._studies[uid] = Study(keys["PATIENT"], keys["STUDY"])
            for value in study.keys.get(ACCESSION, "").split("\\"):
                self._by_accession.setdefault(value, {})[uid] = study
        return self._studies[uid]

    def studies(self) -> list[str]:
        """The Study Instance UIDs."""
        with self._lock:
            return list(self._studies)

    def entries(self, study: str | None = None) -> list[Entry]:
        """All entries, or those of one study."""
        with self._lock:
            return [entry for uid, held in self._studies.items() if study in (None, uid) for entry in held.entries()]

    def syntaxes(self, sop_class: str) -> list[str]:
        """The transfer syntaxes in which instances of a class are held, the most frequent first."""
        counts: dict[str, int] = {}
        for entry in self.entries():
            if entry.sop_class == sop_class:
                counts[entry.syntax] = counts.get(entry.syntax, 0) + 1
        return sorted(counts, key=lambda syntax: -counts[syntax])

    def find(self, level: str, keys: Mapping[int, str], unsupported: frozenset[int] = frozenset()) -> list[Row]:
        """The rows that match, each with all that is known at its level. Keys beyond our knowledge match anything."""
        wanted: dict[str, Row] = {name: {} for name in LEVELS}
        for tag, value in keys.items():
            if value and tag in _LEVEL_OF and tag not in unsupported:
                wanted[_LEVEL_OF[tag]][tag] = value
        with self._lock:
            return list(self._find(level, wanted))

    def _find(self, level: str, wanted: dict[str, Row]) -> Iterator[Row]:
        patients: dict[str, list[Study]] = {}
        counted = {tag: value for tag, value in wanted["STUDY"].items() if tag in _COUNTED}
        stored = {tag: value for tag, value in wanted["STUDY"].items() if tag not in _COUNTED}
        for study in self._candidates(stored.get(STUDY_UID), stored.get(ACCESSION)):
            row = {**study.patient, **study.keys}
            if not (_matches(wanted["PATIENT"], row) and _matches(stored, row)):
                continue
            # What costs counting is counted where it is returned or asked for, of what matches otherwise.
            if level == "STUDY" or wanted["STUDY"]:
                row |= {
                    MODALITIES_IN_STUDY: _several(series.keys.get(MODALITY) for series in study.series.values()),
                    SOP_CLASSES_IN_STUDY: _several(entry.sop_class for entry in study.entries()),
                    STUDY_SERIES: str(len(study.series)),
                    STUDY_INSTANCES: str(study.instances()),
                }
            if not _matches(counted, row):
                continue
            if level == "PATIENT":
                patients.setdefault(study.patient.get(PATIENT_ID, ""), []).append(study)
            elif level == "STUDY":
                yield row
            else:
                yield from self._below(level, study, row, wanted)
        for held in patients.values():
            yield {
                **held[0].patient,
                PATIENT_STUDIES: str(len(held)),
                PATIENT_SERIES: str(sum(len(study.series) for study in held)),
                PATIENT_INSTANCES: str(sum(study.instances() for study in held)),
            }

    def _below(self, level: str, study: Study, above: Row, wanted: dict[str, Row]) -> Iterator[Row]:
        for series in study.series.values():
            row = {**above, **series.keys, SERIES_INSTANCES: str(len(series.entries))}
            if not _matches(wanted["SERIES"], row):
                continue
            if level == "SERIES":
                yield row
                continue
            for entry in series.entries.values():
                below = {**row, **entry.keys, AVAILABLE_SYNTAX: entry.syntax}
                if _matches(wanted["IMAGE"], below):
                    yield below

    def _candidates(self, uids: str | None, accession: str | None = None) -> Iterable[Study]:
        if uids is not None:
            return [self._studies[uid] for uid in dict.fromkeys(uids.split("\\")) if uid in self._studies]
        if accession is not None and not set(accession) & set("*?\\"):
            return list(self._by_accession.get(accession, {}).values())
        return list(self._studies.values())

    def select(self, level: str, keys: Mapping[int, str], *, patient_root: bool) -> list[Entry]:
        """The entries that a retrieve identifier names (PS3.4 C.4.3.1.3), or `BadIdentifierError`."""
        top = "PATIENT" if patient_root else "STUDY"
        if level not in LEVELS[LEVELS.index(top) :]:
            raise BadIdentifierError("Query/Retrieve Level is not one of this model", RETRIEVE_LEVEL)
        uids: dict[str, list[str]] = {}
        for name in LEVELS[LEVELS.index(top) : LEVELS.index(level) + 1]:
            tag = UNIQUE_KEYS[name]
            values = keys.get(tag, "").split("\\")
            if not all(values):
                raise BadIdentifierError(f"Unique key of level {name} is missing or empty", tag)
            if any(c in value for value in values for c in "*?"):
                raise BadIdentifierError(f"Wildcard in the unique key of level {name}", tag)
            if len(values) > 1 and (name != level or name == "PATIENT"):
                raise BadIdentifierError(f"Several values in the unique key of level {name}", tag)
            uids[name] = values
        with self._lock:
            return list(self._select(uids))

    def _select(self, uids: dict[str, list[str]]) -> Iterator[Entry]:
        patients, chosen_series = uids.get("PATIENT"), uids.get("SERIES")
        instances = set(uids["IMAGE"]) if "IMAGE" in uids else None
        for study in self._candidates("\\".join(uids["STUDY"]) if "STUDY" in uids else None):
            if patients and study.patient.get(PATIENT_ID) not in patients:
                continue
            for uid, series in study.series.items():
                if chosen_series and uid not in chosen_series:
                    continue
                for entry in series.entries.values():
                    if instances is None or entry.sop in instances:
                        yield entry


def read_header(path: Path) -> tuple[str, int, int, Row]:
    """Transfer syntax, offset and length of the data set, and the keys, of a Part 10 file; or `NotIndexedError`."""
    try:
        with path.open("rb") as file:
            syntax, offset = read_meta(file)
            length = file.seek(0, SEEK_END) - offset
            file.seek(0)
            dataset = read_partial(file, lambda tag, vr, length: tag > _LAST_WANTED, specific_tags=list(_WANTED))
            row = text_values(dataset, little_endian=syntax != _BIG_ENDIAN)
    except NotIndexedError:
        raise
    except Exception as exc:
        raise NotIndexedError(f"the header cannot be read ({type(exc).__name__})") from exc
    for tag in (SOP_CLASS, SOP_INSTANCE, STUDY_UID, SERIES_UID):
        value = row.get(tag, "")
        if len(value) > 64 or not _UID.fullmatch(value):
            raise NotIndexedError(f"({tag >> 16:04X},{tag & 0xFFFF:04X}) holds no valid UID")
    if row[SOP_CLASS] == _MEDIA_STORAGE_DIRECTORY:
        raise NotIndexedError("a DICOMDIR")
    return syntax, offset, length, row


def read_meta(file: BinaryIO) -> tuple[str, int]:
    """Transfer syntax and offset of the data set. The group length is not trusted: the group is walked."""
    if file.read(132)[128:] != b"DICM":
        raise NotIndexedError("not a Part 10 file")
    syntax = ""
    while True:
        offset = file.tell()
        head = file.read(8)
        if len(head) < 8 or head[:2] != b"\x02\x00":
            break
        if head[4:6] in (b"OB", b"UN"):
            (length,) = struct.unpack("<I", file.read(4))
        else:
            (length,) = struct.unpack("<H", head[6:8])
        value = file.read(length)
        if head[2:4] == b"\x10\x00":
            syntax = value.decode("ascii", "replace").strip("\0 ")
    if not _UID.fullmatch(syntax):
        raise NotIndexedError("no transfer syntax in the file meta information")
    return syntax, offset


def text_values(dataset: Dataset, *, little_endian: bool = True) -> Row:
    """The values of a data set as text, by tag, several joined by a backslash, sequences as empty.

    The raw values are taken: pydicom's value classes refuse or rewrite what real files hold.
    """
    encodings = convert_encodings(dataset.get("SpecificCharacterSet"))
    row: Row = {}
    for tag in dataset.keys():  # noqa: SIM118 - iterating over the data set itself converts the elements
        element: RawDataElement | DataElement = dataset.get_item(tag)
        if not isinstance(element, RawDataElement):
            row[int(tag)] = "" if element.VR == "SQ" else _joined(element.value)
            continue
        value = element.value or b""
        vr = element.VR if element.VR not in (None, "UN") else vr_of(tag)
        if vr == "US":
            order = "<" if little_endian else ">"
            row[int(tag)] = "\\".join(str(n) for (n,) in struct.iter_unpack(order + "H", value[: len(value) & ~1]))
        elif vr == "SQ":
            row[int(tag)] = ""
        elif vr in _TEXT_VRS:
            row[int(tag)] = _trimmed(decode_bytes(value, encodings, {0x5C, 0x5E, 0x3D}))
        else:
            row[int(tag)] = _trimmed(value.decode("latin-1"))
    return row


def _joined(value: object) -> str:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return "" if value is None else str(value)
    return "\\".join(str(part) for part in value)


def _trimmed(text: str) -> str:
    if "\\" in text:
        return "\\".join(part.strip("\0 ") for part in text.split("\\"))
    return text.strip("\0 ")


def _several(values: Iterable[str | None]) -> str:
    return "\\".join(sorted({value for value in values if value}))


def _matches(wanted: Row, row: Row) -> bool:
    return all(value_matches(vr_of(tag), value, row.get(tag, "")) for tag, value in wanted.items())


def value_matches(vr: str, wanted: str, held: str) -> bool:
    """Attribute matching of PS3.4 C.2.2.2; a list is taken for every VR, any of its values matches."""
    if vr in ("DA", "TM", "DT"):
        return _time_matches(_digits(vr, wanted), _digits(vr, held))
    if vr == "PN":
        wanted, held = wanted.casefold(), held.casefold()
    parts = held.split("\\")
    for value in wanted.split("\\"):
        if vr != "UI" and ("*" in value or "?" in value):
            if any(_pattern(value).fullmatch(part) for part in parts):
                return True
        elif vr == "IS" and value.lstrip("+-").isdigit():
            if any(part.lstrip("+-").isdigit() and int(part) == int(value) for part in parts):
                return True
        elif value in parts:
            return True
    return False


def _digits(vr: str, text: str) -> str:
    # The forms of ACR-NEMA: 1997.04.24 and 10:30:00.
    return text.replace(".", "") if vr == "DA" else text.replace(":", "")


def _time_matches(wanted: str, held: str) -> bool:
    low, dash, high = wanted.partition("-")
    if not dash:
        return held == wanted
    # An end of 1030 means all of that minute, so only its own length counts.
    return bool(held) and (not low or held >= low) and (not high or held[: len(high)] <= high)


@lru_cache(maxsize=64)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in text), re.DOTALL)
