"""DICOM keywords and tags as users write them: ``PatientID``, ``(0010,0020)`` or ``00100020``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"\(([0-9a-f]{4}),\s*([0-9a-f]{4})\)|([0-9a-f]{4}),?([0-9a-f]{4})", re.IGNORECASE)

_WORD = re.compile(rf"[a-z]+|{_TAG.pattern}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of the data dictionary (PS3.6)."""

    tag: int
    keyword: str
    vr: str

    @property
    def group(self) -> int:
        return self.tag >> 16


_AT_HAND = (
    Attribute(0x00080005, "SpecificCharacterSet", "CS"),
    Attribute(0x00080018, "SOPInstanceUID", "UI"),
    Attribute(0x00080052, "QueryRetrieveLevel", "CS"),
    Attribute(0x00100020, "PatientID", "LO"),
    Attribute(0x0020000D, "StudyInstanceUID", "UI"),
    Attribute(0x0020000E, "SeriesInstanceUID", "UI"),
)
"""What most queries consist of: pydicom's dictionary, which has them too, takes 0.2 s to import."""
_BY_NAME = {name: attribute for attribute in _AT_HAND for name in (attribute.keyword, f"{attribute.tag:08x}")}


_OF_PATIENTS = frozenset({0x0010, 0x0038})
"""Groups of a patient and of his visits."""
_NUMBERS = frozenset({0x00080050, 0x00200010, 0x00402016, 0x00402017})
"""By which a hospital finds a patient too: Accession Number, Study ID, and the numbers of an order."""


class UnknownAttributeError(ValueError):
    """A text that names no attribute; ``hint`` says what may have been meant."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def find_attribute(text: str) -> Attribute:
    """Find an attribute by keyword or tag.

    Raises
    ------
    UnknownAttributeError
        No such keyword, a private tag, or a tag that the dictionary does not hold.
    """
    name = text.strip()
    if (known := _BY_NAME.get(name)) is not None:
        return known
    from pydicom.datadict import dictionary_keyword, dictionary_VR, tag_for_keyword

    if match := _TAG.fullmatch(name):
        tag = int((match[1] or match[3]) + (match[2] or match[4]), 16)
        if (tag >> 16) & 1:
            raise UnknownAttributeError("is a private tag", "Give an attribute of the DICOM standard.")
    else:
        found = tag_for_keyword(name) if name else None
        if found is None:
            raise UnknownAttributeError("is not a DICOM keyword", _suggestion(name))
        tag = int(found)
    try:
        attribute: Attribute | None = Attribute(tag, dictionary_keyword(tag), dictionary_VR(tag))
    except KeyError:
        attribute = None
    # Some retired attributes have no keyword.
    if attribute is None or not attribute.keyword:
        raise UnknownAttributeError("is not a tag of the standard", "Give a keyword such as StudyInstanceUID.")
    return attribute


def key_in(text: str) -> str | None:
    """The keyword or tag that a text begins with; None without one. All else of the text may be of a patient."""
    if (word := _WORD.match(text.strip())) is None:
        return None
    try:
        find_attribute(word[0])
    except UnknownAttributeError:
        return None
    return word[0]


def identifies(heading: str) -> bool:
    """Whether the heading of a column is an attribute that tells who a patient is.

    It may be its keyword, name or tag, in any case, and with any spaces and marks: ``patient_id``, ``Patient's Name``.
    """
    from pydicom.datadict import dictionary_description, dictionary_VR, keyword_dict

    said = _letters(heading)
    return any(
        said in (f"{tag:08x}", keyword.lower(), _letters(dictionary_description(tag)))
        for keyword, tag in keyword_dict.items()
        if tag >> 16 in _OF_PATIENTS or tag in _NUMBERS or dictionary_VR(tag) == "PN"
    )


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    from pydicom.datadict import keyword_dict

    keywords = [keyword for keyword in keyword_dict if keyword]
    folded = {keyword.lower(): keyword for keyword in keywords}
    plain = _letters(name)
    close = [folded[plain]] if plain in folded else get_close_matches(name, keywords, n=1, cutoff=0.75)
    return f"Did you mean {close[0]}?" if close else "Give a keyword such as StudyInstanceUID, or a tag as (gggg,eeee)."
