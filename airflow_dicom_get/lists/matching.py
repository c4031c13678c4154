"""Whether a row of a C-FIND answer is one that was asked for (PS3.4 C.2.2.2).

A PACS may match by prefix, fold case, or ignore a key and answer with all that it holds. Every row of every search
is compared here with the keys that were sent, so that what a PACS answers too much is never taken for the scope.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from airflow_dicom_get.dicom.dictionary import UnknownAttributeError, find_attribute
from airflow_dicom_get.dicom.header import SPECIFIC_CHARACTER_SET
from airflow_dicom_get.dicom.levels import LEVELS, level_of
from airflow_dicom_get.dicom.values import decode_text
from airflow_dicom_get.errors import InvalidQuery

Row = dict[int, bytes]

_EXACT = frozenset({"AccessionNumber", "PatientID", "Modality", "ModalitiesInStudy"})
"""Compared byte for byte, beside UIDs, dates and times: what tells one patient's study from another's."""
_FOLDED_VRS = frozenset({"AE", "CS", "IS", "LO", "SH"})
"""Compared without regard to case: of other keys many a PACS folds it. Names have a rule of their own
(:func:`_may_be_named`); other VRs are not compared at all."""
_PADDING = "\0 "
_BETWEEN_WORDS = re.compile(r"[\s^=.,'’-]+")
LONGEST_ID = 64
"""Characters of an ID (PS3.5 6.2, LO)."""
_LONGEST_NAME = 1024
"""Characters of a name that are compared: more than its three groups have (PS3.5 6.2, PN: 64 each)."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Why a row is not one that was asked for."""

    keyword: str
    level: str
    has_value: bool
    """Whether the row holds a value for the key; without one the PACS may not know the key."""
    spelling: str = ""
    """How the PACS writes the value, where case or leading zeros alone differ; never the value itself."""


class Matcher:
    """The keys of one C-FIND, to compare its rows with.

    Parameters
    ----------
    level : str
        Query/Retrieve Level of the C-FIND.
    keys : mapping
        Tags to the values that were sent; an empty one, or ``*``, matches everything.
    told : collection of int
        Tags of which the peer has told the value itself, for this study: a row need not tell it again.
    """

    def __init__(self, level: str, keys: Mapping[int, str | Iterable[str]], told: Collection[int] = ()) -> None:
        self._tests: list[_Test] = []
        for tag, value in keys.items():
            wanted = tuple(value.split("\\") if isinstance(value, str) else value)
            if any(text.strip("*") for text in wanted) and (attribute := _attribute(tag)):
                self._tests.append(_Test(tag, *attribute, wanted, level))
                self._tests[-1].needed &= tag not in told

    def contradiction(self, row: Row) -> Contradiction | None:
        """What a row contradicts: first a key for which it has another value, then one for which it has none."""
        absent = None
        for test in self._tests:
            if (found := test.contradiction(row)) is not None:
                if found.has_value:
                    return found
                absent = absent or found
        return absent


@lru_cache(maxsize=1024)
def _attribute(tag: int) -> tuple[str, str] | None:
    """Keyword and VR; None for what is no matching key of the standard."""
    try:
        attribute = find_attribute(f"{tag:08x}")
    except UnknownAttributeError:
        return None
    if attribute.keyword in ("QueryRetrieveLevel", "SpecificCharacterSet"):
        return None
    return attribute.keyword, attribute.vr


