"""The studies of a list in a file, as Items to map over."""

from __future__ import annotations

import logging

from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.engine.items import Item, make_item, pack
from airflow_dicom_get.engine.study_list import ListedStudy, read_study_list
from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.hooks.dicom import DicomHook

UNKNOWN = ("fail", "skip")
_LINES = 20

log = logging.getLogger(__name__)


def find_cohort(
    path: str,
    *,
    label: str,
    unknown: str = "fail",
    dicom_conn_id: str = DicomHook.default_conn_name,
) -> list[list[Item]]:
    """Find the studies of a CSV file at a PACS, and return Items to map over, each with its ``label`` of the file.

    The file has a column ``StudyInstanceUID`` or ``AccessionNumber``, and one with the labels; all of it is read before
    the PACS is asked. Accession numbers are not returned: what a task returns every viewer of the DAG can read, and so
    can the labels be.

    :param path: the file
    :param label: name of the column with the labels
    :param unknown: what happens if the PACS has no study for a row: ``fail``, or ``skip`` the row
    :param dicom_conn_id: the ``dicom`` connection to the PACS
    :return: lists of one Item each; of more where Airflow would not map over so many
    :raises AirflowFailException: the file is malformed, a row has no study, or the PACS refuses
    """
    with final_errors():
        if unknown not in UNKNOWN:
            raise invalid("unknown", f"{shown(unknown)} is not allowed", f"Give {' or '.join(UNKNOWN)}.")
        rows = read_study_list(path, label=label)
        hook = DicomHook(dicom_conn_id)
        scu = hook.get_scu()
        items: dict[str, Item] = {}
        nowhere: list[ListedStudy] = []
        for row in rows:
            found = scu.find({row.key: row.value}, level="STUDY", query_model=hook.query_model)
            for answer in found:
                study = str(answer.StudyInstanceUID)
                item = items.setdefault(study, {**make_item(study), "label": row.label})
                if item["label"] != row.label:
                    what = f"{shown_path(path)}, line {row.line}: its study stands in an earlier line by another label"
                    raise invalid("csv", what, "Give both the same label, or take one of them out.")
            if not found:
                nowhere.append(row)
    log.info("%d rows name %d studies.", len(rows), len(items))
    if nowhere:
        _report(path, nowhere, unknown)
    return pack(list(items.values()), target=1, at_most=conf.getint("core", "max_map_length", fallback=1024))


def _report(path: str, nowhere: list[ListedStudy], unknown: str) -> None:
    lines = ", ".join(str(row.line) for row in nowhere[:_LINES])
    more = f" and {len(nowhere) - _LINES} more" if len(nowhere) > _LINES else ""
    text = f"{shown_path(path)}: the PACS has no study for column {nowhere[0].key} of line {lines}{more}."
    if unknown == "fail":
        raise AirflowFailException(f"{text} Correct these lines, or go on without them with unknown='skip'.")
    log.warning("%s They are left out.", text)
