"""What a node lists of a study: SOP Instance UIDs and their series; and what it proves not to hold by that."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.identifier import text_value
from airflow_dicom_get.dicom.uids import is_uid, shown_uid
from airflow_dicom_get.errors import NotNegotiated, OperationFailed, PeerError, PeerProtocolError
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.lists.whole import Below, Cuts, Lists, larger
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.records import Key

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InstanceList:
    """What a node lists of a study.

    Attributes
    ----------
    keys : set of Key
        The instances.
    answers : dict
        By series that was asked for, how long its answer was.
    unclear : frozenset of str
        SOP Instance UIDs that came in the answers for several series and are of none of them, by what was told.
    absent : dict
        By what was expected and what it proves not to have in that series, the series in which it lists the same SOP
        Instance UID instead: none where it has no instance of it. What a list lacks that may be cut, or is
        contradicted, is not among them.
    """

    keys: set[Key]
    answers: dict[str, Below]
    unclear: frozenset[str] = frozenset()
    absent: Mapping[Key, Collection[str]] = field(default_factory=dict)


def list_instances(
    finder: Finder, study: str, series: Collection[str] | None = None, patient: Mapping[int, bytes] = {}
) -> InstanceList:
    """The instances of a study that the node lists; a malformed SOP Instance UID as :func:`shown_uid` shows it.

    A row that names no series is of the one that was asked for. Where a SOP Instance UID comes in the answers for
    several series, it is listed in those alone that a row names: the node may ignore the key of the series.

    Parameters
    ----------
    series : collection of str, optional
        Ask for these alone; all by default.
    patient : mapping, optional
        The unique key above the study in Patient Root, as :func:`patient_keys` makes it, where it is known.

    Raises
    ------
    NotNegotiated
        The node does not offer C-FIND, or in Patient Root alone, and the Patient ID is not known.
    PeerProtocolError
        A row cannot be read.
    OperationFailed, ListTooLong, and whatever ends an association
    """
    if not finder.offered:
        raise NotNegotiated(f"{finder.node} does not offer C-FIND.", node=str(finder.node))
    of_study: dict[int, str | bytes] = {h.STUDY_INSTANCE_UID: study}
    if finder.by_patient:
        of_study |= _patient_of(finder, study, patient)
    wanted = series
    if wanted is None:
        rows = finder.rows("SERIES", of_study, (h.SERIES_INSTANCE_UID,))
        wanted = {uid for row in rows if is_uid(uid := shown_uid(row.get(h.SERIES_INSTANCE_UID)))}
    came: dict[str, dict[str, bool]] = {}
    """By SOP Instance UID, the series in whose answers it came, and whether a row of that answer named the series."""
    answers: dict[str, Below] = {}
    for uid in sorted(wanted):
        distinct = 0
        for row in finder.rows("IMAGE", {**of_study, h.SERIES_INSTANCE_UID: uid}, (h.SOP_INSTANCE_UID,)):
            if sop := shown_uid(row.get(h.SOP_INSTANCE_UID)):
                told = came.setdefault(sop, {})
                distinct += uid not in told
                told[uid] = told.get(uid, False) or text_value(row.get(h.SERIES_INSTANCE_UID)) is not None
        answers[uid] = Below(finder.came, distinct)
    found = {(uid, sop) for sop, told in came.items() for uid, named in told.items() if named or len(told) == 1}
    unclear = frozenset(sop for sop, told in came.items() if len(told) > 1 and not any(told.values()))
    if unclear:
        log.warning(
            "%s lists instances in answers for several series, without their series: %d are not told apart by that.",
            finder.node,
            len(unclear),
        )
    if finder.unreadable:
        raise PeerProtocolError(f"{finder.node} sent a C-FIND row that cannot be read.", node=str(finder.node))
    return InstanceList(found, answers, unclear)


def _patient_of(finder: Finder, study: str, known: Mapping[int, bytes]) -> Mapping[int, bytes]:
    """The key above the study, as the node has it: by the one that is known, else by the UID of the study alone.

    A node may have given the study another Patient ID, and need not answer without one (PS3.4 C.4.1.2.2.1).
    """
    for above in (known, {}) if known else ({},):
        try:
            rows = list(finder.rows("STUDY", {**above, h.STUDY_INSTANCE_UID: study}, (h.PATIENT_ID,)))
        except OperationFailed as error:
            if above or error.transient:
                raise
            break
        told = {row.get(h.PATIENT_ID, b"").strip(b"\0 "): row.get(h.SPECIFIC_CHARACTER_SET, b"") for row in rows}
        if len(told) == 1 and all(told):
            return i.patient_keys(*told.popitem())
    if known:
        return known
    raise NotNegotiated(
        f"{finder.node} offers C-FIND in Patient Root alone, and does not tell the Patient ID of study {study}.",
        hint="Ask its admin to offer Study Root.",
        node=str(finder.node),
    )


def prove_absent(finder: Finder, study: str, listed: InstanceList, expected: Collection[Key]) -> InstanceList:
    """The same list, with what of ``expected`` it proves not to be there: the rule of :mod:`.whole`, as for any list.

    A SOP Instance UID is one instance at a node, whose admin may have moved it to another series of the study. So only
    where something is not listed, the levels above are asked, and every series that was not: what they count, whether
    they list what has nothing below it, and whether the UID is in one of them. A node that refuses an answer there
    proves nothing; nor does one that is asked in Patient Root: it may have the study under another Patient ID, too.

    Raises
    ------
    PeerError
        It breaks off, or says too much.
    """
    missing = {key for key in set(expected) - listed.keys if key[1] not in listed.unclear}
    if not missing or finder.by_patient:
        return listed
    of_study = {h.STUDY_INSTANCE_UID: study}
    counts: dict[str, int | None] = {}
    more = InstanceList(set(), {})
    try:
        for row in finder.rows("SERIES", of_study, (h.SERIES_INSTANCE_UID, i.SERIES_RELATED_INSTANCES)):
            uid = shown_uid(row.get(h.SERIES_INSTANCE_UID)) or ""
            counts[uid] = larger(counts.get(uid), finder.count(row, i.SERIES_RELATED_INSTANCES))
        rows, told = finder.came, False
        related_series = related_instances = None
        for row in finder.rows("STUDY", of_study, (i.STUDY_RELATED_SERIES, i.STUDY_RELATED_INSTANCES)):
            told = True
            related_series = larger(related_series, finder.count(row, i.STUDY_RELATED_SERIES))
            related_instances = larger(related_instances, finder.count(row, i.STUDY_RELATED_INSTANCES))
        unasked = counts.keys() - listed.answers.keys()
        if finder.unreadable or not all(map(is_uid, unasked)):
            return listed
        if unasked:
            more = list_instances(finder, study, unasked)
    except OperationFailed as error:
        log.info("%s does not tell whether its lists are whole: %s", finder.node, error.message)
        return listed
    series = {
        uid: Below(below.rows, below.listed, counts.get(uid))
        for uid, below in (listed.answers | more.answers).items()
        if uid in counts or below.rows
    }
    above = Below(rows, len(counts), related_series, filtered=not told)  # a study that is not listed has none
    lists = Lists(above, series, related_instances)
    if lists.contradicted():
        return listed
    doubts = lists.doubts(finder.cuts, {})
    instead: dict[str, list[str]] = {sop: [] for _, sop in missing if sop not in more.unclear}
    for uid, sop in chain(listed.keys, more.keys):
        if sop in instead:
            instead[sop].append(uid)
    absent = {
        key: instead[key[1]]
        for key in missing
        if key[1] in instead
        and (key[0] not in doubts.of_series if key[0] in counts else not doubts.of_study and key[0] not in series)
    }
    return replace(listed, absent=absent)


def ask(
    association: Association,
    series: Mapping[str, Collection[str] | None],
    expected: Mapping[str, Collection[Key]] | None = None,
    cuts: Cuts | None = None,
    patients: Mapping[str, Mapping[int, bytes]] = {},
) -> dict[str, InstanceList]:
    """What :func:`list_instances` finds, by study, for the ``series`` of each; the association is ended with it.

    Parameters
    ----------
    expected : mapping, optional
        By study, what should be there: see :func:`prove_absent`.
    cuts : Cuts, optional
        Where this node may cut its answers, as seen so far.
    patients : mapping, optional
        By study, the key of its patient: see :func:`list_instances`.

    Raises
    ------
    As :func:`list_instances`; one that offers no C-FIND is released, any other failure aborts. Where the node fails
    when it is asked whether these are whole, nothing is raised, and nothing proven.
    """
    finder = Finder(association, cuts)
    try:
        found = {
            study: list_instances(finder, study, wanted, patients.get(study, {})) for study, wanted in series.items()
        }
        try:
            for study, wanted in (expected or {}).items():
                found[study] = prove_absent(finder, study, found[study], wanted)
        except PeerError as error:  # the lists stand: they prove nothing absent
            log.info("%s does not tell whether its lists are whole: %s", finder.node, error.message)
            association.abort()
            return found
    except NotNegotiated:
        association.release()
        raise
    except BaseException:
        association.abort()
        raise
    association.release()
    return found
