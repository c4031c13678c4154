"""From a query to the studies, series and instances that it means, by C-FIND."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.engine.parts import matching_studies
from airflow_dicom_get.engine.query import Filter, Query
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.lists.finder import Answer, Finder, Keys, check_answered
from airflow_dicom_get.lists.matching import Row, same_text
from airflow_dicom_get.records import Key

_STUDY_KEYS = (
    i.SOP_CLASSES_IN_STUDY,
    i.MODALITIES_IN_STUDY,
    h.PATIENT_ID,
    i.STUDY_RELATED_SERIES,
    i.STUDY_RELATED_INSTANCES,
)
MAX_CLASSES = 200
"""SOP classes that a study may be told to have, more than the standard has for storage: each is proposed in all of its
transfer syntaxes."""


@dataclass(slots=True)
class Scope:
    """What a query means within one study. ``None`` for series or instances: all of them."""

    study: str
    patient_id: bytes | None = None
    """As C-FIND returned it, encoded; the unique key above the study in Patient Root."""
    character_set: bytes = b"ISO_IR 192"
    """In which ``patient_id`` is encoded."""
    of_patient: bool = False
    """Whether it is asked for by its Patient ID."""
    series: frozenset[str] | None = None
    instances: frozenset[str] | None = None
    named: frozenset[Key] = frozenset()
    """Series and SOP Instance UIDs that a manifest lists: missing unless held, also where the source lists them no
    longer."""
    bad: frozenset[Key] = frozenset()
    """Rows of that manifest that cannot be asked for, since a UID is malformed."""
    filters: tuple[Filter, ...] = ()
    sop_classes: tuple[str, ...] = ()
    untold: set[int] = field(default_factory=set)
    """Keys not to ask for any more: one server reads every file for a key that it then leaves empty."""
    left_out: set[str] = field(default_factory=set)
    """UIDs that are named and not listed, and of which nothing is said: by all that the source tells, a filter may have
    left them out."""
    listed: bool = True
    """Whether C-FIND is there to list the study."""
    found: bool = False
    """Whether a C-FIND row said that the study is there."""

    @property
    def named_well(self) -> bool:
        """Whether the study can be asked for: an empty or malformed UID could mean others, or a path."""
        return is_uid(self.study)

    def patient_keys(self) -> dict[int, bytes]:
        """The unique key above the study in Patient Root, where it is known."""
        return i.patient_keys(self.patient_id or b"", self.character_set)

    def keys_above(self, query_model: str) -> dict[int, bytes]:
        """The unique keys above the study of a C-GET: in Patient Root the Patient ID.

        Raises
        ------
        InvalidQuery
            It is not known, and without it nothing is asked for.
        """
        if query_model != "PatientRoot":
            return {}
        if not self.patient_id:
            raise InvalidQuery(
                f"Study {self.study}: its Patient ID is unknown, and PatientRoot needs it.",
                hint="Give PatientID in the query, or use StudyRoot.",
                study=self.study,
            )
        return self.patient_keys()

    def is_of_patient(self, patient_id: bytes, character_set: bytes) -> bool:
        """Whether a Patient ID is the study's, as far as both are known."""
        known, patient_id = (self.patient_id or b"").strip(b"\0 "), patient_id.strip(b"\0 ")
        return not known or not patient_id or same_text(patient_id, character_set, known, self.character_set)

    @property
    def whole_series(self) -> bool:
        """Whether whole series are in scope, so that counts of series apply."""
        return self.instances is None and not self.filters_images

    @property
    def filters_images(self) -> bool:
        """Whether a key of the instances narrows the scope, so that the lists alone tell which they are."""
        return any(f.level == "IMAGE" for f in self.filters)

    @property
    def narrowed(self) -> bool:
        """Whether the query means a part of a study, so that one of which it leaves nothing is not meant."""
        return bool(self.filters or self.series or self.instances) and not self.named

    @property
    def whole_study(self) -> bool:
        """Whether the scope is the study, so that counts of the study apply."""
        return self.series is None and self.instances is None and not self.filters

    def names(self, series: str, sop: str) -> bool:
        """Whether an instance is among those that were given by their UIDs; where none were, every one is."""
        if self.named:
            return (series, sop) in self.named
        return self.instances is None or sop in self.instances


@dataclass(slots=True)
class Meant:
    """The studies that a query means.

    Attributes
    ----------
    scopes : list of Scope
        Of each study; none where nothing matches.
    doubt : str or None
        Why there may be more of them, as a reason of the vocabulary.
    unknown : frozenset of str
        Studies that are named beside another key, and are not there. Nothing is asked for of them: what comes under
        their UIDs later may contradict that key.
    """

    scopes: list[Scope]
    doubt: str | None = None
    unknown: frozenset[str] = frozenset()


