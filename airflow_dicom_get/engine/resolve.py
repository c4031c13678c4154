"""From a query to the studies, series and instances that it means, by C-FIND."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.matching import Dropped, Matcher, Row
from airflow_dicom_get.engine.query import Filter, Query
from airflow_dicom_get.errors import InvalidQuery, NotNegotiated, OperationFailed, peer_text
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.find import PATIENT_ROOT_FIND, STUDY_ROOT_FIND, c_find
from airflow_dicom_get.records import Key

log = logging.getLogger(__name__)

MAX_ROWS = 200_000
"""Rows of one C-FIND, where nothing tells how many there should be."""
_UIDS = frozenset({h.SOP_CLASS_UID, h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})
_STUDY_KEYS = (
    i.SOP_CLASSES_IN_STUDY,
    i.MODALITIES_IN_STUDY,
    i.PATIENT_ID,
    i.STUDY_RELATED_SERIES,
    i.STUDY_RELATED_INSTANCES,
)
_LIST = 100
"""UIDs in one C-FIND."""


@dataclass(slots=True)
class Scope:
    """What a query means within one study. ``None`` for series or instances: all of them."""

    study: str
    patient_id: bytes | None = None
    """As C-FIND returned it, encoded; the unique key above the study in Patient Root."""
    character_set: bytes = b""
    """Specific Character Set of the row that ``patient_id`` came from."""
    series: frozenset[str] | None = None
    instances: frozenset[str] | None = None
    named: frozenset[Key] = frozenset()
    """Series and SOP Instance UIDs that a manifest lists: missing unless held, also where the source lists them no
    longer."""
    filters: tuple[Filter, ...] = ()
    sop_classes: tuple[str, ...] = ()
    untold: set[int] = field(default_factory=set)
    """Keys not to ask for any more: one server reads every file for a key that it then leaves empty."""
    listed: bool = True
    """Whether the study was found by C-FIND."""

    @property
    def whole_series(self) -> bool:
        """Whether whole series are in scope, so that counts of series apply."""
        return self.instances is None and not any(f.level == "IMAGE" for f in self.filters)

    @property
    def whole_study(self) -> bool:
        """Whether the scope is the study, so that counts of the study apply."""
        return self.series is None and self.instances is None and not self.filters

    def names(self, series: str, sop: str) -> bool:
        """Whether an instance is among those that were given by their UIDs; where none were, every one is."""
        if self.named:
            return (series, sop) in self.named
        return self.instances is None or sop in self.instances


class Finder:
    """C-FIND on an open association, in the model that the peer offers: Study Root if it does."""

    def __init__(self, association: Association) -> None:
        offered = {proposal.abstract_syntax for proposal in association.accepted.contexts.values()}
        self._association = association
        self._model = next((m for m in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) if m in offered), None)
        self.unreadable = 0
        """Rows that could not be read, or had no identifier."""
        self.dropped = Dropped()
        """Rows that contradict what was asked for, where a call names no other place to count them."""

    @property
    def offered(self) -> bool:
        """Whether the peer offers C-FIND at all."""
        return self._model is not None

    def require_model(self) -> str:
        """UID of the query model to use. Raises :class:`NotNegotiated` where the peer offers none."""
        if self._model is None:
            raise NotNegotiated(
                f"{self._association.node} does not offer C-FIND.",
                hint="Give Study Instance UIDs: without C-FIND, other keys cannot be resolved.",
                node=str(self._association.node),
            )
        return self._model

    def rows(
        self,
        level: str,
        keys: Mapping[int, str | Iterable[str]],
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
        keys: Mapping[int, str | Iterable[str]],
        returned: Iterable[int],
        max_rows: int = MAX_ROWS,
        dropped: Dropped | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[Row, bytearray]]:
        """Each row of one C-FIND that does not contradict ``keys``: its wanted elements, and its bytes.

        Parameters
        ----------
        dropped : Dropped, optional
            Takes the rows that contradict; those of the Finder by default.
        enough : callable, optional
            Asked after each row; once it is true, the C-FIND is cancelled.
        """
        model = self.require_model()
        dropped = dropped if dropped is not None else self.dropped
        elements: dict[int, str | Iterable[str]] = dict.fromkeys(returned, "")
        elements.update(keys)
        elements[i.QUERY_RETRIEVE_LEVEL] = level
        wanted = frozenset(elements) | {h.SPECIFIC_CHARACTER_SET}
        identifier = i.encode_identifier(elements, _UIDS)
        matcher = Matcher(level, keys)
        for raw in c_find(
            self._association,
            model,
            identifier,
            row_seconds=self._association.deadlines.find_response,
            max_rows=max_rows,
            enough=enough,
        ):
            try:
                row = i.decode_identifier(raw, wanted)
            except h.HeaderError as error:
                log.warning("%s sent a C-FIND row that cannot be read: %s", self._association.node, peer_text(error))
                row = {}
            if not row:
                self.unreadable += 1
            elif (why := matcher.contradiction(row)) is not None:
                dropped.add(why)
            else:
                yield row, raw


def resolve(finder: Finder, query: Query, max_studies: int) -> list[Scope]:
    """The studies that a query means; empty if it matches nothing.

    Of several that are named, those that the peer does not know are among them: each ends as ``empty``.

    Raises
    ------
    InvalidQuery
        More than ``max_studies`` match a query that names none, or the peer leaves a key of the query out of all
        its answers, and so does not match on it.
    NotNegotiated, OperationFailed
        C-FIND is needed and not to be had.
    """
    study_filters = [f for f in query.filters if f.level == "STUDY"]
    lower = tuple(f for f in query.filters if f.level != "STUDY" and f.value)
    if not finder.offered and query.studies and not any(f.value for f in query.filters if f.keyword != "PatientID"):
        return [_scope(query, study, lower, listed=False) for study in query.studies]
    if not query.studies and not any(f.value for f in study_filters):
        return _from_below(finder, query, lower, max_studies)
    found: dict[str, Scope] = {}
    for row in study_rows(finder, query.studies, study_filters):
        uid = i.text_value(row.get(h.STUDY_INSTANCE_UID))
        if uid is not None and is_uid(uid) and uid not in found:
            scope = found[uid] = _scope(query, uid, lower)
            note_patient(scope, row)
            classes = i.text_value(row.get(i.SOP_CLASSES_IN_STUDY)) or ""
            scope.sop_classes = tuple(part.strip("\0 ") for part in classes.split("\\") if is_uid(part.strip("\0 ")))
    if not found:
        check_answered(finder)
    if not query.studies:
        _check_count(len(found), max_studies)
    elif found and not any(f.value for f in study_filters):
        for study in query.studies:
            found.setdefault(study, _scope(query, study, lower))
    return list(found.values())


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
            f"The source answered the C-FIND with {finder.unreadable} unreadable rows.",
            hint="Ask the PACS admin what its log says about the query.",
            status=0,
        )


def _scope(query: Query, study: str, filters: tuple[Filter, ...], listed: bool = True) -> Scope:
    return Scope(
        study,
        query.patient_id.encode() if query.patient_id else None,
        series=frozenset(query.series) or None,
        instances=frozenset(query.instances) or None,
        filters=filters,
        listed=listed,
    )


def note_patient(scope: Scope, row: Row) -> None:
    """Keep the Patient ID of a row of the study, as it is."""
    patient_id = row.get(i.PATIENT_ID, b"").strip(b"\0 ")
    if patient_id:
        scope.patient_id, scope.character_set = patient_id, row.get(h.SPECIFIC_CHARACTER_SET, b"")


def study_rows(
    finder: Finder, studies: Sequence[str], filters: Sequence[Filter] = (), returned: Iterable[int] = _STUDY_KEYS
) -> Iterator[Row]:
    """The rows of studies that filters select; of named ones by lists, and then one by one what they did not bring."""
    keys: dict[int, str | Iterable[str]] = {f.tag: f.value for f in filters}
    if not studies:
        yield from finder.rows("STUDY", keys, (h.STUDY_INSTANCE_UID, *returned))
        return
    answered: set[str | None] = set()
    for start in range(0, len(studies), _LIST):
        part = studies[start : start + _LIST]
        refused = False
        try:
            for row in finder.rows("STUDY", {**keys, h.STUDY_INSTANCE_UID: part}, returned):
                answered.add(i.text_value(row.get(h.STUDY_INSTANCE_UID)))
                yield row
        except OperationFailed:  # the peer takes no UID lists, perhaps
            if len(part) == 1:
                raise
            refused = True
        if refused or (len(part) > 1 and not any(f.value for f in filters)):
            for study in part:
                if study not in answered:
                    yield from finder.rows("STUDY", {**keys, h.STUDY_INSTANCE_UID: study}, returned)


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise InvalidQuery(
            f"The query matches {count} studies; max_studies is {limit}. Nothing was fetched.",
            hint="Narrow the query, or raise max_studies.",
            count=count,
            max_studies=limit,
        )


def _from_below(finder: Finder, query: Query, filters: tuple[Filter, ...], max_studies: int) -> list[Scope]:
    """Studies of series or instances that were given without their study: a relational C-FIND."""
    if not query.series and not query.instances:
        raise InvalidQuery(
            "The query has no key that selects studies.",
            hint="Add a Study Instance UID, a date, an accession number or a patient ID.",
        )
    keys: dict[int, str | Iterable[str]] = {}
    level = "IMAGE" if query.instances else "SERIES"
    if query.series:
        keys[h.SERIES_INSTANCE_UID] = query.series
    if query.instances:
        keys[h.SOP_INSTANCE_UID] = query.instances
    studies: dict[str, None] = {}
    for row in finder.rows(level, keys, (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID)):
        uid = i.text_value(row.get(h.STUDY_INSTANCE_UID))
        if uid and is_uid(uid):
            studies.setdefault(uid)
    if not studies:
        check_answered(finder)
    _check_count(len(studies), max_studies)
    return [_scope(query, study, filters) for study in studies]
