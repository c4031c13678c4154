"""Lists of studies: in CSV files, by UID or accession number, labelled if asked for; and what a PACS has of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import about, invalid, shown, shown_path
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.dictionary import identifies
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.errors import InvalidOption, InvalidQuery
from airflow_dicom_get.lists.finder import STRANGE, Finder, check_answered
from airflow_dicom_get.lists.matching import Contradiction, Dropped, Row, values_of
from airflow_dicom_get.net.find import FIND_PROPOSALS
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below

if TYPE_CHECKING:
    from airflow_dicom_get.engine.source import Source

UID, ACCESSION = "StudyInstanceUID", "AccessionNumber"
_LARGEST = 64 << 20
"""Bytes of a file: of a million studies."""


@dataclass(frozen=True, slots=True)
class ListedStudy:
    """A study that a file names."""

    line: int
    """Where it stands for the first time."""
    key: str
    """``StudyInstanceUID`` or ``AccessionNumber``, the same for all of a file."""
    value: str
    label: str = ""


@dataclass(slots=True)
class FoundStudies:
    """What a PACS has of one entry of a list."""

    listed: ListedStudy
    uids: tuple[str, ...] = ()
    """Study Instance UIDs; an accession number may stand for several studies."""
    problem: str = ""
    """Why there are none, as the end of "no study …"; empty where there are some."""


@dataclass(slots=True)
class FoundList:
    """What a PACS has of a list."""

    entries: list[FoundStudies]
    remarks: list[dict[str, Any]] = field(default_factory=list)
    """What is to be said of the answers, as in ``Result.errors``; nothing of a patient."""
    doubt: str | None = None
    """Why there may be more studies, as a reason of the vocabulary."""


def find_listed(source: Source, listed: Sequence[ListedStudy], retries: int, max_studies: int) -> FoundList:
    """Find the studies of a list at a PACS, over one association.

    An entry that the PACS does not know, answers with other studies alone, or with more than ``max_studies``, costs
    itself and no other.

    Parameters
    ----------
    retries : int
        New associations in a row that may fail without progress; what was answered is not asked for again.
    max_studies : int
        Studies that an accession number may stand for, as for one that is a query of its own. The list may have any
        number of them.

    Raises
    ------
    InvalidQuery
        The PACS does not support the key by which the list names its studies.
    NotNegotiated, OperationFailed, and whatever ends an association
    """
    return _Search(listed, max_studies).run(source, retries)


class _Search:
    """The search for a list: what was answered so far."""

    def __init__(self, listed: Sequence[ListedStudy], max_studies: int) -> None:
        self._listed, self._max_studies = listed, max_studies
        self._done: dict[ListedStudy, FoundStudies] = {}
        self._dropped = Dropped()
        self._doubt: str | None = None
        self._unsupported: list[InvalidQuery] = []
        self._strangers = _Strangers(frozenset(one.value for one in listed))

    def run(self, source: Source, retries: int) -> FoundList:
        """Ask for all of it."""
        source.with_retries(retries, FIND_PROPOSALS, lambda association: self._ask(Finder(association, source.cuts)))
        if self._unsupported and len(self._unsupported) == len(self._done):
            raise self._unsupported[0]
        return FoundList([self._done[one] for one in self._listed], self._dropped.remarks(), self._doubt)

    def _ask(self, finder: Finder) -> None:
        uids = [one.value for one in self._listed if one.key == UID and one not in self._done]
        if uids:
            known = {i.text_value(row.get(h.STUDY_INSTANCE_UID)) for row, _ in finder.named("STUDY", uids, {}, ())}
            for one in self._listed:
                if one.key == UID:
                    there = one.value in known
                    self._done[one] = FoundStudies(one, (one.value,) if there else (), "" if there else "has this UID")
            if not known:
                check_answered(finder)
            self._dropped.update(finder.dropped)
        for one in self._listed:
            if one not in self._done:
                self._done[one] = self._by_accession(finder, one)

    def _by_accession(self, finder: Finder, one: ListedStudy) -> FoundStudies:
        strangers = self._strangers
        here = strangers.next(one.value)
        uids: dict[str, None] = {}
        unreadable, keys = finder.unreadable, {i.ACCESSION_NUMBER: one.value}
        enough = strangers.are_those_read
        for row, _ in finder.answers("STUDY", keys, (h.STUDY_INSTANCE_UID,), dropped=here, enough=enough):
            uids[shown_uid(row.get(h.STUDY_INSTANCE_UID))] = None
        if enough():
            uids |= dict.fromkeys(strangers.of(one.value))
        else:
            strangers.were_read()
            if finder.cuts.may_be_cut("STUDY", finder.came):
                self._doubt = self._doubt or "list_may_be_cut"
        problem = ""
        if not all(map(is_uid, uids)):
            problem = "with this accession number can be asked for: a Study Instance UID of it is malformed"
            uids = dict.fromkeys(filter(is_uid, uids))
        if finder.unreadable > unreadable:
            self._doubt = "list_contradicted"
        if problem:
            self._doubt = self._doubt or "bad_uid"
        elif not uids:
            problem = "has this accession number"
            try:
                check_answered(finder, here)
            except InvalidQuery as error:
                self._unsupported.append(error)
                problem += f": {error.message}"
            else:
                problem += "".join(f". {remark['error']}" for remark in here.remarks()).rstrip(".")
        self._dropped.update(here)
        if len(uids) > self._max_studies:
            problem = f"is taken of the {len(uids)} that have this accession number: max_studies is {self._max_studies}"
            return FoundStudies(one, (), problem)
        return FoundStudies(one, tuple(uids), "" if uids else problem)


class _Strangers:
    """What a PACS answers that was not asked for, where it ignores the key and sends all that it holds.

    The first such answer that is read to its end has the other entries of the list in it; later ones are cancelled. One
    that breaks off has no say: it is asked for again.
    """

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = wanted
        self._value = ""
        self._came = 0
        self._noted: dict[str, list[str]] = {}
        self._read: dict[str, list[str]] | None = None
        """By accession number, the studies of the entries of the list, as that answer has them."""

    def next(self, value: str) -> Dropped:
        """Where the rows go that contradict the next entry."""
        self._value, self._came, self._noted = value.lstrip("0").casefold(), 0, {}
        return _Noted(self._note)

    def were_read(self) -> None:
        """The answer to this entry was read to its end."""
        if self._read is None and self._came >= STRANGE:
            self._read = self._noted

    def are_those_read(self) -> bool:
        """Whether the answer to this entry is the same as one that was read to its end before."""
        return self._read is not None and self._came >= STRANGE

    def of(self, value: str) -> list[str]:
        """The studies of an entry in that answer, as :func:`shown_uid` shows them."""
        return (self._read or {}).get(value, [])

    def _note(self, row: Row) -> None:
        values = values_of(row.get(i.ACCESSION_NUMBER, b""), row.get(h.SPECIFIC_CHARACTER_SET, b""), "SH")
        # One that has the number in its own was matched by it, loosely: then each entry has an answer of its own.
        self._came += not any(self._value in value.casefold() for value in values)
        if self._read is None:
            for value in self._wanted.intersection(values):
                self._noted.setdefault(value, []).append(shown_uid(row.get(h.STUDY_INSTANCE_UID)))


class _Noted(Dropped):
    """Rows that were left out, each of which is looked at."""

    def __init__(self, note: Callable[[Row], None]) -> None:
        super().__init__()
        self._note = note

    def add(self, why: Contradiction, row: Row) -> None:
        """See :meth:`Dropped.add`."""
        super().add(why, row)
        self._note(row)


def list_within(path: str, folders: Sequence[str], option: str = "csv") -> Below:
    """A file that others may choose, in one of some folders, given by its absolute path.

    Raises
    ------
    InvalidOption
        It lies in none of them.
    """
    for folder in folders:
        with suppress(ValueError):
            return Below(Path(folder)).at(path)
    raise invalid(option, f"{shown_path(path)} lies in none of the folders of lists", "Give a file in one of these.")


def csv_rows(text: str) -> csv.DictReader[str]:
    """The rows of a CSV file; commas, semicolons or tabs, whichever its first line has most of.

    A row ends at a line feed alone (RFC 4180; a text that was read has no carriage returns), never at what else Unicode
    takes for the end of a line, as U+0085: half a remark would be a row of its own, and a study that nobody named.
    """
    head = text.partition("\n")[0]
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), restval="")


def read_study_list(path: str | Below, *, label: str | None = None, option: str = "csv") -> list[ListedStudy]:
    """Read a CSV file with a column ``StudyInstanceUID`` or ``AccessionNumber``; commas, semicolons or tabs.

    Parameters
    ----------
    path : str or Below
        The file, in UTF-8; where others may choose it, as :func:`list_within` gives it: then it has to be a regular
        file, and not behind a link. Of both columns that of the UIDs is taken: a row has a value there, or is blank.
    label : str, optional
        Name of a column that says what each study is to be called, wherever it is named: so not that of the studies,
        and none that is an attribute of a patient. Then every row has to have a label too, and a study that stands
        there twice the same.
    option : str
        What messages call the file.

    Raises
    ------
    InvalidOption
        The file cannot be read, has no such column, lists nothing, or a row is malformed. The message names line and
        column; accession numbers and labels are not shown.
    """
    rows = _Rows(path, option, label)
    found: dict[str, ListedStudy] = {}
    for line, value, name in rows.read():
        before = found.setdefault(value, ListedStudy(line, rows.key, value, name))
        if before.label != name:
            raise rows.bad(line, str(label), f"differs from the label of the same study in line {before.line}")
    if not found:
        raise invalid(option, f"{shown_path(path)} lists no studies", f"Give a value in the column {rows.key}.")
    return list(found.values())


class _Rows:
    """The rows of a file, and what is wrong with them."""

    def __init__(self, path: str | Below, option: str, label: str | None) -> None:
        self._path, self._option = path, option
        text = self._text()
        self._reader = csv_rows(text)
        self._columns = {column.strip(): column for column in self._reader.fieldnames or ()}
        self.key = next((column for column in (UID, ACCESSION) if column in self._columns), "")
        if not self.key:
            raise self._without(f"{UID} or {ACCESSION}")
        if label is not None and label not in self._columns:
            raise self._without(shown(label).strip("'"))
        if label is not None and (label == self.key or identifies(label)):
            what = f"{shown_path(path)}, column {shown(label)}, cannot give the labels: it tells who a patient is"
            raise invalid(option, what, "Labels are shown with the tasks. Name a column of pseudonyms or groups.")
        headings = Counter(column.strip() for column in self._reader.fieldnames or ())
        for name in (self.key, label):
            if name is not None and headings[name] > 1:
                raise invalid(option, f"{shown_path(path)} has two columns {shown(name)}", "Leave one of them.")
        self._label = label

    def _text(self) -> str:
        try:
            if isinstance(self._path, Below):
                content = files.read_whole(self._path, _LARGEST)
            else:
                with Path(self._path).open("rb") as file:  # may be a pipe
                    content = file.read(_LARGEST + 1)
                if len(content) > _LARGEST:
                    raise files.too_large(Path(self._path), _LARGEST)
            return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()
        except OSError as error:
            what, hint = f"cannot be read: {error.strerror}", "Check the path."
        except UnicodeDecodeError:
            what, hint = "is not in UTF-8", "Save it as CSV in UTF-8."
        raise invalid(self._option, f"{shown_path(self._path)} {what}", hint)

    def _without(self, column: str) -> InvalidOption:
        what = f"{shown_path(self._path)} has no column {column}"
        return invalid(self._option, what, "Name it in the header line of the file.")

    def bad(self, line: int, column: str, what: str, hint: str = "") -> InvalidOption:
        """What is wrong with one row."""
        where = f"{shown_path(self._path)}, line {line}, column {column}"
        return invalid(self._option, about(where, what).removesuffix("."), hint or "Correct the line, or remove it.")

    def read(self) -> Iterator[tuple[int, str, str]]:
        """Line, value and label of every row that is not blank."""
        try:
            for row in self._reader:
                yield from self._checked(self._reader.line_num, row)
        except csv.Error:
            where = f"{shown_path(self._path)}, line {self._reader.line_num}"
            raise invalid(self._option, f"{where} is not valid CSV", "Check the quotes of this line.") from None

    def _checked(self, line: int, row: Mapping[str | None, str]) -> Iterator[tuple[int, str, str]]:
        if any(text.strip() for text in row.get(None, ())):
            where = f"{shown_path(self._path)}, line {line}"
            raise invalid(
                self._option, f"{where} has more fields than the first line", "Quote values that contain a comma."
            )
        value = row[self._columns[self.key]].strip()
        label = row[self._columns[self._label]].strip() if self._label is not None else ""
        if not any(text.strip() for name, text in row.items() if name is not None):
            return
        if not value:
            raise self.bad(line, self.key, "is empty")
        if self._label is not None and not label:
            raise self.bad(line, self._label, "is empty")
        if self._label is not None and not label.isprintable():
            raise self.bad(line, self._label, "contains characters that cannot be printed")
        if self.key == UID and not is_uid(value):
            raise self.bad(line, UID, f"{shown(value)} is not a valid UID")
        if self.key == ACCESSION and (not value.isprintable() or any(one in value for one in "*?\\")):
            raise self.bad(line, ACCESSION, "is not an accession number", "Wildcards and backslashes are refused.")
        yield line, value, label