def resolve(finder: Finder, query: Query, max_studies: int) -> Meant:
    """The studies that a query means.

    Of several that are named, those that the peer does not know are among them: each ends as ``empty``. Where they are
    named beside another key, they are told apart.

    Raises
    ------
    InvalidQuery
        More than ``max_studies`` match a query that names none, or the peer leaves a key of the query out of all
        its answers, and so does not match on it.
    NotNegotiated, OperationFailed
        C-FIND is needed and not to be had.
    """
    study_filters = [f for f in query.filters if f.level == "STUDY"]
    selecting = [f.keyword for f in study_filters if f.value]
    lower = tuple(f for f in query.filters if f.level != "STUDY" and f.value)
    if not finder.offered and query.studies:
        _check_needs_no_find(query)
        return Meant([_scope(query, study, lower, listed=False) for study in query.studies])
    if not query.studies and not selecting:
        return _from_below(finder, query, lower, max_studies)
    keys: Keys = {f.tag: f.value for f in study_filters}
    unreadable = finder.unreadable
    doubt = None
    rows: Iterable[Answer]
    if query.studies:
        rows = finder.named("STUDY", query.studies, keys, _STUDY_KEYS)
    else:
        matches = matching_studies(finder, keys, _STUDY_KEYS)
        rows, doubt = matches.answers.values(), matches.doubt
    found: dict[str, Scope] = {}
    for row, _ in rows:
        uid = shown_uid(row.get(h.STUDY_INSTANCE_UID))
        if uid not in found:
            scope = found[uid] = _scope(query, uid, lower)
            note_row(scope, row)
            classes = i.text_value(row.get(i.SOP_CLASSES_IN_STUDY)) or ""
            named = dict.fromkeys(x for part in classes.split("\\", MAX_CLASSES) if is_uid(x := part.strip("\0 ")))
            scope.sop_classes = tuple(named) if len(named) <= MAX_CLASSES else ()
    if not found:
        check_answered(finder)
    if finder.unreadable > unreadable:
        doubt = "list_contradicted"
    if not query.studies:
        if len(found) > max_studies:
            raise _too_many(len(found), max_studies)
    elif found and not selecting:
        for study in query.studies:
            found.setdefault(study, _scope(query, study, lower))
    unknown = _not_there(finder, query, selecting, found) if found and selecting else ()
    return Meant(list(found.values()), doubt, frozenset(unknown))


def _not_there(finder: Finder, query: Query, selecting: Sequence[str], found: Collection[str]) -> list[str]:
    """Of the studies that are named those that the peer does not have.

    The Patient ID is a unique key above them; by any other key one that is there is left out of what is meant.
    """
    left = [study for study in query.studies if study not in found]
    if not left or all(keyword == "PatientID" for keyword in selecting):
        return left
    above = {f.tag: f.value for f in query.filters if f.keyword == "PatientID" and f.value}
    return finder.absent(left, above)


def _check_needs_no_find(query: Query) -> None:
    """Refuse keys that C-FIND alone can match; in Patient Root the C-GET carries the Patient ID."""
    carried = "PatientID" if query.model == "PatientRoot" else None
    for key in query.filters:
        if key.value and key.keyword != carried:
            raise InvalidQuery(
                f"The PACS does not offer C-FIND, so {key.keyword} cannot be matched.",
                hint="Omit this key: the UIDs alone say what is meant.",
                key=key.keyword,
            )


def _scope(query: Query, study: str, filters: tuple[Filter, ...], listed: bool = True) -> Scope:
    return Scope(
        study,
        query.patient_id.encode() if query.patient_id and not listed else None,
        series=frozenset(query.series) or None,
        instances=frozenset(query.instances) or None,
        filters=filters,
        listed=listed,
        of_patient=query.patient_id is not None or query.model == "PatientRoot",
    )


def note_row(scope: Scope, row: Row) -> bool:
    """Keep what a row of the study says: that it is there, and its Patient ID, as it is.

    The first row that was not dropped decides whose study it is; False for one of another patient.
    """
    scope.found = True
    patient_id = row.get(h.PATIENT_ID, b"").strip(b"\0 ")
    if patient_id and not scope.patient_id:
        scope.patient_id, scope.character_set = patient_id, row.get(h.SPECIFIC_CHARACTER_SET, b"")
    return scope.is_of_patient(patient_id, row.get(h.SPECIFIC_CHARACTER_SET, b""))


def _too_many(count: int, max_studies: int, more_than: str = "") -> InvalidQuery:
    return InvalidQuery(
        f"The query matches {more_than}{count} studies; max_studies is {max_studies}. Nothing was fetched.",
        hint="Narrow the query, or raise max_studies.",
        count=count,
        max_studies=max_studies,
    )


def _from_below(finder: Finder, query: Query, filters: tuple[Filter, ...], max_studies: int) -> Meant:
    """Studies of series or instances that were given without their study: a relational C-FIND.

    Each of them lies in one study, and only a few copies of it in others: of more studies than may match and one for
    each UID nothing is kept.
    """
    if not query.series and not query.instances:
        raise InvalidQuery(
            "The query has no key that selects studies.",
            hint="Add a Study Instance UID, a date, an accession number or a patient ID.",
        )
    level, uids = ("IMAGE", query.instances) if query.instances else ("SERIES", query.series)
    keys: Keys = {h.SERIES_INSTANCE_UID: query.series} if query.series and query.instances else {}
    unreadable = finder.unreadable
    studies: dict[str, None] = {}
    most = max_studies + len(uids)
    for row, _ in finder.named(level, uids, keys, (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID)):
        studies.setdefault(shown_uid(row.get(h.STUDY_INSTANCE_UID)))
        if len(studies) > most:
            raise _too_many(most, max_studies, "more than ")
    if not studies:
        check_answered(finder)
    doubt = "list_contradicted" if finder.unreadable > unreadable else None
    scopes = [_scope(query, study, filters) for study in studies]
    for scope in scopes:
        scope.found = True
    return Meant(scopes, doubt)
