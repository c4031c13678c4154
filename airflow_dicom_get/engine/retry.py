"""From a manifest to what a get asks for: the one meaning of ``manifest=``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.narrowed import in_classes
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.manifest.schema import values_of
from airflow_dicom_get.manifest.scopes import Scopes, scopes_of
from airflow_dicom_get.records import Key
from airflow_dicom_get.vocabulary import CONTENT_IN_DOUBT, OUTSIDE_LIST


@dataclass(frozen=True, slots=True)
class Asked:
    """What a manifest asks for.

    Attributes
    ----------
    scopes : list of Scope
        Its studies, each with the instances that it lists.
    by_digest : bool
        Whether it names objects whose content is in doubt: sizes alone do not tell then what is held.
    narrowed : mapping
        What of its studies the manifest is of.
    """

    scopes: list[Scope]
    by_digest: bool
    narrowed: Scopes


def asked_by(manifest: Any, sop_classes: Collection[str] | None = None, query_model: str = "StudyRoot") -> Asked:
    """Every instance that a manifest lists, by study; what lies beside the list of its run is left out.

    What it says is held does not count: that was another moment, and perhaps another destination. What this
    destination holds is found there.

    Parameters
    ----------
    manifest : pyarrow.Table
    sop_classes : collection of str, optional
        The classes that are wanted: a row of another one asks for nothing.
    query_model : str
        In Patient Root the requests name the patient.

    Raises
    ------
    InvalidQuery
        A row has no valid UIDs.
    """
    columns = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "sop_class_uid", "state", "reason")
    studies: dict[str, tuple[set[Key], set[Key]]] = {}
    by_digest = False
    for number, (study, series, sop, sop_class, state, reason) in enumerate(values_of(manifest, columns), 1):
        if state in OUTSIDE_LIST or (sop_classes is not None and sop_class and sop_class not in sop_classes):
            continue
        if reason == "bad_uid":  # as the source wrote it; it stays missing
            studies.setdefault(study or "", (set(), set()))[1].add((series or "", sop or ""))
            continue
        if not all(isinstance(uid, str) and is_uid(uid) for uid in (study, series, sop)):
            raise InvalidQuery(
                f"Row {number} of the manifest names no instance that can be asked for: a UID is missing or malformed.",
                hint="Leave such rows out of the DataFrame that you give, or retrieve the study by its UID.",
                row=number,
            )
        studies.setdefault(study, (set(), set()))[0].add((series, sop))
        by_digest = by_digest or reason in CONTENT_IN_DOUBT
    of_patient = query_model == "PatientRoot"
    return Asked(
        [_scope(study, frozenset(named), frozenset(bad), of_patient) for study, (named, bad) in studies.items()],
        by_digest,
        in_classes(scopes_of([manifest]), sop_classes, studies),
    )


def _scope(study: str, named: frozenset[Key], bad: frozenset[Key], of_patient: bool) -> Scope:
    return Scope(
        study,
        of_patient=of_patient,
        series=frozenset(series for series, _ in named),
        instances=frozenset(sop for _, sop in named),
        named=named,
        bad=bad,
    )
