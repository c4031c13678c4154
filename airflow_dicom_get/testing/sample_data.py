"""Data for demo and tests: the real files of pydicom's wheel, and studies made up here.

What is made up has UIDs derived from a name, so two runs write the same bytes. Real files are
changed, where a study calls for it, element by element in their bytes: all else stays as it was
found, odd encodings and padding included.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path

import pydicom.data
from pydicom.filereader import read_partial

from airflow_dicom_get.testing.archive import (
    PATIENT_ID,
    SERIES_UID,
    SOP_CLASS,
    SOP_INSTANCE,
    STUDY_UID,
    NotIndexedError,
    Row,
    read_header,
    read_meta,
)
from airflow_dicom_get.testing.encoding import LONG_VRS, identifier, part10_header, vr_of

STUDY_DATE = "20240115"
"""The day of the studies made up here, and of the real ones that ``write_demo_data`` moves to it."""

CT, ENHANCED_SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.22"
PRIVATE_CLASS = "1.3.12.2.1107.5.9.1"
"""A private storage class (Siemens CSA Non-Image)."""

EXPLICIT_LITTLE, EXPLICIT_BIG, IMPLICIT_LITTLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2"
DEFLATED, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"

_STUDY_DATE = 0x00080020
_ROWS = _COLUMNS = 512
# Not whole, or with VR UN on every element, so that no PACS finds the UIDs.
_UNFIT = ("truncated", "rtdose_rle")
# Real studies that the demo moves to its day: structured report, radiotherapy, segmentation, waveform, compressed.
_DEMO_FILES = ("reportsi", "rtplan", "liver", "MR_small", "JPEG-lossy")


def make_uid(name: str) -> str:
    """The UID that belongs to a name, below 2.25."""
    return f"2.25.{int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])}"


# --- real files ------------------------------------------------------------------------------------


def usable_pydicom_files() -> list[Path]:
    """The files of pydicom's wheel that can be stored and retrieved: one for each SOP Instance UID.

    Of several with the same UID the one is taken whose transfer syntax is the rarest among those
    taken so far, so that every syntax of the wheel is there.
    """
    groups: dict[str, list[tuple[str, Path]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(Path(pydicom.data.__file__).parent.rglob("*")):
            if path.is_file() and not any(name in path.name for name in _UNFIT):
                try:
                    syntax, _, _, row = read_header(path)
                except NotIndexedError:
                    continue
                groups.setdefault(row[SOP_INSTANCE], []).append((syntax, path))
    taken: Counter[str] = Counter()
    files = []
    for candidates in sorted(groups.values(), key=lambda group: (len({syntax for syntax, _ in group}), group[0][1])):
        syntax, path = min(candidates, key=lambda candidate: (taken[candidate[0]], candidate[1]))
        taken[syntax] += 1
        files.append(path)
    return sorted(files)


def set_elements(part10: bytes, values: Mapping[int, str]) -> bytes:
    """The file with the values of some top-level text elements set, all other bytes as they were.

    An element that is missing is put in its place; group lengths are kept right. A deflated data
    set is inflated and deflated again around the change.
    """
    with BytesIO(part10) as file:
        syntax, offset = read_meta(file)
    head, body = part10[:offset], part10[offset:]
    if syntax == DEFLATED:
        body = zlib.decompress(body, -zlib.MAX_WBITS)
    for tag in sorted(values):
        body = _set_element(body, syntax, tag, values[tag])
    if syntax == DEFLATED:
        body = _deflate(body)
    return head + body


def _set_element(body: bytes, syntax: str, tag: int, text: str) -> bytes:
    implicit, order = syntax == IMPLICIT_LITTLE, ">" if syntax == EXPLICIT_BIG else "<"
    value = text.encode("ascii")
    value += (b"\0" if vr_of(tag) == "UI" else b" ") * (len(value) & 1)
    start, at, end = _locate(body, syntax, tag)
    if implicit:
        header = struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value))
    elif at - start == 12:
        # The element is there, with a VR of the long form (UN): it keeps it.
        header = body[start : start + 8] + struct.pack(order + "I", len(value))
    else:
        header = struct.pack(order + "HH2sH", tag >> 16, tag & 0xFFFF, vr_of(tag).encode(), len(value))
    changed = bytearray(body[:start] + header + value + body[end:])
    _, group_length, group_end = _locate(body, syntax, tag & 0xFFFF0000)
    if group_length < group_end:
        (length,) = struct.unpack_from(order + "I", body, group_length)
        struct.pack_into(order + "I", changed, group_length, length + len(header) + len(value) - (end - start))
    return bytes(changed)


def _locate(body: bytes, syntax: str, tag: int) -> tuple[int, int, int]:
    """Where the element, its value and its end lie; three times the place where it belongs, if it is missing."""
    # Data that was inflated is explicit little endian, as is what stands around the fragments of compressed pixels.
    plain = syntax if syntax in (IMPLICIT_LITTLE, EXPLICIT_BIG) else EXPLICIT_LITTLE
    head = part10_header(CT, "1", plain)
    with warnings.catch_warnings(), BytesIO(head + body) as file:
        warnings.simplefilter("ignore")
        # Reading ends in front of the first element that the condition holds for.
        read_partial(file, lambda found, vr, length: int(found) >= tag)
        start = file.tell() - len(head)
    order = ">" if plain == EXPLICIT_BIG else "<"
    if len(body) - start < 8 or struct.unpack_from(order + "HH", body, start) != (tag >> 16, tag & 0xFFFF):
        return start, start, start
    if plain == IMPLICIT_LITTLE:
        value, form = start + 8, "<I"
    elif body[start + 4 : start + 6].decode("latin-1") in LONG_VRS:
        value, form = start + 12, order + "I"
    else:
        value, form = start + 8, order + "H"
    (length,) = struct.unpack_from(form, body, value - struct.calcsize(form))
    return start, value, value + length


def mixed_study(folder: Path) -> str:
    """All usable real files as one study of one patient, in ``folder``; returns its Study Instance UID.

    Study Instance UID, Patient ID and Study Date are set by `set_elements`. The series and the SOP
    Instance UIDs are those of the files.
    """
    study = make_uid("mixed study")
    folder.mkdir(parents=True, exist_ok=True)
    for path in usable_pydicom_files():
        part10 = set_elements(path.read_bytes(), {PATIENT_ID: "MIXED", STUDY_UID: study, _STUDY_DATE: STUDY_DATE})
        (folder / path.name).write_bytes(part10)
    return study


# --- made-up studies ---------------------------------------------------------------------------------


def write_demo_data(folder: str | Path) -> int:
    """Fill a folder for the demo; returns the number of files.

    The usable files of pydicom's wheel, a CT study of four series (`ct_study`) and a study with a
    private SOP class (`private_study`). On `STUDY_DATE` there are these two and five real ones.
    """
    folder = Path(folder)
    real = folder / "pydicom"
    real.mkdir(parents=True, exist_ok=True)
    files = usable_pydicom_files()
    studies = {read_header(path)[3][STUDY_UID] for path in files if path.name.startswith(_DEMO_FILES)}
    for path in files:
        part10 = path.read_bytes()
        if read_header(path)[3][STUDY_UID] in studies:
            part10 = set_elements(part10, {_STUDY_DATE: STUDY_DATE})
        (real / path.name).write_bytes(part10)
    ct_study(folder / "ct")
    private_study(folder / "private")
    return sum(1 for path in folder.rglob("*") if path.is_file())


def ct_study(folder: Path) -> str:
    """A CT study of 40 images in four series: 512 x 512, 16 bit, in three transfer syntaxes, about 8 MB."""
    study = make_uid("demo CT study")
    series = (
        ("Localizer", 2, EXPLICIT_LITTLE),
        ("Axial soft tissue", 12, EXPLICIT_LITTLE),
        ("Axial lung", 14, RLE),
        ("Coronal", 12, DEFLATED),
    )
    for number, (description, images, syntax) in enumerate(series, 1):
        for image in range(1, images + 1):
            values = _ct_values(f"demo CT {number}", study, number, image, _ROWS, _COLUMNS)
            values |= {0x00081030: "CT thorax", 0x0008103E: description}
            pixels = _phantom(number, image)
            _write(folder / f"series-{number}" / f"{image:04}.dcm", values, pixels, syntax)
    return study


def private_study(folder: Path) -> str:
    """Ten small CT images, one instance of a private SOP class and one structured report: 12 instances."""
    study = make_uid("private study")
    for image in range(1, 11):
        values = _ct_values("private study CT", study, 1, image, 64, 64)
        _write(folder / f"ct-{image:04}.dcm", values, bytes(64 * 64 * 2), EXPLICIT_LITTLE)
    for number, (name, sop_class, modality) in enumerate((("raw", PRIVATE_CLASS, "OT"), ("sr", ENHANCED_SR, "SR")), 2):
        values = _general(f"private study {name}", study, number, 1, sop_class, modality)
        if modality == "SR":
            values |= {
                0x0040A040: "CONTAINER",
                0x0040A050: "SEPARATE",
                0x0040A491: "COMPLETE",
                0x0040A493: "UNVERIFIED",
            }
        _write(folder / f"{name}.dcm", values, None, EXPLICIT_LITTLE)
    return study


def big_study(folder: Path, n: int, size: int, *, name: str = "big", series: int = 1) -> str:
    """A study of ``n`` CT-like instances with ``size`` bytes of pixel data each, dealt out to ``series`` series.

    Every instance has other bytes. Memory stays small whatever the size.
    """
    study = make_uid(f"{name} study")
    columns = 512 if size >= 512 * 1024 else 64
    rows = max(1, min(size // (2 * columns), 65534))
    noise = hashlib.shake_256(name.encode()).digest(1 << 20)
    size += size & 1
    for image in range(1, n + 1):
        number = (image - 1) % series + 1
        values = _ct_values(f"{name} {number}", study, number, image, rows, columns)
        start = image * 4099 % len(noise)
        _write(folder / f"{image:06}.dcm", values, (_repeated(noise, start, size), size), EXPLICIT_LITTLE)
    return study


def _repeated(block: bytes, start: int, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = block[start : start + size]
        yield piece
        size -= len(piece)
        start = 0


def _general(name: str, study: str, series: int, number: int, sop_class: str, modality: str) -> Row:
    return {
        SOP_CLASS: sop_class,
        SOP_INSTANCE: make_uid(f"{name} {series} {number}"),
        _STUDY_DATE: STUDY_DATE,
        0x00080030: "083000",
        0x00080050: "A" + study[-8:],
        0x00080060: modality,
        0x00080070: "airflow-dicom-get",
        0x00080090: "",
        0x0008103E: name,
        0x00100010: "Doe^Demo",
        PATIENT_ID: "DEMO-1",
        0x00100030: "19700101",
        0x00100040: "O",
        STUDY_UID: study,
        SERIES_UID: make_uid(f"{name} {series} series"),
        0x00200010: "1",
        0x00200011: str(series),
        0x00200013: str(number),
    }


def _ct_values(name: str, study: str, series: int, number: int, rows: int, columns: int) -> Row:
    return _general(name, study, series, number, CT, "CT") | {
        0x00080008: "ORIGINAL\\PRIMARY\\AXIAL",
        0x00180050: "5",
        0x00180060: "120",
        0x00200012: "1",
        0x00200032: f"-250\\-250\\{5 * number}",
        0x00200037: "1\\0\\0\\0\\1\\0",
        0x00200052: make_uid(f"{study} frame of reference"),
        0x00201040: "",
        0x00280002: "1",
        0x00280004: "MONOCHROME2",
        0x00280010: str(rows),
        0x00280011: str(columns),
        0x00280030: "0.9765625\\0.9765625",
        0x00280100: "16",
        0x00280101: "16",
        0x00280102: "15",
        0x00280103: "0",
        0x00281052: "-1024",
        0x00281053: "1",
    }


def _write(path: Path, values: Row, pixels: bytes | tuple[Iterable[bytes], int] | None, syntax: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = identifier(values, implicit_vr=False)
    pieces: Iterable[bytes] = ()
    if isinstance(pixels, tuple):
        pieces, size = pixels
        body += _pixel_head(size)
    elif pixels is not None and syntax == RLE:
        body += _rle_pixel_data(pixels)
    elif pixels is not None:
        body += _pixel_head(len(pixels)) + pixels
    if syntax == DEFLATED:
        body = _deflate(body)
    with path.open("wb") as file:
        file.write(part10_header(values[SOP_CLASS], values[SOP_INSTANCE], syntax) + body)
        file.writelines(pieces)


def _pixel_head(size: int) -> bytes:
    return struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, size)


def _deflate(body: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = squeeze.compress(body) + squeeze.flush()
    return deflated + b"\0" * (len(deflated) & 1)


def _phantom(series: int, image: int) -> bytes:
    """A trunk of plain shapes: body, two lungs, spine, and a nodule that wanders from slice to slice."""
    shapes = [
        (256, 256, 210, 150, 1060),
        (170, 240, 70, 95, 200 + 20 * series),
        (342, 240, 70, 95, 200 + 20 * series),
        (256, 350, 28, 28, 1700),
        (150 + 4 * image, 220 + 2 * image, 9, 9, 1100 + image),
    ]
    rows = []
    for y in range(_ROWS):
        row = [0] * _COLUMNS
        for centre_x, centre_y, radius_x, radius_y, value in shapes:
            inside = 1 - ((y - centre_y) / radius_y) ** 2
            if inside > 0:
                half = int(radius_x * inside**0.5)
                row[centre_x - half : centre_x + half] = [value] * (2 * half)
        rows.append(struct.pack(f"<{_COLUMNS}H", *row))
    return b"".join(rows)


def _rle_pixel_data(pixels: bytes) -> bytes:
    """One frame of 16 bit in RLE (PS3.5 Annex G): the high bytes, then the low bytes, row by row."""
    segments = []
    for plane in (1, 0):
        rows = (pixels[start + plane : start + 2 * _COLUMNS : 2] for start in range(0, len(pixels), 2 * _COLUMNS))
        segment = b"".join(map(_pack_bits, rows))
        segments.append(segment + b"\0" * (len(segment) & 1))
    offsets = [64, 64 + len(segments[0]), *[0] * 13]
    frame = struct.pack("<16I", len(segments), *offsets) + b"".join(segments)
    item, end = struct.pack("<HHI", 0xFFFE, 0xE000, 0), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    head = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    return head + item + struct.pack("<HHI", 0xFFFE, 0xE000, len(frame)) + frame + end


def _pack_bits(row: bytes) -> bytes:
    # Replicate runs alone: the phantom has hardly anything else.
    packed = bytearray()
    at = 0
    while at < len(row):
        rest = row[at : at + 128]
        run = len(rest) - len(rest.lstrip(rest[:1]))
        packed += bytes((257 - run, rest[0])) if run > 1 else bytes((0, rest[0]))
        at += run
    return bytes(packed)
