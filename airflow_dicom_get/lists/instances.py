"""What a node lists of a study: SOP Instance UIDs and their series, no more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom.identifier import text_value
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.errors import NotNegotiated, PeerProtocolError
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.records import Key

log = logging.getLogger(__name__)


def list_instances(finder: Finder, study: str, series: Collection[str] | None = None) -> set[Key]:
    """The instances of a study that the node lists; a malformed SOP Instance UID as :func:`shown_uid` shows it.

    A row that names no series is of the one that was asked for. Where a SOP Instance UID comes in the answers for
    several series, it is listed in those alone that a row names: the node may ignore the key of the series.

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
    if not finder.offered:
        raise NotNegotiated(f"{finder.node} does not offer C-FIND.", node=str(finder.node))
    of_study = {h.STUDY_INSTANCE_UID: study}
    wanted = series
    if wanted is None:
        rows = finder.rows("SERIES", of_study, (h.SERIES_INSTANCE_UID,))
        wanted = {uid for row in rows if is_uid(uid := shown_uid(row.get(h.SERIES_INSTANCE_UID)))}
    came: dict[str, dict[str, bool]] = {}
    """By SOP Instance UID, the series in whose answers it came, and whether a row of that answer named the series."""
    for uid in sorted(wanted):
        for row in finder.rows("IMAGE", {**of_study, h.SERIES_INSTANCE_UID: uid}, (h.SOP_INSTANCE_UID,)):
            if sop := shown_uid(row.get(h.SOP_INSTANCE_UID)):
                told = came.setdefault(sop, {})
                told[uid] = told.get(uid, False) or text_value(row.get(h.SERIES_INSTANCE_UID)) is not None
    found = {(uid, sop) for sop, told in came.items() for uid, named in told.items() if named or len(told) == 1}
    unclear = len({sop for sop, told in came.items() if len(told) > 1 and not all(told.values())})
    if unclear:
        log.warning(
            "%s lists instances in answers for several series, without their series: %d are not told apart by that.",
            finder.node,
            unclear,
        )
    if finder.unreadable:
        raise PeerProtocolError(f"{finder.node} sent a C-FIND row that cannot be read.", node=str(finder.node))
    return found


def ask(association: Association, series: Mapping[str, Collection[str] | None]) -> dict[str, set[Key]]:
    """What :func:`list_instances` finds, by study, for the ``series`` of each; the association is ended with it.

    Raises
    ------
    As :func:`list_instances`; one that offers no C-FIND is released, any other failure aborts.
    """
    finder = Finder(association)
    try:
        found = {study: list_instances(finder, study, wanted) for study, wanted in series.items()}
    except NotNegotiated:
        association.release()
        raise
    except BaseException:
        association.abort()
        raise
    association.release()
    return found
