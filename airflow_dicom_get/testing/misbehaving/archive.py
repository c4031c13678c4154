"""The synthetic study: instances, their data sets, and the answers to C-FIND and C-GET about them."""

from __future__ import annotations

import functools
import itertools
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from airflow_dicom_get.testing.misbehaving import wire

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"

STUDY_UID = "2.25.330000000000000000000000000000000001"
FOREIGN_STUDY_UID = "2.25.339999999999999999999999999999999999"

PATIENT_NAME = "HOSTILE^PATIENT"
PATIENT_ID = "HOSTILE1"
ACCESSION = "HOSTILE-ACC"
STUDY_DATE = "20240131"

_BLOCK = 1 << 20
_LONG_VRS = frozenset({b"OB", b"OW", b"SQ", b"UN", b"UT"})
_LEVELS = ("STUDY", "SERIES", "IMAGE")
_UNIQUE_KEYS = {"STUDY": 0x0020000D, "SERIES": 0x0020000E, "IMAGE": 0x00080018}
_STORED_AS_IS = frozenset({wire.IMPLICIT_LE, wire.EXPLICIT_LE, wire.EXPLICIT_BE, wire.DEFLATED_LE})

Row = dict[int, str]
Element = tuple[int, bytes, str | int | bytes]

_VRS: Mapping[int, bytes] = {
    0x00080005: b"CS", 0x00080016: b"UI", 0x00080018: b"UI", 0x00080020: b"DA", 0x00080030: b"TM",
    0x00080050: b"SH", 0x00080052: b"CS", 0x00080054: b"AE", 0x00080060: b"CS", 0x00080061: b"CS",
    0x00080062: b"UI", 0x00081030: b"LO", 0x00083002: b"UI", 0x00100010: b"PN", 0x00100020: b"LO",
    0x0020000D: b"UI", 0x0020000E: b"UI", 0x00200010: b"SH", 0x00200011: b"IS", 0x00200013: b"IS",
    0x00201206: b"IS", 0x00201208: b"IS", 0x00201209: b"IS",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instance:
    """One synthetic instance. ``salt`` other than 0 gives other bytes under the same UIDs."""

    study: str
    series: str
    sop: str
    series_number: int
    number: int
    size: int
    sop_class: str = CT
    syntax: str = wire.EXPLICIT_LE
    salt: int = 0
    patient_id: str = PATIENT_ID
    accession: str = ACCESSION
    date: str = STUDY_DATE
    time: str = "101112"
    modality: str = "CT"

    def elements(self) -> list[Element]:
        """All elements before the pixel data."""
        return [
            (0x00080005, b"CS", "ISO_IR 100"),
            (0x00080016, b"UI", self.sop_class),
            (0x00080018, b"UI", self.sop),
            (0x00080020, b"DA", self.date),
            (0x00080030, b"TM", self.time),
            (0x00080060, b"CS", self.modality),
            (0x00100010, b"PN", PATIENT_NAME),
            (0x00100020, b"LO", self.patient_id),
            (0x0020000D, b"UI", self.study),
            (0x0020000E, b"UI", self.series),
            (0x00200010, b"SH", "1"),
            (0x00200011, b"IS", str(self.series_number)),
            (0x00200013, b"IS", str(self.number)),
            (0x00280002, b"US", 1),
            (0x00280004, b"CS", "MONOCHROME2"),
            (0x00280010, b"US", max(1, min(0xFFFF, self.size // 64))),
            (0x00280011, b"US", 64),
            (0x00280100, b"US", 8),
            (0x00280101, b"US", 8),
            (0x00280102, b"US", 7),
            (0x00280103, b"US", 0),
        ]

    def pieces(self, syntax: str | None = None) -> Iterator[bytes]:
        """The data set in pieces of at most about 1 MiB, in its own syntax or in another one."""
        syntax = syntax or self.syntax
        if syntax == wire.DEFLATED_LE:
            yield deflate(b"".join(self.pieces(wire.EXPLICIT_LE)))
            return
        head = encode(self.elements(), syntax)
        encapsulated = syntax not in _STORED_AS_IS
        overhead = len(head) + (36 if encapsulated else 8 if syntax == wire.IMPLICIT_LE else 12)
        length = max(2, self.size - overhead) & ~1
        if encapsulated:
            head += struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
            head += struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, length)
        elif syntax == wire.IMPLICIT_LE:
            head += struct.pack("<HHI", 0x7FE0, 0x0010, length)
        else:
            order = ">" if syntax == wire.EXPLICIT_BE else "<"
            head += struct.pack(order + "HH2sHI", 0x7FE0, 0x0010, b"OB", 0, length)
        yield head
        block = noise(self.salt)
        for at in range(0, length, _BLOCK):
            yield block if length - at >= _BLOCK else block[: length - at]
        if encapsulated:
            yield struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)

    def dataset(self) -> bytes:
        """The data set as it is sent."""
        return b"".join(self.pieces())


@functools.lru_cache(maxsize=16)
def noise(salt: int) -> bytes:
    return random.Random(salt).randbytes(_BLOCK)


def encode(elements: Iterable[Element], syntax: str) -> bytes:
    """Encode flat elements; any compressed syntax is explicit VR little endian."""
    order = ">" if syntax == wire.EXPLICIT_BE else "<"
    out = []
    for tag, vr, value in elements:
        if isinstance(value, int):
            raw = struct.pack(order + "H", value)
        else:
            raw = value.encode("latin-1") if isinstance(value, str) else value
            if len(raw) & 1:
                raw += b"\0" if vr in (b"UI", b"OB", b"UN") else b" "
        group, element = tag >> 16, tag & 0xFFFF
        if syntax == wire.IMPLICIT_LE:
            out.append(struct.pack("<HHI", group, element, len(raw)))
        elif vr in _LONG_VRS:
            out.append(struct.pack(order + "HH2sHI", group, element, vr, 0, len(raw)))
        else:
            out.append(struct.pack(order + "HH2sH", group, element, vr, len(raw)))
        out.append(raw)
    return b"".join(out)


def deflate(data: bytes) -> bytes:
    """A raw RFC 1951 stream, padded to even length (PS3.5 A.5)."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data) + packer.flush()
    return packed + b"\0" * (len(packed) & 1)


def build(
    *, series: int, instances: int, size: int, pairs: Sequence[tuple[str, str]], study: str = STUDY_UID
) -> list[Instance]:
    """A study of ``series`` × ``instances``; (class, syntax) pairs are dealt out in turn."""
    turn = itertools.cycle(pairs)
    root = int(study.removeprefix("2.25."))
    made = []
    for s in range(1, series + 1):
        for n in range(1, instances + 1):
            sop_class, syntax = next(turn)
            series_uid, sop = f"2.25.{root + s * 10**8}", f"2.25.{root + s * 10**8 + n}"
            made.append(Instance(study, series_uid, sop, s, n, size, sop_class, syntax))
    return made


def another(like: Instance, number: int, *, study: str | None = None) -> Instance:
    """An instance that the archive does not hold, in the series of ``like`` or in another study."""
    root = int(like.series.removeprefix("2.25."))
    sop = f"2.25.{root + 9 * 10**6 + number}"
    if study is None:
        return replace(like, sop=sop, number=number)
    series = f"2.25.{int(study.removeprefix('2.25.')) - 10**8}"
    return replace(like, study=study, series=series, sop=f"{series}{number:03}", number=number)


def others(size: int) -> list[Instance]:
    """Three more studies, of other patients: keys that begin alike, and keys that are altogether other ones."""
    keys = (("HOSTILE12", f"{ACCESSION}2", "20240201"), ("HOSTILE13", f"{ACCESSION}33", "20230131"),
            ("OTHER", "OTHER-ACC", "20240131"))  # fmt: skip
    made = []
    for number, (patient_id, accession, date) in enumerate(keys, 1):
        study = f"2.25.{331 * 10**33 + number * 10**12}"
        for instance in build(series=1, instances=2, size=size, pairs=((CT, wire.EXPLICIT_LE),), study=study):
            made.append(replace(instance, patient_id=patient_id, accession=accession, date=date))
    return made


def crowd(count: int, size: int) -> list[Instance]:
    """So many more studies of other patients, of one instance each, over the minutes of the day of the first one."""
    made = []
    for number in range(count):
        study = f"2.25.{332 * 10**33 + number * 10**12}"
        (instance,) = build(series=1, instances=1, size=size, pairs=((CT, wire.EXPLICIT_LE),), study=study)
        time = f"{number * 5 // 60 % 24:02}{number * 5 % 60:02}{number % 60:02}"
        made.append(replace(instance, patient_id=f"CROWD{number}", accession=f"CROWD-{number}", time=time))
    return made


# --- identifiers -------------------------------------------------------------------------------


def parse_identifier(data: bytes, syntax: str) -> Row:
    """Read a flat identifier into tag and text; sequences are passed over."""
    found: Row = {}
    at = 0
    while at + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        at += 8
        if syntax != wire.IMPLICIT_LE:
            if data[at - 4 : at - 2] in _LONG_VRS:
                length = int.from_bytes(data[at : at + 4], "little")
                at += 4
            else:
                length >>= 16
        if length == 0xFFFFFFFF:
            break
        found[group << 16 | element] = data[at : at + length].decode("latin-1").strip("\0 ")
        at += length
    return found


def encode_identifier(row: Row, syntax: str) -> bytes:
    """Encode an answer to C-FIND."""
    return encode(((tag, _VRS.get(tag, b"LO"), row[tag]) for tag in sorted(row)), syntax)


def _wanted(tag: int, value: str, wanted: str) -> bool:
    if not wanted or wanted in ("*", value):
        return True
    values = value.split("\\")
    vr = _VRS.get(tag)
    if vr == b"UI":
        return not set(wanted.split("\\")).isdisjoint(values)
    if vr in (b"DA", b"TM") and "-" in wanted:
        first, last = wanted.split("-", 1)
        return (first or "0") <= value <= (last or "9")
    pattern = re.escape(wanted).replace(r"\*", ".*").replace(r"\?", ".")
    return any(re.fullmatch(pattern, v, re.IGNORECASE if vr == b"PN" else 0) for v in values)


def attributes(level: str, group: Sequence[Instance]) -> Row:
    """All that a C-FIND answer about a study, a series or an instance can hold."""
    first = group[0]
    row = {
        0x00080052: level,
        0x00080054: "MISBEHAVING",
        0x00080020: first.date,
        0x00080030: first.time,
        0x00080050: first.accession,
        0x00100010: PATIENT_NAME,
        0x00100020: first.patient_id,
        0x00200010: "1",
        0x00081030: "HOSTILE STUDY",
        0x0020000D: first.study,
    }
    if level == "STUDY":
        row[0x00080061] = "\\".join(sorted({i.modality for i in group}))
        row[0x00080062] = "\\".join(sorted({i.sop_class for i in group}))
        row[0x00201206] = str(len({i.series for i in group}))
        row[0x00201208] = str(len(group))
        return row
    row[0x0020000E] = first.series
    row[0x00080060] = first.modality
    row[0x00200011] = str(first.series_number)
    if level == "SERIES":
        row[0x00201209] = str(len(group))
        return row
    row[0x00080016] = first.sop_class
    row[0x00080018] = first.sop
    row[0x00083002] = first.syntax
    row[0x00200013] = str(first.number)
    return row


def find(
    level: str, query: Row, listing: Iterable[Instance], describe: Callable[[str, Sequence[Instance]], Row]
) -> Iterator[Row]:
    """Answer a C-FIND: one row per match with the keys that were asked for, unknown ones empty."""
    groups: dict[tuple[str, ...], list[Instance]] = {}
    depth = _LEVELS.index(level) + 1 if level in _LEVELS else 1
    # Most of what is held is ruled out by a unique key, and never described.
    asked = [query.get(_UNIQUE_KEYS[upper], "") for upper in _LEVELS[:depth]]
    named = [(n, frozenset(uids.split("\\"))) for n, uids in enumerate(asked) if uids not in ("", "*")]
    for instance in listing:
        key = (instance.study, instance.series, instance.sop)[:depth]
        if all(key[n] in uids for n, uids in named):
            groups.setdefault(key, []).append(instance)
    for group in groups.values():
        row = describe(level, group)
        if all(_wanted(key, row[key], wanted) for key, wanted in query.items() if key != 0x00080052 and key in row):
            yield {**{key: row.get(key, "") for key in query}, 0x00080052: level, 0x00080054: row[0x00080054]}


class RefusedError(LookupError):
    """A C-GET identifier that is answered with a failure status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status:04X}")
        self.status = status


def asked_uids(request: Row) -> tuple[str, list[str]]:
    """Level and the values of the unique key at that level."""
    level = request.get(0x00080052, "")
    tag = {**_UNIQUE_KEYS, "PATIENT": 0x00100020}.get(level)
    if tag is None or not request.get(tag):
        raise RefusedError(0xA900)
    return level, request[tag].split("\\")


def select(request: Row, holdings: Sequence[Instance]) -> list[Instance]:
    """The instances that a C-GET identifier names, in the order in which they are held.

    Raises
    ------
    RefusedError
        A900: no level, a unique key missing at or above the level, or a list above it (PS3.4 C.4.3.1.3).
    """
    level, uids = asked_uids(request)
    above = _LEVELS[: _LEVELS.index(level)] if level in _LEVELS else ()
    for upper in above:
        value = request.get(_UNIQUE_KEYS[upper], "")
        if not value or "\\" in value:
            raise RefusedError(0xA900)
    wanted = set(uids)

    def named(i: Instance) -> bool:
        if level == "PATIENT":
            return i.patient_id in wanted
        own = {"STUDY": i.study, "SERIES": i.series, "IMAGE": i.sop}
        return own[level] in wanted and all(own[upper] == request[_UNIQUE_KEYS[upper]] for upper in above)

    return [i for i in holdings if named(i)]