class _Test:
    """One key."""

    __slots__ = ("_exact", "_keyword", "_level", "_names", "_tag", "_uids", "_vr", "_wanted", "needed")

    def __init__(self, tag: int, keyword: str, vr: str, wanted: tuple[str, ...], level: str) -> None:
        self._tag, self._keyword, self._vr, self._wanted, self._level = tag, keyword, vr, wanted, level
        self._uids = frozenset(text.encode() + end for text in wanted for end in (b"", b"\0")) if vr == "UI" else None
        self._names = [_words(text) for text in wanted] if vr == "PN" else []
        self._exact = keyword in _EXACT
        # Below the level of a key its absence says nothing. Above it a PACS that leaves it out has not matched on it.
        self.needed = LEVELS.index(level) <= LEVELS.index(level_of(keyword))

    def contradiction(self, row: Row) -> Contradiction | None:
        raw = row.get(self._tag)
        if raw is None:
            return Contradiction(self._keyword, self._level, False) if self.needed else None
        if self._uids is not None and (raw in self._uids or raw.strip(b"\0 ") in self._uids):
            return None
        if not raw.strip(b"\0 "):
            compared = self._exact or self._vr in ("UI", "DA", "PN") or self._vr in _FOLDED_VRS
            return Contradiction(self._keyword, self._level, False) if self.needed and compared else None
        values = values_of(raw, row.get(SPECIFIC_CHARACTER_SET, b""), self._vr)
        if any(map(self._fits, values)):
            return None
        return Contradiction(self._keyword, self._level, True, self._spelling(values))

    def _fits(self, have: str) -> bool:
        if self._vr == "UI":
            return have in self._wanted
        if self._vr == "DA":
            return any(_in_range(have.replace(".", ""), wanted) for wanted in self._wanted)
        if self._vr == "TM":
            return any(_in_time(have, wanted) for wanted in self._wanted)
        if self._exact:
            return any(_like(have, wanted) for wanted in self._wanted)
        if self._vr == "PN":
            words = _words(have)
            return any(_may_be_named(words, asked) for asked in self._names)
        if self._vr == "IS":
            return any(have.lstrip("+0") == wanted.lstrip("+0") for wanted in self._wanted)
        if self._vr in _FOLDED_VRS:
            return any(_like(have.casefold(), wanted.casefold()) for wanted in self._wanted)
        return True

    def _spelling(self, values: Iterable[str]) -> str:
        if not self._exact:
            return ""
        for have in values:
            if len(have) > LONGEST_ID:  # and so of any number of zeros, each a remark of its own
                continue
            for wanted in self._wanted:
                zeros = have[: len(have) - len(have.lstrip("0"))], wanted[: len(wanted) - len(wanted.lstrip("0"))]
                ways = []
                if _like(have.casefold(), wanted.casefold()):
                    ways = [_case(have)]
                elif _like(have.lstrip("0").casefold(), wanted.lstrip("0").casefold()):
                    ways = [f"with {len(zeros[0])} leading zeros, not {len(zeros[1])}"]
                    if not _like(have.lstrip("0"), wanted.lstrip("0")):
                        ways.append(_case(have))
                if ways:
                    return " and ".join(ways)
        return ""


def _case(text: str) -> str:
    return "in upper case" if text.isupper() else "in lower case" if text.islower() else "in upper and lower case"


def _like(have: str, wanted: str) -> bool:
    """Wild card matching (PS3.4 C.2.2.2.4): ``*`` and ``?`` alone are special."""
    return have == wanted or (("*" in wanted or "?" in wanted) and fnmatchcase(have, wanted.replace("[", "[[]")))


def _may_be_named(words: list[str], asked: list[str]) -> bool:
    """Whether a name is not certainly another than the one that was asked for.

    A PACS may take names as prefixes, in any case, without accents, or in another order of their words (PS3.4
    C.2.2.2.1 leaves it free). So each word that was asked for has to begin a word that is there, or the other way
    round; a word says nothing of words in another writing.
    """
    for one in asked:
        others = [word for word in words if word.isascii() == one.isascii()]
        if others and not any(_like(word, f"{one}*") or one.startswith(word) for word in others):
            return False
    return True


def _words(name: str) -> list[str]:
    """The words of a name, of all its components and groups, without case, accents and how an umlaut is written."""
    folded = name[:_LONGEST_NAME].casefold()
    plain = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
    for vowel in "aou":
        plain = plain.replace(f"{vowel}e", vowel)
    plain = plain.replace("ss", "s")
    return [word for word in _BETWEEN_WORDS.split(plain) if word.strip("*?")]


def _in_range(day: str, wanted: str) -> bool:
    low, dash, high = wanted.partition("-")
    if not dash:
        return day == wanted
    return len(day) == 8 and (not low or day >= low) and (not high or day <= high)


