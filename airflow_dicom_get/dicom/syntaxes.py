"""Transfer syntaxes per family of SOP classes, and the classes that a modality may have.

The order within a family is the order of proposal: explicit VR little endian first, compressed
syntaxes next, deflated and big endian last. It is exact on Orthanc, dcm4chee and pynetdicom; DCMTK's
dcmqrscp takes the first accepted context of a class and converts uncompressed data into it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"

_COMPRESSED = tuple(
    "1.2.840.10008.1.2." + tail
    for tail in ("4.70", "4.90", "4.91", "4.50", "4.51", "4.57", "4.80", "4.81", "5", "4.201", "4.202", "4.203")
)
_VIDEO = tuple(
    "1.2.840.10008.1.2.4." + tail
    for tail in (
        "100", "101", "102", "103", "104", "105", "106", "107", "108",
        "100.1", "101.1", "102.1", "103.1", "104.1", "105.1", "106.1",
    )
)  # fmt: skip

UNCOMPRESSED = frozenset({EXPLICIT_LE, IMPLICIT_LE, DEFLATED_LE, EXPLICIT_BE})
"""Encodings between which some sources convert at will."""

LOSSY = frozenset(
    "1.2.840.10008.1.2.4." + tail
    for tail in ("50", "51", "81", "91", "93", "203", "112", *(t.removeprefix("1.2.840.10008.1.2.4.") for t in _VIDEO))
)

_DOCUMENT_FAMILY = (EXPLICIT_LE, IMPLICIT_LE, DEFLATED_LE, EXPLICIT_BE)
_IMAGE_FAMILY = (EXPLICIT_LE, IMPLICIT_LE, *_COMPRESSED, DEFLATED_LE, EXPLICIT_BE)
_VIDEO_FAMILY = (EXPLICIT_LE, IMPLICIT_LE, *_COMPRESSED, *_VIDEO, DEFLATED_LE, EXPLICIT_BE)

_ROOT = "1.2.840.10008.5.1.4.1.1."
_DOCUMENT_STEMS = tuple(
    _ROOT + stem + "."
    for stem in (
        "8",
        "9",
        "10",
        "11",
        "66.1",
        "66.2",
        "66.3",
        "66.5",
        "66.6",
        "67",
        "68",
        "77.1.5.3",
        "78",
        "79",
        "80",
        "88",
        "90",
        "91",
        "104",
        "129",
        "131",
        "200",
        "201",
        "481.3",
        "481.4",
        "481.5",
        "481.6",
        "481.7",
        "481.8",
        "481.9",
        "481.10",
        "481.11",
        "481.12",
        "481.13",
        "481.14",
        "481.15",
        "481.16",
        "481.17",
        "481.18",
        "481.19",
        "481.20",
        "481.21",
        "481.22",
        "481.25",
    )
)
_DOCUMENT_ROOTS = tuple(f"1.2.840.10008.5.1.4.{tail}." for tail in ("34", "38", "39", "43", "44", "45"))
_VIDEO_CLASSES = frozenset(
    _ROOT + tail
    for tail in (
        "3", "3.1", "7.4", "12.1", "12.1.1", "12.2", "12.2.1", "77.1.1", "77.1.1.1", "77.1.2", "77.1.2.1", "77.1.4",
        "77.1.4.1",
    )
)  # fmt: skip


@lru_cache(maxsize=1024)
def candidates(sop_class: str) -> tuple[str, ...]:
    """Every transfer syntax that an instance of ``sop_class`` may be stored in, in order of proposal.

    A class that is not known, a private one among them, gets those of an image.
    """
    if sop_class in _VIDEO_CLASSES:
        return _VIDEO_FAMILY
    if (sop_class + ".").startswith((*_DOCUMENT_STEMS, *_DOCUMENT_ROOTS)):
        return _DOCUMENT_FAMILY
    return _IMAGE_FAMILY


_BY_MODALITY = {
    "CT": ("2", "2.1", "2.2"),
    "MR": ("4", "4.1", "4.2", "4.3", "4.4"),
    "US": ("6.1", "3.1", "6", "3", "6.2"),
    "IVUS": ("3.1", "6.1"),
    "CR": ("1",),
    "DX": ("1.1", "1.1.1", "1"),
    "MG": ("1.2", "1.2.1", "13.1.3", "13.1.4", "13.1.5", "1"),
    "IO": ("1.3", "1.3.1"),
    "PX": ("1.3", "1.1", "1"),
    "PT": ("128", "130", "128.1"),
    "NM": ("20", "5"),
    "XA": ("12.1", "12.1.1", "13.1.1", "13.1.2", "12.3"),
    "RF": ("12.2", "12.2.1", "12.1"),
    "SR": ("88.11", "88.22", "88.33", "88.34", "88.35", "88.67", "88.50", "88.65", "88.59", "88.40", "88.68", "88.71"),
    "KO": ("88.59",),
    "PR": ("11.1", "11.2", "11.3", "11.4", "11.5", "11.8"),
    "SEG": ("66.4", "66.5"),
    "REG": ("66.1", "66.3"),
    "FID": ("66.2",),
    "RWV": ("67",),
    "RTIMAGE": ("481.1",),
    "RTDOSE": ("481.2",),
    "RTSTRUCT": ("481.3",),
    "RTPLAN": ("481.5", "481.8"),
    "RTRECORD": ("481.4", "481.6", "481.7", "481.9"),
    "ECG": ("9.1.1", "9.1.2", "9.1.3", "9.1.4"),
    "HD": ("9.2.1",),
    "EPS": ("9.3.1",),
    "AU": ("9.4.1", "9.4.2"),
    "DOC": ("104.1", "104.2"),
    "M3D": ("104.3", "104.4", "104.5"),
    "ES": ("77.1.1", "77.1.1.1"),
    "GM": ("77.1.2", "77.1.2.1"),
    "SM": ("77.1.6", "77.1.3"),
    "XC": ("77.1.4", "77.1.4.1"),
    "OP": ("77.1.5.1", "77.1.5.2"),
    "OPT": ("77.1.5.4", "77.1.5.8"),
    "OCT": ("14.1", "14.2"),
    "SC": (),
    "OT": (),
}
_COMPANIONS = ("7", "7.1", "7.2", "7.3", "7.4", "66")
"""Secondary captures and raw data come under the modality of whatever made them."""


def classes_of_modality(modality: str | None) -> tuple[str, ...]:
    """The SOP classes that a series of this modality is likely to hold; empty if the modality says nothing."""
    tails = _BY_MODALITY.get(modality or "")
    return () if tails is None else tuple(_ROOT + tail for tail in (*tails, *_COMPANIONS))


_COMMON = ("2", "4", "7", "1", "1.1", "6.1", "3.1", "128", "88.33", "11.1", "88.59", "88.22", "88.11", "12.1", "20")


@lru_cache(maxsize=1)
def all_storage_classes() -> tuple[str, ...]:
    """Every storage class known to the dictionary, the common ones first, then those of a modality."""
    from pydicom._uid_dict import UID_dictionary

    known = [
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and uid.startswith("1.2.840.10008.5.1.4.")
    ]
    first = dict.fromkeys(_ROOT + tail for tail in (*_COMMON, *chain.from_iterable(_BY_MODALITY.values())))
    return (*first, *(uid for uid in known if uid not in first))
