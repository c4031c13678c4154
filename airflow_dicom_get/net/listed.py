"""What a node lists of a study, by C-FIND: SOP Instance UIDs and their series, no more."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.errors import NotNegotiated, PeerProtocolError
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.find import PATIENT_ROOT_FIND, STUDY_ROOT_FIND, c_find
from airflow_dicom_get.net.messages import context_for
from airflow_dicom_get.records import Key

_UIDS = frozenset({h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID})


def list_instances(association: Association, study: str, series: Collection[str] | None = None) -> set[Key]:
    """The instances of a study that the node lists; a malformed SOP Instance UID as :func:`shown_uid` shows it.

    Parameters
    ----------
    series : collection of str, optional
        Ask for these alone; all by default.

    Raises
    ------
    NotNegotiated
        The node does not offer C-FIND.
    PeerProtocolError
        A row cannot be read.
    OperationFailed, ListTooLong, and whatever ends an association
    """
    model = next((m for m in (STUDY_ROOT_FIND, PATIENT_ROOT_FIND) if context_for(association, m) is not None), None)
    if model is None:
        raise NotNegotiated(f"{association.node} does not offer C-FIND.", node=str(association.node))
    wanted: Collection[str] = (
        series
        if series is not None
        else {
            uid
            for row in _rows(association, model, "SERIES", {h.STUDY_INSTANCE_UID: study, h.SERIES_INSTANCE_UID: ""})
            if is_uid(uid := shown_uid(row.get(h.SERIES_INSTANCE_UID)))
        }
    )
    found: set[Key] = set()
    for uid in sorted(wanted):
        keys = {h.STUDY_INSTANCE_UID: study, h.SERIES_INSTANCE_UID: uid, h.SOP_INSTANCE_UID: ""}
        for row in _rows(association, model, "IMAGE", keys):
            sop = shown_uid(row.get(h.SOP_INSTANCE_UID))
            if sop and i.text_value(row.get(h.SERIES_INSTANCE_UID)) in (uid, None):
                found.add((uid, sop))
    return found


def ask(association: Association, series: Mapping[str, Collection[str] | None]) -> dict[str, set[Key]]:
    """What :func:`list_instances` finds, by study, for the ``series`` of each; the association is ended with it.

    Raises
    ------
    As :func:`list_instances`; one that offers no C-FIND is released, any other failure aborts.
    """
    try:
        found = {study: list_instances(association, study, wanted) for study, wanted in series.items()}
    except NotNegotiated:
        association.release()
        raise
    except BaseException:
        association.abort()
        raise
    association.release()
    return found


def _rows(association: Association, model: str, level: str, keys: Mapping[int, str]) -> Iterator[dict[int, bytes]]:
    identifier = i.encode_identifier({i.QUERY_RETRIEVE_LEVEL: level, **keys}, _UIDS)
    study = keys[h.STUDY_INSTANCE_UID]
    for raw in c_find(association, model, identifier, row_seconds=association.deadlines.find_response):
        try:
            row = i.decode_identifier(raw, _UIDS)
        except h.HeaderError:
            association.abort()
            raise PeerProtocolError(
                f"{association.node} sent a C-FIND row that cannot be read.", node=str(association.node)
            ) from None
        if i.text_value(row.get(h.STUDY_INSTANCE_UID)) in (study, None):
            yield row