def _in_time(have: str, wanted: str) -> bool:
    """Whether a time, which may name an hour or a minute alone, can lie in a range (PS3.4 C.2.2.2.5.2)."""
    low, dash, high = (_digits(text) for text in wanted.partition("-"))
    moment, high = _digits(have), high if dash else low
    if not all(text.isascii() and text.isdigit() for text in (moment, f"{low}{high}")):
        return True  # no time at all, or a wild card: nothing to go by
    return moment.ljust(12, "9") >= low.ljust(12, "0") and moment.ljust(12, "0") <= high.ljust(12, "9")


def _digits(time: str) -> str:
    return time.replace(":", "").replace(".", "")


def _readings(raw: bytes, character_set: bytes, vr: str) -> list[str]:
    """What a value may say: one text, decoded by the row's character set; without one, two that it may be in."""
    if not raw.isascii() and not character_set.strip(b"\0 "):
        try:
            return [raw.decode("utf-8"), raw.decode("latin-1")]
        except UnicodeDecodeError:
            pass
    return [decode_text(raw, vr, character_set)]


def values_of(raw: bytes, character_set: bytes, vr: str) -> list[str]:
    """What the values of an element may say, without their padding."""
    return [part.strip(_PADDING) for text in _readings(raw, character_set, vr) for part in text.split("\\")]


def same_text(one: bytes, character_set: bytes, other: bytes, other_set: bytes) -> bool:
    """Whether two values of VR LO without their padding say the same, each in its own Specific Character Set."""
    if one.isascii() and other.isascii():
        return one == other
    return not set(_readings(one, character_set, "LO")).isdisjoint(_readings(other, other_set, "LO"))


@dataclass(slots=True)
class Dropped:
    """Rows that were left out because they contradict what was asked for, by key."""

    rows: Counter[str] = field(default_factory=Counter)
    valued: Counter[str] = field(default_factory=Counter)
    """Of these: rows that hold a value for the key."""
    spellings: Counter[tuple[str, str]] = field(default_factory=Counter)
    levels: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def total(self) -> int:
        """How many rows."""
        return self.rows.total()

    def add(self, why: Contradiction, row: Row) -> None:
        """Count a row."""
        self.rows[why.keyword] += 1
        self.valued[why.keyword] += why.has_value
        self.levels[why.keyword] = why.level
        if why.spelling:
            self.spellings[why.keyword, why.spelling] += 1

    def update(self, other: Dropped) -> None:
        """Add the rows of another."""
        self.rows += other.rows
        self.valued += other.valued
        self.spellings += other.spellings
        self.levels |= other.levels

    def unsupported(self) -> InvalidQuery | None:
        """The error for a key that no row holds a value for; for where no row is left."""
        for keyword, count in self.rows.items():
            if not self.valued[keyword]:
                level = self.levels[keyword]
                below = level_of(keyword) if LEVELS.index(level_of(keyword)) > LEVELS.index(level) else ""
                return InvalidQuery(
                    f"The PACS does not support the key {keyword} at {level} level: none of the {count} rows that it "
                    "returned has a value for it.",
                    hint=f"Query at {below} level." if below else "Omit this key, or use another one.",
                    key=keyword,
                )
        return None

    def remarks(self) -> list[dict[str, Any]]:
        """What is to be said, as ``Result.errors`` has it: keys by name, never a value."""
        said: list[dict[str, Any]] = []
        for keyword, count in self.rows.items():
            alike = {how: n for (key, how), n in self.spellings.items() if key == keyword}
            for how, n in alike.items():
                said.append(
                    {
                        "error": f"A C-FIND row was ignored: the PACS writes its {keyword} {how}.",
                        "count": n,
                        "hint": "If this is the study that you mean, give the value as the PACS writes it.",
                    }
                )
            if count > sum(alike.values()):
                said.append(
                    {
                        "error": f"A C-FIND row was ignored: its {keyword} does not match the query.",
                        "count": count - sum(alike.values()),
                        "hint": "The PACS returns more than was asked for; its admin can say how it matches this key.",
                    }
                )
        return said


def remark_text(remark: Mapping[str, Any]) -> str:
    """A remark as one line, with how often it applies."""
    times = f"{remark['count']} × " if remark["count"] != 1 else ""
    return f"{times}{remark['error']} {remark['hint']}".rstrip()
