"""From a manifest to what is still to be fetched: the input of the next get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.vocabulary import HELD, OUTSIDE_LIST


def names_changes(manifest: Any, s3: Mapping[str, Any]) -> bool:
    """Whether it names objects that were changed: then sizes alone do not tell what is held.

    Raises
    ------
    ManifestError
        It cannot be read.
    """
    from airflow_dicom_get.manifest.frames import load_table

    return "size_changed" in load_table(manifest, **s3).column("reason").to_pylist()


def scopes_of(manifest: Any, s3: Mapping[str, Any]) -> list[Scope]:
    """The rows that are not held, by study; nothing to fetch gives an empty list.

    Parameters
    ----------
    manifest : pyarrow.Table, DataFrame, reference or URI
        Any shape that :func:`~airflow_dicom_get.manifest.frames.load_manifest` takes.
    s3 : mapping
        How to reach the bucket that a URI names.

    Raises
    ------
    ManifestError
        It cannot be read.
    InvalidQuery
        A row has no valid UIDs.
    """
    from airflow_dicom_get.dicom.uids import is_uid
    from airflow_dicom_get.manifest.frames import load_table

    table = load_table(manifest, **s3)
    columns = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "state")
    studies: dict[str, tuple[set[str], set[str]]] = {}
    for study, series, sop, state in zip(*(table.column(name).to_pylist() for name in columns), strict=True):
        if state in HELD | OUTSIDE_LIST:
            continue
        if not all(isinstance(uid, str) and is_uid(uid) for uid in (study, series, sop)):
            raise InvalidQuery(
                "A row of the manifest has no valid UIDs.", hint="Check that airflow-dicom-get wrote this manifest."
            )
        found = studies.setdefault(study, (set(), set()))
        found[0].add(series)
        found[1].add(sop)
    return [
        Scope(study, series=frozenset(series), instances=frozenset(sops)) for study, (series, sops) in studies.items()
    ]


def manifest_queries(tables: Sequence[Any]) -> list[dict[str, Any]]:
    """One query for each study of some manifests, with the instances that they list.

    All of them, held or not: what this destination holds is found there, and an earlier retrieval may have had
    another one.

    :param tables: the manifests, loaded
    """
    studies: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    columns = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "state")
    for table in tables:
        for study, series, sop, state in zip(*(table[name].to_pylist() for name in columns), strict=True):
            if state not in OUTSIDE_LIST:
                of_series, of_instances = studies.setdefault(study, ({}, {}))
                of_series[series] = of_instances[sop] = None
    return [
        {
            "QueryRetrieveLevel": "IMAGE",
            "StudyInstanceUID": study,
            "SeriesInstanceUID": list(series),
            "SOPInstanceUID": list(instances),
        }
        for study, (series, instances) in studies.items()
    ]
