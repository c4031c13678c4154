"""C-FIND as the engine asks it: rows that are compared with what was asked for, and counted as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import shown_uid
from airflow_dicom_get.dicom.values import decode_text
from airflow_dicom_get.errors import NotNegotiated, OperationFailed, peer_text
from airflow_dicom_get.lists.matching import LONGEST_ID, Dropped, Matcher, Row
from airflow_dicom_get.lists.whole import Cuts
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.find import MAX_ROWS, PATIENT_ROOT_FIND, STUDY_ROOT_FIND, c_find
from airflow_dicom_get.vocabulary import noun

if TYPE_CHECKING:
    from airflow_dicom_get.config.node import Node

log = logging.getLogger(__name__)

Keys = Mapping[int, str | bytes | Iterable[str]]
Answer = tuple[Row, bytearray]

STRANGE = 1000
"""Rows of one answer that contradict the key, after which the peer is taken to ignore it."""
UNIQUE = {"STUDY": h.STUDY_INSTANCE_UID, "SERIES": h.SERIES_INSTANCE_UID, "IMAGE": h.SOP_INSTANCE_UID}
"""The unique key of each level."""
_UIDS = frozenset({h.SOP_CLASS_UID, h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})
_LIST = 100
"""UIDs in one C-FIND."""


class Finder:
    """C-FIND on an open association, in the model that the peer offers: Study Root if it does.

    Parameters
    ----------
    cuts : Cuts, optional
        Told how long each answer was.
    """

    def __init__(self, association: Association, cuts: Cuts | None = None) -> None:
        offered = {proposal.abstract_syntax for proposal in association.accepted.contexts.values()}
        self._association = association
        self._model = next((m for m in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) if m in offered), None)
        self.cuts = cuts if cuts is not None else Cuts()
        self.came = 0
        """Rows of the last answer as they came, those that contradict among them."""
        self.unreadable = 0
        """Rows that could not be read, or had no identifier."""
        self.why_unreadable = ""
        """What is wrong with the last of them."""
        self.dropped = Dropped()
        """Rows that contradict what was asked for, where a call names no other place to count them."""

    @property
    def node(self) -> Node:
        """Whom it asks."""
        return self._association.node

    @property
    def offered(self) -> bool:
        """Whether the peer offers C-FIND at all."""
        return self._model is not None

    @property
    def by_patient(self) -> bool:
        """Whether queries go to Patient Root, where the unique key above the study is the Patient ID."""
        return self._model == PATIENT_ROOT_FIND

    def require_model(self) -> str:
        """UID of the query model to use. Raises :class:`NotNegotiated` where the peer offers none."""
        if self._model is None:
            raise NotNegotiated(
                f"{self.node} does not offer C-FIND.",
                hint="Give Study Instance UIDs: without C-FIND, other keys cannot be resolved.",
                node=str(self.node),
            )
        return self._model

    def abort(self) -> None:
        """Give the association up, which a failed answer has left in no state to be used on."""
        self._association.abort()

    def rows(
        self,
        level: str,
        keys: Keys,
        returned: Iterable[int],
        max_rows: int = MAX_ROWS,
        dropped: Dropped | None = None,
    ) -> Iterator[Row]:
        """The wanted elements of each row of one C-FIND; see :meth:`answers`."""
        for row, _ in self.answers(level, keys, returned, max_rows, dropped):
            yield row

    def answers(
        self,
        level: str,
        keys: Keys,
        returned: Iterable[int],
        max_rows: int = MAX_ROWS,
        dropped: Dropped | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Iterator[Answer]:
        """Each row of one C-FIND that does not contradict ``keys``: its wanted elements, and its bytes.

        Parameters
        ----------
        keys : mapping
            Tags to values; bytes are what the peer has told, sent as it told them, in the Specific Character Set that
            is among them.
        dropped : Dropped, optional
            Takes the rows that contradict; those of the Finder by default.
        enough : callable, optional
            Asked after each row; once it is true, the C-FIND is cancelled.
        """
        model = self.require_model()
        dropped = dropped if dropped is not None else self.dropped
        elements: dict[int, str | bytes | Iterable[str]] = dict.fromkeys(returned, "")
        elements.update(keys)
        elements[i.QUERY_RETRIEVE_LEVEL] = level
        wanted = frozenset(elements) | {h.SPECIFIC_CHARACTER_SET}
        identifier = i.encode_identifier(elements, _UIDS)
        told = [tag for tag, value in keys.items() if isinstance(value, bytes)]
        matcher = Matcher(level, _texts(keys), told)
        self.came = 0
        try:
            for raw in c_find(
                self._association,
                model,
                identifier,
                row_seconds=self._association.deadlines.find_response,
                max_rows=max_rows,
                enough=enough,
            ):
                self.came += 1
                try:
                    row = i.decode_identifier(raw, wanted)
                    _check_patient_id(row)
                except h.HeaderError as error:
                    self.cannot_read(error)
                    continue
                if not row:
                    self.unreadable += 1
                elif (why := matcher.contradiction(row)) is not None:
                    dropped.add(why, row)
                else:
                    yield row, raw
        finally:
            self.cuts.came(level, self.came)

    def count(self, row: Row, tag: int) -> int | None:
        """A count of a row, also where it is written as ``3.0``; one that is no number leaves the row unread."""
        text = i.text_value(row.get(tag))
        try:
            count = float(text or "nan")
        except ValueError:
            self.unreadable += 1
            return None
        return int(count) if i.fits_64_bits(count) else None

    def cannot_read(self, error: h.HeaderError) -> None:
        """Count a row that cannot be read, and say why."""
        self.why_unreadable = peer_text(error, 200)
        if self._association.remarks.is_new("row that cannot be read"):  # of which there may be any number
            log.warning("%s sent a C-FIND row that cannot be read: %s", self.node, self.why_unreadable)
        self.unreadable += 1

    def named(
        self,
        level: str,
        uids: Sequence[str],
        keys: Keys,
        returned: Iterable[int],
        dropped: Dropped | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer]:
        """The rows of named studies, series or instances: by lists, then one by one what these did not bring.

        So an answer that was cut, or a source that takes no lists of UIDs, costs nothing.

        Parameters
        ----------
        enough : callable, optional
            Asked before each C-FIND; once it is true, no more are sent.
        """
        tag = UNIQUE[level]
        dropped = dropped if dropped is not None else self.dropped
        returned = (*returned, tag)
        for start in range(0, len(uids), _LIST):
            if enough():
                return
            part = uids[start : start + _LIST]
            answered: set[str | None] = set()
            try:
                for row, raw in self.answers(level, {**keys, tag: part}, returned, dropped=dropped):
                    answered.add(i.text_value(row.get(tag)))
                    yield row, raw
            except OperationFailed:  # the peer takes no lists, perhaps
                if len(part) == 1:
                    raise
            for uid in part if len(part) > 1 else ():
                if uid not in answered and not enough():
                    yield from self._one(level, uid, keys, returned, dropped)

    def absent(self, studies: Sequence[str], above: Keys) -> list[str]:
        """Those of some named studies that the peer does not list, whatever else is asked of them.

        Of one whose C-FIND by its UID alone fails for good, nobody can say that it is not there.

        Parameters
        ----------
        above : mapping
            The unique keys above the level.
        """
        try:
            rows = self.named("STUDY", studies, above, (), Dropped())
            there = {shown_uid(row.get(h.STUDY_INSTANCE_UID)) for row, _ in rows}
        except OperationFailed as error:
            if error.transient:
                raise
            if len(studies) > 1:
                return [uid for study in studies for uid in self.absent([study], above)]
            log.info("%s Nothing is said of a study that is named and not listed.", error.message)
            return []
        return [study for study in studies if study not in there]

    def _one(self, level: str, uid: str, keys: Keys, returned: Iterable[int], dropped: Dropped) -> Iterator[Answer]:
        before = dropped.total
        yield from self.answers(
            level,
            {**keys, UNIQUE[level]: uid},
            returned,
            dropped=dropped,
            enough=lambda: dropped.total - before >= STRANGE,
        )


def _check_patient_id(row: Row) -> None:
    """Refuse a Patient ID that is longer than any, in any encoding: it is kept for each study, and never cut."""
    if len(row.get(h.PATIENT_ID, b"").strip(b"\0 ")) > 4 * LONGEST_ID:
        raise h.HeaderError(f"its Patient ID has more than {4 * LONGEST_ID} bytes")


def _texts(keys: Keys) -> dict[int, str | Iterable[str]]:
    """Keys as they are compared with the rows."""
    character_set = keys.get(h.SPECIFIC_CHARACTER_SET, b"")
    encoding = character_set if isinstance(character_set, bytes) else b""
    return {
        tag: decode_text(value, "LO", encoding) if isinstance(value, bytes) else value for tag, value in keys.items()
    }


def check_answered(finder: Finder, dropped: Dropped | None = None) -> None:
    """Say why a search has found nothing, where the peer's answers are to blame.

    Raises
    ------
    InvalidQuery
        The peer leaves a key out of all its answers.
    OperationFailed
        It sent rows that cannot be read.
    """
    unsupported = (finder.dropped if dropped is None else dropped).unsupported()
    if unsupported is not None:
        raise unsupported
    if finder.unreadable:
        raise OperationFailed(
            f"The source answered the C-FIND with {finder.unreadable} {noun(finder.unreadable, 'row')} that cannot be "
            f"read: {finder.why_unreadable or 'without an identifier'}.",
            hint="Ask the PACS admin what its log says about the query.",
            status=0,
        )
